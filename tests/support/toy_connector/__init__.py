"""A connector that lives in the tests alone: source, stores and embedder over data in memory."""
