"""Train a policy with SGPO (Strategy-Guided Policy Optimization, arXiv 2606.24064) or a baseline: GRPO, LUFFY, HPT, SFT.

    python train.py                                                     the tiny world, 2 CPU cores, no network
    python train.py --model DIR --data problems.jsonl --out runs/x      a Hugging Face checkpoint on your problems
    python train.py --model Qwen2.5-7B-Instruct --plan --gpus 8         what that would need (plan.py)
    torchrun --nproc_per_node=2 train.py ...                            the same, problems dealt to ranks

One process per device; weights, gradients and optimizer states are sharded over the ranks (parallel.py). The result does not
depend on the number of ranks: a problem's random numbers come from (seed, step, problem), and every loss is divided by a count
over the whole optimizer step. For the same reason a run that was cut off and goes on (--resume, checkpoint.py) ends where an
uninterrupted one does.

The step, `sgpo_step`, reads like the paper's algorithm: sample, grade, weigh, choose the target, update. What the paper leaves
open is marked "ours" in the README's list of implementation details. A new method gets a line in METHODS and its branch where
the methods part: what is sampled (sample_problems), what is decided (weigh), which loss (policy_terms).

Reads: model.py, rollout.py, loss.py, weighting.py, strategy.py, grader.py, eval.py, parallel.py, checkpoint.py, plan.py.
Axes: P problems, G and J group sizes, M tokens.
"""

import argparse
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from checkpoint import CheckpointError, find_checkpoint, load_checkpoint, save_checkpoint
from eval import Problem, evaluate, load_problems, sample_and_grade
from grader import MathWorker, is_correct
from kv_cache import decode_kernel, smallest_cache
from loss import chunked_head, distillation_terms, grpo_terms, hpt_terms, luffy_terms, sft_terms
from model import CausalLM, blank_model, encode_chat, packed_kernel, resolve_model, save_model
from parallel import (
    RankLost,
    clip_gradients,
    control_group,
    deal,
    end_ranks,
    load_sharded,
    meet,
    model_on_host,
    over_ranks,
    padded,
    same_on_all_ranks,
    shard,
    start_ranks,
    whole_model,
    world,
)
from plan import Hardware, Workload, add_flags, print_plan
from rollout import Packed, Trajectory, micro_batches, pack, shared_tokens
from strategy import auto_messages, guided_messages
from weighting import (
    group_advantage_weight,
    group_advantages,
    hpt_gate,
    instance_weight,
    random_target,
    reachable_target,
)

HERE = Path(__file__).resolve().parent
LOGS = ("metrics.jsonl", "samples.jsonl")
# the fields that every training row must have
METHODS = {"sgpo": ("strategy",), "grpo": (), "luffy": ("solution",), "hpt": ("solution",), "sft": ("solution",)}


# ---------------------------------------------------------------------------------------------------- configuration


