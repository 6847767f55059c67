"""KVCache as a user passes it: the tokens of transformers' own cache, whatever generation does to it between steps."""

import copy
import pickle

import architectures
import pytest
import torch
import transformers
from transformers import DynamicCache, EncoderDecoderCache

import fastinfer
from fastinfer import CacheError, KVCache
from fastinfer.ops import kv_attention
from fastinfer.ops.int8_quantize import reference as quantize
from fastinfer.ops.kv_attention import append, hadamard, transform_size

pytestmark = [pytest.mark.models, pytest.mark.filterwarnings("ignore:.past_key_values.:FutureWarning")]

GREEDY = dict(do_sample=False, max_new_tokens=20, min_new_tokens=20)
B, G, D = 2, 3, 16
KINDS = ("keep", "int8")


def states(t, b=B, dtype=torch.float32, device="cpu", g=G, d=D):
    return torch.randn(2, b, g, t, d, dtype=dtype, device=device).unbind(0)


def fill(cache, *counts, layers=2, **how):
    """Runs forwards of so many tokens; the keys and values so far of each layer, as plain concatenations."""
    held = [[torch.cat(parts, 2) for parts in zip(*(states(n, **how) for n in counts))] for _ in range(layers)]
    done = cache.filled
    for n in counts:
        for i, (k, v) in enumerate(held):
            cache.update(k[:, :, done : done + n], v[:, :, done : done + n], i)
        done += n
    return held


def dequantised(x, transformed):
    codes, scales = quantize(hadamard(x.float()) if transformed else x.float())
    if transformed:  # whole numbers, then one rounding
        codes, scales = hadamard(codes.double()).float(), scales / transform_size(x.shape[-1])
    return (codes * scales[..., None]).to(x.dtype)


def assert_holds(cache, held):
    for layer, pair in zip(cache.layers, held, strict=True):
        want = [dequantised(x, x is pair[0]) for x in pair] if cache.kind == "int8" else pair
        assert torch.equal(layer.keys, want[0]) and torch.equal(layer.values, want[1])
        assert layer.filled == layer.get_seq_length() == cache.filled == pair[0].shape[2]
    assert cache.lengths.tolist() == [cache.filled] * len(held[0][0])
    assert cache.lengths.dtype == torch.int32


# ------------------------------------------------------------------------------------------------ tokens of generate


@pytest.mark.parametrize("name", architectures.DECODERS)
@pytest.mark.parametrize("padding", (0, 3), ids=("whole", "padded"))
def test_generate(name, padding):
    model, given = architectures.build(name), architectures.inputs(name)
    given["attention_mask"][0, :padding] = 0
    for how in ({}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}):
        for cache in (KVCache(), KVCache(model.config, capacity=20)):
            want = model.generate(**given, **GREEDY, **how, past_key_values=DynamicCache(config=model.config))
            assert torch.equal(model.generate(**given, **GREEDY, **how, past_key_values=cache), want)
            assert (len(cache), cache.filled, cache.capacity) == (2, 28, 256)
            assert cache.lengths.tolist() == [28] * (2 * how.get("num_beams", 1))


@pytest.mark.parametrize("name", architectures.DECODERS)
def test_turns(name):
    """A conversation: each turn brings the whole text, the cache the part that was read. The window is passed too."""
    model, ids = architectures.build(name), architectures.inputs(name)["input_ids"]
    want, got, cache = ids, ids, KVCache()
    for _ in range(2):
        want = torch.cat([model.generate(want, do_sample=False, max_new_tokens=9, min_new_tokens=9), ids[:, :3]], 1)
        got = model.generate(got, do_sample=False, max_new_tokens=9, min_new_tokens=9, past_key_values=cache)
        assert cache.filled == got.shape[1] - 1
        got = torch.cat([got, ids[:, :3]], 1)
    assert torch.equal(got, want)


@pytest.mark.parametrize("attention", ("sdpa", "eager"))
@pytest.mark.parametrize("name", architectures.DECODERS)
@torch.no_grad()
def test_forward_in_parts(name, attention):
    """As in a loop of the user's own: logits of a prefill, of several tokens, and of one each."""
    model, ids = architectures.build(name), architectures.inputs(name, length=17)["input_ids"]
    model.set_attn_implementation(attention)
    cache, want = KVCache(), model(ids, use_cache=False).logits
    got = torch.cat([model(part, past_key_values=cache).logits for part in ids.split([11, 4, 1, 1], 1)], 1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ("assistant", "prompt_lookup"))
