"""The tiny world: a toy in which every claim of SGPO can be watched on two CPU cores, and the base model that lives in it.

    python -m data.tiny_world --out data/tiny --seed 0        (from the repository's root; about 20 minutes)

makes data/tiny again: train.jsonl, valid.jsonl, test.jsonl, and base/, a Hugging Face folder with the trained base model and
its tokenizer. The rows are the same bytes on every machine; the weights agree to floating-point noise.

A problem names a machine and two digits. Every machine makes three choices that its name does not give away: add or subtract
the inputs, double or increment the value, keep the larger or the smaller of the value and the first input, all modulo ten. The
strategy says which three, and contains no digit. A right response carries them out one by one.

The base model mirrors an instruct model. Given a strategy it carries it out, whatever it says. Given none it half knows each
machine: at each choice it takes the right operation with probability KNOWN = 0.55. It never saw the machines' true choices
more clearly than that, so to do better it has to learn from rewards or from its guided self.

Why choices between two: the KL clip drops a token when d_t > 1. If the guided side is sure, d_t is -log of the unguided
probability, so a right operation with a probability under e^-1 = 0.37 is dropped. From one choice out of eight
(d_t = ln 8 = 2.08) nothing would be learned at the paper's delta = 1.

The solutions are a strong model's: terse. They name the operations and the answer and skip the arithmetic, which the tiny
model has to write out to get right. Imitating them teaches answers, not method: as the paper says of expert traces.

It is not natural language (starter.py is). The tokenizer knows the words of this file and no others.
"""

import argparse
import json
import random
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the files of the method, from the folder above

from loss import chunked_head, sft_terms
from model import CausalLM, ModelConfig, build_model, encode_chat, save_model
from rollout import pack
from strategy import Strategy, auto_messages, guided_messages

MACHINES = tuple("kalo miru tefa sodi bane luko ravi pemu gano zeti fuma wilo dora hesi nuba jako".split())
KNOWN = 0.55  # how often the base model picks the right operation when nobody tells it
PAIRS = {"train": 40, "test": 15, "valid": 15}  # operand pairs per machine, disjoint, out of 100

# one row a choice: name in the response, sentence in the strategy, what it does to (value, second input, first input)
Operation = tuple[str, str, Callable[[int, int], int]]
CHOICES: tuple[tuple[Operation, Operation], ...] = (
    (
        ("add", "Add the second input to the first.", lambda x, y: (x + y) % 10),
        ("sub", "Subtract the second input from the first.", lambda x, y: (x - y) % 10),
    ),
    (
        ("double", "Double the value.", lambda value, _: value * 2 % 10),
        ("inc", "Increase the value by one.", lambda value, _: (value + 1) % 10),
    ),
    (
        ("max", "Keep the larger of the value and the first input.", lambda value, x: max(value, x)),
        ("min", "Keep the smaller of the value and the first input.", lambda value, x: min(value, x)),
    ),
)


# ---------------------------------------------------------------------------------------------------- problems


