"""Strategies: their text form and its reader, the prompts with them, their scores."""

import itertools
import json
import random
from collections import Counter

import pytest

from data import problems
from strategy import Strategy, Template, auto_messages, extraction_prompt, format_strategy, guided_messages, parse_strategy
from tests.common import ROOT, _starter_rows, leak_examples, strategy_example
from tools.extract import CRITERIA, LEAK_SCORE, parse_scores, scoring_prompt

CASES = json.loads((ROOT / "tests/strategy_cases.json").read_text(encoding="utf-8"))

EXAMPLE_TEXT = """Problem type: sum of two
Strategy: Join the parts.
Steps:
1. Find both parts.
2. Add them."""


def test_strategy_text_is_the_documented_one_and_reads_back():
    assert format_strategy(strategy_example()) == EXAMPLE_TEXT
    rows = _starter_rows("train", "test", "heldout") + [candidate for _, candidate in leak_examples()]
    strategies = {json.dumps(row["strategy"]): Strategy.from_dict(row["strategy"]) for row in rows}
    assert len(strategies) > 140
    for data, strategy in strategies.items():
        text = format_strategy(strategy)
        assert parse_strategy(text) == strategy and strategy.to_dict() == json.loads(data)
        # What a model may add without a word: blank lines and blanks around lines.
        assert parse_strategy("\n " + text.replace("\n", " \r\n\n  ") + "\n\n") == strategy
    # The paper's marks of steps [tab 4], and labels in bold.
    for form in ("{0}: t\n{1}: s\n{2}:\n(a) x\n(b) y", "**{0}:** t\n**{1}**: s\n**{2}:**\n1. x\n2. y"):
        text = form.format("Problem type", "Strategy", "Steps")
        assert parse_strategy(text) == Strategy("t", "s", ("x", "y"))


def test_strategy_odd_ones_round_trip():
    rng = random.Random(0)
    words = "Problem_type: Strategy: Steps: 1. 2. - ** { } <think> </think> | ``` a \\boxed{} \" ; # \u2460".split()
    odd = [Strategy(kind, idea, tuple(steps)) for kind, idea, steps in CASES["odd"]]
    for _ in range(2000):
        texts = [" ".join(rng.choices(words, k=rng.randint(1, 5))).replace("_", " ") for _ in range(rng.randint(3, 7))]
        odd.append(Strategy(texts[0], texts[1], tuple(texts[2:])))
    for strategy in odd:
        assert parse_strategy(format_strategy(strategy)) == strategy
        assert Strategy.from_dict(json.loads(json.dumps(strategy.to_dict()))) == strategy


@pytest.mark.parametrize("reply, words", CASES["unread"])
def test_strategy_reader_takes_nothing_else_and_names_the_line(reply, words):
    with pytest.raises(ValueError) as error:
        parse_strategy(reply)
    assert words in str(error.value)


@pytest.mark.parametrize("change, words", CASES["fields"])
def test_strategy_from_dict_names_field_and_value(change, words):
    with pytest.raises(ValueError) as error:
        Strategy.from_dict({"type": "t", "strategy": "s", "steps": ["a"]} | change)
    assert words in str(error.value)


def test_strategy_is_immutable_whole_and_checked_without_from_dict_too():
    for data in (["t", "s"], {"type": "t", "strategy": "s"}):
        with pytest.raises(ValueError, match="expected an object"):
            Strategy.from_dict(data)
    with pytest.raises(ValueError, match="tuple"):
        Strategy("t", "s", ["a"])
    with pytest.raises(AttributeError):
        strategy_example().type = "other"


@pytest.mark.parametrize("problem", CASES["problems"])
def test_strategy_messages_differ_by_the_strategy_block_only(problem):
    auto, guided = auto_messages(problem), guided_messages(problem, strategy_example())
    assert [m["role"] for m in auto] == [m["role"] for m in guided] == ["user"]  # no system message of ours
    assert auto[0]["content"] == problem + "\n\nReason step by step and put the final answer in \\boxed{}."
    # The trap: one ending for both. The block before the problem is the whole difference, so that response tokens line up.
    assert guided[0]["content"] == "Follow this strategy.\n" + EXAMPLE_TEXT + "\n\n" + auto[0]["content"]


def test_a_template_of_ones_own():
    own = Template(prompt="Q: {problem} A:", guided="Hint: {strategy} Q: {problem} A:", system="Be brief.")
    auto, guided = auto_messages("{strategy} \\1?", own), guided_messages("{strategy} \\1?", strategy_example(), own)
    assert auto == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q: {strategy} \\1? A:"}]
    assert guided[0] == auto[0] and guided[1]["content"] == f"Hint: {EXAMPLE_TEXT} Q: {{strategy}} \\1? A:"


