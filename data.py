"""Text to tokens to batches: corpora, their caches, deterministic windows. (The BPE itself is in bpe.py.)

    python data.py                              # prepare pysrc, show how both tokenizers cut a snippet
    python data.py --data notes.txt --vocab 1024
    python data.py --bench                      # how fast the BPE trains and encodes, what a batch costs

A corpus is a stream of documents joined by one zero byte, split into train and validation by a hash of each
document's content. It is prepared once, as flat binary files that are memory-mapped ever after:

    data/pysrc-byte/     train.bin val.bin meta.json      the bytes themselves (uint8)
    data/pysrc-bpe4096/  train.bin val.bin meta.json      the same stream as BPE tokens (uint16)
"""
import argparse
import contextlib
import functools
import gzip
import hashlib
import importlib.util
import io
import json
import multiprocessing
import os
import re
import shutil
import sysconfig
import tempfile
import time
import zlib
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import download
from bpe import Tokenizer, check_vocab, train_bpe
from run import InputError, run_script, usage_error

CACHE = Path("data")
VAL_FRACTION = 0.05        # of the bytes, by whole documents
PIECE = 16 * 1024          # a lone file has no documents in it: it is cut into pieces of about this many bytes, at line ends
MANY_CORES_FROM = 2**28    # bytes of text from which all cores encode
BPE_SAMPLE = 32 * 2**20    # bytes of training text that the BPE vocabulary is learned from


# ---------------------------------------------------------------------------------------------------------------------
# Corpora: where the documents come from, and how they become train.bin and val.bin.

def sources(data):
    """--data -> (corpus name, its files, whether each file is one document). Raises InputError if there are none."""
    if data == "pysrc":
        packages = [Path(importlib.util.find_spec(name).origin).parent for name in ("torch", "numpy", "matplotlib", "tqdm")]
        files = [file for root in (Path(sysconfig.get_path("stdlib")), *packages) for file in sorted(root.rglob("*.py"))
                 if not {"site-packages", "dist-packages"} & set(file.relative_to(root).parts)]
        return "pysrc", files, True
    if files := download.files(data, CACHE / "downloads"):
        return data.replace(":", "-"), files, False
    path = Path(data)
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*"))
                 if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)]
        if not files:
            raise InputError(f"there are no files in {data}")
    elif path.exists():
        files = [path]
    else:
        raise InputError(f"unknown corpus {data!r}: neither pysrc, {', '.join(download.BASES)}, nor a file or folder here")
    name = path.resolve().name.split(".")[0] or "corpus"
    return re.sub(r"[^\w-]", "_", name), files, path.is_dir()


def zstd():
    """Python's own module for .zst, from 3.14, or the package."""
    try:
        from compression import zstd
        return zstd
    except ImportError:
        try:
            import zstandard
            return zstandard
        except ImportError:
            return None


def open_any(file):
    """Open a file for reading bytes, unpacked as they are read."""
    if file.suffix == ".gz":
        return gzip.open(file)
    if file.suffix == ".zst":
        if zstd() is None:
            raise InputError(f"{file.name} needs Python 3.14 or a package: pip install zstandard")
        return io.BufferedReader(zstd().open(file, "rb"))
    return open(file, "rb")


