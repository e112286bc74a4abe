r"""Strategies: the record, its text form, a tolerant reader, every prompt that contains one, the leak filter, the choice.

A strategy describes how to solve a KIND of problem: its type, a solving strategy and general steps, without any
computation and without the answer (SGPO, arXiv 2606.24064). What the prompts ask a strong model for and the four criteria
are the paper's [app B, tab 4, tab 5]; every wording, the text form and the leak filter are ours.

What this is not: it calls no model and no server. The program that does is tools/extract.py, and this file starts it:

    python strategy.py --data problems.jsonl --endpoint URL --model NAME --out strategies.jsonl

As a module it is the standard library only, with no sibling imported: this file can be copied into another project
alone. For a look:

    python -c "import strategy as s; print(s.guided_messages('1+2?', s.Strategy('sum', 'Add.', ('Add.',))))"

The trap that shapes the prompts: the guided and the unguided policy score the SAME response tokens, so whatever stands
right before the response must be the same on both sides. Both prompts are therefore one user message that closes with
the untouched problem and INSTRUCTION; the guided one opens with a block more [§3.1] and differs by nothing else. With
two closings, the first response token would differ for reasons of template, and the divergence there would measure that.
"""

import random
import re
import statistics
import sys
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from string import ascii_lowercase

INSTRUCTION = r"Reason step by step and put the final answer in \boxed{}."
# Few and plain words: the tiny world's vocabulary of about 100 words has to hold them as well.
GUIDE = "Follow this strategy."
CRITERIA = ("type", "strategy", "steps", "no_leak")  # [tab 5]; each is scored from 0.0 to 1.0
LEAK_SCORE = 0.2  # [ours] up to this score on no_leak a candidate is out, because scoring_prompt says what such a score means

# What models call the three parts. Compared in lower case with "_" read as a space.
LABELS = {
    "type": ("problem type", "type of problem", "type"),
    "strategy": ("strategy", "solving strategy", "solution strategy", "general strategy", "approach"),
    "steps": ("steps", "general steps", "solution steps", "plan"),
}
PART_OF = {label: part for part, labels in LABELS.items() for label in labels}

# A label, then ":", a spaced dash, or the end of the line (a heading). Emphasis may close before or after the separator.
# Underscores are matched too, for YAML's problem_type.
_LABEL = "(" + "|".join(sorted((re.escape(x).replace(r"\ ", "[ _]") for x in PART_OF), key=len, reverse=True)) + ")"
_LABELLED = _LABEL + r"[*_\]]*\s*(?::|\s[-–—]\s|$)\s*(?:\*\*|__)?\s*"
# Before a label: quote marks, heading marks, bullets, a number, emphasis, an opening bracket.
_PART_LINE = re.compile(r"[>#\s]*(?:[-*+•]\s+|\d+[.)]\s+)?[*_\[]*" + _LABELLED + "(.*)", re.IGNORECASE)
_RULE_LINE = re.compile(r"\s*(?:`{3,}.*|~{3,}.*|[-*_=]{3,})\s*")  # code fence, rule
# An indent, a mark, the text. The mark is a number ("Step 2:" too), the letter of "(a)" or "a.", or a bullet, bold or not.
_ITEM = re.compile(
    r"(?P<indent>\s*)(?:(?:\*\*|__)?(?:step\s+)?\(?(?P<number>\d{1,2})(?:\s*[.):](?:\*\*|__)?(?=\s|[^\d\s])|\s+[-–—]\s)"
    r"|(?:\*\*|__)?\(?(?P<letter>[a-z])[.)](?:\*\*|__)?\s|(?P<bullet>[-*+•])\s)\s*(?P<text>.*)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Strategy:
    """One strategy. Every text is a single non-empty line without outer blanks, and there is at least one step.

    One line a text is what makes the text form reversible: a text with line breaks could imitate the next label.
    Raises ValueError naming the field and the value.
    """

    type: str
    strategy: str
    steps: tuple[str, ...]

    def __post_init__(self):
        _check_line("type", self.type)
        _check_line("strategy", self.strategy)
        if not isinstance(self.steps, tuple) or not self.steps:
            raise ValueError(f"strategy field 'steps': expected a tuple of at least one step, got {self.steps!r}")
        for i, step in enumerate(self.steps):
            _check_line(f"steps[{i}]", step)

    @classmethod
    def from_dict(cls, data):
        """The Strategy in {"type": str, "strategy": str, "steps": [str, ...]}; ValueError for anything else."""
        if not isinstance(data, Mapping):
            raise ValueError(f"strategy: expected an object with type, strategy and steps, got {data!r}")
        for key in ("type", "strategy", "steps"):
            if key not in data:
                raise ValueError(f"strategy field {key!r}: missing in {dict(data)!r}")
        unknown = [key for key in data if key not in ("type", "strategy", "steps")]
        if unknown:
            raise ValueError(f"strategy field {unknown[0]!r}: unknown, with value {data[unknown[0]]!r}")
        steps = data["steps"]
        if not isinstance(steps, list | tuple):  # a str would otherwise become one step a character
            raise ValueError(f"strategy field 'steps': expected a list of strings, got {steps!r}")
        return cls(data["type"], data["strategy"], tuple(steps))

    def to_dict(self):
        """The inverse of from_dict, ready for json."""
        return {"type": self.type, "strategy": self.strategy, "steps": list(self.steps)}


def _check_line(field, value):
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"strategy field {field!r}: expected a non-empty string, got {value!r}")
    if value != value.strip() or len(value.splitlines()) != 1:
        raise ValueError(f"strategy field {field!r}: expected one line without outer blanks, got {value!r}")


