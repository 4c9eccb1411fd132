"""Sections of a configuration that have a file of their own; ``config/schema.py`` has the others and puts them together."""
