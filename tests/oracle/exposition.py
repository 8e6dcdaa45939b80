"""What a /metrics endpoint says, as Prometheus' own parser reads it."""

import urllib.request
from dataclasses import dataclass

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families


@dataclass
class Exposition:
    families: dict[str, Metric]

    def value(self, name: str, **labels: str) -> float:
        """Of the one series with this name and, among others, these labels."""
        found = [
            sample.value
            for family in self.families.values()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        assert len(found) == 1, (name, labels, found)
        return float(found[0])

    def labels(self, name: str) -> list[dict[str, str]]:
        """Of each series with this name."""
        every = (sample for family in self.families.values() for sample in family.samples)
        return [sample.labels for sample in every if sample.name == name]


def parsed(text: str) -> Exposition:
    """Each family and each series must be there once."""
    families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len(set(names)) == len(names), names
    series = [(s.name, *sorted(s.labels.items())) for family in families for s in family.samples]
    assert len(set(series)) == len(series)
    return Exposition(dict(zip(names, families, strict=True)))


def fetched(address: str) -> Exposition:
    """`address`: host:port of a metrics endpoint."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:
        return parsed(answer.read().decode())
