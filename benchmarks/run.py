"""Times our ops beside their peers, in one process. Refuses to time an op whose result is wrong, and then exits with 1.

python benchmarks/run.py [--op NAME ...] [--device cpu|cuda] [--shapes default|bars|odd] [--m M ...] [--threads N]
                         [--json FILE] [--plot FILE.png]
python benchmarks/run.py --from-json FILE [--plot FILE.png]    prints and draws a saved run again

On a GPU a call is the median of CUDA-graph replays, on the CPU of single calls; weights rotate so that together they
outgrow the last-level cache, and all data is random. Peers are those of `peers.py`; FASTINFER_PEERS names the folder of
those that torch does not bring. --plot needs matplotlib (`pip install fastinfer[bench]`).

A line before each N×K says what one packed copy of its weights holds, scales and zero points included. The columns:
shape M×N×K (attention: batch × positions × heads · head size); GB/s of what has to be read and written once (packed
weights, x, y); `% of roofline`: the time that those bytes take at the read bandwidth, or the operations at the peak of
a matmul (that of W8A8 in int8, else in the dtype of x), whichever is longer, over the time taken. Both are measured at
the start: the bandwidth of a sum, and the fastest matmul there is, 8192³ on a GPU. `× peer` is the peer's time over
ours, above 1 where ours is faster. Chained are calls with dependent launch, as in a captured decode step. At the end, the
geometric means of the fastest peer of each row over ours.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "tests")]

import peers  # noqa: E402
import registry  # noqa: E402
import tolerance  # noqa: E402

from fastinfer import _native  # noqa: E402
from fastinfer.ops.launch import dependent_launch  # noqa: E402
from fastinfer.timing import CUDA_CACHE_BYTES, Calls, time_cuda  # noqa: E402

CACHE_BYTES = {"cpu": 48 << 20, "cuda": CUDA_CACHE_BYTES}
PEAK_SIZE = {"cpu": 2048, "cuda": 8192}
WEIGHT_ONLY = {"int4 + W8A16": ("int4_matmul", "int8_matmul")}
HEADER = (
    f"{'op':<18} | {'shape':>15} | {'dtype':>5} | {'device':>6} | {'µs':>9} | {'GB/s':>5} | {'TFLOP/s':>7} | "
    f"{'% of roofline':>13} | {'chained':>7} | × peer (µs)"
)


def time_cpu(calls: Calls, seconds: float = 0.4) -> float:
    """Median microseconds of a call; the list is cycled through."""
    for call in calls:
        call()
    times: list[float] = []
    index, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        calls[index % len(calls)]()
        times.append(time.perf_counter() - start)
        index += 1
    return statistics.median(times) * 1e6


TIMERS = {"cpu": time_cpu, "cuda": time_cuda}


def read_bandwidth(device: str) -> float:
    """GB/s of a plain sum over memory that no cache holds."""
    x = torch.ones((256 << 20) if device == "cuda" else (64 << 20), device=device)
    return x.nbytes / TIMERS[device]([lambda: x.sum()]) / 1e3


def peak_throughput(device: str, dtype: torch.dtype) -> dict[str, float]:
    """TFLOP/s of the fastest large matmul, in `dtype` ("float") and in int8 ("int8")."""
    size, timer = PEAK_SIZE[device], TIMERS[device]
    problem = peers.Problem(size, size, size, dtype, device, cache_bytes=0)
    float_calls = list(peers.collect(peers.NAMES["int8_matmul"], problem).values())
    if device == "cpu":  # oneDNN is slower on a transposed weight
        a, b = problem.ints(size, size), problem.ints(size, size)
        int8_calls: list[Calls] = [[lambda: torch.ops.aten._int_mm(a, b)]]
    else:
        names = [name for name in peers.NAMES["int8_scaled_matmul"] if name != "linear"]
        int8_calls = list(peers.collect(names, problem).values())
    return {
        kind: 2 * size**3 / min(map(timer, options)) / 1e6
        for kind, options in (("float", float_calls), ("int8", int8_calls))
    }


def machine(device: str, dtype: torch.dtype) -> dict:
    """What a saved run says of its machine: commit, versions, bandwidth and peaks."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    return {
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else "",
        "torch": torch.__version__,
        "backend": _native.describe(torch.device(device)),
        "device": torch.cuda.get_device_name().removeprefix("NVIDIA ") if device == "cuda" else "cpu",
        "dtype": peers.SHORT[dtype],
        "gb_s": read_bandwidth(device),
        "tflop_s": peak_throughput(device, dtype),
    }


