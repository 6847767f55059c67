"""Plans of the tile matmuls on a GPU that has them: each gives the right result, and the table is honoured."""

from __future__ import annotations

import contextlib
import importlib

import pytest
import test_int4_matmul as int4_cases
import test_int8_matmul as int8_cases
import tolerance
import torch
from matmul_cases import check_float_matmul

from fastinfer import cli, ops
from fastinfer.ops.launch import dependent_launch
from fastinfer.ops.layout import ROW, TILE_W4A16, TILE_W8A8, TILE_W8A16, convert
from fastinfer.tuning import plans, tuner
from fastinfer.tuning.plans import Device, Plan, Row, Weight

SHAPES = [
    (1, 48, 1024),
    (7, 272, 896),
    (16, 1040, 512),
    (16, 16, 128),
    (33, 144, 512),
    (300, 1040, 2048),
    (1100, 80, 256),
]


@pytest.fixture
def heuristics(device, tiles):
    """An empty table for the test; the device's own plans after it."""
    plans.install(Device.of(0), [])
    yield
    plans.load.cache_clear()
    plans.load(0)


class Case:
    """A weight's matmul at M rows, and its check."""

    def __init__(self, kind: str, m: int, n: int, k: int, device: str = "cuda"):
        self.kind, self.weight = kind, Weight(kind, 64 if kind == "w4a16" else 0, n, k)
        if kind == "w4a16":
            self.x, *self.packed, self.bias = int4_cases.make(m, n, k, 64, torch.bfloat16, device)
        else:
            self.x, *self.packed, self.bias = int8_cases.make(m, n, k, torch.bfloat16, device)
        self.layout = {"w4a16": TILE_W4A16, "w8a16": TILE_W8A16, "w8a8": TILE_W8A8}[kind]
        self.laid_out = [convert(t, ROW, self.layout) if t.dim() == 2 else t for t in self.packed]

    def call(self, x: torch.Tensor) -> torch.Tensor:
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


@pytest.mark.parametrize("kind", ["w4a16", "w8a16", "w8a8"])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_every_plan_gives_the_right_result(m, n, k, kind, device, heuristics, poisoned):
    case = Case(kind, m, n, k)
    found = case.plans()
    assert any(plan.kernel == "wgmma" for plan in found)
    assert any(plan.kernel == "decode" for plan in found) or m > 16
    for plan, out in found.items():
        try:
            case.check(out)
        except AssertionError as error:
            raise AssertionError(f"{plan}: {error}") from None


@pytest.mark.parametrize("kind", ["w4a16", "w8a16", "w8a8"])
@pytest.mark.parametrize("m", [1, 16, 40])
def test_every_plan_gives_the_same_bits_in_a_captured_chain(m, kind, device, heuristics):
    """As test_launch.py has it for the heuristics' choice."""
    case = Case(kind, m, 1024, 1024)

    def chain() -> list[torch.Tensor]:
        outs = [case.x]
        for _ in range(4):
            outs.append(case.call(outs[-1]))
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


@pytest.mark.parametrize("kind", ["w4a16", "w8a16", "w8a8"])
def test_a_forced_plan_that_cannot_run_is_an_error(kind, device, heuristics):
    kernels = plans.kernels(kind)
    case, plain = Case(kind, 300, 64, 256), Case(kind, 300, 64, 256).run()
    for plan in (Plan("decode", 1, kernels["decode"].shapes[0]), Plan("wgmma", 4, kernels["wgmma"].shapes[0])):
        with pytest.raises(RuntimeError, match=r"the forced plan .* cannot run for M = 300, N = 64, K = 256"):
            case.run(plan)
    case.check(case.run())  # and it is over with the block
    assert plain.shape == case.run().shape
    for wrong in (Plan("gemv", 1, "a"), Plan("wgmma", 1, "a"), Plan("wgmma", 99, kernels["wgmma"].shapes[0])):
        with pytest.raises(ValueError, match="there is no plan"):
            case.run(wrong)


def test_the_table_is_honoured_up_to_its_m(device, heuristics):
    """Plans that add up in another order give other bits, which tell them apart."""
    case, wider = Case("w4a16", 8, 512, 4096), Case("w4a16", 9, 512, 4096)
    plain, found = case.run(), case.plans()
    plan = next(plan for plan, out in found.items() if not torch.equal(out, plain))
    after = wider.run()
    plans.install(Device.of(0), [Row(case.weight, 8, plan)])
    assert torch.equal(case.run(), found[plan])
    assert torch.equal(wider.run(), after)
    plans.install(Device.of(0), [Row(case.weight, 4, plan), Row(case.weight, 8, Plan())])
    assert torch.equal(case.run(), plain)
    mine = Device.of(0)
    plans.install(mine, [])
    plans.install(Device(mine.name, 90, mine.multiprocessors + 1), [Row(case.weight, 8, plan)])
    plans.install(mine, [Row(Weight("w4a16", 128, 512, 4096), 8, plan), Row(Weight("w4a16", 64, 512, 2048), 8, plan)])
    assert torch.equal(case.run(), plain)


@pytest.mark.parametrize("kind", ["w4a16", "w8a16", "w8a8"])
def test_a_table_of_nonsense_changes_nothing(kind, device, heuristics):
    """Too many ranks, or a kernel for few rows at many."""
    for m, k, name in [(1, 128, "decode"), (300, 256, "decode"), (1, 256, "wgmma"), (300, 256, "wgmma")]:
        case, kernel = Case(kind, m, 64, k), plans.kernels(kind)[name]
        plain = case.run()
        plans.install(Device.of(0), [Row(case.weight, m, Plan(name, kernel.most_ranks, kernel.shapes[0]))])
        assert torch.equal(case.run(), plain)
        plans.install(Device.of(0), [])


def test_tune_writes_a_file_that_is_loaded(device, heuristics, tmp_path, monkeypatch, capsys):
    path = tmp_path / "plans.json"
    monkeypatch.setenv("FASTINFER_PLANS", str(path))
    assert cli.main(["tune", "--shapes", "512×1024", "--m", "1,64", "--group", "64"]) == 0
    text = capsys.readouterr().out
    assert "WRONG" not in text and "w4a16 g64 512×1024" in text
    found = plans.read(path)
    assert found.device == Device.of(0)
    kinds = {"w4a16 g64", "w8a16", "w8a8", "linear"}
    assert {str(weight) for weight in found.by_weight()} == {f"{kind} 512×1024" for kind in kinds}
    for kind in ("w4a16", "w8a16", "w8a8"):
        for m in (1, 64, 65):
            case = Case(kind, m, 512, 1024)
            case.check(case.run())
    assert cli.main(["tune", "--shapes", "256×1024", "--m", "1", "--kinds", "w8a16"]) == 0
    assert len(plans.read(path).by_weight()) == 5
