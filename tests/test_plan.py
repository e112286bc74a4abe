"""The planner against measured peaks, numbers by hand and slow loops."""

import itertools
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
import lora
import parallel
import sgpo
import train
import weighting
from model import ModelConfig, build_model
from rollout import Trajectory, generate
from tests.common import CPU, live_bytes, prompt_seeds, run_script, update
from tools import gpu_step, plan

# "published": parameters, blocks, width, MLP width, heads, key/value heads, vocabulary, context, tied head, of the model pages.
# "methods": method, prompt and responses of each group, tokens of the largest pass. "grid": values of settings.
# "too large": model, GPUs, GB of one, settings, the ways to fit. "bad": flags, the error
CASES = json.loads(Path(__file__).with_name("plan_cases.json").read_text(encoding="utf-8"))


def job_for(name, gpus=8, gpu_memory=80, assumed=None, **settings):
    """The job of a known model, all settings at train.py's defaults but these and small passes."""
    settings = {"micro_tokens": 16384, "chunk_tokens": 256} | settings
    shape = plan.Shape(ModelConfig.from_dict(plan.SHAPES[name]))
    assumed = replace(assumed or plan.Assumptions(), gpu_memory=gpu_memory)
    return plan.Job(shape, replace(train.Config(), **settings), gpus, assumed)


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
    file = tmp_path / "config.json"
    file.write_text(json.dumps(plan.SHAPES["Qwen2.5-0.5B-Instruct"] | {"num_hidden_layers": 3}))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    for name in (str(tmp_path), str(file), "Qwen3-0.6B"):
        config, source = plan.model_config(name)
        assert config.num_hidden_layers == 3 and source == str(file)
    for text, what in [("{", "Expecting property name"), ("[]", "not the config.json"), ('{"model_type": "gpt2"}', "gpt2")]:
        file.write_text(text)
        with pytest.raises(ValueError, match=r"config.json: .*" + what):
            plan.model_config(str(file))


def planned_run(shape, **settings):
    """A training run on a random model of `shape`, as train.prepare makes it, after a small update that makes its state."""
    cfg = replace(train.Config(), **{"micro_tokens": 16384, "chunk_tokens": 256, "sft_fraction": 0.0} | settings)
    raw = dict(model_type="llama", rms_norm_eps=1e-5, max_position_embeddings=4096, hidden_act="silu", eos_token_id=1) | shape
    generator = torch.Generator().manual_seed(0)
    model = build_model(ModelConfig.from_dict(raw), generator=generator, dtype=torch.float32, device=CPU)
    model.model.recompute = cfg.recompute
    dtype = parallel.compute_dtype(cfg.dtype, CPU)
    if cfg.lora_rank:
        lora.add_adapters(model, rank=cfg.lora_rank, alpha=cfg.lora_alpha, dtype=dtype)
        model.load_state_dict(dict(lora.initial_adapters(model, generator)), strict=False)
    parallel.shard(model, device=CPU, dtype=dtype, shard_ranks=cfg.shard_ranks, offload=False)
    optimizer = torch.optim.AdamW(parallel.trained(model).values(), lr=1e-6, weight_decay=0.01, fused=True)
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
    """In a process of its own: an update of one rank of eight, with exchanges that do nothing: eight ranks a copy, four."""
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


def test_plan_of_the_largest_terms_by_hand():
    """Qwen2.5-7B on 8 GPUs, from the published shape: the cache, logits, activations, gathered blocks."""
    job = job_for("Qwen2.5-7B-Instruct")
    parts = plan.memory_of(job)
    sampling, update = parts["sampling"]["decoding"], parts["update"]
    P, D, W, V, L = 7_615_616_512, 3584, 18944, 152064, 28
    token = 2 * L * 4 * 128 * 2  # keys and values, layers, heads, width, bytes
    assert plan.page_bytes(job) == 64 * token
    joined = 2 * L * D * (D + 2 * 512)
    assert sampling["KV cache"] == pytest.approx(0.9 * (76e9 - 12 * P / 8 - 2 * P - joined), rel=1e-3)
    captured = 8 + 16 + 24 + 32 + 48 + 64 + 96 + 128 + 192  # sizes of a decode step up to 16 problems' 12 rows
    assert sampling["logits"] == V * (2 * captured + 192 * 2) and sampling["joined projections"] == joined
    scoring = sum(parts["sampling"]["scoring the guided trajectories"].values())
    assert scoring == pytest.approx(12 * P / 8 + 2 * P + joined + (200 + 16384) * (6 * (D + W) + 520), rel=1e-3)
    T = 500 + 16384  # a prompt and the longest response
    assert update["loss at the head (policy loss)"]["chunks of logits"] == 4 * 256 * V * 4
    assert update["loss at the head (KL)"]["chunks of logits"] == 6.5 * 256 * V * 4
    last = update["backward pass of block 28 of 28, in its MLP (policy loss)"]
    sequences = 5  # of 4096 tokens in T, the last one short; each looks at its prompt's keys again
    saved = 2 * (2 + 2) * D + 8 + 2 * D + 4 * 28 + 2 * D + 6 * W  # norms, queries and results, log-denominators, MLP
    keys = 2 * 512 * 2 * (T + sequences * 500)
    assert last["activations of the block"] == T * (saved + 2 * (2 * W + D)) + keys
    block = 2 * D * D + 2 * 512 * D + D + 2 * 512 + 3 * D * W + 2 * D
    assert last["blocks, gathered"] == 2 * 2 * block and last["gradients of the block"] == 2 * D * W
    # 44,352 tokens are 693 pages. A row has 64 of its own; its share of a problem's two prompts is 12 pages over 12 rows
    assert plan.rows_at_once(job.changed(cache_tokens=44352)) == 693 // 65
    for settings, kept in ({"recompute": False}, L * (T * saved + keys)), ({"sft_max_tokens": 99_999}, 32_768 * L * D * 2):
        update = plan.memory_of(job.changed(**settings))["update"]
        assert update["loss at the head (policy loss)"]["activations kept for the backward pass"] == kept, settings


