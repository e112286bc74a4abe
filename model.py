"""The policy network: one explicit decoder for Qwen2 / Qwen2.5, Qwen3 (dense) and Llama-family checkpoints.

What it is: a pre-norm transformer with rotary positions, grouped-query attention and a gated MLP, built from a Hugging Face
`config.json`, filled from safetensors, and saved back as a folder that transformers, vLLM and this file can load. Module names
are the checkpoint's names, so that loading needs no renaming table.

What it is not: a model zoo. No mixture of experts, no sliding windows, no quantised weights, no code from a model folder.
A checkpoint that needs one of these is refused with a message that says what is supported.

One forward serves four layouts, told apart by arguments and never by token values:

    model(ids)                          plain           every row is one sequence from position 0
    model(ids, positions)               left-padded     position -1 marks padding
    model(ids, lengths=[...])           packed          one row holds several sequences end to end (training, prefill);
                                                        with prefixes=[...] some of them continue an earlier one
    model(ids, positions, cache=view)   decode          one new token a row, the others are in the sampler's cache

Imports no sibling: copy this file alone. Axes: B rows, T tokens, D width, H query heads, K key/value heads, E head width,
V vocabulary.
"""

import inspect
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

SUPPORTED = "qwen2 (Qwen2, Qwen2.5), qwen3 (dense), llama (Llama 2/3.x, SmolLM2 and other llama-architecture models)"
KNOWN_FAMILIES = (("qwen", "Qwen"), ("meta-llama", "meta-llama"), ("llama", "meta-llama"), ("smollm", "HuggingFaceTB"))


# ---------------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder, in the field names of Hugging Face's config.json.

    `rope` holds rope_theta, rope_type and, for llama3, its four scaling numbers. `raw` and `generation` keep the two JSON
    files as they were read, so that saving gives back every field this file has no use for.
    """

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
        """Read the fields of config.json (and generation_config.json); ValueError for anything this decoder cannot run."""
        family = raw.get("model_type")
        if family not in ("qwen2", "qwen3", "llama"):
            raise ValueError(f"unsupported architecture model_type={family!r}; supported: {SUPPORTED}")
        _refuse_unsupported(raw)
        generation = dict(generation or {})
        heads = _required(raw, "num_attention_heads")
        hidden_size = _required(raw, "hidden_size")
        attention_bias = bool(raw.get("attention_bias", False))
        return ModelConfig(
            model_type=family,
            vocab_size=_required(raw, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_required(raw, "intermediate_size"),
            num_hidden_layers=_required(raw, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or hidden_size // heads,
            rms_norm_eps=_required(raw, "rms_norm_eps"),
            max_position_embeddings=_required(raw, "max_position_embeddings"),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=True if family == "qwen2" else attention_bias,  # Qwen2 always has the three biases and no switch
            out_bias=False if family == "qwen2" else attention_bias,
            mlp_bias=bool(raw.get("mlp_bias", False)) if family == "llama" else False,
            qk_norm=family == "qwen3",
            initializer_range=raw.get("initializer_range", 0.02),
            rope=_rope_settings(raw),
            eos_ids=_merge_ids(generation.get("eos_token_id"), raw.get("eos_token_id")),
            raw=dict(raw),
            generation=generation,
        )

    @staticmethod
    def from_folder(folder: Path) -> "ModelConfig":
        """Read config.json (required) and generation_config.json (optional) of a model folder."""
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder}: no config.json, so this is not a model folder")
        generation_file = folder / "generation_config.json"
        generation = _read_json(generation_file) if generation_file.is_file() else {}
        try:
            return ModelConfig.from_dict(_read_json(folder / "config.json"), generation)
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'}: {error}") from error


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    """ValueError where config.json asks for something that this decoder would silently compute wrongly."""
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"unsupported hidden_act={raw['hidden_act']!r}; supported: silu")
    windowed = "sliding_attention" in (raw.get("layer_types") or ())
    if windowed or (raw.get("use_sliding_window") and raw.get("sliding_window")):
        raise ValueError("sliding-window attention is not supported; set use_sliding_window to false if the context allows")
    if raw.get("quantization_config"):
        raise ValueError("quantised weights are not supported; take the checkpoint's bf16 or fp32 version")


def _rope_settings(raw: dict[str, Any]) -> dict[str, Any]:
    """One dict from both spellings: transformers 5 (`rope_parameters`) and before (`rope_theta` + `rope_scaling`)."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", raw.get("rope_theta", 10000.0))
    if rope["rope_type"] not in ("default", "llama3"):
        raise ValueError(f"unsupported rope_type={rope['rope_type']!r}; supported: default, llama3")
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) not in (None, 1.0):
        raise ValueError("partial rotary embeddings are not supported")
    return rope


