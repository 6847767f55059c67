"""Plans of the CUDA tile matmuls: which kernel multiplies a weight by so many rows of x, and in what shape.

They lie in JSON files, those that come with fastinfer in data/plans_*.json, one's own where `fastinfer tune` puts them:

    {"device": "NVIDIA H100 80GB HBM3", "capability": "9.0", "multiprocessors": 132, "fastinfer": "0.1.0", "rows": [
      {"kind": "w4a16", "group": 128, "n": 4096, "k": 4096, "m": 8, "kernel": "wgmma", "ranks": 2, "shape": "64x256"}]}

A row counts for every M above that of the row before, up to its own `m`; kernel "auto" leaves those M to the kernels'
heuristics, which also serve above the last row. Other fields, such as times, are for readers. Kernels and shapes go by the
names that the CUDA library gives them (csrc/cuda/tile_plan.cu), so a file keeps its meaning when their order changes.

The library tells GPUs apart by compute capability and number of multiprocessors, and a file serves every GPU that has its
own. Of the shipped files those for a GPU of the same name are taken alone, where there are any.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

import fastinfer
from fastinfer import _native
from fastinfer.tuning import GROUPS, KINDS

SHIPPED = Path(__file__).parents[1] / "data"
AUTO = "auto"
MOST = 2**31 - 1  # of any number in a file


class PlanFileError(ValueError):
    """A file of plans that cannot be used; the message names the file, and the row."""


class PlanWarning(UserWarning):
    """Plans that are left out; matmuls are then run by heuristics, rightly and perhaps more slowly."""


@dataclasses.dataclass(frozen=True)
class Device:
    """A GPU, and what plans are told apart by."""

    name: str
    capability: int  # 90 for 9.0
    multiprocessors: int

    @classmethod
    def of(cls, index: int) -> Device:
        found = torch.cuda.get_device_properties(index)
        return cls(found.name, 10 * found.major + found.minor, found.multi_processor_count)

    @property
    def key(self) -> tuple[int, int]:
        return self.capability, self.multiprocessors

    def __str__(self) -> str:
        capability = f"{self.capability // 10}.{self.capability % 10}"
        return f"{self.name} (compute capability {capability}, {self.multiprocessors} multiprocessors)"


@dataclasses.dataclass(frozen=True)
class Weight:
    """[n, k] of a kind, int4 in groups of `group` (else 0)."""

    kind: str
    group: int
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.kind}{f' g{self.group}' if self.group else ''} {self.n}×{self.k}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """`ranks` blocks of a cluster split K."""

    kernel: str = AUTO
    ranks: int = 1
    shape: str = ""

    def __str__(self) -> str:
        return self.kernel if self.kernel == AUTO else f"{self.kernel} {self.shape} /{self.ranks}"


@dataclasses.dataclass(frozen=True)
class Row:
    weight: Weight
    m: int
    plan: Plan
    times: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Plans:
    device: Device
    rows: list[Row]

    def by_weight(self) -> dict[Weight, list[Row]]:
        found: dict[Weight, list[Row]] = defaultdict(list)
        for row in self.rows:
            found[row.weight].append(row)
        return dict(found)


# --- files


def read(path: Path) -> Plans:
    """The plans in a file. Raises PlanFileError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # no JSON, no UTF-8, or brackets without end
        raise PlanFileError(f"{path}: {error}") from None
    try:
        return _plans(found)
    except ValueError as error:
        raise PlanFileError(f"{path}: {error}") from None


def _field(where: str, found: dict, name: str, kind: Any, least: int = 1) -> Any:
    value: Any = found.get(name)
    if type(value) is not kind or (
        kind is int and not least <= value <= MOST
    ):  # not isinstance: True is no number here
        expected = {int: f"a whole number from {least} to {MOST}", str: "a string", list: "a list"}[kind]
        raise ValueError(f"{where}{name} must be {expected}, got {value!r}")
    return value


