"""Causal attention within the rows of a packed sequence: no row sees its neighbour, none is padded."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from bco_lightning.batch import Span

_LONG = 1024  # beyond, the memory of a quick gradient, which grows with the square of the length, is not worth it
PACKED = "bco_packed"  # the name under which transformers knows this attention
# Without cuDNN's, which makes a plan of some 30 ms for every shape that it has not seen, and rows have many.
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class _Bounds(NamedTuple):
    """Where each span begins and ends among all queries and among all keys, in int32, as a kernel for all is told."""

    queries: Tensor
    keys: Tensor
    most_queries: int
    most_keys: int
    places: Tensor | None  # of the keys in the packed sequence, where spans have prefixes


class PackedRows:
    """The spans of a packed sequence, as the attention layers of one forward pass need them."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self._spans, self._bounds = spans, dict[torch.device, _Bounds]()
        self.sizes = [span.stop - span.start for span in spans]
        numbers = {span: number for number, span in enumerate(spans)}
        self.prefixes = [numbers[span.prefix] if span.prefix else None for span in spans]
        self.windows: set[int | None] = set()
        self._masks: dict[Any, Tensor] = {}

    def mask(self, query: Tensor, key: Tensor, window: int | None) -> Tensor:
        """Additive mask of queries, the last of all positions, and keys, ``(queries, keys)``; kept for all layers."""
        queries, keys = query.shape[2], key.shape[2]
        name = (queries, keys, window, query.dtype, query.device)
        if name not in self._masks:
            allowed = query.new_ones(queries, keys, dtype=torch.bool).tril(keys - queries)
            if window is not None:
                allowed = allowed.triu(keys - queries - window + 1)
            self._masks[name] = query.new_zeros(queries, keys).masked_fill(~allowed, -torch.inf)
        return self._masks[name]

    def bounds(self, device: torch.device) -> _Bounds:
        """Queries are the spans' own tokens; keys are those of their prefixes too. Kept for all layers."""
        if device not in self._bounds:
            lengths = [span.length for span in self._spans]
            queries, keys = (
                torch.tensor([0, *sizes]).cumsum(0).to(device, torch.int32, non_blocking=True)
                for sizes in (self.sizes, lengths)
            )
            places = None
            if lengths != self.sizes:
                places = torch.tensor([place for span in self._spans for place in span.places()])
                places = places.to(device, non_blocking=True)
            self._bounds[device] = _Bounds(queries, keys, max(self.sizes), max(lengths), places)
        return self._bounds[device]


