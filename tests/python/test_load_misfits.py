"""Adapters that a cluster with the real model cannot serve: refused at once, by the tensor or the
limit, over HTTP as on the command line, and nothing of them stays."""

import asyncio
import contextlib
import json
import shutil
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from controller_fixtures import Site, controller, refused
from demo_node import serving_demo
from http_site import Answer, ask, gateway
from node_calls import run

from loraserve.cli import main
from loraserve.client import AsyncClient
from loraserve.controller.admission import PackedCheck
from loraserve.controller.state import Settings
from loraserve.demo import MODEL_DIRECTORY, MODEL_NAME, adapter_directory
from loraserve.errors import DeadlineExceededError, FailedPreconditionError, NotFoundError
from loraserve.gateway import adapters as gateway_adapters
from loraserve.node.pool.options import PoolOptions

# The demo's: 4 layers, hidden 192, q 192, kv 96, intermediate 512.
STEM = "base_model.model.model.layers"
Q = "self_attn.q_proj"
# A busy machine does not make a lost node.
PATIENT = Settings(tick_seconds=0.05, silent_ticks=600)


def tensors(layer: int, module: str, rank: int, into: int, out: int) -> dict[str, Any]:
    name = f"{STEM}.{layer}.{module}"
    return {
        f"{name}.lora_A.weight": np.zeros((rank, into), np.float32),
        f"{name}.lora_B.weight": np.zeros((out, rank), np.float32),
    }


