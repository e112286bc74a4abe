"""Train with SGPO (Strategy-Guided Policy Optimization, arXiv 2606.24064) or a baseline: GRPO, hinted GRPO, LUFFY, HPT, SFT.

    python train.py                                                     the tiny world, 2 CPU cores, no network
    python train.py --model DIR --data problems.jsonl --out runs/x      a Hugging Face checkpoint on your problems
    python train.py --model Qwen2.5-7B-Instruct --plan --gpus 8         what that would need (tools/plan.py)
    torchrun --nproc_per_node=2 train.py ...                            the same on two GPUs

This file is the run around the method: settings, stages (warm-up, RL, evaluation), logging. The step itself is in sgpo.py. The
result depends neither on the number of processes (parallel.py) nor on stops (checkpoint.py): a problem's random numbers follow
from (seed, step, problem), and every loss is divided by a count over the whole update.
"""

import argparse
import dataclasses
import math
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from checkpoint import CheckpointError, NotFinite, Progress, RunFolder, differences, origin_of, stored_config
from data.examples import check_rows, data_order, encode_examples, encode_rows, most_sampled, split_examples
from data.problems import digests, load_problems, load_template
from eval import accuracy_table, evaluate, expected_length, plus_minus
from grader import MathWorker, RewardError, UserReward, grader_of
from lora import add_adapters, initial_adapters, save_adapters
from loss import chunked_head, sft_terms
from methods import METHODS, Method, knob
from model import CausalLM, blank_model, resolve_model, save_model
from parallel import (
    FIRST_SCALE,
    Control,
    Preempted,
    RankLost,
    all_reduce,
    apply_gradients,
    compute_dtype,
    leave,
    load_sharded,
    loss_scale,
    may_step,
    model_on_host,
    my_share,
    pad_micro_batches,
    ranks_of,
    shard,
    trained,
    whole_model,
    whole_tensor,
    world,
)
from rollout import micro_batches, pack, sample_and_grade, stream_seed
from sgpo import Example, responses_of, sgpo_step, step_line

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Config(Method):
    """Every setting of a run; Method has those of a step. TINY replaces some of the defaults if no --model is given."""

    model: str = knob("", "model folder, org/name, or the bare name of a known family; empty: the tiny world's base model")
    data: str = knob("", "training problems (jsonl, see data/README.md); empty: the tiny world or the starter set")
    eval_data: str = knob("", "held-out problems; empty: the default data's own test split, else no evaluation")
    reward: str = knob("", "FILE.py:FUNCTION(response, row) -> a number in [0, 1], instead of comparing final answers")
    reward_timeout: float = knob(5.0, "seconds to grade one response: a call of --reward, or a comparison", low=0.01)
    template: str = knob("", "JSON file with the wording of both prompts (data/README.md); eval.py takes it too")
    out: str = knob("", "folder to write to; empty: runs/<method>-<time>")
    seed: int = knob(0, "seed of everything random; --data_seed and --sampling_seed replace it for their parts")
    data_seed: int = knob(-1, "seed of the split and the order of the problems; -1: the same as --seed", low=-1)
    shuffle_strategies: bool = knob(False, "a control: give each problem the strategy of a problem of another type [ours]")
    # schedule
    epochs: float = knob(10.0, "passes over the RL problems [app E]; --steps overrides it", high=1e6)
    steps: int = knob(0, "number of RL steps; 0: from --epochs. With --resume it may be more than before")
    learning_rate: float = knob(1e-6, "peak learning rate of RL [app E]", high=1)
    lr_warmup_steps: int = knob(0, "steps of linear learning-rate warm-up in RL [ours]")
    lr_decay: str = knob("constant", "learning rate of RL after the warm-up [ours]", ("constant", "linear"))
    weight_decay: float = knob(0.01, "decoupled weight decay of AdamW [ours]")
    # adapters
    lora_rank: int = knob(0, "train adapters of this rank on frozen weights, at ten times the rates; 0: all weights [ours]")
    lora_alpha: float = knob(32.0, "the adapters' product is scaled by this over the rank [ours]", low=1e-6)
    # supervised stage
    sft_fraction: float = knob(1 / 3, "share of the problems for the SFT warm-up instead of RL [§4.1]; 0: no warm-up", high=1)
    sft_epochs: float = knob(10.0, "passes over the SFT problems [app E]; all problems with --method sft", low=1e-6, high=1e6)
    sft_batch: int = knob(64, "solutions in one SFT update [app E]", low=1)
    sft_learning_rate: float = knob(1e-5, "peak learning rate of SFT [app E]; decays linearly [ours]", high=1)
    sft_warmup_ratio: float = knob(0.1, "share of the SFT updates in which the learning rate rises to its peak [app E]", high=1)
    sft_validation: float = knob(0.1, "share of the SFT problems held out, to find the best weights [app E]", high=0.5)
    sft_max_tokens: int = knob(16384, "SFT leaves out rows with more tokens than this, prompt and solution together [app E]")
    sft_guided: float = knob(0.0, "share of the SFT examples with the strategy in the prompt [ours]", high=1)
    # evaluation
    eval_every: int = knob(20, "RL steps between evaluations; 0: only before and after each stage")
    eval_n: int = knob(4, "responses sampled for each problem", low=1)
    eval_limit: int = knob(0, "evaluate on this many problems, the first ones; 0: on all")
    eval_max_new_tokens: int = knob(2048, "longest response in tokens; cut to fit the context [ours]")
    eval_guided: bool = knob(False, "before and after each stage, evaluate with the strategy in the prompt too")
    eval_temperature: float = knob(0.6, "sampling temperature in evaluation [§4.2]")
    eval_top_p: float = knob(0.95, "top-p (nucleus) sampling in evaluation [§4.2]", low=1e-3, high=1)
    # machine
    micro_tokens: int = knob(0, "tokens in one pass of the update; 0: with the next two, as large as memory allows", low=0)
    chunk_tokens: int = knob(0, "tokens in one chunk of the head; 0: as large as memory allows")
    recompute: bool = knob(True, "recompute activations: far less memory, a third more work. With --micro_tokens 0: if needed")
    dtype: str = knob("auto", "of activations; weights and optimizer are fp32", ("auto", "float32", "bfloat16", "float16"))
    device: str = knob("auto", "auto: cuda if there is one, else cpu", ("auto", "cpu", "cuda"))
    shard_ranks: int = knob(0, "GPUs that share one copy of the weights; each such group holds a replica (HSDP); 0: all GPUs")
    offload: bool = knob(False, "keep fp32 weights, gradients and optimizer states in host memory")
    timeout_minutes: float = knob(60.0, "end the run if one rank waits longer than this for the others")
    # crashes
    resume: bool = knob(False, "go on from the newest checkpoint in --out; the run's settings need not be given again")
    checkpoint_minutes: float = knob(10.0, "write a checkpoint after a step if the last one is this old; inf: SFT's best alone")
    max_skipped: int = knob(10, "end the run after more updates than this with a loss or gradient that is not finite")