def _plans(found: object) -> Plans:
    if not isinstance(found, dict):
        raise ValueError(f"must hold a JSON object, got {type(found).__name__}")
    capability = _field("", found, "capability", str)
    if not re.fullmatch(r"\d+\.\d", capability):
        raise ValueError(f'capability must be a string such as "9.0", got {capability!r}')
    multiprocessors = _field("", found, "multiprocessors", int)
    device = Device(_field("", found, "device", str), int(capability.replace(".", "")), multiprocessors)
    rows: list[Row] = []
    seen: dict[tuple[Weight, int], int] = {}
    for i, row in enumerate(_field("", found, "rows", list)):
        rows.append(_row(f"rows[{i}]", row))
        first = seen.setdefault((rows[i].weight, rows[i].m), i)
        if first != i:
            raise ValueError(f"rows[{i}] has the weight and m of rows[{first}]")
    return Plans(device, rows)


def _row(where: str, found: object) -> Row:
    if not isinstance(found, dict):
        raise ValueError(f"{where} must be an object, got {found!r}")
    where += ": "
    kind = _field(where, found, "kind", str)
    if kind not in KINDS:
        raise ValueError(f"{where}kind must be one of {KINDS}, got {kind!r}")
    group = _field(where, found, "group", int, least=0)
    groups = GROUPS if kind == "w4a16" else (0,)
    if group not in groups:
        raise ValueError(f"{where}group must be one of {groups} beside kind {kind!r}, got {group}")
    n, k, m = (_field(where, found, name, int) for name in "nkm")
    kernel = _field(where, found, "kernel", str)
    plan = Plan()
    if kernel != AUTO:
        plan = Plan(kernel, _field(where, found, "ranks", int), _field(where, found, "shape", str))
    known = {"kind", "group", "n", "k", "m", "kernel", "ranks", "shape"}
    return Row(Weight(kind, group, n, k), m, plan, {name: v for name, v in found.items() if name not in known})