def knob(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Config:
    """Every setting of a run. The defaults are the paper's where it names one; TINY replaces some when no --model is given."""

    method: str = knob("sgpo", "what to train with", tuple(METHODS))
    model: str = knob("", "model folder, org/name, or a known family's bare name; empty: the tiny world's base model")
    data: str = knob("", "training problems (jsonl, see data/README.md); empty: the tiny world or the starter set")
    eval_data: str = knob("", "held-out problems; empty: the default data's own test split, else no evaluation")
    out: str = knob("", "folder to write; empty: runs/<method>-<time>")
    seed: int = knob(0, "seeds evaluation, and data order and sampling where the next two do not")
    data_seed: int = knob(-1, "seeds the split and the order of the problems; -1: as --seed")
    sampling_seed: int = knob(-1, "seeds the training responses; -1: as --seed")
    # sampling
    group_auto: int = knob(8, "G1: autonomous trajectories a problem [paper]; with luffy one of them is the solution [code]")
    group_guided: int = knob(4, "G2: guided trajectories a problem [paper]")
    temperature: float = knob(1.0, "sampling temperature in training; the losses use the same [ours]")
    max_new_tokens: int = knob(8192, "longest response in training, in tokens")
    max_rows: int = knob(256, "responses decoded at once")
    cache_tokens: int = knob(0, "size of the KV cache in tokens; 0: what is needed, on CUDA at most 90 % of the free memory")
    # policy loss
    clip_low: float = knob(0.2, "the ratio is clipped below 1 - this [paper]")
    clip_high: float = knob(0.28, "and above 1 + this [paper]")
    mask_truncated: bool = knob(False, "leave truncated responses out of the policy loss (never out of the group's mean)")
    # distillation
    delta: float = knob(1.0, "tokens with d_t above this are dropped, in nats [paper]; inf: no KL clip")
    alpha_0: float = knob(0.5, "scale of the adaptive weight [paper]")
    gamma: float = knob(0.1, "smoothing of the adaptive weight [paper]")
    alpha_max: float = knob(0.8, "largest adaptive weight [paper]")
    reach: str = knob("sum", "log-probability that ranks the targets: summed or mean per token [ours]", ("sum", "mean"))
    # ablations of sgpo, beside --delta inf
    distill: str = knob("kl", "what pulls towards the target; none: nothing", ("kl", "reverse_kl", "sft", "none"))
    target: str = knob("reachable", "which correct guided trajectory", ("reachable", "random"))
    weight: str = knob("adaptive", "alpha(q); fixed: alpha_0 everywhere", ("adaptive", "fixed", "group_advantage"))
    autonomous: bool = knob(True, "train on the autonomous group; without it the distillation term is alone")
    # baselines, as their public code has them
    luffy_shaping: float = knob(0.1, "the x + this in LUFFY's shaping of a solution's probabilities x / (x + this) [code]")
    luffy_entropy: float = knob(0.001, "LUFFY's entropy bonus [code]")
    hpt_gate: int = knob(0, "HPT: at most so many right rollouts, and the solution takes the place of all [code]")
    hpt_sft_weight: float = knob(1.0, "HPT: coefficient of the cross-entropy there; 0.3 for a 1.5B model [code]")
    hpt_max_norm: float = knob(80.0, "HPT: an update with a larger gradient norm is left out [code]")
    # optimisation
    problems_per_step: int = knob(128, "problems sampled for one step, over all ranks")
    minibatches: int = knob(1, "optimizer updates made from one step's samples")
    epochs: float = knob(10.0, "passes over the RL problems [paper]; --steps overrides")
    steps: int = knob(0, "number of steps; 0: from --epochs")
    learning_rate: float = knob(1e-6, "peak learning rate of RL")
    lr_warmup_steps: int = knob(0, "steps of linear warm-up")
    lr_decay: str = knob("constant", "after the warm-up", ("constant", "linear"))
    weight_decay: float = knob(0.01, "AdamW's decoupled weight decay")
    max_grad_norm: float = knob(1.0, "the global gradient norm is clipped to this")
    micro_tokens: int = knob(16384, "tokens in one forward and backward pass; changes memory, never the result")
    chunk_tokens: int = knob(256, "tokens per chunk of the language-model head; changes memory, never the result")
    # supervised stage
    sft_fraction: float = knob(1 / 3, "share of the problems used for the SFT warm-up instead of RL [paper]; 0: none")
    sft_epochs: float = knob(1.0, "passes over them (with --method sft: over all problems)")
    sft_batch: int = knob(64, "solutions in one SFT update")
    sft_learning_rate: float = knob(1e-5, "peak learning rate of SFT, decayed linearly")
    sft_guided: float = knob(0.0, "share of the SFT examples whose prompt holds the strategy [ours]")
    # evaluation
    eval_every: int = knob(20, "steps between evaluations; 0: only before and after")
    eval_n: int = knob(4, "responses a problem")
    eval_limit: int = knob(0, "evaluate on the first so many problems; 0: all")
    eval_guided: bool = knob(False, "before and after, evaluate with the strategy in the prompt too")
    eval_temperature: float = knob(0.6, "[paper]")
    eval_top_p: float = knob(0.95, "[paper]")
    # machine
    recompute: bool = knob(True, "recompute each block in the backward pass: far less memory, a third more work")
    dtype: str = knob("auto", "of activations; weights and optimizer are fp32", ("auto", "float32", "bfloat16"))
    device: str = knob("auto", "cpu, cuda, or auto: cuda where there is one", ("auto", "cpu", "cuda"))
    shard_ranks: int = knob(0, "ranks that share one copy of the weights, others hold replicas (HSDP); 0: all ranks")
    offload: bool = knob(False, "keep fp32 weights, gradients and optimizer states in host memory")
    timeout_minutes: float = knob(60.0, "a rank that waits longer than this for the others ends the run")
    # what a crash costs
    resume: bool = knob(False, "go on from the newest whole checkpoint in --out; its settings need not be given again")
    checkpoint_minutes: float = knob(10.0, "a checkpoint behind the first step that ends so long after the last; inf: none")
    keep_checkpoints: int = knob(2, "checkpoints that stay on the disk; the second is for when the first is damaged")
    max_skipped: int = knob(10, "updates left out for a loss or gradient that is not finite, before the run ends")


# settings that change what a run costs or keeps, not what it computes: they may be others after --resume
MAY_CHANGE = (
    "out max_rows cache_tokens micro_tokens chunk_tokens recompute device shard_ranks offload timeout_minutes "
    "resume checkpoint_minutes keep_checkpoints max_skipped"
).split()
TINY = dict(
    model=str(HERE / "data/tiny/base"),
    data=str(HERE / "data/tiny/train.jsonl"),
    eval_data=str(HERE / "data/tiny/test.jsonl"),
    problems_per_step=16,
    steps=60,
    max_new_tokens=32,
    max_rows=1024,
    learning_rate=1e-4,
    lr_warmup_steps=5,
    lr_decay="linear",
    weight_decay=0.0,
    sft_fraction=0.0,
    sft_learning_rate=3e-4,
    eval_guided=True,
    recompute=False,
)
STARTER = dict(data=str(HERE / "data/starter/train.jsonl"), eval_data=str(HERE / "data/starter/test.jsonl"))


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
            options |= {"type": spec.type, "choices": spec.metadata["choices"]}
        parser.add_argument(f"--{spec.name}", **options)
    given = vars(parser.parse_args(argv))
    preset = TINY if not given.get("model") else STARTER if not given.get("data") else {}
    if given.get("data"):
        preset = {name: value for name, value in preset.items() if name not in ("data", "eval_data")}
    stored = stored_config(Path(given["out"])) if given.get("resume") and given.get("out") else None
    if given.get("resume") and given.get("out") and not stored and given.keys() <= set(MAY_CHANGE):
        parser.error(f"--resume: {given['out']} holds no run to go on with, and no settings are given for a new one")
    if stored:
        preset = stored
        other = {name: (stored.get(name), value) for name, value in given.items() if name not in MAY_CHANGE}
        changed = [f"  --{name}: {old!r} there, {new!r} here" for name, (old, new) in other.items() if old != new]
        unknown = sorted(set(stored) ^ set(Config.__dataclass_fields__))
        if changed or unknown:
            changed += [f"  {name}: not a setting of both versions of this code" for name in unknown]
            parser.error(f"--resume: {given['out']} holds a run with other settings\n" + "\n".join(changed))
    cfg = Config(**{**preset, **given})
    streams = {name: cfg.seed for name in ("data_seed", "sampling_seed") if getattr(cfg, name) == -1}
    cfg = dataclasses.replace(cfg, **streams)
    problem = _first_bad(cfg)
    if problem:
        parser.error(problem)
    return cfg if cfg.out else dataclasses.replace(cfg, out=f"runs/{cfg.method}-{datetime.now():%Y%m%d-%H%M%S}")


def stored_config(out: Path) -> dict[str, Any] | None:
    """The settings of the run in a folder: the first line of its metrics.jsonl; None where there is no such line (yet)."""
    try:
        with (out / "metrics.jsonl").open(encoding="utf-8") as file:
            return json.loads(file.readline())["config"]
    except (FileNotFoundError, json.JSONDecodeError):  # a run that was killed before it had written the whole line
        return None


def _first_bad(cfg: Config) -> str | None:
    """What is wrong with the first setting that no run could use; None where all are usable."""
    counts = "group_guided max_new_tokens max_rows problems_per_step minibatches sft_batch eval_n micro_tokens chunk_tokens"
    for name in counts.split():
        if getattr(cfg, name) < 1:
            return f"--{name} {getattr(cfg, name)}: must be at least 1"
    if cfg.group_auto < 2:
        return f"--group_auto {cfg.group_auto}: a group's advantage needs at least 2 trajectories"
    if not cfg.delta > 0:
        return f"--delta {cfg.delta}: must be positive; inf drops nothing"
    positive = "temperature learning_rate sft_learning_rate max_grad_norm gamma epochs luffy_shaping hpt_max_norm"
    for name in positive.split():
        if not 0 < getattr(cfg, name) < math.inf:
            return f"--{name} {getattr(cfg, name)}: must be positive and finite"
    for name in ("distill", "target", "weight", "autonomous"):
        default = Config.__dataclass_fields__[name].default
        if cfg.method != "sgpo" and getattr(cfg, name) != default:
            return f"--{name} {getattr(cfg, name)}: an ablation of sgpo, it does nothing to {cfg.method}"
    if not 0 <= cfg.hpt_gate <= cfg.group_auto:
        return f"--hpt_gate {cfg.hpt_gate}: must be within 0 and the {cfg.group_auto} rollouts of a group"
    not_negative = "alpha_0 alpha_max clip_high luffy_entropy hpt_sft_weight weight_decay eval_temperature"
    for name in not_negative.split():
        if not 0 <= getattr(cfg, name) < math.inf:
            return f"--{name} {getattr(cfg, name)}: must be finite and not negative"
    for name in "sft_fraction sft_guided clip_low eval_top_p".split():
        if not 0 <= getattr(cfg, name) <= 1:
            return f"--{name} {getattr(cfg, name)}: must be within 0 and 1"
    if (cfg.method == "sft" or cfg.sft_fraction > 0) and not 0 < cfg.sft_epochs < math.inf:
        return f"--sft_epochs {cfg.sft_epochs}: must be positive and finite; --sft_fraction 0 leaves the warm-up out"
    if cfg.resume and not cfg.out:
        return "--resume: say with --out which run to go on with"
    if cfg.keep_checkpoints < 2:
        return f"--keep_checkpoints {cfg.keep_checkpoints}: must be at least 2, for when the newest is damaged"
    from_zero = "checkpoint_minutes max_skipped shard_ranks cache_tokens steps lr_warmup_steps eval_every eval_limit"
    for name in from_zero.split():
        if not getattr(cfg, name) >= 0:
            return f"--{name} {getattr(cfg, name)}: must not be negative"
    if cfg.problems_per_step < cfg.minibatches:
        return f"--minibatches {cfg.minibatches}: more than the {cfg.problems_per_step} problems of a step"
    return None


# ---------------------------------------------------------------------------------------------------- seeds


def stream_seed(*names: Any) -> int:
    """A 63-bit seed for a named stream of random numbers: equal names, equal seed, on every machine and rank."""
    return int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:8], "big") >> 1


# ---------------------------------------------------------------------------------------------------- the run


@dataclass(frozen=True)
class Example:
    """A problem with its prompts, encoded once. guided_ids and solution_ids are None where the run does not use them."""

    problem: Problem
    auto_ids: list[int]
    guided_ids: list[int] | None
    solution_ids: list[int] | None

    def demonstration(self) -> Trajectory:
        """The strong model's solution in the form of a sample; its writer's probability is taken as 1 [code]."""
        return Trajectory(self.auto_ids, self.solution_ids, [0.0] * len(self.solution_ids), finished=True, group=0)


@dataclass
class Progress:
    """What a run has done so far. With the weights and the moments it is all that a run is made of: the order of the data and
    every random number follow from the seeds and these counts."""

    sft_steps: int = 0
    rl_steps: int = 0
    evaluated: int = 0  # the last RL step with a periodic evaluation behind it
    skipped: int = 0  # updates left out because the loss or the gradient was not finite
    table: dict[str, dict[str, dict[str, float]]] = dataclasses.field(default_factory=dict)  # held-out accuracy: when, kind


class Interrupted(Exception):
    """SIGTERM came: what is going on is given up, and the run ends with a checkpoint."""


class Stop:
    """The handler of SIGTERM: asks the run to end, and cuts short what may be cut short."""

    def __init__(self) -> None:
        self.asked = False
        self.at_once = False

    def __call__(self, signum: int, frame: Any) -> None:
        self.asked = True
        if self.at_once:
            self.at_once = False
            raise Interrupted


