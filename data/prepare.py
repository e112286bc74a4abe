r"""Training data and benchmarks, from their published files into this project's row format (data/README.md), one command each.

    python data/prepare.py benchmarks --source hub --out data/bench         # MATH-500, AMC23, OlympiadBench, AIME24/25, Minerva
    python data/prepare.py openr1 --source openr1.parquet --out data/openr1 --count 8500 --against data/bench/*.jsonl
    python data/prepare.py gsm8k --part train --source hub --out data/gsm8k
    python data/prepare.py math --source MATH/train --out data/math         # Hendrycks' folders, or a file of such rows
    python data/prepare.py jsonl --source mine.jsonl --problem_column question --answer_column answer --out data/mine

and in the same way math500, amc23, olympiad, aime24, aime25, minerva, mawps, svamp, asdiv, solutions. `--source` is a file
(jsonl, a JSON array or parquet, told apart by content, not by name) or `hub`: then the file is downloaded at the pinned
commit. Each command writes OUT/PART.jsonl and enters into OUT/manifest.json where the rows came from, with checksums, and
every row that was left out, with the reason (rows outside the sample of --count are only counted).

What it is not: a cleaner of texts. Problems are copied as they are, and solutions too, but for notes and tags of the source
and a box around the final answer where it has another mark. Answers are only undressed ($...$, a box) and plain numbers
shortened (045 is 45, 4.0 is 4). Rounded answers stay rounded, and the grader knows no tolerance.

What happens to the rows, in this order:
  1. read; a row of another form than the command expects is an error, and nothing is written
  2. repeats of a problem are dropped; so is every copy of a problem that has two different answers
  3. benchmarks: the number of distinct problems must be the benchmark's
  4. answers that the grader could never match are dropped
  5. with --against: problems that are in those files as well are dropped (find_overlap says what counts)
  6. a solution whose final answer is not the row's is taken off; with --need_solution its row goes as well
  7. with --count: a seeded sample, in the source's order
  8. written, loaded again with load_problems, entered into the manifest, and only then put in place; `benchmarks` passes
     over those that are there, so that the same command goes on after a failed download

pyarrow is needed for parquet files only (pip install pyarrow). All rows are held in memory: 1.6 GB for 45,714 made-up rows
of openr1 with solutions of 14,000 characters.
"""

import argparse
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from tqdm import tqdm

# Run as a script, Python looks for modules in data/ and not in the repository's root.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.problems import load_problems
from grader import MathWorker, extract_answer, is_correct, normalise_answer, same_answer, why_unusable

GITHUB = "https://raw.githubusercontent.com"
SHINGLE, JACCARD = 5, 0.5  # near-duplicates: find_overlap


# ---------------------------------------------------------------------------------------------------- sources


@dataclass(frozen=True)
class Source:
    """A published file: `file` of `repo` at commit `revision`, on GitHub or in a Hugging Face dataset repository (`host`).

    command, part: what reads it, and the name of the output file. None in file, revision or sha256: not known, not guessed.
    """

    host: str
    repo: str
    revision: str | None
    command: str
    part: str
    file: str | None
    sha256: str | None


