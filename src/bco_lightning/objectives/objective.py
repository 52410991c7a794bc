"""What an objective is: losses of rated answers, and what it keeps from step to step; no model is needed for either."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bco_lightning.objectives.baselines import DecayedMeans, RewardShift


@dataclass(eq=False)
class RatedAnswers:
    """What an objective may know of the rows of a micro-batch; log-probs are natural, summed over completion tokens.

    Args:
        policy_log_probs_B: Under the policy, shape ``(B,)``, float32 or float64, with gradient.
        reference_log_probs_B: Under the frozen reference, shape ``(B,)``.
        thumbs_up_B: Bool, shape ``(B,)``.
        beta: Scale of the implicit reward.
        lengths_B: Completion tokens that carry loss, shape ``(B,)``.
        importance_weights_B: Density ratios of the prompts of thumbs-down rows, shape ``(B,)``; 1 each if left out.
        others_B: Place in ``B`` of the other answer of each row's pair, int64, -1 where it is not there; without it,
            rows are no pairs.
        scores_B: Numbers that rate the rows, shape ``(B,)``.
        prompt_keys_B: The same int64 for the same prompt, shape ``(B,)``.
        unrelated_log_ratios_U: Log-ratios of policy and reference, in nats, for answers to other prompts than their
            own, shape ``(U,)``, without gradient.
    """

    policy_log_probs_B: Tensor
    reference_log_probs_B: Tensor
    thumbs_up_B: Tensor
    beta: float
    lengths_B: Tensor | None = None
    importance_weights_B: Tensor | None = None
    others_B: Tensor | None = None
    scores_B: Tensor | None = None
    prompt_keys_B: Tensor | None = None
    unrelated_log_ratios_U: Tensor | None = None

    log_ratios_B: Tensor = field(init=False)  # of policy and reference, in nats, with gradient
    rewards_B: Tensor = field(init=False)  # implicit rewards: beta times these

    def __post_init__(self) -> None:
        self.log_ratios_B = self.policy_log_probs_B - self.reference_log_probs_B
        self.rewards_B = self.beta * self.log_ratios_B

    def tokens(self) -> Tensor:
        """Completion tokens of each row, at least 1.

        Raises:
            ValueError: If lengths were not given.
        """
        if self.lengths_B is None:
            raise ValueError("expected lengths_B, for an objective that divides by them; found None.")
        return self.lengths_B.clamp(min=1)


class Objective:
    """What a run trains on: a loss for each row, and baselines that stand still within an optimizer step.

    The loss of a step is a mean over rows, weighted by :func:`~bco_lightning.objectives.class_weights_of` where
    ``model.class_weights`` is ``auto``: the sum of the two class means, for losses of pairs the mean over pairs.

    Each objective keeps a :class:`RewardShift`, which says where rewards of the two classes meet; ``bco`` trains with
    it, others show it. What else one ``keeps`` is in ``baselines``, by name.

    Args:
        decay: How much of what baselines have summed up is left after an optimizer step.
    """

    takes_pairs: bool = False  # and nothing else; both answers of one are in a micro-batch
    takes_scores: bool = False  # instead of thumbs
    takes_class_weights: bool = True
    takes_prompts: bool = False  # all answers to one prompt in a micro-batch
    takes_unrelated: bool = False  # log-ratios of answers to other prompts
    takes_one_class: bool = False  # is content with one
    takes_importance: bool = False  # weights of thumbs-down rows
    is_centered: bool = False  # at a threshold of 0 nats
    keeps: tuple[str, Callable[[float], DecayedMeans]] | None = None  # a name, and what makes it of a decay
    sum_names: tuple[str, ...] = ()  # of what ``sums`` gives: the sums that it keeps, then their counts

    def __init__(self, decay: float = 0.9) -> None:
        self.reward_shift = RewardShift(decay)
        self.baselines: dict[str, Any] = {self.keeps[0]: self.keeps[1](decay)} if self.keeps else {}

    @property
    def threshold(self) -> float:
        """The reward in nats above which a row counts as thumbs-up; it stands still within a step."""
        return 0.0 if self.is_centered else self.reward_shift.value

    def losses(self, rows: RatedAnswers) -> Tensor:
        """The loss of each row, shape ``(B,)``, before class weights; of a row that lacks its pair it is NaN."""
        raise NotImplementedError

    def sums(self, rows: RatedAnswers) -> dict[str, Tensor]:
        """What the baselines learn of a micro-batch, beyond the reward shift: float64 scalars without gradient.

        They are added over micro-batches and processes before :meth:`update`.
        """
        return {}

    def update(self, sums: Mapping[str, float]) -> None:
        """Takes in one optimizer step by what :meth:`sums` gave of it; nothing where the step was left out."""
        values = [sums[name] for name in self.sum_names]
        for baseline in self.baselines.values():
            totals, counts = values[: baseline.number], values[baseline.number :]
            baseline.take_in(totals, counts * (len(totals) // len(counts)))  # several sums may share a count

    def learn(self, rows: RatedAnswers) -> None:
        """Moves reward shift and baselines by one optimizer step, where all its rows are at hand, as in a toy."""
        rewards, learned = sums_of_rewards(rows.rewards_B, rows.thumbs_up_B), self.sums(rows)
        self.reward_shift.update(**{name: float(value) for name, value in rewards.items()})
        self.update({name: float(value) for name, value in learned.items()})

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers of the baselines, by name; the reward shift is kept beside them."""
        return {name: baseline.state_dict() for name, baseline in self.baselines.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the numbers over."""
        for name, baseline in self.baselines.items():
            baseline.load_state_dict(state[name])


def weighed(losses_B: Tensor, rows: RatedAnswers) -> Tensor:
    """Losses times importance weights, which are for thumbs-down rows: how much likelier their prompt is among others.

    Source:
        arXiv:2404.04656v1, "Underlying distribution matching"; later versions of the paper leave it out.
    """
    weights_B = rows.importance_weights_B
    return losses_B if weights_B is None else losses_B * torch.where(rows.thumbs_up_B, 1.0, weights_B)


def sums_of_rewards(rewards_B: Tensor, thumbs_up_B: Tensor) -> dict[str, Tensor]:
    """Sum, in nats and float64, and number of the rewards of thumbs-up, then of thumbs-down rows."""
    rewards_B = rewards_B.detach().double()
    told: dict[str, Tensor] = {}
    for name, chosen_B in (("up", thumbs_up_B), ("down", ~thumbs_up_B)):
        told |= {f"sum_{name}": torch.where(chosen_B, rewards_B, 0).sum(), f"num_{name}": chosen_B.sum()}
    return told
