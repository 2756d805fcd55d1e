// Which instruction set the kernels use: read from the machine, never assumed.
#pragma once

#include <string>
#include <vector>

namespace qoq {

// Slowest first. Each level's kernels are compiled with that level's flags and no others. `tiles` is
// the code of amx with its tile registers imitated: slow, and there for tests on other machines.
enum class Isa { portable, avx2, avxvnni, avx512vnni, amx, tiles };

const char* isa_name(Isa isa);

// Levels that this build has and this processor *and* operating system let us run, slowest first.
// Asks for tile registers where there are some; the process then keeps them.
std::vector<Isa> usable_isas();

// The level named by `name` ("" = the fastest usable). Throws std::invalid_argument with the usable
// names if it is unknown or cannot run here.
Isa choose_isa(const std::string& name);

}  // namespace qoq
