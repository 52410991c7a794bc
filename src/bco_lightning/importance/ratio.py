"""The density ratio of prompts: how much likelier a prompt is among thumbs-up than among thumbs-down rows.

Shape legend: ``P`` distinct prompts, ``R`` prompts by class (twice if there are rows of both), ``H`` features, ``D``
principal axes, ``K`` folds.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from bco_lightning.options import DEFAULT_CLIP

K = 5  # folds
# Standard errors. 1,129 data sets were simulated whose thumbs do not depend on the prompt: 300 prompts, 1 to 32
# features; 10 % thumbs-up; one prompt with 50 rows, also all alike; heavy tails; 60 prompts; 150 with 100 features.
# The median was about -1.3, one was above 2 (2.18), none above 2.5: false alarms at most 0.3 %, with 95 % confidence.
# Of 10 to 15 prompts 3 of 518 data sets were above 3: so few prompts are refused.
ENOUGH_EVIDENCE = 3.0

_STRENGTHS = tuple(10 ** (step / 2) for step in range(-10, 1))
_MOST_AXES = 256
_FEWEST_ROWS, _FEWEST_PROMPTS, _FEWEST_OF_CLASS = 20, 50, 5  # the last: distinct prompts with rows of a class
_CHUNK = 1024  # prompts whose products are in memory at once
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class DensityRatio:
    r"""Gives a prompt the weight :math:`w(x) = p(x \mid up) / p(x \mid down)`, clipped and scaled to a mean of 1.

    One linear classifier for each fold; a prompt belongs to the fold whose classifier has not seen it.

    Args:
        mean_H: Centre of each feature, float64.
        coefficients_KH: Of centred features, one row a fold; float64.
        intercepts_K: Less the log odds of the training rows, so that a sum is a log density ratio; float64.
        normaliser: Mean of the clipped ratio over thumbs-down rows.
        clip: Least and largest ratio.
        has_evidence: Whether held-out prompts were told apart; where not, every weight is exactly 1.

    Source:
        arXiv:2404.04656v1, "Underlying distribution matching".
    """

    mean_H: Tensor
    coefficients_KH: Tensor
    intercepts_K: Tensor
    normaliser: float = 1.0
    clip: tuple[float, float] = DEFAULT_CLIP
    has_evidence: bool = False

    def log_ratios(self, features_PH: Tensor, keys_P: Tensor) -> Tensor:
        """Log density ratios in nats, before clipping.

        Args:
            features_PH: Features of prompts, any floating dtype, on any device.
            keys_P: Key of each prompt, of which its fold is the remainder; int64.

        Returns:
            Shape ``(P,)``, float32, or float64 where the features are; on their device.
        """
        dtype, device = torch.promote_types(features_PH.dtype, torch.float32), features_PH.device
        mean_H, coefficients_KH, intercepts_K = (
            values.to(dtype).to(device) for values in (self.mean_H, self.coefficients_KH, self.intercepts_K)
        )
        folds_P = keys_P.to(device).remainder(K)
        # Products and a sum: a matrix product would be rounded to bfloat16 or TensorFloat-32 where a run asks for them.
        chunks = [
            ((some.to(dtype) - mean_H) * coefficients_KH[folds]).sum(dim=1) + intercepts_K[folds]
            for some, folds in zip(features_PH.split(_CHUNK), folds_P.split(_CHUNK), strict=True)
        ]
        return torch.cat(chunks)

    def weights(self, log_ratios_P: Tensor) -> Tensor:
        """Weights of prompts' thumbs-down rows: float32, exactly ones without evidence; takes :meth:`log_ratios`."""
        if not self.has_evidence:
            return torch.ones_like(log_ratios_P, dtype=torch.float32)
        return (clipped_ratios(log_ratios_P, self.clip) / self.normaliser).float()


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
    log_loss: float | None = None
    constant_log_loss: float | None = None
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


