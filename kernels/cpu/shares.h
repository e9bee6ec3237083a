// How threads divide work on the CPU. Cores are not equally fast, nor is one core at all times, so a thread that is done
// with its share does some of another's. It begins with its own all the same, from the front, and takes of others' from
// the back: what the calls before left in a core's caches, or in the memory next to it, is mostly met there again.
#pragma once

#include "../kernels.h"

namespace vitkd::cpu::VITKD_ISA {

struct Range {
  int64_t begin, end;
  bool empty() const { return begin == end; }
};

class Shares {
 public:
  // `grain` is the least that is worth a thread; a piece is a quarter of that, or a multiple.
  Shares(int64_t count, int64_t grain) : count_(count), grain_(grain) {
    const int64_t least = grain < 4 ? 1 : grain / 4, fair = count / kMostPieces + 1;
    piece_ = (fair + least - 1) / least * least;
    pieces_ = (count + piece_ - 1) / piece_;
  }

  // A thread's way through the pieces.
  class Walk {
   public:
    Walk(Shares& shares, int64_t begin) : shares_(shares), start_(begin / shares.piece_), at_(start_) {}

    // The piece to take next, which another thread may still take before.
    Range next() {
      if (forward_ && (at_ == shares_.pieces_ || shares_.taken(at_))) {
        forward_ = false;
        at_ = start_;
      }
      for (; !forward_ && passed_ < shares_.pieces_ && shares_.taken(at_); ++passed_) {
        at_ = (at_ > 0 ? at_ : shares_.pieces_) - 1;
      }
      return forward_ || passed_ < shares_.pieces_ ? shares_.range(at_) : Range{shares_.count_, shares_.count_};
    }
    // What comes `n` after the end of the piece that was taken last, as far as one can tell; or the end of everything.
    int64_t upcoming(int64_t n) {
      Range range = next();
      for (int64_t piece = at_; n >= range.end - range.begin;) {
        n -= range.end - range.begin;
        piece += forward_ ? 1 : -1;
        if (range.empty() || piece < 0 || piece >= shares_.pieces_ || shares_.taken(piece)) return shares_.count_;
        range = shares_.range(piece);
      }
      return range.begin + n;
    }
    // Empty when all are taken.
    Range take() {
      for (;;) {
        const Range range = next();
        if (range.empty()) return range;
        const bool mine = shares_.take(at_);
        if (forward_) ++at_;
        if (mine) return range;
      }
    }

   private:
    Shares& shares_;
    int64_t start_, at_;
    bool forward_ = true;
    int64_t passed_ = 0;  // on the way back, which is once around
  };

  // work(walk) on each of the pool's threads; of what the pool gives a thread, only where it begins is used.
  template <class Work>
  void among(ParallelFor parallel_for, const Work& work) {
    struct Call {
      Shares& shares;
      const Work& work;
    } call{*this, work};
    auto body = [](int64_t begin, int64_t, void* context) {
      Call& call = *static_cast<Call*>(context);
      call.work(Walk(call.shares, begin));
    };
    parallel_for(count_, grain_, body, &call);
  }

 private:
  static constexpr int64_t kMostPieces = 1024;

  Range range(int64_t piece) const {
    const int64_t begin = piece * piece_, end = begin + piece_;
    return {begin, end < count_ ? end : count_};
  }
  bool taken(int64_t piece) const { return __atomic_load_n(&taken_[piece], __ATOMIC_RELAXED); }
  bool take(int64_t piece) { return !__atomic_exchange_n(&taken_[piece], true, __ATOMIC_RELAXED); }

  int64_t count_, grain_, piece_, pieces_;
  bool taken_[kMostPieces] = {};
};

}  // namespace vitkd::cpu::VITKD_ISA
