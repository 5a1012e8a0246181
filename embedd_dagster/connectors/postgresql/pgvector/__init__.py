"""Vectors in the user's own PostgreSQL."""
