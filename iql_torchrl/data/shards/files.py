"""Where shards are: a folder or an address of ``fsspec``; and copies of them on this machine."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iql_torchrl.data.schema import DatasetError
from iql_torchrl.files import leads_below

__all__ = ["ShardFiles", "is_address"]


def is_address(location: str | Path) -> bool:
    """Whether ``location`` is an address such as ``s3://bucket/log`` and not a path."""
    return isinstance(location, str) and "://" in location


@dataclass(frozen=True)
class ShardFiles:
    """The files of a folder of shards, by their paths in it.

    Attributes:
        location: a path, or an address of ``fsspec`` (``s3://``, ``gs://``, ``https://``, ...).
        cache: the folder in which copies of an address's shards stay; None deletes each copy when
            its rows are in memory. Not used for a path.
        storage_options: of the file system of an address, such as ``{"anon": True}``.
    """

    location: str
    cache: Path | None = None
    storage_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_local(self) -> bool:
        return not is_address(self.location)

    def read(self, name: str) -> bytes:
        """The content of one file.

        Raises ``FileNotFoundError``, and ``DatasetError`` where the address cannot be reached.
        """
        self._check(name)
        if self.is_local:
            return (Path(self.location) / name).read_bytes()
        with self._reaching():
            system, path = self._opened()
            content: bytes = system.cat_file(f"{path}/{name}")
            return content

    @contextlib.contextmanager
    def folder(
        self, name: str, files: Callable[[], Sequence[str]], key: str, check: Callable[[Path], None]
    ) -> Iterator[Path]:
        """Inside, a folder of this machine with the files of the folder ``name``.

        ``files`` gives their paths in it, and is called only where they are copied. ``key`` is a
        text that no other content has: of the copy in ``cache``. ``check`` raises ``DatasetError``
        where a folder has not the expected content.
        """
        self._check(name)
        if not key.isalnum():
            raise DatasetError(
                f"{self.location}: {name!r} has the digest {key!r}; expected letters and digits. The "
                "index is damaged or not from this package: build the shards again."
            )
        if self.is_local:
            folder = Path(self.location) / name
            check(folder)
            yield folder
            return
        if self.cache is None:
            with tempfile.TemporaryDirectory(prefix="iql-torchrl-shard-") as temporary:
                self._copy(name, files(), Path(temporary), check)
                yield Path(temporary)
            return
        folder = self.cache / f"{name}-{key}"
        if not folder.is_dir():
            self._copy_to_cache(name, files(), folder, check)
        check(folder)
        yield folder

    def _copy_to_cache(
        self, name: str, files: Sequence[str], folder: Path, check: Callable[[Path], None]
    ) -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            self._copy(name, files, staging, check)
            os.rename(staging, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process has copied it meanwhile
                raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _copy(
        self, name: str, files: Sequence[str], to: Path, check: Callable[[Path], None]
    ) -> None:
        system, path = self._opened()
        for file in files:
            self._check(file)
            (to / file).parent.mkdir(parents=True, exist_ok=True)
            try:
                with self._reaching():
                    system.get_file(f"{path}/{name}/{file}", str(to / file))
            except FileNotFoundError:
                raise DatasetError(
                    f"{self.location}/{name}: incomplete ({file} is missing); upload the folder "
                    "again."
                ) from None
        try:
            check(to)
        except DatasetError as error:
            raise DatasetError(
                f"{self.location}/{name}: its copy on this machine is damaged: {error}"
            ) from error

    def _check(self, name: str) -> None:
        """Raise ``DatasetError`` unless the path leads to a place below the folder."""
        if not leads_below(name):
            raise DatasetError(
                f"{self.location}: it names the file or folder {name!r}; expected a path below its own "
                "folder. The index is damaged or not from this package: build the shards again."
            )

    def _opened(self) -> tuple[Any, str]:
        try:
            from fsspec.core import url_to_fs
        except ImportError as error:
            raise DatasetError(
                f'{self.location}: addresses need fsspec; run pip install "iql_torchrl[remote]", or '
                "copy the folder to this machine."
            ) from error
        with self._reaching():
            system, path = url_to_fs(self.location, **self.storage_options)
            return system, str(path).rstrip("/")

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        """Turn what file systems raise, of many types, into one sentence."""
        try:
            yield
        except (FileNotFoundError, DatasetError):
            raise
        except Exception as error:
            raise DatasetError(
                f"{self.location}: cannot be read ({type(error).__name__}: {error}); check the "
                "address, the connection, the credentials, and that fsspec's package for this kind of "
                "address is installed (s3fs, gcsfs, ...)."
            ) from error
