"""Word vectors to a task of texts: which part of scikit-learn does a docstring describe, from 5 examples of each.

python launch.py --config configs/quickstart_text.py

The embedded vectors stay as they are and a new head is trained on the mean of those of a text. The baseline is the same
network trained whole from random vectors, on the same examples, with as many steps; of the rates 0.003 to 0.1 the same
suits both best.
"""

from configs import transfer


def get_config(arg: str = ""):
    config = transfer.get_config(
        "model=word_average_64d,weights=builtin:docstrings,data=docstrings,method=linear_probe"
    )
    with config.unlocked():
        config.data.train = "train[:50%]"
        config.data.val = ""
        config.data.test = "train[50%:]"
        config.data.shots = 5
        config.batch_size = 50
        config.total = (100.0, "steps")
        config.lr = 1e-2
        config.select = "last"
        config.log_every = (25.0, "steps")
        config.seeds = (1, 2, 3, 4)
        config.baseline = (
            ("model.weights", ""),
            ("model.tokenizer", "words"),
            ("method.name", "full"),
        )
    return transfer.parse(config, arg)