def documents(files, whole):
    """Yield the documents of files as bytes, in bounded memory; .gz and .zst are opened, and .jsonl (or .json.gz) has one in the "text"
    of each line.

    whole: each file is a document (above 8 MiB, it is cut); otherwise files are cut into pieces of PIECE bytes.
    """
    for file in files:
        name = file.name.removesuffix(".gz").removesuffix(".zst")
        piece = 2**23 if whole else min(PIECE, max(1024, file.stat().st_size // 64))
        line = 0
        try:
            with open_any(file) as stream:
                if name.endswith(".jsonl") or name.endswith(".json") and name != file.name:
                    for line, row in enumerate(stream, 1):
                        if row.strip() and (text := json.loads(row)["text"].encode("utf-8", "surrogatepass")):
                            yield text
                else:
                    while text := stream.read(piece):
                        yield text if len(text) < piece else text + stream.readline(piece)
        except (gzip.BadGzipFile, EOFError, zlib.error, getattr(zstd(), "ZstdError", EOFError)) as error:
            if fetched := CACHE / "downloads" in file.parents:
                file.unlink()
            raise InputError(f"{file} is damaged: {error}" + ("; deleted, the same command fetches it again" if fetched else "")) from None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
            raise InputError(f"{file}, line {line}: not a JSON object with a \"text\" string") from None


def bucket(document):
    """0..4095 by the document's content: it decides on which side of the split the document falls."""
    return int.from_bytes(hashlib.blake2b(document, digest_size=8).digest(), "big") % 4096


def write_bytes(name, files, whole, folder):
    """Write the train.bin and val.bin of a corpus as bytes. -> meta. Reads the documents twice: to split them, to write them."""
    digest, sizes, count = hashlib.sha256(), np.zeros(4096, dtype=np.int64), 0
    for document in tqdm(documents(files, whole), desc=f"reading {name}", unit=" documents", disable=None, leave=False):
        digest.update(b"\0" + document if count else document)
        sizes[bucket(document)] += len(document)
        count += 1
    if np.count_nonzero(sizes) < 2:
        raise InputError(f"{name} is too small: it needs two different documents, one for training and one for validation")
    # Validation: the lowest buckets that hold VAL_FRACTION of the bytes, and never all of them.
    cut = min(np.searchsorted(sizes.cumsum(), VAL_FRACTION * sizes.sum()), np.flatnonzero(sizes)[-1] - 1)
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        for document in documents(files, whole):
            side = val if bucket(document) <= cut else train
            side.write(b"\0" + document if side.tell() else document)
        return {"name": name, "sha256": digest.hexdigest(), "documents": count, "bytes_per_token": 1.0,
                "train_bytes": train.tell(), "val_bytes": val.tell(), "merges": []}


def write_bpe(source, meta, vocab_size, folder):
    """Learn a BPE on a sample of the train.bin of bytes in source, and encode both splits with it. -> meta."""
    size, block = meta["train_bytes"], min(meta["train_bytes"], 2**20)
    sample = []
    with open(source / "train.bin", "rb") as file:
        for start in np.linspace(0, size - block, min(size, BPE_SAMPLE) // block, dtype=int):
            file.seek(start)
            sample.append(file.read(block))
    merges = train_bpe(b"".join(sample), vocab_size)
    if len(merges) < vocab_size - 256:
        raise InputError(f"{meta['name']} is too small for a vocabulary of {vocab_size}: it yields {256 + len(merges)} tokens")
    tokenizer, tokens = Tokenizer(merges), {}
    for split in ("train", "val"):
        with open(folder / f"{split}.bin", "wb") as out, \
                tqdm(desc=f"encoding {split}", total=meta[f"{split}_bytes"], unit="B", unit_scale=True, disable=None, leave=False) as bar:
            for ids in encode_file(tokenizer, source / f"{split}.bin"):
                out.write(ids.tobytes())
                bar.update(int(tokenizer.bytes_per_id[ids].sum()))
            tokens[split] = out.tell() // 2
    return meta | {"merges": [(left.hex(), right.hex()) for left, right in merges],
                   "bytes_per_token": meta["train_bytes"] / tokens["train"]}


def encode_file(tokenizer, path):
    """The ids of a file, piece by piece; by all cores, if it is large enough to pay for starting them."""
    if path.stat().st_size < MANY_CORES_FROM:
        with open(path, "rb") as text:
            yield from tokenizer.encode_stream(text)
        return
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn"), initializer=setattr,
                             initargs=(encode_part, "tokenizer", tokenizer)) as pool:
        waiting = deque()                                     # a bounded queue: the writer may be slower than the cores
        for part in parts(path):
            waiting.append(pool.submit(encode_part, path, *part))
            if len(waiting) > 2 * (os.cpu_count() or 1):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def parts(path, size=2**24):
    """Cut a file after zero bytes, which no token crosses, into parts of size bytes or more: yields (start, stop)."""
    stream, start = np.memmap(path, dtype=np.uint8, mode="r"), 0
    while start < len(stream):
        stop = min(start + size, len(stream))
        while stop < len(stream) and stream[stop - 1] != 0:
            following = np.flatnonzero(stream[stop:stop + 2**16] == 0)
            stop = stop + following[0] + 1 if len(following) else min(stop + 2**16, len(stream))
        yield start, int(stop)
        start = int(stop)


def encode_part(path, start, stop):
    with open(path, "rb") as file:
        file.seek(start)
        return encode_part.tokenizer.encode(file.read(stop - start))


def read_meta(folder):
    try:
        return json.loads((folder / "meta.json").read_text())
    except FileNotFoundError:
        return {}


def prepare(data="pysrc", vocab_size=None):
    """Make the cache of a corpus, as bytes (vocab_size None) or as BPE tokens, unless it is there. -> (folder, meta).

    The folder is built aside and renamed. Two processes that prepare it at the same time both do the work; one's is kept.
    """
    if vocab_size is None:
        name, files, whole = sources(data)
        stats = [(str(file.resolve()), stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()]]
        key = hashlib.sha256(json.dumps(stats).encode()).hexdigest()       # changes when the source does
        folder, build = CACHE / f"{name}-byte", functools.partial(write_bytes, name, files, whole)
    else:
        check_vocab(vocab_size)
        source, meta = prepare(data)
        key = meta["sha256"]
        folder, build = CACHE / f"{meta['name']}-bpe{vocab_size}", functools.partial(write_bpe, source, meta, vocab_size)
    meta = read_meta(folder)
    if meta.get("key") == key:
        return folder, meta
    CACHE.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=CACHE))
    try:
        new = temporary / "new"
        new.mkdir()
        meta = build(new) | {"key": key}
        (new / "meta.json").write_text(json.dumps(meta))
        try:
            new.rename(folder)
        except OSError:                                       # there is one: another process's, as good as ours, or an outdated one
            if read_meta(folder).get("key") != key:
                folder.rename(temporary / "old")
                new.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            CACHE.rmdir()                                     # if nothing is in it: bad input leaves nothing behind
    return folder, meta


