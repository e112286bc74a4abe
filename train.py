"""Train with SGPO (Strategy-Guided Policy Optimization, arXiv 2606.24064) or a baseline: GRPO, hinted GRPO, LUFFY, HPT, SFT.

    python train.py                                                     the tiny world, 2 CPU cores, no network
    python train.py --model DIR --data problems.jsonl --out runs/x      a Hugging Face checkpoint on your problems
    python train.py --model Qwen2.5-7B-Instruct --plan --gpus 8         what that would need (tools/plan.py)
    torchrun --nproc_per_node=2 train.py ...                            the same, the problems shared out over the ranks

This file is the run around the method: settings, stages (warm-up, RL, evaluation), logging. The step itself is sgpo.py.

One process per device; weights, gradients and optimizer states are sharded over the ranks (parallel.py). The result does not
depend on the number of ranks: a problem's random numbers come from (seed, step, problem), and every loss is divided by a count
over the whole optimizer step. For the same reason a run that was cut off and goes on (--resume, checkpoint.py) ends where an
uninterrupted one does.
"""

import argparse
import dataclasses
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from checkpoint import CheckpointError, NotFinite, Progress, RunFolder, differences, origin_of, remove_best, stored_config
from data.problems import Problem, load_problems
from eval import accuracy_table, evaluate, expected_length, plus_minus, show_responses
from grader import MathWorker, is_correct
from kv_cache import smallest_cache
from loss import chunked_head, sft_terms
from methods import METHODS, Method, choices_of, knob, without_effect
from model import CausalLM, blank_model, encode_chat, resolve_model, save_model
from parallel import (
    Control,
    Interrupted,
    RankLost,
    all_reduce,
    apply_gradients,
    attention_ways,
    compute_dtype,
    device_name,
    is_contact_lost,
    leave,
    load_sharded,
    may_step,
    model_on_host,
    my_share,
    pad_micro_batches,
    ranks_of,
    shard,
    whole_model,
    world,
)
from rollout import micro_batches, pack, stream_seed
from sgpo import Example, responses_of, sgpo_step, step_line
from strategy import auto_messages, guided_messages, shuffled_strategies

HERE = Path(__file__).resolve().parent


# ---------------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class Config(Method):
    """Every setting of a run: Method has those of a step. TINY replaces some of the defaults when no --model is given."""

    model: str = knob("", "model folder, org/name, or a known family's bare name; empty: the tiny world's base model")
    data: str = knob("", "training problems (jsonl, see data/README.md); empty: the tiny world or the starter set")
    eval_data: str = knob("", "held-out problems; empty: the default data's own test split, else no evaluation")
    out: str = knob("", "folder to write; empty: runs/<method>-<time>")
    seed: int = knob(0, "seeds evaluation, and data order and sampling if --data_seed and --sampling_seed do not")
    data_seed: int = knob(-1, "seeds the split and the order of the problems; -1: as --seed")
    shuffle_strategies: bool = knob(False, "a control: each problem gets the strategy of one of another type [ours]")
    # schedule
    epochs: float = knob(10.0, "passes over the RL problems [app E]; --steps overrides")
    steps: int = knob(0, "number of steps; 0: from --epochs")
    learning_rate: float = knob(1e-6, "peak learning rate of RL [app E]")
    lr_warmup_steps: int = knob(0, "steps of linear warm-up [ours]")
    lr_decay: str = knob("constant", "after the warm-up [ours]", ("constant", "linear"))
    weight_decay: float = knob(0.01, "AdamW's decoupled weight decay [ours]")
    # supervised stage
    sft_fraction: float = knob(1 / 3, "share of the problems for the SFT warm-up instead of RL [§4.1]; 0: none")
    sft_epochs: float = knob(10.0, "passes over them [app E]; with --method sft over all problems")
    sft_batch: int = knob(64, "solutions in one SFT update [app E]")
    sft_learning_rate: float = knob(1e-5, "peak learning rate of SFT [app E], decayed linearly [ours]")
    sft_warmup_ratio: float = knob(0.1, "share of the SFT updates in which its rate rises linearly to the peak [app E]")
    sft_validation: float = knob(0.1, "share of its rows held out: the weights of lowest loss there count [app E]; 0: the last")
    sft_max_tokens: int = knob(16384, "SFT goes without rows longer than this, prompt and solution together [app E]")
    sft_guided: float = knob(0.0, "share of the SFT examples whose prompt holds the strategy [ours]")
    # evaluation
    eval_every: int = knob(20, "steps between evaluations; 0: only before and after")
    eval_n: int = knob(4, "responses a problem")
    eval_limit: int = knob(0, "evaluate on the first problems only, this many; 0: all")
    eval_max_new_tokens: int = knob(2048, "longest response, in tokens; cut to the context [ours]")
    eval_guided: bool = knob(False, "before and after, evaluate with the strategy in the prompt too")
    eval_temperature: float = knob(0.6, "sampling temperature of an evaluation [§4.2]")
    eval_top_p: float = knob(0.95, "nucleus that it samples from [§4.2]")
    # machine
    recompute: bool = knob(True, "recompute each block in the backward pass: far less memory, a third more work")
    dtype: str = knob("auto", "of activations; weights and optimizer are fp32", ("auto", "float32", "bfloat16"))
    device: str = knob("auto", "cpu, cuda, or auto: cuda if there is one", ("auto", "cpu", "cuda"))
    shard_ranks: int = knob(0, "ranks that share one copy of the weights, others hold replicas (HSDP); 0: all ranks")
    offload: bool = knob(False, "keep fp32 weights, gradients and optimizer states in host memory")
    timeout_minutes: float = knob(60.0, "a rank that waits longer than this for the others ends the run")
    # what a crash costs
    resume: bool = knob(False, "go on from the newest whole checkpoint in --out; its settings need not be given again")
    checkpoint_minutes: float = knob(10.0, "a checkpoint after the first step that ends this long after the last; inf: none")
    keep_checkpoints: int = knob(2, "checkpoints that stay on the disk; the second is for when the first is damaged")
    max_skipped: int = knob(10, "updates left out for a loss or gradient that is not finite, before the run ends")


