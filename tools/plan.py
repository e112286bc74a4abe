"""What a run will need, before anyone rents the node: the memory of each GPU, what fits, the time of a step, the whole recipe.

    python train.py --model Qwen2.5-7B-Instruct --plan --gpus 8 --gpu H100     with any other flag of train.py
    python train.py --model config.json --plan --gpus 1 --gpu 4090             a config.json is enough; --plan --help: the flags

If the run does not fit, the plan names flags with which it does and computes the same. No weights are read; no GPU is needed.
Memory is counted tensor by tensor in the phases of a step where it can be largest, as the files of the method and FSDP2 of
PyTorch 2.13 allocate it. On a CPU the same functions are within 2 % of the measured peak (results/plan.md). On a GPU nothing
was measured: the memory is reasoning, and the seconds are bytes and operations divided by the speeds of a data sheet. Every
assumption is a flag, and is printed. Evaluation, grading and checkpoints are not counted.

Letters: D width, W width of the MLP, V vocabulary, L blocks; Q query heads and KV key/value heads, both times the width of a
head; S parameters of a block, R parameters outside the blocks (embedding, final norm, head); T tokens of a micro-batch; e
bytes of a number in activations and gathered weights. GB are 10^9 bytes.
"""

import argparse
import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the files of the method, from the folder above

from kv_cache import PAGE, least_pages, padded_batch_size, pages_for
from methods import METHODS, knob
from model import CausalLM, ModelConfig, resolve_model
from rollout import PREFILL_TOKENS

GB = 1e9

# the fields of config.json that give the shape, of the models of the paper and two small ones
SHAPES = json.loads(Path(__file__).with_name("shapes.json").read_text(encoding="utf-8"))


def model_config(name: str) -> tuple[ModelConfig, str]:
    """(the configuration, where it is from) of a name in SHAPES, a config.json, or anything that train.py's --model takes: of a
    model on the hub only config.json is fetched. ValueError that names the file, or says why there is none."""
    path = Path(name).expanduser()
    if name in SHAPES and not path.exists():
        return ModelConfig.from_dict(SHAPES[name]), "tools/shapes.json"
    if not path.is_file():
        path = resolve_model(name, wanted=["config.json"]) / "config.json"
    try:
        return ModelConfig.from_dict(json.loads(path.read_text(encoding="utf-8"))), f"{path}"
    except (OSError, ValueError, AttributeError) as error:  # AttributeError: valid JSON, but no object
        raise ValueError(f"{path}: not the config.json of a supported model ({error})") from error


class Shape:
    """A model in numbers, counted on the module itself, which is built without memory (device meta)."""

    def __init__(self, config: ModelConfig) -> None:
        with torch.device("meta"):
            model = CausalLM(config)
        self.config = config
        self.D, self.W = config.hidden_size, config.intermediate_size
        self.V, self.L = config.vocab_size, config.num_hidden_layers
        self.Q = config.num_attention_heads * config.head_dim
        self.KV = config.num_key_value_heads * config.head_dim
        self.parameters = sum(p.numel() for p in model.parameters())
        self.S = sum(p.numel() for p in model.model.layers[0].parameters())
        self.R = self.parameters - self.S * self.L
        self.head = model.head_weight.numel()
        self.matrices = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)  # of all blocks
        self.rows = [(p.shape[0], p[0].numel()) for p in model.parameters()]  # how many, and numbers in each
        self.linear = [tuple(p.shape) for p in model.model.layers[0].parameters() if p.dim() == 2]  # (out, in), of a block

    def shard(self, ranks: int) -> int:
        """Numbers that each rank holds: FSDP2 cuts the first dimension of every parameter, and pads it."""
        return sum(math.ceil(rows / ranks) * width for rows, width in self.rows)

    def adapters(self, rank: int, ranks: int = 1) -> int:
        """Numbers of the adapters of a block, A (rank, in) and B (out, rank), that each of `ranks` holds."""
        return sum(math.ceil(rank / ranks) * inputs + math.ceil(outputs / ranks) * rank for outputs, inputs in self.linear)


# ---------------------------------------------------------------------------------------------------- what is planned

# GB of memory, dense bf16 operations/s with fp32 sums, bytes/s of memory: from NVIDIA's data sheets (SXM modules but for the
# L40S), and for RTX cards from the white papers of their architectures
CARDS = {
    "B200": (180, 2250e12, 8.0e12),
    "H200": (141, 989e12, 4.8e12),
    "H100": (80, 989e12, 3.35e12),
    "A100": (80, 312e12, 2.039e12),
    "L40S": (48, 362e12, 0.864e12),
    "5090": (32, 209.5e12, 1.792e12),
    "4090": (24, 165.2e12, 1.008e12),
    "3090": (24, 71e12, 0.936e12),
}


