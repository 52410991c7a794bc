"""What the package knows of an objective; a new one is one file beside this, and a line in ``OBJECTIVES``."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Baseline(Protocol):
    """The reward that an objective compares with, estimated from past optimizer steps."""

    @property
    def value(self) -> float:
        """The estimate in nats; it stands still within a step."""
        ...

    def update(self, *, sum_up: float, num_up: float, sum_down: float, num_down: float) -> None:
        """Takes in one optimizer step: sums of rewards, in nats, and numbers of rows of both classes."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for checkpoints and exports."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from :meth:`state_dict`."""
        ...


class Objective(Protocol):
    """Makes one loss per row of implicit rewards and thumbs."""

    baseline: Baseline

    @property
    def threshold(self) -> float:
        """The reward in nats above which a row counts as thumbs-up."""
        ...

    def losses(self, rewards_B: Tensor, thumbs_up_B: Tensor, importance_weights_B: Tensor) -> Tensor:
        """Losses in nats, ``(B,)``, with the gradient of ``rewards_B``, before class weights."""
        ...
