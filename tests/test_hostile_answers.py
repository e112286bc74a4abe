"""Answers that are made to be paid without being right, to run code, or to use up the machine."""

import json
import math
import random
import re
import time
from fractions import Fraction
from functools import partial
from pathlib import Path

import pytest

import grader
from grader import MathWorker, is_correct, same_answer
from tests.common import ROOT

# "references" has wrong answers to each, all of another value. In "hedges" and "boxes" {G} is the reference and {W} another
# answer; no line gives the reference as the one answer. In "long" {D} is a long number, elsewhere @ is the text to put there.
HOSTILE = json.loads((ROOT / "tests/hostile_answers.json").read_text(encoding="utf-8"))
REFERENCES = HOSTILE["references"]


def dress(rng, answer):
    """A response whose final answer is `answer`."""
    return rng.choice(HOSTILE["dresses"]).replace("@", answer)


def from_the_list(kind, rng):
    gold, text = rng.choice([gold for gold in REFERENCES if gold not in ("0", "7")]), rng.choice(HOSTILE[kind])
    if kind == "code":  # some of it does say 0 or 7
        text = rng.choice(HOSTILE["around_code"]).replace("@", text)
    text = text.replace("{G}", gold).replace("{W}", rng.choice(REFERENCES[gold]))
    return gold, text if kind == "boxes" else dress(rng, text)


