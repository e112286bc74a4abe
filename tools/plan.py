"""What a run will need, before anyone rents the node: the memory of each GPU, what fits, the time of a step, the whole recipe.

    python tools/plan.py --model Qwen2.5-7B-Instruct --gpus 8 --gpu_memory 80
    python tools/plan.py --config DIR_or_config.json --gpus 32 --no-recompute --micro_tokens 8192
    python train.py --model Qwen2.5-7B-Instruct --plan --gpus 8 --gpu_memory 80     the same, with all of train.py's flags

Only a config.json is read: no weights, no GPU. Settings have train.py's names and defaults. Memory is counted tensor by tensor
at the moments where it can be largest (`sampling_moments`, `update_moments`), as model.py, kv_cache.py, rollout.py, loss.py,
parallel.py and FSDP2 of PyTorch 2.13 allocate it. On a CPU with one rank the same functions are within 2 % of the measured peak
(results/plan.md), and so is the update of one rank of eight, the exchanges left out. On a GPU nothing here was measured:
there the count of tensors is reasoning, and the seconds are bytes and operations divided by stated speeds.

What it is not: a simulator. Every assumption is a flag with a default and is printed with the result. Evaluation, grading and
the writing of checkpoints are in neither figure.

Reads: model.py, kv_cache.py, rollout.py. Letters: D width, W width of the MLP, V vocabulary, H query heads, E head width;
Q = H E, KV = the key/value heads times E; T tokens of a micro-batch, M response tokens in it, S parameters of a block, R of
what is gathered with the root (embedding, final norm, head). GB are 10^9 bytes.
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
from methods import METHODS
from model import KNOWN_FAMILIES, CausalLM, ModelConfig
from rollout import PREFILL_TOKENS

GB = 1e9
PAPER = "the paper reports about 17 hours for its 7B model, SFT and RL together, on 4 nodes of 8 GPUs [app E]: 544 GPU hours"


# ---------------------------------------------------------------------------------------------------- which model

_QWEN25 = dict(model_type="qwen2", rms_norm_eps=1e-6, max_position_embeddings=32768, rope_theta=1000000.0, hidden_act="silu")
_LLAMA31_ROPE = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
# The fields of config.json that give the shape, for the models of the paper and two small ones: what stands in where the hub
# cannot be reached.
KNOWN = {
    "SmolLM2-135M-Instruct": dict(
        model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, rms_norm_eps=1e-5, max_position_embeddings=8192, rope_theta=100000.0,
        tie_word_embeddings=True, hidden_act="silu",
    ),
    "Qwen2.5-0.5B-Instruct": _QWEN25 | dict(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "Qwen2.5-1.5B-Instruct": _QWEN25 | dict(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "Qwen2.5-7B-Instruct": _QWEN25 | dict(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, tie_word_embeddings=False,
    ),
    "Llama-3.1-8B-Instruct": dict(
        model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-5, max_position_embeddings=131072, rope_theta=500000.0,
        rope_scaling=_LLAMA31_ROPE, tie_word_embeddings=False, hidden_act="silu",
    ),
}  # fmt: skip


def model_config(name: str | Path) -> tuple[ModelConfig, str]:
    """(the configuration, where it came from) of a model folder, a config.json, `org/name` or a known family's bare name.

    For a name that is no file, config.json alone is fetched from the hub; where that fails, KNOWN stands in for the models it
    has. Raises ValueError that names the file, or says how to give a local config where there is no other way.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return ModelConfig.from_folder(path), f"{path / 'config.json'}"
    if path.exists() or path.suffix == ".json":
        try:
            return ModelConfig.from_dict(json.loads(path.read_text(encoding="utf-8"))), f"{path}"
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error})") from error
        except (ValueError, AttributeError) as error:  # AttributeError: valid JSON, but no object
            raise ValueError(f"{path}: not the config.json of a supported model ({error})") from error
    bare = str(name).split("/")[-1]
    org = next((org for prefix, org in KNOWN_FAMILIES if bare.lower().startswith(prefix)), None)
    repo = str(name) if "/" in str(name) else f"{org}/{bare}"
    local = "--config FILE takes a config.json that you have (every model page has it, a few lines of JSON)"
    if repo.startswith((".", "/", "~", "None/")) or repo.count("/") > 1:
        raise ValueError(f"{name}: no such folder or file, and not a name on the hub; {local}")
    try:
        return ModelConfig.from_folder(_fetched(repo).parent), f"{repo} on the hub"
    except Exception as error:  # the hub library raises a dozen kinds; each means "not there" to our caller
        known = {key.lower(): key for key in KNOWN}.get(bare.lower())
        if known is not None:
            reason = str(error).strip().split("\n")[0][:80]
            return ModelConfig.from_dict(KNOWN[known]), f"plan.py's own table: {repo} could not be fetched ({reason})"
        raise ValueError(f"{name}: {repo}'s config.json could not be fetched ({error}); {local}") from error


def _fetched(repo: str) -> Path:
    """The file config.json of a repository, from the hub's cache on this machine or else from the hub."""
    import huggingface_hub as hub  # imported here: a folder or a file does not need it

    cached = hub.try_to_load_from_cache(repo, "config.json")
    if isinstance(cached, str):
        return Path(cached)
    hub.get_hf_file_metadata(hub.hf_hub_url(repo, "config.json"), timeout=5)  # one try: the download itself would make six
    return Path(hub.hf_hub_download(repo, "config.json"))


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


# ---------------------------------------------------------------------------------------------------- settings


