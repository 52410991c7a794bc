"""What is not loaded, and how that is said: code, pickled weights, other kinds of models, work without end."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from peft import PeftConfig
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.tokenization_auto import get_tokenizer_config, tokenizer_class_from_name
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from bco_lightning.errors import ConfigError, LanguageModelError, UserError

_GIVE = "Give a hub id, a folder, a .gguf file or package:NAME in model.name_or_path."
# Has transformers say which weights files do not have, or in another shape, for :func:`refuse_incomplete`.
LACKS_ARE_TOLD = {"output_loading_info": True, "ignore_mismatched_sizes": True}
_PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
# What an adapter's config may say by texts and objects; by others, PEFT imports, loads and computes. Numbers, and lists
# of names and numbers, it may say of anything.
_TEXTS = {
    "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "feedforward_modules", "init_lora_weights",
    "init_weights", "layers_pattern", "megatron_core", "modules_to_save", "peft_type", "peft_version", "revision",
    "target_modules", "task_type",
}  # fmt: skip
_OBJECTS = {"alpha_pattern", "auto_mapping", "eva_config", "rank_pattern", "trainable_token_indices"}
_WITH_LISTS = {"rank_pattern", "trainable_token_indices"}
_ENDLESS = re.compile(r"pissa_niter_\d{3,}")
_PATTERNS = (
    "target_modules", "exclude_modules", "feedforward_modules", "layers_pattern", "modules_to_save", "rank_pattern",
    "alpha_pattern",
)  # fmt: skip
_MATCH = "import json, re, sys; p, n = json.load(sys.stdin); [re.match(rf'(.*\\.)?({x})$', y) for x in p for y in n]"
_SECONDS = 5
# Far more than published models have: of layers, and of layers times experts.
_MOST_LAYERS, _MOST_EXPERTS = 2_000, 200_000
_LAYERS = re.compile(r"(num_|n_).*layers?|n_layer|(.*_)?(num_|n_)blocks")
_EXPERTS = re.compile(r"(.*_)?(num_|n_).*experts")
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "head_dim")


@contextmanager
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
        library, remedy = ("peft", "") if "adapter" in what else ("transformers", remedy)
        problem = f"expected a {what}, but {library} could not load one ({said})."
        raise LanguageModelError(name_or_path, problem, remedy) from error


def refuse_unsafe_model(name_or_path: str, location: str) -> None:
    """Refuses, before any weight is read, what is no decoder-only model with safe weights."""
    refuse_unsafe_config(name_or_path, PreTrainedConfig.get_config_dict(location)[0])
    config = AutoConfig.from_pretrained(location, trust_remote_code=False)
    if config.is_encoder_decoder:
        problem = "expected a decoder-only language model, found an encoder-decoder model."
        remedy = "Binary classifier optimization here scores a completion as the continuation of its prompt."
        raise LanguageModelError(name_or_path, problem, remedy)
    folder, named = Path(location), str(getattr(config, "transformers_weights", None) or ".safetensors")
    is_safe = named.endswith((".safetensors", ".safetensors.index.json"))  # the config's choice goes before ours
    if not is_safe or (folder.is_dir() and not any(folder.glob("*.safetensors"))):
        raise _no_safetensors(name_or_path, folder)
    refuse_oversized_model(name_or_path, config, folder)


def refuse_unsafe_config(name_or_path: str, config: Mapping[str, Any]) -> None:
    """Refuses, before anything is made of it, the config of a model of endless layers or with kernels of the hub."""
    layers, experts = (
        max((value for key, value in config.items() if isinstance(value, int) and name.fullmatch(key)), default=0)
        for name in (_LAYERS, _EXPERTS)
    )
    if layers > _MOST_LAYERS or layers * experts > _MOST_EXPERTS:
        problem = f"expected at most {_MOST_LAYERS:,} layers and {_MOST_EXPERTS:,} experts in all, found more."
        raise LanguageModelError(name_or_path, problem)
    for key, part in config.items():
        if isinstance(part, Mapping):
            refuse_unsafe_config(name_or_path, part)
        elif key.endswith("_implementation") and "/" in str(part):
            problem = f"expected a model that transformers knows, found {key} of the hub, code which is never run."
            raise LanguageModelError(name_or_path, problem)


def refuse_oversized_model(name_or_path: str, config: Any, folder: Path) -> None:
    """Refuses weights outside a folder, and a config with larger matrices than its files, which would find no room."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    files = set(json.loads(index.read_bytes())["weight_map"].values()) if index.exists() else set()
    if found := [file for file in files if Path(file).is_absolute() or ".." in Path(file).parts]:
        raise LanguageModelError(str(index), f"expected files of its own folder, found {found[0]!r}.")
    largest = _largest_dimension(folder)
    for name in _SIZES if largest else ():
        if isinstance(size := setting(config.get_text_config(), name), int) and size > largest:
            problem = f"expected a {name} that the weights have, of at most {largest:,}, found {size:,}."
            raise LanguageModelError(name_or_path, problem)


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
        problem = f"expected tokens below {size}, the number of its embeddings; found token {largest} in a row."
        remedy = "Tokens were added to the tokenizer: resize the model's embeddings to it, and save both."
        raise LanguageModelError(type(model).__name__, problem, remedy)


