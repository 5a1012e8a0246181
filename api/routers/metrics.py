"""Metrics for Prometheus. The operation needs no key."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from ..state import ApiState

router = APIRouter(tags=["Health"])


@router.get("/metrics", response_class=PlainTextResponse)
def get_metrics(request: Request) -> Response:
    """Get the metrics in Prometheus' text format. They contain no ids and no names; the operation needs no key."""
    state: ApiState = request.app.state.embedd
    return Response(state.metrics.text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)
