"""One check at the start: what is quick here gives what transformers' untouched forward gives, on the run's own rows.

Packed rows, fused layers and compiled ones are each taken only where log-probs and gradients are the same. Where they
are not, the plain way is taken, with a word; where none is right, the run stops.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from bco_lightning.batch import FeedbackBatch
from bco_lightning.data.collate import collate, has_later_images
from bco_lightning.errors import ConfigError, LanguageModelError
from bco_lightning.models.adapters import fuse_adapters
from bco_lightning.models.attention import PackedRows
from bco_lightning.models.fused_layers import fuse_layers, unfuse
from bco_lightning.models.layout import (
    Layout,
    causal_lm_of,
    decoder_layers_of,
    first_layers,
    images_of,
    kinds_of_layers,
    packed_states,
    seeing_parts_of,
    set_layout,
)  # fmt: skip
from bco_lightning.models.log_probs import completion_token_log_probs
from bco_lightning.models.refusals import refuse_unknown_token

_FIRST_TOKENS = 8  # of a row, which are beside its neighbour
_SCORED = 4  # tokens at the start of a completion, and at its end; what stands before them is computed as well
_MOST_LOGITS = 2**26  # of a row, where transformers makes those of all tokens; in float32 they take 256 MiB
_MOST_WEIGHTS = 2**24  # of a parameter whose gradient is looked at
_ATEN = torch.ops.aten
_PRODUCTS = [  # what selective recomputation keeps: matrix products, and attention by row, at once and by torch
    torch.ops.bco_lightning.row_by_row.default, torch.ops.torch_attn._varlen_attn.default, _ATEN.mm.default,
    _ATEN.addmm.default, _ATEN.bmm.default, _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
]  # fmt: skip
# What rounding explains: root mean squares of differences in nats, absolute and relative to log-probs; norms of
# differences of a parameter's gradient, relative to its norm and to that of all gradients.
_EXACT, _ROUNDED = (2e-3, 2e-4, 1e-2, 1e-4), (0.1, 0.02, 0.3, 0.03)


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
    recomputed: bool | str = False,
    rows: Sequence[Mapping[str, Any]] = (),
    longest: int | None = None,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Preparation:
    """Makes a model compute log-probs in the quickest of the known ways that gives the right ones.

    Decoder layers of the same kind are tried once, so that a large model is not kept waiting. What is tried first is
    ``layout``, and ``compiled``; ``rows`` are tried, made-up ones if there are none, in the ``precision`` of a step;
    no row has more than ``longest`` tokens. Activations are ``recomputed`` in the backward pass from then on, or the
    ``selective`` part of them.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans some 30 ms for every shape, and rows have many
    with precision(), _adapters_at_work(model):
        causal_lm = causal_lm_of(model)
        name, device = type(causal_lm).__name__, causal_lm.get_input_embeddings().weight.device
        batch = collate(_rows_to_try(causal_lm, rows)).to(device)
        excluded = {"packed": "rows have images"} if batch.images_B else {}
        excluded |= _excluded_by_rope(causal_lm, longest)
        if "packed" not in excluded:
            _take(model, Preparation("packed", fused=False))
            if reason := _why_not_packed(causal_lm, batch):
                excluded["packed"] = reason
        _take(model, Preparation("alone", fused=False))
        expected = _untouched(causal_lm, batch)
        if recomputed:
            _recompute(model, recomputed == "selective")
        for way in (way for way in _ways(layout, compiled) if way.layout not in excluded):
            _take(model, way)
            trouble = _trouble(causal_lm, batch, expected)
            if not trouble:
                words = _words(way, layout, compiled, excluded) + _freeze_unreached(causal_lm, expected.reached)
                return replace(way, words=words)
            if way.compiled:
                _compile(model, disable=True)
            if not way.fused:  # nor was it right before
                excluded[way.layout] = f"{way.layout} rows of {name} {trouble}"
        if layout == "packed":
            problem = f"expected a model whose rows can be packed, found that {excluded['packed']}."
            raise LanguageModelError(name, problem, "Set model.layout: padded.")
        if recomputed and not _trouble(model.eval() and causal_lm, batch, expected):
            problem = f"expected layers of {name} to give the same when they are computed again, found others."
            raise ConfigError("model.gradient_checkpointing", problem, "Set it to false.")
        problem = (
            "expected logits that are the output head, scaled or soft-capped as the config says; found others: "
            f"{list(excluded.values())[-1]}."
        )
        raise LanguageModelError(name, problem, "Please report the architecture.")


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
        problem = (
            f"expected rows of at most {least} tokens, since its dynamic rotary frequencies follow the longest row "
            f"that was ever seen; found a limit of {longest}."
        )
        raise LanguageModelError(type(causal_lm).__name__, problem, "Lower data.max_length.")
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
    rows = PackedRows(batch.spans, batch.input_ids_S.device)
    last = max(batch.row_spans, key=lambda span: span.stop)
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


