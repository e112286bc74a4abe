"""A reward for programs: the share of a row's tests that the code in a response passes.

    python train.py --reward examples/run_tests.py:tests_passed --data rows.jsonl ...

    {"id": "1", "problem": "Write a Python function add(a, b).", "tests": ["add(1, 2) == 3", "add(-1, 1) == 0"]}

It runs code that a model wrote: on a machine of yours only in a container without network, and without what you cannot lose.
"""

import re
import subprocess
import sys
import tempfile


def tests_passed(response: str, row: dict) -> float:
    """From 0 to 1. A response without a block of code passes none."""
    blocks = re.findall(r"```(?:python)?\n(.*?)```", response, re.DOTALL)
    if not blocks:
        return 0.0
    passed = 0
    with tempfile.TemporaryDirectory() as folder:
        for test in row["tests"]:
            script = f"{blocks[-1]}\nif not ({test}):\n    raise SystemExit(1)"
            done = subprocess.run([sys.executable, "-I", "-c", script], cwd=folder, capture_output=True)
            passed += done.returncode == 0
    return passed / len(row["tests"])
