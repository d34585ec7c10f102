"""Published accuracies of the weights at hand."""

import csv

from tl_jax.studies.ledger import Claim

COMMAND = ("experiments/published_weights/run.py", "{material}", "{out}")
NEEDS = ("data/imagenet_sample_250", "data/cifar10_jpeg", "weights/deit_tiny_patch16_224", "weights/mobilenet_v2",
         "weights/cifar10_resnet")  # fmt: skip
IMAGENET = "data/imagenet_val"  # 50,000 images, which are not among the material
PHOTOS = "250 photos that look like training images: this proves the conversion, not the accuracy of the network"
JPEG = "the test images had been compressed as JPEG, which costs accuracy"


def of(network):
    """The accuracies of a network in percent, from accuracy.csv."""

    def measure(out):
        with (out / "accuracy.csv").open() as file:
            (row,) = (row for row in csv.DictReader(file) if row["network"] == network)
        return {k: tuple(100 * float(row[f"{k}{end}"]) for end in ("", "_low", "_high")) for k in ("top1", "top5")}

    return measure


def exactly(network):
    """The same without intervals: of the same images, where PyTorch and this code must agree."""

    def measure(out):
        return {k: (value,) * 3 for k, (value, _, _) in of(network)(out).items()}

    return measure


def on_imagenet(name, title, paper, top1):
    says = f"{title}: {top1} % of ImageNet's validation images."
    return Claim(f"{name}_imagenet", paper, says, {"top1": top1}, 0.1, "", COMMAND, (IMAGENET, *NEEDS), of(name))


CLAIMS = (
    Claim("deit_tiny_photos", "timm in PyTorch on the same photos", "DeiT-tiny: 80.0 and 94.4 % of 250 photos.",
          {"top1": 80.0, "top5": 94.4}, 0.001, PHOTOS, COMMAND, NEEDS, exactly("deit_tiny_patch16_224")),
    Claim("mobilenetv2_photos", "torchvision in PyTorch on the same photos", "MobileNetV2: 206 and 241 of 250 photos.",
          {"top1": 82.4, "top5": 96.4}, 0.001, PHOTOS, COMMAND, NEEDS, exactly("mobilenetv2_100")),
    Claim("resnet20_cifar", "the table of the repository of these weights (Idelbayev)",
          "ResNet-20: 91.78 % of CIFAR-10's test images.", {"top1": 91.78}, 0.1, JPEG, COMMAND, NEEDS, of("resnet20_cifar")),
    Claim("resnet32_cifar", "the table of the repository of these weights (Idelbayev)",
          "ResNet-32: 92.78 % of CIFAR-10's test images.", {"top1": 92.78}, 0.1, JPEG, COMMAND, NEEDS, of("resnet32_cifar")),
    on_imagenet("deit_tiny_patch16_224", "DeiT-tiny", "Touvron et al. 2021", 72.2),
    on_imagenet("mobilenetv2_100", "MobileNetV2", "torchvision, table of classification weights", 71.878),
)  # fmt: skip
