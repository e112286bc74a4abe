"""Training on several processes: what the loop needs of FSDP2 (fully sharded data parallel), in a few functions.

torchrun starts one process (a rank) per GPU. Each of N ranks holds a 1/N part of every fp32 weight, of its gradient and of its
optimizer state. A block's weights are gathered in the compute dtype just before they are used, and freed right after.

    equal passes    every pass gathers and reduces, so all ranks must make the same number of them: `pad_micro_batches`
    sums, not means losses are divided by counts over all ranks, so gradients are summed over the ranks: `shard`
    uneven work     sampling takes each rank another time: it runs on a whole copy of the weights, without communication
                    (`whole_model`), and afterwards the ranks wait for each other (`Control.barrier`)

The activations of a micro-batch must fit on one GPU. Imports model, lora.
"""

import itertools
import math
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
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

from lora import merge
from model import CausalLM, inverse_frequencies, read_weights

FIRST_SCALE, SCALE_UPDATES = 2.0**16, 100  # float16's loss scale, and after how many updates it is doubled [ours]


def start_ranks(device: str, timeout_minutes: float) -> torch.device:
    """Join the other ranks if torchrun started us, else form a group of one. Returns this rank's device."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"error: --device cuda: torch {torch.__version__} finds no CUDA device here")
    here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if device == "cuda" else torch.device(device)
    if here.type == "cuda":
        torch.cuda.set_device(here)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo"
        alone = {} if "WORLD_SIZE" in os.environ else {"rank": 0, "world_size": 1, "store": dist.HashStore()}
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes), **alone)
    return here


class RankLost(RuntimeError):
    """Another rank ended, or did not come to a barrier in time."""


@contextmanager
def ranks_of(device: str, timeout_minutes: float) -> Iterator[torch.device]:
    """start_ranks, and leave the group at the end, if it began here. An error of communication becomes RankLost."""
    joined = dist.is_initialized()
    here = start_ranks(device, timeout_minutes)
    try:
        yield here
    except BaseException as error:
        of_gloo = isinstance(error, RuntimeError) and re.search("gloo|monitoredBarrier", str(error))  # they have no class
        if of_gloo or isinstance(error, dist.DistError):
            error = RankLost(
                f"rank {world()[0]} lost contact with another rank ({error}). If that one ended, its own message, or the "
                "kernel's about memory, says why. If it is still at work, try a larger --timeout_minutes or a smaller "
                "--max_new_tokens"
            )
        if here.type == "cuda" and world()[1] > 1:
            # NCCL's own ending would wait for the other ranks. This one exits at once, and torchrun ends the others.
            traceback.print_exception(error)
            leave(1)
        raise error
    finally:
        if not joined:
            dist.destroy_process_group()


def leave(status: int = 0) -> NoReturn:
    """Exit at once, as the last act of a program that has joined a group: no atexit handler runs. Else a thread of gloo may
    abort the process while the interpreter is torn down (pytorch/pytorch#190489), and a finished run would report a failure."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Dtype of activations and of the gathered weights, by its name in torch; "auto" is bfloat16 on CUDA, else float32."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, name)


def world() -> tuple[int, int]:
    """(rank, number of ranks); (0, 1) without a group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_reduce(values: dict[str, float | Tensor], device: torch.device, op: Any = dist.ReduceOp.SUM) -> dict[str, float]:
    """Each value summed (or another op) over the ranks, in float64. Every rank must call it with the same names."""
    names = sorted(values)
    total = torch.stack([torch.as_tensor(values[name], dtype=torch.float64, device=device) for name in names])
    if dist.is_initialized():
        dist.all_reduce(total, op)
    return dict(zip(names, total.tolist(), strict=True))


def all_gather(value: Any) -> list[Any]:
    """Every rank's value, in the order of the ranks, on all of them. Any kind of value that can be pickled."""
    values = [value] * world()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


class Preempted(Exception):
    """SIGTERM or Ctrl-C came, or a rank's work failed (then that is its cause there): the run ends with a checkpoint."""


class Control:
    """The barrier of a run, and the signal to end that any of its ranks may get. All ranks make one together."""

    def __init__(self, timeout_minutes: float) -> None:
        self.group = dist.new_group(backend="gloo")  # it can say which rank is missing; NCCL would abort the process
        self.timeout_minutes = timeout_minutes
        self.stop_asked = False
        self.may_cut_short = False

    def barrier(self, value: int = 0) -> int:
        """Wait for all ranks; returns the largest of their values."""
        largest = torch.tensor([value])
        dist.monitored_barrier(self.group, timedelta(minutes=self.timeout_minutes), wait_all_ranks=True)
        dist.all_reduce(largest, dist.ReduceOp.MAX, self.group)
        return int(largest)

    def preemptible(self, work: Callable[[], Any]) -> Any:
        """Do work that differs from rank to rank, communicates nothing and changes nothing that is kept; then a barrier. After
        a signal to any rank, which cuts its own work short, or an error in its work, all ranks raise Preempted."""
        result = failure = None
        try:
            try:
                self.may_cut_short = True
                if not self.stop_asked:
                    result = work()
            finally:
                self.may_cut_short = False  # the signal may arrive at this very line, so the `except` is around it too
        except Preempted:
            pass
        except Exception as error:
            failure = error
        if self.barrier(int(self.stop_asked or failure is not None)):
            raise Preempted from failure
        return result

    @contextmanager
    def catch_signals(self) -> Iterator[None]:
        """Inside, SIGTERM and Ctrl-C ask the run to end, and cut preemptible work short."""
        before = {which: signal.signal(which, self._on_signal) for which in (signal.SIGTERM, signal.SIGINT)}
        yield
        # not restored after an error: torchrun sends SIGTERM to the ranks that are left, and they must still report theirs
        for which, handler in before.items():
            signal.signal(which, handler)

    def _on_signal(self, signum: int, frame: Any) -> None:
        self.stop_asked = True
        if self.may_cut_short:
            self.may_cut_short = False
            raise Preempted


def balance(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """The indices of each rank's items. Index 0 is rank 0's. The costliest go first, to the ranks 0 1 2 2 1 0 0 1 ...: so the
    numbers of items differ by one at most."""
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    turn = 2 * ranks
    shares = [sorted(order[rank::turn] + order[turn - 1 - rank :: turn]) for rank in range(ranks)]
    return sorted(shares, key=lambda share: share or [len(costs)])


def my_share(items: Sequence[Any], costs: Sequence[float]) -> list[Any]:
    """This rank's items of a balanced split."""
    rank, ranks = world()
    return [items[i] for i in balance(costs, ranks)[rank]]


def pad_micro_batches(batches: list[list[int]], device: torch.device) -> list[list[int]]:
    """This rank's micro-batches, followed by empty ones up to the largest number that any rank has."""
    most = all_reduce({"batches": len(batches)}, device, dist.ReduceOp.MAX)["batches"]
    return batches + [[] for _ in range(int(most) - len(batches))]


def shard(model: CausalLM, *, device: torch.device, dtype: torch.dtype, shard_ranks: int, offload: bool) -> CausalLM:
    """Shard the model in place: each block by itself, then what is left. It computes on `device` in `dtype`; shards, gradients
    and optimizer states are fp32, with `offload` in host memory. shard_ranks ranks (0: all) share a copy of the weights."""
    model.inv_freq = model.inv_freq.to(device)  # a buffer, which FSDP does not move; the model computes on its device
    ranks = world()[1]
    shard_ranks = shard_ranks or ranks
    if ranks % shard_ranks:
        raise ValueError(f"--shard_ranks {shard_ranks} does not divide the {ranks} ranks")
    mesh = init_device_mesh(device.type, (ranks,))
    if shard_ranks < ranks:
        shape = (ranks // shard_ranks, shard_ranks)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    for module in [*model.model.layers, model]:
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
            offload_policy=CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy(),
            # the root too: after a pass without gradient it would otherwise stay gathered, with the values before the update
            reshard_after_forward=True,
        )
        module.set_gradient_divide_factor(1.0)  # the sum over ranks; FSDP's default is the mean
        module.set_force_sum_reduction_for_comms(True)
    return model


def load_sharded(
    model: CausalLM, folder: Path, *, device: torch.device, offload: bool, adapters: Iterable[tuple[str, Tensor]] = ()
) -> None:
    """Fill a sharded model on the meta device from a model folder and whole `adapters`. Each rank reads its own rows only."""
    place = torch.device("cpu") if offload else device
    rows = {name: local_rows(parameter) for name, parameter in model.named_parameters()}
    model.to_empty(device=place)
    model.inv_freq = inverse_frequencies(model.config).to(device)  # on the device even with offload
    parameters = dict(model.named_parameters())
    with torch.device("meta"):
        plain = CausalLM(model.config)  # whose tensors are in the folder
    tensors = read_weights(plain, folder, device=place, rows=rows.__getitem__)
    with torch.no_grad():
        for name, tensor in itertools.chain(tensors, ((name, whole[rows[name]]) for name, whole in adapters)):
            local = parameters[name].to_local()
            if len(local):  # with more ranks than rows, the last ranks hold none
                local.copy_(tensor)


def local_rows(parameter: Tensor) -> slice:
    """Which rows of a parameter this rank holds: chunks of equal size, rounded up, the last one shorter."""
    ranks, index = parameter.device_mesh.shape[-1], parameter.device_mesh.get_coordinate()[-1]
    chunk = -(-len(parameter) // ranks)
    begin = min(index * chunk, len(parameter))
    return slice(begin, min(begin + chunk, len(parameter)))


@contextmanager
def whole_model(model: CausalLM) -> Iterator[CausalLM]:
    """The model with all weights gathered in the compute dtype and adapters merged, without FSDP's hooks, which communicate.
    All ranks enter and leave together."""
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.unshard()
    try:
        whole = _rebuilt(model, {name: parameter.detach() for name, parameter in model.named_parameters()})
        if model.device.type == "cuda":
            whole.join_projections()
        yield whole
    finally:
        for module in modules:
            module.reshard()


@torch.no_grad()
def model_on_host(model: CausalLM, dtype: torch.dtype) -> CausalLM | None:
    """On rank 0 a copy with the whole weights in host memory, to be saved; None on the others. All ranks call it."""
    weights = {}
    for name, parameter in model.named_parameters():
        whole = whole_tensor(parameter)
        if world()[0] == 0:
            weights[name] = whole.to("cpu", dtype, copy=True)  # a gathered tensor may be a view of a larger, padded one
    return _rebuilt(model, weights) if weights else None


def _rebuilt(model: CausalLM, weights: dict[str, Tensor]) -> CausalLM:
    """A plain model of these weights. Adapters are merged into the tensors given, which therefore are copies."""
    with torch.device("meta"):
        whole = CausalLM(model.config)
    whole.load_state_dict(merge(model, weights), strict=True, assign=True)
    whole.inv_freq = model.inv_freq
    return whole.requires_grad_(False).eval()


def apply_gradients(
    model: CausalLM, optimizer: torch.optim.Optimizer, loss: float, learning_rate: float, max_grad_norm: float,
    skip_above: float = math.inf,
) -> float:  # fmt: skip
    """Divide the gradients, which are summed over the ranks already, by loss_scale, clip them by their norm over all parameters
    and ranks, and step if may_step. Returns the norm before clipping. `loss` must be over all ranks, so that all step or none
    does. If the gradients overflowed, the scale is halved; every SCALE_UPDATES updates it is doubled."""
    parameters, scale = list(trained(model).values()), loss_scale(optimizer)
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad /= scale  # exact, because the scale is a power of two
    norm = whole_tensor(torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)).item()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    if may_step(loss, norm, skip_above):
        optimizer.step()
        if "loss_scale" in group and optimizer.state[group["params"][0]]["step"] % SCALE_UPDATES == 0:
            group["loss_scale"] = 2 * scale
    elif math.isfinite(loss) and not math.isfinite(norm) and scale > 1:
        group["loss_scale"] = scale / 2
    optimizer.zero_grad()
    return norm


def trained(model: CausalLM) -> dict[str, Tensor]:
    """The parameters that are not frozen: all of them, or the adapters."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def loss_scale(optimizer: torch.optim.Optimizer) -> float:
    """What the gradients of the next update are multiplied by: 1, or the optimizer's "loss_scale", a power of two. In float16
    most gradients of a mean over many tokens would be lost without it."""
    return optimizer.param_groups[0].get("loss_scale", 1.0)


def may_step(loss: float, norm: float, skip_above: float = math.inf) -> bool:
    """Whether an update with this loss and gradient norm is made: both finite, and the norm at most skip_above."""
    return math.isfinite(loss) and math.isfinite(norm) and norm <= skip_above


def whole_tensor(tensor: Tensor) -> Tensor:
    """The tensor itself, or a sharded one gathered; then all ranks must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
