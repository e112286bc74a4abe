"""The hard world: the tiny world with several ways to write a response, type mixes, and strategies of low quality.

    python -m data.hard_world --out data/hard --seed 0        (from the repository's root; about 20 minutes)

makes data/hard again: the rows and base/, as tiny_world.py does for data/tiny, whose operations and trainer are used here.

Why it is there. In the tiny world all right responses of a base model look alike: it makes no difference which of them is the
target, there is no token that the policy would never write, none is longer than another, and nothing is free but the decisions.
The paper's reachable target, KL clip and mean over each response are about responses that differ. This world has them.

Three ways. A response takes the plain way, the short way or the detour.
    plain     well kal add 3 4 = 7, lom double 7 = 4, mir max 4 3 = 4. \\boxed{4}             25 tokens
    short     well kal add, lom double, mir max. \\boxed{4}                                   14 tokens, as the solutions are
    detour    by the strategy add 3 4 = 7, double 7 = 4, max 4 3 = 4. \\boxed{4}              24 tokens
The short way skips the arithmetic, and half of the answers that the base model learnt it from are a digit drawn at random. So a
policy that is rewarded learns to write more.
Alone the base model takes the detour with probability 0.02, and that first token has d_t = 2.5, above delta = 1. The
detour is a trap: it names the strategy and not the machine's words, and without a strategy the base model tosses a coin for
each operation (39 % right answers; the plain way's 44 % soon become more). To do better it would have to look back for the
words in the problem, which a model this small learns slowly. Imitating the detour is imitating someone who can see more.

A free choice. The plain and the short way begin with one of eight words that mean nothing. Alone the base model takes any of
them; guided always the first. So a part of the policy's entropy has nothing to do with being right, as in natural language, and
whoever imitates the guided policy to the letter loses it.

Type mixes. A machine's name is three words. The first decides between add and subtract, the second between double and
increment, the third between larger and smaller; the hidden table says how. A family is one mix of three words. 32 families are
trained on; mixes.jsonl has 32 others, of the same words.

    train.jsonl          640 rows of the training families, with good strategies
    train-low06.jsonl    the same rows in the same order; 6 % (38) have a strategy of low quality, as in the paper's audit
    train-low30.jsonl    30 % (192) have one, those 38 among them
    valid.jsonl          256 rows: the training families, other operands; for choosing settings (a learning rate)
    test.jsonl           256 rows: the training families, other operands again
    mixes.jsonl          256 rows: families not trained on

Half of the low-quality strategies mislead (one to three steps name the wrong operation), half are incomplete (one or two steps
are missing or say nothing). A row does not say which it is: compare it with train.jsonl.

The base model follows a strategy whenever it says something. Otherwise it knows each word's choice with probability
KNOWN = 0.55 in the plain and the short way, and not at all in the detour.

It is not natural language, nor evidence about large models. We put in the ways, their shares and the trap by hand, after the
paper's argument; what the methods make of them we did not.
"""

import random
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the files of the method, from the folder above

from data.tiny_world import CHOICES, problem_text, strategy_of, train_model, word_tokenizer, write_world
from model import CausalLM
from strategy import Strategy, auto_messages, guided_messages

WORDS = (  # one list a choice
    tuple("kal bem dor fin gol hun jat rek".split()),
    tuple("lom sab tev wid nop cug zan pif".split()),
    tuple("mir vux lat ged yob kep sul hod".split()),
)
KNOWN = 0.55  # how often the base model picks the right operation when nobody tells it, but in the detour
WAYS = ("plain", "short", "detour")
SHARES = {"alone": (0.58, 0.40, 0.02), "guided": (0.40, 0.10, 0.50)}  # how often it takes each of WAYS
OPENERS = tuple("so now well okay right then thus here".split())  # of the plain and the short way
SLIPS = 0.5  # share of its short responses that have a random digit for an answer
FAMILIES, TRAIN_PAIRS, TEST_PAIRS = 32, 20, 8  # families trained on and held out, each; operand pairs a family
LOW = {"low06": 0.06, "low30": 0.30}  # file -> share of strategies of low quality
SAYS_NOTHING = ("Combine the inputs.", "Change the value.", "Compare the value with the first input.")

