"""The starter set: every answer by another route."""

import itertools
import json
import math
import re
import sys
from collections import defaultdict
from datetime import datetime
from fractions import Fraction

from data import starter
from strategy import Strategy, auto_messages, guided_messages
from tests.common import ROOT, _starter_family, _starter_rows

STRICT = {"__builtins__": {}, "Fraction": Fraction}


def by_family(*names):
    """{family: its rows}."""
    groups = defaultdict(list)
    for row in _starter_rows(*names):
        groups[_starter_family(row)].append(row)
    return groups


def numbers(text):
    """Every number of a text, in order: "3 pens at $1.50" -> [3, 3/2]."""
    return [Fraction(n) for n in re.findall(r"\d+(?:\.\d+)?", text)]


def evaluate(text, **names):
    """An arithmetic expression or an answer, over fractions; ^ is a power."""
    text = re.sub(r"\\frac\{(\d+)\}\{(\d+)\}", r"\1/\2", text)
    text = re.sub(r"(?<=\d)([a-z])", r"*\1", text)
    text = re.sub(r"\d+(?:\.\d+)?", lambda m: f"Fraction('{m[0]}')", text).replace("^", "**")
    return eval(text, STRICT, names)


def equations(text):
    """The (left, right) pairs of every chain of equal signs whose two sides are plain arithmetic. A side may be next to words
    ("that is 3 * 4 = 12 apples"), not next to an operator and a letter ("x + 4 = 12")."""
    for sentence in re.split(r"[,;:?]\s|\.(?:\s|$)|\n", text):
        for left, right in itertools.pairwise(sentence.split(" = ")):
            start = re.search(r"(?:^|[A-Za-z] )((?:\(|\d|-\d)[\d.()+\-*/^ ]*)$", left)
            end = re.match(r"(-?(?:[\d(][\d.()+\-*/^ ]*)?[\d)])(?=$| [A-Za-z])", right)
            if start and end:
                yield start[1], end[1]


def test_files_are_what_the_generator_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["starter.py", "--out", str(tmp_path), "--seed", "0"])
    starter.main()
    for name in ("train", "test", "heldout"):
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (ROOT / f"data/starter/{name}.jsonl").read_bytes()


def test_transfer_rows_are_guided_by_family_and_no_operands_are_seen_twice():
    """The SFT prompt of a row with the strategy in its problem is the guided prompt of RL, to the letter."""
    alone, guided = ["one-step", "percent-rest"], ["ages", "nth-term"]
    rows = starter.build_transfer(alone, guided, (6, 3, 2), seed=0)
    assert {name: len(group) for name, group in rows.items()} == {"warm": 36, "rl": 6, "test": 4, "test_alone": 4}
    plain = [row for row in rows["warm"] if "strategy" in row]
    assert {_starter_family(row) for row in plain} == set(alone) and len(plain) == 12
    drawn = {row["id"]: row for name in alone + guided for row in starter.draw(name, starter.TRAINED[name], 0, 11)}
    for row in rows["warm"]:
        source = drawn[row["id"].removesuffix("-guided")]
        if row not in plain:
            strategy = Strategy.from_dict(source["strategy"])
            assert auto_messages(row["problem"]) == guided_messages(source["problem"], strategy)
            assert "strategy" not in row and row["solution"] == source["solution"]
    warm, *others = ({row["id"].removesuffix("-guided") for row in rows[name]} for name in ("warm", "rl", "test", "test_alone"))
    assert len(warm.union(*others)) == 24 + 6 + 4 + 4
    assert {_starter_family(row) for row in rows["rl"] + rows["test"]} == set(guided)
    first, *others = rows["rl"]
    wrong = re.sub(r"= \d+", "= 77", first["solution"])  # the arithmetic, not the plan
    assert [starter.same_plan(text, first) for text in (wrong, *(row["solution"] for row in others))] == [1, *[0] * len(others)]


