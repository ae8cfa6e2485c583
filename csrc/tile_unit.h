// Whether products of bfloat16 run on tiles (csrc/tiles.h): backends/cpu/tiles.py decides, by a trial.
#pragma once

namespace wavlm_fast {

enum class Tiles { none, unit, emulated };

Tiles tiles();

}  // namespace wavlm_fast
