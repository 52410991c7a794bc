"""Moved to :mod:`bco_lightning.parallel`; goes when nothing asks for it here any more."""

from bco_lightning.parallel.collectives import *  # noqa: F403
from bco_lightning.parallel.sharding import sharding_of as sharding_of
