"""Images in class folders: PATH/class/*.jpg, or PATH/{train,val,test}/class/*.jpg; without classes PATH/*.jpg."""

import difflib
import os
import re
from pathlib import Path

import numpy as np

from tl_jax.core.checks import refuse
from tl_jax.core.messages import shorten
from tl_jax.data.examples import Source, check_split, file_source

SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
SPLITS |= {"dev": "val", "development": "val", "test": "test", "testing": "test"}  # names of split folders, in any case
LITTER = {"Thumbs.db", "desktop.ini"}  # what file managers leave behind; hidden files are ignored anyway


def load_folder(path: str, split: str) -> Source:
    """Lists one split of a folder of images; labels are the positions of the class names in natural order.

    Files may lie at any depth below their class folder; hidden files and folders are ignored. Where images and no
    folders lie in the place of class folders, there are no class names and every label is -1. Raises FileNotFoundError
    on a missing folder, ValueError on a missing split and on classes that are empty or not those of train.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"no image folder at {root}{_near(root)}")
    splits = _split_folders(root)
    check_split(root, split, splits)
    classes = _subfolders(splits[split])
    train = _subfolders(splits["train"]) if "train" in splits and split != "train" else classes
    missing, extra = sorted(set(train) - set(classes)), sorted(set(classes) - set(train))
    if missing or extra:
        raise ValueError(f"classes of {split} in {root} differ from train's: missing {missing}, not in train {extra}")
    if not classes:
        paths = [os.path.relpath(file, root) for file in list_files(splits[split])]
        return file_source(f"folder:{path} {split}", str(root), paths, np.full(len(paths), -1, np.int32), ())
    files = {name: list_files(splits[split] / name) for name in classes}
    empty, fix = [name for name in classes if not files[name]], "add images to them or remove the folders"
    refuse(f"{len(empty)} of {len(classes)} class folders of {splits[split]} are empty; {fix}", empty)
    paths = [os.path.relpath(file, root) for name in classes for file in files[name]]
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(files[name]) for name in classes])
    return file_source(f"folder:{path} {split}", str(root), paths, labels, classes)


def natural_key(name: str) -> tuple:
    """Sorts numbers inside names by value, so that class folders 1, 2, 10 keep that order."""
    pieces = re.split(r"(\d+)", name)
    return tuple((int(piece), "") if i % 2 else (0, piece.lower()) for i, piece in enumerate(pieces)), name


def check_file(file: Path, suffix: str) -> None:
    """Raises FileNotFoundError that names the files of this kind beside a missing one."""
    if not file.is_file():
        near = sorted((other.name for other in file.parent.glob(f"*{suffix}")), key=natural_key)
        raise FileNotFoundError(f"no file {file}; {suffix} files there: {', '.join(shorten(near, 10)) or 'none'}")


def _near(path: Path) -> str:
    """A hint for a missing path: entries of the deepest folder that exists whose names are close."""
    while not path.parent.is_dir():
        path = path.parent
    entries = sorted(entry.name for entry in path.parent.iterdir() if entry.is_dir())
    close = difflib.get_close_matches(path.name, entries, n=3)
    return f"; near it: {', '.join(str(path.parent / name) for name in close)}" if close else ""


def _subfolders(folder: Path) -> list[str]:
    names = [entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    return sorted(names, key=natural_key)


def _split_folders(root: Path) -> dict[str, Path]:
    """The folder of each split; a root without split folders is itself the train split."""
    found = {name: SPLITS[name.lower()] for name in _subfolders(root) if name.lower() in SPLITS}
    if same := [name for name, split in found.items() if list(found.values()).count(split) > 1]:
        raise ValueError(f"{root} names one split twice: {', '.join(same)}; keep one folder per split")
    return {split: root / name for name, split in found.items()} or {"train": root}


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
