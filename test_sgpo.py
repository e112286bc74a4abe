"""The tests of the method: what a reader of the paper would check. `pytest -q` runs these and those in tests/.

Everything is checked against something that we did not write (transformers' logits, autograd, slow loops), or by hand.
"""

import itertools
import json
import math
from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import kv_cache
import loss as losses
import methods
import model as models
import parallel
import rollout
import sgpo
import strategy as strategy_module
import train
import weighting
from data import tiny_world
from model import ModelConfig, build_model, encode_chat, load_model, save_model
from rollout import Trajectory, generate, micro_batches, pack
from tests.common import (
    CPU,
    FAMILIES,
    PROMPTS,
    STOPS,
    TINY_BASE,
    assert_equal_gradients,
    fake_samples,
    gathered_attention,
    make_run,
    nucleus_logits,
    random_ids,
    read_metrics,
    tiny_rows,
    update,
    varlen_by_loops,
    weights_of,
    write_rows,
)
from tests.conftest import *  # noqa: F403  the fixtures: pytest looks for them here and in tests/, not beside this file

# ---------------------------------------------------------------------------------------------------- model


@torch.no_grad()
def test_logits_equal_transformers(reference):
    theirs, ours, _ = reference
    ids = random_ids(3, 50)  # beyond llama3's original context of 32, where its scaling shows
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


def varlen_of_torch_2_11(q, k, v, q_starts, k_starts, longest_q, longest_k, window_size):
    assert q.shape[1] == k.shape[1]  # it does not document that heads may be shared
    return varlen_by_loops(q, k, v, q_starts, k_starts, longest_q, longest_k, window_size)


@pytest.fixture(params=["sequences", "varlen", "varlen of torch 2.11"])
def packed_way(request, monkeypatch):
    """Packed attention one call a sequence, and in one variable-length call, PyTorch's kernel replaced by a slow loop."""
    if request.param != "sequences":
        loops = varlen_by_loops if request.param == "varlen" else varlen_of_torch_2_11
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", loops)
        monkeypatch.setattr(models, "packed_kernel", lambda *_: models.varlen_kernel())


@torch.no_grad()
def test_a_folder_with_several_files_loads_in_transformers_and_here(reference, tmp_path):
    """With one file, a tokenizer and a chat template: tests/test_tokenizers.py."""
    theirs, ours, _ = reference
    ids = random_ids(1, 9)
    save_model(ours, tiny_world.build_tokenizer(), tmp_path, max_shard_bytes=60_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again, _ = load_model(str(tmp_path), dtype=torch.float32, device="cpu")
    assert torch.equal(again(ids), ours(ids))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(reloaded(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)


def test_loading_in_bf16_keeps_rotary_angles_in_fp32(tmp_path):
    config = ModelConfig.from_dict(FAMILIES["qwen2"].to_dict())
    net = build_model(config, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16, device=CPU)
    assert net.inv_freq.dtype == torch.float32 and net(random_ids(1, 4)).dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------------- rollout


def draw_plainly(logits, uniform, temperature, top_p):
    """(token, its log-probability under the whole softmax): the first token whose cumulative probability exceeds `uniform`."""
    if temperature == 0:
        return int(logits.argmax()), float(torch.log_softmax(logits, -1).max())
    scaled = logits / temperature
    p = torch.softmax(scaled, -1).numpy()
    kept = np.where(nucleus_by_hand(scaled.numpy(), top_p), p, 0)
    token = int(np.argmax(kept.cumsum() > uniform * kept.sum()))
    return token, math.log(p[token])


def sample_plainly(net, prompt, uniforms, *, max_new_tokens, temperature, top_p, eos_ids):
    """The sampler in its plainest form: no cache, no batch, one row, a full forward pass per token."""
    ids, logprobs = list(prompt), []
    for step in range(max_new_tokens):
        logits = net(torch.tensor([ids])).logits[0, -1].double()
        token, logprob = draw_plainly(logits, uniforms[step], temperature, top_p)
        ids.append(token)
        logprobs.append(logprob)
        if token in eos_ids:
            break
    return ids[len(prompt) :], logprobs, token in eos_ids


@pytest.fixture(params=["cpu", "gpu"])
def decode_way(request, monkeypatch):
    """The sampler as on a CPU and as on a GPU (FixedStep, with a slow loop instead of the kernel, and tokens that are read back
    every few steps), over small pages whose memory holds anything before it is written."""
    if request.param == "gpu":
        original = rollout._Sampler.__init__

        def read_late(self, *args):
            original(self, *args)
            self.sync_every = 8

        monkeypatch.setattr(rollout._Sampler, "__init__", read_late)
        monkeypatch.setattr(kv_cache, "decode_kernel", lambda device, head_dim: gathered_attention)
    for module in (kv_cache, rollout):
        monkeypatch.setattr(module, "PAGE", 4)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))


@torch.no_grad()
@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.6, 0.95), (0.0, 1.0)])
@pytest.mark.usefixtures("decode_way")
def test_generate_equals_the_plain_sampler(reference, temperature, top_p):
    theirs, ours, _ = reference
    settings = dict(max_new_tokens=12, temperature=temperature, top_p=top_p, eos_ids=STOPS)
    seeds = [4, 5 + 2**62, -6]  # every bit counts
    groups = generate(ours, PROMPTS, n=3, seed=seeds, **settings)
    finished = 0
    for p, group in enumerate(groups):
        for i, row in enumerate(group):
            key = np.array([seeds[p] % 2**64, i], dtype=np.uint64)
            uniforms = np.random.Generator(np.random.Philox(key=key)).random(12)
            ids, logprobs, done = sample_plainly(theirs, PROMPTS[p], uniforms, **settings)
            assert (row.prompt_ids, row.response_ids, row.finished, row.group) == (PROMPTS[p], ids, done, p)
            assert row.logprobs == pytest.approx(logprobs, abs=1e-3)
            finished += done
    assert 0 < finished < 9 or temperature == 0  # both ways of ending were exercised


