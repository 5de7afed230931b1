"""Throughput: our training step against the same step of Hugging Face, torch's own encoder and timm's blocks.

    python benchmarks/throughput.py --preset cpu
    python benchmarks/throughput.py --preset gpu

A step is forward, masked loss, backward and fused AdamW, on random tokens, with equal depth, width, heads, vocabulary,
batch and optimizer, learned positions and no dropout. ``torch`` and ``timm`` replace our encoder between our embedding
and our head; ``huggingface`` is BertForMaskedLM, whose head computes all positions. Repetitions are interleaved in
rotating order, so that disturbances affect all alike. The headline is ours / fastest peer, the median of paired ratios
with a bootstrap interval; below 1, ours is faster. On a CPU with one thread, which is the default, processor time is
measured, so that other processes matter little; with more threads, and on a GPU, wall time.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lit_scale.cost import hardware, versions, write_json
from lit_scale.factors.optimizers import create_optimizer
from lit_scale.models import BertMLM

OURS, ROTARY = "lit_scale", "lit_scale, rotary"
RESULTS = Path(__file__).parent / "results"

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    """A model and its batch."""

    depth: int
    width: int
    num_heads: int
    length: int
    batch: int
    vocab_size: int

    @property
    def num_masked(self) -> int:
        return max(1, round(0.15 * self.length))

    @property
    def name(self) -> str:
        return f"{self.depth} x {self.width}, {self.batch} x {self.length} tokens, vocabulary {self.vocab_size:,}"


PRESETS = {
    "cpu": [
        Size(depth=8, width=128, num_heads=4, length=64, batch=16, vocab_size=258),
        Size(depth=6, width=256, num_heads=8, length=128, batch=8, vocab_size=8192),
    ],
    "gpu": [Size(depth=12, width=768, num_heads=12, length=512, batch=32, vocab_size=32768)],
}


# -- the contestants: each returns a module and the function that computes its loss -----------------------------------

Contestant = tuple[nn.Module, Callable[[Batch], Tensor]]


class Trunk(nn.Module):
    """Blocks of another library, in place of our encoder."""

    def __init__(self, blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.blocks(x)


def ours(size: Size, **options: Any) -> Contestant:
    model = BertMLM(
        size.vocab_size, size.length, depth=size.depth, width=size.width, num_heads=size.num_heads, **options
    )
    return model, lambda batch: model.per_sample_loss(batch).mean()


def rotary(size: Size) -> Contestant:
    return ours(size, positions="rotary")


def torch_encoder(size: Size) -> Contestant:
    model, loss = ours(size)
    layer = nn.TransformerEncoderLayer(
        size.width, size.num_heads, 4 * size.width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    model.encoder = Trunk(
        nn.TransformerEncoder(layer, size.depth, nn.LayerNorm(size.width), enable_nested_tensor=False)
    )
    return model, loss


def timm_blocks(size: Size) -> Contestant:
    from timm.models.vision_transformer import Block

    model, loss = ours(size)
    blocks = [Block(size.width, size.num_heads, mlp_ratio=4.0, qkv_bias=True) for _ in range(size.depth)]
    model.encoder = Trunk(nn.Sequential(*blocks, nn.LayerNorm(size.width)))
    return model, loss


def huggingface(size: Size) -> Contestant:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.width,
        num_hidden_layers=size.depth,
        num_attention_heads=size.num_heads,
        intermediate_size=4 * size.width,
        max_position_embeddings=size.length,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",  # type: ignore[call-arg]
    )
    model = BertForMaskedLM(config)
    return model, lambda batch: model(input_ids=batch["input_ids"], labels=batch["labels_everywhere"]).loss


PEERS = {"huggingface": huggingface, "torch": torch_encoder, "timm": timm_blocks}
CONTESTANTS = {OURS: ours, **PEERS, ROTARY: rotary}


def random_batch(size: Size, device: torch.device) -> Batch:
    """Random tokens and labels in the format of our data module, and the same labels in Hugging Face's format."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(size.vocab_size, (size.batch, size.length), generator=generator)
    positions = torch.rand(size.batch, size.length, generator=generator).argsort(1)[:, : size.num_masked].sort(1).values
    labels = torch.randint(size.vocab_size, positions.shape, generator=generator)
    everywhere = torch.full_like(ids, -100).scatter(1, positions, labels)
    batch = {"input_ids": ids, "positions": positions, "labels": labels, "labels_everywhere": everywhere}
    return {name: tensor.to(device) for name, tensor in batch.items()}


