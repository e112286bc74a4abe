"""Pictures of runs: training curves over seeds, and a token map that shows where along a response the strategy speaks.

    python tools/report.py curves runs/sgpo runs/grpo --out pictures      one folder a method, in it one run a seed
    python tools/report.py rows results/tiny/table.csv --out pictures/table
    python tools/report.py tokens --data data/tiny/test.jsonl --model data/tiny/base --after runs/x/model --out map.html
    python tools/report.py bench results/bench --out results/bench.md

`curves` reads metrics.jsonl files, those of unfinished runs too, and draws the paper's training dynamics as PNG and SVG.
`rows` draws one column of a csv that sweep.py wrote: every row with its seeds, or the effect of a knob.
`bench` puts the reports of bench.py together in one Markdown page, and `growth` draws the one that shows how the cost grows.
`divergence` says which tokens carry the strategy, by mean d_t over many problems.
`tokens` writes one HTML page without any outside resource: every token of the reachable target coloured by its divergence d_t,
computed by the functions that training uses, before training and (--after) after it, for the same token ids. Both pictures are
the paper's (arXiv 2606.24064) in kind; the layout is ours.

What it is not: a live monitor, and not a judge: one seed has no band, one problem is one problem. Both commands write over what
an earlier call left at --out.

Axes: M response tokens, D width, V vocabulary, K next tokens shown (--top).
"""

import argparse
import csv
import json
import math
import os
import shlex
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from itertools import islice
from pathlib import Path
from textwrap import fill
from typing import Any
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the files of the method, from the folder above

# torch, the sibling files that need it, and matplotlib (requirements-dev.txt) are imported inside the functions that use them:
# curves and the page of figures need no torch, which takes seconds to load, and the token map no matplotlib.

# Okabe and Ito's colour-blind-safe colours without yellow, which is lost on white, in a fixed order: first group, first colour
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # the same distinction without colour
# file name -> title, y axis, and the records' keys with their line styles
PANELS: dict[str, tuple[str, str, dict[str, str]]] = {
    "reward": ("Reward", "mean reward alone", {"reward_auto": "-"}),
    "entropy": ("Entropy", "nats per token", {"entropy": "-"}),
    "length": ("Response length", "tokens per response", {"length_auto": "-"}),
    "pass_rates": ("Pass rates", "p_auto (solid), p_guide (dashed)", {"reward_auto": "-", "reward_guided": "--"}),
    "alpha": ("Adaptive weight", "mean α(q)", {"alpha": "-"}),
    "accuracy": ("Held-out accuracy", "accuracy alone", {"accuracy": "-"}),
}
ALWAYS = ("step", "reward_auto", "entropy", "length_auto", "length_guided")
GUIDED = ("reward_guided", "alpha")  # logged as 0 by methods without a guided group: there they are no measurement
SEEDS = ("seed", "data_seed", "sampling_seed")
# these change the cost, not the result
MACHINE = "max_rows cache_tokens recompute micro_tokens chunk_tokens device shard_ranks offload timeout_minutes resume".split()
MACHINE += ["checkpoint_minutes", "keep_checkpoints", "max_skipped"]  # runs of older code have keep_checkpoints
MAY_DIFFER = {*SEEDS, *MACHINE, "out", "model", "data", "eval_data"}
CHUNK_TOKENS = 256  # tokens whose logits exist at once


# ---------------------------------------------------------------------------------------------------- reading runs


@dataclass(frozen=True)
class Run:
    """One metrics.jsonl: the run's settings, its RL steps in order, and its evaluations without the strategy."""

    path: Path
    config: dict[str, Any]
    steps: list[dict[str, Any]]
    evals: list[dict[str, Any]]

    @property
    def guided(self) -> bool:
        """Whether the method samples a guided group. Every response has a token, so a mean length of 0 means there was none."""
        return any(record["length_guided"] > 0 for record in self.steps)


def read_run(path: Path) -> Run:
    """Read and check a metrics.jsonl; ValueError "file:line: what" for a broken line, a missing key, a value that is no number.

    Only a last line without its line end may be broken: a run that is still going is writing it. It is left out, and said so.
    """
    run = None
    lines = path.read_bytes().split(b"\n")  # not splitlines: what follows the last line end is a line that was not ended
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line:
            break
        try:
            record = json.loads(line)
        except ValueError as error:  # JSONDecodeError, and UnicodeDecodeError for bytes that are no text
            if number == len(lines):
                print(f"{path}:{number}: the last line is unfinished (is the run still going?), left out")
                break
            raise ValueError(f"{path}:{number}: not valid JSON ({error}): {line[:80]!r}") from error
        try:
            run = _take(run, record, path)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
    if run is None:
        raise ValueError(f"{path}: empty")
    return run


def _take(run: Run | None, record: Any, path: Path) -> Run:
    """Add one line's record to its run (None: the first line, which holds the settings)."""
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {record!r}")
    if run is None:
        config = record.get("config")
        if not isinstance(config, dict) or not {"method", "seed"} <= set(config):
            raise ValueError("the first line must hold the run's config with its method and seed")
        return Run(path, config, [], [])
    stage, method = record.get("stage"), run.config["method"]
    if stage not in ("eval", "sft", "sft_validation", method):
        raise ValueError(f"stage is {stage!r}, expected eval, sft, sft_validation or the run's method {method}")
    if stage == "eval":
        _check_numbers(record, ("step", "accuracy"))
        if not isinstance(record.get("guided"), bool):
            raise ValueError(f"guided is {record.get('guided')!r}, expected true or false")
        if not record["guided"]:
            run.evals.append(record)
    elif stage not in ("sft", "sft_validation"):  # the steps of a supervised stage sample nothing: no curve has them
        _check_numbers(record, ALWAYS)
        if record["length_guided"] > 0:
            _check_numbers(record, GUIDED)
        if run.steps and record["step"] <= run.steps[-1]["step"]:
            raise ValueError(f"step {record['step']} after step {run.steps[-1]['step']}")
        run.steps.append(record)
    return run


def _check_numbers(record: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in names:
        if name not in record:
            raise ValueError(f"no {name}")
        value = record[name]
        kind = int if name == "step" else int | float
        if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):
            raise ValueError(f"{name} is {value!r}, expected {'a whole' if kind is int else 'a finite'} number")


def read_groups(arguments: Sequence[str]) -> dict[str, list[Run]]:
    """FOLDER or LABEL=FOLDER -> {label: its runs}, in the order given.

    ValueError for a folder without any run, two groups of one label, and runs that are not one method under several seeds: a
    band over different settings would say nothing about seeds. Settings of the machine and paths may differ.
    """
    groups: dict[str, list[Run]] = {}
    for argument in arguments:
        label, split, folder = argument.partition("=")
        if not split or Path(argument).is_dir():  # a folder's own name may hold a "="
            label, folder = Path(argument).resolve().name, argument
        paths = sorted(Path(folder).rglob("metrics.jsonl"))
        if not paths:
            raise ValueError(f"{folder}: no metrics.jsonl in it or below, so this group has no run")
        if label in groups:
            raise ValueError(f"two groups are called {label!r}; name one of them LABEL=FOLDER")
        groups[label] = [read_run(path) for path in paths]
        _check_group(groups[label])
    if len(groups) > len(COLOURS):
        raise ValueError(f"{len(groups)} groups: more than {len(COLOURS)} lines in one picture cannot be told apart")
    return groups


