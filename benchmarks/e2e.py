"""Times a model's `generate` before and after `fastinfer.patch`, in one process: rows as llama-bench prints them.

python benchmarks/e2e.py [--model 8b|1b|tiny|PATH] [--weights keep|int8|int4|int4-head8|RECIPE ...]
                         [--kv-cache keep|int8 ...] [--batch B ...] [--depth D ...] [--max-length L ...] [--prefill P ...]
                         [--prompt P] [--tokens N] [--peer eager|static ...] [--method hqq|rtn] [--rounds R]
                         [--device cpu|cuda] [--threads N] [--json FILE]
python benchmarks/e2e.py --from-json FILE    prints a saved run again

8b, 1b and tiny are Llama shapes with random weights, built on the device (bf16 on a GPU, fp32 on the CPU); a PATH is a
local causal model. `int4-head8` is {"lm_head": "int8", "*": int4 in groups of 128}, RECIPE any recipe as JSON. Without
--weights only the peers run, with `--peer` alone (no name) only ours. Greedy, without end-of-sequence tokens, so that
every row of a batch gets all its tokens.

pp512           prompts of 512 tokens, `generate` of one token each: prompt tokens a second
tg128           128 tokens after --prompt tokens: (n2 - n1) / (t(n2) - t(n1)), n new tokens each, so that the prompt's
                time is no part of it; total tokens a second of the batch
tg128 @ d4096   the same with 4,096 tokens in the cache already (--depth)
tg128 @ L8192   the same with `max_length` 8,192 (--max-length), which sizes a static cache; `max_time` ends these calls,
                after about as many tokens

`ms a token`: what one row of the batch waits for a token. `× peer`: tokens a second over those of the unpatched model: plain
(eager), and with transformers' static cache (static), which compiles the decode step on a GPU. `warm-up s`: the first such
call, less what its later tokens take once warm: the time to a first token with all that was prepared for it on the way
(after `patch` returned, in the first row). `peak MiB`: most memory allocated on the GPU in that row; on the CPU, the most
that the process has held so far. The exit status is 1 where a row asked for could not be measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

import fastinfer
from fastinfer import _native

LLAMA = {"num_key_value_heads": 8, "num_attention_heads": 32, "vocab_size": 128256, "max_position_embeddings": 8192}
SHAPES = {
    "8b": LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "1b": LLAMA
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64}
    | {"tie_word_embeddings": True},
    "tiny": LLAMA
    | {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 512}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
}
SHORT_S = 0.05
PEERS: dict[str, dict] = {"eager": {}, "static": {"cache_implementation": "static"}}
HEADER = (
    f"{'model':<6} | {'weights':<10} | {'cache':<5} | {'batch':>5} | {'test':<15} | {'tokens/s':>9} | {'ms a token':>10} | "
    f"{'× peer':<28} | {'warm-up s':>9} | {'peak MiB':>8}"
)


@dataclasses.dataclass(frozen=True)
class Test:
    """One kind of row: `tokens` new ones after a prompt (tg), or 0 where the prompt itself is timed (pp)."""

    name: str
    prompt: int
    tokens: int
    max_length: int | None = None


@dataclasses.dataclass
class Subject:
    """What generates: a model with the arguments that its `generate` gets, and what its rows are headed by."""

    model: torch.nn.Module
    labels: dict[str, Any]
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)


def tests(args: argparse.Namespace) -> list[Test]:
    """What is asked for; plain decoding first, so that its warm-up is all there is after `patch`."""
    name, short = f"tg{args.tokens}", (args.prompt, args.tokens)
    return [
        Test(name, *short),
        *(Test(f"{name} @ d{depth}", depth, args.tokens) for depth in args.depth),
        *(Test(f"{name} @ L{length}", *short, max_length=length) for length in args.max_length),
        *(Test(f"pp{prompt}", prompt, 0) for prompt in args.prefill),
    ]


def recipe(weights: str, method: str) -> Any:
    """What `patch` takes as weights for a word or JSON of the command line."""
    if weights.startswith("{"):
        return fastinfer.Recipe(json.loads(weights))
    int4 = {"weights": "int4", "group_size": 128, "method": method}
    if weights == "int4-head8":
        return fastinfer.Recipe({"lm_head": "int8", "*": int4})
    return fastinfer.Recipe({"*": int4 if weights == "int4" else weights})


def build(name: str, device: str) -> torch.nn.Module:
    """A random model of a known shape, or the one at a path; never stops early."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    if name in SHAPES:
        config = LlamaConfig(**SHAPES[name], bos_token_id=1, pad_token_id=0, eos_token_id=None)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    else:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device)
    model.generation_config.eos_token_id = None
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = 0
    return model.eval()


