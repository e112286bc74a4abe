"""Published data sets into rows."""

import hashlib
import http.server
import json
import math
import random
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from data import prepare
from eval import load_problems
from grader import MathWorker, same_answer
from tests.common import (
    REAL_DATA,
    ROOT,
    SYSTEM_MESSAGE,
    _openr1_row,
    _prepare_write,
    make_run,
    run_script,
    tiny_rows,
    write_rows,
)


def _prepare(out, command, source, *flags):
    """(the rows written, the file's entry in the manifest) of one run of data/prepare.py."""
    before = set(out.glob("*.jsonl"))
    prepare.main([command, "--source", str(source), "--out", str(out), *map(str, flags)])
    (new,) = set(out.glob("*.jsonl")) - before
    assert not list(out.glob("*.partial"))
    return [json.loads(line) for line in new.open(encoding="utf-8")], json.loads((out / "manifest.json").read_text())[new.name]


def _prepare_jsonl(tmp_path, rows, *flags, command="jsonl"):
    return _prepare(tmp_path / "out", command, _prepare_write(tmp_path / "rows.jsonl", rows), *flags)


def _prepare_sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


GSM8K_ROWS = [
    {"question": "Tom had 3 boxes of 4 pens.  How many pens?", "answer": "He had 3*4=<<3*4=12>>12 pens.\n#### 12"},
    {"question": "A car costs $1,000 and a trailer $80. Both?", "answer": "1000+80=$<<1000+80=1080>>1080\n#### 1,080"},
]


def test_prepare_gsm8k(tmp_path):
    rows, entry = _prepare_jsonl(tmp_path, GSM8K_ROWS, "--part", "test", "--sha256", "any", command="gsm8k")
    assert rows == [
        {
            "id": "gsm8k-test-0",
            "problem": "Tom had 3 boxes of 4 pens.  How many pens?",
            "answer": "12",
            "solution": "He had 3*4=12 pens.\n\nThe final answer is \\boxed{12}",
        },
        {
            "id": "gsm8k-test-1",
            "problem": "A car costs $1,000 and a trailer $80. Both?",
            "answer": "1,080",
            "solution": "1000+80=$1080\n\nThe final answer is \\boxed{1,080}",
        },
    ]
    assert entry["counts"]["read"] == entry["counts"]["kept"] == entry["counts"]["with_solution"] == 2
    assert (tmp_path / "out/test.jsonl").exists()


def test_prepare_mawps_svamp_asdiv(tmp_path):
    mawps = [{"input": "Sara 's team won 3 of 8 . Lost ?", "target": 5.0}, {"input": "Ten / 3 ?", "target": 3.33333}]
    svamp = [{"Body": "There are 6 pens in 2 groups", "Question": "How big is each?", "Answer": 3.0, "ID": "chal-7"}]
    asdiv = [
        {"body": "If she has 2 eggs,", "question": "how many? ", "answer": "2  (eggs)"},
        {"body": "A line falls.", "question": "Slope?", "answer": "-(1/3)"},
        {"body": "Bob runs.", "question": "Who?", "answer": "Bob (a boy)"},
    ]
    expected = {
        "mawps": [("Sara 's team won 3 of 8 . Lost ?", "5"), ("Ten / 3 ?", "3.33333")],
        "svamp": [("There are 6 pens in 2 groups. How big is each?", "3")],
        "asdiv": [
            ("If she has 2 eggs, how many?", "2"), ("A line falls. Slope?", "-(1/3)"), ("Bob runs. Who?", "Bob (a boy)"),
        ],
    }  # fmt: skip
    for command, source in (("mawps", mawps), ("svamp", svamp), ("asdiv", asdiv)):
        path = _prepare_write(tmp_path / f"{command}.jsonl", source)
        rows, _ = _prepare(tmp_path / command, command, path, "--sha256", "any")
        assert [(row["problem"], row["answer"]) for row in rows] == expected[command]
        assert rows[0]["id"] == {"mawps": "mawps-singleop-0", "svamp": "svamp-chal-7", "asdiv": "asdiv-0"}[command]
        assert all(set(row) == {"id", "problem", "answer"} for row in rows)


def test_prepare_math_folder_as_hendrycks_publishes_it(tmp_path, capsys):
    texts = {
        "train/algebra/2.json": ("Solve $x+1=3$.", "We get $x=2$, so \\boxed{2}."),
        "train/algebra/10.json": ("Halve $1$.", "A box in a box: $\\boxed{\\frac{1}{2}}$."),
        "train/geometry/1.json": ("Draw it.", "No answer here."),
    }
    for name, (problem, solution) in texts.items():
        path = tmp_path / "MATH" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"problem": problem, "level": "Level 1", "type": "x", "solution": solution}))
    rows, entry = _prepare(tmp_path / "out", "math", tmp_path / "MATH")
    assert [(row["id"], row["answer"], row["solution"]) for row in rows] == [
        ("math-train-train/algebra/10", "\\frac{1}{2}", "A box in a box: $\\boxed{\\frac{1}{2}}$."),
        ("math-train-train/algebra/2", "2", "We get $x=2$, so \\boxed{2}."),
    ]
    assert [e["where"] for e in entry["dropped"]["its answer is empty"]] == ["train/geometry/1.json"]
    listing = "".join(f"{_prepare_sha256(tmp_path / 'MATH' / name)}  {name}\n" for name in sorted(texts))
    assert entry["source"]["sha256"] == hashlib.sha256(listing.encode()).hexdigest()
    assert "train/geometry/1.json: math-train-train/geometry/1" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="a folder without .json files"):
        _prepare(tmp_path / "new", "math", tmp_path / "empty")
    with pytest.raises(ValueError, match="a folder, expected a file"):
        _prepare(tmp_path / "new", "gsm8k", tmp_path / "empty")


