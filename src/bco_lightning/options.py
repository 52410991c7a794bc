"""What a user can set: each option states its type, default, range and meaning here, and nowhere else.

The command line with its help, ``hyper_parameters``, what is refused, and what a change means on resume follow from it.
"""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import date
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from typing_extensions import dataclass_transform

from bco_lightning.errors import ConfigError, check_choice

Dtype = Literal["auto", "float32", "bfloat16"]
Quantization = Literal["none", "nf4"]
OptimizerName = Literal["adamw", "adamw_bf16", "adamw_8bit", "paged_adamw_8bit"]
ObjectiveName = Literal["bco", "bce", "kto", "apo_zero", "kldo", "una", "dpo", "ipo", "nca", "sft"]
OnResume = Literal["refused", "told", "free"]

REFERENCE = "reference"
DEFAULT_CLIP = (0.1, 10.0)

_Kind = TypeVar("_Kind", bound="Options")


def _is_day(value: Any) -> bool:
    with suppress(ValueError):
        return len(value) == 10 and bool(date.fromisoformat(value))
    return False


@dataclass(frozen=True)
class Range:
    """What an option may be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]

    def check(self, option: str, value: Any) -> None:
        """Refuses what lies outside."""
        if not self.holds(value):
            raise ConfigError(option, f"expected {self.words}, found {value}.")


POSITIVE = Range("a number above 0", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Range("a number of at least 0", lambda value: 0 <= value < math.inf)
SHARE = Range("a share from 0 to 1", lambda value: 0 <= value <= 1)
SHARE_BELOW_1 = Range("a share from 0 to below 1", lambda value: 0 <= value < 1)
DAY = Range("a day as YYYY-MM-DD", _is_day)
DECAY = Range("a number from 0 to below 1", lambda value: 0 <= value < 1)
TWO_WEIGHTS = Range("two numbers above 0", lambda pair: len(pair) == 2 and all(0 < value < math.inf for value in pair))
CLIP = Range(
    "0 < low <= 1 <= high, not both 1", lambda clip: 0 < clip[0] <= 1 <= clip[1] < math.inf and clip[0] < clip[1]
)


def at_least(least: int, what: str) -> Range:
    """The range of a count, such as ``at least 1 row``."""
    return Range(f"at least {least} {what}", lambda value: value >= least)


def option(
    help: str,  # noqa: A002 - the word that argparse has for it
    *,
    default: Any = MISSING,
    default_factory: Any = MISSING,
    fits: Range | None = None,
    on_resume: OnResume = "told",
) -> Any:
    """One field of a class of options: its help and range, and what becomes of a run that goes on with another value.

    That is ``refused``, since the numbers would be those of another run; ``told``, since some change it on purpose; or
    ``free``, since the option decides how a number is come by and not which. ``None`` is in every range.
    """
    metadata = {"help": help, "fits": fits, "on_resume": on_resume}
    return field(default=default, default_factory=default_factory, metadata=metadata)


@dataclass_transform(frozen_default=True, field_specifiers=(option,))
def options(name: str) -> Callable[[type[_Kind]], type[_Kind]]:
    """Makes a frozen dataclass whose docstring tells each option; in messages ``name`` stands before its fields."""

    def decorate(kind: type[_Kind]) -> type[_Kind]:
        kind = dataclass(frozen=True)(kind)
        kind.option_name = name
        told = [(kind.__doc__ or "").strip(), "\nArgs:"]
        for each in fields(kind):
            fits = each.metadata["fits"]
            text = f"{each.name}: {each.metadata['help']}{f' Range: {fits.words}.' if fits else ''}"
            told.append(textwrap.fill(text, 112, initial_indent=" " * 4, subsequent_indent=" " * 8))
        kind.__doc__ = "\n".join([*told, "\nRaises:\n    ConfigError: If one is out of range.\n"])
        return kind

    return decorate


@dataclass(frozen=True)  # or jsonargparse would take its subclasses for classes to be named by their path
class Options:
    """What classes of options have in common: plain values are taken for what they stand for, and all are checked."""

    option_name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for each in fields(self):
            hint = hints[each.name]  # a type, or a union of some
            members = get_args(hint) if get_origin(hint) not in (None, Literal, tuple, list, dict) else (hint,)
            self._set(each.name, value := _from_plain(getattr(self, each.name), members))
            where = f"{self.option_name}.{each.name}"
            words = [word for member in members if get_origin(member) is Literal for word in get_args(member)]
            if words and isinstance(value, str) and str not in members:
                check_choice(where, value, words)
            elif value is not None and each.metadata["fits"]:
                each.metadata["fits"].check(where, value)
        self.check()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # frozen for everyone else

    def check(self) -> None:
        """Refuses options that are each in their range, and do not go together."""

    def plain(self) -> dict[str, Any]:
        """All values as numbers, texts, lists and dictionaries; the class takes them back."""
        return {name: _to_plain(value) for name, value in asdict(self).items()}

    @classmethod
    def names(cls, on_resume: OnResume) -> tuple[str, ...]:
        """The options of which a run that goes on does this with a change."""
        return tuple(each.name for each in fields(cls) if each.metadata["on_resume"] == on_resume)


def _from_plain(value: Any, members: tuple[Any, ...]) -> Any:
    if isinstance(value, Mapping):
        kinds = [each for each in members if isinstance(each, type) and issubclass(each, Options)]
        return kinds[0](**value) if kinds else value
    takes_tuple = any(get_origin(each) is tuple for each in members)
    return tuple(value) if takes_tuple and isinstance(value, list) else value


def _to_plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _to_plain(part) for name, part in value.items()}
    return [_to_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def chosen_seed(seed: int | None) -> int:
    """The seed given, else that of Lightning's ``seed_everything``, else 0."""
    return seed if seed is not None else int(os.environ.get("PL_GLOBAL_SEED", "0"))


