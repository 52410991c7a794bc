"""Objectives and importance weights where the reward is known and every expectation is exact: seconds a run, no model.

**World.** A prompt has a topic s (+1 writing, -1 code, equally likely), a position t = s + noise, and 16 answers with
features phi(x, y) and probabilities pi_ref(y|x). The true reward is u_s . phi(x, y): each topic has its own direction,
and their cosine is the knob ``cosine``. The policy pi(y|x) ~ pi_ref(y|x) exp(theta . phi(x, y)) has one direction for
all prompts, and must trade one topic for the other, unless ``telling`` > 0: then it may add s * telling * theta', and
at 1 each topic learns by itself.

**Log.** A user asks x, is shown y ~ pi_ref(.|x) and is pleased with probability sigma(u_s . phi + o(x)), less a few
slips of the finger; then rates or does not. So both thumbs are possible for each prompt, and p(y|x, thumb) is what
users felt. Which prompts the thumbs come from has one of two causes:

- ``selection``: o = 0, and users praise in one topic and complain in the other: they bother to give a thumb z for x
  with a probability proportional to p_z(x) / (p(x) P(z|x)), such that p_up ~ p exp(d t / 2) and
  p_down ~ p exp(-d t / 2), and p_up / p_down = exp(d t) up to a constant; d is the knob ``divergence``.
- ``quality``: everybody rates, but o(x) = d t: the reference is good at writing and poor at code. The density ratio is
  the odds of P(up|x), a sum over 16 answers, up to a constant. Thumbs of the usual kind for a topic then say little.

Features for the classifier of prompts show t through noise. A share ``unclean`` of thumbs-down stands on answers drawn
as those of thumbs-up are (downs "for the tone of the day").

**Figures.** Gain: E_pi[u . phi] - E_ref[u . phi], and KL(pi || pi_ref), both sums over the answers of held-out prompts,
interpolated at equal KL on the training trajectory. The mean over prompts is taken over those of the ups, those of the
downs and the even mixture of both. The main figure is that over the ups, for a reason given before anything was run:
BCO bounds DPO on pairs, an up and a down of one prompt; weights p_up / p_down move the downs to the prompts of the ups,
so that the weighted loss is the bound for pairs there, while the plain loss is the bound for no distribution of pairs.
That choice favours weights, for they aim at those prompts and no others. The even mixture takes no side.

To first order in theta the plain loss adds what ups say of their prompts to what downs say of theirs, and so serves the
mixture; weights give up the downs' topic. All objectives share one learning rate (over beta) and one batch size; both
and beta were chosen such that KL 1 is reached, and no objective was tuned.
Shape legend: S seeds, P prompts, Y answers, D features, N rows, B rows of a step, E looks, Q distributions of prompts.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import machine
from bco_lightning.objectives import RewardShift, bce_loss, bco_loss

RESULTS = Path(__file__).parent / "results" / "importance.json"
ANSWERS, FEATURES, EMBEDDING = 16, 32, 64
REWARD_SCALE = 2.0  # standard deviation of the true reward over a prompt's answers
NUM_PROMPTS = 2000  # for training, and as many held out
STEPS, ROWS_PER_CLASS, LEARNING_RATE, LOOK_EVERY = 400, 64, 0.06, 5  # the rate is divided by beta, which it undoes
BETA = 0.1  # the package's default
BENT_BETA = 0.5  # log-ratios of 16 answers are small: from here on the loss bends as it does for long answers

KLS = (0.25, 0.5, 1.0)
PLACES = ("up", "down", "mixture")
SETTINGS = {
    "prompts": NUM_PROMPTS,
    "features": FEATURES,
    "reward_scale": REWARD_SCALE,
    "rows_per_class_and_step": ROWS_PER_CLASS,
    "learning_rate_times_beta": LEARNING_RATE,
    "steps": STEPS,
}
# Rewards (S, B) with ups first, their thumbs, the shift (S, 1) and weights (S, B): the loss of each seed (S,).
Objective = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
MakeArms = Callable[["Prompts", "FeedbackLog"], tuple[list["Arm"], dict[str, Any]]]


@dataclass(frozen=True)
class World:
    """The knobs; see the top of this file."""

    divergence: float = 2.0
    cosine: float = 0.5
    telling: float = 0.0
    cause: Literal["selection", "quality"] = "selection"
    unclean: float = 0.0
    slips: float = 0.05
    rows: int = 2000
    embedding_noise: float = 2.0


@dataclass(frozen=True)
class Prompts:
    """Prompts of all seeds, with everything about them that is known exactly."""

    features_SPYD: Tensor
    log_ref_SPY: Tensor
    rewards_SPY: Tensor
    pleased_SPY: Tensor
    topic_SP: Tensor
    up_SP: Tensor
    """p_up; sums to 1 over the prompts."""
    down_SP: Tensor
    embedding_SPH: Tensor
    telling: float

    @property
    def ratio(self) -> Tensor:
        """p_up / p_down, ``(S, P)``."""
        return self.up_SP / self.down_SP

    def tilt(self, theta_S2D: Tensor, index_SB: Tensor | None = None) -> Tensor:
        """Theta . phi for every answer of the chosen prompts (all if None); shape ``(S, B, Y)``."""
        features, topic = self.features_SPYD, self.topic_SP
        if index_SB is not None:
            seeds = torch.arange(len(features))[:, None]
            features, topic = features[seeds, index_SB], topic[seeds, index_SB]
        if not self.telling:
            return (features @ theta_S2D[:, 0, None, :, None])[..., 0]
        direction_SBD = theta_S2D[:, None, 0] + self.telling * topic[..., None] * theta_S2D[:, None, 1]
        return (features @ direction_SBD[..., None])[..., 0]


@dataclass(frozen=True)
class FeedbackLog:
    """Rows of each seed, thumbs-up first, and the rows of each step, which all objectives share."""

    prompt_SN: Tensor
    answer_SN: Tensor
    batches: Tensor
    """Rows of each step, half of either class; shape ``(steps, S, B)``."""

    @property
    def num_up(self) -> int:
        """Thumbs-up rows of each seed; as many are thumbs-down."""
        return self.prompt_SN.shape[1] // 2

    def by_row(self, of_downs_SP: Tensor, of_ups_SP: Tensor | None = None) -> Tensor:
        """Weights of prompts as weights of rows ``(S, N)``, of mean 1 over each class; ups weigh 1 if not given."""
        classes = zip((of_ups_SP, of_downs_SP), self.prompt_SN.chunk(2, 1), strict=True)
        weights = [torch.ones(rows.shape) if of is None else of.gather(1, rows) for of, rows in classes]
        return torch.cat([weight / weight.mean(1, keepdim=True) for weight in weights], 1)


@dataclass(frozen=True)
class Arm:
    """An objective with its weights.

    Attributes:
        name: What tables call it.
        weights_SN: Weights of rows; 1 if None.
        objective: The loss.
        weighted_shift: Whether the downs' mean reward in the shift is weighted as well.
    """

    name: str
    weights_SN: Tensor | None = None
    objective: Objective = field(default_factory=lambda: eq8)
    weighted_shift: bool = False


@dataclass(frozen=True)
class Trajectory:
    """KL and gain of every look, ``(S, E, Q)`` in the order of ``PLACES``."""

    kl_SEQ: Tensor
    gain_SEQ: Tensor

    @property
    def both(self) -> tuple[Tensor, Tensor]:
        """KL and gain."""
        return self.kl_SEQ, self.gain_SEQ

    def at(self, kl: float) -> Tensor:
        """Gain where the KL first reaches ``kl`` nats, ``(S, Q)``; NaN where it never does."""
        reached_SEQ = self.kl_SEQ >= kl
        after_SQ = reached_SEQ.int().argmax(1).clamp(min=1)[:, None]
        low, high = (self.kl_SEQ.gather(1, after_SQ - back)[:, 0] for back in (1, 0))
        before, after = (self.gain_SEQ.gather(1, after_SQ - back)[:, 0] for back in (1, 0))
        gain_SQ = before + (after - before) * (kl - low) / (high - low)
        return gain_SQ.where(reached_SEQ.any(1), torch.nan)

    def steps_to(self, kl: float) -> float | None:
        """Mean steps until the KL on the ups' prompts reaches ``kl``; None if a seed never gets there."""
        reached_SE = self.kl_SEQ[..., 0] >= kl
        if not reached_SE.any(1).all():
            return None
        return round(reached_SE.int().argmax(1).double().mean().item() * LOOK_EVERY, 1)