def synchronize(model: torch.nn.Module) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def generate(subject: Subject, ids: torch.Tensor, **limits: Any) -> tuple[float, int]:
    """Wall time of one `generate`, and how many new tokens each row got."""
    mask = torch.ones_like(ids)
    synchronize(subject.model)
    start = time.perf_counter()
    out = subject.model.generate(ids, attention_mask=mask, do_sample=False, **limits, **subject.arguments)
    synchronize(subject.model)
    return time.perf_counter() - start, out.shape[1] - ids.shape[1]


def generate_tokens(subject: Subject, ids: torch.Tensor, tokens: int) -> float:
    """Wall time of one `generate` of so many new tokens. Raises RuntimeError where another number comes back."""
    seconds, got = generate(subject, ids, min_new_tokens=tokens, max_new_tokens=tokens)
    if got != tokens:
        raise RuntimeError(f"generate returned {got} new tokens, asked for {tokens}")
    return seconds


def decode(run: Callable[[int], float], tokens: int, rounds: int) -> tuple[list[float], float]:
    """Seconds a step, a figure a round, and those up to the first token of the first call, all warm-up included."""
    n1 = max(1, tokens // 8)
    n2 = n1 + tokens
    first = run(n2)
    run(n1)
    steps = [(-run(n1) + run(n2)) / tokens for _ in range(rounds)]
    if statistics.median(steps) <= 0:
        raise RuntimeError(f"{n2} tokens took no longer than {n1}: too uneven to tell a rate")
    return steps, max(0.0, first - (n2 - 1) * statistics.median(steps))  # less than nothing is noise


def decode_for(run: Callable[[float], tuple[float, int]], tokens: int, rounds: int) -> tuple[list[float], float]:
    """As decode, by calls that end with their time: so does one whose `max_length` is far from what it generates."""
    budget = SHORT_S
    first, got = run(budget)
    while (short := run(budget))[1] < 4:
        budget *= 2
    longer = 2 * budget + tokens * short[0] / short[1]
    run(longer)
    steps = []
    for _ in range(rounds):
        (t1, n1), (t2, n2) = run(budget), run(longer)
        if n2 <= n1:
            raise RuntimeError(f"{n2} tokens in {t2:.2f} s, {n1} in {t1:.2f} s: too uneven to tell a rate")
        steps.append((t2 - t1) / (n2 - n1))
    return steps, max(0.0, first - (got - 1) * statistics.median(steps))


def peak_mib(model: torch.nn.Module) -> float:
    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measure(subject: Subject, test: Test, batch: int, rounds: int) -> dict:
    """One row, without its peers."""
    model = subject.model
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(5, min(vocabulary, 30000), (batch, test.prompt), device=model.device)

    run = partial(generate_tokens, subject, ids)
    width = batch
    if test.max_length is not None:
        seconds, warmup = decode_for(
            lambda budget: generate(subject, ids, max_length=test.max_length, max_time=budget), test.tokens, rounds
        )
    elif test.tokens:
        seconds, warmup = decode(run, test.tokens, rounds)
    else:
        warmup, seconds = run(1), [run(1) for _ in range(rounds)]
        width *= test.prompt
    step = statistics.median(seconds)
    return {
        **subject.labels,
        "batch": batch,
        "test": test.name,
        "tokens_s": width / step,
        "ms_token": batch * step / width * 1e3,
        "warmup_s": warmup,
        "peak_mib": peak_mib(model),
        "rounds_s": seconds,
    }


def print_row(r: dict, peers: dict[str, float]) -> None:
    beside = ", ".join(f"{r['tokens_s'] / rate:.2f} × {name}" for name, rate in peers.items() if name != r["weights"])
    print(
        f"{r['model']:<6} | {r['weights']:<10} | {r['cache']:<5} | {r['batch']:>5} | {r['test']:<15} | "
        f"{r['tokens_s']:>9.1f} | {r['ms_token']:>10.3f} | {beside:<28} | {r['warmup_s']:>9.2f} | {r['peak_mib']:>8.0f}",
        flush=True,
    )


def peers_of(r: dict, rows: list[dict]) -> dict[str, float]:
    """Tokens a second of the unpatched model in the same test, by peer."""
    same = ("model", "batch", "test")
    return {p["weights"]: p["tokens_s"] for p in rows if p["weights"] in PEERS and all(p[k] == r[k] for k in same)}


def rows_of(subject: Subject, args: argparse.Namespace, rows: list[dict]) -> int:
    """Appends and prints the rows of one subject; returns how many could not be measured."""
    failed = 0
    rounds = 1 if subject.labels["weights"] in PEERS else args.rounds
    for batch in args.batch:
        for test in tests(args):
            try:
                row = measure(subject, test, batch, rounds)
            except RuntimeError as error:  # out of memory, too
                failed += 1
                name = " ".join(subject.labels[key] for key in ("model", "weights", "cache"))
                print(f"{name}, batch {batch}, {test.name}: {error}", flush=True)
                continue
            rows.append(row)
            print_row(row, {} if row["weights"] in PEERS else peers_of(row, rows))
    return failed


def patched(model: torch.nn.Module, weights: str, cache: str, args: argparse.Namespace) -> Subject | None:
    """The model, patched, as a subject; None, and the reason printed, where `patch` refuses."""
    labels = {"model": Path(args.model).name, "weights": weights if weights[0] != "{" else "recipe", "cache": cache}
    options = {} if cache == "keep" else {"kv_cache": cache}
    synchronize(model)
    start = time.perf_counter()
    try:
        fastinfer.patch(model, recipe(weights, args.method), reversible=False, **options)
    except (fastinfer.PatchError, ValueError, TypeError) as error:
        print(f"{weights} weights, {cache} cache: not patched: {error}", flush=True)
        return None
    synchronize(model)
    seconds, report = time.perf_counter() - start, fastinfer.report(model)
    print(f"{weights} weights, {cache} cache: patched in {seconds:.2f} s; {'; '.join(report.notes)}", flush=True)
    return Subject(model, labels | {"patch_s": seconds, "notes": report.notes})


def subjects(args: argparse.Namespace) -> Iterator[Subject | None]:
    """The unpatched model with each peer's arguments, then patched ones. One model is in memory at a time."""
    model: torch.nn.Module | None = build(args.model, args.device)
    name = Path(args.model).name
    for peer in args.peer:
        yield Subject(model, {"model": name, "weights": peer, "cache": "keep"}, PEERS[peer])
    for weights in args.weights:
        for cache in args.kv_cache:
            model = model if model is not None else build(args.model, args.device)
            yield patched(model, weights, cache, args)
            model = None
            release()


def release() -> None:
    """Frees what a dropped model held; a patched model has cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def machine(device: str) -> dict:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    return {
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else "",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "backend": _native.describe(torch.device(device)),
        "device": torch.cuda.get_device_name().removeprefix("NVIDIA ") if device == "cuda" else "cpu",
    }


def print_head(head: dict) -> None:
    versions = f"torch {head['torch']}, transformers {head['transformers']}"
    print(f"{head['device']}, {head['backend']}, {versions}, commit {head['commit'][:10] or 'unknown'}")
    print(HEADER, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1b", help=f"{', '.join(SHAPES)}, or the path of a local model")
    parser.add_argument("--weights", nargs="*", default=[])
    parser.add_argument("--kv-cache", nargs="+", choices=("keep", "int8"), default=["keep"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--depth", nargs="*", type=int, default=[])
    parser.add_argument("--max-length", nargs="*", type=int, default=[])
    parser.add_argument("--prefill", nargs="*", type=int, default=[512])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--peer", nargs="*", choices=PEERS, default=["eager"])
    parser.add_argument("--method", choices=("hqq", "rtn"), default="hqq", help="how int4 weights are found")
    parser.add_argument("--rounds", type=int, default=3, help="of the patched model; peers run one")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--from-json", type=Path)
    args = parser.parse_args()
    least = {"--tokens": [args.tokens], "--prompt": [args.prompt], "--rounds": [args.rounds], "--batch": args.batch}
    least |= {"--depth": args.depth, "--prefill": args.prefill}
    for name, values in least.items():
        if any(value < 1 for value in values):
            parser.error(f"{name} must be at least 1, got {min(values)}")
    longest = args.prompt + max(1, args.tokens // 8) + args.tokens
    if any(length < longest for length in args.max_length):
        parser.error(f"--max-length must hold the prompt and all new tokens, {longest}, got {min(args.max_length)}")
    return args


def main() -> int:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    failed, rows = 0, []
    if args.from_json:
        saved = json.loads(args.from_json.read_text())
        print_head(saved)
        for r in saved["rows"]:
            print_row(r, {} if r["weights"] in PEERS else peers_of(r, saved["rows"]))
        return 0
    head = machine(args.device)
    print_head(head)
    try:
        for subject in subjects(args):
            failed += 1 if subject is None else rows_of(subject, args, rows)
            subject = None  # or the loop would hold the model while the next one is built
    finally:
        if args.json:
            args.json.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
