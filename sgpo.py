r"""SGPO, Strategy-Guided Policy Optimization (arXiv 2606.24064): the method itself. Read this file first.

Algorithm 1, and where its lines are. One call of `sgpo_step` is one pass through it:

    for every problem q with its strategy s:
        sample    o_1 .. o_G1 ~ pi(. | q)  and  õ_1 .. õ_G2 ~ pi(. | q, s), same weights     sample_and_reward
        grade     R(o_i), R(õ_j) in {0, 1}                                                   sample_and_reward
        advantage A_i = (R(o_i) - mean) / (std + eps)                       [eq 1]           methods.sgpo_advantages
        weight    alpha(q) from p_auto and p_guide; 0 if no õ is correct    [eq 6]           weighting.instance_weight
        target    o+ = argmax over the correct õ_j of log pi(õ_j | q)       [eq 4]           choose: reachable_target
    update on L = mean over q of L_GRPO(q) + alpha(q) L_KD^clip(q)          [eq 7]           update
        L_GRPO: 1/G1 sum_i 1/|o_i| sum_t of the clipped surrogate           [eq 1]           backward_policy: loss.policy_loss
        L_KD^clip: 1/|o+| sum_t 1[d_t <= delta] d_t along o+                [eq 5]           backward_distillation
        d_t = KL( sg[pi(. | q, s, o+_<t)] || pi(. | q, o+_<t) )             [eq 3]           loss.forward_kl

A step takes a model, a tokenizer, an optimizer, settings, a batch and a reward; train.py is the loop around it. The settings,
and how the baselines (GRPO, hinted GRPO, LUFFY, HPT) differ in the same step, are in methods.py.

Marks: [eq N], [alg 1], [app X] in the paper; [code] in a baseline's public code; [ours]: the paper is silent, we chose.
Axes: P problems, G autonomous group (8), J guided group (4), M response tokens, D width.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kv_cache import on_device
from loss import chunked_head, diagnostics, distillation_terms, policy_terms, sft_terms
from methods import METHODS, Method
from model import CausalLM
from parallel import all_gather, all_reduce, apply_gradients, loss_scale, may_step, pad_micro_batches, whole_model
from rollout import Trajectory, micro_batches, pack, sample_and_grade, shared_tokens, stream_seed
from weighting import random_target, reach_gap, reachable_target


@dataclass(frozen=True)
class Example:
    """A problem with its prompts, encoded once. guided_ids and solution_ids are None if the run does not use them."""

    problem: Any  # a row of the data; the reward gets it, LUFFY's `solution` is in it
    auto_ids: list[int]  # the prompt of pi(. | q)
    guided_ids: list[int] | None  # the prompt of pi(. | q, s)
    solution_ids: list[int] | None  # the strong model's solution, with the end-of-sequence token


@dataclass
class ProblemSamples:
    """One problem's trajectories and rewards, and what is decided from them."""

    place: int  # in the step's batch, over all ranks
    example: Example
    auto: list[Trajectory]
    guided: list[Trajectory]
    auto_rewards: list[float]
    guided_rewards: list[float]
    # set by methods.METHODS[...].advantages
    advantages: list[float] = field(default_factory=list)  # A_i, one for each of `auto`
    guided_advantages: list[float] = field(default_factory=list)  # hinted: one for each of `guided`
    solution_reward: float = 0.0  # luffy
    solution_advantage: float = 1.0  # luffy; hpt's loss does not use one
    use_auto: bool = True  # the policy loss is over the autonomous group,
    use_guided: bool = False  # over the guided group (hinted),
    use_solution: bool = False  # over the solution (luffy, hpt)
    alpha: float = 0.0  # alpha(q)
    # set by choose
    targets: list[int] = field(default_factory=list)  # o+ as an index into `guided`: none or one; all of C with --target all
    unguided_logprobs: list[float] = field(default_factory=list)  # log pi(õ_j | q) of each of `guided`


class PolicyItem(NamedTuple):
    """One sequence of the policy loss."""

    trajectory: Trajectory
    advantage: float
    group: int = 1  # the size of its problem's group, G1 of [eq 1]
    is_solution: bool = False  # luffy, hpt: the strong model's solution, written as a trajectory


