"""Files of plans, what of them reaches the CUDA library, and the tuner; on a GPU see test_tile_plans.py."""

from __future__ import annotations

import contextlib
import functools
import json
import subprocess
import sys
import warnings

import architectures
import pytest
import torch

from fastinfer import _native, cli
from fastinfer.ops import _common
from fastinfer.timing import copies
from fastinfer.tuning import plans, tuner, weights
from fastinfer.tuning.plans import Device, Kernel, Plan, PlanFileError, Plans, PlanWarning, Row, Weight

H100 = Device("NVIDIA H100 80GB HBM3", 90, 132)
W4, W8 = Weight("w4a16", 128, 4096, 4096), Weight("w8a16", 0, 4096, 4096)
DECODE, WGMMA = Plan("decode", 2, "16-half"), Plan("wgmma", 1, "64x256")
KERNELS = {"decode": Kernel(1, 8, ("16-half", "16-whole")), "wgmma": Kernel(2, 4, ("32x256", "64x256"))}


# --- files


def test_a_file_reads_back_as_it_was_written(tmp_path):
    path = tmp_path / "new" / "plans.json"
    rows = [Row(W8, 16, WGMMA, {"us": 5.25}), Row(W4, 64, Plan()), Row(W4, 8, DECODE, {"us": 3.5, "chained_us": 3.0})]
    plans.write(path, Plans(H100, rows))
    assert plans.read(path) == Plans(H100, [rows[2], rows[1], rows[0]])
    assert len(path.read_text().splitlines()) == 11  # a row a line
    plans.write(path, Plans(H100, []))
    assert plans.read(path) == Plans(H100, [])
    assert [p.name for p in path.parent.iterdir()] == ["plans.json"]


def good() -> dict:
    row = {"kind": "w4a16", "group": 128, "n": 4096, "k": 4096, "m": 8, "kernel": "decode", "ranks": 2, "shape": "a"}
    head = {"device": "a GPU", "capability": "9.0", "multiprocessors": 132, "fastinfer": "0.1.0"}
    return {**head, "rows": [row]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": 1}, "device must be a string"),
        ({"capability": 9.0}, "capability must be a string"),
        ({"capability": "9"}, 'capability must be a string such as "9.0"'),
        ({"multiprocessors": True}, "multiprocessors must be a whole number"),
        ({"multiprocessors": 0}, "multiprocessors must be a whole number from 1 to 2147483647, got 0"),
        ({"multiprocessors": 2**31}, "multiprocessors must be a whole number"),
        ({"rows": {}}, "rows must be a list"),
        ({"rows": [7]}, "rows[0] must be an object"),
    ],
)
def test_a_wrong_head_is_named(tmp_path, change, message):
    path = tmp_path / "plans.json"
    path.write_text(json.dumps(good() | change))
    with pytest.raises(PlanFileError) as error:
        plans.read(path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "int4"}, "kind must be one of"),
        ({"group": 0}, "group must be one of (32, 64, 128) beside kind 'w4a16', got 0"),
        ({"kind": "w8a16"}, "group must be one of (0,) beside kind 'w8a16', got 128"),
        ({"n": "4096"}, "n must be a whole number"),
        ({"k": 0}, "k must be a whole number"),
        ({"n": 2**31}, "n must be a whole number from 1 to 2147483647, got 2147483648"),
        ({"m": 2**64}, "m must be a whole number"),
        ({"ranks": 2**31}, "ranks must be a whole number"),
        ({"m": 1.5}, "m must be a whole number"),
        ({"kernel": None}, "kernel must be a string"),
        ({"ranks": 0}, "ranks must be a whole number"),
        ({"shape": 3}, "shape must be a string"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, change, message):
    path, found = tmp_path / "plans.json", good()
    found["rows"].append(found["rows"][0] | {"m": 16} | change)
    path.write_text(json.dumps(found))
    with pytest.raises(PlanFileError) as error:
        plans.read(path)
    assert str(error.value).startswith(f"{path}: rows[1]: ") and message in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '"text"', "\xff", "[" * 200_000])
