import hashlib
import itertools

from lit_scale.seeds import derive_seed


def test_a_seed_is_the_start_of_a_hash() -> None:
    """By Python's integers from the hexadecimal digits, read from the last byte to the first."""
    digits = hashlib.blake2b(b"3/name/0", digest_size=8).hexdigest()
    number = int("".join(digits[i : i + 2] for i in range(14, -1, -2)), 16)
    assert derive_seed(3, "name", 0) == number // 2


def test_seeds_differ_with_every_part_and_with_their_order() -> None:
    parts = list(itertools.product(range(8), range(8), ("a", "b")))
    assert len({derive_seed(*one) for one in parts}) == len(parts)
    assert derive_seed(1, 2) != derive_seed(2, 1)


def test_seeds_are_spread_over_what_a_generator_takes() -> None:
    seeds = [derive_seed("spread", i) for i in range(4_000)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    for bit in range(63):  # each set in half of them: six standard deviations
        assert abs(sum(seed >> bit & 1 for seed in seeds) - 2_000) < 190
