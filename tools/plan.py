"""What a run will need, before anyone rents the node: the memory of each GPU, what fits, the time of a step, the whole recipe.

    python train.py --model Qwen2.5-7B-Instruct --plan --gpus 8 --gpu_memory 80      with any other flag of train.py
    python train.py --model config.json --plan --gpus 32 --no-recompute              a config.json is enough
    python train.py --plan --help                                                    the flags that only a plan has

No weights are read and no GPU is needed. Memory is counted tensor by tensor in the phases of a step where it can be largest
(`sampling_phases`, `update_phases`), as the files of the method and FSDP2 of PyTorch 2.13 allocate it. On a CPU the same
functions are within 2 % of the measured peak (results/plan.md). On a GPU nothing here was measured: the memory is reasoning,
and the seconds are bytes and operations divided by stated speeds. Every assumption is a flag and is printed with the result.
Evaluation, grading and checkpoints are not counted.

Letters: D width, W width of the MLP, V vocabulary, L blocks; Q query heads and KV key/value heads, both times the width of a
head; S parameters of a block, R parameters outside the blocks (embedding, final norm, head); T tokens of a micro-batch; e
bytes of a number in activations and gathered weights. GB are 10^9 bytes.
"""

import argparse
import dataclasses
import heapq
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


# ---------------------------------------------------------------------------------------------------- which model

# the fields of config.json that give the shape, of the models of the paper and two small ones
SHAPES = json.loads(Path(__file__).with_name("shapes.json").read_text(encoding="utf-8"))


def model_config(name: str) -> tuple[ModelConfig, str]:
    """(the configuration, where it is from) of a name in SHAPES, a config.json, or anything that train.py's --model takes.

    Of a model on the hub only config.json is fetched. Raises ValueError that names the file, or says why there is none.
    """
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

    def shard(self, ranks: int) -> int:
        """Numbers that each rank holds: FSDP2 cuts the first dimension of every parameter, and pads it."""
        return sum(math.ceil(rows / ranks) * width for rows, width in self.rows)


# ---------------------------------------------------------------------------------------------------- what is planned


@dataclass(frozen=True)
class Assumptions:
    """What nobody knows before a run: how long the texts are, in tokens; how many problems there are; the speeds, as the vendor
    states them for one H100 SXM 80 GB, and the share of them that a run reaches."""

    prompt_tokens: int = knob(200, "length of a problem's prompt")
    guided_prompt_tokens: int = knob(500, "length of a prompt with its strategy")
    mean_response: float = knob(4096.0, "mean length of a response; lengths spread with the largest entropy")
    solution_tokens: int = knob(4096, "length of a strong model's solution, for the SFT warm-up")
    problems: int = knob(8500, "problems in the training set [§4.1]")
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
    assumed: Assumptions = Assumptions()
    cuda: bool = True

    @property
    def budget(self) -> float:
        """Bytes of a GPU that tensors may take."""
        return (self.gpu_memory - self.assumed.reserve_gb) * GB

    @property
    def itemsize(self) -> int:
        """e, bytes of a number in activations and gathered weights."""
        return 4 if self.settings.dtype == "float32" else 2

    @property
    def shard_ranks(self) -> int:
        """Ranks that share one copy of the weights. With 1, FSDP copies instead of gathering."""
        return self.settings.shard_ranks or self.gpus

    def changed(self, **settings: Any) -> "Job":
        return replace(self, settings=replace(self.settings, **settings))


def check(job: Job) -> None:
    """ValueError naming the first value that cannot be planned with. train.py has checked its own settings."""
    settings, assumed = job.settings, job.assumed
    values = {"gpus": job.gpus, "gpu_memory": job.gpu_memory} | vars(assumed)
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"--{name} {value}: must be positive")
    if METHODS[settings.method].advantages is None:
        raise ValueError(f"--method {settings.method}: only methods that sample are planned")
    if job.budget <= 0:
        raise ValueError(f"--reserve_gb {assumed.reserve_gb}: leaves nothing of the {job.gpu_memory} GB of a GPU")
    prompt = max(assumed.prompt_tokens, assumed.guided_prompt_tokens)
    context = job.shape.config.max_position_embeddings
    if prompt >= context:
        raise ValueError(f"a prompt of {prompt} tokens leaves no room in a context of {context}")
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
    shard = job.shape.shard(job.shard_ranks)
    return {"weights, fp32 shard": 4.0 * shard, "AdamW's two moments, fp32 shard": 8.0 * shard}


