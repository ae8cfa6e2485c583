// Finds, grants and switches the unit of tiles.
#include "tile_unit.h"

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <string>

#include "check.h"
#include "gated_attention_entry.h"
#include "library.h"
#include "packed_conv_entry.h"

#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace wavlm_fast {
namespace {

std::atomic<Tiles> chosen[2] = {Tiles::none, Tiles::none};  // by TileWork

std::atomic<Tiles>& choice(TileWork work) { return chosen[static_cast<int>(work)]; }

bool kernels_have_tiles() { return packed_conv().on_tiles.direct && gated_attention_has_tiles(); }
#if defined(__linux__) && defined(__x86_64__)
struct Cpuid {
  unsigned a = 0, b = 0, c = 0, d = 0;

  Cpuid(unsigned leaf, unsigned subleaf) { __get_cpuid_count(leaf, subleaf, &a, &b, &c, &d); }
};

// What keeps the unit from being used here, empty when nothing does. Linux has to grant the threads of a process room for
// its registers, for good; it refuses where a thread's stack for signals is too small. An instruction that the CPU or
// Linux does not want would end the process: both are asked.
std::string problem() {
  if (!kernels_have_tiles()) return "the kernels in use have no products on tiles";
  if (!has_tile_unit()) return "the CPU has no AMX BF16";
  const Cpuid palette(0x1d, 1);  // 8 tiles of 16 rows of 64 bytes
  if (palette.b != (8u << 16 | 64u) || (palette.c & 0xffffu) != 16u) return "the CPU has tiles of another size";
  constexpr long kGranted = 0x1022, kRequest = 0x1023, kTileData = 18;  // ARCH_GET_XCOMP_PERM, ARCH_REQ_XCOMP_PERM
  if (syscall(SYS_arch_prctl, kRequest, kTileData) != 0) {
    return std::string("Linux does not grant this process AMX: ") + std::strerror(errno);
  }
  std::uint64_t granted = 0;
  constexpr unsigned kSaves = 1u << 27;  // whether xgetbv exists
  unsigned enabled = 0;
  if (Cpuid(1, 0).c & kSaves) asm("xgetbv" : "=a"(enabled) : "c"(0) : "edx");
  if (syscall(SYS_arch_prctl, kGranted, &granted) != 0 || !(granted >> kTileData & 1) || (enabled >> 17 & 3) != 3) {
    return "Linux grants this process AMX, and has not turned it on";
  }
  return "";
}
#else
std::string problem() { return "tiles are granted by Linux on x86 only"; }
#endif

TileWork work_of(const Text& name) {
  ENTRY_CHECK(name == "products" || name == "attention", "use_tiles: expected products or attention, got ", name);
  return name == "products" ? TileWork::products : TileWork::attention;
}

// For tests, `emulated` and `trapped`: the unit's instructions, which the CPU need not have.
void use_tiles(const Text& work, const Text& kind) {
  std::atomic<Tiles>& own = choice(work_of(work));
  ENTRY_CHECK(kind == "none" || kind == "unit" || kind == "emulated" || kind == "trapped",
              "use_tiles: expected none, unit, emulated or trapped, got ", kind);
  const auto why_not = kind == "unit" ? problem() : "";
  ENTRY_CHECK(why_not.empty(), "use_tiles: ", why_not);
  ENTRY_CHECK(kind == "none" || kernels_have_tiles(), "use_tiles: the kernels in use have no products on tiles");
  own = kind == "none" ? Tiles::none : kind == "emulated" ? Tiles::emulated : Tiles::unit;
}

STABLE_TORCH_LIBRARY_IMPL(wavlm_fast_cpu, CompositeExplicitAutograd, m) {
  m.impl("tiles_problem", TORCH_BOX(&problem));
  m.impl("use_tiles", TORCH_BOX(&use_tiles));
}

}  // namespace

Tiles tiles(TileWork work) { return choice(work).load(std::memory_order_relaxed); }

bool has_tile_unit() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  const unsigned has = Cpuid(7, 0).d;
  return (has & kBf16) && (has & kTile);
#else
  return false;
#endif
}

}  // namespace wavlm_fast
