"""Speed and memory, measured side by side against named rivals that do the same work.

    sampler   rollout.generate against transformers' model.generate and model.generate_batch (continuous batching)
    update    one optimizer update on given rollouts against plain transformers and autograd on padded batches
    step      a whole GRPO step, sampling included, against TRL's GRPOTrainer
    head      the loss at the head in chunks against the whole logits

One run builds models by shape with random weights, does the same work on every side in alternation (A B A B ...), checks that
all sides compute the same, and writes every figure as JSON. Response lengths are prescribed. Timings need an idle machine.

    python tools/bench.py --out results/bench/cpu.json                 all parts, on the GPU if there is one
    python tools/bench.py --out /tmp/b.json --quick                    toy shapes: checks that everything runs, times nothing

`pip install psutil` for generate_batch on a CPU, `pip install trl` for the part step: the report says if a rival is missing, or
dies. Exit status 1 if a check or a part fails. Axes: P prompts, n responses each, M response tokens, D width, V vocabulary.
"""

import argparse
import ctypes
import gc
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import random
import re
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the files of the method, from the folder above

from checkpoint import code_commit
from loss import chunked_head, sft_terms
from methods import Method
from model import CausalLM, ModelConfig, build_model
from parallel import leave, ranks_of, shard
from rollout import Trajectory, generate
from sgpo import Example, ProblemSamples, set_advantages, sgpo_step, update
from tools.plan import SHAPES, Shape, forward_flops

MB = 1e6  # memory is reported in units of 10^6 bytes
SEED = 0
DRAWING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}  # the rivals', over the full softmax


@dataclass(frozen=True)
class Workload:
    """`prompts` prompts of ragged lengths, with `group` responses to each, whose lengths are lognormal with this median; the
    longest of all has `longest` tokens. If the two are equal, all have the same length."""

    name: str
    prompts: int
    group: int
    shortest_prompt: int
    longest_prompt: int
    median: int
    longest: int


# the parts update and step have one each, the part sampler has the others
WORKLOADS = json.loads(Path(__file__).with_name("workloads.json").read_text(encoding="utf-8"))
SAMPLER_WORKLOADS = ("uniform", "long tail", "large groups", "strategy prompts")
# Qwen2.5-0.5B's head, M response tokens, the size of a chunk
HEAD = {"tokens": 4096, "width": 896, "vocabulary": 152064, "chunk": 512}
QUICK_HEAD = {"tokens": 64, "width": 32, "vocabulary": 1024, "chunk": 32}


def workloads_of(args: argparse.Namespace, *names: str) -> list[Workload]:
    return [Workload(**row) for row in WORKLOADS[args.scale] if row["name"] in names]


# ---------------------------------------------------------------------------------------------------- measurement


def status_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process: its resident size now, and its peak."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s*(\d+) kB$", text, re.M)[1]) * 1024


def start(device: torch.device) -> tuple[float, int]:
    """(the time, the bytes in use), for `stop`. On a CPU they are those of the resident size, whose peak only Linux can
    restart. What the C library keeps of freed memory is given back first: work that used only that would seem to need none."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        in_use = torch.cuda.memory_allocated(device)
    else:
        if hasattr(ctypes.CDLL(None), "malloc_trim"):  # glibc
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        in_use = status_bytes("VmRSS")
    return time.perf_counter(), in_use


def stop(device: torch.device, started: tuple[float, int]) -> tuple[float, int]:
    """(seconds, the most bytes in use at any time beyond what was in use then) since `start`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        most = torch.cuda.max_memory_allocated(device)
    else:
        most = status_bytes("VmHWM")
    return time.perf_counter() - started[0], most - started[1]


def measured(work: Callable[[], Any], device: torch.device) -> tuple[Any, float, int]:
    """(result, seconds, peak bytes) of one call."""
    started = start(device)
    result = work()
    return result, *stop(device, started)


def per_second(work: Callable[[], Any], amount: float, device: torch.device, repeats: int) -> dict[str, float]:
    """`amount` divided by the seconds of a call: median and range over the repeats, after a call that only warms up."""
    work()
    return spread([amount / measured(work, device)[1] for _ in range(repeats)])


