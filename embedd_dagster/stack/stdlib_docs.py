"""The demo's data: the Python standard library's own documentation, read from the running interpreter."""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any, Final, NamedTuple

import psycopg

TABLE: Final = "python_docs"

# importing these opens a window or a browser, prints, or is not documentation of the library
_SKIPPED: Final = frozenset(
    {
        "antigravity",
        "this",
        "idlelib",
        "lib2to3",
        "test",
        "tkinter",
        "turtle",
        "turtledemo",
        "ensurepip",
        "pydoc_data",
        "nturl2path",
    }
)
_SUBMODULES: Final = (
    "collections.abc", "concurrent.futures", "email.message", "email.mime.text", "html.parser", "http.client",
    "http.cookies", "http.server", "importlib.metadata", "importlib.resources", "logging.config", "logging.handlers",
    "multiprocessing.pool", "os.path", "unittest.mock", "urllib.parse", "urllib.request", "urllib.robotparser",
    "xml.dom.minidom", "xml.etree.ElementTree", "xml.sax", "xmlrpc.client",
)  # fmt: skip


SMALL_SELECTION: Final = (
    "asyncio.queues",
    "bz2",
    "contextlib",
    "gzip",
    "lzma",
    "pathlib",
    "shutil",
    "tempfile",
    "zlib",
)


class Documented(NamedTuple):
    """One function, class or method that has a docstring."""

    qualified_name: str
    module: str
    kind: str
    signature: str | None
    docstring: str
    parameter_count: int | None
    is_coroutine: bool


def read_docs(modules: Iterable[str] | None = None) -> list[Documented]:
    """Everything public and documented in the standard library (or these modules), each once, by qualified name.

    The whole library has a few thousand.
    """
    found: dict[str, Documented] = {}
    for name in (*sorted(sys.stdlib_module_names), *_SUBMODULES) if modules is None else modules:
        if name.startswith("_") or name in _SKIPPED:
            continue
        module = _import(name)
        if module is None:
            continue
        for item in _documented_in(module, name):
            found.setdefault(item.qualified_name, item)
    return list(found.values())


def load(database_url: str, modules: Iterable[str] | None = None) -> int:
    """Writes the documentation (of these modules) into a fresh table `python_docs`; the number of rows."""
    rows = read_docs(modules)
    with psycopg.connect(database_url) as connection:
        connection.execute(f"DROP TABLE IF EXISTS {TABLE}")
        connection.execute(
            f"""CREATE TABLE {TABLE} (
                qualified_name text PRIMARY KEY,
                module text NOT NULL,
                kind text NOT NULL,
                signature text,
                docstring text NOT NULL,
                parameter_count integer,
                is_coroutine boolean NOT NULL
            )"""
        )
        with connection.cursor().copy(f"COPY {TABLE} FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)
        connection.execute(f"ANALYZE {TABLE}")
    return len(rows)


def _import(name: str) -> ModuleType | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated modules say so
        try:
            return importlib.import_module(name)
        except ImportError:  # not on this platform
            return None


def _documented_in(module: ModuleType, module_name: str) -> Iterator[Documented]:
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or not _is_of(value, module_name):
            continue
        if inspect.isclass(value):
            yield from _describe(value, f"{module_name}.{name}", module_name, "class")
            for member_name in sorted(vars(value)):
                member = inspect.getattr_static(value, member_name)
                if not member_name.startswith("_") and (inspect.isroutine(member) or isinstance(member, property)):
                    yield from _describe(
                        getattr(value, member_name, member),
                        f"{module_name}.{name}.{member_name}",
                        module_name,
                        "method",
                    )
        elif inspect.isroutine(value):
            yield from _describe(value, f"{module_name}.{name}", module_name, "function")


def _is_of(value: Any, module_name: str) -> bool:
    """Whether the module is where users know it from: its own, or its C part's (`_io` for `io`)."""
    home = getattr(value, "__module__", None) or module_name
    return str(home).split(".")[0].lstrip("_") == module_name.split(".", maxsplit=1)[0] or module_name == "os"


def _describe(value: Any, qualified_name: str, module_name: str, kind: str) -> Iterator[Documented]:
    docstring = inspect.getdoc(value)
    if not docstring:
        return
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError, AttributeError, NameError):  # many built-ins tell none, some one that is broken
        signature = None
    yield Documented(
        qualified_name=qualified_name,
        module=module_name,
        kind=kind,
        signature=None if signature is None else str(signature),
        docstring=docstring.replace("\x00", ""),
        parameter_count=None if signature is None else len(signature.parameters),
        is_coroutine=inspect.iscoroutinefunction(value),
    )
