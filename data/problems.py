"""Problem files, for training, evaluation and the extraction of strategies. Their format: data/README.md.

What it is not: a converter of other formats (`python data/prepare.py jsonl` is one).
"""

import codecs
import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grader import MathWorker, UserReward, normalise_answer, same_answer, why_unusable
from strategy import Strategy, Template, auto_messages


@dataclass(frozen=True)
class Problem:
    """One row. `solution` is a strong model's worked solution, `strategy` its strategy; either may be None. `answer` may be ""
    for a reward of one's own. `extra` has the fields that the format does not know."""

    id: str
    problem: str
    answer: str
    solution: str | None
    strategy: Strategy | None
    extra: dict[str, Any] = field(default_factory=dict, hash=False)

    def to_row(self) -> dict[str, Any]:
        """The inverse of read_row, ready for json."""
        row = {"id": self.id, "problem": self.problem, "answer": self.answer or None, "solution": self.solution}
        row["strategy"] = self.strategy and self.strategy.to_dict()
        return {name: value for name, value in row.items() if value is not None} | self.extra


def load_problems(path: str | Path, worker: MathWorker | UserReward | None = None) -> list[Problem]:
    """The rows of a jsonl file: {"id", "problem", "answer"}, and "solution", "strategy" and other fields if there are any.

    Answers are normalised (delimiters and a box around the whole are dropped). A row that repeats an earlier problem with the
    same answer is dropped, and a line printed; empty lines are passed over. An answer that no response could match is an error.
    Raises one ValueError with up to 20 lines "path:line: what, value", and one that says what may help.

    worker: None starts one for this call. For a UserReward an answer may be missing, or be anything.
    """
    if worker is None:
        with MathWorker() as worker:
            return load_problems(path, worker)
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    problems, errors, dropped, math = [], [], 0, isinstance(worker, MathWorker)
    by_id, by_text = {}, {}  # id -> line; problem text -> (line, answer)
    for line, raw in enumerate(Path(path).read_bytes().removeprefix(codecs.BOM_UTF8).splitlines(), start=1):
        if not raw.strip():
            continue
        try:
            problem = read_row(raw, math=math)
            text = " ".join(problem.problem.split())
            if text in by_text:
                first, answer = by_text[text]
                if problem.answer != answer and not (math and same_answer(problem.answer, answer, worker)):
                    raise ValueError(f"same problem as line {first} but answer {problem.answer!r}, not {answer!r}")
                dropped += 1
                continue
            if problem.id in by_id:
                raise ValueError(f"duplicate id, line {by_id[problem.id]} has it too, {problem.id!r}")
        except ValueError as error:
            errors.append(f"{path}:{line}: {error}")
            continue
        by_id[problem.id], by_text[text] = line, (line, problem.answer)
        problems.append(problem)
    raise_all(errors, "`python data/prepare.py jsonl` makes rows of other files (data/README.md)")
    if not problems:
        raise ValueError(f"{path}: no rows")
    if dropped:
        print(f"{path}: dropped {dropped} rows that repeat an earlier problem and its answer")
    return problems


def raise_all(errors: Sequence[str], hint: str | None = None) -> None:
    """One ValueError with up to 20 lines for all errors, if there are any, and what may help."""
    if errors:
        more = [f"... and {len(errors) - 20} more"] if len(errors) > 20 else []
        raise ValueError("\n".join([*errors[:20], *more, *[hint] * (hint is not None)]))


def _no_key_twice(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"a field is given twice: {[name for name, _ in pairs]}")
    return row


