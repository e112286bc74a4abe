r"""The program behind `python strategy.py ...`: strategies extracted by a strong model, and a report on their quality.

    python strategy.py --data problems.jsonl --endpoint https://host/v1 --model NAME --out strategies.jsonl
    python strategy.py --data problems.jsonl --local DIR --out strategies.jsonl      # our own sampler on a model folder
    python strategy.py --data problems.jsonl --endpoint URL --model NAME --dry_run   # prompts and an estimate, sends nothing
    python strategy.py --report strategies.jsonl

For each row: the solution, where the data has none (asked again while the grader finds it wrong); five candidate strategies
from it [app B]; those that cannot be read or leak are rejected (strategy.leaks) [ours]; one call scores all the others on four
criteria [app B, tab 5], by the same model [ours: the paper does not say whose scores they are]; the highest mean is kept. The
output has the project's row format: train.py takes it as it is. Everything else (each answer, thoughts, scores, rejections,
tokens) is in the journal beside it, OUT.log.jsonl.

The journal is also what makes the program safe to kill. Every answer is on the disk before its worker asks the next
question, under the hash of the exact request; the same command again takes those from there and asks for the rest. What is
lost is at most one answer a worker, which was on its way at the kill. Selection happens after reading, so a better filter
or another grader can be run over paid answers for nothing.

What it is not: a client for every provider. It speaks POST {endpoint}/chat/completions without streaming, as DeepSeek, vLLM,
SGLang, llama.cpp and OpenAI do; where one wants other fields, --body adds or removes them.
"""

import argparse
import email.utils
import fcntl
import hashlib
import http.client
import ipaddress
import json
import os
import queue
import random
import re
import socket
import ssl
import statistics
import sys
import threading
import time
import urllib.parse
import urllib.request
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

# Run as a script, Python looks for modules in tools/ and not in the repository's root.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.problems import load_problems, read_lines, read_problems, read_row
from grader import MathWorker, extract_answer, normalise_answer, same_answer
from strategy import (
    CRITERIA,
    LEAK_SCORE,
    Strategy,
    best_candidate,
    drop_thoughts,
    extraction_prompt,
    format_strategy,
    leaks,
    parse_scores,
    parse_strategy,
    quality,
    scoring_prompt,
    solution_prompt,
)

MAX_BYTES = 32 * 1024**2  # of one reply; 32K tokens with thoughts are below 1 MB, so more is no answer
GIVE_UP_AFTER = 20  # requests in a row that failed after all their retries: the server is down, for the other rows too
CHARACTERS_A_TOKEN = 4  # English and LaTeX, roughly; for the estimate of --dry_run and the lengths in the report only
EXPECTED_TOKENS = {"solution": 700, "candidate": 220, "score": 20}  # without thoughts, likewise; "score": of one candidate
ROWS_FAILED = 3  # exit status: some rows got no strategy; 1 is for whatever stopped the program, and 2 for wrong flags


class Stop(Exception):
    """Nothing can go on: the server refuses us, or is gone. The message is for the user."""


class Refused(Exception):
    """The server does not take this request (HTTP 400, 413, 422): for what is in it, or for what is in all of them."""


class RowFailed(Exception):
    """This row gets no strategy, for the reason given; the others go on."""


class Temporary(Exception):
    """A request that may succeed when it is sent again. `wait`: seconds the server asks for; `usage`: what it billed;
    `limited`: it was not looked at, because of a rate limit."""

    def __init__(
        self, reason: str, wait: float | None = None, usage: dict[str, int] | None = None, limited: bool = False
    ) -> None:
        super().__init__(reason)
        self.wait, self.usage, self.limited = wait, usage, limited


@dataclass(frozen=True)
class Answer:
    """One paid reply. `finish`: "length" where max_tokens cut it. `usage`: prompt_tokens, completion_tokens, or {}."""

    text: str
    finish: str | None
    usage: dict[str, int]
    reasoning: str = ""
    model: str = ""


@dataclass(frozen=True)
class Settings:
    """What decides an answer, apart from the messages. A journal holds answers of one Settings only."""

    model: str
    temperature: float
    score_temperature: float
    top_p: float
    max_tokens: int
    seed: int
    body: dict[str, Any]


# ---------------------------------------------------------------------------------------------------- requests


def request_body(settings: Settings, step: str, index: int, messages: list[dict[str, str]]) -> dict[str, Any]:
    """The JSON of a request. Candidate i gets seed + i: with one seed for all, a server that honours it repeats itself."""
    body = {
        "model": settings.model,
        "messages": messages,
        # greedy scores that could not be read would be the same again
        "temperature": settings.score_temperature if step == "score" and index == 0 else settings.temperature,
        "top_p": settings.top_p,
        "max_tokens": settings.max_tokens,
        "seed": settings.seed + index,
    }
    body |= settings.body
    return {name: value for name, value in body.items() if value is not None}


