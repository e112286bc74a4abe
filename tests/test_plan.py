"""The planner against measured peaks and slow loops."""

import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kv_cache
import parallel
import sgpo
import train
import weighting
from model import ModelConfig, build_model
from rollout import Trajectory, generate
from tests.common import CPU, live_bytes, prompt_seeds, run_script, update
from tools import gpu_step, plan

# "published": parameters, blocks, width, MLP width, heads, key/value heads, vocabulary, context, tied head, of the model pages.
# "too large": model, GPUs, GB of one, settings, what helps
CASES = json.loads(Path(__file__).with_name("plan_cases.json").read_text(encoding="utf-8"))


def job_for(name, gpus=8, gpu_memory=80, assumed=None, **settings):
    """The job of a known model, all settings at train.py's defaults but these."""
    shape = plan.Shape(ModelConfig.from_dict(plan.SHAPES[name]))
    settings = replace(train.Config(), **settings)
    return plan.Job(shape, settings, gpus, gpu_memory, assumed or plan.Assumptions())


@pytest.mark.parametrize("name", CASES["published"])
def test_plan_counts_the_published_parameters_and_shards_them_as_fsdp(name):
    shape = job_for(name).shape
    c = shape.config
    counts = [c.num_hidden_layers, c.hidden_size, c.intermediate_size, c.num_attention_heads, c.num_key_value_heads]
    counts += [c.vocab_size, c.max_position_embeddings, c.tie_word_embeddings]
    assert [shape.parameters, *counts] == CASES["published"][name]
    assert shape.R == shape.head * (1 if c.tie_word_embeddings else 2) + c.hidden_size
    assert shape.R + shape.L * shape.S == shape.parameters == shape.shard(1)
    # FSDP2 pads the first dimension: at three ranks a matrix of 8 rows is cut into 3, 3 and 2 rows, and each holds 3
    shape.rows = [(8, 5), (3, 1), (1, 7)]
    assert [shape.shard(ranks) for ranks in (1, 2, 3)] == [40 + 3 + 7, 20 + 2 + 7, 15 + 1 + 7]


def test_plan_reads_a_configuration_from_wherever_it_is(tmp_path, monkeypatch):
    def fetch(repo, allow_patterns, **_):
        if (repo, allow_patterns) == ("Qwen/Qwen3-0.6B", ["config.json"]):  # no weights
            return str(tmp_path)
        raise OSError("no network here")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(plan.SHAPES["Qwen2.5-0.5B-Instruct"] | {"num_hidden_layers": 3}))
    for name in (str(tmp_path), str(file), "Qwen3-0.6B"):
        config, source = plan.model_config(name)
        assert config.num_hidden_layers == 3 and source == str(file)
    config, source = plan.model_config("Qwen2.5-7B-Instruct")
    assert config.hidden_size == 3584 and source == "tools/shapes.json"
    for name in ("someone/Qwen2.5-7B-Instruct", "nobody-knows", "./nowhere", str(tmp_path / "missing.json")):
        with pytest.raises(ValueError, match=f"{re.escape(name)}: no such folder"):
            plan.model_config(name)
    for text, what in [("{", "Expecting property name"), ("[]", "not the config.json"), ('{"model_type": "gpt2"}', "gpt2")]:
        file.write_text(text)
        with pytest.raises(ValueError, match=r"config.json: .*" + what):
            plan.model_config(str(file))


def planned_run(shape, **settings):
    """A training run on a random model of `shape`, as train.prepare makes it, after a small update that makes its state."""
    cfg = replace(train.Config(), sft_fraction=0.0, **settings)
    raw = dict(model_type="llama", rms_norm_eps=1e-5, max_position_embeddings=4096, hidden_act="silu", eos_token_id=1) | shape
    generator = torch.Generator().manual_seed(0)
    model = build_model(ModelConfig.from_dict(raw), generator=generator, dtype=torch.float32, device=CPU)
    model.model.recompute = cfg.recompute
    parallel.shard(model, device=CPU, dtype=parallel.compute_dtype(cfg.dtype, CPU), shard_ranks=cfg.shard_ranks, offload=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.01, fused=True)
    run = SimpleNamespace(cfg=cfg, model=model, optimizer=optimizer)
    update(run, planned_samples(run, 3, 3, 2, 4), 1e-6)
    return run


