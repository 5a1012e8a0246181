"""What Prometheus scrapes; no key is needed."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from ..state import ApiState

router = APIRouter(tags=["Health"])


@router.get("/metrics", response_class=PlainTextResponse)
def get_metrics(request: Request) -> Response:
    """Get counters and gauges in Prometheus' text format: no ids, no names, no key needed."""
    state: ApiState = request.app.state.embedd
    return Response(state.metrics.text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)