# --- the model


@options("model.lora")
class LoraSettings(Options):
    """Low-rank adapters instead of full fine-tuning."""

    r: int = option("Rank of each adapter.", default=16, fits=at_least(1, "dimension"))
    alpha: int = option("Scale; an adapter's output is multiplied by ``alpha / r``.", default=32)
    target_modules: str = option(
        "``all-linear``, or a comma-separated list of module names such as ``q_proj,v_proj``.", default="all-linear"
    )
    top_layers: int = option(
        "Adapt only the last so many decoder layers; 0 adapts all.", default=0, fits=at_least(0, "layers")
    )


@options("model.prompt_features")
class PromptFeatures(Options):
    """What the importance weights see of a prompt."""

    encoder: str = option(
        "``reference`` takes states of the reference model; else a sentence-transformers model, as a hub id, a folder, "
        "or ``package:NAME/path``.",
        default=REFERENCE,
    )
    layer: int | None = option(
        "The decoder layer of the reference whose output is taken, 1 being the first; the middle one if left out.",
        default=None,
    )
    pooling: Literal["mean", "last"] = option(
        "``mean`` is over all tokens of the prompt, ``last`` takes its last token; of the reference only.",
        default="mean",
    )

    def check(self) -> None:
        """Refuses a layer of what has none."""
        if not self.encoder:
            problem = f"expected {REFERENCE} or the name of a model, found none."
            raise ConfigError(f"{self.option_name}.encoder", problem)
        if self.encoder != REFERENCE and self.layer is not None:
            problem = f"expected none with a sentence-transformers model, found {self.layer}."
            raise ConfigError(f"{self.option_name}.layer", problem, f"It is for encoder: {REFERENCE}.")


