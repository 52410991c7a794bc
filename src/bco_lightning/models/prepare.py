"""One check at the start: what is quick here gives what transformers' untouched forward gives, on the run's own rows.

Packed rows, fused layers and compiled ones are each taken only where they do. Where one does not, the plain way is
taken, with a word; where none does, the run stops.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from bco_lightning.batch import FeedbackBatch
from bco_lightning.data.collate import collate
from bco_lightning.errors import LanguageModelError
from bco_lightning.models.adapters import fuse_adapters
from bco_lightning.models.attention import PackedRows
from bco_lightning.models.fused_layers import fuse_layers, unfuse
from bco_lightning.models.layout import (
    Layout,
    causal_lm_of,
    decoder_layers_of,
    first_layers,
    packed_states,
    set_layout,
)  # fmt: skip
from bco_lightning.models.log_probs import completion_token_log_probs

_MOST_ROWS = 64  # that are looked at for short and long ones
_FIRST_TOKENS = 8  # of a row, which are beside its neighbour
_MOST_LOGITS = 2**26  # of a row; float32 logits of it take 256 MiB
# Root mean squares of differences in nats that rounding explains, absolute and relative to log-probs.
_EXACT, _ROUNDED = (2e-3, 2e-4), (0.1, 0.02)


@dataclass(frozen=True)
class Preparation:
    """How a model computes log-probs, and why, in words; where layers are compiled, only adapted ones are fused."""

    layout: Layout
    fused: bool = True
    compiled: bool = False
    words: str = ""


def prepare(
    model: Any,
    layout: Literal["auto", "packed", "padded"] = "auto",
    *,
    compiled: bool = False,
    rows: Iterable[Mapping[str, Any]] = (),
    longest: int | None = None,
) -> Preparation:
    """Makes a model compute log-probs in the quickest of the known ways that gives the right ones.

    Decoder layers of the same kind are tried once, so that a large model is not kept waiting. What is tried first is
    ``layout``, and ``compiled``. Some of the first ``rows`` are tried, made-up ones if there are none; no row has more
    than ``longest`` tokens. What was chosen becomes the model's ``preparation`` too.
    """
    causal_lm = causal_lm_of(model)
    name, device = type(causal_lm).__name__, causal_lm.get_input_embeddings().weight.device
    batch = collate(_rows_to_try(causal_lm, rows)).to(device)
    excluded = _excluded_by_rope(causal_lm, longest)
    if "packed" not in excluded:
        _take(model, Preparation("packed", fused=False))
        if reason := _why_not_packed(causal_lm, batch):
            excluded["packed"] = reason
    _take(model, Preparation("alone", fused=False))
    expected_N = _untouched_log_probs(causal_lm, batch)
    for way in _ways(layout, compiled):
        if way.layout in excluded:
            continue
        _take(model, way)
        trouble = _trouble(causal_lm, batch, expected_N)
        if not trouble:
            causal_lm.preparation = replace(way, words=_words(way, layout, compiled, excluded))
            return causal_lm.preparation  # type: ignore[no-any-return]
        if way.compiled:
            _compile(model, disable=True)
        if not way.fused:  # nor was it right before
            excluded[way.layout] = f"{way.layout} rows of {name} {trouble}"
    if layout == "packed":
        expected = f"expected a model whose rows can be packed, found that {excluded['packed']}."
        raise LanguageModelError(name, expected, "Set model.layout: padded.")
    raise LanguageModelError(
        name,
        "expected logits that are the output head, scaled or soft-capped as the config says; found others.",
        "Please report the architecture.",
    )


def _excluded_by_rope(causal_lm: Any, longest: int | None) -> dict[str, str]:
    """Rotary frequencies of some models follow the longest row, once it is longer than the model's own length."""
    config = causal_lm.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(kind for kind in parameters.values() if isinstance(kind, dict))]  # of each kind of layer
    following = {kind.get("rope_type") for kind in kinds} & {"dynamic", "longrope"}
    limits = (kind.get("original_max_position_embeddings") for kind in (*kinds, vars(config)))
    least = min((limit for limit in limits if limit), default=getattr(config, "max_position_embeddings", 0))
    if not following or (longest is not None and longest <= least):
        return {}
    if "dynamic" in following:
        raise LanguageModelError(
            type(causal_lm).__name__,
            f"expected rows of at most {least} tokens, since its dynamic rotary frequencies follow the longest row "
            f"that was ever seen; found a limit of {longest}.",
            "Lower data.max_length.",
        )
    return dict.fromkeys(("packed", "padded"), "its rotary frequencies follow the longest row of a micro-batch")


