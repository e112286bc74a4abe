"""A paged KV cache, and decode steps over it.

`PagedCache` keeps keys and values in pages. A prompt is stored once and read by its whole group. `Decoder` runs a decode step
in one of two ways. `CacheView` needs torch alone and runs on any device. On CUDA with Triton, `FixedStep` does the same in
tensors that never move, so that the whole step is one CUDA graph; its attention is the kernel `paged_attention`. There is no
backward pass, and a decode step has one query a row, its newest token.

The model is any callable with model.py's forward (ids, positions, cache=) and its `config` and `device`. Its layers call the
cache's `write` with new keys and values and, in a decode step, `attend` with the queries. Imports no sibling: copy this file
alone. Axes: B rows (responses being decoded), N pages in the cache, S token slots a page, W pages a row can have, T new tokens,
V vocabulary; H query heads, K key/value heads, G = H / K, E head width, M rows that read a prompt.
"""

import math
import warnings
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

SHARED_ROWS = 8  # neighbouring rows whose common prompt is read once
PAGE = 64  # S. Each response leaves half a page unused on average; smaller pages are more pages, and each has its overhead


@dataclass(eq=False)
class Prompt:
    """A prompt in the cache."""

    length: int
    pages: list[int] = field(default_factory=list)
    ref_count: int = 0  # rows that read it


@dataclass(eq=False, kw_only=True)
class Response:
    """A response in the cache, also called a row."""

    prompt: Prompt | None = None
    pages: list[int] = field(default_factory=list)
    written: int = 0  # its tokens in `pages`

    @property
    def needs_page(self) -> bool:
        """Whether its pages are full: its next token needs another one."""
        return self.written % PAGE == 0


def pages_for(tokens: int) -> int:
    """How many pages this many tokens need."""
    return math.ceil(tokens / PAGE)


def least_pages(prompt: int, response: int) -> int:
    """The pages of the smallest cache for a prompt with its longest response, both in tokens. One more than the two need: a
    preempted row starts again with part of its response in its prompt."""
    return pages_for(prompt) + pages_for(response) + 1


