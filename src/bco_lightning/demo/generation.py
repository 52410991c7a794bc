"""Sample completions from a language model, without touching the global random state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class SampledCompletion:
    """One sampled answer.

    Args:
        text: The answer without special tokens.
        token_ids: Its tokens, with the EOS token when the model ended the answer by itself.
        finished: Whether the model ended the answer before the token limit.
    """

    text: str
    token_ids: list[int]
    finished: bool


@torch.no_grad()
def sample_completions(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: list[str],
    *,
    max_new_tokens: int,
    seed: int,
) -> list[SampledCompletion]:
    """Samples one completion for each prompt, from the whole distribution (no top-k, no top-p).

    Args:
        model: A causal language model with ``generate``, in evaluation mode.
        tokenizer: Its tokenizer.
        prompts: Prompts as text with the chat template applied. They form one batch.
        max_new_tokens: Limit of each completion, in tokens.
        seed: Seed of this call; the same call gives the same answers.

    Returns:
        One completion for each prompt, in order.
    """
    encoded = tokenizer(prompts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    was_training = model.training
    model.eval()  # under gradient checkpointing a model in training mode keeps no cache to generate with
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
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
    answers = output_ids[:, encoded["input_ids"].shape[1] :].tolist()
    return [_until_eos(answer, tokenizer) for answer in answers]


def _until_eos(token_ids: list[int], tokenizer: Any) -> SampledCompletion:
    finished = tokenizer.eos_token_id in token_ids
    if finished:
        token_ids = token_ids[: token_ids.index(tokenizer.eos_token_id) + 1]
    text = tokenizer.decode(token_ids, skip_special_tokens=True)
    return SampledCompletion(text.strip(), token_ids, finished)
