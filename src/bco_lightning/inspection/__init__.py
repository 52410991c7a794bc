"""``python -m bco_lightning inspect``: what a feedback log looks like, before GPU hours are spent on it."""
