"""Training of the tokenizer on any number of ranks: batches, the loop, validation."""
