"""What flows from the data to the loss: a row, its tokens, a batch, and the rewards of a batch.

Shape legend of the package: ``B`` rows of a micro-batch, ``S`` its packed tokens, ``T`` tokens of its longest row,
``N`` its completion tokens, ``H`` hidden size, ``V`` vocabulary size, ``K`` quantities, ``C`` the two classes
(thumbs-up, thumbs-down).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

Message = dict[str, Any]


@dataclass(frozen=True)
class FeedbackRow:
    """One rated completion, as validated messages.

    Args:
        prompt: The conversation before the completion, oldest message first; never empty.
        completion: The rated messages; the first and the last are the assistant's.
        thumbs_up: ``True``, ``False``, or ``None`` where no label was asked for.
        place: File and line, for messages.
        tools: JSON schemas of the functions that the assistant could call, for the chat template.
        template_options: What else the chat template is told about this row, such as ``{"enable_thinking": False}``.
        num_trailing: Messages after the rated turn, which are left out.
    """

    prompt: list[Message]
    completion: list[Message]
    thumbs_up: bool | None
    place: str
    tools: list[dict[str, Any]] | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)
    num_trailing: int = 0


@dataclass(frozen=True)
class LeftOut:
    """A row that was read and is not used, for a reason that is no fault.

    Args:
        place: File and line.
        reason: Why, in a few words that are the same for every such row; it is counted under them.
    """

    place: str
    reason: str


@dataclass(frozen=True)
class TokenizedSample:
    """One row as token ids.

    Args:
        input_ids: Prompt and completion, at most ``max_length`` tokens.
        completion_mask: ``True`` for the tokens that carry loss: what the assistant said in the completion, and its
            end token.
        prompt_cut: Whether tokens of the prompt were cut.
        completion_cut: Whether tokens of the completion were cut; such a row has no end token.
        prompt_length: Tokens of the prompt before anything was cut.
        completion_length: Tokens of the completion before anything was cut.
    """

    input_ids: list[int]
    completion_mask: list[bool]
    prompt_cut: bool = False
    completion_cut: bool = False
    prompt_length: int = 0
    completion_length: int = 0


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens of a packed micro-batch.

    Args:
        start: Place of the first token.
        stop: Place after the last token.
        prefix: The span whose tokens come before these in their row: a prompt that several rows share.
    """

    start: int
    stop: int
    prefix: Span | None = None

    @property
    def context(self) -> int:
        """Number of tokens that come before the span's own."""
        return self.prefix.stop - self.prefix.start if self.prefix else 0

    @property
    def length(self) -> int:
        """Number of tokens up to the end of the span, those before its own included."""
        return self.context + self.stop - self.start

    def places(self) -> list[int]:
        """Places of all tokens up to the end of the span, in order."""
        before = self.prefix.places() if self.prefix else []
        return [*before, *range(self.start, self.stop)]


