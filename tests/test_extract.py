"""The extraction of strategies, against a chat server on this machine."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from functools import partial

import pytest

import rollout
import strategy as strategy_module
from data.problems import load_problems, read_row
from grader import MathWorker, is_correct
from model import encode_chat
from strategy import auto_messages, extraction_prompt, guided_messages
from tests.common import ROOT, TINY_BASE, ChatServer, completion, reply_with, write_rows
from tools import extract

CASES = json.loads((ROOT / "tests/extract_cases.json").read_text(encoding="utf-8"))


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
    return f"{head}\nSteps:\n1. Add.\n2. {step}"


def extraction_data(folder, count=3, solutions=True):
    rows = []
    for i in range(count):
        row = {"id": f"row-{i}", "problem": f"What is {20 + i} + {40 + 3 * i}?", "answer": str(60 + 4 * i)}
        rows.append(row | ({"solution": f"The sum is \\boxed{{{row['answer']}}}."} if solutions else {}))
    path = folder / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def extraction_flags(url, data, out, *more):
    flags = ["--data", str(data), "--endpoint", url, "--model", "fake", "--out", str(out)]
    return [*flags, "--retries", "0", "--workers", "1", *more]


def journal_of(out):
    return out.with_name(out.name + ".log.jsonl")


def journal_records(out, kind):
    lines = journal_of(out).read_text(encoding="utf-8").split("\n")[:-1]
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def test_extraction_end_to_end(tmp_path, capsys, monkeypatch, key):
    synced = []  # a line is on the disk before the next question
    monkeypatch.setattr(extract.os, "fsync", synced.append)
    data, out = extraction_data(tmp_path, solutions=False), tmp_path / "strategies.jsonl"
    gate = threading.Barrier(3, timeout=30)  # opens only when the requests of three workers are there together

    def script(handler, body, number):
        number < 3 and gate.wait()
        return fake_model(handler, body, number)

    with ChatServer(script) as server:
        flags = extraction_flags(server.url, data, out, "--price", "2", "30", "--workers", "3")
        assert extract.main(flags) == 0
    printed = capsys.readouterr()
    assert len(server.requests) == 3 * (1 + 5 + 1) == len(synced) - 4  # a line for the run and one for each row too
    assert {(h["authorization"], path) for _, h, path in server.requests} == {(f"Bearer {key}", "/v1/chat/completions")}
    bodies = [json.loads(raw) for raw, _, _ in server.requests]
    asked = [b for b in bodies if "Write down the strategy" in b["messages"][0]["content"]]
    assert Counter((b["seed"], b["temperature"]) for b in asked) == {(seed, 0.6): 3 for seed in range(5)}
    # The scorer sees the three that are left, and neither the one that leaks nor the one that is no strategy.
    scored = [b for b in bodies if "Score the" in b["messages"][0]["content"]]
    assert [re.findall(r"way (\w)", b["messages"][0]["content"]) for b in scored] == [["a", "d", "e"]] * 3
    assert {b["temperature"] for b in scored} == {0.0}
    # 21 answers of 100 + 10 tokens: 2,100 * 2 + 210 * 30 millionths
    assert "21 answers, 2,100 + 210 tokens, cost 0.01" in printed.out
    assert [(p.id, p.answer, p.solution, p.strategy.type) for p in load_problems(out)] == [
        (f"row-{i}", str(60 + 4 * i), f"Adding gives \\boxed{{{60 + 4 * i}}}.", "a sum, way d") for i in range(3)
    ]
    record = {r["row"]: r for r in journal_records(out, "row")}["row-1"]
    assert "the answer 64 in step 2" in record["candidates"][2]["rejected"][1] and record["kept"] == 3
    assert list(record["candidates"][3]["scores"].values()) == [0.9, 1.0, 1.0, 1.0]
    assert key not in printed.out + printed.err + journal_of(out).read_text() + out.read_text()
    assert extract.main(flags) == 0 and len(server.requests) == 21  # once more: nothing is asked
    assert extract.main(["--report", str(out), "--samples", "1", "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    for line in (
        "3 strategies",
        "candidates: 15 of 3 rows",
        "not parsed 3 (20.0 %), leak 3 (20.0 %)",
        "high 3 (100.0 %)",
        "21 answers",
    ):
        assert line in printed, (line, printed)
    assert printed.count("\n--- row-") == 1


def test_the_bands_of_the_report_by_hand(tmp_path, capsys):
    scores = {str(mean): dict.fromkeys(extract.CRITERIA, mean) for mean in (0.8, 0.79, 0.5, 0.49)}
    rows = [(row, [{"rejected": None, "scores": own}]) for row, own in scores.items()]
    records = [{"kind": "row", "row": row, "kept": 0, "candidates": candidates} for row, candidates in rows]
    log = write_rows(tmp_path / "log.jsonl", records)
    extract.report_journal(log, {row for row, _ in rows}, types.SimpleNamespace(price=None))
    assert "quality: high 1 (25.0 %), medium 2 (50.0 %), low 1 (25.0 %)" in capsys.readouterr().out


def test_extraction_killed_and_continued_pays_once(tmp_path, capsys):
    data, workers = extraction_data(tmp_path, 6, solutions=False), 2
    with ChatServer(fake_model) as server:
        assert extract.main(extraction_flags(server.url, data, tmp_path / "whole.jsonl")) == 0
        whole = Counter(raw for raw, _, _ in server.requests)
    out, killed, enough = tmp_path / "killed.jsonl", threading.Event(), threading.Event()

    def script(handler, body, number):
        if number >= 20 and not killed.is_set():
            if number == 20 + workers - 1:
                enough.set()
            killed.wait(10)  # these two are on their way at the kill
        return fake_model(handler, body, number)

    with ChatServer(script) as server:
        flags = extraction_flags(server.url, data, out, "--workers", str(workers))
        process = subprocess.Popen([sys.executable, strategy_module.__file__, *flags], stdout=subprocess.DEVNULL)
        assert enough.wait(60)
        process.kill()
        process.wait()
        killed.set()
        assert not out.exists() and len(server.requests) == 20 + workers
        with journal_of(out).open("ab") as stream:  # the kill may have come while a line was written
            stream.write(b'{"kind": "answer", "key": "abc", "text": "Probl')
        assert extract.main(flags) == 0
        assert "cannot be read, so an answer in it is asked for again" in capsys.readouterr().err
        assert b'"text": "Probl\n' in journal_of(out).read_bytes()  # and the next line is not glued to it
        paid = Counter(raw for raw, _, _ in server.requests)
    assert set(paid) == set(whole) and paid.total() - len(paid) == workers  # what was on its way is asked for again
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and len(load_problems(out)) == 6


def test_extraction_interrupted_keeps_what_is_on_its_way(tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is started with it ignored

    def script(handler, body, number):
        if number == 6:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)  # the program waits for this answer, and asks no more
        return fake_model(handler, body, number)

    data, out = extraction_data(tmp_path, 3), tmp_path / "out.jsonl"
    with ChatServer(script) as server:
        flags = extraction_flags(server.url, data, out)
        with pytest.raises(KeyboardInterrupt):
            extract.main(flags)
        signal.signal(signal.SIGINT, before)
        assert len(server.requests) == len(journal_records(out, "answer")) == 7 and not out.exists()
        assert extract.main(flags) == 0 and len(server.requests) == 18


def test_extraction_refuses_a_journal_that_does_not_fit(tmp_path, monkeypatch):
    data, out = extraction_data(tmp_path, 1), tmp_path / "out.jsonl"
    with ChatServer(fake_model) as server:
        flags = extraction_flags(server.url, data, out)
        assert extract.main(flags) == 0
        for more in (["--temperature", "0.7"], ["--seed", "1"], ["--body", '{"top_k": 3}']):
            with pytest.raises(ValueError, match="no paid answer would fit"):
                extract.main([*flags, *more])
        for name in ("solution_prompt", "extraction_prompt", "scoring_prompt"):
            with monkeypatch.context() as patch, pytest.raises(ValueError, match="no paid answer would fit"):
                patch.setattr(extract, name, lambda *_: "another wording")
                extract.main(flags)
        assert extract.main([*flags, "--candidates", "7"]) == 0  # but more of the same is welcome
        assert len(server.requests) == 6 + 3  # two candidates, and the scores of all
        with extract.open_journal(journal_of(out), journal_records(out, "run")[0]):
            with pytest.raises(ValueError, match="another run is writing it"):
                extract.main(flags)
        journal_of(out).unlink()
        with pytest.raises(ValueError, match="already there, and not made by this program"):
            extract.main(flags)
        assert len(server.requests) == 9


def test_extraction_waits_as_long_as_the_server_says(tmp_path, capsys):
    times, data = [], extraction_data(tmp_path, 1)

    def busy(handler, body, number):
        times.append(time.monotonic())
        return fake_model(handler, body, number) if number else (429, {"Retry-After": "1.2"}, b"quota of the minute")

    with ChatServer(busy) as server:
        flags = extraction_flags(server.url, data, tmp_path / "out.jsonl", "--candidates", "1", "--retries", "1")
        assert extract.main(flags) == 0
    assert len(times) == 3 and 1.2 <= times[1] - times[0]  # else half a second
    assert re.search("waiting 1.2 s .*HTTP 429: .*quota of the minute", capsys.readouterr().err)
    assert 50 < extract.retry_after({"retry-after": formatdate(time.time() + 99, usegmt=True)}, "") <= 99  # on a busy machine
    with ChatServer(reply_with(429, {"error": {"message": "daily limit"}}, Retry_After="86400")) as server:
        with pytest.raises(ValueError, match="daily limit.*; Retry-After: 86400\n.*goes on from there"):
            extract.main(extraction_flags(server.url, data, tmp_path / "other.jsonl", "--retries", "1"))
        assert len(server.requests) == 1


def test_extraction_waits_or_gives_up_by_what_the_first_reply_says(monkeypatch, key):
    waited, got, cases = [], [], CASES["first_replies"]

    def script(handler, body, number):
        if number == body["number"] + sum(isinstance(outcome, float) for *_, outcome in cases[: body["number"]]):
            status, headers, value, _ = cases[body["number"]]
            return reply_with(status, value.encode() if isinstance(value, str) else value, **headers)(handler, body, number)
        return "fine"

    with ChatServer(script) as chat:
        server = extract.Server(extract.build_parser().parse_args(["--endpoint", chat.url, "--retries", "1"]), os.environ)
        monkeypatch.setattr(server.stop, "wait", waited.append)
        for number in range(len(cases)):
            try:
                answer = server.ask({"model": "m", "messages": [{"role": "user", "content": "?"}], "number": number})
                got.append(waited.pop() if answer.text == "fine" else answer.text)
            except (extract.Stop, extract.RowFailed) as error:
                got.append(type(error).__name__)
    wrong = [(case, g) for case, g in zip(cases, got, strict=True) if g != case[3]]
    assert not wrong and not waited


def test_extraction_that_stops_waits_no_longer(tmp_path):
    """One worker waits for ten minutes when another one is told that the key is wrong."""
    waits, start = threading.Event(), time.monotonic()

    def script(handler, body, number):
        if "What is 20" in body["messages"][0]["content"]:
            threading.Timer(0.5, waits.set).start()
            return 429, {"Retry-After": "600"}, b"slow down"
        waits.wait(10)
        return 401, {}, b"wrong key"

    with ChatServer(script) as server:
        flags = extraction_flags(server.url, extraction_data(tmp_path, 2), tmp_path / "out.jsonl", "--retries", "1")
        with pytest.raises(ValueError, match="wrong key"):
            extract.main([*flags, "--workers", "2"])
    assert time.monotonic() - start < 60


def vanish(handler, body, number):
    handler.connection.close()


@pytest.mark.parametrize(
    "misbehave, words",
    [
        (lambda handler, body, number: time.sleep(0.5), "timed out"),
        (vanish, "Server disconnected"),
        (reply_with(500, {"error": {"message": "overloaded"}}), "HTTP 500: .*overloaded"),
        (reply_with(200, b"<html>busy</html>"), "Expecting value"),
        (reply_with(200, {"choices": [], "error": "overloaded"}), "an error in the reply: overloaded"),
        (reply_with(200, [1, 2]), "no message in the reply: .1, 2"),
    ],
)
def test_extraction_fails_the_row_without_an_answer(tmp_path, capsys, misbehave, words):
    out, timeout = tmp_path / "out.jsonl", "0.3" if words == "timed out" else "30"
    with ChatServer(misbehave) as server:
        flags = extraction_flags(server.url, extraction_data(tmp_path, 1), out, "--read_timeout", timeout)
        assert extract.main(flags) == extract.ROWS_FAILED
    assert re.search(f"failed: row-0: no answer: .*{words}", capsys.readouterr().err)
    assert not journal_records(out, "answer") and not out.exists()


@pytest.mark.parametrize("status", [401, 404])
def test_extraction_stops_at_once_if_trying_again_is_useless(tmp_path, capsys, key, status):
    data, out = extraction_data(tmp_path, 5), tmp_path / "out.jsonl"
    with ChatServer(reply_with(status, {"error": {"message": f"no such thing, {key} is wrong"}})) as server:
        with pytest.raises(ValueError) as error:
            extract.main(extraction_flags(server.url, data, out, "--retries", "3"))
        assert len(server.requests) == 1
    assert f"{status}" in str(error.value) and "no such thing, *** is wrong" in str(error.value)
    assert key not in str(error.value) + "".join(capsys.readouterr()) + journal_of(out).read_text()


def test_extraction_goes_on_if_the_server_refuses_one_row(tmp_path, capsys):
    """A content filter, or a problem that is too long: also if the refusal is the first reply of a run."""
    for status in (400, 403):
        refuse = reply_with(status, {"error": {"message": "content filter"}})

        def script(handler, body, number, refuse=refuse):
            return (refuse if "What is 21" in body["messages"][0]["content"] else fake_model)(handler, body, number)

        data, out = extraction_data(tmp_path, 3), tmp_path / f"out{status}.jsonl"
        with ChatServer(script) as server:
            for requests in (6 + 1 + 6, 1):
                before = len(server.requests)
                assert extract.main(extraction_flags(server.url, data, out)) == extract.ROWS_FAILED
                assert len(server.requests) - before == requests
                assert re.search(f"failed: row-1: no answer: HTTP {status}: .*content filter", capsys.readouterr().err)
        assert [row.id for row in load_problems(out)] == ["row-0", "row-2"]
    # the first reply of all, while the others are on their way
    data, out = extraction_data(tmp_path, 3), tmp_path / "together.jsonl"
    gate, refuse = threading.Barrier(3, timeout=30), reply_with(403, {"error": {"message": "content filter"}})

    def slow(handler, body, number):
        number < 3 and gate.wait()
        flagged = "What is 20" in body["messages"][0]["content"]
        number < 3 and not flagged and time.sleep(0.5)
        return (refuse if flagged else fake_model)(handler, body, number)

    with ChatServer(slow) as server:
        assert extract.main(extraction_flags(server.url, data, out, "--workers", "3")) == extract.ROWS_FAILED
    assert [row.id for row in load_problems(out)] == ["row-1", "row-2"]
    # but a server that refuses row after row is not asked by thousands of them; one answer starts the count anew
    data, out = extraction_data(tmp_path, 40), tmp_path / "new.jsonl"
    with ChatServer(lambda h, b, i: (fake_model if i < 6 or i == 16 else refuse)(h, b, i)) as server:
        with pytest.raises(ValueError, match="20 requests in a row failed for good, the last with: .*content filter"):
            extract.main(extraction_flags(server.url, data, out))
        assert len(server.requests) == 17 + 20


def test_extraction_keeps_odd_texts_as_paid_answers(tmp_path):
    """What breaks lines and encodings, and contents that are no text."""
    odd = "Half a pair: \ud83d, a line\u2028separator, a\x00nul, \u4e2d.\nSo \\boxed{60}."
    thoughts = "Let me see. " * 100

    def script(handler, body, number):
        replies = (completion(odd, reasoning_content=thoughts), completion(None), completion(7), completion(" \n"))
        return replies[number] if number < 4 else fake_model(handler, body, number)

    data, out = extraction_data(tmp_path, 1, solutions=False), tmp_path / "out.jsonl"
    with ChatServer(script) as server:
        for _ in range(2):
            assert extract.main(extraction_flags(server.url, data, out)) == 0
        assert len(server.requests) == 7
    assert load_problems(out)[0].solution == odd.replace("\ud83d", "?")
    assert journal_records(out, "answer")[0]["reasoning"] == thoughts
    rejected = [c["rejected"] and c["rejected"][0] for c in journal_records(out, "row")[0]["candidates"]]
    assert rejected == ["not parsed", "not parsed", "not parsed", None, None]


def test_extraction_reads_every_kind_of_content(key):
    replies = [completion(content, finish, **message) for content, message, finish, *_ in CASES["contents"]]
    with ChatServer(lambda handler, body, number: replies[number]) as chat:
        args, got = extract.build_parser().parse_args(["--endpoint", chat.url, "--retries", "0"]), []
        server = extract.Server(args, os.environ)
        for _ in CASES["contents"]:
            answer = server.ask({"model": "m", "messages": [{"role": "user", "content": "?"}]})
            got.append([answer.text, answer.reasoning, answer.fault() and answer.fault()[0]])
    assert got == [case[3:] for case in CASES["contents"]]


def test_extraction_passes_over_foreign_lines_and_refuses_a_foreign_journal(tmp_path, capsys):
    data, out = extraction_data(tmp_path, 1), tmp_path / "out.jsonl"
    foreign = [line + "\n" for line in CASES["foreign"]]
    with ChatServer(fake_model) as server:
        flags = extraction_flags(server.url, data, out)
        assert extract.main(flags) == 0 and len(server.requests) == 6
        journal_of(out).write_text("".join(foreign) + journal_of(out).read_text(), encoding="utf-8")
        for arguments in (flags, ["--report", str(out)]):
            assert extract.main(arguments) == 0
            said = capsys.readouterr().err
            assert all(f"out.jsonl.log.jsonl:{i}: cannot be read" in said for i in range(1, len(foreign) + 1))
        assert len(server.requests) == 6
        journal_of(out).write_text("".join(foreign), encoding="utf-8")
        with pytest.raises(ValueError, match="out.jsonl.log.jsonl: no journal of this program"):
            extract.main(flags)
        assert journal_of(out).read_text(encoding="utf-8") == "".join(foreign)


@pytest.mark.parametrize("case", CASES["rows"], ids=lambda case: case["what"])
def test_extraction_of_one_row(case, eval_worker):
    prompts = []

    def ask(step, index, messages):
        prompts.append((step, messages[0]["content"]))
        reply = case["replies"][step][index]
        reply = {"text": reply, "finish": "stop"} if isinstance(reply, str) else reply
        return extract.Answer(reply["text"], reply["finish"], {}, reply.get("reasoning", ""))

    row, args = read_row(json.dumps(case["row"]).encode()), extract.build_parser().parse_args(["--candidates", "3"])
    record, done = extract.extract_row(row, ask, partial(extract.grade, eval_worker, threading.Lock()), args)
    asked = Counter(step for step, _ in prompts)
    assert asked == {step: len(replies) for step, replies in case["replies"].items()}  # each once, and no more
    assert [step for step, text in prompts if "7 times 9" in text] == case.get("shown", [])
    assert [c["rejected"] and c["rejected"][0] for c in record["candidates"]] == case.get("rejected", [])
    assert (record["failed"], record["kept"]) == (case.get("failed"), case.get("kept"))
    assert (done is None) == ("failed" in case) and (done is None or done.solution == case.get("solution", row.solution))


def test_extraction_takes_thoughts_off():
    assert [extract.without_thoughts(text) for text, _ in CASES["thoughts"]] == [said for _, said in CASES["thoughts"]]


def test_extraction_dry_run_sends_nothing_and_needs_no_package(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    data = extraction_data(tmp_path, 3)
    flags = ["--data", str(data), "--dry_run", "--samples", "1", "--max_tokens", "1000"]
    assert extract.main([*flags, "--price", "0", "100"]) == 0
    printed = capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["problems.jsonl"] and "nothing was sent" in printed
    prompt = extraction_prompt("What is 20 + 40?", "The sum is \\boxed{60}.")[0]["content"]
    assert prompt in printed and "What is 21 + 43?" not in printed
    # 3 rows of 5 candidates and one call that scores them; out 15 * (220 + 20), at most 18 * 1000
    assert "3 rows, 18 requests" in printed
    assert "3,600 out, cost 0.36" in printed and "up to 18,000 tokens out, cost 1.80" in printed
    tokens = int(re.search(r"about ([\d,]+) tokens in", printed)[1].replace(",", ""))
    assert tokens > 15 * (len(prompt) // 4 + 220)  # the scorer reads all five candidates
    with pytest.raises(ValueError, match="pip install openai"):
        extract.main(extraction_flags("https://example.com/v1", extraction_data(tmp_path), tmp_path / "out.jsonl"))


@pytest.mark.parametrize("flag, value, words", CASES["flags"])
def test_extraction_checks_its_flags_first(tmp_path, key, flag, value, words):
    flags = extraction_flags("https://127.0.0.1:1/v1", extraction_data(tmp_path), tmp_path / "out.jsonl", flag, value)
    with pytest.raises(ValueError) as error:
        extract.main(flags)
    assert words in str(error.value) and "pass@" not in str(error.value) and not journal_of(tmp_path / "out.jsonl").exists()


def test_extraction_takes_the_key_from_the_environment_alone(capsys):
    for flag in ("--key", "--api_key", "--key_en"):
        with pytest.raises(SystemExit):
            extract.main([flag, "sk-1"])
    args = extract.build_parser().parse_args(["--endpoint", "https://h/v1", "--key_env", "MINE"])
    assert extract.Server(args, {"MINE": " k\n", "OPENAI_API_KEY": "other"}).client.api_key == "k"


def test_extraction_sends_a_key_over_plain_http_to_this_machine_alone():
    def server(host, key):
        args = extract.build_parser().parse_args(["--endpoint", f"http://{host}:8000/v1"])
        return extract.Server(args, {"OPENAI_API_KEY": key}).client.api_key

    assert [server(host, "k") for host in ("localhost", "127.0.0.1", "[::1]")] == ["k"] * 3
    assert server("far.example", "") == "none"  # without a key any server may be asked
    for host in ("far.example", "localhost.far.example", "127.0.0.2", "[::2]"):
        with pytest.raises(ValueError, match=r"plain http would show \$OPENAI_API_KEY"):
            server(host, "k")


def test_extraction_body_adds_and_removes_fields():
    body = '{"max_tokens": null, "max_completion_tokens": 9, "seed": null}'
    args = extract.build_parser().parse_args(["--model", "m", "--body", body])
    sent = extract.request_body(extract.settings_of(args), "score", 0, auto_messages("p"))
    assert sent == {"model": "m", "messages": auto_messages("p"), "temperature": 0.0, "top_p": 0.95, "max_completion_tokens": 9}
    # greedy scores that could not be read would be the same again
    assert extract.request_body(extract.settings_of(args), "score", 1, auto_messages("p"))["temperature"] == 0.6


def test_extraction_by_our_own_sampler_batches_the_workers(monkeypatch):
    flags = ["--local", str(TINY_BASE), "--dtype", "float32", "--device", "cpu", "--max_tokens", "32", "--temperature", "0"]
    args = extract.build_parser().parse_args(flags)
    local, batches, plain = extract.LocalModel(args), [], rollout.generate

    def counting(model, prompts, **settings):
        batches.append(prompts)
        return plain(model, prompts, **settings)

    def ask(problem):
        messages = guided_messages(problem.problem, problem.strategy)
        return local.ask(extract.request_body(extract.settings_of(args), "solution", 0, messages))

    monkeypatch.setattr(rollout, "generate", counting)
    problems = load_problems(ROOT / "data/tiny/test.jsonl")[:48]
    with ThreadPoolExecutor(6) as pool, MathWorker(60) as worker:
        answers = list(pool.map(ask, problems))
        prompts = [encode_chat(local.tokenizer, guided_messages(p.problem, p.strategy)) for p in problems]
        assert sorted(itertools.chain(*batches)) == sorted(prompts) and len(batches) < 48 and not local.waiting
        # greedy and guided, the tiny base is always right, so each got the answer to its own question
        assert all(is_correct(answer.text, p.answer, worker) for answer, p in zip(answers, problems, strict=True))
    assert all(a.finish == "stop" and 0 < a.usage["completion_tokens"] <= 32 < a.usage["prompt_tokens"] for a in answers)
    with pytest.raises(extract.RowFailed, match="fills the model's context"):
        local.ask({"messages": auto_messages("add " * 2000), "temperature": 0.0})


def test_extraction_by_our_own_sampler_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    data, out = extraction_data(tmp_path, 2, solutions=False), tmp_path / "out.jsonl"
    flags = ["--data", str(data), "--local", str(TINY_BASE), "--out", str(out), "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", ["strategy.py", *flags, "--device", "cpu", "--max_tokens", "16"])
    with pytest.raises(SystemExit) as status:  # the tiny base knows no other prompts than its own: its rows fail one by one
        extract.run()
    assert status.value.code == 3 and capsys.readouterr().err.count("failed: ") == 2 and not out.exists()
    monkeypatch.setattr(sys, "argv", ["strategy.py", *flags, "--seed", "1"])
    with pytest.raises(SystemExit, match="strategy.py: .*no paid answer would fit"):  # a message: exit status 1
        extract.run()
