"""The tests of SGPO: python -m pytest -q, no network, no GPU.

Everything is checked against something we did not write (transformers' logits, autograd, slow loops) or worked out by hand.
Sections: model, rollout, loss, weighting, tiny world, training, two ranks, strategy, grader, starter set.
"""

import ast
import json
import math
import random
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config, Qwen3Config

import loss as losses
import model as models
import rollout
import strategy as strategy_module
import weighting
from data import tiny_world
from model import ModelConfig, build_model, encode_chat, load_model, save_model
from rollout import generate, micro_batches, pack
from strategy import (
    CRITERIA,
    INSTRUCTION,
    Strategy,
    auto_messages,
    extraction_prompt,
    format_strategy,
    guided_messages,
    parse_scores,
    parse_strategy,
    scoring_prompt,
)

ROOT = Path(__file__).resolve().parent
CPU = torch.device("cpu")
TINY_BASE = ROOT / "data/tiny/base"
SHARED = ROOT.parent / "shared/data"  # real data that is not part of the project; tests that need it skip without it


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Two threads on a busy two-core machine are slower than one, and erratic."""
    torch.set_num_threads(1)


# ---------------------------------------------------------------------------------------------------- model

SMALL = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
    eos_token_id=3,
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}
FAMILIES = {
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=False, rope_theta=1e6),
    "qwen2-tied": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True),
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=False),
    "llama3-rope": LlamaConfig(**SMALL, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    "llama-biases": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "smollm2-shape": LlamaConfig(**{**SMALL, "num_attention_heads": 3, "num_key_value_heads": 1}, tie_word_embeddings=True),
}


@pytest.fixture(scope="module", params=FAMILIES)
def reference(request, tmp_path_factory):
    """(transformers' model, ours, folder), with weights so large that every term matters and no norm or bias at its default."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(FAMILIES[request.param]).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    theirs.save_pretrained(folder)
    config = ModelConfig.from_folder(folder)
    ours = models.CausalLM(config)
    models.load_weights(ours, folder, dtype=torch.float32, device=CPU)
    return theirs, ours, folder


def random_ids(rows, length, seed=0):
    return torch.randint(4, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_logits_equal_transformers(reference):
    theirs, ours, _ = reference
    ids = random_ids(3, 50)  # beyond llama3's original context of 32, where its scaling shows
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_cached_step_by_step_equals_transformers(reference):
    theirs, ours, _ = reference
    ids = random_ids(2, 20)
    want = theirs(ids).logits
    cache = ours.new_cache(rows=2, slots=5)
    first = ours(ids[:, :5], torch.arange(5).expand(2, 5), cache=cache)
    torch.testing.assert_close(first, want[:, :5], atol=1e-4, rtol=1e-4)
    for t in range(5, 20):
        cache.reserve(t + 1)
        logits = ours(ids[:, t : t + 1], torch.full((2, 1), t), cache=cache)
        torch.testing.assert_close(logits[:, 0], want[:, t], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_left_padded_equals_transformers(reference):
    theirs, ours, _ = reference
    ids = random_ids(2, 12)
    pads = [5, 0]
    positions = torch.stack([torch.arange(12) - pad for pad in pads]).clamp(min=-1)
    mask = (positions >= 0).long()
    want = theirs(ids, attention_mask=mask, position_ids=positions.clamp(min=0)).logits
    got = ours(ids, positions)
    for row, pad in enumerate(pads):
        torch.testing.assert_close(got[row, pad:], want[row, pad:], atol=1e-4, rtol=1e-4)
        alone = theirs(ids[row : row + 1, pad:]).logits[0]
        torch.testing.assert_close(got[row, pad:], alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_packed_equals_each_sequence_alone(reference):
    theirs, ours, _ = reference
    lengths = [7, 1, 19]
    ids = random_ids(1, sum(lengths))
    got = ours(ids, lengths=lengths)[0]
    want = torch.cat([theirs(part).logits[0] for part in ids.split(lengths, dim=1)])
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_prefilled_cache_continues_ragged_prompts(reference):
    theirs, ours, _ = reference
    lengths = [3, 9]
    prompts = [random_ids(1, n, seed=n) for n in lengths]
    cache = ours.new_cache(rows=2, slots=max(lengths))
    ours(torch.cat(prompts, dim=1), lengths=lengths, cache=cache)
    cache.select(torch.tensor([1, 0, 1]))  # reorder and repeat, as a group does
    cache.reserve(12)
    token, order = torch.tensor([[11], [22], [33]]), [1, 0, 1]
    logits = ours(token, torch.tensor([[lengths[i]] for i in order]), cache=cache)
    for row, i in enumerate(order):
        want = theirs(torch.cat([prompts[i], token[row : row + 1]], dim=1)).logits[0, -1]
        torch.testing.assert_close(logits[row, 0], want, atol=1e-4, rtol=1e-4)


def test_gradients_equal_transformers(reference):
    theirs, ours, _ = reference
    ids = random_ids(2, 10)
    for net in (theirs, ours):
        net.zero_grad()
    theirs(ids).logits.square().mean().backward()
    ours(ids).square().mean().backward()
    want = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name].grad, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_saved_folder_loads_in_transformers_and_here(reference, tmp_path):
    theirs, ours, _ = reference
    tokenizer = tiny_world.build_tokenizer()
    ids = random_ids(1, 9)
    save_model(ours, tokenizer, tmp_path / "whole")
    save_model(ours, tokenizer, tmp_path / "sharded", max_shard_bytes=60_000)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    for folder in (tmp_path / "whole", tmp_path / "sharded"):
        again, reloaded_tokenizer = load_model(str(folder), dtype=torch.float32, device="cpu")
        torch.testing.assert_close(again(ids), ours(ids), atol=0, rtol=0)
        reloaded = AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(reloaded(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)
        assert reloaded.generation_config.eos_token_id in (3, [3])
        assert (
            reloaded_tokenizer.chat_template == tokenizer.chat_template == AutoTokenizer.from_pretrained(folder).chat_template
        )
        assert again.config.eos_ids[0] == 3


def test_loading_in_bf16_keeps_rotary_angles_in_fp32(tmp_path):
    config = ModelConfig.from_dict(FAMILIES["qwen2"].to_dict())
    net = build_model(config, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16, device=CPU)
    assert net.inv_freq.dtype == torch.float32 and net(random_ids(1, 4)).dtype == torch.bfloat16


def test_every_eos_id_is_kept(tmp_path):
    raw = {**FAMILIES["qwen2"].to_dict(), "eos_token_id": 7}
    assert ModelConfig.from_dict(raw, {"eos_token_id": [5, 7, 9]}).eos_ids == (5, 7, 9)


def write_model(folder, net):
    save_model(net, tiny_world.build_tokenizer(), folder)
    return folder


@pytest.fixture(scope="module")
def small_model():
    return build_model(
        ModelConfig.from_dict(FAMILIES["qwen2"].to_dict()),
        generator=torch.Generator().manual_seed(1),
        dtype=torch.float32,
        device=CPU,
    )


def test_broken_checkpoints_name_the_file(small_model, tmp_path):
    def copy(name):
        return write_model(tmp_path / name, small_model)

    def edit_config(folder, **changes):
        config = json.loads((folder / "config.json").read_text())
        config.pop("layer_types")  # transformers checks it against the number of layers when it loads the tokenizer
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    folder = copy("truncated")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model.safetensors: broken or truncated"):
        load_model(str(folder), dtype=torch.float32, device="cpu")
    folder = copy("garbage")
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"model.safetensors: broken or truncated"):
        load_model(str(folder), dtype=torch.float32, device="cpu")
    folder = copy("no-weights")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model.safetensors: missing"):
        load_model(str(folder), dtype=torch.float32, device="cpu")
    folder = copy("unknown")
    edit_config(folder, model_type="mamba")
    with pytest.raises(ValueError, match=r"config.json: unsupported architecture model_type='mamba'; supported: qwen2"):
        load_model(str(folder), dtype=torch.float32, device="cpu")
    folder = copy("shape")
    edit_config(folder, intermediate_size=88)
    with pytest.raises(ValueError, match=r"model.safetensors: .* has shape"):
        load_model(str(folder), dtype=torch.float32, device="cpu")
    folder = copy("more-layers")
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"tensors are missing from its weights, the first is 'model.layers.2"):
        load_model(str(folder), dtype=torch.float32, device="cpu")
    folder = copy("fewer-layers")
    edit_config(folder, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"has no place in a qwen2 model"):
        load_model(str(folder), dtype=torch.float32, device="cpu")
    folder = copy("no-tokenizer")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer file"):
        load_model(str(folder), dtype=torch.float32, device="cpu")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer could not be loaded"):
        load_model(str(folder), dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match=r"no config.json"):
        load_model(str(tmp_path), dtype=torch.float32, device="cpu")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True, "sliding_window": 16}, "sliding-window"),
        ({"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
    ],
)
def test_configs_that_would_be_computed_wrongly_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict({**FAMILIES["qwen2"].to_dict(), **change})


