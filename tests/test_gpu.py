"""Kernels, graphs and memory on a GPU; what can be tested of them on a CPU is."""

import copy
import importlib.util
import itertools
import math
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
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
    nucleus_logits,
    prompt_seeds,
    random_ids,
    read_metrics,
    run_script,
)


def test_the_packed_kernel_is_taken_where_it_can_run(monkeypatch):
    choose = models.packed_kernel.__wrapped__  # without its cache
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    asked = (gpu, torch.bfloat16), (gpu, torch.float16), (gpu, torch.float32), (CPU, torch.bfloat16)
    assert [choose(*given) is not None for given in asked] == [True, True, False, False]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.warns(UserWarning, match="no variable-length attention on an old card"):
        assert choose(gpu, torch.float16) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("H, K, E", [(6, 2, 64), (9, 3, 64), (12, 1, 128)])
def test_gpu_packed_kernel_equals_one_call_a_sequence(H, K, E, dtype):
    """Values and gradients. With more keys than queries, kernels have put the causal diagonal in different places, and a
    wrong one would train without an error."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device, generator = torch.device("cuda"), torch.Generator().manual_seed(0)
    inputs = []
    for heads in (H, K, K):
        values = torch.randn(1, heads, 16, E, generator=generator)
        inputs.append(values.to(device, dtype).requires_grad_())
    results = []
    for kernel in (models.varlen_kernel(), None):
        packing = models.Packing((5, 7, 4), (None, 0, None), kernel=kernel, dtype=dtype, device=device)
        out = models.attend_packed(*inputs, packing)
        gradients = torch.autograd.grad(out.float().square().sum(), inputs)
        results.append([out, *gradients])
    torch.testing.assert_close(*results, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("check", ["attention", "sample"])
def test_triton_kernels(check):
    """On a GPU, or in Triton's interpreter, in a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed (torch's CUDA builds bring it)")
    if not torch.cuda.is_available() and tuple(map(int, np.__version__.split(".")[:2])) > (2, 3):
        pytest.skip("Triton's interpreter cannot run with this numpy: it needs numpy<2.4")
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", f"from tests import test_gpu; test_gpu.check_{check}()"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **interpret}, check=True, timeout=600)


