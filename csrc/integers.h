// Arithmetic of entries. Kernels have their own in tile.h: a function shared with them could be kept in the form that
// was compiled for another CPU.
#pragma once

#include <cstdint>

namespace wavlm_fast {

constexpr std::int64_t divided_up(std::int64_t n, std::int64_t by) { return (n + by - 1) / by; }

}  // namespace wavlm_fast