# settings that change what a run costs or keeps, or when it ends, not what it computes: these may differ after --resume
MAY_CHANGE = (
    "out max_rows cache_tokens micro_tokens chunk_tokens recompute device shard_ranks offload timeout_minutes "
    "resume checkpoint_minutes max_skipped steps epochs"
).split()
TINY_FILES = {name: str(HERE / f"data/tiny/{file}") for name, file in
              (("model", "base"), ("data", "train.jsonl"), ("eval_data", "test.jsonl"))}  # fmt: skip
TINY = TINY_FILES | dict(
    steps=60, problems_per_step=16, sft_fraction=0.0,
    max_new_tokens=32, eval_max_new_tokens=32, eval_guided=True, max_rows=1024, recompute=False,
    learning_rate=1.5e-4, lr_warmup_steps=5, lr_decay="linear", weight_decay=0.0, sft_learning_rate=3e-4,
)  # fmt: skip
HELP_GROUPS = {  # the first setting of each group in --help
    "method": "method", "group_auto": "sampling", "aggregate": "policy loss", "delta": "distillation",
    "distill": "ablations of sgpo", "hpt_gate": "hpt", "problems_per_step": "update", "model": "files and seeds",
    "epochs": "schedule", "lora_rank": "adapters", "sft_fraction": "supervised stage", "eval_every": "evaluation",
    "recompute": "machine", "resume": "crashes",
}  # fmt: skip
# published comparisons of LoRA with full training find its best rate at about ten times the other, in SFT and in RL
LORA_RATE = 10
LORA_RATES = ("learning_rate", "sft_learning_rate")
STARTER = dict(data=str(HERE / "data/starter/train.jsonl"), eval_data=str(HERE / "data/starter/test.jsonl"))
FIRST_RUN = dict(sft_epochs=1.0, max_new_tokens=1024, problems_per_step=16, eval_limit=64, eval_max_new_tokens=1024)