# settings that change what a run costs or keeps, not what it computes: they may be others after --resume
MAY_CHANGE = (
    "out max_rows cache_tokens micro_tokens chunk_tokens recompute device shard_ranks offload timeout_minutes "
    "resume checkpoint_minutes keep_checkpoints max_skipped"
).split()
TINY = dict(
    model=str(HERE / "data/tiny/base"), data=str(HERE / "data/tiny/train.jsonl"), eval_data=str(HERE / "data/tiny/test.jsonl"),
    problems_per_step=16, steps=60, max_new_tokens=32, max_rows=1024, learning_rate=2e-4, lr_warmup_steps=5, lr_decay="linear",
    weight_decay=0.0, sft_fraction=0.0, sft_learning_rate=3e-4, eval_guided=True, recompute=False, eval_max_new_tokens=32,
)  # fmt: skip
STARTER = dict(data=str(HERE / "data/starter/train.jsonl"), eval_data=str(HERE / "data/starter/test.jsonl"))
FIRST_RUN = dict(sft_epochs=1.0, max_new_tokens=1024, problems_per_step=16, eval_limit=64, eval_max_new_tokens=1024)


def parse_config(argv: Sequence[str] | None) -> Config:
    """Flags -> Config. A flag beats a preset, a preset beats the default; an unknown flag is an error."""
    also = "--plan [--gpus 8] [--gpu_memory 80]: say what the run would need (memory, time), and do nothing else"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=also, allow_abbrev=False)
    for spec in dataclasses.fields(Config):
        text = f"{spec.metadata['help']} (default: {spec.default!r})".replace("%", "%%")
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        if spec.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": spec.type, "choices": choices_of(spec)}
        parser.add_argument(f"--{spec.name}", **options)
    parser.add_argument("--preset", choices=["first_run"], help=f"{FIRST_RUN}; flags beat it")
    given = vars(parser.parse_args(argv))
    named = FIRST_RUN if given.pop("preset") else {}
    preset = TINY if not given.get("model") else STARTER if not given.get("data") else {}
    if given.get("data"):
        preset = {name: value for name, value in preset.items() if name not in ("data", "eval_data")}
    preset = preset | named
    stored = stored_config(Path(given["out"])) if given.get("resume") and given.get("out") else None
    if given.get("resume") and given.get("out") and not (stored or named) and given.keys() <= set(MAY_CHANGE):
        parser.error(f"--resume: {given['out']} holds no run to go on with, and no settings are given for a new one")
    if stored:
        preset, asked = stored, named | given
        changed = [f"  --{line.strip()}" for line in differences({k: stored.get(k) for k in asked}, asked, MAY_CHANGE)]
        unknown = sorted(set(stored) ^ set(Config.__dataclass_fields__))
        if changed or unknown:
            changed += [f"  {name}: not a setting of both versions of this code" for name in unknown]
            parser.error(f"--resume: {given['out']} holds a run with other settings\n" + "\n".join(changed))
    cfg = Config(**{**preset, **given})
    derived: dict[str, Any] = {name: cfg.seed for name in ("data_seed", "sampling_seed") if getattr(cfg, name) == -1}
    problem = _first_bad(cfg)
    if METHODS[cfg.method].token_mean:
        derived["aggregate"] = "token"
        problem = problem or "aggregate" in given and f"--aggregate {cfg.aggregate}: it does nothing to {cfg.method}"
    cfg = dataclasses.replace(cfg, **derived)
    if problem:
        parser.error(problem)
    return cfg if cfg.out else dataclasses.replace(cfg, out=f"runs/{cfg.method}-{datetime.now():%Y%m%d-%H%M%S}")


