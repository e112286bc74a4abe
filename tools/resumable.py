"""What `eval.py --model` runs: an evaluation of several files, on any number of ranks, that goes on after a crash.

What it leaves:

    OUT.json                        the results
    OUT-responses/rank0.jsonl ...   a line for each problem, written by the rank that sampled it as soon as it was graded
    OUT-responses/settings.json     what they depend on. An evaluation that was begun with other settings is not continued
"""

import argparse
import hashlib
import json
import math
import os
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from checkpoint import lock, to_json
from data.examples import encode_prompts
from data.problems import Problem, check_lengths, digests, load_problems, load_template
from eval import MAX_NEW_TOKENS, TEMPERATURE, TOP_P, expected_length, figures, sample_records
from grader import MathWorker, UserReward, grader_of, same_answer
from methods import Method
from model import blank_model, load_model, resolve_model
from parallel import Control, compute_dtype, my_share, world
from tools.benchmark import benchmark_files, paired_bootstrap
from weighting import instance_weight

Records = dict[tuple[str, bool, str], dict]  # a problem's samples by (file, guided, its id)


@dataclass(frozen=True)
class EvalSet:
    """The problems of one file, to be sampled alone or guided."""

    file: str
    sha256: str
    guided: bool
    n: int
    max_new_tokens: int
    problems: list[Problem]
    prompts: dict[str, list[int]]  # token ids, by the problem's id


# ---------------------------------------------------------------------------------------------- what is evaluated


def output_path(args: argparse.Namespace) -> Path:
    """Where the results go. ValueError if they cannot be written there: an hour of sampling must not end at such an error."""
    folder = Path(args.model).resolve()
    name = folder.parent.name if folder.name == "model" else folder.name  # runs/x/model is the run x
    path = Path(args.out or f"eval-{name}{'-guided' * args.guided}{'-both' * args.both}.json")
    if path.exists():
        raise ValueError(f"{path}: already there; name another file with --out")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: its folder does not exist")
    return path


def read_sets(
    args: argparse.Namespace, worker: MathWorker | UserReward, tokenizer: object, context: int
) -> list[EvalSet]:
    """Read and check all files first: a bad line in the last one must not cost an evaluation. A file of --data has n 1 and
    MAX_NEW_TOKENS, one of --benchmarks the paper's; --n and --max_new_tokens overrule both."""
    files = [(file, 1, MAX_NEW_TOKENS) for file in args.data]
    files += benchmark_files(args.benchmarks) if args.benchmarks else []
    if not files:
        raise ValueError("--model needs problems: --data FILE ... or --benchmarks FOLDER")
    counts = args.n or [n for _, n, _ in files]
    if len(counts) not in (1, len(files)):
        raise ValueError(f"--n has {len(counts)} numbers for {len(files)} files: give one for all or one for each")
    sets, seen, lengths, template = [], {}, [], load_template(args.template)
    for index, (file, _, longest) in enumerate(files):
        problems = load_problems(file, worker)[: args.limit]
        sha256 = hashlib.sha256(Path(file).read_bytes()).hexdigest()
        if sha256 in seen:
            raise ValueError(f"{file}: is given twice, {seen[sha256]} holds the same")
        seen[sha256] = file
        for guided in (False, True) if args.both else (args.guided,):
            ids = encode_prompts(tokenizer, problems, guided, file, template)
            prompts = dict(zip([problem.id for problem in problems], ids, strict=True))
            n = counts[index % len(counts)]
            sets.append(EvalSet(file, sha256, guided, n, args.max_new_tokens or longest, problems, prompts))
            lengths += [(f"{file}{' guided' * guided}: {name!r}", len(ids) + 1) for name, ids in prompts.items()]
    check_lengths(lengths, context)
    return sets


def settings_of(args: argparse.Namespace, sets: Sequence[EvalSet], tokenizer: object, dtype: torch.dtype) -> dict:
    """All that responses and verdicts depend on."""
    folder = resolve_model(args.model).resolve()
    packages = ("torch", "transformers", "math-verify", "sympy", "latex2sympy2_extended")
    file, _, function = args.reward.rpartition(":")
    settings = {
        "model": str(folder),
        "model_sha256": model_sha256(folder),
        "dtype": str(dtype).removeprefix("torch."),
        "temperature": args.temperature,
        "top_p": args.top_p,
        "seed": args.seed,
        "timeout": args.timeout,
        "reward": args.reward and f"{function} of {hashlib.sha256(Path(file).read_bytes()).hexdigest()}",
        "correct_at": args.correct_at,
        "versions": {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in packages},
    }
    prompts = {}
    for one in sets:
        name = f"{one.file}{' guided' * one.guided}"
        settings |= {f"{name}: sha256": one.sha256, f"{name}: problems": len(one.problems)}
        settings |= {f"{name}: n": one.n, f"{name}: max_new_tokens": one.max_new_tokens}
        prompts[f"{name}: prompts"] = one.prompts.items()
    return settings | digests(tokenizer, **prompts)


