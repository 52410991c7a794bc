"""What a run is made of: digests, versions, random numbers; and the refusal to go on as another run."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from bco_lightning.errors import CheckpointError
from bco_lightning.options import Options

_PACKAGES = (
    "bco-lightning", "torch", "lightning", "transformers", "peft", "datasets", "torchmetrics", "tokenizers",
    "safetensors", "numpy",
)  # fmt: skip
_BLOCK = 2**22
_NUMBERS = 624  # that a Mersenne Twister makes at a time


def digest_of_tensor(tensor: Tensor, dtype: torch.dtype | None = None) -> str:
    """SHA-256 over shape, data type and bytes of a tensor, as it would be in ``dtype`` if that is given."""
    dtype = dtype or tensor.dtype
    digest = hashlib.sha256(f"{tuple(tensor.shape)} {dtype}\n".encode())
    for block in tensor.detach().contiguous().view(-1).split(_BLOCK):
        digest.update(memoryview(block.to(dtype).view(torch.uint8).cpu().numpy()))
    return digest.hexdigest()


def digest_of_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, shapes, data types and bytes of tensors, whatever their order."""
    return digest_of_values(digests_of_tensors((name, tensor, tensor.dtype) for name, tensor in named))


def digests_of_tensors(named: Iterable[tuple[str, Tensor, torch.dtype]]) -> dict[str, str]:
    """:func:`digest_of_tensor` of each, in threads, which hash beside each other."""
    names, tensors, dtypes = zip(*named, strict=True) if (named := list(named)) else ((), (), ())
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return dict(zip(names, threads.map(digest_of_tensor, tensors, dtypes), strict=True))


def digest_of_tokenizer(tokenizer: Any) -> str:
    """SHA-256 over vocabulary, merges, normalizer and special tokens; the chat template is compared by itself."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = json.dumps({name: str(value) for name, value in tokenizer.special_tokens_map.items()}, sort_keys=True)
    return hashlib.sha256(f"{described}\n{special}".encode()).hexdigest()


def digest_of_values(values: Mapping[str, Any]) -> str:
    """SHA-256 over plain values, whatever their order."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """SHA-256 over the bytes of a file, a block at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


@cache
def digest_of_code(*names: str) -> str:
    """SHA-256 over source files of this package; of a folder, such as ``models``, all its Python files."""
    digest = hashlib.sha256()
    for name in names:
        path = Path(__file__).parent / name
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            digest.update(f"{file.relative_to(path.parent).as_posix()}\n".encode() + file.read_bytes())
    return digest.hexdigest()


