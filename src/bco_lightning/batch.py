"""What flows from the data to the loss: a row, its tokens, a batch, and the rewards of a batch.

Shape legend of the package: ``B`` rows of a micro-batch, ``S`` its packed tokens, ``T`` tokens of its longest row,
``N`` its completion tokens, ``H`` hidden size, ``V`` vocabulary size, ``K`` quantities, ``C`` the two classes
(thumbs-up, thumbs-down). Token ids, places and numbers are int64, masks bool, log-probs, rewards and weights float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

Message = dict[str, Any]


@dataclass(frozen=True)
class FeedbackRow:
    """One rated completion, as validated messages."""

    prompt: list[Message]  # the conversation before the completion, oldest message first; never empty
    completion: list[Message]  # the first and the last are the assistant's
    thumbs_up: bool | None  # None where no label was asked for
    place: str  # file and line, for messages
    tools: list[dict[str, Any]] | None = None  # JSON schemas of functions that the assistant could call
    template_options: Mapping[str, Any] = field(default_factory=dict)  # such as {"enable_thinking": False}
    num_trailing: int = 0  # messages after the rated turn, which are left out
    score: float | None = None  # from 0 to 1, of a row that a rule rates


@dataclass(frozen=True)
class LeftOut:
    """A row that was read and is not used, for a reason that is no fault, and is counted under it."""

    place: str
    reason: str  # a few words that are the same for every such row


@dataclass(frozen=True)
class TokenizedSample:
    """One row as token ids, at most ``data.max_length``."""

    input_ids: list[int]
    completion_mask: list[bool]  # True for what carries loss: what the assistant said in the completion, and its end
    prompt_cut: bool = False
    completion_cut: bool = False  # such a row has no end token
    prompt_length: int = 0  # both lengths are those before anything was cut
    completion_length: int = 0
    images: tuple[bytes, ...] = ()  # as `data/images.py` keeps them, in the order of their tokens
    prompt_images: int = 0  # how many of them stand in the prompt


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens of a packed micro-batch, from ``start`` to before ``stop``."""

    start: int
    stop: int
    prefix: Span | None = None  # whose tokens come before these in their row: a prompt that several rows share

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
    """A micro-batch of rated completions, packed: one row after the other, a shared prompt once."""

    input_ids_S: Tensor
    position_ids_S: Tensor  # place of each token in its row, from 0
    predictors_N: Tensor  # for each token that carries loss, the place in S of the token before it in its row
    targets_N: Tensor  # the tokens that carry loss
    rows_N: Tensor  # the row in B of each token that carries loss
    thumbs_up_B: Tensor  # False too where no label is known
    importance_weights_B: Tensor
    row_ids_B: Tensor  # position of each row in its data set
    sources_B: Tensor  # number of each row's source among those of its data set
    spans: tuple[Span, ...]  # what S is made of, in order and without gaps
    row_spans: tuple[Span, ...]  # the span that each row ends with
    reference_log_probs_B: Tensor | None = None  # in nats, where they are known
    prompt_keys_B: Tensor | None = None  # the same for the same messages and tools; where they are known
    prompts: tuple[str, ...] | None = None  # their words, where they are wanted
    scores_B: Tensor | None = None  # from 0 to 1, of rows that were rated by a rule
    paired: bool = False  # rows 2n and 2n + 1 are the two answers of a pair
    images_B: tuple[Mapping[str, Tensor], ...] | None = None  # what the model sees of each row, where it sees any
    unrelated: FeedbackBatch | None = None  # the prompts of some rows, each with the answer of another row

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
        return len(self.input_ids_S)

    @property
    def num_completion_tokens(self) -> int:
        """Tokens that carry loss."""
        return len(self.targets_N)

    @property
    def completion_lengths(self) -> Tensor:
        """Tokens that carry loss, of each row."""
        return self.row_ids_B.new_zeros(len(self)).index_add_(0, self.rows_N, torch.ones_like(self.rows_N))

    def to(self, device: torch.device | str, **kwargs: Any) -> FeedbackBatch:
        """Moves every tensor to ``device``; Lightning calls this. The host waits for no copy to a GPU."""
        kwargs.setdefault("non_blocking", torch.device(device).type == "cuda")
        return self._with_each(lambda tensor: tensor.to(device, **kwargs))

    def pin_memory(self) -> FeedbackBatch:
        """Pins every tensor for faster copies to a GPU; the data loader calls this."""
        return self._with_each(Tensor.pin_memory)

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> FeedbackBatch:
        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        if self.images_B is not None:
            changed["images_B"] = tuple({name: change(value) for name, value in row.items()} for row in self.images_B)
        if self.unrelated is not None:
            changed["unrelated"] = self.unrelated._with_each(change)
        return replace(self, **changed)


def micro_batches_of(batch: FeedbackBatch | list[FeedbackBatch]) -> list[FeedbackBatch]:
    """Those of what a loader gives, which is cut where ``data.tokens_per_micro_batch`` says so."""
    return batch if isinstance(batch, list) else [batch]


@dataclass
class ScoredRows:
    """What the model makes of a micro-batch, detached, one value per row; log-probs, rewards and losses in nats."""

    thumbs_up_B: Tensor
    policy_log_probs_B: Tensor  # of the completion
    reference_log_probs_B: Tensor
    rewards_B: Tensor  # beta times the difference
    losses_B: Tensor  # before class weights
    completion_lengths_B: Tensor  # tokens that carry loss
    row_ids_B: Tensor  # position of each row in its data set
    sources_B: Tensor
    reward_shift: float  # what the losses were computed with: a row rewarded more counts as thumbs-up
    baseline_sums: Mapping[str, Tensor] = field(default_factory=dict)  # for what else the objective keeps
    routing_sums: Mapping[str, Tensor] = field(default_factory=dict)  # how evenly tokens went to experts, if any

    @classmethod
    def joined(cls, parts: list[ScoredRows]) -> ScoredRows:
        """The rows of several micro-batches, one after the other."""
        first, joined = parts[0], dict[str, Any]()
        for name, value in vars(first).items():
            if isinstance(value, Tensor):
                joined[name] = torch.cat([getattr(part, name) for part in parts])
            elif isinstance(value, Mapping):  # of sums
                joined[name] = {key: sum(getattr(part, name)[key] for part in parts) for key in value}
        return replace(first, **joined)


@dataclass(frozen=True)
class StepSummary:
    """One optimizer step, with all its micro-batches, made before the optimizer and the reward shift move.

    Sums of rewards, in nats, and numbers of rows are those of all processes.
    """

    step: int  # counted from 1
    rows: tuple[ScoredRows, ...]  # of this process, by micro-batch; none where the step is left out
    reward_shift: float  # before the step
    sum_up: float
    num_up: float
    sum_down: float
    num_down: float
    totals: Mapping[str, Any]  # what callbacks had to tell, summed over processes: numbers, or tensors of several
    baseline_sums: Mapping[str, float] = field(default_factory=dict)

    def left_out(self) -> StepSummary:
        """The same step as one that nothing is learned from."""
        return replace(self, rows=(), sum_up=0.0, num_up=0.0, sum_down=0.0, num_down=0.0, baseline_sums={})
