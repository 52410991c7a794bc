"""Log-probabilities of completions without a logits tensor.

Only the positions that predict a completion token go through the head, a tile of rows and vocabulary at a time. The
backward pass computes each tile again, but for those whose softmax numerators found room; under a frozen head it uses
gradients that the forward pass found on its way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from bco_lightning.batch import FeedbackBatch
from bco_lightning.models.layout import causal_lm_of, predicting_states, zero_by_seeing
from bco_lightning.parallel.sharding import run_gathered

_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Below these, products are denormal numbers, which make a matrix product on a CPU a hundred times slower.
_LEAST_LOG_PROB, _LEAST_COEFFICIENT = -60.0, 1e-10
MOST_KEPT = 2**26  # softmax numerators that the backward pass finds again; in float32 they take 256 MiB


def tile_for(device: torch.device) -> tuple[int, int]:
    """How many positions, and entries of the vocabulary, of the logits exist at a time.

    On a CPU their 16 MiB of float32 stay in its cache: measured 1.3 (float32) to 2 times (bfloat16) as fast as whole
    rows. The size for GPUs was chosen on paper, so that few kernels are launched.
    """
    return (1024, 4096) if device.type == "cpu" else (4096, 16384)


def completion_log_probs(model: PreTrainedModel, batch: FeedbackBatch, trunk_states_SH: Tensor | None = None) -> Tensor:
    """Log-probability ``(B,)`` of each row's completion given its prompt, summed over the tokens that carry loss.

    In nats and float32; the head runs in the model's data type. ``trunk_states_SH`` go in place of the tokens, for a
    model without its trunk.
    """
    token_log_probs_N = completion_token_log_probs(model, batch, trunk_states_SH)
    # A float32 sum of some hundred tokens is off by more than everything before it. MPS has no float64.
    exact = torch.float32 if token_log_probs_N.device.type == "mps" else torch.float64
    zeros_B = token_log_probs_N.new_zeros(len(batch), dtype=exact)
    return zeros_B.index_add(0, batch.rows_N, token_log_probs_N.to(exact)).float()


def completion_token_log_probs(
    model: PreTrainedModel, batch: FeedbackBatch, trunk_states_SH: Tensor | None = None
) -> Tensor:
    """:func:`completion_log_probs` of each token that carries loss, shape ``(N,)``."""

    def found_by(lm: Any) -> Tensor:
        states_NH = predicting_states(lm, batch, trunk_states_SH)
        return _head_log_probs(lm, states_NH, batch.targets_N) + zero_by_seeing(lm)

    found_N: Tensor = run_gathered(causal_lm_of(model), found_by)
    return found_N


def token_log_probs(
    hidden_NH: Tensor,
    targets_N: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None = None,
    *,
    scale: float = 1.0,
    soft_cap: float | None = None,
) -> Tensor:
    """Log-softmax ``(N,)`` of a linear head at one target for each position, differentiable, without its logits.

    In nats and float32. Logits are multiplied by ``scale``, then capped at ``soft_cap`` by a hyperbolic tangent.
    """
    head = _Head(float(scale), soft_cap, *tile_for(hidden_NH.device))
    kind = hidden_NH.device.type
    if torch.is_autocast_enabled(kind):
        hidden_NH = hidden_NH.to(torch.get_autocast_dtype(kind))
    return _TokenLogProbs.apply(hidden_NH, weight_VH, bias_V, targets_N, head)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Head:
    """What follows the matrix product, and how the product is cut."""

    scale: float
    soft_cap: float | None
    rows_at_once: int
    columns_at_once: int

    def vocabulary(self, weight_VH: Tensor, bias_V: Tensor | None, like: Tensor) -> Iterator[tuple[int, Tensor, Any]]:
        for start in range(0, weight_VH.shape[0], self.columns_at_once):
            stop = start + self.columns_at_once
            yield start, weight_VH[start:stop].to(like.dtype), None if bias_V is None else bias_V[start:stop].float()

    def rows(self, number: int) -> Iterator[slice]:
        for start in range(0, number, self.rows_at_once):
            yield slice(start, start + self.rows_at_once)

    def logits(self, hidden_nH: Tensor, weight_vH: Tensor, bias_v: Tensor | None) -> Tensor:
        if hidden_nH.is_cuda and hidden_nH.dtype in (torch.bfloat16, torch.float16):
            logits_nv = torch.mm(hidden_nH, weight_vH.T, out_dtype=torch.float32)
        else:
            logits_nv = (hidden_nH @ weight_vH.T).float()
        if bias_v is not None:
            logits_nv += bias_v
        if self.scale != 1.0:
            logits_nv *= self.scale
        return logits_nv if self.soft_cap is None else logits_nv.div_(self.soft_cap).tanh_().mul_(self.soft_cap)

    def slope(self, logits: Tensor) -> Tensor | float | None:
        """How fast the logits grow with the matrix product; nothing stands for 1."""
        if self.soft_cap is None:
            return None if self.scale == 1.0 else self.scale
        return (1 - (logits / self.soft_cap).square()) * self.scale


class _TokenLogProbs(torch.autograd.Function):
    """Gradient of ``log p_t = l_t - logsumexp(l)``: ``(onehot - softmax)`` times the slope of the logits."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor, head: _Head
    ) -> Tensor:
        trains_head = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.head = head
        wants_slopes = ctx.needs_input_grad[0] and not trains_head
        kept: list[Tensor] = []
        keeps = trains_head and head.soft_cap is None and len(targets_N) * len(weight_VH) <= MOST_KEPT
        at_target_N, lse_N, slopes_NH = _pass_over_vocabulary(
            hidden_NH, weight_VH, bias_V, targets_N, head, wants_slopes, kept if keeps else None
        )
        if slopes_NH is not None:
            ctx.save_for_backward(slopes_NH)
        elif trains_head:
            ctx.save_for_backward(hidden_NH, weight_VH, bias_V, targets_N, at_target_N, lse_N, *kept)
        return at_target_N - lse_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, coefficient_N: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        coefficient_N = torch.where(coefficient_N.abs() < _LEAST_COEFFICIENT, 0, coefficient_N)
        if len(ctx.saved_tensors) == 1:
            (slopes_NH,) = ctx.saved_tensors
            return (slopes_NH * coefficient_N[:, None]).to(slopes_NH.dtype), None, None, None, None
        return *_gradients(ctx.saved_tensors, coefficient_N, ctx.head, ctx.needs_input_grad), None, None


def _pass_over_vocabulary(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor, head: _Head, wants_slopes: bool,
    kept: list[Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Logit of each target and logsumexp of all logits, ``(N,)``, and gradients of the log-probs ``(N, H)``.

    ``kept`` takes of each tile its softmax numerators and the logarithm of what they were divided by.
    Policy and reference take the same steps here whatever is wanted, so that equal weights give equal bits.
    """
    at_target_N = hidden_NH.new_zeros(len(targets_N), dtype=torch.float32)
    lse_N = torch.full_like(at_target_N, -torch.inf)
    mean_NH = torch.zeros_like(hidden_NH, dtype=torch.float32) if wants_slopes else None
    for start, weight_vH, bias_v in head.vocabulary(weight_VH, bias_V, hidden_NH):
        for rows in head.rows(len(targets_N)):
            logits_nv = head.logits(hidden_NH[rows], weight_vH, bias_v)
            at_target_N[rows] += _at(targets_N[rows] - start, logits_nv)
            slope = head.slope(logits_nv) if wants_slopes else None
            largest_n = logits_nv.amax(-1)
            weights_nv = logits_nv.sub_(largest_n[:, None]).clamp_(min=_LEAST_LOG_PROB).exp_()
            lse_n = torch.logaddexp(lse_N[rows], largest_n + weights_nv.sum(-1).log())
            if kept is not None:
                kept += [weights_nv, largest_n]
            if mean_NH is not None:
                weights_nv *= (largest_n - lse_n).exp()[:, None]
                mean_NH[rows] *= (lse_N[rows] - lse_n).exp()[:, None]
                _add_product(mean_NH[rows], weights_nv if slope is None else weights_nv.mul_(slope), weight_vH)
            lse_N[rows] = lse_n
    if mean_NH is None:
        return at_target_N, lse_N, None
    slope_N1 = head.slope(at_target_N[:, None])
    slopes_NH = weight_VH[targets_N].float()
    slopes_NH = (slopes_NH if slope_N1 is None else slopes_NH * slope_N1) - mean_NH
    return at_target_N, lse_N, slopes_NH.to(hidden_NH.dtype)


def _gradients(saved: Any, coefficient_N: Tensor, head: _Head, needed: Any) -> tuple[Tensor | None, ...]:
    """Gradients in hidden states, weight and bias, where they are needed."""
    hidden_NH, weight_VH, bias_V, targets_N, at_target_N, lse_N, *kept = saved
    hidden_grad_NH = torch.zeros_like(hidden_NH, dtype=torch.float32) if needed[0] else None
    weight_grad_VH = torch.empty_like(weight_VH) if needed[1] else None
    bias_grad_V = torch.zeros_like(bias_V, dtype=torch.float32) if needed[2] else None
    slope_N = head.slope(at_target_N)
    at_target_grad_N = coefficient_N if slope_N is None else coefficient_N * slope_N
    for start, weight_vH, bias_v in head.vocabulary(weight_VH, bias_V, hidden_NH):
        stop = start + len(weight_vH)
        weight_grad_vH = weight_vH.new_zeros(weight_vH.shape, dtype=torch.float32) if needed[1] else None
        for rows in head.rows(len(targets_N)):
            if kept:
                grad_nv, largest_n, *kept = kept
                share_n, slope = (largest_n - lse_N[rows]).exp_().mul_(-coefficient_N[rows]), head.slope(largest_n)
                # Another graph might ask for the numerators once more.
                grad_nv = grad_nv * torch.where(share_n.abs() < _LEAST_COEFFICIENT, 0, share_n)[:, None]
            else:
                logits_nv = head.logits(hidden_NH[rows], weight_vH, bias_v)
                slope = head.slope(logits_nv)
                grad_nv = logits_nv.sub_(lse_N[rows, None]).clamp_(min=_LEAST_LOG_PROB).exp_()
                grad_nv.mul_(-coefficient_N[rows, None])
            grad_nv = grad_nv if slope is None else grad_nv.mul_(slope)
            _add_at(targets_N[rows] - start, grad_nv, at_target_grad_N[rows])
            if bias_grad_V is not None:
                bias_grad_V[start:stop] += grad_nv.sum(0)
            if hidden_grad_NH is not None:
                _add_product(hidden_grad_NH[rows], grad_nv, weight_vH)
            if weight_grad_vH is not None:
                _add_product(weight_grad_vH, grad_nv.T, hidden_NH[rows])
        if weight_grad_VH is not None and weight_grad_vH is not None:
            weight_grad_VH[start:stop] = weight_grad_vH
    return (
        None if hidden_grad_NH is None else hidden_grad_NH.to(hidden_NH.dtype),
        weight_grad_VH,
        None if bias_grad_V is None else bias_grad_V.to(bias_V.dtype),
    )


def _at(places_n: Tensor, logits_nv: Tensor) -> Tensor:
    """Each row's value at its place, 0 where the place is outside."""
    inside_n = (places_n >= 0) & (places_n < logits_nv.shape[1])
    found_n = logits_nv.gather(1, places_n.clamp(0, logits_nv.shape[1] - 1)[:, None])[:, 0]
    return torch.where(inside_n, found_n, 0)


def _add_at(places_n: Tensor, values_nv: Tensor, added_n: Tensor) -> None:
    """Adds one number to each row at its place, nothing where the place is outside."""
    inside_n = (places_n >= 0) & (places_n < values_nv.shape[1])
    places_n = places_n.clamp(0, values_nv.shape[1] - 1)
    values_nv.scatter_add_(1, places_n[:, None], torch.where(inside_n, added_n, 0)[:, None])


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds a matrix product, computed in the data type of ``right``, to a float32 total."""
    if right.dtype == torch.float32:
        total.addmm_(left, right)
    else:
        total += left.to(right.dtype) @ right


def _head_log_probs(causal_lm: Any, hidden_NH: Tensor, targets_N: Tensor) -> Tensor:
    head, config = causal_lm.get_output_embeddings(), causal_lm.config.get_text_config()
    caps = (getattr(config, name, None) for name in _CAPS)
    scale, soft_cap = _scale(config), next((cap for cap in caps if cap), None)
    if type(head) is nn.Linear:
        return token_log_probs(hidden_NH, targets_N, head.weight, head.bias, scale=scale, soft_cap=soft_cap)

    def rows_log_probs(hidden_nH: Tensor, targets_n: Tensor) -> Tensor:
        # An adapted or quantized head; gather - logsumexp, since log_softmax in float32 is off by up to 2e-3 nat.
        logits_nV: Tensor = head(hidden_nH).float() * scale
        logits_nV = soft_cap * torch.tanh(logits_nV / soft_cap) if soft_cap else logits_nV
        return logits_nV.gather(-1, targets_n[:, None])[:, 0] - logits_nV.logsumexp(-1)

    rows = max(1, math.prod(tile_for(hidden_NH.device)) // config.vocab_size)
    chunks = zip(hidden_NH.split(rows), targets_N.split(rows), strict=True)
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(rows_log_probs, h, t, use_reentrant=False) for h, t in chunks])
    return torch.cat([rows_log_probs(h, t) for h, t in chunks])


def _scale(config: Any) -> float:
    """What Granite and Inkling (divisors), Cohere and Falcon H1 (factors) do to what the head gives."""
    factor = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    divisors = (getattr(config, name, None) or 1.0 for name in ("logits_scaling", "logits_mup_width_multiplier"))
    return float(factor) / math.prod(map(float, divisors))