def on_device(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of these numbers."""
    tensor = torch.as_tensor(values, dtype=dtype)
    # from pinned memory, because a plain copy to CUDA would wait for all work so far
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class PagedCache:
    """Keys and values in pages: store[layer] (2, N, K, S, E), one block of memory whose size never changes. A page holds tokens
    of one prompt or of one response. Responses fill the block from its start, prompts from its end. When a page is freed, the
    last one of its kind moves there: so each kind stays contiguous, and CacheView.attend reads it in place."""

    def __init__(self, config: Any, pages: int, *, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.num_hidden_layers, 2, pages, config.num_key_value_heads, PAGE, config.head_dim)
        self.pages = pages
        self.store = torch.empty(shape, dtype=dtype, device=device)  # a page is zeroed when it is allocated
        self.response_owners: list[Response] = []  # of page 0, 1, 2, ...
        self.prompt_owners: list[Prompt] = []  # of page N - 1, N - 2, ...
        self.version = 0  # counts changes of the pages: a page table of another version is out of date

    @property
    def free_pages(self) -> int:
        return self.pages - len(self.response_owners) - len(self.prompt_owners)

    def allocate_prompt(self, length: int) -> Prompt:
        """Allocate the pages of a prompt of `length` tokens, for `prefill` to write. RuntimeError if the cache is full."""
        prompt = Prompt(length)
        for _ in range(pages_for(length)):
            prompt.pages.append(self._clear(self.pages - 1 - len(self.prompt_owners)))
            self.prompt_owners.append(prompt)
        return prompt

    def add_row(self, row: Response, prompt: Prompt) -> None:
        """Let a new response read a prompt."""
        row.prompt, row.written = prompt, 0
        prompt.ref_count += 1

    def allocate(self, row: Response) -> None:
        """Allocate the next page of a response. RuntimeError if the cache is full."""
        row.pages.append(self._clear(len(self.response_owners)))
        self.response_owners.append(row)

    def _clear(self, page: int) -> int:
        if not self.free_pages:
            raise RuntimeError(f"all {self.pages} pages of the KV cache are in use")
        self.store[:, :, page] = 0  # slots without a token are masked, but 0 * nan would still be nan
        self.version += 1
        return page

    def free(self, row: Response) -> None:
        """Free the pages of a response, and those of its prompt if no other response reads it."""
        while row.pages:
            page, last = row.pages.pop(), len(self.response_owners) - 1
            self.response_owners[page] = self._move(last, page, self.response_owners[last])
            self.response_owners.pop()
        self.version += 1
        row.prompt.ref_count -= 1
        while row.prompt.pages and not row.prompt.ref_count:
            page, last = row.prompt.pages.pop(), self.pages - len(self.prompt_owners)
            self.prompt_owners[self.pages - 1 - page] = self._move(last, page, self.prompt_owners[-1])
            self.prompt_owners.pop()
        row.prompt = None

    def _move(self, source: int, target: int, owner: Any) -> Any:
        if source != target:
            self.store[:, :, target] = self.store[:, :, source]
            owner.pages[owner.pages.index(source)] = target
        return owner

    def prefill(self, prompts: Sequence[Prompt]) -> "CacheView":
        """For a packed forward over new prompts, which writes their tokens. Their attention does not read the cache."""
        slots = [(prompt.pages[t // PAGE], t % PAGE) for prompt in prompts for t in range(prompt.length)]
        return CacheView(self.store, slots)

    def decode(self, rows: Sequence[Response]) -> "CacheView":
        """For a forward over the next token of each row, which is written and attends to itself and to all before it."""
        view = CacheView(self.store, [(row.pages[-1], row.written % PAGE) for row in rows])
        batch = {row: b for b, row in enumerate(rows)}
        readers: dict[Prompt, list[int]] = {}
        filled = [PAGE] * self.pages  # how many slots of each page hold a token: only an owner's last page has empty ones
        for row, b in batch.items():
            filled[row.pages[-1]] = row.written % PAGE + 1
            readers.setdefault(row.prompt, []).append(b)
        for prompt in readers:
            filled[prompt.pages[-1]] = prompt.length - PAGE * (len(prompt.pages) - 1)
        by_page = reversed(self.prompt_owners)  # they own the block from its end
        view.set_pages([batch[row] for row in self.response_owners], [readers[prompt] for prompt in by_page], filled)
        return view


class CacheView:
    """What the layers of one forward call. slots: the page of each of the T new tokens, and its slot in the page."""

    def __init__(self, store: Tensor, slots: Sequence[tuple[int, int]]) -> None:
        self.store = store
        self.page, self.offset = on_device(slots, torch.int64, store.device).unbind(1)  # (T,) each

    def set_pages(self, rows: Sequence[int], readers: Sequence[Sequence[int]], filled: Sequence[int]) -> None:
        """For a decode step: the row of each page of a response, the rows that read each page of a prompt, and how many slots
        of each page in the cache hold a token."""
        device = self.store.device
        B, M = len(self.page), max(map(len, readers))
        # smaller groups are padded with row B, which does not exist: `attend` drops its result
        padded = [[*group, *[B] * (M - len(group))] for group in readers]
        self.response_row = on_device(rows, torch.int64, device)  # (n_response,)
        self.readers = on_device(padded, torch.int64, device)  # (n_prompt, M)
        self.result_row = torch.cat([self.response_row, self.readers.flatten()])  # (n_response + n_prompt M,)
        empty = torch.arange(PAGE, device=device) >= on_device(filled, torch.int64, device)[:, None]  # (N, S)
        mask = self.store.new_zeros(empty.shape).masked_fill_(empty, -math.inf)[:, None, None]  # added to the scores
        self.response_mask = mask[: len(rows)]
        self.prompt_mask = mask[-len(readers) :]

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write the keys and values of the new tokens, k and v (T, K, E)."""
        keys, values = self.store[layer]  # (N, K, S, E)
        keys[self.page, :, self.offset] = k.to(keys.dtype)
        values[self.page, :, self.offset] = v.to(values.dtype)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Attention of each row's newest token over all its tokens: q (B, H, E) -> (B, H, E). The softmax is taken within each
        page first, and then over the row's pages, with exp(lse) as a page's weight. No key is copied: a page is a batch element
        of one attention call, with the queries of all rows that read it."""
        B, H, E = q.shape
        keys, values = self.store[layer]  # (N, K, S, E)
        n_response, (n_prompt, M), K = len(self.response_row), self.readers.shape, keys.shape[1]
        q = q.reshape(B, K, H // K, E).to(keys.dtype)
        own = q[self.response_row]  # (n_response, K, G, E)
        out, lse = page_attention(own, keys[:n_response], values[:n_response], self.response_mask)
        group = q[self.readers.clamp(max=B - 1)].transpose(1, 2).reshape(n_prompt, K, -1, E)  # (n_prompt, K, M G, E)
        group_out, group_lse = page_attention(group, keys[-n_prompt:], values[-n_prompt:], self.prompt_mask)
        group_out = group_out.view(n_prompt, K, M, -1, E).transpose(1, 2).flatten(0, 1)  # (n_prompt M, K, G, E)
        group_lse = group_lse.view(n_prompt, K, M, -1).transpose(1, 2).flatten(0, 1)
        out, lse = torch.cat([out, group_out]), torch.cat([lse, group_lse])
        rows = self.result_row[:, None, None].expand_as(lse)
        top = lse.new_full((B + 1, *lse.shape[1:]), -math.inf).scatter_reduce_(0, rows, lse, "amax")
        weight = torch.exp(lse - top[self.result_row])
        total = torch.zeros_like(top).index_add_(0, self.result_row, weight)
        mixed = total.new_zeros(B + 1, *out.shape[1:]).index_add_(0, self.result_row, weight[..., None] * out)
        return (mixed / total[..., None])[:B].to(q.dtype).view(B, H, E)


def page_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(E) + mask) v, and the logarithm of the softmax's denominator. q (N, K, Q, E), k and v (N, K, S, E),
    mask (N, 1, 1, S) of q's dtype -> (N, K, Q, E), lse (N, K, Q) in fp32."""
    if q.device.type == "cpu":  # the kernel under scaled_dot_product_attention, which does not return the denominator
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=mask)
    scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1]) + mask  # (N, K, Q, S)
    lse = scores.logsumexp(-1)
    return torch.exp(scores - lse[..., None]).to(v.dtype) @ v, lse


