"""The tasks on which techniques are measured: data, a ladder of plain networks, and budgets.

Baselines belong to tasks: the plain runs of a task are made once, by size, budget and seed, and all of its techniques
are compared with them. Costs are in steps of one plain network, the task's *unit*. The seconds of a step change with
the load of the machine; the ratio of two steps that are timed in turn does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

CPU = ("--trainer.accelerator=cpu", "--trainer.devices=1")
CIFAR10 = (
    "--data.source=data/cifar10/train-{00000..00008}.tar",
    "--data.val_source=data/cifar10/train-00009.tar",
    "--data.test_source=data/cifar10/test-*.tar",
    "--data.val_fraction=0.1",
    "--data.max_val_images=null",
)


@dataclass(frozen=True, eq=False)  # one object for each name
class Task:
    """Data, metric, sizes, budgets and rates.

    Attributes:
        name: Name of the task and of its result file.
        about: A description in one line, for tables.
        recipe: Name of the recipe whose ``--baseline`` is the plain run.
        flags: Flags of all runs, with and without a technique.
        sizes: Flags of each network of the ladder, the smallest first.
        unit: The size whose plain step is the unit of cost.
        budgets: Costs of the runs, in steps of the unit, ascending, each about twice the one before. On a CPU they are
            about 30, 60, 120 and 240 seconds of one core.
        headline: The budget at which techniques are compared.
        trained: A size and the budget that trains it on about 20 tokens per parameter.
        judged_on: The network of a technique's headline result: ``"envelope"``, the best plain one at the headline
            budget, or ``"trained"``. It is fixed before the technique runs.
        rates: Initial grid of learning rates.
        tokens: Tokens of a sample.
        batches: Other batch sizes to try on the best plain network.
        metric: Name of the metric that is compared; lower is better.
        seeds: Seeds whose runs are reported.
        jobs: Number of runs at a time.
        machine: Flags for the device.
    """

    name: str
    about: str
    recipe: str
    flags: tuple[str, ...]
    sizes: Mapping[str, tuple[str, ...]]
    unit: str
    budgets: tuple[int, ...]
    headline: int
    trained: tuple[str, int]
    rates: tuple[float, ...]
    tokens: int
    judged_on: str = "envelope"
    batches: tuple[int, ...] = ()
    metric: str = "loss"
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    jobs: int = 2
    machine: tuple[str, ...] = CPU

    @property
    def batch_size(self) -> int:
        """Samples of a plain step."""
        return next(int(flag.partition("=")[2]) for flag in self.flags if flag.startswith("--data.batch_size="))


def network(depth: int, width: int, **more: float | str) -> tuple[str, ...]:
    """Flags of a network with heads of 32 channels; initial standard deviation 0.02 at width 768, ~ 1 / sqrt(width)."""
    flags = {"depth": depth, "width": width, "num_heads": max(1, width // 32), "init_std": round(0.55 / width**0.5, 3)}
    return tuple(f"--model.{name}={value}" for name, value in (flags | more).items())


def ladder(*sizes: tuple[int, int]) -> dict[str, tuple[str, ...]]:
    """Flags of networks by name: ``2x64`` has two blocks of 64 channels."""
    return {f"{depth}x{width}": network(depth, width) for depth, width in sizes}


TEXT = ("--model.positions=rotary", "--data.val_fraction=0.05", "--data.test_fraction=0.05")
ALIKE = ("--data.imbalance=1", "--data.label_noise=0.0", "--data.part=[0.0,1.0]")  # no imbalance, no wrong labels
SMALL_DIGITS = (
    "--model.patch_size=4",
    "--data.source=digits",
    "--data.val_fraction=0.2",
    "--data.test_fraction=0.3",
    "--data.max_val_images=null",
    "--data.augmentation=none",
    "--data.image_size=16",
    "--data.batch_size=16",
)
PROBE = '--trainer.callbacks=[{"class_path": "lit_scale.models.ProbeAtEnd", "init_args": {"steps": 0}}]'
SIMMIM = {"decoder_depth": 0, "mask_ratio": 0.6}  # a linear head, three fifths hidden (Xie et al. 2022, section 3)
MAE = {"decoder_depth": 1, "decoder_width": 64, "decoder_heads": 2, "mask_ratio": 0.75}


def autoencoders(*sizes: tuple[int, int], **more: float) -> dict[str, tuple[str, ...]]:
    """Flags of networks for masked image modelling, which set the scale of their initial weights themselves."""
    return {
        f"{depth}x{width}": tuple(flag for flag in network(depth, width, **more) if "init_std" not in flag)
        for depth, width in sizes
    }


TASKS = {
    task.name: task
    for task in (
        Task(
            name="text_mlm",
            about="masked language model, Python's own sources as bytes, windows of 64",
            recipe="bert_progressive_stack",
            flags=(*TEXT, "--data.sequence_length=64", "--data.batch_size=16", "--data.max_val_sequences=2048"),
            sizes=ladder((1, 32), (1, 64), (2, 64), (4, 32), (4, 64), (2, 128)),
            unit="1x64",
            budgets=(4_700, 9_400, 18_800, 37_600),
            headline=9_400,
            trained=("4x64", 18_800),
            rates=(1.5e-3, 3e-3, 6e-3),
            tokens=64,
            batches=(8, 32),
        ),
        Task(
            name="text_clm",
            about="causal language model, Python's own sources as bytes, windows of 512",
            recipe="gpt_sequence_length_warmup",
            flags=(
                *TEXT,
                "--data.mask_rate=0.0",
                "--data.sequence_length=512",
                "--data.batch_size=4",
                "--data.max_val_sequences=256",
            ),
            sizes=ladder((1, 32), (1, 64), (2, 64), (4, 64)),
            unit="1x64",
            budgets=(1_250, 2_500, 5_000, 10_000),
            headline=2_500,
            trained=("2x64", 2_500),
            rates=(1.5e-3, 3e-3, 6e-3),
            tokens=512,
            batches=(2, 8),
        ),
        Task(
            name="image_classify",
            about="CIFAR-10, patches of 4 pixels",
            recipe="vit_resolution_growing",
            flags=(
                *CIFAR10,
                *ALIKE,
                "--model.patch_size=4",
                "--data.image_size=32",
                "--data.batch_size=32",
                "--data.augmentation=standard",
            ),
            sizes=ladder((1, 32), (1, 64), (2, 64), (3, 64), (6, 64)),
            unit="1x64",
            budgets=(2_500, 5_000, 10_000, 20_000),
            headline=5_000,
            trained=("3x64", 5_000),
            rates=(1e-3, 2e-3, 4e-3),
            tokens=64,
            batches=(16, 64),
        ),
        Task(
            name="image_imbalanced",
            about="scanned digits, the zeros of which are met 100 times as often",
            recipe="vit_importance_sampling",
            flags=(*SMALL_DIGITS, *ALIKE, "--data.imbalance=100"),
            sizes=ladder((1, 32), (1, 64), (2, 64), (4, 64)),
            unit="1x64",
            budgets=(7_500, 15_000, 30_000, 60_000),
            headline=15_000,
            trained=("4x64", 15_000),
            rates=(5e-4, 1e-3, 2e-3),
            tokens=16,
            batches=(8, 32),
        ),
        Task(
            name="image_noisy",
            about="scanned digits, a fifth of which have a wrong class in training",
            recipe="vit_rho_loss",
            flags=(*SMALL_DIGITS, *ALIKE, "--data.label_noise=0.2"),
            sizes=ladder((1, 32), (1, 64), (2, 64), (4, 64)),
            unit="1x64",
            budgets=(7_500, 15_000, 30_000, 60_000),
            headline=15_000,
            trained=("4x64", 15_000),
            rates=(5e-4, 1e-3, 2e-3),
            tokens=16,
            batches=(8, 32),
        ),
        Task(
            name="image_mim",
            about="masked image modelling on CIFAR-10, judged by a linear probe",
            recipe="mae_masked_token_skip",
            flags=(
                *CIFAR10,
                *ALIKE,
                PROBE,
                "--model.architecture=vit_tiny_patch16_224",
                "--model.patch_size=4",
                "--data.image_size=32",
                "--data.batch_size=64",
                "--data.augmentation=standard",
            ),
            sizes={
                **autoencoders((1, 64), (2, 64), (4, 64), (4, 96), **SIMMIM),
                **{f"{name}+decoder": flags for name, flags in autoencoders((2, 64), (4, 64), **MAE).items()},
            },
            unit="1x64",
            budgets=(1_250, 2_500, 5_000, 10_000),
            headline=2_500,
            trained=("4x64+decoder", 5_000),
            judged_on="trained",
            rates=(1e-3, 2e-3, 4e-3),
            tokens=64,
            metric="probe_error",
        ),
        Task(
            name="text_mlm_deep",
            about="masked language model, Python's own sources as 2,048 byte pairs, windows of 128",
            recipe="bert_progressive_stack",
            flags=(
                *TEXT,
                "--data.tokenizer=bpe",
                "--data.vocab_size=2048",
                "--data.sequence_length=128",
                "--data.batch_size=16",
                "--data.max_val_sequences=1024",
            ),
            sizes=ladder((1, 64), (2, 64), (4, 64), (4, 96), (8, 64)),
            unit="1x64",
            budgets=(14_000, 28_000, 56_000),
            headline=28_000,
            trained=("4x64", 28_000),
            judged_on="trained",
            rates=(3e-3, 6e-3),
            tokens=128,
        ),
    )
}
