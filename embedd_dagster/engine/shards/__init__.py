"""Shards of a build: loading one, and the pools that load several at once."""
