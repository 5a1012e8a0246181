"""Qdrant's API over Qdrant Edge, for one machine."""