DRAWING = dict(temperature=1.0, top_p=1.0, eos_ids=STOPS)


def ids_of(groups):
    return [[row.response_ids for row in group] for group in groups]


@pytest.mark.usefixtures("decode_way")
def test_a_small_cache_makes_rows_wait_and_never_changes_them(small_model, monkeypatch):
    """9 rows of up to 57 tokens in a cache that holds a few: rows wait, are preempted, and end as they would have alone.
    Their pages are freed in any order, and others move into the gaps."""
    settings = dict(n=3, max_new_tokens=50, temperature=1.0, top_p=1.0, eos_ids=(3, 20), seed=[1, 2, 3])
    want = ids_of(generate(small_model, PROMPTS, **settings))
    assert max(len(ids) for group in want for ids in group) == 50
    preempted, original = [], rollout._Sampler.preempt
    monkeypatch.setattr(rollout._Sampler, "preempt", lambda self: (preempted.append(self), original(self)))
    for cache_tokens in (17 * 4, 200 * 4):
        preempted.clear()
        ended = []
        on_row = lambda row, member, ended=ended: ended.append((row, member))  # noqa: E731
        groups = generate(small_model, PROMPTS, cache_tokens=cache_tokens, on_row=on_row, **settings)
        assert bool(preempted) == (cache_tokens == 17 * 4)
        assert ids_of(groups) == want
        assert all(len(row.logprobs) == len(row.response_ids) for group in groups for row in group)
        assert len(ended) == 9 and all(groups[row.group][member] == row for row, member in ended)
    with pytest.raises(ValueError, match="prompt 1 and its longest response need a KV cache of 64 tokens, this one has 60"):
        generate(small_model, PROMPTS, cache_tokens=63, **settings)
    with pytest.raises(RuntimeError, match="all 2 pages"):
        kv_cache.PagedCache(small_model.config, 2, dtype=torch.float32, device=CPU).allocate_prompt(9)


def test_a_long_row_does_not_hold_up_the_others(small_model, monkeypatch):
    """One of two places is taken by a row of 50 tokens; 20 rows of two pass through the other one meanwhile."""
    steps, step = [], rollout._Sampler.step
    monkeypatch.setattr(rollout._Sampler, "step", lambda self: (steps.append(self), step(self)))
    settings = DRAWING | dict(n=1, max_rows=2, seed=range(21), eos_ids=(97,))  # an id that no token has
    generate(small_model, [[5, 6]] * 21, max_new_tokens=[[50], *[[2]] * 20], **settings)
    assert len(steps) == 49  # as many as the long row needs by itself: its first token comes with the prompt


@pytest.mark.usefixtures("decode_way")
def test_each_response_has_its_own_limit(small_model):
    """It is cut to what it would have been with the longest limit, also if rows wait: for the cache, or for a place."""
    limits = [[1, 30, 7], [12, 2, 40], [40, 3, 1]]
    sample = partial(generate, small_model, PROMPTS, n=3, seed=[1, 2, 3], **DRAWING)
    want = ids_of(sample(max_new_tokens=40))
    for group, most in zip(want, limits, strict=True):
        group[:] = [ids[:limit] for ids, limit in zip(group, most, strict=True)]
    for more in ({}, {"cache_tokens": 18 * 4}, {"max_rows": 2}):
        assert ids_of(sample(max_new_tokens=limits, **more)) == want
    small_model.train()
    for row in itertools.chain(*sample(max_new_tokens=1000, eos_ids=(97,))):  # an id that no token has: the context ends them
        assert not row.finished and len(row.prompt_ids) + len(row.response_ids) == 64
    assert small_model.training  # the caller's mode is put back
    small_model.eval()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompts": [[5], []], "seed": [0, 1]}, "prompt 1 has 0 tokens: it must have 1 to 63"),
        ({"prompts": [[5] * 64]}, "prompt 0 has 64 tokens"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"max_rows": 0}, "max_rows=0"),
        ({"n": 2, "max_new_tokens": [[4, 0]]}, r"prompt 0: n=2 and max_new_tokens=\[4, 0\]"),
        ({"seed": [1, 2, 3]}, "zip"),
    ],
)
def test_generate_refuses_bad_settings(small_model, change, message):
    settings = dict(prompts=[[5]], n=1, max_new_tokens=4, seed=[0], **DRAWING)
    with pytest.raises(ValueError, match=message):
        generate(small_model, **settings | change)


def nucleus_by_hand(row, top_p):
    """Which tokens are in the nucleus, in float64 and token by token."""
    p = np.exp(row - row.max())
    p /= p.sum()
    mass = 0.0
    for token in np.argsort(-row, kind="stable"):
        mass += p[token]
        if mass >= top_p:
            break
    return row >= row[token]  # with those exactly as probable as the last


@pytest.mark.parametrize("name", nucleus_logits())
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_nucleus_is_what_a_slow_loop_finds(name, temperature):
    scaled = nucleus_logits()[name].float() / temperature
    log_total = scaled.logsumexp(-1, keepdim=True)
    for top_p in (1e-9, 0.3, 0.8, 0.95):
        want = np.stack([nucleus_by_hand(row, top_p) for row in scaled.double().numpy()])
        assert ((scaled >= rollout.smallest_in_nucleus(scaled, log_total, top_p)).numpy() == want).all()


def test_a_mass_of_exactly_top_p_is_enough():
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    for top_p, smallest in ((0.5, 0.5), (0.75, 0.25)):
        assert rollout.smallest_in_nucleus(logits, torch.zeros(1, 1), top_p).exp().item() == smallest
    certain = torch.tensor([[0.0, -200.0]])
    assert rollout.smallest_in_nucleus(certain, torch.zeros(1, 1), 1.0).item() == 0


