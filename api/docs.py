"""The pages for people: Swagger UI over the OpenAPI document, and the list of error codes.

They load nothing from other servers: the files of Swagger UI come with the package `fastapi-offline`. The script that starts
Swagger UI is our own file, because the strict Content-Security-Policy forbids inline scripts.
"""

from __future__ import annotations

import base64
import hashlib
import html
from importlib.resources import files
from pathlib import Path
from typing import Final

from fastapi import APIRouter, Response
from fastapi.responses import FileResponse, HTMLResponse
from starlette.exceptions import HTTPException

from .error_codes import ERROR_CODES, ERROR_PAGE

router = APIRouter(include_in_schema=False)

_POLICY: Final = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_UI_POLICY: Final = f"{_POLICY}; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'"

# the addresses are relative: the pages also work behind a proxy that adds a prefix to the path
_UI: Final = """<!doctype html><html lang=en><meta charset=utf-8><title>embedd: API</title>
<meta name=viewport content="width=device-width"><link rel=icon href="data:,">
<link rel=stylesheet href="docs/assets/swagger-ui.css"><div id=swagger-ui></div>
<script src="docs/assets/swagger-ui-bundle.js"></script><script src="docs/assets/start.js"></script></html>
"""
# without `validatorUrl: null`, Swagger UI sends the address of the document to a validator on the internet
_START: Final = """SwaggerUIBundle({
  url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true, validatorUrl: null, displayRequestDuration: true,
  presets: [SwaggerUIBundle.presets.apis], layout: "BaseLayout",
});
"""
_SWAGGER_UI: Final = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
_ERROR_PAGE_STYLE: Final = (
    "body{font:1rem/1.5 system-ui;margin:2rem auto;max-width:60rem}td,th{padding:.3rem .8rem;text-align:left;"
    "vertical-align:top}tr:target{background:#ffefc0}"
)
_CACHED: Final = {"Cache-Control": "public, max-age=3600"}


@router.get("/docs")
def show_operations() -> HTMLResponse:
    """Swagger UI: read the OpenAPI document and try its operations."""
    return HTMLResponse(_UI, headers={"Content-Security-Policy": _UI_POLICY})


@router.get("/docs/assets/{name}")
def load_asset(name: str) -> Response:
    """A file that the page of Swagger UI loads."""
    if name == "start.js":
        return Response(_START, media_type="text/javascript", headers=_CACHED)
    if name not in _SWAGGER_UI:
        raise HTTPException(404)
    path = Path(str(files("fastapi_offline"))) / "static" / name
    return FileResponse(path, media_type=_SWAGGER_UI[name], headers=_CACHED)


@router.get(ERROR_PAGE)
def show_error_codes() -> HTMLResponse:
    """All error codes with their meaning; `docs_url` of an error leads here."""
    digest = base64.b64encode(hashlib.sha256(_ERROR_PAGE_STYLE.encode()).digest()).decode()
    rows = "".join(
        f'<tr id="{code}"><td><code>{code}</code></td><td>{entry.status}</td><td>{html.escape(entry.when)}</td></tr>'
        for code, entry in ERROR_CODES.items()
    )
    return HTMLResponse(
        "<!doctype html><html lang=en><meta charset=utf-8><title>embedd: error codes</title>"
        f"<style>{_ERROR_PAGE_STYLE}</style><h1>Error codes</h1>"
        f"<table><tr><th>code<th>HTTP<th>when</tr>{rows}</table></html>",
        headers={"Content-Security-Policy": f"{_POLICY}; style-src 'sha256-{digest}'"},
    )
