"""The seams of transformers, PEFT, accelerate and torch that `fastinfer.patch` stands on, held by a no-op patch.

The identity patch below does to a model what `fastinfer.patch` does, less the speed: linears are swapped for a
subclass of their own class, blocks keep their module and get a forward on the instance, `generate` is wrapped on the
instance and passes `custom_generate=`. What a user does with a model has to come through unchanged. A test named
`test_limit_*` asserts what does NOT hold: when one fails, a limit has moved, and the section "Seams" of
CONTRIBUTING.md wants an edit.
"""

import copy
import functools
import inspect
import pickle
import types

import pytest
import torch
import transformers
from torch import nn
from transformers.generation.utils import GENERATION_MODES_MAPPING
from transformers.pytorch_utils import Conv1D

pytestmark = pytest.mark.models

# ---------------------------------------------------------------------------------------------- the identity patch

HOOKS = [name for name in nn.Module().__dict__ if "_hooks" in name] + ["_is_full_backward_hook"]


class Same:
    """Mixin of a linear that does nothing new, built around the tensors of the module it replaces."""

    @classmethod
    def of(cls, old):
        new = cls.__new__(cls)  # no __init__: it would allocate and fill a second weight
        nn.Module.__init__(new)
        kept_back = {*new.__dict__, "forward", "_old_forward", "_hf_hook"} - set(HOOKS)
        for name, value in old.__dict__.items():
            if (
                name not in kept_back
            ):  # the hooks' dictionaries are shared, not copied: a handle refers to the very one it is in
                new.__dict__[name] = value
        new._parameters.update(old._parameters)  # the same Parameter objects: ties hold
        new.train(old.training).__dict__["_seam"] = (
            old,
        )  # in a tuple it is no child; deepcopy and pickle take it along
        return new


class SameLinear(Same, nn.Linear):
    pass


class SameConv1D(Same, Conv1D):
    pass


SWAPS = {nn.Linear: SameLinear, Conv1D: SameConv1D}  # by exact type: a subclass has a reason to be one


def move_hook(source, target):
    """Give accelerate's hook, which lives in attributes of the instance, to the module that takes `source`'s place."""
    hook = source.__dict__.get("_hf_hook")
    if hook is not None:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        remove_hook_from_module(source).__dict__.pop("forward", None)
        add_hook_to_module(target, hook)


def offloaded(module):
    hook = module.__dict__.get("_hf_hook")
    return any(getattr(each, "offload", False) for each in getattr(hook, "hooks", [hook]))


def same_forward(self, *args, **kwargs):
    return type(self).forward(self, *args, **kwargs)


def override(module):
    """A forward of the instance's own, below accelerate's if that came first. A partial survives deepcopy and pickle."""
    setattr(
        module, "_old_forward" if "_hf_hook" in module.__dict__ else "forward", functools.partial(same_forward, module)
    )


def restore(module):
    """Undo `override`, wherever accelerate has moved it since."""
    for slot in ("forward", "_old_forward"):
        if getattr(module.__dict__.get(slot), "func", None) is same_forward:
            delattr(module, slot)
            if slot == "_old_forward":
                module._old_forward = types.MethodType(type(module).forward, module)


def decode(model, input_ids, logits_processor=None, stopping_criteria=None, generation_config=None, **kwargs):
    """What `custom_generate=` gets: here every mode goes on to transformers' own method."""
    model.__dict__["_decoded"] = model.__dict__.get("_decoded", 0) + 1
    method = getattr(type(model), GENERATION_MODES_MAPPING[generation_config.get_generation_mode()])
    return method(model, input_ids, logits_processor, stopping_criteria, generation_config=generation_config, **kwargs)


def same_generate(self, *args, **kwargs):
    """A callable `custom_generate` costs the first five arguments (see the limits below): these calls go on untouched."""
    if not any(
        kwargs.get(name) is not None
        for name in ("custom_generate", "assistant_model", "assistant_tokenizer", "tokenizer", "synced_gpus")
    ):
        streamer = kwargs.get("streamer")
        kwargs["custom_generate"] = functools.partial(decode, streamer=streamer) if streamer is not None else decode
    return type(self).generate(self, *args, **kwargs)


def patch(model):
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if type(child) in SWAPS:
                if offloaded(child):
                    raise ValueError(f"{name} is offloaded by accelerate")
                module._modules[name] = SWAPS[type(child)].of(child)
                move_hook(child, module._modules[name])
        for block in module if isinstance(module, nn.ModuleList) else ():
            override(block)
    if getattr(model, "can_generate", lambda: False)():
        model.generate = functools.partial(same_generate, model)
    return model


