"""A reward of one's own: its process, what it does to a step, and that no work is lost when it fails."""

import json
import subprocess
import sys
import time

import pytest
import torch

import eval as evaluation
import methods
import sgpo
import train
from data.problems import Problem, load_problems
from grader import RewardError, grader_of
from tests.common import ROOT, TINY_BASE, make_run, read_metrics, tiny_rows, write_rows

SOURCE = """
import multiprocessing, os, subprocess, sys
from grader import extract_answer  # the files of the repository are at hand
def half(x):
    return x / 2
def in_a_pool(response, row):
    with multiprocessing.Pool(1) as pool:
        return pool.map(half, [1])[0]
def pay(response, row):
    print("what it prints is no answer", os.read(0, 1))
    return sys.exit("no compiler") if row["pays"] == "exit" else row["pays"]
def sleep(response, row):
    subprocess.run(["sleep", row["seconds"]])
    return 1
def share_of_digits(response, row):
    if row["id"] == os.environ.get("BROKEN_ROW"):
        raise KeyError("no such test")
    return min(sum(c.isdigit() for c in response) / row["digits"], 1)
"""


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "my.reward.py"  # an import by its name would look for a package
    path.write_text(SOURCE)
    return path


def row(**extra):
    return Problem("r1", "q", "", None, None, extra)


def test_what_the_function_gets_and_pays(source):
    with grader_of(f"{source}:pay", 60) as grader:
        assert [grader.reward("text", row(pays=value)) for value in (0, 0.25, True)] == [0, 0.25, 1]
        said = {1.5: "1.5", -0.1: "-0.1", float("nan"): "nan", "x": "ValueError", None: "TypeError", "exit": "no compiler"}
        for value, text in said.items():
            with pytest.raises(RewardError, match=f"row 'r1': .*{text}"):
                grader.reward("text", row(pays=value))
        with pytest.raises(RewardError, match="KeyError: 'pays'"):
            grader.reward("text", row())
        assert grader.reward("text", row(pays=1)) == 1 and grader.timeouts == 0
    with grader_of(f"{source}:in_a_pool", 60) as grader:
        assert grader.reward("text", row()) == 0.5


def test_a_call_that_takes_too_long_pays_nothing_and_leaves_nothing_behind(source):
    with grader_of(f"{source}:sleep", 60) as grader:
        grader.timeout_s = 0.5
        assert grader.reward("text", row(seconds="71.25")) == 0 and grader.timeouts == 1
        grader.timeout_s = 60
        assert grader.reward("text", row(seconds="0")) == 1
    assert ends("71.25")


def test_a_call_ends_with_a_parent_that_is_killed(source):
    ask = f"grader_of('{source}:sleep', 60).ask(['text', {{'seconds': '72.25'}}])"
    with subprocess.Popen([sys.executable, "-c", f"from grader import grader_of; {ask}"], cwd=ROOT) as parent:
        while not running("72.25"):
            assert parent.poll() is None
        parent.kill()
    assert ends("72.25")


def running(seconds):
    return f"sleep {seconds}" in subprocess.run(["ps", "ax", "-o", "args"], capture_output=True, text=True, check=True).stdout


def ends(seconds):
    until = time.monotonic() + 10
    while running(seconds) and time.monotonic() < until:
        time.sleep(0.1)
    return not running(seconds)


@pytest.mark.parametrize("name", ["{}:nothing", "nofile.py:pay", "{}", "{}:pay()"])
def test_a_function_that_is_not_there(source, name):
    with pytest.raises(RewardError, match="--reward"):
        grader_of(name.format(source), 60)


def test_correct_at_decides_what_is_correct_and_advantages_use_the_reward():
    auto, guided = torch.tensor([[0.0, 0.25, 0.5, 0.5]]), torch.tensor([[0.5, 0.0, 0.5, 0.5]])
    got = methods.sgpo_advantages(methods.Method(correct_at=0.5), auto, guided, None)
    assert got["alpha"].item() == pytest.approx(0.5 * (0.75 - 0.5 + 0.1) / (0.5 + 0.1))  # p_auto 1/2, p_guide 3/4
    assert got["advantages"][0].tolist() == pytest.approx(((auto - 0.3125) / (0.171875 / 3) ** 0.5)[0].tolist(), rel=1e-4)
    none = methods.sgpo_advantages(methods.Method(), auto, guided, None)
    assert none["alpha"].item() == 0  # no guided response is correct at 1.0
    assert methods.hpt_advantages(methods.Method(hpt_gate=0), auto, None, None)["use_solution"].tolist() == [True]
    assert methods.hinted_advantages(methods.Method(), auto, guided, None)["use_guided"].tolist() == [True]


def test_targets_are_correct_by_correct_at(monkeypatch):
    monkeypatch.setattr(sgpo, "unguided_logprobs", lambda *_: [[-1.0, -2.0, -3.0]])
    for correct_at, target, targets in ((0.5, "reachable", [1]), (0.5, "all", [1, 2]), (1.0, "reachable", [])):
        sample = sgpo.ProblemSamples(0, None, [], [], [], [0.25, 0.5, 0.75])
        sgpo.choose(methods.Method(correct_at=correct_at, target=target), None, [sample], step=1)
        assert sample.targets == targets


