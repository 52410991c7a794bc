"""Memory of each of two processes while a model is loaded under ddp and fsdp2, as a share of whole weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

RESULTS = Path(__file__).parent / "results" / "loading.json"
ROWS = 12
SHAPE = {
    "vocab_size": 32_000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}
CASES = [(strategy, lora) for lora in (False, True) for strategy in ("ddp", "fsdp2")]


def make_files(folder: Path) -> tuple[int, dict[str, str]]:
    """Writes a random Llama in bfloat16 and a few rows; returns its number of parameters."""
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).bfloat16()
    model.save_pretrained(folder / "model")
    words = {word: number for number, word in enumerate(["</s>", "<unk>", *map(str, range(100))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))  # noqa: S106 (no secret)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "model")
    rows = [{"prompt": f"{number}", "completion": "1 2 3", "label": number % 2 == 0} for number in range(ROWS)]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return sum(parameter.numel() for parameter in model.parameters()), {
        "model": str(folder / "model"),
        "log": str(folder / "log.jsonl"),
    }


def measure(strategy: str, lora: bool, files: dict[str, str], folder: Path) -> dict[str, Any]:
    """Loads in two processes; full fine-tuning casts to float32, adapters stand on bfloat16."""
    dtype = "bfloat16" if lora else "float32"
    output = folder / "figures"
    how = {**files, "strategy": strategy, "dtype": dtype, "lora": lora, "output": str(output), "steps": ROWS // 2}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "workers.load_peak"]
    # glibc would keep large blocks that were freed; with a fixed threshold they go back, and are not counted.
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "131072",
        "OMP_NUM_THREADS": "1",
        "BCO_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    subprocess.run(
        [sys.executable, *launcher, json.dumps(how)],
        cwd=Path(__file__).parent,
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    ranks = [json.loads(Path(f"{output}.{rank}").read_text(encoding="utf-8")) for rank in (0, 1)]
    return {"strategy": strategy, "lora": lora, "dtype": dtype, **{key: max(r[key] for r in ranks) for key in ranks[0]}}


def main() -> None:
    """Measures every case, prints a table and writes the figures."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters, files = make_files(folder)
        measure("ddp", False, files, folder)  # leaves reference log-probs, so that no pass is measured
        measured = [measure(strategy, lora, files, folder) for strategy, lora in CASES]
    table = Table("strategy", "trained", "weights in", "whole, MiB", "peak, MiB", "peak / whole", "after, MiB")
    for found in measured:
        found["whole_mib"] = parameters * (2 if found["dtype"] == "bfloat16" else 4) / 2**20
        table.add_row(
            found["strategy"],
            "LoRA" if found["lora"] else "all",
            found["dtype"],
            *(f"{found[key]:,.0f}" for key in ("whole_mib", "peak_mib")),
            f"{found['peak_mib'] / found['whole_mib']:.2f}",
            f"{found['after_mib']:,.0f}",
        )
    Console().print(table)
    RESULTS.write_text(json.dumps({"parameters": parameters, "cases": measured}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
