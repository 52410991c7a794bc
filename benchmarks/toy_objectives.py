"""The objectives of the package for many policies at once, written a second time; and what might be better than they.

``tests/unit/test_alignment_toy.py`` holds each that the package has against the package.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from typing_extensions import override

from toy import MEAN_TOKENS, SD_TOKENS, Objective, Step

DECAY = 0.9
# Nodes and weights of means over a standard normal; spreads that are tried, in nats.
NODES, NODE_WEIGHTS = (torch.from_numpy(values) for values in np.polynomial.hermite_e.hermegauss(11))
SPREADS = torch.tensor([0.0, 0.5, 1.0, 2.0, 4.0, 8.0], dtype=torch.float64)


class Kept:
    """Decayed means over past steps, for each seed and beta; 0 of what was never seen."""

    def __init__(self, decay: float = DECAY) -> None:
        self.sums = self.counts = torch.zeros(())
        self.decay = decay

    @property
    def means(self) -> Tensor:
        """The means, ``(..., S, C, 1, 1)``."""
        return torch.where(self.counts > 0, self.sums / self.counts.clamp(min=1e-12), 0.0)[..., None, None]

    def take_in(self, sums: Tensor, counts: Tensor) -> None:
        """Takes in a step; a mean of which it saw nothing stays."""
        decay = torch.where(counts > 0, self.decay, 1.0)
        self.sums, self.counts = decay * self.sums + sums, decay * self.counts + counts


def over_rows(values: Tensor) -> Tensor:
    """Sum over the rows of a step."""
    return values.sum((-2, -1))


def right(step: Step, values: Tensor) -> Tensor:
    """Values of thumbs-up rows, and minus those of others: above 0 where a row is on the right side."""
    return torch.where(step.up, values, -values)


class BCE(Objective):
    """Eq. 8 with a shift of 0."""

    def shift(self, step: Step) -> Tensor:
        """What rewards are compared with."""
        return torch.zeros(())

    def of_rows(self, step: Step) -> Tensor:
        """Losses of rows."""
        return -logsigmoid(right(step, step.rewards - self.shift(step)))

    @override
    def losses(self, step: Step) -> Tensor:
        return step.rows(self.of_rows(step))


class BCO(BCE):
    """Eq. 8; on request with rewards per token, importance weights by prompt or by length, or corrected for noise."""

    def __init__(self, weights: Literal["", "prompt", "length"] = "", per_token: bool = False) -> None:
        self.kept, self.weights, self.per_token = Kept(), weights, per_token

    def rewards(self, step: Step) -> Tensor:
        """Implicit rewards."""
        return step.rewards / tokens(step) if self.per_token else step.rewards

    @override
    def shift(self, step: Step) -> Tensor:
        means = self.kept.means
        return means.mean(0) if len(means) == 2 else torch.zeros(())

    @override
    def of_rows(self, step: Step) -> Tensor:
        losses = -logsigmoid(right(step, self.rewards(step) - self.shift(step)))
        if not self.weights:
            return losses
        by_length = (step.taste * step.lengths).exp()
        by_length = (
            by_length / (by_length * ~step.up).sum((-2, -1), keepdim=True) * over_rows(~step.up)[..., None, None]
        )
        weights = (step.ratio if self.weights == "prompt" else by_length).clamp(0.1, 10)
        return torch.where(step.up, 1.0, weights) * losses

    @override
    def after(self, step: Step) -> None:
        rewards = self.rewards(step)
        classes = torch.stack([step.up, ~step.up]).expand(2, *rewards.shape).double()
        self.kept.take_in(over_rows(classes * rewards), over_rows(classes))


class LengthShift(BCO):
    """A threshold that is a line over length: the midpoint of rewards of either class, or the odds of the thumbs."""

    def __init__(self, of: Literal["rewards", "thumbs"]) -> None:
        super().__init__()
        self.of, self.moments = of, Kept()

    @override
    def shift(self, step: Step) -> Tensor:
        shift = super().shift(step)
        if self.of == "thumbs":
            return shift - step.taste * step.lengths
        moments = self.moments.means
        if len(moments) != 2:
            return shift
        (length, reward, square, product) = moments.unbind(1)
        slope = (product - length * reward) / (square - length.square()).clamp(min=1e-3)
        return (reward + slope * (step.lengths - length)).mean(0)

    @override
    def after(self, step: Step) -> None:
        super().after(step)
        classes = torch.stack([step.up, ~step.up]).expand(2, *step.rewards.shape).double()[:, None]
        length = step.lengths.expand_as(step.rewards)
        values = torch.stack([length, step.rewards, length.square(), length * step.rewards])
        self.moments.take_in(over_rows(classes * values), over_rows(classes.expand(2, *values.shape)))


class OddsByLength(BCO):
    """A threshold that follows the odds of thumbs by the logarithm of length, as two normal classes have them."""

    def __init__(self) -> None:
        super().__init__()
        self.moments = Kept(0.999)

    @override
    def shift(self, step: Step) -> Tensor:
        shift, moments = super().shift(step), self.moments.means
        if len(moments) != 2:
            return shift
        means, squares = moments.unbind(1)
        slope = (means[0] - means[1]) / (squares - means.square()).mean(0).clamp(min=1e-6)
        return shift - slope * (tokens(step).log() - means.mean(0))

    @override
    def after(self, step: Step) -> None:
        super().after(step)
        length = tokens(step).log().expand_as(step.rewards)
        classes = torch.stack([step.up, ~step.up]).expand(2, *step.rewards.shape).double()[:, None]
        values = torch.stack([length, length.square()])
        self.moments.take_in(over_rows(classes * values), over_rows(classes.expand(2, *values.shape)))


class Noisy(BCO):
    """BCO for thumbs of which a share is flipped: by the likelihood, or by the loss without bias (Natarajan 2013)."""

    def __init__(self, how: Literal["likelihood", "unbiased"], share: float | None = None) -> None:
        super().__init__()
        self.how, self.known, self.flips = how, share, Kept()

    def share(self, step: Step) -> Tensor:
        """The share of flipped thumbs, known or found by expectation and maximization."""
        found = self.flips.means
        known = self.known if self.known is not None else 0.1
        return torch.tensor(known) if self.known is not None or found.dim() < 4 else found.clamp(0.001, 0.49)

    @override
    def of_rows(self, step: Step) -> Tensor:
        side, share = right(step, step.rewards - self.shift(step)), self.share(step)
        if self.how == "unbiased":
            return -logsigmoid(side) - share / (1 - 2 * share) * side
        return -torch.logaddexp((1 - share).log() + logsigmoid(side), share.log() + logsigmoid(-side))

    @override
    def after(self, step: Step) -> None:
        side, share = right(step, step.rewards - self.shift(step)), self.share(step)
        flipped = share * torch.sigmoid(-side) / (share * torch.sigmoid(-side) + (1 - share) * torch.sigmoid(side))
        self.flips.take_in(over_rows(flipped), over_rows(torch.ones_like(flipped)))
        super().after(step)


class PromptMidpoint(BCO):
    """A prompt's midpoint of rewards, shrunk to the global one by variance between prompts and within."""

    def __init__(self) -> None:
        super().__init__()
        self.variances = Kept()

    def _residuals(self, step: Step) -> Tensor:
        up, down = self.kept.means if len(self.kept.means) == 2 else torch.zeros(2)
        return step.rewards.detach() - torch.where(step.up, up, down)

    @override
    def shift(self, step: Step) -> Tensor:
        shift, each = super().shift(step), step.up.shape[-1]
        if len(self.variances.means) != 2 or each == 1:
            return shift
        within, between = self.variances.means
        between = (between - within / each).clamp(min=0)
        return shift + each * between / (each * between + within + 1e-12) * self._residuals(step).mean(-1, keepdim=True)

    @override
    def after(self, step: Step) -> None:
        super().after(step)
        residuals = self._residuals(step)
        means, (groups, each) = residuals.mean(-1, keepdim=True), residuals.shape[-2:]
        sums = torch.stack([over_rows((residuals - means).square()), over_rows(means.square())])
        counts = torch.tensor([groups * (each - 1.0), float(groups)])[:, None, None]
        self.variances.take_in(sums, counts.expand_as(sums))


