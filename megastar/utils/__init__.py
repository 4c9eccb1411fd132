"""Helpers that import nothing of megastar but megastar.errors."""
