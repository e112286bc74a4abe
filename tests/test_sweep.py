"""Many runs: rows, rates, verdicts, pages."""

import re
from dataclasses import replace

import pytest

import train
from tests.common import ROOT
from tools import sweep

FAKE_TRAIN = """
import json, pathlib, sys
flags = sys.argv[1:]
out, seed = pathlib.Path(flags[flags.index("--out") + 1]), int(flags[flags.index("--seed") + 1])
with open(pathlib.Path(__file__).parent / "calls.txt", "a") as file:
    file.write(f"{out.parent.name} {seed}\\n")
if "--fail" in flags:
    sys.exit("out of luck")
(out / "model").mkdir(parents=True)
rows = [{"config": {}, "commit": "abc"}, {"stage": "eval", "guided": False, "accuracy": 0.4}]
names = ("reward_auto", "reward_guided", "alpha", "kl", "kept", "entropy", "length_auto", "with_target", "reach_gap")
step = {"stage": "sgpo", "step_s": 0.5, "sampled_tokens": 10, "length_guided": 7.0}
rows += [{**step, "step": k + 1, "target_tokens": 5 * (k > 5), **dict.fromkeys(names, k + seed)} for k in range(12)]
rows += [{"stage": "eval", "guided": False, "accuracy": 0.7 + seed / 10}, {"stage": "eval", "guided": True, "accuracy": 0.9}]
(out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
"""


@pytest.fixture
def fake_train(tmp_path, monkeypatch):
    """sweep with a train.py that writes a log at once; gives back the list of (row, seed) that it was called for."""
    (tmp_path / "train.py").write_text(FAKE_TRAIN)
    monkeypatch.setattr(sweep, "HERE", tmp_path)

    def calls():
        path = tmp_path / "calls.txt"
        return sorted(path.read_text().split("\n")[:-1]) if path.exists() else []

    return calls


def test_every_row_of_every_suite_is_a_valid_command(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "best_rates", lambda path: {name: "1e-4" for name in sweep.METHODS})
    base = ("--model", "m", "--data", "rl.jsonl", "--eval_data", "test.jsonl", "--problems_per_step", "8")
    for build, seeds in sweep.SUITES.values():
        jobs = build(sweep.Request(seeds, tmp_path, base, 12))
        assert len({(job.row, job.seed) for job in jobs}) == len(jobs) and all("/" not in job.row for job in jobs)
        for job in jobs:
            train.parse_config([*job.flags, "--seed", str(job.seed), "--out", "x"])
    table = sweep.table_suite(sweep.Request(5, tmp_path))
    rows = {job.row: train.parse_config(job.flags) for job in table}
    assert set(rows) == {*sweep.METHODS, *sweep.ABLATIONS} and len(table) == 5 * len(rows)
    for name in ("sgpo", "grpo", "sft+grpo", "luffy", "hpt"):  # the same number of responses; LUFFY's solution counts as one
        cfg = rows[name]
        responses = cfg.group_auto + (cfg.group_guided if cfg.method == "sgpo" else 0)
        assert cfg.steps * cfg.problems_per_step * responses == 11_520, name
    for name in sweep.ABLATIONS:  # an ablation is SGPO but for its own flags
        differs = {key for key, value in vars(rows[name]).items() if value != getattr(rows["sgpo"], key)} - {"out"}
        assert differs == {
            flag.removeprefix("--").removeprefix("no-") for flag in sweep.ABLATIONS[name].split() if "--" in flag
        }
    assert {len(values) for values in sweep.RATES.values()} == {4}  # no method is searched more than another
    own = {job.row: train.parse_config(job.flags) for job in sweep.model_suite(sweep.Request(3, tmp_path, base, 12))}
    assert {cfg.model for cfg in own.values()} == {"m"} and own.pop("sft").steps == 0
    for cfg in own.values():
        responses = cfg.group_auto + (cfg.group_guided if cfg.method == "sgpo" else 0)
        assert cfg.steps * cfg.problems_per_step * responses == 12 * 8 * 12 and cfg.sft_fraction == 0, cfg.method