def parse_config(argv: Sequence[str] | None) -> Config:
    """Flags -> Config. A flag beats a preset, and a preset the default. Unknown flags and impossible values end the program."""
    also = "--plan [--gpus 8] [--gpu H100]: print the memory and time that the run would need, and do nothing else. "
    also += "Without --model the tiny world has smaller settings of its own; a run prints those that it takes"
    about, usage = __doc__.splitlines()[0], "python train.py [flags]"
    parser = argparse.ArgumentParser(usage=usage, description=about, epilog=also, allow_abbrev=False)
    group = parser
    for spec in dataclasses.fields(Config):
        if spec.name in HELP_GROUPS:
            group = parser.add_argument_group(HELP_GROUPS[spec.name])
        tiny = f"; tiny world: {TINY[spec.name]!r}" if spec.name in TINY and spec.name not in TINY_FILES else ""
        text = f"{spec.metadata['help']} (default: {spec.default!r}{tiny})".replace("%", "%%")
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        if spec.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": spec.type, "choices": spec.metadata["choices"]}
        group.add_argument(f"--{spec.name}", **options)
    parser.add_argument("--preset", choices=["first_run"], help="short warm-up and responses, few problems; flags beat it")
    given = vars(parser.parse_args(argv))
    named = FIRST_RUN if given.pop("preset") else {}
    preset = TINY if not given.get("model") else STARTER if not given.get("data") else {}
    if given.get("data"):
        preset = {name: value for name, value in preset.items() if name not in ("data", "eval_data")}
    preset, asked = preset | named, named | given
    if given.get("resume"):
        out = given.get("out", "")
        try:
            stored = stored_config(Path(out)) if out else None
        except ValueError as error:
            parser.error(f"--resume: {error}")
        if stored is None and (not out or asked.keys() <= set(MAY_CHANGE)):
            parser.error(f"--resume: --out {out} holds no run to go on with, nor are there settings and --out of a new one")
        if stored is not None:
            fixed = {name: value for name, value in asked.items() if name not in MAY_CHANGE}
            changed = differences({name: stored.get(name) for name in fixed}, fixed)
            if changed:
                parser.error("\n".join([f"--resume: {out} holds a run with other settings", *changed]))
            preset = asked = stored
    try:
        cfg = Config(**{**preset, **given})
    except ValueError as error:
        parser.error(f"--{error}")
    except TypeError as error:  # a stored setting that this version does not have
        parser.error(f"--resume: {out} holds a run of another version of this code: {error}")
    for name in given.keys() & idle_flags(cfg):
        parser.error(f"--{name} does nothing to {cfg.method} with --weight {cfg.weight} and --lora_rank {cfg.lora_rank}")
    derived: dict[str, Any] = {}
    for name in set(LORA_RATES) - asked.keys() if cfg.lora_rank else ():
        derived[name] = float(f"{LORA_RATE * getattr(cfg, name):.6g}")  # 1e-05, not 9.999999999999999e-06
    for name in ("data_seed", "sampling_seed"):
        if getattr(cfg, name) == -1:
            derived[name] = cfg.seed
    if METHODS[cfg.method].demonstrates:
        derived["aggregate"] = "token"
    if not cfg.out:
        derived["out"] = f"runs/{cfg.method}-{datetime.now():%Y%m%d-%H%M%S}"
    return dataclasses.replace(cfg, **derived)


