"""What the embedders behind an HTTP API share. A provider adds its address, the body of a request, and how to read an answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, ClassVar, Final, Self

import httpx
import orjson

from embedd_dagster.connectors.http.answers import NOT_AN_ANSWER, Answer, parse_answer
from embedd_dagster.connectors.http.base_url import UnusableUrl, parse_base_url, with_path
from embedd_dagster.connectors.http.client import ProviderClient
from embedd_dagster.connectors.http.rejections import FieldRefused, refusal
from embedd_dagster.connectors.http.transport import LARGEST_ANSWER
from embedd_dagster.core.embedded_text import clean_text
from embedd_dagster.core.models import EmbeddingModel, find_model
from embedd_dagster.core.rows import Vectors
from embedd_dagster.core.shards import BatchLimits
from embedd_dagster.core.text_cutting import CutText, byte_count, cut_at_bytes, cut_at_unknown_tokens
from embedd_dagster.errors import EmbeddingRejected, EmbeddingUnavailable, TextRejected
from embedd_dagster.protocols.embedder import (
    DEFAULT_TIMEOUT_SECONDS,
    PROBE_TEXT,
    Embedded,
    EmbedderLimits,
    Failure,
)

_DEFAULT_CONCURRENCY: Final = 16


class HttpEmbedder:
    """One model behind an HTTP API: one request per call, without retries and redirects.

    Optional fields of a request that the server refuses are left out from then on.
    """

    models: ClassVar[tuple[EmbeddingModel, ...]]
    title: ClassVar[str]
    """The provider's name in messages."""
    default_base_url: ClassVar[str]
    path: ClassVar[str] = "/embeddings"
    max_items: ClassVar[int]
    max_tokens_per_request: ClassVar[int]
    unknown_model_max_bytes: ClassVar[int]
    """The limit of a text for a model that the catalog does not know: bytes are never fewer than tokens."""
    prompt_tokens: ClassVar[int] = 0
    """Tokens that the provider puts before each text."""
    required_fields: ClassVar[frozenset[str]] = frozenset({"model"})
    dimensions_field: ClassVar[str] = "dimensions"
    is_spoken_by_others: ClassVar[bool] = False
    """Whether many servers speak the protocol: then the fields that one takes for an unknown model are found by a probe."""

    def __init__(
        self,
        *,
        model: str,
        dimensions: int,
        api_key: str | None = None,
        base_url: str | None = None,
        concurrency: int | None = None,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        max_input_tokens: int | None = None,
        deny_private_networks: bool = False,
        largest_answer: int = LARGEST_ANSWER,
    ) -> None:
        """Nothing is connected to yet. Raises EmbeddingRejected for credentials that cannot be right."""
        self._model = model
        self._dimensions = dimensions
        self._timeout_seconds = timeout_seconds
        self._max_input_tokens = max_input_tokens
        url = _parse_base_url(base_url or self.default_base_url, example=self.default_base_url)
        self._name = f"The embedding provider at {url.host}" if base_url else self.title
        self._api_key = _check_key(
            api_key, provider=self.title, is_required=url.host == httpx.URL(self.default_base_url).host
        )
        self._known = known = find_model(self.models, self._catalog_name)
        concurrency = concurrency or _DEFAULT_CONCURRENCY
        self.limits = EmbedderLimits(
            batch=BatchLimits(
                max_items=self.max_items, max_tokens=self._request_tokens() - self.max_items * self.prompt_tokens
            ),
            max_tokens_per_text=max(1, self._text_tokens() - self.prompt_tokens),
            concurrency=concurrency,
        )
        self.url = with_path(url, self._path())
        self.http = ProviderClient(
            url,
            headers=self._key_headers(url.host, self._api_key) if self._api_key else {},
            connections=concurrency + 2,
            timeout_seconds=timeout_seconds,
            deny_private_networks=deny_private_networks,
            largest_answer=largest_answer,
        )
        omits_dimensions = self.is_spoken_by_others if known is None else known.dimensions == dimensions
        self._left_out = frozenset({self.dimensions_field} if omits_dimensions else ())
        self._is_settled = known is not None or not self.is_spoken_by_others
        self._settling = threading.Lock()

    @property
    def _catalog_name(self) -> str:
        """The model's name in the catalog of models."""
        return self._model

    def _path(self) -> str:
        return self.path

    def _request_tokens(self) -> int:
        return self.max_tokens_per_request

    def _key_headers(self, host: str, key: str) -> dict[str, str]:  # noqa: ARG002 - some providers need the host
        return {"Authorization": f"Bearer {key}"}

    def _fields(self, *, is_query: bool) -> dict[str, Any]:
        """The fields of a request besides the texts and the dimensions."""
        raise NotImplementedError

    def _body(self, fields: Mapping[str, Any], texts: Sequence[str]) -> Mapping[str, Any]:
        """The whole body of a request."""
        return {**fields, "input": list(texts)}

    def _parse(self, content: bytes, text_count: int) -> Answer:
        """The answer to so many texts. Raises one of NOT_AN_ANSWER."""
        return parse_answer(content, text_count)

    def _post(self, content: bytes) -> httpx.Response:
        """The answer of any status: one request. Raises httpx's RequestError, and EmbeddingRejected for its address."""
        return self.http.send(self.http.build_request("POST", self.url, content=content))

    def cut(self, text: str) -> CutText:
        """The text cut without a tokenizer: at a configured limit by an estimate of its tokens, otherwise by its bytes."""
        if self._max_input_tokens is None:
            return cut_at_bytes(text, self.limits.max_tokens_per_text)
        return cut_at_unknown_tokens(text, self.limits.max_tokens_per_text)

    def embed_documents(self, texts: Sequence[str]) -> Embedded:
        """The vectors of these texts: one request; a few more until it is known which fields the server takes."""
        # a single text is a probe itself: a question does not wait for two answers
        if not self._is_settled and len(texts) > 1:
            with self._settling:
                if not self._is_settled:
                    self._embed([PROBE_TEXT], is_query=False)
        return self._embed(texts, is_query=False)

    def embed_query(self, text: str) -> Vectors:
        """The vector of a search question, shape (dimensions,)."""
        vector: Vectors = self._embed([self.cut(clean_text(text)).text], is_query=True).vectors[0]
        return vector

    def _embed(self, texts: Sequence[str], *, is_query: bool) -> Embedded:
        left_out, tried = self._left_out, set[frozenset[str]]()
        given: int | None = None
        refused: tuple[FieldRefused, frozenset[str]] | None = None
        while left_out not in tried:
            tried.add(left_out)
            try:
                answer = self._request(texts, left_out, is_query=is_query)
            except FieldRefused as error:
                refused = error, left_out
                left_out |= {error.field}
                continue
            given = answer.vectors.shape[1]
            if given == self._dimensions:
                self._left_out, self._is_settled = left_out, True
                return Embedded(answer.vectors, _estimate_tokens(texts) if answer.tokens is None else answer.tokens)
            left_out -= {self.dimensions_field}
        if refused:
            blamed, without = refused
            _check_field(blamed, lambda: self._request([PROBE_TEXT], without, is_query=is_query))
        raise self._wrong_dimensions(given)

    def _request(self, texts: Sequence[str], left_out: frozenset[str], *, is_query: bool) -> Answer:
        """The answer to one request. Raises as `Embedder` says, and FieldRefused for an optional field."""
        fields = {**self._fields(is_query=is_query), self.dimensions_field: self._dimensions}
        fields = {name: value for name, value in fields.items() if name not in left_out}
        try:
            content = orjson.dumps(self._body(fields, texts))
        except TypeError:
            raise TextRejected("The text is not valid Unicode.") from None
        try:
            response = self._post(content)
        except httpx.TimeoutException:
            raise EmbeddingUnavailable(
                f"{self._name} did not answer within {self._timeout_seconds:g} s.", failure=Failure.TIMEOUT
            ) from None
        except httpx.RequestError as error:
            raise EmbeddingUnavailable(f"{self._name} cannot be reached ({type(error).__name__}).") from None
        if response.status_code != httpx.codes.OK:
            optional = fields.keys() - self.required_fields
            raise refusal(response, provider=self._name, model=self._model, texts=texts, optional=optional)
        body = response.content
        # httpx lets a response refer to itself, which would keep half a megabyte until the garbage collector runs
        response.stream = httpx.ByteStream(b"")
        try:
            return self._parse(body, len(texts))
        except NOT_AN_ANSWER:
            # without the cause: it may quote the answer
            raise EmbeddingUnavailable(
                f"{self._name} gave an answer that does not follow the embeddings protocol, for {len(texts)} texts.",
                resolution="It is tried again. If it goes on, check that the provider's base_url is that of its API.",
                failure=Failure.NONSENSE,
            ) from None

    def _text_tokens(self) -> int:
        """The limit of one text: the model's (for an unknown model in bytes), or the lower one that is configured."""
        known = self._known.max_tokens if self._known else None
        if self._max_input_tokens is None:
            return self.unknown_model_max_bytes if known is None else known
        return self._max_input_tokens if known is None else min(known, self._max_input_tokens)

    def _wrong_dimensions(self, given: int | None) -> EmbeddingRejected:
        wanted = f"{self._dimensions} dimensions"
        if given is None:
            message = f"{self._name} does not accept a request for {wanted} of model {self._model!r}."
        else:
            message = f"{self._name} gives vectors of {given} dimensions for model {self._model!r}, but {wanted} are configured."
        return EmbeddingRejected(
            message,
            resolution="Set the vector table's embedding_dimensions to what the model gives, or change the model.",
            failure=Failure.REFUSED,
        )

    def close(self) -> None:
        """Closes the connections. Idempotent."""
        self.http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _estimate_tokens(texts: Sequence[str]) -> int:
    return sum(map(byte_count, texts)) // 4