def model_sha256(folder: Path) -> str:
    """Of the weights, configs and tokenizer. The path does not tell a model from one trained into the same folder later."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".json", ".jinja", ".txt", ".model"):
            with path.open("rb") as stream:
                digest.update(f"{path.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------- responses on disk


def begin(folder: Path, settings: dict) -> None:
    """Make the folder of responses, or go on in it. ValueError, naming what differs, if it was made with other settings, and
    for a folder that has something else in it."""
    path = folder / "settings.json"
    if not path.exists():
        folder.mkdir(exist_ok=True)
        if found := [file.name for file in folder.iterdir() if file.name != "settings.json.tmp"]:
            raise ValueError(f"{folder}: holds {found[0]} but no settings.json of an evaluation; name another --out")
        write_json(path, settings)
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not the settings of an evaluation ({error}); name another --out") from error
    changes = [f"{name} {before.get(name)!r}, now {value!r}" for name, value in settings.items() if before.get(name) != value]
    if changes:
        raise ValueError(f"{folder}: of another evaluation ({'; '.join(changes)}); name another --out, or remove it")


def read_records(folder: Path) -> Records:
    """The records of all ranks, also of more or fewer ranks than there are now."""
    records = {}
    for path in sorted(path for path in folder.glob("rank*.jsonl") if re.fullmatch("rank[0-9]+.jsonl", path.name)):
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                record = json.loads(line)
                records[record["file"], record["guided"], record["id"]] = record
            except (ValueError, KeyError, TypeError):  # empty, or torn by a crash: its problem is sampled again
                continue
    return records


def write_json(path: Path, value: dict) -> None:
    """The whole file or none."""
    new = path.with_name(f"{path.name}.tmp")
    new.write_text(to_json(value, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(new, path)


# ---------------------------------------------------------------------------------------------- the evaluation


def share_of(sets: Sequence[EvalSet], kept: Records) -> list[tuple[EvalSet, list[Problem]]]:
    """What is left to do for this rank, of each set. The shares are balanced over all sets by the expected lengths."""
    left = []
    for one in sets:
        left += [(one, problem) for problem in one.problems if (one.file, one.guided, problem.id) not in kept]
    mine = my_share(left, [one.n * expected_length(problem) for one, problem in left])
    shares = [(one, [problem for owner, problem in mine if owner is one]) for one in sets]
    return [(one, problems) for one, problems in shares if problems]


def majority(answers: Sequence[str | None], worker: MathWorker) -> int | None:
    """The index of the first sample that gave the answer with the most votes, the earlier one in a tie; None without answers.
    An answer joins the first group whose first member it equals: equality is not transitive (50, 50 %, 0.5)."""
    given = {index: answer for index, answer in enumerate(answers) if answer is not None}
    group_of: dict[str, int] = {}  # text -> the index of its group's first sample
    votes: Counter[int] = Counter()  # by that index, in the order in which the groups were opened
    for index, answer in given.items():
        if answer not in group_of:
            group_of[answer] = next((first for first in votes if same_answer(answer, given[first], worker)), index)
        votes[group_of[answer]] += 1
    return max(votes, key=votes.get, default=None)


def sample_share(
    args: argparse.Namespace, share: list, device: torch.device, worker: MathWorker | UserReward, path: Path
) -> None:
    """Sample and grade this rank's share, and add a line to its file for each problem."""
    with path.open("a", encoding="utf-8", errors="backslashreplace") as stream:
        lock(stream, f"{path}: another evaluation is writing here", lambda text: print(text) if world()[0] == 0 else None)
        model, tokenizer = load_model(args.model, dtype=compute_dtype(args.dtype, device), device=device)
        if device.type == "cuda":
            model.join_projections()
        stream.write("\n" if stream.tell() else "")  # ends a line that a crash has torn
        for one, problems in share:

            def write(record: dict, one: EvalSet = one) -> None:
                line = {"file": one.file, "guided": one.guided, **record}
                if not args.reward:  # what two answers have in common, only grader.py can say
                    line["majority"] = majority([sample["answer"] for sample in record["samples"]], worker)
                stream.write(to_json(line, ensure_ascii=False) + "\n")
                stream.flush()  # a killed process cannot take it back; only a loss of power can

            prompts = [one.prompts[problem.id] for problem in problems]
            sample_records(
                model, tokenizer, problems, prompts, n=one.n, max_new_tokens=one.max_new_tokens, temperature=args.temperature,
                top_p=args.top_p, seed=args.seed, worker=worker, correct_at=args.correct_at, max_rows=args.max_rows,
                cache_tokens=args.cache_tokens, on_problem=write,
                progress=("guided" if one.guided else "auto") if world()[0] == 0 else None,
            )  # fmt: skip


