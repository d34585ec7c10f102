"""Prepared data sets of tensorflow-datasets, tfds:NAME, read without TensorFlow: images with classes, or texts."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tl_jax.core.checks import refuse
from tl_jax.core.messages import nearest
from tl_jax.data.examples import Source, check_split
from tl_jax.data.labels import Table
from tl_jax.data.readers.arrays import array_source
from tl_jax.data.readers.texts import text_columns, text_source


class TfdsImages(NamedTuple):
    """Images of a tfds data source, encoded as they are stored."""

    records: Any
    key: str
    indices: np.ndarray

    def __getitem__(self, index: int) -> np.ndarray | bytes:
        return self.records[int(self.indices[index])][self.key]

    def select(self, indices: np.ndarray) -> "TfdsImages":
        return self._replace(indices=self.indices[indices])

    def head(self, index: int) -> bytes:
        return b""  # a prepared data set has a version; reading every record again would say no more


def load_tfds(
    name: str, split: str, data_dir: str | None, task: str, labels: Sequence[str], group: str, text: Sequence[str]
) -> Source:
    """One split of a prepared data set; every record is read once.

    It is read as texts where `text` names features, or where it has features of text and none of an image; its scalar
    features are then the columns of `texts.text_source`. Raises ValueError, FileNotFoundError.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)  # the others are looked up on the network
        raise ValueError(f"tfds knows no data set {name!r}{nearest(name.partition(':')[0], known)}") from None
    splits = {{"validation": "val"}.get(known, known): known for known in builder.info.splits}
    if splits:  # what is not prepared knows no splits; as_data_source will say so
        check_split(f"tfds:{name}", split, splits)
    features = builder.info.features
    images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
    texts = [key for key, feature in features.items() if isinstance(feature, tfds.features.Text)]
    if text or (texts and not images):
        records = _records(builder, name, split, splits)
        table = _table(tfds, f"tfds:{name}", split, features, records, text)
        grouped = group if group in table.columns else ""  # else an expression for the ids
        return text_source(f"tfds:{name} {split}", table, "train", task, labels, grouped, text)
    if labels:
        raise ValueError(f"data.labels={tuple(labels)} names columns, and tfds:{name} is read as images; "
                         "name its texts by data.text, or leave it out")  # fmt: skip
    image, label = _image_keys(tfds, name, builder.info, images)
    records = _records(builder, name, split, splits)
    records.decoders = {image: tfds.decode.SkipDecoding()}  # decoded like every other source's images, by decode.py
    values, sizes = np.empty(len(records), np.int32), np.empty(len(records), np.int64)
    for i in range(len(records)):
        record = records[i]
        values[i], sizes[i] = record[label], getattr(record[image], "nbytes", None) or len(record[image])
    inputs, names = TfdsImages(records, image, np.arange(len(values))), tuple(features[label].names)
    return array_source(f"tfds:{name}", split, inputs, values, names, sizes)


def _records(builder: Any, name: str, split: str, splits: dict[str, str]) -> Any:
    """The data source of a split; FileNotFoundError where it is not prepared, or in a format without random access."""
    try:
        return builder.as_data_source(split=splits.get(split, split))
    except (AssertionError, NotImplementedError) as error:
        how = (
            f"prepared as {builder.info.file_format.value}, which TensorFlow alone reads," if splits else "not prepared"
        )
        call = f"tfds.builder('{name}', data_dir='FOLDER', file_format='array_record').download_and_prepare()"
        fix = f"Prepare it once by {call}, where tensorflow is installed if the set is a published one (docs/data.md)"
        told = f"tfds:{name} is {how} at {builder.data_path}. {fix}; then data.data_dir='FOLDER' reads it without"
        raise FileNotFoundError(told) from error


def _image_keys(tfds: Any, name: str, info: Any, images: list[str]) -> tuple[str, str]:
    """The names of the image and of the label feature: the supervised pair, or the only ones of their kind."""
    labels = [key for key, feature in info.features.items() if isinstance(feature, tfds.features.ClassLabel)]
    if info.supervised_keys and info.supervised_keys[-1] in labels:
        return info.supervised_keys[0], info.supervised_keys[-1]
    if len(images) != 1 or len(labels) != 1:
        found = f"images {images}, class labels {labels}"
        raise ValueError(f"tfds:{name} is no classification of images: {found}, and it has no texts")
    return images[0], labels[0]


def _table(tfds: Any, where: str, split: str, features: Any, records: Any, text: Sequence[str]) -> Table:
    """The scalar features as columns of text; ValueError for texts that are not there, or not UTF-8.

    A class is its name, one that is not known (-1) is missing; a truth value is 0 or 1.
    """
    scalars = [
        key for key, each in sorted(features.items()) if isinstance(each, tfds.features.Tensor) and each.shape == ()
    ]
    names = {key: features[key].names for key in scalars if isinstance(features[key], tfds.features.ClassLabel)}
    columns: dict[str, list[str]] = {key: [] for key in scalars if key.lower() != "split"}  # one split is read
    read, problems = text_columns(Table(where, dict(columns), np.array([])), text), []
    for i in range(len(records)):
        record = records[i]
        for key, cells in columns.items():
            value = record[key]
            if isinstance(value, bytes):
                cells.append(value.decode(errors="backslashreplace").strip())
                if key in read and (bad := _first_wrong(value)):
                    problems.append(f"{split}/{i}: {key} has {bad}")
            elif key in names:
                cells.append(names[key][value] if value >= 0 else "")
            else:
                cells.append(str(int(value) if isinstance(value, bool | np.bool_) else value))
    refuse(f"{where}: {len(problems)} texts are not UTF-8; prepare the data set with decoded texts", problems)
    rows = np.array([f"{split}/{i}" for i in range(len(records))])
    return Table(where, columns, rows, {key: tuple(each) for key, each in names.items()})


def _first_wrong(value: bytes) -> str:
    """The first byte that is not UTF-8, for a message; "" where there is none."""
    try:
        value.decode()
    except UnicodeDecodeError as error:
        return f"byte {value[error.start]:#x} at {error.start}"
    return ""