@dataclass(frozen=True)
class Assumptions:
    """What nobody knows before a run: how long the texts are, in tokens; how many problems there are; the speeds of a GPU, and
    the share of them that a run reaches. The first three are --gpu's, here those of an H100."""

    gpu_memory: float = knob(80.0, "GB of one GPU")
    flops: float = knob(989e12, "dense bf16 operations/s of a GPU")
    memory_bandwidth: float = knob(3.35e12, "bytes/s of a GPU's memory")
    host_bandwidth: float = knob(25e9, "bytes/s between a GPU and host memory, for --offload")
    reserve_gb: float = knob(4.0, "GB of a GPU for the CUDA context, NCCL, workspaces, and fragments in its allocator")
    decode_share: float = knob(0.6, "share of --memory_bandwidth and --flops that decoding reaches")
    prefill_share: float = knob(0.5, "share of --flops that passes without gradient reach")
    update_share: float = knob(0.4, "share of --flops that forward and backward passes reach")
    decode_overhead: float = knob(1e-3, "seconds that each decode step takes besides (drawing, launches, the host)")
    prompt_tokens: int = knob(200, "length of a problem's prompt")
    guided_prompt_tokens: int = knob(500, "length of a prompt with its strategy")
    mean_response: float = knob(4096.0, "mean length of a response, when those that reach --max_new_tokens are cut")
    solution_tokens: int = knob(4096, "length of a strong model's solution, for the SFT warm-up")
    problems: int = knob(8500, "problems in the training set [§4.1]")


@dataclass(frozen=True)
class Job:
    """The run that is planned."""

    shape: Shape
    settings: Any  # train.Config; train.py imports this file, so this file does not import train.py
    gpus: int
    assumed: Assumptions = Assumptions()
    cuda: bool = True

    @property
    def budget(self) -> float:
        """Bytes of a GPU that tensors may take."""
        return (self.assumed.gpu_memory - self.assumed.reserve_gb) * GB

    @property
    def itemsize(self) -> int:
        """e, bytes of a number in activations and gathered weights."""
        return 4 if self.settings.dtype == "float32" else 2

    @property
    def shard_ranks(self) -> int:
        """Ranks that share one copy of the weights. With 1, FSDP copies instead of gathering."""
        return self.settings.shard_ranks or self.gpus

    @property
    def adapters(self) -> int:
        """Numbers of the adapters of a block; 0 if all weights are trained."""
        return self.shape.adapters(self.settings.lora_rank)

    @property
    def trained(self) -> int:
        """Numbers that each rank trains: its part of the adapters, or of all weights."""
        rank, ranks = self.settings.lora_rank, self.shard_ranks
        return self.shape.L * self.shape.adapters(rank, ranks) if rank else self.shape.shard(ranks)

    @property
    def frozen_bytes(self) -> int:
        """Of the weights that each rank holds and does not train."""
        return self.itemsize * self.shape.shard(self.shard_ranks) if self.settings.lora_rank else 0

    @property
    def whole_bytes(self) -> int:
        """Of all weights in the compute dtype. Merging the adapters into them leaves the gathered adapters in memory."""
        return self.itemsize * (self.shape.parameters + self.shape.L * self.adapters)

    def changed(self, **settings: Any) -> "Job":
        return replace(self, settings=replace(self.settings, **settings))


def check(job: Job) -> None:
    """ValueError naming the first value that cannot be planned with. train.py has checked its own settings."""
    for name, value in {"gpus": job.gpus, **vars(job.assumed)}.items():
        if not value > 0:
            raise ValueError(f"--{name} {value}: must be positive")
    if METHODS[job.settings.method].advantages is None:
        raise ValueError(f"--method {job.settings.method}: only methods that sample are planned")
    prompt = max(prompt for prompt, _ in groups_of(job))
    if longest_response(job, prompt) < 1:
        raise ValueError(f"a prompt of {prompt} tokens leaves no room in the context of the model")
    if job.gpus % job.shard_ranks:
        raise ValueError(f"--shard_ranks {job.shard_ranks} does not divide the {job.gpus} GPUs")


def groups_of(job: Job) -> list[tuple[int, int]]:
    """(tokens of the prompt, responses) of every prompt that the busiest rank samples from in a step."""
    settings, variant = job.settings, METHODS[job.settings.method]
    problems = math.ceil(settings.problems_per_step / job.gpus)
    groups = [(job.assumed.prompt_tokens, settings.group_auto - variant.solution_in_group)] * problems
    if variant.guided:
        groups += [(job.assumed.guided_prompt_tokens, settings.group_guided)] * problems
    return groups


