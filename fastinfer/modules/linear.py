"""Int8Linear and Int4Linear: nn.Linear on quantised weights."""

from __future__ import annotations

import torch
from torch import nn

from fastinfer import ops
from fastinfer.modules.siblings import PAIR, Sibling
from fastinfer.ops._common import FLOATS
from fastinfer.ops.int4_matmul import dequantize as dequantize_int4
from fastinfer.ops.int8_matmul import dequantize as dequantize_int8
from fastinfer.ops.layout import ROW, native_layout
from fastinfer.quantize import quantize_int4, quantize_int8

ACTIVATIONS = ("keep", "int8")


def float_weight(module: nn.Module) -> torch.Tensor:
    """The weight [N, K] of an nn.Linear, or of a transformers Conv1D, which keeps it as [K, N]."""
    return module.weight if isinstance(module, nn.Linear) else module.weight.T


class _FrozenLinear(torch.autograd.Function):
    """A quantised linear with gradients for its input and bias; the weight is frozen."""

    @staticmethod
    def forward(ctx, x, bias, module, share):
        ctx.module, ctx.x_dtype = module, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return module.matmul(x, bias) if share is None else share.data

    @staticmethod
    def backward(ctx, grad):
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ ctx.module.dequantize(grad.dtype)).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_x, grad_bias, None, None


