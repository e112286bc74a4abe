"""Pictures of runs, the token map and its page."""

import csv
import json
import math
import xml.etree.ElementTree
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from data.problems import load_problems
from model import load_model, save_model
from strategy import Strategy, auto_messages, guided_messages
from tests.common import ROOT, TINY_BASE, run_script
from tools import report, sweep, token_map

TINY_TEST = ROOT / "data/tiny/test.jsonl"


# ---------------------------------------------------------------------------------------------------- curves


def step_record(step, reward, **changes):
    record = {"stage": "sgpo", "step": step, "reward_auto": reward, "reward_guided": 0.9, "alpha": 0.4, "entropy": 0.1}
    return record | {"length_auto": 20.0, "length_guided": 22.0, "loss": 0.5} | changes


def eval_record(step, accuracy, guided=False):
    return {"stage": "eval", "step": step, "accuracy": accuracy, "guided": guided}


def write_run(folder, records, *, end="\n", **config):
    """Write a metrics.jsonl with these records below its first line; the path."""
    folder.mkdir(parents=True)
    config = {"method": "sgpo", "seed": 0, "learning_rate": 1e-4, "out": str(folder)} | config
    lines = [json.dumps(record) if isinstance(record, dict) else record for record in [{"config": config}, *records]]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + end)
    return folder / "metrics.jsonl"


def two_seeds(root):
    """Seed 0 has three steps and seed 1, still going, two."""
    write_run(root / "sgpo/0", [eval_record(0, 0.5), *(step_record(t, r) for t, r in ((1, 0.2), (2, 0.4), (3, 0.6)))])
    write_run(root / "sgpo/1", [eval_record(0, 0.5), step_record(1, 0.4), step_record(2, 0.8)], seed=1)
    return str(root / "sgpo")


def three_methods(root):
    """sgpo; grpo, which logs zeros for what it has not; and sft, which has no RL step. The arguments for main."""
    grpo = [step_record(t, 0.5, stage="grpo", alpha=0.0, reward_guided=0.0, length_guided=0.0) for t in range(1, 9)]
    write_run(root / "grpo/0", grpo, method="grpo")
    losses = [{"stage": stage, "step": 1, "loss": 2.0} for stage in ("sft", "sft_validation")]
    evals = [eval_record(0, 0.75), eval_record(0, 1, guided=True), eval_record(1, 0.5)]
    write_run(root / "sft/0", [eval_record(0, 0.25), *losses, *evals], method="sft")
    return [two_seeds(root), str(root / "grpo"), str(root / "sft")]


def test_band_by_hand_over_seeds_of_different_lengths(tmp_path):
    groups = report.read_groups([two_seeds(tmp_path)])
    plain = report.panel_curves(groups, 1)["reward"]["sgpo"]["reward_auto"]
    assert plain["step"] == [1, 2, 3] and plain["seeds"] == [2, 2, 1]
    assert plain["mean"] == pytest.approx([0.3, 0.6, 0.6])
    # sd(0.2, 0.4) = 0.1 sqrt(2), divided by sqrt(2); sd(0.4, 0.8) = 0.2 sqrt(2)
    assert plain["stderr"] == pytest.approx([0.1, 0.2, math.nan], nan_ok=True)
    smooth = report.panel_curves(groups, 2)["reward"]["sgpo"]["reward_auto"]
    assert smooth["mean"] == pytest.approx([0.3, 0.45, 0.5])  # seed 0: 0.2 0.3 0.5, seed 1: 0.4 0.6
    assert report.mean_and_stderr([1.0, 2.0, 6.0]) == pytest.approx((3.0, math.sqrt(7 / 3)))
    assert report.trailing_mean({1: 1.0, 2: 3.0, 5: 7.0, 6: 8.0}, 3) == {1: 1.0, 2: 2.0, 5: 7.0, 6: 7.5}  # steps, not records


@pytest.mark.parametrize(
    "bad, message",
    [
        ('{"stage": "sgpo", "step', "Unterminated string"),
        ("[1]", "expected an object"),
        (step_record(2, 0.5, stage="sgqo"), "stage is 'sgqo'"),
        ({k: v for k, v in step_record(2, 0.5).items() if k != "entropy"}, "entropy is None"),
        (step_record(2, math.nan), "reward_auto is nan"),
        (step_record(2, 0.5, alpha="0.4"), "alpha is '0.4'"),
        (step_record(1, 0.5), "step 1 after step 1"),
        ({"stage": "eval", "step": 1, "accuracy": 0.5}, "guided is None"),
    ],
)
def test_a_bad_line_is_named(tmp_path, bad, message):
    path = write_run(tmp_path / "a", [step_record(1, 0.5), bad, step_record(3, 0.5)])
    with pytest.raises(ValueError) as error:
        report.read_run(path)
    assert str(error.value).startswith(f"{path}:3: ") and message in str(error.value)