def make_prompts(world: World, num_seeds: int, held_out: bool = False) -> Prompts:
    """Draws the prompts; a seed's random numbers are the same in every world and however many seeds there are."""
    made = [_prompts_of(world, torch.Generator().manual_seed(2 * seed + held_out)) for seed in range(num_seeds)]
    return Prompts(*(torch.stack(tensors) for tensors in zip(*made, strict=True)), telling=world.telling)


def _prompts_of(world: World, generator: torch.Generator) -> tuple[Tensor, ...]:
    normal = partial(torch.randn, generator=generator)
    topic_P = 1.0 - 2.0 * (torch.arange(NUM_PROMPTS) % 2)
    position_P = topic_P + 0.5 * normal(NUM_PROMPTS)
    features_PYD = normal(NUM_PROMPTS, ANSWERS, FEATURES)
    log_ref_PY = normal(NUM_PROMPTS, ANSWERS).log_softmax(1)
    apart = math.sqrt(1 - world.cosine**2)
    writing, code = features_PYD[..., 0], world.cosine * features_PYD[..., 0] + apart * features_PYD[..., 1]
    rewards_PY = REWARD_SCALE * torch.where(topic_P[:, None] > 0, writing, code)
    offset_P = world.divergence * position_P if world.cause == "quality" else torch.zeros(NUM_PROMPTS)
    pleased_PY = world.slips + (1 - 2 * world.slips) * torch.sigmoid(rewards_PY + offset_P[:, None])
    if world.cause == "quality":
        up_P = (log_ref_PY.exp() * pleased_PY).sum(1)
        down_P = 1 - up_P
    else:
        up_P, down_P = (torch.exp(sign * world.divergence * position_P / 2) for sign in (1, -1))
    shown_H = torch.nn.functional.normalize(normal(EMBEDDING), dim=0)
    embedding_PH = 3 * position_P[:, None] * shown_H + world.embedding_noise * normal(NUM_PROMPTS, EMBEDDING)
    densities = (up_P / up_P.sum(), down_P / down_P.sum())
    return features_PYD, log_ref_PY, rewards_PY, pleased_PY, topic_P, *densities, embedding_PH