@dataclass
class Run:
    """What every part of the loop needs. A step changes the tensors of the model and the optimizer, and the progress."""

    cfg: Config
    model: CausalLM
    tokenizer: Any
    optimizer: torch.optim.Optimizer
    worker: MathWorker
    device: torch.device
    out: Path
    control: dist.ProcessGroup
    origin: dict[str, Any]  # what it is made from: "data" (digests of the files), "commit" and "torch"
    progress: Progress = dataclasses.field(default_factory=Progress)
    stop: Stop = dataclasses.field(default_factory=Stop)
    saved_at: float = dataclasses.field(default_factory=time.monotonic)  # when the last checkpoint was written
    lock: Any = None  # rank 0's hold on the folder


def encode_examples(problems: Sequence[Problem], tokenizer: Any, cfg: Config, context: int) -> list[Example]:
    """Encode every prompt before any work is done; ValueError for rows the method cannot use or the context cannot hold."""
    needs = set(METHODS[cfg.method])
    if cfg.sft_fraction > 0:
        needs.add("solution")
    if cfg.sft_guided > 0 and "solution" in needs:
        needs.add("strategy")
    for field in sorted(needs):
        without = [problem.id for problem in problems if getattr(problem, field) is None]
        if without:
            hint = "; --sft_fraction 0 goes without the warm-up" if field == "solution" and cfg.method != "sft" else ""
            raise ValueError(f"{cfg.data}: {len(without)} rows have no {field}, the first is {without[0]!r}{hint}")
    examples = []
    for problem in problems:
        auto_ids = encode_chat(tokenizer, auto_messages(problem.problem))
        guided_ids = solution_ids = None
        if "strategy" in needs:
            guided_ids = encode_chat(tokenizer, guided_messages(problem.problem, problem.strategy))
        if "solution" in needs:
            solution_ids = tokenizer.encode(problem.solution, add_special_tokens=False) + [tokenizer.eos_token_id]
        prompt = max(len(auto_ids), len(guided_ids or []))
        longest = prompt + len(solution_ids or [0])
        if longest > context:
            raise ValueError(
                f"{cfg.data}: {problem.id!r} needs {longest} tokens (prompt, and solution where it is used), "
                f"the context holds {context}"
            )
        cache = smallest_cache(prompt, min(cfg.max_new_tokens, context - prompt))
        if cfg.method != "sft" and 0 < cfg.cache_tokens < cache:
            raise ValueError(
                f"{cfg.data}: {problem.id!r} has a prompt of {prompt} tokens, which with a response of "
                f"{cfg.max_new_tokens} needs --cache_tokens {cache}, not {cfg.cache_tokens}"
            )
        examples.append(Example(problem, auto_ids, guided_ids, solution_ids))
    return examples


def data_order(examples: Sequence[Example], step: int, batch: int, seed: int, stage: str) -> list[tuple[int, Example]]:
    """The batch of a step as (place in the batch, example): an endless stream of shuffled epochs, cut. No state to lose."""
    chosen = []
    order: list[int] = []
    epoch = -1
    for place in range(step * batch, (step + 1) * batch):
        if place // len(examples) != epoch:
            epoch = place // len(examples)
            generator = torch.Generator().manual_seed(stream_seed(seed, "order", stage, epoch))
            order = torch.randperm(len(examples), generator=generator).tolist()
        chosen.append((place - step * batch, examples[order[place % len(examples)]]))
    return chosen


def my_share(batch: Sequence[Any], costs: Sequence[float]) -> list[Any]:
    """This rank's part of a batch."""
    rank, ranks = world()
    return [batch[i] for i in deal(costs, ranks)[rank]]


def expected_length(problem: Problem) -> int:
    """A guess at how long responses will be, in characters: as long as the strong model's, where that is known [ours]."""
    return len(problem.solution or problem.problem)


def interruptible(run: Run, work: Callable[[], Any]) -> Any:
    """The result of work that differs from rank to rank, communicates nothing and changes nothing that is kept; behind it the
    ranks meet. Interrupted on all of them where SIGTERM came to one, which cuts its own work short."""
    result = None
    try:
        try:
            run.stop.at_once = True
            if not run.stop.asked:
                result = work()
        finally:
            run.stop.at_once = False
    except Interrupted:
        pass
    if meet(run.control, int(run.stop.asked), run.cfg.timeout_minutes):
        raise Interrupted
    return result


# ---------------------------------------------------------------------------------------------------- one SGPO step


@dataclass(frozen=True)
class PolicyItem:
    """A trajectory with its advantage, one term of the policy loss; in LUFFY and HPT it may be the strong model's solution."""

    trajectory: Trajectory
    advantage: float
    demonstration: bool = False


@dataclass(frozen=True)
class TargetItem:
    """A problem's reachable target o+ under both contexts, with its weight: one term of the distillation loss."""

    auto_ids: list[int]
    guided_ids: list[int]
    response_ids: list[int]
    alpha: float


# what a rank passes through the model, with weight 0, where other ranks still have work and it has none
NO_TRAJECTORY = PolicyItem(Trajectory([0], [0], [0.0], finished=True, group=0), advantage=0.0)
NO_TARGET = TargetItem([0], [0], [0], alpha=0.0)


@dataclass
class ProblemSamples:
    """What one problem brought in: trajectories, rewards, and the decisions taken from them."""

    place: int  # in the step's batch, over all ranks
    example: Example
    auto: list[Trajectory]
    guided: list[Trajectory]
    auto_rewards: list[float]
    guided_rewards: list[float]
    advantages: list[float] = dataclasses.field(default_factory=list)  # one for each of `auto`
    alpha: float = 0.0
    target: int | None = None  # index into `guided`
    reach: list[float] = dataclasses.field(default_factory=list)  # log pi(o~_j | q) of each of `guided`
    gated: bool = False  # hpt: the rollouts leave the loss
    solution_advantage: float | None = None  # luffy, and hpt where gated: the solution is in the policy loss


