"""Which tar files a pattern means, and what lies beside them: `_info.json` with splits and counts, and a list of class names.

A pattern names a set; the split that is asked for decides which shards of the set are meant, as `_info.json` says, or their
names. Where no evaluation split is known, a part of each class is held out (see `shards`).
"""

import glob
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from braceexpand import braceexpand

from vitcli.data.folders import EVALUATION_FOLDERS, Split
from vitcli.data.remote import is_remote, list_remote, read_if_there
from vitcli.data.tar import printable
from vitcli.errors import DataError

__all__ = ["SetInfo", "ShardChoice", "choose_shards", "expand_shards", "folder_of", "read_set_info", "spelt_alike"]

INFO = "_info.json"
CLASS_LISTS = ("classnames.txt", "classes.txt")  # or a list in _info.json, under one of:
CLASS_KEYS = ("classes", "classnames", "class_names")
SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "val"}
MOST_SHARDS = 2_000_000  # names of one set; a few braces can stand for more than memory holds
DEEPEST_BRACES = 10
LARGEST_INFO = 64 << 20  # bytes of `_info.json` or a class list
INT_RANGE = re.compile(r"(-?\d{1,19})\.\.(-?\d{1,19})(?:\.\.-?(\d{1,19}))?")
LETTER_RANGE = re.compile(r"[A-Za-z]\.\.[A-Za-z](?:\.\.-?\d+)?")
NO_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
NO_NAME = re.compile(r"[\x00-\x1f\x7f\ud800-\udbff]")  # control characters, and what no file name can hold


@dataclass(frozen=True)
class SetInfo:
    """What a set says of itself."""

    folder: str
    splits: dict[str, list[str]] = field(default_factory=dict)  # paths or URLs of each split's shards
    lengths: dict[str, int] = field(default_factory=dict)  # examples by shard
    totals: dict[str, int] = field(default_factory=dict)  # examples by split
    classes: list[str] | None = None
    class_list: str = ""  # where `classes` are written

    @property
    def train(self) -> list[str] | None:
        """Return the shards of the training split."""
        return self.splits.get("train")

    @property
    def evaluation(self) -> list[str] | None:
        """Return the shards of the first evaluation split there is."""
        return next((self.splits[name] for name in EVALUATION_FOLDERS if name in self.splits), None)


@dataclass(frozen=True)
class ShardChoice:
    """The shards of one split, or of the set that a split is held out from."""

    urls: list[str]
    hold_out: bool
    train: list[str] | None  # where the classes come from if no list names them
    info: SetInfo


def expand_shards(pattern: str) -> list[str]:
    """Return the shards that a pattern names: paths, and URLs where they are not on this machine.

    A pattern is a path or any URL that fsspec opens, with braces ({0000..0127}, {a,b}) and globs; several are listed in braces
    or joined by `::`, as webdataset does. Braces keep the given order, globs are sorted. A folder means all its shards.

    Raises:
        DataError: braces that do not close, a glob or folder without shards, or a shard named twice.
    """
    parts = pattern.split("::")
    if len(parts) > 1 and all(part.rstrip("}").endswith(".tar") for part in parts):  # not fsspec's chained URLs
        urls = []
        for part in parts:
            urls += expand_shards(part)
            check_number(len(urls), pattern)
    elif (folder := as_folder(pattern)) is not None:
        info = read_set_info(folder)
        urls = list(dict.fromkeys(url for listed in info.splits.values() for url in listed)) or tars_in(folder)
    else:
        braced = [pattern] if os.path.exists(pattern) else expand_braces(pattern)
        urls = [url for one in braced for url in expand_glob(plain_path(one))]
    most, times = Counter(urls).most_common(1)[0]
    if times > 1:
        raise DataError(f"{pattern}: names {most} more than once, so its images would count more than once")
    return urls


