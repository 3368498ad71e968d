"""Probes of frozen features: few-shot least squares, full logistic regression, nearest neighbours.

By hand on any checkpoint (`vit eval --fewshot 5 --linear --knn 20`), and few-shot on the live weights of a run every so many
steps. Features are extracted by all ranks together; the rest is done once, by the main one. The few-shot protocol is the
paper's (ViT (2010.11929) 4.1): `fewshot` has the algebra.
"""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vitcli.config import Config
from vitcli.data.loader import choose_workers
from vitcli.data.protocol import Source
from vitcli.data.sources import open_source
from vitcli.distributed import SOLO, Ranks
from vitcli.errors import ConfigError
from vitcli.features import cached_features, extract_features, feature_file, head_inputs, weights_digest
from vitcli.fewshot import L2
from vitcli.logistic import linear_probe
from vitcli.metrics import bootstrap_interval
from vitcli.neighbours import nearest_classes
from vitcli.opened import OpenedModel, open_model, open_split
from vitcli.probe_sets import ProbeSet, few_shot, shot_pool

__all__ = ["open_probe_sets", "probe_checkpoint", "probe_live"]

Say = Callable[[str], object]

WORTH_A_WORKER = 256  # images; for fewer, starting a loader process takes longer than it saves


# ---------------------------------------------------------------- by hand


def probe_checkpoint(
    ckpt: Path,
    *,
    dataset: str | None,
    overrides: Sequence[str],
    shots: Sequence[int] = (),
    linear: bool = False,
    knn: Sequence[int] = (),
    seeds: int = 3,
    l2: float | None = L2,
    batch_size: int = 256,
    cache: bool = True,
    say: Callable[[str], None],
    ranks: Ranks = SOLO,
) -> dict[str, Any]:
    """Probe a run, checkpoint or weights file on a data set; return JSON values, the same on every rank.

    Args:
        dataset: default what it was trained on.
        overrides: `key=value` settings, as for `open_model`.
        shots: images per class of the few-shot probes.
        linear: also fit a logistic regression to the whole training split.
        knn: also let so many nearest neighbours vote.
        seeds: draws of the shots.
        l2: of the few-shot probes; None chooses it on held-out shots.
        cache: keep features under $VIT_CACHE, and take them from there.
        ranks: those who share the extraction.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ConfigError: more neighbours than training images.
        DataError: the data set is missing or damaged.
    """
    if not (shots or linear or knn):
        raise ConfigError("nothing to probe: give shots, the linear probe, or numbers of neighbours")
    opened, probed = ranks.main_first(lambda: open_for_probes(ckpt, dataset=dataset, overrides=overrides, say=say))
    if knn and max(knn) > len(probed.train):
        raise ConfigError(f"--knn {max(knn)}: {probed.train.name} has {len(probed.train):,} training images; take fewer")
    weights = weights_digest(opened.pretrained.state) if cache and ranks.main else None
    pool, numbers = probed.train, np.arange(len(probed.train))
    if not linear and not knn:
        known = weights is not None and feature_file(opened, probed.train, split="train", weights=weights).exists()
        if not ranks.broadcast(known):
            pool, numbers = shot_pool(probed.train, num_classes=probed.num_classes, shots=shots, seeds=seeds)
    shared: Any = {"weights": weights, "batch_size": batch_size, "say": say, "ranks": ranks}
    train = cached_features(opened, pool, split="train", **shared)
    test = cached_features(opened, probed.test, split="val", **shared)

    def probe() -> dict[str, Any]:
        assert train is not None and test is not None
        targets = probed.targets(test)

        def judged(predicted: NDArray[np.int64], suffix: str = "") -> dict[str, Any]:
            correct = predicted == targets
            low, high = bootstrap_interval(correct.astype(np.float64))
            return {f"accuracy{suffix}": float(correct.mean()), f"interval{suffix}": [low, high]}

        of_linear, of_neighbours = None, {}
        if linear:
            fitted = linear_probe(
                train.values,
                train.labels,
                test.values,
                num_classes=probed.num_classes,
                l2=None,
                device=opened.device,
                name=probed.train.name,
            )
            of_linear = {
                **judged(fitted.predicted),
                "l2": fitted.l2,
                "dev_accuracy": fitted.dev_accuracy,
                "iterations": fitted.iterations,
                "converged": fitted.converged,
            }
            if not fitted.converged:
                say(f"linear probe: not converged after {fitted.iterations:,} iterations; its accuracy may be a little low")
        if knn:
            found = nearest_classes(
                train.values,
                train.labels,
                test.values,
                num_classes=probed.num_classes,
                neighbours=knn,
                device=opened.device,
            )
            of_neighbours = {str(k): {**judged(weighted), **judged(plain, "_plain")} for k, (weighted, plain) in found.items()}
        few = few_shot(probed, train, numbers, test, shots=shots, seeds=seeds, l2=l2)
        return {
            "checkpoint": str(opened.pretrained.source_path),
            "step": opened.pretrained.step,
            "dataset": probed.name,
            "features": train.values.shape[1],
            "classes": probed.num_classes,
            "train_examples": len(probed.train),
            "test_examples": len(test.values),
            "fewshot": [entry(s, correct, l2=l2, l2_per_seed=used) for s, (correct, used) in few.items()],
            "linear": of_linear,
            "knn": of_neighbours,
        }

    return ranks.on_main(probe)


