"""Attention of one decode step over a paged KV cache, as a Triton kernel: what rollout.py uses on a GPU.

What it is: "flash decoding". One program takes one row, one key/value head with all query heads that share it, and every
SPLITS-th page of the row; it goes over its pages with an online softmax (a running maximum and denominator), and the partial
results of a row's programs are put together afterwards by their denominators. Only pages that hold tokens are read, each once,
and every shape is fixed by the arguments' shapes: the lengths are read on the device, so a call can be part of a CUDA graph.

What it is not: a prefill or training kernel. There is no backward pass, and a query is always the row's newest token.

Needs Triton (it comes with torch's CUDA builds). Imports no sibling: copy this file alone. Axes: B rows, H query heads,
K key/value heads, G = H / K, E head width, N pages in the cache, S token slots a page, W pages a row can have.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _decode_kernel(
    q, kv, table, prompt_length, own_length, out, lse, scale, value_offset, table_width,
    G: tl.constexpr, G_PADDED: tl.constexpr, E: tl.constexpr, S: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Row b, key/value head k, split s: out[b, k, s] (G, E) and lse[b, k, s] (G,) over pages s, s + SPLITS, ... of the row."""
    b, k, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    g, e, slot = tl.arange(0, G_PADDED), tl.arange(0, E), tl.arange(0, S)  # G is padded: tl.dot wants 16 rows or more
    in_group = g < G
    query = tl.load(q + ((b * heads + k) * G + g[:, None]) * E + e[None, :], mask=in_group[:, None], other=0.0)  # (G, E)
    prompt, own = tl.load(prompt_length + b), tl.load(own_length + b)
    prompt_pages = tl.cdiv(prompt, S)
    top = tl.full((G_PADDED,), float("-inf"), tl.float32)  # the largest score so far
    total = tl.zeros((G_PADDED,), tl.float32)  # the softmax's denominator, relative to exp(top)
    mixed = tl.zeros((G_PADDED, E), tl.float32)  # its numerator
    for i in range(split, prompt_pages + tl.cdiv(own, S), SPLITS):
        page = tl.load(table + b * table_width + i).to(tl.int64)
        filled = tl.where(i < prompt_pages, prompt - i * S, own - (i - prompt_pages) * S)  # at least 1
        place = kv + ((page * heads + k) * S + slot[:, None]) * E + e[None, :]
        holds = slot < filled
        key = tl.load(place, mask=holds[:, None], other=0.0)  # (S, E)
        value = tl.load(place + value_offset, mask=holds[:, None], other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale  # (G, S)
        scores = tl.where(holds[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shrink, p = tl.exp(top - new_top), tl.exp(scores - new_top[:, None])
        total = total * shrink + tl.sum(p, 1)
        mixed = mixed * shrink[:, None] + tl.dot(p.to(value.dtype), value, input_precision="ieee")
        top = new_top
    entry = ((b * heads + k) * SPLITS + split) * G + g
    # a split without a page has weight exp(-inf) = 0, and its sum is 0 and not 0 / 0
    tl.store(out + entry[:, None] * E + e[None, :], mixed / tl.maximum(total, 1e-30)[:, None], mask=in_group[:, None])
    tl.store(lse + entry, top + tl.log(total), mask=in_group)


def paged_attention(
    q: Tensor, kv: Tensor, table: Tensor, prompt_length: Tensor, own_length: Tensor, splits: int | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(E)) v of each row over its tokens: q (B, H, E) -> (B, H, E), in q's dtype.

    kv             (2, N, K, S, E): keys and values of the cache's pages, contiguous, of q's dtype
    table          (B, W) int32: a row's pages, those of its prompt first
    prompt_length  (B,) int: tokens in the prompt's pages; only its last page may be partly filled
    own_length     (B,) int: tokens in the pages after those, at least 1 of the two; again only the last partly filled
    splits         programs among which a row's pages are dealt out, so that few rows keep the whole GPU busy; None: as many
                   as make two programs for every multiprocessor, at most 16

    Slots that hold no token are never read. E and S must be powers of two, from 16 on.
    """
    B, H, E = q.shape
    _, N, K, S, _ = kv.shape
    G = H // K
    if splits is None:
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count
        splits = min(max(2 * processors // (B * K), 1), 16)
    out = q.new_empty(B, K, splits, G, E, dtype=torch.float32)
    lse = q.new_empty(B, K, splits, G, dtype=torch.float32)
    _decode_kernel[B, K, splits](
        q.contiguous(), kv, table, prompt_length, own_length, out, lse, E**-0.5, kv.stride(0), table.shape[1],
        G=G, G_PADDED=max(16, triton.next_power_of_2(G)), E=E, S=S, SPLITS=splits,
    )  # fmt: skip
    share = torch.softmax(lse, 2)  # exp(lse) is each split's part of the whole softmax's denominator
    return (share[..., None] * out).sum(2).to(q.dtype).view(B, H, E)
