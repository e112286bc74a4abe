"""Extraction of strategies against a server on this machine."""

import email.utils
import json
import math
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

import rollout
import strategy as strategy_module
from eval import load_problems
from grader import MathWorker, is_correct
from model import encode_chat
from strategy import auto_messages, extraction_prompt, guided_messages
from tests.common import ROOT, TINY_BASE, ChatServer, completion, run_script, strategy_example
from tools import extract


def fake_model(handler, body, number):
    """Right solutions to "What is a + b?"; of candidates 0 to 4 one is no strategy, one leaks, 3 is better than the others."""
    text, seed = body["messages"][0]["content"], body["seed"]
    a, b = map(int, re.search(r"What is (\d+) \+ (\d+)\?", text).groups())
    if "Score the attempts" in text:
        found = enumerate(re.findall(r"way (\w)", text), start=1)
        return "\n".join(f"{i}: " + ("0.9 1.0 1.0 1.0" if way == "d" else "1.0 0.6 0.7 0.8") for i, way in found)
    if "Write down the strategy" not in text:
        return f"Adding gives \\boxed{{{a + b}}}."
    if seed == 1:
        return "I cannot do that."
    step = f"Check that it is {a + b}." if seed == 2 else "Check the sum."
    head = f"<think>hm</think>\nProblem type: a sum, way {'abcdefghij'[seed]}\nStrategy: Join the parts."
    return f"{head}\nSteps:\n(a) Add.\n(b) {step}"


def extraction_data(folder, count=3, solutions=True, **fields):
    rows = []
    for i in range(count):
        row = {"id": f"row-{i}", "problem": f"What is {20 + i} + {40 + 3 * i}?", "answer": str(60 + 4 * i)}
        rows.append(row | ({"solution": f"The sum is \\boxed{{{row['answer']}}}."} if solutions else {}) | fields)
    path = folder / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def extraction_flags(url, data, out, *more):
    flags = ["--data", str(data), "--endpoint", url, "--model", "fake", "--out", str(out), "--quiet"]
    return [*flags, "--backoff", "0.01", "--retries", "2", "--workers", "1", *more]


def journal_records(out, kind=None):
    lines = extract.journal_path(out).read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if kind in (None, record["kind"])]


