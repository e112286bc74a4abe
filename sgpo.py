r"""SGPO, Strategy-Guided Policy Optimization (arXiv 2606.24064): the method itself. Read this file first.

Algorithm 1, and where its lines are. One call of `sgpo_step` is one pass through it:

    for every problem q with its strategy s:
        sample   o_1 .. o_G1 ~ pi(. | q)  and  õ_1 .. õ_G2 ~ pi(. | q, s), same weights     sample_and_reward
        grade    R(o_i), R(õ_j) in {0, 1}                                                   sample_and_reward
        weigh    A_i = (R(o_i) - mean) / (std + eps)                       [eq 1]           weigh: group_advantages
                 alpha(q) from p_auto and p_guide                          [eq 6]           weigh: instance_weight
        choose   o+ = argmax over the correct õ_j of log pi(õ_j | q)       [eq 4]           choose: reachable_target
    update on L = mean over q of L_GRPO(q) + alpha(q) L_KD^clip(q)         [eq 7]           update
        L_GRPO: the clipped surrogate along the autonomous o_i, [eq 1] but for one mean     backward_policy: loss.policy_loss
            over all tokens of the update where the paper takes each response's first [ours]
        L_KD^clip: 1/|o+| sum_t 1[d_t <= delta] d_t along o+               [eq 5]           backward_distillation
        d_t = KL( sg[pi(. | q, s, o+_<t)] || pi(. | q, o+_<t) )            [eq 3]           loss.forward_kl

A step is called with a model, a tokenizer, an optimizer, settings, a batch and a reward; train.py is the loop around it. The
baselines (GRPO, LUFFY, HPT) are the same step with other parts: METHODS, at the end, has them side by side. A new method is an
entry there with its `weigh`, a per-token loss in loss.py, and a test.

Marks: [eq N] and [alg 1] in the paper; [code] in the public code of a baseline; [ours] the paper is silent or has it otherwise.
Axes: P problems, G autonomous group (8), J guided group (4), M response tokens, D width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from loss import chunked_head, diagnostics, distillation_terms, hpt_loss, luffy_loss, policy_loss, policy_terms, sft_terms
from model import CausalLM
from parallel import all_reduce, apply_gradients, may_step, pad_micro_batches, same_on_all_ranks, whole_model
from rollout import Packed, Trajectory, micro_batches, pack, sample_and_grade, shared_tokens, stream_seed
from weighting import group_advantage_weight, group_advantages, hpt_gate, instance_weight, random_target, reachable_target

# ---------------------------------------------------------------------------------------------------- settings


def knob(default: Any, help: str, choices: Sequence[str] | Callable[[], Sequence[str]] | None = None) -> Any:
    """A setting: a dataclass field that the command line can be built from."""
    return field(default=default, metadata={"help": help, "choices": choices})


def choices_of(spec: Any) -> Sequence[str] | None:
    """The values that a setting may have; None: any of its type."""
    choices = spec.metadata["choices"]
    return choices() if callable(choices) else choices


@dataclass(frozen=True)
class Method:
    """Every setting of a step. The defaults are the paper's unless the line says otherwise. ValueError for no such choice."""

    method: str = knob("sgpo", "what to train with", lambda: tuple(METHODS))
    sampling_seed: int = knob(-1, "seeds the training responses; in train.py -1: as --seed")
    # sampling
    group_auto: int = knob(8, "G1: autonomous trajectories a problem [paper]; with luffy one of them is the solution [code]")
    group_guided: int = knob(4, "G2: guided trajectories a problem [paper]")
    temperature: float = knob(1.0, "sampling temperature in training; the losses use the same [paper]")
    max_new_tokens: int = knob(16384, "longest response in training, in tokens [app E]; cut to the context")
    max_rows: int = knob(256, "responses decoded at once")
    cache_tokens: int = knob(0, "size of the KV cache in tokens; 0: what is needed, on CUDA at most 90 % of the free memory")
    # policy loss
    clip_low: float = knob(0.2, "the ratio is clipped below 1 - this [paper]")
    clip_high: float = knob(0.28, "and above 1 + this [paper]")
    mask_truncated: bool = knob(False, "leave truncated responses out of the policy loss (never out of the group's mean)")
    # distillation
    delta: float = knob(1.0, "tokens with d_t above this are dropped, in nats [paper]; inf: no KL clip")
    alpha_0: float = knob(0.5, "scale of the adaptive weight [paper]")
    gamma: float = knob(0.1, "smoothing of the adaptive weight [paper]")
    alpha_max: float = knob(0.8, "largest adaptive weight [paper]")
    reach: str = knob("sum", "log-probability that ranks the targets: summed [paper] or mean per token", ("sum", "mean"))
    # ablations of sgpo, beside --delta inf
    distill: str = knob("kl", "what pulls towards the target; none: nothing", ("kl", "reverse_kl", "sft", "none"))
    target: str = knob("reachable", "which correct guided trajectory; random [ours]", ("reachable", "random"))
    weight: str = knob("adaptive", "alpha(q); fixed: alpha_0 [ours; 1.0 there]", ("adaptive", "fixed", "group_advantage"))
    autonomous: bool = knob(True, "train on the autonomous group; without it the distillation term is alone")
    # baselines, as their public code has them
    luffy_shaping: float = knob(0.1, "the x + this in LUFFY's shaping of a solution's probabilities x / (x + this) [code]")
    luffy_entropy: float = knob(0.001, "LUFFY's entropy bonus [code]")
    hpt_gate: int = knob(0, "HPT: if at most this many rollouts are right, the solution takes the place of all [code]")
    hpt_sft_weight: float = knob(1.0, "HPT: coefficient of the cross-entropy there; 0.3 for a 1.5B model [code]")
    hpt_max_norm: float = knob(80.0, "HPT: an update with a larger gradient norm is left out [code]")
    # the update
    problems_per_step: int = knob(128, "problems sampled for one step, over all ranks")
    minibatches: int = knob(1, "optimizer updates made from one step's samples")
    max_grad_norm: float = knob(1.0, "the global gradient norm is clipped to this")
    micro_tokens: int = knob(16384, "tokens in one forward and backward pass; changes memory, never the result")
    chunk_tokens: int = knob(256, "tokens per chunk of the language-model head; changes memory, never the result")

    def __post_init__(self) -> None:
        for spec in fields(self):
            choices, value = choices_of(spec), getattr(self, spec.name)
            if choices and value not in choices:
                raise ValueError(f"{spec.name} {value!r}: must be one of {', '.join(choices)}")


