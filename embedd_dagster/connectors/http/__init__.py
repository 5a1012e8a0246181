"""What the embedding providers behind an HTTP API share."""
