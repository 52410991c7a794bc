"""The toy that compares objectives: they are the package's, its optimum is the closed form, its orderings are known."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from bco_lightning.objectives import OBJECTIVES, RatedAnswers, make_objective, mean_over_rows
from bco_lightning.objectives.shifts import BCOByLength, BCOPerPrompt

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import alignment
import toy
from alignment_model import at_kl, bounds
from toy import World
from toy_objectives import BCO, EVERY, Mix, OddsByLength, PromptIntercept, tokens

SMALL = World(rows=512)
SEEDS = [0, 1, 2]


def differences(world: World, arms: dict[str, Any], betas: list[float], kl: float, plain: bool = False) -> Tensor:
    """Mean reward at matched KL of the second arm less that of the first."""
    held_out, log = toy.make_prompts(world, SEEDS, held_out=True), toy.draw_log(world, SEEDS)
    found = [
        toy.look(held_out, toy.train(log, arm(), betas, 0.03, class_weights=not (plain and number == 0))).at(kl=kl)
        for number, arm in enumerate(arms.values())
    ]
    return (found[1] - found[0]).mean()


def rows_of(step: toy.Step, beta: float) -> RatedAnswers:
    """The step of one seed and one beta as the package sees it; pairs lie one behind the other."""
    flat = {name: getattr(step, name).expand(step.up.shape).flatten() for name in ("up", "scores", "lengths")}
    policy = step.log_probs.detach().flatten().requires_grad_()
    count = torch.arange(len(policy))
    return RatedAnswers(
        policy,
        (step.log_probs - step.log_ratios).detach().flatten(),
        flat["up"],
        beta,
        lengths_B=tokens(step).flatten(),
        scores_B=flat["scores"],
        others_B=count ^ 1,
        prompt_keys_B=count // 2,
        unrelated_log_ratios_U=step.kl.detach().flatten(),
    )


OF_PACKAGE = {
    "bco + 0.1 sft": lambda: make_objective({"bco": 1, "sft": 0.1}, 0.9),
    "per prompt": BCOPerPrompt,
    "by length": BCOByLength,
}
OF_TOY = EVERY | {"bco + 0.1 sft": Mix, "per prompt": PromptIntercept, "by length": OddsByLength}


@pytest.mark.parametrize("name", [*OBJECTIVES, *OF_PACKAGE])
def test_an_objective_of_the_toy_has_the_gradient_of_the_packages_step_after_step(name: str) -> None:
    pairs, beta = name != "per prompt", 0.7
    log = toy.draw_log(World(each=2, pairs=pairs, offset=4.0, rows=512), [0])
    own, theirs = OF_TOY[name](), OF_PACKAGE.get(name, lambda: make_objective(name, 0.9))()
    if name == "kto":  # its KL is that of the step before; the toy's is exact, and of the step itself
        theirs.baselines["kl_baseline"].decay = 0.0
    compared = []

    class EnoughError(Exception):
        """Six steps are compared."""

    def compare(step: toy.Step) -> None:
        if len(compared) == 6:
            raise EnoughError
        step.lengths = step.lengths.abs()  # none below a token, of which the package makes one
        rows = rows_of(step, beta)
        if name == "kto":
            theirs.learn(rows)
        loss = mean_over_rows(theirs.losses(rows), rows.thumbs_up_B, (2, 2))
        (wanted,) = torch.autograd.grad(loss, rows.policy_log_probs_B)
        (found,) = torch.autograd.grad(own.losses(step).sum(), step.log_probs, retain_graph=True)
        if name == "una":  # which has no class weights
            wanted = wanted / 2
        compared.append(torch.allclose(found.flatten(), wanted, rtol=1e-8, atol=1e-12))
        theirs.learn(rows)

    with pytest.raises(EnoughError):
        toy.train(log, own, [beta], 0.03, class_weights=pairs, watch=compare)
    assert compared == [True] * 6
    assert name != "per prompt" or theirs.baselines["prompt_spread"].value > 0


@pytest.mark.parametrize("pairwise", [True, False])
def test_with_all_the_data_there_is_the_optimum_is_the_closed_form(pairwise: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    beta, answers = 0.5, 5
    log_ref = torch.randn(answers, generator=generator, dtype=torch.float64).log_softmax(0)
    reward = torch.randn(answers, generator=generator, dtype=torch.float64)
    optimum = (log_ref + reward / beta).log_softmax(0)
    logits = log_ref.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=300, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        rewards = beta * (logits.log_softmax(0) - log_ref)
        if pairwise:  # Bradley-Terry over both orders of two answers that the reference draws
            often = log_ref.exp()[:, None] * log_ref.exp() * torch.sigmoid(reward[:, None] - reward)
            return (often * -logsigmoid(rewards[:, None] - rewards)).sum()
        # Theorem 1's classifier, of thumbs with the threshold at which the optimum's partition function is 1.
        up = torch.sigmoid(reward - beta * torch.logsumexp(log_ref + reward / beta, 0))
        return (log_ref.exp() * -(up * logsigmoid(rewards) + (1 - up) * logsigmoid(-rewards))).sum()

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    torch.testing.assert_close(logits.detach().log_softmax(0), optimum, rtol=0, atol=1e-6)


def test_dpos_loss_is_below_bcos_bound_which_is_below_that_without_a_shift() -> None:
    log, objective = toy.draw_log(World(each=2, pairs=True, rows=512), [0]), BCO()
    seen: list[tuple[float, float, float]] = []

    def watch(step: toy.Step) -> None:
        up, down = (step.rewards[step.up.expand_as(step.rewards) == which].detach() for which in (True, False))
        shift = (up.mean() + down.mean()) / 2

        def bound(shift: Any) -> float:
            return float((-logsigmoid(up - shift) - logsigmoid(shift - down)).mean())

        gap = torch.log1p((torch.exp(shift - up) + torch.exp(down - shift)) / (1 + torch.exp(down - up))).mean()
        dpo = float(-logsigmoid(up - down).mean())
        assert math.isclose(bound(shift), dpo + float(gap), rel_tol=1e-12)  # the exact error term
        seen.append((dpo, bound(shift), bound(0.0)))

    toy.train(log, objective, [0.25], 0.03, watch=watch)
    assert all(dpo < bco <= bce + 1e-12 for dpo, bco, bce in seen)
    assert seen[-1][2] - seen[-1][1] > 1e-4  # the shift makes it tighter


def test_where_a_tenth_is_up_class_weights_are_worth_much() -> None:
    assert differences(replace(SMALL, share_up=0.1), {"without": BCO, "with": BCO}, [8, 2, 0.5, 0.12], 0.2, True) > 0.05


def test_prompts_with_offsets_cost_a_global_shift_what_pairs_do_not_pay_and_an_intercept_gets_most_of_it_back() -> None:
    world, betas = World(each=4, offset=4.0, rows=512), [8, 2, 1, 0.5, 0.25]
    lost = differences(world, {"bco": BCO, "dpo": EVERY["dpo"]}, betas, toy.KL)
    back = differences(world, {"bco": BCO, "intercept": PromptIntercept}, betas, toy.KL)
    assert lost > 0.1
    assert back > lost / 2


def test_raters_who_like_long_answers_are_not_followed_where_the_shift_knows_of_length() -> None:
    arms, betas = {"bco": BCO, "odds": OddsByLength}, [8, 2, 1, 0.5, 0.25]
    assert differences(replace(SMALL, taste=1.0), arms, betas, toy.KL) > 0.08


def test_a_look_is_what_sums_over_answers_give_and_the_neutral_policy_is_as_long_as_the_reference() -> None:
    prompts = toy.make_prompts(replace(SMALL, rows=16), [0], held_out=True)
    theta = 0.3 * torch.randn(1, 1, prompts.phi_SPYD.shape[-1], generator=torch.Generator().manual_seed(0)).double()
    found = toy.look(prompts, theta)
    kl = gain = 0.0
    for phi, log_ref, rewards in zip(prompts.phi_SPYD[0], prompts.log_ref_SPY[0], prompts.rewards_SPY[0], strict=True):
        log_pi = (log_ref + phi @ theta[0, 0]).log_softmax(0)
        kl += float((log_pi.exp() * (log_pi - log_ref)).sum()) / toy.HELD_OUT
        gain += float(((log_pi.exp() - log_ref.exp()) * rewards).sum()) / toy.HELD_OUT
    assert (float(found.kl), float(found.reward)) == pytest.approx((kl, gain), rel=1e-9)
    only_length = torch.zeros_like(theta)
    only_length[0, 0, 0] = 0.5  # made neutral, nothing of it is left
    assert float(toy.look(prompts, only_length).kl_neutral) == pytest.approx(0, abs=1e-9)


def test_the_picture_of_the_bounds_shows_what_the_equations_give() -> None:
    up, down, shift = np.array([2.0, 1.0]), np.array([1.0, -1.0]), 0.75
    panels = bounds({3: up}, {3: down}, {3: shift}).axes
    drawn = {line.get_label(): line.get_ydata().item() for axes in panels for line in axes.get_lines()}
    dpo = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-2))) / 2
    assert drawn["DPO"] == pytest.approx(dpo)
    for name, value in (("BCO", shift), ("BCE, no shift", 0.0)):
        terms = [
            math.log(1 + math.exp(value - u)) + math.log(1 + math.exp(d - value)) for u, d in zip(up, down, strict=True)
        ]
        assert drawn[name] == pytest.approx(sum(terms) / 2)
    assert drawn["error term"] == pytest.approx(np.mean(np.exp(shift - up) + np.exp(down - shift)))
    assert (drawn["mean of thumbs-up"], drawn["mean of thumbs-down"], drawn["reward shift"]) == (1.5, 0.0, 0.75)


def test_what_was_computed_is_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(alignment.SETTINGS, "small", (replace(SMALL, rows=128), {"bco": BCO}))
    monkeypatch.setattr(alignment, "BETAS", [1, 0.1])
    path = tmp_path / "alignment.json"
    first = alignment.Cells(path).fill("small", "bco", [0, 1])
    monkeypatch.setattr(alignment, "train", lambda *_, **__: pytest.fail("trained again"))
    again = alignment.Cells(path).fill("small", "bco", [0, 1])
    assert again["seeds"] == first["seeds"]
    assert first["seeds"].keys() == {"0", "1"}


def test_a_figure_is_read_where_a_path_first_has_the_kl() -> None:
    path = {str(n): {"kl": kl, "tone": 0.2 + 0.3 * kl**0.5} for n, kl in enumerate((0.0, 0.25, 2.25))}
    assert at_kl(path, "tone", 1.0) == pytest.approx(0.3)
    assert at_kl(path, "tone", 0.16) == pytest.approx(0.12)
    assert math.isnan(at_kl(path, "tone", 2.5))
    assert at_kl(path | {"3": {"kl": 0.9, "tone": 5.0}}, "tone", 1.0) == pytest.approx(0.3)
