"""A small model that runs in the process."""
