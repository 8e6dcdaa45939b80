"""Whether the node's durable store is the controller's: told once, when the two first meet."""

import logging

from loraserve.checkpoint.durable_store import DurableStore
from loraserve.node.blocking import BlockingCalls
from loraserve.node.heartbeat import ControllerLink

_log = logging.getLogger(__name__)


async def check_store(store: DurableStore, link: ControllerLink) -> None:
    """Warns where it is not: the node then serves all the same, but the controller carries the
    bytes of every adapter. Waits for the first registration."""
    await link.registered.wait()
    if not link.store_mark:  # an older controller, or a store that takes no mark
        return
    try:
        ours = await BlockingCalls("store", 1).run(store.mark)
    except Exception as error:  # a file system's driver raises what it likes
        wrong = f"cannot be read: {error}"
    else:
        if ours == link.store_mark:
            return
        wrong = "is not the controller's store"
        if store.directory is not None and not store.directory.is_dir():
            wrong = "does not exist on this machine"
    _log.warning("--store %s %s: adapters come over the controller instead", store.url, wrong)