def _check_group(runs: Sequence[Run]) -> None:
    first, seeds = runs[0], {}
    for run in runs:
        for name in sorted(set(run.config) & set(first.config) - MAY_DIFFER):
            if run.config[name] != first.config[name]:
                values = f"{first.config[name]!r} in {first.path} but {run.config[name]!r} in {run.path}"
                raise ValueError(f"one group must be one method under several seeds, but {name} is {values}")
        seed = ", ".join(f"{name} {run.config[name]}" for name in SEEDS if name in run.config)
        if seed in seeds:
            raise ValueError(f"{seeds[seed]} and {run.path} are of one group and both have {seed}")
        seeds[seed] = run.path
    if not any(run.steps or run.evals for run in runs):
        raise ValueError(f"{first.path}: neither an RL step nor an evaluation in this group yet")


# ---------------------------------------------------------------------------------------------------- curves as data


def trailing_mean(series: Mapping[int, float], window: int) -> dict[int, float]:
    """{step: mean of the values of the last `window` steps up to and including it}; fewer where the run begins.

    Trailing and not centred: what is drawn for a step does not change when the run goes on.
    """
    return {step: statistics.fmean(series[s] for s in range(step - window + 1, step + 1) if s in series) for step in series}


def over_seeds(series: Sequence[Mapping[int, float]]) -> dict[str, list]:
    """One {step: value} a seed -> {"step", "mean", "stderr", "seeds"}: parallel lists over all steps that any seed reached.

    stderr is the standard error over seeds, unbiased standard deviation / sqrt(seeds); None where only one seed got that far.
    """
    curve: dict[str, list] = {"step": [], "mean": [], "stderr": [], "seeds": []}
    for step in sorted(set().union(*series)):
        values = [one[step] for one in series if step in one]
        curve["step"].append(step)
        curve["mean"].append(statistics.fmean(values))
        curve["stderr"].append(statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None)
        curve["seeds"].append(len(values))
    return curve


def panel_curves(groups: Mapping[str, Sequence[Run]], smooth: int) -> dict[str, dict[str, dict[str, dict[str, list]]]]:
    """{panel: {label: {key: curve}}}, smoothed seed by seed before the mean over seeds is taken.

    A group without a quantity is not in that panel: a method that samples no guided group has neither p_guide nor alpha, SFT
    has accuracy alone. Accuracy is not smoothed; of two evaluations at one step the later counts, so that a run with an SFT
    warm-up starts from the accuracy after it.
    """
    panels: dict[str, dict[str, dict[str, dict[str, list]]]] = {name: {} for name in PANELS}
    for label, runs in groups.items():
        for name, (_, _, keys) in PANELS.items():
            for key in keys:
                if name == "accuracy":
                    series = [{record["step"]: record[key] for record in run.evals} for run in runs]
                else:
                    usable = [run for run in runs if run.guided or not set(keys) & set(GUIDED)]
                    series = [trailing_mean({r["step"]: r[key] for r in run.steps}, smooth) for run in usable]
                if any(series):
                    panels[name].setdefault(label, {})[key] = over_seeds([one for one in series if one])
    return panels


# ---------------------------------------------------------------------------------------------------- drawing


def draw(panels: Mapping[str, Mapping[str, Any]], names: Sequence[str], labels: Sequence[str], smooth: int) -> Any:
    """A matplotlib Figure of the named panels, at most three in a row; a group keeps its colour and marker in all of them."""
    from matplotlib.figure import Figure  # without pyplot: no global state, no display, and saving takes Agg

    columns = min(len(names), 3)
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(4.6 * columns if columns > 1 else 6.4, 3.2 * rows + 0.9), layout="constrained")
    counts: dict[str, set[int]] = {label: set() for label in labels}
    for place, name in enumerate(names):
        title, y_label, keys = PANELS[name]
        axes = figure.add_subplot(rows, columns, place + 1, title=title, xlabel="RL step", ylabel=y_label)
        if name != "accuracy" and smooth > 1:
            axes.set_xlabel(f"RL step (trailing mean of {smooth} steps)")
        for label, curves in panels[name].items():
            for key, line in keys.items():
                _draw_curve(axes, curves[key], labels.index(label), line, every_point=name == "accuracy")
                counts[label] |= set(curves[key]["seeds"])
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.ticklabel_format(useOffset=False)
    _legend(figure, labels, counts)
    return figure


def _draw_curve(axes: Any, curve: Mapping[str, list], index: int, line: str, every_point: bool) -> None:
    """Line, markers and band of one curve; thin where fewer seeds are in the mean than elsewhere, because it may jump there."""
    steps, mean, colour = curve["step"], curve["mean"], COLOURS[index]
    fewer = [count < max(curve["seeds"]) for count in curve["seeds"]]
    thick = [math.nan if fewer[i] else m for i, m in enumerate(mean)]
    thin = [m if any(fewer[max(i - 1, 0) : i + 2]) else math.nan for i, m in enumerate(mean)]  # from the last thick point on
    for values, width in ((thick, 1.7), (thin, 0.7)):
        axes.plot(steps, values, line, color=colour, linewidth=width)
    stride = 1 if every_point else max(len(steps) // 6, 1)
    start = index % min(stride, len(steps))  # differs by group: on lines that run together no marker covers another
    axes.plot(steps[start::stride], mean[start::stride], MARKERS[index], color=colour, markersize=4.5)
    error = [math.nan if e is None else e for e in curve["stderr"]]  # nan: no band there
    low, high = ([m + sign * e for m, e in zip(mean, error, strict=True)] for sign in (-1, 1))
    axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    if len(steps) == 1:  # a band without width cannot be seen: SFT has one accuracy
        axes.vlines(steps, low, high, color=colour, linewidth=1.7)


def _legend(figure: Any, labels: Sequence[str], counts: Mapping[str, set[int]]) -> None:
    """Below the axes, where it hides nothing: the groups with their seeds, and what line and band are for just these seeds."""
    from matplotlib.lines import Line2D

    handles, texts = [], []
    for index, label in enumerate(labels):
        if counts[label]:
            low, high = min(counts[label]), max(counts[label])
            texts.append(f"{label} ({f'{low} to ' if low < high else ''}{high} seed{'s' if high > 1 else ''})")
            handles.append(Line2D([], [], color=COLOURS[index], marker=MARKERS[index], markersize=5))
    several = [max(one) > 1 for one in counts.values() if one]
    caption = "mean over seeds, band ± 1 standard error over seeds" if any(several) else "one seed a line, so no band"
    if any(several) and not all(several):
        caption += " (one seed: no band)"
    if any(len(one) > 1 for one in counts.values()):
        caption += "; thin line: not all seeds got there"
    legend = figure.legend(handles, texts, loc="outside lower center", ncols=min(len(texts), 4), frameon=False)
    legend.get_title().set_multialignment("center")
    legend.set_title(fill(caption, 60 if len(figure.axes) == 1 else 120), prop={"size": "small"})


def save(figure: Any, path: Path, dpi: int) -> list[Path]:
    """Write the figure as path.png and path.svg: the two paths.

    Text as paths: an SVG in a README is shown as an image, which loads no font, and another one would run out of its place. The
    salt and the missing date make the same data the same bytes, so that a picture under version control changes with it.
    """
    import matplotlib

    files = [path.with_name(path.name + suffix) for suffix in (".png", ".svg")]
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "report.py"}):
        for file, metadata in zip(files, ({}, {"Date": None}), strict=True):
            figure.savefig(file, dpi=dpi, metadata=metadata)
    return files