def saved_bytes(job: Job, batch: MicroBatch) -> float:
    """What autograd keeps of one block."""
    shape, e = job.shape, job.itemsize
    # a norm keeps x in fp32, x / rms in the compute dtype (in fp32: before the product with its weight), and its result,
    # which is the input of the projections
    norm = 12 * shape.D if e == 4 else 8 * shape.D
    # rotated queries and keys, values, the attention's result and its log-denominators
    attention = e * (2 * shape.Q + 2 * shape.KV) + 4 * shape.config.num_attention_heads
    if not (job.cuda and e == 2):  # one call a sequence: the results are put together and transposed in a second copy
        attention += e * shape.Q
    elif batch.continued:  # one variable-length call reads gathered keys and values, counted below; the others are freed
        attention -= 2 * e * shape.KV
    if shape.config.qk_norm:
        attention += (8 if e == 4 else 6) * (shape.Q + shape.KV)
    mlp = 4 * e * shape.W  # gate, silu(gate), up, and their product
    return batch.tokens * (2 * norm + 8 + attention + mlp) + 2 * e * shape.KV * batch.continued


def update_phase(job: Job, batch: MicroBatch, blocks: int, reduced: int) -> Phase:
    """What is in memory in every phase of a pass, with the activations of this many blocks kept and the gradients of this many
    parameters reduced."""
    shape, e, T = job.shape, job.itemsize, batch.tokens
    gradients = 0 if job.settings.offload else 4 * shape.shard(job.shard_ranks)
    # HSDP: FSDP keeps what it summed over the copies to the end of the pass
    summed = 4 * reduced / job.shard_ranks if job.shard_ranks < job.gpus else 0
    kept = T * shape.D * e if job.settings.recompute else saved_bytes(job, batch)
    return {
        **resident(job),
        "gradients, fp32 shard": gradients,
        "gradients summed over the copies": summed,
        "embedding and head, gathered": shape.R * e,
        "gradient of the head": shape.head * e,
        "positions": T * (2 * e * shape.config.head_dim + 8),  # with their cosines and sines
        "activations kept for the backward pass": blocks * kept,
    }


def update_phases(job: Job, batch: MicroBatch) -> dict[str, Phase]:
    """What is in memory in the phases of a forward and backward pass that can be the largest."""
    shape, e = job.shape, job.itemsize
    phases = {"loss at the head": head_phase(job, batch)}
    for i in reversed(range(shape.L)):
        phases[f"backward pass of block {i + 1} of {shape.L}, in its MLP"] = block_phase(job, batch, i)
    blocks_done = update_phase(job, batch, 0, shape.S * shape.L)
    embedding = shape.R if shape.config.tie_word_embeddings else shape.R - shape.head
    phases["gradient of the embedding"] = blocks_done | {
        "gradient of the hidden states": batch.tokens * shape.D * e,
        "gradients of the block": 4 * shape.S,
        "gradient of the embedding": embedding * e,
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
        "blocks, gathered": shape.S * e if job.shard_ranks > 1 else 0,
        "activations of the final norm": T * (8 * D if e == 4 else 6 * D),
    }


def block_phase(job: Job, batch: MicroBatch, i: int) -> Phase:
    """In the backward pass of block i (from 0), when it is at the MLP."""
    shape, e, S, D, W = job.shape, job.itemsize, job.shape.S, job.shape.D, job.shape.W
    ahead = S * e if job.shard_ranks > 1 and i > 0 else 0  # the next block is gathered ahead, in a flat buffer
    done = S * (shape.L - 1 - i)  # parameters of the blocks whose backward pass is over
    pending = 4 * S if done else 0  # the fp32 input of a reduction is kept until the next block's
    computed_again = saved_bytes(job, batch) if job.settings.recompute else 0
    return {
        **update_phase(job, batch, i + 1, done),
        "blocks, gathered": S * e + ahead,
        "activations of the block": batch.tokens * (2 * W + D) * e + computed_again,
        "gradients of the block": W * D * e + pending,
    }


