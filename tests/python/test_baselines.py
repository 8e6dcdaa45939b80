"""What each baseline promises, where no limit is in the way."""

from dataclasses import replace

import numpy as np
from placement_makers import problem

from loraserve.placement.policies import COLUMN_POLICIES


def test_hash_moves_only_what_a_lost_node_held() -> None:
    p = problem(400, 10)
    cut = {name: getattr(p, name)[:9] for name in ("memory", "max_rank", "domain", "speed")}
    fewer = replace(p, **cut, node_ids=p.node_ids[:9], node_base=p.node_base[:9])
    before = COLUMN_POLICIES["hash"](p).entries.node
    after = COLUMN_POLICIES["hash"](fewer).entries.node
    assert np.array_equal(before[before != 9], after[before != 9])
    assert np.bincount(before).min() > 20


def test_hash_replicas_share_equally_on_different_nodes() -> None:
    plan = COLUMN_POLICIES["hash"](problem(100, 6, replicas=3))
    assert plan.entries.counts(100).tolist() == [3] * 100
    assert np.allclose(plan.entries.share, 1 / 3)


def test_random_goes_by_the_id_alone() -> None:
    p = problem(300, 8)
    first = COLUMN_POLICIES["random"](p).entries.node
    turned = replace(p, adapter_ids=p.adapter_ids[::-1])
    assert np.array_equal(COLUMN_POLICIES["random"](turned).entries.node, first[::-1])
    counts = np.bincount(first, minlength=8)
    assert 15 < counts.min() < counts.max() < 65


def test_contiguous_has_equal_counts_in_order() -> None:
    node = COLUMN_POLICIES["contiguous"](problem(80, 8)).entries.node
    assert np.array_equal(node, np.repeat(np.arange(8), 10))


def test_load_only_balances_tokens_and_not_work() -> None:
    p = problem(400, 8, 3)
    entries = COLUMN_POLICIES["load_only"](p).entries
    tokens = np.bincount(entries.node, (p.prefill + p.decode)[entries.adapter] * entries.share)
    assert tokens.max() < 1.05 * tokens.mean()


def test_request_level_holds_everything_everywhere_that_fits() -> None:
    p = problem(50, 4, slack=8.0)
    entries = COLUMN_POLICIES["request_level"](p).entries
    assert len(entries) == 200
    assert np.allclose(entries.share, 0.25)
    tight = replace(p, memory=p.memory // 8)
    some = COLUMN_POLICIES["request_level"](tight)
    assert not some.reasons
    assert 50 < len(some.entries) < 200