class TargetItem(NamedTuple):
    """One sequence of the distillation loss: o+ with both prompts."""

    auto_ids: list[int]
    guided_ids: list[int]
    response_ids: list[int]
    alpha: float  # alpha(q), divided by the number of targets: 1/|C| [eq 2]


# Every pass gathers and reduces on all ranks, so a rank without work passes one made-up token with weight 0.
TOKEN = Trajectory([0], [0], [0.0], finished=True, group=0)
NO_TRAJECTORY = PolicyItem(TOKEN, advantage=0.0)
NO_TARGET = TargetItem([0], [0], [0], alpha=0.0)
Reward = Callable[[str, Any], float]  # (response, problem) -> its reward


# ---------------------------------------------------------------------------------------------------- the step

def sgpo_step(
    model: CausalLM, tokenizer: Any, optimizer: torch.optim.Optimizer, settings: Method, batch: Sequence[tuple[int, Example]],
    reward: Reward, *, step: int, learning_rate: float, ragged: Callable[[Callable[[], Any]], Any] = lambda work: work(),
) -> tuple[dict[str, float], list[ProblemSamples]]:  # fmt: skip
    """One step of SGPO [alg 1], or of a baseline: (metrics over all ranks, this rank's samples).

    model    its weights change, and the optimizer's moments; on several ranks it is sharded by parallel.shard
    batch    this rank's share of the step's problems, each with its place in the whole batch, below settings.problems_per_step
    reward   (response, problem) -> a number in [0, 1]; from settings.correct_at on it is correct. Called in one thread while
             other responses are still sampled; LUFFY asks it about problem.solution too
    step     with the place it seeds the sampling, so the result depends neither on earlier steps nor on the number of ranks
    ragged   calls the work that differs from rank to rank; train.py passes one that SIGTERM cuts short
    """
    start = time.perf_counter()
    with whole_model(model) as policy:
        samples = ragged(lambda: sample_and_reward(policy, tokenizer, settings, batch, reward, step))
        sampled = time.perf_counter()
        set_advantages(settings, samples)
        choose(settings, policy, samples, step)
    minibatches = [[] for _ in range(settings.minibatches)]
    for sample in samples:  # split by the place in the whole batch, which is the same on any number of ranks
        minibatches[sample.place * settings.minibatches // settings.problems_per_step].append(sample)
    metrics = over_updates([update(model, optimizer, settings, part, learning_rate) for part in minibatches])
    return metrics | describe(settings, samples, model.device) | {"sampling_s": sampled - start}, samples


def sample_and_reward(
    policy: CausalLM, tokenizer: Any, settings: Method, batch: Sequence[tuple[int, Example]], reward: Reward, step: int
) -> list[ProblemSamples]:
    """Sample the autonomous and the guided group of every problem, and grade them."""
    examples = [example for _, example in batch]
    variant = METHODS[settings.method]

    def seeds(kind: str) -> list[int]:
        return [stream_seed(settings.sampling_seed, "sample", kind, step, place) for place, _ in batch]

    prompts, prompt_seeds = [example.auto_ids for example in examples], seeds("auto")
    counts = [settings.group_auto - variant.solution_in_group] * len(examples)
    if variant.guided:  # after all autonomous groups the guided ones; in one call, so that they fill each other's gaps
        prompts += [example.guided_ids for example in examples]
        prompt_seeds += seeds("guided")
        counts += [settings.group_guided] * len(examples)
    groups, rewards = sample_and_grade(
        policy, tokenizer, prompts, lambda row, member, text: float(reward(text, examples[row.group % len(examples)].problem)),
        n=counts, seed=prompt_seeds,
        max_new_tokens=settings.max_new_tokens, max_rows=settings.max_rows, cache_tokens=settings.cache_tokens or None,
        temperature=settings.temperature, top_p=settings.top_p,
    )  # fmt: skip
    guided, guided_rewards = (rows[len(examples) :] or [[] for _ in examples] for rows in (groups, rewards))
    samples = [
        ProblemSamples(place, example, groups[p], guided[p], rewards[p], guided_rewards[p])
        for p, (place, example) in enumerate(batch)
    ]
    for sample in samples if variant.solution_in_group else ():
        sample.solution_reward = float(reward(sample.example.problem.solution, sample.example.problem))
    return samples


# ------------------------------------------------------------------------------------- advantages, weight and target

def set_advantages(settings: Method, samples: list[ProblemSamples]) -> None:
    """Set each problem's advantages, its alpha(q), and what its policy loss is over, by the method's function in METHODS."""
    if not samples:
        return  # this rank has no problem in this step
    variant = METHODS[settings.method]
    auto = torch.tensor([sample.auto_rewards for sample in samples])  # (P, G)
    guided = torch.tensor([sample.guided_rewards for sample in samples]) if variant.guided else None  # (P, J)
    solution = torch.tensor([sample.solution_reward for sample in samples])  # (P,)
    for name, column in variant.advantages(settings, auto, guided, solution).items():
        for sample, value in zip(samples, column.tolist(), strict=True):
            setattr(sample, name, value)


def choose(settings: Method, policy: CausalLM, samples: list[ProblemSamples], step: int) -> None:
    """Set the target o+ of each problem [eq 4]: the correct guided trajectory that is most probable without the strategy."""
    if not METHODS[settings.method].distills:
        return
    for sample, logprobs in zip(samples, unguided_logprobs(settings, policy, samples), strict=True):
        sample.unguided_logprobs = logprobs
        correct = torch.tensor(sample.guided_rewards) >= settings.correct_at  # C = { j : R(õ_j) = 1 }
        if settings.target == "all":
            sample.targets = correct.nonzero()[:, 0].tolist()  # [eq 2]
            continue
        if settings.target == "random":  # [ours]
            seed = stream_seed(settings.sampling_seed, "target", step, sample.place)
            target = random_target(correct, torch.Generator().manual_seed(seed))
        else:
            target = reachable_target(torch.tensor(logprobs), correct)  # [eq 4]
        sample.targets = [] if target is None else [target]  # C is empty: no target [alg 1, lines 14-15]


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
        if settings.reach == "mean":  # [ours]
            total = total / torch.bincount(packed.sequence, minlength=len(indices))
        scores += total.tolist()
    J = settings.group_guided
    return [scores[p * J : (p + 1) * J] for p in range(len(samples))]


# ---------------------------------------------------------------------------------------------------- the update

# metrics that are means over tokens, and the number of those tokens; they are sums until `update` divides them
MEAN_OVER = dict.fromkeys(("entropy", "clip_fraction", "policy_kl", "logprob_error_mean"), "own_tokens")
MEAN_OVER |= dict.fromkeys(("kl", "kept", "kept_kl"), "target_tokens")


def update(
    model: CausalLM, optimizer: torch.optim.Optimizer, settings: Method, samples: list[ProblemSamples], learning_rate: float
) -> dict[str, float]:
    """One optimizer update on L = L_GRPO + mean over q of alpha(q) L_KD^clip(q) [eq 7]. Returns metrics over all ranks. All
    divisors are counted over the whole update before any backward pass. A response's token is weighted 1 / (P G1 |o_i|) [eq 1,
    7], or 1 / (all response tokens) if settings.aggregate is "token"; a target's token alpha(q) / (P |o+|) [eq 5, 7]. P counts
    all problems, also those without a correct õ."""
    policy, targets = policy_items(samples, settings), target_items(samples, settings)
    local = {"tokens": sum(len(item.trajectory.response_ids) for item in policy), "problems": len(samples)}
    count = all_reduce(local, model.device)
    scale = loss_scale(optimizer)
    sums, errors = backward_policy(model, settings, policy, count, scale)
    sums |= backward_distillation(model, settings, targets, count["problems"], scale)
    sums = all_reduce(sums, model.device)
    loss = sums["policy_loss"] + sums["distillation_loss"]  # L [eq 7]
    skip_above = METHODS[settings.method].skip_above
    norm = apply_gradients(model, optimizer, loss, learning_rate, settings.max_grad_norm, skip_above)
    overflow = loss_scale(optimizer) < scale
    return sums | {
        **{name: sums[name] / max(sums[tokens], 1) for name, tokens in MEAN_OVER.items()},
        **largest_errors(errors, int(sums["own_tokens"])),
        "loss": loss,
        "grad_norm": norm,
        "loss_scale": loss_scale(optimizer),
        "overflows": float(overflow),
        "left_out": float(not may_step(loss, norm, skip_above)),
        "not_finite": float(not overflow and not may_step(loss, norm)),
    }


def largest_errors(errors: Tensor, tokens: int) -> dict[str, float]:
    """The 99.9th percentile and the largest of every rank's errors (m,), which are of so many tokens on all ranks. The
    percentile is the smallest value that at most one token in a thousand exceeds."""
    above = tokens // 1000
    mine = errors.topk(min(above + 1, len(errors))).values.tolist()  # no rank has more of those above than all ranks together
    largest = sorted(itertools.chain(*all_gather(mine)), reverse=True) or [0.0]
    return {"logprob_error": largest[0], "logprob_error_p999": largest[above]}


def policy_items(samples: list[ProblemSamples], settings: Method) -> list[PolicyItem]:
    items = []
    for sample in samples:
        group = []
        if sample.use_auto:
            group += [PolicyItem(row, a) for row, a in zip(sample.auto, sample.advantages, strict=True)]
        if sample.use_guided:  # with the strategy in their prompt, as they were sampled
            group += [PolicyItem(row, a) for row, a in zip(sample.guided, sample.guided_advantages, strict=True)]
        if sample.use_solution:
            prompt, solution = sample.example.auto_ids, sample.example.solution_ids
            old = [0.0] * len(solution)  # the strong model's own probability is taken as 1 [code]
            row = Trajectory(prompt, solution, old, finished=True, group=0)
            group.append(PolicyItem(row, sample.solution_advantage, is_solution=True))
        for item in group:
            # a truncated response that is masked still counts in the size of its group [ours]
            if item.trajectory.finished or not settings.mask_truncated:
                items.append(item._replace(group=len(group)))
    return items


def target_items(samples: list[ProblemSamples], settings: Method) -> list[TargetItem]:
    if settings.distill == "none":
        return []
    return [
        TargetItem(s.example.auto_ids, s.example.guided_ids, s.guided[j].response_ids, s.alpha / len(s.targets))
        for s in samples
        for j in s.targets
    ]


def backward_policy(
    model: CausalLM, settings: Method, items: list[PolicyItem], count: dict[str, float], scale: float
) -> tuple[dict[str, float], Tensor]:
    """Accumulate the gradient of the policy loss [eq 1], times `scale`, over micro-batches. Returns sums of this rank's
    diagnostics, and each of its tokens' |log pi - log pi_old|. count: "tokens" and "problems" of the whole update. log pi_old
    is the sampler's own, over the full softmax, so no second pass is needed [ours]. By how much the two computations differ is
    the metric logprob_error."""
    variant, device = METHODS[settings.method], model.device
    bonus = variant.entropy_bonus
    terms = partial(policy_terms, loss=variant.loss(settings), temperature=settings.temperature, entropy_bonus=bonus)
    head = partial(chunked_head, terms=terms, chunk_tokens=settings.chunk_tokens, loss_scale=scale)
    sums = dict.fromkeys("policy_loss own_tokens solutions entropy clip_fraction policy_kl logprob_error_mean".split(), 0.0)
    errors = [torch.zeros(0, device=device)]
    # a group of equal rewards has no gradient: it counts in the divisors and diagnostics, but needs no backward pass [ours]
    moves = [item.advantage != 0 or bonus > 0 for item in items]
    for gradient in (True, False):
        part = [item for item, with_gradient in zip(items, moves, strict=True) if with_gradient == gradient]
        contexts = [item.trajectory.prompt_ids for item in part]
        costs = [len(item.trajectory.prompt_ids) + len(item.trajectory.response_ids) for item in part]
        for indices in pad_micro_batches(micro_batches(costs, settings.micro_tokens, shared_tokens(contexts)), device):
            chosen = [part[i] for i in indices] or [NO_TRAJECTORY]
            weights = [token_weight(settings, item, count) for item in chosen] if indices else [0.0]
            rows = [item.trajectory for item in chosen]
            packed = pack([row.prompt_ids for row in rows], [row.response_ids for row in rows], device=device)
            # one value per token, (M,) each, picked by its sequence
            tensor = partial(on_device, dtype=torch.float32, device=device)
            old = tensor([value for row in rows for value in row.logprobs])  # log pi_old
            advantages = tensor([item.advantage for item in chosen])[packed.sequence]  # A_i
            weight = tensor(weights)[packed.sequence]
            solution = tensor([item.is_solution for item in chosen])[packed.sequence] > 0
            inputs = (packed.targets, old, advantages, weight, *[solution] * variant.demonstrates)
            with torch.set_grad_enabled(gradient):
                loss, stats = model(**packed.layout, head=partial(head, inputs=inputs, at=packed.predict))
            if gradient:
                loss.backward()
            if indices:
                sums["policy_loss"] += loss.detach().double()  # not .item(), here and below: it would wait for the GPU
                sums["solutions"] += sum(item.is_solution for item in chosen)
                found, error = diagnostics(stats, old, ~solution)  # a solution has no sampler to differ from
                sums |= {name: sums[name] + value for name, value in found.items()}
                errors.append(error)
    return sums, torch.cat(errors)


def token_weight(settings: Method, item: PolicyItem, count: dict[str, float]) -> float:
    """What each token's loss is multiplied by."""
    if settings.aggregate == "token" or METHODS[settings.method].demonstrates:
        return 1 / count["tokens"]
    return 1 / (count["problems"] * item.group * len(item.trajectory.response_ids))  # 1 / (P G1 |o_i|) [eq 1, 7]


def backward_distillation(
    model: CausalLM, settings: Method, items: list[TargetItem], problems: float, scale: float
) -> dict[str, float]:
    """Accumulate the gradient of sum over q of alpha(q) / (P |o+|) sum_t 1[d_t <= delta] d_t [eq 5, 7], times `scale`, over
    micro-batches. Returns sums of this rank's diagnostics. There are two forwards over the same response tokens: the guided
    one, at the current theta and without gradient [eq 3], is kept as hidden states; then the head of the unguided one turns
    both into logits, chunk by chunk."""
    device, sums = model.device, dict.fromkeys(("distillation_loss", "target_tokens", "kl", "kept", "kept_kl"), 0.0)
    terms = partial(distillation_terms, delta=settings.delta, temperature=settings.temperature, objective=settings.distill)
    head = partial(chunked_head, terms=terms, chunk_tokens=settings.chunk_tokens, loss_scale=scale)
    costs = [len(item.auto_ids) + len(item.guided_ids) + 2 * len(item.response_ids) for item in items]
    for indices in pad_micro_batches(micro_batches(costs, settings.micro_tokens), device):
        chosen = [items[i] for i in indices] or [NO_TARGET]
        targets = [item.response_ids for item in chosen]  # o+ of each
        guided = pack([item.guided_ids for item in chosen], targets, device=device)
        unguided = pack([item.auto_ids for item in chosen], targets, device=device)  # row m of both: the same token
        with torch.no_grad():
            teacher = model(**guided.layout, head=lambda hidden, _, at=guided.predict: hidden[0, at])  # (M, D), sg[] of [eq 3]
        weight = [item.alpha / (problems * len(item.response_ids)) for item in chosen]  # alpha(q) / (P |o+|) [eq 5, 7]
        inputs = (unguided.targets, on_device(weight, torch.float32, device)[unguided.sequence])
        loss, stats = model(**unguided.layout, head=partial(head, inputs=inputs, at=unguided.predict, teacher=teacher))
        loss.backward()
        if indices:
            sums["distillation_loss"] += loss.detach().double()
            sums["target_tokens"] += stats["divergence"].numel()
            sums["kl"] += stats["divergence"].sum(dtype=torch.float64)
            sums["kept"] += stats["kept"].sum(dtype=torch.float64)
            sums["kept_kl"] += (stats["kept"] * stats["divergence"]).sum(dtype=torch.float64)
    return sums


# ---------------------------------------------------------------------------------------------------- what a step logs

def over_updates(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """The metrics of a step's updates as one. Losses, norm and the share left out are averaged over the updates."""
    total = {name: sum(one[name] for one in updates) for name in updates[0]}
    metrics = {name: value / len(updates) for name, value in total.items()}
    for name, tokens in MEAN_OVER.items():
        metrics[name] = sum(one[name] * one[tokens] for one in updates) / max(total[tokens], 1)
    metrics |= {name: total[name] for name in ("own_tokens", "target_tokens", "solutions", "overflows", "not_finite")}
    metrics |= {name: max(one[name] for one in updates) for name in ("logprob_error", "logprob_error_p999")}
    metrics |= {"loss_scale": updates[-1]["loss_scale"]}
    # at the first update the policy has not moved yet: the ratio differs from 1 only by numerical noise against the sampler
    return metrics | {f"first_{name}": updates[0][name] for name in metrics if name.startswith("logprob_error")}


def describe(settings: Method, samples: list[ProblemSamples], device: torch.device) -> dict[str, float]:
    """Metrics of what was sampled and decided in a step, over all ranks."""
    least = settings.correct_at
    auto = [row for sample in samples for row in sample.auto]
    guided = [row for sample in samples for row in sample.guided]
    local = {
        "problems": len(samples), "auto": len(auto), "guided": len(guided),
        "reward_auto": sum(sum(sample.auto_rewards) for sample in samples),
        "reward_guided": sum(sum(sample.guided_rewards) for sample in samples),
        "alpha": sum(sample.alpha for sample in samples),
        "with_target": sum(bool(sample.targets) for sample in samples),
        "reach_gap": sum(reach_gap(s.unguided_logprobs, [r >= least for r in s.guided_rewards], s.targets) for s in samples),
        "all_right": sum(min(sample.auto_rewards) >= least for sample in samples),
        "all_wrong": sum(max(sample.auto_rewards) < least for sample in samples),
        "truncated": sum(not row.finished for row in auto),
        "length_auto": sum(len(row.response_ids) for row in auto),
        "length_guided": sum(len(row.response_ids) for row in guided),
    }  # fmt: skip
    total = all_reduce(local, device)
    divisors = dict.fromkeys(("alpha", "with_target", "all_right", "all_wrong"), total["problems"])
    divisors |= dict.fromkeys(("reward_auto", "truncated", "length_auto"), total["auto"])
    divisors |= dict.fromkeys(("reward_guided", "length_guided"), max(total["guided"], 1))
    divisors |= {"reach_gap": max(total["with_target"], 1)}
    means = {name: total[name] / divisor for name, divisor in divisors.items()}
    return means | {"sampled_tokens": total["length_auto"] + total["length_guided"]}


def responses_of(sample: ProblemSamples, step: int, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """The records of one problem's trajectories for samples.jsonl."""
    groups = (("auto", sample.auto, sample.auto_rewards, []),)
    groups += (("guided", sample.guided, sample.guided_rewards, sample.unguided_logprobs),)
    for kind, rows, rewards, reach in groups:
        for index, (row, reward) in enumerate(zip(rows, rewards, strict=True)):
            yield {
                "step": step, "id": sample.example.problem.id, "group": kind,
                "target": kind == "guided" and index in sample.targets, "reach": reach[index] if reach else None,
                "reward": reward, "alpha": sample.alpha, "finished": row.finished,
                "text": tokenizer.decode(row.response_ids, skip_special_tokens=True),
            }  # fmt: skip


def step_line(method: str, metrics: dict[str, float], steps: int) -> str:
    """A step in a line, of 100 columns if nothing is wrong, without the figures that the method does not have."""
    m, variant = metrics, METHODS[method]
    parts = [f"step {m['step']}/{steps}", f"reward {m['reward_auto']:.2f}"]
    if variant.guided:
        parts.append(f"guided {m['reward_guided']:.2f}")
    if variant.distills and m["with_target"]:
        # of the tokens, and of their divergence: what the clip drops can be most of it in few of them
        kept = f"kept {m['kept']:.2f}/{m['kept_kl'] / max(m['kl'], 1e-9):.2f}"
        parts += [f"alpha {m['alpha']:.2f}", f"KL {m['kl']:.3f}", kept]
    elif variant.distills:
        parts.append("no guided response is right")
    parts.append(f"entropy {m['entropy']:.2f}")
    parts.append(f"{m['truncated']:.0%} cut off" if m["truncated"] > 0.5 else f"length {m['length_auto']:.0f}")
    parts += [f"{m['grader_timeouts']:.0f} not graded in time"] * (m["grader_timeouts"] > 0)
    parts += [f"overflow, loss scale {m['loss_scale']:g}"] * (m["overflows"] > 0)
    return "  ".join(parts)