@pytest.mark.parametrize("temperature, top_p", [(0.7, 0.9), (0.0, 1.0)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_logit_that_is_not_finite_makes_the_log_probability_so(bad, temperature, top_p):
    """An index out of range would do, on a CPU; on CUDA it ends the process with a message about something else."""
    logits = torch.randn(4, 1100, generator=torch.Generator().manual_seed(0))
    uniform = torch.full((4,), 0.5, dtype=torch.float64)
    want, _ = rollout.sample(logits, uniform, temperature, top_p)
    logits[1] = logits[2, 7] = bad
    logits[3] = -math.inf
    token, logprob = rollout.sample(logits, uniform, temperature, top_p)
    assert logprob.isfinite().tolist() == [True, False, False, False]
    assert token[0] == want[0]
    assert token.min() >= 0 and token.max() < 1100


def test_a_logit_that_is_not_finite_is_an_error_that_says_where(small_model, monkeypatch):
    def spoiled(logits, *args, sample=rollout.sample, **settings):
        return sample(logits.index_fill(1, torch.tensor([5]), math.nan), *args, **settings)

    monkeypatch.setattr(rollout, "sample", spoiled)
    with pytest.raises(RuntimeError, match="prompt 0, token 0 of a response: a logit is nan or inf"):
        generate(small_model, [[3, 4]], n=2, max_new_tokens=4, seed=[0], **DRAWING)


def test_sample_at_the_ends_of_the_unit_interval():
    """Never an impossible token, not even with u = 0 before it or u close to 1 after it. The sum is taken in blocks of 512:
    in the wide rows the first block and the last are impossible."""
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    for width, first, last in ((4, 1, 2), (2048, 513, 1500)):
        logits = torch.full((2, width), -math.inf)
        logits[:, first], logits[:, last] = 0.0, 1.0
        token, logprob = rollout.sample(logits, ends, 1.0, 1.0)
        assert token.tolist() == [first, last]
        torch.testing.assert_close(logprob, torch.log_softmax(torch.tensor([0.0, 1.0]), 0))


def test_pack_computes_a_shared_context_once():
    contexts = [[1, 2, 3], [1, 2, 3], [1, 2, 3], [4, 5], [1, 2, 3]]
    responses = [[6, 7, 8], [9], [10, 11], [12, 13], [14, 15]]
    packed = pack(contexts, responses, device=CPU)
    assert packed.input_ids[0].tolist() == [1, 2, 3, 6, 7, 10, 4, 5, 12, 1, 2, 3, 14]
    assert packed.lengths == [3, 2, 1, 3, 4]
    assert packed.prefixes == [None, 0, 0, None, None]
    assert packed.targets.tolist() == list(range(6, 16))
    assert packed.predict.tolist() == [2, 3, 4, 2, 2, 5, 7, 8, 11, 12]
    assert packed.sequence.tolist() == [0, 0, 0, 1, 2, 2, 3, 3, 4, 4]


def test_micro_batches_cover_every_item_once_and_in_order():
    assert micro_batches([3, 3, 3, 9, 1, 1], 6) == [[0, 1], [2], [3], [4, 5]]
    assert micro_batches([], 6) == []
    saved = rollout.shared_tokens([[1, 2, 3], [1, 2, 3], [1, 2, 3], [4, 5, 6]])
    assert saved == [0, 3, 3, 0]
    assert micro_batches([6, 4, 5, 4], 9, saved) == [[0, 1, 2], [3]]
    assert micro_batches([6, 4, 5, 4], 8, saved) == [[0, 1], [2], [3]]


@pytest.mark.usefixtures("packed_way")
def test_sequences_that_share_a_context_equal_transformers_and_its_gradient(reference):
    """Logits and weight gradients of a packed row whose responses share their contexts, against a sequence at a time."""
    theirs, ours, _ = reference
    first, second = random_ids(1, 7, 1)[0].tolist(), random_ids(1, 3, 2)[0].tolist()
    contexts = [first] * 3 + [second] * 2 + [first, [15]]
    responses = [random_ids(1, n, 10 + n)[0].tolist() for n in (5, 1, 9, 2, 4, 3, 1)]
    packed = pack(contexts, responses, device=CPU)
    logits = ours(**packed.layout)[0, packed.predict]
    want = []
    for context, response in zip(contexts, responses, strict=True):
        alone = theirs(torch.tensor([context + response])).logits[0]
        want.append(alone[len(context) - 1 : -1])
    want = torch.cat(want)
    torch.testing.assert_close(logits, want, atol=1e-4, rtol=1e-4)
    lone = pack(contexts[4:], responses[4:], device=CPU)  # of these no two share one
    torch.testing.assert_close(ours(**lone.layout)[0, lone.predict], want[-len(lone.targets) :], atol=1e-4, rtol=1e-4)
    for net, values in ((theirs, want), (ours, logits)):
        net.zero_grad()
        F.cross_entropy(values, packed.targets).backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("contexts, responses", [([[1]], [[]]), ([[]], [[1]])])
def test_pack_refuses_an_empty_sequence(contexts, responses):
    with pytest.raises(ValueError, match="sequence 0"):
        pack(contexts, responses, device=CPU)


# ---------------------------------------------------------------------------------------------------- loss


def test_forward_kl_sees_the_whole_vocabulary_in_fp32():
    """Mass moved to a token far outside any top-k of the unguided side counts; bf16 logits are summed in fp32."""
    unguided = torch.zeros(1, 50_000, dtype=torch.bfloat16)
    guided = unguided.clone()
    guided[0, 49_999] = 8.0  # e^8 = 2,981 against 49,999 others
    p = math.exp(8) / (math.exp(8) + 49_999)
    want = p * math.log(p * 50_000) + (1 - p) * math.log((1 - p) / 49_999 * 50_000)
    guided.requires_grad_()
    unguided.requires_grad_()
    forward, reverse = (kl(guided, unguided).sum() for kl in (losses.forward_kl, losses.reverse_kl))
    assert forward.item() == pytest.approx(want, rel=1e-3)
    (forward + reverse).backward()
    assert guided.grad is None  # it is the teacher


def test_kl_clip_drops_tokens_and_never_clamps():
    d = torch.tensor([0.2, 1.0, 1.0001, 5.0], requires_grad=True)
    mask = losses.kl_clip_mask(d, delta=1.0)
    assert mask.tolist() == [1, 1, 0, 0]
    (mask * d).sum().backward()
    assert d.grad.tolist() == [1, 1, 0, 0]


def test_policy_loss_on_both_sides_of_both_clips():
    """Ratios 0.4, 0.9, 1.2, 1.5 with A = +2, then A = -2; clip to [0.8, 1.28]; worked out by hand."""
    ratio = torch.tensor([0.4, 0.9, 1.2, 1.5] * 2)
    advantage = torch.tensor([2.0] * 4 + [-2.0] * 4)
    old = torch.full((8,), -1.0)
    new = (old + ratio.log()).requires_grad_()
    loss, got_ratio, clipped = losses.policy_loss(new, old, advantage)
    want = torch.tensor([-0.8, -1.8, -2.4, -2.56, 1.6, 1.8, 2.4, 3.0])
    torch.testing.assert_close(loss, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got_ratio, ratio, atol=1e-5, rtol=1e-5)
    assert clipped.nonzero()[:, 0].tolist() == [3, 4]
    loss.sum().backward()
    want_grad = torch.where(clipped, 0.0, -advantage * ratio)  # d(-r A) / d logp = -r A where no clip holds
    torch.testing.assert_close(new.grad, want_grad, atol=1e-5, rtol=1e-5)
    stats = {"ratio": got_ratio, "logprob": new.detach(), "entropy": ratio, "clipped": clipped}
    _, errors = losses.diagnostics(stats, old, ratio < 1.3)
    want = torch.tensor([0.9163, 0.1054, 0.1823, 0.0] * 2)  # 0: not chosen
    torch.testing.assert_close(errors, want, atol=1e-4, rtol=0)


SFT_TERMS = partial(losses.sft_terms, temperature=0.9)
POLICY_TERMS = partial(losses.policy_terms, temperature=0.9)
DISTILLATION_TERMS = partial(losses.distillation_terms, delta=1.0, temperature=0.9)
ALL_TERMS = {
    "sft": SFT_TERMS,
    "grpo": partial(POLICY_TERMS, loss=losses.policy_loss),
    "luffy": partial(POLICY_TERMS, loss=losses.luffy_loss, entropy_bonus=0.05),
    "hpt": partial(POLICY_TERMS, loss=losses.hpt_loss),
    "kl": DISTILLATION_TERMS,
    "reverse_kl": partial(DISTILLATION_TERMS, objective="reverse_kl"),
    "target_sft": partial(DISTILLATION_TERMS, objective="sft"),
}


@pytest.mark.parametrize("kind", ALL_TERMS)
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunked_head_equals_the_unchunked_value_and_gradient(kind, chunk):
    """Against the same terms of all logits at once, and autograd."""
    M, D, V = 23, 16, 101
    terms = ALL_TERMS[kind]
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    hidden = normal(M, D).requires_grad_()
    head = (0.5 * normal(V, D)).requires_grad_()
    teacher = hidden.detach() + 0.7 * normal(M, D)
    targets, weight = torch.arange(M) * 4 % V, normal(M).sigmoid()
    old, advantages = -normal(M).abs() - 3, normal(M)
    demonstration = normal(M) < 0
    inputs = [targets, weight]
    if terms.func is losses.policy_terms:
        inputs = [targets, old, advantages, weight]
    if kind in ("luffy", "hpt"):
        inputs.append(demonstration)
    distills = terms.func is losses.distillation_terms
    teacher_logits = [teacher @ head.detach().T] if distills else []
    want_stats = terms(hidden @ head.T, *teacher_logits, *inputs)
    want = 3 * want_stats["loss"].sum()
    want_gradients = torch.autograd.grad(want, (hidden, head))
    if kind in ("luffy", "hpt"):
        old.masked_fill_(demonstration, 7.0)  # of a demonstration it is ignored
    before = [x.detach().clone() for x in (hidden, head, *inputs)]

    row, at = hidden, None
    if chunk == 7:  # as a packed row, in another order, of which some positions predict nothing
        at = torch.randperm(2 * M)[:M]
        row = torch.zeros(1, 2 * M, D).index_copy(1, at, hidden[None])
    options = dict(chunk_tokens=chunk, at=at, teacher=teacher if distills else None)
    loss, stats = losses.chunked_head(row, head, terms, inputs, **options)
    got = 3 * loss
    got.backward()
    torch.testing.assert_close([got, hidden.grad, head.grad], [want, *want_gradients], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stats, want_stats, atol=1e-5, rtol=1e-5)
    if distills:
        assert len(want_stats["kept"].unique()) == (1 if kind == "target_sft" else 2)  # some tokens are dropped
    for x, old in zip((hidden, head, *inputs), before, strict=True):
        assert torch.equal(x, old)  # no argument was written to


def test_chunked_head_without_gradient_and_without_tokens():
    hidden = torch.randn(5, 4, requires_grad=True)
    head = torch.randn(9, 4, requires_grad=True)
    inputs = (torch.arange(5), torch.ones(5))
    with torch.no_grad():
        value, stats = losses.chunked_head(hidden, head, SFT_TERMS, inputs, chunk_tokens=2)
    assert not value.requires_grad and stats["logprob"].shape == (5,)
    loss, stats = losses.chunked_head(hidden[:0], head, SFT_TERMS, [x[:0] for x in inputs], chunk_tokens=2)
    loss.backward()  # an empty micro-batch still takes part in the backward pass
    assert loss.item() == 0 and head.grad.abs().sum() == 0
    loss, _ = losses.chunked_head(hidden, head, SFT_TERMS, inputs, chunk_tokens=2)
    loss.backward(retain_graph=True)
    with pytest.raises(TypeError):  # its gradients were scaled in place
        loss.backward()


# ---------------------------------------------------------------------------------------------------- weighting


def test_the_guided_groups_weight_by_hand():
    """Of all six rewards the mean is 2/3 and the variance 4/15. The paper's weights: tests/test_update_from_paper.py."""
    auto = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0] * 4, [1.0] * 4])
    guided = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    right = (1 / 3) / math.sqrt(4 / 15)
    for settings, alpha in ({}, 0.5 * right), ({"alpha_0": 0.9}, 0.9 * right), ({"alpha_max": 0.3}, 0.3):
        method = methods.Method(weight="guided_advantage", **settings)
        got = methods.sgpo_advantages(method, auto, guided, None)["alpha"]
        assert got.tolist() == pytest.approx([alpha, 0, 0], abs=1e-5)  # in the last one guidance hurts