def test_extraction_end_to_end(tmp_path, capsys, key):
    data, out = extraction_data(tmp_path, solutions=False), tmp_path / "strategies.jsonl"
    with ChatServer(fake_model) as server:
        flags = extraction_flags(server.url, data, out, "--price_in", "2", "--price_out", "30", "--workers", "3")
        assert extract.main(flags) == 0
    printed = capsys.readouterr()
    assert len(server.requests) == 3 * (1 + 5 + 1) and all(path == "/v1/chat/completions" for _, _, path in server.requests)
    assert all(headers["Authorization"] == f"Bearer {key}" for _, headers, _ in server.requests)
    bodies = [json.loads(raw) for raw, _, _ in server.requests]
    assert {(b["model"], b["max_tokens"], b["top_p"]) for b in bodies} == {("fake", 8192, 0.95)}
    asked = [b for b in bodies if "Write down the strategy" in b["messages"][0]["content"]]
    assert Counter((b["seed"], b["temperature"]) for b in asked) == {(seed, 0.6): 3 for seed in range(5)}
    # The scorer sees the three that are left, and neither the one that leaks nor the one that is none.
    seen = [re.findall(r"way (\w)", text) for text in (b["messages"][0]["content"] for b in bodies) if "Score the" in text]
    assert seen == [["a", "d", "e"]] * 3
    assert {b["temperature"] for b in bodies if "Score the" in b["messages"][0]["content"]} == {0.0}
    # 21 answers of 100 + 10 tokens: 2,100 * 2 + 210 * 30 millionths
    assert "21 requests, 2,100 + 210 tokens, cost 0.01" in printed.out
    problems = load_problems(out)  # what train.py reads, unknown fields and all
    assert [(p.id, p.answer, p.solution, p.strategy.type) for p in problems] == [
        (f"row-{i}", str(60 + 4 * i), f"Adding gives \\boxed{{{60 + 4 * i}}}.", "a sum, way d") for i in range(3)
    ]
    record = {r["row"]: r for r in journal_records(out, "row")}["row-1"]
    assert record["kept"] == 3 and record["solution_from"] == "model" and record["failed"] is None
    assert [c["rejected"] and c["rejected"][0] for c in record["candidates"]] == [None, "not parsed", "leak", None, None]
    assert "the answer 64 in step 2" in record["candidates"][2]["rejected"][1]
    assert list(record["candidates"][3]["scores"].values()) == [0.9, 1.0, 1.0, 1.0]
    (run,) = journal_records(out, "run")
    assert run["endpoint"] == server.url + "/chat/completions" and run["prompts_hash"] == extract.prompts_hash()
    everything = printed.out + printed.err + extract.journal_path(out).read_text() + out.read_text()
    assert key not in everything
    # Once more: nothing is asked, nothing changes; then the report on what is there.
    before = out.read_bytes(), len(journal_records(out, "row"))
    assert extract.main(flags) == 0 and len(server.requests) == 21
    assert (out.read_bytes(), len(journal_records(out, "row"))) == before
    capsys.readouterr()
    assert extract.main(["--report", str(out), "--samples", "1", "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    for line in (
        "3 strategies", "candidates: 15 of 3 rows; read 12 (80.0 %)", "not parsed 3 (20.0 %)", "leak 3 (20.0 %)",
        "rows without a strategy: 0", "type 0.90, strategy 1.00", "high 3 (100.0 %)", "leaks by the filter: 0 (0.0 %)",
        "a sum, way d (3)", "21 requests", "words: mean 17.0", "steps: mean 2.0, median 2, 2 to 2",
    ):  # fmt: skip
        assert line in printed, (line, printed)
    assert printed.count("\n--- row-") == 1
    # A journal of an earlier version, whose scores went from 1 to 5 on other criteria: no bands, and the rest of the report.
    log = extract.journal_path(out)
    records = journal_records(out)
    for record in records:
        for candidate in record.get("candidates", []):
            candidate["scores"] = {"faithful": 5, "reusable": 4, "no_leak": 5, "actionable": 5}
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert extract.main(["--report", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "by an earlier version, on faithful, reusable, no_leak, actionable" in printed
    assert "quality:" not in printed and "types: 1 different" in printed


def test_extraction_rejects_a_value_that_only_the_solution_holds():
    reply = SimpleNamespace(finish="stop", text="Problem type: t\nStrategy: s\nSteps:\n(a) This gives 37.\n(b) Go on.")
    candidate = extract.judge_candidate(0, reply, "What is 30 + 12 - 5?", "It is 42 - 5 = 37, so \\boxed{yes}.", "yes", [])
    assert candidate["rejected"][0] == "leak" and "the computed value 37" in candidate["rejected"][1]


def test_extraction_prompts_hash_is_of_all_three_wordings(monkeypatch):
    before = extract.prompts_hash()
    for name in ("solution_prompt", "extraction_prompt", "scoring_prompt"):
        with monkeypatch.context() as patch:
            patch.setattr(extract, name, lambda *_: "another wording")
            assert extract.prompts_hash() != before, name


def drip(handler, body, number):
    """A reply that never ends, in single bytes: each arrives in time, the whole does not."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(40):
        handler.wfile.write(b" ")
        time.sleep(0.1)


def cut(handler, body, number):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def cut_chunks(handler, body, number):
    handler.protocol_version = "HTTP/1.1"
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"d\r\n" + b'{"choices": [' + b"\r\n")
    handler.close_connection = True


def no_http(handler, body, number):
    handler.wfile.write(b"\x00\x01 hello\r\n\r\n")


def vanish(handler, body, number):
    handler.connection.close()


def flood(handler, body, number):
    handler.send_response(200)
    handler.end_headers()
    handler.flooded = 0
    while True:
        handler.wfile.write(b"<p>" * 10000)


def body_of(value, status=200):
    return lambda handler, body, number: (status, {}, value if isinstance(value, bytes) else json.dumps(value).encode())


@pytest.mark.parametrize(
    "misbehave, words",
    [
        (lambda handler, body, number: time.sleep(2), "timed out"),
        (drip, "timed out"),
        (cut, "cut off after 13 of 1000 bytes"),
        (cut_chunks, "IncompleteRead"),
        (no_http, "BadStatusLine"),
        (vanish, "RemoteDisconnected"),
        (flood, "more than 100,000 bytes"),
        (body_of({"error": {"message": "overloaded"}}, 500), "HTTP 500: overloaded"),
        (body_of(b"<html>busy</html>", 503), "HTTP 503: <html>busy</html>"),
        (body_of({"error": "try later"}, 429), "HTTP 429: try later"),
        (body_of(b"", 408), "HTTP 408: (no message)"),
        (body_of(b"<html>" * 100), "no JSON: b'<html>"),
        (body_of(b"\xff\xfe"), "no JSON"),
        (body_of([1, 2]), "HTTP 200, but"),
        (body_of({"error": {"message": "upstream", "code": 502}}), "HTTP 200, but: upstream"),
        (body_of({}), "no choices[0].message"),
        (body_of({"choices": []}), "no choices[0].message"),
        (body_of({"choices": [3]}), "no choices[0].message"),
        (body_of({"choices": [{"text": "old"}]}), "no choices[0].message"),
        (body_of({"choices": [{"message": {"content": None}}]}), "content is empty: None"),
        (body_of({"choices": [{"message": {"content": " \n"}}]}), "content is empty"),
        (body_of({"choices": [{"message": {"content": 7}}]}), "content is empty: 7"),
    ],
)
def test_extraction_tries_again_where_that_may_help(tmp_path, capsys, monkeypatch, misbehave, words):
    monkeypatch.setattr(extract, "MAX_BYTES", 100_000)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    data, out = extraction_data(tmp_path, 1), tmp_path / "out.jsonl"
    # Only those that are about time get little of it: on a busy machine a good reply can take half a second too.
    flags = ("--read_timeout", "0.6" if words == "timed out" else "30", "--candidates", "1", "--retries", "1")
    flags += ("--max_wait", "0")  # or a 429 would use up no retry
    with ChatServer(lambda h, body, i: misbehave(h, body, i) if i == 0 else fake_model(h, body, i)) as server:
        assert extract.main(extraction_flags(server.url, data, out, *flags)) == 0
        assert len(server.requests) == 3 and len(load_problems(out)) == 1  # the failure, the candidate, its score
    assert "Authorization" not in server.requests[0][1]
    capsys.readouterr()
    # For ever: the row fails with the reason, and there is no file that looks finished.
    out = tmp_path / "never.jsonl"
    with ChatServer(misbehave) as server:
        assert extract.main(extraction_flags(server.url, data, out, *flags)) == extract.ROWS_FAILED
        assert len(server.requests) == 2
    error = capsys.readouterr().err
    assert "failed: row-0: no answer in 2 tries" in error and words in error and not out.exists()


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 422])
def test_extraction_stops_at_once_where_trying_again_is_useless(tmp_path, capsys, key, status):
    data, out = extraction_data(tmp_path, 5), tmp_path / "out.jsonl"
    with ChatServer(body_of({"error": {"message": f"no such thing, {key} is wrong"}}, status)) as server:
        with pytest.raises(ValueError) as error:
            extract.main(extraction_flags(server.url, data, out))
        assert len(server.requests) == 1
    assert f"HTTP {status}: no such thing, *** is wrong" in str(error.value) and "goes on from there" in str(error.value)
    assert key not in str(error.value) + "".join(capsys.readouterr()) + extract.journal_path(out).read_text()


@pytest.mark.parametrize("status", [400, 413, 422])
def test_extraction_goes_on_where_the_server_refuses_one_row(tmp_path, capsys, status):
    """A content filter, or a problem that is too long: also where the refusal is the first reply of a run."""
    refuse = body_of({"error": "content filter"}, status)

    def script(handler, body, number):
        return (refuse if "What is 21" in body["messages"][0]["content"] else fake_model)(handler, body, number)

    data, out = extraction_data(tmp_path, 3), tmp_path / "out.jsonl"
    with ChatServer(script) as server:
        for requests in (6 + 1 + 6, 1):
            before = len(server.requests)
            assert extract.main(extraction_flags(server.url, data, out)) == extract.ROWS_FAILED
            assert len(server.requests) - before == requests
            reason = f"failed: row-1: the server refuses a request of this row: HTTP {status}: content filter"
            assert reason in capsys.readouterr().err
    assert [row.id for row in load_problems(out)] == ["row-0", "row-2"]
    # but a server that refuses row after row is not asked by thousands of them
    data, out = extraction_data(tmp_path, 30), tmp_path / "new.jsonl"
    with ChatServer(lambda h, b, i: (fake_model if i < 6 else refuse)(h, b, i)) as server:
        with pytest.raises(ValueError, match=f"20 requests in a row failed for good, the last with: HTTP {status}"):
            extract.main(extraction_flags(server.url, data, out))
        assert len(server.requests) == 6 + 20


def test_extraction_sits_out_more_rate_limits_than_it_has_retries(tmp_path, capsys):
    data, out = extraction_data(tmp_path, 1), tmp_path / "out.jsonl"
    slow_down = body_of({"error": "slow down"}, 429)
    with ChatServer(lambda h, b, i: (slow_down if i < 9 else fake_model)(h, b, i)) as server:
        flags = extraction_flags(server.url, data, out, "--retries", "0", "--candidates", "1", "--backoff", "0.001")
        assert extract.main(flags) == 0 and len(server.requests) == 9 + 2
    with ChatServer(lambda h, b, i: slow_down(h, b, i)) as server:
        flags = extraction_flags(server.url, data, tmp_path / "new.jsonl", "--max_wait", "0.2", "--retries", "1")
        assert extract.main(flags) == extract.ROWS_FAILED and len(server.requests) > 2


def test_extraction_stops_where_an_answer_cannot_be_kept_and_loses_none_before_it(tmp_path):
    """On a disk that is full half a line must not stay: the next line would be glued to it."""
    data, out = extraction_data(tmp_path, 2), tmp_path / "out.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def script(handler, body, number):
        if number == 3:  # room for 100 bytes more
            resource.setrlimit(resource.RLIMIT_FSIZE, (extract.journal_path(out).stat().st_size + 100, hard))
        return fake_model(handler, body, number)

    with ChatServer(script) as server:
        flags = extraction_flags(server.url, data, out, "--workers", "2")
        try:
            with pytest.raises(ValueError, match="log.jsonl: .*File too large; an answer could not be kept: make room"):
                extract.main(flags)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        kept = len(journal_records(out, "answer"))
        assert 2 <= kept <= 4
        asked = len(server.requests)
        assert extract.main(flags) == 0 and len(server.requests) == asked + 2 * 6 - kept
    assert len(load_problems(out)) == 2


def test_extraction_exit_status_tells_failed_rows_from_what_stopped_it(tmp_path, capsys):
    data, out = extraction_data(tmp_path, 1), tmp_path / "out.jsonl"

    def status(*more):
        return run_script("strategy.py", *extraction_flags(server.url, data, out, *more))

    with ChatServer(fake_model) as server:
        assert status().returncode == 0
        before = out.read_bytes()
        done = status("--seed", "5")
        assert done.returncode == 1 and "no paid answer would fit" in done.stderr
        assert status("--no_such_flag").returncode == 2
    with ChatServer(body_of(b"", 500)) as server:
        extract.journal_path(out).unlink()
        extract.journal_path(out).touch()
        done = status("--retries", "0")
        assert done.returncode == 3 and "the file of an earlier run is left as it is" in done.stderr
    assert out.read_bytes() == before


def test_extraction_puts_no_file_in_place_that_training_would_refuse(tmp_path, monkeypatch):
    data, out = extraction_data(tmp_path, 1), tmp_path / "out.jsonl"

    def refuse(path, worker=None):  # what is written, and not the data, which is read by the same function
        if Path(path).suffix == ".part":
            raise ValueError(f"{path.name}:1: of no use")
        return load_problems(path, worker)

    with ChatServer(fake_model) as server:
        assert extract.main(extraction_flags(server.url, data, out)) == 0
        before = out.read_bytes()
        data = extraction_data(tmp_path, 2)
        monkeypatch.setattr(extract, "load_problems", refuse)
        with pytest.raises(ValueError, match="out.jsonl.part:1: of no use"):
            extract.main(extraction_flags(server.url, data, out))
    assert out.read_bytes() == before


def test_extraction_never_takes_the_key_to_another_host(tmp_path, key):
    data, out = extraction_data(tmp_path, 2), tmp_path / "out.jsonl"
    with ChatServer(fake_model) as other:
        where = other.url.replace("127.0.0.1", "localhost")
        for status in (301, 302, 303, 307, 308):
            with ChatServer(lambda h, b, i, s=status: (s, {"Location": f"{where}/chat/completions?x=1"}, b"")) as server:
                with pytest.raises(ValueError, match=re.escape(f"HTTP {status}: the server redirects to '{where}/chat")):
                    extract.main(extraction_flags(server.url, data, out))
                assert len(server.requests) == 1
        assert other.requests == []


def test_extraction_waits_as_long_as_the_server_says(tmp_path, monkeypatch):
    now = 1_700_000_000.0
    assert extract.retry_after("7", now) == 7 and extract.retry_after(" 0.5 ", now) == 0.5
    assert extract.retry_after("Tue, 14 Nov 2023 22:13:50 GMT", now) == 30  # date -u -d @1700000000 is 22:13:20
    assert extract.retry_after("Tue, 14 Nov 2023 22:13:00 GMT", now) == 0
    assert all(extract.retry_after(value, now) is None for value in (None, "", "soon", "-3", "32 Foo 2023"))
    # On the wire: both forms, the second worker held back by the first one's answer, and a wait that nobody should sit out.
    times, lock = [], threading.Lock()

    def busy(handler, body, number):
        with lock:
            times.append(time.time())
        later = email.utils.formatdate(math.ceil(time.time()) + 1, usegmt=True)
        if number < 2:
            return 429, {"Retry-After": "0.4" if number == 0 else later}, b"slow down"
        return fake_model(handler, body, number)

    data, out = extraction_data(tmp_path, 1), tmp_path / "out.jsonl"
    with ChatServer(busy) as server:
        assert extract.main(extraction_flags(server.url, data, out, "--candidates", "1")) == 0
    assert times[1] - times[0] >= 0.4 and times[2] - times[1] >= 0.95 and len(times) == 4
    stop = threading.Event()
    held = SimpleNamespace(not_before=time.monotonic() + 0.2)
    extract._wait_until(held, stop)
    assert time.monotonic() >= held.not_before
    with ChatServer(lambda h, b, i: (429, {"Retry-After": "86400"}, b"daily limit")) as server:
        with pytest.raises(ValueError, match="HTTP 429: daily limit .it asks for a wait of 86,400 s, more than --max_wait 900"):
            extract.main(extraction_flags(server.url, data, tmp_path / "other.jsonl"))
        assert len(server.requests) == 1


def test_extraction_backs_off_exponentially_with_jitter(monkeypatch):
    waits = []
    stop = SimpleNamespace(is_set=lambda: False, wait=waits.append)
    monkeypatch.setattr(extract, "post", lambda server, data: (500, {}, b"no"))
    server = extract.Server(False, "h", 1, "/", None, 1.0, 1.0, 8, 2.0, 900.0)
    for _ in range(3):
        with pytest.raises(extract.RowFailed, match="9 tries, the last: HTTP 500: no"):
            extract.ask_server(server, {}, stop, None)
    assert len(waits) == 24 and len(set(waits)) == 24
    for i, wait in enumerate(waits):
        middle = min(60, 2 * 2 ** (i % 8))
        assert 0.5 * middle <= wait <= 1.5 * middle
    # A server that is gone is not asked by 8,000 rows in turn; one answer in between starts the count anew.
    server.failures = extract.GIVE_UP_AFTER - 1
    with pytest.raises(extract.Stop, match="20 requests in a row"):
        extract.ask_server(server, {}, stop, None)
    monkeypatch.setattr(extract, "post", lambda server, data: completion("x"))
    assert extract.ask_server(server, {}, stop, None).text == "x" and server.failures == 0


def test_extraction_says_when_nobody_listens(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    data = extraction_data(tmp_path, 2)
    assert extract.main(extraction_flags(f"http://127.0.0.1:{port}", data, tmp_path / "out.jsonl")) == extract.ROWS_FAILED
    error = capsys.readouterr().err
    assert error.count("ConnectionRefusedError") == 2 and "2 of 2 rows failed" in error


def test_extraction_reads_the_dialects_of_servers(tmp_path):
    read = extract.read_answer
    reply = completion("Hi", reasoning_content="let me think")
    usage = {"prompt_tokens": 100, "completion_tokens": 10}
    assert read(*reply) == extract.Answer("Hi", "stop", usage, "let me think", "fake-1")
    assert read(*completion([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])).text == "ab"
    assert read(*completion(None, finish="length")).text == ""  # all of it went into thoughts: paid, and not asked again
    assert read(200, {}, b'{"choices": [{"message": {"content": "x"}}]}') == extract.Answer("x", None, {})
    odd = json.loads(reply[2]) | {"usage": {"prompt_tokens": "many", "completion_tokens": 3}}
    assert read(200, {}, json.dumps(odd).encode()).usage == {"completion_tokens": 3}


def test_extraction_keeps_texts_that_break_lines_and_encodings(tmp_path, capsys):
    odd = "Half a pair: \ud83d, a line\u2028separator, a\x00nul, \u4e2d.\nSo \\boxed{60}."

    def script(handler, body, number):
        text = body["messages"][0]["content"]
        return fake_model(handler, body, number) if "Write down the" in text or "Score the" in text else odd

    data, out = extraction_data(tmp_path, 1, solutions=False), tmp_path / "out.jsonl"
    with ChatServer(script) as server:
        for _ in range(2):
            assert extract.main(extraction_flags(server.url, data, out)) == 0
        assert len(server.requests) == 7
    assert load_problems(out)[0].solution == odd.replace("\ud83d", "\ufffd")
    code = "import sys; from tools.extract import main; main(sys.argv[1:]); print(sorted({'torch', 'tqdm'} & set(sys.modules)))"
    command = [sys.executable, "-c", code, "--report", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "1 strategies" in done.stdout and done.stdout.endswith("\n[]\n"), done.stderr  # the report needs no torch


@pytest.fixture
def ctrl_c():
    """Ctrl-C as in a terminal: a shell starts what it runs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_extraction_interrupted_keeps_what_is_on_its_way(tmp_path, capsys, ctrl_c):
    def script(handler, body, number):
        if number == 6:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)  # the program waits for this one, and asks no more
        return fake_model(handler, body, number)

    data, out = extraction_data(tmp_path, 3), tmp_path / "out.jsonl"
    with ChatServer(script) as server:
        flags = extraction_flags(server.url, data, out)
        with pytest.raises(KeyboardInterrupt):
            extract.main(flags)
        assert len(server.requests) == len(journal_records(out, "answer")) == 7 and not out.exists()
        assert "waiting for the answers that are on their way" in capsys.readouterr().err
        assert extract.main(flags) == 0 and len(server.requests) == 18
    assert len(load_problems(out)) == 3


def test_extraction_counts_what_was_billed_for_nothing(tmp_path, capsys):
    data, out = extraction_data(tmp_path, 1), tmp_path / "out.jsonl"
    with ChatServer(lambda h, b, i: completion("") if i == 0 else fake_model(h, b, i)) as server:
        assert extract.main(extraction_flags(server.url, data, out, "--candidates", "1")) == 0
    (waste,) = journal_records(out, "waste")
    assert waste["step"] == "candidate" and "content is empty" in waste["reason"]
    assert "in all 3 requests, 300 + 30 tokens; now 3 requests" in capsys.readouterr().out


def test_extraction_has_each_answer_on_the_disk_before_the_next_question(tmp_path, monkeypatch):
    data, out, kept, synced = extraction_data(tmp_path, 2), tmp_path / "out.jsonl", [], []
    monkeypatch.setattr(extract.os, "fsync", lambda file: synced.append(len(journal_records(out, "answer"))))

    def script(handler, body, number):
        kept.append(len(journal_records(out, "answer")))
        assert max(synced) == kept[-1]  # an fsync saw all of the answers; the row's own record may be on its way
        return fake_model(handler, body, number)

    with ChatServer(script) as server:
        assert extract.main(extraction_flags(server.url, data, out, "--retries", "0")) == 0
    assert kept == list(range(12))  # 2 rows of 5 candidates and one call for their scores


def test_extraction_asks_as_many_at_once_as_it_has_workers(tmp_path):
    data, out, gate = extraction_data(tmp_path, 4), tmp_path / "out.jsonl", threading.Barrier(4, timeout=30)

    def script(handler, body, number):
        if number < 4:
            gate.wait()  # opens only when four requests are there together
        return fake_model(handler, body, number)

    with ChatServer(script) as server:
        assert extract.main(extraction_flags(server.url, data, out, "--workers", "4", "--retries", "0")) == 0
        assert server.most_running == 4
    assert [p.id for p in load_problems(out)] == [f"row-{i}" for i in range(4)]  # in the order of the data


def test_extraction_killed_and_continued_pays_once(tmp_path, capsys):
    data, workers = extraction_data(tmp_path, 6, solutions=False), 2
    with ChatServer(fake_model) as server:
        assert extract.main(extraction_flags(server.url, data, tmp_path / "whole.jsonl")) == 0
        whole = Counter(raw for raw, _, _ in server.requests)
    out, killed, enough = tmp_path / "killed.jsonl", threading.Event(), threading.Event()

    def script(handler, body, number):
        if not killed.is_set() and number >= 20:
            enough.set()
            killed.wait(10)  # these two are in flight at the kill
        return fake_model(handler, body, number)

    with ChatServer(script) as server:
        flags = extraction_flags(server.url, data, out, "--workers", str(workers))
        command = [sys.executable, strategy_module.__file__, *flags]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert enough.wait(60)
        time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed.set()
        assert not out.exists() and 20 < len(server.requests) <= 20 + workers
        # The kill may have come while a line was written.
        with extract.journal_path(out).open("ab") as stream:
            stream.write(b'{"kind": "answer", "key": "abc", "text": "Probl')
        assert extract.main(flags) == 0
        assert "dropped 47 bytes of a last line that was cut off" in capsys.readouterr().out
        paid = Counter(raw for raw, _, _ in server.requests)
    assert set(paid) == set(whole)
    assert all(count <= 2 for count in paid.values()) and paid.total() - len(paid) <= workers
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and len(load_problems(out)) == 6
    assert len(journal_records(out, "answer")) == len(whole)  # and every line can be read


def test_extraction_refuses_a_journal_that_does_not_fit(tmp_path):
    data, out = extraction_data(tmp_path, 1), tmp_path / "out.jsonl"
    with ChatServer(fake_model) as server:
        flags = extraction_flags(server.url, data, out)
        assert extract.main(flags) == 0
        count = len(server.requests)
        for more in (["--temperature", "0.7"], ["--seed", "1"], ["--body", '{"top_k": 3}']):
            with pytest.raises(ValueError, match="no paid answer would fit"):
                extract.main([*flags, *more])
        assert extract.main([*flags, "--candidates", "7"]) == 0  # but more of the same is welcome
        assert len(server.requests) == count + 3  # two candidates, and the scores of all
        log = extract.journal_path(out)
        with extract.closing(extract.Journal(log, journal_records(out, "run")[0])):
            with pytest.raises(ValueError, match="another run is writing it"):
                extract.main(flags)
        lines = log.read_bytes().splitlines(keepends=True)
        older = json.dumps(json.loads(lines[0]) | {"prompts_hash": "of other prompts"}).encode() + b"\n"
        log.write_bytes(b"".join([older, *lines[1:]]))
        with pytest.raises(ValueError, match="made with prompts_hash of other prompts, now"):
            extract.main(flags)
        log.write_bytes(b"".join([*lines[:2], lines[2][:40] + b"\n", *lines[3:]]))
        with pytest.raises(ValueError, match=r"log.jsonl:3: no line of a journal"):
            extract.main(flags)
        log.unlink()
        with pytest.raises(ValueError, match="already there, and not made by this program"):
            extract.main(flags)
        assert len(server.requests) == count + 3


def test_extraction_asks_again_for_a_wrong_solution(tmp_path, capsys):
    data, out = extraction_data(tmp_path, 3, solutions=False), tmp_path / "out.jsonl"

    def script(handler, body, number):
        text, seed = body["messages"][0]["content"], body["seed"]
        if "Write down the" in text or "Score the" in text:
            return fake_model(handler, body, number)
        if "What is 20" in text and seed < 2:
            return ("It is \\boxed{61}.", completion("Half of it is \\boxed{60}", finish="length"))[seed]
        if "What is 21" in text:
            return ("It is \\boxed{7}.", "No idea.", "<think>\\boxed{64}")[seed]
        return fake_model(handler, body, number)

    with ChatServer(script) as server:
        assert extract.main(extraction_flags(server.url, data, out)) == extract.ROWS_FAILED
    error = capsys.readouterr().err
    assert "failed: row-1: 3 solutions, none with the answer '64': answer '7', no answer, nothing but thoughts" in error
    assert "1 of 3 rows failed" in error
    assert [(p.id, p.solution) for p in load_problems(out)] == [
        ("row-0", "Adding gives \\boxed{60}."), ("row-2", "Adding gives \\boxed{68}.")
    ]  # fmt: skip
    assert len(server.requests) == 3 + 3 + 1 + 2 * 6
    assert extract.main(["--report", str(out)]) == 0
    assert "rows without a strategy: 1\n  row-1: 3 solutions" in capsys.readouterr().out


def test_extraction_takes_the_data_as_it_comes(tmp_path, capsys):
    strategy = strategy_example().to_dict()
    rows = [
        {"id": "a", "problem": "What is 1 + 2?", "answer": "3", "solution": "It is #### 4"},  # wrong: no strategy from it
        {"id": "b", "problem": "What is 2 + 2?", "solution": "It is \\boxed{4}."},  # its answer becomes the row's
        {"id": "c", "problem": "What is 3 + 2?"},  # the model's answer becomes the row's
        {"id": "d", "problem": "What is 4 + 2?", "answer": "6", "solution": "Six.", "strategy": strategy},  # kept as it is
        {"id": "e", "problem": "What is 5 + 2?", "answer": "7", "strategy": strategy},  # only the solution is asked for
    ]
    data, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with ChatServer(fake_model) as server:
        assert extract.main(extraction_flags(server.url, data, out)) == extract.ROWS_FAILED
        assert len(server.requests) == 6 + 7 + 0 + 1
        got = {p.id: (p.answer, p.strategy.type) for p in load_problems(out)}
        new, own = "a sum, way d", "sum of two"
        assert got == {"b": ("4", new), "c": ("5", new), "d": ("6", own), "e": ("7", own)}
        assert "failed: a: the data's solution ends in '4', the data's answer is '3'" in capsys.readouterr().err
        for line, words in (
            ('{"id": "x", "problem": "p", "answer": "3", "note": 1}', "data.jsonl:6: unknown field 'note'"),
            ('{"id": "b", "problem": "p"}', "data.jsonl:6: duplicate id"),
            ('{"id": "x", "answer": "3"}', "data.jsonl:6: field 'problem' is missing"),
            ("{", "data.jsonl:6: not a line of JSON"),
        ):
            data.write_text("".join(json.dumps(row) + "\n" for row in rows) + line + "\n")
            with pytest.raises(ValueError, match=re.escape(words)):
                extract.main(extraction_flags(server.url, data, tmp_path / "new.jsonl"))
        data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[1]]))
        assert extract.main(["--data", str(data), "--dry_run"]) == 0
        assert f"{data}: dropped 1 rows that repeat an earlier problem" in capsys.readouterr().out
        assert len(server.requests) == 14
    # Without a reference a solution must end in an answer that the output's reader takes as one.
    assert extract.Grader(None).verdict("It is \\boxed{3 +}.", None) == ("3 +", False)


