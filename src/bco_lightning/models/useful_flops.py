"""How many operations a training step needs, counted from the shapes of its matrices."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from bco_lightning.batch import FeedbackBatch
from bco_lightning.models.experts import experts_per_token, stacked_experts
from bco_lightning.models.refusals import setting


@dataclass(frozen=True)
class UsefulFlops:
    """Floating-point operations that a training step cannot do without; a multiplication and an addition are two.

    A matrix of ``P`` weights takes ``2 P`` in the forward pass of each token, ``2 P`` for the gradient of its input,
    which only what stands above the lowest trained weight needs, and ``2 P`` for its own gradient if it is trained. The
    head does the same on completion tokens alone. Causal attention takes ``2 L² d`` in each layer for a row of ``L``
    tokens and ``d`` query features, and twice that again for gradients.

    Everything else is waste and counts for nothing: the reference's pass, what is computed again, padding, a prompt
    that is computed once for each of its rows. Norms, rotations and activations are left out, attention is taken to
    reach back to the first token.

    Source:
        Kaplan et al. 2020, "Scaling Laws for Neural Language Models", arXiv:2001.08361, section 2.1; attention as in
        Chowdhery et al. 2022, "PaLM", arXiv:2204.02311, appendix B, halved since it is causal.
    """

    per_token: int
    per_completion_token: int
    per_squared_length: int

    @classmethod
    def of(cls, policy: Any) -> UsefulFlops:
        """Counts the weights of a policy."""
        config, head = policy.config.get_text_config(), policy.get_output_embeddings()
        head_only = set(head.parameters()) - set(policy.get_input_embeddings().parameters())
        trained = [_layer(name) for name, p in policy.named_parameters() if p.requires_grad and p not in head_only]
        lowest = min(trained, default=10**9)
        per_token, experts = 0, stacked_experts(policy)
        chosen = {id(p): experts_per_token(config, len(p)) / len(p) for p in experts.values()}
        for each in policy.modules():  # their adapters are linear layers for all of them
            if isinstance(each, ParamWrapper) and id(each.get_param()) in chosen:
                own = (*each.lora_A.parameters(), *each.lora_B.parameters())
                chosen |= {id(p): chosen[id(each.get_param())] for p in own}
        for name, module in policy.named_modules():
            if not isinstance(module, nn.Embedding) and module not in set(head.modules()):
                for weight in (p for p in module.parameters(recurse=False) if p.ndim >= 2):
                    gradients = (_layer(name) >= lowest) + weight.requires_grad
                    per_token += 2 * (1 + gradients) * int(_num_weights(module, weight) * chosen.get(id(weight), 1))
        trains_head = any(p.requires_grad for p in head.parameters())
        layers = int(config.num_hidden_layers)
        with_gradient = sum(layer >= lowest for layer in range(layers))
        return cls(
            per_token=per_token,
            per_completion_token=(6 if trains_head else 4) * int(config.hidden_size) * int(config.vocab_size),
            per_squared_length=2 * query_width(config) * (layers + 2 * with_gradient),
        )

    def of_batch(self, batch: FeedbackBatch) -> int:
        """Operations of a micro-batch; attention is scaled by the share of tokens that are computed."""
        squares = sum(length * length for length in batch.lengths)
        return (
            self.per_token * batch.num_computed
            + self.per_completion_token * batch.num_completion_tokens
            + self.per_squared_length * squares * batch.num_computed // max(batch.num_tokens, 1)
        )


def query_width(config: Any) -> int:
    """Features of all queries of a token."""
    heads = int(config.num_attention_heads)
    return heads * int(setting(config, "head_dim") or config.hidden_size // heads)


def _layer(name: str) -> int:
    """Number of the decoder layer that a module is in; what is in none counts as below them all."""
    number = re.search(r"\.(\d+)(?:\.|$)", name)
    return int(number[1]) if number else -1


def _num_weights(module: nn.Module, weight: torch.Tensor) -> int:
    """Weights of a matrix, also where they are packed."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features) * int(module.out_features)  # type: ignore[arg-type]
    return weight.numel()
