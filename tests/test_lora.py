"""Adapters against dense updates, the plain model, peft, and runs of several ranks or in several pieces."""

import copy
import json
import os
import shutil
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import checkpoint
import lora
import parallel
import sgpo
import train
from loss import chunked_head, sft_terms
from model import ModelConfig, build_model
from tests.common import CPU, FAMILIES, TINY_BASE, fake_samples, make_run, random_ids, read_metrics, update
from tests.test_checkpoint import same_run
from tests.test_plan import job_for
from tools import export, plan

RANK, ALPHA = 3, 5.0


def base_and_adapted(family="qwen2", dtype=torch.float32):
    """(a model whose every weight matters, the same with adapters whose B is not zero)."""
    generator = torch.Generator().manual_seed(0)
    base = build_model(ModelConfig.from_dict(FAMILIES[family].to_dict()), generator=generator, dtype=dtype, device=CPU)
    for parameter in base.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(dtype)
    adapted = copy.deepcopy(base)
    lora.add_adapters(adapted, rank=RANK, alpha=ALPHA, dtype=dtype)
    first = dict(lora.initial_adapters(adapted, generator))
    first = {name: values + 0.1 * torch.randn(values.shape, generator=generator) for name, values in first.items()}
    assert not adapted.load_state_dict(first, strict=False).unexpected_keys
    return base, adapted


