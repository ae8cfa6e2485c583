// Grants and switches the products on tiles.
#include "tile_unit.h"

#include <atomic>
#include <cerrno>
#include <cstring>
#include <string>

#include "check.h"
#include "library.h"
#include "packed_conv_entry.h"

#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace wavlm_fast {
namespace {

std::atomic<Tiles> chosen{Tiles::none};

// Why this process cannot use the unit, empty when it can: the kernel has to grant its threads room for the registers.
std::string problem() {
  if (!packed_conv().on_tiles.direct) return "the kernels in use have no products on tiles";
#if defined(__linux__) && defined(__x86_64__)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM and its XFEATURE_XTILEDATA
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx);
  if ((edx & kBf16) == 0 || (edx & kTile) == 0) return "the CPU has no AMX BF16";
  if (syscall(SYS_arch_prctl, kRequest, kTileData) != 0) {
    return std::string("Linux does not grant this process AMX: ") + std::strerror(errno);
  }
  return "";
#else
  return "tiles are granted by Linux on x86 only";
#endif
}

void use_tiles(const Text& kind) {
  ENTRY_CHECK(kind == "none" || kind == "unit" || kind == "emulated",
              "use_tiles: expected none, unit or emulated, got ", kind);
  const auto why_not = kind == "unit" ? problem() : "";
  ENTRY_CHECK(why_not.empty(), "use_tiles: ", why_not);
  ENTRY_CHECK(kind != "emulated" || packed_conv().on_emulated_tiles.direct,
              "use_tiles: the kernels in use have no products on tiles");
  chosen = kind == "unit" ? Tiles::unit : kind == "emulated" ? Tiles::emulated : Tiles::none;
}

STABLE_TORCH_LIBRARY_IMPL(wavlm_fast_cpu, CompositeExplicitAutograd, m) {
  m.impl("tiles_problem", TORCH_BOX(&problem));
  m.impl("use_tiles", TORCH_BOX(&use_tiles));
}

}  // namespace

Tiles tiles() { return chosen.load(std::memory_order_relaxed); }

}  // namespace wavlm_fast
