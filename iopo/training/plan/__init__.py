"""plan=true: memory, FLOPs and communication of a run without weights or a GPU."""
