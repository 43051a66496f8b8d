"""What a source names, and that no source reaches a shell."""

from __future__ import annotations

import gzip
import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pymm.data import list_shards, remote
from tests.data.shards import keys, loader, samples, tar_bytes, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(3):
        write(tmp_path / f"{i:02}.tar", samples(4 * i, 4 * i + 4))
    (tmp_path / "notes.txt").write_text("no shard")
    return tmp_path


def test_folder_glob_braces_list_and_url_name_the_same_shards(folder: Path) -> None:
    expected = [str(folder / f"{i:02}.tar") for i in range(3)]
    assert list_shards(folder) == expected
    assert list_shards(str(folder / "*.tar")) == expected
    assert list_shards(str(folder / "{00..02}.tar")) == expected
    assert list_shards(expected) == expected
    assert list_shards([folder / "00.tar", f"file://{folder}/0[12].tar"]) == expected
    assert list_shards(f"file://{folder}/01.tar") == expected[1:2]


def test_compressed_shards(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(tar_bytes(samples(0, 3))))
    assert keys(loader(tmp_path).epoch(0)) == ["s000", "s001", "s002"]


def test_nothing_there_is_an_error(tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "no.tar", str(tmp_path / "*.tar"), []):
        with pytest.raises(FileNotFoundError, match=r"matches n|holds no"):
            list_shards(source)


@pytest.mark.parametrize(
    "source",
    [
        "pipe:cat a.tar",
        "  PIPE:cat a.tar",
        "a.tar | sh",
        "a.tar; rm b",
        "a.tar && rm b",
        "$(touch x).tar",
        "`touch x`.tar",
        "a.tar > b",
        "a\nb.tar",
        "https://host/a.tar;id",
        "scp://host/a.tar",
        "sftp://host/a.tar",
        "ftps://host/a.tar",
        "htgs://bucket/a.tar",
        "ais://bucket/a.tar",
        "ssh://host/a.tar",
        "ext::sh -c id",
        "simplecache::s3://bucket/a.tar",
    ],
)
def test_what_could_reach_a_shell_is_refused(source: str, folder: Path) -> None:
    for form in (source, [str(folder / "00.tar"), source]):
        with pytest.raises(ValueError, match="shards: source must be"):
            loader(form)
    with pytest.raises(ValueError, match="shards: source must be"):
        remote.open_shard(source)


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **settings: object) -> None:
        raise AssertionError(f"started {args}")

    monkeypatch.setattr(subprocess.Popen, "__init__", forbidden)
    monkeypatch.setattr("os.system", forbidden)
    monkeypatch.setattr(sys.modules["webdataset.gopen"], "gopen", forbidden)
    monkeypatch.setenv("GOPEN_REWRITE", "/=pipe:cat /")


class Server(http.server.BaseHTTPRequestHandler):
    """Serves bytes; drops the line after `cut` bytes of each answer, with or without ranges."""

    content = b""
    cut: int | None = None
    ranges = True
    tag = "one"
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.headers.get("Range", ""))
        if self.path == "/moved.tar":
            self.send_response(302)
            self.send_header("Location", "file:///etc/passwd")
            self.end_headers()
            return
        if self.path != "/a.tar":
            self.send_error(404)
            return
        start = 0
        if self.ranges and "Range" in self.headers:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start else 200)
        self.send_header("ETag", self.tag)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        self.wfile.write(self.content[start:][: self.cut])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, type[Server]]]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)
    handler = type("Handler", (Server,), {"content": tar_bytes(samples(0, 60)), "asked": []})
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}", handler
    httpd.shutdown()
    thread.join()
    httpd.server_close()


EVERY = [f"s{i:03}" for i in range(60)]


@pytest.mark.usefixtures("nothing_runs")
def test_http_without_a_command(server: tuple[str, type[Server]]) -> None:
    assert keys(loader(f"{server[0]}/a.tar").epoch(0)) == EVERY


@pytest.mark.usefixtures("nothing_runs")
def test_local_files_without_a_command(folder: Path) -> None:
    assert keys(loader(folder).epoch(0)) == EVERY[:12]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_line_that_breaks_is_taken_up_again(server: tuple[str, type[Server]], ranges: bool) -> None:
    url, handler = server
    handler.cut, handler.ranges = (30_000, True) if ranges else (len(handler.content) // 2, False)
    batches = loader(f"{url}/a.tar")
    if ranges:
        assert keys(batches.epoch(0)) == EVERY
        assert not batches.report.skipped
        assert handler.asked[1] == "bytes=30000-"
    else:  # every answer starts anew and ends at the half: there is no way on, and that is no short shard
        with pytest.raises(OSError, match="broke off"):
            keys(batches.epoch(0))


def test_a_file_that_changes_meanwhile_is_an_error(server: tuple[str, type[Server]]) -> None:
    url, handler = server
    stream = remote.open_shard(f"{url}/a.tar")
    handler.cut = 10_000
    stream.close()
    stream = remote.open_shard(f"{url}/a.tar")
    handler.tag = "two"
    with pytest.raises(OSError, match="changed while it was read"):
        stream.read()


@pytest.mark.parametrize("name", ["moved.tar", "missing.tar"])
def test_web_errors_name_the_shard(server: tuple[str, type[Server]], name: str) -> None:
    with pytest.raises(OSError, match=f"cannot open .*{name}"):
        keys(loader(f"{server[0]}/{name}").epoch(0))


@pytest.mark.usefixtures("nothing_runs")
def test_object_store() -> None:
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    for i in range(2):
        store.pipe(f"/pymm-test/{i}.tar", tar_bytes(samples(2 * i, 2 * i + 2)))
    assert keys(loader("memory://pymm-test/*.tar").epoch(0)) == EVERY[:4]
    assert keys(loader("memory://pymm-test/1.tar").epoch(0)) == EVERY[2:4]


def test_a_store_without_its_driver_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec = pytest.importorskip("fsspec")

    def missing(name: str) -> None:
        raise ImportError("install s3fs")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(ImportError, match=r"s3://bucket/a\.tar: .*install s3fs"):
        keys(loader("s3://bucket/a.tar").epoch(0))


def test_a_shard_that_cannot_be_opened_is_an_error(folder: Path) -> None:
    batches = loader(folder)
    (folder / "01.tar").unlink()
    with pytest.raises(OSError, match=r"cannot open .*01\.tar"):
        keys(batches.epoch(0))
    (folder / "01.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"01\.tar is no tar archive"):
        keys(batches.epoch(0))
    (folder / "01.tar").write_bytes(b"certainly no archive" * 1000)
    with pytest.raises(ValueError, match=r"01\.tar is no tar archive"):
        keys(batches.epoch(0))