def test_bare_names_resolve_to_their_family(monkeypatch, tmp_path):
    asked = []

    def download(repo, **options):
        assert "*.py" in options["ignore_patterns"] and not any("bin" in p or p == "*" for p in options["allow_patterns"])
        asked.append(repo)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for name in ("Qwen2.5-7B-Instruct", "Qwen3-0.6B", "Llama-3.1-8B-Instruct", "SmolLM2-135M-Instruct", "other/thing"):
        models.resolve_model(name)
    assert asked == [
        "Qwen/Qwen2.5-7B-Instruct",
        "Qwen/Qwen3-0.6B",
        "meta-llama/Llama-3.1-8B-Instruct",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "other/thing",
    ]
    assert models.resolve_model(str(tmp_path)) == tmp_path  # an existing folder wins
    for name in ("gpt-17", "./not/here", "a/b/c"):
        with pytest.raises(ValueError, match="no such folder"):
            models.resolve_model(name)
    assert len(asked) == 5


def test_encode_chat_needs_a_template():
    tokenizer = tiny_world.build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        encode_chat(tokenizer, auto_messages("A kalo machine gets 1 and 2. What comes out?"))


# ---------------------------------------------------------------------------------------------------- rollout


def reference_sampler(net, prompt, uniforms, *, max_new_tokens, temperature, top_p, eos_ids):
    """The sampler in its plainest form: no cache, no batch, one row, a full forward pass per token."""
    ids, logprobs = list(prompt), []
    for step in range(max_new_tokens):
        logits = net(torch.tensor([ids])).logits[0, -1].double()
        if temperature == 0:
            token, logprob = int(logits.argmax()), float(torch.log_softmax(logits, -1).max())
        else:
            p = torch.softmax(logits / temperature, -1)
            order = sorted(range(len(p)), key=lambda v: -p[v]) if top_p < 1 else list(range(len(p)))
            kept, mass = [], 0.0
            for v in order:
                if mass >= top_p:
                    break
                kept.append(v)
                mass += float(p[v])
            total, running = sum(float(p[v]) for v in kept), 0.0
            for token in kept:
                running += float(p[token]) / total
                if running > uniforms[step]:
                    break
            logprob = math.log(float(p[token]) / total)
        ids.append(token)
        logprobs.append(logprob)
        if token in eos_ids:
            return ids[len(prompt) :], logprobs, True
    return ids[len(prompt) :], logprobs, False


PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15]]
STOPS = (3, 20, 21, 22, 23, 24)


@torch.no_grad()
@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 1.0), (0.6, 0.95), (1.3, 0.5), (0.0, 1.0)])
def test_generate_equals_the_plain_sampler(reference, temperature, top_p):
    theirs, ours, _ = reference
    settings = dict(max_new_tokens=12, temperature=temperature, top_p=top_p, eos_ids=STOPS)
    groups = generate(ours, PROMPTS, n=3, seed=[4, 5, 6], **settings)
    finished = 0
    for p, group in enumerate(groups):
        uniforms = torch.rand(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(4 + p))
        for i, row in enumerate(group):
            ids, logprobs, done = reference_sampler(theirs, PROMPTS[p], uniforms[i].tolist(), **settings)
            assert (row.prompt_ids, row.response_ids, row.finished, row.group) == (PROMPTS[p], ids, done, p)
            assert row.logprobs == pytest.approx(logprobs, abs=1e-3)
            finished += done
    assert 0 < finished < 9 or temperature == 0  # both ways of ending were exercised


