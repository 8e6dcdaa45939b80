"""Steps of a scheduler under test."""

from typing import Any

from loraserve._testing import Scheduler


def ran(step: Any) -> list[int]:
    return [item[0] for item in step.items]


def next_step(scheduler: Scheduler) -> Any:
    """A step after everything that was being installed is."""
    for adapter in scheduler.installing:
        scheduler.end_install(adapter)
    return scheduler.step()


def warm(scheduler: Scheduler, *adapters: int) -> None:
    """Brings adapters into pages, with a request for each."""
    for adapter in adapters:
        scheduler.add(10_000 + adapter, [9], adapter=adapter)
        while scheduler.waiting:
            next_step(scheduler)
