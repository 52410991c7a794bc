"""A log before GPU hours are spent on it, and a run after it: ``inspect`` and ``report``, from Python too."""
