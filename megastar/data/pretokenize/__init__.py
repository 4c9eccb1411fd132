"""Images to token shards, by any number of processes."""
