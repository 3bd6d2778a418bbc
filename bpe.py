"""Byte-level BPE: learn merges from text, cut any bytes into tokens, put them together again.

    python bpe.py FILE [--vocab 512]            # learn a vocabulary from a file, print its merges in order

Symbols are ids, and a word is held as a str with one character per symbol, chr(id): so the inner loops of merging are
str.split and str.join, which run in C.
"""
import argparse
import heapq
import io
import re
from array import array
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from run import InputError, run_script, usage_error

VOCAB_RANGE = (257, 65536)

# GPT-2's pre-tokenization, on bytes: words, numbers, punctuation, spaces; no merge crosses these borders. Any byte of a
# multi-byte character counts as a letter. The zero byte between documents always stands alone. A run is cut at 1,024
# bytes, which bounds the cost of text without any borders (base64, DNA).
PRETOKEN = re.compile(
    rb"'(?:[sdmt]|ll|ve|re)"
    rb"| ?[A-Za-z\x80-\xff]{1,1024}"
    rb"| ?[0-9]{1,1024}"
    rb"| ?[^\sA-Za-z0-9\x80-\xff\x00]{1,1024}"
    rb"|\s{1,1024}(?![^\s\x00])"      # spaces, but for the last one before a word: that one belongs to the word
    rb"|\s{1,1024}"
    rb"|\x00")


def pretokens(stream, size=2**20):
    """Cut what a binary stream holds into pre-tokens: yields lists of bytes, about size bytes (many words) at a time."""
    rest, chunk = b"", stream.read(size)
    while chunk:
        following = stream.read(size)
        words = PRETOKEN.findall(rest + chunk)
        rest = b""
        if following and len(words) > 2:                      # what touches the end of the chunk (two words, where it cuts
            rest = b"".join(words[-2:])                       # an 'll) might be cut otherwise in the whole: read it again
            del words[-2:]
        yield words
        chunk = following


def train_bpe(text, vocab_size):
    """Learn a byte-level BPE (Sennrich et al. 2016): merge the most frequent adjacent pair, again and again.

    text: bytes. Returns the merges in order, as (left, right) pairs of bytes: vocab_size - 256 of them, or fewer where
    the text has no pair left. Ties go to the pair that is greater as bytes. Raises InputError unless 257 <= vocab_size <= 65536.

    >>> train_bpe(b"low lower lowest", 259)
    [(b'o', b'w'), (b'l', b'ow'), (b'low', b'e')]
    """
    check_vocab(vocab_size)
    counts = Counter()
    for piece in pretokens(io.BytesIO(text)):
        counts.update(piece)
    words = [word.decode("latin-1") for word in counts]       # latin-1: byte b becomes chr(b)
    weight = list(counts.values())
    tokens = [bytes([i]) for i in range(256)]
    ids = {token: i for i, token in enumerate(tokens)}        # two merges may spell the same bytes: they share an id

    pairs = Counter()                                         # "lr" -> occurrences in the text
    where = defaultdict(set)                                  # "lr" -> words that may hold it
    for i, word in enumerate(words):
        for left, right in zip(word, word[1:]):
            pairs[left + right] += weight[i]
            where[left + right].add(i)

    def falling(token):                                       # sorts byte strings from the greatest to the least
        return "".join(chr(255 - b) for b in token) + chr(256)

    order = [falling(token) for token in tokens]
    heap = [(-n, order[ord(pair[0])], order[ord(pair[1])], pair) for pair, n in pairs.items()]
    heapq.heapify(heap)
    merges = []
    while heap and len(merges) < vocab_size - 256:
        count, _, _, pair = heapq.heappop(heap)
        if -count != pairs[pair]:
            continue                                          # outdated: the true count was pushed when it changed
        l, r = pair
        merges.append((tokens[ord(l)], tokens[ord(r)]))
        token = tokens[ord(l)] + tokens[ord(r)]
        if token not in ids:
            ids[token] = len(tokens)
            tokens.append(token)
            order.append(falling(token))
        new = chr(ids[token])
        change = Counter()
        for i in where.pop(pair):
            parts = words[i].split(pair)
            words[i] = new.join(parts)
            for j, (before, after) in enumerate(zip(parts, parts[1:])):       # one merge between each two parts
                change[pair] -= weight[i]
                if before or j > 0:                           # an empty part: the left neighbour is a merge as well
                    change[(before[-1:] or r) + l] -= weight[i]
                    change[(before[-1:] or new) + new] += weight[i]
                    where[(before[-1:] or new) + new].add(i)
                if after:
                    change[r + after[0]] -= weight[i]
                    change[new + after[0]] += weight[i]
                    where[new + after[0]].add(i)
        for pair, n in change.items():
            pairs[pair] += n
            if n and pairs[pair] > 0:
                heapq.heappush(heap, (-pairs[pair], order[ord(pair[0])], order[ord(pair[1])], pair))
    return merges