@pytest.mark.parametrize("name", ("llama", "mistral", "gpt2"))
def test_speculation(name, how):
    """What was drafted and not taken is cropped."""
    model, ids = architectures.build(name), architectures.inputs(name, batch=1)["input_ids"]
    if how == "assistant":
        torch.manual_seed(1)
        assistant = copy.deepcopy(model)
        for parameter in assistant.parameters():
            parameter.data += 0.3 * parameter.std() * torch.randn_like(parameter)
        drafts = {"assistant_model": assistant}
    else:
        ids, drafts = ids.repeat(1, 2), {"prompt_lookup_num_tokens": 3}
    cache = KVCache()
    cropped, crop = [], cache.crop
    cache.crop = lambda n: cropped.append(n) or crop(n)
    want = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY, **drafts, past_key_values=cache), want)
    assert min(cropped) < 0 and cache.filled == want.shape[1] - 1


@pytest.mark.parametrize("cross", (DynamicCache, KVCache))
def test_encoder_decoder(cross):
    model, given = architectures.build("t5"), architectures.inputs("t5")
    for how in ({}, {"num_beams": 3}):
        cache, want = EncoderDecoderCache(KVCache(), cross()), model.generate(**given, **GREEDY, **how)
        assert torch.equal(model.generate(**given, **GREEDY, **how, past_key_values=cache), want)
        assert cache.get_seq_length() == cache.self_attention_cache.filled == want.shape[1] - 1


def test_the_patched_model_takes_it():
    model, given = fastinfer.patch(architectures.build("llama"), weights="int8"), architectures.inputs("llama")
    assert torch.equal(model.generate(**given, **GREEDY, past_key_values=KVCache()), model.generate(**given, **GREEDY))


# -------------------------------------------------------------------------------------------------------------- int8


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_int8_holds_what_kv_attention_appends(device, dtype):
    cache = KVCache(kind="int8")
    held = fill(cache, 5, 1, dtype=dtype, device=device)
    assert_holds(cache, held)
    for layer, pair in zip(cache.layers, held):
        for side, new in zip("kv", (hadamard(pair[0].float()), pair[1])):
            codes, scales = getattr(layer, f"{side}_cache"), getattr(layer, f"{side}_scale")
            want, want_scales = torch.zeros_like(codes), torch.zeros_like(scales)
            append(new.transpose(1, 2), want, want_scales, torch.arange(6, device=device).expand(B, 6))
            assert torch.equal(codes[:, :, :6], want[:, :, :6]) and torch.equal(scales[:, :, :6], want_scales[:, :, :6])


@pytest.mark.parametrize("name", ("llama", "gemma3", "gpt2"))
@torch.no_grad()
def test_int8_logits(name):
    """Within a bound that scales which are five percent off break."""
    model, ids = architectures.build(name), architectures.inputs(name, length=33)["input_ids"]
    want = model(ids, use_cache=False).logits[:, -1]

    def error(factor):
        cache = KVCache(model.config, kind="int8")
        model(ids[:, :-1], past_key_values=cache)
        for layer in cache.layers:
            layer.k_scale *= factor
            layer.v_scale *= factor
        got = model(ids[:, -1:], past_key_values=cache).logits[:, -1]
        return ((got - want).norm() / want.norm()).item()

    assert error(1) < 0.01 < error(1.05)


# -------------------------------------------------------------------------------------------- beside the op that reads it


@pytest.mark.parametrize("kind", KINDS)
def test_kv_attention_goes_on_where_update_stopped(device, kind):
    """A step appends through the op, at `lengths`; the host's count and what `keys` gives follow."""
    by_op, by_update = KVCache(kind=kind), KVCache(kind=kind)
    held = fill(by_op, 7, device=device)
    for i, (k, v) in enumerate(held):
        by_update.update(k, v, i)
    mask = torch.ones(B, 8, dtype=torch.bool, device=device)
    mask[1, :2] = False
    by_op.set_padding(mask[:, :7])
    q = torch.randn(B, G * 2, 1, D, device=device)
    for i, layer in enumerate(by_op.layers):
        k, v = states(1, device=device)
        y = kv_attention(
            *(x.transpose(1, 2) for x in (q, k, v)),
            layer.k_cache,
            layer.v_cache,
            by_op.lengths,
            k_scale=layer.k_scale,
            v_scale=layer.v_scale,
            starts=by_op.starts,
        )
        keys, values = by_update.update(k, v, i)
        want = torch.nn.functional.scaled_dot_product_attention(
            q, keys, values, attn_mask=mask[:, None, None], enable_gqa=True
        )
        torch.testing.assert_close(y.transpose(1, 2), want)
    by_op.advance(1)
    by_op.set_lengths()
    for got, want in zip(by_op.layers, by_update.layers):
        assert torch.equal(got.keys, want.keys) and torch.equal(got.values, want.values)
    assert by_op.lengths.tolist() == by_update.lengths.tolist() == [8, 8]


