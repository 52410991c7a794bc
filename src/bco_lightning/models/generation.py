"""Completions sampled from a model, without touching the global random state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bco_lightning.data.messages import said_in
from bco_lightning.identity import drawing_from
from bco_lightning.models.layout import causal_lm_of, joined_images
from bco_lightning.parallel.sharding import is_sharded


class SampledCompletion(NamedTuple):
    """A sampled answer without special tokens, its tokens, and whether it ended, with an EOS token, by itself."""

    text: str
    token_ids: list[int]
    finished: bool


def held_out_prompts(dataset: Any, most: int | None) -> tuple[list[list[int]], list[str], list[Any]]:
    """So many different prompts of a table, in its order: tokens before the first with a loss, words, and images."""
    first: dict[str, int] = {}
    for number, prompt in enumerate(dataset["prompt"]):
        first.setdefault(prompt, number)
    rows = dataset[list(first.values())[:most]]
    pairs = zip(rows["input_ids"], rows["completion_mask"], strict=True)
    tokens = [list(ids[: list(mask).index(True)]) for ids, mask in pairs]
    return tokens, [said_in(prompt) for prompt in list(first)[:most]], rows.get("images", [None] * len(tokens))


@torch.no_grad()
def sample_completions(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    seed: int,
    images: Sequence[Mapping[str, Tensor]] = (),
) -> list[SampledCompletion]:
    """One completion for each prompt of a batch, with its ``images``, from the whole distribution (no top-k or top-p).

    Every process of a model that is cut up has to ask for the same.
    """
    width = max(map(len, prompts))
    device = next(model.parameters()).device
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    told = {name: each.to(device) for name, each in joined_images(causal_lm_of(model), images, ids).items()}
    with drawing_from(seed, device), evaluating(model):
        output_ids: Tensor = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            synced_gpus=is_sharded(model),
            **told,
        )
    completions = []
    for token_ids in output_ids[:, width:].tolist():
        finished = tokenizer.eos_token_id in token_ids
        kept = token_ids[: token_ids.index(tokenizer.eos_token_id) + 1] if finished else token_ids
        text = tokenizer.decode(kept, skip_special_tokens=True)
        completions.append(SampledCompletion(text.strip(), kept, finished))
    return completions


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Puts a model and its parts in evaluation mode, and each part back afterwards: without dropout, with a cache."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
