"""Runs of train.py: stages, settings, what is logged, input that is refused."""

import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import checkpoint
import parallel
import sgpo
import train
from eval import figures, load_problems
from model import encode_chat
from strategy import format_strategy
from tests.common import (
    CPU,
    ROOT,
    TIMES,
    TINY_BASE,
    assert_equal_gradients,
    fake_samples,
    make_run,
    read_metrics,
    tiny_rows,
    update,
    weights_of,
    write_rows,
)
from tools import resumable


def hf_loss(model, pairs):
    """Token mean over the responses of all (context, response)."""
    total = 0.0
    for context, response in pairs:
        labels = [-100] * len(context) + response
        total += model(torch.tensor([context + response]), labels=torch.tensor([labels])).loss * len(response)
    return total / sum(len(response) for _, response in pairs)


def test_sft_step_equals_transformers_loss(tmp_path, worker, monkeypatch):
    flags = ["--method", "sft", "--sft_batch", 8, "--sft_epochs", 1, "--sft_guided", 0.5]
    flags += ["--micro_tokens", 200, "--temperature", 0.7]  # several passes; the temperature is RL's
    run, examples = make_run(tmp_path, worker, *flags)
    monkeypatch.setattr(train, "apply_gradients", lambda *_: 0.0)
    train.sft_stage(run, examples[:8], examples[8:13])
    update, validation = read_metrics(run.folder.out)
    gradients = {name: parallel.whole_tensor(p.grad) for name, p in run.model.named_parameters()}
    theirs = AutoModelForCausalLM.from_pretrained(TINY_BASE)
    batch = train.data_order(examples[:8], 0, 8, 0, "sft")
    pairs = [train.sft_pair(example, 0, place, run.cfg) for place, example in batch]
    assert all(response[-1] == run.tokenizer.eos_token_id for _, response in pairs)
    assert {context == example.guided_ids for (context, _), (_, example) in zip(pairs, batch, strict=True)} == {True, False}
    assert pairs != [train.sft_pair(example, 1, place, run.cfg) for place, example in batch]
    loss = hf_loss(theirs, pairs)
    loss.backward()
    assert update["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert_equal_gradients(gradients, {name: p.grad for name, p in theirs.named_parameters() if name in gradients}, 1e-4)
    pairs = [train.sft_pair(example, -1, place, run.cfg) for place, example in enumerate(examples[8:13])]
    want = {"stage": "sft_validation", "epoch": 1.0, "step": 1, "loss": pytest.approx(hf_loss(theirs, pairs).item(), rel=1e-4)}
    assert validation == want  # the update was not made, so it is the loss of the same weights; nor did it add to the gradient


FEW_ROWS = "--method sft --sft_batch 3 --sft_validation 0.25 --sft_epochs 3.5 --sft_learning_rate 1e-2 --sft_warmup_ratio 1"


def test_sft_ends_with_the_weights_of_the_lowest_validation_loss(tmp_path, worker, monkeypatch):
    """A rate that rises to the end makes the loss rise again, on rows that are not trained on."""
    data = write_rows(tmp_path / "rows.jsonl", tiny_rows(12))
    run, examples = make_run(tmp_path, worker, "--data", data, *FEW_ROWS.split())
    for_sft, validation, for_rl, notes = train.split_examples(examples, run.cfg, 256)
    assert (len(for_sft), len(validation), for_rl, notes) == (9, 3, [], [])
    assert not {e.problem.id for e in for_sft} & {e.problem.id for e in validation}
    after, real = [], train.validate_sft

    def keep_weights(run, *given):
        real(run, *given)
        after.append(weights_of(run.model))

    monkeypatch.setattr(train, "validate_sft", keep_weights)
    train.sft_stage(run, for_sft, validation)
    records = [record for record in read_metrics(run.folder.out) if record["stage"] == "sft_validation"]
    assert [(record["epoch"], record["step"]) for record in records] == [(1, 3), (2, 6), (3, 9), (3.5, 11)]
    losses = [record["loss"] for record in records]
    best = losses.index(min(losses))
    assert 0 < best < 3  # neither the first nor the last
    assert (run.progress.best_loss, run.progress.best_step) == (losses[best], 3 * best + 3)
    for number, weights in enumerate(after):
        same = all(torch.equal(a, b) for a, b in zip(weights, weights_of(run.model), strict=True))
        assert same == (number == best)
    # one after each that is the best so far, and at the end: the clock, which is at 10 minutes, asks for none
    names = sorted(path.name for path in (run.folder.out / "checkpoints").iterdir())
    assert names == [f"step-{run.progress.best_step:06d}", "step-000011"]


def test_rl_starts_without_the_moments_of_sft_and_each_stage_is_evaluated(tmp_path, worker, monkeypatch):
    run, examples = make_run(tmp_path, worker)
    seen = []

    def sft_stage(run, *_):
        for parameter in run.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        parallel.apply_gradients(run.model, run.optimizer, 1.0, 1e-3, 1.0)
        seen.append(bool(run.optimizer.state))

    monkeypatch.setattr(train, "sft_stage", sft_stage)
    monkeypatch.setattr(train, "rl_stage", lambda run, *_: seen.append(bool(run.optimizer.state)))
    monkeypatch.setattr(train, "show", lambda *_: None)
    figures = dict(accuracy=0.5, standard_error=0.1, truncation=0.0)
    monkeypatch.setattr(train, "measure", lambda *_, guided: figures | {"guided": guided})
    monkeypatch.setattr(train, "accuracy_table", lambda table: seen.append({when: list(table[when]) for when in table}) or "")
    train.stages(run, examples[:1], [], examples[1:], examples[:1])
    assert seen == [True, False, dict.fromkeys(("base", "after SFT", "after sgpo"), ["alone", "guided"])]


def test_validation_is_a_random_tenth_of_the_rows_for_sft(tmp_path, worker):
    run, examples = make_run(tmp_path, worker, "--sft_fraction", 0.5, "--problems_per_step", 4)

    def held_out(n, **changes):
        _, validation, _, notes = train.split_examples(examples[:n], replace(run.cfg, **changes), 256)
        assert bool(validation) != bool(notes)  # no validation, so its last weights are used
        return {example.problem.id for example in validation}

    assert [len(held_out(n)) for n in (18, 20, 24, 40)] == [0, 1, 1, 2]  # of half of them
    assert held_out(40) == held_out(40, seed=5) != held_out(40, data_seed=5)
    assert held_out(40, method="sft") != {example.problem.id for example in examples[:4]}  # not the first ones
    few = [train.split_examples(examples[:40], replace(run.cfg, problems_per_step=n), 256)[3] for n in (20, 21)]
    assert not few[0] and "20 problems for RL, fewer than --problems_per_step" in few[1][0]


def test_sft_leaves_out_rows_that_are_too_long_and_says_so(tmp_path, worker):
    rows = tiny_rows(30)
    rows[7]["solution"], rows[12]["solution"] = "2 " * 100, "2 " * 300  # the second is beyond the context of 256 too
    data = write_rows(tmp_path / "rows.jsonl", rows)
    run, examples = make_run(tmp_path, worker, "--data", data, "--method", "sft", "--sft_guided", 1)
    for longest, left_out in ((16384, [12]), (150, [7, 12])):
        for_sft, validation, _, notes = train.split_examples(examples, replace(run.cfg, sft_max_tokens=longest), 256)
        kept = {example.problem.id for example in for_sft + validation}
        assert kept == {row["id"] for i, row in enumerate(rows) if i not in left_out}
        assert f"{len(left_out)} of 30 rows longer than {min(longest, 256)} tokens" in notes[0]
    longest = max(len(example.auto_ids + example.solution_ids) for example in examples[:5])
    alone = replace(run.cfg, sft_guided=0.0, sft_max_tokens=longest)
    kept, _, _, notes = train.split_examples(examples[:5], alone, 256)
    assert len(kept) == 5 and "left out" not in notes[0]
    with pytest.raises(ValueError, match="5 of 5 rows longer than"):  # with their strategies they are
        train.split_examples(examples[:5], replace(alone, sft_guided=1.0), 256)


def test_all_rows_that_are_too_long_are_named_at_once(tmp_path, worker):
    rows, held_out = tiny_rows(12), tiny_rows(30)[12:]
    for row in (rows[2], rows[5], rows[9]):
        row["solution"] = "2 " * 300
    held_out[4]["problem"] = "2 " * 300
    data, unseen = write_rows(tmp_path / "rows.jsonl", rows), write_rows(tmp_path / "unseen.jsonl", held_out)
    flags = ["--data", data, "--eval_data", unseen, "--method", "luffy"]
    with pytest.raises(ValueError) as refused:
        make_run(tmp_path / "luffy", worker, *flags)
    names = [f"{data}: {rows[i]['id']!r} needs " for i in (2, 5, 9)] + [f"{unseen}: {held_out[4]['id']!r} needs "]
    lines = str(refused.value).splitlines()
    assert all(line.startswith(name) for line, name in zip(lines, names, strict=True))
    _, plain = make_run(tmp_path / "sft", worker, "--data", data, "--method", "sft")  # which leaves them out
    assert f"needs {len(plain[2].auto_ids + plain[2].solution_ids)} tokens (prompt" in lines[0]


def test_what_is_evaluated_and_shown_has_settings_of_its_own(tmp_path, worker, monkeypatch):
    flags = ["--eval_max_new_tokens", 3, "--eval_n", 2, "--eval_temperature", 0.5, "--eval_top_p", 0.9, "--correct_at", 0.25]
    (run, examples), seen = make_run(tmp_path, worker, *flags), []
    monkeypatch.setattr(train, "evaluate", lambda *_, **settings: seen.append(settings) or {})
    shown = [[("", 0.0)]] * 2  # alone, guided
    monkeypatch.setattr(train, "sample_and_grade", lambda *_, **settings: seen.append(settings) or (None, shown))
    train.measure(run, [], guided=False)
    train.show(run, examples[0], "before")
    assert seen[0]["n"] == 2 and seen[0]["correct_at"] == 0.25
    for settings in seen:
        assert (settings["max_new_tokens"], settings["temperature"], settings["top_p"]) == (3, 0.5, 0.9)


def test_a_template_reaches_every_prompt_of_a_run_and_of_an_evaluation(tmp_path, worker):
    file = tmp_path / "template.json"
    file.write_text(json.dumps({"prompt": "{problem} out?", "guided": "{strategy} {problem} out?"}), encoding="utf-8-sig")
    cfg = train.parse_config(["--template", str(file), "--out", str(tmp_path / "run"), "--device", "cpu"])
    run, examples, held_out = train.prepare(cfg, CPU, worker)
    args = resumable.build_parser().parse_args(["--model", "", "--data", cfg.eval_data, "--both", "--template", str(file)])
    alone, guided = ([*one.prompts.values()] for one in resumable.read_sets(args, worker, run.tokenizer, 512))
    assert [(row.auto_ids, row.guided_ids) for row in held_out] == [*zip(alone, guided, strict=True)]
    for example in (examples[0], held_out[0]):
        problem, strategy = example.problem.problem, format_strategy(example.problem.strategy)
        for ids, text in ((example.auto_ids, f"{problem} out?"), (example.guided_ids, f"{strategy} {problem} out?")):
            assert ids == encode_chat(run.tokenizer, [{"role": "user", "content": text}])


def test_settings_of_an_update_reach_both_stages(tmp_path, worker, monkeypatch):
    flags = ["--max_grad_norm", 0.5, "--weight_decay", 0.2, "--sft_fraction", 0.5, "--data_seed", 5]
    run, examples = make_run(tmp_path, worker, *flags)
    norms, seeds, order = [], [], train.data_order
    for module in (sgpo, train):
        monkeypatch.setattr(module, "apply_gradients", lambda *given: norms.append(given[4]) or 0.0)
    monkeypatch.setattr(train, "data_order", lambda *given: seeds.append(given[3]) or order(*given))
    update(run, fake_samples(run, examples), 0.0)
    train.sft_stage(run, examples[:4], [])
    assert norms == [0.5, 0.5] and seeds == [5] and run.optimizer.defaults["weight_decay"] == 0.2


def test_the_preset_of_a_first_run_gives_way_to_flags_and_to_a_run_that_is_resumed(tmp_path, capsys):
    cfg = train.parse_config(["--model", "x", "--data", "y", "--preset", "first_run", "--problems_per_step", "9"])
    assert (cfg.sft_epochs, cfg.max_new_tokens, cfg.problems_per_step, cfg.eval_limit) == (1, 1024, 9, 64)
    resume = ["--out", str(tmp_path), "--resume"]
    assert train.parse_config([*resume, "--preset", "first_run"]).max_new_tokens == 1024  # settings enough for a new run
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"config": {**vars(cfg), "out": str(tmp_path)}}) + "\n")
    again = [train.parse_config([*resume, *more]) for more in ([], ["--preset", "first_run", "--problems_per_step", "9"])]
    assert again[0] == again[1] == replace(cfg, out=str(tmp_path), resume=True)
    with pytest.raises(SystemExit):  # the run has another number
        train.parse_config([*resume, "--preset", "first_run", "--problems_per_step", "16", "--micro_tokens", "999"])
    said = capsys.readouterr().err
    assert "problems_per_step: 9 there, 16 here" in said and "micro_tokens:" not in said
    assert train.parse_config(["--method", "luffy"]).aggregate == "token"  # as it is logged


