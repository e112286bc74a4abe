"""Sampling from the policy, and packing the samples for training.

`generate` is a sampler with continuous batching over a paged KV cache. It uses the trainer's own parameters, so they are never
out of date. A prompt is computed once and read by all members of its group. A row that ends leaves at once and a waiting one
takes its place, so one long response does not hold up the others. Nothing is kept for the next call. `pack` puts prompts and
responses together for a forward pass of training, guided and unguided prompts over the same response tokens.

The model is any callable with model.py's forward (ids, positions, lengths=, cache=, head=) and its `config`, `device` and
`compute_dtype`. Imports kv_cache.py and no other sibling: copy the two files. Axes: P prompts, n responses a prompt, B rows
(responses being decoded), V vocabulary.
"""

import hashlib
import math
import os
import zlib
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

try:  # torch's CUDA builds bring it
    import triton
    import triton.language as tl
except ImportError:
    triton = None

from kv_cache import PAGE, Decoder, PagedCache, Prompt, Response, least_pages, on_device, pages_for

TILE = 4096  # tokens of the vocabulary that a program of the sampling kernel holds at once
PREFILL_TOKENS = 16384  # prompts are computed together up to this many tokens, which bounds the activations


@dataclass(frozen=True)
class Trajectory:
    """One sampled response."""

    prompt_ids: list[int]
    response_ids: list[int]  # with the end-of-sequence token, if it was sampled
    # of each token, in nats, under the whole softmax at the sampling temperature: what a trainer computes, see `sample`
    logprobs: list[float]
    finished: bool  # False: cut by the length limit
    group: int  # the index of its prompt


@dataclass(eq=False)
class Row(Response):
    """A response being sampled."""

    group: int
    member: int  # its index in the group
    prompt_ids: list[int]
    limit: int  # its most tokens
    generator: np.random.Generator  # one number a token is enough, because `sample` inverts the cumulative distribution
    response_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False
    drawn: int = 0  # tokens sampled; the newest may still be on the device and not in response_ids

    def trajectory(self) -> Trajectory:
        return Trajectory(self.prompt_ids, self.response_ids, self.logprobs, self.finished, self.group)


# ---------------------------------------------------------------------------------------------------- sampling

@torch.no_grad()
def generate(
    model: Any, prompts: Sequence[Sequence[int]], *,
    n: int | Sequence[int], max_new_tokens: int | Sequence[Sequence[int]],
    temperature: float, top_p: float, eos_ids: Collection[int], seed: Sequence[int],
    max_rows: int = 512, cache_tokens: int | None = None, on_row: Callable[[Trajectory, int], Any] = lambda *_: None,
) -> list[list[Trajectory]]:  # fmt: skip
    """Sample n responses to each prompt: a list of P groups of n trajectories, in the order of the prompts.

    n               the same for all prompts, or one per prompt
    max_new_tokens  the longest response: the same for all, or P lists of n. The model's context is a limit too
    temperature     0 is greedy; for this and top_p see `sample`
    eos_ids         every id that ends a response
    seed            one per prompt. A row's random numbers depend only on this and on its index in the group, not on the other
                    prompts, max_rows or the number of ranks. Its logits do, by the rounding of matrix products of another
                    size (1e-6 in fp32, 1e-2 in bf16), and so, rarely, may a token. max_rows=1 avoids that too
    max_rows        how many rows are decoded at once; others wait. A group is split only if it is larger than this
    cache_tokens    the size of the KV cache in tokens. None: what the call can need, but on CUDA at most 90 % of the free
                    memory. Rows wait while it is full; if the running rows need more, the youngest are preempted
    on_row          called with a trajectory and its index in its group as soon as it has ended, while others go on

    ValueError, before anything is sampled, for settings out of range, and for a prompt that is empty, fills the context or does
    not fit into the cache with its longest response.
    """
    if not (max_rows >= 1 and temperature >= 0 and 0 < top_p <= 1):
        raise ValueError(f"max_rows={max_rows}, temperature={temperature} or top_p={top_p} is out of range")
    groups = _rows(prompts, n, max_new_tokens, seed, model.config.max_position_embeddings)
    draw = partial(sample, temperature=temperature, top_p=top_p)
    was_training = model.training
    model.eval()
    pages, width = _cache_pages(model, groups, max_rows, cache_tokens)
    try:
        _Sampler(model, groups, pages, width, max_rows, draw, eos_ids, on_row).run()
    finally:
        model.train(was_training)
        if model.device.type == "cuda":
            # what training allocates next would settle in the middle of the cache's memory and leave only small pieces free
            torch.cuda.empty_cache()
    return [[row.trajectory() for row in group] for group in groups]


