"""Pictures of runs, the token map and its page."""

import html
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from model import load_model, save_model
from strategy import Strategy, auto_messages, guided_messages
from tests.common import ROOT, TINY_BASE, run_script, write_rows
from tools import report, token_map


def step_record(step, reward, **changes):
    record = {"stage": "sgpo", "step": step, "reward_auto": reward, "reward_guided": 0.9, "alpha": 0.4, "entropy": 0.1}
    return record | {"length_auto": 20.0, "length_guided": 22.0, "loss": 0.5} | changes


def eval_record(step, accuracy, guided=False):
    return {"stage": "eval", "step": step, "accuracy": accuracy, "guided": guided}


def write_run(folder, records, **config):
    folder.mkdir(parents=True)
    config = {"method": "sgpo", "seed": 0, "learning_rate": 1e-4, "out": str(folder)} | config
    return write_rows(folder / "metrics.jsonl", [{"config": config}, *records])


def two_seeds(root):
    for seed, rewards in enumerate([(0.2, 0.4, 0.6), (0.4, 0.8)]):
        steps = [step_record(step, reward) for step, reward in enumerate(rewards, start=1)]
        write_run(root / f"sgpo/{seed}", [eval_record(0, 0.5), *steps], seed=seed)
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


def test_a_broken_line_is_named_and_an_unfinished_one_left_out(tmp_path, capsys):
    path = write_run(tmp_path / "a", [step_record(1, 0.5)])
    with path.open("a") as file:
        file.write('{"stage": "sgpo", "st')
    assert len(report.read_run(path).steps) == 1
    assert f"{path}:3: the last line is unfinished" in capsys.readouterr().out
    with path.open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match=f"^{path}:3: Unterminated string"):
        report.read_run(path)
    path.write_text('{"stage": "sgpo"}\n')
    with pytest.raises(ValueError, match=f"^{path}:1: no settings of a run"):
        report.read_run(path)


def test_a_group_is_one_setting_under_several_seeds(tmp_path):
    good = two_seeds(tmp_path)
    groups = report.read_groups([good + "/"])
    assert [run.config["seed"] for run in groups["sgpo"]] == [0, 1]
    write_run(tmp_path / "a/0", [step_record(1, 0.5)])
    write_run(tmp_path / "a/1", [step_record(1, 0.5)], seed=1, learning_rate=3e-4)
    with pytest.raises(ValueError, match="a/0/metrics.jsonl: .* seeds, not in learning_rate$"):
        report.read_groups([str(tmp_path / "a")])
    write_run(tmp_path / "sgpo/2", [step_record(1, 0.5)], seed=1)
    with pytest.raises(ValueError, match="sgpo/1/.* and .*sgpo/2/.* have the same seeds"):
        report.read_groups([good])
    with pytest.raises(ValueError, match="two groups are called '0'"):
        report.read_groups([str(tmp_path / "a/0"), str(tmp_path / "sgpo/0")])


def test_a_figure_shows_mean_band_and_seeds(tmp_path):
    groups = report.read_groups(three_methods(tmp_path))
    panels, both = report.panel_curves(groups, 5), ["sgpo", "grpo"]
    want = {"reward": both, "entropy": both, "length": both, "pass_rates": ["sgpo"], "alpha": ["sgpo"]}
    assert {name: list(curves) for name, curves in panels.items()} == want | {"accuracy": ["sgpo", "sft"]}
    # of two evaluations at one step the later one, none with the strategy in the prompt, and not smoothed
    assert panels["accuracy"]["sft"]["accuracy"]["mean"] == [0.75, 0.5]
    figure = report.draw(groups, 2)
    reward, *_, accuracy = figure.axes
    assert list(reward.lines[0].get_ydata()) == pytest.approx([0.3, 0.45, 0.5])
    band = reward.collections[0].get_paths()[0].vertices
    assert {round(float(y), 6) for x, y in band if x == 2} == {0.3, 0.6}  # 0.45 +- 0.15
    assert band[:, 0].max() == 2 and len(reward.collections[1].get_paths()) == 0  # one seed: no band
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["sgpo (2 seeds)", "grpo (1 seed)", "sft (1 seed)"]
    assert accuracy.lines[-1].get_color() == report.COLOURS[2]  # sft is the third group, also where it is the second line


