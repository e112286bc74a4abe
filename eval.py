"""Evaluation: n samples a problem, graded while others are still being drawn, and the figures over them.

    python eval.py --model DIR --data test.jsonl other.jsonl --n 4       # a line per file, and a JSON file of results
    python eval.py --help                                                # benchmarks, comparisons, tables: all flags

Responses are kept on disk as they are graded, and the same command goes on after a crash (tools/resumable.py). Benchmarks,
comparisons and the table are in tools/benchmark.py. There is one prompt for all (strategy.py's), not one per benchmark.
"""

import math
import statistics
import sys
from collections.abc import Callable, Sequence

import torch

from data.problems import Problem, load_problems  # noqa: F401  (load_problems: users import it from here)
from grader import MathWorker, RewardError, UserReward, extract_answer
from methods import Method
from parallel import RankLost, all_gather, leave, my_share, ranks_of
from rollout import Trajectory, sample_and_grade, stream_seed

TEMPERATURE, TOP_P = 0.6, 0.95  # [§4.2]
MAX_NEW_TOKENS = 2048  # [ours] enough for most answers; the paper's 32,768 take a far larger cache, and hours if one rambles


def evaluate(
    model: torch.nn.Module, tokenizer: object, problems: Sequence[Problem], prompts: Sequence[list[int]],
    *, ragged: Callable[[Callable[[], list]], list] = lambda work: work(), **settings: object,
) -> dict:  # fmt: skip
    """`figures` over all ranks. Each rank samples and grades its share of the problems, with sample_records' settings. `ragged`
    calls the work that differs from rank to rank; train.py passes one that SIGTERM cuts short."""
    mine = my_share(range(len(problems)), [expected_length(problem) for problem in problems])
    my_problems = [problems[i] for i in mine]
    my_prompts = [prompts[i] for i in mine]
    records = ragged(lambda: sample_records(model, tokenizer, my_problems, my_prompts, **settings))
    for record in records:
        for sample in record["samples"]:
            del sample["text"], sample["answer"]  # long, and no figure needs them on the other ranks
    by_id = {record["id"]: record for rank in all_gather(records) for record in rank}
    return figures([by_id[problem.id] for problem in problems])


def expected_length(problem: Problem) -> int:
    """A guess at how long responses will be, in characters: as long as the strong model's solution, if there is one [ours]."""
    return len(problem.solution or problem.problem)


def sample_records(
    model: torch.nn.Module, tokenizer: object, problems: Sequence[Problem], prompts: Sequence[list[int]],
    *,
    n: int,
    seed: int,
    worker: MathWorker | UserReward,
    correct_at: float = Method.correct_at,
    on_problem: Callable[[dict], None] | None = None,
    progress: str | None = "eval",
    **settings: object,
) -> list[dict]:
    """Sample and grade n responses to each problem, on this rank alone: one record per problem, in their order.

    A record has the problem's "id" and its "samples", each with text, answer, reward, correct, truncated, timed_out (the grader
    ran out of time) and length (in tokens, the end token included).

    prompts     the token ids of each problem's prompt, see data.examples.encode_prompts
    seed        each problem gets a random stream of its own, from this and its id
    worker      its reward grades a response, which is correct from correct_at on
    on_problem  called with a problem's record as soon as its last response is graded, from the grading thread
    progress    the name of a progress bar; None: there is none
    settings    of rollout.generate, which also checks them: max_new_tokens, temperature, top_p, max_rows, cache_tokens
    """
    # not from the problem's place: its responses must not depend on the other problems, or on the number of ranks
    seeds = [stream_seed("evaluation", seed, problem.id) for problem in problems]
    records = [{"id": problem.id, "samples": [None] * n} for problem in problems]
    left = [n] * len(problems)

    def grade(row: Trajectory, member: int, text: str) -> None:
        record, timeouts = records[row.group], worker.timeouts
        reward = worker.reward(text, problems[row.group])
        record["samples"][member] = {
            "text": text, "answer": extract_answer(text),
            "reward": reward, "correct": reward >= correct_at,
            "truncated": not row.finished, "timed_out": worker.timeouts > timeouts,
            "length": len(row.response_ids),
        }  # fmt: skip
        left[row.group] -= 1
        if not left[row.group] and on_problem is not None:
            on_problem(record)

    sample_and_grade(model, tokenizer, prompts, grade, n=n, seed=seeds, progress=progress, **settings)
    return records


