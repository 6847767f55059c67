"""patch, unpatch, report: replaces a model's modules in place, and gives them back."""

from __future__ import annotations

import copy
import dataclasses
import threading
import time
import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fastinfer.errors import PatchError
from fastinfer.generation.cache import KINDS
from fastinfer.generation.engine import Engine
from fastinfer.generation.install import generate
from fastinfer.generation.step import DecodeStep
from fastinfer.generation.support import model_refusal
from fastinfer.hooks import adopt, move_accelerate_hook
from fastinfer.modules import QuantizedLinear, QuantizedModule, blocks, graphed
from fastinfer.modules.siblings import Siblings
from fastinfer.originals import Checkpoint, Held, InCheckpoint
from fastinfer.overrides import REFUSING, load_state_dict
from fastinfer.planning import RECORD, Merge, Plan, Planner, Task, check_patchable, slots_of
from fastinfer.recipe import Recipe
from fastinfer.reports import Graphed, Report
from fastinfer.rules import embedding as embedding_rule
from fastinfer.rules import linear as linear_rule
from fastinfer.rules import merging

LONG_WORK = 1 << 26  # weights to quantise from which on a progress bar is worth showing
_lock = threading.RLock()


def patch(
    model: nn.Module,
    weights: str | Recipe | Mapping = "int8",
    *,
    group_size: int | None = None,
    method: str | None = None,
    activations: str | None = None,
    merge: bool | None = None,
    kv_cache: str = "keep",
    graphs: bool = True,
    strict: bool = False,
    dry_run: bool = False,
    reversible: bool = True,
) -> Any:
    """Replaces a model's linears by quantised ones on fastinfer's kernels, in place.

    Args:
        model:       a transformers model, or any module around one (SentenceTransformer, PeftModel, nn.Module)
        weights:     "int8" | "int4" | "keep" for every linear, or a Recipe (or its mapping) by module path
        group_size:  int4 groups along K: 32 | 64 | 128; by default 64 where it divides, else 32, else int8
        method:      how int4 is found without data: "hqq" (default) | "rtn"
        activations: "keep" | "int8" (with int8 weights); by default int8 for encoders, keep for causal models
        merge:       linears that a block calls on one input (query, key, value; gate, up) run as one matmul; by default
                     on CUDA, where it saves launches
        kv_cache:    how `generate` keeps keys and values: "keep" | "int8" (a scale a token and head)
        graphs:      an encoder's calls whose inputs have shapes seen before run as one CUDA graph, where gradients are
                     off and batches small; copies of inputs and outputs keep this unseen (CUDA only)
        strict:      raise where something that the recipe asks for stays, or where no fast kernels are there
        dry_run:     change nothing and return the Report of what would be done
        reversible:  keep the originals for `unpatch`: in the model's checkpoint where it holds them bit for bit,
                     else in host memory
    Returns: the model; with dry_run, a Report
    Raises:  PatchError (GroupSizeError), RecipeError, TypeError, ValueError (kv_cache); the model is then unchanged

    An embedding whose weight is tied to a replaced head shares the head's int8 weight. Only this instance changes.

    What generates gets a fused decode step where its structure is known and the step proves equal to its forward, also with
    weights="keep"; float linears that take one input then share a buffer, of which their Parameters are slices.
    """
    inner = _unwrap(model)
    recipe = Recipe.of(weights, group_size=group_size, method=method, activations=activations)
    if kv_cache not in KINDS:
        raise ValueError(f"kv_cache must be one of {', '.join(map(repr, KINDS))}, got {kv_cache!r}")
    for name, value, kinds in (("merge", merge, (bool, type(None))), ("graphs", graphs, (bool,))):
        if not isinstance(value, kinds):
            raise TypeError(f"{name} must be {' or '.join(k.__name__ for k in kinds)}, got {value!r}")
    with _lock, torch.inference_mode(False), torch.no_grad():
        check_patchable(inner)
        plan = Planner(inner, recipe, strict, merge, graphs).run()
        if dry_run:
            return plan.report
        _carry_out(inner, plan, reversible, kv_cache, strict)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Gives a patched model its original modules and weights back, bit for bit; returns the model.

    Weights come back on the device, and in the dtype, that `.to()` has moved the patched model to since.

    Raises: PatchError where the model is not patched, was patched with reversible=False, has had other quantised
            weights loaded or a replaced module taken out since, or where an original cannot be read back from its
            checkpoint; the model is then unchanged
    """
    with _lock, torch.inference_mode(False), torch.no_grad():
        inner = _unwrap(model)
        record = _record(inner)
        if not record.report.reversible:
            raise PatchError("this model was patched with reversible=False: its original weights are gone")
        record.restore(inner)
    return model


def report(model: nn.Module) -> Report:
    """What `patch` did to this model. Raises PatchError where it is not patched."""
    record = _record(_unwrap(model))
    record.note_idle()
    if record.engine is not None:
        record.report.last_generate = record.engine.last
    record.note_graphs()
    return record.report


def _unwrap(model: nn.Module) -> nn.Module:
    """The model itself, also from inside torch.compile's wrapper."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return model._orig_mod if isinstance(model, torch._dynamo.OptimizedModule) else model


