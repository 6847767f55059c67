"""Siblings: linears that a block calls on the same input, as one matmul on one packed buffer.

The linears stay where they are, under their names. Their packed tensors are consecutive slices of the merged ones, so that
there is one copy and each works alone too: every layout orders the rows of sixteen among themselves, so slices of whole
sixteens keep their layout. In a pair (a gate and its up, for the gated epilogue) the merged rows take turns in eights; the
two linears then hold a half of the memory each, marked PAIR, and read themselves out of the whole.

Who runs the merged matmul? The block's forward (fastinfer/modules/blocks.py) opens a round for its own duration. The first
sibling called in it computes for all, and the others take their share if they are given the very same tensor, unchanged
since. Nothing outlives the round, so nothing stale is ever returned, and a sibling that is called alone, or inside of an
adapter, or with hooks, does what it always does.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn

from fastinfer.modules.quantized import MARK, QuantizedModule
from fastinfer.ops.layout import GATE_ROWS, ROW, convert, interleave_gate_up, split_gate_up

PAIR = "pair"
MISSES = 2
"""Rounds in a row that did not use all of a product, after which a product is not made any more."""


ROWS = 16
"""Every layout reorders whole groups of so many rows, so a slice of them is in that layout too."""


class Sibling(QuantizedModule):
    """Mixin of a linear whose packed tensors may be its share of `siblings`' merged ones."""

    siblings: Siblings | None = None

    def _in_layout(self, name: str, layout: str) -> torch.Tensor:
        tensor = getattr(self, name)
        mark = getattr(tensor, MARK, _unmarked(self) or layout)
        if mark != PAIR:
            return tensor if mark == layout else super()._in_layout(name, layout)
        assert self.siblings is not None
        rows = self.siblings.rows_of(self, name)
        return convert(rows, ROW, layout) if name in self.laid_out else rows

    def packed(self, layout: str) -> dict[str, torch.Tensor]:
        """Weight and scales in the order `layout`, whatever order they are in."""
        current = ROW if self.layout == PAIR else self.layout
        tensors = {name: self._in_layout(name, current).detach() for name in ("weight", *self.scales)}
        return tensors | {name: convert(tensors[name], current, layout) for name in self.laid_out}

    def stand_alone(self) -> None:
        """Takes the tensors of this linear out of a pair's, in an order of their own."""
        if self.layout == PAIR:
            tensors = self.packed(ROW)
            for name, tensor in tensors.items():
                _put(self, name, tensor, ROW if name in self.laid_out else None)
            self.use_native_layout()

    def use_native_layout(self) -> None:
        if self.layout != PAIR:
            super().use_native_layout()

    def _apply(self, fn, recurse: bool = True):
        probe = torch.empty(0, dtype=torch.int8, device=self.weight.device)
        if self.siblings is not None and fn(probe) is not probe:
            self.siblings.stand_alone()
        super()._apply(fn, recurse)
        self._settle()
        return self

    def _load_from_state_dict(self, *args):
        self.stand_alone()
        super()._load_from_state_dict(*args)
        self._settle()

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self.layout != PAIR:
            return super()._save_to_state_dict(destination, prefix, keep_vars)
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        destination.update({prefix + name: tensor for name, tensor in self.packed(ROW).items()})

    def __getstate__(self) -> dict:
        """A copy or a pickle holds the linears apart, compactly, and brings them together again when it is complete."""
        state = super().__getstate__()
        if self.siblings is None:
            return state
        layout = state[MARK] = ROW if self.layout == PAIR else self.layout
        packed = {name: tensor.clone() for name, tensor in self.packed(layout).items()}
        weight = nn.Parameter(packed.pop("weight"), requires_grad=False)
        state["_parameters"] = self._parameters | {"weight": weight}
        state["_buffers"] = self._buffers | packed
        return state

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._settle()

    def _settle(self) -> None:
        if self.siblings is not None:
            self.siblings.settle()


def _put(linear: QuantizedModule, name: str, tensor: torch.Tensor, layout: str | None) -> None:
    """`tensor` as what `linear` calls `name`, in the order `layout` (None: it has none)."""
    linear._put(name, tensor)
    if layout is not None:
        setattr(getattr(linear, name), MARK, layout)
        linear._last_layout = layout


def _exporting() -> bool:
    """An exported program knows the tensors of registered modules alone: the linears' own, not the whole."""
    return torch.compiler.is_exporting()


def _unmarked(linear: Any) -> str | None:
    """The order of a tensor without a mark: one that torch.export put in another's place is in the module's."""
    return linear.layout if _exporting() else None


class _Round:
    """One call of a block: the input its siblings share, and what they have not fetched yet."""

    def __init__(self) -> None:
        self.x: torch.Tensor | None = None
        self.version: int | None = None
        self.shares: dict[int, torch.Tensor] = {}


