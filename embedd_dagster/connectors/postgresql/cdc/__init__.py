"""CDC from PostgreSQL by logical replication over plain SQL."""