def write(path: Path, arrays: dict[str, Any], rank: int = 2, base: str = MODEL_NAME) -> Path:
    """A PEFT directory."""
    path.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "base_model_name_or_path": base}
    (path / "adapter_config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(arrays, path / "adapter_model.safetensors")
    return path


def wide(rank: int) -> dict[str, Any]:
    """As many weights as an adapter of the demo can have."""
    sizes = {
        **{"self_attn.q_proj": (192, 192), "self_attn.o_proj": (192, 192)},
        **{"mlp.gate_proj": (192, 512), "mlp.up_proj": (192, 512), "mlp.down_proj": (512, 192)},
    }
    return {
        name: array
        for layer in range(4)
        for module, (into, out) in sizes.items()
        for name, array in tensors(layer, module, rank, into, out).items()
    }


@dataclass
class Loading:
    """A controller, a node with the demo model and a gateway whose adapter root is `root`."""

    root: Path
    site: Site
    address: str

    async def load(self, path: str, name: str = "mine", **more: Any) -> Answer:
        headers = {"authorization": f"Bearer {self.site.keys['admin']}"}
        body = {"lora_name": name, "lora_path": path, **more}
        return await ask(self.address, "/v1/load_lora_adapter", body, headers=headers)

    async def models(self) -> list[str]:
        headers = {"authorization": f"Bearer {self.site.keys['admin']}"}
        answer = await ask(self.address, "/v1/models", headers=headers)
        return [model["id"] for model in answer.json["data"]]

    async def refuses(self, path: str, *words: str) -> None:
        """With HTTP 400 of the path that has all these words, and it is as if never asked."""
        answer = await self.load(path)
        assert answer.status == 400, answer
        assert answer.error["param"] == "lora_path"
        for word in words:
            assert word in answer.error["message"], answer
        assert await self.models() == [MODEL_NAME]
        assert isinstance(await refused(self.site.get("mine")), NotFoundError)


@contextlib.asynccontextmanager
async def loading(
    path: Path, *, pool_bytes: int = 16 << 20, memory_bytes: int = 4 << 20
) -> AsyncIterator[Loading]:
    keys, root = path / "keys.jsonl", path / "root"
    root.mkdir()
    async with (
        controller(path, new_check=PackedCheck, settings=PATIENT) as site,
        serving_demo(
            controller=site.server.address,
            controller_key=site.keys["node"],
            keys=keys,
            pool=PoolOptions(host_pool_bytes=pool_bytes),
            memory_bytes=memory_bytes,
        ),
        gateway(
            controller=site.server.address,
            key=site.keys["node"],
            keys=keys,
            base=MODEL_NAME,
            adapter_roots=(root,),
        ) as server,
    ):
        async with AsyncClient(site.server.address, api_key=site.keys["admin"]) as client:
            await client.wait_routable((), timeout_s=60)
        yield Loading(root, site, server.address)


def play(tmp_path: Path, script: Callable[[Loading], Any], **options: int) -> None:
    async def test() -> None:
        async with loading(tmp_path, **options) as site:
            await script(site)

    run(test)


def test_what_does_not_fit_is_named_and_the_name_stays_free(tmp_path: Path) -> None:
    async def script(site: Loading) -> None:
        write(site.root / "narrow", tensors(0, Q, 2, 7, 192))
        write(site.root / "long", tensors(1, "mlp.down_proj", 2, 512, 9))
        write(site.root / "deep", tensors(4, Q, 2, 192, 192))
        write(site.root / "unknown", tensors(0, "mlp.experts", 2, 192, 192))
        write(site.root / "ranked", tensors(0, Q, 513, 192, 192), rank=513)
        write(site.root / "huge", wide(512), rank=512)
        await site.refuses("narrow", f"model.layers.0.{Q}.lora_A.weight", "[2, 7]", "[2, 192]")
        await site.refuses("long", "model.layers.1.mlp.down_proj.lora_B.weight", "[9, 2]")
        await site.refuses("deep", f"model.layers.4.{Q}", "4")
        await site.refuses("unknown", "mlp.experts")
        await site.refuses("ranked", "r: ", "512")
        limit = (16 << 20) * 7 // 8
        await site.refuses("huge", "size_bytes: ", f"{limit} bytes")
        shutil.copytree(adapter_directory("upper"), site.root / "upper")
        assert (await site.load("upper")).status == 200
        # In place of one that serves, which goes on serving.
        answer = await site.load("narrow", load_inplace=True)
        assert (answer.status, answer.error["param"]) == (400, "lora_path")
        assert sorted(await site.models()) == [MODEL_NAME, "mine"]
        headers = {"authorization": f"Bearer {site.site.keys['admin']}"}
        body = {"model": "mine", "prompt": "garden=", "temperature": 0}
        answer = await ask(site.address, "/v1/completions", body, headers=headers)
        assert answer.json["choices"][0]["text"] == "GARDEN"

    play(tmp_path, script)


def test_what_the_engine_has_no_pages_for_is_taken_back(tmp_path: Path) -> None:
    """The controller does not know the engine's pages: the node finds out, and the call ends with
    what it says."""

    async def script(site: Loading) -> None:
        write(site.root / "huge", wide(512), rank=512)
        answer = await site.load("huge")
        assert answer.status == 400, answer
        assert "refused: loading failed on n1" in answer.error["message"]
        assert "pages" in answer.error["message"]
        assert await site.models() == [MODEL_NAME]
        assert isinstance(await refused(site.site.get("mine")), NotFoundError)
        # The same by the SDK, and what fits still loads by that name.
        shutil.copytree(adapter_directory("upper"), site.root / "upper")
        async with AsyncClient(site.site.server.address, api_key=site.site.keys["acme"]) as client:
            info = await client.adapters.add("mine", site.root / "huge")
            with pytest.raises(FailedPreconditionError, match="pages"):
                await client.wait_routable(["mine"], timeout_s=60)
            # Also behind one that is not there in time.
            slow = replace(info, revision="f" * 64)
            with pytest.raises(FailedPreconditionError, match="pages"):
                await client.wait_admitted([slow, info], timeout_s=0.1)
            with pytest.raises(NotFoundError):
                await client.adapters.get("mine")
            with pytest.raises(DeadlineExceededError):
                await client.wait_admitted([slow], timeout_s=0.1)
            info = await client.adapters.add("mine", site.root / "upper")
            await client.wait_admitted([info], timeout_s=60)
            assert (await client.adapters.get("mine")).revision == info.revision

    play(tmp_path, script, pool_bytes=64 << 20)


def test_what_replaces_another_must_serve_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one before goes on serving, which is no success of the new one."""
    monkeypatch.setattr(gateway_adapters, "ROUTABLE_TIMEOUT_S", 1.0)  # it never will

    async def script(site: Loading) -> None:
        write(site.root / "huge", wide(512), rank=512)
        shutil.copytree(adapter_directory("upper"), site.root / "upper")
        while (await site.load("upper", load_inplace=True)).status != 200:
            pass  # a machine that stands still
        answer = await site.load("huge", load_inplace=True)
        assert answer.status == 504, answer
        assert "'mine' still means revision" in answer.error["message"]
        headers = {"authorization": f"Bearer {site.site.keys['admin']}"}
        body = {"model": "mine", "prompt": "garden=", "temperature": 0}
        answer = await ask(site.address, "/v1/completions", body, headers=headers)
        assert answer.json["choices"][0]["text"] == "GARDEN"

    play(tmp_path, script, pool_bytes=64 << 20)


def test_the_command_line_refuses_without_waiting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def script(site: Loading) -> None:
        monkeypatch.setenv("LORASERVE_API_KEY", site.site.keys["acme"])
        path = write(site.root / "narrow", tensors(0, Q, 2, 7, 192))
        words = ["adapter", "add", "mine", str(path), "--controller", site.site.server.address]
        for more in ([], ["--wait", "600"], ["--allow-base-mismatch"]):
            assert await asyncio.to_thread(main, [*words, *more]) == 1
            said = capsys.readouterr().err
            assert f"model.layers.0.{Q}.lora_A.weight: shape [2, 7]" in said
            assert isinstance(await refused(site.site.get("mine")), NotFoundError)

    play(tmp_path, script)


def test_a_base_by_another_spelling_is_the_same(tmp_path: Path) -> None:
    async def script(site: Loading) -> None:
        link = tmp_path / "some" / "checkpoint-7"
        link.parent.mkdir()
        link.symlink_to(MODEL_DIRECTORY)
        arrays = tensors(0, Q, 2, 192, 192)
        for name, base in (
            ("path", f"/home/ann/{MODEL_NAME.upper()}/"),
            ("hub", f"org/{MODEL_NAME}"),
            ("served", str(MODEL_DIRECTORY)),
            ("linked", str(link)),
        ):
            write(site.root / name, arrays, base=base)
            answer = await site.load(name, name)
            assert answer.status == 200, answer
        write(site.root / "other", arrays, base="org/another")
        answer = await site.load("other", "other")
        assert (answer.status, answer.error["param"]) == (400, "base_model_name")
        for word in ("'org/another'", f"'{MODEL_NAME}'", "--allow-base-mismatch"):
            assert word in answer.error["message"]

    play(tmp_path, script)