def _version(x: torch.Tensor) -> int | None:
    """Tensors of inference mode have none, and traced ones are functional; for those the probe at patch time stands in."""
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version


class Siblings:
    """The merged tensors of some linears, and the rounds in which they share a product.

    linears:    QuantizedLinears of one kind, shape of input, dtype and device, in the order of their rows
    activation: "none", or for a pair (gate, up) "silu_mul" | "gelu_mul" | "gelu_tanh_mul"
    """

    def __init__(self, linears: list[Any], activation: str = "none"):
        self.linears, self.activation = linears, activation
        self.pair = activation != "none"
        self.misses = 0
        self._reset()
        for linear in linears:
            linear.siblings = self

    def _reset(self) -> None:
        self.whole: Any = None
        self._layout = ROW
        self.apart: str | None = "they have not been merged yet"
        self._handed: list[tuple[dict[str, Any], str, torch.Tensor, int]] = []
        self._rounds: dict[int, _Round] = {}
        self._traced: _Round | None = None

    def __getstate__(self) -> dict:
        return {name: vars(self)[name] for name in ("linears", "activation", "pair", "misses")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._reset()
        self.settle()

    @property
    def idle(self) -> bool:
        """Whether the block turned out to call its linears on different inputs."""
        return self.misses >= MISSES

    # --- one buffer

    def why_apart(self) -> str | None:
        """What keeps the linears from being merged as they are now, or None."""
        first = self.linears[0]
        for linear in self.linears[1:]:
            for what in ("kind", "in_features", "group_size", "compute_dtype"):
                if getattr(linear, what, None) != getattr(first, what, None):
                    return f"they differ in {what}"
            if linear.weight.device != first.weight.device or linear.weight_scale.dtype != first.weight_scale.dtype:
                return "they differ in device or dtype"
        biases = {(b.device, b.dtype) for b in self._biases() if b is not None}
        if any(linear.weight.is_meta for linear in self.linears):
            return "they are on the meta device"
        if not all(hasattr(linear.weight, MARK) for linear in self.linears):
            return "a weight was put in from outside"
        if len(biases) > 1 or any(device != first.weight.device for device, _ in biases):
            return "their biases differ in device or dtype"
        if any(linear.out_features % ROWS for linear in self.linears):
            return f"their output features are not all multiples of {ROWS}"
        return None

    def _biases(self) -> list[nn.Parameter | None]:
        return [linear.bias for linear in self.linears]

    def settle(self) -> None:
        """Merges the linears again where something has brought them apart and nothing keeps them so."""
        complete = all("_like" in vars(linear).get("_buffers", ()) for linear in getattr(self, "linears", ()))
        if not complete or not hasattr(self, "_rounds"):
            return  # in the middle of a copy
        self.apart = self.why_apart()
        if self.apart is None and not (self.intact() and self.whole.compute_dtype == self.linears[0].compute_dtype):
            self._join()
        elif self.apart is not None and not any(linear.layout == PAIR for linear in self.linears):
            self._handed, self.whole = [], None

    def _join(self) -> None:
        """Merges; everything that can fail comes before the first change."""
        first, names = self.linears[0], ("weight", *self.linears[0].scales)
        layout = ROW if self.pair else first.native_layout()
        parts = [linear.packed(layout) for linear in self.linears]
        combine = (lambda pieces: interleave_gate_up(*pieces)) if self.pair else torch.cat
        merged = {name: combine([part[name] for part in parts]) for name in names}
        whole = first.alike(merged, None if self.pair else self._merged_bias(), layout)
        whole.use_native_layout()
        self.whole, self._layout, self._handed = whole, whole.layout, []
        start = 0
        for linear in self.linears:
            end = start + linear.out_features
            for name in (*names, "bias"):
                if getattr(whole, name) is None or getattr(linear, name) is None:
                    continue
                laid_out = name in linear.laid_out
                mark = PAIR if self.pair else whole.layout if laid_out else None
                _put(linear, name, getattr(whole, name).detach()[start:end], mark)
                table: Any = linear._buffers if name in linear.scales else linear._parameters
                self._handed.append((table, name, table[name], table[name].data_ptr()))
            start = end

    def _merged_bias(self) -> nn.Parameter | None:
        """The biases end to end, zeros where a linear has none; the linears' Parameters become slices of it."""
        given = [bias for bias in self._biases() if bias is not None]
        if not given:
            return None
        return nn.Parameter(torch.cat(self._bias_pieces(given[0])), requires_grad=False)

    def _bias_pieces(self, like: torch.Tensor) -> list[torch.Tensor]:
        return [like.new_zeros(one.out_features) if one.bias is None else one.bias.detach() for one in self.linears]

    def stand_alone(self) -> None:
        """Takes a pair apart: its halves cannot be moved one by one."""
        for linear in self.linears if self.pair else ():
            linear.stand_alone()
        self._reset()

    def release_biases(self) -> None:
        """Gives every bias, which is the original's too, memory of its own."""
        for bias in self._biases():
            if bias is not None:
                bias.data = bias.detach().clone()

    def part(self) -> None:
        """Undoes the merge: every linear gets tensors of its own."""
        for linear in self.linears:
            linear.stand_alone()
            for name in ("weight", *linear.scales):
                tensor = getattr(linear, name)
                _put(linear, name, tensor.detach().clone(), getattr(tensor, MARK, None))
            linear.siblings = None
        self.release_biases()
        self._reset()

    def rows_of(self, linear: Any, name: str) -> torch.Tensor:
        """What a linear of a pair calls `name`, in row order."""
        merged = (
            torch.cat([getattr(each, name) for each in self.linears]) if _exporting() else getattr(self.whole, name)
        )
        merged = convert(merged.detach(), self._layout, ROW) if name in linear.laid_out else merged
        return split_gate_up(merged)[self._index(linear)]

    def _index(self, linear: Any) -> int:
        return next(i for i, each in enumerate(self.linears) if each is linear)

    def intact(self) -> bool:
        """Whether every linear still holds what it was handed."""
        if self.whole is None or not self._handed:
            return False
        traced = torch.compiler.is_compiling()  # data_ptr cannot be traced; whether it is the same tensor can
        return all((traced or own.data_ptr() == ptr) and t.get(name) is own for t, name, own, ptr in self._handed)

    def holds(self, linear: Any) -> bool:
        """Whether a linear can be read out of the whole of a pair only."""
        tensors = [getattr(linear, name) for name in ("weight", *linear.scales)]
        return self.pair and all(getattr(tensor, MARK, _unmarked(linear)) == PAIR for tensor in tensors)

    def ready(self) -> bool:
        """Whether the merged tensors stand for what the linears hold."""
        return self.apart is None and not _exporting() and self.intact()

    # --- one matmul

    def product(self, x: torch.Tensor, activation: str = "none") -> torch.Tensor:
        """The merged matmul; with its activation, a pair's act(gate(x)) · up(x)."""
        bias = self.whole.bias
        if self.pair and any(b is not None for b in self._biases()):
            bias = interleave_gate_up(*self._bias_pieces(x))
        return self.whole.matmul(x, bias, activation)

    def split(self, y: torch.Tensor) -> list[torch.Tensor]:
        """The columns of each linear. They share no element, so each gets a version counter of its own."""
        if self.pair:
            eights = y.unflatten(-1, (-1, 2, GATE_ROWS))
            return [eights[..., i, :].flatten(-2) for i in range(2)]
        columns = y.split([linear.out_features for linear in self.linears], -1)
        return list(columns) if torch.compiler.is_compiling() else [c.data for c in columns]

    def begin(self) -> tuple[Any, bool] | None:
        """Opens a round for this thread; the token ends it. None where the linears are to be called one by one."""
        if self.idle or not self.ready():
            return None
        if torch.compiler.is_compiling():
            before, self._traced = self._traced, _Round()
            return before, True
        thread = threading.get_ident()
        before, self._rounds[thread] = self._rounds.get(thread), _Round()
        return before, False

    def end(self, token: tuple[Any, bool] | None, completed: bool) -> None:
        """Closes the round that `token` opened; one that was `completed` shows whether the product was of use."""
        if token is None:
            return
        before, traced = token
        if traced:
            self._traced = before
            return
        thread = threading.get_ident()
        ended = self._rounds.pop(thread, None)
        if before is not None:
            self._rounds[thread] = before
        if completed and ended is not None and ended.x is not None:
            self.misses = self.misses + 1 if ended.shares else 0

    def share(self, linear: Any, given: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
        """This linear's columns of the product with x (`given`, cast), or None where it has to compute them itself."""
        columns = self._from_round(linear, given, x)
        if columns is None and self.holds(linear) and not _exporting():
            with torch.no_grad():  # to compute twice as much is cheaper than to reorder the weights
                columns = self.split(self.product(x))[self._index(linear)]
        return columns

    def _from_round(self, linear: Any, given: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
        traced = torch.compiler.is_compiling()
        current = self._traced if traced else self._rounds.get(threading.get_ident())
        if current is None:
            return None
        if current.x is None:
            current.x, current.version = given, _version(given)
            with torch.no_grad():
                current.shares = dict(enumerate(self.split(self.product(x))))
        elif current.x is not given or current.version != _version(given):
            return None
        return current.shares.pop(self._index(linear), None)
