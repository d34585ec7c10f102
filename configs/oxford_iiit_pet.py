"""Oxford-IIIT Pet, 37 breeds: ResNet-50 with ImageNet weights, full fine-tuning.

python launch.py --config configs/oxford_iiit_pet.py:weights=resnet50.safetensors --workdir W
    needs the data set prepared once, see docs/data.md; ,model=NAME takes another network
"""

from configs import transfer


def get_config(arg: str = ""):
    config = transfer.get_config("model=resnet50,data=tfds:oxford_iiit_pet,method=full")
    with config.unlocked():
        config.data.train = "train[:90%]"
        config.data.val = "train[90%:]"
        config.data.test = "test"
        config.data.augment = (("random_resized_crop", {"scale": (0.35, 1.0)}), ("flip", {}))
        config.data.workers = 4
        config.batch_size = 32
        config.total = (20.0, "epochs")
        config.lr = 1e-3
        config.weight_decay = 0.05
        config.groups = {"head": {"lr_mult": 10.0}}
        config.schedule.warmup = (1.0, "epochs")
        config.select = "best_val"
    return transfer.parse(config, arg)
