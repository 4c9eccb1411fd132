"""Run folders -> one HTML page that needs nothing else: curves, sample grids, attention, configuration.

Reading run folders is the command's part (commands/report.py); this package takes what it read.
"""
