"""A log before GPU hours are spent on it, and a run after it: ``inspect`` and ``report``, from Python too."""

from bco_lightning.inspection.inspect import inspect_log
from bco_lightning.inspection.run_record import RunRecord
from bco_lightning.inspection.run_report import report_runs

__all__ = ["RunRecord", "inspect_log", "report_runs"]
