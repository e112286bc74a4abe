"""The policy network: one explicit decoder for Qwen2 / Qwen2.5, Qwen3 (dense) and Llama-family checkpoints.

A pre-norm transformer with rotary positions, grouped-query attention and a gated MLP. It is built from a Hugging Face
`config.json`, filled from safetensors, and saved as a folder that transformers, vLLM and this file can load. Modules have the
names of the checkpoint's tensors. No mixture of experts, no sliding windows, no quantised weights.

One forward serves three layouts, told apart by arguments and never by token values:

    model(ids)                          plain     every row is one sequence
    model(ids, lengths=[...])           packed    one row holds several sequences end to end (training, prefill);
                                                  with prefixes=[...] some of them continue an earlier one
    model(ids, positions, cache=view)   decode    one new token a row; the earlier ones are in the sampler's cache

Imports no sibling: copy this file alone. Axes: B rows, T tokens, D width, H query heads, K key/value heads, E head width,
V vocabulary.
"""

import inspect
import itertools
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial, wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}  # by model_type
SIZES = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings".split()
LLAMA3_ROPE = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
MARK = "\ue000"  # takes a text's place while a chat template is rendered: a character for private use, in no template
KNOWN_FAMILIES = (("qwen", "Qwen"), ("meta-llama", "meta-llama"), ("llama", "meta-llama"), ("smollm", "HuggingFaceTB"))


# ---------------------------------------------------------------------------------------------------- configuration

@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder, in the field names of Hugging Face's config.json. `rope` holds rope_theta, rope_type and, for
    llama3, its four scaling numbers. `raw` and `generation` are the two JSON files as they were read: save_model writes every
    field of theirs back."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    initializer_range: float
    rope: dict[str, Any]
    eos_ids: tuple[int, ...]
    raw: dict[str, Any] = field(repr=False)
    generation: dict[str, Any] = field(repr=False)

    @staticmethod
    def from_dict(raw: dict[str, Any], generation: dict[str, Any] | None = None) -> "ModelConfig":
        """From the fields of config.json and generation_config.json. ValueError for what this decoder would compute wrongly."""
        family = raw.get("model_type")
        generation = dict(generation or {})
        if family not in ARCHITECTURES:
            raise ValueError(f"unsupported architecture model_type={family!r}; supported: {', '.join(ARCHITECTURES)}")
        if raw.get("hidden_act", "silu") != "silu":
            raise ValueError(f"unsupported hidden_act={raw['hidden_act']!r}; supported: silu")
        windowed = "sliding_attention" in (raw.get("layer_types") or ())
        if windowed or (raw.get("use_sliding_window") and raw.get("sliding_window")):
            raise ValueError("sliding-window attention is not supported; set use_sliding_window to false if the context allows")
        if raw.get("quantization_config"):
            raise ValueError("quantised weights are not supported; take the checkpoint's bf16 or fp32 version")
        attention_bias = raw.get("attention_bias", False)
        for name in (*SIZES, "rms_norm_eps"):
            if name not in raw:
                raise ValueError(f"the field {name!r} is missing")
            if name in SIZES and (type(raw[name]) is not int or raw[name] < 1):
                raise ValueError(f"{name}={raw[name]!r} must be a positive whole number")
        return ModelConfig(
            **{name: raw[name] for name in ("model_type", "rms_norm_eps", *SIZES)},
            num_key_value_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
            head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            qkv_bias=True if family == "qwen2" else attention_bias,  # Qwen2 always has the three biases and no switch
            out_bias=False if family == "qwen2" else attention_bias,
            mlp_bias=raw.get("mlp_bias", False) if family == "llama" else False,
            qk_norm=family == "qwen3",
            initializer_range=raw.get("initializer_range", 0.02),
            rope=_rope_settings(raw),
            eos_ids=_merge_ids(generation.get("eos_token_id"), raw.get("eos_token_id")),
            raw=dict(raw),
            generation=generation,
        )

    @staticmethod
    def from_folder(folder: Path) -> "ModelConfig":
        """Read config.json and, if there is one, generation_config.json of a model folder."""
        file, second = folder / "config.json", folder / "generation_config.json"
        raw, generation = _read_json(file), _read_json(second) if second.is_file() else {}
        try:
            return ModelConfig.from_dict(raw, generation)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error


