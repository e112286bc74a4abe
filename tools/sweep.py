"""Run the tables: many train.py runs over methods, ablations and seeds, several at a time.

    python tools/sweep.py rates --results results/tiny    the learning rate of each method, on other problems and seeds
    python tools/sweep.py table --results results/tiny    every method and ablation, 5 seeds, at the rates found above
    python tools/sweep.py rates --world hard --results results/hard     the same in data/hard, and strategies of low quality
    python tools/sweep.py table --world hard --results results/hard
    python tools/sweep.py model --results results/x --steps 12 --base "--model DIR --data rl.jsonl --eval_data test.jsonl ..."
                                                    the methods on a model and problems of yours, all from the same model

A row of a table is a list of train.py flags: to try an idea of yours, add a line below. A run has one thread, and a new folder
in runs/tiny/table/sgpo and so on. Every finished run is written to the csv files in --results at once, and a run that is there,
with the same flags and the same code, is not run again. After the last one come the pictures, and a page with means, paired
differences against SGPO and verdicts on the claims of the paper.

All rows begin with the same SFT warm-up on a third of the problems (WARM_UP); the same seed gives the same weights after it.
Rows called ...@cold have none. SGPO samples 12 responses a problem (8 alone, 4 guided) in 30 steps, and so do the others. Rows
called ...@8x45 sample 8 a problem in 45 steps, as many in all; ...@8x30 in 30 steps, which is what alpha = 0 leaves of SGPO.
"""

import argparse
import csv
import hashlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the files of the method, from the folder above

from tools import report
from tools.report import read_csv

HERE = Path(__file__).resolve().parent.parent
Lines = Sequence[dict[str, str]]  # of a csv
Interval = tuple[float, float, float]  # mean, low, high

# ways to spend samples: the end of a row's name -> (responses to a problem, steps). The first is SGPO's: 8 alone and 4 guided
BUDGETS = {"": (12, 30), "@8x45": (8, 45), "@8x30": (8, 30)}
METHODS = {
    "sgpo": "",
    "grpo": "--method grpo",
    "luffy": "--method luffy",
    "hpt": "--method hpt",
    "hinted": "--method hinted",
    "sft": "--method sft",
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
    "token-mean": "--aggregate token",
}
BUDGET_ROWS = ("grpo", "luffy", "hpt")
COLD_ROWS = ("sgpo", "grpo", "luffy", "hpt", "hinted")
LOW_QUALITY_ROWS = ("sgpo", "fixed-weight", "no-proximal-constraints")
MODEL_ROWS = ("sgpo", "grpo", "luffy", "hpt")  # the model of --base has had its warm-up: grpo is the paper's SFT+GRPO
# The warm-up of [app E], but for its batch and rate. At more than this rate the toy models forget how to read a strategy.
WARM_UP = "--sft_batch 16 --sft_learning_rate 3e-5"
WORLDS = {  # name -> what train.py presets for the tiny world only
    # with 16 problems a step, which is the default there, the same flags end at 0.87 with one seed and at 0.98 with another
    "tiny": "--problems_per_step 32 --eval_every 0",
    "hard": "--model data/hard/base --data data/hard/train.jsonl --eval_data data/hard/test.jsonl --eval_guided "
    "--problems_per_step 32 --eval_every 0 --max_new_tokens 32 --eval_max_new_tokens 32 --max_rows 1024 --lr_warmup_steps 5 "
    "--lr_decay linear --weight_decay 0 ",
}
SEEDS = {"tiny": 5, "hard": 3}
CURVES = {  # pictures of training curves: name -> rows, at most as many as there are colours
    "methods": ("sgpo", "grpo", "luffy", "hpt", "hinted"),
    "ablations": ("sgpo", "no-distillation", "no-autonomous-grpo", "fixed-weight", "reverse-kl", "sft-on-target"),
    "proximal": ("sgpo", "no-kl-clip", "no-target-selection", "no-proximal-constraints", "random-target"),
}
RATES = {"sft": ("3e-5", "1e-4", "3e-4", "1e-3")}
RATES |= {name: ("1e-4", "2e-4", "4e-4", "8e-4") for name in METHODS if name != "sft"}


