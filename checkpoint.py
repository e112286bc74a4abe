"""What a run needs to survive a crash: its folder, with a lock and logs, and checkpoints to resume from.

    runs/x/.lock                    held by the process that trains into the folder
    runs/x/metrics.jsonl            first line: settings, commit, machine; then one line a step
    runs/x/samples.jsonl            the responses to one problem a step
    runs/x/checkpoints/step-000040/
        shard-00001-model-00001-of-00002.safetensors ...    each rank's part of the weights and of AdamW's two moments (fp32)
        state.json                                          everything else, and a SHA-256 of every file
    runs/x/best/step-000012/        the weights of SFT's lowest validation loss, in the same form; removed at the end of the run

torch.distributed.checkpoint writes and reads the tensors as safetensors, so another number of ranks can resume, and nothing is
ever unpickled. This file adds:

    complete    a checkpoint is written to a folder *.part and renamed as the last act; a *.part is never read.
    verified    every file's digest is compared before loading. A damaged checkpoint is left alone and named, and the one before
                it is used. That is why two are kept.
    together    an error on one rank (a full disk, an unreadable file) is raised on all, so that no rank waits for the others.
    ours        only folders named as above are read, and of those only files that we wrote are ever removed.
    strict      logs and state.json are JSON as RFC 8259 has it: a number that is not finite is null.

Imports no sibling: copy this file alone. It needs a process group (torch.distributed), even for one process. Every function is
called by all ranks, with the same arguments, and all must see the same folder (on several nodes: a shared file system).
"""

import argparse
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
FILE_BYTES = 2 * 10**9  # whole tensors in one file; while it writes, a rank holds its share of one file twice
KEPT = 2  # checkpoints that stay on the disk; the second is for when the first is damaged
NAME = "step-([0-9]{6}|[1-9][0-9]{6,})"  # of a checkpoint's folder; whatever has another name is somebody else's
WRITING = ".writing"  # in a folder *.part of ours


class CheckpointError(Exception):
    """Raised on all ranks if one of them failed with the run's folder or a checkpoint. Names ranks, files and causes."""


class NotFinite(RuntimeError):
    """Too many updates had a loss or a gradient that was not finite."""


# ---------------------------------------------------------------------------------------------------- the run's folder


@dataclass
class Progress:
    """What a run has done so far. Beside the weights and moments there is no other state: the order of the data and every
    random number follow from the seeds and these counts."""

    sft_steps: int = 0
    rl_steps: int = 0
    rl_length: int = 0  # how many RL steps the run was to have when it last went on
    evaluated: int = 0  # the last RL step with a periodic evaluation after it
    best_loss: float = math.inf  # SFT's lowest validation loss, and the step after which it was measured
    best_step: int = 0
    skipped: int = 0  # updates left out because the loss or the gradient was not finite
    table: dict[str, dict[str, dict[str, float]]] = dataclasses.field(default_factory=dict)  # accuracy: when, kind

    def count_skipped(self, skipped: int, allowed: int) -> None:
        """Add updates that were left out. NotFinite if that makes more than are allowed."""
        self.skipped += skipped
        if skipped and self.skipped > allowed:
            raise NotFinite(f"{self.skipped} updates were not finite and were left out; --max_skipped allows {allowed}")


