"""The two toy worlds: tiny and hard."""

import itertools
import json
import random
import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from data import hard_world, tiny_world
from eval import load_problems
from grader import MathWorker, extract_answer, is_correct
from model import CausalLM, encode_chat, load_model
from rollout import generate, pack
from strategy import Strategy, auto_messages, format_strategy, guided_messages, parse_strategy
from tests.common import CPU, ROOT, TINY_BASE


def test_tiny_world_rows_are_those_committed():
    for name, rows in tiny_world.make_rows(0).items():
        committed = (ROOT / f"data/tiny/{name}.jsonl").read_text(encoding="utf-8")
        assert committed == "".join(json.dumps(row) + "\n" for row in rows)
        assert len(load_problems(ROOT / f"data/tiny/{name}.jsonl")) == len(rows)


def test_tiny_world_splits_by_operands_and_hides_the_answer():
    splits = tiny_world.make_rows(0)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 640, "test": 240, "valid": 240}
    assert len({row["problem"] for rows in splits.values() for row in rows}) == 640 + 240 + 240  # none is in two
    truth = tiny_world.machine_choices(0)
    assert sorted(truth.values()) == sorted([(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)] * 2)
    for row in itertools.chain(*splits.values()):
        assert not any(character.isdigit() for character in json.dumps(row["strategy"]))
        _, machine, x, y = *row["id"].split("-"), None
        x, y = (int(digit) for digit in x)
        combine, change, keep = truth[machine]
        value = (x + y if combine == 0 else x - y) % 10  # by hand, not through the table of operations
        value = (2 * value if change == 0 else value + 1) % 10
        assert row["answer"] == str(max(value, x) if keep == 0 else min(value, x))


def test_tiny_tokenizer_knows_every_word_and_keeps_digits_apart():
    tokenizer = AutoTokenizer.from_pretrained(TINY_BASE)
    for row in tiny_world.make_rows(0)["test"]:
        strategy = Strategy.from_dict(row["strategy"])
        ids = encode_chat(tokenizer, guided_messages(row["problem"], strategy)) + tokenizer.encode(row["solution"])
        assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(tokenizer.encode("max 9 3 = 9. \\boxed{9}")) == "max 9 3 = 9 . \\boxed{ 9 }"
    assert tokenizer.get_vocab() == tiny_world.build_tokenizer().get_vocab()


def test_the_base_learns_no_response_without_its_context(monkeypatch):
    """Equal contexts that stand next to each other are packed once: without `prefixes` the responses would stand alone."""
    packs, passed = [], []

    def twice_the_same(contexts, responses, **settings):
        packs.append(pack([[5, 6], [5, 6]], [[7, 8], [9, 7]], **settings))
        return packs[-1]

    monkeypatch.setattr(tiny_world, "pack", twice_the_same)
    forward = CausalLM.forward

    def spy(self, *arguments, **settings):
        passed.append((settings["lengths"], settings["prefixes"]))
        return forward(self, *arguments, **settings)

    monkeypatch.setattr(CausalLM, "forward", spy)
    tiny_world.train_base(seed=3, steps=2, batch=2, learning_rate=1e-3)
    assert passed == [(packed.lengths, packed.prefixes) for packed in packs] == [([2, 1, 1], [None, 0, 0])] * 2


def test_tiny_world_script_trains_a_model_from_its_seed(tmp_path):
    first, _ = tiny_world.train_base(seed=3, steps=2, batch=4, learning_rate=1e-3)
    second, _ = tiny_world.train_base(seed=3, steps=2, batch=4, learning_rate=1e-3)
    other, _ = tiny_world.train_base(seed=4, steps=2, batch=4, learning_rate=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.head_weight, other.head_weight)


HARD = ROOT / "data/hard"

# sentence -> operation, written out again: the world's own table is what is tested
SENTENCES = {
    "Add the second input to the first.": "add",
    "Subtract the second input from the first.": "sub",
    "Double the value.": "double",
    "Increase the value by one.": "inc",
    "Keep the larger of the value and the first input.": "max",
    "Keep the smaller of the value and the first input.": "min",
}

OTHER = {"add": "sub", "double": "inc", "max": "min"} | {"sub": "add", "inc": "double", "min": "max"}


