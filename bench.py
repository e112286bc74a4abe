"""Speed and memory, measured side by side: our sampler against transformers, our chunked head against the whole logits.

What it is: one run that builds models by shape with random weights (nothing is downloaded), does the same work both ways in
alternation (A B A B ...), checks that both ways do compute the same thing, prints tables and writes every raw figure as JSON.
What it is not: a benchmark of answers, of training as a whole, or of inference servers. Ragged response lengths come from
random weights whose next-token distribution is nearly uniform: with V / L of the V ids declared end-of-sequence, lengths are
nearly geometric with mean L. Only useful tokens are counted, up to and including the first end-of-sequence token.

    python bench.py --out results/bench/cpu.json                 both parts, on the GPU where there is one
    python bench.py --out /tmp/b.json --only head --device cpu   one part
    python bench.py --out /tmp/b.json --quick                    toy shapes, seconds: checks that everything runs, times nothing

On a CPU everything is fp32, on CUDA bf16 (the checks fp32). Exit status 1 where a check of equality fails. Timings mean
something only on an idle machine; the load average before and after is recorded.
Axes: P prompts, n responses a prompt, M response tokens, D width, V vocabulary.
"""

import argparse
import gc
import importlib.metadata
import json
import multiprocessing
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loss import chunked_head, sft_terms
from model import CausalLM, ModelConfig, build_model
from rollout import generate

MB = 1e6  # memory is reported in units of 10^6 bytes