@dataclass
class Corpus:
    name: str
    meta: dict
    tokenizer: Tokenizer
    train: np.ndarray          # (tokens,) memory-mapped
    val: np.ndarray

    def tokens(self, context_bytes):
        """The length in tokens of a window of context_bytes bytes: a multiple of 16 for BPE."""
        if self.tokenizer.vocab_size == 256:
            return context_bytes
        return max(16, 16 * round(context_bytes / self.meta["bytes_per_token"] / 16))

    def shuffle_tokens(self, shuffle_bytes, context):
        """The length in tokens of the blocks of shuffle_bytes bytes that are permuted. For BPE: the nearest that divides context."""
        if self.tokenizer.vocab_size == 256:
            return shuffle_bytes
        return nearest_divisor(context, shuffle_bytes / self.meta["bytes_per_token"])


def nearest_divisor(context, number):
    """Of the whole numbers that divide context, the one nearest to number."""
    return min((n for n in range(1, context + 1) if context % n == 0), key=lambda n: abs(n - number))


def load(data="pysrc", tokenizer="byte", vocab_size=4096):
    """Prepare a corpus if need be and open it. tokenizer: "byte" or "bpe" (of vocab_size tokens). -> Corpus"""
    folder, meta = prepare(data, vocab_size if tokenizer == "bpe" else None)
    dtype = np.uint16 if meta["merges"] else np.uint8
    train, val = (np.memmap(folder / f"{split}.bin", dtype=dtype, mode="r") for split in ("train", "val"))
    return Corpus(meta["name"], meta, Tokenizer.from_hex(meta["merges"]), train, val)


# ---------------------------------------------------------------------------------------------------------------------
# Windows: what the models read.

def shuffled(context, block):
    """The order of a window's tokens with every aligned block of tokens permuted by one fixed permutation: (context,) indices."""
    rng, order = np.random.default_rng(block), np.arange(block)
    while block > 1 and (order == np.arange(block)).all():
        order = rng.permutation(block)
    return np.arange(context).reshape(-1, block)[:, order].ravel()


