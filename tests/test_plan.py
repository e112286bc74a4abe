"""The planner against measured peaks and slow loops."""

import itertools
import json
import math
import random
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import kv_cache
import parallel
import rollout
import sgpo
import train
import weighting
from model import ModelConfig, build_model
from rollout import Trajectory, generate
from tests.common import CPU, TINY_BASE, bisection_in_place_of_sorting, live_bytes, prompt_seeds, run_script, update
from tools import gpu_step, plan

# what the model pages state: parameters, and the fields of config.json that the planner's table must have
PUBLISHED = {
    "SmolLM2-135M-Instruct": (134_515_008, 30, 576, 1536, 9, 3, 49152, 8192, True),
    "Qwen2.5-0.5B-Instruct": (494_032_768, 24, 896, 4864, 14, 2, 151936, 32768, True),
    "Qwen2.5-1.5B-Instruct": (1_543_714_304, 28, 1536, 8960, 12, 2, 151936, 32768, True),
    "Qwen2.5-7B-Instruct": (7_615_616_512, 28, 3584, 18944, 28, 4, 152064, 32768, False),
    "Llama-3.1-8B-Instruct": (8_030_261_248, 32, 4096, 14336, 32, 8, 128256, 131072, False),
}


def known_config(name):
    return ModelConfig.from_dict(plan.KNOWN[name])


@pytest.mark.parametrize("name", PUBLISHED)
def test_plan_counts_the_published_parameters(name):
    assert set(plan.KNOWN) == set(PUBLISHED)
    config, shape = known_config(name), plan.shape_of(known_config(name))
    fields = "num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads vocab_size"
    fields = [*fields.split(), "max_position_embeddings", "tie_word_embeddings"]
    assert (shape.parameters, *[getattr(config, field) for field in fields]) == PUBLISHED[name]
    assert shape.head == config.vocab_size * config.hidden_size
    assert shape.root == shape.head * (1 if config.tie_word_embeddings else 2) + config.hidden_size
    assert shape.root + config.num_hidden_layers * shape.block == shape.parameters == shape.shard(1)
    assert shape.parameters / 8 <= shape.shard(8) < 1.001 * shape.parameters / 8


def test_plan_shards_are_those_of_fsdp():
    """FSDP2 pads the first dimension: at three ranks a matrix of 8 rows is cut into 3, 3 and 2 rows, and each holds 3."""
    shape = plan.Shape(None, 0, 0, 0, 0, 0, rows=((8, 5), (3, 1), (1, 7)))
    assert [shape.shard(ranks) for ranks in (1, 2, 3)] == [40 + 3 + 7, 20 + 2 + 7, 15 + 1 + 7]


def test_plan_settings_are_those_of_train():
    defaults = {f.name: f.default for f in train.dataclasses.fields(train.Config)}
    assert {f.name: f.default for f in plan.dataclasses.fields(plan.Settings)} == {
        f.name: defaults[f.name] for f in plan.dataclasses.fields(plan.Settings)
    }
    cfg = train.parse_config(["--model", "x", "--recompute", "--micro_tokens", "4096"])
    config = known_config("Qwen2.5-1.5B-Instruct")
    same = plan.Settings(recompute=True, micro_tokens=4096)
    assert plan.make_plan(config, cfg, gpus=8, gpu_memory=80) == plan.make_plan(config, same, gpus=8, gpu_memory=80)


