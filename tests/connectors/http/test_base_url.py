"""Which base URLs are accepted, and what a request makes of them."""

from __future__ import annotations

import pytest

from embedd_dagster.connectors.http.base_url import UnusableUrl, parse_base_url, with_path
from embedd_dagster.connectors.registry import open_embedder
from embedd_dagster.errors import EmbeddingRejected

UNUSABLE = [
    "http://host/v1%0a", "http://host/v1%0D%0Ax", "http://host/%00", "http://host/%1f", "http://host/%7F",
    "http://host/v1?key=%0d%0a", "http://host/%zz", "http://host/%", "http://host/v1%2", "http://h%41st/v1",
    "http://host/v1\r\nHost: other", "http://host/v1\n", "http://host/ v1", " http://host/v1", "http://ho st/v1",
    "http://host/v1\t", "http://host/\x7f", "http://host/é", "http://höst/v1", "http://host\\@other/v1",
    "http://host:0/v1", "http://host:65536/v1", "http://host:99999999999/v1", "http://host:-1/v1", "http://host:x/v1",
    "http://user@host/v1", "http://user:password@host/v1", "http://@host/v1", "http://:@host/v1", "http://host/v1#x",
    "http://host/v1#", "http://", "http:///v1", "http://?x", "host/v1", "ftp://host/v1", "", "http://[::1/v1",
    "http://[::1%25lo]/v1", "http://[v1.x]/v1", "http://256.1.1.1/v1", "http://..", "http://host..x/v1", "http://-host/v1",
    "http://xn--a/v1", "http://" + "a" * 64 + "/v1", "http://" + "a." * 130 + "a/v1",
]  # fmt: skip


@pytest.mark.parametrize("url", UNUSABLE)
def test_an_unusable_base_url_is_rejected(url: str) -> None:
    with pytest.raises(UnusableUrl, match="is accepted"):
        parse_base_url(url)


@pytest.mark.parametrize("provider", ["openai", "gemini", "voyage"])
def test_a_stored_base_url_with_an_encoded_control_character_is_a_configuration_error(provider: str) -> None:
    with pytest.raises(EmbeddingRejected, match="base_url"):
        open_embedder(
            provider, credentials={"api_key": "k", "base_url": "http://h/v1%0a"}, model="text-x", dimensions=8
        )


@pytest.mark.parametrize(
    ("base_url", "target"),
    [
        ("http://host", b"/embeddings"),
        ("http://host/", b"/embeddings"),
        ("https://host:8443/v1/", b"/v1/embeddings"),
        ("http://localhost:11434/v1", b"/v1/embeddings"),
        ("http://text_embeddings.internal./v1", b"/v1/embeddings"),
        ("http://xn--mnchen-3ya.example/v1", b"/v1/embeddings"),
        ("http://[::1]:8080/v1", b"/v1/embeddings"),
        ("http://10.0.0.1/a%2Fb/v1", b"/a%2Fb/v1/embeddings"),
        ("http://host/caf%C3%A9/%ff", b"/caf%C3%A9/%ff/embeddings"),
        ("https://mine.openai.azure.com/openai/deployments/x?api-version=2024-10-21",
         b"/openai/deployments/x/embeddings?api-version=2024-10-21"),
        ("http://host/v1?a=b%2Fc&d=e", b"/v1/embeddings?a=b%2Fc&d=e"),
    ],
)  # fmt: skip
def test_the_path_of_the_base_url_is_kept_as_written(base_url: str, target: bytes) -> None:
    assert with_path(parse_base_url(base_url), "/embeddings").raw_path == target
