"""CDC: applies the changes of source tables to their vectors."""
