"""One SGPO update against the paper's equations (arXiv 2606.24064), written out a second time and as plainly as possible.

The first half of this file is the reference: transformers' model in float64, one sequence a forward, Python loops over problems,
responses and tokens, sums as they are printed, autograd for the gradient. It imports none of our losses. Read it beside the
paper: the equation's number is at the line. The second half runs `weigh`, `choose` and `update` on the same weights and the same
ragged data, and compares the loss and the gradient that the optimizer is given.

Where the paper leaves a choice it is marked [ours] at the line. Every log-probability is that of the full softmax at the
sampling temperature.
"""

import functools
import math
import random
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from methods import Method
from model import CausalLM, ModelConfig, build_model
from rollout import Trajectory
from sgpo import Example, ProblemSamples, choose, update, weigh

PAPER = dict(
    method="sgpo",
    group_auto=8,  # G1
    group_guided=4,  # G2
    temperature=1.0,
    clip_low=0.2,
    clip_high=0.28,
    delta=1.0,
    alpha_0=0.5,
    gamma=0.1,
    alpha_max=0.8,
    aggregate="sequence",
    target="reachable",
    reach="sum",
    weight="adaptive",
    distill="kl",
    autonomous=True,
    mask_truncated=False,
)
HOW = dict(problems_per_step=6, minibatches=1, max_grad_norm=1e9, micro_tokens=16384, chunk_tokens=256)  # must not matter
TOLERANCE = 5e-5  # relative; ours computes in float32

# ---------------------------------------------------------------------------------------------------- the reference


def log_policy(net, prompt: list[int], response: list[int], temperature: float) -> Tensor:
    """log pi_theta(v | prompt, response_<t) for all t and all tokens v: (|response|, V)."""
    logits = net(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits - logits.exp().sum(-1, keepdim=True).log()


def advantages(rewards: list[float]) -> list[float]:
    """Zero mean and unit variance within the group [§3.2]; unbiased variance and eps 1e-6 [ours]."""
    mean = sum(rewards) / len(rewards)
    variance = sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1)
    return [(r - mean) / (math.sqrt(variance) + 1e-6) for r in rewards]


def policy_terms(net, s, prompt: list[int], group: list[Trajectory], rewards: list[float]) -> list[list[Tensor]]:
    """The summands of eq 1, with the minus sign that makes it a loss: one list a response, one number a token."""
    responses = []
    for o, advantage in zip(group, advantages(rewards), strict=True):
        log_pi = log_policy(net, prompt, o.response_ids, s.temperature)
        terms = []
        for t, token in enumerate(o.response_ids):
            ratio = (log_pi[t, token] - o.logprobs[t]).exp()  # rho_it, against pi_old
            clipped = ratio.clamp(1 - s.clip_low, 1 + s.clip_high)
            terms.append(-torch.minimum(ratio * advantage, clipped * advantage))
        responses.append([] if s.mask_truncated and not o.finished else terms)  # out of the loss, not of the group [ours]
    return responses


def divergences(net, s, example: Example, response: list[int]) -> list[Tensor]:
    """d_t [eq 3] for every token of a guided response: one theta on both sides, the gradient through the unguided one only."""
    unguided = log_policy(net, example.auto_ids, response, s.temperature)
    guided = log_policy(net, example.guided_ids, response, s.temperature).detach()  # sg[.]
    if s.distill == "kl":  # KL(guided || unguided)
        return [(p.exp() * (p - q)).sum() for p, q in zip(guided, unguided, strict=True)]
    if s.distill == "reverse_kl":  # KL(unguided || guided) [app F]; d_t in the mask is this one too [ours]
        return [(q.exp() * (q - p)).sum() for p, q in zip(guided, unguided, strict=True)]
    return [-unguided[t, token] for t, token in enumerate(response)]  # sft


def targets(net, s, sample: ProblemSamples, right: list[int], drawn: int | None) -> list[int]:
    """The guided responses to learn from, out of C = `right`."""
    if s.target == "all":
        return right  # eq 2 averages over C
    if s.target == "random":
        return [drawn]

    def reach(j: int) -> float:  # the summed log pi_theta(o~_j | q), without the strategy
        response = sample.guided[j].response_ids
        log_pi = log_policy(net, sample.example.auto_ids, response, s.temperature)
        return sum(log_pi[t, token].item() for t, token in enumerate(response))

    return [max(right, key=reach)]  # o+ [eq 4]


