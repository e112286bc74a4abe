"""The command behind `python strategy.py ...`: strategies extracted by a strong model, and a report on their quality.

    python strategy.py --data problems.jsonl --endpoint https://host/v1 --model NAME --out strategies.jsonl
    python strategy.py --help                       # our own sampler instead, an estimate, the report

A row gets a solution if the data has none, then five candidate strategies. The leak filter rejects some, one call scores the
rest, and the best one is kept [app B]; data/README.md has the details. The four criteria are the paper's [tab 5], every wording
is ours. The journal beside the output, OUT.log.jsonl, makes the command safe to kill: each answer is on the disk, under a hash
of its exact request, before its worker asks the next question. A kill loses at most one answer a worker. What needs no model
(reading, the filter, the choice) is done anew each time.
"""

import hashlib
import json
import os
import random
import re
import statistics
import sys
import threading
import time
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from email.utils import mktime_tz, parsedate_tz
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from checkpoint import lock, to_json
from data.problems import Problem, load_problems
from grader import MathWorker, extract_answer, same_answer
from strategy import INSTRUCTION, Strategy, extraction_prompt, format_strategy, parse_strategy
from tools.leaks import leaks

EXCERPT = 300  # characters of what a message or a record quotes
GIVE_UP_AFTER = 20  # requests in a row that failed for good: the server is down, for the other rows too
LONGEST_WAIT = 900.0  # seconds; a limit that lasts longer stops the command
WHOLE = ("stop", "eos", "eos_token", "end_turn", "stop_sequence")  # finish_reason, in lower case, of a text that is not cut off
PASSING = (None, 408, 409, 424, 425, 429, 498)  # statuses that the next try may not meet, beside 5xx; None: nothing to read
# What a 429 says when the money is gone: a code, or words without a hint that it is free soon.
NO_MONEY_CODE = re.compile(r"insufficient.(?:quota|balance|fund|credit)|billing.hard.limit|arrears|out of credit", re.I)
NO_MONEY = re.compile(
    r"(?:current|monthly).quota|(?:credit|balance(?!r)|budget|spend)[^.]{0,30}(?:limit|exceed|exhaust|spent|used up)", re.I
)
FREE_SOON = re.compile(r"(?:per.?|/)(?:sec|min)", re.I)
WAIT_HINT = re.compile(r"(?:retry|try again) (?:in|after) ((?:[0-9]+(?:\.[0-9]+)? ?(?:ms|[dhms])[a-z]* ?)+)", re.I)
UNIT_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
# (open, close) of the thoughts before an answer, which begins after the last close: some chat templates put the open into the
# prompt. FRAME: what may be around the answer itself, and the control tokens after it. All in any case.
THOUGHTS = (
    *((f"<{name}>", f"</{name}>") for name in ("think", "thinking", "thought", "reasoning", "seed:think")),
    (r"\[THINK]", r"\[/THINK]"),
    (r"<\|channel\|>", r"<\|channel\|>final<\|message\|>|\A\s*analysis(?s:.*)assistantfinal"),
)
FRAME = re.compile(r"\A<answer>|(?:<(?:[|｜][^<>\s]+[|｜]|/s|/answer|end_of_turn)>\s*)+\Z", re.I)
ROWS_FAILED = 3  # exit status: some rows got no strategy; 1 says that something stopped the command, 2 that a flag is wrong
# For the estimate of --dry_run only, roughly: English and LaTeX; texts without thoughts, the scores of one candidate.
CHARACTERS_A_TOKEN, SOLUTION_TOKENS, STRATEGY_TOKENS, SCORE_TOKENS = 4, 700, 220, 20

CRITERIA = ("type", "strategy", "steps", "no_leak")  # [tab 5]; each is scored from 0.0 to 1.0
# [ours] With this score on no_leak, or a lower one, a candidate is out: scoring_prompt says what such a score means.
LEAK_SCORE = 0.2

Record = dict[str, Any]  # a JSON object
Messages = list[dict[str, str]]


def solution_prompt(problem: str) -> Messages:
    """Messages that ask for a worked solution, for rows that have none [ours]. It ends with INSTRUCTION, because the policy is
    warmed up on such solutions, and they are graded like its own."""
    return _user(f"""Solve the problem below and write the solution down for a reader who wants to learn from it: every \
step that matters with its reason, in order, without false starts and without remarks about yourself.

<problem>
{problem}
</problem>

{INSTRUCTION}""")


