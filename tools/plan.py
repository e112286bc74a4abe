"""What a run will need, before anyone rents the node: the memory of each GPU, what fits, the time of a step, the whole recipe.

    python train.py --model Qwen2.5-7B-Instruct --plan --gpus 8 --gpu_memory 80      with any other flag of train.py
    python train.py --model config.json --plan --gpus 32 --no-recompute              a config.json is enough
    python train.py --plan --help                                                    the flags that only a plan has

No weights are read and no GPU is needed. Memory is counted tensor by tensor in the phases of a step where it can be largest
(`sampling_phases`, `update_phases`), as model.py, kv_cache.py, rollout.py, loss.py, parallel.py and FSDP2 of PyTorch 2.13
allocate it. On a CPU with one rank the same functions are within 2 % of the measured peak (results/plan.md). So is the update
of one rank of eight, without the exchanges. On a GPU nothing here was measured: the memory is reasoning, and the seconds are
bytes and operations divided by stated speeds.

What it is not: a simulator. Every assumption is a flag with a default and is printed with the result. Evaluation, grading and
checkpoints are not counted.

Letters: D width, W width of the MLP, V vocabulary, H query heads, E head width; Q = H E, KV = the key/value heads times E;
T tokens of a micro-batch, M response tokens in it, S parameters of a block, R parameters outside the blocks (embedding, final
norm, head). GB are 10^9 bytes.
"""

import argparse
import dataclasses
import heapq
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the files of the method, from the folder above

from kv_cache import PAGE, padded_batch_size, pages_for
from methods import METHODS, knob
from model import CausalLM, ModelConfig, resolve_model
from rollout import PREFILL_TOKENS

GB = 1e9


# ---------------------------------------------------------------------------------------------------- which model

# the fields of config.json that give the shape, of the models of the paper and two small ones
SHAPES = json.loads(Path(__file__).with_name("shapes.json").read_text(encoding="utf-8"))


def model_config(name: str) -> tuple[ModelConfig, str]:
    """(the configuration, where it is from) of a config.json, or of anything that train.py's --model takes.

    Of a model on the hub only config.json is fetched. If that fails, SHAPES has the configuration of some models. Raises
    ValueError that names the file, or says why there is none.
    """
    path = Path(name).expanduser()
    if path.is_file():
        try:
            return ModelConfig.from_dict(json.loads(path.read_text(encoding="utf-8"))), f"{path}"
        except (ValueError, AttributeError) as error:  # AttributeError: valid JSON, but no object
            raise ValueError(f"{path}: not the config.json of a supported model ({error})") from error
    try:
        folder = resolve_model(name, wanted=["config.json"])
    except ValueError as error:
        reason, bare = str(error).splitlines()[0][:200], name.split("/")[-1].lower()
        known = {key.lower(): shape for key, shape in SHAPES.items()}.get(bare)
        if known is None or name.startswith((".", "/", "~")):
            raise ValueError(f"{reason}. A config.json is enough: --model config.json") from error
        return ModelConfig.from_dict(known), f"tools/shapes.json ({reason})"
    return ModelConfig.from_folder(folder), f"{folder / 'config.json'}"


