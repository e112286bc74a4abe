"""What a run needs to survive a crash: its folder, with a lock and logs, and checkpoints to resume from.

    runs/x/.lock                    held by the process that trains into the folder
    runs/x/metrics.jsonl            first line: settings, commit, machine; then one line a step
    runs/x/samples.jsonl            the responses to one problem a step
    runs/x/checkpoints/step-000040/
        shard-00001-model-00001-of-00002.safetensors ...    each rank's part of the weights and of AdamW's two moments (fp32)
        state.json                                          everything else, and a SHA-256 of every file

torch.distributed.checkpoint writes and reads the tensors, so another number of ranks can resume. A checkpoint is written to a
folder *.part, and renamed as the last act. Every file's digest is compared before loading; if a checkpoint is damaged, the one
before it is used. An error on one rank (a full disk, an unreadable file) is raised on all, so that no rank waits for another.
Imports no sibling: copy this file alone. It needs a process group (torch.distributed), even for one process. Every function is
called by all ranks, with the same arguments, and all must see the same folder (on several nodes: a shared file system).
"""

import fcntl
import hashlib
import json
import math
import os
import runpy
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.optim import Optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
PART = "unfinished.part"  # a checkpoint that is being written
TENSORS = 32  # in one file; while it writes, a rank holds its share of one file twice
KEPT = 2  # checkpoints that stay on the disk; the second is for when the first is damaged
NAME = "step-" + 6 * "[0-9]"  # of a checkpoint's folder; whatever has another name is somebody else's
Say = Callable[[str], Any]  # prints a text


class CheckpointError(Exception):
    """Raised on all ranks if one of them failed with the run's folder or a checkpoint. Names ranks, files and causes."""


class NotFinite(RuntimeError):
    """Too many updates had a loss or a gradient that was not finite."""


@dataclass
class Progress:
    """All state of a run beside weights and moments: every random number follows from the seeds and these counts."""

    sft_steps: int = 0
    rl_steps: int = 0
    rl_length: int = 0  # how many RL steps the run was to have when it last went on
    best_loss: float = math.inf  # SFT's lowest validation loss, and the step after which it was measured
    best_step: int = 0
    skipped: int = 0  # updates left out because the loss or the gradient was not finite
    table: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)  # accuracy: when, kind

    def count_skipped(self, skipped: int, allowed: int) -> None:
        """Add updates that were left out. NotFinite if that makes more than are allowed."""
        self.skipped += skipped
        if skipped and self.skipped > allowed:
            raise NotFinite(f"{self.skipped} updates were not finite and were left out; --max_skipped allows {allowed}")


