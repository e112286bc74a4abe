r"""Strategies: what one is, how a strong model is asked for one, how its reply is read, and the policy's two prompts.

Read this file first. A strategy says how to solve a KIND of problem: its type, the idea, and general steps, without any
computation and without the answer (SGPO, arXiv 2606.24064). A strong model writes it from its own solution [app B]; the policy
gets it in the guided prompt. What a strategy holds is the paper's [tab 4]; every wording and the text form are ours. It needs
the standard library only: copy this file alone. The command is tools/extract.py's, which also chooses among candidates:

    python strategy.py --data problems.jsonl --endpoint URL --model NAME --out strategies.jsonl
    python -c "import strategy as s; print(s.guided_messages('1+2?', s.Strategy('sum', 'Add.', ('Add.',)))[0]['content'])"
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

INSTRUCTION = r"Reason step by step and put the final answer in \boxed{}."
GUIDE = "Follow this strategy."  # few and plain words: the tiny world's vocabulary of about 100 has to hold them as well
SLOT = r"\{(problem|strategy)\}"  # in a Template


@dataclass(frozen=True)
class Strategy:
    """One strategy. ValueError, naming the field and the value, unless every text is one line without blanks around it. type:
    the kind of problem, a phrase. strategy: the idea that solves it. steps: what to do, in order, at least one."""

    type: str
    strategy: str
    steps: tuple[str, ...]

    def __post_init__(self):
        if not isinstance(self.steps, tuple) or not self.steps:  # a str would be a sequence too, with a step of each letter
            raise ValueError(f"strategy field 'steps': expected at least one, in a tuple (JSON: a list), got {self.steps!r}")
        texts = {"type": self.type, "strategy": self.strategy}
        texts |= {f"steps[{i}]": step for i, step in enumerate(self.steps)}
        for field, text in texts.items():
            # One line a text is what makes the text form reversible: a second line could imitate the next label.
            if not isinstance(text, str) or text != text.strip() or len(text.splitlines()) != 1:
                raise ValueError(f"strategy field {field!r}: expected one line without blanks around it, got {text!r}")

    @classmethod
    def from_dict(cls, data: Mapping) -> "Strategy":
        """The Strategy in {"type": str, "strategy": str, "steps": [str, ...]}; ValueError for anything else."""
        if not isinstance(data, Mapping) or data.keys() != {"type", "strategy", "steps"}:
            raise ValueError(f"strategy: expected an object with type, strategy and steps, got {data!r}")
        steps = data["steps"]
        return cls(data["type"], data["strategy"], tuple(steps) if isinstance(steps, list) else steps)

    def to_dict(self) -> dict:
        """The inverse of from_dict, ready for json."""
        return {"type": self.type, "strategy": self.strategy, "steps": list(self.steps)}


def format_strategy(strategy: Strategy) -> str:
    """The text form of a Strategy, as it appears in every prompt: two labelled lines, then the numbered steps."""
    steps = "\n".join(f"{i}. {step}" for i, step in enumerate(strategy.steps, start=1))
    return f"Problem type: {strategy.type}\nStrategy: {strategy.strategy}\nSteps:\n{steps}"


def extraction_prompt(problem: str, solution: str) -> list[dict[str, str]]:
    """Messages that ask for the strategy in a solution: its three components and no others [tab 4]. solution: the strong
    model's whole response, thoughts included. parse_strategy reads the reply."""
    text = f"""A strong model solved the problem below. Write down the strategy in its response, for another model that will \
have to solve similar problems without seeing this response.

<problem>
{problem}
</problem>

<response>
{solution}
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

Reply in English with nothing but the form below: plain text without Markdown, the labels as they are here, each of the \
three things and each step on one line, as many steps as there are.

Problem type: ...
Strategy: ...
Steps:
(a) ...
(b) ...
(c) ..."""
    return [{"role": "user", "content": text}]


# Models set labels in bold whatever the prompt says.
LABELS = [rf"(?:\*\*)?{label}(?:\*\*:|:\*\*|:)" for label in ("Problem type", "Strategy", "Steps")]


