"""The quantizers of the tokenizer, one file each; ``make.py`` selects one by the configuration."""
