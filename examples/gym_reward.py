r"""A reward for the tasks of reasoning-gym: the package's own verifier judges the final answer, and only a right one pays.

    pip install reasoning-gym && python data/prepare.py gym --out gym
    python train.py --reward examples/gym_reward.py:score --data gym/train.jsonl --eval_data gym/test.jsonl --sft_fraction 0 ...

A row's own field `entry` has the package's answer and metadata, which the verifier needs. The verifiers pay something for wrong
answers too: 0.65 if one of two knights is right, 0.5 for 4 × 3 in place of 2 × 2 × 3. A policy would learn to collect that.

Before you add a task, read its verifier: those of countdown and puzzle24, for instance, evaluate the answer as Python.
"""

import re
import sys

from grader import extract_answer

try:
    from reasoning_gym import get_score_answer_fn
except ImportError:
    sys.exit("gym_reward.py needs one more package: pip install reasoning-gym")

# The verifiers compare plain text, and in a box models write LaTeX.
LATEX = [(r"\\(?:text|mathrm|textbf|mathbf) ?\{([^{}]*)\}", r"\1"), (r"\\(?:times|cdot)(?![A-Za-z])", "×"), (r"\\[ ,;]|~", " ")]


def score(response: str, row: dict) -> float:
    """1 if the verifier gives the response's final answer its full score, else 0. KeyError if the row is of another kind."""
    # Some verifiers take a missing field for a wrong answer, so all are looked up here.
    entry = {"question": row["problem"], "answer": row["entry"]["answer"], "metadata": row["entry"]["metadata"]}
    verify = get_score_answer_fn(entry["metadata"]["source_dataset"])
    answer = extract_answer(response)
    if answer is None:
        return 0.0
    for pattern, plain in LATEX:
        answer = re.sub(pattern, plain, answer)
    try:
        return float(verify(answer, entry) == 1)
    except ValueError:  # from int(), of an answer that is no number
        return 0.0