# --- what a patched model carries


@dataclasses.dataclass
class _Swap:
    """One module that another stands for, and the slot (parent, name) it was taken from."""

    parent: nn.Module
    name: str
    old: nn.Module
    new: QuantizedModule


class _TakenWeight:
    """An original weight: its bits in `original`, and its Parameter as long as anyone else holds on to it.

    The old modules hold a placeholder meanwhile. Where the Parameter is still alive on `restore` (an optimizer has it,
    or a module outside of what was patched), that very object comes back.
    """

    def __init__(self, modules: list[nn.Module], original: Held | InCheckpoint, new: QuantizedLinear):
        weight = modules[0].weight
        self.modules, self.original, self.new = modules, original, new
        self.reference: Any = weakref.ref(weight)
        self.requires_grad, self.grad, self.attributes = weight.requires_grad, weight.grad, dict(vars(weight))
        for module in modules:
            module._parameters["weight"] = None

    def restore(self, tensor: torch.Tensor) -> None:
        weight = self.reference()
        if weight is None:
            tensor = tensor.to(self.new.weight.device, self.new.compute_dtype)
            weight = nn.Parameter(tensor, requires_grad=self.requires_grad)
            weight.grad = self.grad
            vars(weight).update(self.attributes)
        else:
            weight.data = weight.data.to(self.new.weight.device, self.new.compute_dtype)
        for module in self.modules:
            module._parameters["weight"] = weight

    def __deepcopy__(self, memo: dict) -> _TakenWeight:
        other = copy.copy(self)
        for name in ("modules", "original", "new", "grad"):
            setattr(other, name, copy.deepcopy(getattr(self, name), memo))
        other.reference = _gone
        return other

    def __getstate__(self) -> dict:
        return vars(self) | {"reference": _gone}


def _gone() -> None:
    """A reference to a Parameter that a copy or a pickle does not share."""