def test_prepare_columns_by_name_and_what_train_reads(tmp_path, worker):
    tiny = [json.loads(line) for line in (ROOT / "data/tiny/train.jsonl").open()][:30]
    source = [{"q": r["problem"], "a": int(r["answer"]), "s": r["solution"], "key": i} for i, r in enumerate(tiny)]
    flags = "--problem_column q --answer_column a --solution_column s --id_column key --need_solution".split()
    rows, _ = _prepare_jsonl(tmp_path, source, *flags)
    for row, r, i in zip(rows, tiny, range(30), strict=True):
        assert row == {"id": f"jsonl-train-{i}", "problem": r["problem"], "answer": r["answer"], "solution": r["solution"]}
    flags = ["--data", tmp_path / "out/train.jsonl", "--method", "luffy", "--sft_fraction", 0.5]
    _, examples = make_run(tmp_path, worker, *flags)
    assert len(examples) == 30 and all(example.solution_ids for example in examples)


PREPARE_ANSWERS = [
    ("$\\boxed{45}$", "45"), ("\\boxed{204}", "204"), ("045", "45"), ("4.0", "4"), (4.0, "4"), (7, "7"), ("-07", "-7"),
    ("0", "0"), ("-0.0", "0"), ("000", "0"), ("100.00", "100"), ("100", "100"), (3.33333, "3.33333"), (1e20, "1" + "0" * 20),
    # left alone: money, separators, and what is not a plain number
    ("2.50", "2.50"), ("0.5", "0.5"), ("1,080", "1,080"), ("05/06", "05/06"), ("4.0\\pi", "4.0\\pi"), ("x=4.0", "x=4.0"),
    ("$90^\\circ$", "90^\\circ"), ("$1$,$2$", "$1$,$2$"), ("4.", "4"), ("12:05", "12:05"), ("010_2", "010_2"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "expected"), PREPARE_ANSWERS)
def test_prepare_answers_are_shortened_only_where_it_is_safe(value, expected, worker):
    assert prepare.clean_answer(value) == expected
    assert same_answer(expected, str(value), worker) or value == "-0.0"


PREPARE_BAD_ROWS = [
    ("gsm8k", '{"question": "2', "not JSON (", "'{\"question\": \"2'"),
    ("gsm8k", "", "not JSON (", "''"),
    ("gsm8k", "[1, 2]", "expected an object", "[1, 2]"),
    ("gsm8k", {"question": "2?"}, "column 'answer' is missing", "['question']"),
    ("gsm8k", {"question": 2, "answer": "#### 2"}, "column 'question' must be str, got int", "2"),
    ("gsm8k", {"question": " ", "answer": "#### 2"}, "column 'question' is empty", "' '"),
    ("gsm8k", {"question": "2?", "answer": "two"}, "no '####'", "'two'"),
    ("mawps", {"input": "2?", "target": None}, "column 'target' must be str or int or float, got NoneType", "None"),
    ("mawps", {"input": "2?", "target": True}, "column 'target' must be str or int or float, got bool", "True"),
    ("mawps", {"input": "2?", "target": math.nan}, "not a finite number", "nan"),
    ("math", {"problem": "2?"}, "column 'solution' is missing", "['problem']"),
    ("math", {"problem": "2?", "answer": ["2"]}, "column 'answer' must be str, got list", "['2']"),
    ("openr1", {"prompt": "2?"}, "column 'reward_model' is missing", "['prompt']"),
    ("openr1", {"prompt": "2?", "reward_model": {}}, "column 'ground_truth' is missing", "[]"),
    ("openr1", {"prompt": "2?", "reward_model": {"ground_truth": "2"}}, "column 'prompt' must be list, got str", "'2?'"),
    ("math500", {"prompt": 2, "answer": "2"}, "column 'prompt' must be str, got int", "2"),
]  # fmt: skip

PREPARE_GOOD_ROWS = {
    "gsm8k": GSM8K_ROWS[0], "mawps": {"input": "1?", "target": 1}, "math": {"problem": "1?", "answer": "1"},
    "math500": {"prompt": "1?", "answer": "1"},
    "openr1": {"prompt": [{"role": "user", "content": "1?"}], "reward_model": {"ground_truth": "1"}, "target": None},
}  # fmt: skip


@pytest.mark.parametrize(("command", "row", "message", "value"), PREPARE_BAD_ROWS)
def test_prepare_names_file_line_and_value_and_writes_nothing(command, row, message, value, tmp_path):
    good = PREPARE_GOOD_ROWS[command]
    with pytest.raises(ValueError) as error:
        _prepare_jsonl(tmp_path, [good, row, good], "--sha256", "any", command=command)
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{tmp_path / 'rows.jsonl'}: line 2: ") and message in line and value in line
    assert not (tmp_path / "out").exists()


def test_prepare_reports_twenty_bad_rows_and_reads_arrays(tmp_path):
    path = tmp_path / "array.jsonl"
    path.write_text(json.dumps([{"problem": "1?", "answer": 1}] + [{"problem": f"{i}?"} for i in range(25)]))
    with pytest.raises(ValueError) as error:
        _prepare(tmp_path / "out", "jsonl", path)
    lines = str(error.value).splitlines()
    assert [line.split(": ")[1] for line in lines[:20]] == [f"row {i}" for i in range(2, 22)]
    assert lines[20:] == ["... and 5 more"]
    for content, message in (("[1, ", "array.jsonl: not JSON"), ("", "no rows for jsonl among 0"), ("[]", "no rows")):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            _prepare(tmp_path / "out", "jsonl", path)
    path.write_text(json.dumps([{"problem": "1?", "answer": 1}, {"problem": "2?", "answer": 2.0}]))
    assert [row["answer"] for row in _prepare(tmp_path / "out", "jsonl", path)[0]] == ["1", "2"]


