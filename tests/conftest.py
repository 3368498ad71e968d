"""What every test stands on: one thread, no network, and no data or runs but its own."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]

torch.set_num_threads(1)  # tests run side by side, and sums are the same on every machine
os.environ["OMP_NUM_THREADS"] = "1"  # and in processes that tests start
os.environ["HF_HUB_OFFLINE"] = "1"  # oracles are built from configs, never downloaded


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a test away from the user's data sets and caches, and from the repository's runs/."""
    monkeypatch.setenv("VIT_DATA", str(tmp_path / "vit-data"))
    monkeypatch.setenv("VIT_CACHE", str(tmp_path / "vit-cache"))


@pytest.fixture(scope="session")
def root() -> Path:
    """Return the repository's root."""
    return ROOT
