"""What is decided for each problem: advantages, which guided trajectory to learn from, and how much.

Pure functions of rewards and log-probabilities. Imports no sibling and needs torch only: copy this file alone. Symbols as in
the paper (arXiv 2606.24064). [eq N]: there; [code]: in the public code of a baseline; [ours]: both are silent.
Axes: P problems, G autonomous group (8), J guided group (4).
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, *, scale_by_std: bool = True, eps: float = 1e-6) -> Tensor:
    """GRPO's group-relative advantage A_i of [eq 1]: (r_i - mean) / (std + eps), for rewards (P, G) -> (P, G). The standard
    deviation has the divisor G - 1, and eps is 1e-6 [ours], as in veRL, which the paper trained with. A group of equal rewards
    gets exactly zero. ValueError if G < 2. scale_by_std=False gives r_i - mean, the form of LUFFY (with a group of 7 rollouts
    and the demonstration) and HPT [code]."""
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
    """The adaptive weight of the distillation term of each problem [eq 6]:

        alpha(q) = clip( alpha_0 * (p_guide - p_auto + gamma) / (p_auto + gamma), 0, alpha_max )

    p_auto, p_guide: pass rates in [0, 1] of the autonomous and of the guided group, any shape. Large if the policy fails alone
    and succeeds guided, zero if guidance hurts by gamma or more. gamma keeps the division finite at p_auto = 0 and leaves a
    little weight without any gain (0.0455 at 1 and 1).
    """
    alpha = alpha_0 * (p_guide - p_auto + gamma) / (p_auto + gamma)
    return alpha.clamp(0.0, alpha_max)  # [eq 6]


def reachable_target(logprobs: Tensor, correct: Tensor) -> int | None:
    """The index of o+: of the correct guided trajectories the one that the UNGUIDED policy finds most probable [eq 4]. logprobs
    (J,): log pi(õ_j | q), each trajectory's log-probability without the strategy in the prompt, summed over its tokens [eq 4]
    or their mean [ours]. correct (J,) bool. None if no guided trajectory is correct: then there is no distillation term [alg 1,
    lines 14-15]. Ties go to the first [ours]."""
    if not correct.any():
        return None
    return int(logprobs.masked_fill(~correct, float("-inf")).argmax())  # o+ [eq 4]


def reach_gap(logprobs: Sequence[float], correct: Sequence[bool], targets: Sequence[int]) -> float:
    """By how many nats the targets' mean log-probability is above that of all correct ones, a diagnostic; 0 without targets."""
    if not targets:
        return 0.0
    reachable = [logprob for logprob, right in zip(logprobs, correct, strict=True) if right]
    return sum(logprobs[j] for j in targets) / len(targets) - sum(reachable) / len(reachable)


# Ablations: what alpha(q) and o+ are compared with. The fixed weight is 1.0 [app G].


def group_advantage_weight(auto_rewards: Tensor, target_reward: Tensor, alpha_max: float = 0.8) -> Tensor:
    """o+'s own advantage as the weight of the distillation term [eq 8]: rewards (P, G) and (P,) -> (P,).

        alpha(q) = clip( A+, 0, alpha_max ),   A+ = (R(o+) - mean) / (std + eps) in the group { o_1, ..., o_G, o+ }

    It falls as the policy's own pass rate rises, and does not depend on the other guided trajectories.
    """
    group = torch.cat([auto_rewards, target_reward[:, None]], dim=1)  # (P, G + 1)
    return group_advantages(group)[:, -1].clamp(0.0, alpha_max)  # [eq 8]


def guided_advantage_weight(
    auto_rewards: Tensor, guided_rewards: Tensor, alpha_0: float = 0.5, alpha_max: float = 0.8
) -> Tensor:
    """A weight from the advantage of the whole guided group [ours]: rewards (P, G) and (P, J) -> (P,).

        alpha(q) = clip( alpha_0 * mean_j A~_j, 0, alpha_max ),   A~ = the advantages of all G + J rewards as one group
    """
    together = group_advantages(torch.cat([auto_rewards, guided_rewards], dim=1))  # (P, G + J)
    return (alpha_0 * together[:, auto_rewards.shape[1] :].mean(dim=1)).clamp(0.0, alpha_max)


def random_target(correct: Tensor, generator: torch.Generator) -> int | None:
    """The index of one correct guided trajectory, drawn uniformly [ours]: correct (J,) bool. None if there is none."""
    indices = correct.nonzero()[:, 0]
    if not len(indices):
        return None
    return int(indices[torch.randint(len(indices), (), generator=generator)])
