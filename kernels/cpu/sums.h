// Sums of many terms: four running sums hide the latency of an addition, and what a section of terms adds to each is
// summed by itself, so that rounding grows with the number of sections instead of the number of terms.
#pragma once

#include "simd.h"

namespace vitkd::cpu::VITKD_ISA {

template <class T>
struct Sum {
  static constexpr int64_t kSection = 16;  // terms of each running sum
  Vec<T> parts[4], sections = {};

  Sum() { clear(); }
  void end_section() {
    sections += (parts[0] + parts[1]) + (parts[2] + parts[3]);
    clear();
  }
  Vec<T> total() const { return sections + ((parts[0] + parts[1]) + (parts[2] + parts[3])); }

 private:
  void clear() {
    VITKD_UNROLL
    for (int i = 0; i < 4; ++i) parts[i] = Vec<T>{};
  }
};

}  // namespace vitkd::cpu::VITKD_ISA
