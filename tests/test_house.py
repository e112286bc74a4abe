"""The limits that the project has set itself: sizes, who imports whom, and that each program says what it takes.

Nothing here runs code that comes with data: ruff looks for that (pyproject.toml).
"""

import argparse
import ast
import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from tests.common import ROOT

LEAVES = "model lora kv_cache rollout loss weighting strategy grader checkpoint".split()
PACKAGES = {"strategy": set(), "grader": set(), "loss": {"torch"}, "weighting": {"torch"}}  # that a leaf is loaded with
COMMANDS = ("train.py", "eval.py", "strategy.py")  # they may call tools/, inside a function
LINES = {"sgpo.py": 460, "train.py": 620, "README.md": 230}
LINES_OF_ALL = {"core": 5000, "tools": 5000, "data": 3000, "tests": 7500}
# every program, and the flags without which it does not get as far as a wrong one
SCRIPTS = json.loads((ROOT / "tests/programs.json").read_text(encoding="utf-8"))


def python_files():
    """{path from the root: text} of the project's files, by folder: "core" for those at the top that are no tests."""
    folders = {name: sorted((ROOT / name).glob("*.py")) for name in ("tools", "data", "tests")}
    top = sorted(ROOT.glob("*.py"))
    folders["tests"] += [path for path in top if path.name.startswith("test_")]
    folders["core"] = [path for path in top if not path.name.startswith("test_")]
    return {name: {path.relative_to(ROOT): path.read_text("utf-8") for path in paths} for name, paths in folders.items()}


FILES = python_files()
PROGRAMS = FILES["core"] | FILES["tools"] | FILES["data"]


def modules(node):
    """Names of the modules, and of what may be one, that the import statements in `node` load."""
    names = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Import):
            names |= {alias.name for alias in part.names}
        elif isinstance(part, ast.ImportFrom):
            names |= {part.module} | {f"{part.module}.{alias.name}" for alias in part.names}
    return names


def imported(node):
    """Files of the project that the import statements in `node` load."""
    names = modules(node)
    return {path for path in PROGRAMS if ".".join(path.with_suffix("").parts) in names}


def test_no_part_outgrows_its_limit():
    assert len(list(ROOT.glob("*.py"))) <= 15
    count = {name: sum(text.count("\n") for text in files.values()) for name, files in FILES.items()}
    assert not {name: n for name, n in count.items() if n > LINES_OF_ALL[name]}
    long = {path: text.count("\n") for path, text in FILES["core"].items() if text.count("\n") > LINES.get(str(path), 720)}
    assert not long and (ROOT / "README.md").read_text(encoding="utf-8").count("\n") <= LINES["README.md"]


def test_no_function_is_longer_than_a_screen():
    functions = [(path, node) for path, text in PROGRAMS.items() for node in ast.walk(ast.parse(text))]
    functions = [(path, node) for path, node in functions if isinstance(node, ast.FunctionDef)]
    assert [f"{path}: {node.name}" for path, node in functions if node.end_lineno - node.lineno >= 60] == []


def at_the_top(path):
    return [node for node in ast.parse(PROGRAMS[path]).body if isinstance(node, (ast.Import, ast.ImportFrom))]


def test_leaves_import_no_sibling_and_no_file_imports_in_a_circle():
    graph = {path: imported(ast.parse(text)) - {path} for path, text in PROGRAMS.items()}
    for path, used in graph.items():
        tools = {other for other in used if other.parts[0] == "tools"}
        assert path.name not in COMMANDS or not any(imported(node) & tools for node in at_the_top(path)), path
        if path.parts[0] != "tools":
            assert not tools or path.name in COMMANDS, f"{path} imports {tools}"
        used -= tools if path.name in COMMANDS else set()
        if path.stem in LEAVES and len(path.parts) == 1:
            assert {other.stem for other in used} <= ({"kv_cache"} if path.stem == "rollout" else set()), path
    while done := {path for path, used in graph.items() if not used & graph.keys()}:
        graph = {path: used for path, used in graph.items() if path not in done}
    assert not graph, "these import each other in a circle"


def test_leaves_load_few_packages():
    for leaf in LEAVES:
        names = {name.split(".")[0] for node in at_the_top(Path(f"{leaf}.py")) for name in modules(node)}
        allowed = PACKAGES.get(leaf, {"torch", "numpy", "safetensors", "tqdm", "kv_cache"})
        assert names - sys.stdlib_module_names <= allowed, leaf


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_program_has_help_with_its_defaults_and_refuses_a_flag_that_it_does_not_know(script, monkeypatch, capsys):
    """As `python script` runs it, but in this process, which has loaded torch already."""
    parsers, print_help = [], argparse.ArgumentParser.print_help
    monkeypatch.setattr(argparse.ArgumentParser, "print_help", lambda self: parsers.append(self) or print_help(self))
    monkeypatch.setattr(sys, "path", [*sys.path])
    for flags, status in ("--help", 0), (SCRIPTS[script] + " --no_such_flag", 2):
        monkeypatch.setattr(sys, "argv", [script, *flags.split()])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        assert end.value.code == status
    said = capsys.readouterr()
    assert "usage:" in said.out and "unrecognized arguments: --no_such_flag" in said.err
    for parser in parsers:  # those of subcommands are added on the way
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
            elif action.nargs != 0 and action.default and action.default != argparse.SUPPRESS:
                assert "default: " in action.help, action


def test_the_readme_names_files_that_are_there():
    """In backquotes or as a link, with or without the function after a colon."""
    text = (ROOT / "README.md").read_text(encoding="utf-8") + (ROOT / "DETAILS.md").read_text(encoding="utf-8")
    for name, functions in re.findall(r"`([\w/]+\.(?:py|sh|md|txt))(?:: ([^`]+))?`", text):
        assert (ROOT / name).exists(), name
        source = (ROOT / name).read_text(encoding="utf-8")
        for function in re.findall(r"\w+", functions):
            assert re.search(rf"\b(def|class) {function}\b|^{function}\b", source, re.M), f"{name}: {function}"
    for link in re.findall(r"\]\(([^)#:]+)[)#]", text):
        assert (ROOT / link).exists(), link
