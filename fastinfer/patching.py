"""patch, unpatch, report: replaces a model's modules in place, and gives them back."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from functools import partial

import torch
from torch import nn
from tqdm import tqdm

from fastinfer import _native
from fastinfer.errors import GroupSizeError, PatchError, RecipeError
from fastinfer.modules import Int8Linear, QuantizedModule
from fastinfer.originals import Checkpoint, Held, InCheckpoint
from fastinfer.recipe import Recipe, Spec
from fastinfer.reports import Replaced, Report, Skipped
from fastinfer.rules import embedding as embedding_rule
from fastinfer.rules import linear as linear_rule

RECORD = "_fastinfer"
LONG_WORK = 1 << 26  # weights to quantise from which on a progress bar is worth showing
_lock = threading.RLock()


def patch(
    model: nn.Module,
    weights: str | Recipe | Mapping = "int8",
    *,
    group_size: int | None = None,
    method: str | None = None,
    activations: str | None = None,
    strict: bool = False,
    dry_run: bool = False,
    reversible: bool = True,
) -> nn.Module | Report:
    """Replaces a model's linears by quantised ones on fastinfer's kernels, in place.

    Args:
        model:       a transformers model, or any module around one (SentenceTransformer, PeftModel, nn.Module)
        weights:     "int8" | "int4" | "keep" for every linear, or a Recipe (or its mapping) by module path
        group_size:  int4 groups along K: 32 | 64 | 128; by default 64 where it divides, else 32, else int8
        method:      how int4 is found without data: "hqq" (default) | "rtn"
        activations: "keep" | "int8" (with int8 weights); by default int8 for encoders, keep for causal models
        strict:      raise where a linear that the recipe asks for stays, or where no fast kernels are there
        dry_run:     change nothing and return the Report of what would be done
        reversible:  keep the originals for `unpatch`: in the model's checkpoint where it holds them bit for bit,
                     else in host memory
    Returns: the model; with dry_run, a Report
    Raises:  PatchError (GroupSizeError), RecipeError, TypeError; the model is then unchanged

    An embedding whose weight is tied to a replaced head shares the head's int8 weight. Only this instance changes.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    recipe = Recipe.of(weights, group_size=group_size, method=method, activations=activations)
    with _lock:
        _check_patchable(model)
        plan = _plan(model, recipe)
        _check_plan(plan, recipe, strict)
        if dry_run:
            return plan.report
        started = time.perf_counter()
        record = _apply(model, plan, reversible)
        record.report.seconds = time.perf_counter() - started
        return model


def unpatch(model: nn.Module) -> nn.Module:
    """Gives a patched model its original modules and weights back, bit for bit; returns the model.

    Weights come back on the device, and in the dtype, that `.to()` has moved the patched model to since.

    Raises: PatchError where the model is not patched, was patched with reversible=False, or an original cannot be
            read back from its checkpoint; the model is then unchanged
    """
    with _lock:
        record = _record(model)
        if not record.report.reversible:
            raise PatchError("this model was patched with reversible=False: its original weights are gone")
        loaded = [original.load() for original in record.originals]
        for weight, tensor, (device, dtype) in zip(record.weights, loaded, record.whereabouts()):
            weight.data = tensor.to(device, dtype)
        _undo(model, record)
        return model


def report(model: nn.Module) -> Report:
    """What `patch` did to this model. Raises PatchError where it is not patched."""
    return _record(model).report


# --- planning: nothing changes here


@dataclasses.dataclass
class _Task:
    """One weight to replace: the linears that multiply by it, the embeddings that look it up, all their places."""

    path: str
    spec: Spec
    note: str
    linears: list[nn.Module]
    embeddings: list[nn.Module]


@dataclasses.dataclass
class _Plan:
    tasks: list[_Task]
    places: dict[nn.Module, list[tuple[nn.Module, str]]]
    report: Report


def _check_patchable(model: nn.Module) -> None:
    if RECORD in vars(model) or any(isinstance(m, QuantizedModule) for m in model.modules()):
        raise PatchError("this model is patched already: unpatch it first, or patch once with a Recipe")
    on_meta = [name for name, p in model.named_parameters() if p.is_meta]
    offloaded = any(getattr(h, "offload", False) for m in model.modules() for h in linear_rule.accelerate_hooks(m))
    if on_meta and not offloaded:
        raise PatchError(f"{on_meta[0]} and {len(on_meta) - 1} more are on the meta device: load the weights first")


