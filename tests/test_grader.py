"""Answer extraction and grading, and where they differ from math-verify alone."""

import json
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest

import grader
from grader import MathWorker, extract_answer, is_correct, same_answer

# (reference, prediction), grouped by what they are about. Each verdict was decided by hand before it was run.
EVAL_SAME = [
    # integers, decimals, separators, signs
    ("42", "42"), ("45", "045"), ("4", "4.0"), ("4", "4."), ("-7", "−7"), ("1234", "1,234"), ("10,\\!080", "10080"),
    ("11,\\! 111,\\! 111,\\! 100", "11111111100"), ("23{,}000", "23000"), (".0000672", "0.0000672"), ("+2", "2"),
    ("1000000", "1\\,000\\,000"), ("0", "-0"), ("12345678901234567890123", "12345678901234567890123.0"),
    # fractions, mixed and repeating numbers, powers of ten
    ("\\frac{14}{3}", "\\dfrac{14}{3}"), ("\\frac43", "4/3"), ("\\frac 59", "\\tfrac{5}{9}"), ("\\frac9{19}", "9/19"),
    ("\\frac{1}{2}", "0.5"), ("0.5", "\\frac12"), ("-\\frac{1}{2}", "\\frac{-1}{2}"), ("-1./3", "-\\frac{1}{3}"),
    ("\\frac{639}{40}", "15\\frac{39}{40}"), ("1\\frac{4}{5}", "1.8"), ("2.5", "2 1/2"), ("\\frac{2}{4}", "1/2"),
    ("4.5e33", "4.5 \\times 10^{33}"), ("3e8", "300000000"),
    ("0.00025", "2.5 \\cdot 10^{-4}"),
    # percent
    ("50\\%", "50"), ("50\\%", "50%"), ("50\\%", "0.5"), ("50\\%", "\\frac{1}{2}"), ("50", "50\\%"), ("0.5", "50%"),
    ("17.5%", "17.5"), ("$8 \\%$", "8 percent"), ("8\\%", "8\\text{ percent}"),
    # money and units
    ("\\$18.90", "18.90"), ("36", "$36"), ("36", "\\$36"), ("\\$32,\\!348", "32348"), ("5", "5 dollars"),
    ("\\$5", "5 dollars"),
    ("10\\text{ cm}", "10"), ("10", "10 cm"), ("10", "10\\,\\text{cm}"), ("10", "10 \\mathrm{~cm}"),
    ("16", "16 apples"),
    ("15\\mbox{ cm}^2", "15"), ("64", "64 square units"),
    ("5.4 \\text{ cents}", "5.4"),
    ("6\\frac{1}{6}\\text{ feet}", "\\frac{37}{6}"), ("14 \\text{ right triangles}", "14"),
    ("12\\sqrt{13}\\text{ feet}", "12\\sqrt{13}"), ("3", "3 km/hr"),
    ("55", "55 miles per hour"), ("0.16", "0.16 liters of water"),
    ("\\sqrt{65}", "√65"),
    ("1 + i \\sqrt{3}", "1+i√3"), ("6", "6 years old"), ("\\frac13", "1/3 (≈ 0.333)"),
    ("\\frac{x+5}{6}", "h^{-1}(x)=\\frac{x+5}{6}"),
    # degrees
    ("90^\\circ", "90"), ("90", "90^{\\circ}"), ("90^\\circ", "90°"), ("140\\text{ degrees}", "140^\\circ"),
    ("(45^{\\circ}, 60^{\\circ})", "(45, 60)"),
    # number bases
    ("52_8", "52"), ("4210_{5}", "4210_5"), ("\\text{A5}_{11}", "A5_{11}"),
    # intervals and unions
    ("(3,4]", "\\left(3, 4\\right]"), ("x \\in [-2,7]", "[-2, 7]"), ("[-2,7]", "x\\in[-2,7]"),
    ("(2,\\infty)", "(2, +\\infty)"),
    ("(0,9) \\cup (9,36)", "(9,36)\\cup(0,9)"),
    ("k \\geqslant 2", "k \\ge 2"),
    ("\\left(\\frac{3}{5},\\frac{8}{3}\\right]", "(0.6, 8/3]"),
    # tuples, sets, lists
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\pi/2)"), ("(1,-16,-4,43)", "(1, -16, -4, 43)"),
    ("3, 5, 7", "7, 3, 5"),
    ("\\{1,2\\}", "2, 1"), ("1,-2", "-2 \\text{ or } 1"), ("1,-2", "x = 1, x = -2"), ("1,-2", "x=1 \\text{ and } x=-2"),
    ("$(6,3),(9,3)$", "(9,3), (6,3)"), ("$69$,$84$", "84, 69"), ("2, 3, \\text{ and } 4", "2,3,4"),
    ("\\{5\\}", "5"), ("2400, 1350, 864", "864, 1350, 2400"),
    # words and letters
    ("\\text{Evelyn}", "Evelyn"), ("\\text{Evelyn}", "evelyn."), ("\\text{(C)}", "C"), ("C", "(C)"),
    ("(\\text{H})", "H"),
    ("\\text{(E)},", "E"), ("\\text{No}", "no"), ("\\text{two lines}", "two lines"), ("\\text{A, B}", "A,B"),
    ("\\text{October 30}", "October 30"),
    # matrices
    ("\\begin{pmatrix} -1/3 \\\\ 2/3 \\end{pmatrix}", "\\begin{bmatrix} -\\frac{1}{3} \\\\ \\frac23 \\end{bmatrix}"),
    ("\\begin{pmatrix} 1 & 0 \\\\ 0 & 3 \\end{pmatrix}", "\\begin{pmatrix}1&0\\\\0&3\\end{pmatrix}"),
    # expressions
    ("3\\sqrt{13}", "\\sqrt{117}"), ("11\\sqrt2", "11\\sqrt{2}"), ("\\frac{\\sqrt{3}}{3}", "\\frac{1}{\\sqrt{3}}"),
    ("2\\sqrt{5}", "2√5"), ("3\\sqrt{2}", "3sqrt(2)"), ("2k+2", "2(k+1)"), ("(a+5)(b+2)", "ab+2a+5b+10"),
    ("p - q", "-q+p"),
    ("6 - 5i", "-5i+6"), ("\\cot x", "\\frac{\\cos x}{\\sin x}"), ("$\\binom{2n}{n}$", "\\frac{(2n)!}{(n!)^2}"),
    ("18+2\\pi", "2(9+\\pi)"), ("1024", "2^{10}"), ("4", "\\sqrt{16}"),
    ("$\\frac{n(n+1)}{2}$", "\\frac{n^2+n}{2}"), ("5r^5", "5r^{5}"), ("$2^{1009}$", "2 \\cdot 2^{1008}"), ("xy", "yx"),
    # equations
    ("x=5", "5"), ("5", "x = 5"), ("x=5", "x=5.0"), ("$f(x)=2 x$", "f(x) = 2x"), ("2x", "f(x)=2x"),
    ("y = 2x + 3", "2x+3"),
    ("0.5", "\\frac12 = 0.5"),
    ("7", "x = 3 + 4 = 7"), ("\\frac{20000}{\\pi}", "\\frac{20000}{\\pi} \\approx 6366.2"), ("0.56 = 56\\%", "0.56"),
    ("(3,4)", "(x, y) = (3, 4)"),
    # punctuation and delimiters
    ("17", "17."), ("17", "$17$"), ("17", "\\(17\\)"), ("17", "\\boxed{17}"), ("240\\text{ ways.}", "240"),
    ("\\boxed{204}", "204"),
]  # fmt: skip