RANGES = (  # settings, what they must be, and whether a value is so
    ("group_guided max_new_tokens max_rows problems_per_step minibatches sft_batch sft_max_tokens eval_n eval_max_new_tokens "
     "micro_tokens chunk_tokens", "must be at least 1", lambda x: x >= 1),
    ("temperature learning_rate sft_learning_rate max_grad_norm gamma epochs luffy_shaping hpt_max_norm",
     "must be positive and finite", lambda x: 0 < x < math.inf),
    ("alpha_0 alpha_max clip_high luffy_entropy hpt_sft_weight weight_decay eval_temperature",
     "must be finite and not negative", lambda x: 0 <= x < math.inf),
    ("sft_fraction sft_guided sft_warmup_ratio clip_low", "must be within 0 and 1", lambda x: 0 <= x <= 1),
    ("top_p eval_top_p", "must be above 0 and at most 1", lambda x: 0 < x <= 1),
    ("checkpoint_minutes max_skipped shard_ranks cache_tokens steps lr_warmup_steps eval_every eval_limit",
     "must not be negative", lambda x: x >= 0),
    ("group_auto", "a group's advantage needs at least 2 trajectories", lambda x: x >= 2),
    ("delta", "must be positive; inf drops nothing", lambda x: x > 0),
    ("keep_checkpoints", "must be at least 2, for when the newest is damaged", lambda x: x >= 2),
    ("sft_validation", "must be within 0 and 0.5", lambda x: 0 <= x <= 0.5),
)  # fmt: skip


def _first_bad(cfg: Config) -> str | None:
    """What is wrong with the first setting that no run could use; None if all can be used."""
    for names, must, good in RANGES:
        for name in names.split():
            if not good(getattr(cfg, name)):
                return f"--{name} {getattr(cfg, name)}: {must}"
    idle = without_effect(cfg) + ["shuffle_strategies"] * (cfg.shuffle_strategies and not METHODS[cfg.method].guided)
    if idle:
        return f"--{idle[0]} {getattr(cfg, idle[0])}: it does nothing to {cfg.method} with --weight {cfg.weight}"
    if cfg.method == "hinted" and cfg.group_guided < 2:
        return f"--group_guided {cfg.group_guided}: a group's advantage needs at least 2 trajectories"
    if not 0 <= cfg.hpt_gate <= cfg.group_auto:
        return f"--hpt_gate {cfg.hpt_gate}: must be within 0 and the {cfg.group_auto} rollouts of a group"
    if (cfg.method == "sft" or cfg.sft_fraction > 0) and not 0 < cfg.sft_epochs < math.inf:
        return f"--sft_epochs {cfg.sft_epochs}: must be positive and finite; --sft_fraction 0 leaves the warm-up out"
    if cfg.resume and not cfg.out:
        return "--resume: say with --out which run to go on with"
    if cfg.problems_per_step < cfg.minibatches:
        return f"--minibatches {cfg.minibatches}: more than the {cfg.problems_per_step} problems of a step"
    return None


# ---------------------------------------------------------------------------------------------------- the run


@dataclass
class Run:
    """What the stages share. They change the tensors of the model and the optimizer, the progress, and files in `folder`."""

    cfg: Config
    model: CausalLM
    tokenizer: Any
    optimizer: torch.optim.Optimizer
    worker: MathWorker
    folder: RunFolder
    control: Control
    progress: Progress = field(default_factory=Progress)

    def reward(self, response: str, problem: Problem) -> float:
        """1 if the response's final answer is the problem's, else 0."""
        return float(is_correct(response, problem.answer, self.worker))