def planned_samples(run, prompt=40, guided=100, shortest=30, longest=60):
    """Random groups of ragged responses to two equal problems, half of them right, with a target."""
    rng, V, cfg = random.Random(0), run.model.config.vocab_size, run.cfg

    def ids(count):
        return [rng.randrange(2, V) for _ in range(count)]

    def rows(context, n):
        responses = [ids(rng.randint(shortest, longest)) for _ in range(n)]
        return [Trajectory(context, response, [-10.0] * len(response), True, 0) for response in responses]

    auto, guided = rows(ids(prompt), cfg.group_auto), rows(ids(guided), cfg.group_guided)
    example = sgpo.Example(None, auto[0].prompt_ids, guided[0].prompt_ids, None)
    rewards = [float(i % 2) for i in range(cfg.group_auto)]
    sample = sgpo.ProblemSamples(0, example, auto, guided, rewards, [])
    sample.advantages = weighting.group_advantages(torch.tensor([rewards]))[0].tolist()
    sample.alpha, sample.targets = 0.5, [0]
    return [sample, sample]


def sampling(run, samples):
    """(phase, bytes predicted) and what samples both groups."""
    cfg, prompts = run.cfg, [s.example.auto_ids for s in samples] + [s.example.guided_ids for s in samples]
    counts = [cfg.group_auto] * len(samples) + [cfg.group_guided] * len(samples)

    def work():
        settings = dict(temperature=1.0, top_p=1.0, eos_ids=[-1], seed=prompt_seeds(0, prompts), max_rows=cfg.max_rows)
        with parallel.whole_model(run.model) as policy:
            generate(policy, prompts, n=counts, max_new_tokens=6, **settings)

    pages = sum(kv_cache.pages_for(len(prompt)) + 2 for prompt in prompts) + min(cfg.max_rows, sum(counts))
    return gpu_step.predicted_sampling(gpu_step.job_of(run.model, cfg), samples, pages, 0), work


def compare(case, part, job, prediction, work):
    """A row of the table in results/plan.md. Weights and optimizer states are left out, so that they cannot hide an error."""
    phase, total = prediction
    predicted, measured = total - sum(plan.resident(job).values()), live_bytes(work)
    print(f"| {case['name']} | {part}: {phase} | {predicted / 1e6:.1f} | {measured / 1e6:.1f} |")
    assert abs(predicted / measured - 1) < 0.03, (part, phase, predicted, measured)


def compare_update(case, part, run, ranks=1):
    job, samples = gpu_step.job_of(run.model, run.cfg, ranks), planned_samples(run)
    compare(case, part, job, gpu_step.predicted_update(job, samples), lambda: update(run, samples, 1e-6))


@pytest.mark.parametrize("case", CASES["peaks"], ids=lambda case: case["name"])
def test_plan_predicts_the_measured_peak(case):
    run = planned_run(case["shape"], **case["settings"])
    job = gpu_step.job_of(run.model, run.cfg)
    state = [value for state in run.optimizer.state.values() for value in state.values() if value.dim()]
    resident = [parallel.whole_tensor(tensor) for tensor in (*run.model.parameters(), *state)]
    assert sum(tensor.nbytes for tensor in resident) == sum(plan.resident(job).values())
    compare(case, "sampling", job, *sampling(run, planned_samples(run)))
    compare_update(case, "update", run)


def rank_of_eight():
    """In a process of its own: one update of one rank of eight, with exchanges that do nothing. First all eight share one copy
    of the weights, then four."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    torch.set_num_threads(1)
    sgpo.apply_gradients = lambda model, optimizer, *_: optimizer.zero_grad() or 0.0  # what the others hold is not there
    case = CASES["one of eight"]
    for shard_ranks in (0, 4):
        run = planned_run(case["shape"], shard_ranks=shard_ranks, **case["settings"])
        compare_update(case, f"{shard_ranks or 8} ranks a copy, update", run, ranks=8)


def test_plan_predicts_the_peak_of_one_rank_of_eight():
    done = run_script("-c", "from tests import test_plan; test_plan.rank_of_eight()")
    print(done.stdout)
    assert done.returncode == 0 and done.stdout.count("ranks a copy") == 2, done.stderr


def test_a_packed_pass_in_numbers_by_hand():
    """A prompt of 5 tokens with responses of 3 and 4: the last token of each is no input, and each sees the prompt's keys."""
    batch = gpu_step.micro_batch([[1] * 5] * 2, [[2] * 3, [2] * 4], False)
    assert batch == plan.MicroBatch(tokens=5 + 2 + 3, continued=(5 + 2) + (5 + 3), distillation=False)


