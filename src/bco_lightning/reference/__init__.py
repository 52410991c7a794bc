"""The frozen reference, which is the policy as it came in: as a model, or as log-probs that are known."""