def test_prepare_repeats_and_contradictions(tmp_path, capsys):
    source = [
        {"problem": "Find $\\dfrac12$ of  8 .", "answer": "4"},
        {"problem": "find $\\frac12$ of 8.", "answer": "4.0"},  # the same but for blanks, case and \dfrac
        {"problem": "Is $x^2-1$ prime?", "answer": "no"},
        {"problem": "Is $x^2+1$ prime?", "answer": "yes"},  # a sign apart: another problem
        {"problem": "What is 5²?", "answer": "25"},
        {"problem": "What is 52?", "answer": "52"},
        {"problem": "Bob\u2019s age?", "answer": "7"},
        {"problem": "Bob's age?", "answer": "8"},  # the same problem with another answer
        {"problem": "Bob's  age?", "answer": "7"},
    ]
    rows, entry = _prepare_jsonl(tmp_path, source)
    assert [row["id"] for row in rows] == [f"jsonl-train-{i}" for i in (0, 2, 3, 4, 5)]
    assert entry["counts"]["dropped"] == {"repeats a problem": 1, "same problem with different answers": 3}
    assert entry["counts"]["distinct"] == 6 and entry["counts"]["read"] == 9
    (repeat,) = entry["dropped"]["repeats a problem"]
    assert repeat == {"where": "line 2", "id": "jsonl-train-1", "value": "jsonl-train-0"}
    assert [e["value"] for e in entry["dropped"]["same problem with different answers"]] == ["7", "8", "7"]
    printed = capsys.readouterr().out
    assert "dropped 3: same problem with different answers\n    line 7: jsonl-train-6: '7'" in printed


def test_prepare_drops_answers_that_cannot_be_graded(tmp_path, capsys):
    source = [
        {"problem": "a?", "answer": "3 +"}, {"problem": "b?", "answer": "$\\boxed{045}$"}, {"problem": "c?", "answer": ""},
        {"problem": "d?", "answer": "see above, it follows from the lemma and then from this"},
    ]  # fmt: skip
    rows, entry = _prepare_jsonl(tmp_path, source)
    assert [(row["problem"], row["answer"]) for row in rows] == [("b?", "45")]
    assert {reason: [e["where"] for e in entries] for reason, entries in entry["dropped"].items()} == {
        "its answer cannot be read as numbers, an expression or a few words": ["line 1"],
        "its answer is empty": ["line 3"],
        "its answer is prose": ["line 4"],
    }
    assert "line 1: jsonl-train-0: '3 +'" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"0 of 1 rows can be used, 1 are needed: \{'its answer is empty': 1\}"):
        _prepare(tmp_path / "new", "jsonl", _prepare_write(tmp_path / "bad.jsonl", source[2:3]))


def test_prepare_ids_must_differ(tmp_path):
    source = [{"problem": "a?", "answer": 1, "n": "x"}, {"problem": "b?", "answer": 2, "n": "x"}]
    with pytest.raises(ValueError, match="line 2: the id 'jsonl-train-x' is that of line 1 already"):
        _prepare_jsonl(tmp_path, source, "--id_column", "n")
    # a file of repeats repeats the ids too
    assert [row["id"] for row in _prepare_jsonl(tmp_path, [source[0]] * 3, "--id_column", "n")[0]] == ["jsonl-train-x"]


def test_prepare_counts_the_comparisons_that_ran_out_of_time(tmp_path, monkeypatch, capsys):
    def equal(self, gold, prediction, limit_s=None):
        self.timeouts += 1
        raise TimeoutError

    monkeypatch.setattr(MathWorker, "equal", equal)
    source = [{"problem": "1?", "answer": "x + 1", "s": "\\boxed{\\sin x}"}, {"problem": "2?", "answer": "2"}]
    _, entry = _prepare_jsonl(tmp_path, source, "--solution_column", "s")
    assert entry["counts"]["grader_timeouts"] == 1
    assert "1 comparisons of answers ran out of time and count as wrong" in capsys.readouterr().out


PREPARE_SOLUTIONS = [
    {"problem": "a?", "reasoning_trace": "<think>1 + 1 = 2</think> <answer>2</answer>", "expected_answer": "2"},
    {"problem": "b?", "reasoning_trace": "So half.\n\\end{think>\n<answer>$0.5$</answer>\n", "expected_answer": "\\frac12"},
    {"problem": "c?", "reasoning_trace": "Three.</think> <answer>3</answer>", "expected_answer": "4"},
    {"problem": "d?", "reasoning_trace": "It is \\boxed{5}.", "expected_answer": "5"},
    {"problem": "e?", "reasoning_trace": None, "expected_answer": "6"},
    {"problem": "f?", "reasoning_trace": "Nothing to say.", "expected_answer": "7"},
]


def test_prepare_solutions_are_graded(tmp_path):
    rows, entry = _prepare_jsonl(tmp_path, PREPARE_SOLUTIONS, "--sha256", "any", command="solutions")
    assert [(row["problem"], row["solution"]) for row in rows] == [
        ("a?", "1 + 1 = 2\n\nThe final answer is \\boxed{2}"),
        ("b?", "So half.\n\nThe final answer is \\boxed{0.5}"),
        ("d?", "It is \\boxed{5}."),
    ]
    wrong = entry["dropped"]["no solution: its final answer is not the row's"]
    assert [(e["where"], e["value"]) for e in wrong] == [
        ("line 3", "'3', the row's answer is '4'"), ("line 6", "None, the row's answer is '7'"),
    ]  # fmt: skip
    assert [e["where"] for e in entry["dropped"]["no solution: the source has none"]] == ["line 5"]


def test_prepare_rows_stay_without_their_wrong_solution_unless_asked(tmp_path, capsys):
    flags = "--solution_column reasoning_trace --answer_column expected_answer".split()
    rows, entry = _prepare_jsonl(tmp_path, PREPARE_SOLUTIONS, *flags)
    assert ["solution" in row for row in rows] == [True, True, False, True, False, False]
    assert entry["counts"]["solutions_missing"] == {"its final answer is not the row's": 2, "the source has none": 1}
    assert entry["counts"]["with_solution"] == 3 and entry["counts"]["kept"] == 6 and not entry["dropped"]
    assert "2 usable rows without a solution: its final answer is not the row's" in capsys.readouterr().out
    needed, _ = _prepare(tmp_path / "needed", "jsonl", tmp_path / "rows.jsonl", *flags, "--need_solution")
    assert needed == [row for row in rows if "solution" in row]


