"""Models with and without a fused decode step, and what runs it beside the model's own forward."""

import torch
import transformers as t
from architectures import ALL, GROUPED, SMALL, build

from fastinfer.generation import proof
from fastinfer.generation.cache import KVCache
from fastinfer.generation.step import DecodeStep
from fastinfer.patching import RECORD

MORE = {
    "gemma": lambda: t.GemmaForCausalLM(t.GemmaConfig(**GROUPED)),
    "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**GROUPED, sliding_window=8, query_pre_attn_scalar=16)),
    "phi": lambda: t.PhiForCausalLM(t.PhiConfig(**SMALL)),
    "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SMALL)),
    "gpt_neox sequential": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SMALL, use_parallel_residual=False)),
    "stablelm": lambda: t.StableLmForCausalLM(t.StableLmConfig(**SMALL, num_key_value_heads=2)),
    "stablelm parallel": lambda: t.StableLmForCausalLM(
        t.StableLmConfig(**SMALL, num_key_value_heads=2, use_parallel_residual=True)
    ),
    "granite": lambda: t.GraniteForCausalLM(
        t.GraniteConfig(
            **SMALL,
            num_key_value_heads=2,
            embedding_multiplier=3.0,
            logits_scaling=2.0,
            residual_multiplier=0.5,
            attention_multiplier=0.3,
        )
    ),
    "olmo2": lambda: t.Olmo2ForCausalLM(t.Olmo2Config(**SMALL, num_key_value_heads=2)),
    "olmo3": lambda: t.Olmo3ForCausalLM(t.Olmo3Config(**SMALL, num_key_value_heads=2, sliding_window=8)),
    "smollm3": lambda: t.SmolLM3ForCausalLM(t.SmolLM3Config(**SMALL, num_key_value_heads=2, no_rope_layers=[1, 0])),
    "falcon": lambda: t.FalconForCausalLM(t.FalconConfig(**SMALL, multi_query=True)),
    "starcoder2": lambda: t.Starcoder2ForCausalLM(t.Starcoder2Config(**SMALL, num_key_value_heads=2, sliding_window=8)),
    "llama3 rope": lambda: t.LlamaForCausalLM(
        t.LlamaConfig(
            **GROUPED,
            rope_parameters={
                "rope_type": "llama3",
                "factor": 8.0,
                "rope_theta": 1e4,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        )
    ),
}
FUSED = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "gpt2", "opt", *MORE]
REFUSED = {
    "mixtral": (ALL["mixtral"], "mixture of experts"),
    "t5": (ALL["t5"], "encoder–decoder"),
    "cohere": (lambda: t.CohereForCausalLM(t.CohereConfig(**SMALL, num_key_value_heads=2)), "interleaved"),
    "bloom": (
        lambda: t.BloomForCausalLM(t.BloomConfig(vocab_size=131, hidden_size=64, n_layer=2, n_head=4)),
        "neither a rotation nor a table of positions",
    ),
    "falcon alibi": (lambda: t.FalconForCausalLM(t.FalconConfig(**SMALL, alibi=True)), "ALiBi"),
    "dynamic rope": (
        lambda: t.LlamaForCausalLM(
            t.LlamaConfig(**GROUPED, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
        ),
        "changes with the length",
    ),
    "post norm": (
        lambda: t.OPTForCausalLM(t.OPTConfig(**SMALL, ffn_dim=96, word_embed_proj_dim=64, do_layer_norm_before=False)),
        "norms behind its sums",
    ),
    "mamba": (
        lambda: t.MambaForCausalLM(t.MambaConfig(vocab_size=131, hidden_size=64, num_hidden_layers=2)),
        "no stack of decoder layers",
    ),
}


def model_of(name: str, dtype: torch.dtype = torch.float32):
    if name in MORE:
        ALL.setdefault(name, MORE[name])
    return build(name, dtype)


def step_of(model) -> DecodeStep:
    return vars(model)[RECORD].step


def run_both(step: DecodeStep, model, padding=(0, 4), prompt=10, counts=(1, 1, 16, 2), kind="keep"):
    """Logits of the step, which alone writes its cache, and of the model on a cache of its own; token by token."""
    ids = torch.randint(3, 131, (len(padding), prompt + sum(counts)), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row, n in enumerate(padding):
        mask[row, :n] = 0
    ours, own = KVCache(kind=kind), KVCache(kind=kind)
    with torch.no_grad():
        for cache in (ours, own):
            cache.set_padding(mask[:, :prompt])
            proof._forward(model, ids[:, :prompt], mask[:, :prompt], cache)
        at, got, want = prompt, [], []
        for count in counts:
            new = ids[:, at : at + count]
            ours.reserve(at + count)
            got.append(step(new, ours))
            ours.lengths.add_(count)
            ours.advance(count)
            want.append(proof._forward(model, new, mask[:, : at + count], own))
            at += count
    return torch.cat(got, 1), torch.cat(want, 1)


def check(model, tolerance=1e-4):
    step = step_of(model)
    assert step.stale() is None
    got, want = run_both(step, model)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * want.abs().max().item())
