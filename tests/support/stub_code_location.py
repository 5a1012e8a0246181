"""A code location for tests of the stack itself: one asset, and one that runs until somebody ends it."""

import time

import dagster as dg


@dg.asset
def quick() -> None:
    """Done at once."""


@dg.asset
def endless() -> None:
    while True:
        time.sleep(0.2)


defs = dg.Definitions(
    assets=[quick, endless],
    jobs=[dg.define_asset_job("quick_job", "quick"), dg.define_asset_job("endless_job", "endless")],
)
