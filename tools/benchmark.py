"""The paper's benchmarks and its table, and the comparison of two models: eval.py's --benchmarks, --table and --compare.

The intervals are over problems: how far other problems of the kind would move a figure. They do not say what another training
run would give. Two trainings that differ in nothing but their seed may differ by more.
"""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.prepare import BENCHMARKS as PROBLEMS  # {name: number of problems}

# ---------------------------------------------------------------------------------------------------- the paper's benchmarks


# {name of the file that data/prepare.py writes: samples a problem} [§4.2]; AIME25 and Minerva, which the paper's table does not
# have, get the number of the benchmarks that are most like them [ours]
BENCHMARKS = {
    "math500": 4,
    "amc23": 32,
    "olympiad": 4,
    "aime24": 32,
    "aime25": 32,
    "minerva": 4,
}
COLUMNS = {  # of the paper's table
    "math500": "MATH500",
    "amc23": "AMC23",
    "olympiad": "Olympiad",
    "aime24": "AIME24",
}
# "up to 32K tokens" [§4.2]: a cap, because a context of 32,768 has less room than that after the prompt
PAPER_SETTINGS = {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 32_768}


def benchmark_files(folder: str) -> list[tuple[str, int, int]]:
    """(file, the paper's n, longest response) of each benchmark in the folder. ValueError if there is none, or another file."""
    files = {file.stem: str(file) for file in sorted(Path(folder).glob("*.jsonl"))}
    unknown = sorted(files.keys() - BENCHMARKS.keys())
    if unknown:
        raise ValueError(f"{folder}: {unknown[0]}.jsonl is none of {', '.join(BENCHMARKS)}; name the files with --data instead")
    if not files:
        raise ValueError(f"{folder}: no folder with {'.jsonl, '.join(BENCHMARKS)}.jsonl (data/prepare.py writes them)")
    return [(files[name], n, PAPER_SETTINGS["max_new_tokens"]) for name, n in BENCHMARKS.items() if name in files]


def read_results(path: str) -> dict:
    """A result file of eval.py; ValueError if it is something else."""
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
        if all("correct" in part and "data_sha256" in part for part in results["files"].values()) and results["config"]:
            return results
        raise ValueError("it has no number of correct samples per problem")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a results file of eval.py ({type(error).__name__}: {error})") from None


# ---------------------------------------------------------------------------------------------------- two models

RESAMPLES = 10_000


def paired_bootstrap(a: Sequence[int], b: Sequence[int], n: int, *, seed: int | Sequence[int]) -> tuple[dict, np.ndarray]:
    """avg@n of b minus that of a: ({"difference", "low", "high"}, the difference in each of RESAMPLES draws of problems).

    a, b: (P,) correct samples of n, of the same problems in the same order. A problem is drawn for both at once, which takes
    the spread of its difficulty out of the interval.
    """
    change, generator = np.subtract(b, a, dtype=np.int64), np.random.default_rng(seed)
    P = len(change)
    # sums of whole numbers are exact, so a difference of zero is exactly zero
    sums = [change[generator.integers(P, size=P)].sum() for _ in range(RESAMPLES)]
    draws = np.array(sums) / (n * P)
    return {"difference": float(change.mean() / n), **interval(draws)}, draws


