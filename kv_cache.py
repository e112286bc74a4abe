"""A paged KV cache and the attention of a decode step over it.

PagedCache keeps keys and values in pages of one block of memory, and says which page is whose. A prompt's pages are read by
all responses of its group. A decode step has two ways. CacheView does it with torch alone, on any device. On CUDA with Triton,
FixedStep does the same in tensors that never move, so that the whole step is one CUDA graph; its attention is the Triton
kernel `paged_attention` at the end of this file.

The kernel is "flash decoding". One program takes one row, one key/value head with all query heads that share it, and every
SPLITS-th page of the row. It goes over its pages with an online softmax (a running maximum and denominator), and the partial
results of a row's programs are put together afterwards by their denominators. Only pages that hold tokens are read, each once.
Every shape is fixed by the arguments' shapes: the lengths are read on the device, so a call can be part of a CUDA graph.

What it is not: a prefill or training kernel. There is no backward pass, and a query is always the row's newest token.

The model is any callable with model.py's forward (ids, positions, lengths=, cache=), which hands the cache each layer's new
keys and values (`write`) and, in a decode step, its queries (`attend`). Imports no sibling and works without Triton: copy this
file alone. Axes: B rows, N pages in the cache, S token slots a page, W pages a row can have; H query heads, K key/value heads,
G = H / K, E head width; T new tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

try:  # torch's CUDA builds bring it
    import triton
    import triton.language as tl
except ImportError:
    triton = None

PAGE = 64  # S. Half a page is lost per response; a smaller one means more pages, and each costs a little beyond its tokens


@dataclass(eq=False)
class Prompt:
    """A prompt in the cache; its pages are read by every row of its group that is alive."""

    length: int
    pages: list[int] = field(default_factory=list)
    readers: int = 0


@dataclass(eq=False, kw_only=True)
class Response:
    """A response in the cache: `written` of its tokens since `prompt`, in `pages`."""

    prompt: Prompt | None = None
    pages: list[int] = field(default_factory=list)
    written: int = 0


def pages_for(tokens: int) -> int:
    return math.ceil(tokens / PAGE)


def smallest_cache(prompt: int, response: int) -> int:
    """The tokens that a cache must have room for to finish one response of this length to a prompt of that."""
    # a row that was put back begins with a prompt that holds part of its response: one page more than the two by themselves
    return PAGE * (pages_for(prompt) + pages_for(response) + 1)


def on_device(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of the host's numbers. To CUDA they go through pinned memory: a plain copy would wait for all work so far."""
    tensor = torch.as_tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class PagedCache:
    """Keys and values in pages: store[layer] (2, N, K, S, E), one block of memory whose size never changes.

    A page holds S tokens of one prompt or of one response. Responses fill the block from its beginning, prompts from its end,
    and a page that becomes free is filled with the innermost one of its side. So the pages of either kind are always one
    piece, and attention reads them where they are: see CacheView.attend.
    """

    def __init__(self, config: Any, pages: int, *, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.num_hidden_layers, 2, pages, config.num_key_value_heads, PAGE, config.head_dim)
        self.store = torch.empty(shape, dtype=dtype, device=device)  # a page is zeroed when it is taken
        self.own: list[Response] = []  # whose page 0, 1, 2, ... is
        self.shared: list[Prompt] = []  # whose page N - 1, N - 2, ... is
        self.version = 0  # how often a page was taken, moved or freed: whoever holds a table of pages compares it

    @property
    def pages(self) -> int:
        return self.store.shape[2]

    @property
    def free(self) -> int:
        return self.pages - len(self.own) - len(self.shared)

    def add_prompt(self, length: int) -> Prompt:
        """Take the pages of a prompt, which `prefill` then writes."""
        prompt = Prompt(length)
        for _ in range(pages_for(length)):
            prompt.pages.append(self._take(self.pages - 1 - len(self.shared)))
            self.shared.append(prompt)
        return prompt

    def add_row(self, row: Response, prompt: Prompt) -> None:
        row.prompt, row.written = prompt, 0
        prompt.readers += 1

    def grow(self, row: Response) -> None:
        """Take the next page of a response."""
        row.pages.append(self._take(len(self.own)))
        self.own.append(row)

    def _take(self, page: int) -> int:
        if not self.free:
            raise RuntimeError(f"all {self.pages} pages of the KV cache are taken")
        self.store[:, :, page] = 0  # slots that hold no token are masked, but 0 * nan would still be nan
        self.version += 1
        return page

    def drop(self, row: Response) -> None:
        """Free a row's pages, and with the last row that reads them its prompt's."""
        while row.pages:
            page, innermost = row.pages.pop(), len(self.own) - 1
            self.own[page] = self._move(innermost, page, self.own[innermost])
            self.own.pop()
        self.version += 1
        row.prompt.readers -= 1
        while row.prompt.pages and not row.prompt.readers:
            page, innermost = row.prompt.pages.pop(), self.pages - len(self.shared)
            self.shared[self.pages - 1 - page] = self._move(innermost, page, self.shared[-1])
            self.shared.pop()
        row.prompt = None

    def _move(self, source: int, target: int, owner: Any) -> Any:
        if source != target:
            self.store[:, :, target] = self.store[:, :, source]
            owner.pages[owner.pages.index(source)] = target
        return owner

    def prefill(self, prompts: Sequence[Prompt]) -> "CacheView":
        """For a packed forward over new prompts: their tokens are written, and attend to each other only."""
        slots = [(prompt.pages[t // PAGE], t % PAGE) for prompt in prompts for t in range(prompt.length)]
        return CacheView(self.store, slots)

    def decode(self, rows: Sequence[Response]) -> "CacheView":
        """For a forward over the next token of each row: it is written, and attends to everything before it and itself."""
        view = CacheView(self.store, [(row.pages[-1], row.written % PAGE) for row in rows])
        batch = {row: b for b, row in enumerate(rows)}
        filled = [PAGE] * len(self.own)
        readers: dict[Prompt, list[int]] = {}
        for b, row in enumerate(rows):
            filled[row.pages[-1]] = row.written % PAGE + 1
            readers.setdefault(row.prompt, []).append(b)
        view.set_own([batch[row] for row in self.own], filled)
        # a prompt's last page may be partly filled; pages count from the end of the block, so the lists are turned round
        last = {prompt.pages[-1]: prompt.length - PAGE * (len(prompt.pages) - 1) for prompt in readers}
        first = self.pages - len(self.shared)
        prompts = self.shared[::-1]
        view.set_shared(
            [readers[prompt] for prompt in prompts], [last.get(first + i, PAGE) for i in range(len(prompts))], len(rows)
        )
        return view


class CacheView:
    """What one forward does with the cache: `write` the new tokens' keys and values, and `attend` in a decode step."""

    def __init__(self, store: Tensor, slots: Sequence[tuple[int, int]]) -> None:
        self.store = store
        self.page, self.offset = on_device(slots, torch.int64, store.device).unbind(1)  # (T,) each

    def _mask(self, filled: Sequence[int]) -> Tensor:
        """(pages, 1, 1, S), added to the scores: 0 where a slot holds a token, else -inf."""
        slots = torch.arange(PAGE, device=self.store.device)
        empty = slots >= on_device(filled, torch.int64, slots.device)[:, None]
        return self.store.new_zeros(empty.shape).masked_fill_(empty, -math.inf)[:, None, None]

    def set_own(self, rows: Sequence[int], filled: Sequence[int]) -> None:
        """The batch row that each page of a response belongs to, and how many of its slots hold a token."""
        self.own_row = on_device(rows, torch.int64, self.store.device)  # (n_own,)
        self.own_mask = self._mask(filled)

    def set_shared(self, readers: Sequence[Sequence[int]], filled: Sequence[int], rows: int) -> None:
        """The batch rows that read each page of a prompt; groups with fewer members are filled up with a reader that is
        counted to row `rows`, which does not exist."""
        width = max(map(len, readers))
        padded = [[*group, *[rows] * (width - len(group))] for group in readers]
        self.readers = on_device(padded, torch.int64, self.store.device)  # (n_shared, M)
        self.shared_mask = self._mask(filled)
        self.entry_row = torch.cat([self.own_row, self.readers.flatten()])  # (n_own + n_shared * M,)

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """k, v (T, K, E): the keys and values of the new tokens go to their slots."""
        write_slots(self.store[layer], self.page, self.offset, k, v)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """One decode step's attention over pages: q (B, H, E) -> (B, H, E).

        Softmax over all keys of a row, in two levels: within each page first, then over the row's pages, where a page weighs
        as much as its softmax denominator exp(lse) says. No key is copied or repeated: a page is a batch element of one
        attention call, and the queries of the rows that look at it are brought to it; a prompt's page meets those of the
        whole group at once.
        """
        B, H, E = q.shape
        keys, values = self.store[layer]  # (N, K, S, E)
        n_own, (n_shared, M), K = len(self.own_row), self.readers.shape, keys.shape[1]
        q = q.reshape(B, K, H // K, E).to(keys.dtype)
        out, lse = page_attention(q[self.own_row], keys[:n_own], values[:n_own], self.own_mask)  # (n_own, K, G, E)
        group = q[self.readers.clamp(max=B - 1)].transpose(1, 2).reshape(n_shared, K, -1, E)  # (n_shared, K, M G, E)
        group_out, group_lse = page_attention(group, keys[-n_shared:], values[-n_shared:], self.shared_mask)
        group_out = group_out.view(n_shared, K, M, -1, E).transpose(1, 2).flatten(0, 1)  # (n_shared M, K, G, E)
        group_lse = group_lse.view(n_shared, K, M, -1).transpose(1, 2).flatten(0, 1)
        out, lse = torch.cat([out, group_out]), torch.cat([lse, group_lse])
        rows = self.entry_row[:, None, None].expand_as(lse)
        top = lse.new_full((B + 1, *lse.shape[1:]), -math.inf).scatter_reduce_(0, rows, lse, "amax")
        share = torch.exp(lse - top[self.entry_row])
        total = torch.zeros_like(top).index_add_(0, self.entry_row, share)
        mixed = total.new_zeros(B + 1, *out.shape[1:]).index_add_(0, self.entry_row, share[..., None] * out)
        return (mixed / total[..., None])[:B].to(q.dtype).view(B, H, E)


def write_slots(kv: Tensor, page: Tensor, offset: Tensor, k: Tensor, v: Tensor) -> None:
    """Put k and v (T, K, E) into slots `offset` of pages `page`, (T,) each, of one layer's kv (2, N, K, S, E)."""
    kv[0][page, :, offset] = k.to(kv.dtype)
    kv[1][page, :, offset] = v.to(kv.dtype)


def page_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(E) + mask) v with the logarithm of its denominator.

    q (N, K, Q, E), k and v (N, K, S, E), mask (N, 1, 1, S) of q's dtype -> (N, K, Q, E), lse (N, K, Q) in fp32.
    """
    if q.device.type == "cpu":  # the kernel behind scaled_dot_product_attention, which keeps the denominator to itself
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=mask)
    scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1]) + mask  # (N, K, Q, S)
    lse = scores.logsumexp(-1)
    return torch.exp(scores - lse[..., None]).to(v.dtype) @ v, lse


class FixedStep:
    """A decode step of up to `places` rows whose tensors never move, so that a CUDA graph can hold it.

    A step is hundreds of small kernels, and to launch them one by one takes longer than to run them; a graph is one launch.
    It reads the parameters where they are and ends with the call of `generate` it was captured in: it cannot be stale.
    The model takes it for its cache. Places without a row do the last row's work once more.
    """

    def __init__(self, model: Any, cache: PagedCache, places: int, width: int, attention: Callable, pool: Any) -> None:
        device = cache.store.device
        self.model, self.cache, self.places, self.attention, self.pool = model, cache, places, attention, pool
        self.tokens = torch.zeros(places, 1, dtype=torch.int64, device=device)
        self.state = torch.zeros(5, places, dtype=torch.int64, device=device)
        self.position, self.page, self.offset, self.prompt_length, self.own_length = self.state
        self.table = torch.zeros(places, width, dtype=torch.int32, device=device)  # a row's pages, its prompt's first
        self.version, self.graph = -1, None

    def __call__(self, rows: Sequence[Response], tokens: Tensor) -> Tensor:
        """tokens (B,), the newest of each row -> logits (B, V), which the next step of any FixedStep overwrites."""
        B, device = len(rows), self.tokens.device
        padded = [*rows, *[rows[-1]] * (self.places - B)]
        state = [
            (row.prompt.length + row.written, row.pages[-1], row.written % PAGE, row.prompt.length, row.written + 1)
            for row in padded
        ]
        self.state.copy_(on_device(state, torch.int64, device).T)
        if self.version != self.cache.version:
            table = np.zeros(self.table.shape, np.int32)
            for b, row in enumerate(padded):
                table[b, : len(row.prompt.pages) + len(row.pages)] = row.prompt.pages + row.pages
            self.table.copy_(on_device(table, torch.int32, device))
            self.version = self.cache.version
        self.tokens[:B, 0], self.tokens[B:, 0] = tokens, tokens[-1]
        if device.type != "cuda":
            return self.forward()[:B]
        if self.graph is None:
            self.capture()
        self.graph.replay()
        return self.logits[:B]

    def forward(self) -> Tensor:
        return self.model(self.tokens, self.position[:, None], cache=self)[:, 0]  # (places, V)

    def capture(self) -> None:
        """Record `forward` as a graph, after one run that loads its kernels; both write what the replay will write again."""
        stream = capture_stream(self.tokens.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.forward()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        settings = dict(pool=self.pool, stream=stream, capture_error_mode="thread_local")  # other threads may go on
        with torch.cuda.graph(self.graph, **settings):
            self.logits = self.forward()

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        write_slots(self.cache.store[layer], self.page, self.offset, k, v)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        kv = self.cache.store[layer]
        return self.attention(q.to(kv.dtype), kv, self.table, self.prompt_length, self.own_length).to(q.dtype)


def places_for(rows: int) -> int:
    """The size of the step that decodes so many rows: 8, 16, 24, 32, 48, 64, 96, ...: few graphs, little of them idle."""
    size = max(8, 1 << (rows - 1).bit_length())
    return size * 3 // 4 if size > 16 and rows <= size * 3 // 4 else size


@cache
def capture_stream(device: torch.device) -> Any:
    """The stream on which all graphs are recorded. One for good: cuBLAS keeps 32 MB for every stream that it has seen."""
    return torch.cuda.Stream(device)


def decode_kernel(device: torch.device, head_dim: int) -> Callable | None:
    """`paged_attention`, for FixedStep, if it can run: on CUDA with Triton, with a head width it has. Else None."""
    can_run = triton is not None and device.type == "cuda" and head_dim in (16, 32, 64, 128, 256)
    return paged_attention if can_run else None

if triton is not None:

    @triton.jit
    def _decode_kernel(
        q, kv, table, prompt_length, own_length, out, lse, scale, value_offset, table_width,
        G: tl.constexpr, G_PADDED: tl.constexpr, E: tl.constexpr, S: tl.constexpr, SPLITS: tl.constexpr,
    ):  # fmt: skip
        """Row b, head k, split s: out[b, k, s] (G, E) and lse[b, k, s] (G,) over pages s, s + SPLITS, ... of the row."""
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
