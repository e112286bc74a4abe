"""The bench: it runs, and its checks find what they should."""

import gc
import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.common import CPU, ROOT
from tools import bench, gpu_step


@pytest.fixture(autouse=True)
def little_garbage():
    """Each measurement collects garbage first; without this it would look through all that the tests have imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can restart its peak")
def test_bench_peak_memory_restarts_and_counts_memory_that_was_used_before():
    def work(pieces):  # so small that the C library keeps them when they are freed
        return sum(len(piece) for piece in [torch.ones(12_500) for _ in range(pieces)])

    for pieces in (4000, 1000, 1000):  # 200 MB, then 50 MB
        _, _, peak = bench.measured(lambda pieces=pieces: work(pieces), CPU)
        assert 0.9 < peak / (pieces * 50_000) < 1.2


def test_bench_quick_runs_and_all_ways_agree(tmp_path):
    out = tmp_path / "new/bench.json"
    assert bench.main(["--quick", "--device", "cpu", "--threads", "1", "--repeats", "1", "--out", str(out)]) == 0
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["command"] and report["commit"] and report["device"] and report["load_after"]
    checks = [(part, name, check["ok"]) for part in bench.PARTS for name, check in report[part]["checks"].items()]
    assert checks == [("sampler", "logprobs", True), ("update", "same_results", True), ("head", "same_results", True)]
    rivals = ["generate"] + ["generate_batch"] * (importlib.util.find_spec("psutil") is not None)
    for result in report["sampler"]["workloads"]:
        assert [run["side"] for run in result["runs"]] == ["ours", *rivals]
        assert set(result["left_out"]) == {"generate_batch"} - set(rivals)
        assert all(0 < run["floor_share"] < 1 for run in result["runs"])
    assert [run["side"] for run in report["update"]["runs"]] == ["ours", "transformers"]
    if importlib.util.find_spec("trl") is None:
        assert "No module named 'trl'" in report["step"]["left_out"]["trl"]
    assert report["head"]["ratio"].keys() == {"ours", "autograd"}


def test_bench_a_rival_or_a_part_that_dies_is_a_row_and_not_the_end(tmp_path, monkeypatch, capsys):
    calls = []

    def dies(*_):
        raise RuntimeError("gone\nwith a long explanation")

    def mortal(model, prompts, lengths, *, seed):
        calls.append(seed)
        return [[1] * length for length in lengths] if len(calls) <= 3 else dies()  # the first workload's warm-up and repeats

    monkeypatch.setattr(bench, "SAMPLERS", {"ours": bench.sample_ours, "mortal": mortal, "shorter": lambda *_, seed: [[1]]})
    monkeypatch.setattr(bench, "plain_update", dies)
    monkeypatch.setattr(bench, "check_logprobs", lambda *_, **__: {"ok": True})
    monkeypatch.setitem(bench.PARTS, "head", dies)
    flags = "--quick --repeats 2 --threads 1 --only head sampler update --device cpu --out".split()
    assert bench.main([*flags, str(tmp_path / "b.json")]) == 1
    report = json.loads((tmp_path / "b.json").read_text())
    gone = "RuntimeError('gone\\nwith a long explanation')"
    assert report["head"]["failed"] == gone and f"not run: {gone}" in capsys.readouterr().out
    first, second = report["sampler"]["workloads"]
    assert first["left_out"].keys() == {"shorter"} and "lengths" in first["left_out"]["shorter"]
    assert [run["side"] for run in first["runs"]] == ["ours", "mortal"] * 2  # in alternation
    rates = [run["tokens_per_s"] for run in first["runs"]]
    assert first["ratio"]["mortal"]["max"] == max(rates[0] / rates[1], rates[2] / rates[3])
    with pytest.raises(RuntimeError, match="gone"):  # our own errors are errors
        bench.alternate("mine", {"ours": dies}, SimpleNamespace(device=CPU, repeats=1))
    assert second["left_out"]["mortal"] == gone and second["ratio"].keys() == {"ours"}
    for part in (second, report["update"]):
        assert [run["side"] for run in part["runs"]] == ["ours"] * 2
    assert report["update"]["left_out"] == {"transformers": gone} and report["update"]["checks"] == {}


def test_one_step_on_a_device_at_toy_size(tmp_path):
    assert gpu_step.main(["--quick", "--device", "cpu", "--out", str(tmp_path / "step.json")]) == 0
    report = json.loads((tmp_path / "step.json").read_text())
    sampling = report["sampling"]
    assert sampling["limits"]["matmul"] > 0
    for row in (sampling["top_p 1.0"], sampling["top_p 0.95"]):
        assert row["kernels_of_32_tokens"] and row["kernels_a_layer"] > 5
        assert 0 < row["host_ms_a_step"] <= 1000 * row["longest_step_s"]
    step = report["step"]
    assert step["logprob_error"] < 0.2 and step["sampling"]["planned_gb"] > 0  # bf16
    for name in ("update", "update, recomputed"):
        assert any("aten::mm" in line for line in step[name]["kernels_of_4_problems"]) and step[name]["planned_gb"] > 0


def test_the_script_for_a_device_makes_a_row_of_each_part_that_was_cut_off_or_failed_too(tmp_path):
    """With a stand-in for Python, whose resumed run has the loss $LOSS."""
    wrapper, out = shutil.copy(ROOT / "tests/fake_python.sh", tmp_path), tmp_path / "out"
    Path(wrapper).chmod(0o755)

    def rows(parts, **settings):
        command = ["bash", "tools/gpu_check.sh", out, "--device", "cpu", "--parts", parts]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHON": str(wrapper), **settings}, timeout=60)
        found = [row.split("|") for row in (out / "rows.md").read_text().splitlines()[4:]]
        return done.returncode, {row[1].strip(): row[3].strip() for row in found}

    status, found = rows("torchrun step head", LOSS="0.5")
    assert status == 1 and found.pop("head") == "failed (3): no such kernel"
    assert found == {"torchrun": "ok: the resumed run equals the whole one, losses to the letter", "step": "ok: fine"}
    assert rows("step") == (0, {"step": "ok: fine"})
    status, found = rows("torchrun", LOSS="0.6")
    assert status == 1 and "the resumed run's losses differ" in found["torchrun"]
    assert rows("tests", IN_ALL="0") == (1, {"tests": "not run: the 0 s are used up"})


def test_bench_workloads_and_their_floor_by_hand():
    tail = bench.Workload("tail", 8, 8, 40, 160, median=200, longest=4096)
    lengths = bench.make_lengths(tail, 0)
    assert len(lengths) == 64 and max(lengths) == 4096 and 1 <= min(lengths) and 120 < sorted(lengths)[32] < 330
    assert set(bench.make_lengths(bench.Workload("flat", 2, 3, 4, 9, 7, 7), 0)) == {7}
    small, _ = bench.model_pair(bench.SHAPES["toy"], torch.float32, CPU)
    parameters, head = sum(p.numel() for p in small.parameters()), 512 * 48
    key_bytes = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, width, bytes
    # two rows of 2 and 3 tokens after one prompt of 5: a step with both, then one with the longer
    slow_memory = bench.sampling_floor(small, [[1] * 5], [2, 3], {"bandwidth": 1.0, "matmul": 1e30})
    assert slow_memory == pytest.approx(2 * 4 * parameters + key_bytes * ((2 + 5) + (2 + 5)))
    slow_product = bench.sampling_floor(small, [[1] * 5], [2, 3], {"bandwidth": 1e30, "matmul": 1.0})
    block = 48 * 48 + 2 * 48 * 16 + 48 * 48 + 3 * 48 * 96  # queries, keys and values, output, MLP
    prefill = 2 * 2 * block * 5 + 2 * 4 * 6 * 8 * (1 + 2 + 3 + 4 + 5) + 2 * head
    assert slow_product == pytest.approx(2 * parameters * 3 + prefill)


def test_bench_checks_find_a_different_model():
    """The comparisons are worth nothing unless they fail for sides that differ."""
    ours, theirs = bench.model_pair(bench.SHAPES["toy"], torch.float32, CPU)
    prompts = [[3, 17, 5, 11], [9, 4]]
    assert bench.check_logprobs(ours, theirs, prompts[0])["ok"]
    for sampler, model in ((bench.sample_ours, ours), (bench.sample_theirs, theirs)):
        assert [len(row) for row in sampler(model, prompts, [3, 1, 7, 2], seed=3)] == [3, 1, 7, 2]
    theirs.model.norm.weight.data[0] += 2.0
    assert not bench.check_logprobs(ours, theirs, prompts[0])["ok"]
    runs = [{"repeat": -1, "result": [1.0, 2.0]}, {"repeat": -1, "result": [1.0, 2.02]}]
    assert [bench.check_results(runs, tolerance)["same_results"]["ok"] for tolerance in (1e-3, 2e-2)] == [False, True]