def fit_density_ratio(
    features_PH: Tensor,
    num_up_P: Array,
    num_down_P: Array,
    keys_P: Array,
    *,
    clip: tuple[float, float] = DEFAULT_CLIP,
    seed: int = 0,
) -> FittedRatio:
    """Fits a classifier of prompts for each fold on the other folds, and tests it on the fold.

    The strength of the penalty is chosen by cross-validation within these other folds, so nothing that a prompt's ratio
    is made of knows its thumbs, nor those of its fold. (The one number that scales all weights to a mean of 1 does.)

    Args:
        features_PH: Features of distinct prompts, floating, at most some 20,000 prompts.
        num_up_P: Thumbs-up rows of each prompt; may be fractions.
        num_down_P: Thumbs-down rows of each prompt.
        keys_P: Key of each prompt, of which its fold is the remainder; int64.
        clip: Least and largest ratio.
        seed: Of the search for principal axes, 256 of which stand for the features where there are more.

    Returns:
        The ratio; the same to the bit for the same input on one machine.
    """
    up_P, down_P = (np.asarray(of, dtype=np.float64) for of in (num_up_P, num_down_P))
    folds_P = np.asarray(keys_P, dtype=np.int64) % K
    if why_not := too_few(up_P, down_P, keys_P) or _unusable(features_PH):
        num_prompts, num_features = features_PH.shape
        nothing = torch.zeros(K, num_features, dtype=torch.float64)
        ratio = DensityRatio(nothing[0], nothing, torch.zeros(K, dtype=torch.float64), clip=clip)
        return FittedRatio(ratio, torch.zeros(num_prompts, dtype=torch.float64), why_not=why_not)
    # Threads of BLAS wait for each other longer than such small products take, and their number shows in the bits.
    with threadpool_limits(1):
        features = features_PH.float().cpu().numpy()
        mean_H, axes_DH = _standardised_axes(features, seed)
        features_PD = (features - mean_H.astype(np.float32)) @ axes_DH.T.astype(np.float32)
        chosen_R = np.concatenate([np.flatnonzero(up_P), np.flatnonzero(down_P)])
        is_up_R = np.arange(len(chosen_R)) < np.count_nonzero(up_P)
        rows_R = np.where(is_up_R, up_P[chosen_R], down_P[chosen_R])
        classifiers, base_K = [], np.zeros(K)
        for fold in range(K):
            seen = folds_P[chosen_R] != fold
            of, is_up, rows = chosen_R[seen], is_up_R[seen], rows_R[seen]
            base_K[fold] = math.log(rows[is_up].sum() / rows[~is_up].sum())
            classifiers.append(_fitted(features_PD[of], is_up, rows, folds_P[of]))
    coefficients_KD = np.concatenate([classifier.coef_ for classifier in classifiers]).astype(np.float64)
    ratio = DensityRatio(
        torch.from_numpy(mean_H),
        torch.from_numpy(coefficients_KD @ axes_DH),
        torch.from_numpy(np.concatenate([classifier.intercept_ for classifier in classifiers]) - base_K),
        clip=clip,
    )
    log_ratios_P = ratio.log_ratios(features_PH, torch.from_numpy(folds_P))
    strengths = tuple(float(np.ravel(classifier.C_)[0]) for classifier in classifiers)
    return replace(_tested(ratio, log_ratios_P, base_K[folds_P], up_P, down_P), strengths=strengths)


