"""PrefixCache against a dictionary: nothing in use is evicted, nothing found that was not put."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loraserve._testing import BlockPool, EvictionOrder, PageArena, PageUse, PrefixCache

PAGES = 24
PER_BLOCK = 2
SIZE = 2


class PrefixCacheMachine(RuleBasedStateMachine):
    """Sequences as the scheduler makes them: they use every node on their path."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = PageArena(4096, PAGES)
        self.pool = BlockPool(self.arena, PER_BLOCK)
        self.cache = PrefixCache(self.pool, EvictionOrder(), SIZE)
        self.clock = 0
        self.sequences: list[tuple[str, list[int], list[int]]] = []  # namespace, tokens, path
        self.blocks: dict[tuple[str, tuple[int, ...]], int] = {}

    @rule(name=st.sampled_from(["", "a"]), tokens=st.lists(st.integers(0, 1), max_size=6))
    def start(self, name: str, tokens: list[int]) -> None:
        node = self.cache.root(name)
        self.cache.use(node)
        path = [node]
        for at in range(0, len(tokens) - SIZE + 1, SIZE):
            key = (name, tuple(tokens[: at + SIZE]))
            found = self.cache.find(node, tokens[at : at + SIZE])
            assert (found != PrefixCache.NONE) == (key in self.blocks)
            if found == PrefixCache.NONE:
                block = self.pool.allocate()
                if block is None:
                    break
                found = self.cache.insert(node, tokens[at : at + SIZE], block)
                self.blocks[key] = block
            else:
                assert self.cache.block(found) == self.blocks[key]
                self.cache.use(found)
            path.append(found)
            node = found
        self.sequences.append((name, tokens, path))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.sequences) - 1))
        self.clock += 1
        for node in reversed(self.sequences.pop(index)[2]):
            self.cache.release(node, self.clock)

    @precondition(lambda self: self.cache.may_evict())
    @rule()
    def evict(self) -> None:
        self.cache.evict()
        in_use = {
            (name, tuple(tokens[: SIZE * depth]))
            for name, tokens, path in self.sequences
            for depth in range(1, len(path))
        }
        gone = []
        for key in self.blocks:
            node = self.cache.root(key[0])
            for at in range(0, len(key[1]), SIZE):
                node = self.cache.find(node, list(key[1][at : at + SIZE]))
                if node == PrefixCache.NONE:
                    break
            if node == PrefixCache.NONE:
                gone.append(key)
        assert len(gone) == 1
        assert gone[0] not in in_use
        del self.blocks[gone[0]]

    @invariant()
    def pages_are_the_nodes(self) -> None:
        assert self.arena.count(PageUse.KV) == PER_BLOCK * len(self.blocks)

    @invariant()
    def everything_idle_can_be_evicted(self) -> None:
        used = {
            (name, tuple(tokens[: SIZE * depth]))
            for name, tokens, path in self.sequences
            for depth in range(1, len(path))
        }
        assert self.cache.evictable() == len(self.blocks.keys() - used)


TestPrefixCache = PrefixCacheMachine.TestCase
TestPrefixCache.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
