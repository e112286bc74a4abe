"""The paper's benchmarks: pass@k, votes, paired intervals, tables."""

import itertools
import json
import math
import re
import shutil
import types

import numpy as np
import pytest
import torch

import eval as grading
import weighting
from data import prepare
from eval import summarise
from tests.common import ROOT, run_script
from tools import benchmark as stats


def test_pass_at_k_equals_counting_all_subsets():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            hits = [any(sample < c for sample in chosen) for chosen in itertools.combinations(range(n), k)]
            assert stats.pass_at_k(n, c, k) == pytest.approx(sum(hits) / len(hits), abs=1e-12)
    assert stats.pass_at_k(2000, 1, 500) == pytest.approx(0.25)  # C(2000, 500) has 487 digits
    for bad in ((4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)):
        with pytest.raises(ValueError, match="expected 0 <= c <= n"):
            stats.pass_at_k(*bad)


def test_pass_at_every_power_of_two_by_hand():
    ks = {n: stats.sample_counts(n) for n in (1, 2, 3, 4, 6, 32)}
    assert ks == {1: [1], 2: [1, 2], 3: [1, 2, 3], 4: [1, 2, 4], 6: [1, 2, 4, 6], 32: [1, 2, 4, 8, 16, 32]}
    correct, nothing = [[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]], [[0] * 4] * 3
    result = summarise(correct, nothing, nothing, [True, False, True])
    # pass@2: 1 - C(3,2)/C(4,2) = 1/2, 0, 1 - 0 = 1
    assert result["pass_at"] == pytest.approx({"1": 4 / 12, "2": 1.5 / 3, "4": 2 / 3})
    assert result["pass_at_n"] == result["pass_at"]["4"] and result["maj_at_n"] == pytest.approx(2 / 3)
    assert "maj_at_n" not in summarise(correct, nothing, nothing)
    with pytest.raises(ValueError, match="a vote for each of 3 problems, got 2"):
        summarise(correct, nothing, nothing, [True, False])


EVAL_VOTES = [
    (["7", "8", "8"], 1),
    (["7", "8", "8", "7"], 0),  # a tie: the group that was opened first
    (["8", "7", "7", "8"], 0),
    (["9", "7", "8", "8", "7"], 1),  # not the first of all, but the first of those with two votes
    ([None, None, "3"], 2),  # one vote is more than none
    ([None, "4", None, None], 1),
    ([None, None], None),
    (["0.5", "3", "3", "\\frac12", "1/2"], 0),  # three ways to write a half outvote two threes
    (["3", "\\sqrt{8}", "2\\sqrt{2}"], 1),  # only math-verify sees that these are the same
    (["1, 2", "2, 1", "(1,2)", "(1,2)", "(1,2)"], 2),
]


@pytest.mark.parametrize(("answers", "winner"), EVAL_VOTES)
def test_majority_by_hand(answers, winner, eval_worker):
    assert stats.majority(answers, grading._same_vote(eval_worker)) == winner


def test_majority_asks_no_more_than_it_must():
    asked = []

    def same(answer, reference):
        asked.append((answer, reference))
        return answer.lower() == reference.lower()

    assert stats.majority(["a", "b", "a", "B", "c", "b", "B"], same) == 1
    # only with the first of each group, the same text once, the later answer against the earlier one
    assert asked == [("b", "a"), ("B", "a"), ("B", "b"), ("c", "a"), ("c", "b")]


def test_majority_answers_without_a_verdict_stand_alone():
    questions = []

    def same(answer, reference):
        questions.append(answer)
        return None if "slow" in answer + reference else answer == reference

    assert stats.majority(["slow 1", "slow 2", "slow 3", "slow 2"], same) == 1
    assert questions == ["slow 2", "slow 3"]  # one limit each, not one for every pair
    worker = types.SimpleNamespace(timeouts=0, timeout_s=5.0, start=lambda: None)

    def equal(gold, prediction, limit_s=None):
        worker.timeouts += 1
        raise TimeoutError

    worker.equal = equal
    assert grading._same_vote(worker)("x+1", "1+x") is None and worker.timeouts == 1
    assert grading._same_vote(worker)("3", "4") is False