def too_few(num_up_P: Array, num_down_P: Array, keys_P: Array) -> str:
    """What was expected of the numbers of rows and prompts and what was found instead; empty if they are enough.

    Args:
        num_up_P: Thumbs-up rows of each prompt; float64.
        num_down_P: Thumbs-down rows of each prompt.
        keys_P: Key of each prompt; int64.
    """
    up, down = num_up_P.sum(), num_down_P.sum()
    with_up, with_down = (np.bincount(keys_P[of > 0] % K, minlength=K) for of in (num_up_P, num_down_P))
    if min(up, down) < _FEWEST_ROWS:
        return f"expected at least {_FEWEST_ROWS} rows of either class, found {up:g} up and {down:g} down"
    if len(keys_P) < _FEWEST_PROMPTS:
        return f"expected at least {_FEWEST_PROMPTS} distinct prompts, found {len(keys_P)}"
    if min(with_up.sum(), with_down.sum()) < _FEWEST_OF_CLASS:
        return (
            f"expected at least {_FEWEST_OF_CLASS} distinct prompts with rows of either class, "
            f"found {with_up.sum()} with thumbs up and {with_down.sum()} with thumbs down"
        )
    # Classifiers are trained on all folds but two, to choose the strength of the penalty for one of the two.
    if (num_folds := min(np.count_nonzero(with_up), np.count_nonzero(with_down))) < 3:
        return f"expected prompts of either class in at least 3 of {K} folds, found those of one in {num_folds}"
    return ""


def _unusable(features_PH: Tensor) -> str:
    """What is wrong with features, if anything."""
    if unusable := int((~features_PH.isfinite().all(dim=1)).sum()):
        return f"expected finite features of prompts, found others in {unusable} of {len(features_PH)} prompts"
    if (features_PH == features_PH[0]).all():
        return "expected features that differ from prompt to prompt, found none"
    return ""


def _standardised_axes(features_PH: Array, seed: int) -> tuple[Array, Array]:
    """Centres ``(H,)``, and axes ``(D, H)`` that standardise: those of most variance where there are too many."""
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler()
    standardised = scaler.fit_transform(features_PH)
    num_prompts, num_features = features_PH.shape
    axes_DH = np.eye(num_features)
    if num_features > _MOST_AXES:
        axes_DH = PCA(min(_MOST_AXES, num_prompts), random_state=seed).fit(standardised).components_.astype(np.float64)
    return scaler.mean_.astype(np.float64), axes_DH / scaler.scale_


def _fitted(features_RD: Array, is_up_R: Array, rows_R: Array, folds_R: Array) -> Any:
    """A classifier whose penalty is chosen on folds that it was not trained on."""
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.model_selection import LeaveOneGroupOut

    classifier = LogisticRegressionCV(
        Cs=_STRENGTHS,
        cv=list(LeaveOneGroupOut().split(features_RD, groups=folds_R)),
        scoring=_log_likelihood,
        solver="newton-cholesky",  # the quickest of scikit-learn's for some hundred features
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of attributes that are not looked at
        return classifier.fit(features_RD, is_up_R, rows_R)


def _log_likelihood(classifier: Any, features_RD: Array, is_up_R: Array, sample_weight: Array) -> float:
    """Mean over rows, in nats; scikit-learn's own cannot do with a fold of one class."""
    logits_R = classifier.decision_function(features_RD)
    losses_R = np.logaddexp(0, np.where(is_up_R, -logits_R, logits_R))
    return -float(np.average(losses_R, weights=sample_weight))


def _tested(ratio: DensityRatio, log_ratios_P: Tensor, base_P: Array, up_P: Array, down_P: Array) -> FittedRatio:
    losses_P, constant_P = (
        up_P * np.logaddexp(0, -logits_P) + down_P * np.logaddexp(0, logits_P)
        for logits_P in (base_P + log_ratios_P.double().cpu().numpy(), base_P)
    )
    gains_P = constant_P - losses_P
    error = math.sqrt(len(gains_P)) * float(gains_P.std(ddof=1))
    evidence = float(gains_P.sum()) / error if error else 0.0
    normaliser = float(np.average(clipped_ratios(log_ratios_P, ratio.clip).cpu().numpy(), weights=down_P))
    ratio = replace(ratio, normaliser=normaliser, has_evidence=evidence > ENOUGH_EVIDENCE)
    num_rows = float(up_P.sum() + down_P.sum())
    return FittedRatio(
        ratio, log_ratios_P, float(losses_P.sum()) / num_rows, float(constant_P.sum()) / num_rows, evidence
    )
