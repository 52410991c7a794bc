"""How the rows of a micro-batch go through a model: packed where its attention allows that, padded, or one by one.

Where the layers below the lowest trained one are the policy's and the reference's, both share what comes out of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.utils import logging

from bco_lightning.batch import FeedbackBatch
from bco_lightning.data.collate import collate
from bco_lightning.models.attention import PACKED, PackedRows

Layout = Literal["packed", "padded", "alone"]
_NO_PART_OF_A_KIND = ("layer_idx", "layer_id", "layer_number", "training", "gradient_checkpointing")


def kind_of_model(config: Any) -> Any:
    """The class of transformers that makes the model of a config, with the parts that see images where it has some."""
    sees = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM


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


def text_decoder_of(causal_lm: Any) -> Any:
    """The decoder of tokens: of a model that sees images too, what stands behind the parts that see them."""
    base = decoder_of(causal_lm)
    found = getattr(base, "language_model", None) or getattr(base, "text_model", None)
    return found if isinstance(found, nn.Module) else base


def seeing_parts_of(causal_lm: Any) -> dict[str, nn.Module]:
    """What makes vectors of images, by name: towers and what projects what they give; nothing of a text model."""
    base, text = decoder_of(causal_lm), text_decoder_of(causal_lm)
    return {} if text is base else {name: part for name, part in base.named_children() if part is not text}


def decoder_layers_of(causal_lm: Any) -> tuple[str, nn.ModuleList]:
    """The decoder layers and the name of their list; an empty one where they are not one list."""
    number = causal_lm.config.get_text_config().num_hidden_layers
    for name, child in text_decoder_of(causal_lm).named_children():
        if isinstance(child, nn.ModuleList) and len(child) == number:
            return name, child
    return "", nn.ModuleList()


@contextmanager
def only_layers(causal_lm: Any, chosen: slice) -> Iterator[None]:
    """Within it the model has some of its decoder layers alone."""
    name, layers = decoder_layers_of(causal_lm)
    setattr(text_decoder_of(causal_lm), name, layers[chosen])
    try:
        yield
    finally:
        setattr(text_decoder_of(causal_lm), name, layers)


def kinds_of_layers(causal_lm: Any) -> list[Any]:
    """Of each decoder layer what it is made of; those of the same kind differ in their numbers and weights alone."""
    types = getattr(causal_lm.config.get_text_config(), "layer_types", None)
    return [
        (types[place] if types else "", *(_kind(module) for module in layer.modules()))
        for place, layer in enumerate(decoder_layers_of(causal_lm)[1])
    ]


def _kind(module: nn.Module) -> Any:
    plain = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, (bool, int, float, str)) and name not in _NO_PART_OF_A_KIND
    }
    # Sorted, since a weight that PEFT adapts as a parameter is registered anew in each pass.
    shapes = sorted((name, tuple(parameter.shape)) for name, parameter in module.named_parameters(recurse=False))
    return type(module), tuple(sorted(plain.items())), tuple(shapes)


def first_layers(causal_lm: Any) -> AbstractContextManager[None]:
    """Within it the model has so many of its first layers that each kind is among them: enough for a trial."""
    kinds = kinds_of_layers(causal_lm)
    enough = max((kinds.index(kind) + 1 for kind in kinds), default=0)
    return only_layers(causal_lm, slice(enough)) if enough else nullcontext()


def layout_of(model: Any) -> Layout:
    """How :func:`predicting_states` lays out rows for this model."""
    return getattr(causal_lm_of(model), "row_layout", "padded")


def set_layout(model: Any, layout: Layout) -> None:
    """Lays out rows in this way from now on; ``packed`` asks of a model what :func:`~.prepare.prepare` looks for."""
    causal_lm = causal_lm_of(model)
    if (layout_of(causal_lm) == "packed") != (layout == "packed"):
        told = logging.get_verbosity()
        logging.set_verbosity_error()  # it warns where a class has attention of its own, which a trial shows too
        # None is transformers' own choice for the class; a config within the config that is no model's has none.
        with suppress(ValueError) if layout != "packed" else nullcontext():
            causal_lm.set_attn_implementation(PACKED if layout == "packed" else None)
        logging.set_verbosity(told)
    causal_lm.row_layout = layout


def predicting_states(causal_lm: Any, batch: FeedbackBatch, trunk_states_SH: Tensor | None = None) -> Tensor:
    """The last hidden states ``(N, H)`` that predict the tokens that carry loss.

    ``trunk_states_SH`` go in place of the tokens, for a packed model without its trunk.
    """
    layout = layout_of(causal_lm)
    if layout == "packed" and batch.images_B is None:
        return packed_states(causal_lm, batch, trunk_states_SH).index_select(0, batch.predictors_N)
    decoder, device = decoder_of(causal_lm), batch.input_ids_S.device
    places = [torch.tensor(span.places()).to(device, non_blocking=True) for span in batch.row_spans]
    if layout == "alone":
        ids_1T = [batch.input_ids_S[row][None] for row in places]
        rows = [
            decoder(input_ids=ids, use_cache=False, **images_of(causal_lm, batch, ids, [number]))
            for number, ids in enumerate(ids_1T)
        ]
        hidden_BTH = pad_sequence([row.last_hidden_state[0] for row in rows], True)
    else:
        places_BT = pad_sequence(places, True, -1)
        ids_BT = batch.input_ids_S[places_BT]  # padding repeats the last token, which nothing looks at
        images, mask_BT = images_of(causal_lm, batch, ids_BT, range(len(batch))), (places_BT >= 0).long()
        hidden_BTH = decoder(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False, **images).last_hidden_state
    return hidden_BTH[batch.rows_N, batch.position_ids_S[batch.predictors_N]]


def images_of(causal_lm: Any, batch: FeedbackBatch, ids_BT: Tensor, rows: Sequence[int]) -> dict[str, Tensor]:
    """What the model is given beside the tokens of some rows: their images, and which tokens stand for them."""
    return joined_images(causal_lm, [batch.images_B[row] for row in rows] if batch.images_B else [], ids_BT)


def joined_images(causal_lm: Any, images: Sequence[Mapping[str, Tensor]], ids_BT: Tensor) -> dict[str, Tensor]:
    """The images of several rows as one input; the smaller ones are padded by zeros, as processors do."""
    seen = [row for row in images if row]
    if not seen:
        return {}
    found = {}
    for name in seen[0]:
        sizes = torch.tensor([row[name].shape for row in seen])
        missing = (sizes.amax(0) - sizes)[:, 1:].flip(1)
        sides = torch.stack([torch.zeros_like(missing), missing], -1).flatten(1).tolist()
        found[name] = torch.cat([pad(row[name], some) for row, some in zip(seen, sides, strict=True)])
    taken = inspect.signature(causal_lm.forward).parameters
    marks_BT = (ids_BT == causal_lm.config.image_token_id).long()
    return found | {name: marks_BT for name in ("token_type_ids", "mm_token_type_ids") if name in taken}


def zero_by_seeing(causal_lm: Any) -> Tensor | float:
    """Zero, with gradients of zero for what sees images: of a batch rows may reach a part of it, or nothing."""
    parts = seeing_parts_of(causal_lm).values()
    trained = [each for part in parts for each in part.parameters() if each.requires_grad]
    return 0 * torch.stack([each.sum() for each in trained]).sum() if trained else 0.0


def packed_states(
    causal_lm: Any, batch: FeedbackBatch, trunk_states_SH: Tensor | None = None, rows: PackedRows | None = None
) -> Tensor:
    """The last hidden states ``(S, H)`` of all tokens of a packed model; ``rows`` keeps what attention was told."""
    tokens = ("input_ids", batch.input_ids_S) if trunk_states_SH is None else ("inputs_embeds", trunk_states_SH)
    hidden_1SH: Tensor = decoder_of(causal_lm)(
        **{tokens[0]: tokens[1][None]},
        position_ids=batch.position_ids_S[None],
        # Four-dimensional masks are passed on as they are: without one, transformers would make one of S x S.
        attention_mask=batch.position_ids_S.new_zeros(1, 1, 0, 0),
        packed_rows=rows or PackedRows(batch.spans, batch.input_ids_S.device),
        use_cache=False,
    ).last_hidden_state
    return hidden_1SH[0]


class FrozenTrunk:
    """The embedding and the first ``depth`` decoder layers of a packed model, perhaps with PEFT around it."""

    def __init__(self, model: Any, depth: int) -> None:
        self._causal_lm, self.depth = causal_lm_of(model), depth

    @torch.no_grad()
    def states(self, batch: FeedbackBatch) -> Tensor:
        """What comes out of the trunk for each token: ``(S, H)``, in the model's data type, without a gradient."""
        caught: list[Tensor] = []
        last = decoder_layers_of(self._causal_lm)[1][self.depth - 1]
        hook = last.register_forward_hook(lambda _m, _i, out: caught.append(out if isinstance(out, Tensor) else out[0]))
        try:
            with only_layers(self._causal_lm, slice(self.depth)):
                packed_states(self._causal_lm, batch)
        finally:
            hook.remove()
        return caught[0][0]

    def left_out(self) -> AbstractContextManager[None]:
        """Within it the model is what stands on the trunk, and takes trunk states in place of tokens."""
        return only_layers(self._causal_lm, slice(self.depth, None))