def draw_log(world: World, prompts: Prompts) -> FeedbackLog:
    """Draws as many thumbs-up as thumbs-down, and the order in which training sees them."""
    made = []
    for seed in range(len(prompts.up_SP)):
        generator = torch.Generator().manual_seed(10_000 + seed)
        pick = partial(torch.multinomial, replacement=True, generator=generator)
        prompt_N = torch.cat([pick(prompts.up_SP[seed], world.rows), pick(prompts.down_SP[seed], world.rows)])
        good_N = torch.arange(2 * world.rows) < world.rows
        good_N |= torch.rand(2 * world.rows, generator=generator) < world.unclean
        pleased_NY, log_ref_NY = (of[seed, prompt_N] for of in (prompts.pleased_SPY, prompts.log_ref_SPY))
        chances_NY = torch.where(good_N[:, None], pleased_NY, 1 - pleased_NY) * log_ref_NY.exp()
        drawn = torch.randint(world.rows, (STEPS, 2 * ROWS_PER_CLASS), generator=generator)
        drawn[:, ROWS_PER_CLASS:] += world.rows
        made.append((prompt_N, pick(chances_NY, 1)[:, 0], drawn))
    prompts_, answers, drawn_ = zip(*made, strict=True)
    return FeedbackLog(torch.stack(prompts_), torch.stack(answers), torch.stack(drawn_, 1))


def log_ratios(prompts: Prompts, theta_S2D: Tensor, prompt_SB: Tensor, answer_SB: Tensor) -> Tensor:
    """Log pi - log pi_ref of the chosen answers, ``(S, B)``."""
    tilt_SBY = prompts.tilt(theta_S2D, prompt_SB)
    seeds = torch.arange(len(prompt_SB))[:, None]
    log_z_SB = torch.logsumexp(prompts.log_ref_SPY[seeds, prompt_SB] + tilt_SBY, -1)
    return tilt_SBY.gather(2, answer_SB[..., None])[..., 0] - log_z_SB


