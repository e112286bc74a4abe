"""Model folders: what is read, and what is refused with the name of the file."""

import json
import shutil
import sys

import pytest
import torch

import model as models
from data import tiny_world
from model import ModelConfig, encode_chat, load_model, save_model
from strategy import auto_messages
from tests.common import FAMILIES


def test_every_eos_id_is_kept(tmp_path):
    raw = {**FAMILIES["qwen2"].to_dict(), "eos_token_id": 7}
    assert ModelConfig.from_dict(raw, {"eos_token_id": [5, 7, 9]}).eos_ids == (5, 7, 9)


def write_model(folder, net):
    save_model(net, tiny_world.build_tokenizer(), folder)
    return folder


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