def unpatch(model):
    """Walks the model as it is now: LoRA may have wrapped what was swapped, deepcopy may have copied it."""
    for module in list(model.modules()):
        restore(module)
        for name, child in list(module._modules.items()):
            if isinstance(child, Same):
                module._modules[name] = old = child._seam[0].train(child.training)
                old._parameters.update(child._parameters)
                move_hook(child, old)
        for name in ("generate", "_decoded"):
            module.__dict__.pop(name, None)
    return model


# ------------------------------------------------------------------------------------------------------ tiny models

ENCODER = dict(
    vocab_size=99,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
)
DECODER = dict(ENCODER, num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2)
GEMMA = dict(DECODER, sliding_window=4, layer_types=["sliding_attention", "full_attention"])
EXPERTS = dict(DECODER, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
GPT2 = dict(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
T5 = dict(
    vocab_size=99,
    d_model=32,
    d_kv=8,
    d_ff=48,
    num_layers=2,
    num_heads=4,
    decoder_start_token_id=0,
    pad_token_id=0,
    eos_token_id=2,
)
MODELS = {
    "bert": ("BertModel", "BertConfig", ENCODER),
    "deberta": (
        "DebertaV2Model",
        "DebertaV2Config",
        dict(ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"]),
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", EXPERTS),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
}
IDS = torch.randint(3, 99, (2, 7), generator=torch.Generator().manual_seed(1))
every_model = pytest.mark.parametrize("name", MODELS)
every_generator = pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "qwen3_moe", "t5"])
lora_models = pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "gemma3", "t5"])


def tiny(name, **config):
    model_class, config_class, settings = MODELS[name]
    torch.manual_seed(0)
    return getattr(transformers, model_class)(
        getattr(transformers, config_class)(**settings, **config, attn_implementation="eager")
    ).eval()


def inputs(model):
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0  # left-padded
    batch = dict(input_ids=IDS, attention_mask=mask)
    return dict(batch, decoder_input_ids=IDS[:, :4]) if model.config.is_encoder_decoder else batch


def tensors(output):
    """Every tensor of a model's output but the cache, by its path."""
    items = [(key, value if isinstance(value, tuple) else (value,)) for key, value in output.items()]
    return {
        f"{key}.{i}": tensor
        for key, values in items
        for i, tensor in enumerate(values)
        if isinstance(tensor, torch.Tensor)
    }


def run(model, **kwargs):
    with torch.no_grad():
        return tensors(model(**inputs(model), **kwargs))


def assert_same(got, want):
    assert list(got) == list(want)
    for key in want:
        assert torch.equal(got[key], want[key]), key


def picture(model):
    """What undo has to give back: which module sits where, and which attributes each one has."""
    return {name: (module, set(module.__dict__)) for name, module in model.named_modules()}


def linears(model):
    return sorted(
        {
            name.split(".")[-1]
            for name, m in model.named_modules()
            if isinstance(m, (nn.Linear, Conv1D)) and name != "lm_head"
        }
    )


# --------------------------------------------------------------------------- outputs, undo, copies, files and hooks


@every_model
def test_recorded_outputs(name):
    wanted = dict(output_hidden_states=True, output_attentions=True) | (
        dict(output_router_logits=True) if "moe" in name else {}
    )
    model, want = tiny(name), run(tiny(name), **wanted)
    assert sum("hidden_states" in key for key in want) > 2 and any("attentions" in key for key in want)
    assert_same(run(patch(model), **wanted), want)  # recorders installed after the patch
    assert_same(run(patch(unpatch(model)), **wanted), want)  # and before it


@every_model
def test_undo_and_state_dict(name):
    model, original = tiny(name), tiny(name)
    before, want = picture(model), run(model)
    patch(model)
    assert any(isinstance(module, Same) for module in model.modules())
    assert_same(run(model), want)
    assert_same(model.state_dict(), original.state_dict())
    assert list(dict(model.named_parameters())) == list(dict(original.named_parameters()))  # without repeats: ties hold
    model.load_state_dict(
        {key: value + 1 for key, value in original.state_dict().items()}, assign=True
    )  # new Parameter objects
    assert picture(unpatch(model)) == before
    assert_same(model.state_dict(), {key: value + 1 for key, value in original.state_dict().items()})