@torch.no_grad()
def look(prompts: Prompts, theta_S2D: Tensor) -> tuple[Tensor, Tensor]:
    """Exact KL(pi || pi_ref) and gain over pi_ref in nats and units of reward, ``(S, Q)`` each."""
    log_pi_SPY = (prompts.log_ref_SPY + prompts.tilt(theta_S2D)).log_softmax(-1)
    pi_SPY = log_pi_SPY.exp()
    kl_SP = (pi_SPY * (log_pi_SPY - prompts.log_ref_SPY)).sum(-1)
    gain_SP = ((pi_SPY - prompts.log_ref_SPY.exp()) * prompts.rewards_SPY).sum(-1)
    places_QSP = (prompts.up_SP, prompts.down_SP, (prompts.up_SP + prompts.down_SP) / 2)
    kl, gain = (torch.stack([(place * value).sum(1) for place in places_QSP], 1) for value in (kl_SP, gain_SP))
    return kl, gain


def eq8(rewards: Tensor, up: Tensor, shift: Tensor, weights: Tensor | None, loss: Any = bco_loss) -> Tensor:
    """The sum of both classes' mean losses (Eq. 8); a step has as many rows of one as of the other."""
    return 2 * loss(rewards, up, reward_shift=shift, importance_weights=weights).mean(1)


def positive_unlabelled(share: float) -> Objective:
    """C-BPO (2605.10043): thumbs-down as a mixture that holds a ``share`` of good answers, which is taken out again."""

    def objective(rewards: Tensor, up: Tensor, shift: Tensor, weights: Tensor | None) -> Tensor:
        half = rewards.shape[1] // 2
        losses = bco_loss(rewards, up, reward_shift=shift, importance_weights=weights)
        good_as_bad = bco_loss(rewards[:, :half], ~up[:, :half], reward_shift=shift).mean(1)
        bad = (losses[:, half:].mean(1) - share * good_as_bad).clamp(min=0) / (1 - share)
        return losses[:, :half].mean(1) + bad

    return objective


def train(train_on: Prompts, held_out: Prompts, log: FeedbackLog, arm: Arm, beta: float = BETA) -> Trajectory:
    """Trains one policy for each seed by plain gradient steps, until all have passed the last KL.

    Args:
        train_on: The prompts of the log.
        held_out: The prompts to look at.
        log: The rows, ups first in each step.
        arm: Objective and weights. The shift of a step comes from those before it, as in the module.
        beta: Of the implicit reward.

    Returns:
        The trajectory on the held-out prompts.
    """
    num_seeds = len(log.prompt_SN)
    theta_S2D = torch.zeros(num_seeds, 2, FEATURES, requires_grad=True)
    shifts = [RewardShift() for _ in range(num_seeds)]
    up_SB = (torch.arange(2 * ROWS_PER_CLASS) < ROWS_PER_CLASS).expand(num_seeds, -1)
    looks = [look(held_out, theta_S2D)]
    for step, rows_SB in enumerate(log.batches, 1):
        chosen = (log.prompt_SN.gather(1, rows_SB), log.answer_SN.gather(1, rows_SB))
        rewards_SB = beta * log_ratios(train_on, theta_S2D, *chosen)
        weights_SB = None if arm.weights_SN is None else arm.weights_SN.gather(1, rows_SB)
        shift_S1 = torch.tensor([[shift.value] for shift in shifts])
        loss = arm.objective(rewards_SB, up_SB, shift_S1, weights_SB).sum()
        (gradient,) = torch.autograd.grad(loss, theta_S2D)
        with torch.no_grad():
            theta_S2D -= LEARNING_RATE / beta * gradient
        _update(shifts, rewards_SB.detach(), weights_SB if arm.weighted_shift else None)
        if step % LOOK_EVERY == 0:
            looks.append(look(held_out, theta_S2D))
            if (looks[-1][0] > KLS[-1]).all():
                break
    return Trajectory(*(torch.stack(values, 1) for values in zip(*looks, strict=True)))


def _update(shifts: list[RewardShift], rewards_SB: Tensor, weights_SB: Tensor | None) -> None:
    """Moves every seed's shift; with weights the downs' mean is that over the ups' prompts."""
    half = rewards_SB.shape[1] // 2
    weights = torch.ones_like(rewards_SB) if weights_SB is None else weights_SB
    sums = zip(
        rewards_SB[:, :half].sum(1).tolist(),
        (weights * rewards_SB)[:, half:].sum(1).tolist(),
        weights[:, half:].sum(1).tolist(),
        strict=True,
    )
    for shift, (up, down, num_down) in zip(shifts, sums, strict=True):
        shift.update(sum_up=up, num_up=half, sum_down=down, num_down=num_down)


