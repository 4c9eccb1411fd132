"""The token-shard format: manifest, index, reader, writer, verification."""
