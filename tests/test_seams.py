"""The seams of transformers, PEFT, accelerate and torch that `fastinfer.patch` stands on, held by a patch that changes nothing.

The identity patch below does to a model what `fastinfer.patch` does, less the speed: linears are swapped for a subclass of
their own class, blocks keep their module and get a forward on the instance, `generate` is wrapped on the instance and passes
`custom_generate=`. Everything a user does with a model has to come through it unchanged. A test whose name starts with
`test_limit_` asserts what does NOT hold: when one fails, a limit has moved, and CONTRIBUTING.md ("Seams") wants an edit.
"""

import copy
import functools
import inspect
import pickle
import types

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
from transformers.generation.utils import GENERATION_MODES_MAPPING, GenerationMixin  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

# ---------------------------------------------------------------------------------------------- the identity patch

HOOKS = [name for name in nn.Module().__dict__ if name.endswith("_hooks") or "_hooks_" in name] + ["_is_full_backward_hook"]


class Same:
    """Mixin of a linear that does nothing new, built around the tensors of the module it replaces."""

    @classmethod
    def of(cls, old):
        new = cls.__new__(cls)  # no __init__: it would allocate and fill a second weight
        nn.Module.__init__(new)
        for name in HOOKS:  # shared, not copied: handles hold a weak reference to the very dictionary
            new.__dict__[name] = old.__dict__[name]
        for name, value in old.__dict__.items():
            if name not in new.__dict__ and name not in ("forward", "_old_forward", "_hf_hook"):
                new.__dict__[name] = value
        new._parameters.update(old._parameters)  # the same Parameter objects: ties between modules hold
        new._buffers.update(old._buffers)
        new.training = old.training
        new.__dict__["_seam"] = (old,)  # in a tuple, so that it is no child; on the module, so that deepcopy takes it along
        return new


class SameLinear(Same, nn.Linear):
    pass


class SameConv1D(Same, Conv1D):
    pass


SWAPS = {nn.Linear: SameLinear, Conv1D: SameConv1D}  # by exact type: a subclass (parametrised, LoRA's) has a reason to be one


def move_hook(source, target):
    """Give accelerate's hook, which lives in attributes of the instance, to the module that takes `source`'s place."""
    hook = source.__dict__.get("_hf_hook")
    if hook is not None:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        remove_hook_from_module(source)
        source.__dict__.pop("forward", None)
        add_hook_to_module(target, hook)


def offloaded(module):
    hook = module.__dict__.get("_hf_hook")
    return any(getattr(each, "offload", False) for each in getattr(hook, "hooks", [hook]))


def same_forward(self, *args, **kwargs):
    return type(self).forward(self, *args, **kwargs)


def override(module):
    """A forward of the instance's own; below accelerate's where that was there first."""
    slot = "_old_forward" if "_hf_hook" in module.__dict__ else "forward"
    setattr(module, slot, functools.partial(same_forward, module))  # a partial: deepcopy rebinds it and pickle keeps it


def restore(module):
    """Undo `override`, wherever accelerate has moved it since."""
    for slot in ("forward", "_old_forward"):
        if getattr(module.__dict__.get(slot), "func", None) is same_forward:
            delattr(module, slot)
            if slot == "_old_forward":
                module._old_forward = types.MethodType(type(module).forward, module)


def decode(model, input_ids, logits_processor=None, stopping_criteria=None, generation_config=None, **kwargs):
    """What `custom_generate=` gets: here every decoding mode goes on to transformers' own method."""
    model.__dict__["_decoded"] = model.__dict__.get("_decoded", 0) + 1
    method = getattr(type(model), GENERATION_MODES_MAPPING[generation_config.get_generation_mode()])
    return method(model, input_ids, logits_processor, stopping_criteria, generation_config=generation_config, **kwargs)


def same_generate(self, *args, **kwargs):
    """A callable `custom_generate` costs these arguments (see the limits below): they go to transformers untouched."""
    keep = ("custom_generate", "assistant_model", "assistant_tokenizer", "tokenizer", "synced_gpus")
    if not any(kwargs.get(name) is not None for name in keep):
        streamer = kwargs.get("streamer")
        kwargs["custom_generate"] = functools.partial(decode, streamer=streamer) if streamer is not None else decode
    return type(self).generate(self, *args, **kwargs)


