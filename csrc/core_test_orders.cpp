// Orders of computations, and what lowering adds to them.
#include <algorithm>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "core_test.hpp"
#include "dataflow.hpp"
#include "lowering.hpp"
#include "orders.hpp"
#include "resident_stages.hpp"
#include "verify.hpp"

namespace hfpp::test {

namespace {

// "0F0 0B0", overlapped parts joined by ";".
std::string row_text(const Schedule& schedule, std::int64_t rank) {
  std::string text;
  for (const Action* action = schedule.begin(rank); action != schedule.end(rank); ++action) {
    if (!text.empty()) text += action->joined() ? ";" : " ";
    text += text_of(*action);
  }
  return text;
}

// How often each computation comes, over all ranks.
std::map<std::string, int> computations(const Schedule& schedule) {
  std::map<std::string, int> counts;
  for (std::int64_t rank = 0; rank < schedule.pp_size(); ++rank) {
    for (const Action* action = schedule.begin(rank); action != schedule.end(rank); ++action) {
      if (is_compute(action->kind())) ++counts[text_of(*action)];
    }
  }
  return counts;
}

}  // namespace

void test_orders() {
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
      const Schedule all = order.all_ranks();
      check(all.num_stages() == pp * one.per_rank && all.n_microbatches() == n, one.name);
      for (const auto& [text, count] : computations(all)) check(count == 1, text);
      for (std::int64_t rank = 0; rank < pp; ++rank) {
        check(row_text(order.one_rank(rank), 0) == row_text(all, rank), "a rank alone");
      }
      for (const bool ordered : {false, true}) {
        const Schedule lowered = hfpp::lowered(all, {true, true, true, true, true, ordered});
        check(computations(lowered) == computations(all), "lowering keeps computations");
        std::int64_t sends = 0;
        std::int64_t receives = 0;
        std::int64_t waits = 0;
        for (std::int64_t rank = 0; rank < pp; ++rank) {
          for (const Action* action = lowered.begin(rank); action != lowered.end(rank); ++action) {
            sends += is_send(action->kind()) ? 1 : 0;
            receives += is_receive(action->kind()) ? 1 : 0;
            waits += is_send_wait(action->kind()) ? 1 : 0;
          }
        }
        check(sends == receives && sends == waits, "each send has a receive and a wait");
        check((sends > 0) == (pp > 1), "neighbours exchange messages");
      }
    }
  }
  check(row_text(Order("1F1B", 2, 1, 2).all_ranks(), 0) == "0F0 0F1 0B0 0B1", "1F1B");
  for (std::int64_t limit = 6; limit <= 11; ++limit) {
    const Schedule all = Order("VLimited", 5, 2, 9, limit).all_ranks();
    check(computations(all) == computations(Order("VMin", 5, 2, 9).all_ranks()), all.name());
    const std::vector<std::int64_t> peaks = verify(all, limit);
    check(*std::max_element(peaks.begin(), peaks.end()) <= limit, "the limit is kept");
  }
  check_throws<ConfigError>([] { Order("VLimited", 5, 2, 9, 5); }, "at least 6");
  check_throws<ConfigError>([] { Order("VHalf", 5, 2, 9, 9); }, "is for VLimited");
  check_throws<ConfigError>([] { Order("1F2B", 2, 1, 2); }, "'1F2B'");
  check_throws<ConfigError>([] { Order("1F1B", 2, 2, 2); }, "stages_per_rank (2)");
  check_throws<ConfigError>([] { Order("1F1B", 2, 1, 2).one_rank(2); }, "rank (2)");
  check_throws<std::overflow_error>([] { Order("GPipe", 100000, 1, 100000).all_ranks(); },
                                    "20000000000 actions");
  check_throws<ConfigError>([] { forward_only({0, 2}, 1); }, "rank (2)");
  check_throws<ConfigError>([] { forward_only({0, std::numeric_limits<std::int64_t>::max()}, 1); },
                            "rank (9223372036854775807)");
  check(row_text(forward_only({0, 1, 0}, 1), 0) == "0F0 2F0", "forwards of any placement");
}

void test_lowering() {
  Schedule table("planted");
  table.add({Kind::Forward, 0, 0});
  table.add({Kind::FullBackward, 0, 0});
  table.add({Kind::Forward, 0, 1});
  table.add({Kind::FullBackward, 0, 1});
  table.end_row();
  check(row_text(lowered(table, {}), 0) == "0UNSHARD 0F0 0B0 0F1 0B1 0REDUCE_GRAD 0RESHARD",
        "what FSDP needs");
  table.add({Kind::Forward, 1, 1});
  table.add({Kind::FullBackward, 1, 1});
  table.add({Kind::Forward, 1, 0});
  table.add({Kind::FullBackward, 1, 0});
  table.end_row();
  check_throws<ConfigError>([&] { lowered(table, {}); }, "deadlocks: rank 0, column 1, action 0B0");
  Schedule group("group");
  for (std::int64_t stage = 0; stage < 4; ++stage) {
    group.add({Kind::Forward, stage, 0, stage > 0});
  }
  group.end_row();
  check_throws<ConfigError>([&] { lowered(group, {}); }, "more than 3 stages");
  Schedule far("far");
  far.add({Kind::Forward, 0, Action::kMaxIndex});
  far.end_row();
  check_throws<ConfigError>([&] { lowered(far, {}); }, "incomplete");

  // CPython: list({6, 14}) is [6, 14], list({7, 15}) is [15, 7].
  for (const auto& [first, second, order] :
       {std::tuple<std::int64_t, std::int64_t, std::vector<std::int64_t>>{6, 14, {6, 14}},
        {7, 15, {15, 7}}}) {
    PythonSet set;
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

}  // namespace hfpp::test