class Decoder:
    """Runs decode steps and draws their tokens: as CUDA graphs if `decode_kernel` finds a kernel, else with torch alone.

    width  W
    draw   (logits (B, V), uniform (B,) float64) -> tokens (B,), log-probabilities (B,)
    """

    def __init__(self, model: Any, cache: PagedCache, width: int, draw: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self.model, self.cache, self.width, self.draw = model, cache, width, draw
        self.kernel = decode_kernel(model.device, model.config.head_dim)
        self.steps: dict[int, FixedStep] = {}  # by their batch size
        self.pool = torch.cuda.graph_pool_handle() if self.kernel and model.device.type == "cuda" else None

    def __call__(self, rows: Sequence[Response], tokens: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """The newest tokens (B,) and a random number for each -> the next tokens and their log-probabilities (B,). Every row
        must have a page for its token (see `needs_page`), and afterwards the caller counts the token in `written`."""
        if self.kernel is None:
            positions = [[row.prompt.length + row.written] for row in rows]
            positions = on_device(positions, torch.int64, self.model.device)
            return self.draw(self.model(tokens[:, None], positions, cache=self.cache.decode(rows))[:, 0], uniform)
        size = padded_batch_size(len(rows))
        if size not in self.steps:
            self.steps[size] = FixedStep(self.model, self.cache, size, self.width, self.kernel, self.draw, self.pool)
        return self.steps[size](rows, tokens, uniform)


class FixedStep(CacheView):
    """A decode step of up to `batch_size` rows whose tensors never move, so that it can be a CUDA graph. A step is hundreds of
    small kernels, and launching them one by one takes longer than running them. A graph is one launch. It reads the parameters
    in place, so it cannot be stale. A smaller batch is padded with its last row. The step ends by moving all rows to their next
    token, so as long as no page changes hands a call has nothing to tell it but the random numbers."""

    def __init__(self, model, cache, batch_size: int, width: int, attention: Callable, draw: Callable, pool: Any) -> None:
        self.model, self.cache, self.batch_size = model, cache, batch_size
        self.attention, self.draw, self.pool = attention, draw, pool
        self.store = cache.store
        device = cache.store.device
        self.tokens = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.uniform = torch.zeros(batch_size, dtype=torch.float64, device=device)
        self.logprobs = torch.zeros(batch_size, device=device)
        self.state = torch.zeros(5, batch_size, dtype=torch.int64, device=device)
        self.prompt_length, self.page, self.position, self.offset, self.response_length = self.state
        self.page_table = torch.zeros(batch_size, width, dtype=torch.int32, device=device)  # a row's pages, its prompt's first
        self.version, self.graph = -1, None

    def __call__(self, rows: Sequence[Response], tokens: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """As Decoder."""
        B = len(rows)
        self.uniform[:B] = uniform
        if self.version != self.cache.version:
            self.set_rows([*rows, *[rows[-1]] * (self.batch_size - B)])
            self.tokens[:B] = tokens
        self.tokens[B:] = self.tokens[B - 1]  # the padding writes what the last row writes, to the same slot
        if self.tokens.device.type != "cuda":
            self.forward()
        else:
            if self.graph is None:
                self.capture()
            self.graph.replay()
        return self.tokens[:B].clone(), self.logprobs[:B].clone()

    def set_rows(self, rows: Sequence[Response]) -> None:
        """Note where each row's next token goes, and its pages."""
        device = self.tokens.device
        state = [
            (row.prompt.length, row.pages[-1], row.prompt.length + row.written, row.written % PAGE, row.written + 1)
            for row in rows
        ]
        self.state.copy_(on_device(state, torch.int64, device).T)
        table = np.zeros(self.page_table.shape, np.int32)
        for b, row in enumerate(rows):
            table[b, : len(row.prompt.pages) + len(row.pages)] = row.prompt.pages + row.pages
        self.page_table.copy_(on_device(table, torch.int32, device))
        self.version = self.cache.version

    def forward(self) -> None:
        logits = self.model(self.tokens[:, None], self.position[:, None], cache=self)[:, 0]  # (batch_size, V)
        token, logprob = self.draw(logits, self.uniform)
        self.tokens.copy_(token)
        self.logprobs.copy_(logprob)
        self.state[2:] += 1  # position, offset, response_length

    def capture(self) -> None:
        """Record `forward` as a graph. It is run once before, to load the kernels, and what that changed is put back; the
        replay writes the same slots again. Not with torch.cuda.graph, which waits for the GPU and collects garbage first."""
        before = self.tokens.clone(), self.state.clone()
        stream = capture_stream(self.tokens.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.forward()
        torch.cuda.current_stream().wait_stream(stream)
        self.tokens.copy_(before[0])
        self.state.copy_(before[1])
        self.graph = torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")  # other threads may use CUDA
            self.forward()
            self.graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        if k.device.type == "cuda":
            write_slots(self.store[layer], self.page, self.offset, k, v)
        else:
            super().write(layer, k, v)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        kv = self.store[layer]
        return self.attention(q.to(kv.dtype), kv, self.page_table, self.prompt_length, self.response_length).to(q.dtype)


def padded_batch_size(rows: int) -> int:
    """The batch size of the step for this many rows, of 8, 16, 24, 32, 48, 64, 96, ...: few graphs, little padding."""
    size = max(8, 1 << (rows - 1).bit_length())
    return size * 3 // 4 if size > 16 and rows <= size * 3 // 4 else size


@cache
def capture_stream(device: torch.device) -> Any:
    """The stream that all graphs are recorded on. One for all, because cuBLAS keeps 32 MB for every stream it has seen."""
    return torch.cuda.Stream(device)


def decode_kernel(device: torch.device, head_dim: int) -> Callable | None:
    """`paged_attention` if it can run: on CUDA with Triton, with one of its head widths. Else None."""
    if device.type != "cuda":
        return None
    if triton is None or head_dim not in (16, 32, 64, 128, 256):
        warnings.warn(f"sampling without Triton's kernels (head width {head_dim}), which is slower", stacklevel=1)
        return None
    return paged_attention


# ---------------------------------------------------------------------------------------------------- kernels for a GPU

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
    chunks = math.ceil(B / shared)
    wanted = 2 * torch.cuda.get_device_properties(q.device).multi_processor_count if splits is None else 0
    prompt_splits = splits or min(max(wanted // (chunks * K), 1), 16)
    own_splits = splits or min(max(wanted // (B * K), 1), 16)
    parts = prompt_splits + own_splits
    out = q.new_empty(B, K, parts, G, E, dtype=torch.float32)
    lse = q.new_empty(B, K, parts, G, dtype=torch.float32)
    q = q.contiguous()
    tensors = (q, kv, page_table, prompt_length, response_length, out, lse)
    sizes = (E**-0.5, kv.stride(0), page_table.shape[1], B)
    shape = dict(G=G, E=E, S=S, PARTS=parts)
    of_prompts = dict(OWN=False, G_PADDED=padded, ROWS=shared, SPLITS=prompt_splits)
    of_responses = dict(OWN=True, G_PADDED=max(16, padded), ROWS=1, SPLITS=own_splits)
    _pages_kernel[chunks, K, prompt_splits](*tensors, *sizes, **of_prompts, **shape)
    _pages_kernel[B, K, own_splits](*tensors, *sizes, **of_responses, **shape)
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
    def _pages_kernel(
        q, kv, page_table, prompt_length, response_length, out, lse, scale, value_offset, table_width, B, OWN: tl.constexpr,
        G: tl.constexpr, G_PADDED: tl.constexpr, ROWS: tl.constexpr, E: tl.constexpr, S: tl.constexpr, SPLITS: tl.constexpr,
        PARTS: tl.constexpr,
    ):  # fmt: skip
        """One program: ROWS neighbouring rows, key/value head k, split s, over the pages s, s + SPLITS, ... of the rows'
        prompts, or with OWN of their responses. It writes a part of out (B, K, PARTS, G, E) and lse (B, K, PARTS, G)."""
        chunk, k, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        heads = tl.num_programs(1)
        i, e, slot = tl.arange(0, ROWS * G_PADDED), tl.arange(0, E), tl.arange(0, S)
        b, g = chunk * ROWS + i // G_PADDED, i % G_PADDED  # of each query
        is_query = (b < B) & (g < G)
        query = tl.load(q + ((b * heads + k) * G + g)[:, None] * E + e[None, :], mask=is_query[:, None], other=0.0)
        owner = tl.load(page_table + b * table_width, mask=b < B, other=-1)  # the first page names the prompt
        top = tl.full((ROWS * G_PADDED,), -1e30, tl.float32)  # the largest score; finite: inf - inf would be nan
        total = tl.zeros((ROWS * G_PADDED,), tl.float32)  # the softmax's denominator, relative to exp(top)
        mixed = tl.zeros((ROWS * G_PADDED, E), tl.float32)  # its numerator
        waiting = b  # the rows whose prompt has not been read yet; B for all others
        row = chunk * ROWS
        while row < B:
            pages = page_table + row * table_width
            readers = (owner == tl.load(pages)) & (b < B)
            length = tl.load(prompt_length + row)
            if OWN:
                pages += tl.cdiv(length, S)
                length = tl.load(response_length + row)
            for j in range(split, tl.cdiv(length, S), SPLITS):
                place = kv + ((tl.load(pages + j).to(tl.int64) * heads + k) * S + slot[:, None]) * E + e[None, :]
                holds = slot < length - j * S  # a slot without a token may hold anything
                key = tl.load(place, mask=holds[:, None], other=0.0)  # (S, E)
                value = tl.load(place + value_offset, mask=holds[:, None], other=0.0)
                scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
                scores = tl.where(readers[:, None] & holds[None, :], scores, float("-inf"))
                new_top = tl.maximum(top, tl.max(scores, 1))
                shrink, p = tl.exp(top - new_top), tl.exp(scores - new_top[:, None])
                total = total * shrink + tl.sum(p, 1)
                mixed = mixed * shrink[:, None] + tl.dot(p.to(value.dtype), value, input_precision="ieee")
                top = new_top
            waiting = tl.where(readers, B, waiting)
            row = tl.min(waiting, 0)
        part = split + PARTS - SPLITS if OWN else split
        entry = ((b * heads + k) * PARTS + part) * G + g
        # a split without a page has the weight exp(-inf) = 0, and its result must be 0 and not 0 / 0
        tl.store(out + entry[:, None] * E + e[None, :], mixed / tl.maximum(total, 1e-30)[:, None], mask=is_query[:, None])
        tl.store(lse + entry, top + tl.log(total), mask=is_query)

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