def format_strategy(strategy):
    """The text of a Strategy as it stands in a prompt. parse_strategy(format_strategy(s)) == s for every s."""
    steps = "\n".join(f"{i}. {step}" for i, step in enumerate(strategy.steps, start=1))
    return f"Problem type: {strategy.type}\nStrategy: {strategy.strategy}\nSteps:\n{steps}"


# ---------------------------------------------------------------------------------------------- reading a reply

def parse_strategy(text):
    """The Strategy in a model's reply.

    text: the whole reply. A text exactly in format_strategy's form is read back letter by letter. Everything else is
    read with tolerance: thoughts in <think> tags, code fences, Markdown headings, bold, bullets, "(a)", "1)" and
    "Step 1:" are understood, and talk before the first part or, after a blank line, after the last step is dropped.
    Raises ValueError if a part is missing or given twice, if steps are out of order, or if talk and content cannot be
    told apart: a wrong strategy costs more than a lost candidate, because others are sampled for the same problem.
    """
    if not isinstance(text, str):
        raise ValueError(f"strategy reply: expected a string, got {text!r}")
    exact = _parse_exact(text.strip())
    if exact is not None:
        return exact
    text = drop_thoughts(text)
    parts = _text_parts(text)
    missing = [LABELS[part][0] for part in LABELS if not parts.get(part)]
    if missing:
        raise ValueError(f"strategy reply: no {', no '.join(missing)} in {_short(text)}")
    return Strategy.from_dict(parts)


def _parse_exact(text):
    """The Strategy of a text in exactly our own form, else None. Nothing is cleaned: this is the reversible path."""
    lines = text.split("\n")
    heads = ["Problem type: ", "Strategy: ", "Steps:"] + [f"{i}. " for i in range(1, len(lines) - 2)]
    if len(lines) < 4 or lines[2] != "Steps:" or not all(map(str.startswith, lines, heads)):
        return None
    values = [line[len(head):] for line, head in zip(lines, heads, strict=True)]
    try:
        return Strategy(values[0], values[1], tuple(values[3:]))
    except ValueError:  # an empty value or stray blanks: the tolerant reader either mends it or says what is wrong
        return None


def drop_thoughts(text):
    """The reply without what a reasoning model thought before it; ValueError where the thoughts never end."""
    text = text.rpartition("</think>")[2]  # by the end alone: some chat templates open the tag in the prompt
    if "<think>" in text:
        raise ValueError(f"strategy reply: it ends inside <think>: {_short(text)}")
    return text


def _text_parts(text):
    """Cut the text at its labels. Returns {part: value}, without the parts that are missing or empty."""
    bodies = []  # (part, lines), in the order of the text
    for line in text.splitlines():
        if _RULE_LINE.fullmatch(line):
            line = ""
        label = _PART_LINE.fullmatch(line)
        if label:
            bodies.append((PART_OF[label[1].lower().replace("_", " ")], [label[2]]))
        elif bodies:  # before the first label there is only talk
            bodies[-1][1].append(line)
    parts = {}
    for part, lines in bodies:
        value = _read_steps(lines) if part == "steps" else _read_prose(part, lines)
        if value and part in parts:
            raise ValueError(f"strategy reply: {LABELS[part][0]} appears twice: {_short(text)}")
        if value:  # an empty one is a title such as "Strategy" above the whole
            parts[part] = value
    return parts


def _read_prose(part, lines):
    paragraphs = [p for p in re.split(r"\n\s*\n", "\n".join(lines).strip()) if p.strip()]
    if part == "type" and len(paragraphs) > 1:  # a type is a phrase: a second paragraph can only be talk
        raise ValueError(f"strategy reply: the problem type has {len(paragraphs)} paragraphs: {_short(paragraphs[1])}")
    return _clean(" ".join(paragraphs))


