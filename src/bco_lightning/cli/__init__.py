"""The command line; importing this package loads no PyTorch, so that help which is known comes at once."""
