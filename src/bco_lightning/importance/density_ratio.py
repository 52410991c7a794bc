"""The density ratio of prompts: how much likelier a prompt is among thumbs-up than among thumbs-down rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from bco_lightning.importance.prompt_table import K
from bco_lightning.options import CLIP, DEFAULT_CLIP

MOST_PROMPTS = 20_000

_STRENGTHS = tuple(10 ** (step / 2) for step in range(-10, 1))
_MOST_AXES = 256
_PAIRS = tuple(combinations(range(K), 2))
_FEWEST_ROWS, _FEWEST_PROMPTS, _FEWEST_OF_CLASS = 20, 50, 5  # the last: distinct prompts with rows of a class
# Standard errors. 1,129 data sets were simulated whose thumbs do not depend on the prompt: 300 prompts, 1 to 32
# features; 10 % thumbs-up; one prompt with 50 rows, also all alike; heavy tails; 60 prompts; 150 with 100 features.
# The median was about -1.3, one was above 2 (2.18), none above 2.5: false alarms at most 0.3 %, with 95 %
# confidence, and room to spare. (A Newton solver of the same objective stood for scikit-learn's, to save time.) Of 10
# to 15 prompts 3 of 518 data sets were above 3, with scikit-learn's: so few prompts are refused.
ENOUGH_EVIDENCE = 3.0
_CHUNK = 16_384  # prompts whose standardised features are in memory at once
_Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class DensityRatio:
    r"""Gives a prompt the weight :math:`w(x) = p(x \mid up) / p(x \mid down)`, clipped and scaled to a mean of 1.

    One linear classifier for each fold; a prompt belongs to the fold whose classifier has not seen it.

    Args:
        mean_H: Centre of each feature, float64.
        scale_H: Standard deviation of each feature, 1 where it hardly varies; float64.
        coefficients_KH: Of standardised features, one row a fold; float64.
        intercepts_K: Less the log odds of the training rows, so that a sum is a log density ratio; float64.
        normaliser: Mean of the clipped ratio over thumbs-down rows.
        clip: Least and largest ratio.
        has_evidence: Whether held-out prompts were told apart; where not, every weight is exactly 1.

    Source:
        arXiv:2404.04656v1, "Underlying distribution matching".
    """

    mean_H: Tensor
    scale_H: Tensor
    coefficients_KH: Tensor
    intercepts_K: Tensor
    normaliser: float = 1.0
    clip: tuple[float, float] = DEFAULT_CLIP
    has_evidence: bool = False

    def log_ratios(self, features_PH: Tensor, folds_P: Tensor) -> Tensor:
        """Log density ratios in nats, before clipping.

        Args:
            features_PH: Features of prompts, any floating dtype, on any device.
            folds_P: Fold of each prompt, 0 to 4; int64.

        Returns:
            Shape ``(P,)``, float32, or float64 where the features are; on their device.
        """
        dtype = torch.promote_types(features_PH.dtype, torch.float32)
        mean_H, scale_H, coefficients_KH, intercepts_K = (
            values.to(dtype).to(features_PH.device) for values in self._tensors
        )
        # Products and a sum: a matrix product would be rounded to bfloat16 or TensorFloat-32 where a run asks for them.
        chunks = [
            ((some_CH.to(dtype) - mean_H) / scale_H * coefficients_KH[folds_C]).sum(dim=1) + intercepts_K[folds_C]
            for some_CH, folds_C in zip(
                features_PH.split(_CHUNK), folds_P.to(features_PH.device).split(_CHUNK), strict=True
            )
        ]
        return torch.cat(chunks)

    def weights(self, log_ratios_P: Tensor) -> Tensor:
        """Weights of prompts' thumbs-down rows.

        Args:
            log_ratios_P: What :meth:`log_ratios` gave.

        Returns:
            Shape ``(P,)``, float32; exactly ones without evidence.
        """
        if not self.has_evidence:
            return torch.ones_like(log_ratios_P, dtype=torch.float32)
        return (clipped_ratios(log_ratios_P, self.clip) / self.normaliser).float()

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        return self.mean_H, self.scale_H, self.coefficients_KH, self.intercepts_K

    def to(self, device: torch.device | str) -> DensityRatio:
        """The same on another device; in float32, as some have no float64."""
        names = ("mean_H", "scale_H", "coefficients_KH", "intercepts_K")
        return replace(self, **{name: getattr(self, name).float().to(device) for name in names})

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {**vars(self), "clip": list(self.clip)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> DensityRatio:
        """The one whose :meth:`state_dict` this is.

        Raises:
            TypeError: If a value is missing, or there is one too many.
        """
        low, high = state["clip"]
        return cls(**{**state, "clip": (low, high)})


@dataclass(frozen=True)
class FittedRatio:
    """A density ratio with what its fit found out; all losses are of prompts that a classifier has not seen.

    Args:
        ratio: Gives the weight of any prompt.
        log_ratios_P: Log density ratio of each prompt of the fit, in nats; zeros if nothing could be fitted.
        log_loss: Held-out log loss, in nats per row.
        constant_log_loss: That of the share of thumbs-up among the rows of the other folds.
        evidence: The gain over the constant in standard errors, prompts taken as wholes.
        strengths: The ``C`` of each fold.
        why_not: What was expected and what was found, if no classifier could be fitted; else empty.
    """

    ratio: DensityRatio
    log_ratios_P: Tensor
    log_loss: float = math.nan
    constant_log_loss: float = math.nan
    evidence: float = 0.0
    strengths: tuple[float, ...] = ()
    why_not: str = ""


def clipped_ratios(log_ratios_P: Tensor, clip: tuple[float, float]) -> Tensor:
    """Density ratios within bounds; the logarithm is clipped, as its exponential could overflow.

    Args:
        log_ratios_P: In nats.
        clip: Least and largest ratio.

    Returns:
        Shape ``(P,)``, float64; float32 where there is none.
    """
    exact = torch.float32 if log_ratios_P.device.type == "mps" else torch.float64
    return log_ratios_P.to(exact).clamp(math.log(clip[0]), math.log(clip[1])).exp().clamp(*clip)


def centre_and_scale(features_PH: _Array) -> tuple[_Array, _Array]:
    """Mean and standard deviation of each feature; 1 for the deviation where it is rounding.

    Example:
        >>> centre_and_scale(np.array([[1.0, 0.1], [5.0, 0.1]]))[1]
        array([2., 1.])
    """
    deviation_H = features_PH.std(axis=0)
    return features_PH.mean(axis=0), np.where(_varies(features_PH, deviation_H), deviation_H, 1.0)


def fit_density_ratio(
    features_PH: Tensor,
    num_up_P: _Array,
    num_down_P: _Array,
    folds_P: _Array,
    *,
    clip: tuple[float, float] = DEFAULT_CLIP,
    seed: int = 0,
) -> FittedRatio:
    """Fits a classifier of prompts for each fold on the other folds, and tests it on the fold.

    The strength of the penalty is chosen by cross-validation within these other folds, so nothing that a prompt's ratio
    is made of knows its thumbs, nor those of its fold. (The one number that scales all weights to a mean of 1 does.)

    Args:
        features_PH: Features of distinct prompts, floating, at most some 20,000 prompts.
        num_up_P: Thumbs-up rows of each prompt; float64, may be fractions.
        num_down_P: Thumbs-down rows of each prompt.
        folds_P: Fold of each prompt, 0 to 4; int64.
        clip: Least and largest ratio.
        seed: Of the search for principal axes, 256 of which stand for the features where there are more.

    Returns:
        The ratio; the same to the bit for the same input on one machine.

    Raises:
        ConfigError: If the bounds of ``clip`` do not have 1 between them.
    """
    CLIP.check("model.importance_clip", clip)
    prompts = _Prompts(
        features_PH.double().cpu().numpy(),
        np.asarray(num_up_P, dtype=np.float64),
        np.asarray(num_down_P, dtype=np.float64),
        np.asarray(folds_P),
    )
    if why_not := too_few(prompts.up, prompts.down, prompts.folds) or _unusable(prompts.features):
        num_prompts, num_features = features_PH.shape
        nothing = torch.zeros(num_features, dtype=torch.float64)
        ratio = DensityRatio(nothing, nothing + 1, nothing.repeat(K, 1), torch.zeros(K, dtype=torch.float64), clip=clip)
        return FittedRatio(ratio, torch.zeros(num_prompts, dtype=torch.float64), why_not=why_not)
    mean_H, scale_H = centre_and_scale(prompts.features)
    features_PD = ((prompts.features - mean_H) / scale_H).astype(np.float32)
    if (axes_DH := _principal_axes(features_PD, seed)) is not None:
        features_PD = features_PD @ axes_DH.T
    rows = _Rows.of(prompts, features_PD)
    # Threads of BLAS wait for each other longer than such small products take, and their number shows in the bits.
    with threadpool_limits(1):
        strengths = _chosen_strengths(rows)
        classifiers = [rows.fit(_classifier(), strength, (fold,)) for fold, strength in enumerate(strengths)]
    base_K = np.array([rows.log_odds((fold,)) for fold in range(K)])
    coefficients_KD = np.concatenate([classifier.coef_ for classifier in classifiers]).astype(np.float64)
    ratio = DensityRatio(
        torch.from_numpy(mean_H),
        torch.from_numpy(scale_H),
        torch.from_numpy(coefficients_KD if axes_DH is None else coefficients_KD @ axes_DH),
        torch.from_numpy(np.concatenate([classifier.intercept_ for classifier in classifiers]) - base_K),
        clip=clip,
    )
    log_ratios_P = ratio.log_ratios(features_PH, torch.from_numpy(prompts.folds))
    return replace(_tested(ratio, log_ratios_P, base_K, prompts), strengths=strengths)


@dataclass(frozen=True)
class _Prompts:
    features: _Array
    up: _Array
    down: _Array
    folds: _Array


@dataclass(frozen=True)
class _Rows:
    """What a classifier is trained on: each prompt at most twice, once for each thumb, with its number of rows."""

    features: _Array
    up: _Array
    weights: _Array
    folds: _Array

    @classmethod
    def of(cls, prompts: _Prompts, features: _Array) -> _Rows:
        chosen = np.concatenate([np.flatnonzero(prompts.up), np.flatnonzero(prompts.down)])
        up = np.arange(len(chosen)) < np.count_nonzero(prompts.up)
        weights = np.where(up, prompts.up[chosen], prompts.down[chosen])
        return cls(features[chosen], up, weights, prompts.folds[chosen])

    def fit(self, classifier: Any, strength: float, held_out: tuple[int, ...]) -> Any:
        train = ~np.isin(self.folds, held_out)
        return classifier.set_params(C=strength).fit(self.features[train], self.up[train], self.weights[train])

    def log_odds(self, held_out: tuple[int, ...]) -> float:
        train = ~np.isin(self.folds, held_out)
        return math.log(self.weights[train & self.up].sum() / self.weights[train & ~self.up].sum())

    def loss(self, classifier: Any, fold: int) -> float:
        """Summed over the rows of a fold, in nats."""
        if not (tested := self.folds == fold).any():
            return 0.0
        logits = classifier.decision_function(self.features[tested])
        return float(self.weights[tested] @ np.logaddexp(0, np.where(self.up[tested], -logits, logits)))


def too_few(num_up_P: _Array, num_down_P: _Array, folds_P: _Array) -> str:
    """What was expected of the numbers of rows and prompts and what was found instead; empty if they are enough.

    Args:
        num_up_P: Thumbs-up rows of each prompt; float64.
        num_down_P: Thumbs-down rows of each prompt.
        folds_P: Fold of each prompt; int64.
    """
    up, down = num_up_P.sum(), num_down_P.sum()
    with_up, with_down = (np.bincount(folds_P[of > 0], minlength=K) for of in (num_up_P, num_down_P))
    if min(up, down) < _FEWEST_ROWS:
        return f"expected at least {_FEWEST_ROWS} rows of either class, found {up:g} up and {down:g} down"
    if len(folds_P) < _FEWEST_PROMPTS:
        return f"expected at least {_FEWEST_PROMPTS} distinct prompts, found {len(folds_P)}"
    if min(with_up.sum(), with_down.sum()) < _FEWEST_OF_CLASS:
        return (
            f"expected at least {_FEWEST_OF_CLASS} distinct prompts with rows of either class, "
            f"found {with_up.sum()} with thumbs up and {with_down.sum()} with thumbs down"
        )
    # Classifiers are trained on all folds but two, to choose the strength of the penalty for one of the two.
    if (num_folds := min(np.count_nonzero(with_up), np.count_nonzero(with_down))) < 3:
        return f"expected prompts of either class in at least 3 of {K} folds, found those of one in {num_folds}"
    return ""


def _unusable(features_PH: _Array) -> str:
    """What is wrong with features, if anything."""
    if unusable := int((~np.isfinite(features_PH).all(axis=1)).sum()):
        return f"expected finite features of prompts, found others in {unusable} of {len(features_PH)} prompts"
    if not _varies(features_PH, features_PH.std(axis=0)).any():
        return "expected features that differ from prompt to prompt, found none"
    return ""


def _varies(features_PH: _Array, deviation_H: _Array) -> _Array:
    """Whether a feature varies by more than rounding."""
    varies: _Array = deviation_H > 1e-6 * np.abs(features_PH).max(axis=0)
    return varies


def _principal_axes(features_PH: _Array, seed: int) -> _Array | None:
    """The axes ``(D, H)`` along which standardised features vary most, where there are too many features."""
    if features_PH.shape[1] <= _MOST_AXES:
        return None
    from sklearn.decomposition import PCA

    pca = PCA(min(_MOST_AXES, len(features_PH)), random_state=seed)
    axes_DH: _Array = pca.fit(features_PH).components_
    return axes_DH


def _classifier() -> Any:
    from sklearn.linear_model import LogisticRegression

    # The quickest of scikit-learn's solvers for some hundred features: two steps from the last strength's answer.
    return LogisticRegression(solver="newton-cholesky", warm_start=True)


def _chosen_strengths(rows: _Rows) -> tuple[float, ...]:
    """For each fold the ``C`` of least loss on the other four folds, each held out in turn."""
    losses_KC = np.zeros((K, len(_STRENGTHS)))
    for pair in _PAIRS:
        classifier = _classifier()
        for step, strength in enumerate(_STRENGTHS):
            rows.fit(classifier, strength, pair)
            # It has seen neither fold, so it serves both.
            for fold, other in (pair, pair[::-1]):
                losses_KC[fold, step] += rows.loss(classifier, other)
    return tuple(_STRENGTHS[best] for best in losses_KC.argmin(axis=1))


def _tested(ratio: DensityRatio, log_ratios_P: Tensor, base_K: _Array, prompts: _Prompts) -> FittedRatio:
    base_P = base_K[prompts.folds]
    losses_P, constant_P = (
        prompts.up * np.logaddexp(0, -logits) + prompts.down * np.logaddexp(0, logits)
        for logits in (base_P + log_ratios_P.double().cpu().numpy(), base_P)
    )
    gains_P = constant_P - losses_P
    error = math.sqrt(len(gains_P)) * float(gains_P.std(ddof=1))
    evidence = float(gains_P.sum()) / error if error else 0.0
    ratios_P = clipped_ratios(log_ratios_P, ratio.clip).cpu().numpy()
    normaliser = float(np.average(ratios_P, weights=prompts.down))
    ratio = replace(ratio, normaliser=normaliser, has_evidence=evidence > ENOUGH_EVIDENCE)
    log_loss, constant = (float(of.sum() / (prompts.up + prompts.down).sum()) for of in (losses_P, constant_P))
    return FittedRatio(ratio, log_ratios_P, log_loss, constant, evidence)