def expand_braces(pattern: str) -> list[str]:
    """Return the names that {0000..0127} and {a,b} stand for. Raises DataError: malformed, or too many of them."""
    depth = deepest = 0
    for letter in pattern:
        depth += (letter == "{") - (letter == "}")
        deepest = max(deepest, depth)
    if deepest > DEEPEST_BRACES:
        raise DataError(f"{shown(pattern)}: braces in braces {deepest} deep; expected such as train-{{0000..0127}}.tar")
    try:
        check_number(count_braced(pattern), pattern)
        return list(braceexpand(pattern))
    except ValueError as error:
        raise DataError(f"{shown(pattern)}: a brace is not closed; expected such as train-{{0000..0127}}.tar") from error


def check_number(shards: int, pattern: str) -> None:
    if shards > MOST_SHARDS:
        raise DataError(f"{shown(pattern)}: stands for {shards:,} shards; expected at most {MOST_SHARDS:,}")


def count_braced(pattern: str) -> int:
    """Count the names that `braceexpand` would make: braces multiply."""
    return math.prod(count_choices(inside) for inside in split_braces(pattern, opens="{"))


def count_choices(inside: str) -> int:
    """Count what one pair of braces stands for: commas add."""
    if (found := INT_RANGE.fullmatch(inside)) is not None:
        low, high, step = found.groups()
        return abs(int(high) - int(low)) // (int(step or 1) or 1) + 1
    if LETTER_RANGE.fullmatch(inside) is not None:
        return 52
    return sum(map(count_braced, split_braces(inside, opens="")))


def split_braces(text: str, *, opens: str) -> list[str]:
    """Return the insides of the outermost braces, or with nothing that `opens` the parts between the commas outside of any."""
    parts, start, depth, position = list[str](), 0, 0, 0
    while position < len(text):
        letter = text[position]
        if letter == "\\":  # an escaped brace or comma
            position += 1
        elif letter == "{":
            depth += 1
            start = position + 1 if opens and depth == 1 else start
        elif letter == "}":
            depth -= 1
            if opens and depth == 0:
                parts.append(text[start:position])
        elif letter == "," and depth == 0 and not opens:
            parts.append(text[start:position])
            start = position + 1
        position += 1
    return parts if opens else [*parts, text[start:]]


def shown(pattern: str) -> str:
    """Return a pattern for a message: one line, not endless."""
    return printable(pattern if len(pattern) <= 200 else f"{pattern[:200]}...")


def plain_path(url: str) -> str:
    """Return a path for what is on this machine, with ~ expanded; other URLs as they are."""
    for protocol in ("file://", "local://"):
        url = url.removeprefix(protocol)
    return url if is_remote(url) else os.path.expanduser(url)


def expand_glob(url: str) -> list[str]:
    """Return what a glob matches, sorted; what is no glob, as it is."""
    if is_remote(url):
        wild = "*[" if url.startswith("http") else "*?["  # in web addresses ? begins a query
        if not set(wild) & set(url):
            return [url]
        found = list_remote(url)
    elif not glob.has_magic(url) or os.path.exists(url):
        return [url]
    else:
        found = sorted(path for path in glob.glob(url, recursive=True) if not os.path.isdir(path))
    if found:
        return found
    if is_remote(url):
        raise DataError(f"{url}: nothing matches this pattern; check it")
    folder = os.path.dirname(url) or "."
    if glob.has_magic(folder):
        raise DataError(f"{url}: nothing matches this pattern; check it")
    if not os.path.isdir(folder):
        raise DataError(f"{url}: there is no folder {folder}")
    there = sorted(name for name in os.listdir(folder) if name.endswith(".tar"))
    some = f"; {folder} has {len(there)} tar files, such as {there[0]}" if there else f"; {folder} has no tar files"
    raise DataError(f"{url}: nothing matches this pattern{some}")


def as_folder(pattern: str) -> str | None:
    """Return the folder that a pattern is, without the slash at its end; None if it is none."""
    place = plain_path(pattern)
    if not is_remote(place):
        return (place.rstrip("/") or "/") if os.path.isdir(place) else None
    if set("*[{") & set(place) or "::" in place or place.endswith(".tar") or "?" in place:
        return None
    return place.rstrip("/")