UNIFY = "TsinghuaC3I/Unify-Post-Training"
LUFFY_VALID = "3acbd7f5872207c97aa3fe0d40662ec53f33bca19b438ee88a1ecf910051a723"
# (repo, commit, folder): (command, part, file, sha256), the checksums computed on the files themselves.
PINNED = {
    ("openai/grade-school-math", "3101c7d5072418e28b9008a6636bde82a006892c", "grade_school_math/data/"): (
        ("gsm8k", "train", "train.jsonl", "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"),
        ("gsm8k", "test", "test.jsonl", "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"),
    ),
    ("fadibenz/llm-alignment-reasoning-RL", "377d6e5bd725ba7700c0f8587ee743933dd8a04e", "data/MATH/"): (
        ("math", "train", "train.jsonl", "a2aeb55ae22acf0f897e86d03fa5232885b0b72f6cf741597ea55d9158229372"),
    ),
    ("QwenLM/Qwen2.5-Math", "a45202bd16f1ec06f433442dc1152d0074773465", "evaluation/data/"): (
        ("mawps", "singleop", "mawps/singleop.jsonl", "feb012e7ed5503cdb96fd127d539692b033000e9134655acaf4f4e0091328e94"),
        ("mawps", "addsub", "mawps/addsub.jsonl", "2fae2c92530cdf1ac0487db9a90e68d6af84049d755c07c4486411c1d7f43e75"),
        ("mawps", "multiarith", "mawps/multiarith.jsonl", "12e8295088364af21fb6591dbdbd1dda452aade57227f63d725677471ded2951"),
        ("svamp", "svamp", "svamp/test.jsonl", "d0826ff1264f3860e46fc4e71db9e31d2d188960db87090e22677f9493e67a0d"),
        ("asdiv", "asdiv", "asdiv/test.jsonl", "5759580385e706f961a30d4c07d6925b35c3f7c86d6c50bc413957169693dad2"),
    ),
    ("desirepathh/assignment5-alignment", "d789558c359bfa6033c3198fba9d6d3ca113293b", "data/sft-reason/"): (
        ("solutions", "train", "sft_gpt-oss-120b.jsonl", "0e5ea36e83a1aba5060df2a61c797fd30e084104698cdfe6f2da5a651cd1fcf9"),
    ),
    (UNIFY, "ae332f5fa4dc8b4c3d3cd77ebc9cff3a3abab2d0", "data/"): tuple(
        (name, name, f"{folder}/test.json", sha256) for name, folder, sha256 in (
            ("math500", "MATH-500", "c1680e2e2e034486ad1b7f5aa6dec7ce47ec801769d011cc5d6934ac139fcd46"),
            ("amc23", "AMC23", "87814e83ace2d8bf5b090a5921a6c52312df0341cd73140e27ad4df5b496eb11"),
            ("olympiad", "Olympiad-Bench", "e8efb515c3f9546bba34b6c29af1c4ac350d97fc49acb22517e977a618f1029b"),
            ("aime24", "AIME24", "9477f2dc2c941034be427bab6319ff9fe739ebab663e060e01bfb2441e9fb14e"),
            ("aime25", "AIME25", "93591e23f07c6d49b557657d03548c67fafa1857e974ec9d02842f69bb7b80fe"),
            ("minerva", "Minerva", "62b8cffda3b083452404f4d051c369608d31b4f7f82ba5b148d7b23beefd5547"),
        )
    ),
    # LUFFY's validation file holds five benchmarks; its amc and olympiad_bench are not the benchmarks of that name.
    ("ElliottYan/LUFFY", "01f4ae066249e6965ce0d5512ccdf99a12895c74", "data/"): tuple(
        (name, name, "valid.parquet", LUFFY_VALID) for name in ("math500", "aime24", "minerva")
    ),
}  # fmt: skip
# The first entry of a command and part is what `--source hub` fetches; a local file may be any of them.
SOURCES = [
    Source("github", repo, commit, command, part, folder + file, sha256)
    for (repo, commit, folder), files in PINNED.items() for command, part, file, sha256 in files
]  # fmt: skip
# The paper's training data: its commit, file name and checksum could not be looked up.
SOURCES += [Source("huggingface", "Elliott/Openr1-Math-46k-8192", None, "openr1", "train", None, None)]

# Distinct problems; OlympiadBench: the text-only, open-ended mathematics problems in English.
BENCHMARKS = {"math500": 500, "amc23": 40, "olympiad": 674, "aime24": 30, "aime25": 30, "minerva": 272}
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
    """Download a source; (path, what the manifest says of it). revision and file override the table's.

    From GitHub into `folder`, from the Hugging Face hub into that library's cache (HF_HOME, HF_ENDPOINT and HF_TOKEN
    hold). ValueError where either is unknown, the revision is not a whole commit hash (a branch moves), or nothing comes.
    """
    revision, file = revision or source.revision, file or source.file
    for name, value in (("revision", revision), ("file", file)):
        if not value:
            raise ValueError(f"the {name} of {source.repo} is not in the table of sources: give --{name} (see its page)")
    if not re.fullmatch("[0-9a-f]{40}", revision):
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
        raise ValueError(
            f"{source.repo}: {file} at {revision} could not be downloaded ({type(error).__name__}: {error}); "
            f"fetch it by other means and give --source FILE"
        ) from error
    return path, {"host": source.host, "repo": source.repo, "file": file, "revision": revision}