def test_reachable_target_is_the_most_probable_correct_one():
    logprobs = torch.tensor([-3.0, -9.0, -4.0, -4.0])
    wrong_first = torch.tensor([False, True, True, True])
    assert weighting.reachable_target(logprobs, wrong_first) == 2  # the first of two equal ones
    assert weighting.reachable_target(logprobs, torch.tensor([False] * 4)) is None
    assert weighting.reachable_target(logprobs, torch.tensor([True] * 4)) == 0  # no argument was written to


# ---------------------------------------------------------------------------------------------------- training


def draw_samples(run, batch, step=1):
    with parallel.whole_model(run.model) as policy:
        return sgpo.sample_and_reward(policy, run.tokenizer, run.cfg, batch, run.worker.reward, step)


def decide(run, samples):
    """Advantages, weight and target, as a step sets them."""
    sgpo.set_advantages(run.cfg, samples)
    with parallel.whole_model(run.model) as policy:
        sgpo.choose(run.cfg, policy, samples, step=1)


def gradients_of(run, samples, monkeypatch):
    """({name: gradient}, metrics) of one update, without taking the step."""
    monkeypatch.setattr(sgpo, "apply_gradients", lambda *_: 0.0)
    run.model.zero_grad()
    metrics = update(run, samples, 0.0)
    gradients = {name: parallel.whole_tensor(parameter.grad).clone() for name, parameter in run.model.named_parameters()}
    return gradients, metrics


