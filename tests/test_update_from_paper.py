"""One SGPO update against the paper's equations (arXiv 2606.24064), written out a second time as plainly as possible.

The first half is the reference: transformers' model in float64, one sequence a forward, Python loops over problems, responses
and tokens, sums as they are printed, autograd for the gradient. It uses none of our losses. Read it beside the paper: the
equation's number is at the line, [ours] where the paper leaves a choice. Every log-probability is that of the full softmax at
the sampling temperature. The second half compares the loss, and the gradient that the optimizer is given, with those of
`set_advantages`, `choose` and `update` on the same weights and data.
"""

import copy
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
from sgpo import Example, ProblemSamples, choose, set_advantages, update

PAPER = (
    dict(method="sgpo", group_auto=8, group_guided=4, temperature=1.0, aggregate="sequence", mask_truncated=False)
    | dict(clip_low=0.2, clip_high=0.28, delta=1.0, alpha_0=0.5, gamma=0.1, alpha_max=0.8)
    | dict(target="reachable", reach="sum", weight="adaptive", distill="kl", autonomous=True)
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


def ratios(net, prompt: list[int], o: Trajectory, temperature: float) -> list[Tensor]:
    """rho_it = pi_theta / pi_old of every token [eq 1]."""
    log_pi = log_policy(net, prompt, o.response_ids, temperature)
    return [(log_pi[t, token] - o.logprobs[t]).exp() for t, token in enumerate(o.response_ids)]


def policy_terms(net, settings, prompt: list[int], group: list[Trajectory], rewards: list[float]) -> list[list[Tensor]]:
    """The summands of eq 1, with the minus sign that makes it a loss: one list a response, one number a token."""
    responses = []
    for o, A in zip(group, advantages(rewards), strict=True):
        terms = []
        for ratio in ratios(net, prompt, o, settings.temperature):
            terms.append(-torch.minimum(ratio * A, ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high) * A))
        masked = settings.mask_truncated and not o.finished  # out of the loss, not of the group [ours]
        responses.append([] if masked else terms)
    return responses


def divergences(net, settings, example: Example, response: list[int]) -> list[Tensor]:
    """d_t [eq 3] for every token of a guided response: one theta on both sides, the gradient through the unguided one only."""
    unguided = log_policy(net, example.auto_ids, response, settings.temperature)
    guided = log_policy(net, example.guided_ids, response, settings.temperature).detach()  # sg[.]
    if settings.distill == "kl":  # KL(guided || unguided)
        return [(p.exp() * (p - q)).sum() for p, q in zip(guided, unguided, strict=True)]
    if settings.distill == "reverse_kl":  # KL(unguided || guided) [app F]; d_t in the mask is this one too [ours]
        return [(q.exp() * (q - p)).sum() for p, q in zip(guided, unguided, strict=True)]
    return [-unguided[t, token] for t, token in enumerate(response)]  # sft


def targets(net, settings, sample: ProblemSamples, right: list[int], drawn: int | None) -> list[int]:
    """The guided responses to learn from, out of C = `right`."""
    if settings.target == "all":
        return right  # eq 2 averages over C
    if settings.target == "random":
        assert drawn in right
        return [drawn]

    def reach(j: int) -> float:  # the summed log pi_theta(o~_j | q), without the strategy; its mean per token [ours]
        response = sample.guided[j].response_ids
        log_pi = log_policy(net, sample.example.auto_ids, response, settings.temperature)
        total = sum(log_pi[t, token].item() for t, token in enumerate(response))
        return total / len(response) if settings.reach == "mean" else total

    return [max(right, key=reach)]  # o+ [eq 4]


def alpha(settings, sample: ProblemSamples) -> float:
    """The weight of the distillation term."""
    if not any(sample.guided_rewards):
        return 0.0  # C is empty [alg 1, lines 14-15]
    if settings.weight == "fixed":
        return 1.0  # [app G]
    if settings.weight == "group_advantage":  # of o+ in the group {o_1, ..., o_G1, o+}; R(o+) = 1 [eq 8]
        return min(max(advantages([*sample.auto_rewards, 1.0])[-1], 0.0), settings.alpha_max)
    p_auto = sum(sample.auto_rewards) / len(sample.auto_rewards)
    p_guide = sum(sample.guided_rewards) / len(sample.guided_rewards)
    benefit = (p_guide - p_auto + settings.gamma) / (p_auto + settings.gamma)
    return min(max(settings.alpha_0 * benefit, 0.0), settings.alpha_max)  # [eq 6]