def find_trunk(model: Any) -> FrozenTrunk | None:
    """The trunk of a model of which only upper layers are trained, if a trial shows that it can be cut there.

    Some architectures scale what comes in place of tokens, or give each layer its number.
    """
    causal_lm = causal_lm_of(model)
    layers = decoder_layers_of(causal_lm)[1]
    trained = [sum(parameter.requires_grad for parameter in layer.parameters()) for layer in layers]
    everywhere = sum(parameter.requires_grad for parameter in causal_lm.base_model.parameters())
    depth = next((number for number, count in enumerate(trained) if count), 0)
    if depth == 0 or sum(trained) != everywhere or layout_of(causal_lm) != "packed":
        return None
    trunk = FrozenTrunk(model, depth)
    return trunk if _stands_for_tokens(trunk, causal_lm) else None


@torch.no_grad()
def _stands_for_tokens(trunk: FrozenTrunk, causal_lm: Any) -> bool:
    embedding = causal_lm.get_input_embeddings().weight
    ids = [number % len(embedding) for number in range(1, 9)]
    row = {"input_ids": ids, "completion_mask": [True] * len(ids), "thumbs_up": True, "row_id": 0}
    batch = collate([row]).to(embedding.device)
    whole_SH = packed_states(causal_lm, batch).float()
    try:
        states_SH = trunk.states(batch)
        with trunk.left_out():
            cut_SH = packed_states(causal_lm, batch, states_SH).float()
    except Exception:  # whatever an architecture makes of fewer layers
        return False
    return bool((cut_SH - whole_SH).norm() <= 1e-5 * whole_SH.norm())