@torch.no_grad()
def test_sampler_logprobs_equal_a_teacher_forced_pass(reference):
    theirs, ours, _ = reference
    for temperature in (1.0, 0.7):
        for group in generate(ours, PROMPTS, n=4, max_new_tokens=10, temperature=temperature, top_p=1.0, eos_ids=STOPS, seed=1):
            for row in group:
                logits = theirs(torch.tensor([row.prompt_ids + row.response_ids])).logits[0, len(row.prompt_ids) - 1 : -1]
                want = losses.token_logprobs(logits, torch.tensor(row.response_ids), temperature)
                torch.testing.assert_close(torch.tensor(row.logprobs), want, atol=1e-4, rtol=1e-4)


def test_same_seed_same_rows_whatever_the_batch(small_model):
    settings = dict(n=3, max_new_tokens=15, temperature=1.0, top_p=1.0, eos_ids=STOPS)
    whole = generate(small_model, PROMPTS, seed=[1, 2, 3], **settings)
    assert generate(small_model, PROMPTS, seed=[1, 2, 3], **settings) == whole
    tokens = [[row.response_ids for row in group] for group in whole]
    in_pieces = generate(small_model, PROMPTS, seed=[1, 2, 3], max_rows=4, **settings)
    assert [[row.response_ids for row in group] for group in in_pieces] == tokens
    (alone,) = generate(small_model, PROMPTS[1:2], seed=[2], **settings)
    assert [row.response_ids for row in alone] == tokens[1]
    assert len({tuple(row.response_ids) for group in whole for row in group}) == 9  # rows differ from each other
    assert [[r.response_ids for r in g] for g in generate(small_model, PROMPTS, seed=7, **settings)] != tokens


def test_responses_end_at_every_eos_and_at_the_context(small_model):
    groups = generate(small_model, PROMPTS, n=16, max_new_tokens=1000, temperature=1.0, top_p=1.0, eos_ids=STOPS, seed=0)
    rows = [row for group in groups for row in group]
    for row in rows:
        assert not set(row.response_ids[:-1]) & set(STOPS) and len(row.response_ids) == len(row.logprobs)
        assert row.finished == (row.response_ids[-1] in STOPS)
        if not row.finished:
            assert len(row.prompt_ids) + len(row.response_ids) == 64  # max_position_embeddings
    assert len({row.response_ids[-1] for row in rows if row.finished}) > 2  # several of the ids did end a row
    small_model.train()
    generate(small_model, PROMPTS, n=1, max_new_tokens=1, temperature=1.0, top_p=1.0, eos_ids=STOPS, seed=0)
    assert small_model.training  # the caller's mode is put back
    small_model.eval()


def test_sampler_uses_the_trainers_weights(small_model):
    settings = dict(n=1, max_new_tokens=8, temperature=0.0, top_p=1.0, eos_ids=STOPS, seed=0)
    before = generate(small_model, PROMPTS, **settings)
    with torch.no_grad():
        small_model.model.layers[0].mlp.down_proj.weight.mul_(-3)
    after = generate(small_model, PROMPTS, **settings)
    with torch.no_grad():
        small_model.model.layers[0].mlp.down_proj.weight.div_(-3)
    assert before != after


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompts": [[5], []]}, "prompt 1 is empty"),
        ({"prompts": [[5] * 64]}, "prompt 0 has 64 tokens and leaves no room in a context of 64"),
        ({"eos_ids": ()}, "eos_ids is empty"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"n": 0}, "n=0"),
        ({"seed": [1, 2, 3]}, "3 seeds for 1 prompts"),
    ],
)
def test_generate_refuses_bad_settings(small_model, change, message):
    settings = dict(prompts=[[5]], n=1, max_new_tokens=4, temperature=1.0, top_p=1.0, eos_ids=(3,), seed=0)
    with pytest.raises(ValueError, match=message):
        generate(small_model, **{**settings, **change})


def test_sample_draws_from_the_distribution():
    """100,000 draws against the exact probabilities, with and without a nucleus, to five standard errors."""
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -float("inf"), 0.5])
    uniform = torch.rand(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.8)):
        p = torch.softmax(logits / temperature, -1)
        if top_p < 1:  # by hand: 0.564, 0.207, 0.126 are the smallest set that reaches 0.8
            p = torch.where(p > 0.12, p, 0)
            assert (p > 0).sum() == 3
            p = p / p.sum()
        token, logprob = rollout.sample(logits.expand(100_000, -1), uniform, temperature, top_p)
        share = torch.bincount(token, minlength=6) / 100_000
        assert ((share - p).abs() <= 5 * (p * (1 - p) / 100_000).sqrt() + 1e-9).all()
        torch.testing.assert_close(logprob, p.log()[token], atol=1e-5, rtol=1e-5)


def test_sample_at_the_ends_of_the_unit_interval():
    logits = torch.tensor([[-float("inf"), 0.0, 1.0, -float("inf")]] * 2)
    token, _ = rollout.sample(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), 1.0, 1.0)
    assert token.tolist() == [1, 2]  # never an impossible token, not even with u = 0 before it or u close to 1 after it


def test_pack_lays_guided_and_unguided_over_the_same_tokens():
    """The paired contexts differ in length; the masked positions hold the response, EOS included, and nothing else."""
    tokenizer = tiny_world.build_tokenizer()
    eos = tokenizer.eos_token_id
    strategy = tiny_world.strategy_of("kalo", (0, 1, 0))
    texts = [tiny_world.run_machine("kalo", (0, 1, 0), 3, y)[0] for y in (1, 2)]
    problems = [tiny_world.problem_text("kalo", 3, y) for y in (1, 2)]
    responses = [tokenizer.encode(text, add_special_tokens=False) + [eos] for text in texts]
    auto = pack([encode_chat(tokenizer, auto_messages(p)) for p in problems], responses, device=CPU)
    guided = pack([encode_chat(tokenizer, guided_messages(p, strategy)) for p in problems], responses, device=CPU)
    assert torch.equal(auto.targets, guided.targets) and torch.equal(auto.sequence, guided.sequence)
    assert sum(guided.lengths) > sum(auto.lengths)
    for packed in (auto, guided):
        for index, response in enumerate(responses):
            chosen = packed.sequence == index
            assert packed.targets[chosen].tolist() == response  # the last one is EOS
            places = packed.predict[chosen]
            inputs = packed.input_ids[0]
            assert inputs[places[1:]].tolist() == response[:-1]  # each target is predicted from the token before it
            header = tokenizer.encode("<|im_start|>assistant", add_special_tokens=False)
            assert inputs[places[0] - 1 : places[0] + 1].tolist() == header
        assert packed.input_ids.numel() == sum(packed.lengths)
    words = tokenizer.decode(guided.targets)
    assert "strategy" not in words and "Add" not in words


