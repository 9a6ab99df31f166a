// Fills the placement tables at the speed of memory.
#include "placement.hpp"

#include <numeric>
#include <string>

namespace hfpp {
namespace {

// Stage ids are int32: what a table of them holds, and twice as dense as int64.
constexpr std::int64_t kMaxStages = std::numeric_limits<std::int32_t>::max();

std::string use_num_stages(std::int64_t value) {
  return "num_stages=" + std::to_string(value);
}

// Two stages per rank are nearly every world: a loop whose inner trip count the compiler knows.
void fill_pairs(std::int32_t* out, std::int32_t ranks, std::int32_t second, std::int32_t step) {
  for (std::int32_t rank = 0; rank < ranks; ++rank) {
    out[2 * static_cast<std::ptrdiff_t>(rank)] = rank;
    out[2 * static_cast<std::ptrdiff_t>(rank) + 1] = second + step * rank;
  }
}

}  // namespace

StageLayout::StageLayout(std::int64_t pp_size, std::int64_t num_stages, Placement placement)
    : pp_size_(pp_size), num_stages_(num_stages), placement_(placement) {
  require_at_least("pp_size", pp_size, 1);
  require_at_most("pp_size", pp_size, kMaxStages / 2);
  require_at_most("num_stages", num_stages, kMaxStages);
  if (placement == Placement::V) {
    if (num_stages == 2 * pp_size) return;
    std::string advice = use_num_stages(2 * pp_size);
    if (num_stages >= 1 && num_stages % pp_size == 0) advice += " or style='loop'";
    throw ConfigError(
        named("num_stages", num_stages) + " must be twice " + named("pp_size", pp_size) +
        " with style 'v', which puts exactly 2 stages on each rank: use " + advice + ".");
  }
  if (num_stages >= 1 && num_stages % pp_size == 0) return;
  const std::int64_t below = num_stages > pp_size ? num_stages / pp_size * pp_size : pp_size;
  std::string advice = use_num_stages(below);
  if (num_stages > pp_size && below + pp_size <= kMaxStages)
    advice += " or " + use_num_stages(below + pp_size);
  throw ConfigError(named("num_stages", num_stages) + " must be a positive multiple of " +
                    named("pp_size", pp_size) + ": use " + advice + ".");
}

void StageLayout::require_rank(std::int64_t pp_rank) const {
  if (pp_rank >= 0 && pp_rank < pp_size_) return;
  throw ConfigError(named("pp_rank", pp_rank) + " must be in [0, pp_size) with " +
                    named("pp_size", pp_size_) +
                    ": use pp_rank=0 to pp_rank=" + std::to_string(pp_size_ - 1) + ".");
}

Table StageLayout::stage_ids_by_rank() const {
  const std::int64_t per_rank = stages_per_rank();
  Table table = Table::make<std::int32_t>({pp_size_, per_rank}, "num_stages");
  std::int32_t* out = table.data<std::int32_t>();
  const auto ranks = static_cast<std::int32_t>(pp_size_);
  if (per_rank == 1) {
    std::iota(out, out + ranks, 0);
  } else if (placement_ == Placement::V) {
    fill_pairs(out, ranks, static_cast<std::int32_t>(num_stages_ - 1), -1);
  } else if (per_rank == 2) {
    fill_pairs(out, ranks, ranks, 1);
  } else {
    for (std::int32_t rank = 0; rank < ranks; ++rank) {
      std::int32_t stage = rank;
      for (std::int64_t k = 0; k < per_rank; ++k, ++out) {
        *out = stage;
        if (k + 1 < per_rank) stage += ranks;  // the step after the last would overflow
      }
    }
  }
  return table;
}

Table StageLayout::ranks_by_stage() const {
  Table table = Table::make<std::int32_t>({num_stages_}, "num_stages");
  std::int32_t* const out = table.data<std::int32_t>();
  for (std::int64_t k = 0; k < stages_per_rank(); ++k) {
    std::int32_t* const begin = out + k * pp_size_;
    if (placement_ == Placement::V && k == 1) {
      const auto last = static_cast<std::int32_t>(pp_size_ - 1);
      for (std::int32_t i = 0; i <= last; ++i) begin[i] = last - i;
    } else {
      std::iota(begin, begin + pp_size_, 0);
    }
  }
  return table;
}

}  // namespace hfpp