def test_extraction_gives_up_on_candidates_only_after_all_rounds(tmp_path, capsys):
    good = "Problem type: sum\nStrategy: Join.\nSteps:\n(a) Add {}."
    scoring = Counter()

    def script(handler, body, number):
        text, seed = body["messages"][0]["content"], body["seed"]
        row = int(re.search(r"What is 2(\d)", text)[1])
        if "Score the" in text:
            scoring[row] += 1
            leak = {"parts": 0.2, "them": 0.3, "all": 0.4}
            added = enumerate(re.findall(r"1\. Add (\w+)\.", text), start=1)
            # What leaks is the best otherwise, and by its mean.
            scores = "\n".join(f"{i}: {'1 1 1' if what == 'parts' else '0.8 0.9 1.0'} {leak[what]}" for i, what in added)
            if row == 2 and scoring[row] == 1:
                return completion(scores, finish="length")  # it can be read, but may not be all
            return scores if row < 3 else "fine!"
        if seed == 1:
            return completion(good.format("it"), finish="length")  # it parses, but is half an answer
        own = {0: ("parts", "", "parts", "them", "all", "parts"), 2: ("them", "", "all"), 3: ("them", "", "all")}
        return good.format(own[row][seed] if row in own else "parts")

    data, out = extraction_data(tmp_path, 4), tmp_path / "out.jsonl"
    with ChatServer(script) as server:
        assert extract.main(extraction_flags(server.url, data, out, "--candidates", "3")) == extract.ROWS_FAILED
    kinds = {
        record["row"]: ([c["rejected"] and c["rejected"][0] for c in record["candidates"]], record["kept"])
        for record in journal_records(out, "row")
    }
    assert kinds == {
        "row-0": (["leak by score", "cut off", "repeated", None, None, "repeated"], 4),
        "row-1": (["leak by score", "cut off", "repeated", "repeated", "repeated", "repeated"], None),
        "row-2": ([None, "cut off", None], 2),  # the second round asks for the scores alone
        "row-3": (["not scored", "cut off", "not scored"], None),
    }
    assert scoring == {0: 2, 1: 1, 2: 2, 3: 2} and len(server.requests) == 6 + 6 + 3 + 3 + 7
    errors = capsys.readouterr().err
    assert "row-1: no candidate is left of 6: 4 repeated, 1 leak by score, 1 cut off" in errors
    assert "row-3: no candidate is left of 3: 2 not scored, 1 cut off" in errors


