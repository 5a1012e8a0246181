"""embedd: keeps tables of a database searchable by meaning.

`core` says what the product means, `sources`, `embedders` and `stores` talk to the outside, `catalog` remembers,
`engine` moves the rows, `defs` gives the work to Dagster, `local` is the embedded stack of `embedd up`.
"""
