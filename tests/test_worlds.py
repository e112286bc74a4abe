"""The two toy worlds: tiny and hard."""

import itertools
import json
import random
import re
from collections import Counter

import pytest
import torch
from transformers import AutoTokenizer

from data import hard_world, tiny_world
from data.problems import load_problems
from grader import is_correct
from model import CausalLM, encode_chat, load_model
from rollout import generate, pack
from strategy import Strategy, auto_messages, guided_messages
from tests.common import ROOT


@pytest.mark.parametrize(("world", "folder"), [(tiny_world, "tiny"), (hard_world, "hard")])
def test_rows_are_those_committed(world, folder):
    files = world.make_rows(0)
    assert sorted(files) == sorted(path.stem for path in (ROOT / "data" / folder).glob("*.jsonl"))
    for name, rows in files.items():
        path = ROOT / f"data/{folder}/{name}.jsonl"
        assert path.read_text(encoding="utf-8") == "".join(json.dumps(row) + "\n" for row in rows)
        assert len(load_problems(path)) == len(rows)


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


@pytest.mark.parametrize(("world", "folder"), [(tiny_world, "tiny"), (hard_world, "hard")])
def test_tokenizer_knows_every_word_and_keeps_digits_apart(world, folder):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / f"data/{folder}/base")
    assert tokenizer.get_vocab() == world.build_tokenizer().get_vocab()
    assert tokenizer.decode(tokenizer.encode("max 9 3 = 9. \\boxed{9}")) == "max 9 3 = 9 . \\boxed{ 9 }"
    rng, truth = random.Random(0), world.machine_choices(0) if world is tiny_world else world.word_choices(0)
    for _ in range(200):  # all words, both ways, and steps that say nothing
        messages, response = world.base_example(rng, truth)
        ids = encode_chat(tokenizer, messages) + tokenizer.encode(response)
        assert tokenizer.unk_token_id not in ids


def test_the_base_learns_no_response_without_its_context(monkeypatch):
    """Equal contexts next to each other are packed once: without `prefixes` the responses after the first would have none."""
    def spy(self, *arguments, prefixes, **settings):
        raise StopIteration(prefixes)

    monkeypatch.setattr(tiny_world, "pack", lambda *_, **settings: pack([[5, 6]] * 2, [[7, 8], [9, 7]], **settings))
    monkeypatch.setattr(CausalLM, "forward", spy)
    with pytest.raises(StopIteration, match=r"\[None, 0, 0\]"):
        tiny_world.train_base(seed=3, steps=2, batch=2, learning_rate=1e-3)


# sentence -> operation, written out again: the world's own table is what is tested
SENTENCES = {
    "Add the second input to the first.": "add",
    "Subtract the second input from the first.": "sub",
    "Double the value.": "double",
    "Increase the value by one.": "inc",
    "Keep the larger of the value and the first input.": "max",
    "Keep the smaller of the value and the first input.": "min",
}
PAIRS = (("add", "sub"), ("double", "inc"), ("max", "min"))


def parts_of(row):
    """(three words, first input, second input), read from the text that the model sees."""
    *words, x, y = re.fullmatch(r"A (\w+) (\w+) (\w+) machine gets (\d) and (\d)\. What comes out\?", row["problem"]).groups()
    return words, int(x), int(y)


def operations_of(row):
    """The three operations that the row's strategy names, None for a step that is missing or says nothing."""
    named = [SENTENCES[step] for step in row["strategy"]["steps"] if step in SENTENCES]
    return [next((name for name in pair if name in named), None) for pair in PAIRS]


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


