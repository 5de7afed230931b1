"""The sweeps of benchmarks/savings.py: model sizes, lengths of runs and learning rates, by recipe and preset.

Those of a CPU take minutes a run. Those of a GPU are for one with 24 GB or more and take hours; none has run yet.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """The runs of one sweep.

    Attributes:
        flags: Of every run.
        lrs: Learning rates tried for the baseline, at the lengths ``tune_steps``, and for the technique at its first.
        tune_steps: Lengths at which the baseline's rate is tuned; another length takes that of the nearest one.
        baseline_steps: Lengths of the baseline's runs, the frontier's points.
        technique_steps: Lengths of the technique's runs; the first is the headline.
        relative_cost: Rough cost of a technique's step relative to the baseline's, for the time left only.
        jobs: Runs at a time.
        threads: Threads of each run.
        metric: Name of the loss that is compared.
        accuracies: Further qualities in the record, at equal values of which reference time is compared too.
        choices: Variants of the technique for ``benchmarks/choices.py``: name to (steps, flags), equal in FLOPs.
    """

    flags: list[str]
    lrs: list[float]
    tune_steps: list[int]
    baseline_steps: list[int]
    technique_steps: list[int]
    relative_cost: float = 1.0
    jobs: int = 1
    threads: int | None = None
    metric: str = "val/loss"
    accuracies: tuple[str, ...] = ()
    choices: dict[str, tuple[int, list[str]]] = field(default_factory=dict)


def on_cpu(flags: Iterable[str] = (), **options: Any) -> Preset:
    """A preset whose runs have a core each."""
    on_one = ["--trainer.accelerator=cpu", "--trainer.devices=1"]
    return Preset(flags=[*on_one, *flags], jobs=max(1, os.cpu_count() or 1), threads=1, **options)


def on_gpu(flags: Iterable[str], **options: Any) -> Preset:
    """A preset of one run at a time on one GPU, at most eight times as long as its shortest."""
    on_one = ["--trainer.accelerator=gpu", "--trainer.devices=1", "--trainer.precision=bf16-mixed"]
    lengths = {"lrs": [5e-4, 1e-3, 2e-3], "tune_steps": [2_000], "baseline_steps": [1_000, 2_000, 4_000, 8_000]}
    return Preset(flags=[*on_one, *flags], **(lengths | options))


def stages(*growths: tuple[float, float]) -> list[str]:
    """Flag of progressive stacking: a quarter of the depth first, then as told."""
    return [f"--progressive_stacking.stages={json.dumps([[0.0, 0.25], *map(list, growths)])}"]


def token_dropping(**given: str | float) -> list[str]:
    """Flags of token dropping, those that are not given as the callback has them and not as the recipe."""
    flags = {"keep": "null", "before": "null"} | given
    return [f"--token_dropping.{name}={value}" for name, value in flags.items()]


def weights(*flags: str) -> list[str]:
    """Flags of dynamic sparsity by single weights, whose FLOPs are only theoretical: equal in steps to a baseline."""
    return [f"--dynamic_sparsity.{flag}" for flag in ("granularity=weight", *flags)]


# WebDataset shards of CIFAR-10, which recipes/write_shards.py writes (with --name test for those of cifar10-test).
CIFAR10 = ["--data.source=data/cifar10/train-*.tar", "--data.val_source=data/cifar10/test-*.tar"]

# of masked autoencoders' two accuracies only the probe's, which is cheap; fine-tuning would take half of a sweep
PROBE = '--trainer.callbacks=[{"class_path": "lit_scale.models.ProbeAtEnd", "init_args": {"steps": 0}}]'

# what recipes have in common that share a baseline, whose runs they take from each other
BERT_BASELINE: dict[str, Any] = {
    "lrs": [4.5e-4, 6.7e-4, 1e-3],
    "tune_steps": [600],
    "baseline_steps": [300, 600, 1_200],
}
VIT_BASELINE: dict[str, Any] = {
    "flags": [*CIFAR10, "--data.max_val_images=2000"],
    "lrs": [4.1e-4, 7e-4, 1.2e-3],
    "tune_steps": [600],
    "baseline_steps": [300, 600, 1_200],
}
RARE_BASELINE: dict[str, Any] = {
    "lrs": [5e-4, 1e-3, 2e-3],
    "tune_steps": [2_000],
    "baseline_steps": [1_000, 2_000, 4_000, 6_000],
}

# models of a GPU's size, 38 and 21 million parameters; init_std is 0.02 at width 768, scaled by 1 / sqrt(width)
BERT = [
    "--model.depth=12",
    "--model.width=512",
    "--model.num_heads=8",
    "--model.init_std=0.024",
    "--data.tokenizer=bpe",
    "--data.sequence_length=256",
    "--data.batch_size=128",
    "--data.num_workers=4",
]
VIT = [
    *CIFAR10,
    "--data.image_size=32",
    "--model.depth=12",
    "--model.width=384",
    "--model.num_heads=6",
    "--data.batch_size=512",
    "--data.num_workers=4",
]
CLASSIFIER = [*VIT, "--model.init_std=0.028"]
RARE = ["--data.imbalance=100", "--data.augmentation=standard", "--data.batch_size=64"]

PRESETS: dict[str, dict[str, Preset]] = {
    "bert_progressive_stack": {
        "cpu": on_cpu(
            **BERT_BASELINE | {"tune_steps": [600, 1_200]},
            technique_steps=[750, 500],
            relative_cost=0.5,
            choices={
                "growth at 60% and 85%": (824, stages((0.6, 0.5), (0.85, 1.0))),
                "growth at 50% and 75%": (700, stages((0.5, 0.5), (0.75, 1.0))),
                "growth at 30% and 60%": (560, stages((0.3, 0.5), (0.6, 1.0))),
                "growth at 15% and 40%": (459, stages((0.15, 0.5), (0.4, 1.0))),
                "interleaved": (700, ["--progressive_stacking.growth=interleave"]),
                "moments with step 0": (700, ["--progressive_stacking.moments=copy_step0"]),
                "moments reset": (700, ["--progressive_stacking.moments=reset"]),
                "re-warm-up over 2%": (700, ["--progressive_stacking.rewarmup=0.02"]),
            },
        ),
        "gpu": on_gpu(BERT, tune_steps=[1_000, 8_000], technique_steps=[4_000, 2_000], relative_cost=0.6),
    },
    "vit_resolution_growing": {
        "cpu": on_cpu(
            **VIT_BASELINE,
            technique_steps=[900, 600],
            relative_cost=0.55,
        ),
        "gpu": on_gpu(CLASSIFIER, technique_steps=[6_000, 3_000], relative_cost=0.55),
    },
    "vit_patch_dropping": {
        "cpu": on_cpu(
            **VIT_BASELINE,
            technique_steps=[1_400, 900],
            relative_cost=0.35,
            choices={
                "half dropped, tuned for 5%": (900, ["--patch_dropping.fraction=0.5"]),
                "half dropped, tuned for 20%": (776, ["--patch_dropping.fraction=0.5", "--patch_dropping.tune=0.2"]),
                "a quarter dropped, tuned for 5%": (604, ["--patch_dropping.fraction=0.25"]),
                "three quarters dropped, tuned for 5%": (1_647, ["--patch_dropping.fraction=0.75"]),
                "three quarters dropped, tuned for 20%": (
                    1_158,
                    ["--patch_dropping.fraction=0.75", "--patch_dropping.tune=0.2"],
                ),
            },
        ),
        "gpu": on_gpu(CLASSIFIER, technique_steps=[8_000, 4_000], relative_cost=0.35),
    },
    "mae_masked_token_skip": {
        "cpu": on_cpu(
            flags=[
                "--data.source=data/cifar10/train-{00000..00001}.tar",
                CIFAR10[1],
                "--data.max_val_images=2000",
                PROBE,
            ],
            lrs=[1e-3, 2e-3, 4e-3],
            tune_steps=[400],
            baseline_steps=[200, 400],
            technique_steps=[400, 300],
            relative_cost=0.33,
            accuracies=("linear_probe_accuracy",),
        ),
        "gpu": on_gpu(
            [*VIT, PROBE],
            technique_steps=[8_000, 4_000],
            relative_cost=0.33,
            accuracies=("linear_probe_accuracy",),
        ),
    },
    "vit_importance_sampling": {
        # heavy imbalance: nine of ten digits are zeros, which are easy after a few hundred steps
        "cpu": on_cpu(
            **RARE_BASELINE,
            technique_steps=[2_000, 1_300],
            relative_cost=2.0,
            choices={
                f"of {n} times as many": (round(12_000 / (n + 3)), [f"--importance_sampling.presample={n}"])
                for n in (2, 3, 5)  # of the recipe's 16 samples tau is at most 4, which presample 9 would need
            },
        ),
        # ten equal classes, none of them easy: the gate stays closed, and that has to cost next to nothing
        "cpu-plain": on_cpu(
            flags=[
                *CIFAR10,
                "--data.imbalance=1",
                "--data.augmentation=standard",
                "--data.image_size=32",
                "--model.width=96",
                "--model.init_std=0.057",
            ],
            lrs=[7e-4, 1.2e-3, 2e-3],
            tune_steps=[600],
            baseline_steps=[300, 600, 1_200],
            technique_steps=[600],
            relative_cost=1.0,
        ),
        "gpu": on_gpu([*CLASSIFIER, *RARE], technique_steps=[3_000, 1_500], relative_cost=2.0),
    },
    "vit_selective_backprop": {
        "cpu": on_cpu(
            **RARE_BASELINE,
            technique_steps=[3_000, 2_000],
        ),
        "gpu": on_gpu([*CLASSIFIER, *RARE], technique_steps=[6_000, 3_000]),
    },
    "vit_rho_loss": {
        "cpu": on_cpu(
            lrs=[5e-4, 1e-3, 2e-3],
            tune_steps=[600],
            baseline_steps=[300, 600, 1_200, 2_400],
            technique_steps=[600, 400],
            relative_cost=3.0,
            choices={
                f"the top {share:g}": (round(2_880 / (1 + 1.13 / 3 / share)), [f"--rho_loss.share={share:g}"])
                for share in (0.1, 0.25, 0.5)  # a step, and two forward passes of which the second is a small model's
            },
        ),
        "gpu": on_gpu([*CLASSIFIER, *RARE[1:]], technique_steps=[4_000, 2_000], relative_cost=1.8),
    },
    "gpt_sequence_length_warmup": {
        "cpu": on_cpu(
            lrs=[1e-3, 2e-3, 4e-3],
            tune_steps=[400],
            baseline_steps=[200, 400, 800],
            technique_steps=[600, 400],
            relative_cost=0.75,
        ),
        "gpu": on_gpu(
            [*BERT, "--data.sequence_length=1024", "--data.batch_size=32"],
            technique_steps=[6_000, 3_000],
            relative_cost=0.75,
        ),
    },
    "bert_dynamic_sparsity": {
        "cpu": on_cpu(
            **BERT_BASELINE,
            technique_steps=[900, 600],
            relative_cost=0.4,
            choices={
                "a quarter of the units": (1_400, []),
                "a quarter of the units, never moved": (1_420, ["--dynamic_sparsity.drop=0.0"]),
                "half of the units": (710, ["--dynamic_sparsity.density=0.5"]),
                "a fifth of the weights, RigL": (600, weights("density=0.2")),
                "a fifth of the weights, uniform": (600, weights("density=0.2", "distribution=uniform")),
                "a fifth of the weights, SET": (600, weights("density=0.2", "grow=random")),
            },
        ),
        # RigL as published: no time is saved, and the question is what is lost
        "cpu-weights": on_cpu(
            flags=weights("density=0.2"),
            **BERT_BASELINE,
            technique_steps=[600],
            relative_cost=1.2,
        ),
        "gpu": on_gpu(BERT, technique_steps=[6_000, 3_000], relative_cost=0.4),
    },
    "bert_token_dropping": {
        "cpu": on_cpu(
            **BERT_BASELINE,
            technique_steps=[1_100, 750],
            relative_cost=0.6,
            choices={
                "easy, half of 3 of 8 blocks": (700, token_dropping()),
                "easy, a quarter of 3 of 8 blocks": (789, token_dropping(keep=0.25)),
                "easy, half of 5 of 8 blocks": (835, token_dropping(before=2)),
                "easy, a quarter of 5 of 8 blocks": (1_069, token_dropping(keep=0.25, before=2)),
                "easy, an eighth of 3 of 8 blocks": (844, token_dropping(keep=0.125)),
                "easy, all tokens in the last fifth": (675, token_dropping(until=0.8)),
                "masks join for the last quarter": (644, token_dropping(drop="masked")),
                "random from a sixteenth": (810, token_dropping(drop="random")),
                "random from a quarter": (747, token_dropping(drop="random", keep=0.25)),
                "random from a half": (676, token_dropping(drop="random", keep=0.5)),
            },
        ),
        "gpu": on_gpu(BERT, technique_steps=[7_000, 3_500], relative_cost=0.6),
    },
    "bert_all_in_one": {
        "cpu": on_cpu(
            **BERT_BASELINE,
            technique_steps=[900, 600],
            relative_cost=0.5,
        ),
        "gpu": on_gpu(BERT, technique_steps=[6_000, 3_000], relative_cost=0.5),
    },
    "vit_all_in_one": {
        "cpu": on_cpu(
            **VIT_BASELINE,
            technique_steps=[1_100, 700],
            relative_cost=0.4,
        ),
        "gpu": on_gpu(CLASSIFIER, technique_steps=[7_000, 3_500], relative_cost=0.4),
    },
}
