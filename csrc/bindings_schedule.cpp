// Schedules in Python: rows of packed actions.
#include <algorithm>
#include <string>
#include <utility>

#include "bindings.hpp"
#include "schedule.hpp"
#include "table.hpp"
#include "verify.hpp"

namespace hfpp::python {

namespace {

// Rows of packed actions, as `codes` gives them.
Schedule of_codes(std::string name, const py::sequence& rows) {
  Schedule schedule(std::move(name));
  for (const py::handle row : rows) {
    bool first = true;
    for (const py::handle code : py::iter(row)) {
      const Action action = Action::of_code(integer(code, "code"));
      if (first && action.joined()) {
        throw ConfigError("a row begins with an action that is joined to the one before it.");
      }
      first = false;
      schedule.add(action);
    }
    schedule.end_row();
  }
  return schedule;
}

void require_rank(const Schedule& schedule, std::int64_t rank) {
  if (rank >= 0 && rank < schedule.pp_size()) return;
  throw py::index_error(named("rank", rank) + " must be in [0, " +
                        std::to_string(schedule.pp_size()) + ").");
}

Table codes(const Schedule& schedule, py::handle rank_argument) {
  const std::int64_t rank = integer(rank_argument, "rank");
  require_rank(schedule, rank);
  Table table = Table::make<std::int64_t>({schedule.size(rank)}, "the actions of a rank");
  std::transform(schedule.begin(rank), schedule.end(rank), table.data<std::int64_t>(),
                 [](Action action) { return action.code(); });
  return table;
}

Table stage_to_rank(const Schedule& schedule) {
  const py::gil_scoped_release release;
  const std::vector<std::int32_t> ranks = schedule.stage_to_rank();
  Table table =
      Table::make<std::int32_t>({static_cast<std::int64_t>(ranks.size())}, "the stages of a table");
  std::copy(ranks.begin(), ranks.end(), table.data<std::int32_t>());
  return table;
}

const char* placement(const Schedule& schedule) {
  const py::gil_scoped_release release;
  return placement_of(schedule, schedule.stage_to_rank()) == Placement::Loop ? "loop" : "v";
}

}  // namespace

void bind_schedule(py::module_& m) {
  py::class_<Schedule>(m, "Schedule", py::is_final(),
                       "The actions of all ranks of a pipeline, packed; never changed once made.")
      .def_static("of_codes", &of_codes, py::arg("name"), py::arg("rows"),
                  "A schedule from rows of packed actions.")
      .def_property_readonly("name", &Schedule::name, "How messages call the schedule.")
      .def_property_readonly("pp_size", &Schedule::pp_size, "The number of ranks.")
      .def_property_readonly("num_stages", &Schedule::num_stages,
                             "One more than the highest stage that computes.")
      .def_property_readonly("n_microbatches", &Schedule::n_microbatches,
                             "One more than the highest microbatch.")
      .def_property_readonly("num_actions", &Schedule::num_actions, "The actions of all ranks.")
      .def_property_readonly("nbytes", &Schedule::bytes, "The bytes of all rows.")
      .def_property_readonly("has_communication", &Schedule::has_communication,
                             "Whether any action is neither a computation nor idle.")
      .def("codes", &codes, py::arg("rank"), "int64 [actions]: the packed actions of one rank.")
      .def("stage_to_rank", &stage_to_rank, "int32 [num_stages]: the rank of every stage.")
      .def("placement", &placement, "'loop' or 'v': how the stages lie on the ranks.");
}

}  // namespace hfpp::python
