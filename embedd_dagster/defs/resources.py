"""The one resource: how assets, checks and sensors reach the catalog, the stores and the engine."""

from __future__ import annotations

from functools import lru_cache

import dagster as dg

from embedd_dagster.engine.runtime import Runtime
from embedd_dagster.settings import get_settings


@lru_cache(maxsize=1)
def _process_runtime() -> Runtime:
    return Runtime.open(get_settings())


class RuntimeResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """The engine's `Runtime`, opened at its first use: loading the code location reads no setting, connects to nothing.

    One a process, since sensors tick every few seconds; its connections are given back at the end of a run.
    """

    def open(self) -> Runtime:
        """The process's runtime. Raises ConfigurationError that names each setting at fault."""
        return _process_runtime()

    def teardown_after_execution(self, context: dg.InitResourceContext) -> None:
        """Gives the connections back after a run; those of a sensor are kept for the next tick."""
        if context.run is not None and _process_runtime.cache_info().currsize:
            _process_runtime().close()