def longest_response(job: Job, prompt: int) -> int:
    return min(job.settings.max_new_tokens, job.shape.config.max_position_embeddings - prompt)


# ---------------------------------------------------------------------------------------------------- memory

Phase = dict[str, float]  # what is in memory at one point of a step: what it is -> bytes


@dataclass(frozen=True)
class MicroBatch:
    """One packed forward and backward pass of the update. Gradients of earlier ones are there."""

    tokens: int  # T, nearly all of them of responses
    continued: int  # keys that the sequences which continue a prompt see, their own included
    distillation: bool  # the KL with guided hidden states, else a policy loss


def peak(phases: dict[str, Phase]) -> tuple[str, float]:
    """(name, bytes) of the largest phase."""
    name = max(phases, key=lambda name: sum(phases[name].values()))
    return name, sum(phases[name].values())


def resident(job: Job) -> Phase:
    """What a rank holds all the time."""
    if job.settings.offload:
        return {}
    trained = {"trained weights, fp32 shard": 4.0 * job.trained, "AdamW's two moments, fp32 shard": 8.0 * job.trained}
    return {"frozen weights, shard": job.frozen_bytes} | trained


def saved_bytes(job: Job, batch: MicroBatch) -> float:
    """What autograd keeps of one block."""
    shape, e = job.shape, job.itemsize
    # a norm keeps x in fp32, x / rms in the compute dtype (in fp32: before the product with its weight), and its result,
    # which is the input of the projections; compiled, it keeps x as it came and the result
    norm = 2 * e * shape.D if job.cuda else 12 * shape.D if e == 4 else 8 * shape.D
    norm -= e * shape.D if job.adapters and not job.cuda else 0  # x / rms is kept for the weight's gradient
    # rotated queries and keys, values, the attention's result and its log-denominators
    attention = e * (2 * shape.Q + 2 * shape.KV) + 4 * shape.config.num_attention_heads
    if not (job.cuda and e == 2):  # one call a sequence: the results are put together and transposed in a second copy
        attention += e * shape.Q
    elif batch.continued:  # one variable-length call reads gathered keys and values, counted below; the others are freed
        attention -= 2 * e * shape.KV
    if shape.config.qk_norm:
        attention += (e if job.cuda else 8 if e == 4 else 6) * (shape.Q + shape.KV)
    mlp = (3 if job.cuda else 4) * e * shape.W  # gate, up, their product, and silu(gate) if it is not compiled
    low = e * job.settings.lora_rank * len(shape.linear)  # A x of each layer
    return batch.tokens * (2 * norm + 8 + attention + mlp + low) + 2 * e * shape.KV * batch.continued


def update_phase(job: Job, batch: MicroBatch, blocks: int, reduced: int) -> Phase:
    """What is in memory in every phase of a pass, with the activations of this many blocks kept and the gradients of this many
    parameters reduced."""
    shape, e, T = job.shape, job.itemsize, batch.tokens
    gradients = 0 if job.settings.offload else 4 * job.trained
    # HSDP: FSDP keeps what it summed over the copies to the end of the pass
    summed = 4 * reduced / job.shard_ranks if job.shard_ranks < job.gpus else 0
    kept = T * shape.D * e if job.settings.recompute else saved_bytes(job, batch)
    return {
        **resident(job),
        "gradients, fp32 shard": gradients,
        "gradients summed over the copies": summed,
        "embedding and head, gathered": shape.R * e,
        "gradient of the head": 0 if job.adapters else shape.head * e,
        "positions": T * (2 * e * shape.config.head_dim + 8),  # with their cosines and sines
        "activations kept for the backward pass": blocks * kept,
    }


def update_phases(job: Job, batch: MicroBatch) -> dict[str, Phase]:
    """What is in memory in the phases of a forward and backward pass that can be the largest."""
    shape, e = job.shape, job.itemsize
    phases = {"loss at the head": head_phase(job, batch)}
    for i in reversed(range(shape.L)):
        phases[f"backward pass of block {i + 1} of {shape.L}, in its MLP"] = block_phase(job, batch, i)
    if job.adapters:  # embedding and head have no gradients
        return phases
    blocks_done = update_phase(job, batch, 0, shape.S * shape.L)
    phases["gradient of the embedding"] = blocks_done | {
        "gradient of the hidden states": batch.tokens * shape.D * e,
        "gradients of the block": 4 * shape.S,
        "gradient of the embedding": (shape.R - (0 if shape.config.tie_word_embeddings else shape.head)) * e,
    }
    # when those are freed: the root's gradients and their fp32 buffer; with one rank a copy, the copy divided by 1, the result
    freed = dict.fromkeys(("embedding and head, gathered", "gradient of the head", "positions"), 0)
    root = shape.R * (12 if job.shard_ranks == 1 else e + 4)
    phases["reduction of the root's gradients"] = blocks_done | freed | {"gradients of embedding and head": root}
    return phases


