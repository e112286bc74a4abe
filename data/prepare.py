r"""Training data and benchmarks, from their published files into this project's row format (data/README.md).

    python data/prepare.py benchmarks --source hub --out data/bench         # MATH-500, AMC23, OlympiadBench, AIME24/25, Minerva
    python data/prepare.py openr1 --source openr1.parquet --out data/openr1 --count 8500 --against data/bench/*.jsonl
    python data/prepare.py gsm8k --part train --source hub --out data/gsm8k
    python data/prepare.py math --source MATH/train --out data/math         # Hendrycks' folders, or a file of such rows
    python data/prepare.py jsonl --source mine.jsonl --problem_column question --answer_column answer --out data/mine
    python data/prepare.py gym --out data/gym --seed 0                      # no file: problems made by reasoning-gym (make_gym)

and in the same way math500, amc23, olympiad, aime24, aime25, minerva, mawps, svamp, asdiv, solutions. `--source` is a file
(jsonl, a JSON array or parquet, told apart by their content) or `hub`, which downloads it at the commit in sources.jsonl. Each
command writes OUT/PART.jsonl, and into OUT/manifest.json where the rows came from, with checksums, and every row that was left
out, with the reason (rows outside the sample of --count are only counted).

Texts are copied as they are, but for notes and tags of the source in solutions. Answers only lose $...$, a box, the list in
["34"], and zeros that say nothing (045 is 45, 4.0 is 4). Rounded answers stay rounded, and the grader knows no tolerance.

What happens to the rows, in this order:
  1. read; a row of another form than the command expects is an error, and nothing is written
  2. repeats of a problem are dropped; so is every copy of a problem that has two different answers
  3. benchmarks: the number of distinct problems must be the benchmark's
  4. answers that no response could match are dropped: placeholders such as "proof" or "nan", broken LaTeX, prose
  5. with --against: problems that are in those files as well are dropped (find_overlap says what counts)
  6. a solution whose final answer is not the row's is taken off; with --need_solution its row goes as well
  7. with --max_tokens MODEL N: rows whose prompt (with their strategy) and solution have more than N tokens are dropped
  8. with --count: a seeded sample, in the source's order
  9. written, loaded again with load_problems, entered into the manifest, and only then put in place; `benchmarks` passes
     over those that are there, so that the same command goes on after a failed download

Only parquet files need pyarrow. All rows are held in memory: 1.6 GB for 45,714 made-up rows of openr1 with solutions of 14,000
characters.
"""

import argparse
import codecs
import hashlib
import json
import math
import os
import random
import re
import shlex
import sys
import tempfile
import unicodedata
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from tqdm import tqdm

# Run as a script, Python looks for modules in data/ and not in the repository's root.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.problems import Problem, load_problems, raise_all
from grader import MathWorker, UserReward, extract_answer, is_correct, normalise_answer, same_answer, why_unusable
from strategy import Strategy, auto_messages, guided_messages

GITHUB = "https://raw.githubusercontent.com"
SHINGLE, JACCARD = 5, 0.5  # near-duplicates: find_overlap


# ---------------------------------------------------------------------------------------------------- sources


@dataclass(frozen=True)
class Source:
    """A published file: `file` of `repo` at commit `revision`, on GitHub or in a Hugging Face dataset repository (`host`).
    command, part: what reads it, and the name of the output file. None if revision, file or sha256 could not be looked up."""

    command: str
    part: str
    host: str
    repo: str
    revision: str | None
    file: str | None
    sha256: str | None


# The first entry of a command and part is what `--source hub` fetches; a local file may be any of them.
SOURCES = [Source(**json.loads(line)) for line in Path(__file__).with_name("sources.jsonl").read_text().splitlines()]
UNIFY = "TsinghuaC3I/Unify-Post-Training"  # the repository from which `benchmarks` takes all six

# Distinct problems; OlympiadBench: the text-only, open-ended mathematics problems in English.
BENCHMARKS = {"math500": 500, "amc23": 40, "olympiad": 674, "aime24": 30, "aime25": 30, "minerva": 272}
# LUFFY's validation file holds five benchmarks, under these names. Its AMC and OlympiadBench have other problems than ours.
LUFFY_NAMES = {"math500": "math", "amc23": "amc", "olympiad": "olympiad_bench", "aime24": "aime", "minerva": "minerva"}