def write_curves(args: argparse.Namespace) -> list[Path]:
    """Draw every panel that any group has, and all of them in one overview: the files written."""
    for name in ("smooth", "dpi"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    groups = read_groups(args.groups)
    panels = panel_curves(groups, args.smooth)
    drawn = [name for name in PANELS if panels[name]]
    pictures = {name: [name] for name in drawn} | {"overview": drawn}
    args.out.mkdir(parents=True, exist_ok=True)
    written = []
    for file, names in pictures.items():
        if args.only and file not in args.only:
            continue
        written += save(draw(panels, names, list(groups), args.smooth), args.out / file, args.dpi)
    for name in PANELS:
        without = [label for label in groups if label not in panels[name]]
        print(f"{name}: " + (", ".join(panels[name]) or "not drawn") + (f"; without {', '.join(without)}" if without else ""))
    print(f"{len(written)} pictures in {args.out}")
    return written


# ---------------------------------------------------------------------------------------------------- rows of a sweep


def read_rows(path: Path, column: str) -> dict[str, list[float]]:
    """Row -> one value a seed, from a csv of sweep.py, in the file's order; ValueError "file:line: what" for any other file."""
    rows: dict[str, list[float]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for number, line in enumerate(csv.DictReader(file), start=2):
            try:
                rows.setdefault(line["row"], []).append(float(line[column]))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}:{number}: no row with a number in {column!r}: {line}") from error
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


def draw_rows(rows: Mapping[str, Sequence[float]], y_label: str) -> Any:
    """A Figure of every row: a dot a seed, and the mean with its standard error. Rows named knob=value get one panel a knob."""
    from matplotlib.figure import Figure

    panels: dict[str, dict[str, Sequence[float]]] = {}
    for row, values in rows.items():
        knob, _, value = row.partition("=")
        panels.setdefault(knob if value else "", {})[value or row] = values
    if set(panels) != {""}:
        figure = Figure(figsize=(4.4 * len(panels), 3.6), layout="constrained")
        all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (knob, points) in zip(all_axes, panels.items(), strict=True):
            _draw_points(axes, points, across=True)
            axes.set_xlabel(knob)
        all_axes[0].set_ylabel(y_label)
    else:
        figure = Figure(figsize=(7.5, 0.32 * len(rows) + 1.2), layout="constrained")
        axes = figure.subplots()
        _draw_points(axes, rows, across=False)
        axes.invert_yaxis()
        axes.set_xlabel(y_label)
    figure.supxlabel("small: one seed; large: the mean with ± 1 standard error over seeds", fontsize="small")
    return figure


def _draw_points(axes: Any, points: Mapping[str, Sequence[float]], across: bool) -> None:
    """Each name at its place along one axis, its seeds and their mean along the other."""
    for place, values in enumerate(points.values()):
        mean = statistics.fmean(values)
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        seeds = ([place] * len(values), values) if across else (values, [place] * len(values))
        axes.plot(*seeds, "o", color=COLOURS[5], markersize=3.5, alpha=0.8, zorder=1)
        where = (place, mean) if across else (mean, place)
        axes.errorbar(*where, **{"yerr" if across else "xerr": error}, fmt="o", color=COLOURS[0], capsize=3, zorder=2)
    ticks = axes.set_xticks if across else axes.set_yticks
    ticks(range(len(points)), list(points))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def write_rows(args: argparse.Namespace) -> list[Path]:
    """Draw one column of a sweep's csv as PNG and SVG beside each other: the files written."""
    figure = draw_rows(read_rows(args.csv, args.column), args.column)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    return save(figure, args.out, args.dpi)


def write_growth(args: argparse.Namespace) -> list[Path]:
    """The curves of `bench.py --only growth`: seconds over each axis, both logarithmic, the exponent in the legend."""
    report = read_bench(args.json)
    try:
        curves = report["growth"]["curves"]
    except KeyError as error:
        raise ValueError(f"{args.json}: not a report of `bench.py --only growth` ({error!r})") from error
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(curve["axis"] for curve in curves))
    figure = Figure(figsize=(4 * len(names), 3.4), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        for index, curve in enumerate(c for c in curves if c["axis"] == name):
            points = {int(x): y for x, y in curve["seconds"].items()}
            label = f"{curve['cost']}, exponent {curve['exponent']:.2f}"
            axes.plot(list(points), list(points.values()), marker="o", color=COLOURS[index], label=label)
        axes.set(xscale="log", yscale="log", xlabel=name)
        axes.set_xticks(list(points), [str(x) for x in points])
        axes.minorticks_off()
        axes.legend(fontsize="small")
    panels[0].set_ylabel("seconds")
    figure.suptitle(f"{report['shape']}, {report['dtype']}, {report['device']}, {report['threads']} threads", fontsize="small")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    return save(figure, args.out, args.dpi)


# ---------------------------------------------------------------------------------------------------- the page of a benchmark

DTYPES = {"float32": "fp32", "bfloat16": "bf16"}  # what bench.py measures in, and the page's word for it
# a kind of device -> its name, and how to measure everything where no report is of that kind
DEVICE_KINDS = {"cpu": ("a CPU", "--device cpu"), "cuda": ("a GPU", "--device cuda --shape qwen2.5-1.5b")}
# what a report must say of itself before any of its figures means something
BENCH_HEADER = {"command": str, "date": str, "seed": int, "dtype": str, "repeats": int, "quick": bool, "commit": str}
BENCH_HEADER |= {"changed_files": bool, "device": str, "device_type": str, "threads": int, "versions": dict}
# The page's own words. No figure and no machine stands in them: those are the reports'.
BENCH_INTRODUCTION = """# Speed and memory

Every table is from one run of `bench.py`, whose command, seed, commit and machine stand above it. The figures are medians
of the repeats with the range in brackets; a ratio is taken repeat by repeat. Unless said otherwise the sides take turns
(A B A B ...). Models have the shape of a real one and random weights. All sides get the same prompts and the same response
lengths, and the checks below a table say whether they compute the same. Peak memory is what a call needs beyond what its
process held before. On a CPU the process also holds what the C library kept from earlier calls; since commit f6f3f97 that is
given back before each call, and in reports of earlier ones a figure near 0 says only that the call fitted into it.
"""
BENCH_PARTS = {
    "sampler": """## Sampler

`rollout.generate` at temperature 1. Rivals: transformers' `model.generate` (left-padded, KV cache, SDPA,
`num_return_sequences`) and `model.generate_batch` (its continuous batching). The limit is what the machine cannot beat:
every step reads the weights and the living rows' keys and values once at the speed of a large copy, or multiplies at the
speed of a large matrix product, whichever takes longer.
""",
    "update": """## One update

`sgpo.update` on given rollouts: the GRPO loss, its gradient, clipping, AdamW. The rival is the same loss with transformers
and autograd on right-padded batches of 8 and whole logits. Weights and optimizer states are fp32 on both sides, whatever
the dtype of the computation. Tokens are those of the responses.
""",
    "step": """## A whole step

Sampling, reward and update against TRL's GRPOTrainer (`pip install trl`) with the same prompts, group, response length and
optimizer; weights and optimizer states are fp32. Here the sides do not take turns, all steps of TRL come first, and no
check compares them: they draw different tokens. Tokens are those of the responses.
""",
    "head": """## The chunked head

Cross-entropy at the language-model head, forward and backward, every variant in a process of its own. The rival is
`F.cross_entropy` on the whole logits. `--chunk_tokens` of `train.py` sets the size of a chunk.
""",
    "growth": """## How the cost grows

Our own seconds (there is no rival here) with all responses of one length; along an axis only that figure changes. The
exponent is the slope of log seconds over log size: 1 where the cost is proportional, 0 where it does not grow.
""",
}
# check of a report -> its result in words
BENCH_CHECKS = {
    "greedy": "in fp32, {equal} of {responses} greedy responses of {tokens_each} tokens are equal token for token; {ties} part "
    "at a tie of the two best tokens",
    "logprobs": "in fp32, the log-probabilities of {tokens} sampled tokens differ from transformers' by at most "
    "{max_difference:.1g} (allowed: {tolerance:g})",
    "distribution": "in fp32, the first tokens of {draws:,} draws follow the exact distribution with "
    "p = {first_token_p[ours]:.2f} (ours) and {first_token_p[generate]:.2f} (generate); the mean lengths of both are "
    "{z[length]:+.2f}, their mean log-probabilities {z[logprob]:+.2f} standard errors apart",
    "same_update": "loss and gradient norm of the first update differ by at most {max_difference:.1g} (allowed: {tolerance:g})",
    "same_loss": "loss and gradient norms differ by at most {max_relative_difference:.1g}, relative (allowed: {tolerance:g})",
}
Benches = dict[tuple[str, str, str], tuple[Path, dict[str, Any]]]  # (part, device, dtype) -> the file that has it, its report


def read_bench(path: Path) -> dict[str, Any]:
    """One report of bench.py; ValueError "file: what" for a file that cannot be read, is no JSON or is something else."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: no JSON, or bytes that are no text
        raise ValueError(f"{path}: not a report of bench.py: {error}") from error
    parts = {part: report[part] for part in BENCH_PARTS if part in report} if isinstance(report, dict) else {}
    if not parts or not all(isinstance(part, dict) for part in parts.values()):
        raise ValueError(f"{path}: not a report of bench.py: it holds none of {', '.join(BENCH_PARTS)}, or not as an object")
    if "dtype" in parts.get("head", {}):  # the first reports say it there alone, with torch's name
        report.setdefault("dtype", str(parts["head"]["dtype"]).removeprefix("torch."))
    for name, kind in BENCH_HEADER.items():
        if not isinstance(report.get(name), kind):
            raise ValueError(f"{path}: not a report of bench.py: {name} is {report.get(name)!r}, expected {kind.__name__}")
    for name, known in (("dtype", DTYPES), ("device_type", DEVICE_KINDS)):
        if report[name] not in known:
            raise ValueError(f"{path}: {name} is {report[name]!r}, expected {' or '.join(known)}")
    return report


def read_benches(folder: Path) -> Benches:
    """Every part of every report in a folder. What a file holds decides, not its name.

    ValueError for a folder without reports, a file that is none, one made with --quick, and two files with the same part,
    device and dtype. A part that could not run (TRL is missing) counts as not there.
    """
    found: Benches = {}
    for path in sorted(folder.glob("*.json")):
        report = read_bench(path)
        if report["quick"]:
            raise ValueError(f"{path}: made with --quick, which times nothing; it does not belong among measured figures")
        for part in BENCH_PARTS:
            if part not in report or "failed" in report[part] or (part == "step" and not report[part]["runs"]):
                continue
            key = (part, report["device"], report["dtype"])
            if key in found:
                raise ValueError(f"{found[key][0]} and {path} both hold {part} on {key[1]} in {key[2]}; keep one of them")
            found[key] = (path, report)
    if not found:
        raise ValueError(f"{folder}: no report of bench.py with figures in it")
    return found


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table; the first row is its heading. A bar in a cell would end the cell."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def _spread(value: Mapping[str, float], form: str, scale: float = 1.0) -> str:
    """Median and range, as in "2.61 (2.57 to 2.63)"."""
    median, low, high = (format(scale * value[name], form) for name in ("median", "min", "max"))
    return f"{median} ({low} to {high})"


def _work(workload: Mapping[str, Any]) -> str:
    """A workload in one cell: prompts and responses to each, and the lengths of both."""
    equal = workload["median"] == workload["longest"]
    lengths = f"{'all' if equal else 'median {median}, longest'} {{longest}}"
    return f"{{prompts}} × {{group}}; {{shortest_prompt}} to {{longest_prompt}}; {lengths}".format(**workload)


def _sides(result: Mapping[str, Any], share: tuple[str, str] | None) -> list[list[str]]:
    """The heading and a row a side. share: (key in the runs, heading) of the share of what the machine can do."""
    heading = ["prompts × responses; prompt tokens; response tokens", "side", "tokens/s", "ours is so many times as fast"]
    rows = [[*heading, *([share[1]] if share else []), "peak memory"]]
    for side, rate in result["tokens_per_s"].items():
        runs = [run for run in result["runs"] if run["side"] == side]
        ratio = _spread(result["ratio"][side], ".2f") if side in result["ratio"] else ""
        row = [_work(result["workload"]) if len(rows) == 1 else "", side, _spread(rate, ",.1f"), ratio]
        if share:  # older reports have no share for the update
            shares = [run[share[0]] for run in runs if share[0] in run]
            row.append(f"{100 * statistics.median(shares):.0f} %" if shares else "not recorded")
        rows.append([*row, f"+{max(run['peak_mb'] for run in runs):,.0f} MB"])
    for side, why in result.get("left_out", {}).items():
        rows.append(["", side, f"not run: {why}", *[""] * (len(rows[0]) - 3)])
    return rows


def _sampler_lines(part: Mapping[str, Any]) -> list[str]:
    limits, prefill = part["limits"], part["prefill"]
    rate, share = _spread(prefill["tokens_per_s"], ",.0f"), _spread(prefill["share"], ".0f", 100)
    time = ", ".join(f"{kind} {100 * part:.0f} %" for kind, part in prefill.get("time", {}).items())  # older reports: none
    text = (
        f"Limits: {limits['bandwidth'] / 1e9:,.1f} GB/s, {limits['matmul'] / 1e9:,.0f} GFLOP/s. Prefill of "
        f"{prefill['tokens']:,} prompt tokens: {rate} tokens/s, {share} % of the matrix peak"
        f"{f' (of its time: {time})' if time else ''}."
        f"{' Decode steps are CUDA graphs.' if part.get('cuda_graphs') else ''}"
    )
    rows: list[list[str]] = []
    for result in part["workloads"]:
        heading, *sides = _sides(result, ("floor_share", "of the limit"))
        rows += [[result["workload"]["name"] if not place else "", *row] for place, row in enumerate(sides)]
    return [text, "", *_table([["workload", *heading], *rows])]


def _head_lines(part: Mapping[str, Any]) -> list[str]:
    rows = [["variant", "peak memory", "of the rival's", "seconds", "times the rival's seconds"]]
    for row in part["summary"]:
        name = f"chunks of {row['variant']}" if row["variant"].isdigit() else "whole logits"
        memory = [f"{row['peak_mb']['median']:,.0f} MB", f"{100 * row['peak_mb_ratio']['median']:.1f} %"]
        rows.append([name, *memory, _spread(row["seconds"], ",.3f"), _spread(row["seconds_ratio"], ".2f")])
    size = "{tokens:,} tokens, width {width:,}, vocabulary {vocabulary:,}:".format(**part["shape"])
    return [size, "", *_table(rows)]


def _growth_lines(part: Mapping[str, Any]) -> list[str]:
    rows = [["cost", "over", "size: seconds", "exponent"]]
    for curve in part["curves"]:
        points = ", ".join(f"{x}: {seconds:,.3f}" for x, seconds in curve["seconds"].items())
        rows.append([curve["cost"], curve["axis"], points, f"{curve['exponent']:.2f}"])
    return _table(rows)


BENCH_LINES = {
    "sampler": _sampler_lines,
    "update": lambda part: _table(_sides(part, ("flop_share", "of the matrix peak"))),
    "step": lambda part: _table(_sides(part, None)),
    "head": _head_lines,
    "growth": _growth_lines,
}


def _check_lines(checks: Mapping[str, Any]) -> list[str]:
    lines = [f"- {'ok' if c['ok'] else '**FAILED**'}: {BENCH_CHECKS[name].format(**c)}" for name, c in checks.items()]
    return ["", "Checks:", "", *lines] if lines else []


def _origin(part: str, report: Mapping[str, Any], link: str) -> list[str]:
    """What stands above a table: the command, and everything that is needed to judge or repeat the figures."""
    facts = [] if part == "head" else [f"shape {report['shape']}"]  # the head's loss has sizes of its own
    facts += [f"{report['repeats']} repeat{'s' if report['repeats'] > 1 else ''}", f"seed {report['seed']}"]
    facts.append(f"commit {report['commit'][:7]}{' with uncommitted changes' if report['changed_files'] else ''}")
    versions = report["versions"] | report[part].get("versions", {})
    facts += [report["device"], f"{report['threads']} threads", *(f"{name} {version}" for name, version in versions.items())]
    facts.append(f"load average {report['load_before'][0]:.1f} before and {report['load_after'][0]:.1f} after")
    return [f"    {report['command']}", "", f"{', '.join(facts)}, {report['date'][:10]}; [every figure]({link})", ""]


def _link(path: Path, folder: Path) -> str:
    """From a page in `folder` to a file."""
    return quote(Path(os.path.relpath(path, folder)).as_posix())


def _picture_lines(path: Path, folder: Path) -> list[str]:
    """The picture that `growth` drew beside a report, or how to draw it."""
    for picture in (path.with_suffix(".png"), path.with_suffix(".svg")):
        if picture.is_file():
            return ["", f"![Seconds along each axis, both logarithmic]({_link(picture, folder)})"]
    command = shlex.join(["python", "tools/report.py", "growth", str(path), "--out", str(path.with_suffix(""))])
    return ["", "Not drawn:", "", f"    {command}"]


def bench_table(part: str, path: Path, report: Mapping[str, Any], folder: Path) -> list[str]:
    """One part of one report, for a page in `folder`; ValueError that names the file where something is missing."""
    try:
        lines = [*_origin(part, report, _link(path, folder)), *BENCH_LINES[part](report[part])]
        lines += _check_lines(report[part]["checks"])
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its part {part} is not what bench.py writes ({error!r})") from error
    return lines + (_picture_lines(path, folder) if part == "growth" else [])


def _new_file(found: Benches, folder: Path, stem: str) -> str:
    """A path, for a command line, that none of the reports has: bench.py writes over what is there."""
    while folder / f"{stem}.json" in {path for path, _ in found.values()}:
        stem += "_2"
    return shlex.quote(str(folder / f"{stem}.json"))


def missing_command(found: Benches, folder: Path, part: str, device: str, dtype: str) -> str:
    """The command that would fill a gap, with the settings of the device's other report of that part, or of any of its."""
    reports = {name: report for (name, where, _), (_, report) in found.items() if where == device}
    like = reports.get(part) or next(iter(reports.values()))
    kind, shape = like["device_type"], f" --shape {like['shape']}" if part != "head" and "shape" in like else ""
    options = f"--only {part} --device {kind} --dtype {dtype}{shape} --threads {like['threads']}"
    return f"python tools/bench.py {options} --out {_new_file(found, folder, f'{part}_{kind}_{dtype}')}"


def bench_page(found: Benches, folder: Path, out: Path) -> str:
    """The page: a heading a part, below it one a device and then one a dtype, with the table or "not run" and the command."""
    command = shlex.join(["python", "tools/report.py", "bench", str(folder), "--out", str(out)])
    lines = [BENCH_INTRODUCTION, f"This page: `{command}`.", ""]
    devices = sorted({(report["device_type"], report["device"]) for _, report in found.values()})
    for part, text in BENCH_PARTS.items():
        lines.append(text)
        for _, device in devices:
            lines += [f"### {device}", ""]
            for dtype, name in DTYPES.items():
                if (part, device, dtype) in found:
                    lines += [f"#### {name}", "", *bench_table(part, *found[part, device, dtype], out.parent), ""]
                else:
                    lines += [f"{name}: not run.", "", f"    {missing_command(found, folder, part, device, dtype)}", ""]
    for kind, (name, options) in DEVICE_KINDS.items():
        if kind not in dict(devices):
            command = f"python tools/bench.py --only {' '.join(BENCH_PARTS)} {options} --out {_new_file(found, folder, kind)}"
            lines += [f"## On {name}", "", "Not run.", "", f"    {command}", ""]
    return "\n".join(lines)


def write_bench(args: argparse.Namespace) -> Path:
    """Put all reports in a folder together in one Markdown page: its path. Nothing is written where one cannot be read."""
    found = read_benches(args.folder)
    page = bench_page(found, args.folder, args.out)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page, encoding="utf-8")
    print(f"{args.out}: tables {len(found)}, reports {len({path for path, _ in found.values()})}")
    return args.out


