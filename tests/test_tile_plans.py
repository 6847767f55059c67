"""Plans of the tile matmuls on a GPU that has them: each gives the right result, and the table is honoured."""

from __future__ import annotations

import contextlib
import importlib

import pytest
import test_int4_matmul as int4_cases
import test_int8_matmul as int8_cases
import test_linear as linear_cases
import tolerance
import torch
from matmul_cases import DTYPES, check_float_matmul

from fastinfer import cli, ops
from fastinfer.ops.launch import dependent_launch
from fastinfer.ops.layout import ROW, TILE_W4A16, TILE_W8A8, TILE_W8A16, convert
from fastinfer.tuning import plans, tuner
from fastinfer.tuning.plans import Device, Plan, Plans, Row, Weight

SHAPES = [
    (1, 48, 1024),
    (7, 272, 896),
    (16, 1040, 512),
    (16, 16, 128),
    (33, 144, 512),
    (300, 1040, 2048),
    (1100, 80, 256),
    (5, 17000, 1152),  # several row tiles a warp, which use buffers anew; sums of x made ahead; a tail
    (13, 17000, 1152),
]
LINEAR_SHAPES = [(3, 33, 96), (13, 61, 416)]
KINDS = ["w4a16", "w8a16", "w8a8"]
CASES = [(kind, *shape) for kind in KINDS for shape in SHAPES]
CASES += [("linear", *shape) for shape in [*LINEAR_SHAPES, *SHAPES] if shape[0] <= tuner.LINEAR_ROWS]


@pytest.fixture
def heuristics(device, tiles):
    """An empty table for the test; the device's own plans after it."""
    with plans.emptied(0):
        yield


class Case:
    """A weight's matmul at M rows, and its check."""

    def __init__(self, kind: str, m: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16, group: int = 64):
        self.kind, self.weight = kind, Weight(kind, group if kind == "w4a16" else 0, n, k)
        if kind == "linear":
            self.x, *self.packed = linear_cases.make(m, n, k, dtype, "cuda")
            self.bias = torch.randn(n, device="cuda")
            return
        if kind == "w4a16":
            self.x, *self.packed, self.bias = int4_cases.make(m, n, k, group, dtype, "cuda")
        else:
            self.x, *self.packed, self.bias = int8_cases.make(m, n, k, dtype, "cuda")
        self.layout = {"w4a16": TILE_W4A16, "w8a16": TILE_W8A16, "w8a8": TILE_W8A8}[kind]
        self.laid_out = [convert(t, ROW, self.layout) if t.dim() == 2 else t for t in self.packed]

    def call(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "linear":
            return ops.linear(x, *self.packed, self.bias)
        op = {"w4a16": ops.int4_matmul, "w8a16": ops.int8_matmul, "w8a8": ops.int8_scaled_matmul}[self.kind]
        return op(x, *self.laid_out, self.bias, layout=self.layout)

    def run(self, plan: Plan | None = None) -> torch.Tensor:
        """Forced, or as it comes."""
        with contextlib.nullcontext() if plan is None else plans.forced(self.kind, plan):
            return self.call(self.x)

    def check(self, out: torch.Tensor) -> None:
        if self.kind == "w8a8":
            scaled = importlib.import_module("fastinfer.ops.int8_scaled_matmul").reference
            args = self.x, *self.packed, self.bias
            return tolerance.assert_within(out, scaled(*args, dtype=torch.float64), scaled(*args))
        if self.kind == "linear":
            return check_float_matmul(out, self.x, self.packed[0].double(), self.bias)
        cases = int4_cases if self.kind == "w4a16" else int8_cases
        return check_float_matmul(out, self.x, cases.op.dequantize(*self.packed, dtype=torch.float64), self.bias)

    def plans(self) -> dict[Plan, torch.Tensor]:
        """The results of all plans that can run."""
        found = {}
        for plan in tuner.candidates(self.weight):
            try:
                found[plan] = self.run(plan)
            except RuntimeError as error:
                assert "cannot run" in str(error), f"{plan}: {error}"
        return found

    def check_plans(self) -> None:
        found = self.plans()
        assert any(plan.kernel == "wgmma" for plan in found) or self.kind == "linear"
        assert any(plan.kernel == "decode" for plan in found) or len(self.x) > 16
        for plan, out in found.items():
            try:
                self.check(out)
            except AssertionError as error:
                raise AssertionError(f"{plan}: {error}") from None


@pytest.mark.parametrize(("kind", "m", "n", "k"), CASES)
def test_every_plan_gives_the_right_result(kind, m, n, k, device, heuristics, poisoned):
    Case(kind, m, n, k).check_plans()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(
    ("kind", "group"), [("w4a16", 32), ("w4a16", 64), ("w4a16", 128), ("w8a16", 0), ("w8a8", 0), ("linear", 0)]
)
@pytest.mark.parametrize("m", [3, 13])
def test_every_plan_takes_every_type_and_group(m, kind, group, dtype, device, heuristics, poisoned):
    Case(kind, m, 88, 640, dtype, group).check_plans()


@pytest.mark.parametrize("kind", [*KINDS, "linear"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1024, 1024), (16, 1024, 1024), (40, 1024, 1024), (13, 17000, 1152)])
def test_every_plan_gives_the_same_bits_in_a_captured_chain(m, n, k, kind, device, heuristics):
    """As test_launch.py has it for the heuristics' choice. The next x is the end of y, with the rows behind the tiles."""
    if kind == "linear" and m > tuner.LINEAR_ROWS:
        pytest.skip("torch's linear")
    case = Case(kind, m, n, k)

    def chain() -> list[torch.Tensor]:
        outs = [case.x]
        for _ in range(4):
            outs.append(case.call(outs[-1].view(-1)[-m * k :].view(m, k)))
        return outs[1:]

    for plan in case.plans():
        graph = torch.cuda.CUDAGraph()
        with plans.forced(kind, plan):
            plain = chain()
            with dependent_launch():
                chain()
                with torch.cuda.graph(graph):
                    chained = chain()
        for _ in range(10):
            for out in chained:
                out.fill_(float("nan"))
            graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(plain, chained, strict=True)), plan


