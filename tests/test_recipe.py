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
from data import prepare, tiny_world
from eval import load_problems
from strategy import Strategy, format_strategy
from tests.common import ROOT, TINY_BASE, ChatServer, luffy_row, read_metrics, tiny_rows, write_rows


def strong_model(rows, handler, body, number):
    """For ChatServer: answers with the row's own strategy, and with 0.8 for every criterion where it is asked for scores."""
    text = body["messages"][0]["content"]
    if "Score the attempts" in text:
        return "\n".join(f"{i}: 0.8 0.8 0.8 0.8" for i in range(1, text.count("<candidate ") + 1))
    strategy = next(row["strategy"] for problem, row in rows.items() if problem in text)
    return format_strategy(Strategy.from_dict(strategy))


def test_the_recipe_runs_at_toy_size_and_passes_over_what_is_done(tmp_path):
    """runs/recipe.sh, which runs/paper_7b.sh and its like set the variables of, from raw rows to the comparison."""
    rows = {row["problem"]: row for row in tiny_rows(14)}
    raw = [{"question": row["problem"], "answer": row["answer"], "worked": row["solution"]} for row in rows.values()]
    test = write_rows(tmp_path / "test.jsonl", [tiny_world.make_rows(0)["test"][0]])

    with ChatServer(partial(strong_model, rows)) as server:
        variables = {
            "WORK": tmp_path / "work", "MODEL": TINY_BASE, "PYTHON": sys.executable, "LAUNCH": sys.executable,
            "BENCH_SOURCE": "none", "EVAL_FILES": test, "TRAIN_COMMAND": "jsonl",
            "TRAIN_SOURCE": write_rows(tmp_path / "raw.jsonl", raw),
            "TRAIN_FLAGS": "--problem_column question --solution_column worked --count 12",
            "STRATEGY_FLAGS": f"--endpoint {server.url} --model strong --quiet --candidates 2",
            "RUN_FLAGS": "--steps 1 --problems_per_step 2 --max_new_tokens 24 --eval_every 0 --device cpu "
            "--sft_batch 4 --sft_epochs 1",
            "EVAL_FLAGS": "--n 2 --max_new_tokens 24 --device cpu",
        }  # fmt: skip
        settings = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in variables.items()}}
        asked = []
        for _ in range(2):
            done = subprocess.run(["bash", "runs/recipe.sh"], cwd=ROOT, env=settings, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            asked.append(len(server.requests))
        assert asked[0] == asked[1] >= 12
    assert "the run in" in done.stdout and "is finished" in done.stdout
    assert {row.problem for row in load_problems(tmp_path / "work/strategies.jsonl")} <= set(rows)
    first, *_, last = read_metrics(tmp_path / "work/run")
    assert first["config"]["data"].endswith("strategies.jsonl") and last["stage"] == "sgpo"
    for name in ("base.json", "trained.json", "run/model/config.json"):
        assert (tmp_path / "work" / name).exists()

    def refused(**changes):
        now = {name: value for name, value in (settings | changes).items() if value is not None}
        done = subprocess.run(["bash", "runs/recipe.sh"], cwd=ROOT, env=now, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    for changes, status, words in (
        ({"TRAIN_FLAGS": None}, 2, "the variable TRAIN_FLAGS is not set"),
        ({"EVAL_FILES": None}, 2, "the variable EVAL_FILES is not set"),
        ({"TRAIN_FLAGS": "--count 9"}, 2, "was made with other settings; name another WORK"),
    ):
        got, said = refused(**changes)
        assert got == status and words in said, said
    shutil.rmtree(tmp_path / "work/run/model")  # training that SIGTERM ended: exit status 0, but there is no model
    got, said = refused(LAUNCH="true")
    assert got == 1 and "training goes on with what it began with" in said and "stopped before its end" in said
    shutil.rmtree(tmp_path / "work/run")
    got, said = refused(LAUNCH="true", STRATEGY_FLAGS=settings["STRATEGY_FLAGS"] + " --seed 9")
    assert got == 1 and "no paid answer would fit" in said and "4/5" not in said  # the old strategies are not trained on


def test_the_recipe_does_not_train_on_the_few_rows_that_got_a_strategy(tmp_path):
    """But where one of several rows fails, it goes on: exit status 3 of strategy.py."""
    rows = {row["problem"]: row for row in tiny_rows(6)}
    first = next(iter(rows))

    def script(handler, body, number, wanted):
        if wanted(body["messages"][0]["content"]):
            return strong_model(rows, handler, body, number)
        return "I cannot."

    for number, (wanted, words) in enumerate((
        (lambda text: first in text or "Score the" in text, "fewer than half of the rows got a strategy"),
        (lambda text: first not in text, "4/5 warm-up and SGPO"),
    )):  # fmt: skip
        with ChatServer(partial(script, wanted=wanted)) as server:
            variables = {
                "WORK": tmp_path / f"work{number}", "MODEL": "m", "PYTHON": sys.executable, "LAUNCH": "true",
                "BENCH_SOURCE": "none", "EVAL_FILES": write_rows(tmp_path / "test.jsonl", tiny_rows(20)[-1:]),
                "TRAIN_COMMAND": "jsonl", "TRAIN_SOURCE": write_rows(tmp_path / "raw.jsonl", list(rows.values())),
                "TRAIN_FLAGS": "--solution_column solution", "RUN_FLAGS": "", "EVAL_FLAGS": "",
                "STRATEGY_FLAGS": f"--endpoint {server.url} --model strong --quiet --candidates 1 --rounds 1",
            }  # fmt: skip
            settings = {**os.environ, **{name: str(value) for name, value in variables.items()}}
            done = subprocess.run(["bash", "runs/recipe.sh"], cwd=ROOT, env=settings, capture_output=True, text=True)
        assert done.returncode == 1 and words in done.stdout + done.stderr, done.stdout + done.stderr
        assert (number == 1) == ("4/5" in done.stdout) and "rows failed, reasons above" in done.stderr


def test_the_papers_recipe_runs_at_toy_size_on_two_ranks(tmp_path):
    """runs/paper_1p5b.sh, and with it paper_7b.sh and recipe.sh, from LUFFY's layout to the table. The benchmarks are there."""
    rows = {row["problem"]: row for row in tiny_rows(14)}
    names = ["math500", "amc23", "olympiad", "aime24", "aime25", "minerva"]
    raw = [luffy_row(p, row["answer"], f"<think>\nhm\n</think>\n{row['solution']}") for p, row in rows.items()]
    work = tmp_path / "work"
    (work / "bench").mkdir(parents=True)
    for name in names:
        group = [{"id": f"{name}-{i}", "problem": f"Of {name}: {i} + 1?", "answer": str(i + 1)} for i in range(2)]
        write_rows(work / f"bench/{name}.jsonl", group)
    sums = {file.name: {"sha256": prepare.sha256_of(file)} for file in (work / "bench").iterdir()}
    (work / "bench/manifest.json").write_text(json.dumps(sums))
    with ChatServer(partial(strong_model, rows)) as server:
        variables = {
            "WORK": work, "MODEL": TINY_BASE, "PYTHON": sys.executable, "BENCH_SOURCE": tmp_path / "unread",
            "LAUNCH": f"{sys.executable} -m torch.distributed.run --nproc_per_node=2 --standalone --",
            "OPENR1": write_rows(tmp_path / "openr1.jsonl", raw), "ENDPOINT": server.url, "STRONG": "strong",
            "TRAIN_FLAGS": "--count 12 --seed 0 --need_solution --think keep",
            "RUN_FLAGS": "--steps 1 --problems_per_step 2 --max_new_tokens 16 --eval_every 0 --device cpu "
            "--sft_batch 4 --sft_epochs 1",
            "EVAL_FLAGS": "--n 1 --limit 2 --max_new_tokens 8 --device cpu",
        }  # fmt: skip
        settings = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in variables.items()}}
        done = subprocess.run(["bash", "runs/paper_1p5b.sh"], cwd=ROOT, env=settings, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert len(server.requests) >= 12 * 5  # k = 5 candidates, the default
    train_rows = load_problems(work / "train/train.jsonl")
    assert len(train_rows) == 12 and all(row.solution.startswith("<think>\nhm\n</think>\n") for row in train_rows)  # kept
    assert read_metrics(work / "run")[0]["ranks"] == 2
    for side in ("base", "trained"):
        result = json.loads((work / f"{side}.json").read_text())
        assert {Path(file).stem for file in result["files"]} == set(names)
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert table[0] == "| model | MATH500 | AMC23 | Olympiad | AIME24 | avg |"
    assert table[2].startswith(f"| {TINY_BASE} |") and table[3].startswith(f"| {work}/run/model |")
    other = "max_new_tokens 8 (paper 32768), n 1 (paper 4), problems 2 (paper 500)"
    assert f"MATH500 differs from the paper in {other}" in done.stdout


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
    done = subprocess.run(["bash", f"runs/{script}.sh"], cwd=tmp_path, env=settings, capture_output=True, text=True)
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
        done = subprocess.run(["bash", "runs/smoke.sh"], cwd=tmp_path, env=settings, capture_output=True, text=True)
        assert done.returncode == 0 and "MODEL=Qwen2.5-0.5B-Instruct" in done.stdout, done.stderr
        write_rows(tmp_path / "other.jsonl", tiny_rows(300))
        settings["ROWS"] = "other.jsonl"
        done = subprocess.run(["bash", "runs/smoke.sh"], cwd=tmp_path, env=settings, capture_output=True, text=True)
        assert done.returncode == 2 and "runs/smoke was made with other rows than other.jsonl" in done.stderr
