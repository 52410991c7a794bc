"""From feedback logs to batches."""

from bco_lightning.data.datamodule import FeedbackDataModule
from bco_lightning.data.feedback_row import Columns

__all__ = ["Columns", "FeedbackDataModule"]
