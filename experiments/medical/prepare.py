"""Writes the table of what is asked of the photos of blood smears:

python experiments/medical/prepare.py ../shared/data/bccd_320 FOLDER

FOLDER/labels.csv has the columns file (relative to FOLDER), split (as published), red_cells (a count) and platelets
(absent or present). A photo of val that shows what one of train shows is left out.
"""

import csv
import os
import pathlib
import sys

TWICE = "BloodImage_00037"  # the field of 00038, in another focus


def main(source: pathlib.Path, folder: pathlib.Path) -> None:
    with (source / "labels.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if pathlib.Path(row["file"]).stem != TWICE]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("file", "split", "red_cells", "platelets"))
        for row in rows:
            present = "present" if int(row["platelets"]) else "absent"
            path = os.path.relpath(source / row["file"], folder)
            table.writerow((path, row["split"], row["red_cells"], present))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python experiments/medical/prepare.py BCCD FOLDER")
    main(*map(pathlib.Path, sys.argv[1:]))
