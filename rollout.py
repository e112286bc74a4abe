"""Sampling from the policy, and laying what was sampled out for training.

`generate` is a sampler with continuous batching over a paged KV cache of fixed size. It uses the trainer's own parameters, so
it can never be stale. A prompt is computed once and its keys are read by all members of its group; a row that ends leaves at
once and a waiting one takes its place, so that one long response does not hold up the others. `pack` is the one place where a
prompt and a response are put together for a forward pass, and where guided and unguided contexts are laid over the same tokens.

What it is not: a server. One call samples one list of prompts; nothing is kept from one call to the next.

A decode step has two ways. CacheView does it with torch alone, on any device. On CUDA, with paged_attention.py beside this
file, FixedStep does the same in tensors that never move, so that the whole step is one CUDA graph.

The model is any callable with model.py's forward (ids, positions, lengths=, cache=, head=) and its `config`, `device` and
`compute_dtype`. Needs no sibling: copy this file alone, or with that one. Axes: P prompts, n responses a prompt, B rows alive,
N pages, S token slots a page, V vocabulary; H query heads, K key/value heads, G = H / K, E head width.
"""

import hashlib
import math
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

PAGE = 64  # S. Half a page is lost per response; a smaller one means more pages, and each costs a little beyond its tokens
PREFILL_TOKENS = 16384  # prompts are computed together up to this many tokens, which bounds the activations


