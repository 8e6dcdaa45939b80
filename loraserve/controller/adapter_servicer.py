"""AdapterService: the registry for users, the blobs for nodes."""

import asyncio
import base64
import binascii
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from loraserve.checkpoint.durable_store import DurableStore
from loraserve.controller.admission import Admission, PackedFacts, check_base, in_time
from loraserve.controller.convert import adapter_to_wire
from loraserve.controller.events import NodeRecord
from loraserve.controller.fitting import check_fits, check_room
from loraserve.controller.registry import AdapterRegistry
from loraserve.controller.runtime import Runtime
from loraserve.controller.store import AdapterRecord
from loraserve.errors import InvalidArgumentError, NotFoundError
from loraserve.placement.types import AdapterId, AdapterSpec
from loraserve.security import current_identity
from loraserve.security.identity import check_base as check_base_name
from loraserve.security.identity import check_name, check_revision
from loraserve.v1 import adapter_pb2, adapter_pb2_grpc, common_pb2
from loraserve.wire import UPLOAD_ACCEPTED
from loraserve.wire_errors import typed_errors

DEFAULT_PAGE = 100
MAX_PAGE = 1000


class AdapterServicer(adapter_pb2_grpc.AdapterServiceServicer):
    """The tenant is the caller's; what belongs to another is not found."""

    def __init__(
        self,
        runtime: Runtime,
        registry: AdapterRegistry,
        admission: Admission,
        blobs: DurableStore,
    ) -> None:
        self._runtime = runtime
        self._registry = registry
        self._admission = admission
        self._blobs = blobs

    @typed_errors
    async def CreateAdapter(
        self, requests: AsyncIterator[adapter_pb2.CreateAdapterRequest], context: Any
    ) -> adapter_pb2.CreateAdapterResponse:
        about = (await _first(requests)).description
        name = check_name("name", about.name)
        adapter = AdapterId(current_identity().tenant, self._base(about.base), name)
        self._registry.check_free(adapter)  # before the bytes, not only after them
        check_room(about.size_bytes, adapter.base, self._nodes(adapter.base))
        await context.send_initial_metadata(UPLOAD_ACCEPTED)
        chunks = _chunks(requests)
        receiving = self._admission.receive(adapter.tenant, about.size_bytes, chunks)
        async with receiving as (path, facts):
            self._check(facts, adapter.base, about.allow_base_mismatch)
            spec = AdapterSpec(adapter, facts.revision, facts.size_bytes, facts.max_rank)
            record = await self._registry.add(spec, path)
        return adapter_pb2.CreateAdapterResponse(adapter=self._show(record))

    @typed_errors
    async def UpdateAdapter(
        self, requests: AsyncIterator[adapter_pb2.UpdateAdapterRequest], context: Any
    ) -> adapter_pb2.UpdateAdapterResponse:
        about = (await _first(requests)).description
        known = self._registry.find(current_identity().tenant, about.base, about.name)
        expected = about.expected_revision if about.HasField("expected_revision") else None
        if about.HasField("revision"):
            if about.size_bytes:
                raise InvalidArgumentError("revision", "excludes an upload: size_bytes must be 0")
            earlier = [s for s in known.history if s.revision == about.revision]
            if not earlier:
                raise NotFoundError("revision", f"the name never pointed to {about.revision[:80]}")
            record = await self._registry.update(earlier[0], None, expected)
        else:
            chunks = _chunks(requests)
            check_room(about.size_bytes, known.adapter.base, self._nodes(known.adapter.base))
            await context.send_initial_metadata(UPLOAD_ACCEPTED)
            tenant = known.adapter.tenant
            async with self._admission.receive(tenant, about.size_bytes, chunks) as (path, facts):
                self._check(facts, known.adapter.base, about.allow_base_mismatch)
                spec = AdapterSpec(known.adapter, facts.revision, facts.size_bytes, facts.max_rank)
                record = await self._registry.update(spec, path, expected)
        return adapter_pb2.UpdateAdapterResponse(adapter=self._show(record))

    @typed_errors
    async def GetAdapter(
        self, request: adapter_pb2.GetAdapterRequest, context: Any
    ) -> adapter_pb2.GetAdapterResponse:
        return adapter_pb2.GetAdapterResponse(adapter=self._show(self._named(request.adapter)))

    @typed_errors
    async def ListAdapters(
        self, request: adapter_pb2.ListAdaptersRequest, context: Any
    ) -> adapter_pb2.ListAdaptersResponse:
        size = min(request.page_size or DEFAULT_PAGE, MAX_PAGE)
        after = _after(request.page_token)
        tenant = current_identity().tenant
        found = self._registry.page(tenant, request.base, after, size + 1)
        more = len(found) > size
        return adapter_pb2.ListAdaptersResponse(
            adapters=[self._show(record) for record in found[:size]],
            next_page_token=_token(found[size - 1]) if more else "",
        )

    @typed_errors
    async def DeleteAdapter(
        self, request: adapter_pb2.DeleteAdapterRequest, context: Any
    ) -> adapter_pb2.DeleteAdapterResponse:
        await self._registry.remove(self._named(request.adapter).adapter)
        return adapter_pb2.DeleteAdapterResponse()

    @typed_errors
    async def ReadAdapter(
        self, request: adapter_pb2.ReadAdapterRequest, context: Any
    ) -> AsyncIterator[adapter_pb2.ReadAdapterResponse]:
        revision = check_revision("revision", request.revision)
        size = await asyncio.to_thread(self._blobs.size_bytes, revision)
        if request.offset_bytes > size:
            raise InvalidArgumentError("offset_bytes", f"{request.offset_bytes} is over {size}")
        first = True
        async with contextlib.aclosing(_read(self._blobs, revision, request.offset_bytes)) as parts:
            async for part in parts:
                yield adapter_pb2.ReadAdapterResponse(chunk=part, size_bytes=size if first else 0)
                first = False
        if first:
            yield adapter_pb2.ReadAdapterResponse(size_bytes=size)

    def _base(self, base: str) -> str:
        """The base that a request means. Raises InvalidArgumentError."""
        if base:
            return check_base_name("base", base)
        known = {node.record.base for node in self._runtime.state.nodes.values()}
        if len(known) != 1:
            raise InvalidArgumentError(
                "base",
                f"must be named: {', '.join(sorted(known)) or 'no node has registered one yet'}",
            )
        return known.pop()

    def _nodes(self, base: str) -> list[NodeRecord]:
        """Those that serve the base."""
        records = (node.record for node in self._runtime.state.nodes.values())
        return [record for record in records if record.base == base]

    def _check(self, facts: PackedFacts, base: str, allow_mismatch: bool) -> None:
        """Raises FailedPreconditionError where no node could ever serve it under this base."""
        nodes = self._nodes(base)
        digests = {record.base_digest for record in nodes if record.base_digest}
        check_base(facts, base, digests, allow_mismatch)
        check_fits(facts, base, nodes)

    def _named(self, ref: common_pb2.AdapterRef) -> AdapterRecord:
        if ref.HasField("revision"):
            raise InvalidArgumentError("adapter.revision", "must be absent here")
        return self._registry.find(current_identity().tenant, ref.base, ref.name)

    def _show(self, record: AdapterRecord) -> adapter_pb2.Adapter:
        state = self._runtime.state
        route = state.routes.adapters.get(record.adapter)
        reason = route.unrouted_reason if route else ""
        return adapter_to_wire(record, state.copies(record.adapter), reason)


