"""The losses of SGPO and its baselines: policy losses, the clipped forward KL, and a head that applies them in token chunks.

Pure functions of tensors. No model, no text, no normaliser: every loss here is per token, and the caller multiplies by weights
that it worked out over the whole optimizer step (all micro-batches, all ranks), so that the gradient cannot depend on how the
step was cut. Imports no sibling and needs torch only: copy this file alone.

Symbols as in the paper (arXiv 2606.24064). [eq N]: there; [code]: in the public code of a baseline; [ours]: both are silent.
Axes: M response tokens (m of a chunk), D width, V vocabulary. Logits enter the softmax in fp32.

Direction: "forward" KL here is KL(guided || unguided), the expectation under the guided side. Public code uses the word for
both directions; the formula in `forward_kl` is what counts, and the tests pin it by hand.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TokenTerms = Callable[..., dict[str, Tensor]]


# ---------------------------------------------------------------------------------------------------- per-token quantities


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log pi(v) of every token v, in fp32: logits (..., V) -> (..., V)."""
    logits = logits.float()  # bf16 rounds a log-probability of -10 to steps of 0.06: no ratio would mean anything
    return torch.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)


def token_logprobs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """log pi(target) at each position: logits (..., V), targets (...) -> (...), natural log.

    `temperature` must be the one the tokens were sampled at, or the ratio to the sampler's log-probs is not 1.
    """
    return _of_targets(log_softmax(logits, temperature), targets)


def _of_targets(log_p: Tensor, targets: Tensor) -> Tensor:
    return log_p.gather(-1, targets[..., None])[..., 0]


def _entropy(log_p: Tensor) -> Tensor:
    """-sum_v p_v log p_v, in nats: (..., V) -> (...)."""
    return -(log_p.exp() * log_p).sum(-1)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float = 0.2, clip_high: float = 0.28
) -> tuple[Tensor, Tensor, Tensor]:
    """GRPO's clipped surrogate per token, the term under the sums of [eq 1]; all arguments and results of one shape, e.g. (M,):

        rho_t  = exp(logprobs_t - old_logprobs_t)
        loss_t = -min( rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) A_t )

    Returns (loss, ratio, clipped); `ratio` (rho) and `clipped` (bool: the clip holds and the token has no gradient) are
    diagnostics. No KL to a reference model [eq 1]. No dual clip [ours]: veRL, which the paper trained with, has one, at 3.
    """
    ratio = torch.exp(logprobs - old_logprobs.detach())  # rho_it = pi_theta / pi_old of the sampled token [eq 1]
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)  # clip_high is the larger: DAPO's "clip-higher"
    loss = -torch.minimum(ratio * advantages, bounded * advantages)  # [eq 1], which is printed without the minus sign
    # not wherever the ratio is outside: the minimum takes the clipped side only where that is the worse one
    clipped = ((advantages > 0) & (ratio > 1 + clip_high)) | ((advantages < 0) & (ratio < 1 - clip_low))
    return loss, ratio.detach(), clipped.detach()


def luffy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, demonstration: Tensor, shaping: float = 0.1
) -> tuple[Tensor, Tensor, Tensor]:
    """LUFFY's mixed-policy loss per token (arXiv 2504.14945, as its public code computes it), all of one shape, e.g. (M,):

        the policy's own tokens    loss_t = -A_t ratio_t,  ratio_t = exp(logprobs_t - old_logprobs_t),  no clip
        a demonstration's tokens   loss_t = -A_t f(pi_t),  f(x) = x / (x + shaping),  pi_t = exp(logprobs_t)

    `demonstration` (bool) tells them apart by position. The strong model's own probability is taken as 1, so for its tokens
    old_logprobs is ignored. f lifts the gradient on tokens that the policy finds improbable: f'(x) = shaping / (x + shaping)^2.
    Returns (loss, ratio, clipped) as policy_loss does: ratio is pi_t on a demonstration, nothing is clipped. The normaliser is
    the caller's: the public code divides by the padded width of the responses, we by the tokens of the whole update [ours].
    """
    ratio = torch.exp(logprobs - old_logprobs.detach().masked_fill(demonstration, 0.0))  # log 1 = 0: the writer's probability
    shaped = torch.where(demonstration, ratio / (ratio + shaping), ratio)
    return -advantages * shaped, ratio.detach(), torch.zeros_like(demonstration)


def hpt_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, demonstration: Tensor, sft_weight: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """HPT's loss per token (Hybrid Post-Training, arXiv 2509.04419, as its public code computes it), all of one shape:

        the policy's own tokens    loss_t = -A_t exp(logprobs_t - old_logprobs_t),  no clip
        a demonstration's tokens   loss_t = -sft_weight logprobs_t

    Which problems have a demonstration in the place of their rollouts is weighting.hpt_gate's decision; `demonstration` (bool)
    marks its tokens by position, and their advantages and old log-probs are ignored. sft_weight is 1.0, or 0.3 for its 1.5B
    model. Returns (loss, ratio, clipped) as luffy_loss does. One normaliser for both kinds of token [ours].
    """
    ratio = torch.exp(logprobs - old_logprobs.detach().masked_fill(demonstration, 0.0))
    loss = torch.where(demonstration, -sft_weight * logprobs, -advantages * ratio)
    return loss, ratio.detach(), torch.zeros_like(demonstration)


def forward_kl(guided_logits: Tensor, unguided_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """The token divergence d_t over the full vocabulary [eq 3]: logits (..., V) twice -> (...), in nats:

        d_t = KL( sg[p] || q ) = sum_v p_v (log p_v - log q_v),   p = softmax(guided), q = softmax(unguided)

    The guided side is the teacher: it is detached here, so that the gradient reaches the unguided side alone. Both sides get
    the same temperature [ours]. The whole vocabulary is summed: a top-k of either side misses the tokens where the mass moved.
    """
    log_p = log_softmax(guided_logits.detach(), temperature)  # sg[ pi_theta(. | q, s, o_<t) ]
    log_q = log_softmax(unguided_logits, temperature)  # pi_theta(. | q, o_<t)
    return (log_p.exp() * (log_p - log_q)).sum(-1)  # [eq 3]


def reverse_kl(guided_logits: Tensor, unguided_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """The other direction, for the ablation of [app F]: logits (..., V) twice -> (...), in nats:

        KL( q || sg[p] ) = sum_v q_v (log q_v - log p_v),   p = softmax(guided), q = softmax(unguided)

    The expectation is under the student: it sharpens onto one of the guided modes; the forward KL covers them all [§3.3].
    """
    log_p, log_q = log_softmax(guided_logits.detach(), temperature), log_softmax(unguided_logits, temperature)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def kl_clip_mask(divergence: Tensor, delta: float = 1.0) -> Tensor:
    """w_t = 1[d_t <= delta] of [eq 5] as a float of d's shape: outlier tokens are dropped, not clamped.

    The mask acts on d_t after the sum over the vocabulary. Clipping the single terms instead would make the sum negative,
    because only the whole sum is a divergence.
    """
    return (divergence.detach() <= delta).to(divergence.dtype)  # d_t = delta stays


# ---------------------------------------------------------------------------------------------------- per-token terms
# For the chunked head. Each takes the logits of m response tokens and per-token inputs, and returns per-token tensors (m,):
# "loss", already times its weight, and diagnostics.


def sft_terms(logits: Tensor, targets: Tensor, weight: Tensor, *, temperature: float) -> dict[str, Tensor]:
    """Cross-entropy: loss_t = -weight_t log pi(target_t), of the policy at `temperature`."""
    logprob = token_logprobs(logits, targets, temperature)
    return {"loss": -weight * logprob, "logprob": logprob.detach()}


def policy_terms(
    logits: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weight: Tensor,
    *demonstration: Tensor,
    loss: Callable[..., tuple[Tensor, Tensor, Tensor]],
    temperature: float,
    entropy_bonus: float = 0.0,
) -> dict[str, Tensor]:
    """A policy loss, with the step's diagnostics from the same pass over the vocabulary.

    loss           one of the policy losses above with its settings: called with (logprobs, old_logprobs, advantages) and, for
                   those that know demonstrations, with their mask; all (m,)
    entropy_bonus  LUFFY's: loss_t - entropy_bonus H_t
    """
    log_p = log_softmax(logits, temperature)
    logprob = _of_targets(log_p, targets)
    token_loss, ratio, clipped = loss(logprob, old_logprobs, advantages, *demonstration)
    entropy = _entropy(log_p if entropy_bonus else log_p.detach())  # a diagnostic has no graph
    if entropy_bonus:
        token_loss = token_loss - entropy_bonus * entropy
    stats = {"logprob": logprob.detach(), "ratio": ratio, "clipped": clipped.float(), "entropy": entropy.detach()}
    return {"loss": weight * token_loss, **stats}


def diagnostics(
    stats: dict[str, Tensor], old_logprobs: Tensor, chosen: Tensor
) -> tuple[dict[str, float], dict[str, float]]:
    """(sums, largest values) of what a policy loss handed back, over the chosen tokens: all (M,), `chosen` bool.

    Sums: the number of tokens, entropy, clipped tokens and an estimate of KL(old || new) from the sampled tokens, rho - 1 -
    log rho, which is unbiased and, but for rounding, never negative. Largest: |rho - 1| and |log rho|.
    """
    if not chosen.any():
        return {}, {}
    ratio, log_ratio = stats["ratio"][chosen], stats["logprob"][chosen] - old_logprobs[chosen]
    per_token = {"entropy": stats["entropy"][chosen], "clip_fraction": stats["clipped"][chosen]}
    per_token["policy_kl"] = ratio - 1 - log_ratio
    sums = {"own_tokens": ratio.numel()} | {name: value.sum().item() for name, value in per_token.items()}
    return sums, {"ratio_error": (ratio - 1).abs().max().item(), "logprob_error": log_ratio.abs().max().item()}


def distillation_terms(
    unguided_logits: Tensor,
    guided_logits: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    delta: float,
    temperature: float,
    objective: str = "kl",
) -> dict[str, Tensor]:
    """Clipped forward KL on the target's tokens: loss_t = weight_t * 1[d_t <= delta] * d_t.

    weight_t = alpha(q) / (P |o+|) makes the sum over tokens and problems the mean over the P problems of alpha(q) L_KD^clip
    [eq 5, 7]. chunked_head makes the guided logits from its `teacher`.

    Two other objectives for the ablations: "reverse_kl" takes d_t the other way round, clip included [app F; the clip: ours];
    "sft" is the cross-entropy of the target's tokens, -log q(target_t) [tab 3], which knows no d_t and so drops nothing [ours]
    (d_t is still reported).
    """
    if objective not in ("kl", "reverse_kl", "sft"):
        raise ValueError(f"objective {objective!r}: must be kl, reverse_kl or sft")
    divergence_of = reverse_kl if objective == "reverse_kl" else forward_kl
    divergence = divergence_of(guided_logits, unguided_logits, temperature)  # d_t (m,) [eq 3]
    kept = kl_clip_mask(divergence, delta)  # w_t [eq 5]
    loss = kept * divergence  # a dropped token is 0 here and still counts in the weight's |o+| [eq 5]
    if objective == "sft":
        loss, kept = -token_logprobs(unguided_logits, targets, temperature), torch.ones_like(kept)
    return {"loss": weight * loss, "divergence": divergence.detach(), "kept": kept}


# ---------------------------------------------------------------------------------------------------- the chunked head


class _WithGradient(torch.autograd.Function):
    """A loss whose gradients are known already: forward hands the value on, backward the gradients."""

    @staticmethod
    def forward(ctx, hidden, weight, loss, grad_hidden, grad_weight):
        ctx.grads = (grad_hidden, grad_weight)
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        if ctx.grads is None:
            raise RuntimeError("a chunked loss can be differentiated once: its gradients were scaled in place")
        grad_hidden, grad_weight = ctx.grads
        ctx.grads = None
        # in place: at V = 152,064 a second copy of the head's gradient would be the largest tensor of the whole loss
        return grad_hidden.mul_(upstream), grad_weight.mul_(upstream), None, None, None


def chunked_head(
    hidden: Tensor,
    weight: Tensor,
    terms: TokenTerms,
    inputs: Sequence[Tensor],
    *,
    chunk_tokens: int,
    at: Tensor | None = None,
    teacher: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Apply the language-model head and a per-token loss chunk by chunk, so that (M, V) logits never exist at once.

    hidden   (M, D), or with `at` a packed row (1, T, D), of which the positions at (M,) are taken
    weight   (V, D)
    terms    terms(logits (m, V), *inputs of the chunk) -> per-token tensors (m,) with the key "loss"
    inputs   tensors (M, ...), cut alongside
    teacher  (M, D) hidden states of another pass; terms gets their logits too, before the inputs and without gradient

    Returns (sum of loss, every term as (M,) without gradient). The gradient is taken in the forward pass, while a chunk's
    logits are there: three matrix products a chunk, as many as without chunks and one fewer than recomputing them in
    backward. Peak memory: four to five tensors of (chunk_tokens, V) in fp32 and one gradient of the head. [ours]
    """
    hidden = hidden if at is None else hidden[0, at]
    # without a gradient to give (scoring, evaluation) the loop below only computes values
    wants_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    with torch.no_grad(), torch.autocast(kind, enabled=False):
        h, w = hidden.detach().to(dtype), weight.detach().to(dtype)
        grad_hidden = torch.zeros_like(hidden) if wants_grad else None
        grad_weight = torch.zeros_like(weight) if wants_grad else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        collected: list[dict[str, Tensor]] = []
        for start in range(0, h.shape[0], chunk_tokens):
            span = slice(start, start + chunk_tokens)
            given = [x[span] for x in inputs]
            if teacher is not None:
                given.insert(0, F.linear(teacher[span].to(dtype), w))
            with torch.set_grad_enabled(wants_grad):
                logits = F.linear(h[span], w).float().requires_grad_(wants_grad)  # (m, V), a leaf: its gradient is asked for
                values = terms(logits, *given)
                chunk_loss = values["loss"].sum()
            given = None  # or the teacher's logits would still be alive beside the gradient
            if wants_grad:
                (grad_logits,) = torch.autograd.grad(chunk_loss, logits)
                grad_logits = grad_logits.to(dtype)
                grad_hidden[span] = grad_logits @ w
                if grad_weight.dtype == dtype:
                    grad_weight.addmm_(grad_logits.T, h[span])  # no (V, D) temporary
                else:
                    grad_weight += grad_logits.T @ h[span]
                grad_logits = None
            loss += chunk_loss.detach()
            collected.append({name: value.detach() for name, value in values.items()})
            logits = values = chunk_loss = None  # or this chunk's tensors would still be alive beside the next one's
    names = collected[0] if collected else ()
    stats = {name: torch.cat([values[name] for values in collected]) for name in names}
    if wants_grad:
        loss = _WithGradient.apply(hidden, weight, loss, grad_hidden, grad_weight)
    return loss, stats
