// The machine's arithmetic limit, for benchmarks.
#pragma once

#include <cstdint>
#include <string>

namespace pymm {

// Runs `steps` rounds of the register-resident loop of a type on each of torch's threads, in the instruction set in
// use, and returns the operations of all of them; the caller takes the time.
// Throws std::invalid_argument when the type is none of "float32", "float64", "bfloat16", "float16".
double peak_operations(const std::string& dtype, int64_t steps);

}  // namespace pymm
