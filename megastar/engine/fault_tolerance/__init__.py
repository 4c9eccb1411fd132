"""Detection of faults during training, and recovery."""
