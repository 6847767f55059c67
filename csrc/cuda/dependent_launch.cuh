// Programmatic dependent launch, on request: a kernel may start, and fetch weights, while the one before it still runs.
#pragma once

namespace fastinfer {

// Whether the kernel about to be launched by this thread may start early. The first one after switching on may not: what
// ran before may have written the weights, which a dependent kernel reads without waiting.
bool take_dependent_launch();

// A kernel may read results of the kernels before the previous one without waiting, if the previous one has let it start
// only after it had itself waited for those. Who launches a kernel that does so says it, with the cache that the kernel
// writes; take_dependent_launch() forgets it for the kernel after the next.
//
// Why that is enough. Let P be the previous kernel, of those that call take_dependent_launch(), and K the one that reads
// early. K starts when every block of P has triggered or left, so one block of P that triggers behind its wait holds K back
// until all before P has ended: decode_matmul's all do, of kv_attention's those that have keys, and each row has one. Blocks
// that trigger first (rms_norm, embed, advance, sample, int8_quantize, wgmma_matmul) settle nothing; they all wait before
// they leave, so that the end of a kernel is always that of those before it. Ordinary kernels between P and K, torch's too,
// start when all before them has ended and trigger by ending. So K has to fear only what P and those write: never lengths or
// starts, and of the caches P's own. All on one stream: a second one's kernels would come between without being seen here.
// What the L1 of a multiprocessor holds goes when a kernel is launched the ordinary way (PTX ISA, cache operators), as the
// first of a graph is: results of the replay before are seen whatever a dependent launch leaves there.
void leave_settled(const void* cache = nullptr);
// Whether that holds of the kernel before the one that take_dependent_launch() was asked for last, and it wrote no `cache`.
bool previous_has_settled(const void* cache);

}  // namespace fastinfer
