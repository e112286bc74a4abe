"""The leak filter, measured on labelled examples."""

import json
import time
from collections import Counter
from dataclasses import replace

import pytest

from grader import is_correct
from strategy import Strategy
from tests.common import ROOT, _starter_family, _starter_rows, leak_examples
from tools.leaks import leaks

# found, harmless: [a step, the answer]. stated, general: steps that state a final answer, and that only speak of one.
# missed, alarmed: what the filter gets wrong in data/leak_examples.jsonl, [problem's id, candidate's number, label].
CASES = json.loads((ROOT / "tests/leak_cases.json").read_text(encoding="utf-8"))

PROBLEM = "A farm has 30 hens and 12 ducks. Each hen lays three eggs a week, and a quarter of them break. Enough?"

SOLUTION = "The hens lay 30 * 3 = 90 eggs. Broken: 90/4 = 22.5. In 52 weeks 4,680, less 1170, so $\\frac{7}{8}$: 37 - 5."


def with_step(step):
    return Strategy("rate problem", "Find the rate, then scale it.", ("Find the rate.", step))


@pytest.mark.parametrize("step, answer", CASES["found"])
def test_leaks_finds_the_number_in_every_spelling(step, answer):
    found = leaks(with_step(step), PROBLEM, SOLUTION, answer)
    assert found and all("step 2" in reason for reason in found), found
    # The same text beside a row to which these numbers mean nothing.
    assert leaks(with_step(step), "What is it?", "It follows.", "101") == []


@pytest.mark.parametrize("step, answer", CASES["harmless"])
def test_leaks_leaves_harmless_numbers_alone(step, answer):
    solution = SOLUTION + " 180 degrees, 60 minutes, 4/3, n-3, two, 10."
    assert leaks(with_step(step), PROBLEM, solution, answer) == []


def test_leaks_finds_final_answers_of_any_problem_and_leaves_general_steps():
    """In the row above and in one to which the numbers mean nothing: what is said of an answer decides, not its value."""
    for row in ((PROBLEM, SOLUTION, "25"), ("What is it?", "It follows.", "101")):
        assert [step for step in CASES["stated"] if not leaks(with_step(step), *row)] == []
    # other numbers than the row's, so that this rule alone decides
    assert [step for step in CASES["general"] if leaks(with_step(step), "What is it?", "It follows.", "101")] == []


def test_leaks_outlasts_what_a_stuck_model_writes():
    start = time.process_time()  # of this process alone: the machine may be busy
    pieces = "9 9, /9 { x9 \\frac \\sqrt( \u4e009".split() + ["9 9/", "twenty ", "divide 9 " * 4, "answer is ", "9 eggs is "]
    for piece in pieces:
        text = (piece * 1500).strip()
        leaks(with_step(text), "What is 9?", text, text[:1000])
    assert time.process_time() - start < 8  # about 1 s; without the limit to 80 characters 20 s
    assert leaks(with_step("It is 8" + "9" * 5000), "p", "9" * 5000, "9" * 99) == []


def test_leaks_on_our_labelled_examples(eval_worker):
    """The labels were set before the filter ran (data/README.md has their rule), and both READMEs state these figures. A part
    of the problems is about the label "other": a final answer that is not the row's."""
    parts, wrong = {False: Counter(), True: Counter()}, []
    others = {row["id"] for row, candidate in leak_examples() if candidate["leaks"] == "other"}
    for i, (row, candidate) in enumerate(leak_examples()):
        assert i % 4 or is_correct(row["solution"], row["answer"], eval_worker)
        strategy, label = Strategy.from_dict(candidate["strategy"]), candidate["leaks"]
        found = leaks(strategy, row["problem"], row["solution"], row["answer"])
        leaky = {"no": False, "answer": True, "computed": True, "other": True}[label]
        parts[row["id"] in others][bool(found), leaky] += 1
        if bool(found) != leaky:
            wrong.append([row["id"], i % 4 + 1, label])
    assert sorted(wrong) == sorted(CASES["missed"] + CASES["alarmed"])
    assert parts[True] == {(True, True): 11, (False, True): 1, (False, False): 12}
    cases = parts[False]
    figures = f"{cases[True, True]} of {cases[True, True] + cases[False, True]} leaks"
    alarms = f"{cases[True, False]} false alarms on the other {cases[True, False] + cases[False, False]}"
    assert (figures, alarms) == ("26 of 45 leaks", "4 false alarms on the other 39")
    for file in ("README.md", "data/README.md"):
        text = " ".join((ROOT / file).read_text(encoding="utf-8").split())
        assert f"{cases.total()} " in text and figures in text and alarms in text, file


def test_leaks_spares_the_starter_set_and_finds_what_is_planted_into_it():
    steps = ("Check that you get {}.", "Report ${}$ as the answer.", "The total is {}, as asked.")
    alarms = []
    for i, row in enumerate(_starter_rows("train", "test", "heldout")):
        strategy = Strategy.from_dict(row["strategy"])
        texts = row["problem"], row["solution"], row["answer"]
        if found := leaks(strategy, *texts):
            alarms.append((_starter_family(row), found))
        for step in steps if i % 5 == 0 else ():
            worse = replace(strategy, steps=(*strategy.steps, step.format(row["answer"])))
            assert leaks(worse, *texts), (row["id"], step)
    # "the two times", where two is the answer too: the one false alarm
    ((family, found),) = alarms
    assert family == "work-together" and len(found) == 1 and "the answer two in step 1" in found[0]