def test_pack_masks_by_position_when_pad_is_eos():
    packed = pack([[2, 2, 5]], [[2, 7, 2]], device=CPU)  # 2 is EOS, pad, and part of the prompt
    assert packed.input_ids.tolist() == [[2, 2, 5, 2, 7]]
    assert packed.predict.tolist() == [2, 3, 4] and packed.targets.tolist() == [2, 7, 2]


def test_pack_refuses_what_it_cannot_lay_out():
    for contexts, responses in (([[1]], [[]]), ([[]], [[1]]), ([[1]], [[1], [2]])):
        with pytest.raises(ValueError):
            pack(contexts, responses, device=CPU)


def test_micro_batches_cover_every_item_once_and_in_order():
    assert micro_batches([3, 3, 3, 9, 1, 1], 6) == [[0, 1], [2], [3], [4, 5]]
    assert micro_batches([], 6) == []


# ---------------------------------------------------------------------------------------------------- loss


def test_forward_kl_by_hand():
    """p = (1/2, 1/2) guided, q = (1/4, 3/4): KL(p||q) = 1/2 ln 2 + 1/2 ln(2/3); the reverse is 1/4 ln(1/2) + 3/4 ln(3/2)."""
    guided, unguided = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    forward = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    reverse = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert losses.forward_kl(guided, unguided).item() == pytest.approx(forward, abs=1e-6)
    assert losses.forward_kl(unguided, guided).item() == pytest.approx(reverse, abs=1e-6)
    assert abs(forward - reverse) > 0.01


def test_forward_kl_against_a_loop_and_torch():
    generator = torch.Generator().manual_seed(0)
    guided, unguided = (3 * torch.randn(4, 5, 11, generator=generator) for _ in range(2))
    got = losses.forward_kl(guided, unguided, temperature=0.7)
    assert got.shape == (4, 5) and (got >= 0).all()
    p, q = (torch.softmax(x.double() / 0.7, -1) for x in (guided, unguided))
    for i in range(4):
        for j in range(5):
            want = sum(float(p[i, j, v]) * math.log(float(p[i, j, v]) / float(q[i, j, v])) for v in range(11))
            assert got[i, j].item() == pytest.approx(want, rel=1e-4)
    want = F.kl_div(q.log(), p.log(), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


def test_gradient_reaches_only_the_unguided_side():
    guided = torch.randn(3, 7, requires_grad=True)
    unguided = torch.randn(3, 7, requires_grad=True)
    losses.forward_kl(guided, unguided).sum().backward()
    assert guided.grad is None
    want = torch.softmax(unguided, -1) - torch.softmax(guided, -1)  # d KL(p||q) / d logits of q
    torch.testing.assert_close(unguided.grad, want.detach(), atol=1e-6, rtol=1e-5)


def test_forward_kl_sees_the_whole_vocabulary_in_fp32():
    """Mass moved to a token far outside any top-k of the unguided side counts; bf16 logits are summed in fp32."""
    unguided = torch.zeros(1, 50_000, dtype=torch.bfloat16)
    guided = unguided.clone()
    guided[0, 49_999] = 8.0  # e^8 = 2,981 against 49,999 others
    p = math.exp(8) / (math.exp(8) + 49_999)
    want = p * math.log(p * 50_000) + (1 - p) * math.log((1 - p) / 49_999 * 50_000)
    assert losses.forward_kl(guided, unguided).item() == pytest.approx(want, rel=1e-3)


def test_kl_clip_drops_tokens_and_never_clamps():
    d = torch.tensor([0.2, 1.0, 1.0001, 5.0], requires_grad=True)
    mask = losses.kl_clip_mask(d, delta=1.0)
    assert mask.tolist() == [1, 1, 0, 0]
    (mask * d).sum().backward()
    assert d.grad.tolist() == [1, 1, 0, 0]


def test_policy_loss_on_both_sides_of_both_clips():
    """Ratios 0.5, 0.9, 1.2, 1.5 with A = +2, then A = -2; clip to [0.8, 1.28]; worked out by hand."""
    ratio = torch.tensor([0.5, 0.9, 1.2, 1.5] * 2)
    advantage = torch.tensor([2.0] * 4 + [-2.0] * 4)
    old = torch.full((8,), -1.0)
    new = (old + ratio.log()).requires_grad_()
    loss, got_ratio, clipped = losses.policy_loss(new, old, advantage)
    want = torch.tensor([-1.0, -1.8, -2.4, -2.56, 1.6, 1.8, 2.4, 3.0])
    torch.testing.assert_close(loss, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got_ratio, ratio, atol=1e-5, rtol=1e-5)
    assert clipped.tolist() == [False, False, False, True, True, False, False, False]
    loss.sum().backward()
    want_grad = torch.where(clipped, 0.0, -advantage * ratio)  # d(-r A) / d logp = -r A where no clip holds
    torch.testing.assert_close(new.grad, want_grad, atol=1e-5, rtol=1e-5)


def test_token_quantities_against_torch():
    logits = torch.randn(4, 9)
    targets = torch.tensor([0, 3, 8, 5])
    want = torch.distributions.Categorical(logits=logits / 0.7)
    torch.testing.assert_close(losses.token_logprobs(logits, targets, 0.7), want.log_prob(targets))
    torch.testing.assert_close(losses.token_entropy(logits, 0.7), want.entropy())


@pytest.mark.parametrize("kind", ["sft", "grpo", "distillation"])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunked_head_equals_the_unchunked_value_and_gradient(kind, chunk):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    M, D, V = 23, 16, 101
    hidden, weight = normal(M, D).requires_grad_(), (0.5 * normal(V, D)).requires_grad_()
    targets = torch.randint(0, V, (M,), generator=generator)
    w = torch.rand(M, generator=generator)
    old, advantages, guided_hidden = -normal(M).abs() - 3, normal(M), hidden.detach() + 0.7 * normal(M, D)
    clip = dict(clip_low=0.2, clip_high=0.28, temperature=0.9)
    kd = dict(delta=1.0, temperature=0.9)
    terms, inputs = {
        "sft": (losses.sft_terms, (targets, w)),
        "grpo": (partial(losses.grpo_terms, **clip), (targets, old, advantages, w)),
        "distillation": (partial(losses.distillation_terms, head_weight=weight, **kd), (guided_hidden, w)),
    }[kind]
    arguments = [x.detach().clone() for x in (hidden, weight, *inputs)]
    got, stats = losses.chunked_head(hidden, weight, terms, inputs, chunk_tokens=chunk)
    (3 * got).backward()
    gradients = hidden.grad, weight.grad
    hidden.grad = weight.grad = None

    # the plain way: all logits at once, torch's own functions, autograd
    logits = hidden @ weight.T
    if kind == "sft":
        want = (F.cross_entropy(logits, targets, reduction="none") * w).sum()
    elif kind == "grpo":
        ratio = torch.exp(F.log_softmax(logits / 0.9, -1)[torch.arange(M), targets] - old)
        want = -(w * torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)).sum()
    else:
        p = F.log_softmax(guided_hidden @ weight.detach().T / 0.9, -1)
        d = F.kl_div(F.log_softmax(logits / 0.9, -1), p, log_target=True, reduction="none").sum(-1)
        assert 0 < (d <= 1).sum() < M
        want = (w * (d <= 1) * d).sum()
        torch.testing.assert_close(stats["divergence"], d.detach(), atol=1e-5, rtol=1e-5)
    (3 * want).backward()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients[0], hidden.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients[1], weight.grad, atol=1e-5, rtol=1e-5)
    assert all(value.shape == (M,) for value in stats.values())
    for before, after in zip(arguments, (hidden, weight, *inputs), strict=True):
        assert torch.equal(before, after)  # no argument was written to


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation gives out."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_chunked_head_never_holds_the_logits_of_all_tokens():
    M, D, V = 64, 4, 500
    weight, inputs = torch.randn(V, D, requires_grad=True), (torch.randint(0, V, (M,)), torch.ones(M))
    largest = {}
    for chunk in (8, M):
        with LargestTensor() as mode:
            hidden = torch.randn(M, D, requires_grad=True)
            losses.chunked_head(hidden, weight, losses.sft_terms, inputs, chunk_tokens=chunk)[0].backward()
        largest[chunk] = mode.numel
    assert largest == {8: 8 * V, M: M * V}  # and with one chunk it does hold them: the measure measures


