"""Checkpoints to resume from: sharded over the ranks, complete or not there at all, checked before they are believed.

    runs/x/checkpoints/step-000040/
        shard-00001-model-00001-of-00002.safetensors ...    each rank's part of the weights and of AdamW's two moments (fp32)
        state.json                                          everything else, and a SHA-256 of every file

torch.distributed.checkpoint writes and reads the tensors, in safetensors: another number of ranks can resume, and nothing is
ever unpickled. Around it stands what a crash needs:

    complete    written to a folder *.part, synced, described by state.json, and renamed as the last act. What is not renamed is
                never read.
    believed    every file's digest is compared before loading; a folder that fails is left alone, named, and the one before it
                is taken. That is why two are kept.
    together    an error on one rank (a full disk, an unreadable file) is raised on all, so that no rank waits for the others.

All ranks need to see the same folder (on several nodes: a shared file system). What it is not: a model for others to load; that
is the folder `model` which train.py writes at the end.

Imports no sibling: copy this file alone. Every function here is called by all ranks, with the same arguments.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
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


def save_checkpoint(
    folder: Path, name: str, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], *, keep: int
) -> Path:
    """Write folder/name with the weights, the moments and `state` (anything JSON can hold); names sort by progress.

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
    """(newest checkpoint that is whole, its state, what was wrong with the newer ones); (None, {}, ...) where there is none.

    The digests are worked out by all ranks, each for its share of the files.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    refused = []
    for path in _together(lambda: _complete(folder))[0][::-1]:
        try:
            content = _together(lambda path=path: _content(path))[0]
            names = sorted(content["files"])[rank::ranks]
            _together(lambda path=path, content=content, names=names: _verify(path, content["files"], names))
            return path, content["state"], refused
        except CheckpointError as error:
            refused.append(str(error))
    return None, {}, refused


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's weights and moments into a model and an AdamW of the same names and shapes, on any number of ranks."""
    steps = _content(path)["updates"]
    for name, parameter in model.named_parameters():
        optimizer.state[parameter].clear()
        if name in steps:
            optimizer.state[parameter] |= {moment: torch.zeros_like(parameter) for moment in MOMENTS}
            optimizer.state[parameter]["step"] = torch.tensor(steps[name], dtype=torch.float32, device=parameter.device)
    tensors, _ = _tensors(model, optimizer)
    _all_ranks_or_none(lambda: dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path))))


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What is saved, by name, the very tensors themselves; and each parameter's number of updates, where it has had any."""
    tensors, steps = {}, {}
    for name, parameter in model.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach()
        state = optimizer.state.get(parameter)
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
