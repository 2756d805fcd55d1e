// AMX on processors without it: carries out the tile instructions that the processor refuses.
//
// Built only for tests (make emulate-amx). The processor answers a tile instruction that it does not
// know with SIGILL; the handler here decodes it, does what Intel's manual says it does to tiles that
// each thread has of its own, and goes on behind it. Where hardware would fault because the program
// is wrong (shapes that do not fit, no configuration), it says why and aborts. What is not a tile
// instruction is left to whoever handled SIGILL before.
#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;  // palette 1

struct Tile {
  uint8_t bytes[kRows][kRowBytes];
  int rows, row_bytes;  // both 0: not in use
};

struct Tiles {
  bool configured;
  Tile tile[kTiles];
};

// First touched inside a signal handler, but one that the thread's own instruction called: nothing
// that allocating its memory could disturb is under way.
thread_local Tiles tiles;

// What was carried out, for tests; the last is how many threads have a configuration now.
enum Count { loadconfig, storeconfig, release, zero, load, store, multiply, in_use, kCounts };
std::atomic<int64_t> counts[kCounts];

struct sigaction before;

[[noreturn]] void fail(const uint8_t* at, const char* why) {
  char text[200];
  const int size =
      snprintf(text, sizeof text, "AMX emulator: %s, at %p (%02x %02x %02x %02x %02x)\n", why,
               static_cast<const void*>(at), at[0], at[1], at[2], at[3], at[4]);
  if (write(STDERR_FILENO, text, size) < 0) _exit(134);
  abort();
}

enum Prefix { none, p66, pF3, pF2 };  // as VEX numbers them

struct Instruction {
  const uint8_t* at;
  int length;
  int opcode, prefix, reg, rm, vvvv;
  bool memory, has_sib;
  uint64_t address;  // of memory, without the index
  uint64_t index;    // index register << scale
};

// Registers are numbered as instructions do: rax rcx rdx rbx rsp rbp rsi rdi r8 ... r15.
bool decode(const uint8_t* at, const uint64_t* registers, Instruction& out) {
  if (at[0] != 0xc4 || (at[1] & 0x1f) != 2) return false;  // all are VEX of map 0F 38
  if (at[2] & 0x84) return false;                          // W or L
  out.at = at, out.opcode = at[3], out.prefix = at[2] & 3, out.vvvv = ~at[2] >> 3 & 15;
  if (out.opcode != 0x49 && out.opcode != 0x4b && out.opcode != 0x5e) return false;
  const int r = ~at[1] >> 4 & 8, x = ~at[1] >> 3 & 8, b = ~at[1] >> 2 & 8;
  const int mod = at[4] >> 6, low = at[4] & 7;
  out.reg = (at[4] >> 3 & 7) | r, out.rm = low | b;
  out.memory = mod != 3, out.has_sib = out.memory && low == 4;
  out.address = out.index = 0;
  const uint8_t* next = at + 5;
  bool from_rip = false;
  if (out.memory) {
    int base = out.rm;
    bool has_base = !(mod == 0 && low == 5);
    from_rip = !has_base;
    if (out.has_sib) {
      const int sib = *next++, index = (sib >> 3 & 7) | x;
      if (index != 4) out.index = registers[index] << (sib >> 6);
      base = (sib & 7) | b, has_base = !(mod == 0 && (sib & 7) == 5);
    }
    if (has_base) out.address = registers[base];
    int32_t far = 0;
    if (mod == 1) {
      far = static_cast<int8_t>(*next++);
    } else if (mod == 2 || !has_base) {
      memcpy(&far, next, 4), next += 4;
    }
    out.address += static_cast<int64_t>(far);
  }
  out.length = static_cast<int>(next - at);
  if (from_rip) out.address += reinterpret_cast<uint64_t>(next);
  return true;
}

void load_config(const Instruction& in) {
  uint8_t c[64];
  memcpy(c, reinterpret_cast<const void*>(in.address + in.index), 64);
  if (c[0] > 1) fail(in.at, "ldtilecfg of a palette above 1");
  counts[in_use] -= tiles.configured;
  if (c[0] == 0) {
    tiles = {};
    return;
  }
  Tiles fresh{};
  fresh.configured = true;
  if (c[1]) fail(in.at, "ldtilecfg with a start row, which is not emulated");
  for (int i = 2; i < 64; ++i) {
    const bool used = (i >= 16 && i < 32) || (i >= 48 && i < 56);
    if (!used && c[i]) fail(in.at, "ldtilecfg with reserved bytes that are not 0");
  }
  for (int t = 0; t < kTiles; ++t) {
    Tile& tile = fresh.tile[t];
    tile.row_bytes = c[16 + 2 * t] | c[17 + 2 * t] << 8, tile.rows = c[48 + t];
    if (tile.row_bytes > kRowBytes) fail(in.at, "ldtilecfg with rows of more than 64 bytes");
    if (tile.rows > kRows) fail(in.at, "ldtilecfg with more than 16 rows");
    if (!tile.rows != !tile.row_bytes) fail(in.at, "ldtilecfg with only one of rows and bytes 0");
  }
  tiles = fresh;
  ++counts[in_use];
}

void store_config(const Instruction& in) {
  uint8_t c[64] = {tiles.configured};
  for (int t = 0; t < kTiles; ++t) {
    c[16 + 2 * t] = static_cast<uint8_t>(tiles.tile[t].row_bytes);
    c[48 + t] = static_cast<uint8_t>(tiles.tile[t].rows);
  }
  memcpy(reinterpret_cast<void*>(in.address + in.index), c, 64);
}

