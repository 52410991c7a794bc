"""Memory of one GPU in a training step, worked out from the model's shapes, before any weight is loaded.

What is counted is what this package's code keeps: weights, gradients and moments, whole or cut up; what FSDP gathers;
what the layers keep for the backward pass and need in it; the head's tiles. A step has a few moments at which most is
alive, and the plan is the worst of them.

What is left out: the CUDA context (0.5 to 1 GiB), buffers of NCCL and cuBLAS, what the allocator loses between blocks,
soft caps of logits, and masks of sliding windows. Tests compare plans with the tensors of small runs on a CPU; on GPUs
nothing was measured. FSDP1 is planned more coarsely: under bf16-mixed up to a quarter low with few tokens.

Letters: ``S`` packed tokens of a micro-batch, ``N`` those that carry loss, ``H`` hidden size, ``A`` size of all heads,
``I`` size of the feed-forward layer, ``V`` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch

from bco_lightning.errors import ConfigError
from bco_lightning.models.log_probs import Tile
from bco_lightning.planning.model_shape import LINEARS, ModelShape, Weight

Strategy = Literal["ddp", "fsdp", "fsdp2"]
PlannedDtype = Literal["auto", "float32", "bfloat16"]
PlannedPrecision = Literal["auto", "32-true", "bf16-mixed"]
PlannedOptimizer = Literal["adamw", "adamw_8bit"]
PlannedReference = Literal["none", "model"]

GIB = 2**30
_ITEM = {"float32": 4, "bfloat16": 2}
_ADAM_8BIT = 1 + 4 / 256  # bytes of a moment: one, and a float32 scale for each block of 256
_ADAM_8BIT_FROM = 4096  # smaller tensors keep float32 moments
_GPU_TILE = Tile.for_device(torch.device("cuda"))


@dataclass(frozen=True)
class MemorySettings:
    """How the model is trained.

    Args:
        gpus: Processes, one for each GPU.
        strategy: ``ddp`` keeps everything whole on each GPU; ``fsdp`` and ``fsdp2`` cut up weights, gradients, moments
            and a reference model.
        lora_r: Rank of adapters beside all linear layers but the head; 0 trains all weights.
        dtype: Weights, or the frozen base under adapters, which are float32; ``auto`` is float32 for full fine-tuning
            and bfloat16 for LoRA, as the package has it on a GPU that computes in bfloat16.
        precision: The trainer's; ``auto`` is bf16-mixed for full fine-tuning and 32-true for LoRA.
        optimizer: ``adamw``, or with moments of eight bits.
        batch_size: Rows of a micro-batch on one GPU.
        max_length: Tokens of each row, prompt and completion; the plan takes all rows for that long.
        completion_tokens: Tokens of each row that carry loss.
        gradient_checkpointing: Whether activations are computed again in the backward pass.
        reference: ``none`` where log-probs are cached or adapters are switched off, ``model`` for a second model.
        cpu_offload: Whether what FSDP cuts up is kept in host memory.
        tile: How much of the logits exists at a time; that of GPUs if left out.
    """

    gpus: int = 1
    strategy: Strategy = "fsdp2"
    lora_r: int = 0
    dtype: PlannedDtype = "auto"
    precision: PlannedPrecision = "auto"
    optimizer: PlannedOptimizer = "adamw"
    batch_size: int = 1
    max_length: int = 4096
    completion_tokens: int = 1024
    gradient_checkpointing: bool = False
    reference: PlannedReference = "none"
    cpu_offload: bool = False
    tile: Tile = _GPU_TILE

    def __post_init__(self) -> None:
        for option in ("gpus", "batch_size", "max_length", "completion_tokens"):
            if getattr(self, option) < 1:
                raise ConfigError(f"--{option}", f"expected a whole number above 0, found {getattr(self, option)}.")
        if self.lora_r < 0:
            raise ConfigError("--lora_r", f"expected a rank, or 0 for full fine-tuning, found {self.lora_r}.")
        if self.completion_tokens >= self.max_length:
            raise ConfigError(
                "--completion_tokens",
                f"expected fewer than --max_length {self.max_length}, found {self.completion_tokens}.",
                "A row is its prompt and its completion.",
            )
        for option, choices in _CHOICES.items():
            if getattr(self, option) not in get_args(choices):
                known = ", ".join(get_args(choices))
                raise ConfigError(f"--{option}", f"expected one of {known}, found {getattr(self, option)!r}.")
        if self.cpu_offload and self.strategy == "ddp":
            raise ConfigError("--cpu_offload", "expected fsdp or fsdp2, found ddp, which has no such option.")
        if self.strategy == "fsdp" and self.lora_r and self.dtype == "bfloat16" and not self.is_mixed:
            raise ConfigError(
                "--dtype",
                "expected float32 for adapters under fsdp, which keeps one data type in each layer; found bfloat16.",
                "Use --strategy fsdp2, or --precision bf16-mixed.",
            )

    @property
    def is_sharded(self) -> bool:
        """Whether weights are cut up."""
        return self.strategy != "ddp"

    @property
    def is_mixed(self) -> bool:
        """Whether layers compute in bfloat16 by autocast."""
        return self.precision == "bf16-mixed" or (self.precision == "auto" and not self.lora_r)

    @property
    def weight_bytes(self) -> int:
        """Bytes of one weight, of the residual stream and of the input of norms."""
        by_itself = "bfloat16" if self.lora_r and self.strategy != "fsdp" else "float32"
        return _ITEM[by_itself if self.dtype == "auto" else self.dtype]

    @property
    def gathers(self) -> bool:
        """Whether whole weights come and go."""
        return self.is_sharded and self.gpus > 1

    @property
    def compute_bytes(self) -> int:
        """Bytes of one element of what linear layers take and give."""
        return _ITEM["bfloat16"] if self.is_mixed else self.weight_bytes

    @property
    def tokens(self) -> int:
        """Packed tokens ``S`` of a micro-batch."""
        return self.batch_size * self.max_length

    @property
    def scored_tokens(self) -> int:
        """Tokens ``N`` of a micro-batch that carry loss."""
        return self.batch_size * self.completion_tokens


_CHOICES: dict[str, Any] = {
    "strategy": Strategy,
    "dtype": PlannedDtype,
    "precision": PlannedPrecision,
    "optimizer": PlannedOptimizer,
    "reference": PlannedReference,
}


@dataclass(frozen=True)
class Moment:
    """What is alive at one moment of a step besides what always is; all in bytes.

    Args:
        name: For people.
        gathered: Whole weights of the units that FSDP has gathered, and of those on their way.
        gradients_in_transit: Gradients of whole weights that are not yet cut up, or not yet added to others.
        weight_copies: Copies of weights in the data type of the computation.
        activations: What layers keep for the backward pass, and what the layer at work needs.
        head: Tiles of the logits and what goes with them.
    """

    name: str
    gathered: int = 0
    gradients_in_transit: int = 0
    weight_copies: int = 0
    activations: int = 0
    head: int = 0

    @property
    def total(self) -> int:
        """Bytes of all of them."""
        return sum(getattr(self, field.name) for field in fields(self)[1:])


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of one GPU, in bytes; of the first one, which has the most where parts do not come out even.

    Args:
        weights: Of the policy.
        gradients: Of what is trained, for the whole of a step, as where micro-batches add up.
        optimizer: Moments.
        reference: A second model.
        moments: What comes and goes.
        host: What is kept in host memory instead, for each process.
    """

    weights: int
    gradients: int
    optimizer: int
    reference: int
    moments: tuple[Moment, ...]
    host: int = 0

    @property
    def resident(self) -> int:
        """What is there all the time."""
        return self.weights + self.gradients + self.optimizer + self.reference

    @property
    def peak(self) -> Moment:
        """The moment at which most is alive."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def total(self) -> int:
        """All that is alive at the peak."""
        return self.resident + self.peak.total

    def parts(self, moment: Moment | None = None) -> dict[str, int]:
        """Bytes by part at a moment, the peak if left out."""
        chosen = moment or self.peak
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "reference": self.reference,
            "gathered weights": chosen.gathered,
            "gradients in transit": chosen.gradients_in_transit,
            "copies of weights": chosen.weight_copies,
            "activations": chosen.activations,
            "head": chosen.head,
        }

    def fits(self, gpu_memory: float) -> bool:
        """Whether it fits into so many GiB."""
        return self.total <= gpu_memory * GIB


def plan_memory(shape: ModelShape, settings: MemorySettings) -> MemoryPlan:
    """Memory of one GPU in a training step.

    Args:
        shape: The model, by :func:`~bco_lightning.planning.model_shape.shape_of`.
        settings: How it is trained.

    Returns:
        Bytes by part.
    """
    units = [_unit(weights, settings, is_layer=True) for weights in shape.layers]
    root = _unit(shape.root, settings, is_layer=False)
    everything = [*units, root]
    weights = sum(unit.weights for unit in everything)
    gradients = sum(unit.gradients for unit in everything)
    optimizer = sum(unit.moments for unit in everything)
    reference = 0
    if settings.reference == "model":
        reference = sum(unit.base for unit in everything)
    kept_in_host = settings.cpu_offload
    return MemoryPlan(
        weights=0 if kept_in_host else weights,
        gradients=0 if kept_in_host else gradients,
        optimizer=0 if kept_in_host else optimizer,
        # Its root is whole for its own pass alone, under FSDP1 longer; to be safe it is counted at every moment.
        reference=(0 if kept_in_host else reference) + (root.gathered if reference else 0),
        moments=_moments(shape, settings, units, root),
        host=weights + gradients + optimizer + reference if kept_in_host else 0,
    )


# --- weights


@dataclass(frozen=True)
class _Unit:
    """Bytes of what FSDP gathers at a time: a decoder layer, or what is outside of them."""

    base: int  # this process's part of the model's own weights
    weights: int  # the same with adapters
    gradients: int
    moments: int
    gathered: int  # whole; nothing where nothing is cut up
    whole_gradients: int  # of whole weights; of the largest one where nothing is cut up
    reduced_gradients: int  # the same in the data type in which they are summed over processes
    copies: int  # of weights, in the data type of the computation, kept for the backward pass
    cached: int  # the part of these that autocast keeps until the forward pass ends, needed or not


def _unit(weights: Sequence[Weight], settings: MemorySettings, *, is_layer: bool) -> _Unit:
    own = settings.weight_bytes
    base = [(weight.shape, own) for weight in weights]
    adapters = [(shape, 4) for weight in weights if is_layer for shape in _adapter(weight, settings.lora_r)]
    trained = adapters if settings.lora_r else base
    # FSDP1 makes one tensor of a unit, whose gradient has room for frozen weights too.
    with_gradient = [*base, *adapters] if trained and settings.strategy == "fsdp" and settings.gathers else trained
    # FSDP gathers decoder layers in what they compute in, and sums gradients in float32 then.
    lowered = settings.gathers and settings.is_mixed and is_layer
    sent, summed = (2, 4) if lowered else (None, None)
    copies = _copies(weights, settings) if is_layer else 0
    return _Unit(
        base=_part(base, settings),
        weights=_part([*base, *adapters], settings),
        gradients=_part(with_gradient, settings),
        moments=sum(_moments_of_tensor(shape, item, settings) for shape, item in trained),
        gathered=_whole([*base, *adapters], settings, sent) if settings.gathers else 0,
        whole_gradients=_whole(with_gradient, settings, sent)
        if settings.gathers
        else max((math.prod(shape) * item for shape, item in trained), default=0),
        reduced_gradients=_whole(with_gradient, settings, summed) if settings.gathers else 0,
        copies=copies,
        cached=0 if settings.lora_r else copies,
    )


def _adapter(weight: Weight, rank: int) -> list[tuple[int, ...]]:
    if not weight.is_linear or not rank:
        return []
    rows, columns = weight.shape
    return [(rank, columns), (rows, rank)]


def _own_elements(shape: tuple[int, ...], settings: MemorySettings) -> int:
    """Elements of a tensor on the first GPU: FSDP2 cuts along the first dimension, FSDP1 wherever it comes."""
    if not settings.is_sharded:
        return math.prod(shape)
    if settings.strategy == "fsdp":
        return math.ceil(math.prod(shape) / settings.gpus)
    return math.ceil(shape[0] / settings.gpus) * math.prod(shape[1:])


def _part(tensors: Iterable[tuple[tuple[int, ...], int]], settings: MemorySettings) -> int:
    return sum(_own_elements(shape, settings) * item for shape, item in tensors)


def _whole(tensors: Iterable[tuple[tuple[int, ...], int]], settings: MemorySettings, item: int | None) -> int:
    """Bytes of gathered tensors: every process sends as much as the first one has."""
    return sum(settings.gpus * _own_elements(shape, settings) * (item or own) for shape, own in tensors)


def _moments_of_tensor(shape: tuple[int, ...], item: int, settings: MemorySettings) -> int:
    elements = _own_elements(shape, settings)
    if settings.optimizer == "adamw":
        return 2 * elements * item
    return int(2 * elements * (4 if math.prod(shape) < _ADAM_8BIT_FROM else _ADAM_8BIT))


def _copies(weights: Sequence[Weight], settings: MemorySettings) -> int:
    """Bytes of a decoder layer's weights in the data type of the computation, which its backward pass needs."""
    linear = [weight for weight in weights if weight.is_linear]
    adapters = [_adapter(weight, settings.lora_r) for weight in linear if settings.lora_r]
    if not settings.is_mixed:  # models/adapters.py casts A, and casts and scales B
        low, high = (sum(math.prod(pair[place]) for pair in adapters) for place in (0, 1))
        return settings.compute_bytes * (high + (low if settings.compute_bytes != 4 else 0))
    if settings.gathers:
        return 0  # gathered as they are needed
    # models/fused_layers.py casts the last layer of the feed-forward part again in the backward pass.
    cast = [weight.shape for weight in linear if settings.lora_r or weight.name != "down_proj"]
    elements = sum(math.prod(shape) for shape in cast) if settings.weight_bytes != 2 else 0
    return 2 * (elements + sum(math.prod(shape) for pair in adapters for shape in pair))


