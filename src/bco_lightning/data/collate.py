"""Pack tokenized rows into a :class:`FeedbackBatch`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from bco_lightning.batch import FeedbackBatch, Span
from bco_lightning.data.order import cut

# Columns that batches are made of; those at the end are there once they are known.
COLUMNS = (
    "row_id", "input_ids", "completion_mask", "thumbs_up", "source", "prompt_key",
    "score", "reference_log_prob", "importance_weight", "images", "prompt_images", "seen",
)  # fmt: skip
_TOKENS = ("input_ids", "completion_mask")


def collate(
    samples: Sequence[Mapping[str, Any]],
    *,
    share_prompts: bool = True,
    paired: bool = False,
    with_unrelated: bool = False,
    images: Callable[[Any], Mapping[str, Tensor]] | None = None,
) -> FeedbackBatch:
    """Lays rows out one after the other, without padding; a prompt that several of them share is there once.

    Args:
        samples: Rows with ``input_ids``, ``completion_mask``, ``thumbs_up`` and ``row_id``; ``source`` where there are
            several; what else is known of them. The first token of a row is never scored, whatever its mask says.
        share_prompts: Whether to lay out a prompt once for all its rows.
        paired: Whether each two rows, one after the other, are the better and the worse answer of a pair.
        with_unrelated: Whether the second half of ``samples`` is there for its completions alone: each follows the
            prompt of the sample in its place in the first half, in ``unrelated``.
        images: What makes model inputs of the ``images`` of a sample, where it does not bring them as ``seen``.

    Example:
        >>> row = {"input_ids": [5, 6, 7], "completion_mask": [False, False, True], "thumbs_up": True, "row_id": 0}
        >>> batch = collate([row, {**row, "input_ids": [5, 6, 8]}])
        >>> batch.input_ids_S.tolist(), batch.position_ids_S.tolist(), batch.predictors_N.tolist()
        ([5, 6, 7, 8], [0, 1, 2, 2], [1, 1])
    """
    seen = [sample.get("seen") or (images(sample.get("images")) if images else {}) for sample in samples]
    if with_unrelated:
        samples = [{**sample, "seen": each} for sample, each in zip(samples, seen, strict=True)]
        half = len(samples) // 2
        unrelated = [_exchanged(*both) for both in zip(samples[:half], samples[half:], strict=True)]
        own = collate(samples[:half], share_prompts=share_prompts, paired=paired)
        return replace(own, unrelated=collate(unrelated, share_prompts=False))
    sharing: dict[tuple[int, ...], list[int]] = {}
    for number, sample in enumerate(samples):
        sharing.setdefault(prompt_of(sample), []).append(number)
    tokens: list[int] = []
    spans: list[Span] = []
    row_spans: dict[int, Span] = {}

    def lay_out(ids: Sequence[int], prefix: Span | None = None) -> Span:
        span = Span(len(tokens), len(tokens) + len(ids), prefix)
        tokens.extend(ids)
        spans.append(span)
        return span

    for prompt, rows in sharing.items():
        shared = lay_out(prompt) if share_prompts and len(rows) > 1 and prompt else None
        for number in rows:
            ids = samples[number]["input_ids"]
            row_spans[number] = lay_out(ids[len(prompt) :] if shared else ids, shared)
    scored = [
        (number, before, target)
        for number, sample in enumerate(samples)
        for before, target, carries_loss in zip(
            row_spans[number].places(), sample["input_ids"][1:], sample["completion_mask"][1:], strict=False
        )
        if carries_loss
    ]
    rows_N, predictors_N, targets_N = torch.tensor(scored, dtype=torch.int64).view(-1, 3).unbind(1)
    return FeedbackBatch(
        input_ids_S=torch.tensor(tokens, dtype=torch.int64),
        position_ids_S=torch.cat([torch.arange(span.context, span.length) for span in spans]),
        predictors_N=predictors_N.contiguous(),
        targets_N=targets_N.contiguous(),
        rows_N=rows_N.contiguous(),
        thumbs_up_B=torch.tensor([bool(sample["thumbs_up"]) for sample in samples]),
        importance_weights_B=torch.tensor([float(sample.get("importance_weight", 1)) for sample in samples]),
        row_ids_B=torch.tensor([sample["row_id"] for sample in samples]),
        sources_B=torch.tensor([sample.get("source", 0) for sample in samples]),
        spans=tuple(spans),
        row_spans=tuple(row_spans[number] for number in range(len(samples))),
        reference_log_probs_B=_known(samples, "reference_log_prob", torch.float32),
        prompt_keys_B=_known(samples, "prompt_key", torch.int64),
        prompts=tuple(sample["prompt"] for sample in samples) if samples and "prompt" in samples[0] else None,
        paired=paired,
        scores_B=_known(samples, "score", torch.float32),
        images_B=tuple(seen) if any(seen) else None,
    )


def collate_cut(
    samples: Sequence[Mapping[str, Any]], *, most_tokens: Any, padded: bool, whole_prompts: bool, **options: Any
) -> FeedbackBatch | list[FeedbackBatch]:
    """:func:`collate`, as micro-batches that compute so many tokens; pairs, or neighbours of one prompt, stay whole."""
    if not isinstance(most_tokens, int):
        return collate(samples, **options)
    own = samples[: len(samples) // (2 if options.get("with_unrelated") else 1)]
    lengths, shares = [len(sample["input_ids"]) for sample in own], options["share_prompts"]
    units = [sample["prompt_key"] if whole_prompts else n // (1 + options["paired"]) for n, sample in enumerate(own)]
    shared = [0, *(len(one) * (one == other) * shares for one, other in pairwise(map(prompt_of, own)))]
    ends = [n for n in range(1, len(own) + 1) if n == len(own) or units[n] != units[n - 1]]
    parts = cut(lengths, most_tokens, padded=padded, shared=shared, ends=ends)
    return [collate([*own[part], *samples[len(own) :][part]], **options) for part in parts]


def select_known(dataset: Dataset, names: Sequence[str]) -> Dataset:
    """A table with those of some columns that it has: one of text has none for images."""
    return dataset.select_columns([name for name in names if name in dataset.column_names])


def prompt_of(sample: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens of a row before the first that carries loss; without any, all but its last, which starts a span."""
    mask = sample["completion_mask"]
    return tuple(sample["input_ids"][: next((place for place, loss in enumerate(mask) if loss), len(mask) - 1)])


