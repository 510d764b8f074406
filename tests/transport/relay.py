"""A tcp relay between two sockets, whose connections can be cut."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


class Relay:
    """A tcp relay between two sockets, whose connections can be cut."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Relay:
        return self

    def start(self, target: str) -> str:
        host, port = target.removeprefix("tcp://").split(":")
        self._run(self._accept, (host, int(port)))
        return f"tcp://127.0.0.1:{self._server.getsockname()[1]}"

    def _run(self, what: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=what, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self, target: tuple[str, int]) -> None:
        with contextlib.suppress(OSError):
            while True:
                one = self._server.accept()[0]
                other = socket.create_connection(target)
                self._open += [one, other]
                self._run(self._forth, one, other)
                self._run(self._pump, other, one)

    def _forth(self, source: socket.socket, target: socket.socket) -> None:
        """What goes to the target."""
        self._pump(source, target)

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)

    def cut(self) -> None:
        while self._open:
            connection = self._open.pop()
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.cut()
        for thread in self._threads:
            thread.join()