def patch(model):
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if type(child) in SWAPS:
                if offloaded(child):
                    raise ValueError(f"{name} is offloaded by accelerate")
                module._modules[name] = new = SWAPS[type(child)].of(child)
                move_hook(child, new)
        if isinstance(module, nn.ModuleList):
            for block in module:
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
                (old,) = child.__dict__["_seam"]
                module._modules[name] = old
                old._parameters.update(child._parameters)
                old.training = child.training
                move_hook(child, old)
        for name in ("generate", "_decoded"):
            module.__dict__.pop(name, None)
    return model


# ------------------------------------------------------------------------------------------------------ tiny models

DECODER = dict(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
               head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
ENCODER = dict(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
MODELS = {
    "bert": ("BertModel", "BertConfig", ENCODER),
    "distilbert": ("DistilBertModel", "DistilBertConfig", dict(vocab_size=99, dim=32, hidden_dim=48, n_layers=2, n_heads=4)),
    "deberta": ("DebertaV2Model", "DebertaV2Config", dict(ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"])),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", dict(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)),
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", dict(DECODER, sliding_window=4, layer_types=["sliding_attention", "full_attention"])),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", dict(DECODER, **EXPERTS)),
    "t5": ("T5ForConditionalGeneration", "T5Config", dict(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                                                          decoder_start_token_id=0, pad_token_id=0, eos_token_id=2)),
}  # fmt: skip
GENERATIVE = ["gpt2", "llama", "gemma3", "qwen3_moe", "t5"]
IDS = torch.randint(3, 99, (2, 7), generator=torch.Generator().manual_seed(1))


def tiny(name, **config):
    model_class, config_class, settings = MODELS[name]
    torch.manual_seed(0)
    settings = dict(settings, attn_implementation="eager", **config)
    return getattr(transformers, model_class)(getattr(transformers, config_class)(**settings)).eval()


def inputs(model):
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    batch = dict(input_ids=IDS, attention_mask=mask)
    return dict(batch, decoder_input_ids=IDS[:, :4]) if model.config.is_encoder_decoder else batch


def flat(output):
    """Every tensor of a model's output but the cache, by its path."""
    found = {}
    for key, value in output.items():
        for i, tensor in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(tensor, torch.Tensor):
                found[f"{key}.{i}"] = tensor
    return found


def assert_same(got, want):
    assert got.keys() == want.keys()
    for key in want:
        assert torch.equal(got[key], want[key]), key


def run(model, **kwargs):
    with torch.no_grad():
        return flat(model(**inputs(model), **kwargs))


def picture(model):
    """What undo has to give back: which module sits where, and which attributes each one has."""
    return {name: (module, set(module.__dict__)) for name, module in model.named_modules()}


def targets(model):
    return sorted({name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and "lm_head" not in name})


every_model = pytest.mark.parametrize("name", MODELS)
every_generator = pytest.mark.parametrize("name", GENERATIVE)

# ------------------------------------------------------------------------------------------------ outputs and undo


@every_model
def test_recorded_outputs(name):
    model = tiny(name)
    wanted = dict(output_hidden_states=True, output_attentions=True)
    if name == "qwen3_moe":
        wanted["output_router_logits"] = True
    want = run(tiny(name), **wanted)
    assert any("hidden_states" in key for key in want) and any("attentions" in key for key in want)
    assert_same(run(patch(model), **wanted), want)  # recorders installed after the patch
    assert_same(run(patch(unpatch(model)), **wanted), want)  # and before it


@every_model
def test_undo_gives_back_the_same_modules_and_leaves_no_attribute(name):
    model = tiny(name)
    before, want = picture(model), run(model)
    assert any(isinstance(module, Same) for module in patch(model).modules())
    run(model)
    assert picture(unpatch(model)) == before
    assert_same(run(model), want)


@every_model
def test_state_dict_and_ties(name):
    model, original = tiny(name), tiny(name)
    patch(model)
    want, got = original.state_dict(), model.state_dict()
    assert list(got) == list(want) and list(dict(model.named_parameters())) == list(dict(original.named_parameters()))
    assert_same(got, want)
    model.load_state_dict({key: value + 1 for key, value in want.items()})
    assert_same(unpatch(model).state_dict(), {key: value + 1 for key, value in want.items()})


@every_model
def test_deepcopy_is_independent(name):
    model = patch(tiny(name))
    want = run(model)
    twin = copy.deepcopy(model)
    assert not {id(m) for m in twin.modules()} & {id(m) for m in model.modules()}
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert_same(run(model), want)
    assert any(not torch.equal(a, b) for a, b in zip(run(twin).values(), want.values(), strict=True))  # runs on its own weights
    for block in (m for m in twin.modules() if "forward" in m.__dict__):
        assert block.forward.args == (block,)
    assert not any(isinstance(m, Same) for m in unpatch(twin).modules())
    assert any(isinstance(m, Same) for m in model.modules())


@every_model
def test_save_and_load(name, tmp_path):
    model = tiny(name)
    want, kind = run(model), type(model)
    patch(model).save_pretrained(tmp_path)
    loaded, info = kind.from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not any(info[key] for key in info if key.endswith("_keys")), info
    assert loaded.config.architectures == [kind.__name__] and type(model) is kind
    assert_same(run(loaded.eval()), want)


@every_generator
def test_pickle(name):
    model = patch(tiny(name))
    twin = pickle.loads(pickle.dumps(model))
    assert_same(run(twin), run(model))
    assert twin.generate.args == (twin,) and twin.generate.func is same_generate
    assert all(m.forward.args == (m,) for m in twin.modules() if "forward" in m.__dict__)


def test_limit_a_bound_method_as_forward_does_not_survive_pickle():
    model = tiny("bert")
    model.pooler.forward = types.MethodType(same_forward, model.pooler)  # pickled as a name to look up on the half-built copy
    with pytest.raises(AttributeError, match="same_forward"):
        pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_hooks_of_the_user(name):
    model, calls = tiny(name), []
    where = next(key for key, module in model.named_modules() if type(module) in SWAPS)
    linear = model.get_submodule(where)
    handles = [linear.register_forward_pre_hook(lambda m, args: calls.append("pre before"))]
    handles += [linear.register_forward_hook(lambda m, args, kwargs, out: calls.append("before"), with_kwargs=True)]
    new = patch(model).get_submodule(where)
    handles += [new.register_forward_hook(lambda m, args, out: calls.append("after")), new.register_full_backward_hook(lambda m, i, o: calls.append("backward"))]
    next(iter(flat(model(**inputs(model))).values())).sum().backward()
    assert calls == ["pre before", "before", "after", "backward"]
    handles.pop(0).remove()
    assert unpatch(model).get_submodule(where) is linear
    calls.clear()
    run(model)
    assert calls == ["before", "after"]
    for handle in handles:
        handle.remove()
    assert not any(linear.__dict__[hooks] for hooks in HOOKS if hooks.endswith("_hooks"))


def test_limit_a_hook_sees_the_new_module_not_the_one_it_was_registered_on():
    model, seen = tiny("bert"), []
    model.pooler.dense.register_forward_hook(lambda module, args, out: seen.append(type(module)))
    run(patch(model))
    assert seen == [SameLinear]


def test_limit_a_parametrised_linear_is_another_class():
    model = tiny("bert")
    nn.utils.parametrizations.weight_norm(model.pooler.dense)
    assert type(patch(model).pooler.dense).__name__ == "ParametrizedLinear"  # not matched by exact type, hence left alone
    assert "weight" not in model.pooler.dense._parameters


# ------------------------------------------------------------------------------------------------------------- PEFT


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "gemma3", "t5"])
@pytest.mark.parametrize("first", ["patch", "peft"])
def test_lora(name, first):
    peft = pytest.importorskip("peft")

    def lora(model):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules=targets(model), init_lora_weights=False)
        wrapped = peft.get_peft_model(model, config)
        wrapped.add_adapter("other", config)
        return wrapped.eval()

    def passes(model):
        """Outputs of each adapter and of none, and the gradients of the first adapter."""
        found = {}
        for adapter in ("other", "default"):
            model.set_adapter(adapter)
            found |= {f"{adapter}.{key}": value for key, value in run(model).items()}
        with model.disable_adapter():
            found |= {f"none.{key}": value for key, value in run(model).items()}
        model.zero_grad()
        next(iter(flat(model(**inputs(model))).values())).sum().backward()
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


