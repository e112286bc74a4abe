"""Evaluation on one and many ranks, and its command."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from functools import partial
from pathlib import Path

import pytest
import torch

import eval as grading
import parallel
import rollout
from eval import summarise
from grader import MathWorker
from model import ModelConfig, build_model
from rollout import Trajectory
from tests.common import CPU, ROOT, TINY_BASE, _eval_file, _eval_row, on_ranks, run_script, tiny_rows, write_rows
from tools import benchmark as stats


def test_eval_script_writes_what_it_prints(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", tiny_rows(6))
    out = tmp_path / "result.json"
    done = run_script("eval.py", "--model", TINY_BASE, "--data", data, "--n", 4, "--out", out)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())["files"][str(data)]
    assert figures["n"] == 4 and figures["problems"] == 6 and 0 <= figures["accuracy"] <= figures["pass_at_n"] <= 1
    assert f"avg@4 {100 * figures['accuracy']:.1f}" in done.stdout and "pass@4" in done.stdout and "truncated" in done.stdout


def test_summarise_by_hand():
    correct = [[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]
    length = [[10, 20, 30, 40], [10, 10, 10, 10], [5, 5, 5, 5]]
    truncated = [[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]]
    figures = summarise(correct, length, truncated)
    # means 1/2, 1, 0: variance ((0)^2 + (1/2)^2 + (1/2)^2) / 2 = 1/4, so 0.5 / sqrt(3)
    assert figures["accuracy"] == pytest.approx(0.5)
    assert figures["standard_error"] == pytest.approx(0.5 / 3**0.5)
    assert figures["pass_at_n"] == pytest.approx(2 / 3)
    assert figures["truncation"] == pytest.approx(3 / 12)
    assert figures["tokens"] == pytest.approx((100 + 40 + 20) / 12)
    assert (figures["problems"], figures["n"]) == (3, 4)
    assert summarise([[True]], [[3]], [[False]])["standard_error"] is None


@pytest.mark.parametrize(
    "tables",
    [([], [], []), ([[]], [[]], [[]]), ([[1], [1, 0]], [[1], [1, 1]], [[0], [0, 0]]), ([[1]], [[1, 2]], [[0]])],
)
def test_summarise_refuses_ragged_lists(tables):
    with pytest.raises(ValueError, match="lists"):
        summarise(*tables)


def _eval_tokenizer():
    """One token a character; enough of a tokenizer for encode_chat and decode. Id 0 ends a response."""
    return types.SimpleNamespace(
        chat_template="yes",
        apply_chat_template=lambda messages, **_: [ord(c) for c in messages[0]["content"]],
        decode=lambda ids, skip_special_tokens: "".join(chr(i) for i in ids if i or not skip_special_tokens),
    )


def _eval_scripted(monkeypatch, script, calls):
    """Put a sampler in place of generate: `script` gives the responses to a prompt, and "~" at the end says cut off."""

    def sample(model, prompts, *, n, seed, on_row, **settings):
        calls.append({"prompts": prompts, "n": n, "seed": seed} | settings)
        groups = []
        for p, prompt in enumerate(prompts):
            texts = script("".join(map(chr, prompt)))[:n]
            ids = [[ord(c) for c in text.rstrip("~")] + [0] * (not text.endswith("~")) for text in texts]
            groups.append([Trajectory(prompt, r, [0.0] * len(r), r[-1] == 0, p) for r in ids])
        for row, member in [(row, i) for group in groups for i, row in enumerate(group)][::-1]:  # in whatever order they end
            on_row(row, member)
        return groups

    monkeypatch.setattr(rollout, "generate", sample)
    config = types.SimpleNamespace(eos_ids=(0,), max_position_embeddings=4000)
    return types.SimpleNamespace(config=config)


def _eval_problems(count, strategy=None):
    return [grading.Problem(f"r{i}", f"What is {i} + 0?", str(i), None, strategy) for i in range(count)]


EVAL_SETTINGS = dict(n=2, max_new_tokens=50, temperature=0.6, top_p=0.95, seed=3)


def _evaluated(model, problems, **settings):
    """One rank's evaluation as the command makes it: figures with a vote, and the "responses" they are of."""
    records = grading.sample_records(model, _eval_tokenizer(), problems, vote=True, **settings)
    return grading.figures(records, voted=True) | {"responses": records}


