"""Evaluation: samples, verdicts, figures and votes; its command, on one rank and on two, and after a crash."""

import fcntl
import itertools
import json
import shutil
import time
import types

import pytest
import torch

import eval as grading
import parallel
import rollout
from data.examples import encode_prompts
from eval import figures, pass_at_k
from grader import MathWorker
from rollout import Trajectory
from strategy import auto_messages
from tests.common import CPU, ROOT, TINY_BASE, _eval_file, _eval_row, on_ranks, write_rows
from tools import resumable
from tools.benchmark import compare
from tools.resumable import majority


def test_figures_by_hand():
    correct = [[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0]]
    length = [[10, 20, 30, 40], [10, 10, 10, 10], [5, 5, 5, 5], [1, 1, 1, 1]]
    truncated = [[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    records = []
    for i, columns in enumerate(zip(correct, length, truncated, strict=True)):
        samples = [
            dict(correct=c, reward=c / 2, length=t, truncated=cut, timed_out=c) for c, t, cut in zip(*columns, strict=True)
        ]
        records.append({"id": f"r{i}", "samples": samples})
    result = figures(records)
    # means 1/4, 1, 0, 3/4 around 1/2: their variance is (1/16 + 1/4 + 1/4 + 1/16) / 3 = 5/24
    assert (result["accuracy"], result["reward"]) == (0.5, 0.25)
    assert result["standard_error"] == pytest.approx((5 / 24 / 4) ** 0.5)
    # pass@2: 1 - C(3,2)/C(4,2) = 1/2, then 1, 0, 1
    assert result["pass_at"] == pytest.approx({"1": 0.5, "2": 2.5 / 4, "4": 3 / 4})
    assert (result["pass_at_n"], result["truncation"], result["grader_timeouts"]) == (3 / 4, 3 / 16, 8)
    assert result["tokens"] == pytest.approx((100 + 40 + 20 + 4) / 16) and (result["problems"], result["n"]) == (4, 4)
    assert result["correct"] == {"r0": 1, "r1": 4, "r2": 0, "r3": 3}
    one = figures([{"id": "r", "samples": records[0]["samples"] + records[1]["samples"][:2]}])
    assert one["standard_error"] is None and list(one["pass_at"]) == ["1", "2", "4", "6"]


def test_pass_at_k_equals_counting_all_subsets():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            hits = [any(sample < c for sample in chosen) for chosen in itertools.combinations(range(n), k)]
            assert pass_at_k(n, c, k) == pytest.approx(sum(hits) / len(hits), abs=1e-12)
    assert pass_at_k(2000, 1, 500) == pytest.approx(0.25)  # C(2000, 500) has 487 digits


def test_majority_by_hand(eval_worker):
    for answers, winner in (
        (["8", "7", "7", "8"], 0),  # a tie: the group that was opened first
        (["9", "7", "8", "8", "7"], 1),  # not the first of all, but the first of those with two votes
        ([None, None, "3"], 2),  # one vote is more than none
        ([None, None], None),
        (["0.5", "3", "3", "\\frac12", "1/2"], 0),  # three ways to write a half outvote two threes
    ):
        assert majority(answers, eval_worker) == winner, answers


def _tokenizer():
    """One token a character; enough of a tokenizer for encode_chat and decode. Id 0 ends a response."""
    return types.SimpleNamespace(
        chat_template="yes",
        all_special_ids=[0],
        get_vocab=lambda: {},
        apply_chat_template=lambda messages, **_: [ord(c) for c in messages[0]["content"]],
        encode=lambda text, **_: [ord(c) for c in text],
        decode=lambda ids, skip_special_tokens: "".join(chr(i) for i in ids if i or not skip_special_tokens),
    )


def _scripted(monkeypatch, script, calls):
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
    return types.SimpleNamespace(config=types.SimpleNamespace(eos_ids=(0,), max_position_embeddings=4000))


def _problems(count, strategy=None):
    return [grading.Problem(f"r{i}", f"What is {i} + 0?", str(i), None, strategy) for i in range(count)]


SETTINGS = dict(n=2, max_new_tokens=50, temperature=0.6, top_p=0.95, seed=3)


def _sampled(model, problems, worker, guided=False, **changes):
    prompts = encode_prompts(_tokenizer(), problems, guided, "rows.jsonl")
    return grading.sample_records(model, _tokenizer(), problems, prompts, worker=worker, **SETTINGS | changes)


def test_records_and_their_figures(monkeypatch, eval_worker):
    # problem 0: both right, one of them cut; 1: one right; 2: none
    responses, calls = [["\\boxed{0}", "\\boxed{0} an~"], ["\\boxed{1}", "\\boxed{2}"], ["no", "\\boxed{2~"]], []
    model = _scripted(monkeypatch, lambda prompt: responses[int(prompt[8])], calls)
    records = _sampled(model, _problems(3), eval_worker, max_rows=4)
    sample = {"text": "\\boxed{1}", "answer": "1", "reward": 1.0, "correct": True, "truncated": False}
    sample |= {"timed_out": False, "length": 10}
    assert records[1]["samples"][0] == sample
    result = grading.figures(records)
    assert result["truncation"] == pytest.approx(2 / 6) and result["correct"] == {"r0": 2, "r1": 1, "r2": 0}
    assert result["tokens"] == pytest.approx((10 + 12 + 10 + 10 + 3 + 8) / 6)  # the end token counts, and a cut one has none
    seeds = [rollout.stream_seed("evaluation", 3, f"r{i}") for i in range(3)]  # nothing about the other problems
    assert calls[0].items() >= (SETTINGS | {"max_rows": 4, "seed": seeds}).items()


def test_prompts_alone_and_guided_and_those_that_cannot_be_sampled(monkeypatch, eval_worker):
    calls = []
    model = _scripted(monkeypatch, lambda prompt: ["\\boxed{0}"] * 2, calls)
    problems = _problems(1, resumable.load_problems(ROOT / "data/tiny/test.jsonl", eval_worker)[0].strategy)
    for guided in (True, False):
        _sampled(model, problems, eval_worker, guided=guided)
    texts = ["".join(map(chr, call["prompts"][0])) for call in calls]
    assert problems[0].strategy.type in texts[0] and problems[0].strategy.type not in texts[1]
    with pytest.raises(ValueError, match="rows.jsonl: 2 rows have no strategy to be guided by, the first is 'r0'"):
        _sampled(model, _problems(2), eval_worker, guided=True)
    assert len(calls) == 2


def test_an_error_while_grading_ends_the_sampling_at_once(monkeypatch, eval_worker):
    model, sampled = _scripted(monkeypatch, None, []), []

    def sample(model, prompts, *, on_row, **settings):
        for p, prompt in enumerate(prompts):
            sampled.append(p)
            on_row(Trajectory(prompt, [65, 0], [0.0] * 2, True, p), 0)
            time.sleep(0.02)

    monkeypatch.setattr(rollout, "generate", sample)
    for count in (50, 1):  # and if it is the last response
        with pytest.raises(KeyError, match="disk full"):
            _sampled(model, _problems(count), eval_worker, n=1, on_problem=lambda record: {}["disk full"])
        assert len(sampled) < 10


def test_a_response_that_the_grader_had_no_time_for_is_marked(monkeypatch):
    def equal(gold, prediction, limit_s=None):
        worker.timeouts += 1
        return False

    worker = MathWorker()
    monkeypatch.setattr(worker, "equal", equal)
    model = _scripted(monkeypatch, lambda prompt: ["\\boxed{(x+1)^2}", "\\boxed{x^2+2x+1}", "\\boxed{(1+x)^2}"], [])
    records = _sampled(model, [grading.Problem("r", "Expand.", "x^2+2x+1", None, None)], worker, n=3)
    assert [sample["timed_out"] for sample in records[0]["samples"]] == [True, False, True]
    assert [sample["correct"] for sample in records[0]["samples"]] == [False, True, False]
    assert grading.figures(records)["grader_timeouts"] == worker.timeouts == 2


def _command(monkeypatch, tmp_path, *extra, script=lambda prompt: ["\\boxed{1}", "\\boxed{1}"]):
    """(calls of the sampler and of load_model, arguments) of the command with a scripted model, in tmp_path."""
    calls = []
    model = _scripted(monkeypatch, script, calls)

    def load(name, *, dtype, device):
        calls.append((name, dtype, device))
        return model, _tokenizer()

    monkeypatch.setattr(resumable, "load_model", load)
    monkeypatch.setattr(resumable, "blank_model", lambda folder: (model, _tokenizer()))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir(exist_ok=True)
    return calls, ["--model", "tiny", "--n", "2", "--device", "cpu", *map(str, extra)]


def _rows(tmp_path):
    return _eval_file(tmp_path, *(_eval_row(i, strategy=dict(type="sum", strategy="Add.", steps=["Add."])) for i in (1, 2, 3)))


def test_command_line(monkeypatch, tmp_path, capsys):
    path = _rows(tmp_path)
    script = lambda prompt: ["\\boxed{1}" if "is 1" in prompt else "no answer"] * 2  # noqa: E731
    calls, arguments = _command(monkeypatch, tmp_path, "--data", path, script=script)
    results = grading.main([*arguments, "--limit", "2", "--seed", "5"])
    assert calls[0] == ("tiny", torch.float32, CPU) and len(calls) == 2
    out = capsys.readouterr().out
    assert f"{path}: avg@2 50.0 ± 50.0  pass@2 50.0  maj@2 50.0  truncated 0.0 %  tokens 10  problems 2" in out
    assert json.loads((tmp_path / "eval-tiny.json").read_text()) == results
    assert {"temperature": 0.6, "top_p": 0.95, "seed": 5, "dtype": "float32", "ranks": 1}.items() <= results["config"].items()
    assert results["versions"]["math-verify"] and results["files"][str(path)]["accuracy"] == 0.5
    with pytest.raises(ValueError, match="eval-tiny.json: already there"):  # and the first results stay
        grading.main(arguments)
    (tmp_path / "bad.jsonl").write_text("{}\n")
    for more, message in (("--out no/x.json", "its folder does not exist"), ("bad.jsonl --out new.json", "bad.jsonl:1: field")):
        with pytest.raises(ValueError, match=message):
            grading.main([*arguments, *more.split()])
    assert len(calls) == 2 and not (tmp_path / "new.json").exists()


def test_command_line_refuses():
    for flags in ("compare a b", "both --guided", "temp 1", "n 4 0", "seed -1", "temperature nan", "timeout inf"):
        with pytest.raises(SystemExit, match="2"):
            resumable.build_parser().parse_args(["--model", "m", *f"--{flags}".split()])


def test_both_groups_in_one_run(monkeypatch, tmp_path, capsys):
    def script(prompt):  # alone: 1 of 2, 0 of 2, 0 of 2 right; guided: 2, 2, 0
        which = [f"What is {i} + 0?" in prompt for i in (1, 2, 3)].index(True)
        counts = (2, 2, 0) if "Add." in prompt else (1, 0, 0)
        return [f"\\boxed{{{which + 1}}}"] * counts[which] + ["\\boxed{99}"] * (2 - counts[which])

    data = _rows(tmp_path)
    _, arguments = _command(monkeypatch, tmp_path, "--both", "--data", data, script=script)
    results = grading.main(arguments)
    part = results["files"][str(data)]
    assert list(part["correct"].values()) == [1, 0, 0] and list(part["guided"]["correct"].values()) == [2, 2, 0]
    effect = part["guidance"]
    assert (effect["p_auto"], effect["p_guide"], effect["difference"]) == pytest.approx((1 / 6, 2 / 3, 1 / 2))
    # 0.5 * 0.6 / 0.6; 0.8 at 0 -> 1; 0 without a right guided response, as in training [alg 1]
    assert effect["alpha"] == pytest.approx((0.5 + 0.8 + 0) / 3, abs=1e-6) and effect["low"] < 0.5 < effect["high"]
    assert (tmp_path / "eval-tiny-both.json").is_file()
    assert f"{data} guided: avg@2 66.7" in capsys.readouterr().out
    assert [(row["guided"], row["difference"]) for row in compare(results, results)] == [(False, 0.0), (True, 0.0)]


def test_responses_are_on_disk_when_they_are_graded_and_not_sampled_again(monkeypatch, tmp_path, capsys):
    _, arguments = _command(monkeypatch, tmp_path, "--data", _rows(tmp_path))
    file, text = tmp_path / "eval-tiny-responses/rank0.jsonl", "\ud800 ∞\n\u2028"  # half of a surrogate pair, other line ends

    def write_one(*_, on_problem, **settings):
        on_problem({"id": "r2", "samples": [{"text": text, "answer": None}]})
        (record,) = resumable.read_records(file.parent).values()  # before the next problem
        raise InterruptedError(record["id"] + record["samples"][0]["text"])

    with monkeypatch.context() as patch, pytest.raises(InterruptedError, match=f"r2{text}"):
        patch.setattr(resumable, "sample_records", write_one)
        grading.main(arguments)
    shutil.rmtree(file.parent)
    results = grading.main(arguments)
    lines = file.read_bytes().splitlines(keepends=True)
    for torn in (b"", lines[1][:-2], lines[1][:40], b"\0" * 30):
        (tmp_path / "eval-tiny.json").unlink()
        file.write_bytes(lines[2] + torn)
        (file.parent / "rank7.jsonl").write_bytes(lines[0] + torn)
        calls, _ = _command(monkeypatch, tmp_path)
        capsys.readouterr()
        assert grading.main(arguments) == results and [len(call["prompts"]) for call in calls[1:]] == [1]
        assert "2 of 3 problems are there already, going on" in capsys.readouterr().out
    (tmp_path / "eval-tiny.json").unlink()
    calls, _ = _command(monkeypatch, tmp_path)
    assert grading.main(arguments) == results and calls == []  # all there: the model is not even loaded
    (tmp_path / "eval-tiny.json").unlink()
    file.write_bytes(lines[0])
    (file.parent / "rank7.jsonl").unlink()
    (file.parent / "rank7-copy.jsonl").write_bytes(b"".join(lines))  # the user's, and not read
    with file.open("a") as other, pytest.raises(ValueError, match="another evaluation is writing here"):
        fcntl.flock(other, fcntl.LOCK_EX)
        grading.main(arguments)
    assert calls == []  # before the model is loaded


def test_a_folder_of_somebody_else_is_not_written_into(monkeypatch, tmp_path):
    calls, arguments = _command(monkeypatch, tmp_path, "--data", _rows(tmp_path))
    (tmp_path / "eval-tiny-responses").mkdir()
    (tmp_path / "eval-tiny-responses/rank0.jsonl").write_text('{"rank": 0}\n')
    with pytest.raises(ValueError, match="eval-tiny-responses: holds rank0.jsonl but no settings.json"):
        grading.main(arguments)
    assert [path.name for path in (tmp_path / "eval-tiny-responses").iterdir()] == ["rank0.jsonl"] and calls == []


def test_prompts_that_are_too_long_are_named_together(monkeypatch, tmp_path):
    rows = [_eval_row(i, problem=f"What is {i} + 0?" + " and so on" * 400 * (i > 3)) for i in range(1, 26)]
    long = _rows(tmp_path).rename(tmp_path / "long.jsonl")
    write_rows(long, rows)
    calls, arguments = _command(monkeypatch, tmp_path, "--data", _rows(tmp_path), long)
    with pytest.raises(ValueError) as refused:
        grading.main(arguments)
    *lines, last = str(refused.value).splitlines()
    assert [line.split()[1] for line in lines] == [f"'r{i}'" for i in range(4, 24)] and last == "... and 2 more"
    tokens = len(auto_messages(rows[3]["problem"])[0]["content"]) + 1  # a token each character, and one of a response
    assert f"long.jsonl: 'r4' needs {tokens} tokens" in lines[0] and calls == []


def test_responses_of_another_evaluation_are_refused(monkeypatch, tmp_path):
    data = _rows(tmp_path)
    calls, arguments = _command(monkeypatch, tmp_path, "--data", data)
    for name in ("config.json", "tokenizer.model", "x.safetensors"):
        (tmp_path / "tiny" / name).write_text("1")
    grading.main(arguments)
    (tmp_path / "eval-tiny.json").unlink()
    calls.clear()
    changes = {"--temperature 1.0": "temperature", "--top_p 1.0": "top_p", "--seed 1": "seed", "--dtype bfloat16": "dtype"}
    changes |= {"--max_new_tokens 9": f"{data}: max", "--n 1": f"{data}: n", "--guided --out eval-tiny.json": f"{data} guided"}
    for change, name in changes.items():
        with pytest.raises(ValueError, match=rf"eval-tiny-responses: of another evaluation \({name}.* now "):
            grading.main([*arguments, *change.split()])
    for path in (tmp_path / "tiny").iterdir():  # another model in the same folder
        path.write_text("2")
        with pytest.raises(ValueError, match=r"another evaluation \(model_sha256 '\w+', now"):
            grading.main(arguments)
        path.write_text("1")
    edited = _tokenizer()
    monkeypatch.setattr(resumable, "blank_model", lambda folder: (_scripted(monkeypatch, None, []), edited))
    edited.get_vocab = lambda: {"a": 7}
    with pytest.raises(ValueError, match=r"another evaluation \(tokenizer '\w+', now '\w+'\)"):
        grading.main(arguments)
    vars(edited).update(vars(_tokenizer()))
    edited.apply_chat_template = lambda messages, **_: [ord(c) for c in "Today. " + messages[0]["content"]]
    with pytest.raises(ValueError, match=rf"another evaluation \({data}: prompts '\w+', now '\w+'; template '\w+', now"):
        grading.main(arguments)
    vars(edited).update(vars(_tokenizer()))
    data.write_text(data.read_text() + "\n".join([json.dumps(_eval_row(9)), ""]))
    with pytest.raises(ValueError, match=rf"another evaluation \({data}: sha256"):
        grading.main(arguments)
    assert calls == []


def test_a_rank_that_wrote_elsewhere_is_missed(monkeypatch, tmp_path):
    _, arguments = _command(monkeypatch, tmp_path, "--data", _rows(tmp_path))
    monkeypatch.setattr(parallel, "world", lambda: (0, 2))  # rank 1's part of the work is not done here
    monkeypatch.setattr(parallel.Control, "barrier", lambda self: None)
    with pytest.raises(ValueError, match="2 problems are missing, the first is 'r2'"):
        grading.main(arguments)
    assert not (tmp_path / "eval-tiny.json").exists()


def test_two_ranks_go_on_from_one_and_equal_it(tmp_path):
    flags = ["--model", str(TINY_BASE), "--data", str(ROOT / "data/tiny/test.jsonl")]
    flags += "--n 2 --both --limit 8 --max_new_tokens 32 --device cpu".split()
    results = grading.main([*flags, "--max_rows", "1", "--out", str(tmp_path / "one.json")])
    lines = (tmp_path / "one-responses/rank0.jsonl").read_bytes().splitlines(keepends=True)
    shutil.copytree(tmp_path / "one-responses", tmp_path / "two-responses")
    (tmp_path / "two-responses/rank0.jsonl").write_bytes(b"".join(lines[3:8]) + lines[9][:50])
    done = on_ranks(2, "--", ROOT / "eval.py", *flags, "--out", tmp_path / "two.json")
    written = json.loads((tmp_path / "two.json").read_text())
    assert written["files"] == results["files"] and written["config"]["ranks"] == 2
    assert done.stdout.count("5 of 16 problems are there already") == 1 and done.stdout.count("results in") == 1
    whole = [path.read_bytes().count(b"majority") for path in sorted((tmp_path / "two-responses").glob("rank*"))]
    assert sum(whole) == 16 and whole[1] > 3
