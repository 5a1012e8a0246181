"""Vector stores, one file each; `open_store` is the registry."""
