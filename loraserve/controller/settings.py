"""How the controller's core is tuned."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Times are in ticks of `tick_seconds`."""

    tick_seconds: float = 1.0
    # Silence for longer than this: the node is lost.
    silent_ticks: int = 3
    # Silence for longer than this: routes go to other copies, where there are any. Nodes send two
    # heartbeats a tick, so that one which is half a tick late is not taken for silent.
    quiet_ticks: int = 1
    # As silent_ticks, for a node whose heartbeat stream has ended: a live one is back much sooner.
    unlinked_ticks: int = 1
    placement_interval_ticks: int = 60
    # A command whose effect does not show for so long is sent again.
    patience_ticks: int = 3
    # From the route's disappearance to the drop: clients hear of new routes within it.
    drop_delay_ticks: int = 2
    # After a restart, how long the stored placement waits for its nodes.
    settle_ticks: int = 5
    # A load that finds a node full waits so long for drops there, then the node is asked anyway.
    room_ticks: int = 10
    # A placement that is computed elsewhere is given up after so long, and asked for again. The
    # next one gets twice the time.
    answer_ticks: int = 30
    replicas: int = 1
    # Bytes that may be loaded in a placement interval for adapters that are served already; what
    # nothing serves never waits. None is no limit.
    move_bytes: int | None = None
    # Of a node: a placement that lowers the predicted peak by less moves nothing that may stay.
    # Other shares for the same copies are worth it from this part of the peak on.
    least_gain: float = 0.05
    # Demand is compared with what was planned for this often; a burst places at once.
    burst_check_ticks: int = 5
    burst_gap_ticks: int = 10
    # A burst is this many times the planned demand, and at least this part of a node.
    burst_times: float = 4.0
    burst_nodes: float = 0.2
    # All adapters of a rank together are one earlier, as chance evens out among them.
    surge_times: float = 1.25
    surge_nodes: float = 0.15
    # Requests that wait on a node take from what it can do in the next interval; up to this part.
    most_strain: float = 0.5
