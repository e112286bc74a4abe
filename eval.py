r"""Evaluation: the grader (which is also the training reward), the loader of problem files, and accuracy over samples.

    python eval.py --model DIR --data test.jsonl other.jsonl --n 4       # a line per file, and a JSON file of results
    python eval.py --model DIR --benchmarks data/bench                   # the paper's, each with its n (data/prepare.py)
    python eval.py --model DIR --data test.jsonl --n 8 --both            # without and with each row's strategy
    torchrun --nproc_per_node 8 -- eval.py --model DIR ...               # the problems dealt to the ranks (mind the --)
    python eval.py --compare a.json b.json                               # the paired difference of two models
    python eval.py --table a.json b.json                                 # Markdown, beside the paper's figures

Every response is written beside the results as soon as its problem is graded (OUT-responses.jsonl). The same command
again goes on from there after a crash. The figures themselves are stats.py's.
Without the "--" torchrun takes --n for the beginning of a flag of its own, and refuses it.

What it is not: a harness with prompts per benchmark, and not a judge of the reasoning. One prompt (strategy.py's), one
verdict per response: is the final answer equal to the row's. No tolerance either: an answer rounded by the model is
wrong.

A reward that pays for a wrong answer teaches it, so where two texts may mean different things the verdict is "wrong",
and forms that models rarely write are not looked into. Plain numbers are compared exactly. Lists, intervals, matrices,
equations and units are taken apart here. Only a single expression goes to math-verify (0.9), which cannot be trusted
alone: it reads 2(3) and "2 3" as 5, N as n, 52_8 as 52, x' as x, and takes 10^{-20} for 0. It needs a process of its
own: its signal.alarm fails off the main thread, and a power tower runs for ever.

What still pays, as everywhere in the field: an expression that is equal to the answer but was never evaluated (2^{10}
for 1024).
"""

import argparse
import fcntl
import glob
import hashlib
import inspect
import json
import math
import os
import re
import subprocess
import sys
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from importlib import metadata
from multiprocessing import Pipe
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from model import encode_chat, load_model, resolve_model, weight_files
from parallel import RankLost, control_group, deal, meet, start_ranks, world
from rollout import Trajectory, generate
from stats import BENCHMARKS, PAPER_SETTINGS, compare, comparison_lines, guidance, guidance_lines, majority, summarise, table
from strategy import Strategy, auto_messages, guided_messages
from weighting import instance_weight

MAX_ANSWER = 1000  # characters; no benchmark's answer is longer, and parsing time grows with the length


# -------------------------------------------------------------------------------------------- finding the answer

# The second form is LaTeX's "\boxed 7". In LaTeX it would frame one digit; we take the number that was meant.
_BOX = re.compile(r"\\boxed\s*\{|\\boxed\s+(-?[0-9][0-9,]*(?:\.[0-9]+)?)|\\.|[{}]", re.DOTALL)
_HASH = re.compile(r"(?<!#)####(?!#)[ \t]*([^\n]*)")
# A lookahead, so that a second statement on the same line is found as well.
_STATED = re.compile(r"\banswer\b(?:[^\n:=.]{0,60}?\bis\b|[ \t*]{0,6}[:=])[\s*:]*(?=([^\n]{0,300}))", re.IGNORECASE)


def extract_answer(text: str) -> str | None:
    r"""The final answer that a response gives, as text, or None.

    In this order: the last balanced \boxed{...} with something in it (\fbox is no answer, nor is a box that never
    closes), else the last GSM8K line "#### x", else the last stated one ("The final answer is x.", "Answer: x").
    """
    # Behind the last </think> first, else anywhere: a box inside thoughts counts, as it does for verl and LUFFY.
    parts = [text.rpartition("</think>")[2], text] if "</think>" in text else [text]
    return next(filter(None, (_last_box(part) or _last_line(part) for part in parts)), None)


def _last_box(text: str) -> str | None:
    # One pass with a stack: a degenerate response of ten thousand "\boxed{" must not cost a scan each.
    answer, open_groups = None, []
    for match in _BOX.finditer(text):
        token = match[0]
        if match[1]:
            answer = match[1]
        elif token == "}" and open_groups:
            start = open_groups.pop()
            if start is not None:
                answer = text[start : match.start()].strip() or answer  # "\boxed{}" only talks about the format
        elif token[-1] == "{" and token != r"\{":
            open_groups.append(match.end() if len(token) > 1 else None)
    return answer


def _last_line(text: str) -> str | None:
    # "####" is a Markdown heading as well ("#### Step 2: solve"): an answer has a digit and few words.
    for found in map(_undress, reversed(_HASH.findall(text))):
        if re.search("[0-9]", found) and len(re.findall("[A-Za-z]{3,}", found)) <= 2:
            return found
    for found in reversed(_STATED.findall(text)):
        sentence = re.split(r"(?<=\S)\.(?=\s|$)(?! ?\.)", found, maxsplit=1)[0]  # "3.5 m." keeps its decimal point
        if _undress(sentence):
            return _undress(sentence)
    return None


def _undress(text: str) -> str:
    """Without outer blanks, emphasis, a final period, and math delimiters around the whole."""
    # One period: the three of "3.14..." say that the number goes on.
    text = re.sub(r"(?<!\.)(?<!\. )\.$", "", text.strip().strip("*`").strip()).strip()
    for left, right in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inner = text[len(left) : -len(right)]
        if text.startswith(left) and text.endswith(right) and inner.strip() and left not in inner:
            return inner.strip()
    return text


# -------------------------------------------------------------------------------------------- the child process


# What the child needs of our environment to find its packages. No more: tokens and keys have no business in a process
# that reads what a model wrote.
_CHILD_ENVIRONMENT = ("HOME", "LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "PYTHONPATH", "PYTHONUSERBASE")


class MathWorker:
    """math-verify in a child process with bounded time and memory, started at the first question (about 1 s).

    timeout_s: wall-clock limit of one question, and of all questions about one answer; at the limit the child is killed,
    and the next question starts a new one. memory_bytes: address space of the child (sympy alone takes about 150 MB).
    `timeouts` counts the questions lost to a limit or a crash; log it, because each one was graded wrong. One per process,
    no threads; close it or use with. RuntimeError where the child cannot start at all (math-verify missing): grading
    everything wrong would hide that.
    """

    def __init__(self, timeout_s: float = 5.0, memory_bytes: int = 1024**3) -> None:
        self.timeout_s, self.memory_bytes = timeout_s, memory_bytes
        self.timeouts = 0
        self._process, self._pipe = None, None

    def __enter__(self) -> "MathWorker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._pipe.close()
            self._process = self._pipe = None

    def equal(self, gold: str, prediction: str, limit_s: float | None = None) -> bool:
        """Whether math-verify takes two LaTeX expressions (no delimiters) for the same. No verdict: TimeoutError.

        limit_s: what is left of the limit where this is not the first question about an answer.
        """
        self.start()
        limit_s = self.timeout_s if limit_s is None else limit_s
        try:
            # JSON there and one byte back. Connection's send and recv would pickle, and who reads a pickle runs it.
            self._pipe.send_bytes(json.dumps([gold, prediction]).encode())
            if self._pipe.poll(max(limit_s, 0)):
                return self._pipe.recv_bytes(1) == b"="
        except (EOFError, OSError):
            pass
        self.timeouts += 1
        self.close()
        raise TimeoutError(f"no verdict within {limit_s:.1f} s on {gold!r} against {prediction!r}")

    def start(self) -> None:
        """Start the child unless it runs; equal does it too."""
        if self._process is not None and self._process.poll() is None:
            return
        self.close()  # it may have died between two questions
        # A fresh interpreter that gets the child's function as source: importing this file there would import torch
        # (seconds, gigabytes of address space), and a fork would copy a process that may hold threads and a GPU.
        source = inspect.getsource(_worker_main) + "\n\n_worker_main()\n"
        limits = [str(self.memory_bytes), str(math.ceil(self.timeout_s) + 2)]
        environment = {name: os.environ[name] for name in _CHILD_ENVIRONMENT if name in os.environ}
        self._pipe, child_end = Pipe()
        with child_end:
            end = child_end.fileno()
            # The hash seed sets the order in which sympy tries its rules, and so the time it takes: keep it the same.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", source, str(end), *limits], pass_fds=[end],
                env=environment | {"PYTHONHASHSEED": "0"}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            )  # fmt: skip
        try:
            self._pipe.recv_bytes(1)  # the child is ready
        except (EOFError, OSError):
            self.close()
            raise RuntimeError("the grader's process did not start (no math-verify?), its error is above") from None