def encode_examples(problems: Sequence[Problem], tokenizer: Any, cfg: Config, context: int) -> list[Example]:
    """Encode every prompt before any work is done; ValueError for rows the method cannot use or the context cannot hold."""
    needs = set(METHODS[cfg.method].needs)
    if cfg.sft_fraction > 0:
        needs.add("solution")
    if cfg.sft_guided > 0 and "solution" in needs:
        needs.add("strategy")
    for name in sorted(needs):
        without = [problem.id for problem in problems if getattr(problem, name) is None]
        if without:
            hint = "; --sft_fraction 0 goes without the warm-up" if name == "solution" and cfg.method != "sft" else ""
            raise ValueError(f"{cfg.data}: {len(without)} rows have no {name}, the first is {without[0]!r}{hint}")
    if cfg.shuffle_strategies:
        others = shuffled_strategies([problem.strategy for problem in problems], seed=0)
        problems = [dataclasses.replace(problem, strategy=s) for problem, s in zip(problems, others, strict=True)]
    examples = []
    for problem in problems:
        auto_ids = encode_chat(tokenizer, auto_messages(problem.problem))
        guided_ids = solution_ids = None
        if "strategy" in needs:
            guided_ids = encode_chat(tokenizer, guided_messages(problem.problem, problem.strategy))
        if "solution" in needs:
            # the end is a target too, or the model never learns to stop
            solution_ids = tokenizer.encode(problem.solution, add_special_tokens=False) + [tokenizer.eos_token_id]
        examples.append(Example(problem, auto_ids, guided_ids, solution_ids))
        if cfg.method == "sft":
            continue  # a row that is too long for the SFT is left out, see split_examples
        prompt = max(len(auto_ids), len(guided_ids or []))
        longest = prompt + (len(solution_ids) if "solution" in METHODS[cfg.method].needs else 1)
        check_room(f"{cfg.data}: {problem.id!r}", prompt, longest, cfg.max_new_tokens, cfg, context)
    return examples


def check_room(where: str, prompt: int, longest: int, response: int, cfg: Config, context: int) -> None:
    """ValueError for a sequence of `longest` tokens, or a prompt with its sampled response, that there is no room for."""
    if longest > context:
        raise ValueError(f"{where} needs {longest} tokens (prompt, and solution if it is used), the context holds {context}")
    cache = smallest_cache(prompt, min(response, context - prompt))
    if 0 < cfg.cache_tokens < cache:
        text = f"has a prompt of {prompt} tokens, which with a response of {response} needs --cache_tokens {cache}"
        raise ValueError(f"{where} {text}, not {cfg.cache_tokens}")


def shuffled(examples: Sequence[Example], seed: int) -> list[Example]:
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    return [examples[i] for i in order.tolist()]


def data_order(examples: Sequence[Example], step: int, batch: int, seed: int, stage: str) -> list[tuple[int, Example]]:
    """The batch of a step as (place in the batch, example): an endless stream of shuffled epochs, cut. No state to lose."""
    chosen, order, epoch = [], [], -1
    for place in range(step * batch, (step + 1) * batch):
        if place // len(examples) != epoch:
            epoch = place // len(examples)
            order = shuffled(examples, stream_seed(seed, "order", stage, epoch))
        chosen.append((place - step * batch, order[place % len(examples)]))
    return chosen


# ---------------------------------------------------------------------------------------------------- supervised stage


