"""A policy, a log of feedback and a reward that are known, where every figure is a sum and no sample.

**World.** A prompt has a topic s (+1 or -1), an offset o and 8 answers; an answer has a length and style features g.
The true reward is R u_s . g, each topic has a direction of its own (cosine 1/2), and length plays no part in it. The
policy is pi(y|x) ~ pi_ref(y|x) exp(theta . phi(x, y)): phi holds the length, log pi_ref(y|x), and g sqrt(length / mean
length), since the log-ratio of an answer is a sum over its tokens; all of it a second time, multiplied by s, so that
topics can be told apart. Nothing of the policy belongs to one prompt alone: what it learns, it shows on prompts that
it has not seen.

**Log.** Of a fixed number of answers y ~ pi_ref(.|x), ``each`` for a prompt, every one gets thumbs-up with probability
sigma(reward + o + taste * length - t), as the paper assumes; t makes the wanted share. Half of the offsets' variance
is between the topics. A thumb may be flipped (``noise``). ``pairs``: the better of two by Bradley and Terry is
thumbs-up, the other thumbs-down. ``likert``: five stars, of which four and five are thumbs-up. ``divergence``:
thumbs-up are more often given where s = 1, and thumbs-down where s = -1. Paired objectives take every two answers to a
prompt of which one was rated higher; where there are none, they cannot learn.

Shape legend: S seeds, C betas, P prompts, Y answers, D features, G prompts of a log, K rated answers of each. Numbers
are float64; log-ratios, KL and rewards are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

ANSWERS, STYLES, HELD_OUT = 8, 15, 256
REWARD_SCALE, MEAN_TOKENS = 2.0, 40.0
SD_TOKENS = MEAN_TOKENS * (math.exp(0.25) - 1) ** 0.5
EPOCHS, ROWS_PER_STEP = 12, 64
KL = 0.5  # at which objectives are compared


@dataclass(frozen=True)
class World:
    """The knobs; see the top of this file."""

    each: int = 1
    pairs: bool = False
    likert: bool = False
    share_up: float = 0.5
    noise: float = 0.0
    offset: float = 0.0
    divergence: float = 0.0
    taste: float = 0.0
    rows: int = 1024


@dataclass(frozen=True)
class Prompts:
    """Prompts of all seeds, with what is known of them exactly."""

    phi_SPYD: Tensor
    log_ref_SPY: Tensor
    rewards_SPY: Tensor
    length_SPY: Tensor
    """Standardised: of mean 0 and standard deviation 1 under the reference."""
    offset_SP: Tensor
    topic_SP: Tensor

    def of(self, prompt_SG: Tensor) -> Prompts:
        """The chosen prompts of each seed."""
        seeds = torch.arange(len(prompt_SG))[:, None]
        return Prompts(*(values[seeds, prompt_SG] for values in vars(self).values()))


@dataclass(frozen=True)
class Log:
    """Prompts of a log and the rows of each, ``(S, G, K)``."""

    prompts: Prompts
    answer_SGK: Tensor
    up_SGK: Tensor
    score_SGK: Tensor
    """Of 0 to 1: stars, or the thumb."""
    ratio_SG: Tensor
    """How much likelier the prompt is among thumbs-up than among thumbs-down rows: the true density ratio."""
    taste_SG: Tensor
    """How the log odds of thumbs-up grow with length in this log, the same for each prompt."""

    def of(self, some_SG: Tensor) -> Log:
        """The chosen prompts with their rows."""
        seeds = torch.arange(len(some_SG))[:, None]
        own = {name: values[seeds, some_SG] for name, values in vars(self).items() if name != "prompts"}
        return Log(self.prompts.of(some_SG), **own)

    @property
    def length_SGK(self) -> Tensor:  # noqa: N802 - as its shape
        """Standardised length of every row."""
        return self.prompts.length_SPY.gather(2, self.answer_SGK)


def make_prompts(world: World, seeds: list[int], held_out: bool = False) -> Prompts:
    """Draws prompts; a seed's random numbers are the same in every world and whatever other seeds there are."""
    made = [_prompts_of(world, torch.Generator().manual_seed(2 * seed + held_out), held_out) for seed in seeds]
    return Prompts(*(torch.stack(values) for values in zip(*made, strict=True)))