@dataclasses.dataclass
class _Record:
    """What a patched model carries so that it can be reported and undone. Copies along with the model."""

    report: Report
    swaps: list[_Swap] = dataclasses.field(default_factory=list)
    taken: list[_TakenWeight] = dataclasses.field(default_factory=list)
    overridden: list[tuple[nn.Module, str, Any]] = dataclasses.field(default_factory=list)
    merged: list[tuple[Merge, Siblings]] = dataclasses.field(default_factory=list)
    step: DecodeStep | None = None
    engine: Engine | None = None
    graphed: list[tuple[str, graphed.Graphs]] = dataclasses.field(default_factory=list)

    def note_idle(self) -> None:
        """Brings the report up to date with blocks that turned out to call their linears on different inputs."""
        idle = {merge.row() for merge, siblings in self.merged if siblings.idle}
        self.report.merged = [row for row in self.report.merged if row not in idle]
        self.report.apart += [
            merge.row("called on different inputs")
            for merge, siblings in self.merged
            if siblings.idle and merge.row("called on different inputs") not in self.report.apart
        ]

    def note_graphs(self) -> None:
        """Brings the report up to date with what has been recorded."""
        refused = [row for row in self.report.graphs if row.path not in dict(self.graphed)]
        now = [Graphed(path, len(graphs.graphs), graphs.reason) for path, graphs in self.graphed]
        self.report.graphs = now + refused

    def restore(self, model: nn.Module) -> None:
        """Puts weights, modules and methods back. Everything that can fail comes first."""
        slots = slots_of(model)
        for swap in self.swaps:
            if swap.parent._modules.get(swap.name) is not swap.new and swap.new not in slots:
                raise PatchError(
                    f"{swap.name} of {type(swap.parent).__name__} was exchanged since the model was patched"
                )
            if swap.new.weights_loaded:
                raise PatchError("other quantised weights were loaded into this model since it was patched")
        for weight in self.taken:
            if weight.new.weight.is_meta:
                raise PatchError("the patched model is on the meta device: move it back first")
        tensors = [weight.original.load() for weight in self.taken]
        if self.step is not None:
            self.step.release()
        for _, graphs in self.graphed:
            graphed.uninstall(graphs)
        for merge, siblings in self.merged:
            blocks.uninstall(merge.block)
            siblings.release_biases()
        for weight, tensor in zip(self.taken, tensors, strict=True):
            weight.restore(tensor)
        for swap in reversed(self.swaps):
            self._put_back(swap, slots)
        for module, name, before in self.overridden:
            vars(module).pop(name, None)
            vars(module).update(before)
        vars(model).pop(RECORD, None)

    @staticmethod
    def _put_back(swap: _Swap, slots: dict) -> None:
        """The old module into the slot it came from, or to where its replacement sits now (inside an adapter, say)."""
        old, new = swap.old, swap.new
        move_accelerate_hook(new, old)
        if "bias" in old._parameters:
            old._parameters["bias"] = new._parameters.get("bias")
        old._is_full_backward_hook = new._is_full_backward_hook
        old.train(new.training)
        if swap.parent._modules.get(swap.name) is new:
            swap.parent._modules[swap.name] = old
        for parent, name in slots.get(new, ()):
            parent._modules[name] = old


def _record(model: nn.Module) -> _Record:
    record = vars(model).get(RECORD)
    if record is None:
        raise PatchError("this model is not patched (unpatch and report take what patch was given)")
    return record


# --- doing


def _carry_out(model: nn.Module, plan: Plan, reversible: bool, kv_cache: str, strict: bool) -> None:
    """Does what the plan says; restores the model where anything fails."""
    started = time.perf_counter()
    report = plan.report
    report.reversible, report.dry_run, report.replaced = reversible, False, []
    record = _Record(report)
    checkpoint = Checkpoint(model) if reversible else None
    slots = slots_of(model)
    elements = sum(task.linears[0].weight.numel() for task in plan.tasks)
    try:
        setattr(model, RECORD, record)
        for task in tqdm(plan.tasks, "fastinfer: quantising", disable=None if elements > LONG_WORK else True):
            try:
                _replace(task, slots, record, checkpoint)
            except ValueError as error:
                raise PatchError(f"{task.paths[0]}: {error}") from error
        report.merged = [merge.row() for merge in plan.merges if _merge(merge, record)]
        _fuse_step(plan, record)
        for path, module in plan.graphed:
            record.graphed.append((path, graphed.install(module)))
        _override_methods(model, record)
        _wrap_generate(plan, record, kv_cache, strict)
        _sum_up(record, checkpoint)
        report.seconds = time.perf_counter() - started
    except BaseException:
        record.restore(model)
        raise
    if not reversible:
        record.swaps, record.taken, report.originals_held = [], [], 0