# ---------------------------------------------------------------------------------------------------- suites


@dataclass(frozen=True)
class Job:
    """One train.py run: its row in the table, its seed, and its flags without --out."""

    row: str
    seed: int
    flags: tuple[str, ...]
    also_eval: str = ""  # a second file of held-out problems for the trained model; the csv gets a column "accuracy_also"


def flags_of(world: str, method: str, rate: str, *more: str, warm: bool = True, budget: str = "") -> str:
    """The flags of a row: world, method with its budget [BUDGETS], warm-up, rate, and what else differs."""
    group, steps = BUDGETS[budget]
    if method == "sft":
        words = [METHODS[method], "--sft_batch 16", f"--sft_learning_rate {rate}", *more]
    else:
        words = [METHODS[method], f"--steps {steps}", f"--sft_fraction {1 / 3 if warm else 0:.4g}", *[WARM_UP] * warm]
        words += [f"--group_auto {group}"] if method in ("grpo", "luffy", "hpt") else []  # luffy: one of them is the solution
        words += [f"--learning_rate {rate}", *more]
    return " ".join(WORLDS[world].split() + [word for word in words if word])


def rates_rows(args: argparse.Namespace) -> dict[str, str]:
    """Every method at every rate, after the warm-up, evaluated on the validation problems."""
    valid = f"--eval_data data/{args.world}/valid.jsonl --no-eval_guided"
    return {f"{name}@{r}": flags_of(args.world, name, r, valid) for name, rates in RATES.items() for r in rates}


def table_rows(args: argparse.Namespace) -> dict[str, str]:
    """Every method at its best rate, every ablation at SGPO's; other budgets; no warm-up; and strategies of low quality."""
    best, world = best_rates(args.results / "rates.csv"), args.world
    rows = {}
    for suffix in BUDGETS:
        names = BUDGET_ROWS if suffix else METHODS
        rows |= {name + suffix: flags_of(world, name, best[name], budget=suffix) for name in names}
    rows |= {name: flags_of(world, "sgpo", best["sgpo"], flags) for name, flags in ABLATIONS.items()}
    rows |= {f"{name}@cold": flags_of(world, name, best[name], warm=False) for name in COLD_ROWS}
    if world == "hard":
        for suffix in ("low06", "low30"):
            data = f"--data data/hard/train-{suffix}.jsonl"
            for name in LOW_QUALITY_ROWS:
                rows[f"{name}@{suffix}"] = flags_of(world, "sgpo", best["sgpo"], ABLATIONS.get(name, ""), data)
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
    rows = {"sft": f"{args.base} --method sft --sft_epochs 1 --sft_warmup_ratio 0 --sft_validation 0"}
    for name in MODEL_ROWS:
        steps = args.steps if name == "sgpo" else args.steps * 12 // 8
        rows[name] = f"{args.base} --method {name} --steps {steps} --sft_fraction 0"
    return rows


SUITES = {"rates": rates_rows, "table": table_rows, "model": model_rows}  # -> {name: train.py flags}


def make_jobs(args: argparse.Namespace) -> list[Job]:
    """All runs of a suite, seed by seed. `rates` has seeds that no table uses; data/hard also has families held out whole."""
    rows, first = SUITES[args.suite](args), 100 if args.suite == "rates" else 0
    also = "data/hard/mixes.jsonl" if (args.suite, args.world) == ("table", "hard") else ""
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