@dataclass
class RunFolder:
    """A run's folder. Every method is called by all ranks with the same arguments; only rank 0 writes the logs."""

    out: Path
    config: dict[str, Any]  # the settings
    origin: dict[str, Any]  # what the run is made from, see origin_of; its "data" must be the same when the run is resumed
    saved_at: float = dataclasses.field(default_factory=time.monotonic)  # when the last checkpoint was written
    lock: Any = None

    def open(self, say: Callable[[str], Any], *, resume: bool) -> None:
        """Make the folder and lock it. CheckpointError if it holds a run that is not to be resumed, or is locked, or if a new
        run would write over what is there. `say` prints a note if the file system has no locks.

        Called after every other check: a run that is refused must not leave a folder that the corrected one would trip over.
        """

        def claim() -> None:
            if not (self.out / "metrics.jsonl").exists():
                taken = [self.out / name for name in ("samples.jsonl", "model", "model.part")]
                taken += _checkpoints(self.out / "checkpoints")
                taken += _checkpoints(self.out / "best")
                for path in taken:
                    if path.exists():
                        raise ValueError(f"{path} is there already, without a metrics.jsonl; name another folder with --out")
            elif not resume:
                raise ValueError(f"--out {self.out} holds a run already (metrics.jsonl); name another folder, or --resume it")
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = (self.out / ".lock").open("a")
            lock(self.lock, f"--out {self.out}: another process is training there (ranks can outlive a killed torchrun)", say)

        _together(lambda: claim() if dist.get_rank() == 0 else None)

    def close(self) -> None:
        if self.lock is not None:
            self.lock.close()

    def log(self, *records: dict[str, Any], name: str = "metrics.jsonl") -> None:
        if dist.get_rank() == 0:
            with (self.out / name).open("a", encoding="utf-8") as file:
                file.write("".join(to_json(record) + "\n" for record in records))

    def begin(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, machine: str, say: Callable[[str], Any], *, resume: bool
    ) -> Progress:
        """Write the first line of metrics.jsonl, or with `resume` go on from the newest whole checkpoint: the progress so far.

        Going on loads the weights and moments, and cuts the logs to where they were then. Without a checkpoint the logs are
        emptied. ValueError if the checkpoint is of other data or prompts. `say` prints what was found.
        """
        path, state, damaged = find_checkpoint(self.out / "checkpoints") if resume else (None, {}, [])
        for reason in damaged:
            say(f"a damaged checkpoint is skipped: {reason}")
        before = state.get("data", {})  # an older version kept less
        changes = differences(before, {name: value for name, value in self.origin["data"].items() if name in before})
        if changes:
            made_from = "its data differs, or its prompts do (some chat templates write today's date)"
            raise ValueError("\n".join([f"{path}: {made_from}", *changes]))
        progress = Progress(**_with_inf(state.get("progress", {})))
        head = {"config": self.config, **self.origin, "device": machine, "ranks": dist.get_world_size()}
        sizes = state.get("logs", {})
        if resume and dist.get_rank() == 0 and not (self.out / "model").exists():  # a finished run has logged its last word
            for file in self._logs():
                os.truncate(file, sizes.get(file.name, 0))
        if path is None:
            if resume:
                say("nothing to resume: from the start")
            self.log(head)
            return progress
        if state["commit"] != self.origin["commit"]:
            say(f"note: the checkpoint is of commit {state['commit']}, this code is {self.origin['commit']}")
        before = stored_config(self.out) or {}
        if changes := differences(before | {"resume": True}, self.config):
            say("\n".join(["settings that have changed:", *changes]))
            self.log({**head, "stage": "resume"})
        load_checkpoint(path, model, optimizer)
        say(f"resumed: {path}, {progress.sft_steps} SFT and {progress.rl_steps} RL steps")
        return progress

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Write a checkpoint of the run as it is now. It holds the lengths of the logs: resuming cuts off what came later."""
        sizes = {}
        if dist.get_rank() == 0:
            for file in self._logs():
                with file.open("a") as handle:
                    os.fsync(handle.fileno())
                sizes[file.name] = file.stat().st_size
        state = {"progress": dataclasses.asdict(progress), "logs": sizes, **self.origin}
        name = f"step-{progress.sft_steps + progress.rl_steps:06d}"
        save_checkpoint(self.out / "checkpoints", name, model, optimizer, state, keep=KEPT)
        self.saved_at = time.monotonic()

    def save_best(self, model: nn.Module, step: int) -> None:
        """Keep the weights as they are now, those of SFT's lowest validation loss so far. The next checkpoint must name this
        step in its progress."""
        keep = KEPT + 1  # so each checkpoint finds its own
        save_checkpoint(self.out / "best", f"step-{step:06d}", model, None, {}, keep=keep)

    def load_best(self, model: nn.Module, step: int) -> None:
        """Load the weights that save_best kept after this step. CheckpointError if they are damaged or missing."""
        path = self.out / "best" / f"step-{step:06d}"
        _checked(path)
        load_checkpoint(path, model, None)

    def remove_best(self) -> None:
        """Remove what save_best kept, and the folder `best` if nothing else is in it. Called by rank 0 alone."""
        folder = self.out / "best"
        for path in filter(_is_ours, _checkpoints(folder)):
            _remove(path)
        _remove_parts(folder)
        if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
            folder.rmdir()

    def _logs(self) -> list[Path]:
        files = [self.out / "metrics.jsonl", self.out / "samples.jsonl"]
        return [file for file in files if file.exists()]


def stored_config(out: Path) -> dict[str, Any] | None:
    """The settings of the run in a folder, None if there is no run. ValueError as in stored_head."""
    head = stored_head(out)
    return head and head["config"]


def stored_head(out: Path) -> dict[str, Any] | None:
    """Settings ("config"), machine and origin of the run in a folder, from its metrics.jsonl: the first line, or the last one
    that says it went on with others. None if there is no run, or if it ended while it wrote the first line. ValueError for a
    file of another program, and for checkpoints without settings."""
    path = out / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if not lines or not lines[0].endswith(b"\n"):
        if _checkpoints(out / "checkpoints"):
            raise ValueError(f"{out} has checkpoints but no metrics.jsonl, whose first line has the settings")
        return None
    changed = [line for line in lines[1:] if line.startswith(b'{"config"') and line.endswith(b"\n")]
    try:
        head = json.loads([lines[0], *changed][-1])
        return head | {"config": _with_inf(head["config"])}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}:1: not the settings of a run, {lines[0][:80]!r}") from error


def lock(file: IO[Any], held: str, say: Callable[[str], Any]) -> None:
    """Lock an open file until it is closed, or the process dies. ValueError with the text `held` if another process has it.

    Some file systems have no locks (Lustre without -o flock, some NFS): then `say` gets a note, and there is no lock.
    """
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


# ---------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(
    folder: Path, name: str, model: nn.Module, optimizer: torch.optim.Optimizer | None, state: dict[str, Any], *, keep: int
) -> Path:
    """Write folder/name: the weights, the moments (not if optimizer is None) and `state` (anything JSON can hold).

    name: step-000040 or the like. The newest `keep` checkpoints up to this one stay; those of a later step are removed too: a
    resumed run has left them. What is not ours stays: if it is in the way, it gets another name. CheckpointError leaves the
    other checkpoints as they were.
    """
    part, final = folder / f"{name}.part", folder / name
    rank, ranks = dist.get_rank(), dist.get_world_size()

    def begin() -> None:
        _remove_parts(folder)  # what a killed run left is of no use
        _make_way(part)
        part.mkdir(parents=True)
        (part / WRITING).touch()

    def complete() -> None:
        text = to_json({**content, "digest": _digest(content)}, indent=1)
        (part / "state.json").write_text(text, encoding="utf-8")
        _make_way(final)
        part.rename(final)
        (final / WRITING).unlink()
        ours = [path for path in _checkpoints(folder) if _is_ours(path)]
        stay = [path for path in ours if path.name <= name][-keep:]
        for path in ours:
            if path not in stay:
                _remove(path)

    _together(lambda: begin() if rank == 0 else None)
    tensors, steps = _tensors(model, optimizer)
    writer = dcp.HuggingFaceStorageWriter(str(part), fqn_to_index_mapping=_files(tensors), save_distributed=True)
    _together(lambda: dcp.save(tensors, storage_writer=writer))
    files = sorted(part.glob("shard-*.safetensors"))[rank::ranks]
    digests = _together(lambda: {file.name: _sha256(file) for file in files})
    by_name = {name: digest for some in digests for name, digest in some.items()}
    content = json.loads(to_json({"name": name, "state": state, "updates": steps, "files": by_name}))
    _together(lambda: complete() if rank == 0 else None)
    return final


def find_checkpoint(folder: Path) -> tuple[Path | None, dict[str, Any], list[str]]:
    """(newest checkpoint that is whole, its state, what is wrong with the newer ones); (None, {}, ...) if there is none."""
    damaged = []
    for path in _together(lambda: _checkpoints(folder))[0][::-1]:
        try:
            return path, _checked(path)["state"], damaged
        except CheckpointError as error:
            damaged.append(str(error))
    return None, {}, damaged


def _checked(path: Path) -> dict[str, Any]:
    """A checkpoint's state.json; CheckpointError if a file is damaged. Each rank compares its share of the digests."""

    def verify() -> None:
        names = sorted(content["files"])
        for name in names[dist.get_rank() :: dist.get_world_size()]:
            if _sha256(path / name) != content["files"][name]:
                raise ValueError(f"{path / name}: its digest is not the one in state.json")

    content = _together(lambda: _content(path))[0]
    _together(verify)
    return content


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Load a checkpoint's weights, and its moments into a fresh AdamW if there is one."""
    steps = _content(path)["updates"]
    for name, parameter in model.named_parameters() if optimizer else ():
        if name in steps:
            optimizer.state[parameter] |= {moment: torch.zeros_like(parameter) for moment in MOMENTS}
            optimizer.state[parameter]["step"] = torch.tensor(steps[name], dtype=torch.float32, device=parameter.device)
    tensors, _ = _tensors(model, optimizer)
    _together(lambda: dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path))))


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> tuple[dict[str, Tensor], dict[str, float]]:
    """({name: tensor} to save or to load into, {parameter: its number of updates if it has had any})."""
    tensors, steps = {}, {}
    for name, parameter in model.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach()
        state = optimizer.state.get(parameter) if optimizer else None
        if state:
            tensors |= {f"{moment}.{name}": state[moment] for moment in MOMENTS}
            steps[name] = float(state["step"])
    return tensors, steps