def _required(raw: dict[str, Any], name: str) -> Any:
    if raw.get(name) is None:
        raise ValueError(f"the field {name!r} is missing")
    return raw[name]


def _merge_ids(*sources: int | Sequence[int] | None) -> tuple[int, ...]:
    """All end-of-sequence ids of all sources, first mention first. Qwen2.5-Instruct needs both of its two."""
    ids: list[int] = []
    for source in sources:
        for token in [source] if isinstance(source, int) else source or []:
            if token not in ids:
                ids.append(token)
    return tuple(ids)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {str(content)[:80]!r}")
    return content


# ---------------------------------------------------------------------------------------------------- the decoder


@dataclass(frozen=True)
class Packing:
    """Sequences end to end in one row: sequence i is the next lengths[i] tokens and continues sequence prefixes[i], if any."""

    lengths: tuple[int, ...]
    prefixes: tuple[int | None, ...]
    masks: dict[tuple[int, int], Tensor]  # without a kernel: (tokens of the prefix, own) -> (own, both), added to the scores
    kernel: Callable[..., Tensor] | None  # see packed_kernel; the rest is what it needs
    keys: Tensor | None  # (T_k,) the tokens that are looked at, a prefix's before those that continue it; None: each once
    starts: tuple[Tensor, Tensor] | None  # (sequences + 1,) int32 each: where each one's queries begin, and its keys
    longest: tuple[int, int]  # the most queries of a sequence, and the most keys

    @staticmethod
    def of(
        lengths: Sequence[int],
        prefixes: Sequence[int | None],
        *,
        kernel: Callable[..., Tensor] | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "Packing":
        lengths, prefixes = tuple(lengths), tuple(prefixes)
        before = [0 if prefix is None else lengths[prefix] for prefix in prefixes]
        both = [b + own for b, own in zip(before, lengths, strict=True)]
        if kernel is None:
            masks = {}
            for b, own in {(b, own) for b, own in zip(before, lengths, strict=True) if b}:
                later = torch.ones(own, b + own, dtype=torch.bool, device=device).triu(b + 1)
                masks[b, own] = torch.zeros_like(later, dtype=dtype).masked_fill_(later, -math.inf)
            return Packing(lengths, prefixes, masks, None, None, None, (0, 0))
        ends = [0, *itertools.accumulate(lengths)]
        keys = None
        if any(before):
            own = [torch.arange(*span) for span in itertools.pairwise(ends)]
            keys = [part for i, p in enumerate(prefixes) for part in ([own[i]] if p is None else [own[p], own[i]])]
            keys = torch.cat(keys).to(device)
        starts = [torch.tensor(s, dtype=torch.int32).to(device) for s in (ends, [0, *itertools.accumulate(both)])]
        return Packing(lengths, prefixes, {}, kernel, keys, tuple(starts), (max(lengths), max(both)))

    def positions(self, device: torch.device) -> Tensor:
        """(1, T): counted from a sequence's beginning, its prefix included."""
        begins = [0 if prefix is None else self.lengths[prefix] for prefix in self.prefixes]
        return torch.cat([torch.arange(b, b + n, device=device) for b, n in zip(begins, self.lengths, strict=True)])[None]


@dataclass(frozen=True)
class Layout:
    """What one forward needs to know besides the tokens; worked out once and shared by all layers."""

    dtype: torch.dtype  # of activations
    cos: Tensor  # (B, T, E)
    sin: Tensor  # (B, T, E)
    mask: Tensor | None  # (B, 1, T, T), True where a query may look; None: causal, or `packing` decides
    packing: Packing | None  # packed layout
    cache: Any  # the sampler's view of its KV cache, or None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the statistics in fp32 whatever the dtype of x."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """The rotary angle per position of each pair of head channels: (E/2,) fp32 on the CPU (RoPE; Llama 3.1's scaling)."""
    channels = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    inv_freq = 1.0 / config.rope["rope_theta"] ** (channels / config.head_dim)
    if config.rope["rope_type"] == "default":
        return inv_freq
    # llama3: wavelengths longer than the original context are stretched by `factor`, short ones stay, those between are
    # interpolated by how many turns they make within the original context
    factor, low, high = (config.rope[name] for name in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = config.rope["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    share_kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return share_kept * inv_freq + (1 - share_kept) * inv_freq / factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel pairs (e, e + E/2) of x (B, heads, T, E) by their position's angles cos, sin (B, T, E)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


def attend_packed(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """Each sequence attends within itself and to all of its prefix, so there is no (T, T) mask and no wasted product.

    q (1, H, T, E), k and v (1, K, T, E) -> (1, H, T, E)
    """
    if packing.kernel is not None:
        q, k, v = (x[0].transpose(0, 1).to(v.dtype) for x in (q, k, v))  # (T, heads, E)
        if packing.keys is not None:
            k, v = k[packing.keys], v[packing.keys]  # (T_k, K, E)
        return packing.kernel(q, k, v, *packing.starts, *packing.longest).transpose(0, 1)[None]
    spans = list(zip(*(torch.split(x, packing.lengths, dim=2) for x in (q, k, v)), strict=True))
    out = []
    for (q, k, v), prefix in zip(spans, packing.prefixes, strict=True):
        mask = None
        if prefix is not None:  # all of the prefix, then causally its own tokens
            mask = packing.masks[spans[prefix][1].shape[2], k.shape[2]]
            k, v = (torch.cat(pair, dim=2) for pair in zip(spans[prefix][1:], (k, v), strict=True))
        out.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True))
    return torch.cat(out, dim=2)


def varlen_kernel() -> Callable[..., Tensor] | None:
    """PyTorch's variable-length attention, made causal, or None where this PyTorch has none.

    (q (T, H, E), k, v (T_k, K, E), starts of q, starts of k, longest q, longest k) -> (T, H, E)
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    shares_heads = "enable_gqa" in inspect.signature(varlen_attn).parameters

    def kernel(q: Tensor, k: Tensor, v: Tensor, *where: Any) -> Tensor:
        if shares_heads:
            return varlen_attn(q, k, v, *where, window_size=(-1, 0), enable_gqa=True)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return varlen_attn(q, k, v, *where, window_size=(-1, 0))

    return kernel


@cache
def packed_kernel(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> Callable | None:
    """The kernel for packed sequences where one can run (CUDA, half precision) and is right there; else None, which means one
    attention call a sequence."""
    kernel = varlen_kernel() if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) else None
    return kernel if kernel is not None and reproduces(kernel, device, dtype, heads, kv_heads, head_dim) else None


def reproduces(kernel: Callable, device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> bool:
    """Whether a small example with a prefix, gradients included, comes out as one attention call a sequence has it.

    Kernels have differed in where the causal diagonal lies when there are more keys than queries, and a wrong one would train
    without an error.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, n, 16, head_dim) for n in (heads, kv_heads, kv_heads)]
    inputs = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    figures = []
    try:
        for choice in (kernel, None):
            packing = Packing.of((5, 7, 4), (None, 0, None), kernel=choice, dtype=dtype, device=device)
            with torch.enable_grad():
                out = attend_packed(*inputs, packing)
                figures.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError):  # the card is too old for it, or this build lacks it or its arguments
        return False
    return all(torch.allclose(a.float(), b.float(), atol=0.1, rtol=0.1) for a, b in zip(*figures, strict=True))


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

    def forward(self, x: Tensor, layout: Layout, layer: int) -> Tensor:
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, self.heads, self.head_dim)).transpose(1, 2)  # (B, H, T, E)
        k = self.k_norm(self.k_proj(x).view(B, T, self.kv_heads, self.head_dim)).transpose(1, 2)  # (B, K, T, E)
        v = self.v_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotate(q, layout.cos, layout.sin), rotate(k, layout.cos, layout.sin)
        if layout.cache is not None:  # the new tokens, packed (prefill) or one a row (decode), go to the sampler's cache
            layout.cache.write(layer, k.transpose(1, 2).flatten(0, 1), v.transpose(1, 2).flatten(0, 1))
        if layout.packing is not None:
            out = attend_packed(q, k, v, layout.packing)  # (B, H, T, E)
        elif layout.cache is not None:
            out = layout.cache.attend(layer, q[:, :, 0])[:, :, None]  # (B, H, 1, E)
        else:
            causal = layout.mask is None
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=layout.mask, is_causal=causal, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, layout: Layout, layer: int) -> Tensor:
        # under autocast the residual stream is fp32: cast once here, or each of the projections would do it for itself
        x = x + self.self_attn(self.input_layernorm(x).to(layout.dtype), layout, layer)
        return x + self.mlp(self.post_attention_layernorm(x).to(layout.dtype))


