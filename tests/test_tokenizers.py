"""Tokenizers of model folders: which ids they give, what ends a turn, and whether others can read what we save."""

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import model as model_module
from data.problems import Problem
from model import ModelConfig, blank_model, build_model, encode_chat, encode_text, load_model, load_tokenizer, save_model
from tests.common import CPU, FAMILIES, ROOT
from train import Config, encode_examples

TRANSFORMERS4 = os.environ.get("SGPO_TRANSFORMERS4")  # a Python interpreter that has transformers 4
CASES = json.loads((ROOT / "tests/tokenizer_cases.json").read_text(encoding="utf-8"))
TEMPLATES, SPECIAL, PLAIN, SPELLED = (CASES[name] for name in ("templates", "special", "plain", "spelled"))
pytestmark = pytest.mark.filterwarnings("ignore:.* ends a response too")


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """make(...) -> the folder of a small model: byte-level BPE, digits in threes, <|endoftext|> is the end of sequence."""

    def make(kind="chatml", name="PreTrainedTokenizerFast", family="llama", special=True, more=(), **fields):
        folder = tmp_path_factory.mktemp("model") / "model"
        tokenizer = Tokenizer(models.BPE())
        threes = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence([threes, to_bytes]), decoders.ByteLevel()
        letters = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=letters, show_progress=False)
        tokenizer.train_from_iterator(CASES["corpus"], trainer)
        add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
        add([AddedToken(token, normalized=False) for token in SPECIAL])
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
        sizes = {"vocab_size": tokenizer.get_vocab_size(), "eos_token_id": tokenizer.token_to_id("<|endoftext|>")}
        fields = FAMILIES[family].to_dict() | sizes | fields
        tokenizer.add_tokens(list(more))
        random = torch.Generator().manual_seed(0)
        net = build_model(ModelConfig.from_dict(fields), generator=random, dtype=torch.float32, device=CPU)
        save_model(net, PreTrainedTokenizerFast(tokenizer_object=tokenizer), folder)
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "chat_template.jinja").write_text(TEMPLATES[kind][0], encoding="utf-8")
        names = {"eos_token": "<|endoftext|>", "bos_token": "<s>", "pad_token": "[PAD]"}  # [PAD] has no row
        settings = {"tokenizer_class": name, "add_bos_token": True, **names}
        if name == "TokenizersBackend":  # transformers 5's
            settings["extra_special_tokens"] = ["<|im_end|>"]
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return folder

    return make


@pytest.mark.parametrize("special", [True, False])
def test_a_templates_end_of_turn_ends_responses_and_solutions(make, special):
    folder = make(special=special)
    with pytest.warns(UserWarning, match=r"model: <\|im_end\|> ends a response too"):
        blank_model(folder)
    for kind, (template, end) in TEMPLATES.items():
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        model, tokenizer = blank_model(folder)
        ends = dict.fromkeys(tokenizer.convert_tokens_to_ids([end or "<|endoftext|>", "<|endoftext|>"]))
        assert model.config.eos_ids == tuple(ends), kind
        problem = Problem("p", "What is 1 + 2?", "3", f"It is {end} 3.", None)
        cfg = Config(model="", data="", out="", sft_guided=0.0, method="grpo")
        (example,) = encode_examples([problem], tokenizer, cfg, model.config.eos_ids[0])
        assert [i for i in example.solution_ids if i in ends] == [next(iter(ends))] == example.solution_ids[-1:], kind
        assert tokenizer.decode(example.solution_ids, skip_special_tokens=True) == problem.solution, kind


