"""The rules of single sections; ``config/validate.py`` collects them."""