def code_digest(world: str) -> str:
    """SHA-256, the first digits, of all files that a run in a toy world reads. What changes elsewhere changes no run."""
    files = [path for path in HERE.glob("*.py") if not path.name.startswith("test_")]
    files += [HERE / "data/problems.py", *(HERE / "data" / world).rglob("*")]
    digest = hashlib.sha256()
    for path in sorted(path for path in files if path.is_file()):
        digest.update(f"{path.relative_to(HERE)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:12]


def run_job(job: Job, runs: Path) -> tuple[Path, float]:
    """Run train.py, and eval.py: (the run's folder, a new one; the seconds that it took). RuntimeError says what went wrong."""
    start, rows = time.monotonic(), (runs / job.row).resolve()  # the commands run in the repository's root
    rows.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{job.seed}-", dir=rows))  # a sweep that was cut off may have left a run going
    own = ["--seed", str(job.seed), "--out", str(folder), "--checkpoint_minutes", "inf"]  # a run that was cut off starts anew
    commands = [["train.py", *job.flags, *own]]
    if job.also_eval:
        settings = ["--n", "4", "--max_new_tokens", "32", "--max_rows", "1024", "--out", str(folder / "also.json")]
        commands.append(["eval.py", "--model", str(folder / "model"), "--data", job.also_eval, *settings])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # two runs of two threads each fight over two cores
    for command in commands:
        done = subprocess.run([sys.executable, *command], cwd=HERE, env=environment, capture_output=True, text=True)
        if done.returncode:
            last = "\n".join(done.stderr.splitlines()[-5:])
            raise RuntimeError(f"exit {done.returncode}\n{last}")
    shutil.rmtree(folder / "model")  # 3 MB a run; the table needs only the log
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # there is none without SFT
    return folder, time.monotonic() - start


def run_suite(args: argparse.Namespace, jobs: Sequence[Job]) -> None:
    """Run what is not in <suite>.csv and <suite>_steps.csv yet, args.jobs at a time, and add each run as it ends. SystemExit
    that names the failed runs, after all others have ended."""
    args.results.mkdir(parents=True, exist_ok=True)
    table, curves = (args.results / f"{args.suite}{end}.csv" for end in ("", "_steps"))
    runs, code, failures = args.runs / args.results.name / args.suite, code_digest(args.world), []
    done = finished(jobs, table, curves, code)
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(jobs), initial=len(done), unit="run", disable=None) as bar:
        futures = {pool.submit(run_job, job, runs): job for job in jobs if job not in done}
        try:
            for future in as_completed(futures):
                job = futures[future]
                bar.update()
                if error := future.exception():
                    failures.append(f"{job.row}, seed {job.seed}: {error}")
                    continue
                folder, seconds = future.result()
                log = read_log(folder)
                line = summarise_run(job, folder, log) | {"run_s": round(seconds), "code": code}
                done[job] = line, step_lines(job, log)
                write_csv(curves, [line for job in jobs if job in done for line in done[job][1]])
                write_csv(table, [done[job][0] for job in jobs if job in done])
        except BaseException:
            pool.shutdown(cancel_futures=True)  # ctrl-c also reaches the runs that are going
            raise
    if failures:
        sys.exit(f"{len(failures)} of {len(jobs)} runs failed; the same command runs them again\n\n" + "\n\n".join(failures))


def finished(jobs: Sequence[Job], table: Path, curves: Path, code: str) -> dict[Job, tuple[dict, list[dict]]]:
    """{job: (its line, its steps' lines)} of the jobs that are in both csv files, with the same flags and of the same code."""
    if not table.exists() or not curves.exists():
        return {}
    lines, steps_of, done = read_csv(table), defaultdict(list), {}
    for line in read_csv(curves):
        steps_of[line["row"], line.get("seed")].append(line)
    same = {(line["row"], line["seed"], line["flags"]): line for line in lines if line.get("code") == code}
    for job in jobs:
        line, steps = same.get((job.row, str(job.seed), " ".join(job.flags))), steps_of[job.row, str(job.seed)]
        if line and steps:
            done[job] = line, steps
    if len(done) < len(lines):
        print(f"{table}: {len(lines) - len(done)} runs of other rows, flags or code will be replaced")
    return done


# ---------------------------------------------------------------------------------------------------- from logs to csv


