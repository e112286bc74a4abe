r"""The grader, which is the reward of training and the verdict of evaluation: is a response's final answer the right one?

    with MathWorker() as worker:
        is_correct(r"Half of 7, so \boxed{\frac{7}{2}}.", "3.5", worker)      # True

A reward that pays for a wrong answer teaches it, so the verdict is "wrong" whenever two texts may mean different things.
Numbers, units, names, lists, intervals and matrices are taken apart here. Only single expressions go to math-verify (0.9), if
it cannot misread them. One thing is still paid: an expression that is not worked out (2^{10} for 1024). Copy this file alone.
"""

import importlib.util
import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from fractions import Fraction
from functools import lru_cache, reduce
from multiprocessing.connection import wait
from subprocess import PIPE, Popen
from threading import Thread

MAX_ANSWER = 1000  # characters; no benchmark's answer is longer, and parsing time grows with the length

# What may be inside of braces, nine deep: an answer that nests deeper is refused. Possessive, so that no text costs much.
_GROUP = reduce(lambda inner, _: rf"(?:[^{{}}\\]|\\.|\{{{inner}\}})*+", range(9), "")
# The second form is LaTeX's "\boxed 7". In LaTeX it would frame one digit; we take the whole number.
_BOX = re.compile(rf"(?<!\\)\\boxed\s*\{{({_GROUP})\}}|\\boxed\s+(-?[0-9][0-9,]*(?:\.[0-9]+)?)", re.DOTALL)
# GSM8K's "#### 7" ("#### Step 2" is a heading) or a sentence. A lookahead, so that a second one on the same line is found too.
_STATED = re.compile(
    r"(?:(?<!#)####(?=[ \t]*[-+$.]*[0-9])|\banswer\b(?:[^\n:=.]{0,60}?\bis\b|[ \t*]{0,6}[:=]))[\s*:]*(?=([^\n]{0,300}))", re.I
)


def extract_answer(text: str) -> str | None:
    r"""A response's final answer: the last \boxed{...} that closes and is not empty, else "#### 7" or "the answer is x"."""
    for part in (text.rpartition("</think>")[2], text):  # a box inside the thoughts counts last, as for verl and LUFFY
        for group, number in reversed(_BOX.findall(part)):
            if answer := (group or number).strip():  # "\boxed{}" only talks about the format
                return answer
        for found in reversed(_STATED.findall(part)):
            if answer := _undress(re.split(r"(?<=\S)\.(?=\s|$)(?! ?\.)", found, maxsplit=1)[0]):  # "3.5 m." keeps its point
                return answer
    return None


def _undress(text: str) -> str:
    """Without outer blanks, emphasis, math delimiters around the whole, and one final period (3.14... goes on)."""
    text = re.sub(r"(?<!\.)(?<!\. )\.$", "", text.strip().strip("*` ")).strip()
    wrapped = re.fullmatch(r"(\$\$?|\\[(\[])((?:(?!\1).)+)(?:\$\$?|\\[)\]])", text, re.DOTALL)
    return wrapped[2].strip() if wrapped else text


class RewardError(RuntimeError):
    """The process of a reward did not start, or its function raised or returned no number in [0, 1]; then it names the row."""


class Child(AbstractContextManager):
    """A process that answers questions, a line of JSON for each, started at the first one. For one thread. timeout_s limits a
    question: then the child and all that it has started are killed, and the next question starts a new one (RewardError if it
    cannot). `timeouts` counts the questions without an answer: log it, each was graded wrong."""

    def __init__(self, name: str, command: list[str], timeout_s: float, environment: dict[str, str] | None = None) -> None:
        self.name = name
        self.command = [sys.executable, "-P", __file__, *command]
        self.timeout_s = timeout_s
        self.environment = environment
        self.timeouts = 0
        self._process = None

    def close(self, *_: object) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()  # waits for its end and closes both pipes
            self._process = None

    __exit__ = close

    def start(self) -> None:
        """Start the child unless it runs."""
        if self._process is not None:
            return
        # A session of its own: signals to our group are for us. When we end, so does its input.
        self._process = Popen(self.command, bufsize=0, stdin=PIPE, stdout=PIPE, env=self.environment, start_new_session=True)
        if self._process.stdout.readline() != b"ready\n":
            self.close()
            raise RewardError(f"{self.name}: its process did not start, the error is above")

    def ask(self, question: object, limit_s: float | None = None) -> object:
        """Its answer to something JSON can hold. None if there is none in time, and counted."""
        self.start()
        answer = b""
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            if wait([self._process.stdout], self.timeout_s if limit_s is None else limit_s):
                answer = self._process.stdout.readline()
        if not answer:
            self.timeouts += 1
            self.close()
        return json.loads(answer or b"null")


