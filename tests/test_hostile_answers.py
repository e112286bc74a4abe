"""Answers that are made to be paid without being right, to run code, or to use up the machine."""

import functools
import inspect
import itertools
import math
import os
import random
import re
import threading
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest

import grader
from grader import MathWorker, is_correct, same_answer

# (reference, answers that are wrong or none): by hand, and all of another value than the reference.
HOSTILE_GOLDS = {
    "7": ["8", "-7", "7.5", "77", "0.7", "7.0000001", "6.99999999999", "\\frac{1}{7}", "7^2", "7!", "\\sqrt{7}", "7i", "7x"],
    "-3": ["3", "-4", "-0.3", "-\\frac{1}{3}", "(-3)^2", "|-3|", "--3", "-3.001", "-33"],
    "0": ["1", "-1", "0.0001", "10^{-40}", "\\frac{1}{0}", "0!", "00.1", "\\text{none}"],
    "42": ["24", "4.2", "420", "4 2", "42.01", "4^2", "042.5", "-42", "4\\cdot 2"],
    "1000000": ["100000", "1,000,001", "10^{7}", "1.000000", "1,000", "1e5", "10^6+1"],
    "0.5": ["5", "0.05", "0.51", "\\frac{1}{5}", "0.5%", "-0.5", "0.5^2", ".05"],
    "3.14": ["\\pi", "3.1", "3.141", "314", "\\frac{22}{7}", "-3.14", "3,14"],
    "-2.75": ["2.75", "-2\\frac{1}{4}", "-2.7", "-\\frac{4}{11}", "-275", "\\frac{11}{4}"],
    "\\frac{1}{3}": ["0.333333", "3", "\\frac{3}{1}", "\\frac{1}{4}", "33%", "-\\frac{1}{3}", "\\frac{1}{3}3",
        "\\frac{11}{3}"],
    "-\\frac{7}{12}": ["\\frac{7}{12}", "-\\frac{12}{7}", "-0.5833", "-7", "\\frac{-7}{-12}", "-\\frac{7}{1}2"],
    "2\\frac{1}{2}": ["1", "2", "\\frac{1}{2}", "2\\frac{1}{3}", "22.5", "-2\\frac{1}{2}", "2 \\cdot \\frac{1}{2}"],
    "1.5 \\times 10^{-7}": ["1.5", "1.5 \\times 10^{7}", "15 \\times 10^{-7}", "0", "1.5 \\times 10^{-8}", "10^{-7}"],
    "\\sqrt{2}": ["1.41421356", "2", "\\sqrt{3}", "-\\sqrt{2}", "\\sqrt[3]{2}", "2^2", "\\sqrt{2}2", "\\sqrt{22}"],
    "3\\sqrt{13}": ["\\sqrt{39}", "13\\sqrt{3}", "3\\sqrt{12}", "10.8", "3+\\sqrt{13}", "\\sqrt{13}", "3\\sqrt{13}+10^{-30}"],
    "\\frac{1+\\sqrt{5}}{2}": ["\\frac{1-\\sqrt{5}}{2}", "1+\\frac{\\sqrt{5}}{2}", "1.618", "\\frac{1+\\sqrt{5}}{3}"],
    "2\\pi": ["\\pi", "6.28", "\\pi^2", "2", "2+\\pi", "-2\\pi", "2\\pi^2", "\\frac{2}{\\pi}"],
    "\\frac{\\pi}{6}": ["\\frac{6}{\\pi}", "\\frac{\\pi}{3}", "30", "0.5236", "\\pi", "\\sin \\frac{\\pi}{6}"],
    "e^2": ["e", "2e", "7.389", "e^{-2}", "2^e", "e^3"],
    "2^{100}": ["2^{101}", "2100", "100^2", "2^{10}0", "200", "1267650600228229401496703205375"],
    "1+2i": ["1-2i", "2+i", "-1-2i", "3i", "1+2", "1+2i^2", "1+i"],
    "x^2+1": ["x^2-1", "x^2", "x+1", "2x+1", "x^{21}", "(x+1)^2", "x^3+1", "y^2+1", "x^2+1.0001", "x^2+x"],
    "2x^3-5x+7": ["2x^3+5x+7", "2x^3-5x-7", "2x^3-5x", "x^3-5x+7", "2x^2-5x+7", "2x^3-5+7"],
    "(a+5)(b+2)": ["(a+5)+(b+2)", "ab+10", "(a+5)(b-2)", "ab+2a+5b", "(a+2)(b+5)", "a+5b+2"],
    "\\frac{n(n+1)}{2}": ["\\frac{n(n-1)}{2}", "n(n+1)", "\\frac{n+1}{2}", "\\frac{N(N+1)}{2}", "\\frac{n^2+1}{2}"],
    "(3,4]": ["(3,4)", "[3,4]", "[3,4)", "3,4", "(4,3]", "(3,5]", "3.4"],
    "[-2,7]": ["(-2,7)", "[2,7]", "[-2,7)", "-2,7", "[-7,2]", "5"],
    "(-\\infty,0)": ["(-\\infty,0]", "(0,\\infty)", "(\\infty,0)", "x<1", "(-\\infty,1)", "0"],
    "(0,9) \\cup (9,36)": ["(0,36)", "(0,9] \\cup [9,36)", "(0,9) \\cap (9,36)", "(0,9)", "(0,9),(9,36)"],
    "\\{1,2,3\\}": ["\\{1,2\\}", "\\{1,2,3,4\\}", "(1,2,3)", "123", "\\{1,2,4\\}", "[1,3]", "1,2,3,...", "6"],
    "3, 5, 7": ["3, 5", "3, 5, 7, 9", "357", "(3,5,7)", "3, 5, 8", "3, 5, 7, 7", "15"],
    "(1,-2)": ["(-2,1)", "(1,2)", "1,-2", "[1,-2]", "(1,-2,0)", "-1", "(1,-2.1)"],
    "(3,\\frac{\\pi}{2})": ["(3,\\pi)", "(\\frac{\\pi}{2},3)", "(3,90)", "(3,1.5708)", "(-3,\\frac{\\pi}{2})"],
    "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}": [
        "\\begin{pmatrix} 1 & 3 \\\\ 2 & 4 \\end{pmatrix}", "\\begin{pmatrix} 1 & 2 \\\\ 3 & 5 \\end{pmatrix}", "-2",
        "1,2,3,4", "\\begin{pmatrix} 1 \\\\ 2 \\\\ 3 \\\\ 4 \\end{pmatrix}",
        "\\begin{vmatrix} 1 & 2 \\\\ 3 & 4 \\end{vmatrix}",
    ],
    "\\begin{pmatrix} -1 \\\\ 2 \\end{pmatrix}": ["\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "(2,-1)", "-1"],
    "\\text{Monday}": ["Tuesday", "Mon", "\\text{Mondays and Tuesdays}", "1", "M", "\\text{not Monday}", "Sunday"],
    "\\text{even}": ["odd", "\\text{not even}", "\\text{uneven}", "\\text{seven}", "2", "e"],
    "\\text{Yes}": ["No", "Y", "\\text{Yes and no}", "1", "0", "\\text{eyes}"],
    "C": ["B", "D", "c+1", "(C)(D)", "CC", "ABCD", "3"],
    "\\text{(B)}": ["(A)", "\\text{(B) and (C)}", "A", "2", "b)c"],
    "10:30": ["10:31", "10.30", "1030", "10", "22:30", "30:10", "11:30"],
    "8:34 \\text{ p.m.}": ["8:34 a.m.", "8:35 p.m.", "20:34 p.m.", "8.34", "834"],
    "\\$18.90": ["18.9 \\text{ cents}", "\\$1890", "\\$18.09", "-18.90", "18.91", "€18.90"],
    "50\\%": ["5\\%", "0.05", "0.5\\%", "500\\%", "-50\\%", "51", "50\\% \\text{ of } 3"],
    "10\\text{ cm}": ["10\\text{ km}", "10\\text{ cm}^2", "100", "1\\text{ cm}", "10\\text{ mm}", "10 \\text{ thousand}"],
    "5\\text{ min}": ["5\\text{ s}", "5\\text{ hours}", "300", "5\\text{ m}", "50", "5\\text{ ms}"],
    "90^\\circ": ["9^\\circ", "-90^\\circ", "90\\text{ radians}", "91"],
    "x=5": ["y=5", "x=6", "x", "5=x=6", "x=-5", "3x+2=17", "x>5", "\\log(x)=5"],
    "y=2x+3": ["y=3x+2", "y=2x-3", "y=2x", "0=0", "y=y", "x=2x+3", "3"],
    "x>3": ["x<3", "x\\ge 3", "3", "x>4", "x=3", "3>x", "-x>3"],
    "52_8": ["52_9", "25_8", "43", "52.8", "528", "-52_8"],
    "3:4": ["4:3", "3:5", "7", "34", "3:4:5"],
}  # fmt: skip

HOSTILE_NUMBERS = ["7", "-3", "42", "1000000", "0.5", "3.14", "-2.75", "\\frac{1}{3}", "-\\frac{7}{12}", "\\sqrt{2}", "2\\pi"]

HOSTILE_CODE = [
    "__import__('os').system('touch CANARY')", "__import__(\"os\").popen('touch CANARY').read()",
    "open('CANARY','w').write('x')", "exec(\"open('CANARY','w')\")", "eval(compile(\"open('CANARY','w')\",'','exec'))",
    "(lambda: open('CANARY','w'))()",
    "[c for c in ().__class__.__base__.__subclasses__() if c.__name__=='Popen'][0](['touch','CANARY'])",
    "Symbol('x').__class__.__init__.__globals__['__builtins__']['open']('CANARY','w')", "sympify(\"open('CANARY','w')\")",
    "parse_expr(\"__import__('pathlib').Path('CANARY').touch()\")", "Integer(7).__class__(open('CANARY','w').write('7'))",
    "f\"{open('CANARY','w')}\"", "{open('CANARY','w')!r}", "os.execv('/usr/bin/touch',['touch','CANARY'])",
    "print(__import__('pathlib').Path('CANARY').write_text('x'))", "S(\"__import__('os').mkdir('CANARY')\")",
    "lambdify(x,'open(\"CANARY\",\"w\")')(7)", "\\input{|\"touch CANARY\"}", "\\write18{touch CANARY}", "$(touch CANARY)",
    "`touch CANARY`", "; touch CANARY #", "7; touch CANARY", "\\immediate\\write18{touch CANARY}", "\\openout1=CANARY",
    "\\catcode`\\{=12", "\\def\\a{\\a}\\a", "\\csname boxed\\endcsname{7}", "1 if True else 0", "7 if True else 8",
    "x.subs(x,7)", "7 .__add__(0)", "__builtins__", "globals()", "breakpoint()", "exit(0)", "quit()", "raise SystemExit",
    "os._exit(0)", "os.kill(os.getppid(),9)", "while True: pass", "import os; os.environ", "getattr(7,'__class__')",
    "7 or 8", "True", "type",
]  # fmt: skip

HOSTILE_FORMATS = [
    "%s%s%s%n", "%(answer)s", "{}", "{0}", "{answer}", "{0.__class__}", "{gold}", "{{7}}", "${7}", "#{7}", "<%= 7 %>",
    "{% 7 %}", '{"answer": 7}', '{"__class__": "os.system"}', "[7, 8]", '"7"', "null", "true",
    "cos\nsystem\n(S'touch CANARY'\ntR.",
    "\x80\x04\x95\x1f\x00\x00\x00\x8c\x05posix\x8c\x06system\x93\x8c\x0ctouch CANARY\x85R.", "gANjcG9zaXgKc3lzdGVtCg==",
    "!!python/object/apply:os.system ['touch CANARY']", "<script>7</script>", "<!ENTITY a SYSTEM 'file:///etc/passwd'>&a;",
    "'; DROP TABLE answers; --", "../../etc/passwd", "/dev/stdin", "file:///etc/passwd", "\r\n7\r\n8", "7\t8", "\x1b[2J7",
    "7\b8", "0x7", "0b111", "7e999999", "1_000", "7j", "07h", "7L", "７", "𝟟", "⑦", "Ⅶ", "七", "٧٧", "seven and a half",
    "\ufeff8",
]  # fmt: skip

# {G}: the reference, {W}: another answer. No line of these gives the reference as the one answer.
HOSTILE_HEDGES = [
    "{G} or {W}", "{G} \\text{ or } {W}", "{W} \\text{ or } {G}", "{G}, {W}", "{W}, {G}", "\\{{G}, {W}\\}", "({G}, {W})",
    "[{G}, {W}]", "{G}; {W}", "{G} \\ne {W}", "{G} \\neq {W}", "{W} \\not= {G}", "{G} = {W}", "{W} = {G}", "z = {W} = {G}",
    "{G} \\le z \\le {W}", "z \\ge {G}", "z < {G} + 1", "{G} \\to {W}", "{G} \\Rightarrow {W}", "{G} \\lor {W}",
    "{G} \\vee {W}", "{G} \\land {W}", "{G} \\mid {W}", "{G} | {W}", "{G} \\equiv {W}", "{G} \\sim {W}", "{G} \\pmod{1}",
    "{G} \\pmod {W}", "{G} \\pm {W}", "\\text{not } {G}", "\\text{the answer is } {G} \\text{ or } {W}",
    "{G} \\text{ or something else}", "{G} \\text{, no wait, } {W}", "{G} \\text{ wait, eight}", "{G}\\text{ isn't right}",
    "{G} \\text{ is wrong}", "{G} if z > 0 else {W}", "\\cancel{{G}} {W}", "\\cancel{{G}}", "\\sout{{G}}", "\\not {G}",
    "\\neg {G}", "{G} \\text{ if } z > 0 \\text{, else } {W}",
    "\\begin{cases} {G} & z > 0 \\\\ {W} & z \\le 0 \\end{cases}", "\\{{G}\\} \\cup \\{{W}\\}", "\\overline{{G}}{W}",
    "\\{z : z = {G} \\text{ or } z = {W}\\}", "f({G}, {W})", "{G} {W}", "{G} \\quad {W}", "{G} \\\\ {W}", "{G}, {G}",
    "{G} \\text{ and } {W}", "({W}) \\text{ or } ({G})", "\\underline{{G}} \\underline{{W}}", "({G} = {W})",
    "(({W} = {W} = {G}))", "z", "?", "*", "\\_", "\\text{any}", "\\text{all}", "\\text{everything}",
    "\\text{any real number}", "\\mathbb{R}", "(-\\infty, \\infty)", "z = z", "1 = 1", "0 = 0", "\\text{true}", "\\top",
    "answer", "\\text{answer}", "the answer", "the reference", "\\frac{0}{0}", "\\frac{1}{0}", "0 \\cdot \\infty",
    "\\infty - \\infty", "\\infty", "-\\infty", "\\tilde{\\infty}", "zoo", "oo", "nan", "NaN", "inf", "-inf", "None",
    "null", "", " ", "{}", "{ }", "\\emptyset", "\\varnothing", "\\text{}", "\\text{see above}", "...", "\\dots",
    "[-10^9, 10^9]", "\\{-1000, ..., 1000\\}", "\\forall z", "\\exists z", "\\sum_{k=0}^{\\infty} \\frac{z^k}{k!}",
    "\\int_{-\\infty}^{\\infty} e^{-z^2} dz", "\\lim_{z \\to \\infty} z", "\\text{cannot be determined}",
    "z \\in \\mathbb{R}",
]  # fmt: skip

HOSTILE_BOXES = [
    "\\boxed{{G}} and \\boxed{{W}}", "The answer is {G}. \\boxed{{W}}", "\\boxed{{W}} The answer is {G}.",
    "\\boxed{{W}}\n#### {G}", "\\boxed{{W}} \\boxed{{G}", "\\boxed{{G}", "\\boxed{\\frac{{G}}{1}", "\\fbox{{G}}",
    "\\boxed{\\boxed{{G}}, {W}}", "\\Boxed{{G}}", "\\boxed{{W} \\boxed{{G}}}", "\\boxed{\\boxed{{G}} {W}}",
    "<think>\\boxed{{G}}</think> \\boxed{{W}}", "\\\\boxed{{G}}", "boxed{{G}}",
    "<think>\\boxed{{G}}</think> The answer is {W}.", "#### {G}\n\\boxed{{W}}", "\\boxed{}", "\\boxed{ }", "\\boxed[{G}]",
    "\\boxed({G})", "\\newcommand{\\a}{\\boxed{{G}}} \\boxed{{W}}", "% \\boxed{{G}}\n\\boxed{{W}}",
    "\\boxed{{G}} is wrong: \\boxed{{W}}", "{G}", "It is {G}.", "\\boxed{{G} \\text{ or } \\boxed{{W}}}",
    "{\\boxed{{W}}} {\\fbox{{G}}}", "\\boxed{\\text{either } {G} \\text{ or } {W}}",
    "Answer: {G}\nAnswer: {W}\n\\boxed{{W}}", "\\boxed{\\{{G}\\}, \\{{W}\\}}",
    "\\boxed{\\begin{cases}{G}\\\\{W}\\end{cases}}",
]  # fmt: skip


def _hostile_fill(template, gold, wrong):
    return template.replace("{G}", gold).replace("{W}", wrong)


def _hostile_dress(rng, answer):
    """A response whose final answer is `answer`."""
    dresses = ["\\boxed{@}", "\\boxed { @ }", "\\boxed{$@$}", "\\boxed{\\(@\\)}", "So $\\boxed{@}$.", "Answer: @", "#### @"]
    dresses += ["The final answer is @.", "**Final answer:** $@$", "thus\n\\[\\boxed{\\displaystyle @}\\]"]
    return rng.choice(dresses).replace("@", answer)


def _hostile_pair(rng):
    gold = rng.choice(list(HOSTILE_GOLDS))
    return gold, rng.choice(HOSTILE_GOLDS[gold])


def hostile_unicode(rng):
    """Invisible and look-alike characters in a wrong answer; characters that change a right one; noise without a letter."""
    kind = rng.randrange(3)
    if kind == 0:
        gold, wrong = _hostile_pair(rng)
        digits = str.maketrans("0123456789", rng.choice(["0123456789", "０１２３４５６７８９", "٠١٢٣٤٥٦٧٨٩", "𝟘𝟙𝟚𝟛𝟜𝟝𝟞𝟟𝟠𝟡"]))
        letters = str.maketrans("aceopxyABCEHKMOTX", "асеорхуАВСЕНКМОТХ")  # Cyrillic
        text = list(wrong.translate(digits).translate(letters if rng.random() < 0.3 else {}))
        for _ in range(rng.randrange(1, 5)):  # zero-width, bidirectional marks, combining marks, controls, half a surrogate
            mark = rng.choice("\u200b\u200d\u2060\ufeff\u202e\u2066\u2069\u0301\u20dd\u0338\x00\x07\x1b\x7f\xad\ud800\udfff")
            text.insert(rng.randrange(len(text) + 1), mark)
        return gold, _hostile_dress(rng, "".join(text))
    if kind == 1:  # a power, a fraction, further digits, a strike: all of another value
        gold, tail = rng.choice(HOSTILE_NUMBERS), rng.choice("²³⁹ⁿ½⅓‰٣３①Ⅷ‱∞∅¿¬∼…")
        return gold, _hostile_dress(rng, gold + rng.choice(["", " ", "\u200b", "{}", "\x00"]) + tail)
    ranges = [(0x00, 0x2F), (0x80, 0x2FF), (0x300, 0x36F), (0x600, 0x6FF), (0x2000, 0x2BFF), (0xD800, 0xDFFF)]
    ranges.append((0xFF00, 0x10FFFF))
    points = (rng.randint(*rng.choice(ranges)) for _ in range(rng.choice([1, 5, 50, 900])))
    noise = "".join(map(chr, points))
    return rng.choice(list(HOSTILE_GOLDS)), rng.choice(["{}", "\\boxed{{{}}}", "#### {}", "The answer is {}"]).format(noise)


def hostile_latex(rng):
    """Broken, deep, huge or endless LaTeX. The reference is a number that no short formula gives."""
    gold, depth = "\\frac{918273645546372819}{918273645546372823}", rng.choice([2, 7, 9, 60, 400])
    digits = "".join(rng.choice("123456789") for _ in range(rng.choice([3, 30, 300, 990, 1100])))
    tokens = r"\frac { } {1} \sqrt ( ) [ ] + - \cdot ^2 _3 x 7 | \sum \int \lim \infty _{k=1}^{\infty} & \\ = < ,".split()
    tokens += ["\\left", "\\right", "\\begin{pmatrix}", "\\end{pmatrix}", "\\"]
    made = [
        "\\frac{1}{" * depth + "2" + "}" * depth, "\\frac{1}{" * depth, "{" * depth + "7" + "}" * depth,
        "(" * depth + "7" + ")" * depth, "\\sqrt{" * depth + "7" + "}" * depth, "\\left(" * depth,
        "\\boxed{" * depth + "7" + "}" * depth, "}" * depth + "7", digits, "7" * 100_000, f"\\frac{{{digits}}}{{7}}",
        f"{digits}!", f"7^{{{digits}}}", f"0.{digits}", f"-{digits}.{digits}", f"\\sqrt{{{digits}}}", "7!" + "!" * depth,
        f"\\sum_{{k=1}}^{{{digits}}} k!", "\\int_{-\\infty}^{\\infty} x^x dx", "\\prod_{k=1}^{\\infty} k",
        "\\lim_{x \\to 0} \\frac{1}{x}", "2^{" * depth, "x^{" * depth + "2" + "}" * depth, "\\\\" * depth, "$" * depth,
        "\\$" * depth + "7", "7" + "\\," * depth + "8",
        " ".join(rng.choice(tokens) for _ in range(rng.choice([5, 30, 200]))), "7" * depth + "=" * depth + "8",
        ",".join("7" * depth), "\\text{" * depth + "7" + "}" * depth, "\\begin{pmatrix}" * depth, "-" * depth + "7",
        "+".join("x" * depth), "7=" * depth + "7", "e^{i\\pi}" * depth, "\\binom{7}" * depth, "|" * depth + "7",
        "7" + "'" * depth, "\\frac" * depth + "7", "\\sqrt" * depth + "7",
    ]  # fmt: skip
    text = rng.choice(made)
    if text.startswith("x^{"):
        text = text.replace("2", "y")  # a tower of names has nothing to compute
    return gold, rng.choice(["\\boxed{@}", "The answer is @", "#### @", "@"]).replace("@", text)


def hostile_code(rng):
    gold, text = rng.choice([gold for gold in HOSTILE_GOLDS if gold != "7"]), rng.choice(HOSTILE_CODE)
    around = rng.choice(["@", "@", "(@)", "\\text{@}", "7+@", "\\frac{@}{1}", "x_{@}", "\\sqrt{@}"])
    return gold, _hostile_dress(rng, around.replace("@", text))


def hostile_format(rng):
    gold = rng.choice([gold for gold in HOSTILE_GOLDS if gold not in ("0", "7")])  # some of these do say 0 or 7
    return gold, _hostile_dress(rng, rng.choice(HOSTILE_FORMATS))


def hostile_boxes(rng):
    gold, wrong = _hostile_pair(rng)
    return gold, _hostile_fill(rng.choice(HOSTILE_BOXES), gold, wrong)


def hostile_hedges(rng):
    gold, wrong = _hostile_pair(rng)
    if rng.random() < 0.1:  # the number goes on, or there are two of it
        gold = rng.choice(HOSTILE_NUMBERS)
        more = rng.choice(["@...", "@. . .", "@…", "@\\ldots", "@\\dots", "\\pm @", "@ \\pm 1"])
        return gold, _hostile_dress(rng, more.replace("@", gold))
    hedges = [hedge for hedge in HOSTILE_HEDGES if (hedge, gold) != ("0 = 0", "0")]
    return gold, _hostile_dress(rng, _hostile_fill(rng.choice(hedges), gold, wrong))


def _hostile_write(rng, value):
    """The exact value in one of several notations."""
    top, bottom = value.numerator, value.denominator
    styles = [f"\\frac{{{top}}}{{{bottom}}}", f"{top}/{bottom}", f"\\dfrac{{{3 * top}}}{{{3 * bottom}}}"]
    if bottom == 1:
        styles += [f"{top}", f"{top:,}", f"{top}.0", f"{top:06d}", f"{top} \\times 10^{{0}}", f"{top}."]
    if 1000 % bottom == 0:
        styles += [f"{float(value):.3f}", f"{1000 * value} \\times 10^{{-3}}"]
    if 1 < bottom < value:
        styles.append(f"{top // bottom}\\frac{{{top % bottom}}}{{{bottom}}}")
    return rng.choice(styles)


def hostile_values(rng):
    """A number against another one: a digit, the sign, a place or the order changed. Equal ones are drawn again."""
    while True:
        value = Fraction(rng.randint(-9999, 9999), rng.choice([1, 1, 1, 2, 3, 7, 8, 10, 100, 125]))
        change = [-value, value * 10, value / 10, value * 100, value / 1000, value + 1, value - 1, value + value.denominator]
        digits = list(str(abs(value.numerator)))
        rng.shuffle(digits)
        change += [Fraction(int("".join(digits)), value.denominator), 1 / value if value else value, value + Fraction(1,
            10**9)]
        other = rng.choice(change)
        if other != value:
            break
    wrong = _hostile_write(rng, other)
    unit = rng.choice(["", "", "", " \\text{ apples}", "\\text{ cm}", " dollars"])
    return _hostile_write(rng, value), _hostile_dress(rng, wrong + unit)


def _hostile_expression(rng, depth):
    """(LaTeX, its exact value, whether it can be a factor without brackets), from our own arithmetic."""
    inner = ["sum", "product", "beside", "quotient", "power", "root", "factorial"]
    kind = rng.choice(inner if depth else ["integer", "fraction"])
    if kind == "integer":
        n = rng.randint(2, 12)
        return str(n), Fraction(n), True
    if kind == "fraction":
        a, b = rng.randint(1, 9), rng.randint(2, 9)
        return f"\\frac{{{a}}}{{{b}}}", Fraction(a, b), True
    if kind == "root":
        n = rng.randint(2, 12)
        return f"\\sqrt{{{n * n}}}", Fraction(n), True
    if kind == "factorial":
        n = rng.randint(3, 6)
        return f"{n}!", Fraction(math.factorial(n)), True
    a, x, a_factor = _hostile_expression(rng, depth - 1)
    b, y, b_factor = _hostile_expression(rng, depth - 1)
    a_in, b_in = (text if factor else f"({text})" for text, factor in ((a, a_factor), (b, b_factor)))
    if kind == "sum":
        return (f"{a} + {b}", x + y, False) if rng.random() < 0.5 else (f"{a} - {b_in}", x - y, False)
    if kind == "product":
        return a_in + rng.choice([" \\cdot ", " \\times ", " * "]) + b_in, x * y, False
    if kind == "beside":
        return rng.choice([f"({a})({b})", f"{a_in}({b})", f"\\left({a}\\right)\\left({b}\\right)"]), x * y, False
    if kind == "quotient" and y:
        return f"\\frac{{{a}}}{{{b}}}", x / y, True
    n = rng.randint(2, 3)
    return f"({a})^{{{n}}}", x**n, True


def _hostile_plain(value):
    top, bottom = abs(value.numerator), value.denominator
    return str(value) if bottom == 1 else "-" * (value < 0) + f"\\frac{{{top}}}{{{bottom}}}"


def hostile_arithmetic(rng):
    """An unevaluated expression against what a bad parser would make of it: a sum for a product, a part for the whole."""
    text, value, _ = _hostile_expression(rng, rng.randint(1, 2))
    numbers = [Fraction(int(n)) for n in re.findall("[0-9]+", text)]
    first, last, digits = numbers[0], numbers[-1], Fraction("".join(re.findall("[0-9]", text)))
    misread = [sum(numbers), math.prod(numbers), first, last, first + last, first - last, digits]
    misread += [-value, value / 2, value + 1, value + last, Fraction(round(value))]
    wrong = rng.choice([m for m in misread if m != value])
    return _hostile_plain(wrong), f"\\boxed{{{text}}}"


@pytest.fixture(scope="module")
def hostile_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def hostile_worker(hostile_folder):
    here = Path.cwd()
    os.chdir(hostile_folder)  # so that the child's working folder is one in which a new file is seen
    with MathWorker() as worker:
        worker.start()
        os.chdir(here)
        yield worker
    os.chdir(here)


HOSTILE_FAMILIES = {
    hostile_unicode: 1500, hostile_latex: 1500, hostile_code: 1000, hostile_format: 1000, hostile_boxes: 1500,
    hostile_hedges: 1500, hostile_values: 1400, hostile_arithmetic: 600,
}  # fmt: skip


@functools.cache
def _hostile_responses(family, folder):
    rng = random.Random(family.__name__)
    pairs = [family(rng) for _ in range(HOSTILE_FAMILIES[family])]
    return [(gold, response.replace("CANARY", f"{folder}/canary")) for gold, response in pairs]


@pytest.mark.parametrize("family", HOSTILE_FAMILIES)
def test_hostile_answers_are_never_paid(family, hostile_worker, hostile_folder):
    paid, slow = [], []
    for gold, response in _hostile_responses(family, hostile_folder):
        start = time.perf_counter()
        if is_correct(response, gold, hostile_worker):
            paid.append((gold, response[:200]))
        if time.perf_counter() - start > hostile_worker.timeout_s + 3:  # the limit, and the start of a new child
            slow.append((gold, response[:200]))
    assert not paid, f"{len(paid)} paid, of which {paid[:20]}"
    assert not slow and hostile_worker.timeouts == 0
    assert list(hostile_folder.iterdir()) == []
    assert same_answer("\\sqrt{16}", "4", hostile_worker) and not same_answer("\\sqrt{17}", "4", hostile_worker)


def test_there_are_ten_thousand_hostile_answers_and_forty_references(hostile_folder):
    assert sum(HOSTILE_FAMILIES.values()) == 10_000 and len(HOSTILE_GOLDS) >= 40
    responses = [pair for family in HOSTILE_FAMILIES for pair in _hostile_responses(family, hostile_folder)]
    assert len(set(responses)) > 7_500


def test_the_references_of_the_hostile_answers_are_paid_when_they_are_given(hostile_worker):
    for gold in HOSTILE_GOLDS:
        assert not grader.why_unusable(grader.normalise_answer(gold)), gold
        assert is_correct(f"\\boxed{{{gold}}}", gold, hostile_worker), gold
    rng, read = random.Random("true values"), 0
    for _ in range(200):  # the arithmetic is read, not refused
        text, value, _ = _hostile_expression(rng, rng.randint(1, 2))
        read += same_answer(text, _hostile_plain(value), hostile_worker)
    assert read >= 190


# sympy evaluates the digits of a number ("Integer (49 )") and helpers of its own; nothing else may be compiled from text.
HOSTILE_HOOK = r"""
    import re
    own = re.compile(r"from sympy import \*|(Integer|Float) ?\('?[0-9.]+'? ?\)\s*|def monomial_\w+\(A, .*", re.DOTALL)
    def watch(event, arguments):
        code = event == "compile" and arguments[1] == "<string>" and not own.fullmatch(str(bytes(arguments[0]), "utf-8"))
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        acts = event.startswith(("os.", "subprocess.", "shutil.", "socket.", "ctypes.", "pickle.", "pty."))
        if code or writes or (acts and event not in ("os.listdir", "os.scandir")):
            os._exit(99)
    sys.addaudithook(watch)
"""


def _hostile_watched(monkeypatch, **changes):
    """Children from now on end with status 99 where they evaluate text, write a file, or start a process."""
    ready = '    pipe.send_bytes(b"!")\n'
    source = inspect.getsource(grader._worker_main)
    for before, after in {ready: HOSTILE_HOOK + ready, **changes}.items():
        assert source.count(before) == 1
        source = source.replace(before, after)
    monkeypatch.setattr(grader.inspect, "getsource", lambda function: source)


def test_code_in_answers_is_never_run(monkeypatch, tmp_path):
    _hostile_watched(monkeypatch)
    monkeypatch.chdir(tmp_path)
    with MathWorker(timeout_s=5.0) as worker:
        for text in HOSTILE_CODE + HOSTILE_FORMATS:  # straight into the child, without the checks before it
            text = text.replace("CANARY", "canary")
            worker.equal("7", text)
            worker.equal(text, f"x_{{{text}}}")
        assert worker.timeouts == 0 and worker.equal("4", "\\sqrt{16}") and not worker.equal("4", "\\sqrt{17}")
    assert list(tmp_path.iterdir()) == []


def test_the_watch_sees_code_that_is_run(monkeypatch, tmp_path):
    _hostile_watched(monkeypatch, **{"verdict = equal(*question)": "verdict = eval(question[1])"})
    monkeypatch.chdir(tmp_path)
    with MathWorker(timeout_s=5.0) as worker, pytest.raises(TimeoutError):
        worker.equal("7", "7")


def test_the_child_has_no_secrets_and_cannot_write(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "canary-of-the-environment")
    with MathWorker(timeout_s=5.0) as worker:
        assert same_answer("\\sqrt{16}", "4", worker)
        process = Path(f"/proc/{worker._process.pid}")
        if not process.is_dir():
            pytest.skip("no /proc")
        assert b"canary-of-the-environment" not in (process / "environ").read_bytes()
        limits = {line[:26].strip(): line[26:].split()[:2] for line in (process / "limits").read_text().splitlines()}
        assert limits["Max address space"] == [str(1024**3)] * 2
        assert limits["Max file size"] == limits["Max core file size"] == ["0", "0"]


def _hostile_peak(worker, hog, gold):
    """(verdict, seconds, largest address space in KiB) of one question, on a child that is up."""
    worker.start()
    status, sizes = Path(f"/proc/{worker._process.pid}/status"), [0]

    def watch():
        while True:
            try:
                sizes.append(int(re.search(r"VmPeak:\s+(\d+) kB", status.read_text())[1]))
            except (OSError, TypeError):  # it has ended
                return
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    verdict = is_correct(f"\\boxed{{{hog}}}", gold, worker)
    seconds = time.perf_counter() - start
    worker.close()
    thread.join()
    return verdict, seconds, max(sizes)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc")
def test_an_answer_that_computes_for_ever_or_eats_memory():
    with MathWorker(timeout_s=1.0) as worker:
        for hog in ("9^{9^{9^{9}}}", "(10^{9999})^{9999}", "((9!)!)!"):
            verdict, seconds, size = _hostile_peak(worker, hog, "7")
            assert not verdict and seconds < 1.0 + 2.0 and 0 < size <= 1024**2
        assert worker.timeouts == 3 and same_answer("\\sqrt{16}", "4", worker)
    with MathWorker(timeout_s=20.0, memory_bytes=200 * 1024**2) as worker:  # ends at the memory, long before the time
        verdict, seconds, size = _hostile_peak(worker, "(x+1)^{99999}", "x+7")
        assert not verdict and seconds < 15 and 150 * 1024 < size <= 200 * 1024
        assert same_answer("\\sqrt{16}", "4", worker)


def test_all_questions_about_one_answer_share_one_limit():
    limits = []

    def equal(gold, prediction, limit_s):
        limits.append(limit_s)
        time.sleep(0.05)
        return False

    worker = SimpleNamespace(timeout_s=1.0, start=lambda: None, equal=equal)
    assert not same_answer("\\sqrt{7}, \\sqrt{11}, \\sqrt{13}", "\\sqrt{2}, \\sqrt{3}, \\sqrt{5}", worker)
    assert len(limits) == 3 and 0.9 < limits[0] <= 1.0
    assert all(a - b >= 0.05 for a, b in itertools.pairwise(limits))
    with MathWorker(timeout_s=5.0) as worker, pytest.raises(TimeoutError):
        worker.start()
        worker.equal("4", "\\sqrt{16}", limit_s=-1.0)


# Every one of these was paid once.
HOSTILE_FOUND = {
    "an equation in brackets": ("7", "(8=7)"), "a chain in brackets": ("7", "((8=9=7))"),
    "double factorial": ("720", "3!!"), "decimals that go on": ("3.14", "3.14..."),
    "decimals that go on, in blanks": ("3.14", "3.14. . ."), "quotes": ("78", '7"8'),
    "blank before the point": ("3.5", "7 .5"), "invisible": ("7", "\\phantom{7}"),
    "beside a fraction": ("15", "\\frac{8}{1}7"), "fraction beside fraction": ("15", "\\frac{8}{1}\\frac{7}{1}"),
    "fraction beside brackets": ("15", "\\frac{8}{1}(7)"), "groups": ("15", "{7}{8}"), "digit beside group": ("15", "7{8}"),
    "square brackets": ("15", "8[7]"), "number word": ("7", "7 eight"), "number word in text": ("7", "7 \\text{ eight}"),
    "twelfths": ("7", "7 twelfths"), "thousands": ("7", "7\\text{K}"), "per cent": ("0.5", "0.5\\text{ per cent}"),
    "seconds": ("5\\text{ min}", "5\\text{ s}"), "milli and mega": ("5\\text{ MW}", "5\\text{ mW}"),
    "apostrophe": ("7", "7\\text{ isn't right}"), "wrong": ("7", "7\\text{ wrong}"),
    "comma in text": ("7", "7\\text{ wait, eight}"), "equation for a function": ("2", "\\log(x)=2"),
    "option = option": ("C", "ABCD = C"), "segments": ("LRAC", "SRAC = LRAC"), "fifteen digits": ("0.3", "0.3+10^{-17}"),
    "twenty digits": ("7.5", "7.5+10^{-20}"),
}  # fmt: skip

# What the same checks must let through, or read as it is meant.
HOSTILE_NOT = [
    ("\\dfrac38", "3/8"), ("\\frac{3}{5}", "\\\\frac{3}{5}"), ("7", "{7}"), ("56", "\\frac{8}{1}(7)"),
    ("\\frac{\\sqrt{3}}2", "\\frac{1}{2}\\sqrt{3}"), ("2.5\\sqrt{2}", "\\frac{5\\sqrt{2}}{2}"),
    ("0.1\\pi", "\\frac{\\pi}{10}"), ("3", "\\log_2{8}"), ("3", "\\log_{2}(8)"), ("x^{2.5}", "x^{\\frac52}"),
    ("\\frac{1}{2}(a+b)", "\\frac{a+b}{2}"), ("7", "\\sqrt[3]{343}"), ("5\\text{ mins}", "5\\text{ min}"),
    ("5\\text{ Miles}", "5\\text{ miles}"), ("0.07", "7 per cent"), ("1,2,\\ldots,9", "1, 2, ..., 9"),
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_FOUND)
def test_hostile_answers_found_before(name, hostile_worker):
    gold, prediction = HOSTILE_FOUND[name]
    for response in (f"\\boxed{{{prediction}}}", f"The final answer is {prediction}."):
        assert not is_correct(response, gold, hostile_worker)


@pytest.mark.parametrize(("gold", "prediction"), HOSTILE_NOT)
def test_honest_answers_that_look_like_them(gold, prediction, hostile_worker):
    assert is_correct(f"\\boxed{{{prediction}}}", gold, hostile_worker)