def their_log_policy(theirs, context, response, temperature=0.7):
    """By transformers, for each position of the response: log-probabilities of all tokens, (M, V), and of its own one, (M,)."""
    logits = theirs(torch.tensor([context + response])).logits[0, len(context) - 1 : -1]
    logp = torch.log_softmax(logits / temperature, -1)
    return logp, logp.gather(-1, torch.tensor(response)[:, None])[:, 0]


@pytest.mark.parametrize("distill", ["kl", "reverse_kl"])
def test_what_an_update_logs_by_transformers_and_a_slow_loop(distill, tmp_path, worker, monkeypatch):
    """Its loss and gradient: tests/test_update_from_paper.py. delta = 0.02: made-up responses diverge little."""
    run, examples = make_run(tmp_path, worker, "--delta", 0.02, "--distill", distill, "--temperature", 0.7)
    samples = fake_samples(run, examples)
    samples[1].advantages = [0.0] * 8  # without a gradient, and measured like the others
    _, metrics = gradients_of(run, samples, monkeypatch)

    theirs = AutoModelForCausalLM.from_pretrained(TINY_BASE)
    log_policy = torch.no_grad()(partial(their_log_policy, theirs))
    rho, advantages, entropies, divergences = [], [], [], []
    for sample in samples:
        for row, advantage in zip(sample.auto, sample.advantages, strict=True):
            logp, own = log_policy(row.prompt_ids, row.response_ids)
            entropies += (-logp.exp() * logp).sum(-1).tolist()
            rho += torch.exp(own - torch.tensor(row.logprobs)).tolist()
            advantages += [advantage] * len(own)
        for j in sample.targets:
            response = sample.guided[j].response_ids
            log_q, _ = log_policy(sample.example.auto_ids, response)
            log_p, _ = log_policy(sample.example.guided_ids, response)
            if distill == "reverse_kl":
                log_p, log_q = log_q, log_p
            divergences += (log_p.exp() * (log_p - log_q)).sum(-1).tolist()

    kept = [d <= 0.02 for d in divergences]
    clipped = [a > 0 and r > 1.28 or a < 0 and r < 0.8 for r, a in zip(rho, advantages, strict=True)]
    assert 0.05 < metrics["clip_fraction"] < 0.95 and 0.05 < metrics["kept"] < 0.95  # both kinds
    want = {
        "entropy": np.mean(entropies),
        "clip_fraction": np.mean(clipped),
        "policy_kl": np.mean([r - 1 - math.log(r) for r in rho]),
        "logprob_error_mean": np.mean([abs(math.log(r)) for r in rho]),
        "logprob_error_p999": max(abs(math.log(r)) for r in rho),  # of fewer than 1,000 tokens
        "logprob_error": max(abs(math.log(r)) for r in rho),
        "kl": np.mean(divergences),
        "kept": np.mean(kept),
        "kept_kl": np.mean([d * (d <= 0.02) for d in divergences]),
        "own_tokens": len(rho),
        "target_tokens": len(divergences),
    }
    assert {name: metrics[name] for name in want} == pytest.approx(want, rel=1e-3)


