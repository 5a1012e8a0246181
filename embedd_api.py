"""In a checkout, the API under the name that the wheel ships it with: `embedd_api.app` is `api/app.py`."""

from pathlib import Path

__path__ = [str(Path(__file__).with_name("api"))]
