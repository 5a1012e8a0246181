"""What a refusal is about: by its own fields before its words, and never by the words of the request's texts."""

from __future__ import annotations

import json
from typing import Any

import httpx
import orjson
import pytest

from embedd_dagster.connectors.http.quotes import without_quotes
from embedd_dagster.connectors.http.rejections import FieldRefused, refusal
from embedd_dagster.errors import EmbeddError, EmbeddingRejected, EmbeddingUnavailable, TextRejected

FIELDS = ("encoding_format", "dimensions")
SHELF = "Oak shelf. Dimensions: 30 x 40 cm, batch size 12"


def read(status: int, body: object, texts: list[str] | None = None, fields: Any = FIELDS) -> EmbeddError | FieldRefused:
    content = body.encode() if isinstance(body, str) else orjson.dumps(body)
    return refusal(
        httpx.Response(status, content=content), provider="It", model="m", texts=texts or [], optional=fields
    )


def error(message: str, **more: object) -> dict[str, object]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None, **more}}


def forbidden(field: str, **more: object) -> list[dict[str, object]]:
    return [
        {
            "type": "extra_forbidden",
            "loc": ["body", field],
            "msg": "Extra inputs are not permitted",
            "input": "x",
            **more,
        }
    ]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("status", [400, 422])
@pytest.mark.parametrize(
    "form",
    [
        # OpenAI and Azure
        lambda field: error(f"Unsupported parameter: '{field}'.", param=field, code="unsupported_parameter"),
        lambda field: error("No.", param=field),
        lambda field: error(f"Unrecognized request argument supplied: {field}"),
        lambda field: error(f"Unrecognized request arguments supplied: {field}, user"),
        lambda field: error(f"Unknown parameter: '{field}'.", code="unknown_parameter"),
        lambda field: error(f"Additional properties are not allowed ('{field}' was unexpected)"),
        lambda field: {"error": {"code": "BadRequest", "target": field, "message": "No."}},
        # FastAPI, Mistral, vLLM
        lambda field: {"detail": forbidden(field)},
        lambda field: {"object": "error", "message": {"detail": forbidden(field)}, "type": "invalid_request_error"},
        lambda field: {"object": "Error", "detail": forbidden(field), "message": forbidden(field), "code": 3001},
        lambda field: {"detail": [{"type": "literal_error", "loc": ["body", "Completion", field], "msg": "Not this"}]},
        lambda field: {"object": "error", "message": str([item | {"loc": ("body", field)} for item in forbidden(field)])},
        lambda field: error(f"litellm.BadRequestError: MistralException - {json.dumps({'detail': forbidden(field)})}"),
        lambda field: error(f"litellm.UnsupportedParamsError: Setting {field} is not supported for this model."),
        # TEI's framework in plain text, and Go's decoder
        lambda field: f"Failed to deserialize the JSON body: unknown field `{field}`, expected `input` or `model`",
        lambda field: {"error": f'json: unknown field "{field}"'},
        # validators of the field
        lambda field: {"message": [f"property {field} should not exist"], "error": "Bad Request", "statusCode": 400},
        lambda field: {field: ["Unknown field."]},
        lambda field: {"errors": {"json": {field: ["Unknown field."]}}},
        lambda field: {"title": "One or more errors occurred.", "errors": {field: ["It is not taken."]}},
        lambda field: {"message": "must NOT have more", "errors": [{"params": {"additionalProperty": field}}]},
        lambda field: error(f"property '{field}' is unsupported"),
        lambda field: {"detail": f"Argument '{field}' is not supported by our API."},
    ],
)  # fmt: skip
def test_a_field_that_the_server_refuses_in_any_form_is_named(field: str, status: int, form: Any) -> None:
    # the texts hold the field's name, which must not hide it
    refused = read(status, form(field), [SHELF, f"about {field}", field])
    assert isinstance(refused, FieldRefused)
    assert refused.field == field


@pytest.mark.parametrize(
    ("status", "body", "field"),
    [
        (400, error("This model does not support specifying dimensions."), "dimensions"),
        (400, error("Model does not support matryoshka representation, changing output will fail."), "dimensions"),
        (400, {"object": "error", "message": "dimensions is currently not supported", "code": 400}, "dimensions"),
        (422, "unknown field `encoding_format`, expected one of `input`, `dimensions`", "encoding_format"),
        (422, "unknown field `dimensions`, expected one of `encoding_format`, `input`", "dimensions"),
        (400, error("Invalid value for 'encoding_format' = base64. Supported values: ['float']."), "encoding_format"),
        (422, "unknown variant `base64`, expected `float`", "encoding_format"),
        (404, error("Unsupported parameter: 'dimensions'", param="dimensions"), "dimensions"),
        (404, error("encoding_format is not supported"), "encoding_format"),
        (500, error("embed() got an unexpected keyword argument 'dimensions'"), "dimensions"),
        (500, {"error": {"message": "Setting dimensions is not supported", "code": "500"}}, "dimensions"),
    ],
)
def test_a_field_is_named_in_the_words_of_other_servers(status: int, body: object, field: str) -> None:
    refused = read(status, body)
    assert isinstance(refused, FieldRefused)
    assert refused.field == field