@dataclass
class RunFolder:
    """A run's folder. Only rank 0 writes the logs."""

    out: Path
    config: dict[str, Any]  # the settings
    origin: dict[str, Any]  # what the run is made from, see origin_of; its "data" must be the same when the run is resumed
    saved_at: float = field(default_factory=time.monotonic)  # when the last checkpoint was written
    lock: Any = None

    def open(self, say: Say, *, resume: bool) -> None:
        """Make the folder and lock it. CheckpointError if it is locked, or if it holds what a run would write and is no run to
        resume. Called after every other check: a run that is refused must leave no folder."""

        def claim() -> None:
            ours = [self.out / name for name in ("metrics.jsonl", "samples.jsonl", "model", "model.part")]
            there = [path for path in ours + _checkpoints(self.out / "checkpoints") if path.exists()]
            if there and not (resume and there[0] == ours[0]):
                raise ValueError(f"{there[0]} is there already: name another --out, or --resume a run that has a metrics.jsonl")
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = (self.out / ".lock").open("a")
            lock(self.lock, f"--out {self.out}: another process is training there (ranks can outlive a killed torchrun)", say)

        _together(claim, only=0)

    def close(self) -> None:
        if self.lock is not None:
            self.lock.close()

    def log(self, *records: dict[str, Any], name: str = "metrics.jsonl") -> None:
        if dist.get_rank() == 0:
            with (self.out / name).open("a", encoding="utf-8") as file:
                file.write("".join(to_json(record) + "\n" for record in records))
                file.flush()
                os.fsync(file.fileno())  # a checkpoint says how long it is

    def begin(
        self, model: nn.Module, optimizer: Optimizer, machine: str, say: Say, *, steps: int, resume: bool
    ) -> Progress | None:
        """Write the first line of metrics.jsonl, or with `resume` go on from the newest whole checkpoint, with the logs cut to
        where they were then. Returns the progress, or None if the run has its model and either all of its `steps` RL steps or
        no checkpoint to go on from. If it goes on, its model gets another name. ValueError if the checkpoint is of other data,
        or of more steps."""
        finished = self.out / "model"
        path, state, damaged = find_checkpoint(self.out / "checkpoints")
        for reason in damaged:
            say(f"a damaged checkpoint is skipped: {reason}")
        if path and (changes := differences(state["data"], self.origin["data"])):
            made_from = "its data differs, or its prompts do (some chat templates write today's date)"
            raise ValueError("\n".join([f"{path}: {made_from}", *changes]))
        done = state["progress"]["rl_steps"] if path else steps
        if done > steps:
            raise ValueError(f"--steps: the run in {self.out} has done {done} RL steps, and is to have {steps}")
        if done == steps and finished.exists():
            return None
        if dist.get_rank() == 0:
            if finished.exists():  # all that it has logged stays
                finished.rename(f"{finished}-{done:06d}")
                say(f"the model after {done} steps is now {finished.name}-{done:06d}")
            else:
                for file in self._logs():
                    os.truncate(file, state["logs"].get(file.name, 0) if path else 0)
        head = {"config": self.config, **self.origin, "device": machine, "ranks": dist.get_world_size()}
        if path is None:
            if resume:
                say("nothing to resume: from the start")
            self.log(head)
            return Progress()
        progress = Progress(**_with_inf(state["progress"]))
        before = stored_config(self.out)
        before |= {"resume": True, "out": self.config["out"], "commit": state["commit"]}
        if changes := differences(before, self.config | {"commit": self.origin["commit"]}):
            say("\n".join(["settings that have changed:", *changes]))
            self.log({**head, "stage": "resume"})
        load_checkpoint(path, model, optimizer)
        say(f"resumed: {path}, {progress.sft_steps} SFT and {progress.rl_steps} RL steps")
        return progress

    def save(self, model: nn.Module, optimizer: Optimizer, progress: Progress) -> None:
        """Write a checkpoint of the run as it is now. It holds the lengths of the logs: resuming cuts off what came later."""
        sizes = {file.name: file.stat().st_size for file in self._logs()}
        state = {"progress": asdict(progress), "logs": sizes, **self.origin}
        if progress.best_step and not progress.rl_steps:
            state["needs"] = f"step-{progress.best_step:06d}"  # SFT ends with its weights
        name = f"step-{progress.sft_steps + progress.rl_steps:06d}"
        save_checkpoint(self.out / "checkpoints", name, model, optimizer, state)
        self.saved_at = time.monotonic()

    def load_best(self, model: nn.Module, step: int) -> None:
        """Load the weights of the checkpoint after this SFT step. CheckpointError if it is damaged or missing."""
        path = self.out / "checkpoints" / f"step-{step:06d}"
        verified(path)
        load_checkpoint(path, model, None)

    def _logs(self) -> list[Path]:
        files = [self.out / "metrics.jsonl", self.out / "samples.jsonl"]
        return [file for file in files if file.exists()]


def stored_config(out: Path) -> dict[str, Any] | None:
    """The settings of the run in a folder, from the first line of its metrics.jsonl, or the last that says it went on with
    others. None if there is no whole line yet. ValueError for another program's file."""
    path = out / "metrics.jsonl"
    *lines, _ = path.read_bytes().split(b"\n") if path.exists() else [b""]
    if not lines:
        return None
    heads = [line for line in lines if line.startswith(b'{"config": {')]
    if not heads:
        raise ValueError(f"{path}:1: not the settings of a run, {lines[0][:80]!r}")
    return _with_inf(json.loads(heads[-1])["config"])


