"""Corpora, to tokens, to training sequences.

    python data.py [--data enwik8] [--vocab 4096]       # prepare a corpus, show both tokenizations

A corpus is a stream of documents joined by one zero byte. A hash of its content puts a document in
training or in validation. It is prepared once, as flat files that are memory-mapped from then on:

    data/pysrc-byte/     train.bin val.bin meta.json      the bytes themselves (uint8)
    data/pysrc-bpe4096/  train.bin val.bin meta.json      the same stream as BPE tokens (uint16)
"""
import argparse
import contextlib
import functools
import gzip
import hashlib
import http.client
import importlib.util
import io
import json
import math
import mmap
import multiprocessing
import os
import re
import shutil
import sys
import sysconfig
import urllib.error
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from bpe import Tokenizer, train_bpe

try:
    import fcntl
except ImportError:
    # Windows has no such lock: there, don't prepare one corpus in two processes at once, nor start
    # two in one run folder.
    fcntl = None
try:
    from compression import zstd
except ImportError:
    # Before Python 3.14 it is a package, if someone has installed it.
    zstd = None
    with contextlib.suppress(ImportError):
        import zstandard as zstd

CACHE = Path("data")
VAL_FRACTION = 0.05        # of the bytes, by whole documents
PIECE = 16 * 2**10         # bytes of a document where a lone file is cut into them, at line ends
LONGEST = 8 * 2**20        # bytes of a document, about, where a file of a folder is cut into them
BPE_SAMPLE = 32 * 2**20    # bytes of training text that a BPE vocabulary is learned from
MANY_CORES_FROM = 2**28    # bytes of text that are worth starting processes to encode
CRC_UP_TO = 2**30          # bytes of a file that is checked whenever it is opened

HUB = "https://huggingface.co/datasets"
# name -> (its address, bytes of the text, their sha256)
ARCHIVES = {
    "enwik8": ("https://mattmahoney.net/dc/enwik8.zip", 10**8,
               "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"),
    "enwik9": ("https://mattmahoney.net/dc/enwik9.zip", 10**9,
               "159b85351e5f76e60cbe32e04c677847a9ecba3adc79addab6f4c6c7aa3744bc")}
# name -> (number of shards, bytes of text in one, about, their folder, and the name of each)
SHARDS = {
    "c4": (1024, 750e6, f"{HUB}/allenai/c4/resolve/main/en/",
           lambda i: f"c4-train.{i:05d}-of-01024.json.gz"),
    "slimpajama": (59000, 45e6, f"{HUB}/cerebras/SlimPajama-627B/resolve/main/train/",
                   lambda i: f"chunk{1 + i // 5900}/example_train_{i % 5900}.jsonl.zst")}
NAMES = ", ".join(["pysrc", *ARCHIVES, *SHARDS])


class InputError(ValueError):
    """Bad input, which the scripts show as one line."""


# -----------------------------------------------------------------------------------------------
# Downloads.

def with_shards(data, bytes_needed):
    """Return --data with as many shards as hold so many bytes: "c4" becomes "c4:3"."""
    if data not in SHARDS:
        return data
    count, size, *_ = SHARDS[data]
    # 5% of the text are for validation.
    return f"{data}:{min(count, max(1, math.ceil(1.1 * bytes_needed / size)))}"


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects, and keep the sha256 that Hugging Face sends with the first of them."""
    sha256 = ""

    def redirect_request(self, request, file, code, message, headers, url):
        self.sha256 = headers.get("X-Linked-ETag") or self.sha256
        return super().redirect_request(request, file, code, message, headers, url)


def fetch(url, path, *known):
    """Download url to path, unless it is there; what an earlier try has left is continued.

    known: of a zip archive, the size and sha256 of its one file, which path will hold. Raise
    InputError if it does not arrive whole, or not as its published sha256 says.
    """
    if path.exists():
        return path
    source = path.with_name(f"{path.name}.zip") if known else path
    with locked_cache():
        # Another process may have done it while this one waited.
        if not path.exists():
            if not source.exists():
                receive(url, source)
            if known:
                unpack(source, path, *known)
    return path


def receive(url, path):
    """Do what fetch does for a path that is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    redirects = Redirects()
    try:
        with urllib.request.build_opener(redirects).open(request, timeout=60) as response:
            if response.status != 206:
                # The server knows no ranges, and begins at the beginning.
                start = 0
            elif not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                discard(part, f"{url}: the server continued at another byte")
            total = start + int(response.headers.get("Content-Length") or 0)
            published = redirects.sha256 or response.headers.get("X-Linked-ETag") or ""
            with open(part, "ab") as file:
                file.truncate(start)
                with tqdm.wrapattr(file, "write", total=total, initial=start, desc=path.name,
                                   disable=None) as out:
                    shutil.copyfileobj(response, out, 2**20)
    except urllib.error.HTTPError as error:
        if error.code == 416:
            discard(part, f"{url}: {part.name} is longer than the file")
        raise InputError(f"{url}: {error.code} {error.reason}: try later, or take another --data: "
                         f"{NAMES}, or a path") from None
    except (OSError, http.client.HTTPException) as error:
        raise InputError(f"{url}: {getattr(error, 'reason', error)}: the same command resumes the "
                         "download; without a network take --data PATH, or --data pysrc, which a "
                         "large budget repeats") from None
    if part.stat().st_size < total:
        raise InputError(f"{url}: the connection broke; the same command resumes the download")
    published = published.strip('"').lower()
    if re.fullmatch("[0-9a-f]{64}", published) and sha256_of(part) != published:
        discard(part, f"{url}: the sha256 is not the published one")
    os.replace(part, path)


