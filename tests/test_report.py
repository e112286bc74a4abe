"""Pictures, the token map and its page."""

import csv
import itertools
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import loss as losses
from eval import load_problems
from grader import MathWorker
from model import load_model, save_model
from strategy import Strategy, auto_messages, guided_messages
from tests.common import ROOT, TINY_BASE, run_script
from tools import bench, report, sweep


def report_step(step, reward, **changes):
    """An RL step's record, with the keys that the curves need, and one that they do not."""
    record = {"stage": "sgpo", "step": step, "reward_auto": reward, "reward_guided": 0.9, "alpha": 0.4, "entropy": 0.1}
    return record | {"length_auto": 20.0, "length_guided": 22.0, "loss": 0.5} | changes


def report_run(folder, records, *, end="\n", **config):
    """Write a metrics.jsonl with these records below its first line; the path."""
    folder.mkdir(parents=True)
    config = {"method": "sgpo", "seed": 0, "learning_rate": 1e-4, "out": str(folder)} | config
    lines = [json.dumps(record) if isinstance(record, dict) else record for record in [{"config": config}, *records]]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + end)
    return folder / "metrics.jsonl"


def report_two_seeds(root):
    """Seed 0 has three steps and seed 1, still going, two; both have evaluations."""
    evals = [{"stage": "eval", "step": 0, "accuracy": 0.5, "guided": False, "when": "base"}]
    report_run(root / "sgpo/0", [*evals, *(report_step(t, r) for t, r in ((1, 0.2), (2, 0.4), (3, 0.6)))])
    report_run(root / "sgpo/1", [*evals, report_step(1, 0.4), report_step(2, 0.8)], seed=1)
    return str(root / "sgpo")


def test_report_band_by_hand_over_seeds_of_different_lengths(tmp_path):
    groups = report.read_groups([report_two_seeds(tmp_path)])
    plain = report.panel_curves(groups, 1)["reward"]["sgpo"]["reward_auto"]
    assert plain["step"] == [1, 2, 3] and plain["seeds"] == [2, 2, 1]
    assert plain["mean"] == pytest.approx([0.3, 0.6, 0.6])
    # sd(0.2, 0.4) = 0.1 sqrt(2), divided by sqrt(2); sd(0.4, 0.8) = 0.2 sqrt(2)
    assert plain["stderr"] == [pytest.approx(0.1), pytest.approx(0.2), None]
    smooth = report.panel_curves(groups, 2)["reward"]["sgpo"]["reward_auto"]
    assert smooth["mean"] == pytest.approx([0.3, 0.45, 0.5])  # seed 0: 0.2 0.3 0.5, seed 1: 0.4 0.6
    assert smooth["stderr"] == [pytest.approx(0.1), pytest.approx(0.15), None]


def test_report_trailing_mean_counts_steps_not_records():
    assert report.trailing_mean({1: 1.0, 2: 3.0, 5: 7.0, 6: 8.0}, 3) == {1: 1.0, 2: 2.0, 5: 7.0, 6: 7.5}


def test_report_three_seeds_by_hand():
    curve = report.over_seeds([{7: 1.0}, {7: 2.0}, {7: 6.0}])
    assert curve == {"step": [7], "mean": [3.0], "stderr": [pytest.approx(math.sqrt(7 / 3))], "seeds": [3]}


@pytest.mark.parametrize(
    "bad, message",
    [
        ('{"stage": "sgpo", "step', "not valid JSON"),
        ("", "not valid JSON"),
        ("[1]", "expected an object, got [1]"),
        ({"step": 2}, "stage is None"),
        (report_step(2, 0.5, stage="sgqo"), "stage is 'sgqo'"),
        ({k: v for k, v in report_step(2, 0.5).items() if k != "entropy"}, "no entropy"),
        ({k: v for k, v in report_step(2, 0.5).items() if k != "alpha"}, "no alpha"),
        ({k: v for k, v in report_step(2, 0.5).items() if k != "length_guided"}, "no length_guided"),
        (report_step(2, math.nan), "reward_auto is nan"),
        (report_step(2, 0.5, alpha="0.4"), "alpha is '0.4'"),
        (report_step(2, True), "reward_auto is True"),
        (report_step(2.0, 0.5), "step is 2.0"),
        (report_step(1, 0.5), "step 1 after step 1"),
        ({"stage": "eval", "step": 1, "guided": False}, "no accuracy"),
        ({"stage": "eval", "step": 1, "accuracy": 0.5}, "guided is None"),
    ],
)
def test_report_bad_line_is_named(tmp_path, bad, message):
    path = report_run(tmp_path / "a", [report_step(1, 0.5), bad, report_step(3, 0.5)])
    with pytest.raises(ValueError) as error:
        report.read_run(path)
    assert str(error.value).startswith(f"{path}:3: ") and message in str(error.value)


def test_report_first_line_must_be_the_config(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(report_step(1, 0.5)) + "\n")
    with pytest.raises(ValueError, match="metrics.jsonl:1: the first line must hold the run's config"):
        report.read_run(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="empty"):
        report.read_run(tmp_path / "metrics.jsonl")


def test_report_unfinished_last_line_is_left_out_and_said(tmp_path, capsys):
    going = report_run(tmp_path / "going", [report_step(1, 0.5), '{"stage": "sgpo", "st'], end="")
    assert [record["step"] for record in report.read_run(going).steps] == [1]
    assert f"{going}:3: the last line is unfinished" in capsys.readouterr().out
    whole = report_run(tmp_path / "whole", [report_step(1, 0.5), report_step(2, 0.5)], end="")
    assert [record["step"] for record in report.read_run(whole).steps] == [1, 2]  # only the line end is still to come
    ended = report_run(tmp_path / "ended", [report_step(1, 0.5), '{"stage": "sgpo", "st'])
    with pytest.raises(ValueError, match=r"metrics.jsonl:3: not valid JSON"):
        report.read_run(ended)


def test_report_groups_that_are_none(tmp_path):
    good = report_two_seeds(tmp_path)
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "nowhere"):
        with pytest.raises(ValueError, match=f"{folder}: no metrics.jsonl"):
            report.read_groups([good, str(tmp_path / folder)])
    with pytest.raises(ValueError, match="two groups are called 'sgpo'"):
        report.read_groups([good, good])
    report_run(tmp_path / "begun/0", [])
    with pytest.raises(ValueError, match="neither an RL step nor an evaluation"):
        report.read_groups([str(tmp_path / "begun")])
    with pytest.raises(ValueError, match="9 groups"):
        report.read_groups([f"{k}={good}" for k in range(9)])


def test_report_labels(tmp_path):
    good = report_two_seeds(tmp_path)
    report_run(tmp_path / "lr=3/0", [report_step(1, 0.5)])
    assert list(report.read_groups([f"Ours={good}", good + "/", f"{good}/1", str(tmp_path / "lr=3")])) == [
        "Ours",
        "sgpo",
        "1",
        "lr=3",
    ]
    assert [run.config["seed"] for run in report.read_groups([good])["sgpo"]] == [0, 1]