@pytest.mark.parametrize("loss, gradient", [(1.0, math.inf), (math.nan, 1.0)])
def test_an_update_that_is_not_finite_is_left_out_and_too_many_end_the_run(loss, gradient, tmp_path, worker):
    run, _ = make_run(tmp_path, worker)
    before = weights_of(run.model)
    for parameter in run.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    run.model.head_weight.grad.to_local()[3, 5] = gradient
    norm = parallel.apply_gradients(run.model, run.optimizer, loss, 1e-3, 1.0)
    assert not parallel.may_step(loss, norm) and not run.optimizer.state
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(run.model), strict=True))
    run.progress.count_skipped(1, allowed=1)
    with pytest.raises(train.NotFinite, match="2 updates .* --max_skipped allows 1"):
        run.progress.count_skipped(1, allowed=1)


def test_minibatches_are_cut_from_the_whole_batch(tmp_path, worker, monkeypatch):
    run, examples = make_run(tmp_path, worker, "--minibatches", 2, "--problems_per_step", 5)
    both = {"not_finite": 1, "solutions": 1, "clip_fraction": 0.1, "policy_kl": 0.2, "overflows": 1, "logprob_error_mean": 0.1}
    first = both | {"loss": 3, "grad_norm": 1, "left_out": 1, "logprob_error_p999": 0.1, "logprob_error": 0.3, "loss_scale": 4}
    second = both | {"loss": 2, "grad_norm": 4, "left_out": 0, "logprob_error_p999": 0.2, "logprob_error": 0.2, "loss_scale": 2}
    first |= {"own_tokens": 30, "entropy": 2, "target_tokens": 0, "kl": 0, "kept": 0, "kept_kl": 0}
    second |= {"own_tokens": 10, "entropy": 6, "target_tokens": 7, "kl": 0.5, "kept": 1, "kept_kl": 0.4}
    places = []

    def update(model, optimizer, settings, samples, learning_rate):
        places.append([sample.place for sample in samples])
        return first if len(places) == 1 else second

    monkeypatch.setattr(sgpo, "update", update)
    metrics = train.rl_step(run, list(enumerate(examples[:5])), 1, 0.0)
    assert places == [[0, 1, 2], [3, 4]]
    want = {"loss": 2.5, "grad_norm": 2.5, "left_out": 0.5}  # means over the updates
    want |= {"own_tokens": 40, "target_tokens": 7, "solutions": 2, "overflows": 2, "skipped": 2}  # sums
    want |= {"entropy": (30 * 2 + 10 * 6) / 40, "clip_fraction": 0.1, "kl": 0.5, "kept": 1.0, "kept_kl": 0.4}  # of tokens
    want |= {"logprob_error_p999": 0.2, "logprob_error": 0.3}  # the largest
    want |= {"first_logprob_error_mean": 0.1, "first_logprob_error_p999": 0.1, "first_logprob_error": 0.3}
    want |= {"loss_scale": 2}  # the last
    assert {name: metrics[name] for name in want} == pytest.approx(want)
    assert run.progress.skipped == 2
    places.clear()
    train.rl_step(run, [(3, examples[3])], 1, 0.0)
    assert places == [[], [3]]  # a rank that has the fourth problem alone


