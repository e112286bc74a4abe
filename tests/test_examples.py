"""The examples run, and their figures are right."""

import json
import shutil
import sys

import pytest
import torch

from tests.common import ROOT, TINY_BASE, run_script


def said_by(example, files, folder, *arguments):
    """What an example prints in a folder with these files alone, those that it says it needs."""
    (folder / "examples").mkdir()
    for name in (f"examples/{example}", *files):
        shutil.copy(ROOT / f"{name}.py", folder / f"{name}.py")
    done = run_script(folder / f"examples/{example}.py", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_loss_by_hand(tmp_path):
    said = said_by("loss_on_transformers", ("loss", "weighting", "strategy"), tmp_path, TINY_BASE)
    # p_auto = 1/8, p_guide = 3/4, gamma = 0.1: 0.5 * 0.725 / 0.225 is above alpha_max. A_1 = (7/8) / 0.353553; rho = 1
    words = said.split()
    assert words[words.index("alpha") + 1] == "0.800"
    d = torch.tensor(eval(said[said.index("[") : said.index("]") + 1]))
    expected = -0.875 / 0.353553 / 8 + 0.8 * d[d <= 1].sum() / len(d)
    assert float(words[-1]) == pytest.approx(expected.item(), abs=2e-3)


def test_sampling_and_scoring(tmp_path):
    question = "A teka machine gets 5 and 4. What comes out?"
    said = said_by("sample", ("model", "rollout", "kv_cache"), tmp_path, TINY_BASE, question)
    assert said.count(" nats ") == 4 and float(said.split()[-1]) < 1e-4


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    monkeypatch.chdir(ROOT / "examples")  # where Jupyter starts
    monkeypatch.setattr(sys, "path", [*sys.path])
    names = {}
    for cell in json.loads((ROOT / "examples/tiny_world.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)  # noqa: S102 (our own cells)
            names |= {"STEPS": 2, "OUT": tmp_path / "run"}
    assert [step["step"] for step in names["steps"]] == [1, 2] and plt.gca().lines
    assert "&lt;span" in names["Shown"]()._repr_html_() and "after" in names["page"].read_text()