def test_report_a_group_is_one_setting_under_several_seeds(tmp_path):
    report_run(tmp_path / "a/0", [report_step(1, 0.5)])
    report_run(tmp_path / "a/1", [report_step(1, 0.5)], seed=1, learning_rate=3e-4)
    with pytest.raises(ValueError, match="learning_rate is 0.0001 in .*a/0/metrics.jsonl but 0.0003 in .*a/1/metrics.jsonl"):
        report.read_groups([str(tmp_path / "a")])
    for seed in (0, 1):
        report_run(tmp_path / f"b/{seed}", [report_step(1, 0.5)], seed=0)
    with pytest.raises(ValueError, match="both have seed 0"):
        report.read_groups([str(tmp_path / "b")])
    for seed in (0, 1):  # one data order, two sampling seeds: two seeds
        report_run(tmp_path / f"c/{seed}", [report_step(1, 0.5)], seed=0, sampling_seed=seed)
    assert len(report.read_groups([str(tmp_path / "c")])["c"]) == 2


def report_three_methods(root):
    """sgpo; grpo, which logs zeros for what it has not; and sft, which has no RL step. The arguments for main."""
    sgpo = report_two_seeds(root)
    grpo = [report_step(t, 0.5, stage="grpo", alpha=0.0, reward_guided=0.0, length_guided=0.0) for t in range(1, 9)]
    report_run(root / "grpo/0", grpo, method="grpo")
    at = dict(stage="eval", step=0)
    evals = [at | dict(accuracy=0.25, guided=False), at | dict(accuracy=0.75, guided=False), at | dict(accuracy=1, guided=True)]
    losses = [{"stage": stage, "step": 1, "loss": 2.0} for stage in ("sft", "sft_validation")]
    report_run(root / "sft/0", [evals[0], *losses, *evals[1:]], method="sft")
    return [sgpo, str(root / "grpo"), str(root / "sft")]


def test_report_methods_are_left_out_of_panels_they_have_nothing_for(tmp_path):
    panels = report.panel_curves(report.read_groups(report_three_methods(tmp_path)), 5)
    assert {name: list(curves) for name, curves in panels.items()} == {
        "reward": ["sgpo", "grpo"],
        "entropy": ["sgpo", "grpo"],
        "length": ["sgpo", "grpo"],
        "pass_rates": ["sgpo"],
        "alpha": ["sgpo"],
        "accuracy": ["sgpo", "sft"],
    }
    # of two evaluations at one step the later one, and none with the strategy in the prompt
    assert panels["accuracy"]["sft"]["accuracy"]["mean"] == [0.75]
    assert panels["pass_rates"]["sgpo"]["reward_guided"]["mean"] == pytest.approx([0.9, 0.9, 0.9])


def test_report_accuracy_is_not_smoothed(tmp_path):
    evals = [{"stage": "eval", "step": step, "accuracy": step / 10, "guided": False} for step in (0, 1, 2)]
    report_run(tmp_path / "a", evals)
    curve = report.panel_curves(report.read_groups([str(tmp_path / "a")]), 3)["accuracy"]["a"]["accuracy"]
    assert curve["mean"] == [0.0, 0.1, 0.2]


def test_report_reads_the_logs_that_training_wrote(tmp_path):
    for method in ("sgpo", "grpo"):
        (tmp_path / method).mkdir()
        log = (ROOT / f"results/tiny/{method}-1e-4-seed0.jsonl").read_text()
        (tmp_path / method / "metrics.jsonl").write_text(log)
    panels = report.panel_curves(report.read_groups([str(tmp_path / "sgpo"), str(tmp_path / "grpo")]), 1)
    assert panels["reward"]["grpo"]["reward_auto"]["step"] == list(range(1, 61))
    assert list(panels["alpha"]) == ["sgpo"] and panels["alpha"]["sgpo"]["alpha"]["mean"][0] == pytest.approx(0.59315, abs=1e-5)
    assert panels["accuracy"]["sgpo"]["accuracy"]["mean"] == pytest.approx([0.46875, 0.746875, 0.932292, 0.983333], abs=1e-5)


def test_report_figure_shows_mean_band_and_says_what_they_are(tmp_path):
    groups = report.read_groups(report_three_methods(tmp_path))
    figure = report.draw(report.panel_curves(groups, 2), ["reward", "accuracy"], list(groups), 2)
    reward, accuracy = figure.axes
    drawn = [list(line.get_ydata()) for line in reward.lines if line.get_linewidth() == 1.7]
    assert drawn[0][:2] == pytest.approx([0.3, 0.45]) and math.isnan(drawn[0][2])  # step 3 has one of two seeds: thin
    thin = [list(line.get_ydata()) for line in reward.lines if line.get_linewidth() == 0.7]
    assert math.isnan(thin[0][0]) and thin[0][1:] == pytest.approx([0.45, 0.5])
    band = reward.collections[0].get_paths()[0].vertices
    assert {round(float(y), 6) for x, y in band if x == 2} == {0.3, 0.6}  # 0.45 +- 0.15
    assert band[:, 0].max() == 2 and len(reward.collections[1].get_paths()) == 0  # one seed: no band
    assert reward.get_xlabel() == "RL step (trailing mean of 2 steps)" and accuracy.get_xlabel() == "RL step"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["sgpo (1 to 2 seeds)", "grpo (1 seed)", "sft (1 seed)"]
    caption = " ".join(legend.get_title().get_text().split())
    assert "band ± 1 standard error over seeds (one seed: no band)" in caption and "thin line" in caption
    assert accuracy.lines[-1].get_color() == report.COLOURS[2]  # sft is the third group, also where it is the second line


def test_report_a_single_point_shows_its_error(tmp_path):
    for seed, accuracy in ((0, 0.2), (1, 0.4)):
        evals = [{"stage": "eval", "step": 0, "accuracy": accuracy, "guided": False}]
        report_run(tmp_path / f"sft/{seed}", evals, seed=seed, method="sft")
    panels = report.panel_curves(report.read_groups([str(tmp_path / "sft")]), 1)
    figure = report.draw(panels, ["accuracy"], ["sft"], 1)
    (segment,) = figure.axes[0].collections[-1].get_segments()
    assert segment.tolist() == [[0.0, pytest.approx(0.2)], [0.0, pytest.approx(0.4)]]  # 0.3 +- 0.1


def test_report_pictures_are_written_and_reproducible(tmp_path, capsys):
    groups = report_three_methods(tmp_path)
    for out in ("one", "two"):
        report.main(["curves", *groups, "--out", str(tmp_path / out), "--dpi", "50"])
    names = [*report.PANELS, "overview"]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == sorted(
        f"{name}.{kind}" for name in names for kind in ("png", "svg")
    )
    for name in names:
        one, two = ((tmp_path / out / f"{name}.svg").read_bytes() for out in ("one", "two"))
        assert one == two and len(one) > 5_000
        assert b"<dc:date>" not in one and b"<text" not in one  # text as paths
        xml.etree.ElementTree.fromstring(one)
        png = (tmp_path / "one" / f"{name}.png").read_bytes()
        assert png[:8] == b"\x89PNG\r\n\x1a\n" and len(png) > 4_000
    width = int.from_bytes((tmp_path / "one/overview.png").read_bytes()[16:20], "big")
    assert width == round(3 * 4.6 * 50)
    said = capsys.readouterr().out
    assert "alpha: sgpo; without grpo, sft\n" in said and "accuracy: sgpo, sft; without grpo\n" in said


