"""How different the prompts of thumbs-up and of thumbs-down rows are, by a classifier that has not seen them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_curve
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline

from bco_lightning.metrics import Array, Auc, clustered_auc

MOST_ROWS = 20_000
_FEWEST_ROWS, _FEWEST_PROMPTS, _FOLDS = 20, 10, 5  # rows of either class; distinct prompts
_LONGEST_PROMPT = 4_000  # characters; of longer ones the first and the last half of so many count
_GRID = np.linspace(0, 1, 51)
COIN = math.log(2)  # log loss of a constant, with classes of equal weight


@dataclass(frozen=True)
class PromptShift:
    """How well prompts alone tell the classes apart: words and pairs of words, logistic regression."""

    num_rows: int
    num_prompts: int
    auc: Auc | None = None  # held out, as what follows; none where no classifier could be trained
    log_loss: float = math.nan  # in nats, classes weighted alike; a constant has log 2 = 0.693
    roc: tuple[float, ...] = ()  # share of thumbs-up rows found at false-alarm rates of 0, 0.02, ... 1
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
        known = "" if self.auc.is_even else ", nor ruled out"
        return f"No difference of the prompts was shown ({why}){known}, so importance weights are not advised."


def drawn_rows(num_rows: int, seed: int) -> Array:
    """Positions of the rows to look at, in order: all, or 20,000 at random of more."""
    return np.sort(np.random.default_rng(seed).choice(num_rows, min(num_rows, MOST_ROWS), replace=False))


def prompt_shift(prompts: Sequence[str], thumbs_up: Array, seed: int) -> PromptShift:
    """Trains and tests a classifier of prompts, a text for each row; a prompt is never on both sides."""
    half = _LONGEST_PROMPT // 2
    texts = np.array([t if len(t) <= 2 * half else f"{t[:half]} {t[-half:]}" for t in prompts], dtype=object)
    numbers = np.unique(texts, return_inverse=True)[1]
    num_rows, num_prompts = len(texts), int(numbers.max(initial=-1)) + 1
    num_up, num_down = int(thumbs_up.sum()), int((~thumbs_up).sum())
    unknown = partial(PromptShift, num_rows, num_prompts)
    if min(num_up, num_down) < _FEWEST_ROWS:
        expected = f"expected at least {_FEWEST_ROWS} rows of either class"
        return unknown(why_not=f"{expected}, found {num_up} up and {num_down} down")
    if num_prompts < _FEWEST_PROMPTS:
        return unknown(why_not=f"expected at least {_FEWEST_PROMPTS} distinct prompts, found {num_prompts}")
    words = HashingVectorizer(ngram_range=(1, 2), n_features=2**18, norm=None, alternate_sign=False).transform(texts)
    if not words.nnz:
        return unknown(why_not="the prompts have no words")
    areas, losses, curves = [], [], []
    for train, held_out in GroupKFold(_FOLDS, shuffle=True, random_state=seed).split(words, groups=numbers):
        up = thumbs_up[held_out]
        if len(np.unique(thumbs_up[train])) < 2 or len(np.unique(up)) < 2:
            return unknown(why_not="too few prompts have thumbs of the rarer class to hold some out")
        # Weights of the classes make the constant's log loss log 2, however rare one of them is.
        classifier = make_pipeline(
            TfidfTransformer(sublinear_tf=True), LogisticRegression(class_weight="balanced", max_iter=200)
        ).fit(words[train], thumbs_up[train])
        scores = classifier.decision_function(words[held_out])
        areas.append(clustered_auc(scores, up, numbers[held_out]))
        balanced = np.where(up, 1 / up.mean(), 1 / (~up).mean())
        losses.append(log_loss(up, classifier.predict_proba(words[held_out])[:, 1], sample_weight=balanced))
        curves.append(np.interp(_GRID, *roc_curve(up, scores)[:2]))
    roc = tuple(np.mean(curves, axis=0).tolist())
    # Scores of different classifiers are not compared with each other.
    return PromptShift(num_rows, num_prompts, Auc.mean_of(areas), float(np.mean(losses)), roc)
