"""One way in: a hub id, a folder, a GGUF file, ``package:NAME`` or a PEFT adapter becomes a policy or a reference.

A model whose weights are neither read nor made, for what is worked out beforehand, comes this way too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from bco_lightning.data.images import ImageInputs
from bco_lightning.data.tokenize import require_end_token
from bco_lightning.errors import ConfigError, LanguageModelError
from bco_lightning.identity import drawing_from
from bco_lightning.models.adapters import add_adapters, choose_routers, load_adapter, merged
from bco_lightning.models.layout import kind_of_model, seeing_parts_of
from bco_lightning.models.refusals import (
    LACKS_ARE_TOLD,
    adapter_fields,
    in_words,
    refuse_incomplete,
    refuse_unknown_tokenizer,
    refuse_unsafe_config,
    refuse_unsafe_model,
    require_bitsandbytes,
)
from bco_lightning.options import Dtype, LoraSettings, Quantization
from bco_lightning.places import cache_root, resolve_packaged

_STORED_AS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Published Llama 3.1.
_SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
_LLAMA = {"8B": (4096, 32, 32, 8, 14336), "70B": (8192, 80, 64, 8, 28672), "405B": (16384, 126, 128, 8, 53248)}
NAMED_SHAPES = tuple(_LLAMA)
GIVEN = "<a model object>"  # the name of one whose config names no place


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files are: a hub id or folder, perhaps with a GGUF file in it, perhaps an adapter."""

    location: str
    gguf_file: str | None = None
    is_adapter: bool = False

    def folder(self, cache_folder: str | None) -> str:
        """The folder or hub id that transformers loads; a GGUF file is converted first, where it was not yet."""
        if self.gguf_file is None:
            return self.location
        from bco_lightning.models.gguf import converted  # what other models do not need

        return str(converted(Path(self.location) / self.gguf_file, cache_root(cache_folder)))

    def base(self) -> str:
        """The name of the model that an adapter was made for."""
        with in_words(self.location, "PEFT adapter"):
            base = adapter_fields(self.location).get("base_model_name_or_path")
        if not base or (Path(base).exists() and Path(base).resolve() == Path(self.location).resolve()):
            raise LanguageModelError(self.location, f"expected an adapter that names its base model, found {base!r}.")
        return str(base)


def locate_model(name_or_path: str) -> ModelSource:
    """Finds out what a hub id, a folder of a model or adapter, a ``.gguf`` file or ``package:NAME`` names."""
    if name_or_path == GIVEN:
        remedy = "Give it again: load_aligned(..., model=...). Or save it, and name its folder beside it to begin with."
        raise LanguageModelError("model", "expected the model object that the run was given, found none.", remedy)
    path = Path(resolve_packaged(name_or_path)).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            problem = f"expected a folder, a hub id or a .gguf file, found a {path.suffix} file."
            raise LanguageModelError(str(path), problem)
        return ModelSource(str(path.parent), gguf_file=path.name)
    if path.is_dir():
        if found := [file for file in path.iterdir() if not (file.is_file() or file.is_dir())]:
            problem = "expected a file, found one that cannot be read, or not to its end."
            raise LanguageModelError(str(found[0]), problem)
        if (path / "adapter_config.json").exists():
            return ModelSource(str(path), is_adapter=True)
        if (path / "config.json").exists():
            return ModelSource(str(path))
        gguf_files = sorted(path.glob("*.gguf"))
        if len(gguf_files) != 1:
            expected = "expected config.json, adapter_config.json or one .gguf file"
            raise LanguageModelError(str(path), f"{expected}, found {len(gguf_files)} .gguf files.")
        return ModelSource(str(path), gguf_file=gguf_files[0].name)
    if path.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1:
        raise LanguageModelError(name_or_path, "expected a model folder or .gguf file, found nothing there.")
    return ModelSource(name_or_path)