EVAL_DIFFERENT = [
    # numbers: exact
    ("42", "43"), ("7", "-7"), ("\\frac{1}{3}", "0.333333"), ("7", "6.9999999"), ("1234", "1.234"), ("12", "1 2"),
    ("0.000000001", "0.000000002"), ("1e-10", "0"), ("3", "3.14"), ("\\frac{3}{2}", "1\\frac{3}{2}"), ("100", "10^3"),
    ("12345678901234567890123", "12345678901234567890124"), ("0.16", "0.1\\overline{6}"), ("5", "\\frac{5}{0}"),
    ("0", "\\frac{1}{0}"),
    # what math-verify reads wrongly
    ("5", "2(3)"), ("5", "2 3"), ("5", "(2)(3)"), ("0", "10 000"), ("\\frac{7}{2}", "2\\frac{3}{2}"), ("n", "N"),
    ("\\frac{n}{2}", "\\frac{N}{2}"),
    ("x", "x'"), ("0", "\\text{not } 0"), ("0", "n o t 0"), ("6m", "6"),
    ("\\frac{1}{\\sqrt{2}}c", "\\frac{1}{\\sqrt{2}}"),
    ("10^{-20}\\pi", "10^{-21}\\pi"), ("7", "8=7"), ("7", "\\boxed{8}=7"), ("\\frac{1}{2} ", "1:2:3"),
    ("E_{1}", "E_{2}"),
    # several answers, hedging
    ("3", "3 or 4"), ("3", "3, 4"), ("3", "3 \\text{ or } 4"), ("3", "\\{3, 4\\}"), ("3", "3; 4"),
    ("3", "$3$ or $4$"), ("3", "3, 3"),
    ("3, 4", "3"), ("3, 4", "3, 4, 5"), ("-2,-2", "-2"), ("3", "\\pm 3"), ("3", "3 (or 4)"), ("1,-2", "1,2"),
    ("3", "3 or more"), ("3", "3/4"),
    ("3", "3 \\neq 4"), ("3", "2 < x < 4"), ("3", "x > 3"), ("3", "\\ge 3"), ("3", "about 3"), ("3", "not 3"),
    ("3", "3 \\text{ if } x>0, 4"),
    ("7", "x=8=7"), ("7", "7 = 8"), ("7", "8 \\approx 7"), ("3", "-3 \\text{ or } 3"), ("[1,5]", "1, 2, 3, 4, 5"),
    ("2", "1, 2, 3"),
    # percent, units, multiples
    ("50\\%", "5"), ("0.5", "0.5%"), ("50", "0.5"), ("50%", "0.5%"), ("1", "1%"),
    ("5 \\text{ cents}", "5 \\text{ dollars}"), ("\\$5", "5 cents"),
    ("5", "5 million"), ("5", "5 thousand dollars"), ("5", "5 dozen"), ("12\\text{ cm}", "12\\text{ km}"),
    ("30^\\circ", "30\\text{ radians}"),
    ("5\\sqrt{6}", "√65"), ("30", "5√6"), ("5", "5–6"), ("3", "3 tenths"), ("65m", "65"),
    ("5", "5\\text{ out of 6}"),
    ("2\\pi", "2\\pi mm"), ("2abc", "2"), ("5", "5x"), ("5x", "5"), ("2", "2m"), ("10", "10 minus two"),
    ("3", "3\\sqrt{2}"),
    ("3", "3 squared"), ("4", "4!"),
    # number bases
    ("52", "52_8"), ("52_8", "52_9"), ("42", "52_8"), ("52_8", "42"), ("52_8", "528"),
    # brackets, order, shape
    ("(1,2)", "[1,2]"), ("(3,4]", "(3,4)"), ("(-\\infty, 0]", "(-\\infty, 0)"), ("(1,2)", "(2,1)"),
    ("(1,2)", "\\{1,2\\}"), ("(2,4)", "2, 4"),
    ("1,-2", "(1,-2)"), ("(1,2,3)", "(1,3,2)"), ("(1,2)", "(1,2,3)"), ("(1,2)", "12"),
    ("(5,\\infty)", "(-\\infty,5) \\cup (5,\\infty)"),
    ("(-\\infty, 2) \\cup (3, \\infty)", "(-\\infty, 2] \\cup [3, \\infty)"), ("\\{1,2\\}", "\\{1,3\\}"),
    ("(1,2),(3,4)", "(1,3),(2,4)"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 1 & 2 \\end{pmatrix}"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 2 \\\\ 1 \\end{pmatrix}"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "3"),
    ("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", "\\begin{pmatrix} 1 & 2 & 3 & 4 \\end{pmatrix}"),
    # words and letters
    ("\\text{Evelyn}", "Angela"), ("\\text{(C)}", "B"), ("\\text{(C)}", "(C) or (D)"), ("\\text{ABCD}", "CBAD"),
    ("CBAD", "ABCD"), ("\\text{B, A}", "A, B"),
    ("\\text{even}", "\\text{odd}"), ("\\text{east}", "seat"), ("\\text{Yes}", "No"), ("\\text{Monday}", "5"),
    ("5", "Monday"),
    ("8:34 \\text{ p.m.}", "8:34 a.m."), ("3:4", "4:3"), ("\\sqrt{53}", "ANSWER"), ("SRAC=LRAC", "LRAC"),
    ("\\text{neither}", "either"),
    # expressions
    ("\\sqrt{2}", "1.41"), ("2\\pi", "6.28"), ("x^2", "x"), ("2n", "2k"), ("p - q", "q - p"), ("1+2i", "1-2i"),
    ("\\frac{x}{2}", "\\frac{2}{x}"),
    ("\\ln 2", "\\log 2"), ("\\lfloor n/2 \\rfloor", "n/2"), ("3\\sqrt{13}", "\\sqrt{39}"), ("2^n", "n^2"),
    ("x^2+1", "x^2-1"), ("\\infty", "-\\infty"),
    ("\\frac{1}{0}", "\\infty"), ("5", "\\infty"), ("5", "nan"), ("0", "\\text{NaN}"), ("0", "\\infty - \\infty"),
    ("5", "\\text{None}"), ("1", "\\infty^0"),
    ("\\sin 30^\\circ", "\\sin 30"), ("1+\\sqrt{3}", "1-\\sqrt{3}"), ("\\pi", "3.14"), ("\\frac{a}{b}", "\\frac{A}{B}"),
    # equations and inequalities: the problem's own statement is no answer
    ("x=5", "3x+2=17"), ("x=5", "y=5"), ("x=5", "x=6"), ("5", "x+y=5"), ("5x - 7y = 0", "0"), ("y=2x+3", "y=3x+2"),
    ("y=2x+3", "0=0"), ("y=2x+3", "y=y"),
    ("x > 3", "2x+1 > 7"), ("x > 3", "x \\ge 3"), ("x > 3", "x < 3"), ("x > 3", "3"), ("k=3", "k"),
    ("f(x)=x", "x=x"), ("5", "5=x=6"), ("5", "x"),
    ("a < b \\le c < d", "a < b < c \\le d"), ("1 < x", "x > 2"),
    # doubt: other powers of a unit, products, a union is no list, signs that the parser would skip
    ("5\\text{ cm}^2", "5\\text{ cm}^3"), ("5", "5 xy"), ("20\\text{ square units}", "20^\\circ"), ("x", "x⁹"),
    ("(0,9) \\cup (9,36)", "(0,9), (9,36)"), ("\\pi", "3.14159265358"), ("\\frac{800}{3}", "800\\frac{}{3}"),
    ("1, 1, 2", "1, 2, 2"), ("2n", "2N"), ("\\text{Amy}, \\text{Bob}", "\\text{Bob}, \\text{Amy}"), ("4", "4 _8"),
    ("4", "(4)_8"), ("x+1", "(" * 20 + "x+1" + ")" * 20),
    # broken
    ("5", ""), ("5", "\\frac{5}{"), ("5", "}5{"), ("5", "5" * 1001), ("5", "(5"), ("5", "\\boxed{}"),
    ("\\frac{1}{2}", "\\frac{1}{2"), ("5", "="), ("5", "{}"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "prediction"), EVAL_SAME)
