"""Strategies: their text form, its reader, and all prompts."""

import ast
import itertools
import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

import strategy as strategy_module
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
from tests.common import _starter_rows, leak_examples, strategy_example

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
    names.remove("tools.extract")  # main's, for the program
    assert names and all(name.split(".")[0] in sys.stdlib_module_names for name in names), names


def test_strategy_format_is_the_documented_text():
    assert format_strategy(strategy_example()) == STRATEGY_EXAMPLE_TEXT
    assert parse_strategy(STRATEGY_EXAMPLE_TEXT) == strategy_example()


def test_strategies_survive_every_dress():
    rows = _starter_rows("train", "test", "heldout") + [candidate for _, candidate in leak_examples()]
    strategies = {json.dumps(row["strategy"]): row["strategy"] for row in rows}
    assert len(strategies) > 140
    for strategy in strategies.values():
        s = Strategy.from_dict(strategy)
        assert s.to_dict() == strategy
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
            text.partition("\n1. ")[0] + "\n" + "\n".join(f"({chr(97 + i)}) {step}" for i, step in enumerate(s.steps)),
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


@pytest.mark.parametrize(
    "reply",
    [
        "1. **Problem type:** sum of two\n2. **Strategy:** Join the parts.\n3. **Steps:**\n   1. Find both parts.\n"
        "   2. Add them.",
        "## Strategy\n\n**Problem type**: sum of two\n**Strategy**: Join the parts.\n**Steps**:\n* Find both parts.\n"
        "* Add them.",
        "PROBLEM TYPE: sum of two\n---\nApproach - Join the parts.\nPlan:\nStep 1: Find both parts.\nStep 2: Add them.",
        "Problem type: sum of two\nStrategy: Join\nthe parts.\nSteps:\n(a) Find both parts.\n(b) Add them.",
        "Problem type: sum of two\nStrategy: Join the parts.\nSteps: (a) Find both parts. (b) Add them.",
        "Problem type: sum of two\nStrategy: Join the parts.\nSteps: 1. Find both parts. 2. Add them.",
        "Problem type: sum of two\nStrategy: Join the parts.\nSteps:\n**a)** Find\n  1. both\n  2. parts.\n**b)** Add them.",
        "Problem type: sum of two\nStrategy: Join the parts.\nSteps:\nA. Find\nboth parts.\nB. Add them.\n\nDone.",
        "Problem type: sum of two\nStrategy: Join the parts.\nSteps:\n1. Find\n   (a) both\n   (b) parts.\n2. Add them.",
        "Problem type: sum of two\nStrategy: Join the parts.\nSteps:\n1. Find\n   both\n\nparts.\n\n2. Add\nthem.\n\n"
        "The answer is 7.",
        "**Problem type:** sum of two\n**Strategy:** Join the parts.\n**Steps:**\n1. Find\n   1. both\n   - parts.\n"
        "2. Add them.",
        "type: 'sum of two'\nstrategy: \"Join the parts.\"\nsteps:\n  - Find both parts.\n  - Add them.",
        "Problem type: sum of two\nStrategy: Join the parts.\nSteps:\n(a) Find\n- both\n- parts.\n(b) Add\n\n- them.",
        "Problem type: sum of two\nStrategy: Join the parts.\nSteps:\n1. Find both parts.\n 2. Add\n\n   them.",
        "the thoughts began in the prompt\n</think>\n\n" + STRATEGY_EXAMPLE_TEXT,
    ],
)
def test_strategy_parser_reads_the_habits_of_models(reply):
    assert parse_strategy(reply) == strategy_example()


def test_strategy_parser_keeps_latex_and_powers():
    reply = "Well:\nProblem type: 'a' or 'b'\nStrategy: x**2 + **bold** but 2**3**2.\n"
    reply += "Steps:\n**Step 1: Go.** Multiply \\frac{a}{b} by 2. Then add."
    steps = ("Go. Multiply \\frac{a}{b} by 2. Then add.",)
    assert parse_strategy(reply) == Strategy("'a' or 'b'", "x**2 + bold but 2**3**2.", steps)


STRATEGY_HEAD = "Problem type: t\nStrategy: s\n"