def test_the_command_draws_without_torch_and_ends_with_a_message(tmp_path):
    code = "import sys; from tools import report; report.main(sys.argv[1:]); print('torch' in sys.modules)"
    write_run(tmp_path / "sgpo/0", [eval_record(0, 0.5), eval_record(9, 0.7)])
    done = run_script("-c", code, "curves", tmp_path / "sgpo", "--out", tmp_path / "sgpo")
    assert done.stdout.splitlines()[-1] == "False", done.stderr
    assert (tmp_path / "sgpo.png").exists() and b"<text" not in (tmp_path / "sgpo.svg").read_bytes()  # text as paths
    done = run_script("tools/report.py", "curves", tmp_path / "none", "--out", "x")
    assert done.returncode == 1 and done.stderr.startswith(f"report.py: {tmp_path}/none: no metrics.jsonl")


def test_rows_show_every_seed_and_the_mean(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("row,seed,accuracy\nsgpo,0,0.9\nsgpo,1,0.7\ngrpo,0,0.5\n")
    (axes,) = report.draw_rows(report.read_rows(path)).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["sgpo", "grpo"]
    assert [container.lines[0].get_xdata()[0] for container in axes.containers] == pytest.approx([0.8, 0.5])
    (bar,) = axes.containers[0].lines[2][0].get_segments()
    assert bar[:, 0].tolist() == pytest.approx([0.7, 0.9])  # stdev 0.1 sqrt 2 over sqrt 2
    for name in ("one", "two"):
        report.main(["rows", str(path), "--out", str(tmp_path / name)])
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    path.write_text(path.read_text() + "hpt,0,oops\n")
    with pytest.raises(ValueError, match="table.csv:5: no row with an accuracy.*oops"):
        report.read_rows(path)


def arguments(command, out, **changes):
    flags = {"data": ROOT / "data/tiny/test.jsonl", "model": TINY_BASE, "out": out, "max_new_tokens": 32} | changes
    words = [command]
    for name, value in flags.items():
        words += [f"--{name}", str(value)]
    return words


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """(the page's data, its file, folder of the model after): the base model and one with other weights."""
    folder = tmp_path_factory.mktemp("map")
    model, tokenizer = load_model(str(TINY_BASE), dtype=torch.float32, device="cpu")
    for parameter in model.parameters():
        parameter.data *= 1.1
    save_model(model, tokenizer, folder / "after")
    page = report.main(arguments("tokens", folder / "page.html", after=folder / "after", top=3, delta=0.6))
    return page, folder / "page.html", folder / "after"


@pytest.mark.parametrize("view", [0, 1])
def test_the_map_equals_transformers(page, view):
    data, _, after = page
    problem, tokens = data["problem"], data["views"][view]["tokens"]
    ids = [token["id"] for token in tokens]
    assert ids == [token["id"] for token in data["views"][0]["tokens"]]
    folder = [TINY_BASE, after][view]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    log_p = {}  # side -> (T, V), without packing, cache and chunks
    prompts = {"guided": guided_messages(problem.problem, problem.strategy), "auto": auto_messages(problem.problem)}
    for side, messages in prompts.items():
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer.encode(text, add_special_tokens=False)
        with torch.no_grad():
            log_p[side] = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    want = F.kl_div(log_p["auto"], log_p["guided"], log_target=True, reduction="none").sum(-1).tolist()
    assert [token["divergence"] for token in tokens] == pytest.approx(want, abs=2e-5)
    assert [token["kept"] for token in tokens] == [d <= 0.6 for d in want] and max(want) > 0.6
    for side in log_p:
        of_ids = log_p[side][range(len(ids)), ids].tolist()
        assert [token[f"logp_{side}"] for token in tokens] == pytest.approx(of_ids, abs=2e-5)
        entropy = torch.distributions.Categorical(logits=log_p[side]).entropy().tolist()
        assert [token[f"entropy_{side}"] for token in tokens] == pytest.approx(entropy, abs=2e-5)
        for token, best in zip(tokens, log_p[side].exp().topk(3).values.tolist(), strict=True):
            assert [p for _, _, p in token[f"top_{side}"]] == pytest.approx(best, abs=2e-5)
            assert all(text == tokenizer.decode([one]) for one, text, _ in token[f"top_{side}"])
    rates = data["views"][0]["totals"]
    assert rates["p_guide"] == 1.0 and rates["p_auto"] < 1.0  # the tiny world's base model: about half of them right alone


@pytest.fixture
def made_up_model(monkeypatch):
    """Two problems have correct responses; a response is the list of its tokens' (log p alone, log p guided, d_t)."""
    long = [(-0.3, 0.0, 0.5)] * 4
    short = [(-1.0, -2.0, 0.1)]
    wrong = [(-0.1, -0.1, 9.0)]
    groups = {"tiny-jako-35": ([long, short, wrong], [True, True, False]), "tiny-nuba-98": ([wrong, long], [False, True])}

    def sample(model, tokenizer, worker, problem, args, *, guided):
        return groups.get(problem.id, ([wrong], [False]))

    def tokens(model, tokenizer, problem, response, *, delta, top):
        return [
            {"logp_auto": auto, "logp_guided": guided, "divergence": d, "text": str(d), "kept": d <= delta}
            | {"entropy_auto": 2 * d, "entropy_guided": d}
            for auto, guided, d in response
        ]

    monkeypatch.setattr(token_map, "sample_group", sample)
    monkeypatch.setattr(token_map, "token_map", tokens)
    monkeypatch.setattr(token_map, "load_model", lambda *_, **__: (None, None))
    return long, short


def test_the_target_is_the_correct_response_most_probable_alone(tmp_path, made_up_model, worker, capsys):
    def find(**changes):
        args = token_map.build_parser().parse_args(arguments("tokens", "x", **changes))
        return next(token_map.find_targets(None, None, worker, args))

    problem, target = find()  # the sum over tokens decides, not the mean, and the guided side has no say
    assert (problem.id, target) == ("tiny-jako-35", made_up_model[1])
    assert "tiny-gano-54: none of 4 guided responses is correct" in capsys.readouterr().out
    (tmp_path / "plain.jsonl").write_text('{"id": "p", "problem": "1+1?", "answer": "2"}\n')
    wrong = {"no correct guided response": {"id": "tiny-gano-54"}, "no row with the id 'nobody'": {"id": "nobody"}}
    for message, changes in (wrong | {"no row has a strategy": {"data": tmp_path / "plain.jsonl"}}).items():
        with pytest.raises(ValueError, match=message):
            find(**changes)


def test_divergence_is_the_mean_over_the_targets_of_many_problems(tmp_path, made_up_model):
    report.main(arguments("divergence", tmp_path / "d.csv", problems=2, delta=0.2))
    with pytest.raises(ValueError, match="--delta must be"):
        report.main(arguments("divergence", "x", model="no such model", delta=0))
    assert (tmp_path / "d.csv").read_text() == (
        "token,count,mean_d,dropped,entropy_alone,entropy_guided\n0.5,4,0.5,1.0,1.0,0.5\n0.1,1,0.1,0.0,0.2,0.1\n"
    )


def test_words_get_their_blanks_back_and_bytes_their_names():
    tokenizer = AutoTokenizer.from_pretrained(TINY_BASE)
    ids = tokenizer.encode("gano add 5 4 = 9, \\boxed{ 0}", add_special_tokens=False) + [tokenizer.eos_token_id]
    texts = token_map.token_texts(tokenizer, ids)
    assert [text for _, text in texts] == ["gano", "add", "5", "4", "=", "9", ",", "\\boxed{", "0", "}", "<|im_end|>"]
    assert "".join(blank + text for blank, text in texts) == tokenizer.decode(ids) and texts[1][0] == " "
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate([*alphabet, "Ġa"])}
    bpe = Tokenizer(tokenizer_models.BPE(vocab=vocab, merges=[("Ġ", "a")]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    texts = token_map.token_texts(tokenizer, tokenizer.encode("b a\né a"))
    assert texts == [("", text) for text in ("b", " a", "\n", "Ã", "©", " a")]  # the two bytes of é by their names


# token -> what the page shows, with the line ends after it
HOSTILE = {"<script>": "<script>", "</script>": "</script>", "<!--": "<!--", "&amp;": "&amp;", '"': '"', "\n": "⏎\n", " ": "␣"}
HOSTILE |= {".\n\n": ".⏎⏎\n\n", "\t": "⇥", "\u202e": "\\u202e", " the": " the", "{{id}}": "{{id}}"}


def made_up_page(tokens):
    """The page of tokens (text, d_t)."""
    top = [(0, "<i>&", 0.00001), (1, "a", 0.5)]
    same = {"id": 1, "blank": "", "logp_auto": -1.0, "logp_guided": 0.0, "top_auto": top, "top_guided": top}
    tokens = [same | {"text": text, "divergence": d, "kept": d <= 1.0} for text, d in tokens]
    strategy = Strategy("<b>type</b>", 'a <i>"strategy"</i> & more', ("<script>alert(1)</script>",))
    problem = SimpleNamespace(id="<id>", problem="if a < b & b > c:\n</div>", answer="<u>0</u>", strategy=strategy)
    totals = token_map.totals(tokens) | {"p_auto": 0.5, "p_guide": 1.0}
    views = [{"name": name, "model": "a<b>", "tokens": tokens, "totals": totals} for name in ("before", "after")]
    return token_map.page_html({"problem": problem, "delta": 1.0, "views": views, "settings": "--data a<b>.jsonl"})


def spans(page):
    """(class, place on the colour scale, text with the line ends after it) of each token."""
    found = re.findall(r'<span class="(t|t masked)" style="--t:([\d.]+)" data[^>]*>(.*?)</span>(\n*)', page, re.DOTALL)
    return [(kind, float(place), html.unescape(text) + ends) for kind, place, text, ends in found]


def test_the_page_escapes_everything():
    page = made_up_page([(text, 0.25) for text in HOSTILE])
    names = re.findall(r"<([a-z]\w*)", page)
    assert names.count("script") == 2 and not {"b", "i", "u"} & set(names)  # nothing that a token or the problem brought along
    assert names.count("span") == 2 * 12 + 6 + 4 + 1  # 12 tokens twice, ticks, headings and the legend's sample
    assert [text for _, _, text in spans(page)] == 2 * list(HOSTILE.values())
    for text in ("if a < b & b > c:\n</div>", "<script>alert(1)</script>", 'a <i>"strategy"</i> & more', "<u>0", "--data a<b>"):
        assert html.escape(text) in page
    tips = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    line = "d = 0.2500 nats, kept (≤ 1); p = 1.0000 with strategy, 0.3679 alone"
    top = [["<i>&", "1e-05", False], ["a", "0.5000", True]]
    assert tips[1][10] == ["token 11 of 12: ␣the", line, top, top]


def test_the_page_places_colours_marks_dropped_tokens_and_adds_them_up():
    page = made_up_page([("x", d) for d in (0.0, 0.25, 1.0, 1.5, -1e-9)])
    assert [kind for kind, _, _ in spans(page)] == 2 * ["t", "t", "t", "t masked", "t"]
    assert [place for _, place, _ in spans(page)] == 2 * [0.0, 0.5, 1.0, 1.0, 0.0]
    cells = re.findall(r'<td class="n">([^<]*)</td>', page)[::2]  # one of the two models
    assert cells == ["5", "2.7500", "0.5500", "80.0%", "0.2500", "0.000", "-5.000", "1.000", "0.500"]  # loss: 1.25 / 5


def test_the_page_needs_nothing_from_outside(page):
    text = page[1].read_text(encoding="utf-8")
    assert not re.search(r"<[^>]* (src|href)=", text)
    assert not any(word in text for word in ("http:", "https:", "//", "@import", "url(", "{{"))
    assert page[0]["problem"].problem in text and ">gano</span> <span" in text