def _read_steps(lines):
    """The list of steps in the lines below (and right of) the label; [] if there is nothing.

    Lines without a mark belong to the step above if they are indented, continue an unfinished sentence, or stand
    before a further step. At the end they are talk if a blank line sets them off, and an error if not.
    """
    items = [_ITEM.fullmatch(line) for line in lines]
    marked = [i for i, item in enumerate(items) if item]
    if not marked:
        if text := "\n".join(lines).strip():
            raise ValueError(f"strategy reply: the steps are not marked (a), (b) or in another way: {_short(text)}")
        return []
    first = items[marked[0]]
    # Marks of another kind or further to the right than the first one's are sub-items: text of the step above.
    own = [i for i in marked if _kind(items[i]) == _kind(first) and len(items[i]["indent"]) <= len(first["indent"]) + 1]
    if any(line.strip() for line in lines[:own[0]]):
        raise ValueError(f"strategy reply: text between the label and the first step: {_short(lines[:own[0]])}")
    _check_order([items[i] for i in own])
    if len(own) == 1 and _kind(first) != "bullet":
        inline = _inline_steps(first["text"])
        if len(inline) > 1:
            return [_clean(step) for step in inline]
    steps = []
    for i in range(own[0], len(lines)):
        if i in own:
            steps.append(items[i]["text"])
        elif not lines[i].strip():
            continue
        elif items[i] or lines[i][0].isspace() or i < own[-1] or (
            lines[i - 1].strip() and not steps[-1].endswith((".", "!", "?"))
        ):
            steps[-1] += " " + (items[i]["text"] if items[i] else lines[i].strip())
        elif lines[i - 1].strip():
            raise ValueError(f"strategy reply: does {lines[i]!r} belong to the last step?")
        else:
            break
    return [_clean(step) for step in steps]


def _kind(item):
    return next(kind for kind in ("number", "letter", "bullet") if item[kind])


def _check_order(items):
    """Marks must run 1, 2, 3, ... or a, b, c, ...: a second list, or a lost start, is not a list of steps."""
    marks = [item[_kind(item)].lower() for item in items]
    expected = {"number": [str(i) for i in range(1, len(marks) + 1)], "letter": list(ascii_lowercase[:len(marks)])}
    if marks != expected.get(_kind(items[0]), marks):
        raise ValueError(f"strategy reply: the steps are marked {', '.join(marks)}")


def _inline_steps(text):
    """Cut "First. 2. Second." or "First. (b) Second." at its marks. A sentence must end before one: not at "times 2. Then"."""
    steps = []
    while cut := re.search(rf"(?<=[.;!?])\s+\(?(?:{len(steps) + 2}|{ascii_lowercase[len(steps) + 1:][:1]})[.)]\s+", text):
        steps.append(text[:cut.start()])
        text = text[cut.end():]
    return [*steps, text]


def _clean(value):
    """One line, without emphasis, without marks or quotes around the whole.

    Bold is removed only if it stands between words: 2**3**2 stays.
    """
    value = " ".join(value.split())
    value = re.sub(r"(?<![\w)\]*])(\*\*|__)(?=\S)(.+?)(?<=\S)\1(?![\w(*])", r"\2", value)
    value = re.sub(r"(?<=\S)\*\*(?=\s|$)", "", value)  # the end of "**Step 1: name**", whose start went with the number
    value = value.strip()
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'" and value[0] not in value[1:-1]:
        value = value[1:-1].strip()
    return value


def _short(text):
    text = text if isinstance(text, str) else " ".join(text)
    return repr(text if len(text) <= 200 else text[:200] + "...")


# ------------------------------------------------------------------------------------------- messages to a model

def auto_messages(problem):
    """The chat messages of the unguided prompt, pi(.|q): one user message.

    No system message on either side: the chat template's own default applies, where it has one. Raises ValueError for
    an empty problem. The problem's text is put in as it is.
    """
    return _user(_check_text("problem", problem) + "\n\n" + INSTRUCTION)


def guided_messages(problem, strategy):
    """The chat messages of the guided prompt, pi(.|q, s): the strategy prepended to auto_messages' text [§3.1]."""
    if not isinstance(strategy, Strategy):
        raise ValueError(f"strategy: expected a Strategy, got {strategy!r}")
    block = GUIDE + "\n" + format_strategy(strategy)
    return _user(block + "\n\n" + _check_text("problem", problem) + "\n\n" + INSTRUCTION)


def solution_prompt(problem):
    """Messages that ask a strong model for a worked solution, where the data has none. Wording: ours.

    It closes with INSTRUCTION, because such a solution is what the policy is warmed up on, and graded like its own.
    """
    return _user(f"""Solve the problem below and write the solution down for a reader who wants to learn from it: every \
step that matters with its reason, in order, without false starts and without remarks about yourself.

<problem>
{_check_text("problem", problem)}
</problem>

{INSTRUCTION}""")


