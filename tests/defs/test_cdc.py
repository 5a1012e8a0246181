"""One live consumer per connection: launched, marked as failed, renewed; decided from facts alone, then carried out for real."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
import pytest

from embedd_dagster.catalog import vector_tables
from embedd_dagster.catalog.database import Catalog
from embedd_dagster.catalog.tables import CdcStreamRow
from embedd_dagster.defs.cdc.job import follow_job
from embedd_dagster.defs.cdc.plan import ConsumerPlan, ConsumerRun, Launch, plan_consumers
from embedd_dagster.defs.cdc.sensor import keep_consuming
from embedd_dagster.defs.liveness import LifeSigns
from embedd_dagster.defs.reconcile.observe import Memory
from embedd_dagster.defs.tags import CONNECTION_TAG
from embedd_dagster.engine.runtime import Runtime

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
RUN = ConsumerRun("r1", "conn_a")


def _feed(**values: Any) -> CdcStreamRow:
    given = {"dagster_run_id": "r1", "claimed_at": NOW - timedelta(minutes=9), "heartbeat_at": NOW, **values}
    return CdcStreamRow(connection_id="conn_a", name="embedd_conn_a", failures=0, created_at=NOW, **given)


def _plan(
    *runs: ConsumerRun,
    feed: CdcStreamRow | None = None,
    follow: bool = True,
    silence_counts: bool = True,
) -> ConsumerPlan:
    feeds = {} if feed is None else {"conn_a": feed}
    wanted = ["conn_a"] if follow else []
    return plan_consumers(
        wanted,
        feeds,
        runs,
        NOW,
        stale_after=timedelta(seconds=30),
        renew_after=timedelta(hours=6),
        silence_counts=silence_counts,
        code_server_started_at=NOW - timedelta(seconds=10),
    )


def _seen(seconds_ago: float, status: dg.DagsterRunStatus = dg.DagsterRunStatus.STARTED) -> ConsumerRun:
    """A run that gave its last heartbeat so long ago."""
    instant = NOW - timedelta(seconds=seconds_ago)
    return replace(RUN, status=status, signs=LifeSigns(changed_at=NOW - timedelta(hours=1), heartbeat_at=instant))


def test_a_connection_to_follow_gets_a_run() -> None:
    assert _plan().launches == (Launch("conn_a"),)


def test_a_run_that_lives_is_left_alone() -> None:
    assert _plan(RUN, feed=_feed()) == ConsumerPlan()


def test_a_run_that_is_starting_is_waited_for() -> None:
    starting = replace(RUN, signs=LifeSigns(started_at=NOW - timedelta(seconds=20)))
    assert _plan(starting) == ConsumerPlan()
    assert _plan(starting, feed=_feed(dagster_run_id=None, heartbeat_at=None)) == ConsumerPlan()


def test_a_run_whose_code_server_was_killed_while_it_started_is_buried_within_a_minute() -> None:
    starting = replace(
        RUN, status=dg.DagsterRunStatus.STARTING, signs=LifeSigns(changed_at=NOW - timedelta(seconds=46))
    )
    assert _plan(starting) == ConsumerPlan((Launch("conn_a"),), (starting,))


def test_a_silent_run_is_buried_and_another_launched_at_once() -> None:
    planned = _plan(RUN, feed=_feed(heartbeat_at=NOW - timedelta(seconds=31)))
    assert planned == ConsumerPlan((Launch("conn_a"),), (RUN,))


def test_after_an_outage_of_the_catalog_silence_says_nothing() -> None:
    silent = _feed(heartbeat_at=NOW - timedelta(seconds=31))
    assert _plan(RUN, feed=silent, silence_counts=False) == ConsumerPlan()


def test_a_run_that_gave_its_feed_back_and_died_is_buried_within_a_minute() -> None:
    for gone in (_seen(31), _seen(31, dg.DagsterRunStatus.CANCELING)):
        assert _plan(gone, feed=_feed(dagster_run_id=None, heartbeat_at=None)).dead == (gone,)
    never = replace(RUN, signs=LifeSigns(started_at=NOW - timedelta(seconds=46)))
    assert _plan(never, feed=_feed(dagster_run_id=None)).dead == (never,)


def test_a_run_that_was_replaced_lives_as_long_as_it_gives_heartbeats() -> None:
    successor = ConsumerRun("r2", "conn_a")
    theirs = _feed(dagster_run_id="r2")
    assert _plan(_seen(20), successor, feed=theirs) == ConsumerPlan()
    assert _plan(_seen(31), successor, feed=theirs).dead == (_seen(31),)
    assert _plan(_seen(31), successor, feed=theirs, silence_counts=False) == ConsumerPlan()


def test_after_a_bad_end_the_next_run_waits() -> None:
    ended = {"dagster_run_id": None, "heartbeat_at": None}
    assert _plan(feed=_feed(**ended, next_start_at=NOW + timedelta(seconds=5))) == ConsumerPlan()
    assert _plan(feed=_feed(**ended, next_start_at=NOW)).launches == (Launch("conn_a"),)


def test_an_old_run_gets_one_successor_while_it_goes_on() -> None:
    old = _feed(claimed_at=NOW - timedelta(hours=7))
    assert _plan(RUN, feed=old) == ConsumerPlan((Launch("conn_a", behind="r1"),))
    successor = ConsumerRun("r2", "conn_a")
    assert _plan(RUN, successor, feed=old) == ConsumerPlan()


def test_what_is_not_to_be_followed_gets_nothing() -> None:
    assert _plan(feed=_feed(dagster_run_id=None), follow=False) == ConsumerPlan()
    assert _plan(RUN, feed=_feed(), follow=False) == ConsumerPlan()


@pytest.mark.parametrize("outage", [False, True])
def test_a_consumer_is_not_buried_for_the_catalogs_silence(
    instance: dg.DagsterInstance, runtime: Runtime, tables: Any, outage: bool
) -> None:
    table_id = tables.create("a")
    with runtime.catalog.transaction() as session:
        connection_id = vector_tables.find(session, table_id).connection_id
    run = instance.create_run_for_job(
        follow_job,
        run_config={"ops": {"follow_changes": {"config": {"connection_id": connection_id}}}},
        tags={CONNECTION_TAG: connection_id},
        status=dg.DagsterRunStatus.STARTED,
    )
    with runtime.catalog.transaction() as session:
        long_ago = datetime.now(UTC) - timedelta(hours=1)
        values = {"dagster_run_id": run.run_id, "claimed_at": long_ago, "heartbeat_at": long_ago}
        session.add(
            CdcStreamRow(connection_id=connection_id, name="embedd_a", failures=0, created_at=long_ago, **values)
        )
    memory = Memory()
    if outage:
        away = Runtime(runtime.settings, Catalog("postgresql://nobody@127.0.0.1:1/none"), runtime.box)
        assert isinstance(keep_consuming(instance, lambda: away, memory, print), dg.SkipReason)
    keep_consuming(instance, lambda: runtime, memory, print)
    is_in_flight = not instance.get_run_by_id(run.run_id).is_finished
    assert is_in_flight == outage