@dataclass(frozen=True)
class Trajectory:
    """One sampled response.

    response_ids includes the end-of-sequence token where one was sampled. logprobs holds, for every response token, its
    log-probability (natural log) under the distribution it was drawn from: after temperature, and after top_p where that is
    below 1. `finished` is False where the length limit cut the response. `group` is the index of the prompt in the call.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    logprobs: list[float]
    finished: bool
    group: int


# ---------------------------------------------------------------------------------------------------- the KV cache


@dataclass(eq=False)
class Prompt:
    """A prompt in the cache; its pages are read by every row of its group that is alive."""

    length: int
    pages: list[int] = field(default_factory=list)
    readers: int = 0


@dataclass(eq=False)
class Row:
    """A response being sampled. While it is alive, `written` of its tokens since `prompt` are in the cache, in `pages`."""

    group: int
    member: int
    prompt_ids: list[int]
    limit: int  # its longest response
    generator: np.random.Generator
    response_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False
    drawn: int = 0  # tokens sampled; those not read back from the device yet are not in response_ids
    uniforms: list[float] = field(default_factory=list)
    prompt: Prompt | None = None
    pages: list[int] = field(default_factory=list)
    written: int = 0

    def uniform(self) -> float:
        """The random number of its next token. A stream of its own makes it independent of every other row."""
        if self.drawn % PAGE == 0:
            self.uniforms = self.generator.random(PAGE).tolist()
        return self.uniforms[self.drawn % PAGE]

    def trajectory(self) -> Trajectory:
        return Trajectory(self.prompt_ids, self.response_ids, self.logprobs, self.finished, self.group)


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
        self.own: list[Row] = []  # whose page 0, 1, 2, ... is
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

    def add_row(self, row: Row, prompt: Prompt) -> None:
        row.prompt, row.written = prompt, 0
        prompt.readers += 1

    def grow(self, row: Row) -> None:
        """Take the next page of a response."""
        row.pages.append(self._take(len(self.own)))
        self.own.append(row)

    def _take(self, page: int) -> int:
        if not self.free:
            raise RuntimeError(f"all {self.pages} pages of the KV cache are taken")
        self.store[:, :, page] = 0  # slots that hold no token are masked, but 0 * nan would still be nan
        self.version += 1
        return page

    def drop(self, row: Row) -> None:
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

    def decode(self, rows: Sequence[Row]) -> "CacheView":
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

    def __call__(self, rows: Sequence[Row], tokens: Tensor) -> Tensor:
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
    """The kernel for FixedStep where it can run: CUDA, Triton, paged_attention.py, a head width it has; else None."""
    if device.type != "cuda" or head_dim not in (16, 32, 64, 128, 256):
        return None
    try:
        from paged_attention import paged_attention
    except ImportError:
        return None
    return paged_attention


# ---------------------------------------------------------------------------------------------------- sampling


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    n: int | Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    eos_ids: Collection[int],
    seed: int | Sequence[int],
    max_rows: int = 512,
    cache_tokens: int | None = None,
    on_row: Callable[[Trajectory, int], None] | None = None,
) -> list[list[Trajectory]]:
    """Sample n responses to each prompt: a list of P groups of n trajectories, in the order of the prompts.

    n               the same for all prompts, or one per prompt
    max_new_tokens  the longest response; a row is also cut where the model's context ends
    temperature     0 is greedy (log-probs are then those of the untempered distribution)
    top_p           1.0 samples from the whole distribution, which policy gradients need (ratio 1 at the first update)
    eos_ids         every id that ends a response
    seed            one for the call, or one per prompt. A row's random numbers depend only on its prompt's seed and its place
                    in the group, so they do not change with the other prompts, with max_rows or with the number of ranks.
                    Its logits do, by the rounding of matrix products of another size (1e-6 in fp32, 1e-2 in bf16), and so,
                    rarely, may a token. max_rows=1 takes that away too: every row is then computed by itself, bit for bit
    max_rows        how many rows are decoded at once; others wait. A group is split only where it is larger than this
    cache_tokens    the size of the KV cache in tokens. None: as many as the call can need, on CUDA at most 90 % of what is
                    free. Rows that find the cache full wait, and where the rows alive outgrow it the youngest are put back
                    and continued later
    on_row          called with a trajectory and its place in its group as soon as it has ended, while others go on

    Raises ValueError, before anything is sampled, for bad settings, an empty prompt, one that fills the context and one that
    the cache cannot hold together with a response of the full length.
    """
    context = model.config.max_position_embeddings
    counts = [n] * len(prompts) if isinstance(n, int) else list(n)
    _check(prompts, counts, max_new_tokens, temperature, top_p, eos_ids, seed, context, max_rows)
    seeds = [seed * 1_000_003 + p for p in range(len(prompts))] if isinstance(seed, int) else list(seed)
    groups = [
        [Row(p, i, list(prompt), min(max_new_tokens, context - len(prompt)), _stream(seeds[p], i)) for i in range(counts[p])]
        for p, prompt in enumerate(prompts)
    ]
    pages = _cache_pages(model, groups, max_rows, cache_tokens)
    was_training = model.training
    model.eval()
    sampler = _Sampler(model, groups, pages, max_rows, partial(sample, temperature=temperature, top_p=top_p), eos_ids, on_row)
    try:
        sampler.run()
    finally:
        model.train(was_training)
        del sampler
        if model.device.type == "cuda":
            # the cache goes back to the device at once: what the training allocates next would settle in the middle of it, to
            # stay, and the next call would find only small pieces free
            torch.cuda.empty_cache()
    return [[row.trajectory() for row in group] for group in groups]


def _check(prompts, counts, max_new_tokens, temperature, top_p, eos_ids, seed, context, max_rows) -> None:
    if len(counts) != len(prompts):
        raise ValueError(f"{len(counts)} values of n for {len(prompts)} prompts")
    if min(counts, default=1) < 1 or max_new_tokens < 1 or max_rows < 1:
        least = f"n={min(counts, default=1)}, max_new_tokens={max_new_tokens} and max_rows={max_rows}"
        raise ValueError(f"{least} must all be at least 1")
    if not temperature >= 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature={temperature} must be >= 0 and top_p={top_p} in (0, 1]")
    if not eos_ids:
        raise ValueError("eos_ids is empty: no response could ever end")
    if not isinstance(seed, int) and len(seed) != len(prompts):
        raise ValueError(f"{len(seed)} seeds for {len(prompts)} prompts")
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {index} is empty")
        if len(prompt) >= context:
            raise ValueError(f"prompt {index} has {len(prompt)} tokens and leaves no room in a context of {context}")


def _stream(seed: int, member: int) -> np.random.Generator:
    """A row's own random numbers. One a token is enough, because sampling inverts the cumulative distribution; they are drawn
    on the CPU and so are the same on every device. Philox takes 128 bits of key; torch's CPU generator would use the lowest 32
    bits of a seed and quietly drop the rest."""
    return np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, member], dtype=np.uint64)))


def _cache_pages(model: Any, groups: Sequence[Sequence[Row]], max_rows: int, cache_tokens: int | None) -> int:
    """How many pages the cache gets; ValueError naming the prompt that could not be finished in it."""
    single = [smallest_cache(len(group[0].prompt_ids), group[0].limit) // PAGE for group in groups]
    if cache_tokens is None:
        longest = max((pages_for(group[0].limit) for group in groups), default=0)
        pages = sum(single) + longest * min(max_rows, sum(map(len, groups)))
        if model.device.type == "cuda":
            config = model.config
            numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * PAGE
            torch.cuda.empty_cache()  # what training left in PyTorch's own store of freed memory is free too
            free = torch.cuda.mem_get_info(model.device)[0]
            pages = min(pages, int(0.9 * free / (numbers * model.compute_dtype.itemsize)))
    else:
        pages = cache_tokens // PAGE
    for index, needed in enumerate(single):
        if needed > pages:
            tokens = f"{len(groups[index][0].prompt_ids)} tokens and a response of up to {groups[index][0].limit}"
            raise ValueError(
                f"prompt {index} ({tokens}) needs a KV cache of {needed * PAGE} tokens, this one has {pages * PAGE}: "
                "raise cache_tokens or lower max_new_tokens"
            )
    return pages


class _Sampler:
    """The state of one call of `generate`: rows that wait, rows that are alive, and the cache between them."""

    def __init__(self, model, groups, pages, max_rows, draw, eos_ids, on_row) -> None:
        self.model, self.max_rows, self.draw_from, self.on_row = model, max_rows, draw, on_row
        self.cache = PagedCache(model.config, pages, dtype=model.compute_dtype, device=model.device)
        self.waiting: deque[list[Row]] = deque(list(group) for group in groups)  # rows of one list share all their tokens
        self.alive: list[Row] = []
        self.tokens = torch.zeros(0, dtype=torch.int64, device=model.device)  # (B,) the newest token of each row alive
        self.unread: list[tuple[list[Row], Tensor, Tensor]] = []  # sampled, still on the device: rows, tokens, log-probs
        self.eos_ids = set(eos_ids)
        self.kernel = decode_kernel(model.device, model.config.head_dim)
        self.steps: dict[int, FixedStep] = {}  # by the number of places
        self.pool = torch.cuda.graph_pool_handle() if self.kernel and model.device.type == "cuda" else None
        self.width = max((smallest_cache(len(group[0].prompt_ids), group[0].limit) // PAGE for group in groups), default=0)
        # reading a step's tokens waits for the device, so there it is done once in eight steps; a row that ended meanwhile
        # has been decoded a few tokens too far, and those are thrown away
        self.read_every = 8 if model.device.type == "cuda" else 1

    def run(self) -> None:
        while self.waiting or self.alive:
            self.admit()
            self.read()
            if self.alive:
                self.step()
                self.read()

    def admit(self) -> None:
        """Let waiting groups in while there is room, compute their prompts in one forward, and sample their first tokens."""
        prompts, rows, ids = [], [], []
        while self.waiting:
            group = self.waiting[0]
            known = group[0].prompt_ids + group[0].response_ids
            places = self.max_rows - len(self.alive) - len(rows)
            # every row, alive or new, may need a page for its next token
            pages = self.cache.free - len(self.alive) - len(rows) - pages_for(len(known))
            count = min(len(group), places, pages)
            nothing_runs = not self.alive and not rows
            if count < (1 if nothing_runs else min(len(group), self.max_rows)):
                break
            if ids and len(ids) + len(known) > PREFILL_TOKENS:
                break
            prompt = self.cache.add_prompt(len(known))
            for row in group[:count]:
                self.cache.add_row(row, prompt)
            prompts.append((prompt, count))
            rows += group[:count]
            ids += known
            del group[:count]
            if not group:
                self.waiting.popleft()
        if prompts:
            self.prefill(prompts, rows, ids)

    def prefill(self, prompts: list[tuple[Prompt, int]], rows: list[Row], ids: list[int]) -> None:
        device = self.model.device
        lengths = [prompt.length for prompt, _ in prompts]
        last = on_device(lengths, torch.int64, device).cumsum(0) - 1  # (P',) where each prompt ends
        logits = self.model(
            on_device([ids], torch.int64, device),
            lengths=lengths,
            cache=self.cache.prefill([prompt for prompt, _ in prompts]),
            head=lambda hidden, weight: F.linear(hidden[0, last], weight),  # only a prompt's last position is sampled from
        )  # (P', V)
        member_of = [index for index, (_, count) in enumerate(prompts) for _ in range(count)]
        token = self.draw(rows, logits[on_device(member_of, torch.int64, device)])
        self.alive += rows
        self.tokens = torch.cat([self.tokens, token])

    def step(self) -> None:
        """One token for every row alive."""
        if self.pages_missing() > self.cache.free:
            self.read(now=True)
            while self.pages_missing() > self.cache.free:
                self.put_back()
        if not self.alive:
            return
        for row in self.alive:
            if row.written % PAGE == 0:
                self.cache.grow(row)
        logits = self.decode()  # (B, V)
        for row in self.alive:
            row.written += 1
        self.tokens = self.draw(self.alive, logits)

    def decode(self) -> Tensor:
        if self.kernel is None:
            positions = [[row.prompt.length + row.written] for row in self.alive]
            positions = on_device(positions, torch.int64, self.model.device)
            return self.model(self.tokens[:, None], positions, cache=self.cache.decode(self.alive))[:, 0]
        places = places_for(len(self.alive))
        if places not in self.steps:
            self.steps[places] = FixedStep(self.model, self.cache, places, self.width, self.kernel, self.pool)
        return self.steps[places](self.alive, self.tokens)

    def pages_missing(self) -> int:
        return sum(row.written % PAGE == 0 for row in self.alive)

    def put_back(self) -> None:
        """The youngest row makes room: it waits, and later begins with what it has sampled as part of its prompt."""
        row = self.alive.pop()
        self.tokens = self.tokens[:-1]
        self.cache.drop(row)
        self.waiting.appendleft([row])

    def draw(self, rows: Sequence[Row], logits: Tensor) -> Tensor:
        """Sample a token for each row: logits (B, V) -> (B,)."""
        uniform = on_device([row.uniform() for row in rows], torch.float64, logits.device)
        token, logprob = self.draw_from(logits, uniform)
        for row in rows:
            row.drawn += 1
        self.unread.append((list(rows), token, logprob))
        return token

    def read(self, now: bool = False) -> None:
        """Copy sampled tokens from the device to their rows, and let the rows that have ended leave."""
        if not (now or len(self.unread) >= self.read_every or any(row.drawn >= row.limit for row in self.alive)):
            return
        for rows, tokens, logprobs in self.unread:
            for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
                if not row.finished:
                    if math.isnan(logprob):
                        place = f"prompt {row.group}, token {len(row.response_ids)} of a response"
                        raise RuntimeError(f"{place}: a logit is nan or inf")
                    row.response_ids.append(token)
                    row.logprobs.append(logprob)
                    row.finished = token in self.eos_ids
        self.unread.clear()
        stays = [not row.finished and row.drawn < row.limit for row in self.alive]
        if not all(stays):
            for row, stay in zip(self.alive, stays, strict=True):
                if not stay:
                    self.cache.drop(row)
                    if self.on_row is not None:
                        self.on_row(row.trajectory(), row.member)
            self.alive = [row for row, stay in zip(self.alive, stays, strict=True) if stay]
            self.tokens = self.tokens[on_device(stays, torch.bool, self.tokens.device)]


def sample(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverting the cumulative distribution: logits (B, V), uniform (B,) -> tokens, log-probs (B,).

    With top_p < 1 the draw is from the smallest set of most probable tokens whose mass reaches top_p (with those that are
    exactly as probable as its last one), renormalised, and the log-probability is that of the renormalised distribution.

    The cumulative sum is taken in two levels, over blocks of the vocabulary and then within one block, and in float64: in
    float32 its rounding, about 1e-6 at V = 152,064, would be larger than many tokens' whole probability.
    """
    logits = logits.float()
    if temperature == 0:
        best, token = logits.max(-1)
        return token, best - logits.logsumexp(-1)
    if temperature != 1:
        logits = logits / temperature
    if top_p < 1:
        logits = logits.masked_fill(logits < nucleus_threshold(logits, top_p), -math.inf)
    B, V = logits.shape
    log_total = logits.logsumexp(-1, keepdim=True)
    block = math.gcd(V, 512)
    p = torch.exp(logits - log_total).view(B, V // block, block)  # (B, blocks, block)
    mass = p.sum(-1, dtype=torch.float64).cumsum(-1)  # (B, blocks)
    total = mass[:, -1:]
    # below the total even where the product rounds up to it, so that a block, and in it a token, is always found
    target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    # right=True: the first index whose sum EXCEEDS the target, so a token of probability 0 can never be drawn
    which = torch.searchsorted(mass, target, right=True)  # (B, 1)
    which = which.clamp(max=V // block - 1)  # only where a logit was nan: the log-probability then says so, and not the device
    before = torch.where(which > 0, mass.gather(-1, (which - 1).clamp(min=0)), 0.0)
    inside = p.gather(1, which[..., None].expand(-1, -1, block))[:, 0].double().cumsum(-1)  # (B, block)
    rest = torch.minimum(target - before, torch.nextafter(inside[:, -1:], torch.zeros_like(total)))
    token = which * block + torch.searchsorted(inside, rest, right=True).clamp(max=block - 1)  # (B, 1)
    return token[:, 0], (logits.gather(-1, token) - log_total)[:, 0]


def nucleus_threshold(logits: Tensor, top_p: float) -> Tensor:
    """The smallest logit within the nucleus: (B, V) -> (B, 1)."""
    log_total = logits.logsumexp(-1, keepdim=True)
    best = logits.topk(min(1024, logits.shape[-1])).values  # a nucleus rarely has more tokens, and sorting all costs more
    if (torch.exp(best - log_total).double().sum(-1) < top_p).any():
        best = logits.sort(-1, descending=True).values
    p = torch.exp(best - log_total).double()
    inside = p.cumsum(-1) - p < top_p  # the most probable token has 0 before it, so there is one, but where a logit was nan
    return best.gather(-1, (inside.sum(-1, keepdim=True) - 1).clamp(min=0))


def stream_seed(*names: Any) -> int:
    """A 63-bit seed for a named stream of random numbers: equal names, equal seed, on every machine and rank."""
    return int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:8], "big") >> 1


