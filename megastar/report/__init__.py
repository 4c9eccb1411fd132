"""Run folders -> one self-contained HTML page: curves, sample grids, attention, configuration, events."""