# ----------------------------------------------------------------------------------------------------- size and memory


@pytest.mark.parametrize("kind", KINDS)
def test_grows(kind, poisoned):
    """By what a prefill needs, then by doubling, in the end by 4,096; the contents stay."""
    cache, capacities = KVCache(kind=kind), []
    held = fill(cache, 300, layers=1, b=1, g=1, d=8)
    while cache.capacity < 17_000:
        capacities.append(cache.capacity)
        k, v = states(cache.capacity - cache.filled + 1, b=1, g=1, d=8)
        cache.update(k, v, 0)
        held[0] = [torch.cat([old, new], 2) for old, new in zip(held[0], (k, v))]
    assert capacities == [512, 1024, 2048, 4096, 8192, 12288, 16384]
    assert_holds(cache, held)


def test_growth_goes_layer_by_layer():
    """A forward moves one buffer at a time, not all before the first is freed."""
    cache = KVCache()
    fill(cache, 256)
    cache.update(*states(1), 0)
    assert [layer.k_cache.shape[2] for layer in cache.layers] == [512, 256]
    assert (cache.capacity, cache.filled, cache.lengths.tolist()) == (512, 257, [257, 257])
    assert cache.get_seq_length(1) == 256 and cache.get_mask_sizes(1, 1) == (257, 0)  # as T5 asks, within a forward
    cache.update(*states(1), 1)
    assert [layer.v_cache.shape[2] for layer in cache.layers] == [512, 512]


@pytest.mark.parametrize("kind", KINDS)
def test_reserve(kind, poisoned):
    cache = KVCache(kind=kind, capacity=1)
    assert cache.capacity == 256
    held = fill(cache, 9)
    cache.reserve(257)
    assert [layer.v_cache.shape[2] for layer in cache.layers] == [512, 512] and cache.capacity == 512
    assert_holds(cache, held)
    at = [layer.k_cache.data_ptr() for layer in cache.layers]
    cache.reserve(5)
    fill(cache, 503)
    assert cache.capacity == 512 and at == [layer.k_cache.data_ptr() for layer in cache.layers]


def test_keep_returns_views():
    cache = KVCache()
    for n in (5, 1):
        keys, values = cache.update(*states(n), 0)
        assert keys.data_ptr() == cache.layers[0].k_cache.data_ptr()
        assert values.data_ptr() == cache.layers[0].v_cache.data_ptr()


def test_memory_goes_with_the_last_reference():
    """No cycle that waits for the collector."""
    import gc
    import weakref

    cache = KVCache()
    fill(cache, 3)
    layer = weakref.ref(cache.layers[0])
    gc.disable()
    try:
        del cache
        assert layer() is None
    finally:
        gc.enable()


def test_early_initialization():
    cache = KVCache(architectures.build("llama").config, capacity=300)
    cache.early_initialization(B, G, D, torch.bfloat16, torch.device("cpu"))
    assert cache.is_initialized and cache.layers[1].k_cache.shape == (B, G, 512, D)
    assert cache.lengths.tolist() == [0, 0]


# --------------------------------------------------------------------------------------- what generation does between


@pytest.mark.parametrize("kind", KINDS)
def test_crop(kind):
    cache = KVCache(kind=kind)
    held = fill(cache, 9)
    lengths = cache.lengths
    cache.crop(0)
    assert_holds(cache, held)
    cache.crop(-4)
    assert_holds(cache, [[x[:, :, :5] for x in pair] for pair in held])
    for layer in cache.layers:
        layer.crop(-1)
    assert_holds(cache, [[x[:, :, :4] for x in pair] for pair in held])
    for i, (k, v) in enumerate(held):
        cache.update(k[:, :, 4:], v[:, :, 4:], i)
    assert_holds(cache, held)
    assert cache.lengths is lengths
    for wrong in (-10, 1):
        with pytest.raises(CacheError, match=f"tokens_to_remove must be .* got {wrong}"):
            cache.crop(wrong)
    assert_holds(cache, held)


