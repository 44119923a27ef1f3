"""The seed of dropout, a function of the position in the run: a resumed run draws what it would have drawn."""

from __future__ import annotations

import hashlib


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Mixes three integers into a seed for `torch.manual_seed`.

    Hashes their decimal digits with BLAKE2b, so that the result is the same on every machine and in every version of
    Python, unlike that of `hash`.
    """
    digest = hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # 63 bits, which fit torch's signed seed
