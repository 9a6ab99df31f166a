// What the files of core_test share: checks, and tables to check.
#pragma once

#include <functional>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "schedule.hpp"

namespace hfpp::test {

// Ends the process where it does not hold.
void check(bool holds, const std::string& what);

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

using Row = std::vector<Action>;

Schedule csv_of(std::string_view text);

// A table of two microbatches with up to three mistakes, or none.
Schedule odd_schedule(std::mt19937& chance);

void test_table();
void test_placement();
void test_partition();
void test_balance();
void test_shapes();
void test_schedule_files();
void test_verify();
void test_verify_anything();
void test_orders();
void test_lowering();
void test_simulate();
void test_simulate_anything();

}  // namespace hfpp::test
