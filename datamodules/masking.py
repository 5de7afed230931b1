"""Masked language modelling (Devlin et al., NAACL 2019, section 3.1), as a pure function of (seed, epoch, index).

In each sequence 15% of the positions are chosen. Of the chosen ones 80% are replaced by the mask token, 10% by a random
token, and 10% are left unchanged. The number of chosen positions is the same in all sequences, so shapes are static.
"""

import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

_WEYL = np.uint64(0x9E3779B97F4A7C15)


def num_predictions(rate: float, length: int) -> int:
    """Number of positions of a sequence that are chosen: M = max(1, round(rate * length)), or 0 for rate 0."""
    return max(1, round(rate * length)) if rate > 0 else 0


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele et al., OOPSLA 2014): each bit depends on all bits of the input."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _draw(keys: npt.NDArray[np.uint64], counters: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Number ``counters`` of the SplitMix64 stream that starts at ``keys``; both broadcast."""
    return _mix(keys + (counters + np.uint64(1)) * _WEYL)


def _keys(seed: int, epoch: int, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """One key per sample, (B,): a hash of seed, epoch and index."""
    keys = np.full(indices.shape, seed % 2**64, dtype=np.uint64)
    for part in (np.full_like(indices, epoch), indices):
        keys = _mix(_draw(keys, part.astype(np.uint64)))
    return keys


@functools.lru_cache(maxsize=8)
def _ordinary(vocab_size: int, special: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """The ids that are not special, ascending."""
    ordinary = np.setdiff1d(np.arange(vocab_size), special)
    ordinary.setflags(write=False)
    return ordinary


def mask_tokens(
    tokens: npt.ArrayLike,
    *,
    rate: float = 0.15,
    vocab_size: int,
    mask_id: int,
    special_ids: Sequence[int] = (),
    seed: int,
    epoch: int,
    indices: npt.ArrayLike,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose and replace tokens for a batch.

    Special tokens are chosen only if a sequence has fewer than M other tokens. They are then left unchanged, and the
    label is the token itself.

    Args:
        tokens: Ids, (B, T).
        rate: Share of the positions to choose, in (0, 1); 0.15 in BERT.
        vocab_size: Number of ids, special ones included; random replacements are drawn from the other ones.
        mask_id: The mask token; special, whether it is in ``special_ids`` or not.
        special_ids: Tokens that carry no text, such as separators.
        seed: Seed of the masks.
        epoch: Number of the epoch; always 0 for masks that never change.
        indices: Index of each sequence in its dataset, (B,). The masks depend on seed, epoch and index only, not on the
            other sequences of the batch or on earlier calls.

    Returns:
        ``input_ids`` (B, T) with replacements, ``positions`` (B, M) in ascending order, and ``labels`` (B, M), the
        original tokens; all int64, with M = max(1, round(rate * T)).

    Raises:
        ValueError: If ``rate`` is not in (0, 1).
    """
    if not 0 < rate < 1:
        raise ValueError(f"rate={rate}: must lie between 0 and 1, such as 0.15")
    ids = np.asarray(tokens).astype(np.int64)  # (B, T), a copy that is written to
    size, length = ids.shape
    chosen = num_predictions(rate, length)
    special = tuple(sorted({mask_id, *special_ids}))
    ordinary = _ordinary(vocab_size, special)

    keys = _keys(seed, epoch, np.asarray(indices, dtype=np.int64).reshape(size))[:, None]  # (B, 1)
    counters = np.arange(length + 2 * chosen, dtype=np.uint64)[None]  # disjoint for the three uses below
    score = _draw(keys, counters[:, :length]) >> np.uint64(1)  # (B, T)
    is_special = np.isin(ids, special)
    score |= is_special.astype(np.uint64) << np.uint64(63)  # special tokens come last
    positions = np.sort(np.argpartition(score, chosen - 1, axis=1)[:, :chosen], axis=1)  # (B, M)
    labels = np.take_along_axis(ids, positions, axis=1)

    bits = _draw(keys, counters[:, length : length + chosen]) >> np.uint64(11)
    action = bits.astype(np.float64) * 2.0**-53  # (B, M), uniform in [0, 1)
    drawn = _draw(keys, counters[:, length + chosen :]) >> np.uint64(32)
    random = ordinary[((drawn * np.uint64(len(ordinary))) >> np.uint64(32)).astype(np.int64)]
    replaced = np.where(action < 0.8, mask_id, np.where(action < 0.9, random, labels))
    replaced = np.where(np.take_along_axis(is_special, positions, axis=1), labels, replaced)
    np.put_along_axis(ids, positions, replaced, axis=1)
    return torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(labels)