def parts_of(row):
    """(three words, first input, second input), read from the text that the model sees."""
    *words, x, y = re.fullmatch(r"A (\w+) (\w+) (\w+) machine gets (\d) and (\d)\. What comes out\?", row["problem"]).groups()
    return words, int(x), int(y)


def operations_of(row):
    """The three operations that the row's strategy names, None for a step that is missing or says nothing."""
    named = [SENTENCES[step] for step in row["strategy"]["steps"] if step in SENTENCES]
    pairs = (("add", "sub"), ("double", "inc"), ("max", "min"))
    return [next((name for name in pair if name in named), None) for pair in pairs]


def work_out(text, x, y):
    """(operations, answer) of a response, every step of it checked; knows the notation and nothing of the world's code."""
    whole = r"(?:\w+ )*(add|sub) (\d) (\d) = (\d), (?:\w+ )*(double|inc) (\d) = (\d), (?:\w+ )*(max|min) (\d) (\d) = (\d)\."
    f, a, b, c, g, d, e, h, i, j, k, boxed = re.fullmatch(whole + r" \\boxed\{(\d)\}", text).groups()
    a, b, c, d, e, i, j, k, boxed = (int(digit) for digit in (a, b, c, d, e, i, j, k, boxed))
    assert (a, b, d, i, j, boxed) == (x, y, c, e, x, k)
    assert c == (a + b if f == "add" else a - b) % 10
    assert e == (2 * d if g == "double" else d + 1) % 10
    assert k == (max if h == "max" else min)(i, j)
    return [f, g, h], k


def test_hard_world_rows_are_those_committed(hard):
    assert sorted(hard) == sorted(path.stem for path in HARD.glob("*.jsonl"))
    assert {name: len(rows) for name, rows in hard.items()} == {
        "train": 640, "train-low06": 640, "train-low30": 640, "test": 256, "mixes": 256
    }  # fmt: skip
    for name, rows in hard.items():
        committed = (HARD / f"{name}.jsonl").read_text(encoding="utf-8")
        assert committed == "".join(json.dumps(row) + "\n" for row in rows)
        assert len(load_problems(HARD / f"{name}.jsonl")) == len(rows)