def test_public_calls_leave_their_arguments_alone(small_model):
    prompts = [list(prompt) for prompt in PROMPTS]
    generate(small_model, prompts, n=2, max_new_tokens=3, temperature=1.0, top_p=0.9, eos_ids=STOPS, seed=0)
    responses = [[1, 2], [3], [4, 5, 6]]
    pack(prompts, responses, device=CPU)
    assert prompts == PROMPTS and responses == [[1, 2], [3], [4, 5, 6]]
    tensors = [torch.randn(3, 5) for _ in range(4)] + [torch.tensor([0.0, 1.0, 1.0])]
    copies = [tensor.clone() for tensor in tensors]
    a, b, c, d, correct = tensors
    losses.forward_kl(a, b)
    losses.kl_clip_mask(c)
    losses.policy_loss(a, b, c)
    losses.token_logprobs(a, torch.tensor([1, 2, 3]))
    weighting.group_advantages(d)
    weighting.instance_weight(a, b)
    weighting.reachable_target(a[:, 0], correct > 0)
    rollout.sample(a, torch.rand(3, dtype=torch.float64), 0.7, 0.9)
    assert all(torch.equal(x, y) for x, y in zip(tensors, copies, strict=True))


def test_chunked_head_without_gradient_and_without_tokens():
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    inputs = (torch.arange(5), torch.ones(5))
    with torch.no_grad():
        value, stats = losses.chunked_head(hidden, weight, losses.sft_terms, inputs, chunk_tokens=2)
    assert not value.requires_grad and stats["logprob"].shape == (5,)
    loss, stats = losses.chunked_head(hidden[:0], weight, losses.sft_terms, [x[:0] for x in inputs], chunk_tokens=2)
    loss.backward()  # an empty micro-batch still takes part in the backward pass
    assert loss.item() == 0 and weight.grad.abs().sum() == 0
    loss, _ = losses.chunked_head(hidden, weight, losses.sft_terms, inputs, chunk_tokens=2)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        loss.backward()


# ---------------------------------------------------------------------------------------------------- weighting


def test_group_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0, 0, 1, 0, 0, 0, 0], [1] * 8, [0] * 8])
    got = weighting.group_advantages(rewards)
    # mean 1/4; unbiased variance (2 * (3/4)^2 + 6 * (1/4)^2) / 7 = 1.5 / 7
    std = math.sqrt(1.5 / 7)
    assert got[0].tolist() == pytest.approx([0.75 / std, -0.25 / std, -0.25 / std, 0.75 / std] + [-0.25 / std] * 4, rel=1e-4)
    assert got[1:].abs().max() == 0  # exactly zero, not a rounding error divided by eps
    assert rewards[0].sum() == 2  # the argument is as it was
    with pytest.raises(ValueError, match="at least 2"):
        weighting.group_advantages(torch.ones(3, 1))


@pytest.mark.parametrize(
    "p_auto, p_guide, alpha",
    [
        (0.0, 0.25, 0.8),  # 0.5 * 0.35 / 0.1 = 1.75, capped
        (0.0, 1.0, 0.8),
        (1.0, 1.0, 0.5 * 0.1 / 1.1),  # 0.0455
        (0.5, 0.4, 0.0),
        (0.75, 0.0, 0.0),
        (0.5, 0.5, 0.5 * 0.1 / 0.6),
        (0.5, 0.75, 0.5 * 0.35 / 0.6),
        (0.0, 0.0, 0.5),  # no success anywhere: the weight is alpha_0, but there is no target to apply it to
    ],
)
def test_instance_weight_check_values(p_auto, p_guide, alpha):
    got = weighting.instance_weight(torch.tensor([p_auto]), torch.tensor([p_guide]))
    assert got.item() == pytest.approx(alpha, abs=1e-6)


