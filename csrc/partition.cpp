// The uniform partition of layers into stages.
#include "partition.hpp"

#include <algorithm>
#include <string>

namespace hfpp {

UniformPartition::UniformPartition(std::int64_t num_stages, std::int64_t num_layers)
    : num_stages_(num_stages), num_layers_(num_layers), each_(0), longer_(0) {
  require_at_least("num_layers", num_layers, 1);
  require_at_least("num_stages", num_stages, 1);
  if (num_stages > num_layers) {
    throw ConfigError(named("num_stages", num_stages) + " must not be larger than " +
                      named("num_layers", num_layers) +
                      ", as every stage needs a layer: use num_stages=" +
                      std::to_string(num_layers) + " or less.");
  }
  each_ = num_layers / num_stages;
  longer_ = num_layers % num_stages;
}

void UniformPartition::require_stage(std::int64_t stage_index) const {
  if (stage_index >= 0 && stage_index < num_stages_) return;
  throw ConfigError(named("stage_index", stage_index) + " must be in [0, num_stages) with " +
                    named("num_stages", num_stages_) +
                    ": use stage_index=0 to stage_index=" + std::to_string(num_stages_ - 1) + ".");
}

LayerRange UniformPartition::layers(std::int64_t stage_index) const {
  const std::int64_t begin = stage_index * each_ + std::min(stage_index, longer_);
  return {begin, begin + each_ + (stage_index < longer_ ? 1 : 0)};
}

Table UniformPartition::offsets() const {
  Table table =
      Table::make<std::int64_t>({checked_add(num_stages_, 1, "num_stages")}, "num_stages");
  std::int64_t* const out = table.data<std::int64_t>();
  for (std::int64_t s = 0; s <= num_stages_; ++s) out[s] = s * each_ + std::min(s, longer_);
  return table;
}

}  // namespace hfpp
