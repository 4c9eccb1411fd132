"""What `megastar doctor` asks of a node, and of the nodes together."""
