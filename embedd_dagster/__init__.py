"""embedd: keeps tables of a database searchable by meaning.

`core` says what the product means, `sources`, `embedders` and `stores` talk to the outside, `catalog` remembers,
`engine` moves the rows, `defs` gives the work to Dagster, `local` is the embedded stack of `embedd up`.
"""

__version__ = "0.1.0"

DISTRIBUTION = "embedd-vector-tables"
"""The name of the wheel. PyPI's `embedd` is somebody else's package: no message may tell people to install that."""

HOW_TO_INSTALL_LOCAL = (
    f"Install the extra `local`: `make setup` in a checkout, or pip install '<path of the {DISTRIBUTION} wheel>[local]'"
)
