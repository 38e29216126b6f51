// Building error messages, and checking arguments: `require(rows > 0, "[linear] x: expected rows > 0, got ", rows)`.
#pragma once

#include <sstream>
#include <string>
#include <utility>

#include "loquetier/error.h"

namespace loquetier {

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// Throws E with the concatenated parts when `ok` is false. The message is built only then.
template <class E = InvalidArgument, class... Parts>
void require(bool ok, const Parts&... parts) {
  if (!ok) [[unlikely]]
    throw E(concat(parts...));
}

}  // namespace loquetier