def sha256_of(path: Path) -> str:
    r"""The file's sha256 in hex. A folder's is that of its json files' lines "sha256  relative/path\n", sorted by path."""
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(path.rglob("*.json")):
            digest.update(f"{sha256_of(file)}  {file.relative_to(path).as_posix()}\n".encode())
        return digest.hexdigest()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch(source: Source, revision: str | None, file: str | None, folder: Path) -> tuple[Path, dict]:
    """Download a source; (path, what the manifest says of it). revision and file override the table's. From GitHub into
    `folder`, from the Hugging Face hub into that library's cache (HF_HOME, HF_ENDPOINT and HF_TOKEN hold). ValueError if one of
    the two is unknown, if the revision is not a whole commit hash, or if nothing comes."""
    revision, file = revision or source.revision, file or source.file
    for name, value in (("revision", revision), ("file", file)):
        if not value:
            raise ValueError(f"the {name} of {source.repo} is not in the table of sources: give --{name} (see its page)")
    if not re.fullmatch("[0-9a-f]{40}", revision):  # a branch moves
        raise ValueError(f"--revision: expected a commit hash of 40 hex digits, got {revision!r}")
    try:
        if source.host == "huggingface":
            from huggingface_hub import hf_hub_download  # comes with transformers

            path = Path(hf_hub_download(source.repo, file, repo_type="dataset", revision=revision))
        else:
            path = folder / Path(file).name
            with urllib.request.urlopen(f"{GITHUB}/{source.repo}/{revision}/{file}", timeout=60) as stream:
                path.write_bytes(stream.read())
    except Exception as error:  # the hub's library raises a dozen types; each of them means that there is no file
        where = f"{source.repo}: {file} at {revision}"
        raise ValueError(f"{where} could not be downloaded ({error!r}); fetch it by other means, --source FILE") from error
    return path, {"host": source.host, "repo": source.repo, "file": file, "revision": revision}


def identify(command: str, part: str, path: Path, expected: str | None, origin: dict | None) -> dict:
    """The manifest's entry on the file that is read: path ("hub" with an `origin`), sha256, repo, file and revision. origin:
    what fetch says; a local file's is looked up by its checksum, and is None if the table does not have it. expected: --sha256,
    a checksum, or "any"; None: one of the table's. ValueError naming both if the file has another."""
    sha256 = sha256_of(path)
    known = {source.sha256: source for source in SOURCES if (source.command, source.part) == (command, part) and source.sha256}
    if expected is None and known and path.is_file() and sha256 not in known:
        pins = " or ".join(f"{pin} ({source.repo}, {source.file}, {source.revision})" for pin, source in known.items())
        raise ValueError(f"{path}: sha256 {sha256}, expected {pins}. --sha256 any reads the file all the same")
    if expected not in (None, "any") and sha256 != expected:
        raise ValueError(f"{path}: sha256 {sha256}, expected {expected} (--sha256)")
    where = str(path) if origin is None else "hub"
    if origin is None and sha256 in known:
        origin = {name: getattr(known[sha256], name) for name in ("host", "repo", "file", "revision")}
    return {"path": where, "sha256": sha256, **(origin or {"repo": None, "revision": None})}


# ---------------------------------------------------------------------------------------------------- reading


def read_rows(path: Path) -> Iterator[tuple[str, object]]:
    """("line 12", the line's bytes) of a jsonl file, else ("row 12", the row): parquet, a JSON array, a folder of JSON files.
    Rows of a folder are named by their path. Lines are left undecoded so that every bad one can be reported, not the first."""
    if path.is_dir():
        yield from ((file.relative_to(path).as_posix(), file.read_bytes()) for file in sorted(path.rglob("*.json")))
        return
    with path.open("rb") as stream:
        head = stream.read(4096)
    if head.startswith(b"PAR1"):
        yield from read_parquet(path)
    elif head.lstrip().startswith(b"["):  # some files are called .jsonl and hold an array
        yield from ((f"row {number}", row) for number, row in enumerate(json.loads(path.read_bytes()), start=1))
    else:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
        yield from ((f"line {number}", line) for number, line in enumerate(lines, start=1) if line.strip())


def read_parquet(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError("a parquet file, which needs one more package: pip install pyarrow") from None
    batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256)  # the whole file at once takes twice the memory
    for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), start=1):
        yield f"row {number}", row


def parse_object(raw: object) -> dict:
    """The JSON object in a line's bytes, or the row itself if the file was parsed whole."""
    row = raw
    if isinstance(raw, bytes):
        try:
            row = json.loads(raw)
        except ValueError as error:  # UnicodeDecodeError is one too
            raise ValueError(f"not JSON ({error}), {raw[:80].decode(errors='replace')!r}") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, {_short(row)}")
    return row


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def take(row: dict, column: str, *kinds: type, empty: bool = False) -> object:
    """row[column], if it is there and of one of the kinds (str if none is named); blank texts only with `empty`."""
    if column not in row:
        raise ValueError(f"column {column!r} is missing, the row has {sorted(row)!r}")
    value = row[column]
    kinds = kinds or (str,)
    if not isinstance(value, kinds) or isinstance(value, bool):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"column {column!r} must be {names}, got {type(value).__name__} {_short(value)}")
    if isinstance(value, str) and not empty and not value.strip():
        raise ValueError(f"column {column!r} is empty, {value!r}")
    return value


# ---------------------------------------------------------------------------------------------------- one row


