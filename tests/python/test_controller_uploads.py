"""Adapters by the controller's real wire: uploads, lists and reads, the bad ones too."""

import asyncio
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from controller_fixtures import BIGGER, PACKED, FakeCheck, Site, play, read, refused

from loraserve.checkpoint.adapter_source import AdapterModule, AdapterSource
from loraserve.checkpoint.packed_adapter import pack
from loraserve.checkpoint.packed_header import parse_header
from loraserve.controller import admission
from loraserve.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    InvalidCheckpointError,
    NotFoundError,
    ResourceExhaustedError,
)
from loraserve.v1 import adapter_pb2, common_pb2, controller_pb2


@pytest.mark.parametrize(
    ("fields", "data", "kind", "field"),
    [
        ({}, b"garbage", InvalidCheckpointError, "header"),
        ({"name": "../etc"}, PACKED, InvalidArgumentError, "name"),
        ({"base": ""}, PACKED, InvalidArgumentError, "base"),
        ({"base": "other"}, PACKED, FailedPreconditionError, "base"),
        ({"size_bytes": 3}, PACKED, InvalidArgumentError, "chunk"),
        ({"size_bytes": 300}, PACKED, InvalidArgumentError, "chunk"),
        ({"size_bytes": 0}, b"", InvalidArgumentError, "size_bytes"),
        ({"size_bytes": 2**60}, PACKED, InvalidArgumentError, "size_bytes"),
        ({"name": "taken"}, PACKED, AlreadyExistsError, "name"),
    ],
)
def test_bad_uploads_are_refused_and_leave_nothing(
    tmp_path: Path, fields: dict[str, Any], data: bytes, kind: type, field: str
) -> None:
    async def script(site: Site) -> None:
        await site.create("taken", b"PACKED base 4 other")
        error = await refused(site.create(fields.pop("name", "sql"), data, **fields))
        assert type(error) is kind
        assert error.field == field
        files = list((tmp_path / "data" / "adapters").rglob("*.lora*"))
        assert len(files) == 1
        assert list((tmp_path / "data" / "staging").iterdir()) == []

    play(tmp_path, script)


def test_a_full_disk_is_told_as_that(tmp_path: Path) -> None:
    class Full(FakeCheck):
        def feed(self, data: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    async def script(site: Site) -> None:
        error = await refused(site.create("sql", PACKED))
        assert (type(error), error.field) == (ResourceExhaustedError, "store")
        assert list((tmp_path / "data" / "staging").iterdir()) == []
        assert isinstance(await refused(site.get("sql")), NotFoundError)

    play(tmp_path, script, new_check=Full)


def test_names_of_one_revision_share_its_bytes(tmp_path: Path) -> None:
    def blobs() -> list[str]:
        return [p.name for p in (tmp_path / "data" / "adapters").rglob("*.lora*")]

    async def script(site: Site) -> None:
        one = await site.create("one", PACKED)
        inode = os.stat(site.server._blobs.path_of(one.revision)).st_ino
        two = await site.create("two", PACKED)
        await site.create("three", PACKED, who="zeta")
        assert one.revision == two.revision
        assert len(blobs()) == 1
        assert os.stat(site.server._blobs.path_of(one.revision)).st_ino == inode
        for name, who in (("one", "acme"), ("three", "zeta")):
            await site.delete(name, who)
            assert await read(site, two.revision) == PACKED
        await site.update("two", BIGGER)  # its history still has the first
        assert len(blobs()) == 2
        await site.delete("two")
        assert blobs() == []

    play(tmp_path, script)


def test_a_blob_cut_short_in_the_store_is_replaced_by_the_next_upload(tmp_path: Path) -> None:
    async def script(site: Site) -> None:
        made = await site.create("sql", PACKED)
        path = Path(site.server._blobs.path_of(made.revision))
        path.write_bytes(PACKED[:5])
        await site.create("again", PACKED)
        assert path.read_bytes() == PACKED

    play(tmp_path, script)


def test_a_header_alone_is_no_claim_to_an_adapter(tmp_path: Path) -> None:
    """The store has the revision; whoever does not have its bytes gets no name for it."""

    async def script(site: Site) -> None:
        weights = np.ones((4, 16), np.float32)
        module = AdapterModule(0, "q_proj", 4, 1.0, "F32", weights, weights.T)
        data = pack(AdapterSource("base", (module,)))
        await site.create("mine", data)
        guessed = data[: parse_header(data).header_bytes]
        guessed += bytes(len(data) - len(guessed))
        error = await refused(site.create("theirs", guessed, who="zeta"))
        assert (type(error), error.field) == (InvalidCheckpointError, "chunk 0")
        assert isinstance(await refused(site.get("theirs", who="zeta")), NotFoundError)

    play(tmp_path, script, new_check=admission.PackedCheck)


def test_a_base_mismatch_can_be_allowed(tmp_path: Path) -> None:
    async def script(site: Site) -> None:
        made = await site.create("sql", PACKED, base="other", allow_base_mismatch=True)
        assert made.base == "other"
        assert "no node serves the base" in made.unrouted_reason

    play(tmp_path, script)


def test_an_upload_must_begin_with_its_description(tmp_path: Path) -> None:
    async def script(site: Site) -> None:
        first = adapter_pb2.CreateAdapterRequest(chunk=b"x")
        call = site.adapters.CreateAdapter([first], metadata=site.auth("acme"))
        error = await refused(call)
        assert (type(error), error.field) == (InvalidArgumentError, "description")
        error = await refused(site.adapters.CreateAdapter([], metadata=site.auth("acme")))
        assert error.field == "description"

    play(tmp_path, script)


def test_an_upload_that_never_begins_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "CHUNK_TIMEOUT_S", 0.2)

    async def script(site: Site) -> None:
        for method in (site.adapters.CreateAdapter, site.adapters.UpdateAdapter):
            error = await refused(asyncio.wait_for(method(metadata=site.auth("acme")), 60))
            assert (error.code, error.field) == ("DEADLINE_EXCEEDED", "description")

    play(tmp_path, script)


