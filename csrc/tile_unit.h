// Whether products of bfloat16 run on tiles (csrc/tiles.h): backends/cpu/tiles.py decides, by a trial of each kind of work.
#pragma once

namespace wavlm_fast {

enum class Tiles { none, unit, emulated };

// What is decided apart.
enum class TileWork { products, attention };

Tiles tiles(TileWork work);

// Whether the CPU has a unit for tiles of bfloat16; that Linux lets this process use it is another question.
bool has_tile_unit();

}  // namespace wavlm_fast
