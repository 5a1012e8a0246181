"""The pages that the guard itself shows: plain HTML, no script, nothing loaded."""

from __future__ import annotations

import base64
import hashlib
from html import escape
from typing import Final

from starlette.responses import HTMLResponse

_STYLE: Final = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:26rem;margin:18vh auto;padding:0 1rem;color:#222}"
    "input,button{font:inherit;padding:.5rem .7rem;border:1px solid #999;border-radius:6px}"
    "input{width:100%;box-sizing:border-box;margin:.3rem 0 .8rem}button{background:#222;color:#fff;cursor:pointer}"
    "code{background:#eee;padding:.1rem .3rem;border-radius:4px}.wrong{color:#b00020}"
)
_POLICY: Final = (
    "default-src 'none'; form-action 'self'; base-uri 'none'; "
    f"style-src 'sha256-{base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()}'"
)


def login_page(next_path: str, *, wrong_token: bool = False) -> HTMLResponse:
    """Asks for the token; goes on to the path once it is given."""
    wrong = '<p class="wrong" role="alert">That is not this installation’s token.</p>' if wrong_token else ""
    response = _page(
        "Sign in",
        f"""<h1>Dagster</h1>
<p>Open the link that <code>embedd up</code> prints (<code>embedd status</code> shows it again), or enter the token:</p>
{wrong}<form method="post" action="/login">
<input type="hidden" name="next" value="{escape(next_path)}">
<label>Token <input type="password" name="token" autocomplete="current-password" autofocus required></label>
<button>Sign in</button></form>""",
        status_code=401,
    )
    # under "no-referrer" a browser would send the form with the origin "null"
    response.headers["Referrer-Policy"] = "same-origin"
    return response


def forward_page(path: str) -> HTMLResponse:
    """Goes on by itself. Not a redirect: one that began at another site would arrive without the cookie."""
    target = escape(path)
    return _page(
        "Dagster", f'<p><a href="{target}">Go on</a></p>', head=f'<meta http-equiv="refresh" content="0; url={target}">'
    )


def _page(title: str, body: str, *, head: str = "", status_code: int = 200) -> HTMLResponse:
    content = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style>{head}</head><body>{body}</body></html>"
    )
    headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-store"}
    return HTMLResponse(content, status_code=status_code, headers=headers)