def flag(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Settings:
    """The settings of train.py that change memory or time, with its names and defaults. Its Config does as well."""

    method: str = flag("sgpo", "a method that samples")
    group_auto: int = flag(8, "autonomous trajectories a problem")
    group_guided: int = flag(4, "guided trajectories a problem, with sgpo and hinted")
    temperature: float = flag(1.0, "sampling temperature")
    top_p: float = flag(0.95, "nucleus that training samples from")
    max_new_tokens: int = flag(16384, "longest response, in tokens")
    max_rows: int = flag(256, "responses decoded at once by a rank")
    cache_tokens: int = flag(0, "size of the KV cache in tokens; 0: what is needed, at most 90 % of the free memory")
    problems_per_step: int = flag(128, "problems of a step, over all ranks")
    minibatches: int = flag(1, "optimizer updates from one step's samples")
    epochs: float = flag(10.0, "passes over the RL problems")
    steps: int = flag(0, "number of steps; 0: from --epochs")
    micro_tokens: int = flag(16384, "tokens in one forward and backward pass")
    chunk_tokens: int = flag(256, "tokens per chunk of the head")
    sft_fraction: float = flag(1 / 3, "share of the problems used for the SFT warm-up")
    sft_epochs: float = flag(10.0, "passes over them")
    sft_batch: int = flag(64, "solutions in one SFT update")
    sft_validation: float = flag(0.1, "share of them that is held out, and read once an epoch")
    sft_max_tokens: int = flag(16384, "longest sequence of the SFT, in tokens")
    recompute: bool = flag(True, "recompute each block in the backward pass")
    dtype: str = flag("auto", "auto or bfloat16 (a GPU's), or float32")
    shard_ranks: int = flag(0, "ranks that share one copy of the weights; 0: all")
    offload: bool = flag(False, "keep weights, gradients and optimizer states in host memory")


@dataclass(frozen=True)
class Workload:
    """What is not known before a run: how long texts are. All in tokens."""

    prompt_tokens: int = flag(200, "of a problem's prompt")
    guided_prompt_tokens: int = flag(500, "of a prompt with its strategy")
    mean_response: float = flag(4096.0, "mean response; lengths: the distribution of largest entropy up to --max_new_tokens")
    solution_tokens: int = flag(4096, "of a strong model's solution, for the SFT warm-up")
    problems: int = flag(8500, "in the training set [§4.1]")


@dataclass(frozen=True)
class Hardware:
    """Speeds, as stated by the vendor for one H100 SXM 80 GB, and the share of them that a run is assumed to reach."""

    memory_bandwidth: float = flag(3.35e12, "of a GPU, bytes/s")
    decode_share: float = flag(0.6, "of it, and of the matrix peak, reached while decoding")
    flops: float = flag(989e12, "of a GPU, dense bf16 operations/s")
    prefill_share: float = flag(0.5, "of it, reached by passes without gradient")
    update_share: float = flag(0.4, "of it, reached by forward and backward passes")
    decode_overhead: float = flag(1e-3, "s that a decode step takes beside (sampling, launches, the host)")
    node_gpus: int = flag(8, "GPUs of a node")
    link_in_node: float = flag(300e9, "bytes/s that a GPU exchanges within its node (NVLink: 450e9 stated)")
    link_between_nodes: float = flag(40e9, "bytes/s that a GPU exchanges with other nodes (400 Gbit/s: 50e9 stated)")
    host_link: float = flag(25e9, "bytes/s between a GPU and host memory, for --offload (PCIe 5: 64e9 stated)")
    host_bandwidth: float = flag(200e9, "bytes/s of a node's host memory, for the optimizer with --offload")
    reserve_gb: float = flag(4.0, "GB a GPU for the CUDA context, NCCL, workspaces, and what its allocator cannot use again")


# ---------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Job:
    """How the tensors of a run are laid out: what all moments have in common."""

    shape: Shape
    itemsize: int  # bytes of a number in activations and gathered weights: 2 (bf16) or 4 (fp32)
    shard_ranks: int  # that share one copy of the weights; 1: FSDP copies instead of gathering
    replicated: bool  # there are other copies (HSDP), and the shards of gradients are summed over those too
    kernel: bool  # one variable-length call attends over a packed row (CUDA, bf16); else one call a sequence, with masks
    cuda: bool  # decoding in CUDA graphs, each with its own logits
    recompute: bool
    offload: bool
    chunk_tokens: int
    temperature: float
    top_p: float


@dataclass(frozen=True)
class Pass:
    """One packed forward and backward pass of the update."""

    tokens: int  # T
    targets: int  # M
    continued: int  # keys of the sequences that continue another one, its own included
    mask: int  # numbers in the masks of those (only where there is no kernel)
    distillation: bool  # the KL with guided hidden states, else a policy loss
    first: bool  # of the update: there are no gradients yet


Moment = dict[str, float]  # what is alive -> bytes


def peak(moments: dict[str, Moment]) -> tuple[str, float]:
    """(name, bytes) of the largest moment."""
    name = max(moments, key=lambda name: sum(moments[name].values()))
    return name, sum(moments[name].values())


def widths(config: ModelConfig) -> tuple[int, int, int, int]:
    """(D, W, Q, KV)"""
    E = config.head_dim
    return config.hidden_size, config.intermediate_size, config.num_attention_heads * E, config.num_key_value_heads * E


def saved_per_token(config: ModelConfig, e: int, kernel: bool) -> float:
    """Bytes a token that autograd keeps of one block, e bytes a number."""
    D, W, Q, KV = widths(config)
    # a norm keeps x in fp32, x / rms in the compute dtype (in fp32: before the product with its weight), and its result,
    # which is the input of the projections
    norm = 12 * D if e == 4 else 8 * D
    # rotated queries and keys, values, the attention's result and its log-denominators; with one call a sequence the results
    # are put together and turned round in a second copy for the output projection
    attention = e * (2 * Q + 2 * KV + (0 if kernel else Q)) + 4 * config.num_attention_heads
    if config.qk_norm:
        attention += (8 if e == 4 else 6) * (Q + KV)
    return 2 * norm + 8 + attention + e * 4 * W  # gate, silu(gate), up, and their product


def working_per_token(config: ModelConfig, e: int) -> float:
    """Bytes a token that one block has at work in a forward pass without gradient."""
    D, W, Q, KV = widths(config)
    # the block's input, the residual stream and the norm's result, and beside them either silu(gate), up and their product, or
    # queries, keys, values and the attention's results
    return e * max(3 * D + 3 * W, 2 * D + 4 * Q + 2 * KV)


def resident(job: Job) -> Moment:
    """What a rank holds from the first step to the last."""
    if job.offload:
        return {}
    shard = job.shape.shard(job.shard_ranks)
    return {"weights, fp32 shard": 4.0 * shard, "AdamW's two moments, fp32 shard": 8.0 * shard}


def update_moment(job: Job, one: Pass, blocks: int, reduced: int, **terms: float) -> Moment:
    """What is alive in a pass with the activations of so many blocks kept, the gradients of so many parameters reduced in this
    pass, and further terms by their short names."""
    shape, e, T = job.shape, job.itemsize, one.tokens
    gradients = 0 if job.offload else 4 * shape.shard(job.shard_ranks)
    if one.first:
        gradients *= reduced / shape.parameters
    # FSDP keeps what it summed over the copies to the end of the pass; in a first pass that is the gradient itself
    again = 4 * reduced / job.shard_ranks if job.replicated and not one.first else 0
    return resident(job) | {
        "gradients, fp32 shard": gradients,
        "gradients summed over the copies": again,
        "embedding and head, gathered": shape.root * e,
        "gradient of the head": shape.head * e,
        "positions and attention masks": T * (2 * e * shape.config.head_dim + 8) + (0 if job.kernel else e * one.mask),
        "activations kept for the backward pass": blocks * kept_bytes(job, one),
    } | {TERMS[name]: nbytes for name, nbytes in terms.items()}  # fmt: skip


def saved_bytes(job: Job, one: Pass) -> float:
    """What autograd keeps of one block."""
    KV, e = widths(job.shape.config)[3], job.itemsize
    saved = one.tokens * saved_per_token(job.shape.config, e, job.kernel) + 2 * KV * e * one.continued
    # with a kernel all keys and values of a row with prefixes are gathered, and the projections' own are not kept
    return saved - (2 * KV * e * one.tokens if job.kernel and one.continued else 0)


def kept_bytes(job: Job, one: Pass) -> float:
    """What is kept of a block until its turn in the backward pass."""
    return one.tokens * job.shape.config.hidden_size * job.itemsize if job.recompute else saved_bytes(job, one)


def update_moments(job: Job, one: Pass) -> dict[str, Moment]:
    """What is alive at the moments of a forward and backward pass that can be the largest."""
    shape, e, T, several = job.shape, job.itemsize, one.tokens, job.shard_ranks > 1
    config, L, S, R = shape.config, shape.config.num_hidden_layers, shape.block, shape.root
    D, W, _, _ = widths(config)
    moment = partial(update_moment, job, one)
    ends, down = T * D * e, W * D * e
    hidden, norm = ends + 2 * one.targets * D * e, T * (8 * D if e == 4 else 6 * D)
    guided = one.targets * D * e if one.distillation else 0
    moments = {
        "loss at the head": moment(
            L, 0, chunks=chunk_bytes(job, one), hidden=hidden, guided=guided, gathered=S * e if several else 0, norm=norm
        )
    }
    for i in sorted({L - 1, max(L - 2, 0), min(1, L - 1), 0}):  # in between all terms change in proportion
        following = S * e if several and i > 0 else 0  # gathered ahead, in its flat buffer
        behind = S * (L - 1 - i)  # parameters of the blocks whose backward pass is over
        pending = 4 * S if behind else 0  # the fp32 input of a reduction is kept until the next block's
        block = f"block {i + 1} of {L}"
        at_mlp = T * (2 * W + D) * e + (saved_bytes(job, one) if job.recompute else 0)
        moments[f"backward pass of {block}, in its MLP"] = moment(
            i + 1, behind, gathered=S * e + following, work=at_mlp, block=down + pending
        )
        rest = i + job.recompute  # of what is kept
        at_norm = 2 * ends + 20 * T * D  # the norm works in fp32
        moments[f"backward pass of {block}, at its end"] = moment(
            rest, behind, gathered=S * e + following, work=at_norm, block=S * e + pending
        )
        moments[f"reduction of the gradients of {block}"] = moment(
            rest, behind, gathered=following, hidden=ends, block=reduction(job, S, W * D)
        )
    embedding = (R if config.tie_word_embeddings else R - shape.head) * e
    moments["gradient of the embedding"] = moment(0, S * L, hidden=ends, block=4 * S, embedding=embedding)
    shards = ("gradients, fp32 shard", "gradients summed over the copies")
    root = resident(job) | {name: moment(0, S * L)[name] for name in shards}
    return moments | {"reduction of the root's gradients": root | {TERMS["root"]: reduction(job, R, shape.head)}}


TERMS = {
    "chunks": "chunks of logits",
    "hidden": "hidden states and their gradient",
    "guided": "hidden states of the guided pass",
    "gathered": "blocks, gathered",
    "norm": "activations of the final norm",
    "work": "activations of the block at work",
    "block": "gradients of a block",
    "embedding": "gradient of the embedding",
    "root": "gradients of embedding and head",
}


def reduction(job: Job, numbers: int, largest_tensor: int) -> int | float:
    """Bytes while FSDP sums the gradients of so many parameters over the ranks, in fp32."""
    if job.shard_ranks == 1:  # no communication, but a copy, its quotient by 1, and the result
        return 12 * numbers
    # gradients, and the buffer that they are copied to; a CPU puts the pieces of a tensor together before it casts them
    copying = (job.itemsize + 4) * numbers + (0 if job.cuda or job.itemsize == 4 else job.itemsize * largest_tensor)
    return max(copying, 4 * numbers + 4 * numbers / job.shard_ranks)


def chunk_bytes(job: Job, one: Pass) -> float:
    """Bytes of one chunk of the head at its largest: fp32 tensors of (chunk_tokens, V)."""
    # policy: logits, log-probabilities, probabilities and their product for the entropy. KL: logits, both sides'
    # log-probabilities, the guided side's probabilities, the difference, the product, and the guided logits themselves
    tensors = 6 + job.itemsize / 4 if one.distillation else 4
    return tensors * 4.0 * min(job.chunk_tokens, one.targets) * job.shape.config.vocab_size


def sampling_moments(
    job: Job, *, pages: int, rows: int, prefill_tokens: int, prompts: int, scored_tokens: int
) -> dict[str, Moment]:
    """What is alive at the moments of sampling that can be the largest.

    pages of the KV cache; rows decoded at once; tokens and number of the prompts computed together; tokens of the pass that
    scores the guided trajectories afterwards, when the cache is gone.
    """
    shape, e = job.shape, job.itemsize
    config, D, V = shape.config, shape.config.hidden_size, shape.config.vocab_size
    base = resident(job) | {"whole weights in the compute dtype": shape.parameters * e}
    cache = base | {"KV cache": pages * page_bytes(config, e)}
    # of each logit: fp32 (a copy if the logits are bf16, divided by a temperature, or cut to a nucleus), its exponential, and
    # that once more in fp64, which the sum over a block of the vocabulary makes on the way
    drawn = V * (16 + (e if e != 4 or job.temperature != 1 or job.top_p < 1 else 0))
    # every size of a decode step that was captured keeps its logits
    graphs = sum(V * e * batch for batch in {padded_batch_size(n) for n in range(1, rows + 1)}) if job.cuda else 0
    forward = working_per_token(config, e) + 2 * e * config.head_dim + 8  # with cosines, sines and positions
    chunk = 8 * V * min(job.chunk_tokens, scored_tokens)  # fp32 logits and log-probabilities
    return {
        "gathering the weights": base | {"a block, being gathered": shape.block * e if job.shard_ranks > 1 else 0},
        "reading the prompts": cache | {"activations": prefill_tokens * forward},
        "drawing the first tokens": cache | {"logits": prompts * V * e + rows * drawn},
        "decoding": cache | {"logits": rows * drawn + graphs},
        "scoring the guided trajectories": base | {"activations": scored_tokens * forward},
        "their log-probabilities": base | {"hidden states": 2 * scored_tokens * D * e, "chunks of logits": chunk},
    }


def page_bytes(config: ModelConfig, e: int) -> int:
    """Bytes of a page of the KV cache, all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * PAGE * e


# ---------------------------------------------------------------------------------------------------- what fits


@dataclass(frozen=True)
class Cache:
    """The KV cache of a rank, in pages."""

    wanted: int  # what rollout.generate asks for
    room: int  # what there is place for: --cache_tokens, or 90 % of the free memory
    enough: int  # with that many no row ever waits or is preempted
    least: int  # with fewer, generate refuses the longest prompt

    @property
    def given(self) -> int:
        return min(self.wanted, self.room)


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU: what is alive at the moments that can be the largest, and the KV cache."""

    sampling: dict[str, Moment]
    update: dict[str, Moment]
    cache: Cache
    budget: float  # bytes of a GPU that tensors may take

    @property
    def refusals(self) -> list[str]:
        """Which parts of a run cannot work."""
        too_large = {
            "sampling": peak(self.sampling)[1] > self.budget or self.cache.given < self.cache.least,
            "update": peak(self.update)[1] > self.budget,
        }
        return [part for part, misfit in too_large.items() if misfit]


def job_of(shape: Shape, settings: Settings, gpus: int) -> Job:
    shard_ranks = settings.shard_ranks or gpus
    if shard_ranks > gpus or gpus % shard_ranks:
        raise ValueError(f"--shard_ranks {shard_ranks} does not divide the {gpus} GPUs")
    return Job(
        shape=shape,
        itemsize=itemsize_of(settings),
        shard_ranks=shard_ranks,
        replicated=shard_ranks < gpus,
        kernel=itemsize_of(settings) == 2,
        cuda=True,
        recompute=settings.recompute,
        offload=settings.offload,
        chunk_tokens=settings.chunk_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
    )


def itemsize_of(settings: Settings) -> int:
    return 4 if settings.dtype == "float32" else 2


def groups_of(settings: Settings, workload: Workload, gpus: int) -> list[tuple[int, int]]:
    """(tokens of the prompt, responses) of every prompt that the busiest rank samples from in a step."""
    problems = math.ceil(settings.problems_per_step / gpus)
    variant = METHODS[settings.method]
    groups = [(workload.prompt_tokens, settings.group_auto - variant.solution_in_group)] * problems
    if variant.guided:
        groups += [(workload.guided_prompt_tokens, settings.group_guided)] * problems
    return groups


def longest_response(shape: Shape, settings: Settings, prompt: int) -> int:
    return min(settings.max_new_tokens, shape.config.max_position_embeddings - prompt)


def passes_of(shape: Shape, settings: Settings, workload: Workload) -> list[Pass]:
    """The largest passes of an update. A micro-batch has --micro_tokens, or one trajectory that is longer than that."""
    prompt, guided = workload.prompt_tokens, workload.guided_prompt_tokens
    if METHODS[settings.method].guided and not METHODS[settings.method].distills:
        prompt = guided  # hinted: the guided group may be in the policy loss
    longest = longest_response(shape, settings, prompt)
    solution = workload.solution_tokens if METHODS[settings.method].demonstrates else 0
    warm_up = min(settings.sft_max_tokens, shape.config.max_position_embeddings) if settings.sft_fraction else 0
    T = max(settings.micro_tokens, prompt + longest, prompt + solution, warm_up)
    # each response of the mean length is a sequence that continues its prompt
    sequences = math.ceil(T / min(workload.mean_response, longest))
    mask = sequences * (T // sequences) * (T // sequences + prompt)
    passes = [Pass(T, T, T + sequences * prompt, mask, distillation=False, first=False)]
    if METHODS[settings.method].distills:  # a target counts with both its contexts, and each response once under either
        T = max(settings.micro_tokens // 2, max(prompt, guided) + longest)
        passes.append(Pass(T, T, 0, 0, distillation=True, first=False))  # each prompt has one response: nothing is continued
    return passes


def memory_of(shape: Shape, settings: Settings, workload: Workload, gpus: int, budget: float) -> Memory:
    job, groups = job_of(shape, settings, gpus), groups_of(settings, workload, gpus)
    e, longest = job.itemsize, longest_response(shape, settings, max(prompt for prompt, _ in groups))
    update: dict[str, Moment] = {}
    for one in passes_of(shape, settings, workload):
        kind = "KL" if one.distillation else "policy loss"
        update |= {f"{name} ({kind})": moment for name, moment in update_moments(job, one).items()}
    rows = min(settings.max_rows, sum(n for _, n in groups))
    single = [pages_for(prompt) + pages_for(longest) + 1 for prompt, _ in groups]
    free = budget - sum(resident(job).values()) - shape.parameters * e
    room = settings.cache_tokens // PAGE or max(int(0.9 * free / page_bytes(shape.config, e)), 0)
    cache = Cache(
        wanted=sum(single) + pages_for(longest) * rows,
        room=room,
        enough=sum(pages_for(prompt) for prompt, _ in groups) + pages_for(longest) * rows,
        least=max(single),
    )
    if settings.cache_tokens:  # the size that was asked for is taken whole, needed or not
        cache = replace(cache, wanted=room)
    prompt_tokens = sum(prompt for prompt, _ in groups)
    sampling = sampling_moments(
        job,
        pages=cache.given,
        rows=rows,
        prefill_tokens=min(prompt_tokens, max(PREFILL_TOKENS, max(prompt for prompt, _ in groups))),
        prompts=len(groups),
        scored_tokens=max(settings.micro_tokens, workload.prompt_tokens + longest) if METHODS[settings.method].distills else 0,
    )
    return Memory(sampling, update, cache, budget)


def largest(fits: Callable[[int], bool], high: int, step: int = 1) -> int:
    """The largest multiple of step up to high that fits, 0 where none does; what is smaller than one that fits, fits too."""
    low, high = 0, high // step
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle - 1)
    return low * step


def largest_response(shape: Shape, settings: Settings, workload: Workload, gpus: int, budget: float) -> int:
    """The longest response at the given rows with which everything fits and no row ever waits for the cache."""

    def fits(tokens: int) -> bool:
        memory = memory_of(shape, replace(settings, max_new_tokens=tokens), workload, gpus, budget)
        return not memory.refusals and memory.cache.room >= memory.cache.enough

    return largest(fits, shape.config.max_position_embeddings - workload.prompt_tokens, PAGE)


def largest_rows(shape: Shape, settings: Settings, workload: Workload, gpus: int, budget: float) -> int:
    """How many rows of the full length can be decoded at once without one that waits for the cache."""
    job, groups = job_of(shape, settings, gpus), groups_of(settings, workload, gpus)
    own = pages_for(longest_response(shape, settings, max(prompt for prompt, _ in groups)))
    room = memory_of(shape, settings, workload, gpus, budget).cache.room

    def fits(rows: int) -> bool:
        pages = sum(pages_for(prompt) for prompt, _ in groups) + rows * own
        moments = sampling_moments(job, pages=pages, rows=rows, prefill_tokens=0, prompts=len(groups), scored_tokens=0)
        return pages <= room and peak(moments)[1] <= budget

    return largest(fits, 65536)


def remedies(shape: Shape, settings: Settings, workload: Workload, gpus: int, budget: float) -> list[tuple[Settings, int]]:
    """Settings and numbers of GPUs with which everything fits: one change each where one is enough, else several together,
    else more GPUs; empty where nothing helps. A number is lowered as far as it must be and no further."""

    def refusals(changed: Settings, on: int = gpus) -> list[str]:
        return memory_of(shape, changed, workload, on, budget).refusals

    def reduced(start: Settings, name: str, step: int, high: int = 0) -> Settings:
        """Lowered until it helps as much as it can; unchanged where it does not help at all."""
        least, now = refusals(replace(start, **{name: step})), refusals(start)
        if least == now:
            return start
        fits = largest(lambda v: set(refusals(replace(start, **{name: v}))) <= set(least), high or getattr(start, name), step)
        return replace(start, **{name: fits or step})

    def smaller_cache(start: Settings) -> Settings:
        """Less than 90 % of the free memory, so that prompts and logits find a place beside it."""
        cache = memory_of(shape, start, workload, gpus, budget).cache
        tokens = largest(
            lambda v: v < cache.least * PAGE or "sampling" not in refusals(replace(start, cache_tokens=v)),
            cache.given * PAGE, PAGE,
        )  # fmt: skip
        return replace(start, cache_tokens=tokens) if cache.least * PAGE <= tokens < cache.given * PAGE else start

    ways: list[Callable[[Settings], Settings]] = [
        lambda s: replace(s, recompute=True),
        lambda s: replace(s, shard_ranks=0),
        lambda s: replace(s, cache_tokens=0),
        lambda s: reduced(s, "micro_tokens", 256),
        lambda s: reduced(s, "chunk_tokens", 32),
        smaller_cache,
        lambda s: reduced(s, "max_rows", 8),
        lambda s: reduced(s, "max_new_tokens", PAGE),
        lambda s: replace(s, offload=True),
    ]
    alone = [changed for changed in (way(settings) for way in ways) if changed != settings and not refusals(changed)]
    if alone:
        return [(changed, gpus) for changed in alone]
    changed = settings
    for way in ways:
        changed = way(changed)
        if not refusals(changed):
            for field in dataclasses.fields(Settings):  # what turned out not to be needed is taken back
                without = replace(changed, **{field.name: getattr(settings, field.name)})
                changed = changed if refusals(without) else without
            return [(changed, gpus)]
    lean = replace(settings, recompute=True, shard_ranks=0)
    return [(lean, n * gpus) for n in (2, 4, 8, 16) if not refusals(lean, n * gpus)][:1]


def flags_between(before: Settings, after: Settings) -> str:
    """The flags that turn one into the other."""
    changed = [(f.name, getattr(after, f.name)) for f in dataclasses.fields(Settings)]
    changed = [(name, value) for name, value in changed if value != getattr(before, name)]
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in changed)


# ---------------------------------------------------------------------------------------------------- time


def response_lengths(count: int, mean: float, longest: int) -> list[int]:
    """`count` lengths that stand for a rank's responses, ascending, the last one the longest.

    They are the quantiles of the distribution on (0, longest] of largest entropy with this mean: density proportional to
    exp(-r t), r by bisection. It needs no third number; r is negative where the mean is above the middle.
    """
    mean = min(mean, float(longest))
    if mean >= longest - 1:
        return [longest] * count

    def mean_at(x: float) -> float:  # x = r * longest; the mean in units of longest
        return 0.5 - x / 12 if abs(x) < 1e-4 else 1 / x - (1 / math.expm1(x) if x < 700 else 0.0)

    low, high = -700.0, 1e6  # exp(700) is near the largest float
    for _ in range(100):
        x = (low + high) / 2
        low, high = (x, high) if mean_at(x) > mean / longest else (low, x)
    shares = [(i + 0.5) / count for i in range(count)]
    if abs(x) < 1e-4:
        lengths = [u * longest for u in shares]
    else:
        lengths = [-math.log1p(u * math.expm1(-x)) / x * longest for u in shares]
    lengths = [min(max(round(length), 1), longest) for length in lengths]
    return [*lengths[:-1], longest]


def decode_seconds(rows: Sequence[tuple[int, int]], places: int, step: Callable[[int, float], float]) -> float:
    """Seconds to decode rows of (prompt, response) tokens, at most `places` at once; the next one takes a free place at once.

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
    """Operations of one forward pass over sequences of (tokens that are there already, new tokens): two for each number of a
    matrix and new token, 4 Q a layer for each pair of a query and a key that it sees, and the head."""
    pairs = sum(new * before + new * (new + 1) / 2 for before, new in spans)
    attention = 4 * widths(shape.config)[2] * shape.config.num_hidden_layers * pairs
    return 2 * shape.matrices * sum(new for _, new in spans) + attention + 2 * shape.head * head_tokens


def exchange_seconds(nbytes: float, ranks: int, hardware: Hardware) -> float:
    """An all-gather of so many bytes in all, or a reduce-scatter, over ranks that fill nodes one after the other: the slower of
    what a GPU exchanges within its node and what the node's GPUs together exchange with others."""
    here = min(ranks, hardware.node_gpus)
    nodes = ranks / here
    within = nbytes * (here - 1) / here / hardware.link_in_node
    return max(within, nbytes * (nodes - 1) / nodes / (here * hardware.link_between_nodes))


def traffic_seconds(job: Job, hardware: Hardware, gpus: int, gathers: int, reductions: int) -> dict[str, float]:
    """Seconds of so many gathers of all weights and reductions of all gradients."""
    parameters, ranks = job.shape.parameters, job.shard_ranks
    gather = exchange_seconds(parameters * job.itemsize, ranks, hardware)
    scatter = exchange_seconds(4 * parameters, ranks, hardware)
    replicas = gpus // ranks
    link = hardware.link_between_nodes if gpus > hardware.node_gpus else hardware.link_in_node
    scatter += 2 * 4 * parameters / ranks * (replicas - 1) / replicas / link  # HSDP: an all-reduce of the shards
    seconds = {"all-gathers": gathers * gather, "reduce-scatters": reductions * scatter}
    if job.offload:
        shard = 4 * parameters / ranks
        seconds["host link"] = (gathers + reductions) * shard / hardware.host_link
    return seconds


def optimizer_seconds(job: Job, hardware: Hardware, gpus: int) -> float:
    """AdamW reads four fp32 numbers a parameter and writes three."""
    nbytes = 28 * job.shape.parameters / job.shard_ranks
    if job.offload:
        return nbytes * min(gpus, hardware.node_gpus) / hardware.host_bandwidth
    return nbytes / hardware.memory_bandwidth


def sampling_seconds(memory: Memory, shape: Shape, settings: Settings, workload: Workload, hardware: Hardware, gpus: int):
    """{part: seconds} of the sampling of a step, by the busiest rank."""
    job, groups, config = job_of(shape, settings, gpus), groups_of(settings, workload, gpus), shape.config
    longest = longest_response(shape, settings, max(prompt for prompt, _ in groups))
    lengths = response_lengths(sum(n for _, n in groups), workload.mean_response, longest)
    prompts = [prompt for prompt, n in groups for _ in range(n)]
    # a fixed order that is not sorted: each group has short and long ones
    order = sorted(range(len(lengths)), key=lambda i: (i * 0.6180339887498949) % 1)
    rows = [(prompt, lengths[i]) for prompt, i in zip(prompts, order, strict=True)]
    mean = sum(lengths) / len(lengths)
    held = (memory.cache.given - sum(pages_for(prompt) for prompt, _ in groups)) // pages_for(math.ceil(mean))
    places = max(min(settings.max_rows, held), 1)
    # an untied embedding is looked up and not read; every row reads its prompt's pages for itself
    weights = (shape.parameters - (0 if config.tie_word_embeddings else shape.head)) * job.itemsize
    token = page_bytes(config, job.itemsize) / PAGE

    def step(alive: int, tokens: float) -> float:
        read = (weights + tokens * token) / (hardware.memory_bandwidth * hardware.decode_share)
        pairs = 4 * widths(config)[2] * config.num_hidden_layers * tokens
        products = (2 * (shape.matrices + shape.head) * alive + pairs) / (hardware.flops * hardware.decode_share)
        return max(read, products) + hardware.decode_overhead

    prefill = forward_flops(shape, [(0, prompt) for prompt, _ in groups], len(groups))
    gather = traffic_seconds(job, hardware, gpus, gathers=1, reductions=0)
    return {
        "gathering the whole weights": sum(gather.values()),
        "reading the prompts": prefill / (hardware.flops * hardware.prefill_share),
        "decoding": decode_seconds(rows, places, step),
    }


def update_seconds(shape: Shape, settings: Settings, workload: Workload, hardware: Hardware, gpus: int) -> dict[str, float]:
    """{part: seconds} of scoring and of the update of a step, by the busiest rank."""
    job, prompt = job_of(shape, settings, gpus), workload.prompt_tokens
    problems = math.ceil(settings.problems_per_step / gpus)
    longest = longest_response(shape, settings, prompt)
    lengths = response_lengths(settings.group_auto * problems, workload.mean_response, longest)
    mean = sum(lengths) / len(lengths)
    policy = forward_flops(shape, [(0, prompt)] * problems + [(prompt, n) for n in lengths], sum(lengths))
    blocks = 1 if settings.recompute else 0  # what is computed once more, the head not among it
    trained = 3 * policy + blocks * (policy - 2 * shape.head * sum(lengths))
    passes = math.ceil((problems * prompt + sum(lengths)) / settings.micro_tokens)
    scored, gathers, reductions, plain = 0.0, 2 * passes, passes, 0.0
    if METHODS[settings.method].distills:
        J, response = settings.group_guided, round(mean)
        spans = [(0, prompt), *[(prompt, response)] * J]
        scored = problems * forward_flops(shape, spans, J * response)
        one = problems * forward_flops(shape, [(0, prompt + response)], response)
        plain = problems * forward_flops(shape, [(0, workload.guided_prompt_tokens + response)], response)
        trained += 3 * one + blocks * (one - 2 * shape.head * response * problems)
        both = math.ceil(problems * (prompt + workload.guided_prompt_tokens + 2 * response) / settings.micro_tokens)
        gathers, reductions = gathers + 3 * both, reductions + both
    traffic = traffic_seconds(job, hardware, gpus, gathers, reductions)
    products = plain / (hardware.flops * hardware.prefill_share) + trained / (hardware.flops * hardware.update_share)
    return {
        "scoring the guided trajectories": scored / (hardware.flops * hardware.prefill_share),
        "update, products": products,
        **{f"update, {name}": value for name, value in traffic.items()},
        # FSDP gathers and reduces while others compute: the longer of the two counts
        "update": max(products, sum(traffic.values())) + settings.minibatches * optimizer_seconds(job, hardware, gpus),
    }


def sft_seconds(shape: Shape, settings: Settings, workload: Workload, hardware: Hardware, gpus: int) -> float:
    """Seconds of the whole SFT warm-up, with its validation."""
    job = job_of(shape, settings, gpus)
    solutions = round(settings.sft_fraction * workload.problems)
    held_out = round(settings.sft_validation * solutions)
    updates = math.ceil((solutions - held_out) * settings.sft_epochs / settings.sft_batch)
    if not updates:
        return 0.0
    each = math.ceil(settings.sft_batch / gpus)  # of the busiest rank
    tokens = workload.prompt_tokens + workload.solution_tokens
    one = forward_flops(shape, [(0, tokens)], workload.solution_tokens)
    flops = each * one * (3 + settings.recompute)
    passes = math.ceil(each * tokens / settings.micro_tokens)
    traffic = sum(traffic_seconds(job, hardware, gpus, 2 * passes, passes).values())
    update = max(flops / (hardware.flops * hardware.update_share), traffic) + optimizer_seconds(job, hardware, gpus)
    validation = settings.sft_epochs * math.ceil(held_out / gpus) * one / (hardware.flops * hardware.prefill_share)
    return updates * update + validation


# ---------------------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Plan:
    """All numbers of a plan. Memory in bytes a GPU; seconds of one step's parts, by the busiest rank."""

    shape: Shape
    settings: Settings
    workload: Workload
    hardware: Hardware
    gpus: int
    memory: Memory
    remedies: list[tuple[Settings, int]]  # what to change, and GPUs; empty where everything fits, or where nothing helps
    largest_response: int  # where the settings do not fit: after the first remedy
    largest_rows: int
    sampling: dict[str, float]
    update: dict[str, float]
    step_tokens: int  # sampled in a step, over all ranks
    step_s: float
    steps: int
    sft_s: float

    @property
    def hours(self) -> float:
        return (self.sft_s + self.steps * self.step_s) / 3600


def make_plan(
    config: ModelConfig, settings: Any, *, gpus: int, gpu_memory: float, workload: Workload = Workload(),
    hardware: Hardware = Hardware(),
) -> Plan:  # fmt: skip
    """The plan of a run on so many GPUs of gpu_memory GB each. `settings`: Settings, or train.Config.

    ValueError for settings that no run could use.
    """
    settings = Settings(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(Settings)})
    check(config, settings, workload, gpus, gpu_memory, hardware)
    shape, budget = shape_of(config), (gpu_memory - hardware.reserve_gb) * GB
    memory = memory_of(shape, settings, workload, gpus, budget)
    helps = remedies(shape, settings, workload, gpus, budget) if memory.refusals else []
    able = (shape, helps[0][0] if helps else settings, workload, helps[0][1] if helps else gpus, budget)
    sampling = sampling_seconds(memory, shape, settings, workload, hardware, gpus)
    update = update_seconds(shape, settings, workload, hardware, gpus)
    problems = round((1 - settings.sft_fraction) * workload.problems)
    counted = sum(n for _, n in groups_of(settings, workload, gpus=settings.problems_per_step))
    mean = min(workload.mean_response, longest_response(shape, settings, workload.prompt_tokens))
    return Plan(
        shape=shape,
        settings=settings,
        workload=workload,
        hardware=hardware,
        gpus=gpus,
        memory=memory,
        remedies=helps,
        largest_response=largest_response(*able),
        largest_rows=largest_rows(*able),
        sampling=sampling,
        update=update,
        step_tokens=round(counted * settings.problems_per_step * mean),
        step_s=sum(sampling.values()) + update["scoring the guided trajectories"] + update["update"],
        steps=settings.steps or math.ceil(settings.epochs * problems / settings.problems_per_step),
        sft_s=sft_seconds(shape, settings, workload, hardware, gpus),
    )