# -- the clock --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clock:
    """Measures seconds on one device: processor time on a CPU with one thread, else wall time."""

    device: torch.device

    @property
    def name(self) -> str:
        return "cpu" if self.device.type == "cpu" and torch.get_num_threads() == 1 else "wall"

    def seconds(self, step: Callable[[], None], count: int) -> float:
        """Mean seconds of a step, over ``count`` steps."""
        now = time.process_time if self.name == "cpu" else time.perf_counter
        self._synchronize()
        start = now()
        for _ in range(count):
            step()
        self._synchronize()
        return (now() - start) / count

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def training_step(
    contestant: Contestant | Any, batch: Any, precision: AbstractContextManager[Any]
) -> Callable[[], None]:
    """A function without arguments that makes one training step."""
    model, loss = contestant
    model.train()
    optimizer = create_optimizer(model, "adamw", lr=1e-4, weight_decay=0.01)

    def step() -> None:
        with precision:
            value = loss(batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    return step


def ratio(ours: list[float], peer: list[float]) -> dict[str, float]:
    """Median of the paired ratios, with a bootstrap 95% interval."""
    ratios = np.array(ours) / np.array(peer)
    draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return {"estimate": float(np.median(ratios)), "low": float(low), "high": float(high)}


def measure(size: Size, repeats: int, seconds: float, clock: Clock, report: Callable[[str], None]) -> dict[str, Any]:
    """Measure all contestants at one size.

    Args:
        size: Size of model and batch.
        repeats: Number of interleaved repetitions.
        seconds: Approximate time of each contestant in one repetition.
        clock: The clock, which also names the device.
        report: Called with messages on the progress.
    """
    device = clock.device
    batch = random_batch(size, device)
    steps, parameters = {}, {}
    for name, make in CONTESTANTS.items():
        report(f"{size.name}: building {name}")
        torch.manual_seed(0)
        contestant = make(size)
        contestant[0].to(device)
        precision = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
        steps[name] = training_step(contestant, batch, precision)
        parameters[name] = sum(p.numel() for p in contestant[0].parameters())
        clock.seconds(steps[name], 3)  # allocation, kernels, optimizer state
    counts = {name: max(1, round(seconds / clock.seconds(step, 3))) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for repeat in range(repeats):
        report(f"{size.name}: repetition {repeat + 1} of {repeats}")
        shift = repeat % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(clock.seconds(steps[name], counts[name]))
    medians = {name: statistics.median(values) for name, values in times.items()}
    fastest = min(PEERS, key=medians.__getitem__)
    ratios = {peer: ratio(times[OURS], times[peer]) for peer in PEERS}
    return {
        "name": size.name,
        **asdict(size),
        "fastest_peer": fastest,
        "ratio": ratios[fastest],
        "ratios": ratios,
        "rotary_to_learned": ratio(times[ROTARY], times[OURS]),
        "contestants": {
            name: {
                "median_seconds": medians[name],
                "tokens_per_second": size.batch * size.length / medians[name],
                "parameters": parameters[name],
                "steps_per_repetition": counts[name],
                "seconds": times[name],
            }
            for name in names
        },
    }


def interval(one: dict[str, float]) -> str:
    return f"{one['estimate']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"


def table(result: dict[str, Any]) -> Table:
    """One size as a table."""
    shown = Table(title=result["name"], caption=f"ours / {result['fastest_peer']}: {interval(result['ratio'])}")
    for column in ("", "ms a step", "tokens / s", "ours / this"):
        shown.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, one in result["contestants"].items():
        shown.add_row(
            name,
            f"{1e3 * one['median_seconds']:.2f}",
            f"{one['tokens_per_second']:,.0f}",
            interval(result["ratios"][name]) if name in result["ratios"] else "",
        )
    return shown


def main(args: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--repeats", type=int, default=151, help="interleaved repetitions (default: 151)")
    parser.add_argument("--seconds", type=float, default=0.1, help="time per contestant and repetition (default: 0.1)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/throughput.<preset>.json")
    options = parser.parse_args(args)
    if options.repeats < 1 or options.threads < 1:
        parser.error("--repeats and --threads must be at least 1")
    if options.preset == "gpu" and not torch.cuda.is_available():
        parser.error("--preset gpu: torch sees no CUDA device; use --preset cpu")
    torch.set_num_threads(options.threads)
    clock = Clock(torch.device("cuda" if options.preset == "gpu" else "cpu"))
    console = Console()
    with console.status("") as status:
        sizes = [
            measure(one, options.repeats, options.seconds, clock, status.update) for one in PRESETS[options.preset]
        ]
    record = {
        "benchmark": "throughput",
        "preset": options.preset,
        "command": shlex.join(["python", "benchmarks/throughput.py", *(sys.argv[1:] if args is None else args)]),
        "date": date.today().isoformat(),
        "repeats": options.repeats,
        "clock": clock.name,
        "sizes": sizes,
        "versions": versions() | {"transformers": version("transformers")},
        "hardware": hardware(),
    }
    path = options.output or RESULTS / f"throughput.{options.preset}.json"
    write_json(path, record)
    for size in sizes:
        console.print(table(size))
    console.print(f"written: {path}", highlight=False, soft_wrap=True)
    return record


if __name__ == "__main__":
    main()
