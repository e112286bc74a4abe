"""Problem files: what is read and what is refused."""

import json

import pytest

import grader
from data import prepare
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


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_load_problems_names_line_and_value(row, message, tmp_path, eval_worker):
    if not isinstance(row, str):
        row = _eval_row(1) | row
    path = _eval_file(tmp_path, _eval_row(2), row, _eval_row(4))
    with pytest.raises(ValueError) as error:
        load_problems(path, eval_worker)
    assert str(error.value).startswith(f"{path}:2: ")
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_load_problems_reports_twenty_errors_at_once(tmp_path, eval_worker):
    path = _eval_file(tmp_path, _eval_row(0), *[_eval_row(i, answer="") for i in range(1, 26)])
    with pytest.raises(ValueError) as error:
        load_problems(path, eval_worker)
    lines = str(error.value).splitlines()
    assert [line.split(": ")[0] for line in lines[:20]] == [f"{path}:{i}" for i in range(2, 22)]
    assert lines[20:] == ["... and 5 more"]


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
