"""Where examples come from: `load` turns a source and a split, both strings, into a random-access `Source`."""

import dataclasses
import functools
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tl_jax.core.card import Form
from tl_jax.core.checks import refuse
from tl_jax.core.messages import listed, nearest
from tl_jax.data import groups
from tl_jax.data.examples import Source, find_unreadable, join, join_domains, overlap
from tl_jax.data.image import decode
from tl_jax.data.labels import KINDS, check_fit
from tl_jax.data.readers import builtin
from tl_jax.data.readers.arrays import load_arrays
from tl_jax.data.readers.corrupted import FORM, CorruptedImages, clean_images, load_corrupted
from tl_jax.data.readers.docstrings import load_docstrings
from tl_jax.data.readers.folder import load_folder
from tl_jax.data.readers.glyphs import load_glyphs
from tl_jax.data.readers.mat import load_mat
from tl_jax.data.readers.packed import PackedImages, load_packed
from tl_jax.data.readers.several import load_several
from tl_jax.data.readers.tables import load_csv, load_table
from tl_jax.data.readers.texts import load_texts, without_labels
from tl_jax.data.readers.tfds import TfdsImages, load_tfds
from tl_jax.data.sealed import SealedLabels, canonical
from tl_jax.data.several import Several

__all__ = ["list_split", "load", "overlap", "parse_split", "stratified_order", "without"]
log = logging.getLogger(__name__)
BUILTIN = {name: functools.partial(builtin.load_digits, name) for name in builtin.DIGITS}
BUILTIN |= {"glyphs": load_glyphs, "docstrings": load_docstrings}
PLAIN = {"folder": load_folder, "packed": load_packed, "mat": load_mat}  # sources that take a path and a split
COLUMNS = {"csv": load_csv, "table": load_table, "text": load_texts, "several": load_several}  # with label columns
# The options that name further columns of these.
READ = {"text": ("text",), "tfds": ("text",), "several": ("text", "image", "columns")}
DIABETES = "table:diabetes"
FORM_FIX = "say what the files hold by data.card (pixels and scale), and the channels by model.channels"
FORMS = (
    "folder:PATH",
    "arrays:FILE.npz",
    "packed:FOLDER",
    "mat:FILE.mat",
    "csv:FILE",
    "table:FILE",
    "text:PATH",
    "several:FILE",
    "tfds:NAME",
    "tfds:NAME:VERSION",
    FORM,
)