@torch.compiler.disable  # a loop over rows would be compiled anew for every number of rows
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_rows: PackedRows | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of each span to itself and to its prefix; transformers' own where nothing is packed.

    Query, key and value are ``(1, heads, S, head_size)``, fewer heads of the latter; what comes out is
    ``(1, S, heads, head_size)``, and no attention weights. ``softcap`` caps the scores (Gemma 2); of a
    ``sliding_window`` the token itself is one.
    """
    if packed_rows is None:
        if softcap is None:
            return sdpa_attention_forward(  # type: ignore[no-any-return]
                module, query, key, value, attention_mask, scaling=scaling, sliding_window=sliding_window, **kwargs
            )
        groups = query.shape[1] // key.shape[1]
        mask = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
        mask = mask if attention_mask is None else attention_mask
        # Not minus infinity: queries at padding may see nothing, and would become NaN.
        mask = query.new_zeros(mask.shape).masked_fill(~mask, torch.finfo(query.dtype).min)
        capped = _capped_attention(query, repeat_kv(key, groups), repeat_kv(value, groups), mask, scaling, softcap)
        return capped.transpose(1, 2).contiguous(), None
    told = {"attention_mask": attention_mask, **kwargs}
    unknown = [n for n, v in told.items() if isinstance(v, Tensor) and v.numel() and n != "position_ids"]
    if unknown:  # such as a mask of blocks, or sinks
        raise TypeError(f"attention that is told {unknown[0]} is more than attention to the tokens before")
    packed_rows.windows.add(sliding_window)
    if softcap is None and _has_kernel_for_all(query):
        return _attention_at_once(query, key, value, packed_rows, scaling, sliding_window), None
    with sdpa_kernel(_KERNELS) if query.is_cuda else nullcontext():
        return _attention_row_by_row(query, key, value, packed_rows, scaling, softcap, sliding_window), None


def _has_kernel_for_all(query: Tensor) -> bool:
    """Whether torch's attention of variable length, which is Flash Attention, takes what the model computes in."""
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    fits = query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    return query.is_cuda and is_half and fits and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _attention_at_once(
    query: Tensor, key: Tensor, value: Tensor, rows: PackedRows, scale: float | None, window: int | None
) -> Tensor:
    """One call whatever the rows, on grouped heads as they are; its mask is aligned at the last key of each span."""
    told = rows.bounds(query.device)
    queries, keys, values = (each[0].transpose(0, 1) for each in (query, key, value))
    if told.places is not None:
        keys, values = keys.index_select(0, told.places), values.index_select(0, told.places)
    attended = varlen_attn(
        queries, keys, values, told.queries, told.keys, told.most_queries, told.most_keys,
        scale=scale, window_size=(-1 if window is None else window - 1, 0), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return cast(Tensor, attended)[None]


def _attention_row_by_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed_rows: PackedRows,
    scaling: float | None,
    softcap: float | None,
    sliding_window: int | None,
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    # Repeated once for all spans: on a CPU SDPA's own grouping has a slower backward pass.
    keys = repeat_kv(key, groups).split(packed_rows.sizes, dim=2)
    values = repeat_kv(value, groups).split(packed_rows.sizes, dim=2)
    attended = []
    for number, (q, k, v) in enumerate(zip(query.split(packed_rows.sizes, dim=2), keys, values, strict=True)):
        prefix = packed_rows.prefixes[number]
        if prefix is not None:
            k, v = torch.cat([keys[prefix], k], dim=2), torch.cat([values[prefix], v], dim=2)
        window = sliding_window if sliding_window is not None and k.shape[2] > sliding_window else None
        is_causal = prefix is None and window is None  # SDPA's own causal mask begins at the first key
        is_quick = q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.requires_grad and k.shape[2] <= _LONG
        if softcap is not None:
            out = _capped_attention(q, k, v, packed_rows.mask(q, k, window), scaling, softcap)
        elif is_quick:
            out = _QuickBackward.apply(q, k, v, packed_rows.mask(q, k, window), is_causal, scaling)
        else:
            allowed = None if is_causal else packed_rows.mask(q, k, window)
            out = scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=is_causal, scale=scaling)
        attended.append(out.transpose(1, 2))
    return torch.cat(attended, dim=1)


class _QuickBackward(torch.autograd.Function):
    """Attention whose gradient is five matrix products: in bfloat16 on a CPU, SDPA's own takes 1.5 times as long."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, is_causal: bool, scale: float | None
    ) -> Tensor:
        ctx.scale = scale if scale is not None else query.shape[-1] ** -0.5
        chosen = None if is_causal else mask
        attended = scaled_dot_product_attention(query, key, value, attn_mask=chosen, is_causal=is_causal, scale=scale)
        ctx.save_for_backward(query, key, value, mask, attended)
        return attended

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, mask, attended = ctx.saved_tensors
        weights = torch.softmax((query @ key.mT).mul_(ctx.scale).add_(mask), -1)
        shared = (grad.float() * attended).sum(-1, keepdim=True).to(grad.dtype)
        scores_grad = (grad @ value.mT).sub_(shared).mul_(weights).mul_(ctx.scale)
        return scores_grad @ key, scores_grad.mT @ query, weights.mT @ grad, None, None, None


def _capped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None, cap: float
) -> Tensor:
    scores = query @ key.transpose(2, 3) * (scale if scale is not None else query.shape[-1] ** -0.5)
    scores = torch.tanh(scores / cap) * cap + mask
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)  # for generation and other unpacked passes
