"""The starter set: every answer by another route."""

import importlib.util
import itertools
import json
import math
import random
import re
import sys
from datetime import datetime
from fractions import Fraction

import pytest

from tests.common import _starter_data, _starter_family, _starter_rows


def _starter():
    """data/starter.py as a module."""
    spec = importlib.util.spec_from_file_location("starter_generator", _starter_data() / "starter.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _starter_by_family(*names):
    """{family: its rows}."""
    groups = {}
    for row in _starter_rows(*names):
        groups.setdefault(_starter_family(row), []).append(row)
    return groups


def _starter_numbers(text):
    """Every number of a text, in order: "3 pens at $1.50" -> [3, 3/2]."""
    return [Fraction(n) for n in re.findall(r"\d+(?:\.\d+)?", text)]


def _starter_value(text):
    """A plain answer as a number: "7", "2.50" or "\\frac{7}{3}"."""
    fraction = re.fullmatch(r"\\frac\{(\d+)\}\{(\d+)\}", text)
    return Fraction(int(fraction[1]), int(fraction[2])) if fraction else Fraction(text)


def _starter_evaluate(text, **names):
    """An arithmetic expression over fractions; ^ is a power."""
    text = re.sub(r"(?<=\d)([a-z])", r"*\1", text)
    text = re.sub(r"\d+(?:\.\d+)?", lambda m: f"Fraction('{m[0]}')", text).replace("^", "**")
    return eval(text, {"__builtins__": {}, "Fraction": Fraction}, names)


def _starter_equations(text):
    """The (left, right) pairs of every chain of equal signs whose two sides are plain arithmetic.

    A side may stand next to words ("that is 3 * 4 = 12 apples"), not next to an operator and a letter ("x + 4 = 12").
    """
    found = []
    for sentence in re.split(r"[,;:?]\s|\.(?:\s|$)|\n", text):
        sides = sentence.split(" = ")
        for left, right in itertools.pairwise(sides):
            start = re.search(r"(?:^|[A-Za-z] )((?:\(|\d|-\d)[\d.()+\-*/^ ]*)$", left)
            end = re.match(r"(-?(?:[\d(][\d.()+\-*/^ ]*)?[\d)])(?=$| [A-Za-z])", right)
            if start and end:
                found.append((start[1], end[1]))
    return found


def test_starter_files_are_what_the_generator_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["starter.py", "--out", str(tmp_path / "new"), "--seed", "0"])
    _starter().main()
    for name in ("train", "test", "heldout"):
        committed = _starter_data() / "starter" / f"{name}.jsonl"
        assert (tmp_path / "new" / f"{name}.jsonl").read_bytes() == committed.read_bytes()
    assert "train.jsonl: 740 rows" in capsys.readouterr().out


def test_starter_build_is_pure_and_depends_on_the_seed():
    starter = _starter()
    random.seed(1)
    state = random.getstate()
    first = starter.build(0)
    assert random.getstate() == state
    random.seed(2)
    assert starter.build(0) == first
    assert {r["problem"] for r in starter.build(1)[0]} != {r["problem"] for r in first[0]}


def test_starter_counts():
    train, test, held = (_starter_by_family(name) for name in ("train", "test", "heldout"))
    assert len(train) == 37 and train.keys() == test.keys()
    assert held.keys() == {"mixture", "neither"} and not held.keys() & train.keys()
    assert all(len(rows) == 20 for rows in train.values())
    assert all(len(rows) == 4 for rows in test.values())
    assert all(len(rows) == 25 for rows in held.values())


def test_starter_ids_and_texts_are_unique_and_fields_are_filled():
    rows = _starter_rows("train", "test", "heldout")
    assert len({row["id"] for row in rows}) == len({row["problem"] for row in rows}) == len(rows)
    for row in rows:
        assert list(row) == ["id", "problem", "answer", "solution", "strategy"]
        assert list(row["strategy"]) == ["type", "strategy", "steps"]
        assert 2 <= len(row["strategy"]["steps"]) <= 5
        texts = [row["problem"], row["answer"], row["solution"], row["strategy"]["type"], row["strategy"]["strategy"]]
        for text in texts + row["strategy"]["steps"]:
            assert isinstance(text, str) and text and text == text.strip() and "  " not in text and text.isascii(), row