async def _read(blobs: DurableStore, revision: str, offset: int) -> AsyncGenerator[bytes, None]:
    blocks = blobs.read(revision, offset)
    reading: asyncio.Future[bytes | None] | None = None
    try:
        while True:
            reading = asyncio.ensure_future(asyncio.to_thread(next, blocks, None))
            block = await asyncio.shield(reading)
            if not block:
                return
            yield block
    finally:
        if reading is not None and not reading.done():
            # A thread cannot be cancelled, and a generator that it runs cannot be closed.
            await asyncio.wait({reading})
        blocks.close()


async def _first(requests: AsyncIterator[Any]) -> Any:
    """The first message of an upload. Raises InvalidArgumentError unless it is a description,
    DeadlineExceededError where none comes."""
    request = await in_time(anext(aiter(requests), None), "description")
    if request is not None and request.WhichOneof("part") == "description":
        return request
    raise InvalidArgumentError("description", "must be the first message")


async def _chunks(requests: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    async for request in requests:
        if request.WhichOneof("part") != "chunk":
            raise InvalidArgumentError("chunk", "every message but the first must be one")
        yield request.chunk


def _token(record: AdapterRecord) -> str:
    key = json.dumps([record.adapter.base, record.adapter.name])
    return base64.urlsafe_b64encode(key.encode()).decode()


def _after(token: str) -> tuple[str, str]:
    if not token:
        return ("", "")
    try:
        key = json.loads(base64.b64decode(token, altchars=b"-_", validate=True))
    except (binascii.Error, ValueError, RecursionError):
        key = None
    if not (isinstance(key, list) and len(key) == 2 and all(isinstance(k, str) for k in key)):
        raise InvalidArgumentError("page_token", "is none that this server made")
    return (key[0], key[1])