def merged(adapted):
    return parallel._rebuilt(adapted, {name: weight.detach().clone() for name, weight in adapted.named_parameters()})


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama-biases"])
def test_gradients_are_those_of_a_dense_update_in_the_low_rank_form(family):
    """dB = scale dW A^T and dA = scale B^T dW, with dW by autograd on a plain model of the merged weights."""
    _, adapted = base_and_adapted(family)
    dense, ids, (targets,) = merged(adapted).requires_grad_(True), random_ids(1, 12), random_ids(1, 12, seed=1)
    terms = partial(sft_terms, temperature=1.0)
    adapted.model.recompute = family == "qwen3"
    for net in (dense, adapted):
        head = partial(chunked_head, terms=terms, inputs=(targets, torch.ones(12)), chunk_tokens=5, at=torch.arange(12))
        net(ids, head=head)[0].backward()
    weights, layers = dict(adapted.named_parameters()), [name for name, _ in dense.named_parameters() if "proj.weight" in name]
    assert len(layers) == 7 * 2
    for name in layers:
        A, B = (weights[name.replace("weight", part)] for part in ("lora_A", "lora_B"))
        dW = dense.get_parameter(name).grad
        for got, want in ((B.grad, ALPHA / RANK * dW @ A.T), (A.grad, ALPHA / RANK * B.T @ dW)):
            assert want.abs().max() > 1e-3 and (got - want).abs().max() <= 2e-5 * want.abs().max(), name
    trained = {name for name, weight in weights.items() if weight.grad is not None}
    assert trained == set(parallel.trained(adapted)) and len(trained) == 2 * len(layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_start_as_the_base_and_merge_into_it(dtype):
    """To the bit if B is zero. Else merged logits differ by rounding: 1e-5 of the largest in fp32, 5 % in bf16, where the
    adapters move them by half of it and more."""
    base, adapted = base_and_adapted(dtype=dtype)
    ids = random_ids(2, 20)
    with torch.no_grad():
        want, got, plain = base(ids), adapted(ids), merged(adapted)(ids)
        largest = got.abs().max()
        assert (got - plain).abs().max() <= (1e-5 if dtype == torch.float32 else 0.05) * largest
        assert (got - want).abs().max() > 0.5 * largest
        adapted.load_state_dict(dict(lora.initial_adapters(adapted, torch.Generator())), strict=False)
        assert torch.equal(adapted(ids), want) and torch.equal(merged(adapted)(ids), want)
    first = lora.initial_adapters(adapted, torch.Generator())
    values = torch.cat([A.flatten() * A.shape[1] ** 0.5 for name, A in first if name.endswith("lora_A")])
    assert values.abs().max() <= 1 and abs(values.mean()) < 0.05 and abs(values.std() - 3**-0.5) < 0.02  # uniform


def test_a_change_below_the_spacing_of_bf16_is_kept_on_average():
    """In rows whose width is a power of two, too. Rounded to the nearest, 8 % of it would be kept."""
    generator = torch.Generator().manual_seed(0)
    W = (0.02 * torch.randn(400, 512, generator=generator)).bfloat16().float()
    change = 2e-6 * torch.randn(400, 1, generator=generator) @ torch.randn(1, 512, generator=generator)
    rounded = lora.round_to(torch.bfloat16, W + change)
    assert rounded.dtype == torch.bfloat16
    assert abs(((rounded.float() - W) * change).sum() / change.square().sum() - 1) < 0.1
    assert torch.equal(lora.round_to(torch.bfloat16, W).float(), W)
    assert lora.round_to(torch.bfloat16, torch.full((99,), 2**31 - 1, dtype=torch.int32).view(torch.float32)).isnan().all()


def test_the_adapters_alone_are_trained_and_sampling_has_the_merged_weights(tmp_path, worker):
    """What is saved has the bits that sampled."""
    run, examples = make_run(tmp_path, worker, "--lora_rank", RANK, "--dtype", "bfloat16", "--recompute")
    first = {name: parallel.whole_tensor(weight.detach()).clone() for name, weight in run.model.named_parameters()}
    for _ in range(3):
        update(run, fake_samples(run, examples), 0.01)
    with parallel.whole_model(run.model) as policy:
        sampled = {name: weight.clone() for name, weight in policy.named_parameters()}
    for name, weight in run.model.named_parameters():
        moved, adapts = not torch.equal(parallel.whole_tensor(weight.detach()), first[name]), "lora" in name
        assert moved == adapts and weight.dtype == (torch.float32 if adapts else torch.bfloat16), name
    assert len(run.optimizer.state) == 2 * 7 * run.model.config.num_hidden_layers
    for name, saved in parallel.model_on_host(run.model, torch.bfloat16).named_parameters():
        assert torch.equal(saved, sampled[name])
        assert torch.equal(saved, first[name]) == (not name.endswith("proj.weight")), name


@pytest.fixture(scope="module")
def finished(resumed, tmp_path_factory):
    """(flags, folder) of a run with SFT and RL on a base model of its own."""
    base = tmp_path_factory.mktemp("lora") / "base"
    shutil.copytree(TINY_BASE, base)
    flags = [*resumed, "--model", str(base), "--lora_rank", str(RANK), "--recompute", "--max_new_tokens", "32"]
    flags += ["--eval_max_new_tokens", "32", "--learning_rate", "3e-3", "--sft_learning_rate", "1e-2"]
    out = base.parent / "run"
    train.main([*flags, "--checkpoint_minutes", "0", "--out", str(out)])
    return flags, out


def test_a_stopped_run_with_adapters_goes_on_as_if_it_had_not(finished, tmp_path, monkeypatch):
    (flags, whole), out = finished, tmp_path / "run"
    monkeypatch.setattr(train, "step_line", lambda *given: os.kill(os.getpid(), signal.SIGTERM) or sgpo.step_line(*given))
    train.main([*flags, "--checkpoint_minutes", "1e9", "--out", str(out)])  # which the first step of RL stops
    assert not (out / "model").exists()
    monkeypatch.undo()
    train.main(["--out", str(out), "--resume"])
    same_run(whole, out)
    steps = [record for record in read_metrics(whole) if record.get("stage") == "sgpo"]
    assert all(0 < step["first_logprob_error"] < 1e-3 for step in steps)  # the merged weights sample what the adapters score
    adapters = [load_file(folder / "model/adapter/adapter_model.safetensors") for folder in (whole, out)]
    assert all(torch.equal(values, adapters[1][name]) for name, values in adapters[0].items())


def test_a_checkpoint_holds_the_adapters_and_goes_with_its_base_alone(finished, tmp_path):
    _, out = finished
    files = sorted((out / "checkpoints").iterdir())[-1].glob("*.safetensors")
    adapters = load_file(out / "model/adapter/adapter_model.safetensors")
    names = [name.removeprefix("base_model.model.").removesuffix(".weight") for name in adapters]
    kinds = [f"{kind}.{name}" for kind in ("weight", *checkpoint.MOMENTS) for name in names]
    assert sorted(name for file in files for name in load_file(file)) == sorted(kinds)
    export.main([str(out), "--out", str(tmp_path / "model")])
    assert (tmp_path / "model/model.safetensors").read_bytes() == (out / "model/model.safetensors").read_bytes()
    file = out.parent / "base/model.safetensors"
    right = file.read_bytes()
    save_file({name: tensor + 0.01 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(SystemExit, match="base/model.safetensors: '"):
        export.main([str(out), "--out", str(tmp_path / "other")])
    with pytest.raises(SystemExit, match="base/model.safetensors: '"):
        train.main(["--out", str(out), "--resume", "--steps", "4"])
    file.write_bytes(right)


def test_peft_computes_the_same_with_the_saved_adapter(finished):
    peft = pytest.importorskip("peft")
    _, out = finished
    ids = random_ids(2, 30) % 50
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)(ids).logits
        base = AutoModelForCausalLM.from_pretrained(out.parent / "base", dtype=torch.float32)
        before = base(ids).logits
        theirs = peft.PeftModel.from_pretrained(base, out / "model/adapter")(ids).logits
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()
    assert (ours - before).abs().max() > 1e-2 * ours.abs().max()
    config = json.loads((out / "model/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(out.parent / "base")


def test_the_learning_rates_of_adapters_are_ten_times_the_others_unless_they_are_given(tmp_path):
    given = ["--model", "x", "--data", "y", "--lora_rank", "8", "--learning_rate", "1e-6"]
    for flags, rates in ((given[:-2], (1e-5, 1e-4)), (given, (1e-6, 1e-4))):
        cfg = train.parse_config(flags)
        assert (cfg.learning_rate, cfg.sft_learning_rate) == rates
        (tmp_path / "metrics.jsonl").write_text(json.dumps({"config": {**vars(cfg), "out": str(tmp_path)}}) + "\n")
        assert train.parse_config(["--out", str(tmp_path), "--resume"]) == replace(cfg, out=str(tmp_path), resume=True)
    assert train.parse_config(["--lora_rank", "8"]).learning_rate == 1.5e-3  # the tiny world's
    assert train.parse_config(given[:4]).learning_rate == 1e-6


def test_the_plan_of_7b_with_adapters_fits_one_card():
    """Its terms are measured in tests/test_plan.py."""
    job, weights, adapters = job_for("Qwen2.5-7B-Instruct", gpus=1, lora_rank=16), 7_615_616_512, 40_370_176  # peft prints this
    assert sum(plan.resident(job).values()) == 2 * weights + 12 * adapters
    assert sum(plan.resident(replace(job, gpus=2)).values()) == weights + 6 * adapters
    assert plan.fits(job) and not plan.fits(job.changed(lora_rank=0))
    # what a block's matrices took for their gradients is saved
    assert 0.6 < plan.update_seconds(job) / plan.update_seconds(job.changed(lora_rank=0)) < 0.8
