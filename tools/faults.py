"""Break a training run in every way that a machine can, let it resume, and compare it with one that was left alone.

    python tools/faults.py --out runs/faults --log results/faults.txt        30 kills and the rest, on one and on two ranks
    python tools/faults.py --out runs/faults --log x.txt --ranks 2 --kills 1 --steps 50

One run of the tiny world writes a checkpoint after every step. All of this happens to it, in random order, and each time it is
started again with --resume:

    kill         SIGKILL to all processes at a random moment
    torn         SIGKILL while a checkpoint is being written
    full-disk    no file may grow beyond 1 MB, less than a checkpoint needs
    flipped      one bit of the newest checkpoint is changed on the disk, at a random place
    cut          a file of the newest checkpoint loses its second half
    terminated   SIGTERM at a random moment: a checkpoint, and exit status 0
    lost-rank    SIGKILL to one of two ranks: the other one ends by itself, and says why

In the end weights, moments, metrics and samples must be those of the other run, bit for bit (except for times). Every event
goes to the log, with what the run said about it. Exit status 1 if anything went wrong. Linux only. It starts processes and
imports nothing of ours.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import safetensors

HERE = Path(__file__).resolve().parent.parent
TIMES = ("sampling_s", "step_s", "tokens_per_s")  # the only metrics that may differ
NOTHING = "it said nothing about it"
PATIENCE = 300  # seconds after which a process that should have ended, or have written something, counts as hanging


@dataclass
class Trial:
    """One run under attack."""

    out: Path
    ranks: int
    steps: int
    draw: random.Random
    log: TextIO
    faults: int = 0  # things that were not as they should be
    begin: int = 0  # bytes that earlier starts have said

    def say(self, text: str, *, wrong: bool = False) -> None:
        self.faults += wrong
        line = f"{time.strftime('%H:%M:%S')} {self.ranks} rank{'s' * (self.ranks > 1)}: {'WRONG: ' * wrong}{text}"
        print(line, flush=True)
        self.log.write(line + "\n")
        self.log.flush()

    def start(self, out: Path) -> subprocess.Popen:
        """Start the run or resume it, in a process group of its own. What it says goes to a file beside its folder."""
        launcher = [sys.executable]
        if self.ranks > 1:
            launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={self.ranks}", "--standalone"]
        flags = f"--device cpu --steps {self.steps} --problems_per_step 4 --minibatches 2 --eval_limit 4 --eval_every 4"
        flags += " --sft_fraction 0.03 --sft_batch 6 --sft_epochs 2 --sft_validation 0.2 --checkpoint_minutes 0 --resume"
        with open(f"{out}.said", "ab") as said:
            self.begin = said.tell()
            command = [*launcher, str(HERE / "train.py"), *flags.split(), "--out", str(out)]
            settings = os.environ | {"OMP_NUM_THREADS": "1"}
            return subprocess.Popen(command, stdout=said, stderr=said, env=settings, start_new_session=True)

    def said(self) -> str:
        """What the run has said since its last start."""
        return Path(f"{self.out}.said").read_bytes()[self.begin :].decode(errors="replace")

    def checkpoints(self) -> list[Path]:
        return sorted(path for path in (self.out / "checkpoints").glob("step-*") if path.suffix != ".part")

    def progress(self) -> str:
        """How far the run is, in words."""
        path = self.out / "metrics.jsonl"
        lines = path.read_text(errors="replace").count("\n") if path.exists() else 0
        newest = self.checkpoints()[-1:]
        return f"{lines} lines of metrics, newest checkpoint {newest[0].name if newest else 'none'}"


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL to launcher, ranks and graders alike. Each rank has a session of its own and would outlive the launcher, so the
    launcher is stopped first and asked for its children."""
    if process.poll() is None:
        os.kill(process.pid, signal.SIGSTOP)
        for leader in (*children_of(process), process.pid):
            with suppress(ProcessLookupError):  # a grader, which is in its parent's group
                os.killpg(leader, signal.SIGKILL)
    process.wait()


