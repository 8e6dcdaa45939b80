"""The wire format keeps the rules of buf's STANDARD style that descriptors can show."""

import importlib
import re
from typing import Any

import pytest

MODULES = [
    importlib.import_module(f"loraserve.v1.{name}_pb2")
    for name in ("common", "inference", "adapter", "node", "controller")
]


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.DESCRIPTOR.name)
def test_style(module: Any) -> None:
    file = module.DESCRIPTOR
    assert file.package == "loraserve.v1"
    assert file.name.startswith("loraserve/v1/")
    for enum in file.enum_types_by_name.values():
        prefix = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", enum.name).upper()
        assert enum.values[0].name == f"{prefix}_UNSPECIFIED"
        assert enum.values[0].number == 0
        assert all(value.name.startswith(f"{prefix}_") for value in enum.values)
    for message in file.message_types_by_name.values():
        assert re.fullmatch(r"([A-Z][a-z]+)+", message.name)
        for field in message.fields:
            assert re.fullmatch(r"[a-z]+(_[a-z]+)*", field.name), field.full_name
    for service in file.services_by_name.values():
        assert service.name.endswith("Service")
        for method in service.methods:
            assert method.input_type.name == f"{method.name}Request"
            assert method.output_type.name == f"{method.name}Response"


def test_no_message_serves_two_rpcs() -> None:
    used = [
        kind.full_name
        for module in MODULES
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
        for kind in (method.input_type, method.output_type)
    ]
    assert len(used) == len(set(used)) == 44


def test_sampling_fields_have_presence() -> None:
    """Absent is not zero: temperature 0 means greedy, seed 0 is a seed."""
    sampling = importlib.import_module("loraserve.v1.common_pb2").SamplingParams.DESCRIPTOR
    without = [f.name for f in sampling.fields if not f.has_presence]
    assert without == ["logit_bias", "stop", "stop_token_ids"]
