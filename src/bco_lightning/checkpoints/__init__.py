"""Checkpoints that are whole or not there at all, in one format for every strategy and number of processes."""
