"""The sync status, over every combination of the facts that it follows from."""

from __future__ import annotations

from itertools import product

import pytest

from embedd_dagster.core.status import StatusFacts, SyncStatus, status_of

# the first row that fits decides; None fits both. Columns: deleted, building, paused, failed, live configuration
_TABLE = [
    ((True, None, None, None, None), SyncStatus.DELETING),
    ((False, True, None, None, None), SyncStatus.BACKFILLING),
    ((False, False, True, None, None), SyncStatus.PAUSED),
    ((False, False, False, True, None), SyncStatus.ERROR),
    ((False, False, False, False, "never built"), SyncStatus.PENDING),
    ((False, False, False, False, "outdated"), SyncStatus.PENDING_REBACKFILL),
    ((False, False, False, False, "present"), SyncStatus.SYNCED),
]
_LIVE_VERSIONS = {"never built": None, "outdated": 1, "present": 2}


@pytest.mark.parametrize("facts", list(product(*[[False, True]] * 4, _LIVE_VERSIONS)))
def test_status_of_every_combination_of_facts(facts: tuple[bool, bool, bool, bool, str]) -> None:
    [*flags, live] = facts
    expected = [
        status
        for wanted, status in _TABLE
        if all(one is None or one == found for one, found in zip(wanted, facts, strict=True))
    ]
    assert [status_of(StatusFacts(*flags, 2, _LIVE_VERSIONS[live]))] == expected  # type: ignore[arg-type] # four flags
