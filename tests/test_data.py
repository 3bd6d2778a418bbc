"""data.py: the BPE against a brute force, corpora that lose no byte, batches that are pure."""
import gzip
import io
import json
import random
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT, environment, execute

import bpe
import data
from run import InputError

ALPHABETS = [b"ab", b"ab ", b"aaab\x00 ", b"it's ll\n", b"\xc8\xc9 ", bytes(range(256))]


def brute_force_bpe(text, vocab_size):
    words, merges = [[bytes([b]) for b in word] for word in bpe.PRETOKEN.findall(text)], []
    while len(merges) < vocab_size - 256:
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        if not counts:
            break
        merges.append(max(counts, key=lambda pair: (counts[pair], pair)))
        words = [merge(word, merges[-1]) for word in words]
    return merges


def merge(word, pair):
    out, i = [], 0
    while i < len(word):
        width = 2 if tuple(word[i:i + 2]) == pair else 1
        out.append(b"".join(word[i:i + width]))
        i += width
    return out


def brute_force_encode(merges, text):
    out = []
    for word in bpe.PRETOKEN.findall(text):
        word = [bytes([b]) for b in word]
        while present := [pair for pair in merges if pair in set(zip(word, word[1:]))]:
            word = merge(word, present[0])
        out += word
    return out


@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_bpe_equals_brute_force_on_random_text(alphabet):
    rng = random.Random(0)
    for length, vocab_size in ((5, 300), (60, 257), (60, 270), (400, 300), (2000, 330)):
        text = bytes(rng.choices(alphabet, k=length))
        merges = data.train_bpe(text, vocab_size)
        assert merges == brute_force_bpe(text, vocab_size)
        tokenizer = data.Tokenizer(merges)
        other = bytes(rng.choices(alphabet, k=300))
        for piece in (text, other):
            assert [tokenizer.tokens[i] for i in tokenizer.encode(piece)] == brute_force_encode(merges, piece)


def test_bpe_equals_brute_force_on_real_text(source_text):
    merges = data.train_bpe(source_text[:20_000], 350)
    assert merges == brute_force_bpe(source_text[:20_000], 350)
    tokenizer = data.Tokenizer(merges)
    assert [tokenizer.tokens[i] for i in tokenizer.encode(source_text[-5000:])] == brute_force_encode(merges, source_text[-5000:])


def test_merges_that_spell_the_same_bytes():
    merges = [(b"a", b"b"), (b"b", b"c"), (b"ab", b"c"), (b"a", b"bc"), (b"abc", b"d")]
    tokenizer = data.Tokenizer(merges)
    assert tokenizer.vocab_size == 261
    for text in (b"abcd", b"bcabcdabc", b"aabcdd"):
        assert [tokenizer.tokens[i] for i in tokenizer.encode(text)] == brute_force_encode(merges, text)


def test_any_bytes_survive(source_text):
    tokenizer = data.Tokenizer(data.train_bpe(source_text, 1000))
    rng = random.Random(1)
    for text in (b"", b"\x00", rng.randbytes(100_000), "naïve 漢字 🙂\r\n".encode() * 50, b"a" * 5000, source_text, bytes(3000)):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.bytes_per_id[ids].sum() == len(text)
        assert data.Tokenizer().decode(data.Tokenizer().encode(text)) == text
    assert len(source_text) / len(tokenizer.encode(source_text)) > 2.5        # and real text gets shorter


def test_pieces_cut_like_the_whole():
    rng = random.Random(2)
    for _ in range(300):
        text = bytes(rng.choices(b"'ls lr1.\x00\n\t\xc3", k=100))
        whole = bpe.PRETOKEN.findall(text)
        assert b"".join(whole) == text
        for size in (25, 26, 31, 60):
            assert [word for piece in bpe.pretokens(io.BytesIO(text), size) for word in piece] == whole


def test_no_merge_crosses_a_document_border():
    merges = data.train_bpe(b"ab\x00ab\x00" * 100, 300)
    assert merges == [(b"a", b"b")]


@pytest.mark.parametrize("vocab_size", [-1, 256, 65537])
def test_vocabulary_out_of_range(vocab_size):
    with pytest.raises(InputError):
        data.train_bpe(b"text", vocab_size)


def test_vocabulary_bounds():
    text = random.Random(3).randbytes(200_000)
    assert len(data.train_bpe(text, 257)) == 1
    merges = data.train_bpe(text, 65536)
    assert data.Tokenizer(merges).decode(data.Tokenizer(merges).encode(text)) == text


def test_merges_of_unknown_tokens_are_refused():
    with pytest.raises(InputError):
        data.Tokenizer([(b"a", b"bc")])


# ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def documents(tmp_path, monkeypatch, source_text):
    """A folder of 120 different files, one of them twice, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts" / "sub").mkdir(parents=True)
    texts = [source_text[i * 2000:i * 2000 + 500 + 10 * i] for i in range(120)]
    for i, text in enumerate(texts):
        (tmp_path / "texts" / ("sub" if i % 2 else ".") / f"{i}.txt").write_bytes(text)
    (tmp_path / "texts" / "again.txt").write_bytes(texts[0])
    (tmp_path / "texts" / ".hidden").write_bytes(b"not text")
    return texts + texts[:1]


def test_split_loses_no_byte_and_shares_no_document(documents):
    corpus = data.load("texts")
    train, val = (stream.tobytes().split(b"\x00") for stream in (corpus.train, corpus.val))
    assert sorted(train + val) == sorted(documents)
    assert not set(train) & set(val)
    assert corpus.meta["train_bytes"] == len(corpus.train) and corpus.meta["val_bytes"] == len(corpus.val)
    assert 0.05 <= len(corpus.val) / (len(corpus.val) + len(corpus.train)) < 0.12
    bpe = data.load("texts", "bpe", 400)
    assert bpe.tokenizer.decode(bpe.train) == corpus.train.tobytes() and bpe.tokenizer.decode(bpe.val) == corpus.val.tobytes()
    assert bpe.meta["sha256"] == corpus.meta["sha256"]
    assert bpe.meta["bytes_per_token"] == pytest.approx(len(corpus.train) / len(bpe.train))


def test_a_file_is_prepared_once_and_again_when_it_changes(tmp_path, monkeypatch, source_text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_bytes(source_text)
    first = data.load("a.txt", "bpe", 300)
    made = (tmp_path / "data/a-byte/train.bin").stat().st_mtime_ns
    data.load("a.txt", "bpe", 300)
    assert (tmp_path / "data/a-byte/train.bin").stat().st_mtime_ns == made
    (tmp_path / "a.txt").write_bytes(source_text[::-1])
    second = data.load("a.txt", "bpe", 300)
    assert second.meta["sha256"] != first.meta["sha256"]
    assert second.tokenizer.decode(second.train) == data.load("a.txt").train.tobytes()
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["a-bpe300", "a-byte"]


def test_gz_and_jsonl_hold_the_same_text(tmp_path, monkeypatch, documents, source_text):
    rows = "\n".join(json.dumps({"id": i, "text": text.decode("latin-1")}) for i, text in enumerate(documents)).encode()
    (tmp_path / "plain.jsonl").write_bytes(rows)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(rows))
    (tmp_path / "one.txt").write_bytes(source_text)
    (tmp_path / "two.txt.gz").write_bytes(gzip.compress(source_text))
    plain, packed = data.load("plain.jsonl"), data.load("packed.jsonl.gz")
    assert plain.meta["sha256"] == packed.meta["sha256"]
    assert sorted((plain.train.tobytes() + b"\x00" + plain.val.tobytes()).split(b"\x00")) == \
        sorted(text.decode("latin-1").encode() for text in documents)
    for name in ("one.txt", "two.txt.gz"):                    # cut into pieces at line ends, none lost
        corpus = data.load(name)
        pieces = (corpus.train.tobytes() + b"\x00" + corpus.val.tobytes()).split(b"\x00")
        assert len(b"".join(pieces)) == len(source_text) and Counter(b"".join(pieces)) == Counter(source_text)
        assert sum(piece in source_text and piece.endswith(b"\n") for piece in pieces) >= len(pieces) - 1


def test_two_processes_at_once_both_get_a_whole_cache(documents, tmp_path):
    code = "import sys, data; sys.exit(not data.Tokenizer.decode(c := data.load('texts', 'bpe', 300).tokenizer, " \
           "data.load('texts', 'bpe', 300).train) == data.load('texts').train.tobytes())"
    racers = [subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment(PYTHONPATH=str(ROOT))) for _ in range(4)]
    assert [racer.wait() for racer in racers] == [0] * 4
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["texts-bpe300", "texts-byte"]


def test_many_cores_encode_as_one(tmp_path, monkeypatch, source_text):
    text = (source_text[:50_000] + b"\0") * 3 + b"x" * 100_000 + b"\0\0" + source_text
    (tmp_path / "text.bin").write_bytes(text)
    cuts = list(data.parts(tmp_path / "text.bin", 40_000))
    assert [a for a, _ in cuts] == [0] + [b for _, b in cuts][:-1] and cuts[-1][1] == len(text) and len(cuts) > 3
    assert all(text[b - 1] == 0 for _, b in cuts[:-1])
    tokenizer = bpe.Tokenizer(bpe.train_bpe(source_text, 300))
    monkeypatch.setattr(data, "MANY_CORES_FROM", 0)
    monkeypatch.setattr(data.parts, "__defaults__", (40_000,))
    found = np.concatenate(list(data.encode_file(tokenizer, tmp_path / "text.bin")))
    assert (found == tokenizer.encode(text)).all()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded(tmp_path, source_text):
    """Ten times the text takes no more memory to prepare, as bytes and as BPE. (2 GB stay under 1 GB.)"""
    peaks = []
    for copies in (20, 200):
        path = tmp_path / f"{copies}.txt"
        path.write_bytes(source_text * copies)
        code = f"import data; data.BPE_SAMPLE = 2**21; data.prepare({path.name!r}, 300); " \
               "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True)
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] < peaks[0] + 40, peaks                    # MiB


@pytest.mark.parametrize("content, name", [
    (b"", "empty.txt"), (b"short", "short.txt"), (b"\x1f\x8b\x08 no archive", "broken.gz"),
    (gzip.compress(b"line\n" * 9000, mtime=0)[:-30], "cut.txt.gz"), (b"PK no gzip", "zip.gz"),
    (b'{"text": "a"}\nnot json\n', "bad.jsonl"), (b'{"body": "a"}\n', "key.jsonl"), (b'{"text": 1}\n', "number.jsonl"), (b"[1]\n", "list.jsonl")])
def test_bad_corpora(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    done = execute(tmp_path, "data.py", "--data", name)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and name.split(".")[0] in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_data_script_shows_both_cuts(workplace):
    done = execute(workplace, "data.py", "--data", "text.txt", "--vocab", 400)
    assert done.returncode == 0 and "bpe 400" in done.stdout and "sha256" in done.stdout
    _, byte_cut, bpe_cut = re.split(r"\n\n.* training tokens of .* bytes\n", done.stdout)
    assert byte_cut.replace("|", "").strip() == bpe_cut.replace("|", "").strip() != ""
    assert byte_cut.count("|") > 1.5 * bpe_cut.count("|")


# ---------------------------------------------------------------------------------------------------------------------

def test_batches_are_pure_and_cover_an_epoch_once():
    stream = np.arange(10_000)
    windows = data.Windows(stream, 16)
    first = windows.batch(7, 3, 8)
    for step in range(50):
        windows.batch(8, step, 8)
    assert (windows.batch(7, 3, 8) == first).all() and (data.Windows(stream, 16).batch(7, 3, 8) == first).all()
    assert (windows.batch(8, 3, 8) != first).any()
    per_epoch = 10_000 // 16 - 1
    seen = windows.batch(7, 0, per_epoch)                     # an epoch in one batch
    assert len(np.unique(seen)) == seen.size == per_epoch * 16
    assert (np.diff(seen, axis=1) == 1).all()
    split = np.concatenate([windows.batch(7, step, 48) for step in range(per_epoch // 48)])
    assert (split == seen[:len(split)]).all()                 # whatever the batch size, the same order
    assert set(windows.batch(7, 1, per_epoch)[:, 0]) != set(seen[:, 0])       # the next epoch cuts elsewhere


def test_spaced_windows_do_not_overlap():
    seen = data.Windows(np.arange(1000), 16).spaced(20)
    assert seen.shape == (20, 16) and len(np.unique(seen)) == seen.size
    assert data.Windows(np.arange(1000), 16).spaced(10**6).shape == (62, 16)


@pytest.mark.parametrize("block", [2, 4, 16, 64])
def test_shuffle_is_one_bijection_of_every_block(block):
    order = data.shuffled(64, block)
    assert (np.sort(order.reshape(-1, block), axis=1) == np.arange(64).reshape(-1, block)).all()
    assert ((order.reshape(-1, block) - order.reshape(-1, block).min(axis=1, keepdims=True)) == order[:block]).all()
    assert (order != np.arange(64)).any()
    plain, mixed = data.Windows(np.arange(5000), 64), data.Windows(np.arange(5000), 64, shuffle=block)
    assert (np.sort(mixed.batch(0, 0, 4)) == plain.batch(0, 0, 4)).all()
    assert (np.sort(mixed.spaced(5)) == plain.spaced(5)).all()


def test_shuffle_of_one_is_the_plain_order():
    assert (data.shuffled(64, 1) == np.arange(64)).all()


@pytest.mark.parametrize("length, context, shuffle", [(30, 16, 1), (1000, 16, 3), (1000, 16, 0), (1000, 16, 32)])
def test_windows_that_cannot_be(length, context, shuffle):
    with pytest.raises(InputError):
        data.Windows(np.arange(length), context, shuffle)