def test_plan_of_the_largest_terms_by_hand():
    """Qwen2.5-7B on 8 GPUs, from the published shape: shards, whole weights, a page, activations, head chunks."""
    job = job_for("Qwen2.5-7B-Instruct")
    parts = plan.memory_of(job).parts
    sampling, update = parts["sampling"]["decoding"], parts["update"]
    P, D, W, V, L = 7_615_616_512, 3584, 18944, 152064, 28
    assert sampling["weights, fp32 shard"] == pytest.approx(4 * P / 8, rel=1e-3)
    assert sampling["AdamW's two moments, fp32 shard"] == pytest.approx(8 * P / 8, rel=1e-3)
    assert sampling["whole weights in the compute dtype"] == 2 * P
    token = 2 * L * 4 * 128 * 2  # keys and values, layers, heads, width, bytes
    assert plan.page_bytes(job) == 64 * token
    free = 76e9 - 12 * P / 8 - 2 * P
    assert sampling["KV cache"] == pytest.approx(0.9 * free, rel=1e-3)
    captured = 8 + 16 + 24 + 32 + 48 + 64 + 96 + 128 + 192  # sizes of a decode step up to 16 problems' 12 rows
    assert sampling["logits"] == V * (2 * captured + 192 * (2 + 4 + 4 + 8))
    T = 200 + 16384  # a prompt and the longest response
    scoring = sum(parts["sampling"]["scoring the guided trajectories"].values())
    assert scoring == pytest.approx(12 * P / 8 + 2 * P + T * (6 * (D + W) + 520), rel=1e-3)
    head = update["loss at the head (policy loss)"]
    assert head["activations kept for the backward pass"] == T * L * D * 2
    assert head["chunks of logits"] == 4 * 256 * V * 4 and head["gradient of the head"] == V * D * 2
    assert head["embedding and head, gathered"] == (2 * V + 1) * D * 2
    assert head["hidden states and their gradient"] == 3 * T * D * 2
    kl = update["loss at the head (KL)"]
    tokens = 500 + 16384  # a micro-batch of 16384 counts both contexts and the response twice; one response is longer
    assert kl["hidden states of the guided pass"] == tokens * D * 2 and kl["chunks of logits"] == 6.5 * 256 * V * 4
    last = update["backward pass of block 28 of 28, in its MLP (policy loss)"]
    sequences = 5  # of 4096 tokens in T, the last one short; each looks at its prompt's keys again
    saved = 2 * (4 + 2 + 2) * D + 8 + 2 * D + 4 * 28 + 2 * D + 8 * W  # norms, queries and results, log-denominators, MLP
    keys = 2 * 512 * 2 * (T + sequences * 200)
    assert last["activations of the block"] == T * (saved + 2 * (2 * W + D)) + keys
    block = 2 * D * D + 2 * 512 * D + D + 2 * 512 + 3 * D * W + 2 * D
    assert last["blocks, gathered"] == 2 * 2 * block and last["gradients of the block"] == 2 * D * W
    for settings, kept in [
        ({"recompute": False}, L * (T * saved + keys)),
        ({"sft_max_tokens": 20_000}, 20_000 * L * D * 2),
        ({"sft_max_tokens": 99_999}, 32_768 * L * D * 2),
        ({"sft_max_tokens": 20_000, "sft_fraction": 0.0}, T * L * D * 2),
    ]:
        update = plan.memory_of(job.changed(**settings)).parts["update"]
        assert update["loss at the head (policy loss)"]["activations kept for the backward pass"] == kept, settings