def check(
    config: ModelConfig, settings: Settings, workload: Workload, gpus: int, gpu_memory: float, hardware: Hardware
) -> None:
    """ValueError naming the first setting that cannot be planned with."""
    counts = "group_auto group_guided max_new_tokens max_rows problems_per_step minibatches micro_tokens chunk_tokens sft_batch"
    values = [(name, getattr(settings, name)) for name in counts.split()]
    values += [(field.name, getattr(part, field.name)) for part in (workload, hardware) for field in dataclasses.fields(part)]
    for name, value in [("gpus", gpus), ("gpu_memory", gpu_memory), *values]:
        if not value > 0 and name != "reserve_gb":
            raise ValueError(f"--{name} {value}: must be positive")
    sampling = [name for name, variant in METHODS.items() if variant.advantages]
    if settings.method not in sampling:
        raise ValueError(f"--method {settings.method}: only methods that sample are planned ({', '.join(sampling)})")
    if settings.dtype not in ("auto", "bfloat16", "float32"):
        raise ValueError(f"--dtype {settings.dtype}: must be auto, bfloat16 or float32")
    if not 0 <= hardware.reserve_gb < gpu_memory:
        raise ValueError(f"--reserve_gb {hardware.reserve_gb}: must be within 0 and the {gpu_memory} GB of a GPU")
    if not 0 <= settings.sft_fraction < 1:
        raise ValueError(f"--sft_fraction {settings.sft_fraction}: must be at least 0, and below 1 so that RL has problems")
    prompt = max(workload.prompt_tokens, workload.guided_prompt_tokens)
    if prompt >= config.max_position_embeddings:
        raise ValueError(f"a prompt of {prompt} tokens leaves no room in a context of {config.max_position_embeddings}")
    if gpus > hardware.node_gpus and gpus % hardware.node_gpus:
        raise ValueError(f"--gpus {gpus}: nodes of {hardware.node_gpus} GPUs are taken whole")


