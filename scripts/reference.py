"""`make docs`: writes the pages of `docs/reference/` from the code that they describe.

A test fails while one of them is not current.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import click
import typer
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings

from api.app import create_app
from api.error_codes import ERROR_CODES
from api.metrics import METRICS
from embedd_dagster.catalog.secrets import new_encryption_key
from embedd_dagster.cli import app as command_line
from embedd_dagster.settings import Settings, WebserverSettings

DIRECTORY: Final = Path(__file__).resolve().parents[1] / "docs" / "reference"
_NOTE: Final = "<!-- Written by `make docs` from {source}; do not edit. -->\n\n"


def settings_page() -> str:
    """Every environment variable."""
    return (
        _head("Settings", "`embedd_dagster/settings.py`")
        + "All settings are environment variables. `embedd up` sets those of the parts that it starts itself.\n\n"
        + _settings_table(Settings)
        + "\n\n## Dagster's webserver\n\nThe webserver reads only these.\n\n"
        + _settings_table(WebserverSettings)
        + "\n"
    )


def _settings_table(kind: type[BaseSettings]) -> str:
    rows = []
    for name, field in kind.model_fields.items():
        if not field.description:
            raise SystemExit(f"{kind.__name__}.{name} has no description.")
        default = "required" if field.default is PydanticUndefined else _default(field.default)
        rows.append((f"`EMBEDD_{name.upper()}`", default, field.description))
    return _table(("variable", "default", "meaning"), rows)


def _default(value: object) -> str:
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if value is None or value in ((), ""):
        return ""
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def cli_page() -> str:
    """Every command of `embedd`."""
    root = typer.main.get_command(command_line)
    return _head("Command line", "`embedd_dagster/cli`") + f"{_text(root.help)}\n" + "".join(_commands(root, "embedd"))


def _commands(command: Any, path: str) -> Iterable[str]:
    for name, found in sorted(getattr(command, "commands", {}).items()):
        if found.hidden:
            continue
        context = click.Context(found, info_name=name)
        arguments = [one for one in found.params if one.param_type_name == "argument"]
        options = [one for one in found.params if one.param_type_name == "option" and one.name != "help"]
        if not hasattr(found, "commands"):
            usage = " ".join((f"{path} {name}", *(one.make_metavar(context) for one in arguments)))
            yield f"\n## `{usage}`\n\n{_text(found.help)}\n"
            rows = [
                (
                    " ".join(f"`{flag}`" for flag in (*one.opts, *one.secondary_opts)),
                    _option_default(one),
                    _text(one.help),
                )
                for one in options
            ]
            if rows:
                yield "\n" + _table(("option", "default", "meaning"), rows) + "\n"
        yield from _commands(found, f"{path} {name}")


def _option_default(option: Any) -> str:
    if option.required:
        return "required"
    return "" if callable(option.default) or option.is_flag else _default(option.default)


def rest_page() -> str:
    """Every operation of the REST API, by tag."""
    settings = {"database_url": "postgresql://x", "encryption_keys": new_encryption_key(), "qdrant_url": "http://x"}
    document = create_app(Settings(**settings)).openapi()
    by_tag: dict[str, list[tuple[str, ...]]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parameters = [
                f"`{one['name']}`" + ("" if one["in"] == "query" else f" ({one['in']})")
                for one in operation.get("parameters", ())
                if one["in"] != "path" and one["name"].lower() != "x-environment-id"
            ]
            summary = operation["description"].split("\n\n")[0]
            row = (f"`{method.upper()} {path}`", summary, ", ".join(parameters), _body(operation))
            by_tag.setdefault(operation["tags"][0], []).append(row)
    parts = [
        f"\n## {tag}\n\n" + _table(("operation", "what it does", "parameters", "body"), rows) + "\n"
        for tag, rows in by_tag.items()
    ]
    return (
        _head("REST API", "the OpenAPI document")
        + "Every request except those under *Health* needs `Authorization: Bearer sk_…`. `X-Environment-Id` (an id or a name)"
        " selects the environment.\nThe [error codes](errors.md) are the same everywhere. A running API shows all fields and"
        " examples at `/docs`, and the OpenAPI document at `/openapi.json`.\n" + "".join(parts)
    )


def _body(operation: dict[str, Any]) -> str:
    content = operation.get("requestBody", {}).get("content", {})
    schema = next((one["schema"] for one in content.values()), {})
    variants = [schema, *schema.get("anyOf", ())]
    return ", ".join(f"`{one['$ref'].rpartition('/')[2]}`" for one in variants if "$ref" in one)


def metrics_page() -> str:
    """Every metric."""
    rows = [
        (f"`{one.name}`", one.type, ", ".join(f"`{label}`" for label in one.labels), one.description)
        for one in METRICS.values()
    ]
    return (
        _head("Metrics", "`api/metrics.py`")
        + "`GET /metrics` answers in Prometheus' text format and needs no key. Counters and histograms are those of one API"
        " process; gauges describe the catalog.\n\n" + _table(("metric", "type", "labels", "meaning"), rows) + "\n"
    )


def errors_page() -> str:
    """Every error code."""
    rows = [(f"`{code}`", str(entry.status), entry.when) for code, entry in ERROR_CODES.items()]
    return (
        _head("Error codes", "`api/error_codes.py`")
        + 'The body of every response that is not 2xx is `{"error": {"code", "message", "resolution", "docs_url",'
        ' "request_id"}}`.\nA 429 or 503 has `Retry-After`.\n\n' + _table(("code", "HTTP", "when"), rows) + "\n"
    )


def _head(title: str, source: str) -> str:
    return f"# {title}\n\n{_NOTE.format(source=source)}"


def _text(text: str | None) -> str:
    return " ".join((text or "").split())


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_text(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


PAGES: Final[dict[str, Callable[[], str]]] = {
    "settings.md": settings_page,
    "cli.md": cli_page,
    "rest.md": rest_page,
    "metrics.md": metrics_page,
    "errors.md": errors_page,
}


def main() -> None:
    """Writes all pages."""
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    for name, page in PAGES.items():
        (DIRECTORY / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
