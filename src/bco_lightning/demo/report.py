"""What a run did to the model, measured with a known reward: numbers, table and file.

``P`` prompts, ``S`` fresh samples of a model for each.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

_NUM_RESAMPLES = 10_000


class Samples(NamedTuple):
    """Fresh samples of one model: true rewards, log-probs in nats under it and under the reference, and tokens."""

    rewards_PS: Tensor
    log_probs_PS: Tensor
    reference_log_probs_PS: Tensor
    lengths_PS: Tensor

    @property
    def perplexity(self) -> float:
        """Perplexity under the reference."""
        return float(torch.exp(-self.reference_log_probs_PS.double().sum() / self.lengths_PS.sum()))


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

    def write(self, path: Path) -> None:
        """Writes the numbers as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    def print(self, reward_name: str) -> None:
        """Prints the numbers as a table, with the verdict."""
        title = f"Held-out prompts: {self.num_prompts}, {self.samples_per_prompt} fresh samples of each model"
        table = Table("", title=title)
        for heading in ("policy", "reference", "difference (95 % interval)"):
            table.add_column(heading, justify="right")
        interval = f"{self.gain:+.3f} ({self.gain_low:+.3f} to {self.gain_high:+.3f})"
        win_rate = f"{self.win_rate:.3f} ({self.win_rate_low:.3f} to {self.win_rate_high:.3f})"
        for cells in (
            (f"true reward ({reward_name})", f"{self.reward_policy:.3f}", f"{self.reward_reference:.3f}", interval),
            ("win rate against reference", "", "", win_rate),
            ("KL to reference, nats", f"{self.kl:.2f}"),
            ("perplexity under reference", f"{self.perplexity:.2f}", f"{self.perplexity_reference:.2f}"),
            ("tokens per answer", f"{self.tokens_policy:.1f}", f"{self.tokens_reference:.1f}"),
        ):
            table.add_row(*cells)
        console = Console()
        console.print(table)
        console.print(self.verdict, style="green" if self.gain_low > 0 else "bold red")


def measure_alignment(policy: Samples, reference: Samples, seed: int) -> Alignment:
    """Summarizes fresh samples of policy and reference for the same prompts; the seed is that of the bootstrap too."""
    policy_PS, reference_PS = policy.rewards_PS.double(), reference.rewards_PS.double()
    gains_P = policy_PS.mean(1) - reference_PS.mean(1)
    duels = policy_PS[:, :, None] - reference_PS[:, None, :]
    wins_P = ((duels > 0).double() + 0.5 * (duels == 0).double()).mean((1, 2))
    gain_low, gain_high = _interval_over_prompts(gains_P, seed)
    win_low, win_high = _interval_over_prompts(wins_P, seed)
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
        perplexity=policy.perplexity,
        perplexity_reference=reference.perplexity,
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