@every_model
@pytest.mark.parametrize(
    "twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_are_independent(name, twin_of):
    model = patch(tiny(name))
    want, twin = run(model), twin_of(model)
    assert_same(run(twin), want)
    assert not {id(m) for m in twin.modules()} & {id(m) for m in model.modules()}
    assert all(
        m.__dict__[slot].args == (m,) for m in twin.modules() for slot in ("forward", "generate") if slot in m.__dict__
    )
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert_same(run(model), want)
    assert not torch.equal(next(iter(run(twin).values())), next(iter(want.values())))  # runs on its own weights
    assert not any(isinstance(m, Same) for m in unpatch(twin).modules()) and any(
        isinstance(m, Same) for m in model.modules()
    )


def test_limit_a_bound_method_as_forward_does_not_survive_pickle():
    model = tiny("bert")
    model.pooler.forward = types.MethodType(
        same_forward, model.pooler
    )  # pickled as a name to look up on the half-built copy
    with pytest.raises(AttributeError, match="same_forward"):
        pickle.loads(pickle.dumps(model))


@every_model
def test_save_and_load(name, tmp_path):
    model = tiny(name)
    want, kind = run(model), type(model)
    patch(model).save_pretrained(tmp_path)
    loaded, info = kind.from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not any(info[key] for key in info if key.endswith("_keys")), info
    assert loaded.config.architectures == [kind.__name__]
    assert_same(run(loaded.eval()), want)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_hooks_of_the_user(name):
    model, calls = tiny(name), []
    where = next(key for key, module in model.named_modules() if type(module) in SWAPS)
    linear = model.get_submodule(where)
    handles = [linear.register_forward_pre_hook(lambda m, args: calls.append(("pre", type(m))))]
    handles += [
        linear.register_forward_hook(lambda m, args, kwargs, out: calls.append(("before", type(m))), with_kwargs=True)
    ]
    new = patch(model).get_submodule(where)
    handles += [new.register_forward_hook(lambda m, args, out: calls.append(("after", type(m))))]
    handles += [new.register_full_backward_hook(lambda m, grad, out: calls.append(("backward", type(m))))]
    next(iter(tensors(model(**inputs(model))).values())).sum().backward()
    assert calls == [
        (when, type(new)) for when in ("pre", "before", "after", "backward")
    ]  # a hook is given the new module
    handles.pop(0).remove()
    assert unpatch(model).get_submodule(where) is linear
    calls.clear()
    run(model)
    assert calls == [("before", type(linear)), ("after", type(linear))]
    for handle in handles:
        handle.remove()
    assert not any(linear.__dict__[hooks] for hooks in HOOKS[:-1])


def test_gradient_checkpointing():
    def gradients(model):
        model.gradient_checkpointing_enable()
        model.train()(**inputs(model)).logits.sum().backward()
        return {key: value.grad for key, value in model.named_parameters()}

    assert_same(gradients(patch(tiny("llama"))), gradients(tiny("llama")))


def test_limit_a_parametrised_linear_is_of_another_class_and_has_no_weight_parameter():
    model = tiny("bert")
    nn.utils.parametrizations.weight_norm(model.pooler.dense)
    assert (
        type(patch(model).pooler.dense).__name__ == "ParametrizedLinear"
        and "weight" not in model.pooler.dense._parameters
    )


def test_limit_a_conv1d_that_becomes_a_linear_turns_its_weight_in_the_state_dict(tmp_path):
    model = tiny("gpt2")
    want, mlp = run(model), model.transformer.h[0].mlp
    linear = nn.Linear(32, 128, device="meta")
    linear.weight, linear.bias = nn.Parameter(mlp.c_fc.weight.detach().T), mlp.c_fc.bias  # a view of the same memory
    mlp.c_fc = linear
    torch.testing.assert_close(run(model), want)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatch"):
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path)


# --------------------------------------------------------------------------------------------- PEFT and accelerate


