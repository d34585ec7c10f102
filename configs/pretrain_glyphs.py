"""Makes the embedded weights: a small ResNet from random weights on letters rendered from fonts, no digit among them.

python launch.py --config configs/pretrain_glyphs.py --workdir W
    then W/model.safetensors is what lies in tl_jax/assets/glyphs.safetensors
"""

from configs import transfer


def get_config(arg: str = ""):
    config = transfer.get_config("model=resnet8_cifar,data=glyphs,method=full")
    with config.unlocked():
        config.data.train = "train"
        config.data.val = "val"
        config.data.augment = (("translation", {"fraction": 0.1}), ("rotation", {"degrees": 10.0}))
        config.model.head_init = "lecun"
        config.model.image_size = 16  # twice the side of a digit: four times faster than the 32 of CIFAR
        config.data.card = {"licence": "Apache-2.0"}
        config.batch_size = 128
        config.eval_batch_size = 512
        config.total = (15.0, "epochs")
        config.lr = 3e-3
        config.weight_decay = 0.05
        config.schedule.warmup = (1.0, "epochs")
        config.log_every = (50.0, "steps")
    return transfer.parse(config, arg)