def test_plan_reads_a_configuration_from_wherever_it_is(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def reach(url, **_):
        asked.append(url)
        if offline:
            raise OSError("no network here")

    def fetch(repo, file, **_):
        assert not offline
        asked.append((repo, file))
        return str(tmp_path / "config.json")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, file: cached.get((repo, file)))
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", reach)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    cached = {}
    raw = plan.KNOWN["Qwen2.5-0.5B-Instruct"] | {"num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    shutil.copy(tmp_path / "config.json", tmp_path / "other.json")
    for place in (tmp_path, tmp_path / "other.json", str(tmp_path / "config.json")):
        config, source = plan.model_config(place)
        assert config.num_hidden_layers == 3 and source.endswith(".json") and str(tmp_path) in source
    assert not asked
    offline = False
    for name, repo in [
        ("Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("someone/x", "someone/x"),
    ]:
        config, source = plan.model_config(name)
        assert config.num_hidden_layers == 3 and source == f"{repo} on the hub" and asked.pop() == (repo, "config.json")
    offline = True
    cached["someone/y", "config.json"] = str(tmp_path / "config.json")
    assert plan.model_config("someone/y")[0].num_hidden_layers == 3  # no network is needed
    for name in ("Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b-instruct"):
        config, source = plan.model_config(name)
        assert config.hidden_size == 3584 and "own table" in source and "no network here" in source
    asked.clear()
    with pytest.raises(ValueError, match="someone/x's config.json could not be fetched .no network here.; --config FILE"):
        plan.model_config("someone/x")
    for name in ("nobody-knows", "./nowhere", "a/b/c", str(tmp_path / "missing/folder")):
        with pytest.raises(ValueError, match="no such folder or file.*--config FILE"):
            plan.model_config(name)
    with pytest.raises(ValueError, match=r"missing.json: cannot be read"):
        plan.model_config(tmp_path / "missing.json")
    for text, what in [("{", "Expecting property name"), ("[]", "not the config.json"), ('{"model_type": "gpt2"}', "gpt2")]:
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=r"bad.json: .*" + what):
            plan.model_config(tmp_path / "bad.json")
    assert len(asked) == 1  # of all these only someone/x could be on the hub


def test_plan_live_bytes_by_hand():
    def work():
        a = torch.ones(100_000)  # 400,000 bytes
        b = a + 1  # with it 800,000
        del a, b
        torch.ones(150_000)  # 600,000

    assert live_bytes(work) == pytest.approx(800_000, abs=64)  # numbers become tensors of a few bytes


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
    update(run, planned_samples(run, 1, 3, 3, 2, 4), 1e-6)
    return run


def planned_samples(run, problems, prompt, guided, shortest, longest):
    """Random groups of ragged responses, half of them right, each with a target."""
    rng, V = random.Random(0), run.model.config.vocab_size

    def ids(count):
        return [rng.randrange(2, V) for _ in range(count)]

    samples = []
    for p in range(problems):
        contexts = ids(prompt), ids(guided)
        groups = [
            [Trajectory(c, r, [-10.0] * len(r), True, p) for r in (ids(rng.randint(shortest, longest)) for _ in range(n))]
            for c, n in zip(contexts, (run.cfg.group_auto, run.cfg.group_guided), strict=True)
        ]
        rewards = [float(i % 2) for i in range(run.cfg.group_auto)]
        sample = sgpo.ProblemSamples(p, sgpo.Example(None, *contexts, None), *groups, rewards, [])
        sample.advantages = weighting.group_advantages(torch.tensor([rewards]))[0].tolist()
        sample.alpha, sample.targets = 0.5, [p % run.cfg.group_guided]
        samples.append(sample)
    return samples


SMALL_HEAD = dict(
    vocab_size=8192, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip

SMOL_CUT = dict(
    vocab_size=24576, hidden_size=576, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=9,
    num_key_value_heads=3, tie_word_embeddings=True,
)  # fmt: skip

PLANNED = {  # name: (shape, settings, problems)
    "d 256, V 8192": (SMALL_HEAD, dict(micro_tokens=512, chunk_tokens=64, dtype="float32", recompute=False), 1),
    "d 256, V 8192, bf16": (SMALL_HEAD, dict(micro_tokens=512, chunk_tokens=64, dtype="bfloat16", recompute=False), 1),
    "d 256, V 8192, 8 blocks, own head, recompute": (
        SMALL_HEAD | dict(num_hidden_layers=8, tie_word_embeddings=False),
        dict(micro_tokens=1024, chunk_tokens=32, dtype="float32", recompute=True), 1,
    ),
    "SmolLM2-135M, 2 of 30 blocks, half of V": (
        SMOL_CUT, dict(micro_tokens=256, chunk_tokens=64, dtype="float32", group_auto=4, recompute=False), 1,
    ),
}  # fmt: skip


def planned_job(run, ranks=1, shard_ranks=1):
    dtype = parallel.compute_dtype(run.cfg.dtype, CPU)
    return gpu_step.job_of(run.model, run.cfg, dtype, ranks=ranks, shard_ranks=shard_ranks)


def planned_sampling(run, samples):
    """(bytes predicted, bytes measured, largest moment) of sampling both groups and scoring the guided one."""
    prompts = [s.example.auto_ids for s in samples] + [s.example.guided_ids for s in samples]
    counts = [run.cfg.group_auto] * len(samples) + [run.cfg.group_guided] * len(samples)

    def sampling():
        settings = dict(temperature=1.0, top_p=1.0, eos_ids=[-1], seed=prompt_seeds(0, prompts))
        with parallel.whole_model(run.model) as policy:
            generate(policy, prompts, n=counts, max_new_tokens=6, max_rows=run.cfg.max_rows, **settings)
            sgpo.unguided_logprobs(run.cfg, policy, samples)

    pages = sum(kv_cache.pages_for(len(prompt)) + 2 for prompt in prompts) + min(run.cfg.max_rows, sum(counts))
    job = replace(planned_job(run), top_p=1.0)  # a CPU finds the nucleus by another way than a GPU
    name, total = gpu_step.predicted_sampling(job, samples, run.cfg, pages)
    return total - sum(plan.resident(job).values()), live_bytes(sampling), name


def planned_update(run, samples, ranks=1, shard_ranks=1):
    """The same of the update."""
    job = planned_job(run, ranks, shard_ranks)
    name, total = gpu_step.predicted_update(job, samples, run.cfg)
    return total - sum(plan.resident(job).values()), live_bytes(lambda: update(run, samples, 1e-6)), name


def print_planned(setting, part, predicted, measured, name):
    """A row of the table in results/plan.md."""
    figures = f"{predicted / 1e6:.1f} | {measured / 1e6:.1f} | {100 * (predicted / measured - 1):+.1f} %"
    print(f"| {setting} | {part}: {name} | {figures} |")


@pytest.mark.parametrize("setting", PLANNED)
def test_plan_predicts_the_measured_peak(setting):
    """Beyond weights and optimizer states, which are three fp32 numbers a parameter, so that those cannot hide an error."""
    shape, settings, problems = PLANNED[setting]
    run = planned_run(shape, **settings)
    samples = planned_samples(run, problems, 40, 100, 60, 120)
    state = [value for state in run.optimizer.state.values() for value in state.values() if value.dim()]
    resident = [parallel.whole_tensor(tensor) for tensor in (*run.model.parameters(), *state)]
    assert sum(tensor.nbytes for tensor in resident) == sum(plan.resident(planned_job(run)).values())
    assert all(parameter.grad is None for parameter in run.model.parameters())
    for part, measure in (("sampling", planned_sampling), ("update", planned_update)):
        predicted, measured, name = measure(run, samples)
        print_planned(setting, part, predicted, measured, name)
        assert abs(predicted / measured - 1) < 0.03, (part, name, predicted, measured)


WIDE_BLOCKS = SMALL_HEAD | dict(hidden_size=512, intermediate_size=2048, num_attention_heads=8, vocab_size=1024)


def rank_of_eight():
    """In a process of its own: one update of one rank of eight, the others left out of every exchange; with all eight sharing
    one copy of the weights, and with four."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    torch.set_num_threads(1)
    sgpo.apply_gradients = lambda model, optimizer, *_: optimizer.zero_grad() or 0.0  # what the others hold is not there
    for shard_ranks in (0, 4):
        settings = dict(micro_tokens=200, chunk_tokens=32, recompute=True, dtype="bfloat16", shard_ranks=shard_ranks)
        run = planned_run(WIDE_BLOCKS, group_auto=4, group_guided=1, **settings)
        samples = planned_samples(run, 1, 40, 100, 60, 120)
        print(json.dumps([shard_ranks or 8, *planned_update(run, samples, 8, shard_ranks or 8)]))


def test_plan_predicts_the_peak_of_one_rank_of_eight():
    done = run_script("-c", "from tests import test_plan; test_plan.rank_of_eight()")
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert [result[0] for result in results] == [8, 4]
    for shared_by, predicted, measured, name in results:
        print_planned(f"d 512, V 1024, bf16, recompute, {shared_by} of 8 ranks a copy", "update", predicted, measured, name)
        assert abs(predicted / measured - 1) < 0.03


def test_plan_of_the_largest_terms_by_hand():
    """Qwen2.5-7B on 8 GPUs, from the published shape: shards, whole weights, a page, activations, head chunks."""
    config = known_config("Qwen2.5-7B-Instruct")
    made = plan.make_plan(config, plan.Settings(recompute=True), gpus=8, gpu_memory=80)
    sampling, update = made.memory.sampling["decoding"], made.memory.update
    P, D, W, V, L = 7_615_616_512, 3584, 18944, 152064, 28
    assert sampling["weights, fp32 shard"] == pytest.approx(4 * P / 8, rel=1e-3)
    assert sampling["AdamW's two moments, fp32 shard"] == pytest.approx(8 * P / 8, rel=1e-3)
    assert sampling["whole weights in the compute dtype"] == 2 * P
    token = 2 * L * 4 * 128 * 2  # keys and values, layers, heads, width, bytes
    assert plan.page_bytes(config, 2) == 64 * token
    free = 76e9 - 12 * P / 8 - 2 * P
    assert sampling["KV cache"] == pytest.approx(0.9 * free, rel=1e-3)
    captured = 8 + 16 + 24 + 32 + 48 + 64 + 96 + 128 + 192  # sizes of a decode step up to 16 problems' 12 rows
    assert sampling["logits"] == V * (2 * captured + 192 * (2 + 4 + 4 + 8))
    head = update["loss at the head (policy loss)"]
    T = 200 + 16384  # a prompt and the longest response
    assert head["activations kept for the backward pass"] == T * L * D * 2
    assert head["chunks of logits"] == 4 * 256 * V * 4 and head["gradient of the head"] == V * D * 2
    assert head["embedding and head, gathered"] == (2 * V + 1) * D * 2
    kl = update["loss at the head (KL)"]
    tokens = 500 + 16384  # a micro-batch of 16384 counts both contexts and the response twice; one response is longer
    assert kl["hidden states of the guided pass"] == tokens * D * 2 and kl["chunks of logits"] == 6.5 * 256 * V * 4
    last = update["backward pass of block 28 of 28, in its MLP (policy loss)"]
    sequences = 5  # of 4096 tokens in T, the last one short; each looks at its prompt's keys again
    saved = 2 * (4 + 2 + 2) * D + 8 + 2 * D + 4 * 28 + 2 * D + 8 * W  # norms, queries and results, log-denominators, MLP
    keys = 2 * 512 * 2 * (T + sequences * 200)
    assert last["activations of the block at work"] == T * (saved + 2 * (2 * W + D)) + keys
    block = 2 * D * D + 2 * 512 * D + D + 2 * 512 + 3 * D * W + 2 * D
    assert last["blocks, gathered"] == 2 * 2 * block and last["gradients of a block"] == 2 * D * W
    kept = plan.make_plan(config, plan.Settings(recompute=False), gpus=8, gpu_memory=80)
    plain = kept.memory.update["loss at the head (policy loss)"]
    assert plain["activations kept for the backward pass"] == L * (T * saved + keys)
    for settings, longest in (({"sft_max_tokens": 20_000}, 20_000), ({"sft_max_tokens": 99_999}, 32_768),
                              ({"sft_max_tokens": 20_000, "sft_fraction": 0.0}, T)):  # fmt: skip
        update = plan.make_plan(config, plan.Settings(**settings), gpus=8, gpu_memory=80).memory.update
        kept = update["loss at the head (policy loss)"]["activations kept for the backward pass"]
        assert kept == longest * L * D * 2, settings


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 1.0), (1.0, 0.95), (0.7, 0.95)])
def test_plan_of_a_draw_is_what_it_takes(temperature, top_p, dtype, monkeypatch):
    """The logits, and all that is made of them on the way to a token, as on a GPU."""
    monkeypatch.setattr(rollout, "threshold_by_sorting", bisection_in_place_of_sorting)
    logits = torch.randn(16, 8192, dtype=getattr(torch, dtype))
    uniform = torch.rand(16, dtype=torch.float64)
    measured = logits.nbytes + live_bytes(lambda: rollout.sample(logits, uniform, temperature, top_p))
    settings = plan.Settings(temperature=temperature, top_p=top_p, dtype=dtype)
    config = ModelConfig.from_dict(dict(model_type="llama", rms_norm_eps=1e-5, max_position_embeddings=64) | SMALL_HEAD)
    job = replace(plan.job_of(plan.shape_of(config), settings, gpus=1), cuda=False)  # without captured steps
    moments = plan.sampling_moments(job, pages=0, rows=16, prefill_tokens=0, prompts=0, scored_tokens=0)
    assert moments["decoding"]["logits"] == pytest.approx(measured, rel=0.01)


def test_plan_of_each_method_samples_what_it_samples():
    def groups(method):
        return plan.groups_of(plan.Settings(method=method, problems_per_step=3), plan.Workload(), gpus=3)

    assert groups("sgpo") == groups("hinted") == [(200, 8), (500, 4)]
    assert groups("grpo") == groups("hpt") == [(200, 8)] and groups("luffy") == [(200, 7)]
    shape, long = plan.shape_of(known_config("Qwen2.5-7B-Instruct")), plan.Workload(solution_tokens=30_000)
    for method, tokens in (("luffy", 30_200), ("hpt", 30_200), ("sgpo", 16_584)):  # their updates have the solutions
        assert plan.passes_of(shape, plan.Settings(method=method), long)[0].tokens == tokens
    made = plan.make_plan(shape.config, plan.Settings(method="hinted"), gpus=8, gpu_memory=80)  # it has no target to find
    assert made.memory.sampling["scoring the guided trajectories"]["activations"] == 0


def test_plan_of_the_warm_up_by_hand():
    """8,500 problems, a third for SFT: 2,833, of which 283 are held out: 10 x 2,550 / 64 updates, 10 x 283 passes forward."""
    config = known_config("Qwen2.5-7B-Instruct")
    hardware = plan.Hardware(memory_bandwidth=1e30, link_in_node=1e30, flops=1e15, update_share=0.5, prefill_share=0.25)
    made = plan.make_plan(config, plan.Settings(), gpus=8, gpu_memory=80, hardware=hardware)
    one = plan.forward_flops(made.shape, [(0, 200 + 4096)], 4096)
    assert made.sft_s == pytest.approx(399 * 8 * 4 * one / 0.5e15 + 10 * 36 * one / 0.25e15)  # 64 / 8 and 283 / 8 a GPU
    none = plan.make_plan(config, plan.Settings(sft_validation=0.0), gpus=8, gpu_memory=80, hardware=hardware)
    assert none.sft_s == pytest.approx(443 * 8 * 4 * one / 0.5e15)


def test_plan_of_copies_and_of_offloading():
    config = known_config("Qwen2.5-1.5B-Instruct")

    def moment(part, name, **settings):
        made = plan.make_plan(config, plan.Settings(**settings), gpus=32, gpu_memory=80)
        return getattr(made.memory, part)[name]

    P = 1_543_714_304
    for shard_ranks in (0, 8):
        there = moment("update", "reduction of the root's gradients (KL)", shard_ranks=shard_ranks)
        assert there["gradients, fp32 shard"] == pytest.approx(4 * P / (shard_ranks or 32), rel=1e-2)
        assert there["AdamW's two moments, fp32 shard"] == 2 * there["gradients, fp32 shard"]
        assert (there["gradients summed over the copies"] > 0) == (shard_ranks == 8)
    assert not any("shard" in term for term in moment("sampling", "decoding", offload=True))
    assert sum(moment("update", "loss at the head (KL)", offload=True).values()) == pytest.approx(
        sum(moment("update", "loss at the head (KL)").values()) - 16 * P / 32, rel=1e-2
    )
    with pytest.raises(ValueError, match="--shard_ranks 3 does not divide the 32 GPUs"):
        moment("update", "", shard_ranks=3)


PLANS = [
    ("Qwen2.5-1.5B-Instruct", 8, {"recompute": False}),
    ("Qwen2.5-7B-Instruct", 8, {"recompute": False}),
    ("Llama-3.1-8B-Instruct", 8, {"recompute": True}),
    ("Llama-3.1-8B-Instruct", 32, {"recompute": True, "shard_ranks": 8}),
    ("Qwen2.5-7B-Instruct", 32, {"recompute": True, "max_new_tokens": 16384}),
]


@pytest.mark.parametrize("name, gpus, settings", PLANS)
def test_plan_largest_values_are_the_edge(name, gpus, settings):
    config, settings = known_config(name), plan.Settings(**settings)
    made = plan.make_plan(config, settings, gpus=gpus, gpu_memory=80)
    shape, workload, budget = plan.shape_of(config), plan.Workload(), 76e9
    if made.remedies:
        settings = made.remedies[0][0]

    def smooth(changed):
        memory = plan.memory_of(shape, changed, workload, gpus, budget)
        return not memory.refusals and memory.cache.room >= memory.cache.enough

    length = made.largest_response
    assert length % 64 == 0 and smooth(replace(settings, max_new_tokens=length))
    assert length > config.max_position_embeddings - 300 or not smooth(replace(settings, max_new_tokens=length + 64))
    many = replace(settings, problems_per_step=10_000 * gpus)  # more rows than fit: only --max_rows bounds them
    prompts = sum(kv_cache.pages_for(prompt) for prompt, _ in plan.groups_of(settings, workload, gpus))
    own = kv_cache.pages_for(min(settings.max_new_tokens, config.max_position_embeddings - 500))
    room = plan.memory_of(shape, many, workload, gpus, budget).cache.room
    assert prompts + made.largest_rows * own <= room < prompts + (made.largest_rows + 1) * own


TOO_LARGE = [  # model, GPUs, GB of one, settings, what helps
    ("Qwen2.5-7B-Instruct", 8, 80, {"recompute": False}, ["--recompute"]),  # activations, of one long response too
    ("Qwen2.5-7B-Instruct", 8, 80, {"recompute": False, "max_new_tokens": 8192, "sft_max_tokens": 8192},
     ["--recompute", "--micro_tokens N"]),
    ("Qwen2.5-7B-Instruct", 8, 50, {"recompute": True, "chunk_tokens": 8192}, ["--chunk_tokens N", "--offload"]),  # logits
    ("Qwen2.5-7B-Instruct", 8, 40, {"recompute": False}, ["--cache_tokens N --recompute"]),  # no place for the prompts either
    ("Qwen2.5-7B-Instruct", 8, 80, {"recompute": True, "shard_ranks": 1}, ["--shard_ranks N", "--offload"]),
    ("Qwen2.5-7B-Instruct", 1, 80, {"recompute": True}, ["--offload"]),
    ("Qwen2.5-7B-Instruct", 8, 80, {"recompute": True, "cache_tokens": 1024}, ["--cache_tokens N", "--max_new_tokens N"]),
]


@pytest.mark.parametrize("name, gpus, memory, settings, helps", TOO_LARGE)
def test_plan_remedies_are_remedies(name, gpus, memory, settings, helps):
    config, settings = known_config(name), plan.Settings(**settings)
    made = plan.make_plan(config, settings, gpus=gpus, gpu_memory=memory)
    assert made.memory.refusals and made.remedies
    text = plan.plan_text(config, settings, gpus=gpus, gpu_memory=memory)
    assert text.count("DOES NOT FIT") == len(made.memory.refusals)
    offered = re.findall(r"^  it fits with (.*)$", text, re.M)
    assert [re.sub(r"\d+", "N", line) for line in offered] == helps and len(offered) == len(made.remedies)
    for line, (changed, on) in zip(offered, made.remedies, strict=True):
        given = [f"--{'no-' * (v is False)}{f.name}" if isinstance(v, bool) else f"--{f.name}={v}"
                 for f in plan.dataclasses.fields(settings) for v in [getattr(settings, f.name)]]  # fmt: skip
        args = plan.parse_arguments(["--config", "x", *given, *line.split()])
        again = plan.Settings(**{f.name: getattr(args, f.name) for f in plan.dataclasses.fields(plan.Settings)})
        assert again == changed and (args.gpus if "--gpus" in line else gpus) == on
        assert not plan.make_plan(config, again, gpus=on, gpu_memory=memory).memory.refusals
    largest_term = re.search(r"the largest term: (.*), [\d.]+ GB$|the KV cache would hold", text, re.M)
    assert largest_term


def test_plan_of_a_training_command(capsys, monkeypatch):
    """train.py --plan: its own flags and plan.py's, no weights, no GPU; anything else is an error."""
    monkeypatch.setattr(train, "prepare", None)
    folder = str(TINY_BASE)
    flags = "--plan --gpus 4 --gpu_memory 24 --max_new_tokens 64 --mean_response 9 --prompt_tokens 30 --guided_prompt_tokens 60"
    train.main(["--model", folder, *flags.split()])
    text = capsys.readouterr().out
    assert "4 GPUs, 4 shards; 20.0 GB a GPU" in text and re.search(r"--max_new_tokens +64 ", text)
    assert re.search(r"--mean_response +9 ", text) and re.search(r"--problems_per_step +128 ", text)
    with pytest.raises(SystemExit):
        train.main(["--model", folder, "--plan", "--gpu", "4"])
    assert "unrecognized arguments: --gpu 4" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--shard_ranks 3 does not divide the 8 GPUs"):
        train.main(["--model", folder, *flags.replace("--gpus 4", "--gpus 8 --shard_ranks 3").split()])


def test_plan_says_where_nothing_helps():
    """An 8B model does not sample on a card of 16 GB: it stands there whole, in bf16."""
    config = known_config("Llama-3.1-8B-Instruct")
    text = plan.plan_text(config, plan.Settings(), gpus=8, gpu_memory=16)
    assert "DOES NOT FIT: sampling" in text and "nothing that train.py has a flag for" in text and "it fits with" not in text


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
        # the middle of what a step begins and ends with, where the planner's mean over steps lies
        seconds += 1 + 0.5 * len(alive) + 0.25 * sum(held + 0.5 for held, _ in alive)
        alive = [[held + 1, left - 1] for held, left in alive if left > 1]
    assert plan.decode_seconds(rows, places, lambda n, tokens: 1 + 0.5 * n + 0.25 * tokens) == pytest.approx(seconds)


def test_plan_exchanges_by_hand():
    hardware = plan.Hardware(link_in_node=100.0, link_between_nodes=10.0)
    assert plan.exchange_seconds(800.0, 1, hardware) == 0
    assert plan.exchange_seconds(800.0, 8, hardware) == pytest.approx(700 / 100)  # seven of eight parts come from others
    # two nodes: half of all comes from the other one, over the links of 8 GPUs at 10 bytes/s each
    assert plan.exchange_seconds(8000.0, 16, hardware) == pytest.approx(max(7000 / 100, 4000 / 80))
    slow = replace(hardware, link_between_nodes=1.0)
    assert plan.exchange_seconds(8000.0, 16, slow) == pytest.approx(4000 / 8)
    shape = plan.Shape(None, 100, 0, 0, 0, 0, rows=((1, 100),))
    job = plan.Job(shape, 2, 8, False, True, True, False, False, 1, 1.0, 1.0)
    seconds = plan.traffic_seconds(job, hardware, 8, gathers=3, reductions=2)
    assert list(seconds) == ["all-gathers", "reduce-scatters"]
    assert list(seconds.values()) == pytest.approx([3 * 200 * 7 / 8 / 100, 2 * 400 * 7 / 8 / 100])
    copies = plan.traffic_seconds(job, hardware, 32, gathers=0, reductions=1)  # and an all-reduce of 50 bytes over 4 copies
    assert copies["reduce-scatters"] == pytest.approx(400 * 7 / 8 / 100 + 2 * 50 * 3 / 4 / 10)
    offloaded = plan.traffic_seconds(replace(job, offload=True), replace(hardware, host_link=5.0), 8, gathers=3, reductions=2)
    assert offloaded["host link"] == pytest.approx(5 * 50 / 5)


def test_plan_time_of_a_step_by_hand():
    """One problem, one row of 100 tokens, nothing but bandwidth: 100 steps that read the weights and a growing cache."""
    config = known_config("Qwen2.5-7B-Instruct")
    settings = plan.Settings(method="grpo", group_auto=1, problems_per_step=8, max_new_tokens=100, recompute=True)
    workload = plan.Workload(mean_response=100.0)
    hardware = plan.Hardware(memory_bandwidth=1e12, decode_share=0.5, decode_overhead=0.001, flops=1e30)
    made = plan.make_plan(config, settings, gpus=8, gpu_memory=80, workload=workload, hardware=hardware)
    weights = 2 * (7_615_616_512 - 152064 * 3584)  # without the embedding
    cache = 57344 * (100 * 200 + 100 * 100 / 2)
    assert made.sampling["decoding"] == pytest.approx(100 * (weights / 5e11 + 0.001) + cache / 5e11)
    assert made.steps == math.ceil(10 * 5667 / 8) and made.step_tokens == 8 * 100
    assert made.hours == pytest.approx((made.sft_s + made.steps * made.step_s) / 3600)
    slow = replace(hardware, memory_bandwidth=1e30, flops=1e12, update_share=0.5, link_in_node=1e30, decode_share=1.0)
    made = plan.make_plan(config, settings, gpus=8, gpu_memory=80, workload=workload, hardware=slow)
    blocks = 2 * (7_615_616_512 - 2 * 152064 * 3584) * 300  # to 0.1 %: norms and biases are not multiplied
    attention = 4 * 3584 * 28 * (200 * 201 / 2 + 100 * 200 + 100 * 101 / 2)
    head = 2 * 152064 * 3584 * 100
    assert made.update["update"] == pytest.approx((4 * (blocks + attention) + 3 * head) / 5e11, rel=1e-3)


@pytest.mark.parametrize("name", ["Qwen2.5-1.5B-Instruct", "Qwen2.5-7B-Instruct", "Llama-3.1-8B-Instruct"])
@pytest.mark.parametrize("gpus", [8, 32])
def test_plan_command_line_says_all(name, gpus, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(plan.KNOWN[name]))
    plan.main(["--config", str(tmp_path), "--gpus", str(gpus), "--recompute"])
    text = capsys.readouterr().out
    assert f"{PUBLISHED[name][0]:,} parameters" in text and f"{gpus} GPUs, {gpus} shards" in text
    for words in (
        "sampling, ", "update, ", "KV cache", "fits", "longest --max_new_tokens", "most rows at once", "seconds of a step",
        "decoding", "GPU hours", "about 17 hours", "not measured on a GPU", "--decode_share", "assumed",
    ):  # fmt: skip
        assert words in text, words
    for field in itertools.chain(*map(plan.dataclasses.fields, (plan.Settings, plan.Workload, plan.Hardware))):
        assert f"--{field.name} " in text  # every assumption is printed


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--gpus", "0"], "--gpus 0: must be positive"),
        (["--gpus", "12"], "--gpus 12: nodes of 8 GPUs are taken whole"),
        (["--micro_tokens", "0"], "--micro_tokens 0: must be positive"),
        (["--group_guided", "0"], "--group_guided 0: must be positive"),
        (["--method", "sft"], "--method sft: only methods that sample"),
        (["--dtype", "half"], "--dtype half"),
        (["--reserve_gb", "90"], "--reserve_gb 90"),
        (["--sft_fraction", "1"], "--sft_fraction 1"),
        (["--prompt_tokens", "40000"], "no room in a context of 32768"),
        (["--shard_ranks", "5"], "--shard_ranks 5 does not divide"),
        (["--mean_response", "nan"], "--mean_response nan: must be positive"),
    ],
)
def test_plan_bad_settings_are_errors(flags, words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(plan.KNOWN["Qwen2.5-7B-Instruct"]))
    with pytest.raises(SystemExit, match=re.escape(words)):
        plan.main(["--config", str(tmp_path), *flags])


@pytest.mark.parametrize("flags", [["--micro_token", "5"], ["--model", "y"], []])
def test_plan_typo_is_an_error(flags):
    with pytest.raises(SystemExit):
        plan.parse_arguments([*(["--config", "x"] if flags else []), *flags])
