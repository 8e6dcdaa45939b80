"""Questions to the controller about names, asked once for all who wait for the answer."""

import asyncio
from collections.abc import Awaitable, Callable

from loraserve.errors import NotFoundError
from loraserve.node.load_info import AdapterLoadInfo
from loraserve.placement.types import AdapterId

# Which revision a name points to (None), or whether a name has the revision. Raises NotFoundError
# or UnavailableError.
Resolver = Callable[[AdapterId, str | None], Awaitable[AdapterLoadInfo]]


class Resolving:
    """Event loop only."""

    def __init__(self, resolve: Resolver | None) -> None:
        """None: there is nobody to ask."""
        self._resolve = resolve
        self._asking: dict[tuple[AdapterId, str | None], asyncio.Task[AdapterLoadInfo]] = {}

    @property
    def can_ask(self) -> bool:
        return self._resolve is not None

    def asks(self, adapter: AdapterId, revision: str | None) -> bool:
        """A name that is being resolved most likely means the revision that is asked for."""
        return (adapter, revision) in self._asking or (adapter, None) in self._asking

    async def resolved(self, adapter: AdapterId, revision: str | None) -> AdapterLoadInfo:
        """Raises NotFoundError, UnavailableError."""
        if self._resolve is None:
            raise NotFoundError("adapter", f"{adapter.name!r} is not on this node")
        key = (adapter, revision)
        asking = self._asking.get(key)
        if asking is None:
            asking = asyncio.ensure_future(self._resolve(adapter, revision))
            self._asking[key] = asking
            asking.add_done_callback(lambda task: self._answered(key, task))
        return await asyncio.shield(asking)

    def _answered(
        self, key: tuple[AdapterId, str | None], task: "asyncio.Task[AdapterLoadInfo]"
    ) -> None:
        del self._asking[key]
        if not task.cancelled():
            task.exception()  # those who wait have it; without them it is nobody's

    async def close(self) -> None:
        tasks = list(self._asking.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