def test_evaluate_grades_what_was_sampled(monkeypatch, eval_worker):
    def script(prompt):  # problem 0: both right, one of them cut; 1: one right; 2: none
        return [["\\boxed{0}", "\\boxed{0} an~"], ["\\boxed{1}", "\\boxed{2}"], ["no", "\\boxed{2~"]][int(prompt[8])]

    calls = []
    model = _eval_scripted(monkeypatch, script, calls)
    problems = _eval_problems(3)
    result = _evaluated(model, problems, **EVAL_SETTINGS, worker=eval_worker, max_rows=4)
    assert result["accuracy"] == pytest.approx(0.5) and result["pass_at_n"] == pytest.approx(2 / 3)
    assert result["truncation"] == pytest.approx(2 / 6)
    assert result["tokens"] == pytest.approx((10 + 12 + 10 + 10 + 3 + 8) / 6)  # the end token counts, the cut has none
    assert [r["id"] for r in result["responses"]] == ["r0", "r1", "r2"]
    sample = {"text": "\\boxed{1}", "answer": "1", "correct": True, "truncated": False, "timed_out": False, "length": 10}
    assert result["responses"][1]["samples"][0] == sample
    assert [r["majority"] for r in result["responses"]] == [0, 0, None]  # a tie goes to the first; without an answer no vote
    assert result["maj_at_n"] == pytest.approx(2 / 3) and result["correct"] == {"r0": 2, "r1": 1, "r2": 0}
    result["responses"][1]["majority"] = 1  # had the vote gone to the wrong answer
    assert grading.figures(result["responses"], voted=True)["maj_at_n"] == pytest.approx(1 / 3)
    assert [(len(call["prompts"]), call["max_rows"]) for call in calls] == [(3, 4)]
    assert calls[0]["temperature"] == 0.6 and calls[0]["top_p"] == 0.95 and calls[0]["eos_ids"] == (0,)
    assert calls[0]["max_new_tokens"] == 50 and calls[0]["n"] == 2


def test_evaluate_seeds_follow_the_problem_not_the_batch(monkeypatch, eval_worker):
    def seeds(problems, max_rows, **changes):
        calls = []
        model = _eval_scripted(monkeypatch, lambda prompt: ["x", "x"], calls)
        settings = EVAL_SETTINGS | changes
        _evaluated(model, problems, **settings, worker=eval_worker, max_rows=max_rows)
        return [seed for call in calls for seed in call["seed"]]

    problems = _eval_problems(5)
    assert seeds(problems, 1) == seeds(problems, 3)
    assert seeds(problems, 8)[2:] == seeds(problems[2:], 8)  # a second rank's share keeps its seeds
    assert len(set(seeds(problems, 8) + seeds(problems, 8, seed=4))) == 10


def test_evaluate_samples_its_share_and_has_the_figures_of_all(monkeypatch, eval_worker):
    """As each of three ranks, of which the last has no problem; the records come back as the ranks had them."""

    def script(prompt):
        return [["\\boxed{0}", "\\boxed{0}"], ["\\boxed{1}", "no"]][int(prompt[8])]

    model, problems = _eval_scripted(monkeypatch, script, []), _eval_problems(2)
    settings = dict(EVAL_SETTINGS, worker=eval_worker)
    records = {problem.id: grading.sample_records(model, _eval_tokenizer(), [problem], **settings) for problem in problems}
    brought, began = [], []
    monkeypatch.setattr(grading, "all_gather", lambda mine: brought.append(mine) or [[], records["r1"], records["r0"]])
    for rank in range(3):
        monkeypatch.setattr(parallel, "world", lambda rank=rank: (rank, 3))
        ragged = lambda work: began.append(1) or work()  # noqa: E731
        result = grading.evaluate(model, _eval_tokenizer(), problems, ragged=ragged, **settings)
        assert list(result["correct"].items()) == [("r0", 2), ("r1", 1)] and result["accuracy"] == 0.75
    assert [[record["id"] for record in mine] for mine in brought] == [["r0"], ["r1"], []] and len(began) == 3
    assert [record["majority"] for mine in brought for record in mine] == [None, None]  # nobody asked for a vote


def test_evaluate_guided(monkeypatch, eval_worker):
    calls = []
    model = _eval_scripted(monkeypatch, lambda prompt: ["\\boxed{0}"] * 2, calls)
    guided = _eval_problems(1, grading.Strategy("sum of two", "Add.", ("Add them.",)))
    _evaluated(model, guided, **EVAL_SETTINGS, worker=eval_worker, guided=True)
    _evaluated(model, guided, **EVAL_SETTINGS, worker=eval_worker)
    texts = ["".join(map(chr, call["prompts"][0])) for call in calls]
    assert "sum of two" in texts[0] and "sum of two" not in texts[1]
    with pytest.raises(ValueError, match="no strategy, the first is 'r0'"):
        _evaluated(model, _eval_problems(2), **EVAL_SETTINGS, worker=eval_worker, guided=True)
    assert len(calls) == 2


