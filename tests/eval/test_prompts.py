"""Prompts: the text to the letter, and the tokens of tokenizers made here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorazip.errors import UsageError
from lorazip.eval.prompts import Prompter
from lorazip.eval.tasks import Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT = (
    "{{ '<s>' }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
REFUSES = "{{ raise_exception('only one turn') }}"


def tokenizer(
    start: str = "", end: str = "", chat: str | None = None, eos: str | None = "</s>"
) -> PreTrainedTokenizerBase:
    """One token a character. `start` and `end` are what it puts around a text, as Llama does `<s>`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    characters = [chr(c) for c in (*range(32, 127), 10, 0xE9)]
    vocabulary = {c: i for i, c in enumerate(["<unk>", "<s>", "</s>", *characters])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    around = [vocabulary[name] for name in (start, end) if name]
    if around:
        made.post_processor = processors.TemplateProcessing(
            single=f"{start} $A {end}".strip(), special_tokens=[(s, vocabulary[s]) for s in (start, end) if s]
        )
    found = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token=eos, chat_template=chat
    )
    return found


def task(definition: str | None = None, shots: tuple[Example, ...] = ()) -> Task:
    return Task("sums", definition, (example("1 + 1", "2"),), shots, None, "sums.jsonl")


def example(text: str, output: str = "") -> Example:
    return Example(text, output, (output,))


PLAIN = Prompter(tokenizer())
ALL = tuple(example(str(i), chr(65 + i)) for i in range(3))

# --- text -------------------------------------------------------------------------------------------------------------


def test_the_template_is_the_one_that_the_adapters_were_trained_with() -> None:
    found = PLAIN.text(task("Add."), example("1 + 1"))
    assert found == "### Instruction:\nAdd.\n\n### Input:\n1 + 1\n\n### Response:\n"


def test_without_a_definition_its_paragraph_is_left_out() -> None:
    assert PLAIN.text(task(), example("1 + 1")) == "### Input:\n1 + 1\n\n### Response:\n"


@pytest.mark.parametrize(
    ("template", "with_one", "without"),
    [
        ("{input}", "I", "I"),
        ("{definition}\n\n{input}\n\nA: ", "D\n\nI\n\nA: ", "I\n\nA: "),
        ("{definition}\n{input}\n\nAnswer:", "D\nI\n\nAnswer:", "I\n\nAnswer:"),
        ("{definition} Q: {input}\nA:", "D Q: I\nA:", " Q: I\nA:"),
        ("Q: {input}\nA, as said ({definition}):", "Q: I\nA, as said (D):", "Q: I"),
        ("{input}\n\nHow: {definition}\n\nA:", "I\n\nHow: D\n\nA:", "I\n\nA:"),
        ("{input} = {input}? {{}} {} {x}", "I = I? {{}} {} {x}", "I = I? {{}} {} {x}"),
        ("{definition}{definition}{input}", "DDI", "I"),
    ],
)
def test_other_templates(template: str, with_one: str, without: str) -> None:
    prompter = Prompter(PLAIN.tokenizer, template)
    assert prompter.text(task("D"), example("I")) == with_one
    assert prompter.text(task(), example("I")) == without


@settings(deadline=None)
@given(definition=st.text(min_size=1), text=st.text())
def test_what_is_filled_in_is_never_looked_at_again(definition: str, text: str) -> None:
    expected = f"### Instruction:\n{definition}\n\n### Input:\n{text}\n\n### Response:\n"
    assert PLAIN.text(task(definition), example(text)) == expected


def test_braces_are_letters() -> None:
    found = PLAIN.text(task("Use {input} and {0}."), example("{definition} {input} {x!r} %s"))
    assert found == (
        "### Instruction:\nUse {input} and {0}.\n\n### Input:\n{definition} {input} {x!r} %s\n\n### Response:\n"
    )


def test_solved_examples_go_before_and_the_definition_once() -> None:
    assert PLAIN.text(task("Add."), ALL[2], ALL[:2]) == (
        "### Instruction:\nAdd.\n\n### Input:\n0\n\n### Response:\nA"
        "\n\n### Input:\n1\n\n### Response:\nB"
        "\n\n### Input:\n2\n\n### Response:\n"
    )
    # An example that is shown too is still asked at the end.
    assert PLAIN.text(task(), ALL[0], ALL[:1]).endswith("A\n\n### Input:\n0\n\n### Response:\n")


