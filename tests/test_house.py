"""The limits that the project has set itself: sizes, imports, nothing that runs code from data."""

import ast
import re
import shutil

import pytest

from tests.common import ROOT, run_script

# What turns data into code: modules that unpickle or interpret, and calls by their name (re.compile is another name).
LOADERS = r"(c?[pP]ickle|cloudpickle|dill|marshal|shelve|joblib|yaml|code|runpy|pty)"

CODE_FROM_DATA = re.compile(
    rf"eval|exec|compile|__import__|(importlib\.)?(import_module|reload)|{LOADERS}\.\w+|\w+\.read_pickle|torch\.hub\.\w+"
    r"|os\.(system|popen|exec\w+|spawn\w+)|(subprocess\.)?(getoutput|getstatusoutput)|(dist|torch\.distributed)\.\w*object\w*"
)

SAFE_LOADERS = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False), "numpy.load": ("allow_pickle",
    False)}


def code_from_data(source):
    """What of `source` could run code that stands in data, as "line: name"."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            bad = [name for name in names if re.fullmatch(rf"{LOADERS}(\..*)?", name)]
            found += [f"{node.lineno}: import {name}" for name in bad]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {k.arg: k.value.value if isinstance(k.value, ast.Constant) else ... for k in node.keywords}
        constant = bool(node.args) and isinstance(node.args[0], ast.Constant)
        if CODE_FROM_DATA.fullmatch(name) and not (constant and name.endswith(("__import__", "import_module"))):
            found.append(f"{node.lineno}: {name}")
        if name in SAFE_LOADERS and keywords.get(SAFE_LOADERS[name][0]) is not SAFE_LOADERS[name][1]:
            found.append(f"{node.lineno}: {name} without {SAFE_LOADERS[name]}")
        if name.endswith((".recv", ".send")):  # of a multiprocessing connection: a pickle; its bytes have send_bytes
            found.append(f"{node.lineno}: {name}")
        found += [f"{node.lineno}: {key}" for key in ("shell", "trust_remote_code") if keywords.get(key, False) is not False]
    return found


def test_the_search_for_code_from_data_finds_it():
    bad = ["eval(x)", "exec(x)", "compile(x, '', 'exec')", "pickle.load(f)", "import pickle", "from pickle import loads",
        "marshal.loads(x)"]
    bad += ["import shelve", "torch.load(f)", "torch.load(f, weights_only=False)", "torch.load(f, weights_only=flag)",
        "np.load(f)"]
    bad += ["np.load(f, allow_pickle=True)", "os.system(x)", "os.popen(x)", "subprocess.run(x, shell=True)",
        "run(x, shell=flag)"]
    bad += ["AutoModel.from_pretrained(x, trust_remote_code=True)", "__import__(x)", "importlib.import_module(x)",
        "pipe.recv()"]
    bad += ["yaml.load(f)", "import yaml", "dist.broadcast_object_list(x)", "torch.hub.load(x)", "os.execv(x, y)",
        "pd.read_pickle(x)"]
    assert [line for line in bad if not code_from_data(line)] == []
    good = ["re.compile(x)", "model.eval()", "torch.compile(f)", "torch.load(f, weights_only=True)",
        "np.load(f, allow_pickle=False)"]
    good += ["subprocess.run([x])", "f(trust_remote_code=False)", "pipe.recv_bytes()", "json.load(f)",
        "import_module('torch')"]
    assert [line for line in good if code_from_data(line)] == []


def test_nothing_in_the_project_runs_code_that_stands_in_data():
    files = [path for path in ROOT.rglob("*.py") if path != ROOT / "test_sgpo.py" and path.parent != ROOT / "tests"]
    foreign = {path.parent for path in ROOT.rglob("pyvenv.cfg")}  # a virtual environment in the checkout
    files = [path for path in files if not foreign & set(path.parents)]
    # ranks of one run exchange Python objects with each other: what was written, and what went wrong
    own = dict.fromkeys((ROOT / "checkpoint.py", ROOT / "parallel.py"), ["dist.all_gather_object"])
    assert {"train.py", "eval.py", "model.py", "starter.py"} <= {path.name for path in files}
    for path in files:
        found = code_from_data(path.read_text(encoding="utf-8"))
        assert [line.partition(": ")[2] for line in found] == own.get(path, []), path


@pytest.mark.parametrize(
    "script",
    [
        "train.py",
        "eval.py",
        "tools/bench.py",
        "tools/sweep.py",
        "tools/report.py",
        "tools/faults.py",
        "-m data.tiny_world",
        "-m data.hard_world",
        "data/starter.py",
        "data/smollm2.py",
        "strategy.py",
    ],
)
def test_every_script_has_help(script):
    done = run_script(*script.split(), "--help")
    assert done.returncode == 0 and "usage:" in done.stdout
    needed = {
        "eval.py": "--model x --data x",
        "-m data.tiny_world": "--out x",
        "-m data.hard_world": "--out x",
        "data/starter.py": "--out x",
        "tools/faults.py": "--out x --log x",
    }.get(script, "")
    needed = {"tools/sweep.py": "table --results x", "tools/report.py": "rows x.csv --out x"}.get(script, needed)
    needed = {"tools/bench.py": "--out x", "data/smollm2.py": "--out x"}.get(script, needed)
    done = run_script(*script.split(), *needed.split(), "--no_such_flag")
    assert done.returncode == 2 and "unrecognized arguments: --no_such_flag" in done.stderr


@pytest.mark.parametrize("leaf", "model kv_cache rollout loss weighting strategy checkpoint grader".split())
def test_each_leaf_imports_alone_from_an_empty_folder(leaf, tmp_path):
    for name in {"rollout": ("rollout", "kv_cache")}.get(leaf, (leaf,)):  # the sampler is copied with its cache
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    torch_alone, nothing = "('torch',)", "()"
    allowed = {"strategy": nothing, "grader": nothing, "loss": torch_alone, "weighting": torch_alone}
    allowed = allowed.get(leaf, "('torch', 'safetensors')")
    check = (
        f"import sys; import {leaf}; third = [m for m in ('torch', 'safetensors', 'transformers', 'numpy') "
        f"if m in sys.modules and m not in {allowed}]; assert set(third) <= {{'numpy'}}, third"
    )
    done = run_script("-c", check, cwd=tmp_path, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