def test_hard_world_splits_by_families_and_by_operands(hard):
    families = {name: {" ".join(parts_of(row)[0]) for row in rows} for name, rows in hard.items()}
    assert len(families["train"]) == len(families["mixes"]) == 32
    assert families["test"] == families["valid"] == families["train"] and not families["train"] & families["mixes"]
    problems = [row["problem"] for name in ("train", "valid", "test", "mixes") for row in hard[name]]
    assert len(set(problems)) == len(problems) == 640 + 3 * 256
    for name in ("train", "valid", "test", "mixes"):  # every word equally often: none is practised more
        counts = Counter(word for row in hard[name] for word in parts_of(row)[0])
        assert len(counts) == 24 and set(counts.values()) == {len(hard[name]) // 8}


def test_hard_world_words_decide_and_all_ways_give_the_answer(hard):
    truth = hard_world.word_choices(0)
    assert [sum(truth[word] for word in words) for words in hard_world.WORDS] == [4, 4, 4]
    openers = Counter()
    decides = {}  # word -> operation, as the good strategies have it
    for row in hard["train"] + hard["test"] + hard["mixes"]:
        words, x, y = parts_of(row)
        operations = operations_of(row)
        for word, operation in zip(words, operations, strict=True):
            assert decides.setdefault(word, operation) == operation
        choices = hard_world.true_choices(" ".join(words), truth)
        plain, short, detour = (
            hard_world.respond(" ".join(words), choices, x, y, way, row["solution"].split()[0])[0] for way in hard_world.WAYS
        )
        openers[plain.split()[0]] += 1
        assert plain.split()[1] == words[0] and detour.startswith("by the strategy ") and not set(words) & set(detour.split())
        assert work_out(plain, x, y) == work_out(detour, x, y) == (operations, int(row["answer"]))
        named = ", ".join(map(" ".join, zip(words, operations, strict=True)))
        assert row["solution"] == short == f"{plain.split()[0]} {named}. \\boxed{{{row['answer']}}}"
    assert len(decides) == 24 and len(openers) == 8 and min(openers.values()) > len(hard["train"]) / 16


def test_hard_world_low_quality_strategies(hard):
    changed = {}
    for name, count in (("train-low06", 38), ("train-low30", 192)):
        changed[name] = [i for i, row in enumerate(hard[name]) if row != hard["train"][i]]
        kinds = Counter()
        for good, low in ((hard["train"][i], hard[name][i]) for i in changed[name]):
            assert {**low, "strategy": None} == {**good, "strategy": None}
            right, said = operations_of(good), operations_of(low)
            wrong = sum(a not in (None, b) for a, b in zip(said, right, strict=True))
            kinds[wrong > 0, said.count(None) > 0] += 1
            assert said.count(None) < 3
        assert kinds == {(True, False): count // 2, (False, True): count // 2}  # misleads, or leaves open
    assert set(changed["train-low06"]) <= set(changed["train-low30"])
    assert not any(character.isdigit() for rows in hard.values() for row in rows for character in json.dumps(row["strategy"]))


@torch.no_grad()
def test_hard_base_model_is_as_stated(hard, worker):
    """Sampled responses: right when guided, and not alone. The detour, half of the guided ones, is rare alone: at the token
    where the ways part, the divergence is above delta."""
    model, tokenizer = load_model(str(ROOT / "data/hard/base"), dtype=torch.float32, device="cpu")
    settings = {"n": 4, "max_new_tokens": 32, "temperature": 1.0, "top_p": 1.0, "eos_ids": model.config.eos_ids}
    rows, seeds, marks = hard["mixes"][:64], list(range(64)), {}
    for guided in (False, True):
        asks = [(row["problem"], Strategy.from_dict(row["strategy"])) for row in rows]
        prompts = [encode_chat(tokenizer, guided_messages(*ask) if guided else auto_messages(ask[0])) for ask in asks]
        for row, group in zip(rows, generate(model, prompts, **settings, seed=seeds, max_rows=256), strict=True):
            for text in (tokenizer.decode(one.response_ids, skip_special_tokens=True) for one in group):
                way = "detour" if text.startswith("by the strategy") else "plain" if "=" in text else "short"
                marks.setdefault((guided, way), []).append(is_correct(text, row["answer"], worker))
    share = {kind: len(right) / 256 for kind, right in marks.items()}
    right = {kind: sum(right) / len(right) for kind, right in marks.items()}
    assert 0.3 < share[False, "short"] < 0.5 and 0.05 < share[True, "short"] < 0.15
    assert 0 < share[False, "detour"] < 0.06 and 0.4 < share[True, "detour"] < 0.6
    assert right[True, "plain"] > 0.9 and right[True, "detour"] > 0.9 and 0.3 < right[False, "plain"] < 0.55
    assert right[False, "short"] < 0.3 and right[True, "short"] < 0.5  # half of what it learnt there is a slip