def _rows(prompts, n, max_new_tokens, seed, context: int) -> list[list[Row]]:
    """The rows of each prompt, from the arguments of `generate`."""
    counts = [n] * len(prompts) if isinstance(n, int) else n
    limits = [[max_new_tokens] * count for count in counts] if isinstance(max_new_tokens, int) else max_new_tokens
    groups = []
    for p, (prompt, count, most, key) in enumerate(zip(prompts, counts, limits, seed, strict=True)):
        room = context - len(prompt)
        if not len(prompt) or room < 1:
            raise ValueError(f"prompt {p} has {len(prompt)} tokens: it must have 1 to {context - 1}")
        if count < 1 or min(most) < 1:
            raise ValueError(f"prompt {p}: n={count} and max_new_tokens={most} must be at least 1")
        group = []
        for i, limit in zip(range(count), most, strict=True):
            # on the CPU, so that they are the same for every device; torch's CPU generator has only 32 bits of a seed
            random_numbers = np.random.Philox(key=np.array([key % 2**64, i], dtype=np.uint64))
            group.append(Row(p, i, list(prompt), min(limit, room), np.random.Generator(random_numbers)))
        groups.append(group)
    return groups


def _cache_pages(model: Any, groups: Sequence[Sequence[Row]], max_rows: int, tokens: int | None) -> tuple[int, int]:
    """(pages of the cache, most pages of a row). ValueError if a prompt and its longest response do not fit into the cache."""
    needed, longest = [], 0  # pages, of each prompt with its longest response, and of the longest response by itself
    for group in groups:
        limit = max(row.limit for row in group)
        needed.append(least_pages(len(group[0].prompt_ids), limit))
        longest = max(longest, pages_for(limit))
    if tokens is not None:
        pages = tokens // PAGE
    else:
        pages = sum(needed) + longest * min(max_rows, sum(map(len, groups)))
        config = model.config
        numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * PAGE
        if model.device.type == "cuda":
            torch.cuda.empty_cache()  # what training has freed goes back to the device
            room = 0.9 * torch.cuda.mem_get_info(model.device)[0]
        else:
            room = 0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # of the machine's memory
        pages = min(pages, int(room / (numbers * model.compute_dtype.itemsize)))
    for p, least in enumerate(needed):
        if least > pages:
            raise ValueError(
                f"prompt {p} and its longest response need a KV cache of {least * PAGE} tokens, this one has {pages * PAGE}: "
                "raise cache_tokens or lower max_new_tokens"
            )
    return pages, max(needed, default=0)


