"""Loopback ports that stay the same from start to start, unless another program uses them."""

from __future__ import annotations

import random
import socket
from pathlib import Path

import structlog

from embedd_dagster.errors import ConfigurationError
from embedd_dagster.stack import files

_log = structlog.get_logger(__name__)

LOOPBACK = "127.0.0.1"
# Below the range from which systems take the ports of outgoing connections: above, a passing connection of anybody
# could sit on our port just when we start again.
_RANGE = range(20_000, 32_000)


class Ports:
    """The remembered port of each service of one state directory."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def claim(self, name: str) -> int:
        """A port that is free now: the remembered one if possible, otherwise a new one, which is remembered."""
        remembered = self._read()
        port = remembered.get(name)
        if port is None or not is_free(port):
            if port is not None:
                _log.warning("port_taken", service=name, port=port, hint="another one is taken, and kept from now on")
            port = _find_free(exclude=set(remembered.values()))
            files.write_json(self._path, {**remembered, name: port})
        return port

    def any_taken(self) -> bool:
        """Whether somebody listens on one of the remembered ports."""
        return any(not is_free(port) for port in self._read().values())

    def _read(self) -> dict[str, int]:
        """Entries of a damaged file that are not ports are left out; new ones are chosen."""
        content = files.read_json(self._path)
        return {name: port for name, port in content.items() if type(port) is int and 1024 <= port < 65_536}


def is_free(port: int) -> bool:
    """Whether a server could listen on this loopback port now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: connections of a server that has just ended must not make its port look taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
            probe.listen(1)
        except OSError:
            return False
    return True


def _find_free(exclude: set[int]) -> int:
    for port in random.sample(_RANGE, 500):
        if port not in exclude and is_free(port):
            return port
    raise ConfigurationError(
        f"No free port on {LOOPBACK}.", resolution=f"Free one between {_RANGE.start} and {_RANGE.stop}."
    )