@pytest.mark.parametrize(
    "reply, words",
    [
        ("", "no problem type, no strategy, no steps"),
        ("I am sorry, I cannot do that.", "no problem type, no strategy, no steps"),
        ("1. Find both parts.\n2. Add them.", "no problem type, no strategy, no steps"),
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
        (STRATEGY_HEAD + "Steps:\n2. a\n3. b", "marked 2, 3"),
        (STRATEGY_HEAD + "Steps:\n(b) a\n(c) b", "marked b, c"),
        (STRATEGY_HEAD + "Steps:\n(a) a\n(c) b", "marked a, c"),
        (STRATEGY_HEAD + "Steps: (b) Find. (c) Add.", "marked b"),
        (STRATEGY_HEAD + "Steps:\n(i) Find.\n(ii) Add.", "marked i"),
        (STRATEGY_EXAMPLE_TEXT + "\n\nExample:\n1. Add 3 and 4.", "marked 1, 2, 1"),
        (STRATEGY_HEAD + "Steps:\nDo a.\nDo b.", "the steps are not marked"),
        ('{"type": "t", "strategy": "s", "steps": ["a"]}', "no problem type, no strategy, no steps"),
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
    # The trap: one closing for both. The block before the problem is the whole difference, so that response tokens line up.
    assert guided[0]["content"] == "Follow this strategy.\n" + STRATEGY_EXAMPLE_TEXT + "\n\n" + auto[0]["content"]


@pytest.mark.parametrize("problem", STRATEGY_PROBLEMS)
def test_strategy_pipeline_prompts_hold_their_inputs_unchanged(problem):
    solution = "We get {5} = \\boxed{5}. Strategy: %s"
    other = Strategy("another", "Count.", ("Count on.",))
    extraction, scoring = extraction_prompt(problem, solution), scoring_prompt(problem, solution, [strategy_example(), other])
    for messages, tag in ((extraction, "response"), (scoring, "solution")):
        assert [m["role"] for m in messages] == ["user"]
        assert f"<problem>\n{problem}\n</problem>" in messages[0]["content"]
        assert f"<{tag}>\n{solution}\n</{tag}>" in messages[0]["content"]
    for number, text in ((1, STRATEGY_EXAMPLE_TEXT), (2, format_strategy(other))):
        assert f"<candidate {number}>\n{text}\n</candidate {number}>" in scoring[0]["content"]
    # The form asked for is the one that the reader takes: the prompt's own pattern parses.
    form = extraction[0]["content"].rpartition("Problem type: ")
    assert parse_strategy("".join(form[1:])).steps == ("...", "...", "...")
    assert f"At most {strategy_module.LEAK_SCORE} if the answer can be read" in scoring[0]["content"]
    asked = "\n".join(scoring[0]["content"].splitlines()[-2:])
    for i, name in enumerate(CRITERIA):
        asked = asked.replace(f" {name}", f" 0.{i}")
    assert parse_scores(asked, 2) == [dict(zip(CRITERIA, (0.0, 0.1, 0.2, 0.3), strict=True))] * 2


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
        lambda: scoring_prompt("p", "s", ["text"]),
        lambda: scoring_prompt("p", "s", []),
    ],
)
def test_strategy_messages_reject_bad_input(call):
    with pytest.raises(ValueError, match="expected"):
        call()


STRATEGY_SCORES = [
    {"type": 0.9, "strategy": 1.0, "steps": 0.0, "no_leak": 0.25},
    {"type": 1.0, "strategy": 0.5, "steps": 0.7, "no_leak": 1.0},
]


@pytest.mark.parametrize(
    "reply",
    [
        "1: 0.9 1.0 0.0 0.25\n2: 1.0 0.5 0.7 1.0",
        "<think>\n1: 0 0 0 0\n</think>\nScores of both 2:\n\n- **2:** 1, .5, 0.7, 1\n- **1:** 0.90, 1, 0, .25\n\nDone, 2 of 2.",
        "| # | type | strategy | steps | no leak |\n|---|---|---|---|---|\n"
        "| 1 | 0.9 | 1 | 0 | 0.25 |\n| 2 | 1 | 0.5 | 0.7 | 1 |",
        "Candidate 1: Type 0.9, Strategy 1.0, Steps 0.0, No-leak 0.25\r\n"
        "Attempt 2: Type: 1; Strategy: 0.5; Steps: 0.7; no_leak: 1",
        '```json\n{\n  "1": [0.9, 1.0, 0.0, 0.25],\n  "2": [1.0, 0.5, 0.7, 1.0]\n}\n```',
        "1. 0.9 1.0 0.0 0.25\n(2) 1 0.5 0.7 1",
    ],
)
def test_strategy_scores_are_read(reply):
    scores = parse_scores(reply, 2)
    assert scores == STRATEGY_SCORES and all(list(own) == list(CRITERIA) for own in scores)


