r"""The leak filter of the extraction: what does a strategy give away of its problem's solution? [ours]

A strategy must hold no answer and no computed value [app B]. The scoring prompt asks a model about that; this filter looks
before it, at the numbers and at sentences that state an answer, and calls no model. What it finds and what it misses is
measured on data/leak_examples.jsonl; data/README.md has the figures. Standard library only.
"""

import re
import unicodedata
from fractions import Fraction

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


def _plain(text):
    """The text in one notation: x² as x^{2}, ½ and \\frac12 as 1/2, no dollar signs, no \\text. Its case stays."""
    for pattern, written in (("[⁰¹²³⁴-⁹]+", r"^{\g<0>}"), ("[₀-₉]+", r"_{\g<0>}"), ("[¼-¾⅐-⅞]", r" \g<0>")):
        text = re.sub(pattern, written, text)
    # then these, and what is in full width, as ASCII
    text = re.sub("[⁰¹²³⁴-⁹₀-₉¼-¾⅐-⅞！-～]+", lambda m: unicodedata.normalize("NFKC", m[0]).replace("⁄", "/"), text)
    for pattern, replacement in _NOTATION:
        text = pattern.sub(replacement, text)
    return text.strip()


def _numbers(plain):
    """Every number in a plain text in lower case: (match, values). A percentage has two values, 50 % is 50 and 1/2.

    Signs are ignored: a text that says 299 gives -299 away too. Ordinals are no numbers.
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
    """The set of all numbers in a text, with the numerators and denominators of its fractions."""
    values = set()
    for match, own in _numbers(_plain(text).lower()):
        values |= own | {Fraction(match[part].replace(",", "")) for part in ("top", "bottom") if match[part]}
    return values


# -------------------------------------------------------------------------------------------- the leak filter

# A number right after one of these is stated as a value ("which gives 12", "so the count is two").
_STATED = re.compile(
    r"(?:[=≡≈]|\\equiv|\b(?:is|are|was|be|becomes?|equals?|equal to|gives?|giving|gets?|getting|obtains?|yields?|yielding"
    r"|leaves?|leaving|makes?|making|has|have|namely|exactly|only|so|thus|hence|therefore|answer|result|choose|count|total"
    r"|report|state|multiple of|divisible by|factor out))\W{0,3}"
    r"(?:(?:just|only|exactly|about|therefore|thus|simply|the|number|value|always|a|that|there|are)\s){0,3}$"
)
# The same for 0 and 1, which every second strategy states somewhere ("equal to zero", "a leading coefficient of 1").
_STATED_AS_ANSWER = re.compile(
    r"\b(?:answer|result|total|sum|value|count|remainder|probability|number)s?\b[^.;]{0,25}(?:[=≡,]|\b(?:is|are|be|equals?|of|as))"
    r"\W{0,3}(?:(?:just|only|exactly|therefore|thus|simply)\s)?$|\b(?:you get|report|this leaves|this gives)\W{0,3}$"
)
# After these a small number is part of an operation: "divide by two", "base 10", "the power 3".
_OPERATION = re.compile(
    r"\b(?:divid\w*|multipl(?:y|ied|ying)|split)\b[^.;]{0,30}\b(?:by|into)\s?$|\brais\w*\b[^.;]{0,30}\bto(?: the)?\s?$"
    r"|\b(?:power|root|base|modulo|mod|degree|order|times|factors?)\s?(?:of\s)?$"
)
_REFERENCE = re.compile(r"(?:steps?|cases?|equations?|parts?|lemma|theorem)\s(?:[0-9]+(?:,|\sand|\sto|-)\s?)?\(?$")
_UNITS = {  # these numbers are harmless before these words: an hour has 60 minutes in every problem
    3: "feet|sides|angles", 4: "quarters|sides|weeks", 5: "days", 7: "days?", 12: "months?|inch(?:es)?|hours?", 16: "ounces?",
    24: "hours?", 25: "cents?", 30: "days", 31: "days", 50: "cents?", 52: "weeks?", 60: "minutes?|seconds?", 365: "days?",
    366: "days?", 1000: "met(?:er|re)s?|grams?|milli.*", 2000: "pounds?", 3600: "seconds?",
}  # fmt: skip
_KNOWN = (10, 90, 100, 180, 360)  # the base of our numerals, per cent, degrees
_COEFFICIENTS = (Fraction(1, 3), Fraction(1, 4), Fraction(4, 3), 3, 4, 6)  # of well-known formulas: 4ac, n(n-1)/6
# A final answer, of whatever problem. Before its number: "the answer is", or, if nothing comes after it, "report".
_NOUN = r"(?:answer|ans|result|solution|(?:final|required|wanted|desired|requested)\s(?:[a-z]+\s)?[a-z]+)s?\b"
_OPEN = r"\b(?:if|whether|when|whenever|until|unless|suppose|set)\b[^.;,]{0,25}"  # nothing is said yet: "if the answer is 7"
_FILL = r"\W{0,3}(?:(?:just|only|exactly|about|approx\w*|indeed|therefore|thus|then|simply|the|number|value|[a-z]\s?=)\s?){0,3}"
_ANSWER_IS = re.compile(
    rf"(?P<open>{_OPEN})?\b(?P<noun>{_NOUN})[^.;]{{0,25}}?(?:[=≈:]|\b(?:is|are|be|becomes?|equals?|equal to"
    rf"|(?:comes?|works?|turns?)(?: out)?(?: to be| to| as)?)\b){_FILL}\W{{0,2}}$"
)
_ANSWER_AS = re.compile(rf"\b(?:{_NOUN}(?:,|\sof|\sas)?|report|output|submit|conclude with){_FILL}$")
# After its number: a unit, and the end of what is said; "is the answer". Words that go on ("one more than") are no unit.
_UNIT = (
    r"(?:[-\s](?!(?:times|more|less|fewer|larger|greater|smaller|plus|minus|of|over|by|to|or|if|than|that|which|where|when|for|with"
    r"|in|per|each|squared|divided|multiplied|digits?|decimals?|places?|numbers?|integers?|roots?|cases?|equations?|terms?|factors?"
    r"|parts?|values?|steps?|solutions?|unknowns?|fractions?|words?)\b)[a-z]+)"
)
_ENDS = re.compile(rf"{_UNIT}{{0,2}}(?:\sin (?:all|total))?(?:\s?[.,;:!?)]|$|\s(?:because|since|once|so|and|but|as|after)\b)")
_IS_ANSWER = re.compile(
    rf"{_UNIT}?(?:,?\s\(?(?:and )?(?:which |that |this )?(?:is|are|as|(?:must|will) be) (?:then )?(?:the|our|your) {_NOUN}"
    rf"|(?:,\s|\s\()(?:the|our|your) {_NOUN}(?=[.,;)]|$))"
)
_OPERAND = re.compile(r"\b(?:by|from|to|with|after|plus|minus|than|at|in|for|every|each|the|these|both|all|of|[a-z]+ing)\s$")
# Beside a number these are part of its value, unlike a symbol: 2\sqrt{3}, 1+\sqrt{2}, \pi/4, 2^{10}, 40°, **12**.
_ROOT_OR_PI = re.compile(r"(?:\\sqrt\{|\\pi\s?/\s?|\\frac\{\\pi\}\{)$")
_CLOSED = re.compile(r"(?:\s?[-+*/]?\s?(?:\\sqrt\{[0-9]+\}|\\pi\b)|\^\{?(?:[0-9]+|\\circ)\}?|°|[*_}\]\"']+)*")
_SAID = re.compile(  # without a number: in a box, as a word, as an option; a bare option's letter and a name are in capitals
    r"\\f?box(?:ed)?(?![a-z])\s?(?:\{\s?(?!\}|\.\.|\\[lc]?dots|(?:(?:your|the|final) )*(?:answer|result)\b)|[0-9a-z])|####\s?\S"
    rf"|(?P<open>{_OPEN})?\b(?:(?:answer|ans|correct (?:option|choice|one))\b[^.;,]{{0,15}}?(?:\b(?:is|be)|[=:])"
    rf"{_FILL}\W{{0,2}}(?:(?:yes|no|true|false|even|odd|none|impossible|\\infty|infinity|(?-i:[A-E]|[A-Z][a-z]+))"
    r"\s?(?:[.,;:!)]|$|\bsince|\bbecause)|\([a-e]\))|(?:option|choice)\s\(?(?-i:[A-E])\)?\sis\s(?:the )?(?:correct|right)\b"
    r"|(?:choose|pick|select)\s(?:(?:option|choice|answer)\s\(?(?-i:[A-E])\b|\((?-i:[A-E])\)))",
    re.I,
)
# A result, before its number: after a word that concludes, or in a sentence of its own.
_RESULT = r"the (?:[a-z]+ )?(?:sum|product|difference|probability|number|value|total|count|area|minimum|maximum)(?: value)?"
_CONCLUDED = re.compile(
    rf"(?P<open>{_OPEN})?(?:\b(?:so|thus|hence|therefore|(?:conclude|follows|find|get|gives|yields|obtain)(?: that)?)\W{{1,3}}"
    rf"(?:(?P<some>there are)|(?:[a-z]|{_RESULT}(?: of [^.;,]{{0,25}})?)\s?(?:=|\b(?:is|equals)))"
    rf"|(?P<alone>(?:^|[.;]\s)(?:[a-z]\s?(?:=|equals)|{_RESULT}\s?(?:=|is|equals)))){_FILL}\W{{0,2}}$"
)
_COMMON_ANSWERS = {"yes", "no", "true", "false", "even", "odd", "none", "never", "always"}


def leaks(strategy, problem: str, solution: str, answer: str) -> list[str]:
    """What a strategy gives away: a list of reasons, each naming the number and its place; [] for a clean one.

    strategy: a strategy.Strategy. problem, solution, answer: the row's texts; without a solution ("") only the answer is
    looked for.

    A number leaks if it is the answer, or if it is in the solution and not in the problem, in any spelling (1,234; 0.5, 1/2
    and \\frac12; 50 %; "twenty-five"; -3 as 3). An answer that is an expression, a tuple or a word is looked for as text.
    Whatever the row, no strategy may state a final answer: "the answer is 42", "so x = 7 is the result", a filled box.
    Allowed: exponents, indices, ordinals, references to steps, 0, 1, 2 and a half, coefficients of well-known formulas,
    units (60 minutes), angles, and spelled numbers up to ten that are not stated as a result. If such a number IS the
    answer, the words around it decide.
    """
    given, wanted = _values(problem), _values(answer)
    computed = _values(solution) - given - wanted
    problem, answer = _plain(problem).lower(), _plain(answer).lower()
    found = []
    texts = {"type": strategy.type, "strategy": strategy.strategy}
    texts |= {f"step {i}": step for i, step in enumerate(strategy.steps, start=1)}
    for name, text in texts.items():
        said = next((said for said in _SAID.finditer(_plain(text)) if not said["open"]), None)
        text = _plain(text).lower()
        for match, values in _numbers(text):
            # The patterns need no more than 80 characters; over a whole long text they would take quadratic time.
            before, after = text[max(0, match.start() - 80) : match.start()], text[match.end() : match.end() + 80]
            if re.search(r"[\^_]\{?-?$", before) or _REFERENCE.search(before):
                continue
            place = f"in {name}: {text[max(0, match.start() - 30) : match.end() + 20]!r}"
            quoted = values & given and _same_noun(match[0].strip(), after, problem)
            if values & wanted and not quoted and not _harmless_answer(match[0], max(values), before, after):
                found.append(f"the answer {match[0].strip()} {place}")
            elif values & computed and not _harmless(match[0], max(values), before, after):
                found.append(f"the computed value {match[0].strip()} {place}")
            elif _states_answer(match, max(values), before, after):
                found.append(f"a final answer, {match[0].strip()}, {place}")
        if said:
            found.append(f"a final answer in {name}: {said[0]!r}")
        if not _NUMBER.fullmatch(answer.lstrip("+-")) and _holds_answer(text, answer, problem):
            found.append(f"the answer {answer} in {name}: {text[:60]!r}")
    return found


def _harmless(number, value, before, after):
    """Whether a number that the solution computes may be in a strategy all the same."""
    if value in (0, 1, 2, Fraction(1, 2), *_KNOWN) or _is_unit(value, after):
        return True
    if number[0].isalpha() and value <= 10:
        return not _STATED.search(before)
    return value in _COEFFICIENTS and _in_formula(before, after)


def _harmless_answer(number, value, before, after):
    """The same for a number that is the answer, with less benefit of the doubt."""
    if value in (0, 1) or _is_unit(value, after):
        return not _STATED_AS_ANSWER.search(before)
    if value > 10 and value not in _KNOWN:
        return False
    if _OPERATION.search(before) or (value in (2, Fraction(1, 2), *_COEFFICIENTS) and _in_formula(before, after)):
        return True
    return (number[0].isalpha() or value in _KNOWN) and not _STATED.search(before)


def _states_answer(match, value, before, after):
    """Whether the words around a number make it a final answer, be it this problem's or another's."""
    before, after = _ROOT_OR_PI.sub("", before), after[_CLOSED.match(after).end() :]
    if _in_formula(before, after):
        return False
    if said := _ANSWER_IS.search(before):
        # "until the result is 0" is a step, and "the third side" is no number.
        general = said["open"] or (value in (0, 1) and not said["noun"].startswith(("ans", "final result")))
        return not general and (re.match(r"\s?[.,;:)]|$", after) if match["bare_share"] else _ENDS.match(after))
    if (said := _CONCLUDED.search(before)) and not said["open"] and _ENDS.match(after):
        known = value in (0, 1, 90, 100, 180, 360) or (said["some"] and (value == 2 or match["words"]))  # "so there are two"
        return not known and not (said["alone"] and value in (2, 10, Fraction(1, 2)))
    if _IS_ANSWER.match(after):
        return not any(re.search(pattern, before) for pattern in (_OPERAND, _OPERATION, rf"{_OPEN}$"))
    return _ANSWER_AS.search(before) and re.match(r"\s?[.,;:!)]|$", after)


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
        # The problem asks "is it even or odd?": a strategy may name both, but not say which it is.
        said = r"(?<!whether )\b(?:answer|result|conclusion|it|so|which)\W{1,3}(?:(?:it|is|are|must|be|always)\s){0,4}\W{0,2}"
        return re.search(said + whole + r"(?!\sor\b)", text)
    # An expression: its characters, with any blanks, braces and times signs between them, and not as part of a longer one.
    short = re.sub(r"[\s{}*]", "", answer)
    spaced = r"[\s{}*]*".join(r"\\?" if character == "\\" else re.escape(character) for character in short)
    whole = rf"(?<![a-z0-9.\\]){spaced}(?![a-z0-9])"
    return (len(short) > 2 or short[:1].isdigit()) and not re.search(whole, problem) and re.search(whole, text)
