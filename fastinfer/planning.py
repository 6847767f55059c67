"""What a patch would do, worked out before anything changes."""

from __future__ import annotations

import dataclasses
import sys
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn

from fastinfer import _native
from fastinfer.errors import GroupSizeError, PatchError, RecipeError, Unfusable
from fastinfer.generation.step import DecodeStep
from fastinfer.modules import QuantizedLinear, QuantizedModule
from fastinfer.modules.capture import RECORDERS
from fastinfer.recipe import Recipe, Spec
from fastinfer.reports import Graphed, Merged, Replaced, Report, Skipped
from fastinfer.rules import decoder as step_rule
from fastinfer.rules import embedding as embedding_rule
from fastinfer.rules import graphs as graphs_rule
from fastinfer.rules import linear as linear_rule
from fastinfer.rules import merging

RECORD = "_fastinfer"
"""The attribute of a patched model that holds what was done to it."""


@dataclasses.dataclass
class Task:
    """One weight to replace: the linears that multiply by it and the embeddings that look it up, with all their paths."""

    paths: list[str]
    spec: Spec
    note: str
    linears: list[nn.Module]
    embeddings: list[nn.Embedding]

    def replaced(self, built: QuantizedLinear | None = None) -> Replaced:
        """This task's line in the report, foretold or (with what was built) as it is."""
        linear, spec = self.linears[0], self.spec
        return Replaced(
            path=self.paths[0],
            kind=f"int4 g{spec.group_size} {spec.method}" if spec.weights == "int4" else "int8",
            bytes_before=linear.weight.nbytes,
            bytes_after=linear_rule.packed_bytes(linear, spec) if built is None else built.packed_bytes(),
            error=None if built is None else built.weight_error,
            note=self.note,
        )


@dataclasses.dataclass
class Merge:
    """Linears of one block to merge, in the order of their rows."""

    path: str
    block: nn.Module
    found: merging.Found

    def row(self, reason: str = "") -> Merged:
        return Merged(self.path, self.found.members, self.found.activation, reason)


@dataclasses.dataclass
class Plan:
    tasks: list[Task]
    report: Report
    merges: list[Merge] = dataclasses.field(default_factory=list)
    generating: nn.Module | None = None
    """The model whose decode step may be fused: what `generate` is called on."""
    merge_kept: bool = False
    graphed: list[tuple[str, nn.Module]] = dataclasses.field(default_factory=list)
    """Models whose calls are to be recorded in CUDA graphs, with their paths."""