def sample_and_grade(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    grade: Callable[[Trajectory, int, str], Any],
    *,
    n: int | Sequence[int],
    progress: str | None = None,
    **settings: Any,
) -> tuple[list[list[Trajectory]], list[list[Any]]]:
    """`generate` with n and these settings, and what `grade` says of every response: two (P, n) nested lists.

    grade     (trajectory, its place in its group, text) -> anything. Called in one thread of its own, a response at a time,
              while others are still being sampled; an error in it ends the sampling
    progress  the name of a progress bar that counts responses; None: no bar
    """
    graded: dict[tuple[int, int], Any] = {}

    def grade_row(row: Trajectory, member: int) -> None:
        text = tokenizer.decode(row.response_ids, skip_special_tokens=True)
        graded[row.group, member] = grade(row, member, text)

    total = n * len(prompts) if isinstance(n, int) else sum(n)
    with ThreadPoolExecutor(1) as pool, tqdm(total=total, desc=progress, unit="response", disable=progress is None) as bar:
        pending = deque()

        def on_row(row: Trajectory, member: int) -> None:
            while pending and pending[0].done():
                pending.popleft().result()  # an error in the grader, or a full disk, ends the sampling now, not hours later
            pending.append(pool.submit(grade_row, row, member))
            bar.update()

        groups = generate(model, prompts, n=n, eos_ids=model.config.eos_ids, on_row=on_row, **settings)
        for future in pending:
            future.result()
    return groups, [[graded[p, i] for i in range(len(group))] for p, group in enumerate(groups)]


