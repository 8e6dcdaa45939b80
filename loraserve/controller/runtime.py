"""The shell around the core: feeds it events in order, makes its effects happen, keeps time.

Everything here runs in one event loop. `apply` holds a lock from the event to the last effect, so
effects happen in the order in which the core asked for them.
"""

import asyncio
import logging
from collections.abc import AsyncIterator

from loraserve.controller.events import (
    AskRegister,
    AskResidency,
    ComputePlacement,
    Effect,
    Event,
    LinkLost,
    NodeLost,
    NodeRegistered,
    PlacementComputed,
    PublishRoutes,
    SavePlacement,
    SendDrop,
    SendLoad,
    TellOperator,
    Tick,
)
from loraserve.controller.placing import PlacementAnswer, PlacementQuestion, solve
from loraserve.controller.route_log import RouteChanges, RouteLog
from loraserve.controller.state import ControllerState, Settings
from loraserve.controller.store import StateStore
from loraserve.controller.whole import whole
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
        self._placing: asyncio.Task[None] | None = None

    @classmethod
    def start(
        cls,
        store: StateStore,
        settings: Settings,
        policy: PlacementPolicy,
        load: LoadModel | None = None,
    ) -> "Runtime":
        """A new epoch on what the store holds. Raises OSError."""
        epoch = store.begin_epoch()
        histories = [record.history for record in store.adapters()]
        placed = store.placement()
        known = {history[0].adapter for history in histories}
        gone = [adapter for adapter in placed if adapter not in known]
        if gone:  # removed when the controller was killed
            store.save_placement({}, gone)
        state = ControllerState(
            settings,
            policy,
            epoch,
            histories,
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
                        _log.warning("node %s is lost: no heartbeat", node_id)
                        self.close_link(node_id)
                    case AskRegister(node_id):
                        _log.info("node %s must register", node_id)
                    case AskResidency(node_id):
                        _log.info("node %s is to say again what it holds", node_id)
                    case TellOperator(message, trouble):
                        _log.log(logging.WARNING if trouble else logging.INFO, "%s", message)
                    case ComputePlacement(question):
                        self._placing = asyncio.create_task(self._place(question))
            if isinstance(event, NodeRegistered):
                n = event.node
                _log.info("node %s registered at %s, base %s", n.node_id, n.address, n.base)
        if publish:
            async with self._routes_changed:
                self._routes_changed.notify_all()
        return effects

    async def _place(self, question: PlacementQuestion) -> None:
        """In a thread: it may take a second, and heartbeats and routes must not wait for it."""
        try:
            answer = await asyncio.to_thread(solve, question)
        except Exception as error:
            _log.exception("a placement failed")
            answer = PlacementAnswer(question, f"placement failed, all stays where it is: {error}")
        if not self._closing:
            try:
                await self.apply(PlacementComputed(answer))
            except Exception:
                _log.exception("a placement could not be adopted")

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
        _log.info("to %s: %s", command.node_id, _words(command))
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
        if self._placing is not None:
            self._placing.cancel()
            await asyncio.wait({self._placing})
        for node_id in list(self._links):
            self.close_link(node_id)
        async with self._routes_changed:
            self._routes_changed.notify_all()


def _words(command: Command) -> str:
    if isinstance(command, SendLoad):
        return f"load {command.spec.adapter} revision {command.spec.revision[:12]}"
    return f"drop {command.adapter} revision {command.revision[:12]}"
