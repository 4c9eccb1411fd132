"""The checks of `megastar doctor`: of one node, and of all nodes of a job together."""
