"""What a run folder holds and how to read it. No torch."""
