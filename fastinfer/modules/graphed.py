"""A forward that records its calls in CUDA graphs, one for each kind of input, and replays them.

An encoder's call launches hundreds of kernels, each too short for a small batch to hide the launch of the next; a graph of
them is one launch. A call is recorded when it comes a second time with inputs of the same names, shapes and dtypes and the
same flags; from then on inputs are copied to where the graph reads them, and its outputs to the caller.

A recording counts once it is proven: its replays must return what the calls do, with the mask at hand and with one full of
holes. Scaled dot-product attention adds its mask, which torch makes of a boolean one in every layer anew; where a model
proves equal when it is given an additive mask of four dimensions at once, that is what is recorded.

Never replayed: calls with gradients, in train mode, under autocast or modes that watch operators, with other arguments than
tensors and plain values, large ones, or while hooks sit inside; nor after anything in the module has changed (snapshot.py).
Under a capture transformers makes its attention masks for any content: it leaves none out because it holds only ones.
"""

from __future__ import annotations

import inspect
import threading
import types
from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastinfer.modules.capture import RECORDERS, CaptureError
from fastinfer.modules.snapshot import PLAIN, Snapshot

MAX_TOKENS = 4096
"""Integers in one input, above which a call is bound by its arithmetic and stays as it is."""
MAX_ELEMENTS = MAX_TOKENS * 1024
"""The same for floating-point inputs: embeddings, pixels."""
MAX_GRAPHS = 16
MAX_COUNTED = 64
PAYS_FROM = 16
"""Replays from which on a recording has paid for itself."""
CLOSE = 0.05
"""Largest difference of a replay from the call itself, in parts of its largest output. Masks decide which of torch's
attention kernels runs, so that they may differ in rounding."""

MASK = "attention_mask"
Inputs = tuple[tuple, list[torch.Tensor]]


def inputs_of(args: tuple, kwargs: dict) -> Inputs | None:
    """What calls must have in common to share a graph, and the tensors; None where a call is not one for a graph."""
    kinds: list[tuple] = []
    tensors: list[torch.Tensor] = []
    for name, value in (*enumerate(args), *sorted(kwargs.items())):
        if type(value) is torch.Tensor:
            if value.numel() > (MAX_ELEMENTS if value.is_floating_point() else MAX_TOKENS):
                return None
            kinds.append((name, value.shape, value.dtype))
            tensors.append(value)
        elif type(value) in PLAIN:
            kinds.append((name, type(value), value))
        else:
            return None
    if not tensors or any(t.device != tensors[0].device for t in tensors):
        return None
    return (tensors[0].device, *kinds), tensors


def tensors_of(call: partial) -> list[torch.Tensor]:
    """The tensors among a call's arguments, in the order of inputs_of."""
    values = (*call.args, *(value for _, value in sorted(call.keywords.items())))
    return [value for value in values if type(value) is torch.Tensor]


def with_inputs(call: partial, tensors: list[torch.Tensor]) -> partial:
    """The same call of other tensors."""
    rest = iter(tensors)
    args = [next(rest) if type(value) is torch.Tensor else value for value in call.args]
    kwargs = {n: next(rest) if type(v) is torch.Tensor else v for n, v in sorted(call.keywords.items())}
    return partial(call.func, *args, **kwargs)


def has_mask(call: partial) -> bool:
    """Whether it is given the usual mask of tokens [B, L], by name."""
    mask = call.keywords.get(MASK)
    return isinstance(mask, torch.Tensor) and mask.dim() == 2 and not mask.is_floating_point()


def with_holes(call: partial) -> partial:
    """The same call with every third token masked, and no other."""
    mask = call.keywords[MASK]
    kept = (torch.arange(mask.shape[1], device=mask.device) % 3 != 2).to(mask.dtype)
    return partial(call.func, *call.args, **call.keywords | {MASK: kept.expand_as(mask).contiguous()})


def with_additive_mask(call: partial) -> partial:
    """The same call given what attention adds to its scores [B, 1, L, L] as the mask."""
    mask, dtype = call.keywords[MASK], call.args[0].dtype
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask == 0, -torch.inf)
    bias = bias[:, None, None].expand(-1, -1, mask.shape[1], -1)
    return partial(call.func, *call.args, **call.keywords | {MASK: bias})


