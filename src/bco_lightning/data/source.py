"""Names of the former module, until nothing asks for them."""

from bco_lightning.data.formats.record_format import RowFormat
from bco_lightning.data.labels import thumb_by_rule
from bco_lightning.data.options import FormatName, LossOn, Rating, Source, chosen_rating

__all__ = ["FormatName", "LossOn", "Rating", "RowFormat", "Source", "chosen_rating", "thumb_by_rule"]