@pytest.mark.parametrize(
    "line, words",
    [
        ("", "no scores of candidate 2"),
        ("fine!", "no scores of candidate 2"),
        ("1: 1 1 1 1", "candidate 1 is given twice"),
        ("3: 1 1 1 1", "expected a candidate's number, 1 to 2, and 4 scores in '3: 1 1 1 1'"),
        ("0: 1 1 1 1", "expected a candidate's number, 1 to 2"),
        ("2: 1 1 1", "4 scores in '2: 1 1 1'"),
        ("2: 1 1 1 1 1", "4 scores in '2: 1 1 1 1 1'"),
        ("1 1 1 1", "4 scores in '1 1 1 1'"),
        ("2: 1 1 1 1.1", "from 0.0 to 1.0 in '2: 1 1 1 1.1'"),
        ("2: 1 -0.1 1 1", "from 0.0 to 1.0"),
        ("2: 4 5 4 5", "from 0.0 to 1.0"),
        ("2: 90% 80% 90% 90%", "from 0.0 to 1.0"),
        ("2: 1/1 1/1 1/1 1/1", "4 scores in"),
        ("2: no_leak 1 type 0.9 strategy 0.8 steps 1", "4 scores in"),  # in another order: not to be read by position
        ("2: type 1 type 1 type 1 type 1", "4 scores in"),
    ],
)
def test_strategy_scores_name_the_bad_line(line, words):
    with pytest.raises(ValueError) as error:
        parse_scores(f"1: 0.9 1.0 0.0 0.25\n{line}", 2)
    assert words in str(error.value)


def test_choice_and_quality_by_hand():
    def scores(*values):
        return dict(zip(CRITERIA, values, strict=True))

    best = strategy_module.best_candidate
    assert best([scores(0.5, 0.5, 0.5, 0.5), None, scores(1, 1, 1, 0.9), scores(1, 1, 1, 1)]) == 3
    # Equal means: the first, also where the floats' sums differ in their last digit.
    assert best([None, scores(0.3, 0, 0, 0), scores(0.1, 0.1, 0.1, 0)]) == 1 and 0.1 + 0.1 + 0.1 > 0.3
    with pytest.raises(ValueError, match="no candidate is left of 2"):
        best([None, None])
    levels = {
        (1, 1, 1, 1): "high", (0.3, 0.95, 0.95, 1): "high", (0.29, 0.95, 0.95, 1): "medium",  # 0.3 + 0.95 + 0.95 + 1 < 3.2
        (0.5, 0.5, 0.5, 0.5): "medium", (0.5, 0.5, 0.5, 0.49): "low", (0, 0, 0, 0): "low",
    }  # fmt: skip
    assert {values: strategy_module.quality(scores(*values)) for values in levels} == levels


def test_shuffled_strategies_are_a_permutation_without_a_row_of_its_own_type():
    rng = random.Random(5)
    for case in range(300):
        # Up to half of the rows of one type, which is the tightest that there is a permutation for.
        n = rng.randint(2, 14)
        names = ["A"] * rng.randint(1, n // 2)
        names += [rng.choice("bcd") for _ in range(n - len(names))]
        if max(Counter(names).values()) * 2 > n:
            continue
        rng.shuffle(names)
        rows = [Strategy(rng.choice((name, name.swapcase())), "s", (f"row {i}",)) for i, name in enumerate(names)]
        drawn = strategy_module.shuffled_strategies(rows, case)
        assert sorted(s.steps for s in drawn) == sorted(s.steps for s in rows)
        assert all(new.type.lower() != old.type.lower() for new, old in zip(drawn, rows, strict=True))
        assert drawn == strategy_module.shuffled_strategies(rows, case)
    # Two rows each of three types: all of the 80 permutations that there are get drawn.
    rows = [Strategy(name, "s", (f"row {i}",)) for i, name in enumerate("aabbcc")]
    seen = Counter(tuple(s.steps[0] for s in strategy_module.shuffled_strategies(rows, seed)) for seed in range(4000))
    allowed = [p for p in itertools.permutations(range(6)) if all(i // 2 != k // 2 for i, k in enumerate(p))]
    assert set(seen) == {tuple(f"row {k}" for k in p) for p in allowed} and len(allowed) == 80
    assert strategy_module.shuffled_strategies([], 0) == []
    with pytest.raises(ValueError, match="3 of 5 rows have the type 'a', more than half"):
        strategy_module.shuffled_strategies([Strategy(name, "s", ("x",)) for name in "abaAb"], 0)


def test_strategy_alone_in_a_folder_is_a_module_and_says_what_the_program_needs(tmp_path):
    shutil.copy(strategy_module.__file__, tmp_path)
    code = "import sys; sys.path.insert(0, '.'); import strategy as s; print(s.solution_prompt('p')[0]['content'][-12:])"
    run = partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True)
    done = run([sys.executable, "-S", "-I", "-c", code])  # -S: not even the installed packages
    assert done.stdout.strip().endswith("boxed{}."), done.stderr
    done = run([sys.executable, "strategy.py", "--data", "x"])
    assert done.returncode == 1 and "needs tools/extract.py beside it" in done.stderr