# ---------------------------------------------------------------------------------------------------- the token map as data


def contexts(tokenizer: Any, problem: Any) -> tuple[list[int], list[int]]:
    """The ids of a problem's two prompts: (without the strategy, with it)."""
    from model import encode_chat
    from strategy import auto_messages, guided_messages

    guided = guided_messages(problem.problem, problem.strategy)
    return encode_chat(tokenizer, auto_messages(problem.problem)), encode_chat(tokenizer, guided)


def sample_group(
    model: Any, tokenizer: Any, worker: Any, problem: Any, args: argparse.Namespace, *, guided: bool
) -> tuple[list[list[int]], list[bool]]:
    """One group of responses, sampled as in training (temperature 1, top_p 0.95): (their ids, which of them are correct)."""
    from grader import is_correct
    from rollout import generate, stream_seed

    (group,) = generate(
        model,
        [contexts(tokenizer, problem)[guided]],
        n=args.group_guided if guided else args.group_auto,
        max_new_tokens=args.max_new_tokens,
        temperature=1.0,
        top_p=0.95,
        eos_ids=model.config.eos_ids,
        seed=[stream_seed(args.seed, "report", guided, problem.id)],
    )
    texts = [tokenizer.decode(row.response_ids, skip_special_tokens=True) for row in group]
    return [row.response_ids for row in group], [is_correct(text, problem.answer, worker) for text in texts]