def machine_limits(args: argparse.Namespace) -> dict[str, float]:
    """What this machine reaches at best: bytes/s of a copy between large tensors, FLOP/s of a large matrix product."""
    size, count = {"quick": (256, 2**16), "cpu": (2048, 2**26), "cuda": (8192, 2**28)}[args.scale]
    a, b = torch.randn(2, size, size, device=args.device).to(args.dtype)
    source, target = torch.zeros(2, count, device=args.device)
    return {
        "bandwidth": per_second(lambda: target.copy_(source), 2 * source.nbytes, args.device, repeats=5)["max"],
        "matmul": per_second(lambda: a @ b, 2 * size**3, args.device, repeats=5)["max"],
    }


def alternate(title: str, sides: dict[str, Callable[[int], Any]], args: argparse.Namespace) -> tuple[list, dict]:
    """(a run for each measurement, {rival that died: why}). The sides take turns, A B A B ..., after one round (repeat -1) that
    only warms up. Each gets the number of the repeat; its `result` is in the run. The others go on if a rival dies. Our own
    errors are errors."""
    runs, left_out = [], {}
    for repeat in range(-1, args.repeats):
        for name, work in sides.items():
            if name in left_out:
                continue
            try:
                result, seconds, peak = measured(partial(work, repeat), args.device)
            except Exception as error:  # whatever a rival raises
                if name == "ours":
                    raise
                left_out[name] = repr(error)[:200]
                torch.cuda.empty_cache()
                continue
            runs.append({"side": name, "repeat": repeat, "seconds": seconds, "peak_mb": peak / MB, "result": result})
            print(f"  {title:17}{name:15}{seconds:7.1f} s", flush=True)
    return runs, left_out


def compare(title: str, runs: Sequence[dict[str, Any]], figure: str, left_out: dict[str, str]) -> dict[str, Any]:
    """The counted runs of the sides that are not left out, the median and range of a figure for each side, and those of the
    ratio of our figure to it. There is one ratio a repeat, because its sides ran one after the other."""
    runs = [run for run in runs if run["repeat"] >= 0 and run["side"] not in left_out]
    for name, why in left_out.items():
        print(f"  {title:17}{name:15}not run: {why}")
    ours = [run[figure] for run in runs if run["side"] == "ours"]
    figures, ratios = {}, {}
    for name in dict.fromkeys(run["side"] for run in runs):
        values = [run[figure] for run in runs if run["side"] == name]
        peak = max(run["peak_mb"] for run in runs if run["side"] == name)
        figures[name] = spread(values)
        ratios[name] = spread([a / b for a, b in zip(ours, values, strict=True)])
        line = f"{figure} {figures[name]['median']:.1f}, peak +{peak:.0f} MB, ours / {name} {ratios[name]['median']:.2f}"
        print(f"  {title:17}{name:15}{line}", flush=True)
    return {"left_out": left_out, "runs": runs, figure: figures, "ratio": ratios}


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


# ---------------------------------------------------------------------------------------------------- the samplers


def model_pair(raw: dict[str, Any], dtype: torch.dtype, device: torch.device) -> tuple[CausalLM, Any]:
    """(ours, transformers' model of the same class and weights). Both in eval mode; theirs with SDPA attention."""
    from transformers import AutoConfig, AutoModelForCausalLM, logging  # imported here: the head does without

    logging.set_verbosity_error()
    generator = torch.Generator("cpu").manual_seed(SEED)
    ours = build_model(ModelConfig.from_dict(raw), generator=generator, dtype=dtype, device=device).eval()
    config = AutoConfig.for_model(**raw)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    theirs.load_state_dict(ours.state_dict(), strict=False)  # a tied head is the embedding's tensor
    return ours, theirs.to(device).eval()


def make_prompts(workload: Workload, vocabulary: int) -> list[list[int]]:
    """Prompts of random tokens and ragged lengths."""
    rng = random.Random(SEED)
    lengths = [rng.randint(workload.shortest_prompt, workload.longest_prompt) for _ in range(workload.prompts)]
    return [[rng.randrange(1, vocabulary) for _ in range(length)] for length in lengths]


def make_lengths(workload: Workload, seed: int) -> list[int]:
    """The P * n response lengths, the n of a prompt together."""
    rng, rows = random.Random(seed), workload.prompts * workload.group
    # the largest of 64 normal numbers is about 2.4 standard deviations out
    sigma = math.log(workload.longest / workload.median) / 2.4
    lengths = [round(workload.median * math.exp(rng.gauss(0, sigma))) for _ in range(rows)]
    lengths = [min(max(length, 1), workload.longest) for length in lengths]
    lengths[rng.randrange(rows)] = workload.longest
    return lengths