def _recompute(model: Any, selective: bool) -> None:
    """Has activations computed again in the backward pass, by the modules that do so, which ask whether they train.

    Those within them do not train: dropout, noise of routers and whatever else comes with it stay off.
    """
    kept = {"context_fn": partial(create_selective_checkpoint_contexts, _PRODUCTS)} if selective else {}
    try:
        model.gradient_checkpointing_enable({"use_reentrant": False, **kept})
    except ValueError as error:
        raise ConfigError("model.gradient_checkpointing", f"expected false, found true: {error}") from error
    model.enable_input_require_grads()
    for module in model.modules():
        module.training = getattr(module, "gradient_checkpointing", False) is True


@contextmanager
def _adapters_at_work(model: nn.Module) -> Iterator[None]:
    """Within it new adapters change what their layers give; one of their matrices is zero, which would hide them."""
    named = model.named_parameters()
    new = [(each, each.data) for name, each in named if "lora_" in name and not each.any()]
    generator = torch.Generator().manual_seed(0)
    for parameter, zeros in new:
        parameter.data = torch.randn(zeros.shape, generator=generator).mul_(0.02).to(zeros)
    try:
        yield
    finally:
        for parameter, zeros in new:
            parameter.data = zeros


@dataclass
class _Outcome:
    """Log-probs of tokens, gradients of a sum of them in some of what is trained, and which parameters they reach."""

    log_probs_N: Tensor
    gradients: list[Tensor]
    reached: set[Any]


def _outcome(causal_lm: Any, log_probs: Callable[[], Tensor]) -> _Outcome:
    keys = _keys(causal_lm)
    with first_layers(causal_lm), torch.enable_grad():
        trained = [each for each in causal_lm.parameters() if each.requires_grad and each.numel() <= _MOST_WEIGHTS]
        found_N = log_probs()
        reached = {keys[parameter] for parameter in _reached_from(found_N) if parameter in keys}
        weights_N = 1 + torch.arange(len(found_N), device=found_N.device) % 3 / 2  # gradients of rows do not cancel
        own = torch.autograd.grad(found_N, trained, weights_N, allow_unused=True) if trained else ()
    pairs = zip(own, trained, strict=True)
    return _Outcome(found_N.detach(), [torch.zeros_like(p) if g is None else g for g, p in pairs], reached)


