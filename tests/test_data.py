"""data.py: what a corpus becomes, downloads from a local server, caches, and training sequences."""
import gzip
import hashlib
import http.server
import io
import json
import os
import select
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_one_line, here

import data
from data import InputError, Sequences


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Each test has its own current folder, and so its own cache."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def text_file(source_text):
    Path("text.txt").write_bytes(source_text)


def streams_of(corpus):
    return corpus.train.tobytes(), corpus.val.tobytes()


def load_both():
    return data.load("text.txt"), data.load("text.txt", "bpe", 300)


# ---- From files to a stream.

def test_documents_are_split_by_their_content_and_joined_by_zero_bytes(source_text):
    texts = [source_text[i:i + 7500] for i in range(0, 300_000, 7500)]
    Path("texts/.git").mkdir(parents=True)
    Path("texts/.git/hidden").write_bytes(b"hidden")
    for i, text in enumerate(texts):
        Path(f"texts/{i:02}.py").write_bytes(text)
    corpus = data.load("texts")
    train, val = (stream.split(b"\0") for stream in streams_of(corpus))
    assert sorted(train + val) == sorted(texts)
    assert max(map(data.bucket, val)) < min(map(data.bucket, train))
    assert 0.049 <= len(corpus.val) / (len(corpus.train) + len(corpus.val)) < 0.15
    assert corpus.meta["sha256"] == hashlib.sha256(b"\0".join(texts)).hexdigest()
    assert corpus.meta["train_bytes"] == len(corpus.train)


def test_the_sha256_is_of_the_text_that_is_stored(text_file, monkeypatch):
    """Also if a file grows between the two times it is read."""
    documents, written = data.documents, []

    def growing(*arguments):
        written[:] = documents(*arguments)
        yield from written
        with open("text.txt", "ab") as file:
            file.write(b"one more line\n")
    monkeypatch.setattr(data, "documents", growing)
    corpus = data.load("text.txt")
    assert sorted(b"\0".join(streams_of(corpus)).split(b"\0")) == sorted(written)
    assert corpus.meta["sha256"] == hashlib.sha256(b"\0".join(written)).hexdigest()
    assert b"".join(written).endswith(b"one more line\n")


def test_all_formats_give_the_same_stream(source_text):
    texts = source_text.decode("latin-1").split("\n\n")
    lines = "\n".join(json.dumps({"text": text}) for text in texts).encode()
    for name, content in (("a.jsonl", lines), ("b.jsonl.gz", gzip.compress(lines)),
                          ("c.json.gz", gzip.compress(lines))):
        Path(name).write_bytes(content)
        _, files, per_file = data.find_files(name)
        assert list(data.documents(files, per_file)) == [text.encode() for text in texts]


def test_a_lone_file_is_cut_at_line_ends_and_nothing_is_lost(source_text):
    for name, content in (("a.txt", source_text), ("b.txt.gz", gzip.compress(source_text))):
        Path(name).write_bytes(content)
        pieces = list(data.documents([Path(name)], False))
        assert b"".join(pieces) == source_text and len(pieces) > 15
        assert all(piece.endswith(b"\n") for piece in pieces[:-1])
    assert list(data.documents([Path("a.txt")], True)) == [source_text]


def test_bpe_tokens_decode_to_the_same_stream(text_file):
    raw, bpe = load_both()
    assert tuple(map(bpe.tokenizer.decode, (bpe.train, bpe.val))) == streams_of(raw)
    assert bpe.meta["bytes_per_token"] == len(raw.train) / len(bpe.train) > 1.2
    assert raw.tokens(512) == 512 and bpe.tokens(512) % 16 == 0
    assert abs(bpe.tokens(512) - 512 / bpe.meta["bytes_per_token"]) <= 8


def test_many_cores_encode_like_one(text_file, monkeypatch):
    _, bpe = load_both()
    monkeypatch.setattr(data, "MANY_CORES_FROM", 0)
    monkeypatch.setattr(data, "BLOCK", 50_000)
    path, = data.CACHE.glob("text-*-byte/train.bin")
    blocks = list(data.blocks_of(path))
    assert len(blocks) > 4 and all(block.endswith(b"\0") for block in blocks[:-1])
    assert b"".join(blocks) == path.read_bytes()
    assert (np.concatenate(list(data.encode_file(bpe.tokenizer.encode, path))) == bpe.train).all()


