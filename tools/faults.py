"""Break a training run in every way that a machine can, let it resume, and compare it with one that was left alone.

    python tools/faults.py --out runs/faults --log results/faults.txt        30 kills and the rest, on one and on two ranks
    python tools/faults.py --out runs/faults --log x.txt --ranks 2 --kills 1 --also lost-rank --steps 25

One run of the tiny world writes a checkpoint after every step. All of this happens to it, in an order drawn by --seed, and each
time it is started again with --resume:

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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import safetensors

HERE = Path(__file__).resolve().parent.parent
TIMES = ("sampling_s", "step_s", "tokens_per_s")  # the only metrics that may differ
ONCE = ("torn", "full-disk", "flipped", "cut", "terminated", "lost-rank")
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

    def say(self, text: str, *, wrong: bool = False) -> None:
        self.faults += wrong
        line = f"{time.strftime('%H:%M:%S')} {self.ranks} rank{'s' * (self.ranks > 1)}: {'WRONG: ' * wrong}{text}"
        print(line, flush=True)
        self.log.write(line + "\n")
        self.log.flush()

    def start(self, out: Path, *, file_bytes: int = resource.RLIM_INFINITY) -> subprocess.Popen:
        """Start the run or resume it, in a process group of its own. What it says goes to a file beside its folder."""
        launcher = [sys.executable]
        if self.ranks > 1:
            launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={self.ranks}", "--standalone"]
        flags = f"--device cpu --steps {self.steps} --problems_per_step 4 --minibatches 2 --eval_limit 4 --eval_every 4"
        flags += " --sft_fraction 0.03 --sft_batch 6 --sft_epochs 2 --sft_validation 0.2 --checkpoint_minutes 0 --resume"
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
        with open(f"{out}.said", "ab") as said:
            command = [*launcher, str(HERE / "train.py"), *flags.split(), "--out", str(out)]
            settings = os.environ | {"OMP_NUM_THREADS": "1"}
            return subprocess.Popen(command, stdout=said, stderr=said, env=settings, start_new_session=True, preexec_fn=limit)

    def said(self, since: int = 0) -> str:
        return Path(f"{self.out}.said").read_text(errors="replace")[since:]

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
            try:
                os.killpg(leader, signal.SIGKILL)
            except ProcessLookupError:  # a grader, which is in its parent's group
                pass
    process.wait()


def wait_until(condition, process: subprocess.Popen) -> bool:
    """Whether the condition came true before the process ended or PATIENCE was over."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        if condition():
            return True
        time.sleep(0.001)
    return bool(condition())


def wait_for_a_checkpoint(trial: Trial, process: subprocess.Popen, text: str) -> None:
    """Wait until the run has written one more checkpoint."""
    before = trial.checkpoints()
    if not wait_until(lambda: trial.checkpoints() != before, process) and process.poll() != 0:
        trial.say(f"{text}: no new checkpoint came ({tail(trial.said())})", wrong=True)


def kill(trial: Trial, seconds: float) -> None:
    process = trial.start(trial.out)
    wait = trial.draw.uniform(0.3, 1) * seconds
    try:
        process.wait(wait)
        trial.say(f"kill: the run ended by itself within {wait:.1f} s, exit status {process.returncode}")
    except subprocess.TimeoutExpired:
        kill_all(process)
        trial.say(f"kill after {wait:.1f} s: {trial.progress()}")


def torn(trial: Trial) -> None:
    began, process = time.time(), trial.start(trial.out)
    seen = wait_until(lambda: any(modified(path) > began for path in trial.out.glob("checkpoints/*.part/*")), process)
    time.sleep(trial.draw.uniform(0, 0.01))
    kill_all(process)
    left = [path.name for path in trial.out.glob("checkpoints/*.part")]
    trial.say(f"torn: killed while a checkpoint was written, left: {left or 'nothing, it was just complete'}", wrong=not seen)


def full_disk(trial: Trial) -> None:
    """With a limit on the size of files: unlike a small file system it needs no right to mount."""
    begin = len(trial.said())
    status = trial.start(trial.out, file_bytes=1_000_000).wait(PATIENCE)
    said = trial.said(begin)
    text = f"full-disk: files of at most 1 MB: exit status {status}, {tail(said, 'rror')}; {trial.progress()}"
    trial.say(text, wrong=not status or "File too large" not in said)


