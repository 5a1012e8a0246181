"""Qdrant's REST forms on one side, Qdrant Edge's objects on the other.

What a client sends is checked by `qdrant_client`'s own models, so a misspelt key is refused here as the real server refuses
it. Points to be written are the exception: they come by the thousand and are read by hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar
from uuid import UUID

import numpy as np
import orjson
import qdrant_edge as edge
from pydantic import BaseModel
from pydantic import ValidationError as FormError
from qdrant_client.http import models

from embedd_dagster.core.floats import read_by_qdrant

PointId = int | UUID
Model = TypeVar("Model", bound=BaseModel)

_MAX_POINT_ID = 2**64 - 1
_INDEX_PARAMS: dict[str, Any] = {
    "keyword": edge.KeywordIndexParams,
    "integer": edge.IntegerIndexParams,
    "float": edge.FloatIndexParams,
    "bool": edge.BoolIndexParams,
    "datetime": edge.DatetimeIndexParams,
    "uuid": edge.UuidIndexParams,
}
_INDEX_ATTRIBUTES = ("lookup", "range", "is_tenant", "is_principal", "on_disk", "enable_hnsw")


class RefusedError(Exception):
    """An answer other than 2xx: the status code and the sentence that the real server would give."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


def bad_form(message: str) -> RefusedError:
    """The refusal of a body that is JSON at most, but not of the form asked for."""
    return RefusedError(400, f"Format error in JSON body: {message}")


def bad_input(message: str) -> RefusedError:
    """The refusal of a well-formed request that cannot be done."""
    return RefusedError(400, f"Wrong input: {message}")


def parse_json(body: bytes) -> dict[str, Any]:
    """The object that `body` holds."""
    try:
        parsed = orjson.loads(body or b"{}")
    except orjson.JSONDecodeError as error:
        raise bad_form(str(error)) from None
    if not isinstance(parsed, dict):
        raise bad_form("invalid type: expected an object")
    return parsed


