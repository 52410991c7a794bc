"""The Lightning module: where policy, reference, objective and batch meet."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from transformers import PreTrainedModel, get_scheduler

from bco_lightning.batch import FeedbackBatch, ScoredRows, StepSummary
from bco_lightning.checkpoints import VerifiedCheckpointIO, read_checkpoint
from bco_lightning.checkpoints.optimizers import restore_states, states_by_name
from bco_lightning.data.datamodule import FeedbackDataModule
from bco_lightning.errors import CheckpointError, ConfigError, LanguageModelError, NonFiniteError
from bco_lightning.identity import (
    accepted_differences,
    differences,
    digest_of_tensor,
    digest_of_tokenizer,
    digest_of_values,
    versions,
)
from bco_lightning.importance.features import make_encoder
from bco_lightning.importance.weights import Encoder, ImportanceWeights, StepWeigher, find_weights
from bco_lightning.models.fused_layers import fuse_layers
from bco_lightning.models.layout import (
    Layout,
    causal_lm_of,
    choose_layout,
    compile_layers,
    decoder_layers_of,
    layout_of,
)
from bco_lightning.models.load import (
    load_language_model,
    load_policy,
    load_tokenizer,
    locate_model,
    resolve_dtype,
)
from bco_lightning.models.log_probs import check_head, completion_log_probs
from bco_lightning.models.reference import Reference
from bco_lightning.models.trunk import FrozenTrunk, find_trunk
from bco_lightning.models.useful_flops import UsefulFlops
from bco_lightning.objectives import OBJECTIVES, Baseline, class_weights_of, mean_over_rows
from bco_lightning.optimizers import make_optimizer
from bco_lightning.options import ModelOptions
from bco_lightning.parallel.collectives import gather_over_ranks, max_over_ranks
from bco_lightning.parallel.sharding import Sharding, final_dtype, is_sharded, own_part, shard, sharding_of
from bco_lightning.parallel.strategy import refuse_unknown_sharding
from bco_lightning.places import cache_root
from bco_lightning.reference_cache import ReferenceCache, key_of_log_probs
from bco_lightning.reference_store import ReferenceStore

ReferencePlan = Literal["online", "known", "before", "lazily"]
ALIGNMENT_FILE = "bco.json"


class BCOModule(LightningModule):
    """Aligns a language model to thumbs-up / thumbs-down feedback.

    The implicit reward of a row is ``beta`` times the log-ratio of policy and frozen reference; the objective makes a
    binary classifier of it. The loss is Eq. 8, the sum of two class means: each row is weighted by rows / rows of its
    class, constants of the data, so that the gradient of an optimizer step does not depend on how the step is cut into
    micro-batches. (Gradient clipping sees Eq. 8's scale, which is twice that of a mean over rows.)

    Args:
        positional: ``name_or_path``, the model to align.
        options: Those of :class:`~bco_lightning.options.ModelOptions`, by keyword.

    Raises:
        ConfigError: If an option is out of range.
    """

    def __init__(self, *positional: Any, **options: Any) -> None:
        super().__init__()
        self.options = ModelOptions(*positional, **options)
        # Checkpoints are read with weights_only=True, which takes plain values only.
        self.save_hyperparameters(self.options.plain())
        self.lora, self.beta = self.options.lora, self.options.beta
        self.objective = OBJECTIVES[self.options.objective](self.options.reward_shift_decay)
        self.class_weights: tuple[float, float] | None = None
        self.importance: ImportanceWeights | None = None
        self._encoder: Encoder | None = None
        self._step_weigher: StepWeigher | None = None
        self.step_rows: list[ScoredRows] = []
        self.step_summary: StepSummary | None = None
        self._reference_digest = ""
        self._fingerprints: dict[str, Any] = {}
        self._accepted_changes: list[str] = []
        self._saved_optimizers: list[dict[str, Any]] = []
        self.strict_loading = False  # checkpoints hold what is trained; on_load_checkpoint checks that nothing lacks
        self._layout_reason = ""
        self._trunk: FrozenTrunk | None = None
        self._policy: PreTrainedModel | None = None
        self._reference: Reference | None = None
        self._reference_cache: ReferenceCache | None = None
        self._scored_online: list[ScoredRows] = []
        self._is_set_up = False
        self._num_parameters = (0, 0)
        self._trained_shapes: dict[str, tuple[int, ...]] = {}
        self._useful_flops: UsefulFlops | None = None
        self._matmul_dtype: torch.dtype | None = None
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the policy, loaded when first asked for."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.hparams["name_or_path"], cache_folder=self.options.cache_folder)
        return self._tokenizer

    @property
    def policy(self) -> PreTrainedModel:
        """The model that is aligned; built when first asked for."""
        self.configure_model()
        return self._policy

    @property
    def reference(self) -> Reference:
        """The frozen reference; built together with the policy."""
        self.configure_model()
        return self._built_reference

    @property
    def _built_reference(self) -> Reference:
        return self._reference  # type: ignore[return-value]

    @property
    def layout(self) -> Layout:
        """Whether rows of a micro-batch are packed or padded; known once the policy is built."""
        return layout_of(self.policy)

    @property
    def useful_flops(self) -> UsefulFlops:
        """The operations that a step of the policy needs."""
        return self._useful_flops or UsefulFlops.of(self.policy)

    @property
    def matmul_dtype(self) -> torch.dtype:
        """The data type of the policy's matrices; quantized ones are multiplied in bfloat16."""
        return self._matmul_dtype or _dtype_of_matrices(self.policy)

    def configure_model(self) -> None:
        """Loads the policy, once; the reference's own model, if it has one, is made when it is needed.

        Raises:
            ConfigError: If the model was built before, whole, and is now to be cut up by the strategy.
        """
        self._build()
        self._shard()

    def _build(self) -> None:
        if self._policy is not None:
            return
        options = self.hparams
        device = self.trainer.strategy.root_device if self._trainer is not None else self.device
        dtype = resolve_dtype(options["dtype"], self.lora, device)
        self._policy = load_policy(
            options["name_or_path"],
            dtype,
            self.lora,
            options["seed"],
            options["quantization"],
            mapped=self._sharding is not None,
            cache_folder=self.options.cache_folder,
        )
        check_head(self._policy)
        self._layout_reason = choose_layout(self._policy, options["layout"])
        self._quicken(self._policy)
        if self._sharding is None and not options["compile"]:
            self._trunk = find_trunk(self._policy)
        separate = options["reference_name_or_path"]
        self._reference = Reference(
            self._policy,
            partial(self._load_reference, dtype),
            separate=bool(separate),
            copied=self._sharding is None and not options["compile"],  # a copy of a compiled model rounds differently
        )
        if separate:
            self._load_exported_reward_shift(options["name_or_path"], separate)

    @property
    def _sharding(self) -> Sharding | None:
        """How the strategy cuts up models; ``None`` where each process has whole ones."""
        return sharding_of(self.trainer) if self._trainer is not None else None

    def _quicken(self, model: PreTrainedModel) -> None:
        """Policy and reference alike, so that equal weights give equal bits."""
        if self.hparams["compile"]:
            compile_layers(model)
        elif self._sharding is None:
            fuse_layers(model.modules())

    def _cut_up(self, model: PreTrainedModel, sharding: Sharding) -> None:
        def quicken(modules: Iterable[nn.Module]) -> None:
            if not self.hparams["compile"]:
                fuse_layers(modules)

        causal_lm = causal_lm_of(model)
        shard(causal_lm, decoder_layers_of(causal_lm)[1], sharding, quicken)

    def _shard(self) -> None:
        """What is done to a whole policy, once, after the digest of its weights was taken."""
        policy: Any = self._policy
        if self._is_set_up:
            if self._sharding is not None and not is_sharded(policy):
                raise ConfigError(
                    "trainer.strategy",
                    "expected a module whose model is not built yet, found one that is built and not sharded.",
                    "Make a new BCOModule for it.",
                )
            return
        self._is_set_up = True
        # What is asked for later and cannot be seen of parts of weights.
        sizes = [(parameter.requires_grad, parameter.numel()) for parameter in policy.parameters()]
        self._num_parameters = sum(size for trained, size in sizes if trained), sum(size for _, size in sizes)
        self._trained_shapes = {n: tuple(p.shape) for n, p in self.named_parameters() if p.requires_grad}
        if self._sharding is not None:
            self._useful_flops, self._matmul_dtype = UsefulFlops.of(policy), _dtype_of_matrices(policy)
            if self.hparams["optimizer"] != "adamw":
                raise ConfigError(
                    "model.optimizer", f"expected adamw for weights that are cut up, found {self.hparams['optimizer']}."
                )
            self._cut_up(policy, self._sharding)
            self._built_reference.watch_policy()
        if self.hparams["gradient_checkpointing"]:
            policy.gradient_checkpointing_enable({"use_reentrant": False})
            policy.enable_input_require_grads()
            policy.train()  # transformers recomputes in training mode only; dropout is off in either

    def _load_reference(self, dtype: torch.dtype) -> PreTrainedModel:
        """Loads the reference's own model.

        Raises:
            LanguageModelError: If its files have changed since the run began.
        """
        name = self.hparams["reference_name_or_path"] or self.hparams["name_or_path"]
        model = load_language_model(
            name,
            dtype,
            self.hparams["quantization"],
            mapped=self._sharding is not None,
            cache_folder=self.options.cache_folder,
        )
        digest = self._digest_of(model.named_parameters())
        if self._reference_digest and digest != self._reference_digest:
            raise LanguageModelError(
                name, "expected the weights that the reference had when the run began, found others.", "Restore them."
            )
        self._reference_digest = digest
        check_head(model)
        choose_layout(model, self.hparams["layout"])
        self._quicken(model)
        if self._sharding is not None:
            self._cut_up(model, self._sharding)
        return model

    def setup(self, stage: str) -> None:
        """Takes the class weights from the data, and sees to it that reference log-probs can be had."""
        if self.trainer.precision in ("bf16-true", "16-true"):
            raise ConfigError(
                "trainer.precision",
                f"expected 32-true or bf16-mixed, found {self.trainer.precision}, which would cast the policy and not "
                "the reference.",
                "Set model.dtype: bfloat16 for bfloat16 weights.",
            )
        refuse_unknown_sharding(self.trainer.strategy, str(self.trainer.precision))
        if not isinstance(self.trainer.strategy.checkpoint_io, VerifiedCheckpointIO):
            self.trainer.strategy.checkpoint_io = VerifiedCheckpointIO()
        self._build()
        if self._sharding is not None:
            self._digest_of_reference()  # while the policy is whole
        plan = self._plan_reference(stage)
        self._shard()
        if stage == "fit":
            self.class_weights = self._chosen_class_weights()
            self._say_what_is_trained()
        self._follow(plan)
        if stage == "fit":
            self._weigh_prompts()
            if plan in ("known", "before"):
                self.reference.release()
            self._fingerprints = self._own_fingerprints()

    def _plan_reference(self, stage: str) -> ReferencePlan:
        """Looks up what is known, and has the reference's own model made where steps will need it."""
        reference, self._reference_cache = self._built_reference, None
        self._scored_online = []
        data = getattr(self._trainer, "datamodule", None)
        datasets = data.datasets_of(stage) if isinstance(data, FeedbackDataModule) else {}
        # Rows that are streamed are read as steps need them, so none can be looked up.
        keeps_train = stage != "fit" or "train" in datasets
        if self.options.reference_log_probs == "before" and not keeps_train:
            raise ConfigError(
                "model.reference_log_probs",
                "expected auto or online where no FeedbackDataModule is used, or data.streaming is true; found before.",
            )
        if self.options.reference_log_probs == "online" or not datasets or not keeps_train:
            reference.hold()
            return "online"
        digest = self._digest_of_reference()
        key = key_of_log_probs(
            reference.own_model or self._policy,
            self.trainer,
            reference=digest,
            shared_prompts=self._shares_prompts(),
            compiled=self.hparams["compile"],
            quantization=self.hparams["quantization"],
        )
        store = ReferenceStore(cache_root(self.options.cache_folder), key)
        self._reference_cache = ReferenceCache(store, datasets, self.trainer)
        if not self._reference_cache.num_unknown:
            reference.release()
            return "known"
        if self.options.reference_log_probs == "before" or (
            not reference.is_policy_without_adapter and self._sees_every_row(stage)
        ):
            return "before"
        reference.hold()
        return "lazily"

    def _follow(self, plan: ReferencePlan) -> None:
        """Says what was chosen and why; computes what is to be known before the first step.

        The weights of a checkpoint are restored after ``setup``: until then the policy is the reference.
        """
        cache = self._reference_cache
        if cache is None:
            return
        unknown, folder = cache.num_unknown, cache.store.folder
        asked = self.options.reference_log_probs == "before"
        why = {
            "known": "nothing is left to compute",
            "before": f"{unknown:,} are computed now, "
            + ("as asked for" if asked else "so that no second model is held later"),
            "lazily": f"{unknown:,} are computed when they are first needed, "
            + ("by switching the adapter off" if self.reference.is_policy_without_adapter else "by a second model")
            + ("" if self.reference.is_policy_without_adapter else ", since this run does not see every row"),
        }[plan]
        rank_zero_info(
            f"reference log-probs: {cache.num_rows - unknown:,} of {cache.num_rows:,} known from {folder}, {why}"
        )
        if plan == "before":
            # bfloat16 rounds a row with a shared prompt some tenths of a nat away from the same row alone.
            cache.compute(
                self._score_by_reference, by_length=self.layout == "padded", share_prompts=self._shares_prompts()
            )
            self.reference.release()
            if cache.num_unknown:
                rank_zero_warn(f"{cache.num_unknown:,} reference log-probs are not finite; steps compute them again.")

    def _score_by_reference(self, batch: FeedbackBatch) -> Tensor:
        with self._before_training() as device:
            return self.reference.log_probs_by_policy(batch.to(device))

    @contextmanager
    def _before_training(self) -> Iterator[torch.device]:
        """For passes before the loop has moved the policy: gives the device, with the trainer's precision."""
        trainer = self._trainer
        device = trainer.strategy.root_device if trainer is not None else self.device
        if not is_sharded(self.policy):
            self.policy.to(device)  # type: ignore[arg-type]
        with trainer.precision_plugin.forward_context() if trainer is not None else nullcontext():
            yield device

    def _weigh_prompts(self) -> None:
        """Finds the importance weights of the training rows."""
        self.importance = self._step_weigher = None
        if self.options.importance_weights == "off":
            return
        data = getattr(self._trainer, "datamodule", None)
        if not isinstance(data, FeedbackDataModule):
            raise ConfigError(
                "model.importance_weights",
                f"expected off where no FeedbackDataModule is used, found {self.options.importance_weights}.",
            )
        self._take_importance(self.find_importance(data))
        if problem := self.importance.problem(self.options.importance_weights):  # type: ignore[attr-defined]
            raise problem

    def find_importance(self, data: FeedbackDataModule) -> ImportanceWeights:
        """Finds the importance weights of rows that a data module has read, of a stream those of a sample.

        Args:
            data: The rows; the policy has to be as it came in, where it is the reference.

        Returns:
            The weights, and how far they can be trusted.

        Raises:
            ConfigError: If the encoder of prompts cannot be had.
        """
        options, folder = self.options, cache_root(self.options.cache_folder) / "importance_weights"
        depends_on = {"weights": self._digest_of_reference(), "dtype": str(self.matmul_dtype)}
        self._encoder = make_encoder(options.prompt_features, self._reference_before_training, depends_on)
        return find_weights(data, self._encoder, options.importance_clip, folder=folder, trainer=self._trainer)

    @contextmanager
    def _reference_before_training(self) -> Iterator[PreTrainedModel]:
        with self._before_training(), self.reference.pristine_model() as model:
            yield model

    def _take_importance(self, weights: ImportanceWeights) -> None:
        """Uses these weights from now on: a column of a table; of a stream rows are weighed as their turn comes."""
        self.importance, data = weights, getattr(self._trainer, "datamodule", None)
        if not isinstance(data, FeedbackDataModule):
            return
        if not data.streaming:
            data.set_column("train", "importance_weight", weights.row_weights)
        elif weights.ratio.has_evidence and self._encoder is not None:
            self._step_weigher = StepWeigher(self._encoder, weights.ratio)
            data.with_words = self._encoder.takes_words

    def _sees_every_row(self, stage: str) -> bool:
        trainer = self.trainer
        if stage != "fit":
            limits = {
                "validate": trainer.limit_val_batches,
                "test": trainer.limit_test_batches,
                "predict": trainer.limit_predict_batches,
            }
            return _is_unlimited(limits[stage])
        steps_per_epoch: int = trainer.datamodule.steps_per_epoch  # type: ignore[attr-defined]
        return self.num_steps() >= steps_per_epoch

    def _shares_prompts(self) -> bool:
        return bool(getattr(getattr(self._trainer, "datamodule", None), "group_by_prompt", False))

    def _digest_of_reference(self) -> str:
        if not self._reference_digest:
            named = self._built_reference.named_parameters()
            # Where it is another model, loading it has taken the digest.
            self._reference_digest = self._reference_digest or self._digest_of(named)
        return self._reference_digest

    def _digest_of(self, named: Iterable[tuple[str, Tensor]]) -> str:
        """The digest of whole weights; where all processes take part in whatever one does, each reads a share."""
        digests = {}
        for number, (name, value) in enumerate(sorted(named, key=lambda pair: pair[0])):
            if self._sharding is None or number % self.trainer.world_size == self.trainer.global_rank:
                digests[name] = digest_of_tensor(value, final_dtype(value))
        parts = [digests] if self._sharding is None else gather_over_ranks(digests, self.trainer)
        return digest_of_values({name: digest for part in parts for name, digest in part.items()})

    def _say_what_is_trained(self) -> None:
        trained, total = self._num_parameters
        weights = next(self.policy.parameters()).dtype
        up, down = self.class_weights or (1.0, 1.0)
        rank_zero_info(
            f"policy: {self.hparams['name_or_path']}, {trained:,} of {total:,} parameters trained, "
            f"weights in {weights}; {self.num_steps()} optimizer steps of {self._rows_per_step()} rows; "
            f"class weights: up {up:.3f}, down {down:.3f}"
        )
        rank_zero_info(f"rows of a micro-batch are {self._layout_reason}")
        if self._trunk is not None:
            rank_zero_info(f"the first {self._trunk.depth} layers, which nothing trains, run once for both models")

    def configure_callbacks(self) -> list[Callback]:
        """The callbacks that belong to the method: the guard, the metrics, and the reward shift's update."""
        from bco_lightning.callbacks import FiniteGuard, ImplicitRewardMonitor, ImportanceMonitor, RewardShiftUpdate

        kinds = [FiniteGuard, ImplicitRewardMonitor, RewardShiftUpdate]
        if self.hparams["importance_weights"] != "off":
            kinds.append(ImportanceMonitor)
        # One that the trainer was given, or a subclass of it, stands in place of ours.
        given = self.trainer.callbacks  # type: ignore[attr-defined]
        return [kind() for kind in kinds if not any(isinstance(callback, kind) for callback in given)]

    @property
    def reward_shift(self) -> Baseline:
        """What the objective compares rewards with, estimated from past steps: of BCO the reward shift."""
        return self.objective.baseline

    def on_fit_start(self) -> None:
        """Forgets the rows of an earlier fit."""
        self.step_rows, self.step_summary = [], None

    def on_train_start(self) -> None:
        """From here on the policy is not the reference any more."""
        self.reference.policy_moves()
        if self._saved_optimizers:
            restore_states(self, self.trainer.optimizers, self._saved_optimizers)
            self._saved_optimizers = []

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Gives a micro-batch the reference log-probs that are known, if those of all its rows are."""
        cache, name = self._reference_cache, self._name_of_dataset()
        if cache is None or not isinstance(batch, FeedbackBatch):
            return batch
        if is_sharded(self.policy) and not cache.is_complete(name):
            return batch  # a pass through shards takes all processes; one alone cannot leave it out
        return replace(batch, reference_log_probs_B=cache.lookup(name, batch.row_ids_B))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Sums the step over processes, for the callbacks; one that is not finite ends here, or is left out."""
        from bco_lightning.callbacks.step_callback import summarize_step

        summarize_step(self.trainer, self, optimizer)
        if self._reference_cache is not None:
            self._reference_cache.record("train", self.step_rows)

    def on_validation_epoch_end(self) -> None:
        """Keeps the reference log-probs of the held-out rows."""
        self._record_evaluated()

    def on_test_epoch_end(self) -> None:
        """Keeps the reference log-probs of the test rows."""
        self._record_evaluated()

    def on_predict_epoch_end(self) -> None:
        """Keeps the reference log-probs of the rows that were scored; a process without rows does not come here."""
        if self._reference_cache is not None:
            self._reference_cache.keep(self._name_of_dataset(), self._scored_online)
        self._scored_online = []

    def teardown(self, stage: str) -> None:
        """Puts reference log-probs on disk that are not there yet."""
        if self._reference_cache is not None:
            self._reference_cache.write()

    def _name_of_dataset(self) -> str:
        running = str(self.trainer.state.stage.value)  # type: ignore[union-attr]
        return "validate" if running == "sanity_check" else running

    def _record_evaluated(self) -> None:
        if self._reference_cache is not None:
            self._reference_cache.record(self._name_of_dataset(), self._scored_online)
        self._scored_online = []

    def rewarded_rows(self, batch: FeedbackBatch) -> tuple[Tensor, ScoredRows]:
        """Scores a micro-batch.

        Args:
            batch: Rows on this module's device.

        Returns:
            The loss of each row before class weights, shape ``(B,)``, with gradient; and everything else, detached.
        """
        policy, trunk = self.policy, self._trunk
        weigher = self._step_weigher if self._step_weigher and self.trainer.training else None
        with weigher.watching(self.reference.own_model or policy) if weigher else nullcontext():
            trunk_states_SH = self._trunk_states(batch)
            with trunk.left_out() if trunk else nullcontext():
                policy_log_probs_B = completion_log_probs(policy, batch, trunk_states_SH=trunk_states_SH)
                reference_log_probs_B = batch.reference_log_probs_B
                if reference_log_probs_B is None:
                    reference_log_probs_B = self.reference.log_probs(batch, trunk_states_SH)
        rewards_B = self.beta * (policy_log_probs_B - reference_log_probs_B)
        weights_B = weigher.weights(batch) if weigher else batch.importance_weights_B
        losses_B = self.objective.losses(rewards_B, batch.thumbs_up_B, weights_B)
        return losses_B, ScoredRows(
            thumbs_up_B=batch.thumbs_up_B,
            policy_log_probs_B=policy_log_probs_B.detach(),
            reference_log_probs_B=reference_log_probs_B,
            rewards_B=rewards_B.detach(),
            losses_B=losses_B.detach(),
            completion_lengths_B=batch.completion_lengths,
            row_ids_B=batch.row_ids_B,
            sources_B=batch.sources_B,
            reward_shift=self.objective.threshold,
        )

    def _trunk_states(self, batch: FeedbackBatch) -> Tensor | None:
        return self._trunk.states(batch) if self._trunk is not None else None

    def training_step(self, batch: FeedbackBatch, batch_idx: int) -> Tensor:
        """The weighted loss of a micro-batch; its rows join ``step_rows``, which holds those of one optimizer step.

        A loss that is not finite is the guard's business, which every process reaches; an error here would leave the
        others waiting.
        """
        losses_B, rows = self.rewarded_rows(batch)
        if self.step_summary is not None:  # the step before has ended
            self.step_rows, self.step_summary = [], None
        self.step_rows.append(rows)
        return mean_over_rows(losses_B, batch.thumbs_up_B, self.class_weights or self._chosen_class_weights())

    def validation_step(self, batch: FeedbackBatch, batch_idx: int) -> dict[str, Any]:
        """The rows of a micro-batch, for the callbacks."""
        return {"rows": self._evaluated(batch)}

    def test_step(self, batch: FeedbackBatch, batch_idx: int) -> dict[str, Any]:
        """The rows of a micro-batch, for the callbacks."""
        return {"rows": self._evaluated(batch)}

    def predict_step(self, batch: FeedbackBatch, batch_idx: int) -> ScoredRows:
        """The rows of a micro-batch, scored."""
        return self._evaluated(batch)

    def _evaluated(self, batch: FeedbackBatch) -> ScoredRows:
        rows = self.rewarded_rows(batch)[1]
        if self._reference_cache is not None and batch.reference_log_probs_B is None:
            self._scored_online.append(rows)
        return rows

    def configure_optimizers(self) -> Any:
        """AdamW on what is trained, with a linear warm-up and the chosen schedule over all optimizer steps."""
        options = self.hparams
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = make_optimizer(
            options["optimizer"], parameters, lr=options["learning_rate"], weight_decay=options["weight_decay"]
        )
        num_steps = self.num_steps()
        scheduler = get_scheduler(
            options["lr_schedule"],
            optimizer,
            num_warmup_steps=math.ceil(options["warmup_ratio"] * num_steps),
            num_training_steps=num_steps,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """What is trained, without the frozen base."""
        trained = set(self._trained_names())
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name in trained}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the reward shift, the names of what is trained, and what the run is made of.

        Raises:
            NonFiniteError: If a trained parameter is not finite; a checkpoint of it would be of no use.
        """
        finite = [bool(own_part(value).isfinite().all()) for value in checkpoint["state_dict"].values()]
        if self._sharding is not None:  # a process that went on alone would wait for the others
            not_finite = torch.tensor([not own for own in finite], dtype=torch.uint8)
            finite = [not broken for broken in max_over_ranks(not_finite, self.trainer)]
        broken = [name for name, own in zip(checkpoint["state_dict"], finite, strict=True) if not own]
        if broken:
            raise NonFiniteError(
                f"optimizer step {checkpoint['global_step']}",
                f"expected finite weights to save, found {broken[0]} ({len(broken)} parameters) not finite.",
                "The checkpoints before are finite. A lower model.learning_rate often helps.",
            )
        if "optimizer_states" in checkpoint:
            checkpoint["optimizer_states"] = states_by_name(self, self.trainer.optimizers)
        checkpoint["reward_shift"] = self.reward_shift.state_dict()
        checkpoint["trained_parameters"] = self._trained_names()
        checkpoint["fingerprints"] = self.fingerprints()
        checkpoint["config_digest"] = digest_of_values({**self.hparams, **checkpoint["fingerprints"]})
        checkpoint["accepted_changes"] = list(self._accepted_changes)
        checkpoint["versions"] = versions()
        if self.importance is not None:
            checkpoint["importance"] = self.importance.state_dict()
        if self._reference_cache is not None:
            # On disk for other runs; in the checkpoint so that this one goes on with the same bits whatever others do.
            self._reference_cache.write()
            checkpoint["reference_log_probs"] = self._reference_cache.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the reward shift, and refuses the checkpoint of another run.

        Raises:
            CheckpointError: If it is no checkpoint of this module, its trained parameters or its beta are others, or,
                for a run that is to go on, anything else that the run is made of.
        """
        if "reward_shift" not in checkpoint or "trained_parameters" not in checkpoint:
            raise CheckpointError("checkpoint", "expected a checkpoint of BCOModule, found another.")
        self.configure_model()
        theirs, ours = set(checkpoint["trained_parameters"]), set(self._trained_names())
        if theirs != ours or not ours <= checkpoint["state_dict"].keys():
            raise CheckpointError(
                "checkpoint",
                f"expected {len(ours)} trained parameters as configured, found {len(theirs)}, "
                f"{len(theirs ^ ours)} of them with no match.",
                "Use the same model.name_or_path and model.lora as the run that wrote it.",
            )
        self._refuse_other_shapes(checkpoint["state_dict"])
        self._refuse_another_run(checkpoint)
        # Kept from Lightning, which would give them to an optimizer as they are.
        self._saved_optimizers, checkpoint["optimizer_states"] = checkpoint.get("optimizer_states", []), []
        self.reward_shift.load_state_dict(checkpoint["reward_shift"])
        self.reference.policy_moves()
        self._load_importance(checkpoint.get("importance"))
        if self._reference_cache is not None and "reference_log_probs" in checkpoint:
            as_lazy = self.options.reference_log_probs == "auto" and self.trainer.training
            self._reference_cache.load_state_dict(checkpoint["reference_log_probs"], unknown_too=as_lazy)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, **options: Any) -> BCOModule:  # type: ignore[override]
        """Builds the module of a checkpoint with its trained weights and reward shift, on the CPU.

        Args:
            checkpoint_path: Folder of a step.
            options: Options that are to be others than those of the run, such as ``dtype``.

        Raises:
            CheckpointError: If it is missing, damaged or no checkpoint of this module.
        """
        checkpoint = read_checkpoint(checkpoint_path, moments=False)
        if "trained_parameters" not in checkpoint:
            raise CheckpointError(str(checkpoint_path), "expected a checkpoint of BCOModule, found another.")
        module = cls(**{**checkpoint["hyper_parameters"], **options})
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"], strict=False)
        return module

    def _load_importance(self, state: Mapping[str, Any] | None) -> None:
        """Goes on with the bits of a run that had the same rows, encoder and options."""
        if state is None or self.hparams["importance_weights"] == "off":
            return
        if self.importance is not None and self.importance.key != state["told"]["key"]:
            return
        try:
            self._take_importance(ImportanceWeights.from_state_dict(state))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                "checkpoint",
                f"expected importance weights as this version writes them, found others ({error}).",
                "Use the version that wrote it.",
            ) from error

    def fingerprints(self) -> dict[str, Any]:
        """What this run is made of: settings that decide its numbers, and digests of reference, tokenizer and rows."""
        return {**self._fingerprints, **self._data_fingerprints()}

    def _refuse_other_shapes(self, weights: Mapping[str, Any]) -> None:
        for name, shape in self._trained_shapes.items():
            found = tuple(weights[name].shape)
            if shape != found:
                raise CheckpointError(
                    "checkpoint",
                    f"expected {name} of shape {shape}, found {found}.",
                    "Use the same model.name_or_path and model.lora as the run that wrote it.",
                )

    def _refuse_another_run(self, checkpoint: dict[str, Any]) -> None:
        goes_on = self._trainer is not None and self.trainer.training
        then = checkpoint.get("fingerprints", {})
        now = self.fingerprints() if goes_on else {"beta": self.beta}
        changed = accepted_differences(then, now, self._changes_to_accept() if goes_on else [], goes_on=goes_on)
        self._accepted_changes = list(checkpoint.get("accepted_changes", []))
        for text in self._changed_settings(checkpoint, then) if goes_on else []:
            rank_zero_info(f"checkpoint: model.{text}.")
        for text in changed:
            self._accepted_changes.append(f"step {checkpoint['global_step']}: {text}")
            rank_zero_info(f"checkpoint: {text}, as checkpoint.accept_changes allows.")

    def _changed_settings(self, checkpoint: dict[str, Any], known: Mapping[str, Any]) -> list[str]:
        """Settings that may be changed on purpose, such as the learning rate; worth a remark."""
        then = {name: value for name, value in checkpoint.get("hyper_parameters", {}).items() if name not in known}
        return list(differences(then, {name: self.hparams.get(name) for name in then}).values())

    def _own_fingerprints(self) -> dict[str, Any]:
        return {
            **{
                name: self.hparams[name]
                for name in ("objective", "beta", "class_weights", "reward_shift_decay", "lora")
            },
            **({"optimizer": self.hparams["optimizer"]} if self.hparams["optimizer"] != "adamw" else {}),
            **self._weighting_fingerprints(),
            "reference": self._digest_of_reference(),
            "tokenizer": digest_of_tokenizer(self.tokenizer),
        }

    def _weighting_fingerprints(self) -> dict[str, Any]:
        if self.importance is None:
            return {}
        return {
            "importance_weights": self.hparams["importance_weights"],
            "importance_clip": self.hparams["importance_clip"],
            "prompt_encoder": self.importance.encoder,
        }

    def _data_fingerprints(self) -> dict[str, Any]:
        data = getattr(self._trainer, "datamodule", None)
        return data.fingerprints() if data is not None else {}

    def _changes_to_accept(self) -> list[str]:
        return [
            name for callback in self.trainer.checkpoint_callbacks for name in getattr(callback, "accept_changes", [])
        ]

    def _trained_names(self) -> list[str]:
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]

    def num_steps(self) -> int:
        """Optimizer steps of the whole run, from the configuration.

        ``trainer.estimated_stepping_batches`` would build the data iterator before a resumed step is restored.
        """
        data, epochs = getattr(self.trainer, "datamodule", None), self.trainer.max_epochs
        limits = [self.trainer.max_steps] if self.trainer.max_steps > 0 else []
        if data is not None and epochs is not None and epochs > 0:
            limits.append(data.steps_per_epoch * epochs)
        if not limits:
            raise ConfigError("trainer.max_steps", "expected a number of steps or epochs to plan for, found neither.")
        return int(min(limits))

    def _rows_per_step(self) -> int | str:
        data = getattr(self.trainer, "datamodule", None)
        return data.rows_per_step if data is not None else "?"

    def _chosen_class_weights(self) -> tuple[float, float]:
        chosen = self.hparams["class_weights"]
        if chosen == "none":
            return 1.0, 1.0
        if chosen != "auto":
            return tuple(chosen)
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            raise ConfigError(
                "model.class_weights",
                "expected two numbers or 'none' where no FeedbackDataModule is used, found 'auto'.",
            )
        return class_weights_of(*data.class_frequencies)

    def _load_exported_reward_shift(self, name_or_path: str, reference: str) -> None:
        source = locate_model(name_or_path)
        file = Path(source.location) / ALIGNMENT_FILE
        if not file.exists():
            return
        alignment = json.loads(file.read_text(encoding="utf-8"))
        for key, ours in (("reference", reference), ("beta", self.beta)):
            if alignment[key] != ours:
                rank_zero_info(f"{file}: aligned with {key} {alignment[key]}, evaluated with {ours}.")
        self.reward_shift.load_state_dict(alignment["reward_shift"])


def _dtype_of_matrices(policy: nn.Module) -> torch.dtype:
    found = next(final_dtype(parameter) for parameter in policy.parameters() if parameter.ndim >= 2)
    return found if found.is_floating_point else torch.bfloat16


def _is_unlimited(limit: float | int) -> bool:
    return isinstance(limit, float) and limit == 1.0  # as an integer, 1 is one batch
