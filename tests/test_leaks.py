"""The leak filter, measured on labelled examples."""

import time
from collections import Counter
from dataclasses import replace

import pytest

import strategy as strategy_module
from grader import is_correct
from strategy import Strategy
from tests.common import ROOT, _starter_family, _starter_rows, leak_examples

LEAK_PROBLEM = "A farm has 30 hens and 12 ducks. Each hen lays three eggs a week, and a quarter of them break. Enough?"

LEAK_SOLUTION = "The hens lay 30 * 3 = 90 eggs. Broken: 90/4 = 22.5. In 52 weeks 4,680, less 1170, so $\\frac{7}{8}$: 37 - 5."


def with_step(step):
    return Strategy("rate problem", "Find the rate, then scale it.", ("Find the rate.", step))


@pytest.mark.parametrize(
    "step, answer",
    [
        ("This gives 25 eggs.", "25"),
        ("This gives twenty-five eggs.", "25"),
        ("Twenty five is what remains.", "25"),
        ("It is $25$.", "25"),
        ("It is 25.0.", "25"),
        ("Take \\(x = -25\\).", "25"),
        ("Take minus twenty-five.", "-25"),
        ("It is 1{,}234 then.", "1234"),
        ("It is 1,234 then.", "1234"),
        ("It is one thousand two hundred and thirty-four.", "1,234"),
        ("Scale it to 1.5 million.", "1500000"),
        ("The share is 0.5.", "\\frac{1}{2}"),
        ("The share is 1/2.", "0.5"),
        ("The share is \\dfrac12.", "0.5"),
        ("The share is one half.", "1/2"),
        ("The share is ½.", "0.5"),
        ("The share is 50 percent.", "\\frac12"),
        ("The share is 50\\%.", "0.5"),
        ("The share is seventy-five percent.", "3/4"),
        ("So take two dozen.", "24"),
        ("It is ２５, which is left.", "25"),
        ("It is 1\u202f234 then.", "1234"),
        ("That comes to 3i.", "3i"),
        ("Then it must be 2x.", "2x"),
        ("It is two thirds of it.", "2/3"),
        ("Take 3 1/2 hours.", "3.5"),
        ("Take $3\\frac{1}{2}$ hours.", "\\frac{7}{2}"),
        ("Take 3 \\times 10^{5} of them.", "300000"),
        ("Simplify to $2 \\sqrt{3}$.", "2\\sqrt{3}"),
        ("Simplify to 2√3.", "2\\sqrt3"),
        ("Simplify to 2*sqrt(3).", "$2\\sqrt{3}$"),
        ("The point is $\\left( 3, 4 \\right)$.", "(3,4)"),
        ("It becomes $\\left(x + 1\\right) (x-2)$.", "(x+1)(x-2)"),
        ("It comes to $\\dfrac{\\pi}{x}$.", "\\frac{\\pi}{x}"),
        ("So it is Monday.", "\\text{Monday}"),
        ("Conclude that it is even.", "\\text{even}"),
        ("So the answer is yes.", "Yes"),
        ("Choose option (C).", "C"),
        ("Write 861 in that base.", "861_{12}"),
        ("So the count is two.", "2"),
        ("There are two of them.", "2"),
        ("The answer is 0.", "0"),
        ("Factor out 7.", "7"),
        ("Multiply to get 4,680.", "25"),  # from here on the solution's values
        ("Multiply to get four thousand six hundred eighty.", "25"),
        ("Subtract 1,170.", "25"),
        ("Break it into 22.5 parts.", "25"),
        ("Keep 7/8 of it.", "25"),
        ("Keep 87.5 percent of it.", "25"),
        ("Then $x=37$.", "25"),
        ("Then 5 are left.", "25"),
    ],
)  # fmt: skip
def test_leaks_finds_the_number_in_every_spelling(step, answer):
    found = strategy_module.leaks(with_step(step), LEAK_PROBLEM, LEAK_SOLUTION, answer)
    assert found and all("step 2" in reason for reason in found), found
    # The same text beside a row to which these numbers mean nothing.
    assert strategy_module.leaks(with_step(step), "What is it?", "It follows.", "101") == []