def test_crop_after_a_forward_that_broke_off():
    """The layers that had been written lose the tokens, the others never had them."""
    cache = KVCache()
    held = fill(cache, 9)
    cache.update(*states(4), 0)
    cache.crop(-2)
    assert [layer.filled for layer in cache.layers] == [11, 9]  # what was not written does not count
    cache.crop(-2)
    assert_holds(cache, held)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "change, rows, moves",
    [
        (lambda c: c.reorder_cache(torch.tensor([1, 1])), [1, 1], False),
        (lambda c: c.reorder_cache(torch.tensor([1, 0])), [1, 0], False),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1], True),
        (lambda c: c.batch_select_indices(torch.tensor([1])), [1], True),
        (lambda c: c.batch_select_indices(torch.tensor([False, True])), [1], True),
        (lambda c: c.batch_select_indices(torch.tensor([1, 0, 1])), [1, 0, 1], True),
    ],
    ids=("one-beam", "swap", "repeat", "select", "mask", "more"),
)
def test_rows(kind, change, rows, moves):
    cache = KVCache(kind=kind)
    held = fill(cache, 9)
    cache.set_padding(torch.arange(9) >= torch.tensor([[0], [2]]))
    at = [x.data_ptr() for x in (cache.layers[0].k_cache, cache.layers[1].v_cache, cache.lengths, cache.starts)]
    change(cache)
    assert_holds(cache, [[x[rows] for x in pair] for pair in held])
    assert cache.starts.tolist() == [[0, 2][row] for row in rows] and cache.batch_size == len(rows)
    now = [x.data_ptr() for x in (cache.layers[0].k_cache, cache.layers[1].v_cache, cache.lengths, cache.starts)]
    assert moves or now == at


@pytest.mark.parametrize("kind", KINDS)
def test_reset(kind):
    cache = KVCache(kind=kind)
    fill(cache, 9)
    cache.set_padding(torch.arange(9) >= torch.tensor([[0], [2]]))
    at = cache.layers[1].v_cache.data_ptr()
    cache.reset()
    assert (cache.filled, cache.get_seq_length(), cache.lengths.tolist(), cache.starts) == (0, 0, [0, 0], None)
    assert cache.layers[0].keys.shape == cache.layers[0].values.shape == (B, G, 0, D)
    assert_holds(cache, fill(cache, 5))
    assert at == cache.layers[1].v_cache.data_ptr()
    cache.reset()
    assert_holds(cache, fill(cache, 5, b=3, dtype=torch.bfloat16))


def test_padding():
    cache = KVCache()
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
    cache.set_padding(mask)
    assert cache.starts.tolist() == [2, 0, 4] and cache.starts.dtype == torch.int32
    for wrong in ([[1, 0, 1]], [[1, 1, 0]]):
        with pytest.raises(CacheError, match="attention_mask must be padded on the left"):
            cache.set_padding(torch.tensor(wrong))
    assert cache.starts.tolist() == [2, 0, 4]
    for none in (None, torch.ones(3, 4)):
        cache.set_padding(mask)
        cache.set_padding(none)
        assert cache.starts is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("twin", (copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))), ids=("deepcopy", "pickle"))
def test_twins(kind, twin):
    """A prompt's cache is copied to be continued twice: neither sees what the other does."""
    cache = KVCache(kind=kind)
    held = fill(cache, 9)
    other = twin(cache)
    more = [states(3) for _ in held]
    for i, (k, v) in enumerate(more):
        other.update(k, v, i)
    assert_holds(cache, held)
    assert_holds(other, [[torch.cat(x, 2) for x in zip(old, new)] for old, new in zip(held, more)])
    other.update(*states(12), 2)  # a new layer has the copy's count and capacity, not the original's
    assert other.layers[2].shared is other.layers[0].shared is not cache.layers[0].shared


def test_looks_like_transformers_cache():
    cache = KVCache()
    assert (len(cache), cache.get_seq_length(), cache.get_max_length(), cache.batch_size) == (0, 0, -1, -1)
    assert cache.get_mask_sizes(5, 0) == (5, 0) and not cache.is_initialized and cache.lengths is None
    held = fill(cache, 5)
    assert (len(cache), cache.batch_size, cache.get_max_length(), cache.get_max_length(1)) == (2, 2, -1, -1)
    assert cache.is_initialized and not cache.is_compileable and cache.is_sliding == [False, False]
    for (keys, values, window), (k, v) in zip(cache, held, strict=True):
        assert torch.equal(keys, k) and torch.equal(values, v) and window is None
    assert repr(cache) == "KVCache(kind='keep', layers=2, filled=5, capacity=256)"


