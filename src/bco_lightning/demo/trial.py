"""Measure what a run achieved where the reward behind the thumbs is known.

``P`` prompts, ``S`` fresh samples of a model for each.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import Callback, Trainer
from rich.console import Console
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import override

from bco_lightning.callbacks.run_checkpoint import run_folder_of
from bco_lightning.checkpoints.folders import written_whole
from bco_lightning.data.collate import collate
from bco_lightning.demo.tone import tone
from bco_lightning.errors import ConfigError
from bco_lightning.importance.report import text_table
from bco_lightning.models.generation import SampledCompletion, held_out_prompts, sample_completions
from bco_lightning.module import BCOModule
from bco_lightning.options import chosen_seed
from bco_lightning.parallel.sharding import sharding_of

_NUM_RESAMPLES = 10_000


class Samples(NamedTuple):
    """Fresh samples of one model: true rewards, log-probs in nats under policy and reference, and tokens."""

    rewards_PS: Tensor
    log_probs_PS: Tensor
    reference_log_probs_PS: Tensor
    lengths_PS: Tensor


@dataclass(frozen=True)
class Alignment:
    """Policy against reference on held-out prompts, by fresh samples of both.

    ``gain`` is the mean true reward of the policy less that of the reference; ``win_rate`` the probability that a
    policy sample beats a reference sample for the same prompt, ties counting half; ``kl`` is KL(policy, reference) per
    answer, in nats, on the policy's samples; perplexities are under the reference, tokens are means. Intervals are 95 %
    intervals over prompts, by bootstrap; ``seed`` is its seed, and that of the samples.
    """

    gain: float
    gain_low: float
    gain_high: float
    reward_policy: float
    reward_reference: float
    win_rate: float
    win_rate_low: float
    win_rate_high: float
    kl: float
    perplexity: float
    perplexity_reference: float
    tokens_policy: float
    tokens_reference: float
    num_prompts: int
    samples_per_prompt: int
    seed: int

    @property
    def verdict(self) -> str:
        """One sentence: improved, not shown, or worse."""
        said, where = "NOT IMPROVED", "includes zero"
        if self.gain_low > 0:
            said, where = "Improved", "lies above zero"
        if self.gain_high < 0:
            said, where = "WORSE", "lies below zero"
        return f"{said}: the 95 % interval of the gain in true reward {where}."

    def print(self, reward_name: str) -> None:
        """Prints the numbers as a table, with the verdict."""
        title = f"Held-out prompts: {self.num_prompts}, {self.samples_per_prompt} fresh samples of each model"
        interval = f"{self.gain:+.3f} ({self.gain_low:+.3f} to {self.gain_high:+.3f})"
        win_rate = f"{self.win_rate:.3f} ({self.win_rate_low:.3f} to {self.win_rate_high:.3f})"
        rows = [
            (f"true reward ({reward_name})", f"{self.reward_policy:.3f}", f"{self.reward_reference:.3f}", interval),
            ("win rate against reference", "", "", win_rate),
            ("KL to reference, nats", f"{self.kl:.2f}"),
            ("perplexity under reference", f"{self.perplexity:.2f}", f"{self.perplexity_reference:.2f}"),
            ("tokens per answer", f"{self.tokens_policy:.1f}", f"{self.tokens_reference:.1f}"),
        ]
        console, headings = Console(), ("", "policy", "reference", "difference (95 % interval)")
        console.print(text_table(title, *headings, rows=rows))
        console.print(self.verdict, style="green" if self.gain_low > 0 else "bold red")


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
    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if self.reward == "none" or stage != "fit":
            return
        if sharding_of(trainer) is not None:
            problem = "expected whole weights to sample from, found them cut up."
            raise ConfigError("known_reward.reward", problem, "Use ddp, or none.")
        tone("")  # what the reward needs must be missed before training, not after
        if getattr(getattr(trainer, "datamodule", None), "validation_dataset", None) is None:
            raise ConfigError("known_reward.reward", "expected held-out rows to sample prompts from, found none.")

    @override
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.reward == "none":
            return
        run_folder = run_folder_of(trainer)  # a broadcast: every process has to ask
        if trainer.is_global_zero:
            prompts, *_ = held_out_prompts(trainer.datamodule.validation_dataset, self.max_prompts or None)
            self.alignment = self.compare(pl_module, prompts)
            self.alignment.print(self.reward)
            if run_folder is not None:
                with written_whole(run_folder / "alignment.json") as partial:
                    partial.write_text(json.dumps(asdict(self.alignment), indent=2) + "\n", encoding="utf-8")
        trainer.strategy.barrier("known reward trial")

    @torch.no_grad()
    def compare(self, module: BCOModule, prompts: Sequence[list[int]]) -> Alignment:
        """Samples policy and reference on prompts, given as tokens, and measures the difference."""
        asked = [prompt for prompt in prompts for _ in range(self.samples_per_prompt)]
        by_policy = self._sample(module.policy, module.tokenizer, asked, "policy samples")
        with module.reference.model() as reference:
            by_reference = self._sample(reference, module.tokenizer, asked, "reference samples")
        of_policy, of_reference = (self._measured(module, asked, answers) for answers in (by_policy, by_reference))
        module.reference.release()
        return measure_alignment(of_policy, of_reference, self.seed)

    def _sample(self, model: Any, tokenizer: Any, asked: list[list[int]], name: str) -> list[SampledCompletion]:
        answers: list[SampledCompletion] = []
        for start in tqdm(range(0, len(asked), self.batch_size), desc=name):
            some, length = asked[start : start + self.batch_size], self.max_new_tokens
            # Policy and reference draw from the same random numbers, which narrows their difference.
            answers += sample_completions(model, tokenizer, some, max_new_tokens=length, seed=self.seed + start)
        return answers

    def _measured(self, module: BCOModule, asked: list[list[int]], answers: list[SampledCompletion]) -> Samples:
        """What the answers come to under policy and reference, whichever of them gave them."""
        rows = []
        for prompt, answer in zip(asked, answers, strict=True):
            mask = [False] * len(prompt) + [True] * len(answer.token_ids)
            tokens = {"input_ids": prompt + answer.token_ids, "completion_mask": mask}
            rows.append({**tokens, "thumbs_up": None, "row_id": 0})
        batches = [collate(rows[start : start + self.batch_size]) for start in range(0, len(rows), self.batch_size)]
        scored = zip(*(module.log_probs(batch.to(module.policy.device)) for batch in batches), strict=True)
        rewards, lengths = zip(*((tone(answer.text), len(answer.token_ids)) for answer in answers), strict=True)
        of_rows = (torch.tensor(rewards), *map(torch.cat, scored), torch.tensor(lengths))
        return Samples(*(values.cpu().float().view(-1, self.samples_per_prompt) for values in of_rows))


def measure_alignment(policy: Samples, reference: Samples, seed: int) -> Alignment:
    """Summarizes fresh samples of policy and reference for the same prompts; the seed is that of the bootstrap too."""
    policy_PS, reference_PS = policy.rewards_PS.double(), reference.rewards_PS.double()
    gains_P = policy_PS.mean(1) - reference_PS.mean(1)
    duels = policy_PS[:, :, None] - reference_PS[:, None, :]
    wins_P = ((duels > 0).double() + 0.5 * (duels == 0).double()).mean((1, 2))
    gain_low, gain_high = _interval_over_prompts(gains_P, seed)
    win_low, win_high = _interval_over_prompts(wins_P, seed)
    surprise = [-each.reference_log_probs_PS.double().sum() / each.lengths_PS.sum() for each in (policy, reference)]
    return Alignment(
        gain=float(gains_P.mean()),
        gain_low=gain_low,
        gain_high=gain_high,
        reward_policy=float(policy_PS.mean()),
        reward_reference=float(reference_PS.mean()),
        win_rate=float(wins_P.mean()),
        win_rate_low=win_low,
        win_rate_high=win_high,
        kl=float((policy.log_probs_PS.double() - policy.reference_log_probs_PS.double()).mean()),
        perplexity=math.exp(surprise[0]),
        perplexity_reference=math.exp(surprise[1]),
        tokens_policy=float(policy.lengths_PS.double().mean()),
        tokens_reference=float(reference.lengths_PS.double().mean()),
        num_prompts=policy_PS.shape[0],
        samples_per_prompt=policy_PS.shape[1],
        seed=seed,
    )


def _interval_over_prompts(values_P: Tensor, seed: int) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values_P), (_NUM_RESAMPLES, len(values_P)), generator=generator)
    low, high = values_P[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(low), float(high)
