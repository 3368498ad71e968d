"""Whether a study may go on in a folder: what lies there is kept, and may only grow. Its data may have moved."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vitcli.config import Config
from vitcli.errors import ConfigError, RunExistsError
from vitcli.rundir import differing_keys, without_places
from vitcli.study.config import StudyConfig
from vitcli.study.file import read_study
from vitcli.train import begun, keys_free_to_change, value_at

__all__ = ["STATED", "problem_of_growth", "refuse_other_study"]

STATED = "study.yaml"
RUNS = ("cells/*/*/*/*/run", "search/*/*/*/*/run")
# what may lie there before anything is begun
KNOWN = {STATED, "cells", "search", "logs", "figures", "results.csv", "study.json", "study.md"}


def refuse_other_study(out: Path, config: StudyConfig) -> None:
    """Raise RunExistsError where a study must not go: into a file, a run, other files, or among the cells of another study."""
    if out.exists() and not out.is_dir():
        raise RunExistsError(f"{out}: this is a file, expected a directory for the study; choose another --out")
    if (out / "manifest.json").exists() or (out / "checkpoints").exists():
        raise RunExistsError(f"{out}: this is a run; choose another --out for the study, such as {out}-study")
    if not out.is_dir():
        return
    stated = out / STATED
    if not stated.exists():
        strangers = sorted(path.name for path in out.iterdir() if not path.name.startswith(".") and path.name not in KNOWN)
        if strangers:
            raise RunExistsError(f"{out}: holds files but no study ({strangers[0]}, ...); choose another --out")
        return
    if not any(begun(run) for pattern in RUNS for run in out.glob(pattern)):
        return  # nothing to lose yet
    try:
        before, _ = read_study(stated)
    except ConfigError as error:
        raise RunExistsError(f"{out}: holds a study whose settings cannot be read ({error}); choose another --out") from None
    if problem := problem_of_growth(before, config):
        raise RunExistsError(
            f"{out}: this study has other settings: {problem}; choose another --out, or take the settings back"
        )


def problem_of_growth(before: StudyConfig, now: StudyConfig) -> str | None:
    """Say why the cells of one study would not be cells of another; None if all are, and perhaps more come in addition."""
    old, new = before.model_dump(mode="json"), now.model_dump(mode="json")
    shrinks = [key for key in ("seeds", "sizes", "translate_px") if set(old[key]) - set(new[key])]
    for key in shrinks[:1]:
        return f"{key} ({old[key]} there, {new[key]} now, which may only grow)"
    if now.form == "one_pass" and old["sizes"] != new["sizes"]:
        return f"sizes ({old['sizes']} there, {new['sizes']} now, which cannot grow in a run that was read while it trained)"
    if now.search is not None and old["seeds"][0] != new["seeds"][0]:
        return f"seeds (the first is {old['seeds'][0]} there and {new['seeds'][0]} now, and trials have it)"
    for key in ("families", "variants"):
        if gone := [name for name in old[key] if name not in new[key]]:
            return f"{key} ({gone[0]} is there, and not among {', '.join(new[key]) or 'none'} now)"
    transfer = problem_of_transfer(old["transfer"], new["transfer"], families=before.families)
    return problem_of_variants(before, now) or transfer or problem_of_rest(old, new)


def problem_of_variants(before: StudyConfig, now: StudyConfig) -> str | None:
    for name in before.variants:
        for part in ("families", "sizes", "seeds"):
            old, new = (getattr(study, f"{part}_of")(name) for study in (before, now))
            if gone := [each for each in old if each not in new]:
                return f"variants.{name}.{part} (without {gone[0]} now, and they may only grow)"
    return None


def problem_of_transfer(
    old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]], *, families: Iterable[str]
) -> str | None:
    now = {each["dataset"]: each for each in new}
    for each in old:
        same = now.get(each["dataset"])
        if same is not None:  # settings of a family that has come since
            same = {**same, "families": {name: tree for name, tree in same["families"].items() if name in families}}
        if same != each:
            return f"transfer (other settings for {each['dataset']} than there)"
    known = {each["dataset"] for each in old}
    for each in new:
        if each["dataset"] not in known and each["shots"]:
            return f"transfer (few-shot probes on {each['dataset']}, which are made while a run trains)"
    return None


def problem_of_rest(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """Compare what may not change, but for what is new as a whole and for settings that change no result."""
    settled = {"title", "compare", "seeds", "sizes", "transfer", "translate_px"}
    before, now = ({key: value for key, value in each.items() if key not in settled} for each in (old, new))
    now["families"] = {name: now["families"][name] for name in before["families"]}
    before["variants"], now["variants"] = (
        {name: {"settings": without_places(each[name]["settings"]), "search": each[name]["search"]} for name in old["variants"]}
        for each in (old["variants"], new["variants"])
    )
    for each in (before, now):
        each["base"] = without_places(each["base"])
        each["families"] = {name: without_places(settings) for name, settings in each["families"].items()}
    if before["search"] and now["search"]:
        own = {name: tree for name, tree in now["search"]["families"].items() if name in before["families"]}
        now["search"] = {**now["search"], "families": own}
    prefixes = ["base.", *(f"families.{name}." for name in before["families"])]
    prefixes += [f"variants.{name}.settings." for name in before["variants"]]
    free = {prefix + key for prefix in prefixes for key in keys_free_to_change(Config)}
    differing = [key for key in differing_keys(before, now) if key not in free]
    said = (f"{key} ({json.dumps(value_at(before, key))} there, {json.dumps(value_at(now, key))} now)" for key in differing[:6])
    return ", ".join(said) or None
