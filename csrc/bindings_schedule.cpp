// Schedules in Python: rows of packed actions.
#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "lowering.hpp"
#include "orders.hpp"
#include "schedule.hpp"
#include "table.hpp"
#include "verify.hpp"

namespace hfpp::python {

namespace {

// Rows of packed actions, as `codes` gives them.
Schedule of_codes(std::string name, const py::sequence& rows) {
  Schedule schedule(std::move(name));
  for (const py::object row : rows) {
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

Table codes_of_row(const Schedule& schedule, std::int64_t rank) {
  Table table = Table::make<std::int64_t>({schedule.size(rank)}, "the actions of a rank");
  std::transform(schedule.begin(rank), schedule.end(rank), table.data<std::int64_t>(),
                 [](Action action) { return action.code(); });
  return table;
}

Table codes(const Schedule& schedule, py::handle rank_argument) {
  return codes_of_row(schedule, rank_of(schedule, rank_argument));
}

Order order_of(const std::string& name, py::handle pp_size, py::handle stages_per_rank,
               py::handle n_microbatches, py::handle activation_limit) {
  std::optional<std::int64_t> limit;
  if (!activation_limit.is_none()) limit = integer(activation_limit, "activation_limit");
  return {name, integer(pp_size, "pp_size"), integer(stages_per_rank, "stages_per_rank"),
          integer(n_microbatches, "n_microbatches"), limit};
}

Schedule of_order(const std::string& name, py::handle pp_size, py::handle stages_per_rank,
                  py::handle n_microbatches, py::handle activation_limit) {
  const Order order = order_of(name, pp_size, stages_per_rank, n_microbatches, activation_limit);
  const py::gil_scoped_release release;
  return order.all_ranks();
}

Table codes_of_order(const std::string& name, py::handle rank_argument, py::handle pp_size,
                     py::handle stages_per_rank, py::handle n_microbatches,
                     py::handle activation_limit) {
  const Order order = order_of(name, pp_size, stages_per_rank, n_microbatches, activation_limit);
  const std::int64_t rank = integer(rank_argument, "rank");
  const py::gil_scoped_release release;
  return codes_of_row(order.one_rank(rank), 0);
}

Schedule forward_only_of(const py::sequence& stage_to_rank, py::handle n_microbatches_argument) {
  const std::vector<std::int64_t> ranks = integers(stage_to_rank, "stage_to_rank");
  const std::int64_t n_microbatches = integer(n_microbatches_argument, "n_microbatches");
  const py::gil_scoped_release release;
  return forward_only(ranks, n_microbatches);
}

Schedule lowered_by(const Schedule& schedule, bool communication, bool unshard, bool reduce_grad,
                    bool wait_send, bool wait_reduce_grad, bool ordered_reshard) {
  const py::gil_scoped_release release;
  return lowered(schedule, {communication, unshard, reduce_grad, wait_send, wait_reduce_grad,
                            ordered_reshard});
}

Table stage_to_rank(const Schedule& schedule) {
  const py::gil_scoped_release release;
  const std::vector<std::int32_t> ranks = schedule.stage_to_rank();
  Table table =
      Table::make<std::int32_t>({static_cast<std::int64_t>(ranks.size())}, "the stages of a table");
  std::copy(ranks.begin(), ranks.end(), table.data<std::int32_t>());
  return table;
}

const char* placement_name(const Schedule& schedule) {
  const py::gil_scoped_release release;
  return placement_of(schedule, schedule.stage_to_rank()) == Placement::Loop ? "loop" : "v";
}

}  // namespace

std::int64_t rank_of(const Schedule& schedule, py::handle rank_argument) {
  const std::int64_t rank = integer(rank_argument, "rank");
  if (rank < 0 || rank >= schedule.pp_size()) {
    throw py::index_error(named("rank", rank) + " must be in [0, " +
                          std::to_string(schedule.pp_size()) + ").");
  }
  return rank;
}

void bind_schedule(py::module_& m) {
  py::class_<Schedule>(m, "Schedule", py::is_final(),
                       "The actions of all ranks of a pipeline, packed; never changed once made.")
      .def_static("of_codes", &of_codes, py::arg("name"), py::arg("rows"),
                  "A schedule from rows of packed actions.")
      .def_static("of_order", &of_order, py::kw_only(), py::arg("name"), py::arg("pp_size"),
                  py::arg("stages_per_rank"), py::arg("n_microbatches"),
                  py::arg("activation_limit") = py::none(),
                  "The computations of all ranks in the order of a named schedule.")
      .def_static("codes_of_order", &codes_of_order, py::kw_only(), py::arg("name"),
                  py::arg("rank"), py::arg("pp_size"), py::arg("stages_per_rank"),
                  py::arg("n_microbatches"), py::arg("activation_limit") = py::none(),
                  "int64 [actions]: one rank's row of `of_order`, made without the others.")
      .def_static("forward_only", &forward_only_of, py::arg("stage_to_rank"),
                  py::arg("n_microbatches"), "Forwards of stages in any placement.")
      .def("lowered", &lowered_by, py::kw_only(), py::arg("communication") = true,
           py::arg("unshard") = true, py::arg("reduce_grad") = true, py::arg("wait_send") = false,
           py::arg("wait_reduce_grad") = false, py::arg("ordered_reshard") = false,
           "With all that torch runs besides computations.")
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
      .def_property_readonly("kinds", &Schedule::kinds,
                             "The kinds of actions that occur: bit k is set for number k.")
      .def("codes", &codes, py::arg("rank"), "int64 [actions]: the packed actions of one rank.")
      .def("stage_to_rank", &stage_to_rank, "int32 [num_stages]: the rank of every stage.")
      .def("placement", &placement_name, "'loop' or 'v': how the stages lie on the ranks.");
}

}  // namespace hfpp::python
