// The order of computations of every schedule, row by row.
#include "orders.hpp"

#include <algorithm>
#include <array>
#include <utility>

#include "building_block.hpp"
#include "table.hpp"
#include "v_row.hpp"

namespace hfpp {

namespace {

constexpr Kind F = Kind::Forward;
constexpr Kind B = Kind::FullBackward;
constexpr Kind I = Kind::BackwardInput;
constexpr Kind W = Kind::BackwardWeight;

// Rows are refused before memory is taken for them, under the limit of every table of the core.
void reserve(Schedule& schedule, std::int64_t rows, std::int64_t most_in_row) {
  const std::int64_t actions = checked_multiply(rows, most_in_row, "pp_size * actions of a rank");
  constexpr std::int64_t kMost = Table::kMaxBytes / static_cast<std::int64_t>(sizeof(Action));
  if (actions > kMost) {
    throw std::overflow_error("pp_size * stages_per_rank * n_microbatches: a schedule of " +
                              std::to_string(actions) + " actions is over the limit of " +
                              std::to_string(kMost) + ": use smaller sizes.");
  }
  schedule.reserve(static_cast<std::size_t>(rows), static_cast<std::size_t>(actions));
}

void require_index(const char* name, std::int64_t value) {
  require_at_least(name, value, 1);
  require_at_most(name, value, Action::kMaxIndex);
}

// Interleaved schedules go in rounds: some microbatches through every local stage in turn.
struct Rounds {
  std::int64_t rank;
  std::int64_t pp_size;
  std::int64_t stages_per_rank;
  std::int64_t per_round;  // microbatches