def test_reachable_target_is_the_most_probable_correct_one():
    logprobs = torch.tensor([-3.0, -9.0, -5.0, -4.0])
    assert weighting.reachable_target(logprobs, torch.tensor([False, True, True, True])) == 3
    assert weighting.reachable_target(logprobs, torch.tensor([True, True, True, True])) == 0
    assert weighting.reachable_target(logprobs, torch.tensor([False] * 4)) is None
    with pytest.raises(ValueError):
        weighting.reachable_target(logprobs, torch.tensor([True]))


# ---------------------------------------------------------------------------------------------------- strategies


STRATEGY_DATA = SHARED / "strategies"


def strategy_rows(name):
    path = STRATEGY_DATA / name
    if not path.exists():
        pytest.skip(f"needs {path}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def strategy_example():
    return Strategy("sum of two", "Join the parts.", ("Find both parts.", "Add them."))


STRATEGY_EXAMPLE_TEXT = """Problem type: sum of two
Strategy: Join the parts.
Steps:
1. Find both parts.
2. Add them."""


def test_strategy_imports_the_standard_library_only():
    tree = ast.parse(Path(strategy_module.__file__).read_text(encoding="utf-8"))
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "a sibling")
    assert names and all(name.split(".")[0] in sys.stdlib_module_names for name in names), names


def test_strategy_format_is_the_documented_text():
    assert format_strategy(strategy_example()) == STRATEGY_EXAMPLE_TEXT
    assert parse_strategy(STRATEGY_EXAMPLE_TEXT) == strategy_example()


@pytest.mark.parametrize("name", ["mawps.jsonl", "gsm8k.jsonl", "math.jsonl"])
def test_strategy_real_ones_survive_every_dress(name):
    rows = strategy_rows(name)
    assert len(rows) > 100
    for row in rows:
        s = Strategy.from_dict(row["strategy"])
        assert s.to_dict() == row["strategy"]
        text = format_strategy(s)
        assert parse_strategy(text) == s
        # Only the first of these goes through the exact reader.
        for dressed in (
            f"\n{text}\n",
            f"Sure, here it is:\n\n{text}\n\nHope this helps! Let me know.",
            f"<think>\nStrategy: not this one.\n</think>\n{text}",
            f"```\n{text}\n```",
            text.replace("\n", "\r\n"),
            f"**Problem type:** {s.type}\n\n**Strategy:** {s.strategy}\n\n**Steps:**\n"
            + "\n".join(f"{i}) {step}" for i, step in enumerate(s.steps, 1)),
            f"### Problem type\n{s.type}\n\n### Strategy\n{s.strategy}\n\n### Steps\n"
            + "\n".join(f"- {step}" for step in s.steps),
            json.dumps(row["strategy"]),
            "```json\n" + json.dumps(row["strategy"], indent=2, ensure_ascii=False) + "\n```\nDone.",
        ):
            assert parse_strategy(dressed) == s, dressed


@pytest.mark.parametrize(
    "odd",
    [
        Strategy("Strategy: x", "Steps:", ("Problem type: y", "1. z", "Steps:")),
        Strategy("**bold**", "- dash", ("2) two", "* star", "# head", "```")),
        Strategy('{"type": "t"}', "a {b} {0} %s %(x)d $\\frac{1}{2}$ \\boxed{}", ("{", "}", "\\n is not a line break")),
        Strategy("<think>", "</think>", ("<|im_end|>", "\u00e9\u4e2d\U0001f600")),
        Strategy('"quoted"', "| a | b |", ("Hope this helps!",)),
        Strategy("t", "two  blanks,\ta tab, a\u00a0hard blank", tuple(f"step {i}" for i in range(12))),
    ],
)
def test_strategy_odd_ones_round_trip(odd):
    assert parse_strategy(format_strategy(odd)) == odd
    assert Strategy.from_dict(json.loads(json.dumps(odd.to_dict()))) == odd


def test_strategy_random_ones_round_trip():
    rng = random.Random(0)
    words = [
        "Problem type:",
        "Strategy:",
        "Steps:",
        "1.",
        "2.",
        "-",
        "**",
        "{",
        "}",
        "<think>",
        "</think>",
        "|",
        "```",
        "a",
        "\\boxed{}",
        '"',
        ";",
        "#",
        "\u2460",
        "Hope this helps!",
    ]
    for _ in range(2000):
        texts = [" ".join(rng.choices(words, k=rng.randint(1, 5))) for _ in range(rng.randint(3, 7))]
        s = Strategy(texts[0], texts[1], tuple(texts[2:]))
        assert parse_strategy(format_strategy(s)) == s


def test_strategy_parser_agrees_with_the_labelled_candidates():
    rows = strategy_rows("math_candidates.jsonl")
    refused, disagreements = 0, []
    for row in rows:
        for i, candidate in enumerate(row["candidates"]):
            try:
                parsed = parse_strategy(candidate["text"])
                assert all("\n" not in text for text in (parsed.type, parsed.strategy, *parsed.steps))
            except ValueError as error:
                parsed = None
                refused += 1
                assert str(error).startswith("strategy")
            if (parsed is not None) != candidate["label"]["parses"]:
                disagreements.append((row["id"], i, candidate["text"]))
    print(f"{sum(len(row['candidates']) for row in rows)} candidates, {refused} refused, {disagreements} disagree")
    assert disagreements == []
    assert refused == 5


