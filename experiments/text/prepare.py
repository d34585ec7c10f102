"""Writes the tables of the four data sets of texts, one folder each:

python experiments/text/prepare.py ../shared/data/text FOLDER

FOLDER/sst2 (SST-2: label, text), trec (TREC-6: label, text), hotel (Chinese hotel reviews: label, text) and stsb
(STS-B: score, sentence1, sentence2) have train.tsv, test.tsv and, of SST-2 and STS-B, which publish one, dev.tsv.
What is scored is not trained on: train loses the texts that another split has too. Every fifth hotel review is of
test; one that is there twice is taken once.
"""

import csv
import pathlib
import sys

NAMES = {
    "sst2": ("negative", "positive"),
    "trec": ("description", "entity", "abbreviation", "human", "number", "location"),
    "hotel": ("negative", "positive"),
}


def lines(path: pathlib.Path) -> list[str]:
    """Those of a file; TREC's have letters of Latin-1."""
    data = path.read_bytes()
    text = data.decode("latin-1" if path.name.startswith("TREC") else "utf-8")
    return text.rstrip("\n").split("\n")


def labelled(path: pathlib.Path, names: tuple[str, ...]) -> list[tuple[str, str]]:
    """Lines of a class number, a space and a text."""
    return [(names[int(line[0])], line[2:].strip()) for line in lines(path)]


def hotel(path: pathlib.Path) -> list[tuple[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = {" ".join(row["review"].split()): row["label"] for row in csv.DictReader(file)}
    return [(NAMES["hotel"][int(label)], text) for text, label in rows.items() if text]


def write(folder: pathlib.Path, header: tuple[str, ...], splits: dict[str, list[tuple[str, ...]]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    scored = {row[1:] for split, rows in splits.items() if split != "train" for row in rows}
    for split, rows in splits.items():
        kept = [row for row in rows if split != "train" or row[1:] not in scored]
        text = "".join("\t".join(row) + "\n" for row in (header, *kept))
        (folder / f"{split}.tsv").write_text(text, encoding="utf-8")
        print(f"{folder.name}/{split}.tsv: {len(kept)} of {len(rows)} texts")


def main(source: pathlib.Path, folder: pathlib.Path) -> None:
    sst2 = {split: labelled(source / f"stsa.binary.{split}", NAMES["sst2"]) for split in ("train", "dev", "test")}
    write(folder / "sst2", ("label", "text"), sst2)
    trec = {split: labelled(source / f"TREC.{split}.all", NAMES["trec"]) for split in ("train", "test")}
    write(folder / "trec", ("label", "text"), trec)
    rows = hotel(source / "chnsenticorp_hotel.csv")
    own = {"train": [row for i, row in enumerate(rows) if i % 5], "test": rows[::5]}
    write(folder / "hotel", ("label", "text"), own)
    pairs = {split: [line.split("\t")[4:7] for line in lines(source / f"stsb-{split}.tsv")]
             for split in ("train", "dev", "test")}  # fmt: skip
    write(folder / "stsb", ("score", "sentence1", "sentence2"), {k: list(map(tuple, v)) for k, v in pairs.items()})


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python experiments/text/prepare.py TEXTS FOLDER")
    main(*map(pathlib.Path, sys.argv[1:]))
