"""Runs of train.py: stages, settings, what is logged, input that is refused."""

import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import parallel
import sgpo
import train
from eval import load_problems, summarise
from model import load_model
from tests.common import (
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
    gradients = []

    def keep(model, *_):
        gradients.append({name: parallel.whole_tensor(p.grad).clone() for name, p in model.named_parameters()})
        return 0.0

    monkeypatch.setattr(train, "apply_gradients", keep)
    train.sft_stage(run, examples[:8], examples[8:13])
    update, validation = read_metrics(run.folder.out)
    theirs = AutoModelForCausalLM.from_pretrained(TINY_BASE)
    batch = train.data_order(examples[:8], 0, 8, 0, "sft")
    pairs = [train.sft_pair(example, 0, place, run.cfg) for place, example in batch]
    assert all(response[-1] == run.tokenizer.eos_token_id for _, response in pairs)
    guided = sum(context == example.guided_ids for (context, _), (_, example) in zip(pairs, batch, strict=True))
    loss = hf_loss(theirs, pairs)
    loss.backward()
    assert pairs == [train.sft_pair(example, 0, place, replace(run.cfg, seed=5)) for place, example in batch]
    assert 0 < guided < 8 and pairs != [train.sft_pair(example, 1, place, run.cfg) for place, example in batch]
    assert update["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert len(gradients) == 1
    want = {name: parameter.grad for name, parameter in theirs.named_parameters() if name in gradients[0]}
    assert_equal_gradients(gradients[0], want, 1e-4)
    pairs = [train.sft_pair(example, -1, place, run.cfg) for place, example in enumerate(examples[8:13])]
    want = {"stage": "sft_validation", "epoch": 1.0, "step": 1, "loss": pytest.approx(hf_loss(theirs, pairs).item(), rel=1e-4)}
    assert validation == want  # the update was not made, so it is the loss of the same weights
    assert all(torch.equal(parallel.whole_tensor(p.grad), gradients[0][name]) for name, p in run.model.named_parameters())


FEW_ROWS = "--method sft --sft_batch 3 --sft_validation 0.25 --sft_epochs 4 --sft_learning_rate 1e-2 --sft_warmup_ratio 1"


def test_sft_ends_with_the_weights_of_the_lowest_validation_loss(tmp_path, worker, monkeypatch):
    """A rate that rises to the end makes the loss rise again, on rows that are not trained on."""
    data = write_rows(tmp_path / "rows.jsonl", tiny_rows(12))
    run, examples = make_run(tmp_path, worker, "--data", data, *FEW_ROWS.split())
    for_sft, validation, for_rl, lines = train.split_examples(examples, run.cfg, 256)
    assert (len(for_sft), len(validation), for_rl, lines) == (9, 3, [], [])
    after, read, real, pair = [], {True: set(), False: set()}, train.validate_sft, train.sft_pair

    def keep_weights(run, *given):
        real(run, *given)
        after.append(weights_of(run.model))

    def keep_ids(example, step, place, cfg):
        read[torch.is_grad_enabled()].add(example.problem.id)
        return pair(example, step, place, cfg)

    monkeypatch.setattr(train, "validate_sft", keep_weights)
    monkeypatch.setattr(train, "sft_pair", keep_ids)
    train.sft_stage(run, for_sft, validation)
    assert len(read[True]) == 9 and len(read[False]) == 3 and not read[True] & read[False]
    records = [record for record in read_metrics(run.folder.out) if record["stage"] == "sft_validation"]
    assert [(record["epoch"], record["step"]) for record in records] == [(1, 3), (2, 6), (3, 9), (4, 12)]
    losses = [record["loss"] for record in records]
    best = losses.index(min(losses))
    assert 0 < best < 3  # neither the first nor the last
    assert (run.progress.best_loss, run.progress.best_step) == (losses[best], 3 * best + 3)
    for number, weights in enumerate(after):
        same = all(torch.equal(a, b) for a, b in zip(weights, weights_of(run.model), strict=True))
        assert same == (number == best)
    with torch.no_grad():
        pairs = [train.sft_pair(example, -1, 0, run.cfg) for example in validation]
        assert train.sft_loss(run, pairs) == pytest.approx(losses[best], rel=1e-6)
    # one after each that is the best so far, and at the end: the clock, which is at 10 minutes, asks for none
    names = sorted(path.name for path in (run.folder.out / "checkpoints").iterdir())
    assert names == [f"step-{run.progress.best_step:06d}", "step-000012"]


def test_half_an_epoch_is_validated_at_its_end(tmp_path, worker):
    run, examples = make_run(tmp_path, worker, "--method", "sft", "--sft_epochs", 0.5, "--sft_batch", 4)
    train.sft_stage(run, examples[:16], examples[16:18])
    records = read_metrics(run.folder.out)
    assert [(record["stage"], record["step"]) for record in records] == [("sft", 1), ("sft", 2), ("sft_validation", 2)]
    assert records[-1]["epoch"] == 0.5


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
    monkeypatch.setattr(train, "measure", lambda *_, guided: {"guided": guided})
    monkeypatch.setattr(train, "accuracy_table", lambda table: seen.append({when: list(table[when]) for when in table}) or "")
    train.stages(run, examples[:1], [], examples[1:], [examples[0].problem])
    assert seen == [True, False, dict.fromkeys(("base", "after SFT", "after sgpo"), ["alone", "guided"])]


def test_validation_is_a_random_tenth_of_the_rows_for_sft(tmp_path, worker):
    run, examples = make_run(tmp_path, worker, "--sft_fraction", 0.5)

    def held_out(n, **changes):
        return {e.problem.id for e in train.split_examples(examples[:n], replace(run.cfg, **changes), 256)[1]}

    assert [len(held_out(n)) for n in (18, 20, 24, 40)] == [0, 1, 1, 2]  # of half of them
    assert held_out(40) == held_out(40, seed=5) != held_out(40, data_seed=5)
    assert held_out(40, method="sft") != {example.problem.id for example in examples[:4]}  # not the first ones


def test_sft_goes_without_rows_that_are_too_long_and_says_so(tmp_path, worker):
    rows = tiny_rows(30)
    rows[7]["solution"], rows[12]["solution"] = "2 " * 100, "2 " * 300  # the second is beyond the context too
    data = write_rows(tmp_path / "rows.jsonl", rows)

    def split(name, *flags):
        run, examples = make_run(tmp_path / name, worker, "--data", data, *flags)
        return train.split_examples(examples, run.cfg, run.model.config.max_position_embeddings)

    def ids(*parts):
        return sorted(example.problem.id for part in parts for example in part)

    for_sft, validation, _, lines = split("context", "--method", "sft")
    assert ids(for_sft, validation) == sorted(row["id"] for row in rows if row is not rows[12]) and len(validation) == 3
    assert lines == [f"left out of the SFT: 1 of 30 rows longer than the context of 256, the first {rows[12]['id']!r}"]
    for_sft, validation, _, lines = split("shorter", "--method", "sft", "--sft_max_tokens", 100)
    assert ids(for_sft, validation) == sorted(row["id"] for row in rows if row not in (rows[7], rows[12]))
    assert lines == [f"left out of the SFT: 2 of 30 rows longer than --sft_max_tokens 100, the first {rows[7]['id']!r}"]
    for seed in range(9):  # the row may be among those of RL, which do not need its solution
        for_sft, _, for_rl, lines = split(f"rl{seed}", "--sft_fraction", 0.5, "--sft_validation", 0, "--data_seed", seed)
        in_rl = rows[12]["id"] in ids(for_rl)
        assert len(for_rl) == 15 and len(for_sft) == 14 + in_rl and any("left out" in line for line in lines) != in_rl
    run, examples = make_run(tmp_path / "guided", worker, "--data", data, "--method", "sft", "--sft_guided", 1)
    longest = max(len(example.auto_ids + example.solution_ids) for example in examples[:5])
    assert len(train.split_examples(examples[:5], replace(run.cfg, sft_guided=0.0, sft_max_tokens=longest), 256)[0]) == 5
    with pytest.raises(ValueError, match="5 of 5 rows longer than"):  # with their strategies they are
        train.split_examples(examples[:5], replace(run.cfg, sft_max_tokens=longest), 256)
    with pytest.raises(ValueError, match="30 of 30 rows longer than --sft_max_tokens 5, the first"):
        split("all", "--method", "sft", "--sft_max_tokens", 5)
    with pytest.raises(ValueError, match=f"{rows[12]['id']!r} needs .* the context holds 256"):
        split("luffy", "--method", "luffy")  # its step needs every solution


def test_without_validation_the_last_weights_count_and_the_start_says_so(tmp_path, capsys):
    flags = "--method sft --sft_batch 3 --sft_epochs 1 --sft_learning_rate 1e-2 --device cpu".split()
    few, data = (write_rows(tmp_path / f"{n}.jsonl", tiny_rows(n)) for n in (9, 12))
    for name, more, words in (
        ("few", ["--data", str(few)], "no SFT validation, the last weights count: 9 rows of the ten it needs\n"),
        ("off", ["--data", str(data), "--sft_validation", "0"], "the last weights count: --sft_validation 0\n"),
    ):
        train.main([*flags, *more, "--out", str(tmp_path / name)])
        assert words in capsys.readouterr().out
        assert {record.get("stage") for record in read_metrics(tmp_path / name)[1:]} == {"sft"}


def test_the_start_says_what_a_step_and_an_evaluation_can_sample():
    def line(method, **changes):
        return train.most_sampled(train.Config(method=method, **changes), 32_768, held_out=128)

    group = "25,165,824 tokens sampled a step (128 problems x (8 + 4) responses x 16,384)"
    assert line("sgpo") == f"at most {group} and 1,048,576 an evaluation"
    assert "14,680,064 tokens sampled a step (128 problems x (7 + 0) responses x 16,384)" in line("luffy")
    assert "(8 + 0) responses x 32,768)" in line("grpo", max_new_tokens=99_999)  # cut to the context
    assert "(128 problems x (8 + 4) responses x 16,384)" in line("hinted")
    assert line("sft", eval_max_new_tokens=10) == "at most 5,120 tokens an evaluation"
    assert line("sft", eval_max_new_tokens=99_999) == "at most 16,777,216 tokens an evaluation"


def test_what_is_evaluated_and_shown_has_settings_of_its_own(tmp_path, worker, monkeypatch):
    flags = ["--eval_max_new_tokens", 3, "--eval_n", 2, "--eval_temperature", 0.5, "--eval_top_p", 0.9]
    run, seen = make_run(tmp_path, worker, *flags)[0], []
    for name in ("evaluate", "show_responses"):
        monkeypatch.setattr(train, name, lambda *_, **settings: seen.append(settings) or {})
    train.measure(run, [], guided=False)
    train.show(run, None, "before")
    assert seen[0]["n"] == 2
    for settings in seen:
        assert (settings["max_new_tokens"], settings["temperature"], settings["top_p"]) == (3, 0.5, 0.9)


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


def test_the_preset_of_a_first_run_gives_way_to_flags_and_to_a_run_that_is_resumed(tmp_path):
    cfg = train.parse_config(["--model", "x", "--data", "y", "--preset", "first_run", "--problems_per_step", "9"])
    assert (cfg.sft_epochs, cfg.max_new_tokens, cfg.problems_per_step) == (1, 1024, 9)
    assert (cfg.eval_limit, cfg.eval_max_new_tokens) == (64, 1024)
    plain = train.parse_config(["--model", "x", "--data", "y"])
    assert (plain.sft_epochs, plain.max_new_tokens, plain.problems_per_step, plain.eval_limit) == (10, 16384, 128, 0)
    resume = ["--out", str(tmp_path), "--resume"]
    fresh = train.parse_config([*resume, "--preset", "first_run"])  # settings enough for a new run
    assert fresh.max_new_tokens == 1024
    record = {"config": {**vars(cfg), "out": str(tmp_path)}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    again = [train.parse_config([*resume, *more]) for more in ([], ["--preset", "first_run", "--problems_per_step", "9"])]
    assert again[0] == again[1] == replace(cfg, out=str(tmp_path), resume=True)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"config": {**vars(plain), "out": str(tmp_path)}}) + "\n")
    with pytest.raises(SystemExit):
        train.parse_config([*resume, "--preset", "first_run"])  # that run was made without it
    assert train.parse_config(["--method", "luffy"]).aggregate == "token"  # as it is logged


