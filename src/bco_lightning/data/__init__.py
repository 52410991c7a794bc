"""From feedback logs to batches."""

from bco_lightning.data.datamodule import FeedbackDataModule
from bco_lightning.data.options import Columns, Rating, Source

__all__ = ["Columns", "FeedbackDataModule", "Rating", "Source"]
