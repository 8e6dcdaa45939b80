"""`loraserve serve` as a process of its own, for tests that speak HTTP."""

import contextlib
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class ServedHttp:
    """`url` is that of the gateway, without /v1; `lines` are what the tree said so far."""

    process: subprocess.Popen[str]
    url: str = ""
    lines: list[str] = field(default_factory=list)
    ready: threading.Event = field(default_factory=threading.Event)

    def read(self) -> None:
        """In a thread of its own, until the tree's stderr ends."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            found = re.search(r"(?:^loraserve: |: \")ready: (http://[^/\s]+)/v1", line)
            if found:
                self.url = found[1]
                self.ready.set()
        self.ready.set()

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def addresses(self, name: str) -> list[str]:
        """host:port of the daemons whose names begin so."""
        return re.findall(rf"^loraserve: {name}\S* serves on (\S+)$", self.text, re.M)

    def daemons(self) -> dict[str, Any]:
        """Process ids by name, as the tree told them."""
        return {m[1]: int(m[2]) for m in re.finditer(r"(\S+) \(pid (\d+)\)", self.text)}


@contextlib.contextmanager
def serving(
    *options: str, code: int = 0, timeout_s: float = 300.0, cwd: Path | None = None
) -> Iterator[ServedHttp]:
    """A tree that is ready; it must end by itself, after a SIGTERM at the latest, with `code`."""
    command = [sys.executable, "-m", "loraserve.cli", "serve", "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=cwd)
    served = ServedHttp(process)
    reader = threading.Thread(target=served.read, daemon=True)
    reader.start()
    try:
        assert served.ready.wait(timeout_s), served.text
        assert served.url, served.text
        yield served
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join(60)
        assert process.stderr is not None
        process.stderr.close()
    assert process.returncode == code, served.text
    assert "Traceback" not in served.text, served.text
