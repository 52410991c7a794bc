"""Checkpoints that are whole or not there at all, in one format for every strategy and number of processes."""

from bco_lightning.checkpoints.folders import saved_steps, step_folder, step_of
from bco_lightning.checkpoints.format import VerifiedCheckpointIO, read_checkpoint, use_verified_io, write_checkpoint
from bco_lightning.checkpoints.manifest import newest_verified, resolve_checkpoint, verify_checkpoint

__all__ = [
    "VerifiedCheckpointIO",
    "newest_verified",
    "read_checkpoint",
    "resolve_checkpoint",
    "saved_steps",
    "step_folder",
    "step_of",
    "use_verified_io",
    "verify_checkpoint",
    "write_checkpoint",
]
