"""The frozen reference: the policy as it came in."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor
from transformers import PreTrainedModel

from bco_lightning.batch import FeedbackBatch
from bco_lightning.models.language_model import REFERENCE_ADAPTER
from bco_lightning.models.log_probs import completion_log_probs


class Reference:
    """Log-probabilities under the frozen reference.

    It is no module on purpose: a registered reference would enter checkpoints, the optimizer and every wrapper.

    Args:
        policy: The policy, before its first step.
        separate_model: A frozen model to use in place of the policy as it came in.
    """

    def __init__(self, policy: PreTrainedModel, separate_model: PreTrainedModel | None = None) -> None:
        self._policy = policy
        if separate_model is None and not hasattr(policy, "peft_config"):
            separate_model = copy.deepcopy(policy)
        self._model = separate_model.requires_grad_(False).eval() if separate_model is not None else None

    @torch.no_grad()
    def log_probs(self, batch: FeedbackBatch) -> Tensor:
        """Log-probability of each completion, shape ``(B,)``, float32, in nats, without a gradient."""
        with self.active_model() as model:
            return completion_log_probs(model, batch)

    @property
    def separate_model(self) -> PreTrainedModel | None:
        """The reference's own model, where it is not the policy with its adapter off."""
        return self._model

    def named_parameters(self) -> list[tuple[str, Tensor]]:
        """The frozen weights that make up the reference, named alike whatever trains beside them."""
        if self._model is not None:
            return list(self._model.named_parameters())
        return [(name, value) for name, value in self._policy.named_parameters() if not value.requires_grad]

    @contextmanager
    def active_model(self) -> Iterator[PreTrainedModel]:
        """The reference as a model: a separate one, or the policy with its trained adapter switched off."""
        if self._model is not None:
            yield self._model.to(next(self._policy.parameters()).device)
        else:
            with _without_trained_adapter(self._policy):
                yield self._policy


@contextmanager
def _without_trained_adapter(policy: PreTrainedModel) -> Iterator[None]:
    """Uses the adapter that the policy came in with, or none.

    PEFT's own ``disable_adapter`` and ``set_adapter`` also switch ``requires_grad``, which FSDP2 does not survive under
    mixed precision; the flags alone are enough for a forward pass.
    """
    layers = [module for module in policy.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    came_in_adapted = REFERENCE_ADAPTER in policy.peft_config
    trained = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        layer._disable_adapters = not came_in_adapted
        layer._active_adapter = [REFERENCE_ADAPTER] if came_in_adapted else layer._active_adapter
    try:
        yield
    finally:
        for layer, (active, disabled) in zip(layers, trained, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled
