// How kv_attention's CUDA kernels divide the keys of a row; plain arithmetic, the same on host and device.
//
// A row's keys are cut into units, `units` of which make a group. What a unit or a group has summed up depends on the row's
// own length alone, so that neither the batch, nor the capacity of the cache, nor whether eight blocks share a group or one
// block does it all shows in a bit of the result.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef __CUDACC__
#define FASTINFER_HD __host__ __device__ __forceinline__
#else
#define FASTINFER_HD inline
#endif

namespace fastinfer {

constexpr int kStepKeys = 64;                 // keys that a block's warps take at a time, 16 each
constexpr int kShortContext = 8 * kStepKeys;  // up to here a unit is one step; beyond at least two
constexpr int kMostUnits = 8;                 // of a group
constexpr int kGranule = 16;                  // units of long contexts are multiples of it

FASTINFER_HD int ceil_quotient(int a, int b) { return (a + b - 1) / b; }
FASTINFER_HD int smaller(int a, int b) { return a < b ? a : b; }
FASTINFER_HD int larger(int a, int b) { return a < b ? b : a; }

// Of one row: `length` positions filled, `t` new ones behind them. Keys are counted from `first` on.
struct KeySplit {
  int length = 0, start = 0, window = 0;  // start: first position that counts; window 0: all
  int first = 0, end = 0;                 // positions that some query sees, and all the new ones
  int unit = 0, units = 0;                // keys of a unit, units of a group

  FASTINFER_HD int keys() const { return end - first; }
  // Query t sees the positions lowest(t) … length + t.
  FASTINFER_HD int lowest(int t) const { return window == 0 ? start : larger(start, length + t - window + 1); }
  FASTINFER_HD int units_of(int group) const {  // that have keys
    int count = 0;
#pragma unroll
    for (int i = 0; i < kMostUnits; ++i) count += i < units && unit_begin(group, i) < end ? 1 : 0;
    return count;
  }
  FASTINFER_HD int unit_begin(int group, int index) const { return first + (group * units + index) * unit; }
  FASTINFER_HD int unit_end(int begin) const { return smaller(begin + unit, end); }
  FASTINFER_HD bool one_group() const { return keys() <= unit * units; }
  FASTINFER_HD int groups() const { return ceil_quotient(keys(), unit * units); }
};

// A row has `most_units` units at most.
FASTINFER_HD KeySplit split_keys(int length, int start, int window, int t, int units, int most_units) {
  KeySplit s;
  s.length = length, s.start = start, s.window = window, s.units = units;
  s.first = smaller(s.lowest(0), length);  // new positions are written, whether seen or not
  s.end = length + t;
  const int even = (ceil_quotient(s.keys(), most_units) + kGranule - 1) & ~(kGranule - 1);
  s.unit = larger(s.keys() <= kShortContext ? kStepKeys : 2 * kStepKeys, even);
  return s;
}

// The most groups that any row of a cache of `positions` has.
FASTINFER_HD int most_groups(int positions, int units, int most_units) {
  const int of_short = ceil_quotient(smaller(positions, kShortContext), units * kStepKeys);
  return smaller(most_units / units, larger(of_short, ceil_quotient(positions, units * 2 * kStepKeys)));
}

}  // namespace fastinfer