def scoring_prompt(problem: str, solution: str, candidates: Sequence[Strategy]) -> Messages:
    """Messages that ask for the scores of all candidates of a problem in one call [app B], on the four criteria [tab 5]. They
    are scored side by side so that one measure holds for all of them. parse_scores reads the reply [ours]."""
    shown = "\n\n".join(
        f"<candidate {i}>\n{format_strategy(candidate)}\n</candidate {i}>" for i, candidate in enumerate(candidates, start=1)
    )
    form = "\n".join(f"{i}: {' '.join(CRITERIA)}" for i in range(1, len(candidates) + 1))
    return _user(f"""Below are a problem, a solution to it, and {len(candidates)} attempts at describing the strategy of \
that solution, for use on similar problems. Score the attempts.

<problem>
{problem}
</problem>

<solution>
{solution}
</solution>

{shown}

Give each attempt four scores from 0.0 (fails) to 1.0 (could not be better):
- type: the problem type is correct, and narrower than a field of mathematics.
- strategy: it solves this problem, it names a definite idea, and the idea says more than "set up and solve".
- steps: a solver can act on each of them, and each still serves the other problems of the type.
- no_leak: no value computed for this problem and no answer. At most {LEAK_SCORE} if the answer can be read from it.

Use the same measure for all, whatever their order. Reply with one line for each attempt, in their order, and nothing \
else: its number and a colon as below, then its four scores in place of the names, with a blank between them.

{form}""")


def parse_scores(text: str, n: int) -> list[dict[str, float]]:
    """The scores in a reply to scoring_prompt with n candidates: n dicts {criterion: 0.0 to 1.0}, in the candidates' order. The
    reply has one line for each candidate, "2: 0.9 1.0 0.8 1.0"; empty lines do no harm. ValueError naming the line for anything
    else."""
    lines, scores = [line.strip() for line in text.splitlines() if line.strip()], []
    if len(lines) != n:
        raise ValueError(f"scores reply: expected {n} lines, got {len(lines)}: {text[:200]!r}")
    for i, line in enumerate(lines, start=1):
        found = re.fullmatch(f"{i}:" + r"\s+(0?\.[0-9]+|0|1(?:\.0+)?)" * len(CRITERIA), line)
        if not found:
            raise ValueError(f"scores reply: expected '{i}:' and {len(CRITERIA)} scores from 0.0 to 1.0, got {line!r}")
        scores.append(dict(zip(CRITERIA, map(float, found.groups()), strict=True)))
    return scores


def mean_score(scores: Mapping[str, float]) -> float:
    """The mean of one candidate's scores over CRITERIA: the candidate with the highest is kept [app B]. Rounded: tenths that
    add up to 3.2 must not end below 0.8, from which on the paper's audit says "high" [app H]."""
    return round(statistics.fmean(scores[name] for name in CRITERIA), 6)


def _user(content: str) -> Messages:
    return [{"role": "user", "content": content}]


class Stop(Exception):
    """Nothing can go on: the server refuses us, or is gone. The message is for the user."""


class RowFailed(Exception):
    """This row gets no strategy, for the reason given; the others go on."""


class Refused(RowFailed):
    """The server will not answer this request. Before it has answered any, the reason is not the row."""


class NoAnswer(ValueError):
    """A reply of HTTP 200 without an answer. args: what it says instead, and the status of the error in it, or None."""


@dataclass(frozen=True)
class Answer:
    """One paid reply. usage: prompt_tokens, completion_tokens, or {}. reasoning: thoughts that the server keeps apart. finish:
    why the text ended. One of WHOLE ends a whole one; all others ("length", "content_filter", null, ...) broke it off."""

    text: str
    finish: str | None
    usage: dict[str, int]
    reasoning: str = ""

    def fault(self) -> list[str] | None:
        """[kind, detail] of why there is nothing to read in it, or None."""
        if self.finish == "refusal":
            return ["refused", self.text[:EXCERPT]]
        if str(self.finish).lower() not in WHOLE:  # what is there may be readable, with only half of its last step
            return ["cut off", f"finish_reason {self.finish}"]
        if (self.text + self.reasoning).strip() and not without_thoughts(self.text):
            return ["thoughts without content", (self.reasoning or self.text)[:EXCERPT]]
        return None


Ask = Callable[[str, int, Messages], Answer]  # (step, index of the try, messages) -> Answer
Verdict = Callable[[str, str], tuple[str | None, bool]]  # (solution, reference) -> (the answer it gives, whether it is right)


def settings_of(args: Namespace) -> Record:
    """What decides an answer, apart from the row: flags, and a hash of the prompts' wording. A journal has one of these."""
    example = Strategy("t", "s", ("a",))
    prompts = [solution_prompt("p"), extraction_prompt("p", "s"), scoring_prompt("p", "s", [example])]
    settings = {"model": args.model or args.local, "prompts": hash_of(prompts)}
    return settings | {name: getattr(args, name) for name in ("temperature", "top_p", "max_tokens", "seed", "body")}


def hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def request_body(settings: Record, step: str, index: int, messages: Messages) -> Record:
    """The JSON of a request. step: "solution", "candidate" or "score". index: of the try, from 0."""
    body = {
        "model": settings["model"],
        "messages": messages,
        # Scores are greedy at first; if those cannot be read, greedy ones would be the same again.
        "temperature": 0.0 if step == "score" and index == 0 else settings["temperature"],
        "top_p": settings["top_p"],
        "max_tokens": settings["max_tokens"],
        "seed": settings["seed"] + index,  # with one seed for all, a server that honours it would repeat itself
    }
    body |= settings["body"]
    return {name: value for name, value in body.items() if value is not None}


