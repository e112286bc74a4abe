"""Training on several processes: FSDP2 (fully sharded data parallel) in the few functions that the loop needs.

One process per GPU, started by torchrun. Every rank holds a 1/N part of each fp32 weight, of its gradient and of its optimizer
state; a block's weights are gathered, in the compute dtype, just before it is used and given back right after. One process is
the same with N = 1.

Three rules keep the ranks together, and each has its function here:

    equal passes    a forward or backward pass gathers and reduces, so all ranks must make equally many: `padded`
    sums, not means losses are divided by counts over all ranks, so gradients are summed over ranks: `shard`
    ragged work     what differs from rank to rank (sampling) runs on a whole copy without any communication: `whole_model`;
                    behind it the ranks meet, and a rank that does not come is named: `meet`

What it is not: tensor, pipeline or context parallelism. A sequence and the activations of its micro-batch fit on one GPU.

Imports model.py.
"""

import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from model import CausalLM, inverse_frequencies, read_weights


def start_ranks(device: str, timeout_minutes: float) -> torch.device:
    """Join the other ranks if torchrun started us, else be a world of one; the device of this rank.

    device: "cpu", "cuda", or "auto" for CUDA where there is one. A rank that waits longer than the timeout for others gives up.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if device == "cuda" else torch.device(device)
    if here.type == "cuda":
        torch.cuda.set_device(here)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo"
        alone = {} if "WORLD_SIZE" in os.environ else {"rank": 0, "world_size": 1, "store": dist.HashStore()}
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes), **alone)
    return here


def end_ranks(device: torch.device) -> None:
    """Leave the group that start_ranks joined; in a `finally`, so that it is left behind an error too.

    NCCL's own ending waits for the other ranks. Behind an error they are still at work, or gone, and the reason would be held
    back with it for as long as they wait. So one of several ranks with GPUs says what went wrong and leaves at once: torchrun
    then ends the others.
    """
    error = sys.exception()
    if error is not None and device.type == "cuda" and world()[1] > 1:
        if isinstance(error, SystemExit):
            print(error, file=sys.stderr)
        else:
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    dist.destroy_process_group()


def world() -> tuple[int, int]:
    """(rank, number of ranks); (0, 1) where no group was made."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def over_ranks(values: dict[str, float], device: torch.device, op: Any = dist.ReduceOp.SUM) -> dict[str, float]:
    """Each value summed (or another op) over the ranks, in float64. Every rank must call it with the same names."""
    names = sorted(values)
    total = torch.tensor([values[name] for name in names], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total, op)
    return dict(zip(names, total.tolist(), strict=True))


class RankLost(RuntimeError):
    """Another rank did not come to where all ranks meet."""


def control_group() -> dist.ProcessGroup:
    """The group for `meet`: gloo, on CPUs, because it can say who is missing, where NCCL aborts the process."""
    return dist.new_group(backend="gloo")


def meet(group: dist.ProcessGroup, word: int, timeout_minutes: float) -> int:
    """Wait for all ranks and exchange a word: the largest of all. RankLost where one does not come in that time."""
    words = torch.tensor([word])
    try:
        dist.monitored_barrier(group, timedelta(minutes=timeout_minutes), wait_all_ranks=True)
        dist.all_reduce(words, dist.ReduceOp.MAX, group)
    except RuntimeError as error:
        raise RankLost(
            f"rank {world()[0]} waited for the other ranks in vain ({error}). Either one of them ended (its own message, or "
            "the kernel's about memory, says why), or it is still at its share of the work: then a larger --timeout_minutes "
            "or a smaller --max_new_tokens helps"
        ) from error
    return int(words)


def deal(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Indices of the work for each rank: by cost from the largest, there and back again (0 1 2 2 1 0 0 1 ...), so that the
    costly ones do not meet on one rank and the numbers differ by one at most. The share with index 0 is rank 0's.
    """
    turns = [*range(ranks), *range(ranks - 1, -1, -1)]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for turn, index in enumerate(sorted(range(len(costs)), key=lambda i: (-costs[i], i))):
        shares[turns[turn % len(turns)]].append(index)
    return sorted((sorted(share) for share in shares), key=lambda share: share or [len(costs)])


def padded(batches: list[list[int]], device: torch.device) -> list[list[int]]:
    """This rank's micro-batches with empty ones behind, as many in all as the rank with the most has."""
    most = over_ranks({"batches": len(batches)}, device, dist.ReduceOp.MAX)["batches"]
    return batches + [[] for _ in range(int(most) - len(batches))]


def shard(model: CausalLM, *, device: torch.device, dtype: torch.dtype, shard_ranks: int, offload: bool) -> CausalLM:
    """Shard the model in place: each block by itself, then what is left (embedding, final norm, head).

    device       of the computation; the model may still be on the meta device, for load_sharded
    dtype        of activations and of the gathered weights; the shards, gradients and optimizer states are fp32
    shard_ranks  how many ranks share one copy of the weights; the groups of so many ranks hold replicas (HSDP). 0: all ranks
    offload      keep shards, gradients and optimizer states in host memory
    """
    ranks, kind = world()[1], device.type
    shard_ranks = shard_ranks or ranks
    if ranks % shard_ranks:
        raise ValueError(f"--shard_ranks {shard_ranks} does not divide the {ranks} ranks")
    shape, names = (ranks // shard_ranks, shard_ranks), ("replicate", "shard")
    mesh = init_device_mesh(kind, shape, mesh_dim_names=names) if shard_ranks < ranks else init_device_mesh(kind, (ranks,))
    settings = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=kind == "cuda") if offload else OffloadPolicy(),
        # the root too: after a pass without gradient it would otherwise stay whole, and keep its values over the next update
        "reshard_after_forward": True,
    }
    for module in [*model.model.layers, model]:
        fully_shard(module, **settings)
        module.set_gradient_divide_factor(1.0)  # the sum over ranks, where FSDP's default is the mean
        module.set_force_sum_reduction_for_comms(True)
    return model


