// Schedule files in Python: read from what has `read`, written rank by rank.
#include <Python.h>

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "action_text.hpp"
#include "bindings.hpp"
#include "schedule_csv.hpp"
#include "schedule_json.hpp"
#include "table.hpp"

namespace hfpp::python {

namespace {

// A binary file of Python. It takes the GIL for as long as a block takes to read.
class PythonFile final : public TextSource {
 public:
  explicit PythonFile(py::object read) : read_(std::move(read)) {}

  std::string_view next() override {
    const py::gil_scoped_acquire held;
    constexpr int kBlock = 1 << 20;
    block_ = read_(kBlock);
    char* data = nullptr;
    Py_ssize_t size = 0;
    if (PyBytes_AsStringAndSize(block_.ptr(), &data, &size) != 0) throw py::error_already_set();
    return {data, static_cast<std::size_t>(size)};
  }

 private:
  py::object read_;
  py::object block_;
};

Schedule csv_schedule(const std::string& name, py::object read) {
  PythonFile file(std::move(read));
  const py::gil_scoped_release release;
  return read_csv(file, name);
}

std::pair<Schedule, std::string> json_schedule(const std::string& name, py::object read) {
  PythonFile file(std::move(read));
  const py::gil_scoped_release release;
  ScheduleFile result = read_json(file, name);
  return {std::move(result.schedule), std::move(result.metadata)};
}

template <std::string (*Write)(const Schedule&, std::int64_t)>
py::bytes written(const Schedule& schedule, py::handle rank_argument) {
  const std::int64_t rank = rank_of(schedule, rank_argument);
  std::string text;
  {
    const py::gil_scoped_release release;
    text = Write(schedule, rank);
  }
  return py::bytes(text);
}

void json_metadata(const std::string& name, const std::string& text) {
  TextInMemory source(text);
  check_metadata(source, name);
}

Table action_codes(const std::string& text) {
  std::vector<Action> parts;
  parse_action(text, parts);
  Table table = Table::make<std::int64_t>({static_cast<std::int64_t>(parts.size())}, "text");
  for (std::size_t part = 0; part < parts.size(); ++part) {
    table.data<std::int64_t>()[part] = parts[part].code();
  }
  return table;
}

}  // namespace

void bind_files(py::module_& m) {
  m.def("action_codes", &action_codes, py::arg("text"),
        "int64 [parts]: what one column of a schedule file says, packed.");
  m.def("read_csv", &csv_schedule, py::arg("name"), py::arg("read"),
        "A schedule from a file's read method; the name is the file's.");
  m.def("csv_line", &written<&csv_line>, py::arg("schedule"), py::arg("rank"),
        "One rank's line of a CSV, its end included.");
  m.def("read_json", &json_schedule, py::arg("name"), py::arg("read"),
        "A schedule and its metadata as JSON, from a file's read method.");
  m.def("json_row", &written<&json_row>, py::arg("schedule"), py::arg("rank"),
        "One rank's actions as a JSON list.");
  m.def("check_metadata", &json_metadata, py::arg("name"), py::arg("text"),
        "Raises where a text is not what a schedule file can have as its metadata.");
}

}  // namespace hfpp::python
