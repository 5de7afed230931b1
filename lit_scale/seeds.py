"""Seeds derived from their purpose."""

import hashlib

__all__ = ["derive_seed"]


def derive_seed(*parts: int | str) -> int:
    """Hash numbers and names to a seed. Unlike with a sum, (seed 0, epoch 1) and (seed 1, epoch 0) differ.

    Args:
        parts: Everything that the random numbers should depend on, in a fixed order.

    Returns:
        An integer in [0, 2**63), the same on every machine.
    """
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