def test_data_order_covers_every_epoch_and_depends_on_the_seed():
    def two_epochs(seed, batch):
        batches = [train.data_order(list(range(7)), step, batch, seed, "rl") for step in range(14 // batch)]
        return [example for batch in batches for _, example in batch]

    order = two_epochs(seed=0, batch=2)
    assert sorted(order[:7]) == sorted(order[7:]) == list(range(7))
    assert order[:7] != order[7:]
    assert order == two_epochs(seed=0, batch=7)
    assert order != two_epochs(seed=1, batch=2)


def test_gradients_are_clipped_by_the_global_norm(tmp_path, worker):
    run, _ = make_run(tmp_path, worker)
    for parameter in run.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    seen = []
    run.optimizer.step = lambda: seen.extend(parallel.whole_tensor(p.grad).square().sum() for p in run.model.parameters())
    norm = parallel.apply_gradients(run.model, run.optimizer, 0.0, 1e-3, 1.0)
    assert norm == pytest.approx(math.sqrt(sum(parameter.numel() for parameter in run.model.parameters())), rel=1e-4)
    assert math.sqrt(sum(seen)) == pytest.approx(1.0, rel=1e-3)
    assert parallel.may_step(0.0, 2.0, skip_above=2.0) and not parallel.may_step(0.0, 2.1, skip_above=2.0)


def test_what_a_run_writes_and_prints(tmp_path, worker, capfd, monkeypatch):
    secrets = {"HF_TOKEN": "hf_canaryOfTheHub", "OPENAI_API_KEY": "sk-canary-of-an-api", "WANDB_API_KEY": "canary-of-a-tracker"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    flags = "--steps 2 --problems_per_step 3 --eval_limit 6 --eval_n 1 --eval_every 1 --minibatches 2 --device cpu".split()
    out = tmp_path / "run"
    train.main([*flags, "--dtype", "bfloat16", "--out", str(out)])
    text = capfd.readouterr().out
    saved = AutoModelForCausalLM.from_pretrained(out / "model").state_dict()
    run, _ = make_run(tmp_path / "other", worker)
    base = [weights.bfloat16() for weights in weights_of(run.model)]
    checkpoint.load_checkpoint(out / "checkpoints/step-000002", run.model, run.optimizer)
    for (name, _), before, now in zip(run.model.named_parameters(), base, weights_of(run.model), strict=True):
        assert torch.equal(saved[name], now.bfloat16()) and not torch.equal(saved[name], before)  # in the dtype it sampled in
    head, *records = read_metrics(out)
    assert head["config"]["delta"] == 1.0 and head["config"]["steps"] == 2 and head["commit"]
    assert [r.get("when", r["stage"]) for r in records] == [*["base"] * 2, "sgpo", "step 1", "sgpo", *["after sgpo"] * 2]
    sample = dict.fromkeys(("correct", "reward", "length", "truncated", "timed_out"), 1)
    names = figures([{"id": "", "samples": [sample]}]).keys()
    assert records[0].keys() == names - {"correct"} | {"stage", "when", "step", "guided"}  # the names of eval.py's results
    assert set(TIMES) < records[2].keys()
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 * (8 + 4)
    for target in (s for s in samples if s["target"]):  # the most reachable of the right ones
        group = [s for s in samples if s["step"] == target["step"] and s["group"] == "guided" and s["reward"]]
        assert target["reach"] == max(s["reach"] for s in group)
    assert "at most 1,152 tokens sampled a step (12 responses a problem) and 192 an evaluation" in text  # 3 * 12 * 32, 6 * 32
    for part in ("reward ", "kept 1.00/1.00", "entropy ", "[before]", "[after]", "held-out accuracy", "after sgpo"):
        assert part in text, part
    with pytest.raises(SystemExit, match="metrics.jsonl is there already"):
        train.main([*flags, "--out", str(out)])
    with pytest.raises(SystemExit) as stopped:
        train.main([*flags, "--model", "no-such-org/no-such-model", "--out", str(tmp_path / "other")])
    said = "".join([text, *capfd.readouterr(), str(stopped.value)]).encode()
    for content in (said, *(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())):
        assert not any(value.encode() in content for value in secrets.values())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), train.CheckpointError("why"), train.RankLost("why")])
