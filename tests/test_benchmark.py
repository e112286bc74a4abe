"""The paper's benchmarks and its table, and the comparison of two models."""

import json
from pathlib import Path

import numpy as np
import pytest

import eval as grading
from data import prepare
from model import load_tokenizer
from tests.common import ROOT, TINY_BASE, _eval_file, _eval_row
from tools import benchmark, resumable


def test_benchmarks_have_the_papers_settings_and_other_files_small_ones(tmp_path, eval_worker):
    folder, mine, tokenizer = tmp_path / "bench", _eval_file(tmp_path, _eval_row()), load_tokenizer(TINY_BASE)
    folder.mkdir()
    for name in prepare.BENCHMARKS:
        (folder / f"{name}.jsonl").write_text(json.dumps(_eval_row(name)) + "\n")

    def settings(*flags):
        args = resumable.build_parser().parse_args(["--model", "m", *map(str, flags)])
        sets = resumable.read_sets(args, eval_worker, tokenizer, context=512)
        return {Path(one.file).stem: (one.n, one.max_new_tokens) for one in sets}

    often, seldom = (32, 32_768), (4, 32_768)
    papers = {"math500": seldom, "amc23": often, "olympiad": seldom, "aime24": often, "aime25": often, "minerva": seldom}
    assert settings("--data", mine, "--benchmarks", folder) == {"rows": (1, 2048)} | papers
    assert set(settings("--benchmarks", folder, "--n", 4, "--max_new_tokens", 9).values()) == {(4, 9)}
    per_file = settings("--data", mine, "--benchmarks", folder, "--n", *range(1, 8))
    assert [n for n, _ in per_file.values()] == [1, 2, 3, 4, 5, 6, 7] and list(per_file) == ["rows", *papers]
    for flags, message in (
        (["--data", mine, "--n", 1, 2], "--n has 2 numbers for 1 files"),
        (["--data", mine, mine], "is given twice"),
        (["--benchmarks", tmp_path / "none"], "none: no folder with math500.jsonl"),
        (["--benchmarks", tmp_path], "rows.jsonl is none of math500"),
        ([], "--model needs problems"),
    ):
        with pytest.raises(ValueError, match=message):
            settings(*flags)


def test_paired_interval_against_the_normal_approximation():
    generator = np.random.default_rng(0)
    difficulty = generator.beta(0.5, 0.5, 600)
    a, b = generator.binomial(8, difficulty), generator.binomial(8, np.clip(difficulty + 0.01, 0, 1))
    result, drawn = benchmark.paired_bootstrap(a, b, 8, seed=3)
    change = (b - a) / 8
    error = change.std(ddof=1) / 600**0.5
    assert result["difference"] == pytest.approx(change.mean()) and len(drawn) == 10_000
    assert result["low"] == pytest.approx(change.mean() - 1.96 * error, abs=0.08 * error)
    assert result["high"] == pytest.approx(change.mean() + 1.96 * error, abs=0.08 * error)
    unpaired = ((a / 8).var(ddof=1) / 600 + (b / 8).var(ddof=1) / 600) ** 0.5
    assert result["high"] - result["low"] < 0.6 * 2 * 1.96 * unpaired  # what pairing is for
    assert result != benchmark.paired_bootstrap(a, b, 8, seed=4)[0]
    assert benchmark.paired_bootstrap([1, 2], [1, 2], 2, seed=0)[0] == {"difference": 0.0, "low": 0.0, "high": 0.0}


def _results(correct, file="x/math500.jsonl", *, n=4, sha256="d", longest=32_768, problems=None, **config):
    """A result file with one problem file, as eval.py writes it: `correct` right samples of n per problem."""
    sample = {"reward": 1.0, "truncated": False, "timed_out": False, "length": 9}
    records = [
        {"id": problem, "samples": [sample | {"correct": i < count} for i in range(n)]}
        for problem, count in correct.items()
    ]
    part = grading.figures(records) | {"data_sha256": sha256, "max_new_tokens": longest}
    part["problems"] = problems or part["problems"]
    return {
        "config": {"model": "m", "temperature": 0.6, "top_p": 0.95, "guided": False} | config,
        "files": {file: part},
    }