@dataclass(frozen=True)
class Shape:
    """A model in numbers, counted on the module itself, which is built without memory (device meta)."""

    config: ModelConfig
    parameters: int
    block: int  # S
    root: int  # R
    head: int  # V D
    matrices: int  # elements of the matrices of all blocks
    rows: tuple[tuple[int, int], ...]  # of every parameter: size of its first dimension, numbers in one row of it

    def shard(self, ranks: int) -> int:
        """Numbers that each rank holds: FSDP2 cuts the first dimension of every parameter, and pads it."""
        return sum(-(-rows // ranks) * width for rows, width in self.rows)


def shape_of(config: ModelConfig) -> Shape:
    with torch.device("meta"):
        model = CausalLM(config)
    parameters = list(model.parameters())
    total, block = (sum(p.numel() for p in module.parameters()) for module in (model, model.model.layers[0]))
    return Shape(
        config=config,
        parameters=total,
        block=block,
        root=total - block * config.num_hidden_layers,
        head=model.head_weight.numel(),
        matrices=sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2),
        rows=tuple((p.shape[0], p[0].numel()) for p in parameters),
    )


# ---------------------------------------------------------------------------------------------------- what is planned


@dataclass(frozen=True)
class Workload:
    """What nobody knows before a run: how long the texts are, in tokens, and how many problems there are."""

    prompt_tokens: int = knob(200, "length of a problem's prompt")
    guided_prompt_tokens: int = knob(500, "length of a prompt with its strategy")
    mean_response: float = knob(4096.0, "mean length of a response; lengths spread with the largest entropy")
    solution_tokens: int = knob(4096, "length of a strong model's solution, for the SFT warm-up")
    problems: int = knob(8500, "problems in the training set [§4.1]")


@dataclass(frozen=True)
class Hardware:
    """Speeds, as the vendor states them for one H100 SXM 80 GB, and the share of them that a run is assumed to reach."""

    memory_bandwidth: float = knob(3.35e12, "bytes/s of a GPU's memory")
    decode_share: float = knob(0.6, "share of this, and of --flops, that decoding reaches")
    flops: float = knob(989e12, "dense bf16 operations/s of a GPU")
    prefill_share: float = knob(0.5, "share of --flops that passes without gradient reach")
    update_share: float = knob(0.4, "share of --flops that forward and backward passes reach")
    decode_overhead: float = knob(1e-3, "seconds that each decode step takes besides (drawing, launches, the host)")
    reserve_gb: float = knob(4.0, "GB of a GPU for the CUDA context, NCCL, workspaces, and fragments in its allocator")


# the settings of train.py that memory or time depend on
SETTINGS = (
    "method group_auto group_guided temperature top_p max_new_tokens max_rows cache_tokens problems_per_step "
    "epochs steps micro_tokens chunk_tokens sft_fraction sft_epochs sft_batch sft_validation sft_max_tokens recompute dtype "
    "shard_ranks offload"
).split()


@dataclass(frozen=True)
class Job:
    """The run that is planned."""

    shape: Shape
    settings: Any  # train.Config; train.py imports this file, so this file does not import train.py
    gpus: int
    gpu_memory: float = 80.0  # GB of one
    workload: Workload = Workload()
    hardware: Hardware = Hardware()
    cuda: bool = True  # decode steps are CUDA graphs, each with its own logits

    @property
    def budget(self) -> float:
        """Bytes of a GPU that tensors may take."""
        return (self.gpu_memory - self.hardware.reserve_gb) * GB

    @property
    def itemsize(self) -> int:
        """Bytes of a number in activations and gathered weights."""
        return 4 if self.settings.dtype == "float32" else 2

    @property
    def shard_ranks(self) -> int:
        """Ranks that share one copy of the weights. With 1, FSDP copies instead of gathering."""
        return self.settings.shard_ranks or self.gpus

    @property
    def kernel(self) -> bool:
        """One variable-length call attends over a packed row. Without it there is one call a sequence, with masks."""
        return self.cuda and self.itemsize == 2

    def changed(self, **settings: Any) -> "Job":
        return replace(self, settings=replace(self.settings, **settings))


def check(job: Job) -> None:
    """ValueError naming the first value that cannot be planned with. train.py has checked its own settings."""
    settings, hardware = job.settings, job.hardware
    values = {"gpus": job.gpus, "gpu_memory": job.gpu_memory} | vars(job.workload) | vars(hardware)
    for name, value in values.items():
        if not value > 0 and name != "reserve_gb":
            raise ValueError(f"--{name} {value}: must be positive")
    if METHODS[settings.method].advantages is None:
        raise ValueError(f"--method {settings.method}: only methods that sample are planned")
    if not 0 <= hardware.reserve_gb < job.gpu_memory:
        raise ValueError(f"--reserve_gb {hardware.reserve_gb}: must be at least 0 and below the {job.gpu_memory} GB of a GPU")
    if settings.sft_fraction == 1:
        raise ValueError("--sft_fraction 1: it leaves no problems for RL")
    prompt = max(job.workload.prompt_tokens, job.workload.guided_prompt_tokens)
    context = job.shape.config.max_position_embeddings
    if prompt >= context:
        raise ValueError(f"a prompt of {prompt} tokens leaves no room in a context of {context}")
    if job.gpus % job.shard_ranks:
        raise ValueError(f"--shard_ranks {job.shard_ranks} does not divide the {job.gpus} GPUs")


def groups_of(job: Job) -> list[tuple[int, int]]:
    """(tokens of the prompt, responses) of every prompt that the busiest rank samples from in a step."""
    settings, variant = job.settings, METHODS[job.settings.method]
    problems = math.ceil(settings.problems_per_step / job.gpus)
    groups = [(job.workload.prompt_tokens, settings.group_auto - variant.solution_in_group)] * problems
    if variant.guided:
        groups += [(job.workload.guided_prompt_tokens, settings.group_guided)] * problems
    return groups


def longest_response(job: Job, prompt: int) -> int:
    return min(job.settings.max_new_tokens, job.shape.config.max_position_embeddings - prompt)


# ---------------------------------------------------------------------------------------------------- memory

Phase = dict[str, float]  # what is in memory at one point of a step: what it is -> bytes


@dataclass(frozen=True)
class MicroBatch:
    """One packed forward and backward pass of the update."""

    tokens: int  # T
    targets: int  # M
    continued: int  # keys that the sequences which continue a prompt see, their own included
    mask: int  # numbers in the masks of those (only without the kernel)
    distillation: bool  # the KL with guided hidden states, else a policy loss
    first: bool  # of the update: there are no gradients yet


def peak(phases: dict[str, Phase]) -> tuple[str, float]:
    """(name, bytes) of the largest phase."""
    name = max(phases, key=lambda name: sum(phases[name].values()))
    return name, sum(phases[name].values())


def widths(config: ModelConfig) -> tuple[int, int, int, int]:
    """(D, W, Q, KV)"""
    E = config.head_dim
    return config.hidden_size, config.intermediate_size, config.num_attention_heads * E, config.num_key_value_heads * E


def saved_per_token(config: ModelConfig, e: int, kernel: bool) -> float:
    """Bytes a token that autograd keeps of one block, at e bytes a number."""
    D, W, Q, KV = widths(config)
    # a norm keeps x in fp32, x / rms in the compute dtype (in fp32: before the product with its weight), and its result,
    # which is the input of the projections
    norm = 12 * D if e == 4 else 8 * D
    # rotated queries and keys, values, the attention's result and its log-denominators; with one call a sequence the results
    # are put together and transposed in a second copy for the output projection
    attention = e * (2 * Q + 2 * KV + (0 if kernel else Q)) + 4 * config.num_attention_heads
    if config.qk_norm:
        attention += (8 if e == 4 else 6) * (Q + KV)
    return 2 * norm + 8 + attention + e * 4 * W  # gate, silu(gate), up, and their product


def working_per_token(config: ModelConfig, e: int) -> float:
    """Bytes a token that one block needs at once in a forward pass without gradient."""
    D, W, Q, KV = widths(config)
    # the block's input, the residual stream and the norm's result, with either silu(gate), up and their product, or queries,
    # keys, values and the attention's results
    return e * max(3 * D + 3 * W, 2 * D + 4 * Q + 2 * KV)


def resident(job: Job) -> Phase:
    """What a rank holds all the time."""
    if job.settings.offload:
        return {}
    shard = job.shape.shard(job.shard_ranks)
    return {"weights, fp32 shard": 4.0 * shard, "AdamW's two moments, fp32 shard": 8.0 * shard}


def update_phase(job: Job, batch: MicroBatch, blocks: int, reduced: int) -> Phase:
    """What is always in memory in an update, with the activations of this many blocks kept and the gradients of this many
    parameters reduced."""
    shape, e, T = job.shape, job.itemsize, batch.tokens
    gradients = 0 if job.settings.offload else 4 * shape.shard(job.shard_ranks)
    if batch.first:
        gradients *= reduced / shape.parameters
    # HSDP: FSDP keeps what it summed over the copies to the end of the pass; in a first pass that is the gradient itself
    again = 4 * reduced / job.shard_ranks if job.shard_ranks < job.gpus and not batch.first else 0
    kept = T * shape.config.hidden_size * e if job.settings.recompute else saved_bytes(job, batch)
    return resident(job) | {
        "gradients, fp32 shard": gradients,
        "gradients summed over the copies": again,
        "embedding and head, gathered": shape.root * e,
        "gradient of the head": shape.head * e,
        "positions and attention masks": T * (2 * e * shape.config.head_dim + 8) + (0 if job.kernel else e * batch.mask),
        "activations kept for the backward pass": blocks * kept,
    }


def saved_bytes(job: Job, batch: MicroBatch) -> float:
    """What autograd keeps of one block."""
    KV, e = widths(job.shape.config)[3], job.itemsize
    saved = batch.tokens * saved_per_token(job.shape.config, e, job.kernel) + 2 * KV * e * batch.continued
    # the kernel reads gathered copies of all keys and values in a row with prefixes; the projections' results are not kept
    return saved - (2 * KV * e * batch.tokens if job.kernel and batch.continued else 0)


def update_phases(job: Job, batch: MicroBatch) -> dict[str, Phase]:
    """What is in memory in the phases of a forward and backward pass that can be the largest."""
    shape, e, T, M, several = job.shape, job.itemsize, batch.tokens, batch.targets, job.shard_ranks > 1
    config, L, S, R = shape.config, shape.config.num_hidden_layers, shape.block, shape.root
    D, W, _, _ = widths(config)
    phase = partial(update_phase, job, batch)
    # fp32 tensors of (chunk_tokens, V). Policy: logits, log-probabilities, probabilities and their product for the entropy.
    # KL: logits, both sides' log-probabilities, the guided side's probabilities, the difference, the product, guided logits
    chunks = (6 + e / 4 if batch.distillation else 4) * 4.0 * min(job.settings.chunk_tokens, M) * config.vocab_size
    phases = {
        "loss at the head": phase(L, 0)
        | {
            "chunks of logits": chunks,
            "hidden states and their gradient": (T + 2 * M) * D * e,
            "hidden states of the guided pass": M * D * e if batch.distillation else 0,
            "blocks, gathered": S * e if several else 0,
            "activations of the final norm": T * (8 * D if e == 4 else 6 * D),
        }
    }
    for i in sorted({L - 1, max(L - 2, 0), min(1, L - 1), 0}):  # between these all terms grow in proportion
        following = S * e if several and i > 0 else 0  # the next block is gathered ahead, in a flat buffer
        done = S * (L - 1 - i)  # parameters of the blocks whose backward pass is over
        pending = 4 * S if done else 0  # the fp32 input of a reduction is kept until the next block's
        rest = i + job.settings.recompute  # blocks of which activations are kept
        block = f"block {i + 1} of {L}"
        phases[f"backward pass of {block}, in its MLP"] = phase(i + 1, done) | {
            "blocks, gathered": S * e + following,
            "activations of the block": T * (2 * W + D) * e + (saved_bytes(job, batch) if job.settings.recompute else 0),
            "gradients of the block": W * D * e + pending,
        }
        phases[f"backward pass of {block}, at its end"] = phase(rest, done) | {
            "blocks, gathered": S * e + following,
            "activations of the block": 2 * T * D * e + 20 * T * D,  # the norm works in fp32
            "gradients of the block": S * e + pending,
        }
        phases[f"reduction of the gradients of {block}"] = phase(rest, done) | {
            "blocks, gathered": following,
            "gradient of the hidden states": T * D * e,
            "gradients of the block": reduction(job, S, W * D),
        }
    phases["gradient of the embedding"] = phase(0, S * L) | {
        "gradient of the hidden states": T * D * e,
        "gradients of the block": 4 * S,
        "gradient of the embedding": (R if config.tie_word_embeddings else R - shape.head) * e,
    }
    root = {name: phase(0, S * L)[name] for name in ("gradients, fp32 shard", "gradients summed over the copies")}
    root |= {"gradients of embedding and head": reduction(job, R, shape.head)}
    return phases | {"reduction of the root's gradients": resident(job) | root}


def reduction(job: Job, numbers: int, largest_tensor: int) -> int | float:
    """Bytes that FSDP needs to sum the gradients of this many parameters over the ranks, in fp32."""
    if job.shard_ranks == 1:  # nothing is sent, but there are a copy, the copy divided by 1, and the result
        return 12 * numbers
    # the gradients, and the buffer that they are copied to; on a CPU a tensor's pieces are joined before they are cast
    copying = (job.itemsize + 4) * numbers + (0 if job.cuda or job.itemsize == 4 else job.itemsize * largest_tensor)
    return max(copying, 4 * numbers + 4 * numbers / job.shard_ranks)


def sampling_phases(job: Job, *, pages: int, rows: int, prefill_tokens: int, scored_tokens: int) -> dict[str, Phase]:
    """What is in memory in the phases of sampling that can be the largest.

    pages of the KV cache; rows decoded at once; tokens of the prompts that are read together; tokens of the pass that scores
    the guided trajectories afterwards, when the cache is free again.
    """
    shape, e = job.shape, job.itemsize
    config, D, V = shape.config, shape.config.hidden_size, shape.config.vocab_size
    base = resident(job) | {"whole weights in the compute dtype": shape.parameters * e}
    cache = base | {"KV cache": pages * page_bytes(config, e)}
    # for each logit: fp32 (a copy if the logits are bf16, divided by a temperature, or cut to a nucleus), its exponential, and
    # the same in fp64, from which the sums over blocks of the vocabulary are made
    copied = e != 4 or job.settings.temperature != 1 or job.settings.top_p < 1
    drawn = V * (16 + (e if copied else 0))
    # a CUDA graph is captured for every size of a decode step, and keeps its logits
    graphs = sum(V * e * batch for batch in {padded_batch_size(n) for n in range(1, rows + 1)}) if job.cuda else 0
    forward = working_per_token(config, e) + 2 * e * config.head_dim + 8  # with cosines, sines and positions
    chunk = 8 * V * min(job.settings.chunk_tokens, scored_tokens)  # fp32 logits and log-probabilities
    return {
        "reading the prompts": cache | {"activations": prefill_tokens * forward},
        "decoding": cache | {"logits": rows * drawn + graphs},
        "scoring the guided trajectories": base | {"activations": scored_tokens * forward},
        "their log-probabilities": base | {"hidden states": 2 * scored_tokens * D * e, "chunks of logits": chunk},
    }


def page_bytes(config: ModelConfig, e: int) -> int:
    """Bytes of a page of the KV cache, all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * PAGE * e


# ---------------------------------------------------------------------------------------------------- what fits


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU in the phases that can be the largest, and pages of its KV cache."""

    parts: dict[str, dict[str, Phase]]  # sampling and update
    budget: float  # bytes of a GPU that tensors may take
    given: int  # pages that rollout.generate gets
    room: int  # pages that there is room for: --cache_tokens, or 90 % of the free memory
    enough: int  # with this many pages no row ever waits or is preempted
    least: int  # with fewer, generate refuses the longest prompt

    @property
    def too_large(self) -> list[str]:
        """Which parts of a step do not fit."""
        found = [part for part, phases in self.parts.items() if peak(phases)[1] > self.budget]
        return ["sampling", *found] if self.given < self.least and "sampling" not in found else found


def largest_batches(job: Job) -> list[MicroBatch]:
    """The largest micro-batches of an update: --micro_tokens, or one trajectory that is longer than that."""
    settings, workload, variant = job.settings, job.workload, METHODS[job.settings.method]
    prompt, guided = workload.prompt_tokens, workload.guided_prompt_tokens
    if variant.guided and not variant.distills:
        prompt = guided  # hinted: the guided group may be in the policy loss
    longest = longest_response(job, prompt)
    solution = workload.solution_tokens if variant.demonstrates else 0
    warm_up = min(settings.sft_max_tokens, job.shape.config.max_position_embeddings) if settings.sft_fraction else 0
    T = max(settings.micro_tokens, prompt + longest, prompt + solution, warm_up)
    # each response of the mean length is a sequence that continues its prompt
    sequences = math.ceil(T / min(workload.mean_response, longest))
    mask = sequences * (T // sequences) * (T // sequences + prompt)
    batches = [MicroBatch(T, T, T + sequences * prompt, mask, distillation=False, first=False)]
    if variant.distills:  # a target counts with both its contexts, and with its response after each
        T = max(settings.micro_tokens // 2, max(prompt, guided) + longest)
        batches.append(MicroBatch(T, T, continued=0, mask=0, distillation=True, first=False))
    return batches


def memory_of(job: Job) -> Memory:
    groups, settings = groups_of(job), job.settings
    longest = longest_response(job, max(prompt for prompt, _ in groups))
    update: dict[str, Phase] = {}
    for batch in largest_batches(job):
        kind = "KL" if batch.distillation else "policy loss"
        update |= {f"{name} ({kind})": phase for name, phase in update_phases(job, batch).items()}
    rows = min(settings.max_rows, sum(n for _, n in groups))
    prompts = [prompt for prompt, _ in groups]
    single = [pages_for(prompt) + pages_for(longest) + 1 for prompt in prompts]
    free = job.budget - sum(resident(job).values()) - job.shape.parameters * job.itemsize
    room = settings.cache_tokens // PAGE or max(int(0.9 * free / page_bytes(job.shape.config, job.itemsize)), 0)
    # --cache_tokens is taken whole, needed or not
    given = room if settings.cache_tokens else min(room, sum(single) + pages_for(longest) * rows)
    distills = METHODS[settings.method].distills
    sampling = sampling_phases(
        job,
        pages=given,
        rows=rows,
        prefill_tokens=min(sum(prompts), max(PREFILL_TOKENS, max(prompts))),
        scored_tokens=max(settings.micro_tokens, job.workload.prompt_tokens + longest) if distills else 0,
    )
    enough = sum(map(pages_for, prompts)) + pages_for(longest) * rows
    return Memory({"sampling": sampling, "update": update}, job.budget, given, room, enough, least=max(single))


def largest(fits: Callable[[int], bool], high: int, step: int = 1) -> int:
    """The largest multiple of step up to high that fits, 0 if none does. What is smaller than one that fits, fits too."""
    low, high = 0, high // step
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle - 1)
    return low * step


def largest_response(job: Job) -> int:
    """The longest response with which everything fits and no row ever waits for the cache."""

    def fits(tokens: int) -> bool:
        memory = memory_of(job.changed(max_new_tokens=tokens))
        return not memory.too_large and memory.room >= memory.enough

    return largest(fits, job.shape.config.max_position_embeddings - job.workload.prompt_tokens, PAGE)


def reduced(job: Job, name: str, step: int) -> Job:
    """The job with one setting lowered until it helps as much as it can; unchanged if it does not help at all."""
    least = memory_of(job.changed(**{name: step})).too_large
    if least == memory_of(job).too_large:
        return job

    def fits(value: int) -> bool:
        return set(memory_of(job.changed(**{name: value})).too_large) <= set(least)

    return job.changed(**{name: largest(fits, getattr(job.settings, name), step) or step})


def smaller_cache(job: Job) -> Job:
    """The job with a cache below 90 % of the free memory, so that prompts and logits have room beside it."""
    memory = memory_of(job)

    def fits(tokens: int) -> bool:
        return tokens < memory.least * PAGE or "sampling" not in memory_of(job.changed(cache_tokens=tokens)).too_large

    tokens = largest(fits, memory.given * PAGE, PAGE)
    return job.changed(cache_tokens=tokens) if memory.least * PAGE <= tokens < memory.given * PAGE else job


REMEDIES: tuple[Callable[[Job], Job], ...] = (
    lambda job: job.changed(recompute=True),
    lambda job: job.changed(shard_ranks=0),
    lambda job: job.changed(cache_tokens=0),
    partial(reduced, name="micro_tokens", step=256),
    partial(reduced, name="chunk_tokens", step=32),
    smaller_cache,
    partial(reduced, name="max_rows", step=8),
    partial(reduced, name="max_new_tokens", step=PAGE),
    lambda job: job.changed(offload=True),
)


def remedies(job: Job) -> list[Job]:
    """Jobs that fit: with one change each if one is enough, else with several changes, else with more GPUs; none if nothing
    helps. A number is lowered as far as it must be and no further."""

    def fits(changed: Job) -> bool:
        return not memory_of(changed).too_large

    alone = [changed for changed in (remedy(job) for remedy in REMEDIES) if changed != job and fits(changed)]
    if alone:
        return alone
    changed = job
    for remedy in REMEDIES:
        changed = remedy(changed)
        if fits(changed):
            for name in differences(job, changed):  # what turned out not to be needed is taken back
                without = changed.changed(**{name: getattr(job.settings, name)})
                changed = without if fits(without) else changed
            return [changed]
    lean = job.changed(recompute=True, shard_ranks=0)
    return [more for more in (replace(lean, gpus=n * job.gpus) for n in (2, 4, 8, 16)) if fits(more)][:1]


def differences(before: Job, after: Job) -> dict[str, Any]:
    """The settings that are not the same, with their values after."""
    values = {name: getattr(after.settings, name) for name in SETTINGS}
    return {name: value for name, value in values.items() if value != getattr(before.settings, name)}


def flags_between(before: Job, after: Job) -> str:
    """The flags that turn one into the other."""
    flags = [f"--gpus {after.gpus}"] if after.gpus != before.gpus else []
    flags += [f"--{name}" if value is True else f"--{name} {value}" for name, value in differences(before, after).items()]
    return " ".join(flags)


# ---------------------------------------------------------------------------------------------------- time


def response_lengths(count: int, mean: float, longest: int) -> list[int]:
    """`count` lengths of a rank's responses, ascending, the last one the longest.

    They are quantiles of the distribution on (0, longest] that has this mean and the largest entropy: its density is
    proportional to exp(-r t), with r by bisection. It needs no third number; r is negative if the mean is above the middle.
    """
    mean = min(mean, float(longest))
    if mean >= longest - 1:
        return [longest] * count

    def mean_at(x: float) -> float:  # x = r * longest; the mean in units of longest
        return 1 / x - (1 / math.expm1(x) if x < 700 else 0.0)  # exp(700) is near the largest float

    low, high = -700.0, 1e6
    for _ in range(100):
        x = (low + high) / 2 or 1e-6
        low, high = (x, high) if mean_at(x) > mean / longest else (low, x)
    shares = [(i + 0.5) / count for i in range(count)]
    lengths = [-math.log1p(u * math.expm1(-x)) / x * longest for u in shares]
    lengths = [min(max(round(length), 1), longest) for length in lengths]
    return [*lengths[:-1], longest]


def decode_seconds(rows: Sequence[tuple[int, int]], places: int, step: Callable[[int, float], float]) -> float:
    """Seconds to decode rows of (prompt, response) tokens, at most `places` at once. When one ends, the next one starts.

    step(rows alive, tokens in their caches) is the time of one token for each. Between two ends the rows alive stay the same.
    """
    waiting, alive = list(reversed(rows)), []
    seconds, now, tokens = 0.0, 0, 0
    while waiting or alive:
        while waiting and len(alive) < places:
            prompt, length = waiting.pop()
            heapq.heappush(alive, (now + length, prompt + length))
            tokens += prompt
        steps = alive[0][0] - now
        seconds += steps * step(len(alive), tokens + len(alive) * steps / 2)
        tokens += len(alive) * steps
        now += steps
        while alive and alive[0][0] == now:
            tokens -= heapq.heappop(alive)[1]
    return seconds


def forward_flops(shape: Shape, spans: Sequence[tuple[int, int]], head_tokens: int) -> float:
    """Operations of one forward pass over sequences of (tokens in the cache, new tokens): two for each number of a matrix and
    new token, 4 Q a layer for each pair of a query and a key that it sees, and the head for `head_tokens` of them."""
    pairs = sum(new * before + new * (new + 1) / 2 for before, new in spans)
    attention = 4 * widths(shape.config)[2] * shape.config.num_hidden_layers * pairs
    return 2 * shape.matrices * sum(new for _, new in spans) + attention + 2 * shape.head * head_tokens


def sampling_seconds(job: Job) -> tuple[float, float]:
    """Seconds of reading the prompts, and of decoding the responses of a step, on the busiest rank."""
    groups, shape, hardware = groups_of(job), job.shape, job.hardware
    longest = longest_response(job, max(prompt for prompt, _ in groups))
    lengths = response_lengths(sum(n for _, n in groups), job.workload.mean_response, longest)
    prompts = [prompt for prompt, n in groups for _ in range(n)]
    # a fixed order that is not sorted: each group has short and long ones
    order = sorted(range(len(lengths)), key=lambda i: (i * 0.6180339887498949) % 1)
    rows = [(prompt, lengths[i]) for prompt, i in zip(prompts, order, strict=True)]
    mean = sum(lengths) / len(lengths)
    held = (memory_of(job).given - sum(pages_for(prompt) for prompt, _ in groups)) // pages_for(math.ceil(mean))
    places = max(min(job.settings.max_rows, held), 1)
    # of an untied embedding only some rows are read; every response reads its prompt's pages for itself
    weights = (shape.parameters - (0 if shape.config.tie_word_embeddings else shape.head)) * job.itemsize
    token = page_bytes(shape.config, job.itemsize) / PAGE

    def step(alive: int, tokens: float) -> float:
        read = (weights + tokens * token) / (hardware.memory_bandwidth * hardware.decode_share)
        pairs = 4 * widths(shape.config)[2] * shape.config.num_hidden_layers * tokens
        products = (2 * (shape.matrices + shape.head) * alive + pairs) / (hardware.flops * hardware.decode_share)
        return max(read, products) + hardware.decode_overhead

    read = forward_flops(shape, [(0, prompt) for prompt, _ in groups], len(groups))
    return read / (hardware.flops * hardware.prefill_share), decode_seconds(rows, places, step)


def update_seconds(job: Job) -> tuple[float, float]:
    """Seconds of scoring the guided trajectories, and of the update, on the busiest rank. The exchanges between GPUs and with
    host memory overlap with the products, and they are shorter."""
    shape, settings, prompt = job.shape, job.settings, job.workload.prompt_tokens
    problems = math.ceil(settings.problems_per_step / job.gpus)
    lengths = response_lengths(settings.group_auto * problems, job.workload.mean_response, longest_response(job, prompt))
    policy = forward_flops(shape, [(0, prompt)] * problems + [(prompt, n) for n in lengths], sum(lengths))
    blocks = 1 if settings.recompute else 0  # passes over the blocks that are computed once more, without the head
    trained = 3 * policy + blocks * (policy - 2 * shape.head * sum(lengths))
    scored = plain = 0.0
    if METHODS[settings.method].distills:
        J, guided, response = settings.group_guided, job.workload.guided_prompt_tokens, round(sum(lengths) / len(lengths))
        scored = problems * forward_flops(shape, [(0, prompt), *[(prompt, response)] * J], J * response)
        one = problems * forward_flops(shape, [(0, prompt + response)], response)
        plain = problems * forward_flops(shape, [(0, guided + response)], response)
        trained += 3 * one + blocks * (one - 2 * shape.head * response * problems)
    without_gradient = job.hardware.flops * job.hardware.prefill_share
    with_gradient = job.hardware.flops * job.hardware.update_share
    return scored / without_gradient, plain / without_gradient + trained / with_gradient


def sft_seconds(job: Job) -> float:
    """Seconds of the whole SFT warm-up, with its validation."""
    settings, hardware = job.settings, job.hardware
    solutions = round(settings.sft_fraction * job.workload.problems)
    held_out = round(settings.sft_validation * solutions)
    updates = math.ceil((solutions - held_out) * settings.sft_epochs / settings.sft_batch)
    each = math.ceil(settings.sft_batch / job.gpus)  # solutions of the busiest rank
    tokens = job.workload.prompt_tokens + job.workload.solution_tokens
    one = forward_flops(job.shape, [(0, tokens)], job.workload.solution_tokens)
    trained = updates * each * one * (3 + settings.recompute)
    read = settings.sft_epochs * math.ceil(held_out / job.gpus) * one
    return (trained / hardware.update_share + read / hardware.prefill_share) / hardware.flops


def steps_of(job: Job) -> int:
    """RL steps of the whole recipe."""
    problems = round((1 - job.settings.sft_fraction) * job.workload.problems)
    return job.settings.steps or math.ceil(job.settings.epochs * problems / job.settings.problems_per_step)


# ---------------------------------------------------------------------------------------------------- the plan


def plan_text(job: Job) -> str:
    """The plan in words. ValueError for values that no run could use."""
    check(job)
    memory = memory_of(job)
    parts = memory_lines(job, memory), verdict_lines(job, memory), time_lines(job), assumption_lines(job)
    return "\n\n".join("\n".join(lines) for lines in parts)


def memory_lines(job: Job, memory: Memory) -> list[str]:
    shape, ranks = job.shape, job.shard_ranks
    copies = f"{job.gpus // ranks} copies of {ranks} shards each" if ranks < job.gpus else f"{ranks} shards"
    lines = [
        f"{shape.parameters:,} parameters, {shape.config.num_hidden_layers} blocks of {shape.block:,}, "
        f"{shape.root:,} in embedding, final norm and head",
        f"{job.gpus} GPUs, {copies}; {job.budget / GB:.1f} GB a GPU for tensors",
        "memory of one GPU, in GB, in the largest phase of each part (not measured on a GPU)",
    ]
    for part, phases in memory.parts.items():
        name, total = peak(phases)
        lines.append(f"  {part}, {name}: {total / GB:.1f}")
        lines += [f"    {nbytes / GB:8.2f}  {term}" for term, nbytes in phases[name].items() if nbytes]
    if job.settings.offload:
        host = 16 * shape.shard(ranks) / GB
        lines.append(f"  host memory for each GPU's weights, gradients and optimizer states: {host:.1f}")
    return lines


def verdict_lines(job: Job, memory: Memory) -> list[str]:
    """Does it fit? If not, why, and what helps."""
    lines = [f"DOES NOT FIT: {part}, {why_too_large(memory, part)}" for part in memory.too_large]
    helps = remedies(job) if memory.too_large else []
    ways = [flags_between(job, changed) for changed in helps]
    lines += [f"  it fits with {way}" for way in ways]
    if memory.too_large and not ways:
        return [*lines, "  nothing that train.py has a flag for makes it fit, nor 16 times as many GPUs"]
    able = helps[0] if helps else job
    rows = min(able.settings.max_rows, sum(n for _, n in groups_of(able)))
    if not memory.too_large:
        page = page_bytes(job.shape.config, job.itemsize) / GB
        texts = f"{rows} rows of {job.settings.max_new_tokens:,} tokens with their prompts"
        verdict = "fits, but rows may wait" if memory.room < memory.enough else "fits, and no row ever waits"
        lines.append(f"{verdict}: {texts} need a KV cache of {memory.enough * page:.1f} GB")
        lines.append(f"  there is room for {memory.room * page:.1f} GB of it; train.py takes {memory.given * page:.1f}")
    longest, after = largest_response(able), f" (with {ways[0]})" if ways else ""
    if not longest:
        return [*lines, f"  {rows} rows at once wait for the cache with any --max_new_tokens{after}"]
    return [*lines, f"  longest --max_new_tokens so that none of {rows} rows ever waits{after}: {longest:,}"]


def why_too_large(memory: Memory, part: str) -> str:
    if part == "sampling" and memory.given < memory.least:
        held = f"{memory.given * PAGE:,} tokens, and one prompt with its response needs {memory.least * PAGE:,}"
        return f"the KV cache would hold {held}"
    name, total = peak(memory.parts[part])
    term, nbytes = max(memory.parts[part][name].items(), key=lambda item: item[1])
    needs = f"{name}: it needs {total / GB:.1f} GB and has {memory.budget / GB:.1f}"
    return f"{needs}; the largest term: {term}, {nbytes / GB:.1f} GB"


def time_lines(job: Job) -> list[str]:
    """Seconds of a step and hours of the recipe, as if the job did fit."""
    (reading, decoding), (scoring, update) = sampling_seconds(job), update_seconds(job)
    each, steps, warm_up = reading + decoding + scoring + update, steps_of(job), sft_seconds(job)
    hours = (warm_up + steps * each) / 3600
    problems = replace(job, gpus=job.settings.problems_per_step)  # the groups of one problem
    mean = min(job.workload.mean_response, longest_response(job, job.workload.prompt_tokens))
    tokens = round(sum(n for _, n in groups_of(problems)) * job.settings.problems_per_step * mean)
    return [
        f"seconds of a step, estimated: {each:.1f} for {tokens:,} sampled tokens",
        f"    {reading:8.2f}  reading the prompts",
        f"    {decoding:8.2f}  decoding",
        f"    {scoring:8.2f}  scoring the guided trajectories",
        f"    {update:8.2f}  update",
        f"the recipe: SFT warm-up {warm_up / 3600:.1f} h, then {steps:,} steps with {steps * tokens:.3g} sampled tokens: "
        f"{hours:.1f} h on {job.gpus} GPUs, {hours * job.gpus:.0f} GPU hours",
        "  the paper reports about 17 hours for its 7B model, SFT and RL together, on 32 GPUs [app E]: 544 GPU hours; its",
        "  responses have 2.7K to 5.0K tokens, and it does not name its GPUs",
    ]


def assumption_lines(job: Job) -> list[str]:
    lines = ["assumed (each is a flag)"]
    for part in (job.workload, job.hardware, job.settings):
        for field in dataclasses.fields(part):
            if part is job.settings and field.name not in SETTINGS:
                continue
            value = getattr(part, field.name)
            shown = f"{value:.4g}" if isinstance(value, float) else f"{value}"
            lines.append(f"  --{field.name:22}{shown:>10}  {field.metadata['help']}")
    return [
        *lines,
        "assumed (no flags): every micro-batch is full, and not the update's first; all groups have a gradient, all problems",
        "a target; each rank is as busy as the busiest and has one response of the full length; nothing waits for the grader,",
        "for another rank or for host memory, and AdamW takes no time; no evaluation, no checkpoints; float32 as on a CPU",
    ]


# ---------------------------------------------------------------------------------------------------- command line


def main(arguments: Sequence[str], parse_config: Callable[[Sequence[str]], Any]) -> None:
    """`train.py --plan`: print the plan of a run with train.py's flags, which parse_config reads, and those of a plan. If there
    can be no plan, the exit status is 1 with the reason."""
    more = "Any other flag is one of train.py, see python train.py --help."
    parser = argparse.ArgumentParser("train.py --plan", description=__doc__.splitlines()[0], epilog=more, allow_abbrev=False)
    parser.add_argument("--plan", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--model", help="a config.json, a model folder, org/name, or a known family's bare name")
    parser.add_argument("--gpus", type=int, default=8, help="in all, over all nodes (default: 8)")
    parser.add_argument("--gpu_memory", type=float, default=80.0, help="GB of one GPU (default: 80)")
    for field in (*dataclasses.fields(Workload), *dataclasses.fields(Hardware)):
        text = f"{field.metadata['help']} (default: {field.default!r})".replace("%", "%%")
        parser.add_argument(f"--{field.name}", type=field.type, default=field.default, help=text)
    args, rest = parser.parse_known_args(arguments)
    if not args.model:
        parser.error("say with --model which model to plan for")
    settings = parse_config(["--model", args.model, *rest])
    workload, hardware = (
        part(**{field.name: getattr(args, field.name) for field in dataclasses.fields(part)}) for part in (Workload, Hardware)
    )
    try:
        config, source = model_config(args.model)
        text = plan_text(Job(shape_of(config), settings, args.gpus, args.gpu_memory, workload, hardware))
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{args.model}, its shape from {source}\n{text}")


if __name__ == "__main__":
    sys.exit("a plan is a command of train.py: python train.py --model NAME --plan --gpus 8 --gpu_memory 80")