def identify(command: str, part: str, path: Path, expected: str | None, origin: dict | None) -> dict:
    """The manifest's entry on the file that is read: path ("hub" with an `origin`), sha256, repo, file and revision.

    origin: what fetch says; a local file's is looked up by its checksum, and None where it is not in the table.
    expected: --sha256, a checksum, or "any"; None: one of the table's. ValueError naming both where the file has another.
    """
    sha256 = sha256_of(path)
    known = [source for source in SOURCES if (source.command, source.part) == (command, part) and source.sha256]
    if expected is None and known and path.is_file() and sha256 not in [source.sha256 for source in known]:
        pins = " or ".join(f"{source.sha256} ({source.repo}, {source.file}, commit {source.revision})" for source in known)
        hint = " This is LUFFY's validation file: its amc holds AMC23's 40 among 83 problems, its olympiad_bench 675." * (
            sha256 == LUFFY_VALID and command in ("amc23", "olympiad")
        )
        raise ValueError(f"{path}: sha256 {sha256}, expected {pins}.{hint} --sha256 any reads the file all the same")
    if expected not in (None, "any") and sha256 != expected:
        raise ValueError(f"{path}: sha256 {sha256}, expected {expected} (--sha256)")
    match = next((source for source in known if source.sha256 == sha256), None)
    where = str(path) if origin is None else "hub"
    if origin is None and match:
        origin = {"host": match.host, "repo": match.repo, "file": match.file, "revision": match.revision}
    return {"path": where, "sha256": sha256, **(origin or {"repo": None, "revision": None})}


# ---------------------------------------------------------------------------------------------------- reading


def read_rows(path: Path) -> Iterator[tuple[str, object]]:
    """("line 12", the line's bytes) of a jsonl file, else ("row 12", the row): parquet, a JSON array, a folder of JSON files.

    Rows of a folder are named by their path. Lines are left undecoded so that every bad one can be reported, not the first.
    """
    if path.is_dir():
        files = sorted(path.rglob("*.json"))
        if not files:
            raise ValueError(f"{path}: a folder without .json files")
        yield from ((file.relative_to(path).as_posix(), file.read_bytes()) for file in files)
        return
    with path.open("rb") as stream:
        head = stream.read(4096)
    if head.startswith(b"PAR1"):
        yield from read_parquet(path)
    elif head.lstrip().startswith(b"["):  # some files are called .jsonl and hold an array
        try:
            rows = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error}), {head[:80].decode(errors='replace')!r}") from None
        yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))
    else:
        lines = path.read_bytes().rstrip().splitlines()
        yield from ((f"line {number}", line) for number, line in enumerate(lines, start=1))


def read_parquet(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path} is a parquet file, which needs a package more: pip install pyarrow") from None
    try:  # in batches: the whole file at once takes twice the memory
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256)
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), start=1):
            yield f"row {number}", row
    except (ValueError, OSError) as error:  # pyarrow's errors
        raise ValueError(f"{path}: {error}") from None


def parse_object(raw: object) -> dict:
    """The JSON object in a line's bytes (or the row itself, where the file was parsed whole)."""
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
    """row[column], if it is there and of one of the kinds (str where none is named); blank texts only with `empty`."""
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
    """A row on its way: `where` it stood in the source, and the fields of the row format."""

    where: str
    id: str
    problem: str
    answer: str
    solution: str | None


def clean_answer(value: str | int | float) -> str:
    r"""A reference answer as a string: delimiters and an outer box off, 045 -> 45, 4.0 -> 4, and nothing else.

    Equality is the grader's business; only rewritings without any doubt belong here, and 2.50 may be money.
    """
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


# Each of the functions that follow turns a parsed row of one layout into (problem, answer, solution or None, the source's
# own id or None), raises ValueError for another layout, and returns None for a row that belongs to something else.
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
    if options.solution_column and row.get(options.solution_column) is not None:
        solution = _box_tagged_answer(take(row, options.solution_column))
    if options.id_column:
        own = str(take(row, options.id_column, str, int))
    return problem, clean_answer(answer), solution, own


