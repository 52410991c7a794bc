"""The frozen reference: the policy as it came in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor
from transformers import PreTrainedModel

from bco_lightning.batch import FeedbackBatch
from bco_lightning.models.adapters import REFERENCE_ADAPTER
from bco_lightning.models.log_probs import completion_log_probs
from bco_lightning.parallel.sharding import final_dtype, is_sharded


class Reference:
    """Log-probabilities under the frozen reference.

    It is no module on purpose: a registered reference would enter checkpoints, the optimizer and every wrapper.

    Where it is not the policy with its adapter off, it is a model of its own, which is there only while it is needed:
    made when first asked for, as a copy of the policy while that is as it came in, later by loading it again.

    Args:
        policy: The policy, as it came in.
        load: Loads the reference.
        separate: Whether the reference is another model than the policy as it came in.
        copied: Whether a model of its own may be a copy of the policy, while that is as it came in.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        load: Callable[[], PreTrainedModel],
        *,
        separate: bool = False,
        copied: bool = True,
    ) -> None:
        self._policy, self._load, self._separate, self._copied = policy, load, separate, copied
        self._model: PreTrainedModel | None = None
        self.watch_policy()

    @property
    def is_policy_without_adapter(self) -> bool:
        """Whether the reference is the policy with its trained adapter switched off, which takes no memory."""
        return not self._separate and hasattr(self._policy, "peft_config")

    @property
    def own_model(self) -> PreTrainedModel | None:
        """The reference's own model, while it is there."""
        return self._model

    @property
    def policy_is_pristine(self) -> bool:
        """Whether the policy still is as it came in: nothing was loaded into it, and nothing has changed it."""
        return self._pristine and self._num_changes() == self._num_changes_before

    def watch_policy(self) -> None:
        """Takes the policy's weights as they are now for those that it came in with."""
        self._pristine, self._num_changes_before = True, self._num_changes()

    def policy_moves(self) -> None:
        """Says that the policy is about to change, by means that cannot be seen from its tensors."""
        self._pristine = False

    def hold(self) -> None:
        """Has a model of its own from now on, if the reference is not the policy with its adapter off."""
        if self.is_policy_without_adapter or self._model is not None:
            return
        copied = self._copied and self.policy_is_pristine and not self._separate
        model = copy.deepcopy(self._policy) if copied else self._load()
        self._model = model.requires_grad_(False).eval()

    def release(self) -> None:
        """Gives back the memory of the reference's own model."""
        self._model = None

    @torch.no_grad()
    def log_probs(self, batch: FeedbackBatch, trunk_states_SH: Tensor | None = None) -> Tensor:
        """Log-probability of each completion, shape ``(B,)``, float32, in nats, without a gradient.

        Args:
            batch: A packed micro-batch on the policy's device.
            trunk_states_SH: What the policy's trunk makes of it, if the policy is without its trunk now.
        """
        with self.active_model() as model:
            shared = trunk_states_SH if self.is_policy_without_adapter else None
            return completion_log_probs(model, batch, trunk_states_SH=shared)

    @torch.no_grad()
    def log_probs_by_policy(self, batch: FeedbackBatch) -> Tensor:
        """Like :meth:`log_probs`, by the policy itself as long as it is the reference: no second model is made."""
        return completion_log_probs(self._policy, batch) if self._is_policy else self.log_probs(batch)

    @property
    def _is_policy(self) -> bool:
        return not (self.is_policy_without_adapter or self._separate) and self.policy_is_pristine

    def named_parameters(self) -> list[tuple[str, Tensor]]:
        """The frozen weights that make up the reference."""
        if self.is_policy_without_adapter:
            return [(name, value) for name, value in self._policy.named_parameters() if not value.requires_grad]
        if self.policy_is_pristine and not self._separate:
            return [(name, _frozen(value)) for name, value in self._policy.named_parameters()]
        self.hold()
        return list(self._model.named_parameters())  # type: ignore[union-attr]

    @contextmanager
    def active_model(self) -> Iterator[PreTrainedModel]:
        """The reference as a model: one of its own, or the policy with its trained adapter switched off."""
        self.hold()
        if self._model is not None:
            yield self._model if is_sharded(self._model) else self._model.to(next(self._policy.parameters()).device)
        else:
            with _without_trained_adapter(self._policy):
                yield self._policy

    @contextmanager
    def pristine_model(self) -> Iterator[PreTrainedModel]:
        """Like :meth:`active_model`, the policy itself as long as it is the reference: no second model is made."""
        if self._is_policy:
            yield self._policy
        else:
            with self.active_model() as model:
                yield model

    def _num_changes(self) -> int:
        """PyTorch counts the changes of a tensor in place, whoever makes them; a move to another device is none."""
        if is_sharded(self._policy):
            return 0  # gathering weights is a change too
        return sum(parameter._version for parameter in self._policy.parameters())


def _frozen(parameter: Tensor) -> Tensor:
    frozen = parameter.detach()
    frozen.final_dtype = final_dtype(parameter)  # type: ignore[attr-defined]
    return frozen


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