def read_row(raw: bytes, *, math: bool = True) -> Problem:
    """One row, from its line of JSON. ValueError "what, value" if it has another format; with `math` also if no response could
    match its answer."""
    try:
        row = json.loads(raw.decode(), object_pairs_hook=_no_key_twice)
        json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair would be an error when the results are written
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a line of JSON ({error}), {raw[:80].decode(errors='replace')!r}") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, {row!r}")
    names, answer = ["id", "problem", "answer", "solution", "strategy"], row.get("answer")
    if not (math or isinstance(answer, str) and answer.strip()):
        names.remove("answer")  # one that is no text is a field like any other
    if missing := [name for name in names[:-2] if name not in row]:
        which = " (without one a row is for --reward)" * (missing[0] == "answer")
        raise ValueError(f"field {missing[0]!r} is missing{which}, {sorted(row)!r}")
    own = {name: row.pop(name, None) for name in names}
    strategy = own.pop("strategy")
    for name, value in own.items():
        if name in ("id", "answer") and type(value) in (int, float):
            own[name] = value = json.dumps(value)
        if not (name == "solution" and value is None) and (not isinstance(value, str) or not value.strip()):
            raise ValueError(f"field {name!r} must be a non-empty string, {value!r}")
    answer = own.get("answer", "")
    if math:
        answer = normalise_answer(answer)
        if reason := why_unusable(answer):
            raise ValueError(f"field 'answer' {reason}, {own['answer'][:200]!r}")
    strategy = None if strategy is None else Strategy.from_dict(strategy)
    return Problem(own["id"], own["problem"], answer, own["solution"], strategy, row)


def load_template(path: str) -> Template:
    """The wording of the policy's prompts, from a JSON file; "" for the usual one. ValueError naming the file."""
    try:
        return Template.from_dict(json.loads(Path(path).read_text("utf-8-sig"))) if path else Template()
    except (OSError, ValueError) as error:
        raise ValueError(f"--template {path}: {error}") from error


def check_lengths(rows: Iterable[tuple[str, int]], context: int) -> None:
    """ValueError with up to 20 lines for the rows (a name, and the tokens that it needs) that the context cannot hold."""
    what = f"tokens (prompt, and solution if it is used), the context holds {context}"
    long = [(row, tokens) for row, tokens in rows if tokens > context]
    raise_all([f"{row} needs {tokens} {what}" for row, tokens in long])


def digests(tokenizer: object, **rows: Iterable[object]) -> dict[str, str]:
    """SHA-256 of what makes a run's input: named rows of token ids, the vocabulary, and what the chat template writes around a
    message today (some write the date)."""
    found = {
        **rows,
        "tokenizer": [sorted(tokenizer.get_vocab().items()), sorted(tokenizer.all_special_ids)],
        "template": [tokenizer.apply_chat_template(auto_messages("q"), add_generation_prompt=True, tokenize=False)],
    }
    for name, values in found.items():
        digest = hashlib.sha256()
        for value in values:
            digest.update(json.dumps(value).encode() + b"\n")
        found[name] = digest.hexdigest()
    return found


def shuffled_strategies(strategies: Sequence[Strategy], seed: int) -> list[Strategy]:
    """Each row's strategy replaced by one of another problem type [ours; the idea is arXiv 2608.09228's]. A control: does the
    content of a strategy matter, or would any second view of the problem do? strategies: one for each row. Returns a
    permutation of them, drawn by the seed, in which no row has a strategy of its own type (types are compared as text, whatever
    their case). ValueError if more than half of the rows have one type: then there is none."""
    types = [strategy.type.lower() for strategy in strategies]
    for name, rows in Counter(types).most_common(1):
        if 2 * rows > len(types):
            raise ValueError(f"shuffled strategies: {rows} of {len(types)} rows have the type {name!r}, more than half")
    rng, drawn = random.Random(seed), list(range(len(types)))
    rng.shuffle(drawn)
    for i, own in enumerate(types):
        if types[drawn[i]] == own:
            # Swap with a row of another type that holds another type's strategy: then both rows are right. There is such a
            # row: at least as many rows have other types as there are strategies of this type, and row i has one of those.
            j = rng.choice([j for j, other in enumerate(types) if own not in (other, types[drawn[j]])])
            drawn[i], drawn[j] = drawn[j], drawn[i]
    return [strategies[k] for k in drawn]