def estimated_weights(prompts: Prompts, log: FeedbackLog) -> tuple[Tensor, list[dict[str, float]]]:
    """Weights of prompts as the package estimates them, held out, from the embeddings of the prompts in the log.

    Args:
        prompts: All prompts; those without a row get weight 1, which nothing reads.
        log: The rows.

    Returns:
        The weights ``(S, P)``; for each seed whether there was evidence and how far log-ratios are off (RMS, centred).
    """
    from threadpoolctl import threadpool_limits

    from bco_lightning.importance.ratio import fit_density_ratio

    weights_SP, told = torch.ones_like(prompts.up_SP), []
    for seed, prompt_N in enumerate(log.prompt_SN):
        ups, downs = (torch.bincount(half, minlength=NUM_PROMPTS).double() for half in prompt_N.chunk(2))
        used = (ups + downs).nonzero()[:, 0]
        folds = torch.randint(5, (len(used),), generator=torch.Generator().manual_seed(20_000 + seed))
        counts = (ups[used].numpy(), downs[used].numpy())
        with threadpool_limits(1):  # threads that wait for each other's small products cost five times the CPU time
            fitted = fit_density_ratio(prompts.embedding_SPH[seed, used], *counts, folds.numpy())
        found = torch.as_tensor(fitted.log_ratios_P).float()
        weights_SP[seed, used] = fitted.ratio.weights(found)
        error = (found - prompts.ratio[seed, used].log()).std().item()
        told.append({"evidence": float(fitted.ratio.has_evidence), "error": round(error, 3)})
    return weights_SP, told


OFF, TRUE, ESTIMATED, COMMON = "off", "true, clip [0.1, 10]", "estimated, clip [0.1, 10]", "true, clip [0.5, 10]"
WEIGHTED_SHIFT, OFF_BCE, TRUE_BCE = "true, its shift weighted", "off, no shift (BCE)", "true, no shift (BCE)"
OVERLAP, MIXTURE = "both to the overlap", "both to the mixture"


def weight_arms(prompts: Prompts, log: FeedbackLog, names: Sequence[str] = ()) -> tuple[list[Arm], dict[str, Any]]:
    """The ways to weigh.

    Beside those of downs only there are two that weigh ups as well, so that both thumbs stand on common prompts:
    ``overlap`` (ups by p_down, downs by p_up, each over p_up + p_down: never above 1, where either thumb is rare little
    counts) and ``mixture`` (each by the even mixture over its own density).

    Args:
        prompts: Prompts of the log.
        log: The rows.
        names: Those wanted, all if empty.

    Returns:
        The arms, and the effective share of downs under their weights ((sum w)^2 / sum w^2 / n).
    """
    ratio = prompts.ratio
    true = log.by_row(ratio.clamp(0.1, 10))
    bce = partial(eq8, loss=bce_loss)
    arms = [
        Arm(OFF),
        Arm(TRUE, true),
        Arm("true, unclipped", log.by_row(ratio)),
        Arm(COMMON, log.by_row(ratio.clamp(0.5, 10))),
        Arm(WEIGHTED_SHIFT, true, weighted_shift=True),
        Arm(OFF_BCE, objective=bce),
        Arm(TRUE_BCE, true, objective=bce),
        Arm(OVERLAP, log.by_row(ratio / (1 + ratio), 1 / (1 + ratio))),
        Arm(MIXTURE, log.by_row((1 + ratio).clamp(max=10), (1 + 1 / ratio).clamp(max=10))),
    ]
    told: dict[str, Any] = {}
    if not names or ESTIMATED in names:
        weights_SP, told["estimated"] = estimated_weights(prompts, log)
        arms.insert(2, Arm(ESTIMATED, log.by_row(weights_SP)))
    arms = [arm for arm in arms if not names or arm.name in names]
    told["effective_share"] = {
        arm.name: round(_effective_share(arm.weights_SN), 3) for arm in arms if arm.weights_SN is not None
    }
    return arms, told


