"""Where the bytes of files lie: a folder, or what a URL of fsspec names. Knows nothing of owners, expiry or HTTP.

Names come from this program alone (see table.py), never from a client.
"""

import os
from pathlib import Path
from typing import Any, Protocol


class Storage(Protocol):
    """All methods block. A missing file is a FileNotFoundError in `read`, and nothing in `delete`."""

    def write(self, name: str, content: bytes) -> None: ...
    def read(self, name: str, start: int, stop: int) -> bytes: ...
    def delete(self, name: str) -> None: ...


def storage_at(location: str) -> Storage:
    """Raises ValueError for a URL that this installation cannot open."""
    return Remote(location) if "://" in location else Folder(Path(location))


class Folder:
    """A file appears whole or not at all, is on the disk when `write` returns, and only this user can read it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, name: str, content: bytes) -> None:
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        unfinished = self.path / f"{name}.part"
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(self.path / name)
        folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)  # the name, too
        finally:
            os.close(folder)

    def read(self, name: str, start: int, stop: int) -> bytes:
        with (self.path / name).open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def delete(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)
        (self.path / f"{name}.part").unlink(missing_ok=True)


class Remote:
    """Object stores make an upload visible as a whole."""

    def __init__(self, url: str) -> None:
        import fsspec  # type: ignore[import-untyped]

        try:
            self.filesystem: Any
            self.filesystem, self.path = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ValueError(f"must be a folder or a URL that fsspec can open, got {url}: {error}") from None

    def write(self, name: str, content: bytes) -> None:
        self.filesystem.pipe_file(f"{self.path}/{name}", content)

    def read(self, name: str, start: int, stop: int) -> bytes:
        content: bytes = self.filesystem.cat_file(f"{self.path}/{name}", start=start, end=stop)
        return content

    def delete(self, name: str) -> None:
        try:
            self.filesystem.rm_file(f"{self.path}/{name}")
        except FileNotFoundError:
            pass