def test_rows_have_every_field_and_no_text_twice():
    counts = [{family: len(rows) for family, rows in by_family(name).items()} for name in ("train", "test", "heldout")]
    assert len(counts[0]) == 37 and counts[0].keys() == counts[1].keys() and counts[2] == {"mixture": 25, "neither": 25}
    assert set(counts[0].values()) == {20} and set(counts[1].values()) == {4}
    rows = _starter_rows("train", "test", "heldout")
    assert len({row["id"] for row in rows}) == len({row["problem"] for row in rows}) == len(rows)
    for row in rows:
        assert list(row) == ["id", "problem", "answer", "solution", "strategy"]
        assert list(row["strategy"]) == ["type", "strategy", "steps"] and 2 <= len(row["strategy"]["steps"]) <= 5
        assert row["solution"].endswith(f"\nThe answer is \\boxed{{{row['answer']}}}") and row["solution"].count("\\boxed") == 1
        for text in [row["problem"], row["answer"], row["solution"], *row["strategy"]["steps"]]:
            assert text and text == text.strip() and "  " not in text and text.isascii(), row


def test_operands_of_test_are_not_in_train():
    """By the texts alone: no test problem has the same set of numbers as a train problem of its family."""
    train, test = by_family("train"), by_family("test")
    # numbers that belong to a wording and not to the instance
    constant = {"units-digit": {10}, "dice-sum": {1}, "nth-term": {1, 2, 3, 4}}
    for family in train:
        seen, asked = (
            {frozenset(numbers(row["problem"])) - constant.get(family, set()) for row in rows}
            for rows in (train[family], test[family])
        )
        assert not seen & asked, (family, seen & asked)


def test_strategies_hold_no_number():
    # "one" and "two" belong to the structure (one unit of time, two groups); no larger number word has a place in a strategy
    words = r"\d|\b(three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|twenty|thirty|forty|fifty|thousand)\b"
    for name, strategies in starter.STRATEGIES.items():
        assert not re.search(words, json.dumps(strategies).lower()), name


def test_solutions_state_true_equations():
    for row in _starter_rows("train", "test", "heldout"):
        found = list(equations(row["solution"]))
        assert found and all(evaluate(left) == evaluate(right) for left, right in found), row


# The first row of a family whose words are in the problem says what holds for its text t, the numbers n in it, in their order,
# and the answer x: by brute force, or with x put back into the story.
ROUTES = [json.loads(line) for line in (ROOT / "tests/starter_routes.jsonl").read_text().splitlines()]


def ways(n, k):
    return len([*itertools.combinations(range(int(n)), int(k))])


def share(outcomes):
    return Fraction(sum(outcomes), len(outcomes))


def minutes(text):
    start, end = (datetime.strptime(time, "%I:%M %p") for time in re.findall(r"\d+:\d+ [AP]M", text))
    return (end - start).total_seconds() / 60


HELPERS = {"ways": ways, "share": share, "minutes": minutes, "count": itertools.count, "permutations": itertools.permutations}


def right_triangle(t, n, answer):
    outside, inside = map(int, re.fullmatch(r"(\d+)(?:\\sqrt\{(\d+)\})?", answer).groups(default="1"))
    return all(inside % (r * r) for r in range(2, 50)) and outside**2 * inside == n[0] ** 2 + n[1] ** 2


def product(t, n, answer):
    a, b = (f"x + {n[0]}", f"x + {n[1]}") if "patio" in t else re.findall(r"x [+-] \d+", t)
    return all(evaluate(answer, x=x) == evaluate(a, x=x) * evaluate(b, x=x) for x in range(-3, 5))


def nth_term(t, n, answer):
    return [evaluate(answer, n=i) for i in (1, 2, 3, 4)] == (n[:4] if "sequence" in t else n[:8:2])


# answers that are expressions
WRITTEN = {"right-triangle": right_triangle, "product-expression": product, "nth-term": nth_term}


def test_answers_by_another_route():
    groups = by_family("train", "test", "heldout")
    assert groups.keys() == {route["family"] for route in ROUTES} | WRITTEN.keys()
    for family, row in ((family, row) for family, rows in groups.items() for row in rows):
        text, n = row["problem"], numbers(row["problem"])
        if family in WRITTEN:
            assert WRITTEN[family](text, n, row["answer"]), row
            continue
        route = next(route for route in ROUTES if route["family"] == family and re.search(route["words"], text))
        fraction = re.fullmatch(r"\\frac\{(\d+)\}\{(\d+)\}", row["answer"])
        assert not fraction or math.gcd(int(fraction[1]), int(fraction[2])) == 1, row
        x = evaluate(row["answer"])
        assert eval(route["holds"], HELPERS | {"t": text, "n": n, "x": x}), row
        assert not eval(route["holds"], HELPERS | {"t": text, "n": n, "x": x + 1}), row  # the route can fail