@functools.lru_cache(maxsize=4)
def epoch_starts(seed, epoch, length, context):
    """Where an epoch's windows start: all of the stream in windows that do not overlap, from a random offset, in random order."""
    rng = np.random.default_rng((seed, epoch))
    return rng.integers(context) + context * rng.permutation(length // context - 1)


class Windows:
    """Windows of context tokens of a stream of ids. shuffle: the length of the blocks that are permuted, in tokens.

    Raises InputError if the stream does not hold two windows, or if shuffle does not divide context.
    """

    def __init__(self, stream, context, shuffle=1):
        if len(stream) < 2 * context:
            raise InputError(f"a split of {len(stream)} tokens is too small for windows of {context}: take more text or a smaller --context")
        if shuffle < 1 or context % shuffle:
            raise InputError(f"blocks of {shuffle} tokens do not divide a window of {context}")
        self.stream, self.context, self.order = stream, context, shuffled(context, shuffle)

    def batch(self, seed, step, size):
        """The windows of a training step, a pure function of its arguments: -> (size, context) int64. Each window once an epoch."""
        epoch, place = np.divmod(step * size + np.arange(size), len(self.stream) // self.context - 1)
        starts = [epoch_starts(seed, int(e), len(self.stream), self.context)[p] for e, p in zip(epoch, place)]
        return self.stream[np.array(starts)[:, None] + self.order].astype(np.int64)

    def spaced(self, count):
        """Up to count windows that do not overlap, evenly spaced over the stream: -> (count, context) int64. For evaluation."""
        whole = len(self.stream) // self.context
        starts = np.linspace(0, whole - 1, min(count, whole), dtype=int) * self.context
        return self.stream[starts[:, None] + self.order].astype(np.int64)


# ---------------------------------------------------------------------------------------------------------------------

def show(data, vocab_size):
    """Print the sizes of a corpus and how both tokenizers cut a piece of its validation text."""
    corpora = {"byte": load(data, "byte"), f"bpe {vocab_size}": load(data, "bpe", vocab_size)}
    meta = corpora["byte"].meta
    print(f"{meta['name']}: {meta['documents']:,} documents, {meta['train_bytes']:,} bytes of training text, "
          f"{meta['val_bytes']:,} of validation, sha256 {meta['sha256'][:16]}...")
    middle = corpora["byte"].val[len(corpora["byte"].val) // 2:][:4000].tobytes()
    snippet = b"\n".join(middle.split(b"\n")[1:4])[:160] or middle[:160]
    for label, corpus in corpora.items():
        ids = corpus.tokenizer.encode(snippet)
        cut = "|".join(corpus.tokenizer.decode([i]).decode("utf-8", "backslashreplace") for i in ids)
        print(f"\n{label}: {len(corpus.train):,} training tokens of {corpus.meta['bytes_per_token']:.3f} bytes\n{cut}")


def bench(data, vocab_size):
    """Print how fast the BPE trains and encodes on 30 MB, and what a batch costs beside the training step that it feeds."""
    import torch, model
    folder, meta = prepare(data)
    with open(folder / "train.bin", "rb") as file:
        text = file.read(30_000_000)
    began = time.perf_counter()
    tokenizer = Tokenizer(train_bpe(text, vocab_size))
    trained = time.perf_counter()
    ids = tokenizer.encode(text)
    encoded = time.perf_counter()
    assert tokenizer.decode(ids) == text
    mb = len(text) / 1e6
    print(f"{meta['name']}, {mb:.1f} MB: a vocabulary of {vocab_size:,} trained in {trained - began:.1f} s, "
          f"encoded at {mb / (encoded - trained):.1f} MB/s on one core, {len(text) / len(ids):.3f} bytes per token")
    corpus = load(data, "byte")
    windows, net = Windows(corpus.train, 512), model.Transformer(model.Config(width=32))
    draws, steps = [], []
    for step in range(50):
        began = time.perf_counter()
        batch = windows.batch(0, step, 2)
        draws.append(time.perf_counter() - began)
        model.nats(net, torch.from_numpy(batch), torch.from_numpy(batch)).mean().backward()
        steps.append(time.perf_counter() - began)
    print(f"a batch of 2 windows of 512 bytes: {np.median(draws) * 1e3:.3f} ms, "
          f"{np.median(draws) / np.median(steps):.2%} of forward and backward at width 32, the smallest and so the worst case")


def main():
    parser = argparse.ArgumentParser(description="Prepare a corpus and show how both tokenizers cut it.")
    parser.add_argument("--data", default="pysrc", help="pysrc, enwik8, enwik9, c4:SHARDS, slimpajama:SHARDS, or a file or folder")
    parser.add_argument("--vocab", type=int, default=4096, help="tokens in the BPE vocabulary")
    parser.add_argument("--bench", action="store_true", help="measure the speed of the BPE and of the batches")
    parser.error = usage_error
    args = parser.parse_args()
    (bench if args.bench else show)(args.data, args.vocab)


if __name__ == "__main__":
    run_script(main)
