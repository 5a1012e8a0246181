"""PostgreSQL: a source, its CDC stream, and vectors in its own tables by pgvector."""