def extraction_prompt(problem, solution):
    """Messages that ask a strong model for the strategy behind a solution. What they ask for: [tab 4]; wording: ours.

    solution: the strong model's response, as a whole.
    """
    return _user(f"""A strong model solved the problem below. Write down the strategy in its response, for another model \
that will have to solve similar problems without seeing this response.

<problem>
{_check_text("problem", problem)}
</problem>

<response>
{_check_text("solution", solution)}
</response>

Describe three things, and no others:
- Problem type: a short phrase for the kind of problem, so specific that an expert recognises it.
- Strategy: the idea that carries the response, such as a theorem or a technique, and why it fits; one to three sentences.
- Steps: two to six, in the order of the response; each one sentence that says what to do, as a plan would.

Rules:
- Keep to the approach that led to the answer, without its detours.
- Be brief and general: no names, objects or numbers of this problem. Symbols and general formulas are allowed.
- Carry nothing out: no calculation, no intermediate result.
- Neither state the final answer nor hint at it.

Reply in English with nothing but this form, each step on one line, as many as there are:

Problem type: ...
Strategy: ...
Steps:
(a) ...
(b) ...
(c) ...""")


def scoring_prompt(problem, solution, candidates):
    """Messages that ask a strong model to score all candidates of a problem at once [app B]. Criteria: [tab 5]; wording: ours.

    candidates: the Strategies, at least one; in the prompt they are numbered from 1.
    """
    if not candidates or not all(isinstance(candidate, Strategy) for candidate in candidates):
        raise ValueError(f"candidates: expected a sequence of at least one Strategy, got {candidates!r}")
    numbers = range(1, len(candidates) + 1)
    shown = "\n\n".join(f"<candidate {i}>\n{format_strategy(own)}\n</candidate {i}>"
                        for i, own in zip(numbers, candidates, strict=True))
    return _user(f"""Below are a problem, a solution to it, and {len(candidates)} attempts at describing the strategy of \
that solution, for use on similar problems. Score the attempts.

<problem>
{_check_text("problem", problem)}
</problem>

<solution>
{_check_text("solution", solution)}
</solution>

{shown}

Give each attempt four scores from 0.0 (fails) to 1.0 (could not be better):
- type: the problem type is correct, and narrower than a field of mathematics.
- strategy: it solves this problem, it names a definite idea, and the idea says more than "set up and solve".
- steps: a solver can act on each of them, and each still serves the other problems of the type.
- no_leak: no value computed for this problem and no answer. At most {LEAK_SCORE} if the answer can be read from it.

Use the same measure for all, whatever their order. Reply with one line an attempt and nothing else: its number, and \
its scores in place of the names.

""" + "\n".join(f"{i}: {' '.join(CRITERIA)}" for i in numbers))


def parse_scores(text, n):
    """The scores in a reply to scoring_prompt with n candidates: a list of n dicts {criterion: 0.0 to 1.0}, keys in order.

    One line a candidate: its number, then a number a criterion. Names of the criteria in their order, bold, bullets,
    brackets, commas and a table's bars are understood; lines with other words are talk.
    Raises ValueError naming the line that is no candidate's or has a score out of range, and the candidates that are
    missing or given twice.
    """
    if not isinstance(text, str):
        raise ValueError(f"scores reply: expected a string, got {text!r}")
    names, scores = re.compile("|".join(CRITERIA).replace("_", "[ _-]"), re.IGNORECASE), {}
    for line in drop_thoughts(text).splitlines():
        rest = re.sub(r"\b(?:candidate|attempt)\b", "", names.sub("", line), flags=re.IGNORECASE)
        number, *values = re.findall(r"-?(?:\d+(?:\.\d+)?|\.\d+)", rest) or [None]
        if number is None or re.search("[^\\W\\d_]", rest):
            continue
        own = [re.sub("[ -]", "_", name.lower()) for name in names.findall(line)] or list(CRITERIA)
        if own != list(CRITERIA) or len(values) != len(CRITERIA) or number not in map(str, range(1, n + 1)):
            raise ValueError(f"scores reply: expected a candidate's number, 1 to {n}, and {len(own)} scores in {line!r}")
        if number in scores:
            raise ValueError(f"scores reply: candidate {number} is given twice in {_short(text)}")
        scores[number] = dict(zip(CRITERIA, map(float, values), strict=True))
        if not all(0 <= value <= 1 for value in scores[number].values()):
            raise ValueError(f"scores reply: expected scores from 0.0 to 1.0 in {line!r}")
    if missing := [str(i) for i in range(1, n + 1) if str(i) not in scores]:
        raise ValueError(f"scores reply: no scores of candidate {', '.join(missing)} in {_short(text)}")
    return [scores[str(i)] for i in range(1, n + 1)]


