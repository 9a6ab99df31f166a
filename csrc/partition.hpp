// Contiguous partitions of layers into stages.
#pragma once

#include <cstdint>

#include "table.hpp"

namespace hfpp {

// Layers [begin, end) of one stage.
struct LayerRange {
  std::int64_t begin;
  std::int64_t end;
};

// The uniform partition: the first num_layers % num_stages stages get one layer more.
// Checked when made: every stage gets at least one layer.
class UniformPartition {
 public:
  UniformPartition(std::int64_t num_stages, std::int64_t num_layers);

  std::int64_t num_stages() const { return num_stages_; }
  std::int64_t num_layers() const { return num_layers_; }
  // The largest number of layers on a stage.
  std::int64_t widest() const { return each_ + (longer_ > 0 ? 1 : 0); }

  void require_stage(std::int64_t stage_index) const;
  // Layers of one stage, already checked, in O(1).
  LayerRange layers(std::int64_t stage_index) const;
  // int64 [num_stages + 1]: stage s has layers offsets[s] to offsets[s + 1] - 1.
  Table offsets() const;

 private:
  std::int64_t num_stages_;
  std::int64_t num_layers_;
  std::int64_t each_;
  std::int64_t longer_;
};

}  // namespace hfpp