def _effective_share(weights_SN: Tensor) -> float:
    downs = weights_SN.chunk(2, 1)[1]
    return (downs.sum(1) ** 2 / downs.square().sum(1) / downs.shape[1]).mean().item()


def unclean_arms(prompts: Prompts, log: FeedbackLog, share: float) -> tuple[list[Arm], dict[str, Any]]:
    """BCO against C-BPO that is told the right share of unclean downs, half of it and one and a half times."""
    told = {"C-BPO, a right": share, "C-BPO, a half": share / 2, "C-BPO, a 1.5 times": 1.5 * share}
    return [Arm(OFF), *(Arm(name, objective=positive_unlabelled(a)) for name, a in told.items())], {"a": told}


def interval(values: Tensor) -> tuple[float, float] | None:
    """Mean and half the width of its 95 % interval (Student's t over seeds); None if a value is missing."""
    from scipy.stats import t

    if values.isnan().any():
        return None
    values = values.double()
    half = float(t.ppf(0.975, len(values) - 1)) * values.std().item() / math.sqrt(len(values))
    return round(values.mean().item(), 4), round(half, 4)


def compare(world: World, num_seeds: int, make: MakeArms, beta: float = BETA) -> dict[str, Any]:
    """Trains every arm in one world.

    Args:
        world: The knobs.
        num_seeds: Prompts, logs and batches are drawn anew for each; at least 2.
        make: Gives the arms from prompts and log, and what is known of them; the first is compared with the others.
        beta: Of the implicit reward.

    Returns:
        The world, what ``make`` told, and for each arm by place and KL its gain and the paired difference to the
        first (mean and half the 95 % interval; None if a seed does not get there), how many seeds do not, and steps.
    """
    train_on, held_out = make_prompts(world, num_seeds), make_prompts(world, num_seeds, held_out=True)
    log = draw_log(world, train_on)
    arms, told = make(train_on, log)
    trajectories = {arm.name: train(train_on, held_out, log, arm, beta) for arm in arms}
    first = trajectories[arms[0].name]
    found = [{"name": name, **_figures(trajectory, first)} for name, trajectory in trajectories.items()]
    return {"world": asdict(world), "beta": beta, "told": told, "arms": found}


def _figures(trajectory: Trajectory, first: Trajectory) -> dict[str, Any]:
    at: dict[str, dict[str, Any]] = {place: {} for place in PLACES}
    for kl in KLS:
        gain_SQ = trajectory.at(kl)
        difference_SQ = gain_SQ - first.at(kl)
        for place, gain_S, difference_S in zip(PLACES, gain_SQ.T, difference_SQ.T, strict=True):
            at[place][str(kl)] = {
                "gain": interval(gain_S),
                "difference": interval(difference_S),
                "short": int(gain_S.isnan().sum()),
            }
    curves = {
        place: [[round(value, 4) for value in tensor[..., number].mean(0).tolist()] for tensor in trajectory.both]
        for number, place in enumerate(PLACES)
    }
    return {"at": at, "steps_to_half": trajectory.steps_to(0.5), "curves": curves}


def experiments(quick: bool) -> Iterator[tuple[str, World, MakeArms, float]]:
    """Every comparison: its table, the world, its arms, beta."""
    few = partial(weight_arms, names=(OFF, TRUE, ESTIMATED, COMMON, OVERLAP, MIXTURE))
    bent = partial(weight_arms, names=(OFF, TRUE, WEIGHTED_SHIFT, OFF_BCE, TRUE_BCE))
    for divergence in (0.0, 2.0) if quick else (0.0, 1.0, 2.0):
        yield "divergence", World(divergence), weight_arms, BETA
    for cosine in () if quick else (-0.5, 0.0, 0.5, 1.0):
        yield "cosine", World(cosine=cosine), few, BETA
    for telling in (1.0,) if quick else (0.0, 0.25, 0.5, 1.0):
        yield "telling", World(telling=telling), few, BETA
    for telling in () if quick else (0.0, 1.0):
        yield "rows", World(telling=telling, rows=8000), few, BETA
    for telling, divergence in () if quick else ((0.0, 1.0), (0.0, 2.0), (1.0, 2.0)):
        yield "quality", World(divergence, telling=telling, cause="quality"), few, BETA
    for telling in () if quick else (0.0, 1.0):
        yield "shift", World(telling=telling), bent, BENT_BETA
    for divergence, beta in ((0.0, BETA),) if quick else ((0.0, BETA), (0.0, BENT_BETA), (1.0, BETA)):
        for share in (0.2,) if quick else (0.1, 0.2, 0.4):
            yield "unclean", World(divergence, unclean=share), partial(unclean_arms, share=share), beta


