"""The configuration of a vector table: columns, modes, limits, and the name it is stored under."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from embedd_dagster.errors import ValidationFailed

MAX_NAME_LENGTH: Final = 100
MAX_COLUMNS: Final = 200
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9_-]+")


class ColumnRole(StrEnum):
    """What a column is for."""

    EMBEDDING = "embedding"
    METADATA = "metadata"


class FilterType(StrEnum):
    """How a metadata column is stored, indexed and compared."""

    KEYWORD = "keyword"
    INTEGER = "integer"
    FLOAT = "float"
    BOOLEAN = "boolean"


class Mode(StrEnum):
    """Where the vectors live: in our own store (managed) or in the source database (platform)."""

    MANAGED = "managed"
    PLATFORM = "platform"


class SyncMode(StrEnum):
    """How changes of the source are found: by digest on a schedule, or by its change log."""

    BATCH = "batch"
    CDC = "cdc"


@dataclass(frozen=True, slots=True)
class Column:
    """One configured column; the same source column may stand once in each role."""

    name: str
    role: ColumnRole
    ordinal: int | None = None
    name_prefix: str | None = None
    filter_type: FilterType | None = None

    def to_json(self) -> dict[str, Any]:
        """The column as the API shows it: fields that do not apply are left out."""
        fields = {
            "name": self.name,
            "role": self.role.value,
            "ordinal": self.ordinal,
            "name_prefix": self.name_prefix or None,
        }
        fields["filter_type"] = self.filter_type.value if self.filter_type else None
        return {name: value for name, value in fields.items() if value is not None}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Column:
        """The column that `to_json` gave these fields for."""
        filter_type = fields.get("filter_type")
        return cls(
            name=fields["name"],
            role=ColumnRole(fields["role"]),
            ordinal=fields.get("ordinal"),
            name_prefix=fields.get("name_prefix"),
            filter_type=FilterType(filter_type) if filter_type else None,
        )


@dataclass(frozen=True, slots=True)
class VectorConfiguration:
    """Everything that decides what the vectors of a table are: a snapshot of it is kept with every vector set."""

    source_table: str
    primary_key_column: str
    columns: tuple[Column, ...]
    embedding_model: str
    embedding_dimensions: int
    embedding_provider_id: str | None = None

    @property
    def embedding_columns(self) -> tuple[Column, ...]:
        """Embedding columns in the order of their text: by ordinal, those without one last, ties as given."""
        given = [column for column in self.columns if column.role is ColumnRole.EMBEDDING]
        return tuple(sorted(given, key=lambda column: (column.ordinal is None, column.ordinal or 0)))

    @property
    def metadata_columns(self) -> tuple[Column, ...]:
        """Metadata columns in the order given."""
        return tuple(column for column in self.columns if column.role is ColumnRole.METADATA)

    @property
    def filter_types(self) -> dict[str, FilterType]:
        """The filter type of each metadata column."""
        return {column.name: column.filter_type for column in self.metadata_columns if column.filter_type}

    @property
    def column_names(self) -> tuple[str, ...]:
        """The distinct source columns that a row is read with, embedding columns first."""
        return tuple(dict.fromkeys(column.name for column in (*self.embedding_columns, *self.metadata_columns)))

    @property
    def meaning(self) -> tuple[object, ...]:
        """What the texts, their vectors and the metadata are made of: equal for every spelling and order."""
        texts = [(column.name, column.name_prefix or "") for column in self.embedding_columns]
        model = (self.embedding_provider_id, self.embedding_model, self.embedding_dimensions)
        return (self.source_table, self.primary_key_column, texts, self.filter_types, model)

    def to_json(self) -> dict[str, Any]:
        """A JSON form, for the catalog."""
        return {
            "source_table": self.source_table,
            "primary_key_column": self.primary_key_column,
            "columns": [column.to_json() for column in self.columns],
            "embedding_model": self.embedding_model,
            "embedding_dimensions": self.embedding_dimensions,
            "embedding_provider_id": self.embedding_provider_id,
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> VectorConfiguration:
        """The configuration that `to_json` gave these fields for."""
        return cls(
            source_table=fields["source_table"],
            primary_key_column=fields["primary_key_column"],
            columns=tuple(Column.from_json(column) for column in fields["columns"]),
            embedding_model=fields["embedding_model"],
            embedding_dimensions=fields["embedding_dimensions"],
            embedding_provider_id=fields.get("embedding_provider_id"),
        )


def check_columns(columns: Sequence[Column]) -> None:
    """Raises ValidationFailed, naming the column, unless these columns make a vector table by themselves."""
    if len(columns) > MAX_COLUMNS:
        raise ValidationFailed(f"columns: at most {MAX_COLUMNS} columns are accepted, {len(columns)} were given.")
    if not any(column.role is ColumnRole.EMBEDDING for column in columns):
        raise ValidationFailed(
            "columns: at least one column with role `embedding` is required.",
            resolution='Give at least one column {"name": …, "role": "embedding"}.',
        )
    seen: set[tuple[str, ColumnRole]] = set()
    for index, column in enumerate(columns):
        where = f"columns[{index}]"
        if (column.name, column.role) in seen:
            raise ValidationFailed(f"{where}: column {column.name!r} is given twice with role `{column.role}`.")
        seen.add((column.name, column.role))
        if column.role is ColumnRole.METADATA and column.name == "$or":
            raise ValidationFailed(
                f"{where}.name: a filter takes `$or` for its operator: read the column through a view."
            )
        if column.role is ColumnRole.METADATA and column.filter_type is None:
            accepted = ", ".join(FilterType)
            raise ValidationFailed(f"{where}.filter_type: required for metadata columns; one of {accepted}.")
        if column.role is ColumnRole.EMBEDDING and column.filter_type is not None:
            raise ValidationFailed(f"{where}.filter_type: only metadata columns have one.")
        if column.role is ColumnRole.METADATA and (column.name_prefix is not None or column.ordinal is not None):
            raise ValidationFailed(f"{where}: `ordinal` and `name_prefix` are for embedding columns only.")


def storage_name(vector_table_id: str, name: str, *, max_length: int = 100) -> str:
    """`vt_<first 8 of the id>_<name>`, with what is not a letter, digit, `_` or `-` made a `-`.

    The name that users query in the store (a platform store puts `embedd_` before it), fixed at creation: a rename does
    not move it, so that direct queries of it keep working.
    """
    slug = _UNSAFE.sub("-", name).strip("-") or "table"
    return f"vt_{vector_table_id.removeprefix('vt_')[:8]}_{slug}"[:max_length].rstrip("-")