def interval(draws: np.ndarray) -> dict[str, float]:
    """The 95 % percentile interval of bootstrap draws."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return {"low": float(low), "high": float(high)}


SETTINGS = ("n", "max_new_tokens", "temperature", "top_p")


def compare_files(a: str, b: str, *, seed: int) -> list[dict]:
    """`eval.py --compare`: print and return the rows of `compare` for two result files."""
    rows = compare(read_results(a), read_results(b), (a, b), seed=seed)
    print(f"B minus A, 95 % interval over problems ({RESAMPLES:,} paired resamples)\nA: {a}\nB: {b}")
    for row in rows:
        of_a, of_b, change, low, high = (100 * row[name] for name in ("a", "b", "difference", "low", "high"))
        figures = f"A {of_a:.1f}  B {of_b:.1f}  difference {change:+.1f} [{low:+.1f}, {high:+.1f}]"
        print(f"{row['file']}{' guided' * row['guided']}: {figures}  problems {row['problems']}")
    return rows


def compare(a: dict, b: dict, names: tuple[str, str] = ("A", "B"), *, seed: int = 0) -> list[dict]:
    """The paired differences of two result files, b minus a: a row per problem file, without strategies and with them.

    If there are several files, a last row has their average: the mean of the differences, each file resampled by itself.

    ValueError if the two do not have the same files (by checksum, whatever their names), problems, n, temperature, top_p and
    longest response. Seeds, data types and machines may differ.
    """
    parts_a, parts_b = _parts(a), _parts(b)
    _comparable(parts_a, parts_b, names)
    rows, draws = [], {False: [], True: []}
    for index, ((checksum, guided), x) in enumerate(parts_a.items()):
        y = parts_b[checksum, guided]
        counts = [[part["correct"][problem] for problem in sorted(x["correct"])] for part in (x, y)]
        # a seed per file: files of equal length would otherwise draw the same places, and their differences move together
        row, drawn = paired_bootstrap(*counts, x["n"], seed=[seed, index])
        figures = {"a": x["accuracy"], "b": y["accuracy"], "problems": x["problems"]}
        rows.append({"file": x["file"], "guided": guided} | figures | row)
        draws[guided].append(drawn)
    for guided, drawn in draws.items():
        if len(drawn) > 1:
            single = [row for row in rows if row["guided"] == guided]
            row = {"file": "average of the files", "guided": guided, "problems": sum(row["problems"] for row in single)}
            means = {name: statistics.fmean(row[name] for row in single) for name in ("a", "b", "difference")}
            rows.append(row | means | interval(np.mean(drawn, axis=0)))
    return rows


def _comparable(a: dict, b: dict, names: tuple[str, str]) -> None:
    for key in sorted(a.keys() ^ b.keys()):
        file = f"{(a | b)[key]['file']} {'with' if key[1] else 'without'} strategies"
        raise ValueError(f"cannot be compared: {file} is in {names[key in b]} only (files are known by their checksum)")
    for key, x in a.items():
        y = b[key]
        for name in SETTINGS:
            if x[name] != y[name]:
                raise ValueError(f"cannot be compared: {x['file']} has {name} {x[name]} in {names[0]}, {y[name]} in {names[1]}")
        if odd := x["correct"].keys() ^ y["correct"].keys():
            raise ValueError(f"cannot be compared: problem {min(odd)!r} of {x['file']} is in one of {' and '.join(names)} only")


def _parts(results: dict) -> dict[tuple[str, bool], dict]:
    """{(checksum of the file, guided): its figures, with its name and settings} of one result file."""
    parts = {}
    for file, figures in results["files"].items():
        about = {name: results["config"][name] for name in ("temperature", "top_p")}
        about |= {"file": file, "max_new_tokens": figures["max_new_tokens"]}
        parts[figures["data_sha256"], results["config"]["guided"]] = figures | about
        if "guided" in figures:
            parts[figures["data_sha256"], True] = figures["guided"] | about
    return parts


# ---------------------------------------------------------------------------------------------------- the paper's table

# the paper's own figures (arXiv 2606.24064), per cent: {model: {method: the columns, and their average}}
PAPER_ROWS = json.loads(Path(__file__).with_name("paper_table.json").read_text(encoding="utf-8"))
PAPER_NOTE = (
    "[paper]: the paper's own figures (arXiv 2606.24064), not measured here: avg@4 on MATH500 and Olympiad, avg@32 on AMC23 "
    "and AIME24, temperature 0.6, top_p 0.95, up to 32K tokens.\n"
    "[paper]: Llama-3.2-8B-Instruct is the name as printed; the public model of that size is Llama-3.1-8B-Instruct. Its LUFFY "
    "row averages 26.6, printed is 26.5."
)


def table_of_files(paths: Sequence[str]) -> str:
    """`eval.py --table`: print and return the table of result files."""
    text = table([read_results(path) for path in paths])
    print(text)
    return text


def table(results: Sequence[dict]) -> str:
    """Markdown in the paper's layout: a row per result, the paper's rows, and below them what differs from its settings.

    Per cent, ± the standard error over problems. The average is over the four benchmarks, and left out if one is missing.
    """
    lines = ["| model | " + " | ".join(COLUMNS.values()) + " | avg |", "|---" * 6 + "|"]
    notes = []
    for result in results:
        parts = _parts(result)
        for guided in sorted({guided for _, guided in parts}):
            model = f"{result['config']['model']}{', guided' * guided}"
            group = [part for (_, other), part in parts.items() if other == guided]
            found = {Path(part["file"]).stem: part for part in group}
            if len(found) < len(group):
                raise ValueError(f"{model}: two files have one name, but the table has one place for it")
            lines.append(f"| {model} | {' | '.join(_cells(found))} |")
            notes += [f"{model}: {note}" for note in _differences(found, guided)]
    for model, methods in PAPER_ROWS.items():
        for method, figures in methods.items():
            lines.append(f"| {model}, {method} [paper] | {' | '.join(f'{figure:.1f}' for figure in figures)} |")
    return "\n".join([*lines, "", PAPER_NOTE, *notes])


def _cells(found: dict[str, dict]) -> list[str]:
    def cell(value: float, error: float | None) -> str:
        return f"{100 * value:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")

    four = [found[name] for name in COLUMNS if name in found]
    cells = [cell(found[name]["accuracy"], found[name]["standard_error"]) if name in found else "–" for name in COLUMNS]
    if len(four) < len(COLUMNS):
        return [*cells, "–"]
    errors = [figures["standard_error"] for figures in four]
    spread = None if None in errors else math.hypot(*errors) / len(four)  # four independent sets of problems
    return [*cells, cell(statistics.fmean(figures["accuracy"] for figures in four), spread)]


def _differences(found: dict[str, dict], guided: bool) -> list[str]:
    """What a reader must know before comparing these figures with the paper's."""
    notes = ["with strategies in the prompts, the paper evaluates without"] if guided else []
    for name, figures in found.items():
        if name not in COLUMNS:
            notes.append(f"{name} {100 * figures['accuracy']:.1f} (avg@{figures['n']}) has no column in the paper's table")
            continue
        wanted = PAPER_SETTINGS | {"n": BENCHMARKS[name], "problems": PROBLEMS[name]}
        other = [f"{key} {figures[key]} (paper {value})" for key, value in wanted.items() if figures[key] != value]
        if other:
            notes.append(f"{COLUMNS[name]} differs from the paper in {', '.join(other)}")
    return notes
