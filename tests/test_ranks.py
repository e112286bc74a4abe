"""Several ranks: gloo on a CPU, equal to one rank."""

import itertools
import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import parallel
import rollout
import sgpo
from data.examples import shuffled
from model import ModelConfig, blank_model, build_model, load_model
from tests.common import CPU, ROOT, TIMES, TINY_BASE, on_ranks, read_metrics, run_script, tiny_rows, write_rows


def test_balance_gives_every_rank_a_fair_share():
    costs = [1, 90, 2, 80, 3, 70, 4, 60]  # every second one is long: by turns, one of two ranks would get all of them
    assert parallel.balance(costs, 2) == [[0, 1, 6, 7], [2, 3, 4, 5]]
    generator = random.Random(0)
    for ranks, count in itertools.product(range(1, 6), (0, 1, 7, 20)):
        costs = [generator.paretovariate(1) for _ in range(count)]
        shares = parallel.balance(costs, ranks)
        assert sorted(itertools.chain(*shares)) == list(range(count)) and len(shares) == ranks
        assert max(map(len, shares)) - min(map(len, shares)) <= 1 and (not count or 0 in shares[0])


def test_the_percentile_over_ranks_is_that_of_all_their_tokens(monkeypatch):
    """3,000 tokens with the values 0 to 2999, of which three may be larger: all on this rank, or some on another."""
    want = {"logprob_error": 2999.0, "logprob_error_p999": 2996.0}
    assert sgpo.largest_errors(torch.arange(3000.0), 3000) == want
    monkeypatch.setattr(sgpo, "all_gather", lambda own: [own, [2996.0, 2997.0, 2998.0, 2999.0]])
    assert sgpo.largest_errors(torch.arange(2960.0), 3000) == want
    monkeypatch.setattr(sgpo, "all_gather", lambda own: [own, []])
    assert sgpo.largest_errors(torch.zeros(0), 0) == {"logprob_error": 0.0, "logprob_error_p999": 0.0}


def test_leave_ends_at_once_with_its_status_and_all_that_was_said():
    code = "import atexit, sys, parallel; atexit.register(print, 'torn down'); print('a'); sys.stderr.write('b')"
    done = run_script("-c", code + "; parallel.leave(3)", PYTHONUNBUFFERED="")
    assert (done.returncode, done.stdout, done.stderr) == (3, "a\n", "b")


# ---------------------------------------------------------------------------------------------------- equal runs

# Three problems a step in two minibatches: on two and on four ranks some always have nothing to do.
COMMON = "--steps 1 --problems_per_step 3 --minibatches 2 --eval_limit 3 --eval_n 1 --no-eval_guided --device cpu"
COMMON += " --sft_fraction 0.01 --sft_batch 3 --sft_epochs 1"
METHOD_FLAGS = {
    "sgpo": "",
    "hinted": "",
    "luffy": "",
    "hpt": "--hpt_gate 4",  # half of the group, so that some problems have responses in the loss and others solutions
    "sft": "--data FEW --sft_epochs 3 --sft_validation 0.25 --sft_learning_rate 3e-4",
}
LORA = "--lora_rank 3"  # one of four ranks holds no row of any A
FLOAT16 = ("float16", "sft", "--dtype float16 --micro_tokens 64")  # every row is a micro-batch, on any number of ranks
MORE = [("lora", "sgpo", LORA), FLOAT16]
RUNS = {  # number of ranks: (name, method, flags)
    1: [(method, method, "") for method in METHOD_FLAGS] + MORE,
    2: [(method, method, "--offload" if method == "luffy" else "") for method in METHOD_FLAGS] + MORE,
    4: [("hpt", "hpt", ""), ("replicas", "sgpo", "--shard_ranks 2"), ("lora", "sgpo", LORA + " --offload")],
}
RANK_SCRIPT = """
import sys
import torch, torch.distributed as dist
import parallel, train

def stages_and_a_look(run, *given):
    stages(run, *given)
    own = torch.cat([parameter.detach().full_tensor().flatten() for parameter in run.model.parameters()])  # by its replica
    for rank, other in enumerate(parallel.all_gather(own)):
        assert torch.equal(own, other), f"ranks {{dist.get_rank()}} and {{rank}} have other weights"

stages, train.stages = train.stages, stages_and_a_look
parallel.start_ranks("cpu", 3)
for name, method, flags in {runs!r}:
    train.main([*flags.split(), "--method", method, "--out", sys.argv[1] + "/" + name])
dist.destroy_process_group()
"""