def request_key(body: dict[str, Any], step: str, index: int) -> str:
    """The name of a request in the journal: a hash of all that is sent, and its index (--body may have removed the seed)."""
    text = json.dumps([body, step, index], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def prompts_hash() -> str:
    """A hash of the wording of the three prompts, which changes when they do."""
    example = Strategy("t", "s", ("a",))
    texts = [solution_prompt("p"), extraction_prompt("p", "s"), scoring_prompt("p", "s", [example])]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------- the server


# The standard library's http.client, rather than urllib.request, which follows a redirect with the key still in its headers
# and has one timeout for everything, or huggingface_hub's client, which retries by rules of its own: here each retry may cost
# money. A connection a request: its handshake is nothing beside the seconds or minutes of an answer.
@dataclass
class Server:
    """A chat server, the patience we have with it, and the state that its workers share."""

    secure: bool
    host: str
    port: int
    path: str
    key: str | None = field(repr=False)
    connect_timeout: float
    read_timeout: float
    retries: int
    backoff: float
    max_wait: float
    not_before: float = 0.0  # of time.monotonic: a 429 for one worker is one for all
    failures: int = 0  # in a row
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def name(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.secure else 'http'}://{host}:{self.port}{self.path}"

    def hide_key(self, text: object) -> str:
        """Some servers quote the key when they refuse it."""
        return str(text).replace(self.key, "***") if self.key else str(text)


def make_server(args: argparse.Namespace, environment: dict[str, str]) -> Server:
    """The server that the flags and the environment describe. ValueError for what would not work, or would leak the key."""
    url = urllib.parse.urlsplit(args.endpoint)
    if url.username or url.password:
        raise ValueError(f"--endpoint: it holds a user name or password; put the key into ${args.key_env} instead")
    if url.scheme not in ("http", "https") or not url.hostname or url.query or url.fragment:
        raise ValueError(f"--endpoint {args.endpoint}: expected http(s)://host[:port]/path, such as https://host/v1")
    key = environment.get(args.key_env, "").strip() or None
    if key and not (key.isascii() and key.isprintable()):
        raise ValueError(f"${args.key_env}: the key holds characters that no HTTP header can carry")
    secure = url.scheme == "https"
    if key and not secure and not args.allow_http and not _is_loopback(url.hostname):
        raise ValueError(
            f"--endpoint {args.endpoint}: the key in ${args.key_env} would travel unencrypted; use https, or --allow_http "
            "where the way there is safe (a tunnel, a private network)"
        )
    path = url.path.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    port = url.port or (443 if secure else 80)
    patience = (args.connect_timeout, args.read_timeout, args.retries, args.backoff, args.max_wait)
    return Server(secure, url.hostname, port, path, key, *patience)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def ask_server(server: Server, body: dict[str, Any], stop: threading.Event, wasted: Callable[[str, dict], None]) -> Answer:
    """The answer to one request, after as many retries as it takes.

    stop: waits end when it is set. wasted: called with (reason, usage) for a reply that was billed and is of no use.
    Raises RowFailed when the retries are used up, Refused where the server does not take this request, and Stop for what is as
    wrong with every other.
    """
    data = json.dumps(body).encode()
    start, tries, failures = time.monotonic(), 0, 0
    while tries <= server.retries:
        _wait_until(server, stop)
        try:
            answer = read_answer(*post(server, data))
        except Stop as error:
            raise Stop(server.hide_key(error)) from None
        except Refused as error:
            _count_failure(server, reason := server.hide_key(error))
            raise Refused(reason) from None
        except Temporary as error:
            reason = server.hide_key(error)
            if error.usage:
                wasted(reason, error.usage)
            if error.wait is not None:
                _hold_back(server, error.wait, reason)
            # A rate limit says nothing about this request, so it uses up no try, until all its waits exceed --max_wait.
            tries += not (error.limited and time.monotonic() - start < server.max_wait)
            if tries <= server.retries:
                # Jitter: workers that failed together must not come back together.
                stop.wait(min(60.0, server.backoff * 2 ** min(failures, 20)) * random.uniform(0.5, 1.5))
            failures += 1
        else:
            with server.lock:
                server.failures = 0
            return answer
    _count_failure(server, reason)
    raise RowFailed(f"no answer in {failures} tries, the last: {reason}")


def _count_failure(server: Server, reason: str) -> None:
    """Stop where so many requests in a row failed for good: such a server is not asked by thousands of rows in turn."""
    with server.lock:
        server.failures += 1
        if server.failures >= GIVE_UP_AFTER:
            raise Stop(f"{server.name}: {server.failures} requests in a row failed for good, the last with: {reason}")


def _hold_back(server: Server, wait: float, reason: str) -> None:
    """No worker sends anything for so many seconds: the limit that one has met holds for the key, and so for all."""
    if wait > server.max_wait:
        raise Stop(f"{reason} (it asks for a wait of {wait:,.0f} s, more than --max_wait {server.max_wait:g})")
    with server.lock:
        server.not_before = max(server.not_before, time.monotonic() + wait)


def _wait_until(server: Server, stop: threading.Event) -> None:
    while not stop.is_set() and (rest := server.not_before - time.monotonic()) > 0:
        stop.wait(rest * random.uniform(1, 1.1))  # not all at the same moment
    if stop.is_set():
        raise Stop("stopped")


def post(server: Server, data: bytes) -> tuple[int, http.client.HTTPMessage, bytes]:
    """One request: (status, headers, payload). Everything that can go wrong on the way is Temporary, a bad certificate Stop."""
    connection = _connection(server)
    try:
        connection.connect()
        deadline = time.monotonic() + server.read_timeout
        connection.sock.settimeout(server.read_timeout)  # from here on the wait is for the model, not for the network
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "sgpo-strategy"}
        if server.key:
            headers["Authorization"] = f"Bearer {server.key}"
        connection.request("POST", server.path, data, headers)
        response = connection.getresponse()
        return response.status, response.headers, _read_bounded(response, connection.sock, deadline)
    except ssl.SSLCertVerificationError as error:
        raise Stop(f"{server.name}: its certificate is not valid: {error.verify_message}") from None
    except TimeoutError:
        limits = f"{server.connect_timeout:g} s to connect, {server.read_timeout:g} s to answer"
        raise Temporary(f"timed out ({limits})") from None
    except (OSError, http.client.HTTPException) as error:  # refused, reset, cut off, no HTTP at all
        raise Temporary(f"{type(error).__name__}: {error}") from None
    finally:
        connection.close()


def _connection(server: Server) -> http.client.HTTPConnection:
    """Not yet connected. https goes through $https_proxy where there is one, as a tunnel: the proxy sees no key."""
    if not server.secure:
        return http.client.HTTPConnection(server.host, server.port, timeout=server.connect_timeout)
    context = ssl.create_default_context()
    proxy = urllib.request.getproxies().get("https")
    if not proxy or urllib.request.proxy_bypass(server.host):
        return http.client.HTTPSConnection(server.host, server.port, timeout=server.connect_timeout, context=context)
    url = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
    through = http.client.HTTPSConnection(url.hostname, url.port or 8080, timeout=server.connect_timeout, context=context)
    login = urllib.parse.unquote(f"{url.username}:{url.password or ''}") if url.username else ""
    headers = {"Proxy-Authorization": "Basic " + b64encode(login.encode()).decode()} if login else {}
    through.set_tunnel(server.host, server.port, headers)
    return through


