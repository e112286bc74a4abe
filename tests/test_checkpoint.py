"""Checkpoints, resuming, SIGTERM, kills and damage."""

import dataclasses
import errno
import fcntl
import json
import math
import os
import random
import resource
import shutil
import signal
import types
from datetime import datetime

import pytest
import torch
import transformers

import checkpoint
import eval as grading
import sgpo
import train
from tests.common import TIMES, TINY_BASE, make_run, on_ranks, read_metrics, tiny_rows, weights_of, write_rows
from tools import export, faults


def same_run(a, b):
    """Weights of the model folder and of the last checkpoint bit for bit, metrics but for the times, samples byte for byte."""
    assert (a / "samples.jsonl").read_bytes() == (b / "samples.jsonl").read_bytes()
    assert faults.tensors(a / "model/model.safetensors") == faults.tensors(b / "model/model.safetensors")
    one, two = (
        [{k: v for k, v in record.items() if k not in TIMES and k != "config"} for record in read_metrics(f)] for f in (a, b)
    )
    assert one == two
    assert [[f.name for f in sorted(folder.iterdir())] for folder in (a, b)] == [
        [".lock", "checkpoints", "metrics.jsonl", "model", "samples.jsonl"]
    ] * 2
    last = [sorted((f / "checkpoints").iterdir())[-1] for f in (a, b)]
    assert last[0].name == last[1].name and {f.name for f in last[0].iterdir()} == {f.name for f in last[1].iterdir()}
    for file in last[0].glob("*.safetensors"):
        assert faults.tensors(file) == faults.tensors(last[1] / file.name), file.name


@pytest.mark.parametrize(
    "module, where, call, ends_at",
    [
        (train, "validate_sft", 1, (2, 0)),  # a step of SFT with its validation, which is finished
        (sgpo, "sample_and_grade", 2, (4, 1)),  # sampling, which is cut short
        (sgpo, "update", 3, (4, 2)),  # an update, which is finished
        (grading, "sample_records", 4, (4, 2)),  # an evaluation, which is cut short
        (train, "save_model", 1, None),  # too late: the run ends by itself
    ],
)
def test_a_signal_and_then_resume_equals_an_uninterrupted_run(
    module, where, call, ends_at, resumed, uninterrupted, tmp_path, monkeypatch, capsys
):
    calls, ended, real = [], [], getattr(module, where)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    def call_and_signal(*arguments, **settings):
        calls.append(where)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM if call % 2 else signal.SIGINT)
        result = real(*arguments, **settings)
        ended.append(where)
        return result

    monkeypatch.setattr(module, where, call_and_signal)
    out = tmp_path / "run"
    train.main([*resumed, "--checkpoint_minutes", "1e9", "--out", str(out)])
    monkeypatch.undo()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert len(calls) - len(ended) == (where in ("sample_records", "sample_and_grade"))
    assert ("stopped: a checkpoint is in" in capsys.readouterr().out) == (not (out / "model").exists()) == (ends_at is not None)
    if ends_at is not None:
        _, state, _ = checkpoint.find_checkpoint(out / "checkpoints")
        assert (state["progress"]["sft_steps"], state["progress"]["rl_steps"]) == ends_at
        with (out / "metrics.jsonl").open("a") as file:
            file.write('{"stage": "sgpo", "a line of a step after the checkpo')
        torch.manual_seed(99)  # no random number comes from the global generators
        random.seed(99)
    train.main(["--out", str(out), "--resume"])
    assert ("is finished" in capsys.readouterr().out) == (ends_at is None)
    same_run(uninterrupted, out)


