"""model.py and rollout.py by themselves (with kv_cache.py): load a Hugging Face folder, sample, and score what was sampled.

    python examples/sample.py MODEL_FOLDER "What is 1 + 2?"

rollout.py needs of a model: a call `model(ids, positions, lengths=, cache=, head=)` as in model.py; `config` with
num_hidden_layers, num_key_value_heads, head_dim, max_position_embeddings and eos_ids; `device`, `compute_dtype`, `training`,
`eval()` and `train()`.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import encode_chat, load_model
from rollout import generate, pack


def main(folder: str, text: str, n: int = 4) -> float:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, tokenizer = load_model(folder, dtype=dtype, device=device)
    prompt = encode_chat(tokenizer, [{"role": "user", "content": text}])
    (group,) = generate(
        model, [prompt], n=n, max_new_tokens=32, temperature=1.0, top_p=0.95, eos_ids=model.config.eos_ids, seed=[0]
    )
    for row in group:
        print(f"{sum(row.logprobs):8.2f} nats  {tokenizer.decode(row.response_ids, skip_special_tokens=True)!r}")
    # the same tokens in one packed forward, without padding, as in training: the prompt is computed once
    packed = pack([prompt] * n, [row.response_ids for row in group], device=device)
    with torch.no_grad():
        logits = model(**packed.layout)[0, packed.predict].float()  # (M, V), M response tokens in all
    logprobs = logits.log_softmax(-1).gather(-1, packed.targets[:, None])[:, 0]
    error = (logprobs - torch.tensor([x for row in group for x in row.logprobs], device=device)).abs().max().item()
    print(f"largest difference between the sampler's log-probability of a token and the forward's: {error:.1e}")
    return error


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
