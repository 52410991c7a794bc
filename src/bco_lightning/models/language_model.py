"""Load a causal language model and its tokenizer, and make it trainable in full or through LoRA."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedModel,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config, tokenizer_class_from_name
from transformers.pytorch_utils import Conv1D
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from bco_lightning.errors import ConfigError, LanguageModelError, UserError
from bco_lightning.models.adapters import fuse_adapters
from bco_lightning.options import Dtype, LoraSettings, Quantization
from bco_lightning.places import resolve_packaged

REFERENCE_ADAPTER = "reference"
_STORED_AS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files are: a hub id or folder, perhaps with a GGUF file in it, perhaps an adapter."""

    location: str
    gguf_file: str | None = None
    is_adapter: bool = False


def locate_model(name_or_path: str) -> ModelSource:
    """Finds out what ``name_or_path`` names, without loading it.

    Args:
        name_or_path: A hub id, a folder (of a model or of a PEFT adapter), a ``.gguf`` file, or ``package:NAME``.

    Returns:
        The source that the loaders below take.

    Raises:
        LanguageModelError: If a path is named and nothing loadable is there.
    """
    path = Path(resolve_packaged(name_or_path)).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise LanguageModelError(
                str(path), f"expected a folder, a hub id or a .gguf file, found a {path.suffix} file."
            )
        return ModelSource(str(path.parent), gguf_file=path.name)
    if path.is_dir():
        if (path / "adapter_config.json").exists():
            return ModelSource(str(path), is_adapter=True)
        if (path / "config.json").exists():
            return ModelSource(str(path))
        gguf_files = sorted(path.glob("*.gguf"))
        if len(gguf_files) != 1:
            raise LanguageModelError(
                str(path),
                f"expected config.json, adapter_config.json or one .gguf file, found {len(gguf_files)} .gguf files.",
            )
        return ModelSource(str(path), gguf_file=gguf_files[0].name)
    if path.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1:
        raise LanguageModelError(name_or_path, "expected a model folder or .gguf file, found nothing there.")
    return ModelSource(name_or_path)