@lora_models
@pytest.mark.parametrize("first", ["patch", "peft"])
def test_lora(name, first):
    peft = pytest.importorskip("peft")

    def lora(model):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules=linears(model), init_lora_weights=False)
        wrapped = peft.get_peft_model(model, config)
        wrapped.add_adapter("other", config)
        return wrapped.eval()

    def passes(model):
        """Outputs of each adapter and of none, and the gradients of the first."""
        found = {}
        for adapter in ("other", "default"):
            model.set_adapter(adapter)
            found |= {f"{adapter}.{key}": value for key, value in run(model).items()}
        with model.disable_adapter():
            found |= {f"none.{key}": value for key, value in run(model).items()}
        model.zero_grad()
        next(iter(tensors(model(**inputs(model))).values())).sum().backward()
        return found | {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}

    original = lora(tiny(name))
    want = passes(original)
    model = lora(patch(tiny(name))) if first == "patch" else lora(tiny(name))
    patch(model.get_base_model())
    assert any(isinstance(m, Same) for m in model.modules()) and sum("lora_A" in key for key in want) > 4
    assert_same(passes(model), want)
    assert_same(passes(unpatch(model)), want)  # undo below the adapters
    assert not any(isinstance(m, Same) for m in model.modules())
    assert_same(run(patch(model).merge_and_unload()), run(original.merge_and_unload()))


def dispatched(model):
    accelerate = pytest.importorskip("accelerate")
    return accelerate.dispatch_model(
        model, {name: "cpu" for name, _ in model.named_children()}, main_device="cpu", force_hooks=True
    )


@every_model
def test_accelerate_hooks_before_the_patch(name):
    model = dispatched(tiny(name))
    want, before = run(model), picture(model)
    assert_same(run(patch(model)), want)
    swapped = [m for m in model.modules() if isinstance(m, Same)]
    assert all(
        m._hf_hook is not None and m.forward.args == (m,) and "_hf_hook" not in m._seam[0].__dict__ for m in swapped
    )
    assert_same(run(copy.deepcopy(model)), want)
    assert picture(unpatch(model)) == before
    assert_same(run(model), want)


@every_model
def test_accelerate_hooks_after_the_patch(name):
    model = tiny(name)
    want = run(model)
    dispatched(patch(model))
    assert_same(run(model), want)
    assert_same(run(unpatch(model)), want)
    assert not any(
        getattr(m.__dict__.get(slot), "func", None) is same_forward
        for m in model.modules()
        for slot in ("forward", "_old_forward")
    )
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(patch(model), recurse=True)
    assert_same(run(unpatch(model)), want)
    assert not any("_hf_hook" in m.__dict__ for m in model.modules())


def test_device_map_on_load_and_offload(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    tiny("llama").save_pretrained(tmp_path)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path, device_map="cpu", attn_implementation="eager")
    assert_same(run(patch(model)), run(tiny("llama")))
    accelerate.cpu_offload(unpatch(model), "cpu")
    assert model.model.layers[0].mlp.up_proj.weight.device.type == "meta"  # the weight is elsewhere: refused by name
    with pytest.raises(ValueError, match="is offloaded by accelerate"):
        patch(model)


# ------------------------------------------------------------------ generate, pipeline, sentence-transformers, compile

SCORES = dict(do_sample=False, output_scores=True, output_hidden_states=True, return_dict_in_generate=True)
MODES = {
    "greedy": dict(do_sample=False),
    "sample": dict(do_sample=True, top_k=20),
    "beams": dict(num_beams=3, num_return_sequences=2),
    "beam_sample": dict(num_beams=2, do_sample=True),
    "static": dict(do_sample=False, cache_implementation="static"),
    "scores": SCORES,
}


def generated(model, **kwargs):
    torch.manual_seed(3)
    batch = {key: value for key, value in inputs(model).items() if not key.startswith("decoder")}
    out = model.generate(**batch, max_new_tokens=6, **kwargs)
    return tensors(dict(ids=out) if isinstance(out, torch.Tensor) else dict(out, past_key_values=None))


@every_generator
@pytest.mark.parametrize("mode", MODES)
def test_generate(name, mode):
    model, want = tiny(name), generated(tiny(name), **MODES[mode])
    assert_same(generated(patch(model), **MODES[mode]), want)
    assert model._decoded == 1
    assert_same(generated(unpatch(model), **MODES[mode]), want)


class Streamer:
    def __init__(self):
        self.ids, self.ended = [], False

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        self.ended = True


def tiny_tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    words = [
        "[PAD]",
        "<s>",
        "</s>",
        "[UNK]",
        *(f"w{i}" for i in range(94)),
        "abcdef",
    ]  # the last: StopStringCriteria probes with it
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = dict(pad_token="[PAD]", bos_token="<s>", eos_token="</s>", unk_token="[UNK]")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **special, padding_side="left", model_max_length=64
    )