def unicode(rng):
    """A wrong answer in look-alikes and with marks that do not show; a right number that goes on; noise without a letter."""
    kind, gold = rng.randrange(3), rng.choice(list(REFERENCES))
    if kind == 0:
        ours, theirs = "0123456789aceopxyABCEHKMOTX", rng.choice(HOSTILE["look_alikes"])
        text = list(rng.choice(REFERENCES[gold]).translate(str.maketrans(ours[: len(theirs)], theirs)))
        for _ in range(rng.randrange(1, 5)):
            text.insert(rng.randrange(len(text) + 1), rng.choice([*HOSTILE["marks"], "\ud800", "\udfff"]))
        return gold, dress(rng, "".join(text))
    if kind == 1:
        gold = rng.choice(HOSTILE["numbers"])
        return gold, dress(rng, rng.choice(HOSTILE["number_goes_on"]).replace("@", gold))
    ranges = [(0, 0x2F), (0x80, 0x2FF), (0x300, 0x36F), (0x600, 0x6FF), (0x2000, 0x2BFF), (0xD800, 0xDFFF), (0xFF00, 0x10FFFF)]
    return gold, dress(rng, "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.choice([1, 5, 50, 900]))))


def latex(rng):
    """Broken, deep, huge or endless LaTeX. The reference is a number that no short formula gives."""
    depth, digits = rng.choice([2, 7, 9, 60, 400]), rng.choice([3, 30, 300, 990, 1100])
    number = "".join(rng.choice("123456789") for _ in range(digits))
    made = [before * depth + once + after * depth for before, once, after in HOSTILE["deep"]]
    made += [text.replace("{D}", number) for text in HOSTILE["long"]] + ["7" * 100_000]
    made.append(" ".join(rng.choice(HOSTILE["tokens"]) for _ in range(rng.choice([5, 30, 200]))))
    return "\\frac{918273645546372819}{918273645546372823}", dress(rng, rng.choice(made))


def write(rng, value):
    """The exact value in one of several notations."""
    top, bottom = Fraction(value).as_integer_ratio()
    styles = [f"\\frac{{{top}}}{{{bottom}}}", f"{top}/{bottom}", f"\\dfrac{{{3 * top}}}{{{3 * bottom}}}"]
    if bottom == 1:
        styles += [f"{top}", f"{top:,}", f"{top}.0", f"{top:06d}", f"{top} \\times 10^{{0}}"]
    if 1000 % bottom == 0:
        styles += [f"{float(value):.3f}", f"{1000 * value} \\times 10^{{-3}}"]
    if 1 < bottom < value:
        styles.append(f"{top // bottom}\\frac{{{top % bottom}}}{{{bottom}}}")
    return rng.choice(styles)


def values(rng):
    """A number against one with another digit, sign, place or order."""
    value = Fraction(rng.randint(-9999, 9999), rng.choice([1, 1, 1, 2, 3, 7, 8, 10, 100, 125]))
    digits = str(abs(value.numerator))
    others = [-value, value * 10, value / 10, value * 100, value + 1, value - 1, value + Fraction(1, 10**9)]
    others.append(Fraction(int("".join(rng.sample(digits, len(digits)))), value.denominator))
    wrong = write(rng, rng.choice([other for other in others if other != value]))
    return write(rng, value), dress(rng, wrong + rng.choice(["", "", " \\text{ apples}", "\\text{ cm}", " dollars"]))


def expression(rng, depth):
    """(LaTeX, its exact value, whether it can be a factor without brackets), from our own arithmetic."""
    n, m = Fraction(rng.randint(2, 12)), rng.randint(3, 6)
    leaves = [(f"{n}", n, True), (f"\\frac{{{m}}}{{{n}}}", m / n, True), (f"\\sqrt{{{n * n}}}", n, True)]
    if depth == 0:
        return rng.choice([*leaves, (f"{m}!", Fraction(math.factorial(m)), True)])
    (a, x, a_alone), (b, y, b_alone) = expression(rng, depth - 1), expression(rng, depth - 1)
    a_in, b_in = (text if alone else f"({text})" for text, alone in ((a, a_alone), (b, b_alone)))
    made = [(f"{a} + {b}", x + y, False), (f"{a} - {b_in}", x - y, False), (f"({a})^2", x**2, True)]
    beside = (f"({a})({b})", f"{a_in}({b})", f"\\left({a}\\right)\\left({b}\\right)")
    between = (f"{a_in}{sign}{b_in}" for sign in (" \\cdot ", " \\times ", " * "))
    made += [(text, x * y, False) for text in (*beside, *between)]
    return rng.choice([*made, (f"\\frac{{{a}}}{{{b}}}", x / y, True)] if y else made)


def arithmetic(rng):
    """An unevaluated expression against what a bad parser would make of it: a sum for a product, a part for the whole."""
    text, value, _ = expression(rng, rng.randint(1, 2))
    numbers = [int(n) for n in re.findall("[0-9]+", text)]
    misread = [sum(numbers), math.prod(numbers), numbers[0], numbers[-1], numbers[0] + numbers[-1], numbers[0] - numbers[-1]]
    misread += [int("".join(map(str, numbers))), -value, value / 2, value + 1, value + numbers[-1], round(value)]
    return write(rng, rng.choice([other for other in misread if other != value])), f"\\boxed{{{text}}}"


FAMILIES = {"unicode": (unicode, 1500), "latex": (latex, 400), "values": (values, 1400), "arithmetic": (arithmetic, 200)}
FAMILIES |= {kind: (partial(from_the_list, kind), 900) for kind in ("code", "formats", "boxes", "hedges")}


@pytest.mark.parametrize("name", FAMILIES)
def test_seven_thousand_hostile_answers_are_never_paid(name, eval_worker, tmp_path):
    (family, count), rng = FAMILIES[name], random.Random(name)
    pairs, timeouts = dict.fromkeys(family(rng) for _ in range(count)), eval_worker.timeouts
    assert len(pairs) > count / 2
    eval_worker.start()  # many seconds on a busy machine, and no question's time
    for gold, response in pairs:
        start = time.perf_counter()
        assert not is_correct(response.replace("CANARY", f"{tmp_path}/canary"), gold, eval_worker), (gold, response[:200])
        assert time.perf_counter() - start < eval_worker.timeout_s, (gold, response[:200])
    assert eval_worker.timeouts == timeouts and list(tmp_path.iterdir()) == []


def test_what_is_right_is_paid(eval_worker):
    for gold in REFERENCES:
        assert not grader.why_unusable(grader.normalise_answer(gold)), gold
        assert is_correct(f"\\boxed{{{gold}}}", gold, eval_worker), gold
    for row in HOSTILE["honest"]:
        assert is_correct(f"\\boxed{{{row['answer']}}}", row["reference"], eval_worker), row
    rng = random.Random(0)
    drawn = [expression(rng, rng.randint(1, 2)) for _ in range(200)]
    assert sum(same_answer(text, write(rng, value), eval_worker) for text, value, _ in drawn) >= 180  # read, not refused


def test_answers_that_were_paid_once(eval_worker):
    for row in HOSTILE["paid_once"]:
        for response in (f"\\boxed{{{row['answer']}}}", f"The final answer is {row['answer']}."):
            assert not is_correct(response, row["reference"], eval_worker), row


# sympy evaluates the digits of a number ("Integer (49 )") and helpers of its own; nothing else may be compiled from text.
HOOK = r"""
    own = re.compile(r"from sympy import \*|(Integer|Float) ?\('?[0-9.]+'? ?\)\s*|def monomial_\w+\(A, .*", re.DOTALL)
    def watch(event, arguments):
        code = event == "compile" and arguments[1] == "<string>" and not own.fullmatch(str(bytes(arguments[0]), "utf-8"))
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        acts = event.startswith(("os.", "subprocess.", "shutil.", "socket.", "ctypes.", "pickle.", "pty."))
        if code or writes or (acts and event not in ("os.listdir", "os.scandir")):
            os._exit(99)
    sys.addaudithook(watch)
"""


def test_code_in_answers_is_never_run(monkeypatch, tmp_path):
    """In a child that ends if it evaluates text, writes a file, or starts a process."""
    ready, judge = '    os.write(1, b"ready\\n")\n', "equal(*json.loads(line))"
    source = (ROOT / "grader.py").read_text(encoding="utf-8")
    assert source.count(ready) == source.count(judge) == 1
    source, child = source.replace(ready, HOOK + ready), tmp_path / "child.py"
    monkeypatch.setattr(grader, "__file__", str(child))
    monkeypatch.chdir(tmp_path)
    child.write_text(source.replace(judge, "eval(json.loads(line)[1])"), encoding="utf-8")
    with MathWorker() as worker:  # it sees what is run
        assert not worker.equal("7", "7") and worker.timeouts == 1
    child.write_text(source, encoding="utf-8")
    with MathWorker() as worker:
        for text in HOSTILE["code"] + HOSTILE["formats"]:  # straight into the child, without the checks before it
            worker.equal(text, f"x_{{{text}}}")
        assert worker.timeouts == 0 and worker.equal("4", "\\sqrt{16}") and not worker.equal("4", "\\sqrt{17}")
    assert list(tmp_path.iterdir()) == [child]


def test_the_child_has_no_secrets_and_cannot_write(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "canary-of-the-environment")
    with MathWorker(memory_bytes=600 * 1024**2) as worker:
        worker.start()
        process = Path(f"/proc/{worker._process.pid}")
        if not process.is_dir():
            pytest.skip("no /proc")
        assert b"canary-of-the-environment" not in (process / "environ").read_bytes()
        limits = {line[:26].strip(): line[26:].split()[:2] for line in (process / "limits").read_text().splitlines()}
    assert limits["Max address space"] == [str(600 * 1024**2)] * 2
    assert limits["Max file size"] == limits["Max core file size"] == ["0", "0"]


@pytest.mark.parametrize("hog", ["9^{9^{9^{9}}}", "(x+1)^{99999}"])
def test_an_answer_that_computes_for_ever_or_eats_memory(hog):
    """The last one ends at the memory, long before the time."""
    settings = {"timeout_s": 60.0, "memory_bytes": 200 * 1024**2} if "x" in hog else {"timeout_s": 1.0}
    with MathWorker(**settings) as worker:
        worker.start()
        start = time.perf_counter()
        assert not is_correct(f"\\boxed{{{hog}}}", "x + 7", worker) and time.perf_counter() - start < 30.0
        assert worker.timeouts <= 1 and same_answer("\\sqrt{16}", "4", worker)
