"""What a crash needs: the run's folder with its lock and logs, and checkpoints to resume from, complete or not there at all.

    runs/x/.lock                    held by the process that trains into the folder
    runs/x/metrics.jsonl            the first line: settings, commit, machine; then a line a step
    runs/x/samples.jsonl            responses of one problem a step
    runs/x/checkpoints/step-000040/
        shard-00001-model-00001-of-00002.safetensors ...    each rank's part of the weights and of AdamW's two moments (fp32)
        state.json                                          everything else, and a SHA-256 of every file
    runs/x/best/step-000012/        the weights of SFT's lowest validation loss, in the same form; removed when the run is over

torch.distributed.checkpoint writes and reads the tensors, in safetensors: another number of ranks can resume, and nothing is
ever unpickled. Around it is what a crash needs:

    complete    written to a folder *.part, synced, described by state.json, and renamed as the last act. What is not renamed is
                never read.
    believed    every file's digest is compared before loading; a folder that fails is left alone, named, and the one before it
                is taken. That is why two are kept.
    together    an error on one rank (a full disk, an unreadable file) is raised on all, so that no rank waits for the others.

All ranks need to see the same folder (on several nodes: a shared file system). What it is not: a model for others to load; that
is the folder `model` that train.py writes at the end.

Imports no sibling: copy this file alone. It needs a process group (torch.distributed), of one process too; every function here
is called by all ranks, with the same arguments.
"""

import dataclasses
import fcntl
import hashlib
import json
import math
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
FILE_BYTES = 2 * 10**9  # of the whole tensors in one file; a rank holds its share of one file twice while it writes


class CheckpointError(Exception):
    """A checkpoint could not be written or read; on all ranks alike. The message names ranks, files and causes."""


# ---------------------------------------------------------------------------------------------------- the run's folder


class NotFinite(RuntimeError):
    """Too many updates had a loss or a gradient that was not finite."""


@dataclass
class Progress:
    """What a run has done so far. With the weights, the moments and SFT's best weights it is all that a run is made of: the
    order of the data and every random number follow from the seeds and these counts."""

    sft_steps: int = 0
    rl_steps: int = 0
    evaluated: int = 0  # the last RL step with a periodic evaluation after it
    best_loss: float = math.inf  # the lowest validation loss of the SFT, and after which of its steps
    best_step: int = 0
    skipped: int = 0  # updates left out because the loss or the gradient was not finite
    table: dict[str, dict[str, dict[str, float]]] = dataclasses.field(default_factory=dict)  # accuracy: when, kind

    def count_skipped(self, skipped: int, allowed: int, now: str) -> None:
        """Count updates that were left out; NotFinite if they are more than are allowed."""
        self.skipped += skipped
        if skipped and self.skipped > allowed:
            raise NotFinite(
                f"{self.skipped} updates were left out because the loss or the gradient norm was not finite ({now}), "
                f"--max_skipped allows {allowed}"
            )