def test_extraction_takes_thoughts_as_a_source_of_strategies_and_of_nothing_else(tmp_path, capsys):
    """They hold every number that was tried: with them each candidate would leak, and the scorer judge what nobody wrote."""
    tried = "Is it 3? No. 7 times 9 is 63, no."
    data, out = extraction_data(tmp_path, 1), tmp_path / "out.jsonl"
    row = json.loads(data.read_text())
    whole = {"solution": f"<think>{tried}</think> {row['solution']}"}
    only = [row | {"id": f"only-{i}", "problem": f"What is {i}?", "solution": "<think>It is 60." + end}
            for i, end in enumerate(("", "</think> "))]  # fmt: skip
    data.write_text("".join(json.dumps(one) + "\n" for one in (row | whole, *only)))

    def script(handler, body, number):
        text = body["messages"][0]["content"]
        if "Score the" in text:
            return "1: 1 1 1 1"
        return "Problem type: sum\nStrategy: Join the 3 parts.\nSteps:\n(a) Add them in 7 or 9 moves."

    with ChatServer(script) as server:
        assert extract.main(extraction_flags(server.url, data, out, "--candidates", "1")) == extract.ROWS_FAILED
        asked = [json.loads(raw)["messages"][0]["content"] for raw, _, _ in server.requests]
    assert [tried in text for text in asked] == [True, False]
    assert [problem.strategy.strategy for problem in load_problems(out)] == ["Join the 3 parts."]
    errors = capsys.readouterr().err
    assert all(f"only-{i}: its solution is nothing but thoughts" in errors for i in (0, 1))
    extract.main(["--data", str(data), "--dry_run", "--show", "9", "--candidates", "1", "--out", str(out)])
    shown = capsys.readouterr().out
    assert shown.count(tried) == 1 and "only-0: its solution is nothing but thoughts" in shown  # as they are sent


