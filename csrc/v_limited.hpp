// V schedules that hold no more activations than they may: the best order that a search finds.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "v_row.hpp"

namespace hfpp {

// What a rank of a v computes of one microbatch: each takes one unit of time here.
constexpr std::array<Part, 6> kVParts = {{{Kind::Forward, 0},
                                          {Kind::Forward, 1},
                                          {Kind::BackwardInput, 1},
                                          {Kind::BackwardInput, 0},
                                          {Kind::BackwardWeight, 1},
                                          {Kind::BackwardWeight, 0}}};

// By rank: indices of `kVParts`, in the order in which the rank computes.
using VOrder = std::vector<std::vector<std::uint8_t>>;

// The most stage activations that V-Min, V-Half and ZB-V hold on any rank.
std::int64_t v_min_activations(std::int64_t pp_size, std::int64_t n_microbatches);
std::int64_t v_half_activations(std::int64_t pp_size, std::int64_t n_microbatches);
std::int64_t zb_v_activations(std::int64_t pp_size, std::int64_t n_microbatches);

// Whether a search among these sizes ends within a second or two.
bool can_search_v(std::int64_t pp_size, std::int64_t n_microbatches);

// Units that every rank idles from the first computation of any to the last.
std::int64_t idle_units(const VOrder& order, std::int64_t n_microbatches);

// The order with least idle time that is found under any limit from V-Min's to `activation_limit`,
// so that a larger limit never idles more. Empty where none idles less than `idle_to_beat`.
//
// Orders come from list scheduling: unit by unit each rank computes the first of its parts, by some
// rule of precedence, that has its input and its memory. Many rules are tried.
VOrder search_v_order(std::int64_t pp_size, std::int64_t n_microbatches,
                      std::int64_t activation_limit, std::int64_t idle_to_beat);

}  // namespace hfpp