def _user(content):
    return [{"role": "user", "content": content}]


def _check_text(name, value):
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name}: expected a non-empty string, got {value!r}")
    return value


# -------------------------------------------------------------------------------------------- numbers in a text

_ONES = tuple("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
              "seventeen eighteen nineteen".split())
_TENS = tuple("twenty thirty forty fifty sixty seventy eighty ninety".split())
_BIG = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
_WORD_VALUES = {word: i for i, word in enumerate(_ONES)} | {word: 10 * i for i, word in enumerate(_TENS, start=2)}
_SHARES = {"half": 2, "halve": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8,
           "ninth": 9, "tenth": 10}  # fmt: skip

_BELOW_100 = rf"(?:(?:{'|'.join(_TENS)})(?:[- ](?:{'|'.join(_ONES[1:10])}))?|{'|'.join(_ONES[::-1])})"  # seventeen before seven
_BELOW_1000 = rf"(?:(?:{'|'.join(_ONES[:0:-1])}|a)[- ]hundred(?:(?:[- ]and)?[- ]{_BELOW_100})?|{_BELOW_100})"
_SPELLED = rf"{_BELOW_1000}(?:[- ](?:{'|'.join(_BIG)})(?:,?(?: and)? {_BELOW_1000})?)*"
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
_NUMBER = re.compile(
    rf"(?<![a-z0-9.])(?:(?P<whole>[0-9]+) (?=[0-9]+/))?(?P<top>{_DIGITS})(?:\s?/\s?(?P<bottom>{_DIGITS})(?![a-z0-9]))?"
    rf"(?P<power>\s?\*\s?10\^\{{?(?P<exponent>-?[0-9]{{1,2}})\}}?)?(?P<scale>\s(?:{'|'.join(_BIG)})\b)?"
    r"(?P<percent>\s?%|\s?percent\b)?(?P<ordinal>(?:\^\{?)?(?:st|nd|rd|th)\b)?"
    rf"|\b(?P<words>{_SPELLED})\b(?:[- ](?P<share>{'|'.join(_SHARES)})s?\b)?(?P<nth>-(?:first|second|third|[a-z]+th)\b)?"
    r"(?P<of_100>\spercent\b)?(?P<of_12>\sdozens?\b)?"
    r"|\b(?:a[- ])?(?P<bare_share>half|third|quarter)s?\b|\b(?P<dozen>a dozen)\b"
)
# LaTeX and Unicode to one plain notation, in this order.
_NOTATION = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"\\(?:left|right|displaystyle|[bB]igg?[lr]?)(?![a-zA-Z])|\\!", ""),
    (r"(?<=[0-9])(?:\{,\}|\\,|[\u2009\u202f\u00a0])(?=[0-9]{3})", ","),  # 10{,}000, and with a narrow or fixed blank
    (r"\\[,;:]|~|\\q?quad\b|\\[()\[\]]", " "),
    (r"\\(?:text|mathrm|mathbf|textbf|mbox)\s?\{([^{}]*)\}", r"\1"),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\frac\s?([0-9])\s?([0-9])", r"\\frac{\1}{\2}"),
    (r"\\frac\s?([0-9])\s?\{", r"\\frac{\1}{"),
    (r"\\frac\s?\{\s?([0-9.,]+)\s?\}\s?\{?\s?([0-9.,]+)\s?\}?", r" \1/\2 "),
    (r"\\(?:cdot|times)(?![a-zA-Z])|[×·∙]", "*"),
    (r"√|(?<![\\a-zA-Z])sqrt", r"\\sqrt"),
    (r"π", r"\\pi "),
    (r"\\sqrt\s?\(([^()]*)\)|\\sqrt\s?([0-9a-z])", r"\\sqrt{\1\2}"),
    (r"[−–](?=\s?[0-9a-z\\(])", "-"),
    (r"\\([%$])", r"\1"),
    (r"\$", " "),
    (r"(\\[a-zA-Z]+)(?=[0-9])", r"\1 "),
    (r"\s+", " "),
)]  # fmt: skip
_RAISED, _LOWERED, _ASCII_DIGITS = "⁰¹²³⁴⁵⁶⁷⁸⁹", "₀₁₂₃₄₅₆₇₈₉", "0123456789"
_FULL_WIDTH = str.maketrans("０１２３４５６７８９．，％＝＋－／", "0123456789.,%=+-/")


