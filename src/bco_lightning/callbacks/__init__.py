"""Callbacks on one hook, a step has ended: guard, reward shift, metrics, speed, checkpoints; and trust, predictions."""

from bco_lightning.callbacks.finite_guard import FiniteGuard
from bco_lightning.callbacks.held_out_rows import HeldOutRows
from bco_lightning.callbacks.implicit_reward_monitor import ImplicitRewardMonitor
from bco_lightning.callbacks.loggers import MetricsFile, TrackioLogger
from bco_lightning.callbacks.prediction_writer import PredictionWriter
from bco_lightning.callbacks.remarks import hide_remarks
from bco_lightning.callbacks.run_checkpoint import RunCheckpoint
from bco_lightning.callbacks.run_header import RunHeader
from bco_lightning.callbacks.sample_writer import SampleWriter
from bco_lightning.callbacks.speed_monitor import SpeedMonitor
from bco_lightning.callbacks.step_callback import RewardShiftUpdate, StepCallback
from bco_lightning.callbacks.step_progress_bar import StepProgressBar

hide_remarks()
# Every run has one of each.
OF_THE_METHOD = (RunHeader, FiniteGuard, ImplicitRewardMonitor, HeldOutRows, RewardShiftUpdate)

__all__ = [
    "OF_THE_METHOD",
    "FiniteGuard",
    "HeldOutRows",
    "ImplicitRewardMonitor",
    "MetricsFile",
    "PredictionWriter",
    "RewardShiftUpdate",
    "RunCheckpoint",
    "RunHeader",
    "SampleWriter",
    "SpeedMonitor",
    "StepCallback",
    "StepProgressBar",
    "TrackioLogger",
]