def _box_tagged_answer(solution: str) -> str:
    r"""A solution that ends in <answer>x</answer> with the tag turned into a box, as our prompt asks; else as it is.

    The thoughts in front stay, as the worked solution; the tags around them go (some traces spell one "\end{think>").
    """
    match = re.fullmatch(r"(.*)<answer>(.*?)</answer>\s*", solution, re.DOTALL)
    if not match:
        return solution
    return _boxed(re.sub(r"(?:</?|\\end\{)think>", "", match[1]), normalise_answer(match[2]))


def _user_message(messages: object) -> str:
    """The problem in a chat's messages: one of the user, behind at most one of the system, which is dropped."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"column 'prompt' must be a list of messages, {_short(messages)}")
    roles = [message.get("role") for message in messages]
    if roles not in (["user"], ["system", "user"]):
        raise ValueError(f"column 'prompt' must hold one user message, and before it at most a system message, not {roles!r}")
    return take(messages[-1], "content")


def openr1_row(row: dict, _: argparse.Namespace) -> Fields:
    """prompt [{role, content}], target [{role, content}] or None, reward_model {ground_truth, style}: LUFFY's layout."""
    target = row.get("target")
    if target and (not isinstance(target, list) or len(target) != 1 or not isinstance(target[0], dict)):
        raise ValueError(f"column 'target' must be null or a list of one message, {_short(target)}")
    truth = take(take(row, "reward_model", dict), "ground_truth", str, int, float, empty=True)
    solution = take(target[0], "content", empty=True) if target else None
    return _user_message(take(row, "prompt", list)), clean_answer(truth), solution or None, None


def benchmark_row(row: dict, options: argparse.Namespace) -> Fields | None:
    """prompt (text), answer, and an id where there is one; or a row of LUFFY's validation file (None: another benchmark's)."""
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
    r"""A problem's text for comparison: NFC, no case, straight quotes, \dfrac as \frac, no LaTeX spacing, single blanks.

    Not NFKC, which makes 52 of 5². Coarser than load_problems, which only looks past blanks.
    """
    text = unicodedata.normalize("NFC", text).casefold().translate(str.maketrans("’‘“”", "''\"\""))
    text = re.sub(r"\\[dt]frac(?![a-z])", r"\\frac", text)
    text = re.sub(r"(?<!\\)\\[,;:! ]|~", " ", text)
    return re.sub(r" (?=[.,;:?!])", "", " ".join(text.split()))


def drop_repeats(rows: list[Row], dropped: Dropped, worker: MathWorker) -> tuple[list[Row], int]:
    """(the first row of each problem, how many distinct problems there were). All copies go where two answers differ."""
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
    """All runs of SHINGLE words (letters and digits, LaTeX commands without the stroke) of a normalised text.

    A shorter text is one run, so that two of them are near only if they are the same words. Drawings are left out: one
    copy of AIME24 has them and another does not.
    """
    words = re.findall(r"[^\W_]+", re.sub(r"\[asy\].*?\[/asy\]", " ", normal_text(text)))
    return {tuple(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))} if words else set()


def find_overlap(problems: Sequence[str], others: dict[str, str]) -> dict[int, tuple[str, float]]:
    """{index of a problem: (key of the nearest of the others, similarity)} for those that are in both.

    In both [ours]: the same normal_text (similarity 1), or a Jaccard index |A & B| / |A | B| of the two sets of five-word
    runs of at least JACCARD. Not the usual "any 13 words in a row": in competition problems whole sentences are formulas
    of speech ("... where m and n are relatively prime positive integers. Find m + n."). The price: a problem that is
    quoted inside a text of more than twice its length is not found. Exact, by an inverted index; time grows with the
    number of shared runs.
    """
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


def fault_of_solution(row: Row, think: str, worker: MathWorker) -> str:
    """Why the row cannot keep its solution, "" if it can. With think "strip" the row's solution is cut first."""
    if row.solution is None:
        return "the source has none"
    _, closed, behind = row.solution.rpartition("</think>")
    if think == "strip" and (closed or "<think>" in row.solution):
        row.solution = behind.strip() if closed else ""
        if r"\boxed" not in row.solution:
            return "nothing boxed behind </think>"
    return "" if is_correct(row.solution, row.answer, worker) else "its final answer is not the row's"