def head_phase(job: Job, batch: MicroBatch) -> Phase:
    shape, e, T, D = job.shape, job.itemsize, batch.tokens, job.shape.D
    # fp32 tensors of (chunk_tokens, V). Policy: logits, log-probabilities, probabilities and their product for the entropy.
    # KL: logits, both sides' log-probabilities, the guided side's probabilities, the difference, the product, guided logits
    tensors = 6 + e / 4 if batch.distillation else 4
    return {
        **update_phase(job, batch, shape.L, 0),
        "chunks of logits": tensors * 4.0 * min(job.settings.chunk_tokens, T) * shape.V,
        "hidden states and their gradient": 3 * T * D * e,
        "hidden states of the guided pass": T * D * e if batch.distillation else 0,
        "blocks, gathered": (shape.S + job.adapters) * e if job.shard_ranks > 1 else 0,
        "activations of the final norm": T * (8 * D if e == 4 else 6 * D),
    }


def block_phase(job: Job, batch: MicroBatch, i: int) -> Phase:
    """In the backward pass of block i (from 0), when it is at the MLP."""
    shape, e, D, W = job.shape, job.itemsize, job.shape.D, job.shape.W
    S, trained = shape.S + job.adapters, job.adapters or shape.S
    ahead = S * e if job.shard_ranks > 1 and i > 0 else 0  # the next block is gathered ahead, in a flat buffer
    done = trained * (shape.L - 1 - i)  # parameters of the blocks whose backward pass is over
    pending = 4 * trained if done else 0  # the fp32 input of a reduction is kept until the next block's
    computed_again = saved_bytes(job, batch) if job.settings.recompute else 0
    return {
        **update_phase(job, batch, i + 1, done),
        "blocks, gathered": S * e + ahead,
        "activations of the block": batch.tokens * (2 * W + D) * e + computed_again,
        "gradients of the block": (job.adapters or W * D) * e + pending,
    }


def sampling_phases(job: Job, *, pages: int, rows: int, prefill_tokens: int, scored_tokens: int) -> dict[str, Phase]:
    """What is in memory in the phases of sampling that can be the largest: with these pages of the KV cache, rows decoded at
    once, tokens of the prompts that are read together, and tokens of the pass that scores the guided trajectories afterwards,
    when the cache is free again."""
    shape, e = job.shape, job.itemsize
    # the block's input, the residual stream and the norm's result, with silu(gate), up and their product; or the first two with
    # queries, keys, values and the attention's results
    working = e * max(3 * shape.D + 3 * shape.W, 2 * shape.D + 4 * shape.Q + 2 * shape.KV)
    working += 2 * e * shape.config.head_dim + 8  # positions with their cosines and sines
    # for each logit on a CPU: fp32, its exponential, and the same in fp64, from which the sums over blocks are made
    drawn = shape.V * (e if job.cuda else e + 16)
    # a CUDA graph is captured for every size of a decode step, and keeps its logits
    sizes = {padded_batch_size(n) for n in range(1, rows + 1)} if job.cuda else {}
    weights = resident(job) | {"whole weights in the compute dtype": job.whole_bytes, "joined projections": joined_bytes(job)}
    cache = {"KV cache": pages * page_bytes(job)}
    return {
        "reading the prompts": weights | cache | {"activations": prefill_tokens * working},
        "decoding": weights | cache | {"logits": rows * drawn + shape.V * e * sum(sizes)},
        "scoring the guided trajectories": weights | {"activations": scored_tokens * working},
    }


def joined_bytes(job: Job) -> int:
    """The copy of the weights of queries, keys and values with which a GPU decodes."""
    shape = job.shape
    return shape.L * shape.D * (shape.Q + 2 * shape.KV) * job.itemsize if job.cuda else 0


def page_bytes(job: Job) -> int:
    """Bytes of a page of the KV cache, all layers."""
    return 2 * job.shape.L * job.shape.KV * PAGE * job.itemsize


# ---------------------------------------------------------------------------------------------------- what fits


