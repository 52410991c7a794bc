"""The layers below the lowest trained one: policy and reference share what comes out of them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from bco_lightning.batch import FeedbackBatch
from bco_lightning.data.collate import collate
from bco_lightning.models.layout import causal_lm_of, decoder_layers_of, layout_of, only_layers, packed_states


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