def test_bootstrap_equals_a_slow_loop():
    values, generator = [3, -1, 0, 2, 2, -4, 1], np.random.default_rng([5, 2])
    slow = []
    for _ in range(300):
        slow.append(sum(values[i] for i in generator.integers(7, size=7)) / 7)
    drawn = stats.bootstrap_means(values, seed=[5, 2], resamples=300)
    assert drawn.tolist() == slow
    many = np.tile(values, 100_000)  # more than one block of indices
    block = stats.bootstrap_means(many, seed=1, resamples=12)
    generator = np.random.default_rng(1)
    assert block.tolist() == [many[generator.integers(len(many), size=len(many))].sum() / len(many) for _ in range(12)]


def test_paired_interval_against_the_normal_approximation():
    generator = np.random.default_rng(0)
    difficulty = generator.beta(0.5, 0.5, 600)
    a, b = generator.binomial(8, difficulty), generator.binomial(8, np.clip(difficulty + 0.03, 0, 1))
    result, drawn = stats.paired_difference(a, b, 8, seed=3)
    change = (b - a) / 8
    error = change.std(ddof=1) / 600**0.5
    assert result["difference"] == pytest.approx(change.mean()) and len(drawn) == 10_000
    assert result["low"] == pytest.approx(change.mean() - 1.96 * error, abs=0.08 * error)
    assert result["high"] == pytest.approx(change.mean() + 1.96 * error, abs=0.08 * error)
    assert result["p"] == pytest.approx(math.erfc(abs(change.mean()) / error / 2**0.5), rel=0.3, abs=0.001)
    unpaired = ((a / 8).var(ddof=1) / 600 + (b / 8).var(ddof=1) / 600) ** 0.5
    assert result["high"] - result["low"] < 0.6 * 2 * 1.96 * unpaired  # what pairing is for
    again, swapped = stats.paired_difference(a, b, 8, seed=3)[0], stats.paired_difference(b, a, 8, seed=3)[0]
    assert again == result != stats.paired_difference(a, b, 8, seed=4)[0]
    assert (swapped["low"], swapped["high"]) == pytest.approx((-result["high"], -result["low"]))
    assert stats.paired_difference([1, 2], [1, 2], 2, seed=0)[0] == {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
    assert stats.paired_difference([0] * 9, [2] * 9, 2, seed=0)[0]["p"] == 0.0


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
    (row,) = stats.compare(a, b)
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
    first, second, mean = stats.compare(a, b)
    width, both = first["high"] - first["low"], mean["high"] - mean["low"]
    assert both == pytest.approx(width / 2**0.5, rel=0.1)  # as wide as one's if they moved together
    assert second["high"] - second["low"] == pytest.approx(width, rel=0.15)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(n=2), "has n 4 in A, 2 in B"),
        (dict(temperature=1.0), "has temperature 0.6 in A, 1.0 in B"),
        (dict(top_p=1.0), "has top_p 0.95 in A, 1.0 in B"),
        (dict(max_new_tokens=2048), "has max_new_tokens 32768 in A, 2048 in B"),
        (dict(data_sha256="0" * 64), "x/math500.jsonl without strategies is in A; B has no file of that checksum"),
        (dict(guided=True), "x/math500.jsonl without strategies is in A; B has no file"),
        (dict(correct={"p": 1}), "problem 'q' of x/math500.jsonl is in one of A and B only"),
        (dict(correct={"p": 1, "q": 1, "r": 1}), "problem 'r' of"),
    ],
)
def test_compare_refuses(changes, message):
    a = _eval_results({"p": 0, "q": 2})
    changes = {"correct": {"p": 0, "q": 2}} | changes
    with pytest.raises(ValueError, match=re.escape(message)):
        stats.compare(a, _eval_results(**changes))


def test_compare_refuses_a_file_that_one_of_them_lacks():
    a, b = _eval_results({"p": 0, "q": 2}), _eval_results({"p": 0, "q": 2})
    b["files"] |= _eval_results({"p": 1}, "more.jsonl", data_sha256="e" * 64)["files"]
    for pair, message in (((a, b), "is in B; A has no file"), ((b, a), "is in A; B has no file")):
        with pytest.raises(ValueError, match="more.jsonl without strategies " + message):
            stats.compare(*pair)


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
    result = stats.guidance(auto, guided, 4, alpha.tolist(), ["sum", "sum", "area", "sum", "odd"])
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
    assert stats.guidance(auto, guided, 4, alpha.tolist(), list("abcde"))["families"] == {}
    twice = stats.guidance(auto, guided, 4, alpha.tolist(), list("axbxc"))["families"]
    assert {name: family["problems"] for name, family in twice.items()} == {"(other)": 3, "x": 2}
    lines = stats.guidance_lines(result)
    assert lines[0].startswith("  guidance: p_auto 40.0  p_guide 55.0  helps 20.0 %  hurts 20.0 %  same 60.0 %  alpha 0.286")
    assert len(lines) == 3 and lines[2].startswith("  sum: p_auto 50.0  p_guide 83.3")