def test_a_file_that_is_no_plans_is_named(tmp_path, text):
    path = tmp_path / "plans.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(PlanFileError, match=str(path)):
        plans.read(path)
    with pytest.raises(PlanFileError, match="missing"):
        plans.read(tmp_path / "missing")


def test_a_weight_and_m_stand_once(tmp_path):
    path, found = tmp_path / "plans.json", good()
    found["rows"] *= 2
    path.write_text(json.dumps(found))
    with pytest.raises(PlanFileError, match=r"rows\[1\] has the weight and m of rows\[0\]"):
        plans.read(path)


def test_the_shipped_files_are_right():
    shipped = sorted(plans.SHIPPED.glob("plans_*.json"))
    assert shipped
    for path in shipped:
        for row in plans.read(path).rows:
            assert weights.takes(row.weight.kind, row.weight.n, row.weight.k)


def test_where_own_plans_lie(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTINFER_PLANS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    there = tmp_path / "fastinfer" / "plans-nvidia-h100-80gb-hbm3.json"
    assert plans.user_path(H100.name) == there
    monkeypatch.setenv("FASTINFER_PLANS", "0")
    assert plans.user_path(H100.name) == there
    monkeypatch.setenv("FASTINFER_PLANS", "~/mine.json")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert plans.user_path(H100.name) == tmp_path / "mine.json"
    monkeypatch.delenv("FASTINFER_PLANS")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert plans.user_path(H100.name).parent == tmp_path / ".cache" / "fastinfer"


# --- what of them reaches the library


@pytest.fixture
def table(monkeypatch):
    """Stands in for the library's table: what it was set to, by kind."""
    found: dict = {}
    monkeypatch.setattr(plans, "kernels", lambda kind: {} if kind == "linear" else KERNELS)
    monkeypatch.setattr(
        torch.ops.fastinfer, "set_tile_plans", lambda *args: found.update({args[:3]: args[3]}), raising=False
    )
    return found


def test_names_become_the_librarys_numbers(table):
    plans.install(H100, [Row(W4, 8, DECODE), Row(W8, 64, WGMMA), Row(W4, 16, Plan())])
    assert table == {
        (90, 132, "w4a16"): [128, 4096, 4096, 8, 1, 2, 0, 128, 4096, 4096, 16, 0, 1, 0],
        (90, 132, "w8a16"): [0, 4096, 4096, 64, 2, 1, 1],
        (90, 132, "w8a8"): [],
        (90, 132, "linear"): [],
    }


def test_unknown_names_are_left_to_the_heuristics_with_one_warning(table):
    """Not left out: the next row would then count for their M too."""
    strange = [
        Plan("gemv", 1, "16-half"),
        Plan("decode", 1, "48-half"),
        Plan("decode", 16, "16-half"),
        Plan("gemv", 1, "16-half"),
    ]
    rows = [Row(W4, m, plan) for m, plan in zip((1, 2, 4, 8), strange)] + [Row(W4, 16, DECODE)]
    with pytest.warns(PlanWarning) as caught:
        plans.install(H100, rows)
    (warning,) = caught
    text = str(warning.message)
    assert "left to the heuristics" in text
    assert text.count("gemv 16-half /1") == 1 and "decode 48-half /1" in text and "decode 16-half /16" in text
    assert table[90, 132, "w4a16"][4::7] == [0, 0, 0, 0, 1]


@pytest.fixture
def loading(table, monkeypatch, tmp_path):
    """load() on an H100 that has shipped plans for W4 and W8; returns where own plans would lie."""
    monkeypatch.setitem(_native.status, "cuda", "loaded")
    monkeypatch.setattr(Device, "of", classmethod(lambda cls, index: H100))
    monkeypatch.setattr(plans, "SHIPPED", tmp_path / "data")
    plans.write(tmp_path / "data" / "plans_h100.json", Plans(H100, [Row(W4, 8, DECODE), Row(W8, 8, DECODE)]))
    other = Device("NVIDIA H100 PCIe", 90, 114)
    plans.write(tmp_path / "data" / "plans_pcie.json", Plans(other, [Row(W4, 512, WGMMA)]))
    own = tmp_path / "own.json"
    monkeypatch.setenv("FASTINFER_PLANS", str(own))
    monkeypatch.setattr(plans, "load", functools.cache(plans.load.__wrapped__))
    return own


GPU = torch.device("cuda", 0)


def test_plans_of_the_same_name_go_before_those_of_the_same_size(loading, table, tmp_path, monkeypatch):
    """An H200 has as many multiprocessors as an H100."""
    plans.write(loading, Plans(H100, []))
    h200 = Device("NVIDIA H200", 90, 132)
    monkeypatch.setattr(Device, "of", classmethod(lambda cls, index: h200))
    plans.load(0)
    assert table[90, 132, "w8a16"] == [0, 4096, 4096, 8, 1, 2, 0]
    plans.write(tmp_path / "data" / "plans_h200.json", Plans(h200, [Row(W4, 8, WGMMA)]))
    plans.load.cache_clear()
    plans.load(0)
    assert table[90, 132, "w4a16"] == [128, 4096, 4096, 8, 2, 1, 1] and table[90, 132, "w8a16"] == []


def test_an_emptied_table_stays_empty_and_is_filled_again(loading, table):
    plans.write(loading, Plans(H100, []))
    with plans.emptied(0):
        plans.load_for(GPU)  # as every op does
        assert table[90, 132, "w4a16"] == []
        plans.write(loading, Plans(H100, [Row(W4, 64, WGMMA)]))
    assert table[90, 132, "w4a16"] == [128, 4096, 4096, 64, 2, 1, 1]


def test_tracing_loads_plans(loading, table):
    """Once, and leaves nothing of it in the graph."""
    plans.write(loading, Plans(H100, []))

    @torch.compile(backend="eager", fullgraph=True)
    def traced(x):
        plans.load_for(GPU)
        return x + 1

    assert traced(torch.zeros(1)) == 1
    assert table[90, 132, "w4a16"] == [128, 4096, 4096, 8, 1, 2, 0]


def test_ops_on_a_gpu_load_plans(loading, table, monkeypatch):
    plans.write(loading, Plans(H100, []))
    monkeypatch.setattr(_native, "backend", lambda device: "native")
    monkeypatch.setattr(torch.ops.fastinfer, "some_op", lambda x: x, raising=False)

    class OnGpu:
        device, is_cuda = GPU, True

    _common.run("some_op", None, OnGpu())
    assert table[90, 132, "w4a16"] == [128, 4096, 4096, 8, 1, 2, 0]


def test_what_is_in_use_is_told(loading, monkeypatch):
    own = str(loading)
    assert str(plans.find(H100)) == f"plans_h100.json (FASTINFER_PLANS names {own}, which is not there)"
    plans.write(loading, Plans(H100, []))
    assert str(plans.find(H100)) == f"plans_h100.json, {own}"
    loading.write_text("{")
    assert str(plans.find(H100)).endswith("the file is ignored)")
    monkeypatch.setenv("FASTINFER_PLANS", "0")
    assert str(plans.find(H100)) == "none, the heuristics choose (switched off by FASTINFER_PLANS=0)"


def test_forced_plans_nest(table, monkeypatch):
    """The library gives back what was forced before."""
    now = {"w4a16": (0, 1, 0), "w8a16": (0, 1, 0)}

    def force(kind, *numbers):
        before, now[kind] = now[kind], numbers
        return before

    monkeypatch.setattr(torch.ops.fastinfer, "force_tile_plan", force, raising=False)
    with plans.forced("w4a16", DECODE), plans.forced("w8a16", WGMMA):
        with plans.forced("w4a16", Plan()):
            assert now == {"w4a16": (0, 1, 0), "w8a16": (2, 1, 1)}
        assert now == {"w4a16": (1, 2, 0), "w8a16": (2, 1, 1)}
    assert now == {"w4a16": (0, 1, 0), "w8a16": (0, 1, 0)}


def test_own_plans_go_before_the_shipped_ones_weight_by_weight(loading, table):
    plans.write(loading, Plans(H100, [Row(W4, 64, WGMMA)]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plans.load(0)
    assert table[90, 132, "w4a16"] == [128, 4096, 4096, 64, 2, 1, 1]
    assert table[90, 132, "w8a16"] == [0, 4096, 4096, 8, 1, 2, 0]
    assert {key[:2] for key in table} == {(90, 132)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "which is not there"),
        ("{", "the file is ignored"),
        (json.dumps(good() | {"rows": [{"kind": "w4a16"}]}), "rows[0]: group must be"),
        (json.dumps(good() | {"multiprocessors": 114}), "this is NVIDIA H100 80GB HBM3"),
    ],
)
def test_own_plans_that_cannot_be_used_warn_once(loading, table, text, message):
    if text is not None:
        loading.write_text(text)
    with pytest.warns(PlanWarning) as caught:
        plans.load(0)
        plans.load(0)
    (warning,) = caught
    assert message in str(warning.message) and str(loading) in str(warning.message)
    assert table[90, 132, "w4a16"] == [128, 4096, 4096, 8, 1, 2, 0]


def test_plans_can_be_switched_off(loading, table, monkeypatch):
    monkeypatch.setenv("FASTINFER_PLANS", "0")
    plans.load(0)
    assert table == {}


def test_nothing_is_loaded_without_the_cuda_library(loading, table, monkeypatch):
    monkeypatch.setitem(_native.status, "cuda", "not built")
    plans.load(0)
    assert table == {}


# --- the tuner's decisions


def timed(plan: Plan, chained_us: float, us: float | None = None) -> tuner.Timed:
    return tuner.Timed(plan, chained_us if us is None else us, chained_us)


def test_a_plan_must_gain_chained_and_alone_together():
    auto = timed(Plan(), 10.0, 11.0)
    assert tuner.pick(auto, []) is auto
    assert tuner.pick(auto, [timed(DECODE, 9.9, 10.9)]) is auto
    assert tuner.pick(auto, [timed(DECODE, 9.0, 12.2)]) is auto
    faster = timed(WGMMA, 9.5, 10.5)
    assert tuner.pick(auto, [timed(DECODE, 9.0, 11.5), faster, timed(DECODE, 9.6, 10.7)]) is faster


def rows(found: dict[int, Plan]) -> list[tuple[int, Plan]]:
    measured = {m: (timed(Plan(), 10.0), timed(plan, 9.0)) for m, plan in found.items()}
    assert all(row.weight is W4 for row in tuner.rows_of(W4, measured))
    return [(row.m, row.plan) for row in tuner.rows_of(W4, measured)]


def test_neighbours_with_one_plan_become_one_row():
    assert rows({1: DECODE, 2: DECODE, 4: DECODE, 8: WGMMA, 16: WGMMA}) == [(4, DECODE), (16, WGMMA)]


def test_the_heuristics_keep_what_is_theirs():
    auto = Plan()
    assert rows({1: auto, 2: auto, 4: DECODE, 8: auto, 16: auto}) == [(2, auto), (4, DECODE)]
    assert rows({1: auto, 2: auto}) == [(2, auto)]  # says that it was tuned, against shipped plans


def test_a_plan_reaches_no_further_down_than_half_its_m():
    auto = Plan()
    assert rows({1: DECODE, 64: DECODE}) == [(1, DECODE), (32, auto), (64, DECODE)]
    assert rows({8: auto, 2048: WGMMA}) == [(1024, auto), (2048, WGMMA)]


def test_rows_hold_their_times():
    (row,) = tuner.rows_of(W4, {1: (timed(Plan(), 10.0, 11.0), timed(DECODE, 9.001, 9.5))})
    assert row.times == {"us": 9.5, "chained_us": 9.0, "auto_us": 11.0, "auto_chained_us": 10.0}


def test_candidates_split_k_no_finer_than_it_is(monkeypatch):
    monkeypatch.setattr(plans, "kernels", lambda kind: KERNELS)
    assert {plan.ranks for plan in tuner.candidates(Weight("w8a16", 0, 64, 384))} == {1, 2, 3}
    assert {plan.ranks for plan in tuner.candidates(Weight("linear", 0, 64, 64))} == {1, 2}
    assert len(tuner.candidates(W4)) == 2 * 5 + 2 * 4  # 1, 2, 3, 4, 8 ranks and 1, 2, 3, 4


@pytest.mark.parametrize("weight", [W4, W8, Weight("w8a8", 0, 4096, 4096), Weight("linear", 0, 4096, 4096)], ids=str)
def test_calls_are_those_of_the_op(weight):
    calls = tuner.calls_of(weight, "meta")(3)
    assert sum(call.keywords["w"].nbytes for call in calls) > 300 << 20
    assert calls[0]().shape == (3, weight.n) and calls[0]().dtype == torch.bfloat16


NOT_A_NUMBER, NOT_RUNNING = Plan("decode", 8, "16-half"), Plan("decode", 3, "16-half")


@pytest.fixture
def fake_gpu(loading, table, monkeypatch):
    """One whose times are made up: the more ranks the faster, but the fastest plan is wrong and another cannot run."""
    plans.write(loading, Plans(H100, []))
    running = [Plan()]

    @contextlib.contextmanager
    def forced(kind, plan):
        running.append(plan)
        try:
            yield
        finally:
            running.pop()

    def call() -> torch.Tensor:
        plans.load_for(GPU)
        if running[-1] == NOT_RUNNING:
            raise RuntimeError("the forced plan cannot run")
        return torch.full((4, 4), float("nan") if running[-1] == NOT_A_NUMBER else 1.0)

    class Replays:
        def __init__(self, calls, count):
            calls[0]()
            plan = running[-1]
            rows = table[90, 132, "w4a16"]  # where there are plans, that of their first row serves all M
            self.us = 10.0 / (rows[5] if plan == Plan() and rows else plan.ranks)

        def measure(self, repeats):
            return [self.us] * repeats

    monkeypatch.setattr(plans, "forced", forced)
    monkeypatch.setattr(tuner, "dependent_launch", contextlib.nullcontext)
    monkeypatch.setattr(tuner, "Replays", Replays)
    monkeypatch.setattr(tuner, "calls_of", lambda weight: lambda m: [call])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


def test_the_fastest_right_plan_is_kept(fake_gpu, tmp_path, capsys):
    path = tmp_path / "plans.json"
    other = Row(W8, 8, WGMMA)
    plans.write(path, Plans(H100, [other, Row(W4, 512, WGMMA)]))
    assert tuner.tune_all(H100, [W4], [1, 2], path) == 2  # wrong at both M
    times = {"us": 1.25, "chained_us": 1.25, "auto_us": 10.0, "auto_chained_us": 10.0}
    assert plans.read(path).rows == [Row(W4, 2, Plan("decode", 8, "16-whole"), times), other]
    out = capsys.readouterr().out
    assert "decode 16-half /8: WRONG at M = 2" in out
    assert "decode 16-whole /8, 8.00 ×" in out and "cannot run" not in out


def test_tuning_again_finds_the_same(fake_gpu, loading, table):
    """The heuristics are the measure, not the plans that ops load."""
    tuner.tune_all(H100, [W4], [1, 2], loading)
    first = plans.read(loading)
    assert [row.plan.ranks for row in first.rows] == [8]
    assert table[90, 132, "w4a16"][3:] == [2, 1, 8, 1]  # loaded when it was done
    plans.load.cache_clear()
    tuner.tune_all(H100, [W4], [1, 2], loading)
    assert plans.read(loading) == first


def test_a_plan_must_be_right_in_a_chain_too(fake_gpu, monkeypatch):
    chained = []

    @contextlib.contextmanager
    def dependent_launch():
        chained.append(True)
        yield
        chained.pop()

    monkeypatch.setattr(tuner, "dependent_launch", dependent_launch)
    race = tuner.Race(W4, [lambda: torch.full((4, 4), 2.0 if chained else 1.0)], 4)
    assert not race.is_right(DECODE) and race.wrong == [DECODE]


def test_linear_is_tuned_up_to_16_rows(fake_gpu, tmp_path):
    path, linear = tmp_path / "plans.json", Weight("linear", 0, 64, 128)
    tuner.tune_all(H100, [linear], [1, 64], path)
    assert [row.m for row in plans.read(path).rows] == [1]
    tuner.tune_all(H100, [Weight("linear", 0, 32, 128)], [64], path)
    assert [row.weight for row in plans.read(path).rows] == [linear]


@pytest.mark.parametrize(("weight_bytes", "count"), [(1 << 20, 301), (100 << 20, 4), (1 << 30, 2)])
def test_copies_outgrow_the_cache(weight_bytes, count):
    assert copies(weight_bytes) == count


# --- which weights


@pytest.mark.models
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", [(128, 64), (192, 64), (64, 64), (64, 96), (131, 64)]),  # q, k, v; gate, up; o; down; head
        ("bert", [(192, 64), (64, 64), (96, 64), (64, 96), (131, 64)]),
        ("gpt2", [(192, 64), (64, 64), (256, 64), (64, 256), (131, 64)]),
        ("qwen3", [(128, 64), (192, 64), (64, 64), (64, 96), (131, 64)]),  # norms between the projections and attention
    ],
)
def test_the_weights_of_a_model_are_those_of_its_patch(name, expected):
    with torch.device("meta"):
        model = architectures.ALL[name]()
    assert weights.of_module(model) == expected


