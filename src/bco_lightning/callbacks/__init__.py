"""Callbacks: the reward shift, metrics, the checkpoint of a run, predictions, and the trial on a known reward."""

from bco_lightning.callbacks.implicit_reward_monitor import ImplicitRewardMonitor
from bco_lightning.callbacks.reward_shift_update import RewardShiftUpdate

__all__ = ["ImplicitRewardMonitor", "RewardShiftUpdate"]