def _rope_settings(raw: dict[str, Any]) -> dict[str, Any]:
    """One dict from both spellings: `rope_parameters` of transformers 5, and before it `rope_theta` and `rope_scaling`."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", raw.get("rope_theta", 10000.0))
    if rope["rope_type"] not in ("default", "llama3"):
        raise ValueError(f"unsupported rope_type={rope['rope_type']!r}; supported: default, llama3")
    numbers = {"rope_theta"} | (LLAMA3_ROPE if rope["rope_type"] == "llama3" else set())
    for name in numbers | {name for name, value in rope.items() if isinstance(value, dict)}:  # settings by the kind of layer
        if not isinstance(rope.get(name), int | float):
            raise ValueError(f"unsupported rope setting {name}={rope.get(name)!r}; supported: a number")
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor")) not in (None, 1.0):
        raise ValueError("partial rotary embeddings are not supported")
    return rope


def _merge_ids(*sources: int | Sequence[int] | None) -> tuple[int, ...]:
    """The end-of-sequence ids of all sources, each once. Qwen2.5-Instruct needs both of its two."""
    lists = (source if isinstance(source, list | tuple) else [source] for source in sources if source is not None)
    ids = tuple(dict.fromkeys(itertools.chain(*lists)))
    if wrong := [index for index in ids if type(index) is not int or index < 0]:
        raise ValueError(f"the end-of-sequence id {wrong[0]!r} must be a whole number from 0")
    return ids


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {str(content)[:80]!r}")
    return content


# ---------------------------------------------------------------------------------------------------- the decoder

class Packing:
    """Sequences end to end in one row: sequence i is the next lengths[i] tokens and continues sequence prefixes[i], if any."""

    def __init__(
        self, lengths: Sequence[int], prefixes: Sequence[int | None], *, kernel: Callable[..., Tensor] | None,
        dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        self.lengths, self.prefixes, self.kernel = tuple(lengths), tuple(prefixes), kernel

        def on_device(tensor: Tensor) -> Tensor:  # from pinned memory: a plain copy to a GPU waits for all its work so far
            return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

        # (tokens of its prefix, own tokens) of each sequence
        sizes = [(0 if prefix is None else lengths[prefix], own) for prefix, own in zip(prefixes, lengths, strict=True)]
        # (1, T): a token's place in its sequence, the prefix included
        self.positions = on_device(torch.cat([torch.arange(before, before + own) for before, own in sizes])[None])
        if kernel is None:
            self.masks = {}  # by size: (own, both), added to the scores
            for before, own in {size for size in sizes if size[0]}:
                forbidden = torch.full((own, before + own), -math.inf, dtype=dtype, device=device)
                self.masks[before, own] = forbidden.triu(before + 1)
            return
        ends = [0, *itertools.accumulate(lengths)]
        both = [before + own for before, own in sizes]
        # (sequences + 1,) int32 each: the first query of each sequence, and its first key
        self.starts = [on_device(torch.tensor(s, dtype=torch.int32)) for s in (ends, [0, *itertools.accumulate(both)])]
        self.longest = max(lengths), max(both)
        # (T_k,) the keys of each sequence, its prefix's and then its own. None: no prefixes, so they are those of the row
        self.keys = None
        if any(before for before, _ in sizes):
            spans = [torch.arange(*span) for span in itertools.pairwise(ends)]
            keys = []
            for prefix, own in zip(prefixes, spans, strict=True):
                keys += [own] if prefix is None else [spans[prefix], own]
            self.keys = on_device(torch.cat(keys))


@dataclass(frozen=True)
class Layout:
    """What all layers of one forward share."""

    cos: Tensor  # (B, T, E)
    sin: Tensor  # (B, T, E)
    packing: Packing | None  # of the packed layout
    cache: Any  # the sampler's view of its KV cache, or None


def fused(plain: Callable) -> Callable:
    """The function as it is on a CPU. On a GPU each of its operations would be a kernel that reads and writes whole tensors, so
    there it is compiled into one, and its gradient into another (torch.compile, which needs Triton)."""
    compiled = torch.compile(plain, dynamic=True) if find_spec("triton") else plain

    @wraps(plain)
    def call(first: Tensor, *rest: Any) -> Any:
        return (compiled if first.is_cuda else plain)(first, *rest)

    return call


@fused
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, with the mean in fp32 whatever the dtype of x."""
    x32 = x.float()
    x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return weight * x32.to(x.dtype)


