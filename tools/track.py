"""Send a run's metrics.jsonl to an experiment tracker, while it trains or afterwards.

    python tools/track.py runs/x --to tensorboard            into runs/x/tensorboard (pip install tensorboard)
    python tools/track.py runs/x --to wandb --follow         as they are written, until Ctrl-C (pip install wandb)
    python tools/track.py runs/x --to trackio                (pip install trackio)

A run is one run of the tracker, whatever it went through: how many lines were sent, and to which run there, is kept beside the
metrics (.sent-wandb or the like), and the same command sends the rest. A run that was resumed writes some lines again, with the
same figures: they are not sent twice.
"""

import argparse
import json
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

Log = Callable[[dict[str, float], int], Any]  # ({name: value}, step)


def to_tensorboard(run: Path, project: str, key: str, config: dict[str, Any]) -> Log:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run / "tensorboard"))

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log


def to_wandb(run: Path, project: str, key: str, config: dict[str, Any]) -> Log:
    import wandb

    tracked = wandb.init(project=project, id=key, name=run.name, config=config, resume="allow")
    # as our own axis: a run of wandb's that goes on would drop what else belongs to its last step
    tracked.define_metric("*", step_metric="step")
    return lambda values, step: tracked.log({**values, "step": step})


def to_trackio(run: Path, project: str, key: str, config: dict[str, Any]) -> Log:
    import trackio

    trackio.init(project=project, name=f"{run.name}-{key[:6]}", config=config, resume="allow")
    return lambda values, step: trackio.log(values, step=step)


TRACKERS = {"tensorboard": to_tensorboard, "wandb": to_wandb, "trackio": to_trackio}


def read_lines(path: Path, follow: bool, every_s: float = 5.0) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 0, record) of each whole line; with `follow` also of those to come. A file that a resumed run has cut is
    read from its start again."""
    number = position = 0
    while True:
        if path.stat().st_size < position:
            number = position = 0
        with path.open("rb") as file:
            file.seek(position)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                yield number, json.loads(line)
                number, position = number + 1, position + len(line)
        if not follow:
            return
        time.sleep(every_s)


def figures_of(record: dict[str, Any], before: int) -> tuple[dict[str, float], int]:
    """({stage/name: value}, step) of a line: RL's steps are counted on from SFT's, of which there were `before`."""
    stage = record["stage"] + ("/guided" if record.get("guided") else "")
    values = {f"{stage}/{name}": value for name, value in record.items() if isinstance(value, int | float) and name != "step"}
    values = {name: value for name, value in values.items() if not isinstance(value, bool)}
    return values, record["step"] + (0 if record["stage"].startswith("sft") else before)


def track(run: Path, to: str, project: str, follow: bool) -> int:
    """Send what has not been sent: the number of lines. ValueError if there is no run, or the tracker is not installed."""
    path, sent_path = run / "metrics.jsonl", run / f".sent-{to}"
    if not path.exists():
        raise ValueError(f"{run}: no metrics.jsonl")
    sent, key = sent_path.read_text().split() if sent_path.exists() else (0, secrets.token_hex(8))
    sent, seen, before, count, log = int(sent), 0, 0, 0, None
    for number, record in read_lines(path, follow):
        if number == 0:
            seen = before = 0
            if log is None:
                try:
                    log = TRACKERS[to](run, project, key, record["config"])
                except ModuleNotFoundError as error:
                    raise ValueError(f"--to {to}: {error}; `pip install {to}`") from None
        elif "config" not in record:
            values, step = figures_of(record, before)
            if record["stage"] == "sft":
                before = max(before, record["step"])
            seen += 1
            if seen > sent:
                log(values, step)
                sent, count = seen, count + 1
        sent_path.write_text(f"{sent} {key}")
    return count


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("run", type=Path, help="the folder of a run, train.py's --out")
    parser.add_argument("--to", choices=tuple(TRACKERS), required=True)
    parser.add_argument("--project", default="sgpo", help="the tracker's project (default: %(default)s)")
    parser.add_argument("--follow", action="store_true", help="go on as the run writes, until Ctrl-C")
    args = parser.parse_args(arguments)
    try:
        print(f"{track(args.run, args.to, args.project, args.follow)} lines sent")
    except KeyboardInterrupt:
        pass
    except ValueError as error:
        sys.exit(f"track.py: {error}")


if __name__ == "__main__":
    main()