def test_plan_of_each_method_samples_what_it_samples():
    def groups(method):
        return plan.groups_of(job_for("Qwen2.5-7B-Instruct", gpus=3, method=method, problems_per_step=3))

    assert groups("sgpo") == groups("hinted") == [(200, 8), (500, 4)]
    assert groups("grpo") == groups("hpt") == [(200, 8)]
    assert groups("luffy") == [(200, 7)]
    long = plan.Assumptions(solution_tokens=30_000)  # in the updates of luffy and hpt
    for method, tokens in (("luffy", 30_200), ("hpt", 30_200), ("sgpo", 16_584), ("hinted", 16_884)):
        job = job_for("Qwen2.5-7B-Instruct", assumed=long, method=method)
        assert plan.largest_batches(job)[0].tokens == tokens
    sampling = plan.memory_of(job_for("Qwen2.5-7B-Instruct", method="hinted")).parts["sampling"]  # it has no target to find
    assert sampling["scoring the guided trajectories"]["activations"] == 0


def test_plan_of_the_warm_up_by_hand():
    """8,500 problems, a third for SFT: 2,833, of which 283 are held out: 10 x 2,550 / 64 updates, 10 x 283 passes forward."""
    job = job_for("Qwen2.5-7B-Instruct", assumed=plan.Assumptions(flops=1e15, update_share=0.5, prefill_share=0.25))
    one = plan.forward_flops(job.shape, [(0, 200 + 4096)], 4096)
    assert plan.sft_seconds(job) == pytest.approx(399 * 8 * 4 * one / 0.5e15 + 10 * 36 * one / 0.25e15)  # 64 / 8 and 283 / 8


def test_plan_of_offloading_has_no_shards_on_the_gpu():
    for phases in plan.memory_of(job_for("Qwen2.5-1.5B-Instruct", offload=True)).parts.values():
        assert not any("shard" in term and nbytes for phase in phases.values() for term, nbytes in phase.items())


@pytest.mark.parametrize("gpus, shard_ranks", [(8, 0), (32, 8)])
def test_plan_longest_response_is_the_edge(gpus, shard_ranks):
    job = job_for("Llama-3.1-8B-Instruct", gpus, shard_ranks=shard_ranks)
    length = plan.largest_response(job)
    here = plan.memory_of(job.changed(max_new_tokens=length))
    more = plan.memory_of(job.changed(max_new_tokens=length + 64))
    assert here.fits and here.room >= here.enough
    assert more.room < more.enough


@pytest.mark.parametrize("name, gpus, memory, settings, helps", CASES["too large"])
def test_plan_remedies_are_remedies(name, gpus, memory, settings, helps):
    job = job_for(name, gpus, memory, **settings)
    text = plan.plan_text(job)
    assert "DOES NOT FIT: " in text
    offered = re.findall(r"^  it fits with (.*)$", text, re.M)
    assert [re.sub(r"\d+", "N", line) for line in offered] == helps
    for line in offered:
        flags = [f"--{'no-' * (v is False)}{n}" if isinstance(v, bool) else f"--{n}={v}" for n, v in settings.items()]
        more, line = re.match(r"(?:--gpus (\d+) )?(.*)", line).groups()
        again = train.parse_config(["--model", "x", *flags, *line.split()])
        assert plan.memory_of(replace(job, settings=again, gpus=int(more or gpus))).fits
    assert bool(offered) != ("nothing that train.py has a flag for makes it fit" in text)


def test_plan_lengths_have_their_mean_and_end():
    for mean, longest in [(2048, 8192), (300, 8192), (4096, 8192), (6000, 8192), (8192, 8192), (9000, 8192), (3, 40)]:
        lengths = plan.response_lengths(4000, mean, longest)
        assert lengths == sorted(lengths) and lengths[0] >= 1 and lengths[-1] == longest
        assert sum(lengths) / 4000 == pytest.approx(min(mean, longest), rel=0.01, abs=0.3)
    assert set(plan.response_lengths(5, 7, 7)) == {7}
    # far below the bound it is the exponential distribution: half of the responses are shorter than mean * ln 2
    assert plan.response_lengths(4001, 1000, 10**6)[2000] == pytest.approx(1000 * math.log(2), rel=1e-3)