def figures(records: Sequence[dict]) -> dict:
    """The figures of P problems, at least one, with n samples each, from sample_records' records.

    accuracy         avg@n: the share of correct samples, in [0, 1]
    reward           mean over all samples; of a reward of 0 or 1 it is the accuracy
    standard_error   of the accuracy: unbiased standard deviation of the problems' means / sqrt(P), None for P = 1. It says how
                     far other problems of the kind would move the figure, not how far another seed would
    pass_at          pass@k for the powers of two below n, and for n: {"1": ..., "2": ..., "4": ...}; pass_at_n is the last
    truncation       share of samples that were cut off
    tokens           mean response length
    grader_timeouts  samples that were graded wrong because the grader ran out of time
    correct          {problem's id: number of correct samples}, for comparing two models
    """
    samples = [sample for record in records for sample in record["samples"]]
    n = len(records[0]["samples"])
    counts = [sum(sample["correct"] for sample in record["samples"]) for record in records]
    means = [count / n for count in counts]
    ks = [2**i for i in range(n.bit_length())] + [n]
    pass_at = {str(k): statistics.fmean(pass_at_k(n, c, k) for c in counts) for k in ks}
    return {
        "accuracy": statistics.fmean(means),
        "reward": statistics.fmean(sample["reward"] for sample in samples),
        "standard_error": statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None,
        "pass_at": pass_at,
        "pass_at_n": pass_at[str(n)],
        "truncation": statistics.fmean(sample["truncated"] for sample in samples),
        "tokens": statistics.fmean(sample["length"] for sample in samples),
        "problems": len(records),
        "n": n,
        "grader_timeouts": sum(sample["timed_out"] for sample in samples),
        "correct": {record["id"]: count for record, count in zip(records, counts, strict=True)},
    }


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n samples, drawn without replacement, hold one of the c correct ones: 1 - C(n-c, k) / C(n, k). The
    unbiased estimate of pass@k (Chen et al. 2021, arXiv 2107.03374); 1 - (1 - c/n)^k would be too low for k > 1."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)  # whole numbers up to the division: a large n cannot overflow


def plus_minus(figures: dict) -> str:
    """An accuracy with its standard error, which a single problem does not have, and whether most responses were cut off."""
    cut = f", {figures['truncation']:.0%} cut off" if figures["truncation"] > 0.5 else ""
    return f"{figures['accuracy']:.3f} +- {figures['standard_error'] or 0.0:.3f}{cut}"


def accuracy_table(table: dict[str, dict[str, dict[str, float]]]) -> str:
    """Held-out accuracy: a row for each time it was measured, a column for each kind of prompt."""
    lines = []
    for when, kinds in table.items():
        cells = "  ".join(f"{kind} {plus_minus(figures)}" for kind, figures in kinds.items())
        lines.append(f"{when:>12} | {cells}  (avg@{next(iter(kinds.values()))['n']})")
    return "\nheld-out accuracy\n" + "\n".join(lines) if lines else "\nno --eval_data: accuracy was not measured"


def main(arguments: Sequence[str] | None = None) -> dict | list[dict] | str:
    """The command line: print what was asked for and return it: an evaluation's results, --compare's rows, --table's text."""
    from tools.resumable import build_parser, run

    args = build_parser().parse_args(arguments)
    if args.compare or args.table:
        from tools.benchmark import compare_files, table_of_files

        return compare_files(*args.compare, seed=args.seed) if args.compare else table_of_files(args.table)
    with ranks_of(args.device, args.timeout_minutes) as device:
        return run(args, device)


if __name__ == "__main__":
    try:
        main()
        leave()
    except KeyboardInterrupt:
        sys.exit("eval.py: stopped by Ctrl-C; the same command goes on after the last response")
    except (ValueError, OSError, RankLost, RewardError) as problem_with_input:
        sys.exit(f"eval.py: {problem_with_input}")
