"""The weights to tune for: the linears of models, as `patch` would have them, by size."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from fastinfer.ops.layout import TILE_COLUMNS, TILE_ROWS
from fastinfer.planning import Planner
from fastinfer.recipe import Recipe
from fastinfer.rules import linear as linear_rule
from fastinfer.tuning import LINEAR_COLUMNS
from fastinfer.tuning.plans import Weight


def of_model(name: str) -> list[tuple[int, int]]:
    """N and K of a model's linears after a patch that merges, each size once, from its configuration alone."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(name)
    kinds = [getattr(transformers, kind, None) for kind in config.architectures or ()]
    with torch.device("meta"):
        known = kinds[0] if kinds else None
        model = transformers.AutoModel.from_config(config) if known is None else known._from_config(config)
    return of_module(model)


def of_module(model: nn.Module) -> list[tuple[int, int]]:
    """The same of a module, which may be on the meta device. Its tensors are lost."""
    _give_values(model.eval())
    plan = Planner(model, Recipe.of("int8"), strict=False, merge=True).run()
    sizes = {task.paths[0]: tuple(linear_rule.float_weight(task.linears[0]).shape) for task in plan.tasks}
    found = []
    for merge in plan.merges:
        members = [sizes.pop(f"{merge.path}.{name}" if merge.path else name) for name in merge.found.members]
        found.append((sum(n for n, _ in members), members[0][1]))
    return list(dict.fromkeys([*found, *sizes.values()]))


def _give_values(model: nn.Module) -> None:
    """Zeros that take no memory for all tensors: what merges is seen by running blocks, which meta tensors do not let."""
    made: dict[int, torch.Tensor] = {}

    def zeros(t: torch.Tensor) -> torch.Tensor:
        value = torch.zeros((), dtype=t.dtype).expand(t.shape)
        return nn.Parameter(value, requires_grad=False) if isinstance(t, nn.Parameter) else value

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = made.setdefault(id(tensor), zeros(tensor))


def takes(kind: str, n: int, k: int) -> bool:
    """Whether there are plans for a weight [n, k] of `kind`."""
    least, multiple = (1, LINEAR_COLUMNS) if kind == "linear" else (TILE_ROWS, TILE_COLUMNS)
    return n >= least and k > 0 and k % multiple == 0


def of_shapes(shapes: Iterable[tuple[int, int]], kinds: Iterable[str], groups: Iterable[int]) -> list[Weight]:
    """Every weight of these sizes and kinds that there are plans for. Prints what is skipped; ValueError if all is."""
    groups_of, kinds = {"w4a16": tuple(groups)}, tuple(kinds)
    found = []
    for n, k in dict.fromkeys(shapes):
        taken = [kind for kind in kinds if takes(kind, n, k)]
        found += [Weight(kind, group, n, k) for kind in taken for group in groups_of.get(kind, (0,))]
        if len(taken) < len(kinds):
            print(f"{n}×{k}: skipped for {', '.join(kind for kind in kinds if kind not in taken)}")
    if not found:
        raise ValueError(
            f"no size is left: N must be {TILE_ROWS} or more and K a multiple of {TILE_COLUMNS} "
            f"(linear: any N, K a multiple of {LINEAR_COLUMNS})"
        )
    return found