def _plain(text):
    """The text in lower case and one notation: x² as x^{2}, ½ and \\frac12 as 1/2, no dollar signs, no \\text."""
    text = text.translate(_FULL_WIDTH)
    for digits, mark in ((_RAISED, "^"), (_LOWERED, "_")):
        table = str.maketrans(digits, _ASCII_DIGITS)
        text = re.sub(f"[{digits}]+", lambda m, mark=mark, table=table: f"{mark}{{{m[0].translate(table)}}}", text)
    text = re.sub("[¼-¾⅐-⅞]", lambda m: " " + unicodedata.normalize("NFKC", m[0]).replace("⁄", "/"), text)
    for pattern, replacement in _NOTATION:
        text = pattern.sub(replacement, text)
    return text.strip().lower()


def _numbers(plain):
    """Every number in a plain text: (match, values). A percentage has two values, 50 % is 50 and 1/2.

    Signs are left out: whether a text says -299 or 299, it gives the number away. Ordinals are no numbers.
    """
    for match in _NUMBER.finditer(plain):
        if match["ordinal"] or match["nth"] or len(match[0]) > 100:  # int() refuses what a stuck model writes: 9999...
            continue
        if match["words"]:
            value = _spelled_value(match["words"]) / _SHARES.get(match["share"], 1) * (12 if match["of_12"] else 1)
            values = {value, value / 100} if match["of_100"] else {value}
        elif match["bare_share"] or match["dozen"]:
            values = {Fraction(1, _SHARES[match["bare_share"]]) if match["bare_share"] else Fraction(12)}
        else:
            top, bottom = (Fraction((match[part] or "1").replace(",", "")) for part in ("top", "bottom"))
            if bottom == 0:
                continue
            value = int(match["whole"] or 0) + top / bottom
            value *= _BIG[match["scale"].strip()] if match["scale"] else 1
            value *= Fraction(10) ** int(match["exponent"]) if match["power"] else 1
            values = {value, value / 100} if match["percent"] else {value}
        yield match, values


def _spelled_value(words):
    total = group = 0
    for word in re.findall("[a-z]+", words):
        if word == "hundred":
            group *= 100
        elif word in _BIG:
            total, group = total + group * _BIG[word], 0
        elif word != "and":
            group += 1 if word == "a" else _WORD_VALUES[word]
    return Fraction(total + group)


def _values(text):
    """The set of all numbers in a text, those above and below a fraction's bar included."""
    values = set()
    for match, own in _numbers(_plain(text)):
        values |= own | {Fraction(match[part].replace(",", "")) for part in ("top", "bottom") if match[part]}
    return values


# -------------------------------------------------------------------------------------------- the leak filter

# A number right behind one of these is stated as a value ("which gives 12", "so the count is two").
_STATED = re.compile(
    r"(?:[=≡≈]|\\equiv|\b(?:is|are|was|be|becomes?|equals?|equal to|gives?|giving|gets?|getting|obtains?|yields?|yielding"
    r"|leaves?|leaving|makes?|making|has|have|namely|exactly|only|so|thus|hence|therefore|answer|result|choose|count|total"
    r"|report|state|multiple of|divisible by|factor out))\W{0,3}"
    r"(?:(?:just|only|exactly|about|therefore|thus|simply|the|number|value|always|a|that|there|are)\s){0,3}$"
)
# The same for 0 and 1, which half of all strategies state somewhere ("equal to zero", "a leading coefficient of 1").
_STATED_AS_ANSWER = re.compile(
    r"\b(?:answer|result|total|sum|value|count|remainder|probability|number)s?\b[^.;]{0,25}(?:[=≡,]|\b(?:is|are|be|equals?|of|as))"
    r"\W{0,3}(?:(?:just|only|exactly|therefore|thus|simply)\s)?$|\b(?:you get|report|this leaves|this gives)\W{0,3}$"
)
# Behind these a small number is part of an operation: "divide by two", "base 10", "the power 3".
_OPERATION = re.compile(
    r"\b(?:divid\w*|multipl(?:y|ied|ying)|split)\b[^.;]{0,30}\b(?:by|into)\s?$|\brais\w*\b[^.;]{0,30}\bto(?: the)?\s?$"
    r"|\b(?:power|root|base|modulo|mod|degree|order|times|factors?)\s?(?:of\s)?$"
)
_REFERENCE = re.compile(r"(?:steps?|cases?|equations?|parts?|lemma|theorem)\s(?:[0-9]+(?:,|\sand|\sto|-)\s?)?\(?$")
_UNITS = {  # numbers that are harmless in front of these words: an hour has 60 minutes in every problem
    3: "feet|sides|angles", 4: "quarters|sides|weeks", 5: "days", 7: "days?", 12: "months?|inch(?:es)?|hours?", 16: "ounces?",
    24: "hours?", 25: "cents?", 30: "days", 31: "days", 50: "cents?", 52: "weeks?", 60: "minutes?|seconds?", 365: "days?",
    366: "days?", 1000: "met(?:er|re)s?|grams?|milli.*", 2000: "pounds?", 3600: "seconds?",
}  # fmt: skip
_KNOWN = (10, 90, 100, 180, 360)  # the base of our numerals, per cent, angles
_COEFFICIENTS = (Fraction(1, 3), Fraction(1, 4), Fraction(4, 3), 3, 4, 6)  # of well-known formulas: 4ac, n(n-1)/6
_COMMON_ANSWERS = {"yes", "no", "true", "false", "even", "odd", "none", "never", "always"}


