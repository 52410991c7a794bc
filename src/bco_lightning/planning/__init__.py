"""What a run would take of each GPU's memory, before it is started."""
