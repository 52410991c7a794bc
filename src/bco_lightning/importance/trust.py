"""Computes the trust report: how well prompts tell the classes apart, and whether the weights make up for it."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bco_lightning.importance.density_ratio import FittedRatio, centre_and_scale, clipped_ratios
from bco_lightning.importance.trust_report import CalibrationBin, PromptCluster, TrustReport
from bco_lightning.metrics import Auc, clustered_auc

_BINS, _CLUSTERS, _PROMPTS_PER_CLUSTER, _EXAMPLES = 10, 8, 10, 2
_EDGES = np.geomspace(0.05, 20.0, 21)
_Array = np.ndarray[Any, Any]


def make_report(
    fitted: FittedRatio,
    features_PH: Tensor,
    num_up_P: _Array,
    num_down_P: _Array,
    folds_P: _Array,
    first_rows_P: _Array,
    *,
    encoder: str,
    seed: int = 0,
) -> TrustReport:
    """Judges a fit on the prompts that it was made on, each by the classifier that has not seen it.

    Args:
        fitted: What :func:`fit_density_ratio` gave for the next four.
        features_PH: Features of distinct prompts, floating.
        num_up_P: Thumbs-up rows of each prompt; float64.
        num_down_P: Thumbs-down rows of each prompt.
        folds_P: Fold of each prompt; int64.
        first_rows_P: A row of the data set that stands for each prompt, for examples; int64.
        encoder: What people call the source of the features.
        seed: Of the clusters' first centres.

    Returns:
        The report; how many prompts are truncated, how many there are beside these, and seconds are left to the caller.
    """
    up, down = np.asarray(num_up_P, dtype=np.float64), np.asarray(num_down_P, dtype=np.float64)
    counts: dict[str, Any] = {
        "encoder": encoder,
        "num_up": float(up.sum()),
        "num_down": float(down.sum()),
        "num_prompts": len(up),
        "num_fitted": 0 if fitted.why_not else len(up),
    }
    if fitted.why_not:
        return TrustReport(**counts, why_not=fitted.why_not)
    weights = fitted.ratio.weights(fitted.log_ratios_P).double().cpu().numpy()
    scores = fitted.log_ratios_P.double().cpu().numpy()
    has_evidence = fitted.ratio.has_evidence
    of_weights: dict[str, Any] = weight_summary(scores, down, fitted.ratio.clip) if has_evidence else {}
    return TrustReport(
        **counts,
        has_evidence=has_evidence,
        evidence=fitted.evidence,
        auc=weighted_auc(scores, up, down, folds_P),
        log_loss=fitted.log_loss,
        constant_log_loss=fitted.constant_log_loss,
        strengths=fitted.strengths,
        calibration=calibration_bins(scores + math.log(up.sum() / down.sum()), up, down),
        histogram=weight_histogram(weights, down),
        **of_weights,
        matched_auc=weighted_auc(scores, up, down * weights, folds_P),
        clusters=prompt_clusters(features_PH, up, down, down * weights, first_rows_P, seed=seed),
    )


def weighted_auc(scores_P: _Array, up_P: _Array, down_P: _Array, folds_P: _Array) -> Auc:
    """Probability that the prompt of a thumbs-up row scores higher than that of a thumbs-down row of its fold.

    Scores of different classifiers are not compared: where none of them knows anything, what is left of their
    intercepts would say the opposite of each fold's share of thumbs-up.

    Args:
        scores_P: A number for each prompt.
        up_P: Its thumbs-up rows.
        down_P: Its thumbs-down rows, or the sum of their weights.
        folds_P: Its fold.

    Returns:
        The mean of the folds' areas, with an interval that takes prompts as wholes.
    """
    areas = []
    for fold in np.unique(folds_P):
        prompts = np.concatenate([np.flatnonzero((of > 0) & (folds_P == fold)) for of in (up_P, down_P)])
        positive = np.arange(len(prompts)) < np.count_nonzero(up_P[folds_P == fold])
        if 0 < positive.sum() < len(positive):
            weights = np.where(positive, up_P[prompts], down_P[prompts])
            areas.append(clustered_auc(scores_P[prompts].astype(np.float64), positive, prompts, weights))
    values, variances = zip(*areas, strict=True)
    return Auc.with_variance(float(np.mean(values)), float(np.sum(variances)) / len(areas) ** 2)


def calibration_bins(logits_P: _Array, up_P: _Array, down_P: _Array) -> tuple[CalibrationBin, ...]:
    """Predicted and observed shares of thumbs-up in tenths of the rows, from the lowest prediction to the highest.

    Args:
        logits_P: Predicted log odds of a thumbs-up for each prompt.
        up_P: Its thumbs-up rows.
        down_P: Its thumbs-down rows.

    Returns:
        At most ten bins, fewer where prompts with many rows fill several; the rows of a prompt stay together.
    """
    order = np.argsort(logits_P, kind="stable")
    rows = (up_P + down_P)[order]
    middles = (np.cumsum(rows) - rows / 2) / rows.sum()
    bins = np.minimum((middles * _BINS).astype(int), _BINS - 1)
    predicted = np.exp(-np.logaddexp(0, -logits_P[order]))
    count, expected, observed = (
        np.bincount(bins, weights=values, minlength=_BINS) for values in (rows, rows * predicted, up_P[order])
    )
    return tuple(
        CalibrationBin(float(count[of]), float(expected[of] / count[of]), float(observed[of] / count[of]))
        for of in np.flatnonzero(count)
    )


def weight_histogram(weights_P: _Array, down_P: _Array) -> tuple[tuple[float, float, float], ...]:
    """Shares of the thumbs-down rows by weight, in 20 steps of equal ratio from 0.05 to 20; the ends take the rest.

    Args:
        weights_P: Weight of each prompt's thumbs-down rows, of mean 1 over them.
        down_P: Its thumbs-down rows.

    Returns:
        Lower edge, upper edge and share of each step.
    """
    steps = np.clip(np.searchsorted(_EDGES, weights_P, side="right") - 1, 0, len(_EDGES) - 2)
    shares = np.bincount(steps, weights=down_P, minlength=len(_EDGES) - 1) / down_P.sum()
    return tuple(zip(_EDGES[:-1].tolist(), _EDGES[1:].tolist(), shares.tolist(), strict=True))


def weight_summary(log_ratios_P: _Array, down_P: _Array, clip: tuple[float, float]) -> dict[str, float]:
    """What weights do to the thumbs-down rows, in the words of :class:`TrustReport`.

    Args:
        log_ratios_P: Log density ratio of each prompt, in nats.
        down_P: Its thumbs-down rows.
        clip: Least and largest ratio.

    Returns:
        ``effective_share``, ``mass``, ``at_low``, ``at_high`` and ``mass_at_high``.
    """
    ratios = clipped_ratios(torch.from_numpy(log_ratios_P), clip).numpy()
    low, high = (log_ratios_P <= math.log(clip[0])), (log_ratios_P >= math.log(clip[1]))
    num_down, mass = down_P.sum(), down_P @ ratios
    return {
        "effective_share": float(mass**2 / (down_P @ ratios**2) / num_down),
        "mass": float(down_P @ np.exp(log_ratios_P) / num_down),
        "at_low": float(down_P @ low / num_down),
        "at_high": float(down_P @ high / num_down),
        "mass_at_high": float((down_P * ratios) @ high / mass),
    }


def prompt_clusters(
    features_PH: Tensor, up_P: _Array, down_P: _Array, weighted_P: _Array, first_rows_P: _Array, *, seed: int = 0
) -> tuple[PromptCluster, ...]:
    """Groups of prompts with similar features, those first that thumbs-up rows have most more often.

    Args:
        features_PH: Features of distinct prompts, floating and finite.
        up_P: Thumbs-up rows of each prompt.
        down_P: Its thumbs-down rows.
        weighted_P: The sum of their weights.
        first_rows_P: A row of the data set that stands for each prompt.
        seed: Of the first centres.

    Returns:
        At most eight, and one for each ten prompts.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    features = features_PH.double().cpu().numpy()
    mean, scale = centre_and_scale(features)
    standardised = ((features - mean) / scale).astype(np.float32)
    num_clusters = max(1, min(_CLUSTERS, len(features) // _PROMPTS_PER_CLUSTER))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # distinct prompts can have features in common
        means = KMeans(num_clusters, n_init=3, random_state=seed).fit(standardised)
    distances = ((standardised - means.cluster_centers_[means.labels_]) ** 2).sum(axis=1)
    clusters = []
    for number in np.unique(means.labels_):
        members = np.flatnonzero(means.labels_ == number)
        up, down, weighted = (float(of[members].sum() / of.sum()) for of in (up_P, down_P, weighted_P))
        nearest = members[np.argsort(distances[members], kind="stable")[:_EXAMPLES]]
        clusters.append(PromptCluster(len(members), up, down, weighted, tuple(first_rows_P[nearest].tolist())))
    return tuple(sorted(clusters, key=lambda cluster: cluster.share_down - cluster.share_up))
