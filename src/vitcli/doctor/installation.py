"""The installation and the machine, without a config: versions, cores, memory, device, precision.

Nothing is fetched; where the installation says itself what it needs (package metadata), that is compared with what is there.
"""

import os
import shutil
import sys
import warnings
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import torch
from packaging.requirements import Requirement

from vitcli import __version__
from vitcli.data.cache import default_cache_dir
from vitcli.data.parallel import available_cores
from vitcli.device import choose_device, choose_precision, hardware, memory_bytes
from vitcli.doctor.checks import GIB, Check, Issue, Status, first_line, gather, in_bytes, left_open
from vitcli.errors import ConfigError
from vitcli.rundir import installed_version

__all__ = ["check_device", "check_machine", "check_precision", "check_versions", "existing_parent"]

PARTICULAR = ("vitcli", "torchvision")  # packages that do not work with just any version of what they need
CPU = torch.device("cpu")
USUAL_WIDTH = 768  # of a ViT-B, whose products stand for a model's where none is named
LITTLE_SHARED = GIB / 4  # Docker gives 64 MiB
SHARED_MEMORY = Path("/dev/shm")
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def check_versions() -> Check:
    """Compare installed packages with what they say they need."""
    shown = ", ".join(f"{name} {installed_version(name) or 'missing'}" for name in ("torch", "torchvision", "numpy"))
    issues = []
    for package in PARTICULAR:
        for name, found, wanted in unmet(package):
            status: Status = "problem" if found is None else "warning"
            text = f"{name} is {found or 'missing'}, {package} needs {wanted or 'it'}"
            issues.append(Issue(status, text, f"pip install '{name}{wanted}'"))
    return gather("versions", f"vit {__version__}, Python {sys.version.split()[0]}, {shown}", issues)


