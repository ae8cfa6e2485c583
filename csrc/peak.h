// What peak.cpp asks of peak_kernel.cpp, per level: loops of nothing but multiply-adds on registers.
#pragma once

#include <cstdint>

namespace wavlm_fast {

// Makes `rounds` rounds; the result only says that they were made.
using PeakLoop = float(std::int64_t rounds);

struct PeakKernels {
  PeakLoop* of_float;
  double float_operations;  // per round
  PeakLoop* of_bf16;        // null where the level has no dot product of bfloat16
  double bf16_operations;
};

}  // namespace wavlm_fast