def only_infers(device: torch.device) -> bool:
    """Whether nothing but the result of a call is wanted: no gradients, no casts, nobody who watches operators."""
    return not (
        torch.is_grad_enabled()
        or torch.is_autocast_enabled(device.type)
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.jit.is_tracing()
        or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    )


class Graph:
    """One recorded call: where its inputs go, and where its outputs are."""

    def __init__(self, buffers: list[torch.Tensor], replay: Any, result: Any):
        self.buffers, self.replay, self.replays = buffers, replay, 0
        self.leaves, self.structure = tree_flatten(result)
        for leaf in self.leaves:
            on_device = type(leaf) is torch.Tensor and leaf.device == buffers[0].device
            if not on_device and type(leaf) not in PLAIN:
                raise CaptureError(f"it returns a {type(leaf).__name__} that a graph would not make anew")

    def __call__(self, tensors: list[torch.Tensor]) -> Any:
        torch._foreach_copy_(self.buffers, tensors)
        self.replay()
        self.replays += 1
        copies = {id(leaf): leaf.clone() for leaf in self.leaves if isinstance(leaf, torch.Tensor)}
        return tree_unflatten([copies.get(id(leaf), leaf) for leaf in self.leaves], self.structure)

    def check(self, tensors: list[torch.Tensor], expected: Any) -> None:
        """Raises CaptureError where a replay does not return what the call itself has returned."""
        leaves, structure = tree_flatten(expected)
        if structure != self.structure or [type(x) for x in leaves] != [type(x) for x in self.leaves]:
            raise CaptureError("it returns something else when recorded")
        for actual, wanted in zip(tree_flatten(self(tensors))[0], leaves):
            if not isinstance(wanted, torch.Tensor):
                same = actual == wanted
            elif not wanted.is_floating_point():
                same = actual.shape == wanted.shape and actual.dtype == wanted.dtype
            else:
                scale = wanted.float().nan_to_num().abs().max().item() if wanted.numel() else 0.0
                same = torch.allclose(actual.float(), wanted.float(), rtol=0, atol=CLOSE * scale, equal_nan=True)
            if not same:
                raise CaptureError("a replay returned something else than the call")


