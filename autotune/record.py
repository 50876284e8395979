"""One record of what was measured, and reading it from data that a stranger may have written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any

from ..ir.cascade import Cascade
from ..ir.errors import CastileError, InputError
from ..ir.key import content_key
from ..ir.mapping import FORMS, GAUGES, KNOBS
from ..ir.mapping import Mapping as Tuned
from ..ir.parse import parse

# How a trial ended. Only "ok" can win.
STATUSES = (
    "ok",
    "compile_error",
    "compile_timeout",
    "crash",
    "hang",
    "memory",
    "wrong",
    "wavering",
    "overrun",
)

# What a record is: a trial of a search, the winner of a final comparison, or a mapping pinned by a lock file. Where
# several fit, the latter go before the former.
KINDS = ("trial", "final", "pinned")

MOST_TIMES, LONGEST_TEXT = 1000, 1 << 20


@dataclass(frozen=True, slots=True)
class Record:
    """One measurement. ``time_s`` is the median of ``times`` (seconds), None where the trial failed."""

    cascade: str
    target: str
    device: str
    shapes: Mapping[str, int]
    mapping: Tuned
    status: str = "ok"
    detail: str = ""
    time_s: float | None = None
    times: tuple[float, ...] = ()
    kind: str = "trial"
    session: str = ""
    seed: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    at: str = ""
    uid: str = ""
    key: str = ""
    name: str = ""
    ranks: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, which `record_of` reads."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data["mapping"] = self.mapping.to_dict()
        return {
            k: dict(v) if isinstance(v, Mapping) else list(v) if isinstance(v, tuple) else v for k, v in data.items()
        }


def record_of(data: Any) -> Record:
    """A record from its JSON form. Raises `InputError` for what is none: nothing of it is believed unchecked."""
    if not isinstance(data, dict):
        raise InputError("a record is a JSON object", got=type(data).__name__)
    names = {f.name for f in fields(Record)}
    unknown = sorted(set(data) - names)
    if unknown:
        raise InputError(
            f"a record has no field `{unknown[0][:60]}`", hint=f"its fields are {', '.join(sorted(names))}"
        )
    given = {"detail": "", "session": "", "at": "", "uid": "", "kind": "trial", "status": "ok", **data}
    for name in ("cascade", "target", "device", "status", "detail", "kind", "session", "at", "uid"):
        if not _is_text(given.get(name)):
            raise InputError(f"a record's `{name}` is no text", got=type(given.get(name)).__name__)
    for name, allowed in (("status", STATUSES), ("kind", KINDS)):
        if given[name] not in allowed:
            raise InputError(f"a record's {name} is unknown", expected=", ".join(allowed), got=repr(given[name][:60]))
    c = parsed(given["cascade"])
    record = Record(
        cascade=given["cascade"],
        target=given["target"],
        device=given["device"],
        shapes=_numbers("shapes", given.get("shapes", {}), c),
        mapping=_mapping(given.get("mapping"), c),
        status=given["status"],
        detail=given["detail"],
        time_s=_time(given.get("time_s")),
        times=_times(given.get("times", [])),
        kind=given["kind"],
        session=given["session"],
        seed=given["seed"] if isinstance(given.get("seed"), int) and abs(given["seed"]) < 1 << 62 else 0,
        versions=_texts(given.get("versions", {})),
        at=given["at"],
        uid=given["uid"],
    )
    if record.status == "ok" and record.time_s is None:
        raise InputError("a record that is ok has a time", expected="time_s > 0", got=repr(given.get("time_s"))[:60])
    return described(record, c)


def is_spoken(mapping: Any) -> bool:
    """Whether this castile has the words that a mapping is made of: another may know other forms, knobs and values."""
    if not isinstance(mapping, dict):
        return True
    knobs = mapping.get("knobs")
    known = not isinstance(knobs, dict) or all(k in KNOBS and v in KNOBS[k].values for k, v in knobs.items())
    known = known and mapping.keys() <= {f.name for f in fields(Tuned)}
    return known and mapping.get("form", FORMS[0]) in FORMS and mapping.get("gauge", GAUGES[0]) in GAUGES


@lru_cache(maxsize=256)
def parsed(text: str) -> Cascade:
    """The cascade of a record; many records share one."""
    try:
        return parse(text)
    except CastileError as error:
        raise InputError(f"a record's cascade does not parse: {error.message}") from None


@lru_cache(maxsize=256)
def _key(c: Cascade) -> str:
    return content_key(c)


def described(record: Record, c: Cascade) -> Record:
    """With what follows from the cascade; what a file claims of that is not believed."""
    return replace(record, key=_key(c), name=c.name, ranks=tuple(c.ranks))


def _is_text(given: Any) -> bool:
    """Whether something is a text that is not too long and has bytes: half a pair of surrogates has none."""
    return isinstance(given, str) and len(given) <= LONGEST_TEXT and given == storable(given)


def storable(text: str) -> str:
    """A text with something in place of what has no bytes, as what a system says of a path that is no text."""
    return text.encode("utf-8", "replace").decode()


def _mapping(given: Any, c: Cascade) -> Tuned:
    mapping = Tuned.from_json(given if isinstance(given, dict) else {} if given is None else str(given))
    for rank in (*mapping.tiles, *mapping.splits):
        if rank not in c.ranks:
            raise InputError(f"a record's mapping names a rank `{rank[:60]}`, which its cascade does not have")
    return mapping


def _numbers(name: str, given: Any, c: Cascade) -> dict[str, int]:
    good = isinstance(given, dict) and all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 48 and r in c.ranks for r, n in given.items()
    )
    if not good:
        raise InputError(f"a record's {name} give no extents of the cascade's ranks")
    return dict(given)


def _time(given: Any) -> float | None:
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 < given < 1e9:
        raise InputError("a record's time_s is no time", expected="seconds", got=repr(given)[:60])
    return float(given)


def _times(given: Any) -> tuple[float, ...]:
    if not isinstance(given, list) or len(given) > MOST_TIMES:
        raise InputError("a record's times are no list", expected=f"at most {MOST_TIMES} numbers")
    return tuple(t for t in map(_time, given) if t is not None)


def _texts(given: Any) -> dict[str, str]:
    if not isinstance(given, dict) or len(given) > 100:
        raise InputError("a record's versions are no dictionary")
    return {storable(str(k)[:200]): storable(str(v)[:200]) for k, v in given.items()}


def standing(r: Record) -> tuple[float, float]:
    """What goes before what: of pins and winners the last, as each comparison had the winner before it among its
    candidates; of trials the fastest."""
    return -KINDS.index(r.kind), (r.time_s or math.inf) if r.kind == "trial" else 0.0


def foremost(records: Iterable[Record]) -> Record | None:
    """The record that goes before the others of its workload, the last where several stand alike; None of none."""
    return min(reversed(list(records)), key=standing, default=None)


def renamed(r: Record, names: Mapping[str, str]) -> Record:
    """A record under other names of ranks: the mapping and the shapes of the same cascade spelt otherwise."""

    def one(values: Mapping[str, int]) -> dict[str, int]:
        return {names.get(k, k): v for k, v in values.items()}

    m = r.mapping
    return replace(r, shapes=one(r.shapes), mapping=replace(m, tiles=one(m.tiles), splits=one(m.splits)))
