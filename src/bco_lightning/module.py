"""The Lightning module: where policy, reference, objective and batch meet."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor
from transformers import PreTrainedModel

from bco_lightning.batch import FeedbackBatch, ScoredRows, StepSummary, micro_batches_of
from bco_lightning.callbacks import OF_THE_METHOD
from bco_lightning.callbacks.refusals import refuse_unfit, refuse_unknown_monitors
from bco_lightning.callbacks.run_header import tokens_that_fit
from bco_lightning.callbacks.step_callback import loss_in_passes, passes_of, summarize_step
from bco_lightning.checkpoints.format import read_checkpoint, use_verified_io
from bco_lightning.checkpoints.optimizers import restore_states, states_by_name
from bco_lightning.checkpoints.tensors import leave_out_frozen, miss_trained_only, refuse_not_finite
from bco_lightning.data.chat import told_by
from bco_lightning.data.datamodule import FeedbackDataModule
from bco_lightning.errors import CheckpointError, ConfigError
from bco_lightning.identity import (
    changes_to_accept,
    digest_of_tokenizer,
    digest_of_values,
    refuse_other_given,
    refuse_other_weights,
    settings_of,
    versions,
)
from bco_lightning.importance.weights import ImportanceWeights, PromptWeighing
from bco_lightning.models.build import ModelBuilder, require_sharded, scheduled_optimizer
from bco_lightning.models.experts import Routing
from bco_lightning.models.layout import FrozenTrunk, Layout, causal_lm_of, find_trunk, layout_of
from bco_lightning.models.load import load_tokenizer, locate_model, usable_tokenizer, with_given
from bco_lightning.models.log_probs import completion_log_probs
from bco_lightning.models.refusals import refuse_unknown_token
from bco_lightning.objectives import RatedAnswers, RewardShift, chosen_class_weights, mean_over_rows, objective_of
from bco_lightning.objectives.exported import exported_objective
from bco_lightning.options import ModelOptions
from bco_lightning.parallel.sharding import sharding_of
from bco_lightning.parallel.strategy import refuse_unknown
from bco_lightning.reference.column import fill_in_log_probs, refuse_other_start
from bco_lightning.reference.model import Reference


class BCOModule(LightningModule):
    """Aligns a language model to thumbs-up / thumbs-down feedback.

    The implicit reward of a row is ``beta`` times the log-ratio of policy and frozen reference; the loss is Eq. 8, the
    sum of two class means by constants of the data, so that gradients do not depend on how steps are cut up.

    Args:
        positional: ``name_or_path``, the model to align.
        model, tokenizer: Objects of transformers in place of those of ``name_or_path``, which then says where the same
            model lies; if left out, its config does. The model becomes the policy and is trained in place.
        options: Those of :class:`~bco_lightning.options.ModelOptions`, by keyword.

    Raises:
        ConfigError: If an option is out of range.
    """

    def __init__(self, *positional: Any, model: Any = None, tokenizer: Any = None, **options: Any) -> None:
        super().__init__()
        positional, options = with_given(model, positional, options)
        self.options = ModelOptions(*positional, **options)
        self.save_hyperparameters(self.options.plain(), logger=False)  # RunHeader tells loggers what compares
        self.lora, self.beta = self.options.lora, self.options.beta
        self.objective = objective_of(self.options)
        self.class_weights: tuple[float, float] | None = None
        self.weighing = PromptWeighing(self.options)
        self.step_rows: list[ScoredRows] = []
        self.step_summary: StepSummary | None = None
        self.steps_before = 0  # of the checkpoint that was loaded
        self.register_state_dict_post_hook(leave_out_frozen)
        self.register_load_state_dict_post_hook(miss_trained_only)  # on_load_checkpoint checks that nothing lacks
        self._policy: PreTrainedModel | None = None
        self._reference: Reference | None = None
        self._trunk: FrozenTrunk | None = None
        self._routing: Routing | None = None
        self._layout_reason, self._fingerprints, self._accepted_changes = "", dict[str, Any](), list[str]()
        self._saved_optimizers: list[dict[str, Any]] = []
        self.told: dict[str, str] = {}  # what told the rows that it was trained on: chat template, day
        self._given = (model, tokenizer)  # in a tuple, or the model would be a submodule
        self._tokenizer = tokenizer and usable_tokenizer(tokenizer, "tokenizer")

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the policy, loaded when first asked for."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.options.name_or_path, cache_folder=self.options.cache_folder)
        return self._tokenizer

    @property
    def policy(self) -> PreTrainedModel:
        """The model that is aligned; built when first asked for."""
        self.configure_model()
        return cast(PreTrainedModel, self._policy)

    @property
    def reference(self) -> Reference:
        """The frozen reference; built together with the policy."""
        self.configure_model()
        return cast(Reference, self._reference)

    @property
    def layout(self) -> Layout:
        """How rows of a micro-batch go through the policy: ``packed``, ``padded``, or each ``alone``."""
        return layout_of(self.policy)

    @property
    def said_of_rows(self) -> str:
        """How rows of a micro-batch go through the policy, for people."""
        once = f"; its first {self._trunk.depth} layers run once for both models" if self._trunk else ""
        return f"rows of a micro-batch are {self._layout_reason}{once}"

    @property
    def reward_shift(self) -> RewardShift:
        """What the objective compares rewards with, estimated from past steps: of BCO the reward shift."""
        return self.objective.reward_shift

    @property
    def importance(self) -> ImportanceWeights | None:
        """The importance weights, once they are known; none without ``model.importance_weights``."""
        return self.weighing.weights

    def configure_model(self) -> None:
        """Loads the policy, once, and cuts it up where the strategy says so."""
        trainer = self._trainer
        sharding = sharding_of(trainer) if trainer is not None else None
        if self._policy is not None:
            require_sharded(self._policy, sharding)
            return
        device = trainer.strategy.root_device if trainer is not None else self.device
        precision = trainer.precision_plugin.forward_context if trainer is not None else nullcontext
        builder = ModelBuilder(self.options, device, sharding, self._data, precision, self._given)
        policy, self._layout_reason = builder.policy()
        reference = Reference(policy, builder, trainer)
        if sharding is not None:
            reference.digest  # noqa: B018 - taken while the policy is whole
        elif not self.options.compile:
            self._trunk = find_trunk(policy)
        builder.finish(policy)
        reference.watch_policy()
        self._routing = Routing(policy, self.options.router_aux_loss, self.options.compile)
        self._policy, self._reference = policy, reference
        if self.options.reference_name_or_path is not None:
            self._take_over_exported(self.options.reference_name_or_path)

    def _take_over_exported(self, reference: str) -> None:
        """An exported model is scored as it was trained; one that is trained on brings its reward shift alone."""
        folder, decay = Path(locate_model(self.options.name_or_path).location), self.options.reward_shift_decay
        if (found := exported_objective(folder, decay, reference=reference, beta=self.beta)) is None:
            return
        if self._trainer is None or self._trainer.state.fn != "fit":
            self.objective = found
        self.reward_shift.load_state_dict(found.reward_shift.state_dict())

    # --- before the first step

    def setup(self, stage: str) -> None:
        """Finds out what is known of the rows before the first step: class weights, reference log-probs, weights."""
        trainer = self.trainer
        if stage == "fit":
            refuse_unknown_monitors(trainer, self)
        self.configure_model()
        if stage == "fit":
            self.class_weights = self._chosen_class_weights()
        is_known = fill_in_log_probs(self._data, stage, self.reference, self.options, trainer)
        if stage == "fit":
            refuse_other_start(self._data, self.reference, lambda batch: self(batch)[1], trainer)
            self.weighing.start(self._data, self.reference, trainer)
            self._fingerprints, self.told = self._own_fingerprints(), self._data.told if self._data else {}
        if is_known:
            self.reference.release()

    @property
    def _data(self) -> FeedbackDataModule | None:
        data = getattr(self._trainer, "datamodule", None)
        return data if isinstance(data, FeedbackDataModule) else None

    def _chosen_class_weights(self) -> tuple[float, float]:
        data = self._data
        return chosen_class_weights(self.options, self.objective, lambda: data.class_frequencies if data else None)

    def num_steps(self) -> int:
        """Optimizer steps of the whole run, from the configuration.

        ``trainer.estimated_stepping_batches`` would build the data iterator before a resumed step is restored.
        """
        data, epochs = self._data, self.trainer.max_epochs or 0
        planned = (self.trainer.max_steps, data.steps_per_epoch * epochs if data is not None else 0)
        if not (limits := [limit for limit in planned if limit > 0]):
            raise ConfigError("trainer.max_steps", "expected a number of steps or epochs to plan for, found neither.")
        return min(limits)

    def configure_callbacks(self) -> list[Callback]:
        """What belongs to the method; one that the trainer was given, or a subclass of it, stands in place of ours."""
        given: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        refuse_unknown(self.trainer.strategy, str(self.trainer.precision))  # before anything is read
        refuse_unfit(self.trainer, OF_THE_METHOD)
        use_verified_io(self.trainer.strategy)
        return [kind() for kind in OF_THE_METHOD if not any(isinstance(each, kind) for each in given)]

    def configure_optimizers(self) -> Any:
        """AdamW on what is trained, with a linear warm-up and the chosen schedule over all optimizer steps."""
        trained = [each for each in self.parameters() if each.requires_grad]
        return scheduled_optimizer(self.options, trained, self.num_steps())

    # --- a step

    def forward(self, batch: FeedbackBatch) -> tuple[Tensor, ScoredRows]:
        """The loss of each row before class weights, shape ``(B,)``, with gradient; and everything else, detached."""
        weigher = self.weighing if self.weighing.in_step and self.trainer.training else None
        unrelated_log_ratios_U = None
        if batch.unrelated is not None:
            with torch.no_grad():
                policy_U, reference_U = self.log_probs(batch.unrelated)
                unrelated_log_ratios_U = (policy_U - reference_U)[batch.unrelated.importance_weights_B > 0]
        with weigher.watching(self.reference.own_model or self.policy) if weigher else nullcontext():
            policy_log_probs_B, reference_log_probs_B = self.log_probs(batch)
        answers = RatedAnswers(
            policy_log_probs_B,
            reference_log_probs_B,
            batch.thumbs_up_B,
            self.beta,
            lengths_B=batch.completion_lengths,
            importance_weights_B=weigher.weights_in_step(batch) if weigher else batch.importance_weights_B,
            others_B=torch.arange(len(batch), device=policy_log_probs_B.device) ^ 1 if batch.paired else None,
            scores_B=batch.scores_B,
            prompt_keys_B=batch.prompt_keys_B if self._trainer is None or self._trainer.training else None,
            unrelated_log_ratios_U=unrelated_log_ratios_U,
        )
        losses_B = self.objective.losses(answers)
        return losses_B, ScoredRows(
            thumbs_up_B=batch.thumbs_up_B,
            policy_log_probs_B=policy_log_probs_B.detach(),
            reference_log_probs_B=reference_log_probs_B,
            rewards_B=answers.rewards_B.detach(),
            losses_B=losses_B.detach(),
            completion_lengths_B=batch.completion_lengths,
            row_ids_B=batch.row_ids_B,
            sources_B=batch.sources_B,
            reward_shift=self.objective.threshold,
            baseline_sums=self.objective.sums(answers),
            routing_sums=cast(Routing, self._routing).sums,
        )

    def log_probs(self, batch: FeedbackBatch) -> tuple[Tensor, Tensor]:
        """Those of policy and reference, shape ``(B,)``."""
        policy, trunk = self.policy, self._trunk if batch.images_B is None else None  # which computes packed rows
        with cast(Routing, self._routing).watched(batch):
            trunk_states_SH = trunk.states(batch) if trunk else None
            with trunk.left_out() if trunk else nullcontext():
                policy_log_probs_B = completion_log_probs(policy, batch, trunk_states_SH=trunk_states_SH)
        if (known_B := batch.reference_log_probs_B) is not None:
            return policy_log_probs_B, known_B
        with trunk.left_out() if trunk else nullcontext():
            return policy_log_probs_B, self.reference.log_probs(batch, trunk_states_SH)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Looks at the tokens while they are on the CPU; those of a stream are not known before."""
        for part in micro_batches_of(batch):
            refuse_unknown_token(causal_lm_of(self.policy), int(part.input_ids_S.max()))
        return batch

    def on_train_start(self) -> None:
        """From here on the policy is not the reference any more; the rows of an earlier fit are forgotten."""
        self.step_rows, self.step_summary = [], None
        self.reference.policy_moves()
        if self._saved_optimizers:
            restore_states(self, self.trainer.optimizers, self._saved_optimizers, *self.trainer.lr_scheduler_configs)
            self._saved_optimizers = []

    def training_step(self, batch: FeedbackBatch | list[FeedbackBatch], batch_idx: int) -> Tensor:
        """The weighted loss of a batch, whose rows join ``step_rows``; the guard looks at whether it is finite."""
        if self.step_summary is not None:  # the step before has ended
            self.step_rows, self.step_summary = [], None
        return loss_in_passes(self._loss, batch, self._trainer, begins=not self.step_rows)

    def optimizer_zero_grad(self, *_: Any) -> None:
        """Nothing: gradients were dropped as the step began, and Lightning asks after passes that have added some."""

    def _loss(self, batch: FeedbackBatch, share: float) -> Tensor:
        losses_B, rows = self(batch)
        self.step_rows += [rows] if share else []
        weights = self.class_weights or self._chosen_class_weights()
        return share * cast(Routing, self._routing).add_to(mean_over_rows(losses_B, batch.thumbs_up_B, weights))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Sums the step over processes, for the callbacks; one that is not finite ends here, or is left out."""
        summarize_step(self.trainer, self, optimizer)

    def validation_step(self, batch: FeedbackBatch | list[FeedbackBatch], batch_idx: int) -> dict[str, Any]:
        """The rows of a batch, for the callbacks."""
        return {"rows": self.predict_step(batch, batch_idx)}

    test_step = validation_step
    tokens_that_fit = tokens_that_fit  # of a micro-batch, by memory: the data module asks

    def predict_step(self, batch: FeedbackBatch | list[FeedbackBatch], batch_idx: int) -> ScoredRows:
        """The rows of a batch, scored."""
        scored = [(self(part)[1], share) for part, share in passes_of(batch, self._trainer)]
        return ScoredRows.joined([rows for rows, share in scored if share])

    # --- what is saved

    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what is trained, by name; the frozen base is no part of a state dictionary."""
        return {name: tuple(value.shape) for name, value in self.named_parameters() if value.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the reward shift, and what the run is made of."""
        refuse_not_finite(checkpoint["state_dict"], checkpoint["global_step"], self.trainer)
        fingerprints, free = self.fingerprints(), ModelOptions.names("free")
        decisive = {name: value for name, value in self.hparams.items() if name not in free}
        checkpoint |= {
            "reward_shift": self.reward_shift.state_dict(),
            "baselines": self.objective.state_dict(),
            "fingerprints": fingerprints,
            "config_digest": digest_of_values({**decisive, **fingerprints}),
            "given": self.reference.given_digest,
            "accepted_changes": list(self._accepted_changes),
            "versions": versions(),
            "settings": self._settings() if self._fingerprints else {},
            **({"importance": self.importance.state_dict()} if self.importance is not None else {}),
        }
        if "optimizer_states" in checkpoint:
            checkpoint["optimizer_states"] = states_by_name(self, self.trainer.optimizers)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the reward shift, and refuses the checkpoint of another module or run."""
        if "reward_shift" not in checkpoint:
            raise CheckpointError("checkpoint", "expected a checkpoint of BCOModule, found another.")
        self.configure_model()
        refuse_other_weights(self.trained_shapes(), checkpoint["state_dict"])
        if self._data is not None and (stage := self._data.takes_day_of(checkpoint.get("fingerprints", {}))):
            self.setup(stage)
        self._accepted_changes = [*checkpoint.get("accepted_changes", []), *self._changes_since(checkpoint)]
        moments, checkpoint["optimizer_states"] = checkpoint.get("optimizer_states", []), []  # Lightning checks nothing
        known, goes_on = checkpoint.get("fingerprints", {}), self._trainer is not None and self._trainer.training
        self._saved_optimizers = moments if goes_on else []
        self.told = self.told if goes_on else {n: known[n] for n in ("chat_template", "template_date") if n in known}
        self.reward_shift.load_state_dict(checkpoint["reward_shift"])
        self.objective.load_state_dict(checkpoint.get("baselines", {}))
        self.steps_before = checkpoint["global_step"]
        self.reference.policy_moves()
        self.weighing.load_state_dict(checkpoint.get("importance"), self._data)

    def _changes_since(self, checkpoint: dict[str, Any]) -> list[str]:
        told, known = self._data.told if self._data else {}, checkpoint.get("fingerprints", {})
        made_of, accepted = dict[str, Any](beta=self.beta, **{name: told[name] for name in told.keys() & known}), None
        if self._trainer is not None and self.trainer.training:
            callbacks = self.trainer.checkpoint_callbacks
            accepted = [name for callback in callbacks for name in getattr(callback, "accept_changes", [])]
            made_of = self.fingerprints()
        return changes_to_accept(checkpoint, made_of, self._settings() if accepted is not None else {}, accepted)

    def _settings(self) -> dict[str, Any]:
        parts = [self.options, self._data.options] if self._data is not None else [self.options]
        return settings_of(self.trainer, self.num_steps(), parts)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, **options: Any) -> BCOModule:  # type: ignore[override]
        """Builds the module of a checkpoint with its trained weights and reward shift.

        Args:
            checkpoint_path: Folder of a step.
            options: Others than the run's, as ``dtype``; its ``model`` and ``tokenizer``; ``map_location``, a device.

        Raises:
            CheckpointError: If it is missing, damaged or no checkpoint of this module.
        """
        device = options.pop("map_location", "cpu")
        checkpoint = read_checkpoint(checkpoint_path, moments=False)
        if "reward_shift" not in checkpoint:
            raise CheckpointError(str(checkpoint_path), "expected a checkpoint of BCOModule, found another.")
        module = cls(**{**checkpoint["hyper_parameters"], **options}).to(device)
        module.on_load_checkpoint(checkpoint)
        refuse_other_given(checkpoint, module.policy, module.tokenizer)
        module.load_state_dict(checkpoint["state_dict"], strict=False)
        module._tokenizer = told_by(module.tokenizer, module.told.get("chat_template"))
        return module

    def fingerprints(self) -> dict[str, Any]:
        """What this run is made of: settings that decide its numbers, and digests of reference, tokenizer and rows."""
        return {**self._fingerprints, **(self._data.fingerprints() if self._data else {})}

    def _own_fingerprints(self) -> dict[str, Any]:
        weighting = {} if self.importance is None else {"prompt_encoder": self.importance.encoder}
        names = [*ModelOptions.names("refused"), *(["importance_weights", "importance_clip"] if weighting else [])]
        return {
            **{name: self.hparams[name] for name in names},
            **weighting,
            "reference": self.reference.digest,
            "tokenizer": digest_of_tokenizer(self.tokenizer),
        }
