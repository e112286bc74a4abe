"""The paper's benchmarks and its table, comparisons of two models, and what guidance changes."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as grading
import weighting
from data import prepare
from tests.common import _eval_file, _eval_row
from tools import benchmark
from tools.resumable import read_sets


def test_benchmarks_have_the_papers_settings_and_other_files_small_ones(tmp_path, eval_worker):
    names, folder = ["aime24", "aime25", "amc23", "math500", "minerva", "olympiad"], tmp_path / "bench"
    mine = _eval_file(tmp_path, _eval_row())
    folder.mkdir()
    for name in names:
        (folder / f"{name}.jsonl").write_text(json.dumps(_eval_row(name)) + "\n")

    def settings(*flags):
        args = grading.build_parser().parse_args(["--model", "m", *map(str, flags)])
        return {Path(one.file).stem: (one.n, one.max_new_tokens) for one in read_sets(args, eval_worker)}

    often, seldom = (32, 32_768), (4, 32_768)
    papers = {"math500": seldom, "amc23": often, "olympiad": seldom, "aime24": often, "aime25": often, "minerva": seldom}
    assert settings("--data", mine, "--benchmarks", folder) == {"rows": (1, 2048)} | papers
    assert set(settings("--benchmarks", folder, "--n", 4, "--max_new_tokens", 9).values()) == {(4, 9)}
    per_file = settings("--data", mine, "--benchmarks", folder, "--n", *range(1, 8))
    assert {name: n for name, (n, _) in per_file.items()} == dict(zip(["rows", *papers], range(1, 8), strict=True))
    for flags, message in (
        (["--data", mine, "--n", 1, 2], "--n has 2 numbers for 1 files"),
        (["--data", mine, mine], "is given twice"),
        (["--benchmarks", tmp_path / "none"], "none: no folder with math500.jsonl"),
        (["--benchmarks", tmp_path], "rows.jsonl is none of math500, .* with --data"),
        ([], "--model needs problems"),
    ):
        with pytest.raises(ValueError, match=message):
            settings(*flags)


def test_bootstrap_equals_a_slow_loop():
    values, generator = [3, -1, 0, 2, 2, -4, 1], np.random.default_rng([5, 2])
    slow = []
    for _ in range(300):
        slow.append(sum(values[i] for i in generator.integers(7, size=7)) / 7)
    drawn = benchmark.bootstrap_means(values, seed=[5, 2], resamples=300)
    assert drawn.tolist() == slow
    many = np.tile(values, 100_000)  # more than one block of indices
    block = benchmark.bootstrap_means(many, seed=1, resamples=12)
    generator = np.random.default_rng(1)
    assert block.tolist() == [many[generator.integers(len(many), size=len(many))].sum() / len(many) for _ in range(12)]


def test_paired_interval_against_the_normal_approximation():
    generator = np.random.default_rng(0)
    difficulty = generator.beta(0.5, 0.5, 600)
    a, b = generator.binomial(8, difficulty), generator.binomial(8, np.clip(difficulty + 0.03, 0, 1))
    result, drawn = benchmark.paired_bootstrap(a, b, 8, seed=3)
    change = (b - a) / 8
    error = change.std(ddof=1) / 600**0.5
    assert result["difference"] == pytest.approx(change.mean()) and len(drawn) == 10_000
    assert result["low"] == pytest.approx(change.mean() - 1.96 * error, abs=0.08 * error)
    assert result["high"] == pytest.approx(change.mean() + 1.96 * error, abs=0.08 * error)
    assert result["p"] == pytest.approx(math.erfc(abs(change.mean()) / error / 2**0.5), rel=0.3, abs=0.001)
    unpaired = ((a / 8).var(ddof=1) / 600 + (b / 8).var(ddof=1) / 600) ** 0.5
    assert result["high"] - result["low"] < 0.6 * 2 * 1.96 * unpaired  # what pairing is for
    again, swapped = benchmark.paired_bootstrap(a, b, 8, seed=3)[0], benchmark.paired_bootstrap(b, a, 8, seed=3)[0]
    assert again == result != benchmark.paired_bootstrap(a, b, 8, seed=4)[0]
    assert (swapped["low"], swapped["high"]) == pytest.approx((-result["high"], -result["low"]))
    assert benchmark.paired_bootstrap([1, 2], [1, 2], 2, seed=0)[0] == {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
    assert benchmark.paired_bootstrap([0] * 9, [2] * 9, 2, seed=0)[0]["p"] == 0.0


def _eval_results(correct, file="x/math500.jsonl", *, n=4, guided=False, model="m", **changes):
    """A result file with one problem file, as main writes it: `correct` right samples of n per problem."""
    part = grading.figures([
        {"id": problem, "majority": 0, "samples": [
            {"correct": i < count, "truncated": False, "timed_out": False, "length": 9} for i in range(n)]}
        for problem, count in correct.items()
    ], voted=True)  # fmt: skip
    settings = {"data_sha256": "d" * 64, "max_new_tokens": 32_768}
    config = {"model": model, "temperature": 0.6, "top_p": 0.95, "guided": guided}
    assert not changes.keys() - config.keys() - settings.keys() - {"problems"}
    part |= {name: changes.get(name, value) for name, value in settings.items()}
    part["problems"] = changes.get("problems", part["problems"])
    config |= {name: value for name, value in changes.items() if name in config}
    return {"config": config, "files": {file: part}}


def test_compare_by_hand_and_its_average(tmp_path, capsys):
    a, b = _eval_results({"p": 0, "q": 2}), _eval_results({"q": 3, "p": 4}, "elsewhere/copy.jsonl")
    (row,) = benchmark.compare(a, b)
    assert (row["a"], row["b"], row["difference"]) == (0.25, 0.875, 0.625)
    assert (row["low"], row["high"], row["p"], row["problems"]) == (0.25, 1.0, 0.0, 2)  # +4 and +1 of 4, never below zero
    for results, counts in ((a, {"r": 4, "s": 1}), (b, {"r": 0, "s": 1})):
        results["files"] |= _eval_results(counts, "x/second.jsonl", data_sha256="e" * 64)["files"]
    for name, results in (("a.json", a), ("b.json", b)):
        (tmp_path / name).write_text(json.dumps(results))
    names = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    rows = grading.main(["--compare", *names])
    assert [r["file"] for r in rows] == ["x/math500.jsonl", "x/second.jsonl", "average of the files"]
    assert rows[2]["difference"] == pytest.approx((0.625 - 0.5) / 2) and rows[2]["problems"] == 4
    assert rows[2]["low"] == pytest.approx((0.25 - 1) / 2) and rows[2]["high"] == pytest.approx((1 + 0) / 2)
    # the two files are drawn apart from each other: their average also takes the values between the extremes
    out = capsys.readouterr().out
    assert "x/math500.jsonl: A 25.0  B 87.5  difference +62.5 [+25.0, +100.0]  p below 0.0002  problems 2" in out
    assert rows == grading.main(["--compare", *names]) and f"A: {names[0]}" in out


def test_compare_draws_each_file_by_itself():
    a, b = ({"files": {}, "config": None} for _ in range(2))
    for name in "de":
        for results, counts in ((a, [0] * 50), (b, [0, 1] * 25)):
            one = _eval_results({str(i): c for i, c in enumerate(counts)}, name, n=1, data_sha256=name * 64)
            results["files"] |= one["files"]
            results["config"] = one["config"]
    first, second, mean = benchmark.compare(a, b)
    width, both = first["high"] - first["low"], mean["high"] - mean["low"]
    assert both == pytest.approx(width / 2**0.5, rel=0.1)  # as wide as one's if they moved together
    assert second["high"] - second["low"] == pytest.approx(width, rel=0.15)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(n=2), "x/math500.jsonl has n 4 in A, 2 in B"),
        (dict(temperature=1.0), "temperature 0.6 in A, 1.0 in B"),
        (dict(top_p=1.0), "top_p 0.95 in A"),
        (dict(max_new_tokens=2048), "max_new_tokens 32768 in A"),
        (dict(data_sha256="0" * 64), "x/math500.jsonl without strategies is in A; B has no file of that checksum"),
        (dict(guided=True), "without strategies is in A; B has no file"),
        (dict(correct={"p": 1}), "problem 'q' of x/math500.jsonl is in one of A and B only"),
        (dict(correct={"p": 1, "q": 1, "r": 1}), "problem 'r' of"),
    ],
)
def test_compare_refuses(changes, message):
    a, b = _eval_results({"p": 0, "q": 2}), _eval_results(**{"correct": {"p": 0, "q": 2}} | changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        benchmark.compare(a, b)
    b = _eval_results({"p": 0, "q": 2})
    b["files"] |= _eval_results({"p": 1}, "more.jsonl", data_sha256="e" * 64)["files"]
    with pytest.raises(ValueError, match="more.jsonl without strategies is in B; A has no file"):
        benchmark.compare(a, b)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": {"f": {"accuracy": 1}}, "config": {}}', '{"files": 3}'])
def test_compare_and_table_name_a_file_that_is_none_of_ours(text, tmp_path):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(_eval_results({"p": 1})))
    bad.write_text(text)
    for command in (["--compare", str(good), str(bad)], ["--table", str(good), str(bad)]):
        with pytest.raises(ValueError, match="bad.json: not a results file of eval.py"):
            grading.main(command)
    with pytest.raises(ValueError, match="none.json: not a results file"):
        grading.main(["--table", str(tmp_path / "none.json")])


def test_guidance_by_hand():
    auto, guided = [0, 4, 2, 2, 0], [4, 4, 1, 2, 0]
    alpha = weighting.instance_weight(torch.tensor(auto) / 4, torch.tensor(guided) / 4)
    result = benchmark.guidance(auto, guided, 4, alpha.tolist(), ["sum", "sum", "area", "sum", "odd"])
    overall = result["overall"]
    assert (overall["p_auto"], overall["p_guide"]) == (8 / 20, 11 / 20)
    assert (overall["helps"], overall["hurts"], overall["same"]) == (0.2, 0.2, 0.6)
    # 0.8 at 0 -> 1; 0.5 * 0.1 / 1.1; 0 where guidance hurts by 0.25; 0.5 * 0.1 / 0.6; 0.5 at 0 -> 0
    weights = [0.8, 0.05 / 1.1, 0.0, 0.05 / 0.6, 0.5]
    assert overall["alpha"] == pytest.approx(sum(weights) / 5, abs=1e-6)
    assert overall["difference"] == pytest.approx(3 / 20) and overall["low"] <= 0 < overall["high"]
    assert list(result["families"]) == ["(other)", "sum"] and result["families"]["(other)"]["problems"] == 2
    own = result["families"]["sum"]
    assert (own["p_auto"], own["p_guide"], own["helps"], own["hurts"]) == (6 / 12, 10 / 12, 1 / 3, 0)
    assert own["alpha"] == pytest.approx((weights[0] + weights[1] + weights[3]) / 3, abs=1e-6)
    assert benchmark.guidance(auto, guided, 4, alpha.tolist(), list("abcde"))["families"] == {}
    twice = benchmark.guidance(auto, guided, 4, alpha.tolist(), list("axbxc"))["families"]
    assert {name: family["problems"] for name, family in twice.items()} == {"(other)": 3, "x": 2}
    lines = benchmark.guidance_lines(result)
    assert lines[0].startswith("  guidance: p_auto 40.0  p_guide 55.0  helps 20.0 %  hurts 20.0 %  same 60.0 %  alpha 0.286")
    assert len(lines) == 3 and lines[2].startswith("  sum: p_auto 50.0  p_guide 83.3")


def test_table_layout():
    ours = _eval_results({"p": 1, "q": 3}, "b/math500.jsonl", model="runs/x/model", problems=500)
    assert benchmark.table([ours]).splitlines()[2] == "| runs/x/model | 50.0 ± 25.0 | – | – | – | – |"
    for name, n, counts in (("amc23", 32, (8, 8)), ("olympiad", 4, (4, 0)), ("aime24", 32, (0, 0)), ("aime25", 32, (16, 16))):
        one = _eval_results(dict(zip("pq", counts, strict=True)), f"b/{name}.jsonl", n=n, data_sha256=name)
        ours["files"] |= one["files"]
        one["files"][f"b/{name}.jsonl"]["problems"] = prepare.BENCHMARKS[name]
    other = _eval_results({"p": 4}, "math500.jsonl", n=4, model="hot", temperature=1.0, max_new_tokens=2048, guided=True)
    lines = benchmark.table([ours, other]).splitlines()
    assert lines[:2] == ["| model | MATH500 | AMC23 | Olympiad | AIME24 | avg |", "|---|---|---|---|---|---|"]
    # avg: (50 + 25 + 50 + 0) / 4, and sqrt(25^2 + 0 + 50^2 + 0) / 4
    assert lines[2] == "| runs/x/model | 50.0 ± 25.0 | 25.0 ± 0.0 | 50.0 ± 50.0 | 0.0 ± 0.0 | 31.2 ± 14.0 |"
    assert lines[3] == "| hot, guided | 100.0 | – | – | – | – |"
    assert lines[9] == "| Qwen2.5-1.5B-Instruct, SGPO [paper] | 57.7 | 29.0 | 23.7 | 9.0 | 29.9 |"
    assert lines[21] == "| Llama-3.2-8B-Instruct, SGPO [paper] | 52.0 | 25.6 | 22.9 | 10.0 | 27.6 |"
    notes = lines[22:]
    assert notes[0] == "" and "not measured here" in notes[1] and "temperature 0.6, top_p 0.95" in notes[1]
    assert "the public model of that size is Llama-3.1-8B-Instruct" in notes[2]
    assert notes[3:] == [
        "runs/x/model: aime25 50.0 (avg@32) has no column in the paper's table",
        "hot, guided: with strategies in the prompts, the paper evaluates without",
        "hot, guided: MATH500 differs from the paper in temperature 1.0 (paper 0.6), max_new_tokens 2048 (paper 32768), "
        "problems 1 (paper 500)",
    ]
    ours["files"]["c/amc23.jsonl"] = ours["files"]["b/amc23.jsonl"] | {"data_sha256": "another"}
    with pytest.raises(ValueError, match="two files are called amc23"):
        benchmark.table([ours])


def test_the_papers_rows():
    """Copied right: each average is that of its row, up to its rounding, but for the one that a note names."""
    printed = [row for rows in benchmark.PAPER_ROWS.values() for row in rows.values()]
    assert len(set(printed)) == 18 and all(a > b > c > d for a, b, c, d, _ in printed)  # the same order in each, easy to hard
    odd = [row for row in printed if abs(sum(row[:4]) / 4 - row[4]) > 0.0501]
    assert odd == [benchmark.PAPER_ROWS["Llama-3.2-8B-Instruct"]["LUFFY"]] and odd[0][4] == 26.5
    assert sum(odd[0][:4]) / 4 == pytest.approx(26.6, abs=0.0501) and "averages 26.6, printed is 26.5" in benchmark.LLAMA_NOTE


@pytest.mark.parametrize(
    "evaluated, shown",
    [
        (["runs/x/model"], ["Qwen2.5-1.5B", "Qwen2.5-7B", "Llama-3.2-8B"]),
        (["Qwen/Qwen2.5-7B-Instruct", "runs/x/model"], ["Qwen2.5-7B"]),
        (["meta-llama/Llama-3.1-8B-Instruct", "runs/qwen2.5-1.5b-instruct-sgpo/model"], ["Qwen2.5-1.5B", "Llama-3.2-8B"]),
    ],
)
def test_the_table_shows_the_papers_rows_of_the_models_that_were_evaluated(evaluated, shown):
    text = benchmark.table([_eval_results({"p": 1}, model=model) for model in evaluated])
    rows = [line for line in text.splitlines() if line.startswith("|") and "[paper]" in line]
    assert [row.split("-Instruct,")[0] for row in rows] == [f"| {model}" for model in shown for _ in range(6)]
    assert ("Llama-3.2-8B-Instruct is the name as printed" in text) == ("Llama-3.2-8B" in shown)
    assert ("are left out" in text) == (len(shown) < 3)
