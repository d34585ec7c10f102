"""A config taken apart, once: what each piece of a run is told. Fields and types are those of core/options.py."""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tl_jax import config as options
from tl_jax.core import files, messages
from tl_jax.core.options import OPTIONS, Option
from tl_jax.weights import published

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
    strong: Pairs = ()


class NetworkSettings(NamedTuple):
    """One further network, `networks.NAME`; cache "features": what terms read is computed once per example and view.

    group: what trains it; "": it is frozen.
    """

    name: str
    weights: str = ""
    image_size: int = 0
    cache: str = ""
    sha256: str = ""  # that the file must have; "": any
    group: str = ""


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

    @property
    def shown(self) -> Mapping[str, Any] | None:
        """The options that event files name: those that were set, and a few of every run; None: there are no files."""
        always = {name: self.table[name] for name in ("model.name", "method.name", "lr", "batch_size", "seed")}
        return {**always, **self.identity} if "tensorboard" in self.loop.log else None


def read(config: Any) -> Settings:
    """Takes a config apart; raises one ValueError for invalid values, before anything is loaded."""
    options.check(config)
    changed = []
    for i, phase in enumerate(config.phases):
        with naming({}, f"phases[{i}]"):
            changed.append(options.override(config, dict(phase)))
            options.check(changed[-1])
    flat = _plain(config)
    batch = {"batch_size": flat["batch_size"], "augment": flat["data.augment"]}
    return Settings(
        model=_named(_pick(ModelSettings, flat, _section("model."))),
        data=_pick(DataSettings, flat, _section("data.")),
        loop=_pick(LoopSettings, flat, RUN),
        streams={name: StreamSettings(**{**batch, **given}) for name, given in flat["streams"].items()},
        networks={name: NetworkSettings(**given) for name, given in flat["networks"].items()},
        phases=[_phase(_plain(phase)) for phase in changed or [config]],
        table=options.flatten(config),
        identity=options.identity(config),
    )


def _named(model: ModelSettings) -> ModelSettings:
    """With the name that the table of published files gives, where the config leaves it out."""
    row = None if model.name else published.find(model.weights)
    return model._replace(name=row.model) if row else model


def phase_table(phase: PhaseSettings) -> dict[str, Any]:
    """`{dotted option: value}` of what a phase may change, for `naming`."""
    method, *others = phase
    return dict(zip((*_section("method."), *PHASE), (*method, *others), strict=True))


@contextlib.contextmanager
def naming(table: Mapping[str, Any], *keys: str) -> Iterator[None]:
    """Puts the options that an error of the block is about before its text, unless it has one of these keys already.

    table: `{dotted option: value}`, of which those count that were set, or all keys where none was; a key that is not
    in it always counts. An OSError stays one, as the system's own has the file's name in its text.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if not keys or any(
            re.search(rf"(?<![\w.]){re.escape(key)}{'' if '.' in key else ' ?[=:]'}", str(error)) for key in keys
        ):
            raise
        initial = {key: files.as_tuples(options.INITIAL[key]) for key in keys if key in table}
        changed = [key for key in keys if key not in table or files.as_tuples(table[key]) != initial[key]]
        about = (f"{key} = {messages.brief(table[key])}" if key in table else key for key in changed or keys)
        kind = next(kind for kind in (FileNotFoundError, OSError, ValueError) if isinstance(error, kind))
        raise kind(f"{', '.join(about)}: {error}") from error


def _phase(flat: Mapping[str, Any]) -> PhaseSettings:
    return PhaseSettings(_pick(MethodSettings, flat, _section("method.")), *(flat[name] for name in PHASE))


def _pick(kind: Any, flat: Mapping[str, Any], chosen: Mapping[str, Option]) -> Any:
    return kind(*(flat[name] for name in chosen))


def _plain(config: Any) -> dict[str, Any]:
    """`{dotted option: value}`, sequences as tuples."""
    return {key: files.as_tuples(value) for key, value in options.flatten(config).items()}