def _worker_main() -> None:
    """Runs in the child only, without the rest of this file: answers [gold, prediction] until the pipe closes."""
    import json
    import logging
    import os
    import resource
    import signal
    import sys
    from multiprocessing.connection import Connection

    for number in (signal.SIGINT, signal.SIGTERM):  # these are the parent's business; when it ends, so does the pipe
        signal.signal(number, signal.SIG_IGN)
    from latex2sympy2_extended.math_normalization import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    # No search for boxes: it merges all boxes into a set. No removal of units: it takes the m of 6m for metres.
    steps = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
    config = [LatexExtractionConfig(boxed_match_priority=-1, normalization_config=steps)]

    def equal(*texts: str) -> bool:
        g, p = (parse(f"${text}$", config, fallback_mode="no_fallback", parsing_timeout=None) for text in texts)
        # 60 digits: the 6 and 15 that it takes by default drop 10^{-20}, and take 3e-9 pi for 5e-9 pi.
        return bool(g and p) and verify(g, p, float_rounding=60, numeric_precision=60, timeout_seconds=None)

    pipe, memory, alarm = Connection(int(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
    logging.disable(logging.CRITICAL)
    # One comparison to load what sympy and antlr import late: not on the clock of the first question.
    equal(r"\sin^2 x + \frac{x}{2}", r"1 - \cos^2 x + 0.5x")
    # A file that it writes stays empty, and a crash leaves no core: nothing here has a reason to write.
    for limit, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (most, most))
    os.dup2(1, 2)  # up to here an error shows on the terminal; what the parser says about each bad text must not
    pipe.send_bytes(b"!")
    while True:
        try:
            question = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        signal.alarm(alarm)  # its default action is death: with the parent gone, no power tower outlives it for long
        try:
            verdict = equal(*question)
        except MemoryError:
            os._exit(1)  # sympy's caches may hold the memory: a fresh process is the only way to get it back
        except Exception:  # whatever sympy raises on text that a model made up, it is not the answer
            verdict = False
        signal.alarm(0)
        pipe.send_bytes(b"=" if verdict else b"/")


# -------------------------------------------------------------------------------------------- one notation

_SYMBOLS = str.maketrans({
    "−": "-", "×": r"\times ", "·": r"\cdot ", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ",
    "≈": r"\approx ", "∪": r"\cup ", "’": "'", "′": "'", "…": r"\dots ",
})  # fmt: skip
# In this order, each from several ways of writing a thing to one: _clean's notation.
_REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"(?<!\\)\$(.*?)(?<!\\)\$", r"\1"),  # $3$ or $4$; a dollar sign without a partner is money
    (r"(?<!\\)\\\\(?=(?:[dtc]?frac|sqrt|pi|text|displaystyle)(?![A-Za-z]))", r"\\"),  # escaped twice: \\frac{1}{2}
    (r"\.(?: ?\.)+|\\[lc]dots\b", r"\\dots "),
    (r"(?<=[0-9])(?:\{,\}|,?\\!|\\,) ?(?=[0-9]{3}(?![0-9]))", ","),  # 10{,}000 10,\!000 10\,000
    (r"\\(?:left|right)\b\.?|\\(?:[bB]igg?[lrm]?|displaystyle)\b|(?<!\\)\\!", ""),
    (r"(?<!\\)\\[,;: ]|~|\\q?quad\b", " "),
    (r"\\(?:mbox|(?:text|math)(?:bf|rm|it|normal|sf))\b ?\{", r"\\text{"),
    (r",? ?\\text\{ ?,?(?:and|or) ?\}|,? (?:and|or) ", ", "),  # x = 1 or x = -2, \text{ or } too: a list
    (r" ?(?:\\?%|\\text\{ ?per ?cent\}|per ?cent\b)", "%"),
    (r" ?(?:\^ ?\{? ?\\circ ?\}?|\\text\{ ?degrees?\}|degrees?\b)", "°"),
    (r"\\(le|ge|ne)q?(?:slant)?\b", r"\\\1 "),
    (r"(?:√|(?<![A-Za-z\\])sqrt) ?(?:\(([^()]*)\)|([0-9]+|[a-z]))", r"\\sqrt{\1\2}"),  # √13, sqrt(13)
    (r"\\[dtc]?frac(?![A-Za-z])", r"\\frac"),  # \dfrac38 too
    (r"\\frac ?([0-9]) ?([0-9])", r"\\frac{\1}{\2}"),  # \frac43
    (r"\\frac ?([0-9]) ?\{", r"\\frac{\1}{"),  # \frac9{19}
    (r"\\frac ?(\{(?:[^{}]|\{[^{}]*\})*\}) ?([0-9])", r"\\frac\1{\2}"),  # \frac{14}3
    (r"(?<=\S) ?\(? ?\\approx.*", ""),  # \frac{1}{3} \approx 0.333: the exact part is the answer
    (r"\s+", " "),
)]  # fmt: skip
_BRACKET = r"(\\begin\b|\\\{|[(\[{])|(\\end\b|\\\}|[)\]}])"  # what opens, what closes: half-open intervals pair freely


def normalise_answer(answer: str) -> str:
    r"""A reference answer without its data set's clothes: outer blanks, $...$, \( \), a \boxed{} around the whole."""
    answer = " ".join(_undress(answer).split())
    while (boxed := re.fullmatch(r"\\boxed ?\{(.*)\}", answer)) and _balanced(boxed[1]):
        answer = _undress(boxed[1])
    return answer


def _clean(text: str) -> str:
    """One notation for an answer: no delimiters, no spacing commands, one name per symbol. The meaning stays."""
    text = normalise_answer(text.translate(_SYMBOLS))
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    if (braces := re.fullmatch(r"\{(.+)\}", text)) and _balanced(braces[1]):  # {7}, as some prompts make it
        text = braces[1]
    return text.strip().rstrip(" .,;:\\")


def _balanced(text: str) -> bool:
    """Every bracket has its partner, and none is deeper than 8: each level doubles the time that math-verify needs."""
    depth = 0
    for token in re.finditer(_BRACKET, text):
        depth += 1 if token[1] else -1
        if not 0 <= depth <= 8:
            return False
    return depth == 0