def _map_terms(unguided_logits, guided_hidden, targets, *, head_weight, delta, top):
    """For the chunked head: what the map shows of m tokens. Of the vocabulary only the K most probable of each side leave."""
    import torch.nn.functional as F

    from loss import forward_kl, kl_clip_mask, token_logprobs

    guided_logits = F.linear(guided_hidden, head_weight)  # (m, V)
    divergence = forward_kl(guided_logits, unguided_logits)  # d_t (m,)
    # the head sums a "loss", and there is none here
    values = {"loss": 0 * divergence, "divergence": divergence, "kept": kl_clip_mask(divergence, delta)}
    for side, logits in (("guided", guided_logits), ("auto", unguided_logits)):
        best = logits.float().log_softmax(-1).topk(top)  # (m, K)
        values |= {f"logp_{side}": token_logprobs(logits, targets), f"top_{side}": best.values, f"ids_{side}": best.indices}
    return values


def token_map(
    model: Any, tokenizer: Any, problem: Any, response_ids: list[int], *, delta: float, top: int
) -> list[dict[str, Any]]:
    """One dict per response token: what the policy thinks of it with and without the strategy in its prompt.

    id, text, blank         the token; blank is the white space that decoding the whole response puts before it
    divergence, kept        d_t in nats [eq 3], and whether the KL clip keeps it: d_t <= delta
    logp_auto, logp_guided  log-probability of the token without and with the strategy, natural log
    top_auto, top_guided    the K = `top` most probable next tokens as (id, text, probability), best first

    The same functions as in training, in the weights' dtype, at temperature 1. Logits exist for CHUNK_TOKENS tokens at a time.
    """
    import torch

    from loss import chunked_head
    from rollout import pack

    auto_ids, guided_ids = contexts(tokenizer, problem)
    guided = pack([guided_ids], [response_ids], device=model.device)
    unguided = pack([auto_ids], [response_ids], device=model.device)  # row m of both predicts the same token

    def head(hidden, weight):
        terms = partial(_map_terms, head_weight=weight, delta=delta, top=top)
        inputs = (guided_hidden, unguided.targets)
        return chunked_head(hidden[0, unguided.predict], weight, terms, inputs, chunk_tokens=CHUNK_TOKENS)

    with torch.no_grad():
        guided_hidden = model(
            guided.input_ids, lengths=guided.lengths, prefixes=guided.prefixes, head=lambda h, _: h[0, guided.predict]
        )  # (M, D)
        _, stats = model(unguided.input_ids, lengths=unguided.lengths, prefixes=unguided.prefixes, head=head)
    rows = {name: value.tolist() for name, value in stats.items()}
    tokens = []
    for m, (blank, text) in enumerate(token_texts(tokenizer, response_ids)):
        token = {"id": response_ids[m], "text": text, "blank": blank}
        token |= {"divergence": rows["divergence"][m], "kept": bool(rows["kept"][m])}
        for side in ("auto", "guided"):
            best = zip(rows[f"ids_{side}"][m], rows[f"top_{side}"][m], strict=True)
            token[f"logp_{side}"] = rows[f"logp_{side}"][m]
            token[f"top_{side}"] = [(one, token_text(tokenizer, one), math.exp(logp)) for one, logp in best]
        tokens.append(token)
    return tokens


