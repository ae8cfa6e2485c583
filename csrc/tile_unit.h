// Whether products of bfloat16 run on tiles (csrc/tiles.h): backends/cpu/tiles.py decides, by a trial.
#pragma once

namespace wavlm_fast {

enum class Tiles { none, unit, emulated };

Tiles tiles();

// Whether the CPU has a unit for tiles of bfloat16; that Linux lets this process use it is another question.
bool has_tile_unit();

}  // namespace wavlm_fast