# --- activations


def _kept_by_layer(shape: ModelShape, settings: MemorySettings) -> int:
    """Bytes of one token that a decoder layer keeps for its backward pass."""
    residual, item, rank = settings.weight_bytes, settings.compute_bytes, settings.lora_r
    # Each norm: its input and a float32 scale. Where autocast casts, each linear layer keeps its own copy of its input.
    norms = shape.norms * (residual * shape.hidden + 4)
    inputs = (5 if residual != item else 2) * item * shape.hidden
    # Queries; keys and values, repeated for all heads; what attention gives, row by row and joined; a logsumexp.
    attention = 5 * item * shape.attention + 4 * shape.heads
    if shape.head_norms:
        attention += item * (shape.attention + shape.key_value)
    # The fused layer: gate and up. Under adapters also the activated gate and the product.
    feed_forward = (4 if rank else 2) * item * shape.feed_forward
    return norms + inputs + attention + feed_forward + len(LINEARS) * rank * item


def _casts_for_adapters(settings: MemorySettings) -> bool:
    """Whether PEFT, which computes adapters under autocast, casts to their float32 what autocast then casts back."""
    return settings.lora_r > 0 and settings.is_mixed and not settings.gathers


def _forward_work(shape: ModelShape, settings: MemorySettings) -> int:
    """Bytes of one token that the last layer's forward pass needs besides what is kept."""
    residual, item = settings.weight_bytes, settings.compute_bytes
    # The activated gate and the product, which adapters keep; an adapter may have it cast.
    passing = (0 if settings.lora_r else 2 * item) + (4 if _casts_for_adapters(settings) else 0)
    if settings.gradient_checkpointing:  # nothing is kept, but these four, or three, are there; and the states
        passing += (3 if settings.lora_r else 2) * item
        return passing * shape.feed_forward + (residual + item) * shape.hidden
    return passing * shape.feed_forward