def slots_of(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """Every slot (parent, name) that a module below `model` sits in."""
    slots: dict[nn.Module, list[tuple[nn.Module, str]]] = defaultdict(list)
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                slots[child].append((parent, name))
    return slots


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    return sum({id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())


def check_patchable(model: nn.Module) -> None:
    if RECORD in vars(model) or any(isinstance(m, QuantizedModule) for m in model.modules()):
        raise PatchError("this model is patched already: unpatch it first, or patch once with a Recipe")
    if linear_rule.looks_linear(model):
        raise PatchError("a linear cannot be replaced in place: patch the module that holds it")
    if any(linear_rule.is_offloaded(m) for m in model.modules()):
        return  # its meta parameters are refused one by one, by name
    on_meta = [name for name, p in model.named_parameters() if p.is_meta]
    if on_meta:
        raise PatchError(f"{on_meta[0]} and {len(on_meta) - 1} more are on the meta device: load the weights first")


class Planner:
    """Walks a model once and decides, linear by linear, what the recipe makes of it."""

    def __init__(self, model: nn.Module, recipe: Recipe, strict: bool, merge: bool | None = None, graphs: bool = True):
        self.model, self.recipe, self.strict, self.merge, self.graphs = model, recipe, strict, merge, graphs
        self.slots = slots_of(model)
        self.paths: dict[nn.Module, list[str]] = defaultdict(list)
        for path, module in model.named_modules(remove_duplicate=False):
            self.paths[module].append(path)
        self.owners: dict[nn.Parameter, list[nn.Module]] = defaultdict(list)
        for module in self.paths:
            for parameter in module._parameters.values():
                if parameter is not None:
                    self.owners[parameter].append(module)
        self.adapters = _adapter_modules(model)
        self.activations = linear_rule.default_activations(model)
        self.matched: set[str] = set()
        self.plan = Plan([], Report())

    def run(self) -> Plan:
        """The plan. Raises RecipeError, GroupSizeError or PatchError where it cannot be carried out as asked."""
        seen: set[nn.Module] = set()
        for module in self.paths:
            if module in seen or not linear_rule.looks_linear(module):
                continue
            group = [module, *(m for m in self._sharers(module) if m is not module)]
            seen.update(group)
            outcome = self._decide(group)
            if isinstance(outcome, Task):
                self.plan.tasks.append(outcome)
            else:
                self.plan.report.skipped.append(outcome)
        unmatched = [p for p in self.recipe.patterns if p not in self.matched and p != "*"]
        if unmatched:
            raise RecipeError(f"pattern {unmatched[0]!r} matches no linear that an earlier pattern has not taken")
        self._find_merges()
        self._find_step()
        self._find_graphs()
        self._fill_report(seen)
        self._check()
        return self.plan

    def _sharers(self, module: nn.Module) -> list[nn.Module]:
        weight = module._parameters.get("weight")
        return [] if weight is None else self.owners[weight]

    def _decide(self, group: list[nn.Module]) -> Task | Skipped:
        """What to do with a linear (first) and the modules that share its weight."""
        module, paths = group[0], [path for m in group for path in self.paths[m]]
        found = self.recipe.match(paths)
        if found is None or found[1].weights == "keep":
            self.matched.update(found[:1] if found else ())
            return self._skip(module, "kept by the recipe", expected=True)
        self.matched.add(found[0])
        reason = self._refusal(group)
        if reason is not None:
            return self._skip(module, reason, expected=reason == linear_rule.TOO_SMALL)
        linears = [m for m in group if linear_rule.looks_linear(m)]
        embeddings = [m for m in group if isinstance(m, nn.Embedding)]
        spec, note = self._settle(found[1], group)
        if spec.weights == "int8" and spec.activations is None:
            spec = dataclasses.replace(spec, activations=self.activations)
        return Task(paths, spec, note, linears, embeddings)

    def _refusal(self, group: list[nn.Module]) -> str | None:
        linears = [m for m in group if linear_rule.looks_linear(m)]
        if len(group) > 1 and not all(isinstance(m, nn.Linear) for m in linears):
            return "a Conv1D that shares its weight"
        for module in group:
            if not linear_rule.looks_linear(module):
                reason = embedding_rule.refusal(module)
                if reason:
                    return reason
                continue
            if module in self.adapters:
                return "belongs to an adapter"
            for parent, name in self.slots[module]:
                reason = linear_rule.refusal(module, parent, name)
                if reason:
                    return reason
        return None

    def _settle(self, spec: Spec, group: list[nn.Module]) -> tuple[Spec, str]:
        """The spec with its group size settled, and a note where it differs from what was asked for."""
        path = self.paths[group[0]][0]
        if len(group) > 1:
            tied = "tied to " + ", ".join(self.paths[m][0] for m in group[1:])
            if spec.weights == "int4":
                return Spec("int8", activations="keep"), f"{tied}: int8"
            return spec, tied
        try:
            settled, note = linear_rule.resolve(spec, group[0])
        except ValueError as error:
            raise GroupSizeError(f"{path}: {error}") from None
        if self.strict and settled.weights != spec.weights:
            raise GroupSizeError(f"strict: {path} would become {note}")
        return settled, note

    def _skip(self, module: nn.Module, reason: str, expected: bool = False) -> Skipped:
        weight = module._parameters.get("weight")
        return Skipped(self.paths[module][0], reason, 0 if weight is None else _nbytes(weight), expected)

    def _find_merges(self) -> None:
        """Replaced linears that their block calls on one input, where they can share a buffer."""
        blocks: dict[nn.Module, dict[str, Task]] = defaultdict(dict)
        for task in self.plan.tasks:
            wanted = merging.pays(task.linears[0].weight.device) if self.merge is None else self.merge
            if wanted and len(task.linears) == 1 and not task.embeddings and len(self.slots[task.linears[0]]) == 1:
                parent, name = self.slots[task.linears[0]][0]
                blocks[parent][name] = task
        for block, tasks in blocks.items():
            found = merging.find(block) if len(tasks) > 1 and merging.is_block(block) else None
            if found is None:
                continue
            path = self.paths[block][0]
            kept, reason = merging.eligible(found, {name: (t.linears[0], t.spec) for name, t in tasks.items()})
            refusal = merging.refusal(block, path)
            if refusal or reason:
                self.plan.report.apart.append(Merged(path, found.members, found.activation, refusal or reason))
            if kept is not None and not refusal:
                self.plan.merges.append(Merge(path, block, kept))
        self.plan.report.merged = [merge.row() for merge in self.plan.merges]

    def _find_step(self) -> None:
        """Whether one token's forward can be fused, by the structure of what generates; the proof comes with the patch."""
        plan = self.plan
        plan.generating = next((m for m in self.paths if step_rule.generates(m)), None)
        if plan.generating is None:
            return
        device = next((p.device for p in plan.generating.parameters()), torch.device("cpu"))
        plan.merge_kept = merging.pays(device) if self.merge is None else self.merge
        try:
            plan.report.decode_step = str(DecodeStep.of(plan.generating))
        except Unfusable as error:
            plan.report.decode_step = f"not fused: {error}"

    def _find_graphs(self) -> None:
        """Encoders in the model, whose calls are recorded as they repeat."""
        for path, module in graphs_rule.find(self.model) if self.graphs else ():
            reason = graphs_rule.refusal(module)
            self.plan.report.graphs.append(Graphed(path, reason=reason))
            if not reason:
                self.plan.graphed.append((path, module))

    def _does_nothing(self) -> bool:
        """Whether the model would run as before: graphs are no change where there is nothing to record them with."""
        return not self.plan.tasks and not any(
            parameter.device.type in RECORDERS for _, module in self.plan.graphed for parameter in module.parameters()
        )

    def _fill_report(self, seen: set[nn.Module]) -> None:
        """What is replaced, what stays beside linears, and the totals."""
        report = self.plan.report
        report.replaced = [task.replaced() for task in self.plan.tasks]
        for module, paths in self.paths.items():
            for name, parameter in module._parameters.items():
                if module in seen or parameter is None or _dim(parameter) < 2:
                    continue
                where = f"{paths[0]}.{name}" if paths[0] else name
                reason, expected = _why_left(module, parameter)
                report.skipped.append(Skipped(where, reason, _nbytes(parameter), expected))
        report.bytes_before = model_bytes(self.model)
        report.bytes_after = report.bytes_before - sum(r.bytes_before - r.bytes_after for r in report.replaced)
        devices = {task.linears[0].weight.device for task in self.plan.tasks}
        if not devices and report.step_fused:
            devices = {parameter.device for parameter in self.model.parameters()}
        report.backend = ", ".join(sorted({_native.describe(d) for d in devices}))
        activations = {task.spec.activations for task in self.plan.tasks if task.spec.activations}
        report.notes += [f"int8 weights with activations={kind!r}" for kind in sorted(activations)]
        if self.model.training:
            report.notes.append("the model is in train mode: replaced weights are frozen, everything else still trains")

    def _check(self) -> None:
        report = self.plan.report
        if self.strict:
            unexpected = [s for s in report.skipped if not s.expected]
            if unexpected:
                first = unexpected[0]
                raise PatchError(f"strict: {first.path} stays ({first.reason}); {len(unexpected)} such in all")
            if "reference" in report.backend:
                raise PatchError("strict: no fast kernels for this device; `fastinfer doctor` says why")
        if self._does_nothing() and not report.step_fused:
            linears = [s for s in report.skipped if s.path in {p for m in self.paths for p in self.paths[m]}]
            first_reason = (
                f"its first linear, {linears[0].path}: {linears[0].reason}" if linears else "it has no linear"
            )
            step = f"; its decode step is {report.decode_step}" if report.decode_step else ""
            raise PatchError(f"{self.recipe!r} replaces nothing in this model: {first_reason}{step}")


def _dim(parameter: nn.Parameter) -> int:
    return 0 if isinstance(parameter, nn.parameter.UninitializedTensorMixin) else parameter.dim()


def _nbytes(parameter: nn.Parameter) -> int:
    return 0 if isinstance(parameter, nn.parameter.UninitializedTensorMixin) else parameter.nbytes


def _why_left(module: nn.Module, parameter: torch.Tensor) -> tuple[str, bool]:
    """Why a weight that is no linear's stays, and whether that is by design."""
    if isinstance(module, nn.Embedding):
        return "embedding: looked up, not multiplied", True
    if parameter.dim() == 3 and "expert" in type(module).__name__.lower():
        return "fused experts: 3-D weights are not replaced yet", False
    return f"{type(module).__name__}: not a linear", True


def _adapter_modules(model: nn.Module) -> set[nn.Module]:
    """Modules that PEFT put in: everything in a tuner layer but its base layer, and copies that it trains."""
    if "peft" not in sys.modules:
        return set()
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    inside: set[nn.Module] = set()

    def add(children: Iterable[nn.Module]) -> None:
        for child in children:
            inside.update(child.modules())

    for module in model.modules():
        children = dict(module.named_children())
        if isinstance(module, ModulesToSaveWrapper):
            add([module])
        elif isinstance(module, BaseTunerLayer):
            add(child for name, child in children.items() if name != "base_layer")
    return inside
