"""Run the tables: many train.py runs over methods, ablations and seeds, several at a time, each one resumable.

    python tools/sweep.py rates --results results/tiny    the rate of each method; data/tiny/valid.jsonl, seeds 100, 101
    python tools/sweep.py table --results results/tiny    every method and ablation, 5 seeds, at the rates found above
    python tools/sweep.py knobs --results results/tiny    the effect of delta, alpha_0 and gamma, 3 seeds
    python tools/sweep.py hard --results results/tiny     the proximal constraints in data/hard, and strategies of low quality
    python tools/sweep.py model --results results/x --steps 12 --base "--model DIR --data rl.jsonl --eval_data test.jsonl ..."
                                                    the methods on a model and problems of yours, all from the same model

A row of a table is a list of train.py flags: to try an idea of yours, add a line below. Runs go to runs/<suite>/<row>/<seed>/,
one thread each. Finished runs are skipped, interrupted ones run again. The results are csv files, pictures, and a page with
means, paired differences against SGPO and verdicts on the claims of the paper.

Every method of METHODS but sft samples 60 * 16 * 12 = 11,520 responses: SGPO 12 a problem (8 alone, 4 guided), the others 8 a
problem in half as many steps again (LUFFY's solution counts as one of them). The ablations keep SGPO's steps and learning rate.
"""

import argparse
import csv
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the files of the method, from the folder above

from tools import report

HERE = Path(__file__).resolve().parent.parent
Lines = Sequence[dict[str, str]]  # of a csv
Interval = tuple[float, float, float]  # mean, low, high
EQUAL_SAMPLES = 60 * 12 // 8  # steps in which a method that samples 8 a problem draws as many as SGPO in 60
PLAIN_SFT = "--sft_warmup_ratio 0 --sft_validation 0"  # every row of the table is trained on, none is held out

METHODS = {
    "sgpo": "",
    "grpo": f"--method grpo --steps {EQUAL_SAMPLES}",
    "sft+grpo": f"--method grpo --steps {EQUAL_SAMPLES} --sft_fraction 0.3333 --sft_batch 16 --sft_epochs 1 {PLAIN_SFT}",
    "luffy": f"--method luffy --steps {EQUAL_SAMPLES}",
    "hpt": f"--method hpt --steps {EQUAL_SAMPLES}",
    "sft": f"--method sft --sft_batch 16 --sft_epochs 2.25 {PLAIN_SFT}",  # 1,440 solutions, as LUFFY reads in its 90 steps
}
ABLATIONS = {
    "no-distillation": "--distill none",
    "no-autonomous-grpo": "--no-autonomous",
    "no-proximal-constraints": "--delta inf --target all",
    "no-kl-clip": "--delta inf",
    "no-target-selection": "--target all",
    "fixed-weight": "--weight fixed",
    "group-advantage-weight": "--weight group_advantage",
    "reverse-kl": "--distill reverse_kl",
    "sft-on-target": "--distill sft",
    # of our own
    "random-target": "--target random",
    "guided-advantage-weight": "--weight guided_advantage",
    "shuffled-strategies": "--shuffle_strategies",
}
KNOBS = {
    "delta": ("0.1", "0.3", "0.7", "1.0", "2.0", "inf"),
    "alpha_0": ("0.05", "0.1", "0.25", "0.5", "1.0", "2.0"),
    "gamma": ("0.01", "0.03", "0.1", "0.3", "1.0"),
}
# train.py presets these flags for the tiny world only
HARD = (
    "--model data/hard/base --eval_data data/hard/test.jsonl --eval_guided --problems_per_step 16 --steps 60 --sft_fraction 0 "
    "--max_new_tokens 32 --eval_max_new_tokens 32 --max_rows 1024 --lr_warmup_steps 5 --lr_decay linear --weight_decay 0"
)
HARD_FLAGS = METHODS | ABLATIONS | {"random-target-no-kl-clip": "--target random --delta inf"}
HARD_ROWS = ("sgpo", "grpo", "random-target", "no-kl-clip", "no-target-selection", "random-target-no-kl-clip")
HARD_ROWS += ("no-proximal-constraints",)
LOW_QUALITY_ROWS = ("sgpo", "fixed-weight", "random-target-no-kl-clip", "no-proximal-constraints")
MODEL_ROWS = ("sgpo", "grpo", "luffy", "hpt")  # the model of --base has had its warm-up: grpo is the paper's SFT+GRPO
DEFAULTS = {"delta": "1.0", "alpha_0": "0.5", "gamma": "0.1"}  # the paper's
CURVES = {  # pictures of training curves: folder -> rows, at most as many as there are colours; sft takes no RL steps
    "methods": ("sgpo", "grpo", "sft+grpo", "luffy", "hpt"),
    "ablations": ("sgpo", "no-distillation", "no-autonomous-grpo", "no-proximal-constraints", "reverse-kl", "sft-on-target"),
    "proximal": ("sgpo", "no-kl-clip", "no-target-selection", "no-proximal-constraints", "random-target"),
}
RATES = {"sft": ("3e-5", "1e-4", "3e-4", "1e-3")}
RATES |= {name: ("5e-5", "1e-4", "2e-4", "4e-4") for name in METHODS if name != "sft"}