class Server:
    """A chat server, asked through the openai package. A request is repeated after a failed connection, a timeout, a reply
    without an answer, and a status that may pass [PASSING], up to --retries times. Not by the package: that waits without a
    word, and asks again when the money is gone."""

    def __init__(self, args: Namespace, environment: dict[str, str]) -> None:
        url = urlsplit(args.endpoint)
        if url.scheme not in ("http", "https") or not url.hostname or "@" in url.netloc or url.query:  # it may hold a password
            raise ValueError("--endpoint: expected https://host/v1 or http://host:port/v1, without a user name or a query")
        self.key = environment.get(args.key_env, "").strip()
        if not (self.key.isascii() and self.key.isprintable()):  # an error of the HTTP library would show it
            raise ValueError(f"${args.key_env}: the key holds characters that no HTTP header can carry")
        if self.key and url.scheme == "http" and url.hostname not in ("localhost", "127.0.0.1", "::1"):
            raise ValueError(f"--endpoint: plain http would show ${args.key_env} to all on the way; use https, or unset it")
        try:
            import openai  # here, because only --endpoint needs it
        except ImportError:
            raise ValueError("--endpoint needs the openai package: pip install openai") from None
        self.openai, self.name = openai, args.endpoint
        self.client = openai.OpenAI(
            api_key=self.key or "none",  # the package insists on one, servers without keys ignore it
            base_url=args.endpoint,
            max_retries=0,
            timeout=openai.Timeout(args.read_timeout, connect=10.0),
        )
        self.retries, self.stop = args.retries, threading.Event()  # set when the run ends: nobody waits any longer
        self.failures = 0  # in a row, of all workers

    def ask(self, body: Record) -> Answer:
        """The answer to one request, after as many tries as it takes. Raises RowFailed or Stop."""
        rest = {name: value for name, value in body.items() if name not in ("model", "messages")}
        for number in range(self.retries + 1):
            try:
                # extra_body, because --body may hold fields that the package does not know as arguments
                reply = self.client.chat.completions.create(model=body["model"], messages=body["messages"], extra_body=rest)
                answer = read_reply(reply)
                self.failures = 0
                return answer
            except (self.openai.APIError, ValueError) as error:  # ValueError: no JSON, or no answer in it
                status, said, reason = self._read(error)
            seconds = said or min(2**number / 2, 60.0)
            if number == self.retries or seconds > LONGEST_WAIT or not (status in PASSING or status >= 500):
                break
            if seconds >= 1:
                tqdm.write(f"waiting {seconds:.3g} s before the next try: {reason}", file=sys.stderr)
            if self.stop.wait(seconds):
                raise Stop("stopped")
        if status in (401, 402, 429):  # the key, the money and the limit are the same for all rows
            raise Stop(reason)
        self.failures += 1
        if self.failures >= GIVE_UP_AFTER:
            raise Stop(f"{self.name}: {self.failures} requests in a row failed for good, the last with: {reason}")
        # A wrong model or path is as wrong for the next row; but these may also be about one text.
        raise (Refused if status in (403, 404, 451) else RowFailed)(f"no answer: {reason}")

    def _read(self, error: Exception) -> tuple[int | None, float | None, str]:
        """(status, seconds to wait, reason) of a failed try; None for what the server does not say. An error inside a reply has
        a status too. It is 402 for all that say that the money is gone."""
        status, headers, text = None, {}, f"{error} ({error.__cause__!r})" if error.__cause__ else str(error)
        if isinstance(error, NoAnswer):
            text, status = error.args
        elif (response := getattr(error, "response", None)) is not None:
            status, headers = response.status_code, response.headers
            text = f"HTTP {status}: {response.text or error}"  # the package may leave out all but one field of it
        said = retry_after(headers, text)
        gone = NO_MONEY.search(text) and said is None and not FREE_SOON.search(text)
        if status in (None, 429) and (gone or NO_MONEY_CODE.search(text)):
            status = 402
        if self.key:
            text = text.replace(self.key, "***")  # some servers quote the key when they refuse it
        wait = f"; Retry-After: {headers['retry-after']}" if "retry-after" in headers else ""
        return status, said, " ".join(text.split())[:EXCERPT] + wait


def retry_after(headers: Mapping[str, str], text: str) -> float | None:
    """The seconds to wait by a reply's header (a number or a date [RFC 9110]) or by its text; None if neither says."""
    after = headers.get("retry-after", "")
    with suppress(ValueError, OverflowError):  # OverflowError: a date that no calendar has
        date = parsedate_tz(after)
        seconds = mktime_tz(date) - time.time() if date else float(after)
        return seconds if 0 < seconds < float("inf") else None
    hint = WAIT_HINT.search(text)
    parts = re.findall("([0-9.]+) ?(ms|[dhms])", hint[1].lower()) if hint else []
    return sum(float(number) * UNIT_SECONDS[unit] for number, unit in parts) or None


