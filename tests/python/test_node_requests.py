"""The requests that a node counts as its load."""

import asyncio

from loraserve.node.limits import Limits
from loraserve.node.requests import LiveRequests


def test_the_ranks_of_all_requests_are_told_until_they_end() -> None:
    async def test() -> None:
        requests = LiveRequests(Limits())
        assert requests.ranks() == (0, 0)
        low, high = requests.add("t", "low", 1), requests.add("t", "high", 1)
        low.rank, high.rank = 8, 64
        assert requests.ranks() == (72, 64)
        # An attempt that another has replaced runs until it has ended.
        requests.add("t", "high", 2).rank = 64
        assert requests.ranks() == (136, 64)
        requests.remove(high)
        assert requests.ranks() == (72, 64)

    asyncio.run(test())
