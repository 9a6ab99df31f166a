// The state of a run through the rows of a schedule.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "rank_ledger.hpp"
#include "simulate.hpp"

namespace hfpp {

class SimulationRun {
 public:
  SimulationRun(Simulation& result, const ActionCosts& costs);

  // Runs every row to its end. Throws where one cannot get there.
  void run();

 private:
  static constexpr std::size_t kNothing = static_cast<std::size_t>(-1);

  struct Row {
    const Action* next = nullptr;
    const Action* end = nullptr;
    std::size_t waits_for = kNothing;  // a message
    RankLedger ledger;
  };

  // Inline: most are called in one place, which the compiler does not see of functions that other
  // files might call. Together they are a quarter faster.
  // Each runs an action or a group of the row; false where it has to wait for a message.
  inline bool step(Row& row);
  inline bool compute(Row& row, const Action* first, const Action* last);
  inline bool communicate(Row& row, const Action* action);
  inline void receive(Row& row, const Action* action, const Route& route);
  inline bool wait_for_send(Row& row, const Action* action, const Route& route);

  inline void check_order(const Action* part);
  inline bool find_input(Row& row, const Action* part);
  inline void wait_for_inputs(RankLedger& ledger);
  inline double run_parts(double start, const Action* first, const Action* last);
  inline double seconds_of(Action action) const;
  inline void keep_and_free(RankLedger& ledger, const Action* first, const Action* last);
  inline void hand_over(RankLedger& ledger, Action action);

  inline void send(RankLedger& ledger, const Route& route);
  inline void receive_now(RankLedger& ledger, const Route& route);
  inline void count_received(const Route& route);
  inline void wake(const Route& route);
  inline void wake_known();

  std::uint8_t& done(std::int64_t stage, std::int64_t microbatch) {
    return done_[static_cast<std::size_t>(stage * transfers_.n_microbatches() + microbatch)];
  }
  Span& span(const Action* action) {
    return result_.spans_[static_cast<std::size_t>(action - schedule_.begin(0))];
  }
  RankReport& report() { return result_.reports_[static_cast<std::size_t>(rank_)]; }
  // Whether a rank receives a computation's inputs in its own time, just before it.
  bool receives_on_demand() const { return communication_ == Communication::Within; }
  // Whether the times tell how long receive buffers are held, and not the order of the row.
  bool times_tell_buffers() const {
    return communication_ == Communication::Beside && !transfers_.spelled_out();
  }
  void hold_buffer(RankLedger& ledger, const Route& route);

  [[noreturn]] void fail(const Action* action, const std::string& what) const;
  [[noreturn]] void fail_repeated(const Action* part) const;
  std::string stuck() const;

  Simulation& result_;
  const Schedule& schedule_;
  Transfers& transfers_;
  const ActionCosts& costs_;
  const Communication communication_;
  std::int64_t rank_ = 0;  // whose row is being run
  std::vector<Row> rows_;
  std::vector<std::int64_t> ready_;  // ranks that may go on
  std::vector<std::uint8_t> done_;   // by stage and microbatch
  std::vector<Route> inputs_;        // of the computation at hand, from other ranks
  std::vector<std::size_t> known_;   // messages whose span has just become known
};

}  // namespace hfpp