def test_evaluate_refuses_before_sampling(monkeypatch, eval_worker):
    calls = []
    model = _eval_scripted(monkeypatch, lambda prompt: ["x"] * 2, calls)
    with pytest.raises(ValueError, match="no problems"):
        _evaluated(model, [], **EVAL_SETTINGS, worker=eval_worker)
    model.config.max_position_embeddings = 20
    with pytest.raises(ValueError, match="'r0': its prompt of .* fills the context of 20"):
        _evaluated(model, _eval_problems(1), **EVAL_SETTINGS, worker=eval_worker)
    assert calls == []


def test_evaluate_with_a_real_model(eval_worker):
    raw = dict(
        model_type="llama", vocab_size=128, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, rms_norm_eps=1e-5, max_position_embeddings=100, eos_token_id=0, rope_theta=1e4,
        tie_word_embeddings=True,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    config = ModelConfig.from_dict(raw)
    model = build_model(config, generator=generator, dtype=torch.float32, device=torch.device("cpu"))
    args = dict(EVAL_SETTINGS, temperature=1.0, top_p=1.0, worker=eval_worker)
    problems = _eval_problems(3)
    one, two = (_evaluated(model, problems, **args, max_rows=b) for b in (1, 6))
    assert one == two != _evaluated(model, problems, **(args | {"seed": 4}))
    room = 100 - len(grading.encode_chat(_eval_tokenizer(), grading.auto_messages(problems[0].problem)))
    assert 1 < room < 50  # so the context ends a response before max_new_tokens does
    samples = [sample for row in one["responses"] for sample in row["samples"]]
    assert len(samples) == 6 and all(sample["length"] == room for sample in samples if sample["truncated"])
    assert one["truncation"] == sum(sample["truncated"] for sample in samples) / 6


def _eval_command(monkeypatch, tmp_path, *extra):
    calls = []
    model = _eval_scripted(monkeypatch, lambda prompt: ["\\boxed{1}", "\\boxed{1}"], calls)

    def load(name, *, dtype, device):
        calls.append(("load", name, dtype, device))
        return model, _eval_tokenizer()

    monkeypatch.setattr(grading, "load_model", load)
    monkeypatch.setattr(grading, "model_identity", lambda name: (name, "0" * 64))
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", "some/tiny", "--n", "2", "--device", "cpu", *extra]
    return calls, arguments


def test_command_line(monkeypatch, tmp_path, capsys):
    calls, arguments = _eval_command(monkeypatch, tmp_path)
    path = _eval_file(tmp_path, _eval_row(1), _eval_row(2), _eval_row(3))
    results = grading.main([*arguments, "--data", str(path), "--limit", "2", "--seed", "5"])
    assert calls[0] == ("load", "some/tiny", torch.float32, CPU)
    out = capsys.readouterr().out
    assert f"{path}: avg@2 50.0 ± 50.0  pass@2 50.0  maj@2 50.0  truncated 0.0 %  tokens 10  problems 2" in out
    assert "results in eval-tiny.json, responses in eval-tiny-responses.jsonl" in out
    written = json.loads((tmp_path / "eval-tiny.json").read_text())
    assert written == results
    assert written["config"]["temperature"] == 0.6 and written["config"]["top_p"] == 0.95
    assert written["config"]["seed"] == 5 and written["versions"]["math-verify"]
    assert written["files"][str(path)]["accuracy"] == 0.5 and "responses" not in written["files"][str(path)]
    assert len((tmp_path / "eval-tiny-responses.jsonl").read_text().splitlines()) == 2
    with pytest.raises(ValueError, match="already there"):  # and the first results stay
        grading.main([*arguments, "--data", str(path)])
    assert len([call for call in calls if isinstance(call, tuple)]) == 1


def test_command_line_checks_all_data_before_the_model(monkeypatch, tmp_path):
    calls, arguments = _eval_command(monkeypatch, tmp_path)
    good = _eval_file(tmp_path, _eval_row(1))
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    with pytest.raises(ValueError, match="bad.jsonl:1: field 'id' is missing"):
        grading.main([*arguments, "--data", str(good), str(bad)])
    assert calls == [] and not (tmp_path / "eval-tiny.json").exists()


@pytest.mark.parametrize("extra", [["--temprature", "1"], ["--temp", "1"], ["--n", "two"], ["--dtype", "int8"], ["stray"]])
def test_command_line_refuses_unknown_flags(extra, monkeypatch, tmp_path, capsys):
    _, arguments = _eval_command(monkeypatch, tmp_path)
    with pytest.raises(SystemExit) as error:
        grading.main([*arguments, "--data", "x.jsonl", *extra] if extra != ["stray"] else ["stray", *arguments])
    assert error.value.code == 2


def test_command_line_defaults():
    args = grading.build_parser().parse_args(["--model", "m", "--data", "d"])
    assert (args.n, args.temperature, args.top_p, args.max_new_tokens, args.seed) == (None, 0.6, 0.95, None, 0)
    assert (args.guided, args.both, args.limit, args.dtype, args.device) == (False, False, None, "float32", "auto")
    with pytest.raises(ValueError, match="--n must be at least 1, got 0"):
        grading.main(["--model", "m", "--data", "d", "--n", "0"])


def _eval_benchmarks(tmp_path, *names):
    folder = tmp_path / "bench"
    folder.mkdir()
    for i, name in enumerate(names):
        rows = [{"id": f"{name}-{j}", "problem": f"What is {j} + {i}?", "answer": "1"} for j in range(2)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_benchmarks_have_the_papers_settings_and_others_small_ones(monkeypatch, tmp_path):
    calls, arguments = _eval_command(monkeypatch, tmp_path)
    del arguments[2:4]  # --n 2
    monkeypatch.setattr(grading, "figures", lambda records, **_: {})  # the scripted sampler has two responses, not 32
    folder = _eval_benchmarks(tmp_path, "math500", "amc23", "olympiad", "aime24", "aime25", "minerva")
    own = _eval_file(tmp_path, _eval_row(1))
    with MathWorker() as worker:
        def settings(*flags):
            args = grading.build_parser().parse_args([*arguments, *map(str, flags)])
            return [(Path(p.file).stem, p.n, p.max_new_tokens) for p in grading.read_parts(args, worker)]

        papers = [("math500", 4), ("amc23", 32), ("olympiad", 4), ("aime24", 32), ("aime25", 32), ("minerva", 4)]
        assert settings("--benchmarks", folder) == [(name, n, 32_768) for name, n in papers]
        assert settings("--data", own) == [(own.stem, 1, 2048)]
        assert settings("--data", own, "--benchmarks", folder)[:2] == [(own.stem, 1, 2048), ("math500", 4, 32_768)]
        assert {s[1:] for s in settings("--benchmarks", folder, "--n", 4, "--max_new_tokens", 9)} == {(4, 9)}
        per_file = settings("--data", own, "--benchmarks", folder, "--n", 1, 2, 3, 4, 5, 6, 7)
        assert [n for _, n, _ in per_file] == [1, 2, 3, 4, 5, 6, 7]
        for flags, message in (
            (["--data", own, "--n", 1, 2], "--n has 2 numbers for 1 files"),
            (["--data", own, own], "is given twice"),
            (["--benchmarks", tmp_path / "none"], "none: no folder with math500.jsonl"),
            (["--data", own, "--both"], "1 problems have no strategy, the first is 'r1'"),
            (["--data", own, "--guided"], "1 problems have no strategy"),
        ):
            with pytest.raises(ValueError, match=message):
                settings(*flags)
        (folder / "mine.jsonl").write_text((folder / "amc23.jsonl").read_text())
        with pytest.raises(ValueError, match="mine.jsonl is none of math500, .* with --data"):
            settings("--benchmarks", folder)
    assert calls == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model m", "--model needs problems"),
        ("--compare a b --n 4", "--n has no meaning with --compare"),
        ("--compare a b --data x", "--data has no meaning"),
        ("--table a --guided", "--guided has no meaning with --table"),
        ("--model m --data d --n 4 0", "--n must be at least 1, got 0"),
        ("--model m --data d --seed -1", "--seed must not be negative, got -1"),
        ("--model m --data d --timeout 0", "--timeout must be positive and finite, got 0.0"),
        ("--model m --data d --temperature nan", "--temperature must be finite and not negative, got nan"),
        ("--model m --data d --top_p 0", "--top_p must be above 0 and at most 1, got 0.0"),
    ],
)
def test_command_line_refuses_flags_without_effect(arguments, message):
    with pytest.raises(ValueError, match=message):
        grading.main(arguments.split())


