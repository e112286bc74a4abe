"""One step of a real size on one GPU, with random weights: how fast, how much memory against the plan, where the time goes.

python tools/gpu_step.py --out step.json                        Qwen2.5-1.5B's shape on CUDA, about a minute on an H100
python tools/gpu_step.py --out step.json --lora                 Qwen2.5-7B's with adapters of rank 16, as on a card of 80 GB
python tools/gpu_step.py --out step.json --quick --device cpu   a toy: does it run

sampling   256 rows: tokens/s, the share of the machine's floor (bench.py), kernels a layer of a decode step and time by kernel,
           the host's time for a step, and for capturing its graph
step       the two halves of sgpo_step, with their peaks of memory beside those that plan.py predicts; the update's share of the
           matrix peak and its time by kernel, with and without recomputation in passes of 16,384 tokens, and with the defaults;
           the sampler's log-probabilities against the trainer's
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kv_cache import Decoder, pages_for
from lora import add_adapters
from model import CausalLM, ModelConfig, inverse_frequencies
from parallel import apply_gradients, leave, shard, trained, whole_model
from rollout import micro_batches, pack, shared_tokens
from sgpo import Example, ProblemSamples, choose, policy_items, sample_and_reward, set_advantages, target_items, update
from tools import bench, plan
from train import Config

# ---------------------------------------------------------------------------------------------------- what plan.py predicts


def job_of(model: CausalLM, settings: Config, ranks: int = 1) -> plan.Job:
    """This run, for plan.py."""
    settings = replace(settings, recompute=model.model.recompute)
    return plan.Job(plan.Shape(model.config), settings, ranks, cuda=model.device.type == "cuda")


def micro_batch(contexts: Sequence[list[int]], responses: Sequence[list[int]], distills: bool) -> plan.MicroBatch:
    """The numbers that plan.py needs of one packed pass, from what `pack` makes."""
    packed = pack(contexts, responses, device=torch.device("cpu"))
    prompts = [(own, p) for own, p in zip(packed.lengths, packed.prefixes, strict=True) if p is not None]
    continued = sum(packed.lengths[p] + own for own, p in prompts)
    return plan.MicroBatch(packed.input_ids.numel(), continued, distills)


def passes_of(samples: Sequence[ProblemSamples], settings: Config) -> Iterator[plan.MicroBatch]:
    """Every forward and backward pass that sgpo.update makes of these samples."""
    rows = [item.trajectory for item in policy_items(samples, settings)]
    contexts = [row.prompt_ids for row in rows]
    responses = [row.response_ids for row in rows]
    costs = [len(c) + len(r) for c, r in zip(contexts, responses, strict=True)]
    for part in micro_batches(costs, settings.micro_tokens, shared_tokens(contexts)):
        yield micro_batch([contexts[i] for i in part], [responses[i] for i in part], False)
    targets = target_items(samples, settings)
    costs = [len(item.auto_ids) + len(item.guided_ids) + 2 * len(item.response_ids) for item in targets]
    for part in micro_batches(costs, settings.micro_tokens):
        yield micro_batch([targets[i].auto_ids for i in part], [targets[i].response_ids for i in part], True)


def predicted_sampling(job: plan.Job, samples: Sequence[ProblemSamples], pages: int, scored: int) -> tuple[str, float]:
    """(phase, bytes) of the peak of sampling both groups into a cache of this many pages, then scoring the guided one in
    passes of `scored` tokens."""
    settings = job.settings
    prompt_tokens = sum(len(s.example.auto_ids) + len(s.example.guided_ids) for s in samples)
    rows = min(settings.max_rows, len(samples) * (settings.group_auto + settings.group_guided))
    prefill = min(prompt_tokens, plan.PREFILL_TOKENS)
    return plan.peak(plan.sampling_phases(job, pages=pages, rows=rows, prefill_tokens=prefill, scored_tokens=scored))


def predicted_update(job: plan.Job, samples: Sequence[ProblemSamples]) -> tuple[str, float]:
    """(phase, bytes) of the peak of one update on these samples."""
    peaks = [plan.peak(plan.update_phases(job, batch)) for batch in passes_of(samples, job.settings)]
    return max(peaks, key=lambda item: item[1])


# ---------------------------------------------------------------------------------------------------- measurements


def time_by_kernel(work: Callable[[], Any], device: torch.device) -> tuple[list[str], int]:
    """The lines of PyTorch's own table of one call: the kernels (on a CPU the operations) that took longest, and their sum; and
    how many kernels (operations) ran."""
    with torch.profiler.profile() as profile:
        bench.measured(work, device)
    events, longest_first = profile.key_averages(), f"self_{device.type}_time_total"
    table = events.table(sort_by=longest_first, row_limit=24, max_name_column_width=90)
    return table.splitlines(), sum(event.count for event in events if event.device_type.name.lower() == device.type)


def host_times(work: Callable[[], Any]) -> dict[str, float]:
    """The host's time for a decode step of one call: the median, and the longest, in which it captures a graph."""
    seconds, decode = [], Decoder.__call__

    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        result = decode(*arguments)
        seconds.append(time.perf_counter() - start)
        return result

    with patch.object(Decoder, "__call__", timed):
        work()
    return {"host_ms_a_step": 1000 * statistics.median(seconds), "longest_step_s": max(seconds)}


