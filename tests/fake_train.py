"""In place of train.py: writes a log at once, and its call into calls.txt. In place of eval.py: writes an accuracy."""

import json
import pathlib
import sys

flags = sys.argv[1:]
out = pathlib.Path(flags[flags.index("--out") + 1])
if "eval.py" in sys.argv[0]:
    out.write_text(json.dumps({"files": {flags[flags.index("--data") + 1]: {"accuracy": 0.65}}}))
    sys.exit()
seed = int(flags[flags.index("--seed") + 1])
with open(pathlib.Path(__file__).parent / "calls.txt", "a") as file:
    file.write(f"{out.parent.name} {seed}\n")
if "--fail" in flags:
    sys.exit("out of luck")
(out / "model").mkdir(parents=True)
evals = [
    {"stage": "eval", "guided": kind, "accuracy": a, "step": step}
    for kind, a, step in ((0, 0.3, 0), (0, 0.4, 0), (0, 0.7 + seed / 10, 12), (1, 0.9, 12))
]
names = "reward_auto reward_guided alpha kl kept entropy length_auto reach_gap".split()
step = {"stage": "sgpo", "step_s": 0.5, "sampled_tokens": 10, "length_guided": 7.0}
steps = [{**step, "step": k + 1, "target_tokens": 5 * (k > 5), **dict.fromkeys(names, k + seed)} for k in range(12)]
rows = [{"config": {}, "commit": "abc"}, *evals[:2], *steps, *evals[2:]]
(out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
