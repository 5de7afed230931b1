"""Time of a step with masked-token skipping relative to one without: of the encoder alone and of the autoencoder.

    python benchmarks/mae_step.py

A step is forward, backward and fused AdamW on random images. The encoder alone is trained on the mean square of its
latents, the autoencoder on its own loss. Repetitions with and without mask tokens in the encoder are interleaved; the
result is the median of paired ratios with a bootstrap interval, measured with the clock of ``throughput.py``.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from throughput import RESULTS, Clock, ratio, training_step
from torch import Tensor

from lit_scale.cost import hardware, versions, write_json
from lit_scale.models import MaskedAutoencoder

#: The recipe's network, and one with as many patches as at 224 pixels; the decoder is an eighth of the encoder's depth.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "cpu": {
        "the recipe's: 4 x 96, 64 patches, decoder 1 x 64": {
            "batch": 64,
            "model": {"image_size": 32, "patch_size": 4, "depth": 4, "width": 96, "num_heads": 3}
            | {"decoder_depth": 1, "decoder_width": 64, "decoder_heads": 4},
        },
        "8 x 192, 196 patches, decoder 1 x 128": {
            "batch": 8,
            "model": {"image_size": 224, "patch_size": 16, "depth": 8, "width": 192, "num_heads": 3}
            | {"decoder_depth": 1, "decoder_width": 128, "decoder_heads": 4},
        },
    },
    "gpu": {
        "ViT-B/16, 196 patches, decoder 8 x 512": {"batch": 128, "model": {}},
        "ViT-B/16, 196 patches, decoder 2 x 256": {
            "batch": 128,
            "model": {"decoder_depth": 2, "decoder_width": 256, "decoder_heads": 8},
        },
    },
}


def steps(spec: dict[str, Any], device: torch.device) -> dict[str, Callable[[], None]]:
    """Functions that make one training step each, by name."""
    found = {}
    for part in ("encoder", "end to end"):
        for encode_masked in (True, False):
            torch.manual_seed(0)
            architecture = "vit_tiny_patch16_224" if "width" in spec["model"] else "vit_base_patch16_224"
            model = MaskedAutoencoder(architecture, encode_masked=encode_masked, **spec["model"]).to(device)
            images = torch.randn(spec["batch"], 3, *[model.hparams["image_size"]] * 2, device=device)
            order = model.random_order(images)

            def loss(batch: Tensor, part: str = part, model: Any = model, order: Tensor = order) -> Tensor:
                if part == "encoder":
                    return model.encode(batch, order).square().mean()
                return model.per_sample_loss(batch).mean()

            precision = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
            found[f"{part}, {'all' if encode_masked else 'visible'}"] = training_step((model, loss), images, precision)
    return found


def measure(spec: dict[str, Any], repeats: int, seconds: float, clock: Clock) -> dict[str, Any]:
    """Measure the time of steps on visible patches relative to steps on all patches."""
    made = steps(spec, clock.device)
    for step in made.values():
        clock.seconds(step, 2)
    counts = {name: max(1, round(seconds / clock.seconds(step, 2))) for name, step in made.items()}
    times: dict[str, list[float]] = {name: [] for name in made}
    for repeat in range(repeats):
        names = list(made)[repeat % len(made) :] + list(made)[: repeat % len(made)]
        for name in names:
            times[name].append(clock.seconds(made[name], counts[name]))
    ratios = {part: ratio(times[f"{part}, visible"], times[f"{part}, all"]) for part in ("encoder", "end to end")}
    return {**spec, "ratios": ratios, "seconds": times}


def main(args: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--repeats", type=int, default=41, help="interleaved repetitions (default: 41)")
    parser.add_argument("--seconds", type=float, default=0.1, help="time per step kind and repetition (default: 0.1)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/mae_step.<preset>.json")
    options = parser.parse_args(args)
    if options.repeats < 1 or options.threads < 1:
        parser.error("--repeats and --threads must be at least 1")
    if options.preset == "gpu" and not torch.cuda.is_available():
        parser.error("--preset gpu: torch sees no CUDA device; use --preset cpu")
    torch.set_num_threads(options.threads)
    clock = Clock(torch.device("cuda" if options.preset == "gpu" else "cpu"))
    console = Console()
    sizes = {}
    for name, spec in PRESETS[options.preset].items():
        with console.status(name):
            sizes[name] = measure(spec, options.repeats, options.seconds, clock)
        for part, one in sizes[name]["ratios"].items():
            shown = f"{one['estimate']:.3f} ({one['low']:.3f} to {one['high']:.3f})"
            console.print(f"{name}: {part}: {shown} of the step on all patches", highlight=False, soft_wrap=True)
    record = {
        "benchmark": "mae_step",
        "technique": "masked_token_skip",
        "preset": options.preset,
        "command": shlex.join(["python", "benchmarks/mae_step.py", *(sys.argv[1:] if args is None else args)]),
        "date": date.today().isoformat(),
        "repeats": options.repeats,
        "clock": clock.name,
        "sizes": sizes,
        "versions": versions(),
        "hardware": hardware(),
    }
    path = options.output or RESULTS / f"mae_step.{options.preset}.json"
    write_json(path, record)
    if options.output is None:
        import tables

        tables.update_pages(RESULTS)
    console.print(f"written: {path}", highlight=False, soft_wrap=True)
    return record


if __name__ == "__main__":
    main()
