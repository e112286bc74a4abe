"""Sampling from the policy, and laying what was sampled out for training.

`generate` is a sampler with continuous batching over a paged KV cache of fixed size. It uses the trainer's own parameters, so
it can never be stale. A prompt is computed once and its keys are read by all members of its group; a row that ends leaves at
once and a waiting one takes its place, so that one long response does not hold up the others. `pack` is the one place where a
prompt and a response are put together for a forward pass, and where guided and unguided contexts are laid over the same tokens.

What it is not: a server. One call samples one list of prompts; nothing is kept from one call to the next.

The model is any callable with model.py's forward (ids, positions, lengths=, cache=, head=) and its `config`, `device` and
`compute_dtype`. Reads kv_cache.py and nothing else: copy the two together. Axes: P prompts, n responses a prompt, B rows alive,
V vocabulary.
"""

import math
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kv_cache import (
    PAGE,
    FixedStep,
    PagedCache,
    Prompt,
    Response,
    decode_kernel,
    on_device,
    pages_for,
    places_for,
    smallest_cache,
)  # fmt: skip

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


@dataclass(eq=False)
class Row(Response):
    """A response being sampled."""

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

    def uniform(self) -> float:
        """The random number of its next token. A stream of its own makes it independent of every other row."""
        if self.drawn % PAGE == 0:
            self.uniforms = self.generator.random(PAGE).tolist()
        return self.uniforms[self.drawn % PAGE]

    def trajectory(self) -> Trajectory:
        return Trajectory(self.prompt_ids, self.response_ids, self.logprobs, self.finished, self.group)


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
