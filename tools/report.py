"""Pictures of runs: training curves over seeds, and the accuracies of a sweep.

    python tools/report.py curves runs/sgpo runs/grpo --out pictures/curves     a folder for each method, with a run a seed
    python tools/report.py rows results/tiny/table.csv --out pictures/table
    python tools/report.py tokens ...                                           (or divergence) the token map: token_map.py

`curves` reads metrics.jsonl files, those of unfinished runs too, and draws the paper's training dynamics (arXiv 2606.24064).
`rows` draws every row of a csv that sweep.py wrote with its seeds. Both write PNG and SVG, over what
an earlier call left there.
"""

import argparse
import csv
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the files of the method, from the folder above

# Okabe and Ito's colour-blind-safe colours without yellow, which is lost on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # the same distinction without colour
# panel -> title, y axis, and the records' keys with their line styles
PANELS: dict[str, tuple[str, str, dict[str, str]]] = {
    "reward": ("Reward", "mean reward alone", {"reward_auto": "-"}),
    "entropy": ("Entropy", "nats per token", {"entropy": "-"}),
    "length": ("Response length", "tokens per response", {"length_auto": "-"}),
    "pass_rates": ("Pass rates", "p_auto (solid), p_guide (dashed)", {"reward_auto": "-", "reward_guided": "--"}),
    "alpha": ("Adaptive weight", "mean α(q)", {"alpha": "-"}),
    "accuracy": ("Held-out accuracy", "accuracy alone", {"accuracy": "-"}),
}
GUIDED = ("reward_guided", "alpha")  # methods without a guided group log 0 for these, which is no measurement
SEEDS = ("seed", "data_seed", "sampling_seed")
MAY_DIFFER = (*SEEDS, "out", "resume", "device", "model", "data", "eval_data")  # inside a group
Curve = dict[str, list]  # "step", "mean", "stderr", "seeds": parallel lists


# ---------------------------------------------------------------------------------------------------- reading runs


@dataclass(frozen=True)
class Run:
    """One metrics.jsonl: the run's settings, its RL steps in order, and its evaluations without the strategy."""

    path: Path
    config: dict[str, Any]
    steps: list[dict[str, Any]]
    evals: list[dict[str, Any]]


def read_run(path: Path) -> Run:
    """Read a metrics.jsonl. ValueError "file:line: what" for a line that is no JSON, or a file without settings. A last line
    without its line end is left out, with a note: a run that is still going is writing it."""
    *lines, unfinished = path.read_bytes().split(b"\n")
    if unfinished:
        print(f"{path}:{len(lines) + 1}: the last line is unfinished (is the run still going?), left out")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}, in {line[:80]!r}") from None
    if not records or "config" not in records[0]:
        raise ValueError(f"{path}:1: no settings of a run")
    config = records[0]["config"]
    steps = [record for record in records if record.get("stage") == config["method"] != "sft"]
    evals = [record for record in records if record.get("stage") == "eval" and not record["guided"]]
    return Run(path, config, steps, evals)


def read_groups(folders: Sequence[str]) -> dict[str, list[Run]]:
    """{a folder's name: the runs in it}, in the order given.

    ValueError for a folder without any run, two of one name, and runs that are not one method under several seeds: a band
    over different settings would say nothing about seeds. Paths may differ.
    """
    groups: dict[str, list[Run]] = {}
    for folder in folders:
        label = Path(folder).resolve().name
        paths = sorted(Path(folder).rglob("metrics.jsonl"))
        if not paths:
            raise ValueError(f"{folder}: no metrics.jsonl in it or below, so this group has no run")
        if label in groups:
            raise ValueError(f"two groups are called {label!r}, by the names of their folders")
        groups[label] = [read_run(path) for path in paths]
        _check_group(groups[label])
    if len(groups) > len(COLOURS):
        raise ValueError(f"{len(groups)} groups: more than {len(COLOURS)} lines in one picture cannot be told apart")
    return groups


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def groups_of_csv(path: Path, rows: Sequence[str]) -> dict[str, list[Run]]:
    """{row: its runs} from a ..._steps.csv of sweep.py: a line for each row, seed and step."""
    lines = read_csv(path)
    groups: dict[str, list[Run]] = {}
    for row in rows:
        groups[row] = []
        for seed in dict.fromkeys(line["seed"] for line in lines if line["row"] == row):
            own = [line for line in lines if (line["row"], line["seed"]) == (row, seed)]
            names = [name for name in own[0] if name not in ("row", "seed", "step")]
            records = [{"step": int(line["step"])} | {name: float(line[name] or 0) for name in names} for line in own]
            steps = [record for record, line in zip(records, own, strict=True) if line["length_auto"]]
            evals = [record for record, line in zip(records, own, strict=True) if line["accuracy"]]
            groups[row].append(Run(path, {"seed": seed}, steps, evals))
    return groups


