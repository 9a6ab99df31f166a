// Which rank holds which stages, for one rank and for the whole pipeline.
#pragma once

#include <cstdint>

#include "table.hpp"

namespace hfpp {

enum class Placement : std::uint8_t { Loop, V };

// Stages laid out over ranks. Checked when made: what exists is possible.
class StageLayout {
 public:
  StageLayout(std::int64_t pp_size, std::int64_t num_stages, Placement placement);

  std::int64_t pp_size() const { return pp_size_; }
  std::int64_t num_stages() const { return num_stages_; }
  std::int64_t stages_per_rank() const { return num_stages_ / pp_size_; }

  void require_rank(std::int64_t pp_rank) const;
  // The k-th stage of a rank; both already checked.
  std::int64_t stage(std::int64_t pp_rank, std::int64_t k) const {
    if (placement_ == Placement::Loop) return pp_rank + k * pp_size_;
    return k == 0 ? pp_rank : num_stages_ - 1 - pp_rank;
  }

  Table stage_ids_by_rank() const;  // int32 [pp_size, stages_per_rank]
  Table ranks_by_stage() const;     // int32 [num_stages]

 private:
  std::int64_t pp_size_;
  std::int64_t num_stages_;
  Placement placement_;
};

}  // namespace hfpp
