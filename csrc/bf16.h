// bfloat16 as entries hand it to kernels: the bits, without torch's headers.
#pragma once

#include <cstdint>

namespace wavlm_fast {

struct bf16 {
  std::uint16_t bits;
};

}  // namespace wavlm_fast