def test_a_reader_that_hangs_up_in_the_middle_of_a_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def script(site: Site) -> None:
        ended = []

        def slow(revision: str, offset: int) -> Iterator[bytes]:
            try:
                while True:
                    time.sleep(0.2)
                    yield b"x"
            finally:
                ended.append(revision)

        made = await site.create("sql", BIGGER)
        site.server._blobs.read = slow  # type: ignore[method-assign, assignment]
        request = adapter_pb2.ReadAdapterRequest(revision=made.revision)
        call = site.adapters.ReadAdapter(request, metadata=site.auth("node"))
        await call.read()
        call.cancel()
        while not ended:
            await asyncio.sleep(0.01)

    play(tmp_path, script)
    assert "unexpected error" not in caplog.text


def test_lists_come_in_pages(tmp_path: Path) -> None:
    async def script(site: Site) -> None:
        names = [f"a{i}" for i in range(5)]
        for name in reversed(names):
            await site.create(name, PACKED)
        token, pages = "", []
        while True:
            page = await site.adapters.ListAdapters(
                adapter_pb2.ListAdaptersRequest(page_size=2, page_token=token),
                metadata=site.auth("acme"),
            )
            pages.append([a.name for a in page.adapters])
            token = page.next_page_token
            if not token:
                break
        assert pages == [["a0", "a1"], ["a2", "a3"], ["a4"]]
        for bad in ("x", "AAAA", "e30="):
            request = adapter_pb2.ListAdaptersRequest(page_token=bad)
            error = await refused(site.adapters.ListAdapters(request, metadata=site.auth("acme")))
            assert (type(error), error.field) == (InvalidArgumentError, "page_token")

    play(tmp_path, script)


def test_nodes_read_blobs_and_resolve_names(tmp_path: Path) -> None:
    async def script(site: Site) -> None:
        made = await site.create("sql", BIGGER)
        assert await read(site, made.revision) == BIGGER
        assert await read(site, made.revision, len(BIGGER) - 5) == BIGGER[-5:]
        assert await read(site, made.revision, len(BIGGER)) == b""
        error = await refused(read(site, made.revision, len(BIGGER) + 1))
        assert (type(error), error.field) == (InvalidArgumentError, "offset_bytes")
        assert isinstance(await refused(read(site, "0" * 64)), NotFoundError)
        assert isinstance(await refused(read(site, "../../keys.jsonl")), InvalidArgumentError)
        who = common_pb2.AdapterId(tenant="acme", base="base", name="sql")
        for revision in (None, made.revision):
            request = controller_pb2.ResolveAdapterRequest(adapter=who, revision=revision)
            found = await site.controller.ResolveAdapter(request, metadata=site.auth("node"))
            assert found.load.revision == made.revision
        request = controller_pb2.ResolveAdapterRequest(adapter=who, revision="0" * 64)
        call = site.controller.ResolveAdapter(request, metadata=site.auth("node"))
        assert isinstance(await refused(call), NotFoundError)

    play(tmp_path, script)