def check_solutions(
    rows: list[Row], options: argparse.Namespace, dropped: Dropped, worker: MathWorker
) -> tuple[list[Row], dict[str, int]]:
    """(rows, {why a solution is missing: of how many rows}). With --need_solution the rows without one are dropped."""
    kept, missing = [], Counter()
    for row in tqdm(rows, desc="solutions", unit="row", disable=all(row.solution is None for row in rows)):
        if fault := fault_of_solution(row, options.think, worker):
            missing[fault] += 1
            if options.need_solution:
                stated = extract_answer(row.solution or "")
                dropped.add(f"no solution: {fault}", row, f"{_short(stated)}, the row's answer is {row.answer!r}")
                continue
            row.solution = None
        kept.append(row)
    return kept, dict(missing)


# ---------------------------------------------------------------------------------------------------- one file


def read_source(path: Path, options: argparse.Namespace) -> tuple[list[Row], int]:
    """(the command's rows of a file, how many rows the file has). One ValueError with up to 20 lines for bad rows."""
    rows, errors, count = [], [], 0
    for count, (where, raw) in enumerate(read_rows(path), start=1):
        try:
            fields = LAYOUTS[options.command](parse_object(raw), options)
            if fields is None:
                continue
            problem, answer, solution, own = fields
            name = own or (where.removesuffix(".json") if path.is_dir() else str(count - 1))  # from 0, as the hub counts
            prefix = options.command if options.part == options.command else f"{options.command}-{options.part}"
            rows.append(Row(where, f"{prefix}-{name}", problem, answer, solution))
        except ValueError as error:
            errors.append(f"{path}: {where}: {error}")
    if errors:
        raise ValueError("\n".join(errors[:20] + [f"... and {len(errors) - 20} more"] * (len(errors) > 20)))
    if not rows:
        raise ValueError(f"{path}: no rows for {options.command} among {count}")
    return rows, count


def check_ids(path: Path, rows: list[Row]) -> None:
    """ValueError where two problems share an id. Behind drop_repeats: a file of repeats repeats its ids as well."""
    places = {}
    for row in rows:
        if row.id in places:
            raise ValueError(f"{path}: {row.where}: the id {row.id!r} is that of {places[row.id]} already")
        places[row.id] = row.where


def drop_unusable(rows: list[Row], dropped: Dropped) -> list[Row]:
    """The rows without those whose answer load_problems would refuse, because no response could match it."""
    kept = []
    for row in rows:
        if fault := why_unusable(row.answer):
            dropped.add(f"its answer {fault}", row, row.answer)
        else:
            kept.append(row)
    return kept


def convert(path: Path, origin: dict | None, options: argparse.Namespace, worker: MathWorker) -> None:
    """Turn one file into options.out/PART.jsonl and its entry in manifest.json. ValueError before anything is written."""
    source = identify(options.command, options.part, path, options.sha256, origin)
    others, against = load_against(options.against, worker)  # first, so that a fault there costs no work
    rows, read = read_source(path, options)
    dropped, own = Dropped(), len(rows)
    rows, distinct = drop_repeats(rows, dropped, worker)
    if distinct != (expected := BENCHMARKS.get(options.command, distinct)):
        raise ValueError(
            f"{path}: {distinct} distinct problems in {own} rows, but {options.command} has {expected}. LUFFY's validation "
            f"file is known for this: its aime is AIME24 eight times, its amc holds 83 problems, not AMC23's 40, four times"
        )
    check_ids(path, rows)
    rows = drop_unusable(rows, dropped)
    rows = drop_overlap(rows, others, dropped)
    rows, missing = check_solutions(rows, options, dropped, worker)
    usable = len(rows)
    if usable < (options.count or 1):
        raise ValueError(f"{path}: {usable} of {read} rows can be used, {options.count or 1} are needed: {dropped.counts()}")
    if options.count:
        rows = [rows[i] for i in sorted(random.Random(options.seed).sample(range(usable), options.count))]
    counts = {
        "read": read, "of_another_benchmark": read - own, "distinct": distinct, "usable": usable, "kept": len(rows),
        "with_solution": sum(row.solution is not None for row in rows), "solutions_missing": missing,
        "dropped": dropped.counts(),
        "grader_timeouts": worker.timeouts,  # each was taken for a wrong answer
    }  # fmt: skip
    settings = {name: getattr(options, name) for name in ("seed", "count", "think", "system", "need_solution")}
    entry = {
        "command": options.typed, "source": source, "against": against, **settings,
        "near_duplicate": {"shingle_words": SHINGLE, "jaccard": JACCARD},
        "counts": counts, "dropped": dropped, "versions": versions(),
    }  # fmt: skip
    out = target(options)
    write(out, rows, entry, worker)
    report(out, entry)