def check_vocab(vocab_size):
    low, high = VOCAB_RANGE
    if not low <= vocab_size <= high:
        raise InputError(f"a BPE vocabulary has {low} to {high} tokens, not {vocab_size}")


class WordCache(dict):
    """word -> its token ids as packed uint16, computed when first asked for."""

    def __init__(self, encode_word):
        self.encode_word = encode_word

    def __missing__(self, word):
        if len(self) >= 500_000:                              # bounds the memory on text whose words never repeat
            self.clear()
        self[word] = ids = array("H", self.encode_word(word)).tobytes()
        return ids


class Tokenizer:
    """Bytes to ids and back, for any bytes. merges: from train_bpe; none make the byte tokenizer (id = byte).

    Ids 0..255 are the bytes, id 256 + j is the j-th merge. bytes_per_id: (vocab_size,) lengths. Raises InputError for a
    merge of tokens that no earlier merge makes.
    """

    def __init__(self, merges=()):
        self.merges = [tuple(merge) for merge in merges]
        self.tokens = [bytes([i]) for i in range(256)] + [left + right for left, right in self.merges]
        self.vocab_size = len(self.tokens)
        self.bytes_per_id = np.array([len(token) for token in self.tokens])
        ids = {}
        self.rank, self.rules = {}, []                        # "lr" -> rank of its merge; rank -> ("lr", merged)
        for i, token in enumerate(self.tokens):
            ids.setdefault(token, i)
        for j, (left, right) in enumerate(self.merges):
            if max(ids.get(left, self.vocab_size), ids.get(right, self.vocab_size)) >= 256 + j:
                raise InputError(f"merge {j} joins {left!r} and {right!r}, which are not both tokens yet")
            pair = chr(ids[left]) + chr(ids[right])
            self.rank.setdefault(pair, j)
            self.rules.append((pair, chr(ids[left + right])))
        self.cache = WordCache(self._encode_word)

    def _encode_word(self, word):
        """Apply the merges to one word, lowest rank first: -> list of ids."""
        text = word.decode("latin-1")
        heap = [self.rank[pair] for pair in set(map("".join, zip(text, text[1:]))) if pair in self.rank]
        heapq.heapify(heap)
        while heap:
            pair, new = self.rules[heapq.heappop(heap)]
            parts = text.split(pair)
            text = new.join(parts)
            for before, after in zip(parts, parts[1:]):
                for born in ((before[-1:] or new) + new, new + after[:1]):
                    if born in self.rank:
                        heapq.heappush(heap, self.rank[born])
        return [ord(symbol) for symbol in text]

    def encode_stream(self, stream):
        """A binary stream of any length -> the ids of encode(all of it), piece by piece, in bounded memory."""
        for words in pretokens(stream):
            yield np.frombuffer(b"".join(map(self.cache.__getitem__, words)), dtype=np.uint16)

    def encode(self, text):
        """bytes -> (N,) ids: uint8 without merges, else uint16."""
        if not self.merges:
            return np.frombuffer(text, dtype=np.uint8)
        return np.concatenate([np.zeros(0, np.uint16), *self.encode_stream(io.BytesIO(text))])

    @classmethod
    def from_hex(cls, merges):
        """Of the merges as meta.json and checkpoints have them: pairs of hexadecimal strings."""
        return cls([(bytes.fromhex(left), bytes.fromhex(right)) for left, right in merges])

    def starts(self, ids):
        """Where in the bytes that ids spell a token starts: (N,) -> (bytes,) bool"""
        lengths = self.bytes_per_id[ids]
        starts = np.zeros(lengths.sum(), dtype=bool)
        starts[lengths.cumsum() - lengths] = True
        return starts

    def decode(self, ids):
        """(N,) ids in [0, vocab_size) -> bytes."""
        return b"".join([self.tokens[i] for i in ids])


def main():
    parser = argparse.ArgumentParser(description="Learn a BPE vocabulary from a file and print its merges in order.")
    parser.error = usage_error
    parser.add_argument("file", type=Path)
    parser.add_argument("--vocab", type=int, default=512, help="tokens in the vocabulary (512)")
    args = parser.parse_args()
    text = args.file.read_bytes()
    tokenizer = Tokenizer(train_bpe(text, args.vocab))
    for i, (left, right) in enumerate(tokenizer.merges, 256):
        print(f"{i:>6}  {left!r} + {right!r}")
    print(f"{len(text) / max(1, len(tokenizer.encode(text))):.3f} bytes per token")


if __name__ == "__main__":
    run_script(main)
