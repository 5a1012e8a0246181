"""What a collection's strict mode allows. Hosted Qdrant switches it on; an own server has it where somebody set it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class CollectionLimits:
    """The limits of `strict_mode_config` that concern our calls, under Qdrant's own names; None means no limit."""

    max_query_limit: int | None = None
    search_max_hnsw_ef: int | None = None
    search_allow_exact: bool | None = None
    upsert_max_batchsize: int | None = None
    filter_max_conditions: int | None = None
    condition_max_size: int | None = None
    max_payload_index_count: int | None = None
    unindexed_filtering_retrieve: bool | None = None
    read_rate_limit: int | None = None
    write_rate_limit: int | None = None

    @classmethod
    def from_info(cls, info: Mapping[str, Any]) -> Self:
        """The limits of a collection, from what `GET /collections/{name}` says of it."""
        given = info.get("config", {}).get("strict_mode_config") or {}
        if not given.get("enabled"):
            return cls()
        return cls(**{name: given[name] for name in LIMIT_NAMES if given.get(name) is not None})

    @property
    def allows_exact(self) -> bool:
        """Whether a search or a count may be exact."""
        return self.search_allow_exact is not False

    def page(self, wanted: int) -> int:
        """How many points one scroll or search may ask for."""
        return _least(wanted, self.max_query_limit)

    def ids_to_read(self, wanted: int) -> int:
        """How many points one call may read by id: each costs a unit of the minute's reads."""
        return _least(wanted, self.read_rate_limit)

    def points_to_write(self, wanted: int) -> int:
        """How many points one call may write: each costs a unit of the minute's writes."""
        return _least(wanted, self.upsert_max_batchsize, self.write_rate_limit)

    def ids_to_delete(self, wanted: int) -> int:
        """How many points one call may delete by id."""
        return _least(wanted, self.write_rate_limit)

    def conditions(self, wanted: int) -> int:
        """How many conditions a filter may have: each costs a unit of the minute's reads."""
        return _least(wanted, self.filter_max_conditions, self.read_rate_limit)

    def hnsw_ef(self, wanted: int) -> int:
        """How many candidates a search may keep."""
        return _least(wanted, self.search_max_hnsw_ef)


LIMIT_NAMES = tuple(item.name for item in fields(CollectionLimits))
UNLIMITED = CollectionLimits()


def _least(wanted: int, *limits: int | None) -> int:
    return max(1, min(wanted, *(wanted if limit is None else limit for limit in limits)))