def test_plan_settles_the_passes_of_an_update_by_the_memory():
    """On one card. The activations of 1.5B that an H200 kept of 16,384 tokens without recomputation were 37 GB
    (results/gpu.md); its weights, moments and gradients are 25."""
    def settled(memory, name="Qwen2.5-1.5B-Instruct", **settings):
        small = {"micro_tokens": 0, "chunk_tokens": 0, "sft_fraction": 0.0, "max_new_tokens": 512}
        job = job_for(name, 1, memory, **small | settings)
        after = plan.settle(job).settings
        return after.recompute, after.micro_tokens, after.chunk_tokens

    assert settled(139) == (False, 32768, 2048)
    assert settled(80) == (False, 16384, 1024)
    assert settled(60)[0] and settled(60)[1] >= 16384
    assert settled(139, recompute=False, micro_tokens=4096) == (False, 4096, 2048)
    assert settled(139, micro_tokens=4096, chunk_tokens=256) == (True, 4096, 256)
    assert settled(20) == (True, 8192, 256)  # nothing fits: the plan says so
    cpu = replace(job_for("Qwen2.5-7B-Instruct", micro_tokens=0, chunk_tokens=0), cuda=False)
    assert plan.settle(cpu).settings == replace(cpu.settings, micro_tokens=16384, chunk_tokens=256)


def test_plan_of_each_method_samples_what_it_samples():
    long = plan.Assumptions(solution_tokens=30_000)  # in the updates of luffy and hpt
    for method, groups, tokens in CASES["methods"]:
        job = job_for("Qwen2.5-7B-Instruct", gpus=3, assumed=long, method=method, problems_per_step=3)
        assert [list(group) for group in plan.groups_of(job)] == groups and plan.largest_batches(job)[0].tokens == tokens
        scored = plan.memory_of(job)["sampling"]["scoring the guided trajectories"]["activations"]
        assert (scored > 0) == (method == "sgpo")  # the others have no target to find


def test_plan_of_the_warm_up_and_of_offloading_by_hand():
    """A third of 8,500 problems, ten times, on 8 GPUs. With offloading 12 bytes of a shard are copied for every micro-batch."""
    assumed = plan.Assumptions(flops=1e15, update_share=0.5, host_bandwidth=1e9)
    job, solutions = job_for("Qwen2.5-7B-Instruct", assumed=assumed, recompute=False), 10 * 8500 / 3 / 8
    one = plan.forward_flops(job.shape, [(0, 200 + 4096)], 4096)
    assert plan.sft_seconds(job) == pytest.approx(solutions * 3 * one / 0.5e15)
    passes = math.ceil(solutions * 4296 / 16384)
    assert plan.sft_seconds(job.changed(offload=True)) == pytest.approx(passes * 12 * 7_615_616_512 / 8 / 1e9, rel=1e-3)
    for phases in plan.memory_of(job.changed(offload=True)).values():
        assert not any("shard" in term and nbytes for phase in phases.values() for term, nbytes in phase.items())


@pytest.mark.parametrize("name, gpus, memory, settings, ways", CASES["too large"])
def test_plan_names_flags_that_fit_and_their_time(name, gpus, memory, settings, ways):
    job = job_for(name, gpus, memory, **settings)
    text = plan.plan_text(job)
    offered = re.findall(r"^  it fits with (.*)\n +([\d,]+) hours", text, re.M)
    assert "DOES NOT FIT: " in text and [re.sub(r"\d+", "N", flags) for flags, _ in offered] == ways
    own = [f"--{'no-' * (value is False)}{n}" if isinstance(value, bool) else f"--{n}={value}" for n, value in settings.items()]
    for flags, hours in offered:
        more, flags = re.match(r"(?:--gpus (\d+) ?)?(.*)", flags).groups()
        again = train.parse_config(["--model", "x", "--micro_tokens=16384", "--chunk_tokens=256", *own, *flags.split()])
        again = replace(job, settings=again, gpus=int(more or gpus))
        assert plan.fits(again) and f"{plan.hours_of(again):,.0f}" == hours
    took = re.findall(r"steps, takes ([\d,]+) h on", text)  # the memory and the time below are of the first way
    assert took == [hours for _, hours in offered[:1]] and bool(ways) != ("no settings that compute the same" in text)