@fused
def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + delta, its norm)."""
    x = x + delta
    return x, rms_norm.__wrapped__(x, weight, eps)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """The rotary angle per position of each pair of head channels (RoPE, and Llama 3.1's scaling): (E/2,) fp32 on the CPU."""
    channels = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    inv_freq = 1.0 / config.rope["rope_theta"] ** (channels / config.head_dim)
    if config.rope["rope_type"] == "default":
        return inv_freq
    # llama3: angles that turn seldom within the original context are divided by `factor`, those that turn often stay, and
    # those between are interpolated
    factor, low, high = (config.rope[name] for name in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = config.rope["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    share_kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return share_kept * inv_freq + (1 - share_kept) * inv_freq / factor


@fused
def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turn the channel pairs (e, e + E/2) of q (B, T, H, E) and k (B, T, K, E) by the angles of their position, cos and sin
    (B, T, E)."""

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos[:, :, None] + torch.cat((-second, first), dim=-1) * sin[:, :, None]

    return turn(q), turn(k)


@fused
def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def attend_packed(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """Each sequence attends causally to itself and to all of its prefix: q (1, H, T, E), k and v (1, K, T, E) -> (1, H, T, E).
    There is no (T, T) mask."""
    if packing.kernel is not None:
        q, k, v = (x[0].transpose(0, 1).to(v.dtype) for x in (q, k, v))  # (T, heads, E)
        if packing.keys is not None:
            k, v = k[packing.keys], v[packing.keys]  # (T_k, K, E)
        return packing.kernel(q, k, v, *packing.starts, *packing.longest).transpose(0, 1)[None]
    queries, keys, values = (torch.split(x, packing.lengths, dim=2) for x in (q, k, v))
    out = []
    for i, prefix in enumerate(packing.prefixes):
        k, v = keys[i], values[i]
        mask = None
        if prefix is not None:
            k = torch.cat([keys[prefix], k], dim=2)
            v = torch.cat([values[prefix], v], dim=2)
            mask = packing.masks[packing.lengths[prefix], packing.lengths[i]]
        out.append(F.scaled_dot_product_attention(queries[i], k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True))
    return torch.cat(out, dim=2)


def varlen_kernel() -> Callable[..., Tensor]:
    """PyTorch's variable-length attention, causal and with shared key/value heads:
    (q (T, H, E), k, v (T_k, K, E), starts of q, starts of k, longest q, longest k) -> (T, H, E)"""
    from torch.nn.attention.varlen import varlen_attn  # imported here: only a GPU needs it

    causal = partial(varlen_attn, window_size=(-1, 0))  # the last query of a sequence sees all of its keys
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        return partial(causal, enable_gqa=True)

    def kernel(q: Tensor, k: Tensor, v: Tensor, *lengths: Any) -> Tensor:  # torch 2.11 has no shared heads
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return causal(q, k, v, *lengths)

    return kernel


@cache  # the warning comes once
def packed_kernel(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor] | None:
    """The kernel for packed sequences, if it can run here. None means one attention call a sequence."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):
        warnings.warn(f"no variable-length attention on {torch.cuda.get_device_name(device)}: training is slower", stacklevel=1)
        return None
    return varlen_kernel()


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        D, E = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(D, self.heads * E, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, self.kv_heads * E, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, self.kv_heads * E, bias=config.qkv_bias)
        self.o_proj = nn.Linear(self.heads * E, D, bias=config.out_bias)
        self.q_norm = RMSNorm(E, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(E, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.joined: tuple[Tensor, Tensor | None] | None = None  # see CausalLM.join_projections

    def forward(self, x: Tensor, layout: Layout, layer: int) -> Tensor:
        B, T, _ = x.shape
        if self.joined is None:
            q, k, v = (linear(x).view(B, T, -1, self.head_dim) for linear in (self.q_proj, self.k_proj, self.v_proj))
        else:
            heads = F.linear(x, *self.joined).view(B, T, -1, self.head_dim)
            q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        q, k = rotate(self.q_norm(q), self.k_norm(k), layout.cos, layout.sin)
        if layout.cache is not None:  # the new tokens, packed (prefill) or one a row (decode), go to the sampler's cache
            layout.cache.write(layer, k.flatten(0, 1), v.flatten(0, 1))  # (B T, K, E) each
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, E) and (B, K, T, E)
        if layout.packing is not None:
            out = attend_packed(q, k, v, layout.packing)  # (B, H, T, E)
        elif layout.cache is not None:
            out = layout.cache.attend(layer, q[:, :, 0])[:, :, None]  # (B, H, 1, E)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu_mul(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, layout: Layout, layer: int) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), layout, layer)
        norm = self.post_attention_layernorm
        x, normed = add_rms_norm(x, attended, norm.weight, norm.eps)
        return x + self.mlp(normed)


class Decoder(nn.Module):
    """Embedding, blocks and final norm; its parameters are the checkpoint's `model.*`."""

    # set by the trainer. Activation checkpointing: only each block's input is kept; the backward pass computes the rest again
    recompute = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, layout: Layout) -> Tensor:
        x = self.embed_tokens(input_ids)  # (B, T, D)
        for index, layer in enumerate(self.layers):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, layout, index, use_reentrant=False)
            else:
                x = layer(x, layout, index)
        return self.norm(x)


class CausalLM(nn.Module):
    """A decoder with its language-model head. A tied head has no parameter of its own: it uses the embedding's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("inv_freq", inverse_frequencies(config), persistent=False)  # fp32 whatever the weights' dtype

    @property
    def head_weight(self) -> Tensor:
        """(V, D)"""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        """The device that a forward runs on."""
        return self.inv_freq.device  # sharded weights may be elsewhere (parallel.shard: offload)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of activations: that of the weights in a forward, where sharded ones are gathered in it."""
        return self.head_weight.dtype

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        *,
        lengths: Sequence[int] | None = None,
        prefixes: Sequence[int | None] | None = None,
        cache: Any = None,
        head: Callable[[Tensor, Tensor], Any] | None = None,
    ) -> Any:
        """Logits (B, T, V) in the dtype of the activations, or whatever `head` makes of the hidden states.

        input_ids  (B, T) int64
        positions  (B, T) int64. None: 0..T-1, or from the beginning of each packed sequence. A decode step needs them
        lengths    packed layout: B = 1 and sequence i is the next lengths[i] tokens
        prefixes   packed layout: sequence i continues the earlier sequence prefixes[i], which itself continues none, so that
                   a shared beginning is computed once. None, for one or for all: it continues none
        cache      the sampler's view of its KV cache: an object with write(layer, k (T, K, E), v (T, K, E)), and with
                   attend(layer, q (B, H, E)) -> (B, H, E). With `lengths` the sequences are written to it (prefill). With
                   `positions` one new token a row is written and attends to its row's tokens (decode step)
        head       called as head(hidden (B, T, D), weight (V, D)) instead: a chunked loss, so that (B, T, V) never exists. It
                   is called inside this forward, where a sharded head weight is whole
        """
        B, T = input_ids.shape
        device = input_ids.device
        packing = None
        if lengths is not None:
            prefixes = (None,) * len(lengths) if prefixes is None else prefixes
            kernel = packed_kernel(self.device, self.compute_dtype)
            packing = Packing(lengths, prefixes, kernel=kernel, dtype=self.compute_dtype, device=device)
            positions = packing.positions
        elif positions is None:
            positions = torch.arange(T, device=device)[None].expand(B, T)
        cos, sin = self.rotary(positions)
        hidden = self.model(input_ids, Layout(cos, sin, packing, cache))  # (B, T, D)
        return F.linear(hidden, self.head_weight) if head is None else head(hidden, self.head_weight)

    def join_projections(self) -> None:
        """From now on queries, keys and values are one product instead of three, with a copy of their weights. For decoding on
        a GPU, where a small product takes as long as it takes to start it; the weights must not change afterwards."""
        for layer in self.model.layers:
            attention = layer.self_attn
            parts = (attention.q_proj, attention.k_proj, attention.v_proj)
            bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
            attention.joined = torch.cat([part.weight for part in parts]), bias

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The cosines and sines of positions (B, T): (B, T, E) each."""
        angles = positions[..., None].float() * self.inv_freq  # (B, T, E/2), always fp32: bf16 angles lose whole positions
        angles = torch.cat((angles, angles), dim=-1)  # (B, T, E)
        return angles.cos().to(self.compute_dtype), angles.sin().to(self.compute_dtype)


# ---------------------------------------------------------------------------------------------------- build, load, save

def build_model(config: ModelConfig, *, generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> CausalLM:
    """A randomly initialised model: matrices normal(0, initializer_range), biases 0, norms 1. `generator` is on the CPU."""
    model = CausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, config.initializer_range, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            parameter.data = parameter.data.to(dtype)  # not model.to(dtype), because the buffer inv_freq must stay fp32
    return model.to(device)


TOKENIZER_FILES = (
    "tokenizer*", "*.jinja", "additional_chat_templates/*.jinja", "chat_template.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.*", "merges.txt", "*.model",
)  # fmt: skip
MODEL_FILES = ("*.json", "*.safetensors", *TOKENIZER_FILES)


def resolve_model(name_or_path: str, wanted: Sequence[str] = MODEL_FILES) -> Path:
    """The folder of a model: an existing folder, or `org/name` on the hub. A known family's name needs no org: a bare
    `Qwen2.5-7B-Instruct` is Qwen/Qwen2.5-7B-Instruct. Only the `wanted` files are fetched, never code. ValueError if there is
    no such model or the hub cannot be reached."""
    path, repo = Path(name_or_path).expanduser(), name_or_path
    if path.is_dir():
        return path
    if "/" not in repo:
        org = next((org for prefix, org in KNOWN_FAMILIES if repo.lower().startswith(prefix)), None)
        if org is None:
            raise ValueError(f"model {repo}: no such folder, and no known family has such names; give org/name")
        repo = f"{org}/{repo}"
    from huggingface_hub import snapshot_download  # imported here: a folder does not need it

    try:
        return Path(snapshot_download(repo, allow_patterns=list(wanted), ignore_patterns=["*.py", "original/*"]))
    except Exception as error:  # the hub library raises a dozen kinds; each means "not there" to our caller
        raise ValueError(f"model {name_or_path}: no such folder, and {repo} could not be fetched: {error}") from error


def load_model(name_or_path: str, *, dtype: torch.dtype, device: torch.device | str) -> tuple[CausalLM, Any]:
    """(model, tokenizer) of a folder or hub name, with its weights cast to `dtype`. ValueError that names the file for code in
    the folder, an unknown architecture, missing, broken or misshaped weights, and a token without a row in the embedding."""
    folder = resolve_model(name_or_path)
    model, tokenizer = blank_model(folder)
    weights = {name: tensor.to(dtype) for name, tensor in read_weights(model, folder, device=device)}
    model.load_state_dict(weights, assign=True)
    return model.to(device), tokenizer


def blank_model(folder: Path) -> tuple[CausalLM, Any]:
    """(model, tokenizer) of a folder. The model has shapes only, on the meta device: no weight is read or allocated yet.
    config.eos_ids has every id that ends a response. The first of them ends a training text: the chat template's end of an
    assistant's turn, or without one the tokenizer's end of sequence, or else the first that the configs name [ours]."""
    config = ModelConfig.from_folder(folder)
    tokenizer = load_tokenizer(folder)
    end = turn_tokens(tokenizer)[0]
    end_id = None if end is None else tokenizer.convert_tokens_to_ids(end)
    if end is not None and end_id not in _merge_ids(config.eos_ids, tokenizer.eos_token_id):
        warnings.warn(f"{folder}: {end} ends a response too, as in its chat template; its configs do not name it", stacklevel=1)
    config = replace(config, eos_ids=_merge_ids(end_id, tokenizer.eos_token_id, config.eos_ids))
    _check_ids(folder, config, tokenizer)
    with torch.device("meta"):
        return CausalLM(config), tokenizer


def _check_ids(folder: Path, config: ModelConfig, tokenizer: Any) -> None:
    """ValueError for a token or an end of sequence without a row in the embedding, and if there is no end of sequence."""
    if not config.eos_ids:
        raise ValueError(f"{folder}: neither its configs nor its tokenizer name an end-of-sequence id")
    tokens = dict.fromkeys(config.eos_ids, "an end of sequence")
    # many fine-tunes have added a padding token and no row for it. Nothing is padded here, so it does no harm
    tokens |= {index: token for token, index in tokenizer.get_vocab().items() if token != tokenizer.pad_token}
    if max(tokens) >= config.vocab_size:
        index = min(index for index in tokens if index >= config.vocab_size)
        rows = f"but config.json's vocab_size, the rows of the embedding, is {config.vocab_size}; resize the embedding"
        raise ValueError(f"{folder}: its tokenizer's {tokens[index]!r} has id {index}, {rows}")


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, by transformers, with the ids of its tokenizer.json. Every token with which its chat template
    frames a turn is marked as special, so that encode_text reads it as text and decoding with skip_special_tokens leaves it
    out. ValueError if the folder has code or asks for some: it is never run."""
    from transformers import PreTrainedTokenizerFast  # imported here: 1 s, and the decoder itself does not need it

    # a class of transformers in place of the custom one might compute something else
    instead = "code of a model folder is never run; take a checkpoint that transformers loads without trust_remote_code"
    for script in folder.glob("*.py"):
        raise ValueError(f"{script}: {instead}")
    for file in folder.glob("*config.json"):  # the model's, the tokenizer's, a processor's
        if "auto_map" in _read_json(file):
            raise ValueError(f"{file}: has an auto_map, but {instead}")
    if not (folder / "tokenizer.json").is_file():
        write = "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        raise ValueError(f"{folder}: no tokenizer.json; transformers writes one: {write}")
    try:
        # not AutoTokenizer, which rebuilds most tokenizers by their class's name or the model_type, with that class's
        # pre-tokenizer and not the one in tokenizer.json: other ids than the model was trained on, and no word about it
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # a malformed file raises OSError, KeyError, ValueError or an error of the Rust library
        raise ValueError(f"{folder}: its tokenizer could not be loaded: {error}") from error
    frame = turn_tokens(tokenizer)[1]
    unmarked = [token for token in tokenizer.added_tokens_decoder.values() if str(token) in frame and not token.special]
    for token in unmarked:
        token.special = True
    tokenizer.add_tokens(unmarked, special_tokens=True)  # they keep their ids
    tokenizer.loaded_as = tokenizer.get_vocab(), tokenizer.chat_template  # see _save_tokenizer
    return tokenizer


def turn_tokens(tokenizer: Any) -> tuple[str | None, set[str]]:
    """(the token that ends an assistant's turn, every token around the turns), from a conversation that the chat template has
    rendered. The end is None if what follows an assistant's message is no added token; (None, set()) without a template."""
    added = sorted((token for token in tokenizer.get_added_vocab() if token.strip()), key=len, reverse=True)
    any_added = re.compile("|".join(map(re.escape, added)) or "(?!)")  # the longest first; (?!) matches nothing
    chat = [{"role": role, "content": MARK} for role in ("user", "assistant", "user")]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        before, _, after, _ = text.split(MARK)
    except Exception:  # encode_chat says it, if the template fails for a prompt too
        return None, set()
    frame = set(any_added.findall(text))
    opening = any_added.findall(before)[-1:]
    end = any_added.match(after.lstrip())
    if end is None or [end.group()] == opening:  # some templates write no end: then the user's next turn follows
        return None, frame
    return end.group(), frame


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Text -> ids, without a beginning or end of sequence. A special token's name in the text is text: it ends no turn."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def encode_chat(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Chat messages -> prompt ids with the header of the assistant's turn, ready to be continued. A special token's name in a
    message is text. The template is a program (Jinja) of the model folder, which transformers runs in a sandbox. ValueError if
    there is none (take an instruct model) or it fails. Not for two threads at once: the tokenizer changes for a moment."""
    encode = partial(tokenizer.encode, add_special_tokens=False)
    render = partial(tokenizer.apply_chat_template, add_generation_prompt=True)
    texts = [message["content"] for message in messages]
    try:
        if all(encode(text) == encode_text(tokenizer, text) for text in texts):
            return render(messages, tokenize=True, return_dict=False)
        # marks take the place of the texts, without the blanks around them: the template may trim those
        marked = [message | {"content": re.sub(r"(?s)\S(.*\S)?", MARK, message["content"])} for message in messages]
        frame = render(marked, tokenize=False).split(MARK)
        special = {str(token): index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        names = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
        ids, text = [], ""  # the text since the last special token of the frame
        for part, content in zip(frame, [*filter(None, map(str.strip, texts)), ""], strict=True):
            for piece in re.split(f"({names})", part):
                if piece in special:
                    ids, text = [*ids, *encode_text(tokenizer, text), special[piece]], ""
                else:
                    text += piece
            text += content
        return ids + encode_text(tokenizer, text)
    except Exception as error:  # Jinja's own kinds, and whatever an expression in the template raises
        raise ValueError(f"the chat template of {tokenizer.name_or_path} failed: {error}") from error


def read_weights(
    model: CausalLM, folder: Path, *, device: torch.device | str, rows: Callable[[str], slice] = lambda name: slice(None)
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter's name with its tensor, or some rows of it, from the folder's model*.safetensors, file by file. `rows`
    gives, by name, the part of the first axis to read. ValueError that names the file for a broken one, and for a tensor that
    is missing, unknown, there twice or of another shape than config.json says."""
    missing = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for file in sorted(folder.glob("model*.safetensors")):  # their index says nothing that they do not
        try:
            with safe_open(file, framework="pt", device=str(device)) as tensors:
                for name in tensors.keys():
                    if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and model.lm_head is None):
                        continue  # old exports store the angles, and some a copy of the tied head
                    part = tensors.get_slice(name)
                    expected = missing.pop(name, "no such tensor, or an earlier file has it")
                    shape = tuple(part.get_shape())
                    if shape != expected:
                        raise ValueError(f"{file}: {name} has shape {shape}, by config.json: {expected}")
                    yield name, part[rows(name)]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: cannot be read as safetensors: {error}") from error
    if missing:
        raise ValueError(f"{folder}: its model*.safetensors lack {len(missing)} tensors, the first is {min(missing)!r}")