def _replace(task: Task, slots: dict, record: _Record, checkpoint: Checkpoint | None) -> None:
    """Builds what stands for a task's modules, puts it in all their places, and takes the original weight away."""
    weight = task.linears[0].weight
    first = linear_rule.build(task.linears[0], task.spec)
    pairs: list[tuple[nn.Module, QuantizedModule]] = [(task.linears[0], first)]
    pairs += [(old, linear_rule.build_tied(old, first)) for old in task.linears[1:]]
    pairs += [(old, embedding_rule.build(old, first)) for old in task.embeddings]
    replaced = task.replaced(first)
    found = checkpoint.find(task.paths, weight.data) if checkpoint else None
    original = found or Held(weight.data.cpu())
    for old, new in pairs:
        for parent, name in slots[old]:
            record.swaps.append(_Swap(parent, name, old, new))
            parent._modules[name] = new
        adopt(old, new)
    record.taken.append(_TakenWeight([old for old, _ in pairs], original, first))
    record.report.replaced.append(replaced)


def _merge(merge: Merge, record: _Record) -> bool:
    """Merges linears that were replaced, unless that cannot be proven; whether it was done."""
    siblings = Siblings([merge.block._modules[name] for name in merge.found.members], merge.found.activation)
    record.merged.append((merge, siblings))
    reason = merging.build(siblings)
    if reason:
        record.merged.pop()
        record.report.apart.append(merge.row(reason))
        return False
    blocks.install(merge.block, siblings, merge.found.down)
    return True


def _fuse_step(plan: Plan, record: _Record) -> None:
    """Fuses the decode step of the model as it is now, where that proves right; the report says what came of it."""
    if plan.generating is not None:
        record.step, record.report.decode_step = DecodeStep.proven(plan.generating, plan.merge_kept)
    if not plan.tasks and record.step is None and not plan.graphed:
        raise PatchError(f"nothing is replaced in this model, and its decode step is {record.report.decode_step}")


def _sum_up(record: _Record, checkpoint: Checkpoint | None) -> None:
    report = record.report
    report.originals_held = sum(w.original.tensor.nbytes for w in record.taken if isinstance(w.original, Held))
    in_checkpoint = [isinstance(w.original, InCheckpoint) for w in record.taken]
    report.originals_in_checkpoint = sum(
        row.bytes_before for row, there in zip(report.replaced, in_checkpoint, strict=True) if there
    )
    foretold = report.bytes_before - report.bytes_after
    report.bytes_after += foretold - sum(row.bytes_before - row.bytes_after for row in report.replaced)
    if checkpoint is not None and checkpoint.trouble:
        report.notes.append(checkpoint.trouble)


def _override_methods(model: nn.Module, record: _Record) -> None:
    """Methods that would do harm to a patched model refuse, or check first."""
    from transformers import PreTrainedModel

    overrides = [(model, "load_state_dict", load_state_dict)]
    for module in model.modules() if record.swaps else ():
        if isinstance(module, PreTrainedModel):
            overrides += [(module, name, method) for name, method in REFUSING.items()]
    for module, name, method in overrides:
        _override(module, name, partial(method, module), record)  # unlike a bound method, this can be pickled


def _override(module: nn.Module, name: str, method: Any, record: _Record) -> None:
    before = {name: vars(module)[name]} if name in vars(module) else {}
    record.overridden.append((module, name, before))
    setattr(module, name, method)


def _wrap_generate(plan: Plan, record: _Record, kv_cache: str, strict: bool) -> None:
    """Has `generate` of the model whose decode step is fused run our loop; where it cannot, the report says why."""
    model, step = plan.generating, record.step
    reason = "its decode step is not fused" if step is None else model_refusal(model)
    if model is not None and step is not None and not reason:
        record.engine = Engine(model, step, kv_cache)
        _override(model, "generate", partial(generate, model, record.engine), record)
        return
    if kv_cache != "keep":
        note = f"kv_cache={kv_cache!r} has no effect: {reason}"
        if strict:
            raise PatchError(f"strict: {note}")
        record.report.notes.append(note)
    if step is not None:
        record.report.last_generate = f"always in transformers' loop: {reason}"
