"""The methods: the settings of a step, and a table of what sets SGPO, GRPO, hinted GRPO, LUFFY, HPT and SFT apart in it.

sgpo.py is the step. It asks METHODS, at the end of this file, what is sampled, what is decided from the rewards, and which loss
a token gets. A new method is an entry there with its `weigh`, a per-token loss in loss.py, and a test.

Marks: [eq N], [alg 1], [§N], [app X] in the paper (arXiv 2606.24064); [code] in the public code of a baseline; [ours]: silent.
Axes: P problems, G autonomous group (8), J guided group (4).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loss import hpt_loss, luffy_loss, policy_loss
from weighting import group_advantage_weight, group_advantages, guided_advantage_weight, hpt_gate, instance_weight

# ---------------------------------------------------------------------------------------------------- settings


def knob(default: Any, help: str, choices: Sequence[str] | Callable[[], Sequence[str]] | None = None) -> Any:
    """A setting: a dataclass field that the command line can be built from."""
    return field(default=default, metadata={"help": help, "choices": choices})


def choices_of(spec: Any) -> Sequence[str] | None:
    """The values that a setting may have; None: any of its type."""
    choices = spec.metadata["choices"]
    return choices() if callable(choices) else choices


WEIGHTS = ("adaptive", "fixed", "group_advantage", "guided_advantage")


@dataclass(frozen=True)
class Method:
    """Every setting of a step. ValueError for no such choice."""

    method: str = knob("sgpo", "what to train with", lambda: tuple(METHODS))
    sampling_seed: int = knob(-1, "seeds the training responses; in train.py -1: as --seed")
    # sampling
    group_auto: int = knob(8, "G1: autonomous trajectories a problem [alg 1]; with luffy one of them is the solution [code]")
    group_guided: int = knob(4, "G2: guided trajectories a problem [alg 1]")
    temperature: float = knob(1.0, "sampling temperature in training; the losses use the same [app E]")
    top_p: float = knob(0.95, "nucleus that training samples from; the losses are over the full softmax [app E]")
    max_new_tokens: int = knob(16384, "longest response in training, in tokens [app E]; cut to the context")
    max_rows: int = knob(256, "responses decoded at once")
    cache_tokens: int = knob(0, "size of the KV cache in tokens; 0: what is needed, on CUDA at most 90 % of the free memory")
    # policy loss
    aggregate: str = knob(
        "sequence", "mean over each response, group, problem [eq 1], or (luffy, hpt always) all tokens", ("sequence", "token")
    )
    clip_low: float = knob(0.2, "the ratio is clipped below 1 - this [app E]")
    clip_high: float = knob(0.28, "and above 1 + this [app E]")
    mask_truncated: bool = knob(False, "leave truncated responses out of the policy loss (not out of the group's mean) [ours]")
    # distillation
    delta: float = knob(1.0, "tokens with d_t above this are dropped, in nats [eq 5, app E]; inf: no KL clip")
    alpha_0: float = knob(0.5, "scale of the adaptive weight [eq 6, §4.4]")
    gamma: float = knob(0.1, "smoothing of the adaptive weight [eq 6, §4.4]")
    alpha_max: float = knob(0.8, "largest adaptive weight [eq 6, §4.4]")
    reach: str = knob("sum", "log-probability that ranks targets: summed [eq 4] or mean per token [ours]", ("sum", "mean"))
    # ablations of sgpo, beside --delta inf
    distill: str = knob("kl", "what pulls towards the target; none: nothing", ("kl", "reverse_kl", "sft", "none"))
    target: str = knob(
        "reachable", "o+ [eq 4], the mean over all correct ones [eq 2], or a random one [ours]", ("reachable", "all", "random")
    )
    weight: str = knob("adaptive", "alpha(q) [eq 6], 1.0 [app G], [eq 8], or a form of our own [ours]", WEIGHTS)
    autonomous: bool = knob(True, "train on the autonomous group; without it the distillation term is alone")
    # baselines, as their public code has them
    luffy_shaping: float = knob(0.1, "the x + this in LUFFY's shaping of a solution's probabilities x / (x + this) [code]")
    luffy_entropy: float = knob(0.001, "LUFFY's entropy bonus [code]")
    hpt_gate: int = knob(0, "HPT: if at most this many rollouts are right, the solution takes the place of all [code]")
    hpt_sft_weight: float = knob(1.0, "HPT: coefficient of the cross-entropy there; 0.3 for a 1.5B model [code]")
    hpt_max_norm: float = knob(80.0, "HPT: an update with a larger gradient norm is left out [code]")
    # the update
    problems_per_step: int = knob(128, "problems sampled for one step, over all ranks [ours; from the paper's curves]")
    minibatches: int = knob(1, "optimizer updates made from one step's samples [ours]")
    max_grad_norm: float = knob(1.0, "the global gradient norm is clipped to this [ours]")
    micro_tokens: int = knob(16384, "tokens in one forward and backward pass; changes memory, never the result")
    chunk_tokens: int = knob(256, "tokens per chunk of the language-model head; changes memory, never the result")

    def __post_init__(self) -> None:
        for spec in fields(self):
            choices, value = choices_of(spec), getattr(self, spec.name)
            if choices and value not in choices:
                raise ValueError(f"{spec.name} {value!r}: must be one of {', '.join(choices)}")


# ---------------------------------------------------------------------------------------------------- what rewards decide
# Each takes the settings and the rewards of the autonomous groups (P, G), of the guided ones (P, J) and of the solutions (P,),
# None if the method has none. It returns fields of sgpo.ProblemSamples: name -> one value (or row of values) a problem.


def weigh_grpo(m: Method, auto: Tensor, guided: Tensor | None, solution: Tensor | None) -> dict[str, Tensor]:
    return {"advantages": group_advantages(auto)}  # A_i [eq 1]


def weigh_sgpo(m: Method, auto: Tensor, guided: Tensor, solution: Tensor | None) -> dict[str, Tensor]:
    solved = (guided > 0).any(1)  # (P,) C is not empty
    if m.weight == "adaptive":
        alpha = instance_weight(auto.mean(1), guided.mean(1), m.alpha_0, m.gamma, m.alpha_max)  # p_auto, p_guide [eq 6]
    elif m.weight == "fixed":
        alpha = torch.ones(len(auto))  # [app G]
    elif m.weight == "group_advantage":
        alpha = group_advantage_weight(auto, guided.amax(1), m.alpha_max)  # R(o+), of a correct one [eq 8]
    else:
        alpha = guided_advantage_weight(auto, guided, m.alpha_0, m.alpha_max)  # [ours]
    # A_i [eq 1], of the autonomous group alone; without autonomous GRPO its pass stays, for the diagnostics, without gradient
    advantages = group_advantages(auto) if m.autonomous else torch.zeros_like(auto)
    return {"advantages": advantages, "alpha": alpha * solved}  # 0 where no õ is correct [alg 1, lines 14-15]


def weigh_hinted(m: Method, auto: Tensor, guided: Tensor, solution: Tensor | None) -> dict[str, Tensor]:
    """Where the policy fails alone, the guided group takes the place of the autonomous one, on its own prompt (as in SAGE,
    arXiv 2602.03143, and Scaf-GRPO): do hints alone bring the reward's signal back?"""
    fails = (auto <= 0).all(1)  # (P,)
    advantages = {"advantages": group_advantages(auto), "guided_advantages": group_advantages(guided)}
    return advantages | {"use_auto": ~fails, "use_guided": fails}


