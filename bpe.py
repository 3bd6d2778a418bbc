"""Byte-level BPE: learn merges from text, encode bytes as tokens, decode tokens to bytes.

    python bpe.py FILE [--vocab 512]            # learn a vocabulary from a file, print its merges

Start from the 256 bytes. Again and again, merge the most frequent pair of neighbouring tokens into
a new token (Sennrich et al. 2016). Encoding applies the same merges in the same order.
"""
import argparse
import heapq
import re
from array import array
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np

# GPT-2's pre-tokenization, on bytes: words, numbers, punctuation, spaces; no merge crosses these
# boundaries. Bytes from 128 up count as letters. Of the spaces before a word, the last one belongs
# to the word. The zero byte between documents stands alone. No word is longer than 1,024 bytes
# (and a space), which bounds the cost of text without boundaries (base64, DNA).
WORD = re.compile(
    rb"'(?:[sdmt]|ll|ve|re)"
    rb"| ?[A-Za-z\x80-\xff]{1,1024}"
    rb"| ?[0-9]{1,1024}"
    rb"| ?[^\sA-Za-z0-9\x80-\xff\x00]{1,1024}"
    rb"|\s{1,1024}(?![^\s\x00])"
    rb"|\s{1,1024}"
    rb"|\x00")


def split_words(text, size=2**20):
    """Yield the words of text in order, as lists: those of about size bytes at a time."""
    start = 0
    while start < len(text):
        end = min(start + size, len(text))
        words = WORD.findall(text, start, end)
        # The end may fall inside a word, or cut 'll into two: read the last two words again.
        if end < len(text):
            end -= len(words.pop()) + len(words.pop())
        yield words
        start = end


def merge(ids, pair, new):
    """Return the list ids with each occurrence of pair, from left to right, replaced by new.

    >>> merge([1, 2, 3, 1, 2], (1, 2), 4)
    [4, 3, 4]
    """
    left, right = pair
    merged = []
    i = 0
    while i < len(ids):
        if ids[i] == left and i + 1 < len(ids) and ids[i + 1] == right:
            merged.append(new)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


def train_bpe(text, vocab_size):
    """Return the vocab_size - 256 merges learned from text (bytes), in order, as pairs of bytes.

    Ties go to the pair that is greater as bytes. There are fewer merges if no pair is left.
    Raises ValueError unless 257 <= vocab_size <= 65,536.

    >>> train_bpe(b"low lower lowest", 259)
    [(b'o', b'w'), (b'l', b'ow'), (b'low', b'e')]
    """
    if not 257 <= vocab_size <= 65536:
        raise ValueError(f"a BPE vocabulary has 257 to 65,536 tokens, not {vocab_size}")
    word_counts = Counter()
    for words in split_words(text):
        word_counts.update(words)
    words = [list(word) for word in word_counts]
    weights = list(word_counts.values())
    tokens = [bytes([i]) for i in range(256)]
    # Two merges may spell the same bytes: they share an id.
    ids = {token: i for i, token in enumerate(tokens)}

    counts = defaultdict(int)
    where = defaultdict(set)
    for w, word in enumerate(words):
        for pair in pairwise(word):
            counts[pair] += weights[w]
            where[pair].add(w)

    heap = [heap_entry(pair, counts, tokens) for pair in counts]
    heapq.heapify(heap)
    merges = []
    while heap and len(merges) < vocab_size - 256:
        count, *_, pair = heapq.heappop(heap)
        # An outdated entry: the pair's new count was pushed when it changed.
        if -count != counts[pair]:
            continue
        left, right = tokens[pair[0]], tokens[pair[1]]
        merges.append((left, right))
        new = ids.setdefault(left + right, len(tokens))
        if new == len(tokens):
            tokens.append(left + right)
        for changed in apply_merge(pair, new, words, weights, counts, where):
            if counts[changed] > 0:
                heapq.heappush(heap, heap_entry(changed, counts, tokens))
    return merges


def heap_entry(pair, counts, tokens):
    """Return the heap's key of a pair: the most frequent first, then the greatest as bytes."""
    # The 1 sorts a longer token before its own beginning.
    left, right = ([-byte for byte in tokens[i]] + [1] for i in pair)
    return -counts[pair], left, right, pair