def test_thoughts_that_the_prompt_opens_are_not_opened_again_by_a_solution(make):
    folder, problem = make(), Problem("p", "What is 1 + 2?", "3", "<think>\nhm</think> 3.", None)
    cfg = Config(model="", data="", out="", sft_guided=0.0, method="grpo")
    for opening, solution in (("", problem.solution), ("<think>\n", "hm</think> 3.")):
        template = TEMPLATES["chatml"][0] + "{% if add_generation_prompt %}" + opening + "{% endif %}"
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        tokenizer = load_tokenizer(folder)
        (example,) = encode_examples([problem], tokenizer, cfg, end_id=0)
        assert tokenizer.decode(example.solution_ids[:-1]) == solution


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2TokenizerFast", "LlamaTokenizerFast", "Unheard"])
def test_ids_are_those_of_tokenizer_json(make, family, name):
    folder = make(name=name, family=family)
    file, tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json")), load_tokenizer(folder)
    for text in PLAIN + SPELLED:
        assert tokenizer.encode(text) == file.encode(text).ids  # by its own post-processor: no <s>
    assert {**tokenizer.get_vocab(), "[PAD]": 0} == {**file.get_vocab(), "[PAD]": 0}


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("kind", ["a system prompt of its own", "llama 3", "mistral", "gemma", "deepseek"])
def test_only_the_template_writes_control_tokens(make, kind, special):
    folder = make(kind, special=special)
    theirs, ours = PreTrainedTokenizerFast.from_pretrained(folder), load_tokenizer(folder)
    control = {ours.convert_tokens_to_ids(token) for token in SPECIAL if special or token in TEMPLATES[kind][0]}
    render = partial(theirs.apply_chat_template, add_generation_prompt=True)
    chats = {text: [{"role": "user", "content": text}] for text in ["x", *PLAIN, *SPELLED]}
    for text in PLAIN:  # nothing changes
        assert encode_chat(ours, chats[text]) == render(chats[text], return_dict=False)
        assert encode_text(ours, text) == theirs.encode(text, add_special_tokens=False)
    frame = [i for i in encode_chat(ours, chats["x"]) if i in control]
    for text in SPELLED:
        ids, alone = encode_chat(ours, chats[text]), encode_text(ours, text)
        assert ours.decode(ids) == render(chats[text], tokenize=False) and [i for i in ids if i in control] == frame
        assert ours.decode(alone) == text and not control & {*alone}


def test_around_a_spelled_control_token_nothing_else_changes(make, monkeypatch):
    """encode_chat's other way, taken for plain texts, gives what the template gives, also if each text gets a blank first."""
    folder = make("mistral")
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    file.normalizer = normalizers.Prepend(" ")
    file.save(str(folder / "tokenizer.json"))
    ours, real = load_tokenizer(folder), model_module.encode_text
    for text in filter(str.strip, PLAIN):
        chat, calls = [{"role": "user", "content": text}], []

        def encode(*arguments, calls=calls):
            calls.append(arguments)
            return real(*arguments) if len(calls) > 1 else [-1]  # so the first text looks as if it spelled one

        monkeypatch.setattr(model_module, "encode_text", encode)
        ids = encode_chat(ours, chat)
        assert len(calls) > 1 and ids == ours.apply_chat_template(chat, add_generation_prompt=True, return_dict=False), text


def test_ids_without_a_row_in_the_embedding_are_refused(make):
    with pytest.raises(ValueError, match=r"model: its tokenizer's '<\|new\|>' has id (\d+), .* vocab_size.* is \1"):
        blank_model(make(more=["<|new|>", "<|newer|>"]))
    with pytest.raises(ValueError, match="model: its tokenizer's 'an end of sequence' has id 5000, but"):
        blank_model(make(eos_token_id=[0, 5000]))


READ = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto"), AutoTokenizer.from_pretrained(folder)
    ends, template, dtype = model.generation_config.eos_token_id, tokenizer.chat_template, str(model.dtype)
    logits = model.float()(torch.tensor([[0, 40, 41, 42]])).logits[0, -1].tolist()
    print(json.dumps([ends, template, dtype, logits]))
"""


@pytest.mark.parametrize("python", [sys.executable, TRANSFORMERS4], ids=["transformers 5", "transformers 4"])
def test_others_read_what_is_saved(make, tmp_path, python):
    if python is None:
        pytest.skip("SGPO_TRANSFORMERS4 names no interpreter that has transformers 4")
    wanted = []
    families = ("llama3-rope", "LlamaTokenizerFast"), ("qwen2", "Qwen2Tokenizer"), ("qwen3", "TokenizersBackend")
    for family, name in families:  # qwen2's rope_theta is 1e6
        source, saved = make(family=family, name=name), tmp_path / family
        model, tokenizer = load_model(str(source), dtype=torch.bfloat16, device="cpu")
        save_model(model, tokenizer, saved)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if name != "TokenizersBackend" or file != "tokenizer_config.json":
                assert (saved / file).read_bytes() == (source / file).read_bytes()
        assert len({file.stat().st_mode for file in saved.iterdir()}) == 1  # of the weights too
        assert json.loads((saved / "config.json").read_text())["rope_parameters"] == model.config.rope
        logits = model.float()(torch.tensor([[0, 40, 41, 42]]))[0, -1].tolist()
        wanted.append([list(model.config.eos_ids), tokenizer.chat_template, "torch.bfloat16", pytest.approx(logits, abs=1e-4)])
    command = [python, "-c", READ, *(str(tmp_path / family) for family, _ in families)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == wanted


def test_a_tokenizer_that_was_changed_is_saved_as_it_is(make, tmp_path):
    model, tokenizer = load_model(str(make("mistral")), dtype=torch.float32, device="cpu")
    tokenizer.chat_template = TEMPLATES["roles in words"][0]
    save_model(model, tokenizer, tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").chat_template == tokenizer.chat_template
