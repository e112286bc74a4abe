r"""Evaluation: samples of a model that are graded while others are drawn, and accuracy over them.

    python eval.py --model DIR --data test.jsonl other.jsonl --n 4       # a line per file, and a JSON file of results
    python eval.py --model DIR --benchmarks data/bench                   # the paper's, each with its n (data/prepare.py)
    python eval.py --model DIR --data test.jsonl --n 8 --both            # without and with each row's strategy
    torchrun --nproc_per_node 8 -- eval.py --model DIR ...               # the problems shared out over ranks (mind the --)
    python eval.py --compare a.json b.json                               # the paired difference of two models
    python eval.py --table a.json b.json                                 # Markdown, beside the paper's figures

Every response is written beside the results as soon as its problem is graded (OUT-responses.jsonl). The same command
again goes on from there after a crash. The figures themselves are stats.py's.
Without the "--" torchrun takes --n for the beginning of a flag of its own, and refuses it.

What it is not: a harness with prompts per benchmark. One prompt (strategy.py's), one verdict per response: is the final
answer equal to the row's (grader.py).
"""

import argparse
import fcntl
import glob
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from tqdm import tqdm

from data.problems import Problem, load_problems
from grader import MathWorker, extract_answer, is_correct, same_answer
from model import encode_chat, load_model, resolve_model, weight_files
from parallel import Control, RankLost, all_gather, leave, my_share, ranks_of, world
from rollout import Trajectory, sample_and_grade, stream_seed
from strategy import Strategy, auto_messages, guided_messages
from tools.benchmark import (
    BENCHMARKS,
    PAPER_SETTINGS,
    compare,
    comparison_lines,
    guidance,
    guidance_lines,
    majority,
    summarise,
    table,
)
from weighting import instance_weight

# -------------------------------------------------------------------------------------------- accuracy


def evaluate(
    model: torch.nn.Module,
    tokenizer: object,
    problems: Sequence[Problem],
    *,
    ragged: Callable[[Callable[[], list]], list] = lambda work: work(),
    **settings: object,
) -> dict:
    """The figures of n samples a problem, over all ranks: each samples and grades its share with sample_records' settings.

    ragged  calls the work that differs from rank to rank; train.py passes one that SIGTERM cuts short
    """
    mine = my_share(problems, [expected_length(problem) for problem in problems])
    records = ragged(lambda: sample_records(model, tokenizer, mine, **settings) if mine else [])
    needed = ("correct", "truncated", "timed_out", "length")  # by the figures: what the model wrote stays on its rank
    records = [record | {"samples": [{k: one[k] for k in needed} for one in record["samples"]]} for record in records]
    by_id = {record["id"]: record for rank in all_gather(records) for record in rank}
    return figures([by_id[problem.id] for problem in problems])


def expected_length(problem: Problem) -> int:
    """A guess at how long responses will be, in characters: as long as the strong model's, if there is one [ours]."""
    return len(problem.solution or problem.problem)


