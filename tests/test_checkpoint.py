"""Checkpoints, resuming, SIGTERM, kills and damage."""

import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import checkpoint
import eval as grading
import parallel
import sgpo
import train
from tests.common import CPU, ROOT, TIMES, TINY_BASE, make_run, read_metrics, run_script, tiny_rows, weights_of, write_rows
from tools import faults


def same_run(a, b):
    """Weights of the model folder and of the last checkpoint bit for bit, metrics but for the times, samples byte for byte."""
    assert (a / "samples.jsonl").read_bytes() == (b / "samples.jsonl").read_bytes()
    assert faults.tensor_file(a / "model/model.safetensors") == faults.tensor_file(b / "model/model.safetensors")
    one, two = (
        [{k: v for k, v in record.items() if k not in TIMES and k != "config"} for record in read_metrics(f)] for f in (a, b)
    )
    assert one == two
    assert [[f.name for f in sorted(folder.iterdir())] for folder in (a, b)] == [
        [".lock", "checkpoints", "metrics.jsonl", "model", "samples.jsonl"]
    ] * 2  # the best weights of SFT are removed
    last = [sorted((f / "checkpoints").iterdir())[-1] for f in (a, b)]
    assert last[0].name == last[1].name
    for file in last[0].glob("*.safetensors"):
        assert faults.tensor_file(file) == faults.tensor_file(last[1] / file.name), file.name


@pytest.mark.parametrize(
    "module, where, call, ends_at",
    [
        (grading, "sample_records", 1, (0, 0)),  # the evaluation of the base model
        (train, "sft_pair", 4, (1, 0)),  # a step of SFT, which is finished
        (train, "validate_sft", 1, (2, 0)),  # its validation
        (checkpoint, "load_checkpoint", 1, (4, 0)),  # its best weights are put back
        (sgpo, "sample_and_grade", 2, (4, 1)),  # sampling, which is given up
        (sgpo, "update", 3, (4, 2)),  # an update, which is finished
        (grading, "sample_records", 6, (4, 2)),  # a periodic evaluation
        (train, "save_model", 1, None),  # too late to be asked: the run ends by itself
    ],
)
def test_sigterm_then_resume_equals_an_uninterrupted_run(
    module, where, call, ends_at, resumed, uninterrupted, tmp_path, monkeypatch, capsys
):
    calls, ended, real = [], [], getattr(module, where)

    def call_and_signal(*arguments, **settings):
        calls.append(where)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        result = real(*arguments, **settings)
        ended.append(where)
        return result

    monkeypatch.setattr(module, where, call_and_signal)
    out = tmp_path / "run"
    train.main([*resumed, "--checkpoint_minutes", "1e9", "--out", str(out)])
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert (len(calls) - len(ended)) == (where in ("sample_records", "sample_and_grade"))  # these are cut short at once
    if ends_at is None:
        assert (out / "model").exists()
        train.main(["--out", str(out), "--resume"])
        assert "is finished" in capsys.readouterr().out
    else:
        assert "SIGTERM: a checkpoint is in" in capsys.readouterr().out and not (out / "model").exists()
        _, state, _ = checkpoint.find_checkpoint(out / "checkpoints")
        assert (state["progress"]["sft_steps"], state["progress"]["rl_steps"]) == ends_at
        with (out / "metrics.jsonl").open("a") as file:
            file.write('{"stage": "sgpo", "a line of a step behind the checkpo')
        torch.manual_seed(99)  # no random number comes from the global generators
        random.seed(99)
        train.main(["--out", str(out), "--resume"])
    same_run(uninterrupted, out)


@pytest.mark.parametrize(
    "where, call, steps",
    [
        ("save_checkpoint", 2, 1),  # the second step's weights would have been kept
        ("save_checkpoint", 3, 1),  # they are, but no checkpoint says so
        ("load_checkpoint", 1, 3),  # the last step would have ended with them
        ("save_checkpoint", 5, 3),  # it has
        ("save_checkpoint", 6, 4),
    ],
)
def test_a_crash_around_the_best_weights_changes_nothing(
    where, call, steps, resumed, uninterrupted, tmp_path, monkeypatch, capsys
):
    class Killed(BaseException):
        pass

    calls, real = [], getattr(checkpoint, where)

    def die(*arguments, **settings):
        calls.append(where)
        if len(calls) == call:
            raise Killed
        return real(*arguments, **settings)

    monkeypatch.setattr(checkpoint, where, die)
    out = tmp_path / "run"
    with pytest.raises(Killed):
        train.main([*resumed, "--checkpoint_minutes", "0", "--out", str(out)])
    monkeypatch.undo()
    capsys.readouterr()
    train.main(["--out", str(out), "--resume"])
    assert f"step-{steps:06d}, {steps} SFT and 0 RL steps" in capsys.readouterr().out
    same_run(uninterrupted, out)


