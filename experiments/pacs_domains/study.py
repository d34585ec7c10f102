"""Photos with labels: which method reads paintings, cartoons or sketches best, that have none or were never seen?

DeiT-tiny with ImageNet weights on PACS (Li et al. 2017), its last block and head trained. target=NAME: adaptation from
photos to the domain NAME, all of which is trained on without labels, chosen on and scored (transductive).
held_out=NAME: generalisation from the other three domains. All blocks but the last are computed once.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from configs import transfer
from tl_jax.studies.study import Study

DOMAINS = ("photo", "art_painting", "cartoon", "sketch")
STEPS = 100
EACH = 28  # images of each domain in a batch, four a class in the mean
ALONE = {  # the last block alone
    "method.name": "rules",
    "method.k": 0,
    "method.rules": (("head/.*", "frozen"), ("backbone/(block11|norm)/.*", "backbone"), (".*", "frozen")),
}
ADAPTATION = {
    "source only": {"streams": {}},
    "dann": {"terms": {"dann": {"width": 256}}},
    "cdan": {"terms": {"cdan": {"width": 256}}},
    "mmd": {"terms": {"mmd": {}}},
    "coral": {"terms": {"coral": {}}},
    "jan": {"terms": {"jan": {}}},
    "mcc": {"terms": {"mcc": {}}},
    "bnm": {"terms": {"bnm": {}}},
    "infomax": {"terms": {"infomax": {}}},
    "shot": {  # half of the steps on the source, then without it and with a head that rests
        "phases": (
            (("total", (STEPS / 2, "steps")),),
            (("total", (STEPS / 2, "steps")), ("terms", {"task": {"weight": 0.0}, "shot": {"target": "target"}}),
             *ALONE.items(), ("restart", True)),
        )
    },
}  # fmt: skip


def later(value: float, first: float = 1.0) -> tuple:
    """A weight that is `first` in the first tenth of the steps, as in DomainBed in 500 of 5,000."""
    return "step", {"first": first, "value": value, "at": 0.1}


# method.mix_domains mixes inputs, of which the cache has none.
GENERALISATION = {
    "erm": {},
    "irm": {"terms": {"irm": {"weight": later(100.0)}}},
    "vrex": {"terms": {"vrex": {"weight": later(10.0)}}},
    "groupdro": {"terms": {"groupdro": {}}},
    "coral_domains": {"terms": {"coral_domains": {}}},
    "mmd_domains": {"terms": {"mmd_domains": {}}},
    "mixstyle": {"method.add": (("mixstyle", {"after": ("block10",)}),)},
    "fishr": {"terms": {"fishr": {"weight": later(1000.0, 0.0)}}},
}


def get_study(arg: str = "") -> Study:
    """The argument is root=FOLDER of domains, weights=FILE, target=NAME (sketch) or held_out=NAME, and options."""
    given = dict(item.partition("=")[::2] for item in arg.split(",") if item)
    root, weights = given.pop("root", "pacs"), given.pop("weights", "deit_tiny_patch16_224.safetensors")
    held_out = given.pop("held_out", "")
    target = given.pop("target", "" if held_out else "sketch")
    unseen = target or held_out
    if unseen not in DOMAINS or bool(target) == bool(held_out):
        raise ValueError(f"target={target!r}, held_out={held_out!r}: expected one of them, of {', '.join(DOMAINS)}")
    sources = ("photo",) if target else tuple(name for name in DOMAINS if name != held_out)
    folders = tuple(f"folder:{root}/{name}" for name in sources)
    base = transfer.get_config(f"model=deit_tiny_patch16_224,weights={weights},method=last_k,method.k=1")
    with base.unlocked():
        base.model.image_size = 128
        base.cache = "features"
        base.data.source = folders[0] if target else folders
        base.data.candidates = ("target_val", f"folder:{root}/{unseen}", "train")
        base.data.extra_eval = (("target_test", f"folder:{root}/{unseen}", "train"),)
        base.data.transductive = True
        if target:
            base.streams.target = {"source": f"folder:{root}/{unseen}", "split": "train"}
        base.batch_size = EACH * len(sources)
        base.lr, base.groups.backbone = 1e-3, {"lr_mult": 0.1}
        base.total, base.log_every, base.eval_every = (float(STEPS), "steps"), (20.0, "steps"), (50.0, "steps")
    return Study(
        base=transfer.parse(base, ",".join(f"{key}={value}" for key, value in given.items())),
        factors={"method": ADAPTATION if target else GENERALISATION},
        baseline={"method": "source only" if target else "erm"},
        seeds=(0, 1, 2),
        metrics=("target_test/accuracy", "accuracy"),
        together="all",
    )