def sampling_phases(job: Job, *, pages: int, rows: int, prefill_tokens: int, scored_tokens: int) -> dict[str, Phase]:
    """What is in memory in the phases of sampling that can be the largest.

    pages of the KV cache; rows decoded at once; tokens of the prompts that are read together; tokens of the pass that scores
    the guided trajectories afterwards, when the cache is free again.
    """
    shape, e = job.shape, job.itemsize
    # the block's input, the residual stream and the norm's result, with silu(gate), up and their product; or the first two with
    # queries, keys, values and the attention's results
    working = e * max(3 * shape.D + 3 * shape.W, 2 * shape.D + 4 * shape.Q + 2 * shape.KV)
    working += 2 * e * shape.config.head_dim + 8  # positions with their cosines and sines
    # for each logit: fp32, its exponential, and the same in fp64, from which the sums over blocks of the vocabulary are made
    drawn = shape.V * (e + 16)
    # a CUDA graph is captured for every size of a decode step, and keeps its logits
    sizes = {padded_batch_size(n) for n in range(1, rows + 1)} if job.cuda else {}
    weights = resident(job) | {"whole weights in the compute dtype": shape.parameters * e}
    cache = {"KV cache": pages * page_bytes(job)}
    return {
        "reading the prompts": weights | cache | {"activations": prefill_tokens * working},
        "decoding": weights | cache | {"logits": rows * drawn + shape.V * e * sum(sizes)},
        "scoring the guided trajectories": weights | {"activations": scored_tokens * working},
    }


def page_bytes(job: Job) -> int:
    """Bytes of a page of the KV cache, all layers."""
    return 2 * job.shape.L * job.shape.KV * PAGE * job.itemsize