def sampling_part(model: CausalLM, args: argparse.Namespace) -> dict[str, Any]:
    """32 prompts of 300 to 600 tokens, 8 responses of 128 tokens each, over the whole vocabulary and at training's top_p."""
    workload = bench.Workload("256 rows", 32, 8, 300, 600, median=128, longest=128)
    if args.quick:
        [workload] = bench.workloads_of(args, "uniform")
    prompts = bench.make_prompts(workload, model.config.vocab_size)
    lengths = [workload.longest] * workload.prompts * workload.group
    short = [32] * len(lengths)  # for the profiler, which is slow
    limits = bench.machine_limits(args)
    result: dict[str, Any] = {"limits": limits}
    with whole_model(model) as policy:
        floor = bench.sampling_floor(policy, prompts, lengths, limits)
        for top_p in (1.0, 0.95):
            work = partial(bench.sample_groups, policy, prompts, seed=0, top_p=top_p)
            rate = bench.per_second(partial(work, lengths), sum(lengths), args.device, args.repeats)
            share = floor * rate["median"] / sum(lengths)
            table, count = time_by_kernel(partial(work, short), args.device)
            row = {"kernels_a_layer": count / max(short) / len(policy.model.layers), **host_times(partial(work, short))}
            print(f"  top_p {top_p}: {rate['median']:.0f} tokens/s, {100 * share:.0f} % of the floor", row, flush=True)
            result[f"top_p {top_p}"] = {"tokens_per_s": rate, "floor_share": share, **row, "kernels_of_32_tokens": table}
    return result