def start_runs(folder):
    """Make all RUNS, each in folder/ranks/name."""
    rows = tiny_rows(12)
    for i in shuffled(range(12), rollout.stream_seed(0, "sft validation"))[3:]:
        rows[i]["solution"] = "9 " * 20  # learning that makes the loss of the other three rise: the first epoch's weights count
    few = str(write_rows(folder / "few.jsonl", rows))
    for ranks, runs in RUNS.items():
        runs = [(name, method, f"{COMMON} {METHOD_FLAGS[method]} {more}".replace("FEW", few)) for name, method, more in runs]
        script = folder / f"{ranks}.py"
        script.write_text(RANK_SCRIPT.format(runs=runs))
        on_ranks(ranks, script, folder / str(ranks))


def assert_equal_runs(one, many, method):
    """Loss, clipped gradient norm, every other metric, samples, and the weights after the run."""
    first, second = read_metrics(one), read_metrics(many)
    stages = {"sft", "sft_validation"} if method == "sft" else {"sft", method, "eval"}
    assert len(first) == len(second) and stages == {record["stage"] for record in first[1:]}
    for a, b in zip(first[1:], second[1:], strict=True):
        a, b = ({k: v for k, v in record.items() if k not in TIMES and "logprob_error" not in k} for record in (a, b))
        numbers = {k for k, v in a.items() if isinstance(v, float)}
        assert {k: a[k] for k in a.keys() - numbers} == {k: b[k] for k in b.keys() - numbers}
        assert {k: a[k] for k in numbers} == pytest.approx({k: b[k] for k in numbers}, rel=2e-3, abs=1e-5)
    nets = [load_model(str(f), dtype=torch.float32, device="cpu")[0] for f in (one / "model", many / "model", TINY_BASE)]
    for (name, a), (_, b), (_, before) in zip(*(net.named_parameters() for net in nets), strict=True):
        moved = (a - before).abs().max()
        assert (moved > 0) == (many.name != "lora" or name.endswith("proj.weight"))
        assert (a - b).abs().max() <= 0.02 * moved + 1e-7
    if method != "sft":
        samples = [[json.loads(line) for line in (f / "samples.jsonl").read_text().splitlines()] for f in (one, many)]
        keep = ("step", "id", "group", "text", "reward")
        first, second = ([{k: sample[k] for k in keep} for sample in rows] for rows in samples)
        assert first == second


def test_two_and_four_ranks_equal_one(tmp_path):
    """In one test, because all of them start together. RANK_SCRIPT sees that each rank has the same weights after a run."""
    start_runs(tmp_path)
    sft = [record["loss"] for record in read_metrics(tmp_path / "1/sft") if record.get("stage") == "sft_validation"]
    assert min(sft) == sft[0] < sft[-1] - 0.1  # so the kept weights are not the last ones
    for ranks in (2, 4):
        for name, method, _ in RUNS[ranks]:
            print(ranks, name)  # pytest shows it if the comparison fails
            one, many = tmp_path / "1" / (name if name == "lora" else method), tmp_path / str(ranks) / name
            assert read_metrics(many)[0]["ranks"] == ranks
            if name != "float16":
                assert_equal_runs(one, many, method)
    runs = [[r for r in read_metrics(tmp_path / ranks / "float16") if r.get("stage") == "sft"] for ranks in "12"]
    one, two = ([[r["loss_scale"], r["grad_norm"] or -1, r["loss"]] for r in records] for records in runs)
    assert one[0][:2] == [2.0**15, -1] and one[-1][1] > 0  # it overflows at first, on both alike
    assert np.array(two) == pytest.approx(np.array(one), rel=1e-2)


# ---------------------------------------------------------------------------------------------------- the parts

