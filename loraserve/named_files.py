"""Files and directories that an option names: what is wrong with one is told with its whole path,
by the option, and once."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from loraserve.errors import InvalidArgumentError, InvalidCheckpointError, UnsupportedError

MAX_KEY_FILE_BYTES = 4096


def whole(path: str | Path) -> str:
    """From the root on: a daemon's working directory is nothing that a reader of its log knows."""
    return str(Path(path).absolute())


def why(error: Exception) -> str:
    """What the system says, without the number and the path that Python puts around it."""
    return getattr(error, "strerror", None) or str(error)


def os_error_text(error: OSError) -> str:
    """For errors that nobody has named."""
    if not isinstance(error.filename, str | Path):
        return why(error)
    return f"{whole(error.filename)}: {why(error)}"


def wrong(field: str, path: str | Path, reason: str | Exception) -> InvalidArgumentError:
    """To be raised: what is wrong with the file `path` of the option `field`."""
    text = why(reason) if isinstance(reason, Exception) else reason
    return InvalidArgumentError(field, f"{whole(path)}: {text}")


@contextlib.contextmanager
def named(field: str, path: str | Path) -> Iterator[None]:
    """Errors of reading `path`, and of what is in it, become errors of the option `field`."""
    try:
        yield
    except (InvalidCheckpointError, UnsupportedError) as error:
        text = error.message if error.field in (field, str(path)) else str(error)
        if not text.startswith(whole(path)):
            text = f"{whole(path)}: {text}"
        raise type(error)(field, text) from None
    except OSError as error:
        at = error.filename if isinstance(error.filename, str | Path) else path
        raise wrong(field, at, error) from None
    except UnicodeDecodeError as error:
        raise wrong(field, path, f"is not text: {error}") from None


def read_key(field: str, path: Path | None) -> str | None:
    """The key in the file `path`; None without one. Raises InvalidArgumentError."""
    if path is None:
        return None
    with named(field, path), path.open("rb") as file:
        key = file.read(MAX_KEY_FILE_BYTES).decode("ascii", "replace").strip()
    if not re.fullmatch(r"[!-~]{1,256}", key):
        raise wrong(field, path, "does not hold one key")
    return key
