"""What the product means. Pure: no I/O, no clock, no vendor, no Dagster."""
