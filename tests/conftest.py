"""Fixtures for all test files, here and in the folder above."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import model as models
import parallel
import rollout
import train
from data import hard_world, prepare
from data.examples import shuffled
from grader import MathWorker
from model import ModelConfig, build_model
from tests.common import CPU, FAMILIES, REAL_DATA, ROOT, read_metrics, tiny_rows, write_rows


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Two threads on a busy two-core machine are slower than one, and erratic."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def world_of_one():
    """The process group that train.main makes; here one for all tests. It may run twice: test_sgpo.py imports it."""
    if not torch.distributed.is_initialized():
        parallel.start_ranks("cpu", timeout_minutes=5)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def real_data():
    """{sha256: path} of the files below $SGPO_TEST_DATA, whatever their names: those of prepare.SOURCES, and GRADER_PAIRS."""
    if not REAL_DATA:
        pytest.skip("reads published data that is not part of the project: set SGPO_TEST_DATA to a folder with it (README)")
    return {prepare.sha256_of(path): path for path in sorted(Path(REAL_DATA).rglob("*")) if path.is_file()}


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
    ours.load_state_dict(dict(models.read_weights(ours, folder, device=CPU)))
    return theirs, ours, folder


@pytest.fixture(scope="module")
def small_model():
    return build_model(
        ModelConfig.from_dict(FAMILIES["qwen2"].to_dict()),
        generator=torch.Generator().manual_seed(1),
        dtype=torch.float32,
        device=CPU,
    )


@pytest.fixture(scope="module")
def hard():
    return hard_world.make_rows(0)


@pytest.fixture(scope="module")
def worker():
    with MathWorker() as worker:
        yield worker


RESUMED = "--steps 3 --problems_per_step 3 --minibatches 2 --eval_limit 2 --eval_every 1 --no-eval_guided --device cpu"
# four updates on 13 rows, validated after the second and the fourth
RESUMED += " --sft_fraction 0.475 --sft_validation 0.3 --sft_batch 7 --sft_epochs 2 --sft_learning_rate 1e-3"


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Flags of the run that is stopped and goes on: the loss on the held-out rows of SFT rises, so RL starts from the second
    update's weights. The other rows teach something else."""
    rows = tiny_rows(40)
    for_sft = shuffled(range(40), rollout.stream_seed(0, "split"))[:19]
    for i in shuffled(for_sft, rollout.stream_seed(0, "sft validation"))[6:]:
        rows[i]["solution"] = "9 " * 20
    data = write_rows(tmp_path_factory.mktemp("resumed") / "rows.jsonl", rows)
    return [*RESUMED.split(), "--data", str(data), "--eval_data", str(ROOT / "data/tiny/test.jsonl")]


@pytest.fixture(scope="module")
def uninterrupted(resumed, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    train.main([*resumed, "--checkpoint_minutes", "0", "--out", str(out)])
    first, second = (record["loss"] for record in read_metrics(out) if record.get("stage") == "sft_validation")
    assert first < second
    return out


@pytest.fixture
def stopped(uninterrupted, tmp_path):
    """A copy of the run as a kill right after its last step would have left it."""
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    shutil.rmtree(out / "model")
    return out


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    return "sk-very-secret"


@pytest.fixture(scope="module")
def eval_worker():
    with MathWorker(timeout_s=10.0) as worker:
        yield worker