def test_grader_accepts(answer, prediction, eval_worker):
    assert same_answer(prediction, answer, eval_worker)
    assert is_correct(f"So we get \\boxed{{{prediction}}}.", answer, eval_worker)


@pytest.mark.parametrize(("answer", "prediction"), EVAL_DIFFERENT)
def test_grader_rejects(answer, prediction, eval_worker):
    assert not same_answer(prediction, answer, eval_worker)
    assert eval_worker.timeouts == 0


EVAL_NUMBERS = [
    ("-7", (-7, 1)), ("1,234.5", (2469, 2)), ("-\\frac{1}{-4}", (1, 4)), ("-2\\frac{1}{2}", (-5, 2)),
    ("3 1/4", (13, 4)),
    ("-2.5 \\times 10^{-2}", (-1, 40)), ("1e3", (1000, 1)),
    (".5", (1, 2)),
    ("1,23", None), ("0,123", None), ("2\\frac{3}{2}", None), ("\\frac{1}{0}", None), ("1 2", None), ("1.2.3", None),
    ("", None), ("-", None), ("٣", None), ("x", None), ("1e9999", None), ("nan", None), ("inf", None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), EVAL_NUMBERS)
def test_plain_numbers_by_hand(text, value):
    assert grader._number(text) == (value and Fraction(*value))