def _backward_work(shape: ModelShape, settings: MemorySettings) -> tuple[int, int]:
    """Bytes of one token that a layer's backward pass needs besides what is kept: in its last part, and in its first.

    Backward, the last part comes first.
    """
    residual, item = settings.weight_bytes, settings.compute_bytes
    gradients = residual * shape.hidden + (item * shape.hidden if residual != item else 0)
    if not settings.lora_r:  # gradients of gate, up and product, the product, the activated gate, a term of a sum
        feed_forward = 6 * item * shape.feed_forward + gradients
    elif _casts_for_adapters(settings):  # a gradient in float32 and cast back
        feed_forward = (4 + item) * shape.feed_forward + gradients
    else:
        feed_forward = 2 * item * shape.feed_forward + gradients
    # Input, product and gradient in float32, the gradient that comes and the one that goes.
    norm = (12 + 2 * residual) * shape.hidden
    return max(feed_forward, norm), norm


def _kept_besides_layers(shape: ModelShape, settings: MemorySettings) -> int:
    """Bytes of what the last norm and the rotary embedding keep."""
    residual = settings.weight_bytes * shape.hidden
    rotary = 2 * settings.weight_bytes * shape.attention // shape.heads
    return settings.tokens * (residual + 4 + rotary)


# --- the head


