"""Folders that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `target` that is renamed to it when the block succeeds.

    Raises FileExistsError when `target` exists: what is in use is never changed under its reader.
    A block that fails leaves nothing behind.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists: name a new folder, or remove it first")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield staging
        for path in staging.iterdir():
            _sync(path)
        _sync(staging)
        staging.chmod(0o755)  # mkdtemp makes it private
        staging.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `target` when the block succeeds."""
    staging = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield staging
        _sync(staging)
        staging.replace(target)
        _sync(target.parent)
    finally:
        staging.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
