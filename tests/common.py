"""What several test files use."""

import http.server
import itertools
import json
import math
import os
import re
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

import parallel
import rollout
import sgpo
import train
import weighting
from data import tiny_world
from strategy import Strategy

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
TINY_BASE = ROOT / "data/tiny/base"
TIMES = ("sampling_s", "step_s", "tokens_per_s")  # the only metrics that may differ
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15]]
STOPS = (3, 20, 21, 22, 23, 24)
REAL_DATA = os.environ.get("SGPO_TEST_DATA")  # a folder of published data that is not part of the project (fixture real_data)

SMALL = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
    eos_token_id=3,
)

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}

FAMILIES = {
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=False, rope_theta=1e6),
    "qwen3": Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True),
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=False),
    "llama3-rope": LlamaConfig(**SMALL, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    "llama-biases": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "smollm2-shape": LlamaConfig(**{**SMALL, "num_attention_heads": 3, "num_key_value_heads": 1}, tie_word_embeddings=True),
}


def random_ids(rows, length, seed=0):
    return torch.randint(4, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def varlen_by_loops(q, k, v, q_starts, k_starts, longest_q, longest_k, window_size, enable_gqa=True):
    """torch.nn.attention.varlen.varlen_attn as documented: (-1, 0) is causal, a sequence's last query sees all of its keys."""
    assert window_size == (-1, 0) and enable_gqa and q.dim() == k.dim() == 3
    spans = [list(itertools.pairwise(starts.tolist())) for starts in (q_starts, k_starts)]
    assert spans[0][-1][1] == len(q) and spans[1][-1][1] == len(k) == len(v)
    assert [max(b - a for a, b in span) for span in spans] == [longest_q, longest_k]
    out = []
    for (qa, qb), (ka, kb) in zip(*spans, strict=True):
        mask = torch.ones(qb - qa, kb - ka, dtype=torch.bool).tril(kb - ka - (qb - qa))
        q_, k_, v_ = (x.transpose(0, 1) for x in (q[qa:qb], k[ka:kb], v[ka:kb]))
        out.append(F.scaled_dot_product_attention(q_, k_, v_, attn_mask=mask, enable_gqa=True).transpose(0, 1))
    return torch.cat(out)


def gathered_attention(q, kv, page_table, prompt_length, response_length):
    """What paged_attention computes, row by row and head by head, over keys that are picked from the pages one at a time."""
    S, out = kv.shape[3], torch.empty_like(q)
    for b in range(len(q)):
        prompt, own = int(prompt_length[b]), int(response_length[b])
        slots = [(t // S, t % S) for t in range(prompt)] + [(-(-prompt // S) + t // S, t % S) for t in range(own)]
        k, v = torch.stack([kv[:, int(page_table[b, page]), :, slot] for page, slot in slots], 2)  # (K, tokens, E) each
        for h in range(q.shape[1]):
            head = h * kv.shape[2] // q.shape[1]
            out[b, h] = torch.softmax(k[head] @ q[b, h] / math.sqrt(q.shape[2]), 0) @ v[head]
    return out


def nucleus_logits():
    """{name: logits of 6 rows}; the widths are a multiple of the blocks of 512, and not."""
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    one_possible = torch.full((6, 1000), -math.inf)
    one_possible[:, 3] = 1.0
    return {
        "more than 1024 in the nucleus of every second row": normal(6, 5000) * torch.tensor([[1.0], [3.0]] * 3),
        "odd width, negative": normal(6, 257) - 50,
        "bf16": (3 * normal(6, 1536)).bfloat16(),
        "ties": normal(6, 1000).round(),
        "both zeros": torch.tensor([[0.0, -0.0, 0.0, -0.0, -1.0]] * 6),
        "impossible tokens": normal(6, 1000).masked_fill(normal(6, 1000) > 0, -math.inf),
        "one possible token": one_possible,
    }


def prompt_seeds(seed, prompts=PROMPTS):
    return [seed * 1_000_003 + p for p in range(len(prompts))]


def make_run(tmp_path, worker, *flags):
    """(run, examples) on the tiny world with the flags given, as train.main would make them."""
    cfg = train.parse_config(["--out", str(tmp_path / "run"), "--device", "cpu", *map(str, flags)])
    run, examples, _ = train.prepare(cfg, CPU, worker)
    run.folder.out.mkdir(parents=True)
    return run, examples


def update(run, samples, learning_rate):
    return sgpo.update(run.model, run.optimizer, run.cfg, samples, learning_rate)


def weights_of(model):
    return [parallel.whole_tensor(parameter.detach()).clone() for parameter in model.parameters()]


def fake_samples(run, examples, seed=0):
    """Samples of four problems with ragged responses and made-up rewards, alpha and targets; one problem has no target."""
    examples = examples[:4]
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for place, example in enumerate(examples):

        def rows(ids, n, old_shift, example=example):
            found = []
            for _ in range(n):
                length = int(torch.randint(2, 15, (), generator=generator))
                response = torch.randint(4, 90, (length,), generator=generator).tolist()
                old = (-3 + old_shift * torch.randn(length, generator=generator)).tolist()
                found.append(rollout.Trajectory(ids, response, old, bool(length % 2), 0))
            return found

        auto, guided = rows(example.auto_ids, 8, 0.3), rows(example.guided_ids, 4, 0.0)
        rewards = [float(torch.rand((), generator=generator) < 0.4) for _ in auto]
        sample = sgpo.ProblemSamples(place, example, auto, guided, rewards, [1.0] * 4)
        sample.advantages = weighting.group_advantages(torch.tensor([rewards]))[0].tolist()
        sample.alpha, sample.targets = 0.2 * (place + 1), ([] if place == 2 else [place])
        samples.append(sample)
    return samples


def assert_equal_gradients(got, want, tolerance=1e-5):
    assert got.keys() == want.keys()
    for name in got:
        scale = want[name].abs().max().item() + 1e-8
        assert (got[name] - want[name]).abs().max().item() <= tolerance * scale, name


def run_script(*command, cwd=ROOT, **environment):
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=settings, capture_output=True, text=True, timeout=300
    )


def read_metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def tiny_rows(n, **changes):
    return [{**row, **changes} for row in tiny_world.make_rows(0)["train"][:n]]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def on_ranks(ranks, script, *arguments, check=True):
    done = run_script(
        "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone", script, *arguments, PYTHONPATH=str(ROOT)
    )
    assert done.returncode == 0 or not check, done.stderr[-3000:]
    return done


def leak_examples():
    """(problem's row, candidate) of data/leak_examples.jsonl."""
    rows = [json.loads(line) for line in (ROOT / "data/leak_examples.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(row, candidate) for row in rows for candidate in row["candidates"]]


def strategy_example():
    return Strategy("sum of two", "Join the parts.", ("Find both parts.", "Add them."))


class ChatServer:
    """A chat server on loopback whose every reply is scripted: script(handler, body, number) with the number of the request.
    The script returns a str (the content of a completion), or (status, headers, payload); with None it has written to the
    handler itself. `requests` keeps what came in, as (raw body, headers by their names in lower case, path)."""

    def __init__(self, script):
        self.requests, self.lock, self.running, self.most_running = [], threading.Lock(), 0, 0
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                with owner.lock:
                    number = len(owner.requests)
                    owner.requests.append((raw, {name.lower(): text for name, text in self.headers.items()}, self.path))
                    owner.running += 1
                    owner.most_running = max(owner.most_running, owner.running)
                try:
                    reply = script(self, json.loads(raw), number)
                    with owner.lock:  # before the reply: at its end the client's next request may already be here
                        owner.running -= 1
                    if reply is not None:
                        self.reply(*(completion(reply) if isinstance(reply, str) else reply))
                except (BrokenPipeError, ConnectionResetError):  # the client has left, as some tests want it to
                    pass

            def reply(self, status, headers, payload):
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(payload))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=partial(self.server.serve_forever, 0.02), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def completion(content, finish="stop", **message):
    reply = {
        "model": "fake-1",
        "choices": [{"message": {"role": "assistant", "content": content} | message, "finish_reason": finish}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }  # fmt: skip
    return 200, {"Content-Type": "application/json"}, json.dumps(reply).encode()


def reply_with(status, value=None, **headers):
    """A script for ChatServer: the same status and body, as JSON or as it is, for every request."""
    payload = value if isinstance(value, bytes) else json.dumps(value).encode()
    headers = {"Content-Type": "application/json"} | {name.replace("_", "-"): text for name, text in headers.items()}
    return lambda handler, body, number: (status, headers, payload)


def _eval_file(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def _eval_row(i=1, **changes):
    row = {"id": f"r{i}", "problem": f"What is {i} + 0?", "answer": str(i)} | changes
    return {key: value for key, value in row.items() if value is not ...}


def _starter_rows(*names):
    """The committed rows of the named files, one list."""
    return [json.loads(line) for name in names for line in (ROOT / f"data/starter/{name}.jsonl").read_text().splitlines()]


def _starter_family(row):
    return re.fullmatch(r"starter-(.+)-\d+", row["id"])[1]


def luffy_row(problem, answer, target, system=True):
    """A row as LUFFY publishes OpenR1-Math."""
    message = {"role": "system", "content": "Your task is to follow a systematic, thorough reasoning process."}
    return {
        "data_source": "openr1", "prompt": [message] * system + [{"role": "user", "content": problem}],
        "target": target and [{"role": "assistant", "content": target}], "ability": "math",
        "reward_model": {"ground_truth": answer, "style": "rule"}, "extra_info": {"index": 0, "split": "default"},
    }  # fmt: skip


def live_bytes(work):
    """The most bytes that PyTorch's CPU allocator had given out at any time during `work`, beyond what it had before. The
    profiler reports every allocation and release with its size, those inside of operators too. It does not see what is
    allocated elsewhere (the workspaces of the matrix library, Python) nor the release of what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