class _Sampler:
    """The state of one call of `generate`: waiting rows, running rows, and their cache."""

    def __init__(self, model, groups, pages, width, max_rows, draw, eos_ids, on_row) -> None:
        self.model, self.max_rows, self.draw, self.on_row = model, max_rows, draw, on_row
        self.cache = PagedCache(model.config, pages, dtype=model.compute_dtype, device=model.device)
        self.waiting: deque[list[Row]] = deque(list(group) for group in groups)  # rows of a list have equal tokens so far
        self.running: list[Row] = []
        self.tokens = torch.zeros(0, dtype=torch.int64, device=model.device)  # (B,) the newest of each running row
        self.pending: list[tuple[list[Row], Tensor, Tensor]] = []  # sampled, still on the device: rows, tokens, log-probs
        self.eos_ids = set(eos_ids)
        self.decode = Decoder(model, self.cache, width, draw)
        # reading tokens waits for the GPU, so there it is done only every eighth step; what a row has past its end is dropped
        self.sync_every = 8 if model.device.type == "cuda" else 1

    def run(self) -> None:
        while self.waiting or self.running:
            self.admit()
            self.sync()
            if self.running:
                self.step()
                self.sync()

    def admit(self) -> None:
        """Start waiting groups while there is room: compute their prompts in one forward and sample their first tokens."""
        prompts, rows, ids = [], [], []
        while self.waiting:
            group = self.waiting[0]
            known = group[0].prompt_ids + group[0].response_ids
            free_rows = self.max_rows - len(self.running) - len(rows)
            # every row, running or new, may need a page for its next token
            pages = self.cache.free_pages - len(self.running) - len(rows) - pages_for(len(known))
            count = min(len(group), free_rows, pages)
            if count < (min(len(group), self.max_rows) if self.running or rows else 1):
                break  # a group waits until it fits as a whole, unless nothing else runs
            if ids and len(ids) + len(known) > PREFILL_TOKENS:
                break
            prompt = self.cache.allocate_prompt(len(known))
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
        last = on_device(lengths, torch.int64, device).cumsum(0) - 1  # (P',) the last position of each prompt
        logits = self.model(
            on_device([ids], torch.int64, device),
            lengths=lengths,
            cache=self.cache.prefill([prompt for prompt, _ in prompts]),
            head=lambda hidden, weight: F.linear(hidden[0, last], weight),  # only a prompt's last position is sampled from
        )  # (P', V)
        member_of = [index for index, (_, count) in enumerate(prompts) for _ in range(count)]
        token, logprob = self.draw(logits[on_device(member_of, torch.int64, device)], self.uniform(rows))
        self.drawn(rows, token, logprob)
        self.running += rows
        self.tokens = torch.cat([self.tokens, token])

    def step(self) -> None:
        """Decode one token for every running row."""
        if self.pages_needed() > self.cache.free_pages:
            self.sync(now=True)
            while self.pages_needed() > self.cache.free_pages:
                self.preempt()
        if not self.running:
            return
        for row in self.running:
            if row.needs_page:
                self.cache.allocate(row)
        self.tokens, logprob = self.decode(self.running, self.tokens, self.uniform(self.running))
        for row in self.running:
            row.written += 1
        self.drawn(self.running, self.tokens, logprob)

    def pages_needed(self) -> int:
        return sum(row.needs_page for row in self.running)

    def preempt(self) -> None:
        """Free the pages of the youngest row. It starts again later, with what it has sampled as part of its prompt."""
        row = self.running.pop()
        self.tokens = self.tokens[:-1]
        self.cache.free(row)
        self.waiting.appendleft([row])

    def uniform(self, rows: Sequence[Row]) -> Tensor:
        """The next random number of each row: (B,)."""
        return on_device([row.generator.random() for row in rows], torch.float64, self.model.device)

    def drawn(self, rows: Sequence[Row], token: Tensor, logprob: Tensor) -> None:
        """Note what was sampled, to be read later."""
        for row in rows:
            row.drawn += 1
        self.pending.append((list(rows), token, logprob))

    def sync(self, now: bool = False) -> None:
        """Copy sampled tokens from the device to their rows, and remove the rows that have ended."""
        due = len(self.pending) >= self.sync_every or any(row.drawn >= row.limit for row in self.running)
        if not (now or due):
            return
        for rows, tokens, logprobs in self.pending:
            for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
                if not row.finished:
                    if not math.isfinite(logprob):
                        place = f"prompt {row.group}, token {len(row.response_ids)} of a response"
                        raise RuntimeError(f"{place}: a logit is nan or inf")
                    row.response_ids.append(token)
                    row.logprobs.append(logprob)
                    row.finished = token in self.eos_ids
        self.pending.clear()
        goes_on = [not row.finished and row.drawn < row.limit for row in self.running]
        if all(goes_on):
            return
        for row, on in zip(self.running, goes_on, strict=True):
            if not on:
                self.cache.free(row)
                self.on_row(row.trajectory(), row.member)
        self.running = [row for row, on in zip(self.running, goes_on, strict=True) if on]
        self.tokens = self.tokens[on_device(goes_on, torch.bool, self.tokens.device)]


