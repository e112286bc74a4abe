"""Speed and memory, measured side by side against named rivals that do the same work.

    sampler   rollout.generate against transformers' model.generate and model.generate_batch (continuous batching)
    update    one optimizer update on given rollouts against plain transformers and autograd on padded batches
    step      a whole GRPO step, sampling included, against TRL's GRPOTrainer
    head      the loss at the head in chunks against the whole logits
    growth    how our own seconds grow with batch, response length and group size (only when asked for with --only;
              `python tools/report.py growth` draws it)

What it is: one run that builds models by shape with random weights (nothing is downloaded), does the same work every way in
alternation (A B A B ...), checks that all ways do compute the same thing, prints tables and writes every raw figure as JSON.
What it is not: a benchmark of answers or of inference servers. Response lengths are prescribed, the same for every rival.

    python tools/bench.py --out results/bench/cpu.json                 all parts, on the GPU where there is one
    python tools/bench.py --out /tmp/b.json --only head --device cpu   one part
    python tools/bench.py --out /tmp/b.json --quick                    toy shapes: checks that everything runs, times nothing

Two rivals need packages that nothing else here does: `pip install psutil` for generate_batch on a CPU, `pip install trl` for
the part step; if one is missing, or dies, the report says so and goes on. --dtype: fp32 by default on a CPU, bf16 on CUDA; the
checks are in fp32. Exit status 1 if a check of equality or a part fails. Timings mean something only on an idle machine; the
load average before and after is recorded. Axes: P prompts, n responses a prompt, B rows, M response tokens, D width,
V vocabulary.
"""

import argparse
import contextlib
import ctypes
import gc
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import random
import resource
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the files of the method, from the folder above

from checkpoint import code_commit
from kv_cache import decode_kernel
from loss import chunked_head, sft_terms, token_logprobs
from methods import Method
from model import CausalLM, ModelConfig, build_model
from parallel import leave, ranks_of, shard, whole_model
from rollout import Trajectory, generate, pack
from sgpo import Example, ProblemSamples, sgpo_step, update
from tools import plan
from weighting import group_advantages

PARTS = ("sampler", "update", "step", "head")  # what one run measures; "growth" is for --only
MB = 1e6  # memory is reported in units of 10^6 bytes