@options("model")
class ModelOptions(Options):
    """How a language model is aligned: the options of :class:`~bco_lightning.BCOModule`."""

    name_or_path: str = option(
        "The model to align: a hub id, a folder, a ``.gguf`` file, ``package:NAME``, or a PEFT adapter folder, whose "
        "adapter is then trained on (with ``lora``) or merged first (without)."
    )
    reference_name_or_path: str | None = option(
        "The frozen reference; left out, it is the policy as it came in. Name it to evaluate an exported model, which "
        "then also brings its reward shift.",
        default=None,
    )
    objective: ObjectiveName | dict[str, float] = option(
        "What is trained on. Of thumbs: ``bco``; ``bce``, the same without a reward shift; ``kto``, ``apo_zero``, "
        "``kldo``; ``sft``, of thumbs-up alone. Of pairs: ``dpo``, ``ipo``, ``nca``. Of scores: ``una``. Or a weighted "
        "sum, such as ``{bco: 1, sft: 0.1}``.",
        default="bco",
        on_resume="refused",
    )
    beta: float = option(
        "Scale of the implicit reward; small allows a larger distance from the reference.",
        default=0.1,
        fits=POSITIVE,
        on_resume="refused",
    )
    learning_rate: float = option("Peak learning rate of AdamW.", default=1e-5, fits=POSITIVE)
    lora: LoraSettings | None = option(
        "Adapter settings, or ``null`` for full fine-tuning.", default=None, on_resume="refused"
    )
    dtype: Dtype = option(
        "Weights of the policy; ``auto`` is bfloat16 under LoRA where the hardware computes in it, else float32.",
        default="auto",
    )
    warmup_ratio: float = option(
        "Share of all optimizer steps over which the learning rate rises linearly.", default=0.1, fits=SHARE
    )
    lr_schedule: Literal["linear", "cosine", "constant_with_warmup"] = option(
        "What follows the warm-up.", default="linear"
    )
    weight_decay: float = option("Weight decay of AdamW.", default=0.0, fits=NOT_NEGATIVE)
    importance_weights: Literal["off", "auto", "on"] = option(
        "``auto`` weights thumbs-down rows by how much likelier their prompt is among thumbs-up rows, where prompts "
        "are shown to tell the classes apart; else all weights are 1. ``on`` refuses data on which that cannot be "
        "tested. ``off`` is BCO as published in 2025.",
        default="off",
    )
    prompt_features: PromptFeatures = option(
        "What the classifier behind them is told of a prompt.", default=PromptFeatures()
    )
    importance_clip: tuple[float, float] = option(
        "Least and largest weight, before weights are scaled to a mean of 1.", default=DEFAULT_CLIP, fits=CLIP
    )
    class_weights: Literal["auto", "none"] | tuple[float, float] = option(
        "``auto`` weights the classes by their frequency in the data, so that each carries half of the loss (Eq. 8); "
        "``none`` is a mean over rows; two numbers are weights of thumbs-up and thumbs-down rows.",
        default="auto",
        fits=TWO_WEIGHTS,
        on_resume="refused",
    )
    kl_budget: float | None = option(
        "How far the policy may go, in nats per answer: training stops at the validation whose ``val/kl`` is larger, "
        "whatever its sign, and no step beyond is the best one. That is minus the mean log-ratio of policy and "
        "reference on held-out answers, a sum over their tokens: an estimate of KL(reference, policy) where the "
        "reference wrote them, and of answers of others only how far these moved.",
        default=None,
        fits=POSITIVE,
    )
    reward_shift: Literal["global", "per_prompt", "by_length"] = option(
        "``per_prompt`` lets every prompt have an offset of its own, of a spread that is estimated, where prompts have "
        "several answers; with ``data.group_by_prompt``. ``by_length`` leaves to length what it explains of the "
        "thumbs. Both of ``bco``.",
        default="global",
        on_resume="refused",
    )
    reward_shift_decay: float = option(
        "Decay of the reward shift's sums per optimizer step.", default=0.9, fits=DECAY, on_resume="refused"
    )
    router_aux_loss: Literal["auto"] | float = option(
        "Coefficient of the load-balancing loss of a mixture of experts, of each row alone; ``auto`` is the "
        "``router_aux_loss_coef`` of a model whose config sets ``output_router_logits``, as in transformers, else 0.",
        default="auto",
        fits=NOT_NEGATIVE,
    )
    train_router: bool | None = option(
        "Whether routers of a mixture of experts are trained, under ``lora`` by adapters; left out, they are with all "
        "weights, and under ``lora`` where ``target_modules`` names them.",
        default=None,
    )
    gradient_checkpointing: bool | Literal["selective"] = option(
        "Recompute activations in the backward pass: less memory, about a fifth slower. ``selective`` keeps what "
        "matrix products and attention gave, and computes the cheap rest; in full fine-tuning.",
        default=False,
    )
    vision_tower: bool = option(
        "Of a model that sees images, also train what sees: tower and projector.", default=False, on_resume="refused"
    )
    optimizer: OptimizerName = option(
        "``adamw``, fused; ``adamw_bf16`` for full fine-tuning of bfloat16 weights, rounded at random so that no small "
        "update is lost; or with moments of eight bits, and paged to host memory, by bitsandbytes.",
        default="adamw",
        on_resume="refused",
    )
    quantization: Quantization = option(
        "``nf4`` keeps the frozen base under ``lora`` in four bits by bitsandbytes.", default="none"
    )
    compile: bool = option("Compile the decoder layers: about a tenth faster, after a minute.", default=False)
    layout: Literal["auto", "packed", "padded"] = option(
        "``packed`` computes no padding; ``auto`` packs where a trial shows that the model's attention allows it, else "
        "rows are ``padded``.",
        default="auto",
    )
    reference_log_probs: Literal["auto", "online", "before"] = option(
        "``before`` computes those of all rows before the first step and keeps them on disk, for later epochs and "
        "runs; ``online`` computes them in every step; ``auto`` is ``before`` where all are on disk, where the "
        "run sees every row and would hold a second model, or sees every row more than once; else ``online``.",
        default="auto",
        on_resume="free",
    )
    cache_folder: str | None = option(
        "Where they and importance weights are kept: numbers and hashes, nothing that users wrote. ``BCO_CACHE`` in "
        "the environment, or ``~/.cache/bco_lightning``, if left out.",
        default=None,
        on_resume="free",
    )
    seed: int | None = option(
        "Seed of the adapters' initial values; that of ``seed_everything`` if left out.", default=None
    )

    @property
    def reference_name(self) -> str:
        """Name or path of the reference, which is the policy's own if none is named."""
        return self.reference_name_or_path or self.name_or_path

    def allows(self, kl: float) -> bool:
        """Whether a distance from the reference is within ``kl_budget``."""
        return self.kl_budget is None or abs(kl) <= self.kl_budget

    def __post_init__(self) -> None:
        self._set("seed", chosen_seed(self.seed))
        super().__post_init__()

    def check(self) -> None:
        """Refuses parts of no objective, and options that have no use for each other."""
        if self.compile and self.router_aux_loss not in ("auto", 0):
            raise ConfigError("model.compile", "expected false with router_aux_loss, found true.")
        if self.lora is not None and self.gradient_checkpointing == "selective":
            raise ConfigError("model.gradient_checkpointing", "expected true or false with lora, found selective.")
        if self.optimizer == "adamw_bf16" and (self.lora is not None or self.dtype != "bfloat16"):
            found = "lora" if self.lora is not None else f"dtype: {self.dtype}"
            raise ConfigError("model.optimizer", f"expected dtype: bfloat16 and no lora for adamw_bf16, found {found}.")
        if isinstance(self.objective, Mapping):
            if not self.objective:
                raise ConfigError("model.objective", "expected objectives with their weights, found none.")
            for name, weight in self.objective.items():
                check_choice("model.objective", name, list(get_args(ObjectiveName)))
                POSITIVE.check(f"model.objective.{name}", weight)