@pytest.mark.parametrize(
    "flags, message",
    [
        (["model", "--steps", "4"], "--model among its flags"),
        (["model", "--base=--model m"], "even number"),
        (["model", "--base=--model m", "--steps", "3"], "even number"),
        (["model", "--base=--model m --data d", "--steps", "4"], "--data without --eval_data"),
        (["model", "--base=--model m --group_auto 4", "--steps", "4"], "--base: --group_auto would make the numbers"),
        (["model", "--base=--model m", "--steps", "4", "--seeds", "1"], "--seeds 1: the page's intervals need 2 to 17 seeds"),
        (["table", "--seeds", "18"], "need 2 to 17 seeds"),
        (["table", "--steps", "3"], "are for the suite model"),
        (["tabel"], "invalid choice"),
    ],
)
def test_sweep_refuses_what_it_cannot_run(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        sweep.main([*flags, "--results", str(tmp_path)])
    assert message in f"{stop.value} {capsys.readouterr().err}"


def test_the_command_line_hands_the_suite_on_whole(tmp_path, monkeypatch):
    """A second evaluation file that got lost on the way would leave a column out of the page, and no run would fail."""
    monkeypatch.setattr(sweep, "best_rates", lambda path: {name: "1e-4" for name in sweep.METHODS})
    ran = []
    monkeypatch.setattr(sweep, "run_suite", lambda jobs, runs, parallel: ran.extend(jobs))
    sweep.main(["hard", "--results", str(tmp_path), "--rows", "grpo", "--seeds", "2", "--extra=--eval_limit 8"])
    want = [job for job in sweep.hard_suite(sweep.Request(2, tmp_path)) if job.row == "grpo"]
    assert ran == [replace(job, flags=(*job.flags, "--eval_limit", "8")) for job in want] and want[0].also_eval


def test_flags_that_all_runs_share_are_said_once():
    def page(*flags):
        line = {"row": "sgpo", "seed": "0", "base": "0.4", "accuracy": "0.5", "steps": "2", "sampled_tokens": "3"}
        line |= {"step_s": "1.0", "commit": "abc"}
        lines = [line | {"flags": words, "row": row, "seed": seed} for seed in "01" for row, words in flags]
        return sweep.suite_page("model", lines, None)

    text = page(("sgpo", "--model m --data a --delta 1"), ("grpo", "--model m --data b"))
    assert "All rows: `--model m`." in text and "| `--data a --delta 1` |" in text and "| `--data b` |" in text
    assert "Learning rates tried" not in text
    assert "All rows" not in page(("sgpo", "--a 1"), ("grpo", "--b 1"))


def test_knobs_run_the_default_once_and_show_it_for_every_knob(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "best_rates", lambda path: {name: "1e-4" for name in sweep.METHODS})
    jobs = sweep.knobs_suite(sweep.Request(2, tmp_path))
    lines = sweep.knob_lines([{"row": job.row, "seed": job.seed, "flags": " ".join(job.flags)} for job in jobs])
    assert [(line["row"], line["seed"]) for line in lines] == [
        (f"{name}={value}", seed) for name, values in sweep.KNOBS.items() for value in values for seed in (0, 1)
    ]
    assert len({tuple(train.parse_config([*job.flags, "--out", "x"]).__dict__.items()) for job in jobs}) == len(jobs) / 2
    for line in lines:  # the row says what the run was
        name, value = line["row"].split("=")
        assert getattr(train.parse_config(line["flags"].split()), name) == float(value)
    assert {sweep.reference_of(line["row"]) for line in lines} == {f"{k}={v}" for k, v in sweep.DEFAULTS.items()}


def test_a_sweep_resumes_and_runs_nothing_twice(tmp_path, fake_train):
    jobs = [sweep.Job(row, seed, ("--x", row)) for row in ("a", "b") for seed in (0, 1)]
    sweep.run_suite(jobs[:3], tmp_path / "runs", 2)
    (tmp_path / "runs/a/1/done.json").unlink()  # as if it had been cut off
    sweep.run_suite(jobs, tmp_path / "runs", 2)
    assert fake_train() == ["a 0", "a 1", "a 1", "b 0", "b 1"]
    assert not (tmp_path / "runs/a/0/model").exists()
    with pytest.raises(ValueError, match="holds a run with other flags"):
        sweep.run_suite([sweep.Job("a", 0, ("--x", "other"))], tmp_path / "runs", 2)


def test_a_failed_run_is_reported_after_the_others_and_tried_again(tmp_path, fake_train):
    jobs = [sweep.Job("bad", 0, ("--fail",)), sweep.Job("good", 0, ())]
    for _ in range(2):
        with pytest.raises(SystemExit, match="(?s)1 of 2 runs failed.*bad, seed 0: exit 1.*out of luck"):
            sweep.run_suite(jobs, tmp_path / "runs", 1)
    assert fake_train() == ["bad 0", "bad 0", "good 0"]


def test_a_suite_writes_a_line_a_run_and_a_line_a_step(tmp_path, fake_train):
    jobs = [sweep.Job("a", seed, ("--x", "1")) for seed in (0, 1)]
    sweep.run_suite(jobs, tmp_path / "runs", 2)
    sweep.write_csv(tmp_path / "x.csv", [sweep.summarise_run(job, tmp_path / f"runs/a/{job.seed}") for job in jobs])
    first, second = sweep.read_csv(tmp_path / "x.csv")
    want = {"row": "a", "seed": "1", "base": "0.4", "accuracy": "0.8", "guided": "0.9", "steps": "12", "sampled_tokens": "120"}
    want |= {"step_s": "6.0", "reward_last10": "7.5", "alpha_first10": "5.5", "kept": "9.5", "commit": "abc", "flags": "--x 1"}
    assert {key: second[key] for key in want} == want and first["accuracy"] == "0.7"
    lines = sweep.step_lines(jobs, tmp_path / "runs")
    assert [line["step"] for line in lines] == list(range(1, 13)) and lines[3]["entropy"] == 3.5 and lines[0]["seeds"] == 2
    assert lines[5]["kept"] == "" and lines[6]["kept"] == 6.5  # steps without any target have no share of kept tokens


def test_a_suite_of_runs_by_several_states_of_the_code_says_so(tmp_path, fake_train, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "draw_results", lambda *_: None)
    monkeypatch.setattr(sweep, "suite_page", lambda *_: "the page")
    jobs = [sweep.Job("a", seed, ()) for seed in (0, 1)]
    sweep.run_suite(jobs, tmp_path / "runs", 2)
    for words in ("", "the runs are of 2 states of the code (abc, def)"):
        if words:
            log = tmp_path / "runs/a/1/metrics.jsonl"
            log.write_text(log.read_text().replace('"abc"', '"def"'))
        sweep.write_results("model", jobs, tmp_path / "runs", tmp_path / "results")
        said = capsys.readouterr().out
        assert words in said and ("states of the code" in said) == bool(words)


def test_paired_difference_by_hand():
    """Differences 1, 2, 3: mean 2, standard error 1 / sqrt 3, t with two degrees of freedom 4.303."""
    mean, low, high = sweep.paired_difference({"0": 2.0, "1": 4.0, "2": 6.0, "9": 1.0}, {"2": 3.0, "1": 2.0, "0": 1.0})
    assert (mean, low, high) == pytest.approx((2, 2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5), abs=1e-9)
    with pytest.raises(ValueError, match="2 to 17 seeds"):
        sweep.paired_difference({"0": 1.0}, {"0": 2.0})
    assert [sweep.verdict(d) for d in ((1, 0.1, 2), (1, -0.1, 2), (-1, -2, -0.1))] == [
        "reproduced",
        "not reproduced",
        "the opposite",
    ]
    assert [sweep.verdict(d, denied=True) for d in ((1, 0.1, 2), (1, -0.1, 2), (-1, -2, -0.1))] == [
        "not reproduced",
        "reproduced",
        "reproduced",
    ]


def test_quantiles_of_student_t():
    mpmath = pytest.importorskip("mpmath")  # comes with math-verify's sympy
    for freedom, t in enumerate(sweep.T95, start=1):
        tail = mpmath.betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True)
        assert float(tail) == pytest.approx(0.05, abs=1e-4)