def load_tokenizer(name_or_path: str) -> Any:
    """Loads the tokenizer that belongs to a model.

    Args:
        name_or_path: As for :func:`locate_model`. An adapter folder may carry its own tokenizer or its base model's.

    Returns:
        A fast transformers tokenizer, padded on the right and with a pad token.

    Raises:
        LanguageModelError: If there is none, or it has no EOS token.
    """
    source = locate_model(name_or_path)
    if source.is_adapter and not (Path(source.location) / "tokenizer_config.json").exists():
        return load_tokenizer(_base_of_adapter(source))
    gguf = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    with _in_words(name_or_path, "tokenizer"), _reading(source):
        if not gguf:
            _refuse_unknown_tokenizer(source.location)
        tokenizer = AutoTokenizer.from_pretrained(
            source.location, padding_side="right", trust_remote_code=False, **gguf
        )
    if tokenizer.eos_token_id is None:
        raise LanguageModelError(
            name_or_path,
            "expected a tokenizer with an end-of-sequence token, found one without.",
            "Without it a completion cannot say that it is over. Set eos_token in tokenizer_config.json.",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_language_model(
    name_or_path: str, dtype: torch.dtype, quantization: Quantization = "none", *, mapped: bool = False
) -> PreTrainedModel:
    """Loads a causal language model; an adapter folder comes back as its base model with the adapter merged in.

    Dropout is switched off: it would add noise to the log-ratio of policy and reference.

    Args:
        name_or_path: As for :func:`locate_model`. Remote code is never run.
        dtype: Data type of the weights.
        quantization: ``nf4`` keeps linear layers in four bits by bitsandbytes and computes in ``dtype``.
        mapped: Leave weights as views of their memory-mapped files where these allow it, which takes no memory of the
            process; :func:`take_final_dtype` gives a parameter its ``dtype`` then.

    Returns:
        A transformers ``PreTrainedModel`` in evaluation mode.

    Raises:
        LanguageModelError: If it cannot be loaded, or is no decoder-only language model.
        ConfigError: If it cannot be quantized.
    """
    source = locate_model(name_or_path)
    if source.is_adapter:
        base = load_language_model(_base_of_adapter(source), dtype, quantization)
        return _load_adapter(base, source).merge_and_unload().eval()  # type: ignore[no-any-return]
    stored = _dtype_of_files(source) if mapped and quantization == "none" else None
    # Pickled weights can run code, or be made to crash the reader.
    arguments: dict[str, Any] = {"dtype": stored or dtype, "use_safetensors": True, "weights_only": True}
    if source.gguf_file:
        # Packed GGUF blocks can neither be trained nor saved; dequantizing on load gives ordinary weights.
        arguments |= {"gguf_file": source.gguf_file, "quantization_config": GgufConfig(dequantize=True)}
    if quantization == "nf4":
        arguments["quantization_config"] = _four_bits(source, dtype)
    with _in_words(name_or_path, "causal language model"), _reading(source):
        if not source.gguf_file:
            _check_config(name_or_path, source.location)
        model = AutoModelForCausalLM.from_pretrained(source.location, trust_remote_code=False, **arguments)
    _disable_dropout(model)
    if stored not in (None, dtype):
        for parameter in model.parameters():
            parameter.final_dtype = dtype
    return model.eval()  # type: ignore[no-any-return]


def final_dtype(parameter: Tensor) -> torch.dtype:
    """The data type that a parameter has, or is to have."""
    return getattr(parameter, "final_dtype", parameter.dtype)


def take_final_dtype(parameter: nn.Parameter) -> None:
    """Casts a parameter of a mapped model, in place."""
    parameter.data = parameter.data.to(final_dtype(parameter))


def load_policy(
    name_or_path: str,
    dtype: torch.dtype,
    lora: LoraSettings | None,
    seed: int,
    quantization: Quantization = "none",
    *,
    mapped: bool = False,
) -> PreTrainedModel:
    """Loads the policy with exactly its trainable parameters requiring gradients.

    An adapter folder with ``lora`` set continues that adapter: it is loaded twice, once to be trained and once,
    frozen, as the reference; the adapter's own rank and targets stand. Without ``lora`` it is merged first.

    Args:
        name_or_path: As for :func:`locate_model`.
        dtype: Data type of the weights; adapters are float32 whatever it is.
        lora: Adapter settings, or ``None`` for full fine-tuning.
        seed: Seed of the adapters' initial values.
        quantization: Of the frozen base under the adapters.
        mapped: As for :func:`load_language_model`.

    Returns:
        The policy, in evaluation mode.
    """
    source = locate_model(name_or_path)
    if lora is None and quantization != "none":
        raise ConfigError("model.quantization", f"expected none where all weights are trained, found {quantization}.")
    if lora is None:
        return load_language_model(name_or_path, dtype, mapped=mapped).requires_grad_(True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if source.is_adapter:
            _refuse_unswitchable(source)
            base = load_language_model(_base_of_adapter(source), dtype, quantization, mapped=mapped)
            policy = _load_adapter(base, source, is_trainable=True)
            policy.load_adapter(source.location, REFERENCE_ADAPTER, is_trainable=False)
        else:
            base = load_language_model(name_or_path, dtype, quantization, mapped=mapped)
            try:
                policy = get_peft_model(base, _lora_config(lora, base))
            except ValueError as error:
                raise ConfigError("model.lora", f"expected settings that fit the model, found: {error}.") from error
            # PEFT drew them in the data type of the base, which may yet be another one.
            torch.manual_seed(seed)
            for module in policy.modules():
                if isinstance(module, LoraLayer):
                    module.reset_lora_parameters("default", init_lora_weights=True)
            # PEFT writes this into every exported adapter, where it is the only trace of the base model.
            policy.peft_config["default"].base_model_name_or_path = name_or_path
    _disable_dropout(policy)
    fuse_adapters(policy)
    return policy.eval()  # type: ignore[no-any-return]


def resolve_dtype(dtype: Dtype, lora: LoraSettings | None, device: torch.device) -> torch.dtype:
    """Data type of the policy's weights: ``auto`` is bfloat16 for a frozen base where the hardware computes in it.

    Full fine-tuning keeps float32 weights, since bfloat16 would round most small updates away; use
    ``trainer.precision: bf16-mixed`` there.

    Args:
        dtype: The user's choice.
        lora: Adapter settings, or ``None`` for full fine-tuning.
        device: Where the policy will live.

    Returns:
        ``torch.float32`` or ``torch.bfloat16``.
    """
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    if lora is None:
        return torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    # Without AMX tiles bfloat16 is slower than float32 on a CPU.
    return torch.bfloat16 if device.type == "cpu" and torch.cpu.get_capabilities().get("amx_bf16") else torch.float32


def _dtype_of_files(source: ModelSource) -> torch.dtype | None:
    """The data type of a model's files, if all their tensors have the same: a cast would need memory of its own."""
    if source.gguf_file:
        return None
    single = cached_file(source.location, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
    if single:
        files = [single]
    else:
        index = cached_file(source.location, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
        files = get_checkpoint_shard_files(source.location, index)[0] if index else []
    kinds = set()
    for file in files:
        with safe_open(file, "pt") as tensors:
            kinds |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 (no mapping)
    return _STORED_AS.get(kinds.pop()) if len(kinds) == 1 else None


def _lora_config(lora: LoraSettings, base: PreTrainedModel) -> LoraConfig:
    targets: str | list[str] = lora.target_modules
    if targets != "all-linear":
        targets = [name.strip() for name in lora.target_modules.split(",")]
    num_layers = base.config.get_text_config().num_hidden_layers
    layers = list(range(max(0, num_layers - lora.top_layers), num_layers)) if lora.top_layers else None
    if layers is not None and targets == "all-linear":
        # PEFT combines layers_to_transform with names only, so the names "all-linear" stands for are spelled out.
        head = base.get_output_embeddings()
        linear = {n for n, m in base.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head}
        targets = sorted({name.rpartition(".")[2] for name in linear})
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=targets,
        layers_to_transform=layers,
        task_type="CAUSAL_LM",
    )


def _four_bits(source: ModelSource, dtype: torch.dtype) -> BitsAndBytesConfig:
    if source.gguf_file:
        raise ConfigError("model.quantization", f"expected none for a .gguf file, found nf4 ({source.gguf_file}).")
    require_bitsandbytes("model.quantization", "nf4")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def require_bitsandbytes(option: str, value: str) -> None:
    """Checks that an option's library is installed.

    Raises:
        ConfigError: If it is not.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            option,
            f"expected bitsandbytes to be installed for {value}, found that it is not.",
            'Install it: pip install "bco-lightning[quantized]".',
        )


def _refuse_unswitchable(source: ModelSource) -> None:
    """A continued adapter must be one that a forward pass can use or leave out."""
    config = PeftConfig.from_pretrained(source.location)
    bias = getattr(config, "bias", "none")
    if config.is_prompt_learning or bias != "none":
        found = "a prompt-learning adapter" if config.is_prompt_learning else f"one that trains biases ({bias})"
        raise LanguageModelError(
            source.location,
            f"expected an adapter that can be switched off, found {found}.",
            "Merge it into its model first.",
        )


def _base_of_adapter(source: ModelSource) -> str:
    with _in_words(source.location, "PEFT adapter"):
        base = PeftConfig.from_pretrained(source.location).base_model_name_or_path
    if not base or (Path(base).exists() and Path(base).resolve() == Path(source.location).resolve()):
        raise LanguageModelError(source.location, f"expected an adapter that names its base model, found {base!r}.")
    return str(base)


def _load_adapter(base: PreTrainedModel, source: ModelSource, **options: Any) -> PeftModel:
    folder = Path(source.location)
    if not (folder / "adapter_model.safetensors").exists():  # PEFT would take a pickled one
        raise _no_safetensors(str(folder), folder)
    with _in_words(source.location, "PEFT adapter"):
        return PeftModel.from_pretrained(base, source.location, **options)


def _check_config(name_or_path: str, location: str) -> None:
    """Refuses, before any weight is read, what is no decoder-only model with safe weights."""
    config = AutoConfig.from_pretrained(location, trust_remote_code=False)
    if config.is_encoder_decoder:
        raise LanguageModelError(
            name_or_path,
            "expected a decoder-only language model, found an encoder-decoder model.",
            "Binary classifier optimization here scores a completion as the continuation of its prompt.",
        )
    folder, named = Path(location), str(getattr(config, "transformers_weights", None) or ".safetensors")
    if not named.endswith((".safetensors", ".safetensors.index.json")):  # the config's choice goes before ours
        raise _no_safetensors(name_or_path, folder)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise _no_safetensors(name_or_path, folder)


def _refuse_unknown_tokenizer(location: str) -> None:
    """Refuses a tokenizer that needs code of its folder, for which transformers would take another one in silence."""
    config = get_tokenizer_config(location)
    own_code = config.get("auto_map")
    own_code = own_code.get("AutoTokenizer") if isinstance(own_code, dict) else own_code
    known = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    if own_code and not (tokenizer_class_from_name(known) or tokenizer_class_from_name(f"{known}Fast")):
        raise _needs_own_code(location, "tokenizer")


def _disable_dropout(model: PreTrainedModel) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def _reading(source: ModelSource) -> contextlib.AbstractContextManager[None]:
    if source.gguf_file is None:
        return contextlib.nullcontext()
    from bco_lightning.gguf_reading import quick_gguf  # imports gguf, which other models do not need

    return quick_gguf()


@contextlib.contextmanager
def _in_words(name_or_path: str, what: str) -> Iterator[None]:
    """Says in one message what transformers and peft, given a damaged or hostile folder, say in many kinds of error."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise _needs_own_code(name_or_path, what) from error
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LanguageModelError(
            name_or_path,
            f"expected a {what}, but transformers could not load one ({said}).",
            "Give a hub id, a folder, a .gguf file or package:NAME in model.name_or_path.",
        ) from error


def _needs_own_code(name_or_path: str, what: str) -> LanguageModelError:
    return LanguageModelError(
        name_or_path,
        f"expected a {what} that transformers knows, found one that needs Python code of its own, which is never run.",
        "Give a model of an architecture that transformers supports.",
    )


def _no_safetensors(name_or_path: str, folder: Path) -> LanguageModelError:
    pickled = sorted(path.name for path in folder.glob("*") if path.suffix in _PICKLED)
    found = f"pickled ones alone ({', '.join(pickled[:3])}), which are never read" if pickled else "none"
    return LanguageModelError(
        name_or_path,
        f"expected weights in .safetensors files, found {found}.",
        "Where you trust them, load and save_pretrained() writes .safetensors." if pickled else "",
    )
