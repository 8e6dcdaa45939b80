"""What may enter the cluster: real packed adapters, every byte of them checked."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from loraserve.checkpoint.adapter_source import AdapterModule, AdapterSource
from loraserve.checkpoint.packed_adapter import pack, parse_packed
from loraserve.controller.admission import (
    MAX_UPLOADS,
    Admission,
    PackedFacts,
    check_base,
    inspect_packed,
)
from loraserve.errors import (
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
    async with admission.receive(len(data), chunks(data)) as (path, facts):
        return facts, path.read_bytes()


def test_a_packed_adapter_is_admitted_as_it_is(tmp_path: Path) -> None:
    data = packed(digest=DIGEST)
    facts, written = asyncio.run(admit(Admission(tmp_path), data))
    assert written == data
    assert facts == PackedFacts(parse_packed(data).revision, "base", len(data), 3, DIGEST)
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


@pytest.mark.parametrize("length", [0, 1, 7, 64, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, length: int) -> None:
    (tmp_path / "file").write_bytes(packed()[:length])
    with pytest.raises(InvalidCheckpointError):
        inspect_packed(tmp_path / "file")


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

        async def upload() -> None:
            async with admission.receive(len(data), slow()):
                pass

        running = [asyncio.create_task(upload()) for _ in range(MAX_UPLOADS)]
        await asyncio.sleep(0)
        with pytest.raises(ResourceExhaustedError, match="uploads") as caught:
            await admit(admission, data)
        assert caught.value.retry_after_s
        release.set()
        await asyncio.gather(*running)
        await admit(admission, data)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("name", "digest", "known", "fits"),
    [
        ("base", "", set(), True),
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
        with pytest.raises(FailedPreconditionError, match=r"base: .*allow_base_mismatch"):
            check_base(facts, "base", known, False)
    check_base(facts, "base", known, True)
