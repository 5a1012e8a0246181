"""Embedding providers, one file each; `open_embedder` is the registry."""