# ---------------------------------------------------------------------------------------------------- what a step works on


@dataclass(frozen=True)
class Example:
    """A problem with its prompts, encoded once. guided_ids and solution_ids are None if the run does not use them."""

    problem: Any  # a row of the data, with `solution` for LUFFY; the reward gets it
    auto_ids: list[int]  # the prompt of pi(. | q)
    guided_ids: list[int] | None  # the prompt of pi(. | q, s)
    solution_ids: list[int] | None  # a strong model's solution, with the end-of-sequence token


@dataclass
class ProblemSamples:
    """One problem's trajectories and rewards, and what is decided from them."""

    place: int  # in the step's batch, over all ranks
    example: Example
    auto: list[Trajectory]
    guided: list[Trajectory]
    auto_rewards: list[float]
    guided_rewards: list[float]
    advantages: list[float] = field(default_factory=list)  # A_i, one for each of `auto`
    alpha: float = 0.0  # alpha(q)
    target: int | None = None  # the index of o+ in `guided`
    unguided_logprobs: list[float] = field(default_factory=list)  # log pi(õ_j | q) of each of `guided`
    gated: bool = False  # hpt: the rollouts leave the loss
    solution_advantage: float | None = None  # luffy, and hpt if gated: the solution is in the policy loss


class PolicyItem(NamedTuple):
    """One sequence of the policy loss."""

    trajectory: Trajectory
    advantage: float
    is_solution: bool = False  # in LUFFY and HPT: the strong model's, in the form of a trajectory