def harm(trial: Trial, kind: str) -> None:
    """Change the newest checkpoint on the disk; the next start must name it and take the one before."""
    process = trial.start(trial.out)
    wait_for_a_checkpoint(trial, process, kind)
    wait_for_a_checkpoint(trial, process, kind)
    kill_all(process)
    newest, begin = trial.checkpoints()[-1], len(trial.said())
    file = trial.draw.choice(sorted(newest.iterdir()))
    content = bytearray(file.read_bytes())
    if kind == "cut":
        content = content[: len(content) // 2]
    else:
        content[trial.draw.randrange(len(content))] ^= 1 << trial.draw.randrange(8)
    file.write_bytes(content)
    process = trial.start(trial.out)
    wait_until(lambda: "resumed:" in trial.said(begin) or "nothing to resume" in trial.said(begin), process)
    kill_all(process)
    said = trial.said(begin)
    noticed = "a damaged checkpoint is skipped" in said and newest.name in said
    trial.say(f"{kind}: {newest.name}/{file.name}; {tail(said, 'is skipped')}; {tail(said, 'resumed')}", wrong=not noticed)


def terminated(trial: Trial) -> None:
    process, begin = trial.start(trial.out), len(trial.said())
    wait_for_a_checkpoint(trial, process, "terminated")
    time.sleep(trial.draw.uniform(0, 1))
    sent = time.monotonic()
    for rank in ranks_of(process, trial.ranks):
        os.kill(rank, signal.SIGTERM)
    status = process.wait(PATIENCE)
    said = "stopped: a checkpoint is in" in trial.said(begin) or (trial.out / "model").exists()
    text = f"terminated: exit status {status} after {time.monotonic() - sent:.1f} s; {trial.progress()}"
    trial.say(text, wrong=status != 0 or not said)


def lost_rank(trial: Trial) -> None:
    process, begin = trial.start(trial.out), len(trial.said())
    wait_for_a_checkpoint(trial, process, "lost rank")
    time.sleep(trial.draw.uniform(0, 1))
    sent, ranks = time.monotonic(), ranks_of(process, trial.ranks)
    if not ranks:
        return trial.say(f"lost-rank: left out, the run is finished or ended ({tail(trial.said(begin))})", wrong=True)
    os.kill(trial.draw.choice(ranks), signal.SIGKILL)
    status = process.wait(PATIENCE)
    said = trial.said(begin)
    text = f"lost-rank: exit status {status} after {time.monotonic() - sent:.1f} s; {tail(said, 'error: rank')}"
    trial.say(text, wrong=status == 0 or "error: rank" not in said)


def modified(path: Path) -> float:
    """When a file was last written; 0 if it is gone by now."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def ranks_of(process: subprocess.Popen, ranks: int) -> list[int]:
    """The process ids of the ranks: the launcher's children, or the process itself if there is no launcher."""
    if ranks == 1:
        return [process.pid]
    return [child for child in children_of(process) if b"train.py" in Path(f"/proc/{child}/cmdline").read_bytes()]


def children_of(process: subprocess.Popen) -> list[int]:
    return [int(child) for path in Path(f"/proc/{process.pid}/task").glob("*/children") for child in path.read_text().split()]


def tail(said: str, word: str = "") -> str:
    """The last line with the word in it, shortened."""
    lines = [line.strip() for line in said.splitlines() if word in line and line.strip()]
    return lines[-1][:300] if lines else "it said nothing about it"


def attack(trial: Trial, kills: int, also: list[str], reference: Path) -> None:
    """All faults in random order, then the run to its end, then the comparison."""
    shutil.rmtree(trial.out, ignore_errors=True)
    events = ["kill"] * kills + [event for event in also if event != "lost-rank" or trial.ranks > 1]
    trial.draw.shuffle(events)
    began = time.monotonic()
    process = trial.start(trial.out)
    wait_for_a_checkpoint(trial, process, "first start")
    kill_all(process)
    seconds = 1.35 * (time.monotonic() - began)  # so that kills come before and after the first checkpoint of a start
    trial.say(f"a start takes {seconds / 1.35:.1f} s to its first step; kills come within {seconds:.1f} s")
    what = {"kill": partial(kill, seconds=seconds), "torn": torn, "full-disk": full_disk, "terminated": terminated}
    what |= {"flipped": partial(harm, kind="flipped"), "cut": partial(harm, kind="cut"), "lost-rank": lost_rank}
    for event in events:
        if (trial.out / "model").exists():
            trial.say(f"{event}: left out, the run is finished", wrong=True)
        else:
            what[event](trial)
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
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks, a trial each")
    parser.add_argument("--kills", type=int, default=30, help="kills at random moments in each trial")
    parser.add_argument("--also", nargs="*", choices=ONCE, default=list(ONCE), help="what else happens, once each")
    parser.add_argument("--steps", type=int, default=200, help="RL steps of the run: enough for all faults")
    parser.add_argument("--seed", type=int, default=0, help="draws the order and the moments")
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
            trial = Trial(args.out / f"{ranks}-attacked", ranks, args.steps, random.Random(f"{args.seed} {ranks}"), log)
            status = trial.start(reference).wait()
            trial.say(f"the run that is left alone: exit status {status}", wrong=status != 0)
            attack(trial, args.kills, args.also, reference)
            faults += trial.faults
        log.write(f"{faults or 'nothing'} wrong\n")
    print(f"{faults or 'nothing'} wrong")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
