"""Many runs: rows, rates, verdicts, pages."""

import argparse
import itertools
import json
import math
import shutil
from collections import defaultdict
from pathlib import Path

import mpmath  # comes with math-verify's sympy
import pytest

import train
from tests.common import ROOT
from tools import sweep


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """sweep with a train.py and an eval.py of our own; gives back what lists the "row seed" that train.py was called for."""
    for name in ("train.py", "eval.py"):
        shutil.copy(ROOT / "tests/fake_train.py", tmp_path / name)
    monkeypatch.setattr(sweep, "HERE", tmp_path)
    return lambda: sorted((tmp_path / "calls.txt").read_text().splitlines())


def write_rates(folder, accuracy=lambda method, rate, seed: 0.5):
    lines = [
        {"row": f"{method}@{rate}", "seed": seed, "accuracy": accuracy(method, rate, seed)}
        for method, rates in sweep.RATES.items() for rate in rates for seed in (0, 1)
    ]  # fmt: skip
    sweep.write_csv(folder / "rates.csv", lines)
    return lines


def jobs_of(suite, results, world="tiny", seeds=2, **changes):
    args = {"base": "--model m --data rl.jsonl --eval_data test.jsonl --problems_per_step 8", "steps": 12} | changes
    return sweep.make_jobs(argparse.Namespace(suite=suite, world=world, seeds=seeds, results=results, **args))


def responses(cfg):
    guided = cfg.group_guided if cfg.method in ("sgpo", "hinted") else 0
    return cfg.steps * cfg.problems_per_step * (cfg.group_auto + guided)


@pytest.fixture
def configs(tmp_path):
    """{(world, suite): {row: the settings that train.py reads from its flags}}"""
    write_rates(tmp_path, lambda method, rate, seed: 0.9 if rate in ("4e-4", "1e-4") and method != "hpt" else 0.1)
    configs = {}
    for world, suite in [*itertools.product(sweep.WORLDS, ("rates", "table")), ("tiny", "model")]:
        jobs = jobs_of(suite, tmp_path, world)
        assert len({(job.row, job.seed) for job in jobs}) == len(jobs) and not any("/" in job.row for job in jobs)
        own = [train.parse_config([*job.flags, "--seed", str(job.seed), "--out", "x"]) for job in jobs]
        configs[world, suite] = dict(zip((job.row for job in jobs), own, strict=True))
    return configs


@pytest.mark.parametrize("world", sweep.WORLDS)
def test_every_row_is_the_run_that_its_name_says(configs, world):
    rows, rates = (configs[world, suite] for suite in ("table", "rates"))
    assert {cfg.seed for cfg in rates.values()} == {101} and len(rates) == 6 * 4  # no method is searched more than another
    assert {Path(cfg.eval_data).name for cfg in rates.values()} == {"valid.jsonl"}
    assert (rows["grpo"].learning_rate, rows["hpt@cold"].learning_rate, rows["sft"].sft_learning_rate) == (4e-4, 8e-4, 1e-4)
    for name, cfg in rows.items():
        assert Path(cfg.model).parts[-2:] == (world, "base") and Path(cfg.eval_data).parts[-2:] == (world, "test.jsonl")
        if name != "sft":
            assert responses(cfg) == (7_680 if name.endswith("@8x30") else 11_520), name
            assert cfg.sft_fraction == (0 if name.endswith("@cold") else 0.3333)
            assert cfg.group_auto == (8 if "@8" in name or cfg.method in ("sgpo", "hinted") else 12)
    warm = {tuple(v for k, v in vars(c).items() if "sft_" in k) for n, c in rows.items() if n != "sft" and "@cold" not in n}
    assert len(warm) == 1  # one warm-up: with a seed the same weights
    for name, words in sweep.ABLATIONS.items():  # an ablation is SGPO but for its own flags
        differs = {key for key, value in vars(rows[name]).items() if value != getattr(rows["sgpo"], key)}
        assert differs == {flag.removeprefix("--").removeprefix("no-") for flag in words.split() if "--" in flag}
    assert {row for picture in sweep.CURVES.values() for row in picture} <= set(rows) - {"sft"}
    claimed = {row for claim in sweep.CLAIMS["claims"] for row, _ in (claim.get(key, ["sgpo", ""]) for key in ("more", "less"))}
    assert claimed | {claim["slower"] for claim in sweep.CLAIMS["claims"] if "slower" in claim} <= set(rows)
    low = {name.partition("@")[2]: Path(cfg.data).stem for name, cfg in rows.items() if "@low" in name}
    assert low == ({"low06": "train-low06", "low30": "train-low30"} if world == "hard" else {})