Tile& tile_of(const Instruction& in, int number) {
  if (!tiles.configured) fail(in.at, "tiles are used before ldtilecfg");
  if (number >= kTiles) fail(in.at, "there is no such tile register");
  if (!tiles.tile[number].rows) fail(in.at, "a tile without rows is used");
  return tiles.tile[number];
}

void load_tile(const Instruction& in) {
  Tile& tile = tile_of(in, in.reg);
  memset(tile.bytes, 0, sizeof tile.bytes);
  for (int row = 0; row < tile.rows; ++row)
    memcpy(tile.bytes[row], reinterpret_cast<const void*>(in.address + row * in.index),
           tile.row_bytes);
}

void store_tile(const Instruction& in) {
  const Tile& tile = tile_of(in, in.reg);
  for (int row = 0; row < tile.rows; ++row)
    memcpy(reinterpret_cast<void*>(in.address + row * in.index), tile.bytes[row], tile.row_bytes);
}

// c += a x b, in 32 bits that wrap around.
template <class A, class B>
void dot_products(Tile& c, const Tile& a, const Tile& b) {
  for (int m = 0; m < c.rows; ++m) {
    uint32_t sums[kRowBytes / 4];
    memcpy(sums, c.bytes[m], sizeof sums);
    for (int k = 0; k < a.row_bytes / 4; ++k)
      for (int n = 0; n < c.row_bytes / 4; ++n)
        for (int i = 0; i < 4; ++i)
          sums[n] += static_cast<uint32_t>(static_cast<A>(a.bytes[m][4 * k + i]) *
                                           static_cast<B>(b.bytes[k][4 * n + i]));
    memcpy(c.bytes[m], sums, sizeof sums);
  }
}

void multiply_tiles(const Instruction& in) {
  Tile &c = tile_of(in, in.reg), &a = tile_of(in, in.rm), &b = tile_of(in, in.vvvv);
  if (&c == &a || &c == &b || &a == &b) fail(in.at, "a product names a tile twice");
  if (c.row_bytes % 4 || a.row_bytes % 4 || b.row_bytes % 4)
    fail(in.at, "a product of rows that are no whole numbers of 4 bytes");
  if (c.rows != a.rows || c.row_bytes != b.row_bytes || a.row_bytes / 4 != b.rows)
    fail(in.at, "a product of tiles whose shapes do not fit");
  if (in.prefix == pF2) return dot_products<int8_t, int8_t>(c, a, b);
  if (in.prefix == pF3) return dot_products<int8_t, uint8_t>(c, a, b);
  if (in.prefix == p66) return dot_products<uint8_t, int8_t>(c, a, b);
  dot_products<uint8_t, uint8_t>(c, a, b);
}

// Which instruction it is; kCounts if none of ours.
Count kind_of(const Instruction& in) {
  if (in.opcode == 0x5e) return in.memory ? kCounts : multiply;
  if (in.vvvv) return kCounts;
  if (in.opcode == 0x4b) {
    if (!in.has_sib || in.prefix == none) return kCounts;
    return in.prefix == pF3 ? store : load;  // F2, and 66 with a hint that changes nothing
  }
  if (in.memory && in.reg == 0) {
    if (in.prefix == none) return loadconfig;
    if (in.prefix == p66) return storeconfig;
  }
  if (!in.memory && in.rm == 0 && in.reg == 0 && in.prefix == none) return release;
  if (!in.memory && in.rm == 0 && in.prefix == pF2) return zero;
  return kCounts;
}

bool carry_out(const Instruction& in) {
  const Count kind = kind_of(in);
  switch (kind) {
    case loadconfig:
      load_config(in);
      break;
    case storeconfig:
      store_config(in);
      break;
    case release:
      counts[in_use] -= tiles.configured;
      tiles = {};
      break;
    case zero:
      memset(tile_of(in, in.reg).bytes, 0, sizeof(Tile::bytes));
      break;
    case load:
      load_tile(in);
      break;
    case store:
      store_tile(in);
      break;
    case multiply:
      multiply_tiles(in);
      break;
    default:
      return false;
  }
  ++counts[kind];
  return true;
}

void handle(int signal, siginfo_t* info, void* context) {
  constexpr int kOrder[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                              REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                              REG_R12, REG_R13, REG_R14, REG_R15};
  greg_t* saved = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  uint64_t registers[16];
  for (int i = 0; i < 16; ++i) registers[i] = static_cast<uint64_t>(saved[kOrder[i]]);
  Instruction in;
  if (decode(reinterpret_cast<const uint8_t*>(saved[REG_RIP]), registers, in) && carry_out(in)) {
    saved[REG_RIP] += in.length;
    return;
  }
  if (before.sa_flags & SA_SIGINFO) return before.sa_sigaction(signal, info, context);
  if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN)
    return before.sa_handler(signal);
  ::signal(SIGILL, SIG_DFL);  // the instruction runs again, and ends the process
}

}  // namespace

#define QOQ_EXPORT extern "C" __attribute__((visibility("default")))

// From now on tile instructions work in every thread. Called again it takes SIGILL back from whoever
// took it since (Python's faulthandler does).
QOQ_EXPORT bool qoq_emulate_amx() {
  struct sigaction action = {}, found;
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO;
  sigemptyset(&action.sa_mask);
  if (sigaction(SIGILL, &action, &found)) return false;
  if (found.sa_sigaction != handle) before = found;
  return true;
}

QOQ_EXPORT int64_t qoq_amx_count(int of) { return counts[of]; }
