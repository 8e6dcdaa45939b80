"""A way to a node that can be cut, held or made to lie in the middle of an adapter's bytes."""

import contextlib
import socket
import threading
from collections.abc import Iterator


class PeerProxy:
    """Passes connections to `target` (host:port, set later) on. What comes back from it on one
    connection is counted; only an adapter is as long as what `hold_after` and `flip_at` say."""

    def __init__(self) -> None:
        self.target = ""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.hold_after: int | None = None
        """Bytes after which a connection stands still until `go`."""
        self.flip_at: int | None = None
        """The byte of a connection one bit of which is changed."""
        self.held = threading.Event()
        self.go = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    @contextlib.contextmanager
    def holding(self, after: int = 4 << 20) -> Iterator[None]:
        """Readers stand still in the middle until the block ends."""
        self.held.clear()
        self.go.clear()
        self.hold_after = after
        try:
            yield
        finally:
            self.hold_after = None
            self.go.set()

    @contextlib.contextmanager
    def lying(self, at: int = 4 << 20) -> Iterator[None]:
        self.flip_at = at
        try:
            yield
        finally:
            self.flip_at = None

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        host, port = self.target.rsplit(":", 1)
        try:
            far = socket.create_connection((host, int(port)))
        except OSError:
            near.close()
            return
        threading.Thread(target=self._pump, args=(near, far, False), daemon=True).start()
        self._pump(far, near, True)

    def _pump(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := bytearray(source.recv(1 << 16)):
                end = passed + len(data)
                if answers and self.flip_at is not None and passed <= self.flip_at < end:
                    data[self.flip_at - passed] ^= 1
                if answers and self.hold_after is not None and end > self.hold_after:
                    self.held.set()
                    self.go.wait(60)
                sink.sendall(data)
                passed = end
        for end_of in (source, sink):
            with contextlib.suppress(OSError):
                end_of.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.go.set()
        self._listener.close()
