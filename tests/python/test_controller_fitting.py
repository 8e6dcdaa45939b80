"""What no node of a base could ever serve is not admitted, and leaves nothing behind."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from controller_fixtures import FakeNode, Site, play, refused

from loraserve.checkpoint.adapter_source import AdapterModule, AdapterSource
from loraserve.checkpoint.model_shape import ModelShape
from loraserve.checkpoint.packed_adapter import pack, parse_packed
from loraserve.controller.admission import PackedCheck, PackedFacts
from loraserve.controller.events import NodeRecord
from loraserve.controller.fitting import check_fits, check_room
from loraserve.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError
from loraserve.v1 import common_pb2

SHAPE = ModelShape(num_layers=4, hidden_size=16, q_size=24, kv_size=8, intermediate_size=32)
# Of every module what it takes and gives.
FITTING = {
    "q_proj": (16, 24),
    "k_proj": (16, 8),
    "v_proj": (16, 8),
    "o_proj": (24, 16),
    "gate_proj": (16, 32),
    "up_proj": (16, 32),
    "down_proj": (32, 16),
}


def packed(features: dict[str, tuple[int, int]], layer: int = 3, rank: int = 2) -> bytes:
    modules = [
        AdapterModule(
            *(layer, module, rank, 1.0, "F32"),
            *(np.ones((rank, into), np.float32), np.ones((out, rank), np.float32)),
        )
        for module, (into, out) in features.items()
    ]
    return pack(AdapterSource("base", tuple(modules)))


def facts(data: bytes) -> PackedFacts:
    header = parse_packed(data).header
    return PackedFacts(
        header.revision, "base", header.size_bytes, header.max_rank, "", header.entries
    )


def node(name: str = "n1", memory: int = 1 << 20, **more: Any) -> NodeRecord:
    return NodeRecord(name, 1, f"{name}:1", "base", "", memory, **({"shape": SHAPE} | more))


def test_what_fits_is_fine() -> None:
    check_fits(facts(packed(FITTING)), "base", [node()])
    check_fits(facts(packed(FITTING, rank=9)), "base", [node(max_rank=9)])


@pytest.mark.parametrize("module", FITTING)
@pytest.mark.parametrize("side", ["A", "B"])
def test_a_tensor_of_another_width_is_named(module: str, side: str) -> None:
    into, out = FITTING[module]
    wrong = (into + 1, out) if side == "A" else (into, out - 1)
    with pytest.raises(FailedPreconditionError) as caught:
        check_fits(facts(packed(FITTING | {module: wrong})), "base", [node()])
    block = "mlp" if module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    assert caught.value.field == f"model.layers.3.{block}.{module}.lora_{side}.weight"
    shapes = ([2, wrong[0]], [2, into]) if side == "A" else ([wrong[1], 2], [out, 2])
    assert caught.value.message == f"shape {shapes[0]}, 'base' takes {shapes[1]}"


def test_a_layer_that_is_not_there_is_named() -> None:
    with pytest.raises(FailedPreconditionError, match=r"model\.layers\.4\.self_attn\.q_proj: .* 4"):
        check_fits(facts(packed({"q_proj": (16, 24)}, layer=4)), "base", [node()])


def test_limits_are_those_of_the_best_node() -> None:
    some = facts(packed(FITTING, rank=8))
    size = some.size_bytes
    check_fits(some, "base", [node(memory=size - 1), node("n2", memory=size)])
    check_fits(some, "base", [node(max_rank=7), node("n2", max_rank=8)])
    with pytest.raises(FailedPreconditionError, match=rf"size_bytes: {size}, .* {size - 1} bytes"):
        check_fits(some, "base", [node(memory=size - 1), node("n2", memory=5)])
    with pytest.raises(FailedPreconditionError, match=r"rank: 8, .* over 7"):
        check_fits(some, "base", [node(max_rank=6), node("n2", max_rank=7)])
    # Room here and rank there are of no use.
    with pytest.raises(FailedPreconditionError, match="size_bytes"):
        check_fits(some, "base", [node(max_rank=7), node("n2", memory=size - 1)])


def test_where_nothing_is_known_nothing_is_refused() -> None:
    odd = facts(packed({"q_proj": (5, 7)}, layer=900))
    check_fits(odd, "base", [])
    check_room(1 << 60, "base", [])
    check_fits(odd, "base", [node(shape=None)])


class ShapedNode(FakeNode):
    """Tells the controller its model's shape."""

    async def register(self, **fields: Any) -> Any:
        shape = common_pb2.ModelShape(**dataclasses.asdict(SHAPE))
        return await super().register(**({"shape": shape} | fields))


def test_an_upload_that_fits_no_node_leaves_nothing(tmp_path: Path) -> None:
    good, odd = packed(FITTING), packed({"q_proj": (16, 25)})
    big = packed(FITTING, rank=64)

    async def script(site: Site) -> None:
        async with ShapedNode(site, "n1", memory=len(big) - 1):
            store = tmp_path / "data" / "adapters"
            for data, field in (
                (odd, "model.layers.3.self_attn.q_proj.lora_B.weight"),
                (big, "size_bytes"),
            ):
                error = await refused(site.create("sql", data))
                assert (type(error), error.field) == (FailedPreconditionError, field)
                assert isinstance(await refused(site.get("sql")), NotFoundError)
                assert list(store.rglob("*.lora")) == []
                # A mismatch of names may be allowed, one of shapes may not.
                error = await refused(site.create("sql", data, allow_base_mismatch=True))
                assert error.field == field
            made = await site.create("sql", good)
            await site.served("sql", ["n1"])
            for data in (odd, big):
                error = await refused(site.update("sql", data))
                assert isinstance(error, FailedPreconditionError)
                assert (await site.get("sql")).revision == made.revision

    play(tmp_path, script, new_check=PackedCheck)


def test_too_large_is_said_before_the_bytes_come(tmp_path: Path) -> None:
    class Never(PackedCheck):
        def feed(self, data: bytes) -> None:
            raise AssertionError("bytes were taken")

    async def script(site: Site) -> None:
        async with FakeNode(site, "n1", memory=100):
            error = await refused(site.create("sql", b"x" * 101))
            assert (type(error), error.field) == (FailedPreconditionError, "size_bytes")
            assert "100 bytes" in error.message

    play(tmp_path, script, new_check=Never)


def test_a_shape_must_be_one(tmp_path: Path) -> None:
    async def script(site: Site) -> None:
        shape = common_pb2.ModelShape(num_layers=4, hidden_size=16)
        error = await refused(FakeNode(site, "n1").register(shape=shape))
        assert (type(error), error.field) == (InvalidArgumentError, "shape")

    play(tmp_path, script)
