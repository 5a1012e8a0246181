"""Makes Dagster agree with the catalog: observe both, plan, apply."""
