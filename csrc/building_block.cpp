// Schedules that repeat one block of computations for every microbatch.
#include "building_block.hpp"

#include <algorithm>
#include <cstdlib>
#include <utility>

namespace hfpp {

namespace {

constexpr Kind F = Kind::Forward;
constexpr Kind I = Kind::BackwardInput;
constexpr Kind W = Kind::BackwardWeight;

}  // namespace

BuildingBlock::BuildingBlock(const Hops& hops, std::int64_t rank, std::int64_t pp_size) {
  const std::int64_t way = (pp_size - 1) * (hops.down + hops.up) + 1;
  const std::int64_t forward_1 = way + hops.wait_last;  // on rank 0, as the next two
  const std::int64_t backward_1 = forward_1 + 1 + hops.wait_first;
  const std::int64_t backward_0 = backward_1 + way + hops.wait_back;
  passes_[0] = {{F, 0}, hops.down * rank};
  passes_[1] = {{F, 1}, forward_1 - hops.up * rank};
  passes_[2] = {{I, 1}, backward_1 + hops.down * rank};
  passes_[3] = {{I, 0}, backward_0 - hops.up * rank};
  place_weights();
}

void BuildingBlock::repeat(std::int64_t n_microbatches, VRow& row) {
  std::array<std::int64_t, 6> left;
  left.fill(n_microbatches);
  for (std::int64_t i = 0; i < 6 * n_microbatches; ++i) {
    std::size_t first = 6;
    for (std::size_t j = 0; j < 6; ++j) {
      if (left[j] > 0 && (first == 6 || passes_[j].start < passes_[first].start)) first = j;
    }
    row.repeat(1, {passes_[first].part});
    passes_[first].start += 6;
    --left[first];
  }
}

// The weights' parts take the two units of six that are left, each as soon after its input part
// as can be: the sum of both delays is the least, then their difference.
void BuildingBlock::place_weights() {
  std::array<std::int64_t, 2> left{};
  std::size_t found = 0;
  for (std::int64_t unit = 0; unit < 6; ++unit) {
    const bool taken = std::any_of(passes_.begin(), passes_.begin() + 4,
                                   [unit](const Pass& pass) { return pass.start % 6 == unit; });
    if (!taken) left.at(found++) = unit;
  }
  const auto delay = [&](std::size_t pass, std::int64_t unit) {
    return ((unit - passes_[pass].start) % 6 + 6) % 6;
  };
  std::array<std::int64_t, 2> best{delay(2, left[0]), delay(3, left[1])};
  const std::array<std::int64_t, 2> other{delay(2, left[1]), delay(3, left[0])};
  const auto cost = [](const std::array<std::int64_t, 2>& delays) {
    return std::pair(delays[0] + delays[1], std::abs(delays[0] - delays[1]));
  };
  if (cost(other) < cost(best)) best = other;
  passes_[4] = {{W, 1}, passes_[2].start + best[0]};
  passes_[5] = {{W, 0}, passes_[3].start + best[1]};
}

}  // namespace hfpp
