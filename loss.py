"""The losses of SGPO and its baselines: policy losses, the clipped forward KL, and a head that applies them in token chunks.

Pure functions of tensors. Every loss here is per token. The caller multiplies by weights that it counted over the whole
optimizer step (all micro-batches, all ranks), so the gradient cannot depend on how the step was cut. Imports no sibling and
needs torch only: copy this file alone.

Symbols as in the paper (arXiv 2606.24064). [eq N]: there; [code]: in the public code of a baseline; [ours]: both are silent.
Axes: M response tokens (m of a chunk), D width, V vocabulary.

Public code calls either direction of the KL divergence "forward". Here it is KL(guided || unguided): see `forward_kl`.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# ---------------------------------------------------------------------------------------------------- per-token quantities

def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log pi(v) of every token v, in fp32: logits (..., V) -> (..., V)."""
    logits = logits.float()  # bf16 rounds a log-probability of -10 to steps of 0.06: no ratio would mean anything
    return torch.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)


def token_logprobs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """log pi(target) at each position: logits (..., V), targets (...) -> (...), natural log. `temperature` must be the one the
    tokens were sampled at, or the ratio to the sampler's log-probs is not 1."""
    return log_softmax(logits, temperature).gather(-1, targets[..., None])[..., 0]


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float = 0.2, clip_high: float = 0.28
) -> tuple[Tensor, Tensor, Tensor]:
    """GRPO's clipped surrogate of each token, the term under the sums of [eq 1]. All arguments and results have one shape:

        rho_t  = exp(logprobs_t - old_logprobs_t)
        loss_t = -min( rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) A_t )

    Returns (loss, ratio, clipped). `ratio` (rho) and `clipped` (bool: the token has no gradient) are diagnostics. No KL to a
    reference model [eq 1]. No dual clip [ours]; veRL, which the paper trained with, has one at 3.
    """
    ratio = torch.exp(logprobs - old_logprobs.detach())  # rho_it = pi_theta / pi_old of the sampled token [eq 1]
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)  # clip_high is the larger: DAPO's "clip-higher"
    loss = -torch.minimum(ratio * advantages, bounded * advantages)  # [eq 1], which is printed without the minus sign
    # not everywhere that the ratio is outside: the minimum takes the clipped side only if it is the smaller one
    clipped = ((advantages > 0) & (ratio > 1 + clip_high)) | ((advantages < 0) & (ratio < 1 - clip_low))
    return loss, ratio.detach(), clipped.detach()


def luffy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, demonstration: Tensor, shaping: float = 0.1
) -> tuple[Tensor, Tensor, Tensor]:
    """LUFFY's mixed-policy loss of each token (arXiv 2504.14945) [code]; all of one shape:

        a sampled token            loss_t = -A_t ratio_t,  ratio_t = exp(logprobs_t - old_logprobs_t),  no clip
        a demonstration's token    loss_t = -A_t f(pi_t),  f(x) = x / (x + shaping),  pi_t = exp(logprobs_t)

    `demonstration` (bool) tells them apart by position. f raises the gradient of tokens that the policy finds improbable:
    f'(x) = shaping / (x + shaping)^2. Returns (loss, ratio, clipped) as policy_loss does: ratio is pi_t on a demonstration,
    nothing is clipped. The public code divides by the padded width of the responses, our caller by all tokens [ours].
    """
    # a demonstration's old_logprobs are ignored: its writer's probability is taken as 1, and log 1 = 0 [code]
    ratio = torch.exp(logprobs - old_logprobs.detach().masked_fill(demonstration, 0.0))
    shaped = torch.where(demonstration, ratio / (ratio + shaping), ratio)
    return -advantages * shaped, ratio.detach(), torch.zeros_like(demonstration)


def hpt_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, demonstration: Tensor, sft_weight: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """HPT's loss of each token (Hybrid Post-Training, arXiv 2509.04419) [code]; all of one shape:

        a sampled token            loss_t = -A_t exp(logprobs_t - old_logprobs_t),  no clip
        a demonstration's token    loss_t = -sft_weight logprobs_t

    methods.py decides which problems have a demonstration instead of rollouts. `demonstration` (bool) marks its tokens
    by position; their advantages and old_logprobs are ignored. sft_weight is 1.0, or 0.3 for the 1.5B model [code]. Returns
    (loss, ratio, clipped) as luffy_loss does. One normaliser for both kinds of token [ours].
    """
    ratio = torch.exp(logprobs - old_logprobs.detach().masked_fill(demonstration, 0.0))
    loss = torch.where(demonstration, -sft_weight * logprobs, -advantages * ratio)
    return loss, ratio.detach(), torch.zeros_like(demonstration)


