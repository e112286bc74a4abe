"""The token map: where along a response the strategy speaks, as an HTML page; and the same over many problems, as a csv.

    python tools/report.py tokens --data data/tiny/test.jsonl --model data/tiny/base --after runs/x/model --out map.html
    python tools/report.py divergence --data data/tiny/test.jsonl --model data/tiny/base --out divergence.csv

`tokens` colours every token of one problem's reachable target o+ by its divergence d_t [eq 3], before training and (--after)
after it, for the same token ids. `divergence` gives, for every token of the vocabulary, the mean d_t over the targets of many
problems, and the mean entropy of the policy there, alone and guided. The picture is the paper's in kind, the layout is ours.
Axes: M response tokens, D width, V vocabulary, K next tokens shown (--top).
"""

import argparse
import csv
import json
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from data.problems import Problem, load_problems
from grader import MathWorker, is_correct
from loss import forward_kl, kl_clip_mask, token_logprobs
from model import CausalLM, encode_chat, load_model
from rollout import pack, sample_and_grade, stream_seed
from strategy import auto_messages, guided_messages
from weighting import reachable_target

# ---------------------------------------------------------------------------------------------------- the map as data


def contexts(tokenizer: Any, problem: Problem) -> tuple[list[int], list[int]]:
    """The ids of a problem's two prompts: (without the strategy, with it)."""
    guided = guided_messages(problem.problem, problem.strategy)
    return encode_chat(tokenizer, auto_messages(problem.problem)), encode_chat(tokenizer, guided)


def sample_group(
    model: CausalLM, tokenizer: Any, worker: MathWorker, problem: Problem, args: argparse.Namespace, *, guided: bool
) -> tuple[list[list[int]], list[bool]]:
    """One group of responses, sampled as in training (temperature 1, top_p 0.95): (their ids, which of them are correct)."""
    (rows,), (correct,) = sample_and_grade(
        model,
        tokenizer,
        [contexts(tokenizer, problem)[guided]],
        lambda row, member, text: is_correct(text, problem.answer, worker),
        n=args.group_guided if guided else args.group_auto,
        max_new_tokens=args.max_new_tokens,
        temperature=1.0,
        top_p=0.95,
        seed=[stream_seed(args.seed, "report", guided, problem.id)],
    )
    return [row.response_ids for row in rows], correct


