"""Policy, reference, and log-probabilities of completions."""