@dataclass
class Row:
    """A row on its way: `where` the source has it ("line 12"), and the fields of the row format."""

    where: str
    id: str
    problem: str
    answer: str
    solution: str | None
    strategy: Strategy | None = None
    extra: dict = field(default_factory=dict)  # columns that the row format does not know, of `jsonl` alone


def clean_answer(value: str | int | float) -> str:
    r"""A reference answer as a string: delimiters and an outer box off, 045 -> 45, 4.0 -> 4, and nothing else. The grader
    decides what is equal. Here only what is beyond doubt is rewritten: 2.50 may be money."""
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"the answer is not a finite number, {value!r}")
        value = int(value) if value.is_integer() else value
    text = normalise_answer(str(value))
    if plain := re.fullmatch(r"(-?)0*([0-9]+)(?:\.0+)?", text):
        return plain[2] if plain[2] == "0" else plain[1] + plain[2]
    return text


def _boxed(text: str, answer: str) -> str:
    """A worked solution with the ending that the prompt asks for."""
    return f"{text.strip()}\n\nThe final answer is \\boxed{{{answer}}}".strip()


# Each of these functions turns a parsed row of one layout into (problem, answer, solution or None, the source's own id or
# None), raises ValueError for another layout, and returns None for a row of something else.
Fields = tuple[str, str, str | None, str | None]


def gsm8k_row(row: dict, _: argparse.Namespace) -> Fields:
    """question, answer ("... <<48/2=24>>24 clips\\n#### 72"). The calculator's notes <<...>> are no part of a solution."""
    text, mark, answer = take(row, "answer").rpartition("####")
    if not mark:
        raise ValueError(f"column 'answer' has no '####' in front of the final answer, {_short(row['answer'])}")
    answer = clean_answer(answer)
    return take(row, "question"), answer, _boxed(re.sub(r"<<[^<>]*>>", "", text), answer), None


def math_row(row: dict, _: argparse.Namespace) -> Fields:
    """problem and solution, as Hendrycks et al. publish MATH; or problem and answer, in copies without the solutions."""
    solution = take(row, "solution") if "solution" in row or "answer" not in row else None
    answer = take(row, "answer", empty=True) if "answer" in row else extract_answer(solution) or ""
    return take(row, "problem"), clean_answer(answer), solution, None


def mawps_row(row: dict, _: argparse.Namespace) -> Fields:
    return take(row, "input"), clean_answer(take(row, "target", str, int, float)), None, None


def _body_and_question(body: str, question: str) -> str:
    body = body.strip()
    return f"{body}{'' if not body or body[-1] in '.,;:?!' else '.'} {question.strip()}".strip()


def svamp_row(row: dict, _: argparse.Namespace) -> Fields:
    problem = _body_and_question(take(row, "Body", empty=True), take(row, "Question"))
    return problem, clean_answer(take(row, "Answer", str, int, float)), None, take(row, "ID")


def asdiv_row(row: dict, _: argparse.Namespace) -> Fields:
    """body, question, answer ("9 (apples)"): the unit goes, which "-(1/3)" does not have."""
    problem = _body_and_question(take(row, "body", empty=True), take(row, "question"))
    answer = re.sub(r"(?<=[0-9]) +\([^()]*\)$", "", take(row, "answer").strip())
    return problem, clean_answer(answer), None, None


def columns_row(row: dict, options: argparse.Namespace) -> Fields:
    """Any flat layout, by the names of its columns."""
    problem, answer = take(row, options.problem_column), take(row, options.answer_column, str, int, float, empty=True)
    solution = own = None
    if row.get(options.solution_column) is not None:
        solution = _box_tagged_answer(take(row, options.solution_column))
    if options.id_column in row:
        own = str(take(row, options.id_column, str, int))
    return problem, clean_answer(answer), solution, own


def _box_tagged_answer(solution: str) -> str:
    r"""A solution that ends in <answer>x</answer> with the tag turned into a box, as our prompt asks; else as it is. The
    thoughts before it stay, as the worked solution; the tags around them go (some traces spell one "\end{think>")."""
    match = re.fullmatch(r"(.*)<answer>(.*?)</answer>\s*", solution, re.DOTALL)
    if not match:
        return solution
    return _boxed(re.sub(r"(?:</?|\\end\{)think>", "", match[1]), normalise_answer(match[2]))


def openr1_row(row: dict, _: argparse.Namespace) -> Fields:
    """prompt [{role, content}], target [{role, content}] or None, reward_model {ground_truth, style}: LUFFY's layout."""
    truth = take(take(row, "reward_model", dict), "ground_truth", str, int, float, empty=True)
    messages, target = take(row, "prompt", list), row.get("target") or []
    roles = [take(message, "role") for message in messages]
    if roles not in (["user"], ["system", "user"]):
        raise ValueError(f"column 'prompt' must hold one user message, after at most one of the system, not {roles!r}")
    if len(target) > 1:
        raise ValueError(f"column 'target' must be null or a list of one message, {_short(target)}")
    solution = take(target[0], "content", empty=True) if target else None
    return take(messages[-1], "content"), clean_answer(truth), solution or None, None  # the system's message is dropped