def test_an_unfinished_last_line_is_left_out_and_said(tmp_path, capsys):
    going = write_run(tmp_path / "going", [step_record(1, 0.5), '{"stage": "sgpo", "st'], end="")
    assert [record["step"] for record in report.read_run(going).steps] == [1]
    assert f"{going}:3: the last line is unfinished" in capsys.readouterr().out


def test_a_group_is_one_setting_under_several_seeds(tmp_path):
    good = two_seeds(tmp_path)
    write_run(tmp_path / "lr=3/0", [step_record(1, 0.5)])
    groups = report.read_groups([f"Ours={good}", good + "/", str(tmp_path / "lr=3")])
    assert list(groups) == ["Ours", "sgpo", "lr=3"] and [run.config["seed"] for run in groups["sgpo"]] == [0, 1]
    for seed, name, first, second in ((1, "a", 1e-4, 3e-4), (0, "b", 1e-4, 1e-4)):
        write_run(tmp_path / name / "0", [step_record(1, 0.5)], learning_rate=first, max_rows=3, sampling_seed=0)
        write_run(tmp_path / name / "1", [step_record(1, 0.5)], seed=seed, learning_rate=second, max_rows=5, sampling_seed=0)
    with pytest.raises(ValueError, match="learning_rate is 0.0001 in .*a/0/metrics.jsonl but 0.0003 in .*a/1/metrics.jsonl"):
        report.read_groups([str(tmp_path / "a")])
    with pytest.raises(ValueError, match="both have seed 0, sampling_seed 0"):
        report.read_groups([str(tmp_path / "b")])
    with pytest.raises(ValueError, match="nowhere: no metrics.jsonl"):
        report.read_groups([good, str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match="two groups are called 'sgpo'"):
        report.read_groups([good, good])


def test_methods_are_left_out_of_panels_they_have_nothing_for(tmp_path):
    panels = report.panel_curves(report.read_groups(three_methods(tmp_path)), 5)
    both = ["sgpo", "grpo"]
    want = {"reward": both, "entropy": both, "length": both, "pass_rates": ["sgpo"], "alpha": ["sgpo"]}
    assert {name: list(curves) for name, curves in panels.items()} == want | {"accuracy": ["sgpo", "sft"]}
    # of two evaluations at one step the later one, none with the strategy in the prompt, and not smoothed
    assert panels["accuracy"]["sft"]["accuracy"]["mean"] == [0.75, 0.5]
    assert panels["pass_rates"]["sgpo"]["reward_guided"]["mean"] == pytest.approx([0.9, 0.9, 0.9])


def test_curves_of_the_logs_that_training_wrote(tmp_path):
    for method in ("sgpo", "grpo"):
        (tmp_path / method).mkdir()
        log = (ROOT / f"results/tiny/{method}-1e-4-seed0.jsonl").read_text()
        (tmp_path / method / "metrics.jsonl").write_text(log)
    panels = report.panel_curves(report.read_groups([str(tmp_path / "sgpo"), str(tmp_path / "grpo")]), 1)
    assert panels["reward"]["grpo"]["reward_auto"]["step"] == list(range(1, 61))
    assert list(panels["alpha"]) == ["sgpo"] and panels["alpha"]["sgpo"]["alpha"]["mean"][0] == pytest.approx(0.59315, abs=1e-5)
    assert panels["accuracy"]["sgpo"]["accuracy"]["mean"] == pytest.approx([0.46875, 0.746875, 0.932292, 0.983333], abs=1e-5)


def test_a_figure_shows_mean_band_and_seeds(tmp_path):
    groups = report.read_groups(three_methods(tmp_path))
    figure = report.draw(report.panel_curves(groups, 2), ["reward", "accuracy"], list(groups), 2)
    reward, accuracy = figure.axes
    assert list(reward.lines[0].get_ydata()) == pytest.approx([0.3, 0.45, 0.5])
    band = reward.collections[0].get_paths()[0].vertices
    assert {round(float(y), 6) for x, y in band if x == 2} == {0.3, 0.6}  # 0.45 +- 0.15
    assert band[:, 0].max() == 2 and len(reward.collections[1].get_paths()) == 0  # one seed: no band
    assert reward.get_xlabel() == "RL step (trailing mean of 2 steps)" and accuracy.get_xlabel() == "RL step"
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["sgpo (1 to 2 seeds)", "grpo (1 seed)", "sft (1 seed)"]
    assert accuracy.lines[-1].get_color() == report.COLOURS[2]  # sft is the third group, also where it is the second line
    one_point = {"accuracy": {"sft": {"accuracy": {"step": [0], "mean": [0.3], "stderr": [0.1], "seeds": [2]}}}}
    (segment,) = report.draw(one_point, ["accuracy"], ["sft"], 1).axes[0].collections[-1].get_segments()
    assert segment.tolist() == [[0.0, pytest.approx(0.2)], [0.0, pytest.approx(0.4)]]


def test_pictures_are_written_and_reproducible(tmp_path):
    groups, names = three_methods(tmp_path), ("alpha", "overview")
    for out in ("one", "two"):
        report.main(["curves", *groups, "--only", *names, "--out", str(tmp_path / out), "--dpi", "50"])
    files = {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    assert {path.name for path in (tmp_path / "one").iterdir()} == files
    for name in names:
        one, two = ((tmp_path / out / f"{name}.svg").read_bytes() for out in ("one", "two"))
        assert one == two and b"<text" not in one  # text as paths
        xml.etree.ElementTree.fromstring(one)
    width = int.from_bytes((tmp_path / "one/overview.png").read_bytes()[16:20], "big")
    assert width == round(3 * 4.6 * 50)


def test_the_command_draws_without_torch_and_hands_the_token_map_on(tmp_path):
    code = "import sys; from tools import report; report.main(sys.argv[1:]); print('torch' in sys.modules)"
    done = run_script("-c", code, "curves", two_seeds(tmp_path), "--only", "alpha", "--dpi", "50", "--out", tmp_path / "o")
    assert done.stdout.splitlines()[-1] == "False", done.stderr
    (tmp_path / "empty").mkdir()
    done = run_script("tools/report.py", "curves", tmp_path / "empty", "--out", tmp_path / "o")
    assert done.returncode == 1 and done.stderr.startswith(f"report.py: {tmp_path / 'empty'}: no metrics.jsonl")
    assert "--after" in run_script("tools/report.py", "tokens", "--help").stdout


def test_rows_show_every_seed_and_the_mean(tmp_path):
    text = "row,seed,accuracy\nsgpo,0,0.9\nsgpo,1,0.7\ngrpo,0,0.5\n"
    (tmp_path / "table.csv").write_text(text)
    rows = report.read_rows(tmp_path / "table.csv", "accuracy")
    assert rows == {"sgpo": [0.9, 0.7], "grpo": [0.5]}
    (axes,) = report.draw_rows(rows, "accuracy").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["sgpo", "grpo"]
    assert [container.lines[0].get_xdata()[0] for container in axes.containers] == pytest.approx([0.8, 0.5])
    (bar,) = axes.containers[0].lines[2][0].get_segments()
    assert bar[:, 0].tolist() == pytest.approx([0.7, 0.9])  # stdev 0.1 sqrt 2 over sqrt 2
    report.main(["rows", str(tmp_path / "table.csv"), "--out", str(tmp_path / "pictures/table")])
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"table.png", "table.svg"}
    (tmp_path / "table.csv").write_text(text + "hpt,0,oops\n")
    with pytest.raises(ValueError, match="table.csv:5: no row with a number in 'accuracy'.*oops"):
        report.read_rows(tmp_path / "table.csv", "accuracy")
    knobs = report.draw_rows({"delta=0.1": [0.5, 0.6], "delta=inf": [0.7, 0.8], "gamma=1.0": [0.9, 0.9]}, "accuracy").axes
    assert [one.get_xlabel() for one in knobs] == ["delta", "gamma"]
    assert [label.get_text() for label in knobs[0].get_xticklabels()] == ["0.1", "inf"]
    assert [c.lines[0].get_ydata()[0] for c in knobs[0].containers] == pytest.approx([0.55, 0.75])


# ---------------------------------------------------------------------------------------------------- the map


def arguments(command, out, **changes):
    flags = {"data": TINY_TEST, "model": TINY_BASE, "out": out, "max_new_tokens": 32} | changes
    return [command, *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """(the page's data, its file, folder of the model after): the base model and one with other weights."""
    folder = tmp_path_factory.mktemp("map")
    model, tokenizer = load_model(str(TINY_BASE), dtype=torch.float32, device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.05 * parameter.data.std() * torch.randn(parameter.shape, generator=generator)
    save_model(model, tokenizer, folder / "after")
    page = report.main(arguments("tokens", folder / "page.html", after=folder / "after", top=3))
    return page, folder / "page.html", folder / "after"


@pytest.fixture(scope="module")
def tiny():
    return load_model(str(TINY_BASE), dtype=torch.float32, device="cpu")


def by_transformers(folder, problem, response_ids):
    """transformers' log-probabilities (T, V) with and without the strategy: no packing, no cache, no chunks."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    sides = []
    for messages in (guided_messages(problem.problem, problem.strategy), auto_messages(problem.problem)):
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer.encode(text, add_special_tokens=False)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response_ids])).logits[0, len(prompt) - 1 : -1]
        sides.append(torch.log_softmax(logits, -1))
    return *sides, tokenizer


@pytest.mark.parametrize("view", [0, 1])
def test_the_map_equals_transformers(page, view):
    data, _, after = page
    tokens = data["views"][view]["tokens"]
    ids = [token["id"] for token in tokens]
    assert ids == [token["id"] for token in data["views"][0]["tokens"]]
    guided, unguided, tokenizer = by_transformers([TINY_BASE, after][view], data["problem"], ids)
    want = [F.kl_div(unguided[t], guided[t], log_target=True, reduction="sum").item() for t in range(len(ids))]
    assert [token["divergence"] for token in tokens] == pytest.approx(want, abs=2e-5)
    assert max(want) > 0.3 and ids[-1] == tokenizer.eos_token_id
    for side, log_p in (("guided", guided), ("auto", unguided)):
        of_ids = [log_p[t, ids[t]].item() for t in range(len(ids))]
        assert [token[f"logp_{side}"] for token in tokens] == pytest.approx(of_ids, abs=2e-5)
        for t, token in enumerate(tokens):
            best = log_p[t].exp().topk(3)
            assert [p for _, _, p in token[f"top_{side}"]] == pytest.approx(best.values.tolist(), abs=2e-5)
            assert token[f"top_{side}"][0][:2] == (best.indices[0].item(), tokenizer.decode([best.indices[0]]))
    rates = data["views"][0]["totals"]
    assert rates["p_guide"] == 1.0 and rates["p_auto"] < 1.0  # the tiny world's base model: about half of them right alone


def test_exactly_the_tokens_above_delta_are_dropped(page, tiny):
    tokens = page[0]["views"][0]["tokens"]
    delta = sorted(token["divergence"] for token in tokens)[-2]  # itself: a token at the limit is kept
    ids = [token["id"] for token in tokens]
    tokens = token_map.token_map(*tiny, page[0]["problem"], ids, delta=delta, top=1)
    assert [token["kept"] for token in tokens] == [token["divergence"] <= delta for token in tokens]
    assert sum(not token["kept"] for token in tokens) == 1


def test_totals_by_hand():
    values = [(0.5, True, -1.0, -2.0), (3.0, False, -0.5, -0.25), (0.1, True, 0.0, -0.75)]
    tokens = [dict(zip(("divergence", "kept", "logp_guided", "logp_auto"), row, strict=True)) for row in values]
    want = {"tokens": 3, "divergence_sum": 3.6, "divergence_mean": 1.2, "kept": 2 / 3, "loss": 0.2}
    assert token_map.totals(tokens) == pytest.approx(want | {"logp_guided": -1.5, "logp_auto": -3.0})


def test_the_target_is_the_correct_response_most_probable_alone(tmp_path, tiny, worker, monkeypatch, capsys):
    tokenizer = tiny[1]
    problem = next(p for p in load_problems(TINY_TEST, worker) if p.id == "tiny-jako-35")
    # the last is the most probable of all but wrong; of the two correct ones the strategy, and the mean over tokens, prefer
    # the first, but the policy alone the second
    texts, correct = ["jako add 3 5 = 8, jako inc 8 = 9", "jako sub", "jako"], [True, True, False]
    responses = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    sides = [by_transformers(TINY_BASE, problem, response)[:2] for response in responses]
    guided, alone = (
        [sum(side[k][t, one].item() for t, one in enumerate(ids)) for side, ids in zip(sides, responses, strict=True)]
        for k in range(2)
    )
    assert guided[0] > guided[1] and alone[2] > alone[1] > alone[0] and alone[0] / 13 > alone[1] / 2
    groups = {problem.id: (responses, correct)}
    monkeypatch.setattr(token_map, "sample_group", lambda m, t, w, p, *_, **__: groups.get(p.id, ([[5]], [False])))

    def find(**changes):
        args = token_map.build_parser().parse_args(arguments("tokens", "x", **changes))
        return next(token_map.find_targets(*tiny, worker, args))

    assert find() == (problem, responses[1])  # the first problem that has one
    assert "tiny-gano-54: none of 4 guided responses is correct" in capsys.readouterr().out
    (tmp_path / "plain.jsonl").write_text('{"id": "p", "problem": "1+1?", "answer": "2"}\n')
    wrong = {"no correct guided response": {"id": "tiny-gano-54"}, "no row with the id 'nobody'": {"id": "nobody"}}
    for message, changes in (wrong | {"no row has a strategy": {"data": tmp_path / "plain.jsonl"}}).items():
        with pytest.raises(ValueError, match=message):
            find(**changes)


@pytest.mark.parametrize("flags", [{"delta": 0}, {"delta": "inf"}, {"top": 0}, {"group_guided": 0}, {"out": "/nowhere/x.html"}])
def test_bad_settings_are_refused_before_anything_is_loaded(flags):
    (flag,) = flags
    with pytest.raises(ValueError, match=f"--{flag}|/nowhere/x.html"):
        report.main(arguments("tokens", flags.pop("out", "x.html"), model="no such model", **flags))


def test_after_must_have_the_same_vocabulary(page, tmp_path):
    model, tokenizer = load_model(str(page[2]), dtype=torch.float32, device="cpu")
    tokenizer.add_tokens(["extra"])
    save_model(model, tokenizer, tmp_path / "other")
    with pytest.raises(ValueError, match="its vocabulary is not that of"):
        report.main(arguments("tokens", tmp_path / "x", after=tmp_path / "other"))


def test_words_get_their_blanks_back_and_bytes_their_names(tiny):
    tokenizer = tiny[1]
    ids = tokenizer.encode("gano add 5 4 = 9, \\boxed{ 0}", add_special_tokens=False) + [tokenizer.eos_token_id]
    texts = token_map.token_texts(tokenizer, ids)
    assert [text for _, text in texts] == ["gano", "add", "5", "4", "=", "9", ",", "\\boxed{", "0", "}", "<|im_end|>"]
    assert "".join(blank + text for blank, text in texts) == tokenizer.decode(ids) and texts[1][0] == " "
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(tokenizer_models.BPE(vocab={c: i for i, c in enumerate(alphabet)} | {"Ġa": 256}, merges=[("Ġ", "a")]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    texts = token_map.token_texts(tokenizer, tokenizer.encode("b a\né a"))
    assert texts == [("", text) for text in ("b", " a", "\n", "Ã", "©", " a")]  # the two bytes of é by their names


def test_divergence_is_the_mean_over_targets(tmp_path, tiny, worker):
    lines = report.main(arguments("divergence", tmp_path / "d.csv", problems=2))
    args, want = token_map.build_parser().parse_args(arguments("divergence", "x")), {}
    targets = token_map.find_targets(*tiny, worker, args)
    for problem, response in (next(targets), next(targets)):
        for token in token_map.token_map(*tiny, problem, response, delta=1.0, top=1):
            want.setdefault(token["text"], []).append(token["divergence"])
    written = list(csv.DictReader((tmp_path / "d.csv").read_text().splitlines()))
    means = {text: sum(values) / len(values) for text, values in want.items()}
    assert {line["token"]: float(line["mean_d"]) for line in written} == pytest.approx(means, abs=1e-6)
    assert sum(int(line["count"]) for line in written) == sum(map(len, want.values()))
    assert lines[0]["token"] in sweep.OPERATIONS and lines[0]["mean_d"] > 0.4


# ---------------------------------------------------------------------------------------------------- the page

HOSTILE = ["<script>", "</script>", "<!--", "&amp;", '"', "'", "\n", " ", ".\n\n", "\t", "\u202e", " the", "{{id}}"]


def made_up_token(index, text, divergence=0.25, **changes):
    token = {"id": index, "text": text, "blank": "", "divergence": divergence, "kept": divergence <= 1.0}
    guided, auto = ([(index, text, p), (index + 1, "<i>&", 0.00001)] for p in (0.5, 0.25))
    return token | {"logp_auto": math.log(0.25), "logp_guided": math.log(0.5), "top_auto": auto, "top_guided": guided} | changes


def made_up_page(*tokens):
    strategy = Strategy("<b>type</b>", 'a <i>"strategy"</i> & more', ("<script>alert(1)</script>",))
    problem = SimpleNamespace(id="<id>", problem="if a < b & b > c:\n</div>", answer="<u>0</u>", strategy=strategy)
    totals = token_map.totals(tokens) | {"p_auto": 0.5, "p_guide": 1.0}
    views = [{"name": name, "model": "a<b>", "tokens": tokens, "totals": totals} for name in ("before", "after")]
    return {"problem": problem, "delta": 1.0, "views": views, "settings": "--data a<b>.jsonl"}


class PageParser(HTMLParser):
    """Collects tags and texts, and fails on any that is not closed in order."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.text, self.scripts = [], [], {}, []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "script":
            self.scripts.append(data)
        for tag, attrs in self.open:
            key = attrs.get("id", tag)
            self.text[key] = self.text.get(key, "") + data


def test_the_page_escapes_everything():
    parsed = PageParser(token_map.page_html(made_up_page(*(made_up_token(i, text) for i, text in enumerate(HOSTILE)))))
    counts = {tag: sum(name == tag for name, _ in parsed.tags) for tag in ("script", "b", "i", "style", "span", "section")}
    # 13 tokens twice, ticks, headings and the legend's sample; nothing that a token or the problem brought along
    assert counts == {"script": 2, "b": 0, "i": 0, "style": 1, "span": 2 * len(HOSTILE) + 6 + 4 + 1, "section": 6}
    shown = [parsed.text[f"token-{m}"] for m in range(1, len(HOSTILE) + 1)]
    assert shown == ["<script>", "</script>", "<!--", "&amp;", '"', "'", "⏎", "␣", ".⏎⏎", "⇥", "\\u202e", " the", "{{id}}"]
    assert "if a < b & b > c:\n</div>" in parsed.text["div"] and parsed.text["li"] == "<script>alert(1)</script>"
    assert 'a <i>"strategy"</i> & more' in parsed.text["p"] and "reference answer: <u>0</u>" in parsed.text["p"]
    assert "--data a<b>.jsonl" in parsed.text["p"] and "<id>" in parsed.text["title"]
    tips = json.loads(parsed.scripts[0])
    assert [len(view) for view in tips] == [len(HOSTILE)] * 2
    line = "d = 0.2500 nats, kept (≤ 1); p = 0.5000 with strategy, 0.2500 alone"
    tops = [[["<script>", p, True], ["<i>&", "1e-05", False]] for p in ("0.5000", "0.2500")]
    assert tips[1][0] == ["token 1 of 13: <script>", line, *tops]
    assert tips[0][11][2][0][0] == "␣the"  # in the table blanks can be seen


def test_the_page_places_colours_marks_dropped_tokens_and_keeps_lines():
    tokens = [made_up_token(i, "x", d) for i, d in enumerate((0.0, 0.25, 1.0, 1.5, -1e-9))]
    tokens += [made_up_token(5, "b", blank=" "), made_up_token(6, ".\n\n"), made_up_token(7, "c")]
    parsed = PageParser(token_map.page_html(made_up_page(*tokens)))
    spans = {attrs["id"]: attrs for tag, attrs in parsed.tags if tag == "span" and "id" in attrs}
    spans = [spans[f"token-{m}"] for m in range(1, 6)]
    assert [span["class"] for span in spans] == ["t", "t", "t", "t masked", "t"]
    assert [span["style"] for span in spans] == ["--t:0.000", "--t:0.500", "--t:1.000", "--t:1.000", "--t:0.000"]
    assert "x b.⏎⏎\n\nc" in parsed.text["div"]


def test_the_page_needs_nothing_from_outside(page):
    data, file, _ = page
    text = file.read_text(encoding="utf-8")
    parsed = PageParser(text)
    assert not any({"src", "href"} & set(attrs) for _, attrs in parsed.tags)
    assert not any(word in text for word in ("http:", "https:", "//", "@import", "url(", "{{"))
    count = len(data["views"][0]["tokens"])
    ids = [attrs["id"] for tag, attrs in parsed.tags if "tabindex" in attrs]
    assert ids == [f"token-{m}" for m in range(1, count + 1)] + [f"after-{m}" for m in range(1, count + 1)]
    assert data["problem"].problem in parsed.text["div"] and "gano add 5 4" in " ".join(parsed.text["div"].split())