def _ways(layout: str, compiled: bool) -> Iterator[Preparation]:
    layouts: tuple[Layout, ...] = ("packed",) if layout == "packed" else ("packed", "padded", "alone")
    for each in layouts[1:] if layout == "padded" else layouts:
        if compiled:
            yield Preparation(each, compiled=True)
        yield Preparation(each)
        yield Preparation(each, fused=False)


def _take(model: Any, way: Preparation) -> None:
    set_layout(model, way.layout)
    for module in model.modules():
        unfuse(module)
    if way.fused:
        fuse_adapters(model)
    if way.fused and not way.compiled:
        fuse_layers(model.modules())
    if way.compiled:
        _compile(model)


def _compile(model: Any, **options: bool) -> None:
    """Decoder layers, for any number of tokens; attention stays outside."""
    for layer in decoder_layers_of(causal_lm_of(model))[1]:
        layer.compile(dynamic=True, **options)


def _words(way: Preparation, layout: str, compiled: bool, excluded: Mapping[str, str]) -> str:
    words = {"packed": "packed, without padding", "padded": "padded", "alone": "computed one by one"}[way.layout]
    if way.layout != "packed":
        words += ", as model.layout says" if way.layout == layout else f", since {list(excluded.values())[-1]}"
    for given_up, what in ((compiled and not way.compiled, "compiled"), (not way.fused, "fused")):
        words += f"; layers are not {what}, which did not give the log-probs of transformers" if given_up else ""
    return words


@torch.no_grad()
def _why_not_packed(causal_lm: Any, batch: FeedbackBatch) -> str:
    """What keeps rows from being packed: a row that its neighbours change, or a window that attention is not told of.

    What leaks into a row may be faint, and shows in its first tokens most; the same shapes give nearly the same bits.
    """
    config, name = causal_lm.config.get_text_config(), type(causal_lm).__name__
    rows, last = PackedRows(batch.spans), max(batch.row_spans, key=lambda span: span.stop)
    first = slice(last.start, min(last.stop, last.start + _FIRST_TOKENS))
    ids_S, kept = batch.input_ids_S, torch.tensor(last.places(), device=batch.input_ids_S.device)
    others_S = ids_S.roll(1).index_copy(0, kept, ids_S[kept])
    try:
        with first_layers(causal_lm):
            alike = [packed_states(causal_lm, replace(batch, input_ids_S=ids), rows=rows) for ids in (ids_S, others_S)]
    except Exception as error:  # whatever an architecture makes of arguments that it does not know
        return f"{name} does not take packed rows ({type(error).__name__})"
    limit = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if (limit or getattr(config, "attention_chunk_size", None)) and rows.windows <= {None}:  # rows may be shorter
        return f"{name} does not tell its attention how far back it sees"
    rounding = 1e-5 if alike[0].dtype == torch.float32 else 1e-2
    found_nH, beside_others_nH = (states_SH[first].float() for states_SH in alike)
    if not (beside_others_nH - found_nH).norm() <= rounding * found_nH.norm():
        return f"packed rows of {name} see their neighbours"
    return ""