OPENR1_ROWS = [
    _openr1_row("a?", "2", "<think>\nOne and one.\n</think>\n\nThey make \\boxed{2}."),
    _openr1_row("b?", "3", "<think>\nThe box stands here: \\boxed{3}.\n</think>\n\nThree.", system=False),
    _openr1_row("c?", "4", None),
    _openr1_row("d?", "5", "<think>\nIt never ends, \\boxed{5}"),
    _openr1_row("e?", "6", "<think>\nSix.\n</think>\n\n\\boxed{7}"),
]


def test_prepare_openr1_thoughts_kept_or_stripped(tmp_path):
    kept, entry = _prepare_jsonl(tmp_path, OPENR1_ROWS, command="openr1")
    assert [row["id"] for row in kept] == [f"openr1-train-{i}" for i in range(5)]
    assert [row["problem"] + row["answer"] for row in kept] == ["a?2", "b?3", "c?4", "d?5", "e?6"]
    # whole, letter by letter: the target begins with the tag
    targets = [row["target"] and row["target"][0]["content"] for row in OPENR1_ROWS]
    assert [row.get("solution") for row in kept] == targets[:2] + [None, targets[3], None]
    assert entry["counts"]["solutions_missing"] == {"the source has none": 1, "its final answer is not the row's": 1}
    stripped, entry = _prepare(tmp_path / "strip", "openr1", tmp_path / "rows.jsonl", "--think", "strip")
    assert [row.get("solution") for row in stripped] == ["They make \\boxed{2}.", None, None, None, None]
    assert entry["counts"]["solutions_missing"] == {
        "nothing boxed behind </think>": 2, "the source has none": 1, "its final answer is not the row's": 1,
    }  # fmt: skip
    needed, _ = _prepare(tmp_path / "needed", "openr1", tmp_path / "rows.jsonl", "--need_solution")
    assert [row["problem"] for row in needed] == ["a?", "b?", "d?"]


def test_prepare_openr1_takes_one_user_message_and_no_system_message(tmp_path):
    path = _prepare_write(tmp_path / "rows.jsonl", OPENR1_ROWS)
    with pytest.raises(ValueError, match="--system keep: a row has no place for a system message.*strategy.INSTRUCTION"):
        _prepare(tmp_path / "out", "openr1", path, "--system", "keep")
    bad = _openr1_row("a?", "1", None)
    for prompt, message in (
        ([*bad["prompt"], {"role": "assistant", "content": "2"}], r"not \['system', 'user', 'assistant'\]"),
        ([SYSTEM_MESSAGE], r"not \['system'\]"), (["a?"], "a list of messages, \\['a\\?'\\]"),
    ):  # fmt: skip
        _prepare_write(path, [bad | {"prompt": prompt}])
        with pytest.raises(ValueError, match=message):
            _prepare(tmp_path / "out", "openr1", path)
    _prepare_write(path, [bad | {"target": "2"}])
    with pytest.raises(ValueError, match="column 'target' must be null or a list of one message, '2'"):
        _prepare(tmp_path / "out", "openr1", path)


def test_prepare_sample_is_seeded_and_in_the_source_s_order(tmp_path):
    path = _prepare_write(tmp_path / "rows.jsonl", [{"problem": f"What is {i}?", "answer": i} for i in range(50)])
    rows, entry = _prepare(tmp_path / "a", "jsonl", path, "--count", 20, "--seed", 3)
    assert [int(row["answer"]) for row in rows] == sorted(random.Random(3).sample(range(50), 20))
    assert entry["seed"] == 3 and entry["counts"]["usable"] == 50 and entry["counts"]["kept"] == 20
    other, _ = _prepare(tmp_path / "b", "jsonl", path, "--count", 20, "--seed", 4)
    assert other != rows
    with pytest.raises(ValueError, match="50 of 50 rows can be used, 51 are needed"):
        _prepare(tmp_path / "c", "jsonl", path, "--count", 51)
    with pytest.raises(ValueError, match="--count must be at least 1, got 0"):
        _prepare(tmp_path / "c", "jsonl", path, "--count", 0)
    assert not (tmp_path / "c").exists()


def test_prepare_overlap_by_hand():
    words = "one two three four five six seven eight nine ten".split()
    base = " ".join(words)
    others = {"t": base, "short": "Find x."}
    problems = [
        base.upper() + " ",  # the same text
        " ".join(words[:9]) + " zehn",  # 5 of 6 five-word runs shared, 7 in all: 0.714
        " ".join(words[:8]) + " neun zehn",  # 4 of 8: exactly 0.5
        " ".join(words[:7]) + " acht neun zehn",  # 3 of 9
        " ".join(words) + " " + " ".join(f"w{i}" for i in range(6)),  # 6 of 12
        " ".join(words) + " " + " ".join(f"w{i}" for i in range(7)),  # 6 of 13
        "find X", "Find y.", "?", "",
    ]  # fmt: skip
    assert prepare.find_overlap(problems, others) == {
        0: ("t", 1.0), 1: ("t", 0.714), 2: ("t", 0.5), 4: ("t", 0.5), 6: ("short", 1.0),
    }  # fmt: skip


def test_prepare_overlap_looks_past_drawings():
    text = "Two circles touch at P. Find the distance of their centres."
    others = {"t": text + " [asy] size(3cm); draw(circle((0,0), 1)); [/asy]"}
    problems = [text, f"{text}\n[asy]\ndot((0,0));\n[/asy] [asy]x[/asy]"]
    assert prepare.find_overlap(problems, others) == {0: ("t", 1.0), 1: ("t", 1.0)}
    assert not prepare.find_overlap(["[asy] size(3cm); draw(circle((0,0), 1)); [/asy]"], others)


