"""From an example to tokens: a template or the tokenizer's chat template, and the answer apart from the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorazip.errors import UsageError
from lorazip.eval.tasks import Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE = "### Instruction:\n{definition}\n\n### Input:\n{input}\n\n### Response:\n"


@dataclass(frozen=True)
class Prompter:
    """How a task is put to a model.

    Attributes:
        tokenizer: the base model's own, with its special tokens.
        template: text with {input} and perhaps {definition}. For a task without a definition, the paragraphs that
            mention {definition} are left out.
        chat: use the tokenizer's chat template: definition and input are one message of the user.
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

    @property
    def end(self) -> int:
        """The token that ends an answer."""
        return int(self.tokenizer.eos_token_id)

    def text(self, task: Task, example: Example, shots: Sequence[Example] = ()) -> str:
        """The prompt, after solved examples in the same form, separated by empty lines.

        The definition is said once, before the first.
        """
        parts = []
        for i, one in enumerate((*shots, example)):
            text = self._filled(task.definition if i == 0 else None, one.input)
            parts.append(text if one is example else f"{text}{one.output}")
        return "\n\n".join(parts)

    def prompt(self, task: Task, example: Example, shots: Sequence[Example] = ()) -> tuple[int, ...]:
        """Its tokens, with the special tokens that this tokenizer puts at the start."""
        text = self.text(task, example, shots)
        if self.chat:
            made = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
            # The chat template writes the special tokens itself.
            return tuple(self.tokenizer(made, add_special_tokens=False)["input_ids"])
        return tuple(self.tokenizer(text)["input_ids"])

    def answer(self, text: str, end: bool = True) -> tuple[int, ...]:
        """The tokens of an answer, tokenised apart from the prompt, and the end token."""
        tokens = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return (*tokens, self.end) if end else tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens as text, special ones left out."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def _filled(self, definition: str | None, text: str) -> str:
        template = "{definition}\n\n{input}" if self.chat else self.template
        if definition is None:
            template = "\n\n".join(p for p in template.split("\n\n") if "{definition}" not in p)
        # Not str.format: a template may hold other braces, and what is filled in is never looked at again.
        before, _, after = template.partition("{input}")
        said = definition or ""
        return before.replace("{definition}", said) + text + after.replace("{definition}", said)
