"""What a person sees of the demo: the live view while it runs, the table at its end."""

from collections.abc import Mapping, Sequence

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from loraserve.client.messages import residency_word
from loraserve.client.route_table import RouteTable
from loraserve.demo.replay import Outcome, Progress
from loraserve.demo.skills import SKILLS
from loraserve.demo.tally import Row, Tally

_LATEST = 10
# With names of adapters; below, the table goes without.
_WIDE = 100


def milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f}"


def _cells(row: Row) -> list[str]:
    return [
        str(row.requests),
        f"{row.correct} ({row.correct / row.requests:.1%})" if row.requests else "0",
        milliseconds(row.ttft_p50_s),
        milliseconds(row.ttft_p95_s),
        milliseconds(row.tbt_p50_s),
        milliseconds(row.tbt_p95_s),
    ]


def rank_table(rows: Mapping[int, Row], whole: Row, width: int) -> Table:
    """The table that the demo ends with, for a screen of so many columns."""
    names: dict[int, list[str]] = {}
    for skill in SKILLS:
        names.setdefault(skill.rank, []).append(skill.name)
    table = Table(title="by rank; times in ms")
    table.add_column("rank", justify="right")
    wide = width >= _WIDE
    if wide:
        table.add_column("adapters")
    for column in ("requests", "correct", "TTFT p50", "TTFT p95", "TBT p50", "TBT p95"):
        table.add_column(column, justify="right")
    for rank, row in rows.items():
        adapters = [", ".join(names.get(rank, []))] if wide else []
        table.add_row(str(rank), *adapters, *_cells(row))
    table.add_section()
    table.add_row("all", *([""] if wide else []), *_cells(whole), style="bold")
    return table


def holders(routes: RouteTable) -> dict[str, list[str]]:
    """Node id to "adapter (rank, where)" of what requests by name get there."""
    ranks = {skill.name: skill.rank for skill in SKILLS}
    found: dict[str, list[str]] = {node: [] for node in sorted(routes.nodes)}
    for adapter, route in sorted(routes.adapters.items()):
        current = route.of(None)
        for holder in current.holders if current else ():
            rank = ranks.get(adapter.name, current.max_rank if current else 0)
            word = residency_word(holder.state)
            found.setdefault(holder.node_id, []).append(f"{adapter.name} (rank {rank}, {word})")
    return found


def holders_panels(holders: Mapping[str, Sequence[str]]) -> RenderableType:
    panels = [
        Panel("\n".join(names) or "nothing", title=f"{node} holds", expand=False)
        for node, names in holders.items()
    ]
    return Columns(panels)


def _answer_line(outcome: Outcome) -> Text:
    arrival = outcome.arrival
    line = Text()
    line.append("✓ " if outcome.correct else "✗ ", "green" if outcome.correct else "bold red")
    line.append(f"{arrival.skill.name:>8} r{arrival.skill.rank:<3} ", "cyan")
    line.append(f"{arrival.word:>8} → ")
    line.append(f"{outcome.text or outcome.error or '':<18}", "bold")
    line.append(f" {outcome.node_id}", "dim")
    return line


def live(progress: Progress, seconds: float, routes: RouteTable, width: int) -> RenderableType:
    """One frame."""
    done, elapsed_s = progress.outcomes, progress.elapsed_s
    correct = sum(o.correct for o in done)
    head = Table.grid(padding=(0, 2))
    head.add_row(
        ProgressBar(total=seconds, completed=min(elapsed_s, seconds), width=30),
        f"{min(elapsed_s, seconds):.0f} of {seconds:.0f} s",
        f"{progress.sent} of {progress.total} requests sent",
        f"{progress.in_flight.total()} in flight over {len(+progress.in_flight)} adapters",
        Text(f"{correct} of {len(done)} right", "green" if correct == len(done) else "yellow"),
        f"{progress.tokens / elapsed_s:.0f} tokens/s" if elapsed_s else "",
    )
    ranks = sorted({skill.rank for skill in SKILLS})
    by_rank = {r: Row.of([o for o in done if o.arrival.skill.rank == r]) for r in ranks}
    latest = Panel(
        Group(*[_answer_line(o) for o in reversed(done[-_LATEST:])]), title="latest answers"
    )
    return Group(
        head,
        Columns([rank_table(by_rank, Row.of(done), width), latest]),
        holders_panels(holders(routes)),
    )


# The transports of PeerSource, for people.
_TRANSPORTS = {"ucx": "one-sided by UCX", "grpc": "as streams over gRPC"}


def _between_nodes(reads: Mapping[str, int]) -> str:
    ways = [f"{count} {_TRANSPORTS.get(name, name)}" for name, count in reads.items() if count]
    total = sum(reads.values())
    return f"nodes read {total} adapters from each other" + (f": {', '.join(ways)}" * bool(ways))


def summary(result: Tally, width: int) -> RenderableType:
    """The end of the demo."""
    verdict = Text(
        "PASSED" if result.passed else "FAILED", "bold green" if result.passed else "bold red"
    )
    facts = (
        f"{result.whole.correct} of {result.whole.requests} answers right, {result.lost} lost, "
        f"{result.tokens_per_s:.0f} tokens/s over {result.seconds:.1f} s; at most "
        f"{result.most_in_flight} requests in flight over {result.most_adapters} adapters"
    )
    lines: list[RenderableType] = [
        rank_table(result.rows, result.whole, width),
        holders_panels(result.holders),
        Text(_between_nodes(result.peer_reads)),
        Text.assemble(verdict, ": ", facts),
    ]
    lines += [Text(f"error: {error}", "red") for error in result.errors]
    return Group(*lines)