def test_grader_tables_hold_enough_and_no_pair_twice():
    assert len(EVAL_SAME) >= 100 and len(EVAL_DIFFERENT) >= 100
    pairs = EVAL_SAME + EVAL_DIFFERENT
    assert len(set(pairs)) == len(pairs)


EVAL_EXTRACTED = [
    ("so \\boxed{42}.", "42"), ("\\boxed{1} then \\boxed{2}", "2"), ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
    ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"), ("\\boxed {7}", "7"), ("\\boxed 7 apples", "7"), ("$\\boxed{ 7 }$", "7"),
    ("\\boxed{3} or \\boxed{4", "3"), ("\\boxed{4", None), ("\\boxed{\\frac{1}{2}", None), ("\\fbox{7}", None),
    ("\\boxed{}", None),
    ("\\boxed{7}, as asked, in \\boxed{}", "7"), ("\\boxed{2 + \\boxed{3}}", "2 + \\boxed{3}"), ("} \\boxed{5} {", "5"),
    ("\\boxed{1\n+1}", "1\n+1"), ("\\boxed{a \\\\}", "a \\\\"), ("boxed{7}", None),
    ("She has 18.\n#### 18", "18"), ("#### 1\n#### 1,200", "1,200"), ("#### $5", "$5"), ("#### -3\n", "-3"),
    ("#### Step 2: solve for x and y now", None), ("#### Conclusion\nThe final answer is 42.", "42"),
    ("\\boxed{3}\n#### 4", "3"), ("#### 4\nAnswer: 5", "4"),
    ("The final answer is 42.", "42"), ("The final answer is: $\\frac{1}{2}$.", "\\frac{1}{2}"), ("Answer: x", "x"),
    ("**Answer:** 3.5 m", "3.5 m"), ("**Final Answer:**\n42", "42"), ("The answer is \\(x+1\\). Good.", "x+1"),
    ("The answer to the problem is 12. Check: 12.", "12"), ("the answer is 3. No, the answer is 4.", "4"),
    ("Answer: $3$ or $4$", "$3$ or $4$"), ("The answer is $5", "$5"), ("", None), ("I do not know.", None),
    ("42", None),
    # thoughts: behind the last </think> first, else the whole text's last box, as verl and LUFFY do
    ("<think>\\boxed{1}</think> \\boxed{2}", "2"), ("<think>\\boxed{1}</think> The answer is 2.", "2"),
    ("<think>\\boxed{1}</think> Done.", "1"), ("<think>first \\boxed{1}, then", "1"),
    ("a</think>\\boxed{1}</think>", "1"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), EVAL_EXTRACTED)
