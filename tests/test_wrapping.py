import itertools
from collections.abc import Callable
from typing import Any

import pytest

from lit_scale.wrapping import wrap


class Word:
    def text(self) -> str:
        return "x"


def around(left: str, right: str) -> Callable[..., str]:
    return lambda method, *args: left + method(*args) + right


def test_the_outermost_stands_outside_whoever_comes_first() -> None:
    for order in itertools.permutations(range(3)):
        word = Word()
        for layer in order:
            wrap(word, "text", around("([{"[layer], ")]}"[layer]), outermost=layer == 2)
        inner = [layer for layer in order if layer != 2]
        assert word.text() == "{" + "(["[inner[1]] + "(["[inner[0]] + "x" + ")]"[inner[0]] + ")]"[inner[1]] + "}"
        assert Word().text() == "x"  # another object


@pytest.mark.parametrize("own", [None, lambda: "own"])
def test_they_leave_in_any_order_and_nothing_stays(own: Any) -> None:
    for order in itertools.permutations(range(3)):
        word = Word()
        if own is not None:
            vars(word)["text"] = own
        before = word.text()
        unwraps = [wrap(word, "text", around("([{"[layer], "")) for layer in range(3)]
        left = set(range(3))
        for layer in order:
            unwraps[layer]()
            unwraps[layer]()  # twice is once
            left.remove(layer)
            assert word.text() == "".join("([{"[layer] for layer in sorted(left, reverse=True)) + before
        assert word.__dict__ == ({} if own is None else {"text": own})
