"""Dagster, a module per concept. Nothing here means anything about vectors: that is the engine's and the core's."""