# ------------------------------------------------------------------------------------------------------- accelerate


def dispatched(model):
    accelerate = pytest.importorskip("accelerate")
    places = {name: "cpu" for name, _ in model.named_children()}
    return accelerate.dispatch_model(model, places, main_device="cpu", force_hooks=True)


@every_model
def test_accelerate_hooks_before_the_patch(name):
    model = dispatched(tiny(name))
    assert any("_hf_hook" in m.__dict__ for m in model.modules() if type(m) in SWAPS)
    want, before = run(model), picture(model)
    assert_same(run(patch(model)), want)
    for module in model.modules():
        if isinstance(module, Same):
            assert module._hf_hook is not None and module.forward.args == (module,) and "_hf_hook" not in module._seam[0].__dict__
    assert_same(run(copy.deepcopy(model)), want)
    assert picture(unpatch(model)) == before
    assert_same(run(model), want)


@every_model
def test_accelerate_hooks_after_the_patch(name):
    from accelerate.hooks import remove_hook_from_module

    model = tiny(name)
    want = run(model)
    dispatched(patch(model))
    assert_same(run(model), want)
    assert_same(run(unpatch(model)), want)
    assert not any(getattr(m.__dict__.get(slot), "func", None) is same_forward for m in model.modules() for slot in ("forward", "_old_forward"))
    remove_hook_from_module(patch(model), recurse=True)
    assert_same(run(unpatch(model)), want)
    assert not any("_hf_hook" in m.__dict__ for m in model.modules())


