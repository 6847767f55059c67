"""Tiny random models of many architectures, made from configurations alone."""

from __future__ import annotations

import torch
import transformers as t

SMALL = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 16}

ENCODERS = {
    "bert": lambda: t.BertForMaskedLM(t.BertConfig(**SMALL)),
    "distilbert": lambda: t.DistilBertForMaskedLM(
        t.DistilBertConfig(vocab_size=131, dim=64, hidden_dim=96, n_layers=2, n_heads=4, max_position_embeddings=64)
    ),
    "roberta": lambda: t.RobertaForSequenceClassification(t.RobertaConfig(**SMALL, num_labels=17)),
    "albert": lambda: t.AlbertForMaskedLM(t.AlbertConfig(**SMALL, embedding_size=32)),
    "electra": lambda: t.ElectraForPreTraining(t.ElectraConfig(**SMALL, embedding_size=32)),
    "deberta_v2": lambda: t.DebertaV2ForMaskedLM(
        t.DebertaV2Config(**SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=16)
    ),
}
DECODERS = {
    "gpt2": lambda: t.GPT2LMHeadModel(
        t.GPT2Config(
            vocab_size=131,
            n_embd=64,
            n_layer=2,
            n_head=4,
            n_positions=SMALL["max_position_embeddings"],
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
    "opt": lambda: t.OPTForCausalLM(t.OPTConfig(**SMALL, ffn_dim=96, word_embed_proj_dim=32)),
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**GROUPED)),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**GROUPED, sliding_window=8)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**SMALL, num_key_value_heads=2, tie_word_embeddings=True)),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**GROUPED)),
    "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**GROUPED, sliding_window=8)),
    "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**SMALL, num_key_value_heads=2)),
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**GROUPED, num_local_experts=4)),
}
ENCODER_DECODERS = {
    "t5": lambda: t.T5ForConditionalGeneration(
        t.T5Config(vocab_size=131, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ),
}
ALL = ENCODERS | DECODERS | ENCODER_DECODERS


def build(name: str, dtype: torch.dtype = torch.float32) -> t.PreTrainedModel:
    """A seeded model in eval mode. Its weights are spread out (T5's are so already), so that logits are far from ties."""
    torch.manual_seed(0)
    model = ALL[name]().eval().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters() if name != "t5" else ():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def inputs(name: str, batch: int = 2, length: int = 9) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 131, (batch, length), generator=generator)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name in ENCODER_DECODERS:
        given["decoder_input_ids"] = torch.randint(3, 131, (batch, 4), generator=generator)
    return given


def logits(model: t.PreTrainedModel, given: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**given).logits
