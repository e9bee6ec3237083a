// The layouts of kernels/cuda/head.cuh, which nvcc and this program compile from the same functions: every element has
// its own place, and no access of a quarter warp (16-byte pieces) or of a warp (4-byte ones) meets itself in a memory
// bank.
#include <cstdio>
#include <set>

#include "../../../kernels/cuda/head.cuh"

using namespace vitkd::cuda;

namespace {

int failures = 0;

void expect(bool right, const char* what, int where) {
  if (right) return;
  std::printf("%s at %d\n", what, where);
  ++failures;
}

int bank_group(int element) { return element / 8 % 8; }  // of 16 bytes, where 128 bytes are all banks

template <int D>
void matrix() {
  constexpr int kRows = 272;
  std::set<int> places;
  for (int row = 0; row < kRows; ++row)
    for (int column = 0; column < D; ++column) {
      const int place = swizzled<D>(row, column);
      places.insert(place);
      expect(0 <= place && place < kRows * D, "a place outside the matrix", place);
      expect(place % 8 == column % 8, "a 16-byte unit torn apart", place);
    }
  expect(places.size() == size_t{kRows} * D, "two elements in one place", D);
  for (int row = 0; row < kRows; row += 8)
    for (int column = 0; column < D; column += 8) {
      std::set<int> groups;
      for (int i = 0; i < 8; ++i) groups.insert(bank_group(swizzled<D>(row + i, column)));
      expect(groups.size() == 8, "8 rows in fewer than 8 groups of banks", row);
    }
  for (int i = 0; i < kRows * D / 8; i += 8) {  // as `bring` writes them
    std::set<int> groups;
    for (int j = i; j < i + 8; ++j) groups.insert(bank_group(swizzled<D>(j / (D / 8), j % (D / 8) * 8)));
    expect(groups.size() == 8, "8 copies in fewer than 8 groups of banks", i);
  }
}

template <int kTiles>
void weights() {
  constexpr int kPitch = kWeightPitch<kTiles>;
  expect(kPitch >= 16 * kTiles && kPitch * 2 % 16 == 0, "rows that overlap or are not aligned", kTiles);
  std::set<int> groups, banks;
  for (int row = 0; row < 8; ++row) groups.insert(bank_group(row * kPitch));
  expect(groups.size() == 8, "8 rows of weights in fewer than 8 groups of banks", kTiles);
  for (int lane = 0; lane < kWarp; ++lane)
    banks.insert((accumulator_row(lane, 0) * kPitch + accumulator_column(lane, 0)) / 2 % 32);
  expect(banks.size() == 32, "32 pairs in fewer than 32 banks", kTiles);
}

void accumulator() {
  std::set<int> places;
  for (int lane = 0; lane < kWarp; ++lane)
    for (int i = 0; i < 4; ++i) places.insert(accumulator_row(lane, i) * 8 + accumulator_column(lane, i));
  expect(places.size() == 128 && *places.begin() == 0 && *places.rbegin() == 127, "not a 16 x 8 tile", 0);
}

}  // namespace

int main() {
  matrix<32>();
  matrix<64>();
  weights<2>(), weights<4>(), weights<5>(), weights<7>(), weights<10>(), weights<13>();
  accumulator();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
