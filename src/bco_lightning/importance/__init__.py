"""Importance weights: how much each thumbs-down row counts, so that their prompts stand for those of thumbs-up rows."""