def test_the_rows_of_a_model_draw_equally_many_responses(configs):
    own = configs["tiny", "model"]
    assert {cfg.model for cfg in own.values()} == {"m"} and own.pop("sft").steps == 0
    assert {responses(cfg) for cfg in own.values()} == {12 * 8 * 12}
    assert {cfg.sft_fraction for cfg in own.values()} == {0}


@pytest.mark.parametrize("flags, message", json.loads((ROOT / "tests/bad_sweeps.json").read_text()))
def test_sweep_refuses_what_it_cannot_run(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        sweep.main([*flags, "--results", str(tmp_path)])
    assert message in f"{stop.value} {capsys.readouterr().err}"


def test_a_suite_from_its_command_to_its_page(tmp_path, calls, monkeypatch):
    results = tmp_path / "hard"
    results.mkdir()
    write_rates(results)
    command = ["table", "--world", "hard", "--seeds", "2", "--results", str(results), "--runs", str(tmp_path / "runs")]
    sweep.main(command)
    lines, steps = sweep.read_csv(results / "table.csv"), sweep.read_csv(results / "table_steps.csv")
    want = {"row": "sgpo", "seed": "1", "base": "0.3", "start": "0.4", "accuracy": "0.8", "accuracy_also": "0.65"}
    want |= {"guided": "0.9", "sampled_tokens": "120", "step_s": "6.0", "reward_last10": "7.5", "alpha_first10": "5.5"}
    want |= {"reward_peak": "7.5", "kept": "9.5", "commit": "abc"}
    assert want.items() <= lines[len(lines) // 2].items()
    sgpo = [line for line in steps if (line["row"], line["seed"]) == ("sgpo", "0")]
    assert [int(line["step"]) for line in sgpo] == [*range(13)]
    assert [line["accuracy"] for line in sgpo] == ["0.4", *[""] * 11, "0.7"]
    assert sgpo[4]["entropy"] == "3"
    assert sgpo[6]["kept"] == "" and sgpo[7]["kept"] == "6"  # steps without any target have no share of kept tokens
    page = (results / "table.md").read_text()
    assert page.startswith("# Methods and ablations on the hard world\n\nWritten by `python tools/sweep.py table --world hard`")
    assert f"All rows: `{sweep.WORLDS['hard'].strip()}" in page
    assert "| sgpo@low06 | (reference) | 0.750 ± 0.050 |" in page and "data/hard/train-low06.jsonl" in page
    assert "| SGPO beats LUFFY (7B: 3.3) | +0.000 [+0.000, +0.000] not reproduced | +0.000" in page
    assert (results / "methods.png").exists() and (results / "table.svg").exists()
    sweep.main(command)
    assert len(calls()) == len(lines)  # nothing runs twice
    assert [*(tmp_path / "runs/hard/table/sgpo").glob("0-*/metrics.jsonl")] and not [*(tmp_path / "runs").rglob("model")]


def test_a_sweep_goes_on_where_it_was_cut_off_and_names_what_failed(tmp_path, calls, monkeypatch):
    args = argparse.Namespace(suite="table", world="tiny", results=tmp_path, runs=tmp_path / "runs", jobs=2)
    jobs = [sweep.Job(row, seed, ("--x", row)) for row in ("a", "b") for seed in (0, 1)]
    sweep.run_suite(args, jobs[:3])
    steps = sweep.read_csv(tmp_path / "table_steps.csv")
    sweep.write_csv(tmp_path / "table_steps.csv", [line for line in steps if (line["row"], line["seed"]) != ("a", "1")])
    shutil.rmtree(args.runs)  # the csv files are what counts, on another machine too
    bad = sweep.Job("bad", 0, ("--fail",))
    for _ in range(2):
        with pytest.raises(SystemExit, match="(?s)1 of 5 runs failed.*bad, seed 0: exit 1.*out of luck"):
            sweep.run_suite(args, [bad, *jobs])
    assert calls() == ["a 0", "a 1", "a 1", "b 0", "b 1", "bad 0", "bad 0"]
    sweep.run_suite(args, [sweep.Job("a", 0, ("--x", "other"))])
    (tmp_path / "train.py").write_text((tmp_path / "train.py").read_text() + "# other code\n")
    sweep.run_suite(args, [sweep.Job("a", 0, ("--x", "other"))])
    assert calls().count("a 0") == 3


def test_steps_to_the_same_reward_by_hand():
    """`fast` ends at 1, `slow` at a mean of 0.55 over its last ten steps: the level. Trailing means of five steps reach it
    after step 3 (0, 1, 1: 0.67) and after step 12 (0.4 to 0.8: 0.6)."""
    rewards = {"fast": [0.0] + [1.0] * 13, "slow": [0.0] * 4 + [i / 10 for i in range(1, 11)]}
    curves = [
        {"row": row, "seed": "0", "step": str(step), "reward_auto": str(value)}
        for row, values in rewards.items() for step, value in enumerate(values, start=1)
    ]  # fmt: skip
    slow, fast = sweep.steps_to_same_reward(
        [{"row": "slow", "seed": "0", "step": "0", "reward_auto": ""}, *curves], "slow", "fast"
    )
    assert (math.exp(slow["0"]), math.exp(fast["0"])) == pytest.approx((12, 3))


def test_seed_interval_by_hand():
    """Differences 1, 2, 3: mean 2, standard error 1 / sqrt 3, t with two degrees of freedom 4.303."""
    interval = sweep.seed_interval({"0": 2.0, "1": 4.0, "2": 6.0, "9": 1.0}, {"2": 3.0, "1": 2.0, "0": 1.0})
    assert interval == pytest.approx((2, 2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5), abs=1e-9)
    with pytest.raises(ValueError, match="2 to 17 seeds"):
        sweep.seed_interval({"0": 1.0}, {"0": 2.0})
    above, around, below = (1, 0.1, 2), (1, -0.1, 2), (-1, -2, -0.1)
    assert [sweep.verdict(d) for d in (above, around, below)] == ["reproduced", "not reproduced", "the opposite"]
    assert [sweep.verdict(d, denied=True) for d in (above, around, below)] == ["not reproduced", "reproduced", "reproduced"]
    for freedom, t in enumerate(sweep.T95, start=1):
        tail = mpmath.betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True)
        assert float(tail) == pytest.approx(0.05, abs=1e-4)


def test_the_best_rate_is_the_one_of_highest_mean(tmp_path):
    # the second rate has the best run of all, the third the highest mean; then two means are equal, and the larger rate wins
    clear, equal = (0.5, 0.5, 0.8, 0.2, 0.6, 0.6, 0.5, 0.5), (0.3, 0.1, 0.0, 0.0, 0.0, 0.0, 0.2, 0.2)
    for best, values in ((2, clear), (3, equal)):
        lines = write_rates(tmp_path, lambda method, rate, seed, v=values: v[2 * sweep.RATES[method].index(rate) + seed])
        assert sweep.best_rates(tmp_path / "rates.csv") == {method: rates[best] for method, rates in sweep.RATES.items()}
    sweep.write_csv(tmp_path / "rates.csv", [line for line in lines if line["row"] != "hpt@8e-4"])
    with pytest.raises(ValueError, match="no run of hpt at 8e-4"):
        sweep.best_rates(tmp_path / "rates.csv")


@pytest.mark.parametrize("page", sorted((ROOT / "results").glob("*/*.md")), ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_the_committed_pages_are_what_their_csv_files_say(page):
    assert sweep.suite_page(page.stem, page.parent) == page.read_text(encoding="utf-8")
    if page.stem == "table":  # all rows of a block begin at the same weights
        starts = defaultdict(set)
        for line in sweep.read_csv(page.with_suffix(".csv")):
            if line["row"] != "sft":
                starts[line["seed"], "@cold" in line["row"]].add(line["start"])
        assert {len(values) for values in starts.values()} == {1}