def weigh_luffy(m: Method, auto: Tensor, guided: Tensor | None, solution: Tensor) -> dict[str, Tensor]:
    """The solution is graded like a rollout and is a member of the group; r - mean over all of them [code]."""
    advantages = group_advantages(torch.cat([auto, solution[:, None]], dim=1), scale_by_std=False)  # (P, G + 1)
    everywhere = torch.ones_like(solution, dtype=torch.bool)
    return {"advantages": advantages[:, :-1], "solution_advantage": advantages[:, -1], "use_solution": everywhere}


def weigh_hpt(m: Method, auto: Tensor, guided: Tensor | None, solution: Tensor | None) -> dict[str, Tensor]:
    """r - mean; a problem that the policy fails at is learnt from its solution instead of its rollouts [code]."""
    gated = hpt_gate(auto, m.hpt_gate)  # (P,)
    return {"advantages": group_advantages(auto, scale_by_std=False), "use_auto": ~gated, "use_solution": gated}


# ---------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Variant:
    """What sets one method apart from the others in a step."""

    needs: tuple[str, ...]  # the fields that every training row must have
    weigh: Callable[..., dict[str, Tensor]] | None = None  # see above; None: the method does not sample
    loss: Callable[[Method], Callable[..., tuple[Tensor, ...]]] | None = None  # its per-token policy loss, with its settings
    guided: bool = False  # a guided group is sampled
    distills: bool = False  # and o+ chosen from it
    solution_in_group: bool = False  # one member of the group is the strong model's solution, graded like the others
    demonstrates: bool = False  # its loss takes solutions beside trajectories, and is told which tokens are theirs
    token_mean: bool = False  # its normaliser is all tokens of the update, whatever --aggregate says
    entropy_bonus: Callable[[Method], float] | None = None  # it moves every token, those with advantage 0 too
    skip_above: Callable[[Method], float] = lambda m: math.inf  # an update with a larger gradient norm is left out


def grpo_loss(m: Method) -> Callable[..., tuple[Tensor, ...]]:
    return partial(policy_loss, clip_low=m.clip_low, clip_high=m.clip_high)


METHODS = {
    "sgpo": Variant(needs=("strategy",), weigh=weigh_sgpo, loss=grpo_loss, guided=True, distills=True),
    "grpo": Variant(needs=(), weigh=weigh_grpo, loss=grpo_loss),
    "hinted": Variant(needs=("strategy",), weigh=weigh_hinted, loss=grpo_loss, guided=True),
    "luffy": Variant(
        needs=("solution",), weigh=weigh_luffy, loss=lambda m: partial(luffy_loss, shaping=m.luffy_shaping),
        solution_in_group=True, demonstrates=True, token_mean=True, entropy_bonus=lambda m: m.luffy_entropy,
    ),
    "hpt": Variant(
        needs=("solution",), weigh=weigh_hpt, loss=lambda m: partial(hpt_loss, sft_weight=m.hpt_sft_weight),
        demonstrates=True, token_mean=True, skip_above=lambda m: m.hpt_max_norm,
    ),
    "sft": Variant(needs=("solution",)),  # has no step: train.py's supervised stage is all of it
}  # fmt: skip


def without_effect(m: Method) -> list[str]:
    """The settings that are not at their default and do nothing to this method."""
    variant, default = METHODS[m.method], Method()
    idle = ["aggregate"] * (variant.weigh is None)
    idle += ["distill", "target", "weight", "autonomous"] * (not variant.distills)
    idle += ["alpha_0"] * (m.weight in ("fixed", "group_advantage")) + ["alpha_max"] * (m.weight == "fixed")
    idle += ["gamma"] * (m.weight != "adaptive")
    return [name for name in idle if getattr(m, name) != getattr(default, name)]
