"""The benchmarks' data: a table of products with texts of some 66 words, the same on every machine."""

from __future__ import annotations

import psycopg

TABLE = "bench_products"

_WORDS = [
    *(
        "river",
        "stone",
        "market",
        "garden",
        "window",
        "silver",
        "paper",
        "morning",
        "engine",
        "signal",
        "bridge",
        "carbon",
    ),
    *(
        "island",
        "harbor",
        "meadow",
        "copper",
        "violet",
        "lantern",
        "orbit",
        "timber",
        "canvas",
        "marble",
        "prairie",
        "summit",
    ),
    *(
        "anchor",
        "beacon",
        "cedar",
        "delta",
        "ember",
        "fjord",
        "glacier",
        "hollow",
        "indigo",
        "jasper",
        "kernel",
        "lagoon",
    ),
    *(
        "mosaic",
        "nectar",
        "opal",
        "pebble",
        "quartz",
        "ripple",
        "saddle",
        "tundra",
        "umbra",
        "valley",
        "willow",
        "xenon",
    ),
    *("yarrow", "zephyr"),
]


def create_table(database_url: str, row_count: int, words: int = 66) -> None:
    """A fresh table of `row_count` rows: id, title, body (so many words), category, price. Built by the server itself."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(f"DROP TABLE IF EXISTS {TABLE} CASCADE")  # views of peers
        connection.execute(
            f"CREATE TABLE {TABLE} (id bigint PRIMARY KEY, title text, body text, category text, price numeric(10, 2))"
        )
        # a linear congruence a row instead of random(): the same texts on every machine
        connection.execute(
            f"""INSERT INTO {TABLE}
            SELECT n, 'product ' || n,
                (SELECT string_agg((%s::text[])[1 + ((n * 7919 + w * 104729 + n * w * 31) %% {len(_WORDS)})], ' ')
                 FROM generate_series(1, {words - 2}) w),
                (ARRAY['red', 'green', 'blue', 'black'])[n %% 4 + 1], (n %% 10000) / 100.0
            FROM generate_series(1::bigint, {row_count}) n""",
            [_WORDS],
        )
        connection.execute(f"VACUUM ANALYZE {TABLE}")