  Action at(Kind kind, std::int64_t step) const {
    const std::int64_t turn = step / per_round;
    const std::int64_t ascending = turn % stages_per_rank;
    const std::int64_t local = kind == F ? ascending : stages_per_rank - 1 - ascending;
    const std::int64_t microbatch = turn / stages_per_rank * per_round + step % per_round;
    return {kind, local * pp_size + rank, microbatch};
  }
};

}  // namespace

struct Order::Known {
  const char* name;
  std::int64_t stages_per_rank;  // 0: any number
  std::int64_t kinds;            // actions of a stage for one microbatch, at most
  Write write;                   // null where the order is chosen under a limit
};

const Order::Known& Order::find(const std::string& name) {
  static constexpr std::array<Known, 11> kKnown = {{
      {"GPipe", 1, 2, &Order::gpipe},
      {"1F1B", 1, 2, &Order::one_f_one_b},
      {"Interleaved1F1B", 0, 2, &Order::interleaved_1f1b},
      {"LoopedBFS", 0, 2, &Order::looped_bfs},
      {"InterleavedZeroBubble", 0, 3, &Order::interleaved_zero_bubble},
      {"ZBVZeroBubble", 2, 3, &Order::zbv_zero_bubble},
      {"DualPipeV", 2, 3, &Order::dual_pipe_v},
      {"ZBH2", 1, 3, &Order::zb_h2},
      {"VHalf", 2, 3, &Order::v_half},
      {"VMin", 2, 3, &Order::v_min},
      {"VLimited", 2, 3, nullptr},
  }};
  const auto* const found = std::find_if(kKnown.begin(), kKnown.end(),
                                         [&](const Known& known) { return name == known.name; });
  if (found == kKnown.end()) throw ConfigError("no schedule is called '" + name + "'.");
  return *found;
}

Order::Order(const std::string& name, std::int64_t pp_size, std::int64_t stages_per_rank,
             std::int64_t n_microbatches, std::optional<std::int64_t> activation_limit)
    : name_(name),
      pp_size_(pp_size),
      stages_per_rank_(stages_per_rank),
      n_microbatches_(n_microbatches) {
  const Known& known = find(name);
  require_index("pp_size", pp_size);
  require_index("stages_per_rank", stages_per_rank);
  require_index("n_microbatches", n_microbatches);
  require_at_most("num_stages", checked_multiply(pp_size, stages_per_rank, "num_stages"),
                  Action::kMaxIndex);
  if (known.stages_per_rank != 0 && known.stages_per_rank != stages_per_rank) {
    throw ConfigError(named("stages_per_rank", stages_per_rank) + " must be " +
                      std::to_string(known.stages_per_rank) + " for " + name + ".");
  }
  most_in_row_ =
      checked_multiply(checked_multiply(stages_per_rank, n_microbatches, "actions of a rank"),
                       known.kinds, "actions of a rank");
  write_ = known.write;
  if (activation_limit && write_ != nullptr) {
    throw ConfigError(named("activation_limit", *activation_limit) + " is for VLimited, and " +
                      name + " holds what it holds: leave it out.");
  }
  if (write_ == nullptr) {
    const std::int64_t most = zb_v_activations(pp_size, n_microbatches);
    const std::int64_t limit = activation_limit.value_or(most);
    require_at_least("activation_limit", limit, v_min_activations(pp_size, n_microbatches));
    activation_limit_ = std::min(limit, most);
    if (activation_limit) name_ += "-" + std::to_string(limit);
  }
}

Schedule Order::all_ranks() const {
  return rows(0, pp_size_);
}

Schedule Order::one_rank(std::int64_t rank) const {
  if (rank < 0 || rank >= pp_size_) {
    throw ConfigError(named("rank", rank) + " must be in [0, " + named("pp_size", pp_size_) + ").");
  }
  return rows(rank, rank + 1);
}

Schedule Order::rows(std::int64_t begin, std::int64_t end) const {
  Schedule schedule(name_);
  reserve(schedule, end - begin, most_in_row_);
  VOrder found;
  const Write write = write_ != nullptr ? write_ : best_v(found);
  for (std::int64_t rank = begin; rank < end; ++rank) {
    if (found.empty()) {
      write(*this, rank, schedule);
    } else {
      VRow row(schedule, rank, pp_size_, n_microbatches_);
      for (const std::uint8_t part : found[static_cast<std::size_t>(rank)]) {
        row.repeat(1, {kVParts.at(part)});
      }
    }
    schedule.end_row();
  }
  return schedule;
}

Order::Write Order::best_v(VOrder& found) const {
  const std::pair<Write, std::int64_t> fixed[] = {
      {&Order::zbv_zero_bubble, zb_v_activations(pp_size_, n_microbatches_)},
      {&Order::v_half, v_half_activations(pp_size_, n_microbatches_)},
      {&Order::v_min, v_min_activations(pp_size_, n_microbatches_)}};
  Write best = nullptr;
  std::int64_t least = 0;
  for (const auto& [write, activations] : fixed) {
    if (activations > activation_limit_) continue;
    if (!can_search_v(pp_size_, n_microbatches_))
      return write;  // one row costs no more than itself
    const std::int64_t idle = idle_units(v_order(write), n_microbatches_);
    if (best == nullptr || idle < least) {
      best = write;
      least = idle;
    }
  }
  // The last rank idles while the first forward comes to it, whatever the order.
  if (least > pp_size_ - 1) {
    found = search_v_order(pp_size_, n_microbatches_, activation_limit_, least);
  }
  return best;
}

VOrder Order::v_order(Write write) const {
  VOrder order;
  for (std::int64_t rank = 0; rank < pp_size_; ++rank) {
    Schedule row(name_);
    write(*this, rank, row);
    row.end_row();
    std::vector<std::uint8_t>& parts = order.emplace_back();
    for (const Action* action = row.begin(0); action != row.end(0); ++action) {
      const std::size_t chunk = action->stage() == rank ? 0 : 1;
      const auto* const part = std::find_if(kVParts.begin(), kVParts.end(), [&](const Part& one) {
        return one.kind == action->kind() && one.chunk == chunk;
      });
      parts.push_back(static_cast<std::uint8_t>(part - kVParts.begin()));
    }
  }
  return order;
}

// All forwards, then all backwards, both in the order of microbatches.
void Order::gpipe(const Order& order, std::int64_t rank, Schedule& schedule) {
  for (const Kind kind : {F, B}) {
    for (std::int64_t m = 0; m < order.n_microbatches_; ++m) schedule.add({kind, rank, m});
  }
}

// One forward per stage from here to the end, then one backward per forward.
void Order::one_f_one_b(const Order& order, std::int64_t rank, Schedule& schedule) {
  const std::int64_t n = order.n_microbatches_;
  const std::int64_t warmup = std::min(n, order.pp_size_ - rank);
  for (std::int64_t m = 0; m < warmup; ++m) schedule.add({F, rank, m});
  for (std::int64_t m = 0; m < n; ++m) {
    schedule.add({B, rank, m});
    if (m + warmup < n) schedule.add({F, rank, m + warmup});
  }
}

// All microbatches of a stage before the rank's next stage; backwards in the reverse order.
void Order::looped_bfs(const Order& order, std::int64_t rank, Schedule& schedule) {
  const std::int64_t n = order.n_microbatches_;
  for (std::int64_t local = 0; local < order.stages_per_rank_; ++local) {
    const std::int64_t stage = local * order.pp_size_ + rank;
    for (std::int64_t m = 0; m < n; ++m) schedule.add({F, stage, m});
  }
  for (std::int64_t local = order.stages_per_rank_ - 1; local >= 0; --local) {
    const std::int64_t stage = local * order.pp_size_ + rank;
    for (std::int64_t m = n - 1; m >= 0; --m) schedule.add({B, stage, m});
  }
}

// Depth first in rounds of about pp_size microbatches, then one forward, one backward
// (arXiv 2104.04473).
void Order::interleaved_1f1b(const Order& order, std::int64_t rank, Schedule& schedule) {
  const std::int64_t n = order.n_microbatches_;
  const std::int64_t per_round = n / std::max<std::int64_t>(1, n / order.pp_size_);
  const Rounds rounds{rank, order.pp_size_, order.stages_per_rank_, per_round};
  const std::int64_t total = order.stages_per_rank_ * n;
  const std::int64_t hops = order.pp_size_ - 1 - rank;
  const std::int64_t warmup = std::min(total, (order.stages_per_rank_ - 1) * per_round + 2 * hops);
  for (std::int64_t step = 0; step < warmup; ++step) schedule.add(rounds.at(F, step));
  for (std::int64_t step = 0; step < total; ++step) {
    if (step + warmup < total) schedule.add(rounds.at(F, step + warmup));
    schedule.add(rounds.at(B, step));
  }
}

// The same with split backwards, where each rank holds back as many weights' gradients as its
// index, to fill the end of the step (ZB1P, arXiv 2401.10241).
void Order::interleaved_zero_bubble(const Order& order, std::int64_t rank, Schedule& schedule) {
  const std::int64_t n = order.n_microbatches_;
  const std::int64_t per_round = n / std::max<std::int64_t>(1, n / order.pp_size_);
  const Rounds rounds{rank, order.pp_size_, order.stages_per_rank_, per_round};
  const std::int64_t total = order.stages_per_rank_ * n;
  const std::int64_t hops = order.pp_size_ - 1 - rank;
  const std::int64_t warmup = std::min(total, (order.stages_per_rank_ - 1) * per_round + hops);
  for (std::int64_t step = 0; step < warmup; ++step) schedule.add(rounds.at(F, step));
  for (std::int64_t step = 0; step < total; ++step) {
    if (step + warmup < total) schedule.add(rounds.at(F, step + warmup));
    schedule.add(rounds.at(I, step));
    if (step >= rank) schedule.add(rounds.at(W, step - rank));
  }
  for (std::int64_t step = std::max<std::int64_t>(0, total - rank); step < total; ++step) {
    schedule.add(rounds.at(W, step));
  }
}

// ZB-V (arXiv 2401.10241, section 6): two stages per rank in a v, every backward split. Laid out
// for at least 2 * pp_size - 1 microbatches; what is too many is left out.
void Order::zbv_zero_bubble(const Order& order, std::int64_t rank, Schedule& schedule) {
  const std::int64_t planned = std::max(2 * order.pp_size_ - 1, order.n_microbatches_);
  const std::int64_t hops = order.pp_size_ - rank;  // to the last rank, and one
  VRow row(schedule, rank, order.pp_size_, order.n_microbatches_);
  row.repeat(2 * hops - 1, {{F, 0}});
  row.repeat(rank, {{F, 1}, {F, 0}});
  row.repeat(hops, {{F, 1}, {I, 1}, {W, 1}});
  row.repeat(planned - row.count({F, 0}), {{F, 0}, {I, 0}, {W, 0}, {F, 1}, {I, 1}, {W, 1}});
  row.repeat(planned - row.count({F, 1}), {{I, 0}, {W, 0}, {F, 1}, {I, 1}, {W, 1}});
  row.repeat(rank, {{I, 0}, {I, 1}});
  row.repeat(hops, {{I, 0}, {W, 0}});
  row.repeat(row.count({I, 1}) - row.count({W, 1}), {{W, 1}});
  row.repeat(row.count({I, 0}) - row.count({W, 0}), {{W, 0}});
}

// DualPipeV: two stages per rank in a v, forwards overlapped with backwards of the other stage.
void Order::dual_pipe_v(const Order& order, std::int64_t rank, Schedule& schedule) {
  const std::int64_t hops = order.pp_size_ - 1 - rank;
  const std::int64_t here = rank + 1;
  VRow row(schedule, rank, order.pp_size_, order.n_microbatches_);
  row.repeat(2 * hops, {{F, 0}});
  row.repeat(here, {{F, 0}, {F, 1}});
  for (std::int64_t i = 0; i < hops; ++i) {
    row.split(1);
    row.weight();
    row.repeat(1, {{F, 1}});
  }
  for (std::int64_t i = 0; i < order.n_microbatches_ - 2 * order.pp_size_ + here; ++i) {
    if (i == 0 && hops == 0) {  // apart, for a smaller bubble
      row.repeat(1, {{F, 0}, {B, 1}});
    } else {
      row.overlap(0, 1);
    }
    row.overlap(1, 0);
  }
  for (std::int64_t i = 0; i < hops; ++i) {
    row.repeat(1, {{B, 1}});
    row.overlap(1, 0);
  }
  // From the middle of this phase on, backwards are split: on odd ranks before chunk 1's, on even
  // ranks between the two.
  const std::int64_t middle = 2 * (here / 2) + (rank % 2 == 0 ? 1 : 0);
  for (std::int64_t i = 0; i < 2 * here; ++i) {
    const std::size_t chunk = i % 2 == 0 ? 1 : 0;
    if (i >= middle) {
      row.split(chunk);
    } else {
      row.repeat(1, {{B, chunk}});
    }
  }
  for (std::int64_t i = 0; i < hops; ++i) {
    row.weight();
    row.split(0);
  }
  while (row.has_put_off()) row.weight();
}

// ZB-H2 (arXiv 2401.10241, section 2): twice the forwards of 1F1B's start, less one, and on rank r
// 2 * r weights' gradients put off. Where forward, input part and weights' part take one unit each,
// no rank idles between its first action and its last from 2 * pp_size - 1 microbatches on; every
// rank then has 2 * pp_size - 1 live activations, where 1F1B has pp_size at most.
void Order::zb_h2(const Order& order, std::int64_t rank, Schedule& schedule) {
  const std::int64_t n = order.n_microbatches_;
  const std::int64_t warmup = std::min(n, 2 * (order.pp_size_ - rank) - 1);
  const std::int64_t put_off = std::min(n, 2 * rank);
  for (std::int64_t m = 0; m < warmup; ++m) schedule.add({F, rank, m});
  for (std::int64_t m = 0; m < n; ++m) {
    schedule.add({I, rank, m});
    if (m >= put_off) schedule.add({W, rank, m - put_off});
    if (m + warmup < n) schedule.add({F, rank, m + warmup});
  }
  for (std::int64_t m = n - put_off; m < n; ++m) schedule.add({W, rank, m});
}

// V-Half: half of 1F1B's activations, and of half a microbatch or one more. At both ends together a
// rank idles 3.5 units per rank of the pipeline, where 1F1B idles 6. No other waits at the turns
// hold fewer activations.
void Order::v_half(const Order& order, std::int64_t rank, Schedule& schedule) {
  const bool odd = order.pp_size_ % 2 == 1;
  const BuildingBlock::Hops hops =
      odd ? BuildingBlock::Hops{1, 2, 1, 0, 0} : BuildingBlock::Hops{1, 2, 3, 0, 4};
  VRow row(schedule, rank, order.pp_size_, order.n_microbatches_);
  BuildingBlock(hops, rank, order.pp_size_).repeat(order.n_microbatches_, row);
}

// V-Min: a third of 1F1B's activations and one stage more at most, for 4 units of idle time per
// rank.
void Order::v_min(const Order& order, std::int64_t rank, Schedule& schedule) {
  const bool three = order.pp_size_ % 3 == 0;
  const BuildingBlock::Hops hops =
      three ? BuildingBlock::Hops{1, 1, 2, 0, 2} : BuildingBlock::Hops{1, 1, 0, 0, 0};
  VRow row(schedule, rank, order.pp_size_, order.n_microbatches_);
  BuildingBlock(hops, rank, order.pp_size_).repeat(order.n_microbatches_, row);
}

Schedule forward_only(const std::vector<std::int64_t>& stage_to_rank, std::int64_t n_microbatches) {
  require_index("n_microbatches", n_microbatches);
  const auto stages = static_cast<std::int64_t>(stage_to_rank.size());
  require_at_least("num_stages", stages, 1);
  std::int64_t ranks = 0;
  for (const std::int64_t rank : stage_to_rank) {
    require_at_least("rank", rank, 0);
    if (rank >= stages) {
      throw ConfigError(named("rank", rank) + ": " + named("num_stages", stages) +
                        " is too few for a stage on every rank: use a smaller rank.");
    }
    ranks = std::max(ranks, rank + 1);
  }
  Schedule schedule("forward only");
  reserve(schedule, stages, n_microbatches);
  std::vector<std::vector<std::int64_t>> rows(static_cast<std::size_t>(ranks));
  for (std::int64_t stage = 0; stage < stages; ++stage) {
    rows[static_cast<std::size_t>(stage_to_rank[static_cast<std::size_t>(stage)])].push_back(stage);
  }
  for (const std::vector<std::int64_t>& row : rows) {
    for (const std::int64_t stage : row) {
      for (std::int64_t m = 0; m < n_microbatches; ++m) schedule.add({F, stage, m});
    }
    schedule.end_row();
  }
  return schedule;
}

}  // namespace hfpp