def step_part(model: CausalLM, optimizer: Any, settings: Config, args: argparse.Namespace) -> dict[str, Any]:
    """The two halves of sgpo_step, so that each has its own peak and time."""
    device = model.device
    V = model.config.vocab_size
    tokenizer = bench.word_tokenizer(V)
    size = (5, 9) if args.quick else (300, 600)
    prompts = bench.make_prompts(bench.Workload("step", settings.problems_per_step, 12, *size, 512, 512), V)
    examples = [Example(None, ids, ids + ids, None) for ids in prompts]  # with a strategy it is twice as long
    apply_gradients(model, optimizer, 0.0, 0.0, 1.0)  # a step of nothing, which makes AdamW's moments
    job = job_of(model, settings)
    resident = sum(plan.resident(job).values())

    def sampling() -> list[ProblemSamples]:
        with whole_model(model) as policy:
            samples = sample_and_reward(policy, tokenizer, settings, list(enumerate(examples)), bench.even_is_right, step=1)
            set_advantages(settings, samples)
            choose(settings, policy, samples, step=1)
        return samples

    samples, seconds, peak = bench.measured(sampling, device)
    predicted = predicted_sampling(job, samples, settings.cache_tokens // plan.PAGE, settings.micro_tokens)
    result: dict[str, Any] = {"sampling": memory_row("sampling", predicted, peak + resident, seconds)}
    variants = {"update, recomputed": replace(settings, recompute=True), "update": replace(settings, recompute=False)}
    if device.type == "cuda":
        memory = 80.0 if args.lora else torch.cuda.get_device_properties(device).total_memory / 1e9
        automatic = replace(job.settings, recompute=True, micro_tokens=0, chunk_tokens=0)
        card = replace(job, assumed=replace(job.assumed, gpu_memory=memory), settings=automatic)
        variants["update, defaults"] = plan.settle(card).settings
    if args.lora:  # the last one alone
        variants = dict([variants.popitem()])
    flops, limit = update_flops(job, samples), bench.machine_limits(args)["matmul"]
    for name, changed in variants.items():
        model.model.recompute = changed.recompute
        predicted = predicted_update(replace(job, settings=changed), samples)
        work = partial(update, model, optimizer, changed)
        try:
            work(samples[:2], 1e-6)  # compiles
            metrics, seconds, peak = bench.measured(partial(work, samples, 1e-6), device)
        except torch.OutOfMemoryError as error:  # without recomputation a card of 80 GB may be too small
            result[name] = {"planned_gb": predicted[1] / 1e9, "failed": repr(error)[:200]}
            continue
        sizes = {"passes": plan.passes_text(changed), "share_of_peak": flops / seconds / limit}
        result[name] = memory_row(name, predicted, peak + resident, seconds, **sizes)
        if "logprob_error" not in result:  # of the first update alone: then the policy has moved
            result |= {error: metrics[error] for error in ("logprob_error_mean", "logprob_error_p999", "logprob_error")}
        result[name]["kernels_of_4_problems"] = time_by_kernel(partial(work, samples[:4], 1e-6), device)[0]
    model.zero_grad()
    return result


def update_flops(job: plan.Job, samples: Sequence[ProblemSamples]) -> float:
    """Operations that an update needs: three times a forward pass for what has a gradient, recomputation not counted."""
    forward = partial(plan.forward_flops, job.shape)
    total = 0.0
    for sample in samples:
        prompt, lengths = len(sample.example.auto_ids), [len(row.response_ids) for row in sample.auto]
        total += 3 * forward([(0, prompt), *((prompt, length) for length in lengths)], sum(lengths))
        for target in sample.targets:
            length = len(sample.guided[target].response_ids)
            guided = len(sample.example.guided_ids)
            total += 3 * forward([(0, prompt + length)], length) + forward([(0, guided + length)], length)
    return total


def memory_row(name: str, predicted: tuple[str, float], measured: float, seconds: float, **more: Any) -> dict[str, Any]:
    phase, planned = predicted
    row = {"phase": phase, "planned_gb": planned / 1e9, "measured_gb": measured / 1e9, "seconds": seconds, **more}
    print(f"  {name:19} {json.dumps(row)}", flush=True)
    return row


def random_model(config: ModelConfig, settings: Config, device: torch.device) -> tuple[CausalLM, torch.optim.Optimizer]:
    """A sharded model with its optimizer, made on the device: 7B would take the host minutes and 30 GB."""
    with torch.device("meta"):
        model = CausalLM(config)
    if settings.lora_rank:
        add_adapters(model, rank=settings.lora_rank, alpha=settings.lora_alpha, dtype=torch.bfloat16)
    shard(model, device=device, dtype=torch.bfloat16, shard_ranks=0, offload=False)
    model.to_empty(device=device)
    model.inv_freq = inverse_frequencies(config).to(device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and not name.endswith("lora_B"):
                parameter.to_local().normal_(0.0, 0.02, generator=generator)
            else:
                parameter.to_local().fill_(1.0 if "norm" in name else 0.0)
    return model, torch.optim.AdamW(trained(model).values(), lr=1e-6, weight_decay=0.01, fused=True)


def parts(args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    raw = plan.SHAPES[args.shape]
    config = replace(ModelConfig.from_dict(raw), eos_ids=(raw["vocab_size"],))  # no response ends before its limit
    problems = 8 if args.lora else 16
    pages = problems * (12 * pages_for(512) + 3 * pages_for(1200))  # of all rows, none of which waits
    changes = dict(problems_per_step=problems, max_new_tokens=512, cache_tokens=pages * plan.PAGE, micro_tokens=16384)
    if args.quick:
        changes = dict(problems_per_step=2, max_new_tokens=8, cache_tokens=8192, micro_tokens=200)
    settings = Config(lora_rank=16 if args.lora else 0, dtype="bfloat16", chunk_tokens=32 if args.quick else 256, **changes)
    model, optimizer = random_model(config, settings, args.device)
    step = {"step": partial(step_part, model, optimizer, settings, args)}
    return step if args.lora else step | {"sampling": partial(sampling_part, model, args)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write, after each part")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="default: cuda")
    parser.add_argument("--lora", action="store_true", help="7B with adapters of rank 16, for a card of 80 GB: the step alone")
    parser.add_argument("--quick", action="store_true", help="a toy shape: does it run; times nothing")
    args = parser.parse_args(arguments)
    args.shape = "toy" if args.quick else "Qwen2.5-7B-Instruct" if args.lora else "Qwen2.5-1.5B-Instruct"
    args.scale = "quick" if args.quick else args.device
    args.dtype = torch.bfloat16
    args.repeats = 3
    return bench.write_report(args, parts)


if __name__ == "__main__":
    leave(main())
