"""The offline demonstration: a feedback log whose thumbs come from a known reward, and the program that made it."""