# ---------------------------------------------------------------------------------------------------- suites


@dataclass(frozen=True)
class Job:
    """One train.py run: its row in the table, its seed, and its flags without --out."""

    row: str
    seed: int
    flags: tuple[str, ...]
    also_eval: str = ""  # a second file of held-out problems for the trained model; the csv gets a column "accuracy_also"

    def folder(self, runs: Path) -> Path:
        return runs / self.row / str(self.seed)


def rate_flag(method: str, rate: str) -> str:
    return f"--sft_learning_rate {rate}" if method == "sft" else f"--learning_rate {rate}"


def rates_rows(args: argparse.Namespace) -> dict[str, str]:
    """Every method at every rate, evaluated on the validation problems."""
    valid, rows = "--eval_data data/tiny/valid.jsonl --eval_every 0 --no-eval_guided", {}
    for method, rates in RATES.items():
        for rate in rates:
            rows[f"{method}@{rate}"] = f"{METHODS[method]} {rate_flag(method, rate)} {valid}"
    return rows


def table_rows(args: argparse.Namespace) -> dict[str, str]:
    """Every method at its best rate and every ablation at SGPO's."""
    best = best_rates(args.results / "rates.csv")
    rows = {name: f"{flags} {rate_flag(name, best[name])}" for name, flags in METHODS.items()}
    return rows | {name: f"{flags} {rate_flag('sgpo', best['sgpo'])}" for name, flags in ABLATIONS.items()}


def knobs_rows(args: argparse.Namespace) -> dict[str, str]:
    """SGPO at its rate with every value of delta, alpha_0 and gamma, the others at the paper's."""
    rate = rate_flag("sgpo", best_rates(args.results / "rates.csv")["sgpo"])
    return {f"{name}={value}": f"--{name} {value} {rate}" for name, values in KNOBS.items() for value in values}


def hard_rows(args: argparse.Namespace) -> dict[str, str]:
    """The hard world with good strategies, then with 6 % and 30 % of low quality."""
    best, rows = best_rates(args.results / "rates.csv"), {}
    for suffix, data in (("", "train"), ("@low06", "train-low06"), ("@low30", "train-low30")):
        for name in LOW_QUALITY_ROWS if suffix else HARD_ROWS:
            rate = rate_flag(name, best["grpo" if name == "grpo" else "sgpo"])
            rows[name + suffix] = f"{HARD} --data data/hard/{data}.jsonl {HARD_FLAGS[name]} {rate}"
    return rows


def model_rows(args: argparse.Namespace) -> dict[str, str]:
    """Every sampling method from the model of --base, with equal numbers of sampled responses; sft reads each solution once."""
    base = args.base.split()
    if "--model" not in base or args.steps < 2 or args.steps % 2:
        raise ValueError("model needs --base with a --model among its flags, and --steps: an even number of SGPO's steps")
    if "--data" in base and "--eval_data" not in base:
        raise ValueError("--base: --data without --eval_data, so no run would have an accuracy to compare")
    if fixed := {"--group_auto", "--group_guided", "--steps", "--method", "--sft_fraction"} & set(base):
        raise ValueError(f"--base: {', '.join(sorted(fixed))} would make the numbers of sampled responses unequal")
    rows = {"sft": f"{args.base} --method sft --sft_epochs 1 {PLAIN_SFT}"}
    for name in MODEL_ROWS:
        steps = args.steps if name == "sgpo" else args.steps * 12 // 8
        rows[name] = f"{args.base} --method {name} --steps {steps} --sft_fraction 0"
    return rows


