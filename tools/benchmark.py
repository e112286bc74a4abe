"""The figures of an evaluation: what the verdicts on P problems with n samples each say, how surely, and in which layout.

Pure functions of verdicts and of the result files that eval.py writes; no model, no text, no grader. Imports no sibling and
needs numpy only: copy this file alone. eval.py calls it; there is no command of its own.

    summarise         avg@n with its standard error, pass@k, maj@n, truncation, length
    majority          the vote over the answers to one problem
    compare           two models on the same problems: the paired difference with a 95 % interval
    guidance          without a strategy against with one, problem by problem
    table             results beside the paper's own, in its layout

What it is not: a test of significance over training runs. The intervals are over problems: how far another draw of problems
of the kind would move a figure. Two trainings that differ in their seed alone may differ by more.
"""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

# ---------------------------------------------------------------------------------------------------- one model


def summarise(
    correct: Sequence[Sequence[bool]],
    length: Sequence[Sequence[int]],
    truncated: Sequence[Sequence[bool]],
    majority: Sequence[bool] | None = None,
) -> dict:
    """The figures of P problems with n samples each; the first three arguments are (P, n) nested lists, else a ValueError.

    majority        (P,): whether the answer that won the vote is right; adds maj_at_n, the share of problems where it is

    accuracy        avg@n: mean over all samples, in [0, 1]
    standard_error  of the accuracy over problems: unbiased standard deviation of the per-problem means / sqrt(P); None
                    for P = 1. How far other problems of the kind might move the figure, not how far another seed would
    pass_at         {"1": ..., "2": ..., "4": ..., "n": ...}: pass@k for the powers of two below n, and n (strings: JSON's keys)
    pass_at_n       its last one: the share of problems with at least one correct sample
    truncation      share of samples that were cut off
    tokens          mean response length, the end token included
    """
    shapes = [[len(row) for row in table] for table in (correct, length, truncated)]
    if not correct or not correct[0] or any(shape != [len(correct[0])] * len(correct) for shape in shapes):
        raise ValueError(f"expected three (P, n) lists, P and n at least 1, got rows of {shapes}")
    if majority is not None and len(majority) != len(correct):
        raise ValueError(f"expected a vote for each of {len(correct)} problems, got {len(majority)}")
    n, counts = len(correct[0]), [sum(map(bool, row)) for row in correct]
    means = [count / n for count in counts]
    pass_at = {str(k): statistics.fmean(pass_at_k(n, c, k) for c in counts) for k in sample_counts(n)}
    return {
        "accuracy": statistics.fmean(means),
        "standard_error": statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None,
        "pass_at": pass_at,
        "pass_at_n": pass_at[str(n)],
        **({} if majority is None else {"maj_at_n": statistics.fmean(map(bool, majority))}),
        "truncation": statistics.fmean(cut for row in truncated for cut in row),
        "tokens": statistics.fmean(count for row in length for count in row),
        "problems": len(correct),
        "n": n,
    }


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n samples, drawn without replacement, hold one of the c correct ones: 1 - C(n-c, k) / C(n, k).

    The unbiased estimate of pass@k (Chen et al. 2021, arXiv 2107.03374). 1 - (1 - c/n)^k, which is the same for k = 1 only,
    is too low for any other. Integers up to the last division, so large n cannot overflow.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {n} samples with {c} correct: expected 0 <= c <= n and 1 <= k <= n")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def sample_counts(n: int) -> list[int]:
    """The k of which pass@k is stated: 1, 2, 4, ... below n, and n."""
    return [2**i for i in range((n - 1).bit_length())] + [n]