def leaks(strategy, problem, solution, answer):
    """What a Strategy gives away: a list of reasons, each naming the number and its place; [] for a clean one.

    problem, solution, answer: the row's texts; the solution may be "" (then only the answer is looked for).

    Deterministic, and it knows only texts: a number leaks where it is the answer, or where the solution holds it and the
    problem does not, in whatever spelling (1,234; 0.5, 1/2 and \\frac12; 50 %; "twenty-five"; -3 as 3). An answer that is
    an expression, a tuple or a word is looked for as a text. Not punished: exponents, indices, ordinals, references to
    steps, 0, 1, 2 and a half, coefficients of well-known formulas, units (60 minutes), angles, spelled numbers up to ten
    that are not stated as a result. Where such a number IS the answer, its surroundings decide.
    What it cannot see: an intermediate result without a number ("the triangle is isosceles"), and symbolic ones whose
    coefficients are small; other languages, rounded values, terms in another order. The scoring prompt's no_leak is there for
    these. Measured on data/leak_examples.jsonl (data/README.md has the figures).
    """
    given, wanted = _values(problem), _values(answer)
    computed = _values(solution) - given - wanted
    problem, answer = _plain(problem), _plain(answer)
    found = []
    texts = {"type": strategy.type, "strategy": strategy.strategy}
    texts |= {f"step {i}": step for i, step in enumerate(strategy.steps, start=1)}
    for name, text in texts.items():
        text = _plain(text)
        for match, values in _numbers(text):
            # 80 characters are all that the patterns look at; over a long text they would take quadratic time.
            before, after = text[max(0, match.start() - 80) : match.start()], text[match.end() : match.end() + 80]
            if re.search(r"[\^_]\{?-?$", before) or _REFERENCE.search(before):
                continue
            place = f"in {name}: {text[max(0, match.start() - 30) : match.end() + 20]!r}"
            if values & wanted:
                quoted = values & given and _same_noun(match[0].strip(), after, problem)
                if not quoted and not _harmless_answer(match[0], max(values), before, after):
                    found.append(f"the answer {match[0].strip()} {place}")
            elif values & computed and not _harmless(match[0], max(values), before, after):
                found.append(f"the computed value {match[0].strip()} {place}")
        if not _NUMBER.fullmatch(answer.lstrip("+-")) and _holds_answer(text, answer, problem):
            found.append(f"the answer {answer} in {name}: {text[:60]!r}")
    return found


def _harmless(number, value, before, after):
    """Whether a number of the solution may stand in a strategy all the same."""
    if value in (0, 1, 2, Fraction(1, 2), *_KNOWN) or _is_unit(value, after):
        return True
    if number[0].isalpha() and (value <= 10 or value < 1):
        return not _STATED.search(before)
    return value in _COEFFICIENTS and _in_formula(before, after)


def _harmless_answer(number, value, before, after):
    """The same for a number that is the answer, where the benefit of the doubt is smaller."""
    if value in (0, 1):
        return not _STATED_AS_ANSWER.search(before)
    if _is_unit(value, after):
        return not _STATED_AS_ANSWER.search(before)
    if value > 10 and value not in _KNOWN:
        return False
    if _OPERATION.search(before) or (value in (2, Fraction(1, 2), *_COEFFICIENTS) and _in_formula(before, after)):
        return True
    return (number[0].isalpha() or value in _KNOWN) and not _STATED.search(before)


def _is_unit(value, after):
    return value in _UNITS and re.match(rf"[- ](?:{_UNITS[value]})\b", after)


def _same_noun(number, after, problem):
    """Whether the problem has this number before the same word: "three consecutive integers" tells nothing new."""
    noun = re.match(r"[-\s]+([a-z]{2,})", after)
    return noun and re.search(rf"(?<![a-z0-9]){re.escape(number)}[-\s]+{noun[1]}\b", problem)