def test_starter_test_operands_are_not_in_train():
    """By the texts alone: no test problem has the same set of numbers as a train problem of its family."""
    train, test = _starter_by_family("train"), _starter_by_family("test")
    # numbers that belong to a wording and not to the instance
    constant = {"units-digit": {10}, "dice-sum": {1}, "nth-term": {1, 2, 3, 4}}
    for family in train:
        keys = [
            {frozenset(_starter_numbers(row["problem"])) - constant.get(family, set()) for row in rows}
            for rows in (train[family], test[family])
        ]
        assert not keys[0] & keys[1], (family, keys[0] & keys[1])


def test_starter_operands_stand_in_the_text():
    """The split goes by the operands a family returns, so these must be the numbers the reader sees."""
    starter = _starter()
    for name, family in starter.TRAINED + starter.HELD_OUT:
        rng = random.Random(f"operands-{name}")
        for item in filter(None, (family(rng) for _ in range(60))):
            missing = {Fraction(str(n)) for n in item[0]} - set(_starter_numbers(item[1]))
            assert not missing, (name, item[0], item[1])


def test_starter_strategies_hold_no_number_and_do_not_depend_on_the_instance():
    # "one" and "two" are structural (one unit of time, two groups); no larger number word has a place in a strategy
    words = r"\b(three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|twenty|thirty|forty|fifty|thousand)\b"
    for family, rows in _starter_by_family("train", "test", "heldout").items():
        texts = {json.dumps(row["strategy"]).lower() for row in rows}
        # at most four texts for all the rows of a family: one that followed the operands would differ from row to row
        assert len(texts) <= 4, (family, len(texts))
        for text in texts:
            assert not re.search(r"\d", text) and not re.search(words, text), (family, text)


def test_starter_solutions_end_in_the_boxed_answer():
    for row in _starter_rows("train", "test", "heldout"):
        assert row["solution"].endswith(f"\nThe answer is \\boxed{{{row['answer']}}}"), row["id"]
        assert row["solution"].count("\\boxed") == 1


def test_starter_solutions_state_true_equations():
    for family, rows in _starter_by_family("train", "test", "heldout").items():
        for row in rows:
            equations = _starter_equations(row["solution"])
            assert equations, (family, row["solution"])
            for left, right in equations:
                assert _starter_evaluate(left) == _starter_evaluate(right), (row["id"], left, right)


def test_starter_equation_finder():
    text = (
        "So 3x + 6 = 153 holds, that is 2 * (3 + 4) = 14 = 28 / 2 apples.\n"
        "Then x is 2.50 * 2 = 5. And 1/2 + 1/3 = 5/6, and 7 = 20 - x, and 3 * 2 = 6 and 6 * 2 = 12."
    )
    found = [("2 * (3 + 4)", "14"), ("14", "28 / 2"), ("2.50 * 2", "5"), ("1/2 + 1/3", "5/6"), ("3 * 2", "6"), ("6 * 2", "12")]
    assert _starter_equations(text) == found
    assert _starter_evaluate("3n + 2^2", n=5) == 19 and _starter_evaluate("1 / (5/6)") == Fraction(6, 5)