def wait_until(condition: Callable[[], Any], process: subprocess.Popen) -> bool:
    """Whether the condition came true before the process ended or PATIENCE was over."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        if condition():
            return True
        time.sleep(0.001)
    return bool(condition())


def start_to_checkpoint(trial: Trial, count: int = 1) -> subprocess.Popen:
    """Start the run, and wait until it has written this many more checkpoints."""
    process = trial.start(trial.out)
    for _ in range(count):
        before = trial.checkpoints()
        if not wait_until(lambda before=before: trial.checkpoints() != before, process):
            trial.say(f"no new checkpoint came ({tail(trial.said())})", wrong=True)
    return process


def kill(trial: Trial, seconds: float) -> None:
    wait = trial.draw.uniform(0.3, 1) * seconds
    process = trial.start(trial.out)
    time.sleep(wait)
    kill_all(process)
    by_itself = process.returncode != -signal.SIGKILL
    trial.say(f"kill after {wait:.1f} s{', it had ended by itself' * by_itself}: {trial.progress()}", wrong=by_itself)


def torn(trial: Trial) -> None:
    def parts() -> set[Path]:
        return set(trial.out.glob("checkpoints/*.part/*"))

    before = parts()
    process = trial.start(trial.out)
    seen = wait_until(lambda: parts() - before, process)
    time.sleep(trial.draw.uniform(0, 0.01))
    kill_all(process)
    left = [path.name for path in trial.out.glob("checkpoints/*.part")]
    trial.say(f"torn: killed while a checkpoint was written, left: {left or 'nothing, it was just complete'}", wrong=not seen)


def full_disk(trial: Trial) -> None:
    """With a limit on the size of files: unlike a small file system it needs no right to mount."""
    process = trial.start(trial.out)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))  # its ranks inherit it
    status = process.wait(PATIENCE)
    said = trial.said()
    text = f"full-disk: files of at most 1 MB: exit status {status}, {tail(said, 'rror')}; {trial.progress()}"
    trial.say(text, wrong=not status or "File too large" not in said)


def harm(trial: Trial, kind: str) -> None:
    """Change the newest checkpoint on the disk; the next start must name it and take the one before."""
    kill_all(start_to_checkpoint(trial, 2))
    newest = trial.checkpoints()[-1]
    file = trial.draw.choice(sorted(newest.iterdir()))
    content = bytearray(file.read_bytes())
    if kind == "cut":
        content = content[: len(content) // 2]
    else:
        content[trial.draw.randrange(len(content))] ^= 1 << trial.draw.randrange(8)
    file.write_bytes(content)
    process = trial.start(trial.out)
    wait_until(lambda: "resumed:" in trial.said() or "nothing to resume" in trial.said(), process)
    kill_all(process)
    said = trial.said()
    noticed = "a damaged checkpoint is skipped" in said and newest.name in said
    trial.say(f"{kind}: {newest.name}/{file.name}; {tail(said, 'is skipped')}; {tail(said, 'resumed')}", wrong=not noticed)


def send(trial: Trial, kind: str) -> None:
    """A signal at a random moment: SIGTERM to all ranks, or SIGKILL to one of two."""
    process = start_to_checkpoint(trial)
    time.sleep(trial.draw.uniform(0, 1))
    sent = time.monotonic()
    ranks = ranks_of(process, trial.ranks)
    trial.draw.shuffle(ranks)
    all_of_them = kind == "terminated"
    for rank in ranks if all_of_them else ranks[:1]:
        os.kill(rank, signal.SIGTERM if all_of_them else signal.SIGKILL)
    status = process.wait(PATIENCE)
    reason = tail(trial.said(), "stopped: a checkpoint is in" if all_of_them else "error: rank")
    text = f"{kind}: exit status {status} after {time.monotonic() - sent:.1f} s; {reason}; {trial.progress()}"
    trial.say(text, wrong=reason == NOTHING or (status == 0) != all_of_them)


def ranks_of(process: subprocess.Popen, ranks: int) -> list[int]:
    """The process ids of the ranks that live: the launcher's children, or the process itself if there is no launcher."""
    if ranks == 1:
        return [process.pid] * (process.poll() is None)
    return [child for child in children_of(process) if b"train.py" in Path(f"/proc/{child}/cmdline").read_bytes()]