def plan_text(config: ModelConfig, settings: Any, *, name: str = "model", source: str = "", **where: Any) -> str:
    """make_plan in words; `where`: its keyword arguments. `name` and `source` say which model, and where its shape is from."""
    plan = make_plan(config, settings, **where)
    parts = [_head_lines(plan, name, source)] + [
        lines(plan) for lines in (_memory_lines, _verdict_lines, _time_lines, _assumption_lines)
    ]
    return "\n".join(line for part in parts for line in [*part, ""]).rstrip()


def _head_lines(plan: Plan, name: str, source: str) -> list[str]:
    shape, settings = plan.shape, plan.settings
    ranks = settings.shard_ranks or plan.gpus
    copies = f"{plan.gpus // ranks} copies of {ranks} shards each" if ranks < plan.gpus else f"{ranks} shards"
    return [
        f"{name}: {shape.parameters:,} parameters, {shape.config.num_hidden_layers} blocks of {shape.block:,}, "
        f"{shape.root:,} in embedding, final norm and head",
        *([f"shape from {source}"] if source else []),
        f"{plan.gpus} GPUs, {copies}{', offloaded to host memory' if settings.offload else ''}; "
        f"{plan.memory.budget / GB:.1f} GB a GPU for tensors",
    ]


def _memory_lines(plan: Plan) -> list[str]:
    lines = ["memory of one GPU, in GB, at the largest moment of each part (not measured on a GPU)"]
    memory = plan.memory
    for part, moments in (("sampling", memory.sampling), ("update", memory.update)):
        name, total = peak(moments)
        lines.append(f"  {part}, {name}: {total / GB:.1f}")
        lines += [f"    {nbytes / GB:8.2f}  {term}" for term, nbytes in moments[name].items() if nbytes]
        others = sorted(((sum(m.values()), n) for n, m in moments.items() if n != name), reverse=True)[:3]
        lines.append("    smaller: " + "; ".join(f"{other} {nbytes / GB:.1f}" for nbytes, other in others))
    if plan.settings.offload:
        here = min(plan.gpus, plan.hardware.node_gpus)
        shard = plan.shape.shard(plan.settings.shard_ranks or plan.gpus)
        lines.append(f"  host memory of a node, for weights, gradients and optimizer states: {16 * shard * here / GB:.0f}")
    return lines


