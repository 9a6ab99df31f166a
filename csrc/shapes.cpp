// Fills the shape tables of all stages.
#include "shapes.hpp"

#include <algorithm>

namespace hfpp {

BoundaryTables boundary_tables(const BoundarySizes& sizes) {
  require_at_least("num_stages", sizes.num_stages, 1);
  require_at_least("microbatch_size", sizes.microbatch_size, 1);
  require_at_least("seq_len", sizes.seq_len, 1);
  require_at_least("hidden_size", sizes.hidden_size, 1);
  if (sizes.has_head) require_at_least("vocab_size", sizes.vocab_size, 1);

  const std::int64_t n = sizes.num_stages;
  const std::int64_t last_size = sizes.has_head ? sizes.vocab_size : sizes.hidden_size;
  const std::int64_t tokens =
      checked_multiply(sizes.microbatch_size, sizes.seq_len, "microbatch_size * seq_len");
  const std::int64_t token_bytes =
      checked_multiply(tokens, bytes_of(sizes.dtype), "microbatch_size * seq_len * bytes of dtype");
  const std::int64_t ids_bytes = checked_multiply(tokens, bytes_of(DType::Int64),
                                                  "microbatch_size * seq_len * bytes of int64");
  const std::int64_t hidden_bytes = checked_multiply(
      token_bytes, sizes.hidden_size, "microbatch_size * seq_len * bytes of dtype * hidden_size");
  const std::int64_t last_bytes =
      checked_multiply(token_bytes, last_size,
                       sizes.has_head ? "microbatch_size * seq_len * bytes of dtype * vocab_size"
                                      : "microbatch_size * seq_len * bytes of dtype * hidden_size");

  BoundaryTables tables{
      Table::make<std::int64_t>({n, 2, 3}, "num_stages"),
      Table::make<std::int8_t>({n, 2}, "num_stages"),
      Table::make<std::int64_t>({checked_add(n, 1, "num_stages")}, "num_stages"),
  };

  std::int64_t* const shapes = tables.shapes.data<std::int64_t>();
  for (std::int64_t side = 0; side < 2 * n; ++side) {
    std::int64_t* const row = shapes + 3 * side;
    row[0] = sizes.microbatch_size;
    row[1] = sizes.seq_len;
    row[2] = sizes.hidden_size;
  }
  shapes[2] = 0;  // token ids are [microbatch, seq]
  shapes[6 * n - 1] = last_size;

  std::int8_t* const dtypes = tables.dtypes.data<std::int8_t>();
  std::fill(dtypes, dtypes + 2 * n, static_cast<std::int8_t>(sizes.dtype));
  dtypes[0] = static_cast<std::int8_t>(DType::Int64);

  std::int64_t* const bytes = tables.bytes.data<std::int64_t>();
  std::fill(bytes, bytes + n, hidden_bytes);
  bytes[0] = ids_bytes;
  bytes[n] = last_bytes;
  return tables;
}

}  // namespace hfpp