def read_reply(reply: Any) -> Answer:
    """The Answer in a reply, an openai ChatCompletion. NoAnswer if there is none in it. The package checks no field, so any may
    be missing. An empty text is an answer too: it is paid, and cannot be read."""
    choice = message = None
    with suppress(AttributeError, LookupError, TypeError):
        choice = reply.choices[0]
        content, message = choice.message.content, choice.message
    if error := getattr(choice, "error", None) or getattr(reply, "error", None):  # half a text may be beside it
        code = str(error.get("code") if isinstance(error, dict) else None)
        raise NoAnswer(f"an error in the reply: {error}", int(code) if re.fullmatch("[45][0-9]{2}", code) else None)
    if message is None:
        raise NoAnswer(f"no message in the reply: {reply}", None)
    counts = {name: getattr(getattr(reply, "usage", None), name, None) for name in ("prompt_tokens", "completion_tokens")}
    usage = {name: count for name, count in counts.items() if isinstance(count, int)}
    parts = content if isinstance(content, list) else None
    thoughts = getattr(message, "reasoning_content", None), getattr(message, "reasoning", None), parts
    reasoning = next(filter(None, (text_of(value, "thinking", "reasoning") for value in thoughts)), "")
    text, finish = text_of(content, "text", "output_text"), text_of(getattr(choice, "finish_reason", None)) or None
    refusal = text_of(getattr(message, "refusal", None)) or text_of(parts, "refusal")
    if refusal and not text:
        text, finish = refusal, "refusal"
    return Answer(text, finish, usage, reasoning)


def text_of(value: Any, *kinds: str) -> str:
    """A field's text, "" if it has none: a string, or the joined parts of these types, {"type": "text", "text": "..."}. The end
    of a part's type names its field. Half of a surrogate pair, which cannot be written as UTF-8, becomes "?"."""
    if isinstance(value, list):
        parts = [part for part in value if isinstance(part, dict) and part.get("type", "text") in kinds]
        value = "".join(text_of(part.get(part.get("type", "text").split("_")[-1]), "text") for part in parts)
    return value.encode(errors="replace").decode() if isinstance(value, str) else ""


class LocalModel:
    """The same questions to a model folder, sampled by rollout.py. Questions of workers that wait together are one batch."""

    def __init__(self, args: Namespace) -> None:
        import torch  # here, like model and rollout below: only --local needs them

        from model import load_model

        self.name, self.max_rows = f"local: {args.local}", args.workers
        device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        self.model, self.tokenizer = load_model(args.local, dtype=getattr(torch, args.dtype), device=device)
        self.stop = threading.Event()  # of the run; no question waits for another time here
        self.turn = threading.Lock()
        self.encoding = threading.Lock()  # encode_chat changes the tokenizer's treatment of special tokens for a moment
        self.waiting: list[tuple[Record, list[int], Future]] = []  # (body, prompt ids, the answer to come)

    def ask(self, body: Record) -> Answer:
        """The answer to one request; RowFailed if its prompt does not fit the model."""
        from model import encode_chat

        with self.encoding:
            ids, future = encode_chat(self.tokenizer, body["messages"]), Future()
        if len(ids) >= self.model.config.max_position_embeddings:
            raise RowFailed(f"a prompt of {len(ids)} tokens fills the model's context")
        self.waiting.append((body, ids, future))
        with self.turn:  # whoever gets in samples for all that wait; the others find their answers when they get in
            if not future.done():
                time.sleep(0.02)  # the workers of the last batch are about to ask their next questions
                self._sample(body["temperature"])
        return future.result()

    def _sample(self, temperature: float) -> None:
        """Answers for all that wait with this temperature: one call of generate has one."""
        from rollout import generate

        batch = [place for place in self.waiting if place[0]["temperature"] == temperature]
        first = batch[0][0]
        groups = generate(
            self.model,
            [ids for _, ids, _ in batch],
            n=1,
            max_new_tokens=first["max_tokens"],
            temperature=temperature,
            top_p=first["top_p"],
            eos_ids=self.model.config.eos_ids,
            seed=[body["seed"] for body, _, _ in batch],
            max_rows=self.max_rows,
        )
        for place, (row,) in zip(batch, groups, strict=True):
            _, ids, future = place
            text = self.tokenizer.decode(row.response_ids, skip_special_tokens=True)
            usage = {"prompt_tokens": len(ids), "completion_tokens": len(row.response_ids)}
            future.set_result(Answer(text, "stop" if row.finished else "length", usage))
            self.waiting.remove(place)


class Journal:
    """OUT.log.jsonl, one JSON object a line, only ever appended to. Kinds of line, by "kind":

    run      a start of the command: settings, endpoint, data
    answer   a paid answer: key (of the request), row, step, index, text, reasoning, finish, usage
    row      what became of a row, see `extract_row`
    """

    def __init__(self, stream: Any) -> None:
        self.stream, self.lock = stream, threading.Lock()
        self.answers: dict[str, Answer] = {}  # by the hash of the request

    def write(self, record: Record) -> None:
        """Add a line. It is on the disk (fsync) when this returns."""
        with self.lock:
            self.stream.write(to_line(record | {"time": round(time.time(), 3)}))
            self.stream.flush()
            os.fsync(self.stream.fileno())


