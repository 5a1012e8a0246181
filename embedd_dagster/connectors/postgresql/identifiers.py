"""Names of tables and columns: what the text that a user gave may mean, and how names are shown to users."""

from __future__ import annotations

import difflib
import re
from itertools import product
from typing import Final

_PART: Final = r'"(?:[^"\x00]|"")+"'
_QUOTED_NAME: Final = re.compile(rf'({_PART}|[^".]+)(?:\.({_PART}|[^".]+))?')
_PLAIN: Final = re.compile(r'[^".\x00]+')


def quoted(identifier: str) -> str:
    """The identifier as SQL text for people; statements that are run use psycopg.sql."""
    return '"' + identifier.replace('"', '""') + '"'


def readings(given: str) -> list[tuple[str | None, str]]:
    """(schema, table) pairs that this text may mean, the likeliest first; a schema of None is the search path.

    Plain names are taken exactly first, then folded to lower case: users copy names from where they are shown, and type
    them as in SQL. Quotes are only for names that plain text cannot say.
    """
    if "\x00" in given or not given:
        return []
    if '"' in given:
        match = _QUOTED_NAME.fullmatch(given)
        if match is None:
            return [(None, given)]
        spellings = [_spellings(part) for part in match.groups() if part is not None]
        if len(spellings) == 1:
            return [(None, name) for name in spellings[0]]
        return [(schema, name) for schema, name in product(*spellings)]
    dots = [index for index, character in enumerate(given) if character == "."][:8]
    exact: list[tuple[str | None, str]] = [(None, given)]
    exact += [(given[:dot], given[dot + 1 :]) for dot in dots if 0 < dot < len(given) - 1]
    mixed = [
        (schema, name)
        for pair in exact
        for schema in ([None] if pair[0] is None else _spellings(pair[0]))
        for name in _spellings(pair[1])
    ]
    return list(dict.fromkeys([*exact, *mixed]))


def _spellings(part: str) -> list[str]:
    if part.startswith('"'):
        return [part[1:-1].replace('""', '"')]
    return list(dict.fromkeys([part, folded(part)]))


def folded(name: str) -> str:
    """The name as PostgreSQL folds one without quotes."""
    # As the server does in a multi-byte encoding: ASCII letters only.
    return "".join(character.lower() if character.isascii() else character for character in name)


def spelling(schema: str, name: str, *, visible: bool) -> str:
    """How users may spell a table: with its schema where the search path does not lead there."""
    parts = [name] if visible else [schema, name]
    return ".".join(part if _PLAIN.fullmatch(part) else quoted(part) for part in parts)


def suggestion(missing: list[str], known: list[str]) -> str | None:
    """What a user who missed these names may have meant, as a sentence; None if nothing is similar."""
    by_lower = {name.lower(): name for name in reversed(known)}
    near: list[str] = []
    for name in missing:
        found = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6)
        near += [by_lower[match] for match in found]
    if not near:
        return None
    return f"Did you mean {' or '.join(repr(name) for name in dict.fromkeys(near))}?"