def read_log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def summarise_run(job: Job, folder: Path, log: list[dict[str, Any]]) -> dict[str, Any]:
    """One csv line: what a finished run reached and what it cost. Accuracies are held-out, avg@n at temperature 0.6."""
    head, *records = log
    steps = [r for r in records if "step_s" in r]
    alone = [r for r in records if r["stage"] == "eval" and not r["guided"]]
    guided = [r["accuracy"] for r in records if r["stage"] == "eval" and r["guided"]]
    line = {"row": job.row, "seed": job.seed, "base": round(alone[0]["accuracy"], 6)}
    line["start"] = round([r["accuracy"] for r in alone if r["step"] == 0][-1], 6)  # after the warm-up
    line["accuracy"] = round(alone[-1]["accuracy"], 6)
    if job.also_eval:
        files = json.loads((folder / "also.json").read_text(encoding="utf-8"))["files"]
        line["accuracy_also"] = round(files[job.also_eval]["accuracy"], 6)
    line["guided"] = round(guided[-1], 6) if guided else ""
    for name, metric in ENDS.items():
        line |= {f"{name}_first10": mean_of(steps[:10], metric), f"{name}_last10": mean_of(steps[-10:], metric)}
    blocks = [mean_of(steps[i : i + 10], "reward_auto") for i in range(len(steps) - 9)]
    line["reward_peak"] = max(blocks) if blocks else ""
    return line | {
        "kept": mean_of(steps, "kept"),
        "reach_gap": mean_of(steps, "reach_gap"),
        "steps": len(steps),
        "sampled_tokens": int(sum(r["sampled_tokens"] for r in steps)),
        "step_s": round(sum(r["step_s"] for r in steps), 1),
        "commit": head["commit"],
        "flags": " ".join(job.flags),
    }


ENDS = {"reward": "reward_auto", "entropy": "entropy", "length": "length_auto", "alpha": "alpha"}
# a metric that is logged as 0 if there is nothing to measure -> the metric that says whether there is
MEASURED_WHERE = dict.fromkeys(("kl", "kept", "reach_gap"), "target_tokens")
MEASURED_WHERE |= dict.fromkeys(("alpha", "reward_guided"), "length_guided")


def mean_of(records: Sequence[dict[str, Any]], name: str) -> float | str:
    """The mean of a metric over the records that measured it, six digits; empty if none did (GRPO has no alpha)."""
    values = [r[name] for r in records if r[name] is not None and (name not in MEASURED_WHERE or r[MEASURED_WHERE[name]])]
    return round(statistics.fmean(values), 6) if values else ""


