// Programmatic dependent launch, on request: a kernel may start, and fetch weights, while the one before it still runs.
#pragma once

namespace fastinfer {

// Whether the kernel about to be launched by this thread may start early. The first one after switching on may not: what
// ran before may have written the weights, which a dependent kernel reads without waiting.
bool take_dependent_launch();

}  // namespace fastinfer