def load(
    source: str | Sequence[str],
    split: str = "train",
    *,
    task: str = "classification",
    labels: Sequence[str] = (),
    text: Sequence[str] = (),
    image: str = "",
    columns: Sequence[str] = (),
    group: str = "",
    shots: int = 0,
    seed: int = 0,
    split_seed: int = 0,
    on_error: str = "fail",
    data_dir: str | None = None,
    labelled: bool = True,
    sealed: Collection[str | tuple[str, str]] = (),
    poison: str = "",
    form: Form = decode.RGB,
) -> Source:
    """Loads a split of a source; see docs/data.md for both languages. Several sources are the domains of one.

    `task` says what the labels must be; of a binary task the second class is positive. `labels` names the label columns
    of sources with columns, `text`, `image` and `columns` those of text, image files and numbers. `group` says what
    belongs together: the name of a column or of an array (arrays:), else a regular expression that finds the group in
    the ids.

    Slices such as `train[:80%]` cut a permutation by `split_seed`, stratified where labels are classes; where there are
    groups it is one of groups, and a slice begins and ends at the nearest end of a group. `shots` > 0 then takes that
    many examples of every class (in every domain) by `seed`; more shots contain the fewer. `on_error="fail"` raises
    ValueError naming every file whose header is no image; `"skip"` decodes every image once, now, and drops the bad
    ones into `Source.skipped`. `data_dir` is where tfds keeps its data. `labelled=False` takes a folder of images
    without class folders too, which has no class names. `sealed` names sources (see `sealed.canonical`), or pairs of
    one and its split, whose labels nothing reads: slices are not stratified, and there are no shots; `poison` replaces
    these labels, to prove it. `form`: of the network's card. ValueError, FileNotFoundError.
    """
    names = (source,) if isinstance(source, str) else tuple(source)
    _check_asked(names, task, shots, seed, split_seed)
    check_on_error(on_error)
    asked = {"task": task, "labels": labels, "text": text, "image": image, "columns": columns}
    asked |= {"group": group, "data_dir": data_dir, "form": form}
    slices, domains, labelled = parse_split(split), [], labelled and KINDS[task] != "tokens"
    for name in names:
        place, wholes = canonical(name), {}
        for cut in slices:
            if (part := cut.split) not in wholes:
                how = poison if place in sealed or (place, part) in sealed else None
                wholes[part] = _load_whole(name, part, on_error, how, asked)
        if (labelled or shots) and (bare := [whole for whole in wholes.values() if not whole.class_names]):
            found = f"no class folders in {bare[0].name}, only {len(bare[0])} files; expected {name}/CLASS/IMAGE"
            raise ValueError(f"{found}. Without classes it can be a stream without labels or shots alone")
        cut = [_cut(wholes[each.split], each, split_seed) for each in slices]
        domain = join(cut) if len(cut) > 1 else cut[0]
        domain = _draw_shots(domain, shots, seed) if shots else domain
        domains.append(dataclasses.replace(domain, domain_names=(name,)))
    loaded = join_domains(domains) if len(domains) > 1 else domains[0]
    name = f"{' + '.join(names)} {split}"
    return dataclasses.replace(loaded, name=name + (f", {shots} shots" if shots else ""))


def _check_asked(names: Sequence[str], task: str, shots: int, seed: int, split_seed: int) -> None:
    if task not in KINDS:
        raise ValueError(f"there is no task {task!r}{nearest(task, KINDS)}; known: {', '.join(KINDS)}")
    if not names:
        raise ValueError("no source is given; expected one, or one for each domain")
    if min(shots, seed, split_seed) < 0:
        raise ValueError(f"{shots=}, {seed=}, {split_seed=}: none may be negative")
    if shots and KINDS[task] != "classes":
        raise ValueError(f"shots={shots}: shots are examples of a class, and the task {task!r} has none; use a slice")


def check_on_error(on_error: str) -> None:
    if on_error not in ("fail", "skip"):
        raise ValueError(f"on_error must be 'fail' or 'skip', found {on_error!r}")


def list_split(
    source: str,
    split: str,
    data_dir: str | None = None,
    *,
    task: str = "classification",
    labels: Sequence[str] = (),
    text: Sequence[str] = (),
    image: str = "",
    columns: Sequence[str] = (),
    group: str = "",
    form: Form | None = decode.RGB,
) -> Source:
    """A whole split of a source as it lies there, without a look at the images; raises as `load` does.

    form: None leaves arrays as they are.
    """
    if not re.fullmatch(r"\w+", split):
        raise ValueError(f"expected the name of a split such as train, found {split!r}; slices are cut when loaded")
    kind, _, argument = source.partition(":")
    if kind == "corrupt":
        clean = functools.partial(list_split, split=split, data_dir=data_dir, task=task, labels=labels, group=group)
        return in_form(load_corrupted(argument, clean), form or decode.RGB)
    if source not in BUILTIN and (kind not in (*PLAIN, *COLUMNS, "arrays", "tfds") or not argument):
        known = (*BUILTIN, DIABETES, *FORMS)
        raise ValueError(f"unknown source {source!r}{nearest(source, known)}. Sources: {', '.join(known)}")
    if labels and kind not in (*COLUMNS, "tfds"):
        known = ", ".join(f"{name}:" for name in (*COLUMNS, "tfds"))
        raise ValueError(f"data.labels={tuple(labels)} names columns of sources {known}; {source} has none")
    read = {"text": tuple(text), "image": image, "columns": tuple(columns)}
    for option, value in read.items():
        if value and option not in READ.get(kind, ()):
            whose = " and ".join(f"{name}:" for name, options in READ.items() if option in options)
            raise ValueError(f"data.{option}={value!r} names columns of {whose} sources; {source} has none")
    if source == DIABETES:
        found = builtin.load_diabetes(split, task, labels, group)
    elif kind in COLUMNS:
        found = COLUMNS[kind](argument, split, task, labels, group, **{name: read[name] for name in READ.get(kind, ())})
    elif kind == "arrays":
        found = load_arrays(argument, split, group)
    elif kind == "tfds":
        found = load_tfds(argument, split, data_dir, task, labels, group, text)
    else:
        found = BUILTIN[source](split) if source in BUILTIN else PLAIN[kind](argument, split)
    if len(found) == 0:
        raise ValueError(f"{found.name} holds no examples")
    found = without_labels(found) if KINDS[task] == "tokens" and found.input == "text" else found
    check_fit(found, task)
    found = in_form(found, form) if form else found
    return groups.by_pattern(found, group) if group and found.groups is None else found