class MathWorker(Child):
    """math-verify in a child process; it takes about 1 s to start. memory_bytes is its address space (sympy takes 150 MB)."""

    def __init__(self, timeout_s: float = 5.0, memory_bytes: int = 1024**3) -> None:
        # Not in this process: math-verify's signal.alarm fails off the main thread, and a power tower never ends.
        # What it needs to find its packages, and no tokens or keys: it reads what a model wrote.
        names = ("HOME", "LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "PYTHONPATH", "PYTHONUSERBASE")
        environment = {name: os.environ[name] for name in names if name in os.environ}
        environment["PYTHONHASHSEED"] = "0"  # the order in which sympy tries its rules, and so the time it takes
        super().__init__("math-verify", ["math", str(memory_bytes)], timeout_s, environment)

    def equal(self, gold: str, prediction: str, limit_s: float | None = None) -> bool:
        """math-verify's verdict on two LaTeX expressions without delimiters. False if there is none in time, and counted."""
        return self.ask([gold, prediction], limit_s) is True

    def reward(self, response: str, problem: object) -> float:
        """1 if the response's final answer is the problem's, else 0."""
        return float(is_correct(response, problem.answer, self))


class UserReward(Child):
    """A function of yours as the reward, named FILE:FUNCTION, in a child process. What it prints goes to standard error. It is
    called with (response, row) and returns a number in [0, 1]. row is the problem's line of the data as a dict, with its own
    fields. RewardError if there is no such function. A call longer than timeout_s pays 0, and the file is read again."""

    def __init__(self, name: str, timeout_s: float) -> None:
        file, _, function = name.rpartition(":")
        if not os.path.isfile(file):
            raise RewardError(f"--reward {name}: expected FILE.py:FUNCTION, with a file that exists")
        super().__init__(f"--reward {name}", ["reward", file, function], timeout_s)
        self.start()

    def reward(self, response: str, problem: object) -> float:
        """What the function pays. RewardError if it does not return a number in [0, 1]."""
        answer = self.ask([response, problem.to_row()])
        if isinstance(answer, str):
            raise RewardError(f"{self.name}: row {problem.id!r}: {answer}")
        return answer or 0.0


def grader_of(reward: str, timeout_s: float) -> MathWorker | UserReward:
    """What --reward names, or math-verify for "". Both have `reward(response, problem)` and `timeouts`."""
    return UserReward(reward, timeout_s) if reward else MathWorker(timeout_s)


def _serve_reward(file: str, function: str) -> None:
    """Answer each [response, row] with the function's number, or with a text: what it raised."""
    questions, answers, parent = os.fdopen(os.dup(0)), os.dup(1), os.getppid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # whatever the function starts must not read our questions,
    os.dup2(2, 1)  # nor answer them

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.killpg(0, signal.SIGKILL)  # and whatever the function has started

    Thread(target=end_with_parent, daemon=True).start()
    folder, name = os.path.split(os.path.abspath(file))
    sys.path = [folder, *sys.path, os.path.dirname(__file__)]
    name = name.removesuffix(".py").replace(".", "_")  # my.reward.py is in no package
    spec = importlib.util.spec_from_file_location(name, file)  # by its path: it may be called json.py
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(name, module)  # a pool of processes finds it by its name
    spec.loader.exec_module(module)
    reward = getattr(module, function, None) or sys.exit(f"{file}: it has no {function!r}")
    os.write(answers, b"ready\n")
    for line in questions:
        try:
            answer = float(reward(*json.loads(line)))
            answer = answer if 0 <= answer <= 1 else f"returned {answer}, which is not in [0, 1]"
        except BaseException as error:  # sys.exit too
            sys.excepthook(*sys.exc_info())
            answer = f"{type(error).__name__}: {error}"[:1000]
        os.write(answers, json.dumps(answer).encode() + b"\n")


def _serve_math(memory_bytes: str) -> None:
    """Answer each [gold, prediction] with true or false, until standard input ends."""
    from latex2sympy2_extended.math_normalization import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    # No search for boxes: it merges all boxes into a set. No removal of units: it takes the m of 6m for metres.
    config = [LatexExtractionConfig(normalization_config=NormalizationConfig(malformed_operators=True, boxed="none"))]

    def equal(*texts: str) -> bool:
        g, p = (parse(f"${text}$", config, fallback_mode="no_fallback", parsing_timeout=None) for text in texts)
        # 60 digits: its defaults, 6 and 15, drop 10^{-20} and take 3e-9 pi for 5e-9 pi.
        if not (g and p and verify(g, p, float_rounding=60, numeric_precision=60, timeout_seconds=None)):
            return False
        # They are 60 places, in which 2^{-2005} and 2^{-2006} are both 0: sympy must not find that they differ.
        return g[0].equals(p[0]) is not False

    sys.stdout = sys.stderr = open(os.devnull, "w")  # what the parser says about bad texts is no verdict
    # One comparison loads what sympy and antlr import late, so that the first question does not wait for it.
    equal(r"\sin^2 x + \frac{x}{2}", r"1 - \cos^2 x + 0.5x")
    for limit, most in ((resource.RLIMIT_AS, int(memory_bytes)), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (most, most))
    os.write(1, b"ready\n")
    for line in sys.stdin.buffer:
        signal.alarm(600)  # its default action is death: if the parent is gone, no power tower outlives it for long
        try:
            verdict = equal(*json.loads(line))
        except MemoryError:
            os._exit(1)  # sympy's caches may hold the memory: only a fresh process gets it back
        except Exception:  # whatever sympy raises on text that a model made up, it is not the answer
            verdict = False
        signal.alarm(0)
        os.write(1, b"true\n" if verdict else b"false\n")


_SYMBOLS = str.maketrans({
    "−": "-", "×": r"\times ", "·": r"\cdot ", "π": r"\pi ", "≈": r"\approx ", "∈": r"\in ", "≠": r"\ne ",
    "≤": "<=", "≥": ">=", "∪": r"\cup ", "∞": r"\infty ", "∅": r"\emptyset ",
    "\u00a0": r"\,", "\u2009": r"\,", "\u202f": r"\,",  # spaces that do not break, thin ones
})  # fmt: skip
# Applied in this order. Each brings several spellings of a thing to one.
_REWRITES = [
    (r"(?<!\\)\$(.*?)(?<!\\)\$", r"\1"),  # $3$ or $4$; a dollar sign without a partner is money
    (r"(?<!\\)\\\\(?=(?:[dtc]?frac|sqrt|pi|text|displaystyle)(?![A-Za-z]))", r"\\"),  # escaped twice: \\frac{1}{2}
    (r"\.(?: ?\.)+|\\[lc]dots\b|…", r"\\dots "),
    (r"(?<![0-9])(?<![0-9] )[‐‑–—]", "-"),  # dashes for minus; 5–6 is a range
    (r"(?<=[0-9])(?:\{,\}|,?\\!|\\[,;: ]|~) ?(?=[0-9]{3}(?![0-9]))", ","),  # 10{,}000 10,\!000 10\,000
    (r"\\(?:left|right)\b\.?|\\(?:[bB]igg?[lrm]?|displaystyle)\b|(?<!\\)\\!", ""),
    (r"(?<!\\)\\[,;: ]|~|\\q?quad\b", " "),
    (r"\\(?:mbox|(?:text|math)(?:bf|rm|it|normal|sf))\b ?\{", r"\\text{"),
    (r",? ?\\text\{ ?,?(?:and|or) ?\}|,? (?:and|or) ", ", "),  # x = 1 or x = -2, \text{ or } too: a list
    (r" ?(?:\\?%|\\text\{ ?per ?cent\}|per ?cent\b)", "%"),
    (r" ?(?:\^ ?\{? ?\\circ ?\}?|\\text\{ ?degrees?\}|degrees?\b)", "°"),
    (r"\\l(?:t|(e)q*(?:slant)?)\b", lambda x: "<=" if x[1] else "<"),  # \lt, \le, \leq, \leqslant
    (r"\\g(?:t|(e)q*(?:slant)?)\b", lambda x: ">=" if x[1] else ">"),
    (r"(?<![\\A-Za-z])(?:oo|inf(?:inity)?)\b", r"\\infty "),
    (r"(?<=[)\]]) ?U ?(?=[(\[])", r" \\cup "),
    (r"\\varnothing\b|\\\{ ?\\\}", r"\\emptyset "),
    # An option of a multiple choice with its text: (B) 12, B. 12. Not (B)^2, (B) + 2 or the ratio A: B.
    (r"^\\text ?\{ ?(\(?[A-H][).:] [^{}]*)\}$", r"\1"),
    (r"^(?:\\text ?\{ ?)?\(?([A-H])[).:]+(?: *\} *| +)(?![*/^_=+,.;]|[A-H]\b)(.+)$", r"option_\1 = \2"),
    (r"^\(([a-z]), ?([a-z])\) ?= ?\(([^,()]+),([^,()]+)\)$", r"\1 = \3, \2 = \4"),  # (x, y) = (1, 4)
    (r"^\\\{ ?([a-z]) ?(?:\\in ?\\mathbb\{R\})? ?(?:\\mid\b|[|:])(.*(?:\1 ?[<>]|[<>=] ?\1).*)\\\}$", r"\2"),  # {x | x > 3}
    # A system, in an array after a brace as well, is a list. What has further columns is a function by cases.
    (r"\\(?:\{ ?\\begin\{\w+|begin\{(?:cases|aligned))\} ?(?:\{[lcr| ]*\})?((?:[^&]|&=)*?)\\end\{\w+\}",
     lambda x: x[1].replace("&", "").replace(r"\\", ", ")),
    (r"(?:√|(?<![A-Za-z\\])sqrt) ?(?:\(([^()]*)\)|([0-9]+|[a-z]))", r"\\sqrt{\1\2}"),  # √13, sqrt(13)
    (r"\\[dtc]?frac(?![A-Za-z])", r"\\frac"),  # \dfrac38 too
    (r"\\frac ?([0-9])", r"\\frac{\1}"),  # \frac43, \frac9{19}
    (r"\\frac ?(\{(?:[^{}]|\{[^{}]*\})*\}) ?([0-9a-z])", r"\\frac\1{\2}"),  # \frac{14}3
    (r"(?<=\S) ?\(? ?\\approx.*", ""),  # \frac{1}{3} \approx 0.333: the exact part is the answer
    (r"^([+-]?) ?\\?\$ ?(.+?) *$", r"\1\2\\text{ dollars}"),
]
_BRACKET = r"(\\begin\b|\\\{|[(\[{])|(\\end\b|\\\}|[)\]}])"  # what opens, what closes: half-open intervals pair freely


def normalise_answer(answer: str) -> str:
    r"""A reference answer without its data set's clothes: outer blanks, $...$, \( \), a \boxed{} or {} around the whole."""
    answer = " ".join(_undress(answer).split())
    if listed := re.fullmatch(r"""\[ ?(["'])([^"']+)\1 ?\]""", answer):  # ["34"], ['\\frac{1}{2}']
        answer = _undress(listed[2].replace(r"\\", "\\"))
    while (boxed := re.fullmatch(r"(?:\\boxed ?)?\{(.*)\}", answer)) and _split(boxed[1], ","):
        answer = _undress(boxed[1])
    return answer


@lru_cache(4096)  # a reference is compared with every response to its problem
def _clean(text: str) -> str:
    """One notation for an answer: no delimiters, no spacing commands, one name per symbol. The meaning stays."""
    text = normalise_answer(text.translate(_SYMBOLS))
    for pattern, replacement in _REWRITES:
        text = re.sub(pattern, replacement, text)
    return text.strip().rstrip(" .,;:\\")


def _split(text: str, separators: str) -> list[str]:
    """[part, separator, part, ...], cut at matches outside all brackets; [] if a bracket has no partner or is deeper than 8."""
    cuts, depth, last = [], 0, 0
    for token in re.finditer(rf"{_BRACKET}|({separators})|\\.", text):
        depth += bool(token[1]) - bool(token[2])
        if not 0 <= depth <= 8:  # each level doubles the time that math-verify needs
            return []
        if token[3] and not depth:
            cuts += [text[last : token.start()].strip(), token[3]]
            last = token.end()
    return [*cuts, text[last:].strip()] if not depth else []


def _key(text: str) -> str:
    """A cleaned answer for string comparison: unwrapped text, no blanks but between digits, words in lower case."""
    text = re.sub(r"\\text ?\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"([\^_])\{(\w)\}", r"\1\2", text)  # x_{1} and x_1
    text = re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", text).removeprefix("+")
    text = re.sub(r"^\(?([A-Z])\)?$", r"\1", text)  # (C), \text{(C)} and C
    # Single letters and pairs keep their case, because they may be symbols (n and N, AB and ab). "No" is a word.
    return text.casefold() if re.fullmatch(r"(?i)[^\\]*[a-z]{3}[^\\]*|no", text) else text


_DECIMAL = r"(?=\.?[0-9])(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]*)(?:\.[0-9]*)?"
_NUMBER = re.compile(rf"([+-]?) ?(?:([0-9]+) )?([+-]?{_DECIMAL}(?:[eE][+-]?[0-9]{{1,3}})?)(?: ?/ ?([+-]?{_DECIMAL}))?")


def _number(text: str) -> Fraction | None:
    r"""The value of 1,234.50, 045, a/b, \frac{a}{b}, 1 4/5, 1\frac{4}{5}, 2.5 \times 10^{-3} or 2.5e-3; None for all else."""
    text = re.sub(r" ?\\frac ?\{([^{} ]+)\} ?\{([^{} ]+)\}$", r" \1/\2", text).strip()
    text = re.sub(r"(?<=[0-9.]) ?(?:\\times|\\cdot|\*) ?10 ?\^ ?(?:\{([+-]?[0-9]{1,3})\}|([0-9]))$", r"e\1\2", text)
    if repeating := re.fullmatch(r"([+-]?)([0-9]*)\.([0-9]*)\\(?:overline|bar|dot) ?\{?([0-9]+)\}?", text):
        sign, whole, start, period = repeating.groups()  # 0.1\overline{6} is (16 - 1) / 90
        top = int(whole + start + period) - int(whole + start or 0)
        text = f"{sign}{top}/{'9' * len(period)}{'0' * len(start)}"
    if not (match := _NUMBER.fullmatch(text)):
        return None
    sign, whole, *ratio = match.groups()
    top, bottom = (Fraction((part or "1").replace(",", "")) for part in ratio)
    # Two numbers next to each other are a mixed number only by convention: no convention covers 2\frac{3}{2}.
    if bottom == 0 or (whole and not 0 < top < bottom):
        return None
    return (-1 if sign == "-" else 1) * (int(whole or 0) + top / bottom)


_FUNCTION = r"(?:log|ln|lg|exp|sqrt|(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?)"
# What is measured or counted: a short unit or a plural, with one word before it ("square inches"). "2 abc" has variables.
_MEASURE = (
    r"(?:[A-Za-z][a-z]*\.? )?(?:[cmk]m|in|ft|kg|(?:lb|hr|min|sec)s?|mph|feet|foot|inch|pint|yuan|USD|[A-Za-z]?[a-z]{3,}s"
    r"|people|(?:wo)?men|children|mile|meter|hour|minute|day|week|year|dollar|unit)"
    r"(?:(?: ?/ ?| per | of )[a-z]+| old)?\.?"
)
# Not if it changes the number: 5 million dollars, 3 tenths, 5 half hours, 3 times, 10 minus dollars.
_UNIT = re.compile(
    r"(?!.*(?:illion|thousand|hundred|dozen|score|gross|hal[fv]|third|quarter|basis|\btens|(?:[rfx]|en|eigh|nin|tie)th"
    r"|\b(?:times|plus|minus|less|unless|versus|if|not|to|over|mod)\b))(.*[^-+*/=^_<>(, ]) ?"
    r"([%°]|(?<=[0-9])_(?:[0-9]|\{[0-9]+\})"
    rf"|(?:\\text ?\{{ ?(?:[mg]|{_MEASURE}) ?\}}|(?<=[0-9}}] ){_MEASURE})(?:\^ ?\{{?[23]\}}?)?)"
)


def _split_unit(text: str) -> tuple[str, str]:
    r"""(the answer without its unit, the unit): "" for none, "%", "°", "_8" for a base, else words."""
    match = _UNIT.fullmatch(text)
    # 2\pi meters may be a product, x^2_1 has no base, and \sin 30° and \pi° are other numbers without the sign.
    if not match or (_number(match[1]) is None and match[2][0] not in "%\\"):
        return text, ""
    return match[1], re.sub(r"\\text|[^A-Za-z0-9_%°]", "", match[2]).lower().removesuffix("s")


def is_correct(response: str, answer: str, worker: MathWorker) -> bool:
    """The reward: whether the response's final answer equals `answer` (as load_problems returns it)."""
    prediction = extract_answer(response)
    return prediction is not None and same_answer(prediction, answer, worker)


def same_answer(prediction: str, answer: str, worker: MathWorker) -> bool:
    r"""Whether two answers are the same, the second being the reference. Our decisions, all in the tests' table:
      numbers    exact: 0.333333 is not 1/3. Words are equal up to case, blanks and \text, never parsed
      percent    for 50%: 50%, 50, 0.5. For 50: 50%. For 0.5: 50% but not 0.5%, as below 1 the sign decides the size
      units      ignored if one side has none, else the same: no conversion. A base (52_8) may be left out, never added
      lists      bare lists, {...} and unions have no order, "or" is a comma; tuples, intervals and lists of words have one
      names      a value belongs to its name: x = 1, y = 2 is y = 2, x = 1, and (1, 2), in the order of the alphabet
      relations  x = 7 equals 7, x > 3 its interval; others go side by side. 1/2 = 0.5 pays for 0.5: every side is right
      options    B pays for (B) 12 and the other way round; a text is compared if both have one
    """
    if max(len(prediction), len(answer)) > MAX_ANSWER:
        return False
    gold, prediction = _clean(answer), _clean(prediction)
    if not (_split(gold, ",") and _split(prediction, ",")):  # brackets without a partner
        return False
    if (stated := _QUANTITY.fullmatch(gold)) and "=" not in prediction:
        gold = stated[1]
    worker.start()  # this takes a second, which is not on the clock
    deadline = time.monotonic() + worker.timeout_s  # of all questions about one answer: two lists of ten items ask a hundred

    def ask(g: str, p: str) -> bool:
        left_s = deadline - time.monotonic()
        return left_s > 0 and worker.equal(g, p, left_s)

    return _same(gold, prediction, ask)


# What must not follow an option's letter if the other side is a letter only: another letter, and words that take it back.
_HEDGE = re.compile(r"(?<![A-Za-z\\])[A-H](?![A-Za-z])|\b(?:not?|isn|is|was|if|but|else|wait|maybe|wrong|false|incorrect)\b")
# A reference such as |z| = 5 or \cos A = \frac{1}{2} is answered by its number. Not x + y = 5 and y^2 = 4x: these are curves.
_QUANTITY = re.compile(r"(?=[^=]*[\\|])[^=<>+^,-]+=((?:\\text ?\{[^{}]*\}|\\(?!text)[A-Za-z]+|\\[{}]|[^=<>A-Za-z\\])+)")


def _same(gold: str, prediction: str, ask: Callable) -> bool:
    """Two cleaned answers, taken apart level by level. `ask` judges single expressions."""
    if not gold or not prediction:  # an empty side of "="
        return False
    if _key(gold) == _key(prediction):
        return True
    for letter, option in ((gold, prediction), (prediction, gold)):
        if option.startswith(f"option_{_key(letter)} = "):
            return not _HEDGE.search(option[9:])
    (g_names, gold), (p_names, prediction) = _named(gold), _named(prediction)
    if g_names and p_names and g_names != p_names:
        return False
    (kind, g_items), (p_kind, p_items) = _structure(gold), _structure(prediction)
    if {kind, p_kind} == {"list", "()"} and len(g_names or p_names) > 1 and "=" not in gold + prediction:
        kind = p_kind = "()"  # 2, 5 for p = 2, q = 5
    if kind == p_kind == "item":
        return _same_item(g_items[0], p_items[0], ask)
    if {kind, p_kind} == {"item", "="}:  # 1/2 = 0.5 for 0.5
        return all(_same(g, p, ask) for g in g_items for p in p_items)
    if kind != p_kind or len(g_items) != len(p_items):
        return False
    ordered = kind not in ("list", r"\cup") or all(map(_WORDS.search, g_items))
    for g in g_items:  # each takes one of the prediction's, the first one if the order counts
        match = next((p for p in p_items[: 1 if ordered else None] if _same(g, p, ask)), None)
        if match is None:
            return False
        p_items.remove(match)
    return True


# x, f^{-1}(x), S_{\triangle ABC}, \angle A, \frac{AB}{CD}. Not \log_2(x): \log_2(x) = 3 has not been solved for x.
_NAME = (
    rf"(?:\\text ?\{{(?!not\b)[A-Za-z]+\}}|\\?(?!(?:pi|abs|not|{_FUNCTION})(?![A-Za-z]))[A-Za-z]+"
    r"(?:(?:\{[A-Z]{2,}\}){1,2}|\{[a-z]\}| [A-Z]+\b)?)(?:_(?:\{[^{}]*\}|\w))?'?(?:\^\{-1\})?(?:\([^()=+]*\))?"
)
# x = ..., (x, y) = ..., x \in ..., 3 < x <= 5, x > 3, 3 < x. Not SRAC = LRAC or A = C: LRAC or C does not answer them.
_NAMED = re.compile(
    rf"({_NAME}|\({_NAME}(?:, ?{_NAME})+\)) ?"
    r"(?:(?<=option_\w )=|(?:=|\\in\b)(?! ?(?:\\text ?\{)?[( ]*(?:[A-E]|[A-Za-z]{2,})[) ]*\}?$)) ?(.+)"
    rf"|(?:([^<>=]+?) *([<>]=?) *)??({_NAME})(?: *([<>]=?) *([^<>=]+))?"
)


def _named(text: str) -> tuple[list[str], str]:
    """(names, values): (["x", "y"], "(1, 4)") for y = 4, x = 1, (["x"], "(3, 5]") for 3 < x <= 5, ([], text) without."""
    pairs = []
    for item in _items(text):
        match = _NAMED.fullmatch(item)
        if not match or (not match[1] and ("<" in item) == (">" in item)):  # a name alone, or 3 < x > 5
            return [], text
        name, value, low, left, bounded, right, high = match.groups("")
        if ">" in left + right:
            low, left, right, high = high, right, left, low
        if bounded:
            value = ("[" if "=" in left else "(") + (low or r"-\infty") + ", "
            value += (high or r"\infty") + ("]" if "=" in right else ")")
        pairs.append((_key(name or bounded), value))
    names = sorted(dict(pairs))
    solutions = [dict(pairs[i : i + len(names)]) for i in range(0, len(pairs), len(names))]
    if any(sorted(solution) != names for solution in solutions):
        return [], text
    rows = [", ".join(map(solution.get, names)) for solution in solutions]
    if len(names) > 1:
        rows = [f"({row})" for row in rows]
    return names, (r" \cup " if "<" in text or ">" in text else ", ").join(rows)  # of intervals, the union


# What only a string comparison can judge: text, words, names of points (AB is not BA), times and ratios, dots
_WORDS = re.compile(r"\\text|(?<![\\A-Za-z])(?:[A-Za-z]{4}|[a-z]{0,2}[A-Z][A-Za-z]|[a-z]{1,2}[A-Z])|:|\.\.|\\\w?dots|^[A-Z]$")


def _items(text: str) -> list[str]:
    """The items of a bare list or of {...}."""
    value = re.sub(rf"^{_NAME} ?= ?", "", text)
    if _number(_split_unit(value)[0]) is not None:  # 1,234 is not a list
        return [text]
    if (braces := re.fullmatch(r"\\\{(?! ?\\emptyset)(.+)\\\}", text)) and _split(braces[1], ","):
        return _items(braces[1].strip())
    return _parts(text) or [text]


def _parts(text: str) -> list[str]:
    """What is between commas; one too many is none."""
    return [part for part in _split(text, "[,;]")[::2] if part]


_MATRIX = re.compile(r"[(\[]? ?\\begin\{(?:array|[pbB]?matrix)\} ?(?:\{[lcr| ]*\})?(.*?)(?:\\\\ ?)?\\end\{\w+\} ?[)\]]?")


def _structure(text: str) -> tuple[str, list[str]]:
    """(kind, parts) of values: "item", "list", brackets such as "(]", a matrix with its separators, or a sign such as "="."""
    items = _items(text)
    if len(items) > 1:
        return "list", items
    text = items[0]  # 5 of \{5\}
    if text[0] in "([" and text[-1] in ")]" and len(items := _parts(text[1:-1])) > 1:
        return text[0] + text[-1], items
    if cells := _MATRIX.fullmatch(text):
        parts = _split(cells[1], r"&|\\\\")
        return "matrix" + "".join(parts[1::2]), parts[::2]
    parts = _split(text, r"[<>]=?|=|\\(?:neq?|cup)\b") or [text]
    signs = parts[1::2] or ["item"]
    return signs[0] if len(set(signs)) == 1 else " ".join(signs), parts[::2]


# math-verify is asked only about plain expressions in these characters and commands. It reads 7"8 as 78 and \phantom{7} as 7,
# of (8 = 7) it takes the last side, and sums, integrals and limits, which are no final answers, can take for ever.
_PLAIN = re.compile(
    rf"(?:[A-Za-z0-9 +*/^_(){{}}\[\]!|.-]|\\(?:{_FUNCTION}|frac|binom|cdot|times|div|pi|[lr]floor|[lr]ceil|alpha|beta|[gG]amma"
    r"|[dD]elta|epsilon|zeta|eta|[tT]heta|kappa|[lL]ambda|mu|nu|xi|rho|[sS]igma|tau|[pP]hi|chi|[pP]si|[oO]mega)(?![A-Za-z]))*"
)
# Even of these it misreads !! and adds up or cuts off 2 3, 1.2.3, 7 .5, 52_8, 1e-5, 2\frac{3}{2}, {2}{3}, 2[3].
_MISREAD = re.compile(
    rf"{_WORDS.pattern}|!!|[0-9)}}\]] \.|[0-9] [0-9]|\.[0-9]*\.|[0-9)}}] ?_|[0-9]e[-+0-9]|(?<!\\sqrt)(?<!\\sqrt )\["
    r"|(?<![\^_0-9.])[0-9.]+ ?\\frac ?\{[0-9]+\} ?\{[0-9]+\}|\\frac ?\{[0-9]+\} ?\{[0-9]+\} ?(?:\\frac|\{)"
    r"|(?:^|[-+*/({|!)]|(?<![\^_])[0-9]) ?\{|[0-9]{5} ?!|\^ ?\{?-?[0-9]{6}"
)
_EXACT = [
    # A number before "(", or ")" or a fraction before "(" or a digit: of 2(3), (2)(3) and \frac{2}{1}(3) it would make 5.
    (r"((?<![0-9.^_{A-Za-z])[0-9]+(?:\.[0-9]+)?(?= ?\()|(?:\)|\\frac ?\{[0-9]+\} ?\{[0-9]+\})(?= ?[(0-9])) ?", r"\1 \\cdot "),
    # It would compute decimals with 15 digits, and take 2.5 + 10^{-17} for 2.5.
    (r"([0-9]+)\.([0-9]+)", lambda x: rf"\frac{{{x[1] + x[2]}}}{{1{'0' * len(x[2])}}}"),
]


def _same_item(gold: str, prediction: str, ask: Callable) -> bool:
    """Two values or expressions. math-verify is not asked if it may misread one of them."""
    (gold, g_unit), (prediction, p_unit) = _split_unit(gold), _split_unit(prediction)
    a, b = _number(gold), _number(prediction)
    numbers = a is not None and b is not None
    if g_unit != p_unit:
        if (g_unit and p_unit) or p_unit.startswith("_"):  # cents for dollars; a base out of nowhere
            return False
        if g_unit == "%":
            return numbers and b in (a, a / 100)
        if p_unit == "%":
            return numbers and (b / 100 == a or (b == a and abs(a) > 1))
    if numbers:
        return a == b
    if _key(gold) == _key(prediction):
        return True
    if not all(_PLAIN.fullmatch(text) and not _MISREAD.search(text) for text in (gold, prediction)):
        return False
    # N and n, \Delta and \delta would become one symbol. A variable that the reference lacks can only cancel out: "n o t 0".
    g, p = (set(re.findall(r"\\[A-Za-z]+|[A-Za-z]", text)) for text in (gold, prediction))
    strange = {symbol for symbol in p - g if len(symbol) == 1} - {"e", "i"}
    if strange or len({symbol.lower() for symbol in g | p}) < len(g | p):
        return False
    for pattern, replacement in _EXACT:
        gold = re.sub(pattern, replacement, gold)
        prediction = re.sub(pattern, replacement, prediction)
    return ask(gold, prediction)


# What data sets write if there is no answer to compare with, as _key leaves it.
_PLACEHOLDER = re.compile(
    r"\W*|\\dots|\W?(?:n/?a|nan|none|null|nil)\W?|(?:see|referto|asshown|asabove).*|(?:the)?(?:proof|prove|answer|solution)[a-z]*"
    r"|not(?:found|available|applicable|given|provided|known)|no(?:answer|proof)[a-z]*|unknown|missing|omitted|tbd|todo", re.I
)  # fmt: skip


def why_unusable(answer: str) -> str:
    """Why no prediction could match this reference, "" if one can."""
    text = _clean(answer)
    # What math-verify cannot read (L_{\odot}) still matches when it is written the same way, if it is whole.
    torn = r"^[*/^_=]|[-+*/^_=\\]$|(?<!\\)\{\s*\}|\\(?:frac|sqrt)\s*$"
    reasons = {
        "is empty": not text,
        "is a list of texts in quotes": re.match(r"""\[ ?["']""", text),
        f"has {len(answer)} characters, more than {MAX_ANSWER}": len(answer) > MAX_ANSWER,
        "has unbalanced brackets": not _split(text, ","),
        "is prose": len(re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", text)) > 5,
        "says that there is none": _PLACEHOLDER.fullmatch(_key(text).strip(".")),
        "cannot be read as numbers, an expression or a few words": re.search(torn, text),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


if __name__ == "__main__":  # in a child process
    serve = {"math": _serve_math, "reward": _serve_reward}[sys.argv[1]]
    serve(*sys.argv[2:])