@pytest.mark.parametrize("fields", CASES["bad_templates"])
def test_a_template_whose_prompts_would_end_differently_or_lack_something_is_refused(fields):
    with pytest.raises(ValueError, match="template"):
        Template.from_dict(fields)


@pytest.mark.parametrize("problem", CASES["problems"])
def test_strategy_pipeline_prompts_hold_their_inputs_and_ask_for_the_form_that_is_read(problem):
    solution = "We get {5} = \\boxed{5}. Strategy: %s"
    other = Strategy("another", "Count.", ("Count on.",))
    extraction, scoring = extraction_prompt(problem, solution), scoring_prompt(problem, solution, [strategy_example(), other])
    for messages, tag in ((extraction, "response"), (scoring, "solution")):
        assert [m["role"] for m in messages] == ["user"]
        assert f"<problem>\n{problem}\n</problem>" in messages[0]["content"]
        assert f"<{tag}>\n{solution}\n</{tag}>" in messages[0]["content"]
    for number, text in ((1, EXAMPLE_TEXT), (2, format_strategy(other))):
        assert f"<candidate {number}>\n{text}\n</candidate {number}>" in scoring[0]["content"]
    # The paper's three components, and its four criteria [tab 4, tab 5].
    for label in ("Problem type", "Strategy", "Steps"):
        assert f"\n- {label}: " in extraction[0]["content"]
    assert all(f"\n- {name}: " in scoring[0]["content"] for name in CRITERIA) and len(CRITERIA) == 4
    assert f"At most {LEAK_SCORE} if the answer can be read" in scoring[0]["content"]
    # The last lines of a prompt are the form of the reply.
    form = extraction[0]["content"].split("\n\n")[-1]
    assert parse_strategy(form) == Strategy("...", "...", ("...", "...", "..."))
    asked = scoring[0]["content"].split("\n\n")[-1]
    for i, name in enumerate(CRITERIA):
        asked = asked.replace(f" {name}", f" 0.{i}")
    assert parse_scores(asked, 2) == [dict(zip(CRITERIA, (0.0, 0.1, 0.2, 0.3), strict=True))] * 2


def test_strategy_scores_are_read_in_the_order_of_the_candidates():
    scores = parse_scores("1: 0.9 1.0 0 .25\n\n 2:  1 0.5 0.7 1.0 \n", 2)
    assert scores == [dict(zip(CRITERIA, own, strict=True)) for own in ((0.9, 1, 0, 0.25), (1, 0.5, 0.7, 1))]


@pytest.mark.parametrize("line, words", CASES["bad_scores"])
def test_strategy_scores_name_the_bad_line(line, words):
    with pytest.raises(ValueError) as error:
        parse_scores(f"1: 0.9 1.0 0.0 0.25\n{line}", 2)
    assert words in str(error.value)


def test_shuffled_strategies_are_a_permutation_without_a_row_of_its_own_type():
    rng, shuffled = random.Random(5), problems.shuffled_strategies
    for case in range(300):
        # Up to half of the rows have one type, which is the tightest that there is a permutation for.
        n = rng.randint(2, 14)
        names = ["A"] * rng.randint(1, n // 2)
        names += [rng.choice("bcd") for _ in range(n - len(names))]
        if max(Counter(names).values()) * 2 > n:
            continue
        rng.shuffle(names)
        rows = [Strategy(rng.choice((name, name.swapcase())), "s", (f"row {i}",)) for i, name in enumerate(names)]
        drawn = shuffled(rows, case)
        assert sorted(s.steps for s in drawn) == sorted(s.steps for s in rows) and drawn == shuffled(rows, case)
        assert all(new.type.lower() != old.type.lower() for new, old in zip(drawn, rows, strict=True))
    # Two rows each of three types: all of the 80 permutations that there are get drawn.
    rows = [Strategy(name, "s", (f"row {i}",)) for i, name in enumerate("aabbcc")]
    seen = {tuple(s.steps[0] for s in shuffled(rows, seed)) for seed in range(4000)}
    allowed = [p for p in itertools.permutations(range(6)) if all(i // 2 != k // 2 for i, k in enumerate(p))]
    assert seen == {tuple(f"row {k}" for k in p) for p in allowed} and len(allowed) == 80
    assert shuffled([], 0) == []
    with pytest.raises(ValueError, match="3 of 5 rows have the type 'a', more than half"):
        shuffled([Strategy(name, "s", ("x",)) for name in "abaAb"], 0)