def tars_in(folder: str) -> list[str]:
    """Return the tar files directly in a folder, sorted."""
    if is_remote(folder):
        urls = list_remote(f"{folder}/*.tar")
    else:
        try:
            urls = sorted(join(folder, name) for name in os.listdir(folder) if name.endswith(".tar"))
        except OSError as error:
            raise DataError(f"{folder}: cannot list this folder: {error.strerror}") from error
    if not urls:
        raise DataError(f"{folder}: no tar files here; expected shards such as {join(folder, 'train-0000.tar')}")
    return urls


def folder_of(urls: Sequence[str]) -> str | None:
    """Return the folder that all shards lie in; None if there is no such."""
    folders = {url.partition("?")[0].rpartition("/")[0] if is_remote(url) else os.path.dirname(url) for url in urls}
    return folders.pop() if len(folders) == 1 else None


def join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}" if folder else name


def spelt_alike(urls: Iterable[str]) -> list[str]:
    """Return one spelling for all that mean one place: absolute paths, and URLs as they are."""
    folders: dict[str, str] = {}  # tens of thousands of shards lie in a few
    spelt = []
    for url in urls:
        folder, slash, name = url.rpartition("/")
        if is_remote(url):
            spelt.append(url)
            continue
        if folder not in folders:
            folders[folder] = os.path.abspath(folder or slash or ".").rstrip("/")
        spelt.append(f"{folders[folder]}/{name}")
    return spelt


def choose_shards(pattern: str, split: Split) -> ShardChoice:
    """Find the shards of a split.

    A folder is the whole set. Shards of the training split stand for it: their evaluation split is the set's. Shards of an
    evaluation split are used as they are. Without `_info.json`, the word train, val, validation or test in their names, or
    as the name of their folder, says the same; where nothing is said, examples are held out.

    Raises:
        DataError: nothing matches, or evaluation shards are to be trained on and no training shards are known.
    """
    folder = as_folder(pattern)
    if folder is not None:
        info = read_set_info(folder)
        train, evaluation = info.train, info.evaluation
        if train is None and evaluation is None:
            urls = expand_shards(pattern)
            by_word = {word: [url for url in urls if split_word(url) == word] for word in ("train", "val")}
            if by_word["train"] and by_word["val"]:  # any others belong to neither
                train, evaluation = by_word["train"], by_word["val"]
            elif len(by_word["val"]) == len(urls):
                evaluation = urls
            else:
                train = urls
    else:
        urls = expand_shards(pattern)
        place = folder_of(urls)
        info = SetInfo("") if place is None else read_set_info(place)
        spelt = set(spelt_alike(urls))
        if info.train is not None and spelt <= set(spelt_alike(info.train)):
            train, evaluation = urls, info.evaluation
        elif any(name in EVALUATION_FOLDERS and spelt <= set(spelt_alike(listed)) for name, listed in info.splits.items()):
            train, evaluation = info.train, urls
        elif all(split_word(url) == "val" for url in urls):
            train, evaluation = None, urls
        else:
            train, evaluation = urls, None
    if split == "val" and evaluation is not None:
        return ShardChoice(evaluation, hold_out=False, train=train, info=info)
    if train is None:
        raise DataError(
            f"{pattern}: these are shards to evaluate on, and no training shards are known; "
            f"name the training shards, or list both splits in {INFO} beside them"
        )
    return ShardChoice(train, hold_out=evaluation is None, train=train, info=info)


def split_word(url: str) -> str | None:
    """Return `train` or `val` if a shard's name, or its folder's, says so."""
    parts = url.partition("?")[0].split("/")
    words = re.split(r"[^a-z]+", parts[-1].lower())
    found = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
    if found:
        return "train" if "train" in found else "val"
    return SPLIT_WORDS.get(parts[-2].lower()) if len(parts) > 1 else None


