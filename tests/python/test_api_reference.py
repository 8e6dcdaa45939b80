"""tools/api_reference.py: the document is current, and everything in it has its word."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import api_reference


def test_the_document_is_current() -> None:
    assert api_reference.REFERENCE.read_text() == api_reference.reference(), (
        "run python tools/api_reference.py"
    )


def test_everything_has_a_comment() -> None:
    assert api_reference.uncommented() == []


def test_every_name_is_in_the_document() -> None:
    text = api_reference.REFERENCE.read_text()
    for file in api_reference.described_files():
        for service in file.service:
            assert f"\n## {service.name}\n" in text
            for method in service.method:
                assert f"\n### {service.name}.{method.name}\n" in text
        for message in file.message_type:
            section = text.partition(f"\n### {message.name}\n")[2].partition("\n### ")[0]
            rows = [
                line.split(" | ")[:2] for line in section.splitlines() if line.startswith("| `")
            ]
            assert rows == [[f"| `{field.name}`", str(field.number)] for field in message.field]
        for enum in file.enum_type:
            section = text.partition(f"\n### {enum.name}\n")[2].partition("\n### ")[0]
            assert all(f"`{value.name}`" in section for value in enum.value)
