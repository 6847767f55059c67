"""The tuner: times every plan that can run a weight's matmul against the heuristics' choice, and keeps what wins.

Times are those of CUDA graphs over rotating random weights, with dependent launch, as in a captured decode step, and
without. A plan wins if the geometric mean of the two is at least 2 % below that of the heuristics' choice.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from fastinfer import _native, ops
from fastinfer.ops.launch import dependent_launch
from fastinfer.ops.layout import TILE_COLUMNS, TILE_W4A16, TILE_W8A8, TILE_W8A16
from fastinfer.timing import Calls, Replays, copies
from fastinfer.tuning import LINEAR_COLUMNS, plans
from fastinfer.tuning.plans import AUTO, Device, Plan, PlanFileError, Plans, Row, Weight

CAPABILITY = 90
GAIN = 0.98  # of the heuristics' time is what a plan may take
HOPELESS = 1.5  # times the best so far, after one replay
CLOSE, FINALISTS = 1.1, 6  # times the best, and how many are timed at length
ROUNDS = 16  # replays of each finalist
RANKS = (1, 2, 3, 4, 8)
LINEAR_ROWS = 16  # above, linear is torch's
BUSY_ROWS = 256  # up to so many rows a call is short, and a graph holds many of them
ULPS = 2  # of the largest result, that sums in another order may differ by


@dataclasses.dataclass(frozen=True)
class Timed:
    """Microseconds of a call: alone, and with dependent launch."""

    plan: Plan
    us: float
    chained_us: float

    @property
    def score(self) -> float:
        return math.sqrt(self.us * self.chained_us)


def require_device() -> Device:
    """The current GPU. Raises ValueError where there is none with tile kernels."""
    needs = "tune needs a GPU of compute capability 9.0"
    if not torch.cuda.is_available():
        raise ValueError(f"{needs}; torch finds no GPU (`fastinfer doctor` says more)")
    device = Device.of(torch.cuda.current_device())
    if device.capability != CAPABILITY:
        raise ValueError(f"{needs}; this is {device}")
    if _native.status["cuda"] != "loaded":
        raise ValueError(f"tune needs the CUDA library, which is {_native.status['cuda']}")
    return device


# --- one weight


def calls_of(weight: Weight, device: str = "cuda") -> Callable[[int], Calls]:
    """Given M: calls of the weight's op on random x and on random weights that outgrow the cache, which fit any layout."""
    n, k = weight.n, weight.k

    def ints(*size: int) -> torch.Tensor:
        return torch.randint(-127, 128, size, dtype=torch.int8, device=device)

    def values(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device).bfloat16()

    if weight.kind == "linear":
        layers = [partial(ops.linear, w=values(n, k)) for _ in range(copies(2 * n * k))]
    elif weight.kind == "w4a16":
        size = n, k // weight.group
        layers = [
            partial(
                ops.int4_matmul,
                w=ints(n, k // 2),
                w_scale=torch.rand(size, device=device).half() * 0.01,
                w_zero=torch.rand(size, device=device).half() * 15,
                layout=TILE_W4A16,
            )
            for _ in range(copies(n * k // 2))
        ]
    else:
        named = {"w_scale": torch.rand(n, device=device) * 0.01}
        op, layout = (ops.int8_matmul, TILE_W8A16) if weight.kind == "w8a16" else (ops.int8_scaled_matmul, TILE_W8A8)
        layers = [partial(op, w=ints(n, k), layout=layout, **named) for _ in range(copies(n * k))]

    def calls(m: int) -> Calls:
        if weight.kind != "w8a8":
            x = values(m, k)
            return [partial(layer, x) for layer in layers]
        q, x_scale = ints(m, k), torch.rand(m, device=device) * 0.01
        return [partial(layer, q, x_scale=x_scale, out_dtype=torch.bfloat16) for layer in layers]

    return calls


def candidates(weight: Weight) -> list[Plan]:
    """Every plan that the library may have for the weight; whether it can run is found by trying."""
    unit = LINEAR_COLUMNS if weight.kind == "linear" else TILE_COLUMNS
    return [
        Plan(name, ranks, shape)
        for name, kernel in plans.kernels(weight.kind).items()
        for ranks in RANKS
        if ranks <= min(kernel.most_ranks, weight.k // unit)
        for shape in kernel.shapes
    ]


class Race:
    """Plans for one weight and M, on the same data."""

    def __init__(self, weight: Weight, calls: Calls, m: int):
        self.weight, self.calls, self.m = weight, calls, m
        self.wrong: list[Plan] = []
        self.count = max(1, (32 if m <= BUSY_ROWS else 4) // len(calls)) * len(calls)
        torch.cuda.synchronize()  # the weights are there: a kernel that is launched early does not wait for them
        self.want = calls[0]()

    def _captured(self, plan: Plan, dependent: bool) -> Replays:
        with plans.forced(self.weight.kind, plan):
            if not dependent:
                return Replays(self.calls, self.count)
            with dependent_launch():
                self.calls[0]()  # the first one after switching on is launched as ever
                return Replays(self.calls, self.count)

    def _results(self, plan: Plan) -> list[torch.Tensor]:
        """Those of calls alone, and of one that starts while another runs."""
        [
            torch.full_like(self.want, float("nan")) for _ in range(3)
        ]  # freed at once: the memory that results will lie in
        call = self.calls[0]
        with plans.forced(self.weight.kind, plan):
            alone = call()
            with dependent_launch():
                return [alone, call(), call()]  # the first one after switching on is launched as ever

    def _is_wanted(self, got: torch.Tensor) -> bool:
        if self.weight.kind == "w8a8":
            return torch.equal(got, self.want)
        want = self.want.float()
        bound = ULPS * torch.finfo(self.want.dtype).eps * want.abs().max()
        return bool(((got.float() - want).abs() <= bound).all())  # False where there is a NaN

    def is_right(self, plan: Plan) -> bool:
        """Whether the plan runs and gives the result of the heuristics' choice: w8a8 bit for bit, else up to rounding."""
        try:
            results = self._results(plan)
        except RuntimeError as error:
            if "cannot run" not in str(error):
                print(f"  {plan}: {str(error).splitlines()[0]}", flush=True)
            return False
        right = all(map(self._is_wanted, results))
        if not right:
            self.wrong.append(plan)
            print(f"  {plan}: WRONG at M = {self.m}, left out", flush=True)
        return right

    def first_round(self) -> dict[Plan, float]:
        """Microseconds, with dependent launch, of the heuristics' choice and of the plans that come near the best."""
        times = {Plan(): statistics.median(self._captured(Plan(), True).measure(5))}
        for plan in candidates(self.weight):
            if not self.is_right(plan):
                continue
            replays = self._captured(plan, True)
            if replays.measure(1)[0] <= HOPELESS * min(times.values()):
                times[plan] = statistics.median(replays.measure(5))
        return times

    def final(self, finalists: list[Plan]) -> list[Timed]:
        """Both times of the plans, measured in turns, so that a change of the clock meets all of them."""
        runs = {(plan, dependent): self._captured(plan, dependent) for plan in finalists for dependent in (False, True)}
        times: dict[tuple[Plan, bool], list[float]] = {run: [] for run in runs}
        for _ in range(ROUNDS // 4):
            for run, replays in runs.items():
                times[run] += replays.measure(4)
        median = {run: statistics.median(figures) for run, figures in times.items()}
        return [Timed(plan, median[plan, False], median[plan, True]) for plan in finalists]

    def run(self) -> tuple[Timed, Timed]:
        """The heuristics' choice and the winner, which may be the same."""
        times = self.first_round()
        near = [plan for plan in sorted(times, key=lambda plan: times[plan]) if plan.kernel != AUTO]
        near = [plan for plan in near if times[plan] <= CLOSE * min(times.values())][:FINALISTS]
        auto, *others = self.final([Plan(), *near])
        return auto, pick(auto, others)


def pick(auto: Timed, others: list[Timed]) -> Timed:
    better = [t for t in others if t.score <= GAIN * auto.score]
    return min(better, key=lambda t: t.score, default=auto)


def rows_of(weight: Weight, found: dict[int, tuple[Timed, Timed]]) -> list[Row]:
    """Rows for a table, from the heuristics' choice and the winner at each M that was measured.

    A plan counts from above half of its M on, or from above the M measured before: where neighbours are further apart,
    what lies between is left to the heuristics. There are no needless rows, and at least one.
    """
    rows: list[Row] = []

    def add(m: int, plan: Plan, times: dict[str, float]) -> None:
        if rows and rows[-1].plan == plan:
            rows.pop()
        rows.append(Row(weight, m, plan, times))

    before = 0
    for m, (auto, best) in sorted(found.items()):
        if m // 2 > before:
            add(m // 2, Plan(), {})
        times = {"us": best.us, "chained_us": best.chained_us}
        if best.plan != auto.plan:
            times |= {"auto_us": auto.us, "auto_chained_us": auto.chained_us}
        add(m, best.plan, {name: round(value, 2) for name, value in times.items()})
        before = m
    if len(rows) > 1 and rows[-1].plan.kernel == AUTO:
        rows.pop()
    return rows


# --- all of them


def _kept(path: Path, device: Device) -> dict[Weight, list[Row]]:
    """What a file holds already; raises PlanFileError where it is no file of plans for this device."""
    if not path.exists():
        return {}
    there = plans.read(path)
    if there.device != device:
        raise PlanFileError(f"{path}: is for {there.device}, this is {device}; choose another file with --out")
    return there.by_weight()


def tune_all(device: Device, weights: list[Weight], ms: list[int], path: Path) -> int:
    """Tunes weights one after another and writes their rows to `path`, in place of those it has for them.

    Returns how often a plan gave a wrong result.
    """
    kept = _kept(path, device)
    print(f"{device}: weights: {len(weights)}, M = {', '.join(map(str, ms))}, to {path}")
    print(
        f"{'weight':<26} | {'M':>5} | {'heuristics':>10} {'chained':>8} | {'best':>8} {'chained':>8} | plan", flush=True
    )
    start, wrong = time.perf_counter(), 0
    with plans.emptied(torch.cuda.current_device()), torch.inference_mode():  # so that "auto" is the heuristics' choice
        for weight in weights:
            calls, found = calls_of(weight), {}
            for m in ms:
                if weight.kind == "linear" and m > LINEAR_ROWS:
                    continue
                race = Race(weight, calls(m), m)
                found[m] = auto, best = race.run()
                wrong += len(race.wrong)
                _print(weight, m, auto, best)
            if found:
                kept[weight] = rows_of(weight, found)
            plans.write(path, Plans(device, [row for rows in kept.values() for row in rows]))
    wins = sum(row.plan.kernel != AUTO for weight in weights for row in kept.get(weight, []))
    print(f"{wins} rows with a plan, in {time.perf_counter() - start:.0f} s: {path}")
    return wrong


def _print(weight: Weight, m: int, auto: Timed, best: Timed) -> None:
    gain = "–" if best is auto else f"{best.plan}, {auto.score / best.score:.2f} ×"
    print(
        f"{weight!s:<26} | {m:>5} | {auto.us:>10.1f} {auto.chained_us:>8.1f} | {best.us:>8.1f} {best.chained_us:>8.1f} | "
        f"{gain}",
        flush=True,
    )