def distillation(net, settings, sample: ProblemSamples, drawn: int | None) -> Tensor | float:
    """L_KD(q); zero if no guided response is right [alg 1, lines 14-15]."""
    right = [j for j, reward in enumerate(sample.guided_rewards) if reward == 1]  # C
    if settings.distill == "none" or not right:
        return 0.0
    chosen = targets(net, settings, sample, right, drawn)
    total = 0.0
    for j in chosen:
        response = sample.guided[j].response_ids
        d = divergences(net, settings, sample.example, response)
        delta = math.inf if settings.distill == "sft" else settings.delta  # nothing is masked for SFT [ours]
        kept = [d_t for d_t in d if d_t <= delta]  # w_t = 1[d_t <= delta]
        total = total + sum(kept) / len(response)  # dropped tokens count in |o+| [eq 5]
    return total / len(chosen)  # a mean only if all of C is taken [eq 2]


def paper_loss(net, settings, samples: list[ProblemSamples], drawn: list[int | None]) -> Tensor:
    """L [eq 7]: the mean over the problems of L_GRPO(q) + alpha(q) L_KD(q). `drawn`: the random targets, if asked for."""
    per_response, per_token, distilled = torch.tensor(0.0), [], torch.tensor(0.0)
    for sample, index in zip(samples, drawn, strict=True):
        prompt, group, rewards = sample.example.auto_ids, sample.auto, sample.auto_rewards
        if settings.method == "hinted" and not any(rewards):  # the guided group takes the place of the autonomous one
            prompt, group, rewards = sample.example.guided_ids, sample.guided, sample.guided_rewards
        if settings.autonomous:
            for terms in policy_terms(net, settings, prompt, group, rewards):
                if terms:
                    per_response = per_response + sum(terms) / len(terms) / len(group)  # 1/G 1/|o_i| [eq 1]
                    per_token += terms
        if settings.method == "sgpo":
            distilled = distilled + alpha(settings, sample) * distillation(net, settings, sample, index)
    if settings.aggregate == "sequence" or not per_token:
        return (per_response + distilled) / len(samples)
    return sum(per_token) / len(per_token) + distilled / len(samples)  # the switch: one mean over all tokens of the update


# ---------------------------------------------------------------------------------------------------- the data

CONFIG = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4) | dict(
    num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-6, rope_theta=10000.0
)
SEED = 61  # of the trajectories: with it every switch below changes the gradient
REWARDS = (  # (autonomous, guided): every branch of the method
    ([1, 0, 0, 1, 0, 0, 1, 0], [1, 0, 1, 1]),  # alpha 0.5; three right guided responses
    ([0, 0, 0, 0, 0, 0, 0, 0], [0, 1, 0, 1]),  # all equal, so only guidance teaches; alpha cut to 0.8; the group for hinted
    ([0, 1, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0]),  # C is empty
    ([1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1]),  # all equal; alpha 0.0455
    ([0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0]),  # nothing to learn, but one of the P problems
    ([1, 1, 1, 0, 1, 1, 1, 1], [0, 0, 1, 0]),  # alpha cut to 0
)


@functools.cache
def networks() -> tuple[CausalLM, LlamaForCausalLM]:
    """(ours in float32, transformers' in float64) with the same weights, so large that d_t is spread around delta."""
    config = ModelConfig.from_dict({**CONFIG, "model_type": "llama", "initializer_range": 0.25})
    ours = build_model(config, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device=torch.device("cpu"))
    theirs = LlamaForCausalLM(LlamaConfig(**CONFIG, attn_implementation="eager")).double().eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@functools.cache
def make_problems(temperature: float) -> list[ProblemSamples]:
    """Ragged by design. log pi_old is the current policy's plus noise, so that the clip works on both sides."""
    rng = random.Random(SEED)
    _, net = networks()

    def draw(length: int) -> list[int]:
        return [rng.randrange(CONFIG["vocab_size"]) for _ in range(length)]

    @torch.no_grad()
    def group(prompt: list[int], place: int, rewards: list[float]) -> list[Trajectory]:
        trajectories = []
        for i in range(len(rewards)):
            finished = i != rewards.index(min(rewards))  # the length limit cut one of each group, a wrong one if it has any
            response = draw(rng.randint(1, 16) if finished else 17)
            log_pi = log_policy(net, prompt, response, temperature)
            old = [log_pi[t, token].item() + rng.gauss(0, 0.4) for t, token in enumerate(response)]
            trajectories.append(Trajectory(prompt, response, old, finished, place))
        return trajectories

    samples = []
    for place, (auto, guided) in enumerate(REWARDS):
        question, strategy = draw(rng.randint(2, 9)), draw(rng.randint(3, 12))
        example = Example(problem=None, auto_ids=question, guided_ids=strategy + question, solution_ids=None)
        groups = group(question, place, auto), group(strategy + question, place, guided)
        samples.append(ProblemSamples(place, example, *groups, list(map(float, auto)), list(map(float, guided))))
    return samples


