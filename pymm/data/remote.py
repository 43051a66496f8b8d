"""Shards opened as byte streams: local files, http(s) and object stores, and never a command.

`webdataset.gopen` hands `pipe:` to a shell and http(s), gs, hf and others to curl or gsutil. None of that is
reachable from here: a scheme that is not listed is refused, and what is listed is opened in this process.
"""

from __future__ import annotations

import io
import re
import time
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any, cast
from urllib.parse import urlsplit

from pymm.data._errors import fail

HTTP = ("http", "https")
# What fsspec opens without starting a program. Chained URLs ("a::b") stay out: their parts could be anything.
STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "memory")
SHELL = re.compile(r"[|`;<>\x00-\x1f]|\$[({]|&&")
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]+):")
RETRIES = 5
FIRST_WAIT_S = 0.2
TIMEOUT_S = 60.0


def scheme(source: str) -> str:
    """The scheme of a URL in lower case; "" for a path."""
    match = SCHEME.match(source)
    return match.group(1).lower() if match else ""


def check_source(source: str) -> None:
    """Refuse whatever could reach a shell, before anything is opened.

    Raises:
        ValueError: for `pipe:`, a shell's metacharacters, and every scheme that is not http, https, file or
            one of the object stores.
    """
    if source.strip().lower().startswith("pipe:"):
        fail("shards", "source", "a path or a URL, never a shell pipe", repr(source))
    if SHELL.search(source):
        fail("shards", "source", "a path or a URL without shell metacharacters", repr(source))
    kind = scheme(source)
    if kind and kind not in (*HTTP, *STORES, "file"):
        allowed = ", ".join((*HTTP, "file", *STORES))
        fail("shards", "source", f"a path or a URL of {allowed}", repr(source))
    if "::" in source and kind:
        fail("shards", "source", "one URL, not a chain of them", repr(source))


def local_path(source: str) -> Path | None:
    """The path that a source names on this machine; None for a remote one."""
    kind = scheme(source)
    if kind == "file":
        return Path(urllib.request.url2pathname(urlsplit(source).path))
    return None if kind else Path(source)


def open_shard(source: str) -> IO[bytes]:
    """Open one shard for reading.

    Raises:
        ValueError: when `check_source` refuses it.
        OSError: when it cannot be opened; the message names it.
    """
    check_source(source)
    path = local_path(source)
    try:
        if path is not None:
            return path.open("rb")
        if scheme(source) in HTTP:
            return cast(IO[bytes], io.BufferedReader(_HttpStream(source), buffer_size=1 << 20))
        return cast(IO[bytes], filesystem(source).open(source, "rb"))
    except (OSError, HTTPException) as error:
        raise OSError(f"shards: cannot open {source}: {error}") from error


def filesystem(source: str) -> Any:
    """The fsspec file system of an object-store URL."""
    try:
        import fsspec
    except ImportError as error:
        raise ImportError(f"{source}: object stores need fsspec: pip install 'pymm[remote]'") from error
    try:
        return fsspec.filesystem(scheme(source))
    except ImportError as error:
        raise ImportError(f"{source}: fsspec lacks the driver of this store: {error}") from error


def _opener() -> urllib.request.OpenerDirector:
    """http and https alone: a redirect cannot lead to a file or to another protocol."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener


class _HttpStream(io.RawIOBase):
    """A download that goes on where it broke off, so that a shaky line does not look like a short shard."""

    def __init__(self, url: str) -> None:
        self.url, self.position = url, 0
        self.opener = _opener()
        self.response: Any = self._connect()
        length = self.response.headers.get("Content-Length")
        self.length = int(length) if length is not None else None
        self.version = _version(self.response)

    def _connect(self) -> Any:
        headers = {"Accept-Encoding": "identity"}
        if self.position:
            headers["Range"] = f"bytes={self.position}-"
        return self.opener.open(urllib.request.Request(self.url, headers=headers), timeout=TIMEOUT_S)

    def _resume(self) -> None:
        response = self._connect()
        if _version(response) != self.version:
            raise OSError("it changed while it was read")
        left = self.position if response.status != 206 else 0  # a server without ranges starts from the top
        while left:
            n = len(response.read(min(left, 1 << 20)))
            if n == 0:
                raise OSError(f"ended before byte {self.position}")
            left -= n
        self.response = response

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        problem: Exception | None = None
        for attempt in range(RETRIES + 1):
            try:
                if self.response is None:
                    time.sleep(FIRST_WAIT_S * 2 ** (attempt - 1))
                    self._resume()
                n = int(self.response.readinto(buffer))
                if n or len(buffer) == 0 or self.length is None or self.position >= self.length:
                    self.position += n
                    return n
                problem = OSError(f"ended at byte {self.position} of {self.length}")
            except (OSError, HTTPException) as error:
                problem = error
            self._drop()
        raise OSError(f"shards: reading {self.url} broke off {RETRIES + 1} times: {problem}")

    def _drop(self) -> None:
        if self.response is not None:
            self.response.close()
            self.response = None

    def close(self) -> None:
        self._drop()
        super().close()


def _version(response: Any) -> str | None:
    """What tells one content of a URL from another: ranges are only good within the same one."""
    return response.headers.get("ETag") or response.headers.get("Last-Modified")