@torch.no_grad()
def _untouched_log_probs(causal_lm: Any, batch: FeedbackBatch) -> Tensor:
    """By transformers alone: each row by itself, whole logits."""
    found_N = batch.targets_N.new_zeros(batch.targets_N.shape, dtype=torch.float32)
    with first_layers(causal_lm):
        for number, span in enumerate(batch.row_spans):
            chosen_N = batch.rows_N == number
            logits_TV = causal_lm(input_ids=batch.input_ids_S[span.places()][None], use_cache=False).logits[0]
            logits_nV = logits_TV[batch.position_ids_S[batch.predictors_N[chosen_N]]].float()
            found_N[chosen_N] = logits_nV.log_softmax(-1).gather(-1, batch.targets_N[chosen_N, None])[:, 0]
    return found_N


@torch.no_grad()
def _trouble(causal_lm: Any, batch: FeedbackBatch, expected_N: Tensor) -> str:
    """What is wrong with log-probs as the model computes them now, or nothing."""
    try:
        with first_layers(causal_lm):
            found_N = completion_token_log_probs(causal_lm, batch)
    except Exception as error:  # whatever an architecture makes of what it is given
        return f"fail with {type(error).__name__}"
    device = found_N.device.type
    weight = causal_lm.get_output_embeddings().weight
    exact = weight.dtype == torch.float32 and not torch.is_autocast_enabled(device)
    absolute, relative = _EXACT if exact else _ROUNDED
    both_nan = found_N.isnan() & expected_N.isnan()  # which stops the run later, where it says for which row
    difference_N = torch.where((found_N == expected_N) | both_nan, 0, found_N - expected_N)
    squares_2B = expected_N.new_zeros(2, len(batch)).index_add_(
        1, batch.rows_N, torch.stack([difference_N, expected_N.nan_to_num()]).square()
    )
    difference_B, size_B = (squares_2B / batch.completion_lengths.clamp(min=1)).sqrt()
    return "" if bool((difference_B <= absolute + relative * size_B).all()) else "are not what rows are alone"


def _rows_to_try(causal_lm: Any, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Two short rows, a long one, and another answer to the prompt of the first."""
    vocabulary, embeddings = causal_lm.config.get_text_config().vocab_size, causal_lm.get_input_embeddings().weight
    most = max(_MOST_LOGITS // vocabulary, 16)
    known = sorted((_cut(row, most) for row in islice(rows, _MOST_ROWS)), key=lambda row: len(row["input_ids"]))
    largest = max((max(row["input_ids"]) for row in known), default=0)
    if largest >= len(embeddings):
        raise LanguageModelError(
            type(causal_lm).__name__,
            f"expected tokens below {len(embeddings)}, the number of its embeddings; found token {largest} in a row.",
            "Tokens were added to the tokenizer: resize the model's embeddings to it, and save both.",
        )
    first, second, last = (known[0], known[len(known) // 2], known[-1]) if known else _made_up(vocabulary)
    place = first["completion_mask"].index(True)
    answer = last["input_ids"][last["completion_mask"].index(True) :]
    mask = [False] * place + [True] * len(answer)
    other = {"input_ids": [*first["input_ids"][:place], *answer], "completion_mask": mask}
    return [{**row, "thumbs_up": True, "row_id": 0} for row in (first, second, last, other)]


def _cut(row: Mapping[str, Any], most: int) -> dict[str, Any]:
    ids, mask = list(row["input_ids"][:most]), [bool(scored) for scored in row["completion_mask"][:most]]
    if True not in mask[1:]:  # an answer to a long prompt
        mask = [False] + [True] * (len(ids) - 1)
    return {"input_ids": ids, "completion_mask": mask}


def _made_up(vocabulary: int) -> list[dict[str, Any]]:
    masks = [[place >= length // 3 for place in range(length)] for length in (6, 9, 24)]
    return [
        {"input_ids": [(7 * place + 3 * len(mask)) % vocabulary for place in range(len(mask))], "completion_mask": mask}
        for mask in masks
    ]
