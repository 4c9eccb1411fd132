"""Weights as a folder of the Hugging Face Hub's layout: writing, reading, fetching and publishing it (docs/hub.md)."""