def padded(rows: Sequence[list[Any]], device: torch.device, side: str = "right") -> Tensor:
    return pad_sequence([torch.tensor(row, device=device) for row in rows], batch_first=True, padding_side=side)


def sample_groups(model: CausalLM, prompts, lengths: Sequence[int], *, seed: int, top_p: float = 1.0) -> list[list[Trajectory]]:
    """Our sampler: n trajectories for each of P prompts. `lengths` are those of all P * n, the n of a prompt together."""
    n = len(lengths) // len(prompts)
    return generate(
        model,
        prompts,
        n=n,
        max_new_tokens=[lengths[start : start + n] for start in range(0, len(lengths), n)],
        temperature=1.0,
        top_p=top_p,
        eos_ids=[model.config.vocab_size],  # none
        seed=[seed * 1_000_003 + p for p in range(len(prompts))],
        max_rows=1024,
    )


def sample_ours(model: CausalLM, prompts, lengths: Sequence[int], *, seed: int) -> list[list[int]]:
    return [row.response_ids for group in sample_groups(model, prompts, lengths, seed=seed) for row in group]


@torch.no_grad()  # not inference_mode: the worker is a thread, which would be outside of it and write to its tensors
def sample_batch(model: Any, prompts, lengths: Sequence[int], *, seed: int) -> list[list[int]]:
    """transformers' continuous batching: what model.generate_batch does, with a length for each request."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    torch.manual_seed(seed)
    requests = [prompt for prompt in prompts for _ in range(len(lengths) // len(prompts))]
    settings = {}
    if model.device.type == "cpu":  # by default it would take nearly all of the host's memory
        importlib.import_module("psutil")  # without it the worker would die, and we would wait for it
        page = 32
        blocks = sum(math.ceil((len(p) + length) / page) + 1 for p, length in zip(requests, lengths, strict=True))
        settings = dict(block_size=page, num_blocks=blocks, max_batch_tokens=max(1024, len(requests)))
    with model.continuous_batching_context_manager(
        generation_config=GenerationConfig(**DRAWING, eos_token_id=-1, pad_token_id=0, max_new_tokens=max(lengths)),
        continuous_batching_config=ContinuousBatchingConfig(**settings),
        block=True,
        timeout=5,
    ) as manager:
        ids = [manager.add_request(p, max_new_tokens=length) for p, length in zip(requests, lengths, strict=True)]
        results: dict[str, Any] = {}
        while len(results) < len(ids):
            result = manager.get_result(timeout=300)
            if result is None or not result.is_finished():
                raise RuntimeError(f"generate_batch ended no response in 300 s, after {len(results)} of {len(ids)}")
            results[result.request_id] = result
    return [results[key].generated_tokens for key in ids]


@torch.inference_mode()
def sample_theirs(model: Any, prompts, lengths: Sequence[int], *, seed: int) -> list[list[int]]:
    """transformers' model.generate: left-padded prompts, KV cache, SDPA, no logits processor."""
    ids = padded(prompts, model.device, "left")
    mask = padded([[1] * len(prompt) for prompt in prompts], model.device, "left")
    width = ids.shape[1]
    ends = torch.tensor(lengths, device=model.device)
    torch.manual_seed(seed)
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        num_return_sequences=len(lengths) // len(prompts),
        max_new_tokens=max(lengths),
        eos_token_id=[model.config.vocab_size],
        pad_token_id=0,
        use_cache=True,
        stopping_criteria=[lambda ids, scores, **_: ids.shape[1] - width >= ends],  # row by row
        **DRAWING,
    )
    return [row[:length] for row, length in zip(output[:, width:].tolist(), lengths, strict=True)]


SAMPLERS = {"ours": sample_ours, "generate": sample_theirs, "generate_batch": sample_batch}


# ---------------------------------------------------------------------------------------------------- checks of equality


