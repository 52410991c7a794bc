"""The reference as a model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor
from transformers import PreTrainedModel

from bco_lightning.batch import FeedbackBatch
from bco_lightning.errors import LanguageModelError
from bco_lightning.identity import digest_of_frozen, digest_of_values, digests_of_tensors
from bco_lightning.models.adapters import REFERENCE_ADAPTER
from bco_lightning.models.build import ModelBuilder
from bco_lightning.models.log_probs import completion_log_probs
from bco_lightning.parallel.collectives import gather_over_ranks
from bco_lightning.parallel.sharding import final_dtype, is_sharded


class Reference:
    """The reference as a model; no module, which would enter checkpoints, the optimizer and every wrapper.

    Where it is not the policy with its adapter off, it is a model of its own, which is there only while it is needed:
    a copy of the policy while that is as it came in, later it is loaded again.
    """

    def __init__(self, policy: PreTrainedModel, builder: ModelBuilder, trainer: Any = None) -> None:
        self.policy, self._builder = policy, builder
        self._trainer = trainer if builder.sharding is not None else None
        self._separate = builder.options.reference_name_or_path is not None
        self.own_model: PreTrainedModel | None = None  # while it is there
        self._digest = ""
        self.watch_policy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Reference:
        """The same: a copy of a module, such as Lightning's weight averaging takes, has no use for a second one."""
        return self

    @property
    def is_policy_without_adapter(self) -> bool:
        """Whether the reference is the policy with its trained adapter switched off, which takes no memory."""
        return not self._separate and hasattr(self.policy, "peft_config")

    @property
    def digest(self) -> str:
        """Digest of the weights that the reference had when it was first needed, by the work of all processes.

        A policy that is to be cut up has to be asked before.
        """
        without_adapter = self.is_policy_without_adapter
        if not self._digest and (without_adapter or self._is_policy):
            named = self.policy.named_parameters()
            self._digest = self._digest_of(pair for pair in named if not (without_adapter and pair[1].requires_grad))
        elif not self._digest:
            self.hold()
        return self._digest

    @cached_property
    def given_digest(self) -> str:
        """A digest of the policy's frozen weights, if model or tokenizer were given as objects, else empty."""
        return "" if self._builder.given == (None, None) else digest_of_frozen(self.policy)

    def watch_policy(self) -> None:
        """Takes the policy's weights as they are now for those that it came in with."""
        self._num_changes_before: int | None = self._num_changes()

    def policy_moves(self) -> None:
        """Says that the policy is about to change, by means that cannot be seen from its tensors."""
        if self._is_policy and self._builder.given[0] is not None:
            self.hold()  # it could not be loaded again
        self._num_changes_before = None

    def hold(self) -> None:
        """Has a model of its own from now on, if the reference is not the policy with its adapter off."""
        if self.is_policy_without_adapter or self.own_model is not None:
            return
        if self._is_policy and self._builder.sharding is None and not self._builder.options.compile:
            model = copy.deepcopy(self.policy)
        else:
            model = self._builder.reference()
            digest = self._digest_of(model.named_parameters())
            if self._digest and digest != self._digest:
                expected = "expected the weights that the reference had when the run began, found others."
                raise LanguageModelError(self._builder.options.reference_name, expected, "Restore them.")
            self._digest = digest
            self._builder.finish(model)
        self.own_model = model.requires_grad_(False).eval()

    def release(self) -> None:
        """Gives back the memory of the reference's own model, unless that could not be loaded again."""
        if self._builder.given[0] is None:
            self.own_model = None

    @contextmanager
    def model(self) -> Iterator[PreTrainedModel]:
        """The reference, for as long as the context lasts: no second model is made while the policy still is it."""
        if self.is_policy_without_adapter:
            with _without_trained_adapter(self.policy):
                yield self.policy
        elif self.own_model is None and self._is_policy:
            yield self.policy
        else:
            self.hold()
            model: Any = self.own_model
            yield model if is_sharded(model) else model.to(next(self.policy.parameters()).device)

    @contextmanager
    def where_it_is_used(self, trainer: Any = None) -> Iterator[torch.device]:
        """For passes before the loop moves the policy: on its device, which is given, in the trainer's precision."""
        device = trainer.strategy.root_device if trainer is not None else self._builder.device
        if not is_sharded(self.policy):
            self.policy.to(device)
        with trainer.precision_plugin.forward_context() if trainer is not None else nullcontext():
            yield device

    @contextmanager
    def before_training(self, trainer: Any = None) -> Iterator[PreTrainedModel]:
        """:meth:`model` for such passes."""
        with self.where_it_is_used(trainer), self.model() as model:
            yield model

    @torch.no_grad()
    def log_probs(self, batch: FeedbackBatch, trunk_states_SH: Tensor | None = None) -> Tensor:
        """Log-probability of each completion, shape ``(B,)``, float32, in nats, without a gradient.

        ``trunk_states_SH`` are given while the policy is without its trunk.
        """
        shared = trunk_states_SH if self.is_policy_without_adapter else None
        with self.model() as model:
            return completion_log_probs(model, batch, trunk_states_SH=shared)

    @property
    def is_policy_that_came_in(self) -> bool:
        """Whether both have to be one model: no other one is named, and nothing has changed the policy."""
        return self._num_changes() == self._num_changes_before and not self._separate

    @property
    def _is_policy(self) -> bool:
        """Whether it is the whole policy, into which nothing was loaded, and which nothing has changed."""
        return self.is_policy_that_came_in and not self.is_policy_without_adapter

    def _num_changes(self) -> int:
        """PyTorch counts the changes of a tensor in place, whoever makes them; a move to another device is none."""
        if is_sharded(self.policy):
            return 0  # gathering weights is a change too
        return sum(parameter._version for parameter in self.policy.parameters())

    def _digest_of(self, named: Iterable[tuple[str, Tensor]]) -> str:
        trainer, ordered = self._trainer, sorted(named, key=lambda pair: pair[0])
        own = ordered if trainer is None else ordered[trainer.global_rank :: trainer.world_size]
        digests = digests_of_tensors((name, value, final_dtype(value)) for name, value in own)
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
