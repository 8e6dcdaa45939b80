"""What may enter the cluster: real packed adapters, every byte of them checked."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from loraserve.checkpoint.adapter_source import AdapterModule, AdapterSource
from loraserve.checkpoint.packed_adapter import pack, parse_packed
from loraserve.controller import admission as admission_module
from loraserve.controller.admission import (
    MAX_UPLOADS,
    MAX_UPLOADS_OF_A_TENANT,
    Admission,
    PackedFacts,
    check_base,
)
from loraserve.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidCheckpointError,
    LoraServeError,
    ResourceExhaustedError,
)

DIGEST, OTHER = "d" * 64, "e" * 64


def packed(rank: int = 3, digest: str | None = None) -> bytes:
    rng = np.random.default_rng(rank)
    a = rng.standard_normal((rank, 16), dtype=np.float32)
    b = rng.standard_normal((24, rank), dtype=np.float32)
    modules = (
        AdapterModule(0, "q_proj", rank, 2.0, "F32", a, b),
        AdapterModule(1, "q_proj", 1, 2.0, "F32", a[:1], b[:, :1]),
    )
    return pack(AdapterSource("base", modules), base_digest=digest)


async def chunks(data: bytes, size: int = 100) -> AsyncIterator[bytes]:
    for begin in range(0, len(data), size):
        yield data[begin : begin + size]


async def admit(admission: Admission, data: bytes) -> tuple[PackedFacts, bytes]:
    async with admission.receive("acme", len(data), chunks(data)) as (path, facts):
        return facts, path.read_bytes()


def test_a_packed_adapter_is_admitted_as_it_is(tmp_path: Path) -> None:
    data = packed(digest=DIGEST)
    facts, written = asyncio.run(admit(Admission(tmp_path), data))
    assert written == data
    header = parse_packed(data).header
    assert facts == PackedFacts(header.revision, "base", len(data), 3, DIGEST, header.entries)
    assert list(tmp_path.iterdir()) == []


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    data = packed()
    admission = Admission(tmp_path)
    revision = asyncio.run(admit(admission, data))[0].revision
    for position in [*range(0, len(data), 97), len(data) - 1]:
        bad = bytearray(data)
        bad[position] ^= 0x10
        try:
            facts, _ = asyncio.run(admit(admission, bytes(bad)))
        except LoraServeError:
            continue
        # Only bytes that the header's own sha256 names may differ: another adapter, then.
        assert facts.revision != revision
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("length", [1, 7, 64, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, length: int) -> None:
    with pytest.raises(InvalidCheckpointError):
        asyncio.run(admit(Admission(tmp_path), packed()[:length]))
    assert list(tmp_path.iterdir()) == []


def test_an_upload_ends_with_its_first_wrong_chunk(tmp_path: Path) -> None:
    wide = np.ones((8, 100_000), np.float32)
    module = AdapterModule(0, "q_proj", 8, 2.0, "F32", wide, wide.T)
    data = bytearray(pack(AdapterSource("base", (module,))))
    data[1_000_000] ^= 1
    taken = 0

    async def counted() -> AsyncIterator[bytes]:
        nonlocal taken
        async for chunk in chunks(bytes(data), 1 << 20):
            taken += 1
            yield chunk

    async def run() -> None:
        with pytest.raises(InvalidCheckpointError, match="chunk 0"):
            async with Admission(tmp_path).receive("acme", len(data), counted()):
                pass

    asyncio.run(run())
    assert taken == 2 < len(data) >> 20
    assert list(tmp_path.iterdir()) == []


def test_what_is_left_of_a_crash_is_removed(tmp_path: Path) -> None:
    (tmp_path / "left.part").write_bytes(b"x")
    Admission(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_uploads_at_once_are_bounded(tmp_path: Path) -> None:
    data = packed()

    async def run() -> None:
        admission = Admission(tmp_path)
        release = asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            await release.wait()
            yield data

        async def upload(tenant: str) -> None:
            async with admission.receive(tenant, len(data), slow()):
                pass

        running = []
        for tenant, told in (("acme", "of tenant 'acme' are running"), ("zeta", "8 are running")):
            for _ in range(MAX_UPLOADS_OF_A_TENANT):
                running.append(asyncio.create_task(upload(tenant)))
            await asyncio.sleep(0)
            with pytest.raises(ResourceExhaustedError, match=f"uploads: .*{told}") as caught:
                await admit(admission, data)
            assert caught.value.retry_after_s
        assert admission.running == MAX_UPLOADS
        release.set()
        await asyncio.gather(*running)
        await admit(admission, data)
        assert admission.running == 0

    asyncio.run(run())


def test_an_upload_that_drips_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission_module, "MIN_BYTES_PER_S", 10)
    now = 0.0
    admission = Admission(tmp_path, clock=lambda: now)

    async def drip(size: int, pause_s: float) -> AsyncIterator[bytes]:
        nonlocal now
        async for chunk in chunks(packed(), size):
            yield chunk
            now += pause_s

    async def upload(size: int, pause_s: float) -> float:
        begin = now
        async with admission.receive("acme", len(packed()), drip(size, pause_s)):
            pass
        return now - begin

    async def run() -> None:
        slow = await upload(200, 19.0)  # just over the rate
        assert slow > 2 * admission_module.CHUNK_TIMEOUT_S
        with pytest.raises(DeadlineExceededError, match="chunk: 600 bytes came"):
            await upload(200, 60.0)
        assert list(tmp_path.iterdir()) == []
        assert admission.running == 0

    asyncio.run(run())


def test_an_upload_that_stops_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission_module, "CHUNK_TIMEOUT_S", 0.05)
    admission = Admission(tmp_path)

    async def stops() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    async def run() -> None:
        with pytest.raises(DeadlineExceededError, match="chunk: 0 bytes came"):
            async with admission.receive("acme", 100, stops()):
                pass
        assert list(tmp_path.iterdir()) == []
        assert admission.running == 0

    asyncio.run(run())


@pytest.mark.parametrize(
    ("name", "digest", "known", "fits"),
    [
        ("base", "", set(), True),
        ("/home/ann/models/Base/", "", {DIGEST}, True),
        ("org/base", "", set(), True),
        ("", "", {DIGEST}, True),
        ("other", "", {DIGEST}, False),
        ("other", DIGEST, set(), False),
        ("other", DIGEST, {DIGEST}, True),  # the same weights under another name
        ("base", DIGEST, {OTHER}, False),  # other weights under the same name
    ],
)
def test_the_base_must_fit(name: str, digest: str, known: set[str], fits: bool) -> None:
    facts = PackedFacts("r", name, 1, 1, digest)
    if fits:
        check_base(facts, "base", known, False)
    else:
        with pytest.raises(FailedPreconditionError, match=r"base: .*--allow-base-mismatch"):
            check_base(facts, "base", known, False)
    check_base(facts, "base", known, True)
