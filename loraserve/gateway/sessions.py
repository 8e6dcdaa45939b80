"""A client of the cluster for each key that callers bring: the cluster says what each may see."""

import asyncio
from collections import OrderedDict

from loraserve.client import AsyncClient
from loraserve.gateway.access import Caller
from loraserve.security import TlsFiles
from loraserve.text.tokenizer import Tokenizer

# Each costs a watch of routes and a stream to every node in use.
MAX_CLIENTS = 1024


class Sessions:
    """Lives on one event loop."""

    def __init__(
        self,
        controller: str | None,
        nodes: tuple[str, ...] = (),
        tls: TlsFiles | None = None,
        max_clients: int = MAX_CLIENTS,
        own_key: str | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """`own_key`: the gateway's own, whose client stays. `tokenizer`: see AsyncClient."""
        self._tokenizer = tokenizer
        self._own_key = own_key
        self._controller = controller
        self._nodes = nodes
        self._tls = tls
        self._max_clients = max_clients
        # The one used longest ago is first.
        self._clients: OrderedDict[str | None, AsyncClient] = OrderedDict()
        self._users: dict[str | None, int] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def own(self) -> AsyncClient:
        """By which the gateway itself knows of the cluster."""
        return self.client(self._own_key)

    def pages(self) -> tuple[int, int]:
        """Of the nodes, (in use, all), as the client knows that was used last. For any thread."""
        last = next(reversed(list(self._clients.values())), None)
        return last.pages if last else (0, 0)

    def client(self, key: str | None) -> AsyncClient:
        """For the requests of this key; not to be kept. Raises InvalidArgumentError."""
        client = self._clients.get(key)
        if client is None:
            client = self._clients[key] = AsyncClient(
                self._controller,
                nodes=self._nodes,
                api_key=key,
                tls=self._tls,
                multiplex=True,
                tokenizer=self._tokenizer,
            )
            self._make_room()
        self._clients.move_to_end(key)
        return client

    def of(self, caller: Caller) -> AsyncClient:
        return self.client(caller.key)

    def began(self, caller: Caller) -> None:
        """A request of the caller runs: its client stays."""
        self._users[caller.key] = self._users.get(caller.key, 0) + 1

    def ended(self, caller: Caller) -> None:
        self._users[caller.key] -= 1
        if not self._users[caller.key]:
            del self._users[caller.key]

    def _make_room(self) -> None:
        for key in list(self._clients):
            if len(self._clients) <= self._max_clients:
                return
            newest = key == next(reversed(self._clients))
            if key not in self._users and key != self._own_key and not newest:
                closing = asyncio.ensure_future(self._clients.pop(key).close())
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        await asyncio.gather(*(client.close() for client in self._clients.values()))
        await asyncio.gather(*self._closing, return_exceptions=True)