def _prompts_of(world: World, generator: torch.Generator, held_out: bool) -> tuple[Tensor, ...]:
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    count = HELD_OUT if held_out else 4 * world.rows  # the log takes those of them that it needs
    topic_P = 1.0 - 2.0 * (torch.arange(count) % 2).double()
    styles_PYD, log_tokens_PY = normal(count, ANSWERS, STYLES), 0.5 * normal(count, ANSWERS)
    tokens_PY = log_tokens_PY.exp() * MEAN_TOKENS * math.exp(-0.125)
    length_PY = (tokens_PY - MEAN_TOKENS) / SD_TOKENS
    per_token_PYD = styles_PYD * (tokens_PY / MEAN_TOKENS).sqrt()[..., None]
    log_ref_PY = (0.7 * normal(count, ANSWERS)).log_softmax(1)
    plain_PYD = torch.cat([torch.stack([length_PY, log_ref_PY], -1), per_token_PYD], -1)
    phi_PYD = torch.cat([plain_PYD, plain_PYD * topic_P[:, None, None]], -1)
    other_PY = 0.5 * styles_PYD[..., 0] + 0.75**0.5 * styles_PYD[..., 1]
    rewards_PY = REWARD_SCALE * torch.where(topic_P[:, None] > 0, styles_PYD[..., 0], other_PY)
    offset_P = world.offset * 0.5**0.5 * (topic_P + normal(count))
    return phi_PYD, log_ref_PY, rewards_PY, length_PY, offset_P, topic_P


def draw_log(world: World, seeds: list[int], prompts: Prompts | None = None) -> Log:
    """Draws as many rows as the world has, for each seed."""
    prompts = prompts or make_prompts(world, seeds)
    liked_SPY = prompts.rewards_SPY + prompts.offset_SP[..., None] + world.taste * prompts.length_SPY
    of_seeds = zip(seeds, liked_SPY, prompts.log_ref_SPY, prompts.topic_SP, strict=True)
    made = [_log_of(world, *of_seed) for of_seed in of_seeds]
    chosen, answer, up, score, ratio = (torch.stack(values) for values in zip(*made, strict=True))
    downs = (~up).sum(-1)
    ratio = ratio / ((ratio * downs).sum(1) / downs.sum(1))[:, None]
    log = Log(prompts.of(chosen), answer, up, score, ratio, torch.zeros_like(ratio))
    return replace(log, taste_SG=_slope(log.length_SGK.flatten(1), up.flatten(1).double())[:, None].expand_as(ratio))


def _slope(lengths_SN: Tensor, up_SN: Tensor) -> Tensor:
    """Of the logistic regression of thumbs on length, by Newton's method."""
    design, found = torch.stack([torch.ones_like(lengths_SN), lengths_SN], -1), torch.zeros(len(up_SN), 2, 1).double()
    for _ in range(8):
        guess = torch.sigmoid(design @ found)
        curvature = design.mT @ (guess * (1 - guess) * design)
        found = found + torch.linalg.solve(curvature, design.mT @ (up_SN[..., None] - guess))
    return found[:, 1, 0]