def test_prepare_overlap_against_a_slow_loop():
    rng = random.Random(0)

    def text():
        return " ".join(rng.choice("a b $c$ \\frac{d}{e} 12,".split()) for _ in range(rng.randint(1, 14)))

    def runs(words):
        return {" ".join(words[i : i + 5]) for i in range(len(words) - 4)} or {" ".join(words)}

    problems, others = [text() for _ in range(60)], {f"t{i}": text() for i in range(60)}
    problems += [value + " a" for value in list(others.values())[:20]]
    expected = {}
    for i, problem in enumerate(problems):
        a = runs(re.findall("[a-z0-9]+", problem))
        scores = {}
        for key, other in others.items():
            b = runs(re.findall("[a-z0-9]+", other))
            scores[key] = len(a & b) / len(a | b)
        if max(scores.values()) >= 0.5:
            expected[i] = round(max(scores.values()), 3)
    found = prepare.find_overlap(problems, others)
    assert {i: similarity for i, (_, similarity) in found.items()} == expected
    assert 15 < len(expected) < 70


def test_prepare_against_removes_and_records(tmp_path):
    text = "A train leaves the station at noon and travels north at forty miles per hour for three hours. How far does it go?"
    test = [{"id": "t0", "problem": text, "answer": "120"}, {"id": "t1", "problem": "What is 1 + 1?", "answer": "2"}]
    against, second = (_prepare_write(tmp_path / f"test{i}.jsonl", test[i : i + 1]) for i in range(2))
    source = [
        {"problem": text.replace("forty", "sixty"), "answer": "180"},
        {"problem": "what is 1 + 1 ?", "answer": "2"},
        {"problem": "A train leaves town at noon. How far does it go?", "answer": "5"},
        {"problem": "What is 1 + 2?", "answer": "3"},
    ]
    rows, entry = _prepare_jsonl(tmp_path, source, "--against", against, second)
    assert [row["id"] for row in rows] == ["jsonl-train-2", "jsonl-train-3"]
    assert entry["dropped"]["is in a file of --against"] == [
        {"where": "line 2", "id": "jsonl-train-1", "value": f"{second}: t1", "similarity": 1.0}
    ]
    (near,) = entry["dropped"]["is nearly in a file of --against"]
    # 23 words, so 19 runs; the changed word stands in five of them: 14 / (19 + 19 - 14)
    assert len(text.split()) == 23 and near == {
        "where": "line 1", "id": "jsonl-train-0", "value": f"{against}: t0", "similarity": round(14 / 24, 3)
    }  # fmt: skip
    assert entry["against"] == [
        {"path": str(path), "sha256": _prepare_sha256(path), "rows": 1} for path in (against, second)
    ]  # fmt: skip
    assert entry["near_duplicate"] == {"shingle_words": 5, "jaccard": 0.5}
    for bad, message in ((tmp_path / "none.jsonl", "no such file"), (tmp_path / "rows.jsonl", "field 'id' is missing")):
        with pytest.raises(ValueError, match=message):
            _prepare(tmp_path / "new", "jsonl", tmp_path / "rows.jsonl", "--against", bad)
        assert not (tmp_path / "new").exists()


def test_prepare_manifest_accounts_for_every_row(tmp_path, capsys):
    source = [{"problem": f"{i % 7}?", "answer": str(i % 7) if i != 3 else ""} for i in range(20)]
    path = _prepare_write(tmp_path / "rows.jsonl", source)
    rows, entry = _prepare(tmp_path / "out", "jsonl", path, "--count", 4, "--seed", 1, "--part", "mine")
    counts = entry["counts"]
    assert counts["read"] == 20 == counts["usable"] + sum(counts["dropped"].values())
    assert counts["kept"] == 4 == len(rows)
    assert counts["dropped"] == {reason: len(entries) for reason, entries in entry["dropped"].items()}
    assert entry["sha256"] == _prepare_sha256(tmp_path / "out/mine.jsonl")
    assert entry["source"] == {"path": str(path), "sha256": _prepare_sha256(path), "repo": None, "revision": None}
    typed = f"python data/prepare.py jsonl --source {path} --out {tmp_path / 'out'} --count 4 --seed 1 --part mine"
    assert entry["command"] == typed
    assert entry["versions"]["python"] == sys.version.split()[0] and "math-verify" in entry["versions"]
    printed = capsys.readouterr().out
    assert _prepare_sha256(path) in printed and "mine.jsonl: 4 rows, 0 with a solution, of 20 read" in printed
    # a second file in the same folder joins the manifest; the same file again is refused
    _prepare(tmp_path / "out", "jsonl", path, "--part", "more")
    assert set(json.loads((tmp_path / "out/manifest.json").read_text())) == {"mine.jsonl", "more.jsonl"}
    before = (tmp_path / "out/mine.jsonl").read_bytes()
    with pytest.raises(ValueError, match="mine.jsonl: already there"):
        prepare.main(["jsonl", "--source", str(path), "--out", str(tmp_path / "out"), "--part", "mine"])
    assert (tmp_path / "out/mine.jsonl").read_bytes() == before


def test_prepare_leaves_nothing_behind_where_the_loader_refuses_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "why_unusable", lambda answer: "")  # a filter that lets everything through
    with pytest.raises(ValueError, match="field 'answer' cannot be read"):
        _prepare_jsonl(tmp_path, [{"problem": "1?", "answer": "3 +"}])
    monkeypatch.setattr(prepare, "normal_text", lambda text: text)  # and one that is finer than the loader's
    with pytest.raises(ValueError, match="2 rows were written, but load_problems reads 1"):
        _prepare_jsonl(tmp_path, [{"problem": "1 ?", "answer": 1}, {"problem": "1  ?", "answer": 1}])
    assert not list((tmp_path / "out").iterdir())