@cache
def versions() -> dict[str, str]:
    """Versions of the packages that numbers depend on."""
    found = dict.fromkeys(_PACKAGES, "not installed as a package")
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def git_revision() -> str | None:
    """Commit of the working folder; ``None`` outside a repository.

    Whether there are changes is not asked: git would run what the configuration of the repository names for that.
    """
    command = [shutil.which("git") or "git", "rev-parse", "--verify", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What differs between two sets of fingerprints: names with both values, long ones shortened."""

    def shown(value: Any) -> str:
        return str(value) if len(str(value)) <= 20 else f"{str(value)[:12]}…".replace("\n", " ")

    return {
        name: f"{name}: {shown(then.get(name))} then, {shown(now.get(name))} now"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    }


def refuse_other_weights(ours: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor]) -> None:
    """Refuses the weights of a checkpoint unless they have names and shapes of ours."""
    problems = [
        f"expected {name} of shape {shape}, found {tuple(weights[name].shape)}"
        for name, shape in ours.items()
        if name in weights and weights[name].shape != shape
    ]
    if unmatched := weights.keys() ^ ours.keys():
        found = f"{len(weights)}, {len(unmatched)} of them with no match"
        problems = [f"expected {len(ours)} trained parameters as configured, found {found}"]
    if problems:
        remedy = "Use the same model.name_or_path and model.lora as the run that wrote it."
        raise CheckpointError("checkpoint", f"{problems[0]}.", remedy)


def digest_of_frozen(model: Any) -> str:
    """A digest of a model's frozen weights, which are in no checkpoint, whatever data type they are loaded in."""
    named = model.named_parameters()
    frozen = ((name, each, torch.bfloat16) for name, each in named if not each.requires_grad)
    return digest_of_values(digests_of_tensors(frozen))


def refuse_other_given(checkpoint: Mapping[str, Any], model: Any, tokenizer: Any) -> None:
    """Refuses other frozen weights, or another tokenizer, than a run was given as objects."""
    if not (known := checkpoint.get("given")):
        return
    wrong = ["model (other frozen weights)"] * (digest_of_frozen(model) != known)
    if wrong := wrong or ["tokenizer"] * (digest_of_tokenizer(tokenizer) != checkpoint["fingerprints"]["tokenizer"]):
        problem = f"expected the objects that the run was given, found another {wrong[0]}."
        raise CheckpointError("checkpoint", problem, "Give them: load_aligned(..., model=..., tokenizer=...).")


def settings_of(trainer: Any, num_steps: int, parts: Iterable[Options]) -> dict[str, Any]:
    """What is told of a run that goes on with another value, by the names of options; not where files lie."""
    told = {f"{part.option_name}.{name}": part.plain()[name] for part in parts for name in part.names("told")}
    return {
        **{name: value for name, value in told.items() if not name.endswith("_files")},
        "trainer.max_epochs and max_steps": f"{num_steps} steps",
        "trainer.precision": str(trainer.precision),
        "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches,
        "trainer.gradient_clip_val": trainer.gradient_clip_val,
        "trainer.gradient_clip_algorithm": str(getattr(trainer.gradient_clip_algorithm, "value", "norm")),
        "trainer.deterministic": (False, "warn", True)[torch.get_deterministic_debug_mode()],
    }


def changes_to_accept(
    checkpoint: Mapping[str, Any],
    fingerprints: Mapping[str, Any],
    settings: Mapping[str, Any],
    accepted: Collection[str] | None,
) -> list[str]:
    """Compares a run with the one that wrote a checkpoint, and says what is another now and is accepted.

    Only fingerprints that are ``accepted`` by name may differ; that is ``None`` for a run that does not go on, which
    may say less of itself. ``settings``, by the names of options, may be changed on purpose, such as the learning rate;
    that is worth a remark.
    """
    then, goes_on = checkpoint.get("fingerprints", {}), accepted is not None
    changed = differences(
        {name: value for name, value in then.items() if goes_on or name in fingerprints}, fingerprints
    )
    if refused := [text for name, text in changed.items() if name not in (accepted or ())]:
        remedy = f", or name what may differ: --checkpoint.accept_changes '[{', '.join(changed)}]'" if goes_on else ""
        problem = f"expected the run that wrote it, found another ({'; '.join(refused)})."
        raise CheckpointError("checkpoint", problem, f"Use the files and options of that run{remedy}.")
    before = checkpoint.get("settings", {})
    now = {name: value for name, value in settings.items() if goes_on and name in before}
    for text in differences({name: before[name] for name in now}, now).values():
        rank_zero_info(f"checkpoint: {text}.")
    for text in changed.values():
        rank_zero_info(f"checkpoint: {text}, as checkpoint.accept_changes allows.")
    return [f"step {checkpoint['global_step']}: {text}" for text in changed.values()]


def random_state() -> dict[str, Any]:
    """State of this process's generators (torch, its current CUDA device, NumPy, Python) as plain lists."""
    python, numbers, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state().tolist(),
        "cuda": torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None,
        "numpy": [str(kind), [int(key) for key in keys], *(float(value) for value in rest)],  # type: ignore[arg-type]
        "python": [python, list(numbers), gauss],
    }


@contextmanager
def drawing_from(seed: int, device: torch.device) -> Iterator[None]:
    """Draws by a seed what is drawn on the CPU or this device; every generator is then as it was, other ones always."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would take those of all devices along
        if device.type not in ("cpu", "meta"):
            torch.get_device_module(device).manual_seed(seed)
        yield


def set_random_state(state: dict[str, Any]) -> None:
    """Puts the generators back to where :func:`random_state` found them, or raises a CheckpointError."""
    try:
        generator = bytes(state["torch"])
        # Where the next number is taken from is not looked at by PyTorch and NumPy, even if it is not theirs.
        left, taken = int.from_bytes(generator[8:12], "little"), int.from_bytes(generator[16:24], "little")
        if left < 1 or left + taken > _NUMBERS + 1 or not 0 <= int(state["numpy"][2]) <= _NUMBERS:
            raise ValueError("no position of a generator")
        torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))
        kind, keys, position, has_gauss, gauss = state["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), int(position), int(has_gauss), gauss))
        python, numbers, gauss = state["python"]
        random.setstate((python, tuple(numbers), gauss))
    except (LookupError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError("checkpoint", "expected random numbers as they were saved, found others.") from error