def sft_stage(run: Run, examples: Sequence[Example], validation: Sequence[Example]) -> None:
    """Token-mean cross-entropy on the strong model's solutions; the SFT warm-up, and the whole of --method sft. It ends with
    the weights of lowest loss on the validation examples, measured after each epoch; without any, with the last."""
    cfg, progress, rank = run.cfg, run.progress, world()[0]
    steps = math.ceil(cfg.sft_epochs * len(examples) / cfg.sft_batch)
    for step in tqdm(range(progress.sft_steps, steps), "sft", steps, initial=progress.sft_steps, disable=rank > 0):
        batch = data_order(examples, step, cfg.sft_batch, cfg.data_seed, "sft")
        batch = my_share(batch, [len(example.solution_ids) for _, example in batch])
        learning_rate = learning_rate_at(cfg.sft_learning_rate, step, steps, round(cfg.sft_warmup_ratio * steps), "linear")
        loss = sft_loss(run, [sft_pair(example, step, place, cfg) for place, example in batch])
        norm = apply_gradients(run.model, run.optimizer, loss, learning_rate, cfg.max_grad_norm)
        progress.count_skipped(not may_step(loss, norm), cfg.max_skipped, f"now {loss} and {norm}")
        run.folder.log({"stage": "sft", "step": step + 1, "loss": loss, "grad_norm": norm, "learning_rate": learning_rate})
        if rank == 0:
            tqdm.write(f"sft {step + 1:>4}/{steps}  loss {loss:.4f}  grad norm {norm:.2f}")
        progress.sft_steps = step + 1
        last, epoch = step + 1 == steps, (step + 1) * cfg.sft_batch // len(examples)
        if validation and (last or epoch > step * cfg.sft_batch // len(examples)):
            validate_sft(run, validation, cfg.sft_epochs if last else float(epoch))
        if last and 0 < progress.best_step < steps:
            run.folder.load_best(run.model, progress.best_step)
        after_step(run, always=last or progress.best_step == step + 1)


def validate_sft(run: Run, examples: Sequence[Example], epoch: float) -> None:
    """The loss on the examples, over all ranks, logged; if it is the lowest so far, the weights are kept on the disk."""
    progress = run.progress
    mine = my_share(list(enumerate(examples)), [len(example.solution_ids) for example in examples])
    with torch.no_grad():  # step -1: with --sft_guided an example has the same context every time
        loss = sft_loss(run, [sft_pair(example, -1, place, run.cfg) for place, example in mine])
    run.folder.log({"stage": "sft_validation", "epoch": epoch, "step": progress.sft_steps, "loss": loss})
    lowest = loss < progress.best_loss
    if world()[0] == 0:
        tqdm.write(f"sft validation after epoch {epoch:g}: loss {loss:.4f}{', the lowest so far' if lowest else ''}")
    if lowest:
        progress.best_loss, progress.best_step = loss, progress.sft_steps
        run.folder.save_best(run.model, progress.best_step)


def sft_pair(example: Example, step: int, place: int, cfg: Config) -> tuple[list[int], list[int]]:
    """(context, response) of one SFT example; a share sft_guided of them, drawn anew each time, has the strategy in view."""
    draw = stream_seed(cfg.data_seed, "sft guided", step, place) / 2**63
    return (example.guided_ids if draw < cfg.sft_guided else example.auto_ids), example.solution_ids


def sft_loss(run: Run, pairs: Sequence[tuple[list[int], list[int]]]) -> float:
    """Cross-entropy in nats a response token, over all ranks' pairs; where gradients are on, its gradient is accumulated."""
    cfg, device, total = run.cfg, run.model.device, 0.0
    tokens = all_reduce({"tokens": sum(len(response) for _, response in pairs)}, device)["tokens"]  # of all ranks
    costs = [len(context) + len(response) for context, response in pairs]
    for indices in pad_micro_batches(micro_batches(costs, cfg.micro_tokens), device):
        contexts, responses = zip(*([pairs[i] for i in indices] or [([0], [0])]), strict=True)
        packed = pack(contexts, responses, device=device)
        weight = torch.full(packed.targets.shape, 1 / tokens if indices else 0.0, device=device)
        terms = partial(sft_terms, temperature=1.0)  # whatever RL samples at: it learns the text as it is
        head = partial(chunked_head, terms=terms, inputs=(packed.targets, weight), at=packed.predict)
        loss, _ = run.model(**packed.layout, head=partial(head, chunk_tokens=cfg.chunk_tokens))
        if torch.is_grad_enabled():
            loss.backward()
        total += loss.item()
    return all_reduce({"loss": total}, device)["loss"]


# ---------------------------------------------------------------------------------------------------- RL stage


def rl_stage(run: Run, examples: Sequence[Example], held_out: Sequence[Problem]) -> None:
    """All steps of a sampling method, with the periodic evaluation."""
    cfg, progress, rank = run.cfg, run.progress, world()[0]
    steps = rl_steps(cfg, len(examples))
    for step in tqdm(range(progress.rl_steps, steps), cfg.method, steps, initial=progress.rl_steps, disable=rank > 0):
        # a run that was stopped after an evaluation and before its step must not log it twice
        if cfg.eval_every and held_out and step > progress.evaluated and step % cfg.eval_every == 0:
            accuracy = measure(run, held_out, guided=False)
            run.folder.log({"stage": "eval", "step": step, **accuracy})
            progress.evaluated = step
            if rank == 0:
                tqdm.write(f"eval after step {step}: accuracy {plus_minus(accuracy)}")
        batch = data_order(examples, step, cfg.problems_per_step, cfg.data_seed, "rl")
        batch = my_share(batch, [expected_length(example.problem) for _, example in batch])
        learning_rate = learning_rate_at(cfg.learning_rate, step, steps, cfg.lr_warmup_steps, cfg.lr_decay)
        metrics = rl_step(run, batch, step + 1, learning_rate)
        run.folder.log({"stage": cfg.method, **metrics})
        if rank == 0:
            tqdm.write(step_line(metrics, steps))
        progress.rl_steps = step + 1
        after_step(run, always=step + 1 == steps)


def rl_step(run: Run, batch: Sequence[tuple[int, Example]], step: int, learning_rate: float) -> dict[str, float]:
    """sgpo_step with what a run adds to it: SIGTERM, all its metrics, and samples.jsonl."""
    start, timeouts = time.perf_counter(), run.worker.timeouts
    sampled = start

    def ragged(work: Callable[[], Any]) -> Any:
        nonlocal sampled
        result = run.control.interruptible(work)
        sampled = time.perf_counter()
        return result

    given = (run.model, run.tokenizer, run.optimizer, run.cfg, batch, run.reward)
    metrics, samples = sgpo_step(*given, step=step, learning_rate=learning_rate, ragged=ragged)
    seconds = {"sampling_s": sampled - start, "step_s": time.perf_counter() - start}
    now = f"now {metrics['loss']} and {metrics['grad_norm']}"
    run.progress.count_skipped(int(metrics.pop("not_finite")), run.cfg.max_skipped, now)
    metrics |= {"step": step, "learning_rate": learning_rate, "skipped": run.progress.skipped}
    metrics |= all_reduce({"grader_timeouts": run.worker.timeouts - timeouts}, run.model.device) | seconds
    for sample in samples[:1]:  # rank 0 has the batch's first problem
        run.folder.log(*responses_of(sample, step, run.tokenizer), name="samples.jsonl")
    return metrics | {"tokens_per_s": metrics["sampled_tokens"] / seconds["step_s"]}


def rl_steps(cfg: Config, examples: int) -> int:
    return cfg.steps or math.ceil(cfg.epochs * examples / cfg.problems_per_step)


def learning_rate_at(peak: float, step: int, steps: int, warmup: int, decay: str) -> float:
    """Linear warm-up to the peak, then constant or linearly down to zero at the last step; steps count from 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak if decay == "constant" else peak * (steps - step) / max(steps - warmup, 1)


def after_step(run: Run, *, always: bool) -> None:
    """After every step: a checkpoint if one is due by rank 0's clock, or always (but with --checkpoint_minutes inf), and the
    end of the run if SIGTERM asked for it."""
    every = 60 * run.cfg.checkpoint_minutes
    due = world()[0] == 0 and (time.monotonic() - run.folder.saved_at >= every or (always and every < math.inf))
    asked = run.control.barrier(2 if run.control.stop_asked else int(due))
    if asked == 2:
        raise Interrupted
    if asked == 1:
        run.folder.save(run.model, run.optimizer, run.progress)


# ---------------------------------------------------------------------------------------------------- evaluation


def measure(run: Run, problems: Sequence[Problem], *, guided: bool) -> dict[str, Any]:
    """Held-out accuracy over all ranks."""
    cfg = run.cfg
    seed = stream_seed(cfg.seed, "eval") % 2**31  # the same draws at every evaluation, on any number of ranks
    with whole_model(run.model) as policy:
        figures = evaluate(
            policy, run.tokenizer, problems, ragged=run.control.interruptible, n=cfg.eval_n, seed=seed,
            max_new_tokens=cfg.eval_max_new_tokens, temperature=cfg.eval_temperature, top_p=cfg.eval_top_p, guided=guided,
            worker=run.worker, max_rows=cfg.max_rows, cache_tokens=cfg.cache_tokens or None, show=world()[0] == 0,
        )  # fmt: skip
    return {"guided": guided} | {name: value for name, value in figures.items() if name != "correct"}  # a number per problem


def show(run: Run, problem: Problem, when: str) -> None:
    """Rank 0 prints one response alone and one guided, at the evaluation's settings."""
    cfg, seed = run.cfg, stream_seed(run.cfg.seed, "show")
    settings = dict(max_new_tokens=cfg.eval_max_new_tokens, temperature=cfg.eval_temperature, top_p=cfg.eval_top_p)
    with whole_model(run.model) as policy:
        if world()[0] == 0:
            show_responses(policy, run.tokenizer, problem, when, worker=run.worker, seed=seed, **settings)


# ---------------------------------------------------------------------------------------------------- the whole run


def prepare(cfg: Config, device: torch.device, worker: MathWorker) -> tuple[Run, list[Example], list[Problem]]:
    """Load and check everything a run needs; ValueError before any training for whatever is wrong with it."""
    problems = load_problems(cfg.data, worker)
    held_out = load_problems(cfg.eval_data, worker) if cfg.eval_data else []
    origin = origin_of({"data": cfg.data, "eval_data": cfg.eval_data})
    if cfg.eval_limit:
        held_out = held_out[: cfg.eval_limit]
    if cfg.eval_guided and any(problem.strategy is None for problem in held_out):
        raise ValueError(f"{cfg.eval_data}: --eval_guided needs a strategy in every row")
    model_folder = resolve_model(cfg.model)
    model, tokenizer = blank_model(model_folder)
    context = model.config.max_position_embeddings
    examples = encode_examples(problems, tokenizer, cfg, context)
    for row in held_out:
        prompts = [auto_messages(row.problem)] + [guided_messages(row.problem, row.strategy)] * cfg.eval_guided
        prompt = max(len(encode_chat(tokenizer, messages)) for messages in prompts)
        check_room(f"{cfg.eval_data}: {row.id!r}", prompt, prompt + 1, cfg.eval_max_new_tokens, cfg, context)
    model.model.recompute = cfg.recompute
    shard(model, device=device, dtype=compute_dtype(cfg.dtype, device), shard_ranks=cfg.shard_ranks, offload=cfg.offload)
    load_sharded(model, model_folder, device=device, offload=cfg.offload)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.learning_rate, weight_decay=cfg.weight_decay, fused=True)
    folder = RunFolder(Path(cfg.out), dataclasses.asdict(cfg), origin, MAY_CHANGE, cfg.keep_checkpoints)
    return Run(cfg, model, tokenizer, optimizer, worker, folder, Control(cfg.timeout_minutes)), examples, held_out


