// The order of computations of every schedule: all ranks, or one in time proportional to its own.
//
// GPipe, 1F1B, Interleaved1F1B, LoopedBFS, InterleavedZeroBubble, ZBVZeroBubble and DualPipeV have
// the order in which torch runs them; ZBH2, VHalf and VMin, which torch lacks, that of their
// papers; VLimited the best that is found under a limit on activations. Idle time is left out: it
// follows from order and costs.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "schedule.hpp"
#include "v_limited.hpp"

namespace hfpp {

class Order {
 public:
  // Throws for an unknown name, and for sizes that no table holds or that the schedule cannot have;
  // the rule on microbatches is the caller's. `activation_limit` is for VLimited: the most stage
  // activations that a rank may hold, at least V-Min's; none means ZB-V's.
  Order(const std::string& name, std::int64_t pp_size, std::int64_t stages_per_rank,
        std::int64_t n_microbatches, std::optional<std::int64_t> activation_limit = std::nullopt);

  Schedule all_ranks() const;
  // A schedule of one row, with the stages' numbers in the whole pipeline. That of VLimited takes
  // the time of all rows where they are searched for.
  Schedule one_rank(std::int64_t rank) const;

 private:
  using Write = void (*)(const Order& order, std::int64_t rank, Schedule& schedule);
  struct Known;
  static const Known& find(const std::string& name);

  static void gpipe(const Order&, std::int64_t, Schedule&);
  static void one_f_one_b(const Order&, std::int64_t, Schedule&);
  static void interleaved_1f1b(const Order&, std::int64_t, Schedule&);
  static void looped_bfs(const Order&, std::int64_t, Schedule&);
  static void interleaved_zero_bubble(const Order&, std::int64_t, Schedule&);
  static void zbv_zero_bubble(const Order&, std::int64_t, Schedule&);
  static void dual_pipe_v(const Order&, std::int64_t, Schedule&);
  static void zb_h2(const Order&, std::int64_t, Schedule&);
  static void v_half(const Order&, std::int64_t, Schedule&);
  static void v_min(const Order&, std::int64_t, Schedule&);

  Schedule rows(std::int64_t begin, std::int64_t end) const;
  // Under the limit: what writes the best of the fixed orders, or the better one that is found.
  Write best_v(VOrder& found) const;
  VOrder v_order(Write write) const;

  std::string name_;
  std::int64_t pp_size_;
  std::int64_t stages_per_rank_;
  std::int64_t n_microbatches_;
  std::int64_t most_in_row_;           // actions of one rank
  Write write_;                        // null for VLimited
  std::int64_t activation_limit_ = 0;  // of VLimited
};

// Forwards only, of stages in any placement: every rank has its own in the order of stages, then
// microbatches, which cannot deadlock. `stage_to_rank` has the rank of every stage.
Schedule forward_only(const std::vector<std::int64_t>& stage_to_rank, std::int64_t n_microbatches);

}  // namespace hfpp
