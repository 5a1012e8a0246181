"""The pages for people: Swagger UI over the OpenAPI document, and the list of error codes. They load nothing from elsewhere.

Swagger UI's own files are those that the package `fastapi-offline` carries; how a page starts them is ours, so that nothing
is inline and the strict Content-Security-Policy holds.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from pathlib import Path
from typing import Final

from fastapi import APIRouter, Response
from fastapi.responses import FileResponse, HTMLResponse
from starlette.exceptions import HTTPException

from . import errors

router = APIRouter(include_in_schema=False)

_POLICY: Final = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_UI_POLICY: Final = f"{_POLICY}; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'"

# addresses are relative, so that the pages also work behind a proxy that puts the API under a prefix
_UI: Final = """<!doctype html><html lang=en><meta charset=utf-8><title>embedd: API</title>
<meta name=viewport content="width=device-width"><link rel=icon href="data:,">
<link rel=stylesheet href="docs/assets/swagger-ui.css"><div id=swagger-ui></div>
<script src="docs/assets/swagger-ui-bundle.js"></script><script src="docs/assets/start.js"></script></html>
"""
# without `validatorUrl: null` the document would be shown to a validator on the internet
_START: Final = """SwaggerUIBundle({
  url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true, validatorUrl: null, displayRequestDuration: true,
  presets: [SwaggerUIBundle.presets.apis], layout: "BaseLayout",
});
"""
_SWAGGER_UI: Final = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
_CACHED: Final = {"Cache-Control": "public, max-age=3600"}


@router.get("/docs")
def show_operations() -> HTMLResponse:
    """The OpenAPI document, to read and to try."""
    return HTMLResponse(_UI, headers={"Content-Security-Policy": _UI_POLICY})


@router.get("/docs/assets/{name}")
def load_asset(name: str) -> Response:
    """A file of the page."""
    if name == "start.js":
        return Response(_START, media_type="text/javascript", headers=_CACHED)
    if name not in _SWAGGER_UI:
        raise HTTPException(404)
    path = Path(str(files("fastapi_offline"))) / "static" / name
    return FileResponse(path, media_type=_SWAGGER_UI[name], headers=_CACHED)


@router.get(errors.ERROR_PAGE)
def show_error_codes() -> HTMLResponse:
    """What every code means."""
    digest = base64.b64encode(hashlib.sha256(errors.ERROR_PAGE_STYLE.encode()).digest()).decode()
    policy = f"{_POLICY}; style-src 'sha256-{digest}'"
    return HTMLResponse(errors.error_page(), headers={"Content-Security-Policy": policy})
