"""The offline demonstration: a feedback log with a known reward behind its thumbs, and what a run made of it."""
