"""vit: pretrain, fine-tune and evaluate Vision Transformers (arXiv 2010.11929) from the command line."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("vitcli")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0.0.0+source"
