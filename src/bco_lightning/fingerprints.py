"""Digests of what a run is made of, so that a resumed run can tell whether it is still the same one."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

_PACKAGES = (
    "bco-lightning", "torch", "lightning", "transformers", "peft", "datasets", "torchmetrics", "tokenizers",
    "safetensors", "numpy",
)  # fmt: skip
_BLOCK = 2**22


def digest_of_tensor(tensor: Tensor, dtype: torch.dtype | None = None) -> str:
    """SHA-256 over shape, data type and bytes of a tensor, as it would be in ``dtype`` if that is given."""
    dtype = dtype or tensor.dtype
    digest = hashlib.sha256(f"{tuple(tensor.shape)} {dtype}\n".encode())
    for block in tensor.detach().contiguous().view(-1).split(_BLOCK):
        digest.update(memoryview(block.to(dtype).view(torch.uint8).cpu().numpy()))
    return digest.hexdigest()


def digest_of_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, shapes, data types and bytes of tensors, whatever their order."""
    return digest_of_values({name: digest_of_tensor(tensor) for name, tensor in named})


def digest_of_tokenizer(tokenizer: Any) -> str:
    """SHA-256 over vocabulary, merges, normalizer and special tokens; the chat template is compared by itself."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = json.dumps({name: str(value) for name, value in tokenizer.special_tokens_map.items()}, sort_keys=True)
    return hashlib.sha256(f"{described}\n{special}".encode()).hexdigest()


def digest_of_values(values: Mapping[str, Any]) -> str:
    """SHA-256 over plain values, whatever their order."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


@cache
def versions() -> dict[str, str]:
    """Versions of the packages that numbers depend on."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def git_revision() -> str | None:
    """Commit of the working folder, with ``-dirty`` if it has changes; ``None`` outside a repository."""
    git = shutil.which("git")
    if git is None:
        return None
    try:
        described = [git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        done = subprocess.run(described, capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What differs between two sets of fingerprints: names with both values, long ones shortened."""
    return {
        name: f"{name}: {_shortened(then.get(name))} then, {_shortened(now.get(name))} now"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    }


def _shortened(value: Any) -> str:
    return str(value) if len(str(value)) <= 20 else f"{str(value)[:12]}…".replace("\n", " ")
