"""A way to a server that can freeze: what is connected stays connected, and nothing passes any more."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class FreezingProxy:
    """Forwards TCP to a port of this machine until it is frozen: by `freeze`, or when a client sends `freeze_on`."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self.freeze_on: bytes | None = None
        self.thaw_by_itself = False
        """Whether only the connection that `freeze_on` is met in freezes, and others are forwarded."""
        self._frozen = threading.Event()
        self._sockets: list[socket.socket] = []
        self._dead: set[int] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def freeze(self) -> None:
        """From now on nothing passes."""
        self._frozen.set()

    def thaw(self) -> None:
        """New connections are forwarded again; those that froze stay so."""
        self.freeze_on = None
        self._frozen.clear()

    @property
    def is_frozen(self) -> bool:
        """Whether anything passes."""
        return self._frozen.is_set()

    def close(self) -> None:
        """Ends everything."""
        self._frozen.set()
        for one in [self._listener, *self._sockets]:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.append(client)
            if self._frozen.is_set():
                continue
            server = socket.create_connection(("127.0.0.1", self._target_port))
            self._sockets.append(server)
            for source, target, is_client in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._forward, args=(source, target, is_client), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, is_client: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if is_client and self.freeze_on is not None and self.freeze_on in data:
                    if self.thaw_by_itself:
                        self.freeze_on = None
                        self._dead.add(id(source))
                        self._dead.add(id(target))
                    else:
                        self._frozen.set()
                if self._frozen.is_set() or id(source) in self._dead:
                    return
                target.sendall(data)
            if not self._frozen.is_set() and id(source) not in self._dead:
                target.shutdown(socket.SHUT_WR)


@contextmanager
def freezing_proxy(target_port: int) -> Iterator[FreezingProxy]:
    """A proxy, closed at the end."""
    proxy = FreezingProxy(target_port)
    try:
        yield proxy
    finally:
        proxy.close()