def benchmark_row(row: dict, options: argparse.Namespace) -> Fields | None:
    """prompt (text), answer, and an id if there is one; or a row of LUFFY's validation file (None: another benchmark's)."""
    if "data_source" in row:
        if row["data_source"] != LUFFY_NAMES.get(options.command):
            return None
        return openr1_row(row, options)
    return take(row, "prompt"), clean_answer(take(row, "answer", str, int, float)), None, row.get("id")


# ---------------------------------------------------------------------------------------------------- filters


class Dropped(dict):
    """reason -> [{"where", "id", "value", ...}]: the rows left out, for the manifest."""

    def add(self, reason: str, row: Row, value: str, **more: object) -> None:
        self.setdefault(reason, []).append({"where": row.where, "id": row.id, "value": value, **more})

    def counts(self) -> dict[str, int]:
        return {reason: len(entries) for reason, entries in self.items()}


def normal_text(text: str) -> str:
    r"""A problem's text for comparison: NFC, no case, straight quotes, \dfrac as \frac, no LaTeX spacing, single blanks. Not
    NFKC, which makes 52 of 5². Coarser than load_problems, which only looks past blanks."""
    text = unicodedata.normalize("NFC", text).casefold().translate(str.maketrans("’‘“”", "''\"\""))
    text = re.sub(r"\\[dt]frac(?![a-z])", r"\\frac", text)
    text = re.sub(r"(?<!\\)\\[,;:! ]|~", " ", text)
    return re.sub(r" (?=[.,;:?!])", "", " ".join(text.split()))