def write(path: Path, plans: Plans) -> None:
    """Writes a file that `read` reads, in one step: a row a line, in order."""
    device = plans.device
    head = {
        "device": device.name,
        "capability": f"{device.capability // 10}.{device.capability % 10}",
        "multiprocessors": device.multiprocessors,
        "fastinfer": fastinfer.__version__,
    }
    rows = sorted(plans.rows, key=lambda row: (KINDS.index(row.weight.kind), *dataclasses.astuple(row.weight), row.m))
    lines = []
    for row in rows:
        plan = {"kernel": AUTO} if row.plan.kernel == AUTO else dataclasses.asdict(row.plan)
        lines.append(json.dumps({**dataclasses.asdict(row.weight), "m": row.m, **plan, **row.times}))
    body = ",".join(f"\n  {line}" for line in lines) + ("\n " if lines else "")
    text = "{\n" + "".join(f" {json.dumps(name)}: {json.dumps(value)},\n" for name, value in head.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(f'{text} "rows": [{body}]\n}}\n', encoding="utf-8")
    scratch.replace(path)


def user_path(device_name: str) -> Path:
    """Where one's own plans for a device lie: $FASTINFER_PLANS, else a file in the cache folder."""
    named = os.environ.get("FASTINFER_PLANS", "")
    if named not in ("", "0"):
        return Path(os.path.expanduser(named))
    cache = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(cache, "fastinfer") / f"plans-{re.sub('[^a-z0-9]+', '-', device_name.lower()).strip('-')}.json"


# --- the library's table


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One that a plan may name: its number, the most ranks it takes, and its shapes in the order of their numbers."""

    number: int
    most_ranks: int
    shapes: tuple[str, ...]


@functools.cache
def kernels(kind: str) -> dict[str, Kernel]:
    """The kernels that the CUDA library has for a kind, by name."""
    found = {}
    for number, line in enumerate(torch.ops.fastinfer.tile_plan_candidates(kind).splitlines(), 1):
        name, most_ranks, *shapes = line.split()
        found[name] = Kernel(number, int(most_ranks), tuple(shapes))
    return found


def _numbers(weight: Weight, plan: Plan) -> list[int] | None:
    """Kernel, ranks and shape as the library numbers them; None where it does not know them."""
    if plan.kernel == AUTO:
        return [0, 1, 0]
    kernel = kernels(weight.kind).get(plan.kernel)
    if kernel is None or plan.shape not in kernel.shapes or plan.ranks > kernel.most_ranks:
        return None
    return [kernel.number, plan.ranks, kernel.shapes.index(plan.shape)]


def install(device: Device, rows: Iterable[Row]) -> None:
    """Makes `rows` the library's plans for this kind of device, all of them. What the library does not know is "auto"."""
    flat: dict[str, list[int]] = {kind: [] for kind in KINDS}
    unknown: dict[str, None] = {}
    for row in rows:
        numbers = _numbers(row.weight, row.plan)
        if numbers is None:
            unknown[str(row.plan)] = None
        key = row.weight.group, row.weight.n, row.weight.k, row.m
        flat[row.weight.kind] += [*key, *(numbers or [0, 1, 0])]
    for kind, numbers in flat.items():
        torch.ops.fastinfer.set_tile_plans(*device.key, kind, numbers)
    if unknown:
        names = ", ".join(unknown)
        _warn(f"this version has no {names}: their rows are left to the heuristics; `fastinfer tune` finds new ones")


@contextlib.contextmanager
def forced(kind: str, plan: Plan) -> Iterator[None]:
    """Has this thread's tile matmuls of `kind` run as `plan` says; they raise RuntimeError where it cannot run.

    An inner block goes before an outer one of its kind; "auto" there lifts what the outer one forces.
    """
    numbers = _numbers(Weight(kind, 0, 0, 0), plan)
    if numbers is None:
        raise ValueError(f"there is no plan {plan} for {kind}")
    before = torch.ops.fastinfer.force_tile_plan(kind, *numbers)
    try:
        yield
    finally:
        torch.ops.fastinfer.force_tile_plan(kind, *before)


def _warn(message: str) -> None:
    warnings.warn(f"fastinfer: {message}", PlanWarning, stacklevel=2)


@dataclasses.dataclass
class Found:
    """The plans for a device, the files they are from, and why the user's own file is ignored, if it is."""

    rows: dict[Weight, list[Row]] = dataclasses.field(default_factory=dict)
    files: list[str] = dataclasses.field(default_factory=list)
    ignored: str = ""

    def __str__(self) -> str:
        files = ", ".join(self.files) or "none, the heuristics choose"
        return f"{files} ({self.ignored})" if self.ignored else files


def find(device: Device) -> Found:
    """A user's own plans go before the shipped ones, weight by weight; FASTINFER_PLANS=0: none at all."""
    found = Found()
    if os.environ.get("FASTINFER_PLANS") == "0":
        found.ignored = "switched off by FASTINFER_PLANS=0"
        return found
    shipped = {path: read(path) for path in sorted(SHIPPED.glob("plans_*.json"))}
    shipped = {path: there for path, there in shipped.items() if there.device.key == device.key}
    named = {path: there for path, there in shipped.items() if there.device.name == device.name}
    for path, there in (named or shipped).items():
        found.rows |= there.by_weight()
        found.files.append(path.name)
    path = user_path(device.name)
    if not os.path.exists(path):
        if os.environ.get("FASTINFER_PLANS"):
            found.ignored = f"FASTINFER_PLANS names {path}, which is not there"
        return found
    try:
        own = read(path)
    except PlanFileError as error:
        found.ignored = f"{error}; the file is ignored"
        return found
    if own.device.key != device.key:
        found.ignored = f"{path} is for {own.device}, this is {device}; the file is ignored"
        return found
    found.rows |= own.by_weight()
    found.files.append(str(path))
    return found


@functools.cache
def load(index: int) -> None:
    """Brings the plans for a device into the library's table, once."""
    if _native.status["cuda"] != "loaded" or os.environ.get("FASTINFER_PLANS") == "0":
        return
    device = Device.of(index)
    found = find(device)
    if found.ignored:
        _warn(found.ignored)
    install(device, [row for of_weight in found.rows.values() for row in of_weight])


@torch.compiler.assume_constant_result
def load_for(device: torch.device) -> bool:
    """`load` for ops: torch.compile calls it while it traces. It must have a result, which means nothing."""
    load(device.index)
    return True


@contextlib.contextmanager
def emptied(index: int) -> Iterator[None]:
    """A device's table without plans: the heuristics choose. They are read again at the end."""
    load(index)  # or the first matmul would, in here
    install(Device.of(index), [])
    try:
        yield
    finally:
        load.cache_clear()
        load(index)
