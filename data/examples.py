"""From problems to what a run trains on: prompts and solutions as token ids, checked, split and in the order of the steps.

`cfg` is train.Config everywhere. Nothing here is drawn from a state: an order follows from its seed and the step alone.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from data.problems import Problem, check_lengths, shuffled_strategies
from kv_cache import PAGE, least_pages
from methods import METHODS
from model import encode_chat, encode_text
from rollout import stream_seed
from sgpo import Example
from strategy import DEFAULT, Template, auto_messages, guided_messages

# ---------------------------------------------------------------------------------------------------- token ids


def encode_examples(
    problems: Sequence[Problem], tokenizer: Any, cfg: Any, end_id: int, template: Template = DEFAULT
) -> list[Example]:
    """Encode every prompt before any work is done. ValueError for a row that the method cannot use."""
    needs = set(METHODS[cfg.method].needs)
    if cfg.sft_fraction > 0:
        needs.add("solution")
    if cfg.sft_guided > 0 and "solution" in needs:
        needs.add("strategy")
    for name in sorted(needs):
        missing = [problem.id for problem in problems if getattr(problem, name) is None]
        if missing:
            hint = f"`python strategy.py --data {cfg.data} --endpoint URL --model NAME --out FILE` asks a strong model for them"
            if name == "solution" and cfg.method != "sft":
                hint = "--sft_fraction 0 leaves out the warm-up; " + hint
            raise ValueError(f"{cfg.data}: {len(missing)} rows have no {name}, the first is {missing[0]!r}; {hint}")
    if cfg.shuffle_strategies:
        others = shuffled_strategies([problem.strategy for problem in problems], seed=0)
        problems = [dataclasses.replace(problem, strategy=s) for problem, s in zip(problems, others, strict=True)]
    examples = encode_rows(problems, tokenizer, guided="strategy" in needs, file=cfg.data, template=template)
    if "solution" not in needs:
        return examples
    texts = [row.solution for row in problems]
    if tokenizer.decode(examples[0].auto_ids).rstrip().endswith("<think>"):  # R1-Distill's prompts open the thoughts themselves
        texts = [text.removeprefix("<think>").lstrip() for text in texts]
    # the end token is a target too, or the model never learns to stop
    solutions = [encode_text(tokenizer, text) + [end_id] for text in texts]
    return [dataclasses.replace(example, solution_ids=ids) for example, ids in zip(examples, solutions, strict=True)]


def encode_prompts(
    tokenizer: object, problems: Sequence[Problem], guided: bool, file: str, template: Template = DEFAULT
) -> list[list[int]]:
    """The token ids of each prompt, with the strategy in it if guided. ValueError if rows of the file have none."""
    missing = [problem.id for problem in problems if guided and problem.strategy is None]
    if missing:
        raise ValueError(f"{file}: {len(missing)} rows have no strategy to be guided by, the first is {missing[0]!r}")
    prompts = []
    for row in problems:
        messages = guided_messages(row.problem, row.strategy, template) if guided else auto_messages(row.problem, template)
        prompts.append(encode_chat(tokenizer, messages))
    return prompts


def encode_rows(
    problems: Sequence[Problem], tokenizer: Any, *, guided: bool, file: str, template: Template = DEFAULT
) -> list[Example]:
    """The problems with their prompts, with the strategy too if guided, and without solutions."""
    alone = encode_prompts(tokenizer, problems, False, file, template)
    helped = encode_prompts(tokenizer, problems, True, file, template) if guided else [None] * len(problems)
    return [Example(*row, solution_ids=None) for row in zip(problems, alone, helped, strict=True)]


def check_rows(examples: Sequence[Example], held_out: Sequence[Example], cfg: Any, context: int) -> None:
    """ValueError that names all rows too long for the context, or the one that needs the largest cache: rollout.generate's own
    checks, before any work is done. SFT leaves out what is too long, see split_examples."""
    rows = [(cfg.eval_data, example, cfg.eval_max_new_tokens) for example in held_out]
    if cfg.method != "sft":
        rows = [(cfg.data, example, cfg.max_new_tokens) for example in examples] + rows
    lengths, caches = [], []
    for file, example, longest in rows:
        name = f"{file}: {example.problem.id!r}"
        prompt = max(len(example.auto_ids), len(example.guided_ids or []))
        learned = example.solution_ids if "solution" in METHODS[cfg.method].needs else None
        lengths.append((name, prompt + len(learned or [0])))
        caches.append((PAGE * least_pages(prompt, min(longest, context - prompt)), name))
    check_lengths(lengths, context)
    tokens, name = max(caches, default=(0, ""))
    if 0 < cfg.cache_tokens < tokens:
        raise ValueError(f"{name}, its prompt with its longest response, needs --cache_tokens {tokens}")


# ---------------------------------------------------------------------------------------------------- split and order


def shuffled(examples: Sequence[Example], seed: int) -> list[Example]:
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    return [examples[i] for i in order.tolist()]


def data_order(examples: Sequence[Example], step: int, batch: int, seed: int, stage: str) -> list[tuple[int, Example]]:
    """The batch of a step as (place in the batch, example): cut from an endless stream of shuffled epochs. No state."""
    chosen, order = [], []
    for place in range(batch):
        epoch, index = divmod(step * batch + place, len(examples))
        if not chosen or index == 0:
            order = shuffled(examples, stream_seed(seed, "order", stage, epoch))
        chosen.append((place, order[index]))
    return chosen


def split_examples(
    examples: list[Example], cfg: Any, context: int
) -> tuple[list[Example], list[Example], list[Example], list[str]]:
    """(for SFT, for its validation, for RL, notes to print): a seeded split without overlap. --method sft takes all for SFT.
    SFT leaves out the rows that are too long for it. ValueError if that leaves it none, or if none are left for RL."""
    for_sft, for_rl, notes = examples, [], []
    if cfg.method != "sft":
        order = shuffled(examples, stream_seed(cfg.data_seed, "split"))
        cut = round(cfg.sft_fraction * len(examples))
        for_sft, for_rl = order[:cut], order[cut:]
        if not for_rl:
            raise ValueError(f"--sft_fraction {cfg.sft_fraction} leaves none of the {cut} problems for RL")
        if len(for_rl) < cfg.problems_per_step:
            notes.append(f"{len(for_rl)} problems for RL, fewer than --problems_per_step: some are in a step more than once")

    def length(example: Example) -> int:
        prompts = [example.auto_ids, example.guided_ids] if cfg.sft_guided > 0 else [example.auto_ids]
        return max(map(len, prompts)) + len(example.solution_ids)

    longest = min(cfg.sft_max_tokens, context)
    too_long = [example.problem.id for example in for_sft if length(example) > longest]
    if too_long:
        rows = f"{len(too_long):,} of {len(for_sft):,} rows longer than {longest:,} tokens, the first {too_long[0]!r}"
        notes.append(f"left out of the SFT (--sft_max_tokens, or the context): {rows}")
        for_sft = [example for example in for_sft if length(example) <= longest]
        if not for_sft:
            raise ValueError(f"{cfg.data}: {notes[-1]}")
    count = round(cfg.sft_validation * len(for_sft)) if len(for_sft) >= 10 else 0
    if count:
        for_sft = shuffled(for_sft, stream_seed(cfg.data_seed, "sft validation"))
    elif for_sft:
        rows = f"--sft_validation {cfg.sft_validation:g} of {len(for_sft)} rows, of which it needs ten"
        notes.append(f"no SFT validation, so its last weights are used: {rows}")
    return for_sft[count:], for_sft[:count], for_rl, notes


def most_sampled(cfg: Any, context: int, held_out: int) -> str:
    """How many tokens a step and an evaluation can sample at most, for whoever pays for them."""
    variant = METHODS[cfg.method]
    responses = cfg.group_auto - variant.solution_in_group + cfg.group_guided * variant.guided if variant.advantages else 0
    step = cfg.problems_per_step * responses * min(cfg.max_new_tokens, context)
    evaluation = held_out * cfg.eval_n * min(cfg.eval_max_new_tokens, context)
    return f"at most {step:,} tokens sampled a step ({responses} responses a problem) and {evaluation:,} an evaluation"
