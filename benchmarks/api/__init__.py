"""What the API itself costs: beside an embedding call and a search, beside Dagster, and beside ten thousand tables."""