def target(options: argparse.Namespace) -> Path:
    """The file to write; ValueError where it is there already."""
    out = options.out / f"{options.part}.jsonl"
    if out.exists():
        raise ValueError(f"{out}: already there; remove it or name another folder with --out")
    return out


def read_manifest(path: Path) -> dict[str, dict]:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); remove it, and the files that it is about") from None


def is_entered(out: Path) -> bool:
    """Whether the file is there as the manifest beside it has it: then it is whole, and of the command that is named there."""
    entry = read_manifest(out.parent / "manifest.json").get(out.name)
    return entry is not None and out.exists() and entry["sha256"] == sha256_of(out)


def versions() -> dict[str, str]:
    """What may change the outcome: the interpreter, the grader's packages, and the reader of parquet if it was used."""
    packages = ["math-verify", "sympy", "latex2sympy2_extended"] + ["pyarrow"] * ("pyarrow" in sys.modules)
    return {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in packages}


def write(out: Path, rows: list[Row], entry: dict, worker: MathWorker) -> None:
    """Write the rows, load them again as training and evaluation do, enter them into the manifest, and put them in place."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            for row in rows:
                record = {"id": row.id, "problem": row.problem, "answer": row.answer, "solution": row.solution}
                record = {key: value for key, value in record.items() if value is not None}
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
        loaded = load_problems(partial, worker)
        if len(loaded) != len(rows):
            raise ValueError(f"{out}: {len(rows)} rows were written, but load_problems reads {len(loaded)}")
        path = out.parent / "manifest.json"
        manifest = read_manifest(path) | {out.name: entry | {"sha256": sha256_of(partial)}}
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        path.with_suffix(".partial").write_text(text, encoding="utf-8")
        os.replace(path.with_suffix(".partial"), path)
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

LAYOUTS: dict[str, Callable[[dict, argparse.Namespace], Fields | None]] = {
    "openr1": openr1_row, "gsm8k": gsm8k_row, "math": math_row, "mawps": mawps_row, "svamp": svamp_row, "asdiv": asdiv_row,
    "solutions": columns_row, "jsonl": columns_row,
} | dict.fromkeys(BENCHMARKS, benchmark_row)  # fmt: skip
PARTS = {"gsm8k": ("train", "test"), "math": ("train", "test"), "mawps": ("singleop", "addsub", "multiarith")}
NO_SYSTEM = (
    "--system keep: a row has no place for a system message. Prompts are one user message that opens with the untouched "
    "problem (strategy.py says why); in front of `problem` it would stand in every prompt that extracts a strategy, and count "
    "as common text in --against. Put its wording into strategy.INSTRUCTION, which training and evaluation share"
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Published data into this project's rows.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (*LAYOUTS, "benchmarks"):
        sub = commands.add_parser(command, allow_abbrev=False)
        place = "a folder with the files, found by their checksums" if command == "benchmarks" else "the file"
        sub.add_argument("--source", required=True, help=f"{place}, or `hub` to download")
        sub.add_argument("--out", type=Path, required=True, help="folder for PART.jsonl and manifest.json")
        sub.set_defaults(part=command, against=[], count=None, seed=None, need_solution=False, file=None)
        sub.set_defaults(think=None, system=None)  # openr1's
        if command == "benchmarks":
            sub.set_defaults(revision=None, sha256=None)
            continue
        sub.add_argument("--revision", help="commit to download instead of the pinned one")
        sub.add_argument("--sha256", help="checksum to expect instead of the pinned one; `any` takes whatever is there")
        if command not in BENCHMARKS:
            _training_arguments(sub, command)
    return parser


def _training_arguments(sub: argparse.ArgumentParser, command: str) -> None:
    if command in PARTS:
        sub.add_argument("--part", choices=PARTS[command], default=PARTS[command][0], help="which file of the data set")
    elif command == "jsonl":
        sub.add_argument("--part", default="train", help="name of the output file, without .jsonl")
    elif command in ("openr1", "solutions"):
        sub.set_defaults(part="train")
    sub.add_argument("--count", type=int, help="a random sample of so many rows (default: all)")
    sub.add_argument("--seed", type=int, default=0, help="of the sample")
    sub.add_argument("--against", nargs="+", default=[], metavar="FILE", help="test files in our format: drop what is in them")
    if command == "solutions":  # what it is for: rows that SFT, LUFFY and HPT can use
        sub.set_defaults(need_solution=True)
    else:
        sub.add_argument("--need_solution", action="store_true", help="drop rows without a solution that is right")
    if command == "openr1":
        sub.add_argument("--file", help="the file's name in the hub's repository")
        sub.add_argument(
            "--think", choices=("keep", "strip"), default="keep", help="strip: only what follows </think>, if it has the box"
        )
        sub.add_argument("--system", choices=("keep", "drop"), default="drop", help="keep is refused, with the reason")
    if command in ("jsonl", "solutions"):
        ours = command == "solutions"
        sub.add_argument("--problem_column", default="problem")
        sub.add_argument("--answer_column", default="expected_answer" if ours else "answer")
        sub.add_argument("--solution_column", default="reasoning_trace" if ours else None, help="default: %(default)s")
        sub.add_argument("--id_column", help="default: ids from the row's number")


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
    """One command: find or fetch its files (downloads go to `folder`), convert each."""
    if options.command == "benchmarks":
        left = [command for command in BENCHMARKS if not is_entered(options.out / f"{command}.jsonl")]
        if len(left) < len(BENCHMARKS):
            print(f"{options.out}: {len(BENCHMARKS) - len(left)} of {len(BENCHMARKS)} benchmarks are there already")
        local = None if options.source == "hub" or not left else find_benchmarks(Path(options.source))
        for command in left:
            one = argparse.Namespace(**vars(options) | {"command": command, "part": command})
            one.source = "hub" if local is None else local[command]
            run(one, folder, worker)
        return
    target(options)  # before a download, and before minutes of grading
    path, origin = Path(options.source), None
    if options.source == "hub":
        known = [s for s in SOURCES if (s.command, s.part) == (options.command, options.part)]
        if not known:
            raise ValueError(f"{options.command} --part {options.part} is in no hub known to us: give --source FILE")
        path, origin = fetch(known[0], options.revision, options.file, folder)
    elif options.command != "math" and path.is_dir():
        raise ValueError(f"{path}: a folder, expected a file")
    elif not path.exists():
        raise ValueError(f"{path}: no such file")
    elif options.revision:
        raise ValueError(f"--revision is for --source hub; {path} is known by its checksum")
    convert(path, origin, options, worker)


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert from the command line. ValueError, one line per fault, for whatever is wrong with the input."""
    options = build_parser().parse_args(arguments)
    options.typed = shlex.join(["python", "data/prepare.py", *(sys.argv[1:] if arguments is None else arguments)])
    if options.system == "keep":
        raise ValueError(NO_SYSTEM)
    if options.count is not None and options.count < 1:
        raise ValueError(f"--count must be at least 1, got {options.count}")
    if options.sha256 not in (None, "any") and not re.fullmatch("[0-9a-f]{64}", options.sha256):
        raise ValueError(f"--sha256: expected 64 hex digits or `any`, got {options.sha256!r}")
    with tempfile.TemporaryDirectory() as folder, MathWorker() as worker:
        run(options, Path(folder), worker)


if __name__ == "__main__":
    try:
        main()
    except ValueError as problem_with_input:
        sys.exit(f"prepare.py: {problem_with_input}")
