"""Batches for the training loop, and checks of the data that a run reads."""
