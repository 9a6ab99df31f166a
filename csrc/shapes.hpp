// What crosses the boundaries between stages: shapes, dtypes and bytes, for all stages at once.
#pragma once

#include <array>
#include <cstdint>

#include "table.hpp"

namespace hfpp {

// The codes are stable: tables may be stored.
enum class DType : std::int8_t {
  Bool = 0,
  UInt8 = 1,
  Int8 = 2,
  Int16 = 3,
  Int32 = 4,
  Int64 = 5,
  Float16 = 6,
  BFloat16 = 7,
  Float32 = 8,
  Float64 = 9,
};

struct DTypeInfo {
  DType code;
  const char* name;  // as torch spells it
  std::int64_t bytes;
};

inline constexpr std::array<DTypeInfo, 10> kDTypes{{{DType::Bool, "bool", 1},
                                                    {DType::UInt8, "uint8", 1},
                                                    {DType::Int8, "int8", 1},
                                                    {DType::Int16, "int16", 2},
                                                    {DType::Int32, "int32", 4},
                                                    {DType::Int64, "int64", 8},
                                                    {DType::Float16, "float16", 2},
                                                    {DType::BFloat16, "bfloat16", 2},
                                                    {DType::Float32, "float32", 4},
                                                    {DType::Float64, "float64", 8}}};

inline std::int64_t bytes_of(DType dtype) {
  return kDTypes.at(static_cast<std::size_t>(dtype)).bytes;
}

struct BoundarySizes {
  std::int64_t num_stages;
  std::int64_t microbatch_size;
  std::int64_t seq_len;
  std::int64_t hidden_size;
  std::int64_t vocab_size;  // used where has_head
  bool has_head;            // the last stage gives logits, not hidden states
  DType dtype;              // of hidden states and logits; token ids are int64
};

struct BoundaryTables {
  Table shapes;  // int64 [num_stages, 2, 3]: (input, output), 0 where the tensor has no such axis
  Table dtypes;  // int8 [num_stages, 2]: codes of DType
  Table bytes;   // int64 [num_stages + 1]: entry s enters stage s, the last leaves the last stage
};

BoundaryTables boundary_tables(const BoundarySizes& sizes);

}  // namespace hfpp