def lock(file: IO[Any], held: str, say: Say) -> None:
    """Lock an open file until it is closed, or the process dies. ValueError with the text `held` if another process has it. On
    a file system without locks (some Lustre and NFS) `say` gets a note."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # EWOULDBLOCK, or EACCES from NFS
        raise ValueError(held) from error
    except OSError as error:
        say(f"note: {file.name} cannot be locked ({error}): do not start a second process into the same folder")


def to_json(value: Any, **settings: Any) -> str:
    """JSON, with the settings of json.dumps. It has no infinity and no NaN: such a number is null."""
    finite = json.loads(json.dumps(value), parse_constant=lambda name: None)
    return json.dumps(finite, allow_nan=False, **settings)


def _with_inf(values: dict[str, Any]) -> dict[str, Any]:
    """Settings, or a progress, as they were before to_json. None of them can be None, -inf or NaN."""
    return {name: math.inf if value is None else value for name, value in values.items()}


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """A line for each value that differs."""
    names = [name for name in there | here if there.get(name) != here.get(name)]
    return [f"  {name}: {there.get(name)!r} there, {here.get(name)!r} here" for name in names]


def origin_of(data: dict[str, str]) -> dict[str, Any]:
    """What a run is made from: SHA-256 of its data files, which must be unchanged to resume, and the versions of the code."""
    digests = {name: _sha256(Path(file)) for name, file in data.items() if file}
    return {"data": digests, "commit": code_commit(), "torch": torch.__version__}


def code_commit() -> str:
    """The commit of the repository that this code is in, with a + if files differ from it; "unknown" if there is none."""
    command = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def save_checkpoint(folder: Path, name: str, model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Write folder/name (step-000040 or the like): weights that are not frozen, moments, and `state` (anything JSON can hold).
    The newest KEPT checkpoints up to this one stay, and those that a state of theirs names as "needs"; those of a later step
    go: a resumed run has left them. What is not ours stays: if it is in the way, it gets another name."""
    part, final = folder / PART, folder / name

    def begin() -> None:
        if part.exists():
            _remove(part)  # what a killed run left is of no use
        part.mkdir(parents=True, exist_ok=True)

    def complete() -> None:
        text = to_json({**content, "digest": _digest(content)}, indent=1)
        (part / "state.json").write_text(text, encoding="utf-8")
        if _is_ours(final):
            _remove(final)
        if os.path.lexists(final):
            final.rename(f"{final}-{time.time_ns()}")
        part.rename(final)
        ours = {path.name: _content(path) for path in _checkpoints(folder) if _is_ours(path)}
        stay = [path for path in ours if path <= name][:KEPT]
        stay += [ours[path]["state"].get("needs") for path in stay]
        for path in ours.keys() - stay:
            _remove(folder / path)

    _together(begin, only=0)
    tensors = _tensors(model, optimizer)
    steps = [float(moments["step"]) for moments in optimizer.state.values()]  # all have the same
    updates = max(steps, default=0.0)
    files = {name: 1 + index // TENSORS for index, name in enumerate(tensors)}
    writer = dcp.HuggingFaceStorageWriter(str(part), fqn_to_index_mapping=files, save_distributed=True)
    _together(lambda: dcp.save(tensors, storage_writer=writer))
    mine = sorted(part.glob("shard-*.safetensors"))[dist.get_rank() :: dist.get_world_size()]
    digests = {}
    for of_rank in _together(lambda: {file.name: _sha256(file) for file in mine}):
        digests |= of_rank
    content = {"name": name, "state": state, "updates": updates, "files": digests}
    content = json.loads(to_json(content | {"loss_scale": optimizer.param_groups[0].get("loss_scale")}))
    _together(complete, only=0)


def find_checkpoint(folder: Path) -> tuple[Path | None, dict[str, Any], list[str]]:
    """(newest checkpoint that is whole, its state, what is wrong with the newer ones); (None, {}, ...) if there is none."""
    damaged = []
    for path in _together(lambda: _checkpoints(folder))[0]:
        try:
            return path, verified(path)["state"], damaged
        except CheckpointError as error:
            damaged.append(str(error))
    return None, {}, damaged


def verified(path: Path) -> dict[str, Any]:
    """A checkpoint's state.json; CheckpointError if a file is damaged. Each rank compares its share of the digests."""

    def verify() -> None:
        names = sorted(content["files"])
        for name in names[dist.get_rank() :: dist.get_world_size()]:
            if _sha256(path / name) != content["files"][name]:
                raise ValueError(f"{path / name}: its digest is not the one in state.json")

    content = _together(lambda: _content(path))[0]
    _together(verify)
    return content


def load_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer | None) -> None:
    """Load a checkpoint's weights, and its moments and loss scale into a fresh AdamW if there is one. Frozen weights stay."""
    content = _content(path)
    updates = content["updates"]
    if optimizer and content["loss_scale"]:  # of a run in float16
        optimizer.param_groups[0]["loss_scale"] = content["loss_scale"]
    if optimizer and updates:
        for _, parameter in _trained(model):
            optimizer.state[parameter] |= {moment: torch.zeros_like(parameter) for moment in MOMENTS}
            optimizer.state[parameter]["step"] = torch.tensor(updates, device=parameter.device)
    tensors = _tensors(model, optimizer)
    _together(lambda: dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path))))