def test_a_finished_run_can_be_made_longer(tmp_path, capsys):
    """One step and then one more are two steps. The old model stays, and so do the settings that were not given again."""
    flags = ["--problems_per_step", "2", "--lr_decay", "constant", "--eval_limit", "2", "--no-eval_guided", "--eval_every", "0"]
    longer, whole = tmp_path / "longer", tmp_path / "whole"
    train.main([*flags, "--steps", "1", "--out", str(longer)])
    before = faults.tensors(longer / "model/model.safetensors")
    train.main([*flags, "--steps", "2", "--out", str(whole)])
    train.main(["--out", str(longer), "--resume"])
    assert "is finished" in capsys.readouterr().out
    train.main(["--out", str(longer), "--resume", "--steps", "2"])
    assert "2 RL steps and no longer 1: the learning rate goes on at 6e-05 (constant)" in capsys.readouterr().out
    assert faults.tensors(longer / "model/model.safetensors") == faults.tensors(whole / "model/model.safetensors")
    assert faults.tensors(longer / "model-000001/model.safetensors") == before
    after = [record["step"] for record in read_metrics(longer) if record.get("when") == "after sgpo"]
    assert after == [1, 2]
    with pytest.raises(SystemExit, match="has done 2 RL steps, and is to have 1"):
        train.main(["--out", str(longer), "--resume", "--steps", "1"])
    assert checkpoint.stored_config(longer)["steps"] == 2  # a run that was refused has changed nothing


def test_a_checkpoint_can_be_written_as_a_model_folder(uninterrupted, tmp_path, monkeypatch):
    run = uninterrupted  # its last checkpoint is of its last step
    export.main([str(run), "--out", str(tmp_path / "last")])
    files = {file.name for file in (run / "model").iterdir()}
    assert {file.name for file in (tmp_path / "last").iterdir()} == files
    for name in files:
        assert (tmp_path / "last" / name).read_bytes() == (run / "model" / name).read_bytes(), name
    export.main([str(run), "--out", str(tmp_path / "first"), "--step", "6"])
    first, last = (faults.tensors(tmp_path / name / "model.safetensors") for name in ("first", "last"))
    assert first.keys() == last.keys() and first != last
    for out, message in ((run, "there already"), (tmp_path / "x", "step-000009")):
        with pytest.raises(SystemExit, match=message):
            export.main([str(run), "--out", str(out), "--step", "9"])
    assert not (tmp_path / "x").exists()
    monkeypatch.setattr(export, "stored_config", lambda run: checkpoint.stored_config(run) | {"dtype": "bfloat16"})
    export.main([str(run), "--out", str(tmp_path / "half")])
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert {weights.dtype for weights in half.parameters()} == {torch.bfloat16}