SUITES = {  # name -> (what makes its rows {name: train.py flags} from the command line's arguments, default number of seeds)
    "rates": (rates_rows, 2),
    "table": (table_rows, 5),
    "knobs": (knobs_rows, 3),
    "hard": (hard_rows, 3),
    "model": (model_rows, 3),
}


def make_jobs(args: argparse.Namespace) -> list[Job]:
    """All runs of a suite, seed by seed. `rates` has seeds that no table uses; `hard` evaluates families held out whole too."""
    rows, first = SUITES[args.suite][0](args), 100 if args.suite == "rates" else 0
    also = "data/hard/mixes.jsonl" if args.suite == "hard" else ""
    seeds = range(first, first + args.seeds)
    return [Job(row, seed, tuple(flags.split()), also) for seed in seeds for row, flags in rows.items()]


def best_rates(path: Path) -> dict[str, str]:
    """The rate of highest mean accuracy for each method, the larger of two equal ones. ValueError if a rate has no run."""
    if not path.exists():
        raise ValueError(f"{path}: not there; run `python tools/sweep.py rates` first")
    runs, best = read_csv(path), {}
    for method, rates in RATES.items():
        scores = {rate: column(runs, f"{method}@{rate}", "accuracy").values() for rate in rates}
        if missing := [rate for rate in rates if not scores[rate]]:
            raise ValueError(f"{path}: no run of {method} at {', '.join(missing)}; run `python tools/sweep.py rates`")
        means = {rate: round(statistics.fmean(scores[rate]), 6) for rate in rates}
        best[method] = max(rates, key=lambda rate: (means[rate], float(rate)))
    return best


# ---------------------------------------------------------------------------------------------------- running


def is_done(folder: Path, job: Job) -> bool:
    """Whether this very job has finished there. ValueError if the folder holds a finished run with other flags."""
    if not (folder / "done.json").exists():
        return False
    flags = json.loads((folder / "done.json").read_text(encoding="utf-8"))["flags"]
    if flags != list(job.flags):
        raise ValueError(f"{folder}: holds a run with other flags ({' '.join(flags)}); remove it or name another --runs")
    return True