def sample_records(
    model: torch.nn.Module,
    tokenizer: object,
    problems: Sequence[Problem],
    *,
    n: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    worker: MathWorker,
    guided: bool = False,
    max_rows: int = 64,
    cache_tokens: int | None = None,
    vote: bool = False,
    on_problem: Callable[[dict], None] | None = None,
    show: bool = True,
) -> list[dict]:
    """n samples per problem, graded, on this rank alone: a record a problem, in their order.

    A record has the problem's id, "samples" (per sample text, answer, correct, truncated, timed_out and length in tokens) and
    "majority" (with `vote`: the index of a sample with the answer that won; None: no answer at all).

    max_new_tokens  longest response; generate also cuts at the context's end. A response that was cut is "truncated"
    guided          put each row's strategy into the prompt
    max_rows        responses decoded at once, and cache_tokens the size of the KV cache: see rollout.generate
    vote            compare the samples' answers with each other, which can cost as much as the grading
    on_problem      called with a problem's record as soon as its last response is graded, from the grading thread
    show            a progress bar

    ValueError, before anything is sampled, for no problems, a row without a strategy when guided, and a prompt that
    fills the context.
    """
    prompts = _prompts(model, tokenizer, problems, guided)
    # from (seed, id): the result depends neither on max_rows nor on which other problems, or ranks, there are
    seeds = [stream_seed("evaluation", seed, problem.id) for problem in problems]
    records = [{"id": problem.id, "samples": [None] * n, "majority": None} for problem in problems]
    left = [n] * len(problems)

    def grade(row: Trajectory, member: int, text: str) -> None:
        record, lost = records[row.group], worker.timeouts
        correct = is_correct(text, problems[row.group].answer, worker)
        record["samples"][member] = {
            "text": text, "answer": extract_answer(text), "correct": correct, "truncated": not row.finished,
            "timed_out": worker.timeouts > lost, "length": len(row.response_ids),
        }  # fmt: skip
        left[row.group] -= 1
        if not left[row.group]:
            if vote:
                record["majority"] = majority([sample["answer"] for sample in record["samples"]], _same_vote(worker))
            if on_problem is not None:
                on_problem(record)

    sample_and_grade(
        model, tokenizer, prompts, grade, n=n, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seeds,
        max_rows=max_rows, cache_tokens=cache_tokens, progress=("guided" if guided else "auto") if show else None,
    )  # fmt: skip
    return records


def _same_vote(worker: MathWorker) -> Callable[[str, str], bool | None]:
    """same_answer for a vote: None if the worker ran out of time, which a verdict alone does not tell."""

    def same(answer: str, reference: str) -> bool | None:
        lost = worker.timeouts
        verdict = same_answer(answer, reference, worker)
        return None if worker.timeouts > lost else verdict

    return same


def figures(records: Sequence[dict], *, voted: bool = False) -> dict:
    """stats.summarise of sample_records' records, with maj_at_n if there was a vote, plus grader_timeouts (samples graded
    wrong because the grader ran out of time) and "correct": {id: correct samples}, by which two models are compared."""
    samples = [record["samples"] for record in records]
    right, length, truncated, lost = (
        [[sample[key] for sample in row] for row in samples] for key in ("correct", "length", "truncated", "timed_out")
    )
    won = [row["majority"] is not None and row["samples"][row["majority"]]["correct"] for row in records] if voted else None
    counts = {record["id"]: sum(row) for record, row in zip(records, right, strict=True)}
    return summarise(right, length, truncated, won) | {"grader_timeouts": sum(map(sum, lost)), "correct": counts}


def show_responses(
    model: torch.nn.Module, tokenizer: object, problem: Problem, when: str, *, worker: MathWorker, seed: int, **settings: object
) -> None:
    """Print one response alone and one guided, to the same problem."""
    prompts = {"alone": auto_messages(problem.problem)}
    if problem.strategy is not None:
        prompts["guided"] = guided_messages(problem.problem, problem.strategy)
    ids = [encode_chat(tokenizer, messages) for messages in prompts.values()]

    def grade(row: Trajectory, member: int, text: str) -> tuple[str, bool]:
        return text, is_correct(text, problem.answer, worker)

    _, graded = sample_and_grade(model, tokenizer, ids, grade, n=1, seed=[seed] * len(ids), **settings)
    tqdm.write(f"\n[{when}] {problem.problem}   (answer {problem.answer})")
    for kind, ((text, correct),) in zip(prompts, graded, strict=True):
        tqdm.write(f"  {kind:>6} ({'right' if correct else 'wrong'}): {text}")


def plus_minus(figures: dict) -> str:
    """An accuracy with its standard error, which older checkpoints call stderr, and which one problem alone does not have."""
    return f"{figures['accuracy']:.3f} +- {figures.get('standard_error', figures.get('stderr')) or 0.0:.3f}"