# HuggingFaceTB/SmolLM2-135M by shape. The initialisation is 0.02 here and not that model's 0.042: the smaller the weights, the
# nearer the next-token distribution is to uniform (entropy 10.69 of 10.80 nats), and that is what makes lengths geometric.
SHAPES = {
    "smollm2-135m": plan.KNOWN["SmolLM2-135M-Instruct"],
    "qwen2.5-0.5b": plan.KNOWN["Qwen2.5-0.5B-Instruct"],
    "qwen2.5-1.5b": plan.KNOWN["Qwen2.5-1.5B-Instruct"],
    "qwen2.5-7b": plan.KNOWN["Qwen2.5-7B-Instruct"],
}
TOY = {**SHAPES["smollm2-135m"], "vocab_size": 512, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
TOY = {**TOY, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512}
# For the test of the distribution: few tokens, and weights large enough that their probabilities differ a lot.
SMALL_VOCABULARY = {**TOY, "vocab_size": 24, "initializer_range": 0.2}


@dataclass(frozen=True)
class Workload:
    """What every sampler is asked to do: `prompts` prompts of ragged lengths, `group` responses to each.

    The responses' lengths are lognormal with this median, and the longest of all has `longest` tokens; all have the same
    length where the two are equal.
    """

    name: str
    prompts: int
    group: int
    shortest_prompt: int
    longest_prompt: int
    median: int
    longest: int


CPU_WORKLOADS = (
    Workload("uniform", 8, 8, 40, 160, median=64, longest=64),
    Workload("long tail", 8, 8, 40, 160, median=25, longest=512),
    Workload("large groups", 2, 32, 40, 160, median=48, longest=96),
    Workload("strategy prompts", 8, 4, 300, 600, median=48, longest=96),
)
CUDA_WORKLOADS = (
    Workload("uniform", 8, 8, 40, 160, median=128, longest=128),  # generate takes 69 ms a step on an H200
    Workload("long tail", 8, 8, 40, 160, median=100, longest=512),
    Workload("large groups", 4, 64, 40, 160, median=100, longest=256),
    Workload("strategy prompts", 16, 4, 300, 900, median=100, longest=256),
)
QUICK_WORKLOADS = (
    Workload("uniform", 3, 2, 4, 9, median=6, longest=6),
    Workload("long tail", 3, 2, 4, 9, median=4, longest=24),
)


@dataclass(frozen=True)
class HeadShape:
    """The size of the head's loss: M response tokens, width D, vocabulary V, and the chunk sizes to measure."""

    tokens: int
    width: int
    vocabulary: int
    chunks: tuple[int, ...]


QWEN25_05B_HEAD = HeadShape(tokens=4096, width=896, vocabulary=152064, chunks=(128, 512))
UPDATE_WORKLOADS = {
    "cpu": Workload("update", 4, 8, 40, 160, median=64, longest=192),
    "cuda": Workload("update", 8, 8, 100, 400, median=500, longest=2048),
}
STEP_WORKLOADS = {
    "cpu": Workload("step", 4, 8, 40, 160, median=48, longest=48),
    "cuda": Workload("step", 16, 8, 100, 400, median=128, longest=128),
}
QUICK_HEAD = HeadShape(tokens=512, width=32, vocabulary=16384, chunks=(32, 128))


# ---------------------------------------------------------------------------------------------------- clock and memory


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _status_bytes(field: str) -> int:
    """A field such as VmRSS or VmHWM of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no field {field}")


def start_memory(device: torch.device) -> int:
    """Restart the peak counter; returns the bytes in use now, which `peak_memory` subtracts.

    On Linux the peak resident size (VmHWM) can be restarted. Elsewhere getrusage's peak since the process began stands in,
    which is right only where the measured part is the process's largest. Memory that was freed but is kept for later by the C
    library is given back first: work that only used it again would seem to need none.
    """
    gc.collect()
    if device.type == "cpu" and hasattr(ctypes.CDLL(None), "malloc_trim"):  # glibc
        ctypes.CDLL(None).malloc_trim(0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status_bytes("VmRSS")
    except OSError:
        return _rusage_peak()


def peak_memory(device: torch.device, before: int) -> int:
    """The most bytes in use at any time since `start_memory`, beyond what was in use then."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) - before
    return (_status_bytes("VmHWM") if Path("/proc/self/status").exists() else _rusage_peak()) - before


def _rusage_peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measured(work: Callable[[], Any], device: torch.device) -> tuple[Any, float, int]:
    """(result, seconds, peak bytes) of one call."""
    before = start_memory(device)
    synchronize(device)
    start = time.perf_counter()
    result = work()
    synchronize(device)
    seconds = time.perf_counter() - start
    return result, seconds, peak_memory(device, before)


# ---------------------------------------------------------------------------------------------------- the two samplers


def model_pair(raw: dict[str, Any], seed: int, dtype: torch.dtype, device: torch.device) -> tuple[CausalLM, Any]:
    """(ours, transformers' model of the same class and weights). Both in eval mode; theirs with SDPA attention."""
    from transformers import AutoConfig, AutoModelForCausalLM, logging  # here: the head's processes have no use for it

    logging.set_verbosity_error()
    generator = torch.Generator("cpu").manual_seed(seed)
    ours = build_model(ModelConfig.from_dict(raw), generator=generator, dtype=dtype, device=device).eval()
    fields = {name: value for name, value in raw.items() if name != "model_type"}
    config = AutoConfig.for_model(raw["model_type"], **fields)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    left = theirs.load_state_dict(ours.state_dict(), strict=False)
    if left.unexpected_keys or set(left.missing_keys) - {"lm_head.weight"}:  # the tied head is the embedding's tensor
        raise ValueError(f"weights do not match: missing {left.missing_keys}, unexpected {left.unexpected_keys}")
    return ours, theirs.to(device).eval()


def make_prompts(workload: Workload, vocabulary: int, seed: int) -> list[list[int]]:
    """Prompts of random tokens and ragged lengths."""
    rng = random.Random(seed)
    lengths = [rng.randint(workload.shortest_prompt, workload.longest_prompt) for _ in range(workload.prompts)]
    return [[rng.randrange(1, vocabulary) for _ in range(length)] for length in lengths]


def make_lengths(workload: Workload, seed: int) -> list[int]:
    """The P * n response lengths, the n of a prompt together."""
    rng, rows = random.Random(seed), workload.prompts * workload.group
    # the largest of 64 normal numbers is about 2.4 standard deviations out
    spread = math.log(workload.longest / workload.median) / 2.4
    lengths = [round(workload.median * math.exp(rng.gauss(0, spread))) for _ in range(rows)]
    lengths = [min(max(length, 1), workload.longest) for length in lengths]
    lengths[rng.randrange(rows)] = workload.longest
    return lengths


def prompt_seeds(seed: int, prompts) -> list[int]:
    """The seed of each prompt for rollout.generate."""
    return [seed * 1_000_003 + p for p in range(len(prompts))]


def sample_ours(model: CausalLM, prompts, eos_ids, *, n, max_new_tokens, temperature, seed, lengths=None) -> list[list[int]]:
    """P * n responses, the n of a prompt together, each up to and including its first end-of-sequence token.

    lengths: instead of by eos_ids and max_new_tokens, each response ends at its length.
    """
    limits = dict(max_new_tokens=max_new_tokens, eos_ids=eos_ids)
    if lengths is not None:
        rows = [lengths[start : start + n] for start in range(0, len(lengths), n)]
        limits = dict(max_new_tokens=rows, eos_ids=[model.config.vocab_size])
    groups = generate(model, prompts, n=n, temperature=temperature, top_p=1.0, seed=prompt_seeds(seed, prompts), **limits)
    return [trajectory.response_ids for group in groups for trajectory in group]


@torch.no_grad()  # not inference_mode: the worker is a thread, which would be outside of it and write to its tensors
def sample_batch(model: Any, prompts, *, n, lengths, seed, **_: Any) -> list[list[int]]:
    """The same by transformers' continuous batching: what model.generate_batch does, with a length for each request."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    torch.manual_seed(seed)
    requests = [prompt for prompt in prompts for _ in range(n)]
    drawing = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=-1, pad_token_id=0)
    settings = {}
    if model.device.type == "cpu":  # by default it would take nearly all of the host's memory
        page = 32
        blocks = sum(math.ceil((len(p) + length) / page) + 1 for p, length in zip(requests, lengths, strict=True))
        settings = dict(block_size=page, num_blocks=blocks, max_batch_tokens=max(1024, len(requests)))
    with model.continuous_batching_context_manager(
        generation_config=GenerationConfig(**drawing, max_new_tokens=max(lengths)),
        continuous_batching_config=ContinuousBatchingConfig(**settings),
        block=True,
        timeout=5,
    ) as manager:
        ids = [manager.add_request(p, max_new_tokens=length) for p, length in zip(requests, lengths, strict=True)]
        results: dict[str, Any] = {}
        last = time.monotonic()
        while len(results) < len(ids):
            result = manager.get_result(timeout=1)
            if time.monotonic() - last > 60:
                raise TimeoutError(f"generate_batch ended no response in 60 s, after {len(results)} of {len(ids)}")
            if result is not None and result.is_finished():
                results[result.request_id], last = result, time.monotonic()
            elif result is None and not manager.is_running():
                raise RuntimeError("generate_batch's worker stopped")
    return [results[key].generated_tokens for key in ids]


@torch.inference_mode()
def sample_theirs(model: Any, prompts, eos_ids, *, n, max_new_tokens, temperature, seed, lengths=None) -> list[list[int]]:
    """The same by transformers' model.generate: left-padded prompts, KV cache, SDPA, no logits processor but the temperature.

    The id used for padding is one of the end-of-sequence ids: responses are cut at the first of those, so that the padding
    after a finished row is never counted.
    """
    if lengths is not None:
        eos_ids, max_new_tokens = [model.config.vocab_size], max(lengths)
    vocabulary = model.config.vocab_size
    pad = eos_ids[0] if eos_ids[0] < vocabulary else 0
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    drawing = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0) if temperature else dict(do_sample=False)
    torch.manual_seed(seed)
    if lengths is not None:
        drawing["stopping_criteria"] = [EndAt(width, torch.tensor(lengths, device=model.device))]
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        num_return_sequences=n,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(eos_ids),
        pad_token_id=pad,
        use_cache=True,
        **drawing,
    )
    if lengths is not None:
        return [row[:length] for row, length in zip(output[:, width:].tolist(), lengths, strict=True)]
    ends = set(eos_ids)
    responses = []
    for row in output[:, width:].tolist():
        length = next((index + 1 for index, token in enumerate(row) if token in ends), len(row))
        responses.append(row[:length])
    return responses


class EndAt:
    """A stopping criterion for model.generate: row i is done after lengths[i] tokens behind `width` of prompt."""

    def __init__(self, width: int, lengths: Tensor) -> None:
        self.width, self.lengths = width, lengths

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return input_ids.shape[1] - self.width >= self.lengths


SAMPLERS = {"ours": sample_ours, "generate": sample_theirs, "generate_batch": sample_batch}


# ---------------------------------------------------------------------------------------------------- checks of equality


@torch.inference_mode()
def teacher_forced(theirs: Any, prompt: list[int], response: list[int]) -> Tensor:
    """(T, V) fp32 log-probabilities by transformers' model at each token of the response."""
    logits = theirs(input_ids=torch.tensor([prompt + response], device=theirs.device)).logits[0]
    return torch.log_softmax(logits[len(prompt) - 1 : -1].float(), -1)


def check_greedy(ours, theirs, prompts, max_new_tokens: int, tie: float = 1e-3) -> dict[str, Any]:
    """Greedy responses are equal token for token; they may part only where the two best tokens are within `tie` nats."""
    options = dict(n=1, max_new_tokens=max_new_tokens, temperature=0.0, seed=0)
    never = [theirs.config.vocab_size]
    equal, ties, wrong = 0, 0, 0
    pairs = zip(sample_ours(ours, prompts, never, **options), sample_theirs(theirs, prompts, never, **options), strict=True)
    for prompt, (a, b) in zip(prompts, pairs, strict=True):
        first = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
        if first is None:
            equal += 1
            continue
        best = teacher_forced(theirs, prompt, a)[first].topk(2).values
        parted_at_tie = (best[0] - best[1]).item() < tie
        ties += parted_at_tie
        wrong += not parted_at_tie
    return {"responses": len(prompts), "tokens_each": max_new_tokens, "equal": equal, "ties": ties, "ok": wrong == 0}


def check_logprobs(ours, theirs, prompts, max_new_tokens: int, seed: int, tolerance: float = 1e-3) -> dict[str, Any]:
    """The log-probabilities our sampler reports are those that transformers' forward gives the same tokens."""
    never = [theirs.config.vocab_size]
    limits = dict(n=2, max_new_tokens=max_new_tokens, temperature=1.0, top_p=1.0)
    worst, count = 0.0, 0
    for group in generate(ours, prompts, **limits, eos_ids=never, seed=prompt_seeds(seed, prompts)):
        for row in group:
            reference = teacher_forced(theirs, row.prompt_ids, row.response_ids)
            tokens = torch.tensor(row.response_ids, device=theirs.device)
            reference = reference.gather(-1, tokens[:, None])[:, 0].cpu()
            worst = max(worst, (reference - torch.tensor(row.logprobs)).abs().max().item())
            count += len(row.response_ids)
    return {"tokens": count, "max_difference": worst, "tolerance": tolerance, "ok": worst < tolerance}


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """The p-value of Pearson's test that `counts` (V,) were drawn from `probabilities` (V,)."""
    expected = counts.sum() * probabilities.double()
    rare = expected < 5  # the test needs 5 expected in each cell: the rare ones are put together
    if rare.any():
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    statistic = ((counts - expected).square() / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2).item()


def z_score(a: Sequence[float], b: Sequence[float]) -> float:
    """How many standard errors the means of two samples are apart."""
    error = statistics.variance(a) / len(a) + statistics.variance(b) / len(b)
    return (statistics.fmean(a) - statistics.fmean(b)) / max(error, 1e-12) ** 0.5


def check_distribution(seed: int, device: torch.device, draws: int = 2000) -> dict[str, Any]:
    """Both samplers on a model of 24 tokens: first tokens against the exact distribution, lengths and log-probs side by side.

    The p-value of each chi-square must be above 1e-4 and each difference of means below 4 standard errors. With a fixed seed
    the result is fixed too, so a failure is a finding and not bad luck that a second run would mend.
    """
    ours, theirs = model_pair(SMALL_VOCABULARY, seed, torch.float32, device)
    prompt, eos_ids, V = [3, 17, 5, 11], [1, 2], theirs.config.vocab_size
    exact = teacher_forced(theirs, prompt, [0])[0].exp().cpu()  # (V,) of the first response token
    p_values, lengths, scores = {}, {}, {}
    for name, model in (("ours", ours), ("generate", theirs)):
        options = dict(n=draws, max_new_tokens=12, temperature=1.0, seed=seed)
        rows = SAMPLERS[name](model, [prompt], eos_ids, **options)
        p_values[name] = chi_square(torch.bincount(torch.tensor([row[0] for row in rows]), minlength=V).double(), exact)
        lengths[name] = [len(row) for row in rows]
        scores[name] = [
            teacher_forced(theirs, prompt, row).gather(-1, torch.tensor(row, device=device)[:, None]).sum().item()
            for row in rows[: draws // 4]  # one forward a row
        ]
    z = {"length": z_score(*lengths.values()), "logprob": z_score(*scores.values())}
    return {
        "draws": draws,
        "largest_probability": exact.max().item(),
        "first_token_p": p_values,
        "mean_length": {name: statistics.fmean(values) for name, values in lengths.items()},
        "mean_logprob": {name: statistics.fmean(values) for name, values in scores.items()},
        "z": z,
        "ok": min(p_values.values()) > 1e-4 and max(map(abs, z.values())) < 4,
    }


# ---------------------------------------------------------------------------------------------------- the machine's limits


def machine_limits(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """What this machine reaches at best: bytes/s of a copy between large tensors, FLOP/s of a large matrix product."""
    size, count = (8192, 2**28) if device.type == "cuda" else (2048, 2**26)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source, target = (torch.zeros(count, dtype=torch.float32, device=device) for _ in range(2))

    def best(work: Callable[[], Any]) -> float:
        work()
        return min(measured(work, device)[1] for _ in range(5))

    return {
        "bandwidth": 2 * source.nbytes / best(lambda: target.copy_(source)),
        "matmul": 2 * size**3 / best(lambda: a @ b),
    }


def forward_flops(model: CausalLM, spans: Sequence[tuple[int, int]], head_tokens: int) -> float:
    """plan.forward_flops of a model."""
    return plan.forward_flops(plan.shape_of(model.config), spans, head_tokens)


def sampling_floor(model: CausalLM, prompts, lengths: Sequence[int], group: int, limits: dict[str, float]) -> float:
    """Seconds below which this machine cannot do a workload: each step reads the weights and the keys and values of the rows
    alive once (a prompt's once for its group) or multiplies as many numbers as it has to, whichever takes longer."""
    config, weight = model.config, model.head_weight
    parameters = sum(parameter.numel() for parameter in model.parameters())
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * weight.dtype.itemsize
    seconds = forward_flops(model, [(0, len(prompt)) for prompt in prompts], len(prompts)) / limits["matmul"]
    for step in range(1, max(lengths)):
        alive = [row for row, length in enumerate(lengths) if length > step]
        tokens = step * len(alive) + sum(len(prompts[p]) for p in {row // group for row in alive})
        read = parameters * weight.dtype.itemsize + tokens * token_bytes
        seconds += max(read / limits["bandwidth"], 2 * parameters * len(alive) / limits["matmul"])
    return seconds


# ---------------------------------------------------------------------------------------------------- part: sampler


def bench_sampler(args, device: torch.device) -> dict[str, Any]:
    """Checks in fp32, then every workload on all samplers in alternation."""
    raw = TOY if args.quick else SHAPES[args.shape]
    workloads = QUICK_WORKLOADS if args.quick else CUDA_WORKLOADS if device.type == "cuda" else CPU_WORKLOADS
    workloads = [workload for workload in workloads if not args.workloads or workload.name in args.workloads]
    ours, theirs = model_pair(TOY if args.quick else SHAPES["smollm2-135m"], args.seed, torch.float32, device)
    prompts = make_prompts(workloads[0], ours.config.vocab_size, args.seed)
    length = 12 if args.quick else 32
    checks = {
        "greedy": check_greedy(ours, theirs, prompts[:4], length),
        "logprobs": check_logprobs(ours, theirs, prompts[:2], length, args.seed),
        "distribution": check_distribution(args.seed, device, draws=400 if args.quick else 2000),
    }
    del ours, theirs
    dtype = getattr(torch, args.dtype)
    pair = model_pair(raw, args.seed, dtype, device)
    limits = machine_limits(dtype, device)
    results = [sampler_workload(*pair, workload, limits, args, device) for workload in workloads]
    prefill = bench_prefill(pair[0], make_prompts(workloads[-1], pair[0].config.vocab_size, args.seed), limits, args, device)
    graphs = decode_kernel(device, pair[0].config.head_dim) is not None
    figures = {"model": raw, "cuda_graphs": graphs, "limits": limits, "checks": checks}
    return figures | {"prefill": prefill, "workloads": results}


def bench_prefill(model: CausalLM, prompts, limits: dict[str, float], args, device: torch.device) -> dict[str, Any]:
    """Reading the prompts, by a call of the sampler that ends with a first token: which share of the matrix peak it reaches,
    and what the time goes to."""
    flops = forward_flops(model, [(0, len(prompt)) for prompt in prompts], len(prompts))
    work = partial(sample_ours, model, prompts, [0], n=1, max_new_tokens=1, temperature=1.0, seed=args.seed)
    work()
    seconds = [measured(work, device)[1] for _ in range(args.repeats)]
    tokens = sum(map(len, prompts))
    share = [flops / s / limits["matmul"] for s in seconds]
    figures = {"tokens_per_s": spread([tokens / s for s in seconds]), "share": spread(share)}
    return figures | {"prompts": len(prompts), "tokens": tokens, "time": time_shares(work, device)}


def time_shares(work: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Which part of one call's time goes to matrix products, to attention and to everything else, by PyTorch's profiler.

    On CUDA the time is that of the kernels, so that what the host needs to launch them is not in it.
    """
    with torch.profiler.profile() as profile:
        work()
        synchronize(device)
    time_of = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    total = {"matrix products": 0.0, "attention": 0.0, "everything else": 0.0}
    for event in profile.key_averages():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a kernel: its time is also told at the operation that launched it
        is_product = event.key in ("aten::mm", "aten::addmm", "aten::bmm")
        kind = "attention" if "attention" in event.key else "matrix products" if is_product else "everything else"
        total[kind] += getattr(event, time_of)
    return {kind: value / max(sum(total.values()), 1e-9) for kind, value in total.items()}


def sampler_rivals(device: torch.device) -> tuple[list[str], dict[str, str]]:
    """(the samplers that can run here, {name: why another cannot})."""
    if device.type == "cpu" and importlib.util.find_spec("psutil") is None:
        return ["ours", "generate"], {"generate_batch": "needs psutil on a CPU: pip install psutil"}
    return list(SAMPLERS), {}


def sampler_workload(ours, theirs, workload: Workload, limits, args, device: torch.device) -> dict[str, Any]:
    """A B C A B C ...: each repeat with its own lengths and seed, the same for all samplers."""
    prompts = make_prompts(workload, ours.config.vocab_size, args.seed)
    names, left_out = sampler_rivals(device)
    runs = []
    for repeat in range(-1, args.repeats):  # the first round is a short one: threads, kernels, lazily made tables
        lengths = make_lengths(workload, args.seed + repeat) if repeat >= 0 else [2] * (workload.prompts * workload.group)
        for name in [name for name in names if name not in left_out]:
            model = ours if name == "ours" else theirs
            options = dict(n=workload.group, max_new_tokens=0, temperature=1.0, eos_ids=(), lengths=lengths)
            work = partial(SAMPLERS[name], model, prompts, **options, seed=args.seed + repeat + 1)
            done = measured_side(name, work, device, left_out)
            if repeat < 0 or done is None:
                continue
            rows, seconds, peak = done
            useful = sum(map(len, rows))
            run = {"side": name, "repeat": repeat, "seconds": seconds, "tokens": useful, "prescribed": sum(lengths)}
            run |= {"tokens_per_s": useful / seconds, "peak_mb": peak / MB}
            run["floor_share"] = sampling_floor(ours, prompts, lengths, workload.group, limits) / seconds
            runs.append(run)
            print(f"  {workload.name:17}{name:15}{run['tokens_per_s']:9.1f} tokens/s {seconds:7.1f} s", flush=True)
    for name in {run["side"] for run in runs if not run["tokens"]} - {"ours"}:
        left_out[name] = "it made no tokens"
    return {"workload": asdict(workload)} | compare(runs, "tokens_per_s", names, left_out)


def attempt(name: str, work: Callable[[], Any], left_out: dict[str, str]) -> Any:
    """The result of a rival's work; None, and the reason in left_out, if it dies: the others' figures are worth as much."""
    try:
        return work()
    except Exception as error:  # whatever a rival raises
        left_out[name] = one_line(error)
        print(f"  {name:15} died: {left_out[name]}", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None


def measured_side(name: str, work: Callable[[], Any], device: torch.device, left_out: dict[str, str]) -> Any:
    """`measured`; None if it is a rival that died. Our own errors are errors."""
    return measured(work, device) if name == "ours" else attempt(name, partial(measured, work, device), left_out)


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"


def compare(runs: Sequence[dict[str, Any]], figure: str, names: Iterable[str], left_out: dict[str, str]) -> dict[str, Any]:
    """The runs of the sides that are not left out; median and range of a figure for each, and of the ratio of ours to it.

    One ratio a repeat: the sides of a repeat ran next to each other, on the same state of the machine.
    """
    runs = [run for run in runs if run["side"] not in left_out]
    values = {name: [run[figure] for run in runs if run["side"] == name] for name in names if name not in left_out}
    ratios = {
        name: spread([a / b for a, b in zip(values["ours"], values[name], strict=True)]) for name in values if name != "ours"
    }
    figures = {figure: {name: spread(value) for name, value in values.items()}, "ratio": ratios}
    return {"left_out": left_out, "runs": runs, **figures}


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


# ---------------------------------------------------------------------------------------------------- part: update


def trained(model: CausalLM, args, device: torch.device, **changes: Any) -> tuple[CausalLM, torch.optim.Optimizer, Method]:
    """What a step needs: the model, sharded as in training, optimizer, settings. No recomputation, top_p 1, as the rivals."""
    settings = Method(**{"method": "grpo", "top_p": 1.0, "micro_tokens": 2048 if device.type == "cpu" else 4096, **changes})
    shard(model, device=device, dtype=getattr(torch, args.dtype), shard_ranks=0, offload=False)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.01, fused=True), settings


def autocast(args, device: torch.device) -> Any:
    if args.dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, args.dtype))


def make_rollouts(workload: Workload, model: CausalLM, args) -> list[ProblemSamples]:
    """Groups of random responses with the policy's own log-probabilities and rewards that are right half of the time."""
    rng = random.Random(args.seed)
    prompts, lengths = make_prompts(workload, model.config.vocab_size, args.seed), make_lengths(workload, args.seed)
    groups = []
    for p, prompt in enumerate(prompts):
        mine = lengths[p * workload.group : (p + 1) * workload.group]
        responses = [[rng.randrange(1, model.config.vocab_size) for _ in range(length)] for length in mine]
        packed = pack([prompt] * len(responses), responses, device=model.device)
        with torch.no_grad():
            logits = model(packed.input_ids, lengths=packed.lengths, prefixes=packed.prefixes)[0, packed.predict]
        old = token_logprobs(logits, packed.targets).tolist()
        rows = []
        for response in responses:
            rows.append(Trajectory(prompt, response, old[: len(response)], True, p))
            old = old[len(response) :]
        rewards = [float(i % 2) for i in range(len(rows))]
        sample = ProblemSamples(p, Example(None, prompt, None, None), rows, [], rewards, [])
        sample.advantages = group_advantages(torch.tensor([rewards]))[0].tolist()
        groups.append(sample)
    return groups


def plain_update(model: Any, optimizer: Any, samples: Sequence[ProblemSamples], context: Any, rows: int) -> list[float]:
    """The same update with transformers and autograd alone: `rows` right-padded sequences a micro-batch, whole logits.

    Returns [loss, gradient norm].
    """
    items = [(row, a) for sample in samples for row, a in zip(sample.auto, sample.advantages, strict=True)]
    total = 0.0
    for first in range(0, len(items), rows):
        chosen = items[first : first + rows]
        width = max(len(row.prompt_ids) + len(row.response_ids) for row, _ in chosen)
        ids = torch.zeros(len(chosen), width, dtype=torch.int64)
        weight, old, advantage = torch.zeros(ids.shape), torch.zeros(ids.shape), torch.zeros(ids.shape)
        for i, (row, a) in enumerate(chosen):
            start, end = len(row.prompt_ids), len(row.prompt_ids) + len(row.response_ids)
            ids[i, :end] = torch.tensor(row.prompt_ids + row.response_ids)
            weight[i, start:end] = 1 / (len(items) * len(row.response_ids))  # groups of one size: eq 1's mean of means
            old[i, start:end], advantage[i, start:end] = torch.tensor(row.logprobs), a
        ids, weight, old, advantage = (x.to(model.device) for x in (ids, weight, old, advantage))
        with context():
            logits = model(input_ids=ids, attention_mask=(ids >= 0).long(), use_cache=False).logits[:, :-1]
        logp = torch.log_softmax(logits.float(), -1).gather(-1, ids[:, 1:, None])[..., 0]
        ratio = torch.exp(logp - old[:, 1:])
        surrogate = torch.minimum(ratio * advantage[:, 1:], ratio.clamp(0.8, 1.28) * advantage[:, 1:])
        loss = -(surrogate * weight[:, 1:]).sum()
        loss.backward()
        total += loss.item()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    optimizer.step()
    optimizer.zero_grad()
    return [total, norm]


def bench_update(args, device: torch.device) -> dict[str, Any]:
    """Ours and the plain update on the same rollouts, in alternation. Weights and optimizer states fp32 on both sides."""
    raw = TOY if args.quick else SHAPES[args.shape]
    workload = QUICK_WORKLOADS[1] if args.quick else UPDATE_WORKLOADS[device.type]
    ours, theirs = model_pair(raw, args.seed, torch.float32, device)
    samples = make_rollouts(workload, ours, args)
    model, own_optimizer, settings = trained(ours.train(), args, device)
    optimizer = torch.optim.AdamW(theirs.train().parameters(), lr=1e-6, weight_decay=0.01, fused=True)
    rows = 8 if device.type == "cpu" else 2  # more of them, with their whole logits, do not fit beside the weights of 1.5B
    sides = {
        "ours": lambda: [(m := update(model, own_optimizer, settings, samples, 1e-6))["loss"], m["grad_norm"]],
        "transformers": lambda: plain_update(theirs, optimizer, samples, partial(autocast, args, device), rows),
    }
    tokens = sum(len(row.response_ids) for sample in samples for row in sample.auto)
    prompts = [(0, len(sample.auto[0].prompt_ids)) for sample in samples]  # computed once for the group, whoever does so
    spans = prompts + [(len(row.prompt_ids), len(row.response_ids)) for sample in samples for row in sample.auto]
    flops = 3 * forward_flops(ours, spans, tokens)  # the backward pass is twice the forward
    peak_rate = machine_limits(getattr(torch, args.dtype), device)["matmul"]
    figures, runs, left_out = {}, [], {}
    for repeat in range(-1, args.repeats):
        for name, work in [(name, work) for name, work in sides.items() if name not in left_out]:
            done = measured_side(name, work, device, left_out)
            if done is None:
                continue
            result, seconds, peak = done
            if repeat < 0:
                figures[name] = result  # the first update starts from equal weights
                continue
            runs.append({"side": name, "repeat": repeat, "seconds": seconds, "tokens_per_s": tokens / seconds})
            runs[-1] |= {"peak_mb": peak / MB, "flop_share": flops / seconds / peak_rate}
            print(f"  update           {name:15}{tokens / seconds:9.1f} tokens/s {seconds:7.1f} s", flush=True)
    checks = {} if left_out else {"same_update": check_update(figures, 1e-3 if args.dtype == "float32" else 5e-2)}
    return {"workload": asdict(workload), "checks": checks} | compare(runs, "tokens_per_s", sides, left_out)


def check_update(figures: dict[str, list[float]], tolerance: float) -> dict[str, Any]:
    """[loss, gradient norm] of the first update, which starts from equal weights, are the same on both sides."""
    (loss, norm), (their_loss, their_norm) = figures["ours"], figures["transformers"]
    worst = max(abs(norm - their_norm) / their_norm, abs(loss - their_loss))  # the loss itself is near zero
    return {"loss_and_norm": figures, "max_difference": worst, "tolerance": tolerance, "ok": worst < tolerance}


# ---------------------------------------------------------------------------------------------------- part: step


def word_tokenizer(vocabulary: int) -> Any:
    """A tokenizer for TRL, which takes text: the word "t17" is token 17."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocabulary)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t0", pad_token="t0", unk_token="t0")


def bench_step(args, device: torch.device) -> dict[str, Any]:
    """A whole GRPO step against TRL's GRPOTrainer: the same model, prompts, group, response length and optimizer.

    All responses have the full length, because TRL has no way to prescribe others. The reward is right half of the time on
    either side (the last token is even), so that no group is without a gradient.
    """
    left_out: dict[str, str] = {}
    if importlib.util.find_spec("trl") is None:
        left_out["trl"] = "not installed: pip install trl"
    raw = TOY if args.quick else SHAPES[args.shape]
    workload = QUICK_WORKLOADS[0] if args.quick else STEP_WORKLOADS[device.type]
    ours, theirs = model_pair(raw, args.seed, torch.float32, device)
    prompts, tokenizer = make_prompts(workload, ours.config.vocab_size, args.seed), word_tokenizer(ours.config.vocab_size)
    theirs_s, versions = [], {}
    if not left_out:
        steps = partial(trl_steps, theirs.train(), tokenizer, prompts, workload, args, device)
        theirs_s, versions = attempt("trl", steps, left_out) or ([], {})
    changes = dict(problems_per_step=workload.prompts, group_auto=workload.group, max_new_tokens=workload.longest)
    ours.config = replace(ours.config, eos_ids=(ours.config.vocab_size,))  # no response ends before the limit, nor at TRL
    model, optimizer, settings = trained(ours.train(), args, device, **changes)
    batch = [(p, Example(None, ids, None, None)) for p, ids in enumerate(prompts)]
    one_step = partial(sgpo_step, model, tokenizer, optimizer, settings, batch, even_is_right, learning_rate=1e-6)
    ours_s = []
    for step in range(args.repeats + 1):
        _, seconds, peak = measured(partial(one_step, step=step + 1), device)
        ours_s.append({"seconds": seconds, "peak_mb": peak / MB})
    runs, sides = [], {"ours": ours_s, "trl": theirs_s}
    for repeat in range(1, args.repeats + 1):  # the first step of each warms up
        for name, run_ in ((name, steps[repeat]) for name, steps in sides.items() if name not in left_out):
            tokens = workload.prompts * workload.group * workload.longest
            runs.append({"side": name, "repeat": repeat - 1, "tokens_per_s": tokens / run_["seconds"], **run_})
            print(f"  whole step       {name:15}{tokens / run_['seconds']:9.1f} tokens/s {run_['seconds']:7.1f} s", flush=True)
    return {"workload": asdict(workload), "versions": versions, "checks": {}} | compare(runs, "tokens_per_s", sides, left_out)


def even_is_right(response: str, _: Any) -> float:
    """The reward: is the last token even?"""
    return float(int(response.split()[-1][1:]) % 2 == 0)


def trl_steps(model: Any, tokenizer: Any, prompts, workload: Workload, args, device: torch.device) -> tuple[list[dict], dict]:
    """Seconds and peak memory of each of TRL's steps (one step = one generation and one optimizer update)."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    texts = [" ".join(f"t{token}" for token in prompt) for prompt in prompts]
    rows, micro = workload.prompts * workload.group, 8 if not args.quick else 2
    steps: list[dict[str, float]] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.before = start_memory(device)
            synchronize(device)
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize(device)
            steps.append({"seconds": time.perf_counter() - self.start, "peak_mb": peak_memory(device, self.before) / MB})

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, max_steps=args.repeats + 1, per_device_train_batch_size=micro,
            gradient_accumulation_steps=rows // micro, num_generations=workload.group, temperature=1.0,
            max_completion_length=workload.longest, beta=0.0, learning_rate=1e-6, weight_decay=0.01, max_grad_norm=1.0,
            optim="adamw_torch_fused", bf16=args.dtype == "bfloat16", use_cpu=device.type == "cpu", report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, gradient_checkpointing=False, seed=args.seed,
            generation_kwargs={"eos_token_id": model.config.vocab_size, "suppress_tokens": None}, shuffle_dataset=False,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": texts * (args.repeats + 1)}),
            processing_class=tokenizer,
            reward_funcs=lambda completions, **_: [even_is_right(text, None) for text in completions],
            callbacks=[Clock()],
        )
        trainer.train()
    return steps, {name: importlib.metadata.version(name) for name in ("trl", "accelerate")}


# ---------------------------------------------------------------------------------------------------- part: growth


def growth_workloads(args, device: torch.device) -> dict[str, dict[int, Workload]]:
    """axis -> its value -> a workload of equal lengths; along an axis only that figure changes."""
    scale = 8 if device.type == "cuda" else 1
    doubled = (1, 2) if args.quick else (1, 2, 4, 8)
    flat = partial(Workload, shortest_prompt=64, longest_prompt=64)

    def workload(prompts: int, group: int, length: int) -> Workload:
        return flat("growth", prompts, group, median=length, longest=length)

    return {
        "rows": {8 * k * scale: workload(k * scale, 8, 32 * scale) for k in doubled},
        "response length": {32 * k * scale: workload(2 * scale, 8, 32 * k * scale) for k in doubled},
        "group size of 32 rows": {4 * k: workload(8 * scale // k, 4 * k, 32 * scale) for k in doubled},
    }


def exponent(points: dict[float, float]) -> float:
    """The slope of log y over log x by least squares: 1 where the cost is proportional, 0 where it does not grow."""
    xs, ys = [math.log(x) for x in points], [math.log(y) for y in points.values()]
    return statistics.linear_regression(xs, ys).slope


def bench_growth(args, device: torch.device) -> dict[str, Any]:
    """Seconds of sampling, and of one update on as many tokens, along each axis: the median of the repeats."""
    raw = TOY if args.quick else SHAPES[args.shape]
    generator = torch.Generator("cpu").manual_seed(args.seed)
    model = build_model(ModelConfig.from_dict(raw), generator=generator, dtype=torch.float32, device=device)
    model, optimizer, settings = trained(model, args, device)
    curves = []
    for axis, points in growth_workloads(args, device).items():
        seconds: dict[str, dict[int, float]] = {"sampling": {}, "update": {}}
        for x, workload in points.items():
            prompts, lengths = make_prompts(workload, model.config.vocab_size, args.seed), make_lengths(workload, args.seed)
            samples = make_rollouts(workload, model, args)
            options = dict(n=workload.group, max_new_tokens=0, temperature=1.0, eos_ids=(), lengths=lengths, seed=args.seed)

            def sampling(prompts=prompts, options=options):
                with whole_model(model) as policy:
                    sample_ours(policy, prompts, **options)

            works = {"sampling": sampling, "update": partial(update, model, optimizer, settings, samples, 1e-6)}
            for name, work in works.items():
                seconds[name][x] = statistics.median(measured(work, device)[1] for _ in range(args.repeats))
            print(f"  growth   {axis:22}{x:6}  " + "  ".join(f"{n} {s[x]:.2f} s" for n, s in seconds.items()), flush=True)
        curves += [
            {"axis": axis, "cost": name, "seconds": points, "exponent": exponent(points)} for name, points in seconds.items()
        ]
    return {"curves": curves, "checks": {}}


# ---------------------------------------------------------------------------------------------------- part: head


def head_variant(variant: str, shape: HeadShape, dtype_name: str, threads: int, kind: str, seed: int) -> dict[str, Any]:
    """One forward and backward of the loss at the head, in a process of its own: {seconds, peak_mb, loss, gradient norms}.

    The loss is the mean cross-entropy. `variant` is "autograd" (the whole (M, V) logits and F.cross_entropy, PyTorch's own
    fused loss: the fastest and leanest way without chunks) or the chunk size as digits. Inputs exist, and are touched, before
    the memory counter starts; the gradients that the loss leaves behind count for every variant alike.
    """
    torch.set_num_threads(threads)
    device, dtype = torch.device(kind), getattr(torch, dtype_name)
    generator = torch.Generator("cpu").manual_seed(seed)

    def inputs(tokens: int, vocabulary: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        hidden = torch.randn(tokens, shape.width, generator=generator).to(device, dtype).requires_grad_()
        weight = (0.02 * torch.randn(vocabulary, shape.width, generator=generator)).to(device, dtype).requires_grad_()
        targets = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
        return hidden, weight, [targets, torch.full((tokens,), 1.0 / tokens, device=device)]

    run_head(variant, *inputs(64, 128))  # starts the threads and loads the kernels
    hidden, weight, extra = inputs(shape.tokens, shape.vocabulary)
    loss, seconds, peak = measured(lambda: run_head(variant, hidden, weight, extra), device)
    norms = [hidden.grad.float().norm().item(), weight.grad.float().norm().item()]
    return {"variant": variant, "seconds": seconds, "peak_mb": peak / MB, "loss": loss, "gradient_norms": norms}


def run_head(variant: str, hidden: Tensor, weight: Tensor, extra: list[Tensor]) -> float:
    """Forward and backward of one variant; the gradients are in hidden.grad and weight.grad. The logits get no name, so that
    autograd alone decides how long they live."""
    if variant == "autograd":
        loss = F.cross_entropy(F.linear(hidden, weight).float(), extra[0])
    else:
        loss, _ = chunked_head(hidden, weight, partial(sft_terms, temperature=1.0), extra, chunk_tokens=int(variant))
    loss.backward()
    return loss.item()


def bench_head(args, device: torch.device) -> dict[str, Any]:
    """Every variant in a fresh process, `repeats` times in alternation. The processes start by spawn: nothing is inherited."""
    shape = QUICK_HEAD if args.quick else QWEN25_05B_HEAD
    variants = ["autograd", *map(str, shape.chunks)]
    context = multiprocessing.get_context("spawn")
    runs = []
    for repeat in range(args.repeats):
        for variant in variants:
            with context.Pool(1) as pool:
                run = pool.apply(head_variant, (variant, shape, args.dtype, args.threads, device.type, args.seed))
            runs.append({"repeat": repeat, **run})
            print(f"  head     {variant:13} {run['peak_mb']:9.0f} MB       {run['seconds']:7.1f} s", flush=True)
    summary = []
    for variant in variants:
        mine = [run for run in runs if run["variant"] == variant]
        whole = [run for run in runs if run["variant"] == "autograd"]
        row = {"variant": variant, "peak_mb": spread([run["peak_mb"] for run in mine])}
        row["seconds"] = spread([run["seconds"] for run in mine])
        for figure in ("peak_mb", "seconds"):  # against plain autograd, repeat by repeat
            row[f"{figure}_ratio"] = spread([a[figure] / b[figure] for a, b in zip(mine, whole, strict=True)])
        summary.append(row)
    check = check_head(runs, tolerance=1e-4 if args.dtype == "float32" else 2e-2)
    return {"shape": asdict(shape), "checks": {"same_loss": check}, "summary": summary, "runs": runs}


def check_head(runs: Sequence[dict[str, Any]], tolerance: float) -> dict[str, Any]:
    """Loss and gradient norms of every variant are autograd's, to a relative `tolerance`."""
    figures = {run["variant"]: [run["loss"], *run["gradient_norms"]] for run in runs}
    reference, worst = figures["autograd"], 0.0
    for values in figures.values():
        worst = max(worst, *(abs(a - b) / abs(b) for a, b in zip(values, reference, strict=True)))
    return {"max_relative_difference": worst, "tolerance": tolerance, "ok": worst < tolerance}


# ---------------------------------------------------------------------------------------------------- report


def environment(args, device: torch.device) -> dict[str, Any]:
    """Everything that is needed to judge or repeat the figures."""
    commit = code_commit()
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "seed": args.seed,
        "shape": "toy" if args.quick else args.shape,
        "dtype": args.dtype,
        "repeats": args.repeats,
        "quick": args.quick,
        "commit": commit.rstrip("+"),
        "changed_files": commit.endswith("+"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "device_type": device.type,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }


def print_sampler(part: dict[str, Any]) -> None:
    limits, prefill = part["limits"], part["prefill"]
    print(f"\nsampler; limits of the machine: {limits['bandwidth'] / 1e9:.1f} GB/s, {limits['matmul'] / 1e9:.0f} GFLOP/s")
    rate, share = prefill["tokens_per_s"], {name: 100 * value for name, value in prefill["share"].items()}
    print(
        f"  prefill          {prefill['tokens']} prompt tokens at {rate['median']:.0f} tokens/s: "
        f"{share['median']:.0f} % ({share['min']:.0f} to {share['max']:.0f}) of the matrix peak"
    )
    print(f"  {'':17}of its time: " + ", ".join(f"{kind} {100 * part:.0f} %" for kind, part in prefill["time"].items()))
    for result in part["workloads"]:
        print_sides(result["workload"]["name"], result, "tokens_per_s", "floor_share")


def print_sides(title: str, result: dict[str, Any], figure: str, share: str | None = None) -> None:
    """One line a side: the figure's median and range, peak memory, the share of the limit, and the ratio of ours to it."""
    for name, why in result.get("left_out", {}).items():
        print(f"  {title:17}{name:15}not run: {why}")
    for name, value in result[figure].items():
        runs = [run for run in result["runs"] if run["side"] == name]
        line = f"  {title:17}{name:15}{value['median']:9.1f} ({value['min']:.1f} to {value['max']:.1f})"
        line += f"  peak +{max(run['peak_mb'] for run in runs):.0f} MB"
        if share:
            line += f"  {100 * statistics.median(run[share] for run in runs):.0f} % of the limit"
        if name in result["ratio"]:
            ratio = result["ratio"][name]
            line += f"  ours is {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}) times as fast"
        print(line)


def print_head(part: dict[str, Any]) -> None:
    shape = part["shape"]
    size = f"M={shape['tokens']} D={shape['width']} V={shape['vocabulary']}"
    print(f"\nloss at the head, forward and backward, {size}; ratios to F.cross_entropy on the whole logits")
    for row in part["summary"]:
        name = row["variant"] if not row["variant"].isdigit() else f"chunks of {row['variant']}"
        memory = f"{row['peak_mb']['median']:8.0f} MB {100 * row['peak_mb_ratio']['median']:6.1f} %"
        ratio = row["seconds_ratio"]
        clock = f"{row['seconds']['median']:8.2f} s  x {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
        print(f"  {name:15} {memory} {clock}")


def print_report(report: dict[str, Any]) -> None:
    failed = {name: part["failed"] for name, part in report.items() if isinstance(part, dict) and "failed" in part}
    for name, why in failed.items():
        print(f"\n{name}: failed, {why}")
    report = {name: part for name, part in report.items() if name not in failed}
    if "sampler" in report:
        print_sampler(report["sampler"])
    for part, title in (("update", "one update"), ("step", "a whole GRPO step")):
        if part not in report:
            continue
        print(f"\n{title}; response tokens/s")
        print_sides(part, report[part], "tokens_per_s", "flop_share" if part == "update" else None)
    if "head" in report:
        print_head(report["head"])
    for curve in report.get("growth", {}).get("curves", ()):
        points = "  ".join(f"{x}: {seconds:.2f} s" for x, seconds in curve["seconds"].items())
        print(f"  {curve['cost']:9} over {curve['axis']:22} exponent {curve['exponent']:5.2f}   {points}")


def print_checks(report: dict[str, Any]) -> bool:
    """Every check on a line; returns whether all hold and no part failed."""
    print("\nchecks: both ways compute the same")
    passed = True
    for part in (*PARTS, "growth"):
        passed = passed and "failed" not in report.get(part, {})
        for name, check in report.get(part, {}).get("checks", {}).items():
            details = {key: value for key, value in check.items() if key != "ok"}
            print(f"  {'ok    ' if check['ok'] else 'FAILED'} {part} {name}: {json.dumps(details)}")
            passed = passed and check["ok"]
    return passed


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--quick", action="store_true", help="toy shapes: does it run, are both ways equal; times nothing")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--only", nargs="+", choices=(*PARTS, "growth"), default=list(PARTS), help="these parts instead of all")
    names = [workload.name for workload in CPU_WORKLOADS]
    parser.add_argument("--workloads", nargs="+", choices=names, help="of the sampler: these instead of all")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="smollm2-135m", help="the model of sampler, update and step")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: fp32 on a CPU")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each side, in alternation")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.repeats < 1 or args.threads < 1:
        parser.error(f"--repeats {args.repeats} and --threads {args.threads} must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.dtype == "auto":
        args.dtype = "bfloat16" if args.device == "cuda" else "float32"
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts, print the tables, write the JSON. Returns 1 if a check or a part failed."""
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    parts = {"sampler": bench_sampler, "update": bench_update, "step": bench_step, "head": bench_head, "growth": bench_growth}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with ranks_of(args.device, timeout_minutes=10) as device:
        report: dict[str, Any] = environment(args, device)
        setting = f"{report['device']}, {report['shape']}, {args.dtype}, {args.threads} threads, seed {args.seed}"
        print(f"{setting}, load {report['load_before'][0]:.2f}", flush=True)
        for part in args.only:
            try:
                report[part] = parts[part](args, device)
            except Exception as error:  # a row of the report, and not its end: the other parts are worth as much
                traceback.print_exc()
                report[part] = {"failed": one_line(error), "runs": [], "checks": {}}
            report["load_after"] = os.getloadavg()
            args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print_report(report)
    passed = print_checks(report)
    print(f"\nwritten: {args.out}")
    return 0 if passed else 1


if __name__ == "__main__":
    leave(main())
