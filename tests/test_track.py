"""metrics.jsonl on its way to a tracker, with one that only notes what it gets."""

import json
import sys
import types

import pytest

from tools import track

HEAD = {"config": {"method": "sgpo"}, "commit": "c"}
SFT = [{"stage": "sft", "step": step, "loss": 2.0} for step in (1, 2)]
RL = [{"stage": "sgpo", "step": step, "reward_auto": step / 10, "alpha": None} for step in (1, 2, 3)]
EVAL = {"stage": "eval", "step": 2, "guided": True, "accuracy": 0.5, "pass_at": {"1": 0.5}, "when": "after sgpo"}


@pytest.fixture
def wandb(monkeypatch):
    """{"runs": the arguments of init, "axis": of define_metric, "logged": (step, values)}."""
    seen = {"runs": [], "axis": [], "logged": []}
    run = types.SimpleNamespace(log=lambda values: seen["logged"].append((values.pop("step"), values)))
    run.define_metric = lambda *names, **axis: seen["axis"].append((names, axis))
    module = types.SimpleNamespace(init=lambda **settings: seen["runs"].append(settings) or run)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return seen


def write(folder, *records, end="\n"):
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + end)


def test_each_line_is_sent_once_whatever_the_run_goes_through(tmp_path, wandb):
    write(tmp_path, HEAD, *SFT, RL[0], RL[1], EVAL, end="")  # the last line is not whole yet
    assert track.track(tmp_path, "wandb", "p", follow=False) == 4
    # cut back to SFT's end by a run that goes on with other settings, and a step further
    write(tmp_path, HEAD, *SFT, {**HEAD, "stage": "resume"}, *RL[:2], EVAL, RL[2])
    assert track.track(tmp_path, "wandb", "p", follow=False) == 2
    assert track.track(tmp_path, "wandb", "p", follow=False) == 0
    assert [step for step, _ in wandb["logged"]] == [1, 2, 3, 4, 4, 5]  # RL goes on from SFT's steps
    assert wandb["logged"][0][1] == {"sft/loss": 2.0} and wandb["logged"][2][1] == {"sgpo/reward_auto": 0.1}
    assert wandb["logged"][4][1] == {"eval/guided/accuracy": 0.5}
    first, *others = wandb["runs"]
    assert first["project"] == "p" and first["config"] == HEAD["config"] and first["resume"] == "allow"
    assert all(other["id"] == first["id"] for other in others) and wandb["axis"][0] == (("*",), {"step_metric": "step"})
    # a new run with the same settings in a folder of the same name is another one
    again = tmp_path / "again"
    again.mkdir()
    write(again, HEAD, *SFT)
    assert track.track(again, "wandb", "p", follow=False) == 2 and wandb["runs"][-1]["id"] != first["id"]


def test_following_a_file_that_grows_and_is_cut(tmp_path, monkeypatch):
    files = [[HEAD, RL[0]], [HEAD, RL[0], RL[1]], [HEAD, RL[0]]]

    def next_file(seconds):
        write(tmp_path, *files.pop(0))

    next_file(0)
    monkeypatch.setattr(track.time, "sleep", next_file)
    lines = track.read_lines(tmp_path / "metrics.jsonl", follow=True)
    assert [next(lines) for _ in range(5)] == [(0, HEAD), (1, RL[0]), (2, RL[1]), (0, HEAD), (1, RL[0])]