@pytest.mark.parametrize(
    "arguments", ["--data d", "--model m --compare a b", "--model m --data d --both --guided", "--compare a"]
)
def test_command_line_takes_one_thing_at_a_time(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        grading.main(arguments.split())
    assert error.value.code == 2


def _eval_both_rows(tmp_path, count=3):
    strategy = {"type": "sum", "strategy": "Add.", "steps": ["Add."]}
    return _eval_file(tmp_path, *(_eval_row(i, strategy=strategy) for i in range(1, 1 + count)))


def test_both_groups_in_one_run(monkeypatch, tmp_path, capsys):
    _, arguments = _eval_command(monkeypatch, tmp_path, "--both")
    data = _eval_both_rows(tmp_path)
    answers = [json.loads(line)["answer"] for line in data.read_text().splitlines()]
    assert answers == ["1", "2", "3"]

    def script(prompt):  # alone: 1 of 2, 0 of 2, 2 of 2 right; guided: 2, 2, 1
        which = [json.loads(line)["problem"] in prompt for line in data.read_text().splitlines()].index(True)
        right, wrong = f"\\boxed{{{which + 1}}}", "\\boxed{99}"
        counts = (2, 2, 1) if "Add." in prompt else (1, 0, 2)
        return [right] * counts[which] + [wrong] * (2 - counts[which])

    model = _eval_scripted(monkeypatch, script, [])
    monkeypatch.setattr(grading, "load_model", lambda name, *, dtype, device: (model, _eval_tokenizer()))
    results = grading.main([*arguments, "--data", str(data)])
    part = results["files"][str(data)]
    assert part["accuracy"] == pytest.approx(3 / 6) and part["guided"]["accuracy"] == pytest.approx(5 / 6)
    assert list(part["correct"].values()) == [1, 0, 2] and list(part["guided"]["correct"].values()) == [2, 2, 1]
    overall = part["guidance"]["overall"]
    assert (overall["helps"], overall["hurts"], overall["same"]) == pytest.approx((2 / 3, 1 / 3, 0))
    # 0.5 * 0.6 / 0.6; 0.8 at 0 -> 1; 0 at 1 -> 0.5
    assert overall["alpha"] == pytest.approx((0.5 + 0.8 + 0) / 3, abs=1e-6)
    assert list(part["guidance"]["families"]) == ["sum"]
    out = capsys.readouterr().out
    assert f"{data} guided: avg@2 83.3" in out and "  guidance: p_auto 50.0  p_guide 83.3  helps 66.7 %" in out
    assert (tmp_path / "eval-tiny-both.json").is_file()
    rows = stats.compare(results, results)
    assert [(row["guided"], row["difference"]) for row in rows] == [(False, 0.0), (True, 0.0)]


def test_an_error_while_grading_ends_the_sampling_at_once(monkeypatch, eval_worker):
    model, sampled = _eval_scripted(monkeypatch, lambda prompt: ["x"], []), []

    def sample(model, prompts, *, n, seed, on_row, **settings):
        for p, prompt in enumerate(prompts):
            sampled.append(p)
            on_row(Trajectory(prompt, [65, 0], [0.0] * 2, True, p), 0)
            time.sleep(0.02)

    def full(record):
        raise OSError("disk full")

    monkeypatch.setattr(rollout, "generate", sample)
    for count in (50, 1):  # and where it is the last response
        with pytest.raises(OSError, match="disk full"):
            settings = EVAL_SETTINGS | {"n": 1}
            _evaluated(model, _eval_problems(count), **settings, worker=eval_worker, on_problem=full)
        assert len(sampled) < 10


def test_a_response_that_the_grader_had_no_time_for_is_marked(monkeypatch):
    worker = types.SimpleNamespace(timeouts=0, timeout_s=5.0, start=lambda: None)

    def equal(gold, prediction, limit_s=None):
        worker.timeouts += 1
        raise TimeoutError

    worker.equal = equal
    responses = ["\\boxed{(x+1)^2}", "\\boxed{x^2+2x+1}", "\\boxed{(1+x)^2}"]
    model = _eval_scripted(monkeypatch, lambda prompt: responses, [])
    problem = grading.Problem("r", "Expand.", "x^2+2x+1", None, None)
    settings = EVAL_SETTINGS | {"n": 3}
    result = _evaluated(model, [problem], **settings, worker=worker)
    (record,) = result["responses"]
    assert [sample["timed_out"] for sample in record["samples"]] == [True, False, True]
    assert [sample["correct"] for sample in record["samples"]] == [False, True, False]
    # the vote's own two lost questions are not samples that were graded wrong
    assert result["grader_timeouts"] == 2 and worker.timeouts > 2 and record["majority"] == 0


def test_a_record_is_on_disk_when_it_is_written(tmp_path):
    part = grading.EvalSet("f.jsonl", False, 1, 9, [grading.Problem("p", "q", "1", None, None)], {"seed": 0})
    out = tmp_path / "x.json"
    (tmp_path / "x-responses-rank3.jsonl").write_bytes(b'{"torn')
    with grading.own_responses(out, 3) as write:
        write(part, {"id": "p", "samples": [{"text": "\ud800 ∞\n\u2028"}], "majority": None})  # half a pair
        (line,) = (tmp_path / "x-responses-rank3.jsonl").read_bytes().splitlines(keepends=True)
        record = json.loads(line)
        assert record["file"] == "f.jsonl" and record["key"] == {"seed": 0} and "∞\n\u2028" in record["samples"][0]["text"]
        assert grading.read_responses([part], out) == {(0, "p"): line[:-1]}
    with grading.own_responses(tmp_path / "y.json", 0):
        pass
    assert not (tmp_path / "y-responses-rank0.jsonl").exists()  # nothing was written, nothing is left


def _eval_kept(monkeypatch, tmp_path, *extra):
    """A finished evaluation of three problems, put back to where its results were not written yet: (arguments, the file of
    responses, calls of the sampler from here on)."""
    calls, arguments = _eval_command(monkeypatch, tmp_path, "--data", str(_eval_both_rows(tmp_path)), *extra)
    grading.main(arguments)
    (tmp_path / "eval-tiny.json").unlink()
    calls.clear()
    return arguments, tmp_path / "eval-tiny-responses.jsonl", calls


def test_what_is_kept_is_not_sampled_again(monkeypatch, tmp_path, capsys):
    arguments, file, calls = _eval_kept(monkeypatch, tmp_path)
    lines = file.read_bytes().splitlines(keepends=True)
    grading.main(arguments)
    assert calls == []  # all there: not even the model is loaded
    whole = (tmp_path / "eval-tiny.json").read_bytes()
    for torn in (b"", lines[1][:-1], lines[1][:40], b"\0" * 30):  # a whole line without its end does not count either
        (tmp_path / "eval-tiny.json").unlink()
        file.unlink()
        (tmp_path / "eval-tiny-responses-rank0.jsonl").write_bytes(lines[2] + torn)
        (tmp_path / "eval-tiny-responses-rank7.jsonl").write_bytes(lines[0] + torn)
        calls.clear()
        capsys.readouterr()
        grading.main(arguments)
        assert "2 of 3 problems are there already, going on" in capsys.readouterr().out
        assert [len(call["prompts"]) for call in calls if isinstance(call, dict)] == [1]
        assert file.read_bytes() == b"".join(lines) and (tmp_path / "eval-tiny.json").read_bytes() == whole
        assert not list(tmp_path.glob("*rank*")) and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--temperature", "1.0"], "responses.jsonl:1: is of another evaluation (temperature 0.6, now 1.0)"),
        (["--top_p", "1.0"], "top_p 0.95, now 1.0"),
        (["--seed", "1"], "seed 0, now 1"),
        (["--max_new_tokens", "9"], "max_new_tokens 2048, now 9"),
        (["--n", "1"], "n 2, now 1"),
        (["--dtype", "bfloat16"], "dtype 'float32', now 'bfloat16'"),
        (["--guided", "--out", "eval-tiny.json"], "guided False, now True"),
        (["--limit", "2"], "responses.jsonl:3: problem 'r3' with 2 samples is not among what is evaluated now"),
    ],
)
def test_responses_of_another_evaluation_are_refused(change, message, monkeypatch, tmp_path):
    arguments, file, calls = _eval_kept(monkeypatch, tmp_path)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=re.escape(message)):
        grading.main([*arguments, *change])
    assert calls == [] and file.read_bytes() == before and not list(tmp_path.glob("*rank*"))