def run(args: argparse.Namespace, device: torch.device) -> dict:
    """Evaluate on this rank and, on rank 0, write and return the results of all ranks; {} on the others. The ranks wait for
    each other twice, and communicate nothing else."""
    out = output_path(args)
    folder = out.with_name(f"{out.stem}-responses")
    control, (rank, ranks) = Control(args.timeout_minutes), world()
    blank, tokenizer = blank_model(resolve_model(args.model))
    with grader_of(args.reward, args.timeout) as worker:
        sets = read_sets(args, worker, tokenizer, blank.config.max_position_embeddings)
        if rank == 0:
            settings = settings_of(args, sets, tokenizer, compute_dtype(args.dtype, device))
            begin(folder, settings)
        kept = read_records(folder)
        control.barrier()  # nobody writes before everybody has read, so that all see the same work left
        if kept and rank == 0:
            print(f"{len(kept)} of {sum(len(one.problems) for one in sets)} problems are there already, going on")
        if share := share_of(sets, kept):
            sample_share(args, share, device, worker, folder / f"rank{rank}.jsonl")
    control.barrier()
    if rank:
        return {}
    records = read_records(folder)
    keys = [(one.file, one.guided, problem.id) for one in sets for problem in one.problems]
    if missing := [key for key in keys if key not in records]:
        first = missing[0][2]
        raise ValueError(f"{folder}: {len(missing)} problems are missing, the first is {first!r}; do all ranks write there?")
    results = {
        "config": vars(args) | {"device": device.type, "dtype": settings["dtype"], "ranks": ranks},
        "identity": {name: settings[name] for name in ("model", "model_sha256")},
        "versions": settings["versions"],
        "files": collect(sets, records, args),
    }
    write_json(out, results)
    print(f"results in {out}, responses in {folder}")
    return results


def collect(sets: Sequence[EvalSet], records: Records, args: argparse.Namespace) -> dict[str, dict]:
    """{file: its figures}, and a line printed for each set. --both adds the keys "guided", its figures, and "guidance": what
    a strategy in the prompt changes, with a 95 % interval over problems, and the mean alpha(q) [eq 6]."""
    files: dict[str, dict] = {}
    for one in sets:
        chosen = [records[one.file, one.guided, problem.id] for problem in one.problems]
        result = figures(chosen)
        if not args.reward:
            won = [row["majority"] is not None and row["samples"][row["majority"]]["correct"] for row in chosen]
            result["maj_at_n"] = statistics.fmean(won)
        second = one.file in files
        print(f"{one.file}{' guided' * second}: {figures_line(result)}")
        if not second:
            files[one.file] = result | {"data_sha256": one.sha256, "max_new_tokens": one.max_new_tokens}
            continue
        counts = [list(side["correct"].values()) for side in (files[one.file], result)]
        p_auto, p_guide = (torch.tensor(values) / one.n for values in counts)
        effect = {"p_auto": p_auto.mean().item(), "p_guide": p_guide.mean().item()}
        effect |= paired_bootstrap(*counts, one.n, seed=args.seed)[0]
        effect["alpha"] = (instance_weight(p_auto, p_guide) * (p_guide > 0)).mean().item()  # 0 without a target [alg 1]
        files[one.file] |= {"guided": result, "guidance": effect}
        text = f"p_auto {100 * effect['p_auto']:.1f}  p_guide {100 * effect['p_guide']:.1f}"
        change, low, high = (100 * effect[name] for name in ("difference", "low", "high"))
        print(f"  {text}  difference {change:+.1f} [{low:+.1f}, {high:+.1f}]  mean alpha {effect['alpha']:.3f}")
    return files