def token_text(tokenizer: Any, token_id: int) -> str:
    """A token as text; its name in the vocabulary where it is no text alone (part of a character, nothing at all)."""
    text = tokenizer.decode([token_id])
    return text if text and "\ufffd" not in text else str(tokenizer.convert_ids_to_tokens(token_id))


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[tuple[str, str]]:
    """[(white space before it, text)] of every token. Word-level vocabularies put blanks between tokens that are in none."""
    whole, at, texts = tokenizer.decode(ids), 0, []
    for token_id in ids:
        text = token_text(tokenizer, token_id)
        found = whole.find(text, at, at + len(text) + 8)  # near: what is not decoded alike must not match far behind
        blank = whole[at:found] if found >= 0 else ""
        at = found + len(text) if found >= 0 else at
        texts.append((blank if blank.isspace() else "", text))
    return texts


def totals(tokens: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The map in numbers: |o+|, the sum and mean of d_t, the kept share, L_KD^clip, and log pi(o+) in both contexts."""
    divergences = [token["divergence"] for token in tokens]
    return {
        "tokens": len(tokens),
        "divergence_sum": sum(divergences),
        "divergence_mean": statistics.fmean(divergences),
        "kept": statistics.fmean(token["kept"] for token in tokens),
        "loss": sum(token["divergence"] for token in tokens if token["kept"]) / len(tokens),
        "logp_guided": sum(token["logp_guided"] for token in tokens),
        "logp_auto": sum(token["logp_auto"] for token in tokens),
    }


def find_targets(model: Any, tokenizer: Any, worker: Any, args: argparse.Namespace) -> Iterator[tuple[Any, list[int]]]:
    """(problem, ids of o+) of --id, else of every problem that has a correct guided response; ValueError without strategies.

    o+ is the correct one most probable without the strategy, by the summed log-probability (--reach sum, training's default).
    """
    import torch

    from data.problems import load_problems
    from weighting import reachable_target

    problems = [problem for problem in load_problems(args.data, worker) if args.id in (None, problem.id)]
    if not problems:
        raise ValueError(f"{args.data}: no row has the id {args.id!r}")
    problems = [problem for problem in problems if problem.strategy is not None]
    if not problems:
        raise ValueError(f"{args.data}: no strategy in {'any row' if args.id is None else f'the row {args.id!r}'}")
    for problem in problems:
        responses, correct = sample_group(model, tokenizer, worker, problem, args, guided=True)
        if any(correct):
            maps = [token_map(model, tokenizer, problem, response, delta=args.delta, top=1) for response in responses]
            alone = torch.tensor([totals(tokens)["logp_auto"] for tokens in maps])
            yield problem, responses[reachable_target(alone, torch.tensor(correct))]
        else:
            print(f"{problem.id}: none of {args.group_guided} guided responses is correct")


def find_target(model: Any, tokenizer: Any, worker: Any, args: argparse.Namespace) -> tuple[Any, list[int]]:
    """The first of find_targets; ValueError where there is none."""
    for found in find_targets(model, tokenizer, worker, args):
        return found
    raise ValueError(f"{args.data}: no correct guided response; another --seed or a larger --group_guided may find one")


def model_view(
    model: Any, tokenizer: Any, worker: Any, problem: Any, response_ids: list[int], args: argparse.Namespace
) -> dict[str, Any]:
    """What the page shows of one model: the map of a trajectory, its totals, and both pass rates sampled from that model."""
    tokens = token_map(model, tokenizer, problem, response_ids, delta=args.delta, top=args.top)
    rates = {
        name: statistics.fmean(sample_group(model, tokenizer, worker, problem, args, guided=guided)[1])
        for name, guided in (("p_auto", False), ("p_guide", True))
    }
    return {"tokens": tokens, "totals": totals(tokens) | rates}


def write_tokens(args: argparse.Namespace) -> dict[str, Any]:
    """Sample, choose o+, map it under --model and under --after, write the page; its data."""
    import torch

    from grader import MathWorker
    from model import load_model

    for name in ("group_auto", "group_guided", "max_new_tokens", "top"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if not 0 < args.delta < math.inf:
        raise ValueError(f"--delta must be positive and finite, the colour scale ends there; got {args.delta}")
    if not args.out.parent.is_dir():  # an hour of sampling must not end here
        raise ValueError(f"{args.out}: its folder does not exist")
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    with MathWorker() as worker:
        model, tokenizer = load_model(args.model, dtype=torch.float32, device=device)
        if args.top > model.config.vocab_size:
            raise ValueError(f"--top {args.top}: the vocabulary has {model.config.vocab_size} tokens")
        problem, response_ids = find_target(model, tokenizer, worker, args)
        views = [{"name": "before" if args.after else "model", "model": args.model}]
        views[0] |= model_view(model, tokenizer, worker, problem, response_ids, args)
        if args.after is not None:
            vocabulary, model = tokenizer.get_vocab(), None  # the first model's memory, before the second one needs its own
            model, tokenizer = load_model(args.after, dtype=torch.float32, device=device)
            if tokenizer.get_vocab() != vocabulary:
                raise ValueError(f"--after {args.after}: its vocabulary is not that of {args.model}, the ids would not match")
            after = model_view(model, tokenizer, worker, problem, response_ids, args)
            views.append({"name": "after", "model": args.after} | after)
    names = ("data", "seed", "group_auto", "group_guided", "max_new_tokens")
    settings = ", ".join(f"--{name} {getattr(args, name)}" for name in names)
    page = {"problem": problem, "delta": args.delta, "views": views, "settings": settings}
    args.out.write_text(page_html(page), encoding="utf-8")
    print(f"{problem.id}: {len(response_ids)} tokens in {args.out}")
    return page


def write_divergence(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Which tokens carry the strategy: mean d_t per token of the vocabulary, over the targets of many problems, as a csv."""
    import torch

    from grader import MathWorker
    from model import load_model

    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    found: dict[str, list[dict[str, Any]]] = {}
    with MathWorker() as worker:
        model, tokenizer = load_model(args.model, dtype=torch.float32, device=device)
        for problem, response_ids in islice(find_targets(model, tokenizer, worker, args), args.problems):
            for token in token_map(model, tokenizer, problem, response_ids, delta=args.delta, top=1):
                found.setdefault(token["text"], []).append(token)
    if not found:
        raise ValueError(f"{args.data}: no correct guided response in any problem")
    lines = [
        {
            "token": text,
            "count": len(tokens),
            "mean_d": round(statistics.fmean(token["divergence"] for token in tokens), 6),
            "dropped": round(1 - statistics.fmean(token["kept"] for token in tokens), 6),
        }
        for text, tokens in found.items()
    ]
    lines.sort(key=lambda line: -line["mean_d"])
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    print("\n".join(f"{line['token']!r:>16}  {line['count']:>6}  mean d_t {line['mean_d']:.4f}" for line in lines[:10]))
    return lines


# ---------------------------------------------------------------------------------------------------- the page

# One hue, from the card's colour (d_t = 0) to orange, mixed in oklab: lightness falls (in the dark theme rises) evenly, so that
# the order can be read with any colour vision, and ordinary text stays readable (at least 4.5:1) on every step of it.
STYLE = """
:root { color-scheme: light dark; --page: #f4f4f2; --card: #fff; --ink: #1b1b1b; --soft: #5b5b5b; --line: #dcdcd8;
        --hot: #ef6c1a }
@media (prefers-color-scheme: dark) {
  :root { --page: #101216; --card: #171a20; --ink: #eeeeec; --soft: #a6a9b0; --line: #333842; --hot: #b04a00 }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 24px; max-width: 1080px; background: var(--page); color: var(--ink);
       font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 22px; margin: 0 } h2 { font-size: 16px; margin: 0 0 8px } .soft { color: var(--soft); font-weight: 400 }
p { margin: 4px 0 } sub { line-height: 0 } ol { margin: 4px 0; padding-left: 22px }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px 18px; margin: 14px 0 }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 14px; margin: 14px 0 }
.pair .card { margin: 0 }
.text, .tokens { white-space: pre-wrap; overflow-wrap: anywhere }
.tokens { font: 15px/2.1 ui-monospace, monospace }
.t { background: color-mix(in oklab, var(--hot) calc(var(--t) * 100%), var(--card)); border-radius: 3px; padding: 3px 1px;
     box-shadow: 0 0 0 1px var(--line); cursor: default }
.masked { color: var(--ink); white-space: pre; box-shadow: none; outline: 2px dashed var(--ink) }
.t:focus, .t.twin, .t:hover { box-shadow: 0 0 0 4px #0072b2 } .t:not(.masked):focus { outline: none }
.scale { height: 14px; border: 1px solid var(--line); border-radius: 3px;
         background: linear-gradient(to right in oklab, var(--card), var(--hot)) }
.ticks { display: flex; justify-content: space-between; font-size: 12px; color: var(--soft) }
.scale, .ticks { max-width: 460px }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } td, th { padding: 2px 14px 2px 0; text-align: left }
th { font-weight: 400; color: var(--soft) } .n { text-align: right }
td.own { font-weight: 700; background: var(--line) } #tip td { padding: 1px 10px 1px 4px }
#tip { position: absolute; top: 0; left: 0; z-index: 1; background: var(--card); border: 1px solid var(--soft);
       border-radius: 6px; padding: 8px 12px; box-shadow: 0 4px 16px #0005; font-size: 13px; max-width: 480px }
#tip td { font-family: ui-monospace, monospace }
"""
# The tooltip is filled with textContent only, so that no token can become markup. Left and right walk along the tokens.
SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent), tip = document.getElementById("tip");
const make = (tag, text, kind) => Object.assign(document.createElement(tag), {textContent: text, className: kind || ""});
const twins = token => document.querySelectorAll(`[data-m="${token.dataset.m}"]`);
function fill(token) {
  const [text, line, guided, alone] = data[token.dataset.view][token.dataset.m - 1], table = make("table", "");
  tip.replaceChildren(make("b", text), make("div", line), table);
  table.append(make("tr", ""));
  for (const name of ["with strategy", "p", "alone", "p"]) table.rows[0].append(make("th", name));
  guided.forEach((row, k) => {
    table.append(make("tr", ""));
    for (const [name, p, own] of [row, alone[k]])
      table.rows[k + 1].append(make("td", name, own ? "own" : ""), make("td", p, own ? "n own" : "n"));
  });
}
function show(token) {
  hide(); fill(token); tip.hidden = false;
  const box = token.getBoundingClientRect(), room = document.documentElement;
  const left = Math.min(box.left, room.clientWidth - tip.offsetWidth - 8);
  const below = box.bottom + 6 + tip.offsetHeight <= room.clientHeight || box.top < tip.offsetHeight + 6;
  tip.style.left = Math.max(8, left) + scrollX + "px";
  tip.style.top = (below ? box.bottom + 6 : box.top - tip.offsetHeight - 6) + scrollY + "px";
  token.setAttribute("aria-describedby", "tip");
  for (const one of twins(token)) one.classList.add("twin");
}
function hide() {
  tip.hidden = true;
  for (const one of document.querySelectorAll(".twin")) one.classList.remove("twin"), one.removeAttribute("aria-describedby");
}
const tokens = [...document.querySelectorAll(".t[data-m]")];
for (const [k, token] of tokens.entries()) {
  for (const name of ["mouseenter", "focus"]) token.addEventListener(name, () => show(token));
  for (const name of ["mouseleave", "blur"]) token.addEventListener(name, hide);
  token.addEventListener("click", () => history.replaceState(null, "", "#" + token.id));
  token.addEventListener("keydown", event => {
    if (event.key === "Escape") hide();
    const next = tokens[k + {ArrowRight: 1, ArrowLeft: -1}[event.key]];
    if (next) { event.preventDefault(); next.focus(); }
  });
}
const go = () => document.getElementById(location.hash.slice(1))?.focus();
addEventListener("hashchange", go); go();
"""


def visible(text: str, blanks: bool) -> str:
    """A token's text with line ends, tabs and what does not print made visible; blanks too, or where there is nothing else."""
    text = text.replace("\n", "⏎").replace("\t", "⇥")
    if blanks or not text.strip(" ⏎⇥"):
        text = text.replace(" ", "␣")
    # isprintable is False for control and formatting characters: one that reverses the direction would garble the page
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


def token_html(token: Mapping[str, Any], view: int, m: int, delta: float) -> str:
    """One token as a focusable span: --t in [0, 1] is sqrt(d_t / delta), its place on the colour scale."""
    place = math.sqrt(min(max(token["divergence"], 0.0), delta) / delta)  # rounding can leave d_t a little below 0
    name = "token" if view == 0 else "after"
    attributes = f'class="t{"" if token["kept"] else " masked"}" style="--t:{place:.3f}" data-view="{view}" data-m="{m}"'
    text = escape(visible(token["text"], blanks=False))
    # the line ends themselves stand behind the span, so that the lines of the response stay lines
    return f'{token["blank"]}<span {attributes} id="{name}-{m}" tabindex="0">{text}</span>' + "\n" * token["text"].count("\n")


def tip_data(token: Mapping[str, Any], m: int, count: int, delta: float) -> list[Any]:
    """The tooltip of one token: [heading, line, next tokens guided, next tokens alone], each (text, p, is it this)."""
    verdict = f"kept (≤ {delta:g})" if token["kept"] else f"dropped by the KL clip (> {delta:g})"
    guided, alone = (_probability(math.exp(token[name])) for name in ("logp_guided", "logp_auto"))
    line = f"d = {token['divergence']:.4f} nats, {verdict}; p = {guided} with strategy, {alone} alone"
    tops = [
        [(visible(text, blanks=True), _probability(p), one == token["id"]) for one, text, p in token[side]]
        for side in ("top_guided", "top_auto")
    ]
    return [f"token {m} of {count}: {visible(token['text'], blanks=True)}", line, *tops]


def _probability(p: float) -> str:
    return f"{p:.4f}" if p >= 0.0001 else f"{p:.0e}"


def totals_html(views: Sequence[Mapping[str, Any]]) -> str:
    """The summary: a row a number, a column a model."""
    rows = {
        "length of o⁺, tokens": ("tokens", "d"),
        "sum of d, nats": ("divergence_sum", ".4f"),
        "mean of d": ("divergence_mean", ".4f"),
        "kept by the KL clip": ("kept", ".1%"),
        "clipped loss, (1/|o⁺|) Σ kept d": ("loss", ".4f"),
        "log π(o⁺ | q, s), with strategy": ("logp_guided", ".3f"),
        "log π(o⁺ | q), alone": ("logp_auto", ".3f"),
        "p_guide, sampled": ("p_guide", ".3f"),
        "p_auto, sampled": ("p_auto", ".3f"),
    }
    cells = ["<tr><th></th>" + "".join(f'<th class="n">{escape(view["name"])}</th>' for view in views) + "</tr>"]
    for name, (key, form) in rows.items():
        values = "".join(f'<td class="n">{view["totals"][key]:{form}}</td>' for view in views)
        cells.append(f"<tr><th>{escape(name)}</th>{values}</tr>")
    return "<table>" + "".join(cells) + "</table>"


def page_html(page: Mapping[str, Any]) -> str:
    """The whole page from plain data; a pure function. Every text that comes from outside is escaped.

    page: "problem" (eval.Problem), "delta", "settings" (a text), and "views": one or two of {"name", "model",
    "tokens" (token_map's), "totals" (those of `totals`, p_auto, p_guide)}, over the same token ids.
    """
    problem, delta, views = page["problem"], page["delta"], page["views"]
    steps = "".join(f"<li>{escape(step)}</li>" for step in problem.strategy.steps)
    ticks = "".join(f"<span>{delta * (k / 5) ** 2:.3g}</span>" for k in range(6))  # even steps of a square-root scale
    tips = [[tip_data(token, m, len(v["tokens"]), delta) for m, token in enumerate(v["tokens"], 1)] for v in views]
    maps = []
    for index, view in enumerate(views):
        spans = "".join(token_html(token, index, m, delta) for m, token in enumerate(view["tokens"], start=1))
        head = f'<h2>{escape(view["name"])} <span class="soft">{escape(view["model"])}</span></h2>'
        maps.append(f'<section class="card">{head}<div class="tokens">{spans}</div></section>')
    data = json.dumps(tips, ensure_ascii=False).replace("<", "\\u003c")  # a token "</script>" must not end the script
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Token map: {escape(problem.id)}</title><style>{STYLE}</style></head><body>
<h1>Token map <span class="soft">{escape(problem.id)}</span></h1>
<p class="soft">d<sub>t</sub> = KL( π(·|q, s, o⁺<sub>&lt;t</sub>) ‖ π(·|q, o⁺<sub>&lt;t</sub>) ): how far the strategy s in the
prompt moves the next token. Point at a token, or tab to it and walk with the arrow keys.</p>
<div class="pair"><section class="card"><h2>Problem q</h2><div class="text">{escape(problem.problem)}</div>
<p class="soft">reference answer: {escape(problem.answer)}</p></section>
<section class="card"><h2>Strategy s <span class="soft">{escape(problem.strategy.type)}</span></h2>
<p>{escape(problem.strategy.strategy)}</p><ol>{steps}</ol></section></div>
<section class="card"><div class="scale"></div><div class="ticks">{ticks}</div>
<p class="soft">d<sub>t</sub> in nats, square-root scale up to δ = {delta:g};
<span class="t masked" style="--t:1">dashed outline</span> is above δ and dropped by the KL clip</p></section>
{"".join(maps)}
<section class="card">{totals_html(views)}</section>
<p class="soft">o⁺: the correct guided response that is most probable alone, sampled at temperature 1 from the first model.
{escape(page["settings"])}</p>
<div id="tip" role="tooltip" hidden></div>
<script type="application/json" id="data">{data}</script>
<script>{SCRIPT}</script></body></html>
"""


# ---------------------------------------------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    options = {"allow_abbrev": False, "formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], **options)
    commands = parser.add_subparsers(dest="command", required=True)
    curves = commands.add_parser("curves", help="training curves, one line a method, mean and band over seeds", **options)
    curves.add_argument("groups", nargs="+", metavar="GROUP", help="FOLDER or LABEL=FOLDER with the runs of one method")
    curves.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    curves.add_argument("--only", nargs="+", choices=(*PANELS, "overview"), help="only these pictures; None: all")
    curves.add_argument("--smooth", type=int, default=5, help="trailing mean over so many steps; 1: none")
    curves.add_argument("--dpi", type=int, default=150, help="of the PNGs")
    rows = commands.add_parser("rows", help="one column of a sweep's csv, every row with its seeds", **options)
    rows.add_argument("csv", type=Path, help="table.csv, knobs.csv or hard.csv of sweep.py")
    rows.add_argument("--column", default="accuracy", help="which column")
    rows.add_argument("--out", type=Path, required=True, help="the picture without its ending; .png and .svg are added")
    rows.add_argument("--dpi", type=int, default=150, help="of the PNG")
    growth = commands.add_parser("growth", help="how the cost grows, from a report of bench.py --only growth", **options)
    growth.add_argument("json", type=Path, help="the report")
    growth.add_argument("--out", type=Path, required=True, help="the picture without its ending; .png and .svg are added")
    growth.add_argument("--dpi", type=int, default=110, help="of the PNG")
    page = commands.add_parser("bench", help="all reports of bench.py in one Markdown page", **options)
    page.add_argument("folder", type=Path, help="folder with the JSON files that bench.py wrote, whatever their names")
    page.add_argument("--out", type=Path, required=True, help="the page to write")
    tokens = commands.add_parser("tokens", help="token map of one problem's reachable target, as an HTML page", **options)
    divergence = commands.add_parser("divergence", help="mean d_t of every token over many problems, as a csv", **options)
    for command in (tokens, divergence):
        command.add_argument("--data", required=True, help="jsonl file of problems with strategies")
        command.add_argument("--id", help="the problem; None: the first with a correct guided response, or all of them")
        command.add_argument("--model", required=True, help="model folder or hub name")
        command.add_argument("--out", type=Path, required=True, help="the file to write")
        command.add_argument("--delta", type=float, default=1.0, help="of the KL clip, in nats; the colours end there too")
        command.add_argument("--seed", type=int, default=0, help="of the sampling")
        command.add_argument("--group_guided", type=int, default=4, help="guided responses, for p_guide and the target")
        command.add_argument("--max_new_tokens", type=int, default=2048, help="longest response, cut to the context")
        command.add_argument("--device", default="auto", help="auto takes cuda where there is one, else cpu")
    tokens.add_argument("--after", help="the trained model, to compare on the same tokens")
    tokens.add_argument("--group_auto", type=int, default=8, help="responses alone, for p_auto")
    tokens.add_argument("--top", type=int, default=5, help="next tokens to list")
    divergence.add_argument("--problems", type=int, default=100, help="the first so many with a correct guided response")
    return parser


def main(arguments: Sequence[str] | None = None) -> Any:
    args = build_parser().parse_args(arguments)
    commands = {"curves": write_curves, "rows": write_rows, "growth": write_growth, "bench": write_bench}
    commands |= {"tokens": write_tokens, "divergence": write_divergence}
    return commands[args.command](args)


if __name__ == "__main__":
    try:
        main()
    except ValueError as problem_with_input:
        sys.exit(f"report.py: {problem_with_input}")