def test_best_rate_is_the_one_of_highest_mean(tmp_path):
    lines = [
        {
            "row": f"{method}@{rate}",
            "accuracy": 0.5 + 0.1 * (k == 2) + 0.3 * (k == 1) * (seed == 0) - 0.3 * (k == 1) * (seed == 1),
        }
        for method, rates in sweep.RATES.items()
        for k, rate in enumerate(rates)
        for seed in (0, 1)
    ]
    sweep.write_csv(tmp_path / "rates.csv", lines)
    assert sweep.best_rates(tmp_path / "rates.csv") == {method: rates[2] for method, rates in sweep.RATES.items()}
    tied = [{**line, "accuracy": 0.1 if "sft@3e-4" in line["row"] else 0.3 - 0.2 * (k % 2)} for k, line in enumerate(lines)]
    sweep.write_csv(tmp_path / "rates.csv", tied)  # every rate 0.3 and 0.1 but one
    assert sweep.best_rates(tmp_path / "rates.csv") == {method: rates[-1] for method, rates in sweep.RATES.items()}
    sweep.write_csv(tmp_path / "rates.csv", lines[:-2])
    with pytest.raises(ValueError, match="no run of .* at"):
        sweep.best_rates(tmp_path / "rates.csv")
    with pytest.raises(ValueError, match="run `python sweep.py rates` first"):
        sweep.best_rates(tmp_path / "none.csv")