def step_lines(job: Job, log: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the curves need: a csv line for each step, and one for step 0, with the accuracy alone after those evaluated."""
    accuracy = {r["step"]: r["accuracy"] for r in log[1:] if r["stage"] == "eval" and not r["guided"]}
    steps = {r["step"]: r for r in log[1:] if "step_s" in r}
    lines = []
    for step in sorted(steps.keys() | accuracy.keys()):
        line = {"row": job.row, "seed": job.seed, "step": step, "accuracy": accuracy.get(step, "")}
        for name in ("reward_auto", "reward_guided", "alpha", "kl", "kept", "entropy", "length_auto", "length_guided"):
            value = mean_of([steps[step]], name) if step in steps else ""
            line[name] = f"{value:.4g}" if value != "" else ""
        lines.append(line)
    return lines


def write_csv(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    part.replace(path)  # so that a sweep that is cut off leaves a whole file


# ---------------------------------------------------------------------------------------------------- from csv to the page

# two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom: the spread of a few seeds is itself uncertain
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120)


def seed_interval(first: dict[str, float], second: dict[str, float]) -> Interval:
    """first - second over the seeds that both have: (mean, low, high) of its 95 % confidence interval (Student's t). Paired,
    because a seed fixes the data order and the evaluation's draws for both. ValueError for too few or too many seeds."""
    seeds = sorted(first.keys() & second.keys())
    if not 2 <= len(seeds) <= len(T95) + 1:
        raise ValueError(f"a paired interval needs 2 to {len(T95) + 1} seeds in common, got {len(seeds)}")
    mean, stderr = report.mean_and_stderr([first[seed] - second[seed] for seed in seeds])
    half = T95[len(seeds) - 2] * stderr
    return mean, mean - half, mean + half


# The paper's claims. One says that a figure is above another ("more" and "less": a row and a column of the csv), or, if it is
# "denied", that it is not; or that a row needs more steps than another to the same reward ("slower", "faster"). With "budgets"
# the claim is about methods that sample in another way than SGPO, and has a verdict for each way.
CLAIMS = json.loads(Path(__file__).with_name("claims.json").read_text(encoding="utf-8"))
OPERATIONS = ("add", "sub", "double", "inc", "max", "min")  # the tokens of both worlds that carry the strategy
FIRST_WORDS = ("by", "so")  # the hard world's, when guided: they say how a response is written, and not what


def column(lines: Lines, row: str, name: str) -> dict[str, float]:
    """{seed: value} of one row and column of a csv; empty cells are left out. <x>_change: the last ten steps minus the first;
    reward_fall: the best ten steps in a row minus the last."""
    if name == "reward_fall":
        first, last = column(lines, row, "reward_last10"), column(lines, row, "reward_peak")
    elif name.endswith("_change"):
        first, last = (column(lines, row, name.replace("change", end)) for end in ("first10", "last10"))
    else:
        return {line["seed"]: float(line[name]) for line in lines if line["row"] == row and line[name]}
    return {seed: last[seed] - first[seed] for seed in first.keys() & last.keys()}


def steps_to_same_reward(curves: Lines, first: str, second: str) -> tuple[dict[str, float], dict[str, float]]:
    """For each seed the natural logarithm of the steps after which two rows reach the same reward: ({seed: log}, {seed: log}).
    It is a trailing mean of five steps; the level is the lower one of their means over the last ten."""
    logs: tuple[dict[str, float], dict[str, float]] = ({}, {})
    for seed in {line["seed"] for line in curves if line["row"] == first}:
        rewards = []
        for row in (first, second):
            steps = [line for line in curves if (line["row"], line["seed"]) == (row, seed) and line["reward_auto"]]
            rewards.append({int(line["step"]): float(line["reward_auto"]) for line in steps})
        level = min(statistics.fmean(list(reward.values())[-10:]) for reward in rewards)
        for log, reward in zip(logs, rewards, strict=True):
            smooth = report.trailing_mean(reward, 5)
            log[seed] = math.log(next((step for step, value in smooth.items() if value >= level), max(smooth)))
    return logs


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
    "table": "Methods and ablations on the {} world",
    "model": "The methods on a model of your own",
}
HOW_TO_READ = (
    "Accuracy: held-out problems, 4 responses each (or --eval_n) at temperature 0.6; ± is the standard error over seeds. "
    "Differences are in accuracy, against SGPO on the same data at the paper's settings, paired by seed, with their 95 % "
    "interval (Student's t, not corrected for the number of rows). Kept: share of the target's tokens that the KL clip leaves "
    "in. Reach gap: nats by which the target is more probable under the unguided policy than the correct guided trajectories "
    "are on average. Entropy and length: of the responses alone, in the first and the last ten steps. Seconds: the training "
    "steps of a run, on one thread."
)
HOW_TO_JUDGE = (
    "A claim says that one figure is above another, or that a row needs more steps than SGPO to the same reward: the lower "
    "one of their mean rewards over the last ten steps. Reproduced: the 95 % interval of the paired difference lies above "
    "zero (of a ratio: above 1). Not reproduced: it holds zero. The opposite: it lies below. A claim that there is no gain is "
    "reproduced unless the interval lies above zero."
)


def reference_of(row: str) -> str:
    """The row that a row is compared with: SGPO on the same data from the same start."""
    suffix = "".join(row.partition("@")[1:])
    return "sgpo" + ("" if suffix in BUDGETS else suffix)


def minus_reference(lines: Lines, row: str) -> str:
    """The paired difference in accuracy to the row's reference; empty for the reference itself."""
    reference = reference_of(row)
    if row == reference:
        return ""
    return figures_of(seed_interval(column(lines, row, "accuracy"), column(lines, reference, "accuracy")))


def budget_titles() -> list[str]:
    return [f"{group} a problem, {steps} steps" for group, steps in BUDGETS.values()]


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
    names |= {"reach_gap": "reach gap", "entropy_first10": "entropy, first", "entropy_last10": "entropy, last"}
    names |= {"length_first10": "length, first", "length_last10": "length, last"}
    names = {name: title for name, title in names.items() if name in lines[0]}
    digits = {name: 1 if name.startswith("length") else 3 for name in names}
    costs = {"sampled_tokens": "sampled tokens", "step_s": "seconds"}
    titles = ["row", "minus the reference", *names.values(), "steps", *costs.values(), "flags"]
    page = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    base = statistics.fmean(float(line["base"]) for line in lines)
    page.append(f"| base | | {base:.3f} |" + " |" * (len(titles) - 3))
    for row in dict.fromkeys(line["row"] for line in lines):
        cells = [with_error(lines, row, name, digits[name]) for name in names]
        cells += [with_error(lines, row, "steps", 0).split(" ")[0], *(with_error(lines, row, name, 0) for name in costs)]
        flags = next(line["flags"] for line in lines if line["row"] == row).removeprefix(shared).strip()
        page.append(f"| {row} | {minus_reference(lines, row) or '(reference)'} | {' | '.join(cells)} | `{flags}` |")
    return page


def methods_table(lines: Lines) -> list[str]:
    """Accuracy of the methods, a column for each way to spend samples, and one without the warm-up."""
    rows = {line["row"] for line in lines}
    titles = budget_titles()
    page = ["", "## Methods", "", f"| | {' | '.join(titles)} | no warm-up, {titles[0]} |", "|---" * (len(titles) + 2) + "|"]
    base, start = (statistics.fmean(column(lines, "sgpo", name).values()) for name in ("base", "start"))
    page.append(f"| start | {f'{start:.3f} | ' * len(titles)}{base:.3f} |")
    for name in (*METHODS, "shuffled-strategies"):
        cells = []
        for suffix in (*BUDGETS, "@cold"):
            row = name + suffix
            figures = [with_error(lines, row, "accuracy"), minus_reference(lines, row)] if row in rows else []
            cells.append("; ".join(filter(None, figures)))
        page.append(f"| {name} | {' | '.join(cells)} |")
    return [*page, "", "After the semicolon: minus SGPO."]


def suite_page(suite: str, results: Path) -> str:
    """The page of a suite, from the csv files in `results` alone: what was run, the tables, the claims with their verdicts."""
    lines = read_csv(results / f"{suite}.csv")
    world = "hard" if "data/hard/base" in lines[0]["flags"].split() else "tiny"
    command = f"python tools/sweep.py {suite}" + (f" --world {world}" if world != "tiny" else "")
    seeds = sorted({line["seed"] for line in lines}, key=int)
    page = [
        f"# {TITLES[suite].format(world)}",
        "",
        f"Written by `{command}` from {suite}.csv: {len(lines)} runs, seeds {', '.join(seeds)}, code at "
        f"{', '.join(sorted({line['commit'] for line in lines}))}. {HOW_TO_READ}",
    ]
    if "run_s" in lines[0]:
        page[-1] += f" All runs together: {sum(int(line['run_s']) for line in lines) / 3600:.1f} hours of one core."
    if suite == "table":
        page += [*methods_table(lines), "", "## All rows"]
    page += ["", *rows_table(lines)]
    if shared := shared_flags(lines):
        page += ["", f"All rows: `{shared}`."]
    if suite != "model":  # which was given its rate
        rates = best_rates(results / "rates.csv")
        tried = "; ".join(f"{name} {', '.join(values)} (taken: {rates[name]})" for name, values in RATES.items())
        page += ["", f"Learning rates tried, by accuracy on the validation problems over two other seeds (rates.csv): {tried}."]
    if suite == "table":
        page += claims_section(lines, read_csv(results / f"{suite}_steps.csv"))
        page += token_claim(results / "divergence.csv")
        page += [f"| {text} | not testable here | | |" for text in CLAIMS["not_testable"]]
    return "\n".join([*page, ""])


def figures_of(interval: Interval) -> str:
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*interval)