def split_examples(
    examples: list[Example], cfg: Config, context: int
) -> tuple[list[Example], list[Example], list[Example], list[str]]:
    """(for SFT, for its validation, for RL, what to say about it): a seeded split without overlap; --method sft takes all. SFT
    goes without the rows that are too long for it. ValueError if that leaves it none, or if none are left for RL."""
    for_sft, for_rl, lines = examples, [], []
    if cfg.method != "sft":
        order = shuffled(examples, stream_seed(cfg.data_seed, "split"))
        cut = round(cfg.sft_fraction * len(examples))
        if cut == len(examples):
            raise ValueError(f"--sft_fraction {cfg.sft_fraction} leaves none of the {cut} problems for RL")
        for_sft, for_rl = order[:cut], order[cut:]

    def length(example: Example) -> int:
        contexts = [example.auto_ids, example.guided_ids] if cfg.sft_guided > 0 else [example.auto_ids]
        return max(map(len, contexts)) + len(example.solution_ids)

    longest = min(cfg.sft_max_tokens, context)
    too_long = [example.problem.id for example in for_sft if length(example) > longest]
    if too_long:
        limit = f"{'--sft_max_tokens' if longest == cfg.sft_max_tokens else 'the context of'} {longest}"
        text = f"left out of the SFT: {len(too_long):,} of {len(for_sft):,} rows longer than {limit}, the first {too_long[0]!r}"
        if len(too_long) == len(for_sft):
            raise ValueError(f"{cfg.data}: {text}")
        lines.append(text)
        for_sft = [example for example in for_sft if length(example) <= longest]
    count = round(cfg.sft_validation * len(for_sft)) if len(for_sft) >= 10 else 0
    if for_sft and not count:
        why = f"{len(for_sft)} rows of the ten it needs" if len(for_sft) < 10 else f"--sft_validation {cfg.sft_validation:g}"
        lines.append(f"no SFT validation, the last weights count: {why}")
    for_sft = shuffled(for_sft, stream_seed(cfg.data_seed, "sft validation")) if count else for_sft
    return for_sft[count:], for_sft[:count], for_rl, lines