def apply_merge(pair, new, words, weights, counts, where):
    """Merge pair in all words; update counts and where. Return the pairs whose counts changed.

    counts: pair -> how often it occurs; where: pair -> the words that have it, or once had it.
    """
    changes = defaultdict(int)
    for w in where.pop(pair):
        old = words[w]
        words[w] = merge(old, pair, new)
        if len(words[w]) == len(old):
            continue
        for neighbours in pairwise(old):
            changes[neighbours] -= weights[w]
        for neighbours in pairwise(words[w]):
            changes[neighbours] += weights[w]
            where[neighbours].add(w)
    changed = [neighbours for neighbours, change in changes.items() if change]
    for neighbours in changed:
        counts[neighbours] += changes[neighbours]
    return changed


class WordCache(dict):
    """word -> its ids, packed as the bytes of uint16, computed when first asked for."""

    def __init__(self, encode_word):
        self.encode_word = encode_word

    def __missing__(self, word):
        ids = array("H", self.encode_word(word)).tobytes()
        # Long words rarely repeat. Both limits bound the memory.
        if len(word) <= 128:
            if len(self) >= 500_000:
                self.clear()
            self[word] = ids
        return ids


class Tokenizer:
    """Bytes to ids and back, for any bytes.

    merges: from train_bpe; ids 0..255 are the bytes, id 256 + j is merge j. Without merges it is
    the byte tokenizer. tokens: the bytes of each id; bytes_per_id: their lengths, (vocab_size,).
    Raises ValueError for a merge of tokens that no earlier merge makes.
    """

    def __init__(self, merges=()):
        self.merges = [tuple(pair) for pair in merges]
        self.tokens = [bytes([i]) for i in range(256)]
        ids = {token: i for i, token in enumerate(self.tokens)}
        # Words are merged as str, one character a token: chr(id). str.split and str.join are fast.
        self.rank = {}
        self.rules = []
        for left, right in self.merges:
            if left not in ids or right not in ids:
                raise ValueError(f"{left!r} and {right!r} are merged, but not both are tokens yet")
            pair = chr(ids[left]) + chr(ids[right])
            new = ids.setdefault(left + right, len(self.tokens))
            self.tokens.append(left + right)
            self.rank.setdefault(pair, len(self.rules))
            self.rules.append((pair, chr(new)))
        self.vocab_size = len(self.tokens)
        self.bytes_per_id = np.array([len(token) for token in self.tokens])
        self.cache = WordCache(self._encode_word)

    @classmethod
    def from_hex(cls, merges):
        """Return the tokenizer of merges given as pairs of hexadecimal strings (see to_hex)."""
        return cls([(bytes.fromhex(left), bytes.fromhex(right)) for left, right in merges])

    def to_hex(self):
        """Return the merges as pairs of hexadecimal strings, for JSON files and checkpoints."""
        return [(left.hex(), right.hex()) for left, right in self.merges]

    def _encode_word(self, word):
        """Return the ids of one word: apply the merges that it has, the earliest first."""
        symbols = word.decode("latin-1")
        pairs = set(map("".join, pairwise(symbols)))
        ranks = [self.rank[pair] for pair in pairs if pair in self.rank]
        heapq.heapify(ranks)
        while ranks:
            pair, new = self.rules[heapq.heappop(ranks)]
            parts = symbols.split(pair)
            symbols = new.join(parts)
            # A new token has new neighbours; where a part is empty, that is another new token.
            for before, after in pairwise(parts):
                for neighbours in ((before[-1:] or new) + new, new + after[:1]):
                    if neighbours in self.rank:
                        heapq.heappush(ranks, self.rank[neighbours])
        return [ord(symbol) for symbol in symbols]

    def encode(self, text):
        """Return the ids of text (bytes): (N,), uint8 without merges, uint16 with merges."""
        if not self.merges:
            return np.frombuffer(text, dtype=np.uint8)
        packed = [b"".join(map(self.cache.__getitem__, words)) for words in split_words(text)]
        return np.frombuffer(b"".join(packed), dtype=np.uint16)

    def decode(self, ids):
        """Return the bytes that ids, (N,) in [0, vocab_size), stand for."""
        return b"".join([self.tokens[i] for i in ids])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=argparse.SUPPRESS)
    parser.add_argument("file", type=Path)
    parser.add_argument("--vocab", type=int, default=512, help="tokens in the vocabulary (512)")
    args = parser.parse_args()
    try:
        text = args.file.read_bytes()
        tokenizer = Tokenizer(train_bpe(text, args.vocab))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for i, (left, right) in enumerate(tokenizer.merges, 256):
        print(f"{i:>6}  {left!r} + {right!r}")
    print(f"{len(text) / max(1, len(tokenizer.encode(text))):.3f} bytes per token")


if __name__ == "__main__":
    main()
