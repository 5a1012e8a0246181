"""The data plane, over the three Protocols: backfill, sync, search, teardown. Knows neither the API nor Dagster."""