@pytest.mark.parametrize("loss, gradient", [(1.0, math.nan), (1.0, math.inf), (math.nan, 1.0), (math.inf, 1.0)])
def test_an_update_that_is_not_finite_is_left_out_and_too_many_end_the_run(loss, gradient, tmp_path, worker):
    run, _ = make_run(tmp_path, worker, "--max_skipped", 1)
    before = weights_of(run.model)

    def apply():
        for parameter in run.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        run.model.head_weight.grad.to_local()[3, 5] = gradient
        norm = parallel.apply_gradients(run.model, run.optimizer, loss, 1e-3, 1.0)
        run.progress.count_skipped(int(not parallel.may_step(loss, norm)), run.cfg.max_skipped, f"now {loss} and {norm}")

    apply()
    assert run.progress.skipped == 1 and not run.optimizer.state
    with pytest.raises(train.NotFinite, match="2 updates were left out .* --max_skipped allows 1"):
        apply()
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(run.model), strict=True))
    loss = gradient = 1.0
    apply()  # and the next one that is finite is made
    moved = before[0] - weights_of(run.model)[0]
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-3), atol=0, rtol=1e-2)  # AdamW takes a first step of this size


def test_gradients_are_clipped_by_the_global_norm(tmp_path, worker):
    run, _ = make_run(tmp_path, worker)
    for parameter in run.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    numel = sum(parameter.numel() for parameter in run.model.parameters())
    seen = {}
    gradients = lambda: (parallel.whole_tensor(p.grad) for p in run.model.parameters())  # noqa: E731
    run.optimizer.step = lambda: seen.update(norm=sum(g.square().sum() for g in gradients()).sqrt().item())
    norm = parallel.apply_gradients(run.model, run.optimizer, 0.0, 1e-3, 1.0)
    assert norm == pytest.approx(math.sqrt(numel), rel=1e-4)
    assert seen["norm"] == pytest.approx(1.0, rel=1e-3)