def test_device_map_on_load(tmp_path):
    pytest.importorskip("accelerate")
    tiny("llama").save_pretrained(tmp_path)
    want = run(tiny("llama"))
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path, device_map="cpu", attn_implementation="eager")
    assert_same(run(patch(model)), want)
    assert_same(run(unpatch(model)), want)


def test_offload_is_seen():
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(tiny("llama"), "cpu")
    assert model.model.layers[0].mlp.up_proj.weight.device.type == "meta"
    with pytest.raises(ValueError, match="is offloaded by accelerate"):
        patch(model)


# --------------------------------------------------------------------------------------------------------- generate

MODES = {
    "greedy": dict(do_sample=False),
    "sample": dict(do_sample=True, top_k=20),
    "beams": dict(num_beams=3, num_return_sequences=2),
    "beam_sample": dict(num_beams=2, do_sample=True),
    "static": dict(do_sample=False, cache_implementation="static"),
    "scores": dict(do_sample=False, output_scores=True, output_hidden_states=True, return_dict_in_generate=True),
}


def generated(model, **kwargs):
    torch.manual_seed(3)
    batch = {key: value for key, value in inputs(model).items() if not key.startswith("decoder")}
    out = model.generate(**batch, max_new_tokens=6, **kwargs)
    return {"ids": out.sequences, "scores": torch.stack(out.scores), "hidden": out[-2 if "past" in list(out)[-1] else -1][-1][-1]} if hasattr(out, "sequences") else {"ids": out}


@every_generator
@pytest.mark.parametrize("mode", MODES)
def test_generate(name, mode):
    if (name, mode) == ("qwen3_moe", "static"):
        pytest.skip("slow: experts compile")
    model = tiny(name)
    want = generated(model, **MODES[mode])
    assert_same(generated(patch(model), **MODES[mode]), want)
    assert model._decoded == 1
    assert_same(generated(unpatch(model), **MODES[mode]), want)
    assert "generate" not in model.__dict__


class Collect:
    def __init__(self):
        self.ids, self.ended = [], False

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        self.ended = True


def greedy(model, **kwargs):
    return model.generate(IDS[:1], max_new_tokens=5, do_sample=False, **kwargs)


def test_generate_with_a_streamer_an_assistant_and_stop_strings():
    model, tokenizer = tiny("llama"), tiny_tokenizer()
    want, streamer = greedy(model), Collect()
    stop = dict(stop_strings=[tokenizer.decode(want[0, 8])], tokenizer=tokenizer)
    stopped = greedy(model, **stop)
    patch(model)
    assert torch.equal(greedy(model, streamer=streamer), want)
    assert streamer.ids == want[0].tolist() and streamer.ended
    assert torch.equal(greedy(model, assistant_model=tiny("llama")), want)
    assert torch.equal(greedy(model, **stop), stopped) and stopped.shape < want.shape
    assert model._decoded == 1  # the assistant and the stop strings went to transformers' own