def parse_strategy(text: str) -> Strategy:
    """The strategy in a reply to extraction_prompt. parse_strategy(format_strategy(s)) == s for every s. The steps are marked
    (a), (b), ... as in the paper [tab 4], or 1., 2., ... as in our text form. Empty lines and blanks around a line do no harm;
    anything else raises ValueError. It is better to lose a candidate, of which there are five, than to guess which lines of a
    reply are the strategy. The form is not JSON because of LaTeX: a JSON string reads \\frac as a form feed and "rac", and few
    models write \\\\frac every time."""
    lines = "\n".join(line.strip() for line in text.split("\n") if line.strip())
    head = re.match("{}(.*)\n{}(.*)\n{}\n".format(*LABELS), lines)
    if not head:
        raise ValueError(f"strategy reply: expected lines with the three labels, then the steps, got {text[:200]!r}")
    steps = []
    for i, line in enumerate(lines[head.end() :].split("\n"), start=1):
        letter = re.escape(chr(ord("a") + i - 1))
        step = re.fullmatch(rf"(?:\({letter}\)|{i}\.)(.*)", line)
        if not step:
            raise ValueError(f"strategy reply: expected step {i}, got {line[:200]!r}")
        steps.append(step[1].strip())
    return Strategy(head[1].strip(), head[2].strip(), tuple(steps))


# ------------------------------------------------------------------------------------------ prompts for the policy

# The trap: the guided and the unguided policy score the SAME response tokens, and d_t compares them [eq 3]. So what comes
# right before the response must be the same on both sides. Both prompts are one user message that ends with the untouched
# problem and INSTRUCTION; the guided one begins with one more block [§3.1], and that is the only difference. With two
# endings, the first tokens of a response would differ because of the template, and d_t there would measure the template.


@dataclass(frozen=True)
class Template:
    """The wording of the policy's prompts. {problem} and {strategy} are replaced, the latter by format_strategy's text.
    ValueError unless `prompt` has {problem} once, `guided` has both once, and both are the same from {problem} to the end."""

    prompt: str = "{problem}\n\n" + INSTRUCTION
    guided: str = GUIDE + "\n{strategy}\n\n{problem}\n\n" + INSTRUCTION
    system: str = ""  # no system message: if the chat template has a default of its own, that one applies

    def __post_init__(self):
        fields = {"prompt": ["problem"], "guided": ["strategy", "problem"], "system": []}
        for name, expected in fields.items():
            if re.findall(SLOT, getattr(self, name)) != expected:
                places = " and then ".join(f"{{{field}}} once" for field in expected) or "neither {problem} nor {strategy}"
                raise ValueError(f"template field {name!r}: expected {places}, got {getattr(self, name)!r}")
        ends = [text[text.index("{problem}") :] for text in (self.prompt, self.guided)]
        if ends[0] != ends[1]:
            raise ValueError(f"template: both prompts must be the same from {{problem}} on, got {ends[0]!r} and {ends[1]!r}")

    @classmethod
    def from_dict(cls, data: Mapping) -> "Template":
        """From {"prompt": str, "guided": str, "system": str}, each of them optional; ValueError for anything else."""
        texts = isinstance(data, Mapping) and all(isinstance(text, str) for text in data.values())
        if not texts or data.keys() - {"prompt", "guided", "system"}:
            raise ValueError(f"template: expected an object with the texts prompt, guided and system, got {data!r}")
        return cls(**data)

    def messages(self, text: str, **values: str) -> list[dict[str, str]]:
        # in one pass: a problem may have "{strategy}" in it
        user = [{"role": "user", "content": re.sub(SLOT, lambda slot: values[slot[1]], text)}]
        return [{"role": "system", "content": self.system}, *user] if self.system else user


DEFAULT = Template()


def auto_messages(problem: str, template: Template = DEFAULT) -> list[dict[str, str]]:
    """The chat messages of the unguided prompt, pi(.|q)."""
    return template.messages(template.prompt, problem=problem)


def guided_messages(problem: str, strategy: Strategy, template: Template = DEFAULT) -> list[dict[str, str]]:
    """The chat messages of the guided prompt, pi(.|q, s): with the strategy before the problem [§3.1]."""
    return template.messages(template.guided, problem=problem, strategy=format_strategy(strategy))


if __name__ == "__main__":
    from tools.extract import run  # imported here: the module must stay free of siblings

    run()
