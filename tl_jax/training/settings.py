"""A config taken apart, once: what each piece of a run is told. Fields and types are those of core/options.py."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tl_jax import config as options
from tl_jax.core import files
from tl_jax.core.options import OPTIONS, Option

Pairs = tuple[tuple[str, Mapping[str, Any]], ...]


def _fields(chosen: Mapping[str, Option], prefix: str = "") -> list[tuple[str, type]]:
    return [(name.removeprefix(prefix).replace(".", "_"), type(option.initial)) for name, option in chosen.items()]


def _section(prefix: str) -> dict[str, Option]:
    return {name: option for name, option in OPTIONS.items() if name.startswith(prefix)}


RUN = {name: option for name, option in OPTIONS.items() if "." not in name and not option.phase}
PHASE = {name: option for name, option in OPTIONS.items() if option.phase and not name.startswith("method.")}

ModelSettings = NamedTuple("ModelSettings", _fields(_section("model."), "model."))  # options model.*
DataSettings = NamedTuple("DataSettings", _fields(_section("data."), "data."))  # options data.*
MethodSettings = NamedTuple("MethodSettings", _fields(_section("method."), "method."))  # options method.*
LoopSettings = NamedTuple("LoopSettings", _fields(RUN))  # options without a section that no phase changes
# Options that a phase may change; schedule.name is schedule_name.
PhaseSettings = NamedTuple("PhaseSettings", [("method", MethodSettings), *_fields(PHASE)])


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
    """One further network, `networks.NAME`; cache "features": its logits are computed once per example and view."""

    name: str
    weights: str = ""
    image_size: int = 0
    cache: str = ""
    sha256: str = ""  # that the file must have; "": any


class Settings(NamedTuple):
    """A whole run. table: every option, for config.json; identity: those that decide its numbers."""

    model: ModelSettings
    data: DataSettings
    loop: LoopSettings
    streams: Mapping[str, StreamSettings]
    networks: Mapping[str, NetworkSettings]
    phases: Sequence[PhaseSettings]
    table: Mapping[str, Any]
    identity: Mapping[str, Any]


def read(config: Any) -> Settings:
    """Takes a config apart; raises one ValueError for invalid values, before anything is loaded."""
    options.check(config)
    changed = [options.override(config, dict(phase)) for phase in config.phases] or [config]
    for phase in changed:
        options.check(phase)
    flat = _plain(config)
    batch = {"batch_size": flat["batch_size"], "augment": flat["data.augment"]}
    return Settings(
        model=_pick(ModelSettings, flat, _section("model.")),
        data=_pick(DataSettings, flat, _section("data.")),
        loop=_pick(LoopSettings, flat, RUN),
        streams={name: StreamSettings(**{**batch, **given}) for name, given in flat["streams"].items()},
        networks={name: NetworkSettings(**given) for name, given in flat["networks"].items()},
        phases=[_phase(_plain(phase)) for phase in changed],
        table=options.flatten(config),
        identity=options.identity(config),
    )


def _phase(flat: Mapping[str, Any]) -> PhaseSettings:
    return PhaseSettings(_pick(MethodSettings, flat, _section("method.")), *(flat[name] for name in PHASE))


def _pick(kind: Any, flat: Mapping[str, Any], chosen: Mapping[str, Option]) -> Any:
    return kind(*(flat[name] for name in chosen))


def _plain(config: Any) -> dict[str, Any]:
    """`{dotted option: value}`, sequences as tuples."""
    return {key: files.as_tuples(value) for key, value in options.flatten(config).items()}