def sample(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverting the cumulative distribution: logits (B, V), uniform (B,) -> tokens, log-probs (B,).
    With top_p < 1 the draw is from the nucleus, renormalised: the smallest set of most probable tokens whose mass reaches
    top_p, and any others exactly as probable as the last of them. Temperature 0 is greedy. The log-probability is that of the
    whole distribution at this temperature (at 0: at temperature 1) [ours]."""
    # the cumulative sum is in float64: in float32 its rounding, about 1e-6 at V = 152,064, would be larger than the whole
    # probability of many tokens. It is taken over blocks of the vocabulary, and then within one block
    scaled = logits.float()
    if temperature == 0:
        best, token = scaled.max(-1)
        return token, best - scaled.logsumexp(-1)
    if logits.device.type == "cuda" and triton is not None:
        return sample_in_one_kernel(logits, uniform, temperature, top_p)
    if temperature != 1:
        scaled = scaled / temperature
    whole = log_total = scaled.logsumexp(-1, keepdim=True)  # (B, 1)
    if top_p < 1:
        scaled = scaled.masked_fill(scaled < smallest_in_nucleus(scaled, whole, top_p), -math.inf)
        log_total = scaled.logsumexp(-1, keepdim=True)
    B, V = scaled.shape
    block = math.gcd(V, 512)
    p = torch.exp(scaled - log_total).view(B, V // block, block)  # (B, blocks, block)
    mass = p.sum(-1, dtype=torch.float64).cumsum(-1)  # (B, blocks)
    total = mass[:, -1:]
    # below the total even if the product rounds up to it, so that a block and a token in it are always found
    target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    # right=True: the first index whose sum EXCEEDS the target, so a token of probability 0 can never be drawn
    which = torch.searchsorted(mass, target, right=True)  # (B, 1)
    which = which.clamp(max=V // block - 1)  # for a logit that is nan or inf: an index out of range would end a CUDA process
    before = torch.where(which > 0, mass.gather(-1, (which - 1).clamp(min=0)), 0.0)
    inside = p.gather(1, which[..., None].expand(-1, -1, block))[:, 0].double().cumsum(-1)  # (B, block)
    rest = torch.minimum(target - before, torch.nextafter(inside[:, -1:], torch.zeros_like(total)))
    token = which * block + torch.searchsorted(inside, rest, right=True).clamp(max=block - 1)  # (B, 1)
    return token[:, 0], (scaled.gather(-1, token) - whole)[:, 0]


def smallest_in_nucleus(logits: Tensor, log_total: Tensor, top_p: float) -> Tensor:
    """The smallest logit in the nucleus: logits (B, V), their logsumexp (B, 1) -> (B, 1)."""
    best = logits.topk(min(1024, logits.shape[-1])).values  # a nucleus rarely has more tokens, and sorting all is slower
    if (torch.exp(best - log_total).double().sum(-1) < top_p).any():
        best = logits.sort(-1, descending=True).values
    p = torch.exp(best - log_total).double()
    inside = p.cumsum(-1) - p < top_p  # at least the most probable token, unless a logit is nan
    return best.gather(-1, (inside.sum(-1, keepdim=True) - 1).clamp(min=0))


def sample_in_one_kernel(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """`sample` in one Triton kernel. The nucleus may end with another token if the mass up to there is top_p within 1e-7."""
    B, V = logits.shape
    token = torch.empty(B, dtype=torch.int64, device=logits.device)
    logprob = torch.empty(B, dtype=torch.float32, device=logits.device)
    # a 16-bit float is an fp32 with zeros at the end, so fewer bits have to be searched
    bits = {torch.bfloat16: 16, torch.float16: 20, torch.float32: 32}[logits.dtype]
    tile = min(TILE, triton.next_power_of_2(V))
    _sample_kernel[B,](
        logits.contiguous(), uniform, token, logprob, V, 1 / temperature, top_p,
        NUCLEUS=top_p < 1, BITS=bits, SIZE=tile, TILES=triton.next_power_of_2(triton.cdiv(V, tile)), num_warps=8,
    )  # fmt: skip
    return token, logprob


if triton is not None:

    @triton.jit
    def _rank(x):
        """The place of an fp32 among all of them. A negative float's bits, read as an integer, grow with its magnitude."""
        bits = x.to(tl.int32, bitcast=True)
        return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)

    @triton.jit
    def _number(rank):
        """The fp32 of this rank."""
        bits = rank.to(tl.int32)
        return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)

    @triton.jit
    def _tile(logits, start, V, SIZE: tl.constexpr):
        place = start + tl.arange(0, SIZE)
        return tl.load(logits + place, mask=place < V, other=float("-inf")).to(tl.float32)

    @triton.jit
    def _softmax_of_row(logits, V, scale, SIZE: tl.constexpr):
        """(largest scaled logit, logsumexp), with a maximum and a denominator for each lane of a tile."""
        top = tl.full((SIZE,), -1e38, tl.float32)  # finite: a difference of infinities would be nan
        total = tl.zeros((SIZE,), tl.float32)
        for start in range(0, V, SIZE):
            x = _tile(logits, start, V, SIZE) * scale
            new_top = tl.maximum(top, x)
            total = total * tl.exp(top - new_top) + tl.exp(x - new_top)
            top = new_top
        largest = tl.max(top, 0)
        return largest, largest + tl.log(tl.sum((total * tl.exp(top - largest)).to(tl.float64), 0)).to(tl.float32)

    @triton.jit
    def _smallest_in_nucleus(logits, V, scale, log_total, largest, top_p, BITS: tl.constexpr, SIZE: tl.constexpr):
        """The smallest number above which the mass is less than top_p, by a search over all numbers of the logits' type, two
        bits in each pass over the row."""
        unit: tl.constexpr = 32 - BITS  # the rank's bits that are the same for all of them
        low = _rank(tl.full((), float("-inf"), tl.float32)) >> unit  # the mass above it is enough
        high = (_rank(largest / scale) >> unit) + 1  # above it too little; 1, because the quotient may have been rounded down
        while high - low > 1:
            step = tl.maximum((high - low) >> 2, 1)
            cut1, cut2, cut3 = low + step, tl.minimum(low + 2 * step, high - 1), tl.minimum(low + 3 * step, high - 1)
            least1, least2, least3 = _number((cut1 + 1) << unit), _number((cut2 + 1) << unit), _number((cut3 + 1) << unit)
            above1 = tl.zeros((SIZE,), tl.float32)
            above2 = tl.zeros((SIZE,), tl.float32)
            above3 = tl.zeros((SIZE,), tl.float32)
            for start in range(0, V, SIZE):
                x = _tile(logits, start, V, SIZE)
                p = tl.exp(x * scale - log_total)
                above1 += tl.where(x >= least1, p, 0.0)
                above2 += tl.where(x >= least2, p, 0.0)
                above3 += tl.where(x >= least3, p, 0.0)
            enough1 = tl.sum(above1.to(tl.float64), 0) >= top_p
            enough2 = tl.sum(above2.to(tl.float64), 0) >= top_p
            enough3 = tl.sum(above3.to(tl.float64), 0) >= top_p
            high = tl.where(enough3, high, tl.where(enough2, cut3, tl.where(enough1, cut2, cut1)))
            low = tl.where(enough3, cut3, tl.where(enough2, cut2, tl.where(enough1, cut1, low)))
        return _number(high << unit)

    @triton.jit
    def _sample_kernel(
        logits, uniform, token, logprob, V, scale, top_p,
        NUCLEUS: tl.constexpr, BITS: tl.constexpr, SIZE: tl.constexpr, TILES: tl.constexpr,
    ):  # fmt: skip
        """One program a row."""
        row = tl.program_id(0)
        logits += row.to(tl.int64) * V
        largest, log_total = _softmax_of_row(logits, V, scale, SIZE)
        least = float("-inf")
        if NUCLEUS:
            least = _smallest_in_nucleus(logits, V, scale, log_total, largest, top_p, BITS, SIZE)
        tiles = tl.arange(0, TILES)
        mass = tl.zeros((TILES,), tl.float64)  # of each tile of the vocabulary
        for start in range(0, V, SIZE):
            x = _tile(logits, start, V, SIZE)
            p = tl.where(x >= least, tl.exp(x * scale - log_total), 0.0)
            mass = tl.where(tiles == start // SIZE, tl.sum(p.to(tl.float64), 0), mass)
        total = tl.sum(mass, 0)
        below: tl.constexpr = 0.9999999999999998  # of a sum, so that a tile and a token in it are always found
        target = tl.minimum(tl.load(uniform + row) * total, total * below)
        # the first whose sum EXCEEDS the target, so a token of probability 0 can never be drawn
        which = tl.minimum(tl.sum((tl.cumsum(mass, 0) <= target).to(tl.int32), 0), (V - 1) // SIZE)
        x = _tile(logits, which * SIZE, V, SIZE)
        p = tl.where(x >= least, tl.exp(x * scale - log_total), 0.0).to(tl.float64)
        rest = tl.minimum(target - tl.sum(tl.where(tiles < which, mass, 0.0), 0), tl.sum(p, 0) * below)
        drawn = which * SIZE + tl.sum((tl.cumsum(p, 0) <= rest).to(tl.int32), 0)
        drawn = tl.minimum(drawn, V - 1)  # for a logit that is nan or inf
        tl.store(token + row, drawn.to(tl.int64))
        tl.store(logprob + row, tl.load(logits + drawn).to(tl.float32) * scale - log_total)


def stream_seed(*names: Any) -> int:
    """The seed of a named stream of random numbers, of 63 bits: equal names, equal seed, on every machine and rank."""
    if names[0] == "evaluation":  # ("evaluation", seed, id) has its own formula, because recorded evaluations were made with it
        return names[1] * 2**32 + zlib.crc32(names[2].encode())
    return int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:8], "big") >> 1