def save_model(model: CausalLM, tokenizer: Any, folder: str | Path, *, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write config, generation config, safetensors (large ones in shards with an index), tokenizer and chat template, so that
    transformers 4 and 5, vLLM and this file load them. Weights keep their dtype, and config.json names it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(model.head_weight.dtype).removeprefix("torch.")
    config = {**model.config.raw, "architectures": [ARCHITECTURES[model.config.model_type]]}
    # both spellings of each: the first is transformers 4's, the second transformers 5's
    config |= {"torch_dtype": dtype, "dtype": dtype}
    rope = dict(model.config.rope)
    config |= {"rope_parameters": dict(rope), "rope_theta": rope.pop("rope_theta")}
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    generation = {**model.config.generation, "eos_token_id": list(model.config.eos_ids)}
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(model.state_dict(), folder, max_shard_size=max_shard_bytes)
    for file in folder.glob("*.safetensors"):
        file.chmod((folder / "config.json").stat().st_mode)  # safetensors lets nobody else read its files
    _save_tokenizer(tokenizer, folder)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Copy the files of a tokenizer that is as it was loaded; write one that was built or changed. transformers 5 would write
    even an unchanged one in another form, with a class and a list that only it knows."""
    source = Path(tokenizer.name_or_path)
    if getattr(tokenizer, "loaded_as", None) == (tokenizer.get_vocab(), tokenizer.chat_template) and source.is_dir():
        for file in (file for pattern in TOKENIZER_FILES for file in source.glob(pattern) if file.is_file()):
            copy = folder / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(file.read_bytes())
    else:
        tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    if path.is_file():
        text = path.read_text(encoding="utf-8").replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"')
        text = re.sub(r'"extra_special_tokens"(?=\s*:\s*\[)', '"additional_special_tokens"', text)
        path.write_text(text, encoding="utf-8")