class Decoder(nn.Module):
    """Embedding, blocks and final norm; its parameters are the checkpoint's `model.*`.

    recompute: keep only each block's input for the backward pass and compute the rest again there: memory of one block
    instead of all, for a third more work (activation checkpointing). Off unless the trainer sets it.
    """

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
    """A decoder with its language-model head. A tied head has no parameter of its own: it reads the embedding's."""

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
        """Where a forward is computed. The angles are there; sharded weights may be elsewhere (parallel.shard: offload)."""
        return self.inv_freq.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of activations: autocast's where it is on (fp32 master weights, bf16 products), else the weights'."""
        kind = self.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.head_weight.dtype

    def attention_kernel(self) -> Callable | None:
        """What attends over packed sequences here, in the current dtype; see packed_kernel."""
        config = self.config
        heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        return packed_kernel(self.device, self.compute_dtype, *heads)

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
        """Logits (B, T, V) in the weights' dtype, or whatever `head` makes of the hidden states.

        input_ids  (B, T) int64
        positions  (B, T) int64. None: 0..T-1 in every row, or restarting with each packed sequence. -1 marks padding, which
                   nobody attends to; the logits there mean nothing.
        lengths    packed layout: B = 1 and sequence i is the next lengths[i] tokens
        prefixes   packed layout: sequence i continues the earlier sequence prefixes[i] (which itself continues none), so that
                   what several share is computed once; None, for one or for all of them: it stands by itself
        cache      the sampler's view of its KV cache: an object with write(layer, k (T, K, E), v (T, K, E)), and with
                   attend(layer, q (B, H, E)) -> (B, H, E). With `lengths`: prefill, the sequences are written to it. With
                   `positions` (B, 1): a decode step, one new token a row is written and attends to its row's tokens.
        head       called as head(hidden (B, T, D), weight (V, D)) inside this forward: the chunked losses use it so that
                   (B, T, V) never exists, and it stays inside so that a sharded head weight is whole when it is used.
        """
        layout = self._layout(input_ids, positions, lengths, prefixes, cache)
        hidden = self.model(input_ids, layout)  # (B, T, D)
        return F.linear(hidden, self.head_weight) if head is None else head(hidden, self.head_weight)

    def _layout(
        self,
        ids: Tensor,
        positions: Tensor | None,
        lengths: Sequence[int] | None,
        prefixes: Sequence[int | None] | None,
        cache: Any,
    ) -> Layout:
        B, T = ids.shape
        mask = packing = None
        if lengths is not None:
            if B != 1 or sum(lengths) != T or positions is not None:
                raise ValueError(f"packed input needs one row, lengths that sum to its {T} tokens, and no positions")
            prefixes = (None,) * len(lengths) if prefixes is None else prefixes
            packing = Packing.of(lengths, prefixes, kernel=self.attention_kernel(), dtype=self.compute_dtype, device=ids.device)
            positions = packing.positions(ids.device)
        elif cache is not None:
            if positions is None or T != 1:
                raise ValueError("a cached forward needs lengths (prefill), or positions and one token a row (decode)")
        elif positions is not None:
            q_pos, k_pos = positions[:, None, :, None], positions[:, None, None, :]
            # padding may look at itself: a row of nothing but False would be nan, and nan spreads through the gradient
            mask = ((k_pos <= q_pos) & (k_pos >= 0)) | torch.eye(T, dtype=torch.bool, device=ids.device)
        else:
            positions = torch.arange(T, device=ids.device)[None].expand(B, T)
        angles = positions[..., None].float() * self.inv_freq  # (B, T, E/2), always fp32: bf16 angles lose whole positions
        angles = torch.cat((angles, angles), dim=-1)  # (B, T, E)
        cos, sin = angles.cos().to(self.compute_dtype), angles.sin().to(self.compute_dtype)
        return Layout(self.compute_dtype, cos, sin, mask, packing, cache)


# ---------------------------------------------------------------------------------------------------- build, load, save


def build_model(config: ModelConfig, *, generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> CausalLM:
    """A randomly initialised model: matrices normal(0, initializer_range), biases 0, norms 1. `generator` is a CPU one."""
    model = CausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, config.initializer_range, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    # the buffer inv_freq must stay fp32, so the parameters are cast one by one and not by model.to(dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.to(device)


MODEL_FILES = ("*.json", "*.safetensors", "tokenizer*", "*.jinja", "merges.txt", "vocab.*")


def resolve_model(name_or_path: str, wanted: Sequence[str] = MODEL_FILES) -> Path:
    """The folder a name stands for: an existing folder, else `org/name` on the hub, else a known family's bare name.

    A bare `Qwen2.5-7B-Instruct` becomes Qwen/Qwen2.5-7B-Instruct, `Llama-3.1-8B-Instruct` becomes meta-llama/..., and
    `SmolLM2-135M-Instruct` HuggingFaceTB/... . Only the `wanted` files are fetched, by default weights in safetensors, JSON and
    tokenizer files, and never code.
    Raises ValueError where nothing of the kind exists or the hub cannot be reached.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"--model {name_or_path}: a file, where a folder with config.json is needed")
    repo = name_or_path
    if "/" not in repo:
        org = next((org for prefix, org in KNOWN_FAMILIES if repo.lower().startswith(prefix)), None)
        if org is None:
            known = ", ".join(sorted({org for _, org in KNOWN_FAMILIES}))
            raise ValueError(f"--model {repo}: no such folder, and no known family ({known}) has such names; give org/name")
        repo = f"{org}/{repo}"
    elif repo.startswith((".", "/", "~")) or repo.count("/") > 1:
        raise ValueError(f"--model {name_or_path}: no such folder")
    from huggingface_hub import snapshot_download  # imported here: only names that are no folder need it

    try:
        return Path(snapshot_download(repo, allow_patterns=list(wanted), ignore_patterns=["*.py", "original/*"]))
    except Exception as error:  # the hub library raises a dozen kinds; each means "not there" to our caller
        raise ValueError(f"--model {name_or_path}: no such folder, and {repo} could not be fetched: {error}") from error


