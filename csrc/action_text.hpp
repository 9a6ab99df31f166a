// The spelling of actions in schedule files, which is torch's.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "schedule.hpp"

namespace hfpp {

// No column of a schedule that anyone wrote is nearly as long.
constexpr std::size_t kMaxActionText = 4096;

// Puts what one column says into `parts`: an action such as 3F0 or 1UNSHARD, the parts of a group
// such as (2F4;5B1)OVERLAP_F_B, all but the first joined, or an idle action for a blank.
// Throws where the text is nothing of the kind; the message begins with the text.
void parse_action(std::string_view text, std::vector<Action>& parts);

// Appends the text of a column: an action, or a group whose last part is `last - 1`.
void append_column(std::string& text, const Action* first, const Action* last);

// 'text' in quotes, cut where it is long, what cannot be printed as \x.
std::string quoted(std::string_view text);

}  // namespace hfpp
