"""Reads a log as ``fit`` does, up to the first micro-batch."""

from __future__ import annotations

import json
import sys

import bco_lightning.module  # noqa: F401 - what fit imports is not part of reading
from bco_lightning import FeedbackDataModule
from bco_lightning.models.load import load_tokenizer
from workers.watched import Watched


def main() -> None:
    """Reads as the task on the command line says."""
    task = json.loads(sys.argv[1])
    options = {"batch_size": 8, "max_length": 1024, "validation_fraction": 0.0, "seed": 0, **task["options"]}
    data = FeedbackDataModule(task["rows"], tokenizer=load_tokenizer(task["model"]), **options)
    watched = Watched()
    watched.start()
    data.setup("fit")
    watched.mark("read")
    batch = next(iter(data.train_dataloader()))
    watched.mark("first_batch")
    watched.report(tokens=batch.num_tokens)


if __name__ == "__main__":
    main()