def _places(model: nn.Module) -> tuple[dict[nn.Module, list[tuple[nn.Module, str]]], dict[nn.Module, str]]:
    """Every slot (parent, name) that a module sits in, and its first path."""
    slots: dict[nn.Module, list[tuple[nn.Module, str]]] = defaultdict(list)
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                slots[child].append((parent, name))
    return slots, {module: path for path, module in model.named_modules()}


def _plan(model: nn.Module, recipe: Recipe) -> _Plan:
    slots, paths = _places(model)
    owners = defaultdict(list)
    for module in paths:
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[parameter].append(module)
    activations = linear_rule.default_activations(model)
    plan = _Plan([], slots, Report())
    matched, seen = set(), set()
    for module, path in paths.items():
        if not linear_rule.looks_linear(module) or module in seen or module not in slots:
            continue
        found = recipe.match(path)
        matched.add(found and found[0])
        sharers = [m for m in owners.get(module._parameters.get("weight"), []) if m is not module]
        seen.update([module, *(m for m in sharers if linear_rule.looks_linear(m))])
        task = _task(module, path, found, sharers, slots, recipe, paths, activations)
        if isinstance(task, _Task):
            plan.tasks.append(task)
        else:
            plan.report.skipped.append(task)
    _report_plan(plan, model, paths)
    unmatched = [p for p in recipe.patterns if p not in matched and p != "*"]
    if unmatched:
        raise RecipeError(f"pattern {unmatched[0]!r} matches no linear that an earlier pattern has not taken")
    return plan


def _task(module, path, found, sharers, slots, recipe, paths, activations) -> _Task | Skipped:
    """What to do with one linear and the modules that share its weight."""

    def skip(reason: str, expected: bool = False) -> Skipped:
        size = sum(p.nbytes for p in module._parameters.values() if p is not None)
        return Skipped(path, reason, size, expected)

    if found is None or found[1].weights == "keep":
        return skip("kept by the recipe", expected=True)
    linears = [module, *(m for m in sharers if linear_rule.looks_linear(m))]
    embeddings = [m for m in sharers if not linear_rule.looks_linear(m)]
    for linear in linears:
        for parent, name in slots[linear]:
            reason = linear_rule.refusal(linear, parent, name)
            if reason:
                return skip(reason, expected="nothing to gain" in reason)
    if sharers and not all(isinstance(linear, nn.Linear) for linear in linears):
        return skip("a Conv1D that shares its weight")
    for other in embeddings:
        reason = embedding_rule.refusal(other)
        if reason:
            return skip(reason)
    for other in sharers:
        kept = recipe.match(paths[other])
        if kept is not None and kept[0] != "*" and kept[1].weights == "keep":
            return skip(f"shares its weight with {paths[other]}, kept by the recipe", expected=True)
    try:
        spec, note = linear_rule.resolve(found[1], module)
    except ValueError as error:
        raise GroupSizeError(f"{path}: {error}") from None
    if sharers:
        tied = "tied to " + ", ".join(paths[m] for m in sharers)
        note = f"{tied}: int8" if spec.weights == "int4" else tied
        if spec.weights == "int4":
            spec = Spec("int8", activations="keep")
    if spec.weights == "int8" and spec.activations is None:
        spec = dataclasses.replace(spec, activations=activations)
    return _Task(path, spec, note, linears, embeddings)