def accuracy_table(table: dict[str, dict[str, dict[str, float]]]) -> str:
    """Held-out accuracy, a row per moment and a column per kind of prompt."""
    lines = []
    for when, kinds in table.items():
        cells = "  ".join(f"{kind} {plus_minus(figures)}" for kind, figures in kinds.items())
        lines.append(f"{when:>12} | {cells}  (avg@{next(iter(kinds.values()))['n']})")
    return "\nheld-out accuracy\n" + "\n".join(lines) if lines else "\nno --eval_data: accuracy was not measured"


def _prompts(model: torch.nn.Module, tokenizer: object, problems: Sequence[Problem], guided: bool) -> list[list[int]]:
    if not problems:
        raise ValueError("no problems to evaluate")
    without = [problem.id for problem in problems if problem.strategy is None]
    if guided and without:
        raise ValueError(f"guided, but {len(without)} problems have no strategy, the first is {without[0]!r}")
    prompts = []
    for problem in problems:
        messages = guided_messages(problem.problem, problem.strategy) if guided else auto_messages(problem.problem)
        prompts.append(encode_chat(tokenizer, messages))
        if len(prompts[-1]) >= model.config.max_position_embeddings:
            size, context = len(prompts[-1]), model.config.max_position_embeddings
            raise ValueError(f"problem {problem.id!r}: its prompt of {size} tokens fills the context of {context}")
    return prompts


# -------------------------------------------------------------------------------------------- what is evaluated


@dataclass(frozen=True)
class EvalSet:
    """The problems of one file in one group, alone or guided. key: all that a kept response must agree in to count here."""

    file: str
    guided: bool
    n: int
    max_new_tokens: int
    problems: list[Problem]
    key: dict


def read_parts(args: argparse.Namespace, worker: MathWorker) -> list[EvalSet]:
    """Read and check all files, the model's identity too: a bad line in the last file must not cost an evaluation.

    A file of --data has n 1 and 2,048 tokens, one of --benchmarks the paper's; --n and --max_new_tokens overrule both.
    """
    # 2,048 tokens hold nearly every answer of an instruct model of a size that a small machine runs. The paper's 32,768
    # cost memory for the cache and, for a model that rambles, hours: right for its benchmarks, no default for a first look.
    files = [(file, 1, 2048) for file in args.data or ()]
    longest = PAPER_SETTINGS["max_new_tokens"]
    files += [(file, BENCHMARKS[Path(file).stem].n, longest) for file in _benchmark_files(args.benchmarks)]
    if args.n is not None and len(args.n) not in (1, len(files)):
        raise ValueError(f"--n has {len(args.n)} numbers for {len(files)} files: give one for all or one for each")
    counts = [n for _, n, _ in files] if args.n is None else args.n * (len(files) if len(args.n) == 1 else 1)
    path, digest = model_identity(args.model)
    shared = {"model": path, "model_sha256": digest} | {name: getattr(args, name) for name in KEY}
    wording = json.dumps([auto_messages("p"), guided_messages("p", Strategy("t", "s", ("a",)))])
    shared["prompts_sha256"] = hashlib.sha256(wording.encode()).hexdigest()
    shared["grader"] = f"math-verify {metadata.version('math-verify')}"
    parts, seen = [], {}
    for (file, _, tokens), n in zip(files, counts, strict=True):
        problems = load_problems(file, worker)[: args.limit]
        data = hashlib.sha256(Path(file).read_bytes()).hexdigest()
        if data in seen:
            raise ValueError(f"{file}: is given twice, {seen[data]} holds the same")
        seen[data] = file
        tokens = args.max_new_tokens or tokens
        for guided in (False, True) if args.both else (args.guided,):
            without = [problem.id for problem in problems if problem.strategy is None]
            if guided and without:
                raise ValueError(f"{file}: {len(without)} problems have no strategy, the first is {without[0]!r}")
            key = shared | {"data_sha256": data, "guided": guided, "n": n, "max_new_tokens": tokens}
            parts.append(EvalSet(file, guided, n, tokens, problems, key))
    return parts


