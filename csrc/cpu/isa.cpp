// Which instruction set the CPU kernels run on, decided once.

#include "cpu/isa.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <cstring>

namespace fastinfer {

static Isa detect() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool vnni = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vnni");
  const char* wanted = std::getenv("FASTINFER_CPU_ISA");
  if (avx2 && wanted != nullptr && std::strcmp(wanted, "avx2") == 0) return Isa::kAvx2;
  return vnni ? Isa::kAvx512Vnni : avx2 ? Isa::kAvx2 : Isa::kNone;
}

Isa cpu_isa() {
  static const Isa isa = detect();
  return isa;
}

std::string cpu_isa_name() {
  switch (cpu_isa()) {
    case Isa::kAvx512Vnni:
      return "avx512_vnni";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "none";
  }
}

}  // namespace fastinfer

STABLE_TORCH_LIBRARY_IMPL(fastinfer, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&fastinfer::cpu_isa_name));
}
