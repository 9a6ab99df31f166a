// Optimal contiguous partitions: the slowest rank as fast as can be, under a cap on memory.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "placement.hpp"

namespace hfpp {

// What each layer costs. The embedding belongs to the first entry and the head to the last.
struct LayerCosts {
  std::vector<double> seconds;
  std::optional<std::int64_t> cap;             // bytes per rank; without one, the rest is not read
  std::vector<std::int64_t> static_bytes;      // per layer, whatever the stage
  std::vector<std::int64_t> activation_bytes;  // per layer and live microbatch
  std::vector<std::int64_t> live;              // live microbatches, per stage
};

struct Balance {
  std::vector<std::int64_t> offsets;  // [num_stages + 1]
  double slowest;                     // seconds of the slowest rank
  double lower_bound;                 // no partition has a faster slowest rank
  bool optimal;                       // whether it is proven that none is better
};

// A partition in which every stage has a layer and no rank holds more than the cap.
//
// One stage per rank: always optimal. Several: optimal where a search of bounded length proves it.
// The same input gives the same partition everywhere: no clock, no random seed, no fused
// multiply-add. Among equally fast partitions, one whose stages are even: for one stage per rank,
// the least sum of squared stage times.
Balance balance(const StageLayout& layout, const LayerCosts& costs);

}  // namespace hfpp
