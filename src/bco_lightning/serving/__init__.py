"""What becomes of a trained policy: exported, served, and talked to."""