def check_logprobs(ours: CausalLM, theirs: Any, prompt: list[int]) -> dict[str, Any]:
    """The log-probabilities that our sampler reports are those that transformers' forward gives the same tokens."""
    [group] = sample_groups(ours, [prompt], [32] * 4, seed=SEED)
    rows = torch.tensor([prompt + row.response_ids for row in group], device=theirs.device)
    with torch.inference_mode():
        log_p = theirs(input_ids=rows).logits[:, len(prompt) - 1 : -1].float().log_softmax(-1)
    reference = log_p.gather(-1, rows[:, len(prompt) :, None])[..., 0].cpu()
    worst = (reference - torch.tensor([row.logprobs for row in group])).abs().max().item()
    return {"max_difference": worst, "tolerance": 1e-3, "ok": worst < 1e-3}


def check_results(runs: Sequence[dict[str, Any]], tolerance: float) -> dict[str, dict[str, Any]]:
    """Both sides had the same results in their first round, which begins with equal weights, to a relative tolerance. No check
    if the rival made no first round."""
    first = [run["result"] for run in runs if run["repeat"] < 0]
    if len(first) < 2:
        return {}
    pairs = zip(*first, strict=True)
    worst = max(abs(a - b) / abs(b) for a, b in pairs)
    return {"same_results": {"max_relative_difference": worst, "tolerance": tolerance, "ok": worst < tolerance}}


# ---------------------------------------------------------------------------------------------------- part: sampler