def test_prepare_refuses_another_file_than_the_pinned_one(tmp_path):
    path = _prepare_write(tmp_path / "train.jsonl", GSM8K_ROWS)
    ours, pinned = _prepare_sha256(path), "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"
    with pytest.raises(ValueError) as error:
        _prepare(tmp_path / "out", "gsm8k", path)
    assert f"sha256 {ours}, expected {pinned} (openai/grade-school-math" in str(error.value)
    with pytest.raises(ValueError, match=f"sha256 {ours}, expected {'0' * 64}"):
        _prepare(tmp_path / "out", "gsm8k", path, "--sha256", "0" * 64)
    with pytest.raises(ValueError, match="--sha256: expected 64 hex digits or `any`, got 'all'"):
        _prepare(tmp_path / "out", "gsm8k", path, "--sha256", "all")
    with pytest.raises(ValueError, match="--revision is for --source hub"):
        _prepare(tmp_path / "out", "gsm8k", path, "--revision", "0" * 40)
    with pytest.raises(ValueError, match="no such file"):
        _prepare(tmp_path / "out", "gsm8k", tmp_path / "none.jsonl")
    assert not (tmp_path / "out").exists()
    assert len(_prepare(tmp_path / "out", "gsm8k", path, "--sha256", ours)[0]) == 2


def test_prepare_table_of_sources():
    assert {source.command for source in prepare.SOURCES} == set(prepare.LAYOUTS) - {"jsonl"}
    for source in prepare.SOURCES:
        for value, digits in ((source.revision, 40), (source.sha256, 64)):
            assert re.fullmatch(f"[0-9a-f]{{{digits}}}", value) if source.command != "openr1" else value is None


@pytest.fixture
def raw_host(monkeypatch):
    """A local server in GitHub's place: {path: bytes} that it serves, and the list of paths asked for."""
    files, asked = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200 if self.path in files else 404)
            self.end_headers()
            self.wfile.write(files.get(self.path, b""))

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(prepare, "GITHUB", f"http://127.0.0.1:{server.server_port}")
    yield files, asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_prepare_downloads_at_the_pinned_commit(tmp_path, raw_host):
    files, asked = raw_host
    content = "".join(json.dumps(row) + "\n" for row in GSM8K_ROWS).encode()
    commit, other = "3101c7d5072418e28b9008a6636bde82a006892c", "0123456789" * 4
    files.update({f"/openai/grade-school-math/{c}/grade_school_math/data/train.jsonl": content for c in (commit, other)})
    with pytest.raises(ValueError, match=f"sha256 {hashlib.sha256(content).hexdigest()}, expected 17f347dc"):
        _prepare(tmp_path / "out", "gsm8k", "hub")
    rows, entry = _prepare(tmp_path / "out", "gsm8k", "hub", "--revision", other, "--sha256", "any")
    assert len(rows) == 2 and [path.split("/")[3] for path in asked] == [commit, other]
    assert entry["source"] == {
        "path": "hub", "sha256": hashlib.sha256(content).hexdigest(), "host": "github", "repo": "openai/grade-school-math",
        "file": "grade_school_math/data/train.jsonl", "revision": other,
    }  # fmt: skip
    with pytest.raises(ValueError, match="already there"):  # said before the file is fetched again
        _prepare(tmp_path / "out", "gsm8k", "hub")
    assert len(asked) == 2
    with pytest.raises(ValueError, match="svamp/test.jsonl at a45202bd.* could not be downloaded .*404.*--source FILE"):
        _prepare(tmp_path / "new", "svamp", "hub")
    for revision in ("main", "3101c7d"):
        with pytest.raises(ValueError, match=f"--revision: expected a commit hash of 40 hex digits, got '{revision}'"):
            _prepare(tmp_path / "new", "gsm8k", "hub", "--revision", revision)
    with pytest.raises(ValueError, match="math --part test is in no hub known to us"):
        _prepare(tmp_path / "new", "math", "hub", "--part", "test")
    assert not (tmp_path / "new").exists()


def test_prepare_openr1_from_the_hub_needs_a_commit_and_a_file(tmp_path, monkeypatch, capsys):
    path, commit, calls = _prepare_write(tmp_path / "rows.jsonl", OPENR1_ROWS), "ab" * 20, []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **named: calls.append((args, named)) or path)
    for flags, missing in (((), "revision"), (("--revision", commit), "file"), (("--file", "x.parquet"), "revision")):
        with pytest.raises(ValueError, match=f"the {missing} of Elliott/Openr1-Math-46k-8192 is not in the table of sources"):
            _prepare(tmp_path / "out", "openr1", "hub", *flags)
    assert not calls
    _, entry = _prepare(tmp_path / "out", "openr1", "hub", "--revision", commit, "--file", "data/x.parquet")
    assert calls == [
        (("Elliott/Openr1-Math-46k-8192", "data/x.parquet"), {"repo_type": "dataset", "revision": commit})
    ]  # fmt: skip
    assert entry["source"]["revision"] == commit and entry["source"]["sha256"] == _prepare_sha256(path)
    assert f"revision {commit}, sha256 {_prepare_sha256(path)}" in capsys.readouterr().out


def test_prepare_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1....PAR1")
    with pytest.raises(ValueError, match="x.parquet is a parquet file, which needs a package more: pip install pyarrow"):
        _prepare(tmp_path / "out", "openr1", path)


def test_prepare_parquet_reads_like_json(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed (it is optional)")
    targets = [f"<think>\nx\n</think>\n\\boxed{{{i}}}" if i % 3 else None for i in range(600)]
    rows = [_openr1_row(f"What is {i}?", str(i), target) for i, target in enumerate(targets)]
    table = sys.modules["pyarrow"].Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=170)
    flags = ["--count", 100, "--think", "strip"]
    one, entry = _prepare(tmp_path / "a", "openr1", tmp_path / "rows.parquet", *flags)
    two, other = _prepare(tmp_path / "b", "openr1", _prepare_write(tmp_path / "rows.jsonl", rows), *flags)
    assert one == two and len(one) == 100 and entry["counts"] == other["counts"] and "pyarrow" in entry["versions"]
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "rows.parquet").read_bytes()[:500])
    with pytest.raises(ValueError, match="torn.parquet: "):
        _prepare(tmp_path / "c", "openr1", tmp_path / "torn.parquet")