@contextmanager
def open_journal(path: Path, start: Record) -> Iterator[Journal]:
    """The journal at `path`, made if there is none, with the answers in it, locked against a second run. start: the line of
    this run. ValueError if the journal's answers were made with other settings."""
    with path.open("a+b") as stream:
        lock(stream, f"{path}: another run is writing it, and both would pay for the same answers", tqdm.write)
        journal = Journal(stream)
        for record in read_journal(path):
            if record["kind"] == "answer":
                thoughts = record["reasoning"][:EXCERPT]
                journal.answers[record["key"]] = Answer(record["text"], record["finish"], record["usage"], thoughts)
            elif record["kind"] == "run" and record["settings"] != start["settings"]:
                made = f"made with {record['settings']}, now {start['settings']}"
                raise ValueError(f"{path}: {made}: no paid answer would fit; name another --out, or go on with the same")
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                stream.write(b"\n")  # a kill left half a line; the next one must not be glued to it
        journal.write(start)
        yield journal


def read_journal(path: Path) -> Iterator[Record]:
    """The lines of a journal, ValueError if it has none. Others, such as half of one that a kill left, are reported."""
    number = passed_over = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                record = json.loads(line)
                if record["kind"] not in ("run", "answer", "row"):
                    raise ValueError
            except (ValueError, LookupError, TypeError):
                passed_over += 1
                print(f"{path}:{number}: cannot be read, so an answer in it is asked for again: {line[:80]!r}", file=sys.stderr)
            else:
                yield record
    if number and number == passed_over:
        raise ValueError(f"{path}: no journal of this program; move it away, or name another --out")


def to_line(record: Record) -> bytes:
    """One line of JSON."""
    return to_json(record, ensure_ascii=False).encode() + b"\n"


def extract_row(row: Problem, ask: Ask, verdict: Verdict, args: Namespace) -> tuple[Record, Problem | None]:
    """(the journal's record of a row, the row with solution and strategy, or None if it failed). The record: row, kept (the
    candidate's index), failed (the reason, or null), candidates: a list of {index, strategy, rejected: [kind, detail] or null,
    scores}."""
    record = {"kind": "row", "row": row.id, "kept": None, "failed": None, "candidates": []}
    try:
        row = replace(row, solution=right_solution(row, ask, verdict, args.solution_tries))
        return record, replace(row, strategy=row.strategy or chosen_strategy(row, ask, args, record))
    except RowFailed as error:
        return record | {"failed": str(error)}, None


def grade(worker: MathWorker, lock: threading.Lock, solution: str, answer: str) -> tuple[str | None, bool]:
    """(the answer that a solution gives, or None; whether it is right). The worker is for one thread at a time."""
    found = extract_answer(solution)
    with lock:
        return found, found is not None and same_answer(found, answer, worker)


def right_solution(row: Problem, ask: Ask, verdict: Verdict, tries: int) -> str:
    """The data's own solution, or else the first of the model's that the grader finds right."""
    if row.solution:
        found, right = verdict(row.solution, row.answer)
        if found is not None and not right:  # a strategy drawn from a wrong solution would teach its mistake
            raise RowFailed(f"the data's solution ends in {found!r}, the data's answer is {row.answer!r}")
        return row.solution
    given = []
    for index in range(tries):
        reply = ask("solution", index, solution_prompt(row.problem))
        text = without_thoughts(reply.text)
        found, right = verdict(text, row.answer)
        fault = reply.fault()
        if right and not fault:
            return text
        given.append(fault[0] if fault else "no answer" if found is None else f"answer {found[:60]!r}")
    raise RowFailed(f"{tries} solutions, none with the answer {row.answer!r}: {', '.join(given)}")


def chosen_strategy(row: Problem, ask: Ask, args: Namespace, record: Record) -> Strategy:
    """The best of k candidates. Fills record's candidates. A round asks for what is missing: for k candidates (k more if none
    of those before is left), then for the scores of all that are left, in one call. There are up to --rounds of them. The
    strategy is extracted from the whole response [tab 4]. The leak filter and the scorer get it without its thoughts [ours],
    which hold every number that was tried."""
    written = without_thoughts(row.solution)
    if not written:
        raise RowFailed("its solution is nothing but thoughts")
    candidates, unread = record["candidates"], None
    for number in range(args.rounds):
        if all(candidate["rejected"] for candidate in candidates):
            if candidates and all(candidate["rejected"][0] == "thoughts without content" for candidate in candidates):
                break  # the server keeps the answers among the thoughts, or the model thinks on: so would the next ones
            for index in range(len(candidates), len(candidates) + args.candidates):
                reply = ask("candidate", index, extraction_prompt(row.problem, row.solution))
                candidates.append(judge_candidate(index, reply, replace(row, solution=written), candidates))
        if left := [candidate for candidate in candidates if candidate["rejected"] is None]:
            texts = [Strategy.from_dict(candidate["strategy"]) for candidate in left]
            unread = score_candidates(left, ask("score", number, scoring_prompt(row.problem, written, texts)))
        if scored := [candidate for candidate in candidates if candidate["rejected"] is None and candidate["scores"]]:
            best = max(scored, key=lambda candidate: mean_score(candidate["scores"]))  # of equals the first [ours]
            record["kept"] = best["index"]
            return Strategy.from_dict(best["strategy"])
    for candidate in candidates:
        candidate["rejected"] = candidate["rejected"] or ["not scored", unread]
    why = Counter(candidate["rejected"][0] for candidate in candidates)
    raise RowFailed(f"no candidate is left of {len(candidates)}: " + ", ".join(f"{n} {kind}" for kind, n in why.most_common()))


