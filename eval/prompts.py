"""From an example to tokens: a template or the tokenizer's chat template, and the answer apart from the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from lorazip.errors import UsageError
from lorazip.eval.tasks import Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE = "### Instruction:\n{definition}\n\n### Input:\n{input}\n\n### Response:\n"


_MARK = "lorazip-answer"  # found again in what a chat template writes


@dataclass(frozen=True)
class Prompter:
    """How a task is put to a model.

    Attributes:
        tokenizer: the base model's own, with its special tokens.
        template: text with {input} and perhaps {definition}. For a task without a definition, the paragraphs that
            mention {definition} are left out.
        chat: use the tokenizer's chat template: definition and input are one message of the user, and a solved
            example's output is one of the assistant.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str = TEMPLATE
    chat: bool = False

    def __post_init__(self) -> None:
        if "{input}" not in self.template:
            raise UsageError("the template has no {input} (default: see lorazip eval --help)")
        if self.chat and not self.tokenizer.chat_template:
            raise UsageError("this model's tokenizer has no chat template (leave --chat out)")
        if self.tokenizer.eos_token_id is None:
            raise UsageError("this model's tokenizer has no end token, so no answer could end")

    @cached_property
    def end(self) -> int:
        """The token that ends an answer: the tokenizer's end token, or what its chat template writes after one."""
        if self.chat:
            answered = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
            text = str(self.tokenizer.apply_chat_template(answered, tokenize=False))
            after = self._tokens(text.rpartition(_MARK)[2])
            if after:
                return after[0]
        return int(self.tokenizer.eos_token_id)

    def text(self, task: Task, example: Example, shots: Sequence[Example] = ()) -> str:
        """The prompt, after solved examples in the same form, separated by empty lines.

        The definition is said once, before the first.
        """
        asked = self._asked(task, example, shots)
        solved = [f"{text}{shot.output}" for text, shot in zip(asked, shots, strict=False)]
        return "\n\n".join([*solved, asked[-1]])

    def prompt(self, task: Task, example: Example, shots: Sequence[Example] = ()) -> tuple[int, ...]:
        """Its tokens, with the special tokens that this tokenizer puts at the start; none of those at the end.

        Raises:
            UsageError: the chat template refuses the conversation.
        """
        if not self.chat:
            return (*self._start, *self._tokens(self.text(task, example, shots)))
        turns = []
        for text, shot in zip(self._asked(task, example, shots), (*shots, None), strict=True):
            turns.append({"role": "user", "content": text})
            if shot is not None:
                turns.append({"role": "assistant", "content": shot.output})
        try:
            made = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise UsageError(f"this model's chat template refuses: {error} (leave --chat out)") from error
        return self._tokens(str(made))  # the chat template writes the special tokens itself

    def answer(self, text: str, end: bool = True) -> tuple[int, ...]:
        """The tokens of an answer, tokenised apart from the prompt, and the end token."""
        tokens = self._tokens(text)
        return (*tokens, self.end) if end else tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens as text, special ones left out."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    @cached_property
    def _start(self) -> tuple[int, ...]:
        bare, whole = self._tokens("a"), tuple(self.tokenizer("a")["input_ids"])
        first = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        return whole[:first]

    def _tokens(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _asked(self, task: Task, example: Example, shots: Sequence[Example]) -> list[str]:
        """The question of each shot and of the example."""
        return [
            self._filled(task.definition if i == 0 else None, one.input)
            for i, one in enumerate((*shots, example))
        ]

    def _filled(self, definition: str | None, text: str) -> str:
        template = "{definition}\n\n{input}" if self.chat else self.template
        if definition is None:
            template = _without_definition(template)
        # Not str.format: a template may hold other braces, and what is filled in is never looked at again.
        return text.join(part.replace("{definition}", definition or "") for part in template.split("{input}"))


def _without_definition(template: str) -> str:
    """Leave out the paragraphs that mention {definition}; of one with {input}, only such lines, or only the word."""
    for gap in ("\n\n", "\n"):
        kept = [part for part in template.split(gap) if "{definition}" not in part or "{input}" in part]
        template = gap.join(kept)
    return template
