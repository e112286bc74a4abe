"""Sampling from the policy, and laying what was sampled out for training.

`generate` is a batched, KV-cached sampler that uses the trainer's own parameters, so it can never be stale. `pack` is the one
place where a prompt and a response are put together for a forward pass, and where guided and unguided contexts are laid over
the same response tokens.

What it is not: a server. One call samples one list of prompts; every row of a batch starts together and leaves when done.

The model is any callable with model.py's forward (ids, positions, lengths=, cache=, head=) and a cache made by `new_cache`.
Imports no sibling: copy this file alone. Axes: P prompts, n responses a prompt, B rows alive, T tokens, V vocabulary.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


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


# ---------------------------------------------------------------------------------------------------- sampling


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    n: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    eos_ids: Collection[int],
    seed: int | Sequence[int],
    max_rows: int = 512,
    on_step: Callable[[int], None] | None = None,
) -> list[list[Trajectory]]:
    """Sample n responses to each prompt: a list of P groups of n trajectories, in the order of the prompts.

    max_new_tokens  the longest response; a row is also cut where the model's context ends
    temperature     0 is greedy (log-probs are then those of the untempered distribution)
    top_p           1.0 samples from the whole distribution, which policy gradients need (ratio 1 at the first update)
    eos_ids         every id that ends a response
    seed            one for the call, or one per prompt. A row's random numbers depend only on its prompt's seed and its place
                    in the group, so they do not change with the other prompts, with max_rows or with the number of ranks
    max_rows        how many rows are decoded at once; more prompts than fit wait for the next batch, but a group is never
                    split. The cache grows to rows x longest sequence
    on_step         called after each decode step with the number of tokens it sampled (for a progress bar)

    Raises ValueError, before anything is sampled, for bad settings, an empty prompt or one that fills the context.
    """
    context = model.config.max_position_embeddings
    _check(prompts, n, max_new_tokens, temperature, top_p, eos_ids, seed, context, max_rows)
    seeds = [seed * 1_000_003 + p for p in range(len(prompts))] if isinstance(seed, int) else list(seed)
    was_training = model.training
    model.eval()
    per_batch = max(1, max_rows // n)
    groups: list[list[Trajectory]] = []
    for first in range(0, len(prompts), per_batch):
        batch = [list(prompt) for prompt in prompts[first : first + per_batch]]
        limits = [min(max_new_tokens, context - len(prompt)) for prompt in batch]
        uniforms = _uniforms(seeds[first : first + per_batch], n, max(limits), model.device)
        rows = _decode(model, batch, limits, uniforms, n, temperature, top_p, eos_ids, on_step)
        for p, prompt in enumerate(batch):
            group = [Trajectory(prompt, *rows[p * n + i], group=first + p) for i in range(n)]
            groups.append(group)
    model.train(was_training)
    return groups


def _check(prompts, n, max_new_tokens, temperature, top_p, eos_ids, seed, context, max_rows) -> None:
    if n < 1 or max_new_tokens < 1 or max_rows < 1:
        raise ValueError(f"n={n}, max_new_tokens={max_new_tokens} and max_rows={max_rows} must all be at least 1")
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


def _uniforms(seeds: Sequence[int], n: int, steps: int, device: torch.device) -> Tensor:
    """(P * n, steps) float64 in [0, 1): the one random number of each row and step, drawn up front on the CPU.

    One number a token is enough because sampling inverts the cumulative distribution. It makes a row's randomness independent
    of which other rows are still alive, and the same on every device.
    """
    rows = []
    for seed in seeds:
        generator = torch.Generator("cpu").manual_seed(seed % 2**63)
        rows.append(torch.rand(n, steps, dtype=torch.float64, generator=generator))
    return torch.cat(rows).to(device)


def _decode(model, prompts, limits, uniforms, n, temperature, top_p, eos_ids, on_step):
    """One batch from prefill to the last finished row: [(response_ids, logprobs, finished)] for the P * n rows."""
    device = model.device
    longest = max(map(len, prompts))
    cache = model.new_cache(rows=len(prompts), slots=longest)
    last = torch.tensor([len(prompt) for prompt in prompts], device=device).cumsum(0) - 1  # (P,) where each prompt ends
    packed = torch.tensor([[token for prompt in prompts for token in prompt]], device=device)
    logits = model(
        packed,
        lengths=[len(prompt) for prompt in prompts],
        cache=cache,
        head=lambda hidden, weight: F.linear(hidden[0, last], weight),  # only the last position of a prompt is sampled from
    )  # (P, V)

    # from here on a row is a response: every prompt's cache row and logits, computed once, are repeated for its group
    alive = torch.arange(len(prompts) * n, device=device)  # (B,) which response each batch row is
    cache.select(alive // n)
    logits = logits[alive // n]  # (B, V)
    position = torch.tensor([len(prompt) for prompt in prompts], device=device)[alive // n]  # (B,) slot of the next token
    limit = torch.tensor(limits, device=device)[alive // n]  # (B,)
    stop = torch.tensor(sorted(eos_ids), device=device)
    tokens, logprobs, owners = [], [], []  # one (B,) tensor a step; `owners` says which response each entry belongs to
    finished = torch.zeros(len(prompts) * n, dtype=torch.bool, device=device)

    for step in range(max(limits)):
        token, logprob = sample(logits, uniforms[alive, step], temperature, top_p)  # (B,), (B,)
        for history, new in ((tokens, token), (logprobs, logprob), (owners, alive)):
            history.append(new)
        if on_step is not None:
            on_step(token.numel())
        is_eos = torch.isin(token, stop)
        finished[alive] = is_eos
        going = (~is_eos & (step + 1 < limit)).nonzero()[:, 0]  # waits for the device
        if not going.numel():
            break
        if going.numel() < alive.numel():  # finished rows leave: their share of every later step is saved
            alive, token, position, limit = alive[going], token[going], position[going], limit[going]
            cache.select(going)
        needed = longest + step + 1
        if needed > cache.slots:
            cache.reserve(needed + max(32, needed // 4))  # grow by a quarter: copying stays a small share of the work
        logits = model(token[:, None], position[:, None], cache=cache)[:, 0]  # (B, V)
        position = position + 1

    # deal the steps out to their responses: one copy from the device for the whole batch
    rows: list[tuple[list[int], list[float], bool]] = [([], [], done) for done in finished.tolist()]
    history = (torch.cat(owners).tolist(), torch.cat(tokens).tolist(), torch.cat(logprobs).tolist())
    for row, new_token, new_logprob in zip(*history, strict=True):
        rows[row][0].append(new_token)
        rows[row][1].append(new_logprob)
    return rows


def sample(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverting the cumulative distribution: logits (B, V), uniform (B,) -> tokens, log-probs (B,).

    With top_p < 1 the draw is from the smallest set of most probable tokens whose mass reaches top_p, renormalised, and the
    log-probability is that of the renormalised distribution. The cumulative sum is in float64: in float32 its rounding, about
    1e-6 at V = 152,064, would be larger than many tokens' whole probability.
    """
    logits = logits.float()
    if temperature == 0:
        token = logits.argmax(-1)
        return token, torch.log_softmax(logits, -1).gather(-1, token[:, None])[:, 0]
    log_p = torch.log_softmax(logits / temperature, -1)  # (B, V)
    order = None
    if top_p < 1:
        log_p, order = log_p.sort(-1, descending=True)
        mass_before = log_p.double().exp().cumsum(-1) - log_p.double().exp()
        log_p = log_p.masked_fill(mass_before >= top_p, float("-inf"))  # the most probable token has 0 before it: kept
        log_p = log_p - log_p.logsumexp(-1, keepdim=True)
    cdf = log_p.double().exp().cumsum(-1)  # (B, V)
    # right=True: the first index whose cdf EXCEEDS the target, so a token of probability 0 can never be drawn
    index = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)  # (B, 1)
    index = index.clamp_(max=logits.shape[-1] - 1)
    logprob = log_p.gather(-1, index)[:, 0]
    token = index if order is None else order.gather(-1, index)
    return token[:, 0], logprob