def test_inference_mode_leaves_nothing_that_cannot_be_written():
    model, ids = architectures.build("llama"), architectures.inputs("llama")["input_ids"]
    cache = KVCache(kind="int8")
    with torch.inference_mode():
        model(ids[:, :4], past_key_values=cache)
    with torch.no_grad():
        model(ids[:, 4:], past_key_values=cache)
    with torch.inference_mode():
        cache.set_padding(torch.arange(9) >= torch.tensor([[0], [2]]))
        cache.batch_repeat_interleave(2)
        cache.reserve(257)
    with torch.no_grad():
        model(ids.repeat_interleave(2, 0), past_key_values=cache)
        cache.reorder_cache(torch.tensor([3, 2, 1, 0]))
    assert cache.filled == 18 and cache.starts.tolist() == [2, 2, 0, 0]


# ------------------------------------------------------------------------------------------------------------ refusals


def test_gradients():
    """A forward with gradients on is what it is without; a backward through it is refused, not wrong."""
    model, ids = architectures.build("llama"), architectures.inputs("llama")["input_ids"]
    cache = KVCache()
    parts = [model(part, past_key_values=cache).logits for part in ids.split([5, 4], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, rtol=1e-4, atol=1e-4)
    assert not cache.layers[0].k_cache.requires_grad
    for part in parts:  # the first too, which the second has written beside
        with pytest.raises(CacheError, match="holds no gradients"):
            part.sum().backward()


@pytest.mark.parametrize(
    "new, match",
    [
        (
            lambda: states(1, b=3),
            r"key_states must be float32 \[2, 3, T, 16\] .* 5 positions .* batch_repeat_interleave",
        ),
        (lambda: states(1, g=1), r"key_states must be float32 \[2, 3, T, 16\]"),
        (lambda: states(1, d=8), r"key_states must be float32 \[2, 3, T, 16\]"),
        (lambda: states(1, dtype=torch.bfloat16), r"key_states must be float32"),
        (lambda: (states(1)[0], states(2)[0]), r"value_states must be \[B, G, T, ·\] beside"),
        (lambda: (states(1)[0], states(1)[0].half()), r"value_states must be"),
        (lambda: (states(1)[0][0], states(1)[0]), r"key_states must be \[B, G, T, D\]"),
        (lambda: (states(1)[0].int(), states(1)[0]), r"key_states must be \[B, G, T, D\] floating point"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_states_that_do_not_fit(kind, new, match):
    cache = KVCache(kind=kind)
    held = fill(cache, 5)
    with pytest.raises(CacheError, match=match):
        cache.update(*new(), 0)
    assert_holds(cache, held)


def test_bad_arguments():
    with pytest.raises(CacheError, match="kind must be one of 'keep', 'int8', got 'int4'"):
        KVCache(kind="int4")
    with pytest.raises(CacheError, match="config must be a transformers configuration or None, got list"):
        KVCache([])
    for wrong in (-1, 2.0, True):
        with pytest.raises(CacheError, match="capacity must be a whole number"):
            KVCache(capacity=wrong)
    cache = KVCache()
    fill(cache, 250)
    with pytest.raises(CacheError, match="positions must be a whole number"):
        cache.reserve(-1)
    with pytest.raises(CacheError, match="n must be at most 6, the room left in 256 positions, got 7"):
        cache.advance(7)
    with pytest.raises(CacheError, match=r"attention_mask must be \[2, positions\] or None, got int64 \[3, 5\]"):
        cache.set_padding(torch.ones(3, 5, dtype=torch.int64))
    with pytest.raises(CacheError, match=r"fp32\|bf16\|fp16"):
        KVCache(kind="int8").update(*states(1, dtype=torch.float64), 0)
    padded = KVCache()
    padded.set_padding(torch.ones(3, 5).triu())
    with pytest.raises(CacheError, match="key_states must have 3 rows"):
        padded.update(*states(5), 0)
    assert (cache.capacity, cache.filled, padded.capacity, cache.starts) == (256, 250, 0, None)


def test_offloading_is_refused():
    cache = KVCache()
    held = fill(cache, 5)
    for call in (
        lambda: cache.offload(0),
        lambda: cache.prefetch(0),
        *(cache.layers[0].offload, cache.layers[0].prefetch),
    ):
        with pytest.raises(CacheError, match="cannot be offloaded"):
            call()
    assert_holds(cache, held)


def test_layers_without_attention_are_refused():
    config = transformers.Qwen3NextConfig(num_hidden_layers=4)
    with pytest.raises(CacheError, match=r"got linear_attention: .* DynamicCache"):
        KVCache(config)