def _check_group(runs: Sequence[Run]) -> None:
    first, seeds = runs[0], {}
    for run in runs:
        names = run.config.keys() & first.config.keys() - set(MAY_DIFFER)
        if different := sorted(name for name in names if run.config[name] != first.config[name]):
            raise ValueError(f"{first.path}: the runs of a group may differ in their seeds, not in {', '.join(different)}")
        own = tuple(run.config.get(name) for name in SEEDS)
        if own in seeds:
            raise ValueError(f"{seeds[own]} and {run.path} are of one group and have the same seeds")
        seeds[own] = run.path
    if not any(run.steps or run.evals for run in runs):
        raise ValueError(f"{first.path}: neither an RL step nor an evaluation in this group yet")


# ---------------------------------------------------------------------------------------------------- curves as data


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float]:
    """(mean, standard error: unbiased standard deviation / sqrt(n)). The error of a single value is nan."""
    stderr = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), stderr


def trailing_mean(series: Mapping[int, float], window: int) -> dict[int, float]:
    """{step: mean of the last `window` steps up to this one}. Not centred: a point stays where it is when the run goes on."""
    means = {}
    for step in series:
        last = [series[s] for s in range(step - window + 1, step + 1) if s in series]
        means[step] = statistics.fmean(last)
    return means


def over_seeds(series: Sequence[Mapping[int, float]]) -> Curve:
    """{step: value} of each seed -> the curve of their means, over all steps that a seed reached."""
    curve = {"step": sorted(set().union(*series)), "mean": [], "stderr": [], "seeds": []}
    for step in curve["step"]:
        values = [one[step] for one in series if step in one]
        mean, stderr = mean_and_stderr(values)
        curve["mean"].append(mean)
        curve["stderr"].append(stderr)
        curve["seeds"].append(len(values))
    return curve


def curve_of(runs: Sequence[Run], key: str, smooth: int) -> Curve:
    """A quantity over steps, smoothed seed by seed before the mean over seeds is taken; without steps if no run measured it.
    Accuracy is not smoothed. Of two evaluations at one step the later counts: that after the warm-up."""
    series = []
    for run in runs:
        if key == "accuracy":
            series.append({record["step"]: record[key] for record in run.evals})
        else:  # a response has at least one token, so a guided length of 0 means that there was no guided group
            length = "length_guided" if key in GUIDED else "length_auto"
            measured = {record["step"]: record[key] for record in run.steps if record[length] > 0 and record[key] is not None}
            series.append(trailing_mean(measured, smooth))
    return over_seeds(series)


def panel_curves(groups: Mapping[str, Sequence[Run]], smooth: int) -> dict[str, dict[str, dict[str, Curve]]]:
    """{panel: {label: {key: curve}}}. A group is only in the panels for which it has everything: one without guided responses
    has neither p_guide nor alpha, SFT has accuracy alone."""
    panels = {}
    for name, (_, _, keys) in PANELS.items():
        panels[name] = {}
        for label, runs in groups.items():
            curves = {key: curve_of(runs, key, smooth) for key in keys}
            if all(curve["step"] for curve in curves.values()):
                panels[name][label] = curves
    return panels


# ---------------------------------------------------------------------------------------------------- drawing
# matplotlib (requirements-dev.txt) is imported by the functions that draw. Without pyplot: no global state, no display.


