r"""Strategies: what one is, its text form, and the policy's two prompts. Read this file first.

A strategy says how to solve a KIND of problem: its type, the idea, and general steps, without any computation and
without the answer (SGPO, arXiv 2606.24064). A strong model writes it from its own solution; the policy gets it in the
guided prompt. Every wording and the text form are ours. It needs the standard library only: copy this file alone. The command,
`python strategy.py --data problems.jsonl --endpoint URL --model NAME --out strategies.jsonl`, is tools/extract.py's, with the
prompts to the strong model. A look:

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
    """One strategy. ValueError, naming the field and the value, unless every text is one line without blanks around it.

    type: the kind of problem, a phrase. strategy: the idea that solves it. steps: what to do, in order, at least one.
    """

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


# ------------------------------------------------------------------------------------------ prompts for the policy

# The trap: the guided and the unguided policy score the SAME response tokens, and d_t compares them [eq 3]. So what comes
# right before the response must be the same on both sides. Both prompts are one user message that ends with the untouched
# problem and INSTRUCTION; the guided one begins with one more block [§3.1], and that is the only difference. With two
# endings, the first tokens of a response would differ because of the template, and d_t there would measure the template.


@dataclass(frozen=True)
class Template:
    """The wording of the policy's prompts. {problem} and {strategy} are replaced, the latter by format_strategy's text.

    ValueError unless `prompt` has {problem} once, `guided` has both once, and both are the same from {problem} to the end.
    """

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