def without_thoughts(text: str) -> str:
    """What a model wrote after its thoughts [THOUGHTS]; "" if they never end."""
    rests = [re.split(close, text, flags=re.I)[-1] for _, close in THOUGHTS]
    if any(re.search(opening, rest, re.I) for (opening, _), rest in zip(THOUGHTS, rests, strict=True)):
        return ""
    return FRAME.sub("", min(rests, key=len).strip()).strip()


def judge_candidate(index: int, reply: Answer, row: Problem, others: Sequence[Record]) -> Record:
    """A candidate's record after everything that needs no model: read, compared with the others, searched for leaks."""
    candidate = {"index": index, "strategy": None, "rejected": None, "scores": None}
    if fault := reply.fault():
        return candidate | {"rejected": fault}
    try:
        strategy = parse_strategy(without_thoughts(reply.text))
    except ValueError as error:
        return candidate | {"rejected": ["not parsed", str(error)]}
    candidate["strategy"] = strategy.to_dict()
    if any(other["strategy"] == candidate["strategy"] for other in others):
        return candidate | {"rejected": ["repeated", "the same as one before"]}
    if found := leaks(strategy, row.problem, row.solution, row.answer):
        return candidate | {"rejected": ["leak", "; ".join(found)]}
    return candidate


def score_candidates(candidates: Sequence[Record], reply: Answer) -> str | None:
    """Put the scores into the candidates' records. Returns why the reply is of no use, or None. A candidate from which the
    answer can be read, by its score, is out even if no other is left [ours]."""
    if fault := reply.fault():
        return ": ".join(["scores", *fault])
    try:
        scores = parse_scores(without_thoughts(reply.text), len(candidates))
    except ValueError as error:
        return str(error)
    for candidate, own in zip(candidates, scores, strict=True):
        candidate["scores"] = own
        if own["no_leak"] <= LEAK_SCORE:
            candidate["rejected"] = ["leak by score", f"no_leak: {own['no_leak']}"]
    return None


def extract(args: Namespace) -> int:
    """Make the strategies of args.data; returns the exit status: 0, or ROWS_FAILED."""
    out = Path(args.out)
    log = Path(f"{out}.log.jsonl")
    if out.exists() and not log.exists():
        raise ValueError(f"{out}: already there, and not made by this program ({log.name} is missing); name another --out")
    with MathWorker() as worker:
        rows = load_problems(args.data, worker)[: args.limit]
        model = LocalModel(args) if args.local else Server(args, dict(os.environ))
        start = {"kind": "run", "settings": settings_of(args), "endpoint": model.name, "data": args.data}
        try:
            with open_journal(log, start) as journal:
                results = ask_all(rows, journal, model, partial(grade, worker, threading.Lock()), args)
        except Stop as error:
            raise ValueError(f"{error}\nthe answers so far are in {log}: the same command again goes on from there") from None
        failed = [record for record, row in results if row is None]
        if len(failed) < len(rows):
            part = Path(f"{out}.part")
            part.write_bytes(b"".join(to_line(row.to_row()) for _, row in results if row is not None))
            part.replace(out)  # the file appears whole, or not at all
    print(f"{out}: {len(rows) - len(failed)} rows; in all {spent(list(journal.answers.values()), args)}")
    for record in failed:
        print(f"failed: {record['row']}: {record['failed']}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {len(rows)} rows failed, reasons above and in {log}", file=sys.stderr)
    return ROWS_FAILED if failed else 0


def ask_all(
    rows: Sequence[Problem], journal: Journal, model: Server | LocalModel, verdict: Verdict, args: Namespace
) -> list[tuple[Record, Problem | None]]:
    """extract_row's result for each row, with every answer from the journal or put into it. Rows are worked on in --workers
    threads. The first Stop, or Ctrl-C, ends all of them; the answers that are on their way are waited for and kept."""
    settings, stop = settings_of(args), model.stop
    ended_by, asking = [], set()  # the exceptions that ended it; ids of the rows whose request is on its way

    def ask(row: Problem, step: str, index: int, messages: Messages) -> Answer:
        body = request_body(settings, step, index, messages)
        key = hash_of([body, step, index])  # the index too: --body may have removed the seed
        if key in journal.answers:
            return journal.answers[key]
        if stop.is_set():
            raise Stop("stopped")
        asking.add(row.id)
        try:
            answer = model.ask(body)
            place = {"kind": "answer", "key": key, "row": row.id, "step": step, "index": index}
            journal.write(place | asdict(answer))  # before this worker goes on
            journal.answers[key] = replace(answer, reasoning=answer.reasoning[:EXCERPT])  # whole ones would fill the memory
            return answer
        except Refused as error:
            asking.discard(row.id)
            while asking and not journal.answers and not stop.wait(0.1):
                pass  # an answer that is on its way to another row would show that this is about the row
            raise (error if journal.answers else Stop(str(error))) from None
        finally:
            asking.discard(row.id)

    def work(row: Problem) -> tuple[Record, Problem | None]:
        try:
            record, done = extract_row(row, partial(ask, row), verdict, args)
            journal.write(record)
            return record, done
        except BaseException as error:
            ended_by.append(error)  # the first is the reason; those after it only say that the run has ended
            stop.set()  # here, before this worker takes its next row
            raise

    with ThreadPoolExecutor(args.workers) as pool:
        futures = [pool.submit(work, row) for row in rows]
        try:
            for future in tqdm(as_completed(futures), total=len(rows), unit="row", disable=None):  # None: without a terminal
                future.result()
        except BaseException as error:
            stop.set()
            if isinstance(error, KeyboardInterrupt):
                print("\nstopping; waiting for answers on their way, the only ones that a kill would lose", file=sys.stderr)
            pool.shutdown(cancel_futures=True)
            raise (error if isinstance(error, KeyboardInterrupt) else ended_by[0]) from None
    return [future.result() for future in futures]