@torch.no_grad()
def token_map(
    model: CausalLM, tokenizer: Any, problem: Problem, response_ids: list[int], *, delta: float, top: int
) -> list[dict[str, Any]]:
    """One dict per response token: what the policy thinks of it with and without the strategy in its prompt.

    id, text, blank         the token; blank is the white space that decoding the whole response puts before it
    divergence, kept        d_t in nats [eq 3], and whether the KL clip keeps it: d_t <= delta [eq 5]
    logp_auto, logp_guided  log-probability of the token without and with the strategy, natural log
    entropy_auto, ..._guided  entropy of the next token without and with the strategy, in nats
    top_auto, top_guided    the K = `top` most probable next tokens as (id, text, probability), best first

    The same functions as in training, in the weights' dtype, at temperature 1. Logits exist for 256 tokens at a time.
    """
    hidden = []  # (M, D) without and with the strategy; row m of both predicts the same token
    for prompt in contexts(tokenizer, problem):
        packed = pack([prompt], [response_ids], device=model.device)
        hidden.append(model(**packed.layout, head=lambda states, _, at=packed.predict: states[0, at]))
    tokens = []
    for *states, targets in zip(*(tensor.split(256) for tensor in (*hidden, packed.targets)), strict=True):
        unguided, guided = (F.linear(part, model.head_weight) for part in states)  # (m, V)
        divergence = forward_kl(guided, unguided)  # d_t [eq 3]
        values = {
            "id": targets.tolist(),
            "divergence": divergence.tolist(),
            "kept": kl_clip_mask(divergence, delta).tolist(),
        }
        for side, logits in (("auto", unguided), ("guided", guided)):
            log_p = logits.float().log_softmax(-1)
            best = log_p.topk(min(top, logits.shape[-1]))
            values[f"logp_{side}"] = token_logprobs(logits, targets).tolist()
            values[f"entropy_{side}"] = (-(log_p.exp() * log_p).sum(-1)).tolist()
            values[f"top_{side}"] = []
            for ids, logps in zip(best.indices.tolist(), best.values.tolist(), strict=True):
                texts = [token_text(tokenizer, one) for one in ids]
                values[f"top_{side}"].append(list(zip(ids, texts, map(math.exp, logps), strict=True)))
        tokens += [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
    for token, (blank, text) in zip(tokens, token_texts(tokenizer, response_ids), strict=True):
        token |= {"blank": blank, "text": text}
    return tokens


def token_text(tokenizer: Any, token_id: int) -> str:
    """A token as text, or its name in the vocabulary if it is no text by itself (part of a character, nothing at all)."""
    text = tokenizer.decode([token_id])
    return text if text and "\ufffd" not in text else str(tokenizer.convert_ids_to_tokens(token_id))


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[tuple[str, str]]:
    """[(white space before it, text)] of every token. Word-level vocabularies put blanks between tokens that are in none."""
    whole, at, texts = tokenizer.decode(ids), 0, []
    for token_id in ids:
        text = token_text(tokenizer, token_id)
        found = whole.find(text, at, at + len(text) + 8)  # nearby only: a name from the vocabulary must not match far away
        blank = whole[at:found] if found >= 0 else ""
        at = found + len(text) if found >= 0 else at
        texts.append((blank if blank.isspace() else "", text))
    return texts


def totals(tokens: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The map in numbers: |o+|, the sum and mean of d_t, the kept share, L_KD^clip [eq 5], and log pi(o+) in both contexts."""
    divergences = [token["divergence"] for token in tokens]
    return {
        "tokens": len(tokens),
        "divergence_sum": sum(divergences),
        "divergence_mean": statistics.fmean(divergences),
        "kept": statistics.fmean(token["kept"] for token in tokens),
        "loss": sum(token["divergence"] for token in tokens if token["kept"]) / len(tokens),
        "logp_guided": sum(token["logp_guided"] for token in tokens),
        "logp_auto": sum(token["logp_auto"] for token in tokens),
    }


def find_targets(
    model: CausalLM, tokenizer: Any, worker: MathWorker, args: argparse.Namespace
) -> Iterator[tuple[Problem, list[int]]]:
    """(problem, ids of o+) of every problem (with --id: of that one) that has a correct guided response: the one most probable
    without the strategy, by the summed log-probability [eq 4]. ValueError if there is no such problem."""
    problems = [problem for problem in load_problems(args.data, worker) if args.id in (None, problem.id) and problem.strategy]
    if not problems:
        raise ValueError(f"{args.data}: no row{'' if args.id is None else f' with the id {args.id!r}'} has a strategy")
    found = False
    for problem in problems:
        responses, correct = sample_group(model, tokenizer, worker, problem, args, guided=True)
        if any(correct):
            maps = [token_map(model, tokenizer, problem, response, delta=args.delta, top=1) for response in responses]
            alone = torch.tensor([totals(tokens)["logp_auto"] for tokens in maps])
            yield problem, responses[reachable_target(alone, torch.tensor(correct))]
            found = True
        else:
            print(f"{problem.id}: none of {args.group_guided} guided responses is correct")
    if not found:
        raise ValueError(f"{args.data}: no correct guided response; another --seed or a larger --group_guided may find one")


# ---------------------------------------------------------------------------------------------------- the page

# The page with its {{fields}}, style and script. Its colours are one hue, mixed in oklab: lightness falls evenly (in the dark
# theme it rises), so any colour vision can read the order, and text stays readable on every shade (contrast at least 4.5:1).
# The script fills the tooltip through textContent only, so no token can become markup.
TEMPLATE = Path(__file__).with_name("token_map.html")
# how the page writes what `totals` returns, and the pass rates
FORMATS = {"tokens": "d", "divergence_sum": ".4f", "divergence_mean": ".4f", "kept": ".1%", "loss": ".4f"}
FORMATS |= dict.fromkeys(("logp_guided", "logp_auto", "p_guide", "p_auto"), ".3f")


def visible(text: str, blanks: bool) -> str:
    """A token's text with line ends, tabs and the unprintable made visible; blanks too, if asked or if it is all blank."""
    text = text.replace("\n", "⏎").replace("\t", "⇥")
    if blanks or not text.strip(" ⏎⇥"):
        text = text.replace(" ", "␣")
    # control and formatting characters are not printable: one that reverses the direction would garble the page
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


def token_html(token: Mapping[str, Any], view: int, m: int, delta: float) -> str:
    """One token as a focusable span: --t in [0, 1] is sqrt(d_t / delta), its place on the colour scale."""
    place = math.sqrt(min(max(token["divergence"], 0.0), delta) / delta)  # rounding can leave d_t a little below 0
    name = "token" if view == 0 else "after"
    attributes = f'class="t{"" if token["kept"] else " masked"}" style="--t:{place:.3f}" data-view="{view}" data-m="{m}"'
    text = escape(visible(token["text"], blanks=False))
    # the line ends themselves come after the span, so that the lines of the response stay lines
    return f'{token["blank"]}<span {attributes} id="{name}-{m}" tabindex="0">{text}</span>' + "\n" * token["text"].count("\n")


def tip_data(token: Mapping[str, Any], m: int, count: int, delta: float) -> list[Any]:
    """The tooltip of one token: [heading, line, next tokens guided, next tokens alone], each (text, p, is it this)."""
    verdict = f"kept (≤ {delta:g})" if token["kept"] else f"dropped by the KL clip (> {delta:g})"
    guided, alone = (_probability(math.exp(token[name])) for name in ("logp_guided", "logp_auto"))
    line = f"d = {token['divergence']:.4f} nats, {verdict}; p = {guided} with strategy, {alone} alone"
    tops = [
        [(visible(text, blanks=True), _probability(p), one == token["id"]) for one, text, p in token[side]]
        for side in ("top_guided", "top_auto")
    ]
    return [f"token {m} of {count}: {visible(token['text'], blanks=True)}", line, *tops]


def _probability(p: float) -> str:
    return f"{p:.4f}" if p >= 0.0001 else f"{p:.0e}"


def page_html(page: Mapping[str, Any]) -> str:
    """The whole page from plain data. Every text that comes from outside is escaped.

    page: "problem", "delta", "settings" (a text), and "views": one or two of {"name", "model", "tokens" (from token_map),
    "totals" (from totals, and p_auto, p_guide)}, over the same token ids.
    """
    problem, delta, views = page["problem"], page["delta"], page["views"]
    tips = [[tip_data(token, m, len(v["tokens"]), delta) for m, token in enumerate(v["tokens"], 1)] for v in views]
    maps = []
    for index, view in enumerate(views):
        spans = "".join(token_html(token, index, m, delta) for m, token in enumerate(view["tokens"], start=1))
        head = f'<h2>{escape(view["name"])} <span class="soft">{escape(view["model"])}</span></h2>'
        maps.append(f'<section class="card">{head}<div class="tokens">{spans}</div></section>')
    fields = {
        "id": escape(problem.id),
        "problem": escape(problem.problem),
        "answer": escape(problem.answer),
        "type": escape(problem.strategy.type),
        "strategy": escape(problem.strategy.strategy),
        "steps": "".join(f"<li>{escape(step)}</li>" for step in problem.strategy.steps),
        "delta": f"{delta:g}",
        "ticks": "".join(f"<span>{delta * (k / 5) ** 2:.3g}</span>" for k in range(6)),  # even steps of a square-root scale
        "maps": "".join(maps),
        "names": "".join(f'<th class="n">{escape(view["name"])}</th>' for view in views),
        "settings": escape(page["settings"]),
        "tips": json.dumps(tips, ensure_ascii=False).replace("<", "\\u003c"),  # a token "</script>" must not end the script
    }
    for key, form in FORMATS.items():
        fields[key] = "".join(f'<td class="n">{view["totals"][key]:{form}}</td>' for view in views)
    # in one pass, so that a text with "{{id}}" in it stays as it is
    return re.sub(r"\{\{(\w+)\}\}", lambda field: fields[field[1]], TEMPLATE.read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------- command line


def write_tokens(args: argparse.Namespace) -> dict[str, Any]:
    """Sample, choose o+, map it under --model and under --after, write the page: its data."""
    folders, views = {"model": args.model} if args.after is None else {"before": args.model, "after": args.after}, []
    with MathWorker() as worker:
        for name, folder in folders.items():
            model = None  # the first model's memory, before the second one needs its own
            model, tokenizer = load_model(folder, dtype=torch.float32, device=args.device)
            if not views:
                vocabulary = tokenizer.get_vocab()
                problem, response_ids = next(find_targets(model, tokenizer, worker, args))
            elif tokenizer.get_vocab() != vocabulary:
                raise ValueError(f"--after {folder}: its vocabulary is not that of {args.model}, the ids would not match")
            tokens = token_map(model, tokenizer, problem, response_ids, delta=args.delta, top=args.top)
            rates = {
                rate: statistics.fmean(sample_group(model, tokenizer, worker, problem, args, guided=guided)[1])
                for rate, guided in (("p_auto", False), ("p_guide", True))
            }
            views.append({"name": name, "model": folder, "tokens": tokens, "totals": totals(tokens) | rates})
    flags = ("data", "seed", "group_auto", "group_guided", "max_new_tokens")
    settings = ", ".join(f"--{flag} {getattr(args, flag)}" for flag in flags)
    page = {"problem": problem, "delta": args.delta, "views": views, "settings": settings}
    args.out.write_text(page_html(page), encoding="utf-8")
    print(f"{problem.id}: {len(response_ids)} tokens in {args.out}")
    return page


def write_divergence(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Write the mean d_t of every token over the targets of many problems, largest first: the lines of the csv."""

    def mean(tokens: list[dict[str, Any]], name: str) -> float:
        return round(statistics.fmean(token[name] for token in tokens), 6)

    found: dict[str, list[dict[str, Any]]] = {}
    with MathWorker() as worker:
        model, tokenizer = load_model(args.model, dtype=torch.float32, device=args.device)
        for problem, response_ids in islice(find_targets(model, tokenizer, worker, args), args.problems):
            for token in token_map(model, tokenizer, problem, response_ids, delta=args.delta, top=1):
                found.setdefault(token["text"], []).append(token)
    lines = [
        {
            "token": text,
            "count": len(tokens),
            "mean_d": mean(tokens, "divergence"),
            "dropped": round(1 - mean(tokens, "kept"), 6),
            "entropy_alone": mean(tokens, "entropy_auto"),
            "entropy_guided": mean(tokens, "entropy_guided"),
        }
        for text, tokens in found.items()
    ]
    lines.sort(key=lambda line: -line["mean_d"])
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    print(f"{len(lines)} tokens in {args.out}, the largest mean d_t is {lines[0]['mean_d']:.4f}, of {lines[0]['token']!r}")
    return lines


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    tokens = commands.add_parser("tokens", help="token map of one problem's target, as an HTML page", allow_abbrev=False)
    divergence = commands.add_parser("divergence", help="mean d_t of each token over problems, as a csv", allow_abbrev=False)
    for command in (tokens, divergence):
        command.add_argument("--data", required=True, help="jsonl file of problems with strategies")
        command.add_argument("--id", help="only this problem (default: tokens takes the first that has a target)")
        command.add_argument("--model", required=True, help="model folder or hub name")
        command.add_argument("--out", type=Path, required=True, help="the file to write")
        command.add_argument("--delta", type=float, default=1.0, help="of the KL clip, in nats; ends the colours (default: 1)")
        command.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
        command.add_argument("--group_guided", type=int, default=4, help="guided, for p_guide and the target (default: 4)")
        command.add_argument("--max_new_tokens", type=int, default=2048, help="cut to the context (default: 2048)")
    tokens.add_argument("--after", help="the trained model, to compare on the same tokens")
    tokens.add_argument("--group_auto", type=int, default=8, help="responses alone, for p_auto (default: 8)")
    tokens.add_argument("--top", type=int, default=5, help="next tokens to list (default: 5)")
    divergence.add_argument("--problems", type=int, default=100, help="with a correct guided response (default: 100)")
    return parser


def main(arguments: Sequence[str]) -> Any:
    args = build_parser().parse_args(arguments)
    if not 0 < args.delta < math.inf:
        raise ValueError(f"--delta must be positive and finite, the colour scale ends there; got {args.delta}")
    if not args.out.parent.is_dir():
        raise ValueError(f"{args.out}: its folder does not exist")
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return {"tokens": write_tokens, "divergence": write_divergence}[args.command](args)