def discard(path, reason):
    """Delete a downloaded file that is of no use, and raise InputError."""
    path.unlink(missing_ok=True)
    raise InputError(f"{reason}: deleted {path}, the same command fetches it again")


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack(archive, path, size, sha256):
    """Write the one file of a zip archive to path. Raise InputError if it is another text."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with zipfile.ZipFile(archive) as files, open(temporary, "wb") as out:
            with files.open(files.namelist()[0]) as file:
                shutil.copyfileobj(file, out, 2**20)
    except (zipfile.BadZipFile, zlib.error, EOFError, IndexError, NotImplementedError) as error:
        temporary.unlink(missing_ok=True)
        discard(archive, f"{archive.name} is damaged ({error})")
    if temporary.stat().st_size != size or sha256_of(temporary) != sha256:
        temporary.unlink()
        discard(archive, f"{archive.name} holds another text")
    os.replace(temporary, path)
    archive.unlink()


# -----------------------------------------------------------------------------------------------
# Corpora: where the documents come from.

def find_files(data):
    """Return the name of a corpus, its files, and whether each file is one document.

    Named corpora are downloaded. Raise InputError if there is no such corpus.
    """
    if data == "pysrc":
        # Python source that every machine with this project has.
        packages = [Path(importlib.util.find_spec(name).origin).parent
                    for name in ("torch", "numpy", "matplotlib", "tqdm")]
        files = [file for root in (Path(sysconfig.get_path("stdlib")), *packages)
                 for file in sorted(root.rglob("*.py"))
                 if not {"site-packages", "dist-packages"} & set(file.relative_to(root).parts)]
        return data, files, True
    downloads = CACHE / "downloads" / data.partition(":")[0]
    if data in ARCHIVES:
        url, *known = ARCHIVES[data]
        return data, [fetch(url, downloads / data, *known)], False
    name, _, count = data.partition(":")
    if name in SHARDS:
        most, _, folder, shard = SHARDS[name]
        if not count.isdecimal() or not 1 <= int(count) <= most:
            raise InputError(f"--data {data}: {name} has 1 to {most} shards, as in {name}:4")
        shards = [shard(i) for i in range(int(count))]
        files = [fetch(folder + shard, downloads / shard) for shard in shards]
        return f"{name}-{count}", files, False
    path = Path(data)
    if not data or not (path.is_file() or path.is_dir()):
        raise InputError(f"--data {data}: neither {NAMES}, nor a file or folder")
    files = [path]
    if path.is_dir():
        # Hidden files and folders, such as .git, are no text.
        files = [file for file in sorted(path.rglob("*")) if file.is_file()
                 and not any(part.startswith(".") for part in file.relative_to(path).parts)]
    name = re.sub(r"[^\w-]", "_", path.resolve().name.split(".")[0]) or "corpus"
    # The files of a folder are documents, but a lone small one would be the only document.
    small = sum(file.stat().st_size for file in files) <= LONGEST
    return name, files, path.is_dir() and not (small and len(files) == 1)


def open_any(file):
    """Open a file for reading bytes, decompressed as they are read."""
    if file.suffix == ".gz":
        return gzip.open(file)
    if file.suffix == ".zst":
        if zstd is None:
            raise InputError(f"{file} needs Python 3.14, or: pip install zstandard")
        if hasattr(zstd, "ZstdFile"):
            return zstd.open(file)
        # The package's own open() would stop at the end of the first frame.
        reader = zstd.ZstdDecompressor().stream_reader(open(file, "rb"), read_across_frames=True)
        return io.BufferedReader(reader)
    return open(file, "rb")


def documents(files, whole):
    """Yield the documents in files, as bytes: lines of .jsonl, whole files, or pieces of files."""
    damage = (OSError, EOFError, zlib.error, getattr(zstd, "ZstdError", EOFError))
    for file in files:
        name = file.name.removesuffix(".gz").removesuffix(".zst")
        packed = name != file.name
        piece = LONGEST if whole else min(PIECE, max(1024, file.stat().st_size // 64))
        try:
            with open_any(file) as stream:
                if name.endswith(".jsonl") or packed and name.endswith(".json"):
                    yield from lines(file, stream)
                    continue
                while text := stream.read(piece):
                    yield text if len(text) < piece else text + stream.readline(piece)
        except damage as error:
            if not packed:
                raise
            refuse(file, f"{file} is damaged ({error})")


def lines(file, stream):
    """Yield the "text" of each line of a .jsonl, as bytes."""
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"].encode("utf-8", "surrogatepass")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            refuse(file, f'{file}, line {number}: not a JSON object with a "text" string')
        if text:
            yield text


def refuse(file, reason):
    """Raise InputError for a file that can't be read; if it was downloaded, delete it."""
    if CACHE / "downloads" in file.parents:
        discard(file, reason)
    raise InputError(reason)


