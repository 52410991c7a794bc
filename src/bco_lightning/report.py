"""What a run did to the model, measured with a known reward: numbers, table and file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

_NUM_RESAMPLES = 10_000


@dataclass(frozen=True)
class Alignment:
    """Policy against reference on held-out prompts, by fresh samples of both.

    Args:
        gain: Mean true reward of the policy less that of the reference.
        gain_low: Lower end of its 95 % interval over prompts (bootstrap).
        gain_high: Upper end.
        reward_policy: Mean true reward of the policy's samples.
        reward_reference: Mean true reward of the reference's samples.
        win_rate: Probability that a policy sample beats a reference sample for the same prompt; ties count half.
        win_rate_low: Lower end of its 95 % interval over prompts.
        win_rate_high: Upper end.
        kl: KL(policy, reference) per answer, in nats, estimated on the policy's samples.
        perplexity: Perplexity of the policy's samples under the reference.
        perplexity_reference: Perplexity of the reference's own samples under the reference, to compare with.
        tokens_policy: Mean length of the policy's samples, in tokens.
        tokens_reference: Mean length of the reference's samples, in tokens.
        num_prompts: Held-out prompts.
        samples_per_prompt: Samples of each model for each prompt.
        seed: Seed of the samples.
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
        if self.gain_low > 0:
            return "Improved: the 95 % interval of the gain in true reward lies above zero."
        if self.gain_high < 0:
            return "WORSE: the 95 % interval of the gain in true reward lies below zero."
        return "NOT IMPROVED: the 95 % interval of the gain in true reward includes zero."

    def write(self, path: Path) -> None:
        """Writes the numbers as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    def print(self, reward_name: str) -> None:
        """Prints the numbers as a table, with the verdict."""
        table = Table(
            title=f"Held-out prompts: {self.num_prompts}, {self.samples_per_prompt} fresh samples of each model"
        )
        for heading in ("", "policy", "reference", "difference (95 % interval)"):
            table.add_column(heading, justify="left" if not heading else "right")
        interval = f"{self.gain:+.3f} ({self.gain_low:+.3f} to {self.gain_high:+.3f})"
        table.add_row(
            f"true reward ({reward_name})", f"{self.reward_policy:.3f}", f"{self.reward_reference:.3f}", interval
        )
        win_rate = f"{self.win_rate:.3f} ({self.win_rate_low:.3f} to {self.win_rate_high:.3f})"
        table.add_row("win rate against reference", "", "", win_rate)
        table.add_row("KL to reference, nats", f"{self.kl:.2f}", "", "")
        table.add_row("perplexity under reference", f"{self.perplexity:.2f}", f"{self.perplexity_reference:.2f}", "")
        table.add_row("tokens per answer", f"{self.tokens_policy:.1f}", f"{self.tokens_reference:.1f}", "")
        console = Console()
        console.print(table)
        console.print(self.verdict, style="green" if self.gain_low > 0 else "bold red")


def measure_alignment(
    policy_rewards_PS: Tensor,
    reference_rewards_PS: Tensor,
    *,
    policy_log_probs: Tensor,
    reference_log_probs: Tensor,
    own_log_probs: Tensor,
    policy_lengths: Tensor,
    reference_lengths: Tensor,
    seed: int,
) -> Alignment:
    """Summarizes fresh samples.

    Args:
        policy_rewards_PS: True rewards of the policy's samples, shape (prompts, samples).
        reference_rewards_PS: True rewards of the reference's samples, of the same shape.
        policy_log_probs: Log-probabilities of the *policy's* samples under the policy, in nats, any shape.
        reference_log_probs: Log-probabilities of the same samples under the reference.
        own_log_probs: Log-probabilities of the *reference's* samples under the reference.
        policy_lengths: Tokens of the policy's samples.
        reference_lengths: Tokens of the reference's samples.
        seed: Seed of the samples; also of the bootstrap.

    Returns:
        The numbers.
    """
    policy, reference = policy_rewards_PS.double(), reference_rewards_PS.double()
    gains_P = policy.mean(1) - reference.mean(1)
    duels = policy[:, :, None] - reference[:, None, :]
    wins_P = ((duels > 0).double() + 0.5 * (duels == 0).double()).mean((1, 2))
    gain_low, gain_high = _interval_over_prompts(gains_P, seed)
    win_low, win_high = _interval_over_prompts(wins_P, seed)
    return Alignment(
        gain=float(gains_P.mean()),
        gain_low=gain_low,
        gain_high=gain_high,
        reward_policy=float(policy.mean()),
        reward_reference=float(reference.mean()),
        win_rate=float(wins_P.mean()),
        win_rate_low=win_low,
        win_rate_high=win_high,
        kl=float((policy_log_probs.double() - reference_log_probs.double()).mean()),
        perplexity=_perplexity(reference_log_probs, policy_lengths),
        perplexity_reference=_perplexity(own_log_probs, reference_lengths),
        tokens_policy=float(policy_lengths.double().mean()),
        tokens_reference=float(reference_lengths.double().mean()),
        num_prompts=policy.shape[0],
        samples_per_prompt=policy.shape[1],
        seed=seed,
    )


def _perplexity(log_probs: Tensor, lengths: Tensor) -> float:
    return float(torch.exp(-log_probs.double().sum() / lengths.sum()))


def _interval_over_prompts(values_P: Tensor, seed: int) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values_P), (_NUM_RESAMPLES, len(values_P)), generator=generator)
    low, high = values_P[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(low), float(high)