def _luffy_row(name, problem, answer):
    return _openr1_row(problem, answer, None) | {"data_source": name}


def test_prepare_benchmarks_check_the_number_of_problems(tmp_path):
    """LUFFY's file in small: an aime of 30 x 8 is AIME24, an amc of 83 x 4 is not AMC23."""
    rows = [_luffy_row("aime", f"Problem {i} of AIME?", f"{i:03d}") for _ in range(8) for i in range(30)]
    rows += [_luffy_row("amc", f"Problem {i} of AMC?", f"{i}.0") for i in range(83) for _ in range(4)]
    path = _prepare_write(tmp_path / "valid.jsonl", rows)
    aime, entry = _prepare(tmp_path / "out", "aime24", path, "--sha256", "any")
    assert [row["id"] for row in aime[:2]] == ["aime24-0", "aime24-1"] and [row["answer"] for row in aime][7] == "7"
    assert len(aime) == 30 and entry["counts"]["of_another_benchmark"] == 332
    assert entry["counts"]["dropped"] == {"repeats a problem": 210}
    with pytest.raises(ValueError, match="83 distinct problems in 332 rows, but amc23 has 40. .*83 problems"):
        _prepare(tmp_path / "out", "amc23", path, "--sha256", "any")
    with pytest.raises(ValueError, match="no rows for aime25 among 572"):
        _prepare(tmp_path / "out", "aime25", path, "--sha256", "any")


def test_prepare_command_line(tmp_path):
    path = _prepare_write(tmp_path / "rows.jsonl", [{"problem": "1?", "answer": 1}])
    command = [sys.executable, "data/prepare.py", "jsonl", "--source", str(path), "--out", str(tmp_path / "out")]
    prepare.main(command[2:])
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("prepare.py: ") and "already there" in done.stderr, done.stderr
    for flags in (["--cuont", "1"], ["--coun", "1"], ["--think", "keep"]):  # a typo, an abbreviation, openr1's own
        with pytest.raises(SystemExit):
            prepare.main([*command[2:5], "--out", str(tmp_path / "new"), *flags])
    imported = run_script("-X", "importtime", "data/prepare.py", "--help").stderr
    assert "data.problems" in imported and "torch" not in imported


# Real files: counted and looked at by hand.
def _real_sum(command, part):
    """The checksum of the file that `--source hub` would fetch."""
    return next(source.sha256 for source in prepare.SOURCES if (source.command, source.part) == (command, part))


def test_prepare_real_benchmarks(tmp_path, raw_host, real_data):
    out = tmp_path / "bench"
    prepare.main(["benchmarks", "--source", REAL_DATA, "--out", str(out)])
    rows = {path.stem: load_problems(path) for path in out.glob("*.jsonl")}
    counts = {"math500": 500, "amc23": 40, "olympiad": 674, "aime24": 30, "aime25": 30, "minerva": 272}
    assert {name: len(group) for name, group in rows.items()} == counts
    manifest = json.loads((out / "manifest.json").read_text())
    assert {name.removesuffix(".jsonl"): entry["counts"]["kept"] for name, entry in manifest.items()} == counts
    assert not any(entry["dropped"] for entry in manifest.values())
    assert {entry["source"]["revision"] for entry in manifest.values()} == {"ae332f5fa4dc8b4c3d3cd77ebc9cff3a3abab2d0"}
    first = rows["math500"][0]
    assert first.id == "math500-test/precalculus/807.json" and first.answer == "\\left( 3, \\frac{\\pi}{2} \\right)"
    assert first.problem.startswith("Convert the point $(0,3)$ in rectangular coordinates to polar coordinates.  Enter")
    assert (rows["aime24"][0].answer, rows["aime25"][0].answer, rows["amc23"][0].answer) == ("204", "70", "27")
    assert rows["aime25"][0].problem == (
        "Find the sum of all integer bases $b>9$ for which $17_b$ is a divisor of $97_b.$"
    )  # fmt: skip
    assert [row.answer for row in rows["olympiad"][:3]] == ["2", "\\frac{1}{2 n+2}", "2^{1009}"]
    assert [row.answer for row in rows["minerva"][:3]] == ["1.6", "4.5e33", "41.8"]
    # from the hub the same bytes
    files, asked = raw_host
    names = {"math500": "MATH-500", "olympiad": "Olympiad-Bench", "minerva": "Minerva"}
    for command in counts:
        name = names.get(command, command.upper())
        path = f"/TsinghuaC3I/Unify-Post-Training/ae332f5fa4dc8b4c3d3cd77ebc9cff3a3abab2d0/data/{name}/test.json"
        files[path] = real_data[manifest[f"{command}.jsonl"]["source"]["sha256"]].read_bytes()
    prepare.main(["benchmarks", "--source", "hub", "--out", str(tmp_path / "hub")])
    assert sorted(asked) == sorted(files)
    for command in counts:
        assert (tmp_path / f"hub/{command}.jsonl").read_bytes() == (out / f"{command}.jsonl").read_bytes()
    # cut off behind the second file, or one of them changed: the same command makes what is missing, and refuses the changed
    (out / "aime24.jsonl").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.jsonl")}
    prepare.main(["benchmarks", "--source", REAL_DATA, "--out", str(out)])
    assert load_problems(out / "aime24.jsonl") == rows["aime24"]
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in out.glob("*.jsonl")}.items()
    write_rows(out / "amc23.jsonl", tiny_rows(1))
    with pytest.raises(ValueError, match="amc23.jsonl: already there; remove it"):
        prepare.main(["benchmarks", "--source", REAL_DATA, "--out", str(out)])
    with pytest.raises(ValueError) as error:
        prepare.main(["benchmarks", "--source", str(out), "--out", str(tmp_path / "new")])
    assert "no file with the checksum of" in str(error.value) and len(str(error.value).splitlines()) == 7


