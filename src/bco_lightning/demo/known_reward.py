"""The known reward of the demonstration: the tone of a text by the VADER lexicon."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from bco_lightning.errors import ConfigError


def tone(text: str) -> float:
    """Scores how friendly a text sounds, from -1 (hostile) to 1 (warm).

    Args:
        text: Any English text.

    Returns:
        VADER's compound score.

    Raises:
        ConfigError: If ``vaderSentiment`` is not installed.

    Source:
        Hutto and Gilbert 2014, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text".
    """
    return float(_analyzer().polarity_scores(text)["compound"])


@lru_cache(maxsize=1)
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ConfigError(
            "known reward 'tone'",
            "expected the package vaderSentiment, found none.",
            'pip install "bco-lightning[demo]"',
        ) from error
    return SentimentIntensityAnalyzer()


KNOWN_REWARDS: dict[str, Callable[[str], float]] = {"tone": tone}