KEY = ("temperature", "top_p", "seed", "dtype", "timeout")  # arguments that change a response or its verdict


def _benchmark_files(folder: str | None) -> list[str]:
    if folder is None:
        return []
    files = sorted(Path(folder).glob("*.jsonl"))
    unknown = [file.name for file in files if file.stem not in BENCHMARKS]
    if unknown:
        raise ValueError(f"{folder}: {unknown[0]} is none of {', '.join(BENCHMARKS)}; name the files with --data instead")
    if not files:
        raise ValueError(f"{folder}: no folder with {'.jsonl, '.join(BENCHMARKS)}.jsonl (data/prepare.py writes them)")
    return [str(Path(folder) / f"{name}.jsonl") for name in BENCHMARKS if Path(folder) / f"{name}.jsonl" in files]


def model_identity(name: str) -> tuple[str, str]:
    """(path, sha256) of a model folder, over its config and tokenizer files, and over the names, sizes and 64 samples of 64 KB
    of each weight file. Sizes alone would not tell a model from the same one trained on; all of 15 GB would take a minute.
    """
    folder = resolve_model(name).resolve()
    digest = hashlib.sha256()
    texts = [file for file in folder.iterdir() if file.suffix in (".json", ".jinja", ".txt", ".model") and file.is_file()]
    for file in sorted(texts):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode() + file.read_bytes())
    for file in weight_files(folder):
        size, block = file.stat().st_size, 2**16
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            for start in sorted({max(0, size - block) * i // 63 for i in range(64)}):
                stream.seek(start)
                digest.update(stream.read(block))
    return str(folder), digest.hexdigest()


# -------------------------------------------------------------------------------------------- responses on disk


def _responses_path(out: Path, rank: int | None = None) -> Path:
    """Where responses go: a file per rank while they are sampled, one when all are there."""
    return out.with_name(f"{out.stem}-responses{'' if rank is None else f'-rank{rank}'}.jsonl")


@contextmanager
def own_responses(out: Path, rank: int) -> Iterator[Callable[[EvalSet, dict], None]]:
    """This rank's file of responses, as a function that adds a record. ValueError if another process writes to it.

    A line is flushed when it is written, which a killed process cannot take back; a machine that loses power can. What
    comes after the last line's end is a line that was torn, and is cut off.
    """
    path = _responses_path(out, rank)
    with path.open("a+b") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{path}: another process is writing to it; name another file with --out") from None
        stream.seek(0)
        stream.truncate(_whole_lines(stream.read()))

        def write(part: EvalSet, record: dict) -> None:
            line = {"file": part.file, **record, "key": part.key}
            stream.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
            stream.flush()

        try:
            yield write
        finally:
            if not stream.seek(0, os.SEEK_END):
                path.unlink()


def _whole_lines(content: bytes) -> int:
    return content.rfind(b"\n") + 1


def read_responses(parts: Sequence[EvalSet], out: Path) -> dict[tuple[int, str], bytes]:
    """{(index of the part, id): line} of all responses that are on disk for these parts, from however many ranks.

    ValueError, naming file, line and what differs, for a line of another evaluation, one that is no record, and two different
    ones about one problem. Holds all texts at once: 9,000 responses of 3 KB to the six benchmarks are 27 MB.
    """
    found: dict[tuple[int, str], bytes] = {}
    ranks = sorted(out.parent.glob(f"{glob.escape(_responses_path(out).stem)}-rank*.jsonl"))
    for path in [_responses_path(out), *ranks]:
        content = path.read_bytes() if path.exists() else b""
        for number, line in enumerate(content[: _whole_lines(content)].split(b"\n")[:-1], start=1):
            try:
                job = _job_of(line, parts)
                if found.setdefault(job, line) != line:  # the same line twice: the end of a merge was interrupted
                    raise ValueError(f"a second record of problem {job[1]!r}, different from the first")
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
    return found


def _job_of(line: bytes, parts: Sequence[EvalSet]) -> tuple[int, str]:
    try:
        record = json.loads(line)
        key, problem, samples = record["key"], record["id"], record["samples"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"not a record of responses ({error}), {line[:80].decode(errors='replace')!r}") from None
    for index, part in enumerate(parts):
        if part.key == key:
            if len(samples) != part.n or all(problem != known.id for known in part.problems):
                raise ValueError(f"problem {problem!r} with {len(samples)} samples is not among what is evaluated now")
            return index, problem
    nearest = min((part.key for part in parts), key=lambda own: sum(own[name] != key.get(name) for name in own))
    changes = [f"{name} {key.get(name)!r}, now {value!r}" for name, value in nearest.items() if key.get(name) != value]
    raise ValueError(f"is of another evaluation ({'; '.join(changes)}); name another file with --out, or remove it")


def merge_responses(parts: Sequence[EvalSet], out: Path, ranks: int) -> list[list[dict]]:
    """All records, a list per part in the order of its problems; the ranks' files become one, in the same order."""
    found = read_responses(parts, out)
    jobs = [(index, problem.id) for index, part in enumerate(parts) for problem in part.problems]
    missing = [job for job in jobs if job not in found]
    if missing:
        raise ValueError(
            f"{_responses_path(out)}: the responses to {len(missing)} problems are not there, the first is {missing[0][1]!r}; "
            f"can rank 0 see the files of all {ranks} ranks?"
        )
    whole, new = _responses_path(out), out.with_name(f"{out.stem}-responses.tmp")
    new.write_bytes(b"".join(found[job] + b"\n" for job in jobs))
    os.replace(new, whole)
    for path in out.parent.glob(f"{glob.escape(whole.stem)}-rank*.jsonl"):
        path.unlink()
    records = [[] for _ in parts]
    for index, problem in jobs:
        records[index].append(json.loads(found[index, problem]))
    return records


# -------------------------------------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    # No abbreviations: --temp must not be read as --temperature, and a typo must fail.
    parser = argparse.ArgumentParser(description="Accuracy of a model on jsonl problem files.", allow_abbrev=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="model folder or hub name")
    what.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two result files: the paired difference, B minus A")
    what.add_argument("--table", nargs="+", metavar="FILE", help="result files: Markdown rows beside the paper's of that model")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="jsonl files of problems")
    parser.add_argument("--benchmarks", metavar="FOLDER", help="data/prepare.py's benchmark files, each with the paper's n")
    parser.add_argument(
        "--n", type=int, nargs="+",
        help="samples per problem, one number for all files or one for each (default: 1; with --benchmarks the paper's: 4, "
        "and 32 for AMC23 and AIME)",
    )  # fmt: skip
    parser.add_argument("--temperature", type=float, default=0.6, help="0 is greedy; 0.6 is the paper's")
    parser.add_argument("--top_p", type=float, default=0.95, help="0.95 is the paper's")
    parser.add_argument(
        "--max_new_tokens", type=int,
        help="longest response, cut to the context (default: 2,048; with --benchmarks the paper's 32,768, for which "
        "--max_rows or --cache_tokens may have to be lowered). Look at the truncation that is printed",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the sampling; with --compare of the resampling")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--guided", action="store_true", help="put each row's strategy into the prompt")
    group.add_argument("--both", action="store_true", help="evaluate without and with the strategies, and compare")
    parser.add_argument("--limit", type=int, help="only the first problems of each file, this many")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="auto", help="auto takes cuda if there is one, else cpu")
    parser.add_argument("--max_rows", type=int, default=64, help="responses decoded at once")
    parser.add_argument("--cache_tokens", type=int, help="size of the KV cache in tokens (default: what is needed)")
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds for one symbolic comparison")
    parser.add_argument("--timeout_minutes", type=float, default=1440.0, help="how long a rank waits for the slowest one")
    parser.add_argument("--out", help="results file, must not exist (default: eval-MODEL.json, with -guided or -both after it)")
    return parser