# ---------------------------------------------------------------------------------------------------- what fits


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU in the phases that can be the largest, and pages of its KV cache."""

    parts: dict[str, dict[str, Phase]]  # sampling and update
    fits: bool
    given: int  # pages that rollout.generate gets
    room: int  # pages that there is room for: --cache_tokens, or 90 % of the free memory
    enough: int  # with this many pages no row ever waits or is preempted
    least: int  # with fewer, generate refuses the longest prompt


def largest_batches(job: Job) -> list[MicroBatch]:
    """The largest micro-batches of an update: --micro_tokens, or one trajectory that is longer than that."""
    settings, assumed, variant = job.settings, job.assumed, METHODS[job.settings.method]
    prompt, guided = assumed.prompt_tokens, assumed.guided_prompt_tokens
    if variant.guided and not variant.distills:
        prompt = guided  # hinted: the guided group may be in the policy loss
    longest = longest_response(job, prompt)
    solution = assumed.solution_tokens if variant.demonstrates else 0
    warm_up = min(settings.sft_max_tokens, job.shape.config.max_position_embeddings) if settings.sft_fraction else 0
    T = max(settings.micro_tokens, prompt + longest, prompt + solution, warm_up)
    # each response of the mean length is a sequence that continues its prompt
    sequences = math.ceil(T / min(assumed.mean_response, longest))
    batches = [MicroBatch(T, continued=T + sequences * prompt, distillation=False)]
    if variant.distills:  # a target counts with both its contexts, and with its response after each
        T = max(settings.micro_tokens // 2, max(prompt, guided) + longest)
        batches.append(MicroBatch(T, continued=0, distillation=True))
    return batches


def memory_of(job: Job) -> Memory:
    groups, settings = groups_of(job), job.settings
    update: dict[str, Phase] = {}
    for batch in largest_batches(job):
        kind = "KL" if batch.distillation else "policy loss"
        update |= {f"{name} ({kind})": phase for name, phase in update_phases(job, batch).items()}
    prompts = [prompt for prompt, _ in groups]
    longest = longest_response(job, max(prompts))
    rows = min(settings.max_rows, sum(n for _, n in groups))
    single = [least_pages(prompt, longest) for prompt in prompts]
    if settings.cache_tokens:  # it is taken whole, needed or not
        given = room = settings.cache_tokens // PAGE
    else:
        free = job.budget - sum(resident(job).values()) - job.shape.parameters * job.itemsize
        room = max(int(0.9 * free / page_bytes(job)), 0)
        given = min(room, sum(single) + pages_for(longest) * rows)
    prefill = min(sum(prompts), max(PREFILL_TOKENS, max(prompts)))
    scored = max(settings.micro_tokens, job.assumed.prompt_tokens + longest) if METHODS[settings.method].distills else 0
    sampling = sampling_phases(job, pages=given, rows=rows, prefill_tokens=prefill, scored_tokens=scored)
    fits = given >= max(single) and max(peak(sampling)[1], peak(update)[1]) <= job.budget
    enough = sum(map(pages_for, prompts)) + pages_for(longest) * rows
    return Memory({"sampling": sampling, "update": update}, fits, given, room, enough, least=max(single))


def largest_response(job: Job) -> int:
    """The longest response, in whole pages, with which everything fits and no row ever waits for the cache; 0 if none."""
    low, high = 0, (job.shape.config.max_position_embeddings - job.assumed.prompt_tokens) // PAGE
    while low < high:
        middle = (low + high + 1) // 2
        memory = memory_of(job.changed(max_new_tokens=middle * PAGE))
        if memory.fits and memory.room >= memory.enough:
            low = middle
        else:
            high = middle - 1
    return low * PAGE


def halves(number: int, least: int = 64) -> list[int]:
    return [number >> i for i in range(1, 32) if number >> i >= least]


def remedies(job: Job) -> list[Job]:
    """Jobs that fit: with one change each if one is enough, else with several changes, else with more GPUs; none if nothing
    helps."""
    memory, settings = memory_of(job), job.settings
    ways = {  # the values to try, the mildest first
        "recompute": [True],
        "shard_ranks": [0],
        "cache_tokens": [0, *halves(memory.given * PAGE, memory.least * PAGE)],  # 0: 90 % of the free memory
        "micro_tokens": halves(settings.micro_tokens),
        "chunk_tokens": halves(settings.chunk_tokens),
        "max_new_tokens": halves(settings.max_new_tokens),
        "offload": [True],
    }
    alone = [mildest(job, name, values) for name, values in ways.items()]
    if any(alone):
        return [changed for changed in alone if changed]
    smallest = job.changed(**{name: values[-1] for name, values in ways.items() if values})
    if memory_of(smallest).fits:
        for name, values in reversed(ways.items()):  # no more of each than is needed
            smallest = mildest(smallest, name, [getattr(settings, name), *values])
        return [smallest]
    lean = job.changed(recompute=True, shard_ranks=0)
    more = [replace(lean, gpus=times * job.gpus) for times in (2, 4, 8, 16)]
    return [changed for changed in more if memory_of(changed).fits][:1]


def mildest(job: Job, name: str, values: Sequence[Any]) -> Job | None:
    """The job with the first of the values with which it fits."""
    for value in values:
        changed = job.changed(**{name: value})
        if memory_of(changed).fits:
            return changed
    return None


def flags_between(before: Job, after: Job) -> str:
    """The flags that turn one into the other."""
    flags = [f"--gpus {after.gpus}"] if after.gpus != before.gpus else []
    for name in SETTINGS:
        value = getattr(after.settings, name)
        if value != getattr(before.settings, name):
            flags.append(f"--{name}" if value is True else f"--{name} {value}")
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
        if mean_at(x) > mean / longest:
            low = x
        else:
            high = x
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
    tokens = sum(new for _, new in spans)
    pairs = sum(new * before + new * (new + 1) / 2 for before, new in spans)
    return 2 * shape.matrices * tokens + 4 * shape.Q * shape.L * pairs + 2 * shape.head * head_tokens


def sampling_seconds(job: Job) -> tuple[float, float]:
    """Seconds of reading the prompts, and of decoding the responses of a step, on the busiest rank."""
    groups, shape, assumed = groups_of(job), job.shape, job.assumed
    longest = longest_response(job, max(prompt for prompt, _ in groups))
    lengths = response_lengths(sum(n for _, n in groups), assumed.mean_response, longest)
    prompts = [prompt for prompt, n in groups for _ in range(n)]
    # a fixed order that is not sorted: each group has short and long ones
    order = sorted(range(len(lengths)), key=lambda i: (i * 0.6180339887498949) % 1)
    rows = [(prompt, lengths[i]) for prompt, i in zip(prompts, order, strict=True)]
    pages = memory_of(job).given - sum(pages_for(prompt) for prompt, _ in groups)
    mean = math.ceil(sum(lengths) / len(lengths))
    places = max(min(job.settings.max_rows, pages // pages_for(mean)), 1)
    # of an untied embedding only some rows are read; every response reads its prompt's pages for itself
    weights = (shape.parameters - (0 if shape.config.tie_word_embeddings else shape.head)) * job.itemsize
    token = page_bytes(job) / PAGE

    def step(alive: int, tokens: float) -> float:
        read = (weights + tokens * token) / (assumed.memory_bandwidth * assumed.decode_share)
        products = 2 * (shape.matrices + shape.head) * alive + 4 * shape.Q * shape.L * tokens
        return max(read, products / (assumed.flops * assumed.decode_share)) + assumed.decode_overhead

    reading = forward_flops(shape, [(0, prompt) for prompt, _ in groups], len(groups))
    return reading / (assumed.flops * assumed.prefill_share), decode_seconds(rows, places, step)


def update_seconds(job: Job) -> tuple[float, float]:
    """Seconds of scoring the guided trajectories, and of the update, on the busiest rank. The exchanges between GPUs and with
    host memory overlap with the products, and they are shorter."""
    shape, settings, assumed, prompt = job.shape, job.settings, job.assumed, job.assumed.prompt_tokens
    problems = math.ceil(settings.problems_per_step / job.gpus)
    lengths = response_lengths(settings.group_auto * problems, assumed.mean_response, longest_response(job, prompt))

    def trained(forward: float, head_tokens: int) -> float:  # with recomputation the blocks, not the head, are done once more
        return 3 * forward + settings.recompute * (forward - 2 * shape.head * head_tokens)

    policy = forward_flops(shape, [(0, prompt)] * problems + [(prompt, n) for n in lengths], sum(lengths))
    with_gradient = trained(policy, sum(lengths))
    scored = plain = 0.0
    if METHODS[settings.method].distills:
        J, response = settings.group_guided, round(sum(lengths) / len(lengths))
        scored = problems * forward_flops(shape, [(0, prompt), *[(prompt, response)] * J], J * response)
        plain = problems * forward_flops(shape, [(0, assumed.guided_prompt_tokens + response)], response)
        one = problems * forward_flops(shape, [(0, prompt + response)], response)
        with_gradient += trained(one, response * problems)
    prefill, update = assumed.flops * assumed.prefill_share, assumed.flops * assumed.update_share
    return scored / prefill, plain / prefill + with_gradient / update


def sft_seconds(job: Job) -> float:
    """Seconds of the whole SFT warm-up, with its validation."""
    settings, assumed = job.settings, job.assumed
    solutions = round(settings.sft_fraction * assumed.problems)
    held_out = round(settings.sft_validation * solutions)
    updates = math.ceil((solutions - held_out) * settings.sft_epochs / settings.sft_batch)
    each = math.ceil(settings.sft_batch / job.gpus)  # solutions of the busiest rank
    one = forward_flops(job.shape, [(0, assumed.prompt_tokens + assumed.solution_tokens)], assumed.solution_tokens)
    trained = updates * each * one * (3 + settings.recompute)
    read = settings.sft_epochs * math.ceil(held_out / job.gpus) * one
    return (trained / assumed.update_share + read / assumed.prefill_share) / assumed.flops


def steps_of(job: Job) -> int:
    """RL steps of the whole recipe."""
    problems = round((1 - job.settings.sft_fraction) * job.assumed.problems)
    return job.settings.steps or math.ceil(job.settings.epochs * problems / job.settings.problems_per_step)


# ---------------------------------------------------------------------------------------------------- the plan


def plan_text(job: Job) -> str:
    """The plan in words. ValueError for values that no run could use."""
    check(job)
    memory = memory_of(job)
    fit = fit_lines(job, memory) if memory.fits else no_fit_lines(job, memory)
    parts = memory_lines(job, memory), fit, time_lines(job), assumption_lines(job)
    return "\n\n".join("\n".join(lines) for lines in parts)


def memory_lines(job: Job, memory: Memory) -> list[str]:
    shape, ranks = job.shape, job.shard_ranks
    copies = f"{job.gpus // ranks} copies of {ranks} shards each" if ranks < job.gpus else f"{ranks} shards"
    lines = [
        f"{shape.parameters:,} parameters, {shape.L} blocks of {shape.S:,}, {shape.R:,} in embedding, final norm and head",
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


def fit_lines(job: Job, memory: Memory) -> list[str]:
    """Do rows wait for the cache, and how long may a response be that none does?"""
    rows, page = min(job.settings.max_rows, sum(n for _, n in groups_of(job))), page_bytes(job) / GB
    verdict = "fits, but rows may wait" if memory.room < memory.enough else "fits, and no row ever waits"
    texts = f"{rows} rows of {job.settings.max_new_tokens:,} tokens with their prompts"
    return [
        f"{verdict}: {texts} need a KV cache of {memory.enough * page:.1f} GB",
        f"  there is room for {memory.room * page:.1f} GB of it; train.py takes {memory.given * page:.1f}",
        f"  longest --max_new_tokens so that none of {rows} rows ever waits: {largest_response(job):,}",
    ]


def no_fit_lines(job: Job, memory: Memory) -> list[str]:
    """Why does it not fit, and what helps?"""
    lines = []
    if memory.given < memory.least:
        needs = f"one prompt with its response needs {memory.least * PAGE:,}"
        lines.append(f"DOES NOT FIT: sampling, the KV cache would hold {memory.given * PAGE:,} tokens, and {needs}")
    for part, phases in memory.parts.items():
        name, total = peak(phases)
        if total > job.budget:
            lines.append(f"DOES NOT FIT: {part}, {name}: it needs {total / GB:.1f} GB and has {job.budget / GB:.1f}")
    ways = [f"  it fits with {flags_between(job, changed)}" for changed in remedies(job)]
    return lines + (ways or ["  nothing that train.py has a flag for makes it fit, nor 16 times as many GPUs"])


def time_lines(job: Job) -> list[str]:
    """Seconds of a step and hours of the recipe, as if the job did fit."""
    (reading, decoding), (scoring, update) = sampling_seconds(job), update_seconds(job)
    each, steps, warm_up = reading + decoding + scoring + update, steps_of(job), sft_seconds(job)
    hours = (warm_up + steps * each) / 3600
    problems = replace(job, gpus=job.settings.problems_per_step)  # the groups of one problem
    mean = min(job.assumed.mean_response, longest_response(job, job.assumed.prompt_tokens))
    tokens = round(sum(n for _, n in groups_of(problems)) * job.settings.problems_per_step * mean)
    return [
        f"seconds of a step, estimated: {each:.1f} for {tokens:,} sampled tokens",
        f"    {reading:8.2f}  reading the prompts",
        f"    {decoding:8.2f}  decoding",
        f"    {scoring:8.2f}  scoring the guided trajectories",
        f"    {update:8.2f}  update",
        f"the recipe: SFT warm-up {warm_up / 3600:.1f} h, then {steps:,} steps with {steps * tokens:.3g} sampled tokens: "
        f"{hours:.1f} h on {job.gpus} GPUs, {hours * job.gpus:.0f} GPU hours",
    ]


def assumption_lines(job: Job) -> list[str]:
    lines = ["assumed (each is a flag)"]
    fields = [(job.assumed, field) for field in dataclasses.fields(job.assumed)]
    fields += [(job.settings, field) for field in dataclasses.fields(job.settings) if field.name in SETTINGS]
    for part, field in fields:
        value = getattr(part, field.name)
        shown = f"{value:.4g}" if isinstance(value, float) else f"{value}"
        lines.append(f"  --{field.name:22}{shown:>10}  {field.metadata['help']}")
    return [
        *lines,
        "assumed (no flags): every micro-batch is full, and not the update's first; all groups have a gradient, all problems",
        "a target; each rank is as busy as the busiest and has one response of the full length; nothing waits for the grader,",
        "for another rank or for host memory, and AdamW takes no time; no evaluation, no checkpoints; float32 as on a CPU",
    ]


def main(arguments: Sequence[str], parse_config: Callable[[Sequence[str]], Any]) -> None:
    """`train.py --plan`: print the plan of a run with train.py's flags, which parse_config reads, and those of a plan. If there
    can be no plan, the exit status is 1 with the reason."""
    more = "Any other flag is one of train.py, see python train.py --help."
    parser = argparse.ArgumentParser("train.py --plan", description=__doc__.splitlines()[0], epilog=more, allow_abbrev=False)
    parser.add_argument("--plan", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--model", help="a config.json, a model folder, org/name, or a known family's bare name")
    parser.add_argument("--gpus", type=int, default=8, help="in all, over all nodes (default: 8)")
    parser.add_argument("--gpu_memory", type=float, default=80.0, help="GB of one GPU (default: 80)")
    for field in dataclasses.fields(Assumptions):
        text = f"{field.metadata['help']} (default: {field.default!r})".replace("%", "%%")
        parser.add_argument(f"--{field.name}", type=field.type, default=field.default, help=text)
    args, rest = parser.parse_known_args(arguments)
    if not args.model:
        parser.error("say with --model which model to plan for")
    settings = parse_config(["--model", args.model, *rest])
    assumed = Assumptions(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Assumptions)})
    try:
        config, source = model_config(args.model)
        text = plan_text(Job(Shape(config), settings, args.gpus, args.gpu_memory, assumed))
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{args.model}, its shape from {source}\n{text}")


if __name__ == "__main__":
    sys.exit("a plan is a command of train.py: python train.py --model NAME --plan --gpus 8 --gpu_memory 80")