def _read_bounded(response: http.client.HTTPResponse, sock: socket.socket | None, deadline: float) -> bytes:
    """The body, up to MAX_BYTES and the deadline: a timeout of the socket alone would let a server drip for hours."""
    chunks, size = [], 0
    while chunk := response.read1(65536):
        chunks.append(chunk)
        size += len(chunk)
        if size > MAX_BYTES:
            raise Temporary(f"a reply of more than {MAX_BYTES:,} bytes")
        rest = deadline - time.monotonic()
        if rest <= 0:
            raise TimeoutError
        if sock is not None:
            with suppress(OSError):  # closed already: the rest is in the buffer
                sock.settimeout(rest)
    expected = response.headers.get("Content-Length", "")
    if expected.isdigit() and size < int(expected):
        raise Temporary(f"the reply was cut off after {size} of {expected} bytes")
    return b"".join(chunks)


def read_answer(status: int, headers: Any, payload: bytes) -> Answer:
    """The Answer in a reply; Temporary where another try may help, Stop where it cannot."""
    if status != 200:
        message = f"HTTP {status}: {_server_message(payload)}"
        if 300 <= status < 400:  # never followed: the key would go to whoever is named there
            target = headers.get("Location", "").partition("?")[0].rpartition("@")[2]
            raise Stop(f"HTTP {status}: the server redirects to {target!r}; no key goes there unasked, name it in --endpoint")
        if status in (408, 409, 425, 429) or status >= 500:
            wait = retry_after(headers.get("Retry-After"), time.time())
            raise Temporary(message, wait=wait, limited=status == 429)
        if status in (400, 413, 422):  # a field that it does not know, or a text that is too long, or that a filter stops
            raise Refused(message)
        raise Stop(message)  # a wrong key, model or path is as wrong the next time
    try:
        reply = json.loads(payload)
    except ValueError:
        raise Temporary(f"the reply is no JSON: {payload[:80]!r}") from None
    if not isinstance(reply, dict) or reply.get("error"):
        raise Temporary(f"HTTP 200, but: {_server_message(payload)}")
    usage = reply["usage"] if isinstance(reply.get("usage"), dict) else {}
    usage = {name: usage[name] for name in ("prompt_tokens", "completion_tokens") if isinstance(usage.get(name), int)}
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    message = choice.get("message")
    if not isinstance(message, dict):
        raise Temporary(f"the reply has no choices[0].message: {payload[:120]!r}", usage=usage)
    text = message.get("content")
    if isinstance(text, list):  # a list of parts, as some servers send it
        text = "".join(part.get("text") or "" for part in text if isinstance(part, dict))
    finish = choice.get("finish_reason")
    if finish != "length" and not (isinstance(text, str) and text.strip()):
        raise Temporary(f"the reply's content is empty: {text!r}, finish_reason {finish!r}", usage=usage)
    reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
    texts = (whole_characters(part) if isinstance(part, str) else "" for part in (text, reasoning, reply.get("model")))
    text, reasoning, model = texts
    return Answer(text, finish, usage, reasoning, model)


def whole_characters(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair, which a model leaves that is cut off inside a character: such a
    text cannot be written as UTF-8."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _server_message(payload: bytes) -> str:
    """What a server says about an error, in one line: error.message where it is JSON of that form, else its text."""
    text = payload[:2000].decode(errors="replace")
    with suppress(ValueError, AttributeError):
        error = json.loads(payload).get("error") or json.loads(payload)
        text = str(error.get("message", error)) if isinstance(error, dict) else str(error)
    return " ".join(text.split())[:300] or "(no message)"


def retry_after(value: str | None, now: float) -> float | None:
    """Seconds to wait by a Retry-After header: a number of seconds, or an HTTP date; None without a readable one."""
    if not value:
        return None
    if re.fullmatch(r"\s*\d+(\.\d+)?\s*", value):
        return float(value)
    with suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now)
    return None


# ---------------------------------------------------------------------------------------------------- our own sampler


class LocalModel:
    """The same questions to a model folder, sampled by rollout.py. Workers' questions that wait together are one batch.

    The answer to a request depends on its seed and, by the rounding of batched matrix products, rarely on its company.
    """

    def __init__(self, folder: str, dtype: str, device: str, max_rows: int) -> None:
        import torch  # imported here, as are model and rollout: only --local needs them

        from model import load_model

        device = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        self.model, self.tokenizer = load_model(folder, dtype=getattr(torch, dtype), device=device)
        self.max_rows = max_rows
        self.waiting: list[list[Any]] = []  # [body, prompt ids, None, then an Answer or an error]
        self.list_lock, self.turn = threading.Lock(), threading.Lock()

    def ask(self, body: dict[str, Any], stop: threading.Event, wasted: Callable[[str, dict], None]) -> Answer:
        from model import encode_chat

        place = [body, encode_chat(self.tokenizer, body["messages"]), None]
        context = self.model.config.max_position_embeddings
        if len(place[1]) >= context:
            raise RowFailed(f"a prompt of {len(place[1])} tokens fills the context of {context}")
        with self.list_lock:
            self.waiting.append(place)
        with self.turn:  # whoever comes in samples for all that wait; the others find their answers when they do
            if place[2] is None:
                if stop.is_set():
                    raise Stop("stopped")
                time.sleep(0.02)  # the workers of the batch before are about to ask their next questions
                self._sample(place)
        if isinstance(place[2], Exception):
            raise place[2]
        return place[2]

    def _sample(self, first: list[Any]) -> None:
        from rollout import generate

        with self.list_lock:
            batch = [p for p in self.waiting if p[0]["temperature"] == first[0]["temperature"]]
            self.waiting = [p for p in self.waiting if p[0]["temperature"] != first[0]["temperature"]]
        try:
            groups = generate(
                self.model, [ids for _, ids, _ in batch], n=1, max_new_tokens=first[0]["max_tokens"],
                temperature=first[0]["temperature"], top_p=first[0]["top_p"], eos_ids=self.model.config.eos_ids,
                seed=[body["seed"] for body, _, _ in batch], max_rows=self.max_rows,
            )  # fmt: skip
        except Exception as error:
            for place in batch:
                place[2] = error
            return
        for place, (row,) in zip(batch, groups, strict=True):
            text = self.tokenizer.decode(row.response_ids, skip_special_tokens=True)
            usage = {"prompt_tokens": len(place[1]), "completion_tokens": len(row.response_ids)}
            place[2] = Answer(text, "stop" if row.finished else "length", usage, model=first[0]["model"])


# ---------------------------------------------------------------------------------------------------- the journal


