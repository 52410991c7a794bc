"""Of every architecture, log-probs and gradients are those of transformers in float64, or it is refused in words."""

from __future__ import annotations

import pytest

from tests.unit.architectures import FAMILIES, MODES, TABLE, outcomes, table_row

TELLING = {
    "mpt": "biases for distances, and a config within the config",
    "gemma2": "sliding windows and capped logits",
    "phimoe": "noise in routers",
    "jamba": "recurrent layers, and a weight that is read past its adapter",
    "deepseek_v4": "clamps in gated layers",
    "minimax_m3_vl_text": "attention to some blocks",
    "phi3 (longrope)": "frequencies that follow the longest row",
    "opt (dropout)": "dropout, and layers that are left out",
}


@pytest.mark.parametrize("family", TELLING, ids=TELLING.get)
def test_log_probs_and_gradients_are_those_of_rows_alone_in_float64(family: str) -> None:
    found = outcomes(family, ("full, recomputed", "LoRA, top layer"))
    assert [mode for mode, each in found.items() if not each.right or each.refused] == []


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_is_right_or_refused_in_words_as_the_table_says(family: str) -> None:
    assert table_row(family) in TABLE.read_text(encoding="utf-8").splitlines()


def test_the_table_names_every_architecture_that_is_tried() -> None:
    rows = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows[1:]] == list(FAMILIES)
    assert len(MODES) == 6
