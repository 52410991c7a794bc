"""What a run trains: policy and reference, made alike, so that equal weights give equal bits; and the optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel, get_scheduler

from bco_lightning.data.datamodule import FeedbackDataModule
from bco_lightning.errors import ConfigError
from bco_lightning.models.layout import causal_lm_of, decoder_layers_of, seeing_parts_of
from bco_lightning.models.load import load_language_model, load_policy, resolve_dtype
from bco_lightning.models.prepare import Preparation, prepare
from bco_lightning.models.refusals import require_bitsandbytes
from bco_lightning.models.stochastic import StochasticAdamW
from bco_lightning.options import ModelOptions
from bco_lightning.parallel.sharding import Sharding, final_dtype, is_sharded, shard

_FUSED = {"cpu", "cuda", "mps", "xpu"}


@dataclass(frozen=True)
class ModelBuilder:
    """Makes the models of a run; quick ways of computing are tried on the rows of its data."""

    options: ModelOptions
    device: torch.device
    sharding: Sharding | None = None
    data: FeedbackDataModule | None = None
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext  # that a step computes in
    given: tuple[Any, Any] = (None, None)  # model and tokenizer instead of a name

    def policy(self) -> tuple[PreTrainedModel, str]:
        """The policy with what is trained of it, and how its rows are laid out, for people."""
        options = self.options
        if self.sharding is not None and options.optimizer.endswith("8bit"):
            expected = f"expected adamw or adamw_bf16 for weights that are cut up, found {options.optimizer}."
            raise ConfigError("model.optimizer", expected)
        if self.sharding is not None and options.vision_tower:  # processes without images would reduce in another order
            problem = "expected false for weights that are cut up, found true."
            raise ConfigError("model.vision_tower", problem, "Use ddp.")
        if self.sharding is not None and self.given[0] is not None:
            remedy = "Save it by save_pretrained, and give the folder's name."
            raise ConfigError("model", "expected the name of a model that is cut up, found an object.", remedy)
        how: dict[str, Any] = {"train_router": options.train_router, "vision_tower": options.vision_tower, **self._how}
        how["given"] = self.given[0]
        model = load_policy(options.name_or_path, self._dtype, options.lora, options.seed or 0, **how)
        return model, self._prepare(model, options.gradient_checkpointing).words

    def reference(self) -> PreTrainedModel:
        """The reference as a model of its own."""
        model = load_language_model(self.options.reference_name, self._dtype, **self._how)
        self._prepare(model)
        return model

    def finish(self, model: PreTrainedModel) -> None:
        """Cuts a model up, if the strategy says so; until then its weights are whole, and could be looked at."""
        if self.sharding is not None:
            causal_lm = causal_lm_of(model)
            apart = seeing_parts_of(causal_lm).values()
            shard(causal_lm, decoder_layers_of(causal_lm)[1], self.sharding, apart)

    @property
    def _dtype(self) -> torch.dtype:
        return resolve_dtype(self.options.dtype, self.options.lora, self.device)

    @property
    def _how(self) -> dict[str, Any]:
        options, mapped = self.options, self.sharding is not None
        return {"quantization": options.quantization, "mapped": mapped, "cache_folder": options.cache_folder}

    def _prepare(self, model: Any, recomputed: bool | str = False) -> Preparation:
        if self.sharding is None:
            model.to(self.device)
        how: dict[str, Any] = {"compiled": self.options.compile, "recomputed": recomputed, "precision": self.precision}
        if self.data is not None:
            how |= {"rows": self.data.telling_rows(), "longest": self.data.options.max_length}
        return prepare(model, self.options.layout, **how)


def require_sharded(model: nn.Module, sharding: Sharding | None) -> None:
    """Refuses a model that was built whole and is now to be cut up."""
    if sharding is not None and not is_sharded(model):
        problem = "expected a module whose model is not built yet, found one that is built and not sharded."
        raise ConfigError("trainer.strategy", problem, "Make a new BCOModule for it.")


def dtype_of_matrices(model: nn.Module) -> torch.dtype:
    """The data type in which a model multiplies: that of its matrices, of quantized ones bfloat16."""
    found = next(final_dtype(parameter) for parameter in model.parameters() if parameter.ndim >= 2)
    return found if found.is_floating_point else torch.bfloat16


def scheduled_optimizer(options: ModelOptions, parameters: Sequence[nn.Parameter], num_steps: int) -> dict[str, Any]:
    """As Lightning takes them: the optimizer, with a linear warm-up and the chosen schedule over all its steps."""
    optimizer = make_optimizer(options, parameters)
    warmup = min(math.ceil(options.warmup_ratio * num_steps), num_steps - 1)  # its first step has a rate of 0
    scheduler = get_scheduler(options.lr_schedule, optimizer, warmup, num_steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def make_optimizer(options: ModelOptions, parameters: Sequence[nn.Parameter]) -> Optimizer:
    """AdamW of what is trained, in one of its variants.

    ``adamw`` updates all weights in one pass; ``adamw_bf16`` rounds bfloat16 at random; ``adamw_8bit`` keeps its
    moments in eight bits, a quarter of the memory; ``paged_adamw_8bit`` also lets them move to host memory, under CUDA.
    """
    settings: dict[str, Any] = {"lr": options.learning_rate, "weight_decay": options.weight_decay}
    if options.optimizer == "adamw_bf16":
        return StochasticAdamW(parameters, **settings, seed=options.seed or 0)
    if options.optimizer == "adamw":
        optimizer = AdamW(parameters, fused=all(p.device.type in _FUSED for p in parameters), **settings)
        # Left to itself, a fused optimizer takes the scaling of float16 gradients upon itself, so that Lightning
        # refuses to clip them under any mixed precision. There is no public way to say so.
        optimizer._step_supports_amp_scaling = False
        return optimizer
    require_bitsandbytes("model.optimizer", options.optimizer)
    import bitsandbytes

    kinds = {"adamw_8bit": bitsandbytes.optim.AdamW8bit, "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit}
    return kinds[options.optimizer](parameters, **settings)  # type: ignore[no-any-return]
