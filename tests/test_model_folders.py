"""Model folders: what is read, and what is refused with the name of the file."""

import json
import shutil

import pytest
import torch

import model as models
from data import tiny_world
from model import ModelConfig, encode_chat, load_model, save_model
from strategy import auto_messages
from tests.common import FAMILIES, ROOT

# "weights", "configs": [fields that replace those of a good config.json, a part of the message]; "templates": bad ones
CASES = json.loads((ROOT / "tests/model_folders.json").read_text(encoding="utf-8"))


def test_every_eos_id_is_kept():
    raw = {**FAMILIES["qwen2"].to_dict(), "eos_token_id": 7}
    assert ModelConfig.from_dict(raw, {"eos_token_id": [5, 7, 9]}).eos_ids == (5, 7, 9)


@pytest.fixture
def folder(small_model, tmp_path):
    """A good model folder."""
    save_model(small_model, tiny_world.build_tokenizer(), tmp_path / "model")
    edit(tmp_path / "model/config.json", layer_types=None)  # transformers checks it against the number of layers
    return tmp_path / "model"


def edit(path, **fields):
    """Add fields to a JSON file."""
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | fields))


def refused(folder, message):
    with pytest.raises(ValueError, match=message):
        load_model(str(folder), dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("fields, message", CASES["weights"])
def test_weights_that_do_not_fit_the_config(folder, fields, message):
    edit(folder / "config.json", **fields)
    refused(folder, message)


def test_a_file_that_is_missing_or_broken_is_named(folder):
    weights = folder / "model.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [16], "data_offsets": [-64, 0]}}).encode()  # before the data
    hostile = len(header).to_bytes(8, "little") + header + bytes(64)
    for content in (weights.read_bytes()[:-1000], b"", b"\x80\x04pickle", bytes([255] * 8) + b"{}", hostile):
        weights.write_bytes(content)
        refused(folder, "model.safetensors: cannot be read as safetensors")
    weights.unlink()
    refused(folder, r"model: its model\*.safetensors lack .* tensors")
    (folder / "tokenizer.json").write_text("{")
    refused(folder, "model: its tokenizer could not be loaded")
    (folder / "tokenizer.json").unlink()
    refused(folder, "model: no tokenizer.json")
    (folder / "config.json").write_text("{")
    refused(folder, "config.json: cannot be read as JSON")
    (folder / "config.json").write_text("[1]")
    refused(folder, "config.json: expected a JSON object")
    (folder / "config.json").unlink()
    refused(folder, "config.json: cannot be read as JSON")


@pytest.mark.parametrize("change, message", CASES["configs"])
def test_configs_that_would_be_computed_wrongly_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict({**FAMILIES["qwen2"].to_dict(), **change})
    with pytest.raises(ValueError, match="the field 'vocab_size' is missing"):
        ModelConfig.from_dict({"model_type": "qwen2"})


def test_bare_names_resolve_to_their_family(monkeypatch, tmp_path):
    asked = []

    def download(repo, **options):
        assert "*.py" in options["ignore_patterns"] and not any("bin" in p or p == "*" for p in options["allow_patterns"])
        asked.append(repo)
        return str(tmp_path)

    with pytest.raises(ValueError, match="no such folder"):  # the hub's library knows that this is no name
        models.resolve_model("./not/here")
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    wanted = ["Qwen/Qwen2.5-7B-Instruct", "meta-llama/Llama-3.1-8B-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"]
    for name in (*(repo.split("/")[1] for repo in wanted), "other/thing"):
        models.resolve_model(name)
    assert models.resolve_model(str(tmp_path)) == tmp_path  # an existing folder wins
    with pytest.raises(ValueError, match="no such folder"):
        models.resolve_model("gpt-17")
    assert asked == [*wanted, "other/thing"]


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_model_folders_that_ask_for_code_are_refused(folder, file):
    edit(folder / file, auto_map={"AutoTokenizer": ["custom.Tokenizer", None], "AutoConfig": "custom.Config"})
    refused(folder, rf"{file}: has an auto_map, but code of a model folder is never run")


def test_model_folders_that_bring_code_are_refused(folder, tmp_path):
    edit(folder / "tokenizer_config.json", tokenizer_class="Tokenizer")
    (folder / "tokenizer.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nclass Tokenizer: pass\n")
    refused(folder, "tokenizer.py: code of a model folder is never run")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("template", CASES["templates"])
def test_chat_templates_cannot_leave_their_sandbox(template, tmp_path):
    tokenizer = tiny_world.build_tokenizer()
    tokenizer.chat_template = template and template.replace("CANARY", str(tmp_path / "canary"))
    messages = auto_messages("What is 1 + 2?")
    with pytest.raises(ValueError, match="the chat template of .* failed: "):
        encode_chat(tokenizer, messages)
    assert messages == auto_messages("What is 1 + 2?") and list(tmp_path.iterdir()) == []


def test_two_files_with_the_same_tensor_are_refused_and_what_is_no_weight_is_not_read(folder):
    weights = folder / "model.safetensors"
    shutil.copy(weights, folder / "adapter_model.safetensors")
    load_model(str(folder), dtype=torch.float32, device="cpu")
    shutil.copy(weights, folder / "model-00001-of-00001.safetensors")
    refused(folder, "model.safetensors: .* an earlier file has it")