def sampling_floor(model: CausalLM, prompts, lengths: Sequence[int], limits: dict[str, float]) -> float:
    """Seconds below which this machine cannot do a workload: each step reads the weights and the keys and values of the rows
    alive once (a prompt's once for its group) or multiplies as many numbers as it has to, whichever takes longer."""
    config, weight, group = model.config, model.head_weight, len(lengths) // len(prompts)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * weight.dtype.itemsize
    prefill = forward_flops(Shape(config), [(0, len(prompt)) for prompt in prompts], len(prompts))
    seconds = prefill / limits["matmul"]
    for step in range(1, max(lengths)):
        alive = [row for row, length in enumerate(lengths) if length > step]
        tokens = step * len(alive) + sum(len(prompts[p]) for p in {row // group for row in alive})
        read = parameters * weight.dtype.itemsize + tokens * token_bytes
        seconds += max(read / limits["bandwidth"], 2 * parameters * len(alive) / limits["matmul"])
    return seconds


def bench_sampler(args: argparse.Namespace) -> dict[str, Any]:
    """A check in fp32, then every workload on all samplers in alternation."""
    workloads = workloads_of(args, *args.workloads)
    ours, theirs = model_pair(SHAPES["toy" if args.quick else "SmolLM2-135M-Instruct"], torch.float32, args.device)
    prompts = make_prompts(workloads[0], ours.config.vocab_size)
    checks = {"logprobs": check_logprobs(ours, theirs, prompts[0])}
    del ours, theirs
    limits = machine_limits(args)
    ours, theirs = model_pair(SHAPES[args.shape], args.dtype, args.device)
    results = [sampler_workload(ours, theirs, workload, limits, args) for workload in workloads]
    return {"limits": limits, "checks": checks, "workloads": results}


def sampler_workload(ours, theirs, workload: Workload, limits, args: argparse.Namespace) -> dict[str, Any]:
    """Each repeat has its own lengths and seed, the same for all samplers."""
    prompts = make_prompts(workload, ours.config.vocab_size)

    def lengths(repeat: int) -> list[int]:  # the first round is a short one: threads, kernels, lazily made tables
        return make_lengths(workload, SEED + repeat) if repeat >= 0 else [2] * (workload.prompts * workload.group)

    def sample(name: str, repeat: int) -> None:
        model = ours if name == "ours" else theirs
        rows = SAMPLERS[name](model, prompts, lengths(repeat), seed=SEED + repeat + 1)
        if [len(row) for row in rows] != lengths(repeat):
            raise RuntimeError("its responses do not have the lengths that they should have")

    runs, left_out = alternate(workload.name, {name: partial(sample, name) for name in SAMPLERS}, args)
    for run in runs:
        prescribed = lengths(run["repeat"])
        run |= {"tokens": sum(prescribed), "tokens_per_s": sum(prescribed) / run["seconds"]}
        run["floor_share"] = sampling_floor(ours, prompts, prescribed, limits) / run["seconds"]
    return {"workload": asdict(workload)} | compare(workload.name, runs, "tokens_per_s", left_out)


# ---------------------------------------------------------------------------------------------------- part: update


def trained(model: CausalLM, args: argparse.Namespace, **changes: Any) -> tuple[CausalLM, torch.optim.Optimizer, Method]:
    """What a step needs: the model, sharded as in training, optimizer, settings. No recomputation, top_p 1, as the rivals."""
    micro_tokens = 2048 if args.device.type == "cpu" else 4096
    settings = Method(**{"method": "grpo", "top_p": 1.0, "micro_tokens": micro_tokens, **changes})
    shard(model, device=args.device, dtype=args.dtype, shard_ranks=0, offload=False)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.01, fused=True), settings


def make_rollouts(workload: Workload, model: CausalLM) -> list[ProblemSamples]:
    """Sampled groups with rewards that are right half of the time."""
    prompts = make_prompts(workload, model.config.vocab_size)
    rewards = [float(i % 2) for i in range(workload.group)]
    samples = []
    for p, rows in enumerate(sample_groups(model, prompts, make_lengths(workload, SEED), seed=SEED)):
        samples.append(ProblemSamples(p, Example(None, prompts[p], None, None), rows, [], rewards, []))
    return samples


def plain_update(model: Any, optimizer: Any, samples: Sequence[ProblemSamples], dtype: torch.dtype, rows: int) -> list[float]:
    """The same update with transformers and autograd alone: `rows` right-padded sequences a micro-batch, whole logits. Returns
    [1 + the loss, which is near 0; the gradient norm]."""
    items = [(row, a) for sample in samples for row, a in zip(sample.auto, sample.advantages, strict=True)]
    total = 0.0
    for first in range(0, len(items), rows):
        chosen = items[first : first + rows]
        ids = padded([row.prompt_ids + row.response_ids for row, _ in chosen], model.device)
        old = padded([[0.0] * len(row.prompt_ids) + row.logprobs for row, _ in chosen], model.device)
        weight = padded([[0.0] * len(row.prompt_ids) + [1.0] * len(row.response_ids) for row, _ in chosen], model.device)
        weight /= len(items) * weight.sum(1, keepdim=True)  # groups of one size: eq 1's mean of means
        advantage = torch.tensor([[a] for _, a in chosen], device=model.device)
        with torch.autocast(model.device.type, dtype=dtype, enabled=dtype != torch.float32):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # causal: nothing sees the padding after it
        logp = torch.log_softmax(logits.float(), -1).gather(-1, ids[:, 1:, None])[..., 0]
        ratio = torch.exp(logp - old[:, 1:])
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
        loss = -(surrogate * weight[:, 1:]).sum()
        loss.backward()
        total += loss.item()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    optimizer.step()
    optimizer.zero_grad()
    return [1 + total, norm]


def bench_update(args: argparse.Namespace) -> dict[str, Any]:
    """Ours and the plain update on the same rollouts, in alternation. Weights and optimizer states are fp32 on both sides."""
    [workload] = workloads_of(args, "update")
    ours, theirs = model_pair(SHAPES[args.shape], torch.float32, args.device)
    samples = make_rollouts(workload, ours)
    model, own_optimizer, settings = trained(ours.train(), args)
    set_advantages(settings, samples)
    optimizer = torch.optim.AdamW(theirs.train().parameters(), lr=1e-6, weight_decay=0.01, fused=True)
    rows = 8 if args.device.type == "cpu" else 2  # more of them, with their whole logits, do not fit beside the weights of 1.5B

    def our_update(_: int) -> list[float]:
        metrics = update(model, own_optimizer, settings, samples, 1e-6)
        return [1 + metrics["loss"], metrics["grad_norm"]]

    sides = {
        "ours": our_update,
        "transformers": lambda _: plain_update(theirs, optimizer, samples, args.dtype, rows),
    }
    runs, left_out = alternate("update", sides, args)
    tokens = sum(len(row.response_ids) for sample in samples for row in sample.auto)
    prompts = [(0, len(sample.auto[0].prompt_ids)) for sample in samples]  # once for a group, whoever computes it
    spans = prompts + [(len(row.prompt_ids), len(row.response_ids)) for sample in samples for row in sample.auto]
    flops = 3 * forward_flops(Shape(ours.config), spans, tokens)  # the backward pass is twice the forward
    peak_rate = machine_limits(args)["matmul"]
    for run in runs:
        run |= {"tokens_per_s": tokens / run["seconds"], "flop_share": flops / run["seconds"] / peak_rate}
    tolerance = 1e-3 if args.dtype == torch.float32 else 5e-2
    checks = check_results(runs, tolerance)
    return {"workload": asdict(workload), "checks": checks} | compare("update", runs, "tokens_per_s", left_out)


# ---------------------------------------------------------------------------------------------------- part: step


def word_tokenizer(vocabulary: int) -> Any:
    """A tokenizer for TRL, which takes text: the word "t17" is token 17."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocabulary)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t0", pad_token="t0", unk_token="t0")


def bench_step(args: argparse.Namespace) -> dict[str, Any]:
    """A whole GRPO step against TRL's GRPOTrainer: the same model, prompts, group, optimizer, and full length of all responses,
    because TRL cannot prescribe others. The reward is right half of the time, so that hardly a group is without a gradient."""
    [workload] = workloads_of(args, "step")
    ours, theirs = model_pair(SHAPES[args.shape], torch.float32, args.device)
    prompts, tokenizer = make_prompts(workload, ours.config.vocab_size), word_tokenizer(ours.config.vocab_size)
    changes = dict(problems_per_step=workload.prompts, group_auto=workload.group, max_new_tokens=workload.longest)
    ours.config = replace(ours.config, eos_ids=(ours.config.vocab_size,))  # no response ends before the limit, nor at TRL
    model, optimizer, settings = trained(ours.train(), args, **changes)
    batch = [(p, Example(None, ids, None, None)) for p, ids in enumerate(prompts)]

    def our_step(repeat: int) -> None:
        sgpo_step(model, tokenizer, optimizer, settings, batch, even_is_right, step=repeat + 2, learning_rate=1e-6)

    runs, left_out = alternate("step", {"ours": our_step}, args)
    try:
        runs += trl_steps(theirs.train(), tokenizer, prompts, workload, args)
    except Exception as error:  # it is not installed, or whatever it raises: our own figures are worth as much
        left_out["trl"] = repr(error)[:200]
    for run in runs:
        run["tokens_per_s"] = workload.prompts * workload.group * workload.longest / run["seconds"]
    return {"workload": asdict(workload), "checks": {}} | compare("step", runs, "tokens_per_s", left_out)


def even_is_right(response: str, _: Any) -> float:
    """The reward: is the last token even?"""
    return float(int(response.split()[-1][1:]) % 2 == 0)


def trl_steps(model: Any, tokenizer: Any, prompts, workload: Workload, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A run for each of TRL's steps (one generation and one optimizer update; the first warms up)."""
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    texts = [" ".join(f"t{token}" for token in prompt) for prompt in prompts]
    rows, micro = workload.prompts * workload.group, 8 if not args.quick else 2
    runs: list[dict[str, Any]] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = start(args.device)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds, peak = stop(args.device, self.started)
            runs.append({"side": "trl", "repeat": len(runs) - 1, "seconds": seconds, "peak_mb": peak / MB})

    with tempfile.TemporaryDirectory() as folder:
        config = trl.GRPOConfig(
            output_dir=folder, max_steps=args.repeats + 1, per_device_train_batch_size=micro,
            gradient_accumulation_steps=rows // micro, num_generations=workload.group, temperature=1.0,
            max_completion_length=workload.longest, beta=0.0, learning_rate=1e-6, weight_decay=0.01, max_grad_norm=1.0,
            optim="adamw_torch_fused", bf16=args.dtype == torch.bfloat16, use_cpu=args.device.type == "cpu", report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, gradient_checkpointing=False, seed=SEED,
            generation_kwargs={"eos_token_id": model.config.vocab_size, "suppress_tokens": None}, shuffle_dataset=False,
        )  # fmt: skip
        trainer = trl.GRPOTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": texts * (args.repeats + 1)}),
            processing_class=tokenizer,
            reward_funcs=lambda completions, **_: [even_is_right(text, None) for text in completions],
            callbacks=[Clock()],
        )
        trainer.train()
    return runs