class Journal:
    """OUT.log.jsonl, one JSON object a line, only ever appended to. Kinds of line, by "kind":

    run      a start of the program: settings, prompts_hash, endpoint, data, time
    answer   a paid answer: key (of the request), row, step (solution, candidate, score), index, text, reasoning, finish, usage
    waste    a billed reply of no use (empty content): key, row, reason, usage
    row      what became of a row: row, kept (index or null), failed (reason or null), candidates, see `extract_row`

    A line is on the disk (fsync) when `write` returns. Opening checks the file: a last line without its end is what a kill
    leaves behind, and is cut off with a message; any other line that cannot be read is a ValueError naming it.
    """

    def __init__(self, path: Path, start: dict[str, Any]) -> None:
        self.path, self.lock = path, threading.Lock()
        self.answers: dict[str, Answer] = {}
        self.rows: dict[str, dict[str, Any]] = {}
        self.paid = Counter()  # requests, prompt_tokens, completion_tokens, over all runs
        self.stream = path.open("ab", buffering=0)
        try:
            fcntl.flock(self.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released by the kernel, however the program ends
            whole = 0
            for record, whole in read_journal(path):  # noqa: B007
                self._take(record, start)
        except BlockingIOError:
            self.close()
            raise ValueError(f"{path}: another run is writing it, and both would pay for the same answers") from None
        except (ValueError, OSError):
            self.close()
            raise
        if (size := path.stat().st_size) > whole:
            print(f"{path}: dropped {size - whole} bytes of a last line that was cut off when the program was killed")
            self.stream.truncate(whole)
        self.write(start | {"kind": "run"})

    def close(self) -> None:
        self.stream.close()

    def _take(self, record: dict[str, Any], start: dict[str, Any]) -> None:
        if record["kind"] == "run":
            for name in ("settings", "prompts_hash"):
                if record[name] != start[name]:
                    raise ValueError(
                        f"{self.path}: made with {name} {record[name]}, now {start[name]}: no paid answer would fit. Go on "
                        "with the same, or name another --out"
                    )
        elif record["kind"] == "row":
            self.rows[record["row"]] = record
        else:
            if record["kind"] == "answer":
                self.answers[record["key"]] = Answer(record["text"], record["finish"], record["usage"], model=record["model"])
            self._count(record["usage"])

    def _count(self, usage: dict[str, int]) -> None:
        self.paid["requests"] += 1
        self.paid["without usage"] += not usage
        self.paid.update(usage)

    def write(self, record: dict[str, Any]) -> None:
        line = to_line(record | {"time": round(time.time(), 3)})
        with self.lock:
            size = os.fstat(self.stream.fileno()).st_size
            try:
                while line:  # unbuffered: a write takes what there is room for
                    line = line[self.stream.write(line) :]
                os.fsync(self.stream.fileno())
            except OSError as error:
                self.stream.truncate(size)  # half a line would spoil the next one
                remedy = "make room, then the same command goes on"
                raise Stop(f"{self.path}: {error}; an answer could not be kept: {remedy}") from None

    def add(self, key: str, place: dict[str, Any], answer: Answer) -> None:
        self.write({"kind": "answer", "key": key} | place | asdict(answer))
        with self.lock:
            self.answers[key] = replace(answer, reasoning="")  # thoughts stay on the disk: they would fill the memory
            self._count(answer.usage)

    def add_waste(self, key: str, place: dict[str, Any], reason: str, usage: dict[str, int]) -> None:
        self.write({"kind": "waste", "key": key, "reason": reason, "usage": usage} | place)
        with self.lock:
            self._count(usage)

    def add_row(self, record: dict[str, Any]) -> None:
        """Written only where it says something new: a run that only finds everything done leaves no second copy."""
        old = {name: value for name, value in self.rows.get(record["row"], {}).items() if name != "time"}
        if old != record:
            self.write(record)
            self.rows[record["row"]] = record


def to_line(record: dict[str, Any]) -> bytes:
    """One line of JSON."""
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def read_journal(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Each whole line of a journal as (record, where it ends in bytes). A torn last line is left out."""
    end = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                record = json.loads(line)
                if not line.endswith(b"\n") or record["kind"] not in ("run", "answer", "waste", "row"):
                    raise ValueError
            except (ValueError, KeyError, TypeError):
                if stream.read(1):  # lines follow: this was no kill
                    remedy = "remove this line; what it held is asked for again"
                    raise ValueError(f"{path}:{number}: no line of a journal, {line[:80]!r}; {remedy}") from None
                return
            end += len(line)
            yield record, end


def journal_path(out: Path) -> Path:
    return out.with_name(out.name + ".log.jsonl")


# ---------------------------------------------------------------------------------------------------- one row


@dataclass(frozen=True)
class Row:
    """A row of the data. None for what is missing; `answer` too: then the model's own answer becomes the row's."""

    id: str
    problem: str
    answer: str | None
    solution: str | None
    strategy: Strategy | None


@dataclass
class Grader:
    """The grader for several threads: its worker answers one question at a time."""

    worker: MathWorker
    lock: threading.Lock = field(default_factory=threading.Lock)

    def verdict(self, solution: str, answer: str | None) -> tuple[str | None, bool]:
        """(the answer that a solution gives, whether it is right). Without a reference, any is that train.py would take."""
        found = extract_answer(solution)
        if found is None:
            return None, False
        if answer is None:
            return normalise_answer(found), is_usable(found)
        with self.lock:
            return normalise_answer(found), same_answer(found, answer, self.worker)


def is_usable(answer: str) -> bool:
    """Whether load_problems takes it as a reference: an answer that no response can match is worth nothing."""
    try:
        read_row(json.dumps({"id": "row", "problem": "p", "answer": answer}).encode())
    except ValueError:
        return False
    return True


Ask = Callable[[str, int, list[dict[str, str]]], Answer]  # (step, index, messages)


def extract_row(row: Row, ask: Ask, grader: Grader, args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(the journal's record, the output row or None) of one row.

    The record: row, solution_from and strategy_from ("data" or "model"), kept (the candidate's index), failed (why there is
    none), candidates: a list of {index, strategy, rejected: [kind, detail] or null, scores}.
    """
    record = {
        "kind": "row", "row": row.id, "solution_from": "data" if row.solution else "model",
        "strategy_from": "data" if row.strategy else "model", "kept": None, "failed": None, "candidates": [],
    }  # fmt: skip
    try:
        solution, answer = finished_solution(row, ask, grader, args.solution_tries)
        strategy = row.strategy or chosen_strategy(row, solution, answer, ask, args, record)
    except RowFailed as error:
        record["failed"] = str(error)
        return record, None
    out = {"id": row.id, "problem": row.problem, "answer": answer, "solution": solution, "strategy": strategy.to_dict()}
    return record, out


def finished_solution(row: Row, ask: Ask, grader: Grader, tries: int) -> tuple[str, str]:
    """(solution, answer) of a row: the data's own, else the first of the model's that the grader finds right."""
    if row.solution:
        found, right = grader.verdict(row.solution, row.answer)
        if found is not None and not right:  # a strategy drawn from a wrong solution would teach its mistake
            raise RowFailed(f"the data's solution ends in {found!r}, the data's answer is {row.answer!r}")
        if row.answer is None and found is None:
            raise RowFailed("the row has no answer, and its solution states none")
        return row.solution, row.answer if row.answer is not None else found
    given = []
    for index in range(tries):
        reply = ask("solution", index, solution_prompt(row.problem))
        if reply.finish == "length":
            given.append("cut off at max_tokens")
            continue
        try:
            text = drop_thoughts(reply.text).strip()
        except ValueError:
            given.append("nothing but thoughts")
            continue
        found, right = grader.verdict(text, row.answer)
        if right:
            return text, row.answer if row.answer is not None else found
        given.append("no answer" if found is None else f"answer {found[:60]!r}")
    raise RowFailed(f"{tries} solutions, none with the answer {row.answer!r}: {', '.join(given)}")


def chosen_strategy(
    row: Row, solution: str, answer: str, ask: Ask, args: argparse.Namespace, record: dict[str, Any]
) -> Strategy:
    """The best of k candidates. Fills record's candidates.

    A round asks for what is missing: for k candidates (k more where none of those before survives), then for the scores of
    all that survive, in one call. There are up to --rounds of them. The strategy is extracted from the whole response
    [tab 4]; the leak filter and the scores go without the thoughts in it.
    """
    written = without_thoughts(solution)
    candidates, unread = record["candidates"], None
    for number in range(args.rounds):
        if all(candidate["rejected"] for candidate in candidates):
            for index in range(len(candidates), len(candidates) + args.candidates):
                reply = ask("candidate", index, extraction_prompt(row.problem, solution))
                candidates.append(judge_candidate(index, reply, row.problem, written, answer, candidates))
        if left := [candidate for candidate in candidates if candidate["rejected"] is None]:
            texts = [Strategy.from_dict(candidate["strategy"]) for candidate in left]
            unread = score_candidates(left, ask("score", number, scoring_prompt(row.problem, written, texts)))
        if any(candidate["rejected"] is None and candidate["scores"] for candidate in candidates):
            record["kept"] = best_candidate([None if c["rejected"] else c["scores"] for c in candidates])
            return Strategy.from_dict(candidates[record["kept"]]["strategy"])
    for candidate in candidates:
        candidate["rejected"] = candidate["rejected"] or ["not scored", unread]
    why = Counter(candidate["rejected"][0] for candidate in candidates)
    raise RowFailed(f"no candidate is left of {len(candidates)}: " + ", ".join(f"{n} {kind}" for kind, n in why.most_common()))


def without_thoughts(solution: str) -> str:
    """What the filter and the scorer get of a solution [ours]: thoughts hold every number that was tried. RowFailed if it is
    nothing but thoughts."""
    try:
        if written := drop_thoughts(solution).strip():
            return written
    except ValueError:  # they never end
        pass
    raise RowFailed("its solution is nothing but thoughts")


def judge_candidate(
    index: int, reply: Answer, problem: str, solution: str, answer: str, others: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """A candidate's record after everything that needs no model: read, compared with the others, searched for leaks."""
    candidate = {"index": index, "strategy": None, "rejected": None, "scores": None}
    if reply.finish == "length":  # what is there may parse, with its last step half said
        return candidate | {"rejected": ["cut off", "at max_tokens"]}
    try:
        strategy = parse_strategy(reply.text)
    except ValueError as error:
        return candidate | {"rejected": ["not parsed", str(error)]}
    candidate["strategy"] = strategy.to_dict()
    twin = next((other["index"] for other in others if other["strategy"] == candidate["strategy"]), None)
    if twin is not None:
        return candidate | {"rejected": ["repeated", f"the same as candidate {twin}"]}
    if found := leaks(strategy, problem, solution, answer):
        return candidate | {"rejected": ["leak", "; ".join(found)]}
    return candidate


def score_candidates(candidates: Sequence[dict[str, Any]], reply: Answer) -> str | None:
    """Put the scores into the candidates' records; why the reply is of no use, or None.

    A candidate from which the answer can be read, by its score, is out even if no other is left [ours].
    """
    try:
        if reply.finish == "length":
            raise ValueError("scores reply: cut off at max_tokens")
        scores = parse_scores(reply.text, len(candidates))
    except ValueError as error:
        return str(error)
    for candidate, own in zip(candidates, scores, strict=True):
        candidate["scores"] = own
        if own["no_leak"] <= LEAK_SCORE:
            candidate["rejected"] = ["leak by score", f"no_leak: {own['no_leak']}"]
    return None


# ---------------------------------------------------------------------------------------------------- all rows


def load_rows(path: Path, worker: MathWorker) -> list[Row]:
    """The rows of the data, checked as load_problems checks them, with its errors; "answer" may be missing here.

    For the check, a row without one takes its solution's answer, or a number that stands for none.
    """
    without, lines = set(), []
    for raw in read_lines(path):
        row = None
        with suppress(ValueError):
            row = json.loads(raw)
        if isinstance(row, dict) and isinstance(row.get("id"), str) and "answer" not in row:
            without.add(row["id"])
            solution = row.get("solution")
            raw = json.dumps(row | {"answer": (isinstance(solution, str) and extract_answer(solution)) or "0"}).encode()
        lines.append(raw)
    problems = read_problems(lines, path, worker)
    return [Row(p.id, p.problem, None if p.id in without else p.answer, p.solution, p.strategy) for p in problems]


def run_rows(rows: Sequence[Row], work: Callable[[Row], Any], workers: int, stop: threading.Event, done: Callable) -> None:
    """work(row) in threads, done(row, result) here as each ends. The first Stop, or error, ends all and is raised.

    Threads and a queue rather than a pool: a second Ctrl-C must end the program while answers are still on their way, and a
    pool's threads are waited for at exit. At the first one, and at a Stop, workers keep the answers that are on their way.
    """
    jobs, results = queue.SimpleQueue(), queue.SimpleQueue()
    for row in rows:
        jobs.put(row)

    def loop() -> None:
        while not stop.is_set():
            try:
                row = jobs.get_nowait()
            except queue.Empty:
                return
            try:
                results.put((row, work(row), None))
            except BaseException as error:  # whatever it is, it belongs to the main thread, and nobody asks anything more
                stop.set()
                results.put((row, None, error))

    threads = [threading.Thread(target=loop, daemon=True) for _ in range(min(workers, len(rows)))]
    try:
        for thread in threads:
            thread.start()
        for _ in rows:
            row, result, error = results.get()
            if error is not None:
                raise error
            done(row, result)
    except BaseException as error:
        stop.set()
        if isinstance(error, KeyboardInterrupt):
            print("\nstopping: waiting for the answers that are on their way; Ctrl-C again drops them", file=sys.stderr)
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        raise


def extract(args: argparse.Namespace) -> int:
    """Make the strategies of args.data; returns the exit code: 0, or ROWS_FAILED."""
    out = Path(args.out)
    log = journal_path(out)
    if out.exists() and not log.exists():
        raise ValueError(f"{out}: already there, and not made by this program ({log.name} is missing); name another --out")
    if not out.parent.is_dir():
        raise ValueError(f"{out}: its folder does not exist")
    settings = settings_of(args)
    with MathWorker() as worker:
        rows = load_rows(Path(args.data), worker)[: args.limit]
        send, endpoint = make_sender(args)
        start = {"settings": asdict(settings), "prompts_hash": prompts_hash(), "endpoint": endpoint, "data": args.data}
        try:
            with closing(Journal(log, start)) as journal:
                before = Counter(journal.paid)
                if before["requests"]:
                    print(f"{log}: {before['requests']} answers are there already and are not asked for again")
                results, failed = ask_all(rows, journal, send, settings, Grader(worker), args)
        except Stop as error:
            kept = f"the answers so far are in {log}: the same command again goes on from there"
            raise ValueError(f"{error}\n{kept}") from None
        if results:
            # checked as train.py will, before they take their place: nothing it would refuse leaves this program in silence
            write_rows(out, [results[row.id] for row in rows if row.id in results], partial(load_problems, worker=worker))
        elif out.exists():
            print(f"{out}: no row has a strategy now; the file of an earlier run is left as it is", file=sys.stderr)
    print(f"{out}: {len(results)} rows; in all {spent(journal.paid, args)}; now {spent(journal.paid - before, args)}")
    for row_id, reason in failed.items():
        print(f"failed: {row_id}: {reason}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {len(rows)} rows failed, reasons above and in {log}", file=sys.stderr)
    return ROWS_FAILED if failed else 0


def ask_all(
    rows: Sequence[Row], journal: Journal, send: Callable, settings: Settings, grader: Grader, args: argparse.Namespace
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """({row id: output row}, {row id: why it failed}), every answer from the journal or through it."""
    from tqdm import tqdm

    stop, results, failed = threading.Event(), {}, {}
    with tqdm(total=len(rows), unit="row", disable=args.quiet) as bar:

        def ask(row: Row, step: str, index: int, messages: list[dict[str, str]]) -> Answer:
            body = request_body(settings, step, index, messages)
            key, place = request_key(body, step, index), {"row": row.id, "step": step, "index": index}
            if (known := journal.answers.get(key)) is not None:
                return known
            try:
                answer = send(body, stop, partial(journal.add_waste, key, place))
            except Refused as error:
                if not journal.answers:  # nothing was ever answered: the reason is in the settings, not in this row
                    raise Stop(str(error)) from None
                raise RowFailed(f"the server refuses a request of this row: {error}") from None
            journal.add(key, place, answer)  # on the disk before this worker goes on
            bar.set_postfix_str(spent(journal.paid, args))
            return answer

        def done(row: Row, result: tuple[dict[str, Any], dict[str, Any] | None]) -> None:
            record, out_row = result
            journal.add_row(record)
            if out_row is None:
                failed[row.id] = record["failed"]
            else:
                results[row.id] = out_row
            bar.update()

        run_rows(rows, lambda row: extract_row(row, partial(ask, row), grader, args), args.workers, stop, done)
    return results, failed


def make_sender(args: argparse.Namespace) -> tuple[Callable[..., Answer], str]:
    """(send(body, stop, wasted) -> Answer, the name of whom it asks)."""
    if args.local:
        return LocalModel(args.local, args.dtype, args.device, args.workers).ask, f"local: {args.local}"
    server = make_server(args, dict(os.environ))
    if not server.key:
        print(f"no key in ${args.key_env}: asking {server.name} without one")
    return partial(ask_server, server), server.name


def settings_of(args: argparse.Namespace) -> Settings:
    names = ("temperature", "score_temperature", "top_p", "max_tokens", "seed", "body")
    return Settings(args.model or args.local or "", *(getattr(args, name) for name in names))


def write_rows(path: Path, rows: Sequence[dict[str, Any]], check: Callable[[Path], Any]) -> None:
    """The file appears whole and checked, or not at all: a reader never finds half of it, whatever happens here."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as stream:
        stream.writelines(map(to_line, rows))
        stream.flush()
        os.fsync(stream.fileno())
    check(part)
    part.replace(path)


def spent(paid: Counter, args: argparse.Namespace) -> str:
    """12 requests, 3,400 + 1,200 tokens, cost 0.01: tokens sent and received, the cost where the prices are given."""
    text = f"{paid['requests']:,} requests, {paid['prompt_tokens']:,} + {paid['completion_tokens']:,} tokens"
    if args.price_in is not None:
        text += f", cost {cost(paid['prompt_tokens'], paid['completion_tokens'], args):.2f}"
    if paid["without usage"]:
        text += f" ({paid['without usage']:,} answers without a count of tokens)"
    return text


def cost(prompt_tokens: float, completion_tokens: float, args: argparse.Namespace) -> float:
    return (prompt_tokens * args.price_in + completion_tokens * args.price_out) / 1e6


# ---------------------------------------------------------------------------------------------------- dry run


def dry_run(args: argparse.Namespace) -> int:
    """Print the prompts of the first rows, and what the whole would take by a rough estimate. Sends and writes nothing."""
    if args.endpoint:
        make_server(args, dict(os.environ))  # its errors show now rather than later
    with MathWorker() as worker:
        rows = load_rows(Path(args.data), worker)[: args.limit]
    example = Strategy("(a candidate's type)", "(its strategy)", ("(its steps)",))
    totals = Counter()
    for number, row in enumerate(rows):
        solution = row.solution or "(the model's solution)"
        asked = [("solution", solution_prompt(row.problem), 1, args.solution_tries)] if row.solution is None else []
        if row.strategy is None:
            try:
                written = without_thoughts(solution)
            except RowFailed as error:
                print(f"{row.id}: {error}")
                continue
            most = args.candidates * args.rounds
            asked.append(("candidate", extraction_prompt(row.problem, solution), args.candidates, most))
            asked.append(("score", scoring_prompt(row.problem, written, [example] * args.candidates), 1, args.rounds))
        for step, messages, times, most in asked:
            characters, scored = len(messages[0]["content"]), args.candidates if step == "score" else 1
            if step != "solution" and row.solution is None:
                characters += EXPECTED_TOKENS["solution"] * CHARACTERS_A_TOKEN
            if step == "score":
                characters += scored * EXPECTED_TOKENS["candidate"] * CHARACTERS_A_TOKEN
            totals["requests"] += times
            totals["in"] += times * characters // CHARACTERS_A_TOKEN
            totals["out"] += times * scored * EXPECTED_TOKENS[step]
            totals["most in"] += most * characters // CHARACTERS_A_TOKEN
            totals["most out"] += most * args.max_tokens
            if number < args.show:
                print(f"--- {row.id}, {step}, {times} times\n{messages[0]['content']}\n")
    print(f"{len(rows)} rows, {totals['requests']:,} requests, about {totals['in']:,} tokens in and {totals['out']:,} out")
    print(
        f"at most about {totals['most in']:,} in and {totals['most out']:,} out, where every answer fills --max_tokens and "
        "every round and try is needed: a reasoning model's thoughts are billed too, often thousands of tokens each. Replies "
        "that are billed and of no use come on top"
    )
    if args.price_in is not None:
        likely, most = cost(totals["in"], totals["out"], args), cost(totals["most in"], totals["most out"], args)
        print(f"cost about {likely:.2f}, at most about {most:.2f}")
    print("nothing was sent")
    return 0


# ---------------------------------------------------------------------------------------------------- report


def report(args: argparse.Namespace) -> int:
    """Print the quality of a file of strategies, from the file and the journal beside it (without one, from the file alone)."""
    path = Path(args.report)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):  # bytes: U+2028 ends no line of a jsonl file
        try:
            row = json.loads(line)
            if row.get("strategy") is not None:
                rows.append(row | {"strategy": Strategy.from_dict(row["strategy"]), "id": row["id"], "problem": row["problem"]})
        except KeyError as error:
            raise ValueError(f"{path}:{number}: the row has a strategy but no {error}") from None
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}:{number}: no row with a strategy ({error}), {line[:80]!r}") from None
    if not rows:
        raise ValueError(f"{path}: no row with a strategy")
    print(f"{path}: {len(rows)} strategies")
    log = journal_path(path)
    if log.is_file():
        report_journal(log, {row["id"] for row in rows}, args)
    else:
        print(f"{log.name} is not there: nothing about candidates, scores and rejections")
    report_texts(rows, args)
    return 0


def report_journal(log: Path, kept: set[str], args: argparse.Namespace) -> None:
    """What the journal knows: candidates read and rejected, scores and levels of the kept ones, tokens."""
    records, paid = {}, Counter()
    for record, _ in read_journal(log):
        if record["kind"] == "row":
            records[record["row"]] = record
        elif record["kind"] in ("answer", "waste"):
            paid["requests"] += 1
            paid["without usage"] += not record["usage"]
            paid.update(record["usage"])
    candidates = [candidate for record in records.values() for candidate in record["candidates"]]
    why = Counter(candidate["rejected"][0] for candidate in candidates if candidate["rejected"])
    read = sum(candidate["strategy"] is not None for candidate in candidates)
    print(f"candidates: {len(candidates)} of {len(records)} rows; read {share(read, len(candidates))}")
    print("rejected: " + (", ".join(f"{kind} {share(n, len(candidates))}" for kind, n in why.most_common()) or "none"))
    failed = [record for record in records.values() if record["failed"]]
    print(f"rows without a strategy: {len(failed)}")
    for record in failed[: args.samples]:
        print(f"  {record['row']}: {record['failed']}")
    chosen = [record for record in records.values() if record["kept"] is not None and record["row"] in kept]
    report_scores([record["candidates"][record["kept"]]["scores"] for record in chosen])
    print(f"paid: {spent(paid, args)}")


def report_scores(scores: Sequence[dict[str, float]]) -> None:
    """The mean of each criterion and the bands of the paper's audit [app H, tab 8], over the kept candidates."""
    older = [own for own in scores if set(own) != set(CRITERIA)]
    if older:
        print(f"scores of the kept: by an earlier version, on {', '.join(older[0])} and another scale. They say nothing about "
              f"{', '.join(CRITERIA)} and the bands; strategies made anew, under another --out, have these")  # fmt: skip
    elif scores:
        levels = Counter(map(quality, scores))
        print("scores of the kept, mean: " + ", ".join(f"{c} {statistics.fmean(s[c] for s in scores):.2f}" for c in CRITERIA))
        print("quality: " + ", ".join(f"{level} {share(levels[level], len(scores))}" for level in ("high", "medium", "low")))
        print("  (the mean score is high from 0.8, medium from 0.5; by the model that chose. In the paper, where another model "
              "judged 500: 39.4 %, 54.4 %, 6.2 %)")  # fmt: skip


def report_texts(rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> None:
    """What the texts show: leaks by today's filter, lengths, types, and samples to read."""
    leaking = {}
    for row in rows:
        if found := leaks(row["strategy"], row["problem"], row.get("solution") or "", str(row.get("answer") or "")):
            leaking[row["id"]] = found
    print(f"leaks by the filter: {share(len(leaking), len(rows))}")
    for row_id, found in list(leaking.items())[: args.samples]:
        print(f"  {row_id}: {found[0]}")
    texts = [format_strategy(row["strategy"]) for row in rows]
    for name, sizes in (
        ("words", [len(text.split()) for text in texts]),
        ("tokens, about", [len(text) // CHARACTERS_A_TOKEN for text in texts]),
        ("steps", [len(row["strategy"].steps) for row in rows]),
    ):
        print(f"{name}: mean {statistics.fmean(sizes):.1f}, median {statistics.median(sizes):g}, {min(sizes)} to {max(sizes)}")
    types = Counter(row["strategy"].type.lower() for row in rows)
    print(f"types: {len(types)} different; " + ", ".join(f"{name} ({n})" for name, n in types.most_common(10)))
    for row in random.Random(args.seed).sample(rows, min(args.samples, len(rows))):
        print(f"\n--- {row['id']}\n{row['problem']}\n\n{format_strategy(row['strategy'])}")


def share(part: int, whole: int) -> str:
    return f"{part} ({100 * part / whole:.1f} %)" if whole else f"{part}"


# ---------------------------------------------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    # There is no flag for the key: command lines end up in shell histories, process lists and logs.
    parser = argparse.ArgumentParser(prog="strategy.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--data", metavar="FILE", help="jsonl: id, problem, and answer and solution where there are any")
    add("--endpoint", metavar="URL", help="an OpenAI-compatible server, up to /v1; /chat/completions is added")
    add("--local", metavar="DIR", help="a model folder or hub name, sampled here, instead of a server")
    add("--model", metavar="NAME", help="the model's name at the server")
    add("--out", metavar="FILE", help="rows with strategies; the journal goes beside it as FILE.log.jsonl")
    add("--report", metavar="FILE", help="only print the quality of such a file")
    add("--dry_run", action="store_true", help="print the first prompts and an estimate, send nothing")
    add("--candidates", type=int, default=5, help="strategies asked for per solution; 5 is the paper's")
    add("--rounds", type=int, default=2, help="""how often that many are asked for while none survives; a round with scores that
        cannot be read is followed by one that asks for the scores again""")
    add("--solution_tries", type=int, default=3, help="solutions asked for while none is right, where the data has none")
    add("--temperature", type=float, default=0.6, help="of solutions and candidates; 0.6 is DeepSeek-R1's advice")
    add("--score_temperature", type=float, default=0.0, help="of the first try at the scores")
    add("--top_p", type=float, default=0.95)
    add("--max_tokens", type=int, default=8192, help="of one answer, thoughts included; what is cut off is not used")
    add("--seed", type=int, default=0, help="candidate i is asked for with the seed + i; also draws the report's samples")
    add("--body", type=json.loads, default={}, metavar="JSON", help="""fields put into every request, null removes one:
        '{"max_tokens": null, "max_completion_tokens": 8192, "temperature": null}'""")
    add("--workers", type=int, default=8, help="rows worked on at once, each with one request at a time; --local: the batch")
    add("--retries", type=int, default=6, help="after 5xx, timeouts, broken connections, replies that are no answers, and 429")
    add("--backoff", type=float, default=1.0, help="seconds before the first retry; doubled each time, up to 60")
    add("--max_wait", type=float, default=900.0, help="""seconds: stop where the server asks
        (Retry-After) for a longer wait; up to this in all, waits for a rate limit (429) use up none of a request's retries""")
    add("--connect_timeout", type=float, default=10.0, help="seconds")
    add("--read_timeout", type=float, default=600.0, help="seconds from the request to the end of its answer")
    add("--key_env", default="OPENAI_API_KEY", metavar="NAME", help="the environment variable that holds the key")
    add("--allow_http", action="store_true", help="send the key unencrypted to a host that is not this one")
    add("--price_in", type=float, help="per million tokens sent; shows the cost, with --price_out")
    add("--price_out", type=float, help="per million tokens received")
    add("--limit", type=int, help="only the first so many rows")
    add("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"), help="--local: of the weights")
    add("--device", default="auto", help="--local: auto takes cuda where there is one, else cpu")
    add("--show", type=int, default=2, help="--dry_run: rows whose prompts are printed")
    add("--samples", type=int, default=5, help="--report: strategies printed in full")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
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
    if (args.price_in is None) != (args.price_out is None):
        raise ValueError("--price_in and --price_out: the cost needs both")
    from_one = ("candidates", "rounds", "solution_tries", "max_tokens", "workers", "limit")
    from_zero = ("retries", "samples", "show", "temperature", "score_temperature", "backoff", "max_wait", "price_in",
                 "price_out")  # fmt: skip
    for name in from_one + from_zero:
        least, given = int(name in from_one), getattr(args, name)
        if given is not None and not given >= least:
            raise ValueError(f"--{name} must be at least {least}, got {given}")
    for name in ("connect_timeout", "read_timeout"):
        if not getattr(args, name) > 0:
            raise ValueError(f"--{name} must be above 0, got {getattr(args, name)}")
    if not 0 < args.top_p <= 1:
        raise ValueError(f"--top_p must be in (0, 1], got {args.top_p}")
    if not isinstance(args.body, dict) or "messages" in args.body or args.body.get("stream"):
        raise ValueError(f"--body must be a JSON object, without messages and stream, got {args.body!r}")
    if args.local and args.body:
        raise ValueError("--body is for servers, --local takes the flags")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or ROWS_FAILED. ValueError or OSError for everything that stops the program."""
    args = build_parser().parse_args(arguments)
    check_arguments(args)
    if args.report:
        return report(args)
    return dry_run(args) if args.dry_run else extract(args)


def run() -> None:
    """main as a program: its exit status, or the message of what stopped it."""
    try:
        sys.exit(main())
    except (ValueError, OSError) as problem:
        sys.exit(f"strategy.py: {problem}")
    except KeyboardInterrupt:
        sys.exit("strategy.py: stopped; the same command again goes on from here")


if __name__ == "__main__":
    run()