def test_every_checkpoint_that_is_kept_finds_the_best_weights_that_it_names(tmp_path, worker):
    run, _ = make_run(tmp_path, worker)
    folder, progress, weights = run.folder.out / "checkpoints", run.progress, weights_of(run.model)
    for step in range(1, 8):
        progress.sft_steps, progress.best_step = step, {2: 1, 3: 3, 4: 3, 5: 3}.get(step, step)
        run.folder.save(run.model, run.optimizer, progress)
        states = [checkpoint._content(path)["state"] for path in folder.iterdir()]
        kept = {path.name for path in folder.iterdir()}
        assert {f"step-{state['progress']['best_step']:06d}" for state in states} <= kept and len(kept) <= 3
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.zero_()
    run.folder.load_best(run.model, 6)
    assert all(torch.equal(a, b) for a, b in zip(weights, weights_of(run.model), strict=True))
    file = next((folder / "step-000006").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(checkpoint.CheckpointError, match="step-000006/"):
        run.folder.load_best(run.model, 6)
    with pytest.raises(checkpoint.CheckpointError, match="step-000005"):  # no longer kept: the newest will not do
        run.folder.load_best(run.model, 5)


def test_a_damaged_checkpoint_is_skipped(stopped, uninterrupted, capsys):
    newest = sorted((stopped / "checkpoints").iterdir())[-1]
    tensors, state = sorted(newest.glob("*.safetensors"))[0], newest / "state.json"
    whole, text = tensors.read_bytes(), state.read_bytes()
    flipped = whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :]
    harms = [(state, text.replace(b'"rl_steps": 3', b'"rl_steps": 2')), (state, text[:500] + b"\xff"), (state, None)]
    harms += [(tensors, whole[: len(whole) // 2]), (tensors, None), (tensors, flipped)]
    for file, content in harms:
        before = file.read_bytes()
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        path, found, damaged = checkpoint.find_checkpoint(stopped / "checkpoints")
        assert path.name == "step-000006" and found["progress"]["rl_steps"] == 2
        assert len(damaged) == 1 and str(file) in damaged[0]
        if content is not flipped:
            file.write_bytes(before)
    shutil.copytree(path, path.with_name(checkpoint.PART))  # as a kill while writing would have left it
    (path.with_name(checkpoint.PART) / "shard-00007-model-00001-of-00001.safetensors").write_text("of another number of ranks")
    train.main(["--out", str(stopped), "--resume"])
    said = capsys.readouterr().out
    assert "4 SFT and 2 RL steps" in said and f"a damaged checkpoint is skipped: rank 0: {tensors}" in said
    assert not path.with_name(checkpoint.PART).exists()
    same_run(uninterrupted, stopped)


def test_a_disk_that_is_full_leaves_the_older_checkpoints(stopped, tmp_path, worker):
    run, _ = make_run(tmp_path / "other", worker)
    folder = stopped / "checkpoints"
    before = checkpoint.find_checkpoint(folder)[:2]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # a write beyond fails, as it would on a full disk
    try:
        with pytest.raises(checkpoint.CheckpointError, match="rank 0: .*(File too large|Errno 27)"):
            checkpoint.save_checkpoint(folder, "step-000009", run.model, run.optimizer, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.find_checkpoint(folder)[:2] == before and not (folder / "step-000009").exists()
    checkpoint.save_checkpoint(folder, "step-000009", run.model, run.optimizer, {"a": 1})
    assert checkpoint.find_checkpoint(folder)[1] == {"a": 1}
    assert sorted(path.name for path in folder.iterdir()) == ["step-000007", "step-000009"]
    for file in folder.glob("*/state.json"):
        file.unlink()
    assert checkpoint.find_checkpoint(folder)[:2] == (None, {})  # all are damaged: from the start


def test_a_checkpoint_is_written_when_it_is_due_and_not_again_at_once(tmp_path, worker, monkeypatch):
    run, _ = make_run(tmp_path, worker, "--checkpoint_minutes", 60)
    written = []
    monkeypatch.setattr(checkpoint, "save_checkpoint", lambda folder, name, *_, **__: written.append(name))
    train.after_step(run, always=False)
    assert written == []
    run.folder.saved_at -= 3601
    for _ in range(2):
        train.after_step(run, always=False)
    assert written == ["step-000000"]
    for minutes in (60, math.inf):  # at the end always, but with inf never
        run.cfg = dataclasses.replace(run.cfg, checkpoint_minutes=minutes)
        train.after_step(run, always=True)
    assert len(written) == 2


FOREIGN = "step-000002-backup best-step-000001 step-2 step-0000003 step-000001.old zz .ipynb_checkpoints STEP-000001".split()


def test_only_what_we_made_is_read_and_deleted(tmp_path, worker):
    run, _ = make_run(tmp_path, worker)
    folder = run.folder.out / "checkpoints"

    def save(*steps):
        for run.progress.rl_steps in steps:
            run.folder.save(run.model, run.optimizer, run.progress)

    save(1)
    for name in FOREIGN:
        shutil.copytree(folder / "step-000001", folder / name)
    shutil.copytree(folder / "step-000001", folder / "step-950000")  # a copy of ours, under a name of ours
    for name in ("step-000003", "step-900000", "step-000009.part"):  # of these the first is in the way, the second sorts last
        (folder / name).mkdir()
    (folder / "step-900000/state.json").write_text("[1]")  # another program's
    for name in ("step-000001", "step-000003", "step-900000", "step-000009.part"):
        (folder / name / "notes.txt").write_text(name)
    (folder / "step-800000").symlink_to("nowhere")
    save(2, 3, 4, 800_000)
    moved = [path.name for name in ("step-000003-*", "step-800000-*") for path in folder.glob(name)]
    assert len(moved) == 2
    kept = ["step-000001", "step-000004", "step-800000", "step-900000", "step-950000", "step-000009.part"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(FOREIGN + moved + kept)
    noted = {moved[0], "step-000001", "step-900000", "step-000009.part"}
    assert {path.parent.name for path in folder.glob("*/notes.txt")} == noted
    path, state, damaged = checkpoint.find_checkpoint(folder)
    assert (path.name, state["progress"]["rl_steps"]) == ("step-800000", 800_000)
    for reason, name in zip(damaged, ("step-950000", "step-900000"), strict=True):
        assert f"{name}/state.json" in reason
    path.symlink_to(path.rename(tmp_path / "on a larger disk"))
    save(2)  # the checkpoints of later steps go, but not the one that is a link by now
    assert checkpoint.find_checkpoint(folder)[0] == path and not (folder / "step-000004").exists()


@pytest.mark.parametrize("name", ["samples.jsonl", "model", "model.part", "checkpoints/step-000003"])
def test_a_new_run_does_not_write_over_what_is_there(name, tmp_path):
    (tmp_path / name).mkdir(parents=True)
    folder = checkpoint.RunFolder(tmp_path, {}, {})
    with pytest.raises(checkpoint.CheckpointError, match=f"{name} is there already"):
        folder.open(print, resume=True)
    (tmp_path / name).rename((tmp_path / name).with_name("backup"))
    folder.open(print, resume=False)


def test_a_log_of_another_program_is_neither_read_nor_emptied(tmp_path, capsys):
    for text in ('{"loss": 1}\n', "[1]\n", "epoch 1\n", '{"config": 3}\n'):
        (tmp_path / "metrics.jsonl").write_text(text)
        with pytest.raises(SystemExit):
            train.main(["--out", str(tmp_path), "--steps", "1", "--resume"])
        assert "metrics.jsonl:1: not the settings of a run" in capsys.readouterr().err
        assert (tmp_path / "metrics.jsonl").read_text() == text


@pytest.mark.parametrize("name", "ENOSYS EOPNOTSUPP ENOLCK EINVAL EWOULDBLOCK EACCES".split())
def test_a_disk_without_locks_is_used_and_a_lock_that_is_held_is_not(name, tmp_path, monkeypatch):
    said, error = [], OSError(getattr(errno, name), "as the disk says")
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(error))
    folder = checkpoint.RunFolder(tmp_path, {}, {})
    if name in ("EWOULDBLOCK", "EACCES"):
        with pytest.raises(checkpoint.CheckpointError, match="another process is training there"):
            folder.open(said.append, resume=False)
        return
    folder.open(said.append, resume=False)
    assert len(said) == 1 and "as the disk says" in said[0]


def test_what_is_written_is_strict_json_and_is_read_as_it_was(tmp_path, worker):
    run, _ = make_run(tmp_path, worker, "--delta", "inf", "--checkpoint_minutes", "inf")
    metrics = run.folder.out / "metrics.jsonl"
    run.folder.begin(run.model, run.optimizer, "", print, steps=8, resume=False)
    run.folder.log({"loss": 1.0})
    assert run.folder.begin(run.model, run.optimizer, "", print, steps=8, resume=True).best_step == 0  # from the start
    run.folder.log({"loss": math.nan, "inner": [{"kl": math.inf, "norm": -math.inf}], "text": "NaN", "none": None, "k": 0.1})
    run.folder.save(run.model, run.optimizer, run.progress)
    head, line = metrics.read_text().splitlines()
    for text in (head, line, (run.folder.out / "checkpoints/step-000000/state.json").read_text()):
        json.loads(text, parse_constant=pytest.fail)
    assert line == '{"loss": null, "inner": [{"kl": null, "norm": null}], "text": "NaN", "none": null, "k": 0.1}'
    for first in (head, head.replace(": null", ": Infinity")):  # as older versions wrote it
        metrics.write_text(f"{first}\n")
        cfg = train.parse_config(["--out", str(run.folder.out), "--resume"])
        assert (cfg.delta, cfg.checkpoint_minutes, cfg.alpha_0) == (math.inf, math.inf, 0.5)
    assert run.folder.begin(run.model, run.optimizer, "", print, steps=8, resume=True).best_loss == math.inf


def test_a_resumed_run_has_the_same_data_and_prompts_token_by_token(tmp_path, worker, monkeypatch):
    model, rows, day = tmp_path / "model", tmp_path / "rows.jsonl", types.SimpleNamespace(now=lambda: datetime(2026, 7, 4))
    write_rows(rows, tiny_rows(4))
    shutil.copytree(TINY_BASE, model)
    template, tokenizer = model / "chat_template.jinja", model / "tokenizer.json"
    template.write_text(template.read_text() + "{{ strftime_now('%d') }}")
    monkeypatch.setattr(transformers.utils.chat_template_utils, "datetime", day)

    def made():
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return make_run(tmp_path, worker, "--data", rows, "--model", model, "--eval_data", rows)[0]

    def changes():
        again = made()
        again.folder.out = run.folder.out
        try:
            again.folder.begin(again.model, again.optimizer, "", print, steps=8, resume=True)
        except ValueError as error:
            return [line.strip().split(":")[0] for line in str(error).splitlines()[1:]]

    run = made()
    run.folder.out = (tmp_path / "run").rename(tmp_path / "first")
    run.folder.begin(run.model, run.optimizer, "", print, steps=8, resume=False)
    write_rows(rows, tiny_rows(5))
    run.folder.save(run.model, run.optimizer, run.progress)  # with the digests of what was read, not of what is there by now
    assert changes() == ["data", "eval_data", "prompts", "eval_prompts"]
    write_rows(rows, tiny_rows(4))
    assert changes() is None
    day.now = lambda: datetime(2026, 7, 5)
    assert changes() == ["prompts", "eval_prompts", "template"]
    day.now = lambda: datetime(2026, 7, 4)
    text = tokenizer.read_text()
    tokenizer.write_text(text.replace('"."', '"first"').replace('","', '"."').replace('"first"', '","'))
    assert changes() == ["prompts", "eval_prompts", "tokenizer"]
    tokenizer.write_text(text)
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 0.1}))
    assert changes() == ["model"]


KILLED_RANK = """
import os, signal, sys
import torch.distributed as dist
import parallel, sgpo, train

parallel.start_ranks("cpu", 3)
calls, real = [], sgpo.update

def update(*given):
    calls.append(given)
    if len(calls) == 4 and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*given)

sgpo.update = update
train.main(sys.argv[1:])
"""


def test_a_rank_that_is_killed_ends_the_run_and_one_rank_goes_on(resumed, uninterrupted, tmp_path):
    out, script = tmp_path / "run", tmp_path / "killed.py"
    script.write_text(KILLED_RANK)
    done = on_ranks(2, script, *resumed, "--checkpoint_minutes", 0, "--out", out, check=False)
    assert done.returncode and "rank 0 lost contact" in done.stderr and not (out / "model").exists()
    train.main(["--out", str(out), "--resume"])
    names = ("stage", "step", "loss", "grad_norm", "reward_auto", "accuracy")
    for one, two in zip(read_metrics(uninterrupted)[1:], read_metrics(out)[1:], strict=True):
        want, got = ({name: record.get(name, 0) for name in names} for record in (one, two))
        assert got.pop("stage") == want.pop("stage") and got == pytest.approx(want, rel=2e-3)


