"""The pointer file: which bundle is in force, and which were before it.

A text file. Its first line names the folder of the bundle in force, relative to the file; each
further line the one before, newest first. It is replaced whole, so that whoever reads it sees the
old one or the new one.
"""

import os
from pathlib import Path
from tempfile import NamedTemporaryFile

from contract.bundle import Manifest, read_manifest, verify_files
from contract.errors import BundleError

# So far back one can roll; older ones are forgotten.
MAX_LINES = 20


def bundle_in_force(path: Path) -> Path:
    """Return the bundle that `path` stands for: itself, or what it names if it is a pointer file.

    Raises BundleError when a pointer file cannot be read or names nothing.
    """
    return _folders(path)[0] if path.is_file() else path


def publish(pointer: Path, folder: Path) -> Manifest:
    """Let `pointer` name `folder`, a bundle whose files are all there and unaltered.

    A pointer file that does not exist is made. Raises BundleError, and changes nothing, when the
    bundle does not hold.
    """
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    resolved = folder.resolve()
    earlier = _folders(pointer) if pointer.exists() else []
    _write(pointer, [resolved, *(one for one in earlier if one != resolved)])
    return manifest


def rollback(pointer: Path) -> Manifest:
    """Let `pointer` name the bundle before the one in force, which is forgotten.

    Raises BundleError, and changes nothing, when there is none or it does not hold any more.
    """
    _, *earlier = _folders(pointer)
    if not earlier:
        raise BundleError(f"pointer {pointer}: names one bundle only, there is none to go back to")
    manifest = read_manifest(earlier[0])
    verify_files(earlier[0], manifest)
    _write(pointer, earlier)
    return manifest


def _folders(pointer: Path) -> list[Path]:
    """Return the folders that a pointer file names, the one in force first."""
    try:
        lines = pointer.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"pointer {pointer}: cannot be read: {error}") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise BundleError(f"pointer {pointer}: is empty, its first line must name a bundle")
    base = pointer.resolve().parent
    return [(base / name).resolve() for name in names]


def _write(pointer: Path, folders: list[Path]) -> None:
    target = pointer.resolve()
    names = [_name_within(target.parent, folder) for folder in folders[:MAX_LINES]]
    try:
        with NamedTemporaryFile(
            "w", encoding="utf-8", dir=target.parent, prefix=f".{target.name}-", delete=False
        ) as file:
            staging = Path(file.name)
            file.write("".join(f"{name}\n" for name in names))
            file.flush()
            os.fsync(file.fileno())
        # A temporary file is its owner's alone; who serves may be another user.
        staging.chmod(0o644)
        staging.replace(target)
        _sync(target.parent)
    except OSError as error:
        raise BundleError(f"pointer {pointer}: cannot be written: {error}") from error


def _name_within(base: Path, folder: Path) -> str:
    name = str(folder.relative_to(base)) if folder.is_relative_to(base) else str(folder)
    if name != name.strip() or len(name.splitlines()) != 1:
        raise BundleError(f"bundle {folder}: its name cannot stand in one line of a pointer file")
    return name


def _sync(folder: Path) -> None:
    """Let a renaming outlive the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