def run_job(job: Job, folder: Path) -> str | None:
    """Run train.py into a fresh folder: None, or what went wrong. A run is complete when it has its done.json, written last."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()  # the commands run in the repository's root, where the data's paths begin
    own = ["--seed", str(job.seed), "--out", str(folder), "--checkpoint_minutes", "inf"]  # a run that was cut off starts anew
    commands = [["train.py", *job.flags, *own]]
    if job.also_eval:
        settings = ["--n", "4", "--max_new_tokens", "32", "--max_rows", "1024", "--out", str(folder / "also.json")]
        commands.append(["eval.py", "--model", str(folder / "model"), "--data", job.also_eval, *settings])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # two runs of two threads each fight over two cores
    for command in commands:
        done = subprocess.run([sys.executable, *command], cwd=HERE, env=environment, capture_output=True, text=True)
        if done.returncode:
            return f"{job.row}, seed {job.seed}: exit {done.returncode}\n" + "\n".join(done.stderr.splitlines()[-5:])
    shutil.rmtree(folder / "model")  # 3 MB a run; the table needs only the log
    (folder / "done.json").write_text(json.dumps({"flags": job.flags}) + "\n", encoding="utf-8")
    return None


def run_suite(jobs: Sequence[Job], runs: Path, parallel: int) -> None:
    """Run what is not done yet, `parallel` at a time. SystemExit that names the failed runs, after all others have ended."""
    todo = [job for job in jobs if not is_done(job.folder(runs), job)]
    failures = []
    with ThreadPoolExecutor(parallel) as pool, tqdm(total=len(jobs), initial=len(jobs) - len(todo), unit="run") as bar:
        futures = [pool.submit(run_job, job, job.folder(runs)) for job in todo]
        try:
            for future in as_completed(futures):
                failures += [future.result()] if future.result() else []
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # ctrl-c also reaches the runs that are going
            raise
    if failures:
        sys.exit(f"{len(failures)} of {len(jobs)} runs failed; the same command runs them again\n\n" + "\n\n".join(failures))


# ---------------------------------------------------------------------------------------------------- from logs to csv


def read_log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def summarise_run(job: Job, folder: Path) -> dict[str, Any]:
    """One csv line: what a finished run reached and what it cost. Accuracies are held-out, avg@n at temperature 0.6."""
    head, *records = read_log(folder)
    steps = [r for r in records if "step_s" in r]
    evals = [r for r in records if r["stage"] == "eval"]
    alone = [r["accuracy"] for r in evals if not r["guided"]]
    guided = [r["accuracy"] for r in evals if r["guided"]]
    last = steps[-10:]
    also = {}
    if job.also_eval:
        files = json.loads((folder / "also.json").read_text(encoding="utf-8"))["files"]
        also = {"accuracy_also": round(files[job.also_eval]["accuracy"], 6)}
    return {
        "row": job.row,
        "seed": job.seed,
        "base": round(alone[0], 6),
        "accuracy": round(alone[-1], 6),
        **also,
        "guided": round(guided[-1], 6) if guided else "",
        "reward_last10": mean_of(last, "reward_auto"),
        "entropy_last10": mean_of(last, "entropy"),
        "length_last10": mean_of(last, "length_auto"),
        "alpha_first10": mean_of(steps[:10], "alpha"),
        "alpha_last10": mean_of(last, "alpha"),
        "kept": mean_of(steps, "kept"),
        "reach_gap": mean_of(steps, "reach_gap"),
        "steps": len(steps),
        "sampled_tokens": int(sum(r["sampled_tokens"] for r in steps)),
        "step_s": round(sum(r["step_s"] for r in steps), 1),
        "commit": head["commit"],
        "flags": " ".join(job.flags),
    }


# a metric that is logged as 0 if there is nothing to measure -> the metric that says whether there is
MEASURED_WHERE = dict.fromkeys(("kl", "kept", "reach_gap"), "target_tokens")
MEASURED_WHERE |= dict.fromkeys(("alpha", "reward_guided", "with_target"), "length_guided")


def mean_of(records: Sequence[dict[str, Any]], name: str) -> float | str:
    """The mean of a metric over the records that measured it, six digits; empty if none did (GRPO has no alpha)."""
    values = [r[name] for r in records if r[MEASURED_WHERE.get(name, name)] or name not in MEASURED_WHERE]
    return round(statistics.fmean(values), 6) if values else ""


def step_lines(jobs: Sequence[Job], runs: Path) -> list[dict[str, Any]]:
    """One csv line for each row and step: the mean over seeds of what the pictures show."""
    names = ("reward_auto", "reward_guided", "alpha", "kl", "kept", "entropy", "length_auto", "with_target", "reach_gap")
    lines = []
    for row in dict.fromkeys(job.row for job in jobs):
        folders = [job.folder(runs) for job in jobs if job.row == row]
        logs = [[r for r in read_log(folder) if "step_s" in r] for folder in folders]
        for records in zip(*logs, strict=True):
            means = {name: mean_of(records, name) for name in names}
            lines.append({"row": row, "step": records[0]["step"], "seeds": len(records)} | means)
    return lines


def write_csv(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------------------------------------- from csv to the page

# two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom: the spread of a few seeds is itself uncertain
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120)


def seed_interval(first: dict[str, float], second: dict[str, float]) -> Interval:
    """first - second over the seeds that both have: (mean, low, high) of its 95 % confidence interval (Student's t).

    Paired, because a seed fixes the data order and the evaluation's draws for both. ValueError with fewer than two seeds in
    common, or with more than T95 has quantiles for.
    """
    seeds = sorted(first.keys() & second.keys())
    if not 2 <= len(seeds) <= len(T95) + 1:
        raise ValueError(f"a paired interval needs 2 to {len(T95) + 1} seeds in common, got {len(seeds)}")
    mean, stderr = report.mean_and_stderr([first[seed] - second[seed] for seed in seeds])
    half = T95[len(seeds) - 2] * stderr
    return mean, mean - half, mean + half


# The paper's claims, by suite. Each says that one figure is above another: "more" and "less", a row and a column of the csv.
# A "denied" one says that it is not.
CLAIMS = json.loads(Path(__file__).with_name("claims.json").read_text(encoding="utf-8"))
OPERATIONS = ("add", "sub", "double", "inc", "max", "min")  # the tiny world's tokens that carry the strategy


def column(lines: Lines, row: str, name: str) -> dict[str, float]:
    """{seed: value} of one row and column of a csv; empty cells are left out."""
    return {line["seed"]: float(line[name]) for line in lines if line["row"] == row and line[name]}


def verdict(difference: Interval, denied: bool = False) -> str:
    """What the 95 % interval of more - less says of the claim. A denied difference is one that the interval must not show."""
    _, low, high = difference
    if denied:
        return "not reproduced" if low > 0 else "reproduced"
    return "reproduced" if low > 0 else "the opposite" if high < 0 else "not reproduced"


def with_error(lines: Lines, row: str, name: str, digits: int = 3) -> str:
    values = list(column(lines, row, name).values())
    if not values:
        return ""
    mean, stderr = report.mean_and_stderr(values)
    return f"{mean:,.{digits}f}" + ("" if math.isnan(stderr) else f" ± {stderr:,.{digits}f}")


TITLES = {
    "table": "Methods and ablations on the tiny world",
    "knobs": "The effect of delta, alpha_0 and gamma on the tiny world",
    "hard": "Several right ways, mixes never trained on, strategies of low quality: the hard world",
    "model": "The methods on a model of your own",
}
HOW_TO_READ = (
    "Accuracy: held-out problems, 4 responses each (or --eval_n) at temperature 0.6; ± is the standard error over seeds. "
    "Differences are in accuracy, against SGPO on the same data at the paper's settings, paired by seed, with their 95 % "
    "interval (Student's t, not corrected for the number of rows). Kept: share of the target's tokens that the KL clip leaves "
    "in. Reach gap: nats by which the target is more probable under the unguided policy than the correct guided trajectories "
    "are on average. Seconds: the training steps of a run, on one thread."
)


def reference_of(row: str) -> str:
    """The row that a row is compared with: SGPO on the same data, with a knob at the paper's value."""
    knob, is_knob, _ = row.partition("=")
    return f"{knob}={DEFAULTS[knob]}" if is_knob else "sgpo" + "".join(row.partition("@")[1:])


def shared_flags(lines: Lines) -> str:
    """The flags that every run of a csv begins with: said once above its table."""
    shared = os.path.commonprefix([line["flags"].split() for line in lines])  # of lists, so word by word
    if shared and shared[-1].startswith("--"):  # a flag whose values differ from row to row
        shared.pop()
    return " ".join(shared)


def rows_table(lines: Lines) -> list[str]:
    """One line of markdown for each row: mean and standard error over seeds, the paired difference, and the cost."""
    shared = shared_flags(lines)
    names = {"accuracy": "accuracy", "accuracy_also": "on mixes", "guided": "guided", "kept": "kept"}
    names |= {"reach_gap": "reach gap", "entropy_last10": "entropy, last 10 steps"}
    names = {name: title for name, title in names.items() if name in lines[0]}
    costs = {"sampled_tokens": "sampled tokens", "step_s": "seconds"}
    titles = ["row", "minus the reference", *names.values(), "steps", *costs.values(), "flags"]
    page = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    base = statistics.fmean(float(line["base"]) for line in lines)
    page.append(f"| base | | {base:.3f} |" + " |" * (len(titles) - 3))
    for row in dict.fromkeys(line["row"] for line in lines):
        reference = reference_of(row)
        difference = "(reference)"
        if row != reference:
            interval = seed_interval(column(lines, row, "accuracy"), column(lines, reference, "accuracy"))
            difference = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*interval)
        cells = [with_error(lines, row, name) for name in names] + [with_error(lines, row, "steps", 0).split(" ")[0]]
        cells += [with_error(lines, row, name, 0) for name in costs]
        flags = next(line["flags"] for line in lines if line["row"] == row).removeprefix(shared).strip()
        page.append(f"| {row} | {difference} | {' | '.join(cells)} | `{flags}` |")
    return page


