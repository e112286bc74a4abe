"""What `python checkpoint.py RUN --out DIR` runs: a model folder from a checkpoint of a run, stopped or finished."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from checkpoint import CheckpointError, differences, find_checkpoint, load_checkpoint, origin_of, stored_config, verified
from lora import add_adapters
from model import blank_model, resolve_model, save_model
from parallel import compute_dtype, load_sharded, model_on_host, ranks_of, shard


def write_model(run: Path, out: Path, step: int | None) -> None:
    """The weights of the newest whole checkpoint, or of the one after this step, in the dtype that the run computed in.
    ValueError if there is no such run, or if `out` exists; CheckpointError if there is no such checkpoint."""
    if out.exists():
        raise ValueError(f"--out {out}: there already")
    config = stored_config(run)
    if config is None:
        raise ValueError(f"{run}: no run (no metrics.jsonl)")
    machine = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])["device"]
    with ranks_of("cpu", 60.0):
        if step is None:
            path, state, damaged = find_checkpoint(run / "checkpoints")
            if path is None:
                raise CheckpointError("\n".join([f"{run}: no whole checkpoint", *damaged]))
        else:
            path = run / "checkpoints" / f"step-{step:06d}"
            state = verified(path)["state"]
        folder, cpu = resolve_model(config["model"]), torch.device("cpu")
        model, tokenizer = blank_model(folder)
        dtype = compute_dtype(config["dtype"], torch.device("cpu" if machine.startswith("cpu") else "cuda"))
        if config.get("lora_rank"):  # the checkpoint has the adapters alone
            base = {name: digest for name, digest in state["data"].items() if name.startswith("base/")}
            here = origin_of({f"base/{file.name}": str(file) for file in sorted(folder.glob("model*.safetensors"))})["data"]
            if changes := differences(base, here):
                raise ValueError("\n".join([f"{folder}: not the weights that {path} was trained on", *changes]))
            add_adapters(model, rank=config["lora_rank"], alpha=config["lora_alpha"], dtype=dtype)
        shard(model, device=cpu, dtype=dtype, shard_ranks=0, offload=False)
        load_sharded(model, folder, device=cpu, offload=False)
        load_checkpoint(path, model, None)
        save_model(model_on_host(model, dtype), tokenizer, out)
    print(f"{out}: the weights of {path}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a model folder from a checkpoint of a run.", allow_abbrev=False)
    parser.add_argument("run", type=Path, help="the folder of a run, train.py's --out")
    parser.add_argument("--out", type=Path, required=True, help="the model folder to write")
    parser.add_argument("--step", type=int, help="of this step, SFT and RL steps together (default: the newest whole one)")
    args = parser.parse_args(argv)
    try:
        write_model(args.run, args.out, args.step)
    except (ValueError, CheckpointError) as error:
        sys.exit(f"checkpoint.py: {error}")


if __name__ == "__main__":
    main()