# ---------------------------------------------------------------------------------------------------- part: head


def head_side(chunk: int | None, hidden: Tensor, weight: Tensor, targets: Tensor) -> list[float]:
    """Forward and backward of the mean cross-entropy, `chunk` tokens at a time: [the loss, the norms of the two gradients].

    None: the whole (M, V) logits and F.cross_entropy, PyTorch's own fused loss, the fastest and leanest way without chunks.
    """
    if chunk is None:  # the logits get no name, so that autograd alone decides how long they live
        loss = F.cross_entropy(F.linear(hidden, weight).float(), targets)
    else:
        share = torch.full(targets.shape, 1 / len(targets), device=targets.device)
        loss, _ = chunked_head(hidden, weight, partial(sft_terms, temperature=1.0), [targets, share], chunk_tokens=chunk)
    loss.backward()
    norms = [tensor.grad.float().norm().item() for tensor in (hidden, weight)]
    hidden.grad = weight.grad = None
    return [loss.item(), *norms]


def bench_head(args: argparse.Namespace) -> dict[str, Any]:
    """The loss at the head, forward and backward, in chunks and with the whole logits."""
    shape = QUICK_HEAD if args.quick else HEAD
    generator = torch.Generator("cpu").manual_seed(SEED)
    hidden = torch.randn(shape["tokens"], shape["width"], generator=generator)
    weight = 0.02 * torch.randn(shape["vocabulary"], shape["width"], generator=generator)
    targets = torch.randint(shape["vocabulary"], (shape["tokens"],), generator=generator).to(args.device)
    inputs = [tensor.to(args.device, args.dtype).requires_grad_() for tensor in (hidden, weight)]
    sides = {
        "ours": lambda _: head_side(shape["chunk"], *inputs, targets),
        "autograd": lambda _: head_side(None, *inputs, targets),
    }
    runs, left_out = alternate("head", sides, args)
    tolerance = 1e-4 if args.dtype == torch.float32 else 2e-2
    return {"shape": shape, "checks": check_results(runs, tolerance)} | compare("head", runs, "seconds", left_out)


