"""What comparing new examples with a reference costs: all tests together, each by itself, and a look of the monitor.

python benchmarks/drift.py [--examples 1000] [--features 512] [--classes 10]

Random outputs and features, equally many of both sides; 999 permutations. The first round, which imports scikit-learn's
and scipy's parts, is not timed.
"""

import common
from absl import app, flags

EXAMPLES = flags.DEFINE_integer("examples", 1000, "Of the reference, and as many new ones.")
FEATURES = flags.DEFINE_integer("features", 512, "Numbers that describe one example.")
CLASSES = flags.DEFINE_integer("classes", 10, "Outputs of one example.")
WINDOW = 200  # of the monitor


def main(_):
    folder = common.start("drift")
    import numpy as np

    from tl_jax import tasks
    from tl_jax.serving import drift, drift_monitor

    rng, n = np.random.default_rng(0), EXAMPLES.value
    spec = tasks.Spec(class_names=tuple(map(str, range(CLASSES.value))))

    def sample():
        logits, labels = rng.normal(size=(n, CLASSES.value)), rng.integers(CLASSES.value, size=n)
        features = rng.normal(size=(n, FEATURES.value))
        return tasks.make_predictions({"logits": logits}, labels, np.arange(n), spec, features)

    reference, new = sample(), sample()
    z, own = np.concatenate([reference.features, new.features]), np.zeros((2 * n, 1 + drift.PERMUTATIONS), np.float32)
    own[:n] = 1
    own[:, 1:] = rng.permuted(own[:, 1:].T, axis=1).T
    watch = drift_monitor.Monitor(reference, WINDOW, every=1)
    for pair in zip(new.values[:WINDOW], new.features[:WINDOW], strict=True):
        watch.add(*pair)
    ways = {
        "all": lambda: drift.compare(reference, new)["verdict"],
        "kernel test": lambda: drift.mmd(z, own).p,
        "classifier": lambda: drift.classifier(z, own, rng).p,
        "outputs": lambda: drift.marginals(*(drift.readable(spec, x.values) for x in (reference, new)))[0],
        "shares": lambda: drift.label_shift(reference, new, rng)[0]["share"],
        f"a look at {WINDOW} requests": lambda: watch.add(new.values[0], new.features[0]),
    }
    seconds = common.take_turns(ways, common.ROUNDS.value)
    rows = [{"way": name, **common.summary(times)} for name, times in seconds.items()]
    title = f"drift of {n} examples with {FEATURES.value} features and {CLASSES.value} outputs, seconds"
    common.report(folder, rows, title=title, bars=("way", "median", "seconds"))


if __name__ == "__main__":
    app.run(main)