# -----------------------------------------------------------------------------------------------
# Preparation: documents -> bytes -> tokens.

def bucket(document):
    """Return a hash of the document in 0..4095: it decides between training and validation."""
    return int.from_bytes(hashlib.blake2b(document, digest_size=8).digest(), "big") % 4096


def write_bytes(folder, name, files, whole):
    """Write a corpus as bytes into folder. Return its metadata."""
    digest, sizes, count = hashlib.sha256(), np.zeros(4096, dtype=np.int64), 0
    bar = tqdm(documents(files, whole), f"reading {name}", unit=" documents", disable=None,
               leave=False)
    for document in bar:
        digest.update(b"\0" + document if count else document)
        sizes[bucket(document)] += len(document)
        count += 1
    if np.count_nonzero(sizes) < 2:
        raise InputError(f"{name} is too small: training and validation need a document each")
    # Validation: the lowest buckets that hold VAL_FRACTION of the bytes, and never all of them.
    last = np.searchsorted(sizes.cumsum(), VAL_FRACTION * sizes.sum())
    last = min(last, np.flatnonzero(sizes)[-1] - 1)
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        for document in documents(files, whole):
            split = val if bucket(document) <= last else train
            split.write(b"\0" + document if split.tell() else document)
        return {"name": name, "sha256": digest.hexdigest(), "documents": count, "merges": [],
                "bytes_per_token": 1.0, "train_bytes": train.tell(), "val_bytes": val.tell()}