def _tensors(model: nn.Module, optimizer: Optimizer | None) -> dict[str, Tensor]:
    """What to save, or to load into, by its name in the checkpoint."""
    tensors = {}
    for name, parameter in _trained(model):
        tensors[f"weight.{name}"] = parameter.detach()
        if optimizer and parameter in optimizer.state:
            tensors |= {f"{moment}.{name}": optimizer.state[parameter][moment] for moment in MOMENTS}
    return tensors


def _trained(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The parameters that are not frozen."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _together(work: Callable[[], Any], only: int | None = None) -> list[Any]:
    """Do something on every rank, or on one only: each rank's result, or on all one CheckpointError with every rank's error."""
    mine = (None, None)  # result, error
    try:
        if only in (None, dist.get_rank()):
            mine = (work(), None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        mine = (None, f"rank {dist.get_rank()}: {error}")
    except dcp.api.CheckpointException as error:  # torch.distributed.checkpoint raises it on all ranks, with all causes
        causes = [f"rank {rank}: {cause}" for rank, (cause, _) in sorted(error.failures.items())]
        mine = (None, "; ".join(causes))
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    errors = dict.fromkeys(error for _, error in everybody if error)  # each once
    if errors:
        raise CheckpointError("; ".join(errors))
    return [result for result, _ in everybody]


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that were renamed into place, newest first."""
    return sorted(folder.glob(NAME), reverse=True)


def _is_ours(path: Path) -> bool:
    """Whether we wrote this checkpoint here: only such a one is ever removed. A link is its maker's."""
    try:
        return bool(_content(path)) and not path.is_symlink()
    except (OSError, ValueError):
        return False


def _remove(path: Path) -> None:
    """Delete the files of a checkpoint of ours, whole or in part, and its folder if nothing else is in it."""
    for file in [*path.glob("shard-*.safetensors"), path / "state.json"]:
        file.unlink(missing_ok=True)
    if not any(path.iterdir()):
        path.rmdir()


def _content(path: Path) -> dict[str, Any]:
    """state.json, checked against its own digest. ValueError names the file."""
    file = path / "state.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.pop("digest") != _digest(content):
            raise ValueError("its content does not have its digest")
        if content["name"] != path.name:  # a copy under another name is its maker's
            raise ValueError(f"it is of {content['name']}")
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # AttributeError: JSON, but no object
        raise ValueError(f"{file}: {error}") from error
    return content


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":  # python checkpoint.py RUN --out DIR; by name, because this file imports no sibling
    runpy.run_module("tools.export", run_name="__main__")
