"""Fused kernels for a GPU, in Triton: the small operations between a decoder's matrix products, attention over a paged KV
cache, and the draw of a token.

On a GPU a small operation takes as long as it takes to launch it and to read and write its tensors once. PyTorch runs each of
the forms below as five to forty such operations; here each is one. None changes what is computed: the plain form is in the file
that calls it (model.py, kv_cache.py, rollout.py), which uses it when there is no Triton or no GPU.

    rms_norm, add_rms_norm   the norm, and the residual sum before it               with gradient
    rotate                   rotary positions of queries and keys                   with gradient
    silu_mul                 silu(gate) * up                                        with gradient
    write_slots              new keys and values into pages of the cache
    paged_attention          a decode step's attention over the pages
    sample                   softmax, nucleus and the draw, for one token a row

Imports no sibling: copy this file alone. Axes: B rows, T tokens, D width, H query heads, K key/value heads, G = H / K, E head
width, V vocabulary; N pages in the cache, S token slots a page, W pages a row can have.
"""

import torch
from torch import Tensor

try:  # torch's CUDA builds bring it
    import triton
    import triton.language as tl
except ImportError:
    triton = None

HEAD_DIMS = (16, 32, 64, 128, 256)  # of the attention: powers of two
TILE = 4096  # numbers that one program of `sample` and of `silu_mul` holds at once
SHARED_ROWS = 8  # rows whose common prompt is read once


def usable(device: torch.device) -> bool:
    """Whether these kernels can run on this device."""
    return triton is not None and device.type == "cuda"


def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


# ---------------------------------------------------------------------------------------------------- norm, rotary, silu


class _RMSNorm(torch.autograd.Function):
    """(x (..., D), delta or None, weight (D,)) -> (x + delta, its norm)."""

    @staticmethod
    def forward(ctx, x, delta, weight, eps):
        D = x.shape[-1]
        rows = x.numel() // D
        x = x.contiguous()
        total = x if delta is None else torch.empty_like(x)
        out, scale = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
        width = triton.next_power_of_2(D)
        tile = max(1, 4096 // width)
        delta = x if delta is None else delta.contiguous()
        _norm_kernel[triton.cdiv(rows, tile),](
            x, delta, weight, total, out, scale, rows, D, eps, ADD=total is not x, ROWS=tile, WIDTH=width
        )
        ctx.save_for_backward(total, weight, scale)
        ctx.adds = total is not x
        return total, out

    @staticmethod
    def backward(ctx, grad_total, grad_out):
        total, weight, scale = ctx.saved_tensors
        D = total.shape[-1]
        rows = total.numel() // D
        width = triton.next_power_of_2(D)
        tile = max(1, 2048 // width)
        programs = min(4 * processors(total.device), triton.cdiv(rows, tile))
        grad_x = torch.empty_like(total)
        partial = torch.empty(programs, D, dtype=torch.float32, device=total.device)
        _norm_backward_kernel[programs,](
            total, weight, scale, grad_out.contiguous(), grad_total.contiguous(), grad_x, partial, rows, D,
            ROWS=tile, WIDTH=width,
        )  # fmt: skip
        return grad_x, grad_x if ctx.adds else None, partial.sum(0).to(weight.dtype), None


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + delta, its root mean square norm times weight): x and delta (..., D), weight (D,), all of one dtype."""
    return _RMSNorm.apply(x, delta, weight, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm without a sum before it."""
    return _RMSNorm.apply(x, None, weight, eps)[1]


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotated(q, k, cos, sin, 1.0)

    @staticmethod
    def backward(ctx, grad_q, grad_k):
        return *_rotated(grad_q, grad_k, *ctx.saved_tensors, -1.0), None, None


def _rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: float) -> tuple[Tensor, Tensor]:
    T, H, E = q.shape
    K = k.shape[1]
    q, k = q.contiguous(), k.contiguous()
    out_q, out_k = torch.empty_like(q), torch.empty_like(k)
    _rotate_kernel[T,](
        q, k, cos, sin, out_q, out_k, sign,
        H=H, K=K, E=E, H_PADDED=triton.next_power_of_2(H), K_PADDED=triton.next_power_of_2(K),
    )  # fmt: skip
    return out_q, out_k


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turn the channel pairs (e, e + E/2) by the angles of each token: q (T, H, E), k (T, K, E), cos and sin (T, E) contiguous,
    all of one dtype. E is a power of two."""
    return _Rotate.apply(q, k, cos, sin)


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        _silu_mul_kernel[triton.cdiv(gate.numel(), TILE),](gate, up, out, gate.numel(), SIZE=TILE)
        return out

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        grid = (triton.cdiv(gate.numel(), TILE),)
        _silu_mul_backward_kernel[grid](gate, up, grad.contiguous(), grad_gate, grad_up, gate.numel(), SIZE=TILE)
        return grad_gate, grad_up


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape and dtype, contiguous."""
    return _SiluMul.apply(gate, up)