def sample_and_grade(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], grade: Callable[[Trajectory, int, str], Any],
    *, n: int | Sequence[int], progress: str | None = None, **settings: Any,
) -> tuple[list[list[Trajectory]], list[list[Any]]]:  # fmt: skip
    """`generate`, and what `grade` says of every response: two nested lists (P, n).

    grade     (trajectory, its index in its group, text) -> anything. Called in a thread, for one response at a time, while
              others are still being sampled; an error in it ends the sampling
    progress  the name of a progress bar that counts responses; None: no bar
    """
    graded: dict[tuple[int, int], Any] = {}

    def grade_row(row: Trajectory, member: int) -> None:
        text = tokenizer.decode(row.response_ids, skip_special_tokens=True)
        graded[row.group, member] = grade(row, member, text)

    total = n * len(prompts) if isinstance(n, int) else sum(n)
    hidden = None if progress else True  # None: hidden without a terminal
    with ThreadPoolExecutor(1) as pool, tqdm(total=total, desc=progress, unit="response", disable=hidden) as bar:
        pending = deque()

        def on_row(row: Trajectory, member: int) -> None:
            while pending and pending[0].done():
                pending.popleft().result()  # an error in `grade` ends the sampling now, not hours later
            pending.append(pool.submit(grade_row, row, member))
            bar.update()

        groups = generate(model, prompts, n=n, eos_ids=model.config.eos_ids, on_row=on_row, **settings)
        for future in pending:
            future.result()
    return groups, [[graded[p, i] for i in range(len(group))] for p, group in enumerate(groups)]


