"""From files, folders, stores and hubs to records, one at a time."""

from bco_lightning.data.readers.records import MAX_LINE_BYTES, Record, parse_line, read_file, read_records

__all__ = ["MAX_LINE_BYTES", "Record", "parse_line", "read_file", "read_records"]
