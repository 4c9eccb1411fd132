"""The version, in a file without imports: setup.py executes it."""

__version__ = "0.2.0"