def draw(groups: Mapping[str, Sequence[Run]], smooth: int) -> Any:
    """A matplotlib Figure of the panels that have a curve; a group keeps its colour and marker in all of them."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    panels, labels = panel_curves(groups, smooth), list(groups)
    names = [name for name in PANELS if panels[name]]
    columns = min(len(names), 3)
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * rows + 0.9), layout="constrained")
    for place, name in enumerate(names, start=1):
        title, y_label, keys = PANELS[name]
        smoothed = name != "accuracy" and smooth > 1
        x_label = f"RL step (trailing mean of {smooth} steps)" if smoothed else "RL step"
        axes = figure.add_subplot(rows, columns, place, title=title, xlabel=x_label, ylabel=y_label)
        for label, curves in panels[name].items():
            for key, line in keys.items():
                _draw_curve(axes, curves[key], labels.index(label), line, every_point=name == "accuracy")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.ticklabel_format(useOffset=False)
    handles = []
    for index, (label, runs) in enumerate(groups.items()):
        text = f"{label} ({len(runs)} seed{'s' if len(runs) > 1 else ''})"
        handles.append(Line2D([], [], color=COLOURS[index], marker=MARKERS[index], markersize=5, label=text))
    # below the axes, where it hides nothing
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4), frameon=False)
    legend.set_title("mean and ± 1 standard error over seeds (one seed: no band)", prop={"size": "small"})
    return figure


def _draw_curve(axes: Any, curve: Curve, index: int, line: str, every_point: bool) -> None:
    """Line, markers and band of one curve. One seed has no band."""
    steps, mean, stderr = (np.array(curve[name]) for name in ("step", "mean", "stderr"))
    colour = COLOURS[index]
    stride = 1 if every_point else max(len(steps) // 6, 1)
    start = index % min(stride, len(steps))  # differs by group: on lines that run together no marker covers another
    marks = {"marker": MARKERS[index], "markersize": 4.5, "markevery": (start, stride)}
    axes.plot(steps, mean, line, color=colour, linewidth=1.7, **marks)
    axes.fill_between(steps, mean - stderr, mean + stderr, color=colour, alpha=0.2, linewidth=0)
    if len(steps) == 1:  # a band without width cannot be seen: SFT has one accuracy
        axes.vlines(steps, mean - stderr, mean + stderr, color=colour, linewidth=1.7)


def save(figure: Any, path: Path, dpi: int) -> None:
    """Write the figure as path.png and path.svg. Text as paths, because an SVG in a README loads no font. With the salt and
    without the date the same data give the same bytes."""
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "report.py"}):
        figure.savefig(f"{path}.png", dpi=dpi)
        figure.savefig(f"{path}.svg", metadata={"Date": None})
    print(f"{path}.png, {path}.svg")


# ---------------------------------------------------------------------------------------------------- rows of a sweep


def read_rows(path: Path) -> dict[str, list[float]]:
    """{row: its accuracy for each seed} from a csv of sweep.py, in its order. ValueError "file:line: what" for another file."""
    rows: dict[str, list[float]] = {}
    for number, line in enumerate(read_csv(path), start=2):
        try:
            rows.setdefault(line["row"], []).append(float(line["accuracy"]))
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path}:{number}: no row with an accuracy: {line}") from None
    return rows


def draw_rows(rows: Mapping[str, Sequence[float]]) -> Any:
    """A Figure: each row with its seeds, mean and standard error."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 0.32 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    for place, values in enumerate(rows.values()):
        mean, error = mean_and_stderr(values)
        axes.plot(values, [place] * len(values), "o", color=COLOURS[5], markersize=3.5, alpha=0.8, zorder=1)
        axes.errorbar(mean, place, xerr=error, fmt="o", color=COLOURS[0], capsize=3, zorder=2)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("accuracy; small: one seed, large: the mean with ± 1 standard error over seeds")
    return figure


# ---------------------------------------------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    more = "tokens, divergence: where the strategy speaks along a response; see `report.py tokens --help`"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=more, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    curves = commands.add_parser("curves", help="training curves, a line for each method, over seeds", allow_abbrev=False)
    curves.add_argument("groups", nargs="+", metavar="FOLDER", help="the runs of one method, which the folder is named after")
    curves.add_argument("--smooth", type=int, default=5, help="trailing mean over this many steps; 1: none (default: 5)")
    rows = commands.add_parser("rows", help="the accuracies of a sweep's csv, every row with its seeds", allow_abbrev=False)
    rows.add_argument("csv", type=Path, help="table.csv of sweep.py")
    for command in (curves, rows):
        command.add_argument("--out", type=Path, required=True, help="the picture without its ending; .png and .svg are added")
    return parser


def main(arguments: Sequence[str]) -> Any:
    if arguments[:1] in (["tokens"], ["divergence"]):
        from tools import token_map  # imported here: torch takes seconds, and pictures need none

        return token_map.main(arguments)
    args = build_parser().parse_args(arguments)
    if args.command == "rows":
        return save(draw_rows(read_rows(args.csv)), args.out, dpi=150)
    if args.smooth < 1:
        raise ValueError(f"--smooth must be at least 1, got {args.smooth}")
    return save(draw(read_groups(args.groups), args.smooth), args.out, dpi=90)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as problem_with_input:
        sys.exit(f"report.py: {problem_with_input}")
    except ModuleNotFoundError as missing:  # matplotlib
        sys.exit(f"report.py: {missing}; `pip install -r requirements-dev.txt` has what draws")
