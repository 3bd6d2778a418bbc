"""Corpora by name: fetched over HTTPS, gone on with after a break, checked. data.py does the rest.

    python train_ar.py --data enwik8                    # or enwik9: the first 10^8 or 10^9 bytes of Wikipedia
    python train_ar.py --data c4 --flops 1e19           # English web text; as many of its shards as the budget reads once
    python scaling.py --data c4:40 ...                  # so many, for all runs of a study
    python train_ar.py --data slimpajama                # the paper's

What C4_URL, SLIMPAJAMA_URL and so on hold in the environment is taken instead of the addresses below: a mirror. (SlimPajama left
its first home, below, in early 2026.)
"""
import hashlib
import http.client
import math
import os
import re
import urllib.error
import urllib.request
import zipfile

from tqdm import tqdm

from run import InputError, write_atomic

BASES = {"enwik8": "https://mattmahoney.net/dc/", "enwik9": "https://mattmahoney.net/dc/",
         "c4": "https://huggingface.co/datasets/allenai/c4/resolve/main/en/",
         "slimpajama": "https://huggingface.co/datasets/cerebras/SlimPajama-627B/resolve/main/train/"}
WHOLE = {"enwik8": (10**8, "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"),
         "enwik9": (10**9, "159b85351e5f76e60cbe32e04c677847a9ecba3adc79addab6f4c6c7aa3744bc")}     # bytes, sha256, unpacked
SHARDS = {"c4": (1024, 750e6, lambda i: f"c4-train.{i:05d}-of-01024.json.gz"),                      # shards, about so many bytes of text each, names
          "slimpajama": (59_000, 45e6, lambda i: f"chunk{1 + i // 5900}/example_train_{i % 5900}.jsonl.zst")}


def with_shards(data, need):
    """--data, with the number of shards that hold need bytes of text where it names a corpus in shards and none: "c4" -> "c4:3"."""
    if data not in SHARDS:
        return data
    most, each, _ = SHARDS[data]
    return f"{data}:{min(most, max(1, math.ceil(1.1 * need / each)))}"        # 5% are for validation


def files(data, folder):
    """The local files of a named corpus, fetched into folder if need be; None if data is no such name. Raises InputError."""
    name, _, count = data.partition(":")
    if name not in BASES:
        return None
    base, folder = os.environ.get(f"{name.upper()}_URL", BASES[name]), folder / name
    if name in WHOLE:
        path = folder / name
        if not path.exists():
            fetch(f"{base}{name}.zip", folder / f"{name}.zip")
            unpack(folder / f"{name}.zip", path, *WHOLE[name])
        return [path]
    most, _, shard = SHARDS[name]
    if not count.isdecimal() or not 1 <= int(count) <= most:
        raise InputError(f"--data {data}: {name} has 1 to {most:,} shards, as in {name}:4")
    for i in range(int(count)):
        fetch(base + shard(i), folder / shard(i))
    return [folder / shard(i) for i in range(int(count))]


class Redirects(urllib.request.HTTPRedirectHandler):
    """Keeps the sha256 that Hugging Face gives of a file before it sends us to where the file is."""
    sha256 = None

    def redirect_request(self, request, file, code, message, headers, url):
        self.sha256 = headers.get("X-Linked-ETag", "").strip('"') or self.sha256
        return super().redirect_request(request, file, code, message, headers, url)


def fetch(url, path):
    """Download url to path unless it is there: into path.part, which a later try goes on with. Raises InputError."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part, redirects = path.with_name(path.name + ".part"), Redirects()
    have, total = part.stat().st_size if part.exists() else 0, None
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-", "Accept-Encoding": "identity"} if have else {})
        with urllib.request.build_opener(redirects).open(request, timeout=60) as answer:
            have = have if answer.status == 206 else 0        # a server that knows no ranges starts from the beginning
            total = have + int(answer.headers["Content-Length"]) if answer.headers["Content-Length"] else None
            published = redirects.sha256 or answer.headers.get("X-Linked-ETag", "").strip('"')
            with open(part, "r+b" if have else "wb") as file, \
                    tqdm(desc=f"fetching {path.name}", initial=have, total=total, unit="B", unit_scale=True, disable=None) as bar:
                file.seek(have)
                while block := answer.read(2**20):
                    file.write(block)
                    bar.update(len(block))
    except urllib.error.HTTPError as error:
        if error.code != 416:                                 # nothing is left to fetch: a broken try had it all
            raise InputError(f"{url}: {error.code} {error.reason}") from None
        total, published = have, ""
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
        raise InputError(f"{url}: {getattr(error, 'reason', None) or error or type(error).__name__}; what came is kept, the same command "
                         "goes on") from None
    size = part.stat().st_size
    if total and size < total:
        raise InputError(f"{url}: the connection broke after {size:,} of {total:,} bytes; they are kept, the same command goes on")
    if re.fullmatch("[0-9a-f]{64}", published) and (found := sha256(part)) != published:
        part.unlink()
        raise InputError(f"{url}: the sha256 of what came is {found[:16]}..., not {published[:16]}...: deleted, the same command fetches it again")
    os.replace(part, path)


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack(archive, path, size, digest):
    """The one file of a zip archive to path, as a stream; the archive is deleted. Raises InputError if it is not what it should be."""
    try:
        with zipfile.ZipFile(archive) as whole, whole.open(whole.namelist()[0]) as file:
            write_atomic(path, lambda out: [out.write(block) for block in iter(lambda: file.read(2**20), b"")])
    except (zipfile.BadZipFile, EOFError, IndexError) as error:
        archive.unlink()
        raise InputError(f"{archive} is damaged ({error}): deleted, the same command fetches it again") from None
    archive.unlink()
    if path.stat().st_size != size or sha256(path) != digest:
        path.unlink()
        raise InputError(f"{path} is not the {size:,} bytes it should be: deleted, the same command fetches it again")
