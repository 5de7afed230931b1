"""The measurements of techniques: the task, the settings and the static control of each.

A static control is the technique without its schedule or choice: for example a network that is smaller from the start,
or the same number of samples or tokens chosen at random.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["ENTRIES", "Control", "Entry"]


@dataclass(frozen=True)
class Control:
    """The static control of a technique, at equal cost. At most one of the first three ways below is used.

    Attributes:
        about: A description.
        size: A smaller plain network: its name in the task's ladder, by the size of the technique's network.
        batch_size: A plain run with this batch size: as many samples as the technique trains, chosen at random.
        flags: A run of the technique's recipe with these flags instead of the entry's.
        recipe: The recipe that ``flags`` are for, if it is another one.
    """

    about: str
    size: Mapping[str, str] = field(default_factory=dict)
    batch_size: int = 0
    flags: tuple[str, ...] = ()
    recipe: str = ""


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    Attributes:
        technique: Name of the technique: stem of its callback, its card and its result file.
        recipe: Name of the recipe.
        task: Name of the task.
        control: The static control.
        flags: Flags of the technique that differ from the recipe's defaults.
        variants: Other settings, by name, among which the validation split chooses.
        least_depth: Smallest number of blocks of a network on which the technique is measured.
        relative_cost: Rough cost of its step relative to the plain one, for the short run that measures it.
        suffix: Suffix of the names of the networks that the technique can use; empty for all.
        kind: Distinguishes two entries of one technique and task.
    """

    technique: str
    recipe: str
    task: str
    control: Control
    flags: tuple[str, ...] = ()
    variants: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    least_depth: int = 1
    relative_cost: float = 1.0
    suffix: str = ""
    kind: str = ""

    @property
    def name(self) -> str:
        """Name of the result file."""
        return ".".join([self.technique, self.task, *([self.kind] if self.kind else [])])


def flags(technique: str, **given: object) -> tuple[str, ...]:
    """Flags of one technique.

    >>> flags("random_ltd", keep=0.5)
    ('--random_ltd.keep=0.5',)
    """
    return tuple(f"--{technique}.{name}={value}" for name, value in given.items())


SHALLOWER = Control("a network of half the depth", size={"2x64": "1x64", "4x64": "2x64", "8x64": "4x64"})
NARROWER = Control("a network of half the width", size={"1x64": "1x32", "4x64": "4x32"})
FEWER = Control("half of the samples, taken at random", batch_size=8)
NONE = Control("none: it is no choice and no schedule")

ENTRIES = {
    entry.name: entry
    for entry in (
        Entry(
            "sequence_length_warmup",
            "gpt_sequence_length_warmup",
            "text_clm",
            Control(
                "half of the length until the last tenth",
                flags=flags("sequence_length_warmup", stages="[[0.0,0.5],[0.9,1.0]]"),
            ),
        ),
        Entry("eight_bit_optimizer", "gpt_eight_bit_optimizer", "text_clm", NONE, relative_cost=1.2),
        Entry(
            "resolution_growing",
            "vit_resolution_growing",
            "image_classify",
            Control(
                "half of the side until the last twentieth",
                flags=flags("resolution_growing", stages="[[0.0,0.5],[0.95,1.0]]"),
            ),
            relative_cost=0.6,
        ),
        Entry(
            "patch_dropping",
            "vit_patch_dropping",
            "image_classify",
            Control(
                "half of the side until the last twentieth",
                flags=flags("resolution_growing", stages="[[0.0,0.5],[0.95,1.0]]"),
                recipe="vit_resolution_growing",
            ),
            flags=flags("patch_dropping", fraction=0.5),
            variants={"three quarters dropped": flags("patch_dropping", fraction=0.75)},
            relative_cost=0.6,
        ),
        Entry(
            "importance_sampling",
            "vit_importance_sampling",
            "image_classify",
            Control("half of the samples, taken at random", batch_size=16),
            kind="balanced",
        ),
        Entry("all_in_one", "vit_all_in_one", "image_classify", SHALLOWER, least_depth=2, relative_cost=0.5),
        Entry(
            "importance_sampling",
            "vit_importance_sampling",
            "image_imbalanced",
            FEWER,
            variants={"of twice as many": flags("importance_sampling", presample=2)},
            relative_cost=1.5,
        ),
        Entry("selective_backprop", "vit_selective_backprop", "image_imbalanced", FEWER, relative_cost=0.9),
        Entry(
            "rho_loss",
            "vit_rho_loss",
            "image_noisy",
            FEWER,
            flags=("--data.part=[0.0,0.8]", "--rho_loss.share=0.5"),
            variants={"the top tenth": ("--data.part=[0.0,0.8]", "--rho_loss.share=0.1")},
            relative_cost=2.0,
        ),
        Entry(
            "masked_token_skip",
            "mae_masked_token_skip",
            "image_mim",
            Control("a network of half the depth", size={"4x64+decoder": "2x64+decoder"}),
            suffix="+decoder",
            relative_cost=0.4,
        ),
        Entry(
            "token_dropping",
            "bert_token_dropping",
            "text_mlm",
            Control(
                "as many tokens, at random",
                flags=flags("random_ltd", keep=0.5, before=1, after=1, until=1.0, stages=1),
                recipe="bert_random_ltd",
            ),
            flags=flags("token_dropping", keep=0.5, before=1, after=1),
            variants={"a quarter is kept": flags("token_dropping", keep=0.25, before=1, after=1)},
            least_depth=3,
        ),
        Entry(
            "random_ltd",
            "bert_random_ltd",
            "text_mlm",
            SHALLOWER,
            variants={"from a half": flags("random_ltd", keep=0.5)},
            least_depth=3,
        ),
        Entry("mask_later", "bert_mask_later", "text_mlm", SHALLOWER, least_depth=3),
        Entry(
            "dynamic_sparsity",
            "bert_dynamic_sparsity",
            "text_mlm",
            NARROWER,
            flags=flags("dynamic_sparsity", density=0.5),
            variants={"a quarter of the units": flags("dynamic_sparsity", density=0.25)},
            relative_cost=0.7,
        ),
        Entry(
            "dynamic_sparsity",
            "bert_dynamic_sparsity",
            "text_mlm",
            Control(
                "a random mask that never moves",
                flags=flags("dynamic_sparsity", density=0.2, granularity="weight", drop=0.0),
            ),
            flags=flags("dynamic_sparsity", density=0.2, granularity="weight"),
            relative_cost=1.2,
            kind="weights",
        ),
        Entry("all_in_one", "bert_all_in_one", "text_mlm", SHALLOWER, least_depth=4, relative_cost=0.6),
        Entry(
            "large_batch",
            "bert_large_batch",
            "text_mlm",
            Control("a plain step of four times the batch", batch_size=64),
            flags=(
                "--trainer.max_epochs=-1",
                "--trainer.limit_train_batches=10752",  # whole steps in each epoch
                "--trainer.callbacks=null",
                *flags("large_batch", times=16, lr="null", scaling="none"),
            ),
            relative_cost=16.0,
        ),
        Entry(
            "progressive_stacking",
            "bert_progressive_stack",
            "text_mlm_deep",
            SHALLOWER,
            variants={"from half of the depth": flags("progressive_stacking", stages="[[0.0,0.5],[0.5,1.0]]")},
            least_depth=4,
            relative_cost=0.6,
        ),
    )
}
