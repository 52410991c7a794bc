"""Token-level credit, as in TLCR (arXiv:2407.16574): does weighing each token's log-ratio pay? A toy without samples.

**World.** An answer has T tokens, each drawn by itself from V that differ in styles g. One of them bears the reward, R
u . g; the others bear none. theta has a part for either kind: the policy knows which bears it, by half, or not.
Thumbs-up has probability sigma(reward - median). The policy is pi(v) ~ pi_ref(v) exp(theta . phi(v)), and the log-ratio
of an answer is the sum over its tokens.

**Weights.** The implicit reward of the loss is beta sum_t w_t log-ratio_t, with w of mean 1 in the log.
``discriminator``: a logistic regression tells tokens of praised answers from those of others, and w is its confidence,
twice the distance of its probability from 1/2: TLCR's continuous reward without its sign, which the thumb has.
``oracle``: w is the size of the token's true reward. ``bearer``: w is 0 for a token that bears no reward, and the same
for all that do.

Figures: gain in true reward at KL 1/2 for a whole answer, as in ``alignment.py``; differences to plain BCO, by seed.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignment import BETAS
from known_reward import interval
from toy import KL, REWARD_SCALE, Frontier

RESULTS = Path(__file__).parent / "results" / "token_credit.json"
TOKENS, CHOICES, STYLES, ROWS, STEPS, LEARNING_RATE = 6, 4, 8, 1024, 150, 0.05
WEIGHTS = ("none", "discriminator", "oracle", "bearer")


class Answers:
    """Prompts of all seeds ``(S, N)`` with T tokens of V choices: features, true rewards, and a log drawn from them."""

    def __init__(self, seeds: range, rows: int, told: float, first: int = 0) -> None:
        made = [torch.Generator().manual_seed(first + seed) for seed in seeds]
        shape = rows, TOKENS, CHOICES
        styles = torch.stack([torch.randn(*shape, STYLES, generator=each, dtype=torch.float64) for each in made])
        bears = torch.stack([torch.rand(rows, TOKENS, generator=each).argmax(1) for each in made])
        self.bears = torch.nn.functional.one_hot(bears, TOKENS).double()  # S, N, T
        # What the policy knows of it: with ``told`` of 1 which token bears the reward, with 0 nothing.
        kind = (told * self.bears)[..., None, None]
        self.phi = torch.cat([styles * kind, styles * (1 - kind)], -1)
        self.log_ref = (
            torch.stack([0.7 * torch.randn(*shape, generator=each) for each in made]).double().log_softmax(-1)
        )
        self.rewards = REWARD_SCALE * styles[..., 0] * self.bears[..., None]
        flat = self.log_ref.exp().flatten(0, 2)
        torch.manual_seed(first + seeds[0])
        self.chosen = flat.multinomial(1).view(*self.log_ref.shape[:3], 1)
        felt = self.rewards.gather(3, self.chosen).sum((2, 3))
        self.up = torch.rand(felt.shape).double() < torch.sigmoid(felt - felt.median(1, keepdim=True).values)

    def of_chosen(self, values: Tensor) -> Tensor:
        """Those of the tokens that were drawn."""
        return values.gather(-1, self.chosen.expand(*values.shape[:-1], 1))[..., 0]

    @property
    def features(self) -> Tensor:
        """Of the tokens that were drawn, ``(S, N, T, D)``."""
        return self.phi.gather(3, self.chosen[..., None].expand(*self.phi.shape[:3], 1, self.phi.shape[-1]))[..., 0, :]


def token_weights(log: Answers, kind: str) -> Tensor:
    """``(S, N, T)``, of mean 1."""
    weights = torch.ones_like(log.bears)
    if kind == "bearer":
        weights = log.bears
    if kind == "oracle":
        weights = log.of_chosen(log.rewards).abs()
    if kind == "discriminator":
        design = log.features.flatten(1, 2)
        thumbs = log.up[..., None].expand(log.bears.shape).flatten(1)[..., None].double()
        found = torch.zeros(len(design), design.shape[-1], 1, dtype=torch.float64)
        for _ in range(8):  # Newton's method, with a ridge of one row
            guess = torch.sigmoid(design @ found)
            curvature = design.mT @ (guess * (1 - guess) * design) + torch.eye(design.shape[-1])
            found = found + torch.linalg.solve(curvature, design.mT @ (thumbs - guess) - found)
        weights = (2 * torch.sigmoid(design @ found) - 1).abs().view_as(log.bears)
    return weights / weights.mean((1, 2), keepdim=True)


def train(log: Answers, weights: Tensor, betas: list[float]) -> Tensor:
    """Theta of every seed and beta, ``(S, C, D)``, by Adam on all rows, the rate falling to 0."""
    beta = torch.tensor(betas, dtype=torch.float64)[:, None]
    theta = torch.zeros(len(log.up), len(betas), log.phi.shape[-1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([theta], LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, STEPS)
    up, share = log.up[:, None], log.up.double().mean(1)[:, None, None]
    for _ in range(STEPS):
        tilt = torch.einsum("sntvd,scd->scntv", log.phi, theta)
        partition = (log.log_ref[:, None] + tilt).logsumexp(-1)
        chosen = tilt.gather(4, log.chosen[:, None].expand(-1, len(betas), -1, -1, -1))[..., 0]
        rewards = beta * (weights[:, None] * (chosen - partition)).sum(-1)
        means = (rewards * up).mean(-1, keepdim=True) / share, (rewards * ~up).mean(-1, keepdim=True) / (1 - share)
        shifted = rewards - (sum(means) / 2).detach()
        losses = -logsigmoid(torch.where(up, shifted, -shifted)) / torch.where(up, share, 1 - share)
        optimizer.zero_grad()
        losses.mean(-1).sum().backward()
        optimizer.step()
        schedule.step()
    return theta.detach()


def look(prompts: Answers, theta: Tensor) -> Frontier:
    """KL and gain of whole answers."""
    log_ref, rewards = prompts.log_ref[:, None], prompts.rewards[:, None]
    log_pi = (log_ref + torch.einsum("sntvd,scd->scntv", prompts.phi, theta)).log_softmax(-1)
    kl, gain = (
        each.sum((-2, -1)).mean(-1)
        for each in (log_pi.exp() * (log_pi - log_ref), (log_pi.exp() - log_ref.exp()) * rewards)
    )
    return Frontier(kl, gain, *(torch.zeros(()),) * 2, kl, gain)


def main() -> None:
    """Prints and keeps the reward of each kind of weights, where the policy knows which token bears it, and not."""
    torch.set_num_threads(1)
    seeds, told = range(10), {}
    for knows in (1.0, 0.5, 0.0):
        log, held_out, base = Answers(seeds, ROWS, knows), Answers(seeds, 256, knows, 1000), None
        for kind in WEIGHTS:
            gains = look(held_out, train(log, token_weights(log, kind), BETAS)).at()
            base = gains if base is None else base
            told[f"knows {knows:g}, {kind}"] = {"reward": interval(gains), "difference": interval(gains - base)}
            print(f"knows {knows:g}, {kind}: {told[f'knows {knows:g}, {kind}']}", flush=True)
    RESULTS.write_text(
        json.dumps({"kl": KL, "rows": ROWS, "seeds": len(seeds), "arms": told}, indent=1) + "\n", "utf-8"
    )


if __name__ == "__main__":
    main()
