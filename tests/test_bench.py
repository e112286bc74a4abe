"""The bench: it runs, and its checks find what they should."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from model import ModelConfig, build_model
from tests.common import CPU, ROOT
from tools import bench


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can restart its peak")
def test_bench_peak_memory_restarts_and_counts_memory_that_was_used_before():
    def work(pieces):  # so small that the C library keeps them when they are freed
        return sum(len(piece) for piece in [torch.ones(12_500) for _ in range(pieces)])

    for pieces in (4000, 1000, 1000):  # 200 MB, then 50 MB
        _, _, peak = bench.measured(lambda pieces=pieces: work(pieces), CPU)
        assert 0.9 < peak / (pieces * 50_000) < 1.2


def test_bench_quick_runs_and_all_ways_agree(tmp_path, monkeypatch):
    out = tmp_path / "new/bench.json"
    monkeypatch.setattr(bench, "QUICK_HEAD", bench.QUICK_HEAD | {"tokens": 64, "vocabulary": 1024})
    assert bench.main(["--quick", "--device", "cpu", "--threads", "1", "--repeats", "1", "--out", str(out)]) == 0
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["threads"] == 1 and report["repeats"] == 1 and report["device_type"] == "cpu"
    assert report["versions"].keys() >= {"torch", "transformers"} and report["dtype"] == "float32"
    assert report["command"] and report["commit"] and report["device"] and report["load_after"]
    checks = {name: check for part in bench.PARTS for name, check in report[part]["checks"].items()}
    assert set(checks) == {"logprobs", "distribution", "same_update", "same_loss"}
    assert all(check["ok"] for check in checks.values()), checks
    rivals = ["generate"] + ["generate_batch"] * (importlib.util.find_spec("psutil") is not None)
    for result in report["sampler"]["workloads"]:
        assert [run["side"] for run in result["runs"]] == ["ours", *rivals]
        assert set(result["left_out"]) == {"generate_batch"} - set(rivals) and set(result["ratio"]) == set(rivals)
        for run in result["runs"]:  # the same lengths for every side
            assert run["tokens"] == run["prescribed"] and 0 < run["floor_share"] < 1
    assert [run["side"] for run in report["update"]["runs"]] == ["ours", "transformers"]
    trl = importlib.util.find_spec("trl") is not None
    assert [run["side"] for run in report["step"]["runs"]] == (["ours", "trl"] if trl else ["ours"])
    assert trl or "No module named 'trl'" in report["step"]["left_out"]["trl"]
    assert report["head"]["ratio"].keys() == {"autograd"} and 0 < report["sampler"]["prefill"]["share"]["median"] < 1


def test_bench_a_rival_or_a_part_that_dies_is_a_row_and_not_the_end(tmp_path, monkeypatch, capsys):
    calls = []

    def dies(*_, **__):
        calls.append(0)
        if len(calls) > 3:  # after the first workload's warm-up and its two repeats
            raise RuntimeError("gone\nwith a long explanation")
        return [[1, 2]] * 6

    def too_large(args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(bench, "SAMPLERS", {"ours": bench.sample_ours, "mortal": dies, "silent": lambda *_, **__: [[]] * 6})
    monkeypatch.setattr(bench, "plain_update", dies)
    monkeypatch.setattr(bench, "bench_head", too_large)
    for check in ("check_logprobs", "check_distribution"):
        monkeypatch.setattr(bench, check, lambda *_, **__: {"ok": True})
    flags = "--quick --repeats 2 --threads 1 --only head sampler update --device cpu --out".split()
    assert bench.main([*flags, str(tmp_path / "b.json")]) == 1
    report = json.loads((tmp_path / "b.json").read_text())
    assert report["head"]["failed"] == "OutOfMemoryError: no message"
    assert "not run: RuntimeError: gone" in capsys.readouterr().out
    first, second = report["sampler"]["workloads"]
    assert first["left_out"].pop("silent") == second["left_out"].pop("silent") == "it made no tokens"
    assert "mortal" not in first["left_out"] and list(first["ratio"]) == ["mortal"]
    assert [run["side"] for run in first["runs"]] == ["ours", "mortal"] * 2  # in alternation
    rates = [run["tokens_per_s"] for run in first["runs"]]
    assert first["ratio"]["mortal"]["max"] == max(rates[0] / rates[1], rates[2] / rates[3])
    with pytest.raises(RuntimeError, match="gone"):  # our own errors are errors
        bench.alternate("mine", {"ours": dies}, SimpleNamespace(device=CPU, repeats=1))
    assert second["left_out"]["mortal"] == "RuntimeError: gone" and not second["ratio"]
    assert [run["side"] for run in second["runs"]] == ["ours"] * 2 and second["tokens_per_s"]["ours"]["median"] > 0
    update = report["update"]
    assert update["left_out"] == {"transformers": "RuntimeError: gone"} and [r["side"] for r in update["runs"]] == ["ours"] * 2


def test_the_script_for_a_device_runs_at_toy_size_and_a_part_that_fails_is_a_row(tmp_path):
    """The script that a GPU is asked with, without one. Its Python is a wrapper that dies in the part `head`, and that starts
    the worker of torchrun without torchrun itself."""
    wrapper = tmp_path / "python"
    dies = 'case "$*" in *"--only head"*) echo "no such kernel" >&2; exit 3;; esac'
    alone = "export RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=0"
    torchrun = f'case "$*" in "-m torch.distributed.run"*) {alone}; shift 4;; esac'
    wrapper.write_text(f'#!/bin/sh\n{dies}\n{torchrun}\nexec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    settings = {**os.environ, "PYTHON": str(wrapper), "OMP_NUM_THREADS": "1"}
    command = ["bash", "tools/gpu_check.sh", str(tmp_path / "out"), "--device", "cpu", "--parts", "torchrun step head"]
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    head, _, _, _, *rows = (tmp_path / "out/rows.md").read_text().splitlines()
    assert "commit" in head and f"torch {torch.__version__}" in head
    rows = {row.split("|")[1].strip(): row.split("|")[3].strip() for row in rows}
    assert rows.keys() == {"torchrun", "step", "head"} and rows["head"] == "failed (3): no such kernel"
    assert rows["torchrun"] == "ok: the resumed run equals the whole one, losses to the letter"
    assert rows["step"].startswith("ok:") and "failed" not in done.stdout.replace("failed (3)", "")
    report = json.loads((tmp_path / "out/step.json").read_text())
    assert [row["top_p"] for row in report["sampling"]] == [1.0, 0.95] and report["limits"]["matmul"] > 0
    step = report["step"]
    assert step["logprob_error"] < 0.2 and {"sampling", "update", "update, recomputed"} < step.keys()  # bf16
    for name in ("update", "update, recomputed"):
        time_of = step[name]["time_of_4_problems"]
        assert 0 <= time_of["host_share"] < 1 and time_of["longest"] and step[name]["planned_gb"] > 0
    command[-1] = "tests"
    settings |= {"IN_ALL": "0", "PYTHON": "true"}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=60)
    assert "| tests | 0 | not run: the 0 s are used up |" in done.stdout


def test_bench_workloads_and_their_floor_by_hand():
    tail = bench.Workload("tail", 8, 8, 40, 160, median=200, longest=4096)
    lengths = bench.make_lengths(tail, 0)
    assert len(lengths) == 64 and max(lengths) == 4096 and 1 <= min(lengths) and 120 < sorted(lengths)[32] < 330
    assert set(bench.make_lengths(bench.Workload("flat", 2, 3, 4, 9, 7, 7), 0)) == {7}
    small = build_model(ModelConfig.from_dict(bench.SHAPES["toy"]), generator=torch.Generator(), dtype=torch.float32, device=CPU)
    parameters, head = sum(p.numel() for p in small.parameters()), 512 * 48
    key_bytes = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, width, bytes
    # two rows of 2 and 3 tokens after one prompt of 5: a step with both, then one with the longer
    slow_memory = bench.sampling_floor(small, [[1] * 5], [2, 3], {"bandwidth": 1.0, "matmul": 1e30})
    assert slow_memory == pytest.approx(2 * 4 * parameters + key_bytes * ((2 + 5) + (2 + 5)))
    slow_product = bench.sampling_floor(small, [[1] * 5], [2, 3], {"bandwidth": 1e30, "matmul": 1.0})
    block = 48 * 48 + 2 * 48 * 16 + 48 * 48 + 3 * 48 * 96  # queries, keys and values, output, MLP
    prefill = 2 * 2 * block * 5 + 2 * 4 * 6 * 8 * (1 + 2 + 3 + 4 + 5) + 2 * head
    assert slow_product == pytest.approx(2 * parameters * 3 + prefill)


def test_bench_checks_find_a_different_model(monkeypatch):
    """The comparisons are worth nothing unless they fail for sides that differ."""
    ours, theirs = bench.model_pair(bench.SMALL_VOCABULARY, torch.float32, CPU)
    prompts = [[3, 17, 5, 11], [9, 4]]
    assert bench.check_logprobs(ours, theirs, prompts, 12)["ok"]
    for sampler, model in ((bench.sample_ours, ours), (bench.sample_theirs, theirs)):
        assert [len(row) for row in sampler(model, prompts, [3, 1, 7, 2], seed=3)] == [3, 1, 7, 2]
    with torch.no_grad():
        theirs.model.norm.weight[0] += 2.0
    assert not bench.check_logprobs(ours, theirs, prompts, 12)["ok"]
    assert not bench.check_figures({"a": [1.0, 2.0], "b": [1.0, 2.02]}, "a", 1e-3)["ok"]
    hotter = {"ours": bench.sample_ours, "generate": lambda *work, seed: bench.sample_theirs(*work, temperature=1.2, seed=seed)}
    monkeypatch.setattr(bench, "SAMPLERS", hotter)
    assert not bench.check_distribution(CPU, draws=400)["ok"]