def _report_plan(plan: _Plan, model: nn.Module, paths: dict[nn.Module, str]) -> None:
    """Fills in what the plan replaces, and what it leaves beside linears."""
    report = plan.report
    covered: set[nn.Module] = set()
    for task in plan.tasks:
        report.replaced.append(_replaced(task))
        covered.update(m for m in (*task.linears, *task.embeddings))
    covered.update(m for m in paths if linear_rule.looks_linear(m))
    for module, path in paths.items():
        if module in covered:
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() >= 2:
                where = f"{path}.{name}" if path else name
                report.skipped.append(Skipped(where, _why_left(module, parameter), parameter.nbytes, True))
    tensors = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    report.bytes_before = sum(tensors.values())
    report.bytes_after = report.bytes_before - sum(r.bytes_before - r.bytes_after for r in report.replaced)
    devices = {task.linears[0].weight.device for task in plan.tasks}
    report.backend = ", ".join(sorted({_native.describe(d) for d in devices}))
    activations = {t.spec.activations for t in plan.tasks if t.spec.weights == "int8"}
    for kind in sorted(a for a in activations if a):
        report.notes.append(f"int8 weights with activations={kind!r}")
    if model.training:
        report.notes.append("the model is in train mode: replaced weights are frozen, everything else still trains")


def _why_left(module: nn.Module, parameter: nn.Parameter) -> str:
    if isinstance(module, nn.Embedding):
        return "embedding: looked up, not multiplied"
    if parameter.dim() == 3 and "expert" in type(module).__name__.lower():
        return "fused experts: 3-D weights are not replaced yet"
    return f"{type(module).__name__}: not a linear"


def _replaced(task: _Task, built: Int8Linear | None = None) -> Replaced:
    linear, spec = task.linears[0], task.spec
    kind = "int4" if spec.weights == "int4" else "int8"
    kind += f" g{spec.group_size} {spec.method}" if kind == "int4" else ""
    return Replaced(
        path=task.path,
        kind=kind,
        bytes_before=linear.weight.nbytes,
        bytes_after=linear_rule.packed_bytes(linear, spec),
        error=built.weight_error if built is not None else None,
        note=task.note,
    )


def _check_plan(plan: _Plan, recipe: Recipe, strict: bool) -> None:
    if strict:
        unexpected = [s for s in plan.report.skipped if not s.expected]
        if unexpected:
            first = unexpected[0]
            raise PatchError(f"strict: {first.path} stays ({first.reason}); {len(unexpected)} such in all")
        if "reference" in plan.report.backend:
            raise PatchError("strict: no fast kernels for this device; `fastinfer doctor` says why")
    if not plan.tasks:
        skipped = [s for s in plan.report.skipped if not s.reason.startswith("embedding")]
        reason = f"; the first linear, {skipped[0].path}: {skipped[0].reason}" if skipped else ": it has no linear"
        raise PatchError(f"{recipe!r} replaces nothing in this {'model' if skipped else 'module'}{reason}")


# --- doing and undoing


@dataclasses.dataclass
class _Record:
    """What a patched model carries so that it can be reported and undone. Copies along with the model."""

    report: Report
    swaps: list[tuple[nn.Module, str, nn.Module, nn.Module]] = dataclasses.field(default_factory=list)
    weights: list[nn.Parameter] = dataclasses.field(default_factory=list)
    originals: list[Held | InCheckpoint] = dataclasses.field(default_factory=list)
    replacements: list[QuantizedModule] = dataclasses.field(default_factory=list)
    overridden: list[tuple[nn.Module, str]] = dataclasses.field(default_factory=list)

    def whereabouts(self) -> list[tuple[torch.device, torch.dtype]]:
        """The device and dtype each original has to come back in."""
        return [(new.weight.device, new.compute_dtype) for new in self.replacements]


def _record(model: nn.Module) -> _Record:
    record = vars(model).get(RECORD) if isinstance(model, nn.Module) else None
    if record is None:
        raise PatchError("this model is not patched (unpatch and report take what patch was given)")
    return record