def idle_flags(cfg: Config) -> set[str]:
    """The settings that do nothing to this method with this weight and rank."""
    variant, idle = METHODS[cfg.method], set()
    idle |= set() if variant.distills else {"distill", "target", "weight", "autonomous"}
    idle |= set() if variant.guided else {"shuffle_strategies"}
    idle |= set() if cfg.lora_rank else {"lora_alpha"}
    idle |= set() if cfg.weight == "adaptive" else {"gamma"}
    idle |= {"alpha_0"} if cfg.weight in ("fixed", "group_advantage") else set()
    idle |= {"alpha_max"} if cfg.weight == "fixed" else set()
    return idle | ({"aggregate"} if variant.demonstrates or variant.advantages is None else set())


@dataclass
class Run:
    """What the stages share, and change."""

    cfg: Config
    model: CausalLM
    tokenizer: Any
    optimizer: torch.optim.Optimizer
    worker: MathWorker | UserReward
    folder: RunFolder
    control: Control
    progress: Progress = field(default_factory=Progress)


def say(text: str) -> None:
    """Rank 0 prints a text, above the progress bar."""
    if world()[0] == 0:
        tqdm.write(text)


def steps_left(stage: str, done: int, steps: int) -> Iterable[int]:
    """The steps from `done` on, with a progress bar on rank 0."""
    return tqdm(range(done, steps), stage, steps, initial=done, disable=world()[0] > 0 or None)  # None: without a terminal


