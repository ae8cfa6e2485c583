// Stands in for the AMX unit of a CPU that has none: each of its instructions ends in SIGILL there, is decoded from the
// bytes that the assembler made, checked, and done as Intel's manual has it (Software Developer's Manual, volume 2).
#include <ucontext.h>

#include <atomic>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace {

// As LDTILECFG reads it.
struct Config {
  std::uint8_t palette, start_row, reserved[14];
  std::uint16_t row_bytes[16];
  std::uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

thread_local Config config;
thread_local std::uint8_t tiles[8][16][64];
std::atomic<int> configurations, threads;  // times that tiles got a shape, and threads whose tiles have one
struct sigaction before;

// What would be a fault of the processor.
void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "amx_unit: %s\n", what);
  std::abort();
}

float flushed(float value) { return std::fpclassify(value) == FP_SUBNORMAL ? value * 0.0f : value; }

float number(const std::uint8_t* at) {
  float value;
  std::memcpy(&value, at, 4);
  return flushed(value);
}

float half_of(const std::uint8_t* at) {
  const std::uint8_t bytes[] = {0, 0, at[0], at[1]};
  return number(bytes);
}

// An instruction of three-byte VEX, map 0F38, with what its operands are.
struct Instruction {
  int opcode, prefix, reg, rm, second;
  bool in_memory;
  std::int64_t base = 0, index = 0;
  const std::uint8_t* next;

  Instruction(const std::uint8_t* at, const greg_t* registers) {
    constexpr int kOrder[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                              REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    expect(at[0] == 0xc4 && (at[1] & 31) == 2 && (at[2] & 0x84) == 0, "not an instruction of tiles");
    const auto extended = [&](int low, int bit) { return (low & 7) | (at[1] & bit ? 0 : 8); };
    prefix = at[2] & 3, second = ~(at[2] >> 3) & 15, opcode = at[3];
    const int mod = at[4] >> 6;
    reg = extended(at[4] >> 3, 0x80), rm = extended(at[4], 0x20);
    next = at + 5, in_memory = mod != 3;
    if (!in_memory) return;
    const auto displacement = [&] {
      std::int32_t value;
      std::memcpy(&value, next, 4);
      next += 4;
      return value;
    };
    const bool has_sib = (rm & 7) == 4;
    int from = rm;
    if (has_sib) {
      const int sib = *next++, number = extended(sib >> 3, 0x40);
      if (number != 4) index = registers[kOrder[number]] << (sib >> 6);
      from = extended(sib, 0x20);
    }
    if (mod == 0 && (from & 7) == 5) {
      base = displacement();
      if (!has_sib) base += reinterpret_cast<std::int64_t>(next);
    } else {
      base = registers[kOrder[from]] + (mod == 1 ? static_cast<std::int8_t>(*next++) : mod == 2 ? displacement() : 0);
    }
  }
};

void check_tile(int tile) {
  expect(tile < 8 && config.palette == 1 && config.rows[tile] > 0, "a tile without a shape");
  expect(config.row_bytes[tile] % 4 == 0, "rows of a part of a word");
}

void configure(const void* from) {
  ++configurations;
  if (config.palette == 0) ++threads;
  std::memcpy(&config, from, sizeof(config));
  expect(config.palette == 1 && config.start_row == 0, "another palette, or a start row");
  for (int byte : config.reserved) expect(byte == 0, "reserved bytes of the configuration");
  for (int i = 0; i < 16; ++i) {
    const int rows = config.rows[i], bytes = config.row_bytes[i];
    expect(rows <= 16 && bytes <= 64 && !rows == !bytes && (i < 8 || !rows), "the shape of a tile");
  }
  std::memset(tiles, 0, sizeof(tiles));
}

void multiply_add(int sum, int row, int column) {
  for (int tile : {sum, row, column}) check_tile(tile);
  expect(sum != row && sum != column && row != column, "a tile twice");
  const int words = config.row_bytes[row] / 4, columns = config.row_bytes[sum] / 4;
  expect(config.rows[row] == config.rows[sum] && config.rows[column] == words, "rows that do not fit");
  expect(config.row_bytes[column] == config.row_bytes[sum], "columns that do not fit");
  for (int r = 0; r < config.rows[sum]; ++r) {
    for (int n = 0; n < columns; ++n) {
      float apart[2] = {};
      for (int k = 0; k < words; ++k) {
        for (int i = 0; i < 2; ++i) {
          const float a = half_of(tiles[row][r] + 4 * k + 2 * i), b = half_of(tiles[column][k] + 4 * n + 2 * i);
          apart[i] = flushed(std::fma(a, b, apart[i]));
        }
      }
      std::uint8_t* to = tiles[sum][r] + 4 * n;
      const float value = flushed(number(to) + flushed(apart[0] + apart[1]));
      std::memcpy(to, &value, 4);
    }
  }
}

void move(const Instruction& found, bool load) {
  check_tile(found.reg);
  if (load) std::memset(tiles[found.reg], 0, sizeof(tiles[found.reg]));
  for (int r = 0; r < config.rows[found.reg]; ++r) {
    auto* memory = reinterpret_cast<std::uint8_t*>(found.base + r * found.index);
    auto* tile = tiles[found.reg][r];
    std::memcpy(load ? tile : memory, load ? memory : tile, config.row_bytes[found.reg]);
  }
}

void run(int, siginfo_t*, void* context) {
  auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const Instruction found(reinterpret_cast<const std::uint8_t*>(registers[REG_RIP]), registers);
  const int kind = found.opcode << 4 | found.prefix << 1 | found.in_memory;
  switch (kind) {
    case 0x491:
      configure(reinterpret_cast<const void*>(found.base));
      break;
    case 0x490:  // TILERELEASE
      if (config.palette != 0) --threads;
      config = {};
      break;
    case 0x496:
      check_tile(found.reg);
      std::memset(tiles[found.reg], 0, sizeof(tiles[found.reg]));
      break;
    case 0x4b7:
      move(found, true);
      break;
    case 0x4b5:
      move(found, false);
      break;
    case 0x5c4:
      multiply_add(found.reg, found.rm, found.second);
      break;
    default:
      expect(false, "another instruction");
  }
  registers[REG_RIP] = reinterpret_cast<greg_t>(found.next);
}

}  // namespace

extern "C" void start() {
  struct sigaction action = {};
  action.sa_sigaction = run, action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, &before);
}

extern "C" void stop() { sigaction(SIGILL, &before, nullptr); }

// Whether all threads have released their tiles.
extern "C" bool released() { return threads == 0; }

extern "C" int configured() { return configurations; }
