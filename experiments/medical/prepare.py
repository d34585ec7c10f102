"""Makes the photos of blood smears square, in three ways, and the table of what is asked of them:

python experiments/medical/prepare.py ../shared/data/bccd_320 FOLDER

FOLDER/WAY/labels.csv has the columns file, split (as published), red_cells (a count) and platelets (absent or present).
A photo of val that shows what one of train shows is left out.
"""

import csv
import pathlib
import sys

from PIL import Image, ImageOps

SIZE = (256, 256)
TWICE = "BloodImage_00037"  # the field of 00038, in another focus
WAYS = {  # of making 320 x 240 pixels square
    "crop": lambda image: ImageOps.fit(image, SIZE, Image.Resampling.BICUBIC),  # without a quarter of the photo
    "squeeze": lambda image: image.resize(SIZE, Image.Resampling.BICUBIC),  # cells become narrow
    "pad": lambda image: ImageOps.pad(image, SIZE, Image.Resampling.BICUBIC),  # black bars above and below
}


def main(source: pathlib.Path, folder: pathlib.Path) -> None:
    with (source / "labels.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if pathlib.Path(row["file"]).stem != TWICE]
    for way, make in WAYS.items():
        (folder / way / "images").mkdir(parents=True, exist_ok=True)
        with (folder / way / "labels.csv").open("w", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(("file", "split", "red_cells", "platelets"))
            for row in rows:
                name = f"images/{pathlib.Path(row['file']).stem}.png"
                with Image.open(source / row["file"]) as image:
                    make(image.convert("RGB")).save(folder / way / name)
                present = "present" if int(row["platelets"]) else "absent"
                table.writerow((name, row["split"], row["red_cells"], present))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python experiments/medical/prepare.py BCCD FOLDER")
    main(*map(pathlib.Path, sys.argv[1:]))