def alpha(s, sample: ProblemSamples) -> float:
    """The weight of the distillation term."""
    if not any(sample.guided_rewards):
        return 0.0  # C is empty [alg 1, lines 14-15]
    if s.weight == "fixed":
        return 1.0  # [app G]
    if s.weight == "group_advantage":  # of o+ in the group {o_1, ..., o_G1, o+}; R(o+) = 1 [eq 8]
        return min(max(advantages([*sample.auto_rewards, 1.0])[-1], 0.0), s.alpha_max)
    p_auto = sum(sample.auto_rewards) / len(sample.auto_rewards)
    p_guide = sum(sample.guided_rewards) / len(sample.guided_rewards)
    return min(max(s.alpha_0 * (p_guide - p_auto + s.gamma) / (p_auto + s.gamma), 0.0), s.alpha_max)  # [eq 6]


def distillation(net, s, sample: ProblemSamples, drawn: int | None) -> Tensor | float:
    """L_KD(q); zero if no guided response is right [alg 1, lines 14-15]."""
    right = [j for j, reward in enumerate(sample.guided_rewards) if reward == 1]  # C
    if s.distill == "none" or not right:
        return 0.0
    chosen = targets(net, s, sample, right, drawn)
    total = 0.0
    for j in chosen:
        response = sample.guided[j].response_ids
        d = divergences(net, s, sample.example, response)
        kept = [d_t for d_t in d if s.distill == "sft" or d_t <= s.delta]  # w_t = 1[d_t <= delta]; none for SFT [ours]
        total = total + sum(kept) / len(response)  # dropped tokens count in |o+| [eq 5]
    return total / len(chosen)  # a mean only if all of C is taken [eq 2]


def reference_loss(net, s, samples: list[ProblemSamples], drawn: list[int | None]) -> Tensor:
    """L [eq 7]: the mean over the problems of L_GRPO(q) + alpha(q) L_KD(q). `drawn`: the random targets, if s asks for them."""
    per_response, per_token, distilled = torch.tensor(0.0), [], torch.tensor(0.0)
    for sample, index in zip(samples, drawn, strict=True):
        prompt, group, rewards = sample.example.auto_ids, sample.auto, sample.auto_rewards
        if s.method == "hinted" and not any(rewards):  # none right: the guided group takes the place of the autonomous one
            prompt, group, rewards = sample.example.guided_ids, sample.guided, sample.guided_rewards
        if s.autonomous:
            for terms in policy_terms(net, s, prompt, group, rewards):
                if terms:
                    per_response = per_response + sum(terms) / len(terms) / len(group)  # 1/G 1/|o_i| [eq 1]
                    per_token += terms
        if s.method == "sgpo":
            distilled = distilled + alpha(s, sample) * distillation(net, s, sample, index)
    if s.aggregate == "sequence" or not per_token:
        return (per_response + distilled) / len(samples)
    return sum(per_token) / len(per_token) + distilled / len(samples)  # the switch: one mean over all tokens of the update


# ---------------------------------------------------------------------------------------------------- the data

CONFIG = dict(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    eos_token_id=3,
)
SEED = 61  # of the trajectories; test_the_data_has_every_kind says what it was chosen for
REWARDS = (  # (autonomous, guided): every branch of the method
    ([1, 0, 0, 1, 0, 0, 1, 0], [1, 0, 1, 1]),  # alpha 0.5; three right guided responses
    ([0, 0, 0, 0, 0, 0, 0, 0], [0, 1, 1, 0]),  # all equal, so only guidance teaches; alpha cut to 0.8; the group for hinted
    ([0, 1, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0]),  # C is empty
    ([1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1]),  # all equal; alpha 0.0455
    ([0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0]),  # nothing to learn, but one of the P problems
    ([1, 1, 1, 0, 1, 1, 1, 1], [0, 0, 1, 0]),  # alpha cut to 0
)


@functools.cache
def networks() -> tuple[CausalLM, LlamaForCausalLM]:
    """(ours in float32, transformers' in float64) with the same weights, so large that d_t is spread around delta."""
    config = ModelConfig.from_dict({**CONFIG, "model_type": "llama", "rope_theta": 10000.0, "initializer_range": 0.25})
    ours = build_model(config, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device=torch.device("cpu"))
    theirs = LlamaForCausalLM(LlamaConfig(**CONFIG, rope_theta=10000.0, attn_implementation="eager")).double().eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@functools.cache
