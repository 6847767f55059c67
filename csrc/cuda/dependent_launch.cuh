// Programmatic dependent launch, on request: a kernel may start, and fetch weights, while the one before it still runs.
#pragma once

namespace fastinfer {

// Whether the kernel about to be launched by this thread may start early. The first one after switching on may not: what
// ran before may have written the weights, which a dependent kernel reads without waiting.
bool take_dependent_launch();

// A kernel may read results of the kernels before the previous one without waiting, if the previous one has let it start
// only after it had itself waited for those. Who launches a kernel that does so says it, with the cache that the kernel
// writes; take_dependent_launch() forgets it for the kernel after the next.
void leave_settled(const void* cache = nullptr);
// Whether that holds of the kernel before the one that take_dependent_launch() was asked for last, and it wrote no `cache`.
bool previous_has_settled(const void* cache);

}  // namespace fastinfer