def _files(tensors: dict[str, Tensor]) -> dict[str, int]:
    """The number, from 1, of the file that each tensor goes to."""
    numbers, number, size = {}, 1, 0
    for name, tensor in tensors.items():
        size += tensor.nbytes
        if size > FILE_BYTES and numbers:
            number, size = number + 1, tensor.nbytes
        numbers[name] = number
    return numbers


def _together(work: Callable[[], Any]) -> list[Any]:
    """Do something on every rank: each rank's result, or on all of them one CheckpointError with every rank's error."""
    try:
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
    """The checkpoints that were renamed into place, oldest first."""
    named = [path for path in folder.glob("step-*") if re.fullmatch(NAME, path.name)]
    return sorted(path for path in named if path.is_dir())


def _is_ours(path: Path) -> bool:
    """Whether we wrote this checkpoint here: only such a one is ever removed. A link is its maker's."""
    try:
        return bool(_content(path)) and not path.is_symlink()
    except (OSError, ValueError):
        return False


def _remove(path: Path) -> None:
    """Delete the files of a checkpoint of ours, whole or in part, and its folder if nothing else is in it."""
    for file in [*path.glob("shard-*.safetensors"), path / "state.json", path / WRITING]:
        file.unlink(missing_ok=True)
    if not any(path.iterdir()):
        path.rmdir()