@pytest.mark.parametrize(
    "reply",
    [
        "1. **Problem type:** sum of two\n2. **Strategy:** Join the parts.\n3. **Steps:**\n   1. Find both parts.\n"
        "   2. Add them.",
        "## Strategy\n\n**Problem type**: sum of two\n**Strategy**: Join the parts.\n**Steps**:\n* Find both parts.\n"
        "* Add them.",
        "| Part | Text |\n|---|---|\n| Problem type | sum of two |\n| Strategy | Join the parts. |\n"
        "| Steps | 1. Find both parts. 2. Add them. |",
        "PROBLEM TYPE: sum of two\n---\nApproach - Join the parts.\nPlan:\nStep 1: Find both parts.\nStep 2: Add them.",
        "Problem type: sum of two\nStrategy: Join\nthe parts.\nSteps:\nFind both parts.\nAdd them.",
        "Problem type: sum of two\nStrategy: Join the parts.\nSteps:\n1. Find\n   both\n\nparts.\n\n2. Add\nthem.\n\n"
        "The answer is 7.",
        "**Problem type:** sum of two\n**Strategy:** Join the parts.\n**Steps:**\n1. Find\n   1. both\n   - parts.\n"
        "2. Add them.",
        "type: 'sum of two'\nstrategy: \"Join the parts.\"\nsteps:\n  - Find both parts.\n  - Add them.",
        "the thoughts began in the prompt\n</think>\n\n" + STRATEGY_EXAMPLE_TEXT,
        'Here: {"Problem Type": "sum of two", "solving_strategy": "Join\\nthe parts.", '
        '"steps": "1. Find both parts.\\n2. Add them."} Bye',
        '{"problem_type": "sum of two", "strategy": "Join the parts.", "steps": ["1. Find both parts.", "Step 2: Add them."]',
        "【问题类型】sum of two\n【策略】Join the parts.\n【步骤】\n① Find both parts.\n② Add them.",
    ],
)
def test_strategy_parser_reads_the_habits_of_models(reply):
    assert parse_strategy(reply) == strategy_example()


def test_strategy_parser_keeps_latex_and_powers():
    # In JSON, "\f", "\b", "\t" and "\n" would turn \frac, \binom, \times and \neq into control characters.
    reply = r'{"type": "t", "strategy": "\frac{a}{b} \times \neq \\binom{n}{k}", '
    reply += r'"steps": ["\sqrt{x} and \"y\" \u00e9"]}'
    assert parse_strategy(reply) == Strategy("t", r"\frac{a}{b} \times \neq \binom{n}{k}", (r'\sqrt{x} and "y" é',))
    reply = "Well:\nProblem type: 'a' or 'b'\nStrategy: x**2 + **bold** but 2**3**2.\n"
    reply += "Steps:\n**Step 1: Go.** Multiply by 2. Then add."
    assert parse_strategy(reply) == Strategy("'a' or 'b'", "x**2 + bold but 2**3**2.", ("Go. Multiply by 2. Then add.",))


STRATEGY_HEAD = "Problem type: t\nStrategy: s\n"


@pytest.mark.parametrize(
    "reply, words",
    [
        ("", "no problem type, no strategy, no steps"),
        ("I am sorry, I cannot do that.", "no problem type, no strategy, no steps"),
        (STRATEGY_HEAD, "no steps"),
        (STRATEGY_HEAD + "Steps:\n", "no steps"),
        ("Strategy: s\nSteps:\n1. a", "no problem type"),
        ("Problem type:\nStrategy: s\nSteps:\n1. a", "no problem type"),
        ("Problem type: t\nSteps:\n1. a", "no strategy"),
        ("<think>\n" + STRATEGY_EXAMPLE_TEXT, "inside <think>"),
        (STRATEGY_EXAMPLE_TEXT + "\n\n" + STRATEGY_EXAMPLE_TEXT, "appears twice"),
        (STRATEGY_EXAMPLE_TEXT + "\nHope this helps!", "'Hope this helps!' belong"),
        ("Problem type: t\n\nLet me see.\n\nStrategy: s\nSteps:\n1. a", "2 paragraphs"),
        (STRATEGY_HEAD + "Steps:\nDo this:\n1. a", "text between the label and the first step"),
        (STRATEGY_HEAD + "Steps:\n2. a\n3. b", "numbered [2, 3]"),
        (STRATEGY_EXAMPLE_TEXT + "\n\nExample:\n1. Add 3 and 4.", "numbered [1, 2, 1]"),
        (STRATEGY_HEAD + "Steps:\nDo a.\n\nDo b.", "neither numbered nor bulleted"),
        ('{"type": "t", "strategy": "s", "steps": []}', "no steps"),
        ('{"type": "t", "strategy": "s", "steps": ["a", 3]}', "'steps[1]'"),
        ('{"type": "t", "strategy": "s", "steps": [{"strategy": "a"}]}', "'steps[0]'"),
        ('{"type": "t", "strategy": "s", "steps": ["a"], "answer": "42"}', "'answer': unknown, with value '42'"),
        ('{"type": "t", "strategy": "s", "steps": ["a"]}\n{"type": "t"}', "2 JSON objects"),
        ('{"type": "t", "problem_type": "u", "strategy": "s", "steps": ["a"]}', "twice"),
        (None, "got None"),
    ],
)
def test_strategy_parser_says_what_is_wrong(reply, words):
    with pytest.raises(ValueError) as error:
        parse_strategy(reply)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"type": ""}, "'type': expected a non-empty string, got ''"),
        ({"type": " \n"}, "'type': expected a non-empty string"),
        ({"type": 3}, "'type': expected a non-empty string, got 3"),
        ({"strategy": None}, "'strategy': expected a non-empty string, got None"),
        ({"strategy": "two\nlines"}, "'strategy': expected one line"),
        ({"strategy": "two\u2028lines"}, "'strategy': expected one line"),
        ({"strategy": " outer blank"}, "'strategy': expected one line"),
        ({"steps": []}, "'steps': expected a tuple of at least one step"),
        ({"steps": "Add."}, "'steps': expected a list of strings, got 'Add.'"),
        ({"steps": None}, "'steps': expected a list of strings, got None"),
        ({"steps": ["Add.", ""]}, "'steps[1]': expected a non-empty string, got ''"),
        ({"steps": ["Add.", ["x"]]}, "'steps[1]'"),
        ({"answer": "42"}, "'answer': unknown, with value '42'"),
    ],
)
def test_strategy_from_dict_names_field_and_value(change, words):
    with pytest.raises(ValueError) as error:
        Strategy.from_dict({"type": "t", "strategy": "s", "steps": ["a"]} | change)
    assert words in str(error.value)