def _verdict_lines(plan: Plan) -> list[str]:
    memory, settings, cache, lines = plan.memory, plan.settings, plan.memory.cache, []
    for part in memory.refusals:
        moments = {"sampling": memory.sampling, "update": memory.update}[part]
        name, total = peak(moments)
        term, nbytes = max(moments[name].items(), key=lambda item: item[1])
        why = f"{name}: {total / GB:.1f} GB where {memory.budget / GB:.1f} are; the largest term: {term}, {nbytes / GB:.1f} GB"
        if part == "sampling" and cache.given < cache.least:
            held = f"{cache.given * PAGE:,} tokens, and one prompt with its response needs {cache.least * PAGE:,}"
            why = f"the KV cache would hold {held}"
        lines.append(f"DOES NOT FIT: {part}, {why}")
    ways = []
    for changed, gpus in plan.remedies:
        more = f"--gpus {gpus}" if gpus != plan.gpus else ""
        ways.append(f"{more} {flags_between(settings, changed)}".strip())
    lines += [f"  it fits with {way}" for way in ways]
    if memory.refusals and not ways:
        return [*lines, "  nothing that train.py has a flag for makes it fit, nor 16 times as many GPUs"]
    able, gpus = plan.remedies[0] if plan.remedies else (settings, plan.gpus)
    rows = min(able.max_rows, sum(n for _, n in groups_of(able, plan.workload, gpus)))
    if not memory.refusals:
        page = page_bytes(plan.shape.config, itemsize_of(settings)) / GB
        texts = f"{rows} rows of {settings.max_new_tokens:,} tokens with their prompts"
        need = f"{texts} take a KV cache of {cache.enough * page:.1f} GB"
        waits = cache.room < cache.enough
        lines.append(f"fits, but rows may wait: {need}" if waits else f"fits, and no row ever waits: {need}")
        lines.append(f"  there is room for {cache.room * page:.1f} GB of it; train.py takes {cache.given * page:.1f}")
    after = f" (with {ways[0]})" if ways else ""
    if plan.largest_response:
        lines.append(f"  longest --max_new_tokens so that none of {rows} rows ever waits{after}: {plan.largest_response:,}")
    else:
        lines.append(f"  {rows} rows at once wait for the cache with any --max_new_tokens{after}")
    length = f"{able.max_new_tokens:,}"
    return [*lines, f"  most rows at once of {length} tokens so that none ever waits{after}: {plan.largest_rows:,}"]


