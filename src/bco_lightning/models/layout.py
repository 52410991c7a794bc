"""How the rows of a micro-batch go through a model: packed where its attention allows that, padded, or one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.utils import logging

from bco_lightning.batch import FeedbackBatch, Span
from bco_lightning.models.attention import PACKED, PackedRows

Layout = Literal["packed", "padded", "alone"]
_LAYOUT = "row_layout"  # the attribute of a model with its layout
_PROBE_LENGTH = 6


def causal_lm_of(model: Any) -> Any:
    """The causal language model itself, without PEFT around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_of(causal_lm: Any) -> Any:
    """What makes hidden states of tokens."""
    base = causal_lm.base_model
    if base is not causal_lm:
        return base
    # A class that names an attribute which it has not.
    return next((child for child in causal_lm.children() if isinstance(child, PreTrainedModel)), base)


def decoder_layers_of(causal_lm: Any) -> tuple[str, nn.ModuleList]:
    """The decoder layers and the name of their list; an empty one where they are not one list."""
    number = causal_lm.config.get_text_config().num_hidden_layers
    for name, child in decoder_of(causal_lm).named_children():
        if isinstance(child, nn.ModuleList) and len(child) == number:
            return name, child
    return "", nn.ModuleList()


@contextmanager
def only_layers(causal_lm: Any, chosen: slice) -> Iterator[None]:
    """Within it the model has some of its decoder layers alone."""
    name, layers = decoder_layers_of(causal_lm)
    setattr(decoder_of(causal_lm), name, layers[chosen])
    try:
        yield
    finally:
        setattr(decoder_of(causal_lm), name, layers)


def first_layers(causal_lm: Any) -> AbstractContextManager[None]:
    """Within it the model has so many of its first layers that each kind is among them: enough for a trial."""
    layers, types = decoder_layers_of(causal_lm)[1], getattr(causal_lm.config.get_text_config(), "layer_types", None)
    kinds = [
        (types[place] if types else "", *(type(module) for module in layer.modules()))
        for place, layer in enumerate(layers)
    ]
    enough = max((kinds.index(kind) + 1 for kind in kinds), default=0)
    return only_layers(causal_lm, slice(enough)) if enough else nullcontext()


def layout_of(model: Any) -> Layout:
    """How :func:`predicting_states` lays out rows for this model."""
    return getattr(causal_lm_of(model), _LAYOUT, "padded")


def set_layout(model: Any, layout: Layout) -> None:
    """Lays out rows in this way from now on.

    Args:
        model: A causal language model, perhaps with PEFT around it.
        layout: ``packed`` needs what :func:`why_not_packed` looks for.
    """
    causal_lm = causal_lm_of(model)
    if (layout_of(causal_lm) == "packed") != (layout == "packed"):
        told = logging.get_verbosity()
        logging.set_verbosity_error()  # it warns where a class has attention of its own, which a trial shows too
        # None is transformers' own choice for the class.
        causal_lm.set_attn_implementation(PACKED if layout == "packed" else None)
        logging.set_verbosity(told)
    setattr(causal_lm, _LAYOUT, layout)


def predicting_states(causal_lm: Any, batch: FeedbackBatch, trunk_states_SH: Tensor | None = None) -> Tensor:
    """The last hidden states that predict the tokens that carry loss.

    Args:
        causal_lm: A causal language model without PEFT around it.
        batch: A packed micro-batch; for a model with another layout it is unpacked here, and padded on the right.
        trunk_states_SH: What goes in place of the tokens, for a packed model without its trunk.

    Returns:
        Shape ``(N, H)``, in the model's data type.
    """
    layout = layout_of(causal_lm)
    if layout == "packed":
        return packed_states(causal_lm, batch, trunk_states_SH).index_select(0, batch.predictors_N)
    decoder, device = decoder_of(causal_lm), batch.input_ids_S.device
    places = [torch.tensor(span.places()).to(device, non_blocking=True) for span in batch.row_spans]
    if layout == "alone":
        rows = [decoder(input_ids=batch.input_ids_S[row][None], use_cache=False) for row in places]
        hidden_BTH = pad_sequence([row.last_hidden_state[0] for row in rows], True)
    else:
        places_BT = pad_sequence(places, True, -1)
        hidden_BTH = decoder(
            input_ids=batch.input_ids_S[places_BT],  # padding repeats the last token, which nothing looks at
            attention_mask=(places_BT >= 0).long(),
            use_cache=False,
        ).last_hidden_state
    return hidden_BTH[batch.rows_N, batch.position_ids_S[batch.predictors_N]]


