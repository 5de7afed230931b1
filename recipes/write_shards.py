"""Write images as WebDataset shards: a folder with one folder per class, or a data set of torchvision.

python recipes/write_shards.py ~/pictures shards/                              # shards/train-000000.tar and so on
python recipes/write_shards.py cifar10 shards/ --samples-per-shard 5000        # downloaded by torchvision
python recipes/write_shards.py cifar10-test shards/ --name test
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lit_scale.datamodules import write_shards


def samples_of(source: str, downloads: Path) -> Iterable[tuple[Any, int]]:
    """Images or their paths, with the numbers of their classes."""
    from torchvision import datasets

    name, _, part = source.partition("-")
    if name in ("cifar10", "cifar100"):
        kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
        return kind(str(downloads), train=part != "test", download=True)
    if not Path(source).is_dir():
        raise ValueError(f"{source!r} is neither a folder nor one of cifar10, cifar100, cifar10-test, cifar100-test")
    folder = datasets.ImageFolder(source)
    for number, label in enumerate(folder.classes):
        print(f"class {number}: {label}")
    return folder.samples


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder of images, cifar10, cifar100, cifar10-test or cifar100-test")
    parser.add_argument("folder", type=Path, help="where the shards go")
    parser.add_argument("--samples-per-shard", type=int, default=5000)
    parser.add_argument("--name", default="train", help="beginning of the files' names")
    parser.add_argument("--format", choices=("png", "jpg"), default="png", help="of images that are not jpg or png yet")
    parser.add_argument("--downloads", type=Path, default=Path("~/.cache/torchvision").expanduser())
    args = parser.parse_args()
    try:
        shards = write_shards(
            samples_of(args.source, args.downloads),
            args.folder,
            samples_per_shard=args.samples_per_shard,
            name=args.name,
            form=args.format,
            progress=print,
        )
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"write_shards: {error}")
    print(f"{len(shards)} shards: read them with --data.source '{args.folder}/{args.name}-*.tar'")