def test_limit_a_callable_custom_generate_loses_streamer_tokenizer_and_assistant():
    model, streamer, tokenizer = tiny("llama"), Collect(), tiny_tokenizer()
    seen = {}

    def spy(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        seen.update(kwargs)
        return input_ids

    greedy(model, streamer=streamer, assistant_model=tiny("llama"), custom_generate=spy)
    assert not {"streamer", "assistant_model", "synced_gpus"} & seen.keys()
    assert streamer.ids == IDS[0].tolist() and not streamer.ended  # generate() itself put the prompt, nobody the rest
    with pytest.raises(ValueError, match="tokenizer"):
        greedy(model, stop_strings=["a"], tokenizer=tokenizer, custom_generate=spy)


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
    config = peft.LoraConfig(r=2, target_modules=targets(tiny(name)), init_lora_weights=False, task_type="SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM")
    torch.manual_seed(1)
    want = generated(peft.get_peft_model(tiny(name), config).eval())
    torch.manual_seed(1)
    model = peft.get_peft_model(patch(tiny(name)), config).eval()
    assert_same(generated(model), want)
    assert model.get_base_model()._decoded == 1


# --------------------------------------------------------------------------------- pipeline and sentence-transformers


def tiny_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "<s>", "</s>", "[UNK]", *(f"w{i}" for i in range(94)), "abcdef"]  # the last is what StopStringCriteria probes with
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", bos_token="<s>", eos_token="</s>",
                                                unk_token="[UNK]", padding_side="left", model_max_length=64)  # fmt: skip


@pytest.mark.parametrize("task, name", [("text-generation", "llama"), ("text-generation", "gpt2"), ("feature-extraction", "bert")])
def test_pipeline(task, name):
    model, texts = tiny(name), ["w1 w2 w3", "w4 w5"]
    options = dict(max_new_tokens=4, do_sample=False) if task == "text-generation" else {}
    pipe = transformers.pipeline(task, model=model, tokenizer=tiny_tokenizer())
    want = pipe(texts, batch_size=2, **options)
    patch(model)  # below a pipeline that exists
    assert pipe(texts, batch_size=2, **options) == want
    assert transformers.pipeline(task, model=model, tokenizer=tiny_tokenizer())(texts, batch_size=2, **options) == want
    assert model.__dict__.get("_decoded", 2 if task == "feature-extraction" else 0) == 2


def test_sentence_transformer(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    tiny("bert").save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    model = sentence_transformers.SentenceTransformer(str(tmp_path / "bert"), device="cpu")
    want = model.encode(["w1 w2 w3", "w4"])
    patch(model)
    assert any(isinstance(m, Same) for m in model.modules())
    assert (model.encode(["w1 w2 w3", "w4"]) == want).all()
    model.save_pretrained(str(tmp_path / "saved"))
    assert (sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(["w1 w2 w3", "w4"]) == want).all()
    assert (unpatch(model).encode(["w1 w2 w3", "w4"]) == want).all()


# ---------------------------------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "gemma3", "t5"])
def test_compile(name):
    def compiled(model):
        torch._dynamo.reset()
        with torch.no_grad():
            return flat(torch.compile(model, backend="eager", fullgraph=True)(**inputs(model), use_cache=False) if name != "bert" else torch.compile(model, backend="eager", fullgraph=True)(**inputs(model)))

    assert_same(compiled(patch(tiny(name))), compiled(tiny(name)))


def test_compiled_before_the_patch():
    model = tiny("llama")
    want = run(model)
    model.compile(backend="eager")
    run(model)
    patch(model)
    model.model.layers[0].mlp.up_proj.forward = lambda x: 1 / 0  # the new module runs, not the graph of the old
    with pytest.raises(Exception, match="division by zero"):
        run(model)
    assert_same(run(unpatch(model)), want)


# ------------------------------------------------------------------------------------- a Conv1D that becomes a linear


def as_linears(model):
    """GPT-2's Conv1D as linears over the transposed view of the same memory."""
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if type(child) is Conv1D:
                new = SameLinear.__new__(SameLinear)
                nn.Module.__init__(new)
                new.in_features, new.out_features = child.weight.shape
                new.weight, new.bias = nn.Parameter(child.weight.detach().T), child.bias
                module._modules[name] = new
    return model


def test_limit_a_conv1d_that_becomes_a_linear_turns_its_weight_in_the_state_dict(tmp_path):
    model, original = as_linears(tiny("gpt2")), tiny("gpt2")
    for key, value in run(original).items():
        torch.testing.assert_close(run(model)[key], value)
    key = "transformer.h.0.mlp.c_fc.weight"
    assert model.state_dict()[key].shape == original.state_dict()[key].T.shape
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatch"):
        type(original).from_pretrained(tmp_path)


def test_lora_takes_a_conv1d_that_became_a_linear():
    peft = pytest.importorskip("peft")
    with pytest.warns(UserWarning, match="fan_in_fan_out") as caught:
        model = peft.get_peft_model(as_linears(tiny("gpt2")), peft.LoraConfig(fan_in_fan_out=True, task_type="CAUSAL_LM"))
    assert caught and model.base_model.model.transformer.h[0].attn.c_attn.lora_A["default"].in_features == 32