# ---------------------------------------------------------------------------------------------------- packing


@dataclass(frozen=True)
class Packed:
    """Several (context, response) sequences end to end in one row, ready for one forward without padding.

    input_ids  (1, T)  each sequence is its context followed by its response without the last token, which predicts nothing
    lengths    per sequence, summing to T
    predict    (M,) the positions in the row whose logits predict response tokens: M = all response tokens
    targets    (M,) the response tokens, EOS included
    sequence   (M,) which of the sequences each target belongs to

    The masks are these index tensors: they come from lengths alone, so pad == EOS, or a strategy that quotes the response,
    cannot confuse them.
    """

    input_ids: Tensor
    lengths: list[int]
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
    ids, lengths, predict, targets, sequence = [], [], [], [], []
    for index, (context, response) in enumerate(zip(contexts, responses, strict=True)):
        if not len(context) or not len(response):
            raise ValueError(f"sequence {index}: context of {len(context)} and response of {len(response)} tokens")
        start = len(ids) + len(context) - 1  # the context's last token predicts the response's first
        ids += [*context, *response[:-1]]
        lengths.append(len(context) + len(response) - 1)
        predict += range(start, start + len(response))
        targets += response
        sequence += [index] * len(response)

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return Packed(tensor(ids)[None], lengths, tensor(predict), tensor(targets), tensor(sequence))


def micro_batches(costs: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Cut items 0..len-1, in order, into runs whose costs (tokens) sum to at most max_tokens; a larger item goes alone."""
    batches: list[list[int]] = []
    room = 0
    for index, cost in enumerate(costs):
        if not batches or cost > room:
            batches.append([])
            room = max_tokens
        batches[-1].append(index)
        room -= cost
    return batches