def _in_formula(before, after):
    """Whether a number touches a symbol: 4ac, n-3, 3(n + 1), 4/3 \\pi r^3. Words of three letters are no symbols."""
    left, right = re.search(r"[^\s=<>,;.]*$", before)[0], re.match(r"[^\s=<>,;.]*", after)[0]
    if re.search(r"[a-z]", left) and not re.search(r"[a-z]{3}[^a-z]*$", left):
        return True
    if re.search(r"^[a-z(\\^]|^[-+*/(].*[a-z]", right):
        return True
    return re.search(r"(?:\b[a-z]|[)}])\s?[-+*/]\s?\(?$", before) or re.match(r"\s?[-+*/]\s?(?:[a-z]\b|[(\\])|\s\\[a-z]", after)


def _holds_answer(text, answer, problem):
    """Whether a plain text holds an answer that is no plain number: words, an option's letter, an expression."""
    if re.fullmatch(r"\(?[a-z]\)?", answer):
        option = rf"\b(?:answer|option|choice)s?\b(?:\s(?:is|must be))?\W{{0,3}}\(?{answer.strip('()')}\)?(?![a-z0-9=])"
        return re.search(option, text)
    if re.fullmatch(r"[a-z][a-z .'-]*", answer):
        whole = rf"(?<![a-z]){re.escape(answer)}(?![a-z])"
        if answer not in _COMMON_ANSWERS and not re.search(whole, problem):
            return re.search(whole, text)
        # "Is it even or odd?": a strategy may speak of both, but not say which.
        said = r"(?<!whether )\b(?:answer|result|conclusion|it|so|which)\W{1,3}(?:(?:it|is|are|must|be|always)\s){0,4}\W{0,2}"
        return re.search(said + whole + r"(?!\sor\b)", text)
    # An expression: the same characters with any blanks, braces and times signs in between, and no longer one around it.
    short = re.sub(r"[\s{}*]", "", answer)
    spaced = r"[\s{}*]*".join(r"\\?" if character == "\\" else re.escape(character) for character in short)
    whole = rf"(?<![a-z0-9.\\]){spaced}(?![a-z0-9])"
    return (len(short) > 2 or short[:1].isdigit()) and not re.search(whole, problem) and re.search(whole, text)


# -------------------------------------------------------------------------------------------- the choice

def mean_score(scores):
    """The mean over CRITERIA of one candidate's scores. Rounded: tenths that add up to 3.2 must not end below 0.8."""
    return round(statistics.fmean(scores[name] for name in CRITERIA), 6)


def best_candidate(scores):
    """The index of the candidate with the highest mean score [app B], of equals the first [ours].

    scores: one entry a candidate, of parse_scores' list, or None for a candidate that is out. ValueError if all are.
    """
    means = {i: mean_score(own) for i, own in enumerate(scores) if own is not None}
    if not means:
        raise ValueError(f"no candidate is left of {len(scores)}")
    return max(means, key=means.get)


def quality(scores):
    """"high", "medium" or "low": the band of the mean score, [0.8, 1], [0.5, 0.8) or [0, 0.5) [app H].

    The bands are of the paper's audit, in which another model than the one that chose judged 500 strategies.
    """
    mean = mean_score(scores)
    return "high" if mean >= 0.8 else "medium" if mean >= 0.5 else "low"


def shuffled_strategies(strategies: Sequence[Strategy], seed: int) -> list[Strategy]:
    """Each row's strategy replaced by one of another problem type: a control [ours; the idea: arXiv 2608.09228].

    strategies: one a row. The result is a permutation of them in which no row has a strategy of its own type (as text,
    without regard to case), drawn by the seed. ValueError if more than half of the rows are of one type: then there is
    no such permutation.
    """
    types = [strategy.type.lower() for strategy in strategies]
    for name, rows in Counter(types).most_common(1):
        if 2 * rows > len(types):
            raise ValueError(f"shuffled strategies: {rows} of {len(types)} rows have the type {name!r}, more than half")
    rng, drawn = random.Random(seed), list(range(len(types)))
    rng.shuffle(drawn)
    for i, own in enumerate(types):
        if types[drawn[i]] == own:
            # A swap that mends row i and harms no other. There is one: at most as many rows as there are of this type
            # have another one, and one of its strategies at least is not among them, because row i has it.
            j = rng.choice([j for j, other in enumerate(types) if own not in (other, types[drawn[j]])])
            drawn[i], drawn[j] = drawn[j], drawn[i]
    return [strategies[k] for k in drawn]


# -------------------------------------------------------------------------------------------- the program

def main():
    """python strategy.py ...: the command line of tools/extract.py. Imported only here: as a module this file needs nothing."""
    if not (Path(__file__).parent / "tools/extract.py").is_file():
        sys.exit("strategy.py: as a program it needs tools/extract.py beside it; as a module it needs nothing")
    from tools.extract import run

    run()


if __name__ == "__main__":
    main()