def _starter_money_checks():
    """{family: f(problem, numbers in the text, answer) -> is the answer right}, not by the generator's route."""

    def one_step(text, n, x):
        if "together" in text or "that day" in text:
            return x - n[0] == n[1]
        if "left" in text:
            return x + n[1] == n[0]
        return x * n[1] == n[0] if "equally" in text or "in each pot" in text else x / n[0] == n[1]

    def change(text, n, x):
        many, price, few, cost, bill = n if "buys" in text else (n[2], n[0], n[3], n[1], n[4])
        return sum([price] * int(many) + [cost] * int(few)) + x == bill

    def profit(text, n, x):
        if len(n) == 2:
            return n[0] * (100 + (x if "profit" in text else -x)) / 100 == n[1]
        count, cost, broken, price = n if "vases" in text else (n[1], n[0], n[2], n[3])
        return sum([price] * int(count - broken)) == cost + x

    def reverse(text, n, x):
        p, new = (n[1], n[0]) if "runners" in text else n
        return x + (x * p / 100 if re.search("raise|more", text) else -x * p / 100) == new

    def ratio(text, n, x):
        a, b, total = (n[1], n[2], n[0]) if "share" in text else n
        return x * b == (total - x) * a

    def convert(text, n, x):
        factor = 100 if "centimeters" in text else 60 if "minutes" in text else 1000
        whole, piece = (n[1], n[0]) if re.search("radio|lamp", text) else n
        return x * piece == whole * factor

    return {
        "one-step": one_step,
        "change": change,
        "profit": profit,
        "reverse-percent": reverse,
        "unit-conversion": convert,
        "ratio-share": ratio,
        "packs": lambda text, n, x: x * n[3] + n[2] == n[0] * n[1],
        "unit-rate": lambda text, n, x: x * n[1] == n[0] * n[2],
        "percent-rest": lambda text, n, x: x / n[0] + n[1] / 100 == 1,
        "average-needed": lambda text, n, x: sum([n[1]] * int(n[0]) + [x]) / (n[0] + 1) == n[2],
        "fraction-left": lambda text, n, x: _starter_left(n) == x,
        "discount-tax": lambda text, n, x: _starter_price(text, n) == x,
    }


def _starter_left(n):
    """What is left of n[0] after the first fraction and then the second, in single units."""
    things, a, b, c, d = (int(v) for v in n)
    things -= sum(1 for i in range(things) if i % b < a)
    return things - sum(1 for i in range(things) if i % d < c)


def _starter_price(text, n):
    """The price in dollars after the discount and the tax, checked to be whole cents."""
    price, off, tax = n if "with a price" in text else (n[1], n[0], n[2])
    final = (price - price * off / 100) * (1 + tax / 100)
    assert (100 * final).denominator == 1, text
    return final


def _starter_equation_checks():
    """As above, for equations, ages, motion and geometry: the answer is put back into the text."""

    def consecutive(text, n, x):
        step = 1 if "consecutive integers" in text else 2
        signs = range(int(n[0])) if "smallest" in text else range(0, -int(n[0]), -1)
        odd = "odd" in text
        return sum(x + step * i for i in signs) == n[1] and (step == 1 or x % 2 == odd)

    def ages(text, n, x):
        if "sum of their ages" in text or "add up" in text:
            return (x + n[1]) + (x / n[0] + n[1]) == n[2]
        return x + n[0] + n[1] == n[2] * (x + n[1])

    def heads_legs(text, n, x):
        legs = {"rabbits": (2, 4), "tricycles": (2, 3), "stools": (3, 4), "ants": (6, 8)}
        few, many = next(legs[kind] for kind in legs if kind in text)
        return [b for b in range(int(n[0]) + 1) if few * (n[0] - b) + many * b == n[1]] == [x]

    def two_legs(text, n, x):
        times = (n[0], n[2]) if "hour at" in text or "hours at" in text else (n[0] / n[1], n[2] / n[3])
        return sum(t * (v - x) for t, v in zip(times, (n[1], n[3]), strict=True)) == 0  # gains and losses balance

    def meet(text, n, x):
        return n[1] * x + n[2] * x == n[0] if "towards" in text else n[0] * (n[1] + x) == n[2] * x

    def elapsed(text, n, x):
        start, end = (datetime.strptime(t, "%I:%M %p") for t in re.findall(r"\d+:\d+ [AP]M", text))
        return (end - start).total_seconds() == 60 * x

    def rectangle(text, n, x):
        more, around = n if "garden" in text else n[::-1]
        return [w * (w + more) for w in range(1, int(around)) if w + w + more + w + w + more == around] == [x]

    return {
        "consecutive": consecutive,
        "ages": ages,
        "heads-legs": heads_legs,
        "two-legs": two_legs,
        "meet-or-chase": meet,
        "elapsed-time": elapsed,
        "rectangle-area": rectangle,
        "linear-undo": lambda text, n, x: n[0] * x + n[1] == n[2],
        "linear-both-sides": lambda text, n, x: n[0] + n[1] * x == n[2] + n[3] * x,
        "work-together": lambda text, n, x: x / n[0] + x / n[1] == 1,
        "triangle-angles": lambda text, n, x: (
            [max(a, n[0] * a, a + n[1]) for a in range(1, 180) if a + n[0] * a + a + n[1] == 180] == [x]
        ),
        "mixture": lambda text, n, x: (
            (n[0] * x + n[1] * n[2]) / (x + n[1]) == n[3] if "salt" in text else (n[0] * n[1] + x * n[2]) / (n[0] + x) == n[3]
        ),
    }


