"""Clients of other projects, as they are released, each in a virtual environment of its own."""

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORDS_FILE = ROOT / "tests" / "integration" / "lm_eval_tasks" / "words.jsonl"
CLIENTS = ROOT / "build" / "clients"
INSTALL_TIMEOUT_S = 900
LAST_LINES = 4  # of pip's, in the reason of a skip
RUN_TIMEOUT_S = 600
DOCUMENTED_URL = "http://localhost:8000"


def client_scripts(name: str, requirement: str) -> Path:
    """The client's programs, in build/clients/`name`/bin, installed by the first who asks.
    Skips the test, with pip's last lines, where the requirement cannot be installed here."""
    home = CLIENTS / name
    constraints = ROOT / "constraints.txt"
    asked = f"{sys.version}\n{requirement}\n{constraints.read_text()}"
    wanted = hashlib.sha256(asked.encode()).hexdigest()
    # Written last, and gone with the rest when the next try clears the folder: an environment
    # without it is half made.
    mark = home / "installed"
    if mark.exists() and mark.read_text() == wanted:
        return home / "bin"
    pip = [str(home / "bin" / "python"), "-m", "pip", "install", "-q"]
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(home)],
        [*pip, "--disable-pip-version-check", "-c", str(constraints), requirement],
    ):
        try:
            done = subprocess.run(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=INSTALL_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            pytest.skip(f"{requirement} is not installed within {INSTALL_TIMEOUT_S} s")
        if done.returncode != 0:
            lines = "\n".join(done.stdout.splitlines()[-LAST_LINES:])
            pytest.skip(f"{requirement} cannot be installed here:\n{lines}")
    mark.write_text(wanted)
    return home / "bin"


def documented(program: str) -> tuple[str, str]:
    """(requirement, script) of the block of docs/openai.md that installs `program` and runs it:
    what pip is asked for, and the lines after."""
    text = (ROOT / "docs" / "openai.md").read_text()
    blocks = re.findall(r"^```sh\npip install [^'\n]*'([^'\n]+)'\n(.*?)\n```$", text, re.M | re.S)
    ((requirement, script),) = [
        block for block in blocks if re.search(rf"^ *{program} ", block[1], re.M)
    ]
    assert DOCUMENTED_URL in script
    return requirement, script


def run_documented(
    scripts: Path,
    script: str,
    url: str,
    cwd: Path,
    environment: Mapping[str, str] | None = None,
) -> str:
    """The document's lines in a directory that is no checkout, against the server at `url`."""
    path = f"{scripts}{os.pathsep}{os.environ['PATH']}"
    own = {"LORASERVE": str(ROOT), "PATH": path, **(environment or {})}
    return run_client(["sh", "-euc", script.replace(DOCUMENTED_URL, url)], cwd, own)


def run_client(
    command: list[str | Path], cwd: Path, environment: Mapping[str, str] | None = None
) -> str:
    """What it wrote. Nothing is downloaded, and it must end with 0."""
    own = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(cwd / "hf"),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "NO_COLOR": "1",
    }
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **own, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=RUN_TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout
