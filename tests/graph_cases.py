"""What the tests of recorded calls share. On the CPU a closure stands in for a CUDA graph."""

import contextlib

import torch
from architectures import build, inputs
from torch.utils._pytree import tree_flatten

import fastinfer
from fastinfer.modules import capture


class Closures:
    """Records work as a closure that runs it again and writes its results where the first ones are, as a graph does."""

    def __init__(self, device):
        self.device, self.replays, self.recorded = device, 0, 0

    def record(self, work):
        try:
            result = work()
        except Exception as error:
            raise capture.CaptureError(str(error)) from error
        self.recorded += 1

        def replay():
            self.replays += 1
            for own, new in zip(tree_flatten(result)[0], tree_flatten(work())[0]):
                if isinstance(own, torch.Tensor):
                    own.copy_(new)

        return replay, result

    def ordered(self):
        return contextlib.nullcontext()

    def finish(self):
        pass


def graphs_of(model):
    return vars(model)["_fastinfer"].graphed[0][1]


def replays(model):
    """Replays that callers got the results of; those that prove a recording are not counted."""
    return sum(graph.replays for graph in graphs_of(model).graphs.values())


def patched(name="bert", **options):
    return fastinfer.patch(build(name), **options)


@torch.inference_mode()
def call(model, given=None, **more):
    return model(**(given or inputs("bert")), **more)


def recorded(**options):
    """A patched model, one of whose calls is replayed."""
    model = patched(**options)
    for _ in range(3):
        call(model)
    assert replays(model) == 1 and len(graphs_of(model).graphs) == 1
    return model