def trajectories(seed: int, temperature: float) -> list[tuple[Example, list[Trajectory], list[Trajectory]]]:
    """Ragged by design. log pi_old is the current policy's plus noise, so that the clip works on both sides."""
    rng = random.Random(seed)
    _, net = networks()

    def draw(length: int) -> list[int]:
        return [rng.randrange(CONFIG["vocab_size"]) for _ in range(length)]

    def trajectory(prompt: list[int], place: int, finished: bool) -> Trajectory:
        response = draw(rng.randint(1, 16) if finished else 17)
        with torch.no_grad():
            log_pi = log_policy(net, prompt, response, temperature)
        old = [float(log_pi[t, token]) + rng.gauss(0, 0.4) for t, token in enumerate(response)]
        return Trajectory(prompt, response, old, finished, place)

    out = []
    for place, (auto, guided) in enumerate(REWARDS):
        question, strategy = draw(rng.randint(2, 9)), draw(rng.randint(3, 12))
        example = Example(problem=None, auto_ids=question, guided_ids=strategy + question, solution_ids=None)
        groups = (
            [trajectory(prompt, place, finished=i != rewards.index(min(rewards))) for i in range(len(rewards))]
            for prompt, rewards in ((example.auto_ids, auto), (example.guided_ids, guided))
        )
        out.append((example, *groups))
    return out


def problems(temperature: float = 1.0, seed: int = SEED) -> list[ProblemSamples]:
    """Fresh samples: `weigh` and `choose` write into them."""
    return [
        ProblemSamples(place, example, auto, guided, [float(r) for r in rewards[0]], [float(r) for r in rewards[1]])
        for place, ((example, auto, guided), rewards) in enumerate(zip(trajectories(seed, temperature), REWARDS, strict=True))
    ]


# ---------------------------------------------------------------------------------------------------- the comparison


class Recorder(torch.optim.SGD):
    """An optimizer that keeps the gradients it is given and leaves the weights alone."""

    def step(self, closure=None):
        self.gradients = [p.grad.double() for p in self.param_groups[0]["params"]]


def ours(samples: list[ProblemSamples], **changed) -> tuple[float, Tensor]:
    """(loss, gradient in the order of the parameters' names) of our update; fills in the samples."""
    net, _ = networks()
    method = Method(**{**PAPER, **HOW, **changed})
    names, parameters = zip(*sorted(net.named_parameters()), strict=True)
    recorder = Recorder(parameters, lr=1.0)
    weigh(method, samples, reward=None)
    choose(method, net, samples, step=1)
    metrics = update(net, recorder, method, samples, learning_rate=1.0)
    gradient = torch.cat([g.flatten() for g in recorder.gradients])
    assert metrics["grad_norm"] == pytest.approx(float(gradient.norm()), rel=1e-5)  # nothing was clipped
    return metrics["loss"], gradient