def greedy(model, **kwargs):
    return model.generate(IDS[:1], max_new_tokens=5, do_sample=False, **kwargs)


def test_generate_with_a_streamer_an_assistant_and_stop_strings():
    model, tokenizer, streamer = tiny("llama"), tiny_tokenizer(), Streamer()
    want = greedy(model)
    stop = dict(stop_strings=[tokenizer.decode(want[0, 8])], tokenizer=tokenizer)
    stopped = greedy(model, **stop)
    patch(model)
    assert torch.equal(greedy(model, streamer=streamer), want)
    assert streamer.ids == want[0].tolist() and streamer.ended and model._decoded == 1
    assert torch.equal(greedy(model, assistant_model=tiny("llama")), want)
    assert torch.equal(greedy(model, **stop), stopped) and stopped.shape < want.shape
    assert model._decoded == 1  # the assistant and the stop strings went to transformers' own


def test_limit_a_callable_custom_generate_loses_streamer_assistant_and_tokenizer():
    model, streamer, seen = tiny("llama"), Streamer(), {}

    def spy(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        seen.update(kwargs)
        return input_ids

    greedy(model, streamer=streamer, assistant_model=tiny("llama"), custom_generate=spy)
    assert not {"streamer", "assistant_model", "synced_gpus"} & seen.keys()
    assert streamer.ids == IDS[0].tolist() and not streamer.ended  # generate() itself puts the prompt, nobody the rest
    with pytest.raises(ValueError, match="tokenizer"):
        greedy(model, stop_strings=["a"], tokenizer=tiny_tokenizer(), custom_generate=spy)


def test_limit_a_decoding_method_on_the_instance_is_not_called():
    model = tiny("llama")
    model._sample = lambda *args, **kwargs: 1 / 0
    greedy(model)


def test_limit_some_classes_have_a_generate_without_custom_generate():
    for owner in ("WhisperForConditionalGeneration", "MusicgenForConditionalGeneration"):
        assert "custom_generate" not in inspect.signature(getattr(transformers, owner).generate).parameters


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_generate_through_peft(name):
    peft = pytest.importorskip("peft")

    def lora(model):
        torch.manual_seed(1)
        task = "SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM"
        return peft.get_peft_model(
            model, peft.LoraConfig(target_modules=linears(model), init_lora_weights=False, task_type=task)
        ).eval()

    model = lora(patch(tiny(name)))
    assert_same(generated(model), generated(lora(tiny(name))))
    assert model.get_base_model()._decoded == 1


@pytest.mark.parametrize(
    "task, name", [("text-generation", "llama"), ("text-generation", "gpt2"), ("feature-extraction", "bert")]
)
def test_pipeline(task, name):
    model, texts = tiny(name), ["w1 w2 w3", "w4 w5"]
    options = dict(max_new_tokens=4, do_sample=False) if task == "text-generation" else {}
    pipe = transformers.pipeline(task, model=model, tokenizer=tiny_tokenizer())
    want = pipe(texts, batch_size=2, **options)
    patch(model)  # below a pipeline that exists already
    assert pipe(texts, batch_size=2, **options) == want
    assert transformers.pipeline(task, model=model, tokenizer=tiny_tokenizer())(texts, batch_size=2, **options) == want
    assert model.__dict__.get("_decoded", 0) == (2 if options else 0)


def test_sentence_transformer(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    tiny("bert").save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    model, texts = sentence_transformers.SentenceTransformer(str(tmp_path / "bert"), device="cpu"), ["w1 w2 w3", "w4"]
    want = model.encode(texts)
    assert (patch(model).encode(texts) == want).all() and any(isinstance(m, Same) for m in model.modules())
    model.save_pretrained(str(tmp_path / "saved"))
    assert (
        sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(texts) == want
    ).all()
    assert (unpatch(model).encode(texts) == want).all()


@lora_models
def test_compile(name):
    def compiled(model):
        torch._dynamo.reset()
        return run(
            torch.compile(model, backend="eager", fullgraph=True), **({} if name == "bert" else dict(use_cache=False))
        )

    assert_same(compiled(patch(tiny(name))), compiled(tiny(name)))


def test_a_model_compiled_before_the_patch_is_compiled_anew():
    model = tiny("llama")
    want = run(model)
    model.compile(backend="eager")
    run(model)
    patch(model).model.layers[0].mlp.up_proj.forward = lambda x: 1 / 0
    with pytest.raises(Exception, match="division by zero"):  # the new module runs, not the graph of the old
        run(model)
    assert_same(run(unpatch(model)), want)


# ------------------------------------------------------------------------ what an int8 weight meets on the same seams


class ByteLinear(nn.Linear):
    """The storage of Int8Linear: `weight` an int8 Parameter, `weight_scale` a buffer."""

    def __init__(self, old, share=None):
        super().__init__(old.in_features, old.out_features, bias=False, device="meta")
        scale = old.weight.detach().abs().amax(1) / 127
        self.weight = (
            share.weight
            if share
            else nn.Parameter((old.weight / scale[:, None]).round().to(torch.int8), requires_grad=False)
        )
        self.register_buffer("weight_scale", share.weight_scale if share else scale)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.weight_scale[:, None])


class ByteEmbedding(nn.Embedding):
    def __init__(self, old):
        super().__init__(
            old.num_embeddings, old.embedding_dim, old.padding_idx, _weight=torch.empty(old.weight.shape, device="meta")
        )
        byte = ByteLinear(
            types.SimpleNamespace(
                in_features=old.embedding_dim, out_features=old.num_embeddings, weight=old.weight.detach() + 1e-9
            )
        )
        self.weight, self.weight_scale = byte.weight, nn.Buffer(byte.weight_scale)

    def forward(self, ids):
        return self.weight[ids] * self.weight_scale[ids][..., None]


def in_bytes(embedding=True):
    """A Llama with tied embeddings whose linears, head and (if asked) embedding are int8."""
    model = tiny("llama", tie_word_embeddings=True)
    for module in [m for layer in model.model.layers for m in (layer.self_attn, layer.mlp)]:
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, ByteLinear(child))
    if embedding:
        model.model.embed_tokens = ByteEmbedding(model.model.embed_tokens)
    model.lm_head = ByteLinear(model.lm_head, model.model.embed_tokens if embedding else None)
    return model


