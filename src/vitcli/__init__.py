"""vit: pretrain, fine-tune and evaluate Vision Transformers (arXiv 2010.11929) from the command line."""

__all__ = ["__version__"]


def __getattr__(name: str) -> str:
    """Look the version up when it is asked for: reading package metadata costs a tenth of a second of every `--help`."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("vitcli")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "0.0.0+source"
