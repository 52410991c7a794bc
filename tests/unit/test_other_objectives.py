"""Objectives beside bco: the loss lines of peers' own code, run on the same numbers, and closed forms in float64."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from bco_lightning.errors import ConfigError
from bco_lightning.objectives import (
    OBJECTIVES,
    Objective,
    RatedAnswers,
    class_weights_of,
    make_objective,
    mean_over_rows,
)
from bco_lightning.objectives.shifts import BCOByLength, BCOPerPrompt
from bco_lightning.options import ModelOptions

POLICY = [-12.5, -30.25, -8.0, -21.0, -15.5, -40.0]
REFERENCE = [-14.0, -28.0, -8.5, -19.5, -15.0, -44.0]
LENGTHS = [10, 17, 5, 12, 9, 30]
BETA = 0.2
UNRELATED = [1.5, 0.75, -0.5, 1.25]  # log-ratios
# Row 2n is the better and row 2n + 1 the worse answer of pair n; peers give the losses of pairs, or of ups, then downs.
PEERS = {
    "dpo": [0.38687100611489994, 0.5130152523999526, 1.2411538747320878],
    "ipo": [4.917958477508651, 5.175624999999999, 7.230123456790125],
    "nca": [1.2281573397015182, 1.29377261234462, 1.652145323084245],
    "bce": [1.047604190465982, 1.198751904542098, 1.9154973260213488],
    "kto": [0.46257015465625, 0.51249739648421, 0.5621765008858, 0.3543436937742, 0.38936076605078, 0.6570104626735],
    "apo_zero": [
        0.42555748318834,
        0.47502081252106,
        0.52497918747894,
        0.38936076605078,
        0.42555748318834,
        0.68997448113,
    ],
}


def answers(policy: list[float] = POLICY, **changes: object) -> RatedAnswers:
    values = {
        "policy_log_probs_B": torch.tensor(policy, dtype=torch.float64, requires_grad=True),
        "reference_log_probs_B": torch.tensor(REFERENCE, dtype=torch.float64),
        "thumbs_up_B": torch.tensor([True, False] * 3),
        "beta": BETA,
        "lengths_B": torch.tensor(LENGTHS),
        "others_B": torch.arange(6) ^ 1,
        "scores_B": torch.tensor([0.9, 0.1, 1.0, 0.5, 0.25, 0.0], dtype=torch.float64),
        "unrelated_log_ratios_U": torch.tensor(UNRELATED, dtype=torch.float64),
    }
    return RatedAnswers(**{**values, **changes})  # type: ignore[arg-type]


def of_step(objective: Objective, rows: RatedAnswers) -> torch.Tensor:
    """The loss of a step: the sum of the class means."""
    return mean_over_rows(objective.losses(rows), rows.thumbs_up_B, class_weights_of(0.5, 0.5))


@pytest.mark.parametrize("name", PEERS)
def test_losses_are_those_of_the_peer(name: str) -> None:
    """By lines of ``_compute_loss`` in TRL 1.16.0's DPO and KTO trainers; 1.13.0 gives the same for pairs.

    They are named ``sigmoid``, ``ipo``, ``nca_pair``, ``bco_pair`` (without a shift), ``kto`` (its KL is 0.75 nats) and
    ``apo_zero_unpaired``.
    """
    objective, rows, expected = make_objective(name, decay=0.0), answers(), PEERS[name]
    objective.learn(rows)  # the policy stands still, so the step before has the KL of this one
    losses = objective.losses(rows)
    if len(expected) == 3:
        assert (losses[::2] + losses[1::2]).tolist() == pytest.approx(expected, rel=1e-9)
        assert of_step(objective, rows).item() == pytest.approx(sum(expected) / 3, rel=1e-9)
    else:
        assert [*losses[::2].tolist(), *losses[1::2].tolist()] == pytest.approx(expected, rel=1e-9)
        assert losses.mean().item() == pytest.approx(sum(expected) / 6, rel=1e-9)


def test_una_compares_the_probability_of_thumbs_up_with_the_score() -> None:
    rewards = [BETA * (p - r) for p, r in zip(POLICY, REFERENCE, strict=True)]
    scores = [0.9, 0.1, 1.0, 0.5, 0.25, 0.0]
    expected = [(1 / (1 + math.exp(-r)) - s) ** 2 for r, s in zip(rewards, scores, strict=True)]
    assert make_objective("una").losses(answers()).tolist() == pytest.approx(expected, rel=1e-12)


def test_sft_is_the_cross_entropy_per_token_of_thumbs_up_rows() -> None:
    assert make_objective("sft").losses(answers()).tolist() == pytest.approx([1.25, 0, 1.6, 0, 15.5 / 9, 0], rel=1e-12)


def test_kldo_has_value_and_gradient_of_the_donsker_varadhan_bound() -> None:
    objective, rows = make_objective("kldo", decay=0.0), answers()
    objective.learn(rows)
    (found,) = torch.autograd.grad(loss := of_step(objective, rows), rows.policy_log_probs_B, retain_graph=True)
    up, down = rows.rewards_B[::2], rows.rewards_B[1::2]
    bound = -up.mean() + torch.logsumexp(down, 0) - math.log(3)
    (expected,) = torch.autograd.grad(bound, rows.policy_log_probs_B)
    assert loss.item() == pytest.approx(bound.item(), rel=1e-12)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-12)


def test_only_the_mean_of_kto_is_kept_from_going_below_zero() -> None:
    objective = make_objective("kto")
    for ratios, expected in (([-3.0, 1.0], 0.0), ([10.0], BETA * (10 - 2 * 0.9) / (1 + 2 * 0.9))):
        objective.learn(answers(unrelated_log_ratios_U=torch.tensor(ratios, dtype=torch.float64)))
        assert objective.threshold == pytest.approx(expected)


def test_a_step_without_answers_to_other_prompts_leaves_the_baseline() -> None:
    objective = make_objective("kto")
    objective.learn(answers())
    before = objective.state_dict()
    objective.learn(answers(unrelated_log_ratios_U=None))
    assert objective.state_dict() == before


@pytest.mark.parametrize("name", [*OBJECTIVES, {"kldo": 1.0, "kto": 0.5, "sft": 0.1}])
def test_baselines_stand_still_within_a_step_and_survive_a_round_trip_through_json(
    name: str | dict[str, float],
) -> None:
    objective, restored, rows = make_objective(name), make_objective(name), answers()
    first = objective.losses(rows).tolist()
    assert objective.losses(rows).tolist() == first
    objective.learn(rows)
    told = json.loads(json.dumps([objective.reward_shift.state_dict(), objective.state_dict()]))
    restored.reward_shift.load_state_dict(told[0])
    restored.load_state_dict(told[1])
    assert restored.threshold == objective.threshold
    assert restored.losses(rows).tolist() == objective.losses(rows).tolist()


def test_a_mix_is_the_weighted_sum_of_its_parts_and_decides_as_the_heaviest() -> None:
    mix, parts = (
        make_objective({"sft": 0.1, "kto": 2.0, "bco": 1.0}),
        [make_objective(n) for n in ("sft", "kto", "bco")],
    )
    for objective in (mix, *parts):
        objective.learn(answers())
    rows = answers()
    expected = sum(weight * part.losses(rows) for weight, part in zip((0.1, 2.0, 1.0), parts, strict=True))
    assert mix.losses(rows).tolist() == pytest.approx(expected.tolist(), rel=1e-12)
    assert mix.threshold == parts[1].threshold > 0


def marginal(rewards: torch.Tensor, up: list[bool], shift: float, spread: float) -> torch.Tensor:
    """Minus the log-likelihood of the thumbs of one prompt, its offset integrated out by a fine sum."""
    offsets = torch.linspace(-10, 10, 4001, dtype=torch.float64)
    signs = torch.tensor([1.0 if each else -1.0 for each in up], dtype=torch.float64)
    log_likelihoods = torch.nn.functional.logsigmoid(signs * (rewards - shift + spread * offsets[:, None])).sum(1)
    return -torch.logsumexp(log_likelihoods - offsets**2 / 2, 0)


def test_a_shift_per_prompt_has_the_gradient_of_the_marginal_likelihood() -> None:
    objective, rows = BCOPerPrompt(decay=0.0), answers(prompt_keys_B=torch.tensor([7, 7, 7, 3, 9, 9]))
    rows.thumbs_up_B = torch.tensor([True, True, False, False, True, True])
    objective.baselines["prompt_spread"].take_in([0, 0, 1, 0, 0, 0], [2] * 6)  # a spread of 1 nat is likeliest
    (found,) = torch.autograd.grad(objective.losses(rows).sum(), rows.policy_log_probs_B, retain_graph=True)
    parts = [marginal(rows.rewards_B[at], rows.thumbs_up_B[at].tolist(), 0, 1.0) for at in (slice(0, 3), slice(4, 6))]
    alone = torch.nn.functional.softplus(rows.rewards_B[3])  # a prompt with one answer, as in bco
    (expected,) = torch.autograd.grad(sum(parts) + alone, rows.policy_log_probs_B)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-4)


@pytest.mark.parametrize(("offsets", "spread"), [([6.0, -6.0, 6.0, -6.0], (4.0, 8.0)), ([0.0] * 4, (0.0,))])
def test_the_spread_of_offsets_is_the_one_that_makes_the_thumbs_likeliest(
    offsets: list[float], spread: tuple[float, ...]
) -> None:
    """Prompts whose answers are all praised or all blamed, whatever the rewards; and thumbs that follow rewards."""
    objective, keys = BCOPerPrompt(decay=0.0), torch.arange(4).repeat_interleave(6)
    rewards = torch.tensor([-1.5, -0.9, -0.3, 0.3, 0.9, 1.5] * 4, dtype=torch.float64)
    up = rewards + torch.tensor(offsets).repeat_interleave(6) > 0
    objective.learn(RatedAnswers(rewards, torch.zeros_like(rewards), up, 1.0, prompt_keys_B=keys))
    assert objective.baselines["prompt_spread"].value in spread


def test_a_shift_per_prompt_is_bco_to_the_bit_where_prompts_have_one_answer() -> None:
    objective, bco, rows = BCOPerPrompt(), make_objective("bco"), answers(prompt_keys_B=torch.arange(6))
    for each in (objective, bco):
        each.learn(rows)
    assert torch.equal(objective.losses(rows), bco.losses(rows))


def test_what_length_says_of_thumbs_is_what_a_logistic_regression_says_and_is_taken_off_the_shift() -> None:
    random = np.random.default_rng(0)
    up = random.random(20_000) < 0.2
    tokens = np.rint(np.exp(random.normal(5 + 0.3 * up, 0.5)))
    fitted = LogisticRegression(C=np.inf).fit(np.log(tokens)[:, None], up)
    objective, zeros = BCOByLength(), torch.zeros(len(up), dtype=torch.float64)
    rows = RatedAnswers(zeros, zeros, torch.from_numpy(up), 1.0, lengths_B=torch.from_numpy(tokens).long())
    assert objective.losses(rows).tolist() == pytest.approx([math.log(2)] * len(up))  # nothing is known yet
    objective.learn(rows)
    odds = objective.baselines["length_odds"]
    assert odds.value == pytest.approx(fitted.coef_[0, 0], rel=0.03)
    logits = odds.value * (np.log(tokens) - np.mean([np.log(tokens[up]).mean(), np.log(tokens[~up]).mean()]))
    assert objective.losses(rows).numpy() == pytest.approx(np.logaddexp(0, np.where(up, -logits, logits)))


@pytest.mark.parametrize("name", ["dpo", "ipo", "nca", "una"])
def test_what_a_row_lacks_is_no_number(name: str) -> None:
    losses = make_objective(name).losses(answers(others_B=None, scores_B=None))
    assert losses.isnan().all()


@pytest.mark.parametrize(
    ("objective", "found"), [("bko", "bko"), ({"bco": 1, "sftt": 0.1}, "sftt"), ({"bco": 0}, "0"), ({}, "none")]
)
def test_an_objective_that_is_none_is_refused(objective: object, found: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.objective.*found.*{found}"):
        ModelOptions("model", objective=objective)  # type: ignore[arg-type]


def test_options_name_every_objective() -> None:
    for name in OBJECTIVES:
        assert ModelOptions("model", objective=name).objective == name  # type: ignore[arg-type]