def test_luffy_update_equals_its_formula_by_transformers_and_autograd(tmp_path, worker, monkeypatch):
    """7 rollouts and the solution a problem, graded alike, r - mean, no clip, shaping, one token mean over all of it. A cut
    rollout is masked, but counts in the mean; a solution is never masked."""
    run, examples = make_run(tmp_path, worker, "--method", "luffy", "--temperature", 0.7, "--mask_truncated")
    run.cfg = replace(run.cfg, aggregate="sequence")  # does nothing to it
    wrong = replace(examples[1].problem, solution="So it is \\boxed{no}.")
    examples[1] = replace(examples[1], problem=wrong)  # the verifier rejects it: its tokens are pushed down
    samples = fake_samples(run, examples)
    for sample in samples:
        del sample.auto[7:], sample.auto_rewards[7:], sample.guided[:], sample.guided_rewards[:], sample.targets[:]
    samples[2].auto_rewards = [1.0] * 7  # with a right solution, a group of equal rewards
    for index, drawn in enumerate(draw_samples(run, list(enumerate(examples[:4])))):
        samples[index].solution_reward = drawn.solution_reward
    decide(run, samples)
    got, metrics = gradients_of(run, samples, monkeypatch)

    theirs = AutoModelForCausalLM.from_pretrained(TINY_BASE)
    terms, entropies, errors = [], [], []
    for index, sample in enumerate(samples):
        solution = float(index != 1)
        mean = (sum(sample.auto_rewards) + solution) / 8
        for row, reward in zip(sample.auto, sample.auto_rewards, strict=True):
            if not row.finished:
                continue
            logp, own = their_log_policy(theirs, row.prompt_ids, row.response_ids)
            entropy = -(logp.exp() * logp).sum(-1)
            terms.append(-(reward - mean) * torch.exp(own - torch.tensor(row.logprobs)) - 0.001 * entropy)
            entropies += entropy.tolist()
            errors += (own - torch.tensor(row.logprobs)).abs().tolist()
        logp, own = their_log_policy(theirs, sample.example.auto_ids, sample.example.solution_ids)
        entropy, pi = -(logp.exp() * logp).sum(-1), own.exp()
        terms.append(-(solution - mean) * pi / (pi + 0.1) - 0.001 * entropy)
    loss = torch.cat(terms).mean()
    loss.backward()

    assert_equal_gradients(got, {name: p.grad for name, p in theirs.named_parameters() if name in got}, 1e-4)
    assert metrics["policy_loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert metrics["solutions"] == 4
    assert metrics["entropy"] == pytest.approx(np.mean(entropies), rel=1e-4)  # of the policy's own tokens
    assert metrics["logprob_error"] == pytest.approx(max(errors), rel=1e-3)
    assert samples[1].solution_advantage < 0 < samples[0].solution_advantage
    assert samples[2].solution_advantage == 0


def test_hpt_update_equals_its_formula_by_transformers_and_autograd(tmp_path, worker, monkeypatch):
    """At most `gate` right: all 8 rollouts give way to the solution; else r - mean without clip; one token mean over both."""
    flags = ["--method", "hpt", "--hpt_gate", 1, "--hpt_sft_weight", 0.3, "--temperature", 0.7, "--recompute"]
    run, examples = make_run(tmp_path, worker, *flags)
    samples = fake_samples(run, examples)
    for sample, right in zip(samples, (0, 1, 2, 8), strict=True):
        sample.auto_rewards = [1.0] * right + [0.0] * (8 - right)
        sample.targets = []
    decide(run, samples)
    assert [sample.use_solution for sample in samples] == [True, True, False, False]
    got, metrics = gradients_of(run, samples, monkeypatch)

    theirs = AutoModelForCausalLM.from_pretrained(TINY_BASE)
    examples = [sample.example for sample in samples[:2]]
    terms = [-0.3 * their_log_policy(theirs, one.auto_ids, one.solution_ids)[1] for one in examples]
    for sample, mean in zip(samples[2:], (0.25, 1.0), strict=True):
        for row, reward in zip(sample.auto, sample.auto_rewards, strict=True):
            _, own = their_log_policy(theirs, row.prompt_ids, row.response_ids)
            terms.append(-(reward - mean) * torch.exp(own - torch.tensor(row.logprobs)))
    loss = torch.cat(terms).mean()
    loss.backward()

    assert_equal_gradients(got, {name: p.grad for name, p in theirs.named_parameters() if name in got}, 1e-4)
    assert metrics["policy_loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert metrics["solutions"] == 2


def test_hpt_skips_an_update_with_a_huge_gradient(tmp_path, worker, monkeypatch):
    assert methods.METHODS["hpt"].skip_above == 80  # as its authors' code has it
    monkeypatch.setitem(methods.METHODS, "hpt", replace(methods.METHODS["hpt"], skip_above=1e-6))
    run, examples = make_run(tmp_path, worker, "--method", "hpt")
    before = weights_of(run.model)
    samples = fake_samples(run, examples)
    for sample in samples:
        sample.targets = []
    metrics = update(run, samples, 1e-3)
    assert metrics["left_out"] == 1 and metrics["not_finite"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(run.model), strict=True))
    samples[0].advantages[0] = math.nan
    metrics = update(run, samples, 1e-3)
    assert metrics["left_out"] == metrics["not_finite"] == 1  # and this one counts against --max_skipped


def test_how_many_each_method_samples_alone_and_with_the_strategy(tmp_path, worker):
    path = write_rows(tmp_path / "rows.jsonl", tiny_rows(4, strategy=None, solution=None))  # enough for GRPO
    for method, alone, guided in (("sgpo", 8, 4), ("hinted", 8, 4), ("grpo", 8, 0), ("luffy", 7, 0), ("hpt", 8, 0)):
        more = ["--data", path, "--sft_fraction", 0] if method == "grpo" else []
        run, examples = make_run(tmp_path / method, worker, "--method", method, "--max_new_tokens", 1, *more)
        (sample,) = draw_samples(run, [(0, examples[0])])
        assert (len(sample.auto), len(sample.guided)) == (alone, guided), method


def test_training_samples_at_its_settings(tmp_path, worker, monkeypatch):
    want = dict(top_p=0.5, max_new_tokens=3, max_rows=7, cache_tokens=4096, temperature=0.9)
    run, examples = make_run(tmp_path, worker, *(f"--{name}={value}" for name, value in want.items()))
    seen, real = {}, sgpo.sample_and_grade

    def spy(*given, **settings):
        seen.update(settings)
        return real(*given, **settings)

    monkeypatch.setattr(sgpo, "sample_and_grade", spy)
    draw_samples(run, [(0, examples[0])])
    assert {name: seen[name] for name in want} == want


def test_every_response_is_graded_by_its_own_problem(tmp_path, worker):
    """The reward is the number of the question: which response, to which problem."""
    run, examples = make_run(tmp_path, worker)
    asked = []

    def reward(response, problem):
        asked.append((response, problem))
        return len(asked) - 1

    run.worker = SimpleNamespace(reward=reward)
    for sample in draw_samples(run, list(enumerate(examples[:3]))):
        for row, number in zip(sample.auto + sample.guided, sample.auto_rewards + sample.guided_rewards, strict=True):
            text = run.tokenizer.decode(row.response_ids, skip_special_tokens=True)
            assert asked[int(number)] == (text, examples[sample.place].problem)


def test_every_group_has_random_numbers_of_its_own_and_keeps_them_on_any_rank(tmp_path, worker):
    """One prompt at two places, as its own guided one too, in two steps; and a rank that has the second place alone."""
    run, examples = make_run(tmp_path, worker)
    example = replace(examples[0], guided_ids=examples[0].auto_ids)
    groups = []
    for step in (1, 2):
        for sample in draw_samples(run, [(0, example), (1, example)], step):
            for rows in (sample.auto, sample.guided):
                groups.append([row.response_ids for row in rows[:4]])
    assert all(a != b for a, b in itertools.combinations(groups, 2))
    (second,) = draw_samples(run, [(1, example)])
    assert [row.response_ids for row in second.auto[:4]] == groups[2]
    texts = {1: [], 2: []}
    for step in texts:
        train.rl_step(run, [(0, example)], step, 0.0)
    for line in (run.folder.out / "samples.jsonl").read_text().splitlines():
        record = json.loads(line)
        texts[record["step"]].append(record["text"])
    assert len(texts[1]) == 8 + 4 and texts[1] != texts[2]  # the loop's steps too


# ---------------------------------------------------------------------------------------------------- ablations


def test_a_random_target_is_any_correct_one_and_moves_with_step_place_and_seed(monkeypatch):
    monkeypatch.setattr(sgpo, "unguided_logprobs", lambda settings, policy, samples: [[0.0] * 4] * len(samples))
    samples = [sgpo.ProblemSamples(place, None, [], [], [], [1.0, 0.0, 1.0, 1.0]) for place in range(4)]

    def targets(seed, steps):
        settings, drawn = methods.Method(target="random", sampling_seed=seed), []
        for step in steps:
            sgpo.choose(settings, None, samples, step)
            drawn.append([sample.targets[0] for sample in samples])
        return drawn

    drawn = targets(seed=0, steps=range(750))
    counts = Counter(itertools.chain(*drawn))
    assert counts.keys() == {0, 2, 3}
    assert all(900 < count < 1100 for count in counts.values())  # 1,000 each; the standard deviation is 26
    assert len({step[0] for step in drawn}) == 3 and any(len(set(step)) > 1 for step in drawn)
    assert drawn[:8] == targets(seed=0, steps=range(8)) != targets(seed=1, steps=range(8))
    with pytest.raises(ValueError, match="target 'randm'"):  # refused without the command line too
        methods.Method(target="randm")


def test_shuffled_strategies_reach_the_guided_prompt_and_nothing_else(tmp_path, worker):
    run, examples = make_run(tmp_path / "a", worker, "--shuffle_strategies")
    _, plain = make_run(tmp_path / "b", worker)
    for got, own in zip(examples, plain, strict=True):
        assert got.auto_ids == own.auto_ids
        assert got.problem.strategy.type != own.problem.strategy.type
        messages = strategy_module.guided_messages(own.problem.problem, got.problem.strategy)
        assert got.guided_ids == encode_chat(run.tokenizer, messages)
    _, other = make_run(tmp_path / "c", worker, "--shuffle_strategies", "--method", "hinted", "--seed", 5)
    assert other == examples  # one control for all seeds


def test_seeds_reach_order_and_sampling_separately(tmp_path, worker):
    def trace(name, *flags):
        """(order of the problems, one problem's responses) under the flags."""
        run, examples = make_run(tmp_path / name, worker, "--sft_fraction", 0.5, *flags)
        _, _, for_rl, _ = train.split_examples(examples, run.cfg, 256)
        order = [example.problem.id for _, example in train.data_order(for_rl, 0, 32, run.cfg.data_seed, "rl")]
        (sample,) = draw_samples(run, [(0, examples[0])])
        return order, [row.response_ids for row in sample.auto + sample.guided]

    order, sampled = trace("a")
    other_order, other_sampled = trace("b", "--seed", 5)
    assert order != other_order and sampled != other_sampled
    assert trace("c", "--data_seed", 5) == (other_order, sampled)
    assert trace("d", "--sampling_seed", 5) == (order, other_sampled)


@pytest.mark.parametrize("flags", [["--distill", "sft"], ["--method", "luffy"]])
def test_the_pass_of_a_rank_without_work_adds_nothing(flags, tmp_path, worker, monkeypatch):
    """With cross-entropy, because a divergence, of two equal prompts, would be zero whatever its weight; and with an entropy
    bonus, which needs no advantage."""
    monkeypatch.setitem(methods.METHODS, "luffy", replace(methods.METHODS["luffy"], entropy_bonus=1.0))
    run, examples = make_run(tmp_path, worker, *flags)
    samples = fake_samples(run, examples)
    for sample in samples:
        sample.targets = sample.targets if "sft" in flags else []
    want, metrics = gradients_of(run, samples, monkeypatch)
    monkeypatch.setattr(sgpo, "pad_micro_batches", lambda batches, device: [*batches, []])
    got, again = gradients_of(run, samples, monkeypatch)
    assert_equal_gradients(got, want)
    assert again == pytest.approx(metrics)


def test_a_group_of_equal_rewards_costs_no_backward_pass(tmp_path, worker, monkeypatch):
    """That it counts in the loss's divisor is seen in tests/test_update_from_paper.py, that it is measured above."""
    run, examples = make_run(tmp_path, worker, "--micro_tokens", 600)
    samples = fake_samples(run, examples)
    for sample in samples:
        sample.targets = []
    samples[1].advantages = [0.0] * 8
    passes = set()

    def spy(hidden, weight, terms, inputs, **options):
        still = inputs[2] == 0
        passes.add((torch.is_grad_enabled(), bool(still.all()), bool(still.any())))
        return losses.chunked_head(hidden, weight, terms, inputs, **options)

    monkeypatch.setattr(sgpo, "chunked_head", spy)
    update(run, samples, 0.0)
    assert passes == {(True, False, False), (False, True, True)}  # (with gradient, all are zero, any is)


def test_the_sampler_sees_the_weights_of_the_last_update(tmp_path, worker):
    """An update whose last pass has no gradient (a group of equal rewards): gathered weights must not outlive it."""
    run, examples = make_run(tmp_path, worker, "--method", "grpo")
    samples = fake_samples(run, examples)
    for sample in samples:
        sample.targets = []
    samples[-1].advantages = [0.0] * 8
    before = weights_of(run.model)
    update(run, samples, 1e-2)
    with parallel.whole_model(run.model) as policy:
        for old, now, seen in zip(before, weights_of(run.model), policy.parameters(), strict=True):
            assert torch.equal(now, seen)
            assert not torch.equal(old, seen)


def test_first_update_has_ratio_one(tmp_path, worker):
    """Below top_p 1 too: what is stored is the full softmax's log-probability, as the losses take it."""
    run, examples = make_run(tmp_path, worker, "--temperature", 0.7, "--top_p", 0.95)
    metrics = train.rl_step(run, list(enumerate(examples[:4])), 1, 1e-3)
    mean, largest = metrics["first_logprob_error_mean"], metrics["first_logprob_error"]
    assert 0 < mean < metrics["first_logprob_error_p999"] <= largest
    assert largest < 1e-3
    assert metrics["clip_fraction"] == 0


def test_a_new_method_is_one_entry_and_a_reward_of_ones_own_is_one_argument(tmp_path, worker, monkeypatch):
    """REINFORCE with the batch's mean as baseline, from the command line to the update. Every second response is right."""

    def advantages(settings, auto, guided, solution):
        return {"advantages": auto - auto.mean()}

    def loss(logprobs, old_logprobs, advantages):
        ratio = torch.exp(logprobs - old_logprobs).detach()
        return -advantages * logprobs, ratio, torch.zeros_like(ratio)

    asked = itertools.count()

    def reward(response, problem):
        return next(asked) % 2

    reinforce = methods.Variant(needs=(), advantages=advantages, loss=lambda settings: loss)
    monkeypatch.setitem(methods.METHODS, "reinforce", reinforce)
    run, examples = make_run(tmp_path, worker, "--method", "reinforce", "--aggregate", "token", "--problems_per_step", 2)
    batch = list(enumerate(examples[:2]))
    metrics, samples = sgpo.sgpo_step(
        run.model, run.tokenizer, run.optimizer, run.cfg, batch, reward, step=1, learning_rate=0.0
    )
    terms = []
    for sample in samples:
        for row, right in zip(sample.auto, sample.auto_rewards, strict=True):
            terms += [-(right - 0.5) * logprob for logprob in row.logprobs]
    assert metrics["policy_loss"] == pytest.approx(np.mean(terms), rel=1e-4)


def test_what_a_step_says_of_its_samples_by_hand():
    """Three problems: all right alone, all wrong, and one without a target. A reward of a half is right, and a row of four
    tokens or more is cut off."""

    def rows(*lengths):
        return [Trajectory([1], [5] * n, [0.0] * n, finished=n < 4, group=0) for n in lengths]

    samples = [
        sgpo.ProblemSamples(0, None, rows(1, 2, 4), rows(2, 3), [1.0, 0.5, 0.5], [0.5, 0.25], alpha=0.5, targets=[0]),
        sgpo.ProblemSamples(1, None, rows(4, 4, 3), rows(5, 6, 1), [0.25, 0, 0], [0.5, 1.0, 1.0], alpha=0.3, targets=[0, 1]),
        sgpo.ProblemSamples(2, None, rows(1, 1, 1), rows(1, 1), [0.5, 0.25, 0.0], [0.0, 0.0], alpha=0.1),
    ]
    samples[0].unguided_logprobs = [-2.0, -1.0]
    samples[1].unguided_logprobs = [-2.0, -3.0, -7.0]
    samples[2].unguided_logprobs = [-3.0, -3.0]
    want = {
        "alpha": (0.5 + 0.3 + 0.1) / 3,
        "with_target": 2 / 3,
        "all_right": 1 / 3,
        "all_wrong": 1 / 3,
        "reward_auto": 3 / 9,
        "truncated": 3 / 9,
        "length_auto": 21 / 9,
        "reward_guided": 3.25 / 7,
        "length_guided": 19 / 7,
        "sampled_tokens": 21 + 19,
        "reach_gap": (0 + 1.5) / 2,  # of those with a target: the only right one, and a mean of -2.5 against one of -4
    }
    assert sgpo.describe(methods.Method(correct_at=0.5), samples, CPU) == pytest.approx(want)


def test_learning_rate_schedule(tmp_path, worker, monkeypatch):
    assert [train.learning_rate_at(1.0, step, 6, 2, "linear") for step in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert train.learning_rate_at(1.0, 5, 6, 2, "constant") == 1.0
    flags = "--method sft --sft_batch 4 --sft_epochs 5 --sft_warmup_ratio 0.4 --sft_learning_rate 1 --lr_decay constant"
    run, examples = make_run(tmp_path, worker, *flags.split())
    applied = []

    def apply_gradients(model, optimizer, loss, learning_rate, max_grad_norm):
        applied.append(learning_rate)
        return 0.0

    monkeypatch.setattr(train, "sft_loss", lambda *_: math.nan)
    monkeypatch.setattr(train, "apply_gradients", apply_gradients)
    train.sft_stage(run, examples[:8], [])
    want = [0.25, 0.5, 0.75, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]  # the first four of ten rise; --lr_decay is RL's
    assert applied == pytest.approx(want)
    assert [record["learning_rate"] for record in read_metrics(run.folder.out)] == applied
    assert run.progress.skipped == 10  # that loss
