"""Mixtures of experts: what their routers decide for each row, how evenly, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from bco_lightning.batch import FeedbackBatch
from bco_lightning.errors import ConfigError
from bco_lightning.models.layout import causal_lm_of, layout_of

# How many experts a token is sent to.
_CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")


def experts_per_token(config: Any, otherwise: int) -> int:
    """To how many experts a token is sent."""
    config = getattr(config, "ffn_config", config)  # of DBRX
    found = next((value for name in _CHOSEN if (value := getattr(config, name, None))), otherwise)
    return int(found[0] if isinstance(found, (list, tuple)) else found)


def routers_of(model: nn.Module) -> dict[str, tuple[nn.Module, int]]:
    """The routers of a model by name, each with the place of its logits among what it gives.

    There is no public way to ask for them but a forward pass; transformers' classes name them for that.
    """
    models = (part for part in model.modules() if isinstance(part, PreTrainedModel))
    named = [(getattr(type(part), "_can_record_outputs", None) or {}).get("router_logits", ()) for part in models]
    kinds = [kind for each in named for kind in (each if isinstance(each, (list, tuple)) else (each,))]
    found = {
        name: (part, kind.index)
        for name, part in model.named_modules()
        for kind in kinds
        if type(part) is kind.target_class and (kind.layer_name or "") in name
    }
    inner = {part for part, _ in found.values()}  # a layer that hands on what its router gives is none
    # Nor is one that finds experts by products of keys, among embeddings (Doge).
    return {
        name: each
        for name, each in found.items()
        if not any(part in inner or isinstance(part, nn.Embedding) for part in [*each[0].modules()][1:])
    }


def stacked_experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of experts that are one parameter, experts first, by name."""
    named = ((f"{place}.{type(part).__name__}", place, part) for place, part in model.named_modules())
    experts = [(place, part) for words, place, part in named if "experts" in words.lower()]
    own = [(f"{place}.{name}", p) for place, part in experts for name, p in part.named_parameters(recurse=False)]
    return {name: weight for name, weight in own if weight.ndim == 3}


