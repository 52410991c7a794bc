"""The density ratio of prompts: how much likelier a prompt is among thumbs-up than among thumbs-down rows.

Shape legend: ``P`` distinct prompts, ``R`` prompts by class (twice if there are rows of both), ``H`` features, ``D``
principal axes, ``K`` folds, ``C`` strengths of the penalty.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from bco_lightning.importance.report import ENOUGH_EVIDENCE, TrustReport
from bco_lightning.metrics import Array, Auc, clustered_auc
from bco_lightning.options import DEFAULT_CLIP

K = 5  # folds
_STRENGTHS = tuple(10 ** (step / 2) for step in range(-10, 1))
_MOST_AXES = 256
_FEWEST_ROWS, _FEWEST_PROMPTS, _FEWEST_OF_CLASS = 20, 50, 5  # the last: distinct prompts with rows of a class
_CHUNK = 1024  # prompts whose products are in memory at once
_BINS, _EDGES = 10, np.geomspace(0.05, 20.0, 21)
Rows = tuple[Array, Array, Array, Array]  # features_RD, is_up_R, how many rows_R, folds_R


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
        """Log density ratios in nats, before clipping; at least float32; a key's remainder is the prompt's fold."""
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


class FittedRatio(NamedTuple):
    """A density ratio, the log density ratio of each prompt that it was fitted on, and what is known of it."""

    ratio: DensityRatio
    log_ratios_P: Tensor
    report: TrustReport


def clipped_ratios(log_ratios_P: Tensor, clip: tuple[float, float]) -> Tensor:
    """Density ratios within bounds, float64 where there is one; the logarithm is clipped, as exp could overflow."""
    exact = torch.float32 if log_ratios_P.device.type == "mps" else torch.float64
    return log_ratios_P.to(exact).clamp(math.log(clip[0]), math.log(clip[1])).exp().clamp(*clip)


def fit_density_ratio(
    features_PH: Tensor,
    num_up_P: Array,
    num_down_P: Array,
    keys_P: Array,
    *,
    clip: tuple[float, float] = DEFAULT_CLIP,
    encoder: str = "",
) -> FittedRatio:
    """Fits a classifier of prompts for each fold on the other folds, and tests it on the fold.

    The strength of the penalty is chosen by cross-validation within these other folds, so nothing that a prompt's ratio
    is made of knows its thumbs, nor those of its fold. (The one number that scales all weights to a mean of 1 does.)
    Prompts are distinct, at most some 20,000; their rows may be fractions; the remainder of a key is a prompt's fold.
    ``encoder`` is what people call the source of the features. The same input gives the same bits on one machine.
    """
    up_P, down_P = (np.asarray(of, dtype=np.float64) for of in (num_up_P, num_down_P))
    folds_P = np.asarray(keys_P, dtype=np.int64) % K
    report = TrustReport(encoder, float(up_P.sum()), float(down_P.sum()), len(up_P))
    if why_not := too_few(up_P, down_P, keys_P) or _unusable(features_PH):
        nothing = torch.zeros(K, features_PH.shape[1], dtype=torch.float64)
        ratio = DensityRatio(nothing[0].clone(), nothing, torch.zeros(K, dtype=torch.float64), clip=clip)
        return FittedRatio(ratio, torch.zeros(len(up_P), dtype=torch.float64), replace(report, why_not=why_not))
    # Threads of BLAS wait for each other longer than such small products take, and their number shows in the bits.
    with threadpool_limits(1):
        features = features_PH.float().cpu().numpy()
        mean_H, axes_DH = _standardised_axes(features)
        features_PD = (features - mean_H.astype(np.float32)) @ axes_DH.T.astype(np.float32)
        chosen_R = np.concatenate([np.flatnonzero(up_P), np.flatnonzero(down_P)])
        is_up_R = np.arange(len(chosen_R)) < np.count_nonzero(up_P)
        num_rows_R = np.where(is_up_R, up_P[chosen_R], down_P[chosen_R])
        rows = (features_PD[chosen_R], is_up_R, num_rows_R, folds_P[chosen_R])
        strengths = _chosen_strengths(rows)
        classifiers = [next(_classifiers(rows, (fold,), [strength])) for fold, strength in enumerate(strengths)]
    base_K = np.array([math.log(up_P[folds_P != fold].sum() / down_P[folds_P != fold].sum()) for fold in range(K)])
    coefficients_KD = np.concatenate([classifier.coef_ for classifier in classifiers]).astype(np.float64)
    ratio = DensityRatio(
        torch.from_numpy(mean_H),
        torch.from_numpy(coefficients_KD @ axes_DH),
        torch.from_numpy(np.concatenate([classifier.intercept_ for classifier in classifiers]) - base_K),
        clip=clip,
    )
    log_ratios_P = ratio.log_ratios(features_PH, torch.from_numpy(folds_P))
    report = replace(report, num_fitted=len(up_P), strengths=strengths)
    return _tested(FittedRatio(ratio, log_ratios_P, report), base_K, up_P, down_P, folds_P)


def too_few(num_up_P: Array, num_down_P: Array, keys_P: Array) -> str:
    """What was expected of the numbers of rows and prompts and what was found instead; empty if they are enough."""
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
    # Classifiers are trained on all folds but two, to choose the strength of the penalty for either.
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


def _standardised_axes(features_PH: Array) -> tuple[Array, Array]:
    """Centres ``(H,)``, and axes ``(D, H)`` that standardise: those of most variance where there are too many."""
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler()
    standardised = scaler.fit_transform(features_PH)
    num_prompts, num_features = features_PH.shape
    axes_DH = np.eye(num_features)
    if num_features > _MOST_AXES:
        axes_DH = PCA(min(_MOST_AXES, num_prompts), random_state=0).fit(standardised).components_.astype(np.float64)
    return scaler.mean_.astype(np.float64), axes_DH / scaler.scale_


def _classifiers(rows: Rows, held_out: tuple[int, ...], strengths: Sequence[float]) -> Iterator[Any]:
    """One of all folds but some for each strength, each beginning where the one before has ended."""
    from sklearn.linear_model import LogisticRegression

    *of_rows, folds_R = rows
    features, is_up, num_rows = (of[~np.isin(folds_R, held_out)] for of in of_rows)
    # The quickest of scikit-learn's solvers for some hundred features: two steps from the last strength's answer.
    classifier = LogisticRegression(solver="newton-cholesky", warm_start=True)
    for strength in strengths:
        yield classifier.set_params(C=strength).fit(features, is_up, num_rows)


def _chosen_strengths(rows: Rows) -> tuple[float, ...]:
    """For each fold the ``C`` of least loss on the other folds, each held out in turn."""
    losses_KC = np.zeros((K, len(_STRENGTHS)))
    for pair in combinations(range(K), 2):
        features, is_up, num_rows, folds = (of[np.isin(rows[-1], pair)] for of in rows)
        for step, classifier in enumerate(_classifiers(rows, pair, _STRENGTHS)):
            logits = classifier.decision_function(features)
            losses = num_rows * np.logaddexp(0, np.where(is_up, -logits, logits))
            # It has seen neither fold, so it serves both.
            losses_KC[pair[::-1], step] += np.bincount(folds, losses, K)[list(pair)]
    return tuple(_STRENGTHS[best] for best in losses_KC.argmin(axis=1))


def _tested(fitted: FittedRatio, base_K: Array, up_P: Array, down_P: Array, folds_P: Array) -> FittedRatio:
    """Judges a fit on the prompts that it was made on, each by the classifier that has not seen it."""
    ratio, log_ratios_P, report = fitted
    scores_P, base_P = log_ratios_P.double().cpu().numpy(), base_K[folds_P]
    losses_P, constant_P = (
        up_P * np.logaddexp(0, -logits_P) + down_P * np.logaddexp(0, logits_P)
        for logits_P in (base_P + scores_P, base_P)
    )
    gains_P = constant_P - losses_P
    error = math.sqrt(len(gains_P)) * float(gains_P.std(ddof=1))
    evidence = float(gains_P.sum()) / error if error else 0.0
    normaliser = float(np.average(clipped_ratios(log_ratios_P, ratio.clip).cpu().numpy(), weights=down_P))
    ratio = replace(ratio, normaliser=normaliser, has_evidence=evidence > ENOUGH_EVIDENCE)
    weights_P = ratio.weights(log_ratios_P).double().cpu().numpy()
    report = replace(
        report,
        has_evidence=ratio.has_evidence,
        evidence=evidence,
        auc=weighted_auc(scores_P, up_P, down_P, folds_P),
        log_loss=float(losses_P.sum()) / (report.num_up + report.num_down),
        constant_log_loss=float(constant_P.sum()) / (report.num_up + report.num_down),
        calibration=calibration_bins(scores_P + math.log(report.num_up / report.num_down), up_P, down_P),
        histogram=weight_histogram(weights_P, down_P),
        matched_auc=weighted_auc(scores_P, up_P, down_P * weights_P, folds_P),
        **(weight_summary(log_ratios_P, down_P, ratio.clip) if ratio.has_evidence else {}),
    )
    return FittedRatio(ratio, log_ratios_P, report)


def weighted_auc(scores_P: Array, up_P: Array, down_P: Array, folds_P: Array) -> Auc:
    """Probability that the prompt of a thumbs-up row scores higher than that of a thumbs-down row of its fold.

    The mean of the folds' areas; ``down_P`` may be sums of weights. Scores of different classifiers are not compared:
    where none of them knows anything, what is left of their intercepts would say the opposite of each fold's share of
    thumbs-up.
    """
    areas = []
    for fold in range(K):
        ups, downs = (np.flatnonzero((of > 0) & (folds_P == fold)) for of in (up_P, down_P))
        if len(ups) and len(downs):
            prompts, positive = np.concatenate([ups, downs]), np.arange(len(ups) + len(downs)) < len(ups)
            weights = np.where(positive, up_P[prompts], down_P[prompts])
            areas.append(clustered_auc(scores_P[prompts], positive, prompts, weights))
    return Auc.mean_of(areas)


def calibration_bins(logits_P: Array, up_P: Array, down_P: Array) -> tuple[tuple[float, float, float], ...]:
    """Rows, and predicted and observed shares of thumbs-up, in tenths of the rows from the lowest prediction on.

    Fewer than ten where prompts with many rows fill several; the rows of a prompt stay together.
    """
    order = np.argsort(logits_P, kind="stable")
    rows = (up_P + down_P)[order]
    bins = np.minimum(((np.cumsum(rows) - rows / 2) / rows.sum() * _BINS).astype(int), _BINS - 1)
    predicted = np.exp(-np.logaddexp(0, -logits_P[order]))
    count, expected, observed = (np.bincount(bins, of, _BINS) for of in (rows, rows * predicted, up_P[order]))
    filled = count > 0
    shares = ((of[filled] / count[filled]).tolist() for of in (expected, observed))
    return tuple(zip(count[filled].tolist(), *shares, strict=True))


def weight_histogram(weights_P: Array, down_P: Array) -> tuple[tuple[float, float, float], ...]:
    """Lower edge, upper edge and share of the thumbs-down rows, in 20 steps of equal ratio; the ends take the rest."""
    shares = np.histogram(np.clip(weights_P, _EDGES[0], _EDGES[-1]), _EDGES, weights=down_P)[0] / down_P.sum()
    return tuple(zip(_EDGES[:-1].tolist(), _EDGES[1:].tolist(), shares.tolist(), strict=True))


def weight_summary(log_ratios_P: Tensor, down_P: Array, clip: tuple[float, float]) -> dict[str, Any]:
    """What weights do to the thumbs-down rows of prompts, in the words of :class:`TrustReport`."""
    ratios_P, logs_P = clipped_ratios(log_ratios_P, clip).cpu().numpy(), log_ratios_P.double().cpu().numpy()
    high_P, num_down, mass = logs_P >= math.log(clip[1]), down_P.sum(), down_P @ ratios_P
    return {
        "effective_share": float(mass**2 / (down_P @ ratios_P**2) / num_down),
        "mass": float(down_P @ np.exp(np.minimum(logs_P, 99.0)) / num_down),  # larger ones would overflow
        "at_low": float(down_P @ (logs_P <= math.log(clip[0])) / num_down),
        "at_high": float(down_P @ high_P / num_down),
        "mass_at_high": float((down_P * ratios_P) @ high_P / mass),
    }
