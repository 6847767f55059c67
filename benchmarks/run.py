"""Times our ops beside their peers, in one process. Refuses to time an op whose result is wrong.

python benchmarks/run.py [--op NAME ...] [--device cpu|cuda] [--json FILE] [--threads N]

On a GPU a call is the median of CUDA-graph replays, on the CPU of single calls; weights rotate so that together they
outgrow the last-level cache.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "tests")]

import registry  # noqa: E402
import tolerance  # noqa: E402

from fastinfer import _native  # noqa: E402

CACHE_BYTES = {"cpu": 48 << 20, "cuda": 300 << 20}


def time_cpu(calls: list, seconds: float = 0.4) -> float:
    """Median microseconds of a call; the list is cycled through."""
    for call in calls:
        call()
    times, index, end = [], 0, time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        calls[index % len(calls)]()
        times.append(time.perf_counter() - start)
        index += 1
    return statistics.median(times) * 1e6


def time_cuda(calls: list, repeats: int = 20) -> float:
    """Median microseconds of a call inside a CUDA graph that cycles through the list."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph, count = torch.cuda.CUDAGraph(), max(2, 32 // len(calls)) * len(calls)
    with torch.cuda.graph(graph):
        for i in range(count):
            calls[i % len(calls)]()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(True), torch.cuda.Event(True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / count)
    return statistics.median(times)


def read_bandwidth(device: str) -> float:
    """GB/s of a plain sum over memory that no cache holds."""
    x = torch.ones((256 << 20) if device == "cuda" else (64 << 20), device=device)
    us = time_cuda([lambda: x.sum()]) if device == "cuda" else time_cpu([lambda: x.sum()])
    return x.nbytes / us / 1e3


def row(op: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str, bandwidth: float) -> dict:
    case = registry.OPS[op](*shape, dtype, device, CACHE_BYTES[device])
    out = case.calls[0]()
    tolerance.assert_within(out, case.exact(), case.plain(), case.magnitude())
    timer = time_cuda if device == "cuda" else time_cpu
    us = timer(case.calls)
    peers = {name: timer(calls) for name, calls in case.peers.items()}
    return {
        "op": op,
        "m": shape[0],
        "n": shape[1],
        "k": shape[2],
        "dtype": str(dtype).removeprefix("torch."),
        "us": us,
        "gb_s": case.bytes / us / 1e3,
        "tflop_s": case.operations / us / 1e6,
        "of_bandwidth": case.bytes / us / 1e3 / bandwidth,
        "peers_us": peers,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="*", choices=registry.OPS, default=list(registry.OPS))
    parser.add_argument("--device", choices=CACHE_BYTES, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype, device = registry.default_dtype(args.device), torch.device(args.device)
    bandwidth = read_bandwidth(args.device)
    print(f"{_native.describe(device)}, torch {torch.__version__}, read bandwidth {bandwidth:.0f} GB/s")
    print(f"{'op':<20}{'M':>6}{'N':>8}{'K':>7}{'µs':>10}{'GB/s':>8}{'TFLOP/s':>9}{'of bw':>7}  × peer (µs)")
    rows, ratios = [], []
    for op in args.op:
        for shape in registry.shapes(args.device):
            r = row(op, shape, dtype, args.device, bandwidth)
            rows.append(r)
            ratios += [us / r["us"] for us in r["peers_us"].values()]
            peers = "  ".join(f"{us / r['us']:.2f} × {name} ({us:.1f})" for name, us in r["peers_us"].items())
            print(
                f"{op:<20}{r['m']:>6}{r['n']:>8}{r['k']:>7}{r['us']:>10.1f}{r['gb_s']:>8.0f}{r['tflop_s']:>9.2f}"
                f"{r['of_bandwidth']:>7.0%}  {peers}",
                flush=True,
            )
    print(f"geometric mean against peers: {math.exp(statistics.fmean(map(math.log, ratios))):.2f} ×")
    if args.json:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        head = {"commit": commit, "torch": torch.__version__, "device": _native.describe(device), "gb_s": bandwidth}
        args.json.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
