"""A site's own UCX instead of the wheel's. Tested with a distribution's: Debian's libucx0."""

import os
from pathlib import Path

import pytest
from transfer_site import noise, over_tcp, require_sidecar, run, site

from loraserve.errors import FailedPreconditionError
from loraserve.node.transfer import TransferSidecar, program
from loraserve.node.transfer.program import UCX_PREFIX, library_folder, program_environment

PREFIX = "/usr"


def require_site_ucx(monkeypatch: pytest.MonkeyPatch) -> None:
    require_sidecar()
    try:
        library_folder(Path(PREFIX))
    except FailedPreconditionError:
        pytest.skip(f"no UCX under {PREFIX} (Debian: apt install libucx0)")
    monkeypatch.setenv(UCX_PREFIX, PREFIX)


def version(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split("."))


def test_the_program_runs_on_the_sites_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    require_site_ucx(monkeypatch)

    async def test() -> None:
        async with over_tcp(1 << 20) as holder, over_tcp(1 << 20) as reader:
            packed = noise(500_000)
            assert await reader.reads(await holder.lease(packed), packed)
            folder = str(library_folder(Path(PREFIX)))
            mapped = Path(f"/proc/{reader.pid}/maps").read_text()
            libraries = {line.split()[-1] for line in mapped.splitlines() if "libuc" in line}
            ucx = [path for path in libraries if "libucxx" not in path]
            assert ucx
            assert all(path.startswith(folder) for path in ucx), ucx

    run(test)


def test_what_an_old_ucx_does_badly_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A release before 1.19 hangs on a peer that dies: without RDMA there is no transport then."""
    require_site_ucx(monkeypatch)

    async def test() -> None:
        async with over_tcp(1 << 20) as probe:
            assert probe.sidecar.info is not None
            if version(probe.sidecar.info.ucx_version) >= (1, 19):
                pytest.skip("the site's UCX is not old")
            try:
                sidecar = await TransferSidecar.start(probe.arena.fd, 1 << 20)
            except FailedPreconditionError:
                return  # nor is there RDMA here
            assert sidecar.info is not None
            assert "cma" not in sidecar.info.transports
            await sidecar.close()

    run(test)


def test_peers_of_another_release_are_read_as_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    require_site_ucx(monkeypatch)

    async def test() -> None:
        async with over_tcp(1 << 20) as theirs:
            monkeypatch.delenv(UCX_PREFIX)
            slot = await theirs.lease(noise(100))
            async with site() as ours:
                assert ours.sidecar.info is not None
                mine = version(ours.sidecar.info.ucx_version)[:2]
                if mine == version(slot.ucx_version)[:2]:
                    pytest.skip("the wheel's release is the site's")
                with pytest.raises(FailedPreconditionError, match="ucx_version"):
                    await ours.read(slot, 100)

    run(test)


def test_a_prefix_without_ucx_is_an_error_that_names_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(UCX_PREFIX, str(tmp_path))

    async def test() -> None:
        with pytest.raises(FailedPreconditionError, match=UCX_PREFIX):
            await TransferSidecar.start(0, 1)

    run(test)


def test_the_environment_of_the_program() -> None:
    own = {
        "PATH": "/bin",
        "LORASERVE_KEY": "secret",
        "AWS_SECRET_ACCESS_KEY": "x",
        "UCX_TLS": "tcp",
    }
    made = program_environment(own)
    assert made["PATH"] == "/bin"
    assert made["UCX_TLS"] == "tcp"  # the program itself puts it right
    assert "secret" not in made.values()
    assert "x" not in made.values()


def test_what_the_nodes_own_ucx_needs_is_not_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "_before", {})
    monkeypatch.setenv("UCX_LOG_LEVEL", "info")
    monkeypatch.delenv("UCX_MEM_MMAP_HOOK_MODE", raising=False)
    before = program_environment()
    for _ in range(2):
        monkeypatch.setenv("UCX_MEM_MMAP_HOOK_MODE", "")  # so that it is undone
        monkeypatch.delenv("UCX_MEM_MMAP_HOOK_MODE")
        program.set_for_this_process({"UCX_LOG_LEVEL": "error", "UCX_MEM_MMAP_HOOK_MODE": "none"})
        assert os.environ["UCX_LOG_LEVEL"] == "error"
        assert os.environ["UCX_MEM_MMAP_HOOK_MODE"] == "none"
        assert program_environment() == before
    assert before["UCX_LOG_LEVEL"] == "info"