def _time_lines(plan: Plan) -> list[str]:
    as_if = " (as if it did fit)" if plan.memory.refusals else ""
    lines = [f"seconds of a step, estimated{as_if}: {plan.step_s:.1f} for {plan.step_tokens:,} sampled tokens"]
    lines += [f"    {seconds:8.2f}  {part}" for part, seconds in plan.sampling.items()]
    lines += [f"    {seconds:8.2f}  {part}" for part, seconds in plan.update.items() if not part.startswith("update, ")]
    inside = [f"{part.removeprefix('update, ')} {s:.2f}" for part, s in plan.update.items() if part.startswith("update, ")]
    lines.append("    in the update: " + ", ".join(inside) + "; exchanges overlap with products, the longer sum counts")
    hours, steps, tokens = plan.hours, plan.steps, plan.steps * plan.step_tokens
    lines.append(
        f"the recipe: SFT warm-up {plan.sft_s / 3600:.1f} h, then {steps:,} steps with {tokens:.3g} sampled tokens: "
        f"{hours:.1f} h on {plan.gpus} GPUs, {hours * plan.gpus:.0f} GPU hours"
    )
    lines.append(f"  for comparison, {PAPER}; its responses are 2.7K to 5.0K tokens, its GPUs are not named")
    return lines


def _assumption_lines(plan: Plan) -> list[str]:
    lines = ["assumed (each is a flag)"]
    for part in (plan.workload, plan.hardware, plan.settings):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            shown = f"{value:.4g}" if isinstance(value, float) else f"{value}"
            lines.append(f"  --{field.name:22}{shown:>10}  {field.metadata['help']}")
    return [
        *lines,
        "assumed (no flags): every micro-batch is full, and not the update's first; all groups have a gradient, all problems a",
        "target; each rank is as busy as the busiest and has one response of the full length; nothing waits for the grader; no",
        "evaluation, no checkpoints; float32 on a GPU is counted as on a CPU",
    ]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--config", help="a config.json, or a folder with one")
    model.add_argument("--model", help="the same, or org/name, or a known family's bare name")
    add_flags(parser, Settings, Workload, Hardware)
    return parser.parse_args(arguments)