def _starter_counting_checks():
    """As above, for number theory, counting, probability and sums: by listing and counting."""

    def committee(text, n, x):
        boys, girls, k, j = (int(v) for v in n)
        return x == sum(
            1 for _ in itertools.product(itertools.combinations(range(boys), k), itertools.combinations(range(girls), j))
        )

    def draw_two(text, n, x):
        balls = "r" * int(n[0]) + "b" * int(n[1])
        draws = list(itertools.permutations(balls, 2))
        return x == Fraction(draws.count(("r", "r")), len(draws))

    def dice(text, n, x):
        sides = range(1, int(max(n[0], n[2])) + 1)  # "n faces numbered from 1 to n ... s"
        rolls = [a + b for a in sides for b in sides]
        return n[0] == n[2] and x == Fraction(rolls.count(int(n[3])), len(rolls))

    def pairs(text, n, x):
        size, times = n if "league" in text else n[::-1]
        return x == times * len(list(itertools.combinations(range(int(size)), 2)))

    def arithmetic(text, n, x):
        first, step, count = n
        return x == sum(first + i * step for i in range(int(count)))

    def units(text, n, x):
        base, exponent = n[1::-1] if "factors" in text else n[:2]
        return pow(int(base), int(exponent), 10) == x

    return {
        "committee": committee,
        "draw-two": draw_two,
        "dice-sum": dice,
        "pairs": pairs,
        "arithmetic-sum": arithmetic,
        "units-digit": units,
        "greatest-divisor": lambda text, n, x: x == max(d for d in range(1, 500) if n[0] % d == 0 and n[1] % d == 0),
        "least-multiple": lambda text, n, x: x == next(m for m in itertools.count(1) if m % n[0] == m % n[1] == 0),
        "two-remainders": lambda text, n, x: (
            x
            == next(
                m
                for m in itertools.count(1)
                if (m % n[1] == n[0] and m % n[3] == n[2] if "integer" in text else m % n[0] == n[1] and m % n[2] == n[3])
            )
        ),
        "divisor-count": lambda text, n, x: x == sum(n[0] % d == 0 for d in range(1, int(n[0]) + 1)),
        "count-multiples": lambda text, n, x: x == sum(m % n[2] == 0 for m in range(int(n[0]), int(n[1]) + 1)),
        "neither": lambda text, n, x: (
            x == int(n[0]) - len(set(range(int(n[1]))) | set(range(int(n[1] - n[3]), int(n[1] - n[3] + n[2]))))
        ),
    }