SMALL = dict(model_type="qwen2", vocab_size=97, hidden_size=10, intermediate_size=22, num_hidden_layers=2) | dict(
    num_attention_heads=5, num_key_value_heads=1, rms_norm_eps=1e-6, max_position_embeddings=64, eos_token_id=3
)
PARTS_SCRIPT = """
import os, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from safetensors.torch import load_file
import checkpoint, model, parallel

cpu, folder, raw = parallel.start_ranks("cpu", 3), Path(sys.argv[1]), {raw!r}
rank = dist.get_rank()

def say(text):
    os.write(1, (text + "\\n").encode())  # in one piece, unlike print

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
net(torch.arange(20)[None]).square().mean().backward()
optimizer.step()
checkpoint.save_checkpoint(folder / "checkpoints", "a", net, optimizer, {{}})
other, moments = sharded()
checkpoint.load_checkpoint(folder / "checkpoints/a", other, moments)
for a, b in zip(net.parameters(), other.parameters(), strict=True):
    assert torch.equal(a.to_local(), b.to_local())
    assert torch.equal(optimizer.state[a]["exp_avg_sq"].to_local(), moments.state[b]["exp_avg_sq"].to_local())
say(f"held: {{len(net.model.layers[0].self_attn.k_proj.bias.to_local())}}")

control = parallel.Control(1)
assert control.barrier(rank) == 3
assert control.preemptible(lambda: rank) == rank
control.stop_asked = rank == 2  # SIGTERM came to one rank
try:
    control.preemptible(lambda: None)
except parallel.Preempted:
    say("preempted")
control.timeout_minutes = 1 / 60
if rank == 1:
    time.sleep(6)
else:
    start = time.monotonic()
    try:
        with parallel.ranks_of("cpu", 3):
            control.barrier()
    except parallel.RankLost as error:
        say(f"lost: {{time.monotonic() - start < 5}} {{error}}")
"""


def test_uneven_shards_and_ranks_that_do_not_come(tmp_path):
    """On four ranks: rows that do not divide by four, and a bias of two rows, of which two ranks hold none."""
    config = ModelConfig.from_dict(SMALL)
    whole = build_model(config, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device=CPU)
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter)
    save_file(whole.state_dict(), tmp_path / "model.safetensors")
    script = tmp_path / "parts.py"
    script.write_text(PARTS_SCRIPT.format(raw=SMALL))
    done = on_ranks(4, script, tmp_path, check=False)
    lines = sorted(done.stdout.splitlines())
    assert [line[6:] for line in lines if line.startswith("held: ")] == ["0", "0", "1", "1"], done.stderr[-3000:]
    assert lines.count("preempted") == 4
    lost = [line for line in lines if line.startswith("lost: True rank 0 lost contact")]
    assert len(lost) == 1 and "Ranks 1 failed" in lost[0] and "--timeout_minutes" in lost[0]


def test_with_offload_only_the_parameters_are_in_host_memory(worker):
    """The angles are a buffer, which FSDP moves when it shards: before they are filled. The meta device is the GPU here."""
    net, _ = blank_model(TINY_BASE)
    parallel.shard(net, device=CPU, dtype=torch.float32, shard_ranks=0, offload=True)
    parallel.load_sharded(net, TINY_BASE, device=torch.device("meta"), offload=True)
    assert net.inv_freq.device.type == "meta"
    assert {parameter.to_local().device.type for parameter in net.parameters()} == {"cpu"}


def test_a_rank_with_a_gpu_that_fails_does_not_wait_for_the_others(tmp_path):
    """NCCL's ending would; here a stand-in that takes for ever."""
    script = tmp_path / "fail.py"
    script.write_text("""
import time
import torch, torch.distributed as dist
import parallel
dist.destroy_process_group = lambda: time.sleep(600)
dist.is_initialized, dist.get_rank, dist.get_world_size = lambda: True, lambda: 3, lambda: 8
parallel.start_ranks = lambda *_: torch.device("cuda")
with parallel.ranks_of("cuda", 1):
    raise SystemExit("error: the reason")
""")
    done = run_script(script, PYTHONPATH=str(ROOT))
    assert done.returncode == 1 and done.stderr.strip().endswith("the reason"), done.stderr


def test_an_error_of_preemptible_work_comes_through_and_none_is_begun_after_sigterm():
    control, begun = parallel.Control(1), []

    def fails():
        begun.append("fails")
        raise ValueError("the reason")

    with pytest.raises(parallel.Preempted) as stopped:
        control.preemptible(fails)
    assert str(stopped.value.__cause__) == "the reason"
    control.stop_asked = True
    with pytest.raises(parallel.Preempted):
        control.preemptible(fails)
    assert begun == ["fails"]
