"""Measure what a run achieved where the reward behind the thumbs is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from typing_extensions import override

from bco_lightning.batch import FeedbackBatch
from bco_lightning.data.collate import collate
from bco_lightning.demo.tone import tone
from bco_lightning.distributed import sharding_of
from bco_lightning.errors import ConfigError
from bco_lightning.models.generation import SampledCompletion, sample_completions
from bco_lightning.models.log_probs import completion_log_probs
from bco_lightning.module import BCOModule
from bco_lightning.options import chosen_seed
from bco_lightning.report import Alignment, measure_alignment

KNOWN_REWARDS: dict[str, Callable[[str], float]] = {"tone": tone}


class KnownRewardTrial(Callback):
    """After ``fit``: samples policy and reference on the held-out prompts and compares their true rewards.

    Writes ``alignment.json`` into the run folder and prints a table with a verdict.

    Args:
        reward: The known reward; ``none`` switches the trial off, which is right for thumbs of real users.
        samples_per_prompt: Samples of each model for each held-out prompt.
        max_new_tokens: Limit of a sample, in tokens.
        batch_size: Samples drawn at a time.
        max_prompts: Use only so many of the held-out prompts; 0 uses all.
        seed: Seed of the samples; that of ``seed_everything`` if left out.
    """

    def __init__(
        self,
        reward: Literal["none", "tone"] = "none",
        samples_per_prompt: int = 4,
        max_new_tokens: int = 64,
        batch_size: int = 64,
        max_prompts: int = 0,
        seed: int | None = None,
    ) -> None:
        self.reward, self.samples_per_prompt = reward, samples_per_prompt
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.max_prompts, self.seed = max_prompts, chosen_seed(seed)
        self.alignment: Alignment | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: BCOModule, stage: str) -> None:  # type: ignore[override]
        if self.reward == "none" or stage != "fit":
            return
        if sharding_of(trainer) is not None:
            raise ConfigError(
                "known_reward.reward", "expected whole weights to sample from, found them cut up.", "Use ddp, or none."
            )
        KNOWN_REWARDS[self.reward]("")  # what the reward needs must be missed before training, not after
        if getattr(trainer, "datamodule", None) is None or trainer.datamodule.validation_dataset is None:  # type: ignore[attr-defined]
            raise ConfigError("known_reward.reward", "expected held-out rows to sample prompts from, found none.")

    @override
    def on_train_end(self, trainer: Trainer, pl_module: BCOModule) -> None:  # type: ignore[override]
        if self.reward == "none":
            return
        log_dir = trainer.log_dir  # a broadcast: every process has to ask
        if trainer.is_global_zero:
            self.alignment = self.compare(pl_module, self._held_out_prompts(trainer.datamodule))  # type: ignore[attr-defined]
            self.alignment.print(self.reward)
            if log_dir is not None:
                self.alignment.write(Path(log_dir) / "alignment.json")
        trainer.strategy.barrier("known reward trial")

    @torch.no_grad()
    def compare(self, module: BCOModule, prompts: list[str]) -> Alignment:
        """Samples both models on rendered prompts and measures the difference.

        Args:
            module: Policy and reference.
            prompts: Prompts with the chat template applied.

        Returns:
            Rewards, intervals, KL, perplexity and lengths.
        """
        asked = [prompt for prompt in prompts for _ in range(self.samples_per_prompt)]
        policy_samples = self._sample(module.policy, module.tokenizer, asked, "policy samples")
        with module.reference.active_model() as reference:
            reference_samples = self._sample(reference, module.tokenizer, asked, "reference samples")
        by_policy = partial(completion_log_probs, module.policy)
        log_probs = {
            "policy_log_probs": self._log_probs(by_policy, module, asked, policy_samples),
            "reference_log_probs": self._log_probs(module.reference.log_probs, module, asked, policy_samples),
            "own_log_probs": self._log_probs(module.reference.log_probs, module, asked, reference_samples),
        }
        module.reference.release()
        return measure_alignment(
            self._rewards(policy_samples),
            self._rewards(reference_samples),
            **log_probs,
            policy_lengths=torch.tensor([len(sample.token_ids) for sample in policy_samples]),
            reference_lengths=torch.tensor([len(sample.token_ids) for sample in reference_samples]),
            seed=self.seed,
        )

    def _held_out_prompts(self, data: Any) -> list[str]:
        distinct = list(dict.fromkeys(data.validation_dataset["prompt"]))
        chosen = distinct[: self.max_prompts] if self.max_prompts else distinct
        row_tokenizer = data.row_tokenizer
        return [row_tokenizer.render_prompt(json.loads(prompt)) for prompt in chosen]

    def _sample(self, model: PreTrainedModel, tokenizer: Any, asked: list[str], name: str) -> list[SampledCompletion]:
        samples: list[SampledCompletion] = []
        for start in tqdm(range(0, len(asked), self.batch_size), desc=name):
            samples += sample_completions(
                model,
                tokenizer,
                asked[start : start + self.batch_size],
                max_new_tokens=self.max_new_tokens,
                # Policy and reference draw from the same random numbers, which narrows their difference.
                seed=self.seed + start,
            )
        return samples

    def _log_probs(
        self,
        score: Callable[[FeedbackBatch], Tensor],
        module: BCOModule,
        asked: list[str],
        samples: list[SampledCompletion],
    ) -> Tensor:
        rows = []
        for prompt, sample in zip(asked, samples, strict=True):
            prompt_ids = module.tokenizer(prompt, add_special_tokens=False)["input_ids"]
            mask = [False] * len(prompt_ids) + [True] * len(sample.token_ids)
            rows.append(
                {"input_ids": prompt_ids + sample.token_ids, "completion_mask": mask, "thumbs_up": None, "row_id": 0}
            )
        device = next(module.policy.parameters()).device
        starts = range(0, len(rows), self.batch_size)
        return torch.cat([score(collate(rows[start : start + self.batch_size]).to(device)) for start in starts]).cpu()

    def _rewards(self, samples: list[SampledCompletion]) -> Tensor:
        score = KNOWN_REWARDS[self.reward]
        return torch.tensor([score(sample.text) for sample in samples]).view(-1, self.samples_per_prompt)
