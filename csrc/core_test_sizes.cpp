// Tables of numbers, and what is worked out from sizes alone.
#include <cstdint>
#include <limits>
#include <stdexcept>

#include "core_test.hpp"
#include "partition.hpp"
#include "placement.hpp"
#include "shapes.hpp"
#include "table.hpp"

namespace hfpp::test {

void test_table() {
  Table table = Table::make<std::int32_t>({2, 3}, "sizes");
  for (std::int32_t i = 0; i < 6; ++i) table.data<std::int32_t>()[i] = i;
  const std::int64_t inside[] = {1, 2};
  const std::int64_t outside[] = {1, 3};
  const std::int64_t negative[] = {-1, 0};
  check(table.at_flat(table.position(inside, 2)) == 5, "row-major order");
  check(table.position(inside, 1) == 3, "the start of a row");
  check_throws<std::out_of_range>([&] { table.position(outside, 2); }, "index (3) of axis 1");
  check_throws<std::out_of_range>([&] { table.position(negative, 2); }, "index (-1) of axis 0");
  check_throws<std::logic_error>([&] { table.data<std::int64_t>(); }, "another item type");
  check_throws<std::overflow_error>(
      [] { Table::make<std::int64_t>({std::int64_t{1} << 40, std::int64_t{1} << 40}, "sizes"); },
      "sizes");
}

void test_placement() {
  for (std::int64_t pp = 1; pp <= 9; ++pp) {
    for (std::int64_t per_rank = 1; per_rank <= 5; ++per_rank) {
      for (const Placement placement : {Placement::Loop, Placement::V}) {
        if (placement == Placement::V && per_rank != 2) continue;
        const StageLayout stages(pp, pp * per_rank, placement);
        const Table ids = stages.stage_ids_by_rank();
        const Table ranks = stages.ranks_by_stage();
        check(ids.size(0) == pp && ids.size(1) == per_rank, "the shape of stage_ids_by_rank");
        for (std::int64_t rank = 0; rank < pp; ++rank) {
          for (std::int64_t k = 0; k < per_rank; ++k) {
            const std::int64_t stage = ids.at_flat(rank * per_rank + k);
            check(stage == stages.stage(rank, k), "the table equals one rank's stages");
            check(ranks.at_flat(stage) == rank, "ranks_by_stage is the inverse");
          }
        }
      }
    }
  }
  check_throws<ConfigError>([] { StageLayout(0, 4, Placement::Loop); }, "pp_size (0)");
  check_throws<ConfigError>([] { StageLayout(4, 6, Placement::Loop); }, "num_stages=4");
  check_throws<ConfigError>([] { StageLayout(4, -8, Placement::Loop); }, "num_stages (-8)");
  check_throws<ConfigError>([] { StageLayout(4, 12, Placement::V); }, "num_stages=8");
  check_throws<ConfigError>([] { StageLayout(4, 8, Placement::V).require_rank(4); }, "pp_rank (4)");
  check_throws<std::overflow_error>(
      [] { StageLayout(1000000, std::int64_t{1000000} * 4096 * 8, Placement::Loop); },
      "num_stages (32768000000)");
  check_throws<std::overflow_error>(
      [] { StageLayout(1, 2000000000, Placement::Loop).stage_ids_by_rank(); }, "bytes");
  check_throws<ConfigError>(
      [] { StageLayout(1, std::numeric_limits<std::int64_t>::min(), Placement::V); }, "num_stages");
}

void test_partition() {
  for (std::int64_t stages = 1; stages <= 12; ++stages) {
    for (std::int64_t layers = stages; layers <= 40; ++layers) {
      const UniformPartition partition(stages, layers);
      const Table offsets = partition.offsets();
      check(offsets.at_flat(0) == 0 && offsets.at_flat(stages) == layers,
            "offsets span the layers");
      for (std::int64_t s = 0; s < stages; ++s) {
        const LayerRange range = partition.layers(s);
        check(range.begin == offsets.at_flat(s) && range.end == offsets.at_flat(s + 1),
              "one stage's layers equal the offsets");
        check(range.end - range.begin == layers / stages + (s < layers % stages ? 1 : 0),
              "the first stages are longer by one");
      }
    }
  }
  check_throws<ConfigError>([] { UniformPartition(0, 4); }, "num_stages (0)");
  check_throws<ConfigError>([] { UniformPartition(5, 4); }, "num_stages=4");
  check_throws<ConfigError>([] { UniformPartition(1, -1); }, "num_layers (-1)");
  check_throws<ConfigError>([] { UniformPartition(2, 4).require_stage(2); }, "stage_index (2)");
  const std::int64_t most = std::numeric_limits<std::int64_t>::max();
  check_throws<std::overflow_error>([most] { UniformPartition(most, most).offsets(); },
                                    "num_stages");
  check(UniformPartition(3, most).layers(2).end == most, "the last layer of the largest partition");
  check(UniformPartition(1, most).offsets().at_flat(1) == most, "all layers on one stage");
}

void test_shapes() {
  BoundarySizes sizes{4, 2, 16, 32, 100, true, DType::BFloat16};
  const BoundaryTables tables = boundary_tables(sizes);
  check(tables.bytes.at_flat(0) == 2 * 16 * 8, "token ids are int64");
  check(tables.bytes.at_flat(1) == 2 * 16 * 32 * 2, "hidden states in bfloat16");
  check(tables.bytes.at_flat(4) == 2 * 16 * 100 * 2, "logits in bfloat16");
  check(tables.shapes.at_flat(2) == 0, "token ids have two axes");
  check(tables.dtypes.at_flat(0) == static_cast<std::int64_t>(DType::Int64), "token ids");
  for (std::int64_t s = 1; s < 4; ++s) {
    for (std::int64_t axis = 0; axis < 3; ++axis) {
      check(tables.shapes.at_flat(6 * s + axis) == tables.shapes.at_flat(6 * s - 3 + axis),
            "the input of a stage is the output of the stage before");
    }
  }
  sizes.has_head = false;
  sizes.num_stages = 1;
  check(boundary_tables(sizes).shapes.at_flat(5) == 32, "without a head: hidden states");
  sizes.seq_len = std::numeric_limits<std::int64_t>::max() / 2;
  check_throws<std::overflow_error>([&] { boundary_tables(sizes); }, "seq_len");
  sizes.seq_len = 0;
  check_throws<ConfigError>([&] { boundary_tables(sizes); }, "seq_len (0)");
  for (std::size_t i = 0; i < kDTypes.size(); ++i) {
    check(static_cast<std::size_t>(kDTypes[i].code) == i, "dtype codes index their table");
  }
}

}  // namespace hfpp::test