def _check_field(refused: FieldRefused, probe: Callable[[], object]) -> None:
    """Raises TextRejected if the server accepts the field, which it seemed to refuse, for a harmless text."""
    if refused.is_certain:
        return
    try:
        probe()
    except (FieldRefused, TextRejected):
        return
    raise refused.rejection


def _check_key(api_key: str | None, *, provider: str, is_required: bool) -> str:
    """The key as it is sent, "" for none. Raises EmbeddingRejected for one that cannot be right."""
    key = (api_key or "").strip()
    if not key and is_required:
        raise EmbeddingRejected(
            f"The embedding provider has no api_key, but {provider} requires one.",
            resolution="Set credentials.api_key of the embedding provider.",
        )
    if not (key.isascii() and key.isprintable()):
        raise EmbeddingRejected(
            "The embedding provider's api_key contains characters that are not valid in an API key.",
            resolution="Enter credentials.api_key of the embedding provider again.",
        )
    return key


def _parse_base_url(base_url: str, *, example: str) -> httpx.URL:
    try:
        return parse_base_url(base_url.strip())
    except UnusableUrl as error:
        raise EmbeddingRejected(
            f"The embedding provider's base_url is not a usable http(s) address: {error}.",
            resolution=f"Give it like `{example}`, without what follows in the addresses of its calls.",
        ) from None
