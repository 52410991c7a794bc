"""No process ever has a whole float32 copy of a model that is cut up."""

from __future__ import annotations

import ctypes
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from transformers import LlamaConfig, LlamaForCausalLM

from bco_lightning import BCOModule
from tests.reliability.tiny_run import byte_tokenizer, finish, make_log, start, tiny_fit


class Memory(Callback):
    """Memory that this process alone has, from before the model is loaded to after it is cut up."""

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        self.before = self.peak = own_bytes()
        self.watching = True
        threading.Thread(target=self.watch, daemon=True).start()

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        self.watching = False

    def watch(self) -> None:
        while self.watching:
            self.peak = max(self.peak, own_bytes())
            time.sleep(0.001)


def own_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def peak(model: str, log: str) -> int:
    ctypes.CDLL(None).mallopt(-3, 2**17)  # M_MMAP_THRESHOLD: what is freed goes back at once, and is not counted
    memory, module = Memory(), BCOModule(model, dtype="float32")
    tiny_fit(
        model, log, module=module, callbacks=[memory],
        trainer_options={"devices": 2, "strategy": "fsdp2", "max_steps": 1},
        data_options={"batch_size": 2},
    )  # fmt: skip
    return memory.peak - memory.before


@pytest.mark.slow
def test_the_peak_while_loading_is_below_a_whole_float32_copy(tmp_path: Path) -> None:
    """Half of it is the process's own part; the rest is a layer, the head, and a pass for reference log-probs."""
    shape = LlamaConfig(
        vocab_size=4000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=12,
    )  # fmt: skip
    model = LlamaForCausalLM(shape).bfloat16()
    whole = 4 * sum(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    log = make_log(tmp_path / "log.jsonl", num_rows=4)
    run = partial(peak, str(tmp_path / "model"), log)
    peaks = finish(start(run, ranks=2, folder=tmp_path), tmp_path)
    assert max(peaks) < whole
