"""Makes what the study lacks: CIFAR-10 as pixels, and the table of the blood smears.

python experiments/which_source/prepare.py MATERIAL FOLDER

MATERIAL has data/cifar10_jpeg and data/bccd_320; FOLDER gets cifar10.npz and labels.csv.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from experiments.distil_cifar import prepare as cifar
from experiments.medical import prepare as smears

if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python experiments/which_source/prepare.py MATERIAL FOLDER")
    material, folder = map(pathlib.Path, sys.argv[1:])
    smears.main(material / "data/bccd_320", folder)
    cifar.decode(material / "data/cifar10_jpeg", folder / "cifar10.npz")