def head_memory(shape: ModelShape, settings: MemorySettings) -> tuple[int, int, int]:
    """What the head keeps for the backward pass, and all that it has alive in the forward and in the backward pass.

    The gradient of its whole weight is not among them: it is a gradient in transit.

    Args:
        shape: The model.
        settings: How it is trained; adapters leave the head frozen.

    Returns:
        Bytes: kept, forward, backward.
    """
    item, rows = settings.compute_bytes, min(settings.scored_tokens, settings.tile.rows)
    columns = min(shape.vocabulary, settings.tile.columns)
    more_columns = shape.vocabulary > columns
    states = settings.scored_tokens * shape.hidden
    kept, tile, slice_ = item * states, 4 * rows * columns, columns * shape.hidden
    # Autocast casts the hidden states, and the head a slice of its weight at a time.
    is_cast = item != settings.weight_bytes
    given, cast = settings.weight_bytes * states + (kept if is_cast else 0), item * slice_ if is_cast else 0
    # A new tile, or slice, is there before the name of the last one is given to it.
    next_tile = tile if more_columns or settings.scored_tokens > rows else 0
    product = tile // 2 + 2 * rows * shape.hidden if item == 2 else 0
    if settings.lora_r:
        # The forward pass finds the gradients: logits weighted into a float32 mean, then taken from the targets' rows.
        last = 8 * states + (kept if item == 2 else 0)
        forward = given + 4 * states + tile + cast + max(next_tile, product, cast if more_columns else 0, last)
        return kept, forward, kept + 4 * states + (kept if item == 2 else 0)
    forward = given + tile + cast + max(next_tile, cast if more_columns else 0)
    product = max(product, tile // 2 + 2 * slice_ if item == 2 else 0)
    passing = max(next_tile, product, cast + 4 * slice_ if more_columns else 0)
    return kept, forward, kept + 4 * states + 4 * slice_ + tile + cast + passing


# --- moments


def _moments(shape: ModelShape, settings: MemorySettings, units: Sequence[_Unit], root: _Unit) -> tuple[Moment, ...]:
    """The moments of a step that may be its peak.

    FSDP leaves the root whole from the first layer to the end of the backward pass, and its gradient too. FSDP2 gathers
    a unit into a buffer and cuts it out of there; forward, the buffer stays until the next unit is cut out; backward,
    the next one is filled while a layer computes. Gradients of one layer are summed over processes while those of the
    next come up.
    """
    largest = max(units, key=lambda unit: unit.gathered)
    buffer = largest.gathered if settings.strategy == "fsdp2" else 0
    _, head_forward, head_backward = head_memory(shape, settings)
    forward, (backward, first_norm) = _forward_work(shape, settings), _backward_work(shape, settings)
    layer = residual = settings.tokens * settings.weight_bytes * shape.hidden
    copies = copies_then = sum(unit.copies for unit in units)
    if settings.gradient_checkpointing:
        # Computed again; the first norm keeps the state that is kept already.
        backward += _kept_by_layer(shape, settings) - settings.weight_bytes * shape.hidden
        copies, copies_then = largest.copies, sum(unit.cached for unit in units)
    else:
        layer = settings.tokens * _kept_by_layer(shape, settings)
    kept = _kept_besides_layers(shape, settings) + len(units) * layer
    heads = sum(weight.shape[:1] == (shape.vocabulary,) for weight in shape.root)  # an embedding is as large
    head_gradient = root.whole_gradients // (heads if settings.gathers else 1)
    waiting = head_gradient if settings.gathers else 0
    begun = kept - layer if len(units) > 1 else kept  # one layer has been through the backward pass, or none yet
    reduced = largest.reduced_gradients if len(units) > 1 else 0
    two = root.gathered + 2 * largest.gathered
    return (
        Moment("forward: first layer gathered", 2 * (root.gathered + buffer) if buffer else 0),
        Moment("forward: last layer gathered", two + buffer, 0, copies_then, kept - layer + residual),
        Moment("forward: last layer", two, 0, copies_then, kept + settings.tokens * forward),
        Moment("forward: head", two - largest.gathered, 0, copies_then, kept, head_forward),
        Moment(
            "backward: head",
            two - largest.gathered,
            head_gradient,
            0 if settings.gradient_checkpointing else copies,
            kept,
            head_backward,
        ),
        Moment("backward: last layer", two, waiting, copies, kept + settings.tokens * backward),
        Moment("backward: next layer", two, waiting + reduced, copies, begun + settings.tokens * backward),
        Moment(
            "backward: end of a layer",
            two,
            waiting + largest.whole_gradients + reduced,
            copies,
            begun - layer + residual + settings.tokens * first_norm,
        ),
        Moment("backward: root", 0, root.whole_gradients + root.reduced_gradients),
    )