class Routing:
    """What the routers of a model decide for a micro-batch while they are watched.

    The loss of a row is transformers' (Switch Transformer's) of each layer for that row alone, ``E sum_e f_e p_e`` with
    the mean number of times ``f`` that an expert is chosen and its mean probability ``p`` over the row's tokens; over
    layers and rows it is a mean. So it depends neither on the other rows of a micro-batch nor on padding.

    Source:
        Fedus et al. 2021, "Switch Transformers", arXiv:2101.03961, eq. 4 to 6; of each sequence alone as in DeepSeek-AI
        2024, "DeepSeek-V3 Technical Report", arXiv:2412.19437, section 2.1.2.
    """

    def __init__(self, model: Any, coefficient: float | Literal["auto"], compiled: bool = False) -> None:
        self._model, config = model, causal_lm_of(model).config.get_text_config()
        self._routers = [] if compiled else list(routers_of(causal_lm_of(model)).values())
        self._chosen = experts_per_token(config, 1)
        self.losses_B: Tensor | None = None
        self.sums = dict[str, Tensor]()
        if coefficient == "auto":  # as transformers adds it
            asked, names = getattr(config, "output_router_logits", False), ("router_aux_loss_coef", "aux_loss_coef")
            coefficient = next((float(getattr(config, name, None) or 0.0) for name in names if asked), 0.0)
        if coefficient and not self._routers:
            found = f"{coefficient:g} for {type(causal_lm_of(model)).__name__}, perhaps compiled"
            raise ConfigError("model.router_aux_loss", f"expected 0 without routers to watch, found {found}.")
        self.coefficient = float(coefficient)

    @contextmanager
    def watched(self, batch: FeedbackBatch) -> Iterator[None]:
        """Within it routers are watched, where a gradient is wanted; activations are computed again after it."""
        found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self._routers]
        with ExitStack() as hooks:
            for (router, at), kept in zip(self._routers, found, strict=True) if torch.is_grad_enabled() else ():
                hooks.enter_context(router.register_forward_hook(partial(self._keep, at, kept)))
            yield
        self.losses_B, self.sums = None, {}
        if any(found):
            with torch.set_grad_enabled(self.coefficient > 0):
                self._sum_rows(batch, found)

    def add_to(self, loss: Tensor) -> Tensor:
        """The loss of a micro-batch with that of its rows' routing, which is forgotten."""
        losses_B, self.losses_B = self.losses_B, None
        return loss if losses_B is None or not self.coefficient else loss + self.coefficient * losses_B.mean()

    def _keep(self, place: int, kept: list[tuple[Tensor, Tensor]], _module: Any, _inputs: Any, out: Any) -> None:
        """Keeps logits of all experts for each token, and the experts that it is sent to."""
        out = out if isinstance(out, tuple) else (out,)
        logits_tE = out[place].flatten(0, -2)
        told = [each for each in out if isinstance(each, Tensor) and each.dtype == torch.int64]
        fitting = [each for each in told if each.shape[:-1] == logits_tE.shape[:-1]]
        kept.append((logits_tE, (fitting or [logits_tE.detach().topk(self._chosen, -1).indices])[0]))

    def _sum_rows(self, batch: FeedbackBatch, found: list[list[tuple[Tensor, Tensor]]]) -> None:
        device, lengths_B = batch.input_ids_S.device, torch.tensor(batch.lengths)
        rows_T = torch.arange(len(batch)).repeat_interleave(lengths_B).to(device)
        places_T, lengths_B1 = self._places(batch).to(device), lengths_B.to(device)[:, None]
        losses, counts = [], []
        for parts in found:
            logits_TE, chosen_TK = (torch.cat(each)[places_T] for each in zip(*parts, strict=True))
            zeros_BE = logits_TE.new_zeros(len(batch), logits_TE.shape[1], dtype=torch.float32)
            sums_BE = zeros_BE.index_add(0, rows_T, logits_TE.float().softmax(-1))
            at_T = (rows_T[:, None] * logits_TE.shape[1] + chosen_TK).flatten()
            counts_BE = zeros_BE.flatten().index_add(0, at_T, torch.ones_like(at_T, dtype=torch.float32))
            counts_BE = counts_BE.view_as(zeros_BE)
            losses.append(logits_TE.shape[1] * (counts_BE * sums_BE / lengths_B1.square()).sum(-1))
            counts.append(counts_BE.sum(0))
        losses_B, counts_LE = torch.stack(losses).mean(0), pad_sequence(counts, batch_first=True)
        self.losses_B, self.sums = losses_B, {"router_loss": losses_B.detach().sum(), "expert_counts": counts_LE}

    def _places(self, batch: FeedbackBatch) -> Tensor:
        """Where a layout has the tokens of each row, one row after the other; those of a shared prompt come often."""
        layout, longest = layout_of(self._model), max(batch.lengths)
        if layout == "packed":
            return torch.tensor([place for span in batch.row_spans for place in span.places()])
        width = longest if layout == "padded" else 0
        starts = [row * width or sum(batch.lengths[:row]) for row in range(len(batch))]
        return torch.tensor([s + n for s, length in zip(starts, batch.lengths, strict=True) for n in range(length)])


def balance(totals: Mapping[str, Any], num_rows: float) -> dict[str, float]:
    """How evenly a step's tokens went to the experts of a layer: the largest load, of even ones 1; entropy, 0 to 1."""
    if "expert_counts" not in totals or not num_rows:  # none of a step that is left out
        return {}
    shares_LE = totals["expert_counts"] / totals["expert_counts"].sum(1, keepdim=True)
    entropy_L = torch.special.entr(shares_LE).sum(1) / math.log(shares_LE.shape[1])
    return {
        "router_aux_loss": totals["router_loss"] / num_rows,
        "expert_load_max": float(shares_LE.max() * shares_LE.shape[1]),
        "expert_entropy": float(entropy_L.mean()),
    }