def test_responses_to_another_wording_or_of_another_grader_are_refused(monkeypatch, tmp_path):
    """Prompts are made from strategy.INSTRUCTION, which an ablation may edit; verdicts are math-verify's."""
    arguments, file, calls = _eval_kept(monkeypatch, tmp_path)
    for place, name, value, message in (
        (grading, "auto_messages", lambda problem: [{"role": "user", "content": "Hm: " + problem}], "prompts_sha256 '"),
        (grading.metadata, "version", lambda package: "0.0.1", "grader 'math-verify "),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value)
            with pytest.raises(ValueError, match=f"is of another evaluation .{message}"):
                grading.main(arguments)
    assert calls == []


def test_responses_of_other_data_or_another_model_or_broken_ones_are_refused(monkeypatch, tmp_path):
    arguments, file, calls = _eval_kept(monkeypatch, tmp_path)
    lines = file.read_bytes().splitlines(keepends=True)
    with monkeypatch.context() as patch:
        patch.setattr(grading, "model_identity", lambda name: (name, "1" * 64))
        with pytest.raises(ValueError, match=r"another evaluation \(model_sha256 '0000.*', now '1111"):
            grading.main(arguments)
    for broken, message in (
        ([lines[0], b'{"key": \n', lines[1]], "responses.jsonl:2: not a record of responses"),
        ([lines[0], b"[]\n"], "responses.jsonl:2: not a record"),
        ([lines[0], lines[1], lines[0].replace(b'"length": 10', b'"length": 11', 1)], ":3: a second record of problem 'r1'"),
    ):
        file.write_bytes(b"".join(broken))
        with pytest.raises(ValueError, match=message):
            grading.main(arguments)
    file.write_bytes(b"".join([*lines, lines[0]]))  # the very same line: a merge was cut off between writing and deleting
    grading.main(arguments)
    assert file.read_bytes() == b"".join(lines) and calls == []
    (tmp_path / "eval-tiny.json").unlink()
    data = Path(arguments[arguments.index("--data") + 1])
    data.write_text(data.read_text() + "\n".join([json.dumps(_eval_row(9)), ""]))
    with pytest.raises(ValueError, match="another evaluation .data_sha256"):
        grading.main(arguments)


