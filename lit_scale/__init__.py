"""An efficiency layer for PyTorch Lightning: every technique is a callback that lowers one factor of a run's cost."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]

try:
    __version__ = version("lit_scale")
except PackageNotFoundError:  # imported from a checkout that is not installed
    __version__ = "0+unknown"
