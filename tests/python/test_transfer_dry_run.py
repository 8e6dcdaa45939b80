"""What the doctor proves of transports, here and between machines."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transfer_site import require_sidecar, run

from loraserve.errors import InvalidArgumentError
from loraserve.node import doctor
from loraserve.node.transfer import facts, sidecar
from loraserve.node.transfer.dry_run import Holder, from_line, read_offer, to_line


def test_an_offer_is_read_and_verified_over_a_line_of_text() -> None:
    async def test() -> None:
        sizes = (1000, 100_000)
        holder = await Holder.start(sizes)
        try:
            offered, machine = from_line(to_line(await holder.offer(sizes)))
            assert "cpu" in machine
            info, reads = await read_offer(offered)
            assert [read.size_bytes for read in reads] == list(sizes)
            assert all(read.seconds > 0 for read in reads)
            assert info.transports
            holder.arena.view(100, 1)[0] ^= 1
            with pytest.raises(InvalidArgumentError, match="not those offered"):
                await read_offer(offered)
        finally:
            await holder.close()

    run(test)


GOOD: dict[str, Any] = {
    "loraserve_offer": 1,
    "machine": {},
    "slots": [
        {
            "slot": {
                "ucx_version": "1.21.0",
                "address": 1,
                "header_bytes": 64,
                "generation": 1,
                "host": "h",
                "worker_address": "",
                "rkey": "",
            },
            "size_bytes": 1,
            "xxh3_128": "",
        }
    ],
}


def test_what_is_no_offer_is_refused() -> None:
    assert len(from_line(json.dumps(GOOD))[0]) == 1
    slot = GOOD["slots"][0]
    for line in (
        "",
        "nothing to offer",
        "[]",
        "{}",
        "[" * 100_000,
        json.dumps(GOOD | {"loraserve_offer": 2}),
        json.dumps(GOOD | {"slots": []}),
        json.dumps(GOOD | {"slots": [slot | {"size_bytes": 0}]}),
        json.dumps(GOOD | {"slots": [slot | {"size_bytes": 1 << 40}]}),
        json.dumps(GOOD | {"slots": [slot | {"slot": slot["slot"] | {"rkey": "%"}}]}),
        json.dumps(GOOD | {"slots": [slot | {"slot": slot["slot"] | {"address": -1}}]}),
        json.dumps(GOOD | {"slots": [slot | {"slot": slot["slot"] | {"more": 1}}]}),
    ):
        with pytest.raises(InvalidArgumentError):
            from_line(line)


def test_two_doctors_read_from_each_other_through_a_pipe() -> None:
    require_sidecar()
    words = [sys.executable, "-m", "loraserve.cli", "node", "doctor"]
    offering = subprocess.Popen([*words, "--offer"], stdout=subprocess.PIPE)
    done = subprocess.run(
        [*words, "--read-from", "-"], stdin=offering.stdout, capture_output=True, timeout=120
    )
    assert offering.stdout is not None
    offering.stdout.close()
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [read["size_bytes"] for read in result["reads"]] == [1 << 16, 1 << 20, 1 << 24, 1 << 26]
    assert result["same_host"] is True
    assert offering.wait(60) == 0


def test_the_doctor_says_what_it_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    require_sidecar()
    check = doctor._transport()
    assert check.ok is True
    assert "16 MiB read between two sidecars" in check.detail
    monkeypatch.setattr(sidecar, "find_program", lambda: None)
    check = doctor._transport()
    assert check.ok is None
    assert check.detail.startswith("gRPC streams alone: transfer: loraserve-transfer is not")


def test_what_is_missing_is_named() -> None:
    missing = facts.gpudirect_missing()
    assert set(facts.rdma_missing()) <= set(missing)
    assert Path("/proc/driver/nvidia/gpus").is_dir() or "no NVIDIA GPU" in missing
    assert facts.rdma_devices() or "no RDMA device" in facts.rdma_missing()[0]
    assert isinstance(facts.shared_huge_pages(), bool)
