"""One-sided reads between host pools: the sidecar program, as a node sees it."""

from loraserve.node.transfer.sidecar import Timing, TransferInfo, TransferSidecar

__all__ = ["Timing", "TransferInfo", "TransferSidecar"]
