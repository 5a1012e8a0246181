"""The REST API: writes requests into the catalog, launches runs, and answers queries. Does not import Dagster."""