@dataclass
class RunFolder:
    """A run's folder. Every method is called by all ranks with the same arguments; rank 0 alone writes the logs.

    config      the settings, and in may_change the names of those that a resumed run may have otherwise
    origin      what the run is made from: "data" (digests of the files), "commit" and "torch"; see origin_of
    keep        how many checkpoints stay
    """

    out: Path
    config: dict[str, Any]
    origin: dict[str, Any]
    may_change: Collection[str]
    keep: int
    saved_at: float = dataclasses.field(default_factory=time.monotonic)  # when the last checkpoint was written
    lock: Any = None

    def open(self, *, resume: bool) -> None:
        """Make the folder and lock it. ValueError if it holds a run that is not to be resumed, or another process has it.

        Called after every other check: a run that is refused must not leave a folder that the corrected one would trip over.
        """
        refused = _together(lambda: self._claim(resume) if dist.get_rank() == 0 else None)[0]
        if refused:
            raise ValueError(f"--out {self.out}: {refused}")

    def _claim(self, resume: bool) -> str | None:
        if (self.out / "metrics.jsonl").exists() and not resume:
            return "holds a run already (metrics.jsonl); name another folder, or --resume it"
        self.out.mkdir(parents=True, exist_ok=True)
        self.lock = lock(self.out)
        if self.lock is None:
            return "another process is training there (ranks can outlive a torchrun that was killed)"
        return None

    def close(self) -> None:
        if self.lock is not None:
            self.lock.close()

    def log(self, *records: dict[str, Any], name: str = "metrics.jsonl") -> None:
        if dist.get_rank() == 0:
            with (self.out / name).open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(record) + "\n" for record in records))

    def begin(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, machine: str, say: Callable[[str], Any], *, resume: bool
    ) -> Progress:
        """Go on from a checkpoint, or write the first line of metrics.jsonl: the progress so far. ValueError as in resume."""
        path, progress = self.resume(model, optimizer, say) if resume else (None, Progress())
        if path is not None:
            say(f"resumed: {path}, {progress.sft_steps} SFT and {progress.rl_steps} RL steps")
        elif resume:
            say("nothing to resume: from the start")
        if path is None:
            made_from = {"commit": self.origin["commit"], "torch": self.origin["torch"], "device": machine}
            self.log({"config": self.config, **made_from, "ranks": dist.get_world_size()})
        return progress

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """A checkpoint of the run as it is now, with the lengths of its logs: what comes after them is cut off on resuming."""
        sizes = {}
        for file in self._logs() if dist.get_rank() == 0 else ():
            with file.open("a") as handle:
                os.fsync(handle.fileno())
            sizes[file.name] = file.stat().st_size
        state = {"progress": dataclasses.asdict(progress), "config": self.config, "logs": sizes}
        state |= {**self.origin, "ranks": dist.get_world_size()}
        name = f"step-{progress.sft_steps + progress.rl_steps:06d}"
        save_checkpoint(self.out / "checkpoints", name, model, optimizer, state, keep=self.keep)
        self.saved_at = time.monotonic()

    def save_best(self, model: nn.Module, step: int) -> None:
        """Keep the weights as they are now, which have SFT's lowest validation loss so far. To be followed by a checkpoint
        whose progress names the step: then every checkpoint that is kept finds the weights that it names."""
        save_checkpoint(self.out / "best", f"step-{step:06d}", model, None, {}, keep=self.keep + 1)

    def load_best(self, model: nn.Module, step: int) -> None:
        """Put the weights that save_best kept after this step in place. CheckpointError if they are damaged or not there."""
        path = self.out / "best" / f"step-{step:06d}"
        try:
            _checked(path)
        except CheckpointError as error:
            text = "these are the weights of SFT's lowest loss, there is no copy: train into another --out"
            raise CheckpointError(f"{error}; {text}") from error
        load_checkpoint(path, model, None)

    def resume(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, say: Callable[[str], Any]
    ) -> tuple[Path | None, Progress]:
        """(checkpoint, progress): the newest whole checkpoint's weights and moments are put in place, the logs are cut to
        where they were then. (None, Progress()) without one: an earlier run's logs are emptied, because the run starts from the
        beginning. ValueError if the checkpoint is of other settings or data; `say` is told what was passed over.
        """
        path, state, refused = find_checkpoint(self.out / "checkpoints")
        for reason in refused:
            say(f"a checkpoint is damaged and passed over: {reason}")
        if path is not None:
            for kind, now in (("config", self.config), ("data", self.origin["data"])):
                changes = differences(state[kind], now, self.may_change)
                if changes:
                    raise ValueError("\n".join([f"{path}: its {kind} differs", *changes]))
            if state["commit"] != self.origin["commit"]:
                say(f"note: the checkpoint is of commit {state['commit']}, this code is {self.origin['commit']}")
            load_checkpoint(path, model, optimizer)
        for file in self._logs() if dist.get_rank() == 0 else ():
            os.truncate(file, state["logs"].get(file.name, 0) if path else 0)
        return path, Progress(**state["progress"]) if path else Progress()

    def _logs(self) -> list[Path]:
        return [file for name in ("metrics.jsonl", "samples.jsonl") if (file := self.out / name).exists()]


def remove_best(out: Path) -> None:
    """Rank 0 removes what RunFolder.save_best kept in a run's folder."""
    if dist.get_rank() == 0:
        shutil.rmtree(out / "best", ignore_errors=True)


