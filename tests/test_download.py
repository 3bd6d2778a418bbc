"""Named corpora, from a server on the loopback with files of the same formats: breaks, wrong checksums, damage, a full disk."""
import gzip
import hashlib
import http.server
import io
import json
import resource
import subprocess
import sys
import threading
import types
import zipfile
from pathlib import Path

import pytest

import data
import download
from conftest import command, environment, here
from run import InputError


class Server:
    """Serves self.files, {path: bytes}; self.fault changes one answer. Asked ranges are kept in self.asked."""

    def __init__(self):
        outer = self
        self.files, self.fault, self.asked, self.digests = {}, None, [], {}

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append((self.path, self.headers.get("Range")))
                fault, outer.fault = outer.fault, None
                body = outer.files.get(self.path.removeprefix("/cdn"))
                if body is None:
                    return self.send_error(404)
                if not self.path.startswith("/cdn"):          # as Hugging Face: on to where the file is, with its sha256
                    self.send_response(302)
                    self.send_header("X-Linked-ETag", f'"{outer.digests.get(self.path, hashlib.sha256(body).hexdigest())}"')
                    self.send_header("Location", "/cdn" + self.path)
                    self.end_headers()
                    outer.fault = fault
                    return None
                start = int(self.headers["Range"][6:-1]) if self.headers.get("Range") and fault != "no ranges" else 0
                if start and start >= len(body):
                    return self.send_error(416)
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(body) - start))
                self.end_headers()
                self.wfile.write(body[start:start + len(body) // 3] if fault == "break" else body[start:])
                if fault == "break":
                    self.connection.close()

            def log_message(self, *_):
                pass
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/"


@pytest.fixture
def server(monkeypatch, tmp_path):
    server = Server()
    for name in download.BASES:
        monkeypatch.setenv(f"{name.upper()}_URL", server.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    yield server
    server.http.shutdown()


@pytest.fixture
def shards(server, source_text):
    """Three shards of c4, as they are: JSON lines, in gzip."""
    texts = source_text.decode().split("\n\n")
    for i in range(3):
        lines = "".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in texts[i::3])
        server.files[f"/c4-train.{i:05d}-of-01024.json.gz"] = gzip.compress(lines.encode())
    return server, texts


def load(name="c4:3"):
    corpus = data.load(name)
    return corpus.train.tobytes() + b"\0" + corpus.val.tobytes()


def test_shards_are_fetched_once_and_hold_the_text(shards):
    server, texts = shards
    found = load()
    assert sorted(found.split(b"\0")) == sorted(text.encode() for text in texts if text)
    assert len(server.asked) == 6 and load() == found and len(server.asked) == 6
    assert len(load("c4:2")) < len(found) and len(server.asked) == 6                               # no more than were asked for, and none again
    assert {path.name for path in Path("data/downloads/c4").iterdir()} == {path[1:] for path in server.files}


def test_a_broken_connection_is_gone_on_with(shards):
    server, _ = shards
    whole, path = len(server.files["/c4-train.00000-of-01024.json.gz"]), Path("data/downloads/c4/c4-train.00000-of-01024.json.gz.part")
    for tries in range(1, 3):
        server.fault = "break"
        with pytest.raises(InputError, match="the same command goes on"):
            load("c4:1")
        assert 0 < path.stat().st_size < whole
    kept = path.stat().st_size
    load("c4:1")
    assert server.asked[-1][1] == f"bytes={kept}-" and not path.exists()


def test_a_server_without_ranges_starts_again(shards):
    server, _ = shards
    server.fault = "break"
    with pytest.raises(InputError):
        load("c4:1")
    server.fault = "no ranges"
    once = load("c4:1")
    assert hashlib.sha256(Path("data/downloads/c4/c4-train.00000-of-01024.json.gz").read_bytes()).hexdigest() == \
        hashlib.sha256(server.files["/c4-train.00000-of-01024.json.gz"]).hexdigest() and once


def test_a_wrong_checksum_is_deleted_and_fetched_again(shards):
    server, _ = shards
    name = "/c4-train.00000-of-01024.json.gz"
    server.digests[name] = "0" * 64
    with pytest.raises(InputError, match="sha256"):
        load("c4:1")
    assert not list(Path("data/downloads/c4").iterdir())
    del server.digests[name]
    assert load("c4:1")


def test_a_truncated_shard_is_deleted_and_fetched_again(shards):
    server, _ = shards
    name = "/c4-train.00001-of-01024.json.gz"
    good, server.files[name] = server.files[name], server.files[name][:-500]                       # whole as sent, with a checksum that fits
    with pytest.raises(InputError, match="damaged.*fetches it again"):
        load("c4:2")
    server.files[name] = good
    assert load("c4:2")


def test_a_full_disk_keeps_what_came(shards):
    server, _ = shards
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    arguments = ("train_ar.py", "--data", "c4:1", "--flops", "1e9", "--width", 16, "--context", 64)
    done = subprocess.run(command(*arguments), cwd=".", env=environment(), preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr, done.stderr
    assert Path("data/downloads/c4/c4-train.00000-of-01024.json.gz.part").stat().st_size == 20_000
    done = here(Path.cwd(), *arguments)
    assert done.returncode == 0 and server.asked[-1][1] == "bytes=20000-", done.stderr


def test_only_as_many_shards_as_the_budget_reads(shards):
    assert download.with_shards("c4", 10) == "c4:1" and download.with_shards("c4", 1e10) == "c4:15" and download.with_shards("c4", 1e15) == "c4:1024"
    assert download.with_shards("c4:7", 1e10) == "c4:7" and download.with_shards("enwik8", 1e10) == "enwik8" and download.with_shards("notes.txt", 1) == "notes.txt"
    server, _ = shards
    done = here(Path.cwd(), "train_mdm.py", "--data", "c4", "--flops", "1e9", "--width", 16, "--context", 64, "--out", "run")
    assert done.returncode == 0 and len(server.asked) == 2, done.stderr
    assert json.loads(Path("run/result.json").read_text())["corpus"]["name"] == "c4-1"


def test_a_dry_run_of_a_study_reads_one_shard(shards):
    """Its commands name as many as the largest budget reads."""
    server, _ = shards
    done = here(Path.cwd(), "scaling.py", "--data", "c4", "--budgets", 1e13, 1e15, "--vocab", 300, "--dry-run")
    assert done.returncode == 0 and len(server.asked) == 2, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 32 and all(line.startswith("python ") and " --data c4:3 " in line and line.endswith("-c4-3") for line in lines)
    assert "32 runs, 1.62e+16 FLOPs: 0.011 H100-hours" in done.stderr


def test_enwik_is_unpacked_and_checked(server, source_text, monkeypatch):
    def zipped(text):
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("enwik8", text)
        return archive.getvalue()
    monkeypatch.setitem(download.WHOLE, "enwik8", (len(source_text), hashlib.sha256(source_text).hexdigest()))
    for wrong in (zipped(source_text[:-1]), zipped(source_text)[:-100]):
        server.files["/enwik8.zip"] = wrong
        with pytest.raises(InputError, match="fetches it again"):
            data.load("enwik8")
    server.files["/enwik8.zip"] = zipped(source_text)
    data.load("enwik8")
    assert Path("data/downloads/enwik8/enwik8").read_bytes() == source_text and not list(Path("data/downloads/enwik8").glob("*.zip*"))


def test_slimpajama_needs_zstd_and_says_so(server, source_text, monkeypatch):
    lines = "".join(json.dumps({"text": text, "meta": {}}) + "\n" for text in source_text.decode().split("\n\n"))
    server.files["/chunk1/example_train_0.jsonl.zst"] = gzip.compress(lines.encode())              # gzip stands in for zstd
    monkeypatch.setattr(data, "zstd", lambda: None)
    with pytest.raises(InputError, match="pip install zstandard"):
        data.load("slimpajama:1")
    monkeypatch.setattr(data, "zstd", lambda: types.SimpleNamespace(open=gzip.open))
    assert len(data.load("slimpajama:1").train) > 200_000


@pytest.mark.skipif(sys.version_info < (3, 14), reason="Python's own zstd is from 3.14")
def test_zstd_of_python(server, source_text):
    from compression import zstd
    server.files["/chunk1/example_train_0.jsonl.zst"] = zstd.compress(b"".join(json.dumps({"text": line}).encode() + b"\n" for line in source_text.decode().split("\n\n")))
    assert len(data.load("slimpajama:1").train) > 200_000


@pytest.mark.parametrize("name, word", [("c4:0", "1 to 1,024"), ("c4:x", "1 to 1,024"), ("c4:2000", "1 to 1,024"), ("enwik8", "404"), ("c4:1", "404")])
def test_bad_names_and_missing_files(server, name, word):
    with pytest.raises(InputError, match=word):
        data.load(name)


def test_no_server(server, monkeypatch):
    monkeypatch.setenv("C4_URL", "http://127.0.0.1:9/")
    with pytest.raises(InputError, match="refused"):
        data.load("c4:1")
