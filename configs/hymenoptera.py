"""Ants against bees, 244 photos: DeiT-tiny, linear probe, 5 epochs. Measured: experiments/hymenoptera.

python launch.py --config configs/hymenoptera.py:weights=deit_tiny_patch16_224.safetensors,data=folder:hymenoptera
    --workdir W    (add ,method=last_k --config.method.k=4 to train the last four blocks too)
"""

from configs import transfer


def get_config(arg: str = ""):
    config = transfer.get_config("model=deit_tiny_patch16_224,method=linear_probe")
    with config.unlocked():
        config.data.train = "train"
        config.data.val = "val"
        config.data.augment = (("random_resized_crop", {"scale": (0.35, 1.0)}), ("flip", {}))
        config.batch_size = 32
        config.total = (5.0, "epochs")
        config.lr = 1e-5
        config.groups = {"head": {"lr_mult": 300.0}}
        config.schedule.warmup = (0.5, "epochs")
    return transfer.parse(config, arg)
