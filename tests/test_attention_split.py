"""How kv_attention's CUDA kernels divide the keys of a row: csrc/common/attention_split.h, compiled for the host."""

import shutil
import subprocess
from pathlib import Path

import pytest

SPLIT = Path(__file__).parent.parent / "csrc" / "common" / "attention_split.h"
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
PROGRAM = """
#include "attention_split.h"
#include <cstdio>
#include <cstdlib>
#include <random>
using namespace fastinfer;

struct Row { int positions, length, start, window, t, units, most_units; };

static const char* error_of(const Row& r) {
  const KeySplit s = split_keys(r.length, r.start, r.window, r.t, r.units, r.most_units);
  const int groups = s.groups(), most = most_groups(r.positions, r.units, r.most_units);
  if (s.first < 0 || s.first > r.length || s.end != r.length + r.t) return "the new tokens and no others beyond";
  if (s.first > s.lowest(0) || s.lowest(r.t - 1) < s.lowest(0)) return "all that a query sees";
  if (groups < 1 || groups > most) return "as many groups as the grid has room for";
  if (s.one_group() != (groups == 1)) return "one_group()";
  if (s.unit < kStepKeys || s.unit % kGranule != 0) return "whole units";
  int next = s.first;
  for (int group = 0; group < groups; ++group) {
    const int count = s.units_of(group);
    if (count < 1 || (group < groups - 1 && count != r.units)) return "no group without keys, all but the last full";
    for (int unit = 0; unit < count; ++unit) {
      const int begin = s.unit_begin(group, unit);
      if (begin != next || begin >= s.end) return "units side by side, none without keys";
      next = s.unit_end(begin);
    }
  }
  if (next != s.end) return "every key once";
  for (int group = groups; group < most; ++group) {
    const int64_t last = s.first + (int64_t{group + 1} * r.units) * s.unit;
    if (last > INT32_MAX) return "no overflow in groups beyond the end";
    if (s.units_of(group) != 0) return "nothing for groups beyond the end";
  }
  return nullptr;
}

static void check(const Row& r) {
  const char* error = error_of(r);
  if (error == nullptr) return;
  std::printf("%s: positions %d, length %d, start %d, window %d, t %d, units %d, most_units %d\\n", error, r.positions,
              r.length, r.start, r.window, r.t, r.units, r.most_units);
  std::exit(1);
}

int main() {
  constexpr int kMost = 1 << 29;  // positions that the op takes
  const int clusters[] = {1, 2, 3, 4, 5, 8, 16, 31, 32, 33};
  for (int positions = 1; positions <= 2300; positions += positions < 140 ? 1 : 29) {
    for (int length = 0; length < positions; ++length) {
      for (int n : clusters) check({positions, length, 0, 0, 1, kMostUnits, kMostUnits * n});
      for (int most_units : {1, 2, 7, 32, 256}) check({positions, length, 0, 0, 1, 1, most_units});
    }
  }
  std::mt19937 random(1);
  const auto below = [&](int64_t n) { return static_cast<int>(random() % n); };
  for (int i = 0; i < 500000; ++i) {
    const int positions = 1 + below(int64_t{1} << below(30)), t = 1 + below(std::min(16, positions));
    const int length = below(4) == 0 ? positions - t : below(positions - t + 1);
    const int start = below(2) == 0 ? 0 : below(10) == 0 ? INT32_MAX : below(positions + 3);
    const int window = below(2) == 0 ? 0 : below(10) == 0 ? kMost : 1 + below(positions);
    const bool clustered = below(2) == 0;
    check({positions, length, start, window, t, clustered ? kMostUnits : 1,
           clustered ? kMostUnits * (1 + below(33)) : 1 + below(256)});
  }
  for (int most_units : {8, 16, 264}) check({kMost, kMost - 1, 0, 0, 1, 8, most_units});
  return 0;
}
"""


@pytest.mark.skipif(COMPILER is None or not SPLIT.exists(), reason="needs a C++ compiler and the sources")
def test_every_key_has_one_unit_and_every_group_its_place(tmp_path):
    source, program = tmp_path / "split.cpp", tmp_path / "split"
    source.write_text(PROGRAM)
    command = [COMPILER, "-std=c++17", "-O2", f"-I{SPLIT.parent}", source, "-o", program]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