# HuggingFaceTB/SmolLM2-135M by shape. The initialisation is 0.02 here and not that model's 0.042: the smaller the weights, the
# nearer the next-token distribution is to uniform (entropy 10.69 of 10.80 nats), and that is what makes lengths geometric.
SMOLLM2_135M = dict(
    model_type="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    rms_norm_eps=1e-5,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
    initializer_range=0.02,
    rope_theta=100000.0,
    hidden_act="silu",
    attention_bias=False,
    mlp_bias=False,
)
TOY = {**SMOLLM2_135M, "vocab_size": 512, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
TOY = {**TOY, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512}
# For the test of the distribution: few tokens, and weights large enough that their probabilities differ a lot.
SMALL_VOCABULARY = {**TOY, "vocab_size": 24, "initializer_range": 0.2}


@dataclass(frozen=True)
class Workload:
    """What both samplers are asked to do. mean_length None: no end-of-sequence id can be reached, every row runs to the cap."""

    name: str
    prompts: int
    group: int
    shortest_prompt: int
    longest_prompt: int
    mean_length: int | None
    max_new_tokens: int


WORKLOADS = (
    Workload("ragged", 8, 8, 40, 160, mean_length=64, max_new_tokens=512),
    Workload("uniform", 8, 8, 40, 160, mean_length=None, max_new_tokens=64),
)
QUICK_WORKLOADS = (
    Workload("ragged", 3, 2, 4, 9, mean_length=8, max_new_tokens=24),
    Workload("uniform", 3, 2, 4, 9, mean_length=None, max_new_tokens=6),
)


@dataclass(frozen=True)
class HeadShape:
    """The size of the head's loss: M response tokens, width D, vocabulary V, and the chunk sizes to measure."""

    tokens: int
    width: int
    vocabulary: int
    chunks: tuple[int, ...]


QWEN25_05B_HEAD = HeadShape(tokens=4096, width=896, vocabulary=152064, chunks=(128, 512))
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
    which is right only where the measured part is the process's largest.
    """
    gc.collect()
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


def make_prompts(workload: Workload, vocabulary: int, seed: int) -> tuple[list[list[int]], list[int]]:
    """(prompts of random tokens and ragged lengths, end-of-sequence ids) of a workload."""
    rng = random.Random(seed)
    lengths = [rng.randint(workload.shortest_prompt, workload.longest_prompt) for _ in range(workload.prompts)]
    prompts = [[rng.randrange(vocabulary) for _ in range(length)] for length in lengths]
    if workload.mean_length is None:
        return prompts, [vocabulary]  # an id that no model of this vocabulary can produce
    return prompts, sorted(rng.sample(range(vocabulary), round(vocabulary / workload.mean_length)))


def sample_ours(model: CausalLM, prompts, eos_ids, *, n, max_new_tokens, temperature, seed) -> list[list[int]]:
    """P * n responses, the n of a prompt together, each up to and including its first end-of-sequence token."""
    limits = dict(n=n, max_new_tokens=max_new_tokens, temperature=temperature, top_p=1.0)
    groups = generate(model, prompts, **limits, eos_ids=eos_ids, seed=seed)
    return [trajectory.response_ids for group in groups for trajectory in group]


@torch.inference_mode()
def sample_theirs(model: Any, prompts, eos_ids, *, n, max_new_tokens, temperature, seed) -> list[list[int]]:
    """The same by transformers' model.generate: left-padded prompts, KV cache, SDPA, no logits processor but the temperature.

    The id used for padding is one of the end-of-sequence ids: responses are cut at the first of those, so that the padding
    after a finished row is never counted.
    """
    vocabulary = model.config.vocab_size
    pad = eos_ids[0] if eos_ids[0] < vocabulary else 0
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    drawing = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0) if temperature else dict(do_sample=False)
    torch.manual_seed(seed)
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
    ends = set(eos_ids)
    responses = []
    for row in output[:, width:].tolist():
        length = next((index + 1 for index, token in enumerate(row) if token in ends), len(row))
        responses.append(row[:length])
    return responses


SAMPLERS = {"ours": sample_ours, "transformers": sample_theirs}


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
    for group in generate(ours, prompts, **limits, eos_ids=never, seed=seed):
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
    for name, model in (("ours", ours), ("transformers", theirs)):
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


@torch.inference_mode()
def next_token_entropy(model: CausalLM, prompt: list[int]) -> float:
    """Mean entropy in nats over the prompt's positions; near log V the lengths are geometric."""
    log_p = torch.log_softmax(model(torch.tensor([prompt], device=model.device)).float(), -1)
    return -(log_p.exp() * log_p).sum(-1).mean().item()


# ---------------------------------------------------------------------------------------------------- part 1: the sampler


def bench_sampler(raw: dict[str, Any], workloads: Sequence[Workload], args, device: torch.device) -> dict[str, Any]:
    """Checks in fp32, then every workload on both samplers in alternation."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ours, theirs = model_pair(raw, args.seed, torch.float32, device)
    prompts, _ = make_prompts(workloads[0], ours.config.vocab_size, args.seed)
    length = 32 if raw is not TOY else 12
    checks = {
        "greedy": check_greedy(ours, theirs, prompts[:4], length),
        "logprobs": check_logprobs(ours, theirs, prompts[:2], length, args.seed),
        "distribution": check_distribution(args.seed, device, draws=400 if args.quick else 2000),
    }
    entropy = {"mean": next_token_entropy(ours, prompts[0]), "log_v": torch.tensor(ours.config.vocab_size).log().item()}
    if dtype != torch.float32:
        del ours, theirs
        ours, theirs = model_pair(raw, args.seed, dtype, device)
    results = [sampler_workload(ours, theirs, workload, args, device) for workload in workloads]
    return {"model": raw, "dtype": str(dtype), "entropy": entropy, "checks": checks, "workloads": results}


def sampler_workload(ours, theirs, workload: Workload, args, device: torch.device) -> dict[str, Any]:
    """A B A B ...: each repeat with its own seed, so that the spread holds the luck of the lengths as well as the machine's."""
    prompts, eos_ids = make_prompts(workload, ours.config.vocab_size, args.seed)
    models = {"ours": ours, "transformers": theirs}
    for name, model in models.items():  # threads, kernels and lazily made tables
        SAMPLERS[name](model, prompts[:2], eos_ids, n=2, max_new_tokens=4, temperature=1.0, seed=0)
    runs, lengths = [], {name: [] for name in models}
    for repeat in range(args.repeats):
        for name, model in models.items():
            options = dict(n=workload.group, max_new_tokens=workload.max_new_tokens, temperature=1.0)
            work = partial(SAMPLERS[name], model, prompts, eos_ids, **options, seed=args.seed + repeat + 1)
            rows, seconds, peak = measured(work, device)
            useful = [len(row) for row in rows]
            lengths[name] += useful
            run = {"side": name, "repeat": repeat, "seconds": seconds, "useful_tokens": sum(useful)}
            run |= {"tokens_per_s": sum(useful) / seconds, "mean_length": statistics.fmean(useful), "longest": max(useful)}
            runs.append(run | {"peak_mb": peak / MB})
            print(f"  {workload.name:8} {name:13} {run['tokens_per_s']:9.1f} tokens/s {seconds:7.1f} s", flush=True)
    speed = {name: [run["tokens_per_s"] for run in runs if run["side"] == name] for name in models}
    # one ratio a repeat: the two halves of a repeat ran next to each other, on the same state of the machine
    ratios = [a / b for a, b in zip(speed["ours"], speed["transformers"], strict=True)]
    return {
        "workload": asdict(workload),
        "eos_ids": len(eos_ids),
        "runs": runs,
        "mean_length": {name: statistics.fmean(values) for name, values in lengths.items()},
        "length_z": z_score(*lengths.values()),
        "tokens_per_s": {name: spread(values) for name, values in speed.items()},
        "ratio": spread(ratios),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


# ---------------------------------------------------------------------------------------------------- part 2: the head


def head_variant(variant: str, shape: HeadShape, threads: int, kind: str, seed: int) -> dict[str, Any]:
    """One forward and backward of the loss at the head, in a process of its own: {seconds, peak_mb, loss, gradient norms}.

    The loss is the mean cross-entropy. `variant` is "autograd" (the whole (M, V) logits and F.cross_entropy, PyTorch's own
    fused loss: the fastest and leanest way without chunks) or the chunk size as digits. Inputs exist, and are touched, before
    the memory counter starts; the gradients that the loss leaves behind count for every variant alike.
    """
    torch.set_num_threads(threads)
    device = torch.device(kind)
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
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
        loss, _ = chunked_head(hidden, weight, sft_terms, extra, chunk_tokens=int(variant))
    loss.backward()
    return loss.item()


def bench_head(shape: HeadShape, args, device: torch.device) -> dict[str, Any]:
    """Every variant in a fresh process, `repeats` times in alternation. The processes start by spawn: nothing is inherited."""
    variants = ["autograd", *map(str, shape.chunks)]
    context = multiprocessing.get_context("spawn")
    runs = []
    for repeat in range(args.repeats):
        for variant in variants:
            with context.Pool(1) as pool:
                run = pool.apply(head_variant, (variant, shape, args.threads, device.type, args.seed))
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
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    check = check_head(runs, tolerance=1e-4 if dtype == torch.float32 else 2e-2)
    return {"shape": asdict(shape), "dtype": str(dtype), "checks": {"same_loss": check}, "summary": summary, "runs": runs}


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
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "seed": args.seed,
        "repeats": args.repeats,
        "quick": args.quick,
        "commit": git("rev-parse", "HEAD") or "unknown",
        "changed_files": bool(git("status", "--porcelain", "--untracked-files=no")),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "device_type": device.type,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }


def print_sampler(part: dict[str, Any]) -> None:
    print(f"\nsampler, {part['dtype']}; useful tokens/s as median (min to max) of the repeats")
    print(f"  next-token entropy {part['entropy']['mean']:.3f} nats, log V {part['entropy']['log_v']:.3f}")
    for result in part["workloads"]:
        for name in SAMPLERS:
            speed, length = result["tokens_per_s"][name], result["mean_length"][name]
            peak = max(run["peak_mb"] for run in result["runs"] if run["side"] == name)
            line = f"{speed['median']:9.1f} ({speed['min']:.1f} to {speed['max']:.1f})  mean length {length:.1f}"
            print(f"  {result['workload']['name']:8} {name:13} {line}  peak +{peak:.0f} MB")
        ratio = result["ratio"]
        print(f"  {'':8} {'ratio':13} {ratio['median']:9.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})")


def print_head(part: dict[str, Any]) -> None:
    shape = part["shape"]
    size = f"M={shape['tokens']} D={shape['width']} V={shape['vocabulary']}"
    print(f"\nloss at the head, forward and backward, {part['dtype']}, {size}; ratios to F.cross_entropy on the whole logits")
    for row in part["summary"]:
        name = row["variant"] if not row["variant"].isdigit() else f"chunks of {row['variant']}"
        memory = f"{row['peak_mb']['median']:8.0f} MB {100 * row['peak_mb_ratio']['median']:6.1f} %"
        ratio = row["seconds_ratio"]
        clock = f"{row['seconds']['median']:8.2f} s  x {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
        print(f"  {name:15} {memory} {clock}")


def print_checks(report: dict[str, Any]) -> bool:
    """Every check on a line; returns whether all hold."""
    print("\nchecks: both ways compute the same")
    passed = True
    for part in ("sampler", "head"):
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
    parser.add_argument("--only", choices=("sampler", "head"), help="one part instead of both")
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
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts, print the tables, write the JSON. Returns 1 where a check failed."""
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    report: dict[str, Any] = environment(args, device)
    print(f"{report['device']}, {args.threads} threads, load {report['load_before'][0]:.2f}, seed {args.seed}", flush=True)
    if args.only != "sampler":
        report["head"] = bench_head(QUICK_HEAD if args.quick else QWEN25_05B_HEAD, args, device)
    if args.only != "head":
        shape, workloads = (TOY, QUICK_WORKLOADS) if args.quick else (SMOLLM2_135M, WORKLOADS)
        report["sampler"] = bench_sampler(shape, workloads, args, device)
    report["load_after"] = os.getloadavg()
    if "sampler" in report:
        print_sampler(report["sampler"])
    if "head" in report:
        print_head(report["head"])
    passed = print_checks(report)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten: {args.out}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
