"""What a process of the shard pool does in the tests of the pool: it must be importable there."""

from embedd_dagster.engine.shards import pools


def log_lines(count: int) -> None:
    """Logs so many lines of a thousand characters."""
    assert pools._channel is not None
    for _ in range(count):
        pools._channel.lines.put("x" * 1000)