def in_form(source: Source, form: Form) -> Source:
    """The source with images that are read in a form; what is decoded already must have it."""
    if isinstance(source.inputs, Several) and "image" in source.kinds:
        own = in_form(source.of_kind("image"), form)
        return dataclasses.replace(
            source, form=form, inputs=source.inputs._replace(parts={**source.inputs.parts, "image": own.inputs})
        )
    if source.input != "image":
        return source
    inputs, clean = source.inputs, clean_images(source.inputs)
    if isinstance(inputs, CorruptedImages) and not decode.is_photo(form):
        raise ValueError(f"{source.name}: corruptions are defined for 8-bit grey and RGB, found {form}")
    try:
        if isinstance(clean, PackedImages):
            decode.check(decode.Header(1, 1, *clean.form, encoded=False), form)
        elif isinstance(clean, np.ndarray):
            decode.header_of(clean[0], form)
    except decode.WrongForm as error:
        raise ValueError(f"images of {source.name} are not {form}: {error}; {FORM_FIX}") from None
    if not isinstance(inputs, np.ndarray) or inputs.shape[-1] == form.channels:
        return dataclasses.replace(source, form=form)
    inputs = decode.in_channels(inputs, form.channels)
    return dataclasses.replace(source, form=form, inputs=inputs, sizes=np.full(len(source), inputs[0].nbytes, np.int64))


class Slice(NamedTuple):
    """One term of a split string: the name of a split and the texts of the bounds ("", "80%", "200")."""

    split: str
    start: str
    stop: str


def parse_split(split: str) -> list[Slice]:
    """Parses `train`, `train[:80%]`, `train[100:200]`, or several of these joined by `+`; raises ValueError."""
    bound = r"(\d+(?:\.\d+)?%|\d+)?"
    matches = [re.fullmatch(rf"\s*(\w+)(?:\[{bound}:{bound}\])?\s*", term) for term in split.split("+")]
    if not all(matches):
        raise ValueError(f"cannot read split {split!r}; write train, train[:80%], train[100:200] or train[:80%]+val")
    return [Slice(*match.groups("")) for match in matches]


def stratified_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """A random permutation [N] of which every prefix holds the classes in nearly their overall proportions.

    The k-th of a class's n members, shuffled, is placed at (k + 1/2) / n of the way; ties are broken at random.
    """
    rng = _slice_generator(seed)
    shuffled = rng.permutation(len(labels))
    place = np.empty(len(labels))
    for c in np.unique(labels):
        members = shuffled[labels[shuffled] == c]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.lexsort((rng.random(len(labels)), place))