def _reached_from(found_n: Tensor) -> Iterator[Tensor]:
    """Parameters that a gradient would flow to."""
    known: set[Any] = set()
    waiting = [found_n.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if node is not None and node not in known:
            known.add(node)
            waiting += [further for further, _ in node.next_functions]
            if hasattr(node, "variable"):
                yield node.variable


def _keys(causal_lm: Any) -> dict[Tensor, Any]:
    """The same for parameters at the same place in layers of a kind, or in modules that are numbered, such as experts.

    Not all layers are tried, and not every expert has a token of the rows that are.
    """
    layers, kinds = decoder_layers_of(causal_lm)[1], kinds_of_layers(causal_lm)
    kind_of = {each: kind for layer, kind in zip(layers, kinds, strict=True) for each in layer.parameters()}
    seeing = {each for part in seeing_parts_of(causal_lm).values() for each in part.parameters()}  # all are tried
    named = [
        (name if each in seeing else re.sub(r"\.\d+(?=\.)", ".*", name), each)
        for name, each in causal_lm.named_parameters()
    ]
    return {each: (kind_of.get(each), name) for name, each in named}


def _freeze_unreached(causal_lm: Any, reached: set[Any]) -> str:
    """Trains nothing that no row reaches, such as an adapter whose weight is read past it; but all that sees images."""
    keys, named = _keys(causal_lm), causal_lm.named_parameters()
    reached = reached | {keys[each] for part in seeing_parts_of(causal_lm).values() for each in part.parameters()}
    unreached = {name: each for name, each in named if each.requires_grad and keys[each] not in reached}
    for parameter in unreached.values():
        parameter.requires_grad_(False)
    if unreached and not any(parameter.requires_grad for parameter in keys):
        found = f"found none ({min(unreached)})."
        raise ConfigError("model.lora.target_modules", f"expected layers that rows go through, {found}")
    said = f"; {len(unreached)} parameters that no row reaches are not trained, such as {min(unreached, default='')}"
    return said if unreached else ""


def _untouched(causal_lm: Any, batch: FeedbackBatch) -> _Outcome:
    """By transformers alone: each row by itself."""

    def alone(number: int) -> Tensor:
        ids_1T, chosen_N = batch.input_ids_S[batch.row_spans[number].places()][None], batch.rows_N == number
        kept_n = batch.position_ids_S[batch.predictors_N[chosen_N]]
        some = _keeps_some_logits(causal_lm)
        options = {"logits_to_keep": kept_n} if some else {}
        options |= images_of(causal_lm, batch, ids_1T, [number])
        logits_nV = causal_lm(input_ids=ids_1T, use_cache=False, **options).logits[0]
        logits_nV = (logits_nV if some else logits_nV[kept_n]).float()
        found_n: Tensor = logits_nV.log_softmax(-1).gather(-1, batch.targets_N[chosen_N, None])[:, 0]
        return found_n

    try:
        return _outcome(causal_lm, lambda: torch.cat([alone(number) for number in range(len(batch))]))
    except Exception as error:  # whatever transformers makes of the model
        problem = f"expected a model that transformers trains, found {type(error).__name__}: {error}"
        raise LanguageModelError(type(causal_lm).__name__, problem) from error


def _keeps_some_logits(causal_lm: Any) -> bool:
    return "logits_to_keep" in inspect.signature(causal_lm.forward).parameters


def _trouble(causal_lm: Any, batch: FeedbackBatch, expected: _Outcome) -> str:
    """What is wrong with log-probs as the model computes them now, or nothing."""
    try:
        found = _outcome(causal_lm, lambda: completion_token_log_probs(causal_lm, batch))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever an architecture makes of what it is given
        return f"fail with {type(error).__name__}"
    device, expected_N = batch.targets_N.device.type, expected.log_probs_N
    weight = causal_lm.get_output_embeddings().weight
    exact = weight.dtype == torch.float32 and not torch.is_autocast_enabled(device)
    absolute, relative, of_each, of_all = _EXACT if exact else _ROUNDED
    both_nan = found.log_probs_N.isnan() & expected_N.isnan()  # which stops the run later, where it says for which row
    same_N = (found.log_probs_N == expected_N) | both_nan
    difference_N = torch.where(same_N, 0, found.log_probs_N - expected_N)
    squares_2B = expected_N.new_zeros(2, len(batch)).index_add_(
        1, batch.rows_N, torch.stack([difference_N, expected_N.nan_to_num()]).square()
    )
    difference_B, size_B = (squares_2B / batch.completion_lengths.clamp(min=1)).sqrt()
    if not bool((difference_B <= absolute + relative * size_B).all()):
        return "are not what rows are alone"
    total = sum(float(each.norm()) for each in expected.gradients)
    for gradient, right in zip(found.gradients, expected.gradients, strict=True):
        limit = of_each * right.norm() + of_all * total
        if limit.isfinite() and not (gradient - right).norm() <= limit:
            return "have other gradients than rows alone"
    return ""


def _rows_to_try(causal_lm: Any, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The given rows, shortest first, and another answer to the prompt of the first."""
    vocabulary = causal_lm.config.get_text_config().vocab_size
    most, whole = max(_MOST_LOGITS // vocabulary, 16), _keeps_some_logits(causal_lm)
    known = [_cut(row, most, whole) for row in rows] or _made_up(vocabulary)
    refuse_unknown_token(causal_lm, max(max(row["input_ids"]) for row in known))
    known.sort(key=lambda row: len(row["input_ids"]))
    first, second = known[0], known[len(known) // 2]
    place = first["completion_mask"].index(True)
    answer = second["input_ids"][second["completion_mask"].index(True) :]
    mask = [False] * place + [True] * len(answer)
    ids = [*first["input_ids"][:place], *answer]
    if not (first.get("later") or second.get("later")):
        known.append(_cut({"input_ids": ids, "completion_mask": mask, "seen": first.get("seen")}, most, whole))
    return [{**row, "thumbs_up": True, "row_id": 0} for row in known]


def _cut(row: Mapping[str, Any], most: int, whole: bool) -> dict[str, Any]:
    """A few of its tokens carry loss; where transformers makes logits of all, not ``whole``, there are ``most``."""
    stop = None if whole or row.get("seen") else most  # images are not cut
    ids, mask = list(row["input_ids"][:stop]), [bool(scored) for scored in row["completion_mask"][:stop]]
    if True not in mask[1:]:  # an answer to a long prompt
        mask = [False] + [True] * (len(ids) - 1)
    scored = [place for place, carries_loss in enumerate(mask) if carries_loss]
    kept = {*scored[:_SCORED], *scored[-_SCORED:]}
    scored_mask = [place in kept for place in range(len(ids))]
    return {"input_ids": ids, "completion_mask": scored_mask, "seen": row.get("seen"), "later": has_later_images(row)}


def _made_up(vocabulary: int) -> list[dict[str, Any]]:
    masks = [[place >= length // 3 for place in range(length)] for length in (6, 9, 24)]
    return [
        {"input_ids": [(7 * place + 3 * len(mask)) % vocabulary for place in range(len(mask))], "completion_mask": mask}
        for mask in masks
    ]