def test_table_layout():
    ours = _eval_results({"p": 1, "q": 3}, "b/math500.jsonl", model="runs/x/model", problems=500)
    assert stats.table([ours]).splitlines()[2] == "| runs/x/model | 50.0 ± 25.0 | – | – | – | – |"
    for name, n, counts in (("amc23", 32, (8, 8)), ("olympiad", 4, (4, 0)), ("aime24", 32, (0, 0)), ("aime25", 32, (16, 16))):
        one = _eval_results(dict(zip("pq", counts, strict=True)), f"b/{name}.jsonl", n=n, data_sha256=name)
        ours["files"] |= one["files"]
        one["files"][f"b/{name}.jsonl"]["problems"] = stats.BENCHMARKS[name].problems
    other = _eval_results({"p": 4}, "math500.jsonl", n=4, model="hot", temperature=1.0, max_new_tokens=2048, guided=True)
    lines = stats.table([ours, other]).splitlines()
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
        stats.table([ours])


def test_the_papers_rows():
    """Copied right: each average is that of its row, up to its rounding, but for the one that a note names."""
    assert [len(rows) for rows in stats.PAPER_ROWS.values()] == [6, 6, 6]
    printed = [row for rows in stats.PAPER_ROWS.values() for row in rows.values()]
    assert len(set(printed)) == 18 and all(a > b > c > d for a, b, c, d, _ in printed)  # the same order in each, easy to hard
    odd = [
        (model, method, average)
        for model, rows in stats.PAPER_ROWS.items()
        for method, (*figures, average) in rows.items()
        if abs(sum(figures) / 4 - average) > 0.0501
    ]
    assert odd == [("Llama-3.2-8B-Instruct", "LUFFY", 26.5)] and "LUFFY row averages 26.6, printed is 26.5" in stats.LLAMA_NOTE
    assert sum(stats.PAPER_ROWS["Llama-3.2-8B-Instruct"]["LUFFY"][:4]) / 4 == pytest.approx(26.6, abs=0.0501)


@pytest.mark.parametrize(
    "evaluated, shown",
    [
        (["runs/x/model"], ["Qwen2.5-1.5B", "Qwen2.5-7B", "Llama-3.2-8B"]),
        (["Qwen/Qwen2.5-7B-Instruct", "runs/x/model"], ["Qwen2.5-7B"]),
        (["runs/qwen2.5-1.5b-instruct-sgpo/model"], ["Qwen2.5-1.5B"]),
        (["meta-llama/Llama-3.1-8B-Instruct", "../Qwen2.5-7B-Instruct/"], ["Qwen2.5-7B", "Llama-3.2-8B"]),
    ],
)
def test_the_table_shows_the_papers_rows_of_the_models_that_were_evaluated(evaluated, shown):
    text = stats.table([_eval_results({"p": 1}, model=model) for model in evaluated])
    rows = [line for line in text.splitlines() if line.startswith("|") and "[paper]" in line]
    assert [row.split("-Instruct,")[0] for row in rows] == [f"| {model}" for model in shown for _ in range(6)]
    assert ("Llama-3.2-8B-Instruct is the name as printed" in text) == ("Llama-3.2-8B" in shown)
    left_out = [model for model in ("Qwen2.5-1.5B", "Qwen2.5-7B", "Llama-3.2-8B") if model not in shown]
    named = " and ".join(f"{model}-Instruct" for model in left_out)
    assert (f"the rows of {named} are left out" in text) if left_out else "left out" not in text


def test_benchmarks_are_those_that_prepare_writes():
    assert {name: benchmark.problems for name, benchmark in stats.BENCHMARKS.items()} == prepare.BENCHMARKS
    assert set(stats.COLUMNS) <= set(stats.BENCHMARKS)


def test_figures_import_alone_and_need_numpy_only(tmp_path):
    shutil.copy(ROOT / "tools/benchmark.py", tmp_path)
    check = "import sys, benchmark; assert not {'torch', 'transformers', 'eval', 'math_verify'} & set(sys.modules)"
    done = run_script("-c", check, cwd=tmp_path, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