def test_every_checkpoint_that_is_kept_has_the_best_weights_that_it_names(tmp_path, worker):
    run, _ = make_run(tmp_path, worker, "--offload")
    folder, progress, weights = run.folder.out, run.progress, weights_of(run.model)
    for step in range(1, 7):
        progress.sft_steps = step
        if step != 4:
            run.folder.save_best(run.model, step)
            progress.best_step = step
        states = [checkpoint._content(path)["state"] for path in sorted((folder / "checkpoints").glob("step-*"))]
        kept = {path.name for path in (folder / "best").iterdir()}
        assert {f"step-{state['progress']['best_step']:06d}" for state in states} <= kept and len(kept) <= 3
        run.folder.save(run.model, run.optimizer, progress)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.zero_()
    run.folder.load_best(run.model, 6)
    assert all(torch.equal(a, b) for a, b in zip(weights, weights_of(run.model), strict=True))
    file = next((folder / "best/step-000006").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(checkpoint.CheckpointError, match="best/step-000006/.* does not have the digest"):
        run.folder.load_best(run.model, 6)
    with pytest.raises(checkpoint.CheckpointError, match="step-000004"):  # never kept: the newest will not do
        run.folder.load_best(run.model, 4)
    (folder / "model").mkdir()  # as a kill right after the model was there would have left it
    train.train(replace(run.cfg, resume=True), CPU)
    assert not (folder / "best").exists()


@pytest.mark.parametrize("harm", ["flip", "truncate", "missing", "state", "cut state", "no state", "part"])
def test_a_damaged_checkpoint_is_passed_over(harm, stopped, uninterrupted, capsys):
    newest = sorted((stopped / "checkpoints").iterdir())[-1]
    file = sorted(newest.glob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif harm == "truncate":
        file.write_bytes(content[: len(content) // 2])
    elif harm == "missing":
        file.unlink()
    elif harm == "state":
        text = (newest / "state.json").read_text()
        (newest / "state.json").write_text(text.replace('"rl_steps": 3', '"rl_steps": 2'))
    elif harm == "cut state":
        (newest / "state.json").write_bytes((newest / "state.json").read_bytes()[:500] + b"\xff")
    elif harm == "no state":
        (newest / "state.json").unlink()
    else:
        newest.rename(newest.with_suffix(".part"))
    path, state, refused = checkpoint.find_checkpoint(stopped / "checkpoints")
    assert state["progress"]["rl_steps"] == 2 and path.name == "step-000006"
    assert (harm == "part") == (not refused) and all(str(newest) in reason for reason in refused)
    train.main(["--out", str(stopped), "--resume"])
    said = capsys.readouterr().out
    assert "4 SFT and 2 RL steps" in said and ("is damaged and passed over" in said) == (harm != "part")
    same_run(uninterrupted, stopped)
    assert not list(stopped.glob("checkpoints/*.part"))


def test_two_checkpoints_are_kept_and_where_all_are_damaged_the_run_begins_anew(stopped, resumed, uninterrupted, capsys):
    kept = sorted((stopped / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["step-000006", "step-000007"]
    for path in kept:
        next(path.glob("*.safetensors")).unlink()
    train.main([*resumed, "--checkpoint_minutes", "0", "--out", str(stopped), "--resume"])
    assert "nothing to resume: from the start" in capsys.readouterr().out
    same_run(uninterrupted, stopped)


def test_a_disk_that_is_full_leaves_the_older_checkpoints(stopped, tmp_path, worker):
    run, _ = make_run(tmp_path / "other", worker)
    folder = stopped / "checkpoints"
    before = checkpoint.find_checkpoint(folder)[:2]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # a write beyond fails, as it would on a full disk
    try:
        with pytest.raises(checkpoint.CheckpointError, match="rank 0: .*(File too large|Errno 27)"):
            checkpoint.save_checkpoint(folder, "step-000009", run.model, run.optimizer, {}, keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.find_checkpoint(folder)[:2] == before and not (folder / "step-000009").exists()
    checkpoint.save_checkpoint(folder, "step-000009", run.model, run.optimizer, {"a": 1}, keep=2)
    assert checkpoint.find_checkpoint(folder)[1] == {"a": 1}
    assert sorted(path.name for path in folder.iterdir()) == ["step-000007", "step-000009"]


def test_a_checkpoint_from_before_the_first_update_leaves_no_moments(tmp_path, worker):
    run, _ = make_run(tmp_path, worker)
    before = weights_of(run.model)
    path = checkpoint.save_checkpoint(tmp_path, "a", run.model, run.optimizer, {}, keep=2)
    for parameter in run.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    parallel.apply_gradients(run.model, run.optimizer, 0.0, 1e-3, 1.0)
    assert all(run.optimizer.state.values())
    checkpoint.load_checkpoint(path, run.model, run.optimizer)
    assert not any(run.optimizer.state.values())
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(run.model), strict=True))


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


def test_a_checkpoint_is_of_the_data_that_was_read_and_not_of_what_lies_there_later(tmp_path, worker):
    """Nor does it read the files again, or ask git again, at each checkpoint and on each rank."""
    data = write_rows(tmp_path / "rows.jsonl", tiny_rows(4))
    read = hashlib.sha256(data.read_bytes()).hexdigest()
    run, _ = make_run(tmp_path, worker, "--data", data, "--model", TINY_BASE)
    write_rows(data, tiny_rows(5))
    run.folder.save(run.model, run.optimizer, run.progress)
    _, state, _ = checkpoint.find_checkpoint(run.folder.out / "checkpoints")
    assert state["data"] == {"data": read} and state["commit"] == run.folder.origin["commit"] != ""
    again, _ = make_run(tmp_path / "again", worker, "--data", data, "--model", TINY_BASE)
    again.folder.out = run.folder.out
    with pytest.raises(ValueError, match=f"its data differs\n  data: '{read}' there, '"):
        again.folder.resume(again.model, again.optimizer, print)


def test_the_commit_of_a_copy_is_its_own_and_not_that_of_the_repository_around_it(tmp_path):
    def commit_of(folder):
        return run_script("-c", "import checkpoint; print(checkpoint.code_commit())", cwd=folder).stdout.strip()

    git = ["git", "-c", "user.email=a@b", "-c", "user.name=a", "-C", tmp_path]
    (tmp_path / "copy").mkdir()
    for folder in (tmp_path, tmp_path / "copy"):
        shutil.copy(ROOT / "checkpoint.py", folder)
    for words in (["init", "-q"], ["add", "checkpoint.py"], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    assert commit_of(tmp_path) == head[:12] and commit_of(tmp_path / "copy") == "unknown"
    with (tmp_path / "checkpoint.py").open("a") as file:
        file.write("# changed\n")
    assert commit_of(tmp_path) == head[:12] + "+"


def test_resuming_with_other_settings_or_data_is_an_error_that_shows_them(stopped, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main(["--out", str(stopped), "--resume", "--learning_rate", "0.5", "--micro_tokens", "999"])
    said = capsys.readouterr().err
    assert "--learning_rate: 0.0002 there, 0.5 here" in said and "--micro_tokens:" not in said
    path = sorted((stopped / "checkpoints").iterdir())[-1] / "state.json"
    content = json.loads(path.read_text())
    del content["digest"]
    for kind, name, message in (("config", "gamma", "gamma: 0.3 there, 0.1"), ("data", "eval_data", "eval_data: 0.3 there, '")):
        other = json.loads(json.dumps(content))
        other["state"][kind][name] = 0.3
        path.write_text(json.dumps({**other, "digest": checkpoint._digest(other)}))
        with pytest.raises(SystemExit) as error:
            train.main(["--out", str(stopped), "--resume"])
        assert f"its {kind} differs" in str(error.value) and message in str(error.value)
    head, *lines = (stopped / "metrics.jsonl").read_text().splitlines(keepends=True)
    (stopped / "metrics.jsonl").write_text(head.replace('"gamma"', '"gama"') + "".join(lines))
    with pytest.raises(SystemExit):
        train.main(["--out", str(stopped), "--resume"])
    assert "gama: not a setting of both versions" in capsys.readouterr().err
    for flags, message in (
        (["--resume"], "say with --out"),
        (["--keep_checkpoints", "1"], "at least 2"),
        (["--checkpoint_minutes", "nan"], "not be negative"),
    ):
        with pytest.raises(SystemExit):
            train.main(flags)
        assert message in capsys.readouterr().err


def test_two_processes_cannot_train_into_one_folder(stopped, capsys):
    before = (stopped / "metrics.jsonl").read_bytes()
    other = "import sys, checkpoint, pathlib; held = checkpoint.lock(pathlib.Path(sys.argv[1])); "
    other += "print('held' * bool(held), flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", other, stopped], cwd=ROOT, stdin=-1, stdout=-1, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(SystemExit, match="another process is training there"):
            train.main(["--out", str(stopped), "--resume"])
        assert (stopped / "metrics.jsonl").read_bytes() == before
        holder.kill()
    train.main(["--out", str(stopped), "--resume"])  # a lock dies with its holder
    assert (stopped / "model").exists()


def test_without_checkpoints_there_are_none_and_resume_starts_anew(tmp_path, capsys):
    out = tmp_path / "run"
    flags = "--steps 1 --problems_per_step 2 --no-eval_guided --device cpu --checkpoint_minutes inf --resume".split()
    train.main([*flags, "--eval_data", "", "--out", str(out)])
    assert not (out / "checkpoints").exists() and "nothing to resume" in capsys.readouterr().out
    first = read_metrics(out)
    shutil.rmtree(out / "model")
    train.main(["--out", str(out), "--resume"])
    assert len(read_metrics(out)) == len(first) == 2 and (out / "model").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="faults.py looks into /proc")
def test_a_killed_run_and_a_lost_rank_on_two_ranks(tmp_path):
    """The short form of `python faults.py`: the program ends with 1 where anything is not as in an undisturbed run."""
    log = tmp_path / "log.txt"
    flags = "--ranks 2 --kills 1 --also lost-rank --steps 25 --seed 1".split()
    done = run_script("tools/faults.py", "--out", tmp_path / "runs", "--log", log, *flags)
    assert done.returncode == 0, done.stdout
    lines = log.read_text().splitlines()
    assert lines[-1] == "nothing wrong" and sum("the same, bit for bit" in line for line in lines) == 4
    assert any("lost-rank: exit status 1" in line for line in lines)
    # and it can fail: a run that is not the other one
    run = tmp_path / "runs/2-attacked"
    with (run / "samples.jsonl").open("a") as file:
        file.write("{}")
    trial = faults.Trial(run, 2, 25, random.Random(0), (tmp_path / "other.txt").open("w"))
    faults.compare(trial, tmp_path / "runs/2-alone")
    assert trial.faults == 1


def test_no_token_of_the_environment_is_written_anywhere(tmp_path, monkeypatch, capfd):
    secrets = {"HF_TOKEN": "hf_canaryOfTheHub", "OPENAI_API_KEY": "sk-canary-of-an-api",
        "WANDB_API_KEY": "canary-of-a-tracker"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    flags = "--steps 1 --problems_per_step 2 --group_auto 2 --group_guided 2 --eval_limit 2 --eval_n 1 --device cpu"
    train.main([*flags.split(), "--out", str(tmp_path / "run")])
    errors = []
    for wrong in (["--model", "no-such-model"], ["--model", "no-such-org/no-such-model"], ["--data", "no-such-file"]):
        with pytest.raises(SystemExit) as stopped:
            train.main([*flags.split(), *wrong, "--out", str(tmp_path / "other")])
        errors.append(str(stopped.value))
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"metrics.jsonl", "samples.jsonl", "config.json", "model.safetensors",
        "tokenizer.json"} <= {path.name for path in written}
    shown = "".join([*capfd.readouterr(), *errors])
    assert "model saved in" in shown and "no such file" in shown
    for value in secrets.values():
        assert value not in shown and [path for path, content in written.items() if value.encode() in content] == []


def test_no_setting_takes_a_token():
    names = [field.name for field in train.dataclasses.fields(train.Config)]
    names += [action.dest for action in grading.build_parser()._actions]
    assert [name for name in names if re.search("token(?!s)|secret|password|api_?key|auth$", name)] == []
