#include "isa.h"

#include <algorithm>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace qoq {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avxvnni", "avx512vnni", "amx", "tiles"};

#if defined(__x86_64__)

struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);
  return r;
}

bool has(unsigned reg, unsigned bit) { return (reg >> bit) & 1; }

// Register state the operating system saves on a context switch (XCR0).
unsigned long long saved_state() {
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<unsigned long long>(high) << 32) | low;
}

#ifdef QOQ_EMULATE_AMX
extern "C" bool qoq_emulate_amx();  // tests/amx/emulator.cpp
bool has_tiles(unsigned long long, const Registers&) { return qoq_emulate_amx(); }
#else
// Linux grants tile registers to a process that asks; other systems are not asked.
bool tiles_granted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has_tiles(unsigned long long saved, const Registers& seven) {
  const bool known = (saved & 0x60000) == 0x60000 && has(seven.d, 24) && has(seven.d, 25);
  return known && tiles_granted();
}
#endif

#endif

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

std::vector<Isa> usable_isas() {
  std::vector<Isa> found{Isa::portable};
#if defined(__x86_64__)
  const Registers one = cpuid(1, 0);
  if (!has(one.c, 27)) return found;  // OSXSAVE: without it xgetbv itself is illegal
  const unsigned long long saved = saved_state();
  const Registers seven = cpuid(7, 0), more = cpuid(7, 1);
  const bool ymm = (saved & 0x6) == 0x6;
  // With FMA, F16C, BMI, BMI2.
  const bool avx2 = ymm && has(seven.b, 5) && has(one.c, 12) && has(one.c, 29) && has(seven.b, 3) &&
                    has(seven.b, 8);
  if (!avx2) return found;
#ifdef QOQ_HAS_avx2
  found.push_back(Isa::avx2);
#endif
#ifdef QOQ_HAS_avxvnni
  if (has(more.a, 4)) found.push_back(Isa::avxvnni);
#endif
  const bool zmm = (saved & 0xe6) == 0xe6;
  // F, DQ, BW, VL, VNNI
  const bool avx512 = zmm && has(seven.b, 16) && has(seven.b, 17) && has(seven.b, 30) &&
                      has(seven.b, 31) && has(seven.c, 11);
  if (!avx512) return found;
#ifdef QOQ_HAS_avx512vnni
  found.push_back(Isa::avx512vnni);
#endif
#ifdef QOQ_HAS_amx
  if (has_tiles(saved, seven)) found.push_back(Isa::amx);
#endif
#endif
  return found;
}

Isa choose_isa(const std::string& name) {
  const std::vector<Isa> usable = usable_isas();
  if (name.empty()) return usable.back();
  if (name == isa_name(Isa::tiles)) return Isa::tiles;
  std::string names;
  for (Isa isa : usable) {
    if (name == isa_name(isa)) return isa;
    names += std::string(names.empty() ? "" : ", ") + isa_name(isa);
  }
  throw std::invalid_argument("QOQ_ISA=" + name + " cannot run on this machine; use one of " +
                              names + ", or leave it unset.");
}

}  // namespace qoq
