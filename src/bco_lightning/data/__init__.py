"""From feedback logs to batches."""

from bco_lightning.data.datamodule import FeedbackDataModule
from bco_lightning.data.feedback_row import Columns
from bco_lightning.data.source import Rating, Source

__all__ = ["Columns", "FeedbackDataModule", "Rating", "Source"]