def suite_page(suite: str, results: Path) -> str:
    """The page of a suite, from the csv files in `results` alone: what was run, the table, the claims with their verdicts."""
    lines = read_csv(results / f"{suite}.csv")
    seeds = sorted({line["seed"] for line in lines}, key=int)
    runs = len({(line["flags"], line["seed"]) for line in lines})  # an older knobs.csv shows one run as three
    page = [
        f"# {TITLES[suite]}",
        "",
        f"Written by `python tools/sweep.py {suite}` from {suite}.csv: {runs} runs, seeds {', '.join(seeds)}, code at "
        f"{', '.join(sorted({line['commit'] for line in lines}))}. {HOW_TO_READ}",
        "",
        *rows_table(lines),
    ]
    if shared := shared_flags(lines):
        page += ["", f"All rows: `{shared}`."]
    if suite == "hard":
        page[-1] += " low06, low30: 6 % and 30 % of the training strategies are of low quality."
    if suite != "model":  # which was given its rate
        rates = best_rates(results / "rates.csv")
        tried = "; ".join(f"{name} {', '.join(values)} (taken: {rates[name]})" for name, values in RATES.items())
        page += ["", f"Learning rates tried, by accuracy on 240 validation problems over two other seeds (rates.csv): {tried}."]
    if suite in CLAIMS:
        page += claims_section(lines, CLAIMS[suite])
    if suite == "table":
        page += token_claim(results / "divergence.csv")
        page += [f"| {text} | | not testable here |" for text in CLAIMS["not_testable"]]
    return "\n".join([*page, ""])


