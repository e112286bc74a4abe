"""The methods: the settings of a step, and a table of how SGPO, GRPO, hinted GRPO, LUFFY, HPT and SFT differ in it.

sgpo.py is the step. It asks METHODS, at the end of this file, what to sample, what to make of the rewards, and which loss to
take. A new method is an entry there, with a function for its advantages, a per-token loss in loss.py, and a test.

Marks: [eq N], [alg 1], [§N], [app X] in the paper (arXiv 2606.24064); [code] in a baseline's public code; [ours]: we chose.
Axes: P problems, G autonomous group (8), J guided group (4).
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loss import hpt_loss, luffy_loss, policy_loss
from weighting import group_advantage_weight, group_advantages, guided_advantage_weight, instance_weight


def knob(default: Any, help: str, choices: Collection[str] | None = None, *, low: float = 0, high: float = math.inf) -> Any:
    """A setting: a dataclass field that train.py makes a flag of. `choices` are its values, None for any of its type. A number
    must be from `low` to `high`."""
    return field(default=default, metadata={"help": help, "choices": choices, "range": (low, high)})


METHODS: dict[str, "Variant"] = {}  # filled at the end of this file
WEIGHTS = ("adaptive", "fixed", "group_advantage", "guided_advantage")


@dataclass(frozen=True)
class Method:
    """Every setting of a step. ValueError for a value that is not among its choices or out of range."""

    method: str = knob("sgpo", "training method", METHODS)
    sampling_seed: int = knob(-1, "seed of the training responses; -1: the same as --seed", low=-1)
    # sampling
    group_auto: int = knob(8, "G1: autonomous responses per problem [alg 1]; luffy: the solution is one of them [code]", low=2)
    group_guided: int = knob(4, "G2: guided responses per problem [alg 1]", low=1)
    temperature: float = knob(1.0, "sampling temperature in training; the losses use it too [app E]", low=1e-3)
    top_p: float = knob(0.95, "top-p (nucleus) sampling in training; losses use the full softmax [app E]", low=1e-3, high=1)
    max_new_tokens: int = knob(16384, "longest response in training, in tokens [app E]; cut to fit the context", low=1)
    max_rows: int = knob(256, "responses decoded at once", low=1)
    cache_tokens: int = knob(0, "size of the KV cache in tokens; 0: what is needed, on CUDA at most 90 % of the free memory")
    # policy loss
    aggregate: str = knob(
        "sequence", "mean per response, group and problem [eq 1], or over all tokens (luffy, hpt)", ("sequence", "token")
    )
    clip_low: float = knob(0.2, "the ratio is clipped below 1 minus this [app E]", high=1)
    clip_high: float = knob(0.28, "the ratio is clipped above 1 plus this [app E]")
    mask_truncated: bool = knob(False, "leave truncated responses out of the policy loss, but not out of their group [ours]")
    # what counts as correct: in C, p_auto and p_guide, and for the gates of hinted and hpt. Advantages use the reward itself
    correct_at: float = knob(1.0, "a reward of at least this makes a response correct, see --reward", low=1e-6, high=1)
    # distillation
    delta: float = knob(1.0, "KL clip: tokens with d_t above this many nats are dropped [eq 5, app E]; inf: none")
    alpha_0: float = knob(0.5, "scale of the adaptive weight [eq 6, §4.4]")
    gamma: float = knob(0.1, "smoothing of the adaptive weight [eq 6, §4.4]", low=1e-6)
    alpha_max: float = knob(0.8, "largest adaptive weight [eq 6, §4.4]")
    reach: str = knob("sum", "log-probability that ranks targets: summed [eq 4] or mean per token [ours]", ("sum", "mean"))
    # ablations of sgpo, beside --delta inf
    distill: str = knob("kl", "distillation loss towards the target; none: no such term", ("kl", "reverse_kl", "sft", "none"))
    target: str = knob(
        "reachable", "o+: one [eq 4], all correct ones [eq 2], or a random one [ours]", ("reachable", "all", "random")
    )
    weight: str = knob(
        "adaptive", "alpha(q): adaptive [eq 6], fixed at 1.0 [app G], group_advantage [eq 8], guided_advantage [ours]", WEIGHTS
    )
    autonomous: bool = knob(True, "train on the autonomous group; without it only the distillation term is left")
    # a baseline, as in its public code
    hpt_gate: int = knob(0, "HPT: with at most this many correct responses, learn from the solution instead [code]")
    hpt_sft_weight: float = knob(1.0, "HPT: coefficient of the solution's cross-entropy; 0.3 for a 1.5B model [code]")
    # the update
    problems_per_step: int = knob(128, "problems in one step, over all GPUs [ours; from the paper's curves]", low=1)
    minibatches: int = knob(1, "optimizer updates per step [ours]", low=1)
    max_grad_norm: float = knob(1.0, "clip the global gradient norm to this [ours]", low=1e-6)
    micro_tokens: int = knob(16384, "tokens in one pass; changes memory, never the result", low=1)
    chunk_tokens: int = knob(256, "tokens per chunk of the head; changes memory, never the result", low=1)

    def __post_init__(self) -> None:
        for spec in fields(self):
            value, choices, (low, high) = getattr(self, spec.name), spec.metadata["choices"], spec.metadata["range"]
            if not isinstance(value, str) and not low <= value <= high:
                raise ValueError(f"{spec.name} {value}: must be from {low:g} to {high:g}")
            if choices and value not in choices:
                raise ValueError(f"{spec.name} {value!r}: must be one of {', '.join(choices)}")
        if self.minibatches > self.problems_per_step:
            raise ValueError(f"minibatches {self.minibatches}: more than the {self.problems_per_step} problems of a step")
        if self.method == "hinted" and self.group_guided < 2:
            raise ValueError("group_guided 1: hinted needs a group of at least 2")
        if self.hpt_gate > self.group_auto:
            raise ValueError(f"hpt_gate {self.hpt_gate}: more than the {self.group_auto} responses of a group")


# Each function takes the settings and the rewards: of the autonomous groups (P, G), the guided groups (P, J) and the solutions
# (P,); None for what the method lacks. It returns fields of sgpo.ProblemSamples: {name: a value, or row of values, a problem}.


def grpo_advantages(m: Method, auto: Tensor, guided: Tensor | None, solution: Tensor | None) -> dict[str, Tensor]:
    return {"advantages": group_advantages(auto)}  # A_i [eq 1]


def sgpo_advantages(m: Method, auto: Tensor, guided: Tensor, solution: Tensor | None) -> dict[str, Tensor]:
    if m.weight == "adaptive":
        p_auto, p_guide = ((rewards >= m.correct_at).float().mean(1) for rewards in (auto, guided))  # [eq 6]
        alpha = instance_weight(p_auto, p_guide, m.alpha_0, m.gamma, m.alpha_max)
    elif m.weight == "fixed":
        alpha = torch.ones(len(auto))  # [app G]
    elif m.weight == "group_advantage":
        alpha = group_advantage_weight(auto, guided.amax(1), m.alpha_max)  # of R(o+) = the largest R(õ_j) [eq 8]
    else:
        alpha = guided_advantage_weight(auto, guided, m.alpha_0, m.alpha_max)  # [ours]
    solved = (guided >= m.correct_at).any(1)  # (P,) C is not empty; else alpha = 0 [alg 1, lines 14-15]
    # without autonomous GRPO the group's pass stays, for the diagnostics; with advantages of 0 it has no gradient
    advantages = group_advantages(auto) if m.autonomous else torch.zeros_like(auto)  # A_i [eq 1]
    return {"advantages": advantages, "alpha": alpha * solved}


def hinted_advantages(m: Method, auto: Tensor, guided: Tensor, solution: Tensor | None) -> dict[str, Tensor]:
    """If the policy fails alone, the guided group replaces the autonomous one, on its own prompt (as in SAGE, arXiv 2602.03143,
    and Scaf-GRPO). It asks whether hints alone bring the reward's signal back."""
    fails = (auto < m.correct_at).all(1)  # (P,)
    advantages = {"advantages": group_advantages(auto), "guided_advantages": group_advantages(guided)}
    return advantages | {"use_auto": ~fails, "use_guided": fails}