def _split(text: str, separators: str) -> list[str]:
    """[part, separator, part, ...], cut where `separators` (a regular expression) match outside all brackets."""
    cuts, depth, last = [], 0, 0
    for token in re.finditer(rf"{_BRACKET}|({separators})|\\.", text):
        depth += bool(token[1]) - bool(token[2])
        if token[3] and depth == 0:
            cuts += [text[last : token.start()].strip(), token[3]]
            last = token.end()
    return [*cuts, text[last:].strip()]


def _key(text: str) -> str:
    """A cleaned answer for string comparison: unwrapped text, no blanks but between digits, words in lower case."""
    text = re.sub(r"\\text ?\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"([\^_])\{(\w)\}", r"\1\2", text)
    text = re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", text).removeprefix("+")
    if option := re.fullmatch(r"\(?([A-Z])\)?", text):  # (C), \text{(C)} and C
        return option[1]
    # Folding stops short of single letters and pairs, which may be symbols (n and N, AB and ab). "No" is a word.
    if "\\" not in text and (re.search("[A-Za-z]{3}", text) or text.lower() == "no"):
        return text.casefold()
    return text


_DECIMAL = r"(?=\.?[0-9])(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]*)(?:\.[0-9]*)?"
_NUMBER = re.compile(rf"([+-]?) ?(?:([0-9]+) )?([+-]?{_DECIMAL}(?:[eE][+-]?[0-9]{{1,3}})?)(?: ?/ ?([+-]?{_DECIMAL}))?")


def _number(text: str) -> Fraction | None:
    r"""The exact value of a plain number, None for anything else.

    Integers and decimals, with thousands separators and leading zeros; a/b and \frac{a}{b}; mixed numbers 1 4/5 and
    1\frac{4}{5} where the fraction is proper; 2.5 \times 10^{-3} and 2.5e-3.
    """
    text = re.sub(r" ?\\frac ?\{([^{} ]+)\} ?\{([^{} ]+)\}$", r" \1/\2", text).strip()
    text = re.sub(r"(?<=[0-9.]) ?(?:\\times|\\cdot|\*) ?10 ?\^ ?(?:\{([+-]?[0-9]{1,3})\}|([0-9]))$", r"e\1\2", text)
    match = _NUMBER.fullmatch(text)
    if not match:
        return None
    sign, whole, *ratio = match.groups()
    top, bottom = (Fraction((part or "1").replace(",", "")) for part in ratio)
    # Two numbers next to each other are a mixed number only by convention: no convention covers 2\frac{3}{2}.
    if bottom == 0 or (whole and not (0 < top < bottom and top.denominator == bottom.denominator == 1)):
        return None
    return (-1 if sign == "-" else 1) * (int(whole or 0) + top / bottom)


# What may stand behind: % or °, a base, words in \text{}, bare words (a few short ones, or four letters and more: the
# letters of "2 abc" are variables). No comma and no apostrophe: "7\text{ wait, eight}" is no 7.
_UNIT = re.compile(
    r"(.*[^-+*/=^_<>(, ]) ?([%°]|(?<=[0-9])_(?:[0-9]|\{[0-9]+\})|(?:\\text ?\{[A-Za-z .()/^-]+\}|(?<=[0-9}] )"
    r"(?:mm|cm|km|in|ft|kg|lb|hr|min|sec|mph|[A-Za-z]{4,})(?:[ /-][A-Za-z]{2,}){0,3})(?:\^ ?\{?[23]\}?)?)"
)
# Words that change the number in front of them, or say that it is not the one answer.
_NO_UNIT = re.compile(
    r"\b(?:[a-z]*illion(?:th)?|thousand|hundred|dozen|score|gross|hal(?:f|ve|ved)|third|quarter"
    r"|[a-z]*(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|teen|tie|hundred|thousand)th|zero|one|two|three|four|five|six"
    r"|seven|eight|nine|ten|eleven|twelve|[a-z]+teen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety"
    r"|or|and|not?|never|if|when|unless|is|are|was|be|times|plus|minus|squared|cubed|mod|modulo|choose|factorial|point"
    r"|over|to|than|about|between|less|fewer|more|most|least|except|either|doubled?|tripled?|twice|thrice|infinity|base"
    r"|remainder|negated?|negative|below|under|above|beyond|reciprocal|inverse|roots?|mille|basis|wrong|false|incorrect"
    r"|undefined|impossible|maybe|perhaps|possibly|probably|approximately|approx|roughly|almost|nearly|around|through"
    r"|until|but|instead|versus|vs|k|mn|bn|(?-i:[MB]))s?\b", re.I
)  # fmt: skip


def _split_unit(text: str) -> tuple[str, str]:
    r"""(the answer without its unit, the unit): "" for none, "%", "°", "_8" for a base, else words ("\$" is dollar)."""
    if money := re.fullmatch(r"([+-]?) ?\\?\$ ?(.+)", text):
        return money[1] + money[2], "dollar"
    match = _UNIT.fullmatch(text)
    if not match or _NO_UNIT.search(match[2]):
        return text, ""
    core, unit = match.groups()
    if not unit.startswith(("%", r"\text")) and _number(core) is None:  # \sin 30°, and 2\pi meters may be a product
        return text, ""
    # Case is folded in words only (mW is not MW), and a plural's s is dropped from words only (s and ms are seconds).
    unit = re.sub("[A-Za-z]{4,}", lambda word: word[0].lower(), re.sub(r"\\text|[^A-Za-z0-9_%°]", "", unit))
    return core, re.sub("(?<=..)s$", "", unit)


# -------------------------------------------------------------------------------------------- the verdict


def is_correct(response: str, answer: str, worker: MathWorker) -> bool:
    """The reward: whether the response's final answer equals `answer` (as load_problems returns it)."""
    prediction = extract_answer(response)
    return prediction is not None and same_answer(prediction, answer, worker)


def same_answer(prediction: str, answer: str, worker: MathWorker) -> bool:
    r"""Whether two answers are the same, the second being the reference.

    Decisions, each ours and each in the tests' table:
      numbers   exact: 0.333333 is not 1/3, and 3.14159265 is not \pi
      percent   for 50%: 50%, 50, 0.5. For 50: 50%. For 0.5: 50% but not 0.5%, as below 1 the sign decides the size
      units     ignored where one side has none; else the same words. Cents for dollars is wrong; no conversion
      bases     the base of the reference 52_8 may be left out, never changed or added
      lists     bare lists, {...} and unions are sets with multiplicity; "or" is a comma; lists of words are ordered
      brackets  tuples and intervals must agree in both: (1,2) is not [1,2], {1,2} or a bare 1, 2
      names     x = 7 equals 7; if both sides have a name it must be the same
      equations compared side by side, so 3x + 2 = 17 is not x = 5. 1/2 = 0.5 pays for 0.5: every side is right
      words     equal up to case, blanks and \text, never parsed
    """
    if len(prediction) > MAX_ANSWER or len(answer) > MAX_ANSWER:
        return False
    a, b = _number(answer), _number(prediction)
    if a is not None and b is not None:  # most comparisons end here, without any cleaning
        return a == b
    gold, prediction = _clean(answer), _clean(prediction)
    if not gold or not prediction or not (_balanced(gold) and _balanced(prediction)):
        return False
    try:
        return _same(gold, prediction, _one_limit(worker))
    except TimeoutError:
        return False


def _one_limit(worker: MathWorker) -> Callable[[str, str], bool]:
    """worker.equal for all questions about one answer, with the limit of one: two lists of ten items ask a hundred."""
    deadline = None

    def ask(gold: str, prediction: str) -> bool:
        nonlocal deadline
        worker.start()  # its second is not on the clock
        deadline = deadline or time.monotonic() + worker.timeout_s
        return worker.equal(gold, prediction, deadline - time.monotonic())

    return ask


def _same(gold: str, prediction: str, ask: Callable[[str, str], bool]) -> bool:
    """Two cleaned answers, taken apart level by level. `ask` judges single expressions; it may raise TimeoutError."""
    if not gold or not prediction:  # nothing stands beside "="
        return False
    if _key(gold) == _key(prediction):
        return True
    g, p = _NAMED.fullmatch(gold), _NAMED.fullmatch(prediction)
    if g and p and _key(g[1]) != _key(p[1]):
        return False
    (g_kind, g_items), (p_kind, p_items) = _structure(g[2] if g else gold), _structure(p[2] if p else prediction)
    if g_kind == p_kind == "item":
        return _same_item(g_items[0], p_items[0], ask)
    if {g_kind, p_kind} == {"item", "="}:  # 1/2 = 0.5 for 0.5
        return all(_same(g, p, ask) for g in g_items for p in p_items)
    if g_kind != p_kind or len(g_items) != len(p_items):
        return False
    if g_kind not in ("list", r"\cup") or all(_WORDS.search(item) or re.fullmatch("[A-Z]", item) for item in g_items):
        return all(_same(g, p, ask) for g, p in zip(g_items, p_items, strict=True))
    left = list(p_items)  # each item of the reference takes one of the prediction's: order is free, multiplicity is not
    for g in g_items:
        match = next((i for i, p in enumerate(left) if _same(g, p, ask)), None)
        if match is None:
            return False
        del left[match]
    return True


# x = ..., f^{-1}(x) = ..., (x, y) = ..., x \in ...; but SRAC = LRAC and A = C are statements, which LRAC and C do not
# answer, and who writes \log(x) = 2 has not solved for x
_NAMED = re.compile(
    r"(\\?(?!(?:pi|log|ln|lg|exp|sqrt|abs|sin|cos|tan|cot|sec|csc|not)\b)[A-Za-z]+(?:_\{?\w+\}?)?'?(?:\^\{-1\})?"
    r"(?:\([\w, ]*\))?|\([a-z](?:, ?[a-z])+\)) ?(?:=|\\in\b)"
    r"(?! ?[A-Za-z]{2,}$| ?(?:\\text ?\{)?\(?[A-E]\)?\}?$) ?(.+)"
)
_MATRIX = re.compile(r"\\begin\{[pbB]?(?:small)?matrix\}(.*)\\end\{[pbB]?(?:small)?matrix\}")
# What only a string comparison can judge: text, words, names of points (AB is not BA), times and ratios, dots
_WORDS = re.compile(r"\\text|(?<![\\A-Za-z])(?:[A-Za-z]{4}|[a-z]{0,2}[A-Z][A-Za-z]|[a-z]{1,2}[A-Z])|:|\.\.|\\\w?dots")


def _structure(text: str) -> tuple[str, list[str]]:
    """(kind, parts) of a cleaned answer.

    The kind is "item" for one thing, "list", the brackets of a tuple or interval as in "(]", a matrix's shape, or the
    sign between the parts ("=", "<", a union's) where the whole is an equation, an inequality or a union.
    """
    if _number(_split_unit(text)[0]) is not None:  # 1,234 is not a list
        return "item", [text]
    if (braces := re.fullmatch(r"\\\{(.+)\\\}", text)) and _balanced(braces[1]):
        return _structure(braces[1].strip())
    tuples = text[0] in "([" and text[-1] in ")]" and _balanced(text[1:-1])
    items = [item for item in _split(text[1:-1] if tuples else text, "[,;]")[::2] if item]
    if len(items) > 1:
        return text[0] + text[-1] if tuples else "list", items
    parts = _split(text, r"=|<|>|\\(?:le|ge|ne|cup)\b")
    if len(parts) > 1:
        signs = parts[1::2]
        return signs[0] if len(set(signs)) == 1 else " ".join(signs), parts[::2]
    if (matrix := _MATRIX.fullmatch(text)) and r"\begin" not in matrix[1]:
        rows = [row.split("&") for row in matrix[1].split(r"\\") if row.strip()]
        return f"matrix {[len(row) for row in rows]}", [cell.strip() for row in rows for cell in row]
    return "item", [text]


def _same_item(gold: str, prediction: str, ask: Callable[[str, str], bool]) -> bool:
    (g, g_unit), (p, p_unit) = _split_unit(gold), _split_unit(prediction)
    a, b = _number(g), _number(p)
    if g_unit != p_unit:
        if (g_unit and p_unit) or p_unit[:1] == "_":  # cents for dollars; a base that the reference does not have
            return False
        if "%" in (g_unit, p_unit):
            if a is None or b is None:
                return False
            return b in (a, a / 100) if g_unit else b / 100 == a or (b == a and abs(a) > 1)
    if a is not None and b is not None:
        return a == b
    return _key(g) == _key(p) or _symbolic_equal(g, p, ask)


# What math-verify is asked about: plain expressions, in these commands and characters. Of others it drops some (it reads
# 7"8 as 78 and \phantom{7} as 7) and reads some its own way: of (8 = 7) it takes the last side. No sums, integrals and
# limits: they are no final answers, and can take for ever.
_COMMANDS = frozenset(
    r"""frac sqrt binom cdot times div pi lfloor rfloor lceil rceil
    log ln exp sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh
    alpha beta gamma delta epsilon zeta eta theta kappa lambda mu nu xi rho sigma tau phi chi psi omega
    Gamma Delta Theta Lambda Sigma Phi Psi Omega""".split()
)
_CHARACTERS = re.compile(r"[A-Za-z0-9 +*/^_(){}\[\]!|.\\-]*")
# What it misreads of these: **, !!, and numbers next to each other, which it adds up or cuts off (2 3, 1.2.3, 7 .5, 52_8,
# 1e-5, 2\frac{3}{2}, \frac{1}{2}35, {2}{3}, 2[3]). Last, what it would compute for minutes.
_MISREAD = re.compile(
    r"\*\*|//|!!|[0-9)}\]] \.|[0-9] [0-9]|\.[0-9]*\.|[0-9)}] ?_|[0-9]e[-+0-9]|\\frac.*\} ?[0-9]"
    r"|(?<![\^_0-9.])[0-9.]+ ?\\frac ?\{[0-9]+\} ?\{[0-9]+\}|\\frac ?\{[0-9]+\} ?\{[0-9]+\} ?(?:\\frac|\{)"
    r"|(?:^|[-+*/({|!)]|(?<![\^_])[0-9]) ?\{|(?<!\\sqrt)(?<!\\sqrt )\[|[0-9]{5} ?!|\^ ?\{?-?[0-9]{6}"
)


def _exact(decimal: re.Match) -> str:
    """2.5 as \\frac{25}{10}: math-verify would compute with 15 digits, and take 2.5 + 10^{-17} for 2.5."""
    return rf"\frac{{{decimal[1]}{decimal[2]}}}{{1{'0' * len(decimal[2])}}}"


def _symbolic_equal(gold: str, prediction: str, ask: Callable[[str, str], bool]) -> bool:
    """math-verify's verdict on two expressions, for those that it reads as they are meant."""
    expressions, letters = [], []
    for text in (gold, prediction):
        if not (_CHARACTERS.fullmatch(text) and _COMMANDS.issuperset(re.findall(r"\\([A-Za-z]*)", text))):
            return False
        if _WORDS.search(text) or _MISREAD.search(text):
            return False
        text = re.sub(r"(?<![0-9.^_{A-Za-z])([0-9]+(?:\.[0-9]+)?) ?\(", r"\1 \\cdot (", text)  # 2(3) would be 5
        # 5 too would be (2)(3) and \frac{2}{1}(3)
        text = re.sub(r"(\)|\\frac ?\{[0-9]+\} ?\{[0-9]+\}) ?(?=[(0-9])", r"\1 \\cdot ", text)
        expressions.append(re.sub(r"([0-9]+)\.([0-9]+)", _exact, text))
        letters.append(set(re.findall("[A-Za-z]", re.sub(r"\\[A-Za-z]+", " ", text))))
    g, p = letters
    if len({letter.lower() for letter in g | p}) < len(g | p):  # N and n would become one symbol
        return False
    # A variable that the reference does not have can only cancel out, as in "n o t 0", which it multiplies out to 0.
    return not p - g - {"e", "i"} and ask(*expressions)


# -------------------------------------------------------------------------------------------- problem files


@dataclass(frozen=True)
class Problem:
    """One row. `solution` is a strong model's worked solution, `strategy` its strategy; either may be None."""

    id: str
    problem: str
    answer: str
    solution: str | None
    strategy: Strategy | None


def load_problems(path: str | Path, worker: MathWorker | None = None) -> list[Problem]:
    """The rows of a jsonl file: {"id", "problem", "answer"} as strings, "solution" and "strategy" where there are any.

    Answers are normalised (delimiters and a box around the whole are dropped). A row that repeats an earlier problem
    with the same answer is dropped, and a line printed: copies of benchmarks repeat their rows. An answer that no
    prediction could match is an error, because its problem would silently be worth 0 for ever. Raises one ValueError
    with up to 20 lines "path:line: what, value".
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: {'a folder, expected a jsonl file' if path.is_dir() else 'no such file'}")
    if worker is None:
        with MathWorker() as worker:
            return load_problems(path, worker)
    problems, errors, dropped = [], [], 0
    by_id, by_text = {}, {}  # id -> line; problem text -> (line, answer)
    for line, raw in enumerate(path.read_bytes().rstrip().splitlines(), start=1):
        try:
            problem = _read_row(raw)
            text = " ".join(problem.problem.split())
            if text in by_text:
                first, answer = by_text[text]
                if not same_answer(problem.answer, answer, worker):
                    raise ValueError(f"same problem as line {first} but answer {problem.answer!r}, not {answer!r}")
                dropped += 1
                continue
            if problem.id in by_id:
                raise ValueError(f"duplicate id, line {by_id[problem.id]} has it too, {problem.id!r}")
        except ValueError as error:
            errors.append(f"{path}:{line}: {error}")
            continue
        by_id[problem.id], by_text[text] = line, (line, problem.answer)
        problems.append(problem)
    if errors:
        raise ValueError("\n".join(errors[:20] + [f"... and {len(errors) - 20} more"] * (len(errors) > 20)))
    if not problems:
        raise ValueError(f"{path}: no rows")
    if dropped:
        print(f"{path}: dropped {dropped} rows that repeat an earlier problem and its answer")
    return problems


def _read_row(raw: bytes) -> Problem:
    try:
        row = json.loads(raw.decode(), object_pairs_hook=_unique_keys)
        json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair would fail where the results are written
    except (json.JSONDecodeError, UnicodeError, RecursionError) as error:
        raise ValueError(f"not a line of JSON ({error}), {raw[:80].decode(errors='replace')!r}") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, {row!r}")
    if missing := [name for name in ("id", "problem", "answer") if name not in row]:
        raise ValueError(f"field {missing[0]!r} is missing, {sorted(row)!r}")
    for name, value in row.items():
        if name not in ("id", "problem", "answer", "solution", "strategy"):
            raise ValueError(f"unknown field {name!r}, {value!r}")
        if name != "strategy" and (not isinstance(value, str) or not value.strip()):
            raise ValueError(f"field {name!r} must be a non-empty string, {value!r}")
    answer = normalise_answer(row["answer"])
    if reason := _unusable(answer):
        raise ValueError(f"field 'answer' {reason}, {row['answer'][:200]!r}")
    strategy = Strategy.from_dict(row["strategy"]) if "strategy" in row else None
    return Problem(row["id"], row["problem"], answer, row.get("solution"), strategy)


def _unique_keys(pairs: list[tuple]) -> dict:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError(f"a field is given twice, {keys!r}")
    return dict(pairs)


def _unusable(answer: str) -> str:
    """Why no prediction could match this reference, "" if one can."""
    text = _clean(answer)
    # What math-verify cannot read (L_{\odot}) still matches when it is written the same way, if it is whole.
    torn = r"^[*/^_=]|[-+*/^_=\\]$|(?<!\\)\{\s*\}|\\(?:frac|sqrt)\s*$"
    reasons = {
        "is empty": not text,
        f"has {len(answer)} characters, more than {MAX_ANSWER}": len(answer) > MAX_ANSWER,
        "has unbalanced brackets": not _balanced(text),
        "is prose": len(re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", text)) > 5,
        "cannot be read as numbers, an expression or a few words": re.search(torn, text),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


# -------------------------------------------------------------------------------------------- accuracy


def evaluate(
    model: torch.nn.Module,
    tokenizer: object,
    problems: Sequence[Problem],
    *,
    n: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    worker: MathWorker,
    guided: bool = False,
    max_rows: int = 64,
    cache_tokens: int | None = None,
    keep_responses: bool = False,
    on_problem: Callable[[dict], None] | None = None,
    show: bool = True,
) -> dict:
    """n samples per problem, graded: figures() of them, plus "responses" if they are to be kept.

    max_new_tokens  longest response; generate also cuts at the context's end. A response that was cut is "truncated"
    guided          put each row's strategy into the prompt
    max_rows        responses decoded at once, and cache_tokens the size of the KV cache: see rollout.generate
    keep_responses  "responses": the records of the problems, in their order. A record has the problem's id, "samples" (per
                    sample text, answer, correct, truncated, timed_out and length in tokens) and "majority" (index of a
                    sample with the answer that won the vote, None: no answer at all)
    on_problem      called with a problem's record as soon as its last response is graded, from the grading thread
    show            a progress bar

    ValueError, before anything is sampled, for no problems, a row without a strategy when guided, and a prompt that
    fills the context.
    """
    prompts = _prompts(model, tokenizer, problems, guided)
    # From (seed, id): the result depends neither on max_rows nor on which other problems, or ranks, there are.
    seeds = [seed * 2**32 + zlib.crc32(problem.id.encode()) for problem in problems]
    records = [{"id": problem.id, "samples": [None] * n, "majority": None} for problem in problems]
    left = [n] * len(problems)

    def on_graded(row: Trajectory, member: int, text: str, correct: bool, timed_out: bool) -> None:
        record = records[row.group]
        record["samples"][member] = {
            "text": text, "answer": extract_answer(text), "correct": correct, "truncated": not row.finished,
            "timed_out": timed_out, "length": len(row.response_ids),
        }  # fmt: skip
        left[row.group] -= 1
        if not left[row.group]:
            record["majority"] = majority([sample["answer"] for sample in record["samples"]], _same_vote(worker))
            if on_problem is not None:
                on_problem(record)

    sample_and_grade(
        model, tokenizer, prompts, [problem.answer for problem in problems], worker, n=n, max_new_tokens=max_new_tokens,
        temperature=temperature, top_p=top_p, seed=seeds, max_rows=max_rows, cache_tokens=cache_tokens,
        progress=("guided" if guided else "auto") if show else None, on_graded=on_graded,
    )  # fmt: skip
    return figures(records) | ({"responses": records} if keep_responses else {})


def _same_vote(worker: MathWorker) -> Callable[[str, str], bool | None]:
    """same_answer for a vote: None where the worker ran out of time, which a verdict alone does not tell."""

    def same(answer: str, reference: str) -> bool | None:
        lost = worker.timeouts
        verdict = same_answer(answer, reference, worker)
        return None if worker.timeouts > lost else verdict

    return same


def figures(records: Sequence[dict]) -> dict:
    """stats.summarise of evaluate's records, plus grader_timeouts (samples graded wrong because the grader ran out of
    time) and "correct": {id: number of correct samples}, by which two models are compared."""
    samples = [record["samples"] for record in records]
    right, length, truncated, lost = (
        [[sample[key] for sample in row] for row in samples] for key in ("correct", "length", "truncated", "timed_out")
    )
    won = [row["majority"] is not None and row["samples"][row["majority"]]["correct"] for row in records]
    counts = {record["id"]: sum(row) for record, row in zip(records, right, strict=True)}
    return summarise(right, length, truncated, won) | {"grader_timeouts": sum(map(sum, lost)), "correct": counts}


def sample_and_grade(
    model: torch.nn.Module,
    tokenizer: object,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[str],
    worker: MathWorker,
    *,
    progress: str | None = None,
    on_graded: Callable[[Trajectory, int, str, bool, bool], None] | None = None,
    **settings: object,
) -> tuple[list[list[Trajectory]], list[list[tuple[str, bool]]]]:
    """rollout.generate with these settings, and (text, correct) of every response, both as (P, n) nested lists.

    A response is graded, in a thread of its own, while others are still being sampled. progress: the name of a progress
    bar that counts them; None: no bar. on_graded: called there with (trajectory, its place in its group, text, correct,
    whether the grader ran out of time).
    """
    graded: dict[tuple[int, int], tuple[str, bool]] = {}
    counts = settings["n"]
    total = counts * len(prompts) if isinstance(counts, int) else sum(counts)

    def grade(row: Trajectory, member: int) -> None:
        text = tokenizer.decode(row.response_ids, skip_special_tokens=True)
        lost = worker.timeouts
        correct = is_correct(text, answers[row.group], worker)
        graded[row.group, member] = text, correct
        if on_graded is not None:
            on_graded(row, member, text, correct, worker.timeouts > lost)

    with ThreadPoolExecutor(1) as pool, tqdm(total=total, desc=progress, unit="response", disable=progress is None) as bar:
        grading = deque()  # one thread: the worker answers one question at a time

        def on_row(row: Trajectory, member: int) -> None:
            while grading and grading[0].done():
                grading.popleft().result()  # an error in the grader, or a full disk, ends the sampling now, not hours later
            grading.append(pool.submit(grade, row, member))
            bar.update()

        groups = generate(model, prompts, eos_ids=model.config.eos_ids, on_row=on_row, **settings)
        for future in grading:
            future.result()
    return groups, [[graded[p, i] for i in range(len(group))] for p, group in enumerate(groups)]


def _prompts(model: torch.nn.Module, tokenizer: object, problems: Sequence[Problem], guided: bool) -> list[list[int]]:
    if not problems:
        raise ValueError("no problems to evaluate")
    without = [problem.id for problem in problems if problem.strategy is None]
    if guided and without:
        raise ValueError(f"guided, but {len(without)} problems have no strategy, the first is {without[0]!r}")
    prompts = []
    for problem in problems:
        messages = guided_messages(problem.problem, problem.strategy) if guided else auto_messages(problem.problem)
        prompts.append(encode_chat(tokenizer, messages))
        if len(prompts[-1]) >= model.config.max_position_embeddings:
            size, context = len(prompts[-1]), model.config.max_position_embeddings
            raise ValueError(f"problem {problem.id!r}: its prompt of {size} tokens fills the context of {context}")
    return prompts


# -------------------------------------------------------------------------------------------- what is evaluated


@dataclass(frozen=True)
class Part:
    """The problems of one file in one group, alone or guided. key: all that a kept response must agree in to count here."""

    file: str
    guided: bool
    n: int
    max_new_tokens: int
    problems: list[Problem]
    key: dict


def read_parts(args: argparse.Namespace, worker: MathWorker) -> list[Part]:
    """Read and check all files, the model's identity too: a bad line in the last file must not cost an evaluation.

    A file of --data has n 1 and 2,048 tokens, one of --benchmarks the paper's; --n and --max_new_tokens overrule both.
    """
    # 2,048 tokens hold nearly every answer of an instruct model of a size that a small machine runs. The paper's 32,768
    # cost memory for the cache and, for a model that rambles, hours: right for its benchmarks, no default for a first look.
    files = [(file, 1, 2048) for file in args.data or ()]
    longest = PAPER_SETTINGS["max_new_tokens"]
    files += [(file, BENCHMARKS[Path(file).stem].n, longest) for file in _benchmark_files(args.benchmarks)]
    if args.n is not None and len(args.n) not in (1, len(files)):
        raise ValueError(f"--n has {len(args.n)} numbers for {len(files)} files: give one for all or one for each")
    counts = [n for _, n, _ in files] if args.n is None else args.n * (len(files) if len(args.n) == 1 else 1)
    path, digest = model_identity(args.model)
    shared = {"model": path, "model_sha256": digest} | {name: getattr(args, name) for name in KEY}
    parts, seen = [], {}
    for (file, _, tokens), n in zip(files, counts, strict=True):
        problems = load_problems(file, worker)[: args.limit]
        data = hashlib.sha256(Path(file).read_bytes()).hexdigest()
        if data in seen:
            raise ValueError(f"{file}: is given twice, {seen[data]} holds the same")
        seen[data] = file
        tokens = args.max_new_tokens or tokens
        for guided in (False, True) if args.both else (args.guided,):
            without = [problem.id for problem in problems if problem.strategy is None]
            if guided and without:
                raise ValueError(f"{file}: {len(without)} problems have no strategy, the first is {without[0]!r}")
            key = shared | {"data_sha256": data, "guided": guided, "n": n, "max_new_tokens": tokens}
            parts.append(Part(file, guided, n, tokens, problems, key))
    return parts


KEY = ("temperature", "top_p", "seed", "dtype", "timeout")  # arguments that change a response or its verdict


def _benchmark_files(folder: str | None) -> list[str]:
    if folder is None:
        return []
    files = sorted(Path(folder).glob("*.jsonl"))
    unknown = [file.name for file in files if file.stem not in BENCHMARKS]
    if unknown:
        raise ValueError(f"{folder}: {unknown[0]} is none of {', '.join(BENCHMARKS)}; name the files with --data instead")
    if not files:
        raise ValueError(f"{folder}: no folder with {'.jsonl, '.join(BENCHMARKS)}.jsonl (data/prepare.py writes them)")
    return [str(Path(folder) / f"{name}.jsonl") for name in BENCHMARKS if Path(folder) / f"{name}.jsonl" in files]


def model_identity(name: str) -> tuple[str, str]:
    """(path, sha256) of a model folder, over its config and tokenizer files, and over the names, sizes and 64 samples of 64 KB
    of each weight file. Sizes alone would not tell a model from the same one trained on; all of 15 GB would take a minute.
    """
    folder = resolve_model(name).resolve()
    digest = hashlib.sha256()
    texts = [file for file in folder.iterdir() if file.suffix in (".json", ".jinja", ".txt", ".model") and file.is_file()]
    for file in sorted(texts):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode() + file.read_bytes())
    for file in weight_files(folder):
        size, block = file.stat().st_size, 2**16
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            for start in sorted({max(0, size - block) * i // 63 for i in range(64)}):
                stream.seek(start)
                digest.update(stream.read(block))
    return str(folder), digest.hexdigest()


# -------------------------------------------------------------------------------------------- responses on disk


def _responses_path(out: Path, rank: int | None = None) -> Path:
    """Where responses go: a file per rank while they are sampled, one when all are there."""
    return out.with_name(f"{out.stem}-responses{'' if rank is None else f'-rank{rank}'}.jsonl")


@contextmanager
def own_responses(out: Path, rank: int) -> Iterator[Callable[[Part, dict], None]]:
    """This rank's file of responses, as a function that adds a record. ValueError where another process writes to it.

    A line is flushed when it is written, which a killed process cannot take back; a machine that loses power can. What stands
    behind the last line's end is a line that was torn, and is cut off.
    """
    path = _responses_path(out, rank)
    with path.open("a+b") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{path}: another process is writing to it; name another file with --out") from None
        stream.seek(0)
        stream.truncate(_whole_lines(stream.read()))

        def write(part: Part, record: dict) -> None:
            line = {"file": part.file, **record, "key": part.key}
            stream.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
            stream.flush()

        try:
            yield write
        finally:
            if not stream.seek(0, os.SEEK_END):
                path.unlink()


def _whole_lines(content: bytes) -> int:
    return content.rfind(b"\n") + 1


def read_responses(parts: Sequence[Part], out: Path) -> dict[tuple[int, str], bytes]:
    """{(index of the part, id): line} of all responses that are on disk for these parts, from however many ranks.

    ValueError, naming file, line and what differs, for a line of another evaluation, one that is no record, and two different
    ones about one problem. Holds all texts at once: 9,000 responses of 3 KB on the paper's four benchmarks are 27 MB.
    """
    found: dict[tuple[int, str], bytes] = {}
    ranks = sorted(out.parent.glob(f"{glob.escape(_responses_path(out).stem)}-rank*.jsonl"))
    for path in [_responses_path(out), *ranks]:
        content = path.read_bytes() if path.exists() else b""
        for number, line in enumerate(content[: _whole_lines(content)].split(b"\n")[:-1], start=1):
            try:
                job = _job_of(line, parts)
                if found.setdefault(job, line) != line:  # the same line twice: the end of a merge was interrupted
                    raise ValueError(f"a second record of problem {job[1]!r}, different from the first")
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
    return found


def _job_of(line: bytes, parts: Sequence[Part]) -> tuple[int, str]:
    try:
        record = json.loads(line)
        key, problem, samples = record["key"], record["id"], record["samples"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"not a record of responses ({error}), {line[:80].decode(errors='replace')!r}") from None
    for index, part in enumerate(parts):
        if part.key == key:
            if len(samples) != part.n or all(problem != known.id for known in part.problems):
                raise ValueError(f"problem {problem!r} with {len(samples)} samples is not among what is evaluated now")
            return index, problem
    nearest = min((part.key for part in parts), key=lambda own: sum(own[name] != key.get(name) for name in own))
    changes = [f"{name} {key.get(name)!r}, now {value!r}" for name, value in nearest.items() if key.get(name) != value]
    raise ValueError(f"is of another evaluation ({'; '.join(changes)}); name another file with --out, or remove it")


def merge_responses(parts: Sequence[Part], out: Path, ranks: int) -> list[list[dict]]:
    """All records, a list per part in the order of its problems; the ranks' files become one, in the same order."""
    found = read_responses(parts, out)
    jobs = [(index, problem.id) for index, part in enumerate(parts) for problem in part.problems]
    missing = [job for job in jobs if job not in found]
    if missing:
        raise ValueError(
            f"{_responses_path(out)}: the responses to {len(missing)} problems are not there, the first is {missing[0][1]!r}; "
            f"can rank 0 see the files of all {ranks} ranks?"
        )
    whole, new = _responses_path(out), out.with_name(f"{out.stem}-responses.tmp")
    new.write_bytes(b"".join(found[job] + b"\n" for job in jobs))
    os.replace(new, whole)
    for path in out.parent.glob(f"{glob.escape(whole.stem)}-rank*.jsonl"):
        path.unlink()
    records = [[] for _ in parts]
    for index, problem in jobs:
        records[index].append(json.loads(found[index, problem]))
    return records


