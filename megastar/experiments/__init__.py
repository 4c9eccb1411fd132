"""Comparisons of variants with several seeds: megastar compare."""
