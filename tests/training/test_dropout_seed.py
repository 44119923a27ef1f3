"""The seed of dropout is a fixed function of seed, step and rank."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch

from pipeline.training.dropout_seed import dropout_seed

KNOWN = {
    (0, 0, 0): 3_882_903_725_285_577_553,
    (0, 1, 0): 1_487_206_122_617_792_997,
    (1, 0, 0): 7_071_744_186_526_378_126,
    (-1, 12, 3): 6_974_206_872_915_304_743,
    (42, 1_000_000, 1023): 1_001_053_883_828_021_552,
}


@pytest.mark.parametrize(("position", "expected"), KNOWN.items())
def test_known_seeds_never_change(position: tuple[int, int, int], expected: int) -> None:
    assert dropout_seed(*position) == expected


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_the_seed_does_not_depend_on_pythons_hash(hash_seed: str) -> None:
    code = "import builtins; builtins.hash = None; from pipeline.training.dropout_seed import dropout_seed as s; "
    output = subprocess.run(
        [sys.executable, "-c", f"{code}print(s(42, 1000000, 1023))"],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert int(output) == KNOWN[42, 1_000_000, 1023]


def test_ranks_and_steps_have_seeds_of_their_own_that_torch_accepts() -> None:
    seeds = {dropout_seed(*position) for position in itertools.product(range(3), range(50), range(8))}
    assert len(seeds) == 3 * 50 * 8
    for seed in (min(seeds), max(seeds)):
        assert torch.Generator().manual_seed(seed).initial_seed() == seed