def machine_choices(seed: int) -> dict[str, tuple[int, int, int]]:
    """The hidden truth: for each machine, which operation (0 or 1) it takes at each of the three choices. All eight
    combinations appear twice, so that no choice can be guessed from the others."""
    combinations = [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)] * (len(MACHINES) // 8)
    random.Random(f"machines {seed}").shuffle(combinations)
    return dict(zip(MACHINES, combinations, strict=True))


def run_machine(machine: str, choices: tuple[int, int, int], x: int, y: int) -> tuple[str, int]:
    """(the response that carries the three operations out, the answer). The machine is named before each choice. A model this
    small finds it hard to look back for the name at the right moment: without the repetition it knew nothing about single
    machines, and RL had nothing to amplify."""
    (combine, _, f), (change, _, g), (keep, _, h) = (CHOICES[i][choice] for i, choice in enumerate(choices))
    combined = f(x, y)
    changed = g(combined, 0)
    kept = h(changed, x)
    work = (
        f"{machine} {combine} {x} {y} = {combined}, {machine} {change} {combined} = {changed}, "
        f"{machine} {keep} {changed} {x} = {kept}."
    )
    return f"{work} \\boxed{{{kept}}}", kept


def problem_text(machine: str, x: int, y: int) -> str:
    return f"A {machine} machine gets {x} and {y}. What comes out?"


def strategy_of(machine: str, choices: tuple[int, int, int]) -> Strategy:
    steps = tuple(CHOICES[i][choice][1] for i, choice in enumerate(choices))
    return Strategy(f"{machine} machine", "Work modulo ten: combine the inputs, change the value, then compare.", steps)


def make_rows(seed: int) -> dict[str, list[dict]]:
    """The rows of train, test and valid in the format of data/README.md; a machine's operand pair is in one of them only. valid
    is for choosing settings (a learning rate), so that test has not been looked at before the last run."""
    truth = machine_choices(seed)
    names = [name for name, count in PAIRS.items() for _ in range(count)]
    splits: dict[str, list[dict]] = {name: [] for name in PAIRS}
    for machine in MACHINES:
        pairs = [(x, y) for x in range(10) for y in range(10)]
        random.Random(f"operands {seed} {machine}").shuffle(pairs)
        for name, (x, y) in zip(names, pairs, strict=False):  # the rest of the pairs is in no file
            _, answer = run_machine(machine, truth[machine], x, y)
            operations = ", ".join(f"{machine} {CHOICES[i][choice][0]}" for i, choice in enumerate(truth[machine]))
            row = {
                "id": f"tiny-{machine}-{x}{y}",
                "problem": problem_text(machine, x, y),
                "answer": str(answer),
                "solution": f"{operations}. \\boxed{{{answer}}}",
                "strategy": strategy_of(machine, truth[machine]).to_dict(),
            }
            splits[name].append(row)
    for split in splits.values():
        random.Random(f"order {seed}").shuffle(split)
    return splits


# ---------------------------------------------------------------------------------------------------- tokenizer


def build_tokenizer():
    texts = []
    for machine in MACHINES:
        for choices in ((0, 0, 0), (1, 1, 1)):
            texts.append(guided_messages(problem_text(machine, 0, 0), strategy_of(machine, choices))[0]["content"])
            texts.append(run_machine(machine, choices, 0, 0)[0])
    return word_tokenizer(texts)


def word_tokenizer(texts: list[str]):
    """A word-level tokenizer over the words of these texts, with a chat template of the ChatML kind. One token a word, digit,
    punctuation mark, and one for "\\boxed{". <|im_end|> ends a turn and a response."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pattern = r"\\boxed\{|[A-Za-z]+|[0-9]|[^\sA-Za-z0-9]"
    texts = ["user assistant", "".join(str(digit) for digit in range(10)), *texts]
    special = ["<|pad|>", "<|unk|>", "<|im_start|>", "<|im_end|>"]
    words = sorted({word for text in texts for word in re.findall(pattern, text)})
    vocabulary = {word: index for index, word in enumerate([*special, *words])}

    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    isolate = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([isolate, pre_tokenizers.WhitespaceSplit()])
    tokenizer.decoder = decoders.WordPiece(cleanup=False)  # a blank between tokens, or two digits would read as one number
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return wrapped


# ---------------------------------------------------------------------------------------------------- base model


def base_config(vocab_size: int, eos_id: int) -> ModelConfig:
    """A Llama-shaped model of 0.7 M parameters: 4 layers, width 128. Not a Qwen2: for that model type AutoTokenizer puts Qwen's
    own pre-tokenizer in place of the one in tokenizer.json."""
    raw = {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "eos_token_id": eos_id,
    }
    return ModelConfig.from_dict(raw)


def base_example(rng: random.Random, truth: dict[str, tuple[int, int, int]]) -> tuple[list[dict], str]:
    """One (chat messages, response): half of them guided by a strategy of random choices, half unguided and half known."""
    machine, x, y = rng.choice(MACHINES), rng.randrange(10), rng.randrange(10)
    if rng.random() < 0.5:
        # any choices, not the machine's own: the model learns to read the strategy, and nothing about the machine
        choices = tuple(rng.randrange(2) for _ in CHOICES)
        messages = guided_messages(problem_text(machine, x, y), strategy_of(machine, choices))
    else:
        choices = tuple(right if rng.random() < KNOWN else 1 - right for right in truth[machine])
        messages = auto_messages(problem_text(machine, x, y))
    return messages, run_machine(machine, choices, x, y)[0]


def train_base(seed: int, steps: int, batch: int, learning_rate: float, init_seed: int = 0) -> tuple[CausalLM, object]:
    """Supervised training of the base model from scratch: (model, tokenizer). `seed` draws the examples."""
    rng, truth = random.Random(f"base {seed}"), machine_choices(seed)
    return train_model(build_tokenizer(), lambda: base_example(rng, truth), steps, batch, learning_rate, init_seed)


def train_model(
    tokenizer,
    draw: Callable[[], tuple[list[dict], str]],
    steps: int,
    batch: int,
    learning_rate: float,
    init_seed: int,
) -> tuple[CausalLM, object]:
    """Train a new model on (chat messages, response) examples that `draw` makes; `init_seed` draws its first weights."""
    model = build_model(
        base_config(len(tokenizer), tokenizer.eos_token_id),
        generator=torch.Generator().manual_seed(init_seed),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    warm_up = max(1, steps // 20)
    terms = partial(sft_terms, temperature=1.0)
    bar = tqdm(range(steps), desc="base model", disable=None)
    for step in bar:
        decay = min(1.0, (step + 1) / warm_up) * (1 - step / steps)
        optimizer.param_groups[0]["lr"] = learning_rate * decay
        examples = [draw() for _ in range(batch)]
        contexts = [encode_chat(tokenizer, messages) for messages, _ in examples]
        responses = [
            tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id] for _, text in examples
        ]
        packed = pack(contexts, responses, device=torch.device("cpu"))
        weight = torch.full(packed.targets.shape, 1 / packed.targets.numel())
        loss, _ = model(
            packed.input_ids,
            lengths=packed.lengths,
            prefixes=packed.prefixes,
            head=lambda hidden, head_weight, packed=packed, weight=weight: chunked_head(
                hidden[0, packed.predict], head_weight, terms, (packed.targets, weight), chunk_tokens=4096
            ),
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return model, tokenizer


def write_world(doc: str, make_rows: Callable[[int], dict[str, list[dict]]], train_base: Callable) -> None:
    """The command line of a world: write each file of make_rows(seed), then train and save the base model."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder to write, e.g. data/tiny")
    parser.add_argument("--seed", type=int, default=0, help="draws the rows and the base model's examples (default: 0)")
    parser.add_argument("--init_seed", type=int, default=0, help="draws the base model's first weights (default: 0)")
    parser.add_argument("--steps", type=int, default=2000, help="of the base model; 0 writes the rows only (default: 2000)")
    parser.add_argument("--batch", type=int, default=64, help="examples in an update (default: 64)")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="of the base model's training (default: 0.002)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in make_rows(args.seed).items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (args.out / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{args.out / name}.jsonl: {len(rows)} rows")
    if args.steps:
        start = time.perf_counter()
        model, tokenizer = train_base(args.seed, args.steps, args.batch, args.learning_rate, args.init_seed)
        save_model(model, tokenizer, args.out / "base")
        print(f"{args.out / 'base'}: trained in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    write_world(__doc__, make_rows, train_base)