def parse(model: type[Model], value: object) -> Model:
    """`value` as one of the client's models; refused with the first thing wrong with it."""
    if isinstance(value, dict) and "filter" in value:
        value = {**value, "filter": _as_qdrant_reads(value["filter"])}
    try:
        return model.model_validate(value)
    except FormError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise bad_form(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _as_qdrant_reads(value: Any) -> Any:
    """A part of a body with every double as the real server's parser reads its digits; integers are exact."""
    if type(value) is float:
        return read_by_qdrant(repr(abs(value))) * math.copysign(1.0, value)
    if isinstance(value, dict):
        return {key: _as_qdrant_reads(item) for key, item in value.items()}
    return [_as_qdrant_reads(item) for item in value] if isinstance(value, list) else value


def parse_point_id(value: object) -> PointId:
    """A point's id in the one form that compares equal however it was written."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_POINT_ID:
        return value
    if isinstance(value, UUID):
        return value
    if isinstance(value, str):
        try:
            return UUID(value)
        except ValueError:
            pass
    raise bad_form(f"value {value} is not a valid point ID, valid values are either an unsigned integer or a UUID")


def parse_point_ids(values: Iterable[object]) -> list[PointId]:
    """The ids of several points."""
    return [parse_point_id(value) for value in values]


def parse_vector(value: object, size: int) -> list[float]:
    """A vector of the collection's size.

    Edge must never see another size: it would refuse the batch having written the points before the wrong one, and the wrong
    one itself without a vector.
    """
    if isinstance(value, dict) and value.keys() == {""}:
        value = value[""]
    if not isinstance(value, list):
        raise bad_input("this server keeps one unnamed dense vector a point")
    if len(value) != size:
        raise bad_input(f"Vector dimension error: expected dim: {size}, got {len(value)}")
    return value


def parse_points(body: dict[str, Any], size: int) -> list[Any]:
    """The points of an upsert, given as a list or as columns."""
    if body.get("update_filter") is not None or body.get("update_mode") not in (None, "upsert"):
        raise bad_input("conditional upserts are not served by this server")
    if isinstance(batch := body.get("batch"), dict):
        ids, vectors = batch.get("ids"), batch.get("vectors")
        payloads: Sequence[Any] | None = batch.get("payloads")
        if not isinstance(ids, list) or not isinstance(vectors, list):
            raise bad_form("data did not match any variant of untagged enum PointInsertOperations")
        if len(ids) != len(vectors) or (payloads is not None and len(payloads) != len(ids)):
            raise bad_input("Amount of ids, vectors and payloads does not match")
        payloads = payloads or [None] * len(ids)
    elif isinstance(points := body.get("points"), list):
        try:
            ids = [point["id"] for point in points]
            vectors = [point["vector"] for point in points]
            payloads = [point.get("payload") for point in points]
        except (KeyError, TypeError, AttributeError):
            raise bad_form("a point needs `id` and `vector`") from None
    else:
        raise bad_form("data did not match any variant of untagged enum PointInsertOperations")
    vectors = [parse_vector(vector, size) for vector in vectors]
    try:
        return list(map(edge.Point, parse_point_ids(ids), vectors, payloads))
    except (TypeError, ValueError) as error:
        raise bad_form(first_line(error)) from None


def render_filter(query_filter: models.Filter | None) -> Any | None:
    """A filter for Edge."""
    if query_filter is None:
        return None
    minimum = query_filter.min_should
    return edge.Filter(
        must=_render_conditions(query_filter.must),
        should=_render_conditions(query_filter.should),
        must_not=_render_conditions(query_filter.must_not),
        min_should=None
        if minimum is None
        else edge.MinShould(_render_conditions(minimum.conditions) or [], minimum.min_count),
    )


def _render_conditions(conditions: Any) -> list[Any] | None:
    if conditions is None:
        return None
    return [render_condition(each) for each in (conditions if isinstance(conditions, list) else [conditions])]


def render_condition(condition: models.Condition) -> Any:  # noqa: PLR0911 - one line a kind
    """One condition of a filter for Edge."""
    try:
        match condition:
            case models.FieldCondition():
                return _render_field_condition(condition)
            case models.Filter():
                return render_filter(condition)
            case models.HasIdCondition(has_id=ids):
                return edge.HasIdCondition(set(parse_point_ids(ids)))
            case models.IsEmptyCondition(is_empty=field):
                return edge.IsEmptyCondition(field.key)
            case models.IsNullCondition(is_null=field):
                return edge.IsNullCondition(field.key)
            case models.HasVectorCondition(has_vector=name):
                return edge.HasVectorCondition(name)
            case models.NestedCondition(nested=nested):
                return edge.NestedCondition(nested.key, render_filter(nested.filter) or edge.Filter())
    except (TypeError, ValueError, OverflowError) as error:
        raise bad_form(first_line(error)) from None
    raise bad_input(f"{type(condition).__name__} is not served by this server")


def _render_field_condition(condition: models.FieldCondition) -> Any:
    if condition.geo_bounding_box or condition.geo_radius or condition.geo_polygon:
        raise bad_input("geo conditions are not served by this server")
    between = condition.range
    rendered_range: Any = None
    if isinstance(between, models.Range):
        rendered_range = edge.RangeFloat(gte=between.gte, gt=between.gt, lte=between.lte, lt=between.lt)
    elif between is not None:
        instants = {k: v.isoformat() for k, v in between if v is not None}
        rendered_range = edge.RangeDateTime(**instants)
    counted = condition.values_count
    return edge.FieldCondition(
        condition.key,
        match=_render_match(condition.match),
        range=rendered_range,
        values_count=None
        if counted is None
        else edge.ValuesCount(lt=counted.lt, gt=counted.gt, lte=counted.lte, gte=counted.gte),
        is_empty=condition.is_empty,
        is_null=condition.is_null,
    )


def _render_match(match: models.Match | None) -> Any:  # noqa: PLR0911 - one line a kind
    match match:
        case None:
            return None
        case models.MatchValue(value=bool() as flag):
            # Edge 0.9 reads Python's bool as the integer that it also is, and so looks for 1; numpy's is not an integer.
            return edge.MatchValue(np.bool_(flag))  # type: ignore[arg-type]
        case models.MatchValue(value=value):
            return edge.MatchValue(value)
        case models.MatchAny(any=values):
            return edge.MatchAny(values)
        case models.MatchExcept(except_=values):
            return edge.MatchExcept(values)
        case models.MatchText(text=text):
            return edge.MatchText(text)
        case models.MatchTextAny(text_any=text):
            return edge.MatchTextAny(text)
        case models.MatchPhrase(phrase=text):
            return edge.MatchPhrase(text)
    raise bad_input(f"{type(match).__name__} is not served by this server")


def render_payload_selector(selector: Any, *, default: bool) -> Any:
    """What of the payload to return, for Edge."""
    if selector is None:
        return default
    if isinstance(selector, dict):
        model = models.PayloadSelectorInclude if "include" in selector else models.PayloadSelectorExclude
        selector = parse(model, selector)
    if isinstance(selector, models.PayloadSelectorInclude):
        return edge.PayloadSelector.Include(selector.include)
    if isinstance(selector, models.PayloadSelectorExclude):
        return edge.PayloadSelector.Exclude(selector.exclude)
    if isinstance(selector, bool) or (isinstance(selector, list) and all(isinstance(each, str) for each in selector)):
        return selector
    raise bad_form("data did not match any variant of untagged enum WithPayloadInterface")


def render_index_schema(schema: models.PayloadFieldSchema | None) -> Any:
    """The kind of a payload index, for Edge."""
    if isinstance(schema, models.PayloadSchemaType):
        if schema.value in _INDEX_PARAMS:
            return getattr(edge.PayloadSchemaType, schema.value.capitalize())
    elif schema is not None and schema.type.value in _INDEX_PARAMS:
        given = {name: getattr(schema, name, None) for name in _INDEX_ATTRIBUTES}
        return _INDEX_PARAMS[schema.type.value](**{k: v for k, v in given.items() if v is not None})
    raise bad_input("this kind of payload index is not served by this server")


def describe_index(info: Any) -> dict[str, Any]:
    """A payload index of Edge in Qdrant's form."""
    data_type = str(info.data_type).rpartition(".")[2].lower()
    described: dict[str, Any] = {"data_type": data_type, "points": info.points}
    if info.params is not None:
        given = {name: getattr(info.params, name, None) for name in _INDEX_ATTRIBUTES}
        described["params"] = {"type": data_type} | {k: v for k, v in given.items() if v is not None}
    return described


def describe_point(point: Any) -> dict[str, Any]:
    """A stored or found point of Edge in Qdrant's form; what was not asked for is left out."""
    described: dict[str, Any] = {"id": point.id}
    if hasattr(point, "score"):
        described |= {"version": point.version, "score": point.score}
    if point.payload is not None:
        described["payload"] = point.payload
    if point.vector is not None:
        described["vector"] = point.vector
    return described


def first_line(error: BaseException) -> str:
    """An error's text without the lines in which a binding explains itself."""
    return str(error).partition("\n")[0]
