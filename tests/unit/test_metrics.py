"""Metrics equal a float64 recomputation from rows."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from bco_lightning import ImplicitRewardMetrics, bco_loss
from bco_lightning.batch import ScoredRows

SHIFT = 0.05


def make_rows(num_up: int, num_down: int, scale: float = 1.0, seed: int = 0) -> ScoredRows:
    generator = torch.Generator().manual_seed(seed)
    num_rows = num_up + num_down
    up = torch.arange(num_rows) < num_up
    reference = -50 * torch.rand(num_rows, generator=generator)
    policy = reference + scale * (torch.randn(num_rows, generator=generator) + up)
    rewards = 0.1 * (policy - reference)
    return ScoredRows(
        thumbs_up_B=up,
        policy_log_probs_B=policy,
        reference_log_probs_B=reference,
        rewards_B=rewards,
        losses_B=bco_loss(rewards, up, reward_shift=SHIFT),
        completion_lengths_B=torch.randint(1, 40, (num_rows,), generator=generator),
        row_ids_B=torch.arange(num_rows),
        sources_B=torch.zeros(num_rows, dtype=torch.int64),
        reward_shift=SHIFT,
    )


def chosen(rows: ScoredRows, where: slice | torch.Tensor) -> ScoredRows:
    return ScoredRows(**{n: v[where] if isinstance(v, torch.Tensor) else v for n, v in vars(rows).items()})


def recomputed(rows: ScoredRows) -> dict[str, float]:
    """Every metric from plain Python lists."""
    table = [
        (bool(u), float(r), float(p), float(q), int(n))
        for u, r, p, q, n in zip(
            rows.thumbs_up_B,
            rows.rewards_B,
            rows.policy_log_probs_B,
            rows.reference_log_probs_B,
            rows.completion_lengths_B,
            strict=True,
        )
    ]
    ups, downs = [row for row in table if row[0]], [row for row in table if not row[0]]

    def mean(values: list[float]) -> float:
        return math.fsum(values) / len(values)

    wins = [(u[1] > d[1]) + 0.5 * (u[1] == d[1]) for u in ups for d in downs]
    return {
        "loss": mean([math.log1p(math.exp(-(u[1] - SHIFT))) for u in ups])
        + mean([math.log1p(math.exp(d[1] - SHIFT)) for d in downs]),
        "rewards/chosen": mean([u[1] for u in ups]),
        "rewards/rejected": mean([d[1] for d in downs]),
        "rewards/margins": mean([u[1] for u in ups]) - mean([d[1] for d in downs]),
        "rewards/accuracies": mean([float((row[1] > SHIFT) == row[0]) for row in table]),
        "accuracy/chosen": mean([float(u[1] > SHIFT) for u in ups]),
        "accuracy/rejected": mean([float(d[1] <= SHIFT) for d in downs]),
        "auroc": mean(wins),
        "bound/error_term": mean([math.exp(SHIFT - u[1]) for u in ups]) + mean([math.exp(d[1] - SHIFT) for d in downs]),
        "logps/chosen": mean([u[2] for u in ups]),
        "logps/rejected": mean([d[2] for d in downs]),
        "kl/reference_to_policy": mean([row[3] - row[2] for row in table]),
        "length/chosen": mean([u[4] for u in ups]),
        "length/rejected": mean([d[4] for d in downs]),
    }


@pytest.mark.parametrize(("num_up", "num_down"), [(40, 40), (90, 10), (1, 30)])
def test_every_metric_equals_its_recomputation(num_up: int, num_down: int) -> None:
    rows, metrics = make_rows(num_up, num_down), ImplicitRewardMetrics()
    metrics.update(rows)
    computed = {name: float(value) for name, value in metrics.compute().items()}
    expected = recomputed(rows)
    assert computed.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = 5e-3 if name == "auroc" else 1e-6  # AUROC is binned
        assert computed[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name


def test_uneven_batches_count_every_row_once() -> None:
    rows, whole, parts = make_rows(20, 17), ImplicitRewardMetrics(), ImplicitRewardMetrics()
    whole.update(rows)
    for where in (slice(0, 1), slice(1, 30), slice(30, 37)):
        parts.update(chosen(rows, where))
    for name, value in whole.compute().items():
        assert float(parts.compute()[name]) == pytest.approx(float(value), rel=1e-12), name


def test_auroc_sees_differences_far_smaller_than_a_bin_of_probability() -> None:
    rows, metrics = replace(make_rows(200, 200, scale=1e-3), reward_shift=0.0), ImplicitRewardMetrics()
    metrics.update(rows)
    assert float(metrics.compute()["auroc"]) == pytest.approx(recomputed(rows)["auroc"], abs=5e-3)


def test_metrics_of_a_class_without_rows_are_nan_and_never_zero() -> None:
    metrics = ImplicitRewardMetrics()
    metrics.update(make_rows(5, 0))
    values = {name: float(value) for name, value in metrics.compute().items()}
    for name in ("loss", "rewards/rejected", "rewards/margins", "auroc", "bound/error_term", "logps/rejected"):
        assert math.isnan(values[name]), name
    assert not math.isnan(values["rewards/chosen"])


def test_reset_forgets_all_rows() -> None:
    metrics, fresh = ImplicitRewardMetrics(), ImplicitRewardMetrics()
    metrics.update(make_rows(5, 5, seed=1))
    metrics.reset()
    for metric in (metrics, fresh):
        metric.update(make_rows(5, 5, seed=2))
    assert metrics.compute() == fresh.compute()


@pytest.mark.parametrize(
    "names", [["a!", "a?", "a_1"], ["???", "!"], ["x", "x_1", "x"], ["logs/a.jsonl", "logs_a.jsonl"]]
)
def test_each_source_has_metrics_of_its_own_whatever_its_name(names: list[str]) -> None:
    metrics = ImplicitRewardMetrics(names)
    rows = make_rows(6, 6)
    rows = ScoredRows(**{**vars(rows), "sources_B": torch.arange(12) % len(names)})
    metrics.update(rows)
    values = metrics.compute()
    losses = [key for key in values if key.startswith("by_source/") and key.endswith("/loss")]
    assert len(losses) == len(names)
    for number, key in enumerate(losses):
        alone = ImplicitRewardMetrics()
        alone.update(chosen(rows, rows.sources_B == number))
        assert float(values[key]) == pytest.approx(float(alone.compute()["loss"]))
