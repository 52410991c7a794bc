"""Completions sampled from a model, without touching the global random state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from bco_lightning.data.collate import images_of_prompt, prompt_of
from bco_lightning.data.messages import said_in
from bco_lightning.models.layout import causal_lm_of, joined_images
from bco_lightning.parallel.sharding import device_of, is_sharded


class SampledCompletion(NamedTuple):
    """A sampled answer without special tokens, its tokens, and whether it ended, with an end token, by itself."""

    text: str
    token_ids: list[int]
    finished: bool


def held_out_prompts(dataset: Any, most: int | None) -> tuple[list[list[int]], list[str], list[Any]]:
    """So many different prompts of a table, in its order: tokens before the first with a loss, words, and images."""
    first: dict[str, int] = {}
    for number, prompt in enumerate(dataset["prompt"]):
        first.setdefault(prompt, number)
    rows = list(dataset.select(list(first.values())[:most]))
    words = [said_in(prompt) for prompt in list(first)[:most]]
    return [list(prompt_of(row)) for row in rows], words, [images_of_prompt(row) for row in rows]


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
    """One completion for each prompt of a batch, with its ``images``, from the whole distribution.

    Nothing of the model's generation config has a say but its end tokens: a penalty or a top-k would make samples of
    another distribution than the one whose log-probs are compared. Every process of a model that is cut up has to ask
    for the same.
    """
    width, inner, pad = max(map(len, prompts)), causal_lm_of(model), tokenizer.pad_token_id
    ends, device = end_tokens(inner, tokenizer), device_of(model)
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    told = {name: each.to(device) for name, each in joined_images(inner, images, ids).items()}
    # MPS has no float64, and a GPU no sum of its own that is deterministic.
    place = torch.device("cpu") if device.type == "mps" or torch.are_deterministic_algorithms_enabled() else device
    generator, given = torch.Generator(place).manual_seed(seed), inner.generation_config

    def draw(_: Tensor, scores_BV: Tensor) -> Tensor:
        """Has one token of each row win; ``do_sample`` draws a number for each token of the vocabulary instead."""
        share_BV = scores_BV.to(place).softmax(-1, dtype=torch.float32).cumsum(-1, dtype=torch.float64)
        at_B1 = torch.rand(len(share_BV), 1, generator=generator, device=place, dtype=torch.float64)
        drawn_B1 = torch.searchsorted(share_BV, at_B1 * share_BV[:, -1:], right=True)
        return scores_BV.scatter(1, drawn_B1.to(device), torch.inf)

    # PyTorch copies the head's weight for each row where the states of last tokens are a view, in bfloat16 on a CPU.
    whole = inner.get_output_embeddings().register_forward_pre_hook(lambda _, states: (states[0].contiguous(),))
    inner.generation_config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=pad)
    try:
        with evaluating(model):
            output_ids: Tensor = inner.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                logits_processor=[draw],
                synced_gpus=is_sharded(model),
                **told,
            )
    finally:
        whole.remove()
        inner.generation_config = given
    completions = []
    for token_ids in output_ids[:, width:].tolist():
        end = next((place for place, token in enumerate(token_ids, 1) if token in ends), None)
        text = tokenizer.decode(token_ids[:end], skip_special_tokens=True)
        completions.append(SampledCompletion(text.strip(), token_ids[:end], end is not None))
    return completions


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and the model's own, such as that which ends a turn."""
    own = model.generation_config.eos_token_id
    named = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return [token for token in dict.fromkeys(named) if token is not None]


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
