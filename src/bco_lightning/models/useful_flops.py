"""How many operations a training step needs, counted from the shapes of its matrices."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bco_lightning.batch import FeedbackBatch


@dataclass(frozen=True)
class UsefulFlops:
    """Floating-point operations that a training step cannot do without; a multiplication and an addition are two.

    A matrix of ``P`` weights takes ``2 P`` in the forward pass of each token, ``2 P`` for the gradient of its input,
    which only what stands above the lowest trained weight needs, and ``2 P`` for its own gradient if it is trained. So
    full fine-tuning takes ``6 P`` for a token, LoRA ``4 P`` and ``6 P`` of its adapters, LoRA on the top layers ``2 P``
    for those below. The head does the same on completion tokens alone. Causal attention takes ``2 L² d`` in each layer
    for a row of ``L`` tokens and ``d`` query features, and twice that again for gradients.

    Everything else is waste and counts for nothing: the reference's pass, what is computed again, padding, a prompt
    that is computed once for each of its rows. Norms, rotations and activations are left out, attention is taken to
    reach back to the first token, and where rows share prompts it is scaled by the share of tokens that are computed,
    which is a little too low.

    Args:
        per_token: Of the decoder's matrices, for a token.
        per_completion_token: Of the head, for a token that carries loss.
        per_squared_length: Of attention, for a row of length 1.

    Source:
        Kaplan et al. 2020, "Scaling Laws for Neural Language Models", arXiv:2001.08361, section 2.1; attention as in
        Chowdhery et al. 2022, "PaLM", arXiv:2204.02311, appendix B, halved since it is causal.
    """

    per_token: int
    per_completion_token: int
    per_squared_length: int

    @classmethod
    def of(cls, policy: Any) -> UsefulFlops:
        """Counts the weights of a policy.

        Args:
            policy: A transformers causal language model, or a PEFT model of one.
        """
        config = policy.config.get_text_config()
        head = policy.get_output_embeddings()
        of_head = {id(module) for module in head.modules()}
        lowest = _lowest_trained_layer(policy)
        per_token = 0
        for name, module in policy.named_modules():
            if id(module) in of_head or isinstance(module, nn.Embedding):
                continue
            for weight in (p for p in module.parameters(recurse=False) if p.ndim >= 2):
                gradients = (_layer(name) >= lowest) + weight.requires_grad
                per_token += 2 * (1 + gradients) * _num_weights(module, weight, config)
        trained_head = any(p.requires_grad for p in head.parameters())
        num_layers = int(config.num_hidden_layers)
        heads = int(config.num_attention_heads)
        width = heads * int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        with_gradient = sum(layer >= lowest for layer in range(num_layers))
        return cls(
            per_token=per_token,
            per_completion_token=(6 if trained_head else 4) * int(config.hidden_size) * int(config.vocab_size),
            per_squared_length=2 * width * (num_layers + 2 * with_gradient),
        )

    def of_batch(self, batch: FeedbackBatch) -> int:
        """Operations of a micro-batch."""
        squares = sum(length * length for length in batch.lengths)
        return (
            self.per_token * batch.num_computed
            + self.per_completion_token * batch.num_completion_tokens
            + self.per_squared_length * squares * batch.num_computed // max(batch.num_tokens, 1)
        )


def _layer(name: str) -> int:
    """Number of the decoder layer that a module is in; what is in none counts as below them all."""
    number = re.search(r"\.(\d+)(?:\.|$)", name)
    return int(number[1]) if number else -1


def _lowest_trained_layer(policy: Any) -> int:
    head = {id(p) for p in policy.get_output_embeddings().parameters()}
    tied = {id(p) for p in policy.get_input_embeddings().parameters()}
    above_all = head - tied
    trained = [_layer(name) for name, p in policy.named_parameters() if p.requires_grad and id(p) not in above_all]
    return min(trained, default=10**9)


def _num_weights(module: nn.Module, weight: torch.Tensor, config: Any) -> int:
    """Weights that a token meets: all, also where they are packed; of stacked experts those that it is sent to."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features) * int(module.out_features)  # type: ignore[arg-type]
    if weight.ndim == 3 and weight.shape[0] > 1:
        return weight.numel() * int(getattr(config, "num_experts_per_tok", weight.shape[0])) // weight.shape[0]
    return weight.numel()