class QuantizedLinear(Sibling, nn.Linear):
    """What Int8Linear and Int4Linear share. Takes tensors as they are; `from_float` quantises.

    `weight_error` is ‖ŵ − w‖ / ‖w‖ where the module was made by `from_float`, else None.
    """

    weight_error: float | None = None

    def __init__(self, weight, in_features: int, bias: nn.Parameter | None, like: torch.dtype, layout: str):
        nn.Module.__init__(self)  # nn.Linear's own would allocate a float weight
        self.in_features, self.out_features = in_features, weight.shape[0]
        if not isinstance(weight, nn.Parameter):
            weight = nn.Parameter(weight, requires_grad=False)
        self._init_quantized(weight, layout, like)
        self.register_parameter("bias", bias)

    def matmul(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        activation: str = "none",
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The op on this module's weight, without gradients; an activation takes the weight as a merged gate and up."""
        raise NotImplementedError

    def alike(self, packed: dict[str, torch.Tensor], bias: nn.Parameter | None, layout: str) -> QuantizedLinear:
        """A linear like this one on other tensors."""
        return type(self)(**packed, bias=bias, like=self.compute_dtype, layout=layout)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight [N, K] that this module multiplies by, in `dtype` (default: `compute_dtype`)."""
        raise NotImplementedError

    @property
    def kind(self) -> str:
        """What the kernels call the bits of weights and activations: "w4a16", "w8a16" or "w8a8"."""
        raise NotImplementedError

    def _operands(self) -> tuple:
        """Weight, scales, and the layout they are in, as an op takes them."""
        layout = ROW if self.layout == PAIR else self.layout
        return (*(self._in_layout(name, layout) for name in ("weight", *self.scales)), layout)

    def native_layout(self) -> str:
        size = self.out_features, self.in_features
        return native_layout(self.weight.device, self.kind, *size, self.compute_dtype)

    def reset_parameters(self) -> None:
        raise RuntimeError(f"{type(self).__name__} has no random initialisation: build it from a float module")

    def cast(self, x: torch.Tensor) -> torch.Tensor:
        """x in the dtype that this linear computes in."""
        if x.dtype in FLOATS:
            if torch.is_autocast_enabled(x.device.type):
                return x.to(torch.get_autocast_dtype(x.device.type))
            if self.compute_dtype == torch.float32:
                return x.float()  # a layer kept in fp32 beside 16-bit ones is kept for its range
        return x

    def trains(self, x: torch.Tensor) -> bool:
        """Whether a call needs gradients."""
        bias = self.bias
        return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given, x = x, self.cast(x)
        trains = self.trains(x)
        share = None
        if self.siblings is not None and not (trains and torch.compiler.is_compiling()):
            share = self.siblings.share(self, given, x)
        if trains:
            return _FrozenLinear.apply(x, self.bias, self, share)
        return self.matmul(x, self.bias) if share is None else share

    @staticmethod
    def _bias_for(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        """The bias in a dtype that the op takes beside x."""
        return bias if bias is None or bias.dtype in (x.dtype, torch.float32) else bias.float()


class Int8Linear(QuantizedLinear):
    """y = x · (weight · weight_scale)ᵀ + bias with int8 weights.

    weight [N, K] int8 and bias [N] are Parameters, weight_scale [N] fp32 is a buffer. `activations` says whether x
    stays as it is ("keep", `ops.int8_matmul`) or is quantised per token ("int8", `ops.int8_scaled_matmul`).
    """

    def __init__(self, weight, weight_scale, bias=None, *, like=torch.float32, activations="keep", layout=ROW):
        if activations not in ACTIVATIONS:
            raise ValueError(f"activations must be one of {ACTIVATIONS}, got {activations!r}")
        super().__init__(weight, weight.shape[1], bias, like, layout)
        self.register_buffer("weight_scale", weight_scale)
        self.activations = activations

    @classmethod
    def from_float(cls, module: nn.Module, activations: str = "keep") -> Int8Linear:
        """Quantises an nn.Linear or a transformers Conv1D (round to nearest, one scale an output channel).

        Shares the module's bias; leaves the module unchanged.
        """
        weight = float_weight(module)
        w, w_scale, error = quantize_int8(weight)
        new = cls(w, w_scale, module.bias, like=weight.dtype, activations=activations)
        new.weight_error = error
        new.use_native_layout()
        return new.train(module.training)

    @property
    def kind(self) -> str:
        return "w8a16" if self.activations == "keep" else "w8a8"

    def matmul(self, x, bias, activation="none", residual=None) -> torch.Tensor:
        op = ops.int8_matmul if self.activations == "keep" else ops.int8_scaled_matmul
        w, w_scale, layout = self._operands()
        return op(x, w, w_scale, self._bias_for(x, bias), residual, activation, layout)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        w, w_scale, layout = self._operands()
        return dequantize_int8(w, w_scale, layout, dtype or self.compute_dtype)

    def alike(self, packed: dict[str, torch.Tensor], bias: nn.Parameter | None, layout: str) -> Int8Linear:
        settings = {"like": self.compute_dtype, "activations": self.activations, "layout": layout}
        return Int8Linear(**packed, bias=bias, **settings)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activations={self.activations!r}"


class Int4Linear(QuantizedLinear):
    """y = x · ((q − weight_zero) · weight_scale)ᵀ + bias with int4 weights in groups along K.

    weight [N, K/2] int8 (two q a byte) and bias [N] are Parameters; weight_scale and weight_zero [N, K/G] are fp16
    buffers, or fp32 where fp16 is too narrow for the weights.
    """

    laid_out = ("weight", "weight_scale", "weight_zero")
    scales = ("weight_scale", "weight_zero")

    def __init__(self, weight, weight_scale, weight_zero, bias=None, *, like=torch.float32, layout=ROW):
        super().__init__(weight, 2 * weight.shape[1], bias, like, layout)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("weight_zero", weight_zero)

    @classmethod
    def from_float(cls, module: nn.Module, group_size: int = 64, method: str = "hqq") -> Int4Linear:
        """Quantises an nn.Linear or a transformers Conv1D (see `quantize.quantize_int4`).

        Shares the module's bias; leaves the module unchanged.
        """
        weight = float_weight(module)
        w, w_scale, w_zero, error = quantize_int4(weight, group_size, method)
        new = cls(w, w_scale, w_zero, module.bias, like=weight.dtype)
        new.weight_error = error
        new.use_native_layout()
        return new.train(module.training)

    @property
    def kind(self) -> str:
        return "w4a16"

    def native_layout(self) -> str:
        wide = self.weight.device.type == "cuda" and self.weight_scale.dtype == torch.float32
        return ROW if wide else super().native_layout()  # the tile kernels take 16-bit scales

    @property
    def group_size(self) -> int:
        return self.in_features // self.weight_scale.shape[1]

    def matmul(self, x, bias, activation="none", residual=None) -> torch.Tensor:
        w, w_scale, w_zero, layout = self._operands()
        return ops.int4_matmul(x, w, w_scale, w_zero, self._bias_for(x, bias), residual, activation, layout)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        w, w_scale, w_zero, layout = self._operands()
        return dequantize_int4(w, w_scale, w_zero, layout, dtype or self.compute_dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group_size={self.group_size}"
