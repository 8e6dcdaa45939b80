"""Where loraserve-transfer is, and the environment that it runs in."""

import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from loraserve.errors import FailedPreconditionError

PROGRAM = "loraserve-transfer"
UCX_PREFIX = "LORASERVE_UCX_PREFIX"
# What stood in the environment where `set_for_this_process` put something else.
_before: dict[str, str | None] = {}


def find_program() -> Path | None:
    """Of this installation; else of the PATH."""
    for folder in (Path(sysconfig.get_path("scripts")), Path(sys.executable).parent):
        if os.access(folder / PROGRAM, os.X_OK):
            return folder / PROGRAM
    found = shutil.which(PROGRAM)
    return Path(found) if found else None


def library_folder(prefix: Path) -> Path:
    """Of the UCX under `prefix`. Raises FailedPreconditionError."""
    for folder in ("lib", "lib64", f"lib/{platform.machine()}-linux-gnu"):
        if (prefix / folder / "libucp.so.0").exists():
            return prefix / folder
    raise FailedPreconditionError(UCX_PREFIX, f"no libucp.so.0 in lib or lib64 of {prefix}")


def set_for_this_process(variables: Mapping[str, str]) -> None:
    """For a library of this process alone: its programs have what was there before."""
    for name in variables:
        _before.setdefault(name, os.environ.get(name))
    os.environ.update(variables)


def _inherited() -> dict[str, str]:
    given: dict[str, str | None] = {**os.environ, **_before}
    return {name: value for name, value in given.items() if value is not None}


def program_environment(own: dict[str, str] | None = None) -> dict[str, str]:
    """That of this process, with the site's UCX before the one that the program was built with,
    and without what is none of a UCX program's business. Raises FailedPreconditionError."""
    own = _inherited() if own is None else own
    keep = ("PATH", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "ASAN_OPTIONS")
    # What UCX reads as it is loaded: no news of what is not on this machine, and no handlers that
    # wait for a debugger. Which of the user's variables count the program itself decides.
    environment = {
        "UCX_LOG_LEVEL": "error",
        "UCX_WARN_UNUSED_ENV_VARS": "n",
        "UCX_HANDLE_ERRORS": "none",
    }
    for name, value in own.items():
        if name in keep or name.startswith("UCX_"):
            environment[name] = value
    if prefix := own.get(UCX_PREFIX):
        paths = [str(library_folder(Path(prefix))), environment.get("LD_LIBRARY_PATH", "")]
        environment["LD_LIBRARY_PATH"] = ":".join(path for path in paths if path)
    return environment
