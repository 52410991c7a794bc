"""Several processes: what FSDP cuts and loads, and the only place where they talk to each other."""