def claims_section(lines: Lines, claims: Sequence[dict[str, Any]]) -> list[str]:
    page = [
        "",
        "## The paper's claims",
        "",
        "A claim says that one figure is above another. Reproduced: the 95 % interval of the paired difference lies above "
        "zero. Not reproduced: it holds zero. The opposite: it lies below. A claim that there is no gain is reproduced unless "
        "the interval lies above zero.",
        "",
        "| claim | difference here | verdict |",
        "|---|---|---|",
    ]
    for claim in claims:
        difference = seed_interval(column(lines, *claim["more"]), column(lines, *claim["less"]))
        figures = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*difference)
        page.append(f"| {claim['text']} | {figures} | {verdict(difference, claim.get('denied', False))} |")
    return page


def token_claim(path: Path) -> list[str]:
    """The claim about single tokens, from what `report.py divergence` wrote; nothing if it was not run."""
    if not path.exists():
        return []
    counts, sums = Counter(), Counter()
    for token in read_csv(path):
        kind = token["token"] in OPERATIONS
        counts[kind] += int(token["count"])
        sums[kind] += int(token["count"]) * float(token["mean_d"])
    high, low = sums[True] / counts[True], sums[False] / counts[False]
    return [
        f"| d_t is large on the tokens that carry the strategy and near zero on routine ones | mean {high:.4f} nats on the "
        f"six operations, {low:.5f} on all other tokens (base model, divergence.csv) | "
        f"{'reproduced' if high > 10 * low else 'not reproduced'} (rule: tenfold) |"
    ]


# ---------------------------------------------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("suite", choices=tuple(SUITES))
    parser.add_argument("--results", type=Path, required=True, help="folder for the csv files and the page, e.g. results/tiny")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs themselves")
    parser.add_argument("--seeds", type=int, default=0, help="seeds for each row; 0: the suite's own number")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs side by side")
    parser.add_argument("--base", default="", help="model: train.py flags of every run, --model among them")
    parser.add_argument("--steps", type=int, default=0, help="model: SGPO's steps; the others take half as many again")
    args = parser.parse_args(argv)
    args.seeds = args.seeds or SUITES[args.suite][1]
    if args.suite != "model" and (args.base or args.steps):
        parser.error(f"--base and --steps are for the suite model, {args.suite} has its own")
    if args.suite != "rates" and not 2 <= args.seeds <= len(T95) + 1:
        parser.error(f"--seeds {args.seeds}: the page's intervals need 2 to {len(T95) + 1} seeds")
    try:
        jobs = make_jobs(args)
        run_suite(jobs, args.runs / args.suite, args.jobs)
    except ValueError as error:
        sys.exit(f"error: {error}")
    write_results(args.suite, jobs, args.runs / args.suite, args.results)


def write_results(suite: str, jobs: Sequence[Job], runs: Path, results: Path) -> None:
    """<suite>.csv, <suite>_steps.csv, the page, and last the pictures, which need matplotlib (requirements-dev.txt)."""
    results.mkdir(parents=True, exist_ok=True)
    lines = [summarise_run(job, job.folder(runs)) for job in jobs]
    write_csv(results / f"{suite}.csv", lines)
    if suite == "rates":
        return print(best_rates(results / "rates.csv"))
    write_csv(results / f"{suite}_steps.csv", step_lines(jobs, runs))
    (results / f"{suite}.md").write_text(suite_page(suite, results), encoding="utf-8")
    report.main(["rows", str(results / f"{suite}.csv"), "--out", str(results / suite)])
    if suite == "table":
        for name, rows in CURVES.items():
            folders = [str(runs / row) for row in rows]
            report.main(["curves", *folders, "--out", str(results / name / "overview")])


if __name__ == "__main__":
    main()
