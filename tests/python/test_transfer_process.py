"""A life of the sidecar program that does not begin: nothing of it is left in the node."""

import asyncio
import errno
import os
import socket
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from loraserve.errors import FailedPreconditionError, UnavailableError
from loraserve.node.transfer import messages
from loraserve.node.transfer.process import SidecarProcess

REFUSAL = messages.encode(messages.FAILED, 0, struct.pack("<II", 6, 4) + b"none")
REFUSES = f"""#!{sys.executable}
import socket, sys, time
node = socket.socket(fileno=int(sys.argv[1]))
node.recv(100)
node.sendall({REFUSAL!r})
time.sleep(600)
"""


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


async def start(program: Path) -> SidecarProcess:
    return await SidecarProcess.start(program, dict(os.environ), 0, 4096, 60.0)


@pytest.mark.parametrize("what", ["refuses", "is not there", "ends"])
def test_a_failed_start_leaves_nothing_in_the_loop(what: str, tmp_path: Path) -> None:
    program = tmp_path / "program"
    if what != "is not there":
        program.write_text(REFUSES if what == "refuses" else "#!/bin/false\n")
        program.chmod(0o755)

    async def test() -> None:
        selector: Any = asyncio.get_running_loop()._selector  # type: ignore[attr-defined]
        before = set(selector.get_map())
        kind = FailedPreconditionError if what == "refuses" else UnavailableError
        with pytest.raises(kind):
            await start(program)
        assert set(selector.get_map()) - before == set()

    asyncio.run(test())


def test_a_start_that_is_cancelled_leaves_no_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        begun = asyncio.Event()

        async def never(*_: Any, **__: Any) -> None:
            begun.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(asyncio, "create_subprocess_exec", never)
        before = descriptors()
        starting = asyncio.create_task(start(tmp_path / "program"))
        await begun.wait()
        assert len(descriptors()) == len(before) + 2
        starting.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await starting
        assert descriptors() == before
        del caught

    asyncio.run(test())


def test_a_node_without_descriptors_left_is_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*_: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    async def test() -> None:  # whose loop has its own already
        monkeypatch.setattr(socket, "socketpair", none_left)
        with pytest.raises(UnavailableError, match="Too many open files"):
            await start(tmp_path / "program")

    asyncio.run(test())