def spent(answers: Sequence[Answer], args: Namespace) -> str:
    """12 answers, 3,400 + 1,200 tokens, cost 0.01: tokens sent and received, and the cost if the prices are given."""
    sent = sum(answer.usage.get("prompt_tokens", 0) for answer in answers)
    received = sum(answer.usage.get("completion_tokens", 0) for answer in answers)
    return f"{len(answers):,} answers, {sent:,} + {received:,} tokens{cost(sent, received, args)}"


def cost(prompt_tokens: int, completion_tokens: int, args: Namespace) -> str:
    if args.price is None:
        return ""
    price_in, price_out = args.price
    return f", cost {(prompt_tokens * price_in + completion_tokens * price_out) / 1e6:.2f}"


def dry_run(args: Namespace) -> int:
    """Print the prompts of the first rows, and a rough estimate of what the whole takes. Sends and writes nothing."""
    rows = load_problems(args.data)[: args.limit]
    print(f"{sum(row.strategy is not None for row in rows)} of {len(rows)} rows have a strategy already")
    requests = tokens_in = tokens_out = 0
    for number, row in enumerate(rows):
        for step, times, messages, unseen, expected in planned_requests(row, args):
            requests += times
            tokens_in += times * (len(messages[0]["content"]) // CHARACTERS_A_TOKEN + unseen)
            tokens_out += times * expected
            if number < args.samples:
                print(f"--- {row.id}, {step}, {times} times\n{messages[0]['content']}\n")
    print(f"{len(rows)} rows, {requests:,} requests in one round")
    print(f"about {tokens_in:,} tokens in and {tokens_out:,} out{cost(tokens_in, tokens_out, args)}")
    most = requests * args.max_tokens
    print(f"thoughts are billed too: up to {most:,} tokens out{cost(tokens_in, most, args)}, --max_tokens for each request")
    print("nothing was sent")
    return 0


def planned_requests(row: Problem, args: Namespace) -> Iterator[tuple]:
    """The requests of a row, if one round is enough: (step, times, messages, tokens still missing in them, tokens out)."""
    solution, unseen = row.solution, 0
    if solution is None:
        yield "solution", 1, solution_prompt(row.problem), 0, SOLUTION_TOKENS
        solution, unseen = "(the model's solution)", SOLUTION_TOKENS
    if row.strategy is None:
        k, example = args.candidates, Strategy("(a candidate's type)", "(its strategy)", ("(its steps)",))
        yield "candidate", k, extraction_prompt(row.problem, solution), unseen, STRATEGY_TOKENS
        prompt = scoring_prompt(row.problem, without_thoughts(solution), [example] * k)
        yield "score", 1, prompt, unseen + k * STRATEGY_TOKENS, k * SCORE_TOKENS


def report(args: Namespace) -> int:
    """Print the quality of a file of strategies, from the file and the journal beside it (if there is one)."""
    path = Path(args.report)
    rows = [row for row in load_problems(path) if row.strategy is not None]
    if not rows:
        raise ValueError(f"{path}: no row with a strategy")
    print(f"{path}: {len(rows)} strategies")
    log = Path(f"{path}.log.jsonl")
    if log.is_file():
        report_journal(log, {row.id for row in rows}, args)
    else:
        print(f"{log.name} is not there: nothing about candidates, scores and rejections")
    for row in random.Random(args.seed).sample(rows, min(args.samples, len(rows))):
        print(f"\n--- {row.id}\n{row.problem}\n\n{format_strategy(row.strategy)}")
    return 0


def report_journal(log: Path, kept: set[str], args: Namespace) -> None:
    """What the journal knows: candidates and why they were rejected, bands of the kept ones, tokens."""
    records, answers = {}, []
    for record in read_journal(log):
        if record["kind"] == "row":
            records[record["row"]] = record
        elif record["kind"] == "answer":
            answers.append(Answer(record["text"], record["finish"], record["usage"]))
    candidates = [candidate for record in records.values() for candidate in record["candidates"]]
    why = Counter(candidate["rejected"][0] for candidate in candidates if candidate["rejected"])
    print(f"candidates: {len(candidates)} of {len(records)} rows")
    print("rejected: " + (", ".join(f"{kind} {share(n, len(candidates))}" for kind, n in why.most_common()) or "none"))
    chosen = [record for record in records.values() if record["kept"] is not None and record["row"] in kept]
    means = [mean_score(record["candidates"][record["kept"]]["scores"]) for record in chosen]
    bands = Counter("high" if mean >= 0.8 else "medium" if mean >= 0.5 else "low" for mean in means)  # [app H]
    print("quality: " + ", ".join(f"{band} {share(bands[band], len(chosen))}" for band in ("high", "medium", "low")))
    print(f"paid: {spent(answers, args)}")


def share(part: int, whole: int) -> str:
    return f"{part} ({100 * part / whole:.1f} %)" if whole else f"{part}"


def build_parser() -> ArgumentParser:
    # There is no flag for the key: command lines end up in shell histories, process lists and logs.
    about = "Strategies extracted by a strong model, and a report on their quality."
    parser = ArgumentParser(prog="strategy.py", description=about, allow_abbrev=False)
    default = " (default: %(default)s)"
    add = parser.add_argument_group("what to do").add_argument
    add("--data", metavar="FILE", help="jsonl with id and problem, and with answer and solution if there are any")
    add("--out", metavar="FILE", help="rows with strategies; the journal is written beside it, as FILE.log.jsonl")
    add("--limit", type=int, metavar="N", help="only the first N rows (default: all)")
    add("--report", metavar="FILE", help="only print the quality of such a file")
    add("--dry_run", action="store_true", help="print the first prompts and an estimate, send nothing")
    add("--samples", type=int, default=5, metavar="N", help="--report: strategies, --dry_run: rows to show" + default)
    add = parser.add_argument_group("questions").add_argument
    add("--candidates", type=int, default=5, help="strategies asked for in a round [the paper's number]" + default)
    add("--rounds", type=int, default=2, help="rounds at most; another if no candidate is left or no score is read" + default)
    add("--solution_tries", type=int, default=3, help="solutions asked for at most, for a row without one" + default)
    add("--temperature", type=float, default=0.6, help="sampling temperature of all but the scores, which get 0" + default)
    add("--top_p", type=float, default=0.95, help="nucleus sampling" + default)
    add("--max_tokens", type=int, default=8192, help="longest answer, thoughts included; a cut one is not used" + default)
    seed = "candidate i is asked for with seed + i; also draws the report's samples"
    add("--seed", type=int, default=0, help=seed + default)
    add("--workers", type=int, default=8, help="rows worked on at once; with --local the batch" + default)
    add = parser.add_argument_group("a server").add_argument
    add("--endpoint", metavar="URL", help="an OpenAI-compatible server, up to /v1 (needs pip install openai)")
    add("--model", metavar="NAME", help="the model's name at the server")
    add("--key_env", default="OPENAI_API_KEY", metavar="NAME", help="environment variable of the key" + default)
    body = """fields for every request; null removes one: '{"max_tokens": null, "max_completion_tokens": 8192}'"""
    add("--body", type=json.loads, default={}, metavar="JSON", help=body)
    add("--retries", type=int, default=10, help="repeats of a request after HTTP 429 or 5xx, or no connection" + default)
    add("--read_timeout", type=float, default=600.0, help="seconds without a byte from the server" + default)
    add("--price", type=float, nargs=2, metavar=("IN", "OUT"), help="per million tokens sent and received, to show the cost")
    add = parser.add_argument_group("a model here").add_argument
    add("--local", metavar="DIR", help="instead of a server: a model folder or hub name, sampled here")
    add("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"), help="of the model" + default)
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: CUDA if there is one, else the CPU" + default)
    return parser