class PromptIntercept(BCO):
    """A prompt's offset as a normal number that is integrated out; its spread is that of the largest likelihood."""

    def __init__(self) -> None:
        super().__init__()
        self.likelihood = Kept()

    @property
    def spread(self) -> Tensor:
        """In nats, ``(S, C, 1, 1)``; 0 at first."""
        found = self.likelihood.means
        return SPREADS[found.argmax(0)] if len(found) == len(SPREADS) else torch.zeros(())

    def _parts(self, step: Step, spread: Tensor) -> tuple[Tensor, Tensor]:
        """Log-likelihoods of rows, and of prompts with a node's own weight, at each node."""
        shifted = (step.rewards - self.shift(step))[..., None] + spread[..., None] * NODES
        of_rows = logsigmoid(torch.where(step.up[..., None], shifted, -shifted))
        return of_rows, (step.weights[..., None] * of_rows).sum(-2) + (NODE_WEIGHTS / NODE_WEIGHTS.sum()).log()

    @override
    def of_rows(self, step: Step) -> Tensor:
        of_rows, of_prompts = self._parts(step, self.spread)
        return -(of_prompts.detach().softmax(-1)[..., None, :] * of_rows).sum(-1)

    @override
    def after(self, step: Step) -> None:
        if step.up.shape[-1] > 1:
            found = torch.stack([self._parts(step, spread)[1].logsumexp(-1).sum(-1) for spread in SPREADS])
            self.likelihood.take_in(found, torch.ones_like(found))
        super().after(step)