def lock(out: Path) -> Any:
    """An open file that keeps others from training into the folder until it is closed or we die; None if another has it."""
    file = (out / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return file.close()
    return file


def stored_config(out: Path) -> dict[str, Any] | None:
    """The settings of the run in a folder: the first line of its metrics.jsonl; None if there is no such line (yet)."""
    try:
        with (out / "metrics.jsonl").open(encoding="utf-8") as file:
            return json.loads(file.readline())["config"]
    except (FileNotFoundError, json.JSONDecodeError):  # a run that was killed before it had written the whole line
        return None


def differences(there: dict[str, Any], here: dict[str, Any], may_change: Collection[str] = ()) -> list[str]:
    """A line for each setting that is not the same in both."""
    names = [name for name in there | here if name not in may_change and there.get(name) != here.get(name)]
    return [f"  {name}: {there.get(name)!r} there, {here.get(name)!r} here" for name in names]


def origin_of(data: dict[str, str]) -> dict[str, Any]:
    """What a run is made from: SHA-256 of its files, which a resumed run must find unchanged, and the versions of the code."""
    digests = {name: hashlib.sha256(Path(file).read_bytes()).hexdigest() for name, file in data.items() if file}
    return {"data": digests, "commit": code_commit(), "torch": torch.__version__}


def code_commit() -> str:
    """The commit of this code, with a + if the files differ from it; 'unknown' outside a git checkout of its own."""
    here = Path(__file__).resolve().parent
    try:
        git = partial(subprocess.run, cwd=here, capture_output=True, text=True, check=True)
        if Path(git(["git", "rev-parse", "--show-toplevel"]).stdout.strip()).resolve() != here:
            return "unknown"  # a copy inside another repository, whose commit says nothing about this code
        head = git(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        return head + ("+" if git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ---------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(
    folder: Path, name: str, model: nn.Module, optimizer: torch.optim.Optimizer | None, state: dict[str, Any], *, keep: int
) -> Path:
    """Write folder/name with the weights, the moments (None: without) and `state` (anything JSON can hold); names sort by
    progress.

    Once it is complete, `keep` checkpoints stay, it and those before it; later ones are of a future that was not kept. A
    CheckpointError leaves the others as they were.
    """
    part, final = folder / f"{name}.part", folder / name
    rank, ranks = dist.get_rank(), dist.get_world_size()
    _together(lambda: _empty(part) if rank == 0 else None)
    tensors, steps = _tensors(model, optimizer)
    writer = dcp.HuggingFaceStorageWriter(str(part), fqn_to_index_mapping=_files(tensors), save_distributed=True)
    _all_ranks_or_none(lambda: dcp.save(tensors, storage_writer=writer))
    files = sorted(part.iterdir())[rank::ranks]
    digests = _together(lambda: {file.name: _sha256(file) for file in files})
    content = {"state": state, "updates": steps, "files": {name: d for some in digests for name, d in some.items()}}

    def complete() -> None:
        with (part / "state.json").open("w", encoding="utf-8") as file:
            json.dump({**content, "digest": _digest(content)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        if final.exists():
            shutil.rmtree(final)
        part.rename(final)
        _sync_folder(folder)
        stay = [path for path in _complete(folder) if path.name <= name][-keep:]
        for path in _complete(folder):
            if path not in stay:
                shutil.rmtree(path)

    _together(lambda: complete() if rank == 0 else None)
    return final


def find_checkpoint(folder: Path) -> tuple[Path | None, dict[str, Any], list[str]]:
    """(newest checkpoint that is whole, its state, what was wrong with the newer ones); (None, {}, ...) if there is none.

    The digests are worked out by all ranks, each for its share of the files.
    """
    refused = []
    for path in _together(lambda: _complete(folder))[0][::-1]:
        try:
            return path, _checked(path)["state"], refused
        except CheckpointError as error:
            refused.append(str(error))
    return None, {}, refused


def _checked(path: Path) -> dict[str, Any]:
    """A checkpoint's state.json; CheckpointError if a file is damaged."""
    content = _together(lambda: _content(path))[0]
    names = sorted(content["files"])[dist.get_rank() :: dist.get_world_size()]
    _together(lambda: _verify(path, content["files"], names))
    return content


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Put a checkpoint's weights and moments into a model and an AdamW of the same names and shapes, on any number of ranks;
    without an AdamW the weights alone."""
    steps = _content(path)["updates"]
    for name, parameter in model.named_parameters() if optimizer else ():
        optimizer.state[parameter].clear()
        if name in steps:
            optimizer.state[parameter] |= {moment: torch.zeros_like(parameter) for moment in MOMENTS}
            optimizer.state[parameter]["step"] = torch.tensor(steps[name], dtype=torch.float32, device=parameter.device)
    tensors, _ = _tensors(model, optimizer)
    _all_ranks_or_none(lambda: dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path))))


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What is saved, by name, the very tensors themselves; and each parameter's number of updates, if it has had any."""
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
        if size and size + tensor.numel() * tensor.element_size() > FILE_BYTES:
            number, size = number + 1, 0
        numbers[name] = number
        size += tensor.numel() * tensor.element_size()
    return numbers


def _together(work: Callable[[], Any]) -> list[Any]:
    """Do something on every rank: what each one returned, or one CheckpointError with everybody's errors, on all of them."""
    try:
        mine = (work(), None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        mine = (None, f"rank {dist.get_rank()}: {error}")
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    errors = [error for _, error in everybody if error]
    if errors:
        raise CheckpointError("; ".join(errors))
    return [result for result, _ in everybody]


def _all_ranks_or_none(work: Callable[[], Any]) -> None:
    """For torch.distributed.checkpoint, which raises on all ranks itself, with everybody's errors and their tracebacks."""
    try:
        work()
    except dcp.api.CheckpointException as error:
        causes = [f"rank {rank}: {cause}" for rank, (cause, _) in sorted(error.failures.items())]
        raise CheckpointError("; ".join(causes)) from error


def _complete(folder: Path) -> list[Path]:
    """The checkpoints that were renamed into place, by progress."""
    return sorted(path for path in folder.glob("*") if path.is_dir() and path.suffix != ".part")


def _content(path: Path) -> dict[str, Any]:
    """state.json, checked against its own digest."""
    file = path / "state.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{file}: {error}") from error
    if not isinstance(content, dict) or content.pop("digest", None) != _digest(content):
        raise ValueError(f"{file}: does not have the digest it states")
    return content


def _verify(path: Path, digests: dict[str, str], names: list[str]) -> None:
    for name in names:
        if _sha256(path / name) != digests[name]:
            raise ValueError(f"{path / name}: does not have the digest that state.json states")


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def _empty(folder: Path) -> None:
    """Make the folder, or make it anew: what a killed run left there is worth nothing."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _sync_folder(folder: Path) -> None:
    """Make the renaming itself survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