def test_what_ends_a_run_is_said_in_a_line(error, monkeypatch):
    monkeypatch.setattr(train, "train", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(SystemExit, match="stopped by Ctrl-C|error: why"):
        train.main([])


def test_ten_steps_of_sgpo_beat_the_base(tmp_path, worker):
    run, examples = make_run(tmp_path, worker, "--eval_n", 2)
    problems = load_problems(run.cfg.eval_data, worker)[:80]
    held_out = train.encode_rows(problems, run.tokenizer, guided=False, file="")
    base = train.measure(run, held_out, guided=False)["accuracy"]
    for step in range(10):
        train.rl_step(run, train.data_order(examples, step, 16, 0, "rl"), step + 1, 3e-4 * min(1, (step + 1) / 3))
    assert train.measure(run, held_out, guided=False)["accuracy"] > base + 0.08  # about 0.14


@pytest.mark.parametrize("flags, message", json.loads((ROOT / "tests/bad_flags.json").read_text()))
def test_bad_flags_fail(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.parse_config(flags)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_defaults_are_the_papers_and_presets_give_way_to_flags():
    cfg = train.parse_config(["--model", "x", "--data", "y"])
    want = dict(group_auto=8, group_guided=4, clip_low=0.2, clip_high=0.28, delta=1.0, alpha_0=0.5, gamma=0.1, alpha_max=0.8)
    want |= dict(eval_temperature=0.6, eval_top_p=0.95, top_p=0.95, temperature=1.0, max_new_tokens=16384, learning_rate=1e-6)
    want |= dict(sft_fraction=1 / 3, sft_epochs=10, sft_batch=64, sft_learning_rate=1e-5, sft_warmup_ratio=0.1)
    want |= dict(sft_validation=0.1, sft_max_tokens=16384, eval_data="", aggregate="sequence", reach="sum")
    assert {name: getattr(cfg, name) for name in want} == want
    assert train.parse_config(["--model", "x"]).data.endswith("data/starter/train.jsonl")
    assert train.parse_config(["--data", "y"]).eval_data == ""  # not the tiny world's
    tiny = train.parse_config(["--learning_rate", "0.5", "--no-eval_guided"])
    assert tiny.learning_rate == 0.5 and tiny.steps == 60 and not tiny.eval_guided and tiny.model.endswith("data/tiny/base")


# changes to three good rows (with null a field is not there; null for all: no file), flags, a part of the message
BAD_INPUT = json.loads((ROOT / "tests/bad_input.json").read_text())


@pytest.mark.parametrize("changes, flags, message", BAD_INPUT)
def test_bad_input_stops_before_any_training(tmp_path, changes, flags, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "rows.jsonl"
    if changes is not None:
        write_rows(path, [{k: v for k, v in row.items() if v is not None} for row in tiny_rows(3, **changes)])
    with pytest.raises(SystemExit) as stopped:
        train.main(["--data", str(path), "--out", str(tmp_path / "run"), *flags.split()])
    assert message in str(stopped.value)
    assert not (tmp_path / "run").exists()  # nothing that the corrected run would trip over
