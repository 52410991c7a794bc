"""What flows from the data to the loss: a row, its tokens, a batch, and the rewards of a batch.

Shape legend of the package: ``B`` rows of a micro-batch, ``T`` tokens of its longest row, ``N`` completion tokens of a
micro-batch, ``H`` hidden size, ``V`` vocabulary size, ``K`` quantities, ``C`` the two classes (thumbs-up, thumbs-down).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
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
    """

    prompt: list[Message]
    completion: list[Message]
    thumbs_up: bool | None
    place: str


@dataclass(frozen=True)
class TokenizedSample:
    """One row as token ids.

    Args:
        input_ids: Prompt and completion, at most ``max_length`` tokens.
        completion_mask: ``True`` for the tokens that carry loss: what the assistant said in the completion, and its
            end token.
        prompt_cut: Whether tokens of the prompt were cut.
        completion_cut: Whether tokens of the completion were cut; such a row has no end token.
    """

    input_ids: list[int]
    completion_mask: list[bool]
    prompt_cut: bool = False
    completion_cut: bool = False


@dataclass
class FeedbackBatch:
    """A padded micro-batch of unpaired rated completions.

    Args:
        input_ids_BT: Token ids, padded on the right; int64.
        attention_mask_BT: 1 for tokens, 0 for padding; int64.
        completion_mask_BT: ``True`` for tokens that carry loss; bool.
        thumbs_up_B: ``True`` where the user gave thumbs-up (``False`` too where no label is known); bool.
        importance_weights_B: Weight of each row's loss, dimensionless; float32.
        row_ids_B: Position of each row in its data set; int64.
    """

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    completion_mask_BT: Tensor
    thumbs_up_B: Tensor
    importance_weights_B: Tensor
    row_ids_B: Tensor

    def __len__(self) -> int:
        return int(self.input_ids_BT.shape[0])

    def to(self, device: torch.device | str, **kwargs: Any) -> FeedbackBatch:
        """Moves every tensor to ``device``; Lightning calls this."""
        return FeedbackBatch(**{f.name: getattr(self, f.name).to(device, **kwargs) for f in fields(self)})

    def pin_memory(self) -> FeedbackBatch:
        """Pins every tensor for faster copies to a GPU; the data loader calls this."""
        return FeedbackBatch(**{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})


@dataclass
class RewardedRows:
    """What the model makes of a micro-batch, detached, one value per row.

    Args:
        thumbs_up_B: ``True`` where the user gave thumbs-up; bool.
        policy_log_probs_B: Log-probability of the completion under the policy, in nats; float32.
        reference_log_probs_B: The same under the reference.
        rewards_B: Implicit rewards, beta times the difference, in nats; float32.
        losses_B: Loss of each row before class weights, in nats.
        completion_lengths_B: Number of tokens that carry loss; int64.
        row_ids_B: Position of each row in its data set; int64.
    """

    thumbs_up_B: Tensor
    policy_log_probs_B: Tensor
    reference_log_probs_B: Tensor
    rewards_B: Tensor
    losses_B: Tensor
    completion_lengths_B: Tensor
    row_ids_B: Tensor