def images_of_prompt(sample: Mapping[str, Any]) -> Any:
    """The images of a row that stand in its prompt."""
    return (sample.get("images") or ())[: sample.get("prompt_images")]


def has_later_images(sample: Mapping[str, Any]) -> bool:
    """Whether images of a row stand behind its prompt, whose tokens another row's completion has not."""
    return len(sample.get("images") or ()) > (sample.get("prompt_images") or 0)


def _exchanged(sample: Mapping[str, Any], other: Mapping[str, Any]) -> Mapping[str, Any]:
    """The prompt of one sample with the completion of another, as long as the longer; of weight 0 if prompts agree.

    Of weight 0 are those with images behind the prompt, too.
    """
    prompt, others = prompt_of(sample), prompt_of(other)
    tokens = {name: list(sample[name][: len(prompt)]) + list(other[name][len(others) :]) for name in _TOKENS}
    is_other = prompt != others and not (has_later_images(sample) or has_later_images(other))
    longest = max(len(sample["input_ids"]), len(other["input_ids"]))
    chosen = {name: ids[:longest] for name, ids in tokens.items()} if is_other else {n: sample[n] for n in _TOKENS}
    kept = {"seen": sample["seen"], "row_id": sample["row_id"]}
    return {**chosen, **kept, "thumbs_up": False, "importance_weight": float(is_other)}


def _known(samples: Sequence[Mapping[str, Any]], name: str, dtype: torch.dtype) -> Tensor | None:
    values = [sample.get(name) for sample in samples]
    return None if None in values else torch.tensor(values, dtype=dtype)
