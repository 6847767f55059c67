"""`fastinfer tune`: measures which plan runs each weight's matmul fastest here, and keeps what it finds for later runs."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

KINDS = ("w4a16", "w8a16", "w8a8", "linear")
GROUPS = (32, 64, 128)
LINEAR_COLUMNS = 32  # linear's kernel takes K in multiples of it, and any N
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="*", metavar="MODEL", help="path or hub name of a model or its config")
    parser.add_argument("--shapes", metavar="N×K,…", default="", help="weights by size, beside those of models")
    rows = "rows of x (1,2,4 … 2048); what is found for a weight replaces all that the file, or fastinfer, has for it"
    parser.add_argument("--m", metavar="M,…", default=",".join(map(str, ROWS)), help=rows)
    parser.add_argument("--kinds", metavar="KIND,…", default=",".join(KINDS), help=f"({','.join(KINDS)})")
    parser.add_argument("--group", metavar="G,…", default="128", help="int4 groups: 32, 64, 128 (128)")
    out = "default: $FASTINFER_PLANS, else ~/.cache/fastinfer/plans-DEVICE.json"
    parser.add_argument("--out", type=Path, metavar="FILE", help=out)


def _list(option: str, text: str) -> list[str]:
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise ValueError(f"{option} names nothing")
    return list(dict.fromkeys(found))


def _numbers(option: str, text: str, known: tuple[int, ...] = ()) -> list[int]:
    found = []
    for part in _list(option, text):
        if not part.isdecimal() or int(part) < 1 or (known and int(part) not in known):
            expected = f"numbers out of {known}" if known else "positive numbers"
            raise ValueError(f"{option} takes {expected}, got {part!r}")
        found.append(int(part))
    return sorted(set(found))


def _shapes(text: str) -> list[tuple[int, int]]:
    found = []
    for part in _list("--shapes", text):
        size = re.fullmatch(r"(\d+)[x×*](\d+)", part)
        if size is None:
            raise ValueError(f"--shapes takes sizes such as 4096×14336 (N×K), got {part!r}")
        found.append((int(size[1]), int(size[2])))
    return found


def main(args: argparse.Namespace) -> int:
    rows, groups, kinds = _numbers("--m", args.m), _numbers("--group", args.group, GROUPS), _list("--kinds", args.kinds)
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"--kinds takes names out of {KINDS}, got {kind!r}")
    shapes = _shapes(args.shapes) if args.shapes else []
    if not shapes and not args.models:
        raise ValueError("name a model, or sizes of weights: --shapes N×K,…")
    from fastinfer.tuning import plans, tuner, weights

    device = tuner.require_device()
    for model in args.models:
        shapes += weights.of_model(model)
    path = args.out or plans.user_path(device.name)
    return int(tuner.tune_all(device, weights.of_shapes(shapes, kinds, groups), rows, path) > 0)