def problems(temperature: float = 1.0) -> list[ProblemSamples]:
    return copy.deepcopy(make_problems(temperature))  # `set_advantages` and `choose` write into them


# ---------------------------------------------------------------------------------------------------- the comparison


def parameters(net) -> list[Tensor]:
    """In the order of their names, which are the same in both networks."""
    return [parameter for _, parameter in sorted(net.named_parameters())]


class Recorder(torch.optim.SGD):
    """An optimizer that keeps the gradients it is given and leaves the weights alone."""

    def step(self, closure=None):
        self.gradients = [p.grad.double() for p in self.param_groups[0]["params"]]


def our_update(samples: list[ProblemSamples], **changed) -> tuple[float, Tensor]:
    """(loss, gradient) of our update; fills in the samples."""
    net, _ = networks()
    method = Method(**{**PAPER, **HOW, **changed})
    recorder = Recorder(parameters(net), lr=1.0)
    set_advantages(method, samples)
    choose(method, net, samples, step=1)
    metrics = update(net, recorder, method, samples, learning_rate=1.0)
    gradient = torch.cat([g.flatten() for g in recorder.gradients])
    assert metrics["grad_norm"] == pytest.approx(float(gradient.norm()), rel=1e-5)  # nothing was clipped
    return metrics["loss"], gradient


@functools.cache
def paper_update(drawn: tuple[int | None, ...] = (None,) * len(REWARDS), **changed) -> tuple[float, Tensor]:
    """The same two by the first half of this file, on the data of problems()."""
    _, net = networks()
    settings = SimpleNamespace(**{**PAPER, **changed})
    loss = paper_loss(net, settings, problems(settings.temperature), drawn)
    return loss.item(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters(net))])


def difference(a: Tensor, b: Tensor) -> float:
    """Relative to b."""
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("micro_tokens, chunk_tokens", [(24, 3), (16384, 256)])
@pytest.mark.parametrize("aggregate, temperature", [("sequence", 1.0), ("token", 0.7)])
def test_update_equals_the_paper(aggregate, temperature, micro_tokens, chunk_tokens):
    changed = dict(aggregate=aggregate, temperature=temperature)
    loss, gradient = our_update(problems(temperature), **changed, micro_tokens=micro_tokens, chunk_tokens=chunk_tokens)
    want_loss, want = paper_update(**changed)
    assert loss == pytest.approx(want_loss, rel=TOLERANCE)
    assert difference(gradient, want) < TOLERANCE


SWITCHES = {
    "mean over C": dict(target="all"),
    "no KL clip": dict(delta=math.inf),
    "random target": dict(target="random"),
    "reach by the mean": dict(reach="mean"),
    "reverse KL": dict(distill="reverse_kl"),
    "SFT on the target": dict(distill="sft"),
    "no distillation": dict(distill="none"),
    "no autonomous group": dict(autonomous=False),
    "fixed weight": dict(weight="fixed"),
    "group-advantage weight": dict(weight="group_advantage", alpha_max=0.6),
    "other adaptive weight": dict(alpha_0=0.4, gamma=0.2, alpha_max=0.6),
    "other clip bounds": dict(clip_low=0.1, clip_high=0.5),
    "truncated responses masked": dict(mask_truncated=True),
    "GRPO": dict(method="grpo"),
    "hinted": dict(method="hinted"),
    "hinted, truncated masked": dict(method="hinted", mask_truncated=True),
}


@pytest.mark.parametrize("how", [{}, {"aggregate": "token", "temperature": 0.7, "micro_tokens": 24, "chunk_tokens": 3}])
@pytest.mark.parametrize("name", SWITCHES)
def test_switch_equals_the_paper(name, how):
    changed = SWITCHES[name] | how
    samples = problems(how.get("temperature", 1.0))
    loss, gradient = our_update(samples, **changed)
    drawn = tuple((sample.targets or [None])[0] for sample in samples) if name == "random target" else (None,) * len(samples)
    want_loss, want = paper_update(drawn, **changed)
    assert loss == pytest.approx(want_loss, rel=TOLERANCE)
    assert difference(gradient, want) < TOLERANCE
    assert difference(want, paper_update(**how)[1]) > 100 * TOLERANCE  # on this data the switch matters


@pytest.mark.parametrize("weight", ["adaptive", "fixed", "group_advantage"])
def test_alpha_equals_the_paper(weight):
    """Also where the loss cannot show it: if C is empty."""
    samples = problems()
    set_advantages(Method(**{**PAPER, **HOW, "weight": weight}), samples)
    want = [alpha(SimpleNamespace(**{**PAPER, "weight": weight}), sample) for sample in samples]
    assert [sample.alpha for sample in samples] == pytest.approx(want, abs=1e-6)
