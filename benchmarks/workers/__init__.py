"""Processes that train one optimizer step when told to."""