@pytest.mark.parametrize(
    ("status", "body", "field"),
    [
        (400, {"error": {"code": 400, "status": "INVALID_ARGUMENT",
                         "message": "* EmbedContentRequest.output_dimensionality: must be between 128 and 3072"}},
         "outputDimensionality"),
        (400, {"error": {"code": 400, "status": "INVALID_ARGUMENT", "message": "Invalid JSON payload received.",
                         "details": [{"fieldViolations": [{"field": "requests[0].taskType", "description": "No."}]}]}},
         "taskType"),
        (400, {"error": {"code": 400, "message": 'Unknown name "taskType" at \'requests[0]\': Cannot find field.'}},
         "taskType"),
        (400, {"detail": "Argument 'truncation' is not supported by our API."}, "truncation"),
        (400, {"detail": "output_dimension 300 is not one of 256, 512"}, "output_dimension"),
    ],
)  # fmt: skip
def test_fields_of_gemini_and_voyage_are_named(status: int, body: object, field: str) -> None:
    fields = ("outputDimensionality", "taskType", "truncation", "output_dimension", "input_type")
    refused = read(status, body, [SHELF], [name for name in fields if (name == "output_dimension") == ("300" in str(body))]
                   if "imension" in field else fields)  # fmt: skip
    assert isinstance(refused, FieldRefused)
    assert refused.field == field


@pytest.mark.parametrize("field", ["user", "input_type"])
def test_a_field_that_was_not_sent_is_never_left_out(field: str) -> None:
    assert isinstance(read(422, {"detail": forbidden(field)}), TextRejected)


def _escapes(text: str) -> list[str]:
    return [
        text,
        text.upper(),
        text[:22] + "…",
        text[:13] + "...",
        text[5:-5],
        json.dumps(text),
        json.dumps(json.dumps(text)),
        repr(text),
        text.replace("'", "&#x27;").replace('"', "&quot;"),
        " ".join(text.split()),
    ]


TEXTS = [
    SHELF,
    "Das Möbel: “dimensions” not supported by us, encoding_format\n\tfragt 'keiner'",
    "Model x is not supported. Dimensions: 3 \\ 4",
    "これは日本語のdimensionsとmax_tokens_per_requestの長い説明です",
    "unknown field `encoding_format`; unsupported value: NaN",
    "Dimensions: 30 x 40",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("status", [400, 422])
@pytest.mark.parametrize(
    "form",
    [
        lambda quote: error(f"This input was refused: '{quote}'", param="input"),
        lambda quote: error(f"This input was refused: '{quote}'"),
        lambda quote: error(f"Refused ({quote})"),
        lambda quote: {"detail": [{"type": "value_error", "loc": ["body", "input", 3], "msg": f"No: {quote}"}]},
        lambda quote: {"detail": f"Unacceptable text: {quote}"},
        lambda quote: {"error": f"`{quote}` was flagged"},
        lambda quote: f"bad input: {quote}",
        lambda quote: [{"error": {"code": 400, "message": f"Refused: {quote}", "status": "INVALID_ARGUMENT"}}],
    ],
)
def test_quoted_texts_of_the_request_do_not_count(text: str, status: int, form: Any) -> None:
    for quote in _escapes(text):
        raised = read(status, form(quote), ["another text", text])
        assert type(raised) is TextRejected, quote
        assert not raised.details.get("too_large"), quote


@pytest.mark.parametrize("text", TEXTS)
def test_a_quoted_text_does_not_hide_that_the_server_fails(text: str) -> None:
    assert type(read(500, error(f"failed on '{text}'"), [text])) is EmbeddingUnavailable


def test_the_words_of_a_refusal_count_next_to_a_quoted_text() -> None:
    body = error(f"batch size 64 is above the maximum; the first input is '{SHELF}'")
    raised = read(400, body, [SHELF.replace(", batch size 12", ""), SHELF])
    assert isinstance(raised, TextRejected)
    assert raised.details["too_large"]


def test_a_refused_parameter_is_found_if_texts_of_the_batch_mention_it() -> None:
    texts = ["Dimensions not in stock", "The dimensions", "What dimensions does it support?", "dimensions", "is"]
    for message in ("'dimensions' is not supported", "Unsupported parameter: `dimensions`", "dimensions not supported"):
        assert isinstance(read(400, error(message), texts), FieldRefused), message


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (422, {"detail": [{"type": "missing", "loc": ["body", "model"], "msg": "Field required"}]}, EmbeddingRejected),
        (400, error("The model `x` does not exist"), EmbeddingRejected),
        (400, error("Model x is not supported.", param="input"), TextRejected),
        (400, error("maximum context length", code="context_length_exceeded"), TextRejected),
        (
            422,
            {"detail": [{"type": "string_too_long", "loc": ["body", "input", 7], "msg": "dimensions"}]},
            TextRejected,
        ),
        (404, {"timestamp": 1, "status": 404, "error": "Not Found", "path": "/v1/embeddings"}, EmbeddingRejected),
        (500, error("the dimensions of the tensors differ"), EmbeddingUnavailable),
        (429, error("dimensions is not supported", param="dimensions"), EmbeddingUnavailable),
        (503, "<html>unknown field dimensions</html>", EmbeddingUnavailable),
    ],
)
def test_fields_of_the_answer_decide_before_its_words(status: int, body: object, expected: type[EmbeddError]) -> None:
    assert isinstance(read(status, body), expected)


def test_a_deeply_nested_body_is_read() -> None:
    assert type(read(400, '{"error":' * 500 + "1" + "}" * 500)) is TextRejected
    assert type(read(400, {"detail": [{"loc": ["body", "x"]}] * 100_000})) is TextRejected


def test_only_quoted_words_are_blanked() -> None:
    unquoted = without_quotes(f"The value '{SHELF[:20]}' of `dimensions` is wrong", [SHELF])
    assert "shelf" not in unquoted
    assert unquoted.endswith("of `dimensions` is wrong")
