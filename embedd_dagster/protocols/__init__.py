"""What a connector must be able to do: a source, its stream of changes, a vector store, an embedder."""