def test_extract_answer(text, expected):
    assert extract_answer(text) == expected


def test_only_the_extracted_answer_is_graded(eval_worker):
    assert not is_correct("\\boxed{7} is wrong, it is \\boxed{8}", "7", eval_worker)  # math-verify: {7, 8}
    assert not is_correct("\\boxed{3} and \\boxed{4}", "3, 4", eval_worker)
    assert not is_correct("The value 7 is plausible.", "7", eval_worker)
    assert is_correct("Some text with 8.\n#### 7 apples", "7", eval_worker)


def test_extraction_is_linear_in_degenerate_text():
    texts = ["\\boxed{" * 10_000, "{" * 50_000, "\n" * 50_000]
    texts += ["answer is " * 8_000, "answer" + " " * 50_000, "#### " * 9_000]
    start = time.perf_counter()
    assert [extract_answer(text) for text in texts[:3]] == [None] * 3
    for text in texts:
        extract_answer(text)
    assert time.perf_counter() - start < 2.0


def test_plain_numbers_never_start_the_child_and_are_fast():
    worker = MathWorker()
    pairs = [("42", "42"), ("1,234.50", "1234.5"), ("7", "8"), ("\\frac12", "0.5"), ("50\\%", "50")]
    pairs += [("\\text{Evelyn}", "Evelyn")]
    assert [same_answer(p, g, worker) for g, p in pairs] == [True, True, False, True, True, True]
    assert worker._process is None
    best = min(_eval_time(lambda: same_answer("42", "43", worker), 2000) for _ in range(5))
    assert best < 50e-6


