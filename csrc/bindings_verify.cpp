// The verifier in Python.
#include <algorithm>
#include <optional>
#include <vector>

#include "bindings.hpp"
#include "table.hpp"
#include "verify.hpp"

namespace hfpp::python {

namespace {

Table verify_schedule(const Schedule& schedule, py::handle activation_limit) {
  std::optional<std::int64_t> limit;
  if (!activation_limit.is_none()) limit = integer(activation_limit, "activation_limit");
  const py::gil_scoped_release release;
  const std::vector<std::int64_t> peaks = verify(schedule, limit);
  Table table =
      Table::make<std::int64_t>({static_cast<std::int64_t>(peaks.size())}, "the ranks of a table");
  std::copy(peaks.begin(), peaks.end(), table.data<std::int64_t>());
  return table;
}

}  // namespace

void bind_verify(py::module_& m) {
  m.def("verify", &verify_schedule, py::arg("schedule"), py::kw_only(),
        py::arg("activation_limit") = py::none(),
        "int64 [pp_size]: the most activations of every rank; an error where it cannot run.");
}

}  // namespace hfpp::python