def test_prepare_real_luffy_validation_file(tmp_path, real_data):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed (it is optional)")
    file, out = real_data[prepare.LUFFY_VALID], tmp_path / "out"
    for command, count in (("aime24", 30), ("math500", 500), ("minerva", 272)):
        rows, entry = _prepare(out, command, file)
        assert len(rows) == count and entry["counts"]["read"] == 2019
        assert entry["counts"]["dropped"] == ({"repeats a problem": 210} if command == "aime24" else {})
        assert rows[0]["problem"].split()[0] == {"aime24": "Every", "math500": "Convert", "minerva": "Each"}[command]
    # the other copy of AIME24: five texts differ (drawings, blanks), and all thirty are found
    ours, _ = _prepare(tmp_path / "ours", "aime24", real_data[_real_sum("aime24", "aime24")])
    theirs = load_problems(out / "aime24.jsonl")
    same = {prepare.normal_text(row["problem"]) for row in ours} & {prepare.normal_text(row.problem) for row in theirs}
    found = prepare.find_overlap([row.problem for row in theirs], {row["id"]: row["problem"] for row in ours})
    assert len(same) == 25 and len(found) == len({key for key, _ in found.values()}) == 30
    answers = {row["id"]: row["answer"] for row in ours}
    assert all(answers[key] == theirs[i].answer for i, (key, _) in found.items())
    for command, what in (("amc23", "83 distinct problems in 332 rows"), ("olympiad", "675 distinct problems in 675 rows")):
        with pytest.raises(ValueError, match="This is LUFFY's validation file"):
            _prepare(out, command, file)
        with pytest.raises(ValueError, match=what):
            _prepare(out, command, file, "--sha256", "any")


# (command, part): (repository and commit, rows read, rows kept, what is dropped, the first row's answer and problem)
REAL_TRAINING_FILES = {
    ("gsm8k", "test"): ("openai/grade-school-math@3101c7d5", 1319, 1319, {}, "18", "Janet’s ducks lay 16 eggs"),
    ("gsm8k", "train"): (
        "openai/grade-school-math@3101c7d5", 7473, 7471, {"is nearly in a file of --against": 2},
        "72", "Natalia sold clips to 48 of her friends in April",
    ),
    ("mawps", "singleop"): ("QwenLM/Qwen2.5-Math@a45202bd", 562, 531, {"repeats a problem": 31}, "14", "If there are 7"),
    ("mawps", "addsub"): ("QwenLM/Qwen2.5-Math@a45202bd", 395, 395, {}, "43", "Joan found 70 seashells"),
    ("mawps", "multiarith"): (
        "QwenLM/Qwen2.5-Math@a45202bd", 600, 580, {"repeats a problem": 20},
        "39", "For Halloween Debby and her sister combined",
    ),
    ("svamp", "svamp"): ("QwenLM/Qwen2.5-Math@a45202bd", 1000, 1000, {}, "145", "There are 87 oranges"),
    ("asdiv", "asdiv"): (
        "QwenLM/Qwen2.5-Math@a45202bd", 2215, 2214, {"repeats a problem": 1},
        "9", "Seven red apples and two green apples are in the basket. How many apples are in the basket?",
    ),
    ("math", "train"): (
        "fadibenz/llm-alignment-reasoning-RL@377d6e5b", 7500, 7497, {"repeats a problem": 1, "its answer is empty": 2},
        "16", "Chandra has four",
    ),
    ("solutions", "train"): (
        "desirepathh/assignment5-alignment@d789558c", 4836, 4708,
        {"repeats a problem": 1, "its answer is empty": 1, "no solution: its final answer is not the row's": 126},
        "\\frac{\\sqrt{2}}{2}", "Compute $",
    ),
}  # fmt: skip


def test_prepare_real_training_files(tmp_path, real_data):
    rows, dropped = {}, {}
    for (command, part), (origin, read, kept, reasons, answer, problem) in REAL_TRAINING_FILES.items():
        flags = ["--part", part] if command in prepare.PARTS else []
        flags += ["--against", tmp_path / "gsm8k/test.jsonl"] if (command, part) == ("gsm8k", "train") else []
        rows[command, part], entry = _prepare(tmp_path / command, command, real_data[_real_sum(command, part)], *flags)
        first, dropped[command, part] = rows[command, part][0], entry["dropped"]
        assert f"{entry['source']['repo']}@{entry['source']['revision'][:8]}" == origin
        assert (entry["counts"]["read"], len(rows[command, part]), entry["counts"]["dropped"]) == (read, kept, reasons)
        assert first["answer"] == answer and first["problem"].startswith(problem)
    # "A train travels 270 miles in 3 hours. At the same rate ...": of its 21 runs, six hold one of the three changed words
    near = dropped["gsm8k", "train"]["is nearly in a file of --against"]
    assert [e["where"] for e in near] == ["line 1315", "line 5163"]
    assert {e["similarity"] for e in near} == {round(15 / 27, 3)}
    assert [e["where"] for e in dropped["math", "train"]["its answer is empty"]] == ["line 7037", "line 7437"]
    assert rows["math", "train"][0]["id"] == "math-train-0"
    assert rows["gsm8k", "train"][0]["solution"] == (
        "Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether in April and May."
        "\n\nThe final answer is \\boxed{72}"
    )
    assert not any("<<" in row["solution"] or "####" in row["solution"] for row in rows["gsm8k", "train"])
    solved = [row["solution"] for row in rows["solutions", "train"]]
    assert solved[0].endswith("= 1/√2 = √2/2.\n\nThe final answer is \\boxed{√2/2}")
    assert not any("think>" in text or "<answer>" in text for text in solved)