def _eval_time(call, repeats):
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def test_power_tower_ends_at_the_time_limit_and_counts():
    with MathWorker(timeout_s=1.0) as worker:
        assert same_answer("\\sqrt{16}", "4", worker)  # the child is up: its start is not on the clock
        start = time.perf_counter()
        assert not is_correct("\\boxed{9^{9^{9^{9}}}}", "387420489", worker)
        assert time.perf_counter() - start < 10
        assert worker.timeouts == 1
        assert same_answer("\\sqrt{16}", "4", worker)  # a new child answers
        assert worker.timeouts == 1


def test_a_list_of_power_towers_costs_one_limit_only():
    with MathWorker(timeout_s=1.0) as worker:
        tower = "9^{9^{9^{9}}}"
        assert not same_answer(", ".join([tower] * 6), "1, 2, 3, 4, 5, 6", worker)
        assert worker.timeouts == 1


def test_killed_child_is_replaced():
    with MathWorker() as worker:
        assert same_answer("\\sqrt{16}", "4", worker)
        process = worker._process
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert same_answer("\\sqrt{16}", "4", worker)  # it died idle: nothing is lost
        assert worker._process.pid != process.pid and worker.timeouts == 0
        os.kill(worker._process.pid, signal.SIGSTOP)  # alive but silent: lost at the limit
        worker.timeout_s = 0.3
        assert not same_answer("\\sqrt{16}", "4", worker)
        assert worker.timeouts == 1


def test_a_signal_to_the_whole_group_leaves_the_child_to_its_parent():
    with MathWorker() as worker:
        assert same_answer("\\sqrt{16}", "4", worker)
        for number in (signal.SIGTERM, signal.SIGINT):
            worker._process.send_signal(number)
        assert same_answer("\\sqrt{25}", "5", worker) and worker.timeouts == 0


def test_child_has_a_memory_limit():
    with MathWorker(timeout_s=20.0, memory_bytes=600 * 1024**2) as worker:
        assert same_answer("\\sqrt{16}", "4", worker)
        limits = Path(f"/proc/{worker._process.pid}/limits")
        if not limits.is_file():
            pytest.skip("no /proc")
        line = next(row for row in limits.read_text().splitlines() if row.startswith("Max address space"))
        assert line.split()[3] == str(600 * 1024**2)


