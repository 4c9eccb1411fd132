"""Where shards are stored: a folder, S3 with a cache on the node."""
