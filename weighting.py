"""The decisions taken per problem: advantages, which guided trajectory to learn from, and how much; and the baselines' own.

Pure functions of rewards and log-probabilities; no model, no text. Imports no sibling and needs torch only: copy this file
alone. Symbols as in the paper (arXiv 2606.24064). [eq N]: there; [code]: in the public code of a baseline; [ours]: both are
silent. Axes: P problems, G autonomous group (8), J guided group (4).
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, *, scale_by_std: bool = True, eps: float = 1e-6) -> Tensor:
    """GRPO's group-relative advantage A_i of [eq 1]: (r_i - mean) / (std + eps), for rewards (P, G) -> (P, G).

    The standard deviation is the unbiased one (divisor G - 1) and eps is 1e-6 [ours], as in veRL, which the paper trained
    with. A group of equal rewards, all right or all wrong, gets exactly zero. Truncated responses are in the mean like
    any other: dropping them first would favour problems whose failures run long. ValueError if G < 2.

    scale_by_std=False gives r_i - mean, the form of LUFFY (whose group is 7 rollouts and the demonstration) and HPT [code].
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be (problems, group of at least 2), got shape {tuple(rewards.shape)}")
    rewards = rewards.float()
    centred = rewards - rewards.mean(dim=1, keepdim=True)  # (P, G)
    if not scale_by_std:
        return centred
    return centred / (rewards.std(dim=1, keepdim=True, correction=1) + eps)  # A_i [eq 1]


def instance_weight(
    p_auto: Tensor, p_guide: Tensor, alpha_0: float = 0.5, gamma: float = 0.1, alpha_max: float = 0.8
) -> Tensor:
    """The adaptive weight of the distillation term, one per problem [eq 6]:

        alpha(q) = clip( alpha_0 * (p_guide - p_auto + gamma) / (p_auto + gamma), 0, alpha_max )

    p_auto, p_guide: pass rates in [0, 1] of the autonomous and of the guided group, any shape. The relative gain from
    guidance: large where the policy fails alone and succeeds guided, zero where guidance hurts by gamma or more. gamma keeps
    the division finite at p_auto = 0 and lets a problem with no measured gain keep a little weight (0.0455 at 1 and 1).
    """
    p_auto, p_guide = torch.as_tensor(p_auto).float(), torch.as_tensor(p_guide).float()
    alpha = alpha_0 * (p_guide - p_auto + gamma) / (p_auto + gamma)
    return alpha.clamp(0.0, alpha_max)  # [eq 6]


def reachable_target(logprobs: Tensor, correct: Tensor) -> int | None:
    """The index of o+: of the correct guided trajectories the one the UNGUIDED policy finds most probable [eq 4].

    logprobs (J,): log pi(õ_j | q), each trajectory's log-probability without the strategy in the context, summed over its
    tokens [eq 4], or the mean per token if the caller passes that [ours]. correct (J,) bool. None if no guided trajectory is
    correct: that problem then has no distillation term [alg 1, lines 14-15]. Ties go to the first [ours].
    """
    if logprobs.shape != correct.shape or logprobs.dim() != 1:
        raise ValueError(f"logprobs {tuple(logprobs.shape)} and correct {tuple(correct.shape)} must both be (J,)")
    if not bool(correct.any()):
        return None
    return int(logprobs.masked_fill(~correct.bool(), float("-inf")).argmax())  # o+ [eq 4]


def reach_gap(logprobs: Sequence[float], rewards: Sequence[float], targets: Sequence[int]) -> float:
    """Nats by which the targets are more reachable than the correct guided trajectories are on average; 0 without one. A
    diagnostic."""
    if not targets:
        return 0.0
    correct = [logprob for logprob, reward in zip(logprobs, rewards, strict=True) if reward > 0]
    return sum(logprobs[j] for j in targets) / len(targets) - sum(correct) / len(correct)


# ---------------------------------------------------------------------------------------------------- ablations
# What alpha(q) and o+ are compared with. The fixed weight is 1.0 [app G].


def group_advantage_weight(auto_rewards: Tensor, target_reward: Tensor, alpha_max: float = 0.8, *, eps: float = 1e-6) -> Tensor:
    """o+'s own advantage as the weight of the distillation term [eq 8]: rewards (P, G) and (P,) -> (P,).

        alpha(q) = clip( A+, 0, alpha_max ),   A+ = (R(o+) - mean) / (std + eps) in the group { o_1, ..., o_G, o+ }

    It falls as the policy's own success rate rises, but asks nothing about the other guided trajectories.
    """
    group = torch.cat([auto_rewards, target_reward[:, None]], dim=1)  # (P, G + 1)
    return group_advantages(group, eps=eps)[:, -1].clamp(0.0, alpha_max)  # [eq 8]


def guided_advantage_weight(
    auto_rewards: Tensor, guided_rewards: Tensor, alpha_0: float = 0.5, alpha_max: float = 0.8, *, eps: float = 1e-6
) -> Tensor:
    """A weight from the advantage of the whole guided group: rewards (P, G) and (P, J) -> (P,). [ours]

        alpha(q) = clip( alpha_0 * mean_j A~_j, 0, alpha_max ),   A~ = the advantages of all G + J rewards taken as one group

    Like [eq 6] it is zero if guidance brings nothing, but it does not grow as the policy's own success rate falls.
    """
    together = group_advantages(torch.cat([auto_rewards, guided_rewards], dim=1), eps=eps)  # (P, G + J)
    return (alpha_0 * together[:, auto_rewards.shape[1] :].mean(dim=1)).clamp(0.0, alpha_max)


def random_target(correct: Tensor, generator: torch.Generator) -> int | None:
    """The index of one correct guided trajectory, drawn uniformly; correct (J,) bool. None if there is none. [ours]"""
    indices = correct.nonzero()[:, 0]
    if not len(indices):
        return None
    return int(indices[torch.randint(len(indices), (), generator=generator)])


# ---------------------------------------------------------------------------------------------------- baselines


def hpt_gate(rewards: Tensor, gate: int = 0) -> Tensor:
    """HPT's switch [code]: rewards (P, G) of zeros and ones -> (P,) bool, True where at most `gate` of the G are correct.

    There all G rollouts are dropped and the problem is learnt from its demonstration (loss.hpt_loss). The public code uses
    gate 0 for Qwen and 2 for Llama.
    """
    return rewards.sum(dim=1) <= gate
