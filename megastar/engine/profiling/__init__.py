"""``train.profile``: some steps recorded with torch.profiler."""