# ---- Caches.

def test_a_corpus_is_prepared_once_and_again_when_its_source_changes(source_text, text_file):
    load_both()
    files = {path: path.stat().st_mtime_ns for path in data.CACHE.rglob("*.bin")}
    load_both()
    assert files == {path: path.stat().st_mtime_ns for path in files} and len(files) == 4
    Path("text.txt").write_bytes(source_text[:200_000])
    raw, bpe = load_both()
    assert raw.meta["train_bytes"] < 200_000
    assert tuple(map(bpe.tokenizer.decode, (bpe.train, bpe.val))) == streams_of(raw)


DAMAGES = {
    "cut": lambda folder: os.truncate(folder / "train.bin", 1000),
    "removed": lambda folder: (folder / "val.bin").unlink(),
    "half a meta": lambda folder: os.truncate(folder / "meta.json", 30),
    "foreign meta": lambda folder: (folder / "meta.json").write_text("[1, 2]"),
    "old meta": lambda folder: (folder / "meta.json").write_text('{"name": "text"}')}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_cache_is_made_again(text_file, damage):
    good = [(streams_of(corpus), corpus.meta) for corpus in load_both()]
    for folder in data.CACHE.glob("text-*"):
        DAMAGES[damage](folder)
    # What a process that was killed leaves.
    Path("data/.preparing").mkdir()
    assert [(streams_of(corpus), corpus.meta) for corpus in load_both()] == good
    assert not list(data.CACHE.glob(".preparing"))


def test_two_corpora_of_one_name_have_two_caches(source_text):
    for name, text in (("a", source_text[:100_000]), ("b", source_text[100_000:])):
        Path(name).mkdir()
        Path(name, "text.txt").write_bytes(text)
    first, second = (data.load(f"{name}/text.txt") for name in "ab")
    assert first.meta["sha256"] != second.meta["sha256"]
    assert len(list(data.CACHE.glob("text-*-byte"))) == 2


def test_of_two_processes_one_prepares_a_corpus_and_the_other_waits_and_says_so(
        text_file, monkeypatch):
    documents, others = data.documents, []

    def while_another_comes(*arguments):
        if not others:
            code = "import data; print(data.load('text.txt').meta)"
            others.append(subprocess.Popen([sys.executable, "-c", code], text=True,
                                           stdout=subprocess.PIPE, stderr=subprocess.PIPE))
            assert select.select([others[0].stderr], [], [], 60)[0], "it does not say so"
        return documents(*arguments)
    monkeypatch.setattr(data, "documents", while_another_comes)
    meta = data.load("text.txt").meta
    stdout, stderr = others[0].communicate(timeout=60)
    assert stdout == f"{meta}\n"
    assert stderr == "waiting for another process, which prepares a corpus\n"


# ---- Bad input.

def test_bad_sources_are_refused_and_leave_nothing():
    os.mkfifo("fifo")
    Path("empty").mkdir()
    Path("small.txt").write_bytes(b"small")
    Path("cut.txt.gz").write_bytes(gzip.compress(os.urandom(5000))[:3000])
    Path("cut.zip").write_bytes(b"PK")
    bad = {"nowhere": "neither pysrc, enwik8, enwik9, c4, slimpajama, nor a file",
           "/dev/zero": "too small", "fifo": "too small", "empty": "too small",
           "small.txt": "too small", "cut.txt.gz": "damaged", "cut.zip": "damaged",
           "c4": "neither", "c4:0": "too small", "c4:x": "neither"}
    for name, word in bad.items():
        with pytest.raises(InputError, match=word):
            data.load(name)
    assert [path.name for path in data.CACHE.iterdir()] == [".lock"]
    assert Path("cut.txt.gz").exists()


@pytest.mark.parametrize("vocab_size, word", [(256, "257 to 65,536"), (60_000, "too small")])
def test_an_impossible_vocabulary_is_refused(text_file, vocab_size, word):
    with pytest.raises(InputError, match=word):
        data.load("text.txt", "bpe", vocab_size)


@pytest.mark.parametrize("line", [
    "{", "[" * 100_000, '{"text": 3}', '{"other": "x"}', "3", "\xff", '{"text": "\\ud800"}'])
def test_a_bad_line_of_jsonl_is_named(line):
    Path("a.jsonl").write_bytes(b'{"text": "fine"}\n' + line.encode("latin-1"))
    with pytest.raises(InputError, match="a.jsonl: a line is no object with a text"):
        data.load("a.jsonl")


