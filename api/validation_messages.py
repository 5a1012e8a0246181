"""Says in one sentence why a body or a parameter is not valid: the field, and what it accepts.

Never what the request contained, which may be a secret.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

_MAX_ERRORS: Final = 5
_MAX_NAME: Final = 80

_BY_TYPE: Final = {
    "missing": "required",
    "string_type": "a text is expected",
    "int_type": "a whole number is expected",
    "int_parsing": "a whole number is expected",
    "int_from_float": "a whole number is expected",
    "float_type": "a number is expected",
    "bool_type": "true or false is expected",
    "bool_parsing": "true or false is expected",
    "list_type": "a list is expected",
    "dict_type": "an object is expected",
    "model_type": "an object is expected",
    "model_attributes_type": "an object is expected",
    "literal_error": "{expected} is accepted",
    "string_too_long": "at most {max_length} characters are accepted",
    "string_too_short": "at least {min_length} character is needed",
    "too_long": "at most {max_length} are accepted",
    "too_short": "at least {min_length} is needed",
    "greater_than_equal": "at least {ge} is accepted",
    "less_than_equal": "at most {le} is accepted",
    "greater_than": "more than {gt} is accepted",
    "string_pattern_mismatch": "a text of the form {pattern} is accepted",
    "union_tag_invalid": "one of {expected_tags} is accepted",
}


def describe_errors(errors: Sequence[Any]) -> str:
    """The errors of pydantic's or FastAPI's validation, for people. Lists at most five."""
    described = list(dict.fromkeys(f"{_field(error['loc'])}: {_message(error)}" for error in errors))
    more = f"; and {len(described) - _MAX_ERRORS} more" if len(described) > _MAX_ERRORS else ""
    return "; ".join(described[:_MAX_ERRORS]) + more + "."


def _message(error: Mapping[str, Any]) -> str:
    template = _BY_TYPE.get(error["type"])
    if template is not None:
        return template.format(**error.get("ctx", {}))
    message = str(error["msg"]).removeprefix("Value error, ").rstrip(".")
    return message[:1].lower() + message[1:]


def _field(location: Sequence[int | str]) -> str:
    source, *parts = location
    if not parts:
        return str(source)
    field = ""
    for part in parts:
        if isinstance(part, int):
            field += f"[{part}]"
        elif not part.startswith("~"):  # the name of a variant of a union: no field of the request
            field += f"{'.' if field else ''}{str(part)[:_MAX_NAME]}"
    return field
