"""Training on several processes: FSDP2 (fully sharded data parallel) in the few functions that the loop needs.

One process per GPU, started by torchrun. Every rank holds a 1/N part of each fp32 weight, of its gradient and of its optimizer
state; a block's weights are gathered, in the compute dtype, just before it is used and given back right after. One process is
the same with N = 1.

Three rules keep the ranks together, and each has its function here:

    equal passes    a forward or backward pass gathers and reduces, so all ranks must make equally many: `pad_micro_batches`
    sums, not means losses are divided by counts over all ranks, so gradients are summed over ranks: `shard`
    ragged work     what differs from rank to rank (sampling) runs on a whole copy without any communication: `whole_model`;
                    after it the ranks wait for each other, and one that does not come is named: `Control.barrier`

What it is not: tensor, pipeline or context parallelism. A sequence and the activations of its micro-batch fit on one GPU.

Imports model.py and, to say which kernel is taken, kv_cache.py.
"""

import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from kv_cache import decode_kernel
from model import CausalLM, ModelConfig, inverse_frequencies, packed_kernel, read_weights


def start_ranks(device: str, timeout_minutes: float) -> torch.device:
    """Join the other ranks if torchrun started us, else be a world of one; the device of this rank.

    device: "cpu", "cuda", or "auto" for CUDA if there is one. A rank that waits longer than the timeout for others gives up.
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


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Of activations and of the gathered weights: float32 or bfloat16, and for "auto" bfloat16 on CUDA."""
    return torch.bfloat16 if name == "bfloat16" or (name == "auto" and device.type == "cuda") else torch.float32


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def attention_ways(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> str:
    """Which of the ways to compute attention this machine takes; the results are the same to rounding, the speed is not."""
    heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    packed = packed_kernel(device, dtype, *heads) is not None
    paged = decode_kernel(device, config.head_dim) is not None
    return (
        f"attention: {'one variable-length call' if packed else 'one call a sequence'} in training, "
        f"{'CUDA graphs with the kernel of kv_cache.py' if paged else 'pages with torch alone'} in sampling"
    )


def end_ranks(device: torch.device) -> None:
    """Leave the group that start_ranks joined; in a `finally`, so that it is left after an error too.

    NCCL's own ending waits for the other ranks. After an error they are still at work, or gone, and the reason would be held
    back for as long as that wait. So one of several ranks with GPUs says what went wrong and leaves at once: torchrun then
    ends the others.
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


@contextmanager
def ranks_of(device: str, timeout_minutes: float) -> Iterator[torch.device]:
    """start_ranks, and end_ranks after it; a caller that has joined a group already keeps it."""
    joined = dist.is_initialized()
    here = start_ranks(device, timeout_minutes)
    try:
        yield here
    finally:
        if not joined:
            end_ranks(here)


def leave(status: int = 0) -> NoReturn:
    """End a program that has joined a group, at its very end: nothing runs after this, no atexit and no finally.

    PyTorch's caches keep gloo's threads alive. One that lets go of its last tensor while the interpreter is being torn down
    aborts the process (pytorch/pytorch#190489): the run is whole, and its status says that it failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def is_contact_lost(error: RuntimeError) -> bool:
    """Whether another rank ended while this one was waiting for it. gloo's errors have no class of their own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def world() -> tuple[int, int]:
    """(rank, number of ranks); (0, 1) without a group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_reduce(values: dict[str, float], device: torch.device, op: Any = dist.ReduceOp.SUM) -> dict[str, float]:
    """Each value summed (or another op) over the ranks, in float64. Every rank must call it with the same names."""
    names = sorted(values)
    total = torch.tensor([values[name] for name in names], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total, op)
    return dict(zip(names, total.tolist(), strict=True))


def all_gather(value: Any) -> list[Any]:
    """What each rank brings, of any kind that can be pickled, on all of them."""
    everybody = [value] * world()[1]
    if dist.is_initialized():
        dist.all_gather_object(everybody, value)
    return everybody


# ---------------------------------------------------------------------------------------------------- ragged work


class RankLost(RuntimeError):
    """Another rank did not come to a barrier."""


class Interrupted(Exception):
    """SIGTERM came: what is going on is given up, and the run ends with a checkpoint."""


class Control:
    """Where ranks wait for each other, and the SIGTERM that may come to any of them. Made by all ranks together.

    The group is gloo, on CPUs, because it can say who is missing; NCCL would abort the process. A rank waits at most
    timeout_minutes.
    """

    def __init__(self, timeout_minutes: float) -> None:
        self.group = dist.new_group(backend="gloo")
        self.timeout_minutes = timeout_minutes
        self.stop_asked = False
        self.may_cut_short = False

    def barrier(self, value: int = 0) -> int:
        """Wait for all ranks; the largest of the values that they bring. RankLost if one does not come in time."""
        largest = torch.tensor([value])
        try:
            dist.monitored_barrier(self.group, timedelta(minutes=self.timeout_minutes), wait_all_ranks=True)
            dist.all_reduce(largest, dist.ReduceOp.MAX, self.group)
        except RuntimeError as error:
            raise RankLost(
                f"rank {world()[0]} waited for the other ranks in vain ({error}). Either one of them ended (its own message, "
                "or the kernel's about memory, says why), or it is still at its share of the work: then a larger "
                "--timeout_minutes or a smaller --max_new_tokens helps"
            ) from error
        return int(largest)

    def interruptible(self, work: Callable[[], Any]) -> Any:
        """The result of work that differs from rank to rank, communicates nothing and changes nothing that is kept; then a
        barrier. If SIGTERM came to one rank, which cuts its own work short, all ranks raise Interrupted."""
        result = None
        try:
            try:
                self.may_cut_short = True
                if not self.stop_asked:
                    result = work()
            finally:
                self.may_cut_short = False
        except Interrupted:
            pass
        if self.barrier(int(self.stop_asked)):
            raise Interrupted
        return result

    @contextmanager
    def catch_sigterm(self) -> Iterator[None]:
        """Inside, SIGTERM asks the run to end, and cuts short what may be cut short."""
        before = signal.signal(signal.SIGTERM, self._on_sigterm)
        yield
        # not after an error: torchrun sends SIGTERM to the ranks that are left, and they must still say what they saw
        signal.signal(signal.SIGTERM, before)

    def _on_sigterm(self, signum: int, frame: Any) -> None:
        self.stop_asked = True
        if self.may_cut_short:
            self.may_cut_short = False
            raise Interrupted


def balance(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Indices of the work for each rank: by cost from the largest, there and back again (0 1 2 2 1 0 0 1 ...), so that the
    costly ones do not meet on one rank and the numbers differ by one at most. The share with index 0 is rank 0's.
    """
    turns = [*range(ranks), *range(ranks - 1, -1, -1)]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for turn, index in enumerate(sorted(range(len(costs)), key=lambda i: (-costs[i], i))):
        shares[turns[turn % len(turns)]].append(index)
    return sorted((sorted(share) for share in shares), key=lambda share: share or [len(costs)])


def my_share(items: Sequence[Any], costs: Sequence[float]) -> list[Any]:
    """This rank's part of the work."""
    rank, ranks = world()
    return [items[i] for i in balance(costs, ranks)[rank]]


def pad_micro_batches(batches: list[list[int]], device: torch.device) -> list[list[int]]:
    """This rank's micro-batches and after them empty ones, as many in all as the rank with the most has."""
    most = all_reduce({"batches": len(batches)}, device, dist.ReduceOp.MAX)["batches"]
    return batches + [[] for _ in range(int(most) - len(batches))]


# ---------------------------------------------------------------------------------------------------- sharded weights


def shard(model: CausalLM, *, device: torch.device, dtype: torch.dtype, shard_ranks: int, offload: bool) -> CausalLM:
    """Shard the model in place: each block by itself, then what is left (embedding, final norm, head).

    device       of the computation; the model may still be on the meta device, for load_sharded
    dtype        of activations and of the gathered weights; the shards, gradients and optimizer states are fp32
    shard_ranks  how many ranks share one copy of the weights; each group of that size holds a replica (HSDP). 0: all ranks
    offload      keep shards, gradients and optimizer states in host memory
    """
    model.inv_freq = model.inv_freq.to(device)  # a buffer, which FSDP does not move; it says where the model computes
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
    """RuntimeError if the ranks' whole copies of the model differ; every rank must ask."""
    own = fingerprint(model)
    most = all_reduce({"of": own, "of minus": -own}, device, dist.ReduceOp.MAX)
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
    if not weights:
        return None
    whole = _rebuilt(model, weights)
    whole.inv_freq = whole.inv_freq.cpu()
    return whole


def _rebuilt(model: CausalLM, weights: dict[str, Tensor]) -> CausalLM:
    with torch.device("meta"):
        whole = CausalLM(model.config)
    whole.load_state_dict(weights, strict=True, assign=True)
    whole.inv_freq = model.inv_freq
    return whole.requires_grad_(False).eval()


def apply_gradients(
    model: CausalLM,
    optimizer: torch.optim.Optimizer,
    loss: float,
    learning_rate: float,
    max_grad_norm: float,
    skip_above: float = math.inf,
) -> float:
    """Clip the gradients by their norm over all parameters and ranks, and step; the norm before clipping.

    The losses are divided by counts over all ranks, so the sum over ranks, which FSDP makes, is the gradient. `loss` is over
    all ranks too: if may_step says no to it and the norm, no rank takes the step.
    """
    parameters = list(model.parameters())
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    norm = whole_tensor(torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)).item()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    if may_step(loss, norm, skip_above):
        optimizer.step()
    optimizer.zero_grad()
    return norm


def may_step(loss: float, norm: float, skip_above: float = math.inf) -> bool:
    """Whether an update with this loss and gradient norm is made: both finite, and the norm at most skip_above."""
    return math.isfinite(loss) and math.isfinite(norm) and norm <= skip_above


def whole_tensor(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of a sharded one, which every rank must ask for."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