# -------------------------------------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    # No abbreviations: --temp must not be read as --temperature, and a typo must fail.
    parser = argparse.ArgumentParser(description="Accuracy of a model on jsonl problem files.", allow_abbrev=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="model folder or hub name")
    what.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two result files: the paired difference, B minus A")
    what.add_argument("--table", nargs="+", metavar="FILE", help="result files: Markdown rows beside the paper's")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="jsonl files of problems")
    parser.add_argument("--benchmarks", metavar="FOLDER", help="data/prepare.py's benchmark files, each with the paper's n")
    parser.add_argument(
        "--n", type=int, nargs="+",
        help="samples per problem, one number for all files or one for each (default: 1; with --benchmarks the paper's: 4, "
        "and 32 for AMC23 and AIME)",
    )  # fmt: skip
    parser.add_argument("--temperature", type=float, default=0.6, help="0 is greedy; 0.6 is the paper's")
    parser.add_argument("--top_p", type=float, default=0.95, help="0.95 is the paper's")
    parser.add_argument(
        "--max_new_tokens", type=int,
        help="longest response, cut to the context (default: 2,048; with --benchmarks the paper's 32,768, for which "
        "--max_rows or --cache_tokens may have to be lowered). Look at the truncation that is printed",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the sampling; with --compare of the resampling")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--guided", action="store_true", help="put each row's strategy into the prompt")
    group.add_argument("--both", action="store_true", help="evaluate without and with the strategies, and compare")
    parser.add_argument("--limit", type=int, help="only the first so many problems of each file")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="auto", help="auto takes cuda where there is one, else cpu")
    parser.add_argument("--max_rows", type=int, default=64, help="responses decoded at once")
    parser.add_argument("--cache_tokens", type=int, help="size of the KV cache in tokens (default: what is needed)")
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds for one symbolic comparison")
    parser.add_argument("--timeout_minutes", type=float, default=1440.0, help="how long a rank waits for the slowest one")
    parser.add_argument("--out", help="results file, must not exist (default: eval-MODEL.json, -guided or -both behind)")
    return parser