def add_flags(parser: argparse.ArgumentParser, *parts: type) -> None:
    """--gpus, --gpu_memory, and a flag for each field of the parts (Settings, Workload, Hardware)."""
    parser.add_argument("--gpus", type=int, default=8, help="in all, over all nodes (default: 8)")
    parser.add_argument("--gpu_memory", type=float, default=80.0, help="GB of one GPU (default: 80)")
    for field in (field for part in parts for field in dataclasses.fields(part)):
        text = f"{field.metadata['help']} (default: {field.default!r})".replace("%", "%%")
        kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": field.type}
        parser.add_argument(f"--{field.name}", default=field.default, help=text, **kind)


def from_flags(args: argparse.Namespace, part: type) -> Any:
    """A Settings, Workload or Hardware of the flags that add_flags made."""
    return part(**{field.name: getattr(args, field.name) for field in dataclasses.fields(part)})


def print_plan(args: argparse.Namespace, name: str, settings: Any) -> None:
    """The plan for a model's name, in words; exit status 1 with the reason where there is none."""
    where = dict(workload=from_flags(args, Workload), hardware=from_flags(args, Hardware))
    try:
        config, source = model_config(name)
        where |= dict(gpus=args.gpus, gpu_memory=args.gpu_memory)
        print(plan_text(config, settings, name=name, source=source, **where))
    except ValueError as error:
        sys.exit(f"error: {error}")


def plan_run(arguments: Sequence[str], parse_config: Callable[[Sequence[str]], Any]) -> None:
    """train.py --plan: the plan of a run with train.py's flags, which parse_config reads; beside them there are Workload's and
    Hardware's, for the lengths of the texts and the speeds of the machine."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--plan", action="store_true")
    add_flags(parser, Workload, Hardware)
    args, rest = parser.parse_known_args(arguments)
    settings = parse_config(rest)
    print_plan(args, settings.model, settings)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    print_plan(args, args.config or args.model, from_flags(args, Settings))


if __name__ == "__main__":
    main()
