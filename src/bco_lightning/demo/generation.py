"""Sampled completions, without touching the global random state, and their known reward: tone by the VADER lexicon."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bco_lightning.errors import ConfigError
from bco_lightning.identity import drawing_from


class SampledCompletion(NamedTuple):
    """A sampled answer without special tokens, its tokens, and whether it ended, with an EOS token, by itself."""

    text: str
    token_ids: list[int]
    finished: bool


@torch.no_grad()
def sample_completions(
    model: PreTrainedModel, tokenizer: Any, prompts: list[str], *, max_new_tokens: int, seed: int
) -> list[SampledCompletion]:
    """One completion for each rendered prompt of a batch, from the whole distribution (no top-k, no top-p)."""
    encoded = tokenizer(prompts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()  # under gradient checkpointing a model in training mode keeps no cache to generate with
    with drawing_from(seed, device):
        output_ids: Tensor = model.generate(
            input_ids=encoded["input_ids"].to(device),
            attention_mask=encoded["attention_mask"].to(device),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    model.train(was_training)
    completions = []
    for token_ids in output_ids[:, encoded["input_ids"].shape[1] :].tolist():
        finished = tokenizer.eos_token_id in token_ids
        kept = token_ids[: token_ids.index(tokenizer.eos_token_id) + 1] if finished else token_ids
        text = tokenizer.decode(kept, skip_special_tokens=True)
        completions.append(SampledCompletion(text.strip(), kept, finished))
    return completions


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
        raise ConfigError(
            "known reward 'tone'",
            "expected the package vaderSentiment, found none.",
            'pip install "bco-lightning[demo]"',
        ) from error
    return SentimentIntensityAnalyzer()