def test_a_run_ends_with_a_checkpoint_when_the_reward_raises_and_goes_on(source, tmp_path, monkeypatch, worker):
    rows = [{**r, "digits": 40, "answer": ["no", "text"]} for r in tiny_rows(4)]
    flags = f"--problems_per_step 2 --steps 3 --group_auto 2 --group_guided 2 --sft_fraction 0 --data_seed 1 --correct_at 0.1 \
        --no-eval_guided --reward {source}:share_of_digits --reward_timeout 60 --out {tmp_path / 'run'} --device cpu"
    flags = [*flags.split(), "--data", str(write_rows(tmp_path / "rows.jsonl", rows))]
    run, examples = make_run(tmp_path / "order", worker, "--data_seed", 1)
    second = train.data_order(list(range(4)), 1, 2, 1, "rl")[0][1]  # in the second step, and not in the first
    monkeypatch.setenv("BROKEN_ROW", rows[second]["id"])
    asked = []
    monkeypatch.setattr(train, "grader_of", lambda *given: asked.append(given) or grader_of(*given))
    with pytest.raises(SystemExit, match=f"row '{rows[second]['id']}': KeyError: 'no such test'"):
        train.main(flags)
    assert [record["step"] for record in read_metrics(tmp_path / "run") if record.get("stage") == "sgpo"] == [1]
    assert (tmp_path / "run/checkpoints/step-000001").is_dir() and asked == [(f"{source}:share_of_digits", 60)]
    monkeypatch.delenv("BROKEN_ROW")
    train.main(["--resume", "--out", str(tmp_path / "run")])
    steps = [record for record in read_metrics(tmp_path / "run") if record.get("stage") == "sgpo"]
    assert [record["step"] for record in steps] == [1, 2, 3] and any(0 < r["reward_auto"] % (1 / 40) for r in steps)
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    for sample in samples:
        assert sample["reward"] == min(sum(c.isdigit() for c in sample["text"]) / 40, 1)
        assert not sample["target"] or sample["reward"] >= 0.1


def test_an_evaluation_with_it(source, tmp_path):
    rows = [{"id": f"r{i}", "problem": tiny_rows(2)[i]["problem"], "digits": 40} for i in range(2)]
    data, out = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out.json"
    flags = f"--model {TINY_BASE} --data {data} --reward {source}:share_of_digits --timeout 60 --correct_at 0.2 --n 4"
    flags = [*flags.split(), "--max_new_tokens", "24", "--device", "cpu", "--out", str(out)]
    evaluation.main(flags)
    (figures,) = json.loads(out.read_text())["files"].values()
    lines = (tmp_path / "out-responses/rank0.jsonl").read_text().splitlines()
    samples = [sample for line in lines if line for sample in json.loads(line)["samples"]]
    expected = [min(sum(c.isdigit() for c in sample["text"]) / 40, 1) for sample in samples]
    assert [sample["reward"] for sample in samples] == expected and figures["reward"] == pytest.approx(sum(expected) / 8)
    assert figures["accuracy"] == sum(reward >= 0.2 for reward in expected) / 8 and "maj_at_n" not in figures
    out.unlink()
    with pytest.raises(ValueError, match="of another evaluation .reward 'share_of_digits of .*, now 'pay of "):
        evaluation.main([flag.replace("share_of_digits", "pay") for flag in flags])


def test_rows_without_an_answer_need_a_reward(source, tmp_path, worker):
    answers = [{}, {"answer": [1]}, {"answer": ""}, {"answer": None}]
    path = write_rows(tmp_path / "rows.jsonl", [{"id": f"r{i}", "problem": f"q{i}"} | a for i, a in enumerate(answers)])
    with pytest.raises(ValueError, match="'answer' is missing"):
        load_problems(path, worker)
    with grader_of(f"{source}:pay", 60) as grader:
        problems = load_problems(path, grader)
        rows = [{"id": id, "problem": "q", "answer": answer} for id, answer in (("a", "1"), ("b", "1"), ("c", "1.0"))]
        again = write_rows(tmp_path / "again.jsonl", rows)
        with pytest.raises(ValueError, match="again.jsonl:3: same problem as line 1 but answer '1.0'"):  # not the same to all
            load_problems(again, grader)
    assert [problem.to_row() for problem in problems] == [json.loads(line) for line in path.read_text().splitlines()]


def test_the_example_counts_the_tests_that_pass():
    with grader_of(f"{ROOT / 'examples/run_tests.py'}:tests_passed", 60) as grader:
        tests = row(tests=["add(1, 2) == 3", "add(-1, 1) == 0", "add(2, 2) == 5"])
        assert grader.reward("So:\n```python\ndef add(a, b):\n    return a + b\n```", tests) == pytest.approx(2 / 3)
        assert grader.reward("```\ndef add(a, b)\n    return\n```", tests) == grader.reward("add", tests) == 0