def table(result: dict[str, Any]) -> Table:
    """One world; differences are to its first arm, paired by seed."""
    columns = [("up", kl) for kl in KLS] + [("down", 0.5), ("mixture", 0.5), ("mixture", 1.0)]
    knobs = {key: value for key, value in result["world"].items() if value != getattr(World(), key)}
    told = ", ".join(f"{key} {value}" for key, value in (knobs | {"beta": result["beta"]}).items())
    heads = ("gain, up @0.5", *(f"{place} @{kl:g}" for place, kl in columns), "steps")
    made = Table("arm", *heads, title=f"{result['table']}: {told}")
    for arm in result["arms"]:
        cells = [arm["at"][place][str(kl)] for place, kl in columns]
        differences = [_words(cell["difference"], cell["short"], "+") for cell in cells]
        gain = arm["at"]["up"]["0.5"]
        steps = "" if arm["steps_to_half"] is None else f"{arm['steps_to_half']:.0f}"
        made.add_row(arm["name"], _words(gain["gain"], gain["short"]), *differences, steps)
    return made


def _words(value: tuple[float, float] | None, short: int, sign: str = "") -> str:
    if value is None:
        return f"{short} short" if short else "first short"
    return f"{value[0]:{sign}.3f} ±{value[1]:.3f}"


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draws trajectories and what the outcome depends on.

    Args:
        results: As in the JSON file.
        path: The PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = pyplot.subplots(1, 4, figsize=(17, 4.2), layout="constrained")
    by_table: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        by_table.setdefault(result["table"], []).append(result)
    _draw_curves(panels[0], by_table["divergence"][-1])
    for axes, knob in ((panels[1], "cosine"), (panels[2], "telling")):
        _draw_sweep(axes, knob, by_table[knob])
    panels[1].set_xlabel("cosine of the topics' reward directions")
    panels[1].legend(fontsize=7)
    panels[2].set_xlabel("how well the policy can tell topics apart")
    _draw_unclean(panels[3], [result for result in by_table["unclean"] if not result["world"]["divergence"]])
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


COLORS = {"up": "#1f6feb", "down": "#d1242f", "mixture": "#57606a"}


def _draw_curves(axes: Any, result: dict[str, Any]) -> None:
    styles = {OFF: "-", TRUE: "--", ESTIMATED: ":"}
    for arm in result["arms"]:
        for place, color in COLORS.items() if arm["name"] in styles else ():
            axes.plot(*arm["curves"][place], styles[arm["name"]], color=color, label=f"{place}, {arm['name']}")
    axes.set(
        xlim=(0, KLS[-1]), ylim=(0, None), xlabel="KL, nats", ylabel="gain in true reward", title="Strong divergence"
    )
    axes.legend(fontsize=7)


def _draw_sweep(axes: Any, knob: str, results: list[dict[str, Any]]) -> None:
    for name, style in ((ESTIMATED, "o-"), (COMMON, "s--")):
        for place, color in COLORS.items():
            cells = [next(a for a in r["arms"] if a["name"] == name)["at"][place]["0.5"]["difference"] for r in results]
            shown = [(r["world"][knob], *cell) for r, cell in zip(results, cells, strict=True) if cell]
            if shown:
                x, mean, half = zip(*shown, strict=True)
                axes.errorbar(x, mean, half, fmt=style, color=color, capsize=3, label=f"{place}, {name}")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(title="Weights less off at KL 0.5", ylabel="difference in gain")


def _draw_unclean(axes: Any, results: list[dict[str, Any]]) -> None:
    for beta, style in ((BETA, "o-"), (BENT_BETA, "s--")):
        own = [result for result in results if result["beta"] == beta]
        for number, color in zip((1, 2, 3), ("#1a7f37", "#9a6700", "#8250df"), strict=True):
            cells = [(r["world"]["unclean"], r["arms"][number]["at"]["mixture"]["0.5"]["difference"]) for r in own]
            shown = [(share, *cell) for share, cell in cells if cell]
            if shown:
                x, mean, half = zip(*shown, strict=True)
                label = f"{own[0]['arms'][number]['name']}, beta {beta}"
                axes.errorbar(x, mean, half, fmt=style, color=color, capsize=3, label=label)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(title="C-BPO less BCO at KL 0.5, no divergence", xlabel="share of downs that are good answers")
    axes.legend(fontsize=7)


