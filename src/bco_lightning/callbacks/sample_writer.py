"""Answers of policy and reference to a few held-out prompts, side by side, at each validation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from bco_lightning.callbacks.loggers import SAMPLES_FILE, show, telling
from bco_lightning.callbacks.run_checkpoint import run_folder_of
from bco_lightning.data.images import ImageInputs
from bco_lightning.errors import ConfigError, printable
from bco_lightning.models.generation import SampledCompletion, held_out_prompts, sample_completions
from bco_lightning.options import at_least, chosen_seed
from bco_lightning.parallel.sharding import is_sharded

_AT_ONCE, _SHOWN = 16, 8  # samples


class SampleWriter(Callback):
    """Samples policy and reference on held-out prompts at each validation, into ``samples.jsonl`` of the run's folder.

    They show texts of users, so there are none unless they are asked for. A line holds ``step``, ``number`` and
    ``prompt``, ``policy``, ``reference``, and of either answer its number of tokens and whether it ended by itself. The
    first of them are shown in the run's loggers too, wherever these send what they get. Both draw from the same random
    numbers, the same at each validation, so that what differs is what was learned. Draws leave those of training alone.

    Args:
        prompts: How many of the held-out prompts, the first of them; 0 for none.
        every: At each so many validations.
        max_new_tokens: Limit of an answer, in tokens.
        seed: Seed of the answers; that of ``seed_everything`` if left out.

    Raises:
        ConfigError: If a number is out of range.
    """

    def __init__(self, prompts: int = 0, every: int = 1, max_new_tokens: int = 64, seed: int | None = None) -> None:
        at_least(0, "prompt").check("samples.prompts", prompts)
        at_least(1, "validation").check("samples.every", every)
        at_least(1, "token").check("samples.max_new_tokens", max_new_tokens)
        self.prompts, self.every, self.max_new_tokens, self.seed = prompts, every, max_new_tokens, chosen_seed(seed)
        self._asked: list[list[int]] = []
        self._said: list[str] = []
        self._shown: list[Any] = []
        self._by_reference: list[SampledCompletion] = []
        self._validations = 0

    @override
    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if not self.prompts or stage != "fit":
            return
        dataset = getattr(getattr(trainer, "datamodule", None), "validation_dataset", None)
        if dataset is None:
            remedy = "Set data.validation_files or data.validation_fraction."
            raise ConfigError("samples.prompts", "expected held-out rows to sample prompts from, found none.", remedy)
        self._asked, self._said, self._shown = held_out_prompts(dataset, self.prompts)
        self._validations = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if self._asked:  # as long as the policy is the reference still, that takes no second model
            held = pl_module.reference.own_model is not None
            with pl_module.reference.before_training(trainer) as model:
                self._by_reference = self._sampled(trainer, pl_module, model)
            if not held:
                pl_module.reference.release()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if not self._asked or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        self._validations += 1
        if (self._validations - 1) % self.every == 0:
            with trainer.precision_plugin.forward_context():
                by_policy = self._sampled(trainer, pl_module, pl_module.policy)
            folder = run_folder_of(trainer)
            if trainer.is_global_zero:
                self._write(trainer, by_policy, folder)

    def _sampled(self, trainer: Trainer, module: Any, model: Any) -> list[SampledCompletion]:
        """By the first process, for itself; by all where each holds a part of the model."""
        found: list[SampledCompletion] = []
        if trainer.is_global_zero or is_sharded(model):
            for start in range(0, len(self._asked), _AT_ONCE):
                some = self._asked[start : start + _AT_ONCE]
                images = [ImageInputs(module.tokenizer)(each) for each in self._shown[start : start + _AT_ONCE]]
                limits = {"max_new_tokens": self.max_new_tokens, "seed": self.seed + start}
                found += sample_completions(model, module.tokenizer, some, images=images, **limits)
        return found

    def _write(self, trainer: Trainer, by_policy: list[SampledCompletion], folder: Path | None) -> None:
        rows: list[dict[str, Any]] = []
        for prompt, policy, reference in zip(self._said, by_policy, self._by_reference, strict=True):
            row = {"step": trainer.global_step, "number": len(rows), "prompt": prompt}
            row |= {"policy": policy.text, "reference": reference.text}
            for name, answer in (("policy", policy), ("reference", reference)):
                row |= {f"{name}_tokens": len(answer.token_ids), f"{name}_ended": answer.finished}
            rows.append(row)
        if folder is not None:
            with telling(path := folder / SAMPLES_FILE), path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            if self._validations == 1:
                rank_zero_info(f"samples of policy and reference, with texts of users: {folder / SAMPLES_FILE}")
        columns = ("prompt", "policy", "reference")
        cells = [[printable(str(row[name])) for name in columns] for row in rows[:_SHOWN]]
        show("table", trainer.loggers, "samples", columns, cells, trainer.global_step)