def test_close_ends_the_child_and_a_child_that_cannot_start_is_an_error(monkeypatch, capfd):
    with MathWorker() as worker:
        same_answer("\\sqrt{16}", "4", worker)
        process = worker._process
    assert process.poll() is not None
    monkeypatch.setattr(grader.inspect, "getsource", lambda function: "import no_such_module_at_all")
    with MathWorker() as worker, pytest.raises(RuntimeError, match="did not start"):
        same_answer("\\sqrt{16}", "4", worker)
    assert "no_such_module_at_all" in capfd.readouterr().err


def test_caller_keeps_its_alarm(eval_worker):
    # math-verify in the caller's process would replace the handler and cancel the alarm
    handler = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.alarm(100)
    assert same_answer("\\sqrt{16}", "4", eval_worker)
    assert signal.alarm(0) > 90 and signal.signal(signal.SIGALRM, handler) is signal.SIG_IGN


# Where math-verify by itself (parse both in dollars, verify) says something else than the tables above.
PLAIN_REJECTS = [
    # TeX's thin spaces and Unicode's square root are not in its grammar
    ("1000000", "1\\,000\\,000"), ("\\sqrt{65}", "√65"), ("1 + i \\sqrt{3}", "1+i√3"), ("2\\sqrt{5}", "2√5"),
    # numbers: a point without digits behind, a mixed number in plain text, e-notation, one percent sign without a backslash
    ("-1./3", "-\\frac{1}{3}"), ("2.5", "2 1/2"), ("4.5e33", "4.5 \\times 10^{33}"), ("3e8", "300000000"), ("17.5%", "17.5"),
    ("0.56 = 56\\%", "0.56"),
    # words behind a number become factors
    ("5", "5 dollars"), ("\\$5", "5 dollars"), ("3", "3 km/hr"), ("55", "55 miles per hour"), ("0.16", "0.16 liters of water"),
    ("6", "6 years old"), ("\\frac13", "1/3 (≈ 0.333)"),
    # words: it compares what it parsed, letter by letter, or the string with all its punctuation
    ("\\text{A5}_{11}", "A5_{11}"), ("\\text{Evelyn}", "evelyn."), ("\\text{(E)},", "E"), ("\\text{A, B}", "A,B"),
    ("\\text{October 30}", "October 30"),
]  # fmt: skip