@pytest.mark.models
def test_a_configuration_is_enough(tmp_path):
    with torch.device("meta"):
        model = architectures.ALL["llama"]()
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path)
    expected = weights.of_module(model)
    assert weights.of_model(str(tmp_path)) == expected
    assert weights.of_model(str(tmp_path / "config.json")) == expected


def test_only_what_kernels_take_is_tuned(capsys):
    sizes = [(131, 256), (64, 96), (8, 128), (64, 40), (131, 256)]
    found = weights.of_shapes(sizes, ["w4a16", "w8a8", "linear"], [64, 128])
    ragged = [Weight("w4a16", 64, 131, 256), Weight("w4a16", 128, 131, 256), Weight("w8a8", 0, 131, 256)]
    linears = [Weight("linear", 0, n, k) for n, k in [(131, 256), (64, 96), (8, 128)]]
    assert found == [*ragged, *linears]
    assert capsys.readouterr().out.splitlines() == [
        "64×96: skipped for w4a16, w8a8",
        "8×128: skipped for w4a16, w8a8",
        "64×40: skipped for w4a16, w8a8, linear",
    ]
    with pytest.raises(ValueError, match="no size is left: N must be 16 or more and K a multiple of 128"):
        weights.of_shapes(sizes[1:4], ["w4a16"], [64])