def read_set_info(folder: str) -> SetInfo:
    """Read `_info.json` and the class list of a folder; what is not there stays empty.

    Raises:
        DataError: one of them is damaged or contradicts itself.
    """
    where = join(folder, INFO)
    raw = read_beside(where)
    content: object = {}
    if raw is not None:
        try:
            content = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: this is not JSON ({shown(str(error))}); mend or remove it") from error
    stated = content if isinstance(content, dict) else {}
    splits: dict[str, list[str]] = {}
    lengths: dict[str, int] = {}
    totals: dict[str, int] = {}
    listed = stated.get("splits", {})
    for name, entry in listed.items() if isinstance(listed, dict) else ():
        split = f"{where}: split {shown(name)}"
        if not isinstance(entry, dict):
            raise DataError(f"{split} is not a table with `filenames`; mend or remove it")
        names = entry.get("filenames", entry.get("filename"))
        try:
            names = expand_braces(names) if isinstance(names, str) else names
        except DataError as error:
            raise DataError(f"{split}: {error}") from error
        counts = entry.get("shard_lengths")
        if not isinstance(names, list) or not names or not all(isinstance(one, str) for one in names):
            raise DataError(f"{split} has no list of `filenames`; mend or remove it")
        unfit = next((one for one in names if not one or NO_NAME.search(one)), None)
        if unfit is not None:
            raise DataError(f"{split}: {shown(unfit)!r} is no file's name; mend or remove it")
        splits[name] = [join(folder, one) for one in names]
        check_number(sum(map(len, splits.values())), where)
        if counts is not None:
            if not isinstance(counts, list) or len(counts) != len(names) or not all(isinstance(one, int) for one in counts):
                raise DataError(f"{split} needs one number of `shard_lengths` for each of its {len(names)} files")
            lengths.update(zip(splits[name], counts))
        if isinstance(entry.get("num_samples"), int):
            totals[name] = entry["num_samples"]
    classes, class_list = read_classes(folder, stated, where)
    return SetInfo(folder, splits, lengths, totals, classes, class_list)


def read_classes(folder: str, stated: dict[str, object], info: str) -> tuple[list[str] | None, str]:
    """Return the class names and where they are written, in label order."""
    for name in CLASS_LISTS:
        where = join(folder, name)
        raw = read_beside(where)
        if raw is None:
            continue
        try:
            lines = raw.decode("utf-8-sig").rstrip().splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: this is not text in UTF-8 ({error}); save it so") from error
        empty = next((number for number, line in enumerate(lines, 1) if not line.strip()), None)
        if empty is not None or not lines:
            raise DataError(
                f"{where}: line {empty or 1} is empty; expected the name of class {(empty or 1) - 1}, one class a line"
            )
        names = [line.partition("\t")[0].strip() for line in lines]  # what follows a tab describes the class
        return distinct(names, where), where
    for key in CLASS_KEYS:
        found = stated.get(key)
        if isinstance(found, list) and found and all(isinstance(one, str) for one in found):
            return distinct(found, info), info
    return None, ""


def distinct(names: list[str], where: str) -> list[str]:
    """Tell classes of equal name apart by their number, as ImageNet's two cranes. Raises DataError: not text to be printed."""
    unfit = next((number for number, name in enumerate(names) if NO_TEXT.search(name)), None)
    if unfit is not None:
        raise DataError(f"{where}: class {unfit}, {shown(names[unfit])}, has control characters in its name; mend it")
    times = Counter(names)
    return [f"{name} ({number})" if times[name] > 1 else name for number, name in enumerate(names)]


def read_beside(where: str) -> bytes | None:
    if is_remote(where):
        return read_if_there(where)
    try:
        with open(where, "rb", opener=without_waiting) as file:
            content = file.read(LARGEST_INFO + 1) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"{where}: cannot read this file: {error.strerror}") from error
    if content is None or len(content) > LARGEST_INFO:
        raise DataError(f"{where}: expected a file of at most {LARGEST_INFO:,} bytes; mend or remove it")
    return content


def without_waiting(path: str, flags: int) -> int:
    """Open a file that may turn out to be a pipe, which would wait for a writer."""
    return os.open(path, flags | os.O_NONBLOCK)
