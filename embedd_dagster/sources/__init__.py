"""Source databases, one file each; `open_source` is the registry."""
