"""Endpoints, a file a resource."""