def forward_kl(guided_logits: Tensor, unguided_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """The divergence d_t of each token [eq 3]: logits (..., V) twice -> (...), in nats:

        d_t = KL( sg[p] || q ) = sum_v p_v (log p_v - log q_v),   p = softmax(guided), q = softmax(unguided)

    The guided side is the teacher. It is detached here, so the gradient reaches the unguided side alone. Both have the same
    temperature [ours]. The sum is over the whole vocabulary: a top-k of either side misses tokens that mass moved to.
    """
    log_p = log_softmax(guided_logits.detach(), temperature)  # sg[ pi_theta(. | q, s, o_<t) ]
    log_q = log_softmax(unguided_logits, temperature)  # pi_theta(. | q, o_<t)
    return (log_p.exp() * (log_p - log_q)).sum(-1)  # [eq 3]


def reverse_kl(guided_logits: Tensor, unguided_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """The other direction, for the ablation of [app F]: logits (..., V) twice -> (...), in nats:

        KL( q || sg[p] ) = sum_v q_v (log q_v - log p_v),   p = softmax(guided), q = softmax(unguided)

    It pulls the policy onto one of the guided modes; the forward KL asks it to cover them all [§3.3].
    """
    log_p = log_softmax(guided_logits.detach(), temperature)
    log_q = log_softmax(unguided_logits, temperature)
    return (log_q.exp() * (log_q - log_p)).sum(-1)  # [app F]


def kl_clip_mask(divergence: Tensor, delta: float = 1.0) -> Tensor:
    """w_t = 1[d_t <= delta] of [eq 5] as a float of d's shape: a token above delta is dropped, not clamped."""
    # on the sum over the vocabulary: with its terms clipped it could be negative
    return (divergence.detach() <= delta).to(divergence.dtype)  # w_t [eq 5]; d_t = delta stays


# ---------------------------------------------------------------------------------------------------- per-token terms
# For the chunked head. Each takes the logits of m response tokens and per-token inputs, and returns tensors (m,): "loss", with
# its weight multiplied in, and diagnostics.


def sft_terms(logits: Tensor, targets: Tensor, weight: Tensor, *, temperature: float) -> dict[str, Tensor]:
    """Cross-entropy: loss_t = -weight_t log pi(target_t), of the policy at `temperature`."""
    logprob = token_logprobs(logits, targets, temperature)
    return {"loss": -weight * logprob, "logprob": logprob.detach()}


def policy_terms(
    logits: Tensor, targets: Tensor, old_logprobs: Tensor, advantages: Tensor, weight: Tensor, *demonstration: Tensor,
    loss: Callable[..., tuple[Tensor, Tensor, Tensor]], temperature: float, entropy_bonus: float = 0.0,
) -> dict[str, Tensor]:  # fmt: skip
    """A policy loss and its diagnostics.

    loss           a policy loss of this file with its settings: called with (logprobs, old_logprobs, advantages), all (m,), and
                   luffy_loss and hpt_loss with `demonstration` too
    entropy_bonus  LUFFY's: loss_t - entropy_bonus H_t, with the entropy H_t = -sum_v p_v log p_v in nats
    """
    log_p = log_softmax(logits, temperature)
    logprob = log_p.gather(-1, targets[..., None])[..., 0]
    token_loss, ratio, clipped = loss(logprob, old_logprobs, advantages, *demonstration)
    log_p = log_p if entropy_bonus else log_p.detach()  # a diagnostic has no graph
    entropy = -(log_p.exp() * log_p).sum(-1)
    if entropy_bonus:
        token_loss = token_loss - entropy_bonus * entropy
    stats = {"logprob": logprob.detach(), "ratio": ratio, "clipped": clipped.float(), "entropy": entropy.detach()}
    return {"loss": weight * token_loss, **stats}


def diagnostics(stats: dict[str, Tensor], old_logprobs: Tensor, chosen: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Sums of the diagnostics of policy_terms over the chosen tokens, and by how much each one's log-probability differs from
    the old one; 0 for the others. The arguments and the last result are (M,), `chosen` bool. Nothing waits for a GPU."""
    log_ratio = torch.where(chosen, stats["logprob"] - old_logprobs, 0.0)
    ratio = torch.where(chosen, stats["ratio"], 1.0)
    values = {
        "own_tokens": chosen,
        "entropy": torch.where(chosen, stats["entropy"], 0.0),
        "clip_fraction": torch.where(chosen, stats["clipped"], 0.0),
        "policy_kl": ratio - 1 - log_ratio,  # an unbiased estimate of KL(old || new), never negative
        "logprob_error_mean": log_ratio.abs(),
    }
    return {name: value.sum(dtype=torch.float64) for name, value in values.items()}, log_ratio.abs()


def distillation_terms(
    unguided_logits: Tensor, guided_logits: Tensor, targets: Tensor, weight: Tensor,
    *, delta: float, temperature: float, objective: str = "kl",
) -> dict[str, Tensor]:  # fmt: skip
    """Clipped forward KL on the target's tokens: loss_t = weight_t * 1[d_t <= delta] * d_t.

    With weight_t = alpha(q) / (P |o+|) the sum over tokens and problems is the mean of alpha(q) L_KD^clip over the P problems
    [eq 5, 7]. chunked_head makes the guided logits from its `teacher`.

    objective, for the ablations: "reverse_kl" has the other direction as d_t [app F], with the same clip [ours]; "sft" is the
    cross-entropy -log q(target_t) [tab 3], which drops no token [ours].
    """
    divergence_of = {"kl": forward_kl, "reverse_kl": reverse_kl, "sft": forward_kl}[objective]
    divergence = divergence_of(guided_logits, unguided_logits, temperature)  # d_t (m,) [eq 3]
    kept = kl_clip_mask(divergence, delta)  # w_t [eq 5]
    loss = kept * divergence  # w_t d_t [eq 5]; a dropped token still counts in the weight's |o+|
    if objective == "sft":
        loss, kept = -token_logprobs(unguided_logits, targets, temperature), torch.ones_like(kept)
    return {"loss": weight * loss, "divergence": divergence.detach(), "kept": kept}


# ---------------------------------------------------------------------------------------------------- the chunked head

class _WithGradient(torch.autograd.Function):
    """A loss whose gradients are known already: forward returns the value, backward the gradients."""

    @staticmethod
    def forward(ctx, hidden, weight, loss, grad_hidden, grad_weight):
        ctx.grads = (grad_hidden, grad_weight)
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        grad_hidden, grad_weight = ctx.grads
        ctx.grads = None  # a second backward pass must be an error, because these are scaled in place:
        # at V = 152,064 a copy of the head's gradient would be the largest tensor of the whole loss
        grad_weight = None if grad_weight is None else grad_weight.mul_(upstream)
        return grad_hidden.mul_(upstream), grad_weight, None, None, None


def chunked_head(
    hidden: Tensor, weight: Tensor, terms: Callable[..., dict[str, Tensor]], inputs: Sequence[Tensor],
    *, chunk_tokens: int, at: Tensor | None = None, teacher: Tensor | None = None, loss_scale: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Apply the language-model head and a per-token loss chunk by chunk, so that (M, V) logits never exist at once [ours].

    hidden   (M, D), or with `at` a packed row (1, T, D), of which the positions at (M,) are taken
    weight   (V, D)
    terms    terms(logits (m, V), *inputs of the chunk) -> tensors (m,), one of them "loss"
    inputs   tensors (M, ...), cut into the same chunks
    teacher  (M, D) hidden states of another pass; terms gets their logits too, before the inputs and without gradient
    loss_scale  a factor of the gradient alone: in float16 anything below 3e-8 would be 0

    Returns (sum of loss, every term as (M,) without gradient). The gradient is computed in the forward pass, so no logits are
    computed twice. Peak memory: four to five tensors of (chunk_tokens, V) in fp32 and one gradient of the head.
    """
    hidden = hidden if at is None else hidden[0, at]
    # without a gradient (scoring, evaluation) the loop below only computes values
    wants_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    dtype = hidden.dtype
    with torch.no_grad():
        h, w = hidden.detach(), weight.detach().to(dtype)
        grad_hidden = torch.zeros_like(hidden) if wants_grad else None
        grad_weight = torch.zeros_like(weight) if wants_grad and weight.requires_grad else None  # the head may be frozen
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        collected: list[dict[str, Tensor]] = []
        for start in range(0, h.shape[0], chunk_tokens):
            span = slice(start, start + chunk_tokens)
            part = [x[span] for x in inputs]
            guided = [] if teacher is None else [F.linear(teacher[span].to(dtype), w)]
            with torch.set_grad_enabled(wants_grad):
                logits = F.linear(h[span], w).float().requires_grad_(wants_grad)  # (m, V), a leaf of the chunk's own graph
                values = terms(logits, *guided, *part)
                chunk_loss = values["loss"].sum()
            guided = None  # frees the teacher's logits before the gradient is computed
            if wants_grad:
                (grad_logits,) = torch.autograd.grad(chunk_loss, logits, torch.full_like(chunk_loss, loss_scale))
                grad_logits = grad_logits.to(dtype)
                grad_hidden[span] = grad_logits @ w
                if grad_weight is not None and grad_weight.dtype == dtype:
                    grad_weight.addmm_(grad_logits.T, h[span])  # no (V, D) temporary
                elif grad_weight is not None:
                    grad_weight += grad_logits.T @ h[span]
                grad_logits = None
            loss += chunk_loss.detach()
            collected.append({name: value.detach() for name, value in values.items()})
            logits = values = chunk_loss = None  # frees this chunk's tensors before the next one
    names = collected[0] if collected else ()
    stats = {name: torch.cat([values[name] for values in collected]) for name in names}
    if wants_grad:
        loss = _WithGradient.apply(hidden, weight, loss, grad_hidden, grad_weight)
    return loss, stats