def majority(answers: Sequence[str | None], same: Callable[[str, str], bool | None]) -> int | None:
    """The index of the first sample that gave the answer with the most votes; None where no sample gave an answer.

    answers  one per sample in sampling order, None for a sample without an answer: it does not vote
    same     (answer, reference) -> whether they are equal; None: no verdict, that answer then stands alone

    In sampling order, an answer joins the first group whose first member it equals. Of groups with equally many votes the one
    that was opened first wins: deterministic, and blind to which is right. Equality as a grader sees it is not transitive
    (50, 50 %, 0.5), which is why only first members are compared. The same text is never compared twice, so n samples with m
    distinct answers cost at most m (m - 1) / 2 questions. Measured at m = 32, 496 questions, on a busy core: 0.02 s for plain
    numbers, 9.6 s for expressions, all of which went to math-verify.
    """
    group_of: dict[str, int] = {}  # text -> the index of the first sample of its group
    firsts: list[int] = []
    votes: Counter[int] = Counter()
    for index, answer in enumerate(answers):
        if answer is None:
            continue
        if answer not in group_of:
            group_of[answer] = _group(answer, index, firsts, answers, same)
            if group_of[answer] == index:
                firsts.append(index)
        votes[group_of[answer]] += 1
    return max(firsts, key=lambda first: (votes[first], -first), default=None)


def _group(answer: str, index: int, firsts: list[int], answers: Sequence[str | None], same: Callable) -> int:
    for first in firsts:
        verdict = same(answer, answers[first])
        if verdict is None:  # after one question that ran out of time no more are asked: n such answers cost n limits, not n^2
            return index
        if verdict:
            return first
    return index


# ---------------------------------------------------------------------------------------------------- two models

RESAMPLES = 10_000


