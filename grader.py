r"""The grader, which is the reward of training and the verdict of evaluation: is a response's final answer the right one?

    with MathWorker() as worker:
        is_correct(r"Half of 7, so \boxed{\frac{7}{2}}.", "3.5", worker)      # True

What it is not: a judge of the reasoning. No tolerance either: an answer rounded by the model is wrong.

A reward that pays for a wrong answer teaches it, so where two texts may mean different things the verdict is "wrong",
and forms that models rarely write are not looked into. Plain numbers are compared exactly. Lists, intervals, matrices,
equations and units are taken apart here. Only a single expression goes to math-verify (0.9), which cannot be trusted
alone: it reads 2(3) and "2 3" as 5, N as n, 52_8 as 52, x' as x, and takes 10^{-20} for 0. It needs a process of its
own: its signal.alarm fails off the main thread, and a power tower runs for ever.

What still pays, as everywhere in the field: an expression that is equal to the answer but was never evaluated (2^{10}
for 1024).

Imports no sibling, and math-verify in the child process only: copy this file alone.
"""

import inspect
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from multiprocessing import Pipe

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


def why_unusable(answer: str) -> str:
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
