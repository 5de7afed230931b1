"""Which technique is measured on which task, with which settings, and what its static control is.

A static control is what a person would do in place of the technique without any schedule or choice: a network that is
simply smaller, or as many samples or tokens taken at random.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["ENTRIES", "Control", "Entry"]


@dataclass(frozen=True)
class Control:
    """What a technique is compared with beside plain networks.

    Attributes:
        about: In words.
        size: A plain network of the task's ladder at equal cost, by the size of the technique's network.
        flags: Or flags of a run of the recipe, in place of the entry's, at equal cost.
        plain: Whether these flags belong to a run without the technique.
    """

    about: str
    size: Mapping[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    plain: bool = False


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    Attributes:
        technique: Stem of its callback, card and file of results.
        recipe: Its script.
        task: Its task.
        control: Its static control.
        flags: Of the technique, where they differ from the recipe's defaults.
        variants: Other settings that validation may prefer, by name.
        least_depth: Blocks that the technique needs; on smaller networks it is not judged.
        relative_cost: A guess of what its step costs beside the plain one's; the first run tells.
        kind: Tells two entries of one technique and task apart.
    """

    technique: str
    recipe: str
    task: str
    control: Control
    flags: tuple[str, ...] = ()
    variants: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    least_depth: int = 1
    relative_cost: float = 1.0
    kind: str = ""

    @property
    def name(self) -> str:
        """Of its file of results."""
        return ".".join([self.technique, self.task, *([self.kind] if self.kind else [])])


SHALLOWER = Control("a network of half the depth", size={"2x64": "1x64", "4x64": "2x64", "8x64": "4x64"})
NARROWER = Control("a network of half the width", size={"1x64": "1x32", "2x64": "1x64", "4x64": "2x64"})

ENTRIES = {
    entry.name: entry
    for entry in (
        Entry(
            "sequence_length_warmup",
            "gpt_sequence_length_warmup",
            "text_clm",
            Control("windows of 128 from the beginning to the end", flags=("--data.sequence_length=128",), plain=True),
            relative_cost=0.9,
        ),
    )
}