def test_report_only_the_pictures_asked_for(tmp_path):
    report.main(["curves", report_two_seeds(tmp_path), "--only", "overview", "alpha", "--out", str(tmp_path / "out")])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {f"{name}.{suffix}" for name in ("overview", "alpha") for suffix in ("png", "svg")}


def test_sweep_draws_what_it_ran(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(report, "main", calls.append)
    jobs = [sweep.Job("sgpo", 0, ())]
    sweep.draw_results("knobs", jobs, tmp_path / "runs", tmp_path)
    sweep.draw_results("table", jobs, tmp_path / "runs", tmp_path)
    assert [call[0] for call in calls] == ["rows", "rows", *["curves"] * len(sweep.CURVES)]
    assert {row for rows in sweep.CURVES.values() for row in rows} == {*sweep.METHODS, *sweep.ABLATIONS} - {"sft"}
    for call in calls:
        report.build_parser().parse_args(call)
    monkeypatch.setattr(sweep.importlib.util, "find_spec", lambda name: None)
    sweep.draw_results("table", jobs, tmp_path / "runs", tmp_path)
    assert "no pictures without matplotlib" in capsys.readouterr().out and len(calls) == 2 + len(sweep.CURVES)


def test_report_a_panel_that_no_group_has_is_not_drawn(tmp_path, capsys):
    _, grpo, _ = report_three_methods(tmp_path)
    report.main(["curves", grpo, "--out", str(tmp_path / "out"), "--dpi", "50"])
    assert {path.stem for path in (tmp_path / "out").iterdir()} == {"reward", "entropy", "length", "overview"}
    assert "alpha: not drawn; without grpo" in capsys.readouterr().out


def test_report_curves_load_no_torch(tmp_path):
    good = report_two_seeds(tmp_path)
    code = "import sys, report; report.main(sys.argv[1:]); print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "curves", good, "--out", str(tmp_path / "o")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("flags", [["--smooth", "0"], ["--dpi", "0"]])
def test_report_curves_refuse_bad_settings(tmp_path, flags):
    with pytest.raises(ValueError, match=f"{flags[0]} must be at least 1, got 0"):
        report.main(["curves", report_two_seeds(tmp_path), "--out", str(tmp_path / "o"), *flags])
    assert not (tmp_path / "o").exists()


def test_report_command_line_ends_with_a_message(tmp_path):
    command = [sys.executable, "tools/report.py", "curves", str(tmp_path), "--out", str(tmp_path / "o")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (
        done.returncode == 1
        and done.stderr == f"report.py: {tmp_path}: no metrics.jsonl in it or below, so this group has no run\n"
    )
    for flags in (["--smoot", "3"], ["--nonsense"]):  # no abbreviations
        with pytest.raises(SystemExit):
            report.build_parser().parse_args(["curves", "x", "--out", "y", *flags])


def report_args(out, /, **changes):
    flags = ["tokens", "--data", str(ROOT / "data/tiny/test.jsonl"), "--model", str(TINY_BASE), "--out", str(out)]
    return report.build_parser().parse_args([*flags, *itertools.chain(*((f"--{k}", str(v)) for k, v in changes.items()))])


@pytest.fixture(scope="module")
def report_page(tmp_path_factory):
    """(the page's data, its file, folder of the model after): the base model and one with other weights."""
    folder = tmp_path_factory.mktemp("report")
    model, tokenizer = load_model(str(TINY_BASE), dtype=torch.float32, device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.05 * parameter.data.std() * torch.randn(parameter.shape, generator=generator)
    save_model(model, tokenizer, folder / "after")
    page = report.write_tokens(report_args(folder / "page.html", after=folder / "after", top=3))
    return page, folder / "page.html", folder / "after"


def report_reference(folder, problem, response_ids):
    """transformers' log-probabilities (T, V) guided and unguided, a forward of its own for each token: no packing, no cache."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    sides, prompts = [], []
    for messages in (guided_messages(problem.problem, problem.strategy), auto_messages(problem.problem)):
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompts.append(tokenizer.encode(text, add_special_tokens=False))
        with torch.no_grad():
            rows = [model(torch.tensor([prompts[-1] + response_ids[:t]])).logits[0, -1] for t in range(len(response_ids))]
        sides.append(torch.log_softmax(torch.stack(rows), -1))
    assert len(prompts[0]) > len(prompts[1]) + 10  # a shift between the two contexts could not stay unseen
    return *sides, tokenizer


@pytest.mark.parametrize("view", [0, 1])
def test_report_divergence_equals_transformers(report_page, view):
    page, _, after = report_page
    tokens = page["views"][view]["tokens"]
    ids = [token["id"] for token in tokens]
    guided, unguided, tokenizer = report_reference([TINY_BASE, after][view], page["problem"], ids)
    want = [F.kl_div(unguided[t], guided[t], log_target=True, reduction="sum").item() for t in range(len(ids))]
    assert [token["divergence"] for token in tokens] == pytest.approx(want, abs=2e-5)
    assert tokens[0]["divergence"] == pytest.approx(want[0], abs=2e-5) and tokens[-1]["divergence"] == pytest.approx(
        want[-1], abs=2e-5
    )
    assert max(want) > 0.3 and ids[-1] == tokenizer.eos_token_id
    for side, log_p in (("guided", guided), ("auto", unguided)):
        assert [token[f"logp_{side}"] for token in tokens] == pytest.approx(
            [log_p[t, ids[t]].item() for t in range(len(ids))], abs=2e-5
        )
        for t, token in enumerate(tokens):
            best = log_p[t].exp().topk(3)
            assert [p for _, _, p in token[f"top_{side}"]] == pytest.approx(best.values.tolist(), abs=2e-5)
            assert token[f"top_{side}"][0][0] == best.indices[0].item()
            assert all(log_p[t, one].exp().item() == pytest.approx(p, abs=2e-5) for one, _, p in token[f"top_{side}"])
            assert all(text == tokenizer.decode([one]) for one, text, _ in token[f"top_{side}"])


def test_report_before_and_after_share_the_tokens(report_page):
    before, after = (view["tokens"] for view in report_page[0]["views"])
    assert [token["id"] for token in before] == [token["id"] for token in after]
    assert any(abs(a["divergence"] - b["divergence"]) > 0.01 for a, b in zip(before, after, strict=True))


def test_report_masked_is_exactly_above_delta(report_page):
    page, _, _ = report_page
    model, tokenizer = load_model(str(TINY_BASE), dtype=torch.float32, device="cpu")
    ids = [token["id"] for token in page["views"][0]["tokens"]]
    divergences = sorted(token["divergence"] for token in page["views"][0]["tokens"])
    delta = divergences[-2]  # itself: a token at the limit is kept, and exactly one is above it
    tokens = report.token_map(model, tokenizer, page["problem"], ids, delta=delta, top=1)
    assert [token["kept"] for token in tokens] == [token["divergence"] <= delta for token in tokens]
    assert sum(not token["kept"] for token in tokens) == 1


def test_report_chunks_change_nothing_and_bound_the_logits(report_page, monkeypatch):
    page, _, _ = report_page
    model, tokenizer = load_model(str(TINY_BASE), dtype=torch.float32, device="cpu")
    want = page["views"][0]["tokens"]
    rows = []
    monkeypatch.setattr(report, "CHUNK_TOKENS", 5)
    forward_kl = losses.forward_kl
    monkeypatch.setattr(losses, "forward_kl", lambda p, q: rows.append((p.shape[0], q.shape[0])) or forward_kl(p, q))
    tokens = report.token_map(model, tokenizer, page["problem"], [token["id"] for token in want], delta=1.0, top=3)
    assert rows == [(5, 5)] * (len(want) // 5) + [(len(want) % 5,) * 2] * (len(want) % 5 > 0)
    divergences = [token["divergence"] for token in want]
    assert [token["divergence"] for token in tokens] == pytest.approx(divergences, rel=1e-5, abs=1e-6)
    assert [token["top_auto"][0][:2] for token in tokens] == [token["top_auto"][0][:2] for token in want]


def test_report_totals_by_hand():
    values = [(0.5, True, -1.0, -2.0), (3.0, False, -0.5, -0.25), (0.1, True, 0.0, -0.75)]
    tokens = [dict(zip(("divergence", "kept", "logp_guided", "logp_auto"), row, strict=True)) for row in values]
    assert report.totals(tokens) == pytest.approx(
        {
            "tokens": 3,
            "divergence_sum": 3.6,
            "divergence_mean": 1.2,
            "kept": 2 / 3,
            "loss": 0.2,
            "logp_guided": -1.5,
            "logp_auto": -3.0,
        }
    )


def test_report_pass_rates_are_of_the_two_prompts(report_page):
    totals = report_page[0]["views"][0]["totals"]
    assert (
        totals["p_guide"] == 1.0 and totals["p_auto"] < 1.0
    )  # the tiny world's base model: all right guided, about half alone


def test_report_target_is_the_correct_response_most_probable_alone(tmp_path, monkeypatch):
    model, tokenizer = load_model(str(TINY_BASE), dtype=torch.float32, device="cpu")
    with MathWorker() as worker:
        problem = next(p for p in load_problems(ROOT / "data/tiny/test.jsonl", worker) if p.id == "tiny-jako-35")
        # the last is the most probable of all but wrong; of the two correct ones the strategy, and the mean over tokens, prefer
        # the first, but the policy alone the second
        texts, correct = ["jako add 3 5 = 8, jako inc 8 = 9", "jako sub", "jako"], [True, True, False]
        responses = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        sides = [report_reference(TINY_BASE, problem, response)[:2] for response in responses]
        guided, alone = (
            [
                sum(side[k][t, one].item() for t, one in enumerate(response))
                for side, response in zip(sides, responses, strict=True)
            ]
            for k in range(2)
        )
        assert guided[0] > guided[1] and alone[2] > alone[1] > alone[0] and alone[0] / 13 > alone[1] / 2
        monkeypatch.setattr(report, "sample_group", lambda *_, **__: (responses, correct))
        found, response = report.find_target(model, tokenizer, worker, report_args(tmp_path / "x", id=problem.id))
        assert found == problem and response == responses[1]


def test_report_target_of_the_first_problem_that_has_one(tmp_path, monkeypatch, capsys):
    model, tokenizer = load_model(str(TINY_BASE), dtype=torch.float32, device="cpu")
    answers = {"tiny-jako-35": [False, True]}
    monkeypatch.setattr(
        report, "sample_group", lambda m, t, w, problem, *_, **__: ([[5], [6]], answers.get(problem.id, [False, False]))
    )
    with MathWorker() as worker:
        problem, response = report.find_target(model, tokenizer, worker, report_args(tmp_path / "x"))
        assert (problem.id, response) == ("tiny-jako-35", [6])
        assert "tiny-gano-54: none of 4 guided responses is correct" in capsys.readouterr().out
        with pytest.raises(ValueError, match="no correct guided response; another --seed"):
            report.find_target(model, tokenizer, worker, report_args(tmp_path / "x", id="tiny-gano-54"))
        with pytest.raises(ValueError, match="no row has the id 'nobody'"):
            report.find_target(model, tokenizer, worker, report_args(tmp_path / "x", id="nobody"))
        (tmp_path / "plain.jsonl").write_text('{"id": "p", "problem": "1+1?", "answer": "2"}\n')
        with pytest.raises(ValueError, match="no strategy in any row"):
            report.find_target(model, tokenizer, worker, report_args(tmp_path / "x", data=tmp_path / "plain.jsonl"))


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(delta=0), "--delta must be positive"),
        (dict(delta="inf"), "--delta must be positive and finite"),
        (dict(top=0), "--top must be at least 1"),
        (dict(top=10_000), "--top 10000: the vocabulary has"),
        (dict(group_guided=0), "--group_guided must be at least 1"),
        (dict(out="/nowhere/page.html"), "/nowhere/page.html: its folder does not exist"),
    ],
)
def test_report_tokens_refuse_bad_settings(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        report.write_tokens(report_args(tmp_path / "x", **flags))
    assert not (tmp_path / "x").exists()


def test_report_after_must_have_the_same_vocabulary(report_page, tmp_path):
    _, _, after = report_page
    model, tokenizer = load_model(str(after), dtype=torch.float32, device="cpu")
    tokenizer.add_tokens(["extra"])
    save_model(model, tokenizer, tmp_path / "other")
    with pytest.raises(ValueError, match="its vocabulary is not that of"):
        report.write_tokens(report_args(tmp_path / "x", after=tmp_path / "other"))


def test_report_words_get_their_blanks_back():
    tokenizer = AutoTokenizer.from_pretrained(TINY_BASE)
    ids = tokenizer.encode("gano add 5 4 = 9, \\boxed{ 0}", add_special_tokens=False) + [tokenizer.eos_token_id]
    texts = report.token_texts(tokenizer, ids)
    assert [text for _, text in texts] == ["gano", "add", "5", "4", "=", "9", ",", "\\boxed{", "0", "}", "<|im_end|>"]
    assert "".join(blank + text for blank, text in texts) == tokenizer.decode(ids) and texts[1][0] == " "


def test_report_bytes_are_shown_where_they_are_no_text():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(tokenizer_models.BPE(vocab={c: i for i, c in enumerate(alphabet)} | {"Ġa": 256}, merges=[("Ġ", "a")]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    texts = report.token_texts(tokenizer, tokenizer.encode("b a\né a"))
    assert [text for _, text in texts] == ["b", " a", "\n", "Ã", "©", " a"]  # the two bytes of é by their names
    assert all(blank == "" for blank, _ in texts)


HOSTILE = ["<script>", "</script>", "<!--", "&amp;", '"', "'", "\n", " ", ".\n\n", "\t", "\u202e", " the", "a b"]


def report_token(index, text, divergence=0.25, **changes):
    token = {"id": index, "text": text, "blank": "", "divergence": divergence, "kept": divergence <= 1.0}
    guided, auto = ([(index, text, p), (index + 1, "<i>&", 0.00001)] for p in (0.5, 0.25))
    return token | {"logp_auto": math.log(0.25), "logp_guided": math.log(0.5), "top_auto": auto, "top_guided": guided} | changes


def report_hostile_page():
    tokens = [report_token(i, text) for i, text in enumerate(HOSTILE)]
    strategy = Strategy("<b>type</b>", 'a <i>"strategy"</i> & more', ("<script>alert(1)</script>",))
    problem = SimpleNamespace(id="<id>", problem="if a < b & b > c:\n</div>", answer="<u>0</u>", strategy=strategy)
    totals = report.totals(tokens) | {"p_auto": 0.5, "p_guide": 1.0}
    views = [{"name": name, "model": "a<b>", "tokens": tokens, "totals": totals} for name in ("before", "after")]
    return {"problem": problem, "delta": 1.0, "views": views, "settings": "--data a<b>.jsonl"}


class ReportParser(HTMLParser):
    """Collects tags and texts, and fails on any that is not closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text, self.scripts = [], [], {}, []

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


def report_parse(page):
    parser = ReportParser()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def test_report_page_escapes_everything():
    page = report_hostile_page()
    parsed = report_parse(report.page_html(page))
    counts = {tag: sum(name == tag for name, _ in parsed.tags) for tag in ("script", "b", "i", "style", "span", "section")}
    # 13 tokens twice, ticks, headings and the legend's sample; nothing that a token or the problem brought along
    assert counts == {"script": 2, "b": 0, "i": 0, "style": 1, "span": 2 * len(HOSTILE) + 6 + 4 + 1, "section": 6}
    shown = [parsed.text[f"token-{m}"] for m in range(1, len(HOSTILE) + 1)]
    assert shown == ["<script>", "</script>", "<!--", "&amp;", '"', "'", "⏎", "␣", ".⏎⏎", "⇥", "\\u202e", " the", "a b"]
    assert "if a < b & b > c:\n</div>" in parsed.text["div"] and parsed.text["li"] == "<script>alert(1)</script>"
    assert 'a <i>"strategy"</i> & more' in parsed.text["p"] and "reference answer: <u>0</u>" in parsed.text["p"]
    assert "--data a<b>.jsonl" in parsed.text["p"] and "<id>" in parsed.text["title"]


def test_report_page_carries_its_tooltips():
    page = report_hostile_page()
    tips = json.loads(report_parse(report.page_html(page)).scripts[0])
    assert [len(view) for view in tips] == [len(HOSTILE)] * 2
    heading, line, guided, alone = tips[1][0]
    assert (
        heading == "token 1 of 13: <script>" and line == "d = 0.2500 nats, kept (≤ 1); p = 0.5000 with strategy, 0.2500 alone"
    )
    assert guided == [["<script>", "0.5000", True], ["<i>&", "1e-05", False]]
    assert alone == [["<script>", "0.2500", True], ["<i>&", "1e-05", False]]
    assert tips[0][11][2][0][0] == "␣the"  # in the table blanks can be seen


def test_report_page_marks_masked_tokens_and_places_colours():
    page = report_hostile_page()
    divergences = [0.0, 0.25, 1.0, 1.5, -1e-9]
    page["views"][0]["tokens"] = [report_token(i, "x", d) for i, d in enumerate(divergences)]
    spans = {attrs["id"]: attrs for tag, attrs in report_parse(report.page_html(page)).tags if tag == "span" and "id" in attrs}
    spans = [spans[f"token-{m}"] for m in range(1, 6)]
    assert [span["class"] for span in spans] == ["t", "t", "t", "t masked", "t"]
    assert [span["style"] for span in spans] == ["--t:0.000", "--t:0.500", "--t:1.000", "--t:1.000", "--t:0.000"]
    assert all(span["tabindex"] == "0" for span in spans)


def test_report_page_keeps_lines_and_blanks():
    page = report_hostile_page()
    page["views"] = page["views"][:1]
    page["views"][0]["tokens"] = [
        report_token(0, "a"),
        report_token(1, "b", blank=" "),
        report_token(2, ".\n\n"),
        report_token(3, "c"),
    ]
    text = report_parse(report.page_html(page)).text["div"]
    assert "a b.⏎⏎\n\nc" in text


def test_report_page_needs_nothing_from_outside(report_page):
    page, file, _ = report_page
    text = file.read_text(encoding="utf-8")
    assert text == report.page_html(page)
    parsed = report_parse(text)
    assert not any({"src", "href"} & set(attrs) for _, attrs in parsed.tags)
    assert not any(word in text for word in ("http:", "https:", "//", "@import", "url("))
    count = len(page["views"][0]["tokens"])
    ids = [attrs["id"] for tag, attrs in parsed.tags if "tabindex" in attrs]
    assert ids == [f"token-{m}" for m in range(1, count + 1)] + [f"after-{m}" for m in range(1, count + 1)]
    assert page["problem"].problem in parsed.text["div"] and "gano add 5 4" in " ".join(parsed.text["div"].split())


def test_report_divergence_is_the_mean_over_targets(tmp_path):
    flags = ["--data", str(ROOT / "data/tiny/test.jsonl"), "--model", str(TINY_BASE), "--max_new_tokens", "32"]
    lines = report.main(["divergence", *flags, "--problems", "3", "--out", str(tmp_path / "d.csv")])
    want = {}
    args = report.build_parser().parse_args(["divergence", *flags, "--out", "x"])
    model, tokenizer = load_model(str(TINY_BASE), dtype=torch.float32, device="cpu")
    with MathWorker() as worker:
        for problem, response in itertools.islice(report.find_targets(model, tokenizer, worker, args), 3):
            for token in report.token_map(model, tokenizer, problem, response, delta=1.0, top=1):
                want.setdefault(token["text"], []).append(token["divergence"])
    written = list(csv.DictReader((tmp_path / "d.csv").read_text().splitlines()))
    assert {line["token"]: float(line["mean_d"]) for line in written} == pytest.approx(
        {text: sum(values) / len(values) for text, values in want.items()}, abs=1e-6
    )
    assert sum(int(line["count"]) for line in written) == sum(map(len, want.values()))
    assert lines[0]["token"] in sweep.OPERATIONS and lines[0]["mean_d"] > 0.4


def test_report_rows_shows_every_seed_and_the_mean(tmp_path):
    text = "row,seed,accuracy\nsgpo,0,0.9\nsgpo,1,0.7\ngrpo,0,0.5\n"
    (tmp_path / "table.csv").write_text(text)
    rows = report.read_rows(tmp_path / "table.csv", "accuracy")
    assert rows == {"sgpo": [0.9, 0.7], "grpo": [0.5]}
    (axes,) = report.draw_rows(rows, "accuracy").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["sgpo", "grpo"]
    means = [container.lines[0].get_xdata()[0] for container in axes.containers]
    assert means == pytest.approx([0.8, 0.5])
    (bar,) = axes.containers[0].lines[2][0].get_segments()
    assert bar[:, 0].tolist() == pytest.approx([0.7, 0.9])  # stdev 0.1 sqrt 2 over sqrt 2
    report.main(["rows", str(tmp_path / "table.csv"), "--out", str(tmp_path / "pictures/table")])
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"table.png", "table.svg"}
    (tmp_path / "table.csv").write_text(text + "hpt,0,oops\n")
    with pytest.raises(ValueError, match="table.csv:5: no row with a number in 'accuracy'.*oops"):
        report.read_rows(tmp_path / "table.csv", "accuracy")
    with pytest.raises(ValueError, match="table.csv:2: no row with a number in 'speed'"):
        report.read_rows(tmp_path / "table.csv", "speed")


def test_report_rows_of_knobs_get_a_panel_each():
    rows = {"delta=0.1": [0.5, 0.6], "delta=inf": [0.7, 0.8], "gamma=1.0": [0.9, 0.9]}
    axes = report.draw_rows(rows, "accuracy").axes
    assert [one.get_xlabel() for one in axes] == ["delta", "gamma"]
    assert [label.get_text() for label in axes[0].get_xticklabels()] == ["0.1", "inf"]
    assert [c.lines[0].get_ydata()[0] for c in axes[0].containers] == pytest.approx([0.55, 0.75])


def bench_spread(median, low, high):
    return {"median": median, "min": low, "max": high}


def bench_side_runs(rates, **figures):
    """Runs of two sides: {side: tokens/s of each repeat}; figures: {name: {side: its value in each repeat}}."""
    return [
        {"side": side, "repeat": k, "tokens_per_s": rate} | {name: values[side][k] for name, values in figures.items()}
        for side, series in rates.items()
        for k, rate in enumerate(series)
    ]


def bench_json(path, *, device="Chip A|B", kind="cpu", dtype="float32", **parts):
    """Write a report like bench.py's with these parts, and with these changes of its header."""
    header = {"date": "2026-01-02T03:04:05+00:00", "command": f"python bench.py --out {path.name}", "seed": 11, "repeats": 2}
    header |= {"shape": "smollm2-135m", "dtype": dtype, "quick": False, "commit": "0123456789abcdef", "changed_files": False}
    header |= {"device": device, "device_type": kind, "cpus": 4, "threads": 3, "load_before": [0.25, 1, 1]}
    header |= {"versions": {"python": "3.11.0", "torch": "2.0"}, "load_after": [2.96, 1, 1]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(header | parts))
    return path


def bench_sampler_part(**changes):
    workload = {"name": "tail", "prompts": 2, "group": 3, "shortest_prompt": 4, "longest_prompt": 9, "median": 5, "longest": 70}
    rates = {"ours": [1200.0, 1300.0], "generate": [300.0, 200.0]}
    figures = {
        "floor_share": {"ours": [0.5, 0.7], "generate": [0.1, 0.12]},
        "peak_mb": {"ours": [30.4, 30.6], "generate": [1499.7, 12.0]},
    }
    result = {"workload": workload, "left_out": {"generate_batch": "needs a|b"}, "runs": bench_side_runs(rates, **figures)}
    result["tokens_per_s"] = {"ours": bench_spread(1250.0, 1200.0, 1300.0), "generate": bench_spread(250.0, 200.0, 300.0)}
    result["ratio"] = {"generate": bench_spread(5.25, 4.0, 6.5)}
    greedy = {"responses": 4, "tokens_each": 12, "equal": 3, "ties": 0, "ok": False}
    prefill = {"tokens_per_s": bench_spread(2000.0, 1900.0, 2100.0), "share": bench_spread(0.6, 0.5, 0.625)}
    prefill["time"] = {"matrix products": 0.625, "attention": 0.25, "everything else": 0.125}
    part = {"model": {}, "limits": {"bandwidth": 27.84e9, "matmul": 1406e9}, "checks": {"greedy": greedy}}
    return part | {"prefill": prefill | {"prompts": 2, "tokens": 1234}, "workloads": [result]} | changes


def bench_trained_part(rival, **changes):
    workload = {"prompts": 4, "group": 8, "shortest_prompt": 40, "longest_prompt": 160, "median": 48, "longest": 48}
    runs = bench_side_runs({"ours": [20.0], rival: [8.0]}, peak_mb={"ours": [0.1], rival: [210.0]})
    rates = {"ours": bench_spread(20.0, 20.0, 20.0), rival: bench_spread(8.0, 8.0, 8.0)}
    part = {"workload": workload, "runs": runs, "tokens_per_s": rates, "ratio": {rival: bench_spread(2.5, 2.5, 2.5)}}
    return part | {"checks": {}} | changes


def bench_head_part():
    rows = {"autograd": (7500.0, 1.0, 20.0), "128": (900.0, 0.12, 20.5)}
    summary = [
        {"variant": name, "peak_mb": bench_spread(mb, mb, mb), "peak_mb_ratio": bench_spread(share, share, share)}
        | {"seconds": bench_spread(s, s - 1, s + 1), "seconds_ratio": bench_spread(s / 20, 0.5, 1.5)}
        for name, (mb, share, s) in rows.items()
    ]
    check = {"max_relative_difference": 1.6e-7, "tolerance": 1e-4, "ok": True}
    shape = {"tokens": 4096, "width": 896, "vocabulary": 152064, "chunks": [128]}
    return {"shape": shape, "checks": {"same_loss": check}, "summary": summary, "runs": []}


def bench_growth_part():
    curve = {"axis": "rows", "cost": "sampling", "seconds": {"8": 1.5, "16": 3.25}, "exponent": 1.115}
    return {"curves": [curve], "checks": {}}


def bench_written(folder, out):
    """The page that the command writes for a folder of reports."""
    assert report.main(["bench", str(folder), "--out", str(out)]) == out
    return out.read_text(encoding="utf-8")


def bench_sections(page):
    """{(heading, device, dtype): the text below them}; None stands for a device or a dtype where the text is below none."""
    sections, at = {}, [None] * 3
    for line in page.splitlines():
        level = len(line) - len(line.lstrip("#"))
        if level > 1:
            at[level - 2 :] = [line[level + 1 :], *[None] * (4 - level)]
        elif re.fullmatch(r"(fp32|bf16): not run\.", line):
            at[2] = line[:4]
        sections[tuple(at)] = sections.get(tuple(at), "") + line + "\n"
    return sections


def bench_cells(text):
    """The rows of the one table in a text. An escaped bar is not the end of a cell."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1 and set(map(str.strip, rows[1])) == {"---"}
    return [[cell.strip() for cell in row] for row in rows[:1] + rows[2:]]


def test_report_bench_every_figure_by_hand(tmp_path):
    """What a report holds decides where it stands; its name does not."""
    folder = tmp_path / "raw"
    bench_json(folder / "a b.json", sampler=bench_sampler_part(), head=bench_head_part())
    versions, check = {"trl": "9.9"}, {"max_difference": 0.06, "tolerance": 0.05, "ok": False}
    update = bench_trained_part("transformers", checks={"same_update": check})
    for run in update["runs"]:
        run["flop_share"] = 0.554 if run["side"] == "ours" else 0.25
    parts = {"update": update, "step": bench_trained_part("trl", versions=versions), "growth": bench_growth_part()}
    bench_json(folder / "head.json", device="GPU", kind="cuda", dtype="bfloat16", changed_files=True, repeats=1, **parts)
    page = bench_written(folder, tmp_path / "page.md")
    sections = bench_sections(page)
    headings = ["Sampler", "One update", "A whole step", "The chunked head", "How the cost grows"]
    assert list(dict.fromkeys(heading for heading, _, _ in sections if heading)) == headings
    for heading in headings:  # the same devices and dtypes below every heading, in the same order
        mine = [key[1:] for key in sections if key[0] == heading and key[2]]
        assert mine == [(device, dtype) for device in ("Chip A|B", "GPU") for dtype in ("fp32", "bf16")]
    with_table = {key for key, text in sections.items() if "\n|" in text}
    assert with_table == {
        *((heading, "Chip A|B", "fp32") for heading in ("Sampler", "The chunked head")),
        *((heading, "GPU", "bf16") for heading in ("One update", "A whole step", "How the cost grows")),
    }
    sampler = sections["Sampler", "Chip A|B", "fp32"]
    work = "2 × 3; 4 to 9; median 5, longest 70"
    assert bench_cells(sampler)[1:] == [
        ["tail", work, "ours", "1,250.0 (1,200.0 to 1,300.0)", "", "60 %", "+31 MB"],
        ["", "", "generate", "250.0 (200.0 to 300.0)", "5.25 (4.00 to 6.50)", "11 %", "+1,500 MB"],
        ["", "", "generate_batch", r"not run: needs a\|b", "", "", ""],
    ]
    assert "27.8 GB/s, 1,406 GFLOP/s" in sampler and "Decode steps are CUDA graphs" not in sampler
    assert "1,234 prompt tokens: 2,000 (1,900 to 2,100) tokens/s, 60 (50 to 62) % of the matrix peak (of its time: " in sampler
    assert "peak (of its time: matrix products 62 %, attention 25 %, everything else 12 %)." in sampler
    assert "- **FAILED**: in fp32, 3 of 4 greedy responses of 12 tokens" in sampler
    assert "    python bench.py --out a b.json\n" in sampler and "[every figure](raw/a%20b.json)" in sampler
    origin = "2 repeats, seed 11, commit 0123456, Chip A|B, 3 threads, python 3.11.0, torch 2.0, load average 0.2 before and "
    assert f"shape smollm2-135m, {origin}3.0 after, 2026-01-02;" in sampler
    head = sections["The chunked head", "Chip A|B", "fp32"]
    assert bench_cells(head)[1:] == [
        ["whole logits", "7,500 MB", "100.0 %", "20.000 (19.000 to 21.000)", "1.00 (0.50 to 1.50)"],
        ["chunks of 128", "900 MB", "12.0 %", "20.500 (19.500 to 21.500)", "1.02 (0.50 to 1.50)"],
    ]
    assert "4,096 tokens, width 896, vocabulary 152,064" in head and "shape smollm2" not in head and origin in head
    assert "- ok: loss and gradient norms differ by at most 2e-07, relative (allowed: 0.0001)" in head
    updated, step = sections["One update", "GPU", "bf16"], sections["A whole step", "GPU", "bf16"]
    assert [row[-2] for row in bench_cells(updated)[1:]] == ["55 %", "25 %"] and "- **FAILED**: loss and gradient" in updated
    assert bench_cells(step)[1:] == [
        ["4 × 8; 40 to 160; all 48", "ours", "20.0 (20.0 to 20.0)", "", "+0 MB"],
        ["", "trl", "8.0 (8.0 to 8.0)", "2.50 (2.50 to 2.50)", "+210 MB"],
    ]
    assert "1 repeat, " in step and "0123456 with uncommitted changes, GPU" in step and "(raw/head.json)" in step
    assert "trl 9.9" in step and "trl" not in updated and "Checks" not in step
    growth = sections["How the cost grows", "GPU", "bf16"]
    assert bench_cells(growth)[1:] == [["sampling", "rows", "8: 1.500, 16: 3.250", "1.11"]]
    (folder / "a b.json").rename(folder / "z.json")
    (folder / "head.json").rename(folder / "y.json")
    renamed = bench_written(folder, tmp_path / "page.md")
    assert renamed.replace("raw/z", "raw/a%20b").replace("raw/y", "raw/head") == page


def test_report_bench_growth_picture_is_shown_where_it_lies_beside(tmp_path):
    path = bench_json(tmp_path / "raw/v1.2.json", growth=bench_growth_part())
    draw = ["growth", str(path), "--out", str(tmp_path / "raw/v1.2")]
    assert f"    python report.py {' '.join(draw)}\n" in bench_written(tmp_path / "raw", tmp_path / "sub/page.md")
    report.main(draw)
    for picture in ("v1.2.png", "v1.2.svg"):  # the svg where there is no png
        page = bench_written(tmp_path / "raw", tmp_path / "sub/page.md")
        assert f"](../raw/{picture})" in page and "Not drawn" not in page
        (tmp_path / "raw" / picture).unlink()
    assert "Not drawn" in bench_written(tmp_path / "raw", tmp_path / "sub/page.md")


def test_report_bench_commands_fill_the_gaps(tmp_path, monkeypatch):
    """Every command below "not run" is one that bench.py takes, and measures just what is missing, into no file that exists."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    folder = tmp_path / "raw data"
    left_out = {"left_out": "trl is not installed: pip install trl", "runs": [], "checks": {}}
    bench_json(folder / "update_cuda_float32.json", kind="cuda", sampler=bench_sampler_part(), step=left_out)
    changes = {"device": "GPU 2", "kind": "cuda", "dtype": "bfloat16", "shape": "qwen2.5-7b", "threads": 7}
    bench_json(folder / "cpu.json", **changes, head=bench_head_part())
    parts = {"Sampler": "sampler", "One update": "update", "A whole step": "step", "The chunked head": "head"}
    found = 0
    for (heading, device, dtype), text in bench_sections(bench_written(folder, tmp_path / "page.md")).items():
        if "not run." not in text.lower() or "\n|" in text:
            continue
        (command,) = [line for line in text.splitlines() if line.startswith("    python ")]
        words = shlex.split(command)
        assert words[:2] == ["python", "tools/bench.py"]
        args = bench.parse_arguments(words[2:])
        assert args.out.parent == folder and not args.out.exists() and not args.quick
        if heading == "On a CPU":
            assert set(args.only) == {*bench.PARTS, "growth"} and args.device == "cpu" and args.out.name == "cpu_2.json"
            continue
        part = parts.get(heading, "growth")
        assert args.only == [part] and args.device == "cuda" and report.DTYPES[args.dtype] == dtype
        assert args.threads == (7 if device == "GPU 2" else 3)
        assert args.shape == ("qwen2.5-7b" if device == "GPU 2" and part != "head" else "smollm2-135m")
        assert (args.out.name == "update_cuda_float32_2.json") == (part == "update" and dtype == "fp32")
        found += 1
    assert found == 2 * 2 * 5 - 2  # two devices, two dtypes, five parts; a sampler and a head were measured
    bench_json(folder / "real_cpu.json", growth=bench_growth_part(), device="Chip")
    assert "## On a" not in bench_written(folder, tmp_path / "page.md")
    for path in folder.glob("*.json"):
        path.unlink()
    bench_json(folder / "x.json", head=bench_head_part())
    keys = set(bench_sections(bench_written(folder, tmp_path / "page.md")))
    assert ("On a GPU", None, None) in keys and ("On a CPU", None, None) not in keys


def test_report_bench_reads_what_bench_writes(tmp_path, monkeypatch):
    """The keys of the reports above are from reading bench.py; here it writes one itself, without its slowest pieces."""
    check = partial(bench.check_distribution, draws=60)
    monkeypatch.setattr(bench, "check_distribution", lambda seed, device, draws: check(seed, device))
    monkeypatch.setattr(bench, "machine_limits", lambda dtype, device: {"bandwidth": 5e9, "matmul": 7e9})
    monkeypatch.setattr(bench, "sampler_rivals", lambda device: (["ours", "generate"], {"generate_batch": "slow"}))
    path = tmp_path / "raw/b.json"
    flags = ["--quick", "--device", "cpu", "--threads", "1", "--repeats", "2"]
    assert bench.main(["--out", str(path), *flags, "--only", "sampler", "update"]) == 0
    with pytest.raises(ValueError, match=r"b\.json: made with --quick"):
        report.main(["bench", str(path.parent), "--out", str(tmp_path / "page.md")])
    measured = json.loads(path.read_text())
    path.write_text(json.dumps(measured | {"quick": False}))
    sections = bench_sections(bench_written(path.parent, tmp_path / "page.md"))
    sampler, update = (sections[heading, measured["device"], "fp32"] for heading in ("Sampler", "One update"))
    assert [row[0] for row in bench_cells(sampler)[1:] if row[0]] == ["uniform", "long tail"]
    assert sampler.count("- ok: ") == 3 and update.count("- ok: ") == 1 and "FAILED" not in sampler + update
    assert "not recorded" not in sampler + update
    ours = [run["tokens_per_s"] for run in measured["update"]["runs"] if run["side"] == "ours"]
    theirs = [run["tokens_per_s"] for run in measured["update"]["runs"] if run["side"] == "transformers"]
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    assert bench_cells(update)[1][2] == f"{sum(ours) / 2:,.1f} ({min(ours):,.1f} to {max(ours):,.1f})"
    assert bench_cells(update)[2][3] == f"{sum(ratios) / 2:.2f} ({ratios[0]:.2f} to {ratios[1]:.2f})"
    assert "Limits: 5.0 GB/s, 7 GFLOP/s." in sampler and sampler.count("| generate_batch | not run: slow |") == 2
    assert set(report.BENCH_PARTS) == {*bench.PARTS, "growth"}


def test_report_bench_committed_page_is_what_the_command_makes(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "results/bench", tmp_path / "results/bench")
    monkeypatch.chdir(tmp_path)
    page = bench_written(Path("results/bench"), Path("results/bench.md"))  # named in the page; where it is stale run it again
    assert page == (ROOT / "results/bench.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)]*)\)", page):
        assert (tmp_path / "results" / link).is_file()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "b.json: not a report of bench.py: Expecting"),
        (b"\xff{}", "b.json: not a report of bench.py: .*decode"),
        ("[]", "b.json: not a report of bench.py: it holds none of sampler, update"),
        ('{"accuracy": 1}', "b.json: not a report of bench.py: it holds none of sampler, update"),
        ({"sampler": 3}, "b.json: not a report of bench.py: it holds none of .*, or not as an object"),
        ({"head": bench_head_part(), "seed": "0"}, "b.json: not a report of bench.py: seed is '0', expected int"),
        ({"head": bench_head_part(), "command": None}, "b.json: not a report of bench.py: command is None, expected str"),
        ({"head": bench_head_part(), "dtype": "float16"}, "b.json: dtype is 'float16', expected float32 or bfloat16"),
        ({"head": bench_head_part(), "kind": "mps"}, "b.json: device_type is 'mps', expected cpu or cuda"),
        ({"head": bench_head_part(), "quick": True}, "b.json: made with --quick"),
        ({"head": {}}, r"b.json: its part head is not what bench.py writes \(KeyError\('summary'\)\)"),
        ({"growth": {"curves": [3]}}, "b.json: its part growth is not what bench.py writes"),
        ({"sampler": bench_sampler_part(checks={"new": {"ok": True}})}, r"b.json: its part sampler .*KeyError\('new'\)"),
        ({"sampler": bench_sampler_part(limits={"bandwidth": "1", "matmul": 2})}, "b.json: its part sampler is not what"),
        ({"update": bench_trained_part("x", ratio=None)}, "b.json: its part update is not what bench.py writes"),
        ({"update": bench_trained_part("x", runs=[])}, "b.json: its part update is not what bench.py writes"),
    ],
)
def test_report_bench_names_the_file_that_is_wrong(tmp_path, content, message):
    folder, out = tmp_path / "raw", tmp_path / "page.md"
    bench_json(folder / "a.json", device="another", head=bench_head_part())
    if isinstance(content, dict):
        bench_json(folder / "b.json", **content)
    else:
        (folder / "b.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"^{re.escape(str(folder))}/{message}"):
        report.main(["bench", str(folder), "--out", str(out)])
    assert not out.exists()


def test_report_bench_refuses_two_reports_of_the_same(tmp_path):
    folder = tmp_path / "raw"
    bench_json(folder / "a.json", head=bench_head_part(), sampler=bench_sampler_part())
    for changes in ({"device": "Chip C"}, {"dtype": "bfloat16"}):  # another device or dtype is not the same
        bench_json(folder / "b.json", head=bench_head_part(), **changes)
        assert "## The chunked head" in bench_written(folder, tmp_path / "page.md")
    bench_json(folder / "b.json", step=bench_trained_part("trl"), head=bench_head_part())
    with pytest.raises(ValueError, match=r"/a\.json and .*/b\.json both hold head on Chip A\|B in float32"):
        report.main(["bench", str(folder), "--out", str(tmp_path / "page.md")])
    left_out = {"left_out": "trl is not installed: pip install trl", "runs": [], "checks": {}}
    bench_json(folder / "a.json", step=left_out)  # a part that could not run is in nobody's way
    assert bench_cells(bench_sections(bench_written(folder, tmp_path / "page.md"))["A whole step", "Chip A|B", "fp32"])
    for path in folder.glob("*.json"):
        path.unlink()
    for _ in range(2):  # nothing there, then nothing measured
        with pytest.raises(ValueError, match="raw: no report of bench.py with figures in it"):
            report.main(["bench", str(folder), "--out", str(tmp_path / "page.md")])
        bench_json(folder / "a.json", step=left_out)


def test_report_bench_reads_the_first_reports_too(tmp_path):
    """They name the dtype in the head alone, no shape, and no share of the peak for the update."""
    path = bench_json(tmp_path / "raw/a.json", head=bench_head_part() | {"dtype": "torch.bfloat16"})
    old = {name: value for name, value in json.loads(path.read_text()).items() if name not in ("dtype", "shape")}
    path.write_text(json.dumps(old))
    bench_json(tmp_path / "raw/b.json", update=bench_trained_part("transformers"))
    sections = bench_sections(bench_written(tmp_path / "raw", tmp_path / "page.md"))
    assert len(bench_cells(sections["The chunked head", "Chip A|B", "bf16"])) == 3
    assert [row[-2] for row in bench_cells(sections["One update", "Chip A|B", "fp32"])[1:]] == ["not recorded"] * 2


def test_report_bench_loads_no_torch(tmp_path):
    bench_json(tmp_path / "raw/a.json", head=bench_head_part())
    code = "import sys, report; report.main(sys.argv[1:]); print('torch' in sys.modules)"
    done = run_script("-c", code, "bench", tmp_path / "raw", "--out", tmp_path / "page.md")
    assert done.stdout.splitlines() == [f"{tmp_path / 'page.md'}: tables 1, reports 1", "False"]