# Every pass gathers and reduces on all ranks, so a rank without work passes one made-up token with weight 0.
TOKEN = Trajectory([0], [0], [0.0], finished=True, group=0)
NO_TRAJECTORY = PolicyItem(TOKEN, advantage=0.0)
NO_TARGET = ProblemSamples(0, Example(None, [0], [0], None), [], [TOKEN], [], [], alpha=0.0, target=0)
Reward = Callable[[str, Any], float]  # (response, problem) -> its reward


# ---------------------------------------------------------------------------------------------------- the step


def sgpo_step(
    model: CausalLM,
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    settings: Method,
    batch: Sequence[tuple[int, Example]],
    reward: Reward,
    *,
    step: int,
    learning_rate: float,
    ragged: Callable[[Callable[[], Any]], Any] = lambda work: work(),
) -> tuple[list[dict[str, float]], list[ProblemSamples]]:
    """One step of SGPO [alg 1], or of a baseline: (the metrics of each update, over all ranks; this rank's samples).

    model    on several ranks sharded by parallel.shard. The step changes its weights and the optimizer's moments
    batch    this rank's share of the step's problems, each with its place in the whole batch, below settings.problems_per_step
    reward   (response, problem) -> 1 or 0; above 0 is correct. Called in one thread while other responses are still sampled;
             LUFFY asks it about problem.solution too
    step     with the place it seeds the sampling, so that the result depends neither on earlier steps nor on the ranks
    ragged   calls the work that differs from rank to rank; train.py passes one that SIGTERM cuts short
    """
    with whole_model(model) as policy:
        same_on_all_ranks(policy, model.device)
        samples = ragged(lambda: sample_and_reward(policy, tokenizer, settings, batch, reward, step))
        weigh(settings, samples, reward)
        choose(settings, policy, samples, step)
    minibatches = [[] for _ in range(settings.minibatches)]
    for sample in samples:  # cut by the place in the whole batch: the same on any number of ranks
        minibatches[sample.place * settings.minibatches // settings.problems_per_step].append(sample)
    return [update(model, optimizer, settings, part, learning_rate) for part in minibatches], samples


def sample_and_reward(
    policy: CausalLM, tokenizer: Any, settings: Method, batch: Sequence[tuple[int, Example]], reward: Reward, step: int
) -> list[ProblemSamples]:
    """Sample the autonomous and the guided group of every problem, and grade them."""
    examples = [example for _, example in batch]
    variant = METHODS[settings.method]

    def seeds(kind: str) -> list[int]:
        return [stream_seed(settings.sampling_seed, "sample", kind, step, place) for place, _ in batch]

    # first the autonomous groups of all problems, then their guided groups
    prompts, prompt_seeds = [example.auto_ids for example in examples], seeds("auto")
    counts = [settings.group_auto - variant.solution_in_group] * len(examples)
    if variant.guided:  # both groups in one call: the places that one leaves in the sampler are taken by the other
        prompts += [example.guided_ids for example in examples]
        prompt_seeds += seeds("guided")
        counts += [settings.group_guided] * len(examples)
    groups, rewards = sample_and_grade(
        policy, tokenizer, prompts, lambda row, member, text: float(reward(text, examples[row.group % len(examples)].problem)),
        n=counts, seed=prompt_seeds,
        max_new_tokens=settings.max_new_tokens, max_rows=settings.max_rows, cache_tokens=settings.cache_tokens or None,
        temperature=settings.temperature,
        top_p=1.0,  # [ours; 0.95 there] below 1 the ratio would no longer be that of the policy's own distribution
    )  # fmt: skip
    guided, guided_rewards = (rows[len(examples) :] or [[] for _ in examples] for rows in (groups, rewards))
    return [
        ProblemSamples(place, example, groups[p], guided[p], rewards[p], guided_rewards[p])
        for p, (place, example) in enumerate(batch)
    ]


# ---------------------------------------------------------------------------------------------------- weigh and choose


def weigh(settings: Method, samples: list[ProblemSamples], reward: Reward) -> None:
    """Fill in each problem's advantages, and alpha(q) or the use of its solution, as the method has it."""
    if not samples:
        return  # this rank has no problem in this step
    rewards = torch.tensor([sample.auto_rewards for sample in samples])  # (P, G)
    advantages = METHODS[settings.method].weigh(settings, samples, rewards, reward)  # (P, G); one signature for all methods
    for sample, row in zip(samples, advantages.tolist(), strict=True):
        sample.advantages = row


def weigh_grpo(settings: Method, samples: list[ProblemSamples], rewards: Tensor, reward: Reward) -> Tensor:
    return group_advantages(rewards)  # A_i [eq 1]


def weigh_sgpo(settings: Method, samples: list[ProblemSamples], rewards: Tensor, reward: Reward) -> Tensor:
    guided_rewards = torch.tensor([sample.guided_rewards for sample in samples])  # (P, J)
    p_auto, p_guide = rewards.mean(1), guided_rewards.mean(1)  # (P,)
    alpha = instance_weight(p_auto, p_guide, settings.alpha_0, settings.gamma, settings.alpha_max)  # [eq 6]
    if settings.weight == "group_advantage":
        alpha = group_advantage_weight(rewards, guided_rewards, settings.alpha_0, settings.alpha_max)
    elif settings.weight == "fixed":
        alpha = torch.full_like(p_auto, settings.alpha_0)
    for sample, value in zip(samples, alpha.tolist(), strict=True):
        sample.alpha = value  # also where no õ is correct; there [alg 1] has 0, which without an o+ only the logs can tell
    # A_i [eq 1], of the autonomous group alone; without autonomous GRPO its pass stays, for the diagnostics, without gradient
    return group_advantages(rewards) if settings.autonomous else torch.zeros_like(rewards)


def weigh_luffy(settings: Method, samples: list[ProblemSamples], rewards: Tensor, reward: Reward) -> Tensor:
    """The solution is graded like a rollout and is a member of the group; r - mean over all of them [code]."""
    problems = [sample.example.problem for sample in samples]
    graded = torch.tensor([[float(reward(problem.solution, problem))] for problem in problems])  # (P, 1)
    advantages = group_advantages(torch.cat([rewards, graded], dim=1), scale_by_std=False)  # (P, G + 1)
    for sample, last in zip(samples, advantages[:, -1].tolist(), strict=True):
        sample.solution_advantage = last
    return advantages[:, :-1]


def weigh_hpt(settings: Method, samples: list[ProblemSamples], rewards: Tensor, reward: Reward) -> Tensor:
    """r - mean; a problem that the policy fails at is learnt from its solution instead of its rollouts [code]."""
    for sample, gated in zip(samples, hpt_gate(rewards, settings.hpt_gate).tolist(), strict=True):
        sample.gated, sample.solution_advantage = gated, 1.0 if gated else None  # hpt_loss asks for no advantage there
    return group_advantages(rewards, scale_by_std=False)


def choose(settings: Method, policy: CausalLM, samples: list[ProblemSamples], step: int) -> None:
    """o+ of each problem [eq 4]: of the correct guided trajectories the one that the unguided policy finds most probable."""
    if not METHODS[settings.method].guided:
        return
    for sample, logprobs in zip(samples, unguided_logprobs(settings, policy, samples), strict=True):
        sample.unguided_logprobs = logprobs
        correct = torch.tensor(sample.guided_rewards) > 0  # C = { j : R(õ_j) = 1 }
        if settings.target == "random":
            seed = stream_seed(settings.sampling_seed, "target", step, sample.place)
            sample.target = random_target(correct, torch.Generator().manual_seed(seed))
        else:
            sample.target = reachable_target(torch.tensor(logprobs), correct)


@torch.no_grad()
def unguided_logprobs(settings: Method, policy: CausalLM, samples: list[ProblemSamples]) -> list[list[float]]:
    """log pi(õ_j | q) [eq 4]: each guided trajectory's log-probability without the strategy in the prompt. P lists of J."""
    pairs = [(sample.example.auto_ids, row.response_ids) for sample in samples for row in sample.guided]
    costs, saved = [len(a) + len(b) for a, b in pairs], shared_tokens([context for context, _ in pairs])
    terms = partial(sft_terms, weight=torch.ones((), device=policy.device), temperature=settings.temperature)
    head = partial(chunked_head, terms=terms, chunk_tokens=settings.chunk_tokens)
    scores: list[float] = []
    for indices in micro_batches(costs, settings.micro_tokens, saved):
        packed = pack([pairs[i][0] for i in indices], [pairs[i][1] for i in indices], device=policy.device)
        _, stats = policy(**packed.layout, head=partial(head, inputs=(packed.targets,), at=packed.predict))
        total = torch.zeros(len(indices), device=policy.device).index_add_(0, packed.sequence, stats["logprob"])
        if settings.reach == "mean":
            total = total / torch.bincount(packed.sequence, minlength=len(indices))
        scores += total.tolist()
    J = settings.group_guided
    return [scores[p * J : (p + 1) * J] for p in range(len(samples))]


# ---------------------------------------------------------------------------------------------------- the update

# metrics that are means over tokens, and which; until update divides them they are sums
MEAN_OVER = dict.fromkeys(("entropy", "clip_fraction", "policy_kl"), "own_tokens")
MEAN_OVER |= dict.fromkeys(("kl", "kept"), "target_tokens")


def update(
    model: CausalLM, optimizer: torch.optim.Optimizer, settings: Method, samples: list[ProblemSamples], learning_rate: float
) -> dict[str, float]:
    """One optimizer update on L = L_GRPO + mean over q of alpha(q) L_KD^clip(q) [eq 7]; metrics over all ranks.

    Both divisors are counted over the whole update before any backward pass: policy tokens are weighted 1 / (all response
    tokens) [ours, not eq 1], a target's alpha(q) / (P |o+|) [eq 5, 7] with P all problems, those without a correct õ too.
    """
    policy = policy_items(samples, settings)
    targets = [sample for sample in samples if sample.target is not None and settings.distill != "none"]
    local = {"tokens": sum(len(item.trajectory.response_ids) for item in policy), "problems": len(samples)}
    count = all_reduce(local, model.device)
    sums, worst = backward_policy(model, settings, policy, max(count["tokens"], 1))
    sums |= backward_distillation(model, settings, targets, count["problems"])
    sums = all_reduce(sums, model.device)
    loss = sums["policy_loss"] + sums["distillation_loss"]
    skip_above = METHODS[settings.method].skip_above(settings)
    norm = apply_gradients(model, optimizer, loss, learning_rate, settings.max_grad_norm, skip_above)

    return sums | {
        **{name: sums[name] / max(sums[tokens], 1) for name, tokens in MEAN_OVER.items()},
        **all_reduce(worst, model.device, dist.ReduceOp.MAX),
        "loss": loss,
        "grad_norm": norm,
        "left_out": float(not may_step(loss, norm, skip_above)),
        "not_finite": float(not may_step(loss, norm)),
    }


def policy_items(samples: list[ProblemSamples], settings: Method) -> list[PolicyItem]:
    items = []
    for sample in samples:
        if not sample.gated:
            for trajectory, advantage in zip(sample.auto, sample.advantages, strict=True):
                if trajectory.finished or not settings.mask_truncated:
                    items.append(PolicyItem(trajectory, advantage))
        if sample.solution_advantage is not None:
            prompt, solution = sample.example.auto_ids, sample.example.solution_ids
            written = Trajectory(prompt, solution, [0.0] * len(solution), finished=True, group=0)  # its writer's p is 1 [code]
            items.append(PolicyItem(written, sample.solution_advantage, is_solution=True))
    return items


def backward_policy(
    model: CausalLM, settings: Method, items: list[PolicyItem], tokens: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Accumulate the gradient of the policy loss over micro-batches: (sums, largest values) of this rank's diagnostics.

    pi_old of [eq 1] is the sampler: at temperature 1 and top_p 1 its log-probs are the behaviour's, and no second pass over
    the trajectories is needed [ours]. By what the two computations differ is logged as logprob_error.
    """
    variant, device = METHODS[settings.method], model.device
    bonus = variant.entropy_bonus(settings) if variant.entropy_bonus else 0.0
    terms = partial(policy_terms, loss=variant.loss(settings), temperature=settings.temperature, entropy_bonus=bonus)
    head = partial(chunked_head, terms=terms, chunk_tokens=settings.chunk_tokens)
    sums = dict.fromkeys(("policy_loss", "own_tokens", "solutions", "entropy", "clip_fraction", "policy_kl"), 0.0)
    worst = {"ratio_error": 0.0, "logprob_error": 0.0}
    # a group of equal rewards has no gradient: its tokens are counted and measured, but cost no backward pass [ours]
    moves = [item.advantage != 0 or variant.entropy_bonus is not None for item in items]
    for gradient in (True, False):
        part = [item for item, with_gradient in zip(items, moves, strict=True) if with_gradient == gradient]
        contexts = [item.trajectory.prompt_ids for item in part]
        costs = [len(item.trajectory.prompt_ids) + len(item.trajectory.response_ids) for item in part]
        for indices in pad_micro_batches(micro_batches(costs, settings.micro_tokens, shared_tokens(contexts)), device):
            chosen, weight = ([part[i] for i in indices], 1 / tokens) if indices else ([NO_TRAJECTORY], 0.0)
            packed, old, advantages, solution = policy_inputs(chosen, device)
            inputs = (packed.targets, old, advantages, torch.full_like(old, weight), *[solution] * variant.demonstrates)
            with torch.set_grad_enabled(gradient):
                loss, stats = model(**packed.layout, head=partial(head, inputs=inputs, at=packed.predict))
            if gradient:
                loss.backward()
            if indices:
                sums["policy_loss"] += loss.item()
                sums["solutions"] += sum(item.is_solution for item in chosen)
                found, largest = diagnostics(stats, old, ~solution)  # a solution has no sampler to differ from
                sums |= {name: sums[name] + value for name, value in found.items()}
                worst |= {name: max(worst[name], value) for name, value in largest.items()}
    return sums, worst


def policy_inputs(items: list[PolicyItem], device: torch.device) -> tuple[Packed, Tensor, Tensor, Tensor]:
    """(packed sequences, and per token, (M,) each: log pi_old, the advantage, whether it is a solution's)."""
    rows = [item.trajectory for item in items]
    packed = pack([row.prompt_ids for row in rows], [row.response_ids for row in rows], device=device)
    old = torch.tensor([value for row in rows for value in row.logprobs], device=device)
    advantages = torch.tensor([item.advantage for item in items], device=device)[packed.sequence]  # A_i of its response
    solution = torch.tensor([item.is_solution for item in items], device=device)[packed.sequence]  # by position
    return packed, old, advantages, solution


def backward_distillation(
    model: CausalLM, settings: Method, items: list[ProblemSamples], problems: float
) -> dict[str, float]:
    """Accumulate the gradient of sum over q of alpha(q) / (P |o+|) sum_t 1[d_t <= delta] d_t [eq 5, 7] over micro-batches:
    sums of this rank's diagnostics. `items` have a target.

    Two forwards along the same response tokens: the guided one at the current theta [eq 3], without gradient, kept as hidden
    states; then the unguided one, whose chunks of logits meet the guided ones in the head.
    """
    device, sums = model.device, dict.fromkeys(("distillation_loss", "target_tokens", "kl", "kept"), 0.0)
    terms = partial(distillation_terms, delta=settings.delta, temperature=settings.temperature, objective=settings.distill)
    head = partial(chunked_head, terms=terms, chunk_tokens=settings.chunk_tokens)
    lengths = [len(item.guided[item.target].response_ids) for item in items]
    contexts = [len(item.example.auto_ids) + len(item.example.guided_ids) for item in items]
    costs = [context + 2 * length for context, length in zip(contexts, lengths, strict=True)]
    for indices in pad_micro_batches(micro_batches(costs, settings.micro_tokens), device):
        chosen = [items[i] for i in indices] or [NO_TARGET]
        targets = [item.guided[item.target].response_ids for item in chosen]  # o+ of each
        guided = pack([item.example.guided_ids for item in chosen], targets, device=device)
        unguided = pack([item.example.auto_ids for item in chosen], targets, device=device)  # row m of both: the same token
        with torch.no_grad():
            teacher = model(**guided.layout, head=lambda hidden, _, at=guided.predict: hidden[0, at])  # (M, D)
        weight = [item.alpha / (problems * len(target)) for item, target in zip(chosen, targets, strict=True)]
        inputs = (unguided.targets, torch.tensor(weight, device=device)[unguided.sequence])
        loss, stats = model(**unguided.layout, head=partial(head, inputs=inputs, at=unguided.predict, teacher=teacher))
        loss.backward()
        if indices:
            sums["distillation_loss"] += loss.item()
            sums["target_tokens"] += stats["divergence"].numel()
            sums["kl"] += stats["divergence"].sum().item()
            sums["kept"] += stats["kept"].sum().item()
    return sums


# ---------------------------------------------------------------------------------------------------- the methods


@dataclass(frozen=True)
class Variant:
    """What sets one method apart from the others in a step."""

    needs: tuple[str, ...]  # the fields that every training row must have
    weigh: Callable[..., Tensor] | None = None  # see weigh; None: the method does not sample
    loss: Callable[[Method], Callable[..., tuple[Tensor, ...]]] | None = None  # its per-token policy loss, with its settings
    guided: bool = False  # a guided group is sampled, and o+ chosen from it
    solution_in_group: bool = False  # one member of the group is the strong model's solution
    demonstrates: bool = False  # its loss takes solutions beside trajectories, and is told which tokens are theirs
    entropy_bonus: Callable[[Method], float] | None = None  # it moves every token, those with advantage 0 too
    skip_above: Callable[[Method], float] = lambda m: math.inf  # an update with a larger gradient norm is left out


def clipped(m: Method) -> Callable[..., tuple[Tensor, ...]]:
    return partial(policy_loss, clip_low=m.clip_low, clip_high=m.clip_high)


METHODS = {
    "sgpo": Variant(needs=("strategy",), weigh=weigh_sgpo, loss=clipped, guided=True),
    "grpo": Variant(needs=(), weigh=weigh_grpo, loss=clipped),
    "luffy": Variant(
        needs=("solution",), weigh=weigh_luffy, loss=lambda m: partial(luffy_loss, shaping=m.luffy_shaping),
        solution_in_group=True, demonstrates=True, entropy_bonus=lambda m: m.luffy_entropy,
    ),
    "hpt": Variant(
        needs=("solution",), weigh=weigh_hpt, loss=lambda m: partial(hpt_loss, sft_weight=m.hpt_sft_weight),
        demonstrates=True, skip_above=lambda m: m.hpt_max_norm,
    ),
    "sft": Variant(needs=("solution",)),  # has no step: train.py's supervised stage is all of it
}  # fmt: skip
