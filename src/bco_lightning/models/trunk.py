"""The layers below the lowest trained one: policy and reference share what comes out of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bco_lightning.batch import FeedbackBatch, Span
from bco_lightning.models.layout import causal_lm_of, decoder_layers_of, layout_of, only_layers, states_of_spans

_PROBE_LENGTH = 8


class FrozenTrunk:
    """The embedding and the first ``depth`` decoder layers of a packed model.

    Args:
        model: A causal language model, perhaps with PEFT around it.
        depth: How many of its layers belong to the trunk.
    """

    def __init__(self, model: Any, depth: int) -> None:
        self._causal_lm, self.depth = causal_lm_of(model), depth

    @torch.no_grad()
    def states(self, batch: FeedbackBatch) -> Tensor:
        """What comes out of the trunk for each token: ``(S, H)``, in the model's data type, without a gradient."""
        return self.states_of_spans(batch.input_ids_S, batch.position_ids_S, batch.spans)

    def states_of_spans(self, input_ids_S: Tensor, position_ids_S: Tensor, spans: Sequence[Span]) -> Tensor:
        """:meth:`states` of token ids."""
        layers = decoder_layers_of(self._causal_lm)[1]
        caught: list[Tensor] = []
        last = layers[self.depth - 1]
        hook = last.register_forward_hook(lambda _m, _i, out: caught.append(out if isinstance(out, Tensor) else out[0]))
        try:
            with only_layers(self._causal_lm, slice(self.depth)):
                states_of_spans(self._causal_lm, input_ids_S, position_ids_S, spans)
        finally:
            hook.remove()
        return caught[0][0]

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Within it the model is what stands on the trunk, and takes trunk states in place of tokens."""
        with only_layers(self._causal_lm, slice(self.depth, None)):
            yield


def find_trunk(model: Any) -> FrozenTrunk | None:
    """The trunk of a model of which only upper layers are trained, if the model can be cut there.

    Args:
        model: A causal language model with its layout chosen, perhaps with PEFT around it.

    Returns:
        The trunk; ``None`` if there is none, or if a trial shows that its states do not stand for the tokens: some
        architectures scale what comes in place of tokens, or give each layer its number.
    """
    causal_lm = causal_lm_of(model)
    _, layers = decoder_layers_of(causal_lm)
    trained = [any(parameter.requires_grad for parameter in layer.parameters()) for layer in layers]
    others = [parameter for name, parameter in causal_lm.base_model.named_parameters() if parameter.requires_grad]
    inside = sum(parameter.requires_grad for layer in layers for parameter in layer.parameters())
    depth = trained.index(True) if True in trained else 0
    if depth == 0 or len(others) != inside or layout_of(causal_lm) != "packed":
        return None
    trunk = FrozenTrunk(model, depth)
    return trunk if _stands_for_tokens(trunk, causal_lm) else None


@torch.no_grad()
def _stands_for_tokens(trunk: FrozenTrunk, causal_lm: Any) -> bool:
    embedding = causal_lm.get_input_embeddings().weight
    places = torch.arange(_PROBE_LENGTH, device=embedding.device)
    ids, spans = (places + 1).remainder(embedding.shape[0]), [Span(0, _PROBE_LENGTH)]
    whole = states_of_spans(causal_lm, ids, places, spans)
    try:
        states_SH = trunk.states_of_spans(ids, places, spans)
        with trunk.left_out():
            cut = states_of_spans(causal_lm, states_SH, places, spans)
    except Exception:  # whatever an architecture makes of fewer layers
        return False
    return bool((cut.float() - whole.float()).norm() <= 1e-5 * whole.float().norm())