def refuse_code(folder: Path) -> None:
    """ValueError naming the file where a model folder brings code, or asks for some: code from a folder is never run.

    Without this check transformers would quietly take a class of its own in place of the custom one, and compute something
    else than the folder's author meant.
    """
    instead = "code of a model folder is never run; take a checkpoint that transformers loads without trust_remote_code"
    for script in sorted(folder.glob("*.py")):
        raise ValueError(f"{script}: {instead}")
    for file in sorted(folder.glob("*config.json")):  # the model's, the tokenizer's, a processor's
        if "auto_map" in (config := _read_json(file)):
            raise ValueError(f"{file}: asks for {config['auto_map']!r} (auto_map), but {instead}")


def load_model(name_or_path: str, *, dtype: torch.dtype, device: torch.device | str) -> tuple[CausalLM, Any]:
    """(model, tokenizer) of a folder or hub name; the weights are read once, cast to `dtype`, straight onto `device`.

    Raises ValueError naming the file for code in the folder, an unknown architecture, and missing, truncated or mismatching
    weights.
    """
    folder = resolve_model(name_or_path)
    model, tokenizer = blank_model(folder)
    load_weights(model, folder, dtype=dtype, device=torch.device(device))
    return model.to(device), tokenizer


def blank_model(folder: Path) -> tuple[CausalLM, Any]:
    """(model, tokenizer) of a folder, the model with shapes only, on the meta device: nothing is read or allocated yet."""
    refuse_code(folder)
    config = ModelConfig.from_folder(folder)
    tokenizer = load_tokenizer(folder)
    if tokenizer.eos_token_id is not None:
        config = replace(config, eos_ids=_merge_ids(config.eos_ids, tokenizer.eos_token_id))
    if not config.eos_ids:
        raise ValueError(f"{folder}: neither its configs nor its tokenizer name an end-of-sequence id")
    with torch.device("meta"):
        return CausalLM(config), tokenizer


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer through transformers, never with remote code."""
    from transformers import AutoTokenizer  # imported here: 1 s, and the decoder itself does not need it

    refuse_code(folder)
    known = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    if not any((folder / name).is_file() for name in known):  # transformers would hand out an empty vocabulary
        raise ValueError(f"{folder}: no tokenizer file ({', '.join(known)})")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # missing and malformed files raise OSError, KeyError, ValueError or the Rust side's own
        raise ValueError(f"{folder}: its tokenizer could not be loaded: {error}") from error


def encode_chat(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Chat messages -> prompt ids with the header of the assistant's turn, ready to be continued.

    The template is a program (Jinja) from the model folder. transformers runs it in a sandbox that keeps it from files,
    processes and Python's internals, but not from a loop without end. ValueError for whatever it raises.
    """
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer of {tokenizer.name_or_path} has no chat template; take an instruct model")
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    except Exception as error:  # Jinja's own kinds, and whatever an expression in the template raises
        raise ValueError(f"the chat template of {tokenizer.name_or_path} failed: {error}") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: those its index names, else model.safetensors.

    ValueError for an index that names anything but files of its own folder, and for a file that is not there.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not weight_map or not isinstance(weight_map, dict):
            raise ValueError(f"{index}: no weight_map")
        for name in weight_map.values():  # the hub's own layout has no subfolders, and "../x" or "/x" would leave this one
            if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
                raise ValueError(f"{index}: weight_map names {name!r}, which is not a safetensors file of this folder")
        files = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: missing (only safetensors weights are read)")
    return files


