"""A GGUF file as an ordinary model folder: transformers converts it once, by content, and it is mapped ever after."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from lightning.pytorch.utilities import rank_zero_info
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedConfig

from bco_lightning.checkpoints.folders import discard, written_whole
from bco_lightning.errors import LanguageModelError
from bco_lightning.identity import digest_of_file
from bco_lightning.models.refusals import LACKS_ARE_TOLD, refuse_incomplete, refuse_unsafe_config
from bco_lightning.places import is_private

FOLDER = "converted_models"
_MANIFEST = "converted.json"  # written last, so a folder that has it is whole
_FORMAT = 1  # of what is written here


def converted(file: Path, cache: Path) -> Path:
    """The folder of ``.safetensors`` and tokenizer that a GGUF file was converted to, by this call if by none before.

    Weights are those that transformers makes of the file's blocks, in float32. Processes that ask at once wait for the
    one that converts.
    """
    status = file.stat()
    folder = cache / FOLDER / _key(str(file), status.st_size, status.st_mtime_ns)
    if not _is_whole(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not _is_whole(folder):
                rank_zero_info(f"{file.name} is converted once to {folder}; later starts map the weights from there")
                _convert(file, folder, status.st_mtime_ns)
    return folder


def read_gguf(file: Path, config: PreTrainedConfig | None = None) -> Any:
    """The model of a GGUF file in float32, and what transformers says of its weights."""
    whole = GgufConfig(dequantize=True)  # packed blocks can neither be trained nor saved
    how = {"config": config, "gguf_file": file.name, "dtype": torch.float32, "quantization_config": whole}
    return AutoModelForCausalLM.from_pretrained(file.parent, trust_remote_code=False, **how, **LACKS_ARE_TOLD)


@lru_cache
def _key(file: str, size: int, changed: int) -> str:
    """Size and time say when the content is to be read again; another transformers may make other weights of it."""
    return f"{digest_of_file(Path(file))[:32]}-{transformers.__version__}-{_FORMAT}"


def _is_whole(folder: Path) -> bool:
    try:
        if not is_private(folder):  # who could write there could choose the weights
            return False
        sizes = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _convert(file: Path, folder: Path, changed: int) -> None:
    refuse_unsafe_config(str(file), PreTrainedConfig.get_config_dict(file.parent, gguf_file=file.name)[0])
    discard(folder)  # what a changed or cut file has left, or somebody else has put there
    with written_whole(folder) as draft:
        draft.mkdir(mode=0o700)
        model, found = read_gguf(file)
        refuse_incomplete(str(file), "model", found)
        model.save_pretrained(draft)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False).save_pretrained(draft)
        read = AutoModelForCausalLM.from_pretrained(draft, dtype=torch.float32, trust_remote_code=False).state_dict()
        for tensor, weight in model.state_dict().items():
            if not torch.equal(read[tensor], weight):
                raise OSError(f"what was written of {tensor} to {draft} reads back as something else")
        sizes = {path.name: path.stat().st_size for path in draft.iterdir()}
        (draft / _MANIFEST).write_text(json.dumps(sizes), encoding="utf-8")
        if file.stat().st_mtime_ns != changed:  # the folder has the name of what it held before
            problem = "expected a file that stays as it is while it is converted, found that it changed."
            raise LanguageModelError(str(file), problem, "Start again.")
