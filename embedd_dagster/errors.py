"""Every exception that the product raises, by what has to be done about it.

::

    EmbeddError
    ├── TransientError                 try again, not before `retry_after_seconds`
    │   ├── SourceUnavailable          the source database does not answer
    │   ├── CdcPositionLost             the source no longer keeps its log from our position: compare
    │   ├── VectorStoreUnavailable     Qdrant or the platform database does not answer
    │   ├── EmbeddingUnavailable       the provider answers 5xx, or not at all
    │   │   └── EmbeddingRateLimited   the provider answers 429
    │   ├── OrchestratorUnavailable    Dagster does not answer
    │   └── CatalogUnavailable         embedd's own database does not answer
    ├── PermanentError                 stop, and say what to do
    │   ├── ConfigurationError         a setting of the installation is wrong
    │   ├── SecretUnreadable           stored credentials do not decrypt with the present keys
    │   ├── SourceAccessDenied         the source refuses to let us read (or, in platform mode, write)
    │   ├── SourceTableNotFound        the table, or a configured column, is not in the source
    │   ├── SourceRejected             the source cannot do what was asked, and will not by itself
    │   ├── VectorStoreRejected        the store cannot do what was asked, and will not by itself
    │   │   └── PointsRejected         the store cannot hold some rows of a batch; it has written the others
    │   ├── EmbeddingRejected          wrong key, unknown model, wrong dimensions
    │   ├── TooManyFailedRows          so many rows failed that the fault is not the rows'
    │   └── MassDeleteRefused          the source looks emptied; mirroring that wants a confirmation
    ├── RowError                       set this row aside, go on with the others
    │   ├── TextRejected               the provider refuses this text
    │   ├── ValueOutOfRange            a metadata value that its filter type cannot hold
    │   ├── RowNotStorable             the database of the vectors cannot hold the row
    │   └── MetadataTooLarge           more metadata than a row may have
    ├── RunSuperseded                  this run does not own its task (any more): end at once
    ├── RunCancelled                   somebody asked this run to end
    └── RequestError                   the caller's mistake: a 4xx
        ├── ValidationFailed
        ├── NotFound                   `resource` says of what
        ├── Conflict                   `code` says which
        ├── PermissionDenied
        ├── Unauthorized               `code` tells a revoked key
        └── NotReady                   `code` says what is not

An error holds a message for people, a resolution (what to do), and a `code` of the API's contract. It never holds a
secret or a row's content, and it survives pickling. Only `api/error_codes.py` maps codes to HTTP statuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar


class EmbeddError(Exception):
    """Anything this product raises on purpose."""

    default_code: ClassVar[str] = "internal_error"
    default_resolution: ClassVar[str] = "Try again. If it goes on, read the service's log."

    def __init__(self, message: str, *, resolution: str | None = None, code: str | None = None, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.resolution = resolution or self.default_resolution
        self.code = code or self.default_code
        self.details = details

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.__dict__.copy())


def _rebuild(kind: type[EmbeddError], state: dict[str, Any]) -> EmbeddError:
    error = kind.__new__(kind)
    Exception.__init__(error, state["message"])
    error.__dict__.update(state)
    return error


class TransientError(EmbeddError):
    """An outside system failed in a way that passes by itself."""

    default_resolution = "No action needed; the operation is retried automatically."
    is_attempt: ClassVar[bool] = True
    """Whether a run that ends by it counts as an attempt of its task."""

    def __init__(self, message: str, *, retry_after_seconds: float | None = None, **kwargs: Any) -> None:
        super().__init__(message, **kwargs)
        self.retry_after_seconds = retry_after_seconds


class SourceUnavailable(TransientError):
    """The source database does not answer."""

    default_code = "source_unavailable"
    default_resolution = "Check that the database is up and reachable from here, then try again."


class CdcPositionLost(TransientError):
    """The source no longer keeps its log from our position: its cdc tables have to be compared instead."""

    default_code = "source_unavailable"
    default_resolution = "No action needed; the tables are compared with the source, then read from the log again."


class VectorStoreUnavailable(TransientError):
    """Qdrant, or the database of a platform table, does not answer."""

    default_code = "vector_store_unavailable"
    default_resolution = "Check that the vector store is up and reachable from here, then try again."


class EmbeddingUnavailable(TransientError):
    """The embedding provider answers 5xx, or not at all."""

    default_code = "embedding_failed"
    default_resolution = "Check the provider's status and the provider's base_url, then try again."


class EmbeddingRateLimited(EmbeddingUnavailable):
    """The embedding provider answers 429."""

    default_resolution = "Wait, or lower the limits of the embedding provider to what your account allows."


class OrchestratorUnavailable(TransientError):
    """Dagster's webserver does not answer."""

    default_code = "orchestrator_unavailable"
    default_resolution = "The request is recorded; Dagster takes it up when it is back."