def claims_section(lines: Lines, curves: Lines) -> list[str]:
    head = f"| claim | {' | '.join(budget_titles())} |"
    page = ["", "## The paper's claims", "", HOW_TO_JUDGE, "", head, "|---" * (len(BUDGETS) + 1) + "|"]
    for claim in CLAIMS["claims"]:
        cells = []
        for suffix in BUDGETS if claim.get("budgets") else [""]:
            if "slower" in claim:
                interval = seed_interval(*steps_to_same_reward(curves, claim["slower"], claim["faster"]))
                figures = "{:.2f} times [{:.2f}, {:.2f}]".format(*map(math.exp, interval))
            else:
                figure_of = []
                for row, name in (claim["more"], claim["less"]):
                    figure_of.append(column(lines, row + suffix if row in BUDGET_ROWS else row, name))
                interval = seed_interval(*figure_of)
                figures = figures_of(interval)
            cells.append(f"{figures} {verdict(interval, claim.get('denied', False))}")
        cells += [""] * (len(BUDGETS) - len(cells))
        page.append(f"| {claim['text']} | {' | '.join(cells)} |")
    return page


def token_claim(path: Path) -> list[str]:
    """The claim about single tokens, from what `report.py divergence` wrote; nothing if it was not run."""
    if not path.exists():
        return []
    counts, sums = Counter(), Counter()
    for token in read_csv(path):
        kind = "operation" if token["token"] in OPERATIONS else "first word" if token["token"] in FIRST_WORDS else "other"
        counts[kind] += int(token["count"])
        sums[kind] += int(token["count"]) * float(token["mean_d"])
    mean = {kind: sums[kind] / counts[kind] for kind in counts}
    first = f"{mean['first word']:.4f} on the words that guided responses begin with, " if "first word" in mean else ""
    return [
        "| d_t is large on the tokens that carry the strategy and near zero on routine ones | "
        f"mean {mean['operation']:.4f} nats on the six operations, {first}{mean['other']:.5f} on all others (base model, "
        f"divergence.csv) {'reproduced' if mean['operation'] > 10 * mean['other'] else 'not reproduced'} (rule: tenfold) | | |"
    ]