def test_the_script_shows_both_tokenizations_or_one_line(text_file):
    assert here(".", "data.py", "--data", "text.txt", "--vocab", 300).stdout.count("|") > 200
    assert_one_line(here(".", "data.py", "--data", "nowhere"), "nowhere")


# ---- Downloads, from a server that may be hostile.

class Server(http.server.BaseHTTPRequestHandler):
    """Serves content, half of it if it is broken."""
    content = b""
    broken = False
    asked = []

    def do_GET(self):
        self.asked.append(self.path)
        if "missing" in self.path:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content[:len(self.content) // (2 if self.broken else 1)])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(source_text, monkeypatch):
    """Serve shards of c4, and enwik8, from this machine."""
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{served.server_port}"
    Server.broken, Server.asked = False, []
    lines = [json.dumps({"text": text}) for text in source_text.decode("latin-1").split("\n\n")]
    Server.content = gzip.compress("\n".join(lines).encode())
    shards = (9, 1e5, f"{address}/en/", lambda i: f"shard-{i}.json.gz")
    monkeypatch.setitem(data.SHARDS, "c4", shards)
    monkeypatch.setitem(data.ARCHIVES, "enwik8", f"{address}/a.zip")
    monkeypatch.setitem(data.ARCHIVES, "enwik9", f"{address}/missing.zip")
    yield Server
    served.shutdown()


@pytest.mark.parametrize("fault", ["cut", "not gzip"])
def test_a_shard_is_downloaded_once_and_a_damaged_one_is_deleted_and_named(server, fault):
    good, server.broken = server.content, fault == "cut"
    server.content = good if server.broken else b"not gzip"
    with pytest.raises(InputError, match=r"c4/shard-0.json.gz is damaged .*downloads it again"):
        data.load("c4:1")
    server.content, server.broken = good, False
    for _ in range(2):
        assert data.load("c4:1").meta["documents"] > 1000
    assert server.asked == ["/en/shard-0.json.gz"] * 2


def test_a_dead_mirror_is_named_with_another_way(server):
    with pytest.raises(InputError, match=r"http://\S+: .*404.*--data: pysrc, enwik8, .*slimpajama"):
        data.load("enwik9")
    assert not list(data.CACHE.rglob("*.*"))


def test_an_archive_is_read_where_it_lies(server, source_text):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../escaped", source_text)
    server.content = packed.getvalue()
    corpus = data.load("enwik8")
    assert corpus.meta["name"] == "enwik8"
    assert len(b"".join(streams_of(corpus)).replace(b"\0", b"")) == len(source_text)
    assert not list(Path("..").rglob("escaped"))


# ---- Sequences.

def test_an_epoch_reads_every_sequence_once():
    sequences = Sequences(np.arange(1000, dtype=np.uint16), 10)
    epoch = np.concatenate([sequences.batch(3, step, 11) for step in range(9)])
    starts = epoch[:, 0]
    assert len(set(starts)) == 99 and len(set(starts % 10)) == 1
    assert (epoch == starts[:, None] + np.arange(10)).all()
    # The next one is cut and ordered anew.
    assert not set(sequences.batch(3, 9, 11)[:, 0]) <= set(starts)


def test_a_batch_is_a_pure_function_of_seed_and_step():
    sequences = Sequences(np.arange(1000, dtype=np.uint16), 10)
    first = sequences.batch(3, 20, 4)
    assert (first == Sequences(sequences.stream, 10).batch(3, 20, 4)).all()
    assert (first != sequences.batch(4, 20, 4)).any() and (first != sequences.batch(3, 21, 4)).any()
    # The batches of the published runs.
    assert sequences.batch(0, 0, 3)[:, 0].tolist() == [828, 368, 208]


def test_validation_sequences_do_not_overlap():
    sequences = Sequences(np.arange(1000, dtype=np.uint16), 10)
    spaced = sequences.spaced(30)
    assert spaced.shape == (30, 10) and len(np.unique(spaced)) == 300
    assert sequences.spaced(10**6).shape == (100, 10)


def test_a_text_of_less_than_two_sequences_is_refused():
    with pytest.raises(InputError, match="19 tokens are too few"):
        Sequences(np.zeros(19, dtype=np.uint8), 10)
