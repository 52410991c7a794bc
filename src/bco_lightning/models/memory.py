"""What a training step takes of each GPU's memory, by formula; compared with steps on a CPU, never with a GPU's."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from torch import nn

from bco_lightning.errors import ConfigError, LanguageModelError
from bco_lightning.models.experts import experts_per_token, stacked_experts
from bco_lightning.models.layout import decoder_layers_of
from bco_lightning.models.load import NAMED_SHAPES, unloaded_model
from bco_lightning.models.log_probs import MOST_KEPT
from bco_lightning.models.useful_flops import query_width

Shape = tuple[int, ...]
_BYTES = {"float32": 4, "bfloat16": 2}
_TILE = (4096, 16384)  # of the logits on a GPU: models/log_probs.py
SHARE_TAKEN = 0.8  # of a memory, where tokens are chosen by it; the rest is for what formulas leave out
_MOST_TOKENS = 2**17  # of a micro-batch: with so many a GPU has nothing left to fill
_ADAM_8BIT = 1 + 4 / 256  # bytes of a moment: one, and a float32 scale for each block of 256


@dataclass(frozen=True)
class PlanOptions:
    """How a model is trained.

    Args:
        model: 8B, 70B or 405B (shapes of Llama 3.1), or a hub id, a folder, a .gguf file or package:NAME.
        gpus: GPUs in all.
        strategy: ddp keeps everything whole on each GPU, fsdp2 (or fsdp, the same) cuts up what can be cut.
        lora_r: Rank of the adapters; 0 trains all weights.
        dtype: Weights, or the frozen base under adapters; auto is float32 for full fine-tuning, bfloat16 for LoRA.
        precision: The trainer's; auto is bf16-mixed for full fine-tuning, 32-true for LoRA.
        optimizer: AdamW, all in bfloat16, or with moments of eight bits.
        reference: none where its log-probs are known or adapters are switched off, model for a second model.
        batch_size: Rows of a micro-batch on one GPU.
        max_length: Tokens of each row, prompt and completion; all rows are taken to be that long.
        completion_tokens: Tokens of each row that carry loss; a quarter of max_length if not given.
        gradient_checkpointing: Compute activations again in the backward pass; selective, but for what matrix
            products and attention gave.
        gpu_memory: GiB of one GPU.
    """

    model: str | None = None
    gpus: PositiveInt = 1
    strategy: Literal["ddp", "fsdp", "fsdp2"] = "fsdp2"
    lora_r: NonNegativeInt = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    optimizer: Literal["adamw", "adamw_bf16", "adamw_8bit"] = "adamw"
    reference: Literal["none", "model"] = "none"
    batch_size: PositiveInt = 1
    max_length: PositiveInt = 4096
    completion_tokens: PositiveInt | None = None
    gradient_checkpointing: bool | Literal["selective"] = False
    gpu_memory: PositiveFloat = 80.0


def memory_of(options: PlanOptions, tile: tuple[int, int] = _TILE, model: Any = None) -> dict[str, float]:
    """What one GPU holds at the peak of a training step, in bytes by part; ``model`` is the one named, if it is there.

    Weights, gradients, moments and the reference are there all the time; gathered weights, gradients in transit, copies
    of weights, activations and the head (``tile`` rows and columns of logits at a time) come and go: here they are as
    at the moment at which they are most.
    """
    if options.model is None:
        raise ConfigError("--model", "expected a model, found none.", f"Give {', '.join(NAMED_SHAPES)}, or a name.")
    completion = options.completion_tokens or max(1, options.max_length // 4)
    if completion >= options.max_length:
        expected = f"expected fewer than --max_length {options.max_length}, found {completion}."
        raise ConfigError("--completion_tokens", expected, "A row is its prompt and its completion.")
    tokens, scored = options.batch_size * options.max_length, options.batch_size * completion
    base, linear, experts, config, norms = _shapes(options.model, model)
    rank, is_full, num_layers = options.lora_r, not options.lora_r, config.num_hidden_layers
    own = _BYTES[options.dtype] if options.dtype != "auto" else 4 if is_full else 2
    mixed = options.precision == "bf16-mixed" or (options.precision == "auto" and is_full)
    item, cut = 2 if mixed else own, 1 if options.strategy == "ddp" else options.gpus
    adapters = [shape for out, into in linear.values() if rank for shape in ((rank, into), (out, rank))]
    ranks = [rank * each[0] * (2 if "gate_up" in name else 1) for name, each in experts.items() if rank]
    adapters += [shape for r, e in zip(ranks, experts.values(), strict=False) for shape in ((r, e[2]), (e[1], r))]
    trained = own * _elements(base, cut) if is_full else 4 * _elements(adapters, cut)
    of_moment = 1.0 if options.optimizer != "adamw_8bit" else _ADAM_8BIT / (own if is_full else 4)
    always = {
        "weights": own * _elements(base, cut) + 4 * _elements(adapters, cut),
        "gradients": trained,
        "optimizer": 2 * trained * of_moment,
        "reference": own * _elements(base, cut) if options.reference == "model" else 0,
    }
    # FSDP gathers all but the layers for the whole pass, and the next layer while one is at work. Gradients of a layer
    # are summed over GPUs, in float32, while those of the next come up; the head's waits for the end of the pass.
    layer = _elements([*linear.values(), *experts.values()], 1) // num_layers
    root = own * (_elements(base, 1) - layer * num_layers) if cut > 1 else 0
    head_gradient = own * config.hidden_size * config.vocab_size if is_full else 0
    # Autocast copies float32 weights; the backward pass needs the copies, and autocast keeps them until it begins.
    copies = 2 * layer * (num_layers if mixed and cut == 1 and own == 4 else 0)
    if rank:  # PEFT adds an expert's adapter to its weight in each pass, and the sum is kept
        copies += item * _elements(experts.values(), 1)
    kept, work = _activations(config, norms, linear, experts, own, item, rank)
    state = own * config.hidden_size
    products = item * (sum(out for out, _ in linear.values()) // num_layers + query_width(config))
    stays = state + (products if options.gradient_checkpointing == "selective" else 0)
    layers = tokens * (state + num_layers * (stays if options.gradient_checkpointing else kept))
    at_head = {
        "gathered weights": root and root + item * layer,
        "gradients in transit": head_gradient,
        "copies of weights": copies if is_full or not options.gradient_checkpointing else 0,
        "activations": layers,
        "head": _head(scored, config, item, is_full, tile),
    }
    in_layer = {
        "gathered weights": root and root + 2 * item * layer,
        "gradients in transit": (head_gradient + 4 * layer) if cut > 1 and is_full else 0,
        "copies of weights": copies // (num_layers if options.gradient_checkpointing else 1),
        "activations": layers + tokens * (work + (kept - state if options.gradient_checkpointing else 0)),
    }
    at_start = {"gathered weights": root and 2 * (root + item * layer)}  # into a buffer, and out of it
    return always | max(at_start, at_head, in_layer, key=lambda moment: sum(moment.values()))


def tokens_within(memory: float, options: PlanOptions, tile: tuple[int, int] = _TILE, model: Any = None) -> int:
    """The most tokens of a micro-batch, in rows of ``max_length``, for which a step takes so many bytes; 0 if none."""
    model = unloaded_model(str(options.model)) if model is None else model
    rows = range(1, _MOST_TOKENS // options.max_length + 1)
    most = bisect_right(
        rows, memory, key=lambda number: sum(memory_of(replace(options, batch_size=number), tile, model).values())
    )
    return int(options.max_length * most)


def _shapes(name: str, model: Any) -> tuple[list[Shape], dict[str, Shape], dict[str, Shape], Any, int]:
    """Shapes of all weights, of linear layers and of experts in the decoder, the config, norms of a decoder layer."""
    model = unloaded_model(name) if model is None else model
    layers, config = decoder_layers_of(model)[1], model.config.get_text_config()
    linear = {place: tuple(part.weight.shape) for place, part in layers.named_modules() if type(part) is nn.Linear}
    experts = {place: tuple(weight.shape) for place, weight in stacked_experts(layers).items()}
    names = {place.rpartition(".")[2] for place in (*linear, *experts)}
    if not ("q_proj" in names and names & {"gate_proj", "gate_up_proj"}):
        raise LanguageModelError(
            name,
            f"expected decoder layers with q_proj and gate_proj, found {', '.join(sorted(names)) or 'others'}.",
            "Plans, and data.tokens_per_micro_batch: auto, are made for Llama, Mistral, Qwen 2 and 3, Gemma, SmolLM "
            "and models like these.",
        )
    norms = sum("norm" in place and p.shape == (config.hidden_size,) for place, p in layers[0].named_parameters())
    return [tuple(p.shape) for p in model.parameters()], linear, experts, config, norms


def _elements(shapes: Iterable[Shape], cut: int) -> int:
    """Elements on the first GPU; FSDP2 cuts a tensor along its first dimension."""
    return sum(math.ceil(shape[0] / cut) * math.prod(shape[1:]) for shape in shapes)


def _activations(
    config: Any, norms: int, linear: dict[str, Shape], experts: dict[str, Shape], own: int, item: int, rank: int
) -> tuple[int, int]:
    """Bytes of one token: what a decoder layer keeps for its backward pass, and what that needs besides.

    Of experts a token meets those that it is sent to, whose inputs and outputs are copies of its own and are kept, as
    all factors of their gates are. Layers differ, and a mean is told.

    Kept are the input of each norm and a float32 scale; inputs of linear layers, one for each where autocast casts
    those of layers without adapters; queries, keys, values and what attention gives; gate and up. The backward pass has
    gradients of these, and those of the residual stream.
    """
    hidden, wide, layers, routed = config.hidden_size, config.intermediate_size, config.num_hidden_layers, 0
    if experts:
        sent, matrices = experts_per_token(config, 1), sum(math.prod(shape[1:]) for shape in experts.values())
        routed = sent * matrices // (3 * hidden * layers)
        wide = routed + sum(out for place, (out, _) in linear.items() if place.endswith("gate_proj")) // layers
        routed = item * (2 * routed + 3 * hidden * sent * sum("down" in name for name in experts) // layers)
    groups = config.num_attention_heads // (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    attention = 2 * item * query_width(config) * (groups + 1) // groups
    inputs = (5 if own != item and not rank else 2) * item * hidden
    kept = norms * (own * hidden + 4) + inputs + attention + 2 * item * wide + 7 * rank * item + routed
    gradients = own * hidden + (item * hidden if own != item else 0)
    return kept, max(6 * item * wide + gradients, (12 + 2 * own) * hidden)


def _head(scored: int, config: Any, item: int, is_full: bool, tile: tuple[int, int]) -> int:
    """Bytes of the states that meet the head, of their gradients, and of tiles of logits; never all logits."""
    hidden, vocabulary = int(config.hidden_size), int(config.vocab_size)
    rows, columns = min(scored, tile[0]), min(vocabulary, tile[1])
    kept = 4 * scored * vocabulary if is_full and scored * vocabulary <= MOST_KEPT else 0  # softmax numerators
    weights = columns * hidden * (4 + item) if is_full else 0
    return kept + scored * hidden * (8 + 2 * item) + 8 * rows * columns + weights