def sft_stage(run: Run, examples: Sequence[Example], validation: Sequence[Example]) -> None:
    """Token-mean cross-entropy on the strong model's solutions: the SFT warm-up, and the whole of --method sft. Ends with the
    weights of the lowest loss on the validation examples, measured after each epoch; without such examples with the last."""
    cfg, progress = run.cfg, run.progress
    steps = math.ceil(cfg.sft_epochs * len(examples) / cfg.sft_batch)
    for step in steps_left("sft", progress.sft_steps, steps):
        batch = data_order(examples, step, cfg.sft_batch, cfg.data_seed, "sft")
        batch = my_share(batch, [len(example.solution_ids) for _, example in batch])
        learning_rate = learning_rate_at(cfg.sft_learning_rate, step, steps, round(cfg.sft_warmup_ratio * steps), "linear")
        scale = loss_scale(run.optimizer)
        loss = sft_loss(run, [sft_pair(example, step, place, cfg) for place, example in batch])
        norm = apply_gradients(run.model, run.optimizer, loss, learning_rate, cfg.max_grad_norm)
        metrics = {"loss": loss, "grad_norm": norm, "learning_rate": learning_rate, "loss_scale": loss_scale(run.optimizer)}
        overflow = metrics["loss_scale"] < scale
        progress.count_skipped(not (overflow or may_step(loss, norm)), cfg.max_skipped)
        run.folder.log({"stage": "sft", "step": step + 1, **metrics})
        left_out = f": overflow, loss scale {metrics['loss_scale']:g}" if overflow else ""
        say(f"sft {step + 1:>4}/{steps}  loss {loss:.4f}  grad norm {norm:.2f}{left_out}")
        progress.sft_steps = step + 1
        last, epoch = step + 1 == steps, (step + 1) * cfg.sft_batch // len(examples)
        if validation and (last or epoch > step * cfg.sft_batch // len(examples)):
            validate_sft(run, validation, cfg.sft_epochs if last else float(epoch))
        if last and 0 < progress.best_step < steps:
            run.folder.load_best(run.model, progress.best_step)
        after_step(run, always=last)


def validate_sft(run: Run, examples: Sequence[Example], epoch: float) -> None:
    """Log the loss on the examples. If it is the lowest so far, keep the weights on disk."""
    progress = run.progress
    mine = my_share(list(enumerate(examples)), [len(example.solution_ids) for example in examples])
    with torch.no_grad():  # step -1: with --sft_guided an example has the same prompt every time
        loss = sft_loss(run, [sft_pair(example, -1, place, run.cfg) for place, example in mine])
    run.folder.log({"stage": "sft_validation", "epoch": epoch, "step": progress.sft_steps, "loss": loss})
    lowest = loss < progress.best_loss
    say(f"sft validation after epoch {epoch:g}: loss {loss:.4f}{', the lowest so far' if lowest else ''}")
    if lowest:
        progress.best_loss, progress.best_step = loss, progress.sft_steps
        run.folder.save(run.model, run.optimizer, progress)


def sft_pair(example: Example, step: int, place: int, cfg: Config) -> tuple[list[int], list[int]]:
    """(prompt, response) of one SFT example. A share sft_guided, drawn anew each time, has the strategy in the prompt."""
    draw = stream_seed(cfg.data_seed, "sft guided", step, place) / 2**63
    return (example.guided_ids if draw < cfg.sft_guided else example.auto_ids), example.solution_ids


def sft_loss(run: Run, pairs: Sequence[tuple[list[int], list[int]]]) -> float:
    """Cross-entropy in nats per response token, over the pairs of all ranks. Accumulates its gradient if gradients are on."""
    cfg, device, total = run.cfg, run.model.device, 0.0
    tokens = all_reduce({"tokens": sum(len(response) for _, response in pairs)}, device)["tokens"]  # of all ranks
    costs = [len(context) + len(response) for context, response in pairs]
    for indices in pad_micro_batches(micro_batches(costs, cfg.micro_tokens), device):
        contexts, responses = zip(*([pairs[i] for i in indices] or [([0], [0])]), strict=True)
        packed = pack(contexts, responses, device=device)
        weight = torch.full(packed.targets.shape, 1 / tokens if indices else 0.0, device=device)
        head = partial(
            chunked_head,
            terms=partial(sft_terms, temperature=1.0),  # not RL's: SFT learns the text as it is
            inputs=(packed.targets, weight),
            at=packed.predict,
            chunk_tokens=cfg.chunk_tokens,
            loss_scale=loss_scale(run.optimizer),
        )
        loss, _ = run.model(**packed.layout, head=head)
        if torch.is_grad_enabled():
            loss.backward()
        total += loss.item()
    return all_reduce({"loss": total}, device)["loss"]


def rl_stage(run: Run, examples: Sequence[Example], held_out: Sequence[Example]) -> None:
    """All steps of a sampling method, with the periodic evaluation."""
    cfg, progress = run.cfg, run.progress
    steps = rl_length(cfg, examples)
    if progress.rl_length not in (0, steps):
        rate = learning_rate_at(cfg.learning_rate, progress.rl_steps, steps, cfg.lr_warmup_steps, cfg.lr_decay)
        say(f"{steps} RL steps and no longer {progress.rl_length}: the learning rate goes on at {rate:.3g} ({cfg.lr_decay})")
    progress.rl_length = steps
    for step in steps_left(cfg.method, progress.rl_steps, steps):
        if cfg.eval_every and step and step % cfg.eval_every == 0:
            evaluate_as(run, held_out, f"step {step}", step, ["alone"])
        batch = data_order(examples, step, cfg.problems_per_step, cfg.data_seed, "rl")
        batch = my_share(batch, [expected_length(example.problem) for _, example in batch])
        learning_rate = learning_rate_at(cfg.learning_rate, step, steps, cfg.lr_warmup_steps, cfg.lr_decay)
        metrics = rl_step(run, batch, step + 1, learning_rate)
        run.folder.log({"stage": cfg.method, **metrics})
        say(step_line(cfg.method, metrics, steps))
        progress.rl_steps = step + 1
        progress.table.pop(f"after {cfg.method}", None)  # of a run that is made longer
        after_step(run, always=step + 1 == steps)


def rl_length(cfg: Config, examples: Sequence[Example]) -> int:
    """The number of RL steps, in all; 0 without examples."""
    return (cfg.steps or math.ceil(cfg.epochs * len(examples) / cfg.problems_per_step)) if examples else 0


def rl_step(run: Run, batch: Sequence[tuple[int, Example]], step: int, learning_rate: float) -> dict[str, float]:
    """sgpo_step and what a run adds to it: signals, more metrics, and samples.jsonl. Returns the metrics."""
    start, timeouts = time.perf_counter(), run.worker.timeouts
    metrics, samples = sgpo_step(
        run.model, run.tokenizer, run.optimizer, run.cfg, batch, run.worker.reward,
        step=step, learning_rate=learning_rate, ragged=run.control.preemptible,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    run.progress.count_skipped(int(metrics.pop("not_finite")), run.cfg.max_skipped)
    metrics |= {"step": step, "learning_rate": learning_rate, "skipped": run.progress.skipped}
    metrics |= all_reduce({"grader_timeouts": run.worker.timeouts - timeouts}, run.model.device)
    for sample in samples[:1]:  # rank 0 has the batch's first problem
        run.folder.log(*responses_of(sample, step, run.tokenizer), name="samples.jsonl")
    return metrics | {"step_s": seconds, "tokens_per_s": metrics["sampled_tokens"] / seconds}


def learning_rate_at(peak: float, step: int, steps: int, warmup: int, decay: str) -> float:
    """Linear warm-up to the peak, then constant or linear decay to zero after the last step. Steps count from 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak if decay == "constant" else peak * (steps - step) / max(steps - warmup, 1)


def after_step(run: Run, *, always: bool) -> None:
    """Write a checkpoint if one is due by rank 0's clock, or always. Preempted if a signal came to any rank."""
    every = 60 * run.cfg.checkpoint_minutes  # inf: not even `always`
    due = world()[0] == 0 and (time.monotonic() - run.folder.saved_at >= every or (always and every < math.inf))
    asked = run.control.barrier(2 if run.control.stop_asked else int(due))
    if asked == 2:
        raise Preempted
    if asked == 1:
        run.folder.save(run.model, run.optimizer, run.progress)


def evaluate_as(run: Run, held_out: Sequence[Example], when: str, step: int, kinds: Sequence[str]) -> None:
    """Measure, log and say the held-out accuracy, unless the run did so before it was stopped."""
    if not held_out:
        return
    measured = run.progress.table.setdefault(when, {})
    for kind in kinds:
        if kind not in measured:
            measured[kind] = measure(run, held_out, guided=kind == "guided")
            run.folder.log({"stage": "eval", "when": when, "step": step, **measured[kind]})
            say(f"eval {when}, {kind}: accuracy {plus_minus(measured[kind])}")


def measure(run: Run, held_out: Sequence[Example], *, guided: bool) -> dict[str, Any]:
    """Held-out accuracy over all ranks."""
    cfg, problems = run.cfg, [example.problem for example in held_out]
    prompts = [example.guided_ids if guided else example.auto_ids for example in held_out]
    seed = stream_seed(cfg.seed, "eval") % 2**31  # the same draws at every evaluation, on any number of ranks
    with whole_model(run.model) as policy:
        figures = evaluate(
            policy, run.tokenizer, problems, prompts, ragged=run.control.preemptible, n=cfg.eval_n, seed=seed,
            max_new_tokens=cfg.eval_max_new_tokens, temperature=cfg.eval_temperature, top_p=cfg.eval_top_p,
            worker=run.worker, correct_at=cfg.correct_at, max_rows=cfg.max_rows, cache_tokens=cfg.cache_tokens or None,
            progress=("guided" if guided else "auto") if world()[0] == 0 else None,
        )  # fmt: skip
    return {"guided": guided} | {name: value for name, value in figures.items() if name != "correct"}  # a number per problem


def show(run: Run, example: Example, when: str) -> None:
    """Rank 0 prints one response alone and, if the run has guided prompts, one guided, at the evaluation's settings."""
    cfg, problem = run.cfg, example.problem
    prompts = {"alone": example.auto_ids, "guided": example.guided_ids}
    prompts = {name: ids for name, ids in prompts.items() if ids}

    def work() -> None:
        seeds = [stream_seed(cfg.seed, "show")] * len(prompts)
        _, graded = sample_and_grade(
            policy, run.tokenizer, [*prompts.values()], lambda row, member, text: (text, run.worker.reward(text, problem)),
            n=1, seed=seeds, max_new_tokens=cfg.eval_max_new_tokens, temperature=cfg.eval_temperature, top_p=cfg.eval_top_p,
        )  # fmt: skip
        tqdm.write(f"\n[{when}] {problem.problem}   (answer {problem.answer})")
        for kind, ((text, reward),) in zip(prompts, graded, strict=True):
            tqdm.write(f"  {kind:>6} (reward {reward:g}): {text}")

    with whole_model(run.model) as policy:
        run.control.preemptible(work if world()[0] == 0 else lambda: None)


def prepare(cfg: Config, device: torch.device, worker: MathWorker | UserReward) -> tuple[Run, list[Example], list[Example]]:
    """(run, training examples, held-out ones): load and check everything that a run needs. ValueError for what is wrong."""
    problems = load_problems(cfg.data, worker)
    unseen = load_problems(cfg.eval_data, worker)[: cfg.eval_limit or None] if cfg.eval_data else []
    origin = origin_of({"data": cfg.data, "eval_data": cfg.eval_data})
    template = load_template(cfg.template)
    model_folder = resolve_model(cfg.model)
    model, tokenizer = blank_model(model_folder)
    examples = encode_examples(problems, tokenizer, cfg, model.config.eos_ids[0], template)
    held_out = encode_rows(unseen, tokenizer, guided=cfg.eval_guided, file=cfg.eval_data, template=template)
    check_rows(examples, held_out, cfg, model.config.max_position_embeddings)
    inputs = {"model": [model.config.raw, model.config.generation]}
    for name, rows in ("prompts", examples), ("eval_prompts", held_out):
        inputs[name] = [(row.auto_ids, row.guided_ids, row.solution_ids) for row in rows]
    origin["data"] |= digests(tokenizer, **inputs)
    dtype = compute_dtype(cfg.dtype, device)
    if cfg.lora_rank:
        add_adapters(model, rank=cfg.lora_rank, alpha=cfg.lora_alpha, dtype=dtype)
    shard(model, device=device, dtype=dtype, shard_ranks=cfg.shard_ranks, offload=cfg.offload)
    adapters = initial_adapters(model, torch.Generator().manual_seed(stream_seed(cfg.seed, "adapters")))
    load_sharded(model, model_folder, device=device, offload=cfg.offload, adapters=adapters)
    if cfg.lora_rank:  # the checkpoints do not hold the frozen weights
        files = sorted(model_folder.glob("model*.safetensors"))
        origin["data"] |= origin_of({f"base/{file.name}": str(file) for file in files})["data"]
    optimizer = torch.optim.AdamW(trained(model).values(), lr=cfg.learning_rate, weight_decay=cfg.weight_decay, fused=True)
    if cfg.dtype == "float16":
        optimizer.param_groups[0]["loss_scale"] = FIRST_SCALE
    folder = RunFolder(Path(cfg.out), dataclasses.asdict(cfg), origin)
    cfg = settle_update(cfg, model, examples)
    model.model.recompute = cfg.recompute
    return Run(cfg, model, tokenizer, optimizer, worker, folder, Control(cfg.timeout_minutes)), examples, held_out


def settle_update(cfg: Config, model: CausalLM, examples: Sequence[Example]) -> Config:
    """With values for --micro_tokens 0 and --chunk_tokens 0, from the memory that is free on every rank."""
    from tools import plan

    assumed, cuda = plan.Assumptions(), model.device.type == "cuda"
    if cuda:
        local = torch.cuda.mem_get_info(model.device)[0] + torch.cuda.memory_reserved(model.device)
        memory = all_reduce({"memory": local}, model.device, dist.ReduceOp.MIN)["memory"] / 1e9
        names = dict(prompt_tokens="auto_ids", guided_prompt_tokens="guided_ids", solution_tokens="solution_ids")
        longest = {name: max(len(getattr(row, ids) or [1]) for row in examples) for name, ids in names.items()}
        assumed = dataclasses.replace(assumed, gpu_memory=memory, **longest)
    settled = plan.settle(plan.Job(plan.Shape(model.config), cfg, world()[1], assumed, cuda)).settings
    if cuda:
        say(f"update: {plan.passes_text(settled)}")
    return settled


def train(cfg: Config, device: torch.device) -> None:
    """Check everything, then run. SIGTERM and Ctrl-C end the run with a checkpoint."""
    with grader_of(cfg.reward, cfg.reward_timeout) as worker:
        try:
            run, examples, held_out = prepare(cfg, device, worker)
            context = run.model.config.max_position_embeddings
            for_sft, validation, for_rl, notes = split_examples(examples, cfg, context)
            run.folder.open(say, resume=cfg.resume)
            machine = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
            steps = rl_length(cfg, for_rl)
            run.progress = run.folder.begin(run.model, run.optimizer, machine, say, steps=steps, resume=cfg.resume)
            if run.progress is None:
                run.folder.close()
                return say(f"--resume: {cfg.out} is finished; more --steps or --epochs go on from its last whole checkpoint")
        except ValueError as error:
            sys.exit(f"error: {error}")
        usual = dataclasses.asdict(Config(data_seed=cfg.seed, sampling_seed=cfg.seed))
        chosen = {name: value for name, value in dataclasses.asdict(cfg).items() if value != usual[name]}
        say("\n".join(f"{name:>18}  {value}" for name, value in chosen.items()) + "\nall others as in --help")
        split = f"{len(for_sft)} problems for SFT and {len(validation)} for its validation, {len(for_rl)} for {cfg.method}"
        notes += [f"{split}, {len(held_out)} held out", most_sampled(cfg, context, len(held_out))]
        if cfg.lora_rank:
            rates = " and ".join(f"--{name} {getattr(cfg, name):g}" for name in LORA_RATES)
            notes.append(f"adapters of rank {cfg.lora_rank}: {rates}, by default {LORA_RATE} times those of full training")
        say("\n".join(notes))
        with run.control.catch_signals():
            try:
                stages(run, for_sft, validation, for_rl, held_out)
            except Preempted as stop:
                run.folder.save(run.model, run.optimizer, run.progress)
                say(f"stopped: a checkpoint is in {run.folder.out / 'checkpoints'}; the same command with --resume goes on")
                if stop.__cause__ is not None:
                    raise stop.__cause__ from None
            finally:
                run.folder.close()


def stages(run: Run, for_sft: list[Example], validation: list[Example], for_rl: list[Example], held_out: list[Example]) -> None:
    """Warm-up, RL, the evaluations between, and the model folder at the end. Skips what the progress says is done."""
    cfg, progress = run.cfg, run.progress
    kinds = ["alone", "guided"] if cfg.eval_guided else ["alone"]
    shown = (held_out or for_rl or for_sft)[0]
    if progress == Progress():
        show(run, shown, "before")
    evaluate_as(run, held_out, "base", 0, kinds)
    if for_sft:
        sft_stage(run, for_sft, validation)
        evaluate_as(run, held_out, "after SFT", 0, kinds)
    if for_rl:
        if progress.rl_steps == 0:
            run.optimizer.state.clear()  # RL starts with fresh moments: SFT's are of another loss and scale
        rl_stage(run, for_rl, held_out)
        evaluate_as(run, held_out, f"after {cfg.method}", progress.rl_steps, kinds)
    show(run, shown, "after")
    gathered = model_on_host(run.model, compute_dtype(cfg.dtype, run.model.device))  # in the dtype it sampled in
    adapters = {name: whole_tensor(weight.detach()).cpu() for name, weight in trained(run.model).items() if cfg.lora_rank}
    if gathered is not None:
        part = run.folder.out / "model.part"
        shutil.rmtree(part, ignore_errors=True)
        save_model(gathered, run.tokenizer, part)
        if adapters:
            base = str(Path(cfg.model).resolve()) if Path(cfg.model).is_dir() else cfg.model
            save_adapters(adapters, part / "adapter", rank=cfg.lora_rank, alpha=cfg.lora_alpha, base=base)
        part.rename(run.folder.out / "model")  # so a folder `model` is always whole, and its run finished
        saved = run.folder.out / "checkpoints"
        size = sum(file.stat().st_size for file in saved.rglob("*")) / 1e9
        tqdm.write(accuracy_table(progress.table) + f"\nmodel saved in {run.folder.out / 'model'}")
        tqdm.write(f"{saved} takes {size:.2f} GB; only a run that is to be made longer still needs it")


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if "--plan" in argv:
        from tools import plan

        return plan.main(argv, parse_config)
    cfg = parse_config(argv)
    try:
        with ranks_of(cfg.device, cfg.timeout_minutes) as device:
            train(cfg, device)
    except KeyboardInterrupt:  # before training, or while a checkpoint was written
        sys.exit("stopped by Ctrl-C")
    except (CheckpointError, NotFinite, RankLost, RewardError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
    leave()