def _check(args: argparse.Namespace) -> None:
    """ValueError for numbers out of range, and for flags that would have no effect."""
    for name in ("n", "max_new_tokens", "max_rows", "cache_tokens", "limit"):
        value = getattr(args, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < 1:
                raise ValueError(f"--{name} must be at least 1, got {number}")
    for name, ok, words in (
        ("seed", args.seed >= 0, "must not be negative"),
        ("timeout", 0 < args.timeout < math.inf, "must be positive and finite"),
        ("timeout_minutes", args.timeout_minutes > 0, "must be positive"),
        ("temperature", 0 <= args.temperature < math.inf, "must be finite and not negative"),
        ("top_p", 0 < args.top_p <= 1, "must be above 0 and at most 1"),
    ):
        if not ok:
            raise ValueError(f"--{name} {words}, got {getattr(args, name)}")
    if args.model is None:
        mode = "compare" if args.compare else "table"
        unused = vars(build_parser().parse_args([f"--{mode}", "x", "y"]))
        for name, value in vars(args).items():
            if name not in ("compare", "table", "seed") and value != unused[name]:
                raise ValueError(f"--{name} has no meaning with --{mode}")
    elif not args.data and args.benchmarks is None:
        raise ValueError("--model needs problems: --data FILE ... or --benchmarks FOLDER")


def _output_path(args: argparse.Namespace) -> Path:
    """Where the results go. Checked before the run: an hour of sampling must not end at a file that is in the way."""
    name = Path(args.model.rstrip("/")).name or "model"
    path = Path(args.out or f"eval-{name}{'-guided' * args.guided}{'-both' * args.both}.json")
    if path.exists():
        raise ValueError(f"{path}: already there; name another file with --out")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: its folder does not exist")
    return path


def _line(result: dict) -> str:
    n, error = result["n"], result["standard_error"]
    accuracy, voted, cut = (100 * result[key] for key in ("accuracy", "maj_at_n", "truncation"))
    passed = "  ".join(f"pass@{k} {100 * value:.1f}" for k, value in result["pass_at"].items() if k != "1" or n == 1)
    spread = "" if error is None else f" ± {100 * error:.1f}"
    lost = f"  graded wrong for want of time {result['grader_timeouts']}" if result["grader_timeouts"] else ""
    return (
        f"avg@{n} {accuracy:.1f}{spread}  {passed}  maj@{n} {voted:.1f}  truncated {cut:.1f} %  "
        f"tokens {result['tokens']:.0f}  problems {result['problems']}{lost}"
    )


def read_results(path: str) -> dict:
    """A result file of main's; ValueError if it is something else."""
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
        if all("correct" in part and "data_sha256" in part for part in results["files"].values()) and results["config"]:
            return results
        raise ValueError("it has no number of correct samples per problem")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a results file of eval.py ({type(error).__name__}: {error})") from None


def sample_parts(
    args: argparse.Namespace, shares: Sequence[tuple[EvalSet, list[Problem]]], device: torch.device, worker: MathWorker,
    write: Callable[[EvalSet, dict], None],
) -> None:  # fmt: skip
    """This rank's problems of each part: sampled, graded and written."""
    model, tokenizer = load_model(args.model, dtype=getattr(torch, args.dtype), device=device)
    for part, problems in shares:  # before the first response: a prompt of the last file may be too long
        _prompts(model, tokenizer, problems, part.guided)
    for part, problems in shares:
        sample_records(
            model, tokenizer, problems, n=part.n, max_new_tokens=part.max_new_tokens, temperature=args.temperature,
            top_p=args.top_p, seed=args.seed, worker=worker, guided=part.guided, max_rows=args.max_rows,
            cache_tokens=args.cache_tokens, vote=True, on_problem=lambda record, part=part: write(part, record),
            show=world()[0] == 0,
        )  # fmt: skip


def _my_share(parts: Sequence[EvalSet], kept: dict[tuple[int, str], bytes]) -> list[tuple[EvalSet, list[Problem]]]:
    """What is left to do for this rank, balanced by length: a problem's text times n [ours]; a response's is not known."""
    left = [(part, p) for index, part in enumerate(parts) for p in part.problems if (index, p.id) not in kept]
    chosen = my_share(left, [part.n * len(problem.problem) for part, problem in left])
    return [(part, own) for part in parts if (own := [problem for owner, problem in chosen if owner is part])]


def collect(parts: Sequence[EvalSet], records: Sequence[list[dict]], seed: int) -> dict[str, dict]:
    """{file: its figures}, a line printed for each part; with --both the guided figures are in "guided", and "guidance"."""
    files: dict[str, dict] = {}
    for part, own in zip(parts, records, strict=True):
        result = figures(own, voted=True)
        both = part.file in files
        print(f"{part.file}{' guided' * both}: {_line(result)}")
        if not both:
            settings = {"data_sha256": part.key["data_sha256"], "max_new_tokens": part.max_new_tokens}
            files[part.file] = result | settings
            continue
        counts = [list(figure["correct"].values()) for figure in (files[part.file], result)]
        p_auto, p_guide = (torch.tensor(values) / part.n for values in counts)
        families = [problem.strategy.type.lower() for problem in part.problems]  # as strategy.py --report counts them
        effect = guidance(*counts, part.n, instance_weight(p_auto, p_guide).tolist(), families, seed=seed)
        files[part.file] |= {"guided": result, "guidance": effect}
        print("\n".join(guidance_lines(effect)))
    return files


def run(args: argparse.Namespace, out: Path, device: torch.device) -> dict:
    """Evaluate on this rank and, on rank 0, write and return the results of all; {} on the others.

    The ranks wait for each other twice and communicate nothing else: when all have read what is kept, and when all are done.
    """
    control = Control(args.timeout_minutes)
    rank, ranks = world()
    with MathWorker(timeout_s=args.timeout) as worker:
        parts = read_parts(args, worker)
        with own_responses(out, rank) as write:
            kept = read_responses(parts, out)
            control.barrier()  # nobody writes before everybody has read: all must see the same work left
            if kept and rank == 0:
                print(f"{len(kept)} of {sum(len(part.problems) for part in parts)} problems are there already, going on")
            if shares := _my_share(parts, kept):
                sample_parts(args, shares, device, worker, write)
    control.barrier()
    if rank:
        return {}
    files = collect(parts, merge_responses(parts, out, ranks), args.seed)
    packages = ("torch", "transformers", "math-verify", "sympy", "latex2sympy2_extended")
    versions = {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in packages}
    identity = {name: parts[0].key[name] for name in ("model", "model_sha256")}
    config = vars(args) | {"device": device.type, "ranks": ranks}
    results = {"config": config, "identity": identity, "versions": versions, "files": files}
    new = out.with_name(f"{out.name}.tmp")
    new.write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(new, out)
    print(f"results in {out}, responses in {_responses_path(out)}")
    return results


def main(arguments: Sequence[str] | None = None) -> dict | list[dict] | str:
    """The command line: print what was asked for and return it: an evaluation's results, --compare's rows, --table's text."""
    args = build_parser().parse_args(arguments)
    _check(args)
    if args.compare:
        rows = compare(*map(read_results, args.compare), tuple(args.compare), seed=args.seed)
        print("\n".join(comparison_lines(rows, tuple(args.compare))))
        return rows
    if args.table:
        text = table([read_results(path) for path in args.table])
        print(text)
        return text
    out = _output_path(args)
    with ranks_of(args.device, args.timeout_minutes) as device:
        return run(args, out, device)


if __name__ == "__main__":
    try:
        main()
        leave()
    except (ValueError, RankLost) as problem_with_input:
        sys.exit(f"eval.py: {problem_with_input}")