def children_of(process: subprocess.Popen) -> list[int]:
    return [int(child) for path in Path(f"/proc/{process.pid}/task").glob("*/children") for child in path.read_text().split()]


def tail(said: str, word: str = "") -> str:
    """The last line with the word in it, shortened."""
    lines = [line.strip() for line in said.splitlines() if word in line and line.strip()]
    return lines[-1][:300] if lines else NOTHING


def attack(trial: Trial, kills: int, reference: Path) -> None:
    """All faults in random order, then the run to its end, then the comparison."""
    shutil.rmtree(trial.out, ignore_errors=True)
    began = time.monotonic()
    kill_all(start_to_checkpoint(trial))
    seconds = 1.35 * (time.monotonic() - began)  # so that kills come before and after the first checkpoint of a start
    trial.say(f"a start takes {seconds / 1.35:.1f} s to its first step; kills come within {seconds:.1f} s")
    events = [partial(kill, seconds=seconds)] * kills + [torn, full_disk, partial(send, kind="terminated")]
    events += [partial(harm, kind="flipped"), partial(harm, kind="cut")]
    events += [partial(send, kind="lost-rank")] * (trial.ranks > 1)
    trial.draw.shuffle(events)
    for event in events:
        if (trial.out / "model").exists():
            trial.say("the run was finished before the last fault: it needs more --steps", wrong=True)
            break
        event(trial)
    status = trial.start(trial.out).wait(PATIENCE)
    trial.say(f"left alone to its end: exit status {status}; {trial.progress()}", wrong=status != 0)
    compare(trial, reference)


def compare(trial: Trial, reference: Path) -> None:
    """Say for each part whether it equals that of the run that was left alone."""
    newest = sorted((reference / "checkpoints").iterdir())[-1]
    files = ["model/model.safetensors", "samples.jsonl"]
    files += [f"checkpoints/{newest.name}/{file.name}" for file in sorted(newest.glob("*.safetensors"))]
    for name in files:
        read = tensors if name.endswith(".safetensors") else Path.read_bytes
        same = (trial.out / name).exists() and read(reference / name) == read(trial.out / name)
        trial.say(f"{name}: {'the same, bit for bit' if same else 'differs'}", wrong=not same)
    same = metrics(reference) == metrics(trial.out)
    trial.say(f"metrics.jsonl: {'the same but for the times' if same else 'differs'}; {trial.progress()}", wrong=not same)


def tensors(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file by name, as shape, dtype and bytes: their order in it is not the same in two runs."""
    return dict(safetensors.deserialize(path.read_bytes()))


def metrics(out: Path) -> list[dict[str, Any]]:
    """The records without times, and without the settings in the first, which name the folder."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in (*TIMES, "config")} for record in records]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs; its earlier runs are removed")
    parser.add_argument("--log", type=Path, required=True, help="file for the events; an earlier one is replaced")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks, a trial each (default: 1 2)")
    parser.add_argument("--kills", type=int, default=30, help="kills at random moments in each trial (default: 30)")
    parser.add_argument("--steps", type=int, default=200, help="RL steps of the run: enough for all faults (default: 200)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.log.parent.mkdir(parents=True, exist_ok=True)
    faults = 0
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True)
    with args.log.open("w", encoding="utf-8") as log:
        log.write(f"python {' '.join(sys.argv)}\ncommit {git.stdout.strip()}, {os.cpu_count()} cores\n")
        for ranks in args.ranks:
            reference = args.out / f"{ranks}-alone"
            shutil.rmtree(reference, ignore_errors=True)
            trial = Trial(args.out / f"{ranks}-attacked", ranks, args.steps, random.Random(ranks), log)
            status = trial.start(reference).wait()
            trial.say(f"the run that is left alone: exit status {status}", wrong=status != 0)
            attack(trial, args.kills, reference)
            faults += trial.faults
        log.write(f"{faults or 'nothing'} wrong\n")
    print(f"{faults or 'nothing'} wrong")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