# ---------------------------------------------------------------------------------------------------- packing


@dataclass(frozen=True)
class Packed:
    """Several (context, response) sequences end to end in one row, ready for one forward without padding.

    Responses to the same context that stand next to each other share it: the context is one segment, computed once, and each
    response a segment that continues it. A context with a single response is one segment together with it. A response's last
    token is left out of the row, because it predicts nothing.

    input_ids  (1, T)
    lengths    per segment, summing to T
    prefixes   per segment the index of the segment it continues, or None
    predict    (M,) the positions in the row whose logits predict response tokens: M = all response tokens. The first tokens of
               responses that share a context are predicted from the same position
    targets    (M,) the response tokens, EOS included
    sequence   (M,) which of the responses each target belongs to

    The masks are these index tensors: they come from lengths alone, so pad == EOS, or a strategy that quotes the response,
    cannot confuse them.
    """

    input_ids: Tensor
    lengths: list[int]
    prefixes: list[int | None]
    predict: Tensor
    targets: Tensor
    sequence: Tensor

    @property
    def layout(self) -> dict[str, Any]:
        """What the model's forward takes: model(**packed.layout, head=...)."""
        return {"input_ids": self.input_ids, "lengths": self.lengths, "prefixes": self.prefixes}


def pack(contexts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], *, device: torch.device) -> Packed:
    """Lay each response after its context. ValueError for an empty context or response, or unequal counts.

    Packing the same responses after guided and after unguided contexts gives equal `targets` and `sequence`, so that row m of
    one pass's `predict` faces row m of the other's: the alignment the distillation term needs.
    """
    if len(contexts) != len(responses):
        raise ValueError(f"{len(contexts)} contexts for {len(responses)} responses")
    ids, lengths, prefixes, predict, targets, sequence = [], [], [], [], [], []
    continues = [index > 0 and contexts[index] == contexts[index - 1] for index in range(len(contexts))] + [False]
    for index, (context, response) in enumerate(zip(contexts, responses, strict=True)):
        if not len(context) or not len(response):
            raise ValueError(f"sequence {index}: context of {len(context)} and response of {len(response)} tokens")
        if not continues[index]:
            ids += context
            lengths.append(len(context))
            prefixes.append(None)
            segment, last = len(lengths) - 1, len(ids) - 1  # the context's last token predicts a response's first
        predict += [last, *range(len(ids), len(ids) + len(response) - 1)]
        ids += response[:-1]
        if not continues[index] and not continues[index + 1]:  # the context's only response
            lengths[-1] += len(response) - 1
        elif len(response) > 1:
            lengths.append(len(response) - 1)
            prefixes.append(segment)
        targets += response
        sequence += [index] * len(response)

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return Packed(tensor(ids)[None], lengths, prefixes, tensor(predict), tensor(targets), tensor(sequence))


def shared_tokens(contexts: Sequence[Sequence[int]]) -> list[int]:
    """How many tokens `pack` saves on each item if it stands behind its predecessor: its context's, where it is the same."""
    return [len(c) if i > 0 and c == contexts[i - 1] else 0 for i, c in enumerate(contexts)]


def micro_batches(costs: Sequence[int], max_tokens: int, saved: Sequence[int] | None = None) -> list[list[int]]:
    """Cut items 0..len-1, in order, into runs whose costs (tokens) sum to at most max_tokens; a larger item goes alone.

    saved: what an item costs less where it is not the first of its run, see `shared_tokens`.
    """
    batches: list[list[int]] = []
    room = 0
    for index, cost in enumerate(costs):
        behind = cost - (saved[index] if saved is not None else 0)
        if not batches or behind > room:
            batches.append([])
            room, behind = max_tokens, cost
        batches[-1].append(index)
        room -= behind
    return batches