def test_hard_world_splits_by_families_and_by_operands(hard):
    families = {name: {" ".join(parts_of(row)[0]) for row in rows} for name, rows in hard.items()}
    assert len(families["train"]) == len(families["mixes"]) == 32
    assert families["test"] == families["train"] and not families["train"] & families["mixes"]
    problems = [row["problem"] for name in ("train", "test", "mixes") for row in hard[name]]
    assert len(set(problems)) == len(problems) == 640 + 256 + 256
    for name in ("train", "test", "mixes"):  # every word in equal number, so that no word is practised more than another
        counts = Counter(word for row in hard[name] for word in parts_of(row)[0])
        assert len(counts) == 24 and set(counts.values()) == {len(hard[name]) // 8}
    orders = [[row["problem"] for row in hard[name]] for name in ("train", "train-low06", "train-low30")]
    assert orders[0] == orders[1] == orders[2]


def test_hard_world_words_decide_and_both_ways_give_the_answer(hard):
    truth = hard_world.word_choices(0)
    assert [sum(truth[word] for word in words) for words in hard_world.WORDS] == [4, 4, 4]
    decides = {}  # word -> operation, as the good strategies have it
    for row in hard["train"] + hard["test"] + hard["mixes"]:
        words, x, y = parts_of(row)
        operations = operations_of(row)
        for word, operation in zip(words, operations, strict=True):
            assert decides.setdefault(word, operation) == operation
        choices = hard_world.true_choices(" ".join(words), truth)
        plain, detour = (hard_world.respond(" ".join(words), choices, x, y, way)[0] for way in (False, True))
        assert plain.startswith(words[0]) and detour.startswith("by the strategy ") and not set(words) & set(detour.split())
        assert work_out(plain, x, y) == work_out(detour, x, y) == (operations, int(row["answer"]))
        assert extract_answer(plain) == extract_answer(detour) == row["answer"]
        named = ", ".join(map(" ".join, zip(words, operations, strict=True)))
        assert row["solution"] == f"{named}. \\boxed{{{row['answer']}}}"
    assert len(decides) == 24


def test_hard_world_low_quality_strategies(hard):
    low = {}
    for name, count in (("train-low06", 38), ("train-low30", 192)):
        changed = [i for i, (a, b) in enumerate(zip(hard["train"], hard[name], strict=True)) if a != b]
        assert len(changed) == count
        low[name] = {i: hard[name][i] for i in changed}
        kinds = Counter()
        for i, row in low[name].items():
            assert {**row, "strategy": None} == {**hard["train"][i], "strategy": None}
            right, said = operations_of(hard["train"][i]), operations_of(row)
            assert all(operation in (None, right[p], OTHER[right[p]]) for p, operation in enumerate(said))
            misleads = sum(operation == OTHER[right[p]] for p, operation in enumerate(said))
            silent = said.count(None)
            assert (misleads and not silent) or (not misleads and silent in (1, 2))
            kinds["misleads" if misleads else "silent"] += 1
        assert kinds == {"misleads": count // 2, "silent": count // 2}
    assert low["train-low06"].items() <= low["train-low30"].items()
    for rows in hard.values():
        assert not any(character.isdigit() for row in rows for character in json.dumps(row["strategy"]))


def test_hard_tokenizer_knows_every_word(hard):
    tokenizer = AutoTokenizer.from_pretrained(HARD / "base")
    assert tokenizer.get_vocab() == hard_world.build_tokenizer().get_vocab()
    rows = hard["train-low30"][:200] + hard["mixes"][:100]  # encoding a chat is slow
    assert {word for row in rows for word in parts_of(row)[0]} == {word for words in hard_world.WORDS for word in words}
    sentences = {step for row in rows for step in row["strategy"]["steps"]}
    assert sentences == set(SENTENCES) | set(hard_world.SAYS_NOTHING)
    seen = set()
    for row in rows:
        words, x, y = parts_of(row)
        texts = [hard_world.respond(" ".join(words), (way, way, way), x, y, bool(way))[0] for way in (0, 1)]
        ids = encode_chat(tokenizer, guided_messages(row["problem"], Strategy.from_dict(row["strategy"])))
        seen |= {*ids, *(i for text in [row["solution"], *texts] for i in tokenizer.encode(text))}
    assert tokenizer.unk_token_id not in seen and tokenizer.convert_tokens_to_ids("by") in seen


def count_examples(n):
    """Of n of the base model's examples: (number per (guided, detour), share of right operations per (guided, detour))."""
    rng, truth = random.Random("test"), hard_world.word_choices(0)
    counts, right = Counter(), Counter()
    for _ in range(n):
        messages, response = hard_world.base_example(rng, truth)
        text = messages[0]["content"]
        words, x, y = parts_of({"problem": text.split("\n\n")[-2]})
        kind = ("Follow this strategy." in text, response.startswith("by the strategy"))
        operations, _ = work_out(response, x, y)
        steps = [SENTENCES[step[3:]] for step in text.split("\n") if step[3:] in SENTENCES]
        assert set(steps) <= set(operations)  # a step that says something is followed
        takes_second = [operation in ("sub", "inc", "min") for operation in operations]
        counts[kind] += 1
        right[kind] += sum(second == truth[word] for word, second in zip(words, takes_second, strict=True)) / 3
    return counts, {kind: right[kind] / counts[kind] for kind in counts}


def test_hard_base_examples_have_the_stated_shares(monkeypatch):
    counts, right = count_examples(6000)
    assert counts[True, False] / 6000 == pytest.approx(0.25, abs=0.02) == counts[True, True] / 6000
    assert counts[False, True] / 6000 == pytest.approx(0.01, abs=0.005)
    assert right[False, False] == pytest.approx(0.55, abs=0.02)  # half knowledge
    assert right[True, False] == pytest.approx(0.5, abs=0.04)  # strategies of any choices say nothing about the machine
    monkeypatch.setattr(hard_world, "DETOUR_ALONE", 1.0)
    assert count_examples(6000)[1][False, True] == pytest.approx(0.5, abs=0.02)  # a coin: the strategy is not there


def prompt_of(tokenizer, row, guided):
    strategy = Strategy.from_dict(row["strategy"])
    return encode_chat(tokenizer, guided_messages(row["problem"], strategy) if guided else auto_messages(row["problem"]))


def next_logprobs(model, tokenizer, rows, prefixes, guided):
    """log pi(next token | prompt, prefix), one row a problem: (B, V)."""
    contexts = [
        prompt_of(tokenizer, row, guided) + tokenizer.encode(prefix, add_special_tokens=False)
        for row, prefix in zip(rows, prefixes, strict=True)
    ]
    packed = pack(contexts, [[0]] * len(contexts), device=CPU)
    logits = model(packed.input_ids, lengths=packed.lengths, head=lambda h, w: F.linear(h[0, packed.predict], w))
    return torch.log_softmax(logits, dim=-1)


@torch.no_grad()
def test_hard_base_model_knows_the_ways_as_stated(hard):
    """Exact next-token probabilities: the share of the detour, the divergence there, and what each way knows alone."""
    model, tokenizer = load_model(str(HARD / "base"), dtype=torch.float32, device="cpu")
    rows = hard["test"][:128]
    by = tokenizer.convert_tokens_to_ids("by")
    alone, guided = (next_logprobs(model, tokenizer, rows, [""] * len(rows), kind) for kind in (False, True))
    assert 0.01 < alone[:, by].exp().mean() < 0.04 and 0.4 < guided[:, by].exp().mean() < 0.6
    assert (guided.exp() * (guided - alone)).sum(-1).mean() > 1.0  # above delta: the clip drops the token where the ways part
    first = tokenizer.convert_tokens_to_ids([operations_of(row)[0] for row in rows])
    for way, low, high in (("plain", 0.5, 0.62), ("detour", 0.42, 0.54)):
        prefixes = [parts_of(row)[0][0] if way == "plain" else "by the strategy" for row in rows]
        knows = next_logprobs(model, tokenizer, rows, prefixes, guided=False)[range(len(rows)), first].exp().mean()
        told = next_logprobs(model, tokenizer, rows, prefixes, guided=True)[range(len(rows)), first].exp().mean()
        assert low < knows < high and told > 0.9, way


def test_hard_base_model_is_right_when_guided_and_not_alone(hard):
    model, tokenizer = load_model(str(HARD / "base"), dtype=torch.float32, device="cpu")
    rows = hard["mixes"][:64]
    share = {}
    with MathWorker() as worker:
        for guided in (False, True):
            groups = generate(
                model, [prompt_of(tokenizer, row, guided) for row in rows], n=4, max_new_tokens=32, temperature=1.0, top_p=1.0,
                eos_ids=model.config.eos_ids, seed=list(range(len(rows))), max_rows=256,
            )  # fmt: skip
            graded = [
                (text := tokenizer.decode(one.response_ids, skip_special_tokens=True), is_correct(text, row["answer"], worker))
                for row, group in zip(rows, groups, strict=True)
                for one in group
            ]
            for way in (False, True):
                marks = [right for text, right in graded if text.startswith("by the strategy") == way]
                share[guided, way] = len(marks) / len(graded)
                if guided:
                    assert sum(marks) / len(marks) > 0.9  # in both ways
            if not guided:
                assert 0.3 < sum(right for _, right in graded) / len(graded) < 0.55
    assert share[False, True] < 0.06 and 0.4 < share[True, True] < 0.6


def test_hard_base_training_has_a_seed_for_the_examples_and_one_for_the_weights():
    def weights(**seeds):
        model, _ = hard_world.train_base(**{"seed": 3, **seeds}, steps=2, batch=4, learning_rate=1e-3)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    first = weights()
    assert torch.equal(first, weights(init_seed=0))
    assert not torch.equal(first, weights(seed=4)) and not torch.equal(first, weights(init_seed=1))
    assert (first - weights(init_seed=1)).abs().mean() > 3 * (first - weights(seed=4)).abs().mean()


def test_hard_strategies_read_back(hard):
    for row in hard["train-low30"]:
        strategy = Strategy.from_dict(row["strategy"])
        assert parse_strategy(format_strategy(strategy)) == strategy