# --- the command line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "name a model, or sizes of weights"),
        (["--shapes", "4096"], "--shapes takes sizes such as 4096×14336 (N×K), got '4096'"),
        (["--shapes", ","], "--shapes names nothing"),
        (["--shapes", "64x128", "--m", "0"], "--m takes positive numbers, got '0'"),
        (["--shapes", "64x128", "--m", "a"], "--m takes positive numbers, got 'a'"),
        (["--shapes", "64x128", "--group", "16"], "--group takes numbers out of (32, 64, 128), got '16'"),
        (["--shapes", "64x128", "--kinds", "int4"], "got 'int4'"),
    ],
)
def test_a_mistake_is_answered_in_one_line(argv, message, capsys):
    assert cli.main(["tune", *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fastinfer: ") and message in err and err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tune_without_a_gpu_says_so(capsys):
    assert cli.main(["tune", "--shapes", "64×128"]) == 2
    assert "tune needs a GPU of compute capability 9.0; torch finds no GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("capability", "library", "message"),
    [(80, "loaded", "compute capability 9.0; this is a GPU (compute capability 8.0"), (90, "not built", "not built")],
)
def test_tune_on_a_gpu_without_tile_kernels_says_so(monkeypatch, capsys, capability, library, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(Device, "of", classmethod(lambda cls, index: Device("a GPU", capability, 108)))
    monkeypatch.setitem(_native.status, "cuda", library)
    assert cli.main(["tune", "--shapes", "64*128"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"multiprocessors": 114}, {"device": "NVIDIA H200"}])
def test_a_file_for_another_device_is_not_written_to(tmp_path, change):
    path = tmp_path / "plans.json"
    path.write_text(json.dumps(good() | {"device": H100.name} | change))
    with pytest.raises(PlanFileError, match="choose another file with --out"):
        tuner.tune_all(H100, [], [1], path)


def test_help_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; from fastinfer import cli; cli.main(['tune', '--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
