"""What is not loaded, and how that is said: code of a model folder, pickled weights, what is no decoder-only model."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from peft import PeftConfig
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.tokenization_auto import get_tokenizer_config, tokenizer_class_from_name

from bco_lightning.errors import ConfigError, LanguageModelError, UserError
from bco_lightning.models.limits import (
    adapter_fields,
    refuse_costly_adapter,
    refuse_oversized_model,
    refuse_unsafe_config,
)

_GIVE = "Give a hub id, a folder, a .gguf file or package:NAME in model.name_or_path."
# Has transformers say which weights files do not have, or in another shape, for :func:`refuse_incomplete`.
LACKS_ARE_TOLD = {"output_loading_info": True, "ignore_mismatched_sizes": True}
_PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


@contextlib.contextmanager
def in_words(name_or_path: str, what: str, remedy: str = _GIVE) -> Iterator[None]:
    """Says in one message what transformers and peft, given a damaged or hostile folder, say in many kinds of error."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise _needs_own_code(name_or_path, what) from error
        error = LookupError(f"nothing is named {error}") if isinstance(error, KeyError) else error
        said = " ".join(line.strip() for line in (str(error).strip() or type(error).__name__).splitlines()[:2])
        raise LanguageModelError(
            name_or_path,
            f"expected a {what}, but {'peft' if 'adapter' in what else 'transformers'} could not load one ({said}).",
            "" if "adapter" in what else remedy,
        ) from error


def refuse_unsafe_model(name_or_path: str, location: str) -> None:
    """Refuses, before any weight is read, what is no decoder-only model with safe weights."""
    refuse_unsafe_config(name_or_path, PreTrainedConfig.get_config_dict(location)[0])
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
    refuse_oversized_model(name_or_path, config, folder)


def refuse_incomplete(name_or_path: str, what: str, info: Mapping[str, Any]) -> None:
    """Refuses files without all weights, for which a library draws random ones; names those that it leaves out.

    An adapter that is not used whole is another adapter.
    """
    missing, others = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    sizes = [
        f"{name} of shape {tuple(theirs)} for {tuple(ours)}" for name, theirs, ours in info.get("mismatched_keys", ())
    ]
    found = [f"none of {_listed(missing)}"] * bool(missing) + [_listed(sizes)] * bool(sizes)
    if found or (others and what == "adapter"):
        found += [f"what has no place, {_listed(others)}"] * bool(others)
        remedy = "Files are cut or missing, or belong to another model than the config says: fetch or save them again."
        raise LanguageModelError(name_or_path, f"expected all weights of the {what}, found {'; '.join(found)}.", remedy)
    if others:
        rank_zero_warn(f"{name_or_path}: weights that the model has no place for are left out: {_listed(others)}.")


def refuse_unknown_token(model: Any, largest: int) -> None:
    """Refuses rows with a token that a model has no embedding for, which a GPU would say in the middle of a step."""
    if largest >= (size := model.get_input_embeddings().weight.shape[0]):
        raise LanguageModelError(
            type(model).__name__,
            f"expected tokens below {size}, the number of its embeddings; found token {largest} in a row.",
            "Tokens were added to the tokenizer: resize the model's embeddings to it, and save both.",
        )


def refuse_unknown_tokenizer(location: str) -> None:
    """Refuses a tokenizer that needs code of its folder, for which transformers would take another one in silence."""
    config = get_tokenizer_config(location)
    own_code = config.get("auto_map")
    own_code = own_code.get("AutoTokenizer") if isinstance(own_code, dict) else own_code
    known = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    if own_code and not (tokenizer_class_from_name(known) or tokenizer_class_from_name(f"{known}Fast")):
        raise _needs_own_code(location, "tokenizer")


def refuse_unsafe_adapter(location: str, base: nn.Module) -> None:
    """Refuses an adapter folder without ``.safetensors``, as PEFT would take a pickled one, or that asks for more."""
    folder = Path(location)
    adapter_fields(location)
    if not (folder / "adapter_model.safetensors").exists():
        raise _no_safetensors(location, folder)
    refuse_costly_adapter(location, (name for name, _ in base.named_modules()))
    if PeftConfig.from_pretrained(location).is_prompt_learning:
        raise LanguageModelError(location, "expected an adapter of weights, found a prompt-learning adapter.")


def refuse_unswitchable(location: str) -> None:
    """Refuses an adapter that a forward pass could not leave out, or that PEFT could not load twice."""
    adapter_fields(location)
    config = PeftConfig.from_pretrained(location)
    bias, init = getattr(config, "bias", "none"), getattr(config, "init_lora_weights", True)
    refused = {
        f"one that trains biases ({bias})": bias != "none",
        # PEFT ties one copy only, and the reference is another.
        "one that ties weights (ensure_weight_tying)": getattr(config, "ensure_weight_tying", False),
        f"one that takes part of its base model ({init})": init not in (True, False, None, "gaussian", "eva"),
        "one that some tokens switch on (alora_invocation_tokens)": getattr(config, "alora_invocation_tokens", None),
    }
    for found in (words for words, is_so in refused.items() if is_so):
        expected = f"expected an adapter that can be switched off, found {found}."
        raise LanguageModelError(location, expected, "Merge it into its model first.")


def require_bitsandbytes(option: str, value: str) -> None:
    """Refuses an option whose library is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            option,
            f"expected bitsandbytes to be installed for {value}, found that it is not.",
            'Install it: pip install "bco-lightning[quantized]".',
        )


def _needs_own_code(name_or_path: str, what: str) -> LanguageModelError:
    return LanguageModelError(
        name_or_path,
        f"expected a {what} that transformers knows, found one that needs Python code of its own, which is never run.",
        "Give a model of an architecture that transformers supports.",
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _no_safetensors(name_or_path: str, folder: Path) -> LanguageModelError:
    pickled = sorted(path.name for path in folder.glob("*") if path.suffix in _PICKLED)
    found = f"pickled ones alone ({', '.join(pickled[:3])}), which are never read" if pickled else "none"
    return LanguageModelError(
        name_or_path,
        f"expected weights in .safetensors files, found {found}.",
        "Where you trust them, load and save_pretrained() writes .safetensors." if pickled else "",
    )
