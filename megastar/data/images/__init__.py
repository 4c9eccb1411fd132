"""Images as input of the tokenizer: folders, tars, lists; crops."""
