// How a kernels_*.cpp turns one instruction set on for the text that follows, on the compilers we know.
#pragma once

#if defined(__clang__)
#define LOQUETIER_PRAGMA(text) _Pragma(#text)
#define LOQUETIER_BEGIN_TARGET(features) \
  LOQUETIER_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define LOQUETIER_END_TARGET _Pragma("clang attribute pop")
#else
#define LOQUETIER_PRAGMA(text) _Pragma(#text)
#define LOQUETIER_BEGIN_TARGET(features) LOQUETIER_PRAGMA(GCC push_options) LOQUETIER_PRAGMA(GCC target(features))
#define LOQUETIER_END_TARGET LOQUETIER_PRAGMA(GCC pop_options)
#endif

#define LOQUETIER_LAMBDA __attribute__((always_inline))