@pytest.mark.parametrize("places", [1, 3, 100])
def test_plan_decoding_is_a_slow_loop(places):
    rng = random.Random(places)
    rows = [(rng.randint(1, 9), rng.randint(1, 30)) for _ in range(20)]
    waiting, alive, seconds = list(rows), [], 0.0
    while waiting or alive:  # token by token; a row is [tokens that it holds, tokens to come]
        while waiting and len(alive) < places:
            alive.append(list(waiting.pop(0)))
        # the middle of what a step begins and ends with, as in the planner's mean over steps
        seconds += 1 + 0.5 * len(alive) + 0.25 * sum(held + 0.5 for held, _ in alive)
        alive = [[held + 1, left - 1] for held, left in alive if left > 1]
    assert plan.decode_seconds(rows, places, lambda n, tokens: 1 + 0.5 * n + 0.25 * tokens) == pytest.approx(seconds)


def test_plan_time_of_a_step_by_hand():
    """One problem, two rows of 100 tokens, nothing but bandwidth: 100 steps that read the weights and a growing cache."""
    settings = dict(method="grpo", group_auto=2, problems_per_step=8, max_new_tokens=100)
    assumed = plan.Assumptions(mean_response=100.0, memory_bandwidth=1e12, decode_share=0.5, decode_overhead=0.001, flops=1e30)
    job = job_for("Qwen2.5-7B-Instruct", assumed=assumed, **settings)
    weights = 2 * (7_615_616_512 - 152064 * 3584)  # without the embedding
    cache = 2 * 57344 * (100 * 200 + 100 * 100 / 2)
    assert plan.sampling_seconds(job)[1] == pytest.approx(100 * (weights / 5e11 + 0.001) + cache / 5e11)
    assert plan.steps_of(job) == math.ceil(10 * 5667 / 8)
    slow = replace(assumed, flops=1e12, update_share=0.5, prefill_share=0.25)
    scoring, update = plan.update_seconds(replace(job, assumed=slow))
    blocks = 2 * (7_615_616_512 - 2 * 152064 * 3584)  # to 0.1 %: norms and biases are not multiplied
    attention = 4 * 3584 * 28 * (200 * 201 / 2 + 2 * (100 * 200 + 100 * 101 / 2))
    head = 2 * 152064 * 3584 * 200
    assert scoring == 0 and update == pytest.approx((4 * (400 * blocks + attention) + 3 * head) / 5e11, rel=1e-3)
    distilled = job_for("Qwen2.5-7B-Instruct", assumed=slow, **settings | {"method": "sgpo"})
    scoring, more = plan.update_seconds(distilled)  # and four guided trajectories, one of which is a target
    assert scoring == pytest.approx(600 * blocks / 2.5e11, rel=0.1)
    assert more - update == pytest.approx(4 * 300 * blocks / 5e11 + 600 * blocks / 2.5e11, rel=0.1)


def test_plan_of_a_training_command(capsys, monkeypatch):
    """train.py --plan: its own flags and the plan's, no weights, no GPU; anything else is an error."""
    monkeypatch.setattr(train, "prepare", None)
    flags = ["--plan", "--model", "Qwen2.5-7B-Instruct"]
    train.main([*flags, *"--gpus 4 --gpu_memory 84 --mean_response 99 --top_p 0.5".split()])
    text = capsys.readouterr().out
    assert "7,615,616,512 parameters" in text and "4 GPUs, 4 shards; 80.0 GB a GPU" in text
    assert re.search(r"--mean_response +99 ", text) and re.search(r"--top_p +0.5 ", text)
    assert f"for {12 * 128 * 99:,} sampled tokens" in text and "not measured on a GPU" in text and "GPU hours" in text
    for field in plan.dataclasses.fields(plan.Assumptions):
        assert f"--{field.name} " in text  # every assumption is printed
    for wrong, words in (["--plan"], "say with --model which model"), ([*flags, "--gpu", "4"], "unrecognized arguments: --gpu"):
        with pytest.raises(SystemExit):
            train.main(wrong)
        assert words in capsys.readouterr().err
    for wrong, words in CASES["bad"]:
        with pytest.raises(SystemExit, match=re.escape(words)):
            train.main([*flags, *wrong.split()])