def load_tokenizer(name_or_path: str, *, cache_folder: str | None = None) -> Any:
    """The tokenizer of a model, or of an adapter's base model where the adapter brings none; it has an end token."""
    source = locate_model(name_or_path)
    if source.is_adapter and not (Path(source.location) / "tokenizer_config.json").exists():
        return load_tokenizer(source.base(), cache_folder=cache_folder)
    with in_words(name_or_path, "tokenizer"):
        folder = source.folder(cache_folder)
        refuse_unknown_tokenizer(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right", trust_remote_code=False)
    return usable_tokenizer(tokenizer, name_or_path)


def usable_tokenizer(tokenizer: Any, name_or_path: str) -> Any:
    """One that has an end token, and something to pad with."""
    require_end_token(tokenizer, name_or_path)
    if not tokenizer.chat_template and (processor := ImageInputs(tokenizer).processor) is not None:
        tokenizer.chat_template = processor.chat_template
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_language_model(
    name_or_path: str,
    dtype: torch.dtype,
    quantization: Quantization = "none",
    *,
    mapped: bool = False,
    cache_folder: str | None = None,
) -> PreTrainedModel:
    """A causal language model in evaluation mode; an adapter comes back as its base model with the adapter merged in.

    Dropout is switched off: it would add noise to the log-ratio of policy and reference. Weights of a ``mapped`` model
    are views of their files where these allow it, which takes no memory of the process;
    :func:`~bco_lightning.parallel.sharding.take_final_dtype` gives a parameter its ``dtype`` then.
    """
    source = locate_model(name_or_path)
    if source.is_adapter:
        base = load_language_model(source.base(), dtype, quantization, cache_folder=cache_folder)
        return merged(base, source.location).eval()
    # Pickled weights can run code, or be made to crash the reader.
    arguments: dict[str, Any] = {"use_safetensors": True, "weights_only": True, **LACKS_ARE_TOLD}
    if quantization == "nf4":
        require_bitsandbytes("model.quantization", "nf4")
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    with in_words(name_or_path, "causal language model"):
        folder = source.folder(cache_folder)
        refuse_unsafe_model(name_or_path, folder)
        stored = _stored_dtype(folder) if mapped and quantization == "none" else None
        model, found = kind_of_model(AutoConfig.from_pretrained(folder, trust_remote_code=False)).from_pretrained(
            folder, dtype=stored or dtype, trust_remote_code=False, **arguments
        )
        refuse_incomplete(name_or_path, "model", found)
    _disable_dropout(model)
    if stored not in (None, dtype):
        for parameter in model.parameters():
            parameter.final_dtype = dtype
    return model.eval()


def load_policy(
    name_or_path: str,
    dtype: torch.dtype,
    lora: LoraSettings | None,
    seed: int,
    quantization: Quantization = "none",
    *,
    mapped: bool = False,
    cache_folder: str | None = None,
    train_router: bool | None = None,
    vision_tower: bool = False,
    given: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """The policy, in evaluation mode, with exactly what is trained requiring gradients; adapters are float32.

    An adapter folder with ``lora`` set continues that adapter: it is loaded twice, once to be trained and once,
    frozen, as the reference; the adapter's own rank and targets stand. Without ``lora`` it is merged first. A model
    that is ``given`` becomes the policy itself.
    """
    if lora is None and quantization != "none":
        raise ConfigError("model.quantization", f"expected none where all weights are trained, found {quantization}.")
    if given is not None:
        _disable_dropout(given.eval())
    if lora is None:
        whole = given or load_language_model(name_or_path, dtype, mapped=mapped, cache_folder=cache_folder)
        choose_routers(whole.requires_grad_(True), train_router)
        for part in seeing_parts_of(whole).values():
            part.requires_grad_(vision_tower)
        return whole
    source = locate_model(name_or_path) if given is None else ModelSource(name_or_path)
    named = source.base() if source.is_adapter else name_or_path
    base = given or load_language_model(named, dtype, quantization, mapped=mapped, cache_folder=cache_folder)
    with drawing_from(seed, base.device):
        if source.is_adapter:
            policy = load_adapter(base, source.location)
        else:
            policy = add_adapters(base, lora, seed, name_or_path, train_router, vision_tower)
    choose_routers(policy, train_router)
    _disable_dropout(policy)
    return policy.eval()  # type: ignore[no-any-return]


def unloaded_model(name_or_path: str, lora: LoraSettings | None = None) -> Any:
    """A model on PyTorch's meta device, with ``lora`` a PEFT model of one: shapes and names alone.

    Source:
        Grattafiori et al. 2024, "The Llama 3 Herd of Models", arXiv:2407.21783, table 3; the vocabulary and the size of
        405B's key-value heads as in the published configs.
    """
    given = f"Give {', '.join(NAMED_SHAPES)}, a hub id, a folder, a .gguf file or package:NAME."
    with in_words(name_or_path, "causal language model", given), torch.device("meta"):
        if name_or_path in _LLAMA:
            shape: dict[str, Any] = dict(zip(_SHAPE, _LLAMA[name_or_path], strict=True))
            config: Any = LlamaConfig(vocab_size=128_256, tie_word_embeddings=False, **shape)
        else:
            source = locate_model(name_or_path)
            if source.is_adapter:
                remedy = "Name its base model, and the rank of the adapters."
                raise LanguageModelError(name_or_path, "expected a model, found an adapter.", remedy)
            gguf = {"gguf_file": source.gguf_file} if source.gguf_file else {}
            refuse_unsafe_config(name_or_path, PreTrainedConfig.get_config_dict(source.location, **gguf)[0])
            config = AutoConfig.from_pretrained(source.location, trust_remote_code=False, **gguf)
        model = kind_of_model(config).from_config(config, trust_remote_code=False)
        return model if lora is None else add_adapters(model, lora, 0, name_or_path)


def resolve_dtype(dtype: Dtype, lora: LoraSettings | None, device: torch.device) -> torch.dtype:
    """Data type of the policy's weights: ``auto`` is bfloat16 for a frozen base where the hardware computes in it.

    Full fine-tuning keeps float32 weights, since bfloat16 would round most small updates away.
    """
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    if lora is None:
        return torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    # Without AMX tiles bfloat16 is slower than float32 on a CPU.
    return torch.bfloat16 if device.type == "cpu" and torch.cpu.get_capabilities().get("amx_bf16") else torch.float32


def with_given(
    model: Any, positional: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The options of a module, with what a model object, which becomes the policy as it is, says by itself."""
    if model is None:
        return positional, options
    if not isinstance(model, PreTrainedModel) or hasattr(model, "peft_config"):
        found = f"{type(model).__name__}{' with an adapter' * hasattr(model, 'peft_config')}"
        remedy = "Load it again, or merge_and_unload() its adapter, and say by lora what is trained."
        raise ConfigError("model", f"expected a model of transformers without adapters, found {found}.", remedy)
    name = positional[0] if positional else options.get("name_or_path")
    own, dtype = str(model.dtype).removeprefix("torch."), options.get("dtype", "auto")
    if dtype == "auto":
        dtype = own if options.get("lora") else "float32"  # bfloat16 would round most small updates away
    if own != dtype:
        remedy = f"Load it with dtype=torch.{dtype}, or set dtype to what it has."
        raise ConfigError("model", f"expected weights of {dtype}, found {own}.", remedy)
    return (), {**options, "name_or_path": name or model.name_or_path or GIVEN, "dtype": own}


def _stored_dtype(location: str) -> torch.dtype | None:
    """The data type of a model's files, if all their tensors have the same: a cast would need memory of its own."""
    try:  # fetched from the hub as transformers does
        files = [str(cached_file(location, SAFE_WEIGHTS_NAME))]
    except OSError:  # none of that name: a model in several files
        files, _ = get_checkpoint_shard_files(location, cached_file(location, SAFE_WEIGHTS_INDEX_NAME))
    kinds = set()
    for file in files:
        with safe_open(file, "pt") as tensors:
            kinds |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 (no mapping)
    return _STORED_AS.get(kinds.pop()) if len(kinds) == 1 else None


def _disable_dropout(model: PreTrainedModel) -> None:
    """Gradient checkpointing puts a policy in training mode; layers ask modules, themselves or configs for rates."""
    configs = {id(module.config): module.config for module in model.modules() if isinstance(module, PreTrainedModel)}
    for holder in (*model.modules(), *configs.values(), *(config.get_text_config() for config in configs.values())):
        if isinstance(holder, nn.Dropout):
            holder.p = 0.0
        for name, value in list(vars(holder).items()):
            if isinstance(value, float) and "drop" in name:
                setattr(holder, name, 0.0)
