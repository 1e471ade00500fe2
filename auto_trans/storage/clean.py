"""Cleaning an output directory without ever deleting what is not ours."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Union

from auto_trans.errors import CheckpointError, OutputBusyError, OutputError, ProtectedSourceError
from auto_trans.storage.temporary import find_busy

__all__ = ["check_cleanable", "clean_folders"]

PathLike = Union[str, "os.PathLike[str]"]


def check_cleanable(folders: Iterable[Path], protected: Iterable[PathLike]) -> None:
    """Checks that no protected path lies in a folder that would be deleted.

    Args:
        folders: The folders that are to be cleaned.
        protected: Source weights and strategies: files or folders, in any spelling (relative, with a trailing slash,
            through symlinks). What a folder's own symlinks lead to is protected, too.

    Raises:
        ProtectedSourceError: One does.
        CheckpointError: Where a protected path lies cannot be found out.
    """
    protected = [path for path in protected if path]
    for folder in folders:
        real = folder.resolve()
        for path in protected:
            for place in _places(path):
                if real == place or real in place.parents:
                    raise ProtectedSourceError(
                        f"{path} {_is_in(place, path, folder)}, which is cleaned at the start of a job with "
                        f"auto_trans_ckpt: True; move it to another place, or set another output_dir"
                    )


def clean_folders(folders: Iterable[Path], protected: Iterable[PathLike]) -> None:
    """Empties folders, and makes those that are missing.

    Args:
        folders: The folders to clean. One that is itself a symlink is replaced by a folder; what it led to is left alone.
        protected: What must survive, see `check_cleanable`.

    Raises:
        ProtectedSourceError: A folder holds something protected; nothing is deleted then.
        OutputBusyError: A live process is writing a file in a folder; nothing is deleted then.
        OutputError: A folder cannot be deleted or made.
    """
    folders = list(folders)
    check_cleanable(folders, protected)
    _check_idle(folders)
    for folder in folders:
        try:
            if folder.is_symlink() or folder.is_file():
                folder.unlink()
            elif folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True, mode=0o750)
        except OSError as e:
            raise OutputError(f"{folder} cannot be cleaned: {e}; set an output_dir that is writable") from e


def _check_idle(folders: Iterable[Path]) -> None:
    """Raises OutputBusyError if a live process writes in a folder."""
    for folder in folders:
        busy = None if folder.is_symlink() else find_busy(folder)
        if busy is not None:
            file, pid = busy
            raise OutputBusyError(
                f"{folder} is not cleaned, for process {pid} is writing {file}: another job or conversion uses it; wait for "
                f"that or end it, or set another output_dir"
            )


def _is_in(place: Path, path: PathLike, folder: Path) -> str:
    if place == folder.resolve():
        return "is a folder" if Path(path) == folder else f"is {folder}"
    return f"lies in {folder}" + ("" if place == Path(path) else f" (as {place})")


def _places(protected: PathLike) -> list[Path]:
    """Where a path and, for a folder of rank folders, its files really lie."""
    try:
        path = Path(protected).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError):
            path.stat()  # from Python 3.13 on, resolving does not tell of a link to itself
        return [path.resolve(), *_below(path)]
    except (OSError, RuntimeError) as e:  # RuntimeError: a home folder that nobody has, a link to itself
        raise CheckpointError(f"{protected} cannot be read: {e}; set it to a path that may be read") from e


def _below(path: Path) -> Iterator[Path]:
    for child in path.iterdir() if path.is_dir() else ():
        yield child.resolve()
        if child.name.startswith("rank_") and child.is_dir():
            yield from (grandchild.resolve() for grandchild in child.iterdir())
