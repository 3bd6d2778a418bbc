"""The short form of torture.py."""
import random

import pytest

import torture
from conftest import library_text


def test_fuzzed_commands(tmp_path):
    (tmp_path / "text.txt").write_bytes(library_text())
    assert 5 < torture.fuzz(tmp_path, 60, random.Random(1)) < 55


@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_kills_at_random_instants(tmp_path, objective):
    (tmp_path / "text.txt").write_bytes(library_text())
    assert torture.kill(tmp_path, objective, 3, random.Random(2), flops=4e9) >= 1
