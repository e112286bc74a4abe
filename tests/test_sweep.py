"""Many runs: rows, rates, verdicts, pages."""

import argparse
import shutil

import mpmath  # comes with math-verify's sympy
import pytest

import train
from tests.common import ROOT
from tools import report, sweep

TINY = ROOT / "results/tiny"


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """sweep with a train.py and an eval.py of our own; gives back what lists the "row seed" that train.py was called for."""
    for name in ("train.py", "eval.py"):
        shutil.copy(ROOT / "tests/fake_train.py", tmp_path / name)
    monkeypatch.setattr(sweep, "HERE", tmp_path)
    return lambda: sorted((tmp_path / "calls.txt").read_text().splitlines())


def jobs_of(suite, seeds=2, **changes):
    args = {"base": "--model m --data rl.jsonl --eval_data test.jsonl --problems_per_step 8", "steps": 12} | changes
    return sweep.make_jobs(argparse.Namespace(suite=suite, seeds=seeds, results=TINY, **args))


def responses(cfg):
    return cfg.steps * cfg.problems_per_step * (cfg.group_auto + (cfg.group_guided if cfg.method == "sgpo" else 0))


def test_every_row_of_every_suite_is_a_valid_command():
    configs = {}
    for suite in sweep.SUITES:
        jobs = jobs_of(suite)
        assert len({(job.row, job.seed) for job in jobs}) == len(jobs)
        configs[suite] = {}
        for job in jobs:
            assert "/" not in job.row
            configs[suite][job.row] = train.parse_config([*job.flags, "--seed", str(job.seed), "--out", "x"])
    rows, own = configs["table"], configs["model"]
    assert set(rows) == {*sweep.METHODS, *sweep.ABLATIONS}
    assert {cfg.seed for cfg in configs["rates"].values()} == {101}
    for name, method in (("grpo", "grpo"), ("sgpo@low30", "sgpo")):  # the rates found for the methods
        assert configs["hard"][name].learning_rate == rows[method].learning_rate
    assert {row for picture in sweep.CURVES.values() for row in picture} <= set(rows) - {"sft"}
    for name in ("sgpo", "grpo", "sft+grpo", "luffy", "hpt"):  # LUFFY's solution counts as one response
        assert responses(rows[name]) == 11_520, name
    for name, words in sweep.ABLATIONS.items():  # an ablation is SGPO but for its own flags
        differs = {key for key, value in vars(rows[name]).items() if value != getattr(rows["sgpo"], key)}
        assert differs == {flag.removeprefix("--").removeprefix("no-") for flag in words.split() if "--" in flag}
    assert {len(values) for values in sweep.RATES.values()} == {4}  # no method is searched more than another
    for row, cfg in configs["knobs"].items():  # the row says what the run was
        name, value = row.split("=")
        assert getattr(cfg, name) == float(value)
    assert {cfg.model for cfg in own.values()} == {"m"} and own.pop("sft").steps == 0
    assert {responses(cfg) for cfg in own.values()} == {12 * 8 * 12}
    assert {cfg.sft_fraction for cfg in own.values()} == {0}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["model", "--steps", "4"], "--model among its flags"),
        (["model", "--base=--model m --data d", "--steps", "4"], "--data without --eval_data"),
        (["model", "--base=--model m --group_auto 4", "--steps", "4"], "--base: --group_auto would make the numbers"),
        (["table", "--seeds", "18"], "need 2 to 17 seeds"),
        (["table", "--steps", "3"], "are for the suite model"),
        (["table"], "run `python tools/sweep.py rates` first"),
    ],
)
def test_sweep_refuses_what_it_cannot_run(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        sweep.main([*flags, "--results", str(tmp_path)])
    assert message in f"{stop.value} {capsys.readouterr().err}"


def test_a_suite_from_its_command_to_its_page(tmp_path, calls, monkeypatch):
    drawn, results = [], tmp_path / "results"
    monkeypatch.setattr(report, "main", drawn.append)
    for name, few in (("HARD_ROWS", ("sgpo", "grpo")), ("LOW_QUALITY_ROWS", ("sgpo",)), ("CLAIMS", {})):
        monkeypatch.setattr(sweep, name, few)
    results.mkdir()
    shutil.copy(TINY / "rates.csv", results)
    command = ["hard", "--seeds", "2", "--results", str(results), "--runs", str(tmp_path / "runs")]
    sweep.main(command)
    lines, steps = sweep.read_csv(results / "hard.csv"), sweep.read_csv(results / "hard_steps.csv")
    want = {"row": "sgpo", "seed": "1", "base": "0.4", "accuracy": "0.8", "accuracy_also": "0.65", "guided": "0.9"}
    want |= {"sampled_tokens": "120", "step_s": "6.0", "reward_last10": "7.5", "alpha_first10": "5.5", "kept": "9.5"}
    assert want.items() <= lines[len(lines) // 2].items()
    sgpo = [line for line in steps if line["row"] == "sgpo"]
    assert [int(line["step"]) for line in sgpo] == [*range(1, 13)]
    assert sgpo[3]["entropy"] == "3.5"
    assert sgpo[5]["kept"] == "" and sgpo[6]["kept"] == "6.5"  # steps without any target have no share of kept tokens
    page = (results / "hard.md").read_text()
    assert f"All rows: `{sweep.HARD}`." in page  # not --data, whose values differ
    assert "| sgpo@low06 | (reference) | 0.750 ± 0.050 |" in page and "`--data data/hard/train-low06.jsonl --learning" in page
    assert drawn == [["rows", str(results / "hard.csv"), "--out", str(results / "hard")]]
    sweep.main(command)
    assert len(calls()) == len(lines) and not (tmp_path / "runs/hard/sgpo/0/model").exists()  # nothing runs twice


def test_a_sweep_goes_on_where_it_was_cut_off_and_names_what_failed(tmp_path, calls):
    jobs = [sweep.Job(row, seed, ("--x", row)) for row in ("a", "b") for seed in (0, 1)]
    sweep.run_suite(jobs[:3], tmp_path / "runs", 2)
    (tmp_path / "runs/a/1/done.json").unlink()  # as if it had been cut off
    bad = sweep.Job("bad", 0, ("--fail",))
    for _ in range(2):
        with pytest.raises(SystemExit, match="(?s)1 of 5 runs failed.*bad, seed 0: exit 1.*out of luck"):
            sweep.run_suite([bad, *jobs], tmp_path / "runs", 1)
    assert calls() == ["a 0", "a 1", "a 1", "b 0", "b 1", "bad 0", "bad 0"]
    with pytest.raises(ValueError, match="holds a run with other flags"):
        sweep.run_suite([sweep.Job("a", 0, ("--x", "other"))], tmp_path / "runs", 2)


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
    for best, accuracies in ((2, clear), (3, equal)):
        lines = []
        for method, rates in sweep.RATES.items():
            for i, accuracy in enumerate(accuracies):
                lines.append({"row": f"{method}@{rates[i // 2]}", "seed": i % 2, "accuracy": accuracy})
        sweep.write_csv(tmp_path / "rates.csv", lines)
        assert sweep.best_rates(tmp_path / "rates.csv") == {method: rates[best] for method, rates in sweep.RATES.items()}
    sweep.write_csv(tmp_path / "rates.csv", lines[:-2])
    with pytest.raises(ValueError, match="no run of hpt at 4e-4"):
        sweep.best_rates(tmp_path / "rates.csv")


def test_the_committed_pages_are_what_their_csv_files_say():
    for folder, suite in ((TINY, "table"), (TINY, "knobs"), (TINY, "hard"), (ROOT / "results/smollm2", "model")):
        assert sweep.suite_page(suite, folder) == (folder / f"{suite}.md").read_text(encoding="utf-8"), suite
