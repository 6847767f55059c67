// Which instruction set the CPU kernels run on. FASTINFER_CPU_ISA=avx2 forces the narrower one (for tests and timing).
#pragma once

#include <string>

namespace fastinfer {

enum class Isa { kNone, kAvx2, kAvx512Vnni };

Isa cpu_isa();
std::string cpu_isa_name();

}  // namespace fastinfer
