"""Loading and saving of a run's checkpoints on all ranks."""
