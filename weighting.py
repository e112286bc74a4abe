"""The decisions taken per problem: advantages, which guided trajectory to learn from, and how much; and the baselines' own.

Pure functions of rewards and log-probabilities; no model, no text. Imports no sibling and needs torch only: copy this file
alone. Axes: P problems, G autonomous group (8), J guided group (4). Symbols as in the paper (arXiv 2606.24064).
"""

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, *, scale_by_std: bool = True, eps: float = 1e-6) -> Tensor:
    """GRPO's group-relative advantage, A_i = (r_i - mean) / (std + eps), for rewards (P, G) -> (P, G).

    The standard deviation is the unbiased one (divisor G - 1) and eps is 1e-6: ours, after the framework the paper trained
    with. A group of equal rewards, all right or all wrong, gets exactly zero. Truncated responses are in the mean like any
    other: dropping them first would favour problems whose failures run long. ValueError where G < 2.

    scale_by_std=False gives r_i - mean, the form of LUFFY (whose group is 7 rollouts and the demonstration) and HPT [code].
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be (problems, group of at least 2), got shape {tuple(rewards.shape)}")
    rewards = rewards.float()
    centred = rewards - rewards.mean(dim=1, keepdim=True)  # (P, G)
    return centred / (rewards.std(dim=1, keepdim=True, correction=1) + eps) if scale_by_std else centred


def instance_weight(
    p_auto: Tensor, p_guide: Tensor, alpha_0: float = 0.5, gamma: float = 0.1, alpha_max: float = 0.8
) -> Tensor:
    """The adaptive weight of the distillation term, one per problem [paper]:

        alpha(q) = clip( alpha_0 * (p_guide - p_auto + gamma) / (p_auto + gamma), 0, alpha_max )

    p_auto, p_guide: pass rates in [0, 1] of the autonomous and of the guided group, any shape. The relative gain from
    guidance: large where the policy fails alone and succeeds guided, zero where guidance hurts by gamma or more. gamma keeps
    the division finite at p_auto = 0 and lets a problem with no measured gain keep a little weight (0.0455 at 1 and 1).
    """
    p_auto, p_guide = torch.as_tensor(p_auto).float(), torch.as_tensor(p_guide).float()
    alpha = alpha_0 * (p_guide - p_auto + gamma) / (p_auto + gamma)
    return alpha.clamp(0.0, alpha_max)


def reachable_target(logprobs: Tensor, correct: Tensor) -> int | None:
    """The index of o+: of the correct guided trajectories the one the UNGUIDED policy finds most probable [paper].

    logprobs (J,): log pi(o~_j | q), each trajectory's log-probability without the strategy in the context: summed over its
    tokens (ours, the paper does not say), or the mean per token where the caller passes that. correct (J,) bool. None where
    no guided trajectory is correct: the distillation term of that problem is then zero. Ties go to the first.
    """
    if logprobs.shape != correct.shape or logprobs.dim() != 1:
        raise ValueError(f"logprobs {tuple(logprobs.shape)} and correct {tuple(correct.shape)} must both be (J,)")
    if not bool(correct.any()):
        return None
    return int(logprobs.masked_fill(~correct.bool(), float("-inf")).argmax())


# ---------------------------------------------------------------------------------------------------- ablations
# What the paper compares alpha(q) and o+ with. It names them without a formula: the formulas are ours.


def group_advantage_weight(
    auto_rewards: Tensor, guided_rewards: Tensor, alpha_0: float = 0.5, alpha_max: float = 0.8, *, eps: float = 1e-6
) -> Tensor:
    """A weight from the group's advantage instead of the relative gain: rewards (P, G) and (P, J) -> (P,). Ours:

        alpha(q) = clip( alpha_0 * mean_j A~_j, 0, alpha_max ),   A~ = the advantages of all G + J rewards taken as one group

    The mean advantage of the guided members: like alpha(q) it is zero where guidance brings nothing, but it does not grow as
    the policy's own success rate falls.
    """
    together = group_advantages(torch.cat([auto_rewards, guided_rewards], dim=1), eps=eps)  # (P, G + J)
    return (alpha_0 * together[:, auto_rewards.shape[1] :].mean(dim=1)).clamp(0.0, alpha_max)


def random_target(correct: Tensor, generator: torch.Generator) -> int | None:
    """The index of one correct guided trajectory, drawn uniformly; correct (J,) bool. None where there is none. [paper]"""
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
