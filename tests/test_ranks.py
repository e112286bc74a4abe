"""Several ranks: gloo on a CPU, equal to one rank."""

import itertools
import json
import random

import pytest
import torch
from safetensors.torch import save_file

import checkpoint
import parallel
import rollout
import train
from model import ModelConfig, blank_model, build_model, load_model
from tests.common import (
    CPU,
    ROOT,
    TIMES,
    TINY_BASE,
    make_run,
    on_ranks,
    read_metrics,
    run_script,
    tiny_rows,
    weights_of,
    write_rows,
)


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
