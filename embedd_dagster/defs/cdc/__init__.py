"""CDC in Dagster: one long-lived run for each connection, and the sensor that keeps it alive."""