def most_sampled(cfg: Config, context: int, held_out: int) -> str:
    """How many tokens a step and an evaluation can sample at most, for whoever pays for them."""
    variant, longest = METHODS[cfg.method], min(cfg.max_new_tokens, context)
    auto, guided = cfg.group_auto - variant.solution_in_group, cfg.group_guided * variant.guided
    total = cfg.problems_per_step * (auto + guided) * longest
    step = f"{total:,} tokens sampled a step ({cfg.problems_per_step} problems x ({auto} + {guided}) responses x {longest:,})"
    evaluation = f"{held_out * cfg.eval_n * min(cfg.eval_max_new_tokens, context):,}"
    return f"at most {step} and {evaluation} an evaluation" if variant.weigh else f"at most {evaluation} tokens an evaluation"


class Refused(Exception):
    """A run that cannot be what was asked for; the message says why."""


def train(cfg: Config, device: torch.device) -> None:
    """Check everything, then the run; SIGTERM ends it with a checkpoint."""
    say = tqdm.write if world()[0] == 0 else lambda _: None
    if cfg.resume and (Path(cfg.out) / "model").exists():
        remove_best(Path(cfg.out))  # if it was killed just before it had done so itself
        return say(f"--resume: the run in {cfg.out} is finished")
    with MathWorker() as worker:
        try:
            run, examples, held_out = prepare(cfg, device, worker)
            context = run.model.config.max_position_embeddings
            for_sft, validation, for_rl, lines = split_examples(examples, cfg, context)
            run.folder.open(resume=cfg.resume)
            run.progress = run.folder.begin(run.model, run.optimizer, device_name(device), say, resume=cfg.resume)
        except ValueError as error:
            raise Refused(str(error)) from error
        say("\n".join(f"{name:>18}  {value}" for name, value in dataclasses.asdict(cfg).items()))
        if cfg.data in (TINY["data"], STARTER["data"]):
            say(f"data: {'the tiny world' if cfg.data == TINY['data'] else 'the starter set'} (data/README.md says what it is)")
        say(attention_ways(run.model.config, compute_dtype(cfg.dtype, device), device))
        split = f"{len(for_sft)} problems for SFT and {len(validation)} for its validation, {len(for_rl)} for {cfg.method}"
        say("\n".join([*lines, f"{split}, {len(held_out)} held out", most_sampled(cfg, context, len(held_out))]))
        with run.control.catch_sigterm():
            try:
                stages(run, for_sft, validation, for_rl, held_out)
            except Interrupted:
                run.folder.save(run.model, run.optimizer, run.progress)
                where = run.folder.out / "checkpoints"
                say(f"SIGTERM: a checkpoint is in {where}; the same command with --resume goes on from it")
            finally:
                run.folder.close()