def bootstrap_means(values: Sequence[int], *, seed: int | Sequence[int], resamples: int = RESAMPLES) -> np.ndarray:
    """(resamples,): the mean of P values drawn with replacement from the P given, again and again, in float64.

    values are whole numbers, so that their sums are exact and a mean of zero is exactly zero.
    """
    values, generator = np.asarray(values, dtype=np.int64), np.random.default_rng(seed)
    P = len(values)
    sums = np.empty(resamples, dtype=np.int64)
    rows = max(1, 2**22 // P)  # 32 MB of indices at once
    for start in range(0, resamples, rows):
        part = sums[start : start + rows]
        part[:] = values[generator.integers(P, size=(len(part), P))].sum(axis=1)
    return sums / P


def interval(draws: np.ndarray) -> dict:
    """Of bootstrap draws of a difference: low and high, the 95 % percentile interval, and p, twice the share of draws at or
    beyond zero on the side with fewer, at most 1. p reads like a two-sided p-value; 0 says only "less than 2 / draws".
    """
    low, high = np.percentile(draws, [2.5, 97.5])
    tail = min(np.mean(draws <= 0), np.mean(draws >= 0))
    return {"low": float(low), "high": float(high), "p": float(min(1.0, 2 * tail))}


def paired_difference(a: Sequence[int], b: Sequence[int], n: int, *, seed: int | Sequence[int]) -> tuple[dict, np.ndarray]:
    """({"difference", "low", "high", "p"}, the draws) of avg@n of b minus that of a, from both one's number of correct samples
    a problem, in the same order of problems. Problems are resampled in pairs, which takes their difficulty out of the spread.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"a paired difference needs the same problems twice, got {len(a)} and {len(b)}")
    change = np.subtract(b, a, dtype=np.int64)
    draws = bootstrap_means(change, seed=seed) / n
    return {"difference": float(change.mean() / n), **interval(draws)}, draws


SETTINGS = ("n", "max_new_tokens", "temperature", "top_p")


def compare(a: dict, b: dict, names: tuple[str, str] = ("A", "B"), *, seed: int = 0) -> list[dict]:
    """Rows of paired differences, b minus a, of two result files: one per problem file and group, and a group's average where
    it has several files (the mean of their differences, each file resampled by itself).

    ValueError where they are not about the same: files (told by their checksums, not by their names), problems, n, temperature,
    top_p, longest response, with or without strategies. Seeds, data types and the machine may differ: they belong to a model.
    """
    parts_a, parts_b = _parts(a), _parts(b)
    _comparable(parts_a, parts_b, names)
    rows, draws = [], {False: [], True: []}
    for index, ((checksum, guided), x) in enumerate(parts_a.items()):
        y = parts_b[checksum, guided]
        counts = [[part["correct"][problem] for problem in sorted(x["correct"])] for part in (x, y)]
        # by place: two files of equal length must not draw the same problems, their differences would move together
        row, drawn = paired_difference(*counts, x["n"], seed=[seed, index])
        figures = {"a": x["accuracy"], "b": y["accuracy"], "problems": x["problems"]}
        rows.append({"file": x["file"], "guided": guided} | figures | row)
        draws[guided].append(drawn)
    for guided, drawn in draws.items():
        if len(drawn) > 1:
            own = [row for row in rows if row["guided"] == guided]
            row = {"file": "average of the files", "guided": guided, "problems": sum(row["problems"] for row in own)}
            means = {name: statistics.fmean(row[name] for row in own) for name in ("a", "b", "difference")}
            rows.append(row | means | interval(np.mean(drawn, axis=0)))
    return rows


def _comparable(a: dict, b: dict, names: tuple[str, str]) -> None:
    for own, others, name, other in ((a, b, *names), (b, a, *names[::-1])):
        for (checksum, guided), part in own.items():
            if (checksum, guided) not in others:
                how = "with" if guided else "without"
                raise ValueError(
                    f"cannot be compared: {part['file']} {how} strategies is in {name}; {other} has no file of that checksum, "
                    "evaluated in that way"
                )
    for key, x in a.items():
        y = b[key]
        for name in SETTINGS:
            if x[name] != y[name]:
                raise ValueError(f"cannot be compared: {x['file']} has {name} {x[name]} in {names[0]}, {y[name]} in {names[1]}")
        if odd := x["correct"].keys() ^ y["correct"].keys():
            raise ValueError(f"cannot be compared: problem {min(odd)!r} of {x['file']} is in one of {' and '.join(names)} only")


def _parts(results: dict) -> dict[tuple[str, bool], dict]:
    """{(checksum of the file, guided): figures with file and settings} of one result file."""
    parts = {}
    for file, figures in results["files"].items():
        own = {name: results["config"][name] for name in ("temperature", "top_p")}
        own |= {"file": file, "max_new_tokens": figures["max_new_tokens"]}
        parts[figures["data_sha256"], results["config"]["guided"]] = figures | own
        if "guided" in figures:
            parts[figures["data_sha256"], True] = figures["guided"] | own
    return parts


def comparison_lines(rows: Sequence[dict], names: tuple[str, str]) -> list[str]:
    """compare()'s rows for people, in per cent."""
    lines = [f"B minus A, 95 % interval over problems ({RESAMPLES:,} paired resamples)", f"A: {names[0]}", f"B: {names[1]}"]
    for row in rows:
        a, b, change, low, high = (100 * row[name] for name in ("a", "b", "difference", "low", "high"))
        p = f"p {row['p']:.4f}" if row["p"] else f"p below {2 / RESAMPLES:.4f}"
        lines.append(
            f"{row['file']}{' guided' * row['guided']}: A {a:.1f}  B {b:.1f}  difference {change:+.1f} "
            f"[{low:+.1f}, {high:+.1f}]  {p}  problems {row['problems']}"
        )
    return lines


# ---------------------------------------------------------------------------------------------------- guidance


def guidance(
    auto: Sequence[int], guided: Sequence[int], n: int, alpha: Sequence[float], families: Sequence[str], *, seed: int = 0
) -> dict:
    """What a strategy in the prompt changes: {"overall": figures, "families": {family: figures}}.

    auto, guided  each problem's number of correct samples of n without and with its strategy, both (P,)
    alpha         (P,): the weight alpha(q) that these pass rates give (weighting.instance_weight)
    families      (P,): a problem's family. One that occurs once says nothing by itself: such problems share the row "(other)".
                  Where none occurs twice, families is empty

    Figures: p_auto, p_guide, the shares of problems that guidance helps, hurts and leaves as they were, mean alpha; overall
    also the paired difference with its interval. The shares hold the noise of n samples: where guidance does nothing at all, as
    many problems look helped as hurt, so only the one minus the other is a signal.
    """

    def figures(chosen: Sequence[int]) -> dict:
        P = len(chosen)
        return {
            "problems": P,
            "p_auto": sum(auto[i] for i in chosen) / (n * P),
            "p_guide": sum(guided[i] for i in chosen) / (n * P),
            "helps": sum(guided[i] > auto[i] for i in chosen) / P,
            "hurts": sum(guided[i] < auto[i] for i in chosen) / P,
            "same": sum(guided[i] == auto[i] for i in chosen) / P,
            "alpha": sum(alpha[i] for i in chosen) / P,
        }

    if not len(auto) == len(guided) == len(alpha) == len(families):
        raise ValueError(f"expected one value a problem, got {[len(x) for x in (auto, guided, alpha, families)]}")
    counts, members = Counter(families), {}
    for index, family in enumerate(families):
        members.setdefault(family if counts[family] > 1 else "(other)", []).append(index)
    if max(counts.values()) == 1:
        members = {}
    overall = figures(range(len(auto))) | paired_difference(auto, guided, n, seed=seed)[0]
    return {"overall": overall, "families": {family: figures(members[family]) for family in sorted(members)}}


def guidance_lines(result: dict) -> list[str]:
    """guidance()'s figures for people, in per cent but for alpha."""

    def line(name: str, f: dict) -> str:
        p_auto, p_guide, helps, hurts, same = (100 * f[key] for key in ("p_auto", "p_guide", "helps", "hurts", "same"))
        return (
            f"  {name}: p_auto {p_auto:.1f}  p_guide {p_guide:.1f}  helps {helps:.1f} %  hurts {hurts:.1f} %  "
            f"same {same:.1f} %  alpha {f['alpha']:.3f}  problems {f['problems']}"
        )

    overall = result["overall"]
    change, low, high = (100 * overall[name] for name in ("difference", "low", "high"))
    first = f"{line('guidance', overall)}  difference {change:+.1f} [{low:+.1f}, {high:+.1f}]"
    return [first, *(line(name, figures) for name, figures in result["families"].items())]


# ---------------------------------------------------------------------------------------------------- the paper's table


@dataclass(frozen=True)
class Benchmark:
    """title: the paper's column, or ours. n: samples a problem. problems: how many it has."""

    title: str
    n: int
    problems: int


# By the name of the file that data/prepare.py writes. n [§4.2]; AIME25 and Minerva, which the paper's table does not have, as
# their likes.
BENCHMARKS = {
    "math500": Benchmark("MATH500", 4, 500),
    "amc23": Benchmark("AMC23", 32, 40),
    "olympiad": Benchmark("Olympiad", 4, 674),
    "aime24": Benchmark("AIME24", 32, 30),
    "aime25": Benchmark("AIME25", 32, 30),
    "minerva": Benchmark("Minerva", 4, 272),
}
COLUMNS = ("math500", "amc23", "olympiad", "aime24")
# "Up to 32K tokens" [§4.2]; a model with a context of 32,768 has less room than that behind its prompt, so it is a cap.
PAPER_SETTINGS = {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 32_768}
# The paper's own figures (arXiv 2606.24064), per cent: MATH500, AMC23, Olympiad, AIME24, average.
PAPER_ROWS = {
    "Qwen2.5-1.5B-Instruct": {
        "base": (50.1, 21.3, 18.4, 3.0, 23.2),
        "SFT": (48.4, 19.7, 16.1, 4.7, 22.2),
        "SFT+GRPO": (54.1, 26.2, 21.7, 5.5, 26.9),
        "HPT": (53.8, 28.5, 22.6, 7.7, 28.2),
        "LUFFY": (54.4, 27.9, 23.1, 8.4, 28.5),
        "SGPO": (57.7, 29.0, 23.7, 9.0, 29.9),
    },
    "Qwen2.5-7B-Instruct": {
        "base": (75.2, 43.0, 38.8, 11.8, 42.2),
        "SFT": (76.4, 42.1, 40.0, 12.4, 42.7),
        "SFT+GRPO": (80.3, 52.7, 48.4, 18.0, 49.9),
        "HPT": (79.1, 53.5, 48.8, 17.0, 49.6),
        "LUFFY": (78.0, 53.0, 47.6, 16.4, 48.8),
        "SGPO": (82.7, 55.9, 50.0, 19.7, 52.1),
    },
    "Llama-3.2-8B-Instruct": {
        "base": (43.7, 20.3, 14.5, 3.0, 20.4),
        "SFT": (45.1, 21.7, 16.7, 6.0, 22.4),
        "SFT+GRPO": (50.0, 23.4, 19.3, 8.0, 25.2),
        "HPT": (51.3, 24.0, 20.1, 9.8, 26.3),
        "LUFFY": (50.7, 24.3, 21.9, 9.4, 26.5),
        "SGPO": (52.0, 25.6, 22.9, 10.0, 27.6),
    },
}
PAPER_NOTE = (
    "[paper]: the paper's own figures (arXiv 2606.24064), not measured here: avg@4 on MATH500 and Olympiad, avg@32 on AMC23 "
    "and AIME24, temperature 0.6, top_p 0.95, up to 32K tokens."
)
LLAMA_NOTE = (
    "[paper]: Llama-3.2-8B-Instruct is the name as printed; the public model of that size is Llama-3.1-8B-Instruct. Its LUFFY "
    "row averages 26.6, printed is 26.5."
)


def table(results: Sequence[dict]) -> str:
    """Markdown in the paper's layout: a row per result (and group), the paper's rows, and below what differs from its settings.

    Per cent, ± the standard error over problems. The average is over the four benchmarks, and stated where all four are there.
    The paper's rows are those of the models that occur in a result's model name or folder; if none does, of all.
    """
    lines = ["| model | " + " | ".join(BENCHMARKS[name].title for name in COLUMNS) + " | avg |", "|---" * 6 + "|"]
    notes = []
    for result in results:
        for guided in sorted({guided for _, guided in _parts(result)}):
            model = f"{result['config']['model']}{', guided' * guided}"
            found = _by_benchmark(result, guided, model)
            lines.append(f"| {model} | {' | '.join(_cells(found))} |")
            notes += [f"{model}: {note}" for note in _differences(found, guided)]
    shown = _paper_models(results)
    for model in shown:
        for method, figures in PAPER_ROWS[model].items():
            lines.append(f"| {model}, {method} [paper] | {' | '.join(f'{figure:.1f}' for figure in figures)} |")
    paper_notes = [PAPER_NOTE] + [LLAMA_NOTE] * ("Llama-3.2-8B-Instruct" in shown)
    if left_out := [model for model in PAPER_ROWS if model not in shown]:
        paper_notes.append(f"[paper]: the rows of {' and '.join(left_out)} are left out, no result is of a model of that name.")
    return "\n".join([*lines, "", *paper_notes, *notes])


def _paper_models(results: Sequence[dict]) -> list[str]:
    """The paper's models whose rows belong beside these results."""
    names = [result["config"]["model"].lower().replace("llama-3.1-8b", "llama-3.2-8b") for result in results]
    return [model for model in PAPER_ROWS if any(model.lower() in name for name in names)] or list(PAPER_ROWS)


def _by_benchmark(result: dict, guided: bool, model: str) -> dict[str, dict]:
    found = {}
    for (_, group), figures in _parts(result).items():
        if group == guided:
            stem = figures["file"].replace("\\", "/").rpartition("/")[2].removesuffix(".jsonl")
            if stem in found:
                raise ValueError(f"{model}: two files are called {stem}, the table has one place")
            found[stem] = figures
    return found


def _cells(found: dict[str, dict]) -> list[str]:
    def cell(value: float, error: float | None) -> str:
        return f"{100 * value:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")

    four = [found[name] for name in COLUMNS if name in found]
    cells = [cell(found[name]["accuracy"], found[name]["standard_error"]) if name in found else "–" for name in COLUMNS]
    if len(four) < len(COLUMNS):
        return [*cells, "–"]
    errors = [figures["standard_error"] for figures in four]
    spread = None if None in errors else math.hypot(*errors) / len(four)  # the four are independent of one another
    return [*cells, cell(statistics.fmean(figures["accuracy"] for figures in four), spread)]


def _differences(found: dict[str, dict], guided: bool) -> list[str]:
    """What a reader must know before he holds these figures against the paper's."""
    notes = ["with strategies in the prompts, the paper evaluates without"] if guided else []
    for stem, figures in found.items():
        if stem not in COLUMNS:
            notes.append(f"{stem} {100 * figures['accuracy']:.1f} (avg@{figures['n']}) has no column in the paper's table")
            continue
        benchmark = BENCHMARKS[stem]
        wanted = PAPER_SETTINGS | {"n": benchmark.n, "problems": benchmark.problems}
        other = [f"{name} {figures[name]} (paper {value})" for name, value in wanted.items() if figures[name] != value]
        if other:
            notes.append(f"{benchmark.title} differs from the paper in {', '.join(other)}")
    return notes
