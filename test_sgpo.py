"""The tests of SGPO: python -m pytest -q, no network, no GPU.

Everything is checked against something we did not write (transformers' logits, autograd, slow loops) or worked out by hand.
Sections: model, rollout, loss, weighting, tiny world, training, ranks, checkpoints, strategy, grader, starter set,
prepare, recipe, plan, bench, sweep, report.
"""

import ast
import csv
import email.utils
import functools
import hashlib
import http.server
import importlib.util
import inspect
import itertools
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import xml.etree.ElementTree
from collections import Counter
from dataclasses import replace
from datetime import datetime
from fractions import Fraction
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

import bench
import checkpoint
import eval as grading
import faults
import grader
import kv_cache
import loss as losses
import methods
import model as models
import parallel
import plan
import report
import rollout
import sgpo
import stats
import strategy as strategy_module
import sweep
import train
import weighting
from data import hard_world, prepare, tiny_world
from eval import load_problems, summarise
from grader import MathWorker, extract_answer, is_correct, same_answer
from model import CausalLM, ModelConfig, blank_model, build_model, encode_chat, load_model, save_model
from rollout import Trajectory, generate, micro_batches, pack
from strategy import (
    CRITERIA,
    INSTRUCTION,
    Strategy,
    auto_messages,
    extraction_prompt,
    format_strategy,
    guided_messages,
    parse_scores,
    parse_strategy,
    scoring_prompt,
)
from tools import extract, gpu_step

ROOT = Path(__file__).resolve().parent
CPU = torch.device("cpu")
TINY_BASE = ROOT / "data/tiny/base"
REAL_DATA = os.environ.get("SGPO_TEST_DATA")  # a folder of published data that is not part of the project (fixture real_data)


@pytest.fixture(scope="session")
def real_data():
    """{sha256: path} of the files below $SGPO_TEST_DATA, whatever their names: those of prepare.SOURCES, and GRADER_PAIRS."""
    if not REAL_DATA:
        pytest.skip("reads published data that is not part of the project: set SGPO_TEST_DATA to a folder with it (README)")
    return {prepare.sha256_of(path): path for path in sorted(Path(REAL_DATA).rglob("*")) if path.is_file()}


# ---------------------------------------------------------------------------------------------------- model

SMALL = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
    eos_token_id=3,
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}
FAMILIES = {
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=False, rope_theta=1e6),
    "qwen2-tied": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True),
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=False),
    "llama3-rope": LlamaConfig(**SMALL, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    "llama-biases": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "smollm2-shape": LlamaConfig(**{**SMALL, "num_attention_heads": 3, "num_key_value_heads": 1}, tie_word_embeddings=True),
}


@pytest.fixture(scope="module", params=FAMILIES)
def reference(request, tmp_path_factory):
    """(transformers' model, ours, folder), with weights so large that every term matters and no norm or bias at its default."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(FAMILIES[request.param]).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    theirs.save_pretrained(folder)
    config = ModelConfig.from_folder(folder)
    ours = models.CausalLM(config)
    models.load_weights(ours, folder, dtype=torch.float32, device=CPU)
    return theirs, ours, folder


def random_ids(rows, length, seed=0):
    return torch.randint(4, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_logits_equal_transformers(reference):
    theirs, ours, _ = reference
    ids = random_ids(3, 50)  # beyond llama3's original context of 32, where its scaling shows
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_left_padded_equals_transformers(reference):
    theirs, ours, _ = reference
    ids = random_ids(2, 12)
    pads = [5, 0]
    positions = torch.stack([torch.arange(12) - pad for pad in pads]).clamp(min=-1)
    mask = (positions >= 0).long()
    want = theirs(ids, attention_mask=mask, position_ids=positions.clamp(min=0)).logits
    got = ours(ids, positions)
    for row, pad in enumerate(pads):
        torch.testing.assert_close(got[row, pad:], want[row, pad:], atol=1e-4, rtol=1e-4)
        alone = theirs(ids[row : row + 1, pad:]).logits[0]
        torch.testing.assert_close(got[row, pad:], alone, atol=1e-4, rtol=1e-4)


def varlen_by_loops(q, k, v, q_starts, k_starts, longest_q, longest_k, window_size, enable_gqa=True):
    """torch.nn.attention.varlen.varlen_attn as documented: (-1, 0) is causal, a sequence's last query sees all of its keys."""
    assert window_size == (-1, 0) and enable_gqa and q.dim() == k.dim() == 3
    spans = [list(itertools.pairwise(starts.tolist())) for starts in (q_starts, k_starts)]
    assert spans[0][-1][1] == len(q) and spans[1][-1][1] == len(k) == len(v)
    assert [max(b - a for a, b in span) for span in spans] == [longest_q, longest_k]
    out = []
    for (qa, qb), (ka, kb) in zip(*spans, strict=True):
        mask = torch.ones(qb - qa, kb - ka, dtype=torch.bool).tril(kb - ka - (qb - qa))
        q_, k_, v_ = (x.transpose(0, 1) for x in (q[qa:qb], k[ka:kb], v[ka:kb]))
        out.append(F.scaled_dot_product_attention(q_, k_, v_, attn_mask=mask, enable_gqa=True).transpose(0, 1))
    return torch.cat(out)


def varlen_of_torch_2_11(q, k, v, q_starts, k_starts, longest_q, longest_k, window_size):
    assert q.shape[1] == k.shape[1]  # it does not document that heads may be shared
    return varlen_by_loops(q, k, v, q_starts, k_starts, longest_q, longest_k, window_size)


@pytest.fixture(params=["sequences", "varlen", "varlen of torch 2.11"])
def packed_way(request, monkeypatch):
    """Packed attention one call a sequence, and in one variable-length call, PyTorch's kernel replaced by a slow loop."""
    if request.param != "sequences":
        loops = varlen_by_loops if request.param == "varlen" else varlen_of_torch_2_11
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", loops)
        monkeypatch.setattr(models, "packed_kernel", lambda *_: models.varlen_kernel())


def test_a_kernel_with_another_diagonal_is_not_taken():
    def from_the_first_key(q, k, v, q_starts, k_starts, *longest):
        out = []
        for (qa, qb), (ka, kb) in zip(itertools.pairwise(q_starts), itertools.pairwise(k_starts), strict=True):
            parts = (x.transpose(0, 1) for x in (q[qa:qb], k[ka:kb], v[ka:kb]))
            out.append(F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True).transpose(0, 1))
        return torch.cat(out)

    def missing(*_):
        raise RuntimeError("no kernel image is available for execution on the device")

    shape = (CPU, torch.float32, 6, 2, 16)
    assert models.kernel_is_right(partial(varlen_by_loops, window_size=(-1, 0)), *shape)
    assert not models.kernel_is_right(from_the_first_key, *shape)
    assert not models.kernel_is_right(missing, *shape)
    assert models.packed_kernel(*shape) is None  # it would need CUDA


@torch.no_grad()
@pytest.mark.usefixtures("packed_way")
def test_packed_equals_each_sequence_alone(reference):
    theirs, ours, _ = reference
    lengths = [7, 1, 19]
    ids = random_ids(1, sum(lengths))
    got = ours(ids, lengths=lengths)[0]
    want = torch.cat([theirs(part).logits[0] for part in ids.split(lengths, dim=1)])
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def fill_cache(net, prompts, members, pages):
    """A cache with these prompts, `members` rows reading each of them: (cache, rows, the logits of the prompts' tokens)."""
    cache = kv_cache.PagedCache(net.config, pages, dtype=torch.float32, device=CPU)
    cache.store[:] = math.nan  # memory that was never written may hold anything
    entries = [cache.allocate_prompt(len(prompt)) for prompt in prompts]
    logits = net(torch.tensor([sum(prompts, [])]), lengths=[len(p) for p in prompts], cache=cache.prefill(entries))
    rows = []
    for p, entry in enumerate(entries):
        for _ in range(members):
            rows.append(rollout.Row(p, 0, prompts[p], 99, np.random.default_rng(0)))
            cache.add_row(rows[-1], entry)
    return cache, rows, logits


def decode_step(net, cache, rows, tokens):
    for row in rows:
        if row.needs_page:
            cache.allocate(row)
    positions = torch.tensor([[row.prompt.length + row.written] for row in rows])
    logits = net(torch.tensor(tokens)[:, None], positions, cache=cache.decode(rows))[:, 0]
    for row, token in zip(rows, tokens, strict=True):
        row.written += 1
        row.response_ids.append(token)
    return logits


@torch.no_grad()
@pytest.mark.parametrize("page", [1, 4, 64])
def test_paged_decoding_equals_transformers(reference, page, monkeypatch):
    """Ragged prompts, groups of two, rows that leave while others go on (so that pages move), and one that comes later."""
    theirs, ours, _ = reference
    monkeypatch.setattr(kv_cache, "PAGE", page)
    prompts = [random_ids(1, n, seed=n)[0].tolist() for n in (3, 9, 4)]
    cache, rows, logits = fill_cache(ours, prompts, members=2, pages=200)
    want = torch.cat([theirs(torch.tensor([prompt])).logits[0] for prompt in prompts])
    torch.testing.assert_close(logits[0], want, atol=1e-4, rtol=1e-4)
    draw = random.Random(0)
    for step in range(12):
        if step in (2, 5, 9):  # a member of the first group, its other member (and so its prompt), the last row
            cache.free(rows.pop({2: 1, 5: 0, 9: -1}[step]))
        if step == 7:  # a newcomer reads the second prompt
            rows.append(rollout.Row(1, 0, prompts[1], 99, np.random.default_rng(0)))
            cache.add_row(rows[-1], rows[0].prompt)
        got = decode_step(ours, cache, rows, [draw.randrange(4, 97) for _ in rows])
        for b, row in enumerate(rows):
            want = theirs(torch.tensor([row.prompt_ids + row.response_ids])).logits[0, -1]
            torch.testing.assert_close(got[b], want, atol=1e-4, rtol=1e-4)
        owned = sum(kv_cache.pages_for(row.written) for row in rows) + sum(
            kv_cache.pages_for(prompt.length) for prompt in {row.prompt for row in rows}
        )
        assert cache.free_pages == 200 - owned  # nothing is leaked and nothing is taken twice
    for row in rows:
        cache.free(row)
    assert cache.free_pages == 200 and not cache.response_owners and not cache.prompt_owners


@torch.no_grad()
def test_a_full_cache_is_an_error(small_model):
    cache, rows, _ = fill_cache(small_model, [[5, 6, 7]], members=2, pages=3)
    decode_step(small_model, cache, rows, [8, 9])
    with pytest.raises(RuntimeError, match="all 3 pages of the KV cache are taken"):
        cache.allocate(rows[0])


@torch.no_grad()
def test_paged_attention_kernel():
    """The Triton kernel against a loop over keys picked one by one: on a GPU, or in Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed (torch's CUDA builds bring it)")
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", "import test_sgpo; test_sgpo.check_paged_attention_kernel()"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **interpret}, check=True, timeout=600)


def check_paged_attention_kernel():  # in a process of its own: Triton reads TRITON_INTERPRET when it is imported
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prompt, own = torch.tensor([1, 16, 17, 33, 0]), torch.tensor([1, 5, 16, 10, 20])
    tolerances = {torch.float32: 1e-5, torch.float16: 4e-3}
    if device.type == "cuda":  # the interpreter cannot multiply bf16
        tolerances[torch.bfloat16] = 3e-2
    for dtype, tolerance in tolerances.items():
        for H, K, E in ((6, 2, 16), (9, 3, 64), (4, 4, 32), (12, 1, 128)):
            generator = torch.Generator().manual_seed(0)
            q = torch.randn(5, H, E, generator=generator).to(dtype)
            kv = torch.randn(2, 23, K, 16, E, generator=generator).to(dtype)
            table = torch.randperm(23, generator=generator)[:20].view(5, 4).int()
            want = gathered_attention(q.double(), kv.double(), table, prompt, own)
            used = torch.zeros(23, 16, dtype=torch.bool)
            for b in range(5):
                for start, length in ((0, prompt[b]), (-(-prompt[b] // 16), own[b])):
                    for t in range(length):
                        used[table[b, start + t // 16], t % 16] = True
            kv.transpose(2, 3)[:, ~used] = math.nan  # what holds no token is never read
            arguments = [x.to(device) for x in (q, kv, table, prompt, own)]
            for splits in (1, 3, 8):
                got = kv_cache.paged_attention(*arguments, splits).cpu()
                torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)


def test_page_attention_without_the_cpu_kernel():
    q, k, v = torch.randn(3, 5, 2, 4, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    mask = torch.zeros(5, 1, 1, 4)
    mask[0, ..., 2:] = mask[3, ..., 1:] = -math.inf
    out, lse = kv_cache.page_attention(q, k, v, mask)
    meta = SimpleNamespace(type="other")

    class Elsewhere(torch.Tensor):
        device = meta

    other_out, other_lse = kv_cache.page_attention(q.as_subclass(Elsewhere), k, v, mask)
    torch.testing.assert_close(other_out.as_subclass(torch.Tensor), out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other_lse.as_subclass(torch.Tensor), lse, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=mask), atol=1e-5, rtol=1e-5)


def test_gradients_equal_transformers(reference):
    theirs, ours, _ = reference
    ids = random_ids(2, 10)
    for net in (theirs, ours):
        net.zero_grad()
    theirs(ids).logits.square().mean().backward()
    ours(ids).square().mean().backward()
    want = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name].grad, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_saved_folder_loads_in_transformers_and_here(reference, tmp_path):
    theirs, ours, _ = reference
    tokenizer = tiny_world.build_tokenizer()
    ids = random_ids(1, 9)
    save_model(ours, tokenizer, tmp_path / "whole")
    save_model(ours, tokenizer, tmp_path / "sharded", max_shard_bytes=60_000)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    for folder in (tmp_path / "whole", tmp_path / "sharded"):
        again, reloaded_tokenizer = load_model(str(folder), dtype=torch.float32, device="cpu")
        torch.testing.assert_close(again(ids), ours(ids), atol=0, rtol=0)
        reloaded = AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(reloaded(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)
        assert reloaded.generation_config.eos_token_id in (3, [3])
        assert (
            reloaded_tokenizer.chat_template == tokenizer.chat_template == AutoTokenizer.from_pretrained(folder).chat_template
        )
        assert again.config.eos_ids[0] == 3


def test_loading_in_bf16_keeps_rotary_angles_in_fp32(tmp_path):
    config = ModelConfig.from_dict(FAMILIES["qwen2"].to_dict())
    net = build_model(config, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16, device=CPU)
    assert net.inv_freq.dtype == torch.float32 and net(random_ids(1, 4)).dtype == torch.bfloat16


def test_every_eos_id_is_kept(tmp_path):
    raw = {**FAMILIES["qwen2"].to_dict(), "eos_token_id": 7}
    assert ModelConfig.from_dict(raw, {"eos_token_id": [5, 7, 9]}).eos_ids == (5, 7, 9)


def write_model(folder, net):
    save_model(net, tiny_world.build_tokenizer(), folder)
    return folder


@pytest.fixture(scope="module")
def small_model():
    return build_model(
        ModelConfig.from_dict(FAMILIES["qwen2"].to_dict()),
        generator=torch.Generator().manual_seed(1),
        dtype=torch.float32,
        device=CPU,
    )


def test_broken_checkpoints_name_the_file(small_model, tmp_path):
    def copy(name):
        return write_model(tmp_path / name, small_model)

    def edit_config(folder, **changes):
        config = json.loads((folder / "config.json").read_text())
        config.pop("layer_types")  # transformers checks it against the number of layers when it loads the tokenizer
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    folder = copy("truncated")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model.safetensors: broken or truncated"):
        load_model(str(folder), dtype=torch.float32, device="cpu")
    folder = copy("garbage")
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"model.safetensors: broken or truncated"):
        load_model(str(folder), dtype=torch.float32, device="cpu")
    folder = copy("no-weights")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model.safetensors: missing"):
        load_model(str(folder), dtype=torch.float32, device="cpu")
    folder = copy("unknown")
    edit_config(folder, model_type="mamba")
    with pytest.raises(ValueError, match=r"config.json: unsupported architecture model_type='mamba'; supported: qwen2"):
        load_model(str(folder), dtype=torch.float32, device="cpu")
    folder = copy("shape")
    edit_config(folder, intermediate_size=88)
    with pytest.raises(ValueError, match=r"model.safetensors: .* has shape"):
        load_model(str(folder), dtype=torch.float32, device="cpu")
    folder = copy("more-layers")
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"tensors are missing from its weights, the first is 'model.layers.2"):
        load_model(str(folder), dtype=torch.float32, device="cpu")
    folder = copy("fewer-layers")
    edit_config(folder, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"has no place in a qwen2 model"):
        load_model(str(folder), dtype=torch.float32, device="cpu")
    folder = copy("no-tokenizer")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer file"):
        load_model(str(folder), dtype=torch.float32, device="cpu")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer could not be loaded"):
        load_model(str(folder), dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match=r"no config.json"):
        load_model(str(tmp_path), dtype=torch.float32, device="cpu")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True, "sliding_window": 16}, "sliding-window"),
        ({"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
    ],
)
def test_configs_that_would_be_computed_wrongly_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict({**FAMILIES["qwen2"].to_dict(), **change})


def test_bare_names_resolve_to_their_family(monkeypatch, tmp_path):
    asked = []

    def download(repo, **options):
        assert "*.py" in options["ignore_patterns"] and not any("bin" in p or p == "*" for p in options["allow_patterns"])
        asked.append(repo)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for name in ("Qwen2.5-7B-Instruct", "Qwen3-0.6B", "Llama-3.1-8B-Instruct", "SmolLM2-135M-Instruct", "other/thing"):
        models.resolve_model(name)
    assert asked == [
        "Qwen/Qwen2.5-7B-Instruct",
        "Qwen/Qwen3-0.6B",
        "meta-llama/Llama-3.1-8B-Instruct",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "other/thing",
    ]
    assert models.resolve_model(str(tmp_path)) == tmp_path  # an existing folder wins
    for name in ("gpt-17", "./not/here", "a/b/c"):
        with pytest.raises(ValueError, match="no such folder"):
            models.resolve_model(name)
    assert len(asked) == 5


def test_encode_chat_needs_a_template():
    tokenizer = tiny_world.build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        encode_chat(tokenizer, auto_messages("A kalo machine gets 1 and 2. What comes out?"))


# ------------------------------------------------------------------------------------------------ hostile model folders


@pytest.fixture
def hostile_model(small_model, tmp_path):
    """(edit, canary): edit(file, **fields) adds fields to a JSON file of a good model folder and gives the folder."""
    folder = write_model(tmp_path / "model", small_model)
    config = json.loads((folder / "config.json").read_text())
    config.pop("layer_types")
    (folder / "config.json").write_text(json.dumps(config))

    def edit(file, **fields):
        path = folder / file
        content = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(content | fields))
        return folder

    return edit, tmp_path / "canary"


CUSTOM_CODE = {
    "config.json": {"auto_map": {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"}},
    "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["custom.Tokenizer", None]}, "tokenizer_class": "Tokenizer"},
    "preprocessor_config.json": {"auto_map": {"AutoProcessor": "someone/else--custom.Processor"}},
}


@pytest.mark.parametrize("file", CUSTOM_CODE)
def test_model_folders_that_ask_for_code_are_refused(hostile_model, file):
    edit, _ = hostile_model
    folder = edit(file, **CUSTOM_CODE[file])
    with pytest.raises(ValueError,
        match=rf"{file}: asks for .*custom.* \(auto_map\), but code of a model folder is never run"):
        load_model(str(folder), dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="never run"):
        models.load_tokenizer(folder)


def test_model_folders_that_bring_code_are_refused(hostile_model):
    edit, canary = hostile_model
    folder = edit("tokenizer_config.json", tokenizer_class="Tokenizer")
    code = f"open({str(canary)!r}, 'w')\nclass Tokenizer: pass\n"
    for name in ("tokenization_custom.py", "tokenizer.py"):
        (folder / name).write_text(code)
        with pytest.raises(ValueError, match=rf"{name}: code of a model folder is never run"):
            load_model(str(folder), dtype=torch.float32, device="cpu")
        (folder / name).unlink()
    (folder / "nested").mkdir()
    (folder / "nested/custom.py").write_text(code)  # nothing looks there
    try:
        load_model(str(folder), dtype=torch.float32, device="cpu")
    except ValueError as error:  # a class that transformers does not have
        assert "tokenizer could not be loaded" in str(error)
    assert not canary.exists() and "custom" not in sys.modules


HOSTILE_TEMPLATES = [
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('CANARY', 'w') }}",
    "{{ strftime_now.__globals__['__builtins__']['open']('CANARY', 'w') }}",
    "{{ (messages | map(attribute='__class__') | first).__mro__ }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ (messages | attr('__class__')).__mro__ }}",
    "{{ self.__init__.__globals__ }}",
    "{% set _ = messages.append({'role': 'user', 'content': 'x'}) %}",
    "{% set _ = messages[0].update(content='x') %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ range(999999999) | list }}",
    "{{ raise_exception('no') }}",
    "{{ 1 / 0 }}",
    "{{ undefined.attribute.of.nothing }}",
    "{% for",
]


@pytest.mark.parametrize("template", HOSTILE_TEMPLATES)
def test_chat_templates_cannot_leave_their_sandbox(template, tmp_path):
    tokenizer = tiny_world.build_tokenizer()
    tokenizer.chat_template = template.replace("CANARY", str(tmp_path / "canary"))
    messages = auto_messages("What is 1 + 2?")
    with pytest.raises(ValueError, match="the chat template of .* failed: "):
        encode_chat(tokenizer, messages)
    assert messages == auto_messages("What is 1 + 2?") and list(tmp_path.iterdir()) == []


def safetensors_bytes(header, data=b"\0" * 64, length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def tensor_entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HOSTILE_WEIGHTS = {
    "empty": b"",
    "header of 2^63 bytes": safetensors_bytes(b"{}", length=2**63),
    "header of 4 GB": safetensors_bytes(b"{}", length=2**32),
    "header past the end": safetensors_bytes(b"{}", data=b"", length=3),
    "no JSON": safetensors_bytes(b"\x80\x04pickle"),
    "deep JSON": safetensors_bytes(b"[" * 100_000),
    "no object": safetensors_bytes([1]),
    "negative offset": safetensors_bytes({"a": tensor_entry([16], -64, 0)}),
    "offset past the end": safetensors_bytes({"a": tensor_entry([32], 0, 128)}),
    "end before beginning": safetensors_bytes({"a": tensor_entry([0], 64, 0)}),
    "overlap": safetensors_bytes({"a": tensor_entry([16], 0, 64), "b": tensor_entry([8], 32, 64)}),
    "hole": safetensors_bytes({"a": tensor_entry([4], 0, 16), "b": tensor_entry([8], 32, 64)}),
    "shape that overflows": safetensors_bytes({"a": tensor_entry([2**62, 8], 0, 64)}),
    "negative shape": safetensors_bytes({"a": tensor_entry([-16], 0, 64)}),
    "unknown dtype": safetensors_bytes({"a": tensor_entry([16], 0, 64, "OBJECT")}),
    "size and shape differ": safetensors_bytes({"a": tensor_entry([15], 0, 64)}),
}


@pytest.mark.parametrize("kind", HOSTILE_WEIGHTS)
def test_hostile_weights_are_a_clear_error(kind, hostile_model):
    edit, _ = hostile_model
    folder = edit("generation_config.json")
    (folder / "model.safetensors").write_bytes(HOSTILE_WEIGHTS[kind])
    with pytest.raises(ValueError, match=r"model.safetensors: broken or truncated safetensors file"):
        load_model(str(folder), dtype=torch.float32, device="cpu")


HOSTILE_NAMES = ["../../etc/passwd", "/etc/passwd", "../model.safetensors", "/tmp/model.safetensors", "a/../../b.safetensors"]
HOSTILE_NAMES += ["sub/model.safetensors", "..\\model.safetensors", "model.bin", "pytorch_model.pt", "model.safetensors\n",
    "", 7, None]
HOSTILE_NAMES += [["model.safetensors"], "\0.safetensors"]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_an_index_names_files_of_its_folder_only(name, hostile_model):
    edit, _ = hostile_model
    shutil.copy(edit("config.json") / "model.safetensors",
    edit("config.json").parent)  # where ../model.safetensors would lead
    folder = edit("model.safetensors.index.json", weight_map={"model.norm.weight": name})
    with pytest.raises(ValueError, match=r"index.json: weight_map names .*, which is not a safetensors file of this folder"):
        models.weight_files(folder)


@pytest.mark.parametrize("content", ["[]", "7", '{"weight_map": ["model.safetensors"]}', "[" * 100_000, "{", '"x"'])
def test_json_files_of_a_model_folder_that_are_no_objects(content, hostile_model):
    edit, _ = hostile_model
    folder = edit("model.safetensors.index.json")
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index.json: (not valid JSON|expected a JSON object|no weight_map)"):
        models.weight_files(folder)
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config.json"):
        ModelConfig.from_folder(folder)


# What turns data into code: modules that unpickle or interpret, and calls by their name (re.compile is another name).
LOADERS = r"(c?[pP]ickle|cloudpickle|dill|marshal|shelve|joblib|yaml|code|runpy|pty)"
CODE_FROM_DATA = re.compile(
    rf"eval|exec|compile|__import__|(importlib\.)?(import_module|reload)|{LOADERS}\.\w+|\w+\.read_pickle|torch\.hub\.\w+"
    r"|os\.(system|popen|exec\w+|spawn\w+)|(subprocess\.)?(getoutput|getstatusoutput)|(dist|torch\.distributed)\.\w*object\w*"
)
SAFE_LOADERS = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False), "numpy.load": ("allow_pickle",
    False)}


def code_from_data(source):
    """What of `source` could run code that stands in data, as "line: name"."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            bad = [name for name in names if re.fullmatch(rf"{LOADERS}(\..*)?", name)]
            found += [f"{node.lineno}: import {name}" for name in bad]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {k.arg: k.value.value if isinstance(k.value, ast.Constant) else ... for k in node.keywords}
        constant = bool(node.args) and isinstance(node.args[0], ast.Constant)
        if CODE_FROM_DATA.fullmatch(name) and not (constant and name.endswith(("__import__", "import_module"))):
            found.append(f"{node.lineno}: {name}")
        if name in SAFE_LOADERS and keywords.get(SAFE_LOADERS[name][0]) is not SAFE_LOADERS[name][1]:
            found.append(f"{node.lineno}: {name} without {SAFE_LOADERS[name]}")
        if name.endswith((".recv", ".send")):  # of a multiprocessing connection: a pickle; its bytes have send_bytes
            found.append(f"{node.lineno}: {name}")
        found += [f"{node.lineno}: {key}" for key in ("shell", "trust_remote_code") if keywords.get(key, False) is not False]
    return found


def test_the_search_for_code_from_data_finds_it():
    bad = ["eval(x)", "exec(x)", "compile(x, '', 'exec')", "pickle.load(f)", "import pickle", "from pickle import loads",
        "marshal.loads(x)"]
    bad += ["import shelve", "torch.load(f)", "torch.load(f, weights_only=False)", "torch.load(f, weights_only=flag)",
        "np.load(f)"]
    bad += ["np.load(f, allow_pickle=True)", "os.system(x)", "os.popen(x)", "subprocess.run(x, shell=True)",
        "run(x, shell=flag)"]
    bad += ["AutoModel.from_pretrained(x, trust_remote_code=True)", "__import__(x)", "importlib.import_module(x)",
        "pipe.recv()"]
    bad += ["yaml.load(f)", "import yaml", "dist.broadcast_object_list(x)", "torch.hub.load(x)", "os.execv(x, y)",
        "pd.read_pickle(x)"]
    assert [line for line in bad if not code_from_data(line)] == []
    good = ["re.compile(x)", "model.eval()", "torch.compile(f)", "torch.load(f, weights_only=True)",
        "np.load(f, allow_pickle=False)"]
    good += ["subprocess.run([x])", "f(trust_remote_code=False)", "pipe.recv_bytes()", "json.load(f)",
        "import_module('torch')"]
    assert [line for line in good if code_from_data(line)] == []


def test_nothing_in_the_project_runs_code_that_stands_in_data():
    files = [path for path in ROOT.rglob("*.py") if path != ROOT / "test_sgpo.py"]
    foreign = {path.parent for path in ROOT.rglob("pyvenv.cfg")}  # a virtual environment in the checkout
    files = [path for path in files if not foreign & set(path.parents)]
    # ranks of one run exchange Python objects with each other: what was written, and what went wrong
    own = dict.fromkeys((ROOT / "checkpoint.py", ROOT / "parallel.py"), ["dist.all_gather_object"])
    assert {"train.py", "eval.py", "model.py", "starter.py"} <= {path.name for path in files}
    for path in files:
        found = code_from_data(path.read_text(encoding="utf-8"))
        assert [line.partition(": ")[2] for line in found] == own.get(path, []), path


# ---------------------------------------------------------------------------------------------------- rollout


def reference_sampler(net, prompt, uniforms, *, max_new_tokens, temperature, top_p, eos_ids):
    """The sampler in its plainest form: no cache, no batch, one row, a full forward pass per token."""
    ids, logprobs = list(prompt), []
    for step in range(max_new_tokens):
        logits = net(torch.tensor([ids])).logits[0, -1].double()
        if temperature == 0:
            token, logprob = int(logits.argmax()), float(torch.log_softmax(logits, -1).max())
        else:
            p = torch.softmax(logits / temperature, -1)
            kept, mass = [], 0.0
            for v in sorted(range(len(p)), key=lambda v: -p[v]):
                if mass >= top_p:
                    break
                kept.append(v)
                mass += float(p[v])
            kept.sort()
            total, running = sum(float(p[v]) for v in kept), 0.0
            for token in kept:
                running += float(p[token]) / total
                if running > uniforms[step]:
                    break
            logprob = math.log(float(p[token]))
        ids.append(token)
        logprobs.append(logprob)
        if token in eos_ids:
            return ids[len(prompt) :], logprobs, True
    return ids[len(prompt) :], logprobs, False


def gathered_attention(q, kv, page_table, prompt_length, response_length):
    """What paged_attention computes, row by row and head by head, over keys that are picked from the pages one at a time."""
    S, out = kv.shape[3], torch.empty_like(q)
    for b in range(len(q)):
        prompt, own = int(prompt_length[b]), int(response_length[b])
        slots = [(t // S, t % S) for t in range(prompt)] + [(-(-prompt // S) + t // S, t % S) for t in range(own)]
        k, v = torch.stack([kv[:, int(page_table[b, page]), :, slot] for page, slot in slots], 2)  # (K, tokens, E) each
        for h in range(q.shape[1]):
            head = h * kv.shape[2] // q.shape[1]
            out[b, h] = torch.softmax(k[head] @ q[b, h] / math.sqrt(q.shape[2]), 0) @ v[head]
    return out


@pytest.fixture(params=["pages", "fixed"])
def decode_way(request, monkeypatch):
    """Both ways of a decode step: CacheView, and FixedStep with a slow loop instead of the kernel."""
    if request.param == "fixed":
        monkeypatch.setattr(kv_cache, "decode_kernel", lambda device, head_dim: gathered_attention)
    return request.param


PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15]]
STOPS = (3, 20, 21, 22, 23, 24)


def prompt_seeds(seed, prompts=PROMPTS):
    return [seed * 1_000_003 + p for p in range(len(prompts))]


@torch.no_grad()
@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 1.0), (0.6, 0.95), (1.3, 0.5), (0.0, 1.0)])
@pytest.mark.usefixtures("decode_way")
def test_generate_equals_the_plain_sampler(reference, temperature, top_p):
    theirs, ours, _ = reference
    settings = dict(max_new_tokens=12, temperature=temperature, top_p=top_p, eos_ids=STOPS)
    groups = generate(ours, PROMPTS, n=3, seed=[4, 5, 6], **settings)
    finished = 0
    for p, group in enumerate(groups):
        for i, row in enumerate(group):
            own_stream = np.random.Generator(np.random.Philox(key=np.array([4 + p, i], dtype=np.uint64)))
            uniforms = own_stream.random(kv_cache.PAGE).tolist()
            ids, logprobs, done = reference_sampler(theirs, PROMPTS[p], uniforms, **settings)
            assert (row.prompt_ids, row.response_ids, row.finished, row.group) == (PROMPTS[p], ids, done, p)
            assert row.logprobs == pytest.approx(logprobs, abs=1e-3)
            finished += done
    assert 0 < finished < 9 or temperature == 0  # both ways of ending were exercised


@torch.no_grad()
@pytest.mark.usefixtures("decode_way")
def test_sampler_logprobs_equal_a_teacher_forced_pass(reference):
    theirs, ours, _ = reference
    for temperature, top_p in ((1.0, 1.0), (0.7, 1.0), (1.0, 0.95), (0.7, 0.95)):
        settings = dict(max_new_tokens=10, temperature=temperature, top_p=top_p, eos_ids=STOPS, seed=prompt_seeds(1))
        for group in generate(ours, PROMPTS, n=4, **settings):
            for row in group:
                logits = theirs(torch.tensor([row.prompt_ids + row.response_ids])).logits[0, len(row.prompt_ids) - 1 : -1]
                want = losses.token_logprobs(logits, torch.tensor(row.response_ids), temperature)
                torch.testing.assert_close(torch.tensor(row.logprobs), want, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("decode_way")
def test_same_seed_same_rows_whatever_the_batch(small_model):
    settings = dict(n=3, max_new_tokens=15, temperature=1.0, top_p=1.0, eos_ids=STOPS)
    whole = generate(small_model, PROMPTS, seed=[1, 2, 3], **settings)
    assert generate(small_model, PROMPTS, seed=[1, 2, 3], **settings) == whole
    tokens = [[row.response_ids for row in group] for group in whole]
    in_pieces = generate(small_model, PROMPTS, seed=[1, 2, 3], max_rows=4, **settings)
    assert [[row.response_ids for row in group] for group in in_pieces] == tokens
    (alone,) = generate(small_model, PROMPTS[1:2], seed=[2], **settings)
    assert [row.response_ids for row in alone] == tokens[1]
    assert len({tuple(row.response_ids) for group in whole for row in group}) == 9  # rows differ from each other
    assert [[r.response_ids for r in g] for g in generate(small_model, PROMPTS, seed=prompt_seeds(7), **settings)] != tokens


@pytest.mark.usefixtures("decode_way")
def test_a_small_cache_makes_rows_wait_and_never_changes_them(small_model, monkeypatch):
    """9 rows of up to 57 tokens in a cache that holds a few: rows wait, are preempted, and end as they would have alone."""
    for module in (kv_cache, rollout):
        monkeypatch.setattr(module, "PAGE", 4)
    settings = dict(n=3, max_new_tokens=50, temperature=1.0, top_p=1.0, eos_ids=(3, 20), seed=[1, 2, 3])
    want = [[row.response_ids for row in group] for group in generate(small_model, PROMPTS, **settings)]
    assert max(len(ids) for group in want for ids in group) == 50
    preempted, original = Counter(), rollout._Sampler.preempt
    for cache_tokens in (17 * 4, 40 * 4, 200 * 4):
        ended = []

        def spy(self, size=cache_tokens):
            preempted[size] += 1
            original(self)

        monkeypatch.setattr(rollout._Sampler, "preempt", spy)
        on_row = partial(lambda to, *row: to.append(row), ended)
        groups = generate(small_model, PROMPTS, cache_tokens=cache_tokens, on_row=on_row, **settings)
        assert [[row.response_ids for row in group] for group in groups] == want
        assert all(len(row.logprobs) == len(row.response_ids) for group in groups for row in group)
        assert len(ended) == 9 and all(groups[row.group][member] == row for row, member in ended)
    assert preempted[68] > 0 and 800 not in preempted
    with pytest.raises(ValueError, match=r"prompt 1 \(7 tokens and a response of up to 50\) needs a KV cache of 64 tokens"):
        generate(small_model, PROMPTS, cache_tokens=63, **settings)


@pytest.mark.usefixtures("decode_way")
def test_a_long_row_does_not_hold_up_the_others(small_model, monkeypatch):
    """One of two places is taken by a row of 50 tokens; 20 rows of two pass through the other one meanwhile."""
    prompts, ends = [[5, 6], *[[7 + p] for p in range(20)]], [50, *[2] * 20]
    steps = Counter()
    step, draw = rollout._Sampler.step, rollout._Sampler.draw

    def with_ends(self, rows, logits):  # a response of the length that its prompt asks for
        token = draw(self, rows, logits)
        for b, row in enumerate(rows):
            token[b] = 3 if row.drawn == ends[row.group] else 30
        return token

    monkeypatch.setattr(rollout._Sampler, "draw", with_ends)
    monkeypatch.setattr(rollout._Sampler, "step", lambda self: (steps.update(["decode"]), step(self)))
    settings = dict(n=1, max_new_tokens=60, temperature=1.0, top_p=1.0, eos_ids=(3,), seed=prompt_seeds(0, prompts))
    groups = generate(small_model, prompts, max_rows=2, **settings)
    assert [len(group[0].response_ids) for group in groups] == ends
    assert steps["decode"] == 49  # as many as the long row needs by itself: its first token comes with the prompt


@pytest.mark.usefixtures("decode_way")
def test_each_response_has_its_own_limit(small_model, monkeypatch):
    """It is cut to what it would have been with the longest limit, in a small cache too, where rows wait."""
    monkeypatch.setattr(kv_cache, "PAGE", 4)
    monkeypatch.setattr(rollout, "PAGE", 4)
    limits = [[1, 30, 7], [12, 2, 40], [40, 3, 1]]
    settings = dict(n=3, temperature=1.0, top_p=1.0, eos_ids=STOPS, seed=[1, 2, 3])
    whole = generate(small_model, PROMPTS, max_new_tokens=40, **settings)
    want = [[row.response_ids[:limit] for row, limit in zip(*pair, strict=True)] for pair in zip(whole, limits, strict=True)]
    for cache_tokens in (None, 18 * 4):
        got = generate(small_model, PROMPTS, max_new_tokens=limits, cache_tokens=cache_tokens, **settings)
        assert [[row.response_ids for row in group] for group in got] == want
    assert {row.finished for group in got for row in group} == {True, False}  # both ways of ending
    with pytest.raises(ValueError, match=r"prompt 1 \(7 tokens and a response of up to 40\) needs a KV cache of 52 tokens"):
        generate(small_model, PROMPTS, max_new_tokens=limits, cache_tokens=51, **settings)


@pytest.mark.usefixtures("decode_way")
def test_reading_tokens_late_changes_nothing(small_model, monkeypatch):
    """On a GPU the tokens are read back every few steps; rows that end in between are decoded too far and cut."""
    settings = dict(n=5, max_new_tokens=30, temperature=1.0, top_p=1.0, eos_ids=STOPS, seed=prompt_seeds(3))
    want = generate(small_model, PROMPTS, **settings)
    original = rollout._Sampler.__init__

    def late(self, *args):
        original(self, *args)
        self.sync_every = 8

    monkeypatch.setattr(rollout._Sampler, "__init__", late)
    assert [[r.response_ids for r in g] for g in generate(small_model, PROMPTS, **settings)] == [
        [r.response_ids for r in g] for g in want
    ]


@pytest.mark.usefixtures("decode_way")
def test_alone_in_the_batch_a_row_is_the_same_bit_for_bit(small_model):
    settings = dict(max_new_tokens=20, temperature=1.0, top_p=1.0, eos_ids=STOPS, max_rows=1)
    whole = generate(small_model, PROMPTS, n=3, seed=[1, 2, 3], **settings)
    for p, prompt in enumerate(PROMPTS):
        (alone,) = generate(small_model, [prompt], n=2, seed=[p + 1], **settings)
        assert [replace(row, group=p) for row in alone] == whole[p][:2]  # log-probs too, without any tolerance


def test_every_bit_of_a_seed_counts(small_model):
    settings = dict(n=2, max_new_tokens=20, temperature=1.0, top_p=1.0, eos_ids=(3,))
    seeds = [7, 7 + 2**32, 7 + 2**40, 7 + 2**62, -7]
    groups = generate(small_model, [PROMPTS[0]] * len(seeds), seed=seeds, **settings)
    assert len({tuple(row.response_ids) for group in groups for row in group}) == 2 * len(seeds)


@pytest.mark.usefixtures("decode_way")
def test_responses_end_at_every_eos_and_at_the_context(small_model):
    settings = dict(temperature=1.0, top_p=1.0, eos_ids=STOPS, seed=prompt_seeds(0))
    groups = generate(small_model, PROMPTS, n=16, max_new_tokens=1000, **settings)
    rows = [row for group in groups for row in group]
    for row in rows:
        assert not set(row.response_ids[:-1]) & set(STOPS) and len(row.response_ids) == len(row.logprobs)
        assert row.finished == (row.response_ids[-1] in STOPS)
        if not row.finished:
            assert len(row.prompt_ids) + len(row.response_ids) == 64  # max_position_embeddings
    assert len({row.response_ids[-1] for row in rows if row.finished}) > 2  # several of the ids did end a row
    small_model.train()
    generate(small_model, PROMPTS, n=1, max_new_tokens=1, **settings)
    assert small_model.training  # the caller's mode is put back
    small_model.eval()


@pytest.mark.usefixtures("decode_way")
def test_sampler_uses_the_trainers_weights(small_model):
    settings = dict(n=1, max_new_tokens=8, temperature=0.0, top_p=1.0, eos_ids=STOPS, seed=prompt_seeds(0))
    before = generate(small_model, PROMPTS, **settings)
    with torch.no_grad():
        small_model.model.layers[0].mlp.down_proj.weight.mul_(-3)
    after = generate(small_model, PROMPTS, **settings)
    with torch.no_grad():
        small_model.model.layers[0].mlp.down_proj.weight.div_(-3)
    assert before != after


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompts": [[5], []], "seed": [0, 1]}, "prompt 1 is empty"),
        ({"prompts": [[5] * 64]}, "prompt 0 has 64 tokens and leaves no room in a context of 64"),
        ({"eos_ids": ()}, "eos_ids is empty"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"n": 0}, "n=0"),
        ({"n": [1, 2]}, "2 values of n for 1 prompts"),
        ({"seed": [1, 2, 3]}, "3 values of seed for 1 prompts"),
        ({"seed": 0}, "seed=0: give a list, one for each of the 1 prompts"),
        ({"max_rows": 0}, "max_rows=0 must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"n": 2, "max_new_tokens": [[4, 0]]}, "max_new_tokens=0 must be at least 1"),
        ({"n": 2, "max_new_tokens": [[4]]}, "prompt 0: 1 values of max_new_tokens for 2 responses"),
        ({"max_new_tokens": [[4], [4]]}, "2 values of max_new_tokens for 1 prompts"),
    ],
)
def test_generate_refuses_bad_settings(small_model, change, message):
    settings = dict(prompts=[[5]], n=1, max_new_tokens=4, temperature=1.0, top_p=1.0, eos_ids=(3,), seed=[0])
    with pytest.raises(ValueError, match=message):
        generate(small_model, **{**settings, **change})


def bisection_in_place_of_sorting(logits, log_total, top_p):
    return rollout.threshold_by_bisection(logits, torch.exp(logits - log_total), top_p)


@pytest.fixture(params=["sorting", "bisection"])
def nucleus_way(request, monkeypatch):
    """Both ways to the nucleus, the one for a CPU and the one for a GPU."""
    if request.param == "bisection":
        monkeypatch.setattr(rollout, "threshold_by_sorting", bisection_in_place_of_sorting)


@pytest.mark.usefixtures("nucleus_way")
def test_sample_draws_from_the_distribution():
    """100,000 draws against the exact probabilities, with and without a nucleus, to five standard errors."""
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -float("inf"), 0.5])
    uniform = torch.rand(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.8)):
        whole = p = torch.softmax(logits / temperature, -1)
        if top_p < 1:  # by hand: 0.564, 0.207, 0.126 are the smallest set that reaches 0.8
            p = torch.where(p > 0.12, p, 0)
            assert (p > 0).sum() == 3
            p = p / p.sum()
        token, logprob = rollout.sample(logits.expand(100_000, -1), uniform, temperature, top_p)
        share = torch.bincount(token, minlength=6) / 100_000
        assert ((share - p).abs() <= 5 * (p * (1 - p) / 100_000).sqrt() + 1e-9).all()
        torch.testing.assert_close(logprob, whole.log()[token], atol=1e-5, rtol=1e-5)


def nucleus_logits():
    """{name: logits of 6 rows}; the widths are a multiple of the blocks of 512, none, and odd."""
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    impossible = normal(6, 1000).masked_fill(normal(6, 1000) > 0, -math.inf)
    impossible[0], impossible[0, 3] = -math.inf, 1.0  # one possible token
    one = torch.zeros(6, 777)
    one[:, 5] = 200.0  # the others' probability underflows
    return {
        "normal": 3 * normal(6, 1536),
        "more than 1024 in the nucleus of every second row": normal(6, 5000) * torch.tensor([[1.0], [3.0]] * 3),
        "odd width, negative": normal(6, 257) - 50,
        "bf16": (3 * normal(6, 1536)).bfloat16(),
        "fp16": (3 * normal(6, 1000)).half(),
        "ties": normal(6, 1000).round(),
        "both zeros": torch.tensor([[0.0, -0.0, 0.0, -0.0, -1.0]] * 6),
        "all equal": torch.full((6, 300), 0.5),
        "impossible tokens": impossible,
        "one token": one,
    }


def nucleus_by_hand(row, top_p):
    """Which tokens are in the nucleus, in float64 and token by token."""
    p = np.exp(row - row.max())
    p, order, mass, last = p / p.sum(), np.argsort(-row, kind="stable"), 0.0, None
    for last in order:
        mass += p[last]
        if mass >= top_p:
            break
    return row >= row[last]


class SaysItIsOnAGPU(torch.Tensor):
    device = property(lambda self: torch.device("cuda"))


@pytest.mark.parametrize("name", nucleus_logits())
def test_both_ways_to_the_nucleus_find_what_a_slow_loop_finds(name):
    logits, uniform = nucleus_logits()[name], torch.linspace(0, 1 - 2**-53, 6, dtype=torch.float64)
    for temperature in (1.0, 0.7):
        scaled = logits.float() / temperature
        total, rows = scaled.logsumexp(-1, keepdim=True), scaled.double().numpy()
        for top_p in (1e-9, 0.3, 0.8, 0.95, 1 - 1e-9):
            sure = np.stack([nucleus_by_hand(row, min(top_p, 1 - 1e-6)) for row in rows])  # fp32 masses need not reach more
            for found in (
                scaled >= rollout.threshold_by_sorting(scaled, total, top_p),
                logits >= rollout.threshold_by_bisection(logits, torch.exp(scaled - total), top_p),
            ):
                assert (found.numpy()[sure]).all() if top_p > 0.99 else (found.numpy() == sure).all()
        want = rollout.sample(logits, uniform, temperature, 0.95)
        found = rollout.sample(logits.as_subclass(SaysItIsOnAGPU), uniform, temperature, 0.95)
        assert all(map(torch.equal, found, want))


def test_a_mass_of_exactly_top_p_is_enough():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    assert rollout.threshold_by_bisection(logits, torch.tensor([[0.5, 0.25, 0.25]]), 0.5).item() == 2
    assert rollout.threshold_by_bisection(logits, torch.tensor([[0.5, 0.25, 0.25]]), 0.75).item() == 1
    certain = torch.tensor([[0.0, -200.0]])
    assert rollout.threshold_by_sorting(certain, torch.zeros(1, 1), 1.0).item() == 0


def test_the_nucleus_on_a_gpu_takes_little_memory():
    logits, p = torch.randn(16, 2048), torch.rand(16, 2048)
    assert live_bytes(lambda: rollout.threshold_by_bisection(logits, p, 0.95)) < 1.5 * p.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature, top_p", [(0.0, 0.95), (1.0, 1.0), (0.7, 0.95)])
def test_a_gpu_is_not_waited_for_while_sampling(temperature, top_p, dtype):
    """A tensor of the meta device has no values: every question about one (.any() in an if, .item()) is an error."""
    logits = torch.empty(3, 1000, dtype=dtype, device="meta")
    uniform = torch.empty(3, dtype=torch.float64, device="meta")
    token, logprob = rollout.sample(logits, uniform, temperature, top_p)
    assert (token.shape, token.dtype, logprob.shape, logprob.dtype) == ((3,), torch.int64, (3,), torch.float32)
    with pytest.raises(RuntimeError, match="meta tensors"):  # as it is on a CPU
        rollout.threshold_by_sorting(logits, uniform[:, None], 0.95)
    if torch.cuda.is_available():
        on_gpu = torch.randn(3, 1000, dtype=dtype, device="cuda"), torch.rand(3, dtype=torch.float64, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            rollout.sample(*on_gpu, temperature, top_p)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.9), (0.0, 1.0)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.usefixtures("nucleus_way")
def test_a_logit_that_is_not_finite_is_an_error_that_says_where(bad, temperature, top_p, small_model, monkeypatch):
    """An index out of range would do, on a CPU; on CUDA it ends the process with a message about neither."""
    logits = torch.randn(4, 1100, generator=torch.Generator().manual_seed(0))
    whole = rollout.sample(logits, torch.full((4,), 0.5, dtype=torch.float64), temperature, top_p)
    logits[1], logits[2, 7], logits[3] = bad, bad, -math.inf
    token, logprob = rollout.sample(logits, torch.full((4,), 0.5, dtype=torch.float64), temperature, top_p)
    assert logprob.isfinite().tolist() == [True, False, False, False] and (0 <= token).all() and (token < 1100).all()
    assert (token[0], logprob[0]) == (whole[0][0], whole[1][0])

    def spoiled(logits, *args, sample=rollout.sample, **settings):
        return sample(logits.index_fill(1, torch.tensor([5]), bad), *args, **settings)

    monkeypatch.setattr(rollout, "sample", spoiled)
    settings = dict(n=2, max_new_tokens=4, temperature=temperature, top_p=top_p, eos_ids=[1], seed=[0])
    with pytest.raises(RuntimeError, match="prompt 0, token 0 of a response: a logit is nan or inf"):
        generate(small_model, [[3, 4]], **settings)


def test_sample_at_the_ends_of_the_unit_interval():
    logits = torch.tensor([[-float("inf"), 0.0, 1.0, -float("inf")]] * 2)
    token, _ = rollout.sample(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), 1.0, 1.0)
    assert token.tolist() == [1, 2]  # never an impossible token, not even with u = 0 before it or u close to 1 after it
    logits = torch.full((2, 2048), -float("inf"))  # the sum is taken in blocks of 512: the first and the last are impossible
    logits[:, 513], logits[:, 1500] = 0.0, 1.0
    token, logprob = rollout.sample(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), 1.0, 1.0)
    assert token.tolist() == [513, 1500]
    torch.testing.assert_close(logprob, torch.log_softmax(torch.tensor([0.0, 1.0]), 0))


@pytest.fixture(scope="module")
def on_both():
    """The same Qwen3 on the CPU and on a GPU, fp32, with a head width that the kernels have."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    config = ModelConfig.from_dict({**FAMILIES["qwen3"].to_dict(), "model_type": "qwen3", "head_dim": 64})
    return [
        build_model(config, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device=torch.device(kind))
        for kind in ("cpu", "cuda")
    ]


def test_gpu_samples_what_the_cpu_samples(on_both, monkeypatch):
    cpu, gpu = on_both
    captured, capture = [], kv_cache.FixedStep.capture
    monkeypatch.setattr(kv_cache.FixedStep, "capture", lambda self: (captured.append(self.batch_size), capture(self)))
    settings = dict(n=6, max_new_tokens=40, temperature=1.0, top_p=1.0, eos_ids=STOPS, seed=[1, 2, 3])
    for change in ({}, {"top_p": 0.9, "temperature": 0.7}, {"max_rows": 5}, {"cache_tokens": 9 * kv_cache.PAGE}):
        want, got = (generate(net, PROMPTS, **{**settings, **change}) for net in (cpu, gpu))
        rows = [list(itertools.chain(*groups)) for groups in (want, got)]
        assert [row.response_ids for row in rows[0]] == [row.response_ids for row in rows[1]]
        for a, b in zip(*rows, strict=True):
            assert b.logprobs == pytest.approx(a.logprobs, abs=1e-3)
    assert {8, 24} <= set(captured)  # graphs were used, of more than one size
    monkeypatch.setattr(kv_cache, "decode_kernel", lambda *_: None)  # and the way without them
    assert [[row.response_ids for row in g] for g in generate(gpu, PROMPTS, **settings)] == [
        [row.response_ids for row in g] for g in generate(cpu, PROMPTS, **settings)
    ]


def test_gpu_sampler_sees_a_changed_weight(on_both):
    _, gpu = on_both
    settings = dict(n=1, max_new_tokens=8, temperature=0.0, top_p=1.0, eos_ids=STOPS, seed=prompt_seeds(0))
    before = generate(gpu, PROMPTS, **settings)
    weight = gpu.model.layers[0].mlp.down_proj.weight.data
    kept = weight.clone()  # dividing again would not give back the same bits
    weight.mul_(-3)
    changed = generate(gpu, PROMPTS, **settings)
    weight.copy_(kept)
    assert changed != before and generate(gpu, PROMPTS, **settings) == before


def test_gpu_memory_goes_back_to_the_device_after_a_call(on_both):
    """By default the cache takes 90 % of what is free. Moments that settled inside its block would keep that block from the
    device, and the next call would find little."""
    _, gpu = on_both
    settings = dict(n=2, max_new_tokens=4, temperature=1.0, top_p=1.0, eos_ids=STOPS)
    generate(gpu, PROMPTS, seed=prompt_seeds(0), **settings)
    reserved = torch.cuda.memory_reserved()
    generate(gpu, PROMPTS, seed=prompt_seeds(0), cache_tokens=2**20, **settings)  # 1 GB or more
    assert torch.cuda.memory_reserved() - reserved < 64e6
    allocated = torch.cuda.memory_allocated()
    for call in range(40):  # a stream for each capture would leave 32 MB each time
        generate(gpu, PROMPTS, seed=prompt_seeds(call), **settings)
    assert torch.cuda.memory_allocated() - allocated < 64e6


def test_gpu_offload_trains_and_samples(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    flags = "--steps 1 --problems_per_step 2 --offload --eval_limit 4 --no-eval_guided --device cuda".split()
    done = run_script("train.py", *flags, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    assert read_metrics(tmp_path / "run")[-1]["stage"] == "eval"


def test_gpu_gradient_of_a_packed_row(on_both):
    """bf16 with the variable-length kernel against fp32 on the CPU."""
    contexts = [random_ids(1, 7, 1)[0].tolist()] * 3 + [random_ids(1, 3, 2)[0].tolist()]
    responses = [random_ids(1, n, 10 + n)[0].tolist() for n in (5, 1, 9, 4)]
    gradients = []
    for net in on_both:
        net.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=net.device.type == "cuda"):
            assert (net.attention_kernel() is None) == (net.device.type == "cpu")
            packed = pack(contexts, responses, device=net.device)
            logits = net(packed.input_ids, lengths=packed.lengths, prefixes=packed.prefixes)[0, packed.predict]
        F.cross_entropy(logits.float(), packed.targets).backward()
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in net.parameters()]))
    assert F.cosine_similarity(*gradients, dim=0) > 0.999


def test_memory_is_flat_over_many_calls():
    """200 calls of the sampler in a fresh process: nothing is kept from one to the next."""
    code = (
        "import torch, bench\n"
        "from model import ModelConfig, build_model\n"
        "from rollout import generate\n"
        "torch.set_num_threads(1)\n"
        "shape = ModelConfig.from_dict(bench.TOY)\n"
        "model = build_model(shape, generator=torch.Generator(), dtype=torch.float32, device=torch.device('cpu'))\n"
        "settings = dict(n=4, max_new_tokens=8, temperature=1.0, top_p=1.0, eos_ids=[1], max_rows=6)\n"
        "for call in range(220):\n"
        "    generate(model, [[5] * 40, [6] * 70], seed=[call * 1_000_003, call * 1_000_003 + 1], **settings)\n"
        "    if call == 19:\n"
        "        before = bench._status_bytes('VmRSS')\n"
        "print((bench._status_bytes('VmRSS') - before) / 1e6)\n"
    )
    done = run_script("-c", code)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 5  # megabytes; a leak of the cache alone would be 100


def test_pack_lays_guided_and_unguided_over_the_same_tokens():
    """The paired contexts differ in length; the masked positions hold the response, EOS included, and nothing else."""
    tokenizer = tiny_world.build_tokenizer()
    eos = tokenizer.eos_token_id
    strategy = tiny_world.strategy_of("kalo", (0, 1, 0))
    texts = [tiny_world.run_machine("kalo", (0, 1, 0), 3, y)[0] for y in (1, 2)]
    problems = [tiny_world.problem_text("kalo", 3, y) for y in (1, 2)]
    responses = [tokenizer.encode(text, add_special_tokens=False) + [eos] for text in texts]
    auto = pack([encode_chat(tokenizer, auto_messages(p)) for p in problems], responses, device=CPU)
    guided = pack([encode_chat(tokenizer, guided_messages(p, strategy)) for p in problems], responses, device=CPU)
    assert torch.equal(auto.targets, guided.targets) and torch.equal(auto.sequence, guided.sequence)
    assert sum(guided.lengths) > sum(auto.lengths)
    for packed in (auto, guided):
        for index, response in enumerate(responses):
            chosen = packed.sequence == index
            assert packed.targets[chosen].tolist() == response  # the last one is EOS
            places = packed.predict[chosen]
            inputs = packed.input_ids[0]
            assert inputs[places[1:]].tolist() == response[:-1]  # each target is predicted from the token before it
            header = tokenizer.encode("<|im_start|>assistant", add_special_tokens=False)
            assert inputs[places[0] - 1 : places[0] + 1].tolist() == header
        assert packed.input_ids.numel() == sum(packed.lengths)
    words = tokenizer.decode(guided.targets)
    assert "strategy" not in words and "Add" not in words


def test_pack_masks_by_position_when_pad_is_eos():
    packed = pack([[2, 2, 5]], [[2, 7, 2]], device=CPU)  # 2 is EOS, pad, and part of the prompt
    assert packed.input_ids.tolist() == [[2, 2, 5, 2, 7]]
    assert packed.predict.tolist() == [2, 3, 4] and packed.targets.tolist() == [2, 7, 2]


def test_pack_computes_a_shared_context_once():
    contexts = [[1, 2, 3], [1, 2, 3], [1, 2, 3], [4, 5], [1, 2, 3]]
    responses = [[6, 7, 8], [9], [10, 11], [12, 13], [14, 15]]
    packed = pack(contexts, responses, device=CPU)
    assert packed.input_ids[0].tolist() == [1, 2, 3, 6, 7, 10, 4, 5, 12, 1, 2, 3, 14]
    assert packed.lengths == [3, 2, 1, 3, 4] and packed.prefixes == [None, 0, 0, None, None]
    assert packed.targets.tolist() == [6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    assert packed.predict.tolist() == [2, 3, 4, 2, 2, 5, 7, 8, 11, 12]
    assert packed.sequence.tolist() == [0, 0, 0, 1, 2, 2, 3, 3, 4, 4]
    assert rollout.shared_tokens(contexts) == [0, 3, 3, 0, 0] and rollout.shared_tokens([[1, 2], [3, 2]]) == [0, 0]
    costs = [len(c) + len(r) for c, r in zip(contexts, responses, strict=True)]
    assert micro_batches(costs, 9, rollout.shared_tokens(contexts)) == [[0, 1, 2], [3, 4]]
    assert micro_batches(costs, 8, rollout.shared_tokens(contexts)) == [[0, 1], [2], [3], [4]]


@pytest.mark.usefixtures("packed_way")
def test_sequences_that_share_a_context_equal_transformers_and_its_gradient(reference):
    """Logits and weight gradients of a packed row whose responses share their contexts, against a sequence at a time."""
    theirs, ours, _ = reference
    contexts = [ids.tolist() for ids in (random_ids(1, 7, 1)[0], random_ids(1, 3, 2)[0])]
    contexts = [contexts[0]] * 3 + [contexts[1]] * 2 + [contexts[0]]
    responses = [random_ids(1, n, 10 + n)[0].tolist() for n in (5, 1, 9, 2, 4, 3)]
    packed = pack(contexts, responses, device=CPU)
    for net in (theirs, ours):
        net.zero_grad()
    logits = ours(packed.input_ids, lengths=packed.lengths, prefixes=packed.prefixes)[0, packed.predict]
    each = [theirs(torch.tensor([c + r])).logits[0, len(c) - 1 : -1] for c, r in zip(contexts, responses, strict=True)]
    want = torch.cat(each)
    torch.testing.assert_close(logits, want, atol=1e-4, rtol=1e-4)
    for values in (logits, want):
        F.cross_entropy(values, packed.targets).backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-4, rtol=1e-3)


def test_pack_refuses_what_it_cannot_lay_out():
    for contexts, responses in (([[1]], [[]]), ([[]], [[1]]), ([[1]], [[1], [2]])):
        with pytest.raises(ValueError):
            pack(contexts, responses, device=CPU)


def test_micro_batches_cover_every_item_once_and_in_order():
    assert micro_batches([3, 3, 3, 9, 1, 1], 6) == [[0, 1], [2], [3], [4, 5]]
    assert micro_batches([], 6) == []


# ---------------------------------------------------------------------------------------------------- loss


def test_forward_kl_by_hand():
    """p = (1/2, 1/2) guided, q = (1/4, 3/4): KL(p||q) = 1/2 ln 2 + 1/2 ln(2/3); the reverse is 1/4 ln(1/2) + 3/4 ln(3/2)."""
    guided, unguided = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    forward = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    reverse = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert losses.forward_kl(guided, unguided).item() == pytest.approx(forward, abs=1e-6)
    assert losses.forward_kl(unguided, guided).item() == pytest.approx(reverse, abs=1e-6)
    assert abs(forward - reverse) > 0.01


def test_forward_kl_against_a_loop_and_torch():
    generator = torch.Generator().manual_seed(0)
    guided, unguided = (3 * torch.randn(4, 5, 11, generator=generator) for _ in range(2))
    got = losses.forward_kl(guided, unguided, temperature=0.7)
    assert got.shape == (4, 5) and (got >= 0).all()
    p, q = (torch.softmax(x.double() / 0.7, -1) for x in (guided, unguided))
    for i in range(4):
        for j in range(5):
            want = sum(float(p[i, j, v]) * math.log(float(p[i, j, v]) / float(q[i, j, v])) for v in range(11))
            assert got[i, j].item() == pytest.approx(want, rel=1e-4)
    want = F.kl_div(q.log(), p.log(), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


def test_gradient_reaches_only_the_unguided_side():
    guided = torch.randn(3, 7, requires_grad=True)
    unguided = torch.randn(3, 7, requires_grad=True)
    losses.forward_kl(guided, unguided).sum().backward()
    assert guided.grad is None
    want = torch.softmax(unguided, -1) - torch.softmax(guided, -1)  # d KL(p||q) / d logits of q
    torch.testing.assert_close(unguided.grad, want.detach(), atol=1e-6, rtol=1e-5)


def test_forward_kl_sees_the_whole_vocabulary_in_fp32():
    """Mass moved to a token far outside any top-k of the unguided side counts; bf16 logits are summed in fp32."""
    unguided = torch.zeros(1, 50_000, dtype=torch.bfloat16)
    guided = unguided.clone()
    guided[0, 49_999] = 8.0  # e^8 = 2,981 against 49,999 others
    p = math.exp(8) / (math.exp(8) + 49_999)
    want = p * math.log(p * 50_000) + (1 - p) * math.log((1 - p) / 49_999 * 50_000)
    assert losses.forward_kl(guided, unguided).item() == pytest.approx(want, rel=1e-3)


def test_kl_clip_drops_tokens_and_never_clamps():
    d = torch.tensor([0.2, 1.0, 1.0001, 5.0], requires_grad=True)
    mask = losses.kl_clip_mask(d, delta=1.0)
    assert mask.tolist() == [1, 1, 0, 0]
    (mask * d).sum().backward()
    assert d.grad.tolist() == [1, 1, 0, 0]


def test_policy_loss_on_both_sides_of_both_clips():
    """Ratios 0.5, 0.9, 1.2, 1.5 with A = +2, then A = -2; clip to [0.8, 1.28]; worked out by hand."""
    ratio = torch.tensor([0.5, 0.9, 1.2, 1.5] * 2)
    advantage = torch.tensor([2.0] * 4 + [-2.0] * 4)
    old = torch.full((8,), -1.0)
    new = (old + ratio.log()).requires_grad_()
    loss, got_ratio, clipped = losses.policy_loss(new, old, advantage)
    want = torch.tensor([-1.0, -1.8, -2.4, -2.56, 1.6, 1.8, 2.4, 3.0])
    torch.testing.assert_close(loss, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got_ratio, ratio, atol=1e-5, rtol=1e-5)
    assert clipped.tolist() == [False, False, False, True, True, False, False, False]
    loss.sum().backward()
    want_grad = torch.where(clipped, 0.0, -advantage * ratio)  # d(-r A) / d logp = -r A where no clip holds
    torch.testing.assert_close(new.grad, want_grad, atol=1e-5, rtol=1e-5)


def test_reverse_kl_by_hand_and_against_torch():
    """p = (1/2, 1/2) guided, q = (1/4, 3/4): KL(q||p) = 1/4 ln(1/2) + 3/4 ln(3/2); the guided side is stopped."""
    guided, unguided = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    want = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert losses.reverse_kl(guided, unguided).item() == pytest.approx(want, abs=1e-6)
    guided, unguided = (torch.randn(3, 11, requires_grad=True) for _ in range(2))
    got = losses.reverse_kl(guided, unguided, temperature=0.7)
    p, q = (torch.log_softmax(x.detach() / 0.7, -1) for x in (guided, unguided))
    torch.testing.assert_close(got.detach(), F.kl_div(p, q, log_target=True, reduction="none").sum(-1))
    got.sum().backward()
    assert guided.grad is None and unguided.grad.abs().sum() > 0


def test_luffy_loss_by_hand():
    """Own tokens: ratio 2 with A = -1/2 costs 1, ratio 3 with A = 1/4 costs -3/4: no clip. Demonstration: pi = 1/4, A = 1/2:
    f = 0.25 / 0.35, and d loss / d log pi = -A pi 0.1 / 0.35^2; at pi = 0.9 the shaping has nearly gone."""
    logprobs = torch.tensor([math.log(0.5), math.log(0.6), math.log(0.25), math.log(0.9)], requires_grad=True)
    old = torch.tensor([math.log(0.25), math.log(0.2), -7.0, 5.0])  # on a demonstration it is ignored
    advantages = torch.tensor([-0.5, 0.25, 0.5, 0.5])
    demonstration = torch.tensor([False, False, True, True])
    loss, ratio, _ = losses.luffy_loss(logprobs, old, advantages, demonstration)
    assert loss.tolist() == pytest.approx([1.0, -0.75, -0.5 * 0.25 / 0.35, -0.5 * 0.9 / 1.0], rel=1e-5)
    assert ratio.tolist() == pytest.approx([2.0, 3.0, 0.25, 0.9], rel=1e-5)
    loss.sum().backward()
    want = [1.0, -0.75, -0.5 * 0.25 * 0.1 / 0.35**2, -0.5 * 0.9 * 0.1 / 1.0**2]
    assert logprobs.grad.tolist() == pytest.approx(want, rel=1e-5)


def test_hpt_loss_by_hand():
    """Own tokens as LUFFY's; a demonstration's cost is -c log pi, whatever advantage and old log-prob say."""
    logprobs = torch.tensor([math.log(0.5), math.log(0.25)], requires_grad=True)
    old, advantages = torch.tensor([math.log(0.25), -700.0]), torch.tensor([0.5, -3.0])  # e^700 is inf, and its gradient nan
    loss, ratio, _ = losses.hpt_loss(logprobs, old, advantages, torch.tensor([False, True]), sft_weight=0.3)
    assert loss.tolist() == pytest.approx([-1.0, 0.3 * math.log(4)], rel=1e-5)
    loss.sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([-1.0, -0.3], rel=1e-5)


def test_the_largest_error_of_a_ratio_may_be_on_either_side():
    ratio = torch.tensor([0.25, 1.5, 9.0])
    stats = dict.fromkeys(("ratio", "entropy", "clipped"), ratio) | {"logprob": ratio.log()}
    _, largest = losses.diagnostics(stats, torch.zeros(3), torch.tensor([True, True, False]))
    assert largest == pytest.approx({"ratio_error": 0.75, "logprob_error": math.log(4)})


def test_token_quantities_against_torch():
    logits = torch.randn(4, 9)
    targets = torch.tensor([0, 3, 8, 5])
    want = torch.distributions.Categorical(logits=logits / 0.7)
    torch.testing.assert_close(losses.token_logprobs(logits, targets, 0.7), want.log_prob(targets))
    torch.testing.assert_close(losses._entropy(losses.log_softmax(logits, 0.7)), want.entropy())


SFT_TERMS = partial(losses.sft_terms, temperature=1.0)


@pytest.mark.parametrize("kind", ["sft", "grpo", "luffy", "hpt", "distillation", "reverse_kl", "target_sft"])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunked_head_equals_the_unchunked_value_and_gradient(kind, chunk):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    M, D, V = 23, 16, 101
    hidden, weight = normal(M, D).requires_grad_(), (0.5 * normal(V, D)).requires_grad_()
    targets = torch.randint(0, V, (M,), generator=generator)
    w = torch.rand(M, generator=generator)
    old, advantages, guided_hidden = -normal(M).abs() - 3, normal(M), hidden.detach() + 0.7 * normal(M, D)
    demonstration = torch.rand(M, generator=generator) < 0.5
    policy = partial(losses.policy_terms, temperature=0.9)
    objective = {"target_sft": "sft", "reverse_kl": "reverse_kl"}.get(kind, "kl")
    kd = dict(delta=1.0, temperature=0.9, objective=objective)
    distillation = (partial(losses.distillation_terms, **kd), (targets, w))
    terms, inputs = {
        "sft": (partial(losses.sft_terms, temperature=0.9), (targets, w)),
        "grpo": (partial(policy, loss=losses.policy_loss), (targets, old, advantages, w)),
        "luffy": (partial(policy, loss=losses.luffy_loss, entropy_bonus=0.05), (targets, old, advantages, w, demonstration)),
        "hpt": (partial(policy, loss=partial(losses.hpt_loss, sft_weight=0.3)), (targets, old, advantages, w, demonstration)),
    }.get(kind, distillation)
    arguments = [x.detach().clone() for x in (hidden, weight, *inputs)]
    teacher = guided_hidden if terms.func is losses.distillation_terms else None
    row, at = hidden, None
    if chunk == 7:  # as a packed row, in another order, of which some positions predict nothing
        at = torch.randperm(2 * M, generator=generator)[:M]
        row = torch.zeros(1, 2 * M, D).index_copy(1, at, hidden[None])
    got, stats = losses.chunked_head(row, weight, terms, inputs, chunk_tokens=chunk, at=at, teacher=teacher)
    (3 * got).backward()
    gradients = hidden.grad, weight.grad
    hidden.grad = weight.grad = None

    # the plain way: all logits at once, torch's own functions, autograd
    logits = hidden @ weight.T
    if kind == "sft":
        want = (F.cross_entropy(logits / 0.9, targets, reduction="none") * w).sum()
    elif kind == "grpo":
        ratio = torch.exp(F.log_softmax(logits / 0.9, -1)[torch.arange(M), targets] - old)
        want = -(w * torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)).sum()
    elif kind in ("luffy", "hpt"):
        policy = torch.distributions.Categorical(logits=logits / 0.9)
        logp = policy.log_prob(targets)
        own = -advantages * torch.exp(logp - old)
        if kind == "luffy":
            token_loss = (
                torch.where(demonstration, -advantages * logp.exp() / (logp.exp() + 0.1), own) - 0.05 * policy.entropy()
            )
        else:
            token_loss = torch.where(demonstration, -0.3 * logp, own)
        want = (w * token_loss).sum()
    elif kind == "target_sft":
        want = (w * F.cross_entropy(logits / 0.9, targets, reduction="none")).sum()
        assert stats["kept"].min() == 1
    else:
        p = F.log_softmax(guided_hidden @ weight.detach().T / 0.9, -1)
        q = F.log_softmax(logits / 0.9, -1)
        pair = (p, q) if kind == "reverse_kl" else (q, p)
        d = F.kl_div(*pair, log_target=True, reduction="none").sum(-1)
        assert 0 < (d <= 1).sum() < M
        want = (w * (d <= 1) * d).sum()
        torch.testing.assert_close(stats["divergence"], d.detach(), atol=1e-5, rtol=1e-5)
    (3 * want).backward()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients[0], hidden.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients[1], weight.grad, atol=1e-5, rtol=1e-5)
    assert all(value.shape == (M,) for value in stats.values())
    for before, after in zip(arguments, (hidden, weight, *inputs), strict=True):
        assert torch.equal(before, after)  # no argument was written to


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation gives out."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_chunked_head_never_holds_the_logits_of_all_tokens():
    M, D, V = 64, 4, 500
    weight, inputs = torch.randn(V, D, requires_grad=True), (torch.randint(0, V, (M,)), torch.ones(M))
    largest = {}
    for chunk in (8, M):
        with LargestTensor() as mode:
            hidden = torch.randn(M, D, requires_grad=True)
            losses.chunked_head(hidden, weight, SFT_TERMS, inputs, chunk_tokens=chunk)[0].backward()
        largest[chunk] = mode.numel
    assert largest == {8: 8 * V, M: M * V}  # and with one chunk it does hold them: the measure measures


def test_public_calls_leave_their_arguments_alone(small_model):
    prompts = [list(prompt) for prompt in PROMPTS]
    generate(small_model, prompts, n=2, max_new_tokens=3, temperature=1.0, top_p=0.9, eos_ids=STOPS, seed=prompt_seeds(0))
    responses = [[1, 2], [3], [4, 5, 6]]
    pack(prompts, responses, device=CPU)
    assert prompts == PROMPTS and responses == [[1, 2], [3], [4, 5, 6]]
    tensors = [torch.randn(3, 5) for _ in range(4)] + [torch.tensor([0.0, 1.0, 1.0])]
    copies = [tensor.clone() for tensor in tensors]
    a, b, c, d, correct = tensors
    losses.forward_kl(a, b)
    losses.kl_clip_mask(c)
    losses.policy_loss(a, b, c)
    losses.token_logprobs(a, torch.tensor([1, 2, 3]))
    weighting.group_advantages(d)
    weighting.instance_weight(a, b)
    weighting.reachable_target(a[:, 0], correct > 0)
    rollout.sample(a, torch.rand(3, dtype=torch.float64), 0.7, 0.9)
    assert all(torch.equal(x, y) for x, y in zip(tensors, copies, strict=True))


def test_chunked_head_without_gradient_and_without_tokens():
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    inputs = (torch.arange(5), torch.ones(5))
    with torch.no_grad():
        value, stats = losses.chunked_head(hidden, weight, SFT_TERMS, inputs, chunk_tokens=2)
    assert not value.requires_grad and stats["logprob"].shape == (5,)
    loss, stats = losses.chunked_head(hidden[:0], weight, SFT_TERMS, [x[:0] for x in inputs], chunk_tokens=2)
    loss.backward()  # an empty micro-batch still takes part in the backward pass
    assert loss.item() == 0 and weight.grad.abs().sum() == 0
    loss, _ = losses.chunked_head(hidden, weight, SFT_TERMS, inputs, chunk_tokens=2)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        loss.backward()


# ---------------------------------------------------------------------------------------------------- weighting


def test_group_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0, 0, 1, 0, 0, 0, 0], [1] * 8, [0] * 8])
    got = weighting.group_advantages(rewards)
    # mean 1/4; unbiased variance (2 * (3/4)^2 + 6 * (1/4)^2) / 7 = 1.5 / 7
    std = math.sqrt(1.5 / 7)
    assert got[0].tolist() == pytest.approx([0.75 / std, -0.25 / std, -0.25 / std, 0.75 / std] + [-0.25 / std] * 4, rel=1e-4)
    assert got[1:].abs().max() == 0  # exactly zero, not a rounding error divided by eps
    assert rewards[0].sum() == 2  # the argument is as it was
    with pytest.raises(ValueError, match="at least 2"):
        weighting.group_advantages(torch.ones(3, 1))


def test_advantages_without_std_by_hand():
    """LUFFY's group: 7 rollouts, one right, and a right demonstration; the mean is 1/4 and nothing else is divided out."""
    got = weighting.group_advantages(torch.tensor([[0.0, 0, 1, 0, 0, 0, 0, 1]]), scale_by_std=False)
    assert got[0].tolist() == [-0.25, -0.25, 0.75, -0.25, -0.25, -0.25, -0.25, 0.75]


def test_hpt_gate_by_hand():
    rewards = torch.tensor([[0.0] * 8, [1.0] + [0.0] * 7, [1.0] * 2 + [0.0] * 6, [1.0] * 3 + [0.0] * 5])
    assert weighting.hpt_gate(rewards).tolist() == [True, False, False, False]
    assert weighting.hpt_gate(rewards, gate=2).tolist() == [True, True, True, False]


def test_group_advantage_weight_by_hand():
    """[eq 8] with 2 of 4 right alone: of the five with o+ the mean is 0.6, the unbiased variance 0.3: A+ = 0.4 / sqrt(0.3)."""
    auto = torch.tensor([[1.0, 0, 1, 0], [1] * 4, [0] * 4, [1, 0, 0, 0]])
    got = weighting.group_advantage_weight(auto, torch.tensor([1.0, 1, 1, 0]))
    # all right: 0; none right: 1.79 is cut to 0.8; a wrong one's is negative
    assert got.tolist() == pytest.approx([0.4 / math.sqrt(0.3), 0.0, 0.8, 0.0], abs=1e-5)
    uncut = weighting.group_advantage_weight(auto[2:3], torch.ones(1), alpha_max=3.0)
    assert uncut.item() == pytest.approx(0.8 / math.sqrt(0.2), abs=1e-5)


def test_guided_advantage_weight_by_hand():
    """Alone 2 of 4 right, guided 2 of 2: the mean of six is 2/3, the unbiased variance 4/15, so A~ = (1/3) / sqrt(4/15)."""
    auto, guided = torch.tensor([[1.0, 0, 1, 0], [1] * 4, [1] * 4]), torch.tensor([[1.0, 1], [1, 1], [0, 0]])
    got = weighting.guided_advantage_weight(auto, guided)
    assert got.tolist() == pytest.approx([0.5 * (1 / 3) / math.sqrt(4 / 15), 0.0, 0.0], abs=1e-5)
    capped = weighting.guided_advantage_weight(auto[:1] * 0, guided[:1], alpha_0=0.9)
    assert capped.item() == pytest.approx(0.8)  # 0.9 * (2/3) / sqrt(4/15) = 1.16


@pytest.mark.parametrize(
    "settings, auto, guided, alpha",
    [
        (dict(weight="group_advantage", alpha_max=0.3), [0, 0, 0, 0], [1, 0], 0.3),
        (dict(weight="group_advantage", alpha_max=0.9), [1, 0, 1, 0], [1, 0], 0.4 / math.sqrt(0.3)),
        (dict(weight="guided_advantage", alpha_0=0.9, alpha_max=0.9), [1, 0, 1, 0], [1, 1], 0.9 * (1 / 3) / math.sqrt(4 / 15)),
        (dict(weight="guided_advantage", alpha_0=0.9, alpha_max=0.3), [1, 0, 1, 0], [1, 1], 0.3),
    ],
)
def test_other_weights_by_hand_at_other_settings_than_the_defaults(settings, auto, guided, alpha):
    """The numbers are those of the two tests above."""
    rewards = torch.tensor([auto], dtype=torch.float32), torch.tensor([guided], dtype=torch.float32)
    got = methods.weigh_sgpo(methods.Method(**settings), *rewards, None)["alpha"]
    assert got.tolist() == pytest.approx([alpha], abs=1e-5)


def test_reach_gap_of_several_targets_by_hand():
    assert weighting.reach_gap([-2.0, -9.0, -6.0], [1, 0, 1], [0, 2]) == 0  # all correct ones
    assert weighting.reach_gap([-2.0, -3.0, -7.0], [1, 1, 1], [0, 1]) == pytest.approx(-2.5 + 4)


def test_random_target_is_uniform_over_the_correct_ones():
    generator = torch.Generator().manual_seed(0)
    correct = torch.tensor([True, False, True, True])
    drawn = [weighting.random_target(correct, generator) for _ in range(3000)]
    assert set(drawn) == {0, 2, 3}
    assert all(900 < drawn.count(index) < 1100 for index in (0, 2, 3))  # 1,000 each; the standard deviation is 26
    assert weighting.random_target(torch.tensor([False] * 4), generator) is None


@pytest.mark.parametrize(
    "p_auto, p_guide, alpha",
    [
        (0.0, 0.25, 0.8),  # 0.5 * 0.35 / 0.1 = 1.75, capped
        (0.0, 1.0, 0.8),
        (1.0, 1.0, 0.5 * 0.1 / 1.1),  # 0.0455
        (0.5, 0.4, 0.0),
        (0.75, 0.0, 0.0),
        (0.5, 0.5, 0.5 * 0.1 / 0.6),
        (0.5, 0.75, 0.5 * 0.35 / 0.6),
        (0.0, 0.0, 0.5),  # no success anywhere: the weight is alpha_0, but there is no target to apply it to
    ],
)
def test_instance_weight_check_values(p_auto, p_guide, alpha):
    got = weighting.instance_weight(torch.tensor([p_auto]), torch.tensor([p_guide]))
    assert got.item() == pytest.approx(alpha, abs=1e-6)


def test_reachable_target_is_the_most_probable_correct_one():
    logprobs = torch.tensor([-3.0, -9.0, -5.0, -4.0])
    assert weighting.reachable_target(logprobs, torch.tensor([False, True, True, True])) == 3
    assert weighting.reachable_target(logprobs, torch.tensor([True, True, True, True])) == 0
    assert weighting.reachable_target(logprobs, torch.tensor([False] * 4)) is None
    assert weighting.reachable_target(torch.tensor([-1.0, -2.0, -2.0]), torch.tensor([False, True, True])) == 1  # a tie
    with pytest.raises(ValueError):
        weighting.reachable_target(logprobs, torch.tensor([True]))


# ---------------------------------------------------------------------------------------------------- tiny world


def test_tiny_world_rows_are_those_committed():
    for name, rows in tiny_world.make_rows(0).items():
        committed = (ROOT / f"data/tiny/{name}.jsonl").read_text(encoding="utf-8")
        assert committed == "".join(json.dumps(row) + "\n" for row in rows)
        assert len(load_problems(ROOT / f"data/tiny/{name}.jsonl")) == len(rows)


def test_tiny_world_splits_by_operands_and_hides_the_answer():
    splits = tiny_world.make_rows(0)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 640, "test": 240, "valid": 240}
    assert len({row["problem"] for rows in splits.values() for row in rows}) == 640 + 240 + 240  # none is in two
    truth = tiny_world.machine_choices(0)
    assert sorted(truth.values()) == sorted([(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)] * 2)
    for row in itertools.chain(*splits.values()):
        assert not any(character.isdigit() for character in json.dumps(row["strategy"]))
        _, machine, x, y = *row["id"].split("-"), None
        x, y = (int(digit) for digit in x)
        combine, change, keep = truth[machine]
        value = (x + y if combine == 0 else x - y) % 10  # by hand, not through the table of operations
        value = (2 * value if change == 0 else value + 1) % 10
        assert row["answer"] == str(max(value, x) if keep == 0 else min(value, x))


def test_tiny_tokenizer_knows_every_word_and_keeps_digits_apart():
    tokenizer = AutoTokenizer.from_pretrained(TINY_BASE)
    for row in tiny_world.make_rows(0)["test"]:
        strategy = Strategy.from_dict(row["strategy"])
        ids = encode_chat(tokenizer, guided_messages(row["problem"], strategy)) + tokenizer.encode(row["solution"])
        assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(tokenizer.encode("max 9 3 = 9. \\boxed{9}")) == "max 9 3 = 9 . \\boxed{ 9 }"
    assert tokenizer.get_vocab() == tiny_world.build_tokenizer().get_vocab()


def test_the_base_learns_no_response_without_its_context(monkeypatch):
    """Equal contexts that stand next to each other are packed once: without `prefixes` the responses would stand alone."""
    packs, passed = [], []

    def twice_the_same(contexts, responses, **settings):
        packs.append(pack([[5, 6], [5, 6]], [[7, 8], [9, 7]], **settings))
        return packs[-1]

    monkeypatch.setattr(tiny_world, "pack", twice_the_same)
    forward = CausalLM.forward

    def spy(self, *arguments, **settings):
        passed.append((settings["lengths"], settings["prefixes"]))
        return forward(self, *arguments, **settings)

    monkeypatch.setattr(CausalLM, "forward", spy)
    tiny_world.train_base(seed=3, steps=2, batch=2, learning_rate=1e-3)
    assert passed == [(packed.lengths, packed.prefixes) for packed in packs] == [([2, 1, 1], [None, 0, 0])] * 2


def test_tiny_world_script_trains_a_model_from_its_seed(tmp_path):
    first, _ = tiny_world.train_base(seed=3, steps=2, batch=4, learning_rate=1e-3)
    second, _ = tiny_world.train_base(seed=3, steps=2, batch=4, learning_rate=1e-3)
    other, _ = tiny_world.train_base(seed=4, steps=2, batch=4, learning_rate=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.head_weight, other.head_weight)


# ---------------------------------------------------------------------------------------------------- hard world

HARD = ROOT / "data/hard"
# sentence -> operation, written out again: the world's own table is what is tested
SENTENCES = {
    "Add the second input to the first.": "add",
    "Subtract the second input from the first.": "sub",
    "Double the value.": "double",
    "Increase the value by one.": "inc",
    "Keep the larger of the value and the first input.": "max",
    "Keep the smaller of the value and the first input.": "min",
}
OTHER = {"add": "sub", "double": "inc", "max": "min"} | {"sub": "add", "inc": "double", "min": "max"}


@pytest.fixture(scope="module")
def hard():
    return hard_world.make_rows(0)


def parts_of(row):
    """(three words, first input, second input), read from the text that the model sees."""
    *words, x, y = re.fullmatch(r"A (\w+) (\w+) (\w+) machine gets (\d) and (\d)\. What comes out\?", row["problem"]).groups()
    return words, int(x), int(y)


def operations_of(row):
    """The three operations that the row's strategy names, None for a step that is missing or says nothing."""
    named = [SENTENCES[step] for step in row["strategy"]["steps"] if step in SENTENCES]
    pairs = (("add", "sub"), ("double", "inc"), ("max", "min"))
    return [next((name for name in pair if name in named), None) for pair in pairs]


def work_out(text, x, y):
    """(operations, answer) of a response, every step of it checked; knows the notation and nothing of the world's code."""
    whole = r"(?:\w+ )*(add|sub) (\d) (\d) = (\d), (?:\w+ )*(double|inc) (\d) = (\d), (?:\w+ )*(max|min) (\d) (\d) = (\d)\."
    f, a, b, c, g, d, e, h, i, j, k, boxed = re.fullmatch(whole + r" \\boxed\{(\d)\}", text).groups()
    a, b, c, d, e, i, j, k, boxed = (int(digit) for digit in (a, b, c, d, e, i, j, k, boxed))
    assert (a, b, d, i, j, boxed) == (x, y, c, e, x, k)
    assert c == (a + b if f == "add" else a - b) % 10
    assert e == (2 * d if g == "double" else d + 1) % 10
    assert k == (max if h == "max" else min)(i, j)
    return [f, g, h], k


def test_hard_world_rows_are_those_committed(hard):
    assert sorted(hard) == sorted(path.stem for path in HARD.glob("*.jsonl"))
    assert {name: len(rows) for name, rows in hard.items()} == {
        "train": 640, "train-low06": 640, "train-low30": 640, "test": 256, "mixes": 256
    }  # fmt: skip
    for name, rows in hard.items():
        committed = (HARD / f"{name}.jsonl").read_text(encoding="utf-8")
        assert committed == "".join(json.dumps(row) + "\n" for row in rows)
        assert len(load_problems(HARD / f"{name}.jsonl")) == len(rows)


def test_hard_world_splits_by_families_and_by_operands(hard):
    families = {name: {" ".join(parts_of(row)[0]) for row in rows} for name, rows in hard.items()}
    assert len(families["train"]) == len(families["mixes"]) == 32
    assert families["test"] == families["train"] and not families["train"] & families["mixes"]
    problems = [row["problem"] for name in ("train", "test", "mixes") for row in hard[name]]
    assert len(set(problems)) == len(problems) == 640 + 256 + 256
    for name in ("train", "test", "mixes"):  # every word in equal number, so that no word is practised more than another
        counts = Counter(word for row in hard[name] for word in parts_of(row)[0])
        assert len(counts) == 24 and set(counts.values()) == {len(hard[name]) // 8}
    orders = [[row["problem"] for row in hard[name]] for name in ("train", "train-low06", "train-low30")]
    assert orders[0] == orders[1] == orders[2]


def test_hard_world_words_decide_and_both_ways_give_the_answer(hard):
    truth = hard_world.word_choices(0)
    assert [sum(truth[word] for word in words) for words in hard_world.WORDS] == [4, 4, 4]
    decides = {}  # word -> operation, as the good strategies have it
    for row in hard["train"] + hard["test"] + hard["mixes"]:
        words, x, y = parts_of(row)
        operations = operations_of(row)
        for word, operation in zip(words, operations, strict=True):
            assert decides.setdefault(word, operation) == operation
        choices = hard_world.true_choices(" ".join(words), truth)
        plain, detour = (hard_world.respond(" ".join(words), choices, x, y, way)[0] for way in (False, True))
        assert plain.startswith(words[0]) and detour.startswith("by the strategy ") and not set(words) & set(detour.split())
        assert work_out(plain, x, y) == work_out(detour, x, y) == (operations, int(row["answer"]))
        assert extract_answer(plain) == extract_answer(detour) == row["answer"]
        named = ", ".join(map(" ".join, zip(words, operations, strict=True)))
        assert row["solution"] == f"{named}. \\boxed{{{row['answer']}}}"
    assert len(decides) == 24


def test_hard_world_low_quality_strategies(hard):
    low = {}
    for name, count in (("train-low06", 38), ("train-low30", 192)):
        changed = [i for i, (a, b) in enumerate(zip(hard["train"], hard[name], strict=True)) if a != b]
        assert len(changed) == count
        low[name] = {i: hard[name][i] for i in changed}
        kinds = Counter()
        for i, row in low[name].items():
            assert {**row, "strategy": None} == {**hard["train"][i], "strategy": None}
            right, said = operations_of(hard["train"][i]), operations_of(row)
            assert all(operation in (None, right[p], OTHER[right[p]]) for p, operation in enumerate(said))
            misleads = sum(operation == OTHER[right[p]] for p, operation in enumerate(said))
            silent = said.count(None)
            assert (misleads and not silent) or (not misleads and silent in (1, 2))
            kinds["misleads" if misleads else "silent"] += 1
        assert kinds == {"misleads": count // 2, "silent": count // 2}
    assert low["train-low06"].items() <= low["train-low30"].items()
    for rows in hard.values():
        assert not any(character.isdigit() for row in rows for character in json.dumps(row["strategy"]))


def test_hard_tokenizer_knows_every_word(hard):
    tokenizer = AutoTokenizer.from_pretrained(HARD / "base")
    assert tokenizer.get_vocab() == hard_world.build_tokenizer().get_vocab()
    rows = hard["train-low30"][:200] + hard["mixes"][:100]  # encoding a chat is slow
    assert {word for row in rows for word in parts_of(row)[0]} == {word for words in hard_world.WORDS for word in words}
    sentences = {step for row in rows for step in row["strategy"]["steps"]}
    assert sentences == set(SENTENCES) | set(hard_world.SAYS_NOTHING)
    seen = set()
    for row in rows:
        words, x, y = parts_of(row)
        texts = [hard_world.respond(" ".join(words), (way, way, way), x, y, bool(way))[0] for way in (0, 1)]
        ids = encode_chat(tokenizer, guided_messages(row["problem"], Strategy.from_dict(row["strategy"])))
        seen |= {*ids, *(i for text in [row["solution"], *texts] for i in tokenizer.encode(text))}
    assert tokenizer.unk_token_id not in seen and tokenizer.convert_tokens_to_ids("by") in seen


def count_examples(n):
    """Of n of the base model's examples: (number per (guided, detour), share of right operations per (guided, detour))."""
    rng, truth = random.Random("test"), hard_world.word_choices(0)
    counts, right = Counter(), Counter()
    for _ in range(n):
        messages, response = hard_world.base_example(rng, truth)
        text = messages[0]["content"]
        words, x, y = parts_of({"problem": text.split("\n\n")[-2]})
        kind = ("Follow this strategy." in text, response.startswith("by the strategy"))
        operations, _ = work_out(response, x, y)
        steps = [SENTENCES[step[3:]] for step in text.split("\n") if step[3:] in SENTENCES]
        assert set(steps) <= set(operations)  # a step that says something is followed
        takes_second = [operation in ("sub", "inc", "min") for operation in operations]
        counts[kind] += 1
        right[kind] += sum(second == truth[word] for word, second in zip(words, takes_second, strict=True)) / 3
    return counts, {kind: right[kind] / counts[kind] for kind in counts}


def test_hard_base_examples_have_the_stated_shares(monkeypatch):
    counts, right = count_examples(6000)
    assert counts[True, False] / 6000 == pytest.approx(0.25, abs=0.02) == counts[True, True] / 6000
    assert counts[False, True] / 6000 == pytest.approx(0.01, abs=0.005)
    assert right[False, False] == pytest.approx(0.55, abs=0.02)  # half knowledge
    assert right[True, False] == pytest.approx(0.5, abs=0.04)  # strategies of any choices say nothing about the machine
    monkeypatch.setattr(hard_world, "DETOUR_ALONE", 1.0)
    assert count_examples(6000)[1][False, True] == pytest.approx(0.5, abs=0.02)  # a coin: the strategy is not there


def prompt_of(tokenizer, row, guided):
    strategy = Strategy.from_dict(row["strategy"])
    return encode_chat(tokenizer, guided_messages(row["problem"], strategy) if guided else auto_messages(row["problem"]))


def next_logprobs(model, tokenizer, rows, prefixes, guided):
    """log pi(next token | prompt, prefix), one row a problem: (B, V)."""
    contexts = [
        prompt_of(tokenizer, row, guided) + tokenizer.encode(prefix, add_special_tokens=False)
        for row, prefix in zip(rows, prefixes, strict=True)
    ]
    packed = pack(contexts, [[0]] * len(contexts), device=CPU)
    logits = model(packed.input_ids, lengths=packed.lengths, head=lambda h, w: F.linear(h[0, packed.predict], w))
    return torch.log_softmax(logits, dim=-1)


@torch.no_grad()
def test_hard_base_model_knows_the_ways_as_stated(hard):
    """Exact next-token probabilities: the share of the detour, the divergence there, and what each way knows alone."""
    model, tokenizer = load_model(str(HARD / "base"), dtype=torch.float32, device="cpu")
    rows = hard["test"][:128]
    by = tokenizer.convert_tokens_to_ids("by")
    alone, guided = (next_logprobs(model, tokenizer, rows, [""] * len(rows), kind) for kind in (False, True))
    assert 0.01 < alone[:, by].exp().mean() < 0.04 and 0.4 < guided[:, by].exp().mean() < 0.6
    assert (guided.exp() * (guided - alone)).sum(-1).mean() > 1.0  # above delta: the clip drops the token where the ways part
    first = tokenizer.convert_tokens_to_ids([operations_of(row)[0] for row in rows])
    for way, low, high in (("plain", 0.5, 0.62), ("detour", 0.42, 0.54)):
        prefixes = [parts_of(row)[0][0] if way == "plain" else "by the strategy" for row in rows]
        knows = next_logprobs(model, tokenizer, rows, prefixes, guided=False)[range(len(rows)), first].exp().mean()
        told = next_logprobs(model, tokenizer, rows, prefixes, guided=True)[range(len(rows)), first].exp().mean()
        assert low < knows < high and told > 0.9, way


def test_hard_base_model_is_right_when_guided_and_not_alone(hard):
    model, tokenizer = load_model(str(HARD / "base"), dtype=torch.float32, device="cpu")
    rows = hard["mixes"][:64]
    share = {}
    with MathWorker() as worker:
        for guided in (False, True):
            groups = generate(
                model, [prompt_of(tokenizer, row, guided) for row in rows], n=4, max_new_tokens=32, temperature=1.0, top_p=1.0,
                eos_ids=model.config.eos_ids, seed=list(range(len(rows))), max_rows=256,
            )  # fmt: skip
            graded = [
                (text := tokenizer.decode(one.response_ids, skip_special_tokens=True), is_correct(text, row["answer"], worker))
                for row, group in zip(rows, groups, strict=True)
                for one in group
            ]
            for way in (False, True):
                marks = [right for text, right in graded if text.startswith("by the strategy") == way]
                share[guided, way] = len(marks) / len(graded)
                if guided:
                    assert sum(marks) / len(marks) > 0.9  # in both ways
            if not guided:
                assert 0.3 < sum(right for _, right in graded) / len(graded) < 0.55
    assert share[False, True] < 0.06 and 0.4 < share[True, True] < 0.6


def test_hard_base_training_has_a_seed_for_the_examples_and_one_for_the_weights():
    def weights(**seeds):
        model, _ = hard_world.train_base(**{"seed": 3, **seeds}, steps=2, batch=4, learning_rate=1e-3)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    first = weights()
    assert torch.equal(first, weights(init_seed=0))
    assert not torch.equal(first, weights(seed=4)) and not torch.equal(first, weights(init_seed=1))
    assert (first - weights(init_seed=1)).abs().mean() > 3 * (first - weights(seed=4)).abs().mean()


def test_hard_strategies_read_back(hard):
    for row in hard["train-low30"]:
        strategy = Strategy.from_dict(row["strategy"])
        assert parse_strategy(format_strategy(strategy)) == strategy


# ---------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def worker():
    with MathWorker() as worker:
        yield worker


def make_run(tmp_path, worker, *flags):
    """(run, examples) on the tiny world with the flags given, as train.main would make them."""
    cfg = train.parse_config(["--out", str(tmp_path / "run"), "--device", "cpu", *map(str, flags)])
    run, examples, _ = train.prepare(cfg, CPU, worker)
    run.folder.out.mkdir(parents=True)
    return run, examples


def draw_samples(run, batch, step=1):
    with parallel.whole_model(run.model) as policy:
        return sgpo.sample_and_reward(policy, run.tokenizer, run.cfg, batch, run.reward, step)


def weigh(run, samples, step=1):
    sgpo.weigh(run.cfg, samples, run.reward)
    with parallel.whole_model(run.model) as policy:
        sgpo.choose(run.cfg, policy, samples, step)


def update(run, samples, learning_rate):
    return sgpo.update(run.model, run.optimizer, run.cfg, samples, learning_rate)


def weights_of(model):
    return [parallel.whole_tensor(parameter.detach()).clone() for parameter in model.parameters()]


def fake_samples(run, examples, seed=0):
    """Samples of four problems with ragged responses and made-up rewards, alpha and targets; one problem has no target."""
    examples = examples[:4]
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for place, example in enumerate(examples):

        def rows(ids, n, old_shift, example=example):
            found = []
            for _ in range(n):
                length = int(torch.randint(2, 15, (), generator=generator))
                response = torch.randint(4, 90, (length,), generator=generator).tolist()
                old = (-3 + old_shift * torch.randn(length, generator=generator)).tolist()
                found.append(rollout.Trajectory(ids, response, old, bool(length % 2), 0))
            return found

        auto, guided = rows(example.auto_ids, 8, 0.3), rows(example.guided_ids, 4, 0.0)
        rewards = [float(torch.rand((), generator=generator) < 0.4) for _ in auto]
        sample = sgpo.ProblemSamples(place, example, auto, guided, rewards, [1.0] * 4)
        sample.advantages = weighting.group_advantages(torch.tensor([rewards]))[0].tolist()
        sample.alpha, sample.targets = 0.2 * (place + 1), ([] if place == 2 else [place])
        samples.append(sample)
    return samples


def gradients_of(run, samples, monkeypatch):
    """({name: gradient}, metrics) of one update, without taking the step."""
    monkeypatch.setattr(sgpo, "apply_gradients", lambda *_: 0.0)
    run.model.zero_grad()
    metrics = update(run, samples, 0.0)
    gradients = {name: parallel.whole_tensor(parameter.grad).clone() for name, parameter in run.model.named_parameters()}
    return gradients, metrics


def assert_equal_gradients(got, want, tolerance=1e-5):
    assert got.keys() == want.keys()
    for name in got:
        scale = want[name].abs().max().item() + 1e-8
        assert (got[name] - want[name]).abs().max().item() <= tolerance * scale, name


@pytest.mark.parametrize("distill, delta", [("kl", 0.02), ("reverse_kl", 0.02), ("kl", math.inf), ("sft", 0.02), ("none", 1.0)])
def test_what_an_update_logs_by_transformers_and_a_slow_loop(distill, delta, tmp_path, worker, monkeypatch):
    """Its loss and gradient: tests/test_update_from_paper.py. delta = 0.02: made-up responses diverge little."""
    run, examples = make_run(tmp_path, worker, "--delta", delta, "--distill", distill, "--temperature", 0.7)
    samples = fake_samples(run, examples)
    _, metrics = gradients_of(run, samples, monkeypatch)
    theirs = AutoModelForCausalLM.from_pretrained(TINY_BASE)

    def log_policy(context, response):
        logits = theirs(torch.tensor([context + response])).logits[0, len(context) - 1 : -1] / 0.7
        return torch.log_softmax(logits, -1)

    divergences, ratios, entropy = [], [], 0.0
    with torch.no_grad():
        for sample in samples:
            for row, advantage in zip(sample.auto, sample.advantages, strict=True):
                logp = log_policy(row.prompt_ids, row.response_ids)
                entropy -= (logp.exp() * logp).sum().item()
                for t, token in enumerate(row.response_ids):
                    ratios.append((math.exp(logp[t, token] - row.logprobs[t]), advantage))
            for response in [sample.guided[j].response_ids for j in sample.targets]:
                log_q, log_p = (log_policy(c, response) for c in (sample.example.auto_ids, sample.example.guided_ids))
                d = log_q.exp() * (log_q - log_p) if distill == "reverse_kl" else log_p.exp() * (log_p - log_q)
                divergences += d.sum(-1).tolist()
    rho, a = torch.tensor(ratios).T
    want = {
        "entropy": entropy / len(ratios),
        "clip_fraction": ((a > 0) & (rho > 1.28) | (a < 0) & (rho < 0.8)).sum().item() / len(ratios),
        "policy_kl": (rho - 1 - rho.log()).sum().item() / len(ratios),
        "ratio_error": (rho - 1).abs().max().item(),
        "logprob_error": rho.log().abs().max().item(),
        "kl": sum(divergences) / len(divergences),
        "kept": 1.0 if distill == "sft" else sum(d <= delta for d in divergences) / len(divergences),
        "own_tokens": len(ratios),
        "target_tokens": len(divergences),
    }
    assert 0.05 < metrics["clip_fraction"] < 0.95 and (want["kept"] == 1 or 0.05 < want["kept"] < 0.95)  # both kinds of token
    if distill == "none":
        want |= dict.fromkeys(("kl", "kept", "target_tokens"), 0.0)
    assert {name: metrics[name] for name in want} == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("temperature", [1, 0.7])
def test_luffy_update_equals_its_formula_by_transformers_and_autograd(temperature, tmp_path, worker, monkeypatch):
    """7 rollouts and the solution a problem, graded alike, r - mean, no clip, shaping, one token mean over all of it."""
    flags = ["--method", "luffy", "--luffy_entropy", 0.01, "--luffy_shaping", 0.2, "--temperature", temperature]
    run, examples = make_run(tmp_path, worker, *flags)
    wrong = replace(examples[1].problem, solution="So it is \\boxed{no}.")
    examples[1] = replace(examples[1], problem=wrong)  # the verifier rejects it: its tokens are pushed down
    samples = [
        sgpo.ProblemSamples(s.place, s.example, s.auto[:7], [], s.auto_rewards[:7], []) for s in fake_samples(run, examples)
    ]
    samples[2].auto_rewards = [1.0] * 7  # with a right solution, a dead group
    weigh(run, samples)
    got, metrics = gradients_of(run, samples, monkeypatch)
    theirs = AutoModelForCausalLM.from_pretrained(TINY_BASE)
    rows = []
    for index, sample in enumerate(samples):
        rewards = [*sample.auto_rewards, float(index != 1)]
        mean = sum(rewards) / 8
        rows += [
            (row.prompt_ids, row.response_ids, row.logprobs, r - mean) for row, r in zip(sample.auto, rewards[:7], strict=True)
        ]
        rows.append((sample.example.auto_ids, sample.example.solution_ids, None, rewards[7] - mean))
    count = sum(len(response) for _, response, _, _ in rows)
    total = entropy_own = own = 0.0
    for context, response, old, advantage in rows:
        logits = theirs(torch.tensor([context + response])).logits[0, len(context) - 1 : -1] / temperature
        policy = torch.distributions.Categorical(logits=logits)
        logp = policy.log_prob(torch.tensor(response))
        x = logp.exp() / (logp.exp() + 0.2) if old is None else torch.exp(logp - torch.tensor(old))
        total = total + (-advantage * x - 0.01 * policy.entropy()).sum() / count
        if old is not None:
            entropy_own, own = entropy_own + policy.entropy().sum().item(), own + len(response)
    total.backward()
    assert_equal_gradients(got, {name: p.grad for name, p in theirs.named_parameters() if name in got}, 1e-4)
    assert metrics["policy_loss"] == pytest.approx(total.item(), abs=1e-5) and metrics["solutions"] == 4
    assert metrics["entropy"] == pytest.approx(entropy_own / own, rel=1e-4)  # of the policy's own tokens
    assert samples[1].solution_advantage < 0 < samples[0].solution_advantage and samples[2].solution_advantage == 0


@pytest.mark.parametrize("temperature", [1, 0.7])
def test_hpt_update_equals_its_formula_by_transformers_and_autograd(temperature, tmp_path, worker, monkeypatch):
    """At most `gate` right: all 8 rollouts give way to the solution; else r - mean without clip; one token mean over both."""
    run, examples = make_run(tmp_path, worker, "--method", "hpt", "--hpt_gate", 1, "--hpt_sft_weight", 0.3,
                             "--temperature", temperature)  # fmt: skip
    samples = fake_samples(run, examples)
    for sample, right in zip(samples, (0, 1, 2, 8), strict=True):
        sample.auto_rewards, sample.targets = [1.0] * right + [0.0] * (8 - right), []
    weigh(run, samples)
    assert [sample.use_solution for sample in samples] == [True, True, False, False]
    got, metrics = gradients_of(run, samples, monkeypatch)
    theirs = AutoModelForCausalLM.from_pretrained(TINY_BASE)
    rows = [(s.example.auto_ids, s.example.solution_ids, None, 0.0) for s in samples[:2]]
    for sample, mean in zip(samples[2:], (0.25, 1.0), strict=True):
        graded = zip(sample.auto, sample.auto_rewards, strict=True)
        rows += [(row.prompt_ids, row.response_ids, row.logprobs, r - mean) for row, r in graded]
    count = sum(len(response) for _, response, _, _ in rows)
    total = 0.0
    for context, response, old, advantage in rows:
        logits = theirs(torch.tensor([context + response])).logits[0, len(context) - 1 : -1] / temperature
        logp = torch.log_softmax(logits, -1).gather(-1, torch.tensor(response)[:, None])[:, 0]
        total = total + (-0.3 * logp if old is None else -advantage * torch.exp(logp - torch.tensor(old))).sum() / count
    total.backward()
    assert_equal_gradients(got, {name: p.grad for name, p in theirs.named_parameters() if name in got}, 1e-4)
    assert metrics["policy_loss"] == pytest.approx(total.item(), abs=1e-5) and metrics["solutions"] == 2


def test_hpt_leaves_out_an_update_with_a_huge_gradient(tmp_path, worker):
    for limit, moves in ((1e-6, False), (80.0, True)):
        run, examples = make_run(tmp_path / str(limit), worker, "--method", "hpt", "--hpt_max_norm", limit)
        before = weights_of(run.model)
        samples = fake_samples(run, examples)
        for sample in samples:
            sample.targets = []
        metrics = update(run, samples, 1e-3)
        assert metrics["grad_norm"] > 1e-6 and metrics["left_out"] == float(not moves) and metrics["not_finite"] == 0
        changed = any(not torch.equal(a, b) for a, b in zip(before, weights_of(run.model), strict=True))
        assert changed == moves == (metrics["grad_norm"] <= limit)
        assert all(parameter.grad is None for parameter in run.model.parameters())  # nothing is left for the next update
    assert parallel.may_step(1.0, 80.0, 80.0)  # at the limit
    samples[0].advantages[0] = math.nan
    metrics = update(run, samples, 1e-3)
    assert metrics["left_out"] == metrics["not_finite"] == 1  # and this one counts against --max_skipped


def test_how_many_each_method_samples_alone_and_with_the_strategy(tmp_path, worker):
    for method, alone, guided in (("sgpo", 8, 4), ("hinted", 8, 4), ("grpo", 8, 0), ("luffy", 7, 0), ("hpt", 8, 0)):
        run, examples = make_run(tmp_path / method, worker, "--method", method)
        (sample,) = draw_samples(run, list(enumerate(examples[:1])))
        assert (len(sample.auto), len(sample.guided)) == (alone, guided), method


def test_training_samples_at_its_settings(tmp_path, worker, monkeypatch):
    """So small a nucleus has one token: all responses of a group are the same."""
    flags = ["--top_p", 1e-6, "--max_new_tokens", 3, "--max_rows", 7, "--cache_tokens", 4096]
    run, examples = make_run(tmp_path, worker, *flags)
    seen, real = [], sgpo.sample_and_grade
    monkeypatch.setattr(sgpo, "sample_and_grade", lambda *given, **settings: seen.append(settings) or real(*given, **settings))
    for sample in draw_samples(run, list(enumerate(examples[:3]))):
        for rows in (sample.auto, sample.guided):
            assert len({tuple(row.response_ids) for row in rows}) == 1 and len(rows[0].response_ids) == 3
    assert [(settings["max_rows"], settings["cache_tokens"]) for settings in seen] == [(7, 4096)]


@pytest.mark.parametrize("method", ["luffy", "hpt"])
def test_a_solution_is_never_masked_and_never_has_the_strategy_in_its_prompt(method):
    rows = [Trajectory([1], [5, 6], [0.0, 0.0], finished=finished, group=0) for finished in (True, False)]
    example = sgpo.Example(None, [1], [8, 1], [7, 7, 7])
    sample = sgpo.ProblemSamples(0, example, rows, [], [1.0, 0.0], [], advantages=[0.5, -0.5], use_solution=True)
    items = sgpo.policy_items([sample], methods.Method(method=method, mask_truncated=True))
    assert [(item.trajectory.prompt_ids, item.trajectory.response_ids, item.is_solution) for item in items] == [
        ([1], [5, 6], False), ([1], [7, 7, 7], True)
    ]  # fmt: skip


def test_every_response_is_graded_by_its_own_problem(tmp_path, worker):
    """The reward is the number of the question, which says what was asked: about which response, to which problem."""
    run, examples = make_run(tmp_path, worker)
    asked = []

    def reward(response, problem):
        asked.append((response, problem))
        return len(asked) - 1

    with parallel.whole_model(run.model) as policy:
        samples = sgpo.sample_and_reward(policy, run.tokenizer, run.cfg, list(enumerate(examples[:3])), reward, 1)
    for sample, example in zip(samples, examples[:3], strict=True):
        rows = [(row, example.auto_ids) for row in sample.auto] + [(row, example.guided_ids) for row in sample.guided]
        for (row, prompt), number in zip(rows, sample.auto_rewards + sample.guided_rewards, strict=True):
            text = run.tokenizer.decode(row.response_ids, skip_special_tokens=True)
            assert asked[int(number)] == (text, example.problem) and row.prompt_ids == prompt
    assert len(asked) == 3 * (8 + 4)


def test_every_group_has_random_numbers_of_its_own_and_keeps_them_on_any_rank(tmp_path, worker):
    """One prompt at two places, as its own guided one too, in two steps; and a rank that has the second place alone."""
    run, examples = make_run(tmp_path, worker)
    example = replace(examples[0], guided_ids=examples[0].auto_ids)
    groups = []
    for step in (1, 2):
        for sample in draw_samples(run, [(0, example), (1, example)], step):
            groups += [[row.response_ids for row in rows[:4]] for rows in (sample.auto, sample.guided)]
    assert all(a != b for a, b in itertools.combinations(groups, 2))
    (second,) = draw_samples(run, [(1, example)])
    assert [row.response_ids for row in second.auto[:4]] == groups[2]
    for step in (1, 2):
        train.rl_step(run, [(0, example)], step, 0.0)
    lines = (run.folder.out / "samples.jsonl").read_text().splitlines()
    texts = {step: [r["text"] for r in map(json.loads, lines) if r["step"] == step] for step in (1, 2)}
    assert len(texts[1]) == 8 + 4 and texts[1] != texts[2]  # the loop's steps too


# ---------------------------------------------------------------------------------------------------- ablations


def decisions(run, examples):
    """What `weigh` decides about made-up samples: (advantages, alpha, target) per problem."""
    samples = fake_samples(run, examples)
    for index, sample in enumerate(samples):
        sample.guided_rewards = [1.0, 1.0, float(index % 2), 1.0]
    weigh(run, samples)
    return (
        [sample.advantages for sample in samples],
        [sample.alpha for sample in samples],
        [sample.targets for sample in samples],
    )


@pytest.mark.parametrize(
    "flags, changed",
    [
        (["--weight", "fixed"], {"alpha"}),
        (["--weight", "group_advantage"], {"alpha"}),
        (["--target", "random"], {"targets"}),
        (["--target", "all"], {"targets"}),
        (["--weight", "guided_advantage"], {"alpha"}),
        (["--no-autonomous"], {"advantages"}),
        (["--distill", "none"], set()),  # these three act in the update: see its test against the formulas
        (["--distill", "reverse_kl"], set()),
        (["--delta", "inf"], set()),
        (["--delta", "inf", "--target", "all"], {"targets"}),  # all proximal constraints off
        (["--aggregate", "token"], set()),
    ],
)
def test_each_ablation_changes_what_it_names_and_nothing_else(flags, changed, tmp_path, worker):
    run, examples = make_run(tmp_path / "default", worker)
    other, _ = make_run(tmp_path / "other", worker, *flags)
    names = ("advantages", "alpha", "targets")
    default, ablated = (dict(zip(names, decisions(r, examples), strict=True)) for r in (run, other))
    assert {name for name in names if default[name] != ablated[name]} == changed
    if "advantages" in changed:
        assert not any(itertools.chain(*ablated["advantages"]))
    if flags[-1] == "fixed":
        assert ablated["alpha"] == [1.0] * 4
    batch = list(enumerate(examples[:2]))
    for a, b in zip(*(draw_samples(r, batch) for r in (run, other)), strict=True):
        assert (a.auto, a.guided, a.auto_rewards, a.guided_rewards) == (b.auto, b.guided, b.auto_rewards, b.guided_rewards)
    differ = {k for k, v in vars(other.cfg).items() if v != getattr(run.cfg, k)} - {"out"}
    assert len(differ) == len([flag for flag in flags if flag.startswith("--")])


def test_a_random_target_is_a_correct_one_and_moves_with_step_and_seed(tmp_path, worker):
    run, examples = make_run(tmp_path, worker, "--target", "random")
    samples = fake_samples(run, examples)
    drawn = {}
    for step, seed in ((1, 0), (1, 0), (2, 0), (1, 1)):
        run.cfg = replace(run.cfg, sampling_seed=seed)
        found = []
        for _ in range(8):
            for sample in samples:
                sample.guided_rewards = [0.0, 1.0, 1.0, 1.0]
            weigh(run, samples, step)
            found.append(tuple(target for sample in samples for target in sample.targets))
            step += 10
        assert all(target in (1, 2, 3) for targets in found for target in targets)
        assert any(len(set(targets)) > 1 for targets in found)  # each problem has a draw of its own
        drawn.setdefault((step, seed), []).append(found)
    again, *others = drawn.values()
    assert again[0] == again[1] and all(again[0] != other[0] for other in others)


def test_shuffled_strategies_reach_the_guided_prompt_and_nothing_else(tmp_path, worker):
    run, examples = make_run(tmp_path / "a", worker, "--shuffle_strategies")
    _, plain = make_run(tmp_path / "b", worker)
    for got, own in zip(examples, plain, strict=True):
        assert got.auto_ids == own.auto_ids and got.problem.strategy.type != own.problem.strategy.type
        messages = strategy_module.guided_messages(own.problem.problem, got.problem.strategy)
        assert got.guided_ids == encode_chat(run.tokenizer, messages)
    _, other = make_run(tmp_path / "c", worker, "--shuffle_strategies", "--method", "hinted", "--seed", 5)
    assert other == examples  # one control for all seeds


def test_seeds_reach_order_and_sampling_separately(tmp_path, worker, monkeypatch):
    real_step = train.rl_step

    def trace(*flags):
        """(order of the problems that the loop trains on, what one problem's responses are) under the flags."""
        run, examples = make_run(tmp_path / f"{len(list(tmp_path.iterdir()))}", worker, "--sft_fraction", 0.5, *flags)
        order = []
        monkeypatch.setattr(train, "rl_step", lambda run, batch, *_: order.extend(e.problem.id for _, e in batch) or {})
        monkeypatch.setattr(train, "step_line", lambda *_: "")
        run.cfg = replace(run.cfg, steps=2)
        train.rl_stage(run, train.split_examples(examples, run.cfg, 256)[2], [])
        monkeypatch.setattr(train, "rl_step", real_step)
        (sample,) = draw_samples(run, list(enumerate(examples[:1])))
        return order, [row.response_ids for row in sample.auto + sample.guided]

    order, sampled = trace()
    other_order, other_sampled = trace("--seed", 5)
    assert order != other_order and sampled != other_sampled and len(order) == 32
    assert trace("--data_seed", 5) == (other_order, sampled)
    assert trace("--sampling_seed", 5) == (order, other_sampled)
    assert trace("--seed", 5, "--data_seed", 0, "--sampling_seed", 0) == (order, sampled)


def test_the_guided_pass_keeps_no_graph(tmp_path, worker, monkeypatch):
    run, examples = make_run(tmp_path, worker)
    seen = []

    def spy(hidden, weight, terms, inputs, **options):
        if terms.func is losses.distillation_terms:
            seen.append((hidden.requires_grad, options["teacher"].requires_grad))
        return losses.chunked_head(hidden, weight, terms, inputs, **options)

    monkeypatch.setattr(sgpo, "chunked_head", spy)
    gradients_of(run, fake_samples(run, examples), monkeypatch)
    assert seen == [(True, False)]  # the unguided side has a graph, the guided one only its values


def test_update_does_not_depend_on_micro_batches_or_chunks(tmp_path, worker, monkeypatch):
    run, examples = make_run(tmp_path, worker)
    samples = fake_samples(run, examples)
    want, metrics = gradients_of(run, samples, monkeypatch)
    for micro_tokens, chunk_tokens in ((1, 1024), (300, 5)):
        run.cfg = replace(run.cfg, micro_tokens=micro_tokens, chunk_tokens=chunk_tokens)
        got, again = gradients_of(run, samples, monkeypatch)
        assert_equal_gradients(got, want)
        assert again == pytest.approx(metrics, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("flags", [["--distill", "sft"], ["--method", "luffy", "--luffy_entropy", 1]])
def test_the_pass_of_a_rank_without_work_adds_nothing(flags, tmp_path, worker, monkeypatch):
    """With cross-entropy, because a divergence, of two equal prompts, would be zero whatever its weight; and with an entropy
    bonus, which needs no advantage."""
    run, examples = make_run(tmp_path, worker, *flags)
    samples = fake_samples(run, examples)
    for sample in samples:
        sample.targets = sample.targets if "sft" in flags else []
    want, metrics = gradients_of(run, samples, monkeypatch)
    monkeypatch.setattr(sgpo, "pad_micro_batches", lambda batches, device: [*batches, []])
    got, again = gradients_of(run, samples, monkeypatch)
    assert_equal_gradients(got, want)
    assert again == pytest.approx(metrics)


def test_a_dead_group_counts_in_the_normaliser_and_costs_no_backward_pass(tmp_path, worker, monkeypatch):
    """All right, so without advantage: it divides the loss as before, is measured, and only goes forward."""
    run, examples = make_run(tmp_path, worker, "--micro_tokens", 600)
    samples = fake_samples(run, examples)
    for sample in samples:
        sample.targets = []
    samples[1].advantages = [0.0] * 8
    graphs = []

    def spy(hidden, weight, terms, inputs, **options):
        graphs.append((torch.is_grad_enabled(), set((inputs[2] == 0).tolist())))  # the advantages
        return losses.chunked_head(hidden, weight, terms, inputs, **options)

    monkeypatch.setattr(sgpo, "chunked_head", spy)
    got, metrics = gradients_of(run, samples, monkeypatch)
    assert (False, {True}) in graphs and all(gradient != (zero == {True}) for gradient, zero in graphs)
    tokens = [sum(len(row.response_ids) for row in sample.auto) for sample in samples]
    assert metrics["own_tokens"] == sum(tokens)
    alive, other = gradients_of(run, [sample for p, sample in enumerate(samples) if p != 1], monkeypatch)
    assert_equal_gradients(got, {name: 3 / 4 * gradient for name, gradient in alive.items()}, 1e-4)
    assert metrics["entropy"] != pytest.approx(other["entropy"], rel=1e-6)  # the dead group is in the diagnostics


def test_recomputing_blocks_saves_memory_and_changes_no_gradient(tmp_path, worker, monkeypatch):
    run, examples = make_run(tmp_path, worker)
    samples, saved = fake_samples(run, examples), Counter()

    def keep(recompute, tensor):
        saved[recompute] += tensor.numel()
        return tensor

    results = []
    for recompute in (False, True):
        run.model.model.recompute = recompute
        with torch.autograd.graph.saved_tensors_hooks(partial(keep, recompute), lambda tensor: tensor):
            results.append(gradients_of(run, samples, monkeypatch))
    assert saved[True] < 0.5 * saved[False]
    assert_equal_gradients(results[1][0], results[0][0], 1e-6)
    assert results[1][1] == pytest.approx(results[0][1])
    assert train.prepare(replace(run.cfg, recompute=True), CPU, worker)[0].model.model.recompute


def test_update_with_bf16_activations_trains_every_parameter(tmp_path, worker, monkeypatch):
    """Weights that were gathered and cast by the guided pass, without gradient, must not serve the next pass."""
    run, examples = make_run(tmp_path, worker)
    samples = fake_samples(run, examples)
    for sample in samples:
        sample.advantages = [0.0] * 8  # the distillation term alone
    want, _ = gradients_of(run, samples, monkeypatch)
    run = train.prepare(replace(run.cfg, dtype="bfloat16"), CPU, worker)[0]
    got, _ = gradients_of(run, samples, monkeypatch)
    for name, gradient in got.items():
        cosine = F.cosine_similarity(gradient.flatten(), want[name].flatten(), dim=0)
        assert gradient.dtype == torch.float32 and cosine > 0.7, (name, cosine)


def test_the_sampler_sees_the_weights_of_the_last_update(tmp_path, worker):
    """An update whose last pass has no gradient (dead groups, no distillation): gathered weights must not outlive it."""
    run, examples = make_run(tmp_path, worker, "--method", "grpo")
    samples = fake_samples(run, examples)
    for sample in samples:
        sample.targets = []
    samples[-1].advantages = [0.0] * 8
    before = weights_of(run.model)
    update(run, samples, 1e-2)
    with parallel.whole_model(run.model) as policy:
        for old, now, seen in zip(before, weights_of(run.model), policy.parameters(), strict=True):
            assert torch.equal(now, seen) and not torch.equal(old, seen)


def test_the_saved_model_has_the_dtype_it_sampled_in(tmp_path, worker):
    out = tmp_path / "run"
    flags = "--steps 1 --problems_per_step 2 --no-eval_guided --device cpu --dtype bfloat16".split()
    train.main([*flags, "--eval_data", "", "--out", str(out)])
    saved, _ = load_model(str(out / "model"), dtype=torch.float32, device="cpu")
    assert json.loads((out / "model/config.json").read_text())["torch_dtype"] == "bfloat16"
    run, _ = make_run(tmp_path / "other", worker)
    checkpoint.load_checkpoint(out / "checkpoints/step-000001", run.model, run.optimizer)
    for master, rounded in zip(weights_of(run.model), saved.parameters(), strict=True):
        assert torch.equal(master.bfloat16().float(), rounded)
    assert any(not torch.equal(master, master.bfloat16().float()) for master in weights_of(run.model))


def test_no_correct_guided_trajectory_means_no_distillation(tmp_path, worker, monkeypatch):
    run, examples = make_run(tmp_path, worker)
    samples = fake_samples(run, examples)
    for sample in samples:
        sample.guided_rewards = [0.0] * 4
    weigh(run, samples)
    assert [(sample.targets, sample.alpha) for sample in samples] == [([], 0.0)] * 4
    metrics = update(run, samples, 1e-3)
    assert metrics["distillation_loss"] == metrics["kl"] == metrics["target_tokens"] == 0 and metrics["grad_norm"] > 0


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_target_is_the_most_reachable_of_several(temperature, tmp_path, worker):
    """Ranked by the log-probability WITHOUT the strategy, summed, or per token with --reach mean; by transformers' logits, at
    the temperature of the policy that is trained. alpha(q) by its formula, at settings that are not the defaults."""
    weight = ["--alpha_0", 0.4, "--gamma", 0.2, "--alpha_max", 0.6]
    run, examples = make_run(tmp_path, worker, "--temperature", temperature, *weight)
    theirs = AutoModelForCausalLM.from_pretrained(TINY_BASE)
    samples = fake_samples(run, examples)
    chosen = {"sum": [], "mean": []}
    for sample in samples:
        totals = []
        for row in sample.guided:
            ids = torch.tensor([sample.example.auto_ids + row.response_ids])
            logp = torch.log_softmax(theirs(ids).logits[0] / temperature, -1)[len(sample.example.auto_ids) - 1 : -1]
            totals.append(logp.gather(-1, torch.tensor(row.response_ids)[:, None]).sum().item())
        sample.guided_rewards = [float(i != max(range(4), key=lambda i, totals=totals: totals[i])) for i in range(4)]
        correct = [i for i in range(4) if sample.guided_rewards[i]]  # the most probable one of all is wrong
        chosen["sum"].append(max(correct, key=lambda i, totals=totals: totals[i]))
        chosen["mean"].append(
            max(correct, key=lambda i, totals=totals, sample=sample: totals[i] / len(sample.guided[i].response_ids))
        )
    for reach, want in chosen.items():
        run.cfg = replace(run.cfg, reach=reach, micro_tokens=200)
        weigh(run, samples)
        assert [sample.targets for sample in samples] == [[target] for target in want]
        if reach == "sum":
            assert samples[-1].unguided_logprobs == pytest.approx(totals, rel=1e-4)
    assert chosen["sum"] != chosen["mean"]
    p_auto = [sum(sample.auto_rewards) / 8 for sample in samples]
    want = [min(max(0.4 * (0.75 - p + 0.2) / (p + 0.2), 0), 0.6) for p in p_auto]
    assert [sample.alpha for sample in samples] == pytest.approx(want, abs=1e-6) and min(want) < max(want) == 0.6


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.95)])
def test_first_update_has_ratio_one(tmp_path, worker, temperature, top_p):
    """Below top_p 1 too: what is stored is the full softmax's log-probability, as the losses take it."""
    run, examples = make_run(tmp_path, worker, "--temperature", temperature, "--top_p", top_p)
    metrics = train.rl_step(run, list(enumerate(examples[:4])), 1, 1e-3)
    assert metrics["first_ratio_error"] < 1e-3 and metrics["first_logprob_error"] < 1e-3 and metrics["clip_fraction"] == 0
    assert metrics["policy_kl"] == pytest.approx(0, abs=1e-5)


def test_a_new_method_is_one_entry_and_a_reward_of_ones_own_is_one_argument(tmp_path, worker, monkeypatch):
    """REINFORCE with the batch's mean as baseline, from the command line to the update; its loss by hand on one group."""

    def weigh(settings, auto, guided, solution):
        return {"advantages": auto - auto.mean()}

    def loss(logprobs, old_logprobs, advantages):
        ratio = torch.exp(logprobs - old_logprobs).detach()
        return -advantages * logprobs, ratio, torch.zeros_like(ratio)

    monkeypatch.setitem(methods.METHODS, "reinforce", methods.Variant((), weigh, lambda settings: loss))
    flags = ["--method", "reinforce", "--problems_per_step", 2, "--aggregate", "token"]
    run, examples = make_run(tmp_path, worker, *flags)
    seen = []

    def reward(response, problem):
        seen.append(problem.id)
        return len(seen) % 2  # whatever the response says

    given = (run.model, run.tokenizer, run.optimizer, run.cfg, list(enumerate(examples[:2])), reward)
    metrics, samples = sgpo.sgpo_step(*given, step=1, learning_rate=0.0)
    assert sorted(seen) == sorted([examples[0].problem.id] * 8 + [examples[1].problem.id] * 8)
    rewards = torch.tensor([sample.auto_rewards for sample in samples])
    assert rewards.sum() == 8 and [s.advantages for s in samples] == (rewards - 0.5).tolist()
    rows = [(row, a) for sample in samples for row, a in zip(sample.auto, sample.advantages, strict=True)]
    want = sum(-a * sum(row.logprobs) for row, a in rows) / sum(len(row.response_ids) for row, _ in rows)
    assert metrics["policy_loss"] == pytest.approx(want, rel=1e-4)
    with pytest.raises(ValueError, match="target 'randm': must be one of reachable, all, random"):
        methods.Method(target="randm")  # from a script, without argparse


def test_minibatches_are_cut_from_the_whole_batch(tmp_path, worker, monkeypatch):
    run, examples = make_run(tmp_path, worker, "--minibatches", 2, "--problems_per_step", 5)
    seen = []

    def update(model, optimizer, settings, samples, learning_rate):
        seen.append([sample.place for sample in samples])
        first = len(seen) == 1
        metrics = {"loss": float(len(samples)), "grad_norm": 1.0 if first else 4.0, "left_out": float(first)}
        metrics |= {"not_finite": 1.0}
        metrics |= {"ratio_error": len(seen) / 10, "logprob_error": 0.3 if first else 0.2, "solutions": 1.0}
        metrics |= {"own_tokens": 30.0 if first else 10.0, "entropy": 2.0 if first else 6.0}
        metrics |= {"clip_fraction": 0.1, "policy_kl": 0.2}
        return metrics | {"target_tokens": 0.0 if first else 7.0, "kl": 0.0 if first else 0.5, "kept": 0.0 if first else 1.0}

    monkeypatch.setattr(sgpo, "update", update)
    metrics = train.rl_step(run, list(enumerate(examples[:5])), 1, 0.0)
    assert seen == [[0, 1, 2], [3, 4]]
    assert metrics["loss"] == metrics["grad_norm"] == 2.5 and metrics["left_out"] == 0.5  # means over the updates
    assert metrics["own_tokens"] == 40 and metrics["target_tokens"] == 7 and metrics["solutions"] == 2
    assert metrics["entropy"] == pytest.approx((30 * 2 + 10 * 6) / 40) and metrics["clip_fraction"] == pytest.approx(0.1)
    assert metrics["kl"] == 0.5 and metrics["kept"] == 1.0  # over the tokens there were, not halved by an update without any
    assert metrics["ratio_error"] == 0.2 and metrics["logprob_error"] == 0.3
    assert metrics["first_ratio_error"] == 0.1 and metrics["first_logprob_error"] == 0.3
    assert json.dumps(metrics["skipped"]) == "2" == str(run.progress.skipped) and "not_finite" not in metrics  # a count
    seen.clear()
    train.rl_step(run, [(3, examples[3])], 1, 0.0)
    assert seen == [[], [3]]  # a rank that has the fourth problem alone


def test_a_step_asks_whether_the_ranks_have_the_same_weights(tmp_path, worker, monkeypatch):
    run, examples = make_run(tmp_path, worker)
    monkeypatch.setattr(parallel, "fingerprint", lambda model: math.nan)  # it equals no other
    with pytest.raises(RuntimeError, match="the weights are not the same on all ranks"):
        train.rl_step(run, [(0, examples[0])], 1, 0.0)


def test_what_a_step_says_of_its_samples_by_hand():
    """Three problems: all right alone, all wrong, and one without a target. A row of four tokens or more is cut off."""

    def rows(*lengths):
        return [Trajectory([1], [5] * n, [0.0] * n, finished=n < 4, group=0) for n in lengths]

    samples = [
        sgpo.ProblemSamples(0, None, rows(1, 2, 4), rows(2, 3), [1.0, 1.0, 1.0], [1.0, 0.0], alpha=0.5, targets=[0]),
        sgpo.ProblemSamples(1, None, rows(4, 4, 3), rows(5, 6), [0.0, 0.0, 0.0], [1.0, 1.0], alpha=0.3, targets=[1]),
        sgpo.ProblemSamples(2, None, rows(1, 1, 1), rows(1, 1), [1.0, 0.0, 0.0], [0.0, 0.0], alpha=0.1),
    ]
    for sample, logprobs in zip(samples, ([-2.0, -1.0], [-8.0, -4.0], [-3.0, -3.0]), strict=True):
        sample.unguided_logprobs = logprobs
    want = {"alpha": 0.3, "with_target": 2 / 3, "all_right": 1 / 3, "all_wrong": 1 / 3, "reward_auto": 4 / 9}
    want |= {"truncated": 3 / 9, "length_auto": 21 / 9, "reward_guided": 3 / 6, "length_guided": 18 / 6}
    want |= {"sampled_tokens": 39}
    want["reach_gap"] = (0 + 2) / 2  # of those with a target: -2 against a mean of -2, and -4 against one of -6
    assert sgpo.describe(samples, CPU) == pytest.approx(want)


def test_the_records_of_a_problems_samples_by_hand():
    auto, guided = ([Trajectory([1], [n], [0.0], finished=n > 2, group=0) for n in ids] for ids in ((2, 3), (4, 5)))
    example = sgpo.Example(SimpleNamespace(id="q"), [1], [1], None)
    sample = sgpo.ProblemSamples(0, example, auto, guided, [0.0, 1.0], [1.0, 1.0], alpha=0.3, targets=[1])
    sample.unguided_logprobs = [-7.0, -6.0]
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: f"{ids} {skip_special_tokens}")
    names = ("group", "target", "reach", "reward", "finished", "text")
    want = [
        ("auto", False, None, 0.0, False, "[2] True"), ("auto", False, None, 1.0, True, "[3] True"),
        ("guided", False, -7.0, 1.0, True, "[4] True"), ("guided", True, -6.0, 1.0, True, "[5] True"),
    ]  # fmt: skip
    same = {"step": 9, "id": "q", "alpha": 0.3}
    assert list(sgpo.responses_of(sample, 9, tokenizer)) == [same | dict(zip(names, row, strict=True)) for row in want]


def test_data_order_covers_every_epoch_and_depends_on_the_seed():
    examples = list(range(7))

    def stream(seed, batch):
        return [example for step in range(14 // batch) for _, example in train.data_order(examples, step, batch, seed, "rl")]

    assert sorted(stream(0, 2)[:7]) == sorted(stream(0, 2)[7:]) == examples
    assert stream(0, 2) == stream(0, 7) != stream(1, 2)
    assert stream(0, 2)[:7] != stream(0, 2)[7:]


def test_learning_rate_schedule(tmp_path, worker, monkeypatch):
    assert [train.learning_rate_at(1.0, step, 6, 2, "linear") for step in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert train.learning_rate_at(1.0, 5, 6, 2, "constant") == 1.0
    flags = "--method sft --sft_batch 4 --sft_epochs 5 --sft_warmup_ratio 0.4 --sft_learning_rate 1 --max_skipped 99".split()
    flags += ["--lr_decay", "constant"]  # of RL
    run, examples = make_run(tmp_path, worker, *flags)
    monkeypatch.setattr(train, "sft_loss", lambda *_: math.nan)  # of the SFT: what it logs
    monkeypatch.setattr(train, "apply_gradients", lambda *given: given[3])
    train.sft_stage(run, examples[:8], [])
    assert run.progress.skipped == 10  # that loss
    want = [0.25, 0.5, 0.75, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]  # the first four of ten rise
    assert [record["learning_rate"] for record in read_metrics(run.folder.out)] == pytest.approx(want)
    assert [record["grad_norm"] for record in read_metrics(run.folder.out)] == pytest.approx(want)  # it is what is applied


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


def run_script(*command, cwd=ROOT, **environment):
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=settings, capture_output=True, text=True, timeout=300
    )


def read_metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


TIMES = ("sampling_s", "step_s", "tokens_per_s")


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


def tiny_rows(n, **changes):
    return [{**row, **changes} for row in tiny_world.make_rows(0)["train"][:n]]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


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


@pytest.mark.parametrize(
    "script",
    [
        "train.py",
        "eval.py",
        "bench.py",
        "sweep.py",
        "report.py",
        "faults.py",
        "-m data.tiny_world",
        "-m data.hard_world",
        "data/starter.py",
        "data/smollm2.py",
        "tools/extract.py",
    ],
)
def test_every_script_has_help(script):
    done = run_script(*script.split(), "--help")
    assert done.returncode == 0 and "usage:" in done.stdout
    needed = {
        "eval.py": "--model x --data x",
        "-m data.tiny_world": "--out x",
        "-m data.hard_world": "--out x",
        "data/starter.py": "--out x",
        "faults.py": "--out x --log x",
    }.get(script, "")
    needed = {"sweep.py": "table --results x", "report.py": "rows x.csv --out x"}.get(script, needed)
    needed = {"bench.py": "--out x", "data/smollm2.py": "--out x"}.get(script, needed)
    done = run_script(*script.split(), *needed.split(), "--no_such_flag")
    assert done.returncode == 2 and "unrecognized arguments: --no_such_flag" in done.stderr


@pytest.mark.parametrize("leaf", "model kv_cache rollout loss weighting strategy checkpoint stats grader".split())
def test_each_leaf_imports_alone_from_an_empty_folder(leaf, tmp_path):
    for name in {"rollout": ("rollout", "kv_cache")}.get(leaf, (leaf,)):  # the sampler is copied with its cache
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    torch_alone, nothing = "('torch',)", "()"
    allowed = {"strategy": nothing, "stats": nothing, "grader": nothing, "loss": torch_alone, "weighting": torch_alone}
    allowed = allowed.get(leaf, "('torch', 'safetensors')")
    check = (
        f"import sys; import {leaf}; third = [m for m in ('torch', 'safetensors', 'transformers', 'numpy') "
        f"if m in sys.modules and m not in {allowed}]; assert set(third) <= {{'numpy'}}, third"
    )
    done = run_script("-c", check, cwd=tmp_path, PYTHONPATH="")
    assert done.returncode == 0, done.stderr


def test_eval_script_writes_what_it_prints(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", tiny_rows(6))
    out = tmp_path / "result.json"
    done = run_script("eval.py", "--model", TINY_BASE, "--data", data, "--n", 4, "--out", out)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())["files"][str(data)]
    assert figures["n"] == 4 and figures["problems"] == 6 and 0 <= figures["accuracy"] <= figures["pass_at_n"] <= 1
    assert f"avg@4 {100 * figures['accuracy']:.1f}" in done.stdout and "pass@4" in done.stdout and "truncated" in done.stdout


# ---------------------------------------------------------------------------------------------------- ranks


def test_work_is_dealt_evenly_by_cost():
    costs = [1, 90, 2, 80, 3, 70, 4, 60]  # every second one is long: dealt in turn, one of two ranks would get all of them
    assert parallel.balance(costs, 2) == [[0, 1, 6, 7], [2, 3, 4, 5]]
    generator = random.Random(0)
    for _ in range(50):
        ranks, count = generator.randint(1, 6), generator.randint(0, 20)
        costs = [generator.paretovariate(1) for _ in range(count)]
        shares = parallel.balance(costs, ranks)
        assert sorted(itertools.chain(*shares)) == list(range(count)) and len(shares) == ranks
        assert max(map(len, shares)) - min(map(len, shares)) <= 1 and (not count or 0 in shares[0])
        sums = [sum(costs[i] for i in share) for share in shares]
        assert not count or max(sums) <= sum(costs) / ranks + max(costs)


def test_leave_ends_at_once_with_its_status_and_all_that_was_said():
    code = "import atexit, sys, parallel; atexit.register(print, 'torn down'); print('a'); sys.stderr.write('b')"
    done = run_script("-c", code + "; parallel.leave(3)", PYTHONUNBUFFERED="")
    assert (done.returncode, done.stdout, done.stderr) == (3, "a\n", "b")


METHOD_FLAGS = {
    "sgpo": "",
    "grpo": "",
    "hinted": "",
    "luffy": "",
    "hpt": "--hpt_gate 4",  # half of the group, so that some problems are rollouts and others solutions
    "sft": "--data FEW --sft_epochs 3 --sft_validation 0.25 --sft_learning_rate 3e-4",
}
ON_FOUR = ("sgpo", "hinted", "hpt")  # ranks without a response, without a guided group, without a solution
RANK_SCRIPT = """
import sys
from pathlib import Path
import torch
import parallel, train

out, more = Path(sys.argv[1]), sys.argv[2:]
parallel.start_ranks("cpu", 3)
for method, flags in {flags!r}.items():
    if method in {on_four!r} or torch.distributed.get_world_size() < 4:
        train.main([*{common!r}.split(), *flags.split(), "--method", method, "--out", str(out / method)])
if more:
    train.main([*{common!r}.split(), "--method", "sgpo", *more])
torch.distributed.destroy_process_group()
"""
COMMON = (
    "--steps 2 --problems_per_step 3 --minibatches 2 --eval_limit 5 --device cpu "
    "--sft_fraction 0.01 --sft_batch 3 --sft_epochs 1"
)


def on_ranks(ranks, script, *arguments, check=True):
    done = run_script(
        "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone", script, *arguments, PYTHONPATH=str(ROOT)
    )
    assert done.returncode == 0 or not check, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def rank_runs(tmp_path_factory):
    """{name: folder with a run of every method}. Three problems a step in two minibatches: on two and on four ranks there are
    always some that have nothing to do."""
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "all_methods.py"
    rows = tiny_rows(12)
    for i in train.shuffled(range(12), rollout.stream_seed(0, "sft validation"))[3:]:
        rows[i]["solution"] = "9 " * 20  # learning that makes the loss of the other three rise: the first epoch's weights count
    few = str(write_rows(folder / "few.jsonl", rows))
    flags = {method: flags.replace("FEW", few) for method, flags in METHOD_FLAGS.items()}
    script.write_text(RANK_SCRIPT.format(flags=flags, common=COMMON, on_four=ON_FOUR))
    on_ranks(1, script, folder / "1")
    # One start for two kinds of run: starting is what takes long.
    on_ranks(2, script, folder / "2", "--out", folder / "2, offloaded/sgpo", "--offload")
    on_ranks(4, script, folder / "4", "--out", folder / "4, two replicas/sgpo", "--shard_ranks", 2)
    return folder


@pytest.mark.parametrize(
    "method, name",
    [(m, "2") for m in METHOD_FLAGS] + [(m, "4") for m in ON_FOUR] + [("sgpo", "4, two replicas"), ("sgpo", "2, offloaded")],
)
def test_ranks_equal_one(method, name, rank_runs):
    """Loss, clipped gradient norm, every other metric, and the weights after the run; `--sft_fraction` adds SFT to all."""
    one, many = read_metrics(rank_runs / "1" / method), read_metrics(rank_runs / name / method)
    assert many[0]["ranks"] == int(name[0]) and len(one) == len(many)
    stages = {"sft", "sft_validation"} if method == "sft" else {"sft", method, "eval"}
    assert stages == {record["stage"] for record in one[1:]}
    if method == "sft":
        losses = [record["loss"] for record in one if record.get("stage") == "sft_validation"]
        assert min(losses) == losses[0] < losses[-1] - 0.1
    noise = (*TIMES, "ratio_error", "logprob_error", "first_ratio_error", "first_logprob_error")
    for a, b in zip(one[1:], many[1:], strict=True):
        a, b = ({k: v for k, v in record.items() if k not in noise} for record in (a, b))
        numbers = {k for k, v in a.items() if isinstance(v, float)}
        assert {k: a[k] for k in a.keys() - numbers} == {k: b[k] for k in b.keys() - numbers}
        assert {k: a[k] for k in numbers} == pytest.approx({k: b[k] for k in numbers}, rel=2e-3, abs=1e-5)
    folders = rank_runs / "1" / method / "model", rank_runs / name / method / "model", TINY_BASE
    nets = [load_model(str(f), dtype=torch.float32, device="cpu")[0] for f in folders]
    for a, b, before in zip(*(net.parameters() for net in nets), strict=True):
        moved = (a - before).abs().max()
        assert moved > 0 and (a - b).abs().max() <= 0.02 * moved + 1e-7
    if method != "sft":
        first, second = ((rank_runs / n / method / "samples.jsonl").read_text().splitlines() for n in ("1", name))
        keep = ("step", "id", "group", "text", "reward")
        first, second = ([{k: json.loads(line)[k] for k in keep} for line in lines] for lines in (first, second))
        assert first == second


@pytest.mark.parametrize("name", ["1", "2", "4", "4, two replicas", "2, offloaded"])
def test_a_checkpoint_of_any_number_of_ranks_loads_on_one(name, rank_runs, tmp_path, worker):
    folder = rank_runs / name / "sgpo"
    run, _ = make_run(tmp_path, worker)
    path, state, refused = checkpoint.find_checkpoint(folder / "checkpoints")
    assert not refused and state["progress"]["rl_steps"] == 2 and state["ranks"] == int(name[0])
    checkpoint.load_checkpoint(path, run.model, run.optimizer)
    saved, _ = load_model(str(folder / "model"), dtype=torch.float32, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(weights_of(run.model), saved.parameters(), strict=True))
    other, _ = make_run(tmp_path / "one", worker)
    path, _, _ = checkpoint.find_checkpoint(rank_runs / "1/sgpo/checkpoints")
    checkpoint.load_checkpoint(path, other.model, other.optimizer)
    for a, b in zip(run.model.parameters(), other.model.parameters(), strict=True):
        for moment in checkpoint.MOMENTS:
            one, two = (r.optimizer.state[p][moment].full_tensor() for r, p in ((run, a), (other, b)))
            assert (one - two).abs().max() <= 0.02 * two.abs().max() and two.abs().max() > 0
        assert run.optimizer.state[a]["step"] == 4  # two minibatches a step; SFT's moments are not RL's


def test_four_ranks_read_a_checkpoint_whose_sizes_do_not_divide(tmp_path):
    """Rows that do not divide by four, and a bias of two rows, of which two ranks hold none; saved and loaded once more."""
    raw = dict(model_type="qwen2", vocab_size=97, hidden_size=10, intermediate_size=22, num_hidden_layers=2)
    raw |= dict(num_attention_heads=5, num_key_value_heads=1, rms_norm_eps=1e-6, max_position_embeddings=64, eos_token_id=3)
    whole = build_model(ModelConfig.from_dict(raw), generator=torch.Generator().manual_seed(0), dtype=torch.float32, device=CPU)
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter)
    save_file(whole.state_dict(), tmp_path / "model.safetensors")
    script = tmp_path / "read.py"
    script.write_text(f"""
import os
from pathlib import Path
import torch
from safetensors.torch import load_file
import checkpoint, model, parallel
cpu, folder, raw = parallel.start_ranks("cpu", 3), Path({str(tmp_path)!r}), {raw!r}
def sharded():
    with torch.device("meta"):
        net = model.CausalLM(model.ModelConfig.from_dict(raw))
    parallel.shard(net, device=cpu, dtype=torch.float32, shard_ranks=0, offload=False)
    parallel.load_sharded(net, folder, device=cpu, offload=False)
    return net, torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True)
net, optimizer = sharded()
want = load_file(folder / "model.safetensors")
for name, parameter in net.named_parameters():
    assert torch.equal(parameter.full_tensor(), want[name]), name
    assert parameter.to_local().numel() < want[name].numel()
ids = torch.arange(20)[None]
with torch.device("meta"):
    whole = model.CausalLM(model.ModelConfig.from_dict(raw))
model.load_weights(whole, folder, dtype=torch.float32, device=cpu)
whole.inv_freq = net.inv_freq
torch.testing.assert_close(net(ids), whole(ids))
net(ids).square().mean().backward()
optimizer.step()
checkpoint.save_checkpoint(folder / "checkpoints", "a", net, optimizer, {{}}, keep=2)
other, moments = sharded()
checkpoint.load_checkpoint(folder / "checkpoints/a", other, moments)
for a, b in zip(net.parameters(), other.parameters(), strict=True):
    assert torch.equal(a.to_local(), b.to_local())
    assert torch.equal(optimizer.state[a]["exp_avg_sq"].to_local(), moments.state[b]["exp_avg_sq"].to_local())
os.write(1, b"held: %d\\n" % len(net.model.layers[0].self_attn.k_proj.bias.to_local()))  # in one piece, unlike print
""")
    assert sorted(on_ranks(4, script).stdout.split("held:")[1:]) == [" 0\n", " 0\n", " 1\n", " 1\n"]


def test_with_offload_only_the_parameters_are_in_host_memory(worker):
    """The angles are a buffer: FSDP moves those when it shards, which is before they are filled. Meta stands for a GPU."""
    net, _ = blank_model(TINY_BASE)
    parallel.shard(net, device=CPU, dtype=torch.float32, shard_ranks=0, offload=True)
    parallel.load_sharded(net, TINY_BASE, device=torch.device("meta"), offload=True)
    assert net.inv_freq.device.type == "meta"
    assert {parameter.to_local().device.type for parameter in net.parameters()} == {"cpu"}


@pytest.mark.parametrize("error", ["SystemExit('error: the reason')", "ValueError('the reason')", None])
def test_a_rank_with_a_gpu_that_fails_does_not_wait_for_the_others(error, tmp_path):
    """NCCL's ending would; here a stand-in that takes for ever. Without an error the group ends as it should."""
    script = tmp_path / "fail.py"
    script.write_text(f"""
import sys, time
import torch, torch.distributed as dist
import parallel
dist.destroy_process_group = (lambda: time.sleep(600)) if {error is not None} else (lambda: print("ended"))
dist.is_initialized, dist.get_rank, dist.get_world_size = lambda: True, lambda: 3, lambda: 8
try:
    if {error is not None}:
        raise {error}
finally:
    parallel.end_ranks(torch.device("cuda"))
""")
    done = run_script(script, PYTHONPATH=str(ROOT))
    if error is None:
        assert done.returncode == 0 and done.stdout == "ended\n"
    else:
        assert done.returncode == 1 and done.stderr.strip().endswith("the reason"), done.stderr


def test_copies_that_differ_and_ranks_that_do_not_come_are_found(tmp_path):
    script = tmp_path / "differ.py"
    script.write_text(f"""
import time
import torch, torch.distributed as dist
import model, parallel
cpu = parallel.start_ranks("cpu", 3)
net, _ = model.load_model({str(TINY_BASE)!r}, dtype=torch.float32, device="cpu")
parallel.shard(net, device=cpu, dtype=torch.float32, shard_ranks=1, offload=False)  # two replicas
rank = dist.get_rank()
with parallel.whole_model(net) as policy:
    parallel.same_on_all_ranks(policy, cpu)
if rank == 1:
    with torch.no_grad():
        net.model.layers[0].mlp.up_proj.weight.to_local()[0, 0] += 1e-3
with parallel.whole_model(net) as policy:
    try:
        parallel.same_on_all_ranks(policy, cpu)
    except RuntimeError as error:
        print(f"rank {{rank}} found: {{error}}", flush=True)
control = parallel.Control(1)
assert control.barrier(rank) == 1
control.timeout_minutes = 2 / 60
if rank == 1:
    time.sleep(9)
else:
    start = time.monotonic()
    try:
        control.barrier()
    except parallel.RankLost as error:
        print("lost:", time.monotonic() - start < 8, error, flush=True)
""")
    done = on_ranks(2, script, check=False)
    for rank in (0, 1):
        assert f"rank {rank} found: the weights are not the same on all ranks (rank {rank}" in done.stdout, done.stderr[-2000:]
    lost = next(line for line in done.stdout.splitlines() if line.startswith("lost:"))
    assert lost.startswith("lost: True rank 0 waited") and "Ranks 1 failed" in lost and "--timeout_minutes" in lost


def test_an_error_of_ragged_work_comes_through_and_none_is_begun_after_sigterm():
    control, begun = parallel.Control(1), []

    def fails():
        begun.append("fails")
        raise ValueError("the reason")

    with pytest.raises(ValueError, match="the reason"):
        control.interruptible(fails)
    control.stop_asked = True
    with pytest.raises(parallel.Interrupted):
        control.interruptible(fails)
    assert begun == ["fails"]


# ---------------------------------------------------------------------------------------------------- checkpoints

RESUMED = "--steps 3 --problems_per_step 3 --minibatches 2 --eval_limit 4 --eval_every 1 --device cpu"
# four updates on 13 rows, validated after the second and the fourth
RESUMED += " --sft_fraction 0.475 --sft_validation 0.3 --sft_batch 7 --sft_epochs 2 --sft_learning_rate 1e-3"


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Flags of the run that is stopped and goes on: the loss on the held-out rows of SFT rises, so RL starts from the second
    update's weights. The other rows teach something else."""
    rows = tiny_rows(40)
    for_sft = train.shuffled(range(40), rollout.stream_seed(0, "split"))[:19]
    for i in train.shuffled(for_sft, rollout.stream_seed(0, "sft validation"))[6:]:
        rows[i]["solution"] = "9 " * 20
    data = write_rows(tmp_path_factory.mktemp("resumed") / "rows.jsonl", rows)
    return [*RESUMED.split(), "--data", str(data), "--eval_data", str(ROOT / "data/tiny/test.jsonl")]


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


@pytest.fixture(scope="module")
def uninterrupted(resumed, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    train.main([*resumed, "--checkpoint_minutes", "0", "--out", str(out)])
    first, second = (record["loss"] for record in read_metrics(out) if record.get("stage") == "sft_validation")
    assert first < second
    return out


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


@pytest.fixture
def stopped(uninterrupted, tmp_path):
    """A copy of the run as a kill right behind its last step would have left it."""
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    shutil.rmtree(out / "model")
    return out


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
    done = run_script("faults.py", "--out", tmp_path / "runs", "--log", log, *flags)
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
# ------------------------------------------------------------------------------------------------ secrets


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


# ---------------------------------------------------------------------------------------------------- strategies


def leak_examples():
    """(problem's row, candidate) of data/leak_examples.jsonl."""
    rows = [json.loads(line) for line in (ROOT / "data/leak_examples.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(row, candidate) for row in rows for candidate in row["candidates"]]


def strategy_example():
    return Strategy("sum of two", "Join the parts.", ("Find both parts.", "Add them."))


STRATEGY_EXAMPLE_TEXT = """Problem type: sum of two
Strategy: Join the parts.
Steps:
1. Find both parts.
2. Add them."""


def test_strategy_imports_the_standard_library_only():
    tree = ast.parse(Path(strategy_module.__file__).read_text(encoding="utf-8"))
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "a sibling")
    names.remove("tools.extract")  # main's, for the program
    assert names and all(name.split(".")[0] in sys.stdlib_module_names for name in names), names


def test_strategy_format_is_the_documented_text():
    assert format_strategy(strategy_example()) == STRATEGY_EXAMPLE_TEXT
    assert parse_strategy(STRATEGY_EXAMPLE_TEXT) == strategy_example()


def test_strategies_survive_every_dress():
    rows = _starter_rows("train", "test", "heldout") + [candidate for _, candidate in leak_examples()]
    strategies = {json.dumps(row["strategy"]): row["strategy"] for row in rows}
    assert len(strategies) > 140
    for strategy in strategies.values():
        s = Strategy.from_dict(strategy)
        assert s.to_dict() == strategy
        text = format_strategy(s)
        assert parse_strategy(text) == s
        # Only the first of these goes through the exact reader.
        for dressed in (
            f"\n{text}\n",
            f"Sure, here it is:\n\n{text}\n\nHope this helps! Let me know.",
            f"<think>\nStrategy: not this one.\n</think>\n{text}",
            f"```\n{text}\n```",
            text.replace("\n", "\r\n"),
            f"**Problem type:** {s.type}\n\n**Strategy:** {s.strategy}\n\n**Steps:**\n"
            + "\n".join(f"{i}) {step}" for i, step in enumerate(s.steps, 1)),
            f"### Problem type\n{s.type}\n\n### Strategy\n{s.strategy}\n\n### Steps\n"
            + "\n".join(f"- {step}" for step in s.steps),
            text.partition("\n1. ")[0] + "\n" + "\n".join(f"({chr(97 + i)}) {step}" for i, step in enumerate(s.steps)),
        ):
            assert parse_strategy(dressed) == s, dressed


@pytest.mark.parametrize(
    "odd",
    [
        Strategy("Strategy: x", "Steps:", ("Problem type: y", "1. z", "Steps:")),
        Strategy("**bold**", "- dash", ("2) two", "* star", "# head", "```")),
        Strategy('{"type": "t"}', "a {b} {0} %s %(x)d $\\frac{1}{2}$ \\boxed{}", ("{", "}", "\\n is not a line break")),
        Strategy("<think>", "</think>", ("<|im_end|>", "\u00e9\u4e2d\U0001f600")),
        Strategy('"quoted"', "| a | b |", ("Hope this helps!",)),
        Strategy("t", "two  blanks,\ta tab, a\u00a0hard blank", tuple(f"step {i}" for i in range(12))),
    ],
)
def test_strategy_odd_ones_round_trip(odd):
    assert parse_strategy(format_strategy(odd)) == odd
    assert Strategy.from_dict(json.loads(json.dumps(odd.to_dict()))) == odd


def test_strategy_random_ones_round_trip():
    rng = random.Random(0)
    words = [
        "Problem type:",
        "Strategy:",
        "Steps:",
        "1.",
        "2.",
        "-",
        "**",
        "{",
        "}",
        "<think>",
        "</think>",
        "|",
        "```",
        "a",
        "\\boxed{}",
        '"',
        ";",
        "#",
        "\u2460",
        "Hope this helps!",
    ]
    for _ in range(2000):
        texts = [" ".join(rng.choices(words, k=rng.randint(1, 5))) for _ in range(rng.randint(3, 7))]
        s = Strategy(texts[0], texts[1], tuple(texts[2:]))
        assert parse_strategy(format_strategy(s)) == s


@pytest.mark.parametrize(
    "reply",
    [
        "1. **Problem type:** sum of two\n2. **Strategy:** Join the parts.\n3. **Steps:**\n   1. Find both parts.\n"
        "   2. Add them.",
        "## Strategy\n\n**Problem type**: sum of two\n**Strategy**: Join the parts.\n**Steps**:\n* Find both parts.\n"
        "* Add them.",
        "PROBLEM TYPE: sum of two\n---\nApproach - Join the parts.\nPlan:\nStep 1: Find both parts.\nStep 2: Add them.",
        "Problem type: sum of two\nStrategy: Join\nthe parts.\nSteps:\n(a) Find both parts.\n(b) Add them.",
        "Problem type: sum of two\nStrategy: Join the parts.\nSteps: (a) Find both parts. (b) Add them.",
        "Problem type: sum of two\nStrategy: Join the parts.\nSteps: 1. Find both parts. 2. Add them.",
        "Problem type: sum of two\nStrategy: Join the parts.\nSteps:\n**a)** Find\n  1. both\n  2. parts.\n**b)** Add them.",
        "Problem type: sum of two\nStrategy: Join the parts.\nSteps:\nA. Find\nboth parts.\nB. Add them.\n\nDone.",
        "Problem type: sum of two\nStrategy: Join the parts.\nSteps:\n1. Find\n   (a) both\n   (b) parts.\n2. Add them.",
        "Problem type: sum of two\nStrategy: Join the parts.\nSteps:\n1. Find\n   both\n\nparts.\n\n2. Add\nthem.\n\n"
        "The answer is 7.",
        "**Problem type:** sum of two\n**Strategy:** Join the parts.\n**Steps:**\n1. Find\n   1. both\n   - parts.\n"
        "2. Add them.",
        "type: 'sum of two'\nstrategy: \"Join the parts.\"\nsteps:\n  - Find both parts.\n  - Add them.",
        "Problem type: sum of two\nStrategy: Join the parts.\nSteps:\n(a) Find\n- both\n- parts.\n(b) Add\n\n- them.",
        "Problem type: sum of two\nStrategy: Join the parts.\nSteps:\n1. Find both parts.\n 2. Add\n\n   them.",
        "the thoughts began in the prompt\n</think>\n\n" + STRATEGY_EXAMPLE_TEXT,
    ],
)
def test_strategy_parser_reads_the_habits_of_models(reply):
    assert parse_strategy(reply) == strategy_example()


def test_strategy_parser_keeps_latex_and_powers():
    reply = "Well:\nProblem type: 'a' or 'b'\nStrategy: x**2 + **bold** but 2**3**2.\n"
    reply += "Steps:\n**Step 1: Go.** Multiply \\frac{a}{b} by 2. Then add."
    steps = ("Go. Multiply \\frac{a}{b} by 2. Then add.",)
    assert parse_strategy(reply) == Strategy("'a' or 'b'", "x**2 + bold but 2**3**2.", steps)


STRATEGY_HEAD = "Problem type: t\nStrategy: s\n"


@pytest.mark.parametrize(
    "reply, words",
    [
        ("", "no problem type, no strategy, no steps"),
        ("I am sorry, I cannot do that.", "no problem type, no strategy, no steps"),
        ("1. Find both parts.\n2. Add them.", "no problem type, no strategy, no steps"),
        (STRATEGY_HEAD, "no steps"),
        (STRATEGY_HEAD + "Steps:\n", "no steps"),
        ("Strategy: s\nSteps:\n1. a", "no problem type"),
        ("Problem type:\nStrategy: s\nSteps:\n1. a", "no problem type"),
        ("Problem type: t\nSteps:\n1. a", "no strategy"),
        ("<think>\n" + STRATEGY_EXAMPLE_TEXT, "inside <think>"),
        (STRATEGY_EXAMPLE_TEXT + "\n\n" + STRATEGY_EXAMPLE_TEXT, "appears twice"),
        (STRATEGY_EXAMPLE_TEXT + "\nHope this helps!", "'Hope this helps!' belong"),
        ("Problem type: t\n\nLet me see.\n\nStrategy: s\nSteps:\n1. a", "2 paragraphs"),
        (STRATEGY_HEAD + "Steps:\nDo this:\n1. a", "text between the label and the first step"),
        (STRATEGY_HEAD + "Steps:\n2. a\n3. b", "marked 2, 3"),
        (STRATEGY_HEAD + "Steps:\n(b) a\n(c) b", "marked b, c"),
        (STRATEGY_HEAD + "Steps:\n(a) a\n(c) b", "marked a, c"),
        (STRATEGY_HEAD + "Steps: (b) Find. (c) Add.", "marked b"),
        (STRATEGY_HEAD + "Steps:\n(i) Find.\n(ii) Add.", "marked i"),
        (STRATEGY_EXAMPLE_TEXT + "\n\nExample:\n1. Add 3 and 4.", "marked 1, 2, 1"),
        (STRATEGY_HEAD + "Steps:\nDo a.\nDo b.", "the steps are not marked"),
        ('{"type": "t", "strategy": "s", "steps": ["a"]}', "no problem type, no strategy, no steps"),
        (None, "got None"),
    ],
)
def test_strategy_parser_says_what_is_wrong(reply, words):
    with pytest.raises(ValueError) as error:
        parse_strategy(reply)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"type": ""}, "'type': expected a non-empty string, got ''"),
        ({"type": " \n"}, "'type': expected a non-empty string"),
        ({"type": 3}, "'type': expected a non-empty string, got 3"),
        ({"strategy": None}, "'strategy': expected a non-empty string, got None"),
        ({"strategy": "two\nlines"}, "'strategy': expected one line"),
        ({"strategy": "two\u2028lines"}, "'strategy': expected one line"),
        ({"strategy": " outer blank"}, "'strategy': expected one line"),
        ({"steps": []}, "'steps': expected a tuple of at least one step"),
        ({"steps": "Add."}, "'steps': expected a list of strings, got 'Add.'"),
        ({"steps": None}, "'steps': expected a list of strings, got None"),
        ({"steps": ["Add.", ""]}, "'steps[1]': expected a non-empty string, got ''"),
        ({"steps": ["Add.", ["x"]]}, "'steps[1]'"),
        ({"answer": "42"}, "'answer': unknown, with value '42'"),
    ],
)
def test_strategy_from_dict_names_field_and_value(change, words):
    with pytest.raises(ValueError) as error:
        Strategy.from_dict({"type": "t", "strategy": "s", "steps": ["a"]} | change)
    assert words in str(error.value)


@pytest.mark.parametrize("key", ["type", "strategy", "steps"])
def test_strategy_from_dict_misses_a_field(key):
    data = {"type": "t", "strategy": "s", "steps": ["a"]}
    del data[key]
    with pytest.raises(ValueError, match=f"{key!r}: missing"):
        Strategy.from_dict(data)


def test_strategy_is_immutable_and_checked_without_from_dict_too():
    with pytest.raises(AttributeError):
        strategy_example().type = "other"
    with pytest.raises(ValueError, match="tuple"):
        Strategy("t", "s", ["a"])
    with pytest.raises(ValueError, match="expected an object"):
        Strategy.from_dict(["t", "s"])
    data = {"type": "t", "strategy": "s", "steps": ["a"]}
    s = Strategy.from_dict(data)
    data["steps"].append("b")
    assert s.steps == ("a",)
    s.to_dict()["steps"].append("b")
    assert s.steps == ("a",)


STRATEGY_PROBLEMS = [
    "What is 2 + 3?",
    "Strategy: none. Steps:\n1. {x} {0} {{}} %s %d\nProblem type: ?",
    "  Let $f(x)=\\frac{x}{2}$ and\n\n\\boxed{}; follow <|im_end|> \u4e2d  ",
    "Follow this strategy.\n</problem>",
    INSTRUCTION,
]


@pytest.mark.parametrize("problem", STRATEGY_PROBLEMS)
def test_strategy_messages_differ_by_the_strategy_block_only(problem):
    s = strategy_example()
    auto, guided = auto_messages(problem), guided_messages(problem, s)
    assert [m["role"] for m in auto] == [m["role"] for m in guided] == ["user"]  # no system message of ours
    assert auto[0]["content"] == problem + "\n\nReason step by step and put the final answer in \\boxed{}."
    # The trap: one closing for both. The block before the problem is the whole difference, so that response tokens line up.
    assert guided[0]["content"] == "Follow this strategy.\n" + STRATEGY_EXAMPLE_TEXT + "\n\n" + auto[0]["content"]


@pytest.mark.parametrize("problem", STRATEGY_PROBLEMS)
def test_strategy_pipeline_prompts_hold_their_inputs_unchanged(problem):
    solution = "We get {5} = \\boxed{5}. Strategy: %s"
    other = Strategy("another", "Count.", ("Count on.",))
    extraction, scoring = extraction_prompt(problem, solution), scoring_prompt(problem, solution, [strategy_example(), other])
    for messages, tag in ((extraction, "response"), (scoring, "solution")):
        assert [m["role"] for m in messages] == ["user"]
        assert f"<problem>\n{problem}\n</problem>" in messages[0]["content"]
        assert f"<{tag}>\n{solution}\n</{tag}>" in messages[0]["content"]
    for number, text in ((1, STRATEGY_EXAMPLE_TEXT), (2, format_strategy(other))):
        assert f"<candidate {number}>\n{text}\n</candidate {number}>" in scoring[0]["content"]
    # The form asked for is the one that the reader takes: the prompt's own pattern parses.
    form = extraction[0]["content"].rpartition("Problem type: ")
    assert parse_strategy("".join(form[1:])).steps == ("...", "...", "...")
    assert f"At most {strategy_module.LEAK_SCORE} if the answer can be read" in scoring[0]["content"]
    asked = "\n".join(scoring[0]["content"].splitlines()[-2:])
    for i, name in enumerate(CRITERIA):
        asked = asked.replace(f" {name}", f" 0.{i}")
    assert parse_scores(asked, 2) == [dict(zip(CRITERIA, (0.0, 0.1, 0.2, 0.3), strict=True))] * 2


@pytest.mark.parametrize(
    "call",
    [
        lambda: auto_messages(""),
        lambda: auto_messages(None),
        lambda: guided_messages(" ", strategy_example()),
        lambda: guided_messages("p", strategy_example().to_dict()),
        lambda: guided_messages("p", None),
        lambda: extraction_prompt("p", ""),
        lambda: extraction_prompt(3, "s"),
        lambda: scoring_prompt("p", "s", ["text"]),
        lambda: scoring_prompt("p", "s", []),
    ],
)
def test_strategy_messages_reject_bad_input(call):
    with pytest.raises(ValueError, match="expected"):
        call()


STRATEGY_SCORES = [
    {"type": 0.9, "strategy": 1.0, "steps": 0.0, "no_leak": 0.25},
    {"type": 1.0, "strategy": 0.5, "steps": 0.7, "no_leak": 1.0},
]


@pytest.mark.parametrize(
    "reply",
    [
        "1: 0.9 1.0 0.0 0.25\n2: 1.0 0.5 0.7 1.0",
        "<think>\n1: 0 0 0 0\n</think>\nScores of both 2:\n\n- **2:** 1, .5, 0.7, 1\n- **1:** 0.90, 1, 0, .25\n\nDone, 2 of 2.",
        "| # | type | strategy | steps | no leak |\n|---|---|---|---|---|\n"
        "| 1 | 0.9 | 1 | 0 | 0.25 |\n| 2 | 1 | 0.5 | 0.7 | 1 |",
        "Candidate 1: Type 0.9, Strategy 1.0, Steps 0.0, No-leak 0.25\r\n"
        "Attempt 2: Type: 1; Strategy: 0.5; Steps: 0.7; no_leak: 1",
        '```json\n{\n  "1": [0.9, 1.0, 0.0, 0.25],\n  "2": [1.0, 0.5, 0.7, 1.0]\n}\n```',
        "1. 0.9 1.0 0.0 0.25\n(2) 1 0.5 0.7 1",
    ],
)
def test_strategy_scores_are_read(reply):
    scores = parse_scores(reply, 2)
    assert scores == STRATEGY_SCORES and all(list(own) == list(CRITERIA) for own in scores)


@pytest.mark.parametrize(
    "line, words",
    [
        ("", "no scores of candidate 2"),
        ("fine!", "no scores of candidate 2"),
        ("1: 1 1 1 1", "candidate 1 is given twice"),
        ("3: 1 1 1 1", "expected a candidate's number, 1 to 2, and 4 scores in '3: 1 1 1 1'"),
        ("0: 1 1 1 1", "expected a candidate's number, 1 to 2"),
        ("2: 1 1 1", "4 scores in '2: 1 1 1'"),
        ("2: 1 1 1 1 1", "4 scores in '2: 1 1 1 1 1'"),
        ("1 1 1 1", "4 scores in '1 1 1 1'"),
        ("2: 1 1 1 1.1", "from 0.0 to 1.0 in '2: 1 1 1 1.1'"),
        ("2: 1 -0.1 1 1", "from 0.0 to 1.0"),
        ("2: 4 5 4 5", "from 0.0 to 1.0"),
        ("2: 90% 80% 90% 90%", "from 0.0 to 1.0"),
        ("2: 1/1 1/1 1/1 1/1", "4 scores in"),
        ("2: no_leak 1 type 0.9 strategy 0.8 steps 1", "4 scores in"),  # in another order: not to be read by position
        ("2: type 1 type 1 type 1 type 1", "4 scores in"),
    ],
)
def test_strategy_scores_name_the_bad_line(line, words):
    with pytest.raises(ValueError) as error:
        parse_scores(f"1: 0.9 1.0 0.0 0.25\n{line}", 2)
    assert words in str(error.value)


# ---------------------------------------------------------------------------------------------- leaks, choice


LEAK_PROBLEM = "A farm has 30 hens and 12 ducks. Each hen lays three eggs a week, and a quarter of them break. Enough?"
LEAK_SOLUTION = "The hens lay 30 * 3 = 90 eggs. Broken: 90/4 = 22.5. In 52 weeks 4,680, less 1170, so $\\frac{7}{8}$: 37 - 5."


def with_step(step):
    return Strategy("rate problem", "Find the rate, then scale it.", ("Find the rate.", step))


@pytest.mark.parametrize(
    "step, answer",
    [
        ("This gives 25 eggs.", "25"),
        ("This gives twenty-five eggs.", "25"),
        ("Twenty five is what remains.", "25"),
        ("It is $25$.", "25"),
        ("It is 25.0.", "25"),
        ("Take \\(x = -25\\).", "25"),
        ("Take minus twenty-five.", "-25"),
        ("It is 1{,}234 then.", "1234"),
        ("It is 1,234 then.", "1234"),
        ("It is one thousand two hundred and thirty-four.", "1,234"),
        ("Scale it to 1.5 million.", "1500000"),
        ("The share is 0.5.", "\\frac{1}{2}"),
        ("The share is 1/2.", "0.5"),
        ("The share is \\dfrac12.", "0.5"),
        ("The share is one half.", "1/2"),
        ("The share is ½.", "0.5"),
        ("The share is 50 percent.", "\\frac12"),
        ("The share is 50\\%.", "0.5"),
        ("The share is seventy-five percent.", "3/4"),
        ("So take two dozen.", "24"),
        ("It is ２５, which is left.", "25"),
        ("It is 1\u202f234 then.", "1234"),
        ("That comes to 3i.", "3i"),
        ("Then it must be 2x.", "2x"),
        ("It is two thirds of it.", "2/3"),
        ("Take 3 1/2 hours.", "3.5"),
        ("Take $3\\frac{1}{2}$ hours.", "\\frac{7}{2}"),
        ("Take 3 \\times 10^{5} of them.", "300000"),
        ("Simplify to $2 \\sqrt{3}$.", "2\\sqrt{3}"),
        ("Simplify to 2√3.", "2\\sqrt3"),
        ("Simplify to 2*sqrt(3).", "$2\\sqrt{3}$"),
        ("The point is $\\left( 3, 4 \\right)$.", "(3,4)"),
        ("It becomes $\\left(x + 1\\right) (x-2)$.", "(x+1)(x-2)"),
        ("It comes to $\\dfrac{\\pi}{x}$.", "\\frac{\\pi}{x}"),
        ("So it is Monday.", "\\text{Monday}"),
        ("Conclude that it is even.", "\\text{even}"),
        ("So the answer is yes.", "Yes"),
        ("Choose option (C).", "C"),
        ("Write 861 in that base.", "861_{12}"),
        ("So the count is two.", "2"),
        ("There are two of them.", "2"),
        ("The answer is 0.", "0"),
        ("Factor out 7.", "7"),
        ("Multiply to get 4,680.", "25"),  # from here on the solution's values
        ("Multiply to get four thousand six hundred eighty.", "25"),
        ("Subtract 1,170.", "25"),
        ("Break it into 22.5 parts.", "25"),
        ("Keep 7/8 of it.", "25"),
        ("Keep 87.5 percent of it.", "25"),
        ("Then $x=37$.", "25"),
        ("Then 5 are left.", "25"),
    ],
)  # fmt: skip
def test_leaks_finds_the_number_in_every_spelling(step, answer):
    found = strategy_module.leaks(with_step(step), LEAK_PROBLEM, LEAK_SOLUTION, answer)
    assert found and all("step 2" in reason for reason in found), found
    # The same text beside a row to which these numbers mean nothing.
    assert strategy_module.leaks(with_step(step), "What is it?", "It follows.", "101") == []


@pytest.mark.parametrize(
    "step, answer",
    [
        ("Multiply the 30 hens by three.", "25"),  # the problem's own numbers are no computation
        ("Divide both sides by 2.", "2"),
        ("Set up two unknowns.", "2"),
        ("Take the square root of both sides.", "2"),
        ("Write $x^2 + bx + c$ and $a_2$.", "2"),
        ("Write $b^2 - 4ac$.", "4"),
        ("Go on with step 3.", "3"),
        ("Use the third equation and the 25th term.", "25"),
        ("Set it equal to zero.", "0"),
        ("Make the leading coefficient equal to 1.", "1"),
        ("Work in base 10.", "10"),
        ("The angles add up to 180 degrees.", "25"),
        ("An hour has 60 minutes.", "60"),
        ("Distinguish three cases.", "3"),
        ("Use how many eggs each hen lays: three eggs.", "3"),  # as the problem says it
        ("Check whether it is even or odd.", "\\text{odd}"),
        ("No other case remains.", "No"),
        ("Consider a and b.", "A"),
        ("Find the side AB.", "B"),
        ("Use the volume $\\frac{4}{3} \\pi r^3$.", "25"),
        ("Use $\\frac{n(n-3)}{2}$.", "25"),
        ("Write $2x+1$ for the odd ones.", "x+1"),
        ("Compare 1234 with 12345.", "234"),
        ("Multiply 125 by x.", "25"),
    ],
)  # fmt: skip
def test_leaks_leaves_harmless_numbers_alone(step, answer):
    solution = LEAK_SOLUTION + " 180 degrees, 60 minutes, 4/3, n-3, two, 10."
    assert strategy_module.leaks(with_step(step), LEAK_PROBLEM, solution, answer) == []


def test_leaks_outlasts_what_a_stuck_model_writes():
    start = time.perf_counter()
    for piece in ("9", "9,", "/9", "9 9/", "{", "x9", "twenty ", "\\frac", "\\sqrt(", "divide 9 ", "\u4e009"):
        text = (piece * 1500).strip()
        strategy_module.leaks(with_step(text), "What is 9?", text, text[:1000])
    assert time.perf_counter() - start < 10
    assert strategy_module.leaks(with_step("It is 8" + "9" * 5000), "p", "9" * 5000, "9" * 99) == []


# What the filter gets wrong in data/leak_examples.jsonl: (problem's id, candidate, label). Other languages; rounded values and
# values in between that look harmless; small numbers; expressions with their terms in another order. And false alarms.
LEAKS_MISSED = {
    ("cyclist", 2, "computed"), ("cyclist", 3, "computed"), ("cyclist", 4, "answer"), ("jacket", 3, "computed"),
    ("pizza", 4, "answer"), ("mean", 4, "answer"), ("rectangle", 4, "answer"), ("marbles", 4, "answer"),
    ("petrol", 4, "answer"), ("radicals", 4, "answer"), ("digits", 4, "answer"), ("incircle", 4, "answer"),
    ("iterate", 3, "computed"), ("logarithm", 3, "answer"), ("logarithm", 4, "answer"), ("recursion", 3, "computed"),
    ("recursion", 4, "answer"), ("minimum", 4, "answer"), ("orthocentre", 3, "computed"),
}  # fmt: skip
LEAKS_ALARMED = {("digits", 2, "no"), ("incircle", 2, "no"), ("recursion", 2, "no"), ("stones", 2, "no")}


def test_leaks_on_our_labelled_examples(eval_worker):
    """The labels were set before the filter ran (data/README.md has their rule), and both READMEs state these figures."""
    cases, wrong = Counter(), set()
    for i, (row, candidate) in enumerate(leak_examples()):
        assert i % 4 or is_correct(row["solution"], row["answer"], eval_worker)
        strategy, label = Strategy.from_dict(candidate["strategy"]), candidate["leaks"]
        found = strategy_module.leaks(strategy, row["problem"], row["solution"], row["answer"])
        cases[bool(found), {"no": False, "answer": True, "computed": True}[label]] += 1
        if bool(found) != (label != "no"):
            wrong.add((row["id"], i % 4 + 1, label))
    print(f"found {cases[True, True]}, missed {cases[False, True]}, false alarms {cases[True, False]}, of {cases.total()}")
    assert wrong == LEAKS_MISSED | LEAKS_ALARMED
    figures = f"{cases[True, True]} of {cases[True, True] + cases[False, True]} leaks"
    alarms = f"{cases[True, False]} false alarms on the other {cases[True, False] + cases[False, False]}"
    for file in ("README.md", "data/README.md"):
        text = " ".join((ROOT / file).read_text(encoding="utf-8").split())
        assert f"{cases.total()} " in text and figures in text and alarms in text, file


def test_leaks_spares_the_starter_set_and_finds_what_is_planted_into_it():
    steps = ("Check that you get {}.", "Report ${}$ as the answer.", "The total is {}, as asked.")
    alarms = []
    for i, row in enumerate(_starter_rows("train", "test", "heldout")):
        strategy = Strategy.from_dict(row["strategy"])
        texts = row["problem"], row["solution"], row["answer"]
        if found := strategy_module.leaks(strategy, *texts):
            alarms.append((_starter_family(row), found))
        for step in steps if i % 5 == 0 else ():
            worse = replace(strategy, steps=(*strategy.steps, step.format(row["answer"])))
            assert strategy_module.leaks(worse, *texts), (row["id"], step)
    # "the two times", where two is the answer too: the one false alarm
    ((family, found),) = alarms
    assert family == "work-together" and len(found) == 1 and "the answer two in step 1" in found[0]


def test_choice_and_quality_by_hand():
    def scores(*values):
        return dict(zip(CRITERIA, values, strict=True))

    best = strategy_module.best_candidate
    assert best([scores(0.5, 0.5, 0.5, 0.5), None, scores(1, 1, 1, 0.9), scores(1, 1, 1, 1)]) == 3
    # Equal means: the first, also where the floats' sums differ in their last digit.
    assert best([None, scores(0.3, 0, 0, 0), scores(0.1, 0.1, 0.1, 0)]) == 1 and 0.1 + 0.1 + 0.1 > 0.3
    with pytest.raises(ValueError, match="no candidate is left of 2"):
        best([None, None])
    levels = {
        (1, 1, 1, 1): "high", (0.3, 0.95, 0.95, 1): "high", (0.29, 0.95, 0.95, 1): "medium",  # 0.3 + 0.95 + 0.95 + 1 < 3.2
        (0.5, 0.5, 0.5, 0.5): "medium", (0.5, 0.5, 0.5, 0.49): "low", (0, 0, 0, 0): "low",
    }  # fmt: skip
    assert {values: strategy_module.quality(scores(*values)) for values in levels} == levels


def test_shuffled_strategies_are_a_permutation_without_a_row_of_its_own_type():
    rng = random.Random(5)
    for case in range(300):
        # Up to half of the rows of one type, which is the tightest that there is a permutation for.
        n = rng.randint(2, 14)
        names = ["A"] * rng.randint(1, n // 2)
        names += [rng.choice("bcd") for _ in range(n - len(names))]
        if max(Counter(names).values()) * 2 > n:
            continue
        rng.shuffle(names)
        rows = [Strategy(rng.choice((name, name.swapcase())), "s", (f"row {i}",)) for i, name in enumerate(names)]
        drawn = strategy_module.shuffled_strategies(rows, case)
        assert sorted(s.steps for s in drawn) == sorted(s.steps for s in rows)
        assert all(new.type.lower() != old.type.lower() for new, old in zip(drawn, rows, strict=True))
        assert drawn == strategy_module.shuffled_strategies(rows, case)
    # Two rows each of three types: all of the 80 permutations that there are get drawn.
    rows = [Strategy(name, "s", (f"row {i}",)) for i, name in enumerate("aabbcc")]
    seen = Counter(tuple(s.steps[0] for s in strategy_module.shuffled_strategies(rows, seed)) for seed in range(4000))
    allowed = [p for p in itertools.permutations(range(6)) if all(i // 2 != k // 2 for i, k in enumerate(p))]
    assert set(seen) == {tuple(f"row {k}" for k in p) for p in allowed} and len(allowed) == 80
    assert strategy_module.shuffled_strategies([], 0) == []
    with pytest.raises(ValueError, match="3 of 5 rows have the type 'a', more than half"):
        strategy_module.shuffled_strategies([Strategy(name, "s", ("x",)) for name in "abaAb"], 0)


def test_strategy_alone_in_a_folder_is_a_module_and_says_what_the_program_needs(tmp_path):
    shutil.copy(strategy_module.__file__, tmp_path)
    code = "import sys; sys.path.insert(0, '.'); import strategy as s; print(s.solution_prompt('p')[0]['content'][-12:])"
    run = partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True)
    done = run([sys.executable, "-S", "-I", "-c", code])  # -S: not even the installed packages
    assert done.stdout.strip().endswith("boxed{}."), done.stderr
    done = run([sys.executable, "strategy.py", "--data", "x"])
    assert done.returncode == 1 and "needs tools/extract.py beside it" in done.stderr


# ---------------------------------------------------------------------------------------------- extraction, a real server


class ChatServer:
    """A chat server on loopback whose every reply is scripted: script(handler, body, number) with the number of the request.

    The script returns a str (the content of a completion), or (status, headers, payload); with None it has written to the
    handler itself. `requests` keeps what came in, as (raw body, headers, path).
    """

    def __init__(self, script):
        self.requests, self.lock, self.running, self.most_running = [], threading.Lock(), 0, 0
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                with owner.lock:
                    number = len(owner.requests)
                    owner.requests.append((raw, dict(self.headers), self.path))
                    owner.running += 1
                    owner.most_running = max(owner.most_running, owner.running)
                try:
                    reply = script(self, json.loads(raw), number)
                    with owner.lock:  # before the reply: at its end the client's next request may already be here
                        owner.running -= 1
                    if reply is not None:
                        self.reply(*(completion(reply) if isinstance(reply, str) else reply))
                except (BrokenPipeError, ConnectionResetError):  # the client has left, as some tests want it to
                    pass

            def reply(self, status, headers, payload):
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(payload))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=partial(self.server.serve_forever, 0.02), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def completion(content, finish="stop", **message):
    reply = {
        "model": "fake-1",
        "choices": [{"message": {"role": "assistant", "content": content} | message, "finish_reason": finish}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }  # fmt: skip
    return 200, {"Content-Type": "application/json"}, json.dumps(reply).encode()


def fake_model(handler, body, number):
    """Right solutions to "What is a + b?"; of candidates 0 to 4 one is no strategy, one leaks, 3 is better than the others."""
    text, seed = body["messages"][0]["content"], body["seed"]
    a, b = map(int, re.search(r"What is (\d+) \+ (\d+)\?", text).groups())
    if "Score the attempts" in text:
        found = enumerate(re.findall(r"way (\w)", text), start=1)
        return "\n".join(f"{i}: " + ("0.9 1.0 1.0 1.0" if way == "d" else "1.0 0.6 0.7 0.8") for i, way in found)
    if "Write down the strategy" not in text:
        return f"Adding gives \\boxed{{{a + b}}}."
    if seed == 1:
        return "I cannot do that."
    step = f"Check that it is {a + b}." if seed == 2 else "Check the sum."
    head = f"<think>hm</think>\nProblem type: a sum, way {'abcdefghij'[seed]}\nStrategy: Join the parts."
    return f"{head}\nSteps:\n(a) Add.\n(b) {step}"


def extraction_data(folder, count=3, solutions=True, **fields):
    rows = []
    for i in range(count):
        row = {"id": f"row-{i}", "problem": f"What is {20 + i} + {40 + 3 * i}?", "answer": str(60 + 4 * i)}
        rows.append(row | ({"solution": f"The sum is \\boxed{{{row['answer']}}}."} if solutions else {}) | fields)
    path = folder / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def extraction_flags(url, data, out, *more):
    flags = ["--data", str(data), "--endpoint", url, "--model", "fake", "--out", str(out), "--quiet"]
    return [*flags, "--backoff", "0.01", "--retries", "2", "--workers", "1", *more]


def journal_records(out, kind=None):
    lines = extract.journal_path(out).read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if kind in (None, record["kind"])]


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    return "sk-very-secret"


def test_extraction_end_to_end(tmp_path, capsys, key):
    data, out = extraction_data(tmp_path, solutions=False), tmp_path / "strategies.jsonl"
    with ChatServer(fake_model) as server:
        flags = extraction_flags(server.url, data, out, "--price_in", "2", "--price_out", "30", "--workers", "3")
        assert extract.main(flags) == 0
    printed = capsys.readouterr()
    assert len(server.requests) == 3 * (1 + 5 + 1) and all(path == "/v1/chat/completions" for _, _, path in server.requests)
    assert all(headers["Authorization"] == f"Bearer {key}" for _, headers, _ in server.requests)
    bodies = [json.loads(raw) for raw, _, _ in server.requests]
    assert {(b["model"], b["max_tokens"], b["top_p"]) for b in bodies} == {("fake", 8192, 0.95)}
    asked = [b for b in bodies if "Write down the strategy" in b["messages"][0]["content"]]
    assert Counter((b["seed"], b["temperature"]) for b in asked) == {(seed, 0.6): 3 for seed in range(5)}
    # The scorer sees the three that are left, and neither the one that leaks nor the one that is none.
    seen = [re.findall(r"way (\w)", text) for text in (b["messages"][0]["content"] for b in bodies) if "Score the" in text]
    assert seen == [["a", "d", "e"]] * 3
    assert {b["temperature"] for b in bodies if "Score the" in b["messages"][0]["content"]} == {0.0}
    # 21 answers of 100 + 10 tokens: 2,100 * 2 + 210 * 30 millionths
    assert "21 requests, 2,100 + 210 tokens, cost 0.01" in printed.out
    problems = load_problems(out)  # what train.py reads, unknown fields and all
    assert [(p.id, p.answer, p.solution, p.strategy.type) for p in problems] == [
        (f"row-{i}", str(60 + 4 * i), f"Adding gives \\boxed{{{60 + 4 * i}}}.", "a sum, way d") for i in range(3)
    ]
    record = {r["row"]: r for r in journal_records(out, "row")}["row-1"]
    assert record["kept"] == 3 and record["solution_from"] == "model" and record["failed"] is None
    assert [c["rejected"] and c["rejected"][0] for c in record["candidates"]] == [None, "not parsed", "leak", None, None]
    assert "the answer 64 in step 2" in record["candidates"][2]["rejected"][1]
    assert list(record["candidates"][3]["scores"].values()) == [0.9, 1.0, 1.0, 1.0]
    (run,) = journal_records(out, "run")
    assert run["endpoint"] == server.url + "/chat/completions" and run["prompts_hash"] == extract.prompts_hash()
    everything = printed.out + printed.err + extract.journal_path(out).read_text() + out.read_text()
    assert key not in everything
    # Once more: nothing is asked, nothing changes; then the report on what is there.
    before = out.read_bytes(), len(journal_records(out, "row"))
    assert extract.main(flags) == 0 and len(server.requests) == 21
    assert (out.read_bytes(), len(journal_records(out, "row"))) == before
    capsys.readouterr()
    assert extract.main(["--report", str(out), "--samples", "1", "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    for line in (
        "3 strategies", "candidates: 15 of 3 rows; read 12 (80.0 %)", "not parsed 3 (20.0 %)", "leak 3 (20.0 %)",
        "rows without a strategy: 0", "type 0.90, strategy 1.00", "high 3 (100.0 %)", "leaks by the filter: 0 (0.0 %)",
        "a sum, way d (3)", "21 requests", "words: mean 17.0", "steps: mean 2.0, median 2, 2 to 2",
    ):  # fmt: skip
        assert line in printed, (line, printed)
    assert printed.count("\n--- row-") == 1
    # A journal of an earlier version, whose scores went from 1 to 5 on other criteria: no bands, and the rest of the report.
    log = extract.journal_path(out)
    records = journal_records(out)
    for record in records:
        for candidate in record.get("candidates", []):
            candidate["scores"] = {"faithful": 5, "reusable": 4, "no_leak": 5, "actionable": 5}
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert extract.main(["--report", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "by an earlier version, on faithful, reusable, no_leak, actionable" in printed
    assert "quality:" not in printed and "types: 1 different" in printed


def test_extraction_rejects_a_value_that_only_the_solution_holds():
    reply = SimpleNamespace(finish="stop", text="Problem type: t\nStrategy: s\nSteps:\n(a) This gives 37.\n(b) Go on.")
    candidate = extract.judge_candidate(0, reply, "What is 30 + 12 - 5?", "It is 42 - 5 = 37, so \\boxed{yes}.", "yes", [])
    assert candidate["rejected"][0] == "leak" and "the computed value 37" in candidate["rejected"][1]


def test_extraction_prompts_hash_is_of_all_three_wordings(monkeypatch):
    before = extract.prompts_hash()
    for name in ("solution_prompt", "extraction_prompt", "scoring_prompt"):
        with monkeypatch.context() as patch:
            patch.setattr(extract, name, lambda *_: "another wording")
            assert extract.prompts_hash() != before, name


def drip(handler, body, number):
    """A reply that never ends, in single bytes: each arrives in time, the whole does not."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(40):
        handler.wfile.write(b" ")
        time.sleep(0.1)


def cut(handler, body, number):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def cut_chunks(handler, body, number):
    handler.protocol_version = "HTTP/1.1"
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"d\r\n" + b'{"choices": [' + b"\r\n")
    handler.close_connection = True


def no_http(handler, body, number):
    handler.wfile.write(b"\x00\x01 hello\r\n\r\n")


def vanish(handler, body, number):
    handler.connection.close()


def flood(handler, body, number):
    handler.send_response(200)
    handler.end_headers()
    handler.flooded = 0
    while True:
        handler.wfile.write(b"<p>" * 10000)


def body_of(value, status=200):
    return lambda handler, body, number: (status, {}, value if isinstance(value, bytes) else json.dumps(value).encode())


@pytest.mark.parametrize(
    "misbehave, words",
    [
        (lambda handler, body, number: time.sleep(2), "timed out"),
        (drip, "timed out"),
        (cut, "cut off after 13 of 1000 bytes"),
        (cut_chunks, "IncompleteRead"),
        (no_http, "BadStatusLine"),
        (vanish, "RemoteDisconnected"),
        (flood, "more than 100,000 bytes"),
        (body_of({"error": {"message": "overloaded"}}, 500), "HTTP 500: overloaded"),
        (body_of(b"<html>busy</html>", 503), "HTTP 503: <html>busy</html>"),
        (body_of({"error": "try later"}, 429), "HTTP 429: try later"),
        (body_of(b"", 408), "HTTP 408: (no message)"),
        (body_of(b"<html>" * 100), "no JSON: b'<html>"),
        (body_of(b"\xff\xfe"), "no JSON"),
        (body_of([1, 2]), "HTTP 200, but"),
        (body_of({"error": {"message": "upstream", "code": 502}}), "HTTP 200, but: upstream"),
        (body_of({}), "no choices[0].message"),
        (body_of({"choices": []}), "no choices[0].message"),
        (body_of({"choices": [3]}), "no choices[0].message"),
        (body_of({"choices": [{"text": "old"}]}), "no choices[0].message"),
        (body_of({"choices": [{"message": {"content": None}}]}), "content is empty: None"),
        (body_of({"choices": [{"message": {"content": " \n"}}]}), "content is empty"),
        (body_of({"choices": [{"message": {"content": 7}}]}), "content is empty: 7"),
    ],
)
def test_extraction_tries_again_where_that_may_help(tmp_path, capsys, monkeypatch, misbehave, words):
    monkeypatch.setattr(extract, "MAX_BYTES", 100_000)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    data, out = extraction_data(tmp_path, 1), tmp_path / "out.jsonl"
    # Only those that are about time get little of it: on a busy machine a good reply can take half a second too.
    flags = ("--read_timeout", "0.6" if words == "timed out" else "30", "--candidates", "1", "--retries", "1")
    flags += ("--max_wait", "0")  # or a 429 would use up no retry
    with ChatServer(lambda h, body, i: misbehave(h, body, i) if i == 0 else fake_model(h, body, i)) as server:
        assert extract.main(extraction_flags(server.url, data, out, *flags)) == 0
        assert len(server.requests) == 3 and len(load_problems(out)) == 1  # the failure, the candidate, its score
    assert "Authorization" not in server.requests[0][1]
    capsys.readouterr()
    # For ever: the row fails with the reason, and there is no file that looks finished.
    out = tmp_path / "never.jsonl"
    with ChatServer(misbehave) as server:
        assert extract.main(extraction_flags(server.url, data, out, *flags)) == extract.ROWS_FAILED
        assert len(server.requests) == 2
    error = capsys.readouterr().err
    assert "failed: row-0: no answer in 2 tries" in error and words in error and not out.exists()


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 422])
def test_extraction_stops_at_once_where_trying_again_is_useless(tmp_path, capsys, key, status):
    data, out = extraction_data(tmp_path, 5), tmp_path / "out.jsonl"
    with ChatServer(body_of({"error": {"message": f"no such thing, {key} is wrong"}}, status)) as server:
        with pytest.raises(ValueError) as error:
            extract.main(extraction_flags(server.url, data, out))
        assert len(server.requests) == 1
    assert f"HTTP {status}: no such thing, *** is wrong" in str(error.value) and "goes on from there" in str(error.value)
    assert key not in str(error.value) + "".join(capsys.readouterr()) + extract.journal_path(out).read_text()


@pytest.mark.parametrize("status", [400, 413, 422])
def test_extraction_goes_on_where_the_server_refuses_one_row(tmp_path, capsys, status):
    """A content filter, or a problem that is too long: also where the refusal is the first reply of a run."""
    refuse = body_of({"error": "content filter"}, status)

    def script(handler, body, number):
        return (refuse if "What is 21" in body["messages"][0]["content"] else fake_model)(handler, body, number)

    data, out = extraction_data(tmp_path, 3), tmp_path / "out.jsonl"
    with ChatServer(script) as server:
        for requests in (6 + 1 + 6, 1):
            before = len(server.requests)
            assert extract.main(extraction_flags(server.url, data, out)) == extract.ROWS_FAILED
            assert len(server.requests) - before == requests
            reason = f"failed: row-1: the server refuses a request of this row: HTTP {status}: content filter"
            assert reason in capsys.readouterr().err
    assert [row.id for row in load_problems(out)] == ["row-0", "row-2"]
    # but a server that refuses row after row is not asked by thousands of them
    data, out = extraction_data(tmp_path, 30), tmp_path / "new.jsonl"
    with ChatServer(lambda h, b, i: (fake_model if i < 6 else refuse)(h, b, i)) as server:
        with pytest.raises(ValueError, match=f"20 requests in a row failed for good, the last with: HTTP {status}"):
            extract.main(extraction_flags(server.url, data, out))
        assert len(server.requests) == 6 + 20


def test_extraction_sits_out_more_rate_limits_than_it_has_retries(tmp_path, capsys):
    data, out = extraction_data(tmp_path, 1), tmp_path / "out.jsonl"
    slow_down = body_of({"error": "slow down"}, 429)
    with ChatServer(lambda h, b, i: (slow_down if i < 9 else fake_model)(h, b, i)) as server:
        flags = extraction_flags(server.url, data, out, "--retries", "0", "--candidates", "1", "--backoff", "0.001")
        assert extract.main(flags) == 0 and len(server.requests) == 9 + 2
    with ChatServer(lambda h, b, i: slow_down(h, b, i)) as server:
        flags = extraction_flags(server.url, data, tmp_path / "new.jsonl", "--max_wait", "0.2", "--retries", "1")
        assert extract.main(flags) == extract.ROWS_FAILED and len(server.requests) > 2


def test_extraction_stops_where_an_answer_cannot_be_kept_and_loses_none_before_it(tmp_path):
    """On a disk that is full half a line must not stay: the next line would be glued to it."""
    data, out = extraction_data(tmp_path, 2), tmp_path / "out.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def script(handler, body, number):
        if number == 3:  # room for 100 bytes more
            resource.setrlimit(resource.RLIMIT_FSIZE, (extract.journal_path(out).stat().st_size + 100, hard))
        return fake_model(handler, body, number)

    with ChatServer(script) as server:
        flags = extraction_flags(server.url, data, out, "--workers", "2")
        try:
            with pytest.raises(ValueError, match="log.jsonl: .*File too large; an answer could not be kept: make room"):
                extract.main(flags)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        kept = len(journal_records(out, "answer"))
        assert 2 <= kept <= 4
        asked = len(server.requests)
        assert extract.main(flags) == 0 and len(server.requests) == asked + 2 * 6 - kept
    assert len(load_problems(out)) == 2


def test_extraction_exit_status_tells_failed_rows_from_what_stopped_it(tmp_path, capsys):
    data, out = extraction_data(tmp_path, 1), tmp_path / "out.jsonl"

    def status(*more):
        return run_script("strategy.py", *extraction_flags(server.url, data, out, *more))

    with ChatServer(fake_model) as server:
        assert status().returncode == 0
        before = out.read_bytes()
        done = status("--seed", "5")
        assert done.returncode == 1 and "no paid answer would fit" in done.stderr
        assert status("--no_such_flag").returncode == 2
    with ChatServer(body_of(b"", 500)) as server:
        extract.journal_path(out).unlink()
        extract.journal_path(out).touch()
        done = status("--retries", "0")
        assert done.returncode == 3 and "the file of an earlier run is left as it is" in done.stderr
    assert out.read_bytes() == before


def test_extraction_puts_no_file_in_place_that_training_would_refuse(tmp_path, monkeypatch):
    data, out = extraction_data(tmp_path, 1), tmp_path / "out.jsonl"

    def refuse(path, worker=None):  # what is written, and not the data, which is read by the same function
        if Path(path).suffix == ".part":
            raise ValueError(f"{path.name}:1: of no use")
        return load_problems(path, worker)

    with ChatServer(fake_model) as server:
        assert extract.main(extraction_flags(server.url, data, out)) == 0
        before = out.read_bytes()
        data = extraction_data(tmp_path, 2)
        monkeypatch.setattr(extract, "load_problems", refuse)
        with pytest.raises(ValueError, match="out.jsonl.part:1: of no use"):
            extract.main(extraction_flags(server.url, data, out))
    assert out.read_bytes() == before


def test_extraction_never_takes_the_key_to_another_host(tmp_path, key):
    data, out = extraction_data(tmp_path, 2), tmp_path / "out.jsonl"
    with ChatServer(fake_model) as other:
        where = other.url.replace("127.0.0.1", "localhost")
        for status in (301, 302, 303, 307, 308):
            with ChatServer(lambda h, b, i, s=status: (s, {"Location": f"{where}/chat/completions?x=1"}, b"")) as server:
                with pytest.raises(ValueError, match=re.escape(f"HTTP {status}: the server redirects to '{where}/chat")):
                    extract.main(extraction_flags(server.url, data, out))
                assert len(server.requests) == 1
        assert other.requests == []


def test_extraction_waits_as_long_as_the_server_says(tmp_path, monkeypatch):
    now = 1_700_000_000.0
    assert extract.retry_after("7", now) == 7 and extract.retry_after(" 0.5 ", now) == 0.5
    assert extract.retry_after("Tue, 14 Nov 2023 22:13:50 GMT", now) == 30  # date -u -d @1700000000 is 22:13:20
    assert extract.retry_after("Tue, 14 Nov 2023 22:13:00 GMT", now) == 0
    assert all(extract.retry_after(value, now) is None for value in (None, "", "soon", "-3", "32 Foo 2023"))
    # On the wire: both forms, the second worker held back by the first one's answer, and a wait that nobody should sit out.
    times, lock = [], threading.Lock()

    def busy(handler, body, number):
        with lock:
            times.append(time.time())
        later = email.utils.formatdate(math.ceil(time.time()) + 1, usegmt=True)
        if number < 2:
            return 429, {"Retry-After": "0.4" if number == 0 else later}, b"slow down"
        return fake_model(handler, body, number)

    data, out = extraction_data(tmp_path, 1), tmp_path / "out.jsonl"
    with ChatServer(busy) as server:
        assert extract.main(extraction_flags(server.url, data, out, "--candidates", "1")) == 0
    assert times[1] - times[0] >= 0.4 and times[2] - times[1] >= 0.95 and len(times) == 4
    stop = threading.Event()
    held = SimpleNamespace(not_before=time.monotonic() + 0.2)
    extract._wait_until(held, stop)
    assert time.monotonic() >= held.not_before
    with ChatServer(lambda h, b, i: (429, {"Retry-After": "86400"}, b"daily limit")) as server:
        with pytest.raises(ValueError, match="HTTP 429: daily limit .it asks for a wait of 86,400 s, more than --max_wait 900"):
            extract.main(extraction_flags(server.url, data, tmp_path / "other.jsonl"))
        assert len(server.requests) == 1


def test_extraction_backs_off_exponentially_with_jitter(monkeypatch):
    waits = []
    stop = SimpleNamespace(is_set=lambda: False, wait=waits.append)
    monkeypatch.setattr(extract, "post", lambda server, data: (500, {}, b"no"))
    server = extract.Server(False, "h", 1, "/", None, 1.0, 1.0, 8, 2.0, 900.0)
    for _ in range(3):
        with pytest.raises(extract.RowFailed, match="9 tries, the last: HTTP 500: no"):
            extract.ask_server(server, {}, stop, None)
    assert len(waits) == 24 and len(set(waits)) == 24
    for i, wait in enumerate(waits):
        middle = min(60, 2 * 2 ** (i % 8))
        assert 0.5 * middle <= wait <= 1.5 * middle
    # A server that is gone is not asked by 8,000 rows in turn; one answer in between starts the count anew.
    server.failures = extract.GIVE_UP_AFTER - 1
    with pytest.raises(extract.Stop, match="20 requests in a row"):
        extract.ask_server(server, {}, stop, None)
    monkeypatch.setattr(extract, "post", lambda server, data: completion("x"))
    assert extract.ask_server(server, {}, stop, None).text == "x" and server.failures == 0


def test_extraction_says_when_nobody_listens(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    data = extraction_data(tmp_path, 2)
    assert extract.main(extraction_flags(f"http://127.0.0.1:{port}", data, tmp_path / "out.jsonl")) == extract.ROWS_FAILED
    error = capsys.readouterr().err
    assert error.count("ConnectionRefusedError") == 2 and "2 of 2 rows failed" in error


def test_extraction_reads_the_dialects_of_servers(tmp_path):
    read = extract.read_answer
    reply = completion("Hi", reasoning_content="let me think")
    usage = {"prompt_tokens": 100, "completion_tokens": 10}
    assert read(*reply) == extract.Answer("Hi", "stop", usage, "let me think", "fake-1")
    assert read(*completion([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])).text == "ab"
    assert read(*completion(None, finish="length")).text == ""  # all of it went into thoughts: paid, and not asked again
    assert read(200, {}, b'{"choices": [{"message": {"content": "x"}}]}') == extract.Answer("x", None, {})
    odd = json.loads(reply[2]) | {"usage": {"prompt_tokens": "many", "completion_tokens": 3}}
    assert read(200, {}, json.dumps(odd).encode()).usage == {"completion_tokens": 3}


def test_extraction_keeps_texts_that_break_lines_and_encodings(tmp_path, capsys):
    odd = "Half a pair: \ud83d, a line\u2028separator, a\x00nul, \u4e2d.\nSo \\boxed{60}."

    def script(handler, body, number):
        text = body["messages"][0]["content"]
        return fake_model(handler, body, number) if "Write down the" in text or "Score the" in text else odd

    data, out = extraction_data(tmp_path, 1, solutions=False), tmp_path / "out.jsonl"
    with ChatServer(script) as server:
        for _ in range(2):
            assert extract.main(extraction_flags(server.url, data, out)) == 0
        assert len(server.requests) == 7
    assert load_problems(out)[0].solution == odd.replace("\ud83d", "\ufffd")
    code = "import sys; from tools.extract import main; main(sys.argv[1:]); print(sorted({'torch', 'tqdm'} & set(sys.modules)))"
    command = [sys.executable, "-c", code, "--report", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "1 strategies" in done.stdout and done.stdout.endswith("\n[]\n"), done.stderr  # the report needs no torch


@pytest.fixture
def ctrl_c():
    """Ctrl-C as in a terminal: a shell starts what it runs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_extraction_interrupted_keeps_what_is_on_its_way(tmp_path, capsys, ctrl_c):
    def script(handler, body, number):
        if number == 6:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)  # the program waits for this one, and asks no more
        return fake_model(handler, body, number)

    data, out = extraction_data(tmp_path, 3), tmp_path / "out.jsonl"
    with ChatServer(script) as server:
        flags = extraction_flags(server.url, data, out)
        with pytest.raises(KeyboardInterrupt):
            extract.main(flags)
        assert len(server.requests) == len(journal_records(out, "answer")) == 7 and not out.exists()
        assert "waiting for the answers that are on their way" in capsys.readouterr().err
        assert extract.main(flags) == 0 and len(server.requests) == 18
    assert len(load_problems(out)) == 3


def test_extraction_counts_what_was_billed_for_nothing(tmp_path, capsys):
    data, out = extraction_data(tmp_path, 1), tmp_path / "out.jsonl"
    with ChatServer(lambda h, b, i: completion("") if i == 0 else fake_model(h, b, i)) as server:
        assert extract.main(extraction_flags(server.url, data, out, "--candidates", "1")) == 0
    (waste,) = journal_records(out, "waste")
    assert waste["step"] == "candidate" and "content is empty" in waste["reason"]
    assert "in all 3 requests, 300 + 30 tokens; now 3 requests" in capsys.readouterr().out


def test_extraction_has_each_answer_on_the_disk_before_the_next_question(tmp_path, monkeypatch):
    data, out, kept, synced = extraction_data(tmp_path, 2), tmp_path / "out.jsonl", [], []
    monkeypatch.setattr(extract.os, "fsync", lambda file: synced.append(len(journal_records(out, "answer"))))

    def script(handler, body, number):
        kept.append(len(journal_records(out, "answer")))
        assert max(synced) == kept[-1]  # an fsync saw all of the answers; the row's own record may be on its way
        return fake_model(handler, body, number)

    with ChatServer(script) as server:
        assert extract.main(extraction_flags(server.url, data, out, "--retries", "0")) == 0
    assert kept == list(range(12))  # 2 rows of 5 candidates and one call for their scores


def test_extraction_asks_as_many_at_once_as_it_has_workers(tmp_path):
    data, out, gate = extraction_data(tmp_path, 4), tmp_path / "out.jsonl", threading.Barrier(4, timeout=30)

    def script(handler, body, number):
        if number < 4:
            gate.wait()  # opens only when four requests are there together
        return fake_model(handler, body, number)

    with ChatServer(script) as server:
        assert extract.main(extraction_flags(server.url, data, out, "--workers", "4", "--retries", "0")) == 0
        assert server.most_running == 4
    assert [p.id for p in load_problems(out)] == [f"row-{i}" for i in range(4)]  # in the order of the data


def test_extraction_killed_and_continued_pays_once(tmp_path, capsys):
    data, workers = extraction_data(tmp_path, 6, solutions=False), 2
    with ChatServer(fake_model) as server:
        assert extract.main(extraction_flags(server.url, data, tmp_path / "whole.jsonl")) == 0
        whole = Counter(raw for raw, _, _ in server.requests)
    out, killed, enough = tmp_path / "killed.jsonl", threading.Event(), threading.Event()

    def script(handler, body, number):
        if not killed.is_set() and number >= 20:
            enough.set()
            killed.wait(10)  # these two are in flight at the kill
        return fake_model(handler, body, number)

    with ChatServer(script) as server:
        flags = extraction_flags(server.url, data, out, "--workers", str(workers))
        command = [sys.executable, strategy_module.__file__, *flags]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert enough.wait(60)
        time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed.set()
        assert not out.exists() and 20 < len(server.requests) <= 20 + workers
        # The kill may have come while a line was written.
        with extract.journal_path(out).open("ab") as stream:
            stream.write(b'{"kind": "answer", "key": "abc", "text": "Probl')
        assert extract.main(flags) == 0
        assert "dropped 47 bytes of a last line that was cut off" in capsys.readouterr().out
        paid = Counter(raw for raw, _, _ in server.requests)
    assert set(paid) == set(whole)
    assert all(count <= 2 for count in paid.values()) and paid.total() - len(paid) <= workers
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and len(load_problems(out)) == 6
    assert len(journal_records(out, "answer")) == len(whole)  # and every line can be read


def test_extraction_refuses_a_journal_that_does_not_fit(tmp_path):
    data, out = extraction_data(tmp_path, 1), tmp_path / "out.jsonl"
    with ChatServer(fake_model) as server:
        flags = extraction_flags(server.url, data, out)
        assert extract.main(flags) == 0
        count = len(server.requests)
        for more in (["--temperature", "0.7"], ["--seed", "1"], ["--body", '{"top_k": 3}']):
            with pytest.raises(ValueError, match="no paid answer would fit"):
                extract.main([*flags, *more])
        assert extract.main([*flags, "--candidates", "7"]) == 0  # but more of the same is welcome
        assert len(server.requests) == count + 3  # two candidates, and the scores of all
        log = extract.journal_path(out)
        with extract.closing(extract.Journal(log, journal_records(out, "run")[0])):
            with pytest.raises(ValueError, match="another run is writing it"):
                extract.main(flags)
        lines = log.read_bytes().splitlines(keepends=True)
        older = json.dumps(json.loads(lines[0]) | {"prompts_hash": "of other prompts"}).encode() + b"\n"
        log.write_bytes(b"".join([older, *lines[1:]]))
        with pytest.raises(ValueError, match="made with prompts_hash of other prompts, now"):
            extract.main(flags)
        log.write_bytes(b"".join([*lines[:2], lines[2][:40] + b"\n", *lines[3:]]))
        with pytest.raises(ValueError, match=r"log.jsonl:3: no line of a journal"):
            extract.main(flags)
        log.unlink()
        with pytest.raises(ValueError, match="already there, and not made by this program"):
            extract.main(flags)
        assert len(server.requests) == count + 3


def test_extraction_asks_again_for_a_wrong_solution(tmp_path, capsys):
    data, out = extraction_data(tmp_path, 3, solutions=False), tmp_path / "out.jsonl"

    def script(handler, body, number):
        text, seed = body["messages"][0]["content"], body["seed"]
        if "Write down the" in text or "Score the" in text:
            return fake_model(handler, body, number)
        if "What is 20" in text and seed < 2:
            return ("It is \\boxed{61}.", completion("Half of it is \\boxed{60}", finish="length"))[seed]
        if "What is 21" in text:
            return ("It is \\boxed{7}.", "No idea.", "<think>\\boxed{64}")[seed]
        return fake_model(handler, body, number)

    with ChatServer(script) as server:
        assert extract.main(extraction_flags(server.url, data, out)) == extract.ROWS_FAILED
    error = capsys.readouterr().err
    assert "failed: row-1: 3 solutions, none with the answer '64': answer '7', no answer, nothing but thoughts" in error
    assert "1 of 3 rows failed" in error
    assert [(p.id, p.solution) for p in load_problems(out)] == [
        ("row-0", "Adding gives \\boxed{60}."), ("row-2", "Adding gives \\boxed{68}.")
    ]  # fmt: skip
    assert len(server.requests) == 3 + 3 + 1 + 2 * 6
    assert extract.main(["--report", str(out)]) == 0
    assert "rows without a strategy: 1\n  row-1: 3 solutions" in capsys.readouterr().out


def test_extraction_takes_the_data_as_it_comes(tmp_path, capsys):
    strategy = strategy_example().to_dict()
    rows = [
        {"id": "a", "problem": "What is 1 + 2?", "answer": "3", "solution": "It is #### 4"},  # wrong: no strategy from it
        {"id": "b", "problem": "What is 2 + 2?", "solution": "It is \\boxed{4}."},  # its answer becomes the row's
        {"id": "c", "problem": "What is 3 + 2?"},  # the model's answer becomes the row's
        {"id": "d", "problem": "What is 4 + 2?", "answer": "6", "solution": "Six.", "strategy": strategy},  # kept as it is
        {"id": "e", "problem": "What is 5 + 2?", "answer": "7", "strategy": strategy},  # only the solution is asked for
    ]
    data, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with ChatServer(fake_model) as server:
        assert extract.main(extraction_flags(server.url, data, out)) == extract.ROWS_FAILED
        assert len(server.requests) == 6 + 7 + 0 + 1
        got = {p.id: (p.answer, p.strategy.type) for p in load_problems(out)}
        new, own = "a sum, way d", "sum of two"
        assert got == {"b": ("4", new), "c": ("5", new), "d": ("6", own), "e": ("7", own)}
        assert "failed: a: the data's solution ends in '4', the data's answer is '3'" in capsys.readouterr().err
        for line, words in (
            ('{"id": "x", "problem": "p", "answer": "3", "note": 1}', "data.jsonl:6: unknown field 'note'"),
            ('{"id": "b", "problem": "p"}', "data.jsonl:6: duplicate id"),
            ('{"id": "x", "answer": "3"}', "data.jsonl:6: field 'problem' is missing"),
            ("{", "data.jsonl:6: not a line of JSON"),
        ):
            data.write_text("".join(json.dumps(row) + "\n" for row in rows) + line + "\n")
            with pytest.raises(ValueError, match=re.escape(words)):
                extract.main(extraction_flags(server.url, data, tmp_path / "new.jsonl"))
        data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[1]]))
        assert extract.main(["--data", str(data), "--dry_run"]) == 0
        assert f"{data}: dropped 1 rows that repeat an earlier problem" in capsys.readouterr().out
        assert len(server.requests) == 14
    # Without a reference a solution must end in an answer that the output's reader takes as one.
    assert extract.Grader(None).verdict("It is \\boxed{3 +}.", None) == ("3 +", False)


def test_extraction_gives_up_on_candidates_only_after_all_rounds(tmp_path, capsys):
    good = "Problem type: sum\nStrategy: Join.\nSteps:\n(a) Add {}."
    scoring = Counter()

    def script(handler, body, number):
        text, seed = body["messages"][0]["content"], body["seed"]
        row = int(re.search(r"What is 2(\d)", text)[1])
        if "Score the" in text:
            scoring[row] += 1
            leak = {"parts": 0.2, "them": 0.3, "all": 0.4}
            added = enumerate(re.findall(r"1\. Add (\w+)\.", text), start=1)
            # What leaks is the best otherwise, and by its mean.
            scores = "\n".join(f"{i}: {'1 1 1' if what == 'parts' else '0.8 0.9 1.0'} {leak[what]}" for i, what in added)
            if row == 2 and scoring[row] == 1:
                return completion(scores, finish="length")  # it can be read, but may not be all
            return scores if row < 3 else "fine!"
        if seed == 1:
            return completion(good.format("it"), finish="length")  # it parses, but is half an answer
        own = {0: ("parts", "", "parts", "them", "all", "parts"), 2: ("them", "", "all"), 3: ("them", "", "all")}
        return good.format(own[row][seed] if row in own else "parts")

    data, out = extraction_data(tmp_path, 4), tmp_path / "out.jsonl"
    with ChatServer(script) as server:
        assert extract.main(extraction_flags(server.url, data, out, "--candidates", "3")) == extract.ROWS_FAILED
    kinds = {
        record["row"]: ([c["rejected"] and c["rejected"][0] for c in record["candidates"]], record["kept"])
        for record in journal_records(out, "row")
    }
    assert kinds == {
        "row-0": (["leak by score", "cut off", "repeated", None, None, "repeated"], 4),
        "row-1": (["leak by score", "cut off", "repeated", "repeated", "repeated", "repeated"], None),
        "row-2": ([None, "cut off", None], 2),  # the second round asks for the scores alone
        "row-3": (["not scored", "cut off", "not scored"], None),
    }
    assert scoring == {0: 2, 1: 1, 2: 2, 3: 2} and len(server.requests) == 6 + 6 + 3 + 3 + 7
    errors = capsys.readouterr().err
    assert "row-1: no candidate is left of 6: 4 repeated, 1 leak by score, 1 cut off" in errors
    assert "row-3: no candidate is left of 3: 2 not scored, 1 cut off" in errors


def test_extraction_takes_thoughts_as_a_source_of_strategies_and_of_nothing_else(tmp_path, capsys):
    """They hold every number that was tried: with them each candidate would leak, and the scorer judge what nobody wrote."""
    tried = "Is it 3? No. 7 times 9 is 63, no."
    data, out = extraction_data(tmp_path, 1), tmp_path / "out.jsonl"
    row = json.loads(data.read_text())
    whole = {"solution": f"<think>{tried}</think> {row['solution']}"}
    only = [row | {"id": f"only-{i}", "problem": f"What is {i}?", "solution": "<think>It is 60." + end}
            for i, end in enumerate(("", "</think> "))]  # fmt: skip
    data.write_text("".join(json.dumps(one) + "\n" for one in (row | whole, *only)))

    def script(handler, body, number):
        text = body["messages"][0]["content"]
        if "Score the" in text:
            return "1: 1 1 1 1"
        return "Problem type: sum\nStrategy: Join the 3 parts.\nSteps:\n(a) Add them in 7 or 9 moves."

    with ChatServer(script) as server:
        assert extract.main(extraction_flags(server.url, data, out, "--candidates", "1")) == extract.ROWS_FAILED
        asked = [json.loads(raw)["messages"][0]["content"] for raw, _, _ in server.requests]
    assert [tried in text for text in asked] == [True, False]
    assert [problem.strategy.strategy for problem in load_problems(out)] == ["Join the 3 parts."]
    errors = capsys.readouterr().err
    assert all(f"only-{i}: its solution is nothing but thoughts" in errors for i in (0, 1))
    extract.main(["--data", str(data), "--dry_run", "--show", "9", "--candidates", "1", "--out", str(out)])
    shown = capsys.readouterr().out
    assert shown.count(tried) == 1 and "only-0: its solution is nothing but thoughts" in shown  # as they are sent


def test_extraction_dry_run_sends_nothing(tmp_path, capsys, key):
    data, out = extraction_data(tmp_path, 3), tmp_path / "out.jsonl"
    with ChatServer(fake_model) as server:
        flags = extraction_flags(server.url, data, out, "--dry_run", "--show", "1", "--price_in", "1", "--price_out", "100")
        assert extract.main([*flags, "--max_tokens", "1000"]) == 0
        assert server.requests == []
    printed = capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["problems.jsonl"] and key not in printed
    solution = "The sum is \\boxed{60}."
    assert extraction_prompt("What is 20 + 40?", solution)[0]["content"] in printed and "What is 21 + 43?" not in printed
    # 3 rows of 5 candidates and one call that scores them; out 15 * (220 + 20), at most 2 rounds of 18 * 1000
    assert "3 rows, 18 requests" in printed and "and 3,600 out" in printed and "and 36,000 out, where every" in printed
    tokens = int(re.search(r"about ([\d,]+) tokens in", printed)[1].replace(",", ""))
    asked = len(extraction_prompt("What is 20 + 40?", solution)[0]["content"])
    assert tokens > 15 * (asked // 4 + 220)  # the scorer reads all five candidates
    assert f"at most about {2 * tokens:,} in and" in printed and "nothing was sent" in printed
    assert f"cost about {tokens / 1e6 + 0.36:.2f}, at most about {2 * tokens / 1e6 + 3.6:.2f}" in printed
    data = extraction_data(tmp_path, 2, solutions=False)  # up to 3 solutions a row as well
    assert extract.main([*extraction_flags("http://127.0.0.1:1", data, out), "--dry_run", "--max_tokens", "1000"]) == 0
    assert f"and {2 * (3 + 10 + 2) * 1000:,} out, where every" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, words",
    [
        (["--endpoint", "http://example.com/v1"], "would travel unencrypted"),
        (["--endpoint", "http://127.evil.com/v1"], "would travel unencrypted"),
        (["--endpoint", "https://me:pass@example.com/v1"], "holds a user name or password"),
        (["--endpoint", "ftp://example.com"], "expected http"),
        (["--endpoint", "example.com/v1"], "expected http"),
        (["--endpoint", "https://example.com/v1?key=1"], "expected http"),
        (["--local", "x"], "one of --endpoint and --local"),
        (["--candidates", "0"], "--candidates must be at least 1, got 0"),
        (["--top_p", "0"], "--top_p must be in (0, 1]"),
        (["--read_timeout", "0"], "--read_timeout must be above 0"),
        (["--temperature", "nan"], "--temperature must be at least 0"),
        (["--price_in", "1"], "the cost needs both"),
        (["--body", "[1]"], "--body must be a JSON object"),
        (["--body", '{"stream": true}'], "--body must be a JSON object"),
        (["--out", "/nowhere/x.jsonl"], "its folder does not exist"),
        (["--data", "/nowhere.jsonl"], "no such file"),
        (["--report", "/nowhere.jsonl"], "no such file"),
    ],
)
def test_extraction_checks_its_flags_first(tmp_path, monkeypatch, key, change, words):
    monkeypatch.setattr(extract, "post", None)  # nothing may be sent
    flags = extraction_flags("https://example.com/v1", extraction_data(tmp_path), tmp_path / "out.jsonl", *change)
    with pytest.raises(ValueError) as error:
        extract.main(flags)
    assert words in str(error.value) and "pass@" not in str(error.value) and key not in str(error.value)
    assert not (tmp_path / "out.jsonl.log.jsonl").exists()


def test_extraction_has_no_flag_for_the_key_and_knows_its_servers(monkeypatch, capsys):
    for flag in ("--key", "--api_key", "--key_en"):
        with pytest.raises(SystemExit):
            extract.main([flag, "sk-1"])
    assert "unrecognized arguments" in capsys.readouterr().err

    def server(url, *flags, **environment):
        args = extract.build_parser().parse_args(["--endpoint", url, *flags])
        return extract.make_server(args, environment)

    assert server("https://api.deepseek.com/").name == "https://api.deepseek.com:443/chat/completions"
    assert server("http://localhost:8000/v1/chat/completions", OPENAI_API_KEY="k").name.endswith(":8000/v1/chat/completions")
    assert server("http://[::1]:8000/v1", OPENAI_API_KEY="k").name == "http://[::1]:8000/v1/chat/completions"
    assert server("http://example.com/v1").key is None  # without a key there is nothing to lose
    assert server("http://example.com/v1", "--allow_http", OPENAI_API_KEY="k").key == "k"
    assert server("https://h/v1", "--key_env", "MINE", MINE=" k\n", OPENAI_API_KEY="other").key == "k"
    with pytest.raises(ValueError, match="no HTTP header can carry") as error:
        server("https://h/v1", OPENAI_API_KEY="a\r\nHost: evil")
    assert "evil" not in str(error.value)
    assert "secret" not in repr(server("https://h/v1", OPENAI_API_KEY="secret"))
    monkeypatch.setenv("https_proxy", "http://me:p%40ss@proxy:3128")
    through = extract._connection(server("https://h/v1"))
    assert (through.host, through.port, through._tunnel_host, through._tunnel_port) == ("proxy", 3128, "h", 443)
    assert through._tunnel_headers["Proxy-Authorization"] == "Basic bWU6cEBzcw=="  # printf 'me:p@ss' | base64
    assert extract._connection(server("http://127.0.0.1:1/v1")).host == "127.0.0.1"


def test_extraction_body_adds_and_removes_fields_and_keys_name_the_exact_request():
    settings = extract.Settings("m", 0.6, 0.0, 0.95, 100, 7, {"max_tokens": None, "max_completion_tokens": 9, "seed": None})
    assert extract.request_body(settings, "score", 2, auto_messages("p"))["temperature"] == 0.6  # greedy, it would be the same
    body = extract.request_body(settings, "score", 0, auto_messages("p"))
    assert body == {"model": "m", "messages": auto_messages("p"), "temperature": 0.0, "top_p": 0.95, "max_completion_tokens": 9}
    keys = {extract.request_key(body | change, step, index) for change in ({}, {"top_p": 0.9}, {"model": "n"}, {"messages": []})
            for step in ("score", "candidate") for index in (0, 1)}  # fmt: skip
    assert len(keys) == 16
    assert extract.request_key(dict(reversed(body.items())), "score", 0) == extract.request_key(body, "score", 0)


def test_extraction_by_our_own_sampler_batches_the_workers(monkeypatch):
    local = extract.LocalModel(str(TINY_BASE), "float32", "cpu", 8)
    problems = load_problems(ROOT / "data/tiny/test.jsonl")[:6]
    sizes, plain = [], rollout.generate

    def counting(model, prompts, **settings):
        sizes.append(len(prompts))
        return plain(model, prompts, **settings)

    monkeypatch.setattr(rollout, "generate", counting)
    settings = extract.Settings("tiny", 0.0, 0.0, 1.0, 32, 0, {})
    answers, gate = {}, threading.Barrier(6)

    def ask(problem):
        body = extract.request_body(settings, "solution", 0, guided_messages(problem.problem, problem.strategy))
        gate.wait()
        answers[problem.id] = local.ask(body, threading.Event(), None)

    threads = [threading.Thread(target=ask, args=(problem,)) for problem in problems]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(sizes) == 6 and len(sizes) < 6
    with MathWorker() as worker:  # greedy and guided, the tiny base is always right
        assert all(is_correct(answers[p.id].text, p.answer, worker) for p in problems)
    for problem in problems:
        prompt = encode_chat(local.tokenizer, guided_messages(problem.problem, problem.strategy))
        answer = answers[problem.id]
        assert answer.usage["prompt_tokens"] == len(prompt) and answer.finish == "stop"
        assert 0 < answer.usage["completion_tokens"] <= 32
    with pytest.raises(extract.RowFailed, match="fills the context"):
        local.ask({"messages": auto_messages("add " * 2000), "temperature": 0.0}, threading.Event(), None)


def test_extraction_by_our_own_sampler_runs_from_the_command_line(tmp_path, capsys):
    data, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    with data.open("w") as stream:
        for line in (ROOT / "data/tiny/test.jsonl").read_text().splitlines()[:2]:
            row = json.loads(line)
            stream.write(json.dumps({name: row[name] for name in ("id", "problem", "answer")}) + "\n")
    flags = ["--data", str(data), "--local", str(TINY_BASE), "--out", str(out), "--dtype", "float32", "--quiet"]
    # The tiny base knows no other prompts than its own: its rows must fail one by one, with their reasons.
    assert extract.main([*flags, "--device", "cpu", "--max_tokens", "16"]) == extract.ROWS_FAILED
    assert capsys.readouterr().err.count("failed: ") == 2
    assert journal_records(out, "run")[0]["endpoint"] == f"local: {TINY_BASE}"


# ---------------------------------------------------------------------------------------------------- grader and evaluation


@pytest.fixture(scope="module")
def eval_worker():
    with MathWorker(timeout_s=10.0) as worker:
        yield worker


# (reference, prediction), grouped by what they are about. Each verdict was decided by hand before it was run.
EVAL_SAME = [
    # integers, decimals, separators, signs
    ("42", "42"), ("45", "045"), ("4", "4.0"), ("4", "4."), ("-7", "−7"), ("1234", "1,234"), ("10,\\!080", "10080"),
    ("11,\\! 111,\\! 111,\\! 100", "11111111100"), ("23{,}000", "23000"), (".0000672", "0.0000672"), ("+2", "2"),
    ("1000000", "1\\,000\\,000"), ("0", "-0"), ("12345678901234567890123", "12345678901234567890123.0"),
    # fractions, mixed and repeating numbers, powers of ten
    ("\\frac{14}{3}", "\\dfrac{14}{3}"), ("\\frac43", "4/3"), ("\\frac 59", "\\tfrac{5}{9}"), ("\\frac9{19}", "9/19"),
    ("\\frac{1}{2}", "0.5"), ("0.5", "\\frac12"), ("-\\frac{1}{2}", "\\frac{-1}{2}"), ("-1./3", "-\\frac{1}{3}"),
    ("\\frac{639}{40}", "15\\frac{39}{40}"), ("1\\frac{4}{5}", "1.8"), ("2.5", "2 1/2"), ("\\frac{2}{4}", "1/2"),
    ("4.5e33", "4.5 \\times 10^{33}"), ("3e8", "300000000"),
    ("0.00025", "2.5 \\cdot 10^{-4}"),
    # percent
    ("50\\%", "50"), ("50\\%", "50%"), ("50\\%", "0.5"), ("50\\%", "\\frac{1}{2}"), ("50", "50\\%"), ("0.5", "50%"),
    ("17.5%", "17.5"), ("$8 \\%$", "8 percent"), ("8\\%", "8\\text{ percent}"),
    # money and units
    ("\\$18.90", "18.90"), ("36", "$36"), ("36", "\\$36"), ("\\$32,\\!348", "32348"), ("5", "5 dollars"),
    ("\\$5", "5 dollars"),
    ("10\\text{ cm}", "10"), ("10", "10 cm"), ("10", "10\\,\\text{cm}"), ("10", "10 \\mathrm{~cm}"),
    ("16", "16 apples"),
    ("15\\mbox{ cm}^2", "15"), ("64", "64 square units"),
    ("5.4 \\text{ cents}", "5.4"),
    ("6\\frac{1}{6}\\text{ feet}", "\\frac{37}{6}"), ("14 \\text{ right triangles}", "14"),
    ("12\\sqrt{13}\\text{ feet}", "12\\sqrt{13}"), ("3", "3 km/hr"),
    ("55", "55 miles per hour"), ("0.16", "0.16 liters of water"),
    ("\\sqrt{65}", "√65"),
    ("1 + i \\sqrt{3}", "1+i√3"), ("6", "6 years old"), ("\\frac13", "1/3 (≈ 0.333)"),
    ("\\frac{x+5}{6}", "h^{-1}(x)=\\frac{x+5}{6}"),
    # degrees
    ("90^\\circ", "90"), ("90", "90^{\\circ}"), ("90^\\circ", "90°"), ("140\\text{ degrees}", "140^\\circ"),
    ("(45^{\\circ}, 60^{\\circ})", "(45, 60)"),
    # number bases
    ("52_8", "52"), ("4210_{5}", "4210_5"), ("\\text{A5}_{11}", "A5_{11}"),
    # intervals and unions
    ("(3,4]", "\\left(3, 4\\right]"), ("x \\in [-2,7]", "[-2, 7]"), ("[-2,7]", "x\\in[-2,7]"),
    ("(2,\\infty)", "(2, +\\infty)"),
    ("(0,9) \\cup (9,36)", "(9,36)\\cup(0,9)"),
    ("k \\geqslant 2", "k \\ge 2"),
    ("\\left(\\frac{3}{5},\\frac{8}{3}\\right]", "(0.6, 8/3]"),
    # tuples, sets, lists
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\pi/2)"), ("(1,-16,-4,43)", "(1, -16, -4, 43)"),
    ("3, 5, 7", "7, 3, 5"),
    ("\\{1,2\\}", "2, 1"), ("1,-2", "-2 \\text{ or } 1"), ("1,-2", "x = 1, x = -2"), ("1,-2", "x=1 \\text{ and } x=-2"),
    ("$(6,3),(9,3)$", "(9,3), (6,3)"), ("$69$,$84$", "84, 69"), ("2, 3, \\text{ and } 4", "2,3,4"),
    ("\\{5\\}", "5"), ("2400, 1350, 864", "864, 1350, 2400"),
    # words and letters
    ("\\text{Evelyn}", "Evelyn"), ("\\text{Evelyn}", "evelyn."), ("\\text{(C)}", "C"), ("C", "(C)"),
    ("(\\text{H})", "H"),
    ("\\text{(E)},", "E"), ("\\text{No}", "no"), ("\\text{two lines}", "two lines"), ("\\text{A, B}", "A,B"),
    ("\\text{October 30}", "October 30"),
    # matrices
    ("\\begin{pmatrix} -1/3 \\\\ 2/3 \\end{pmatrix}", "\\begin{bmatrix} -\\frac{1}{3} \\\\ \\frac23 \\end{bmatrix}"),
    ("\\begin{pmatrix} 1 & 0 \\\\ 0 & 3 \\end{pmatrix}", "\\begin{pmatrix}1&0\\\\0&3\\end{pmatrix}"),
    # expressions
    ("3\\sqrt{13}", "\\sqrt{117}"), ("11\\sqrt2", "11\\sqrt{2}"), ("\\frac{\\sqrt{3}}{3}", "\\frac{1}{\\sqrt{3}}"),
    ("2\\sqrt{5}", "2√5"), ("3\\sqrt{2}", "3sqrt(2)"), ("2k+2", "2(k+1)"), ("(a+5)(b+2)", "ab+2a+5b+10"),
    ("p - q", "-q+p"),
    ("6 - 5i", "-5i+6"), ("\\cot x", "\\frac{\\cos x}{\\sin x}"), ("$\\binom{2n}{n}$", "\\frac{(2n)!}{(n!)^2}"),
    ("18+2\\pi", "2(9+\\pi)"), ("1024", "2^{10}"), ("4", "\\sqrt{16}"),
    ("$\\frac{n(n+1)}{2}$", "\\frac{n^2+n}{2}"), ("5r^5", "5r^{5}"), ("$2^{1009}$", "2 \\cdot 2^{1008}"), ("xy", "yx"),
    # equations
    ("x=5", "5"), ("5", "x = 5"), ("x=5", "x=5.0"), ("$f(x)=2 x$", "f(x) = 2x"), ("2x", "f(x)=2x"),
    ("y = 2x + 3", "2x+3"),
    ("0.5", "\\frac12 = 0.5"),
    ("7", "x = 3 + 4 = 7"), ("\\frac{20000}{\\pi}", "\\frac{20000}{\\pi} \\approx 6366.2"), ("0.56 = 56\\%", "0.56"),
    ("(3,4)", "(x, y) = (3, 4)"),
    # punctuation and delimiters
    ("17", "17."), ("17", "$17$"), ("17", "\\(17\\)"), ("17", "\\boxed{17}"), ("240\\text{ ways.}", "240"),
    ("\\boxed{204}", "204"),
]  # fmt: skip

EVAL_DIFFERENT = [
    # numbers: exact
    ("42", "43"), ("7", "-7"), ("\\frac{1}{3}", "0.333333"), ("7", "6.9999999"), ("1234", "1.234"), ("12", "1 2"),
    ("0.000000001", "0.000000002"), ("1e-10", "0"), ("3", "3.14"), ("\\frac{3}{2}", "1\\frac{3}{2}"), ("100", "10^3"),
    ("12345678901234567890123", "12345678901234567890124"), ("0.16", "0.1\\overline{6}"), ("5", "\\frac{5}{0}"),
    ("0", "\\frac{1}{0}"),
    # what math-verify reads wrongly
    ("5", "2(3)"), ("5", "2 3"), ("5", "(2)(3)"), ("0", "10 000"), ("\\frac{7}{2}", "2\\frac{3}{2}"), ("n", "N"),
    ("\\frac{n}{2}", "\\frac{N}{2}"),
    ("x", "x'"), ("0", "\\text{not } 0"), ("0", "n o t 0"), ("6m", "6"),
    ("\\frac{1}{\\sqrt{2}}c", "\\frac{1}{\\sqrt{2}}"),
    ("10^{-20}\\pi", "10^{-21}\\pi"), ("7", "8=7"), ("7", "\\boxed{8}=7"), ("\\frac{1}{2} ", "1:2:3"),
    ("E_{1}", "E_{2}"),
    # several answers, hedging
    ("3", "3 or 4"), ("3", "3, 4"), ("3", "3 \\text{ or } 4"), ("3", "\\{3, 4\\}"), ("3", "3; 4"),
    ("3", "$3$ or $4$"), ("3", "3, 3"),
    ("3, 4", "3"), ("3, 4", "3, 4, 5"), ("-2,-2", "-2"), ("3", "\\pm 3"), ("3", "3 (or 4)"), ("1,-2", "1,2"),
    ("3", "3 or more"), ("3", "3/4"),
    ("3", "3 \\neq 4"), ("3", "2 < x < 4"), ("3", "x > 3"), ("3", "\\ge 3"), ("3", "about 3"), ("3", "not 3"),
    ("3", "3 \\text{ if } x>0, 4"),
    ("7", "x=8=7"), ("7", "7 = 8"), ("7", "8 \\approx 7"), ("3", "-3 \\text{ or } 3"), ("[1,5]", "1, 2, 3, 4, 5"),
    ("2", "1, 2, 3"),
    # percent, units, multiples
    ("50\\%", "5"), ("0.5", "0.5%"), ("50", "0.5"), ("50%", "0.5%"), ("1", "1%"),
    ("5 \\text{ cents}", "5 \\text{ dollars}"), ("\\$5", "5 cents"),
    ("5", "5 million"), ("5", "5 thousand dollars"), ("5", "5 dozen"), ("12\\text{ cm}", "12\\text{ km}"),
    ("30^\\circ", "30\\text{ radians}"),
    ("5\\sqrt{6}", "√65"), ("30", "5√6"), ("5", "5–6"), ("3", "3 tenths"), ("65m", "65"),
    ("5", "5\\text{ out of 6}"),
    ("2\\pi", "2\\pi mm"), ("2abc", "2"), ("5", "5x"), ("5x", "5"), ("2", "2m"), ("10", "10 minus two"),
    ("3", "3\\sqrt{2}"),
    ("3", "3 squared"), ("4", "4!"),
    # number bases
    ("52", "52_8"), ("52_8", "52_9"), ("42", "52_8"), ("52_8", "42"), ("52_8", "528"),
    # brackets, order, shape
    ("(1,2)", "[1,2]"), ("(3,4]", "(3,4)"), ("(-\\infty, 0]", "(-\\infty, 0)"), ("(1,2)", "(2,1)"),
    ("(1,2)", "\\{1,2\\}"), ("(2,4)", "2, 4"),
    ("1,-2", "(1,-2)"), ("(1,2,3)", "(1,3,2)"), ("(1,2)", "(1,2,3)"), ("(1,2)", "12"),
    ("(5,\\infty)", "(-\\infty,5) \\cup (5,\\infty)"),
    ("(-\\infty, 2) \\cup (3, \\infty)", "(-\\infty, 2] \\cup [3, \\infty)"), ("\\{1,2\\}", "\\{1,3\\}"),
    ("(1,2),(3,4)", "(1,3),(2,4)"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 1 & 2 \\end{pmatrix}"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 2 \\\\ 1 \\end{pmatrix}"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "3"),
    ("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", "\\begin{pmatrix} 1 & 2 & 3 & 4 \\end{pmatrix}"),
    # words and letters
    ("\\text{Evelyn}", "Angela"), ("\\text{(C)}", "B"), ("\\text{(C)}", "(C) or (D)"), ("\\text{ABCD}", "CBAD"),
    ("CBAD", "ABCD"), ("\\text{B, A}", "A, B"),
    ("\\text{even}", "\\text{odd}"), ("\\text{east}", "seat"), ("\\text{Yes}", "No"), ("\\text{Monday}", "5"),
    ("5", "Monday"),
    ("8:34 \\text{ p.m.}", "8:34 a.m."), ("3:4", "4:3"), ("\\sqrt{53}", "ANSWER"), ("SRAC=LRAC", "LRAC"),
    ("\\text{neither}", "either"),
    # expressions
    ("\\sqrt{2}", "1.41"), ("2\\pi", "6.28"), ("x^2", "x"), ("2n", "2k"), ("p - q", "q - p"), ("1+2i", "1-2i"),
    ("\\frac{x}{2}", "\\frac{2}{x}"),
    ("\\ln 2", "\\log 2"), ("\\lfloor n/2 \\rfloor", "n/2"), ("3\\sqrt{13}", "\\sqrt{39}"), ("2^n", "n^2"),
    ("x^2+1", "x^2-1"), ("\\infty", "-\\infty"),
    ("\\frac{1}{0}", "\\infty"), ("5", "\\infty"), ("5", "nan"), ("0", "\\text{NaN}"), ("0", "\\infty - \\infty"),
    ("5", "\\text{None}"), ("1", "\\infty^0"),
    ("\\sin 30^\\circ", "\\sin 30"), ("1+\\sqrt{3}", "1-\\sqrt{3}"), ("\\pi", "3.14"), ("\\frac{a}{b}", "\\frac{A}{B}"),
    # equations and inequalities: the problem's own statement is no answer
    ("x=5", "3x+2=17"), ("x=5", "y=5"), ("x=5", "x=6"), ("5", "x+y=5"), ("5x - 7y = 0", "0"), ("y=2x+3", "y=3x+2"),
    ("y=2x+3", "0=0"), ("y=2x+3", "y=y"),
    ("x > 3", "2x+1 > 7"), ("x > 3", "x \\ge 3"), ("x > 3", "x < 3"), ("x > 3", "3"), ("k=3", "k"),
    ("f(x)=x", "x=x"), ("5", "5=x=6"), ("5", "x"),
    ("a < b \\le c < d", "a < b < c \\le d"), ("1 < x", "x > 2"),
    # doubt: other powers of a unit, products, a union is no list, signs that the parser would skip
    ("5\\text{ cm}^2", "5\\text{ cm}^3"), ("5", "5 xy"), ("20\\text{ square units}", "20^\\circ"), ("x", "x⁹"),
    ("(0,9) \\cup (9,36)", "(0,9), (9,36)"), ("\\pi", "3.14159265358"), ("\\frac{800}{3}", "800\\frac{}{3}"),
    ("1, 1, 2", "1, 2, 2"), ("2n", "2N"), ("\\text{Amy}, \\text{Bob}", "\\text{Bob}, \\text{Amy}"), ("4", "4 _8"),
    ("4", "(4)_8"), ("x+1", "(" * 20 + "x+1" + ")" * 20),
    # broken
    ("5", ""), ("5", "\\frac{5}{"), ("5", "}5{"), ("5", "5" * 1001), ("5", "(5"), ("5", "\\boxed{}"),
    ("\\frac{1}{2}", "\\frac{1}{2"), ("5", "="), ("5", "{}"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "prediction"), EVAL_SAME)
def test_grader_accepts(answer, prediction, eval_worker):
    assert same_answer(prediction, answer, eval_worker)
    assert is_correct(f"So we get \\boxed{{{prediction}}}.", answer, eval_worker)


@pytest.mark.parametrize(("answer", "prediction"), EVAL_DIFFERENT)
def test_grader_rejects(answer, prediction, eval_worker):
    assert not same_answer(prediction, answer, eval_worker)
    assert eval_worker.timeouts == 0


EVAL_NUMBERS = [
    ("-7", (-7, 1)), ("1,234.5", (2469, 2)), ("-\\frac{1}{-4}", (1, 4)), ("-2\\frac{1}{2}", (-5, 2)),
    ("3 1/4", (13, 4)),
    ("-2.5 \\times 10^{-2}", (-1, 40)), ("1e3", (1000, 1)),
    (".5", (1, 2)),
    ("1,23", None), ("0,123", None), ("2\\frac{3}{2}", None), ("\\frac{1}{0}", None), ("1 2", None), ("1.2.3", None),
    ("", None), ("-", None), ("٣", None), ("x", None), ("1e9999", None), ("nan", None), ("inf", None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), EVAL_NUMBERS)
def test_plain_numbers_by_hand(text, value):
    assert grader._number(text) == (value and Fraction(*value))


def test_grader_tables_hold_enough_and_no_pair_twice():
    assert len(EVAL_SAME) >= 100 and len(EVAL_DIFFERENT) >= 100
    pairs = EVAL_SAME + EVAL_DIFFERENT
    assert len(set(pairs)) == len(pairs)


# ------------------------------------------------------------------------------------------------ extraction

EVAL_EXTRACTED = [
    ("so \\boxed{42}.", "42"), ("\\boxed{1} then \\boxed{2}", "2"), ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
    ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"), ("\\boxed {7}", "7"), ("\\boxed 7 apples", "7"), ("$\\boxed{ 7 }$", "7"),
    ("\\boxed{3} or \\boxed{4", "3"), ("\\boxed{4", None), ("\\boxed{\\frac{1}{2}", None), ("\\fbox{7}", None),
    ("\\boxed{}", None),
    ("\\boxed{7}, as asked, in \\boxed{}", "7"), ("\\boxed{2 + \\boxed{3}}", "2 + \\boxed{3}"), ("} \\boxed{5} {", "5"),
    ("\\boxed{1\n+1}", "1\n+1"), ("\\boxed{a \\\\}", "a \\\\"), ("boxed{7}", None),
    ("She has 18.\n#### 18", "18"), ("#### 1\n#### 1,200", "1,200"), ("#### $5", "$5"), ("#### -3\n", "-3"),
    ("#### Step 2: solve for x and y now", None), ("#### Conclusion\nThe final answer is 42.", "42"),
    ("\\boxed{3}\n#### 4", "3"), ("#### 4\nAnswer: 5", "4"),
    ("The final answer is 42.", "42"), ("The final answer is: $\\frac{1}{2}$.", "\\frac{1}{2}"), ("Answer: x", "x"),
    ("**Answer:** 3.5 m", "3.5 m"), ("**Final Answer:**\n42", "42"), ("The answer is \\(x+1\\). Good.", "x+1"),
    ("The answer to the problem is 12. Check: 12.", "12"), ("the answer is 3. No, the answer is 4.", "4"),
    ("Answer: $3$ or $4$", "$3$ or $4$"), ("The answer is $5", "$5"), ("", None), ("I do not know.", None),
    ("42", None),
    # thoughts: behind the last </think> first, else the whole text's last box, as verl and LUFFY do
    ("<think>\\boxed{1}</think> \\boxed{2}", "2"), ("<think>\\boxed{1}</think> The answer is 2.", "2"),
    ("<think>\\boxed{1}</think> Done.", "1"), ("<think>first \\boxed{1}, then", "1"),
    ("a</think>\\boxed{1}</think>", "1"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), EVAL_EXTRACTED)
def test_extract_answer(text, expected):
    assert extract_answer(text) == expected


def test_only_the_extracted_answer_is_graded(eval_worker):
    assert not is_correct("\\boxed{7} is wrong, it is \\boxed{8}", "7", eval_worker)  # math-verify: {7, 8}
    assert not is_correct("\\boxed{3} and \\boxed{4}", "3, 4", eval_worker)
    assert not is_correct("The value 7 is plausible.", "7", eval_worker)
    assert is_correct("Some text with 8.\n#### 7 apples", "7", eval_worker)


def test_extraction_is_linear_in_degenerate_text():
    texts = ["\\boxed{" * 10_000, "{" * 50_000, "\n" * 50_000]
    texts += ["answer is " * 8_000, "answer" + " " * 50_000, "#### " * 9_000]
    start = time.perf_counter()
    assert [extract_answer(text) for text in texts[:3]] == [None] * 3
    for text in texts:
        extract_answer(text)
    assert time.perf_counter() - start < 2.0


# ------------------------------------------------------------------------------------------------ the child process


def test_plain_numbers_never_start_the_child_and_are_fast():
    worker = MathWorker()
    pairs = [("42", "42"), ("1,234.50", "1234.5"), ("7", "8"), ("\\frac12", "0.5"), ("50\\%", "50")]
    pairs += [("\\text{Evelyn}", "Evelyn")]
    assert [same_answer(p, g, worker) for g, p in pairs] == [True, True, False, True, True, True]
    assert worker._process is None
    best = min(_eval_time(lambda: same_answer("42", "43", worker), 2000) for _ in range(5))
    assert best < 50e-6


def _eval_time(call, repeats):
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def test_power_tower_ends_at_the_time_limit_and_counts():
    with MathWorker(timeout_s=1.0) as worker:
        assert same_answer("\\sqrt{16}", "4", worker)  # the child is up: its start is not on the clock
        start = time.perf_counter()
        assert not is_correct("\\boxed{9^{9^{9^{9}}}}", "387420489", worker)
        assert time.perf_counter() - start < 10
        assert worker.timeouts == 1
        assert same_answer("\\sqrt{16}", "4", worker)  # a new child answers
        assert worker.timeouts == 1


def test_a_list_of_power_towers_costs_one_limit_only():
    with MathWorker(timeout_s=1.0) as worker:
        tower = "9^{9^{9^{9}}}"
        assert not same_answer(", ".join([tower] * 6), "1, 2, 3, 4, 5, 6", worker)
        assert worker.timeouts == 1


def test_killed_child_is_replaced():
    with MathWorker() as worker:
        assert same_answer("\\sqrt{16}", "4", worker)
        process = worker._process
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert same_answer("\\sqrt{16}", "4", worker)  # it died idle: nothing is lost
        assert worker._process.pid != process.pid and worker.timeouts == 0
        os.kill(worker._process.pid, signal.SIGSTOP)  # alive but silent: lost at the limit
        worker.timeout_s = 0.3
        assert not same_answer("\\sqrt{16}", "4", worker)
        assert worker.timeouts == 1


def test_a_signal_to_the_whole_group_leaves_the_child_to_its_parent():
    with MathWorker() as worker:
        assert same_answer("\\sqrt{16}", "4", worker)
        for number in (signal.SIGTERM, signal.SIGINT):
            worker._process.send_signal(number)
        assert same_answer("\\sqrt{25}", "5", worker) and worker.timeouts == 0


def test_child_has_a_memory_limit():
    with MathWorker(timeout_s=20.0, memory_bytes=600 * 1024**2) as worker:
        assert same_answer("\\sqrt{16}", "4", worker)
        limits = Path(f"/proc/{worker._process.pid}/limits")
        if not limits.is_file():
            pytest.skip("no /proc")
        line = next(row for row in limits.read_text().splitlines() if row.startswith("Max address space"))
        assert line.split()[3] == str(600 * 1024**2)


def test_close_ends_the_child_and_a_child_that_cannot_start_is_an_error(monkeypatch, capfd):
    with MathWorker() as worker:
        same_answer("\\sqrt{16}", "4", worker)
        process = worker._process
    assert process.poll() is not None
    monkeypatch.setattr(grader.inspect, "getsource", lambda function: "import no_such_module_at_all")
    with MathWorker() as worker, pytest.raises(RuntimeError, match="did not start"):
        same_answer("\\sqrt{16}", "4", worker)
    assert "no_such_module_at_all" in capfd.readouterr().err


def test_caller_keeps_its_alarm(eval_worker):
    # math-verify in the caller's process would replace the handler and cancel the alarm
    handler = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.alarm(100)
    assert same_answer("\\sqrt{16}", "4", eval_worker)
    assert signal.alarm(0) > 90 and signal.signal(signal.SIGALRM, handler) is signal.SIG_IGN


# ------------------------------------------------------------------------------------------------ problem files


def _eval_file(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def _eval_row(i=1, **changes):
    row = {"id": f"r{i}", "problem": f"What is {i} + 0?", "answer": str(i)} | changes
    return {key: value for key, value in row.items() if value is not ...}


def test_load_problems(tmp_path, eval_worker):
    strategy = {"type": "sum", "strategy": "Add.", "steps": ["Add them."]}
    rows = [_eval_row(1, solution="1", strategy=strategy), _eval_row(2, answer=" $\\boxed{045}$ ")]
    rows.append(_eval_row(3, answer="\\(x+1\\)"))
    first, second, third = load_problems(_eval_file(tmp_path, *rows), eval_worker)
    assert (first.id, first.problem, first.answer, first.solution) == ("r1", "What is 1 + 0?", "1", "1")
    assert first.strategy == Strategy("sum", "Add.", ("Add them.",))
    assert (second.answer, second.solution, second.strategy, third.answer) == ("045", None, None, "x+1")


EVAL_BAD_ROWS = [
    ("{", "not a line of JSON"), ("", "not a line of JSON"), ("[1]", "expected an object, [1]"),
    ('"a"', "expected an object"),
    ('{"id": "a", "id": "b", "problem": "p", "answer": "1"}', "a field is given twice"),
    (_eval_row(id=...), "field 'id' is missing"), (_eval_row(problem=...), "field 'problem' is missing"),
    (_eval_row(answer=...), "field 'answer' is missing"), (_eval_row(id=7), "field 'id' must be a non-empty string, 7"),
    (_eval_row(answer=7), "field 'answer' must be a non-empty string, 7"),
    (_eval_row(problem=" "), "field 'problem' must be"),
    (_eval_row(answer=""), "field 'answer' must be a non-empty string, ''"),
    (_eval_row(answer=None), "field 'answer' must be"),
    (_eval_row(solution=""), "field 'solution' must be"), (_eval_row(solution=None), "field 'solution' must be"),
    (_eval_row(level=5), "unknown field 'level', 5"), (_eval_row(strategy="add"), "strategy: expected an object"),
    (_eval_row(strategy={"type": "t", "strategy": "s", "steps": []}), "steps"),
    (_eval_row(strategy={"type": "t", "strategy": "s"}), "strategy field 'steps': missing"),
    (_eval_row(strategy=None), "strategy"),
    (_eval_row(answer="\\frac{1}{"), "field 'answer' has unbalanced brackets, '\\\\frac{1}{'"),
    (_eval_row(answer="$$"), "field 'answer'"),
    (_eval_row(answer="(1, 2"), "unbalanced"), (_eval_row(answer="\\boxed{}"), "field 'answer'"),
    (_eval_row(answer="3 +"), "cannot be read"),
    (_eval_row(answer="see solution above, it follows from the lemma and then so on"), "field 'answer' is prose"),
    (_eval_row(answer="1" * 1001), "has 1001 characters, more than 1000"),
    (_eval_row(answer="\\frac{1}{}"), "cannot be read"),
    (_eval_row(3, id="r2"), "duplicate id, line 1 has it too, 'r2'"),
    (_eval_row(3, problem="What is  2 + 0?"), "same problem as line 1 but answer '3', not '2'"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), EVAL_BAD_ROWS)
def test_load_problems_names_line_and_value(row, message, tmp_path, eval_worker):
    path = _eval_file(tmp_path, _eval_row(2), row, _eval_row(4))
    with pytest.raises(ValueError) as error:
        load_problems(path, eval_worker)
    assert str(error.value).startswith(f"{path}:2: ") and message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_load_problems_reports_twenty_errors_at_once(tmp_path, eval_worker):
    path = _eval_file(tmp_path, _eval_row(0), *[_eval_row(i, answer="") for i in range(1, 26)])
    with pytest.raises(ValueError) as error:
        load_problems(path, eval_worker)
    lines = str(error.value).splitlines()
    assert [line.split(": ")[0] for line in lines[:20]] == [f"{path}:{i}" for i in range(2, 22)]
    assert lines[20:] == ["... and 5 more"]


def test_load_problems_drops_repeated_rows(tmp_path, eval_worker, capsys):
    rows = [_eval_row(1), _eval_row(2), _eval_row(1)]
    rows.append(_eval_row(1, id="again", answer="1.0", problem=" What is 1 + 0? "))
    path = _eval_file(tmp_path, *rows)
    assert [p.id for p in load_problems(path, eval_worker)] == ["r1", "r2"]
    assert capsys.readouterr().out == f"{path}: dropped 2 rows that repeat an earlier problem and its answer\n"


def test_load_problems_needs_a_file_with_rows(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "\xe9"}')
    expected = {"empty.jsonl": "no rows", "": "a folder", "none": "no such file", "latin.jsonl": "not a line of JSON"}
    for path, message in expected.items():
        with pytest.raises(ValueError, match=message):
            load_problems(tmp_path / path)


def test_load_problems_accepts_every_answer_of_the_real_data_sets(real_data, eval_worker):
    answers, field = {}, {"gsm8k": "answer", "math": "answer", "mawps": "target", "svamp": "Answer"}
    for source in prepare.SOURCES:
        if source.repo == prepare.UNIFY:
            answers[source.command] = [row["answer"] for row in json.loads(real_data[source.sha256].read_text())]
        elif source.command in field:
            rows = [json.loads(row) for row in real_data[source.sha256].open()]
            answers[source.command, source.part] = [str(row[field[source.command]]).split("####")[-1] for row in rows]
    rejected = {}
    for name, group in answers.items():
        group = sorted(set(group))  # thousands repeat
        rejected[name] = [x for x in group if grader.why_unusable(grader.normalise_answer(x))]
        assert all(is_correct(f"\\boxed{{{x}}}", grader.normalise_answer(x), eval_worker) for x in group if x)
    # two rows of MATH have an empty answer; nothing else is refused
    assert {name: bad for name, bad in rejected.items() if bad} == {("math", "train"): [""]}
    assert len(answers) == 13 and eval_worker.timeouts == 0


# ------------------------------------------------------------------------------------------------ accuracy


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


# ------------------------------------------------------------------------------------------------ command line


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


# ------------------------------------------------------------------------------------------------ hostile answers

# (reference, answers that are wrong or none): by hand, and all of another value than the reference.
HOSTILE_GOLDS = {
    "7": ["8", "-7", "7.5", "77", "0.7", "7.0000001", "6.99999999999", "\\frac{1}{7}", "7^2", "7!", "\\sqrt{7}", "7i", "7x"],
    "-3": ["3", "-4", "-0.3", "-\\frac{1}{3}", "(-3)^2", "|-3|", "--3", "-3.001", "-33"],
    "0": ["1", "-1", "0.0001", "10^{-40}", "\\frac{1}{0}", "0!", "00.1", "\\text{none}"],
    "42": ["24", "4.2", "420", "4 2", "42.01", "4^2", "042.5", "-42", "4\\cdot 2"],
    "1000000": ["100000", "1,000,001", "10^{7}", "1.000000", "1,000", "1e5", "10^6+1"],
    "0.5": ["5", "0.05", "0.51", "\\frac{1}{5}", "0.5%", "-0.5", "0.5^2", ".05"],
    "3.14": ["\\pi", "3.1", "3.141", "314", "\\frac{22}{7}", "-3.14", "3,14"],
    "-2.75": ["2.75", "-2\\frac{1}{4}", "-2.7", "-\\frac{4}{11}", "-275", "\\frac{11}{4}"],
    "\\frac{1}{3}": ["0.333333", "3", "\\frac{3}{1}", "\\frac{1}{4}", "33%", "-\\frac{1}{3}", "\\frac{1}{3}3",
        "\\frac{11}{3}"],
    "-\\frac{7}{12}": ["\\frac{7}{12}", "-\\frac{12}{7}", "-0.5833", "-7", "\\frac{-7}{-12}", "-\\frac{7}{1}2"],
    "2\\frac{1}{2}": ["1", "2", "\\frac{1}{2}", "2\\frac{1}{3}", "22.5", "-2\\frac{1}{2}", "2 \\cdot \\frac{1}{2}"],
    "1.5 \\times 10^{-7}": ["1.5", "1.5 \\times 10^{7}", "15 \\times 10^{-7}", "0", "1.5 \\times 10^{-8}", "10^{-7}"],
    "\\sqrt{2}": ["1.41421356", "2", "\\sqrt{3}", "-\\sqrt{2}", "\\sqrt[3]{2}", "2^2", "\\sqrt{2}2", "\\sqrt{22}"],
    "3\\sqrt{13}": ["\\sqrt{39}", "13\\sqrt{3}", "3\\sqrt{12}", "10.8", "3+\\sqrt{13}", "\\sqrt{13}", "3\\sqrt{13}+10^{-30}"],
    "\\frac{1+\\sqrt{5}}{2}": ["\\frac{1-\\sqrt{5}}{2}", "1+\\frac{\\sqrt{5}}{2}", "1.618", "\\frac{1+\\sqrt{5}}{3}"],
    "2\\pi": ["\\pi", "6.28", "\\pi^2", "2", "2+\\pi", "-2\\pi", "2\\pi^2", "\\frac{2}{\\pi}"],
    "\\frac{\\pi}{6}": ["\\frac{6}{\\pi}", "\\frac{\\pi}{3}", "30", "0.5236", "\\pi", "\\sin \\frac{\\pi}{6}"],
    "e^2": ["e", "2e", "7.389", "e^{-2}", "2^e", "e^3"],
    "2^{100}": ["2^{101}", "2100", "100^2", "2^{10}0", "200", "1267650600228229401496703205375"],
    "1+2i": ["1-2i", "2+i", "-1-2i", "3i", "1+2", "1+2i^2", "1+i"],
    "x^2+1": ["x^2-1", "x^2", "x+1", "2x+1", "x^{21}", "(x+1)^2", "x^3+1", "y^2+1", "x^2+1.0001", "x^2+x"],
    "2x^3-5x+7": ["2x^3+5x+7", "2x^3-5x-7", "2x^3-5x", "x^3-5x+7", "2x^2-5x+7", "2x^3-5+7"],
    "(a+5)(b+2)": ["(a+5)+(b+2)", "ab+10", "(a+5)(b-2)", "ab+2a+5b", "(a+2)(b+5)", "a+5b+2"],
    "\\frac{n(n+1)}{2}": ["\\frac{n(n-1)}{2}", "n(n+1)", "\\frac{n+1}{2}", "\\frac{N(N+1)}{2}", "\\frac{n^2+1}{2}"],
    "(3,4]": ["(3,4)", "[3,4]", "[3,4)", "3,4", "(4,3]", "(3,5]", "3.4"],
    "[-2,7]": ["(-2,7)", "[2,7]", "[-2,7)", "-2,7", "[-7,2]", "5"],
    "(-\\infty,0)": ["(-\\infty,0]", "(0,\\infty)", "(\\infty,0)", "x<1", "(-\\infty,1)", "0"],
    "(0,9) \\cup (9,36)": ["(0,36)", "(0,9] \\cup [9,36)", "(0,9) \\cap (9,36)", "(0,9)", "(0,9),(9,36)"],
    "\\{1,2,3\\}": ["\\{1,2\\}", "\\{1,2,3,4\\}", "(1,2,3)", "123", "\\{1,2,4\\}", "[1,3]", "1,2,3,...", "6"],
    "3, 5, 7": ["3, 5", "3, 5, 7, 9", "357", "(3,5,7)", "3, 5, 8", "3, 5, 7, 7", "15"],
    "(1,-2)": ["(-2,1)", "(1,2)", "1,-2", "[1,-2]", "(1,-2,0)", "-1", "(1,-2.1)"],
    "(3,\\frac{\\pi}{2})": ["(3,\\pi)", "(\\frac{\\pi}{2},3)", "(3,90)", "(3,1.5708)", "(-3,\\frac{\\pi}{2})"],
    "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}": [
        "\\begin{pmatrix} 1 & 3 \\\\ 2 & 4 \\end{pmatrix}", "\\begin{pmatrix} 1 & 2 \\\\ 3 & 5 \\end{pmatrix}", "-2",
        "1,2,3,4", "\\begin{pmatrix} 1 \\\\ 2 \\\\ 3 \\\\ 4 \\end{pmatrix}",
        "\\begin{vmatrix} 1 & 2 \\\\ 3 & 4 \\end{vmatrix}",
    ],
    "\\begin{pmatrix} -1 \\\\ 2 \\end{pmatrix}": ["\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "(2,-1)", "-1"],
    "\\text{Monday}": ["Tuesday", "Mon", "\\text{Mondays and Tuesdays}", "1", "M", "\\text{not Monday}", "Sunday"],
    "\\text{even}": ["odd", "\\text{not even}", "\\text{uneven}", "\\text{seven}", "2", "e"],
    "\\text{Yes}": ["No", "Y", "\\text{Yes and no}", "1", "0", "\\text{eyes}"],
    "C": ["B", "D", "c+1", "(C)(D)", "CC", "ABCD", "3"],
    "\\text{(B)}": ["(A)", "\\text{(B) and (C)}", "A", "2", "b)c"],
    "10:30": ["10:31", "10.30", "1030", "10", "22:30", "30:10", "11:30"],
    "8:34 \\text{ p.m.}": ["8:34 a.m.", "8:35 p.m.", "20:34 p.m.", "8.34", "834"],
    "\\$18.90": ["18.9 \\text{ cents}", "\\$1890", "\\$18.09", "-18.90", "18.91", "€18.90"],
    "50\\%": ["5\\%", "0.05", "0.5\\%", "500\\%", "-50\\%", "51", "50\\% \\text{ of } 3"],
    "10\\text{ cm}": ["10\\text{ km}", "10\\text{ cm}^2", "100", "1\\text{ cm}", "10\\text{ mm}", "10 \\text{ thousand}"],
    "5\\text{ min}": ["5\\text{ s}", "5\\text{ hours}", "300", "5\\text{ m}", "50", "5\\text{ ms}"],
    "90^\\circ": ["9^\\circ", "-90^\\circ", "90\\text{ radians}", "91"],
    "x=5": ["y=5", "x=6", "x", "5=x=6", "x=-5", "3x+2=17", "x>5", "\\log(x)=5"],
    "y=2x+3": ["y=3x+2", "y=2x-3", "y=2x", "0=0", "y=y", "x=2x+3", "3"],
    "x>3": ["x<3", "x\\ge 3", "3", "x>4", "x=3", "3>x", "-x>3"],
    "52_8": ["52_9", "25_8", "43", "52.8", "528", "-52_8"],
    "3:4": ["4:3", "3:5", "7", "34", "3:4:5"],
}  # fmt: skip
HOSTILE_NUMBERS = ["7", "-3", "42", "1000000", "0.5", "3.14", "-2.75", "\\frac{1}{3}", "-\\frac{7}{12}", "\\sqrt{2}", "2\\pi"]

HOSTILE_CODE = [
    "__import__('os').system('touch CANARY')", "__import__(\"os\").popen('touch CANARY').read()",
    "open('CANARY','w').write('x')", "exec(\"open('CANARY','w')\")", "eval(compile(\"open('CANARY','w')\",'','exec'))",
    "(lambda: open('CANARY','w'))()",
    "[c for c in ().__class__.__base__.__subclasses__() if c.__name__=='Popen'][0](['touch','CANARY'])",
    "Symbol('x').__class__.__init__.__globals__['__builtins__']['open']('CANARY','w')", "sympify(\"open('CANARY','w')\")",
    "parse_expr(\"__import__('pathlib').Path('CANARY').touch()\")", "Integer(7).__class__(open('CANARY','w').write('7'))",
    "f\"{open('CANARY','w')}\"", "{open('CANARY','w')!r}", "os.execv('/usr/bin/touch',['touch','CANARY'])",
    "print(__import__('pathlib').Path('CANARY').write_text('x'))", "S(\"__import__('os').mkdir('CANARY')\")",
    "lambdify(x,'open(\"CANARY\",\"w\")')(7)", "\\input{|\"touch CANARY\"}", "\\write18{touch CANARY}", "$(touch CANARY)",
    "`touch CANARY`", "; touch CANARY #", "7; touch CANARY", "\\immediate\\write18{touch CANARY}", "\\openout1=CANARY",
    "\\catcode`\\{=12", "\\def\\a{\\a}\\a", "\\csname boxed\\endcsname{7}", "1 if True else 0", "7 if True else 8",
    "x.subs(x,7)", "7 .__add__(0)", "__builtins__", "globals()", "breakpoint()", "exit(0)", "quit()", "raise SystemExit",
    "os._exit(0)", "os.kill(os.getppid(),9)", "while True: pass", "import os; os.environ", "getattr(7,'__class__')",
    "7 or 8", "True", "type",
]  # fmt: skip
HOSTILE_FORMATS = [
    "%s%s%s%n", "%(answer)s", "{}", "{0}", "{answer}", "{0.__class__}", "{gold}", "{{7}}", "${7}", "#{7}", "<%= 7 %>",
    "{% 7 %}", '{"answer": 7}', '{"__class__": "os.system"}', "[7, 8]", '"7"', "null", "true",
    "cos\nsystem\n(S'touch CANARY'\ntR.",
    "\x80\x04\x95\x1f\x00\x00\x00\x8c\x05posix\x8c\x06system\x93\x8c\x0ctouch CANARY\x85R.", "gANjcG9zaXgKc3lzdGVtCg==",
    "!!python/object/apply:os.system ['touch CANARY']", "<script>7</script>", "<!ENTITY a SYSTEM 'file:///etc/passwd'>&a;",
    "'; DROP TABLE answers; --", "../../etc/passwd", "/dev/stdin", "file:///etc/passwd", "\r\n7\r\n8", "7\t8", "\x1b[2J7",
    "7\b8", "0x7", "0b111", "7e999999", "1_000", "7j", "07h", "7L", "７", "𝟟", "⑦", "Ⅶ", "七", "٧٧", "seven and a half",
    "\ufeff8",
]  # fmt: skip

# {G}: the reference, {W}: another answer. No line of these gives the reference as the one answer.
HOSTILE_HEDGES = [
    "{G} or {W}", "{G} \\text{ or } {W}", "{W} \\text{ or } {G}", "{G}, {W}", "{W}, {G}", "\\{{G}, {W}\\}", "({G}, {W})",
    "[{G}, {W}]", "{G}; {W}", "{G} \\ne {W}", "{G} \\neq {W}", "{W} \\not= {G}", "{G} = {W}", "{W} = {G}", "z = {W} = {G}",
    "{G} \\le z \\le {W}", "z \\ge {G}", "z < {G} + 1", "{G} \\to {W}", "{G} \\Rightarrow {W}", "{G} \\lor {W}",
    "{G} \\vee {W}", "{G} \\land {W}", "{G} \\mid {W}", "{G} | {W}", "{G} \\equiv {W}", "{G} \\sim {W}", "{G} \\pmod{1}",
    "{G} \\pmod {W}", "{G} \\pm {W}", "\\text{not } {G}", "\\text{the answer is } {G} \\text{ or } {W}",
    "{G} \\text{ or something else}", "{G} \\text{, no wait, } {W}", "{G} \\text{ wait, eight}", "{G}\\text{ isn't right}",
    "{G} \\text{ is wrong}", "{G} if z > 0 else {W}", "\\cancel{{G}} {W}", "\\cancel{{G}}", "\\sout{{G}}", "\\not {G}",
    "\\neg {G}", "{G} \\text{ if } z > 0 \\text{, else } {W}",
    "\\begin{cases} {G} & z > 0 \\\\ {W} & z \\le 0 \\end{cases}", "\\{{G}\\} \\cup \\{{W}\\}", "\\overline{{G}}{W}",
    "\\{z : z = {G} \\text{ or } z = {W}\\}", "f({G}, {W})", "{G} {W}", "{G} \\quad {W}", "{G} \\\\ {W}", "{G}, {G}",
    "{G} \\text{ and } {W}", "({W}) \\text{ or } ({G})", "\\underline{{G}} \\underline{{W}}", "({G} = {W})",
    "(({W} = {W} = {G}))", "z", "?", "*", "\\_", "\\text{any}", "\\text{all}", "\\text{everything}",
    "\\text{any real number}", "\\mathbb{R}", "(-\\infty, \\infty)", "z = z", "1 = 1", "0 = 0", "\\text{true}", "\\top",
    "answer", "\\text{answer}", "the answer", "the reference", "\\frac{0}{0}", "\\frac{1}{0}", "0 \\cdot \\infty",
    "\\infty - \\infty", "\\infty", "-\\infty", "\\tilde{\\infty}", "zoo", "oo", "nan", "NaN", "inf", "-inf", "None",
    "null", "", " ", "{}", "{ }", "\\emptyset", "\\varnothing", "\\text{}", "\\text{see above}", "...", "\\dots",
    "[-10^9, 10^9]", "\\{-1000, ..., 1000\\}", "\\forall z", "\\exists z", "\\sum_{k=0}^{\\infty} \\frac{z^k}{k!}",
    "\\int_{-\\infty}^{\\infty} e^{-z^2} dz", "\\lim_{z \\to \\infty} z", "\\text{cannot be determined}",
    "z \\in \\mathbb{R}",
]  # fmt: skip
HOSTILE_BOXES = [
    "\\boxed{{G}} and \\boxed{{W}}", "The answer is {G}. \\boxed{{W}}", "\\boxed{{W}} The answer is {G}.",
    "\\boxed{{W}}\n#### {G}", "\\boxed{{W}} \\boxed{{G}", "\\boxed{{G}", "\\boxed{\\frac{{G}}{1}", "\\fbox{{G}}",
    "\\boxed{\\boxed{{G}}, {W}}", "\\Boxed{{G}}", "\\boxed{{W} \\boxed{{G}}}", "\\boxed{\\boxed{{G}} {W}}",
    "<think>\\boxed{{G}}</think> \\boxed{{W}}", "\\\\boxed{{G}}", "boxed{{G}}",
    "<think>\\boxed{{G}}</think> The answer is {W}.", "#### {G}\n\\boxed{{W}}", "\\boxed{}", "\\boxed{ }", "\\boxed[{G}]",
    "\\boxed({G})", "\\newcommand{\\a}{\\boxed{{G}}} \\boxed{{W}}", "% \\boxed{{G}}\n\\boxed{{W}}",
    "\\boxed{{G}} is wrong: \\boxed{{W}}", "{G}", "It is {G}.", "\\boxed{{G} \\text{ or } \\boxed{{W}}}",
    "{\\boxed{{W}}} {\\fbox{{G}}}", "\\boxed{\\text{either } {G} \\text{ or } {W}}",
    "Answer: {G}\nAnswer: {W}\n\\boxed{{W}}", "\\boxed{\\{{G}\\}, \\{{W}\\}}",
    "\\boxed{\\begin{cases}{G}\\\\{W}\\end{cases}}",
]  # fmt: skip


def _hostile_fill(template, gold, wrong):
    return template.replace("{G}", gold).replace("{W}", wrong)


def _hostile_dress(rng, answer):
    """A response whose final answer is `answer`."""
    dresses = ["\\boxed{@}", "\\boxed { @ }", "\\boxed{$@$}", "\\boxed{\\(@\\)}", "So $\\boxed{@}$.", "Answer: @", "#### @"]
    dresses += ["The final answer is @.", "**Final answer:** $@$", "thus\n\\[\\boxed{\\displaystyle @}\\]"]
    return rng.choice(dresses).replace("@", answer)


def _hostile_pair(rng):
    gold = rng.choice(list(HOSTILE_GOLDS))
    return gold, rng.choice(HOSTILE_GOLDS[gold])


def hostile_unicode(rng):
    """Invisible and look-alike characters in a wrong answer; characters that change a right one; noise without a letter."""
    kind = rng.randrange(3)
    if kind == 0:
        gold, wrong = _hostile_pair(rng)
        digits = str.maketrans("0123456789", rng.choice(["0123456789", "０１２３４５６７８９", "٠١٢٣٤٥٦٧٨٩", "𝟘𝟙𝟚𝟛𝟜𝟝𝟞𝟟𝟠𝟡"]))
        letters = str.maketrans("aceopxyABCEHKMOTX", "асеорхуАВСЕНКМОТХ")  # Cyrillic
        text = list(wrong.translate(digits).translate(letters if rng.random() < 0.3 else {}))
        for _ in range(rng.randrange(1, 5)):  # zero-width, bidirectional marks, combining marks, controls, half a surrogate
            mark = rng.choice("\u200b\u200d\u2060\ufeff\u202e\u2066\u2069\u0301\u20dd\u0338\x00\x07\x1b\x7f\xad\ud800\udfff")
            text.insert(rng.randrange(len(text) + 1), mark)
        return gold, _hostile_dress(rng, "".join(text))
    if kind == 1:  # a power, a fraction, further digits, a strike: all of another value
        gold, tail = rng.choice(HOSTILE_NUMBERS), rng.choice("²³⁹ⁿ½⅓‰٣３①Ⅷ‱∞∅¿¬∼…")
        return gold, _hostile_dress(rng, gold + rng.choice(["", " ", "\u200b", "{}", "\x00"]) + tail)
    ranges = [(0x00, 0x2F), (0x80, 0x2FF), (0x300, 0x36F), (0x600, 0x6FF), (0x2000, 0x2BFF), (0xD800, 0xDFFF)]
    ranges.append((0xFF00, 0x10FFFF))
    points = (rng.randint(*rng.choice(ranges)) for _ in range(rng.choice([1, 5, 50, 900])))
    noise = "".join(map(chr, points))
    return rng.choice(list(HOSTILE_GOLDS)), rng.choice(["{}", "\\boxed{{{}}}", "#### {}", "The answer is {}"]).format(noise)


def hostile_latex(rng):
    """Broken, deep, huge or endless LaTeX. The reference is a number that no short formula gives."""
    gold, depth = "\\frac{918273645546372819}{918273645546372823}", rng.choice([2, 7, 9, 60, 400])
    digits = "".join(rng.choice("123456789") for _ in range(rng.choice([3, 30, 300, 990, 1100])))
    tokens = r"\frac { } {1} \sqrt ( ) [ ] + - \cdot ^2 _3 x 7 | \sum \int \lim \infty _{k=1}^{\infty} & \\ = < ,".split()
    tokens += ["\\left", "\\right", "\\begin{pmatrix}", "\\end{pmatrix}", "\\"]
    made = [
        "\\frac{1}{" * depth + "2" + "}" * depth, "\\frac{1}{" * depth, "{" * depth + "7" + "}" * depth,
        "(" * depth + "7" + ")" * depth, "\\sqrt{" * depth + "7" + "}" * depth, "\\left(" * depth,
        "\\boxed{" * depth + "7" + "}" * depth, "}" * depth + "7", digits, "7" * 100_000, f"\\frac{{{digits}}}{{7}}",
        f"{digits}!", f"7^{{{digits}}}", f"0.{digits}", f"-{digits}.{digits}", f"\\sqrt{{{digits}}}", "7!" + "!" * depth,
        f"\\sum_{{k=1}}^{{{digits}}} k!", "\\int_{-\\infty}^{\\infty} x^x dx", "\\prod_{k=1}^{\\infty} k",
        "\\lim_{x \\to 0} \\frac{1}{x}", "2^{" * depth, "x^{" * depth + "2" + "}" * depth, "\\\\" * depth, "$" * depth,
        "\\$" * depth + "7", "7" + "\\," * depth + "8",
        " ".join(rng.choice(tokens) for _ in range(rng.choice([5, 30, 200]))), "7" * depth + "=" * depth + "8",
        ",".join("7" * depth), "\\text{" * depth + "7" + "}" * depth, "\\begin{pmatrix}" * depth, "-" * depth + "7",
        "+".join("x" * depth), "7=" * depth + "7", "e^{i\\pi}" * depth, "\\binom{7}" * depth, "|" * depth + "7",
        "7" + "'" * depth, "\\frac" * depth + "7", "\\sqrt" * depth + "7",
    ]  # fmt: skip
    text = rng.choice(made)
    if text.startswith("x^{"):
        text = text.replace("2", "y")  # a tower of names has nothing to compute
    return gold, rng.choice(["\\boxed{@}", "The answer is @", "#### @", "@"]).replace("@", text)


def hostile_code(rng):
    gold, text = rng.choice([gold for gold in HOSTILE_GOLDS if gold != "7"]), rng.choice(HOSTILE_CODE)
    around = rng.choice(["@", "@", "(@)", "\\text{@}", "7+@", "\\frac{@}{1}", "x_{@}", "\\sqrt{@}"])
    return gold, _hostile_dress(rng, around.replace("@", text))


def hostile_format(rng):
    gold = rng.choice([gold for gold in HOSTILE_GOLDS if gold not in ("0", "7")])  # some of these do say 0 or 7
    return gold, _hostile_dress(rng, rng.choice(HOSTILE_FORMATS))


def hostile_boxes(rng):
    gold, wrong = _hostile_pair(rng)
    return gold, _hostile_fill(rng.choice(HOSTILE_BOXES), gold, wrong)


def hostile_hedges(rng):
    gold, wrong = _hostile_pair(rng)
    if rng.random() < 0.1:  # the number goes on, or there are two of it
        gold = rng.choice(HOSTILE_NUMBERS)
        more = rng.choice(["@...", "@. . .", "@…", "@\\ldots", "@\\dots", "\\pm @", "@ \\pm 1"])
        return gold, _hostile_dress(rng, more.replace("@", gold))
    hedges = [hedge for hedge in HOSTILE_HEDGES if (hedge, gold) != ("0 = 0", "0")]
    return gold, _hostile_dress(rng, _hostile_fill(rng.choice(hedges), gold, wrong))


def _hostile_write(rng, value):
    """The exact value in one of several notations."""
    top, bottom = value.numerator, value.denominator
    styles = [f"\\frac{{{top}}}{{{bottom}}}", f"{top}/{bottom}", f"\\dfrac{{{3 * top}}}{{{3 * bottom}}}"]
    if bottom == 1:
        styles += [f"{top}", f"{top:,}", f"{top}.0", f"{top:06d}", f"{top} \\times 10^{{0}}", f"{top}."]
    if 1000 % bottom == 0:
        styles += [f"{float(value):.3f}", f"{1000 * value} \\times 10^{{-3}}"]
    if 1 < bottom < value:
        styles.append(f"{top // bottom}\\frac{{{top % bottom}}}{{{bottom}}}")
    return rng.choice(styles)


def hostile_values(rng):
    """A number against another one: a digit, the sign, a place or the order changed. Equal ones are drawn again."""
    while True:
        value = Fraction(rng.randint(-9999, 9999), rng.choice([1, 1, 1, 2, 3, 7, 8, 10, 100, 125]))
        change = [-value, value * 10, value / 10, value * 100, value / 1000, value + 1, value - 1, value + value.denominator]
        digits = list(str(abs(value.numerator)))
        rng.shuffle(digits)
        change += [Fraction(int("".join(digits)), value.denominator), 1 / value if value else value, value + Fraction(1,
            10**9)]
        other = rng.choice(change)
        if other != value:
            break
    wrong = _hostile_write(rng, other)
    unit = rng.choice(["", "", "", " \\text{ apples}", "\\text{ cm}", " dollars"])
    return _hostile_write(rng, value), _hostile_dress(rng, wrong + unit)


def _hostile_expression(rng, depth):
    """(LaTeX, its exact value, whether it can be a factor without brackets), from our own arithmetic."""
    inner = ["sum", "product", "beside", "quotient", "power", "root", "factorial"]
    kind = rng.choice(inner if depth else ["integer", "fraction"])
    if kind == "integer":
        n = rng.randint(2, 12)
        return str(n), Fraction(n), True
    if kind == "fraction":
        a, b = rng.randint(1, 9), rng.randint(2, 9)
        return f"\\frac{{{a}}}{{{b}}}", Fraction(a, b), True
    if kind == "root":
        n = rng.randint(2, 12)
        return f"\\sqrt{{{n * n}}}", Fraction(n), True
    if kind == "factorial":
        n = rng.randint(3, 6)
        return f"{n}!", Fraction(math.factorial(n)), True
    a, x, a_factor = _hostile_expression(rng, depth - 1)
    b, y, b_factor = _hostile_expression(rng, depth - 1)
    a_in, b_in = (text if factor else f"({text})" for text, factor in ((a, a_factor), (b, b_factor)))
    if kind == "sum":
        return (f"{a} + {b}", x + y, False) if rng.random() < 0.5 else (f"{a} - {b_in}", x - y, False)
    if kind == "product":
        return a_in + rng.choice([" \\cdot ", " \\times ", " * "]) + b_in, x * y, False
    if kind == "beside":
        return rng.choice([f"({a})({b})", f"{a_in}({b})", f"\\left({a}\\right)\\left({b}\\right)"]), x * y, False
    if kind == "quotient" and y:
        return f"\\frac{{{a}}}{{{b}}}", x / y, True
    n = rng.randint(2, 3)
    return f"({a})^{{{n}}}", x**n, True


def _hostile_plain(value):
    top, bottom = abs(value.numerator), value.denominator
    return str(value) if bottom == 1 else "-" * (value < 0) + f"\\frac{{{top}}}{{{bottom}}}"


def hostile_arithmetic(rng):
    """An unevaluated expression against what a bad parser would make of it: a sum for a product, a part for the whole."""
    text, value, _ = _hostile_expression(rng, rng.randint(1, 2))
    numbers = [Fraction(int(n)) for n in re.findall("[0-9]+", text)]
    first, last, digits = numbers[0], numbers[-1], Fraction("".join(re.findall("[0-9]", text)))
    misread = [sum(numbers), math.prod(numbers), first, last, first + last, first - last, digits]
    misread += [-value, value / 2, value + 1, value + last, Fraction(round(value))]
    wrong = rng.choice([m for m in misread if m != value])
    return _hostile_plain(wrong), f"\\boxed{{{text}}}"


@pytest.fixture(scope="module")
def hostile_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def hostile_worker(hostile_folder):
    here = Path.cwd()
    os.chdir(hostile_folder)  # so that the child's working folder is one in which a new file is seen
    with MathWorker() as worker:
        worker.start()
        os.chdir(here)
        yield worker
    os.chdir(here)


HOSTILE_FAMILIES = {
    hostile_unicode: 1500, hostile_latex: 1500, hostile_code: 1000, hostile_format: 1000, hostile_boxes: 1500,
    hostile_hedges: 1500, hostile_values: 1400, hostile_arithmetic: 600,
}  # fmt: skip


@functools.cache
def _hostile_responses(family, folder):
    rng = random.Random(family.__name__)
    pairs = [family(rng) for _ in range(HOSTILE_FAMILIES[family])]
    return [(gold, response.replace("CANARY", f"{folder}/canary")) for gold, response in pairs]


@pytest.mark.parametrize("family", HOSTILE_FAMILIES)
def test_hostile_answers_are_never_paid(family, hostile_worker, hostile_folder):
    paid, slow = [], []
    for gold, response in _hostile_responses(family, hostile_folder):
        start = time.perf_counter()
        if is_correct(response, gold, hostile_worker):
            paid.append((gold, response[:200]))
        if time.perf_counter() - start > hostile_worker.timeout_s + 3:  # the limit, and the start of a new child
            slow.append((gold, response[:200]))
    assert not paid, f"{len(paid)} paid, of which {paid[:20]}"
    assert not slow and hostile_worker.timeouts == 0
    assert list(hostile_folder.iterdir()) == []
    assert same_answer("\\sqrt{16}", "4", hostile_worker) and not same_answer("\\sqrt{17}", "4", hostile_worker)


def test_there_are_ten_thousand_hostile_answers_and_forty_references(hostile_folder):
    assert sum(HOSTILE_FAMILIES.values()) == 10_000 and len(HOSTILE_GOLDS) >= 40
    responses = [pair for family in HOSTILE_FAMILIES for pair in _hostile_responses(family, hostile_folder)]
    assert len(set(responses)) > 7_500


def test_the_references_of_the_hostile_answers_are_paid_when_they_are_given(hostile_worker):
    for gold in HOSTILE_GOLDS:
        assert not grader.why_unusable(grader.normalise_answer(gold)), gold
        assert is_correct(f"\\boxed{{{gold}}}", gold, hostile_worker), gold
    rng, read = random.Random("true values"), 0
    for _ in range(200):  # the arithmetic is read, not refused
        text, value, _ = _hostile_expression(rng, rng.randint(1, 2))
        read += same_answer(text, _hostile_plain(value), hostile_worker)
    assert read >= 190


# sympy evaluates the digits of a number ("Integer (49 )") and helpers of its own; nothing else may be compiled from text.
HOSTILE_HOOK = r"""
    import re
    own = re.compile(r"from sympy import \*|(Integer|Float) ?\('?[0-9.]+'? ?\)\s*|def monomial_\w+\(A, .*", re.DOTALL)
    def watch(event, arguments):
        code = event == "compile" and arguments[1] == "<string>" and not own.fullmatch(str(bytes(arguments[0]), "utf-8"))
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        acts = event.startswith(("os.", "subprocess.", "shutil.", "socket.", "ctypes.", "pickle.", "pty."))
        if code or writes or (acts and event not in ("os.listdir", "os.scandir")):
            os._exit(99)
    sys.addaudithook(watch)
"""


def _hostile_watched(monkeypatch, **changes):
    """Children from now on end with status 99 where they evaluate text, write a file, or start a process."""
    ready = '    pipe.send_bytes(b"!")\n'
    source = inspect.getsource(grader._worker_main)
    for before, after in {ready: HOSTILE_HOOK + ready, **changes}.items():
        assert source.count(before) == 1
        source = source.replace(before, after)
    monkeypatch.setattr(grader.inspect, "getsource", lambda function: source)


def test_code_in_answers_is_never_run(monkeypatch, tmp_path):
    _hostile_watched(monkeypatch)
    monkeypatch.chdir(tmp_path)
    with MathWorker(timeout_s=5.0) as worker:
        for text in HOSTILE_CODE + HOSTILE_FORMATS:  # straight into the child, without the checks before it
            text = text.replace("CANARY", "canary")
            worker.equal("7", text)
            worker.equal(text, f"x_{{{text}}}")
        assert worker.timeouts == 0 and worker.equal("4", "\\sqrt{16}") and not worker.equal("4", "\\sqrt{17}")
    assert list(tmp_path.iterdir()) == []


def test_the_watch_sees_code_that_is_run(monkeypatch, tmp_path):
    _hostile_watched(monkeypatch, **{"verdict = equal(*question)": "verdict = eval(question[1])"})
    monkeypatch.chdir(tmp_path)
    with MathWorker(timeout_s=5.0) as worker, pytest.raises(TimeoutError):
        worker.equal("7", "7")


def test_the_child_has_no_secrets_and_cannot_write(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "canary-of-the-environment")
    with MathWorker(timeout_s=5.0) as worker:
        assert same_answer("\\sqrt{16}", "4", worker)
        process = Path(f"/proc/{worker._process.pid}")
        if not process.is_dir():
            pytest.skip("no /proc")
        assert b"canary-of-the-environment" not in (process / "environ").read_bytes()
        limits = {line[:26].strip(): line[26:].split()[:2] for line in (process / "limits").read_text().splitlines()}
        assert limits["Max address space"] == [str(1024**3)] * 2
        assert limits["Max file size"] == limits["Max core file size"] == ["0", "0"]


def _hostile_peak(worker, hog, gold):
    """(verdict, seconds, largest address space in KiB) of one question, on a child that is up."""
    worker.start()
    status, sizes = Path(f"/proc/{worker._process.pid}/status"), [0]

    def watch():
        while True:
            try:
                sizes.append(int(re.search(r"VmPeak:\s+(\d+) kB", status.read_text())[1]))
            except (OSError, TypeError):  # it has ended
                return
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    verdict = is_correct(f"\\boxed{{{hog}}}", gold, worker)
    seconds = time.perf_counter() - start
    worker.close()
    thread.join()
    return verdict, seconds, max(sizes)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc")
def test_an_answer_that_computes_for_ever_or_eats_memory():
    with MathWorker(timeout_s=1.0) as worker:
        for hog in ("9^{9^{9^{9}}}", "(10^{9999})^{9999}", "((9!)!)!"):
            verdict, seconds, size = _hostile_peak(worker, hog, "7")
            assert not verdict and seconds < 1.0 + 2.0 and 0 < size <= 1024**2
        assert worker.timeouts == 3 and same_answer("\\sqrt{16}", "4", worker)
    with MathWorker(timeout_s=20.0, memory_bytes=200 * 1024**2) as worker:  # ends at the memory, long before the time
        verdict, seconds, size = _hostile_peak(worker, "(x+1)^{99999}", "x+7")
        assert not verdict and seconds < 15 and 150 * 1024 < size <= 200 * 1024
        assert same_answer("\\sqrt{16}", "4", worker)


def test_all_questions_about_one_answer_share_one_limit():
    limits = []

    def equal(gold, prediction, limit_s):
        limits.append(limit_s)
        time.sleep(0.05)
        return False

    worker = SimpleNamespace(timeout_s=1.0, start=lambda: None, equal=equal)
    assert not same_answer("\\sqrt{7}, \\sqrt{11}, \\sqrt{13}", "\\sqrt{2}, \\sqrt{3}, \\sqrt{5}", worker)
    assert len(limits) == 3 and 0.9 < limits[0] <= 1.0
    assert all(a - b >= 0.05 for a, b in itertools.pairwise(limits))
    with MathWorker(timeout_s=5.0) as worker, pytest.raises(TimeoutError):
        worker.start()
        worker.equal("4", "\\sqrt{16}", limit_s=-1.0)


# Every one of these was paid once.
HOSTILE_FOUND = {
    "an equation in brackets": ("7", "(8=7)"), "a chain in brackets": ("7", "((8=9=7))"),
    "double factorial": ("720", "3!!"), "decimals that go on": ("3.14", "3.14..."),
    "decimals that go on, in blanks": ("3.14", "3.14. . ."), "quotes": ("78", '7"8'),
    "blank before the point": ("3.5", "7 .5"), "invisible": ("7", "\\phantom{7}"),
    "beside a fraction": ("15", "\\frac{8}{1}7"), "fraction beside fraction": ("15", "\\frac{8}{1}\\frac{7}{1}"),
    "fraction beside brackets": ("15", "\\frac{8}{1}(7)"), "groups": ("15", "{7}{8}"), "digit beside group": ("15", "7{8}"),
    "square brackets": ("15", "8[7]"), "number word": ("7", "7 eight"), "number word in text": ("7", "7 \\text{ eight}"),
    "twelfths": ("7", "7 twelfths"), "thousands": ("7", "7\\text{K}"), "per cent": ("0.5", "0.5\\text{ per cent}"),
    "seconds": ("5\\text{ min}", "5\\text{ s}"), "milli and mega": ("5\\text{ MW}", "5\\text{ mW}"),
    "apostrophe": ("7", "7\\text{ isn't right}"), "wrong": ("7", "7\\text{ wrong}"),
    "comma in text": ("7", "7\\text{ wait, eight}"), "equation for a function": ("2", "\\log(x)=2"),
    "option = option": ("C", "ABCD = C"), "segments": ("LRAC", "SRAC = LRAC"), "fifteen digits": ("0.3", "0.3+10^{-17}"),
    "twenty digits": ("7.5", "7.5+10^{-20}"),
}  # fmt: skip
# What the same checks must let through, or read as it is meant.
HOSTILE_NOT = [
    ("\\dfrac38", "3/8"), ("\\frac{3}{5}", "\\\\frac{3}{5}"), ("7", "{7}"), ("56", "\\frac{8}{1}(7)"),
    ("\\frac{\\sqrt{3}}2", "\\frac{1}{2}\\sqrt{3}"), ("2.5\\sqrt{2}", "\\frac{5\\sqrt{2}}{2}"),
    ("0.1\\pi", "\\frac{\\pi}{10}"), ("3", "\\log_2{8}"), ("3", "\\log_{2}(8)"), ("x^{2.5}", "x^{\\frac52}"),
    ("\\frac{1}{2}(a+b)", "\\frac{a+b}{2}"), ("7", "\\sqrt[3]{343}"), ("5\\text{ mins}", "5\\text{ min}"),
    ("5\\text{ Miles}", "5\\text{ miles}"), ("0.07", "7 per cent"), ("1,2,\\ldots,9", "1, 2, ..., 9"),
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_FOUND)
def test_hostile_answers_found_before(name, hostile_worker):
    gold, prediction = HOSTILE_FOUND[name]
    for response in (f"\\boxed{{{prediction}}}", f"The final answer is {prediction}."):
        assert not is_correct(response, gold, hostile_worker)


@pytest.mark.parametrize(("gold", "prediction"), HOSTILE_NOT)
def test_honest_answers_that_look_like_them(gold, prediction, hostile_worker):
    assert is_correct(f"\\boxed{{{prediction}}}", gold, hostile_worker)


def test_problem_files_that_attack_the_reader(tmp_path, eval_worker):
    rows = ["[" * 100_000, '{"id": ' * 50_000, json.dumps(_eval_row(id="\ud800")), json.dumps(_eval_row(problem="\udfff?"))]
    rows += ['{"id": 1' + "0" * 5000 + "}", _eval_row(answer="\\frac{1}{" * 100_000), _eval_row(answer="$" * 100_000)]
    rows += ["\0", "NaN"]
    start = time.perf_counter()
    for row in rows:
        path = _eval_file(tmp_path, _eval_row(2), row)
        with pytest.raises(ValueError) as error:
            load_problems(path, eval_worker)
        assert str(error.value).startswith(f"{path}:2: ")
    assert time.perf_counter() - start < 5
# ------------------------------------------------------------------------------------------------ figures


def test_pass_at_k_equals_counting_all_subsets():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            hits = [any(sample < c for sample in chosen) for chosen in itertools.combinations(range(n), k)]
            assert stats.pass_at_k(n, c, k) == pytest.approx(sum(hits) / len(hits), abs=1e-12)
    assert stats.pass_at_k(2000, 1, 500) == pytest.approx(0.25)  # C(2000, 500) has 487 digits
    for bad in ((4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)):
        with pytest.raises(ValueError, match="expected 0 <= c <= n"):
            stats.pass_at_k(*bad)


def test_pass_at_every_power_of_two_by_hand():
    ks = {n: stats.sample_counts(n) for n in (1, 2, 3, 4, 6, 32)}
    assert ks == {1: [1], 2: [1, 2], 3: [1, 2, 3], 4: [1, 2, 4], 6: [1, 2, 4, 6], 32: [1, 2, 4, 8, 16, 32]}
    correct, nothing = [[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]], [[0] * 4] * 3
    result = summarise(correct, nothing, nothing, [True, False, True])
    # pass@2: 1 - C(3,2)/C(4,2) = 1/2, 0, 1 - 0 = 1
    assert result["pass_at"] == pytest.approx({"1": 4 / 12, "2": 1.5 / 3, "4": 2 / 3})
    assert result["pass_at_n"] == result["pass_at"]["4"] and result["maj_at_n"] == pytest.approx(2 / 3)
    assert "maj_at_n" not in summarise(correct, nothing, nothing)
    with pytest.raises(ValueError, match="a vote for each of 3 problems, got 2"):
        summarise(correct, nothing, nothing, [True, False])


EVAL_VOTES = [
    (["7", "8", "8"], 1),
    (["7", "8", "8", "7"], 0),  # a tie: the group that was opened first
    (["8", "7", "7", "8"], 0),
    (["9", "7", "8", "8", "7"], 1),  # not the first of all, but the first of those with two votes
    ([None, None, "3"], 2),  # one vote is more than none
    ([None, "4", None, None], 1),
    ([None, None], None),
    (["0.5", "3", "3", "\\frac12", "1/2"], 0),  # three ways to write a half outvote two threes
    (["3", "\\sqrt{8}", "2\\sqrt{2}"], 1),  # only math-verify sees that these are the same
    (["1, 2", "2, 1", "(1,2)", "(1,2)", "(1,2)"], 2),
]


@pytest.mark.parametrize(("answers", "winner"), EVAL_VOTES)
def test_majority_by_hand(answers, winner, eval_worker):
    assert stats.majority(answers, grading._same_vote(eval_worker)) == winner


def test_majority_asks_no_more_than_it_must():
    asked = []

    def same(answer, reference):
        asked.append((answer, reference))
        return answer.lower() == reference.lower()

    assert stats.majority(["a", "b", "a", "B", "c", "b", "B"], same) == 1
    # only with the first of each group, the same text once, the later answer against the earlier one
    assert asked == [("b", "a"), ("B", "a"), ("B", "b"), ("c", "a"), ("c", "b")]


def test_majority_answers_without_a_verdict_stand_alone():
    questions = []

    def same(answer, reference):
        questions.append(answer)
        return None if "slow" in answer + reference else answer == reference

    assert stats.majority(["slow 1", "slow 2", "slow 3", "slow 2"], same) == 1
    assert questions == ["slow 2", "slow 3"]  # one limit each, not one for every pair
    worker = types.SimpleNamespace(timeouts=0, timeout_s=5.0, start=lambda: None)

    def equal(gold, prediction, limit_s=None):
        worker.timeouts += 1
        raise TimeoutError

    worker.equal = equal
    assert grading._same_vote(worker)("x+1", "1+x") is None and worker.timeouts == 1
    assert grading._same_vote(worker)("3", "4") is False


def test_bootstrap_equals_a_slow_loop():
    values, generator = [3, -1, 0, 2, 2, -4, 1], np.random.default_rng([5, 2])
    slow = []
    for _ in range(300):
        slow.append(sum(values[i] for i in generator.integers(7, size=7)) / 7)
    drawn = stats.bootstrap_means(values, seed=[5, 2], resamples=300)
    assert drawn.tolist() == slow
    many = np.tile(values, 100_000)  # more than one block of indices
    block = stats.bootstrap_means(many, seed=1, resamples=12)
    generator = np.random.default_rng(1)
    assert block.tolist() == [many[generator.integers(len(many), size=len(many))].sum() / len(many) for _ in range(12)]


def test_paired_interval_against_the_normal_approximation():
    generator = np.random.default_rng(0)
    difficulty = generator.beta(0.5, 0.5, 600)
    a, b = generator.binomial(8, difficulty), generator.binomial(8, np.clip(difficulty + 0.03, 0, 1))
    result, drawn = stats.paired_difference(a, b, 8, seed=3)
    change = (b - a) / 8
    error = change.std(ddof=1) / 600**0.5
    assert result["difference"] == pytest.approx(change.mean()) and len(drawn) == 10_000
    assert result["low"] == pytest.approx(change.mean() - 1.96 * error, abs=0.08 * error)
    assert result["high"] == pytest.approx(change.mean() + 1.96 * error, abs=0.08 * error)
    assert result["p"] == pytest.approx(math.erfc(abs(change.mean()) / error / 2**0.5), rel=0.3, abs=0.001)
    unpaired = ((a / 8).var(ddof=1) / 600 + (b / 8).var(ddof=1) / 600) ** 0.5
    assert result["high"] - result["low"] < 0.6 * 2 * 1.96 * unpaired  # what pairing is for
    again, swapped = stats.paired_difference(a, b, 8, seed=3)[0], stats.paired_difference(b, a, 8, seed=3)[0]
    assert again == result != stats.paired_difference(a, b, 8, seed=4)[0]
    assert (swapped["low"], swapped["high"]) == pytest.approx((-result["high"], -result["low"]))
    assert stats.paired_difference([1, 2], [1, 2], 2, seed=0)[0] == {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
    assert stats.paired_difference([0] * 9, [2] * 9, 2, seed=0)[0]["p"] == 0.0


def _eval_results(correct, file="x/math500.jsonl", *, n=4, guided=False, model="m", **changes):
    """A result file with one problem file, as main writes it: `correct` right samples of n per problem."""
    part = grading.figures([
        {"id": problem, "majority": 0, "samples": [
            {"correct": i < count, "truncated": False, "timed_out": False, "length": 9} for i in range(n)]}
        for problem, count in correct.items()
    ], voted=True)  # fmt: skip
    settings = {"data_sha256": "d" * 64, "max_new_tokens": 32_768}
    config = {"model": model, "temperature": 0.6, "top_p": 0.95, "guided": guided}
    assert not changes.keys() - config.keys() - settings.keys() - {"problems"}
    part |= {name: changes.get(name, value) for name, value in settings.items()}
    part["problems"] = changes.get("problems", part["problems"])
    config |= {name: value for name, value in changes.items() if name in config}
    return {"config": config, "files": {file: part}}


def test_compare_by_hand_and_its_average(tmp_path, capsys):
    a, b = _eval_results({"p": 0, "q": 2}), _eval_results({"q": 3, "p": 4}, "elsewhere/copy.jsonl")
    (row,) = stats.compare(a, b)
    assert (row["a"], row["b"], row["difference"]) == (0.25, 0.875, 0.625)
    assert (row["low"], row["high"], row["p"], row["problems"]) == (0.25, 1.0, 0.0, 2)  # +4 and +1 of 4, never below zero
    for results, counts in ((a, {"r": 4, "s": 1}), (b, {"r": 0, "s": 1})):
        results["files"] |= _eval_results(counts, "x/second.jsonl", data_sha256="e" * 64)["files"]
    for name, results in (("a.json", a), ("b.json", b)):
        (tmp_path / name).write_text(json.dumps(results))
    names = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    rows = grading.main(["--compare", *names])
    assert [r["file"] for r in rows] == ["x/math500.jsonl", "x/second.jsonl", "average of the files"]
    assert rows[2]["difference"] == pytest.approx((0.625 - 0.5) / 2) and rows[2]["problems"] == 4
    assert rows[2]["low"] == pytest.approx((0.25 - 1) / 2) and rows[2]["high"] == pytest.approx((1 + 0) / 2)
    # the two files are drawn apart from each other: their average also takes the values between the extremes
    out = capsys.readouterr().out
    assert "x/math500.jsonl: A 25.0  B 87.5  difference +62.5 [+25.0, +100.0]  p below 0.0002  problems 2" in out
    assert rows == grading.main(["--compare", *names]) and f"A: {names[0]}" in out


def test_compare_draws_each_file_by_itself():
    a, b = ({"files": {}, "config": None} for _ in range(2))
    for name in "de":
        for results, counts in ((a, [0] * 50), (b, [0, 1] * 25)):
            one = _eval_results({str(i): c for i, c in enumerate(counts)}, name, n=1, data_sha256=name * 64)
            results["files"] |= one["files"]
            results["config"] = one["config"]
    first, second, mean = stats.compare(a, b)
    width, both = first["high"] - first["low"], mean["high"] - mean["low"]
    assert both == pytest.approx(width / 2**0.5, rel=0.1)  # as wide as one's if they moved together
    assert second["high"] - second["low"] == pytest.approx(width, rel=0.15)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(n=2), "has n 4 in A, 2 in B"),
        (dict(temperature=1.0), "has temperature 0.6 in A, 1.0 in B"),
        (dict(top_p=1.0), "has top_p 0.95 in A, 1.0 in B"),
        (dict(max_new_tokens=2048), "has max_new_tokens 32768 in A, 2048 in B"),
        (dict(data_sha256="0" * 64), "x/math500.jsonl without strategies is in A; B has no file of that checksum"),
        (dict(guided=True), "x/math500.jsonl without strategies is in A; B has no file"),
        (dict(correct={"p": 1}), "problem 'q' of x/math500.jsonl is in one of A and B only"),
        (dict(correct={"p": 1, "q": 1, "r": 1}), "problem 'r' of"),
    ],
)
def test_compare_refuses(changes, message):
    a = _eval_results({"p": 0, "q": 2})
    changes = {"correct": {"p": 0, "q": 2}} | changes
    with pytest.raises(ValueError, match=re.escape(message)):
        stats.compare(a, _eval_results(**changes))


def test_compare_refuses_a_file_that_one_of_them_lacks():
    a, b = _eval_results({"p": 0, "q": 2}), _eval_results({"p": 0, "q": 2})
    b["files"] |= _eval_results({"p": 1}, "more.jsonl", data_sha256="e" * 64)["files"]
    for pair, message in (((a, b), "is in B; A has no file"), ((b, a), "is in A; B has no file")):
        with pytest.raises(ValueError, match="more.jsonl without strategies " + message):
            stats.compare(*pair)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": {"f": {"accuracy": 1}}, "config": {}}', '{"files": 3}'])
def test_compare_and_table_name_a_file_that_is_none_of_ours(text, tmp_path):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(_eval_results({"p": 1})))
    bad.write_text(text)
    for command in (["--compare", str(good), str(bad)], ["--table", str(good), str(bad)]):
        with pytest.raises(ValueError, match="bad.json: not a results file of eval.py"):
            grading.main(command)
    with pytest.raises(ValueError, match="none.json: not a results file"):
        grading.main(["--table", str(tmp_path / "none.json")])


def test_guidance_by_hand():
    auto, guided = [0, 4, 2, 2, 0], [4, 4, 1, 2, 0]
    alpha = weighting.instance_weight(torch.tensor(auto) / 4, torch.tensor(guided) / 4)
    result = stats.guidance(auto, guided, 4, alpha.tolist(), ["sum", "sum", "area", "sum", "odd"])
    overall = result["overall"]
    assert (overall["p_auto"], overall["p_guide"]) == (8 / 20, 11 / 20)
    assert (overall["helps"], overall["hurts"], overall["same"]) == (0.2, 0.2, 0.6)
    # 0.8 at 0 -> 1; 0.5 * 0.1 / 1.1; 0 where guidance hurts by 0.25; 0.5 * 0.1 / 0.6; 0.5 at 0 -> 0
    weights = [0.8, 0.05 / 1.1, 0.0, 0.05 / 0.6, 0.5]
    assert overall["alpha"] == pytest.approx(sum(weights) / 5, abs=1e-6)
    assert overall["difference"] == pytest.approx(3 / 20) and overall["low"] <= 0 < overall["high"]
    assert list(result["families"]) == ["(other)", "sum"] and result["families"]["(other)"]["problems"] == 2
    own = result["families"]["sum"]
    assert (own["p_auto"], own["p_guide"], own["helps"], own["hurts"]) == (6 / 12, 10 / 12, 1 / 3, 0)
    assert own["alpha"] == pytest.approx((weights[0] + weights[1] + weights[3]) / 3, abs=1e-6)
    assert stats.guidance(auto, guided, 4, alpha.tolist(), list("abcde"))["families"] == {}
    twice = stats.guidance(auto, guided, 4, alpha.tolist(), list("axbxc"))["families"]
    assert {name: family["problems"] for name, family in twice.items()} == {"(other)": 3, "x": 2}
    lines = stats.guidance_lines(result)
    assert lines[0].startswith("  guidance: p_auto 40.0  p_guide 55.0  helps 20.0 %  hurts 20.0 %  same 60.0 %  alpha 0.286")
    assert len(lines) == 3 and lines[2].startswith("  sum: p_auto 50.0  p_guide 83.3")


def test_table_layout():
    ours = _eval_results({"p": 1, "q": 3}, "b/math500.jsonl", model="runs/x/model", problems=500)
    assert stats.table([ours]).splitlines()[2] == "| runs/x/model | 50.0 ± 25.0 | – | – | – | – |"
    for name, n, counts in (("amc23", 32, (8, 8)), ("olympiad", 4, (4, 0)), ("aime24", 32, (0, 0)), ("aime25", 32, (16, 16))):
        one = _eval_results(dict(zip("pq", counts, strict=True)), f"b/{name}.jsonl", n=n, data_sha256=name)
        ours["files"] |= one["files"]
        one["files"][f"b/{name}.jsonl"]["problems"] = stats.BENCHMARKS[name].problems
    other = _eval_results({"p": 4}, "math500.jsonl", n=4, model="hot", temperature=1.0, max_new_tokens=2048, guided=True)
    lines = stats.table([ours, other]).splitlines()
    assert lines[:2] == ["| model | MATH500 | AMC23 | Olympiad | AIME24 | avg |", "|---|---|---|---|---|---|"]
    # avg: (50 + 25 + 50 + 0) / 4, and sqrt(25^2 + 0 + 50^2 + 0) / 4
    assert lines[2] == "| runs/x/model | 50.0 ± 25.0 | 25.0 ± 0.0 | 50.0 ± 50.0 | 0.0 ± 0.0 | 31.2 ± 14.0 |"
    assert lines[3] == "| hot, guided | 100.0 | – | – | – | – |"
    assert lines[9] == "| Qwen2.5-1.5B-Instruct, SGPO [paper] | 57.7 | 29.0 | 23.7 | 9.0 | 29.9 |"
    assert lines[21] == "| Llama-3.2-8B-Instruct, SGPO [paper] | 52.0 | 25.6 | 22.9 | 10.0 | 27.6 |"
    notes = lines[22:]
    assert notes[0] == "" and "not measured here" in notes[1] and "temperature 0.6, top_p 0.95" in notes[1]
    assert "the public model of that size is Llama-3.1-8B-Instruct" in notes[2]
    assert notes[3:] == [
        "runs/x/model: aime25 50.0 (avg@32) has no column in the paper's table",
        "hot, guided: with strategies in the prompts, the paper evaluates without",
        "hot, guided: MATH500 differs from the paper in temperature 1.0 (paper 0.6), max_new_tokens 2048 (paper 32768), "
        "problems 1 (paper 500)",
    ]
    ours["files"]["c/amc23.jsonl"] = ours["files"]["b/amc23.jsonl"] | {"data_sha256": "another"}
    with pytest.raises(ValueError, match="two files are called amc23"):
        stats.table([ours])


def test_the_papers_rows():
    """Copied right: each average is that of its row, up to its rounding, but for the one that a note names."""
    assert [len(rows) for rows in stats.PAPER_ROWS.values()] == [6, 6, 6]
    printed = [row for rows in stats.PAPER_ROWS.values() for row in rows.values()]
    assert len(set(printed)) == 18 and all(a > b > c > d for a, b, c, d, _ in printed)  # the same order in each, easy to hard
    odd = [
        (model, method, average)
        for model, rows in stats.PAPER_ROWS.items()
        for method, (*figures, average) in rows.items()
        if abs(sum(figures) / 4 - average) > 0.0501
    ]
    assert odd == [("Llama-3.2-8B-Instruct", "LUFFY", 26.5)] and "LUFFY row averages 26.6, printed is 26.5" in stats.LLAMA_NOTE
    assert sum(stats.PAPER_ROWS["Llama-3.2-8B-Instruct"]["LUFFY"][:4]) / 4 == pytest.approx(26.6, abs=0.0501)


@pytest.mark.parametrize(
    "evaluated, shown",
    [
        (["runs/x/model"], ["Qwen2.5-1.5B", "Qwen2.5-7B", "Llama-3.2-8B"]),
        (["Qwen/Qwen2.5-7B-Instruct", "runs/x/model"], ["Qwen2.5-7B"]),
        (["runs/qwen2.5-1.5b-instruct-sgpo/model"], ["Qwen2.5-1.5B"]),
        (["meta-llama/Llama-3.1-8B-Instruct", "../Qwen2.5-7B-Instruct/"], ["Qwen2.5-7B", "Llama-3.2-8B"]),
    ],
)
def test_the_table_shows_the_papers_rows_of_the_models_that_were_evaluated(evaluated, shown):
    text = stats.table([_eval_results({"p": 1}, model=model) for model in evaluated])
    rows = [line for line in text.splitlines() if line.startswith("|") and "[paper]" in line]
    assert [row.split("-Instruct,")[0] for row in rows] == [f"| {model}" for model in shown for _ in range(6)]
    assert ("Llama-3.2-8B-Instruct is the name as printed" in text) == ("Llama-3.2-8B" in shown)
    left_out = [model for model in ("Qwen2.5-1.5B", "Qwen2.5-7B", "Llama-3.2-8B") if model not in shown]
    named = " and ".join(f"{model}-Instruct" for model in left_out)
    assert (f"the rows of {named} are left out" in text) if left_out else "left out" not in text


def test_benchmarks_are_those_that_prepare_writes():
    assert {name: benchmark.problems for name, benchmark in stats.BENCHMARKS.items()} == prepare.BENCHMARKS
    assert set(stats.COLUMNS) <= set(stats.BENCHMARKS)


def test_figures_import_alone_and_need_numpy_only(tmp_path):
    shutil.copy(ROOT / "stats.py", tmp_path)
    check = "import sys, stats; assert not {'torch', 'transformers', 'eval', 'math_verify'} & set(sys.modules)"
    done = run_script("-c", check, cwd=tmp_path, PYTHONPATH="")
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------ whole evaluations


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


# ------------------------------------------------------------------------------------------------ plain math-verify

# Where math-verify by itself (parse both in dollars, verify) says something else than the tables above.
PLAIN_REJECTS = [
    # TeX's thin spaces and Unicode's square root are not in its grammar
    ("1000000", "1\\,000\\,000"), ("\\sqrt{65}", "√65"), ("1 + i \\sqrt{3}", "1+i√3"), ("2\\sqrt{5}", "2√5"),
    # numbers: a point without digits behind, a mixed number in plain text, e-notation, one percent sign without a backslash
    ("-1./3", "-\\frac{1}{3}"), ("2.5", "2 1/2"), ("4.5e33", "4.5 \\times 10^{33}"), ("3e8", "300000000"), ("17.5%", "17.5"),
    ("0.56 = 56\\%", "0.56"),
    # words behind a number become factors
    ("5", "5 dollars"), ("\\$5", "5 dollars"), ("3", "3 km/hr"), ("55", "55 miles per hour"), ("0.16", "0.16 liters of water"),
    ("6", "6 years old"), ("\\frac13", "1/3 (≈ 0.333)"),
    # words: it compares what it parsed, letter by letter, or the string with all its punctuation
    ("\\text{A5}_{11}", "A5_{11}"), ("\\text{Evelyn}", "evelyn."), ("\\text{(E)},", "E"), ("\\text{A, B}", "A,B"),
    ("\\text{October 30}", "October 30"),
]  # fmt: skip
PLAIN_ACCEPTS = [
    # rounded to six digits before they are compared, and small differences vanish altogether
    ("\\frac{1}{3}", "0.333333"), ("0.000000001", "0.000000002"), ("10^{-20}\\pi", "10^{-21}\\pi"), ("\\pi", "3.14159265358"),
    # numbers next to each other are added, cut off or multiplied to zero
    ("5", "2(3)"), ("5", "2 3"), ("5", "(2)(3)"), ("0", "10 000"), ("\\frac{7}{2}", "2\\frac{3}{2}"),
    ("5", "5–6"), ("0", "\\text{not } 0"), ("0", "n o t 0"),
    # letters: upper and lower case are one symbol, primes are dropped, words are products of letters
    ("n", "N"), ("\\frac{n}{2}", "\\frac{N}{2}"), ("2n", "2N"), ("\\frac{a}{b}", "\\frac{A}{B}"), ("x", "x'"),
    ("CBAD", "ABCD"),
    # what looks like a unit is dropped from one side or both: metres, degrees, cents for dollars, the base of a number
    ("6m", "6"), ("65m", "65"), ("2", "2m"), ("2\\pi", "2\\pi mm"), ("\\frac{1}{\\sqrt{2}}c", "\\frac{1}{\\sqrt{2}}"),
    ("5 \\text{ cents}", "5 \\text{ dollars}"), ("\\$5", "5 cents"), ("12\\text{ cm}", "12\\text{ km}"),
    ("30^\\circ", "30\\text{ radians}"), ("\\sin 30^\\circ", "\\sin 30"), ("5\\text{ cm}^2", "5\\text{ cm}^3"),
    ("20\\text{ square units}", "20^\\circ"), ("5", "5\\text{ out of 6}"), ("1", "1%"),
    ("52", "52_8"), ("52_8", "52_9"), ("4", "4 _8"),
    # of an equation or inequality one side is enough, whatever stands on the other
    ("7", "8=7"), ("7", "x=8=7"), ("5", "x+y=5"), ("3", "\\ge 3"), ("SRAC=LRAC", "LRAC"),
    # lists are sets: multiplicity, order and the kind of bracket are lost, and a hedge counts as its first part
    ("3", "3, 3"), ("-2,-2", "-2"), ("1, 1, 2", "1, 2, 2"), ("(1,2)", "\\{1,2\\}"), ("(2,4)", "2, 4"), ("1,-2", "(1,-2)"),
    ("\\text{Amy}, \\text{Bob}", "\\text{Bob}, \\text{Amy}"), ("3", "3 or more"),
    # sympy's conventions
    ("1", "\\infty^0"),
    # right as mathematics: we refuse brackets twenty deep, because 500 deep take minutes
    ("x+1", "(" * 20 + "x+1" + ")" * 20),
]  # fmt: skip
PLAIN_SCRIPT = """
import json, logging, sys
from math_verify import parse, verify

logging.disable(logging.CRITICAL)
pairs = json.load(sys.stdin)
print(json.dumps([bool(verify(*(parse(f"${text}$") for text in pair))) for pair in pairs]))
"""


@pytest.fixture(scope="module")
def plain_math_verify():
    """(pairs) -> math-verify's own verdicts, the reference first, in a process with a fixed order of sympy's rules."""

    def verdicts(pairs):
        environment = os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", PLAIN_SCRIPT], input=json.dumps(pairs), env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return verdicts


def test_where_plain_math_verify_differs_from_our_tables(plain_math_verify):
    pairs = [pair for pair in EVAL_SAME + EVAL_DIFFERENT if len(pair[1]) <= grader.MAX_ANSWER]
    assert len(set(pairs)) >= 300  # each with a verdict in its table, which the tests of the tables hold our grader to
    verdicts = dict(zip(pairs, plain_math_verify(pairs), strict=True))
    assert {pair for pair in EVAL_SAME if not verdicts[pair]} == set(PLAIN_REJECTS)
    assert {pair for pair in EVAL_DIFFERENT if verdicts.get(pair)} == set(PLAIN_ACCEPTS)


# Of rasbt/reasoning-from-scratch, commit f79c9cd0ae7d824aa4e9a9bc2ca4a85167f81958:
# ch03/03_advanced-parser/math500_qwen3_answers.json (Apache-2.0), 500 answers of a model to MATH-500.
GRADER_PAIRS = "a9cce1a061e7f08c202d49793a66dc41fcf76407e297bc198521c2990182b0fa"


def test_grader_on_real_answers_of_a_model(real_data, plain_math_verify, eval_worker):
    pairs = [(row["answer"], extract_answer(row["prediction"])) for row in json.loads(real_data[GRADER_PAIRS].read_text())]
    ours = [same_answer(prediction, answer, eval_worker) for answer, prediction in pairs]
    plain = plain_math_verify(pairs)
    assert len(pairs) == 500 and eval_worker.timeouts == 0
    # By eye 299 are right. Ours is the strict one where the two differ, and wrong on both.
    assert (sum(ours), sum(plain)) == (297, 299)
    differ = {pair for pair, own, other in zip(pairs, ours, plain, strict=True) if own != other}
    assert differ == {("12", "12^{\\mathrm{th}} grade"), ("(0,9) \\cup (9,36)", "(0, 36) \\setminus \\{9\\}")}


# ---------------------------------------------------------------------------------------------------- starter set


def _starter_data():
    """The repository's data folder: next to this file, or where the tests are run."""
    return next(d for d in (Path(__file__).parent / "data", Path("data")) if (d / "starter.py").exists())


def _starter():
    """data/starter.py as a module."""
    spec = importlib.util.spec_from_file_location("starter_generator", _starter_data() / "starter.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _starter_rows(*names):
    """The committed rows of the named files, one list."""
    return [json.loads(line) for name in names for line in open(_starter_data() / "starter" / f"{name}.jsonl")]


def _starter_family(row):
    return re.fullmatch(r"starter-(.+)-\d+", row["id"])[1]


def _starter_by_family(*names):
    """{family: its rows}."""
    groups = {}
    for row in _starter_rows(*names):
        groups.setdefault(_starter_family(row), []).append(row)
    return groups


def _starter_numbers(text):
    """Every number of a text, in order: "3 pens at $1.50" -> [3, 3/2]."""
    return [Fraction(n) for n in re.findall(r"\d+(?:\.\d+)?", text)]


def _starter_value(text):
    """A plain answer as a number: "7", "2.50" or "\\frac{7}{3}"."""
    fraction = re.fullmatch(r"\\frac\{(\d+)\}\{(\d+)\}", text)
    return Fraction(int(fraction[1]), int(fraction[2])) if fraction else Fraction(text)


def _starter_evaluate(text, **names):
    """An arithmetic expression over fractions; ^ is a power."""
    text = re.sub(r"(?<=\d)([a-z])", r"*\1", text)
    text = re.sub(r"\d+(?:\.\d+)?", lambda m: f"Fraction('{m[0]}')", text).replace("^", "**")
    return eval(text, {"__builtins__": {}, "Fraction": Fraction}, names)


def _starter_equations(text):
    """The (left, right) pairs of every chain of equal signs whose two sides are plain arithmetic.

    A side may stand next to words ("that is 3 * 4 = 12 apples"), not next to an operator and a letter ("x + 4 = 12").
    """
    found = []
    for sentence in re.split(r"[,;:?]\s|\.(?:\s|$)|\n", text):
        sides = sentence.split(" = ")
        for left, right in itertools.pairwise(sides):
            start = re.search(r"(?:^|[A-Za-z] )((?:\(|\d|-\d)[\d.()+\-*/^ ]*)$", left)
            end = re.match(r"(-?(?:[\d(][\d.()+\-*/^ ]*)?[\d)])(?=$| [A-Za-z])", right)
            if start and end:
                found.append((start[1], end[1]))
    return found


def test_starter_files_are_what_the_generator_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["starter.py", "--out", str(tmp_path / "new"), "--seed", "0"])
    _starter().main()
    for name in ("train", "test", "heldout"):
        committed = _starter_data() / "starter" / f"{name}.jsonl"
        assert (tmp_path / "new" / f"{name}.jsonl").read_bytes() == committed.read_bytes()
    assert "train.jsonl: 740 rows" in capsys.readouterr().out


def test_starter_build_is_pure_and_depends_on_the_seed():
    starter = _starter()
    random.seed(1)
    state = random.getstate()
    first = starter.build(0)
    assert random.getstate() == state
    random.seed(2)
    assert starter.build(0) == first
    assert {r["problem"] for r in starter.build(1)[0]} != {r["problem"] for r in first[0]}


def test_starter_counts():
    train, test, held = (_starter_by_family(name) for name in ("train", "test", "heldout"))
    assert len(train) == 37 and train.keys() == test.keys()
    assert held.keys() == {"mixture", "neither"} and not held.keys() & train.keys()
    assert all(len(rows) == 20 for rows in train.values())
    assert all(len(rows) == 4 for rows in test.values())
    assert all(len(rows) == 25 for rows in held.values())


def test_starter_ids_and_texts_are_unique_and_fields_are_filled():
    rows = _starter_rows("train", "test", "heldout")
    assert len({row["id"] for row in rows}) == len({row["problem"] for row in rows}) == len(rows)
    for row in rows:
        assert list(row) == ["id", "problem", "answer", "solution", "strategy"]
        assert list(row["strategy"]) == ["type", "strategy", "steps"]
        assert 2 <= len(row["strategy"]["steps"]) <= 5
        texts = [row["problem"], row["answer"], row["solution"], row["strategy"]["type"], row["strategy"]["strategy"]]
        for text in texts + row["strategy"]["steps"]:
            assert isinstance(text, str) and text and text == text.strip() and "  " not in text and text.isascii(), row


def test_starter_test_operands_are_not_in_train():
    """By the texts alone: no test problem has the same set of numbers as a train problem of its family."""
    train, test = _starter_by_family("train"), _starter_by_family("test")
    # numbers that belong to a wording and not to the instance
    constant = {"units-digit": {10}, "dice-sum": {1}, "nth-term": {1, 2, 3, 4}}
    for family in train:
        keys = [
            {frozenset(_starter_numbers(row["problem"])) - constant.get(family, set()) for row in rows}
            for rows in (train[family], test[family])
        ]
        assert not keys[0] & keys[1], (family, keys[0] & keys[1])


def test_starter_operands_stand_in_the_text():
    """The split goes by the operands a family returns, so these must be the numbers the reader sees."""
    starter = _starter()
    for name, family in starter.TRAINED + starter.HELD_OUT:
        rng = random.Random(f"operands-{name}")
        for item in filter(None, (family(rng) for _ in range(60))):
            missing = {Fraction(str(n)) for n in item[0]} - set(_starter_numbers(item[1]))
            assert not missing, (name, item[0], item[1])


def test_starter_strategies_hold_no_number_and_do_not_depend_on_the_instance():
    # "one" and "two" are structural (one unit of time, two groups); no larger number word has a place in a strategy
    words = r"\b(three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|twenty|thirty|forty|fifty|thousand)\b"
    for family, rows in _starter_by_family("train", "test", "heldout").items():
        texts = {json.dumps(row["strategy"]).lower() for row in rows}
        # at most four texts for all the rows of a family: one that followed the operands would differ from row to row
        assert len(texts) <= 4, (family, len(texts))
        for text in texts:
            assert not re.search(r"\d", text) and not re.search(words, text), (family, text)


def test_starter_solutions_end_in_the_boxed_answer():
    for row in _starter_rows("train", "test", "heldout"):
        assert row["solution"].endswith(f"\nThe answer is \\boxed{{{row['answer']}}}"), row["id"]
        assert row["solution"].count("\\boxed") == 1


def test_starter_solutions_state_true_equations():
    for family, rows in _starter_by_family("train", "test", "heldout").items():
        for row in rows:
            equations = _starter_equations(row["solution"])
            assert equations, (family, row["solution"])
            for left, right in equations:
                assert _starter_evaluate(left) == _starter_evaluate(right), (row["id"], left, right)


def test_starter_equation_finder():
    text = (
        "So 3x + 6 = 153 holds, that is 2 * (3 + 4) = 14 = 28 / 2 apples.\n"
        "Then x is 2.50 * 2 = 5. And 1/2 + 1/3 = 5/6, and 7 = 20 - x, and 3 * 2 = 6 and 6 * 2 = 12."
    )
    found = [("2 * (3 + 4)", "14"), ("14", "28 / 2"), ("2.50 * 2", "5"), ("1/2 + 1/3", "5/6"), ("3 * 2", "6"), ("6 * 2", "12")]
    assert _starter_equations(text) == found
    assert _starter_evaluate("3n + 2^2", n=5) == 19 and _starter_evaluate("1 / (5/6)") == Fraction(6, 5)


def _starter_money_checks():
    """{family: f(problem, numbers in the text, answer) -> is the answer right}, not by the generator's route."""

    def one_step(text, n, x):
        if "together" in text or "that day" in text:
            return x - n[0] == n[1]
        if "left" in text:
            return x + n[1] == n[0]
        return x * n[1] == n[0] if "equally" in text or "in each pot" in text else x / n[0] == n[1]

    def change(text, n, x):
        many, price, few, cost, bill = n if "buys" in text else (n[2], n[0], n[3], n[1], n[4])
        return sum([price] * int(many) + [cost] * int(few)) + x == bill

    def profit(text, n, x):
        if len(n) == 2:
            return n[0] * (100 + (x if "profit" in text else -x)) / 100 == n[1]
        count, cost, broken, price = n if "vases" in text else (n[1], n[0], n[2], n[3])
        return sum([price] * int(count - broken)) == cost + x

    def reverse(text, n, x):
        p, new = (n[1], n[0]) if "runners" in text else n
        return x + (x * p / 100 if re.search("raise|more", text) else -x * p / 100) == new

    def ratio(text, n, x):
        a, b, total = (n[1], n[2], n[0]) if "share" in text else n
        return x * b == (total - x) * a

    def convert(text, n, x):
        factor = 100 if "centimeters" in text else 60 if "minutes" in text else 1000
        whole, piece = (n[1], n[0]) if re.search("radio|lamp", text) else n
        return x * piece == whole * factor

    return {
        "one-step": one_step,
        "change": change,
        "profit": profit,
        "reverse-percent": reverse,
        "unit-conversion": convert,
        "ratio-share": ratio,
        "packs": lambda text, n, x: x * n[3] + n[2] == n[0] * n[1],
        "unit-rate": lambda text, n, x: x * n[1] == n[0] * n[2],
        "percent-rest": lambda text, n, x: x / n[0] + n[1] / 100 == 1,
        "average-needed": lambda text, n, x: sum([n[1]] * int(n[0]) + [x]) / (n[0] + 1) == n[2],
        "fraction-left": lambda text, n, x: _starter_left(n) == x,
        "discount-tax": lambda text, n, x: _starter_price(text, n) == x,
    }


def _starter_left(n):
    """What is left of n[0] after the first fraction and then the second, in single units."""
    things, a, b, c, d = (int(v) for v in n)
    things -= sum(1 for i in range(things) if i % b < a)
    return things - sum(1 for i in range(things) if i % d < c)


def _starter_price(text, n):
    """The price in dollars after the discount and the tax, checked to be whole cents."""
    price, off, tax = n if "with a price" in text else (n[1], n[0], n[2])
    final = (price - price * off / 100) * (1 + tax / 100)
    assert (100 * final).denominator == 1, text
    return final


def _starter_equation_checks():
    """As above, for equations, ages, motion and geometry: the answer is put back into the text."""

    def consecutive(text, n, x):
        step = 1 if "consecutive integers" in text else 2
        signs = range(int(n[0])) if "smallest" in text else range(0, -int(n[0]), -1)
        odd = "odd" in text
        return sum(x + step * i for i in signs) == n[1] and (step == 1 or x % 2 == odd)

    def ages(text, n, x):
        if "sum of their ages" in text or "add up" in text:
            return (x + n[1]) + (x / n[0] + n[1]) == n[2]
        return x + n[0] + n[1] == n[2] * (x + n[1])

    def heads_legs(text, n, x):
        legs = {"rabbits": (2, 4), "tricycles": (2, 3), "stools": (3, 4), "ants": (6, 8)}
        few, many = next(legs[kind] for kind in legs if kind in text)
        return [b for b in range(int(n[0]) + 1) if few * (n[0] - b) + many * b == n[1]] == [x]

    def two_legs(text, n, x):
        times = (n[0], n[2]) if "hour at" in text or "hours at" in text else (n[0] / n[1], n[2] / n[3])
        return sum(t * (v - x) for t, v in zip(times, (n[1], n[3]), strict=True)) == 0  # gains and losses balance

    def meet(text, n, x):
        return n[1] * x + n[2] * x == n[0] if "towards" in text else n[0] * (n[1] + x) == n[2] * x

    def elapsed(text, n, x):
        start, end = (datetime.strptime(t, "%I:%M %p") for t in re.findall(r"\d+:\d+ [AP]M", text))
        return (end - start).total_seconds() == 60 * x

    def rectangle(text, n, x):
        more, around = n if "garden" in text else n[::-1]
        return [w * (w + more) for w in range(1, int(around)) if w + w + more + w + w + more == around] == [x]

    return {
        "consecutive": consecutive,
        "ages": ages,
        "heads-legs": heads_legs,
        "two-legs": two_legs,
        "meet-or-chase": meet,
        "elapsed-time": elapsed,
        "rectangle-area": rectangle,
        "linear-undo": lambda text, n, x: n[0] * x + n[1] == n[2],
        "linear-both-sides": lambda text, n, x: n[0] + n[1] * x == n[2] + n[3] * x,
        "work-together": lambda text, n, x: x / n[0] + x / n[1] == 1,
        "triangle-angles": lambda text, n, x: (
            [max(a, n[0] * a, a + n[1]) for a in range(1, 180) if a + n[0] * a + a + n[1] == 180] == [x]
        ),
        "mixture": lambda text, n, x: (
            (n[0] * x + n[1] * n[2]) / (x + n[1]) == n[3] if "salt" in text else (n[0] * n[1] + x * n[2]) / (n[0] + x) == n[3]
        ),
    }


def _starter_counting_checks():
    """As above, for number theory, counting, probability and sums: by listing and counting."""

    def committee(text, n, x):
        boys, girls, k, j = (int(v) for v in n)
        return x == sum(
            1 for _ in itertools.product(itertools.combinations(range(boys), k), itertools.combinations(range(girls), j))
        )

    def draw_two(text, n, x):
        balls = "r" * int(n[0]) + "b" * int(n[1])
        draws = list(itertools.permutations(balls, 2))
        return x == Fraction(draws.count(("r", "r")), len(draws))

    def dice(text, n, x):
        sides = range(1, int(max(n[0], n[2])) + 1)  # "n faces numbered from 1 to n ... s"
        rolls = [a + b for a in sides for b in sides]
        return n[0] == n[2] and x == Fraction(rolls.count(int(n[3])), len(rolls))

    def pairs(text, n, x):
        size, times = n if "league" in text else n[::-1]
        return x == times * len(list(itertools.combinations(range(int(size)), 2)))

    def arithmetic(text, n, x):
        first, step, count = n
        return x == sum(first + i * step for i in range(int(count)))

    def units(text, n, x):
        base, exponent = n[1::-1] if "factors" in text else n[:2]
        return pow(int(base), int(exponent), 10) == x

    return {
        "committee": committee,
        "draw-two": draw_two,
        "dice-sum": dice,
        "pairs": pairs,
        "arithmetic-sum": arithmetic,
        "units-digit": units,
        "greatest-divisor": lambda text, n, x: x == max(d for d in range(1, 500) if n[0] % d == 0 and n[1] % d == 0),
        "least-multiple": lambda text, n, x: x == next(m for m in itertools.count(1) if m % n[0] == m % n[1] == 0),
        "two-remainders": lambda text, n, x: (
            x
            == next(
                m
                for m in itertools.count(1)
                if (m % n[1] == n[0] and m % n[3] == n[2] if "integer" in text else m % n[0] == n[1] and m % n[2] == n[3])
            )
        ),
        "divisor-count": lambda text, n, x: x == sum(n[0] % d == 0 for d in range(1, int(n[0]) + 1)),
        "count-multiples": lambda text, n, x: x == sum(m % n[2] == 0 for m in range(int(n[0]), int(n[1]) + 1)),
        "neither": lambda text, n, x: (
            x == int(n[0]) - len(set(range(int(n[1]))) | set(range(int(n[1] - n[3]), int(n[1] - n[3] + n[2]))))
        ),
    }


def _starter_expression_checks():
    """As above, for answers that are expressions: f(problem, numbers, answer text)."""

    def right_triangle(text, n, answer):
        outside, inside = re.fullmatch(r"(\d+)(?:\\sqrt\{(\d+)\})?", answer).groups(default="1")
        free = all(int(inside) % (r * r) for r in range(2, 50))
        return free and int(outside) ** 2 * int(inside) == n[0] ** 2 + n[1] ** 2

    def product(text, n, answer):
        if "patio" in text:
            return all(_starter_evaluate(answer, x=x) == (x + n[0]) * (x + n[1]) for x in range(5))
        left, right = re.findall(r"x [+-] \d+", text)
        return all(
            _starter_evaluate(answer, x=x) == _starter_evaluate(left, x=x) * _starter_evaluate(right, x=x) for x in range(-3, 5)
        )

    def nth_term(text, n, answer):
        terms = n[:4] if "sequence" in text else n[:8:2]
        return [_starter_evaluate(answer, n=i) for i in (1, 2, 3, 4)] == terms

    return {"right-triangle": right_triangle, "product-expression": product, "nth-term": nth_term}


def test_starter_answers_by_another_route():
    """Every answer again from the numbers in the text: by brute force, or by putting it back into the story."""
    plain = _starter_money_checks() | _starter_equation_checks() | _starter_counting_checks()
    written = _starter_expression_checks()
    groups = _starter_by_family("train", "test", "heldout")
    assert groups.keys() == plain.keys() | written.keys()
    for family, rows in groups.items():
        for row in rows:
            text, numbers, answer = row["problem"], _starter_numbers(row["problem"]), row["answer"]
            right = (
                written[family](text, numbers, answer)
                if family in written
                else plain[family](text, numbers, _starter_value(answer))
            )
            assert right, (row["id"], text, answer)
            if family not in written:  # the check can fail: a neighboring answer does not pass
                assert not plain[family](text, numbers, _starter_value(answer) + 1), row["id"]


def test_starter_fractions_are_in_lowest_terms_and_every_form_occurs():
    answers = [row["answer"] for row in _starter_rows("train")]
    fractions = [re.fullmatch(r"\\frac\{(\d+)\}\{(\d+)\}", a) for a in answers]
    fractions = [(int(m[1]), int(m[2])) for m in fractions if m]
    assert len(fractions) > 60 and all(math.gcd(a, b) == 1 and b > 1 for a, b in fractions)
    assert sum(bool(re.fullmatch(r"\d+", a)) for a in answers) > 300
    assert sum(bool(re.fullmatch(r"\d+\.\d\d", a)) for a in answers) >= 40
    assert sum("sqrt" in a for a in answers) >= 10
    assert sum("x^2" in a for a in answers) == 20


def test_starter_draw_raises_where_a_family_runs_out():
    starter = _starter()
    item = ((1, 2), "text", "3", "solution", {"type": "t", "strategy": "s", "steps": ["u"]})
    with pytest.raises(ValueError, match="family narrow: only 1 of 2 rows"):
        starter.draw("narrow", lambda rng: item, 0, 2)
    with pytest.raises(ValueError, match="no digit"):
        starter.draw("leaky", lambda rng: (*item[:4], {"type": "t", "strategy": "add 2", "steps": []}), 0, 1)


def test_starter_answers_are_gradable():
    """A public grader reads every form of answer and finds it equal to itself in a box, and unequal to the next one."""
    grader = pytest.importorskip("math_verify")
    rows = [rows[0] for rows in _starter_by_family("train", "heldout").values()]
    parsed = [grader.parse(f"\\boxed{{{row['answer']}}}", parsing_timeout=None) for row in rows]
    for row, left in zip(rows, parsed, strict=True):
        assert left, row["answer"]
        gold = grader.parse(f"${row['answer']}$", parsing_timeout=None)
        assert grader.verify(gold, left, timeout_seconds=None), row["answer"]
    for (row, left), (other, right) in itertools.pairwise(zip(rows, parsed, strict=True)):
        assert row["answer"] == other["answer"] or not grader.verify(left, right, timeout_seconds=None)


# ---------------------------------------------------------------------------------------------------- prepare


def _prepare_write(path, rows):
    """A jsonl file; a str among the rows is written as it stands."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def _prepare(out, command, source, *flags):
    """(the rows written, the file's entry in the manifest) of one run of data/prepare.py."""
    before = set(out.glob("*.jsonl"))
    prepare.main([command, "--source", str(source), "--out", str(out), *map(str, flags)])
    (new,) = set(out.glob("*.jsonl")) - before
    assert not list(out.glob("*.partial"))
    return [json.loads(line) for line in new.open(encoding="utf-8")], json.loads((out / "manifest.json").read_text())[new.name]


def _prepare_jsonl(tmp_path, rows, *flags, command="jsonl"):
    return _prepare(tmp_path / "out", command, _prepare_write(tmp_path / "rows.jsonl", rows), *flags)


def _prepare_sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


GSM8K_ROWS = [
    {"question": "Tom had 3 boxes of 4 pens.  How many pens?", "answer": "He had 3*4=<<3*4=12>>12 pens.\n#### 12"},
    {"question": "A car costs $1,000 and a trailer $80. Both?", "answer": "1000+80=$<<1000+80=1080>>1080\n#### 1,080"},
]


def test_prepare_gsm8k(tmp_path):
    rows, entry = _prepare_jsonl(tmp_path, GSM8K_ROWS, "--part", "test", "--sha256", "any", command="gsm8k")
    assert rows == [
        {
            "id": "gsm8k-test-0",
            "problem": "Tom had 3 boxes of 4 pens.  How many pens?",
            "answer": "12",
            "solution": "He had 3*4=12 pens.\n\nThe final answer is \\boxed{12}",
        },
        {
            "id": "gsm8k-test-1",
            "problem": "A car costs $1,000 and a trailer $80. Both?",
            "answer": "1,080",
            "solution": "1000+80=$1080\n\nThe final answer is \\boxed{1,080}",
        },
    ]
    assert entry["counts"]["read"] == entry["counts"]["kept"] == entry["counts"]["with_solution"] == 2
    assert (tmp_path / "out/test.jsonl").exists()


def test_prepare_mawps_svamp_asdiv(tmp_path):
    mawps = [{"input": "Sara 's team won 3 of 8 . Lost ?", "target": 5.0}, {"input": "Ten / 3 ?", "target": 3.33333}]
    svamp = [{"Body": "There are 6 pens in 2 groups", "Question": "How big is each?", "Answer": 3.0, "ID": "chal-7"}]
    asdiv = [
        {"body": "If she has 2 eggs,", "question": "how many? ", "answer": "2  (eggs)"},
        {"body": "A line falls.", "question": "Slope?", "answer": "-(1/3)"},
        {"body": "Bob runs.", "question": "Who?", "answer": "Bob (a boy)"},
    ]
    expected = {
        "mawps": [("Sara 's team won 3 of 8 . Lost ?", "5"), ("Ten / 3 ?", "3.33333")],
        "svamp": [("There are 6 pens in 2 groups. How big is each?", "3")],
        "asdiv": [
            ("If she has 2 eggs, how many?", "2"), ("A line falls. Slope?", "-(1/3)"), ("Bob runs. Who?", "Bob (a boy)"),
        ],
    }  # fmt: skip
    for command, source in (("mawps", mawps), ("svamp", svamp), ("asdiv", asdiv)):
        path = _prepare_write(tmp_path / f"{command}.jsonl", source)
        rows, _ = _prepare(tmp_path / command, command, path, "--sha256", "any")
        assert [(row["problem"], row["answer"]) for row in rows] == expected[command]
        assert rows[0]["id"] == {"mawps": "mawps-singleop-0", "svamp": "svamp-chal-7", "asdiv": "asdiv-0"}[command]
        assert all(set(row) == {"id", "problem", "answer"} for row in rows)


def test_prepare_math_folder_as_hendrycks_publishes_it(tmp_path, capsys):
    texts = {
        "train/algebra/2.json": ("Solve $x+1=3$.", "We get $x=2$, so \\boxed{2}."),
        "train/algebra/10.json": ("Halve $1$.", "A box in a box: $\\boxed{\\frac{1}{2}}$."),
        "train/geometry/1.json": ("Draw it.", "No answer here."),
    }
    for name, (problem, solution) in texts.items():
        path = tmp_path / "MATH" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"problem": problem, "level": "Level 1", "type": "x", "solution": solution}))
    rows, entry = _prepare(tmp_path / "out", "math", tmp_path / "MATH")
    assert [(row["id"], row["answer"], row["solution"]) for row in rows] == [
        ("math-train-train/algebra/10", "\\frac{1}{2}", "A box in a box: $\\boxed{\\frac{1}{2}}$."),
        ("math-train-train/algebra/2", "2", "We get $x=2$, so \\boxed{2}."),
    ]
    assert [e["where"] for e in entry["dropped"]["its answer is empty"]] == ["train/geometry/1.json"]
    listing = "".join(f"{_prepare_sha256(tmp_path / 'MATH' / name)}  {name}\n" for name in sorted(texts))
    assert entry["source"]["sha256"] == hashlib.sha256(listing.encode()).hexdigest()
    assert "train/geometry/1.json: math-train-train/geometry/1" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="a folder without .json files"):
        _prepare(tmp_path / "new", "math", tmp_path / "empty")
    with pytest.raises(ValueError, match="a folder, expected a file"):
        _prepare(tmp_path / "new", "gsm8k", tmp_path / "empty")


def test_prepare_columns_by_name_and_what_train_reads(tmp_path, worker):
    tiny = [json.loads(line) for line in (ROOT / "data/tiny/train.jsonl").open()][:30]
    source = [{"q": r["problem"], "a": int(r["answer"]), "s": r["solution"], "key": i} for i, r in enumerate(tiny)]
    flags = "--problem_column q --answer_column a --solution_column s --id_column key --need_solution".split()
    rows, _ = _prepare_jsonl(tmp_path, source, *flags)
    for row, r, i in zip(rows, tiny, range(30), strict=True):
        assert row == {"id": f"jsonl-train-{i}", "problem": r["problem"], "answer": r["answer"], "solution": r["solution"]}
    flags = ["--data", tmp_path / "out/train.jsonl", "--method", "luffy", "--sft_fraction", 0.5]
    _, examples = make_run(tmp_path, worker, *flags)
    assert len(examples) == 30 and all(example.solution_ids for example in examples)


PREPARE_ANSWERS = [
    ("$\\boxed{45}$", "45"), ("\\boxed{204}", "204"), ("045", "45"), ("4.0", "4"), (4.0, "4"), (7, "7"), ("-07", "-7"),
    ("0", "0"), ("-0.0", "0"), ("000", "0"), ("100.00", "100"), ("100", "100"), (3.33333, "3.33333"), (1e20, "1" + "0" * 20),
    # left alone: money, separators, and what is not a plain number
    ("2.50", "2.50"), ("0.5", "0.5"), ("1,080", "1,080"), ("05/06", "05/06"), ("4.0\\pi", "4.0\\pi"), ("x=4.0", "x=4.0"),
    ("$90^\\circ$", "90^\\circ"), ("$1$,$2$", "$1$,$2$"), ("4.", "4"), ("12:05", "12:05"), ("010_2", "010_2"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "expected"), PREPARE_ANSWERS)
def test_prepare_answers_are_shortened_only_where_it_is_safe(value, expected, worker):
    assert prepare.clean_answer(value) == expected
    assert same_answer(expected, str(value), worker) or value == "-0.0"


PREPARE_BAD_ROWS = [
    ("gsm8k", '{"question": "2', "not JSON (", "'{\"question\": \"2'"),
    ("gsm8k", "", "not JSON (", "''"),
    ("gsm8k", "[1, 2]", "expected an object", "[1, 2]"),
    ("gsm8k", {"question": "2?"}, "column 'answer' is missing", "['question']"),
    ("gsm8k", {"question": 2, "answer": "#### 2"}, "column 'question' must be str, got int", "2"),
    ("gsm8k", {"question": " ", "answer": "#### 2"}, "column 'question' is empty", "' '"),
    ("gsm8k", {"question": "2?", "answer": "two"}, "no '####'", "'two'"),
    ("mawps", {"input": "2?", "target": None}, "column 'target' must be str or int or float, got NoneType", "None"),
    ("mawps", {"input": "2?", "target": True}, "column 'target' must be str or int or float, got bool", "True"),
    ("mawps", {"input": "2?", "target": math.nan}, "not a finite number", "nan"),
    ("math", {"problem": "2?"}, "column 'solution' is missing", "['problem']"),
    ("math", {"problem": "2?", "answer": ["2"]}, "column 'answer' must be str, got list", "['2']"),
    ("openr1", {"prompt": "2?"}, "column 'reward_model' is missing", "['prompt']"),
    ("openr1", {"prompt": "2?", "reward_model": {}}, "column 'ground_truth' is missing", "[]"),
    ("openr1", {"prompt": "2?", "reward_model": {"ground_truth": "2"}}, "column 'prompt' must be list, got str", "'2?'"),
    ("math500", {"prompt": 2, "answer": "2"}, "column 'prompt' must be str, got int", "2"),
]  # fmt: skip
PREPARE_GOOD_ROWS = {
    "gsm8k": GSM8K_ROWS[0], "mawps": {"input": "1?", "target": 1}, "math": {"problem": "1?", "answer": "1"},
    "math500": {"prompt": "1?", "answer": "1"},
    "openr1": {"prompt": [{"role": "user", "content": "1?"}], "reward_model": {"ground_truth": "1"}, "target": None},
}  # fmt: skip


@pytest.mark.parametrize(("command", "row", "message", "value"), PREPARE_BAD_ROWS)
def test_prepare_names_file_line_and_value_and_writes_nothing(command, row, message, value, tmp_path):
    good = PREPARE_GOOD_ROWS[command]
    with pytest.raises(ValueError) as error:
        _prepare_jsonl(tmp_path, [good, row, good], "--sha256", "any", command=command)
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{tmp_path / 'rows.jsonl'}: line 2: ") and message in line and value in line
    assert not (tmp_path / "out").exists()


def test_prepare_reports_twenty_bad_rows_and_reads_arrays(tmp_path):
    path = tmp_path / "array.jsonl"
    path.write_text(json.dumps([{"problem": "1?", "answer": 1}] + [{"problem": f"{i}?"} for i in range(25)]))
    with pytest.raises(ValueError) as error:
        _prepare(tmp_path / "out", "jsonl", path)
    lines = str(error.value).splitlines()
    assert [line.split(": ")[1] for line in lines[:20]] == [f"row {i}" for i in range(2, 22)]
    assert lines[20:] == ["... and 5 more"]
    for content, message in (("[1, ", "array.jsonl: not JSON"), ("", "no rows for jsonl among 0"), ("[]", "no rows")):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            _prepare(tmp_path / "out", "jsonl", path)
    path.write_text(json.dumps([{"problem": "1?", "answer": 1}, {"problem": "2?", "answer": 2.0}]))
    assert [row["answer"] for row in _prepare(tmp_path / "out", "jsonl", path)[0]] == ["1", "2"]


def test_prepare_repeats_and_contradictions(tmp_path, capsys):
    source = [
        {"problem": "Find $\\dfrac12$ of  8 .", "answer": "4"},
        {"problem": "find $\\frac12$ of 8.", "answer": "4.0"},  # the same but for blanks, case and \dfrac
        {"problem": "Is $x^2-1$ prime?", "answer": "no"},
        {"problem": "Is $x^2+1$ prime?", "answer": "yes"},  # a sign apart: another problem
        {"problem": "What is 5²?", "answer": "25"},
        {"problem": "What is 52?", "answer": "52"},
        {"problem": "Bob\u2019s age?", "answer": "7"},
        {"problem": "Bob's age?", "answer": "8"},  # the same problem with another answer
        {"problem": "Bob's  age?", "answer": "7"},
    ]
    rows, entry = _prepare_jsonl(tmp_path, source)
    assert [row["id"] for row in rows] == [f"jsonl-train-{i}" for i in (0, 2, 3, 4, 5)]
    assert entry["counts"]["dropped"] == {"repeats a problem": 1, "same problem with different answers": 3}
    assert entry["counts"]["distinct"] == 6 and entry["counts"]["read"] == 9
    (repeat,) = entry["dropped"]["repeats a problem"]
    assert repeat == {"where": "line 2", "id": "jsonl-train-1", "value": "jsonl-train-0"}
    assert [e["value"] for e in entry["dropped"]["same problem with different answers"]] == ["7", "8", "7"]
    printed = capsys.readouterr().out
    assert "dropped 3: same problem with different answers\n    line 7: jsonl-train-6: '7'" in printed


def test_prepare_drops_answers_that_cannot_be_graded(tmp_path, capsys):
    source = [
        {"problem": "a?", "answer": "3 +"}, {"problem": "b?", "answer": "$\\boxed{045}$"}, {"problem": "c?", "answer": ""},
        {"problem": "d?", "answer": "see above, it follows from the lemma and then from this"},
    ]  # fmt: skip
    rows, entry = _prepare_jsonl(tmp_path, source)
    assert [(row["problem"], row["answer"]) for row in rows] == [("b?", "45")]
    assert {reason: [e["where"] for e in entries] for reason, entries in entry["dropped"].items()} == {
        "its answer cannot be read as numbers, an expression or a few words": ["line 1"],
        "its answer is empty": ["line 3"],
        "its answer is prose": ["line 4"],
    }
    assert "line 1: jsonl-train-0: '3 +'" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"0 of 1 rows can be used, 1 are needed: \{'its answer is empty': 1\}"):
        _prepare(tmp_path / "new", "jsonl", _prepare_write(tmp_path / "bad.jsonl", source[2:3]))


def test_prepare_ids_must_differ(tmp_path):
    source = [{"problem": "a?", "answer": 1, "n": "x"}, {"problem": "b?", "answer": 2, "n": "x"}]
    with pytest.raises(ValueError, match="line 2: the id 'jsonl-train-x' is that of line 1 already"):
        _prepare_jsonl(tmp_path, source, "--id_column", "n")
    # a file of repeats repeats the ids too
    assert [row["id"] for row in _prepare_jsonl(tmp_path, [source[0]] * 3, "--id_column", "n")[0]] == ["jsonl-train-x"]


def test_prepare_counts_the_comparisons_that_ran_out_of_time(tmp_path, monkeypatch, capsys):
    def equal(self, gold, prediction, limit_s=None):
        self.timeouts += 1
        raise TimeoutError

    monkeypatch.setattr(MathWorker, "equal", equal)
    source = [{"problem": "1?", "answer": "x + 1", "s": "\\boxed{\\sin x}"}, {"problem": "2?", "answer": "2"}]
    _, entry = _prepare_jsonl(tmp_path, source, "--solution_column", "s")
    assert entry["counts"]["grader_timeouts"] == 1
    assert "1 comparisons of answers ran out of time and count as wrong" in capsys.readouterr().out


PREPARE_SOLUTIONS = [
    {"problem": "a?", "reasoning_trace": "<think>1 + 1 = 2</think> <answer>2</answer>", "expected_answer": "2"},
    {"problem": "b?", "reasoning_trace": "So half.\n\\end{think>\n<answer>$0.5$</answer>\n", "expected_answer": "\\frac12"},
    {"problem": "c?", "reasoning_trace": "Three.</think> <answer>3</answer>", "expected_answer": "4"},
    {"problem": "d?", "reasoning_trace": "It is \\boxed{5}.", "expected_answer": "5"},
    {"problem": "e?", "reasoning_trace": None, "expected_answer": "6"},
    {"problem": "f?", "reasoning_trace": "Nothing to say.", "expected_answer": "7"},
]


def test_prepare_solutions_are_graded(tmp_path):
    rows, entry = _prepare_jsonl(tmp_path, PREPARE_SOLUTIONS, "--sha256", "any", command="solutions")
    assert [(row["problem"], row["solution"]) for row in rows] == [
        ("a?", "1 + 1 = 2\n\nThe final answer is \\boxed{2}"),
        ("b?", "So half.\n\nThe final answer is \\boxed{0.5}"),
        ("d?", "It is \\boxed{5}."),
    ]
    wrong = entry["dropped"]["no solution: its final answer is not the row's"]
    assert [(e["where"], e["value"]) for e in wrong] == [
        ("line 3", "'3', the row's answer is '4'"), ("line 6", "None, the row's answer is '7'"),
    ]  # fmt: skip
    assert [e["where"] for e in entry["dropped"]["no solution: the source has none"]] == ["line 5"]


def test_prepare_rows_stay_without_their_wrong_solution_unless_asked(tmp_path, capsys):
    flags = "--solution_column reasoning_trace --answer_column expected_answer".split()
    rows, entry = _prepare_jsonl(tmp_path, PREPARE_SOLUTIONS, *flags)
    assert ["solution" in row for row in rows] == [True, True, False, True, False, False]
    assert entry["counts"]["solutions_missing"] == {"its final answer is not the row's": 2, "the source has none": 1}
    assert entry["counts"]["with_solution"] == 3 and entry["counts"]["kept"] == 6 and not entry["dropped"]
    assert "2 usable rows without a solution: its final answer is not the row's" in capsys.readouterr().out
    needed, _ = _prepare(tmp_path / "needed", "jsonl", tmp_path / "rows.jsonl", *flags, "--need_solution")
    assert needed == [row for row in rows if "solution" in row]


SYSTEM_MESSAGE = {"role": "system", "content": "Your task is to follow a systematic, thorough reasoning process."}


def _openr1_row(problem, answer, target, system=True):
    return {
        "data_source": "openr1", "prompt": [SYSTEM_MESSAGE] * system + [{"role": "user", "content": problem}],
        "target": target and [{"role": "assistant", "content": target}], "ability": "math",
        "reward_model": {"ground_truth": answer, "style": "rule"}, "extra_info": {"index": 0, "split": "default"},
    }  # fmt: skip


OPENR1_ROWS = [
    _openr1_row("a?", "2", "<think>\nOne and one.\n</think>\n\nThey make \\boxed{2}."),
    _openr1_row("b?", "3", "<think>\nThe box stands here: \\boxed{3}.\n</think>\n\nThree.", system=False),
    _openr1_row("c?", "4", None),
    _openr1_row("d?", "5", "<think>\nIt never ends, \\boxed{5}"),
    _openr1_row("e?", "6", "<think>\nSix.\n</think>\n\n\\boxed{7}"),
]


def test_prepare_openr1_thoughts_kept_or_stripped(tmp_path):
    kept, entry = _prepare_jsonl(tmp_path, OPENR1_ROWS, command="openr1")
    assert [row["id"] for row in kept] == [f"openr1-train-{i}" for i in range(5)]
    assert [row["problem"] + row["answer"] for row in kept] == ["a?2", "b?3", "c?4", "d?5", "e?6"]
    # whole, letter by letter: the target begins with the tag
    targets = [row["target"] and row["target"][0]["content"] for row in OPENR1_ROWS]
    assert [row.get("solution") for row in kept] == targets[:2] + [None, targets[3], None]
    assert entry["counts"]["solutions_missing"] == {"the source has none": 1, "its final answer is not the row's": 1}
    stripped, entry = _prepare(tmp_path / "strip", "openr1", tmp_path / "rows.jsonl", "--think", "strip")
    assert [row.get("solution") for row in stripped] == ["They make \\boxed{2}.", None, None, None, None]
    assert entry["counts"]["solutions_missing"] == {
        "nothing boxed behind </think>": 2, "the source has none": 1, "its final answer is not the row's": 1,
    }  # fmt: skip
    needed, _ = _prepare(tmp_path / "needed", "openr1", tmp_path / "rows.jsonl", "--need_solution")
    assert [row["problem"] for row in needed] == ["a?", "b?", "d?"]


def test_prepare_openr1_takes_one_user_message_and_no_system_message(tmp_path):
    path = _prepare_write(tmp_path / "rows.jsonl", OPENR1_ROWS)
    with pytest.raises(ValueError, match="--system keep: a row has no place for a system message.*strategy.INSTRUCTION"):
        _prepare(tmp_path / "out", "openr1", path, "--system", "keep")
    bad = _openr1_row("a?", "1", None)
    for prompt, message in (
        ([*bad["prompt"], {"role": "assistant", "content": "2"}], r"not \['system', 'user', 'assistant'\]"),
        ([SYSTEM_MESSAGE], r"not \['system'\]"), (["a?"], "a list of messages, \\['a\\?'\\]"),
    ):  # fmt: skip
        _prepare_write(path, [bad | {"prompt": prompt}])
        with pytest.raises(ValueError, match=message):
            _prepare(tmp_path / "out", "openr1", path)
    _prepare_write(path, [bad | {"target": "2"}])
    with pytest.raises(ValueError, match="column 'target' must be null or a list of one message, '2'"):
        _prepare(tmp_path / "out", "openr1", path)


def test_prepare_sample_is_seeded_and_in_the_source_s_order(tmp_path):
    path = _prepare_write(tmp_path / "rows.jsonl", [{"problem": f"What is {i}?", "answer": i} for i in range(50)])
    rows, entry = _prepare(tmp_path / "a", "jsonl", path, "--count", 20, "--seed", 3)
    assert [int(row["answer"]) for row in rows] == sorted(random.Random(3).sample(range(50), 20))
    assert entry["seed"] == 3 and entry["counts"]["usable"] == 50 and entry["counts"]["kept"] == 20
    other, _ = _prepare(tmp_path / "b", "jsonl", path, "--count", 20, "--seed", 4)
    assert other != rows
    with pytest.raises(ValueError, match="50 of 50 rows can be used, 51 are needed"):
        _prepare(tmp_path / "c", "jsonl", path, "--count", 51)
    with pytest.raises(ValueError, match="--count must be at least 1, got 0"):
        _prepare(tmp_path / "c", "jsonl", path, "--count", 0)
    assert not (tmp_path / "c").exists()


def test_prepare_overlap_by_hand():
    words = "one two three four five six seven eight nine ten".split()
    base = " ".join(words)
    others = {"t": base, "short": "Find x."}
    problems = [
        base.upper() + " ",  # the same text
        " ".join(words[:9]) + " zehn",  # 5 of 6 five-word runs shared, 7 in all: 0.714
        " ".join(words[:8]) + " neun zehn",  # 4 of 8: exactly 0.5
        " ".join(words[:7]) + " acht neun zehn",  # 3 of 9
        " ".join(words) + " " + " ".join(f"w{i}" for i in range(6)),  # 6 of 12
        " ".join(words) + " " + " ".join(f"w{i}" for i in range(7)),  # 6 of 13
        "find X", "Find y.", "?", "",
    ]  # fmt: skip
    assert prepare.find_overlap(problems, others) == {
        0: ("t", 1.0), 1: ("t", 0.714), 2: ("t", 0.5), 4: ("t", 0.5), 6: ("short", 1.0),
    }  # fmt: skip


def test_prepare_overlap_looks_past_drawings():
    text = "Two circles touch at P. Find the distance of their centres."
    others = {"t": text + " [asy] size(3cm); draw(circle((0,0), 1)); [/asy]"}
    problems = [text, f"{text}\n[asy]\ndot((0,0));\n[/asy] [asy]x[/asy]"]
    assert prepare.find_overlap(problems, others) == {0: ("t", 1.0), 1: ("t", 1.0)}
    assert not prepare.find_overlap(["[asy] size(3cm); draw(circle((0,0), 1)); [/asy]"], others)


def test_prepare_overlap_against_a_slow_loop():
    rng = random.Random(0)

    def text():
        return " ".join(rng.choice("a b $c$ \\frac{d}{e} 12,".split()) for _ in range(rng.randint(1, 14)))

    def runs(words):
        return {" ".join(words[i : i + 5]) for i in range(len(words) - 4)} or {" ".join(words)}

    problems, others = [text() for _ in range(60)], {f"t{i}": text() for i in range(60)}
    problems += [value + " a" for value in list(others.values())[:20]]
    expected = {}
    for i, problem in enumerate(problems):
        a = runs(re.findall("[a-z0-9]+", problem))
        scores = {}
        for key, other in others.items():
            b = runs(re.findall("[a-z0-9]+", other))
            scores[key] = len(a & b) / len(a | b)
        if max(scores.values()) >= 0.5:
            expected[i] = round(max(scores.values()), 3)
    found = prepare.find_overlap(problems, others)
    assert {i: similarity for i, (_, similarity) in found.items()} == expected
    assert 15 < len(expected) < 70


def test_prepare_against_removes_and_records(tmp_path):
    text = "A train leaves the station at noon and travels north at forty miles per hour for three hours. How far does it go?"
    test = [{"id": "t0", "problem": text, "answer": "120"}, {"id": "t1", "problem": "What is 1 + 1?", "answer": "2"}]
    against, second = (_prepare_write(tmp_path / f"test{i}.jsonl", test[i : i + 1]) for i in range(2))
    source = [
        {"problem": text.replace("forty", "sixty"), "answer": "180"},
        {"problem": "what is 1 + 1 ?", "answer": "2"},
        {"problem": "A train leaves town at noon. How far does it go?", "answer": "5"},
        {"problem": "What is 1 + 2?", "answer": "3"},
    ]
    rows, entry = _prepare_jsonl(tmp_path, source, "--against", against, second)
    assert [row["id"] for row in rows] == ["jsonl-train-2", "jsonl-train-3"]
    assert entry["dropped"]["is in a file of --against"] == [
        {"where": "line 2", "id": "jsonl-train-1", "value": f"{second}: t1", "similarity": 1.0}
    ]
    (near,) = entry["dropped"]["is nearly in a file of --against"]
    # 23 words, so 19 runs; the changed word stands in five of them: 14 / (19 + 19 - 14)
    assert len(text.split()) == 23 and near == {
        "where": "line 1", "id": "jsonl-train-0", "value": f"{against}: t0", "similarity": round(14 / 24, 3)
    }  # fmt: skip
    assert entry["against"] == [
        {"path": str(path), "sha256": _prepare_sha256(path), "rows": 1} for path in (against, second)
    ]  # fmt: skip
    assert entry["near_duplicate"] == {"shingle_words": 5, "jaccard": 0.5}
    for bad, message in ((tmp_path / "none.jsonl", "no such file"), (tmp_path / "rows.jsonl", "field 'id' is missing")):
        with pytest.raises(ValueError, match=message):
            _prepare(tmp_path / "new", "jsonl", tmp_path / "rows.jsonl", "--against", bad)
        assert not (tmp_path / "new").exists()


def test_prepare_manifest_accounts_for_every_row(tmp_path, capsys):
    source = [{"problem": f"{i % 7}?", "answer": str(i % 7) if i != 3 else ""} for i in range(20)]
    path = _prepare_write(tmp_path / "rows.jsonl", source)
    rows, entry = _prepare(tmp_path / "out", "jsonl", path, "--count", 4, "--seed", 1, "--part", "mine")
    counts = entry["counts"]
    assert counts["read"] == 20 == counts["usable"] + sum(counts["dropped"].values())
    assert counts["kept"] == 4 == len(rows)
    assert counts["dropped"] == {reason: len(entries) for reason, entries in entry["dropped"].items()}
    assert entry["sha256"] == _prepare_sha256(tmp_path / "out/mine.jsonl")
    assert entry["source"] == {"path": str(path), "sha256": _prepare_sha256(path), "repo": None, "revision": None}
    typed = f"python data/prepare.py jsonl --source {path} --out {tmp_path / 'out'} --count 4 --seed 1 --part mine"
    assert entry["command"] == typed
    assert entry["versions"]["python"] == sys.version.split()[0] and "math-verify" in entry["versions"]
    printed = capsys.readouterr().out
    assert _prepare_sha256(path) in printed and "mine.jsonl: 4 rows, 0 with a solution, of 20 read" in printed
    # a second file in the same folder joins the manifest; the same file again is refused
    _prepare(tmp_path / "out", "jsonl", path, "--part", "more")
    assert set(json.loads((tmp_path / "out/manifest.json").read_text())) == {"mine.jsonl", "more.jsonl"}
    before = (tmp_path / "out/mine.jsonl").read_bytes()
    with pytest.raises(ValueError, match="mine.jsonl: already there"):
        prepare.main(["jsonl", "--source", str(path), "--out", str(tmp_path / "out"), "--part", "mine"])
    assert (tmp_path / "out/mine.jsonl").read_bytes() == before


def test_prepare_leaves_nothing_behind_where_the_loader_refuses_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "why_unusable", lambda answer: "")  # a filter that lets everything through
    with pytest.raises(ValueError, match="field 'answer' cannot be read"):
        _prepare_jsonl(tmp_path, [{"problem": "1?", "answer": "3 +"}])
    monkeypatch.setattr(prepare, "normal_text", lambda text: text)  # and one that is finer than the loader's
    with pytest.raises(ValueError, match="2 rows were written, but load_problems reads 1"):
        _prepare_jsonl(tmp_path, [{"problem": "1 ?", "answer": 1}, {"problem": "1  ?", "answer": 1}])
    assert not list((tmp_path / "out").iterdir())


def test_prepare_refuses_another_file_than_the_pinned_one(tmp_path):
    path = _prepare_write(tmp_path / "train.jsonl", GSM8K_ROWS)
    ours, pinned = _prepare_sha256(path), "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"
    with pytest.raises(ValueError) as error:
        _prepare(tmp_path / "out", "gsm8k", path)
    assert f"sha256 {ours}, expected {pinned} (openai/grade-school-math" in str(error.value)
    with pytest.raises(ValueError, match=f"sha256 {ours}, expected {'0' * 64}"):
        _prepare(tmp_path / "out", "gsm8k", path, "--sha256", "0" * 64)
    with pytest.raises(ValueError, match="--sha256: expected 64 hex digits or `any`, got 'all'"):
        _prepare(tmp_path / "out", "gsm8k", path, "--sha256", "all")
    with pytest.raises(ValueError, match="--revision is for --source hub"):
        _prepare(tmp_path / "out", "gsm8k", path, "--revision", "0" * 40)
    with pytest.raises(ValueError, match="no such file"):
        _prepare(tmp_path / "out", "gsm8k", tmp_path / "none.jsonl")
    assert not (tmp_path / "out").exists()
    assert len(_prepare(tmp_path / "out", "gsm8k", path, "--sha256", ours)[0]) == 2


def test_prepare_table_of_sources():
    assert {source.command for source in prepare.SOURCES} == set(prepare.LAYOUTS) - {"jsonl"}
    for source in prepare.SOURCES:
        for value, digits in ((source.revision, 40), (source.sha256, 64)):
            assert re.fullmatch(f"[0-9a-f]{{{digits}}}", value) if source.command != "openr1" else value is None


@pytest.fixture
def raw_host(monkeypatch):
    """A local server in GitHub's place: {path: bytes} that it serves, and the list of paths asked for."""
    files, asked = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200 if self.path in files else 404)
            self.end_headers()
            self.wfile.write(files.get(self.path, b""))

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(prepare, "GITHUB", f"http://127.0.0.1:{server.server_port}")
    yield files, asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_prepare_downloads_at_the_pinned_commit(tmp_path, raw_host):
    files, asked = raw_host
    content = "".join(json.dumps(row) + "\n" for row in GSM8K_ROWS).encode()
    commit, other = "3101c7d5072418e28b9008a6636bde82a006892c", "0123456789" * 4
    files.update({f"/openai/grade-school-math/{c}/grade_school_math/data/train.jsonl": content for c in (commit, other)})
    with pytest.raises(ValueError, match=f"sha256 {hashlib.sha256(content).hexdigest()}, expected 17f347dc"):
        _prepare(tmp_path / "out", "gsm8k", "hub")
    rows, entry = _prepare(tmp_path / "out", "gsm8k", "hub", "--revision", other, "--sha256", "any")
    assert len(rows) == 2 and [path.split("/")[3] for path in asked] == [commit, other]
    assert entry["source"] == {
        "path": "hub", "sha256": hashlib.sha256(content).hexdigest(), "host": "github", "repo": "openai/grade-school-math",
        "file": "grade_school_math/data/train.jsonl", "revision": other,
    }  # fmt: skip
    with pytest.raises(ValueError, match="already there"):  # said before the file is fetched again
        _prepare(tmp_path / "out", "gsm8k", "hub")
    assert len(asked) == 2
    with pytest.raises(ValueError, match="svamp/test.jsonl at a45202bd.* could not be downloaded .*404.*--source FILE"):
        _prepare(tmp_path / "new", "svamp", "hub")
    for revision in ("main", "3101c7d"):
        with pytest.raises(ValueError, match=f"--revision: expected a commit hash of 40 hex digits, got '{revision}'"):
            _prepare(tmp_path / "new", "gsm8k", "hub", "--revision", revision)
    with pytest.raises(ValueError, match="math --part test is in no hub known to us"):
        _prepare(tmp_path / "new", "math", "hub", "--part", "test")
    assert not (tmp_path / "new").exists()


def test_prepare_openr1_from_the_hub_needs_a_commit_and_a_file(tmp_path, monkeypatch, capsys):
    path, commit, calls = _prepare_write(tmp_path / "rows.jsonl", OPENR1_ROWS), "ab" * 20, []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **named: calls.append((args, named)) or path)
    for flags, missing in (((), "revision"), (("--revision", commit), "file"), (("--file", "x.parquet"), "revision")):
        with pytest.raises(ValueError, match=f"the {missing} of Elliott/Openr1-Math-46k-8192 is not in the table of sources"):
            _prepare(tmp_path / "out", "openr1", "hub", *flags)
    assert not calls
    _, entry = _prepare(tmp_path / "out", "openr1", "hub", "--revision", commit, "--file", "data/x.parquet")
    assert calls == [
        (("Elliott/Openr1-Math-46k-8192", "data/x.parquet"), {"repo_type": "dataset", "revision": commit})
    ]  # fmt: skip
    assert entry["source"]["revision"] == commit and entry["source"]["sha256"] == _prepare_sha256(path)
    assert f"revision {commit}, sha256 {_prepare_sha256(path)}" in capsys.readouterr().out


def test_prepare_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1....PAR1")
    with pytest.raises(ValueError, match="x.parquet is a parquet file, which needs a package more: pip install pyarrow"):
        _prepare(tmp_path / "out", "openr1", path)


def test_prepare_parquet_reads_like_json(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed (it is optional)")
    targets = [f"<think>\nx\n</think>\n\\boxed{{{i}}}" if i % 3 else None for i in range(600)]
    rows = [_openr1_row(f"What is {i}?", str(i), target) for i, target in enumerate(targets)]
    table = sys.modules["pyarrow"].Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=170)
    flags = ["--count", 100, "--think", "strip"]
    one, entry = _prepare(tmp_path / "a", "openr1", tmp_path / "rows.parquet", *flags)
    two, other = _prepare(tmp_path / "b", "openr1", _prepare_write(tmp_path / "rows.jsonl", rows), *flags)
    assert one == two and len(one) == 100 and entry["counts"] == other["counts"] and "pyarrow" in entry["versions"]
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "rows.parquet").read_bytes()[:500])
    with pytest.raises(ValueError, match="torn.parquet: "):
        _prepare(tmp_path / "c", "openr1", tmp_path / "torn.parquet")


def _luffy_row(name, problem, answer):
    return _openr1_row(problem, answer, None) | {"data_source": name}


def test_prepare_benchmarks_check_the_number_of_problems(tmp_path):
    """LUFFY's file in small: an aime of 30 x 8 is AIME24, an amc of 83 x 4 is not AMC23."""
    rows = [_luffy_row("aime", f"Problem {i} of AIME?", f"{i:03d}") for _ in range(8) for i in range(30)]
    rows += [_luffy_row("amc", f"Problem {i} of AMC?", f"{i}.0") for i in range(83) for _ in range(4)]
    path = _prepare_write(tmp_path / "valid.jsonl", rows)
    aime, entry = _prepare(tmp_path / "out", "aime24", path, "--sha256", "any")
    assert [row["id"] for row in aime[:2]] == ["aime24-0", "aime24-1"] and [row["answer"] for row in aime][7] == "7"
    assert len(aime) == 30 and entry["counts"]["of_another_benchmark"] == 332
    assert entry["counts"]["dropped"] == {"repeats a problem": 210}
    with pytest.raises(ValueError, match="83 distinct problems in 332 rows, but amc23 has 40. .*83 problems"):
        _prepare(tmp_path / "out", "amc23", path, "--sha256", "any")
    with pytest.raises(ValueError, match="no rows for aime25 among 572"):
        _prepare(tmp_path / "out", "aime25", path, "--sha256", "any")


def test_prepare_command_line(tmp_path):
    path = _prepare_write(tmp_path / "rows.jsonl", [{"problem": "1?", "answer": 1}])
    command = [sys.executable, "data/prepare.py", "jsonl", "--source", str(path), "--out", str(tmp_path / "out")]
    prepare.main(command[2:])
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("prepare.py: ") and "already there" in done.stderr, done.stderr
    for flags in (["--cuont", "1"], ["--coun", "1"], ["--think", "keep"]):  # a typo, an abbreviation, openr1's own
        with pytest.raises(SystemExit):
            prepare.main([*command[2:5], "--out", str(tmp_path / "new"), *flags])
    imported = run_script("-X", "importtime", "data/prepare.py", "--help").stderr
    assert "data.problems" in imported and "torch" not in imported


# Real files: counted and looked at by hand.


def _real_sum(command, part):
    """The checksum of the file that `--source hub` would fetch."""
    return next(source.sha256 for source in prepare.SOURCES if (source.command, source.part) == (command, part))


def test_prepare_real_benchmarks(tmp_path, raw_host, real_data):
    out = tmp_path / "bench"
    prepare.main(["benchmarks", "--source", REAL_DATA, "--out", str(out)])
    rows = {path.stem: load_problems(path) for path in out.glob("*.jsonl")}
    counts = {"math500": 500, "amc23": 40, "olympiad": 674, "aime24": 30, "aime25": 30, "minerva": 272}
    assert {name: len(group) for name, group in rows.items()} == counts
    manifest = json.loads((out / "manifest.json").read_text())
    assert {name.removesuffix(".jsonl"): entry["counts"]["kept"] for name, entry in manifest.items()} == counts
    assert not any(entry["dropped"] for entry in manifest.values())
    assert {entry["source"]["revision"] for entry in manifest.values()} == {"ae332f5fa4dc8b4c3d3cd77ebc9cff3a3abab2d0"}
    first = rows["math500"][0]
    assert first.id == "math500-test/precalculus/807.json" and first.answer == "\\left( 3, \\frac{\\pi}{2} \\right)"
    assert first.problem.startswith("Convert the point $(0,3)$ in rectangular coordinates to polar coordinates.  Enter")
    assert (rows["aime24"][0].answer, rows["aime25"][0].answer, rows["amc23"][0].answer) == ("204", "70", "27")
    assert rows["aime25"][0].problem == (
        "Find the sum of all integer bases $b>9$ for which $17_b$ is a divisor of $97_b.$"
    )  # fmt: skip
    assert [row.answer for row in rows["olympiad"][:3]] == ["2", "\\frac{1}{2 n+2}", "2^{1009}"]
    assert [row.answer for row in rows["minerva"][:3]] == ["1.6", "4.5e33", "41.8"]
    # from the hub the same bytes
    files, asked = raw_host
    names = {"math500": "MATH-500", "olympiad": "Olympiad-Bench", "minerva": "Minerva"}
    for command in counts:
        name = names.get(command, command.upper())
        path = f"/TsinghuaC3I/Unify-Post-Training/ae332f5fa4dc8b4c3d3cd77ebc9cff3a3abab2d0/data/{name}/test.json"
        files[path] = real_data[manifest[f"{command}.jsonl"]["source"]["sha256"]].read_bytes()
    prepare.main(["benchmarks", "--source", "hub", "--out", str(tmp_path / "hub")])
    assert sorted(asked) == sorted(files)
    for command in counts:
        assert (tmp_path / f"hub/{command}.jsonl").read_bytes() == (out / f"{command}.jsonl").read_bytes()
    # cut off behind the second file, or one of them changed: the same command makes what is missing, and refuses the changed
    (out / "aime24.jsonl").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.jsonl")}
    prepare.main(["benchmarks", "--source", REAL_DATA, "--out", str(out)])
    assert load_problems(out / "aime24.jsonl") == rows["aime24"]
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in out.glob("*.jsonl")}.items()
    write_rows(out / "amc23.jsonl", tiny_rows(1))
    with pytest.raises(ValueError, match="amc23.jsonl: already there; remove it"):
        prepare.main(["benchmarks", "--source", REAL_DATA, "--out", str(out)])
    with pytest.raises(ValueError) as error:
        prepare.main(["benchmarks", "--source", str(out), "--out", str(tmp_path / "new")])
    assert "no file with the checksum of" in str(error.value) and len(str(error.value).splitlines()) == 7


def test_prepare_real_luffy_validation_file(tmp_path, real_data):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed (it is optional)")
    file, out = real_data[prepare.LUFFY_VALID], tmp_path / "out"
    for command, count in (("aime24", 30), ("math500", 500), ("minerva", 272)):
        rows, entry = _prepare(out, command, file)
        assert len(rows) == count and entry["counts"]["read"] == 2019
        assert entry["counts"]["dropped"] == ({"repeats a problem": 210} if command == "aime24" else {})
        assert rows[0]["problem"].split()[0] == {"aime24": "Every", "math500": "Convert", "minerva": "Each"}[command]
    # the other copy of AIME24: five texts differ (drawings, blanks), and all thirty are found
    ours, _ = _prepare(tmp_path / "ours", "aime24", real_data[_real_sum("aime24", "aime24")])
    theirs = load_problems(out / "aime24.jsonl")
    same = {prepare.normal_text(row["problem"]) for row in ours} & {prepare.normal_text(row.problem) for row in theirs}
    found = prepare.find_overlap([row.problem for row in theirs], {row["id"]: row["problem"] for row in ours})
    assert len(same) == 25 and len(found) == len({key for key, _ in found.values()}) == 30
    answers = {row["id"]: row["answer"] for row in ours}
    assert all(answers[key] == theirs[i].answer for i, (key, _) in found.items())
    for command, what in (("amc23", "83 distinct problems in 332 rows"), ("olympiad", "675 distinct problems in 675 rows")):
        with pytest.raises(ValueError, match="This is LUFFY's validation file"):
            _prepare(out, command, file)
        with pytest.raises(ValueError, match=what):
            _prepare(out, command, file, "--sha256", "any")


# (command, part): (repository and commit, rows read, rows kept, what is dropped, the first row's answer and problem)
REAL_TRAINING_FILES = {
    ("gsm8k", "test"): ("openai/grade-school-math@3101c7d5", 1319, 1319, {}, "18", "Janet’s ducks lay 16 eggs"),
    ("gsm8k", "train"): (
        "openai/grade-school-math@3101c7d5", 7473, 7471, {"is nearly in a file of --against": 2},
        "72", "Natalia sold clips to 48 of her friends in April",
    ),
    ("mawps", "singleop"): ("QwenLM/Qwen2.5-Math@a45202bd", 562, 531, {"repeats a problem": 31}, "14", "If there are 7"),
    ("mawps", "addsub"): ("QwenLM/Qwen2.5-Math@a45202bd", 395, 395, {}, "43", "Joan found 70 seashells"),
    ("mawps", "multiarith"): (
        "QwenLM/Qwen2.5-Math@a45202bd", 600, 580, {"repeats a problem": 20},
        "39", "For Halloween Debby and her sister combined",
    ),
    ("svamp", "svamp"): ("QwenLM/Qwen2.5-Math@a45202bd", 1000, 1000, {}, "145", "There are 87 oranges"),
    ("asdiv", "asdiv"): (
        "QwenLM/Qwen2.5-Math@a45202bd", 2215, 2214, {"repeats a problem": 1},
        "9", "Seven red apples and two green apples are in the basket. How many apples are in the basket?",
    ),
    ("math", "train"): (
        "fadibenz/llm-alignment-reasoning-RL@377d6e5b", 7500, 7497, {"repeats a problem": 1, "its answer is empty": 2},
        "16", "Chandra has four",
    ),
    ("solutions", "train"): (
        "desirepathh/assignment5-alignment@d789558c", 4836, 4708,
        {"repeats a problem": 1, "its answer is empty": 1, "no solution: its final answer is not the row's": 126},
        "\\frac{\\sqrt{2}}{2}", "Compute $",
    ),
}  # fmt: skip


def test_prepare_real_training_files(tmp_path, real_data):
    rows, dropped = {}, {}
    for (command, part), (origin, read, kept, reasons, answer, problem) in REAL_TRAINING_FILES.items():
        flags = ["--part", part] if command in prepare.PARTS else []
        flags += ["--against", tmp_path / "gsm8k/test.jsonl"] if (command, part) == ("gsm8k", "train") else []
        rows[command, part], entry = _prepare(tmp_path / command, command, real_data[_real_sum(command, part)], *flags)
        first, dropped[command, part] = rows[command, part][0], entry["dropped"]
        assert f"{entry['source']['repo']}@{entry['source']['revision'][:8]}" == origin
        assert (entry["counts"]["read"], len(rows[command, part]), entry["counts"]["dropped"]) == (read, kept, reasons)
        assert first["answer"] == answer and first["problem"].startswith(problem)
    # "A train travels 270 miles in 3 hours. At the same rate ...": of its 21 runs, six hold one of the three changed words
    near = dropped["gsm8k", "train"]["is nearly in a file of --against"]
    assert [e["where"] for e in near] == ["line 1315", "line 5163"]
    assert {e["similarity"] for e in near} == {round(15 / 27, 3)}
    assert [e["where"] for e in dropped["math", "train"]["its answer is empty"]] == ["line 7037", "line 7437"]
    assert rows["math", "train"][0]["id"] == "math-train-0"
    assert rows["gsm8k", "train"][0]["solution"] == (
        "Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether in April and May."
        "\n\nThe final answer is \\boxed{72}"
    )
    assert not any("<<" in row["solution"] or "####" in row["solution"] for row in rows["gsm8k", "train"])
    solved = [row["solution"] for row in rows["solutions", "train"]]
    assert solved[0].endswith("= 1/√2 = √2/2.\n\nThe final answer is \\boxed{√2/2}")
    assert not any("think>" in text or "<answer>" in text for text in solved)


# ---------------------------------------------------------------------------------------------------- recipe


def strong_model(rows, handler, body, number):
    """For ChatServer: answers with the row's own strategy, and with 0.8 for every criterion where it is asked for scores."""
    text = body["messages"][0]["content"]
    if "Score the attempts" in text:
        return "\n".join(f"{i}: 0.8 0.8 0.8 0.8" for i in range(1, text.count("<candidate ") + 1))
    strategy = next(row["strategy"] for problem, row in rows.items() if problem in text)
    return format_strategy(Strategy.from_dict(strategy))


def test_the_recipe_runs_at_toy_size_and_passes_over_what_is_done(tmp_path):
    """runs/recipe.sh, which runs/paper_7b.sh and its like set the variables of, from raw rows to the comparison."""
    rows = {row["problem"]: row for row in tiny_rows(14)}
    raw = [{"question": row["problem"], "answer": row["answer"], "worked": row["solution"]} for row in rows.values()]
    test = write_rows(tmp_path / "test.jsonl", [tiny_world.make_rows(0)["test"][0]])

    with ChatServer(partial(strong_model, rows)) as server:
        variables = {
            "WORK": tmp_path / "work", "MODEL": TINY_BASE, "PYTHON": sys.executable, "LAUNCH": sys.executable,
            "BENCH_SOURCE": "none", "EVAL_FILES": test, "TRAIN_COMMAND": "jsonl",
            "TRAIN_SOURCE": write_rows(tmp_path / "raw.jsonl", raw),
            "TRAIN_FLAGS": "--problem_column question --solution_column worked --count 12",
            "STRATEGY_FLAGS": f"--endpoint {server.url} --model strong --quiet --candidates 2",
            "RUN_FLAGS": "--steps 1 --problems_per_step 2 --max_new_tokens 24 --eval_every 0 --device cpu "
            "--sft_batch 4 --sft_epochs 1",
            "EVAL_FLAGS": "--n 2 --max_new_tokens 24 --device cpu",
        }  # fmt: skip
        settings = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in variables.items()}}
        asked = []
        for _ in range(2):
            done = subprocess.run(["bash", "runs/recipe.sh"], cwd=ROOT, env=settings, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            asked.append(len(server.requests))
        assert asked[0] == asked[1] >= 12
    assert "the run in" in done.stdout and "is finished" in done.stdout
    assert {row.problem for row in load_problems(tmp_path / "work/strategies.jsonl")} <= set(rows)
    first, *_, last = read_metrics(tmp_path / "work/run")
    assert first["config"]["data"].endswith("strategies.jsonl") and last["stage"] == "sgpo"
    for name in ("base.json", "trained.json", "run/model/config.json"):
        assert (tmp_path / "work" / name).exists()

    def refused(**changes):
        now = {name: value for name, value in (settings | changes).items() if value is not None}
        done = subprocess.run(["bash", "runs/recipe.sh"], cwd=ROOT, env=now, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    for changes, status, words in (
        ({"TRAIN_FLAGS": None}, 2, "the variable TRAIN_FLAGS is not set"),
        ({"EVAL_FILES": None}, 2, "the variable EVAL_FILES is not set"),
        ({"TRAIN_FLAGS": "--count 9"}, 2, "was made with other settings; name another WORK"),
    ):
        got, said = refused(**changes)
        assert got == status and words in said, said
    shutil.rmtree(tmp_path / "work/run/model")  # training that SIGTERM ended: exit status 0, but there is no model
    got, said = refused(LAUNCH="true")
    assert got == 1 and "training goes on with what it began with" in said and "stopped before its end" in said
    shutil.rmtree(tmp_path / "work/run")
    got, said = refused(LAUNCH="true", STRATEGY_FLAGS=settings["STRATEGY_FLAGS"] + " --seed 9")
    assert got == 1 and "no paid answer would fit" in said and "4/5" not in said  # the old strategies are not trained on


def test_the_recipe_does_not_train_on_the_few_rows_that_got_a_strategy(tmp_path):
    """But where one of several rows fails, it goes on: exit status 3 of strategy.py."""
    rows = {row["problem"]: row for row in tiny_rows(6)}
    first = next(iter(rows))

    def script(handler, body, number, wanted):
        if wanted(body["messages"][0]["content"]):
            return strong_model(rows, handler, body, number)
        return "I cannot."

    for number, (wanted, words) in enumerate((
        (lambda text: first in text or "Score the" in text, "fewer than half of the rows got a strategy"),
        (lambda text: first not in text, "4/5 warm-up and SGPO"),
    )):  # fmt: skip
        with ChatServer(partial(script, wanted=wanted)) as server:
            variables = {
                "WORK": tmp_path / f"work{number}", "MODEL": "m", "PYTHON": sys.executable, "LAUNCH": "true",
                "BENCH_SOURCE": "none", "EVAL_FILES": write_rows(tmp_path / "test.jsonl", tiny_rows(20)[-1:]),
                "TRAIN_COMMAND": "jsonl", "TRAIN_SOURCE": write_rows(tmp_path / "raw.jsonl", list(rows.values())),
                "TRAIN_FLAGS": "--solution_column solution", "RUN_FLAGS": "", "EVAL_FLAGS": "",
                "STRATEGY_FLAGS": f"--endpoint {server.url} --model strong --quiet --candidates 1 --rounds 1",
            }  # fmt: skip
            settings = {**os.environ, **{name: str(value) for name, value in variables.items()}}
            done = subprocess.run(["bash", "runs/recipe.sh"], cwd=ROOT, env=settings, capture_output=True, text=True)
        assert done.returncode == 1 and words in done.stdout + done.stderr, done.stdout + done.stderr
        assert (number == 1) == ("4/5" in done.stdout) and "rows failed, reasons above" in done.stderr


def test_the_papers_recipe_runs_at_toy_size_on_two_ranks(tmp_path):
    """runs/paper_1p5b.sh, and with it paper_7b.sh and recipe.sh, from LUFFY's layout to the table. The benchmarks are there."""
    rows = {row["problem"]: row for row in tiny_rows(14)}
    names = ["math500", "amc23", "olympiad", "aime24", "aime25", "minerva"]
    raw = [_openr1_row(p, row["answer"], f"<think>\nhm\n</think>\n{row['solution']}") for p, row in rows.items()]
    work = tmp_path / "work"
    (work / "bench").mkdir(parents=True)
    for name in names:
        group = [{"id": f"{name}-{i}", "problem": f"Of {name}: {i} + 1?", "answer": str(i + 1)} for i in range(2)]
        write_rows(work / f"bench/{name}.jsonl", group)
    sums = {file.name: {"sha256": prepare.sha256_of(file)} for file in (work / "bench").iterdir()}
    (work / "bench/manifest.json").write_text(json.dumps(sums))
    with ChatServer(partial(strong_model, rows)) as server:
        variables = {
            "WORK": work, "MODEL": TINY_BASE, "PYTHON": sys.executable, "BENCH_SOURCE": tmp_path / "unread",
            "LAUNCH": f"{sys.executable} -m torch.distributed.run --nproc_per_node=2 --standalone --",
            "OPENR1": _prepare_write(tmp_path / "openr1.jsonl", raw), "ENDPOINT": server.url, "STRONG": "strong",
            "TRAIN_FLAGS": "--count 12 --seed 0 --need_solution --think keep",
            "RUN_FLAGS": "--steps 1 --problems_per_step 2 --max_new_tokens 16 --eval_every 0 --device cpu "
            "--sft_batch 4 --sft_epochs 1",
            "EVAL_FLAGS": "--n 1 --limit 2 --max_new_tokens 8 --device cpu",
        }  # fmt: skip
        settings = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in variables.items()}}
        done = subprocess.run(["bash", "runs/paper_1p5b.sh"], cwd=ROOT, env=settings, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert len(server.requests) >= 12 * 5  # k = 5 candidates, the default
    train_rows = load_problems(work / "train/train.jsonl")
    assert len(train_rows) == 12 and all(row.solution.startswith("<think>\nhm\n</think>\n") for row in train_rows)  # kept
    assert read_metrics(work / "run")[0]["ranks"] == 2
    for side in ("base", "trained"):
        result = json.loads((work / f"{side}.json").read_text())
        assert {Path(file).stem for file in result["files"]} == set(names)
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert table[0] == "| model | MATH500 | AMC23 | Olympiad | AIME24 | avg |"
    assert table[2].startswith(f"| {TINY_BASE} |") and table[3].startswith(f"| {work}/run/model |")
    other = "max_new_tokens 8 (paper 32768), n 1 (paper 4), problems 2 (paper 500)"
    assert f"MATH500 differs from the paper in {other}" in done.stdout


@pytest.mark.parametrize("script", ["paper_7b", "paper_1p5b", "smoke"])
def test_each_recipe_sets_every_variable(script, tmp_path):
    """With a recipe.sh in the place of the real one that checks and shows them."""
    (tmp_path / "runs").mkdir()
    for name in ("paper_7b", "paper_1p5b", "smoke"):
        shutil.copy(ROOT / f"runs/{name}.sh", tmp_path / "runs")
    check = re.search(r"^needed=.*?^done\n", (ROOT / "runs/recipe.sh").read_text(), re.M | re.S)[0]
    show = 'echo "$RUN_FLAGS" | tr " " "\n"; echo "MODEL=$MODEL LAUNCH=$LAUNCH"\n'
    (tmp_path / "runs/recipe.sh").write_text(check + show)
    write_rows(tmp_path / "rows.jsonl", tiny_rows(600))
    settings = {"PATH": os.environ["PATH"], "ENDPOINT": "http://x/v1", "STRONG": "y", "OPENR1": "z", "ROWS": "rows.jsonl"}
    if script == "smoke":
        settings["MODEL"] = str(TINY_BASE)
    done = subprocess.run(["bash", f"runs/{script}.sh"], cwd=tmp_path, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *flags, last = done.stdout.splitlines()
    cfg = train.parse_config(["--model", "x", "--data", "y", *flags])
    assert cfg.method == "sgpo" and ("torchrun" in last) == (script != "smoke")
    assert {"paper_7b": "Qwen2.5-7B-Instruct", "paper_1p5b": "Qwen2.5-1.5B-Instruct", "smoke": str(TINY_BASE)}[script] in last
    if script == "smoke":
        rows = {name: load_problems(tmp_path / f"runs/smoke/rows/{name}.jsonl") for name in ("train", "test")}
        assert len(rows["train"]) == 60 and len(rows["test"]) == 32
        assert not {row.id for row in rows["train"]} & {row.id for row in rows["test"]}
        settings["MODEL"] = "Qwen2.5-0.5B-Instruct"  # a hub's name: no folder of that name with SmolLM2's weights is made here
        done = subprocess.run(["bash", "runs/smoke.sh"], cwd=tmp_path, env=settings, capture_output=True, text=True)
        assert done.returncode == 0 and "MODEL=Qwen2.5-0.5B-Instruct" in done.stdout, done.stderr
        write_rows(tmp_path / "other.jsonl", tiny_rows(300))
        settings["ROWS"] = "other.jsonl"
        done = subprocess.run(["bash", "runs/smoke.sh"], cwd=tmp_path, env=settings, capture_output=True, text=True)
        assert done.returncode == 2 and "runs/smoke was made with other rows than other.jsonl" in done.stderr


# ---------------------------------------------------------------------------------------------------- plan


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


def live_bytes(work):
    """The most bytes that PyTorch's CPU allocator had given out at any time during `work`, beyond what it had before.

    The profiler reports every allocation and release with its size, those inside of operators too. It does not see what is
    allocated elsewhere (the workspaces of the matrix library, Python) nor the release of what was there before.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


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
    done = run_script("-c", "import test_sgpo; test_sgpo.rank_of_eight()")
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


# ---------------------------------------------------------------------------------------------------- bench


BENCH_ROOT = Path(bench.__file__).resolve().parent


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can restart its peak")
def test_bench_peak_memory_counts_memory_that_was_used_before():
    def work():  # 50 MB in pieces so small that the C library keeps them when they are freed
        return sum(len(piece) for piece in [torch.ones(12_500) for _ in range(1000)])

    for _ in range(3):
        _, _, peak = bench.measured(work, CPU)
        assert 45e6 < peak < 60e6


def test_bench_time_shares_sort_operations():
    a, heads = torch.randn(384, 384), torch.randn(1, 4, 512, 64)

    def share(work):
        shares = bench.time_shares(work, CPU)
        assert sum(shares.values()) == pytest.approx(1)
        return max(shares, key=shares.get)

    assert share(lambda: [a @ a for _ in range(20)]) == "matrix products"
    assert share(lambda: [torch.addmm(a, a, a) for _ in range(20)]) == "matrix products"
    assert share(lambda: [torch.bmm(a[None], a[None]) for _ in range(20)]) == "matrix products"
    assert share(lambda: F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)) == "attention"
    assert share(lambda: [a.exp() for _ in range(20)]) == "everything else"


def test_bench_quick_runs_and_all_ways_agree(tmp_path):
    out = tmp_path / "bench.json"
    command = [sys.executable, "bench.py", "--quick", "--device", "cpu", "--threads", "1", "--repeats", "2", "--out", str(out)]
    done = subprocess.run(
        command, cwd=BENCH_ROOT, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["seed"] == 0 and report["threads"] == 1 and report["repeats"] == 2 and report["device_type"] == "cpu"
    assert set(report["versions"]) == {"python", "torch", "transformers"} and report["dtype"] == "float32"
    assert "--quick" in report["command"] and report["commit"] and report["device"]
    checks = {name: check for part in bench.PARTS for name, check in report[part]["checks"].items()}
    assert set(checks) == {"greedy", "logprobs", "distribution", "same_update", "same_loss"}
    assert all(check["ok"] for check in checks.values()), checks
    rivals = ["generate"] + ["generate_batch"] * (importlib.util.find_spec("psutil") is not None)
    for result in report["sampler"]["workloads"]:
        assert [run["side"] for run in result["runs"]] == ["ours", *rivals] * 2  # alternating
        assert set(result["left_out"]) == {"generate_batch"} - set(rivals) and set(result["ratio"]) == set(rivals)
        for run in result["runs"]:  # the same lengths for every side
            assert run["tokens"] == run["prescribed"] and 0 < run["floor_share"] < 1
    uniform = report["sampler"]["workloads"][0]
    assert {run["prescribed"] for run in uniform["runs"]} == {3 * 2 * 6}
    assert [run["side"] for run in report["update"]["runs"]] == ["ours", "transformers"] * 2
    trl = importlib.util.find_spec("trl") is not None
    assert [run["side"] for run in report["step"]["runs"]] == ["ours", "trl"] * 2 if trl else ["ours"] * 2
    assert trl or "pip install trl" in done.stdout


def test_bench_a_rival_or_a_part_that_dies_is_a_row_and_not_the_end(tmp_path, monkeypatch, capsys):
    calls = []

    def dies(*_, **__):
        calls.append(0)
        if len(calls) > 3:  # after the first workload's warm-up and its two repeats
            raise RuntimeError("gone\nwith a long explanation")
        return [[1, 2]] * 6

    def too_large(args, device):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(bench, "SAMPLERS", {**bench.SAMPLERS, "mortal": dies, "silent": lambda *_, **__: [[]] * 6})
    monkeypatch.setattr(bench, "sampler_rivals", lambda device: (["ours", "mortal", "silent"], {}))
    monkeypatch.setattr(bench, "plain_update", dies)
    monkeypatch.setattr(bench, "bench_growth", too_large)
    flags = "--quick --repeats 2 --threads 1 --only growth sampler update --device cpu --out".split()
    assert bench.main([*flags, str(tmp_path / "new/b.json")]) == 1
    report, said = json.loads((tmp_path / "new/b.json").read_text()), capsys.readouterr().out
    assert report["growth"]["failed"] == "OutOfMemoryError: no message" and "growth: failed, OutOfMemoryError" in said
    first, second = report["sampler"]["workloads"]
    assert first["left_out"] == {"silent": "it made no tokens"} and list(first["ratio"]) == ["mortal"]
    assert second["left_out"] == {"mortal": "RuntimeError: gone", "silent": "it made no tokens"} and not second["ratio"]
    assert [run["side"] for run in second["runs"]] == ["ours"] * 2 and second["tokens_per_s"]["ours"]["median"] > 0
    update = report["update"]
    assert update["left_out"] == {"transformers": "RuntimeError: gone"} and [r["side"] for r in update["runs"]] == ["ours"] * 2
    assert report["load_after"] and "not run: RuntimeError: gone" in said


def test_the_script_for_a_device_runs_at_toy_size_and_a_part_that_fails_is_a_row(tmp_path):
    """The script that a GPU is asked with, without one; its Python is a wrapper that dies in the part `head`."""
    wrapper = tmp_path / "python"
    dies = 'case "$*" in *"--only head"*) echo "no such kernel" >&2; exit 3;; esac'
    wrapper.write_text(f'#!/bin/sh\n{dies}\nexec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    settings = {**os.environ, "PYTHON": str(wrapper), "OMP_NUM_THREADS": "1"}
    command = ["bash", "tools/gpu_check.sh", str(tmp_path / "out"), "--device", "cpu", "--parts", "torchrun step head"]
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    head, _, _, _, *rows = (tmp_path / "out/rows.md").read_text().splitlines()
    assert "commit" in head and f"torch {torch.__version__}" in head
    rows = {row.split("|")[1].strip(): row.split("|")[3].strip() for row in rows}
    assert rows.keys() == {"torchrun", "step", "head"} and rows["head"] == "failed (3): no such kernel"
    assert rows["torchrun"] == "ok: the resumed run equals the whole one, losses to the letter"
    assert rows["step"].startswith("ok:") and "failed" not in done.stdout.replace("failed (3)", "")
    report = json.loads((tmp_path / "out/step.json").read_text())
    assert [row["top_p"] for row in report["sampling"]] == [1.0, 0.95] and report["limits"]["matmul"] > 0
    step = report["step"]
    assert step["logprob_error"] < 0.2 and {"sampling", "update", "update, recomputed"} < step.keys()  # bf16
    for name in ("update", "update, recomputed"):
        time_of = step[name]["time_of_4_problems"]
        assert 0 <= time_of["host_share"] < 1 and time_of["longest"] and step[name]["planned_gb"] > 0
    command[-1] = "tests none"
    done = subprocess.run(command, cwd=ROOT, env=settings | {"IN_ALL": "0"}, capture_output=True, text=True, timeout=60)
    assert "| tests | 0 | not run: the 0 s are used up |" in done.stdout


def test_bench_growth_is_measured_and_drawn(tmp_path):
    assert bench.exponent({8: 3.0, 16: 12.0, 32: 48.0}) == pytest.approx(2) and bench.exponent({1: 5, 9: 5}) == 0
    args = ["--quick", "--only", "growth", "--device", "cpu", "--threads", "1", "--repeats", "1"]
    done = run_script("bench.py", *args, "--out", tmp_path / "growth.json")
    assert done.returncode == 0, done.stderr
    curves = json.loads((tmp_path / "growth.json").read_text())["growth"]["curves"]
    assert [(c["axis"], c["cost"]) for c in curves] == [
        (axis, cost) for axis in ("rows", "response length", "group size of 32 rows") for cost in ("sampling", "update")
    ]
    assert all(len(c["seconds"]) == 2 and min(c["seconds"].values()) > 0 and math.isfinite(c["exponent"]) for c in curves)
    report.main(["growth", str(tmp_path / "growth.json"), "--out", str(tmp_path / "pictures/growth")])
    svg = xml.etree.ElementTree.parse(tmp_path / "pictures/growth.svg").getroot()
    assert svg.tag.endswith("svg") and (tmp_path / "pictures/growth.png").stat().st_size > 1000
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="other.json: not a report of"):
        report.main(["growth", str(tmp_path / "other.json"), "--out", str(tmp_path / "x")])
    for points in bench.growth_workloads(SimpleNamespace(quick=False), CPU).values():
        assert all(workload.prompts >= 1 and workload.median == workload.longest for workload in points.values())


def test_bench_workloads_and_their_floor_by_hand():
    tail = bench.Workload("tail", 8, 8, 40, 160, median=200, longest=4096)
    lengths = bench.make_lengths(tail, 0)
    assert len(lengths) == 64 and max(lengths) == 4096 and min(lengths) >= 1 and 120 < sorted(lengths)[32] < 330
    assert set(bench.make_lengths(bench.Workload("flat", 2, 3, 4, 9, 7, 7), 0)) == {7}
    small = build_model(ModelConfig.from_dict(bench.TOY), generator=torch.Generator(), dtype=torch.float32, device=CPU)
    parameters, head = sum(p.numel() for p in small.parameters()), 512 * 48
    key_bytes = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, width, bytes
    # two rows of 2 and 3 tokens after one prompt of 5: a step with both, then one with the longer
    slow_memory = bench.sampling_floor(small, [[1] * 5], [2, 3], 2, {"bandwidth": 1.0, "matmul": 1e30})
    assert slow_memory == pytest.approx(2 * 4 * parameters + key_bytes * ((2 + 5) + (2 + 5)))
    slow_product = bench.sampling_floor(small, [[1] * 5], [2, 3], 2, {"bandwidth": 1e30, "matmul": 1.0})
    block = 48 * 48 + 2 * 48 * 16 + 48 * 48 + 3 * 48 * 96  # queries, keys and values, output, MLP
    prefill = 2 * 2 * block * 5 + 2 * 4 * 6 * 8 * (1 + 2 + 3 + 4 + 5) + 2 * head
    assert slow_product == pytest.approx(2 * parameters * 3 + prefill)
    behind = bench.forward_flops(small, [(3, 2)], 2) - bench.forward_flops(small, [(0, 2)], 2)
    assert behind == 2 * 4 * 6 * 8 * (2 * 3)  # two tokens see three more


def test_bench_typo_is_an_error(tmp_path):
    with pytest.raises(SystemExit):
        bench.parse_arguments(["--out", str(tmp_path / "b.json"), "--quik"])


def test_bench_chi_square_by_hand():
    # (60 - 50)^2 / 50 + (40 - 50)^2 / 50 = 4 at one degree of freedom: p = erfc(sqrt(4 / 2)) = 0.0455
    p = bench.chi_square(torch.tensor([60.0, 40.0]).double(), torch.tensor([0.5, 0.5]))
    assert p == pytest.approx(math.erfc(math.sqrt(2)), rel=1e-9)


def test_bench_checks_find_a_different_model():
    """The comparisons are worth nothing unless they fail for models that differ."""
    device = torch.device("cpu")
    ours, theirs = bench.model_pair(bench.SMALL_VOCABULARY, 0, torch.float32, device)
    prompts = [[3, 17, 5, 11], [9, 4]]
    assert bench.check_greedy(ours, theirs, prompts, 12)["ok"]
    assert bench.check_logprobs(ours, theirs, prompts, 12, seed=0)["ok"]
    exact = bench.teacher_forced(theirs, prompts[0], [0])[0].exp()
    rows = bench.sample_ours(ours, [prompts[0]], [1], n=500, max_new_tokens=1, temperature=1.0, seed=0)
    counts = torch.bincount(torch.tensor(rows)[:, 0], minlength=24).double()
    assert bench.chi_square(counts, exact) > 1e-4
    assert bench.chi_square(counts, exact.sqrt() / exact.sqrt().sum()) < 1e-4  # temperature 2 instead of 1
    with torch.no_grad():
        theirs.model.norm.weight[0] += 2.0
    assert not bench.check_greedy(ours, theirs, prompts, 12)["ok"]
    assert not bench.check_logprobs(ours, theirs, prompts, 12, seed=0)["ok"]


def test_bench_responses_of_both_sides_end_at_the_first_eos():
    ours, theirs = bench.model_pair(bench.SMALL_VOCABULARY, 0, torch.float32, torch.device("cpu"))
    eos_ids = [1, 2, 5]
    for sampler, model in ((bench.sample_ours, ours), (bench.sample_theirs, theirs)):
        rows = sampler(model, [[3, 4, 7], [8]], eos_ids, n=20, max_new_tokens=15, temperature=1.0, seed=3)
        assert len(rows) == 40
        assert all(not set(row[:-1]) & set(eos_ids) for row in rows)
        assert all(len(row) == 15 or row[-1] in eos_ids for row in rows)
        assert len({len(row) for row in rows}) > 3  # ragged
        lengths = [3, 1, 7, 2]
        rows = sampler(model, [[3, 4, 7], [8]], (), n=2, max_new_tokens=0, temperature=1.0, seed=3, lengths=lengths)
        assert [len(row) for row in rows] == lengths


def test_bench_memory_counter_sees_a_large_tensor_and_restarts():
    """In a fresh process: in this one, memory that earlier tests freed may still be resident and be taken again."""
    code = (
        "import torch, bench\n"
        "for megabytes in (200, 50):\n"  # the smaller one second: a counter that did not restart would show 200 again
        "    work = lambda: torch.ones(megabytes * 250_000).mean().item()\n"  # 4 bytes each
        "    mean, seconds, peak = bench.measured(work, torch.device('cpu'))\n"
        "    assert mean == 1.0 and seconds > 0\n"
        "    print(peak / bench.MB)\n"
    )
    done = run_script("-c", code)
    assert done.returncode == 0, done.stderr
    for megabytes, peak in zip((200, 50), map(float, done.stdout.split()), strict=True):
        assert 0.9 * megabytes < peak < 1.5 * megabytes + 20


# ---------------------------------------------------------------------------------------------------- sweep


FAKE_TRAIN = """
import json, pathlib, sys
flags = sys.argv[1:]
out, seed = pathlib.Path(flags[flags.index("--out") + 1]), int(flags[flags.index("--seed") + 1])
with open(pathlib.Path(__file__).parent / "calls.txt", "a") as file:
    file.write(f"{out.parent.name} {seed}\\n")
if "--fail" in flags:
    sys.exit("out of luck")
(out / "model").mkdir(parents=True)
rows = [{"config": {}, "commit": "abc"}, {"stage": "eval", "guided": False, "accuracy": 0.4}]
names = ("reward_auto", "reward_guided", "alpha", "kl", "kept", "entropy", "length_auto", "with_target", "reach_gap")
step = {"stage": "sgpo", "step_s": 0.5, "sampled_tokens": 10, "length_guided": 7.0}
rows += [{**step, "step": k + 1, "target_tokens": 5 * (k > 5), **dict.fromkeys(names, k + seed)} for k in range(12)]
rows += [{"stage": "eval", "guided": False, "accuracy": 0.7 + seed / 10}, {"stage": "eval", "guided": True, "accuracy": 0.9}]
(out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
"""


@pytest.fixture
def fake_train(tmp_path, monkeypatch):
    """sweep with a train.py that writes a log at once; gives back the list of (row, seed) that it was called for."""
    (tmp_path / "train.py").write_text(FAKE_TRAIN)
    monkeypatch.setattr(sweep, "HERE", tmp_path)

    def calls():
        path = tmp_path / "calls.txt"
        return sorted(path.read_text().split("\n")[:-1]) if path.exists() else []

    return calls


def test_every_row_of_every_suite_is_a_valid_command(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "best_rates", lambda path: {name: "1e-4" for name in sweep.METHODS})
    base = ("--model", "m", "--data", "rl.jsonl", "--eval_data", "test.jsonl", "--problems_per_step", "8")
    for build, seeds in sweep.SUITES.values():
        jobs = build(sweep.Request(seeds, tmp_path, base, 12))
        assert len({(job.row, job.seed) for job in jobs}) == len(jobs) and all("/" not in job.row for job in jobs)
        for job in jobs:
            train.parse_config([*job.flags, "--seed", str(job.seed), "--out", "x"])
    table = sweep.table_suite(sweep.Request(5, tmp_path))
    rows = {job.row: train.parse_config(job.flags) for job in table}
    assert set(rows) == {*sweep.METHODS, *sweep.ABLATIONS} and len(table) == 5 * len(rows)
    for name in ("sgpo", "grpo", "sft+grpo", "luffy", "hpt"):  # the same number of responses; LUFFY's solution counts as one
        cfg = rows[name]
        responses = cfg.group_auto + (cfg.group_guided if cfg.method == "sgpo" else 0)
        assert cfg.steps * cfg.problems_per_step * responses == 11_520, name
    for name in sweep.ABLATIONS:  # an ablation is SGPO but for its own flags
        differs = {key for key, value in vars(rows[name]).items() if value != getattr(rows["sgpo"], key)} - {"out"}
        assert differs == {
            flag.removeprefix("--").removeprefix("no-") for flag in sweep.ABLATIONS[name].split() if "--" in flag
        }
    assert {len(values) for values in sweep.RATES.values()} == {4}  # no method is searched more than another
    own = {job.row: train.parse_config(job.flags) for job in sweep.model_suite(sweep.Request(3, tmp_path, base, 12))}
    assert {cfg.model for cfg in own.values()} == {"m"} and own.pop("sft").steps == 0
    for cfg in own.values():
        responses = cfg.group_auto + (cfg.group_guided if cfg.method == "sgpo" else 0)
        assert cfg.steps * cfg.problems_per_step * responses == 12 * 8 * 12 and cfg.sft_fraction == 0, cfg.method


@pytest.mark.parametrize(
    "flags, message",
    [
        (["model", "--steps", "4"], "--model among its flags"),
        (["model", "--base=--model m"], "even number"),
        (["model", "--base=--model m", "--steps", "3"], "even number"),
        (["model", "--base=--model m --data d", "--steps", "4"], "--data without --eval_data"),
        (["model", "--base=--model m --group_auto 4", "--steps", "4"], "--base: --group_auto would make the numbers"),
        (["model", "--base=--model m", "--steps", "4", "--seeds", "1"], "--seeds 1: the page's intervals need 2 to 17 seeds"),
        (["table", "--seeds", "18"], "need 2 to 17 seeds"),
        (["table", "--steps", "3"], "are for the suite model"),
        (["tabel"], "invalid choice"),
    ],
)
def test_sweep_refuses_what_it_cannot_run(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        sweep.main([*flags, "--results", str(tmp_path)])
    assert message in f"{stop.value} {capsys.readouterr().err}"


def test_the_command_line_hands_the_suite_on_whole(tmp_path, monkeypatch):
    """A second evaluation file that got lost on the way would leave a column out of the page, and no run would fail."""
    monkeypatch.setattr(sweep, "best_rates", lambda path: {name: "1e-4" for name in sweep.METHODS})
    ran = []
    monkeypatch.setattr(sweep, "run_suite", lambda jobs, runs, parallel: ran.extend(jobs))
    sweep.main(["hard", "--results", str(tmp_path), "--rows", "grpo", "--seeds", "2", "--extra=--eval_limit 8"])
    want = [job for job in sweep.hard_suite(sweep.Request(2, tmp_path)) if job.row == "grpo"]
    assert ran == [replace(job, flags=(*job.flags, "--eval_limit", "8")) for job in want] and want[0].also_eval


def test_flags_that_all_runs_share_are_said_once():
    def page(*flags):
        line = {"row": "sgpo", "seed": "0", "base": "0.4", "accuracy": "0.5", "steps": "2", "sampled_tokens": "3"}
        line |= {"step_s": "1.0", "commit": "abc"}
        lines = [line | {"flags": words, "row": row, "seed": seed} for seed in "01" for row, words in flags]
        return sweep.suite_page("model", lines, None)

    text = page(("sgpo", "--model m --data a --delta 1"), ("grpo", "--model m --data b"))
    assert "All rows: `--model m`." in text and "| `--data a --delta 1` |" in text and "| `--data b` |" in text
    assert "Learning rates tried" not in text
    assert "All rows" not in page(("sgpo", "--a 1"), ("grpo", "--b 1"))


def test_knobs_run_the_default_once_and_show_it_for_every_knob(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "best_rates", lambda path: {name: "1e-4" for name in sweep.METHODS})
    jobs = sweep.knobs_suite(sweep.Request(2, tmp_path))
    lines = sweep.knob_lines([{"row": job.row, "seed": job.seed, "flags": " ".join(job.flags)} for job in jobs])
    assert [(line["row"], line["seed"]) for line in lines] == [
        (f"{name}={value}", seed) for name, values in sweep.KNOBS.items() for value in values for seed in (0, 1)
    ]
    assert len({tuple(train.parse_config([*job.flags, "--out", "x"]).__dict__.items()) for job in jobs}) == len(jobs) / 2
    for line in lines:  # the row says what the run was
        name, value = line["row"].split("=")
        assert getattr(train.parse_config(line["flags"].split()), name) == float(value)
    assert {sweep.reference_of(line["row"]) for line in lines} == {f"{k}={v}" for k, v in sweep.DEFAULTS.items()}


def test_a_sweep_resumes_and_runs_nothing_twice(tmp_path, fake_train):
    jobs = [sweep.Job(row, seed, ("--x", row)) for row in ("a", "b") for seed in (0, 1)]
    sweep.run_suite(jobs[:3], tmp_path / "runs", 2)
    (tmp_path / "runs/a/1/done.json").unlink()  # as if it had been cut off
    sweep.run_suite(jobs, tmp_path / "runs", 2)
    assert fake_train() == ["a 0", "a 1", "a 1", "b 0", "b 1"]
    assert not (tmp_path / "runs/a/0/model").exists()
    with pytest.raises(ValueError, match="holds a run with other flags"):
        sweep.run_suite([sweep.Job("a", 0, ("--x", "other"))], tmp_path / "runs", 2)


def test_a_failed_run_is_reported_after_the_others_and_tried_again(tmp_path, fake_train):
    jobs = [sweep.Job("bad", 0, ("--fail",)), sweep.Job("good", 0, ())]
    for _ in range(2):
        with pytest.raises(SystemExit, match="(?s)1 of 2 runs failed.*bad, seed 0: exit 1.*out of luck"):
            sweep.run_suite(jobs, tmp_path / "runs", 1)
    assert fake_train() == ["bad 0", "bad 0", "good 0"]


def test_a_suite_writes_a_line_a_run_and_a_line_a_step(tmp_path, fake_train):
    jobs = [sweep.Job("a", seed, ("--x", "1")) for seed in (0, 1)]
    sweep.run_suite(jobs, tmp_path / "runs", 2)
    sweep.write_csv(tmp_path / "x.csv", [sweep.summarise_run(job, tmp_path / f"runs/a/{job.seed}") for job in jobs])
    first, second = sweep.read_csv(tmp_path / "x.csv")
    want = {"row": "a", "seed": "1", "base": "0.4", "accuracy": "0.8", "guided": "0.9", "steps": "12", "sampled_tokens": "120"}
    want |= {"step_s": "6.0", "reward_last10": "7.5", "alpha_first10": "5.5", "kept": "9.5", "commit": "abc", "flags": "--x 1"}
    assert {key: second[key] for key in want} == want and first["accuracy"] == "0.7"
    lines = sweep.step_lines(jobs, tmp_path / "runs")
    assert [line["step"] for line in lines] == list(range(1, 13)) and lines[3]["entropy"] == 3.5 and lines[0]["seeds"] == 2
    assert lines[5]["kept"] == "" and lines[6]["kept"] == 6.5  # steps without any target have no share of kept tokens


def test_a_suite_of_runs_by_several_states_of_the_code_says_so(tmp_path, fake_train, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "draw_results", lambda *_: None)
    monkeypatch.setattr(sweep, "suite_page", lambda *_: "the page")
    jobs = [sweep.Job("a", seed, ()) for seed in (0, 1)]
    sweep.run_suite(jobs, tmp_path / "runs", 2)
    for words in ("", "the runs are of 2 states of the code (abc, def)"):
        if words:
            log = tmp_path / "runs/a/1/metrics.jsonl"
            log.write_text(log.read_text().replace('"abc"', '"def"'))
        sweep.write_results("model", jobs, tmp_path / "runs", tmp_path / "results")
        said = capsys.readouterr().out
        assert words in said and ("states of the code" in said) == bool(words)


def test_paired_difference_by_hand():
    """Differences 1, 2, 3: mean 2, standard error 1 / sqrt 3, t with two degrees of freedom 4.303."""
    mean, low, high = sweep.paired_difference({"0": 2.0, "1": 4.0, "2": 6.0, "9": 1.0}, {"2": 3.0, "1": 2.0, "0": 1.0})
    assert (mean, low, high) == pytest.approx((2, 2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5), abs=1e-9)
    with pytest.raises(ValueError, match="2 to 17 seeds"):
        sweep.paired_difference({"0": 1.0}, {"0": 2.0})
    assert [sweep.verdict(d) for d in ((1, 0.1, 2), (1, -0.1, 2), (-1, -2, -0.1))] == [
        "reproduced",
        "not reproduced",
        "the opposite",
    ]
    assert [sweep.verdict(d, denied=True) for d in ((1, 0.1, 2), (1, -0.1, 2), (-1, -2, -0.1))] == [
        "not reproduced",
        "reproduced",
        "reproduced",
    ]


def test_quantiles_of_student_t():
    mpmath = pytest.importorskip("mpmath")  # comes with math-verify's sympy
    for freedom, t in enumerate(sweep.T95, start=1):
        tail = mpmath.betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True)
        assert float(tail) == pytest.approx(0.05, abs=1e-4)


def test_best_rate_is_the_one_of_highest_mean(tmp_path):
    lines = [
        {
            "row": f"{method}@{rate}",
            "accuracy": 0.5 + 0.1 * (k == 2) + 0.3 * (k == 1) * (seed == 0) - 0.3 * (k == 1) * (seed == 1),
        }
        for method, rates in sweep.RATES.items()
        for k, rate in enumerate(rates)
        for seed in (0, 1)
    ]
    sweep.write_csv(tmp_path / "rates.csv", lines)
    assert sweep.best_rates(tmp_path / "rates.csv") == {method: rates[2] for method, rates in sweep.RATES.items()}
    tied = [{**line, "accuracy": 0.1 if "sft@3e-4" in line["row"] else 0.3 - 0.2 * (k % 2)} for k, line in enumerate(lines)]
    sweep.write_csv(tmp_path / "rates.csv", tied)  # every rate 0.3 and 0.1 but one
    assert sweep.best_rates(tmp_path / "rates.csv") == {method: rates[-1] for method, rates in sweep.RATES.items()}
    sweep.write_csv(tmp_path / "rates.csv", lines[:-2])
    with pytest.raises(ValueError, match="no run of .* at"):
        sweep.best_rates(tmp_path / "rates.csv")
    with pytest.raises(ValueError, match="run `python sweep.py rates` first"):
        sweep.best_rates(tmp_path / "none.csv")


def test_the_page_says_what_the_csv_says():
    """Two seeds; every row 0.1 under SGPO but one, which is above, and one whose difference changes its sign."""
    lines = []
    for row in (*sweep.METHODS, *sweep.ABLATIONS):
        for seed in ("0", "1"):
            accuracy = {"sgpo": 0.8, "reverse-kl": 0.9, "hpt": 0.7 if seed == "0" else 0.9}.get(row, 0.7) + int(seed) / 100
            line = {"row": row, "seed": seed, "base": "0.4", "accuracy": f"{accuracy}", "guided": "", "entropy_last10": "0.1"}
            line |= {"alpha_first10": f"0.5{seed}", "alpha_last10": "0.2", "steps": "60", "sampled_tokens": "1000"}
            lines.append(line | {"step_s": "70.0", "commit": "abc", "flags": f"--row {row}"})
    page = sweep.suite_page("table", lines, {method: "1e-4" for method in sweep.METHODS})
    assert "| luffy | -0.100 [-0.100, -0.100] | 0.705 ± 0.005 |" in page and "| base | | 0.400 |" in page
    assert "| SGPO beats LUFFY | +0.100 [+0.100, +0.100] | reproduced |" in page
    assert re.search(r"SGPO beats HPT \| \+0\.000 .*\| not reproduced", page)
    assert re.search(r"reverse KL .*\| the opposite", page)
    assert re.search(r"alpha starts high .*\| \+0\.305 .* reproduced", page)
    assert "routine" not in page  # without divergence.csv there is nothing to say
    tokens = [
        {"token": t, "count": c, "mean_d": d} for t, c, d in (("add", "3", "0.6"), ("min", "1", "0.2"), ("=", "9", "0.04"))
    ]
    for text, last in (("0.5000 nats", "0.04"), ("not reproduced (rule", "0.06")):
        tokens[2]["mean_d"] = last
        assert text in sweep.suite_page("table", lines, {method: "1e-4" for method in sweep.METHODS}, tokens)
    assert page.count("| not testable here |") == len(sweep.NOT_TESTABLE) and "--row luffy" in page
    rows = {line["row"] for line in lines}
    assert all(row in rows for claim in sweep.TABLE_CLAIMS for row, _ in (claim.more, claim.less))


def test_the_committed_pages_are_what_their_csv_files_say():
    folder = ROOT / "results/tiny"
    rates, tokens = sweep.best_rates(folder / "rates.csv"), sweep.read_csv(folder / "divergence.csv")
    for suite in ("table", "knobs", "hard"):
        lines = sweep.read_csv(folder / f"{suite}.csv")
        page = sweep.suite_page(suite, lines, rates, tokens)
        assert page == (folder / f"{suite}.md").read_text(encoding="utf-8"), suite
    verdicts = dict(re.findall(r"^\| ([^|]+) \| [+-][^|]+ \| ([a-z ]+) \|$", page, re.MULTILINE))
    assert len(verdicts) == len(sweep.HARD_CLAIMS) and verdicts["without the KL clip it is worse (7B: -3.4)"] == "reproduced"
    first, second = (sweep.column(lines, row, "accuracy") for row in ("sgpo", "no-kl-clip"))
    assert all(first[seed] > second[seed] for seed in first) and len(first) == 3


# ---------------------------------------------------------------------------------------------------- report: curves


def report_step(step, reward, **changes):
    """An RL step's record, with the keys that the curves need, and one that they do not."""
    record = {"stage": "sgpo", "step": step, "reward_auto": reward, "reward_guided": 0.9, "alpha": 0.4, "entropy": 0.1}
    return record | {"length_auto": 20.0, "length_guided": 22.0, "loss": 0.5} | changes


def report_run(folder, records, *, end="\n", **config):
    """Write a metrics.jsonl with these records below its first line; the path."""
    folder.mkdir(parents=True)
    config = {"method": "sgpo", "seed": 0, "learning_rate": 1e-4, "out": str(folder)} | config
    lines = [json.dumps(record) if isinstance(record, dict) else record for record in [{"config": config}, *records]]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + end)
    return folder / "metrics.jsonl"


def report_two_seeds(root):
    """Seed 0 has three steps and seed 1, still going, two; both have evaluations."""
    evals = [{"stage": "eval", "step": 0, "accuracy": 0.5, "guided": False, "when": "base"}]
    report_run(root / "sgpo/0", [*evals, *(report_step(t, r) for t, r in ((1, 0.2), (2, 0.4), (3, 0.6)))])
    report_run(root / "sgpo/1", [*evals, report_step(1, 0.4), report_step(2, 0.8)], seed=1)
    return str(root / "sgpo")


def test_report_band_by_hand_over_seeds_of_different_lengths(tmp_path):
    groups = report.read_groups([report_two_seeds(tmp_path)])
    plain = report.panel_curves(groups, 1)["reward"]["sgpo"]["reward_auto"]
    assert plain["step"] == [1, 2, 3] and plain["seeds"] == [2, 2, 1]
    assert plain["mean"] == pytest.approx([0.3, 0.6, 0.6])
    # sd(0.2, 0.4) = 0.1 sqrt(2), divided by sqrt(2); sd(0.4, 0.8) = 0.2 sqrt(2)
    assert plain["stderr"] == [pytest.approx(0.1), pytest.approx(0.2), None]
    smooth = report.panel_curves(groups, 2)["reward"]["sgpo"]["reward_auto"]
    assert smooth["mean"] == pytest.approx([0.3, 0.45, 0.5])  # seed 0: 0.2 0.3 0.5, seed 1: 0.4 0.6
    assert smooth["stderr"] == [pytest.approx(0.1), pytest.approx(0.15), None]


def test_report_trailing_mean_counts_steps_not_records():
    assert report.trailing_mean({1: 1.0, 2: 3.0, 5: 7.0, 6: 8.0}, 3) == {1: 1.0, 2: 2.0, 5: 7.0, 6: 7.5}


def test_report_three_seeds_by_hand():
    curve = report.over_seeds([{7: 1.0}, {7: 2.0}, {7: 6.0}])
    assert curve == {"step": [7], "mean": [3.0], "stderr": [pytest.approx(math.sqrt(7 / 3))], "seeds": [3]}


@pytest.mark.parametrize(
    "bad, message",
    [
        ('{"stage": "sgpo", "step', "not valid JSON"),
        ("", "not valid JSON"),
        ("[1]", "expected an object, got [1]"),
        ({"step": 2}, "stage is None"),
        (report_step(2, 0.5, stage="sgqo"), "stage is 'sgqo'"),
        ({k: v for k, v in report_step(2, 0.5).items() if k != "entropy"}, "no entropy"),
        ({k: v for k, v in report_step(2, 0.5).items() if k != "alpha"}, "no alpha"),
        ({k: v for k, v in report_step(2, 0.5).items() if k != "length_guided"}, "no length_guided"),
        (report_step(2, math.nan), "reward_auto is nan"),
        (report_step(2, 0.5, alpha="0.4"), "alpha is '0.4'"),
        (report_step(2, True), "reward_auto is True"),
        (report_step(2.0, 0.5), "step is 2.0"),
        (report_step(1, 0.5), "step 1 after step 1"),
        ({"stage": "eval", "step": 1, "guided": False}, "no accuracy"),
        ({"stage": "eval", "step": 1, "accuracy": 0.5}, "guided is None"),
    ],
)
def test_report_bad_line_is_named(tmp_path, bad, message):
    path = report_run(tmp_path / "a", [report_step(1, 0.5), bad, report_step(3, 0.5)])
    with pytest.raises(ValueError) as error:
        report.read_run(path)
    assert str(error.value).startswith(f"{path}:3: ") and message in str(error.value)


def test_report_first_line_must_be_the_config(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(report_step(1, 0.5)) + "\n")
    with pytest.raises(ValueError, match="metrics.jsonl:1: the first line must hold the run's config"):
        report.read_run(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="empty"):
        report.read_run(tmp_path / "metrics.jsonl")


def test_report_unfinished_last_line_is_left_out_and_said(tmp_path, capsys):
    going = report_run(tmp_path / "going", [report_step(1, 0.5), '{"stage": "sgpo", "st'], end="")
    assert [record["step"] for record in report.read_run(going).steps] == [1]
    assert f"{going}:3: the last line is unfinished" in capsys.readouterr().out
    whole = report_run(tmp_path / "whole", [report_step(1, 0.5), report_step(2, 0.5)], end="")
    assert [record["step"] for record in report.read_run(whole).steps] == [1, 2]  # only the line end is still to come
    ended = report_run(tmp_path / "ended", [report_step(1, 0.5), '{"stage": "sgpo", "st'])
    with pytest.raises(ValueError, match=r"metrics.jsonl:3: not valid JSON"):
        report.read_run(ended)


def test_report_groups_that_are_none(tmp_path):
    good = report_two_seeds(tmp_path)
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "nowhere"):
        with pytest.raises(ValueError, match=f"{folder}: no metrics.jsonl"):
            report.read_groups([good, str(tmp_path / folder)])
    with pytest.raises(ValueError, match="two groups are called 'sgpo'"):
        report.read_groups([good, good])
    report_run(tmp_path / "begun/0", [])
    with pytest.raises(ValueError, match="neither an RL step nor an evaluation"):
        report.read_groups([str(tmp_path / "begun")])
    with pytest.raises(ValueError, match="9 groups"):
        report.read_groups([f"{k}={good}" for k in range(9)])


def test_report_labels(tmp_path):
    good = report_two_seeds(tmp_path)
    report_run(tmp_path / "lr=3/0", [report_step(1, 0.5)])
    assert list(report.read_groups([f"Ours={good}", good + "/", f"{good}/1", str(tmp_path / "lr=3")])) == [
        "Ours",
        "sgpo",
        "1",
        "lr=3",
    ]
    assert [run.config["seed"] for run in report.read_groups([good])["sgpo"]] == [0, 1]


def test_report_a_group_is_one_setting_under_several_seeds(tmp_path):
    report_run(tmp_path / "a/0", [report_step(1, 0.5)])
    report_run(tmp_path / "a/1", [report_step(1, 0.5)], seed=1, learning_rate=3e-4)
    with pytest.raises(ValueError, match="learning_rate is 0.0001 in .*a/0/metrics.jsonl but 0.0003 in .*a/1/metrics.jsonl"):
        report.read_groups([str(tmp_path / "a")])
    for seed in (0, 1):
        report_run(tmp_path / f"b/{seed}", [report_step(1, 0.5)], seed=0)
    with pytest.raises(ValueError, match="both have seed 0"):
        report.read_groups([str(tmp_path / "b")])
    for seed in (0, 1):  # one data order, two sampling seeds: two seeds
        report_run(tmp_path / f"c/{seed}", [report_step(1, 0.5)], seed=0, sampling_seed=seed)
    assert len(report.read_groups([str(tmp_path / "c")])["c"]) == 2


def report_three_methods(root):
    """sgpo; grpo, which logs zeros for what it has not; and sft, which has no RL step. The arguments for main."""
    sgpo = report_two_seeds(root)
    grpo = [report_step(t, 0.5, stage="grpo", alpha=0.0, reward_guided=0.0, length_guided=0.0) for t in range(1, 9)]
    report_run(root / "grpo/0", grpo, method="grpo")
    at = dict(stage="eval", step=0)
    evals = [at | dict(accuracy=0.25, guided=False), at | dict(accuracy=0.75, guided=False), at | dict(accuracy=1, guided=True)]
    losses = [{"stage": stage, "step": 1, "loss": 2.0} for stage in ("sft", "sft_validation")]
    report_run(root / "sft/0", [evals[0], *losses, *evals[1:]], method="sft")
    return [sgpo, str(root / "grpo"), str(root / "sft")]


def test_report_methods_are_left_out_of_panels_they_have_nothing_for(tmp_path):
    panels = report.panel_curves(report.read_groups(report_three_methods(tmp_path)), 5)
    assert {name: list(curves) for name, curves in panels.items()} == {
        "reward": ["sgpo", "grpo"],
        "entropy": ["sgpo", "grpo"],
        "length": ["sgpo", "grpo"],
        "pass_rates": ["sgpo"],
        "alpha": ["sgpo"],
        "accuracy": ["sgpo", "sft"],
    }
    # of two evaluations at one step the later one, and none with the strategy in the prompt
    assert panels["accuracy"]["sft"]["accuracy"]["mean"] == [0.75]
    assert panels["pass_rates"]["sgpo"]["reward_guided"]["mean"] == pytest.approx([0.9, 0.9, 0.9])


def test_report_accuracy_is_not_smoothed(tmp_path):
    evals = [{"stage": "eval", "step": step, "accuracy": step / 10, "guided": False} for step in (0, 1, 2)]
    report_run(tmp_path / "a", evals)
    curve = report.panel_curves(report.read_groups([str(tmp_path / "a")]), 3)["accuracy"]["a"]["accuracy"]
    assert curve["mean"] == [0.0, 0.1, 0.2]


def test_report_reads_the_logs_that_training_wrote(tmp_path):
    for method in ("sgpo", "grpo"):
        (tmp_path / method).mkdir()
        log = (ROOT / f"results/tiny/{method}-1e-4-seed0.jsonl").read_text()
        (tmp_path / method / "metrics.jsonl").write_text(log)
    panels = report.panel_curves(report.read_groups([str(tmp_path / "sgpo"), str(tmp_path / "grpo")]), 1)
    assert panels["reward"]["grpo"]["reward_auto"]["step"] == list(range(1, 61))
    assert list(panels["alpha"]) == ["sgpo"] and panels["alpha"]["sgpo"]["alpha"]["mean"][0] == pytest.approx(0.59315, abs=1e-5)
    assert panels["accuracy"]["sgpo"]["accuracy"]["mean"] == pytest.approx([0.46875, 0.746875, 0.932292, 0.983333], abs=1e-5)


def test_report_figure_shows_mean_band_and_says_what_they_are(tmp_path):
    groups = report.read_groups(report_three_methods(tmp_path))
    figure = report.draw(report.panel_curves(groups, 2), ["reward", "accuracy"], list(groups), 2)
    reward, accuracy = figure.axes
    drawn = [list(line.get_ydata()) for line in reward.lines if line.get_linewidth() == 1.7]
    assert drawn[0][:2] == pytest.approx([0.3, 0.45]) and math.isnan(drawn[0][2])  # step 3 has one of two seeds: thin
    thin = [list(line.get_ydata()) for line in reward.lines if line.get_linewidth() == 0.7]
    assert math.isnan(thin[0][0]) and thin[0][1:] == pytest.approx([0.45, 0.5])
    band = reward.collections[0].get_paths()[0].vertices
    assert {round(float(y), 6) for x, y in band if x == 2} == {0.3, 0.6}  # 0.45 +- 0.15
    assert band[:, 0].max() == 2 and len(reward.collections[1].get_paths()) == 0  # one seed: no band
    assert reward.get_xlabel() == "RL step (trailing mean of 2 steps)" and accuracy.get_xlabel() == "RL step"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["sgpo (1 to 2 seeds)", "grpo (1 seed)", "sft (1 seed)"]
    caption = " ".join(legend.get_title().get_text().split())
    assert "band ± 1 standard error over seeds (one seed: no band)" in caption and "thin line" in caption
    assert accuracy.lines[-1].get_color() == report.COLOURS[2]  # sft is the third group, also where it is the second line


def test_report_a_single_point_shows_its_error(tmp_path):
    for seed, accuracy in ((0, 0.2), (1, 0.4)):
        evals = [{"stage": "eval", "step": 0, "accuracy": accuracy, "guided": False}]
        report_run(tmp_path / f"sft/{seed}", evals, seed=seed, method="sft")
    panels = report.panel_curves(report.read_groups([str(tmp_path / "sft")]), 1)
    figure = report.draw(panels, ["accuracy"], ["sft"], 1)
    (segment,) = figure.axes[0].collections[-1].get_segments()
    assert segment.tolist() == [[0.0, pytest.approx(0.2)], [0.0, pytest.approx(0.4)]]  # 0.3 +- 0.1


def test_report_pictures_are_written_and_reproducible(tmp_path, capsys):
    groups = report_three_methods(tmp_path)
    for out in ("one", "two"):
        report.main(["curves", *groups, "--out", str(tmp_path / out), "--dpi", "50"])
    names = [*report.PANELS, "overview"]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == sorted(
        f"{name}.{kind}" for name in names for kind in ("png", "svg")
    )
    for name in names:
        one, two = ((tmp_path / out / f"{name}.svg").read_bytes() for out in ("one", "two"))
        assert one == two and len(one) > 5_000
        assert b"<dc:date>" not in one and b"<text" not in one  # text as paths
        xml.etree.ElementTree.fromstring(one)
        png = (tmp_path / "one" / f"{name}.png").read_bytes()
        assert png[:8] == b"\x89PNG\r\n\x1a\n" and len(png) > 4_000
    width = int.from_bytes((tmp_path / "one/overview.png").read_bytes()[16:20], "big")
    assert width == round(3 * 4.6 * 50)
    said = capsys.readouterr().out
    assert "alpha: sgpo; without grpo, sft\n" in said and "accuracy: sgpo, sft; without grpo\n" in said


def test_report_only_the_pictures_asked_for(tmp_path):
    report.main(["curves", report_two_seeds(tmp_path), "--only", "overview", "alpha", "--out", str(tmp_path / "out")])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {f"{name}.{suffix}" for name in ("overview", "alpha") for suffix in ("png", "svg")}


def test_sweep_draws_what_it_ran(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(report, "main", calls.append)
    jobs = [sweep.Job("sgpo", 0, ())]
    sweep.draw_results("knobs", jobs, tmp_path / "runs", tmp_path)
    sweep.draw_results("table", jobs, tmp_path / "runs", tmp_path)
    assert [call[0] for call in calls] == ["rows", "rows", *["curves"] * len(sweep.CURVES)]
    assert {row for rows in sweep.CURVES.values() for row in rows} == {*sweep.METHODS, *sweep.ABLATIONS} - {"sft"}
    for call in calls:
        report.build_parser().parse_args(call)
    monkeypatch.setattr(sweep.importlib.util, "find_spec", lambda name: None)
    sweep.draw_results("table", jobs, tmp_path / "runs", tmp_path)
    assert "no pictures without matplotlib" in capsys.readouterr().out and len(calls) == 2 + len(sweep.CURVES)


def test_report_a_panel_that_no_group_has_is_not_drawn(tmp_path, capsys):
    _, grpo, _ = report_three_methods(tmp_path)
    report.main(["curves", grpo, "--out", str(tmp_path / "out"), "--dpi", "50"])
    assert {path.stem for path in (tmp_path / "out").iterdir()} == {"reward", "entropy", "length", "overview"}
    assert "alpha: not drawn; without grpo" in capsys.readouterr().out


def test_report_curves_load_no_torch(tmp_path):
    good = report_two_seeds(tmp_path)
    code = "import sys, report; report.main(sys.argv[1:]); print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "curves", good, "--out", str(tmp_path / "o")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("flags", [["--smooth", "0"], ["--dpi", "0"]])
def test_report_curves_refuse_bad_settings(tmp_path, flags):
    with pytest.raises(ValueError, match=f"{flags[0]} must be at least 1, got 0"):
        report.main(["curves", report_two_seeds(tmp_path), "--out", str(tmp_path / "o"), *flags])
    assert not (tmp_path / "o").exists()


def test_report_command_line_ends_with_a_message(tmp_path):
    command = [sys.executable, "report.py", "curves", str(tmp_path), "--out", str(tmp_path / "o")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (
        done.returncode == 1
        and done.stderr == f"report.py: {tmp_path}: no metrics.jsonl in it or below, so this group has no run\n"
    )
    for flags in (["--smoot", "3"], ["--nonsense"]):  # no abbreviations
        with pytest.raises(SystemExit):
            report.build_parser().parse_args(["curves", "x", "--out", "y", *flags])


# ---------------------------------------------------------------------------------------------------- report: token map


def report_args(out, /, **changes):
    flags = ["tokens", "--data", str(ROOT / "data/tiny/test.jsonl"), "--model", str(TINY_BASE), "--out", str(out)]
    return report.build_parser().parse_args([*flags, *itertools.chain(*((f"--{k}", str(v)) for k, v in changes.items()))])


@pytest.fixture(scope="module")
def report_page(tmp_path_factory):
    """(the page's data, its file, folder of the model after): the base model and one with other weights."""
    folder = tmp_path_factory.mktemp("report")
    model, tokenizer = load_model(str(TINY_BASE), dtype=torch.float32, device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.05 * parameter.data.std() * torch.randn(parameter.shape, generator=generator)
    save_model(model, tokenizer, folder / "after")
    page = report.write_tokens(report_args(folder / "page.html", after=folder / "after", top=3))
    return page, folder / "page.html", folder / "after"


def report_reference(folder, problem, response_ids):
    """transformers' log-probabilities (T, V) guided and unguided, a forward of its own for each token: no packing, no cache."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    sides, prompts = [], []
    for messages in (guided_messages(problem.problem, problem.strategy), auto_messages(problem.problem)):
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompts.append(tokenizer.encode(text, add_special_tokens=False))
        with torch.no_grad():
            rows = [model(torch.tensor([prompts[-1] + response_ids[:t]])).logits[0, -1] for t in range(len(response_ids))]
        sides.append(torch.log_softmax(torch.stack(rows), -1))
    assert len(prompts[0]) > len(prompts[1]) + 10  # a shift between the two contexts could not stay unseen
    return *sides, tokenizer


@pytest.mark.parametrize("view", [0, 1])
def test_report_divergence_equals_transformers(report_page, view):
    page, _, after = report_page
    tokens = page["views"][view]["tokens"]
    ids = [token["id"] for token in tokens]
    guided, unguided, tokenizer = report_reference([TINY_BASE, after][view], page["problem"], ids)
    want = [F.kl_div(unguided[t], guided[t], log_target=True, reduction="sum").item() for t in range(len(ids))]
    assert [token["divergence"] for token in tokens] == pytest.approx(want, abs=2e-5)
    assert tokens[0]["divergence"] == pytest.approx(want[0], abs=2e-5) and tokens[-1]["divergence"] == pytest.approx(
        want[-1], abs=2e-5
    )
    assert max(want) > 0.3 and ids[-1] == tokenizer.eos_token_id
    for side, log_p in (("guided", guided), ("auto", unguided)):
        assert [token[f"logp_{side}"] for token in tokens] == pytest.approx(
            [log_p[t, ids[t]].item() for t in range(len(ids))], abs=2e-5
        )
        for t, token in enumerate(tokens):
            best = log_p[t].exp().topk(3)
            assert [p for _, _, p in token[f"top_{side}"]] == pytest.approx(best.values.tolist(), abs=2e-5)
            assert token[f"top_{side}"][0][0] == best.indices[0].item()
            assert all(log_p[t, one].exp().item() == pytest.approx(p, abs=2e-5) for one, _, p in token[f"top_{side}"])
            assert all(text == tokenizer.decode([one]) for one, text, _ in token[f"top_{side}"])


def test_report_before_and_after_share_the_tokens(report_page):
    before, after = (view["tokens"] for view in report_page[0]["views"])
    assert [token["id"] for token in before] == [token["id"] for token in after]
    assert any(abs(a["divergence"] - b["divergence"]) > 0.01 for a, b in zip(before, after, strict=True))


def test_report_masked_is_exactly_above_delta(report_page):
    page, _, _ = report_page
    model, tokenizer = load_model(str(TINY_BASE), dtype=torch.float32, device="cpu")
    ids = [token["id"] for token in page["views"][0]["tokens"]]
    divergences = sorted(token["divergence"] for token in page["views"][0]["tokens"])
    delta = divergences[-2]  # itself: a token at the limit is kept, and exactly one is above it
    tokens = report.token_map(model, tokenizer, page["problem"], ids, delta=delta, top=1)
    assert [token["kept"] for token in tokens] == [token["divergence"] <= delta for token in tokens]
    assert sum(not token["kept"] for token in tokens) == 1


def test_report_chunks_change_nothing_and_bound_the_logits(report_page, monkeypatch):
    page, _, _ = report_page
    model, tokenizer = load_model(str(TINY_BASE), dtype=torch.float32, device="cpu")
    want = page["views"][0]["tokens"]
    rows = []
    monkeypatch.setattr(report, "CHUNK_TOKENS", 5)
    forward_kl = losses.forward_kl
    monkeypatch.setattr(losses, "forward_kl", lambda p, q: rows.append((p.shape[0], q.shape[0])) or forward_kl(p, q))
    tokens = report.token_map(model, tokenizer, page["problem"], [token["id"] for token in want], delta=1.0, top=3)
    assert rows == [(5, 5)] * (len(want) // 5) + [(len(want) % 5,) * 2] * (len(want) % 5 > 0)
    divergences = [token["divergence"] for token in want]
    assert [token["divergence"] for token in tokens] == pytest.approx(divergences, rel=1e-5, abs=1e-6)
    assert [token["top_auto"][0][:2] for token in tokens] == [token["top_auto"][0][:2] for token in want]


def test_report_totals_by_hand():
    values = [(0.5, True, -1.0, -2.0), (3.0, False, -0.5, -0.25), (0.1, True, 0.0, -0.75)]
    tokens = [dict(zip(("divergence", "kept", "logp_guided", "logp_auto"), row, strict=True)) for row in values]
    assert report.totals(tokens) == pytest.approx(
        {
            "tokens": 3,
            "divergence_sum": 3.6,
            "divergence_mean": 1.2,
            "kept": 2 / 3,
            "loss": 0.2,
            "logp_guided": -1.5,
            "logp_auto": -3.0,
        }
    )


def test_report_pass_rates_are_of_the_two_prompts(report_page):
    totals = report_page[0]["views"][0]["totals"]
    assert (
        totals["p_guide"] == 1.0 and totals["p_auto"] < 1.0
    )  # the tiny world's base model: all right guided, about half alone


def test_report_target_is_the_correct_response_most_probable_alone(tmp_path, monkeypatch):
    model, tokenizer = load_model(str(TINY_BASE), dtype=torch.float32, device="cpu")
    with MathWorker() as worker:
        problem = next(p for p in load_problems(ROOT / "data/tiny/test.jsonl", worker) if p.id == "tiny-jako-35")
        # the last is the most probable of all but wrong; of the two correct ones the strategy, and the mean over tokens, prefer
        # the first, but the policy alone the second
        texts, correct = ["jako add 3 5 = 8, jako inc 8 = 9", "jako sub", "jako"], [True, True, False]
        responses = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        sides = [report_reference(TINY_BASE, problem, response)[:2] for response in responses]
        guided, alone = (
            [
                sum(side[k][t, one].item() for t, one in enumerate(response))
                for side, response in zip(sides, responses, strict=True)
            ]
            for k in range(2)
        )
        assert guided[0] > guided[1] and alone[2] > alone[1] > alone[0] and alone[0] / 13 > alone[1] / 2
        monkeypatch.setattr(report, "sample_group", lambda *_, **__: (responses, correct))
        found, response = report.find_target(model, tokenizer, worker, report_args(tmp_path / "x", id=problem.id))
        assert found == problem and response == responses[1]


def test_report_target_of_the_first_problem_that_has_one(tmp_path, monkeypatch, capsys):
    model, tokenizer = load_model(str(TINY_BASE), dtype=torch.float32, device="cpu")
    answers = {"tiny-jako-35": [False, True]}
    monkeypatch.setattr(
        report, "sample_group", lambda m, t, w, problem, *_, **__: ([[5], [6]], answers.get(problem.id, [False, False]))
    )
    with MathWorker() as worker:
        problem, response = report.find_target(model, tokenizer, worker, report_args(tmp_path / "x"))
        assert (problem.id, response) == ("tiny-jako-35", [6])
        assert "tiny-gano-54: none of 4 guided responses is correct" in capsys.readouterr().out
        with pytest.raises(ValueError, match="no correct guided response; another --seed"):
            report.find_target(model, tokenizer, worker, report_args(tmp_path / "x", id="tiny-gano-54"))
        with pytest.raises(ValueError, match="no row has the id 'nobody'"):
            report.find_target(model, tokenizer, worker, report_args(tmp_path / "x", id="nobody"))
        (tmp_path / "plain.jsonl").write_text('{"id": "p", "problem": "1+1?", "answer": "2"}\n')
        with pytest.raises(ValueError, match="no strategy in any row"):
            report.find_target(model, tokenizer, worker, report_args(tmp_path / "x", data=tmp_path / "plain.jsonl"))


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(delta=0), "--delta must be positive"),
        (dict(delta="inf"), "--delta must be positive and finite"),
        (dict(top=0), "--top must be at least 1"),
        (dict(top=10_000), "--top 10000: the vocabulary has"),
        (dict(group_guided=0), "--group_guided must be at least 1"),
        (dict(out="/nowhere/page.html"), "/nowhere/page.html: its folder does not exist"),
    ],
)
def test_report_tokens_refuse_bad_settings(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        report.write_tokens(report_args(tmp_path / "x", **flags))
    assert not (tmp_path / "x").exists()


def test_report_after_must_have_the_same_vocabulary(report_page, tmp_path):
    _, _, after = report_page
    model, tokenizer = load_model(str(after), dtype=torch.float32, device="cpu")
    tokenizer.add_tokens(["extra"])
    save_model(model, tokenizer, tmp_path / "other")
    with pytest.raises(ValueError, match="its vocabulary is not that of"):
        report.write_tokens(report_args(tmp_path / "x", after=tmp_path / "other"))


def test_report_words_get_their_blanks_back():
    tokenizer = AutoTokenizer.from_pretrained(TINY_BASE)
    ids = tokenizer.encode("gano add 5 4 = 9, \\boxed{ 0}", add_special_tokens=False) + [tokenizer.eos_token_id]
    texts = report.token_texts(tokenizer, ids)
    assert [text for _, text in texts] == ["gano", "add", "5", "4", "=", "9", ",", "\\boxed{", "0", "}", "<|im_end|>"]
    assert "".join(blank + text for blank, text in texts) == tokenizer.decode(ids) and texts[1][0] == " "


def test_report_bytes_are_shown_where_they_are_no_text():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(tokenizer_models.BPE(vocab={c: i for i, c in enumerate(alphabet)} | {"Ġa": 256}, merges=[("Ġ", "a")]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    texts = report.token_texts(tokenizer, tokenizer.encode("b a\né a"))
    assert [text for _, text in texts] == ["b", " a", "\n", "Ã", "©", " a"]  # the two bytes of é by their names
    assert all(blank == "" for blank, _ in texts)


# ---------------------------------------------------------------------------------------------------- report: the page

HOSTILE = ["<script>", "</script>", "<!--", "&amp;", '"', "'", "\n", " ", ".\n\n", "\t", "\u202e", " the", "a b"]


def report_token(index, text, divergence=0.25, **changes):
    token = {"id": index, "text": text, "blank": "", "divergence": divergence, "kept": divergence <= 1.0}
    guided, auto = ([(index, text, p), (index + 1, "<i>&", 0.00001)] for p in (0.5, 0.25))
    return token | {"logp_auto": math.log(0.25), "logp_guided": math.log(0.5), "top_auto": auto, "top_guided": guided} | changes


def report_hostile_page():
    tokens = [report_token(i, text) for i, text in enumerate(HOSTILE)]
    strategy = Strategy("<b>type</b>", 'a <i>"strategy"</i> & more', ("<script>alert(1)</script>",))
    problem = SimpleNamespace(id="<id>", problem="if a < b & b > c:\n</div>", answer="<u>0</u>", strategy=strategy)
    totals = report.totals(tokens) | {"p_auto": 0.5, "p_guide": 1.0}
    views = [{"name": name, "model": "a<b>", "tokens": tokens, "totals": totals} for name in ("before", "after")]
    return {"problem": problem, "delta": 1.0, "views": views, "settings": "--data a<b>.jsonl"}


class ReportParser(HTMLParser):
    """Collects tags and texts, and fails on any that is not closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text, self.scripts = [], [], {}, []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "script":
            self.scripts.append(data)
        for tag, attrs in self.open:
            key = attrs.get("id", tag)
            self.text[key] = self.text.get(key, "") + data


def report_parse(page):
    parser = ReportParser()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def test_report_page_escapes_everything():
    page = report_hostile_page()
    parsed = report_parse(report.page_html(page))
    counts = {tag: sum(name == tag for name, _ in parsed.tags) for tag in ("script", "b", "i", "style", "span", "section")}
    # 13 tokens twice, ticks, headings and the legend's sample; nothing that a token or the problem brought along
    assert counts == {"script": 2, "b": 0, "i": 0, "style": 1, "span": 2 * len(HOSTILE) + 6 + 4 + 1, "section": 6}
    shown = [parsed.text[f"token-{m}"] for m in range(1, len(HOSTILE) + 1)]
    assert shown == ["<script>", "</script>", "<!--", "&amp;", '"', "'", "⏎", "␣", ".⏎⏎", "⇥", "\\u202e", " the", "a b"]
    assert "if a < b & b > c:\n</div>" in parsed.text["div"] and parsed.text["li"] == "<script>alert(1)</script>"
    assert 'a <i>"strategy"</i> & more' in parsed.text["p"] and "reference answer: <u>0</u>" in parsed.text["p"]
    assert "--data a<b>.jsonl" in parsed.text["p"] and "<id>" in parsed.text["title"]


def test_report_page_carries_its_tooltips():
    page = report_hostile_page()
    tips = json.loads(report_parse(report.page_html(page)).scripts[0])
    assert [len(view) for view in tips] == [len(HOSTILE)] * 2
    heading, line, guided, alone = tips[1][0]
    assert (
        heading == "token 1 of 13: <script>" and line == "d = 0.2500 nats, kept (≤ 1); p = 0.5000 with strategy, 0.2500 alone"
    )
    assert guided == [["<script>", "0.5000", True], ["<i>&", "1e-05", False]]
    assert alone == [["<script>", "0.2500", True], ["<i>&", "1e-05", False]]
    assert tips[0][11][2][0][0] == "␣the"  # in the table blanks can be seen


def test_report_page_marks_masked_tokens_and_places_colours():
    page = report_hostile_page()
    divergences = [0.0, 0.25, 1.0, 1.5, -1e-9]
    page["views"][0]["tokens"] = [report_token(i, "x", d) for i, d in enumerate(divergences)]
    spans = {attrs["id"]: attrs for tag, attrs in report_parse(report.page_html(page)).tags if tag == "span" and "id" in attrs}
    spans = [spans[f"token-{m}"] for m in range(1, 6)]
    assert [span["class"] for span in spans] == ["t", "t", "t", "t masked", "t"]
    assert [span["style"] for span in spans] == ["--t:0.000", "--t:0.500", "--t:1.000", "--t:1.000", "--t:0.000"]
    assert all(span["tabindex"] == "0" for span in spans)


def test_report_page_keeps_lines_and_blanks():
    page = report_hostile_page()
    page["views"] = page["views"][:1]
    page["views"][0]["tokens"] = [
        report_token(0, "a"),
        report_token(1, "b", blank=" "),
        report_token(2, ".\n\n"),
        report_token(3, "c"),
    ]
    text = report_parse(report.page_html(page)).text["div"]
    assert "a b.⏎⏎\n\nc" in text


def test_report_page_needs_nothing_from_outside(report_page):
    page, file, _ = report_page
    text = file.read_text(encoding="utf-8")
    assert text == report.page_html(page)
    parsed = report_parse(text)
    assert not any({"src", "href"} & set(attrs) for _, attrs in parsed.tags)
    assert not any(word in text for word in ("http:", "https:", "//", "@import", "url("))
    count = len(page["views"][0]["tokens"])
    ids = [attrs["id"] for tag, attrs in parsed.tags if "tabindex" in attrs]
    assert ids == [f"token-{m}" for m in range(1, count + 1)] + [f"after-{m}" for m in range(1, count + 1)]
    assert page["problem"].problem in parsed.text["div"] and "gano add 5 4" in " ".join(parsed.text["div"].split())


def test_report_divergence_is_the_mean_over_targets(tmp_path):
    flags = ["--data", str(ROOT / "data/tiny/test.jsonl"), "--model", str(TINY_BASE), "--max_new_tokens", "32"]
    lines = report.main(["divergence", *flags, "--problems", "3", "--out", str(tmp_path / "d.csv")])
    want = {}
    args = report.build_parser().parse_args(["divergence", *flags, "--out", "x"])
    model, tokenizer = load_model(str(TINY_BASE), dtype=torch.float32, device="cpu")
    with MathWorker() as worker:
        for problem, response in itertools.islice(report.find_targets(model, tokenizer, worker, args), 3):
            for token in report.token_map(model, tokenizer, problem, response, delta=1.0, top=1):
                want.setdefault(token["text"], []).append(token["divergence"])
    written = list(csv.DictReader((tmp_path / "d.csv").read_text().splitlines()))
    assert {line["token"]: float(line["mean_d"]) for line in written} == pytest.approx(
        {text: sum(values) / len(values) for text, values in want.items()}, abs=1e-6
    )
    assert sum(int(line["count"]) for line in written) == sum(map(len, want.values()))
    assert lines[0]["token"] in sweep.OPERATIONS and lines[0]["mean_d"] > 0.4


def test_report_rows_shows_every_seed_and_the_mean(tmp_path):
    text = "row,seed,accuracy\nsgpo,0,0.9\nsgpo,1,0.7\ngrpo,0,0.5\n"
    (tmp_path / "table.csv").write_text(text)
    rows = report.read_rows(tmp_path / "table.csv", "accuracy")
    assert rows == {"sgpo": [0.9, 0.7], "grpo": [0.5]}
    (axes,) = report.draw_rows(rows, "accuracy").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["sgpo", "grpo"]
    means = [container.lines[0].get_xdata()[0] for container in axes.containers]
    assert means == pytest.approx([0.8, 0.5])
    (bar,) = axes.containers[0].lines[2][0].get_segments()
    assert bar[:, 0].tolist() == pytest.approx([0.7, 0.9])  # stdev 0.1 sqrt 2 over sqrt 2
    report.main(["rows", str(tmp_path / "table.csv"), "--out", str(tmp_path / "pictures/table")])
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"table.png", "table.svg"}
    (tmp_path / "table.csv").write_text(text + "hpt,0,oops\n")
    with pytest.raises(ValueError, match="table.csv:5: no row with a number in 'accuracy'.*oops"):
        report.read_rows(tmp_path / "table.csv", "accuracy")
    with pytest.raises(ValueError, match="table.csv:2: no row with a number in 'speed'"):
        report.read_rows(tmp_path / "table.csv", "speed")


def test_report_rows_of_knobs_get_a_panel_each():
    rows = {"delta=0.1": [0.5, 0.6], "delta=inf": [0.7, 0.8], "gamma=1.0": [0.9, 0.9]}
    axes = report.draw_rows(rows, "accuracy").axes
    assert [one.get_xlabel() for one in axes] == ["delta", "gamma"]
    assert [label.get_text() for label in axes[0].get_xticklabels()] == ["0.1", "inf"]
    assert [c.lines[0].get_ydata()[0] for c in axes[0].containers] == pytest.approx([0.55, 0.75])


# ---------------------------------------------------------------------------------------------------- report: the bench's page


def bench_spread(median, low, high):
    return {"median": median, "min": low, "max": high}


def bench_side_runs(rates, **figures):
    """Runs of two sides: {side: tokens/s of each repeat}; figures: {name: {side: its value in each repeat}}."""
    return [
        {"side": side, "repeat": k, "tokens_per_s": rate} | {name: values[side][k] for name, values in figures.items()}
        for side, series in rates.items()
        for k, rate in enumerate(series)
    ]


def bench_json(path, *, device="Chip A|B", kind="cpu", dtype="float32", **parts):
    """Write a report like bench.py's with these parts, and with these changes of its header."""
    header = {"date": "2026-01-02T03:04:05+00:00", "command": f"python bench.py --out {path.name}", "seed": 11, "repeats": 2}
    header |= {"shape": "smollm2-135m", "dtype": dtype, "quick": False, "commit": "0123456789abcdef", "changed_files": False}
    header |= {"device": device, "device_type": kind, "cpus": 4, "threads": 3, "load_before": [0.25, 1, 1]}
    header |= {"versions": {"python": "3.11.0", "torch": "2.0"}, "load_after": [2.96, 1, 1]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(header | parts))
    return path


def bench_sampler_part(**changes):
    workload = {"name": "tail", "prompts": 2, "group": 3, "shortest_prompt": 4, "longest_prompt": 9, "median": 5, "longest": 70}
    rates = {"ours": [1200.0, 1300.0], "generate": [300.0, 200.0]}
    figures = {
        "floor_share": {"ours": [0.5, 0.7], "generate": [0.1, 0.12]},
        "peak_mb": {"ours": [30.4, 30.6], "generate": [1499.7, 12.0]},
    }
    result = {"workload": workload, "left_out": {"generate_batch": "needs a|b"}, "runs": bench_side_runs(rates, **figures)}
    result["tokens_per_s"] = {"ours": bench_spread(1250.0, 1200.0, 1300.0), "generate": bench_spread(250.0, 200.0, 300.0)}
    result["ratio"] = {"generate": bench_spread(5.25, 4.0, 6.5)}
    greedy = {"responses": 4, "tokens_each": 12, "equal": 3, "ties": 0, "ok": False}
    prefill = {"tokens_per_s": bench_spread(2000.0, 1900.0, 2100.0), "share": bench_spread(0.6, 0.5, 0.625)}
    prefill["time"] = {"matrix products": 0.625, "attention": 0.25, "everything else": 0.125}
    part = {"model": {}, "limits": {"bandwidth": 27.84e9, "matmul": 1406e9}, "checks": {"greedy": greedy}}
    return part | {"prefill": prefill | {"prompts": 2, "tokens": 1234}, "workloads": [result]} | changes


def bench_trained_part(rival, **changes):
    workload = {"prompts": 4, "group": 8, "shortest_prompt": 40, "longest_prompt": 160, "median": 48, "longest": 48}
    runs = bench_side_runs({"ours": [20.0], rival: [8.0]}, peak_mb={"ours": [0.1], rival: [210.0]})
    rates = {"ours": bench_spread(20.0, 20.0, 20.0), rival: bench_spread(8.0, 8.0, 8.0)}
    part = {"workload": workload, "runs": runs, "tokens_per_s": rates, "ratio": {rival: bench_spread(2.5, 2.5, 2.5)}}
    return part | {"checks": {}} | changes


def bench_head_part():
    rows = {"autograd": (7500.0, 1.0, 20.0), "128": (900.0, 0.12, 20.5)}
    summary = [
        {"variant": name, "peak_mb": bench_spread(mb, mb, mb), "peak_mb_ratio": bench_spread(share, share, share)}
        | {"seconds": bench_spread(s, s - 1, s + 1), "seconds_ratio": bench_spread(s / 20, 0.5, 1.5)}
        for name, (mb, share, s) in rows.items()
    ]
    check = {"max_relative_difference": 1.6e-7, "tolerance": 1e-4, "ok": True}
    shape = {"tokens": 4096, "width": 896, "vocabulary": 152064, "chunks": [128]}
    return {"shape": shape, "checks": {"same_loss": check}, "summary": summary, "runs": []}


def bench_growth_part():
    curve = {"axis": "rows", "cost": "sampling", "seconds": {"8": 1.5, "16": 3.25}, "exponent": 1.115}
    return {"curves": [curve], "checks": {}}


def bench_written(folder, out):
    """The page that the command writes for a folder of reports."""
    assert report.main(["bench", str(folder), "--out", str(out)]) == out
    return out.read_text(encoding="utf-8")


def bench_sections(page):
    """{(heading, device, dtype): the text below them}; None stands for a device or a dtype where the text is below none."""
    sections, at = {}, [None] * 3
    for line in page.splitlines():
        level = len(line) - len(line.lstrip("#"))
        if level > 1:
            at[level - 2 :] = [line[level + 1 :], *[None] * (4 - level)]
        elif re.fullmatch(r"(fp32|bf16): not run\.", line):
            at[2] = line[:4]
        sections[tuple(at)] = sections.get(tuple(at), "") + line + "\n"
    return sections


def bench_cells(text):
    """The rows of the one table in a text. An escaped bar is not the end of a cell."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1 and set(map(str.strip, rows[1])) == {"---"}
    return [[cell.strip() for cell in row] for row in rows[:1] + rows[2:]]


def test_report_bench_every_figure_by_hand(tmp_path):
    """What a report holds decides where it stands; its name does not."""
    folder = tmp_path / "raw"
    bench_json(folder / "a b.json", sampler=bench_sampler_part(), head=bench_head_part())
    versions, check = {"trl": "9.9"}, {"max_difference": 0.06, "tolerance": 0.05, "ok": False}
    update = bench_trained_part("transformers", checks={"same_update": check})
    for run in update["runs"]:
        run["flop_share"] = 0.554 if run["side"] == "ours" else 0.25
    parts = {"update": update, "step": bench_trained_part("trl", versions=versions), "growth": bench_growth_part()}
    bench_json(folder / "head.json", device="GPU", kind="cuda", dtype="bfloat16", changed_files=True, repeats=1, **parts)
    page = bench_written(folder, tmp_path / "page.md")
    sections = bench_sections(page)
    headings = ["Sampler", "One update", "A whole step", "The chunked head", "How the cost grows"]
    assert list(dict.fromkeys(heading for heading, _, _ in sections if heading)) == headings
    for heading in headings:  # the same devices and dtypes below every heading, in the same order
        mine = [key[1:] for key in sections if key[0] == heading and key[2]]
        assert mine == [(device, dtype) for device in ("Chip A|B", "GPU") for dtype in ("fp32", "bf16")]
    with_table = {key for key, text in sections.items() if "\n|" in text}
    assert with_table == {
        *((heading, "Chip A|B", "fp32") for heading in ("Sampler", "The chunked head")),
        *((heading, "GPU", "bf16") for heading in ("One update", "A whole step", "How the cost grows")),
    }
    sampler = sections["Sampler", "Chip A|B", "fp32"]
    work = "2 × 3; 4 to 9; median 5, longest 70"
    assert bench_cells(sampler)[1:] == [
        ["tail", work, "ours", "1,250.0 (1,200.0 to 1,300.0)", "", "60 %", "+31 MB"],
        ["", "", "generate", "250.0 (200.0 to 300.0)", "5.25 (4.00 to 6.50)", "11 %", "+1,500 MB"],
        ["", "", "generate_batch", r"not run: needs a\|b", "", "", ""],
    ]
    assert "27.8 GB/s, 1,406 GFLOP/s" in sampler and "Decode steps are CUDA graphs" not in sampler
    assert "1,234 prompt tokens: 2,000 (1,900 to 2,100) tokens/s, 60 (50 to 62) % of the matrix peak (of its time: " in sampler
    assert "peak (of its time: matrix products 62 %, attention 25 %, everything else 12 %)." in sampler
    assert "- **FAILED**: in fp32, 3 of 4 greedy responses of 12 tokens" in sampler
    assert "    python bench.py --out a b.json\n" in sampler and "[every figure](raw/a%20b.json)" in sampler
    origin = "2 repeats, seed 11, commit 0123456, Chip A|B, 3 threads, python 3.11.0, torch 2.0, load average 0.2 before and "
    assert f"shape smollm2-135m, {origin}3.0 after, 2026-01-02;" in sampler
    head = sections["The chunked head", "Chip A|B", "fp32"]
    assert bench_cells(head)[1:] == [
        ["whole logits", "7,500 MB", "100.0 %", "20.000 (19.000 to 21.000)", "1.00 (0.50 to 1.50)"],
        ["chunks of 128", "900 MB", "12.0 %", "20.500 (19.500 to 21.500)", "1.02 (0.50 to 1.50)"],
    ]
    assert "4,096 tokens, width 896, vocabulary 152,064" in head and "shape smollm2" not in head and origin in head
    assert "- ok: loss and gradient norms differ by at most 2e-07, relative (allowed: 0.0001)" in head
    updated, step = sections["One update", "GPU", "bf16"], sections["A whole step", "GPU", "bf16"]
    assert [row[-2] for row in bench_cells(updated)[1:]] == ["55 %", "25 %"] and "- **FAILED**: loss and gradient" in updated
    assert bench_cells(step)[1:] == [
        ["4 × 8; 40 to 160; all 48", "ours", "20.0 (20.0 to 20.0)", "", "+0 MB"],
        ["", "trl", "8.0 (8.0 to 8.0)", "2.50 (2.50 to 2.50)", "+210 MB"],
    ]
    assert "1 repeat, " in step and "0123456 with uncommitted changes, GPU" in step and "(raw/head.json)" in step
    assert "trl 9.9" in step and "trl" not in updated and "Checks" not in step
    growth = sections["How the cost grows", "GPU", "bf16"]
    assert bench_cells(growth)[1:] == [["sampling", "rows", "8: 1.500, 16: 3.250", "1.11"]]
    (folder / "a b.json").rename(folder / "z.json")
    (folder / "head.json").rename(folder / "y.json")
    renamed = bench_written(folder, tmp_path / "page.md")
    assert renamed.replace("raw/z", "raw/a%20b").replace("raw/y", "raw/head") == page


def test_report_bench_growth_picture_is_shown_where_it_lies_beside(tmp_path):
    path = bench_json(tmp_path / "raw/v1.2.json", growth=bench_growth_part())
    draw = ["growth", str(path), "--out", str(tmp_path / "raw/v1.2")]
    assert f"    python report.py {' '.join(draw)}\n" in bench_written(tmp_path / "raw", tmp_path / "sub/page.md")
    report.main(draw)
    for picture in ("v1.2.png", "v1.2.svg"):  # the svg where there is no png
        page = bench_written(tmp_path / "raw", tmp_path / "sub/page.md")
        assert f"](../raw/{picture})" in page and "Not drawn" not in page
        (tmp_path / "raw" / picture).unlink()
    assert "Not drawn" in bench_written(tmp_path / "raw", tmp_path / "sub/page.md")


def test_report_bench_commands_fill_the_gaps(tmp_path, monkeypatch):
    """Every command below "not run" is one that bench.py takes, and measures just what is missing, into no file that exists."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    folder = tmp_path / "raw data"
    left_out = {"left_out": "trl is not installed: pip install trl", "runs": [], "checks": {}}
    bench_json(folder / "update_cuda_float32.json", kind="cuda", sampler=bench_sampler_part(), step=left_out)
    changes = {"device": "GPU 2", "kind": "cuda", "dtype": "bfloat16", "shape": "qwen2.5-7b", "threads": 7}
    bench_json(folder / "cpu.json", **changes, head=bench_head_part())
    parts = {"Sampler": "sampler", "One update": "update", "A whole step": "step", "The chunked head": "head"}
    found = 0
    for (heading, device, dtype), text in bench_sections(bench_written(folder, tmp_path / "page.md")).items():
        if "not run." not in text.lower() or "\n|" in text:
            continue
        (command,) = [line for line in text.splitlines() if line.startswith("    python ")]
        words = shlex.split(command)
        assert words[:2] == ["python", "bench.py"]
        args = bench.parse_arguments(words[2:])
        assert args.out.parent == folder and not args.out.exists() and not args.quick
        if heading == "On a CPU":
            assert set(args.only) == {*bench.PARTS, "growth"} and args.device == "cpu" and args.out.name == "cpu_2.json"
            continue
        part = parts.get(heading, "growth")
        assert args.only == [part] and args.device == "cuda" and report.DTYPES[args.dtype] == dtype
        assert args.threads == (7 if device == "GPU 2" else 3)
        assert args.shape == ("qwen2.5-7b" if device == "GPU 2" and part != "head" else "smollm2-135m")
        assert (args.out.name == "update_cuda_float32_2.json") == (part == "update" and dtype == "fp32")
        found += 1
    assert found == 2 * 2 * 5 - 2  # two devices, two dtypes, five parts; a sampler and a head were measured
    bench_json(folder / "real_cpu.json", growth=bench_growth_part(), device="Chip")
    assert "## On a" not in bench_written(folder, tmp_path / "page.md")
    for path in folder.glob("*.json"):
        path.unlink()
    bench_json(folder / "x.json", head=bench_head_part())
    keys = set(bench_sections(bench_written(folder, tmp_path / "page.md")))
    assert ("On a GPU", None, None) in keys and ("On a CPU", None, None) not in keys


def test_report_bench_reads_what_bench_writes(tmp_path, monkeypatch):
    """The keys of the reports above are from reading bench.py; here it writes one itself, without its slowest pieces."""
    check = partial(bench.check_distribution, draws=60)
    monkeypatch.setattr(bench, "check_distribution", lambda seed, device, draws: check(seed, device))
    monkeypatch.setattr(bench, "machine_limits", lambda dtype, device: {"bandwidth": 5e9, "matmul": 7e9})
    monkeypatch.setattr(bench, "sampler_rivals", lambda device: (["ours", "generate"], {"generate_batch": "slow"}))
    path = tmp_path / "raw/b.json"
    flags = ["--quick", "--device", "cpu", "--threads", "1", "--repeats", "2"]
    assert bench.main(["--out", str(path), *flags, "--only", "sampler", "update"]) == 0
    with pytest.raises(ValueError, match=r"b\.json: made with --quick"):
        report.main(["bench", str(path.parent), "--out", str(tmp_path / "page.md")])
    measured = json.loads(path.read_text())
    path.write_text(json.dumps(measured | {"quick": False}))
    sections = bench_sections(bench_written(path.parent, tmp_path / "page.md"))
    sampler, update = (sections[heading, measured["device"], "fp32"] for heading in ("Sampler", "One update"))
    assert [row[0] for row in bench_cells(sampler)[1:] if row[0]] == ["uniform", "long tail"]
    assert sampler.count("- ok: ") == 3 and update.count("- ok: ") == 1 and "FAILED" not in sampler + update
    assert "not recorded" not in sampler + update
    ours = [run["tokens_per_s"] for run in measured["update"]["runs"] if run["side"] == "ours"]
    theirs = [run["tokens_per_s"] for run in measured["update"]["runs"] if run["side"] == "transformers"]
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    assert bench_cells(update)[1][2] == f"{sum(ours) / 2:,.1f} ({min(ours):,.1f} to {max(ours):,.1f})"
    assert bench_cells(update)[2][3] == f"{sum(ratios) / 2:.2f} ({ratios[0]:.2f} to {ratios[1]:.2f})"
    assert "Limits: 5.0 GB/s, 7 GFLOP/s." in sampler and sampler.count("| generate_batch | not run: slow |") == 2
    assert set(report.BENCH_PARTS) == {*bench.PARTS, "growth"}


def test_report_bench_committed_page_is_what_the_command_makes(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "results/bench", tmp_path / "results/bench")
    monkeypatch.chdir(tmp_path)
    page = bench_written(Path("results/bench"), Path("results/bench.md"))  # named in the page; where it is stale run it again
    assert page == (ROOT / "results/bench.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)]*)\)", page):
        assert (tmp_path / "results" / link).is_file()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "b.json: not a report of bench.py: Expecting"),
        (b"\xff{}", "b.json: not a report of bench.py: .*decode"),
        ("[]", "b.json: not a report of bench.py: it holds none of sampler, update"),
        ('{"accuracy": 1}', "b.json: not a report of bench.py: it holds none of sampler, update"),
        ({"sampler": 3}, "b.json: not a report of bench.py: it holds none of .*, or not as an object"),
        ({"head": bench_head_part(), "seed": "0"}, "b.json: not a report of bench.py: seed is '0', expected int"),
        ({"head": bench_head_part(), "command": None}, "b.json: not a report of bench.py: command is None, expected str"),
        ({"head": bench_head_part(), "dtype": "float16"}, "b.json: dtype is 'float16', expected float32 or bfloat16"),
        ({"head": bench_head_part(), "kind": "mps"}, "b.json: device_type is 'mps', expected cpu or cuda"),
        ({"head": bench_head_part(), "quick": True}, "b.json: made with --quick"),
        ({"head": {}}, r"b.json: its part head is not what bench.py writes \(KeyError\('summary'\)\)"),
        ({"growth": {"curves": [3]}}, "b.json: its part growth is not what bench.py writes"),
        ({"sampler": bench_sampler_part(checks={"new": {"ok": True}})}, r"b.json: its part sampler .*KeyError\('new'\)"),
        ({"sampler": bench_sampler_part(limits={"bandwidth": "1", "matmul": 2})}, "b.json: its part sampler is not what"),
        ({"update": bench_trained_part("x", ratio=None)}, "b.json: its part update is not what bench.py writes"),
        ({"update": bench_trained_part("x", runs=[])}, "b.json: its part update is not what bench.py writes"),
    ],
)
def test_report_bench_names_the_file_that_is_wrong(tmp_path, content, message):
    folder, out = tmp_path / "raw", tmp_path / "page.md"
    bench_json(folder / "a.json", device="another", head=bench_head_part())
    if isinstance(content, dict):
        bench_json(folder / "b.json", **content)
    else:
        (folder / "b.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"^{re.escape(str(folder))}/{message}"):
        report.main(["bench", str(folder), "--out", str(out)])
    assert not out.exists()


def test_report_bench_refuses_two_reports_of_the_same(tmp_path):
    folder = tmp_path / "raw"
    bench_json(folder / "a.json", head=bench_head_part(), sampler=bench_sampler_part())
    for changes in ({"device": "Chip C"}, {"dtype": "bfloat16"}):  # another device or dtype is not the same
        bench_json(folder / "b.json", head=bench_head_part(), **changes)
        assert "## The chunked head" in bench_written(folder, tmp_path / "page.md")
    bench_json(folder / "b.json", step=bench_trained_part("trl"), head=bench_head_part())
    with pytest.raises(ValueError, match=r"/a\.json and .*/b\.json both hold head on Chip A\|B in float32"):
        report.main(["bench", str(folder), "--out", str(tmp_path / "page.md")])
    left_out = {"left_out": "trl is not installed: pip install trl", "runs": [], "checks": {}}
    bench_json(folder / "a.json", step=left_out)  # a part that could not run is in nobody's way
    assert bench_cells(bench_sections(bench_written(folder, tmp_path / "page.md"))["A whole step", "Chip A|B", "fp32"])
    for path in folder.glob("*.json"):
        path.unlink()
    for _ in range(2):  # nothing there, then nothing measured
        with pytest.raises(ValueError, match="raw: no report of bench.py with figures in it"):
            report.main(["bench", str(folder), "--out", str(tmp_path / "page.md")])
        bench_json(folder / "a.json", step=left_out)


def test_report_bench_reads_the_first_reports_too(tmp_path):
    """They name the dtype in the head alone, no shape, and no share of the peak for the update."""
    path = bench_json(tmp_path / "raw/a.json", head=bench_head_part() | {"dtype": "torch.bfloat16"})
    old = {name: value for name, value in json.loads(path.read_text()).items() if name not in ("dtype", "shape")}
    path.write_text(json.dumps(old))
    bench_json(tmp_path / "raw/b.json", update=bench_trained_part("transformers"))
    sections = bench_sections(bench_written(tmp_path / "raw", tmp_path / "page.md"))
    assert len(bench_cells(sections["The chunked head", "Chip A|B", "bf16"])) == 3
    assert [row[-2] for row in bench_cells(sections["One update", "Chip A|B", "fp32"])[1:]] == ["not recorded"] * 2


def test_report_bench_loads_no_torch(tmp_path):
    bench_json(tmp_path / "raw/a.json", head=bench_head_part())
    code = "import sys, report; report.main(sys.argv[1:]); print('torch' in sys.modules)"
    done = run_script("-c", code, "bench", tmp_path / "raw", "--out", tmp_path / "page.md")
    assert done.stdout.splitlines() == [f"{tmp_path / 'page.md'}: tables 1, reports 1", "False"]
