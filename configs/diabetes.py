"""Regression on a table: disease progression of 442 patients from ten columns, by a small multi-layer perceptron.

python launch.py --config configs/diabetes.py
"""

from configs import transfer


def get_config(arg: str = ""):
    config = transfer.get_config("model=mlp_small,data=table:diabetes,method=full")
    with config.unlocked():
        config.task, config.data.test = "regression", "test"
        config.model.head_init, config.model.dropout = "lecun", 0.2
        config.batch_size, config.total, config.lr, config.weight_decay = 32, (40.0, "epochs"), 3e-3, 0.1
        config.log_every, config.eval_every = (2.0, "epochs"), (2.0, "epochs")
        config.select, config.patience = "best_val", 8
    return transfer.parse(config, arg)
