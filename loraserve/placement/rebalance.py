"""Relieves the busiest nodes of a plan, one after the other, with as few bytes as it can.

First shares shift between copies that exist, which moves nothing; then copies move, or are split,
to the node where they fit best: one that stays under the goal and serves the nearest rank already.
On an engine that pads, adapters that alone make a node's rank high go first.
"""

from dataclasses import dataclass

import numpy as np

from loraserve.placement.arrays import Floats, Ints
from loraserve.placement.columns import Columns, Entries
from loraserve.placement.ledger import GONE, Ledger
from loraserve.placement.operating_point import MAX_RANK

# Pieces below this utilisation are not worth a copy.
LEAST_PIECE = 0.002
# Nor, of the goal, worth another share of copies that are there.
LEAST_SHIFT = 0.001
# Of one node, the entries looked at for shifting shares.
SHIFTS = 48
# Copies of one node, one after the other, that find no target before it is left as it is.
FAILURES = 16
# Looks for a target, about 40 us each, in one call, and what looking at a node counts as: they
# bound the time where limits are in the way.
ATTEMPTS = 6000
NODE_ATTEMPTS = 10
# Of a node that is stuck: the part of its load that it gives to nodes less busy, and how often.
CHAIN_STEP = 0.02
CHAINS = 64
# A stuck node this little over the aim is let be.
ENOUGH = 1.005
# Copies that are looked at to make room for one.
CLEARED = 12
# An adapter rank with less than this part of a node's tokens is a stray there.
STRAY_PART = 0.25


@dataclass(frozen=True)
class Aim:
    """Nodes over `above` are brought down to `to`; `bytes_left` may be copied, None: any."""

    above: float
    to: float
    bytes_left: int | None = None


def rebalance(p: Columns, entries: Entries, aim: Aim) -> Entries:
    """The relieved plan, or `entries` where limits leave no way to lower the peak.

    Where a node cannot give to any node under the goal, it gives a little to nodes less busy than
    itself, which pass it on: chains that limits on pairs of nodes and adapters make necessary."""
    ledger = Ledger(p, entries)
    work = _Relief(ledger, aim)
    stuck = np.zeros(p.nodes, np.bool_)
    chains, progress, enough = CHAINS, False, aim.above * ENOUGH
    while work.attempts > 0:
        hot = int(np.argmax(np.where(stuck, -1.0, ledger.load)))
        if stuck[hot] or ledger.load[hot] <= aim.above * (1 + 1e-9):
            # The others may have made room for those that were stuck.
            if not progress or ledger.load.max() <= enough:
                break
            stuck[:], progress = False, False
            continue
        if work.relieve(hot, aim.to):
            progress = True
            continue
        now = float(ledger.load[hot])
        if now >= ledger.load.max() and now > enough and chains > 0:
            chains -= 1
            if work.relieve(hot, max(aim.to, now * (1 - CHAIN_STEP))):
                progress = True
                continue
        stuck[hot] = True
    return ledger.entries()


