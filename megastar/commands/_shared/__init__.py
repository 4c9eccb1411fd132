"""Shared by the commands: output paths, JSON on standard output, shell completion."""
