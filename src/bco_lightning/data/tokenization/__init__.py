"""From rows to token ids: chat templates, limits, control tokens."""

from bco_lightning.data.tokenization.chat_script import PLAIN_TEMPLATE
from bco_lightning.data.tokenization.row_tokenizer import LengthLimits, RowTokenizer, chosen_template

__all__ = ["PLAIN_TEMPLATE", "LengthLimits", "RowTokenizer", "chosen_template"]
