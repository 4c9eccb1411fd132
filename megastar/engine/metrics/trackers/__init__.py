"""Experiment trackers: where the main rank sends rows, events and images beside the files of the run folder."""
