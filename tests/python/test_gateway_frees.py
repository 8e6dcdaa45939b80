"""A client that leaves the gateway: what its request held in a real engine is free at once."""

import functools
from typing import Any

import pytest
from demo_node import serving_demo
from fake_node import until
from http_site import connected, gateway
from node_calls import run

from loraserve import engine as engine_module
from loraserve.demo import MODEL_NAME
from loraserve.engine import EngineConfig

# Longer than a test takes to leave.
TOKENS = 400


@pytest.mark.parametrize("stream", [True, False])
def test_pages_are_free_within_a_step_of_the_engine(
    stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is kept for prompts that begin alike would stay in pages by right.
    monkeypatch.setattr(
        engine_module, "EngineConfig", functools.partial(EngineConfig, prefix_cache=False)
    )

    async def test() -> None:
        async with (
            serving_demo() as (node, _),
            gateway(nodes=(node.address,), base=MODEL_NAME) as server,
        ):
            engine: Any = node.node.engine
            before = engine.stats()
            at_abort: list[int] = []
            submit_to = engine.submit_to

            def watched(*about: Any, **more: Any) -> Any:
                request = submit_to(*about, **more)
                abort = request.abort

                def seen() -> None:
                    abort()
                    at_abort.append(engine.stats().steps)

                request.abort = seen
                return request

            monkeypatch.setattr(engine, "submit_to", watched)
            body = {
                "model": MODEL_NAME,
                "prompt": "abc",
                "max_tokens": TOKENS,
                "ignore_eos": True,
                "stream": stream,
            }
            async with connected(server.address) as client:
                await client.request("POST", "/v1/completions", body)
                await until(lambda: engine.stats().pages_kv > before.pages_kv, "runs")
                client.reset()
                await until(lambda: engine.stats().running == 0, "has ended")
            await until(lambda: engine.stats().pages_kv == before.pages_kv, "is free")
            after = engine.stats()
            assert after.pages_free == before.pages_free
            assert after.generated_tokens - before.generated_tokens < TOKENS
            # The step that ran meanwhile, and the one that has left it out.
            assert after.steps - at_abort[0] <= 2

    run(test)