class Graphs:
    """The graphs of one module. Copies and pickles of it begin without any.

    Attributes:
        reason: why calls are not recorded any more, or ""
    """

    def __init__(self, module: nn.Module):
        self.module, self.reason = module, ""
        self._start()

    def _start(self) -> None:
        self.lock = threading.RLock()
        self.recorder: Any = None
        self.snapshot: Snapshot | None = None
        self.graphs: OrderedDict[tuple, Graph] = OrderedDict()
        self.calls: OrderedDict[tuple, int] = OrderedDict()
        self.patience = 2
        self.additive = True

    def __getstate__(self) -> dict:
        return {"module": self.module, "reason": self.reason}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._start()

    def __call__(self, work: Any, args: tuple, kwargs: dict) -> Any:
        """`work(*args, **kwargs)`, or a replay of it."""
        inputs = None if self.reason or self.module.training else inputs_of(args, kwargs)
        if inputs is None or inputs[1][0].device.type not in RECORDERS or not only_infers(inputs[1][0].device):
            return work(*args, **kwargs)
        key, tensors = inputs
        with self.lock:
            if key in self.graphs:
                replayed = self._replay(key, tensors)
                if replayed is not None:
                    return replayed[0]
                self._judge(self.graphs[key])
                self.clear()
            if self._due(key):
                result = work(*args, **kwargs)
                self._record(key, partial(work, *args, **kwargs), tensors, result)
                return result
        return work(*args, **kwargs)

    def clear(self) -> None:
        """Drops all graphs."""
        with self.lock:
            if self.recorder is not None:
                self.recorder.finish()
            self.recorder = self.snapshot = None
            self.graphs.clear()
            self.calls.clear()

    def _replay(self, key: tuple, tensors: list[torch.Tensor]) -> tuple[Any] | None:
        """A replay's result, in a tuple; None where the module has changed."""
        assert self.snapshot is not None
        if not self.snapshot.in_place():
            return None
        self.graphs.move_to_end(key)
        with self.recorder.ordered():
            result = self.graphs[key](tensors)
        # The rest is asked while the GPU works; what is out of date costs a replay for nothing, no more.
        return (result,) if self.snapshot.unchanged() else None

    def _due(self, key: tuple) -> bool:
        """Counts a call; whether calls like it have come often enough."""
        self.calls[key] = count = self.calls.pop(key, 0) + 1
        if len(self.calls) > MAX_COUNTED:
            self.calls.popitem(last=False)
        return count >= self.patience

    def _judge(self, graph: Graph) -> None:
        """Of a graph that is about to go: where it has not paid, the next ones are waited for longer."""
        if graph.replays < PAYS_FROM:
            self.patience = min(2 * self.patience, MAX_COUNTED)

    def _record(self, key: tuple, work: partial, tensors: list[torch.Tensor], result: Any) -> None:
        """Records a call that has just returned `result`; what forbids it is kept as the reason."""
        if self.snapshot is not None and not (self.snapshot.in_place() and self.snapshot.unchanged()):
            self.clear()
        try:
            with torch.inference_mode(False), torch.no_grad():
                snapshot = self._prepare(tensors[0].device)
                if snapshot.training or snapshot.hooked():  # that may change again
                    return
                graph = self._proven(work, tensors, result)
                if not snapshot.unchanged():
                    raise CaptureError("it changes its own attributes when called")
        except Exception as error:  # whatever it is, the call itself has succeeded
            self.clear()
            self.reason = str(error).partition("\n")[0] or type(error).__name__
            return
        if len(self.graphs) >= MAX_GRAPHS:
            self.recorder.finish()
            self._judge(self.graphs.popitem(last=False)[1])
        self.graphs[key] = graph
        self.calls.pop(key, None)

    def _prepare(self, device: torch.device) -> Snapshot:
        if self.recorder is None or self.recorder.device != device:
            self.clear()
            self.recorder = RECORDERS[device.type](device)
        if self.snapshot is None:
            self.snapshot = Snapshot(self.module, device)
        return self.snapshot

    def _proven(self, call: partial, tensors: list[torch.Tensor], result: Any) -> Graph:
        """A recording of a call whose replays return what such calls do."""
        expected = [(tensors, result)]
        if has_mask(call):
            holes = with_holes(call)
            expected.append((tensors_of(holes), holes()))
        if self.additive and has_mask(call) and getattr(self.module.config, "_attn_implementation", "") == "sdpa":
            try:
                return self._recorded(call, tensors, expected, with_additive_mask)
            except CaptureError:
                self.additive = False
        return self._recorded(call, tensors, expected)

    def _recorded(self, call: partial, tensors: list[torch.Tensor], expected: list, change: Any = None) -> Graph:
        buffers = [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]
        fixed = with_inputs(call, buffers)
        versions = [buffer._version for buffer in buffers]
        replay, result = self.recorder.record(lambda: change(fixed)() if change else fixed())
        if [buffer._version for buffer in buffers] != versions:
            raise CaptureError("it writes to its inputs")
        graph = Graph(buffers, replay, result)
        with self.recorder.ordered():
            for given, wanted in expected:
                graph.check(given, wanted)
        graph.replays = 0
        return graph


class GraphedForward(partial):
    """graphed_forward bound to a module and its graphs; shows the signature of the forward it stands for."""

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(types.MethodType(type(self.args[0]).forward, self.args[0]))


def graphed_forward(module: nn.Module, graphs: Graphs, *args, **kwargs) -> Any:
    """The forward of the module's class, from a graph where there is one."""
    if torch.compiler.is_compiling():
        return type(module).forward(module, *args, **kwargs)
    return graphs(partial(type(module).forward, module), args, kwargs)


def cleared_apply(module: nn.Module, graphs: Graphs, *args, **kwargs) -> nn.Module:
    """`_apply`, which moves and casts: graphs must not keep memory that nobody else needs any more."""
    graphs.clear()
    return type(module)._apply(module, *args, **kwargs)


def install(module: nn.Module) -> Graphs:
    """Gives a module a forward that records its calls, below accelerate's hook if it has one."""
    graphs = Graphs(module)
    slot = "_old_forward" if "_hf_hook" in vars(module) else "forward"
    setattr(module, slot, GraphedForward(graphed_forward, module, graphs))
    module._apply = partial(cleared_apply, module, graphs)
    return graphs


def uninstall(graphs: Graphs) -> None:
    """Takes it away again, wherever accelerate has moved it since."""
    module = graphs.module
    for slot in ("forward", "_old_forward"):
        if isinstance(vars(module).get(slot), GraphedForward):
            delattr(module, slot)
            if slot == "_old_forward":
                module._old_forward = types.MethodType(type(module).forward, module)
    vars(module).pop("_apply", None)
    graphs.clear()