def test_extraction_dry_run_sends_nothing(tmp_path, capsys, key):
    data, out = extraction_data(tmp_path, 3), tmp_path / "out.jsonl"
    with ChatServer(fake_model) as server:
        flags = extraction_flags(server.url, data, out, "--dry_run", "--show", "1", "--price_in", "1", "--price_out", "100")
        assert extract.main([*flags, "--max_tokens", "1000"]) == 0
        assert server.requests == []
    printed = capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["problems.jsonl"] and key not in printed
    solution = "The sum is \\boxed{60}."
    assert extraction_prompt("What is 20 + 40?", solution)[0]["content"] in printed and "What is 21 + 43?" not in printed
    # 3 rows of 5 candidates and one call that scores them; out 15 * (220 + 20), at most 2 rounds of 18 * 1000
    assert "3 rows, 18 requests" in printed and "and 3,600 out" in printed and "and 36,000 out, where every" in printed
    tokens = int(re.search(r"about ([\d,]+) tokens in", printed)[1].replace(",", ""))
    asked = len(extraction_prompt("What is 20 + 40?", solution)[0]["content"])
    assert tokens > 15 * (asked // 4 + 220)  # the scorer reads all five candidates
    assert f"at most about {2 * tokens:,} in and" in printed and "nothing was sent" in printed
    assert f"cost about {tokens / 1e6 + 0.36:.2f}, at most about {2 * tokens / 1e6 + 3.6:.2f}" in printed
    data = extraction_data(tmp_path, 2, solutions=False)  # up to 3 solutions a row as well
    assert extract.main([*extraction_flags("http://127.0.0.1:1", data, out), "--dry_run", "--max_tokens", "1000"]) == 0
    assert f"and {2 * (3 + 10 + 2) * 1000:,} out, where every" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, words",
    [
        (["--endpoint", "http://example.com/v1"], "would travel unencrypted"),
        (["--endpoint", "http://127.evil.com/v1"], "would travel unencrypted"),
        (["--endpoint", "https://me:pass@example.com/v1"], "holds a user name or password"),
        (["--endpoint", "ftp://example.com"], "expected http"),
        (["--endpoint", "example.com/v1"], "expected http"),
        (["--endpoint", "https://example.com/v1?key=1"], "expected http"),
        (["--local", "x"], "one of --endpoint and --local"),
        (["--candidates", "0"], "--candidates must be at least 1, got 0"),
        (["--top_p", "0"], "--top_p must be in (0, 1]"),
        (["--read_timeout", "0"], "--read_timeout must be above 0"),
        (["--temperature", "nan"], "--temperature must be at least 0"),
        (["--price_in", "1"], "the cost needs both"),
        (["--body", "[1]"], "--body must be a JSON object"),
        (["--body", '{"stream": true}'], "--body must be a JSON object"),
        (["--out", "/nowhere/x.jsonl"], "its folder does not exist"),
        (["--data", "/nowhere.jsonl"], "no such file"),
        (["--report", "/nowhere.jsonl"], "no such file"),
    ],
)
def test_extraction_checks_its_flags_first(tmp_path, monkeypatch, key, change, words):
    monkeypatch.setattr(extract, "post", None)  # nothing may be sent
    flags = extraction_flags("https://example.com/v1", extraction_data(tmp_path), tmp_path / "out.jsonl", *change)
    with pytest.raises(ValueError) as error:
        extract.main(flags)
    assert words in str(error.value) and "pass@" not in str(error.value) and key not in str(error.value)
    assert not (tmp_path / "out.jsonl.log.jsonl").exists()


