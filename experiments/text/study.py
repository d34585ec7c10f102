"""How are texts classified best from 16, 64, 256 or all examples: by a pretrained encoder, by word vectors, by counts?

data=sst2 (sentiment of a sentence), trec (what a question asks for), hotel (Chinese reviews, by characters) or stsb
(how alike two sentences are). Every arm of a column takes the same number of steps.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from configs import transfer
from tl_jax.studies.study import Study

SHOTS = {"sst2": (8, 32, 128, 0), "hotel": (8, 32, 128, 0), "trec": (8, 32, 0), "stsb": (0,)}  # of each class; 0: all
STEPS = {8: (60.0, "steps"), 32: (120.0, "steps"), 128: (240.0, "steps"), 0: (2.0, "epochs")}
CACHED = {"cache": "features"}
# Rates were chosen on val of SST-2 at 128 shots with seed 9, see README.md.
TRAINED = {
    "logistic regression": {"method.name": "logistic", "method.grid": (1.0,), **CACHED},
    "last 2 blocks": {"method.name": "last_k", "method.k": 2, "lr": 1e-4, **CACHED},
    "LoRA": {"method.name": "linear_probe", "method.add": (("lora", {"rank": 8}),), "lr": 1e-3},
    "all": {"method.name": "full", "lr": 1e-4},
}
WORDS = {"averaged": "word_average_50d", "TextCNN": "textcnn_50d", "LSTM": "lstm_256_50d", "GRU": "gru_256_50d"}
CHARACTERS = {"averaged": "word_average_128d", "TextCNN": "textcnn_128d", "GRU": "bigru_128_128d"}
FREE = {"method.name": "full", "lr": 3e-3}
RATES = {"LSTM": {"lr": 1e-3}}  # where it is another
PAIRS = {"model.head": (("cosine", {}),)}


def networks(data: str, weights: str) -> dict[str, dict]:
    minilm = {"model.name": "minilm_l6", "model.weights": f"{weights}/all_minilm_l6_v2/model.safetensors"}
    if data == "stsb":
        return {f"MiniLM, {way}": {**minilm, **PAIRS, **TRAINED[way]} for way in ("last 2 blocks", "LoRA", "all")}
    if data == "hotel":
        own = {"model.tokenizer": "chars", "model.max_length": 256, **FREE}
        return {f"characters, {title}": {"model.name": name, **own} for title, name in CHARACTERS.items()}
    glove = {"model.vectors": f"{weights}/glove_6b_50d/glove.6B.50d.first20000.txt", **FREE}
    arms = {f"MiniLM, {way}": {**minilm, **options} for way, options in TRAINED.items()}
    words = {title: {"model.name": name, **glove, **RATES.get(title, {})} for title, name in WORDS.items()}
    return arms | {f"GloVe, {title}": options for title, options in words.items()}


def get_study(arg: str = "") -> Study:
    """The argument is root=FOLDER of prepare.py, weights=FOLDER, data=NAME, shots=8;32, and further options."""
    given = dict(item.partition("=")[::2] for item in arg.split(",") if item)
    root, weights = given.pop("root", "texts"), given.pop("weights", "../shared/weights")
    data = given.pop("data", "sst2")
    if data not in SHOTS:
        raise ValueError(f"data={data!r}: expected {' or '.join(SHOTS)}")
    shots = [int(n) for n in given.pop("shots", ";".join(map(str, SHOTS[data]))).split(";")]
    base = transfer.get_config(f"data=text:{root}/{data}")
    with base.unlocked():
        base.data.train, base.data.val, base.data.test = "train", "", "test"
        if data == "stsb":
            base.task, base.data.labels = "regression", ("score",)
        base.data.sampling = "by_length"
        base.schedule.name, base.schedule.warmup = "linear", (20.0, "steps")
        base.select = "last"
    return Study(
        base=transfer.parse(base, ",".join(f"{key}={value}" for key, value in given.items())),
        factors={
            "network": networks(data, weights),
            "shots": {
                str(n or "all"): {"data.shots": n, "total": STEPS[n], "batch_size": 16 if n else 32} for n in shots
            },
        },
        baseline={"network": "MiniLM, all" if data != "hotel" else "characters, averaged"},
        seeds=(0, 1, 2),
        metrics=("spearman",) if data == "stsb" else ("accuracy",),
    )