@pytest.mark.parametrize("kind", KINDS)
def test_a_forced_plan_that_cannot_run_is_an_error(kind, device, heuristics):
    kernels, case = plans.kernels(kind), Case(kind, 300, 64, 256)
    plain = case.run()
    for plan in (Plan("decode", 1, kernels["decode"].shapes[0]), Plan("wgmma", 4, kernels["wgmma"].shapes[0])):
        with pytest.raises(RuntimeError, match=r"the forced plan .* cannot run for M = 300, N = 64, K = 256"):
            case.run(plan)
    assert torch.equal(case.run(), plain)  # and it is over with the block
    for wrong in (Plan("gemv", 1, "a"), Plan("wgmma", 1, "a"), Plan("wgmma", 99, kernels["wgmma"].shapes[0])):
        with pytest.raises(ValueError, match="there is no plan"):
            case.run(wrong)


@pytest.mark.parametrize(("m", "k"), [(17, 256), (1, 48), (1, 32)])
def test_a_forced_plan_that_linear_cannot_run_is_an_error(m, k, device, heuristics):
    with pytest.raises(RuntimeError, match=f"the forced plan .* cannot run for M = {m}, N = 64, K = {k}"):
        Case("linear", m, 64, k).run(Plan("decode", 2, plans.kernels("linear")["decode"].shapes[0]))


def other_plan(case: Case) -> tuple[Plan, torch.Tensor, torch.Tensor]:
    """A plan that adds up in another order, its result, and that of the heuristics: other bits tell them apart."""
    plain = case.run()
    return next((plan, out, plain) for plan, out in case.plans().items() if not torch.equal(out, plain))


def test_forced_plans_nest_and_are_those_of_a_kind(device, heuristics):
    case = Case("w4a16", 8, 512, 4096)
    plan, out, plain = other_plan(case)
    with (
        plans.forced("w4a16", plan),
        plans.forced("w8a16", Plan("wgmma", 1, plans.kernels("w8a16")["wgmma"].shapes[0])),
    ):
        assert torch.equal(case.run(), out)
        with plans.forced("w4a16", Plan()):
            assert torch.equal(case.run(), plain)
        assert torch.equal(case.run(), out)
    assert torch.equal(case.run(), plain)


def test_the_table_is_honoured_up_to_its_m(device, heuristics):
    case, wider = Case("w4a16", 8, 512, 4096), Case("w4a16", 9, 512, 4096)
    plan, out, plain = other_plan(case)
    after = wider.run()
    plans.install(Device.of(0), [Row(case.weight, 8, plan)])
    assert torch.equal(case.run(), out)
    assert torch.equal(wider.run(), after)
    plans.install(Device.of(0), [Row(case.weight, 4, plan), Row(case.weight, 8, Plan())])
    assert torch.equal(case.run(), plain)
    mine = Device.of(0)
    plans.install(mine, [])
    plans.install(Device(mine.name, 90, mine.multiprocessors + 1), [Row(case.weight, 8, plan)])
    plans.install(mine, [Row(Weight("w4a16", 128, 512, 4096), 8, plan), Row(Weight("w4a16", 64, 512, 2048), 8, plan)])
    assert torch.equal(case.run(), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_of_nonsense_changes_nothing(kind, device, heuristics):
    """Too many ranks, or a kernel for few rows at many."""
    for m, k, name in [(1, 128, "decode"), (300, 256, "decode"), (1, 256, "wgmma"), (300, 256, "wgmma")]:
        case, kernel = Case(kind, m, 64, k), plans.kernels(kind)[name]
        plain = case.run()
        plans.install(Device.of(0), [Row(case.weight, m, Plan(name, kernel.most_ranks, kernel.shapes[0]))])
        assert torch.equal(case.run(), plain)
        plans.install(Device.of(0), [])


def test_the_first_call_loads_the_file(device, heuristics, tmp_path, monkeypatch):
    case, path = Case("w4a16", 8, 512, 4096), tmp_path / "plans.json"
    plan, out, plain = other_plan(case)
    plans.write(path, Plans(Device.of(0), [Row(case.weight, 8, plan)]))
    monkeypatch.setenv("FASTINFER_PLANS", str(path))
    plans.load.cache_clear()
    assert torch.equal(case.run(), out)
    monkeypatch.setenv("FASTINFER_PLANS", "0")
    with plans.emptied(0):
        assert torch.equal(case.run(), plain)


def test_tune_writes_a_file(device, heuristics, tmp_path, monkeypatch, capsys):
    path = tmp_path / "plans.json"
    monkeypatch.setenv("FASTINFER_PLANS", str(path))
    assert cli.main(["tune", "--shapes", "512×1024", "--m", "1,64", "--group", "64"]) == 0
    text = capsys.readouterr().out
    assert "WRONG" not in text and "w4a16 g64 512×1024" in text
    found = plans.read(path)
    assert found.device == Device.of(0)
    kinds = {"w4a16 g64", "w8a16", "w8a8", "linear"}
    assert {str(weight) for weight in found.by_weight()} == {f"{kind} 512×1024" for kind in kinds}
    for kind in KINDS:
        for m in (1, 64, 65):
            case = Case(kind, m, 512, 1024)
            case.check(case.run())
    assert cli.main(["tune", "--shapes", "256×1024", "--m", "1", "--kinds", "w8a16"]) == 0
    assert len(plans.read(path).by_weight()) == 5