def _cut(source: Source, cut: Slice, split_seed: int) -> Source:
    """The examples of a slice, in the source's own order."""
    if not (cut.start or cut.stop):
        return source
    n = len(source)
    order, ends = _permutation(source, split_seed)

    def position(bound: str, default: int) -> int:
        place = default if not bound else round(n * float(bound[:-1]) / 100) if bound[-1] == "%" else int(bound)
        return int(ends[np.abs(ends - place).argmin()]) if place <= n else place

    start, stop = position(cut.start, 0), position(cut.stop, n)
    if not 0 <= start < stop <= n:
        whole = f" in {len(ends) - 1} groups, which are not cut" if source.groups is not None else ""
        raise ValueError(f"slice [{cut.start}:{cut.stop}] of {source.name} is empty or beyond its {n} examples{whole}")
    return source.select(np.sort(order[start:stop]))


def _permutation(source: Source, split_seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The order [N] that slices cut, and where they may: between any two examples, or any two groups."""
    member = groups.numbered(source.groups, len(source))
    if source.label_kind == "classes" and not source.sealed:
        grouped = source.labels if source.groups is None else groups.majority(source.labels, member)
        chosen = stratified_order(grouped, split_seed)
    else:
        chosen = _slice_generator(split_seed).permutation(member.max() + 1)
    order = np.argsort(np.argsort(chosen)[member], kind="stable")
    return order, np.concatenate([[0], np.bincount(member)[chosen].cumsum()])


def _slice_generator(seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, 0x73706C69])  # a stream of its own, apart from that of the shots


def _draw_shots(source: Source, shots: int, seed: int) -> Source:
    """`shots` examples of every class; each class draws from its own stream, so k shots are the first k of more."""
    if source.sealed:
        raise ValueError(f"{shots} shots of {source.name}: its labels are sealed, as a stream has none; take a slice")
    members = [np.flatnonzero(source.labels == c) for c in range(len(source.class_names))]
    few = [f"{name}: {len(m)}" for name, m in zip(source.class_names, members, strict=True) if len(m) < shots]
    refuse(f"{shots} shots of {source.name}; {len(few)} classes have fewer examples", few)
    chosen = [np.random.default_rng([seed, c]).permutation(m)[:shots] for c, m in enumerate(members)]
    return source.select(np.sort(np.concatenate(chosen)))


def _load_whole(name: str, split: str, on_error: str, poison: str | None, asked: Mapping[str, Any]) -> Source:
    """poison: of the labels, which are sealed; None: they are not. asked: the arguments of `list_split`."""
    form, source = asked["form"], list_split(name, split, **asked)
    fully = on_error == "skip"
    if poison is not None:
        source = dataclasses.replace(source, labels=SealedLabels(source.labels, poison))
    # Packed images have hashes. The files of tfds have checksums, and a second pass over large records is dear.
    images = clean_images(source.inputs)
    if name in BUILTIN or isinstance(images, PackedImages if fully else (PackedImages, TfdsImages)):
        return source
    bad = find_unreadable(dataclasses.replace(source, inputs=images), fully=fully)
    if bad and fully:
        return without(source, bad)
    what = f"{len(bad)} of {len(source)} files of {source.name} are not images that can be read"
    other = f" as {form}; {FORM_FIX}" if any(" expected " in text for text in bad.values()) else ""
    refuse(f"{what}{other}; repair or remove them, or set on_error='skip' to leave them out", bad.values())
    return source


def without(source: Source, bad: Mapping[int, str]) -> Source:
    """The source without bad images, {index: reason}; raises ValueError where none is left, or none of a class."""
    kept, reasons = source.select(np.setdiff1d(np.arange(len(source)), list(bad))), tuple(bad.values())
    refuse(f"no readable image is left of {source.name}", () if len(kept) else reasons)
    whole = source.label_kind == "classes" and not source.sealed
    gone = np.setdiff1d(source.labels, kept.labels) if whole else ()
    names = [source.class_names[c] for c in gone]
    refuse(f"no readable image is left of {len(gone)} classes of {source.name}", names)
    log.warning("%s: skipped %d of %d unreadable images:\n%s", source.name, len(bad), len(source), listed(reasons))
    return dataclasses.replace(kept, skipped=reasons)