def check_arguments(args: Namespace) -> None:
    """ValueError for flags that are missing, out of range or do not go together."""
    if not args.report:
        if not args.data:
            raise ValueError("--data is needed (or --report FILE)")
        if not args.dry_run and not args.out:
            raise ValueError("--out is needed (or --dry_run)")
        if bool(args.endpoint) == bool(args.local) and not args.dry_run:
            raise ValueError("one of --endpoint and --local is needed")
        if args.endpoint and not args.model:
            raise ValueError("--endpoint needs --model, the model's name there")
    for name in ("candidates", "rounds", "solution_tries", "max_tokens", "workers", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if not isinstance(args.body, dict) or {"model", "messages", "stream"} & set(args.body):
        raise ValueError(f"--body must be a JSON object without model, messages and stream, got {args.body!r}")
    if args.local and args.body:
        raise ValueError("--body is for servers, --local takes the flags")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, or ROWS_FAILED. ValueError or OSError for everything that stops the command."""
    args = build_parser().parse_args(arguments)
    check_arguments(args)
    return report(args) if args.report else dry_run(args) if args.dry_run else extract(args)


def run() -> None:
    """main as a program: its exit status, or the message of what stopped it."""
    try:
        sys.exit(main())
    except (ValueError, OSError) as problem:
        sys.exit(f"strategy.py: {problem}")
    except KeyboardInterrupt:
        sys.exit("strategy.py: stopped; the same command again goes on from here")