def _starter_expression_checks():
    """As above, for answers that are expressions: f(problem, numbers, answer text)."""

    def right_triangle(text, n, answer):
        outside, inside = re.fullmatch(r"(\d+)(?:\\sqrt\{(\d+)\})?", answer).groups(default="1")
        free = all(int(inside) % (r * r) for r in range(2, 50))
        return free and int(outside) ** 2 * int(inside) == n[0] ** 2 + n[1] ** 2

    def product(text, n, answer):
        if "patio" in text:
            return all(_starter_evaluate(answer, x=x) == (x + n[0]) * (x + n[1]) for x in range(5))
        left, right = re.findall(r"x [+-] \d+", text)
        return all(
            _starter_evaluate(answer, x=x) == _starter_evaluate(left, x=x) * _starter_evaluate(right, x=x) for x in range(-3, 5)
        )

    def nth_term(text, n, answer):
        terms = n[:4] if "sequence" in text else n[:8:2]
        return [_starter_evaluate(answer, n=i) for i in (1, 2, 3, 4)] == terms

    return {"right-triangle": right_triangle, "product-expression": product, "nth-term": nth_term}


def test_starter_answers_by_another_route():
    """Every answer again from the numbers in the text: by brute force, or by putting it back into the story."""
    plain = _starter_money_checks() | _starter_equation_checks() | _starter_counting_checks()
    written = _starter_expression_checks()
    groups = _starter_by_family("train", "test", "heldout")
    assert groups.keys() == plain.keys() | written.keys()
    for family, rows in groups.items():
        for row in rows:
            text, numbers, answer = row["problem"], _starter_numbers(row["problem"]), row["answer"]
            right = (
                written[family](text, numbers, answer)
                if family in written
                else plain[family](text, numbers, _starter_value(answer))
            )
            assert right, (row["id"], text, answer)
            if family not in written:  # the check can fail: a neighboring answer does not pass
                assert not plain[family](text, numbers, _starter_value(answer) + 1), row["id"]


def test_starter_fractions_are_in_lowest_terms_and_every_form_occurs():
    answers = [row["answer"] for row in _starter_rows("train")]
    fractions = [re.fullmatch(r"\\frac\{(\d+)\}\{(\d+)\}", a) for a in answers]
    fractions = [(int(m[1]), int(m[2])) for m in fractions if m]
    assert len(fractions) > 60 and all(math.gcd(a, b) == 1 and b > 1 for a, b in fractions)
    assert sum(bool(re.fullmatch(r"\d+", a)) for a in answers) > 300
    assert sum(bool(re.fullmatch(r"\d+\.\d\d", a)) for a in answers) >= 40
    assert sum("sqrt" in a for a in answers) >= 10
    assert sum("x^2" in a for a in answers) == 20


def test_starter_draw_raises_where_a_family_runs_out():
    starter = _starter()
    item = ((1, 2), "text", "3", "solution", {"type": "t", "strategy": "s", "steps": ["u"]})
    with pytest.raises(ValueError, match="family narrow: only 1 of 2 rows"):
        starter.draw("narrow", lambda rng: item, 0, 2)
    with pytest.raises(ValueError, match="no digit"):
        starter.draw("leaky", lambda rng: (*item[:4], {"type": "t", "strategy": "add 2", "steps": []}), 0, 1)


def test_starter_answers_are_gradable():
    """A public grader reads every form of answer and finds it equal to itself in a box, and unequal to the next one."""
    grader = pytest.importorskip("math_verify")
    rows = [rows[0] for rows in _starter_by_family("train", "heldout").values()]
    parsed = [grader.parse(f"\\boxed{{{row['answer']}}}", parsing_timeout=None) for row in rows]
    for row, left in zip(rows, parsed, strict=True):
        assert left, row["answer"]
        gold = grader.parse(f"${row['answer']}$", parsing_timeout=None)
        assert grader.verify(gold, left, timeout_seconds=None), row["answer"]
    for (row, left), (other, right) in itertools.pairwise(zip(rows, parsed, strict=True)):
        assert row["answer"] == other["answer"] or not grader.verify(left, right, timeout_seconds=None)