def packed_states(causal_lm: Any, batch: FeedbackBatch, trunk_states_SH: Tensor | None = None) -> Tensor:
    """The last hidden states of all tokens of a packed model, shape ``(S, H)``; arguments as above."""
    inputs = batch.input_ids_S if trunk_states_SH is None else trunk_states_SH
    return states_of_spans(causal_lm, inputs, batch.position_ids_S, batch.spans)


def states_of_spans(
    causal_lm: Any,
    inputs: Tensor,
    position_ids_S: Tensor,
    spans: Sequence[Span],
    windows: set[int | None] | None = None,
) -> Tensor:
    """:func:`packed_states` of token ids ``(S,)`` or of what goes in their place ``(S, H)``.

    The sliding windows that attention layers were told of go into ``windows``.
    """
    rows = PackedRows(spans)
    hidden_1SH: Tensor = decoder_of(causal_lm)(
        **{"inputs_embeds" if inputs.is_floating_point() else "input_ids": inputs[None]},
        position_ids=position_ids_S[None],
        # Four-dimensional masks are passed on as they are: without one, transformers would make one of S x S.
        attention_mask=position_ids_S.new_zeros(1, 1, 0, 0),
        packed_rows=rows,
        use_cache=False,
    ).last_hidden_state
    if windows is not None:
        windows |= rows.windows
    return hidden_1SH[0]


@torch.no_grad()
def why_not_packed(causal_lm: Any) -> str:
    """What keeps the rows of a model from being packed, by a trial with a few tokens; nothing if they can be.

    Args:
        causal_lm: A causal language model whose layout is ``packed``.
    """
    config = causal_lm.config.get_text_config()
    device = causal_lm.get_input_embeddings().weight.device
    prompt, first, second, third = (
        torch.arange(1, _PROBE_LENGTH + 1, device=device).add(shift).remainder(config.vocab_size)
        for shift in (0, 7, 19, 31)
    )
    starts = range(0, 4 * _PROBE_LENGTH, _PROBE_LENGTH)
    before, shared = (Span(start, start + _PROBE_LENGTH) for start in starts[:2])
    ends = [Span(start, start + _PROBE_LENGTH, shared) for start in starts[2:]]
    spans = [before, shared, *ends]
    positions = torch.cat([torch.arange(span.context, span.length, device=device) for span in spans])
    windows: set[int | None] = set()
    try:
        packed, beside_others = (
            states_of_spans(causal_lm, torch.cat(parts), positions, spans, windows)
            for parts in ([second, prompt, first, second], [third, prompt, third, second])
        )
    except Exception as error:  # whatever an architecture makes of arguments that it does not know
        return f"{type(causal_lm).__name__} does not take packed rows ({type(error).__name__})"
    if _is_windowed(config) and windows <= {None}:  # a few tokens are inside of any window
        return f"{type(causal_lm).__name__} does not tell its attention how far back it sees"
    exact, last = packed.dtype == torch.float32, ends[-1].places()
    # A state that leaks from row to row may be faint in a few tokens; the same shapes give nearly the same bits.
    if not _close(beside_others[last], packed[last], 1e-5 if exact else 1e-2):
        return f"packed rows of {type(causal_lm).__name__} see their neighbours"
    return ""


def _is_windowed(config: Any) -> bool:
    limit = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return bool(limit or getattr(config, "attention_chunk_size", None))


def _close(found: Tensor, expected: Tensor, rounding: float) -> bool:
    return bool((found.float() - expected.float()).norm() <= rounding * expected.float().norm())
