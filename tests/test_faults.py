"""The comparison at the end of a run that was attacked. The attacks themselves take minutes: python tools/faults.py."""

import random

import pytest
import torch
from safetensors.torch import save

from tests.common import write_rows
from tools import faults

WEIGHTS = {"a": torch.zeros(3), "b": torch.ones(2)}
SAVED = save(WEIGHTS)


@pytest.mark.parametrize(
    "file, content, wrong",
    [
        ("model/model.safetensors", SAVED, 0),  # times may differ, and what the first line of metrics.jsonl says of the folder
        ("model/model.safetensors", save(WEIGHTS, {"written": "by another"}), 0),
        ("model/model.safetensors", SAVED[:-1] + b"\1", 1),
        ("checkpoints/step-000002/shard.safetensors", SAVED[:-1] + b"\1", 1),
        ("samples.jsonl", b"{}\n{}\n", 1),
        ("metrics.jsonl", b'{}\n{"step": 1, "loss": 0.25}\n', 1),
    ],
)
def test_the_comparison_sees_one_changed_bit(tmp_path, file, content, wrong):
    for name in ("alone", "attacked"):
        for part in ("model/model", "checkpoints/step-000001/shard", "checkpoints/step-000002/shard"):
            path = tmp_path / name / f"{part}.safetensors"
            path.parent.mkdir(parents=True)
            path.write_bytes(SAVED)
        (tmp_path / name / "samples.jsonl").write_text("{}\n")
        write_rows(tmp_path / name / "metrics.jsonl", [{"config": name}, {"step": 1, "loss": 0.5, "step_s": len(name)}])
    (tmp_path / "attacked" / file).write_bytes(content)
    with open(tmp_path / "log", "w") as log:
        trial = faults.Trial(tmp_path / "attacked", 1, 1, random.Random(0), log)
        faults.compare(trial, tmp_path / "alone")
    assert trial.faults == wrong