def test_more_of_a_file_goes_on_from_less_of_it(monkeypatch, tmp_path):
    arguments, file, calls = _eval_kept(monkeypatch, tmp_path, "--limit", "1")
    (line,) = file.read_bytes().splitlines(keepends=True)
    results = grading.main([*arguments, "--limit", "3"])
    assert [len(call["prompts"]) for call in calls if isinstance(call, dict)] == [2]
    assert file.read_bytes().startswith(line) and len(next(iter(results["files"].values()))["correct"]) == 3


def test_two_evaluations_cannot_write_into_one_file(monkeypatch, tmp_path):
    _, arguments = _eval_command(monkeypatch, tmp_path, "--data", str(_eval_both_rows(tmp_path)))
    with grading.own_responses(tmp_path / "eval-tiny.json", 0):
        with pytest.raises(ValueError, match="rank0.jsonl: another process is writing"):
            grading.main(arguments)
    assert not list(tmp_path.glob("*.jsonl.tmp")) and not (tmp_path / "eval-tiny.json").exists()


def test_a_rank_whose_file_is_not_seen_is_missed(monkeypatch, tmp_path):
    arguments, file, _ = _eval_kept(monkeypatch, tmp_path)
    args = grading.build_parser().parse_args(arguments)
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:2]))
    with MathWorker() as worker, pytest.raises(ValueError, match="1 problems are not there, the first is 'r3'; .* 2 ranks"):
        grading.merge_responses(grading.read_parts(args, worker), tmp_path / "eval-tiny.json", 2)