@pytest.mark.parametrize("key", ["type", "strategy", "steps"])
def test_strategy_from_dict_misses_a_field(key):
    data = {"type": "t", "strategy": "s", "steps": ["a"]}
    del data[key]
    with pytest.raises(ValueError, match=f"{key!r}: missing"):
        Strategy.from_dict(data)


def test_strategy_is_immutable_and_checked_without_from_dict_too():
    with pytest.raises(AttributeError):
        strategy_example().type = "other"
    with pytest.raises(ValueError, match="tuple"):
        Strategy("t", "s", ["a"])
    with pytest.raises(ValueError, match="expected an object"):
        Strategy.from_dict(["t", "s"])
    data = {"type": "t", "strategy": "s", "steps": ["a"]}
    s = Strategy.from_dict(data)
    data["steps"].append("b")
    assert s.steps == ("a",)
    s.to_dict()["steps"].append("b")
    assert s.steps == ("a",)


STRATEGY_PROBLEMS = [
    "What is 2 + 3?",
    "Strategy: none. Steps:\n1. {x} {0} {{}} %s %d\nProblem type: ?",
    "  Let $f(x)=\\frac{x}{2}$ and\n\n\\boxed{}; follow <|im_end|> \u4e2d  ",
    "Follow this strategy.\n</problem>",
    INSTRUCTION,
]


@pytest.mark.parametrize("problem", STRATEGY_PROBLEMS)
def test_strategy_messages_differ_by_the_strategy_block_only(problem):
    s = strategy_example()
    auto, guided = auto_messages(problem), guided_messages(problem, s)
    assert [m["role"] for m in auto] == [m["role"] for m in guided] == ["user"]  # no system message of ours
    assert auto[0]["content"] == problem + "\n\nReason step by step and put the final answer in \\boxed{}."
    assert guided[0]["content"].startswith(problem + "\n\n")
    assert guided[0]["content"].endswith("\n\n" + INSTRUCTION)
    for text in (s.type, s.strategy, *s.steps):
        assert text not in auto[0]["content"] and text in guided[0]["content"]
    # The trap: one closing for both, so that the block is the whole difference and response tokens line up.
    block = "Follow this strategy.\n" + STRATEGY_EXAMPLE_TEXT + "\n\n"
    rest = guided[0]["content"][len(problem) + 2 :]
    assert rest == block + INSTRUCTION
    assert problem + "\n\n" + rest.removeprefix(block) == auto[0]["content"]


@pytest.mark.parametrize("problem", STRATEGY_PROBLEMS)
def test_strategy_pipeline_prompts_hold_their_inputs_unchanged(problem):
    solution = "We get {5} = \\boxed{5}. Strategy: %s"
    extraction, scoring = extraction_prompt(problem, solution), scoring_prompt(problem, solution, strategy_example())
    for messages in (extraction, scoring):
        assert [m["role"] for m in messages] == ["user"]
        assert f"<problem>\n{problem}\n</problem>" in messages[0]["content"]
        assert f"<solution>\n{solution}\n</solution>" in messages[0]["content"]
    assert STRATEGY_EXAMPLE_TEXT in scoring[0]["content"] and STRATEGY_EXAMPLE_TEXT not in extraction[0]["content"]
    # The form asked for is the one that the reader takes: the prompt's own pattern parses.
    form = extraction[0]["content"].rpartition("Problem type: ")
    assert parse_strategy("".join(form[1:])).steps == ("...", "...")
    asked = scoring[0]["content"].splitlines()[-4:]
    assert asked == [f"{name}: ..." for name in CRITERIA]
    assert parse_scores("\n".join(asked).replace("...", "3")) == dict.fromkeys(CRITERIA, 3)


@pytest.mark.parametrize(
    "call",
    [
        lambda: auto_messages(""),
        lambda: auto_messages(None),
        lambda: guided_messages(" ", strategy_example()),
        lambda: guided_messages("p", strategy_example().to_dict()),
        lambda: guided_messages("p", None),
        lambda: extraction_prompt("p", ""),
        lambda: extraction_prompt(3, "s"),
        lambda: scoring_prompt("p", "s", "text"),
    ],
)
def test_strategy_messages_reject_bad_input(call):
    with pytest.raises(ValueError, match="expected"):
        call()


STRATEGY_SCORES = {"faithful": 5, "reusable": 4, "no_leak": 1, "actionable": 3}


@pytest.mark.parametrize(
    "reply",
    [
        "faithful: 5\nreusable: 4\nno_leak: 1\nactionable: 3",
        "<think>faithful: 2</think>\nScores:\n- **Faithful:** 5\n- **Reusable**: 4/5\n- **No leak:** **1**\n"
        "- **Actionable:** 3",
        "actionable = 3 (vague)\r\nno-leak: 1 - it states the answer, 12\r\nreusable: 4.\r\nfaithful: 5 / 5, good",
        '{\n  "faithful": 5,\n  "reusable": 4,\n  "no_leak": 1,\n  "actionable": 3\n}',
    ],
)
def test_strategy_scores_are_read(reply):
    scores = parse_scores(reply)
    assert scores == STRATEGY_SCORES and list(scores) == list(CRITERIA)


@pytest.mark.parametrize(
    "line, words",
    [
        ("", "no_leak is missing"),
        ("no_leak:", "no_leak is missing"),
        ("no_leak: 1\nno_leak: 1", "no_leak is given twice"),
        ("no_leak: 0", "'0', expected a whole number from 1 to 5"),
        ("no_leak: 6", "expected a whole number"),
        ("no_leak: -4", "expected a whole number"),
        ("no_leak: 4.5", "expected a whole number"),
        ("no_leak: 4-5", "expected a whole number"),
        ("no_leak: 4 - 5", "expected a whole number"),
        ("no_leak: 4 or 5", "expected a whole number"),
        ("no_leak: 8/10", "expected a whole number"),
        ("no_leak: yes", "'yes', expected a whole number"),
    ],
)
def test_strategy_scores_name_the_bad_criterion(line, words):
    with pytest.raises(ValueError) as error:
        parse_scores(f"faithful: 5\nreusable: 4\n{line}\nactionable: 3")
    assert words in str(error.value)
