#include "cuda/dependent_launch.cuh"

#include <torch/csrc/stable/library.h>

namespace fastinfer {

enum class DependentLaunch { kOff, kFromTheNext, kOn };
static thread_local DependentLaunch state = DependentLaunch::kOff;

struct Settled {
  bool yes = false;
  const void* cache = nullptr;
};
static thread_local Settled previous, latest;

void leave_settled(const void* cache) { latest = {true, cache}; }

bool previous_has_settled(const void* cache) { return previous.yes && previous.cache != cache; }

bool take_dependent_launch() {
  previous = latest, latest = {};
  const bool now = state == DependentLaunch::kOn;
  if (state == DependentLaunch::kFromTheNext) state = DependentLaunch::kOn;
  return now;
}

// Returns whether it was on before.
bool dependent_launch(bool on) {
  const bool before = state != DependentLaunch::kOff;
  state = on ? DependentLaunch::kFromTheNext : DependentLaunch::kOff;
  return before;
}

}  // namespace fastinfer

STABLE_TORCH_LIBRARY_IMPL(fastinfer, CompositeExplicitAutograd, m) {
  m.impl("dependent_launch", TORCH_BOX(&fastinfer::dependent_launch));
}
