// When each action of a schedule runs, and what its rank holds meanwhile.
//
// Every rank runs its row in order, each action as soon as the rank is free and what it takes is
// there. Every time is the largest of some earlier times plus one duration, so that the result does
// not depend on the order in which ranks are visited, and is exact where durations are integers.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "schedule.hpp"
#include "transfers.hpp"

namespace hfpp {

// What the actions cost: by stage, and by the boundary after a stage (one fewer).
struct ActionCosts {
  std::vector<double> forward;  // seconds
  std::vector<double> backward;
  std::vector<double> backward_input;
  std::vector<double> backward_weight;
  std::vector<std::int64_t> activation_bytes;  // kept from the forward to B or I
  std::vector<std::int64_t> weight_bytes;      // kept from I to W
  TransferCosts transfers;
  // What an overlapped group saves of its parts' time: this share of all but the longest part.
  double overlap_gain = 0;

  // Throws unless there is one entry per stage and boundary, none negative, all finite, and so are
  // all sums of times.
  void check(const Schedule& schedule) const;
};

// What one rank does. Its seconds are those of its computations and the parts of its idle time.
struct RankReport {
  double busy = 0;
  double start = 0;        // before its first computation
  double activations = 0;  // between two: what it takes is not made yet
  double gradients = 0;
  double communication = 0;  // made, but not here yet; or the rank itself sends or receives
  double end = 0;            // after its last computation
  Span own{0, 0};            // from its first computation to its last
  std::int64_t peak_live = 0;
  std::int64_t peak_activation_bytes = 0;
  std::int64_t peak_receive_buffers = 0;
  std::int64_t peak_receive_bytes = 0;
  std::int64_t sent_bytes = 0;
  std::int64_t received_bytes = 0;

  double idle() const { return start + activations + gradients + communication + end; }
};

class Simulation {
 public:
  // Runs the schedule, which has to live as long as this does. Throws where it cannot run.
  Simulation(const Schedule& schedule, const ActionCosts& costs);

  double step_time() const { return step_time_; }
  // All ranks' idle time over all ranks' time.
  double idle_share() const;
  const Schedule& schedule() const { return schedule_; }
  const RankReport& report(std::int64_t rank) const {
    return reports_[static_cast<std::size_t>(rank)];
  }
  // One span per action of the rank's row.
  const Span* spans(std::int64_t rank) const {
    return spans_.get() + (schedule_.begin(rank) - schedule_.begin(0));
  }

  // What leaves for another rank when a computation of that rank is done.
  struct Sent {
    Action action;  // the computation
    Route route;
    Span span;
  };
  // What one rank sends, in the order of its computations.
  std::vector<Sent> sent_by(std::int64_t rank) const;

 private:
  friend class SimulationRun;
  void count_receive_buffers(const TransferCosts& costs);

  const Schedule& schedule_;
  Transfers transfers_;
  std::unique_ptr<Span[]> spans_;  // written once, when each action has run
  std::vector<RankReport> reports_;
  double step_time_ = 0;
};

}  // namespace hfpp