@functools.cache
def reference(drawn: tuple[int | None, ...] = (None,) * len(REWARDS), **changed) -> tuple[float, Tensor]:
    """The same two by the first half of this file, on the data of problems()."""
    _, net = networks()
    settings = SimpleNamespace(**{**PAPER, **changed})
    loss = reference_loss(net, settings, problems(settings.temperature), drawn)
    names, parameters = zip(*sorted(net.named_parameters()), strict=True)
    return loss.item(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def difference(a: Tensor, b: Tensor) -> float:
    """Relative to b."""
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("micro_tokens, chunk_tokens", [(24, 3), (16384, 256)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("aggregate", ["sequence", "token"])
def test_update_equals_the_paper(aggregate, temperature, micro_tokens, chunk_tokens):
    changed = dict(aggregate=aggregate, temperature=temperature)
    loss, gradient = ours(problems(temperature), **changed, micro_tokens=micro_tokens, chunk_tokens=chunk_tokens)
    want_loss, want = reference(**changed)
    assert loss == pytest.approx(want_loss, rel=TOLERANCE)
    assert difference(gradient, want) < TOLERANCE


SWITCHES = {
    "mean over C": dict(target="all"),
    "no KL clip": dict(delta=math.inf),
    "no proximal constraint": dict(target="all", delta=math.inf),
    "random target": dict(target="random"),
    "reverse KL": dict(distill="reverse_kl"),
    "SFT on the target": dict(distill="sft"),
    "no distillation": dict(distill="none"),
    "no autonomous group": dict(autonomous=False),
    "fixed weight": dict(weight="fixed"),
    "group-advantage weight": dict(weight="group_advantage"),
    "truncated responses masked": dict(mask_truncated=True),
    "hinted": dict(method="hinted"),
    "hinted, truncated masked": dict(method="hinted", mask_truncated=True),
}


@pytest.mark.parametrize("aggregate", ["sequence", "token"])
@pytest.mark.parametrize("name", SWITCHES)
def test_switch_equals_the_paper(name, aggregate):
    changed = {**SWITCHES[name], "aggregate": aggregate}
    samples = problems()
    loss, gradient = ours(samples, **changed)
    drawn = tuple(sample.target for sample in samples) if name == "random target" else (None,) * len(samples)
    want_loss, want = reference(drawn, **changed)
    assert loss == pytest.approx(want_loss, rel=TOLERANCE)
    assert difference(gradient, want) < TOLERANCE
    assert difference(want, reference(aggregate=aggregate)[1]) > 100 * TOLERANCE  # on this data the switch matters


def test_random_target_is_right():
    samples = problems()
    ours(samples, target="random")
    for sample in samples:
        assert (sample.target is None) == (not any(sample.guided_rewards))
        assert sample.target is None or sample.guided_rewards[sample.target] == 1


@pytest.mark.parametrize("weight", ["adaptive", "fixed", "group_advantage"])
def test_alpha_equals_the_paper(weight):
    """Also where the loss cannot show it: if C is empty."""
    samples = problems()
    weigh(Method(**{**PAPER, **HOW, "weight": weight}), samples, reward=None)
    want = [alpha(SimpleNamespace(**{**PAPER, "weight": weight}), sample) for sample in samples]
    assert [sample.alpha for sample in samples] == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("aggregate", ["sequence", "token"])
def test_parts_of_a_step_add_up_only_with_the_mean_of_each_response(aggregate):
    """The gradients of unequal parts, averaged by their numbers of problems, against the whole step's at the same weights."""
    _, whole = ours(problems(), aggregate=aggregate)
    parts = [problems()[:1], problems()[1:3], problems()[3:]]
    mean = sum(len(part) / len(REWARDS) * ours(part, aggregate=aggregate, minibatches=len(parts))[1] for part in parts)
    if aggregate == "sequence":
        assert difference(mean, whole) < TOLERANCE
    else:  # a token's weight depends on how long the other responses of its part are
        assert difference(mean, whole) > 0.02


@pytest.mark.parametrize("aggregate", ["sequence", "token"])
def test_weight_of_a_response_and_the_lengths_of_others(aggregate):
    """A problem beside another one that teaches nothing: twice the gradient of the two is that of the first alone [eq 7]."""
    first, nothing = problems()[0], REWARDS.index(([0] * 8, [0] * 4))
    _, alone = ours([first], aggregate=aggregate)
    for seed in (1, 2):
        _, gradient = ours([problems()[0], problems(seed=seed)[nothing]], aggregate=aggregate)
        assert (difference(2 * gradient, alone) < TOLERANCE) == (aggregate == "sequence")


# ---------------------------------------------------------------------------------------------------- what the data holds


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@torch.no_grad()
def test_the_data_has_every_kind(temperature):
    """Each rule has something to decide, and nothing lies so near a threshold that rounding decides."""
    _, net = networks()
    s = SimpleNamespace(**{**PAPER, "temperature": temperature})
    samples = problems(temperature)
    kinds, lengths = set(), set()
    for sample in samples:
        for prompt, group, rewards in (
            (sample.example.auto_ids, sample.auto, sample.auto_rewards),
            (sample.example.guided_ids, sample.guided, sample.guided_rewards),
        ):
            for o, advantage in zip(group, advantages(rewards), strict=True):
                lengths.add(len(o.response_ids))
                log_pi = log_policy(net, prompt, o.response_ids, temperature)
                for t, token in enumerate(o.response_ids):
                    ratio = (log_pi[t, token] - o.logprobs[t]).exp().item()
                    assert min(abs(ratio - 0.8), abs(ratio - 1.28)) > 1e-5
                    if group is sample.auto:
                        kinds.add(("low" if ratio < 0.8 else "high" if ratio > 1.28 else "kept", (advantage > 0) - (advantage < 0)))
        assert any(not o.finished for o in sample.auto)
    assert kinds == {(side, sign) for side in ("low", "kept", "high") for sign in (-1, 0, 1)}  # 0: all rewards equal
    assert lengths == set(range(1, 18))

    right = [[j for j, reward in enumerate(sample.guided_rewards) if reward] for sample in samples]
    reachable = [targets(net, s, sample, C, None) if C else [] for sample, C in zip(samples, right, strict=True)]
    assert [] in right and sum(o != C[:1] for o, C in zip(reachable, right, strict=True)) >= 3  # not the first of C
    assert len({alpha(s, sample) for sample in samples}) == 4  # 0, 0.0455, 0.5, 0.8: eq 6 cut on both sides and not cut
    for distill in ("kl", "reverse_kl"):
        s.distill = distill
        for sample, o in zip(samples, reachable, strict=True):
            for j in o:
                d = torch.stack(divergences(net, s, sample.example, sample.guided[j].response_ids))
                assert d.min() < s.delta < d.max()
                assert (d - s.delta).abs().min() > 1e-5
