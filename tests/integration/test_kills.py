"""Streams whose nodes are killed: 64 of them go on elsewhere, token by token."""

import asyncio
from pathlib import Path

import pytest
from kill_run import ADAPTERS, CONTROLLER_OPTIONS, NODES, KillRun, Report, cases
from served_cluster import running

from loraserve import AsyncClient
from loraserve.client.retry import RetryPolicy

STREAMS = 64
MAX_TOKENS = 120
MOST_ATTEMPTS = RetryPolicy().most_attempts
# Only against hangs; bench/resume_gaps.py measures.
LONGEST_GAP_S = 60.0


def kill_nodes(directory: Path, kills: int) -> Report:
    with running(
        directory, nodes=NODES, skills=ADAPTERS, controller_options=CONTROLLER_OPTIONS
    ) as (cluster, _):

        async def run() -> Report:
            async with AsyncClient(cluster.address) as client:
                run = KillRun(cluster, client, cases(STREAMS, MAX_TOKENS))
                await run.undisturbed()
                return await run.disturbed(kills)

        return asyncio.run(run())


@pytest.mark.parametrize("kills", [4, pytest.param(100, marks=pytest.mark.long)])
def test_no_token_is_lost_or_doubled_however_many_nodes_are_killed(
    tmp_path: Path, kills: int
) -> None:
    report = kill_nodes(tmp_path, kills)
    assert report.kills == kills
    assert (report.lost, report.doubled, report.wrong) == (0, 0, [])
    assert max(report.attempts) <= MOST_ATTEMPTS, report.attempts
    # Killed nodes had work: a third of the streams, were it spread evenly; what had no token yet is
    # no gap.
    assert len(report.gaps) >= 2 * kills
    assert max(gap.whole for gap in report.gaps) < LONGEST_GAP_S
