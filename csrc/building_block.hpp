// Schedules that repeat one block of computations for every microbatch.
#pragma once

#include <array>
#include <cstdint>

#include "v_row.hpp"

namespace hfpp {

// The building block of a v schedule with controllable memory (arXiv 2405.15362): when each
// computation of microbatch 0 starts on a rank, in units of one forward, one input part or one
// weights' part of a chunk. Microbatch m does the same 6 * m units later: the six starts differ
// modulo 6, so that the steady state has no idle time.
class BuildingBlock {
 public:
  // Units from rank to rank: `down` to the next in the forward of chunk 0 and the backward of chunk
  // 1, `up` to the previous in the other two. At the turns of the v: units to wait at the last rank
  // before the forward of chunk 1, at the first rank before the backward of chunk 1, and at the
  // last before the backward of chunk 0.
  struct Hops {
    std::int64_t down;
    std::int64_t up;
    std::int64_t wait_last;
    std::int64_t wait_first;
    std::int64_t wait_back;
  };

  BuildingBlock(const Hops& hops, std::int64_t rank, std::int64_t pp_size);

  // Writes the passes of all microbatches in the order of their starts.
  void repeat(std::int64_t n_microbatches, VRow& row);

 private:
  struct Pass {
    Part part;
    std::int64_t start;
  };

  void place_weights();

  std::array<Pass, 6> passes_{};
};

}  // namespace hfpp
