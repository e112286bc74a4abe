"""The tasks of reasoning-gym: what their reward pays, and the whole way from the problems to an evaluation."""

import json
import shutil
import sys
from importlib.util import find_spec

import pytest

import eval as evaluation
import train
from data import prepare
from data.problems import Problem, read_row
from grader import RewardError, UserReward, grader_of
from tests.common import ROOT, TINY_BASE
from tools.leaks import leaks

REWARD = f"{ROOT / 'examples/gym_reward.py'}:score"
pytestmark = pytest.mark.skipif(not find_spec("reasoning_gym"), reason="reasoning-gym is not installed (it is optional)")


def test_a_message_says_that_the_package_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match="pip install reasoning-gym"):
        prepare.main(["gym", "--out", str(tmp_path)])


def test_only_a_right_answer_pays():
    table = json.loads((ROOT / "tests/gym_answers.json").read_text(encoding="utf-8"))
    with grader_of(REWARD, 60) as grader:
        for case in table["cases"]:
            row = Problem("r1", case["problem"], "", None, None, {"entry": case["entry"]})
            expected = dict.fromkeys(case["right"], 1) | dict.fromkeys(case["wrong"] + table["never"], 0)
            assert {text: grader.reward(text, row) for text in expected} == expected
        del row.extra["entry"]["answer"]
        with pytest.raises(RewardError, match="row 'r1': KeyError: 'answer'"):
            grader.reward(case["right"][0], row)


def test_from_the_problems_to_an_evaluation(tmp_path, monkeypatch):
    """A tiny model solves none of them, so every second response is replaced by the row's answer before it is graded."""
    graded, pay = [], UserReward.reward

    def reward(grader, response, row):
        graded.append(pay(grader, rf"\boxed{{{row.extra['entry']['answer']}}}" if len(graded) % 2 else response, row))
        return graded[-1]

    monkeypatch.setattr(UserReward, "reward", reward)
    prepare.main(["gym", "--out", str(tmp_path), "--count", "2", "--test_count", "1", "--seed", "10339"])
    rows = [read_row(x, math=False) for path in tmp_path.glob("*.jsonl") for x in path.read_bytes().splitlines()]
    assert len({tuple(sorted(row.problem)) for row in rows}) == 9  # of this seed's first palindromes two have the same letters
    assert [leaks(row.strategy, row.problem, "", row.extra["entry"]["answer"]) for row in rows] == [[]] * 9
    config = shutil.copytree(TINY_BASE, tmp_path / "base") / "config.json"
    config.write_text(config.read_text().replace('"max_position_embeddings": 256', '"max_position_embeddings": 512'))
    flags = f"--reward {REWARD} --model {config.parent} --device cpu --max_new_tokens 4".split()
    run = f"--data {tmp_path}/train.jsonl --sft_fraction 0 --steps 2 --problems_per_step 3 --group_auto 4 --group_guided 2"
    train.main([*flags, *run.split(), "--out", str(tmp_path / "run")])
    evaluation.main([*flags, "--data", f"{tmp_path}/test.jsonl", "--n", "2", "--out", f"{tmp_path}/out.json"])
    (figures,) = json.loads((tmp_path / "out.json").read_text())["files"].values()
    assert graded == [0, 1] * (18 + 2 + 3) and figures["accuracy"] == figures["reward"] == 0.5  # steps, those shown, evaluation
