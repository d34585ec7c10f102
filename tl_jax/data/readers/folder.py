"""Images in class folders: PATH/class/*.jpg, or PATH/{train,val,test}/class/*.jpg."""

import difflib
import os
import re
from pathlib import Path

import numpy as np

from tl_jax.core.messages import listed
from tl_jax.data.examples import FileImages, Source

SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
SPLITS |= {"test": "test", "testing": "test"}  # names of split folders, in any case
LITTER = {"Thumbs.db", "desktop.ini"}  # what file managers leave behind; hidden files are ignored anyway


def load_folder(path: str, split: str) -> Source:
    """Lists one split of a folder of images; labels are the positions of the class names in natural order.

    Files may lie at any depth below their class folder; hidden files and folders are ignored. Raises FileNotFoundError
    on a missing folder or split, ValueError where there are no classes, empty classes, or classes that differ from
    those of train.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"no image folder at {root}{_near(root)}")
    splits = _split_folders(root)
    if split not in splits:
        raise ValueError(
            f"{root} has no split {split!r}; it has {', '.join(splits)}. Take a part of one instead: 'train[80%:]'"
        )
    classes = _class_folders(splits[split])
    if "train" in splits and split != "train":
        _check_same_classes(root, split, classes, _class_folders(splits["train"]))
    files = {name: list_files(splits[split] / name) for name in classes}
    if empty := [name for name in classes if not files[name]]:
        raise ValueError(
            f"{len(empty)} of {len(classes)} class folders of {splits[split]} are empty:\n{listed(empty)}\n"
            "Add images to them or remove the folders."
        )
    paths = [os.path.relpath(file, root) for name in classes for file in files[name]]
    return Source(
        name=f"folder:{path} {split}",
        inputs=FileImages(str(root), tuple(paths)),
        labels=np.repeat(np.arange(len(classes), dtype=np.int32), [len(files[name]) for name in classes]),
        class_names=tuple(classes),
        ids=tuple(Path(p).as_posix() for p in paths),
        sizes=np.array([_size(root / p) for p in paths], np.int64),
    )


def natural_key(name: str) -> tuple:
    """Sorts numbers inside names by value, so that class folders 1, 2, 10 keep that order."""
    pieces = re.split(r"(\d+)", name)
    return tuple((int(piece), "") if i % 2 else (0, piece.lower()) for i, piece in enumerate(pieces)), name


def _near(path: Path) -> str:
    """A hint for a missing path: entries of the deepest folder that exists whose names are close."""
    missing = path
    while not missing.parent.is_dir():
        missing = missing.parent
    entries = sorted(entry.name for entry in missing.parent.iterdir() if entry.is_dir())
    close = difflib.get_close_matches(missing.name, entries, n=3)
    return f"; near it: {', '.join(str(missing.parent / name) for name in close)}" if close else ""


def _subfolders(folder: Path) -> list[str]:
    names = [entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    return sorted(names, key=natural_key)


def _split_folders(root: Path) -> dict[str, Path]:
    """The folder of each split; a root without split folders is itself the train split."""
    found = {name: SPLITS[name.lower()] for name in _subfolders(root) if name.lower() in SPLITS}
    same = [name for name, split in found.items() if list(found.values()).count(split) > 1]
    if same:
        raise ValueError(f"{root} names one split twice: {', '.join(same)}; keep one folder per split")
    return {split: root / name for name, split in found.items()} or {"train": root}


def _class_folders(folder: Path) -> list[str]:
    classes = _subfolders(folder)
    if not classes:
        count = sum(entry.is_file() for entry in folder.iterdir())
        raise ValueError(f"no class folders in {folder}, only {count} files; expected {folder}/CLASS/IMAGE")
    return classes


def _check_same_classes(root: Path, split: str, classes: list[str], train: list[str]) -> None:
    missing, extra = sorted(set(train) - set(classes)), sorted(set(classes) - set(train))
    if missing or extra:
        raise ValueError(f"classes of {split} in {root} differ from train's: missing {missing}, not in train {extra}")


def list_files(folder: Path) -> list[str]:
    """Every visible file at any depth, links followed once, in natural order."""
    files, seen = [], set()
    for where, subfolders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(where)) in seen:  # a link back to a parent would be walked for ever
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        files += [os.path.join(where, name) for name in names if not name.startswith(".") and name not in LITTER]
    return sorted(files, key=natural_key)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0  # a dangling link is reported with the unreadable images
