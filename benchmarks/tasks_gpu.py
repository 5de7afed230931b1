"""Tasks for a GPU. NONE OF THEM HAS EVER BEEN RUN, because no GPU was available.

    python benchmarks/clock.py list --gpu
    python benchmarks/clock.py plain text_mlm_gpu --gpu

Sizes, budgets and rates are guesses for one GPU with 24 GB or more; the tests only check that the recipes accept the
flags. Expect hours for each task, and check the first prices before relying on the budgets. Budgets are in steps of the
smallest network of a ladder. Techniques have the same settings as on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from entries import ENTRIES as ON_CPU
from entries import Control, Entry
from tasks import ALIKE, CIFAR10, MAE, PROBE, SIMMIM, Task, network
from tasks import TASKS as TASKS_OF_CPU

__all__ = ["ENTRIES", "TASKS"]

GPU = ("--trainer.accelerator=gpu", "--trainer.devices=1", "--trainer.precision=bf16-mixed")
LOADER = ("--data.num_workers=4",)
TEXT = (
    *LOADER,
    "--model.positions=rotary",
    "--data.tokenizer=bpe",
    "--data.val_fraction=0.05",
    "--data.test_fraction=0.05",
)
IMAGES = (
    *LOADER,
    *CIFAR10,
    *ALIKE,
    "--model.patch_size=4",
    "--data.image_size=32",
    "--data.augmentation=standard",
)


def ladder(*sizes: tuple[int, int], scaled: bool = True, **more: float) -> dict[str, tuple[str, ...]]:
    """Flags of networks with heads of 64 channels; without ``scaled`` the module sets the scale of initial weights."""
    made = {f"{d}x{w}": network(d, w, num_heads=w // 64, **more) for d, w in sizes}
    return {name: tuple(flag for flag in own if scaled or "init_std" not in flag) for name, own in made.items()}


def classify(name: str, about: str, recipe: str, *flags: str) -> Task:
    """A task on CIFAR-10."""
    return Task(
        name=name,
        about=about,
        recipe=recipe,
        flags=(*IMAGES, *flags),
        sizes=ladder((3, 192), (6, 192), (6, 384), (12, 192), (12, 384)),
        unit="3x192",
        budgets=(8_000, 16_000, 32_000, 64_000),
        headline=16_000,
        trained=("12x384", 32_000),
        rates=(5e-4, 1e-3, 2e-3),
        tokens=64,
        jobs=1,
        machine=GPU,
    )


TASKS = {
    task.name: task
    for task in (
        Task(
            name="text_mlm_gpu",
            about="masked language model, byte pairs, windows of 256, on a GPU",
            recipe="bert_progressive_stack",
            flags=(*TEXT, "--data.sequence_length=256", "--data.batch_size=128"),
            sizes=ladder((3, 256), (6, 256), (6, 512), (12, 256), (12, 512)),
            unit="3x256",
            budgets=(8_000, 16_000, 32_000, 64_000),
            headline=16_000,
            trained=("12x512", 32_000),
            rates=(5e-4, 1e-3, 2e-3),
            tokens=256,
            jobs=1,
            machine=GPU,
        ),
        Task(
            name="text_mlm_deep_gpu",
            about="masked language model, byte pairs, windows of 256, deep networks, on a GPU",
            recipe="bert_progressive_stack",
            flags=(*TEXT, "--data.sequence_length=256", "--data.batch_size=128"),
            sizes=ladder((6, 512), (12, 512), (12, 768), (24, 512)),
            unit="6x512",
            budgets=(8_000, 16_000, 32_000),
            headline=16_000,
            trained=("24x512", 32_000),
            judged_on="trained",
            rates=(3e-4, 6e-4, 1.2e-3),
            tokens=256,
            jobs=1,
            machine=GPU,
        ),
        Task(
            name="text_clm_gpu",
            about="causal language model, byte pairs, windows of 1,024, on a GPU",
            recipe="gpt_sequence_length_warmup",
            flags=(*TEXT, "--data.mask_rate=0.0", "--data.sequence_length=1024", "--data.batch_size=32"),
            sizes=ladder((3, 256), (6, 256), (6, 512), (12, 256), (12, 512)),
            unit="3x256",
            budgets=(8_000, 16_000, 32_000, 64_000),
            headline=16_000,
            trained=("12x512", 32_000),
            rates=(5e-4, 1e-3, 2e-3),
            tokens=1024,
            jobs=1,
            machine=GPU,
        ),
        classify(
            "image_classify_gpu",
            "CIFAR-10, patches of 4 pixels, on a GPU",
            "vit_resolution_growing",
            "--data.batch_size=512",
        ),
        classify(
            "image_imbalanced_gpu",
            "CIFAR-10, one class of which is met 100 times as often, on a GPU",
            "vit_importance_sampling",
            "--data.batch_size=64",
            "--data.imbalance=100",
        ),
        classify(
            "image_noisy_gpu",
            "CIFAR-10, a fifth of which has a wrong class in training, on a GPU",
            "vit_rho_loss",
            "--data.batch_size=64",
            "--data.label_noise=0.2",
        ),
        Task(
            name="image_mim_gpu",
            about="masked image modelling on CIFAR-10, judged by a linear probe, on a GPU",
            recipe="mae_masked_token_skip",
            flags=(*IMAGES, PROBE, "--model.architecture=vit_tiny_patch16_224", "--data.batch_size=512"),
            sizes={
                **ladder((3, 192), (6, 192), (12, 192), (12, 384), scaled=False, **SIMMIM),
                **{
                    f"{name}+decoder": flags for name, flags in ladder((6, 192), (12, 192), scaled=False, **MAE).items()
                },
            },
            unit="3x192",
            budgets=(8_000, 16_000, 32_000, 64_000),
            headline=16_000,
            trained=("12x192+decoder", 32_000),
            judged_on="trained",
            rates=(5e-4, 1e-3, 2e-3),
            tokens=64,
            metric="probe_error",
            jobs=1,
            machine=GPU,
        ),
    )
}


def scaled(control: Control, sizes: Iterable[str]) -> Control:
    """A control that is a smaller network, converted to another ladder by the same factors of depth and width."""
    if not control.size:
        return control

    def parts(size: str) -> tuple[int, int, str]:
        plain, plus, suffix = size.partition("+")
        depth, width = map(int, plain.split("x"))
        return depth, width, plus + suffix

    (from_depth, from_width, _), (to_depth, to_width, _) = map(parts, next(iter(control.size.items())))
    smaller = {}
    for size in sizes:
        depth, width, suffix = parts(size)
        smaller[size] = f"{depth * to_depth // from_depth}x{width * to_width // from_width}{suffix}"
    return replace(control, size={size: other for size, other in smaller.items() if other in sizes and other != size})


def on_gpu(entry: Entry) -> Entry:
    """The entry of the same technique on the corresponding GPU task."""
    task, cpu = TASKS[f"{entry.task}_gpu"], TASKS_OF_CPU[entry.task]
    control = scaled(entry.control, task.sizes)
    control = replace(control, batch_size=control.batch_size * task.batch_size // cpu.batch_size)
    return replace(entry, task=task.name, control=control)


ENTRIES = {entry.name: entry for entry in map(on_gpu, ON_CPU.values())}