# ---------------------------------------------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("suite", choices=tuple(SUITES))
    parser.add_argument("--world", choices=tuple(WORLDS), default="tiny", help="of rates and table (default: tiny)")
    parser.add_argument("--results", type=Path, required=True, help="folder for the csv files and the page, e.g. results/tiny")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs themselves (default: runs)")
    parser.add_argument("--seeds", type=int, default=0, help="for each row (default: rates 2, the tiny table 5, else 3)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs side by side (default: one a core)")
    parser.add_argument("--base", default="", help="model: train.py flags of every run, --model among them")
    parser.add_argument("--steps", type=int, default=0, help="model: SGPO's steps, half as many again for the others")
    args = parser.parse_args(argv)
    if not args.seeds:
        args.seeds = {"rates": 2, "table": SEEDS[args.world]}.get(args.suite, 3)
    if args.suite != "model" and (args.base or args.steps):
        parser.error(f"--base and --steps are for the suite model, {args.suite} has its own")
    if args.suite != "rates" and not 2 <= args.seeds <= len(T95) + 1:
        parser.error(f"--seeds {args.seeds}: the page's intervals need 2 to {len(T95) + 1} seeds")
    try:
        jobs = make_jobs(args)
    except ValueError as error:
        sys.exit(f"error: {error}")
    run_suite(args, jobs)
    write_page(args.suite, args.results)


def write_page(suite: str, results: Path) -> None:
    """The page, and last the pictures, which need matplotlib (requirements-dev.txt)."""
    if suite == "rates":
        return print(best_rates(results / "rates.csv"))
    (results / f"{suite}.md").write_text(suite_page(suite, results), encoding="utf-8")
    report.main(["rows", str(results / f"{suite}.csv"), "--out", str(results / suite)])
    if suite == "table":
        for name, rows in CURVES.items():
            groups = report.groups_of_csv(results / "table_steps.csv", rows)
            report.save(report.draw(groups, smooth=5), results / name, dpi=90)


if __name__ == "__main__":
    main()