def test_the_page_says_what_the_csv_says():
    """Two seeds; every row 0.1 under SGPO but one, which is above, and one whose difference changes its sign."""
    lines = []
    for row in (*sweep.METHODS, *sweep.ABLATIONS):
        for seed in ("0", "1"):
            accuracy = {"sgpo": 0.8, "reverse-kl": 0.9, "hpt": 0.7 if seed == "0" else 0.9}.get(row, 0.7) + int(seed) / 100
            line = {"row": row, "seed": seed, "base": "0.4", "accuracy": f"{accuracy}", "guided": "", "entropy_last10": "0.1"}
            line |= {"alpha_first10": f"0.5{seed}", "alpha_last10": "0.2", "steps": "60", "sampled_tokens": "1000"}
            lines.append(line | {"step_s": "70.0", "commit": "abc", "flags": f"--row {row}"})
    page = sweep.suite_page("table", lines, {method: "1e-4" for method in sweep.METHODS})
    assert "| luffy | -0.100 [-0.100, -0.100] | 0.705 ± 0.005 |" in page and "| base | | 0.400 |" in page
    assert "| SGPO beats LUFFY | +0.100 [+0.100, +0.100] | reproduced |" in page
    assert re.search(r"SGPO beats HPT \| \+0\.000 .*\| not reproduced", page)
    assert re.search(r"reverse KL .*\| the opposite", page)
    assert re.search(r"alpha starts high .*\| \+0\.305 .* reproduced", page)
    assert "routine" not in page  # without divergence.csv there is nothing to say
    tokens = [
        {"token": t, "count": c, "mean_d": d} for t, c, d in (("add", "3", "0.6"), ("min", "1", "0.2"), ("=", "9", "0.04"))
    ]
    for text, last in (("0.5000 nats", "0.04"), ("not reproduced (rule", "0.06")):
        tokens[2]["mean_d"] = last
        assert text in sweep.suite_page("table", lines, {method: "1e-4" for method in sweep.METHODS}, tokens)
    assert page.count("| not testable here |") == len(sweep.NOT_TESTABLE) and "--row luffy" in page
    rows = {line["row"] for line in lines}
    assert all(row in rows for claim in sweep.TABLE_CLAIMS for row, _ in (claim.more, claim.less))


def test_the_committed_pages_are_what_their_csv_files_say():
    folder = ROOT / "results/tiny"
    rates, tokens = sweep.best_rates(folder / "rates.csv"), sweep.read_csv(folder / "divergence.csv")
    for suite in ("table", "knobs", "hard"):
        lines = sweep.read_csv(folder / f"{suite}.csv")
        page = sweep.suite_page(suite, lines, rates, tokens)
        assert page == (folder / f"{suite}.md").read_text(encoding="utf-8"), suite
    verdicts = dict(re.findall(r"^\| ([^|]+) \| [+-][^|]+ \| ([a-z ]+) \|$", page, re.MULTILINE))
    assert len(verdicts) == len(sweep.HARD_CLAIMS) and verdicts["without the KL clip it is worse (7B: -3.4)"] == "reproduced"
    first, second = (sweep.column(lines, row, "accuracy") for row in ("sgpo", "no-kl-clip"))
    assert all(first[seed] > second[seed] for seed in first) and len(first) == 3