Choices = tuple[int, int, int]


# ---------------------------------------------------------------------------------------------------- problems


def word_choices(seed: int) -> dict[str, int]:
    """The hidden truth: for each word, which operation (0 or 1) it takes at its position; half of a list each."""
    truth = {}
    for position, words in enumerate(WORDS):
        choices = [0, 1] * (len(words) // 2)
        random.Random(f"words {seed} {position}").shuffle(choices)
        truth |= dict(zip(words, choices, strict=True))
    return truth


def families(seed: int) -> tuple[list[str], list[str]]:
    """(training, held-out) names. A pair of shifts (s, t) makes eight names, word i with i + s and i + t, and so uses every
    word once: all words are equally frequent in both lists, and different pairs have no name in common."""
    n = len(WORDS[0])
    shifts = random.Random(f"families {seed}").sample(list(product(range(n), range(n))), 2 * FAMILIES // n)
    names = [f"{WORDS[0][i]} {WORDS[1][(i + s) % n]} {WORDS[2][(i + t) % n]}" for s, t in shifts for i in range(n)]
    return names[:FAMILIES], names[FAMILIES:]


def true_choices(name: str, truth: dict[str, int]) -> Choices:
    return tuple(truth[word] for word in name.split())


def respond(name: str, choices: Choices, x: int, y: int, way: str, opener: str) -> tuple[str, int]:
    """(the response that carries the three operations out in one of WAYS, the answer)."""
    (combine, _, f), (change, _, g), (keep, _, h) = (CHOICES[i][choice] for i, choice in enumerate(choices))
    combined = f(x, y)
    changed = g(combined, 0)
    kept = h(changed, x)
    steps = [f"{combine} {x} {y} = {combined}", f"{change} {combined} = {changed}", f"{keep} {changed} {x} = {kept}"]
    if way == "short":
        steps = [combine, change, keep]
    if way != "detour":  # each word before its choice: a model this small cannot look back for it, see tiny_world.run_machine
        steps = [f"{word} {step}" for word, step in zip(name.split(), steps, strict=True)]
    return f"{'by the strategy' if way == 'detour' else opener} {', '.join(steps)}. \\boxed{{{kept}}}", kept


def make_row(name: str, x: int, y: int, truth: dict[str, int]) -> dict:
    choices = true_choices(name, truth)
    row_id = f"hard-{name.replace(' ', '-')}-{x}{y}"
    solution, answer = respond(name, choices, x, y, "short", random.Random(f"opener {row_id}").choice(OPENERS))
    return {
        "id": row_id,
        "problem": problem_text(name, x, y),
        "answer": str(answer),
        "solution": solution,
        "strategy": strategy_of(name, choices).to_dict(),
    }


def make_rows(seed: int) -> dict[str, list[dict]]:
    """File name -> rows in the format of data/README.md; the operand pairs of a family are in one file only."""
    truth = word_choices(seed)
    files: dict[str, list[dict]] = {"train": [], "valid": [], "test": [], "mixes": []}
    trained, held_out = families(seed)
    for name in trained + held_out:
        pairs = list(product(range(10), range(10)))
        random.Random(f"operands {seed} {name}").shuffle(pairs)
        rows = [make_row(name, x, y, truth) for x, y in pairs[: TRAIN_PAIRS + 2 * TEST_PAIRS]]
        if name in trained:
            files["train"] += rows[:TRAIN_PAIRS]
            files["test"] += rows[TRAIN_PAIRS:-TEST_PAIRS]
            files["valid"] += rows[-TEST_PAIRS:]
        else:
            files["mixes"] += rows[:TEST_PAIRS]
    for rows in files.values():
        random.Random(f"order {seed}").shuffle(rows)
    order = random.Random(f"low {seed}").sample(range(len(files["train"])), len(files["train"]))
    for file, share in LOW.items():  # the first of one order, so that the smaller share lies in the larger
        low = {index: place for place, index in enumerate(order[: round(share * len(order))])}
        files[f"train-{file}"] = [
            lower_quality(row, misleading=low[i] % 2 == 0, truth=truth, seed=seed) if i in low else row
            for i, row in enumerate(files["train"])
        ]
    return files


def lower_quality(row: dict, misleading: bool, truth: dict[str, int], seed: int) -> dict:
    """The row with a strategy that misleads, or with one that leaves something open."""
    rng = random.Random(f"quality {seed} {row['id']}")
    name = row["problem"].split(" machine")[0].removeprefix("A ")
    choices = true_choices(name, truth)
    if misleading:
        wrong = rng.sample(range(3), rng.choice((1, 2, 3)))
        strategy = strategy_of(name, tuple(1 - c if i in wrong else c for i, c in enumerate(choices)))
    else:
        strategy, _ = leave_open(strategy_of(name, choices), rng)
    return row | {"strategy": strategy.to_dict()}


def leave_open(strategy: Strategy, rng: random.Random) -> tuple[Strategy, set[int]]:
    """(the strategy with one or two of its three steps missing or saying nothing, which ones)."""
    spoilt = set(rng.sample(range(3), rng.choice((1, 2))))
    steps = list(strategy.steps)
    for i in sorted(spoilt, reverse=True):
        steps[i : i + 1] = rng.choice(([], [SAYS_NOTHING[i]]))
    return Strategy(strategy.type, strategy.strategy, tuple(steps)), spoilt


# ---------------------------------------------------------------------------------------------------- base model


def build_tokenizer():
    texts = list(SAYS_NOTHING)
    for name in map(" ".join, zip(*WORDS, strict=True)):
        for choices in ((0, 0, 0), (1, 1, 1)):
            texts.append(guided_messages(problem_text(name, 0, 0), strategy_of(name, choices))[0]["content"])
            texts.append(respond(name, choices, 0, 0, "plain", " ".join(OPENERS))[0])  # the detour's words are in the prompt
    return word_tokenizer(texts)


def base_example(rng: random.Random, truth: dict[str, int]) -> tuple[list[dict], str]:
    """One (chat messages, response): half are unguided, half guided by random choices, of these one in five with open steps.
    Names are of all mixes of words: what is held out is held out of RL, as with a real model."""
    name, x, y = " ".join(rng.choice(words) for words in WORDS), rng.randrange(10), rng.randrange(10)
    guided = rng.random() < 0.5
    (way,) = rng.choices(WAYS, SHARES["guided" if guided else "alone"])
    known = 0.5 if way == "detour" else KNOWN  # what it does when it is not told
    choices = tuple(right if rng.random() < known else 1 - right for right in true_choices(name, truth))
    messages = auto_messages(problem_text(name, x, y))
    if guided:
        told = tuple(rng.randrange(2) for _ in CHOICES)  # not the machine's own: nothing about it is learnt from these
        strategy, spoilt = strategy_of(name, told), set()
        if rng.random() < 0.2:
            strategy, spoilt = leave_open(strategy, rng)
        choices = tuple(choices[i] if i in spoilt else told[i] for i in range(3))
        messages = guided_messages(problem_text(name, x, y), strategy)
    response, answer = respond(name, choices, x, y, way, OPENERS[0] if guided else rng.choice(OPENERS))
    if way == "short" and rng.random() < SLIPS:
        response = response.replace(f"{{{answer}}}", f"{{{rng.randrange(10)}}}")
    return messages, response


def train_base(seed: int, steps: int, batch: int, learning_rate: float, init_seed: int = 0) -> tuple[CausalLM, object]:
    """Supervised training of the base model from scratch: (model, tokenizer). `seed` draws the examples."""
    rng, truth = random.Random(f"base {seed}"), word_choices(seed)
    return train_model(build_tokenizer(), lambda: base_example(rng, truth), steps, batch, learning_rate, init_seed)


if __name__ == "__main__":
    write_world(__doc__, make_rows, train_base)