def largest_batches(job: Job) -> list[MicroBatch]:
    """The largest micro-batches of an update: --micro_tokens, or one trajectory that is longer than that."""
    settings, assumed, variant = job.settings, job.assumed, METHODS[job.settings.method]
    prompt = max(prompt for prompt, _ in groups_of(job))
    longest = longest_response(job, prompt)
    solution = assumed.solution_tokens if variant.demonstrates else 0
    warm_up = min(settings.sft_max_tokens, job.shape.config.max_position_embeddings) if settings.sft_fraction else 0
    T = max(settings.micro_tokens, prompt + longest, prompt + solution, warm_up)
    # each response of the mean length is a sequence that continues its prompt
    sequences = math.ceil(T / min(assumed.mean_response, longest))
    batches = [MicroBatch(T, continued=T + sequences * prompt, distillation=False)]
    if variant.distills:  # a target counts with both its contexts, and with its response after each
        T = max(settings.micro_tokens // 2, prompt + longest)
        batches.append(MicroBatch(T, continued=0, distillation=True))
    return batches


# (recompute, micro_tokens, chunk_tokens) of the update, the fastest first: few and large passes keep a GPU busy
UPDATE_SIZES = [(False, 65536, 2048), (False, 32768, 2048), (False, 16384, 1024)]
UPDATE_SIZES += [(True, 65536, 2048), (True, 32768, 1024), (True, 16384, 512), (True, 8192, 256)]


def settle(job: Job) -> Job:
    """The job with values for --micro_tokens 0 and --chunk_tokens 0: on CUDA the fastest for which there is memory, which may
    need no recomputation; on a CPU, which is as fast with small passes, 16,384 and 256."""
    micro, chunk = job.settings.micro_tokens, job.settings.chunk_tokens
    if not job.cuda or (micro and chunk):
        return job.changed(micro_tokens=micro or 16384, chunk_tokens=chunk or 256)
    for recompute, micro_fits, chunk_fits in UPDATE_SIZES:
        recompute = job.settings.recompute and (recompute or micro > 0)
        changed = job.changed(recompute=recompute, micro_tokens=micro or micro_fits, chunk_tokens=chunk or chunk_fits)
        if max(peak(update_phases(changed, batch))[1] for batch in largest_batches(changed)) <= 0.9 * job.budget:
            break
    return changed


def cache_pages(job: Job) -> tuple[int, int]:
    """(pages of the KV cache that rollout.generate gets, the fewest with which it does not refuse the longest prompt)."""
    prompts = [prompt for prompt, _ in groups_of(job)]
    longest = longest_response(job, max(prompts))
    needed = [least_pages(prompt, longest) for prompt in prompts]
    if job.settings.cache_tokens:  # it is taken whole, needed or not
        return job.settings.cache_tokens // PAGE, max(needed)
    free = job.budget - sum(resident(job).values()) - job.whole_bytes - joined_bytes(job)
    room = max(int(0.9 * free / page_bytes(job)), 0)
    return min(room, sum(needed) + pages_for(longest) * most_rows(job)), max(needed)


def most_rows(job: Job) -> int:
    """Rows that are decoded at once if the cache has room for them."""
    return min(job.settings.max_rows, sum(n for _, n in groups_of(job)))


def rows_at_once(job: Job) -> int:
    """Rows of the mean length that are decoded at once: as many as the cache holds, each with its share of its prompt."""
    groups = groups_of(job)
    prompts = sum(pages_for(prompt) for prompt, _ in groups) / sum(n for _, n in groups)
    response = min(job.assumed.mean_response, longest_response(job, job.assumed.prompt_tokens))
    places = int(cache_pages(job)[0] / (pages_for(math.ceil(response)) + prompts))
    return max(1, min(most_rows(job), places))


def memory_of(job: Job) -> dict[str, dict[str, Phase]]:
    """What is in memory in the phases of sampling and of the update that can be the largest."""
    update: dict[str, Phase] = {}
    for batch in largest_batches(job):
        kind = "KL" if batch.distillation else "policy loss"
        update |= {f"{name} ({kind})": phase for name, phase in update_phases(job, batch).items()}
    prompts = [prompt for prompt, _ in groups_of(job)]
    prefill = min(sum(prompts), max(PREFILL_TOKENS, max(prompts)))
    scored = max(job.settings.micro_tokens, job.assumed.prompt_tokens + longest_response(job, max(prompts)))
    scored *= METHODS[job.settings.method].distills
    pages = cache_pages(job)[0]
    sampling = sampling_phases(job, pages=pages, rows=most_rows(job), prefill_tokens=prefill, scored_tokens=scored)
    return {"sampling": sampling, "update": update}


def fits(job: Job) -> bool:
    pages, least = cache_pages(job)
    return pages >= least and all(peak(phases)[1] <= job.budget for phases in memory_of(job).values())


LEANER = {  # values that save memory and cost time, and change nothing that is computed; the mildest first
    "recompute": [True], "shard_ranks": [0],
    "max_rows": [64, 16], "micro_tokens": [8192, 4096], "chunk_tokens": [256, 64],
}  # fmt: skip


def cheapest(job: Job, offload: Sequence[bool]) -> Job | None:
    """The job with values of LEANER and of offload that fits and takes the least time; None if none fits. Of those that take up
    to 5 % more, the one with the fewest changes."""
    values = {"offload": offload}
    values |= {name: [getattr(job.settings, name), *leaner] for name, leaner in LEANER.items()}
    hours = {}
    for combination in itertools.product(*map(dict.fromkeys, values.values())):
        changed = with_cache(job.changed(**dict(zip(values, combination, strict=True))))
        if changed:
            hours[changed] = hours_of(changed)
    limit = 1.05 * min(hours.values(), default=0)
    near = [changed for changed in hours if hours[changed] <= limit]
    return min(near, key=lambda changed: len(flags_between(job, changed)), default=None)


def with_cache(job: Job) -> Job | None:
    """The job if it fits; or with the cache of --cache_tokens 0; or with the largest for which there is memory."""
    automatic = job.changed(cache_tokens=0)
    over = peak(memory_of(automatic)["sampling"])[1] - job.budget
    pages = cache_pages(automatic)[0] - math.ceil(over / page_bytes(job))
    largest = job.changed(cache_tokens=max(pages, 1) * PAGE)
    return next((changed for changed in (job, automatic, largest) if fits(changed)), None)


def ways_to_fit(job: Job) -> list[Job]:
    """The job if it fits. Else the cheapest one that does, and the cheapest that does without --offload, for which the host may
    have too little memory; with more GPUs if they need them. None if nothing helps."""
    if fits(job):
        return [job]
    more = [job.gpus << i for i in range(1, 20) if job.gpus << i <= job.settings.problems_per_step]
    ways = []
    for offload in ([job.settings.offload, True], [job.settings.offload]):
        found = (cheapest(replace(job, gpus=gpus), offload) for gpus in [job.gpus, *more])
        ways.append(next(filter(None, found), None))
    return list(dict.fromkeys(filter(None, ways)))


def flags_between(before: Job, after: Job) -> list[str]:
    """The flags that turn one into the other."""
    flags = [f"--gpus {after.gpus}"] if after.gpus != before.gpus else []
    for name, value in vars(after.settings).items():
        if value != getattr(before.settings, name):
            flags.append(f"--{name}" if value is True else f"--{name} {value}")
    return flags


# ---------------------------------------------------------------------------------------------------- time


def response_lengths(count: int, mean: float, longest: int) -> list[int]:
    """`count` lengths of a rank's responses, ascending, the last one the longest: quantiles of lengths if a response may end
    at any token with the same probability, and is cut at the longest. They are -a log(1 - u) for u from 0 to 1; their mean is
    a (1 - exp(-longest / a)), which gives a by bisection."""
    low, high = 0.0, 1e6 * longest
    for _ in range(100):
        a = (low + high) / 2
        if -a * math.expm1(-longest / a) < mean:
            low = a
        else:
            high = a
    lengths = [round(-a * math.log1p(-(i + 0.5) / count)) for i in range(count - 1)]
    return [*(min(max(length, 1), longest) for length in lengths), longest]


def forward_flops(shape: Shape, spans: Sequence[tuple[int, int]], head_tokens: int) -> float:
    """Operations of one forward pass over sequences of (tokens in the cache, new tokens): two for each number of a matrix and
    new token, 4 Q a layer for each pair of a query and a key that it sees, and the head for `head_tokens` of them."""
    tokens = sum(new for _, new in spans)
    pairs = sum(new * before + new * (new + 1) / 2 for before, new in spans)
    return 2 * shape.matrices * tokens + 4 * shape.Q * shape.L * pairs + 2 * shape.head * head_tokens


def decoding_seconds(job: Job) -> float:
    """Seconds of decoding the responses of a step, on the busiest rank. Reading the prompts takes a thousandth of that."""
    groups, shape, assumed = groups_of(job), job.shape, job.assumed
    prompts = [prompt for prompt, n in groups for _ in range(n)]
    longest = longest_response(job, max(prompts))
    lengths = response_lengths(len(prompts), assumed.mean_response, longest)
    tokens, places = sum(lengths), rows_at_once(job)
    # if rows wait, the places are all taken until the last ones go on alone, for about half of the longest
    steps = max(longest, tokens / places + longest / 2 * (places < len(lengths)))
    seen = tokens * sum(prompts) / len(prompts) + sum(length**2 for length in lengths) / 2  # keys, over all steps and rows
    # of an untied embedding only some rows are read; every response reads its prompt's pages for itself
    weights = (shape.parameters - (0 if shape.config.tie_word_embeddings else shape.head)) * job.itemsize
    read = (steps * weights + seen * page_bytes(job) / PAGE) / assumed.memory_bandwidth
    products = (2 * (shape.matrices + shape.head) * tokens + 4 * shape.Q * shape.L * seen) / assumed.flops
    return max(read, products) / assumed.decode_share + steps * assumed.decode_overhead


def update_seconds(job: Job) -> float:
    """Seconds of a step's update, and of scoring the guided trajectories for it, on the busiest rank."""
    shape, settings, assumed, prompt = job.shape, job.settings, job.assumed, job.assumed.prompt_tokens
    problems = math.ceil(settings.problems_per_step / job.gpus)
    lengths = response_lengths(settings.group_auto * problems, assumed.mean_response, longest_response(job, prompt))
    tokens = sum(lengths)
    policy = forward_flops(shape, [(0, prompt)] * problems + [(prompt, n) for n in lengths], tokens)
    seconds = training_seconds(job, policy, tokens + prompt * problems, tokens)
    if METHODS[settings.method].distills:
        J, response = settings.group_guided, tokens // len(lengths)
        scored = forward_flops(shape, [(0, prompt), *[(prompt, response)] * J], J * response)
        guided = forward_flops(shape, [(0, assumed.guided_prompt_tokens + response)], response)
        seconds += problems * (scored + guided) / (assumed.flops * assumed.prefill_share)
        one = forward_flops(shape, [(0, prompt + response)], response)
        seconds += training_seconds(job, problems * one, problems * (prompt + response), problems * response)
    return seconds


def training_seconds(job: Job, forward: float, tokens: float, head_tokens: float) -> float:
    """Seconds of forward and backward passes over this many tokens, from the operations of the forward pass. Exchanges overlap
    with the products, and only those with host memory may be longer: every pass copies the fp32 shard to the GPU twice, and its
    gradient back. Frozen matrices have no gradients: a third of the products is not made."""
    again = forward - 2 * job.shape.head * head_tokens if job.settings.recompute else 0  # the blocks, not the head
    passes = math.ceil(tokens / job.settings.micro_tokens)
    copied = passes * (12 * job.trained + 2 * job.frozen_bytes) if job.settings.offload else 0
    frozen = 2 * (job.shape.matrices * tokens + job.shape.head * head_tokens) if job.adapters else 0
    products = (3 * forward + again - frozen) / (job.assumed.flops * job.assumed.update_share)
    return max(products, copied / job.assumed.host_bandwidth)


def sft_seconds(job: Job) -> float:
    """Seconds of the whole SFT warm-up."""
    settings, assumed = job.settings, job.assumed
    solutions = settings.sft_epochs * settings.sft_fraction * assumed.problems / job.gpus
    tokens = assumed.prompt_tokens + assumed.solution_tokens
    one = forward_flops(job.shape, [(0, tokens)], assumed.solution_tokens)
    return training_seconds(job, solutions * one, solutions * tokens, solutions * assumed.solution_tokens)


def steps_of(job: Job) -> int:
    """RL steps of the whole recipe."""
    problems = round((1 - job.settings.sft_fraction) * job.assumed.problems)
    return job.settings.steps or math.ceil(job.settings.epochs * problems / job.settings.problems_per_step)


def hours_of(job: Job) -> float:
    """Hours of the whole recipe."""
    return (sft_seconds(job) + steps_of(job) * (decoding_seconds(job) + update_seconds(job))) / 3600


# ---------------------------------------------------------------------------------------------------- the plan


def plan_text(job: Job) -> str:
    """The plan in words. ValueError for values that no run could use."""
    check(job)
    job = settle(job)
    ways = ways_to_fit(job)
    parts = [] if ways == [job] else [no_fit_lines(job, ways)]
    for way in ways[:1]:
        parts += [memory_lines(way), time_lines(way)]
    return "\n\n".join("\n".join(lines) for lines in [*parts, assumption_lines(job)])


def no_fit_lines(job: Job, ways: Sequence[Job]) -> list[str]:
    """Why does it not fit, and what helps?"""
    lines, (pages, least) = [], cache_pages(job)
    if pages < least:
        needs = f"one prompt with its response needs {least * PAGE:,}"
        lines.append(f"DOES NOT FIT: sampling, the KV cache would hold {pages * PAGE:,} tokens, and {needs}")
    for part, phases in memory_of(job).items():
        name, total = peak(phases)
        if total > job.budget:
            lines.append(f"DOES NOT FIT: {part}, {name}: it needs {total / GB:.1f} GB and has {job.budget / GB:.1f}")
    for way in ways:
        hours, rows = hours_of(way), f"about {rows_at_once(way)} of {most_rows(way)} rows decoded at once"
        lines.append(f"  it fits with {' '.join(flags_between(job, way))}")
        lines.append(f"    {hours:,.0f} hours, {hours * way.gpus:,.0f} GPU hours, {rows}")
    if not ways:
        more = "a smaller model, or fewer --max_new_tokens and --sft_max_tokens, would need less"
        lines.append(f"  no settings that compute the same make it fit, nor a GPU for each problem of a step; {more}")
    return lines


def memory_lines(job: Job) -> list[str]:
    gpus = f"{job.gpus} GPU{'s' * (job.gpus > 1)}"
    lines = [
        f"{gpus}, {job.shard_ranks} for each copy of the weights; {job.budget / GB:.1f} GB of each for tensors",
        f"update: {passes_text(job.settings)}",
        "memory of one GPU, in GB, in the largest phase of each part (estimated)",
    ]
    for part, phases in memory_of(job).items():
        name, total = peak(phases)
        lines.append(f"  {part}, {name}: {total / GB:.1f}")
        lines += [f"    {nbytes / GB:8.2f}  {term}" for term, nbytes in phases[name].items() if nbytes]
    if job.settings.offload:
        host = (16 * job.trained + job.frozen_bytes) / GB
        lines.append(f"  host memory for each GPU's weights, gradients and optimizer states: {host:.1f}")
    return [*lines, f"about {rows_at_once(job)} of {most_rows(job)} rows are decoded at once"]


def passes_text(settings: Any) -> str:
    """The sizes that `settle` chose."""
    recompute = "with" if settings.recompute else "without"
    return f"passes of {settings.micro_tokens:,} tokens {recompute} recomputation, the head by {settings.chunk_tokens:,}"


def time_lines(job: Job) -> list[str]:
    """Seconds of a step and hours of the recipe."""
    decoding, update, hours = decoding_seconds(job), update_seconds(job), hours_of(job)
    return [
        f"a step takes {decoding + update:,.0f} s, estimated: decoding {decoding:,.0f}, scoring and update {update:,.0f}",
        f"the recipe, SFT warm-up of {sft_seconds(job) / 3600:.1f} h and {steps_of(job):,} steps, takes {hours:,.0f} h on "
        f"{job.gpus} GPUs, {hours * job.gpus:,.0f} GPU hours",
    ]


def assumption_lines(job: Job) -> list[str]:
    lines = ["assumed (each is a flag)"]
    for field in dataclasses.fields(job.assumed):
        lines.append(f"  --{field.name:22}{getattr(job.assumed, field.name):>10.4g}  {field.metadata['help']}")
    text = """assumed (no flags): every micro-batch is full, and not the update's first; all groups have a gradient, all
problems a target; each rank is as busy as the busiest and has one response of the full length; nothing waits for the grader or
another rank, AdamW takes no time, no row is preempted; no evaluation, no checkpoints"""
    return [*lines, text]


def main(arguments: Sequence[str], parse_config: Callable[[Sequence[str]], Any]) -> None:
    """`train.py --plan`: print the plan of a run with train.py's flags, which parse_config reads, and those of a plan. If there
    can be no plan, the exit status is 1 with the reason."""
    more = "Any other flag is one of train.py, see python train.py --help."
    parser = argparse.ArgumentParser("train.py --plan", description=__doc__.splitlines()[0], epilog=more, allow_abbrev=False)
    parser.add_argument("--plan", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--model", required=True, help="a config.json, a model folder, org/name, or a known family's bare name")
    parser.add_argument("--gpus", type=int, default=8, help="in all, over all nodes (default: 8)")
    parser.add_argument("--gpu", type=str.upper, choices=CARDS, default="H100", help="sets the next three (default: H100)")
    fields = {field.name: field for field in dataclasses.fields(Assumptions)}
    for name, field in fields.items():
        text = f"{field.metadata['help']} (default: {field.default!r})".replace("%", "%%")
        parser.add_argument(f"--{name}", type=field.type, default=argparse.SUPPRESS, help=text)
    args, rest = parser.parse_known_args(arguments)
    settings = parse_config(["--model", args.model, *rest])
    card = dict(zip(fields, CARDS[args.gpu], strict=False))  # the first three fields
    given = {name: value for name, value in vars(args).items() if name in fields}
    try:
        config, source = model_config(args.model)
        text = plan_text(Job(Shape(config), settings, args.gpus, Assumptions(**card | given)))
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{args.model}, from {source}\n\n{text}")


if __name__ == "__main__":
    sys.exit("a plan is a command of train.py: python train.py --model NAME --plan --gpus 8 --gpu H100")
