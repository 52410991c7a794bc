"""How different the prompts of thumbs-up and of thumbs-down rows are, by a classifier that has not seen them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bco_lightning.metrics import Array, Auc, clustered_auc

MOST_ROWS = 20_000
_FEWEST_ROWS, _FEWEST_PROMPTS, _FOLDS = 20, 10, 5  # rows of either class; distinct prompts
_LONGEST_PROMPT = 4_000  # characters
_GRID = np.linspace(0, 1, 51)
COIN = math.log(2)  # log loss of a constant, with classes of equal weight


@dataclass(frozen=True)
class PromptShift:
    """How well prompts alone tell the classes apart: words and pairs of words, logistic regression.

    Args:
        num_rows: Rows that were looked at.
        num_prompts: Distinct prompts among them.
        auc: Held-out area under the ROC curve; ``None`` where no classifier could be trained.
        log_loss: Held-out log loss in nats, classes weighted alike; a constant has log 2 = 0.693.
        roc: Share of thumbs-up rows found at false-alarm rates of 0, 0.02, ... 1.
        why_not: Why there is no classifier.
    """

    num_rows: int
    num_prompts: int
    auc: Auc | None = None
    log_loss: float = math.nan
    roc: tuple[float, ...] = ()
    why_not: str = ""

    @property
    def is_shifted(self) -> bool:
        """Whether prompts tell the classes apart, by rank and by probability."""
        return self.auc is not None and self.auc.low > 0.5 and self.log_loss < COIN

    @property
    def verdict(self) -> str:
        """One sentence: whether importance weights are advised."""
        if self.auc is None:
            return f"Not known: {self.why_not}. Importance weights are not advised."
        if self.is_shifted:
            return (
                "Prompts of thumbs-up and thumbs-down rows differ. Importance weights are advised where the kind of "
                "prompt that gets thumbs-up is what matters: model.importance_weights: auto lets the thumbs-down rows "
                "stand for it, at the cost of what they teach about others."
            )
        if self.log_loss >= COIN:
            why = "the probabilities of the classifier are no better than a constant's"
        else:
            why = "the interval of the AUC includes 0.5"
        return f"No difference of the prompts was shown ({why}), so importance weights are not advised."


def drawn_rows(num_rows: int, seed: int) -> Array:
    """Positions of the rows to look at, in order: all, or 20,000 at random of more.

    Example:
        >>> drawn_rows(3, seed=0).tolist()
        [0, 1, 2]
    """
    if num_rows <= MOST_ROWS:
        return np.arange(num_rows)
    return np.sort(np.random.default_rng(seed).choice(num_rows, MOST_ROWS, replace=False))


def prompt_shift(prompts: Sequence[str], thumbs_up: Array, seed: int) -> PromptShift:
    """Trains and tests a classifier of prompts; a prompt is never on both sides.

    Args:
        prompts: The prompt of each row as text; of long ones the first and last 2,000 characters count.
        thumbs_up: The thumb of each row.
        seed: Seed of the folds.

    Returns:
        What came out.
    """
    texts, numbers = np.unique(np.array([_shortened(prompt) for prompt in prompts], dtype=object), return_inverse=True)
    num_up, num_down = int(thumbs_up.sum()), int((~thumbs_up).sum())
    if min(num_up, num_down) < _FEWEST_ROWS:
        why = f"expected at least {_FEWEST_ROWS} rows of either class, found {num_up} up and {num_down} down"
        return PromptShift(len(prompts), len(texts), why_not=why)
    if len(texts) < _FEWEST_PROMPTS:
        why = f"expected at least {_FEWEST_PROMPTS} distinct prompts, found {len(texts)}"
        return PromptShift(len(prompts), len(texts), why_not=why)
    return _tested(texts, numbers, thumbs_up, seed)


def _tested(texts: Array, numbers: Array, up: Array, seed: int) -> PromptShift:
    from sklearn.model_selection import GroupKFold

    words = _words(texts)
    if words is None:
        return PromptShift(len(up), len(texts), why_not="the prompts have no words")
    folds = []
    for train, held_out in GroupKFold(_FOLDS, shuffle=True, random_state=seed).split(up, groups=numbers):
        if len(np.unique(up[train])) < 2 or len(np.unique(up[held_out])) < 2:
            why = "too few prompts have thumbs of the rarer class to hold some out"
            return PromptShift(len(up), len(texts), why_not=why)
        scores = _scores(words, numbers, up, train, held_out)
        folds.append(_Fold(scores, up[held_out], numbers[held_out]))
    areas, variances = zip(*(clustered_auc(fold.scores, fold.up, fold.numbers) for fold in folds), strict=True)
    # Scores of different classifiers are not compared with each other.
    area = Auc.with_variance(float(np.mean(areas)), float(np.sum(variances)) / _FOLDS**2)
    return PromptShift(
        len(up),
        len(texts),
        area,
        log_loss=float(np.mean([fold.log_loss for fold in folds])),
        roc=tuple(float(share) for share in np.mean([fold.roc for fold in folds], axis=0)),
    )


@dataclass(frozen=True)
class _Fold:
    """Rows that a classifier has not seen, and the logits that it gives them."""

    scores: Array
    up: Array
    numbers: Array

    @property
    def log_loss(self) -> float:
        losses = np.logaddexp(0, np.where(self.up, -self.scores, self.scores))
        return float(losses[self.up].mean() + losses[~self.up].mean()) / 2

    @property
    def roc(self) -> Array:
        thresholds = np.unique(self.scores)[::-1]
        false_alarms, found = (_shares_at(np.sort(self.scores[rows]), thresholds) for rows in (~self.up, self.up))
        curve: Array = np.interp(_GRID, np.concatenate([[0], false_alarms]), np.concatenate([[0], found]))
        return curve


def _shares_at(ordered: Array, thresholds: Array) -> Array:
    return 1 - np.searchsorted(ordered, thresholds, "left") / len(ordered)


def _words(texts: Array) -> Any:
    """Counts of words and pairs of words in each distinct prompt, as a sparse matrix; nothing if there are no words."""
    from sklearn.feature_extraction.text import HashingVectorizer

    vectorizer = HashingVectorizer(ngram_range=(1, 2), n_features=2**18, norm=None, alternate_sign=False)
    counts = vectorizer.transform(texts)
    return counts if counts.nnz else None


def _scores(words: Any, numbers: Array, up: Array, train: Array, held_out: Array) -> Array:
    from sklearn.feature_extraction.text import TfidfTransformer
    from sklearn.linear_model import LogisticRegression

    weighting = TfidfTransformer(sublinear_tf=True).fit(words[np.unique(numbers[train])])
    # Weights of the classes make the constant's log loss log 2, however rare one of them is.
    classifier = LogisticRegression(class_weight="balanced", max_iter=200)
    classifier.fit(weighting.transform(words[numbers[train]]), up[train])
    scores: Any = classifier.decision_function(weighting.transform(words[numbers[held_out]]))
    return np.asarray(scores, dtype=np.float64)


def _shortened(prompt: str) -> str:
    half = _LONGEST_PROMPT // 2
    return prompt if len(prompt) <= _LONGEST_PROMPT else f"{prompt[:half]} {prompt[-half:]}"
