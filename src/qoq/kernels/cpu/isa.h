// Which instruction set the kernels use: read from the machine, never assumed.
#pragma once

#include <string>
#include <vector>

namespace qoq {

// Slowest first. Each level's kernels are compiled with that level's flags and no others.
enum class Isa { portable, avx2, avxvnni, avx512vnni, amx };

const char* isa_name(Isa isa);

// Levels that this processor *and* operating system let us run, slowest first.
std::vector<Isa> usable_isas();

// The level named by `name` ("" = the fastest usable). Throws std::invalid_argument with the
// usable names if it is unknown or cannot run here.
Isa choose_isa(const std::string& name);

}  // namespace qoq
