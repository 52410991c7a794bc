"""Digests that change with what they are of, and with nothing else."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from bco_lightning.identity import (
    differences,
    digest_of_tensor,
    digest_of_tensors,
    digest_of_tokenizer,
    git_revision,
    random_state,
    set_random_state,
    versions,
)


def test_tensors_are_told_apart_by_name_shape_type_and_every_byte() -> None:
    weight = torch.arange(6.0)
    first = digest_of_tensors([("a", weight), ("b", weight)])
    assert digest_of_tensors([("b", weight.clone()), ("a", weight)]) == first
    nearly = weight.clone()
    nearly.view(torch.uint8)[23] ^= 1
    for other in (
        [("a", weight), ("c", weight)],
        [("a", weight.view(2, 3)), ("b", weight)],
        [("a", weight.view(torch.int32)), ("b", weight)],
        [("a", nearly), ("b", weight)],
    ):
        assert digest_of_tensors(other) != first


def test_a_digest_is_sha256_of_what_it_says_it_is() -> None:
    weight = torch.tensor([[1.0, -2.0]], dtype=torch.bfloat16)
    expected = hashlib.sha256(b"(1, 2) torch.bfloat16\n" + bytes([0x80, 0x3F, 0x00, 0xC0])).hexdigest()
    assert digest_of_tensor(weight) == expected
    assert digest_of_tensors([("w", weight)]) == hashlib.sha256(f'{{"w": "{expected}"}}'.encode()).hexdigest()


def test_a_tensor_that_is_to_be_cast_has_the_digest_of_the_cast_one() -> None:
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    assert digest_of_tensor(weight, torch.bfloat16) == digest_of_tensor(weight.bfloat16())


def test_a_tokenizer_is_told_apart_by_its_vocabulary_and_its_end_token(tokenizer: Any) -> None:
    import copy

    first = digest_of_tokenizer(tokenizer)
    assert digest_of_tokenizer(copy.deepcopy(tokenizer)) == first
    longer, other_end = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    longer.add_tokens(["<new>"])
    other_end.eos_token = "<|endoftext|>"
    assert len({first, digest_of_tokenizer(longer), digest_of_tokenizer(other_end)}) == 3


def test_differences_name_both_values_and_shorten_long_ones() -> None:
    found = differences({"beta": 0.1, "rows": 5, "template": "x" * 50}, {"beta": 0.2, "rows": 5, "template": "y"})
    assert found == {"beta": "beta: 0.1 then, 0.2 now", "template": f"template: {'x' * 12}… then, y now"}


def test_versions_name_torch_as_it_is() -> None:
    assert versions()["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_a_revision_is_that_of_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert git_revision() is None
    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", *command], check=True)  # noqa: S607
    clean = git_revision()
    assert clean is not None
    assert len(clean) == 40


def test_random_numbers_go_on_where_they_were() -> None:
    import random

    import numpy as np

    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), random.random(), float(np.random.randn())

    draw()
    state = random_state()
    first = draw()
    draw()
    set_random_state(state)
    assert draw() == first