def load_sharded(model: CausalLM, folder: Path, *, device: torch.device, offload: bool) -> None:
    """Fill a sharded model of shapes only (meta) from a model folder, each rank reading the rows that it holds.

    So N ranks read the file once together, and no host ever holds N copies. device and offload as `shard` got them; the
    angles of the rotary positions are a buffer, which FSDP does not move, so they are on the device in either case. ValueError
    as in model.read_weights.
    """
    place = torch.device("cpu") if offload else device
    parameters = dict(model.named_parameters())
    rows = {name: local_rows(parameter) for name, parameter in parameters.items()}
    model.to_empty(device=place)
    model.inv_freq = inverse_frequencies(model.config).to(device)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in read_weights(model, folder, device=place, rows=rows.__getitem__):
            local = parameters[name].to_local()
            if len(local):  # a rank beyond the last row holds none
                local.copy_(tensor)


def local_rows(parameter: Tensor) -> slice:
    """Which rows of a parameter this rank holds: equal chunks, rounded up, the last one shorter."""
    part = next(i for i, placement in enumerate(parameter.placements) if placement.is_shard())
    count, index = parameter.device_mesh.size(part), parameter.device_mesh.get_local_rank(part)
    chunk = -(-len(parameter) // count)
    begin = min(index * chunk, len(parameter))
    return slice(begin, min(begin + chunk, len(parameter)))


@contextmanager
def whole_model(model: CausalLM) -> Iterator[CausalLM]:
    """The model with all weights gathered, in the compute dtype, for work that differs from rank to rank.

    It is a second module around the gathered tensors themselves: no copy of the weights, and none of FSDP's hooks, so that no
    forward of it communicates. All ranks enter and leave together.
    """
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.unshard()
    try:
        yield _rebuilt(model, {name: parameter.detach() for name, parameter in model.named_parameters()})
    finally:
        for module in modules:
            module.reshard()


def fingerprint(model: CausalLM) -> int:
    """A sum over the bits of all weights of a whole model: two copies that differ in one weight have different ones."""
    total = 0
    for number, parameter in enumerate(model.parameters(), start=1):
        bits = parameter.detach().view(torch.int16 if parameter.element_size() == 2 else torch.int32)
        total += number * int(bits.sum(dtype=torch.int64))
    return total % 2**50  # float64, in which the ranks compare it, holds that exactly


def same_on_all_ranks(model: CausalLM, device: torch.device) -> None:
    """RuntimeError where the ranks' whole copies of the model differ; every rank must ask."""
    own = fingerprint(model)
    most = over_ranks({"of": own, "of minus": -own}, device, dist.ReduceOp.MAX)
    if most["of"] != -most["of minus"]:
        raise RuntimeError(f"the weights are not the same on all ranks (rank {world()[0]} has checksum {own})")


@torch.no_grad()
def model_on_host(model: CausalLM, dtype: torch.dtype) -> CausalLM | None:
    """On rank 0 the model with its whole weights in host memory, for saving; None on the others. All ranks take part, and a
    device holds one gathered tensor at a time."""
    weights = {}
    for name, parameter in model.named_parameters():
        whole = whole_tensor(parameter)
        if world()[0] == 0:
            weights[name] = whole.to(dtype).cpu()
    return _rebuilt(model, weights) if weights else None


def _rebuilt(model: CausalLM, weights: dict[str, Tensor]) -> CausalLM:
    with torch.device("meta"):
        whole = CausalLM(model.config)
    whole.load_state_dict(weights, strict=True, assign=True)
    whole.inv_freq = model.inv_freq
    return whole.requires_grad_(False).eval()


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> float:
    """Scale all gradients so that their norm over all parameters and ranks is at most max_norm; the norm before."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return whole_tensor(torch.nn.utils.clip_grad_norm_(parameters, max_norm)).item()


def whole_tensor(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of a sharded one, which every rank must ask for."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
