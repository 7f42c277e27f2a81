"""What is learned, and how far off a model is: samples as padded batches, and loss and error of each of their tokens.

Hard labels: -log p of a token that is trained on. Logits (equal tokenizers): there the Kullback-Leibler divergence from
the teacher's distribution over its k most likely tokens and the rest as one,

    sum_j t_j (log t_j - log s_j) + t_rest (log t_rest - log s_rest).

The error is the total variation distance of the same two distributions, 1/2 sum |t - s|; for a hard label 1 - p, how
often a sampled token would be another. It is what epochs are compared by: an expert's answer to an odd input is a
guess, and one that was not guessed costs -log p without a bound, so the mean loss grows while the model still learns.

Answers stand at the end of left-padded rows, so logits are made of answers only: a vocabulary of 262 000 costs more
than a small model's layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorazip.eval.backend import Tops

NONE = -100  # a label that is not trained on, as everywhere in transformers


@dataclass(frozen=True)
class Sample:
    """One answer to learn.

    Attributes:
        prompt, answer: token ids; the answer's end token is its last.
        trained: of each answer token, whether it is trained on.
        tops: the teacher's most likely tokens at each answer token, for the loss on logits.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    trained: tuple[bool, ...]
    tops: Tops | None = None


def collated(samples: Sequence[Sample], pad: int) -> dict[str, Tensor]:
    """A batch. Rows are padded on the left, so that all answers end together.

    Returns:
        input_ids, attention_mask, position_ids (n, width); labels (n, 1 + longest answer), the first column of which is
        not trained on (transformers counts trained tokens from the second); with tops: tops, tops_logprobs
        (n, longest answer, k).
    """
    width = max(len(s.prompt) + len(s.answer) for s in samples)
    longest = max(len(s.answer) for s in samples)
    ids = torch.full((len(samples), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full((len(samples), 1 + longest), NONE, dtype=torch.long)
    for i, s in enumerate(samples):
        row = torch.tensor([*s.prompt, *s.answer])
        ids[i, -len(row) :] = row
        mask[i, -len(row) :] = 1
        labels[i, -len(s.answer) :] = torch.where(
            torch.tensor(s.trained), torch.tensor(s.answer), torch.tensor(NONE)
        )
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp_min(0),
        "labels": labels,
    }
    with_tops = [s.tops for s in samples if s.tops is not None]
    if len(with_tops) == len(samples):
        k = max(len(row) for tops in with_tops for row in tops.tokens)
        batch["tops"] = torch.zeros(len(samples), longest, k, dtype=torch.long)
        batch["tops_logprobs"] = torch.full((len(samples), longest, k), -torch.inf)
        for i, tops in enumerate(with_tops):
            n = len(tops.tokens)
            batch["tops"][i, -n:] = torch.tensor(tops.tokens)
            batch["tops_logprobs"][i, -n:] = torch.tensor(tops.logprobs)
    return batch


def losses(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The loss of every trained token of a batch, flat."""
    found = _student(model, batch)
    if "tops" not in batch:
        return -found[:, 0]
    share, teacher = _teacher(batch)
    inside = torch.where(share > 0, share * (teacher - found), 0).sum(1)
    tiny = torch.finfo(torch.float32).eps
    rest, own = (1 - share.sum(1)).clamp_min(tiny), (1 - found.exp().sum(1)).clamp_min(tiny)
    soft: Tensor = inside + rest * (rest.log() - own.log())
    return soft


def errors(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The error of every trained token of a batch, flat: 0 to 1."""
    own = _student(model, batch).exp()
    if "tops" not in batch:
        return 1 - own[:, 0]
    share, _ = _teacher(batch)
    both = (share - own).abs().sum(1) + (share.sum(1) - own.sum(1)).abs()  # the rest is what the k lack of 1
    return both / 2


def _student(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """(trained tokens, 1 or k): the model's log-probabilities of the labels, or of the teacher's likeliest tokens."""
    labels = batch["labels"][:, 1:]
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
        logits_to_keep=labels.shape[1] + 1,
        use_cache=False,
    ).logits[:, :-1]
    trained = labels != NONE
    wanted = batch["tops"][trained] if "tops" in batch else labels[trained][:, None]
    found: Tensor = logits[trained].float().log_softmax(-1).gather(1, wanted)
    return found


def _teacher(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(trained tokens, k) each: the teacher's probabilities, and their logarithms."""
    found = batch["tops_logprobs"][batch["labels"][:, 1:] != NONE]
    return found.exp(), found