@pytest.mark.parametrize("template", ["", "{definition}", "{ input }", "Q: {question}"])
def test_a_template_without_the_input_is_refused(template: str) -> None:
    with pytest.raises(UsageError, match=r"the template has no \{input\}"):
        Prompter(PLAIN.tokenizer, template)


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "end"), [("", ""), ("<s>", ""), ("", "</s>"), ("<s>", "</s>")])
def test_a_prompt_starts_as_the_tokenizer_says_and_never_ends(start: str, end: str) -> None:
    """An end token after the prompt would tell the model that all is said."""
    tokens = tokenizer(start, end)
    prompter = Prompter(tokens, "{input}")
    bos: list[Any] = [tokens.convert_tokens_to_ids(start)] if start else []
    letters = tokens.convert_tokens_to_ids(list("1+1\n"))
    assert prompter.prompt(task(), example("1+1\n")) == (*bos, *letters)
    assert prompter.prompt(task(), example("")) == tuple(bos)
    assert prompter.answer("1+1\n") == (*letters, tokens.eos_token_id)
    assert prompter.answer("1+1\n", end=False) == tuple(letters)
    assert prompter.answer("") == (tokens.eos_token_id,) == (prompter.end,)


@settings(deadline=None)
@given(text=st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30))
def test_an_answer_is_tokenised_apart_and_can_be_read_back(text: str) -> None:
    prompter = Prompter(BOS)
    assert prompter.decode(prompter.answer(text)) == text
    assert prompter.decode(prompter.prompt(task("D"), example(text))) == prompter.text(
        task("D"), example(text)
    )


BOS = tokenizer("<s>")


def test_answers_do_not_melt_into_the_prompt() -> None:
    """A tokenizer that joins letters gives prompt + answer other tokens than the two apart."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"</s>": 0, "a": 1, "b": 2, "ab": 3}
    made = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    prompter = Prompter(PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>"), "{input}")
    assert prompter.prompt(task(), example("ab")) == (3,)
    assert prompter.prompt(task(), example("a")) + prompter.answer("b") == (1, 2, 0)


def test_a_tokenizer_without_an_end_is_refused() -> None:
    with pytest.raises(UsageError, match="no end token"):
        Prompter(tokenizer(eos=None))


# --- chat -------------------------------------------------------------------------------------------------------------


def chatted(prompter: Prompter, *arguments: Any) -> str:
    return str(prompter.tokenizer.decode(prompter.prompt(*arguments), skip_special_tokens=False))


def test_chat_is_one_message_of_the_user() -> None:
    prompter = Prompter(tokenizer("<s>", chat=CHAT), chat=True)
    assert chatted(prompter, task("Add."), example("1 + 1")) == "<s>[user]Add.\n\n1 + 1</s>[assistant]"
    assert chatted(prompter, task(), example("{x}")) == "<s>[user]{x}</s>[assistant]"
    assert prompter.prompt(task(), example("1")).count(prompter.tokenizer.bos_token_id) == 1


def test_solved_examples_are_turns_of_a_chat() -> None:
    prompter = Prompter(tokenizer("<s>", chat=CHAT), chat=True)
    assert chatted(prompter, task("Name."), ALL[2], ALL[:2]) == (
        "<s>[user]Name.\n\n0</s>[assistant]A</s>[user]1</s>[assistant]B</s>[user]2</s>[assistant]"
    )


def test_an_answer_ends_as_turns_of_the_chat_do() -> None:
    turns = CHAT.replace("</s>{% endfor %}", "\n{% endfor %}")  # as Gemma, whose end token ends no turn
    assert Prompter(tokenizer("<s>", chat=turns), chat=True).answer("4") == (
        *PLAIN.answer("4", end=False),
        *PLAIN.answer("\n", end=False),
    )
    assert Prompter(tokenizer("<s>", chat=CHAT), chat=True).answer("4") == PLAIN.answer("4")
    bare = CHAT.replace("</s>{% endfor %}", "{% endfor %}")
    assert Prompter(tokenizer("<s>", chat=bare), chat=True).answer("4") == PLAIN.answer("4")


def test_chat_needs_a_template_that_takes_the_conversation() -> None:
    with pytest.raises(UsageError, match="has no chat template"):
        Prompter(tokenizer(), chat=True)
    with pytest.raises(UsageError, match="chat template refuses: only one turn"):
        Prompter(tokenizer(chat=REFUSES), chat=True).prompt(task(), example("1"))