def test_same_seed_same_run_and_everything_it_writes(tmp_path, capsys):
    flags = [
        "--steps",
        2,
        "--problems_per_step",
        3,
        "--eval_limit",
        6,
        "--eval_every",
        1,
        "--minibatches",
        2,
        "--device",
        "cpu",
    ]

    def go(name, *more):
        train.main([*map(str, flags), "--out", str(tmp_path / name), *map(str, more)])
        return [{k: v for k, v in record.items() if k not in TIMES} for record in read_metrics(tmp_path / name)[1:]]

    first, text = go("a"), capsys.readouterr().out
    assert go("b") == first
    assert go("c", "--seed", 1) != first
    model_a, tokenizer = load_model(str(tmp_path / "a/model"), dtype=torch.float32, device="cpu")
    model_b, _ = load_model(str(tmp_path / "b/model"), dtype=torch.float32, device="cpu")
    base, _ = load_model(str(TINY_BASE), dtype=torch.float32, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(model_a.parameters(), model_b.parameters(), strict=True))
    assert not torch.equal(model_a.head_weight, base.head_weight)
    AutoModelForCausalLM.from_pretrained(tmp_path / "a/model")
    head = read_metrics(tmp_path / "a")[0]
    assert head["config"]["delta"] == 1.0 and head["config"]["steps"] == 2 and head["commit"]
    assert [r["stage"] for r in first] == ["eval", "eval", "sgpo", "eval", "sgpo", "eval", "eval"]
    names = summarise([[True]], [[3]], [[False]]).keys()  # of eval.py's results, and no other ones for the same figures
    assert first[0].keys() == names | {"stage", "when", "step", "guided", "grader_timeouts"}
    samples = [json.loads(line) for line in (tmp_path / "a/samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 * (8 + 4) and sum(s["target"] for s in samples) <= 2
    assert all((s["reach"] is None) == (s["group"] == "auto") for s in samples)
    for target in (s for s in samples if s["target"]):  # the most reachable of the right ones
        assert target["reach"] == max(
            s["reach"] for s in samples if s["step"] == target["step"] and s["group"] == "guided" and s["reward"]
        )
    for part in (
        "reward alone",
        "alpha",
        "KL",
        "kept",
        "entropy",
        "tokens/s",
        "[before]",
        "[after]",
        "held-out accuracy",
        "after sgpo",
    ):
        assert part in text, part
    with pytest.raises(SystemExit, match="holds a run already"):
        go("a")


def test_fifteen_steps_of_sgpo_beat_the_base_and_grpo(tmp_path, worker):
    accuracy = {}
    for method in ("grpo", "sgpo"):
        run, examples = make_run(tmp_path / method, worker, "--method", method)
        held_out = load_problems(run.cfg.eval_data, worker)[:120]
        if not accuracy:
            accuracy["base"] = train.measure(run, held_out, guided=False)["accuracy"]
            assert train.measure(run, held_out, guided=True)["accuracy"] > 0.95
        for step in range(15):
            batch = train.data_order(examples, step, 16, 0, "rl")
            train.rl_step(run, batch, step + 1, 2e-4 * min(1, (step + 1) / 5))
        accuracy[method] = train.measure(run, held_out, guided=False)["accuracy"]
    print(accuracy)
    assert accuracy["sgpo"] > accuracy["base"] + 0.15
    assert accuracy["sgpo"] > accuracy["grpo"] + 0.05


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--delat", "2"], "unrecognized arguments: --delat"),
        (["--meth", "sgpo"], "unrecognized arguments: --meth"),
        (["--method", "luffa"], "invalid choice: 'luffa'"),
        (["--group_auto", "1"], "a group's advantage needs at least 2"),
        (["--micro_tokens", "0"], "must be at least 1"),
        (["--temperature", "nan"], "must be positive and finite"),
        (["--sft_fraction", "1.5"], "must be within 0 and 1"),
        (["--top_p", "0"], "--top_p 0.0: must be above 0 and at most 1"),
        (["--sft_validation", "0.6"], "--sft_validation 0.6: must be within 0 and 0.5"),
        (["--sft_warmup_ratio", "1.1"], "--sft_warmup_ratio 1.1: must be within 0 and 1"),
        (["--sft_max_tokens", "0"], "--sft_max_tokens 0: must be at least 1"),
        (["--eval_max_new_tokens", "0"], "--eval_max_new_tokens 0: must be at least 1"),
        (["--preset", "last_run"], "invalid choice: 'last_run'"),
        (["--minibatches", "99"], "more than the 16 problems"),
        (["--delta", "nan"], "--delta nan: must be positive"),
        (["--delta", "0"], "--delta 0.0: must be positive"),
        (["--gamma", "inf"], "must be positive and finite"),
        (["--hpt_gate", "9"], "must be within 0 and the 8 rollouts"),
        (["--luffy_entropy", "-1"], "must be finite and not negative"),
        (["--alpha_max", "-0.8"], "--alpha_max -0.8: must be finite and not negative"),  # clamp(0, -0.8) is -0.8: KL uphill
        (["--alpha_0", "nan"], "must be finite and not negative"),
        (["--clip_high", "-0.1"], "must be finite and not negative"),
        (["--clip_low", "1.5"], "--clip_low 1.5: must be within 0 and 1"),
        (["--eval_top_p", "nan"], "must be above 0 and at most 1"),
        (["--steps", "-5"], "--steps -5: must not be negative"),
        (["--eval_limit", "-5"], "--eval_limit -5: must not be negative"),
        (["--lr_warmup_steps", "-1"], "must not be negative"),
        (["--method", "sft", "--sft_epochs", "0"], "--sft_epochs 0.0: must be positive"),
        (["--resume", "--out", "no/such/run"], "--resume: no/such/run holds no run to go on with, and no settings are given"),
        (["--method", "grpo", "--target", "random"], "--target random: it does nothing to grpo"),
        (["--method", "luffy", "--no-autonomous"], "it does nothing to luffy"),
        (["--method", "grpo", "--weight", "fixed"], "--weight fixed: it does nothing to grpo"),
        (["--method", "hinted", "--distill", "none"], "--distill none: it does nothing to hinted"),
        (["--method", "hpt", "--aggregate", "token"], "--aggregate token: it does nothing to hpt"),
        (["--method", "luffy", "--aggregate", "sequence"], "--aggregate sequence: it does nothing to luffy"),
        (["--weight", "fixed", "--alpha_0", "0.1"], "--alpha_0 0.1: it does nothing to sgpo with --weight fixed"),
        (["--method", "hinted", "--group_guided", "1"], "--group_guided 1: a group's advantage needs at least 2"),
        (["--method", "sft", "--aggregate", "token"], "--aggregate token: it does nothing to sft"),
        (["--method", "grpo", "--shuffle_strategies"], "--shuffle_strategies True: it does nothing to grpo"),
    ],
)
def test_bad_flags_fail(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.parse_config(flags)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_defaults_are_the_papers_and_presets_give_way_to_flags():
    cfg = train.parse_config(["--model", "x", "--data", "y"])
    assert (cfg.group_auto, cfg.group_guided, cfg.clip_low, cfg.clip_high, cfg.delta) == (8, 4, 0.2, 0.28, 1.0)
    assert (cfg.alpha_0, cfg.gamma, cfg.alpha_max, cfg.eval_temperature, cfg.eval_top_p) == (0.5, 0.1, 0.8, 0.6, 0.95)
    assert cfg.eval_data == "" and cfg.sft_fraction == pytest.approx(1 / 3)
    assert (cfg.sft_epochs, cfg.sft_batch, cfg.sft_learning_rate, cfg.sft_warmup_ratio) == (10, 64, 1e-5, 0.1)
    assert (cfg.sft_validation, cfg.sft_max_tokens, cfg.max_new_tokens) == (0.1, 16384, 16384)
    starter = train.parse_config(["--model", "x"])
    assert starter.data.endswith("data/starter/train.jsonl") and starter.learning_rate == 1e-6
    tiny = train.parse_config(["--learning_rate", "0.5", "--no-eval_guided"])
    assert tiny.eval_max_new_tokens == tiny.max_new_tokens == 32
    assert train.parse_config(["--data", "y"]).eval_data == ""  # not the tiny world's
    assert tiny.learning_rate == 0.5 and tiny.steps == 60 and not tiny.eval_guided and tiny.model.endswith("data/tiny/base")


@pytest.mark.parametrize(
    "rows, flags, message",
    [
        ([], [], "no rows"),
        (None, [], "no such file"),
        (tiny_rows(1, answer=7), [], "rows.jsonl:1: field 'answer'"),
        (tiny_rows(1, strategy={"type": "x"}), [], "rows.jsonl:1:"),
        (tiny_rows(1), ["--cache_tokens", "128"], "which with a response of 32 needs --cache_tokens"),
        (
            tiny_rows(1),
            ["--cache_tokens", "256", "--eval_max_new_tokens", "150", "--eval_data", ROOT / "data/tiny/test.jsonl"],
            "which with a response of 150 needs --cache_tokens",
        ),
        (tiny_rows(1, problem="words " * 300), [], "tokens (prompt, and solution if it is used), the context holds 256"),
        ([{k: v for k, v in row.items() if k != "strategy"} for row in tiny_rows(3)], [], "3 rows have no strategy"),
        (
            [{k: v for k, v in row.items() if k != "solution"} for row in tiny_rows(3)],
            ["--method", "sft"],
            "3 rows have no solution",
        ),
        (tiny_rows(3), ["--sft_fraction", 1.0], "leaves none of the 3 problems for RL"),
        (tiny_rows(3), ["--model", "no-such-model"], "no such folder"),
    ],
)
def test_bad_input_stops_before_any_training(tmp_path, capsys, rows, flags, message):
    path = tmp_path / "rows.jsonl"
    if rows is not None:
        write_rows(path, rows)
    with pytest.raises(SystemExit) as stopped:
        train.main(["--data", str(path), "--out", str(tmp_path / "run"), *map(str, flags)])
    assert message in str(stopped.value)
    assert not (tmp_path / "run").exists()  # nothing that the corrected run would trip over


def test_grpo_needs_no_strategy_and_samples_no_guided_group(tmp_path, worker):
    rows = [{k: v for k, v in row.items() if k not in ("strategy", "solution")} for row in tiny_rows(4)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    run, examples = make_run(tmp_path, worker, "--data", path, "--method", "grpo", "--sft_fraction", 0)
    metrics = train.rl_step(run, list(enumerate(examples)), 1, 1e-3)
    assert metrics["length_guided"] == metrics["distillation_loss"] == metrics["alpha"] == 0
