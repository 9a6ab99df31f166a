// The order of computations of every schedule: all ranks, or one in time proportional to its own.
//
// GPipe, 1F1B, Interleaved1F1B, LoopedBFS, InterleavedZeroBubble, ZBVZeroBubble and DualPipeV have
// the order in which torch runs them; ZBH2, VHalf and VMin, which torch lacks, that of their
// papers. Idle time is left out: it follows from order and costs.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "schedule.hpp"

namespace hfpp {

class Order {
 public:
  // Throws for an unknown name, and for sizes that no table holds or that the schedule cannot have;
  // the rule on microbatches is the caller's.
  Order(const std::string& name, std::int64_t pp_size, std::int64_t stages_per_rank,
        std::int64_t n_microbatches);

  Schedule all_ranks() const;
  // A schedule of one row, with the stages' numbers in the whole pipeline.
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

  std::string name_;
  std::int64_t pp_size_;
  std::int64_t stages_per_rank_;
  std::int64_t n_microbatches_;
  std::int64_t most_in_row_;  // actions of one rank
  Write write_;
};

// Forwards only, of stages in any placement: every rank has its own in the order of stages, then
// microbatches, which cannot deadlock. `stage_to_rank` has the rank of every stage.
Schedule forward_only(const std::vector<std::int64_t>& stage_to_rank, std::int64_t n_microbatches);

}  // namespace hfpp
