"""Problem files: what is read and what is refused."""

import json

import pytest

import grader
from data import prepare
from data.problems import read_row
from eval import load_problems
from grader import is_correct
from strategy import Strategy
from tests.common import ROOT, _eval_file, _eval_row

# (a line, or fields that replace those of a good row; a part of the message)
BAD_ROWS = json.loads((ROOT / "tests/problem_rows.json").read_text())


def test_load_problems(tmp_path, eval_worker):
    strategy = {"type": "sum", "strategy": "Add.", "steps": ["Add them."]}
    rows = [
        _eval_row(1, solution="1", strategy=strategy),
        _eval_row(2, answer=" $\\boxed{045}$ "),
        _eval_row(3, answer="\\(x+1\\)"),
        *[_eval_row(i, answer=answer) for i, answer in enumerate(['["34"]', "['\\\\frac{1}{2}']", "[34, 35]"], start=4)],
    ]
    first, second, third, *listed = load_problems(_eval_file(tmp_path, *rows), eval_worker)
    assert (first.id, first.problem, first.answer, first.solution) == ("r1", "What is 1 + 0?", "1", "1")
    assert first.strategy == Strategy("sum", "Add.", ("Add them.",))
    assert (second.answer, second.solution, second.strategy) == ("045", None, None)
    assert third.answer == "x+1"
    assert [row.answer for row in listed] == ["34", "\\frac{1}{2}", "[34, 35]"]


def test_words_that_do_answer_are_no_placeholders():
    for answer in ("no solution", "undefined", "\\emptyset", "No", "n", "\\nu", "-1", "n/2", "solve", "not unique", "seven"):
        assert grader.why_unusable(answer) == "", answer


def test_load_problems_takes_what_people_have(tmp_path, eval_worker):
    """Numbers for texts, null for nothing, empty lines, a byte order mark, and fields of their own, which stay."""
    rows = [_eval_row(1, id=7, answer=3.5, solution=None, strategy=None, level=5, tests=["assert f(1) == 2"]), _eval_row(2)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)) + "\n \n", encoding="utf-8")
    first, second = load_problems(path, eval_worker)
    assert (first.id, first.answer, first.solution, first.strategy) == ("7", "3.5", None, None)
    assert first.extra == {"level": 5, "tests": ["assert f(1) == 2"]} and second.extra == {}
    assert read_row(json.dumps(first.to_row()).encode()) == first
    path.write_text("\n{\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"{path}:2: "):  # the line in the file, whatever was passed over
        load_problems(path, eval_worker)


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_load_problems_names_line_and_value(row, message, tmp_path, eval_worker):
    if not isinstance(row, str):
        row = _eval_row(1) | row
    path = _eval_file(tmp_path, _eval_row(2), row, _eval_row(4, answer=""))
    with pytest.raises(ValueError) as error:
        load_problems(path, eval_worker)
    assert str(error.value).startswith(f"{path}:2: ")
    first, second, hint = str(error.value).splitlines()
    assert message in first and second.startswith(f"{path}:3: ") and "data/prepare.py jsonl" in hint


def test_load_problems_drops_repeated_rows(tmp_path, eval_worker, capsys):
    again = _eval_row(1, id="again", answer="1.0", problem=" What is 1 + 0? ")
    path = _eval_file(tmp_path, _eval_row(1), _eval_row(2), _eval_row(1), again)
    assert [p.id for p in load_problems(path, eval_worker)] == ["r1", "r2"]
    assert capsys.readouterr().out == f"{path}: dropped 2 rows that repeat an earlier problem and its answer\n"


@pytest.mark.parametrize(("lines", "message"), [("", "no rows"), (None, "no such file")])
def test_load_problems_needs_a_file_with_rows(lines, message, tmp_path):
    if lines is not None:
        (tmp_path / "rows.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=message):
        load_problems(tmp_path / "rows.jsonl")


def test_load_problems_accepts_every_answer_of_the_real_data_sets(real_data, eval_worker):
    answers, field = {}, {"gsm8k": "answer", "math": "answer", "mawps": "target", "svamp": "Answer"}
    for source in prepare.SOURCES:
        if source.repo == prepare.UNIFY:
            answers[source.command] = [row["answer"] for row in json.loads(real_data[source.sha256].read_text())]
        elif source.command in field:
            rows = [json.loads(row) for row in real_data[source.sha256].open()]
            answers[source.command, source.part] = [str(row[field[source.command]]).split("####")[-1] for row in rows]
    rejected = {}
    for name, group in answers.items():
        group = sorted(set(group))  # thousands repeat
        rejected[name] = [x for x in group if grader.why_unusable(grader.normalise_answer(x))]
        assert all(is_correct(f"\\boxed{{{x}}}", grader.normalise_answer(x), eval_worker) for x in group if x)
    # two rows of MATH have an empty answer; nothing else is refused
    assert {name: bad for name, bad in rejected.items() if bad} == {("math", "train"): [""]}
    assert len(answers) == 13 and eval_worker.timeouts == 0