# ---------------------------------------------------------------------------------------------------- packing

@dataclass(frozen=True)
class Packed:
    """Several (context, response) sequences end to end in one row, for one forward without padding. Neighbouring responses to
    the same context share it: the context is one segment, computed once, and each response a segment that continues it. A
    context with a single response is one segment with it. A response's last token is left out of the row, because it predicts
    nothing. The last three are the masks: positions that come from lengths alone."""

    input_ids: Tensor  # (1, T)
    lengths: list[int]  # of each segment, summing to T
    prefixes: list[int | None]  # of each segment: the index of the segment it continues
    predict: Tensor  # (M,) the position in the row whose logits predict each response token; M = all response tokens
    targets: Tensor  # (M,) the response tokens, EOS included
    sequence: Tensor  # (M,) the index of the response each belongs to

    @property
    def layout(self) -> dict[str, Any]:
        """The model's arguments: model(**packed.layout, head=...)."""
        return {"input_ids": self.input_ids, "lengths": self.lengths, "prefixes": self.prefixes}


def pack(contexts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], *, device: torch.device) -> Packed:
    """Lay each response after its context. ValueError if one is empty. After guided and after unguided contexts, entry m of
    `predict` predicts the same token of the same responses: the distillation term needs this."""
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

    tensor = partial(on_device, dtype=torch.int64, device=device)
    return Packed(tensor(ids)[None], lengths, prefixes, tensor(predict), tensor(targets), tensor(sequence))


def shared_tokens(contexts: Sequence[Sequence[int]]) -> list[int]:
    """The tokens that `pack` saves on each item if the one before it is in the same pack: those of a context they share."""
    return [len(c) if i > 0 and c == contexts[i - 1] else 0 for i, c in enumerate(contexts)]


def micro_batches(costs: Sequence[int], max_tokens: int, saved: Sequence[int] | None = None) -> list[list[int]]:
    """Cut the items, in order, into lists of indices whose costs (tokens) sum to at most max_tokens. A larger item is alone.
    `saved` is what each item costs less if it is not the first of its list, see `shared_tokens`."""
    batches: list[list[int]] = []
    room = 0
    for index, cost in enumerate(costs):
        added = cost - (saved[index] if saved is not None else 0)
        if not batches or added > room:
            batches.append([])
            room, added = max_tokens, cost
        batches[-1].append(index)
        room -= added
    return batches