def sgpo_step(run: Run, batch: Sequence[tuple[int, Example]], step: int, learning_rate: float) -> dict[str, float]:
    """One step of SGPO [paper], or of a baseline: its metrics, over all ranks. `batch` is this rank's share."""
    start, timeouts = time.perf_counter(), run.worker.timeouts
    with whole_model(run.model) as policy:
        same_on_all_ranks(policy, run.device)
        # G1 alone and G2 guided from the same policy, reward 1 or 0; each rank has its own amount of work
        samples = interruptible(run, lambda: sample_problems(run, policy, batch, step))
        sampled = time.perf_counter()
        weigh(run, policy, samples, step)  # advantages A_i, adaptive weight alpha(q), reachable target o+
    updates = []
    for part in range(run.cfg.minibatches):  # cut by the place in the whole batch: the same problems on any number of ranks
        chosen = [s for s in samples if s.place * run.cfg.minibatches // run.cfg.problems_per_step == part]
        updates.append(update(run, chosen, learning_rate))
    metrics = over_updates(updates)
    # before the policy has moved, what separates the ratio from 1 is numerical noise between the sampler and the trainer
    metrics |= {f"first_{name}": updates[0][name] for name in ("ratio_error", "logprob_error")}
    metrics |= {"step": step, "learning_rate": learning_rate, "skipped": run.progress.skipped}
    seconds = {"sampling_s": sampled - start, "step_s": time.perf_counter() - start}
    return metrics | describe(run, samples, step, run.worker.timeouts - timeouts, seconds)


def sample_problems(
    run: Run, policy: CausalLM, batch: Sequence[tuple[int, Example]], step: int
) -> list[ProblemSamples]:
    """Sample both groups of every problem and grade them. Only sgpo has a guided group."""
    cfg = run.cfg
    places, examples = [place for place, _ in batch], [example for _, example in batch]

    def streams(kind: str) -> list[int]:
        return [stream_seed(cfg.sampling_seed, "sample", kind, step, place) for place in places]

    prompts, seeds = [example.auto_ids for example in examples], streams("auto")
    counts = [cfg.group_auto - (cfg.method == "luffy")] * len(examples)  # LUFFY's group is 7 rollouts and the solution
    if cfg.method == "sgpo":  # both groups in one call: the places that one leaves are taken by the other
        prompts += [example.guided_ids for example in examples]
        seeds += streams("guided")
        counts += [cfg.group_guided] * len(examples)
    answers = [example.problem.answer for example in examples]
    groups, graded = sample_and_grade(
        policy,
        run.tokenizer,
        prompts,
        answers * (len(prompts) // max(len(examples), 1)),
        run.worker,
        n=counts,
        max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature,
        top_p=1.0,  # below 1 the ratio would no longer be that of the policy's own distribution
        seed=seeds,
        max_rows=cfg.max_rows,
        cache_tokens=cfg.cache_tokens or None,
    )
    rewards = [[float(correct) for _, correct in group] for group in graded]
    guided, guided_rewards = groups[len(examples) :], rewards[len(examples) :]
    if not guided:
        guided, guided_rewards = [[[] for _ in examples] for _ in range(2)]
    return [
        ProblemSamples(places[p], example, groups[p], guided[p], rewards[p], guided_rewards[p])
        for p, example in enumerate(examples)
    ]


def weigh(run: Run, policy: CausalLM, samples: list[ProblemSamples], step: int) -> None:
    """Fill in each problem's advantages and what else its method decides: alpha(q) and target, or the use of the solution."""
    if not samples:
        return  # this rank has no problem in this step
    cfg = run.cfg
    rewards = torch.tensor([sample.auto_rewards for sample in samples])  # (P, G)
    if cfg.method == "luffy":
        return weigh_luffy(run, samples, rewards)
    advantages = group_advantages(rewards, scale_by_std=cfg.method != "hpt")
    if not cfg.autonomous:
        advantages.zero_()  # the pass stays, for the diagnostics; its gradient is zero
    for sample, row in zip(samples, advantages.tolist(), strict=True):
        sample.advantages = row
    if cfg.method == "hpt":
        for sample, gated in zip(samples, hpt_gate(rewards, cfg.hpt_gate).tolist(), strict=True):
            sample.gated, sample.solution_advantage = gated, 1.0 if gated else None  # hpt_loss asks for no advantage there
    if cfg.method == "sgpo":
        weigh_guidance(run, policy, samples, rewards, step)


def weigh_luffy(run: Run, samples: list[ProblemSamples], rewards: Tensor) -> None:
    """LUFFY [code]: the solution is graded like a rollout and stands in the group; r - mean over all of them."""
    problems = [sample.example.problem for sample in samples]
    graded = [[float(is_correct(problem.solution, problem.answer, run.worker))] for problem in problems]
    advantages = group_advantages(torch.cat([rewards, torch.tensor(graded)], dim=1), scale_by_std=False)
    for sample, (*row, last) in zip(samples, advantages.tolist(), strict=True):
        sample.advantages, sample.solution_advantage = row, last


def weigh_guidance(
    run: Run, policy: CausalLM, samples: list[ProblemSamples], auto_rewards: Tensor, step: int
) -> None:
    """SGPO: alpha(q) and the target o+ of each problem, or what an ablation puts in their place."""
    cfg = run.cfg
    guided_rewards = torch.tensor([sample.guided_rewards for sample in samples])  # (P, J)
    if cfg.weight == "adaptive":
        alpha = instance_weight(auto_rewards.mean(1), guided_rewards.mean(1), cfg.alpha_0, cfg.gamma, cfg.alpha_max)
    elif cfg.weight == "group_advantage":
        alpha = group_advantage_weight(auto_rewards, guided_rewards, cfg.alpha_0, cfg.alpha_max)
    else:
        alpha = torch.full((len(samples),), cfg.alpha_0)
    reach = unguided_logprobs(run, policy, samples)  # P lists of J
    for p, sample in enumerate(samples):
        correct = guided_rewards[p] > 0
        sample.alpha, sample.reach = alpha[p].item(), reach[p]
        if cfg.target == "random":
            draw = torch.Generator().manual_seed(stream_seed(cfg.sampling_seed, "target", step, sample.place))
            sample.target = random_target(correct, draw)
        else:
            sample.target = reachable_target(torch.tensor(reach[p]), correct)


@torch.no_grad()
def unguided_logprobs(run: Run, policy: CausalLM, samples: list[ProblemSamples]) -> list[list[float]]:
    """log pi(o~_j | q): each guided trajectory's log-probability without the strategy, for the choice of o+."""
    pairs = [(sample.example.auto_ids, row.response_ids) for sample in samples for row in sample.guided]
    scores: list[float] = []
    costs, saved = [len(a) + len(b) for a, b in pairs], shared_tokens([context for context, _ in pairs])
    for indices in micro_batches(costs, run.cfg.micro_tokens, saved):
        packed = pack([pairs[i][0] for i in indices], [pairs[i][1] for i in indices], device=run.device)
        terms = partial(sft_terms, weight=torch.ones((), device=run.device), temperature=run.cfg.temperature)
        _, stats = head_pass(policy, packed, terms, (packed.targets,), run.cfg.chunk_tokens)
        total = torch.zeros(len(indices), device=run.device).index_add_(0, packed.sequence, stats["logprob"])
        if run.cfg.reach == "mean":
            total = total / torch.bincount(packed.sequence, minlength=len(indices))
        scores += total.tolist()
    J = run.cfg.group_guided
    return [scores[p * J : (p + 1) * J] for p in range(len(samples))]


# ---------------------------------------------------------------------------------------------------- the update


def update(run: Run, samples: list[ProblemSamples], learning_rate: float) -> dict[str, float]:
    """One optimizer update on L = L_GRPO + mean_q alpha(q) L_KD^clip(q) [paper]; metrics over all ranks and micro-batches.

    Two normalisers, both counted over the whole update before any backward pass: policy tokens are weighted 1 / (all response
    tokens), a target's tokens alpha(q) / (P |o+|) with P all problems, those without a correct guided trajectory included.
    """
    policy, targets = policy_items(samples, run.cfg), target_items(samples, run.cfg)
    local = {"tokens": sum(len(item.trajectory.response_ids) for item in policy), "problems": len(samples)}
    count = over_ranks(local, run.device)
    sums, worst = backward_policy(run, policy, max(count["tokens"], 1))
    sums |= backward_distillation(run, targets, count["problems"])
    sums = over_ranks(sums, run.device)
    loss = sums["policy_loss"] + sums["distillation_loss"]
    skip_above = run.cfg.hpt_max_norm if run.cfg.method == "hpt" else math.inf
    grad_norm = apply_gradients(run, learning_rate, loss, skip_above=skip_above)

    tokens, target_tokens = max(sums["own_tokens"], 1), max(sums["target_tokens"], 1)
    return {
        "loss": loss,
        "policy_loss": sums["policy_loss"],
        "distillation_loss": sums["distillation_loss"],
        "entropy": sums["entropy"] / tokens,
        "clip_fraction": sums["clipped"] / tokens,
        "policy_kl": sums["policy_kl"] / tokens,
        "kl": sums["kl"] / target_tokens,
        "kept": sums["kept"] / target_tokens,
        "own_tokens": sums["own_tokens"],
        "target_tokens": sums["target_tokens"],
        "solutions": sums["solutions"],
        "grad_norm": grad_norm,
        "left_out": float(not may_step(loss, grad_norm, skip_above)),
        **over_ranks(worst, run.device, dist.ReduceOp.MAX),
    }


def over_updates(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    """The metrics of a step's updates as one: what counts something is added up, a mean over tokens stays one over all of
    their tokens, an extreme stays one, and the rest (losses, norm, share left out) is the mean over the updates."""

    def total(name: str) -> float:
        return sum(one[name] for one in updates)

    def over(tokens: str, *names: str) -> dict[str, float]:
        return {name: sum(one[name] * one[tokens] for one in updates) / max(total(tokens), 1) for name in names}

    metrics = {name: total(name) / len(updates) for name in updates[0]}
    metrics |= over("own_tokens", "entropy", "clip_fraction", "policy_kl") | over("target_tokens", "kl", "kept")
    metrics |= {name: total(name) for name in ("own_tokens", "target_tokens", "solutions")}
    return metrics | {name: max(one[name] for one in updates) for name in ("ratio_error", "logprob_error")}


def policy_items(samples: list[ProblemSamples], cfg: Config) -> list[PolicyItem]:
    items = []
    for sample in samples:
        if not sample.gated:
            for trajectory, advantage in zip(sample.auto, sample.advantages, strict=True):
                if trajectory.finished or not cfg.mask_truncated:
                    items.append(PolicyItem(trajectory, advantage))
        if sample.solution_advantage is not None:
            items.append(PolicyItem(sample.example.demonstration(), sample.solution_advantage, demonstration=True))
    return items


def target_items(samples: list[ProblemSamples], cfg: Config) -> list[TargetItem]:
    return [
        TargetItem(sample.example.auto_ids, sample.example.guided_ids, sample.guided[sample.target].response_ids, sample.alpha)
        for sample in samples
        if sample.target is not None and cfg.distill != "none"
    ]


def backward_policy(run: Run, items: list[PolicyItem], tokens: float) -> tuple[dict[str, float], dict[str, float]]:
    """Accumulate the gradient of the policy loss over micro-batches: (sums, largest values) of this rank's diagnostics.

    The diagnostics are over the policy's own tokens; those of a solution have no sampler to differ from. A group without a
    difference in reward has no gradient: its tokens are counted and measured, but cost no backward pass.
    """
    sums = dict.fromkeys(("policy_loss", "own_tokens", "solutions", "entropy", "clipped", "policy_kl"), 0.0)
    worst = {"ratio_error": 0.0, "logprob_error": 0.0}
    dead = [item.advantage == 0 and run.cfg.method != "luffy" for item in items]  # LUFFY's entropy bonus moves all tokens
    for gradient in (True, False):
        part = [item for item, without in zip(items, dead, strict=True) if without != gradient]
        contexts = [item.trajectory.prompt_ids for item in part]
        costs = [len(c) + len(item.trajectory.response_ids) for c, item in zip(contexts, part, strict=True)]
        for indices in padded(micro_batches(costs, run.cfg.micro_tokens, shared_tokens(contexts)), run.device):
            chosen, weight = ([part[i] for i in indices], 1 / tokens) if indices else ([NO_TRAJECTORY], 0.0)
            with torch.set_grad_enabled(gradient):
                loss, stats, old, own = policy_pass(run, chosen, weight)
            if gradient:
                loss.backward()
            if not indices:
                continue
            sums["policy_loss"] += loss.item()
            sums["solutions"] += sum(part[i].demonstration for i in indices)
            if own.any():
                measure_policy(sums, worst, stats["logprob"][own] - old[own], {k: v[own] for k, v in stats.items()})
    return sums, worst


def measure_policy(
    sums: dict[str, float], worst: dict[str, float], log_ratio: Tensor, stats: dict[str, Tensor]
) -> None:
    """Add one micro-batch's diagnostics, all (m,) over the policy's own tokens."""
    ratio = stats["ratio"]
    sums["own_tokens"] += ratio.numel()
    sums["entropy"] += stats["entropy"].sum().item()
    sums["clipped"] += stats["clipped"].sum().item()
    # an estimate of KL(old || new) from the sampled tokens that is unbiased and, but for rounding, never negative
    sums["policy_kl"] += (ratio - 1 - log_ratio).sum().item()
    worst["ratio_error"] = max(worst["ratio_error"], (ratio - 1).abs().max().item())
    worst["logprob_error"] = max(worst["logprob_error"], log_ratio.abs().max().item())


def backward_distillation(run: Run, items: list[TargetItem], problems: float) -> dict[str, float]:
    """Accumulate the gradient of the weighted, clipped KL over micro-batches: sums of this rank's diagnostics."""
    sums = dict.fromkeys(("distillation_loss", "target_tokens", "kl", "kept"), 0.0)
    costs = [len(item.auto_ids) + len(item.guided_ids) + 2 * len(item.response_ids) for item in items]
    for indices in padded(micro_batches(costs, run.cfg.micro_tokens), run.device):
        loss, stats = distillation_pass(run, [items[i] for i in indices] or [NO_TARGET], problems)
        loss.backward()
        if not indices:
            continue
        sums["distillation_loss"] += loss.item()
        sums["target_tokens"] += stats["divergence"].numel()
        sums["kl"] += stats["divergence"].sum().item()
        sums["kept"] += stats["kept"].sum().item()
    return sums


def head_pass(
    model: CausalLM, packed: Packed, terms: Any, inputs: Sequence[Tensor], chunk_tokens: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """One forward over a packed batch, its response tokens through the chunked head: (loss, per-token stats)."""

    def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return chunked_head(hidden[0, packed.predict], weight, terms, inputs, chunk_tokens=chunk_tokens)

    return model(packed.input_ids, lengths=packed.lengths, prefixes=packed.prefixes, head=head)


def policy_pass(
    run: Run, items: list[PolicyItem], token_weight: float
) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    """The policy loss of one micro-batch: (loss, per-token stats, the sampler's log-probs, which tokens are the policy's own).

    The old policy is the sampler: at temperature 1 and top_p 1 its log-probs are the behaviour's, and no second pass over the
    trajectories is needed (ours). What the two computations differ by is logged as logprob_error.
    """
    device = run.device
    rows = [item.trajectory for item in items]
    packed = pack([row.prompt_ids for row in rows], [row.response_ids for row in rows], device=device)
    old = torch.tensor([value for row in rows for value in row.logprobs], device=device)  # (M,)
    advantages = torch.tensor([item.advantage for item in items], device=device)[packed.sequence]  # (M,)
    demonstration = torch.tensor([item.demonstration for item in items], device=device)[packed.sequence]  # (M,)
    inputs = (packed.targets, old, advantages, torch.full_like(old, token_weight))
    if run.cfg.method in ("luffy", "hpt"):
        inputs += (demonstration,)
    loss, stats = head_pass(run.model, packed, policy_terms(run.cfg), inputs, run.cfg.chunk_tokens)
    return loss, stats, old, ~demonstration


def policy_terms(cfg: Config) -> Callable[..., dict[str, Tensor]]:
    """The method's per-token policy loss, with its settings."""
    if cfg.method == "luffy":
        return partial(
            luffy_terms, shaping=cfg.luffy_shaping, entropy_bonus=cfg.luffy_entropy, temperature=cfg.temperature
        )
    if cfg.method == "hpt":
        return partial(hpt_terms, sft_weight=cfg.hpt_sft_weight, temperature=cfg.temperature)
    return partial(grpo_terms, clip_low=cfg.clip_low, clip_high=cfg.clip_high, temperature=cfg.temperature)


def distillation_pass(run: Run, items: list[TargetItem], problems: float) -> tuple[Tensor, dict[str, Tensor]]:
    """sum over the items of alpha(q) / (P |o+|) sum_t 1[d_t <= delta] d_t: (loss, per-token stats).

    Two forwards over the same response tokens: the guided one at the current parameters, without gradient (ours: recomputed
    at every update), kept as hidden states; then the unguided one, whose chunks of logits meet the guided chunks in the head.
    """
    cfg, device = run.cfg, run.device
    responses = [item.response_ids for item in items]
    guided = pack([item.guided_ids for item in items], responses, device=device)
    unguided = pack([item.auto_ids for item in items], responses, device=device)  # row m of both predicts the same token
    with torch.no_grad():
        guided_hidden = run.model(
            guided.input_ids, lengths=guided.lengths, prefixes=guided.prefixes, head=lambda h, _: h[0, guided.predict]
        )  # (M, D)
    per_token = torch.tensor([item.alpha / (problems * len(item.response_ids)) for item in items], device=device)
    inputs = (guided_hidden, unguided.targets, per_token[unguided.sequence])
    settings = dict(delta=cfg.delta, temperature=cfg.temperature, objective=cfg.distill)

    def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        terms = partial(distillation_terms, head_weight=weight, **settings)
        return chunked_head(hidden[0, unguided.predict], weight, terms, inputs, chunk_tokens=cfg.chunk_tokens)

    return run.model(unguided.input_ids, lengths=unguided.lengths, prefixes=unguided.prefixes, head=head)


class NotFinite(RuntimeError):
    """Too many updates had a loss or a gradient that was not finite."""


def may_step(loss: float, norm: float, skip_above: float = math.inf) -> bool:
    """Whether an update with this loss and gradient norm is made: both finite, and the norm at most `skip_above`."""
    return math.isfinite(loss) and math.isfinite(norm) and norm <= skip_above


def apply_gradients(run: Run, learning_rate: float, loss: float, skip_above: float = math.inf) -> float:
    """Clip the gradients by their norm over all parameters and ranks, and step; the norm before clipping.

    The losses are divided by counts over all ranks, so the sum over ranks, which FSDP makes, is the gradient. `loss` is over
    all ranks too. Where it or the norm is not finite, there is no step, on any rank, and the progress counts it; nor is there
    where the norm exceeds `skip_above` (HPT's safeguard [code]).
    """
    norm = clip_gradients(list(run.model.parameters()), run.cfg.max_grad_norm)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate
    if may_step(loss, norm, skip_above):
        run.optimizer.step()
    run.optimizer.zero_grad()
    if not may_step(loss, norm):
        run.progress.skipped += 1
        if run.progress.skipped > run.cfg.max_skipped:
            raise NotFinite(
                f"{run.progress.skipped} updates were left out because the loss or the gradient norm was not finite "
                f"(now {loss} and {norm}), --max_skipped allows {run.cfg.max_skipped}"
            )
    return norm


def describe(
    run: Run, samples: list[ProblemSamples], step: int, timeouts: int, seconds: dict[str, float]
) -> dict[str, float]:
    """What was sampled, in numbers over all ranks; the trajectories of the batch's first problem go to samples.jsonl."""
    auto = [row for sample in samples for row in sample.auto]
    guided = [row for sample in samples for row in sample.guided]
    local = {
        "problems": len(samples),
        "auto": len(auto),
        "guided": len(guided),
        "reward_auto": sum(sum(sample.auto_rewards) for sample in samples),
        "reward_guided": sum(sum(sample.guided_rewards) for sample in samples),
        "alpha": sum(sample.alpha for sample in samples),
        "with_target": sum(sample.target is not None for sample in samples),
        "reach_gap": sum(reach_gap(sample) for sample in samples),
        "all_right": sum(min(sample.auto_rewards) > 0 for sample in samples),
        "all_wrong": sum(max(sample.auto_rewards) == 0 for sample in samples),
        "truncated": sum(not row.finished for row in auto),
        "auto_tokens": sum(len(row.response_ids) for row in auto),
        "guided_tokens": sum(len(row.response_ids) for row in guided),
        "grader_timeouts": timeouts,
    }
    total = over_ranks(local, run.device)
    if world()[0] == 0 and samples:
        write_samples(run, samples[0], step)
    problems, tokens = total["problems"], total["auto_tokens"] + total["guided_tokens"]
    return {
        "reward_auto": total["reward_auto"] / total["auto"],
        "reward_guided": total["reward_guided"] / max(total["guided"], 1),
        "alpha": total["alpha"] / problems,
        "with_target": total["with_target"] / problems,
        "reach_gap": total["reach_gap"] / max(total["with_target"], 1),
        "all_right": total["all_right"] / problems,
        "all_wrong": total["all_wrong"] / problems,
        "truncated": total["truncated"] / total["auto"],
        "length_auto": total["auto_tokens"] / total["auto"],
        "length_guided": total["guided_tokens"] / max(total["guided"], 1),
        "sampled_tokens": tokens,
        "grader_timeouts": total["grader_timeouts"],
        **seconds,
        "tokens_per_s": tokens / seconds["step_s"],
    }


def reach_gap(sample: ProblemSamples) -> float:
    """Nats by which the target is more reachable than the correct guided trajectories are on average; 0 without a target."""
    correct = [reach for reach, reward in zip(sample.reach, sample.guided_rewards, strict=True) if reward > 0]
    return 0.0 if sample.target is None else sample.reach[sample.target] - sum(correct) / len(correct)


def write_samples(run: Run, sample: ProblemSamples, step: int) -> None:
    with (run.out / "samples.jsonl").open("a", encoding="utf-8") as file:
        groups = (("auto", sample.auto, sample.auto_rewards), ("guided", sample.guided, sample.guided_rewards))
        for kind, rows, rewards in groups:
            for index, (row, reward) in enumerate(zip(rows, rewards, strict=True)):
                record = {
                    "step": step,
                    "id": sample.example.problem.id,
                    "group": kind,
                    "target": kind == "guided" and index == sample.target,
                    "reach": sample.reach[index] if kind == "guided" and sample.reach else None,
                    "reward": reward,
                    "alpha": sample.alpha,
                    "finished": row.finished,
                    "text": run.tokenizer.decode(row.response_ids, skip_special_tokens=True),
                }
                file.write(json.dumps(record) + "\n")


# ---------------------------------------------------------------------------------------------------- stages


def sft_stage(run: Run, examples: Sequence[Example], log: Callable[[dict[str, Any]], None]) -> None:
    """Token-mean cross-entropy on the strong model's solutions; the SFT warm-up, and the whole of --method sft."""
    cfg = run.cfg
    rank, ranks = world()
    steps = math.ceil(cfg.sft_epochs * len(examples) / cfg.sft_batch)
    for step in tqdm(range(run.progress.sft_steps, steps), "sft", steps, initial=run.progress.sft_steps, disable=rank > 0):
        batch = data_order(examples, step, cfg.sft_batch, cfg.data_seed, "sft")
        batch = my_share(batch, [len(example.solution_ids) for _, example in batch])
        pairs = [sft_pair(example, step, place, cfg) for place, example in batch]
        costs = [len(context) + len(response) for context, response in pairs]
        tokens = over_ranks({"tokens": sum(len(response) for _, response in pairs)}, run.device)["tokens"]
        total = 0.0
        for indices in padded(micro_batches(costs, cfg.micro_tokens), run.device):
            contexts, responses = zip(*([pairs[i] for i in indices] or [([0], [0])]), strict=True)
            packed = pack(contexts, responses, device=run.device)
            weight = torch.full(packed.targets.shape, 1 / tokens if indices else 0.0, device=run.device)
            terms = partial(sft_terms, temperature=1.0)
            loss, _ = head_pass(run.model, packed, terms, (packed.targets, weight), cfg.chunk_tokens)
            loss.backward()
            total += loss.item()
        learning_rate = cfg.sft_learning_rate * (1 - step / steps)
        total = over_ranks({"loss": total}, run.device)["loss"]
        norm = apply_gradients(run, learning_rate, total)
        log({"stage": "sft", "step": step + 1, "loss": total, "grad_norm": norm, "learning_rate": learning_rate})
        if rank == 0:
            tqdm.write(f"sft {step + 1:>4}/{steps}  loss {total:.4f}  grad norm {norm:.2f}")
        run.progress.sft_steps = step + 1
        after_step(run, last=step + 1 == steps)


def sft_pair(example: Example, step: int, place: int, cfg: Config) -> tuple[list[int], list[int]]:
    """(context, response) of one SFT example; a share sft_guided of them, drawn anew each time, has the strategy in view."""
    draw = stream_seed(cfg.data_seed, "sft guided", step, place) / 2**63
    return (example.guided_ids if draw < cfg.sft_guided else example.auto_ids), example.solution_ids


def rl_stage(run: Run, examples: Sequence[Example], held_out: Sequence[Problem], log: Callable[[dict], None]) -> None:
    """All steps of a sampling method, with the periodic evaluation."""
    cfg, progress = run.cfg, run.progress
    rank = world()[0]
    steps = rl_steps(cfg, len(examples))
    for step in tqdm(range(progress.rl_steps, steps), cfg.method, steps, initial=progress.rl_steps, disable=rank > 0):
        if cfg.eval_every and held_out and step > progress.evaluated and step % cfg.eval_every == 0:
            accuracy = measure(run, held_out, guided=False)
            log({"stage": "eval", "step": step, **accuracy})
            progress.evaluated = step
            if rank == 0:
                tqdm.write(f"eval after step {step}: accuracy {accuracy['accuracy']:.3f} +- {accuracy['stderr']:.3f}")
        batch = data_order(examples, step, cfg.problems_per_step, cfg.data_seed, "rl")
        batch = my_share(batch, [expected_length(example.problem) for _, example in batch])
        metrics = sgpo_step(run, batch, step + 1, learning_rate_at(cfg, step, steps))
        log({"stage": cfg.method, **metrics})
        if rank == 0:
            tqdm.write(step_line(metrics, steps))
        progress.rl_steps = step + 1
        after_step(run, last=step + 1 == steps)


def after_step(run: Run, *, last: bool) -> None:
    """Behind every step: a checkpoint where one is due, by rank 0's clock or at a stage's end, and the end of the run where
    SIGTERM asked for it."""
    every = 60 * run.cfg.checkpoint_minutes
    due = world()[0] == 0 and (time.monotonic() - run.saved_at >= every or (last and every < math.inf))
    word = meet(run.control, 2 if run.stop.asked else int(due), run.cfg.timeout_minutes)
    if word == 2:
        raise Interrupted
    if word == 1:
        save_progress(run)


def rl_steps(cfg: Config, examples: int) -> int:
    return cfg.steps or math.ceil(cfg.epochs * examples / cfg.problems_per_step)


def learning_rate_at(cfg: Config, step: int, steps: int) -> float:
    """Linear warm-up to the peak, then constant or linearly down to zero at the last step; steps count from 0."""
    if step < cfg.lr_warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.lr_warmup_steps
    if cfg.lr_decay == "constant":
        return cfg.learning_rate
    return cfg.learning_rate * (steps - step) / max(steps - cfg.lr_warmup_steps, 1)


def step_line(metrics: dict[str, float], steps: int) -> str:
    m = metrics
    return (
        f"step {m['step']:>4}/{steps}  reward alone {m['reward_auto']:.3f}  guided {m['reward_guided']:.3f}  "
        f"alpha {m['alpha']:.3f}  KL {m['kl']:.3f}  kept {m['kept']:.3f}  entropy {m['entropy']:.3f}  "
        f"length {m['length_auto']:.0f}  {m['tokens_per_s']:.0f} tokens/s"
    )


def measure(run: Run, problems: Sequence[Problem], *, guided: bool) -> dict[str, float]:
    """Held-out accuracy over all ranks, each evaluating its share of the problems."""
    cfg = run.cfg
    mine = my_share(problems, [expected_length(problem) for problem in problems])
    sums = {"mean": 0.0, "square": 0.0, "truncated": 0.0, "length": 0.0}

    def work() -> list[dict[str, Any]]:
        if not mine:
            return []
        return evaluate(
            policy,
            run.tokenizer,
            mine,
            n=cfg.eval_n,
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.eval_temperature,
            top_p=cfg.eval_top_p,
            seed=stream_seed(cfg.seed, "eval") % 2**31,  # the same draws at every evaluation, on any number of ranks
            worker=run.worker,
            guided=guided,
            max_rows=cfg.max_rows,
            cache_tokens=cfg.cache_tokens or None,
            keep_responses=True,
            show=world()[0] == 0,
        )["responses"]

    with whole_model(run.model) as policy:
        responses = interruptible(run, work)
    for response in responses:
        mean, cut, length = (
            sum(sample[name] for sample in response["samples"]) / cfg.eval_n for name in ("correct", "truncated", "length")
        )
        sums["mean"] += mean
        sums["square"] += mean * mean
        sums["truncated"] += cut
        sums["length"] += length
    sums = over_ranks(sums, run.device)
    P = len(problems)
    accuracy = sums["mean"] / P
    variance = max(sums["square"] - P * accuracy**2, 0.0) / max(P - 1, 1)  # of the problems' means, unbiased
    return {
        "guided": guided,
        "problems": P,
        "n": cfg.eval_n,
        "accuracy": accuracy,
        "stderr": math.sqrt(variance / P),
        "truncated": sums["truncated"] / P,
        "length": sums["length"] / P,
    }


# ---------------------------------------------------------------------------------------------------- the whole run


def show_samples(run: Run, problem: Problem, when: str) -> None:
    """Print one response alone and one guided, to the same problem, at the evaluation's settings (rank 0)."""
    prompts = {"alone": auto_messages(problem.problem)}
    if problem.strategy is not None:
        prompts["guided"] = guided_messages(problem.problem, problem.strategy)
    with whole_model(run.model) as policy:
        if world()[0]:
            return
        _, graded = sample_and_grade(
            policy,
            run.tokenizer,
            [encode_chat(run.tokenizer, messages) for messages in prompts.values()],
            [problem.answer] * len(prompts),
            run.worker,
            n=1,
            max_new_tokens=run.cfg.max_new_tokens,
            temperature=run.cfg.eval_temperature,
            top_p=run.cfg.eval_top_p,
            seed=[stream_seed(run.cfg.seed, "show")] * len(prompts),
        )
    tqdm.write(f"\n[{when}] {problem.problem}   (answer {problem.answer})")
    for kind, ((text, correct),) in zip(prompts, graded, strict=True):
        tqdm.write(f"  {kind:>6} ({'right' if correct else 'wrong'}): {text}")


def code_commit() -> str:
    """The commit of this code, with a + where the files differ from it; 'unknown' outside a git checkout."""
    try:
        run = partial(subprocess.run, cwd=HERE, capture_output=True, text=True, check=True)
        head = run(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        return head + ("+" if run(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def open_log(run: Run) -> Callable[[dict[str, Any]], None]:
    """Make the run's folder; metrics.jsonl begins with the config, the commit and the machine. Only rank 0 writes.

    Called after every other check: a run that is refused must not leave a folder that the corrected one would trip over.
    """
    out, rank = run.out, world()[0]
    there = over_ranks({"there": rank == 0 and (out / "metrics.jsonl").exists()}, run.device)["there"]
    if there and not run.cfg.resume:
        raise ValueError(f"--out {out}: holds a run already (metrics.jsonl); name another folder, or --resume it")
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        run.lock = lock(out)
    if over_ranks({"busy": rank == 0 and run.lock is None}, run.device)["busy"]:
        raise ValueError(f"--out {out}: another process is training there (ranks can outlive a torchrun that was killed)")

    def log(record: dict[str, Any]) -> None:
        if rank == 0:
            with (out / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    if not (run.cfg.resume and resume(run)):
        cuda = run.device.type == "cuda"
        name = torch.cuda.get_device_name(run.device) if cuda else f"cpu, {torch.get_num_threads()} threads"
        made_from = {name: run.origin[name] for name in ("commit", "torch")}
        log({"config": dataclasses.asdict(run.cfg), **made_from, "device": name, "ranks": world()[1]})
    return log


def lock(out: Path) -> Any:
    """An open file that keeps others from training into the folder until it is closed or we die; None where another has it."""
    file = (out / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return file.close()
    return file


def save_progress(run: Run) -> None:
    """A checkpoint of the run as it is now, with the lengths of its logs: what a later crash writes behind them is cut off."""
    sizes = {}
    if world()[0] == 0:
        for file in (run.out / name for name in LOGS):
            if file.exists():
                with file.open("a") as handle:
                    os.fsync(handle.fileno())
                sizes[file.name] = file.stat().st_size
    progress = run.progress
    state = {"progress": dataclasses.asdict(progress), "config": dataclasses.asdict(run.cfg), "logs": sizes}
    state |= {**run.origin, "ranks": world()[1]}
    name = f"step-{progress.sft_steps + progress.rl_steps:06d}"
    keep = run.cfg.keep_checkpoints
    save_checkpoint(run.out / "checkpoints", name, run.model, run.optimizer, state, keep=keep)
    run.saved_at = time.monotonic()


def resume(run: Run) -> bool:
    """Go on from the newest whole checkpoint: weights, moments, progress, and the logs cut to where they were then.

    False where there is none: what an earlier run logged is removed, for it starts from the beginning. ValueError where the
    checkpoint is of other settings or data.
    """
    say = tqdm.write if world()[0] == 0 else lambda _: None
    path, state, refused = find_checkpoint(run.out / "checkpoints")
    for reason in refused:
        say(f"a checkpoint is damaged and passed over: {reason}")
    if path is not None:
        now = {"config": dataclasses.asdict(run.cfg), "data": run.origin["data"]}
        for kind, there in (("config", state["config"]), ("data", state["data"])):
            pairs = {name: (there.get(name), now[kind].get(name)) for name in there | now[kind] if name not in MAY_CHANGE}
            differ = [f"  {name}: {old!r} there, {new!r} here" for name, (old, new) in pairs.items() if old != new]
            if differ:
                raise ValueError(f"{path}: its {kind} differs\n" + "\n".join(differ))
        if state["commit"] != run.origin["commit"]:
            say(f"note: the checkpoint is of commit {state['commit']}, this code is {run.origin['commit']}")
        load_checkpoint(path, run.model, run.optimizer)
        run.progress = Progress(**state["progress"])
    if world()[0] == 0:
        for file in (run.out / name for name in LOGS):
            if file.exists():
                os.truncate(file, state["logs"].get(file.name, 0) if path else 0)
    done = run.progress
    say(f"resumed: {path}, {done.sft_steps} SFT and {done.rl_steps} RL steps" if path else "nothing to resume: from the start")
    return path is not None


def data_digests(cfg: Config) -> dict[str, str]:
    """SHA-256 of the problem files, which a resumed run must find unchanged."""
    files = {"data": cfg.data, "eval_data": cfg.eval_data}
    return {name: hashlib.sha256(Path(file).read_bytes()).hexdigest() for name, file in files.items() if file}


def prepare(cfg: Config, device: torch.device, worker: MathWorker) -> tuple[Run, list[Example], list[Problem]]:
    """Load and check everything a run needs; ValueError before any training for whatever is wrong with it."""
    problems = load_problems(cfg.data, worker)
    held_out = load_problems(cfg.eval_data, worker) if cfg.eval_data else []
    origin = {"data": data_digests(cfg), "commit": code_commit(), "torch": torch.__version__}
    if cfg.eval_limit:
        held_out = held_out[: cfg.eval_limit]
    if cfg.eval_guided and any(problem.strategy is None for problem in held_out):
        raise ValueError(f"{cfg.eval_data}: --eval_guided needs a strategy in every row")
    folder = resolve_model(cfg.model)
    model, tokenizer = blank_model(folder)
    examples = encode_examples(problems, tokenizer, cfg, model.config.max_position_embeddings)
    model.model.recompute = cfg.recompute
    shard(model, device=device, dtype=compute_dtype(cfg, device), shard_ranks=cfg.shard_ranks, offload=cfg.offload)
    load_sharded(model, folder, device=device, offload=cfg.offload)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.learning_rate, weight_decay=cfg.weight_decay, fused=True)
    control = control_group()
    return Run(cfg, model, tokenizer, optimizer, worker, device, Path(cfg.out), control, origin), examples, held_out


def compute_dtype(cfg: Config, device: torch.device) -> torch.dtype:
    """Of activations and of the gathered weights."""
    return torch.bfloat16 if cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and device.type == "cuda") else torch.float32


def split_examples(examples: list[Example], cfg: Config) -> tuple[list[Example], list[Example]]:
    """(for SFT, for RL): a seeded split without overlap; --method sft takes all."""
    if cfg.method == "sft":
        return examples, []
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(stream_seed(cfg.data_seed, "split")))
    shuffled = [examples[i] for i in order.tolist()]
    cut = round(cfg.sft_fraction * len(examples))
    if cut == len(examples):
        raise ValueError(f"--sft_fraction {cfg.sft_fraction} leaves none of the {cut} problems for RL")
    return shuffled[:cut], shuffled[cut:]


class Refused(Exception):
    """A run that cannot be what was asked for; the message says why."""


def train(cfg: Config, device: torch.device) -> None:
    """Check everything, then the run; SIGTERM ends it with a checkpoint."""
    say = tqdm.write if world()[0] == 0 else lambda _: None
    if cfg.resume and (Path(cfg.out) / "model").exists():
        return say(f"--resume: the run in {cfg.out} is finished")
    with MathWorker() as worker:
        try:
            run, examples, held_out = prepare(cfg, device, worker)
            for_sft, for_rl = split_examples(examples, cfg)
            log = open_log(run)
        except ValueError as error:
            raise Refused(str(error)) from error
        say("\n".join(f"{name:>18}  {value}" for name, value in dataclasses.asdict(cfg).items()))
        if cfg.data in (TINY["data"], STARTER["data"]):
            say(f"data: {'the tiny world' if cfg.data == TINY['data'] else 'the starter set'} (data/README.md says what it is)")
        say(attention_ways(run))
        say(f"{len(for_sft)} problems for SFT, {len(for_rl)} for {cfg.method}, {len(held_out)} held out")
        before = signal.signal(signal.SIGTERM, run.stop)
        try:
            stages(run, for_sft, for_rl, held_out, log)
        except Interrupted:
            save_progress(run)
            say(f"SIGTERM: a checkpoint is in {run.out / 'checkpoints'}; the same command with --resume goes on from it")
        finally:
            if run.lock is not None:
                run.lock.close()
        # not behind an error: torchrun sends SIGTERM to the ranks that are left, and they must still say what they saw
        signal.signal(signal.SIGTERM, before)


def stages(
    run: Run, for_sft: list[Example], for_rl: list[Example], held_out: list[Problem], log: Callable[[dict[str, Any]], None]
) -> None:
    """Warm-up, RL, the evaluations between, and the model folder at the end; what the progress says is done is passed over."""
    cfg, progress = run.cfg, run.progress

    def evaluate_as(when: str, step: int) -> None:
        for kind in ["alone", "guided"] if cfg.eval_guided else ["alone"]:
            if held_out and kind not in progress.table.get(when, {}):
                accuracy = measure(run, held_out, guided=kind == "guided")
                progress.table.setdefault(when, {})[kind] = accuracy
                log({"stage": "eval", "when": when, "step": step, **accuracy})

    shown = held_out[0] if held_out else (for_rl or for_sft)[0].problem
    if progress == Progress():
        show_samples(run, shown, "before")
    evaluate_as("base", 0)
    if for_sft:
        sft_stage(run, for_sft, log)
        evaluate_as("after SFT", 0)
    if for_rl:
        if progress.rl_steps == 0:
            run.optimizer.state.clear()  # RL starts with fresh moments: those of SFT are of another loss and scale
        rl_stage(run, for_rl, held_out, log)
        evaluate_as(f"after {cfg.method}", rl_steps(cfg, len(for_rl)))
    show_samples(run, shown, "after")
    gathered = model_on_host(run.model, compute_dtype(cfg, run.device))  # in the dtype that it sampled in
    if gathered is not None:
        part = run.out / "model.part"
        shutil.rmtree(part, ignore_errors=True)
        save_model(gathered, run.tokenizer, part)
        part.rename(run.out / "model")  # the last act: a folder `model` is whole, and its run is finished
        tqdm.write(accuracy_table(progress.table) + f"\nmodel saved in {run.out / 'model'}")


def attention_ways(run: Run) -> str:
    """Which of the ways to compute attention this machine takes; the results are the same to rounding, the speed is not."""
    config, dtype = run.model.config, compute_dtype(run.cfg, run.device)
    heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    packed = packed_kernel(run.device, dtype, *heads) is not None
    paged = decode_kernel(run.device, config.head_dim) is not None
    return (
        f"attention: {'one variable-length call' if packed else 'one call a sequence'} in training, "
        f"{'CUDA graphs with the kernel of paged_attention.py' if paged else 'pages with torch alone'} in sampling"
    )


def accuracy_table(table: dict[str, dict[str, dict[str, float]]]) -> str:
    """Held-out accuracy, a row per moment and a column per kind of prompt."""
    lines = []
    for when, kinds in table.items():
        cells = "  ".join(f"{kind} {m['accuracy']:.3f} +- {m['stderr']:.3f}" for kind, m in kinds.items())
        lines.append(f"{when:>12} | {cells}  (avg@{next(iter(kinds.values()))['n']})")
    return "\nheld-out accuracy\n" + "\n".join(lines) if lines else "\nno --eval_data: accuracy was not measured"


def plan_run(argv: Sequence[str]) -> None:
    """--plan: what the run would need, from the model's config.json alone. Besides its flags there are plan.py's, for the
    lengths of the texts and the speeds of the hardware."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--plan", action="store_true")
    add_flags(parser, Workload, Hardware)
    known, rest = parser.parse_known_args(argv)
    cfg = parse_config(rest)
    print_plan(known, cfg.model, cfg)


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if "--plan" in argv:
        return plan_run(argv)
    cfg = parse_config(argv)
    joined = dist.is_initialized()
    device = start_ranks(cfg.device, cfg.timeout_minutes)
    try:
        train(cfg, device)
    except (Refused, CheckpointError, NotFinite, RankLost) as error:
        where = f" on rank {world()[0]}" if world()[1] > 1 else ""
        sys.exit(f"error{where}: {error}")
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):  # gloo's errors have no class of their own
            raise
        lost = f"contact with another rank was lost ({error}). It ended, its own message says why; --resume goes on"
        sys.exit(f"error on rank {world()[0]}: {lost}")
    finally:
        if not joined:
            end_ranks(device)


if __name__ == "__main__":
    main()