def _apply(model: nn.Module, plan: _Plan, reversible: bool) -> _Record:
    report = plan.report
    report.reversible, report.replaced = reversible, []
    record = _Record(report)
    checkpoint = Checkpoint(model) if reversible else None
    moved: list[tuple[nn.Parameter, torch.Tensor]] = []
    elements = sum(task.linears[0].weight.numel() for task in plan.tasks)
    try:
        for task in tqdm(plan.tasks, "fastinfer: quantising", disable=None if elements > LONG_WORK else True):
            weight = task.linears[0].weight
            _replace(task, plan, record)
            report.replaced.append(_replaced(task, record.replacements[-1]))
            original = (checkpoint and checkpoint.find(f"{task.path}.weight", weight.data)) or Held(weight.data.cpu())
            moved.append((weight, original))
            record.weights.append(weight)
            record.originals.append(original)
            weight.data = weight.data.new_empty(0)
        _override_methods(model, record)
    except BaseException as error:
        for (weight, original), (device, dtype) in zip(moved, record.whereabouts()):
            weight.data = original.load().to(device, dtype)
        _undo(model, record)
        if isinstance(error, ValueError) and not isinstance(error, PatchError):
            raise PatchError(f"{task.path}: {error}") from error
        raise
    if not reversible:
        record.originals, record.swaps = [], []
    held = [o for o in record.originals if isinstance(o, Held)]
    report.originals_held = sum(o.tensor.nbytes for o in held)
    report.originals_in_checkpoint = sum(
        r.bytes_before for r, o in zip(report.replaced, record.originals) if isinstance(o, InCheckpoint)
    )
    setattr(model, RECORD, record)
    return record


def _replace(task: _Task, plan: _Plan, record: _Record) -> None:
    """Builds what stands for a task's modules and puts it in all their places."""
    first = linear_rule.build(task.linears[0], task.spec)
    record.replacements.append(first)
    pairs = [(task.linears[0], first)]
    pairs += [(old, linear_rule.build_tied(old, first)) for old in task.linears[1:]]
    pairs += [(old, embedding_rule.build(old, first)) for old in task.embeddings]
    for old, new in pairs:
        _adopt(old, new)
        for parent, name in plan.places[old]:
            parent._modules[name] = new
            record.swaps.append((parent, name, old, new))


HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def _adopt(old: nn.Module, new: nn.Module) -> None:
    """Hands a module's hooks and marks over. The hook tables are shared, so that removing a hook works on both."""
    for table in HOOK_TABLES:
        setattr(new, table, getattr(old, table))
    new._is_full_backward_hook = old._is_full_backward_hook
    _move_accelerate_hook(old, new)
    vars(new).update({key: value for key, value in vars(old).items() if key not in vars(new) and key != "forward"})


def _move_accelerate_hook(source: nn.Module, target: nn.Module) -> None:
    """accelerate's hooks wrap the forward of one module: they are taken off and put on again, never copied."""
    hook = getattr(source, "_hf_hook", None)
    if hook is None:
        return
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    remove_hook_from_module(source)
    vars(source).pop("forward", None)
    add_hook_to_module(target, hook)


def _undo(model: nn.Module, record: _Record) -> None:
    """Puts the original modules and methods back."""
    for parent, name, old, new in reversed(record.swaps):
        _move_accelerate_hook(new, old)
        parent._modules[name] = old.train(new.training)
    for module, name in record.overridden:
        vars(module).pop(name, None)
    vars(model).pop(RECORD, None)


def _override_methods(model: nn.Module, record: _Record) -> None:
    """Methods that would do harm to a patched model refuse, or check first."""
    from transformers import PreTrainedModel

    overrides = [(model, "load_state_dict", _load_state_dict)]
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            overrides += [(module, name, method) for name, method in REFUSING.items()]
    for module, name, method in overrides:
        setattr(module, name, partial(method, module))  # unlike a bound method, this can be pickled
        record.overridden.append((module, name))


def _load_state_dict(self: nn.Module, state_dict: Mapping, *args, **kwargs):
    """load_state_dict that checks every quantised entry before any is copied."""
    for path, module in self.named_modules():
        if isinstance(module, QuantizedModule):
            module.check_state_dict(state_dict, f"{path}." if path else "")
    return type(self).load_state_dict(self, state_dict, *args, **kwargs)


def _refuse_save(self: nn.Module, *args, **kwargs):
    raise PatchError(
        "save_pretrained on a patched model would write int8 and int4 tensors that from_pretrained cannot read: "
        "save it before patching, or call fastinfer.unpatch first; state_dict() holds the quantised tensors"
    )


def _refuse_resize(self: nn.Module, *args, **kwargs):
    raise PatchError("resize_token_embeddings needs the original weights: unpatch, resize, patch again")


REFUSING = {"save_pretrained": _refuse_save, "resize_token_embeddings": _refuse_resize}
