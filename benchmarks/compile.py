"""torch.compile on patched models: graph breaks, and time before and after, for a tiny Llama and a tiny BERT.

python benchmarks/compile.py [--device cpu|cuda]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import fastinfer

SMALL = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
MODELS = {
    "tiny Llama": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=1000, **SMALL)),
    "tiny BERT": lambda: BertModel(BertConfig(vocab_size=1000, **SMALL)),
}


def median_ms(call: Callable[[], object], device: str, rounds: int = 50) -> float:
    times = []
    for _ in range(rounds + 5):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[5:]) * 1e3


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    torch.manual_seed(0)
    print(
        f"{'model':<12}{'weights':<9}{'graph breaks':>13}{'eager ms':>10}{'compiled ms':>13}{'largest difference':>20}"
    )
    slower = 0
    for name, build in MODELS.items():
        for weights in ("int8", "int4"):
            model = fastinfer.patch(build().eval().to(device), weights)
            ids = torch.randint(5, 1000, (4, 64), device=device)
            torch._dynamo.reset()
            breaks = torch._dynamo.explain(model)(input_ids=ids, use_cache=False).graph_break_count
            torch._dynamo.reset()
            compiled = torch.compile(model)
            eager_out, compiled_out = model(input_ids=ids)[0], compiled(input_ids=ids)[0]
            eager_ms = median_ms(lambda m=model, i=ids: m(input_ids=i), device)
            compiled_ms = median_ms(lambda m=compiled, i=ids: m(input_ids=i), device)
            slower += compiled_ms > eager_ms
            difference = (eager_out - compiled_out).abs().max().item()
            print(
                f"{name:<12}{weights:<9}{breaks:>13}{eager_ms:>10.2f}{compiled_ms:>13.2f}{difference:>20.2e}",
                flush=True,
            )
    return slower


if __name__ == "__main__":
    sys.exit(main())
