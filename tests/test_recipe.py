"""runs/: from raw data to table, at toy size."""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import train
from data import prepare
from eval import load_problems
from methods import METHODS
from strategy import Strategy, format_strategy
from tests.common import ROOT, TINY_BASE, ChatServer, luffy_row, read_metrics, tiny_rows, write_rows


def strong_model(rows, handler, body, number):
    """For ChatServer: answers with the row's own strategy, and with 0.8 for every criterion if it is asked for scores."""
    text = body["messages"][0]["content"]
    if "Score the attempts" in text:
        return "\n".join(f"{i}: 0.8 0.8 0.8 0.8" for i in range(1, text.count("<candidate ") + 1))
    strategy = next(row["strategy"] for problem, row in rows.items() if problem in text)
    return format_strategy(Strategy.from_dict(strategy))


def run_bash(script, variables):
    """(exit status, what it said) of a script in runs/; a variable that is None is not set."""
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **variables}
    settings = {name: str(value) for name, value in settings.items() if value is not None}
    done = subprocess.run(["bash", script], cwd=ROOT, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


@pytest.mark.parametrize("few", [True, False])
def test_the_recipe_does_not_train_on_the_few_rows_that_got_a_strategy(tmp_path, few):
    """But if one of several rows fails, it goes on: exit status 3 of strategy.py. LAUNCH only says what it would start."""
    rows = {row["problem"]: row for row in tiny_rows(6)}
    first, test = next(iter(rows)), write_rows(tmp_path / "test.jsonl", tiny_rows(20)[-1:])

    def script(handler, body, number):
        text = body["messages"][0]["content"]
        wanted = (first in text or "Score the" in text) if few else first not in text
        return strong_model(rows, handler, body, number) if wanted else "I cannot."

    (tmp_path / "work/run/model").mkdir(parents=True)  # so that it goes on to the evaluation
    with ChatServer(script) as server:
        status, said = run_bash("runs/recipe.sh", {
            "WORK": tmp_path / "work", "MODEL": "m", "LAUNCH": "echo", "BENCH_SOURCE": "none", "EVAL_FILES": test,
            "TRAIN_COMMAND": "jsonl", "TRAIN_SOURCE": write_rows(tmp_path / "raw.jsonl", tiny_rows(6, strategy=None)),
            "TRAIN_FLAGS": "", "RUN_FLAGS": "--steps 1", "EVAL_FLAGS": "--n 2",
            "STRATEGY_FLAGS": f"--endpoint {server.url} --model strong --candidates 1 --rounds 1",
        })  # fmt: skip
    assert status == 1 and "rows failed, reasons above" in said
    assert ("fewer than half of the rows got a strategy" in said) == few
    assert (f"--data {tmp_path}/work/strategies.jsonl --out {tmp_path}/work/run --resume --steps 1" in said) != few
    assert (f"eval.py --model m --data {test} --out {tmp_path}/work/base.json --n 2" in said) != few


def test_the_papers_recipe_runs_at_toy_size_and_passes_over_what_is_done(tmp_path):
    """runs/paper_1p5b.sh, and with it paper_7b.sh and recipe.sh, from LUFFY's layout to the table. The benchmarks are there."""
    rows, work = {row["problem"]: row for row in tiny_rows(14)}, tmp_path / "work"
    raw = [luffy_row(p, row["answer"], f"<think>\nhm\n</think>\n{row['solution']}") for p, row in rows.items()]
    (work / "bench").mkdir(parents=True)
    for name in prepare.BENCHMARKS:
        group = [{"id": f"{name}-{i}", "problem": f"Of {name}: {i} + 1?", "answer": str(i + 1)} for i in range(2)]
        write_rows(work / f"bench/{name}.jsonl", group)
    sums = {file.name: {"sha256": prepare.sha256_of(file)} for file in (work / "bench").iterdir()}
    (work / "bench/manifest.json").write_text(json.dumps(sums))
    run = partial(run_bash, "runs/paper_1p5b.sh")
    with ChatServer(partial(strong_model, rows)) as server:
        variables = {
            "WORK": work, "MODEL": TINY_BASE, "BENCH_SOURCE": tmp_path / "unread",
            "LAUNCH": sys.executable,
            "OPENR1": write_rows(tmp_path / "openr1.jsonl", raw), "ENDPOINT": server.url, "STRONG": "strong",
            "TRAIN_FLAGS": "--count 12 --seed 0 --need_solution --think keep",
            "RUN_FLAGS": "--steps 1 --problems_per_step 2 --max_new_tokens 16 --eval_every 0 --device cpu "
            "--sft_batch 4 --sft_epochs 1",
            "EVAL_FLAGS": "--n 1 --limit 2 --max_new_tokens 8 --device cpu",
        }  # fmt: skip
        status, said = run(variables)
        assert status == 0, said[-3000:]
        asked = len(server.requests)
        results = {side: (work / f"{side}.json").read_bytes() for side in ("base", "trained")}
        status, again = run(variables | {"LAUNCH": "echo"})
        assert status == 0 and len(server.requests) == asked >= 12 * 5  # k = 5 candidates, the default
    assert results == {side: (work / f"{side}.json").read_bytes() for side in results}
    train_rows = load_problems(work / "train/train.jsonl")
    assert len(train_rows) == 12 and all(row.solution.startswith("<think>\nhm\n</think>\n") for row in train_rows)  # kept
    first, *_, last = read_metrics(work / "run")
    assert first["config"]["data"].endswith("strategies.jsonl") and last["stage"] == "sgpo"
    assert all({Path(file).stem for file in json.loads(r)["files"]} == set(prepare.BENCHMARKS) for r in results.values())
    table = [line for line in said.splitlines() if line.startswith("|")]
    assert table[2].startswith(f"| {TINY_BASE} |") and table[3].startswith(f"| {work}/run/model |")
    for changes, words in (
        ({"TRAIN_FLAGS": "--count 9"}, "was made with other settings; name another WORK"),
        ({"BENCH_SOURCE": "none", "EVAL_FILES": None}, "the variable EVAL_FILES is not set"),
    ):
        status, said = run(variables | changes)
        assert status == 2 and words in said, said
    shutil.rmtree(work / "run/model")  # training that SIGTERM ended: exit status 0, but there is no model
    status, said = run(variables | {"LAUNCH": "true"})
    assert status == 1 and "training goes on with what it began with" in said and "stopped before its end" in said
    shutil.rmtree(work / "run")
    status, said = run(variables | {"LAUNCH": "true", "STRATEGY_FLAGS": f"--endpoint {server.url} --model strong --seed 9"})
    assert status == 1 and "no paid answer would fit" in said and "4/5" not in said  # the old strategies are not trained on


@pytest.mark.parametrize("script", ["paper_7b", "paper_1p5b", "smoke"])
def test_each_recipe_sets_every_variable(script, tmp_path):
    """With a recipe.sh in the place of the real one that checks and shows them."""
    (tmp_path / "runs").mkdir()
    for name in ("paper_7b", "paper_1p5b", "smoke"):
        shutil.copy(ROOT / f"runs/{name}.sh", tmp_path / "runs")
    check = re.search(r"^needed=.*?^done\n", (ROOT / "runs/recipe.sh").read_text(), re.M | re.S)[0]
    show = 'echo "$RUN_FLAGS" | tr " " "\n"; echo "MODEL=$MODEL LAUNCH=$LAUNCH"\n'
    (tmp_path / "runs/recipe.sh").write_text(check + show)
    write_rows(tmp_path / "rows.jsonl", tiny_rows(600))
    settings = {"PATH": os.environ["PATH"], "ENDPOINT": "http://x/v1", "STRONG": "y", "OPENR1": "z", "ROWS": "rows.jsonl"}
    if script == "smoke":
        settings["MODEL"] = str(TINY_BASE)
    run = partial(subprocess.run, ["bash", f"runs/{script}.sh"], cwd=tmp_path, env=settings, capture_output=True, text=True)
    done = run()
    assert done.returncode == 0, done.stderr
    *flags, last = done.stdout.splitlines()
    cfg = train.parse_config(["--model", "x", "--data", "y", *flags])
    assert cfg.method == "sgpo" and ("torchrun" in last) == (script != "smoke")
    assert {"paper_7b": "Qwen2.5-7B-Instruct", "paper_1p5b": "Qwen2.5-1.5B-Instruct", "smoke": str(TINY_BASE)}[script] in last
    if script == "smoke":
        rows = {name: load_problems(tmp_path / f"runs/smoke/rows/{name}.jsonl") for name in ("train", "test")}
        assert len(rows["train"]) == 60 and len(rows["test"]) == 32
        assert not {row.id for row in rows["train"]} & {row.id for row in rows["test"]}
        settings["MODEL"] = "Qwen2.5-0.5B-Instruct"  # a hub's name: no folder of that name with SmolLM2's weights is made here
        done = run()
        assert done.returncode == 0 and "MODEL=Qwen2.5-0.5B-Instruct" in done.stdout, done.stderr
        write_rows(tmp_path / "other.jsonl", tiny_rows(300))
        settings["ROWS"] = "other.jsonl"
        done = run()
        assert done.returncode == 2 and "runs/smoke was made with other rows than other.jsonl" in done.stderr


def test_the_transfer_runs_at_toy_size_and_passes_over_what_is_done(tmp_path):
    """runs/transfer.sh with one method; then with all of them, each command only echoed, on what the first call left."""
    work = tmp_path / "work"
    variables = {
        "WORK": work, "MODEL": TINY_BASE, "ALONE": "one-step", "GUIDED": "ages nth-term", "ROWS": "4 4 2",
        "METHODS": "sgpo", "RATES": "1e-4", "SEEDS": "3", "EVAL_FLAGS": "--n 1 --max_new_tokens 8",
        "WARM_FLAGS": "--sft_epochs 1 --sft_batch 8 --eval_max_new_tokens 8",
        "RL_FLAGS": "--steps 1 --problems_per_step 4 --group_guided 2 --max_new_tokens 8 --eval_max_new_tokens 8",
    }  # fmt: skip
    status, said = run_bash("runs/transfer.sh", variables)
    assert status == 0, said[-3000:]
    table = [line.split(" | ")[:3] for line in said.splitlines() if line.startswith("| ")]
    assert table == [["|", "seeds", "all"], *([f"| {name}", "1", "0.000 / 0.000"] for name in ("base", "warm", "sgpo-1e-4"))]
    assert read_metrics(work / "sgpo-1e-4-3")[-1]["stage"] == "sgpo" and not (work / "sgpo-1e-4-3/checkpoints").exists()
    names = ("grpo", "hinted", "luffy", "shuffled", "sft-on-target", "no-clip")
    for name in names:
        (work / f"{name}-1e-4-3/model").mkdir(parents=True)
        shutil.copy(work / "eval/warm.json", work / f"eval/{name}-1e-4-3.json")
    variables |= {"METHODS": " ".join(("sgpo", *names)), "LAUNCH": "echo", "PYTHON": "echo"}
    status, said = run_bash("runs/transfer.sh", variables)
    assert status == 0 and "eval.py --model" not in said, said[-3000:]
    runs = [train.parse_config(line.split()[1:]) for line in said.splitlines() if line.startswith("train.py")]
    assert [cfg.method for cfg in runs] == ["sft", "sgpo", "grpo", "hinted", "luffy", "sgpo", "sgpo", "sgpo"]
    samples = [cfg.group_auto + cfg.group_guided * METHODS[cfg.method].guided for cfg in runs[1:]]
    assert samples == [10, 12, 10, 12, 10, 10, 10]  # of luffy's 12 one is the solution
    last = [(cfg.shuffle_strategies, cfg.distill, cfg.delta) for cfg in runs[5:]]
    assert last == [(True, "kl", 1.0), (False, "sft", 1.0), (False, "kl", float("inf"))]