PARTS = {"sampler": bench_sampler, "update": bench_update, "step": bench_step, "head": bench_head}


# ---------------------------------------------------------------------------------------------------- report


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is needed to judge or repeat the figures."""
    packages, cpuinfo = ("torch", "transformers", "trl", "accelerate"), Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.*)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.M)
    cpu = named[1] if named else platform.machine()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "settings": {name: str(value) for name, value in vars(args).items()} | {"seed": SEED},
        "commit": code_commit(),  # with a "+" if files were changed
        "device": torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg(),
        "versions": {name: importlib.metadata.version(name) for name in packages if importlib.util.find_spec(name)},
    }


def write_report(args: argparse.Namespace, prepare: Callable[[argparse.Namespace], dict[str, Callable[[], Any]]]) -> int:
    """Run the parts that `prepare` makes and write args.out after each: what it returned, or why it failed. 1 if one failed, or
    one of its "checks"."""
    failed = []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with ranks_of(args.device, timeout_minutes=10) as args.device:
        report = environment(args)
        for part, work in prepare(args).items():
            try:
                report[part] = work()
            except Exception as error:  # the other parts are worth as much
                traceback.print_exc()
                report[part] = {"failed": repr(error)[:200], "checks": {"ran": {"ok": False}}}
            for title, check in report[part].get("checks", {}).items():
                print(f"{'ok    ' if check['ok'] else 'FAILED'} {part} {title}: {json.dumps(check)}")
                failed += [title] * (not check["ok"])
            report["load_after"] = os.getloadavg()
            args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return int(bool(failed))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--quick", action="store_true", help="toy shapes: checks that everything runs, times nothing")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device, help="default: CUDA if there is one")
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=list(PARTS), help="default: all")
    parser.add_argument("--workloads", nargs="+", choices=SAMPLER_WORKLOADS, default=SAMPLER_WORKLOADS, help="default: all")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="SmolLM2-135M-Instruct", help="default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, bfloat16 on CUDA")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each side, in alternation (default: 3)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    args = parser.parse_args(arguments)
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if args.device == "cuda" else "float32"))
    args.shape = "toy" if args.quick else args.shape
    args.scale = "quick" if args.quick else args.device
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts and write the JSON. Returns 1 if a check or a part failed."""
    args = parse_arguments(arguments)
    torch.set_num_threads(args.threads)
    return write_report(args, lambda args: {part: partial(PARTS[part], args) for part in args.only})


if __name__ == "__main__":
    leave(main())