class CatalogUnavailable(TransientError):
    """The catalog does not answer."""

    default_code = "catalog_unavailable"
    default_resolution = "Check that PostgreSQL behind EMBEDD_DATABASE_URL is up, then try again."


class PermanentError(EmbeddError):
    """Retrying does not help: somebody has to change something first."""


class ConfigurationError(PermanentError):
    """A setting of the installation is missing or wrong."""

    default_resolution = "Correct the setting and start again."


class SecretUnreadable(PermanentError):
    """Stored credentials do not decrypt with the present encryption keys."""

    default_resolution = (
        "Put the key they were encrypted with into EMBEDD_ENCRYPTION_KEYS, or enter the credentials again."
    )


class SourceAccessDenied(PermanentError):
    """The source refuses to let us read, or in platform mode write."""

    default_code = "source_table_access_denied"
    default_resolution = "Grant the connection's user the missing right."


class SourceTableNotFound(PermanentError):
    """The table, or a configured column, is not in the source."""

    default_code = "source_table_not_found"
    default_resolution = (
        "Check the spelling against GET /v1/connections/{id}/tables; names follow the database's own case rules. "
        "If a column or the table was renamed, give its new name by PUT /v1/vector-tables/{id} (`columns`, `source_table`)."
    )


class SourceRejected(PermanentError):
    """The source cannot do what was asked, and will not by itself."""

    default_code = "source_unavailable"


class VectorStoreRejected(PermanentError):
    """The store cannot do what was asked, and will not by itself."""

    default_code = "vector_store_unavailable"


class PointsRejected(VectorStoreRejected):
    """The store cannot hold some rows of a batch: `rejected` says which, by their index. It has written the others."""

    def __init__(self, message: str, *, rejected: Mapping[int, RowError] = MappingProxyType({}), **kwargs: Any) -> None:
        super().__init__(message, **kwargs)
        self.rejected = dict(rejected)


class EmbeddingRejected(PermanentError):
    """The provider refuses every text: wrong key, unknown model, wrong dimensions."""

    default_code = "embedding_failed"
    default_resolution = "Correct the embedding provider's credentials or the vector table's embedding_model."


class TooManyFailedRows(PermanentError):
    """So many rows failed that the fault is not the rows'; what is live stays live."""

    default_code = "embedding_failed"
    default_resolution = "Look at GET /v1/vector-tables/{id}/failed-rows, correct the cause, and start a backfill."


class MassDeleteRefused(PermanentError):
    """The source looks emptied; mirroring that wants an explicit confirmation."""

    default_code = "mass_delete_refused"
    default_resolution = 'If the rows are really gone, sync with {"confirm_mass_delete": true}.'


class RowError(EmbeddError):
    """One row cannot be embedded or written; the others can."""

    default_code = "embedding_failed"


class TextRejected(RowError):
    """The provider refuses this text (or, while it is being bisected, one of these texts)."""


class ValueOutOfRange(RowError):
    """A metadata value that its filter type cannot hold, such as an integer beyond 64 bits."""

    default_code = "value_out_of_range"


class RowNotStorable(RowError):
    """The database of the vectors cannot hold the row, such as a character that its encoding does not have."""

    default_code = "value_out_of_range"
    default_resolution = "Correct the row in the source, or keep the vectors in a database that can hold it."


class MetadataTooLarge(RowError):
    """More metadata than a row may have."""

    default_code = "metadata_too_large"


class RunSuperseded(EmbeddError):
    """This run does not own its task, or no longer: it must end without another write."""


class RunCancelled(EmbeddError):
    """Somebody asked this run to end."""

    default_resolution = "Start it again when you want it; a build continues where it was."


class RequestError(EmbeddError):
    """The caller's mistake."""

    default_resolution = "Correct the request."


class ValidationFailed(RequestError):
    """The body or a parameter is not what is accepted; the message names the field."""

    default_code = "validation_error"


class NotFound(RequestError):
    """No such object in this environment; `resource` is the snake_case noun, such as `vector_table`."""

    default_resolution = "Check the id and the X-Environment-Id header; an object is only seen in its own environment."

    def __init__(self, resource: str, object_id: str, **kwargs: Any) -> None:
        super().__init__(f"No {resource.replace('_', ' ')} {object_id!r} here.", code=f"{resource}_not_found", **kwargs)
        self.resource = resource


class Conflict(RequestError):
    """The state of things does not allow it; `code` says which conflict."""

    default_code = "name_conflict"


class PermissionDenied(RequestError):
    """The key may not do this."""

    default_code = "permission_denied"
    default_resolution = "Use a key with permission `full`."


class Unauthorized(RequestError):
    """No key, or none that is known."""

    default_code = "unauthorized"
    default_resolution = "Send `Authorization: Bearer sk_…` with a key made by `embedd keys create`."


class NotReady(RequestError):
    """It exists, but not yet in a state to be used like this; `code` says what is missing."""

    default_code = "vector_table_not_ready"