def test_extraction_has_no_flag_for_the_key_and_knows_its_servers(monkeypatch, capsys):
    for flag in ("--key", "--api_key", "--key_en"):
        with pytest.raises(SystemExit):
            extract.main([flag, "sk-1"])
    assert "unrecognized arguments" in capsys.readouterr().err

    def server(url, *flags, **environment):
        args = extract.build_parser().parse_args(["--endpoint", url, *flags])
        return extract.make_server(args, environment)

    assert server("https://api.deepseek.com/").name == "https://api.deepseek.com:443/chat/completions"
    assert server("http://localhost:8000/v1/chat/completions", OPENAI_API_KEY="k").name.endswith(":8000/v1/chat/completions")
    assert server("http://[::1]:8000/v1", OPENAI_API_KEY="k").name == "http://[::1]:8000/v1/chat/completions"
    assert server("http://example.com/v1").key is None  # without a key there is nothing to lose
    assert server("http://example.com/v1", "--allow_http", OPENAI_API_KEY="k").key == "k"
    assert server("https://h/v1", "--key_env", "MINE", MINE=" k\n", OPENAI_API_KEY="other").key == "k"
    with pytest.raises(ValueError, match="no HTTP header can carry") as error:
        server("https://h/v1", OPENAI_API_KEY="a\r\nHost: evil")
    assert "evil" not in str(error.value)
    assert "secret" not in repr(server("https://h/v1", OPENAI_API_KEY="secret"))
    monkeypatch.setenv("https_proxy", "http://me:p%40ss@proxy:3128")
    through = extract._connection(server("https://h/v1"))
    assert (through.host, through.port, through._tunnel_host, through._tunnel_port) == ("proxy", 3128, "h", 443)
    assert through._tunnel_headers["Proxy-Authorization"] == "Basic bWU6cEBzcw=="  # printf 'me:p@ss' | base64
    assert extract._connection(server("http://127.0.0.1:1/v1")).host == "127.0.0.1"


