"""The known reward of the demonstration: how friendly a text sounds, by the VADER lexicon."""

from __future__ import annotations

from functools import cache
from typing import Any

from bco_lightning.errors import ConfigError


def tone(text: str) -> float:
    """How friendly an English text sounds, from -1 (hostile) to 1 (warm): VADER's compound score.

    Source:
        Hutto and Gilbert 2014, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text".
    """
    return float(_analyzer().polarity_scores(text)["compound"])


@cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        problem = "expected the package vaderSentiment, found none."
        raise ConfigError("known reward 'tone'", problem, 'pip install "bco-lightning[demo]"') from error
    return SentimentIntensityAnalyzer()