def stages(run: Run, for_sft: list[Example], validation: list[Example], for_rl: list[Example], held_out: list[Problem]) -> None:
    """Warm-up, RL, the evaluations between, and the model folder at the end; what the progress says is done is passed over."""
    cfg, progress = run.cfg, run.progress

    def evaluate_as(when: str, step: int) -> None:
        for kind in ["alone", "guided"] if cfg.eval_guided else ["alone"]:
            if held_out and kind not in progress.table.get(when, {}):
                accuracy = measure(run, held_out, guided=kind == "guided")
                progress.table.setdefault(when, {})[kind] = accuracy
                run.folder.log({"stage": "eval", "when": when, "step": step, **accuracy})

    shown = held_out[0] if held_out else (for_rl or for_sft)[0].problem
    if progress == Progress():
        show(run, shown, "before")
    evaluate_as("base", 0)
    if for_sft:
        sft_stage(run, for_sft, validation)
        evaluate_as("after SFT", 0)
    if for_rl:
        if progress.rl_steps == 0:
            run.optimizer.state.clear()  # RL starts with fresh moments: those of SFT are of another loss and scale
        rl_stage(run, for_rl, held_out)
        evaluate_as(f"after {cfg.method}", rl_steps(cfg, len(for_rl)))
    show(run, shown, "after")
    gathered = model_on_host(run.model, compute_dtype(cfg.dtype, run.model.device))  # in the dtype that it sampled in
    if gathered is not None:
        part = run.folder.out / "model.part"
        shutil.rmtree(part, ignore_errors=True)
        save_model(gathered, run.tokenizer, part)
        part.rename(run.folder.out / "model")  # a folder `model` is whole, and its run is finished
        remove_best(run.folder.out)
        tqdm.write(accuracy_table(progress.table) + f"\nmodel saved in {run.folder.out / 'model'}")


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if "--plan" in argv:
        from tools import plan

        return plan.main(argv, parse_config)
    cfg = parse_config(argv)
    with ranks_of(cfg.device, cfg.timeout_minutes) as device:
        try:
            train(cfg, device)
        except (Refused, CheckpointError, NotFinite, RankLost) as error:
            sys.exit(f"error{f' on rank {world()[0]}' if world()[1] > 1 else ''}: {error}")
        except RuntimeError as error:
            if not is_contact_lost(error):
                raise
            lost = f"contact with another rank was lost ({error}). It ended, its own message says why; --resume goes on"
            sys.exit(f"error on rank {world()[0]}: {lost}")


if __name__ == "__main__":
    main()
    leave()