def _check(args: argparse.Namespace) -> None:
    """ValueError for numbers out of range, and for flags that would have no effect."""
    for name in ("n", "max_new_tokens", "max_rows", "cache_tokens", "limit"):
        value = getattr(args, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < 1:
                raise ValueError(f"--{name} must be at least 1, got {number}")
    if args.model is None:
        mode = "compare" if args.compare else "table"
        unused = vars(build_parser().parse_args([f"--{mode}", "x", "y"]))
        for name, value in vars(args).items():
            if name not in ("compare", "table", "seed") and value != unused[name]:
                raise ValueError(f"--{name} has no meaning with --{mode}")
    elif not args.data and args.benchmarks is None:
        raise ValueError("--model needs problems: --data FILE ... or --benchmarks FOLDER")


def _output_path(args: argparse.Namespace) -> Path:
    """Where the results go. Checked before the run: an hour of sampling must not end at a file that is in the way."""
    name = Path(args.model.rstrip("/")).name or "model"
    path = Path(args.out or f"eval-{name}{'-guided' * args.guided}{'-both' * args.both}.json")
    if path.exists():
        raise ValueError(f"{path}: already there; name another file with --out")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: its folder does not exist")
    return path


def _line(result: dict) -> str:
    n, error = result["n"], result["standard_error"]
    accuracy, voted, cut = (100 * result[key] for key in ("accuracy", "maj_at_n", "truncation"))
    passed = "  ".join(f"pass@{k} {100 * value:.1f}" for k, value in result["pass_at"].items() if k != "1" or n == 1)
    spread = "" if error is None else f" ± {100 * error:.1f}"
    return (
        f"avg@{n} {accuracy:.1f}{spread}  {passed}  maj@{n} {voted:.1f}  truncated {cut:.1f} %  "
        f"tokens {result['tokens']:.0f}  problems {result['problems']}"
    )


def read_results(path: str) -> dict:
    """A result file of main's; ValueError where it is something else."""
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
        if all("correct" in part and "data_sha256" in part for part in results["files"].values()) and results["config"]:
            return results
        raise ValueError("it has no number of correct samples per problem")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a results file of eval.py ({type(error).__name__}: {error})") from None


def sample_parts(
    args: argparse.Namespace, shares: Sequence[tuple[Part, list[Problem]]], device: torch.device, worker: MathWorker,
    write: Callable[[Part, dict], None],
) -> None:  # fmt: skip
    """This rank's problems of each part: sampled, graded and written."""
    model, tokenizer = load_model(args.model, dtype=getattr(torch, args.dtype), device=device)
    for part, problems in shares:  # before the first response: a prompt of the last file may be too long
        _prompts(model, tokenizer, problems, part.guided)
    for part, problems in shares:
        evaluate(
            model, tokenizer, problems, n=part.n, max_new_tokens=part.max_new_tokens, temperature=args.temperature,
            top_p=args.top_p, seed=args.seed, worker=worker, guided=part.guided, max_rows=args.max_rows,
            cache_tokens=args.cache_tokens, on_problem=lambda record, part=part: write(part, record), show=world()[0] == 0,
        )  # fmt: skip


def _my_share(parts: Sequence[Part], kept: dict[tuple[int, str], bytes]) -> list[tuple[Part, list[Problem]]]:
    """What is left to do, dealt to the ranks by length: a problem's text times n [ours]; a response's is not known before."""
    left = [(part, p) for index, part in enumerate(parts) for p in part.problems if (index, p.id) not in kept]
    mine = deal([part.n * len(problem.problem) for part, problem in left], world()[1])[world()[0]]
    chosen = [left[index] for index in mine]
    return [(part, own) for part in parts if (own := [problem for owner, problem in chosen if owner is part])]


def collect(parts: Sequence[Part], records: Sequence[list[dict]], seed: int) -> dict[str, dict]:
    """{file: its figures}, a line printed for each part; with --both the guided figures are in "guided", and "guidance"."""
    files: dict[str, dict] = {}
    for part, own in zip(parts, records, strict=True):
        result = figures(own)
        both = part.file in files
        print(f"{part.file}{' guided' * both}: {_line(result)}")
        if not both:
            settings = {"data_sha256": part.key["data_sha256"], "max_new_tokens": part.max_new_tokens}
            files[part.file] = result | settings
            continue
        counts = [list(figure["correct"].values()) for figure in (files[part.file], result)]
        p_auto, p_guide = (torch.tensor(values) / part.n for values in counts)
        families = [problem.strategy.type for problem in part.problems]
        effect = guidance(*counts, part.n, instance_weight(p_auto, p_guide).tolist(), families, seed=seed)
        files[part.file] |= {"guided": result, "guidance": effect}
        print("\n".join(guidance_lines(effect)))
    return files


def run(args: argparse.Namespace, out: Path, device: torch.device) -> dict:
    """Evaluate on this rank and, on rank 0, write and return the results of all; {} on the others.

    The ranks meet twice and communicate nothing else: when all have read what is kept, and when all are done.
    """
    control = control_group()
    rank, ranks = world()
    with MathWorker(timeout_s=args.timeout) as worker:
        parts = read_parts(args, worker)
        with own_responses(out, rank) as write:
            kept = read_responses(parts, out)
            meet(control, 0, args.timeout_minutes)  # nobody writes before everybody has read: all must see the same work left
            if kept and rank == 0:
                print(f"{len(kept)} of {sum(len(part.problems) for part in parts)} problems are there already, going on")
            if shares := _my_share(parts, kept):
                sample_parts(args, shares, device, worker, write)
    meet(control, 0, args.timeout_minutes)
    if rank:
        return {}
    files = collect(parts, merge_responses(parts, out, ranks), args.seed)
    packages = ("torch", "transformers", "math-verify", "sympy", "latex2sympy2_extended")
    versions = {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in packages}
    identity = {name: parts[0].key[name] for name in ("model", "model_sha256")}
    config = vars(args) | {"device": device.type, "ranks": ranks}
    results = {"config": config, "identity": identity, "versions": versions, "files": files}
    new = out.with_name(f"{out.name}.tmp")
    new.write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(new, out)
    print(f"results in {out}, responses in {_responses_path(out)}")
    return results


def main(arguments: Sequence[str] | None = None) -> dict | list[dict] | str:
    """The command line: print what was asked for and return it: an evaluation's results, --compare's rows, --table's text."""
    args = build_parser().parse_args(arguments)
    _check(args)
    if args.compare:
        rows = compare(*map(read_results, args.compare), tuple(args.compare), seed=args.seed)
        print("\n".join(comparison_lines(rows, tuple(args.compare))))
        return rows
    if args.table:
        text = table([read_results(path) for path in args.table])
        print(text)
        return text
    out = _output_path(args)
    joined = dist.is_initialized()  # by a caller, who then ends it
    device = start_ranks(args.device, args.timeout_minutes)
    try:
        return run(args, out, device)
    finally:
        if not joined:
            dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RankLost) as problem_with_input:
        sys.exit(f"eval.py: {problem_with_input}")
