"""The bench: it runs, and its checks find what they should."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from model import ModelConfig, build_model
from tests.common import CPU, ROOT, run_script
from tools import bench


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can restart its peak")
def test_bench_peak_memory_counts_memory_that_was_used_before():
    def work():  # 50 MB in pieces so small that the C library keeps them when they are freed
        return sum(len(piece) for piece in [torch.ones(12_500) for _ in range(1000)])

    for _ in range(3):
        _, _, peak = bench.measured(work, CPU)
        assert 45e6 < peak < 60e6


def test_bench_time_shares_sort_operations():
    a, heads = torch.randn(384, 384), torch.randn(1, 4, 512, 64)

    def share(work):
        shares = bench.time_shares(work, CPU)
        assert sum(shares.values()) == pytest.approx(1)
        return max(shares, key=shares.get)

    assert share(lambda: [a @ a for _ in range(20)]) == "matrix products"
    assert share(lambda: [torch.addmm(a, a, a) for _ in range(20)]) == "matrix products"
    assert share(lambda: [torch.bmm(a[None], a[None]) for _ in range(20)]) == "matrix products"
    assert share(lambda: F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)) == "attention"
    assert share(lambda: [a.exp() for _ in range(20)]) == "everything else"


def test_bench_quick_runs_and_all_ways_agree(tmp_path):
    out = tmp_path / "bench.json"
    flags = f"--quick --device cpu --threads 1 --repeats 2 --out {out}"
    command = [sys.executable, "tools/bench.py", *flags.split()]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["seed"] == 0 and report["threads"] == 1 and report["repeats"] == 2 and report["device_type"] == "cpu"
    assert set(report["versions"]) == {"python", "torch", "transformers"} and report["dtype"] == "float32"
    assert "--quick" in report["command"] and report["commit"] and report["device"]
    checks = {name: check for part in bench.PARTS for name, check in report[part]["checks"].items()}
    assert set(checks) == {"greedy", "logprobs", "distribution", "same_update", "same_loss"}
    assert all(check["ok"] for check in checks.values()), checks
    rivals = ["generate"] + ["generate_batch"] * (importlib.util.find_spec("psutil") is not None)
    for result in report["sampler"]["workloads"]:
        assert [run["side"] for run in result["runs"]] == ["ours", *rivals] * 2  # alternating
        assert set(result["left_out"]) == {"generate_batch"} - set(rivals) and set(result["ratio"]) == set(rivals)
        for run in result["runs"]:  # the same lengths for every side
            assert run["tokens"] == run["prescribed"] and 0 < run["floor_share"] < 1
    uniform = report["sampler"]["workloads"][0]
    assert {run["prescribed"] for run in uniform["runs"]} == {3 * 2 * 6}
    assert [run["side"] for run in report["update"]["runs"]] == ["ours", "transformers"] * 2
    trl = importlib.util.find_spec("trl") is not None
    assert [run["side"] for run in report["step"]["runs"]] == ["ours", "trl"] * 2 if trl else ["ours"] * 2
    assert trl or "pip install trl" in done.stdout


def test_bench_a_rival_or_a_part_that_dies_is_a_row_and_not_the_end(tmp_path, monkeypatch, capsys):
    calls = []

    def dies(*_, **__):
        calls.append(0)
        if len(calls) > 3:  # after the first workload's warm-up and its two repeats
            raise RuntimeError("gone\nwith a long explanation")
        return [[1, 2]] * 6

    def too_large(args, device):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(bench, "SAMPLERS", {**bench.SAMPLERS, "mortal": dies, "silent": lambda *_, **__: [[]] * 6})
    monkeypatch.setattr(bench, "sampler_rivals", lambda device: (["ours", "mortal", "silent"], {}))
    monkeypatch.setattr(bench, "plain_update", dies)
    monkeypatch.setattr(bench, "bench_growth", too_large)
    flags = "--quick --repeats 2 --threads 1 --only growth sampler update --device cpu --out".split()
    assert bench.main([*flags, str(tmp_path / "new/b.json")]) == 1
    report, said = json.loads((tmp_path / "new/b.json").read_text()), capsys.readouterr().out
    assert report["growth"]["failed"] == "OutOfMemoryError: no message" and "growth: failed, OutOfMemoryError" in said
    first, second = report["sampler"]["workloads"]
    assert first["left_out"] == {"silent": "it made no tokens"} and list(first["ratio"]) == ["mortal"]
    assert second["left_out"] == {"mortal": "RuntimeError: gone", "silent": "it made no tokens"} and not second["ratio"]
    assert [run["side"] for run in second["runs"]] == ["ours"] * 2 and second["tokens_per_s"]["ours"]["median"] > 0
    update = report["update"]
    assert update["left_out"] == {"transformers": "RuntimeError: gone"} and [r["side"] for r in update["runs"]] == ["ours"] * 2
    assert report["load_after"] and "not run: RuntimeError: gone" in said


def test_the_script_for_a_device_runs_at_toy_size_and_a_part_that_fails_is_a_row(tmp_path):
    """The script that a GPU is asked with, without one; its Python is a wrapper that dies in the part `head`."""
    wrapper = tmp_path / "python"
    dies = 'case "$*" in *"--only head"*) echo "no such kernel" >&2; exit 3;; esac'
    wrapper.write_text(f'#!/bin/sh\n{dies}\nexec {sys.executable} "$@"\n')
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
    command[-1] = "tests none"
    done = subprocess.run(command, cwd=ROOT, env=settings | {"IN_ALL": "0"}, capture_output=True, text=True, timeout=60)
    assert "| tests | 0 | not run: the 0 s are used up |" in done.stdout


def test_bench_growth_is_measured(tmp_path):
    assert bench.exponent({8: 3.0, 16: 12.0, 32: 48.0}) == pytest.approx(2) and bench.exponent({1: 5, 9: 5}) == 0
    args = ["--quick", "--only", "growth", "--device", "cpu", "--threads", "1", "--repeats", "1"]
    done = run_script("tools/bench.py", *args, "--out", tmp_path / "growth.json")
    assert done.returncode == 0, done.stderr
    curves = json.loads((tmp_path / "growth.json").read_text())["growth"]["curves"]
    assert [(c["axis"], c["cost"]) for c in curves] == [
        (axis, cost) for axis in ("rows", "response length", "group size of 32 rows") for cost in ("sampling", "update")
    ]
    assert all(len(c["seconds"]) == 2 and min(c["seconds"].values()) > 0 and math.isfinite(c["exponent"]) for c in curves)
    for points in bench.growth_workloads(SimpleNamespace(quick=False), CPU).values():
        assert all(workload.prompts >= 1 and workload.median == workload.longest for workload in points.values())


def test_bench_workloads_and_their_floor_by_hand():
    tail = bench.Workload("tail", 8, 8, 40, 160, median=200, longest=4096)
    lengths = bench.make_lengths(tail, 0)
    assert len(lengths) == 64 and max(lengths) == 4096 and min(lengths) >= 1 and 120 < sorted(lengths)[32] < 330
    assert set(bench.make_lengths(bench.Workload("flat", 2, 3, 4, 9, 7, 7), 0)) == {7}
    small = build_model(ModelConfig.from_dict(bench.TOY), generator=torch.Generator(), dtype=torch.float32, device=CPU)
    parameters, head = sum(p.numel() for p in small.parameters()), 512 * 48
    key_bytes = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, width, bytes
    # two rows of 2 and 3 tokens after one prompt of 5: a step with both, then one with the longer
    slow_memory = bench.sampling_floor(small, [[1] * 5], [2, 3], 2, {"bandwidth": 1.0, "matmul": 1e30})
    assert slow_memory == pytest.approx(2 * 4 * parameters + key_bytes * ((2 + 5) + (2 + 5)))
    slow_product = bench.sampling_floor(small, [[1] * 5], [2, 3], 2, {"bandwidth": 1e30, "matmul": 1.0})
    block = 48 * 48 + 2 * 48 * 16 + 48 * 48 + 3 * 48 * 96  # queries, keys and values, output, MLP
    prefill = 2 * 2 * block * 5 + 2 * 4 * 6 * 8 * (1 + 2 + 3 + 4 + 5) + 2 * head
    assert slow_product == pytest.approx(2 * parameters * 3 + prefill)
    behind = bench.forward_flops(small, [(3, 2)], 2) - bench.forward_flops(small, [(0, 2)], 2)
    assert behind == 2 * 4 * 6 * 8 * (2 * 3)  # two tokens see three more


def test_bench_typo_is_an_error(tmp_path):
    with pytest.raises(SystemExit):
        bench.parse_arguments(["--out", str(tmp_path / "b.json"), "--quik"])


def test_bench_chi_square_by_hand():
    # (60 - 50)^2 / 50 + (40 - 50)^2 / 50 = 4 at one degree of freedom: p = erfc(sqrt(4 / 2)) = 0.0455
    p = bench.chi_square(torch.tensor([60.0, 40.0]).double(), torch.tensor([0.5, 0.5]))
    assert p == pytest.approx(math.erfc(math.sqrt(2)), rel=1e-9)


def test_bench_checks_find_a_different_model():
    """The comparisons are worth nothing unless they fail for models that differ."""
    device = torch.device("cpu")
    ours, theirs = bench.model_pair(bench.SMALL_VOCABULARY, 0, torch.float32, device)
    prompts = [[3, 17, 5, 11], [9, 4]]
    assert bench.check_greedy(ours, theirs, prompts, 12)["ok"]
    assert bench.check_logprobs(ours, theirs, prompts, 12, seed=0)["ok"]
    exact = bench.teacher_forced(theirs, prompts[0], [0])[0].exp()
    rows = bench.sample_ours(ours, [prompts[0]], [1], n=500, max_new_tokens=1, temperature=1.0, seed=0)
    counts = torch.bincount(torch.tensor(rows)[:, 0], minlength=24).double()
    assert bench.chi_square(counts, exact) > 1e-4
    assert bench.chi_square(counts, exact.sqrt() / exact.sqrt().sum()) < 1e-4  # temperature 2 instead of 1
    with torch.no_grad():
        theirs.model.norm.weight[0] += 2.0
    assert not bench.check_greedy(ours, theirs, prompts, 12)["ok"]
    assert not bench.check_logprobs(ours, theirs, prompts, 12, seed=0)["ok"]


def test_bench_responses_of_both_sides_end_at_the_first_eos():
    ours, theirs = bench.model_pair(bench.SMALL_VOCABULARY, 0, torch.float32, torch.device("cpu"))
    eos_ids = [1, 2, 5]
    for sampler, model in ((bench.sample_ours, ours), (bench.sample_theirs, theirs)):
        rows = sampler(model, [[3, 4, 7], [8]], eos_ids, n=20, max_new_tokens=15, temperature=1.0, seed=3)
        assert len(rows) == 40
        assert all(not set(row[:-1]) & set(eos_ids) for row in rows)
        assert all(len(row) == 15 or row[-1] in eos_ids for row in rows)
        assert len({len(row) for row in rows}) > 3  # ragged
        lengths = [3, 1, 7, 2]
        rows = sampler(model, [[3, 4, 7], [8]], (), n=2, max_new_tokens=0, temperature=1.0, seed=3, lengths=lengths)
        assert [len(row) for row in rows] == lengths


def test_bench_memory_counter_sees_a_large_tensor_and_restarts():
    """In a fresh process: in this one, memory that earlier tests freed may still be resident and be taken again."""
    code = (
        "import torch, bench\n"
        "for megabytes in (200, 50):\n"  # the smaller one second: a counter that did not restart would show 200 again
        "    work = lambda: torch.ones(megabytes * 250_000).mean().item()\n"  # 4 bytes each
        "    mean, seconds, peak = bench.measured(work, torch.device('cpu'))\n"
        "    assert mean == 1.0 and seconds > 0\n"
        "    print(peak / bench.MB)\n"
    )
    done = run_script("-c", code)
    assert done.returncode == 0, done.stderr
    for megabytes, peak in zip((200, 50), map(float, done.stdout.split()), strict=True):
        assert 0.9 * megabytes < peak < 1.5 * megabytes + 20
