"""The names of what a vector table has in a database: a table per vector set, and a view that users query. Pure."""

from __future__ import annotations

from embedd_dagster.core.rows import VectorSet


def table_name(vector_set: VectorSet) -> str:
    """The name of a set's table: at most 47 characters."""
    return f"embedd_{vector_set.versioned_name}"


def view_name(public_name: str) -> str:
    """The name of the view that users see: `embedd_vt_<8>_<slug>`, within PostgreSQL's 63 bytes."""
    return f"embedd_{public_name}"[:63]


def platform_vector_ref(schema: str, public_name: str) -> str:
    """The view as the API shows it: `public.embedd_vt_<8>_<slug>`."""
    return f"{schema}.{view_name(public_name)}"