class KTO(BCE):
    """With the exact KL of the step as its baseline."""

    @override
    def shift(self, step: Step) -> Tensor:
        return (step.beta * step.kl).detach()

    @override
    def of_rows(self, step: Step) -> Tensor:
        return torch.sigmoid(-right(step, step.rewards - self.shift(step)))


class APOZero(KTO):
    """KTO with a baseline of 0."""

    @override
    def shift(self, step: Step) -> Tensor:
        return torch.zeros(())


class KLDO(BCE):
    """Donsker and Varadhan's bound, by the tangent of its logarithm."""

    def __init__(self) -> None:
        self.partition = Kept()

    @override
    def shift(self, step: Step) -> Tensor:
        means = self.partition.means
        return means.where(means > 0, 1.0).log()

    @override
    def of_rows(self, step: Step) -> Tensor:
        shift = self.shift(step)
        return torch.where(step.up, -step.rewards, (step.rewards - shift).exp() + shift - 1)

    @override
    def after(self, step: Step) -> None:
        self.partition.take_in(over_rows(step.rewards.exp() * ~step.up), over_rows(~step.up).double())


class UNA(Objective):
    """Scores as they are."""

    @override
    def losses(self, step: Step) -> Tensor:
        return (torch.sigmoid(step.rewards) - step.scores).square().mean((-2, -1))


class SFT(BCE):
    """Cross-entropy of thumbs-up rows per token."""

    @override
    def of_rows(self, step: Step) -> Tensor:
        return -step.log_probs / tokens(step) * step.up


class Mix(Objective):
    """BCO with a tenth of SFT."""

    def __init__(self) -> None:
        self.bco, self.sft = BCO(), SFT()

    @override
    def losses(self, step: Step) -> Tensor:
        return self.bco.losses(step) + 0.1 * self.sft.losses(step)

    @override
    def after(self, step: Step) -> None:
        self.bco.after(step)


class OfPairs(Objective):
    """A loss of the better and the worse reward of two answers."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.loss = loss

    @override
    def losses(self, step: Step) -> Tensor:
        return step.of_pairs(self.loss, step.rewards)


class IPO(Objective):
    """Squared distance of the margin per token; a token is a mean answer here, so that beta is of the usual size."""

    @override
    def losses(self, step: Step) -> Tensor:
        wanted = 1 / (2 * step.beta[..., None])
        return step.of_pairs(lambda good, bad: (good - bad - wanted).square(), step.log_ratios / tokens(step))


def tokens(step: Step) -> Tensor:
    """Tokens of rows, in those of a mean answer."""
    return 1 + SD_TOKENS / MEAN_TOKENS * step.lengths


def dpo(good: Tensor, bad: Tensor) -> Tensor:
    """Direct preference optimization."""
    return -logsigmoid(good - bad)


def nca(good: Tensor, bad: Tensor) -> Tensor:
    """Noise contrastive alignment."""
    return -logsigmoid(good) - logsigmoid(-good) / 2 - logsigmoid(-bad) / 2


UNPAIRED: dict[str, Callable[[], Objective]] = {
    "bco": BCO, "bce": BCE, "kto": KTO, "apo_zero": APOZero, "kldo": KLDO, "una": UNA, "sft": SFT, "bco + 0.1 sft": Mix,
}  # fmt: skip
PAIRED: dict[str, Callable[[], Objective]] = {"dpo": partial(OfPairs, dpo), "ipo": IPO, "nca": partial(OfPairs, nca)}
EVERY = UNPAIRED | PAIRED