@dataclass
class FeedbackBatch:
    """A micro-batch of unpaired rated completions, packed: one row after the other, a shared prompt once.

    Args:
        input_ids_S: Token ids; int64.
        position_ids_S: Place of each token in its row, from 0; int64.
        predictors_N: For each token that carries loss, the place in ``S`` of the token before it in its row; int64.
        targets_N: The tokens that carry loss; int64.
        rows_N: The row in ``B`` of each token that carries loss; int64.
        thumbs_up_B: ``True`` where the user gave thumbs-up (``False`` too where no label is known); bool.
        importance_weights_B: Weight of each row's loss, dimensionless; float32.
        row_ids_B: Position of each row in its data set; int64.
        sources_B: Number of each row's source among those of its data set; int64.
        spans: What ``S`` is made of, in order and without gaps.
        row_spans: The span that each row ends with.
        reference_log_probs_B: Log-probability of each completion under the reference, in nats, float32, where it is
            known; else it is computed.
        prompt_keys_B: The key of each row's prompt, the same for the same messages and tools, where it is known; int64.
        prompts: The words of each row's prompt, where they are wanted.
    """

    input_ids_S: Tensor
    position_ids_S: Tensor
    predictors_N: Tensor
    targets_N: Tensor
    rows_N: Tensor
    thumbs_up_B: Tensor
    importance_weights_B: Tensor
    row_ids_B: Tensor
    sources_B: Tensor
    spans: tuple[Span, ...]
    row_spans: tuple[Span, ...]
    reference_log_probs_B: Tensor | None = None
    prompt_keys_B: Tensor | None = None
    prompts: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.row_spans)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row, prompt and completion."""
        return tuple(span.length for span in self.row_spans)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows; those of a shared prompt count for each of its rows."""
        return sum(self.lengths)

    @property
    def num_computed(self) -> int:
        """Tokens of the packed micro-batch; those of a shared prompt count once."""
        return int(self.input_ids_S.shape[0])

    @property
    def num_completion_tokens(self) -> int:
        """Tokens that carry loss."""
        return int(self.targets_N.shape[0])

    @property
    def completion_lengths(self) -> Tensor:
        """Tokens that carry loss, of each row; int64."""
        return self.row_ids_B.new_zeros(len(self)).index_add_(0, self.rows_N, torch.ones_like(self.rows_N))

    def to(self, device: torch.device | str, **kwargs: Any) -> FeedbackBatch:
        """Moves every tensor to ``device``; Lightning calls this."""
        return self._with_each(lambda tensor: tensor.to(device, **kwargs))

    def pin_memory(self) -> FeedbackBatch:
        """Pins every tensor for faster copies to a GPU; the data loader calls this."""
        return self._with_each(Tensor.pin_memory)

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> FeedbackBatch:
        tensors = [f.name for f in fields(self) if isinstance(getattr(self, f.name), Tensor)]
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in tensors}
        return replace(self, **changed)


@dataclass
class ScoredRows:
    """What the model makes of a micro-batch, detached, one value per row.

    Args:
        thumbs_up_B: ``True`` where the user gave thumbs-up; bool.
        policy_log_probs_B: Log-probability of the completion under the policy, in nats; float32.
        reference_log_probs_B: The same under the reference.
        rewards_B: Implicit rewards, beta times the difference, in nats; float32.
        losses_B: Loss of each row before class weights, in nats.
        completion_lengths_B: Number of tokens that carry loss; int64.
        row_ids_B: Position of each row in its data set; int64.
        sources_B: Number of each row's source; int64.
        reward_shift: The shift that the losses were computed with, in nats: a row rewarded more counts as thumbs-up.
    """

    thumbs_up_B: Tensor
    policy_log_probs_B: Tensor
    reference_log_probs_B: Tensor
    rewards_B: Tensor
    losses_B: Tensor
    completion_lengths_B: Tensor
    row_ids_B: Tensor
    sources_B: Tensor
    reward_shift: float

    def where(self, chosen_B: Tensor) -> ScoredRows:
        """The rows that a mask, a slice or indices choose."""
        chosen: dict[str, Any] = {n: value[chosen_B] for n, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **chosen)


@dataclass(frozen=True)
class StepSummary:
    """One optimizer step, with all its micro-batches, made before the optimizer and the reward shift move.

    Args:
        step: Its number, counted from 1.
        rows: The rows of this process, by micro-batch; none where the step is left out.
        reward_shift: The reward shift before the step, in nats.
        sum_up: Sum of the rewards of thumbs-up rows of all processes, in nats.
        num_up: Number of thumbs-up rows of all processes.
        sum_down: As ``sum_up``, of thumbs-down rows.
        num_down: As ``num_up``, of thumbs-down rows.
        totals: What callbacks had to tell, summed over processes.
    """

    step: int
    rows: tuple[ScoredRows, ...]
    reward_shift: float
    sum_up: float
    num_up: float
    sum_down: float
    num_down: float
    totals: Mapping[str, float]

    def left_out(self) -> StepSummary:
        """The same step as one that nothing is learned from."""
        return replace(self, rows=(), sum_up=0.0, num_up=0.0, sum_down=0.0, num_down=0.0)