@pytest.mark.parametrize("gpus, memory", [(1, 24), (8, 40)])
def test_plan_finds_the_cheapest_combination(gpus, memory):
    job, grid = job_for("Qwen2.5-7B-Instruct", gpus, memory), CASES["grid"]
    jobs = [job.changed(**dict(zip(grid, values, strict=True))) for values in itertools.product(*grid.values())]
    hours = [plan.hours_of(changed) for changed in jobs if plan.fits(changed)]
    assert hours and plan.hours_of(plan.ways_to_fit(job)[0]) <= 1.05 * min(hours)


@pytest.mark.parametrize("places", [1, 5, 20, 32, 64])
def test_plan_counts_the_steps_of_a_slow_loop(places):
    assumed = plan.Assumptions(mean_response=100, flops=1e30, memory_bandwidth=1e30, decode_overhead=1.0)
    settings = dict(method="grpo", group_auto=64, problems_per_step=8, max_new_tokens=400, max_rows=places)
    waiting, alive, steps = plan.response_lengths(64, 100, 400), [], 0
    random.Random(0).shuffle(waiting)
    while waiting or alive:  # token by token
        while waiting and len(alive) < places:
            alive.append(waiting.pop())
        steps += 1
        alive = [left - 1 for left in alive if left > 1]
    job = job_for("Qwen2.5-7B-Instruct", assumed=assumed, **settings)
    assert plan.decoding_seconds(job) == pytest.approx(steps, rel=0.2)


def test_plan_time_of_a_step_by_hand():
    """One problem, two rows of 100 tokens, nothing but bandwidth: 100 steps that read the weights and a growing cache."""
    settings = dict(method="grpo", group_auto=2, problems_per_step=8, max_new_tokens=100)
    assumed = plan.Assumptions(mean_response=100.0, memory_bandwidth=1e12, decode_share=0.5, decode_overhead=0.001, flops=1e30)
    job = job_for("Qwen2.5-7B-Instruct", assumed=assumed, **settings)
    weights = 2 * (7_615_616_512 - 152064 * 3584)  # without the embedding
    cache = 2 * 57344 * (100 * 200 + 100 * 100 / 2)
    assert plan.decoding_seconds(job) == pytest.approx(100 * (weights / 5e11 + 0.001) + cache / 5e11)
    assert plan.steps_of(job) == math.ceil(10 * 5667 / 8)
    slow = replace(assumed, flops=1e12, update_share=0.5, prefill_share=0.25)
    update = plan.update_seconds(replace(job, assumed=slow))
    blocks = 2 * (7_615_616_512 - 2 * 152064 * 3584)  # to 0.1 %: norms and biases are not multiplied
    attention = 4 * 3584 * 28 * (200 * 201 / 2 + 2 * (100 * 200 + 100 * 101 / 2))
    head = 2 * 152064 * 3584 * 200
    assert update == pytest.approx((4 * (400 * blocks + attention) + 3 * head) / 5e11, rel=1e-3)
    distilled = job_for("Qwen2.5-7B-Instruct", assumed=slow, **settings | {"method": "sgpo"})
    more = plan.update_seconds(distilled)  # and four guided trajectories, one of which is a target
    assert more - update == pytest.approx(4 * 300 * blocks / 5e11 + (600 + 600) * blocks / 2.5e11, rel=0.1)


def test_plan_of_a_training_command(capsys, monkeypatch):
    """train.py --plan: its own flags and the plan's, no weights, no GPU; anything else is an error."""
    monkeypatch.setattr(train, "prepare", None)
    flags = ["--plan", "--model", "Qwen2.5-7B-Instruct"]
    sizes = "--gpu_memory 84 --mean_response 99 --cache_tokens 32000 --micro_tokens 4096"
    train.main([*flags, *f"--gpus 4 --gpu h200 {sizes}".split()])
    text = capsys.readouterr().out
    assert "4 GPUs, 4 for each copy of the weights; 80.0 GB of each" in text and "GPU hours" in text
    shown = dict(re.findall(r"^  --(\w+) +(\S+)  ", text, re.M))
    assert shown.keys() == vars(plan.Assumptions()).keys()  # every assumption is printed
    assert shown | {"gpu_memory": "84", "flops": "9.89e+14", "memory_bandwidth": "4.8e+12", "mean_response": "99"} == shown
    assert f"{32000 // 64 * 64 * 57344 / 1e9:.2f}  KV cache" in text
    for wrong, words in (["--plan"], "required: --model"), ([*flags, "--gpu", "H1000"], "H100"), ([*flags, "--gp=4"], "--gp=4"):
        with pytest.raises(SystemExit):
            train.main(wrong)
        assert words in capsys.readouterr().err
    for wrong, words in CASES["bad"]:
        with pytest.raises(SystemExit, match=re.escape(words)):
            train.main([*flags, *wrong.split()])