def _log_of(world: World, seed: int, liked_PY: Tensor, log_ref_PY: Tensor, topic_P: Tensor) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(10_000 + seed)
    uniform = partial(torch.rand, generator=generator, dtype=torch.float64)
    answer_PK = torch.multinomial(log_ref_PY.exp(), world.each, generator=generator)
    liked_PK, ratio_P, kept_P = liked_PY.gather(1, answer_PK), torch.ones_like(topic_P), torch.ones_like(topic_P).bool()
    if world.pairs:
        first_P = uniform(len(liked_PK)) < torch.sigmoid(liked_PK[:, 0] - liked_PK[:, 1])
        up_PK = torch.stack([first_P, ~first_P], 1)
        up_PK ^= uniform(len(liked_PK), 1) < world.noise  # a flipped comparison is still one
        score_PK = up_PK.double()
    elif world.likert:
        felt_PK = liked_PK + torch.logit(uniform(liked_PK.shape))
        edges = felt_PK.flatten().quantile(torch.tensor([0.1, 0.3, 0.6, 0.85], dtype=torch.float64))
        stars_PK = torch.bucketize(felt_PK, edges)
        up_PK, score_PK = stars_PK >= 3, stars_PK / 4
    else:
        up_PY = torch.sigmoid(liked_PY - _threshold(liked_PY, log_ref_PY, world.share_up))
        up_PK = uniform(answer_PK.shape) < up_PY.gather(1, answer_PK)
        up_PK ^= uniform(answer_PK.shape) < world.noise
        score_PK = up_PK.double()
        if world.divergence:
            pull_P = torch.sigmoid(world.divergence * topic_P)
            kept_P = uniform(len(topic_P)) < torch.where(up_PK[:, 0], pull_P, 1 - pull_P)
            share_P = (log_ref_PY.exp() * up_PY).sum(1)
            ratio_P = share_P * pull_P / ((1 - share_P) * (1 - pull_P))
    chosen_G = kept_P.nonzero()[: world.rows // world.each, 0]
    return (chosen_G, *(values[chosen_G] for values in (answer_PK, up_PK, score_PK, ratio_P)))


def _threshold(liked_PY: Tensor, log_ref_PY: Tensor, share_up: float) -> Tensor:
    low, high = torch.tensor(-50.0), torch.tensor(50.0)
    for _ in range(50):
        middle = (low + high) / 2
        too_many = (log_ref_PY.exp() * torch.sigmoid(liked_PY - middle)).sum(1).mean() > share_up
        low, high = (middle, high) if too_many else (low, middle)
    return low


@dataclass
class Step:
    """What an objective sees of a step; rows are ``(S, C, G, K)``, and so is what it gives back."""

    log_ratios: Tensor
    log_probs: Tensor
    beta: Tensor
    """``(C, 1, 1)``."""
    up: Tensor
    scores: Tensor
    lengths: Tensor
    weights: Tensor
    """Class weights of rows, of mean 1: Eq. 8 is twice their weighted mean of losses."""
    kl: Tensor
    """Exact KL of the policy on the prompts of the step, ``(S, C, 1, 1)``."""
    ratio: Tensor
    taste: Tensor
    pairs_per_step: Tensor
    """Mean number of pairs in a step, ``(S, 1)``."""

    @property
    def rewards(self) -> Tensor:
        """Implicit rewards."""
        return self.beta * self.log_ratios

    def rows(self, losses: Tensor) -> Tensor:
        """Eq. 8 of losses: the sum of both class means, ``(S, C)``."""
        return 2 * (self.weights * losses).mean((-2, -1))

    def of_pairs(self, loss: Callable[[Tensor, Tensor], Tensor], values: Tensor) -> Tensor:
        """Mean of a loss of the better and the worse of all pairs of a prompt's rows, ``(S, C)``."""
        good, bad = torch.broadcast_tensors(values[..., :, None], values[..., None, :])
        is_better = self.scores[..., :, None] > self.scores[..., None, :]
        return (is_better * loss(good, bad)).sum((-3, -2, -1)) / self.pairs_per_step


class Objective:
    """A loss of a step, with what it remembers of those before."""

    def losses(self, step: Step) -> Tensor:
        """The loss of each seed and setting, ``(S, C)``."""
        raise NotImplementedError

    def after(self, step: Step) -> None:
        """Takes in a step that has been made."""


@dataclass(frozen=True)
class Frontier:
    """Figures on held-out prompts at the end of training, by beta from the largest on; ``(S, C)``."""

    kl: Tensor
    reward: Tensor
    """Gain over the reference."""
    tokens: Tensor
    entropy: Tensor
    kl_neutral: Tensor
    """The same policy, tilted by length until its answers are as long as the reference's."""
    reward_neutral: Tensor

    def at(self, name: str = "reward", kl: float = KL) -> Tensor:
        """A figure where the KL reaches ``kl``, between two betas by a line over sqrt(KL); NaN where none does."""
        along = (self.kl_neutral if name == "reward_neutral" else self.kl).sqrt()
        values, reached = getattr(self, name), along >= kl**0.5
        after = reached.int().argmax(1).clamp(min=1)[:, None]
        low, high = (along.gather(1, after - back)[:, 0] for back in (1, 0))
        before, behind = (values.gather(1, after - back)[:, 0] for back in (1, 0))
        between = before + (behind - before) * (kl**0.5 - low) / (high - low)
        return between.where(reached.any(1) & (low <= kl**0.5), torch.nan)


@torch.no_grad()
def look(prompts: Prompts, theta_SCD: Tensor) -> Frontier:
    """Figures of one policy for each seed and beta: sums over all answers."""
    tilt = torch.einsum("spyd,scd->scpy", prompts.phi_SPYD, theta_SCD)
    log_ref, length = prompts.log_ref_SPY[:, None], prompts.length_SPY[:, None]
    rewards, ref = prompts.rewards_SPY[:, None], log_ref.exp()

    def mean(pi: Tensor, values: Tensor) -> Tensor:
        return (pi * values).sum(-1).mean(-1)

    def kl_and_gain(log_pi: Tensor) -> tuple[Tensor, Tensor]:
        return mean(log_pi.exp(), log_pi - log_ref), mean(log_pi.exp() - ref, rewards)

    log_pi, slope = (log_ref + tilt).log_softmax(-1), torch.zeros(tilt.shape[:2])
    for _ in range(6):  # Newton's method: the mean length grows with the slope by its variance
        pi = (log_pi + slope[..., None, None] * length).softmax(-1)
        own = (pi * length).sum(-1, keepdim=True)
        slope = slope + (mean(ref, length) - own[..., 0].mean(-1)) / mean(pi, (length - own).square())
    neutral = kl_and_gain((log_pi + slope[..., None, None] * length).log_softmax(-1))
    tokens, entropy = MEAN_TOKENS + SD_TOKENS * mean(log_pi.exp(), length), mean(log_pi.exp(), -log_pi)
    return Frontier(*kl_and_gain(log_pi), tokens, entropy, *neutral)


def train(
    log: Log,
    objective: Objective,
    betas: Sequence[float],
    learning_rate: float,
    class_weights: bool = True,
    watch: Callable[[Step], Any] | None = None,
) -> Tensor:
    """Trains a policy for each seed and beta at once by Adam, the rate falling in a line to 0.

    Args:
        log: Rows of every seed.
        objective: A new one; it remembers steps.
        betas: Of the implicit reward.
        learning_rate: At the first step.
        class_weights: Whether each class weighs as much as the other; if not, each row does.
        watch: Is given every step before it is made.

    Returns:
        Theta, ``(S, C, D)``.
    """
    num_seeds, num_groups, each = log.answer_SGK.shape
    beta, seeds = torch.tensor(betas, dtype=torch.float64)[:, None, None], torch.arange(num_seeds)[:, None]
    share = log.up_SGK.double().mean((1, 2), keepdim=True)
    weights_SGK = torch.where(log.up_SGK, 0.5 / share, 0.5 / (1 - share))
    if not class_weights:
        weights_SGK = torch.ones_like(weights_SGK)
    per_step = ROWS_PER_STEP // each
    num_pairs = (log.score_SGK[..., :, None] > log.score_SGK[..., None, :]).double().sum((1, 2, 3))
    pairs_per_step = (num_pairs * per_step / num_groups).clamp(min=1e-9)[:, None]
    theta = torch.zeros(num_seeds, len(beta), log.prompts.phi_SPYD.shape[-1], dtype=torch.float64)
    first, second = torch.zeros_like(theta), torch.zeros_like(theta)
    generator, num_steps = torch.Generator().manual_seed(3), EPOCHS * num_groups // per_step
    for number in range(num_steps):
        if not (at := number * per_step % num_groups):
            order_G = torch.randperm(num_groups, generator=generator)
        some_SG = order_G[at : at + per_step].expand(num_seeds, -1)
        part = log.of(some_SG)
        step, log_pi = _step_of(part, theta, beta, weights_SGK[seeds, some_SG], pairs_per_step)
        if watch:
            watch(step)
        (slope,) = torch.autograd.grad(objective.losses(step).sum(), step.log_probs)
        # The gradient of log pi(y) is phi(y) less its mean under the policy.
        by_answer = torch.zeros_like(log_pi).scatter_add_(3, part.answer_SGK[:, None].expand_as(slope), slope)
        by_answer -= log_pi.exp() * slope.sum(-1, keepdim=True)
        gradient = by_answer.flatten(2) @ part.prompts.phi_SPYD.flatten(1, 2)
        first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient.square()
        moved = first / (1 - 0.9 ** (number + 1)) / ((second / (1 - 0.99 ** (number + 1))).sqrt() + 1e-8)
        theta = theta - learning_rate * (1 - number / num_steps) * moved
        with torch.no_grad():
            objective.after(step)
    return theta


def _step_of(part: Log, theta: Tensor, beta: Tensor, weights: Tensor, pairs_per_step: Tensor) -> tuple[Step, Tensor]:
    prompts = part.prompts
    log_ref = prompts.log_ref_SPY[:, None]
    tilt = theta @ prompts.phi_SPYD.flatten(1, 2).mT
    log_pi = (log_ref + tilt.unflatten(2, log_ref.shape[2:])).log_softmax(-1)
    answer = part.answer_SGK[:, None].expand(-1, len(beta), -1, -1)
    log_probs = log_pi.gather(3, answer).requires_grad_()
    kl = (log_pi.exp() * (log_pi - log_ref)).sum(-1).mean(-1)[..., None, None]
    of_rows = (part.up_SGK, part.score_SGK, part.length_SGK, weights)
    reference = log_ref.expand_as(log_pi).gather(3, answer)
    of_prompts = (values[:, None, :, None] for values in (part.ratio_SG, part.taste_SG))
    made = Step(log_probs - reference, log_probs, beta, *(values[:, None] for values in of_rows), kl, *of_prompts,
                pairs_per_step)  # fmt: skip
    return made, log_pi
