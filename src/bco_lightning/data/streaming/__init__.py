"""Rows that stay in their files: an index of blocks, an order by blocks, and rows read when they are asked for."""

from bco_lightning.data.streaming.dataset import StreamDataset
from bco_lightning.data.streaming.index import StreamIndex
from bco_lightning.data.streaming.order import StreamOrder
from bco_lightning.data.streaming.rows import StreamedRows

__all__ = ["StreamDataset", "StreamIndex", "StreamOrder", "StreamedRows"]
