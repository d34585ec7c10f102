"""A config taken apart, once: what each part of a run is told, typed."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tl_jax import config as options

Duration = tuple[float, str]
Pairs = tuple[tuple[str, Mapping[str, Any]], ...]


class ModelSettings(NamedTuple):
    """Options `model.*`."""

    name: str
    weights: str
    image_size: int
    keep_head: bool
    reinit: tuple[str, ...]
    head: Pairs
    head_init: str
    dtype: str
    prefix_dtype: str
    dropout: float
    drop_path: float
    remat: str
    attention: str


class DataSettings(NamedTuple):
    """Options `data.*`."""

    source: str | tuple[str, ...]
    train: str
    val: str
    test: str
    extra_eval: tuple[tuple[str, str, str], ...]
    resample: str
    shots: int
    split_seed: int
    labels: tuple[str, ...]
    sampling: str
    transductive: bool
    augment: Pairs
    on_error: str
    data_dir: str
    workers: int
    card: Mapping[str, Any]
    override_card: bool


class StreamSettings(NamedTuple):
    """One further stream, `streams.NAME`; what it does not give is as in the stream `train`."""

    source: str | tuple[str, ...]
    split: str
    batch_size: int
    augment: Pairs
    labelled: bool = False
    sampling: str = "shuffled"
    shots: int = 0


class NetworkSettings(NamedTuple):
    """One further network with weights of its own, `networks.NAME`; cache: its logits are computed once per example."""

    name: str
    weights: str = ""
    image_size: int = 0
    cache: str = ""


class MethodSettings(NamedTuple):
    """Options `method.*`."""

    name: str
    k: int
    blocks: tuple[str, ...]
    rules: tuple[tuple[str, str], ...]
    norm: tuple[tuple[str, str], ...]
    add: Pairs
    stoch_norm: float
    auto_rgn: bool
    grid: tuple[float, ...]
    label_smoothing: float
    mixup: float
    cutmix: float


class PhaseSettings(NamedTuple):
    """What holds for one phase. terms: {name: {"weight", arguments}}; schedule: name, arguments."""

    method: MethodSettings
    terms: Mapping[str, Mapping[str, Any]]
    total: Duration
    warmup: Duration
    schedule: str
    schedule_args: Mapping[str, Any]
    lr: float
    optimizer: str
    optimizer_args: Mapping[str, Any]
    weight_decay: float
    decay: str
    clip: float
    groups: Mapping[str, Mapping[str, Any]]
    layer_decay: float


class LoopSettings(NamedTuple):
    """Options of the whole run; durations as given."""

    seed: int
    batch_size: int
    eval_batch_size: int
    accumulate: int
    norm_batches: str
    cache: str
    views: int
    cache_dir: str
    ema: float
    log_every: Duration
    eval_every: Duration
    select: str
    patience: int
    min_delta: float
    resamples: int


class Settings(NamedTuple):
    """A whole run. table: every option, for config.json; identity: those that decide its numbers."""

    task: str
    task_args: Mapping[str, Any]
    model: ModelSettings
    data: DataSettings
    streams: Mapping[str, StreamSettings]
    networks: Mapping[str, NetworkSettings]
    phases: Sequence[PhaseSettings]
    loop: LoopSettings
    parallel: str
    fsdp: int
    table: Mapping[str, Any]
    identity: Mapping[str, Any]

    @property
    def phased(self) -> bool:
        """Whether the run has several phases."""
        return len(self.phases) > 1


def read(config: Any) -> Settings:
    """Takes a config apart; raises one ValueError for invalid values, before anything is loaded."""
    options.check(config)
    changed = [options.override(config, dict(phase)) for phase in config.phases] or [config]
    for phase in changed:
        options.check(phase)
    flat = _plain(config)
    batch = {"batch_size": flat["batch_size"], "augment": flat["data.augment"]}
    return Settings(
        task=flat["task"],
        task_args=flat["task_args"],
        model=_section(ModelSettings, flat, "model."),
        data=_section(DataSettings, flat, "data."),
        streams={name: StreamSettings(**{**batch, **given}) for name, given in flat["streams"].items()},
        networks={name: NetworkSettings(**given) for name, given in flat["networks"].items()},
        phases=[_phase(_plain(phase)) for phase in changed],
        loop=_section(LoopSettings, flat, ""),
        parallel=flat["parallel"],
        fsdp=flat["fsdp"],
        table=options.flatten(config),
        identity=options.identity(config),
    )


def _phase(flat: Mapping[str, Any]) -> PhaseSettings:
    named = {"warmup": "schedule.warmup", "schedule": "schedule.name", "schedule_args": "schedule.args"}
    values = {field: flat[named.get(field, field)] for field in PhaseSettings._fields if field != "method"}
    return PhaseSettings(method=_section(MethodSettings, flat, "method."), **values)


def _section(kind: Any, flat: Mapping[str, Any], prefix: str) -> Any:
    return kind(**{field: flat[prefix + field] for field in kind._fields})


def _plain(config: Any) -> dict[str, Any]:
    """`{dotted option: value}`, sequences as tuples."""
    return {key: _as_tuples(value) for key, value in options.flatten(config).items()}


def _as_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_tuples(inner) for key, inner in value.items()}
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value
