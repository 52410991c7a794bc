"""Remarks of libraries that nobody can act on: this package is used as it is meant to be, whatever they guess."""

from __future__ import annotations

import logging
import re
import warnings


def hide_remarks() -> None:
    """Hides them, on the command line and in the process of whoever imports a module; a notebook shows them all."""
    for message in (
        r".*LeafSpec.*",  # lightning 2.6.6 with torch 2.13
        r".*gradient_checkpointing.*deprecated.*",  # peft 0.21 with transformers 5.23
        r"Found \d+ module\(s\) in eval mode.*",  # meant: dropout would blur the log-ratio
        r".*does not have many workers.*",  # rows are tokenized before training; collation is all that is left
        r".*litlogger.*",
        r"LightningCLI's args parameter is intended.*",  # it is given what the process was, without --debug
        r"It is recommended to use `self.log\(.*sync_dist=True\)`.*",  # a metric is summed when it is read
        r"The number of training batches .* is smaller than the logging interval.*",  # at first every step is logged
        r"You have overridden `on_before_batch_transfer`.*",  # which looks at a batch and gives it on
        r"Total length of `list` across ranks is zero.*",  # no rows are held out
        r"You are using a custom batch sampler .* for prediction.*",  # it gives every row
        r"You're resuming from a checkpoint that ended before the epoch ended.*",  # the row order follows the step
        r"Already found a `peft_config`.*",  # an incoming adapter stands beside the one that is trained
    ):
        warnings.filterwarnings("ignore", message=message)
    for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.pytorch.{name}").addFilter(
            lambda record: not re.search(r"litlogger|litmodels|weights_only|TPU available", record.getMessage())
        )