def test_extraction_body_adds_and_removes_fields_and_keys_name_the_exact_request():
    settings = extract.Settings("m", 0.6, 0.0, 0.95, 100, 7, {"max_tokens": None, "max_completion_tokens": 9, "seed": None})
    assert extract.request_body(settings, "score", 2, auto_messages("p"))["temperature"] == 0.6  # greedy, it would be the same
    body = extract.request_body(settings, "score", 0, auto_messages("p"))
    assert body == {"model": "m", "messages": auto_messages("p"), "temperature": 0.0, "top_p": 0.95, "max_completion_tokens": 9}
    keys = {extract.request_key(body | change, step, index) for change in ({}, {"top_p": 0.9}, {"model": "n"}, {"messages": []})
            for step in ("score", "candidate") for index in (0, 1)}  # fmt: skip
    assert len(keys) == 16
    assert extract.request_key(dict(reversed(body.items())), "score", 0) == extract.request_key(body, "score", 0)


def test_extraction_by_our_own_sampler_batches_the_workers(monkeypatch):
    local = extract.LocalModel(str(TINY_BASE), "float32", "cpu", 8)
    problems = load_problems(ROOT / "data/tiny/test.jsonl")[:6]
    sizes, plain = [], rollout.generate

    def counting(model, prompts, **settings):
        sizes.append(len(prompts))
        return plain(model, prompts, **settings)

    monkeypatch.setattr(rollout, "generate", counting)
    settings = extract.Settings("tiny", 0.0, 0.0, 1.0, 32, 0, {})
    answers, gate = {}, threading.Barrier(6)

    def ask(problem):
        body = extract.request_body(settings, "solution", 0, guided_messages(problem.problem, problem.strategy))
        gate.wait()
        answers[problem.id] = local.ask(body, threading.Event(), None)

    threads = [threading.Thread(target=ask, args=(problem,)) for problem in problems]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(sizes) == 6 and len(sizes) < 6
    with MathWorker() as worker:  # greedy and guided, the tiny base is always right
        assert all(is_correct(answers[p.id].text, p.answer, worker) for p in problems)
    for problem in problems:
        prompt = encode_chat(local.tokenizer, guided_messages(problem.problem, problem.strategy))
        answer = answers[problem.id]
        assert answer.usage["prompt_tokens"] == len(prompt) and answer.finish == "stop"
        assert 0 < answer.usage["completion_tokens"] <= 32
    with pytest.raises(extract.RowFailed, match="fills the context"):
        local.ask({"messages": auto_messages("add " * 2000), "temperature": 0.0}, threading.Event(), None)


def test_extraction_by_our_own_sampler_runs_from_the_command_line(tmp_path, capsys):
    data, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    with data.open("w") as stream:
        for line in (ROOT / "data/tiny/test.jsonl").read_text().splitlines()[:2]:
            row = json.loads(line)
            stream.write(json.dumps({name: row[name] for name in ("id", "problem", "answer")}) + "\n")
    flags = ["--data", str(data), "--local", str(TINY_BASE), "--out", str(out), "--dtype", "float32", "--quiet"]
    # The tiny base knows no other prompts than its own: its rows must fail one by one, with their reasons.
    assert extract.main([*flags, "--device", "cpu", "--max_tokens", "16"]) == extract.ROWS_FAILED
    assert capsys.readouterr().err.count("failed: ") == 2
    assert journal_records(out, "run")[0]["endpoint"] == f"local: {TINY_BASE}"