class _Relief:
    def __init__(self, ledger: Ledger, aim: Aim) -> None:
        self.book, self.p = ledger, ledger.p
        self.bytes_left = aim.bytes_left
        self.attempts = ATTEMPTS

    def relieve(self, hot: int, goal: float) -> bool:
        """Whether the node is at the goal, or at least much nearer to it."""
        before = float(self.book.load[hot])
        self.attempts -= NODE_ATTEMPTS
        self._shift(hot, goal)
        if self.book.load[hot] > goal * (1 + 1e-9):
            self._move(hot, goal)
        after = float(self.book.load[hot])
        return after <= goal * (1 + 1e-6) or after < before - 0.25 * (before - goal)

    def _charges(self, node: int, features: Floats) -> Floats:
        weights = self.book.weights[min(int(self.book.ranks[node]), MAX_RANK)]
        return np.asarray((features * weights).sum(axis=1) / self.p.capacity[node])

    def _shift(self, hot: int, goal: float) -> None:
        """To other copies of the node's adapters."""
        book, p = self.book, self.p
        e, adapter, _, features = book.serving(hot)
        charge = self._charges(hot, features)
        least = LEAST_SHIFT * min(1.0, goal)
        limit = goal - least
        may_shift, partner = book.partners(e, adapter, limit)
        able = np.flatnonzero(may_shift & (charge > least))
        order = able[np.argsort(-charge[able], kind="stable")][:SHIFTS]
        numbers = (e[order].tolist(), adapter[order].tolist(), partner[order].tolist())
        for entry, a, other in zip(*numbers, strict=True):
            others = [
                (book.load_of(n), x)
                for x in (book.copies(a) if other < 0 else (other,))
                # A copy that would raise its node's rank would slow the whole node.
                if book.load_of(n := book.node_of(x)) < limit
                and not (p.load.padded and book.ranks[n] < p.rank[a])
            ]
            for _, to in sorted(others):
                self._shift_one(entry, a, to, goal)
                # A smaller excess is no piece that is worth a shift.
                if book.load_of(hot) - goal < least:
                    return

    def _shift_one(self, e: int, a: int, to: int, goal: float) -> None:
        book = self.book
        source, target, share = book.node_of(e), book.node_of(to), book.share_of(e)
        slack, excess = goal - book.load_of(target), book.load_of(source) - goal
        if slack <= 1e-6 or share <= 0:
            return
        here, there = book.pieces(a, share, source, target)
        part = min(1.0, slack / max(there, 1e-12), excess / max(here, 1e-12))
        if part * here < LEAST_SHIFT * min(1.0, goal):
            return
        book.set_share(to, max(book.share_of(to), 0.0) + share * part)
        spare = part >= 1 and book.copy_count[a] > self.p.replicas
        book.set_share(e, share * (1 - part) if part < 1 else 0.0)
        if spare:
            self._drop_if_spare(e)

    def _drop_if_spare(self, e: int) -> None:
        """Drops an idle copy that replicas do not need."""
        book, p = self.book, self.p
        if book.copy_count[book.adapter_of(e)] <= p.replicas:
            return
        rest = [book.node_of(x) for x in book.copies(book.adapter_of(e)) if x != e]
        domains = len({int(p.domain[n]) for n in rest})
        held = len({int(p.domain[n]) for n in [*rest, book.node_of(e)]})
        if domains >= min(p.replicas, held):
            book.set_share(e, GONE)

    def _move(self, hot: int, goal: float) -> None:
        """To nodes that have no copy yet."""
        book, p = self.book, self.p
        e, adapter, share, features = book.serving(hot)
        charge = self._charges(hot, features)
        failures = 0
        for i in self._order(hot, goal, adapter, share, charge).tolist():
            if book.load[hot] <= goal * (1 + 1e-9):
                return
            size = int(p.size_bytes[adapter[i]])
            if charge[i] < LEAST_PIECE / 8:
                continue
            if not self._pays(size) or book.share_of(int(e[i])) <= 0:
                continue
            if self._move_one(int(e[i]), features[i], float(charge[i]), goal):
                self._pay(size)
                failures = 0
                continue
            failures += 1
            if failures >= FAILURES or self.attempts <= 0:
                return

    def _order(self, hot: int, goal: float, adapter: Ints, share: Floats, charge: Floats) -> Ints:
        """Most relief for a byte first."""
        p = self.p
        excess = float(self.book.load[hot]) - goal
        size = np.maximum(p.size_bytes[adapter], 1)
        worth = np.minimum(charge, excess) / size
        # Pieces that fit the excess as a whole before those that must be split.
        order = np.lexsort((-worth, charge > 1.2 * excess))
        if len(order) and worth[order[0]] * 4 < worth.max():
            order = np.argsort(-worth, kind="stable")
        if not p.load.padded or not len(order):
            return order
        tokens = (p.prefill + p.decode)[adapter] * share
        rank = p.rank[adapter]
        stray = tokens[rank == rank.max()].sum() < STRAY_PART * tokens.sum()
        far = -rank if stray else rank
        return order[np.argsort(far[order], kind="stable")]

    def _move_one(self, e: int, features: Floats, charge: float, goal: float) -> bool:
        book, p = self.book, self.p
        self.attempts -= 1
        a, hot, share = book.adapter_of(e), book.node_of(e), book.share_of(e)
        excess = float(book.load[hot]) - goal
        whole = charge <= 1.2 * excess or charge < 4 * LEAST_PIECE
        others = [book.node_of(x) for x in book.copies(a) if x != e]
        stay = [*others, hot] if not whole or p.replicas == 1 else others
        part = 1.0 if whole else excess / charge
        after = book.added_load(a, features * part)
        after[hot] = np.inf
        n = self._target(a, after, stay, goal)
        if n < 0:
            return False
        if after[n] > goal:  # no node takes all of it: this one takes what it has room for
            slack = goal - float(book.load[n])
            part *= min(1.0, slack / max(float(after[n] - book.load[n]), 1e-12))
            if slack <= 0 or part * charge < LEAST_PIECE:
                return False
        book.add(a, n, share * part)
        book.set_share(e, share * (1 - part) if part < 1 else 0.0)
        if part >= 1:
            self._drop_if_spare(e)
        return True

    def _target(self, a: int, after: Floats, stay: list[int], goal: float) -> int:
        """The node that takes the adapter's copy; -1 where none can. Memory is made where only
        that is missing."""
        book, p = self.book, self.p
        may = book.may_take(a, stay)
        good = np.flatnonzero(may & (after <= goal))
        if len(good):
            far = np.abs(book.ranks[good] - p.rank[a]) / MAX_RANK
            return int(good[np.argmin(far + 1e-3 * after[good])])
        score = np.where(may, after, np.inf)
        n = int(np.argmin(score))
        wanted = book.may_take(a, stay, p.memory) & (after < np.inf)
        wanted &= (book.load < goal - LEAST_PIECE) & (book.free < p.size_bytes[a])
        limit = (goal + float(book.load.max())) / 2
        for t in np.argsort(np.where(wanted, after, np.inf), kind="stable")[:2].tolist():
            if (
                wanted[t]
                and after[t] < after[n] * 0.98
                and self._clear(t, a, float(after[t] - book.load[t]), limit)
            ):
                return int(t)
        return n if bool(score[n] < np.inf) else -1

    def _clear(self, node: int, a: int, gain: float, limit: float) -> bool:
        """Moves adapters with many bytes for their load off the node, to make room for `a`, that
        brings `gain`; no node goes over `limit` by that."""
        book, p = self.book, self.p
        e, adapter, share = book.held(node)
        features = p.charges.features(adapter, share)
        charge = self._charges(node, features)
        order = np.argsort(charge / np.maximum(p.size_bytes[adapter], 1), kind="stable")
        for i in order[:CLEARED].tolist():
            if book.free[node] >= p.size_bytes[a]:
                break
            size = int(p.size_bytes[adapter[i]])
            if adapter[i] == a or charge[i] > gain / 2 or not self._pays(size):
                continue
            others = [book.node_of(x) for x in book.copies(int(adapter[i])) if x != e[i]]
            allowed = book.may_take(int(adapter[i]), others)
            allowed &= book.added_load(int(adapter[i]), features[i]) <= limit
            allowed[node] = False
            if not allowed.any():
                continue
            to = int(np.argmax(np.where(allowed, book.free, -1)))
            book.add(int(adapter[i]), to, float(share[i]))
            book.set_share(int(e[i]), GONE)
            self._pay(size)
        return bool(book.free[node] >= p.size_bytes[a])

    def _pays(self, size: int) -> bool:
        return self.bytes_left is None or size <= self.bytes_left

    def _pay(self, size: int) -> None:
        if self.bytes_left is not None:
            self.bytes_left -= size
