"""Checkpoint files: their format, conversion, inspection. No deepspeed, no torch.distributed."""
