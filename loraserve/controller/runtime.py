"""The shell around the core: feeds it events in order, makes its effects happen, keeps time.

Everything here runs in one event loop. `apply` holds a lock from the event to the last effect, so
effects happen in the order in which the core asked for them.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence

from loraserve.controller.events import (
    AskRegister,
    AskResidency,
    ComputePlacement,
    Effect,
    Event,
    LinkLost,
    NodeLost,
    NodeRegistered,
    PlacementFailed,
    PublishRoutes,
    SavePlacement,
    SendDrop,
    SendLoad,
    TellOperator,
    Tick,
)
from loraserve.controller.placing import PlacementQuestion
from loraserve.controller.route_log import RouteChanges, RouteLog
from loraserve.controller.solving import Solving
from loraserve.controller.state import ControllerState, Settings
from loraserve.controller.store import AdapterRecord, StateStore
from loraserve.controller.whole import whole
from loraserve.logs import about
from loraserve.placement.load import LoadModel
from loraserve.placement.types import PlacementPolicy

_log = logging.getLogger(__name__)

Command = SendLoad | SendDrop


class NodeLink:
    """The way to one node: commands that wait for its heartbeat stream. At most one per node is
    open; a new one closes the one before."""

    def __init__(self, node_id: str) -> None:
        self.node_id = node_id
        self.must_register = False
        self.send_everything = False
        self.closed = False
        self._commands: list[Command] = []
        self._beats = 0
        self._wake = asyncio.Event()

    def send(self, command: Command) -> None:
        self._commands.append(command)
        self._wake.set()

    def answer_beat(self, must_register: bool, send_everything: bool = False) -> None:
        """Makes `messages` yield even without commands: nodes take an answer for a sign of life."""
        self._beats += 1
        self.must_register = must_register
        self.send_everything = self.send_everything or send_everything
        self._wake.set()

    def close(self) -> None:
        self.closed = True
        self._wake.set()

    async def messages(self) -> AsyncIterator[list[Command]]:
        """Commands as they come, in batches; ends when the link is closed."""
        while not self.closed:
            await self._wake.wait()
            self._wake.clear()
            if self._commands or self._beats:
                commands, self._commands, self._beats = self._commands, [], 0
                yield commands


class Runtime:
    """Owns the core, and the ways to nodes and watchers."""

    def __init__(self, state: ControllerState, store: StateStore, settings: Settings) -> None:
        self.state = state
        self.store = store
        self.settings = settings
        self._lock = asyncio.Lock()
        self._links: dict[str, NodeLink] = {}
        self._routes_changed = asyncio.Condition()
        self._log_of_routes = RouteLog()
        self._closing = False
        self._solving = Solving()
        self._placing: set[asyncio.Task[None]] = set()
        # Commands since the start, and loads of adapters that another node served already.
        self.loads_sent = self.drops_sent = self.migrations = 0

    @classmethod
    def start(
        cls,
        store: StateStore,
        records: Sequence[AdapterRecord],
        settings: Settings,
        policy: PlacementPolicy,
        load: LoadModel | None = None,
    ) -> "Runtime":
        """A new epoch on what the store holds; `records`: its adapters. Raises OSError."""
        epoch = store.begin_epoch()
        histories = {record.adapter: record.history for record in records}
        placed = store.placement()
        gone = [adapter for adapter in placed if adapter not in histories]
        if gone:  # removed when the controller was killed
            store.save_placement({}, gone)
        state = ControllerState(
            settings,
            policy,
            epoch,
            histories.values(),
            {a: tuple(nodes) for a, nodes in placed.items()},
            {a: tuple(nodes.values()) for a, nodes in placed.items()},
            load,
            defers_placement=True,
        )
        _log.info("epoch %d: %d adapters in the registry", epoch, len(histories))
        return cls(state, store, settings)

    async def apply(self, event: Event) -> list[Effect]:
        """Takes one event, carries its effects out, all of them even if the caller is cancelled.
        Raises what `ControllerState.step` raises."""
        return await whole(self._apply(event))

    async def _apply(self, event: Event) -> list[Effect]:
        async with self._lock:
            waited = self.state.settling
            effects = self.state.step(event)
            # Watchers from before the restart wait for it.
            publish = waited and not self.state.settling
            for effect in effects:
                match effect:
                    case SavePlacement():
                        await self._save(effect)
                    case SendLoad() | SendDrop():
                        self._send(effect)
                    case PublishRoutes(version, delta):
                        self._log_of_routes.add(version, delta)
                        publish = True
                    case NodeLost(node_id):
                        _log.warning(
                            "node %s is lost: no heartbeat", node_id, extra=about(node=node_id)
                        )
                        self.close_link(node_id)
                    case AskRegister(node_id):
                        _log.info("node %s must register", node_id, extra=about(node=node_id))
                    case AskResidency(node_id):
                        _log.info("node %s is to say again what it holds", node_id)
                    case TellOperator(message, trouble):
                        _log.log(logging.WARNING if trouble else logging.INFO, "%s", message)
                    case ComputePlacement(question):
                        placing = asyncio.create_task(self._place(question))
                        self._placing.add(placing)
                        placing.add_done_callback(self._placing.discard)
            if isinstance(event, NodeRegistered):
                n = event.node
                _log.info(
                    "node %s registered at %s, base %s",
                    *(n.node_id, n.address, n.base),
                    extra=about(node=n.node_id),
                )
        if publish:
            async with self._routes_changed:
                self._routes_changed.notify_all()
        return effects

    async def _place(self, question: PlacementQuestion) -> None:
        """In a thread: it may take a second, and heartbeats and routes must not wait for it."""
        answer = await self._solving.answer(question)
        if self._closing:
            return
        try:
            await self.apply(answer)
        except Exception as error:
            _log.exception("a placement could not be adopted")
            await self.apply(PlacementFailed(question, f"it could not be adopted: {error}"))

    async def _save(self, saved: SavePlacement) -> None:
        placed = {
            adapter: dict(zip(nodes, saved.shares[adapter], strict=True))
            for adapter, nodes in saved.holders.items()
        }
        try:
            await asyncio.to_thread(self.store.save_placement, placed, saved.removed)
        except OSError as error:
            # Serving goes on: the placement is a wish that the next start would only repeat.
            _log.error("the placement could not be saved: %s", error)

    def _send(self, command: Command) -> None:
        if isinstance(command, SendLoad):
            self.loads_sent += 1
            route = self.state.routes.adapters.get(command.spec.adapter)
            revision = command.spec.revision
            self.migrations += route is not None and any(
                served.revision == revision for served in route.revisions
            )
        else:
            self.drops_sent += 1
        loads = isinstance(command, SendLoad)
        adapter, revision = (
            (command.spec.adapter, command.spec.revision)
            if isinstance(command, SendLoad)
            else (command.adapter, command.revision)
        )
        _log.info(
            "to %s: %s %s revision %s",
            *(command.node_id, "load" if loads else "drop", adapter, revision[:12]),
            extra=about(node=command.node_id, adapter=str(adapter), revision=revision),
        )
        link = self._links.get(command.node_id)
        if link is not None:  # else the core sends it again
            link.send(command)

    def open_link(self, node_id: str) -> NodeLink:
        self.close_link(node_id)
        link = NodeLink(node_id)
        self._links[node_id] = link
        return link

    def close_link(self, node_id: str, link: NodeLink | None = None) -> bool:
        """Closes the node's link; only `link` where it is given. Whether it was open."""
        known = self._links.get(node_id)
        if known is None or (link is not None and known is not link):
            return False
        known.close()
        del self._links[node_id]
        return True

    async def link_ended(self, link: NodeLink, incarnation: int) -> None:
        """The stream of the link is gone; nothing where another has taken its place."""
        if self.close_link(link.node_id, link) and not self._closing:
            await self.apply(LinkLost(link.node_id, incarnation))

    async def route_changes(self, known: tuple[int, int]) -> AsyncIterator[RouteChanges]:
        """What a watcher that has (epoch, version) `known` must hear, now and after every change; a
        slow one hears several versions at once. Ends when the controller closes.

        One that has routes of an earlier epoch keeps them until the nodes have had time to say what
        they hold: a table without holders would stop what still works."""
        epoch, seen = known
        first = True
        while True:
            async with self._routes_changed:
                while not self._closing and (
                    self._withheld(epoch) or (not first and self.state.routes.version == seen)
                ):
                    await self._routes_changed.wait()
                if self._closing:
                    return
                table = self.state.routes
            delta = self._log_of_routes.since(seen) if epoch == table.epoch else None
            first, seen, epoch = False, table.version, table.epoch
            yield RouteChanges(table, delta)

    def _withheld(self, known_epoch: int) -> bool:
        return 0 < known_epoch < self.state.epoch and self.state.settling

    async def run(self) -> None:
        """Ticks until cancelled. Late ticks are not made up for: a controller that was stopped for
        a minute must not take every node for lost at once."""
        while True:
            await asyncio.sleep(self.settings.tick_seconds)
            try:
                await self.apply(Tick())
            except Exception:
                _log.exception("a tick failed")

    async def close(self) -> None:
        """Ends the streams of nodes and watchers. A placement that is being made is left to its
        thread; one that is being adopted is waited for."""
        self._closing = True
        placing = set(self._placing)
        for task in placing:
            task.cancel()
        if placing:
            await asyncio.wait(placing)
        for node_id in list(self._links):
            self.close_link(node_id)
        async with self._routes_changed:
            self._routes_changed.notify_all()
