"""Runs that survive the loss of a node: torch's elastic agent, and checkpoints in the memory of other nodes (docs/elastic.md)."""