def test_a_model_is_known_by_its_weights_and_not_by_their_size_alone(tmp_path):
    names = {"same": None, "weights": "model.safetensors", "config": "config.json", "tokenizer": "tokenizer.json"}
    found = {}
    for name, changed in names.items():
        folder = shutil.copytree(TINY_BASE, tmp_path / name)
        if changed:
            content = bytearray((folder / changed).read_bytes())
            content[-2] ^= 1
            (folder / changed).write_bytes(content)
        found[name] = grading.model_identity(str(folder))
    assert found["same"] == (str((tmp_path / "same").resolve()), grading.model_identity(str(TINY_BASE))[1])
    assert len({digest for _, digest in found.values()}) == 4
    (tmp_path / "same/checkpoint").mkdir()
    assert grading.model_identity(str(tmp_path / "same")) == found["same"]
    big = tmp_path / "big"  # 64 blocks do not cover all of it, but they reach from the first byte to the last
    shutil.copytree(TINY_BASE, big)
    weights = random.Random(0).randbytes(10 * 2**20)
    digests = set()
    for at in (None, 0, len(weights) // 2, len(weights) - 1):
        content = bytearray(weights)
        if at is not None:
            content[at : at + 2**18] = bytes(len(content[at : at + 2**18]))
            content[at] ^= 1
        (big / "model.safetensors").write_bytes(content)
        digests.add(grading.model_identity(str(big))[1])
    assert len(digests) == 4


def _eval_tiny(out, *extra):
    flags = "--n 3 --both --limit 24 --max_new_tokens 32 --device cpu --seed 1".split()
    data = ROOT / "data/tiny/test.jsonl"
    return [*map(str, ("--model", TINY_BASE, "--data", data, "--out", out)), *flags, *map(str, extra)]


@pytest.fixture(scope="module")
def eval_undisturbed(tmp_path_factory):
    """(the results, the bytes of the responses) of an evaluation in one go: 24 problems, alone and guided."""
    out = tmp_path_factory.mktemp("eval") / "whole.json"
    return grading.main(_eval_tiny(out)), (out.parent / "whole-responses.jsonl").read_bytes()


def test_killed_and_resumed_equals_undisturbed(eval_undisturbed, tmp_path, capsys):
    results, responses = eval_undisturbed
    out, part = tmp_path / "killed.json", tmp_path / "killed-responses-rank0.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "eval.py"), *_eval_tiny(out, "--max_rows", 1)], env=environment, stderr=subprocess.DEVNULL
    )
    limit = time.monotonic() + 60
    while not part.exists() or part.read_bytes().count(b"\n") < 5:
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not out.exists()
    kept = part.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1].splitlines(keepends=True)
    assert 5 <= len(kept) < 48
    with part.open("ab") as stream:
        stream.write(b'{"file": "torn')
    again = grading.main(_eval_tiny(out))
    assert f"{len(kept)} of 48 problems are there already, going on" in capsys.readouterr().out
    whole = (tmp_path / "killed-responses.jsonl").read_bytes()
    assert again["files"] == results["files"] and whole == responses and set(kept) <= set(whole.splitlines(keepends=True))
    assert len(whole.splitlines()) == 48 and not part.exists()


