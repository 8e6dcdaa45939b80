"""When two names of a base model mean the same one."""

import os
from pathlib import Path

import pytest

from loraserve.checkpoint.base_names import check_base_name, names_directory, same_base
from loraserve.errors import FailedPreconditionError

SNAPSHOT = "snapshots/0123456789abcdef0123456789abcdef01234567"
SAME = [
    ("llama", "llama"),
    ("Llama-3.1-8B", "llama-3.1-8b"),
    ("/data/models/Llama-3.1-8B/", "llama-3.1-8b"),
    ("meta-llama/Llama-3.1-8B", "Llama-3.1-8B"),
    ("meta-llama/Llama-3.1-8B", "META-LLAMA/llama-3.1-8b"),
    ("/home/ann/llama", "/srv/llama"),
    ("../models/llama", "org/llama"),
    ("./llama", "llama"),
    ("C:\\models\\llama", "llama"),
    (f"/home/ann/.cache/huggingface/hub/models--meta-llama--Llama-2-7b-hf/{SNAPSHOT}",) * 2,
    (f"/data/hub/models--meta-llama--Llama-2-7b-hf/{SNAPSHOT}/", "meta-llama/Llama-2-7b-hf"),
    (f"/data/hub/models--meta-llama--Llama-2-7b-hf/{SNAPSHOT}", "llama-2-7b-hf"),
]
OTHER = [
    ("llama", "llama-2"),
    ("meta-llama/Llama-3.1-8B", "another/Llama-3.1-8B"),
    ("llama/v1", "llama"),
    ("/data/llama/checkpoint-500", "llama"),
    ("", ""),
    ("/", ""),
    ("", "llama"),
    (f"/data/hub/models--meta-llama--Llama-2-7b-hf/{SNAPSHOT}", "another/Llama-2-7b-hf"),
    (f"/hub/models--a--llama/{SNAPSHOT}", f"/hub/models--a--mistral/{SNAPSHOT}"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_the_same(one: str, other: str) -> None:
    assert same_base(one, other)
    assert same_base(other, one)


@pytest.mark.parametrize(("one", "other"), OTHER)
def test_another(one: str, other: str) -> None:
    assert not same_base(one, other)
    assert not same_base(other, one)


def test_a_refusal_names_both_and_the_way_out() -> None:
    check_base_name("", "mine")
    check_base_name("/models/Mine", "mine")
    with pytest.raises(FailedPreconditionError) as caught:
        check_base_name("org/theirs", "mine")
    assert caught.value.field == "base"
    for word in ("'org/theirs'", "'mine'", "--allow-base-mismatch"):
        assert word in caught.value.message


def test_every_spelling_of_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = tmp_path / "weights" / "final", tmp_path / "other"
    model.mkdir(parents=True)
    other.mkdir()
    (tmp_path / "link").symlink_to(model)
    monkeypatch.chdir(tmp_path / "weights")
    monkeypatch.setenv("HOME", str(tmp_path))
    spellings = (
        *(str(model), f"{model}/", "final", "./final", "../link"),
        *(f"{tmp_path}/other/../weights/final", "~/link", str(tmp_path / "link")),
    )
    for name in spellings:
        assert names_directory(name, model), name
        assert names_directory(name, Path(os.path.relpath(model))), name
    for name in ("", "weights", str(other), "final2", "org/final", "a\0b", "~nobody/x" * 400):
        assert not names_directory(name, model), name