def check() -> None:
    """Compares what is exact with sampling and with the cumulants of the log partition function.

    Raises:
        SystemExit: If they disagree.
    """
    world = World(telling=0.5, cause="quality", divergence=1.0)
    prompts = make_prompts(world, 1)
    log = draw_log(world, prompts)
    theta = 0.3 * torch.randn(1, 2, FEATURES, generator=torch.Generator().manual_seed(1))
    kl, gain = look(prompts, theta)
    # KL = theta . grad log Z - log Z, an identity of exponential families.
    leaf = theta.clone().requires_grad_()
    log_z = (prompts.up_SP * torch.logsumexp(prompts.log_ref_SPY + prompts.tilt(leaf), -1)).sum()
    (slope,) = torch.autograd.grad(log_z, leaf)
    failed = not _agree("KL against log Z", kl[0, 0], (theta * slope).sum() - log_z.detach(), 1e-4)
    # Sampled prompts and answers.
    generator, many = torch.Generator().manual_seed(2), 400_000
    prompt = torch.multinomial(prompts.down_SP[0], many, replacement=True, generator=generator)[None]
    pi_SPY = (prompts.log_ref_SPY + prompts.tilt(theta)).softmax(-1)
    answer = torch.multinomial(pi_SPY[0, prompt[0]], 1, generator=generator).T
    shown = torch.multinomial(prompts.log_ref_SPY[0, prompt[0]].exp(), 1, generator=generator)[:, 0]
    pieces = zip(prompt.split(9999, 1), answer.split(9999, 1), strict=True)
    ratios = torch.cat([log_ratios(prompts, theta, *piece) for piece in pieces], 1)
    rewards = prompts.rewards_SPY[0, prompt[0]]
    gains = rewards.gather(1, answer.T)[:, 0] - rewards.gather(1, shown[:, None])[:, 0]
    for name, exact, values in (("KL", kl[0, 1], ratios[0]), ("gain", gain[0, 1], gains)):
        failed |= not _agree(f"{name} against samples", exact, values.mean(), 4 * values.std().item() / many**0.5)
    # What p_up / p_down promises of the downs in the log: mean 1, and the mean topic of the ups.
    weights = prompts.ratio[0, log.prompt_SN[0, log.num_up :]]
    topics = weights * prompts.topic_SP[0, log.prompt_SN[0, log.num_up :]]
    for name, exact, values in (
        ("mean weight", torch.tensor(1.0), weights),
        ("weighted topic", (prompts.up_SP * prompts.topic_SP).sum(), topics),
    ):
        failed |= not _agree(name, exact, values.mean(), 4 * values.std().item() / log.num_up**0.5)
    if failed:
        raise SystemExit(1)


def _agree(name: str, exact: Tensor, other: Tensor, tolerance: float) -> bool:
    off = abs(exact.item() - other.item())
    verdict = "within" if off <= tolerance else "NOT WITHIN"
    print(f"{name}: {exact.item():.5f} and {other.item():.5f}, {verdict} {tolerance:.5f}")
    return off <= tolerance


def main() -> None:
    """Runs every comparison, prints tables, writes figures and picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10, help="prompts and logs are drawn anew for each")
    parser.add_argument("--quick", action="store_true", help="some of the worlds; writes nothing")
    parser.add_argument("--check", action="store_true", help="compare exact figures with sampling, and no more")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.check:
        check()
        return
    started, results = time.process_time(), []
    for name, world, make, beta in experiments(options.quick):
        results.append({"table": name, **compare(world, options.seeds, make, beta)})
        if name != "divergence":  # no other curve is drawn, and they would be most of the file
            for arm in results[-1]["arms"]:
                del arm["curves"]
        Console(width=170).print(table(results[-1]))
    print(f"{time.process_time() - started:.0f} CPU seconds")
    if not options.quick:
        told = {"machine": machine.describe(), "seeds": options.seeds, "settings": SETTINGS, "results": results}
        RESULTS.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        draw(results, RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    main()
