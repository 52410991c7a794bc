"""The reference as a model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor
from transformers import PreTrainedModel

from bco_lightning.batch import FeedbackBatch
from bco_lightning.errors import LanguageModelError
from bco_lightning.identity import digest_of_tensor, digest_of_values
from bco_lightning.models.adapters import REFERENCE_ADAPTER
from bco_lightning.models.build import ModelBuilder, dtype_of_matrices
from bco_lightning.models.log_probs import completion_log_probs
from bco_lightning.parallel.collectives import gather_over_ranks
from bco_lightning.parallel.sharding import final_dtype, is_sharded


class Reference:
    """The reference as a model.

    It is no module on purpose: a registered reference would enter checkpoints, the optimizer and every wrapper.

    Where it is not the policy with its adapter off, it is a model of its own, which is there only while it is needed:
    a copy of the policy while that is as it came in, later it is loaded again.

    Args:
        policy: The policy, as it came in.
        builder: Loads the reference.
        trainer: The Lightning trainer, where processes share the work of a sharded model.
    """

    def __init__(self, policy: PreTrainedModel, builder: ModelBuilder, trainer: Any = None) -> None:
        self.policy, self._builder = policy, builder
        self._trainer = trainer if builder.sharding is not None else None
        self._separate = builder.options.reference_name_or_path is not None
        self._model: PreTrainedModel | None = None
        self._digest = ""
        self.watch_policy()

    @property
    def dtype(self) -> torch.dtype:
        """The data type of its matrices."""
        return dtype_of_matrices(self.policy)

    @property
    def is_policy_without_adapter(self) -> bool:
        """Whether the reference is the policy with its trained adapter switched off, which takes no memory."""
        return not self._separate and hasattr(self.policy, "peft_config")

    @property
    def own_model(self) -> PreTrainedModel | None:
        """The reference's own model, while it is there."""
        return self._model

    @property
    def policy_is_pristine(self) -> bool:
        """Whether the policy still is as it came in: nothing was loaded into it, and nothing has changed it."""
        return self._pristine and self._num_changes() == self._num_changes_before

    @property
    def digest(self) -> str:
        """Digest of the weights that the reference had when it was first needed.

        A policy that is to be cut up has to be asked before; its processes share the work.
        """
        if not self._digest and self.is_policy_without_adapter:
            frozen = [(name, value) for name, value in self.policy.named_parameters() if not value.requires_grad]
            self._digest = self._digest_of(frozen)
        elif not self._digest and self._is_policy:
            self._digest = self._digest_of(self.policy.named_parameters())
        elif not self._digest:
            self.hold()
        return self._digest

    def watch_policy(self) -> None:
        """Takes the policy's weights as they are now for those that it came in with."""
        self._pristine, self._num_changes_before = True, self._num_changes()

    def policy_moves(self) -> None:
        """Says that the policy is about to change, by means that cannot be seen from its tensors."""
        self._pristine = False

    def hold(self) -> None:
        """Has a model of its own from now on, if the reference is not the policy with its adapter off.

        Raises:
            LanguageModelError: If it is loaded again, and its files have changed.
        """
        if self.is_policy_without_adapter or self._model is not None:
            return
        if self._is_policy and self._builder.sharding is None and not self._builder.options.compile:
            model = copy.deepcopy(self.policy)
        else:
            model = self._builder.reference()
            digest = self._digest_of(model.named_parameters())
            if self._digest and digest != self._digest:
                raise LanguageModelError(
                    self._builder.reference_name,
                    "expected the weights that the reference had when the run began, found others.",
                    "Restore them.",
                )
            self._digest = digest
            self._builder.finish(model)
        self._model = model.requires_grad_(False).eval()

    def release(self) -> None:
        """Gives back the memory of the reference's own model."""
        self._model = None

    @contextmanager
    def model(self) -> Iterator[PreTrainedModel]:
        """The reference, for as long as the context lasts: no second model is made while the policy still is it."""
        if self.is_policy_without_adapter:
            with _without_trained_adapter(self.policy):
                yield self.policy
        elif self._model is None and self._is_policy:
            yield self.policy
        else:
            self.hold()
            model: Any = self._model
            yield model if is_sharded(model) else model.to(next(self.policy.parameters()).device)

    @contextmanager
    def before_training(self, trainer: Any = None) -> Iterator[PreTrainedModel]:
        """:meth:`model` for passes before the loop has moved the policy: on its device, in the trainer's precision."""
        device = trainer.strategy.root_device if trainer is not None else self._builder.device
        if not is_sharded(self.policy):
            self.policy.to(device)
        with (
            trainer.precision_plugin.forward_context() if trainer is not None else nullcontext(),
            self.model() as model,
        ):
            yield model

    @torch.no_grad()
    def log_probs(self, batch: FeedbackBatch, trunk_states_SH: Tensor | None = None) -> Tensor:
        """Log-probability of each completion, shape ``(B,)``, float32, in nats, without a gradient.

        Args:
            batch: A packed micro-batch on the policy's device.
            trunk_states_SH: What the policy's trunk makes of it, if the policy is without its trunk now.
        """
        shared = trunk_states_SH if self.is_policy_without_adapter else None
        with self.model() as model:
            return completion_log_probs(model, batch, trunk_states_SH=shared)

    @property
    def _is_policy(self) -> bool:
        return not (self.is_policy_without_adapter or self._separate) and self.policy_is_pristine

    def _num_changes(self) -> int:
        """PyTorch counts the changes of a tensor in place, whoever makes them; a move to another device is none."""
        if is_sharded(self.policy):
            return 0  # gathering weights is a change too
        return sum(parameter._version for parameter in self.policy.parameters())

    def _digest_of(self, named: Iterable[tuple[str, Tensor]]) -> str:
        trainer, digests = self._trainer, {}
        for number, (name, value) in enumerate(sorted(named, key=lambda pair: pair[0])):
            if trainer is None or number % trainer.world_size == trainer.global_rank:
                digests[name] = digest_of_tensor(value, final_dtype(value))
        parts = [digests] if trainer is None else gather_over_ranks(digests, trainer)
        return digest_of_values({name: digest for part in parts for name, digest in part.items()})


@contextmanager
def _without_trained_adapter(policy: PreTrainedModel) -> Iterator[None]:
    """Uses the adapter that the policy came in with, or none.

    PEFT's own ``disable_adapter`` and ``set_adapter`` also switch ``requires_grad``, which FSDP2 does not survive under
    mixed precision; the flags alone are enough for a forward pass, and PEFT has no public way to them.
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
