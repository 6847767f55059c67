// Every operator schema of fastinfer, one table. Implementations register beside their kernels
// (csrc/cpu/<op>.cpp, csrc/cuda/<op>.cu); fakes and references live in fastinfer/ops/<op>.py.
// Weight layouts ("row", "panel16", …) and the rows that gated activations take are defined in LAYOUTS.md.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastinfer, m) {
  m.def(
      "int8_matmul(Tensor x, Tensor w, Tensor w_scale, Tensor? bias, Tensor? residual, str activation, str layout) -> "
      "Tensor");
  m.def(
      "int8_scaled_matmul(Tensor x, Tensor w, Tensor w_scale, Tensor? bias, Tensor? residual, str activation, "
      "str layout, Tensor? x_scale, ScalarType? out_dtype) -> Tensor");
  m.def(
      "int4_matmul(Tensor x, Tensor w, Tensor w_scale, Tensor w_zero, Tensor? bias, Tensor? residual, str activation, "
      "str layout) -> Tensor");
  m.def("linear(Tensor x, Tensor w, Tensor? bias, Tensor? residual, str activation) -> Tensor");
  m.def("int8_quantize(Tensor x, Tensor? norm_weight, float eps) -> (Tensor q, Tensor x_scale)");
  // No op may return its input, so the sum is a result only where there is something to add.
  m.def("rms_norm(Tensor x, Tensor? weight, float eps, float offset) -> Tensor");
  m.def(
      "rms_norm.residual(Tensor x, Tensor? weight, float eps, Tensor residual, float offset) -> (Tensor y, Tensor "
      "sum)");
  m.def(
      "kv_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor lengths, "
      "Tensor(c!)? k_scale, Tensor(d!)? v_scale, Tensor? cos, Tensor? sin, Tensor? starts, float scale, int window, "
      "float softcap) -> Tensor");
  m.def(
      "sample(Tensor logits, Tensor seed, Tensor offset, float temperature, int top_k, float top_p, float min_p, "
      "float repetition_penalty, Tensor? seen) -> Tensor");
  m.def("embed(Tensor ids, Tensor w, Tensor? w_scale, float factor, str layout, ScalarType? out_dtype) -> Tensor");
  m.def(
      "embed.rotary(Tensor ids, Tensor w, Tensor? w_scale, float factor, str layout, ScalarType? out_dtype, "
      "Tensor cos, Tensor sin, Tensor lengths, Tensor? starts) -> (Tensor x, Tensor cos_rows, Tensor sin_rows)");
  m.def(
      "advance(Tensor tokens, Tensor(a!) ids, Tensor(b!) lengths, Tensor(c!) offset, Tensor(d!) ring, Tensor(e!) "
      "steps) "
      "-> ()");
  // The instruction set the CPU kernels run on: "avx512_vnni", "avx2" or "none" (unsupported CPU).
  m.def("cpu_isa() -> str");
  // CUDA: whether this thread's kernels may start before the previous one has finished; returns what it was before.
  m.def("dependent_launch(bool on) -> bool");
  // CUDA, cuda/tile_plan.cu: the plans that tile matmuls look up, the one that this thread's of a kind must run (returns
  // what was forced before), and what there is.
  m.def("set_tile_plans(int capability, int multiprocessors, str kind, int[] rows) -> ()");
  m.def("force_tile_plan(str kind, int kernel, int ranks, int shape) -> (int, int, int)");
  m.def("tile_plan_candidates(str kind) -> str");
}