def figures_line(result: dict) -> str:
    n, error = result["n"], result["standard_error"]
    accuracy, cut = (100 * result[key] for key in ("accuracy", "truncation"))
    second = f"maj@{n} {100 * result['maj_at_n']:.1f}" if "maj_at_n" in result else f"reward {result['reward']:.3f}"
    passed = "  ".join(f"pass@{k} {100 * value:.1f}" for k, value in result["pass_at"].items() if k != "1" or n == 1)
    spread = "" if error is None else f" ± {100 * error:.1f}"
    lost = f"  graded wrong for want of time {result['grader_timeouts']}" if result["grader_timeouts"] else ""
    return (
        f"avg@{n} {accuracy:.1f}{spread}  {passed}  {second}  truncated {cut:.1f} %  "
        f"tokens {result['tokens']:.0f}  problems {result['problems']}{lost}"
    )


# ---------------------------------------------------------------------------------------------- command line


def at_least(least: float, kind: type = int) -> Callable[[str], float]:
    """A type for argparse: a finite number that is not below `least`."""

    def parse(text: str) -> float:
        number = kind(text)
        if not least <= number < math.inf:
            raise argparse.ArgumentTypeError(f"must be at least {least} and finite, got {text}")
        return number

    return parse


def build_parser() -> argparse.ArgumentParser:
    # no abbreviations: --temp must not be read as --temperature, and a typo must fail
    parser = argparse.ArgumentParser(description="Accuracy of a model on jsonl files of problems.", allow_abbrev=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="model folder or hub name")
    what.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two result files: the paired difference, B minus A")
    what.add_argument("--table", nargs="+", metavar="FILE", help="result files: Markdown rows beside the paper's")
    add = parser.add_argument_group("problems").add_argument
    add("--data", nargs="+", metavar="FILE", default=[], help="jsonl files of problems")
    add("--benchmarks", metavar="FOLDER", help="data/prepare.py's benchmark files, each with the paper's n and length")
    add("--limit", type=at_least(1), help="only this many problems of each file, the first ones (default: all)")
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument("--template", default="", help="JSON file with their wording, as in the training (data/README.md)")
    group = prompts.add_mutually_exclusive_group()
    group.add_argument("--guided", action="store_true", help="put each row's strategy into the prompt")
    group.add_argument("--both", action="store_true", help="evaluate without and with the strategies, and compare")
    add = parser.add_argument_group("sampling").add_argument
    add("--n", type=at_least(1), nargs="+", help="samples a problem, one number for all files or one for each (default: 1)")
    add("--temperature", type=at_least(0, float), default=TEMPERATURE, help="0 is greedy (default: %(default)s, the paper's)")
    add("--top_p", type=at_least(0, float), default=TOP_P, help="nucleus to sample from (default: %(default)s, the paper's)")
    add("--max_new_tokens", type=at_least(1), help=f"longest response, cut to the context (default: {MAX_NEW_TOKENS})")
    add("--seed", type=at_least(0), default=0, help="seed of the sampling, or with --compare of the resampling (default: 0)")
    add = parser.add_argument_group("grading").add_argument
    add("--reward", default="", help="FILE.py:FUNCTION(response, row) -> a number in [0, 1], instead of comparing answers")
    add("--correct_at", type=at_least(1e-6, float), default=1.0, help="least reward of a correct response (default: 1)")
    add("--timeout", type=at_least(0.001, float), default=5.0, help="seconds to grade one response (default: 5)")
    add = parser.add_argument_group("machine and results").add_argument
    types = ("auto", "float32", "bfloat16", "float16")
    add("--dtype", default="auto", choices=types, help="auto: bfloat16 on CUDA, else float32 (default: auto)")
    devices = ("auto", "cpu", "cuda")
    add("--device", default="auto", choices=devices, help="auto: CUDA if there is one, else the CPU (default: auto)")
    add("--max_rows", type=at_least(1), default=Method.max_rows, help="responses decoded at once (default: %(default)s)")
    add("--cache_tokens", type=at_least(1), help="size of the KV cache in tokens, if memory is short (default: what is needed)")
    add("--timeout_minutes", type=at_least(0.001, float), default=1440.0, help="longest wait for a rank (default: 1440)")
    add("--out", help="results file, must not exist (default: eval-MODEL.json, with -guided or -both after it)")
    return parser
