"""Wire messages to the client's values and back."""

from collections.abc import Sequence
from datetime import datetime, timezone

from loraserve.client.route_table import RouteUpdate
from loraserve.client.routes import AdapterRoute, Holder, NodeRoute, RankCosts, RevisionRoute
from loraserve.client.routing import ObservedLoad
from loraserve.client.types import AdapterInfo, Prompt
from loraserve.errors import InvalidArgumentError
from loraserve.placement.types import AdapterId
from loraserve.sampling_params import SamplingParams
from loraserve.v1 import adapter_pb2, common_pb2, controller_pb2, inference_pb2

_COUNTS = ("max_tokens", "min_tokens", "top_k")
_NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
FINISH_REASONS = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
    inference_pb2.FINISH_REASON_CANCELLED: "cancelled",
}
# A token of text has about so many bytes.
_BYTES_PER_TOKEN = 4


def sampling_to_wire(params: SamplingParams) -> common_pb2.SamplingParams:
    """Raises InvalidArgumentError where the wire cannot carry a value; ranges are the node's."""
    message = common_pb2.SamplingParams()
    name = ""
    try:
        for name in _COUNTS + _NUMBERS:
            setattr(message, name, getattr(params, name))
        name = "logit_bias"
        for token, bias in params.logit_bias.items():
            message.logit_bias[token] = bias
        if params.seed is not None:
            name = "seed"
            message.seed = params.seed % 2**64
        name = "stop"
        message.stop.extend([params.stop] if isinstance(params.stop, str) else params.stop)
        name = "stop_token_ids"
        message.stop_token_ids.extend(params.stop_token_ids)
        name = "ignore_eos"
        message.ignore_eos = params.ignore_eos
        name = "prompt_logprobs"
        message.prompt_logprobs = params.prompt_logprobs
        if params.logprobs is not None:
            name = "logprobs"
            message.logprobs = params.logprobs
    except (ValueError, TypeError, AttributeError) as error:
        raise InvalidArgumentError(name, f"{error}") from None
    return message


def set_prompt(request: inference_pb2.GenerateRequest, prompt: Prompt) -> int:
    """Puts the prompt in; its tokens, estimated for text. Raises InvalidArgumentError."""
    try:
        if isinstance(prompt, str):
            request.text = prompt
            return max(1, len(prompt.encode()) // _BYTES_PER_TOKEN)
        request.token_ids.ids.extend(prompt)
        request.token_ids.SetInParent()  # an empty list is the node's to refuse, by its name
    except (ValueError, TypeError) as error:
        raise InvalidArgumentError("prompt", f"{error}") from None
    return len(request.token_ids.ids)


def load_from_wire(load: common_pb2.NodeLoad) -> ObservedLoad:
    return ObservedLoad(
        load.running_requests,
        load.queued_requests,
        load.queued_prefill_tokens,
        load.free_pages,
        load.total_pages,
        load.rank_sum,
        load.max_rank,
    )


def logprobs_from_wire(
    positions: Sequence[inference_pb2.PositionLogprobs],
) -> tuple[list[float], list[dict[int, float]]]:
    """Of the chosen tokens, and of the most probable ones of each position."""
    tops = [{top.token_id: top.logprob for top in position.top} for position in positions]
    return [position.logprob for position in positions], tops


def _id_from_wire(message: common_pb2.AdapterId) -> AdapterId:
    return AdapterId(message.tenant, message.base, message.name)


def _route_from_wire(message: controller_pb2.AdapterRoute) -> AdapterRoute:
    revisions = tuple(
        RevisionRoute(
            r.revision,
            tuple(Holder(h.node_id, h.weight, h.state) for h in r.holders),
            r.max_rank,
            r.size_bytes,
        )
        for r in message.revisions
    )
    return AdapterRoute(
        _id_from_wire(message.adapter), message.revision, revisions, message.unrouted_reason
    )


def _node_from_wire(message: controller_pb2.NodeRoute) -> NodeRoute:
    return NodeRoute(
        message.node_id,
        message.address,
        message.draining,
        message.incarnation,
        message.base.name,
        message.base.digest,
    )


def update_from_wire(message: controller_pb2.WatchRoutesResponse) -> RouteUpdate:
    return RouteUpdate(
        message.epoch,
        message.version,
        message.full,
        tuple(_route_from_wire(a) for a in message.adapters),
        tuple(_node_from_wire(n) for n in message.nodes),
        tuple(_id_from_wire(a) for a in message.removed_adapters),
        tuple(message.removed_node_ids),
        message.more,
        RankCosts(message.rank_costs.own, message.rank_costs.padded)
        if message.HasField("rank_costs")
        else None,
    )


def residency_word(state: int) -> str:
    """ "device" for RESIDENCY_STATE_DEVICE."""
    names = {number: name for name, number in common_pb2.ResidencyState.items()}
    return names.get(state, "unknown").removeprefix("RESIDENCY_STATE_").lower()  # type: ignore[call-overload,no-any-return]


def adapter_from_wire(message: adapter_pb2.Adapter) -> AdapterInfo:
    def time(stamp: object) -> datetime:
        return stamp.ToDatetime(tzinfo=timezone.utc)  # type: ignore[attr-defined,no-any-return]

    return AdapterInfo(
        name=message.name,
        base=message.base,
        tenant=message.tenant,
        revision=message.revision,
        size_bytes=message.size_bytes,
        max_rank=message.max_rank,
        created=time(message.create_time),
        updated=time(message.update_time),
        holders=tuple((h.node_id, residency_word(h.state)) for h in message.holders),
        unrouted_reason=message.unrouted_reason,
    )