def load_weights(model: CausalLM, folder: Path, *, dtype: torch.dtype, device: torch.device) -> None:
    """Fill the model (on any device, meta too) from the folder's safetensors; every name and shape must match."""
    weights = {name: tensor.to(dtype) for name, tensor in read_weights(model, folder, device=device)}
    model.load_state_dict(weights, strict=True, assign=True)


def read_weights(
    model: CausalLM, folder: Path, *, device: torch.device, rows: Callable[[str], slice] = lambda name: slice(None)
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter's name with its tensor, or only some rows of it, from the folder's safetensors, in the files' order.

    rows    name -> the part of the first axis to read; the rest stays on the disk
    Raises ValueError naming the file, also at the end, where names are left that no file held.
    """
    missing = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt", device=str(device)) as tensors:
                for name in tensors.keys():
                    if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and model.lm_head is None):
                        continue  # old exports store the angles, and some a copy of the tied head
                    part = tensors.get_slice(name)
                    if name not in missing:
                        raise ValueError(f"{file}: tensor {name!r} has no place in a {model.config.model_type} model, or two")
                    expected, shape = missing.pop(name), tuple(part.get_shape())
                    if shape != expected:
                        raise ValueError(f"{file}: {name} has shape {shape}, config.json says {expected}")
                    yield name, part[rows(name)]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: broken or truncated safetensors file ({error})") from error
    if missing:
        raise ValueError(f"{folder}: {len(missing)} tensors are missing from its weights, the first is {min(missing)!r}")


def save_model(model: CausalLM, tokenizer: Any, folder: str | Path, *, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write config, generation config, safetensors (in shards with an index where large), tokenizer and chat template.

    The folder loads in transformers, in vLLM and here. Weights keep their dtype, which config.json then states.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(model.head_weight.dtype).removeprefix("torch.")
    architecture = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
    config = {**model.config.raw, "architectures": [architecture[model.config.model_type]], "torch_dtype": dtype}
    config.pop("dtype", None)  # transformers 5's name for the same field: one of the two must not go stale
    generation = {**model.config.generation, "eos_token_id": list(model.config.eos_ids)}
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    from huggingface_hub import split_torch_state_dict_into_shards

    weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    split = split_torch_state_dict_into_shards(weights, max_shard_size=max_shard_bytes)
    for file, names in split.filename_to_tensors.items():
        save_file({name: weights[name] for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(folder)
