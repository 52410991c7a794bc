"""The tiny model and log of the trials, made once."""

from __future__ import annotations

import pytest

from tests.reliability.tiny_run import make_log, make_model


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random two-layer Llama with a byte tokenizer."""
    return make_model(tmp_path_factory.mktemp("byte_model"))


@pytest.fixture(scope="session")
def feedback(tmp_path_factory: pytest.TempPathFactory) -> str:
    """96 rows, 64 of them thumbs-up."""
    return make_log(tmp_path_factory.mktemp("feedback") / "log.jsonl")