def _remove_parts(folder: Path) -> None:
    for path in folder.glob("step-*.part"):
        if (path / WRITING).is_file() and not path.is_symlink():
            _remove(path)


def _make_way(path: Path) -> None:
    """Remove a checkpoint of ours, and give another name to whatever else is there."""
    if _is_ours(path):
        _remove(path)
    if path.is_symlink() or path.exists():
        path.rename(path.with_name(f"{path.name}-{time.time_ns()}"))


def _content(path: Path) -> dict[str, Any]:
    """state.json, checked against its own digest and its folder's name. ValueError names the file."""
    file = path / "state.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{file}: {error}") from error
    if not isinstance(content, dict) or content.pop("digest", None) != _digest(content):
        raise ValueError(f"{file}: its content does not have its digest")
    if content.get("name", path.name) != path.name:  # a copy under another name is its maker's. Older versions wrote no name
        raise ValueError(f"{file}: it is of {content['name']}")
    return content


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------- the command


def write_model(run: Path, out: Path, step: int | None) -> None:
    """Write a model folder from a checkpoint of a run: the newest whole one, or the one of a step [SFT and RL steps together].

    It has the dtype that the run computed in. ValueError if there is no such checkpoint, or if `out` exists.
    """
    from model import blank_model, resolve_model, save_model  # here: all above works without them
    from parallel import compute_dtype, ranks_of

    if out.exists():
        raise ValueError(f"--out {out}: there already")
    head = stored_head(run)
    if head is None:
        raise ValueError(f"{run}: no run (no metrics.jsonl)")
    with ranks_of("cpu", 60.0):
        if step is None:
            path, _, damaged = find_checkpoint(run / "checkpoints")
            if path is None:
                raise ValueError("\n".join([f"{run}: no whole checkpoint", *damaged]))
        else:
            path = run / "checkpoints" / f"step-{step:06d}"
            _checked(path)
        model, tokenizer = blank_model(resolve_model(head["config"]["model"]))
        model.to_empty(device="cpu")
        load_checkpoint(path, model, None)
        device = "cpu" if head["device"].startswith("cpu") else "cuda"
        dtype = compute_dtype(head["config"]["dtype"], torch.device(device))
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        save_model(model, tokenizer, out)
    print(f"{out}: the weights of {path}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a model folder from a checkpoint of a run.", allow_abbrev=False)
    parser.add_argument("run", type=Path, help="the folder of a run, train.py's --out")
    parser.add_argument("--out", type=Path, required=True, help="the model folder to write")
    parser.add_argument("--step", type=int, help="of this step, SFT and RL steps together (default: the newest whole one)")
    args = parser.parse_args(argv)
    try:
        write_model(args.run, args.out, args.step)
    except (ValueError, CheckpointError) as error:
        sys.exit(f"checkpoint.py: {error}")


if __name__ == "__main__":
    main()
