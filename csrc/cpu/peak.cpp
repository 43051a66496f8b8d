#include "cpu/peak.h"

#include <stdexcept>
#include <vector>

#include "cpu/host.h"
#include "cpu/simd/peak.h"

namespace pymm {

double peak_operations(const std::string& dtype, int64_t steps) {
  const Peak& loops = peak();
  const auto loop = dtype == "float32"    ? loops.f32
                    : dtype == "float64"  ? loops.f64
                    : dtype == "bfloat16" ? loops.bf16
                    : dtype == "float16"  ? loops.f16
                                          : nullptr;
  if (!loop) {
    throw std::invalid_argument("peak_operations: dtype must be float32, float64, bfloat16 or float16, got '" + dtype +
                                "'");
  }
  if (steps < 1) {
    throw std::invalid_argument("peak_operations: steps must be positive, got " + std::to_string(steps));
  }
  std::vector<double> done(static_cast<size_t>(thread_count()));
  parallel_tasks(thread_count(), [&](int64_t i) { done[static_cast<size_t>(i)] = loop(steps); });
  double sum = 0;
  for (const double operations : done) sum += operations;
  return sum;
}

}  // namespace pymm
