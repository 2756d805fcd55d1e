// The kernels of every instruction set this machine has, without Python: linear against a plain loop,
// bit for bit, the other ops against the portable kernels.
//
//     check [FASTEST [SEED]]    FASTEST: the instruction set that has to be chosen here, or "any"
#include <stdexcept>

#include "support.h"

namespace {

bool refused(const char* name) {
  try {
    qoq::choose_isa(name);
    return false;
  } catch (const std::invalid_argument&) {
    return true;
  }
}

}  // namespace

int main(int count, char** arguments) {
  using namespace check;
  const std::string fastest = count > 1 ? arguments[1] : "any";
  const uint64_t seed = count > 2 ? std::stoull(arguments[2]) : std::random_device()();
  random_bits().seed(seed);

  const std::vector<qoq::Isa> usable = qoq::usable_isas();
  std::string names;
  for (qoq::Isa isa : usable) names += std::string(" ") + qoq::isa_name(isa);
  std::printf("usable:%s; seed %llu\n", names.c_str(), static_cast<unsigned long long>(seed));
  expect(qoq::choose_isa("") == usable.back(), "the fastest is chosen");
  expect(fastest == "any" || fastest == qoq::isa_name(usable.back()), fastest + " is the fastest");
  for (const char* name : {"avx2", "avxvnni", "avx512vnni", "amx", "neon", "dotprod", "i8mm"}) {
    const bool listed = (names + " ").find(std::string(" ") + name + " ") != std::string::npos;
    expect(refused(name) != listed, std::string(name) + " is refused unless it is usable");
  }

  qoq::Pool alone(1), together(3);
  const Variant portable{qoq::kernels_of(qoq::Isa::portable), alone};
  std::vector<Variant> variants;
  for (qoq::Isa isa : usable)
    for (qoq::Pool* pool : {&alone, &together}) variants.push_back({qoq::kernels_of(isa), *pool});

  const std::vector<uint8_t> memory(1 << 17, 1);
  for (const Variant& variant : variants) {
    expect(variant.kernels.spin_products(128, variant.pool) > 0, variant.name() + " spin_products");
    variant.kernels.read_all(memory.data(), 1 << 17, variant.pool);
  }
  const auto report = [](const char* what) {
    std::printf("%-12s %lld passed in all\n", what, static_cast<long long>(counts().passed));
    std::fflush(stdout);
  };
  linears(variants), report("linear");
  rows(variants, portable), report("rows");
  caches(variants, portable), report("kv_append");
  attentions(variants, portable), report("attention");
  samples(variants, portable), report("sample");
  std::printf("%lld passed, %lld failed\n", static_cast<long long>(counts().passed),
              static_cast<long long>(counts().failed));
  return counts().failed != 0;
}
