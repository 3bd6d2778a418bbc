"""bpe.py against a brute force that merges one pair at a time, as Sennrich et al. define it."""
import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from conftest import execute

from bpe import WORD, Tokenizer, train_bpe

ALPHABETS = [b"ab", b"ab ", b"aaab\x00 ", b"it's ll\n", b"\xc8\xc9 ", bytes(range(256))]


def words_of(text):
    return [[bytes([byte]) for byte in word] for word in WORD.findall(text)]


def merge_tokens(word, pair):
    """Return the list of tokens word with pair merged, from left to right."""
    merged = []
    for token in word:
        # A merged token is longer than the left one, so it is never taken for it.
        if merged and (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return merged


def brute_force_training(text, vocab_size):
    words, merges = words_of(text), []
    while len(merges) < vocab_size - 256:
        counts = Counter(pair for word in words for pair in pairwise(word))
        if not counts:
            break
        merges.append(max(counts, key=lambda pair: (counts[pair], pair)))
        words = [merge_tokens(word, merges[-1]) for word in words]
    return merges


def brute_force_encoding(merges, text):
    tokens = []
    for word in words_of(text):
        while present := [pair for pair in merges if pair in set(pairwise(word))]:
            word = merge_tokens(word, present[0])
        tokens += word
    return tokens


def assert_encodes_as_brute_force(merges, text):
    tokenizer = Tokenizer(merges)
    tokens = [tokenizer.tokens[i] for i in tokenizer.encode(text)]
    assert tokens == brute_force_encoding(merges, text)


@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_random_text_is_learned_and_encoded_as_by_brute_force(alphabet):
    rng = random.Random(0)
    for length, vocab_size in ((5, 300), (60, 257), (60, 270), (400, 300), (2000, 330)):
        text = bytes(rng.choices(alphabet, k=length))
        merges = train_bpe(text, vocab_size)
        assert merges == brute_force_training(text, vocab_size)
        assert_encodes_as_brute_force(merges, text)
        assert_encodes_as_brute_force(merges, bytes(rng.choices(alphabet, k=300)))


def test_real_text_is_learned_and_encoded_as_by_brute_force(source_text):
    merges = train_bpe(source_text[:20_000], 350)
    assert merges == brute_force_training(source_text[:20_000], 350)
    assert_encodes_as_brute_force(merges, source_text[-5000:])


def test_merges_may_spell_the_same_bytes():
    merges = [(b"a", b"b"), (b"b", b"c"), (b"ab", b"c"), (b"a", b"bc"), (b"abc", b"d")]
    assert Tokenizer(merges).vocab_size == 261
    for text in (b"abcd", b"bcabcdabc", b"aabcdd"):
        assert_encodes_as_brute_force(merges, text)
    # The earlier id serves for both.
    assert Tokenizer(merges).encode(b"abc") == [258]


def test_any_bytes_are_decoded_to_what_was_encoded(source_text):
    tokenizer = Tokenizer(train_bpe(source_text, 1000))
    unicode = "naïve 漢字 🙂\r\n".encode() * 50
    noise = random.Random(1).randbytes(100_000)
    for text in (b"", b"\x00", noise, unicode, b"a" * 5000, source_text):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.uint16
        assert tokenizer.decode(ids) == text
        assert tokenizer.bytes_per_id[ids].sum() == len(text)
        assert Tokenizer().decode(Tokenizer().encode(text)) == text
    assert len(tokenizer.encode(source_text)) < len(source_text) / 2.5


def test_no_merge_crosses_a_document_boundary():
    assert train_bpe(b"ab\x00ab\x00" * 100, 300) == [(b"a", b"b")]


@pytest.mark.parametrize("vocab_size", [-1, 256, 65537])
def test_a_vocabulary_out_of_range_is_refused(vocab_size):
    with pytest.raises(ValueError, match="257 to 65,536"):
        train_bpe(b"text", vocab_size)


def test_the_script_prints_merges_or_one_line(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"low lower lowest")
    assert "258  b'low' + b'e'" in execute(tmp_path, "bpe.py", "text.txt", "--vocab", 259).stdout
    for arguments in (["no.txt"], ["text.txt", "--vocab", 9], ["text.txt", "--vocab", "x"], []):
        done = execute(tmp_path, "bpe.py", *arguments)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
