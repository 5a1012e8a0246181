"""The REST API: turns calls into catalog writes and run launches, and answers queries. Imports no Dagster."""
