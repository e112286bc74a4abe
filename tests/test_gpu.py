"""Kernels, graphs and memory on a GPU; what can be tested of them on a CPU is."""

import importlib.util
import itertools
import math
import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import kv_cache
import model as models
import rollout
from model import ModelConfig, build_model
from rollout import generate, pack
from tests.common import (
    CPU,
    FAMILIES,
    PROMPTS,
    ROOT,
    STOPS,
    gathered_attention,
    live_bytes,
    prompt_seeds,
    random_ids,
    read_metrics,
    run_script,
    varlen_by_loops,
)


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
    assert models.reproduces(partial(varlen_by_loops, window_size=(-1, 0)), *shape)
    assert not models.reproduces(from_the_first_key, *shape)
    assert not models.reproduces(missing, *shape)
    assert models.packed_kernel(*shape) is None  # it would need CUDA


@torch.no_grad()
def test_paged_attention_kernel():
    """The Triton kernel against a loop over keys picked one by one: on a GPU, or in Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed (torch's CUDA builds bring it)")
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", "from tests import test_gpu; test_gpu.check_paged_attention_kernel()"]
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