@pytest.mark.parametrize(
    "step, answer",
    [
        ("Multiply the 30 hens by three.", "25"),  # the problem's own numbers are no computation
        ("Divide both sides by 2.", "2"),
        ("Set up two unknowns.", "2"),
        ("Take the square root of both sides.", "2"),
        ("Write $x^2 + bx + c$ and $a_2$.", "2"),
        ("Write $b^2 - 4ac$.", "4"),
        ("Go on with step 3.", "3"),
        ("Use the third equation and the 25th term.", "25"),
        ("Set it equal to zero.", "0"),
        ("Make the leading coefficient equal to 1.", "1"),
        ("Work in base 10.", "10"),
        ("The angles add up to 180 degrees.", "25"),
        ("An hour has 60 minutes.", "60"),
        ("Distinguish three cases.", "3"),
        ("Use how many eggs each hen lays: three eggs.", "3"),  # as the problem says it
        ("Check whether it is even or odd.", "\\text{odd}"),
        ("No other case remains.", "No"),
        ("Consider a and b.", "A"),
        ("Find the side AB.", "B"),
        ("Use the volume $\\frac{4}{3} \\pi r^3$.", "25"),
        ("Use $\\frac{n(n-3)}{2}$.", "25"),
        ("Write $2x+1$ for the odd ones.", "x+1"),
        ("Compare 1234 with 12345.", "234"),
        ("Multiply 125 by x.", "25"),
    ],
)  # fmt: skip
def test_leaks_leaves_harmless_numbers_alone(step, answer):
    solution = LEAK_SOLUTION + " 180 degrees, 60 minutes, 4/3, n-3, two, 10."
    assert strategy_module.leaks(with_step(step), LEAK_PROBLEM, solution, answer) == []


def test_leaks_outlasts_what_a_stuck_model_writes():
    start = time.perf_counter()
    for piece in ("9", "9,", "/9", "9 9/", "{", "x9", "twenty ", "\\frac", "\\sqrt(", "divide 9 ", "\u4e009"):
        text = (piece * 1500).strip()
        strategy_module.leaks(with_step(text), "What is 9?", text, text[:1000])
    assert time.perf_counter() - start < 10
    assert strategy_module.leaks(with_step("It is 8" + "9" * 5000), "p", "9" * 5000, "9" * 99) == []


# What the filter gets wrong in data/leak_examples.jsonl: (problem's id, candidate, label). Other languages; rounded values and
# values in between that look harmless; small numbers; expressions with their terms in another order. And false alarms.
LEAKS_MISSED = {
    ("cyclist", 2, "computed"), ("cyclist", 3, "computed"), ("cyclist", 4, "answer"), ("jacket", 3, "computed"),
    ("pizza", 4, "answer"), ("mean", 4, "answer"), ("rectangle", 4, "answer"), ("marbles", 4, "answer"),
    ("petrol", 4, "answer"), ("radicals", 4, "answer"), ("digits", 4, "answer"), ("incircle", 4, "answer"),
    ("iterate", 3, "computed"), ("logarithm", 3, "answer"), ("logarithm", 4, "answer"), ("recursion", 3, "computed"),
    ("recursion", 4, "answer"), ("minimum", 4, "answer"), ("orthocentre", 3, "computed"),
}  # fmt: skip

LEAKS_ALARMED = {("digits", 2, "no"), ("incircle", 2, "no"), ("recursion", 2, "no"), ("stones", 2, "no")}


def test_leaks_on_our_labelled_examples(eval_worker):
    """The labels were set before the filter ran (data/README.md has their rule), and both READMEs state these figures."""
    cases, wrong = Counter(), set()
    for i, (row, candidate) in enumerate(leak_examples()):
        assert i % 4 or is_correct(row["solution"], row["answer"], eval_worker)
        strategy, label = Strategy.from_dict(candidate["strategy"]), candidate["leaks"]
        found = strategy_module.leaks(strategy, row["problem"], row["solution"], row["answer"])
        cases[bool(found), {"no": False, "answer": True, "computed": True}[label]] += 1
        if bool(found) != (label != "no"):
            wrong.add((row["id"], i % 4 + 1, label))
    print(f"found {cases[True, True]}, missed {cases[False, True]}, false alarms {cases[True, False]}, of {cases.total()}")
    assert wrong == LEAKS_MISSED | LEAKS_ALARMED
    figures = f"{cases[True, True]} of {cases[True, True] + cases[False, True]} leaks"
    alarms = f"{cases[True, False]} false alarms on the other {cases[True, False] + cases[False, False]}"
    for file in ("README.md", "data/README.md"):
        text = " ".join((ROOT / file).read_text(encoding="utf-8").split())
        assert f"{cases.total()} " in text and figures in text and alarms in text, file


def test_leaks_spares_the_starter_set_and_finds_what_is_planted_into_it():
    steps = ("Check that you get {}.", "Report ${}$ as the answer.", "The total is {}, as asked.")
    alarms = []
    for i, row in enumerate(_starter_rows("train", "test", "heldout")):
        strategy = Strategy.from_dict(row["strategy"])
        texts = row["problem"], row["solution"], row["answer"]
        if found := strategy_module.leaks(strategy, *texts):
            alarms.append((_starter_family(row), found))
        for step in steps if i % 5 == 0 else ():
            worse = replace(strategy, steps=(*strategy.steps, step.format(row["answer"])))
            assert strategy_module.leaks(worse, *texts), (row["id"], step)
    # "the two times", where two is the answer too: the one false alarm
    ((family, found),) = alarms
    assert family == "work-together" and len(found) == 1 and "the answer two in step 1" in found[0]