def test_compare_by_hand_and_its_average(tmp_path, capsys):
    a, b = _results({"p": 0, "q": 2}), _results({"q": 3, "p": 4}, "elsewhere/copy.jsonl")
    (row,) = benchmark.compare(a, b)
    assert (row["a"], row["b"], row["difference"]) == (0.25, 0.875, 0.625)
    assert (row["low"], row["high"], row["problems"]) == (0.25, 1.0, 2)  # +4 and +1 of 4
    names = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    for name, results, counts in zip(names, (a, b), ({"r": 4, "s": 1}, {"r": 0, "s": 1}), strict=True):
        results["files"] |= _results(counts, "x/second.jsonl", sha256="e")["files"]
        Path(name).write_text(json.dumps(results))
    rows = grading.main(["--compare", *names])
    assert [r["file"] for r in rows] == ["x/math500.jsonl", "x/second.jsonl", "average of the files"]
    assert rows[2]["difference"] == pytest.approx((0.625 - 0.5) / 2) and rows[2]["problems"] == 4
    assert rows[2]["low"] == pytest.approx((0.25 - 1) / 2) and rows[2]["high"] == pytest.approx((1 + 0) / 2)
    out = capsys.readouterr().out
    assert "x/math500.jsonl: A 25.0  B 87.5  difference +62.5 [+25.0, +100.0]  problems 2" in out


def test_compare_refuses_what_is_not_about_the_same():
    a = _results({"p": 0, "q": 2})
    for changes, message in (
        (dict(n=2), "x/math500.jsonl has n 4 in A, 2 in B"),
        (dict(temperature=1.0), "temperature 0.6 in A, 1.0 in B"),
        (dict(top_p=1.0), "top_p 0.95 in A"),
        (dict(longest=2048), "max_new_tokens 32768 in A"),
        (dict(sha256="0"), "x/math500.jsonl without strategies is in B only"),
        (dict(guided=True), "without strategies is in A only"),
        (dict(correct={"p": 1}), "problem 'q' of x/math500.jsonl is in one of A and B only"),
    ):
        with pytest.raises(ValueError, match=message):
            benchmark.compare(a, _results(**{"correct": {"p": 0, "q": 2}} | changes))


def test_compare_and_table_name_a_file_that_is_none_of_ours(tmp_path):
    bad = str(tmp_path / "bad.json")
    for text in (None, "", "[]", "{}", '{"files": {"f": {"accuracy": 1}}, "config": {}}', '{"files": 3}'):
        if text is not None:
            Path(bad).write_text(text)
        for command in (["--compare", bad, bad], ["--table", bad]):
            with pytest.raises(ValueError, match="bad.json: not a results file of eval.py"):
                grading.main(command)


def test_table_by_hand():
    """tests/benchmark_table.md; its averages: (50 + 25 + 50 + 0) / 4, and sqrt(25^2 + 0 + 50^2 + 0) / 4."""
    ours = _results({"p": 1, "q": 3}, "b/math500.jsonl", model="runs/x/model", problems=500)
    assert benchmark.table([ours]).splitlines()[2] == "| runs/x/model | 50.0 ± 25.0 | – | – | – | – |"
    for name, n, p, q in (("amc23", 32, 8, 8), ("olympiad", 4, 4, 0), ("aime24", 32, 0, 0), ("aime25", 32, 16, 16)):
        one = _results({"p": p, "q": q}, f"b/{name}.jsonl", n=n, sha256=name, problems=prepare.BENCHMARKS[name])
        ours["files"] |= one["files"]
    other = _results({"p": 4}, "math500.jsonl", model="hot", temperature=1.0, longest=2048, guided=True)
    assert benchmark.table([ours, other]) + "\n" == (ROOT / "tests/benchmark_table.md").read_text(encoding="utf-8")
    ours["files"]["c/amc23.jsonl"] = ours["files"]["b/amc23.jsonl"] | {"data_sha256": "another"}
    with pytest.raises(ValueError, match="two files have one name"):
        benchmark.table([ours])
