"""The pool's part of the node's command line."""

import argparse
from collections.abc import Callable
from pathlib import Path

from loraserve.errors import InvalidArgumentError
from loraserve.node.pool.options import LEAST_HOST_POOL_BYTES, PoolOptions


def add_pool_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    defaults = PoolOptions()
    add(
        "--host-pool-bytes",
        type=int,
        metavar="BYTES",
        help=f"memory for packed adapters, taken at start, at least {LEAST_HOST_POOL_BYTES} "
        "(default: a quarter of what is free, up to 4 GiB, taken as it is used)",
    )
    add("--disk-cache", type=Path, metavar="DIR", help="keep fetched adapters in this directory")
    add(
        "--disk-cache-bytes",
        type=int,
        default=defaults.disk_cache_bytes,
        metavar="BYTES",
        help="of files there",
    )
    add(
        "--verify",
        default=defaults.verify,
        choices=("xxh3", "sha256"),
        help="of every adapter that is read; sha256 also finds forged bytes, at a tenth of the "
        "speed",
    )
    add(
        "--min-fetch-bandwidth",
        type=float,
        default=defaults.min_fetch_bytes_per_s,
        metavar="BYTES_PER_S",
        help="a source that is slower is given up and the next one asked",
    )


def check_pool_arguments(arguments: argparse.Namespace, error: Callable[[str], None]) -> None:
    """Ranges that argparse does not know."""
    if arguments.disk_cache_bytes < 1:
        error("--disk-cache-bytes: at least 1")
    if not 1 <= arguments.min_fetch_bandwidth < float("inf"):
        error("--min-fetch-bandwidth: at least 1")


def pool_options(arguments: argparse.Namespace) -> PoolOptions:
    """Raises InvalidArgumentError."""
    size = arguments.host_pool_bytes
    if size is not None and size < LEAST_HOST_POOL_BYTES:
        raise InvalidArgumentError(
            "host-pool-bytes",
            f"{size} is under the least of use, {LEAST_HOST_POOL_BYTES} "
            f"({LEAST_HOST_POOL_BYTES >> 20} MiB): one adapter must fit in it",
        )
    return PoolOptions(
        host_pool_bytes=arguments.host_pool_bytes,
        disk_cache=arguments.disk_cache,
        disk_cache_bytes=arguments.disk_cache_bytes,
        verify=arguments.verify,
        min_fetch_bytes_per_s=arguments.min_fetch_bandwidth,
    )