def luffy_advantages(m: Method, auto: Tensor, guided: Tensor | None, solution: Tensor) -> dict[str, Tensor]:
    """r - mean, without std, over the group and the solution, which is graded like a response [code]."""
    advantages = group_advantages(torch.cat([auto, solution[:, None]], dim=1), scale_by_std=False)  # (P, G + 1)
    everywhere = torch.ones_like(solution, dtype=torch.bool)
    return {"advantages": advantages[:, :-1], "solution_advantage": advantages[:, -1], "use_solution": everywhere}


def hpt_advantages(m: Method, auto: Tensor, guided: Tensor | None, solution: Tensor | None) -> dict[str, Tensor]:
    """r - mean, without std. If the policy fails, the solution replaces the responses in the loss [code]. It fails with at most
    hpt_gate correct ones, in the public code 0 for Qwen and 2 for Llama."""
    gated = (auto >= m.correct_at).sum(1) <= m.hpt_gate  # (P,)
    return {"advantages": group_advantages(auto, scale_by_std=False), "use_auto": ~gated, "use_solution": gated}


@dataclass(frozen=True)
class Variant:
    """How one method differs from the others in a step."""

    needs: tuple[str, ...]  # fields that every training row must have
    advantages: Callable[..., dict[str, Tensor]] | None = None  # see above; None: the method does not sample
    loss: Callable[[Method], Callable[..., tuple[Tensor, ...]]] | None = None  # its per-token policy loss, with its settings
    guided: bool = False  # it samples a guided group
    distills: bool = False  # and chooses o+ from it
    solution_in_group: bool = False  # one member of the group is the strong model's solution, graded like the others
    demonstrates: bool = False  # its loss is over solutions too, told which tokens are theirs; one mean over all tokens
    entropy_bonus: float = 0.0  # moves every token, also those with advantage 0
    skip_above: float = math.inf  # an update with a larger gradient norm is skipped


def grpo_loss(m: Method) -> Callable[..., tuple[Tensor, ...]]:
    return partial(policy_loss, clip_low=m.clip_low, clip_high=m.clip_high)  # [eq 1]


METHODS |= {
    "sgpo": Variant(needs=("strategy",), advantages=sgpo_advantages, loss=grpo_loss, guided=True, distills=True),
    "grpo": Variant(needs=(), advantages=grpo_advantages, loss=grpo_loss),
    "hinted": Variant(needs=("strategy",), advantages=hinted_advantages, loss=grpo_loss, guided=True),
    "luffy": Variant(
        needs=("solution",),
        advantages=luffy_advantages,
        loss=lambda m: luffy_loss,
        solution_in_group=True,
        demonstrates=True,
        entropy_bonus=0.001,  # [code]
    ),
    "hpt": Variant(
        needs=("solution",),
        advantages=hpt_advantages,
        loss=lambda m: partial(hpt_loss, sft_weight=m.hpt_sft_weight),
        demonstrates=True,
        skip_above=80.0,  # [code]
    ),
    "sft": Variant(needs=("solution",)),  # no step: train.py's supervised stage is all of it
}