def kernel_device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def check_attention():
    """Against a loop over keys picked one by one: rows share a prompt with a neighbour, with one further on, or not."""
    groups, prompts, own = [0, 0, 0, 1, 0, 2, 2, 2, 3, 3, 1], [33, 1, 16, 17], [1, 5, 16, 10, 20, 1, 2, 3, 17, 4, 9]
    prompt, own = torch.tensor([prompts[g] for g in groups]), torch.tensor(own)
    tolerances = {torch.float32: 1e-5, torch.float16: 4e-3}
    if torch.cuda.is_available():  # the interpreter cannot multiply bf16
        tolerances[torch.bfloat16] = 3e-2
    for dtype, tolerance in tolerances.items():
        for H, K, E in ((9, 3, 64), (12, 1, 128), (4, 4, 16)):
            generator = torch.Generator().manual_seed(0)
            free = iter(torch.randperm(40, generator=generator).tolist())
            of_prompt = [list(itertools.islice(free, -(-length // 16))) for length in prompts]
            table, used = torch.zeros(11, 5, dtype=torch.int32), torch.zeros(40, 16, dtype=torch.bool)
            for b, group in enumerate(groups):
                of_row = list(itertools.islice(free, -(-int(own[b]) // 16)))
                table[b, : len(of_prompt[group] + of_row)] = torch.tensor(of_prompt[group] + of_row)
                for pages, length in ((of_prompt[group], prompts[group]), (of_row, own[b])):
                    for t in range(length):
                        used[pages[t // 16], t % 16] = True
            q = torch.randn(11, H, E, generator=generator).to(dtype)
            kv = torch.randn(2, 40, K, 16, E, generator=generator).to(dtype)
            want = gathered_attention(q.double(), kv.double(), table, prompt, own)
            kv.transpose(2, 3)[:, ~used] = math.nan  # what holds no token is never read
            arguments = [x.to(kernel_device()) for x in (q, kv, table, prompt, own)]
            for splits in (1, 3):
                got = kv_cache.paged_attention(*arguments, splits).cpu()
                torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)
            k, v = torch.randn(2, 4, K, E, generator=generator).to(kernel_device(), dtype)
            page, offset = torch.tensor([[3, 1, 8, 3], [0, 15, 7, 1]]).to(kernel_device())
            written = kv.clone().to(kernel_device())
            kv_cache.write_slots(written, page, offset, k, v)
            kv_cache.CacheView.write(SimpleNamespace(store=[want := kv.to(k)], page=page, offset=offset), 0, k, v)
            torch.testing.assert_close(written, want, equal_nan=True, atol=0, rtol=0)


@torch.no_grad()
def check_sample():
    """The same tokens as without the kernel, and nothing finite from what is not."""
    uniform = torch.linspace(0, 1 - 2**-53, 6, dtype=torch.float64)
    for name, logits in nucleus_logits().items():
        for temperature, top_p, dtype in ((0.7, 0.95, None), (1.0, 0.3, torch.float16), (1.0, 1.0, None)):
            case = logits.to(dtype or logits.dtype)
            want = rollout.sample(case, uniform, temperature, top_p)
            got = rollout.sample_in_one_kernel(*(x.to(kernel_device()) for x in (case, uniform)), temperature, top_p)
            assert torch.equal(got[0].cpu(), want[0]), (name, temperature, top_p, dtype)
            torch.testing.assert_close(got[1].cpu(), want[1], atol=2e-5, rtol=1e-5)
    logits = torch.randn(4, 5000, generator=torch.Generator().manual_seed(0))
    logits[1, 7], logits[2, 7], logits[3] = math.nan, math.inf, -math.inf
    for temperature, top_p in ((0.7, 0.9), (1.0, 1.0)):
        got = rollout.sample_in_one_kernel(*(x.to(kernel_device()) for x in (logits, uniform[:4])), temperature, top_p)
        assert got[1].isfinite().tolist() == [True, False, False, False]
        assert got[0].min() >= 0 and got[0].max() < 5000


@pytest.mark.parametrize(
    "name, shapes",
    [
        ("rms_norm", [(3, 5, 48), (48,)]),
        ("add_rms_norm", [(3, 5, 48), (3, 5, 48), (48,)]),
        ("rotate", [(1, 5, 6, 32), (1, 5, 2, 32), (1, 5, 32), (1, 5, 32)]),
        ("silu_mul", [(3, 50), (3, 50)]),
    ],
)
def test_fused_functions_are_the_plain_ones(name, shapes):
    """Compiled, with their gradients. On a GPU `fused` does so itself; a CPU needs a C++ compiler."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu and shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    function = getattr(models, name)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(kernel_device()).requires_grad_() for shape in shapes]
    more = (1e-6,) if "norm" in name else ()
    results = []
    for call in (function.__wrapped__, function if on_gpu else torch.compile(function.__wrapped__, dynamic=True)):
        out = call(*inputs, *more)
        out = out if isinstance(out, tuple) else (out,)
        results.append([*out, *torch.autograd.grad(sum(x.square().sum() for x in out), inputs)])
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


def test_projections_joined_for_decoding_are_the_three(reference):
    _, ours, _ = reference
    joined, ids = copy.deepcopy(ours), random_ids(2, 9, 0)
    joined.join_projections()
    torch.testing.assert_close(joined(ids), ours(ids), atol=1e-5, rtol=1e-5)


def test_page_attention_without_the_cpu_kernel():
    class Elsewhere(torch.Tensor):
        device = SimpleNamespace(type="other")

    q, k, v = torch.randn(3, 5, 2, 4, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    mask = torch.zeros(5, 1, 1, 4)
    mask[0, ..., 2:] = mask[3, ..., 1:] = -math.inf
    want = kv_cache.page_attention(q, k, v, mask)
    got = kv_cache.page_attention(q.as_subclass(Elsewhere), k, v, mask)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.as_subclass(torch.Tensor), b, atol=1e-5, rtol=1e-5)


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
        net = copy.deepcopy(net)
        for parameter in net.parameters() if net.device.type == "cuda" else ():
            parameter.data = parameter.data.bfloat16()
        assert (models.packed_kernel(net.device, net.compute_dtype) is None) == (net.device.type == "cpu")
        packed = pack(contexts, responses, device=net.device)
        logits = net(packed.input_ids, lengths=packed.lengths, prefixes=packed.prefixes)[0, packed.predict]
        F.cross_entropy(logits.float(), packed.targets).backward()
        gradients.append(torch.cat([p.grad.flatten().float().cpu() for p in net.parameters()]))
    assert F.cosine_similarity(*gradients, dim=0) > 0.999
