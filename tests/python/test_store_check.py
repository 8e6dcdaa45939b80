"""A node whose --store is not the controller's says so at its start."""

import threading
from pathlib import Path
from typing import Any

import pytest
from controller_fixtures import FakeNode, controller
from fake_node import BASE, FakeEngine, blob, serving, until
from node_calls import answers, run

from loraserve.checkpoint.durable_store import MARK, DurableStore
from loraserve.controller import server as controller_server
from loraserve.controller.admission import PackedCheck
from loraserve.errors import InvalidArgumentError


@pytest.mark.parametrize("url", ["{}/store", "memory://marks-{}"])
def test_the_mark_of_a_store_is_the_same_for_all_who_reach_it(tmp_path: Path, url: str) -> None:
    one, same = DurableStore(url.format(tmp_path)), DurableStore(url.format(tmp_path), make=False)
    assert same.mark() == ""
    mark = one.make_mark()
    assert len(mark) == 32
    assert {one.make_mark(), one.mark(), same.mark()} == {mark}
    assert DurableStore(url.format(tmp_path / "other")).make_mark() != mark


def test_a_mark_that_is_none_is_made_again(tmp_path: Path) -> None:
    (tmp_path / MARK).write_bytes(b"\xff half")
    store = DurableStore(str(tmp_path))
    assert store.mark() == ""
    assert store.make_mark() == store.mark() != ""


def test_who_reads_makes_no_directory(tmp_path: Path) -> None:
    store = DurableStore(str(tmp_path / "none"), make=False)
    assert store.mark() == ""
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidArgumentError, match=r"^store: .*/file: is no directory"):
        DurableStore(str(tmp_path / "file"), make=False)


@pytest.mark.parametrize(
    ("store", "told"),
    [
        ("data/adapters", None),
        ("elsewhere", "does not exist on this machine"),
        ("other", "is not the controller's store"),
        ("marked", "is not the controller's store"),
    ],
)
def test_a_node_tells_of_another_store_and_serves_all_the_same(
    tmp_path: Path, caplog: Any, store: str, told: str | None
) -> None:
    (tmp_path / "other").mkdir()
    DurableStore(str(tmp_path / "marked")).make_mark()

    async def test() -> None:
        async with controller(tmp_path, new_check=PackedCheck) as site:
            given = {
                "controller": site.server.address,
                "controller_key": site.keys["node"],
                "keys": tmp_path / "keys.jsonl",
            }
            async with serving(FakeEngine(), tmp_path / store, **given) as (server, channel):
                assert server._checking is not None
                await server._checking
                lines = [line for line in caplog.messages if line.startswith("--store")]
                if told is None:
                    assert lines == []
                else:
                    assert lines == [
                        f"--store {tmp_path / store} {told}: "
                        "adapters come over the controller instead"
                    ]
                await site.create("sql", blob("a"), base=BASE)
                acme = site.auth("acme")
                await until(lambda: bool(server.node.adapters.residency()), "placed")
                assert await answers(channel, adapter={"name": "sql"}, metadata=acme)

    run(test)


def test_a_store_that_hangs_keeps_no_controller_from_serving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, marks = threading.Event(), []

    def hang(_: DurableStore) -> str:
        go_on.wait(60)
        marks.append("a" * 32)
        return marks[0]

    monkeypatch.setattr(DurableStore, "make_mark", hang)
    monkeypatch.setattr(controller_server, "MARK_WAIT_S", 0.01)

    async def test() -> None:
        async with controller(tmp_path, new_check=PackedCheck) as site:
            async with FakeNode(site, "n1"):
                assert marks == []
            go_on.set()
            await until(lambda: site.server._store_mark != "", "it is there in the end")

    run(test)
