"""Metrics equal a float64 recomputation from rows."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sklearn.metrics import roc_auc_score

from bco_lightning import ImplicitRewardMetrics, bco_loss
from bco_lightning.batch import ScoredRows
from tests.reliability.tiny_run import finish, start

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
        "reward_up": mean([u[1] for u in ups]),
        "reward_down": mean([d[1] for d in downs]),
        "margin": mean([u[1] for u in ups]) - mean([d[1] for d in downs]),
        "accuracy": mean([float((row[1] > SHIFT) == row[0]) for row in table]),
        "accuracy_up": mean([float(u[1] > SHIFT) for u in ups]),
        "accuracy_down": mean([float(d[1] <= SHIFT) for d in downs]),
        "auroc": mean(wins),
        "error_term": mean([math.exp(SHIFT - u[1]) for u in ups]) + mean([math.exp(d[1] - SHIFT) for d in downs]),
        "log_prob_up": mean([u[2] for u in ups]),
        "log_prob_down": mean([d[2] for d in downs]),
        "kl": mean([row[3] - row[2] for row in table]),
        "length_up": mean([u[4] for u in ups]),
        "length_down": mean([d[4] for d in downs]),
    }


@pytest.mark.parametrize(("num_up", "num_down"), [(40, 40), (90, 10), (1, 30)])
def test_every_metric_equals_its_recomputation(num_up: int, num_down: int) -> None:
    rows, metrics = make_rows(num_up, num_down), ImplicitRewardMetrics()
    metrics.update(rows)
    computed = {name: float(value) for name, value in metrics.compute().items()}
    expected = recomputed(rows)
    assert computed.keys() == expected.keys()
    for name, value in expected.items():
        assert computed[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name


def test_uneven_batches_count_every_row_once() -> None:
    rows, whole, parts = make_rows(20, 17), ImplicitRewardMetrics(), ImplicitRewardMetrics()
    whole.update(rows)
    for where in (slice(0, 1), slice(1, 30), slice(30, 37)):
        parts.update(chosen(rows, where))
    for name, value in whole.compute().items():
        assert float(parts.compute()[name]) == pytest.approx(float(value), rel=1e-12), name


@pytest.mark.parametrize("away", [0.0, 37.0, -37.0, 1e4])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6])
def test_auroc_is_by_rank_however_far_from_the_shift_and_however_near_to_each_other_rewards_are(
    away: float, scale: float
) -> None:
    rows, metrics = make_rows(200, 300), ImplicitRewardMetrics()
    rewards = away + scale * (rows.rewards_B.double() * 8).round()  # with ties
    for where in (slice(0, 90), slice(90, 500)):
        metrics.update(chosen(replace(rows, rewards_B=rewards), where))
    expected = roc_auc_score(rows.thumbs_up_B.numpy(), rewards.numpy())
    assert 0.5 < expected < 1
    assert float(metrics.compute()["auroc"]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("every", [2, 3])
def test_auroc_is_exact_of_however_many_rows(every: int) -> None:
    metrics, generator = ImplicitRewardMetrics(), torch.Generator().manual_seed(0)
    rows = make_rows(0, 5000)
    up, rewards = torch.arange(5000) % every == 0, []  # as in a log of pairs, where a step of two sees one class
    for number in range(1, 51):
        rewards.append(torch.randn(5000, generator=generator) * number / 25 + up + 37)
        metrics.update(replace(rows, thumbs_up_B=up, rewards_B=rewards[-1]))
        if number in (1, 50):
            expected = roc_auc_score(up.repeat(number).numpy(), torch.cat(rewards).numpy())
            assert float(metrics.compute()["auroc"]) == pytest.approx(expected, abs=1e-12)


def test_a_reward_that_equals_the_shift_is_neither_right_nor_wrong() -> None:
    rows, metrics = make_rows(30, 10), ImplicitRewardMetrics()
    metrics.update(replace(rows, rewards_B=torch.zeros(40), reward_shift=0.0))  # as before the first step
    values = metrics.compute()
    names = ("accuracy", "accuracy_up", "accuracy_down", "auroc")
    assert [float(values[name]) for name in names] == [0.5] * 4


def metrics_of_parts(rank: int, ranks: int) -> dict[str, float]:
    """Metrics of rows of which the last process has none at all, or one of two a part."""
    torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks)
    rows, found = make_rows(40, 60), {}
    for name, parts in {"uneven": (slice(0, 61), slice(61, 100)), "one has none": (slice(0, 100), None)}.items():
        metrics = ImplicitRewardMetrics(["a", "b"])
        if parts[rank] is not None:
            metrics.update(chosen(replace(rows, sources_B=torch.arange(100) % 2), parts[rank]))
        other = ImplicitRewardMetrics(["a", "b"])
        gathered = metrics.gathered()
        if rank == 0:
            other.take_over(gathered)
        found |= {f"{name} {key}": float(value) for key, value in metrics.compute().items()}
        assert other.compute() == metrics.compute()
    torch.distributed.destroy_process_group()
    return found


def in_a_process() -> dict[str, float]:
    return metrics_of_parts(int(os.environ["RANK"]), 2)


def test_two_processes_have_the_metrics_of_one(tmp_path: Path) -> None:
    metrics = ImplicitRewardMetrics(["a", "b"])
    metrics.update(replace(make_rows(40, 60), sources_B=torch.arange(100) % 2))
    expected = {key: float(value) for key, value in metrics.compute().items()}
    for found in finish(start(in_a_process, ranks=2, folder=tmp_path), tmp_path):
        for key, value in found.items():
            name = key.split()[-1]
            assert value == pytest.approx(expected[name], rel=1e-12), key
            assert "auroc" not in name or value == expected[name]


def test_metrics_of_a_class_without_rows_are_nan_and_never_zero() -> None:
    metrics = ImplicitRewardMetrics()
    metrics.update(make_rows(5, 0))
    values = {name: float(value) for name, value in metrics.compute().items()}
    for name in ("loss", "reward_down", "margin", "auroc", "error_term", "log_prob_down"):
        assert math.isnan(values[name]), name
    assert not math.isnan(values["reward_up"])


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
