"""Names of the former module, until nothing asks for them."""

from bco_lightning.data.labels import LabelVocabulary
from bco_lightning.data.options import Columns

__all__ = ["Columns", "LabelVocabulary"]
