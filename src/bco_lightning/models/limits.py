"""What files of a model may ask for: neither code nor other files, nor work without end."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from bco_lightning.errors import LanguageModelError

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
            raise LanguageModelError(
                location,
                f"expected an adapter that is told by numbers and names of modules, found {name} in its config.",
                "Such a field could name code, files or work without end. Merge the adapter where you trust it.",
            )
    return fields


def refuse_costly_adapter(location: str, names: Iterable[str]) -> None:
    """Refuses an adapter of a higher rank than its weights, or whose patterns take long on the names of modules."""
    fields = adapter_fields(location)
    ranks = [fields.get("r"), *(fields.get("rank_pattern") or {}).values()]
    largest = _largest_dimension(Path(location))
    if found := [rank for rank in ranks if isinstance(rank, int) and rank > largest]:
        raise LanguageModelError(location, f"expected a rank that the weights have, found {found[0]:,}.")
    given = [fields.get(name) or [] for name in _PATTERNS]
    patterns = [text for texts in given for text in ([texts] if isinstance(texts, str) else texts)]
    if all(re.fullmatch(r"[\w.-]*", str(pattern)) for pattern in patterns):
        return
    command, told = [sys.executable, "-I", "-S", "-c", _MATCH], json.dumps([patterns, list(names)])
    try:  # in a process, as nothing else could stop it
        subprocess.run(command, input=told, text=True, capture_output=True, timeout=_SECONDS, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        problem = f"expected patterns that find modules in {_SECONDS} s, found some that take longer."
        raise LanguageModelError(location, problem, "Simplify target_modules and the like.") from None


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
