"""`fastinfer demo`: a real model before and after `patch`, in one table."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="path or hub name; default: all-MiniLM-L6-v2, or Gemma 3 270M")
    parser.add_argument("--decoder", action="store_true", help="a language model instead of a sentence encoder")
    parser.add_argument("--text", type=Path, metavar="FILE", help="sentences, one a line, or a text for perplexity")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--batch", type=int, default=8, help="encoder: texts a timed batch (8)")
    parser.add_argument("--length", type=int, default=128, help="encoder: tokens a text in a timed batch (128)")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds; the median counts (15; decoder: 3)")
    parser.add_argument("--tokens", type=int, default=48, help="decoder: tokens to generate (48)")
    parser.add_argument("--windows", type=int, default=4, help="decoder: windows of 511 tokens for perplexity (4)")
    parser.add_argument("--group-size", type=int, default=64, choices=(32, 64, 128), help="of the int4 model (64)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")


def main(args: argparse.Namespace) -> int:
    for name in ("batch", "length", "rounds", "tokens", "windows"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.text is not None and not args.text.is_file():
        raise ValueError(f"--text: there is no file {args.text}")
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.decoder:
        from fastinfer.demo.decoder import run
    else:
        from fastinfer.demo.encoder import run
    figures = run(args)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0