def write_tokens(folder, source, meta, vocab_size):
    """Learn a BPE on a sample of the byte corpus in source and encode it. Return the metadata."""
    if json.loads((source / "meta.json").read_text())["sha256"] != meta["sha256"]:
        raise InputError(f"{meta['name']} has just changed: run the command again")
    text = np.memmap(source / "train.bin", dtype=np.uint8, mode="r")
    block = min(len(text), 2**20)
    starts = np.linspace(0, len(text) - block, min(len(text), BPE_SAMPLE) // block, dtype=int)
    sample = b"".join(text[start:start + block].tobytes() for start in starts)
    tokenizer = Tokenizer(train_bpe(sample, vocab_size))
    if tokenizer.vocab_size < vocab_size:
        raise InputError(f"{meta['name']} is too small for a vocabulary of {vocab_size}: it gives "
                         f"{tokenizer.vocab_size} tokens")
    tokens = {}
    for split in ("train", "val"):
        with open(folder / f"{split}.bin", "wb") as out:
            for ids in encode_file(tokenizer, source / f"{split}.bin"):
                out.write(ids.tobytes())
            tokens[split] = out.tell() // 2
    return meta | {"merges": tokenizer.to_hex(),
                   "bytes_per_token": meta["train_bytes"] / tokens["train"]}


def encode_file(tokenizer, path):
    """Yield the ids of a file part by part, in bounded memory; by all cores if it is large."""
    if path.stat().st_size < MANY_CORES_FROM:
        for part in parts(path):
            yield tokenizer.encode(read_part(part))
        return
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(None, start_worker, [tokenizer]) as pool:
        yield from pool.imap(encode_part, parts(path))


def parts(path, size=2**24):
    """Yield (path, start, end) of parts of a file, cut after zero bytes, which no token crosses."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        start = 0
        while start < len(text):
            # find returns -1 if no zero follows.
            end = text.find(b"\0", start + size - 1) + 1 or len(text)
            yield path, start, end
            start = end


def read_part(part):
    path, start, end = part
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(end - start)


def start_worker(tokenizer):
    global worker_tokenizer
    worker_tokenizer = tokenizer


def encode_part(part):
    return worker_tokenizer.encode(read_part(part))


# -----------------------------------------------------------------------------------------------
# The cache of prepared corpora.

def checksum(path):
    """Return [size, CRC-32] of a file, the CRC of a very large one left out."""
    size, crc = path.stat().st_size, 0
    if size <= CRC_UP_TO:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                crc = zlib.crc32(block, crc)
    return [size, crc]


def seal(meta):
    """Return the CRC-32 of the metadata of a corpus, its own aside."""
    rest = {key: value for key, value in meta.items() if key != "seal"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def open_cache(folder, key):
    """Return the metadata of a corpus that was prepared with this key, None if it is not whole."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        whole = meta["key"] == key and meta["seal"] == seal(meta) and all(
            checksum(folder / name) == known for name, known in meta["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return meta if whole else None


def prepare(folder, key, write, *arguments):
    """Return the metadata of a corpus, prepared by write(folder, *arguments) if need be."""
    if meta := open_cache(folder, key):
        return meta
    with locked_cache():
        # Another process may have prepared it while this one waited.
        if meta := open_cache(folder, key):
            return meta
        if folder.exists():
            print(f"note   {folder} is outdated or damaged: prepared again", file=sys.stderr)
        # Left by processes that were killed.
        for left in CACHE.glob(".preparing-*"):
            shutil.rmtree(left, ignore_errors=True)
        temporary = CACHE / f".preparing-{folder.name}"
        temporary.mkdir()
        try:
            meta = write(temporary, *arguments) | {"key": key}
            meta["files"] = {name: checksum(temporary / name) for name in ("train.bin", "val.bin")}
            (temporary / "meta.json").write_text(json.dumps(meta | {"seal": seal(meta)}))
            for path in temporary.iterdir():
                # Windows flushes only what is open for writing.
                with open(path, "r+b") as file:
                    os.fsync(file.fileno())
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return meta


@contextlib.contextmanager
def locked(folder):
    """Let one process at a time write into a folder: others wait until the block or it ends."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # A file system without locks does without.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked_cache():
    """Let one process at a time fill the cache, which is made if need be."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with locked(CACHE):
        # Another process may have removed it, empty, while this one waited.
        CACHE.mkdir(parents=True, exist_ok=True)
        try:
            yield
        finally:
            # Bad input leaves nothing behind: if nothing is in it, it goes.
            with contextlib.suppress(OSError):
                CACHE.rmdir()


@dataclass
class Corpus:
    name: str
    meta: dict
    tokenizer: Tokenizer
    train: np.ndarray          # (tokens,) memory-mapped
    val: np.ndarray

    def tokens(self, context_bytes):
        """Return the number of tokens in so many bytes of context: for BPE a multiple of 16."""
        if self.tokenizer.vocab_size == 256:
            return context_bytes
        return max(16, 16 * round(context_bytes / self.meta["bytes_per_token"] / 16))

    def shuffle_tokens(self, shuffle_bytes, context):
        """Return the number of tokens in a block of so many bytes: for BPE a divisor of context."""
        if self.tokenizer.vocab_size == 256:
            return shuffle_bytes
        return nearest_divisor(context, shuffle_bytes / self.meta["bytes_per_token"])


def nearest_divisor(number, wanted):
    """Return the divisor of a number that is nearest to the wanted one."""
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    return min(divisors, key=lambda n: abs(n - wanted))


def load(data="pysrc", tokenizer="byte", vocab_size=4096):
    """Return a Corpus, prepared if need be. tokenizer: "byte", or "bpe" of vocab_size tokens.

    Raise InputError if there is no such corpus, or if it is damaged or too small.
    """
    name, files, whole = find_files(data)
    place = name
    if Path(data).exists() and data != "pysrc":
        # Files of one name are many: the folder is named by the path, too.
        place += "-" + hashlib.sha256(os.fsencode(Path(data).resolve())).hexdigest()[:6]
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
    folder = CACHE / f"{place}-byte"
    meta = prepare(folder, key, write_bytes, name, files, whole)
    if tokenizer != "byte":
        source, folder = folder, CACHE / f"{place}-{tokenizer}{vocab_size}"
        # Another class of tokenizer has its own ids.
        key = f"{meta['sha256']} {Tokenizer.__module__}.{Tokenizer.__name__}"
        meta = prepare(folder, key, write_tokens, source, meta, vocab_size)
    dtype = np.uint16 if meta["merges"] else np.uint8
    train, val = (np.memmap(folder / f"{split}.bin", dtype, "r") for split in ("train", "val"))
    return Corpus(name, meta, Tokenizer.from_hex(meta["merges"]), train, val)


# -----------------------------------------------------------------------------------------------
# Sequences: what the models read.

@functools.lru_cache(maxsize=4)
def epoch_starts(seed, epoch, length, context):
    """Return where an epoch's sequences start: side by side from a random offset, shuffled."""
    rng = np.random.default_rng((seed, epoch))
    return rng.integers(context) + context * rng.permutation(length // context - 1)


def permutation(block, index=0):
    """Return an order in which blocks of so many tokens are shuffled, the same for all: (block,).

    index: which of the orders; in short blocks two may be the same. Never the one that leaves all
    tokens where they are, unless there is no other.
    """
    rng = np.random.default_rng((block, index))
    order = np.arange(block)
    while block > 1 and (order == np.arange(block)).all():
        order = rng.permutation(block)
    return order


class Sequences:
    """Sequences of context tokens, cut from a stream of ids; shuffle: tokens in a permuted block.

    index: which permutation. Raise InputError if the stream is too short, if shuffle does not
    divide context, or if blocks are too short for more than one permutation.
    """

    def __init__(self, stream, context, shuffle=1, index=0):
        if len(stream) < 2 * context:
            raise InputError(f"{len(stream)} tokens are too few for sequences of {context}: take "
                             "more text, or a smaller --context")
        if context % shuffle:
            raise InputError(f"--shuffle: blocks of {shuffle} tokens do not divide a sequence of "
                             f"{context}")
        if index > 0 and shuffle < 3:
            raise InputError(f"--permutation {index}: only blocks of 3 tokens or more have more "
                             f"than one, and --shuffle makes blocks of {shuffle}")
        self.stream = stream
        self.context = context
        blocks = np.arange(context).reshape(-1, shuffle)                  # (blocks, tokens)
        self.order = blocks[:, permutation(shuffle, index)].ravel()

    def batch(self, seed, step, size):
        """Return the sequences of a training step, a pure function of its arguments: (size, T)."""
        per_epoch = len(self.stream) // self.context - 1
        epochs, indices = np.divmod(step * size + np.arange(size), per_epoch)
        starts = [epoch_starts(seed, int(epoch), len(self.stream), self.context)[index]
                  for epoch, index in zip(epochs, indices, strict=True)]
        return self.stream[np.array(starts)[:, None] + self.order].astype(np.int64)

    def spaced(self, count):
        """Return up to count sequences, evenly spaced over the stream, to evaluate on: (N, T)."""
        total = len(self.stream) // self.context
        starts = np.linspace(0, total - 1, min(count, total), dtype=int) * self.context
        return self.stream[starts[:, None] + self.order].astype(np.int64)


def main():
    parser = argparse.ArgumentParser(description="Prepare a corpus and show how it is tokenized.",
                                     usage=argparse.SUPPRESS)
    parser.add_argument("--data", default="pysrc", help="a corpus by name, or a file or folder")
    parser.add_argument("--vocab", type=int, default=4096, help="tokens in the BPE vocabulary")
    args = parser.parse_args()
    try:
        data = with_shards(args.data, 1)
        corpora = {"byte": load(data), "bpe": load(data, "bpe", args.vocab)}
    except (ValueError, OSError) as error:
        parser.error(str(error))
    meta, val = corpora["byte"].meta, corpora["byte"].val
    print(f"{meta['name']}: {meta['documents']:,} documents, {meta['train_bytes']:,} bytes for "
          f"training, {meta['val_bytes']:,} for validation, sha256 {meta['sha256'][:16]}")
    text = val[len(val) // 2:][:200].tobytes()
    for name, corpus in corpora.items():
        tokens = [corpus.tokenizer.decode([i]) for i in corpus.tokenizer.encode(text)]
        shown = "|".join(token.decode("utf-8", "backslashreplace") for token in tokens)
        print(f"\n{name}: {len(corpus.train):,} tokens of {corpus.meta['bytes_per_token']:.3f} "
              f"bytes\n{shown}")


if __name__ == "__main__":
    main()
