// Plain checks of the core without Python, made to run under sanitizers.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <initializer_list>
#include <limits>
#include <map>
#include <optional>
#include <random>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "balance.hpp"
#include "dataflow.hpp"
#include "lock_step.hpp"
#include "lowering.hpp"
#include "orders.hpp"
#include "partition.hpp"
#include "placement.hpp"
#include "resident_stages.hpp"
#include "schedule.hpp"
#include "schedule_csv.hpp"
#include "schedule_json.hpp"
#include "shapes.hpp"
#include "simulate.hpp"
#include "verify.hpp"

namespace {

int checks = 0;

void check(bool holds, const std::string& what) {
  ++checks;
  if (holds) return;
  std::fprintf(stderr, "core_test: failed: %s\n", what.c_str());
  std::exit(1);
}

// Runs `act` and checks that it throws Error with `part` in its message.
template <class Error>
void check_throws(const std::function<void()>& act, const std::string& part) {
  try {
    act();
  } catch (const Error& error) {
    check(std::string(error.what()).find(part) != std::string::npos,
          std::string("'") + error.what() + "' should contain '" + part + "'");
    return;
  }
  check(false, "nothing thrown where '" + part + "' was expected");
}

void test_placement() {
  using hfpp::Placement;
  using hfpp::StageLayout;
  for (std::int64_t pp = 1; pp <= 9; ++pp) {
    for (std::int64_t per_rank = 1; per_rank <= 5; ++per_rank) {
      for (const Placement placement : {Placement::Loop, Placement::V}) {
        if (placement == Placement::V && per_rank != 2) continue;
        const StageLayout stages(pp, pp * per_rank, placement);
        const hfpp::Table ids = stages.stage_ids_by_rank();
        const hfpp::Table ranks = stages.ranks_by_stage();
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
  check_throws<hfpp::ConfigError>([] { StageLayout(0, 4, Placement::Loop); }, "pp_size (0)");
  check_throws<hfpp::ConfigError>([] { StageLayout(4, 6, Placement::Loop); }, "num_stages=4");
  check_throws<hfpp::ConfigError>([] { StageLayout(4, -8, Placement::Loop); }, "num_stages (-8)");
  check_throws<hfpp::ConfigError>([] { StageLayout(4, 12, Placement::V); }, "num_stages=8");
  check_throws<hfpp::ConfigError>([] { StageLayout(4, 8, Placement::V).require_rank(4); },
                                  "pp_rank (4)");
  check_throws<std::overflow_error>(
      [] { StageLayout(1000000, std::int64_t{1000000} * 4096 * 8, Placement::Loop); },
      "num_stages (32768000000)");
  check_throws<std::overflow_error>(
      [] { StageLayout(1, 2000000000, Placement::Loop).stage_ids_by_rank(); }, "bytes");
  check_throws<hfpp::ConfigError>(
      [] { StageLayout(1, std::numeric_limits<std::int64_t>::min(), Placement::V); }, "num_stages");
}

void test_partition() {
  using hfpp::UniformPartition;
  for (std::int64_t stages = 1; stages <= 12; ++stages) {
    for (std::int64_t layers = stages; layers <= 40; ++layers) {
      const UniformPartition partition(stages, layers);
      const hfpp::Table offsets = partition.offsets();
      check(offsets.at_flat(0) == 0 && offsets.at_flat(stages) == layers,
            "offsets span the layers");
      for (std::int64_t s = 0; s < stages; ++s) {
        const hfpp::LayerRange range = partition.layers(s);
        check(range.begin == offsets.at_flat(s) && range.end == offsets.at_flat(s + 1),
              "one stage's layers equal the offsets");
        check(range.end - range.begin == layers / stages + (s < layers % stages ? 1 : 0),
              "the first stages are longer by one");
      }
    }
  }
  check_throws<hfpp::ConfigError>([] { UniformPartition(0, 4); }, "num_stages (0)");
  check_throws<hfpp::ConfigError>([] { UniformPartition(5, 4); }, "num_stages=4");
  check_throws<hfpp::ConfigError>([] { UniformPartition(1, -1); }, "num_layers (-1)");
  check_throws<hfpp::ConfigError>([] { UniformPartition(2, 4).require_stage(2); },
                                  "stage_index (2)");
  const std::int64_t most = std::numeric_limits<std::int64_t>::max();
  check_throws<std::overflow_error>([most] { UniformPartition(most, most).offsets(); },
                                    "num_stages");
  check(UniformPartition(3, most).layers(2).end == most, "the last layer of the largest partition");
  check(UniformPartition(1, most).offsets().at_flat(1) == most, "all layers on one stage");
}

// The slowest rank's time and, with a cap, the most that a rank holds.
std::pair<double, std::int64_t> measured(const hfpp::StageLayout& stages,
                                         const hfpp::LayerCosts& costs,
                                         const std::vector<std::int64_t>& offsets) {
  double slowest = 0;
  std::int64_t most = 0;
  for (std::int64_t rank = 0; rank < stages.pp_size(); ++rank) {
    double seconds = 0;
    std::int64_t bytes = 0;
    for (std::int64_t k = 0; k < stages.stages_per_rank(); ++k) {
      const auto s = static_cast<std::size_t>(stages.stage(rank, k));
      for (auto i = static_cast<std::size_t>(offsets[s]);
           i < static_cast<std::size_t>(offsets[s + 1]); ++i) {
        seconds += costs.seconds[i];
        if (costs.cap) bytes += costs.static_bytes[i] + costs.live[s] * costs.activation_bytes[i];
      }
    }
    slowest = std::max(slowest, seconds);
    most = std::max(most, bytes);
  }
  return {slowest, most};
}

// The best of all partitions, by trying each; infinity where none fits.
double tried(const hfpp::StageLayout& stages, const hfpp::LayerCosts& costs,
             std::vector<std::int64_t>& offsets, std::size_t stage) {
  const auto n = static_cast<std::int64_t>(costs.seconds.size());
  const auto count = static_cast<std::size_t>(stages.num_stages());
  if (stage == count) {
    const auto [slowest, most] = measured(stages, costs, offsets);
    return costs.cap && most > *costs.cap ? std::numeric_limits<double>::infinity() : slowest;
  }
  double best = std::numeric_limits<double>::infinity();
  for (std::int64_t end = offsets[stage] + 1; end <= n; ++end) {
    if (stage + 1 == count && end != n) continue;
    offsets[stage + 1] = end;
    best = std::min(best, tried(stages, costs, offsets, stage + 1));
  }
  return best;
}

void test_balance() {
  using hfpp::Placement;
  std::uint64_t state = 1;
  const auto dice = [&state](std::uint64_t below) {
    state = state * 6364136223846793005U + 1442695040888963407U;
    return static_cast<std::int64_t>((state >> 33U) % below);
  };
  for (std::int64_t pp = 1; pp <= 4; ++pp) {
    for (const std::int64_t per_rank : {1, 2, 3}) {
      for (const Placement placement : {Placement::Loop, Placement::V}) {
        if ((placement == Placement::V && per_rank != 2) || pp * per_rank > 8) continue;
        const hfpp::StageLayout stages(pp, pp * per_rank, placement);
        for (int round = 0; round < 12; ++round) {
          hfpp::LayerCosts costs;
          for (std::int64_t i = stages.num_stages() + dice(4); i > 0; --i) {
            costs.seconds.push_back(0.25 * static_cast<double>(dice(9)));
            costs.static_bytes.push_back(dice(9));
            costs.activation_bytes.push_back(dice(4));
          }
          for (std::int64_t s = 0; s < stages.num_stages(); ++s) costs.live.push_back(dice(4));
          if (round % 2 == 1) costs.cap = 10 + dice(40);
          std::vector<std::int64_t> offsets(static_cast<std::size_t>(stages.num_stages()) + 1, 0);
          const double best = tried(stages, costs, offsets, 0);
          if (std::isinf(best)) {
            check_throws<hfpp::ConfigError>([&] { hfpp::balance(stages, costs); }, "is too small");
            continue;
          }
          const hfpp::Balance found = hfpp::balance(stages, costs);
          const auto [slowest, most] = measured(stages, costs, found.offsets);
          check(slowest == best && found.slowest == best, "the best of all partitions is found");
          check(found.optimal && found.lower_bound == best, "few layers: it is proven");
          check(!costs.cap || most <= *costs.cap, "no rank is over the cap");
        }
      }
    }
  }
  // Many layers: one stage per rank and the methods for several, under the sanitizers.
  hfpp::LayerCosts many;
  for (int i = 0; i < 90; ++i) many.seconds.push_back(1 + 0.01 * static_cast<double>(dice(100)));
  many.seconds.back() += 6;
  for (const auto& [pp, per_rank, placement] :
       {std::tuple(30, 1, Placement::Loop), std::tuple(8, 2, Placement::Loop),
        std::tuple(8, 2, Placement::V), std::tuple(6, 4, Placement::Loop)}) {
    const hfpp::StageLayout stages(pp, pp * per_rank, placement);
    const hfpp::Balance found = hfpp::balance(stages, many);
    const double slowest = measured(stages, many, found.offsets).first;
    check(std::abs(slowest - found.slowest) < 1e-9, "the time is that of the partition");
    check(found.lower_bound <= found.slowest && found.slowest < 1.03 * found.lower_bound,
          "the partition is near its bound");
  }
  const hfpp::StageLayout three(3, 3, Placement::Loop);
  check_throws<hfpp::ConfigError>([&] { hfpp::balance(three, {{1, 1}, {}, {}, {}, {}}); },
                                  "num_stages (3)");
  check_throws<hfpp::ConfigError>([&] { hfpp::balance(three, {{1, -1, 1}, {}, {}, {}, {}}); },
                                  "seconds (-1");
  check_throws<hfpp::ConfigError>(
      [&] { hfpp::balance(three, {{1, 1, 1}, 4, {5, 1, 1}, {0, 0, 0}, {1, 1, 1}}); },
      "use a cap of 5 bytes or more");
  check_throws<std::overflow_error>(
      [&] {
        hfpp::balance(hfpp::StageLayout(1 << 19, 1 << 19, Placement::Loop),
                      {std::vector<double>(1 << 19, 1.0), {}, {}, {}, {}});
      },
      "num_layers (524288) times");
}

void test_shapes() {
  hfpp::BoundarySizes sizes{4, 2, 16, 32, 100, true, hfpp::DType::BFloat16};
  const hfpp::BoundaryTables tables = hfpp::boundary_tables(sizes);
  check(tables.bytes.at_flat(0) == 2 * 16 * 8, "token ids are int64");
  check(tables.bytes.at_flat(1) == 2 * 16 * 32 * 2, "hidden states in bfloat16");
  check(tables.bytes.at_flat(4) == 2 * 16 * 100 * 2, "logits in bfloat16");
  check(tables.shapes.at_flat(2) == 0, "token ids have two axes");
  check(tables.dtypes.at_flat(0) == static_cast<std::int64_t>(hfpp::DType::Int64), "token ids");
  for (std::int64_t s = 1; s < 4; ++s) {
    for (std::int64_t axis = 0; axis < 3; ++axis) {
      check(tables.shapes.at_flat(6 * s + axis) == tables.shapes.at_flat(6 * s - 3 + axis),
            "the input of a stage is the output of the stage before");
    }
  }
  sizes.has_head = false;
  sizes.num_stages = 1;
  check(hfpp::boundary_tables(sizes).shapes.at_flat(5) == 32, "without a head: hidden states");
  sizes.seq_len = std::numeric_limits<std::int64_t>::max() / 2;
  check_throws<std::overflow_error>([&] { hfpp::boundary_tables(sizes); }, "seq_len");
  sizes.seq_len = 0;
  check_throws<hfpp::ConfigError>([&] { hfpp::boundary_tables(sizes); }, "seq_len (0)");
  for (std::size_t i = 0; i < hfpp::kDTypes.size(); ++i) {
    check(static_cast<std::size_t>(hfpp::kDTypes[i].code) == i, "dtype codes index their table");
  }
}

void test_table() {
  hfpp::Table table = hfpp::Table::make<std::int32_t>({2, 3}, "sizes");
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
      [] {
        hfpp::Table::make<std::int64_t>({std::int64_t{1} << 40, std::int64_t{1} << 40}, "sizes");
      },
      "sizes");
}

hfpp::Schedule csv_of(std::string_view text) {
  hfpp::TextInMemory source(text);
  return hfpp::read_csv(source, "a.csv");
}

hfpp::ScheduleFile json_of(const std::string& pp_size, const std::string& rest) {
  const std::string text = R"({"format": "hfpp schedule", "version": 1, "name": "n", "pp_size": )" +
                           pp_size + ", " + rest + "}";
  hfpp::TextInMemory source(text);
  return hfpp::read_json(source, "a.json");
}

void test_schedule_files() {
  const std::string text = "0F0,,(0F1;1B0)OVERLAP_F_B,1UNSHARD\r\n2W3\r\n";
  const hfpp::Schedule schedule = csv_of(text + ",,\r\n\r\n");
  check(schedule.pp_size() == 2 && schedule.num_actions() == 6, "rows and actions of a CSV");
  check(schedule.begin(0)[3].joined() && !schedule.begin(0)[2].joined(), "the parts of a group");
  check(schedule.column_of(0, schedule.end(0) - 1) == 3, "a group is one column");
  check(hfpp::csv_line(schedule, 0) + hfpp::csv_line(schedule, 1) == text, "a CSV written back");
  check(schedule.kinds() == (1U | 1U << 1 | 1U << 2 | 1U << 4 | 1U << 11), "the kinds that occur");
  const hfpp::ScheduleFile file = json_of(
      "2", R"("rows": [[], ["\u0030F0", "", "(0F1;1B0)OVERLAP_F_B"]], "metadata": {"a": [1]})");
  check(hfpp::json_row(file.schedule, 1) == R"(["0F0","","(0F1;1B0)OVERLAP_F_B"])", "a JSON row");
  check(file.metadata == R"({"a": [1]})" && file.schedule.name() == "n", "what else JSON has");
  using hfpp::ConfigError;
  check_throws<ConfigError>([] { csv_of("0F0\n1F0,1X0"); },
                            "a.csv, line 2, character 5: rank 1, column 1: '1X0' is not");
  check_throws<ConfigError>([] { csv_of("0F268435456"); }, "numbered from 0 to 268435455");
  check_throws<ConfigError>([] { csv_of("0F0,\"1F0"); },
                            "character 5: rank 0, column 1: the quotes");
  check_throws<ConfigError>([] { csv_of(std::string(5000, 'F')); }, "is longer than any action");
  check_throws<ConfigError>([] { csv_of("0F0\xff"); }, "character 4: byte 0xff");
  check_throws<ConfigError>([] { csv_of(std::string((1 << 20) + 1, '\n')); }, "1048576 ranks");
  check_throws<ConfigError>([] { csv_of(""); }, "holds no actions");
  check_throws<ConfigError>([] { json_of("3", R"("rows": [["0F0"]])"); }, "pp_size (3) is not");
  check_throws<ConfigError>([] { json_of("1", R"("rows": [["0F0"])"); }, "or ']', not '}'");
  check_throws<ConfigError>([] { json_of("1", R"("metadata": {"a": )" + std::string(99, '[')); },
                            "nested deeper than 32 levels");
}

using Row = std::vector<hfpp::Action>;

hfpp::Schedule schedule_of(std::initializer_list<Row> rows) {
  hfpp::Schedule schedule("table");
  for (const Row& row : rows) {
    for (const hfpp::Action action : row) schedule.add(action);
    schedule.end_row();
  }
  return schedule;
}

void test_verify() {
  using K = hfpp::Kind;
  const auto refused = [](const hfpp::Schedule& schedule, const std::string& part) {
    check_throws<hfpp::ConfigError>([&] { hfpp::verify(schedule, std::nullopt); }, part);
  };
  const Row first{{K::Forward, 0, 0},
                  {K::SendForward, 0, 0},
                  {K::ReceiveBackward, 0, 0},
                  {K::FullBackward, 0, 0}};
  const Row second{{K::ReceiveForward, 1, 0},
                   {K::Forward, 1, 0},
                   {K::BackwardInput, 1, 0},
                   {K::SendBackward, 1, 0},
                   {K::BackwardWeight, 1, 0}};
  const hfpp::Schedule good = schedule_of({first, second});
  check(hfpp::verify(good, 1) == std::vector<std::int64_t>({1, 1}), "one activation each");
  check(hfpp::verify(schedule_of({{{K::Forward, 0, 0}, {K::FullBackward, 0, 0}}}), 1).size() == 1,
        "a single rank");
  check_throws<hfpp::ConfigError>([&] { hfpp::verify(good, 0); }, "activation_limit (0)");

  Row late = second;
  std::swap(late[3], late[4]);
  check(hfpp::verify(schedule_of({first, late}), 1).size() == 2, "W may come before the send");
  std::swap(late[0], late[1]);
  refused(schedule_of({first, late}), "rank 1, column 0, action 1F0: 1F0 comes without 1RECV_F0");
  refused(schedule_of({first, {second.begin(), second.end() - 1}}), "action 1W0 is missing");
  refused(schedule_of({{first[0], first[2], first[3]}, second}), "rank 0 has no counterpart");
  refused(schedule_of({{first[0], first[2], first[3], first[1]}, second}), "deadlocks: rank 0");
  refused(schedule_of({}), "no compute actions");

  // Sends first on both ranks: only buffers save it.
  const Row sends{{K::Forward, 0, 0},         {K::SendForward, 0, 0},     {K::Forward, 0, 1},
                  {K::SendForward, 0, 1},     {K::ReceiveBackward, 0, 0}, {K::FullBackward, 0, 0},
                  {K::ReceiveBackward, 0, 1}, {K::FullBackward, 0, 1}};
  const Row crossing{{K::ReceiveForward, 1, 0}, {K::Forward, 1, 0},        {K::FullBackward, 1, 0},
                     {K::SendBackward, 1, 0},   {K::ReceiveForward, 1, 1}, {K::Forward, 1, 1},
                     {K::FullBackward, 1, 1},   {K::SendBackward, 1, 1}};
  refused(schedule_of({sends, crossing}), "rank 0, column 3, action 0SEND_F1 waits for 1RECV_F1");

  // Indices at the edge of what an action can have: an error, and no gigabytes.
  const std::int64_t most = hfpp::Action::kMaxIndex;
  refused(schedule_of({{{K::Forward, 0, most}, {K::FullBackward, 0, most}}}), "0F0 is missing");
  refused(schedule_of({{{K::Forward, most, 0}, {K::FullBackward, most, 0}}}), "runs stage 0");
  refused(schedule_of({{{K::Forward, 0, 0}, {K::Unshard, most, 0}}}), "does not live on this rank");
}

// A table of two microbatches with up to three mistakes, or none.
hfpp::Schedule odd_schedule(std::mt19937& chance) {
  const auto below = [&](std::size_t most) { return static_cast<std::int64_t>(chance() % most); };
  std::vector<Row> rows(1 + chance() % 2);
  for (std::size_t rank = 0; rank < rows.size(); ++rank) {
    const auto stage = static_cast<std::int64_t>(rank);
    for (const hfpp::Kind kind : {hfpp::Kind::Forward, hfpp::Kind::FullBackward}) {
      for (std::int64_t m = 0; m < 2; ++m) rows[rank].push_back({kind, stage, m});
    }
  }
  for (std::int64_t edits = below(4); edits > 0; --edits) {
    Row& row = rows[chance() % rows.size()];
    const auto kind = static_cast<hfpp::Kind>(below(hfpp::kKinds));
    const hfpp::Action action(kind, below(3), below(3), !row.empty() && below(3) == 0);
    const auto place = row.begin() + below(row.size() + 1);
    if (below(3) == 0) {
      row.insert(place, action);
    } else if (place != row.end()) {
      if (below(2) == 0) std::swap(*place, row.front());
      if (below(2) == 0) row.erase(place);
    }
  }
  hfpp::Schedule schedule("table");
  for (const Row& row : rows) {
    for (const hfpp::Action& a : row) schedule.add(&a == row.data() ? a.alone() : a);
    schedule.end_row();
  }
  return schedule;
}

// Whatever the actions are, there is a verdict.
void test_verify_anything() {
  std::mt19937 chance(7);
  int passed = 0;
  int refused = 0;
  for (int i = 0; i < 20000; ++i) {
    const hfpp::Schedule schedule = odd_schedule(chance);
    try {
      hfpp::verify(schedule, 1 + static_cast<std::int64_t>(chance() % 2));
      ++passed;
    } catch (const hfpp::ConfigError&) {
      ++refused;
    }
  }
  check(passed > 1000 && refused > 1000, "some pass, some do not");
}

// "0F0 0B0", overlapped parts joined by ";".
std::string row_text(const hfpp::Schedule& schedule, std::int64_t rank) {
  std::string text;
  for (const hfpp::Action* action = schedule.begin(rank); action != schedule.end(rank); ++action) {
    if (!text.empty()) text += action->joined() ? ";" : " ";
    text += hfpp::text_of(*action);
  }
  return text;
}

// How often each computation comes, over all ranks.
std::map<std::string, int> computations(const hfpp::Schedule& schedule) {
  std::map<std::string, int> counts;
  for (std::int64_t rank = 0; rank < schedule.pp_size(); ++rank) {
    for (const hfpp::Action* action = schedule.begin(rank); action != schedule.end(rank);
         ++action) {
      if (hfpp::is_compute(action->kind())) ++counts[hfpp::text_of(*action)];
    }
  }
  return counts;
}

void test_orders() {
  using hfpp::Order;
  struct Case {
    const char* name;
    std::int64_t per_rank;
    std::int64_t least;  // microbatches, per rank
  };
  for (const Case& one : {Case{"GPipe", 1, 0}, Case{"1F1B", 1, 1}, Case{"Interleaved1F1B", 3, 1},
                          Case{"LoopedBFS", 2, 0}, Case{"InterleavedZeroBubble", 2, 1},
                          Case{"ZBVZeroBubble", 2, 0}, Case{"DualPipeV", 2, 2}, Case{"ZBH2", 1, 0},
                          Case{"VHalf", 2, 0}, Case{"VMin", 2, 0}, Case{"VLimited", 2, 0}}) {
    for (std::int64_t pp = 1; pp <= 7; ++pp) {
      const std::int64_t n = std::max<std::int64_t>(one.least * pp, 3);
      if (one.least == 1 && n % pp != 0) continue;
      const Order order(one.name, pp, one.per_rank, n);
      const hfpp::Schedule all = order.all_ranks();
      check(all.num_stages() == pp * one.per_rank && all.n_microbatches() == n, one.name);
      for (const auto& [text, count] : computations(all)) check(count == 1, text);
      for (std::int64_t rank = 0; rank < pp; ++rank) {
        check(row_text(order.one_rank(rank), 0) == row_text(all, rank), "a rank alone");
      }
      for (const bool ordered : {false, true}) {
        const hfpp::Schedule lowered = hfpp::lowered(all, {true, true, true, true, true, ordered});
        check(computations(lowered) == computations(all), "lowering keeps computations");
        std::int64_t sends = 0;
        std::int64_t receives = 0;
        std::int64_t waits = 0;
        for (std::int64_t rank = 0; rank < pp; ++rank) {
          for (const hfpp::Action* action = lowered.begin(rank); action != lowered.end(rank);
               ++action) {
            sends += hfpp::is_send(action->kind()) ? 1 : 0;
            receives += hfpp::is_receive(action->kind()) ? 1 : 0;
            waits += hfpp::is_send_wait(action->kind()) ? 1 : 0;
          }
        }
        check(sends == receives && sends == waits, "each send has a receive and a wait");
        check((sends > 0) == (pp > 1), "neighbours exchange messages");
      }
    }
  }
  check(row_text(Order("1F1B", 2, 1, 2).all_ranks(), 0) == "0F0 0F1 0B0 0B1", "1F1B");
  for (std::int64_t limit = 6; limit <= 11; ++limit) {
    const hfpp::Schedule all = Order("VLimited", 5, 2, 9, limit).all_ranks();
    check(computations(all) == computations(Order("VMin", 5, 2, 9).all_ranks()), all.name());
    const std::vector<std::int64_t> peaks = hfpp::verify(all, limit);
    check(*std::max_element(peaks.begin(), peaks.end()) <= limit, "the limit is kept");
  }
  check_throws<hfpp::ConfigError>([] { Order("VLimited", 5, 2, 9, 5); }, "at least 6");
  check_throws<hfpp::ConfigError>([] { Order("VHalf", 5, 2, 9, 9); }, "is for VLimited");
  check_throws<hfpp::ConfigError>([] { Order("1F2B", 2, 1, 2); }, "'1F2B'");
  check_throws<hfpp::ConfigError>([] { Order("1F1B", 2, 2, 2); }, "stages_per_rank (2)");
  check_throws<hfpp::ConfigError>([] { Order("1F1B", 2, 1, 2).one_rank(2); }, "rank (2)");
  check_throws<std::overflow_error>([] { Order("GPipe", 100000, 1, 100000).all_ranks(); },
                                    "20000000000 actions");
  check_throws<hfpp::ConfigError>([] { hfpp::forward_only({0, 2}, 1); }, "rank (2)");
  check_throws<hfpp::ConfigError>(
      [] { hfpp::forward_only({0, std::numeric_limits<std::int64_t>::max()}, 1); },
      "rank (9223372036854775807)");
  check(row_text(hfpp::forward_only({0, 1, 0}, 1), 0) == "0F0 2F0", "forwards of any placement");
}

void test_lowering() {
  using hfpp::Action;
  using hfpp::Kind;
  hfpp::Schedule table("planted");
  table.add({Kind::Forward, 0, 0});
  table.add({Kind::FullBackward, 0, 0});
  table.add({Kind::Forward, 0, 1});
  table.add({Kind::FullBackward, 0, 1});
  table.end_row();
  check(row_text(hfpp::lowered(table, {}), 0) == "0UNSHARD 0F0 0B0 0F1 0B1 0REDUCE_GRAD 0RESHARD",
        "what FSDP needs");
  table.add({Kind::Forward, 1, 1});
  table.add({Kind::FullBackward, 1, 1});
  table.add({Kind::Forward, 1, 0});
  table.add({Kind::FullBackward, 1, 0});
  table.end_row();
  check_throws<hfpp::ConfigError>([&] { hfpp::lowered(table, {}); },
                                  "deadlocks: rank 0, column 1, action 0B0");
  hfpp::Schedule group("group");
  for (std::int64_t stage = 0; stage < 4; ++stage) {
    group.add({Kind::Forward, stage, 0, stage > 0});
  }
  group.end_row();
  check_throws<hfpp::ConfigError>([&] { hfpp::lowered(group, {}); }, "more than 3 stages");
  hfpp::Schedule far("far");
  far.add({Kind::Forward, 0, Action::kMaxIndex});
  far.end_row();
  check_throws<hfpp::ConfigError>([&] { hfpp::lowered(far, {}); }, "incomplete");

  // CPython: list({6, 14}) is [6, 14], list({7, 15}) is [15, 7].
  for (const auto& [first, second, order] :
       {std::tuple<std::int64_t, std::int64_t, std::vector<std::int64_t>>{6, 14, {6, 14}},
        {7, 15, {15, 7}}}) {
    hfpp::PythonSet set;
    set.add(first);
    set.add(second);
    std::vector<std::int64_t> found;
    set.append_to(found);
    check(found == order, "the order of a Python set");
    for (std::int64_t value = 100; value < 120; ++value) {
      set.add(value);
      set.remove(value);
    }
    found.clear();
    set.append_to(found);
    check(found.size() == 2, "what is removed is gone");
  }
}

hfpp::ActionCosts costs_of(std::int64_t num_stages, hfpp::Communication communication) {
  const auto stages = static_cast<std::size_t>(num_stages);
  const std::size_t boundaries = stages == 0 ? 0 : stages - 1;
  const auto times = [&](double time) { return std::vector<double>(stages, time); };
  const auto bytes = [&](std::size_t count) { return std::vector<std::int64_t>(count, 5); };
  const std::vector<double> seconds(boundaries, 1);
  return {times(1),
          times(2),
          times(1),
          times(1),
          bytes(stages),
          bytes(stages),
          {seconds, seconds, bytes(boundaries), communication},
          0};
}

void test_simulate() {
  using hfpp::Communication;
  const hfpp::Schedule schedule = csv_of("0F0,0F1,0B0,0B1\n1F0,(1F1;1B0)OVERLAP_F_B,1B1\n");
  hfpp::ActionCosts costs = costs_of(2, Communication::Beside);
  const hfpp::Simulation beside(schedule, costs);
  // 0F0 to 1, on the way to 2; 1F0 to 3, 1F1 and 1B0 to 6, on the way to 7, 0B0 to 9; 1B1 to 8.
  check(beside.step_time() == 11 && beside.spans(0)[2].start == 7, "transfers beside");
  check(beside.report(1).start == 2 && beside.report(1).end == 3, "the second rank's idle time");
  check(beside.report(0).gradients == 4 && beside.report(0).communication == 1, "by cause");
  check(beside.report(0).peak_live == 2 && beside.report(0).peak_activation_bytes == 10, "memory");
  check(beside.report(1).sent_bytes == 10 && beside.report(1).peak_receive_buffers == 2, "buffers");
  check(beside.sent_by(0).size() == 2 && beside.sent_by(0)[1].span.end == 3, "what is sent");
  costs.transfers.communication = Communication::Within;
  const hfpp::Simulation within(schedule, costs);
  check(within.spans(0)[1].start == 2 && within.report(0).communication == 4, "transfers within");
  costs.overlap_gain = 1;
  check(hfpp::Simulation(schedule, costs).spans(1)[2].end == within.spans(1)[2].end - 1, "a gain");
  costs.overlap_gain = 2;
  check_throws<hfpp::ConfigError>([&] { hfpp::Simulation(schedule, costs); }, "overlap_gain (2");
  costs = costs_of(3, Communication::Beside);
  check_throws<hfpp::ConfigError>([&] { hfpp::Simulation(schedule, costs); }, "has 3 entries");
  const hfpp::Schedule circle = csv_of("0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0\n");
  check_throws<hfpp::ConfigError>(
      [&] { hfpp::Simulation(circle, costs_of(2, Communication::Beside)); },
      "deadlocks: rank 0, column 1, action 0B0 waits for 1B0 of rank 1; rank 1, column 0");
  const hfpp::Schedule lowered = csv_of("0F0,0SEND_F0,0RECV_B0,0B0\n1RECV_F0,1F0,1B0,1SEND_B0\n");
  hfpp::LockStep lock = hfpp::lock_step(lowered);
  const std::int32_t expected[] = {0, 1, 4, 5, 1, 2, 3, 4};
  check(std::equal(expected, expected + 8, lock.steps.data<std::int32_t>()) && lock.count == 6,
        "a receive with its send");
}

// Whatever is in a table, it runs to its end or is refused; what is verified runs.
void test_simulate_anything() {
  std::mt19937 chance(11);
  int ran = 0;
  int refused = 0;
  for (int i = 0; i < 20000; ++i) {
    const hfpp::Schedule schedule = odd_schedule(chance);
    const auto communication = static_cast<hfpp::Communication>(chance() % 2);
    bool verified = true;
    try {
      hfpp::verify(schedule, std::nullopt);
    } catch (const hfpp::ConfigError&) {
      verified = false;
    }
    try {
      const hfpp::Simulation step(schedule, costs_of(schedule.num_stages(), communication));
      double idle = 0;
      for (std::int64_t rank = 0; rank < schedule.pp_size(); ++rank) {
        idle += step.report(rank).busy + step.report(rank).idle();
      }
      check(idle == step.step_time() * static_cast<double>(schedule.pp_size()), "busy or idle");
      if (schedule.has_communication()) hfpp::lock_step(schedule);
      ++ran;
    } catch (const hfpp::ConfigError& error) {
      check(!verified, error.what());
      ++refused;
    }
  }
  check(ran > 1000 && refused > 1000, "some run, some do not");
}

}  // namespace

int main() {
  test_table();
  test_placement();
  test_partition();
  test_balance();
  test_shapes();
  test_schedule_files();
  test_verify();
  test_verify_anything();
  test_orders();
  test_lowering();
  test_simulate();
  test_simulate_anything();
  std::printf("core_test: %d checks passed\n", checks);
  return 0;
}