def refuse_unknown_tokenizer(location: str) -> None:
    """Refuses a tokenizer that needs code of its folder, for which transformers would take another one in silence."""
    config = get_tokenizer_config(location)
    own_code = config.get("auto_map")
    own_code = own_code.get("AutoTokenizer") if isinstance(own_code, dict) else own_code
    known = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    if own_code and not (tokenizer_class_from_name(known) or tokenizer_class_from_name(f"{known}Fast")):
        raise _needs_own_code(location, "tokenizer")


def adapter_fields(location: str) -> dict[str, Any]:
    """What an adapter's config says, if all of it is of a kind that is harmless to PEFT."""
    fields = dict(json.loads((Path(location) / "adapter_config.json").read_text(encoding="utf-8")))
    for name, value in fields.items():
        parts = [*value.values()] if isinstance(value, dict) else value if isinstance(value, list) else [value]
        is_nested = any(isinstance(part, (dict, list)) for part in parts) and name not in _WITH_LISTS
        is_other = (isinstance(value, dict) and value and name not in _OBJECTS) or (
            isinstance(value, str) and (name not in _TEXTS or _ENDLESS.fullmatch(value))
        )
        if is_nested or is_other:
            problem = f"expected an adapter that is told by numbers and names of modules, found {name} in its config."
            remedy = "Such a field could name code, files or work without end. Merge the adapter where you trust it."
            raise LanguageModelError(location, problem, remedy)
    return fields


def refuse_unsafe_adapter(location: str, base: nn.Module) -> None:
    """Refuses an adapter folder without ``.safetensors``, as PEFT would take a pickled one, or that asks for more.

    More is a higher rank than its weights have, or patterns that take long on the names of modules.
    """
    folder, fields = Path(location), adapter_fields(location)
    if not (folder / "adapter_model.safetensors").exists():
        raise _no_safetensors(location, folder)
    ranks = [fields.get("r"), *(fields.get("rank_pattern") or {}).values()]
    largest = _largest_dimension(folder)
    if found := [rank for rank in ranks if isinstance(rank, int) and rank > largest]:
        raise LanguageModelError(location, f"expected a rank that the weights have, found {found[0]:,}.")
    given = [fields.get(name) or [] for name in _PATTERNS]
    patterns = [text for texts in given for text in ([texts] if isinstance(texts, str) else texts)]
    if not all(re.fullmatch(r"[\w.-]*", str(pattern)) for pattern in patterns):
        command = [sys.executable, "-I", "-S", "-c", _MATCH]
        told = json.dumps([patterns, [name for name, _ in base.named_modules()]])
        try:  # in a process, as nothing else could stop it
            subprocess.run(command, input=told, text=True, capture_output=True, timeout=_SECONDS, check=False)  # noqa: S603
        except subprocess.TimeoutExpired:
            problem = f"expected patterns that find modules in {_SECONDS} s, found some that take longer."
            raise LanguageModelError(location, problem, "Simplify target_modules and the like.") from None
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
        problem = f"expected bitsandbytes to be installed for {value}, found that it is not."
        raise ConfigError(option, problem, 'Install it: pip install "bco-lightning[quantized]".')


def _needs_own_code(name_or_path: str, what: str) -> LanguageModelError:
    found = "found one that needs Python code of its own, which is never run"
    remedy = "Give a model of an architecture that transformers supports."
    return LanguageModelError(name_or_path, f"expected a {what} that transformers knows, {found}.", remedy)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _no_safetensors(name_or_path: str, folder: Path) -> LanguageModelError:
    pickled = sorted(path.name for path in folder.glob("*") if path.suffix in _PICKLED)
    found = f"pickled ones alone ({', '.join(pickled[:3])}), which are never read" if pickled else "none"
    problem = f"expected weights in .safetensors files, found {found}."
    remedy = "Where you trust them, load and save_pretrained() writes .safetensors." if pickled else ""
    return LanguageModelError(name_or_path, problem, remedy)


def setting(config: Any, name: str) -> Any:
    """A setting of a config; none where it lacks, or where each layer has its own."""
    with suppress(AttributeError, RuntimeError):
        return getattr(config, name)
    return None


def _largest_dimension(folder: Path) -> int:
    largest = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            largest = max(largest, *(max(file.get_slice(key).get_shape(), default=0) for key in file.keys()), 0)  # noqa: SIM118
    return largest
