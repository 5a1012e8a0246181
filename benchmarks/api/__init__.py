"""What the API itself costs: compared with an embedding call and a search, next to Dagster, and with ten thousand tables."""