def drop_repeats(rows: list[Row], dropped: Dropped, worker: MathWorker) -> tuple[list[Row], int]:
    """(the first row of each problem, how many distinct problems there were). All copies go if two answers differ."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(normal_text(row.problem), []).append(row)
    kept = []
    for first, *others in groups.values():
        if all(same_answer(row.answer, first.answer, worker) or row.answer == first.answer for row in others):
            kept.append(first)
            for row in others:
                dropped.add("repeats a problem", row, first.id)
        else:
            for row in (first, *others):
                dropped.add("same problem with different answers", row, row.answer)
    return kept, len(groups)


def shingles(text: str) -> set[tuple[str, ...]]:
    """All runs of SHINGLE words (letters and digits, LaTeX commands without the stroke) of a normalised text. A shorter text is
    one run, so that two of them are near only if they are the same words. Drawings are left out: one copy of AIME24 has them
    and another does not."""
    words = re.findall(r"[^\W_]+", re.sub(r"\[asy\].*?\[/asy\]", " ", normal_text(text)))
    return {tuple(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))} if words else set()


def find_overlap(problems: Sequence[str], others: dict[str, str]) -> dict[int, tuple[str, float]]:
    """{index of a problem: (key of the nearest of the others, similarity)} for those that are in both. In both [ours]: the same
    normal_text (similarity 1), or a Jaccard index |A & B| / |A | B| of the two sets of five-word runs of at least JACCARD. Not
    the usual "any 13 words in a row": in competition problems whole sentences are formulas of speech ("... where m and n are
    relatively prime positive integers. Find m + n."). The price: a problem that is quoted inside a text of more than twice its
    length is not found. Exact, by an inverted index; time grows with the number of shared runs."""
    texts = {normal_text(text): key for key, text in others.items()}
    sets = [(key, shingles(text)) for key, text in others.items()]
    containing: dict[tuple[str, ...], list[int]] = {}
    for i, (_, runs) in enumerate(sets):
        for run in runs:
            containing.setdefault(run, []).append(i)
    found = {}
    for index, problem in enumerate(problems):
        if (key := texts.get(normal_text(problem))) is not None:
            found[index] = (key, 1.0)
            continue
        runs = shingles(problem)
        shared = Counter(i for run in runs for i in containing.get(run, ()))
        near = [(count / (len(runs) + len(sets[i][1]) - count), i) for i, count in shared.items()]
        similarity, nearest = max(near, default=(0.0, -1))
        if similarity >= JACCARD:
            found[index] = (sets[nearest][0], round(similarity, 3))
    return found


def load_against(files: Sequence[str], worker: MathWorker) -> tuple[dict[str, str], list[dict]]:
    """({"file: id": problem} of the test files, the manifest's entries on them)."""
    others, entries = {}, []
    for file in files:
        problems = load_problems(file, worker)
        entries.append({"path": file, "sha256": sha256_of(Path(file)), "rows": len(problems)})
        others |= {f"{file}: {problem.id}": problem.problem for problem in problems}
    return others, entries


def drop_overlap(rows: list[Row], others: dict[str, str], dropped: Dropped) -> list[Row]:
    """The rows whose problem is in none of the test files."""
    found = find_overlap([row.problem for row in rows], others)
    for index, (key, similarity) in found.items():
        exact = normal_text(rows[index].problem) == normal_text(others[key])
        dropped.add(f"is {'' if exact else 'nearly '}in a file of --against", rows[index], key, similarity=similarity)
    return [row for index, row in enumerate(rows) if index not in found]


def drop_unusable(rows: list[Row], dropped: Dropped) -> list[Row]:
    """The rows without those whose answer load_problems would refuse, because no response could match it."""
    faults = [why_unusable(row.answer) for row in rows]
    for row, fault in zip(rows, faults, strict=True):
        if fault:
            dropped.add(f"its answer {fault}", row, row.answer)
    return [row for row, fault in zip(rows, faults, strict=True) if not fault]


def fault_of_solution(row: Row, think: str, worker: MathWorker) -> str:
    """Why the row cannot keep its solution, "" if it can. With think "strip" the row's solution is cut first."""
    if row.solution is None:
        return "the source has none"
    _, closed, after = row.solution.rpartition("</think>")
    if think == "strip" and (closed or "<think>" in row.solution):
        row.solution = after.strip() if closed else ""
        if r"\boxed" not in row.solution:
            return "nothing boxed after </think>"
    return "" if is_correct(row.solution, row.answer, worker) else "its final answer is not the row's"


def check_solutions(
    rows: list[Row], options: argparse.Namespace, dropped: Dropped, worker: MathWorker
) -> tuple[list[Row], dict[str, int]]:
    """(rows, {why a solution is missing: of how many rows}). With --need_solution the rows without one are dropped."""
    kept, missing = [], Counter()
    for row in tqdm(rows, desc="solutions", unit="row", disable=all(row.solution is None for row in rows) or None):
        if fault := fault_of_solution(row, options.think, worker):
            missing[fault] += 1
            if options.need_solution:
                stated = extract_answer(row.solution or "")
                dropped.add(f"no solution: {fault}", row, f"{_short(stated)}, the row's answer is {row.answer!r}")
                continue
            row.solution = None
        kept.append(row)
    return kept, dict(missing)


def drop_long(rows: list[Row], tokenizer: Any, limit: int, dropped: Dropped) -> list[Row]:
    """The rows whose prompt (with the strategy, if there is one) and solution have at most `limit` tokens."""
    from model import encode_chat, encode_text  # here: torch takes seconds, and only this needs it

    kept = []
    for row in tqdm(rows, desc="tokens", unit="row", disable=None):
        messages = guided_messages(row.problem, row.strategy) if row.strategy else auto_messages(row.problem)
        tokens = len(encode_chat(tokenizer, messages))
        if row.solution is not None:
            tokens += len(encode_text(tokenizer, row.solution)) + 1  # and the token that ends it
        if tokens <= limit:
            kept.append(row)
        else:
            dropped.add(f"has more than {limit} tokens", row, f"{tokens} tokens")
    return kept


# ---------------------------------------------------------------------------------------------------- one file


def read_source(path: Path, options: argparse.Namespace) -> tuple[list[Row], int]:
    """(the command's rows of a file, how many rows the file has). One ValueError with up to 20 lines for bad rows."""
    rows, errors, count, columns = [], [], 0, set()
    prefix = options.command if options.part == options.command else f"{options.command}-{options.part}"
    try:
        for count, (where, raw) in enumerate(read_rows(path), start=1):
            try:
                source = parse_object(raw)
                fields = LAYOUTS[options.command](source, options)
                strategy = source.get(options.strategy_column)
                strategy = None if strategy is None else Strategy.from_dict(strategy)
                extra = other_columns(source, options) if options.command == "jsonl" else {}
            except ValueError as error:
                errors.append(f"{path}: {where}: {error}")
                continue
            columns |= source.keys()
            if fields is not None:
                problem, answer, solution, own = fields
                name = own or (where.removesuffix(".json") if path.is_dir() else str(count - 1))  # from 0, as the hub counts
                row_id = name if own and options.command == "jsonl" else f"{prefix}-{name}"
                rows.append(Row(where, row_id, problem, answer, solution, strategy, extra))
    except ValueError as error:  # the file as a whole
        raise ValueError(f"{path}: {error}") from None
    raise_all(errors)
    if not rows:
        raise ValueError(f"{path}: no rows for {options.command} among {count}")
    for flag in ("solution_column", "strategy_column", "id_column"):
        column = getattr(options, flag)
        if column not in columns | {None, flag.removesuffix("_column")}:
            raise ValueError(f"{path}: no row has the column --{flag} {column}")
    return rows, count


def other_columns(row: dict, options: argparse.Namespace) -> dict:
    """The columns that no flag names. They stay with the row, for a reward of the user's own."""
    used = {getattr(options, f"{name}_column"): name for name in ("problem", "answer", "solution", "strategy", "id")}
    extra = {name: value for name, value in row.items() if name not in used}
    if taken := sorted(extra.keys() & set(used.values())):
        raise ValueError(f"column {taken[0]!r} is not used, and has the name of a field: rename it")
    try:
        json.dumps(extra)
    except TypeError as error:  # parquet has dates and bytes
        raise ValueError(f"a column cannot be written as JSON: {error}") from None
    return extra


def convert(path: Path, origin: dict | None, options: argparse.Namespace, worker: MathWorker) -> None:
    """Turn one file into options.out/PART.jsonl and its entry in manifest.json. ValueError before anything is written."""
    source = identify(options.command, options.part, path, options.sha256, origin)
    if options.max_tokens:
        from model import TOKENIZER_FILES, load_tokenizer, resolve_model

        tokenizer = load_tokenizer(resolve_model(options.max_tokens[0], ("config.json", *TOKENIZER_FILES)))
    others, against = load_against(options.against, worker)  # first, so that a fault there costs no work
    rows, read = read_source(path, options)
    dropped, own = Dropped(), len(rows)
    rows, distinct = drop_repeats(rows, dropped, worker)
    if distinct != (expected := BENCHMARKS.get(options.command, distinct)):
        raise ValueError(
            f"{path}: {distinct} distinct problems in {own} rows, but {options.command} has {expected}. In LUFFY's validation "
            f"file amc is 83 problems four times, not AMC23's 40, and olympiad_bench has 675"
        )
    places = {}
    for row in rows:  # only now: a file of repeats repeats its ids as well
        if row.id in places:
            raise ValueError(f"{path}: {row.where}: the id {row.id!r} is that of {places[row.id]} already")
        places[row.id] = row.where
    rows = drop_unusable(rows, dropped)
    rows = drop_overlap(rows, others, dropped)
    rows, missing = check_solutions(rows, options, dropped, worker)
    if options.max_tokens:
        rows = drop_long(rows, tokenizer, int(options.max_tokens[1]), dropped)
    usable, needed = len(rows), options.count or 1
    if usable < needed:
        raise ValueError(f"{path}: {usable} of {read} rows can be used, {needed} are needed: {dropped.counts()}")
    if options.count:
        rows = [rows[i] for i in sorted(random.Random(options.seed).sample(range(usable), options.count))]
    counts = {
        "read": read, "of_another_benchmark": read - own, "distinct": distinct, "usable": usable, "kept": len(rows),
        "with_solution": sum(row.solution is not None for row in rows), "solutions_missing": missing,
        "dropped": dropped.counts(),
        "grader_timeouts": worker.timeouts,  # each was taken for a wrong answer
    }  # fmt: skip
    entry = {
        "command": options.typed, "source": source, "against": against,
        **{name: getattr(options, name) for name in ("seed", "count", "think", "need_solution", "max_tokens")},
        "near_duplicate": {"shingle_words": SHINGLE, "jaccard": JACCARD},
        "counts": counts, "dropped": dropped, "versions": versions(),
    }  # fmt: skip
    out = options.out / f"{options.part}.jsonl"
    write(out, rows, entry, worker)
    report(out, entry)


def make_gym(options: argparse.Namespace) -> None:
    """Problems of reasoning-gym: for each task in gym_strategies.json --count rows in train.jsonl, --test_count in test.jsonl.
    They have no answer, because there may be many: examples/gym_reward.py asks the package's verifier, for which `entry` has
    the package's answer and metadata. No problem comes twice, nor with its words or letters in another order."""
    try:
        import reasoning_gym
    except ImportError:
        raise ValueError("gym: the problems come from one more package: pip install reasoning-gym") from None
    rows, wanted = {"test": [], "train": []}, options.test_count + options.count
    for task, strategy in json.loads(Path(__file__).with_name("gym_strategies.json").read_text(encoding="utf-8")).items():
        found = {}
        # Problem i comes from the package's seed + i: as they are, our seeds 0 and 1 would have all problems but one in common.
        for entry in reasoning_gym.create_dataset(task, seed=options.seed * 1_000_003, size=10 * wanted):
            found.setdefault(tuple(sorted(re.findall(r"\w+", entry["question"]))), entry)
            if len(found) == wanted:
                break
        else:
            raise ValueError(f"{task} has {len(found)} different problems, --count and --test_count ask for {wanted}")
        for number, entry in enumerate(found.values()):
            problem, extra = entry.pop("question").strip(), {"entry": entry}
            row = Row(task, f"{task}-{number}", problem, "", None, Strategy.from_dict(strategy), extra)
            rows["test" if number < options.test_count else "train"].append(row)
    with UserReward(f"{Path(__file__).resolve().parent.parent / 'examples/gym_reward.py'}:score", 60) as grader:
        for part, its_rows in rows.items():
            write(options.out / f"{part}.jsonl", its_rows, {"command": options.typed, "versions": versions()}, grader)
            print(f"{options.out / part}.jsonl: {len(its_rows)} rows")


def read_manifest(folder: Path) -> dict[str, dict]:
    path = folder / "manifest.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def is_entered(out: Path) -> bool:
    """Whether the file is there as the manifest beside it has it: then it is whole, and of the command that is named there."""
    entry = read_manifest(out.parent).get(out.name)
    return entry is not None and out.exists() and entry["sha256"] == sha256_of(out)


def versions() -> dict[str, str]:
    """What may change the outcome: the interpreter, the grader's packages, and the optional ones that were used."""
    packages = ["math-verify", "sympy", "latex2sympy2_extended"]
    packages += [name for name in ("pyarrow", "reasoning_gym") if name in sys.modules]
    return {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in packages}


def write(out: Path, rows: list[Row], entry: dict, worker: MathWorker) -> None:
    """Write the rows, load them again as training and evaluation do, enter them into the manifest, and put them in place."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial, manifest = out.with_suffix(".partial"), out.parent / "manifest.partial"
    try:
        with partial.open("w", encoding="utf-8") as stream:
            for row in rows:
                record = Problem(row.id, row.problem, row.answer, row.solution, row.strategy, row.extra).to_row()
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
        load_problems(partial, worker)
        entries = read_manifest(out.parent) | {out.name: entry | {"sha256": sha256_of(partial)}}
        manifest.write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(manifest, manifest.with_suffix(".json"))
        os.replace(partial, out)  # last: a file that is there has its entry
    finally:
        partial.unlink(missing_ok=True)


def report(out: Path, entry: dict) -> None:
    """What a reader should see without opening the manifest: the counts, and the first rows of every reason."""
    source, counts = entry["source"], entry["counts"]
    print(f"source  {source['path']}\n        revision {source['revision']}, sha256 {source['sha256']}")
    print(f"{out}: {counts['kept']} rows, {counts['with_solution']} with a solution, of {counts['read']} read")
    if counts["of_another_benchmark"]:
        print(f"  {counts['of_another_benchmark']} rows of other benchmarks in the same file")
    if counts["usable"] > counts["kept"]:
        print(f"  {counts['usable'] - counts['kept']} usable rows not in the sample of seed {entry['seed']}")
    for reason, entries in entry["dropped"].items():
        print(f"  dropped {len(entries)}: {reason}")
        for example in entries[:3]:
            print(f"    {example['where']}: {example['id']}: {_short(example['value'])}")
    if counts["grader_timeouts"]:
        print(f"  {counts['grader_timeouts']} comparisons of answers ran out of time and count as wrong")
    for reason, number in counts["solutions_missing"].items():
        if not entry["need_solution"] and number < counts["usable"]:  # a source without solutions needs no line for that
            print(f"  {number} usable rows without a solution: {reason}")


# ---------------------------------------------------------------------------------------------------- command line

LAYOUTS = {
    "openr1": openr1_row, "gsm8k": gsm8k_row, "math": math_row, "mawps": mawps_row, "svamp": svamp_row, "asdiv": asdiv_row,
    "solutions": columns_row, "jsonl": columns_row,
} | dict.fromkeys(BENCHMARKS, benchmark_row)  # fmt: skip
PARTS = {"gsm8k": ("train", "test"), "math": ("train", "test"), "mawps": ("singleop", "addsub", "multiarith")}


def build_parser() -> argparse.ArgumentParser:
    more = "`prepare.py jsonl --help` shows the flags of a command, data/README.md what each reads"
    parser = argparse.ArgumentParser(description="Published data into this project's rows.", epilog=more, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (*LAYOUTS, "benchmarks"):
        sub = commands.add_parser(command, allow_abbrev=False)
        place = "a folder with the files, found by their checksums" if command == "benchmarks" else "the file"
        sub.add_argument("--source", required=True, help=f"{place}, or `hub` to download")
        sub.add_argument("--out", type=Path, required=True, help="folder for PART.jsonl and manifest.json")
        sub.set_defaults(part="train" if command in ("openr1", "solutions") else command, file=None, think=None)
        sub.set_defaults(against=[], count=None, seed=None, need_solution=command == "solutions", revision=None, sha256=None)
        sub.set_defaults(solution_column=None, strategy_column=None, id_column=None, max_tokens=None)
        if command == "benchmarks":
            continue
        sub.add_argument("--revision", help="commit to download instead of the pinned one")
        sub.add_argument("--sha256", help="checksum to expect instead of the pinned one; `any` takes whatever is there")
        if command not in BENCHMARKS:
            _training_arguments(sub, command)
    sub = commands.add_parser("gym", allow_abbrev=False)
    sub.add_argument("--out", type=Path, required=True, help="folder for train.jsonl, test.jsonl and manifest.json")
    sub.add_argument("--seed", type=int, default=0, help="of the problems (default: %(default)s)")
    sub.add_argument("--count", type=int, default=300, help="training rows of each task (default: %(default)s)")
    sub.add_argument("--test_count", type=int, default=50, help="test rows of each task (default: %(default)s)")
    sub.set_defaults(max_tokens=None)
    return parser


def _training_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    if command in PARTS:
        parser.add_argument("--part", choices=PARTS[command], default=PARTS[command][0], help="default: %(default)s")
    sub = parser.add_argument_group("which rows")
    sub.add_argument("--count", type=int, help="draw a random sample of this many rows (default: all)")
    sub.add_argument("--seed", type=int, default=0, help="of the sample (default: 0)")
    sub.add_argument("--against", nargs="+", default=[], metavar="FILE", help="test files in our format: drop what is in them")
    long = "drop rows whose prompt and solution have more than N tokens under the tokenizer and chat template of a model"
    sub.add_argument("--max_tokens", nargs=2, metavar=("MODEL", "N"), help=long)
    if command != "solutions":
        sub.add_argument("--need_solution", action="store_true", help="drop rows without a solution that is right")
    if command == "openr1":
        sub.add_argument("--file", help="the file's name in the hub's repository")
        strip = "strip: only what follows </think>, if it has the box (default: keep)"
        sub.add_argument("--think", choices=("keep", "strip"), default="keep", help=strip)
    if command == "jsonl":
        sub.add_argument("--part", default="train", help="name of the output file, without .jsonl (default: train)")
    if command in ("jsonl", "solutions"):
        columns = parser.add_argument_group("columns of the file")
        ours, text = command == "solutions", "(default: %(default)s)"
        columns.add_argument("--problem_column", default="problem", help=text)
        columns.add_argument("--answer_column", default="expected_answer" if ours else "answer", help=text)
        columns.add_argument("--solution_column", default="reasoning_trace" if ours else "solution", help=text)
        help_text = f"with type, strategy and steps, as strategy.py writes them {text}"
        columns.add_argument("--strategy_column", default=None if ours else "strategy", help=help_text)
        no_id = f"without it ids are made from the row's number {text}"
        columns.add_argument("--id_column", default=None if ours else "id", help=no_id)


def find_benchmarks(folder: Path) -> dict[str, Path]:
    """{benchmark: path} of the pinned files anywhere under a folder, whatever their names; ValueError if one is missing."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder with the benchmarks' files, or `hub`")
    by_sum = {sha256_of(path): path for path in sorted(folder.rglob("*.json*")) if path.is_file()}
    wanted = {s.command: s for s in SOURCES if s.command in BENCHMARKS and s.repo == UNIFY}
    if missing := [source for command, source in wanted.items() if source.sha256 not in by_sum]:
        lines = [f"  {s.command}: {s.repo}, {s.file}, commit {s.revision}, sha256 {s.sha256}" for s in missing]
        raise ValueError("\n".join([f"{folder}: no file with the checksum of", *lines]))
    return {command: by_sum[source.sha256] for command, source in wanted.items()}


def run(options: argparse.Namespace, folder: Path, worker: MathWorker) -> None:
    """One command: find or fetch its files (downloads go to `folder`), convert each; `gym` makes its rows."""
    if options.command == "benchmarks":
        left = [command for command in BENCHMARKS if not is_entered(options.out / f"{command}.jsonl")]
        if len(left) < len(BENCHMARKS):
            print(f"{options.out}: {len(BENCHMARKS) - len(left)} of {len(BENCHMARKS)} benchmarks are there already")
        local = {} if options.source == "hub" or not left else find_benchmarks(Path(options.source))
        for command in left:
            changes = {"command": command, "part": command, "source": local.get(command, "hub")}
            run(argparse.Namespace(**vars(options) | changes), folder, worker)
        return
    for part in ("train", "test") if options.command == "gym" else (options.part,):
        out = options.out / f"{part}.jsonl"
        if out.exists():  # asked before a download, and before minutes of grading
            raise ValueError(f"{out}: already there; remove it or name another folder with --out")
    if options.command == "gym":
        return make_gym(options)
    path, origin = Path(options.source), None
    if options.source == "hub":
        known = [s for s in SOURCES if (s.command, s.part) == (options.command, options.part)]
        if not known:
            raise ValueError(f"{options.command} --part {options.part} is in no hub known to us: give --source FILE")
        path, origin = fetch(known[0], options.revision, options.file, folder)
    elif options.revision:
        raise ValueError(f"--revision is for --source hub; {path} is known by its checksum")
    convert(path, origin, options, worker)


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert from the command line. ValueError, one line per fault, or OSError for whatever is wrong with the input."""
    options = build_parser().parse_args(arguments)
    options.typed = shlex.join(["python", "data/prepare.py", *(sys.argv[1:] if arguments is None else arguments)])
    for name in ("count", "test_count"):
        if (number := getattr(options, name, None)) is not None and number < 1:
            raise ValueError(f"--{name} must be at least 1, got {number}")
    if options.max_tokens and not re.fullmatch("[1-9][0-9]*", options.max_tokens[1]):
        raise ValueError(f"--max_tokens MODEL N: N must be a positive whole number, got {options.max_tokens[1]!r}")
    with tempfile.TemporaryDirectory() as folder, MathWorker() as worker:
        run(options, Path(folder), worker)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as problem_with_input:
        sys.exit(f"prepare.py: {problem_with_input}")
