"""The engine's fixtures, for documents whose code is run."""

from tests.engine.conftest import openai_server, product, settings

__all__ = ["openai_server", "product", "settings"]