PLAIN_ACCEPTS = [
    # rounded to six digits before they are compared, and small differences vanish altogether
    ("\\frac{1}{3}", "0.333333"), ("0.000000001", "0.000000002"), ("10^{-20}\\pi", "10^{-21}\\pi"), ("\\pi", "3.14159265358"),
    # numbers next to each other are added, cut off or multiplied to zero
    ("5", "2(3)"), ("5", "2 3"), ("5", "(2)(3)"), ("0", "10 000"), ("\\frac{7}{2}", "2\\frac{3}{2}"),
    ("5", "5–6"), ("0", "\\text{not } 0"), ("0", "n o t 0"),
    # letters: upper and lower case are one symbol, primes are dropped, words are products of letters
    ("n", "N"), ("\\frac{n}{2}", "\\frac{N}{2}"), ("2n", "2N"), ("\\frac{a}{b}", "\\frac{A}{B}"), ("x", "x'"),
    ("CBAD", "ABCD"),
    # what looks like a unit is dropped from one side or both: metres, degrees, cents for dollars, the base of a number
    ("6m", "6"), ("65m", "65"), ("2", "2m"), ("2\\pi", "2\\pi mm"), ("\\frac{1}{\\sqrt{2}}c", "\\frac{1}{\\sqrt{2}}"),
    ("5 \\text{ cents}", "5 \\text{ dollars}"), ("\\$5", "5 cents"), ("12\\text{ cm}", "12\\text{ km}"),
    ("30^\\circ", "30\\text{ radians}"), ("\\sin 30^\\circ", "\\sin 30"), ("5\\text{ cm}^2", "5\\text{ cm}^3"),
    ("20\\text{ square units}", "20^\\circ"), ("5", "5\\text{ out of 6}"), ("1", "1%"),
    ("52", "52_8"), ("52_8", "52_9"), ("4", "4 _8"),
    # of an equation or inequality one side is enough, whatever stands on the other
    ("7", "8=7"), ("7", "x=8=7"), ("5", "x+y=5"), ("3", "\\ge 3"), ("SRAC=LRAC", "LRAC"),
    # lists are sets: multiplicity, order and the kind of bracket are lost, and a hedge counts as its first part
    ("3", "3, 3"), ("-2,-2", "-2"), ("1, 1, 2", "1, 2, 2"), ("(1,2)", "\\{1,2\\}"), ("(2,4)", "2, 4"), ("1,-2", "(1,-2)"),
    ("\\text{Amy}, \\text{Bob}", "\\text{Bob}, \\text{Amy}"), ("3", "3 or more"),
    # sympy's conventions
    ("1", "\\infty^0"),
    # right as mathematics: we refuse brackets twenty deep, because 500 deep take minutes
    ("x+1", "(" * 20 + "x+1" + ")" * 20),
]  # fmt: skip

PLAIN_SCRIPT = """
import json, logging, sys
from math_verify import parse, verify

logging.disable(logging.CRITICAL)
pairs = json.load(sys.stdin)
print(json.dumps([bool(verify(*(parse(f"${text}$") for text in pair))) for pair in pairs]))
"""


@pytest.fixture(scope="module")
def plain_math_verify():
    """(pairs) -> math-verify's own verdicts, the reference first, in a process with a fixed order of sympy's rules."""

    def verdicts(pairs):
        environment = os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", PLAIN_SCRIPT], input=json.dumps(pairs), env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return verdicts


def test_where_plain_math_verify_differs_from_our_tables(plain_math_verify):
    pairs = [pair for pair in EVAL_SAME + EVAL_DIFFERENT if len(pair[1]) <= grader.MAX_ANSWER]
    assert len(set(pairs)) >= 300  # each with a verdict in its table, which the tests of the tables hold our grader to
    verdicts = dict(zip(pairs, plain_math_verify(pairs), strict=True))
    assert {pair for pair in EVAL_SAME if not verdicts[pair]} == set(PLAIN_REJECTS)
    assert {pair for pair in EVAL_DIFFERENT if verdicts.get(pair)} == set(PLAIN_ACCEPTS)


# Of rasbt/reasoning-from-scratch, commit f79c9cd0ae7d824aa4e9a9bc2ca4a85167f81958:
# ch03/03_advanced-parser/math500_qwen3_answers.json (Apache-2.0), 500 answers of a model to MATH-500.
GRADER_PAIRS = "a9cce1a061e7f08c202d49793a66dc41fcf76407e297bc198521c2990182b0fa"


def test_grader_on_real_answers_of_a_model(real_data, plain_math_verify, eval_worker):
    pairs = [(row["answer"], extract_answer(row["prediction"])) for row in json.loads(real_data[GRADER_PAIRS].read_text())]
    ours = [same_answer(prediction, answer, eval_worker) for answer, prediction in pairs]
    plain = plain_math_verify(pairs)
    assert len(pairs) == 500 and eval_worker.timeouts == 0
    # By eye 299 are right. Ours is the strict one where the two differ, and wrong on both.
    assert (sum(ours), sum(plain)) == (297, 299)
    differ = {pair for pair, own, other in zip(pairs, ours, plain, strict=True) if own != other}
    assert differ == {("12", "12^{\\mathrm{th}} grade"), ("(0,9) \\cup (9,36)", "(0, 36) \\setminus \\{9\\}")}
