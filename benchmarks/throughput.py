"""Throughput: our training step against the same step of Hugging Face, torch's own encoder and timm's blocks.

    python benchmarks/throughput.py --preset cpu
    python benchmarks/throughput.py --preset gpu

A step is forward, masked loss, backward and fused AdamW, on random tokens, with equal depth, width, heads, vocabulary,
batch and optimizer, learned positions and no dropout. ``torch`` and ``timm`` stand where our encoder stood, between our
embedding and our head; ``huggingface`` is BertForMaskedLM as it comes, whose head computes all positions. Repetitions
are interleaved in rotating order, so that a noisy second hits all alike. The headline is ours / fastest peer, the
median of paired ratios with a bootstrap interval: at most 1 means that ours is not slower.
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
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lit_scale.cost import hardware, versions, write_json
from lit_scale.models import BertMLM
from lit_scale.optimizers import create_optimizer

OURS = "lit_scale"
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

    def __str__(self) -> str:
        return f"{self.depth} x {self.width}, {self.batch} x {self.length} tokens, vocabulary {self.vocab_size}"


PRESETS = {
    "cpu": [
        Size(depth=8, width=128, num_heads=4, length=64, batch=16, vocab_size=258),
        Size(depth=6, width=256, num_heads=8, length=128, batch=8, vocab_size=8192),
    ],
    "gpu": [Size(depth=12, width=768, num_heads=12, length=512, batch=32, vocab_size=32768)],
}


# -- the contestants: each returns a module and the function that computes its loss -----------------------------------

Contestant = tuple[nn.Module, Callable[[Batch], Tensor]]


class _Peer(nn.Module):
    """Somebody else's blocks in the place of our encoder."""

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
    model.encoder = _Peer(nn.TransformerEncoder(layer, size.depth, nn.LayerNorm(size.width), enable_nested_tensor=False))
    return model, loss


def timm_blocks(size: Size) -> Contestant:
    from timm.models.vision_transformer import Block

    model, loss = ours(size)
    blocks = [Block(size.width, size.num_heads, mlp_ratio=4.0, qkv_bias=True) for _ in range(size.depth)]
    model.encoder = _Peer(nn.Sequential(*blocks, nn.LayerNorm(size.width)))
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
        attn_implementation="sdpa",
    )
    model = BertForMaskedLM(config)
    return model, lambda batch: model(input_ids=batch["input_ids"], labels=batch["labels_everywhere"]).loss


PEERS = {"huggingface": huggingface, "torch": torch_encoder, "timm": timm_blocks}


def random_batch(size: Size, device: torch.device) -> Batch:
    """Random tokens in the form of our data module, and the same labels in Hugging Face's form."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(size.vocab_size, (size.batch, size.length), generator=generator)
    positions = torch.rand(size.batch, size.length, generator=generator).argsort(1)[:, : size.num_masked].sort(1).values
    labels = torch.randint(size.vocab_size, positions.shape, generator=generator)
    everywhere = torch.full_like(ids, -100).scatter(1, positions, labels)
    batch = {"input_ids": ids, "positions": positions, "labels": labels, "labels_everywhere": everywhere}
    return {name: tensor.to(device) for name, tensor in batch.items()}


# -- the clock --------------------------------------------------------------------------------------------------------


def training_step(contestant: Contestant, batch: Batch, precision: AbstractContextManager[Any]) -> Callable[[], None]:
    """The step as a function without arguments."""
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


def timed(step: Callable[[], None], count: int, device: torch.device) -> float:
    """Seconds of one step, over ``count`` of them."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        step()
    _synchronize(device)
    return (time.perf_counter() - start) / count


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(ours: list[float], peer: list[float]) -> dict[str, float]:
    """Median of the paired ratios and its bootstrap 95 % interval."""
    ratios = np.array(ours) / np.array(peer)
    draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return {"median": float(np.median(ratios)), "low": float(low), "high": float(high)}


def measure(size: Size, repeats: int, seconds: float, device: torch.device, report: Callable[[str], None]) -> dict[str, Any]:
    """All contestants at one size.

    Args:
        size: Of model and batch.
        repeats: Interleaved repetitions.
        seconds: About how long each contestant runs in one repetition.
        device: Where.
        report: Told what is being done.
    """
    batch = random_batch(size, device)
    makers = {OURS: ours, **PEERS, f"{OURS} rotary": rotary}
    steps, parameters = {}, {}
    for name, make in makers.items():
        torch.manual_seed(0)
        contestant = make(size)
        contestant[0].to(device)
        precision = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
        steps[name] = training_step(contestant, batch, precision)
        parameters[name] = sum(p.numel() for p in contestant[0].parameters())
        timed(steps[name], 3, device)  # allocation, kernels, optimizer state
    counts = {name: max(1, round(seconds / timed(step, 3, device))) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for repeat in range(repeats):
        report(f"{size}: repetition {repeat + 1} of {repeats}")
        shift = repeat % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(timed(steps[name], counts[name], device))
    medians = {name: statistics.median(values) for name, values in times.items()}
    fastest = min(PEERS, key=medians.__getitem__)
    return {
        "size": asdict(size),
        "fastest_peer": fastest,
        "ratio": ratio(times[OURS], times[fastest]),
        "contestants": {
            name: {
                "median_seconds": medians[name],
                "tokens_per_second": size.batch * size.length / medians[name],
                "parameters": parameters[name],
                "steps_per_repetition": counts[name],
                "ours_to_this": ratio(times[OURS], times[name]),
                "seconds": times[name],
            }
            for name in names
        },
    }


def table(result: dict[str, Any]) -> Table:
    """One size as a table."""
    verdict = result["ratio"]
    shown = Table(
        title=f"{Size(**result['size'])}: ours / {result['fastest_peer']} = {verdict['median']:.3f} "
        f"[{verdict['low']:.3f}, {verdict['high']:.3f}]"
    )
    for column in ("", "ms a step", "tokens a second", "parameters", "ours / this"):
        shown.add_column(column, justify="right" if column else "left")
    for name, one in result["contestants"].items():
        to_this = one["ours_to_this"]
        shown.add_row(
            name,
            f"{1e3 * one['median_seconds']:.2f}",
            f"{one['tokens_per_second']:,.0f}",
            f"{one['parameters']:,}",
            f"{to_this['median']:.3f} [{to_this['low']:.3f}, {to_this['high']:.3f}]",
        )
    return shown


def main(args: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--repeats", type=int, default=41, help="interleaved repetitions (default: 41)")
    parser.add_argument("--seconds", type=float, default=0.3, help="of each contestant in a repetition (default: 0.3)")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/throughput.<preset>.json")
    options = parser.parse_args(args)
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: at least 1")
    if options.preset == "gpu" and not torch.cuda.is_available():
        parser.error("--preset gpu: torch sees no CUDA device; use --preset cpu")
    device = torch.device("cuda" if options.preset == "gpu" else "cpu")
    console = Console()
    with console.status("") as status:
        results = [measure(s, options.repeats, options.seconds, device, status.update) for s in PRESETS[options.preset]]
    record = {
        "benchmark": "throughput",
        "preset": options.preset,
        "command": shlex.join(["python", "benchmarks/throughput.py", *(sys.argv[1:] if args is None else args)]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "repeats": options.repeats,
        "results": results,
        "versions": versions() | {"transformers": version("transformers")},
        "hardware": hardware(),
    }
    path = options.output or RESULTS / f"throughput.{options.preset}.json"
    write_json(path, record)
    for result in results:
        console.print(table(result))
    console.print(f"written: {path}", highlight=False)
    return record


if __name__ == "__main__":
    main()
