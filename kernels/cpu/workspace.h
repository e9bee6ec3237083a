// A task's scratch memory: taken piece by piece, handed back all at once, reused from head to head.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "simd.h"

namespace vitkd::cpu::VITKD_ISA {

class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() {
    for (int i = 0; i < count_; ++i) std::free(pieces_[i].memory);
  }

  void rewind() { next_ = 0; }

  // `count` elements, aligned to a cache line. The n-th piece after a rewind is the n-th piece of before.
  template <class T>
  T* take(int64_t count) {
    const int64_t bytes = (count * int64_t{sizeof(T)} + 63) / 64 * 64;
    Piece& piece = pieces_[next_++];
    if (next_ > count_) count_ = next_;
    if (piece.bytes < bytes) {
      std::free(piece.memory);
      piece = {std::aligned_alloc(64, static_cast<size_t>(bytes)), bytes};
      if (piece.memory == nullptr) throw std::bad_alloc();
    }
    return static_cast<T*>(piece.memory);
  }

 private:
  struct Piece {
    void* memory = nullptr;
    int64_t bytes = 0;
  };
  static constexpr int kPieces = 18;
  Piece pieces_[kPieces];
  int next_ = 0, count_ = 0;
};

}  // namespace vitkd::cpu::VITKD_ISA