def row(op: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str, head: dict) -> dict:
    """One op at one shape, timed beside its peers. Raises AssertionError where its result is wrong."""
    case = registry.OPS[op](peers.Problem(*shape, dtype, device, CACHE_BYTES[device]))
    tolerance.assert_within(case.result(case.calls[0]()), case.exact(), case.plain(), case.magnitude())
    timer = TIMERS[device]
    us = timer(case.calls)
    with dependent_launch():
        chained_us = timer(case.calls) if device == "cuda" else us
    peak = head["tflop_s"]["int8" if op == "int8_scaled_matmul" else "float"]
    floor_us = max(case.bytes / head["gb_s"] / 1e3, case.operations / peak / 1e6)
    return {
        "op": op,
        "m": shape[0],
        "n": shape[1],
        "k": shape[2],
        "dtype": peers.SHORT[dtype],
        "device": head["device"],
        "us": us,
        "chained_us": chained_us,  # with dependent launch, as in a captured decode step
        "weight_bytes": case.weight_bytes,
        "bytes": case.bytes,
        "operations": case.operations,
        "gb_s": case.bytes / us / 1e3,
        "tflop_s": case.operations / us / 1e6,
        "of_roofline": floor_us / us,
        "peers_us": {name: timer(calls) for name, calls in case.peers.items()},
    }


def print_head(head: dict) -> None:
    peak = head["tflop_s"]
    print(f"{head['backend']}, torch {head['torch']}, commit {head['commit'][:10] or 'unknown'}")
    print(
        f"{head['device']}: read bandwidth {head['gb_s']:.0f} GB/s, peak {head['dtype']} {peak['float']:.2f} TFLOP/s, "
        f"int8 {peak['int8']:.2f} TOP/s"
    )
    print(HEADER, flush=True)


def print_row(r: dict, before: dict | None) -> None:
    """The row's line; a line on its weights first where those of the row before differ."""
    if r["weight_bytes"] and (before is None or any(r[key] != before[key] for key in ("op", "n", "k"))):
        bits = 8 * r["weight_bytes"] / (r["n"] * r["k"])
        print(f"{r['op']} {r['n']}×{r['k']}: packed weights {r['weight_bytes']:,} bytes, {bits:.2f} bits a weight")
    beside = "  ".join(f"{us / r['us']:.2f} × {name} ({us:.1f})" for name, us in r["peers_us"].items())
    shape = f"{r['m']}×{r['n']}×{r['k']}"
    print(
        f"{r['op']:<18} | {shape:>15} | {r['dtype']:>5} | {r['device']:>6} | {r['us']:>9.1f} | {r['gb_s']:>5.0f} | "
        f"{r['tflop_s']:>7.2f} | {r['of_roofline']:>13.0%} | {r.get('chained_us', r['us']):>7.1f} | {beside}",
        flush=True,
    )


def print_means(rows: list[dict]) -> None:
    """The geometric mean of fastest peer / ours for each op and for the weight-only ops together, and the worst row."""
    named = {op: (op,) for op in dict.fromkeys(r["op"] for r in rows)} | WEIGHT_ONLY
    print("geometric mean of the fastest peer's time over ours, alone and chained:")
    for name, members in named.items():
        beside = [r for r in rows if r["op"] in members and r["peers_us"]]
        if not beside or len({r["op"] for r in beside}) < len(members):
            continue
        best = [min(r["peers_us"].values()) for r in beside]
        means = [statistics.geometric_mean(b / r[key] for b, r in zip(best, beside)) for key in ("us", "chained_us")]
        ratio, worst = min(((b / r["us"], r) for b, r in zip(best, beside)), key=lambda pair: pair[0])
        at = f"{worst['op']} {worst['m']}×{worst['n']}×{worst['k']}"
        print(
            f"  {name:<18} {means[0]:.2f} ×  {means[1]:.2f} ×  ({len(beside)} rows, worst alone {ratio:.2f} × at {at})"
        )


def measure(args: argparse.Namespace, rows: list[dict], head: dict) -> int:
    """Appends a row to `rows` for every op and shape asked for; returns how many were wrong."""
    dtype, wrong = registry.default_dtype(args.device), 0
    for op in args.op:
        for shape in registry.shapes(args.device, args.shapes, op):
            if args.m and shape[0] not in args.m:
                continue
            try:
                r = row(op, shape, dtype, args.device, head)
            except AssertionError as error:
                wrong += 1
                print(f"{op} {'×'.join(map(str, shape))}: WRONG, not timed: {error}", flush=True)
                continue
            print_row(r, rows[-1] if rows else None)
            rows.append(r)
    return wrong


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="*", choices=registry.OPS, default=list(registry.OPS))
    parser.add_argument("--device", choices=CACHE_BYTES, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", choices=registry.PRESETS, default="default")
    parser.add_argument("--m", nargs="*", type=int, help="only the rows with one of these M")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--from-json", type=Path)
    return parser.parse_args()


def main() -> int:
    args = arguments()
    if args.plot:
        import plot  # before anything is timed: matplotlib may be missing
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    wrong, rows = 0, []
    if args.from_json:
        saved = json.loads(args.from_json.read_text())
        head, rows = {key: value for key, value in saved.items() if key != "rows"}, saved["rows"]
        print_head(head)
        for before, r in zip([None, *rows], rows):
            print_row(r, before)
    else:
        head = machine(args.device, registry.default_dtype(args.device))
        print_head(head)
        try:
            wrong = measure(args, rows, head)
        finally:
            if args.json:
                args.json.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    print_means(rows)
    if args.plot:
        plot.roofline(head, rows, args.plot)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