def test_two_ranks_go_on_from_one_and_equal_it(eval_undisturbed, tmp_path):
    results, responses = eval_undisturbed
    lines = responses.splitlines(keepends=True)
    (tmp_path / "two-responses-rank4.jsonl").write_bytes(b"".join(lines[3:8]) + lines[9][:50])
    # behind "--": torchrun would take our --n for the beginning of one of its own flags
    done = on_ranks(2, "--", ROOT / "eval.py", *_eval_tiny(tmp_path / "two.json"))
    written = json.loads((tmp_path / "two.json").read_text())
    assert written["files"] == results["files"] and written["config"]["ranks"] == 2
    assert (tmp_path / "two-responses.jsonl").read_bytes() == responses
    assert done.stdout.count("5 of 48 problems are there already") == 1 and done.stdout.count("results in") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["two-responses.jsonl", "two.json"]


def test_work_left_is_dealt_to_all_ranks(monkeypatch):
    problems = [grading.Problem(str(i), "x" * length, "1", None, None) for i, length in enumerate((90, 5, 7, 6, 1, 60, 3))]
    parts = [grading.EvalSet("a", False, 1, 9, problems[:4], {"a": 1})]
    parts += [grading.EvalSet("b", True, 2, 9, problems[4:], {"b": 1})]
    shares = []
    for rank in range(2):
        monkeypatch.setattr(parallel, "world", lambda rank=rank: (rank, 2))
        shares.append(grading._my_share(parts, {(0, "2"): b"", (1, "4"): b""}))
    done = [(part.file, problem.id) for share in shares for part, own in share for problem in own]
    assert sorted(done) == [("a", "0"), ("a", "1"), ("a", "3"), ("b", "5"), ("b", "6")]
    # costs 90, 5, 6, 2 * 60, 2 * 3: dealt in turn, the two long ones would meet on one rank
    cost = [sum(part.n * len(problem.problem) for part, own in share for problem in own) for share in shares]
    assert sorted(cost) == [90 + 6, 120 + 6 + 5]


def test_ranks_wait_before_anybody_writes_and_before_the_merge(monkeypatch, tmp_path):
    _, arguments = _eval_command(monkeypatch, tmp_path, "--data", str(_eval_both_rows(tmp_path)))
    events = []

    def noted(name, call, *args):
        events.append(name)
        return call(*args)

    for name in ("read_responses", "sample_parts", "merge_responses"):
        monkeypatch.setattr(grading, name, partial(noted, name, getattr(grading, name)))
    monkeypatch.setattr(parallel.Control, "barrier", lambda self: events.append("barrier"))
    grading.main(arguments)
    assert events == ["read_responses", "barrier", "sample_parts", "barrier", "merge_responses", "read_responses"]
