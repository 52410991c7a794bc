"""Log-probabilities of completions without a logits tensor of the whole batch.

Only the positions that predict a completion token go through the head, a chunk at a time; the backward pass computes
each chunk again instead of keeping its logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from bco_lightning.batch import FeedbackBatch
from bco_lightning.errors import LanguageModelError

CHUNK_BYTES = 64 * 2**20  # of float32 logits; larger chunks were no faster on a CPU
SCORE = "score_completions"  # the method that a sharded model gets
_PROBE_LENGTH = 8


def completion_log_probs(model: PreTrainedModel, batch: FeedbackBatch, chunk_bytes: int = CHUNK_BYTES) -> Tensor:
    """Log-probability of each row's completion given its prompt, summed over the tokens that carry loss.

    The head runs in the model's data type; log-softmax and sums are float32.

    Args:
        model: A transformers causal language model, or a PEFT model around one.
        batch: Rows padded on the right.
        chunk_bytes: Size of one chunk of float32 logits, in bytes.

    Returns:
        Shape ``(B,)``, float32, in nats.
    """
    causal_lm = causal_lm_of(model)
    score = getattr(causal_lm, SCORE, None)
    return score(batch, chunk_bytes) if score else score_completions(causal_lm, batch, chunk_bytes)  # type: ignore[no-any-return]


def score_completions(causal_lm: Any, batch: FeedbackBatch, chunk_bytes: int) -> Tensor:
    """:func:`completion_log_probs` of a bare causal language model; sharded models have it as a method."""
    hidden_BTH = causal_lm.base_model(
        input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False
    ).last_hidden_state
    predicted_BT = batch.completion_mask_BT[:, 1:]
    token_log_probs_N = _token_log_probs(
        causal_lm, hidden_BTH[:, :-1][predicted_BT], batch.input_ids_BT[:, 1:][predicted_BT], chunk_bytes
    )
    row_N = predicted_BT.nonzero()[:, 0]
    zeros_B = token_log_probs_N.new_zeros(len(batch))
    return zeros_B.index_add(0, row_N, token_log_probs_N)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Compares the head computed here with the model's own logits on a few tokens.

    Some architectures scale or cap their logits after the head; one that does so in a way not known here would train on
    wrong numbers.

    Args:
        model: A causal language model on its device.

    Raises:
        LanguageModelError: If they differ.
    """
    causal_lm = causal_lm_of(model)
    embedding = causal_lm.get_input_embeddings().weight
    tokens_1T = torch.arange(1, _PROBE_LENGTH + 1, device=embedding.device).remainder(embedding.shape[0])[None]
    hidden_1TH = causal_lm.base_model(input_ids=tokens_1T, use_cache=False).last_hidden_state
    ours = _token_log_probs(causal_lm, hidden_1TH[0], tokens_1T[0], CHUNK_BYTES)
    logits = causal_lm(input_ids=tokens_1T, use_cache=False).logits[0].float()
    theirs = logits.log_softmax(-1).gather(-1, tokens_1T[0, :, None])[:, 0]
    rounding = 1e-2 if hidden_1TH.dtype == torch.float32 else 0.25
    if not torch.allclose(ours, theirs, rtol=1e-2, atol=rounding):
        raise LanguageModelError(
            type(causal_lm).__name__,
            "expected logits that are the output head, scaled or soft-capped as the config says; found others.",
            "Please report the architecture.",
        )


def _token_log_probs(causal_lm: PreTrainedModel, hidden_NH: Tensor, targets_N: Tensor, chunk_bytes: int) -> Tensor:
    head = causal_lm.get_output_embeddings()
    config = causal_lm.config.get_text_config()
    rows = max(1, chunk_bytes // (4 * config.vocab_size))

    def chunk_log_probs(hidden_nH: Tensor, targets_n: Tensor) -> Tensor:
        logits_nV = _as_configured(head(hidden_nH).float(), config)
        # gather - logsumexp: log_softmax in float32 is off by up to 2e-3 nat per sequence at a vocabulary of 49k.
        return logits_nV.gather(-1, targets_n[:, None])[:, 0] - logits_nV.logsumexp(-1)

    chunks = zip(hidden_NH.split(rows), targets_N.split(rows), strict=True)
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(chunk_log_probs, h, t, use_reentrant=False) for h, t in chunks])
    return torch.cat([chunk_log_probs(h, t) for h, t in chunks])


def _as_configured(logits: Tensor, config: Any) -> Tensor:
    """Applies what Granite (``logits_scaling``), Cohere (``logit_scale``) and Gemma (soft cap) do after the head."""
    if getattr(config, "logits_scaling", None):
        logits = logits / config.logits_scaling
    if getattr(config, "logit_scale", None):
        logits = logits * config.logit_scale
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return logits


def causal_lm_of(model: Any) -> Any:
    """The causal language model itself, without PEFT around it."""
    return model.get_base_model() if hasattr(model, "peft_config") else model