def test_dtype_device_and_ties_with_int8_weights(tmp_path):
    from safetensors.torch import load_file

    model = in_bytes()
    assert (
        model.model.embed_tokens.weight.dtype == torch.int8 and model.dtype == torch.float32
    )  # the first floating *parameter*
    model.tie_weights()
    for each in (model, copy.deepcopy(model)):
        assert (
            each.lm_head.weight is each.model.embed_tokens.weight
            and each.lm_head.weight_scale is each.model.embed_tokens.weight_scale
        )
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert not any("lm_head" in key for key in saved) and saved["model.embed_tokens.weight"].dtype == torch.int8


def test_limit_a_cast_parts_tied_scales_and_rounds_them():
    model = in_bytes().to(torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (
        model.lm_head.weight_scale is not model.model.embed_tokens.weight_scale
        and model.lm_head.weight_scale.dtype == torch.bfloat16
    )


def test_limit_tie_weights_writes_a_float_embedding_over_an_int8_head():
    model = in_bytes(embedding=False)
    model.tie_weights()  # the trainer, fsdp and resize_token_embeddings call it
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.dtype == torch.float32


def test_limit_resize_and_init_fail_on_int8():
    with pytest.raises(RuntimeError, match="floating point"):
        in_bytes().resize_token_embeddings(110)
    with pytest.raises(NotImplementedError, match="normal_kernel"):
        in_bytes().initialize_weights()


@pytest.mark.parametrize("config", [None, {"quant_method": "unknown"}])
def test_limit_an_int8_checkpoint_loads_silently_wrong_where_nobody_registered_the_method(config, tmp_path):
    model = in_bytes()
    if config:
        model.config.quantization_config = config
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)  # a warning in the log, no error
    assert loaded.model.embed_tokens.weight.abs().max() == 127 and loaded.dtype == torch.float32


def test_limit_lora_on_int8_trains_but_a_merge_raises_and_a_safe_merge_drops_the_adapter():
    peft = pytest.importorskip("peft")
    model, want = in_bytes(), run(in_bytes())
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    assert type(layer) is peft.tuners.lora.layer.Linear and layer.lora_A["default"].weight.dtype == torch.float32
    tensors(model(**inputs(model)))["logits.0"].sum().backward()
    assert layer.lora_B["default"].weight.grad is not None and not torch.equal(run(model)["logits.0"], want["logits.0"])
    with pytest.raises(RuntimeError, match="can't be cast"):
        copy.deepcopy(model).merge_and_unload()
    assert_same(run(model.merge_and_unload(safe_merge=True)), want)