if triton is not None:

    @triton.jit
    def _norm_kernel(
        x, delta, weight, total, out, scale, rows, D, eps, ADD: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
    ):
        row, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
        holds = (row < rows)[:, None] & (d < D)[None, :]
        place = row.to(tl.int64)[:, None] * D + d[None, :]
        value = tl.load(x + place, mask=holds, other=0.0).to(tl.float32)
        dtype = out.dtype.element_ty
        if ADD:
            value = (value + tl.load(delta + place, mask=holds, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
            tl.store(total + place, value.to(dtype), mask=holds)
        factor = tl.rsqrt(tl.sum(value * value, 1) / D + eps)
        tl.store(scale + row, factor, mask=row < rows)
        normed = (value * factor[:, None]).to(dtype).to(tl.float32)
        w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
        tl.store(out + place, (normed * w[None, :]).to(dtype), mask=holds)

    @triton.jit
    def _norm_backward_kernel(
        total, weight, scale, grad_out, grad_total, grad_x, partial, rows, D, ROWS: tl.constexpr, WIDTH: tl.constexpr
    ):
        """A program takes every num_programs-th tile of rows and sums its part of the weight's gradient."""
        d = tl.arange(0, WIDTH)
        w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
        grad_w = tl.zeros((WIDTH,), tl.float32)
        for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
            row = start + tl.arange(0, ROWS)
            holds = (row < rows)[:, None] & (d < D)[None, :]
            place = row.to(tl.int64)[:, None] * D + d[None, :]
            factor = tl.load(scale + row, mask=row < rows, other=0.0)
            normed = tl.load(total + place, mask=holds, other=0.0).to(tl.float32) * factor[:, None]
            g = tl.load(grad_out + place, mask=holds, other=0.0).to(tl.float32)
            grad_w += tl.sum(g * normed, 0)
            g = g * w[None, :]
            along = tl.sum(g * normed, 1) / D  # the part of the gradient that would only change x's length
            g = (g - normed * along[:, None]) * factor[:, None]
            g += tl.load(grad_total + place, mask=holds, other=0.0).to(tl.float32)
            tl.store(grad_x + place, g.to(grad_x.dtype.element_ty), mask=holds)
        tl.store(partial + tl.program_id(0) * D + d, grad_w, mask=d < D)

    @triton.jit
    def _rotate_heads(x, out, place, holds, cos, sin, half: tl.constexpr):
        dtype = out.dtype.element_ty
        first = tl.load(x + place, mask=holds, other=0.0).to(tl.float32)
        second = tl.load(x + place + half, mask=holds, other=0.0).to(tl.float32)
        # each product is rounded, and then their sum: as without this kernel
        a, b = (first * cos).to(dtype).to(tl.float32), (second * sin).to(dtype).to(tl.float32)
        tl.store(out + place, (a - b).to(dtype), mask=holds)
        a, b = (second * cos).to(dtype).to(tl.float32), (first * sin).to(dtype).to(tl.float32)
        tl.store(out + place + half, (a + b).to(dtype), mask=holds)

    @triton.jit
    def _rotate_kernel(
        q, k, cos, sin, out_q, out_k, sign,
        H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, H_PADDED: tl.constexpr, K_PADDED: tl.constexpr,
    ):  # fmt: skip
        """One program a token."""
        t, e = tl.program_id(0).to(tl.int64), tl.arange(0, E // 2)
        c = tl.load(cos + t * E + e).to(tl.float32)[None, :]
        s = tl.load(sin + t * E + e).to(tl.float32)[None, :] * sign
        h = tl.arange(0, H_PADDED)[:, None]
        _rotate_heads(q, out_q, (t * H + h) * E + e[None, :], (h < H) & (e >= 0)[None, :], c, s, E // 2)
        h = tl.arange(0, K_PADDED)[:, None]
        _rotate_heads(k, out_k, (t * K + h) * E + e[None, :], (h < K) & (e >= 0)[None, :], c, s, E // 2)

    @triton.jit
    def _silu_mul_kernel(gate, up, out, size, SIZE: tl.constexpr):
        place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
        holds = place < size
        x = tl.load(gate + place, mask=holds, other=0.0).to(tl.float32)
        silu = (x / (1 + tl.exp(-x))).to(out.dtype.element_ty).to(tl.float32)
        u = tl.load(up + place, mask=holds, other=0.0).to(tl.float32)
        tl.store(out + place, (silu * u).to(out.dtype.element_ty), mask=holds)

    @triton.jit
    def _silu_mul_backward_kernel(gate, up, grad, grad_gate, grad_up, size, SIZE: tl.constexpr):
        place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
        holds = place < size
        x = tl.load(gate + place, mask=holds, other=0.0).to(tl.float32)
        u = tl.load(up + place, mask=holds, other=0.0).to(tl.float32)
        g = tl.load(grad + place, mask=holds, other=0.0).to(tl.float32)
        sigmoid = 1 / (1 + tl.exp(-x))
        tl.store(grad_up + place, (g * x * sigmoid).to(grad_up.dtype.element_ty), mask=holds)
        slope = sigmoid * (1 + x * (1 - sigmoid))  # of silu
        tl.store(grad_gate + place, (g * u * slope).to(grad_gate.dtype.element_ty), mask=holds)


# ---------------------------------------------------------------------------------------------------- the paged KV cache


def write_slots(kv: Tensor, page: Tensor, offset: Tensor, k: Tensor, v: Tensor) -> None:
    """Write k and v (B, K, E) into slots of kv (2, N, K, S, E): row b into slot offset[b] of page[b]."""
    B, K, E = k.shape
    _write_kernel[B,](
        kv, page, offset, k.contiguous(), v.contiguous(), kv.stride(0), kv.stride(1), kv.stride(2),
        K=K, E=E, K_PADDED=triton.next_power_of_2(K),
    )  # fmt: skip


def paged_attention(
    q: Tensor, kv: Tensor, page_table: Tensor, prompt_length: Tensor, response_length: Tensor, splits: int | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(E)) v of each row over its tokens: q (B, H, E) -> (B, H, E), in q's dtype.

    kv               (2, N, K, S, E): keys and values, contiguous, of q's dtype. E and S: powers of two, at least 16
    page_table       (B, W) int32: a row's pages, those of its prompt first
    prompt_length    (B,) int, at least 1: tokens in the prompt's pages; only the last page may be partly filled
    response_length  (B,) int: tokens in the response's pages; again only the last may be partly filled
    splits           programs that share the pages of a row. None: two for every multiprocessor of the GPU, but at most 16

    The kernels are "flash decoding": a program goes over its pages with an online softmax (a running maximum and denominator),
    and the results of a row's programs are then combined by their denominators. Rows with the same prompt read it together:
    one program multiplies it with the queries of up to SHARED_ROWS neighbours. Lengths are read on the device, so a CUDA graph
    can hold a call.
    """
    B, H, E = q.shape
    _, N, K, S, _ = kv.shape
    G = H // K
    padded = triton.next_power_of_2(G)
    shared = max(SHARED_ROWS, 16 // padded)  # tl.dot wants 16 rows or more
    chunks = triton.cdiv(B, shared)
    wanted = 2 * processors(q.device)
    prompt_splits, own_splits = splits or min(max(wanted // (chunks * K), 1), 16), splits or min(max(wanted // (B * K), 1), 16)
    parts = prompt_splits + own_splits
    out = q.new_empty(B, K, parts, G, E, dtype=torch.float32)
    lse = q.new_empty(B, K, parts, G, dtype=torch.float32)
    q = q.contiguous()
    shape = dict(G=G, E=E, S=S, PARTS=parts)
    _prompt_kernel[chunks, K, prompt_splits](
        q, kv, page_table, prompt_length, out, lse, E**-0.5, kv.stride(0), page_table.shape[1], B,
        G_PADDED=padded, ROWS=shared, SPLITS=prompt_splits, **shape,
    )  # fmt: skip
    _response_kernel[B, K, own_splits](
        q, kv, page_table, prompt_length, response_length, out, lse, E**-0.5, kv.stride(0), page_table.shape[1],
        G_PADDED=max(16, padded), SPLITS=own_splits, **shape,
    )  # fmt: skip
    mixed = torch.empty_like(q)
    _combine_kernel[B, K](out, lse, mixed, G=G, G_PADDED=padded, E=E, PARTS=parts)
    return mixed


if triton is not None:

    @triton.jit
    def _write_kernel(
        kv, page, offset, k, v, value_stride, page_stride, head_stride, K: tl.constexpr, E: tl.constexpr, K_PADDED: tl.constexpr
    ):
        b, head, e = tl.program_id(0), tl.arange(0, K_PADDED)[:, None], tl.arange(0, E)[None, :]
        source, holds = (b * K + head) * E + e, (head < K) & (e >= 0)
        slot = tl.load(page + b).to(tl.int64) * page_stride + head * head_stride + tl.load(offset + b) * E + e
        dtype = kv.dtype.element_ty
        tl.store(kv + slot, tl.load(k + source, mask=holds).to(dtype), mask=holds)
        tl.store(kv + slot + value_stride, tl.load(v + source, mask=holds).to(dtype), mask=holds)

    @triton.jit
    def _attend_page(query, kv, place, value_offset, reads, scale, top, total, mixed):
        """One page of the online softmax. place: (S, E) offsets of its keys; reads (queries, S): what each query may read.

        top (queries,) is the largest score so far, total the softmax's denominator relative to exp(top), mixed its numerator.
        """
        holds = tl.max(reads.to(tl.int32), 0)[:, None] > 0  # a slot without a token may hold anything
        key = tl.load(kv + place, mask=holds, other=0.0)  # (S, E)
        value = tl.load(kv + place + value_offset, mask=holds, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where(reads, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shrink, p = tl.exp(top - new_top), tl.exp(scores - new_top[:, None])
        total = total * shrink + tl.sum(p, 1)
        mixed = mixed * shrink[:, None] + tl.dot(p.to(value.dtype), value, input_precision="ieee")
        return new_top, total, mixed

    @triton.jit
    def _prompt_kernel(
        q, kv, page_table, prompt_length, out, lse, scale, value_offset, table_width, B,
        G: tl.constexpr, G_PADDED: tl.constexpr, ROWS: tl.constexpr, E: tl.constexpr, S: tl.constexpr, SPLITS: tl.constexpr,
        PARTS: tl.constexpr,
    ):  # fmt: skip
        """One program: ROWS neighbouring rows, key/value head k, split s. out[b, k, s] (G, E) and lse[b, k, s] (G,) cover the
        pages s, s + SPLITS, ... of the row's prompt."""
        chunk, k, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        heads = tl.num_programs(1)
        i, e, slot = tl.arange(0, ROWS * G_PADDED), tl.arange(0, E), tl.arange(0, S)
        b, g = chunk * ROWS + i // G_PADDED, i % G_PADDED  # of each query
        is_query = (b < B) & (g < G)
        query = tl.load(q + ((b * heads + k) * G + g)[:, None] * E + e[None, :], mask=is_query[:, None], other=0.0)
        prompt = tl.load(page_table + b * table_width, mask=b < B, other=-1)  # the first page names the prompt
        top = tl.full((ROWS * G_PADDED,), -1e30, tl.float32)  # finite: a difference of infinities would be nan
        total = tl.zeros((ROWS * G_PADDED,), tl.float32)
        mixed = tl.zeros((ROWS * G_PADDED, E), tl.float32)
        for row in range(chunk * ROWS, tl.minimum(chunk * ROWS + ROWS, B)):
            first_page = tl.load(page_table + row * table_width)
            readers = prompt == first_page
            if tl.sum((readers & (b < row)).to(tl.int32), 0) == 0:  # an earlier row of the same prompt has read it for all
                length = tl.load(prompt_length + row)
                for j in range(split, tl.cdiv(length, S), SPLITS):
                    page = tl.load(page_table + row * table_width + j).to(tl.int64)
                    place = ((page * heads + k) * S + slot[:, None]) * E + e[None, :]
                    reads = readers[:, None] & (slot < length - j * S)[None, :]
                    top, total, mixed = _attend_page(query, kv, place, value_offset, reads, scale, top, total, mixed)
        entry = ((b * heads + k) * PARTS + split) * G + g
        # a split without a page has the weight exp(-inf) = 0, and its result must be 0 and not 0 / 0
        tl.store(out + entry[:, None] * E + e[None, :], mixed / tl.maximum(total, 1e-30)[:, None], mask=is_query[:, None])
        tl.store(lse + entry, top + tl.log(total), mask=is_query)

    @triton.jit
    def _response_kernel(
        q, kv, page_table, prompt_length, response_length, out, lse, scale, value_offset, table_width,
        G: tl.constexpr, G_PADDED: tl.constexpr, E: tl.constexpr, S: tl.constexpr, SPLITS: tl.constexpr, PARTS: tl.constexpr,
    ):  # fmt: skip
        """One program: row b, key/value head k, split s, over the pages s, s + SPLITS, ... of the row's response."""
        b, k, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        heads = tl.num_programs(1)
        g, e, slot = tl.arange(0, G_PADDED), tl.arange(0, E), tl.arange(0, S)
        query = tl.load(q + ((b * heads + k) * G + g[:, None]) * E + e[None, :], mask=(g < G)[:, None], other=0.0)  # (G, E)
        pages, length = page_table + b * table_width + tl.cdiv(tl.load(prompt_length + b), S), tl.load(response_length + b)
        top = tl.full((G_PADDED,), -1e30, tl.float32)
        total = tl.zeros((G_PADDED,), tl.float32)
        mixed = tl.zeros((G_PADDED, E), tl.float32)
        for j in range(split, tl.cdiv(length, S), SPLITS):
            place = ((tl.load(pages + j).to(tl.int64) * heads + k) * S + slot[:, None]) * E + e[None, :]
            reads = (g >= 0)[:, None] & (slot < length - j * S)[None, :]
            top, total, mixed = _attend_page(query, kv, place, value_offset, reads, scale, top, total, mixed)
        entry = ((b * heads + k) * PARTS + PARTS - SPLITS + split) * G + g
        tl.store(out + entry[:, None] * E + e[None, :], mixed / tl.maximum(total, 1e-30)[:, None], mask=(g < G)[:, None])
        tl.store(lse + entry, top + tl.log(total), mask=g < G)

    @triton.jit
    def _combine_kernel(out, lse, mixed, G: tl.constexpr, G_PADDED: tl.constexpr, E: tl.constexpr, PARTS: tl.constexpr):
        """exp(lse) is a part's share of the whole softmax's denominator."""
        first = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)  # row and key/value head
        g, e = tl.arange(0, G_PADDED), tl.arange(0, E)
        top = tl.full((G_PADDED,), -1e30, tl.float32)
        for part in range(PARTS):
            top = tl.maximum(top, tl.load(lse + (first * PARTS + part) * G + g, mask=g < G, other=0.0))
        total = tl.zeros((G_PADDED,), tl.float32)
        value = tl.zeros((G_PADDED, E), tl.float32)
        for part in range(PARTS):
            entry = (first * PARTS + part) * G + g
            weight = tl.exp(tl.load(lse + entry, mask=g < G, other=0.0) - top)
            total += weight
            value += weight[:, None] * tl.load(out + entry[:, None] * E + e[None, :], mask=(g < G)[:, None], other=0.0)
        place = (first * G + g)[:, None] * E + e[None, :]
        tl.store(mixed + place, (value / total[:, None]).to(mixed.dtype.element_ty), mask=(g < G)[:, None])


# ---------------------------------------------------------------------------------------------------- the draw


def sample(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """As rollout.sample: logits (B, V), uniform (B,) float64 -> tokens (B,) int64, log-probs (B,) fp32. Waits for nothing."""
    B, V = logits.shape
    token = torch.empty(B, dtype=torch.int64, device=logits.device)
    logprob = torch.empty(B, dtype=torch.float32, device=logits.device)
    # a 16-bit float is an fp32 with zeros at the end, so fewer bits have to be searched
    bits = {torch.bfloat16: 16, torch.float16: 20, torch.float32: 32}[logits.dtype]
    tile = min(TILE, triton.next_power_of_2(V))
    _sample_kernel[B,](
        logits.contiguous(), uniform, token, logprob, V, temperature or 1.0, top_p, GREEDY=temperature == 0, NUCLEUS=top_p < 1,
        BITS=bits, SIZE=tile, TILES=triton.next_power_of_2(triton.cdiv(V, tile)), num_warps=8,
    )  # fmt: skip
    return token, logprob


if triton is not None:

    @triton.jit
    def _rank(x):
        """The place of an fp32 among all of them. A negative float's bits, read as an integer, grow with its magnitude."""
        bits = x.to(tl.int32, bitcast=True)
        return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)

    @triton.jit
    def _sample_kernel(
        logits, uniform, token, logprob, V, temperature, top_p,
        GREEDY: tl.constexpr, NUCLEUS: tl.constexpr, BITS: tl.constexpr, SIZE: tl.constexpr, TILES: tl.constexpr,
    ):  # fmt: skip
        """One program a row. It reads the row once for the softmax's denominator, once for every two bits of the nucleus'
        smallest logit, and once for the draw, which inverts the cumulative distribution."""
        row, i = tl.program_id(0), tl.arange(0, SIZE)
        logits += row.to(tl.int64) * V
        lane_top = tl.full((SIZE,), -1e38, tl.float32)
        lane_total = tl.zeros((SIZE,), tl.float32)
        lane_best = tl.zeros((SIZE,), tl.int32)
        for start in range(0, V, SIZE):
            x = tl.load(logits + start + i, mask=start + i < V, other=float("-inf")).to(tl.float32) / temperature
            lane_best = tl.where(x > lane_top, start + i, lane_best)
            new_top = tl.maximum(lane_top, x)
            lane_total = lane_total * tl.exp(lane_top - new_top) + tl.exp(x - new_top)
            lane_top = new_top
        top = tl.max(lane_top, 0)
        whole = top + tl.log(tl.sum((lane_total * tl.exp(lane_top - top)).to(tl.float64), 0)).to(tl.float32)
        if GREEDY:
            best = tl.min(tl.where(lane_top == top, lane_best, V - 1), 0)  # the first of equals
            tl.store(token + row, best.to(tl.int64))
            tl.store(logprob + row, top - whole)
        else:
            low = _rank(tl.full((), float("-inf"), tl.float32))
            if NUCLEUS:  # the smallest number above which the mass is less than top_p, in units of a number's last bit
                unit: tl.constexpr = 32 - BITS
                low = low >> unit
                high = _rank(top * temperature * 1.0) >> unit
                high += 1  # the product may have rounded down
                while high - low > 1:
                    step = tl.maximum((high - low) >> 2, 1)
                    cut1, cut2, cut3 = low + step, tl.minimum(low + 2 * step, high - 1), tl.minimum(low + 3 * step, high - 1)
                    above1 = tl.zeros((SIZE,), tl.float32)
                    above2 = tl.zeros((SIZE,), tl.float32)
                    above3 = tl.zeros((SIZE,), tl.float32)
                    for start in range(0, V, SIZE):
                        x = tl.load(logits + start + i, mask=start + i < V, other=float("-inf")).to(tl.float32)
                        p, place = tl.exp(x / temperature - whole), _rank(x) >> unit
                        above1 += tl.where(place > cut1, p, 0.0)
                        above2 += tl.where(place > cut2, p, 0.0)
                        above3 += tl.where(place > cut3, p, 0.0)
                    enough1 = tl.sum(above1.to(tl.float64), 0) >= top_p
                    enough2 = tl.sum(above2.to(tl.float64), 0) >= top_p
                    enough3 = tl.sum(above3.to(tl.float64), 0) >= top_p
                    high = tl.where(enough3, high, tl.where(enough2, cut3, tl.where(enough1, cut2, cut1)))
                    low = tl.where(enough3, cut3, tl.where(enough2, cut2, tl.where(enough1, cut1, low)))
                low = high << unit
            tiles = tl.arange(0, TILES)
            mass = tl.zeros((TILES,), tl.float64)  # of each tile of the vocabulary
            for start in range(0, V, SIZE):
                x = tl.load(logits + start + i, mask=start + i < V, other=float("-inf")).to(tl.float32)
                p = tl.where(_rank(x) >= low, tl.exp(x / temperature - whole), 0.0)
                mass = tl.where(tiles == start // SIZE, tl.sum(p.to(tl.float64), 0), mass)
            total = tl.sum(mass, 0)
            below: tl.constexpr = 0.9999999999999998  # 1 - 2**-52: of a sum, so that a tile and a token in it are always found
            target = tl.minimum(tl.load(uniform + row) * total, total * below)
            passed = tl.cumsum(mass, 0) <= target
            which = tl.minimum(tl.sum(passed.to(tl.int32), 0), (V - 1) // SIZE)
            rest = target - tl.sum(tl.where(tiles < which, mass, 0.0), 0)
            at = which * SIZE + i
            x = tl.load(logits + at, mask=at < V, other=float("-inf")).to(tl.float32)
            p = tl.where(_rank(x) >= low, tl.exp(x / temperature - whole), 0.0).to(tl.float64)
            rest = tl.minimum(rest, tl.sum(p, 0) * below)
            drawn = which * SIZE + tl.sum((tl.cumsum(p, 0) <= rest).to(tl.int32), 0)
            drawn = tl.minimum(drawn, V - 1)  # for a logit that is nan or inf
            tl.store(token + row, drawn.to(tl.int64))
            tl.store(logprob + row, tl.load(logits + drawn).to(tl.float32) / temperature - whole)