def open_for_probes(
    ckpt: Path, *, dataset: str | None, overrides: Sequence[str], say: Callable[[str], None]
) -> tuple[OpenedModel, ProbeSet]:
    """Open a model and both splits of its data."""
    opened = open_model(ckpt, dataset=dataset, overrides=overrides, head=False, say=say)
    opened, train = open_split(opened, "train")
    opened, test = open_split(opened, "val")
    return opened, ProbeSet.matched(opened.config.data.source, train, test)


def entry(shots: int, correct: NDArray[np.bool_], *, l2: float | None, l2_per_seed: list[float]) -> dict[str, Any]:
    """Return what the report says of a number of shots, from the hits (seeds, M)."""
    per_seed = correct.mean(1)
    low, high = bootstrap_interval(correct.mean(0))  # over the images: what another test set of the size would give
    return {
        "shots": shots,
        "l2": l2,
        "l2_per_seed": l2_per_seed,
        "accuracy_mean": float(per_seed.mean()),
        "accuracy_std": float(per_seed.std(ddof=1)) if len(per_seed) > 1 else None,
        "per_seed": per_seed.tolist(),
        "interval": [low, high],
    }


# ---------------------------------------------------------------- while a run trains


def open_probe_sets(config: Config, *, ranks: Ranks) -> list[ProbeSet]:
    """Open the data sets that a run is probed on, whole, whatever part of its own data it trains on.

    Raises:
        DataError: on all ranks, one is missing or damaged.
    """
    if not config.fewshot.datasets:
        return []
    data = config.data.model_copy(update={"examples": None, "dev_fraction": None})

    def open_all() -> list[ProbeSet]:
        return [
            ProbeSet.matched(spec, open_source(spec, split="train", data=data), open_source(spec, split="val", data=data))
            for spec in config.fewshot.datasets
        ]

    return ranks.main_first(open_all)


def probe_live(
    model: torch.nn.Module,
    sets: Sequence[ProbeSet],
    config: Config,
    *,
    device: torch.device,
    batch_size: int,
    warn: Say,
    check: Callable[[], None],
    flops_per_image: int,
    ranks: Ranks,
) -> dict[str, float]:
    """Probe a model that is being trained; return the mean accuracy over the draws by "<data set>/<shots>shot".

    Nothing random is drawn from a generator that training uses. All ranks must call it; each gets the result.

    Raises:
        UserError, Interrupted: on every rank, what reading an image or `check` raised on any.
    """
    fewshot = config.fewshot
    results: dict[str, float] = {}
    for probed in sets:
        pool, numbers = shot_pool(probed.train, num_classes=probed.num_classes, shots=fewshot.shots, seeds=fewshot.seeds)
        train, test = (
            extract_features(
                model,
                source,
                with_workers(config, source, device, ranks=ranks),
                device=device,
                batch_size=batch_size,
                warn=warn,
                check=check,
                flops_per_image=flops_per_image,
                forward=head_inputs,
                ranks=ranks,
            )
            for source in (pool, probed.test)
        )
        if train is None or test is None:
            continue
        found = few_shot(probed, train, numbers, test, shots=fewshot.shots, seeds=fewshot.seeds, l2=fewshot.l2)
        name = re.sub(r"[^\w.-]+", "-", probed.name).strip("-.")  # TensorBoard takes no others
        results |= {f"{name}/{shots}shot": float(correct.mean(1).mean()) for shots, (correct, _) in found.items()}
    return ranks.on_main(lambda: results)


def with_workers(config: Config, source: Source, device: torch.device, *, ranks: Ranks) -> Config:
    """Return the config with as many loader processes as suit a source that is not the run's own."""
    together = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if ranks.ranks > 1 else 1
    workers = min(choose_workers(source, device.type, processes=together), len(source) // WORTH_A_WORKER)
    return config.model_copy(update={"data": config.data.model_copy(update={"workers": workers})})
