"""What the endpoints share."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loraserve.errors import UnavailableError
from loraserve.gateway.metrics import GatewayGauges, GatewayMetrics
from loraserve.gateway.models import ModelNames
from loraserve.gateway.sessions import Sessions
from loraserve.text.chat_template import ChatTemplate
from loraserve.text.tokenizer import Tokenizer
from loraserve.tracing import Tracer

MAX_BODY_BYTES = 16 << 20
# Between two tries to reach a controller that is not there yet.
_AGAIN_S = 0.2


@dataclass
class GatewaySite:
    """`tokenizer` is None where the gateway was given none: chats and token texts are refused.
    `model_directory`: where it came from, which is that of the base model."""

    sessions: Sessions
    names: ModelNames
    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    metrics: GatewayMetrics
    context_tokens: int | None = None
    model_directory: Path | None = None
    allow_base_mismatch: bool = False
    max_body_bytes: int = MAX_BODY_BYTES
    tracer: Tracer | None = None
    draining: bool = False

    def observe(self, connections: Callable[[], int]) -> None:
        """From now on metrics tell of the routes and nodes as well."""
        client = self.sessions.own()
        self.metrics.gauges = GatewayGauges(
            lambda: client.routes_age_s,
            lambda: (client.routes.epoch, client.routes.version),
            lambda: len(client.routes.nodes),
            connections,
            self.sessions.pages,
            lambda: len(client.routes.adapters),
            lambda: self.names.served_base(client.routes),
        )

    def not_ready(self) -> str | None:
        """Why requests are better sent elsewhere; None where they are not."""
        if self.draining:
            return "draining"
        nodes = self.sessions.own().routes.nodes
        if not nodes:
            return "no node has registered"
        return "all nodes are draining" if all(n.draining for n in nodes.values()) else None

    async def first_routes(self, log: logging.Logger) -> None:
        """Returns when the controller has told routes, however long it takes. Raises what it
        refuses to tell them with."""
        client = self.sessions.own()
        waited = False
        while True:
            try:
                await client.wait_table()
                return
            except UnavailableError as error:
                if not waited:
                    log.info("waiting for the controller: %s", error)
                waited = True
                await asyncio.sleep(_AGAIN_S)
