"""The adapters of a cluster: adding, changing, listing and removing them."""

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loraserve.checkpoint.packed_adapter import PackedAdapter, load_adapter_source
from loraserve.client.channels import Channels, unary
from loraserve.client.messages import adapter_from_wire
from loraserve.client.retry import TRANSPORT_FIELD
from loraserve.client.types import AdapterInfo
from loraserve.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    LoraServeError,
    NotFoundError,
    UnavailableError,
)
from loraserve.v1 import adapter_pb2, adapter_pb2_grpc, common_pb2
from loraserve.wire import CHUNK_BYTES, UPLOAD_ACCEPTED

AdapterFiles = str | Path | PackedAdapter
"""A PEFT directory, a packed file, or a packed adapter in memory."""

CALL_TIMEOUT_S = 10.0
_Upload = adapter_pb2.CreateAdapterRequest | adapter_pb2.UpdateAdapterRequest

# The slowest upload that is waited for, beside the time of a call.
_MIN_BYTES_PER_S = 1 << 20
_PAGE_SIZE = 500


class AdapterCalls:
    """Lives on one event loop. Every method raises LoraServeError; a controller that is away is an
    UnavailableError.

    `base` names the base model; it may stay empty while the cluster serves only one.
    """

    def __init__(self, channels: Channels, controller: str | None) -> None:
        self._channels = channels
        self._controller = controller

    def _stub(self) -> Any:
        if self._controller is None:
            raise FailedPreconditionError("controller", "this client knows nodes only")
        return adapter_pb2_grpc.AdapterServiceStub(self._channels.get(self._controller))

    async def _call(self, method: str, request: Any) -> Any:
        call = getattr(self._stub(), method)(
            request, timeout=CALL_TIMEOUT_S, metadata=self._channels.metadata
        )
        return await self._answer(call)

    async def add(
        self, name: str, source: AdapterFiles, *, base: str = "", allow_base_mismatch: bool = False
    ) -> AdapterInfo:
        """Admits a new adapter to the cluster. AlreadyExistsError where the name is taken."""
        packed = await _packed(source)
        about = adapter_pb2.CreateAdapterDescription(
            base=base,
            name=name,
            size_bytes=packed.size_bytes,
            allow_base_mismatch=allow_base_mismatch,
        )

        first = adapter_pb2.CreateAdapterRequest(description=about)
        return await self._upload("CreateAdapter", first, packed)

    async def update(
        self,
        name: str,
        source: AdapterFiles | None = None,
        *,
        revision: str | None = None,
        expected_revision: str | None = None,
        base: str = "",
        allow_base_mismatch: bool = False,
    ) -> AdapterInfo:
        """Points the name to another revision: that of `source`, or an earlier `revision` of it.

        FailedPreconditionError where `expected_revision` is given and the name points elsewhere.
        Requests that run keep the revision they began with.
        """
        if (source is None) == (revision is None):
            raise InvalidArgumentError("revision", "exactly one of source and revision is needed")
        packed = None if source is None else await _packed(source)
        about = adapter_pb2.UpdateAdapterDescription(
            base=base,
            name=name,
            size_bytes=packed.size_bytes if packed else 0,
            revision=revision,
            expected_revision=expected_revision,
            allow_base_mismatch=allow_base_mismatch,
        )

        first = adapter_pb2.UpdateAdapterRequest(description=about)
        return await self._upload("UpdateAdapter", first, packed)

    async def _upload(
        self, method: str, first: _Upload, packed: PackedAdapter | None
    ) -> AdapterInfo:
        size = packed.size_bytes if packed else 0
        call = getattr(self._stub(), method)(
            timeout=CALL_TIMEOUT_S + size / _MIN_BYTES_PER_S, metadata=self._channels.metadata
        )

        async def send() -> Any:
            await call.write(first)
            # Without the controller's leave there is a refusal, and writing would lose the reason.
            accepted = UPLOAD_ACCEPTED[0] in tuple(await call.initial_metadata())
            if not accepted:
                return await call
            with contextlib.suppress(asyncio.InvalidStateError):  # the call has ended
                for chunk in _pieces(packed.blob) if packed else ():
                    await call.write(type(first)(chunk=chunk))
                await call.done_writing()
            return await call

        try:
            return adapter_from_wire((await self._answer(call, send())).adapter)
        except LoraServeError as error:
            # A call that was refused before its first message was out: grpc has lost the reason,
            # and a call with one message has it.
            if error.field == TRANSPORT_FIELD and error.code == "INTERNAL":
                with contextlib.suppress(NotFoundError):
                    await self.get(first.description.name, base=first.description.base)
            raise
        finally:
            call.cancel()

    async def _answer(self, call: Any, work: Any = None) -> Any:
        try:
            return await unary(self._channels, call, work)
        except UnavailableError as error:
            if error.field != TRANSPORT_FIELD:
                raise
            raise UnavailableError("controller", f"{self._controller}: {error.message}") from None

    async def get(self, name: str, *, base: str = "") -> AdapterInfo:
        request = adapter_pb2.GetAdapterRequest(adapter=_ref(name, base))
        return adapter_from_wire((await self._call("GetAdapter", request)).adapter)

    async def list(self, *, base: str = "") -> list[AdapterInfo]:
        """All of the tenant's, by (base, name)."""
        found: list[AdapterInfo] = []
        token = ""
        while True:
            request = adapter_pb2.ListAdaptersRequest(
                page_size=_PAGE_SIZE, page_token=token, base=base
            )
            answer = await self._call("ListAdapters", request)
            found += map(adapter_from_wire, answer.adapters)
            token = answer.next_page_token
            if not token:
                return found

    async def remove(self, name: str, *, base: str = "") -> None:
        """The name is gone when this returns; copies go when their last request has ended."""
        await self._call(
            "DeleteAdapter", adapter_pb2.DeleteAdapterRequest(adapter=_ref(name, base))
        )


async def _packed(source: AdapterFiles) -> PackedAdapter:
    if isinstance(source, PackedAdapter):
        return source
    return await asyncio.to_thread(load_adapter_source, Path(source))


def _pieces(blob: memoryview) -> Iterator[bytes]:
    for start in range(0, len(blob), CHUNK_BYTES):
        yield bytes(blob[start : start + CHUNK_BYTES])


def _ref(name: str, base: str) -> common_pb2.AdapterRef:
    if not name:
        raise InvalidArgumentError("name", "is empty")
    return common_pb2.AdapterRef(base=base, name=name)