def unmet(package: str) -> list[tuple[str, str | None, str]]:
    """Return (name, version or None, wanted) of what a package needs and does not find; none where it is not installed."""
    try:
        lines = requires(package) or []
    except PackageNotFoundError:  # run from a source tree
        return []
    wrong = []
    for requirement in map(Requirement, lines):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = installed_version(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            wrong.append((requirement.name, found, str(requirement.specifier)))
    return wrong


def check_machine() -> Check:
    """Look at cores and memory, and at what keeps this process from using them."""
    cores, load = available_cores(), os.getloadavg()[0]
    issues = [*fewer_cores(cores), *little_shared()]
    memory, cache = memory_bytes(CPU), default_cache_dir()
    if not os.access(existing_parent(cache), os.W_OK | os.X_OK):
        text = f"the cache {cache} cannot be written, so pictures are decoded anew by every run"
        issues.append(Issue("warning", text, "set VIT_CACHE to a folder that can"))
    free = "" if memory is None else f", {in_bytes(memory)} of memory free"
    return gather(
        "machine", f"{cores} cores{free}, load {load:.1f}", issues, cores=cores, load=round(load, 2), memory_free_bytes=memory
    )


def fewer_cores(cores: int) -> list[Issue]:
    """Say where fewer cores compute than there are; that torch takes one thread of each core's two is as it should be."""
    issues = []
    threads, said = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    if said is not None and 2 * threads <= cores:
        advice = "unset OMP_NUM_THREADS, unless several runs share this machine"
        issues.append(Issue("warning", f"torch computes on {threads} of the cores, because OMP_NUM_THREADS is {said}", advice))
    quota = cpu_quota()
    if quota is not None and quota < cores:
        text = f"the container may use the time of {quota:g} cores"
        issues.append(Issue("warning", text, f"give it more, or set OMP_NUM_THREADS={max(1, int(quota))}"))
    return issues


def cpu_quota() -> float | None:
    """Return the cores' worth of time that a container may use, or None where there is no such limit."""
    try:
        quota, period = CPU_QUOTA.read_text().split()[:2]
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def little_shared() -> list[Issue]:
    """Say where loader processes could not hand their batches over."""
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:  # another operating system
        return []
    if free >= LITTLE_SHARED:
        return []
    text = f"only {in_bytes(free)} of shared memory ({SHARED_MEMORY}), through which loader processes hand over batches"
    return [Issue("warning", text, "start the container with more (docker run --shm-size=4g), or set data.workers=0")]


def check_device(wanted: str = "auto") -> tuple[Check, torch.device | None]:
    """Choose the device as a run does, and let it compute something; None where a run could not use it.

    Args:
        wanted: auto, cpu or cuda, as `train.device`.
    """
    with warnings.catch_warnings(record=True) as said:  # torch warns about a driver that is too old
        warnings.simplefilter("always")
        there = torch.cuda.is_available()
    try:
        device = choose_device(wanted)
    except ConfigError as error:
        issues = [Issue("problem", str(error), ""), *unused_gpu(there, [str(each.message) for each in said])]
        return gather("device", "", issues), None
    issues = unused_gpu(there, [str(each.message) for each in said]) if device.type == "cpu" and wanted == "auto" else []
    trouble = miscomputes(device)
    if trouble is not None:
        issues.append(Issue("problem", f"it cannot compute: {trouble}", "install the torch build made for it (pytorch.org)"))
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    text = hardware(device) if device.type == "cuda" else f"CPU, {hardware(device)}{'' if there else '; no GPU'}"
    numbers: dict[str, object] = {"device": hardware(device), "gpus": count}
    if device.type == "cuda" and trouble is None:
        free, total = torch.cuda.mem_get_info(device)
        text += f", {in_bytes(free)} of {in_bytes(total)} free"
        numbers |= {"memory_free_bytes": free, "memory_bytes": total}
        if free < 0.9 * total:
            issues.append(Issue("warning", "other programs hold the rest of its memory", "nvidia-smi lists them"))
    if count > 1:
        text += f"; the first of {count}: torchrun --nproc-per-node gpu uses all (docs/scale-out.md)"
    return gather("device", text, issues, **numbers), device if trouble is None else None


def unused_gpu(there: bool, warned: list[str]) -> list[Issue]:
    """Say why torch does not see an NVIDIA GPU on a machine that has a driver for one."""
    if there or shutil.which("nvidia-smi") is None:
        return []
    if torch.version.cuda is None:
        advice = "install torch with CUDA (pytorch.org, Get Started)"
        return [Issue("warning", "this machine has an NVIDIA driver, but torch is its CPU build", advice)]
    why = f" ({first_line(Warning(warned[0]))})" if warned else ""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    advice = "run nvidia-smi: is the driver new enough for it?"
    if hidden is not None:
        advice = f"CUDA_VISIBLE_DEVICES is {hidden!r}: unset it"
    return [Issue("warning", f"there is an NVIDIA driver, but torch for CUDA {torch.version.cuda} sees no GPU{why}", advice)]


def miscomputes(device: torch.device) -> str | None:
    """Multiply two matrices; return what went wrong, or None."""
    try:
        ones = torch.ones(64, 64, device=device)
        total = float((ones @ ones).sum())
    except RuntimeError as error:
        return first_line(error)
    return None if total == 64**3 else f"a product of ones came to {total:g} instead of {64**3}"


def check_precision(device: torch.device | None, *, wanted: str = "auto", width: int = USUAL_WIDTH) -> Check:
    """Say what a run computes in, and whether another precision would suit the device better.

    Args:
        wanted: as `train.precision`.
        width: of the model's matrix products.
    """
    if device is None:
        return left_open("precision", "there is no device to compute on")
    best = choose_precision("auto", device, width=width)
    if wanted == "auto":
        why = "which is faster here than float32" if best == "bf16" else "bf16 is not faster here"
        return gather("precision", f"{best}; {why}" if best == "float32" else f"{best}, {why}", precision=best)
    issues = []
    if device.type == "cpu" and wanted != best and wanted != "float32":
        issues.append(Issue("warning", f"{best} is faster on this CPU", "train.precision=auto"))
    elif device.type == "cuda" and wanted == "bf16" and best != "bf16":
        issues.append(Issue("warning", "this GPU only imitates bf16", "train.precision=auto or fp16"))
    elif wanted == "float32" and best == "bf16":
        issues.append(Issue("warning", "bf16 would be faster here", "train.precision=auto"))
    return gather("precision", f"{wanted}, as the config says", issues, precision=wanted)


def existing_parent(path: Path) -> Path:
    """Return the nearest folder above a path, or the path itself, that is there."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
