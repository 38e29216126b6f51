// Bodies of the kernels for one instruction set. Included once by each kernels_*.cpp, which has chosen the target and defined
//   LOQUETIER_ISA    the namespace of this copy
//   LOQUETIER_LANES  floats in a vector
//   LOQUETIER_REGS   vector registers
// Written with the compilers' vector extensions, so the same text serves every width. No standard library function is called in
// here: an inline one would be compiled for this instruction set and could be picked by the linker for the whole program.

namespace loquetier::cpu::LOQUETIER_ISA {

constexpr int W = LOQUETIER_LANES;
typedef float Vec __attribute__((vector_size(W * sizeof(float))));
typedef float UnalignedVec __attribute__((vector_size(W * sizeof(float)), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(W * sizeof(int32_t))));

#define LOQUETIER_INLINE inline __attribute__((always_inline))

LOQUETIER_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
LOQUETIER_INLINE void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }
LOQUETIER_INLINE Vec splat(float x) { return x - Vec{}; }
LOQUETIER_INLINE Vec load_first(const float* p, int64_t n) {
  Vec v{};
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
LOQUETIER_INLINE void store_first(float* p, Vec v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}
// A value the compiler knows nothing about.
LOQUETIER_INLINE Vec opaque(Vec v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}
LOQUETIER_INLINE float fold(Vec v) {  // pairs at distance W/2, W/4, …
  float part[W];
  store(part, v);
  for (int width = W / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  return part[0];
}

template <int... I>
struct Lanes {};
template <int N, int... I>
struct MakeLanes : MakeLanes<N - 1, N - 1, I...> {};
template <int... I>
struct MakeLanes<0, I...> {
  using type = Lanes<I...>;
};
using AllLanes = MakeLanes<W>::type;

// a and b hold items of G lanes; the result holds a's then b's items, each folded to G/2 lanes.
template <int G, int... I>
LOQUETIER_INLINE Vec fold_pair(Vec a, Vec b, Lanes<I...>) {
  return __builtin_shufflevector(a, b, (I / (G / 2) * G + I % (G / 2))...) +
         __builtin_shufflevector(a, b, (I / (G / 2) * G + I % (G / 2) + G / 2)...);
}

// Folds N (a power of two <= W) vectors: lane i of the result is the sum of v[i], by the same tree as fold().
template <int N, int G = W>
LOQUETIER_INLINE Vec fold_all(const Vec* v) {
  if constexpr (G == 1) {
    return v[0];
  } else if constexpr (N == 1) {
    const Vec next[1] = {fold_pair<G>(v[0], v[0], AllLanes{})};
    return fold_all<1, G / 2>(next);
  } else {
    Vec next[N / 2];
#pragma GCC unroll 16
    for (int i = 0; i < N / 2; ++i) next[i] = fold_pair<G>(v[2 * i], v[2 * i + 1], AllLanes{});
    return fold_all<N / 2, G / 2>(next);
  }
}

// ---------------------------------------------------------------- dot: both operands contiguous along k

// Columns of a tile share each load of x, rows each load of w: kDotRows * kDotCols sums stay in registers. Measured on Zen 4, k =
// 768, 16 rows: 4 x 4 reaches 94 GFLOP/s, 3 x 8 75 (8 rows of w of a block no longer fit the first-level cache beside x), 6 x 4
// between 75 and 97.
constexpr int kDotRows = LOQUETIER_REGS >= 32 ? 4 : 3;
constexpr int kDotCols = 4;

// ahead: a row of weights that a later tile needs, fetched beside the arithmetic; may be null.
template <int M>
LOQUETIER_INLINE void dot_tile(int64_t cols, int64_t k, const float* x, int64_t ldx, const float* w, int64_t ldw, float* y,
                               int64_t ldy, bool accumulate, const float* ahead = nullptr) {
  const float* row[kDotCols];
#pragma GCC unroll 16
  for (int j = 0; j < kDotCols; ++j) row[j] = w + (j < cols ? j : cols - 1) * ldw;  // past the edge: a column computed and dropped
  Vec sum[M][kDotCols] = {};
  int64_t p = 0;
  for (; p + W <= k; p += W) {
    Vec xs[M];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) xs[i] = load(x + i * ldx + p);
    if (ahead) __builtin_prefetch(ahead + p, 0, 2);
#pragma GCC unroll 16
    for (int j = 0; j < kDotCols; ++j) {
      const Vec ws = load(row[j] + p);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) sum[i][j] += xs[i] * ws;
    }
  }
  if (p < k) {
    for (int j = 0; j < kDotCols; ++j) {
      const Vec ws = load_first(row[j] + p, k - p);
      for (int i = 0; i < M; ++i) sum[i][j] += load_first(x + i * ldx + p, k - p) * ws;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    const Vec total = fold_all<kDotCols>(sum[i]);
    float* out = y + i * ldy;
    if (cols >= kDotCols && kDotCols == W) {
      store(out, accumulate ? load(out) + total : total);
    } else {
      const int64_t n = cols < kDotCols ? cols : kDotCols;
      float part[W];
      store(part, total);
      for (int64_t j = 0; j < n; ++j) out[j] = accumulate ? out[j] + part[j] : part[j];
    }
  }
}

template <int M>
LOQUETIER_INLINE void dot_rows(int64_t rows, int64_t cols, int64_t k, const float* x, int64_t ldx, const float* w, int64_t ldw,
                               float* y, int64_t ldy, bool accumulate) {
  if constexpr (M > 0) {
    if (rows == M) dot_tile<M>(cols, k, x, ldx, w, ldw, y, ldy, accumulate);
    else dot_rows<M - 1>(rows, cols, k, x, ldx, w, ldw, y, ldy, accumulate);
  }
}

void dot(int64_t rows, int64_t cols, int64_t k, const float* x, int64_t ldx, const float* w, int64_t ldw, float* y, int64_t ldy,
         bool accumulate) {
  for (int64_t j = 0; j < cols; j += kDotCols) {
    const float* wj = w + j * ldw;
    int64_t i = 0;
    for (; i + kDotRows <= rows; i += kDotRows) {
      // Each of the first tiles fetches one of the next block's rows, so that computing and waiting for memory do not take turns.
      // Measured at T = 16 with 400 MB of weights, a decode step on two Zen 4 cores: 34.5 ms without, 27.1 ms with; all four rows
      // fetched by the first tile: 48 ms, more than the cache's miss buffers hold.
      const int64_t next = kDotCols + i / kDotRows;
      const float* ahead = next < 2 * kDotCols && j + next < cols ? wj + next * ldw : nullptr;
      dot_tile<kDotRows>(cols - j, k, x + i * ldx, ldx, wj, ldw, y + i * ldy + j, ldy, accumulate, ahead);
    }
    dot_rows<kDotRows - 1>(rows - i, cols - j, k, x + i * ldx, ldx, wj, ldw, y + i * ldy + j, ldy, accumulate);
  }
}

// ---------------------------------------------------------------- multiply: a broadcast along packed panels

constexpr int kPanel = 2 * W;
constexpr int kTileRows = LOQUETIER_REGS >= 32 ? 12 : 6;

void pack(int64_t k, int64_t n, const float* const* rows, float* panels) {
  for (int64_t j = 0; j < n; j += kPanel) {
    const int64_t cols = n - j < kPanel ? n - j : kPanel;
    for (int64_t p = 0; p < k; ++p, panels += kPanel) {
      const float* from = rows[p] + j;
      if (cols == kPanel) {
        store(panels, load(from));
        store(panels + W, load(from + W));
      } else {
        for (int64_t i = 0; i < kPanel; ++i) panels[i] = i < cols ? from[i] : 0.0f;
      }
    }
  }
}

template <int... I>
LOQUETIER_INLINE void interleave(Vec a, Vec b, Vec& low, Vec& high, Lanes<I...>) {
  low = __builtin_shufflevector(a, b, (I % 2 * W + I / 2)...);
  high = __builtin_shufflevector(a, b, (I % 2 * W + I / 2 + W / 2)...);
}

LOQUETIER_INLINE void transpose(Vec (&t)[W]) {  // log2(W) rounds of interleaving the first half with the second
  for (int width = W; width > 1; width /= 2) {
    Vec u[W];
#pragma GCC unroll 16
    for (int i = 0; i < W / 2; ++i) interleave(t[i], t[i + W / 2], u[2 * i], u[2 * i + 1], AllLanes{});
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) t[i] = u[i];
  }
}

void pack_transposed(int64_t k, int64_t n, const float* const* rows, float* panels) {
  for (int64_t j = 0; j < n; j += W) {
    float* out = panels + j / kPanel * kPanel * k + j % kPanel;
    const int64_t cols = n - j < W ? n - j : W;
    int64_t p = 0;
    for (; p + W <= k; p += W) {
      Vec t[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) t[i] = i < cols ? load(rows[j + i] + p) : Vec{};
      transpose(t);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) store(out + (p + i) * kPanel, t[i]);
    }
    for (; p < k; ++p)
      for (int64_t i = 0; i < W; ++i) out[p * kPanel + i] = i < cols ? rows[j + i][p] : 0.0f;
  }
  if (n % kPanel != 0 && n % kPanel <= W) {  // the second half of the last panel
    float* out = panels + n / kPanel * kPanel * k + W;
    for (int64_t p = 0; p < k; ++p) store(out + p * kPanel, Vec{});
  }
}

template <int M, int V>
void multiply_tile(int64_t cols, int64_t k, const float* a, int64_t row_step, int64_t k_step, const float* panel, float alpha,
                   float* c, int64_t ldc, bool accumulate) {
  Vec sum[M][V] = {};
  for (int64_t p = 0; p < k; ++p, panel += kPanel) {
    Vec b[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) b[v] = load(panel + v * W);
    const float* ap = a + p * k_step;
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const Vec ai = splat(ap[i * row_step]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[i][v] += ai * b[v];
    }
  }
  const Vec by = splat(alpha);
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float* out = c + i * ldc + v * W;
      const int64_t left = cols - v * W;
      if (left <= 0) continue;
      Vec start{};
      if (accumulate) start = left >= W ? load(out) : load_first(out, left);
      // Opaque here, product and sum stay in one basic block, where the compiler fuses them alike in every tile shape.
      const Vec result = opaque(start) + by * opaque(sum[i][v]);
      if (left >= W) store(out, result);
      else store_first(out, result, left);
    }
  }
}

template <int M>
LOQUETIER_INLINE void multiply_rows(int64_t rows, int64_t cols, int64_t k, const float* a, int64_t row_step, int64_t k_step,
                                    const float* panel, float alpha, float* c, int64_t ldc, bool accumulate) {
  if constexpr (M > 0) {
    if (rows != M) return multiply_rows<M - 1>(rows, cols, k, a, row_step, k_step, panel, alpha, c, ldc, accumulate);
    if (cols > W) multiply_tile<M, 2>(cols, k, a, row_step, k_step, panel, alpha, c, ldc, accumulate);
    else multiply_tile<M, 1>(cols, k, a, row_step, k_step, panel, alpha, c, ldc, accumulate);
  }
}

void multiply(int64_t m, int64_t n, int64_t k, const float* a, int64_t row_step, int64_t k_step, const float* panels,
              int64_t stride, float alpha, float* c, int64_t ldc, bool accumulate) {
  for (int64_t i = 0; i < m; i += kTileRows) {
    const int64_t rows = m - i < kTileRows ? m - i : kTileRows;
    for (int64_t j = 0; j < n; j += kPanel) {
      const int64_t cols = n - j < kPanel ? n - j : kPanel;
      multiply_rows<kTileRows>(rows, cols, k, a + i * row_step, row_step, k_step, panels + j * stride, alpha, c + i * ldc + j, ldc,
                               accumulate);
    }
  }
}

// ---------------------------------------------------------------- elementwise

// e^x to about one unit in the last place: x = n ln 2 + r, |r| <= ln 2 / 2, a polynomial in r, then n into the exponent in two
// steps so that results near the smallest normal number stay right. NaN stays NaN, below -104 gives 0.
LOQUETIER_INLINE Vec exp(Vec x) {
  const Vec low = splat(-104.0f), high = splat(89.0f);
  const Vec inside = x < low ? low : (x > high ? high : x);
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec rounded = inside * splat(1.44269504f) + magic;
  const Vec n = rounded - magic;
  Vec r = inside - n * splat(0.693359375f);
  r = r + n * splat(2.12194440e-4f);
  Vec p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * (r * r) + r + splat(1.0f);
  const IntVec bits = reinterpret_cast<IntVec>(rounded) - reinterpret_cast<IntVec>(magic);
  const IntVec half = bits >> 1;
  const Vec first = reinterpret_cast<Vec>((half + 127) << 23), second = reinterpret_cast<Vec>((bits - half + 127) << 23);
  const Vec result = p * first * second;
  return x < low ? Vec{} : result;
}

// Calls full(i) on whole vectors and part(i, n) on what is left.
template <class Full, class Part>
LOQUETIER_INLINE void sweep(int64_t n, Full full, Part part) {
  int64_t i = 0;
  for (; i + W <= n; i += W) full(i);
  if (i < n) part(i, n - i);
}

float max(const float* x, int64_t n) {
  Vec best = splat(-__builtin_inff());
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const Vec v = load(x + i);
    best = v > best ? v : best;
  }
  float result = best[0];
  for (int j = 1; j < W; ++j) result = best[j] > result ? best[j] : result;
  for (; i < n; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

double exp_sum(const float* x, int64_t n, float shift, float* y) {
  const Vec by = splat(shift);
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += 32 * W) {
    const int64_t end = n - begin < 32 * W ? n : begin + 32 * W;
    Vec sum{};
    int64_t i = begin;
    for (; i + W <= end; i += W) {
      const Vec e = exp(load(x + i) - by);
      if (y) store(y + i, e);
      sum += e;
    }
    if (i < end) {
      const Vec e = exp(load_first(x + i, end - i) - by);
      if (y) store_first(y + i, e, end - i);
      for (int64_t j = 0; j < end - i; ++j) sum[j] += e[j];
    }
    total += fold(sum);
  }
  return total;
}

template <class Term>
LOQUETIER_INLINE double sum_double(int64_t n, Term term) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += 32 * W) {
    const int64_t end = n - begin < 32 * W ? n : begin + 32 * W;
    Vec sum{};
    int64_t i = begin;
    for (; i + W <= end; i += W) sum += term(i, int64_t{W});
    if (i < end) sum += term(i, end - i);
    total += fold(sum);
  }
  return total;
}
LOQUETIER_INLINE Vec load_up_to(const float* p, int64_t n) { return n == W ? load(p) : load_first(p, n); }

double dot_double(const float* x, const float* y, int64_t n) {
  return sum_double(n, [&](int64_t i, int64_t m) LOQUETIER_LAMBDA { return load_up_to(x + i, m) * load_up_to(y + i, m); });
}
double dot3_double(const float* x, const float* y, const float* z, int64_t n) {
  return sum_double(
      n, [&](int64_t i, int64_t m) LOQUETIER_LAMBDA { return load_up_to(x + i, m) * load_up_to(y + i, m) * load_up_to(z + i, m); });
}

void axpy(float alpha, const float* x, float* y, int64_t n) {
  const Vec a = splat(alpha);
  sweep(
      n, [&](int64_t i) LOQUETIER_LAMBDA { store(y + i, load(y + i) + a * load(x + i)); },
      [&](int64_t i, int64_t m) LOQUETIER_LAMBDA { store_first(y + i, load_first(y + i, m) + a * load_first(x + i, m), m); });
}
void scale(float alpha, const float* x, float* y, int64_t n) {
  const Vec a = splat(alpha);
  sweep(
      n, [&](int64_t i) LOQUETIER_LAMBDA { store(y + i, a * load(x + i)); },
      [&](int64_t i, int64_t m) LOQUETIER_LAMBDA { store_first(y + i, a * load_first(x + i, m), m); });
}
void scale_by(float alpha, const float* x, const float* w, float* y, int64_t n) {
  const Vec a = splat(alpha);
  sweep(
      n, [&](int64_t i) LOQUETIER_LAMBDA { store(y + i, a * load(x + i) * load(w + i)); },
      [&](int64_t i, int64_t m) LOQUETIER_LAMBDA { store_first(y + i, a * load_first(x + i, m) * load_first(w + i, m), m); });
}
void norm_backward(float alpha, const float* w, const float* dy, float beta, const float* x, float* dx, int64_t n) {
  const Vec a = splat(alpha), b = splat(beta);
  sweep(
      n, [&](int64_t i) LOQUETIER_LAMBDA { store(dx + i, load(dx + i) + (a * load(w + i) * load(dy + i) - b * load(x + i))); },
      [&](int64_t i, int64_t m) LOQUETIER_LAMBDA {
        store_first(dx + i, load_first(dx + i, m) + (a * load_first(w + i, m) * load_first(dy + i, m) - b * load_first(x + i, m)),
                    m);
      });
}
void rotate(const float* cos, const float* sin, float* first, float* second, int64_t n) {
  sweep(
      n,
      [&](int64_t i) LOQUETIER_LAMBDA {
        const Vec a = load(first + i), b = load(second + i), c = load(cos + i), s = load(sin + i);
        store(first + i, a * c - b * s);
        store(second + i, b * c + a * s);
      },
      [&](int64_t i, int64_t m) LOQUETIER_LAMBDA {
        const Vec a = load_first(first + i, m), b = load_first(second + i, m), c = load_first(cos + i, m),
                  s = load_first(sin + i, m);
        store_first(first + i, a * c - b * s, m);
        store_first(second + i, b * c + a * s, m);
      });
}

LOQUETIER_INLINE Vec sigmoid(Vec x) { return splat(1.0f) / (splat(1.0f) + exp(-x)); }

void swiglu(const float* gate, const float* up, float* y, int64_t n) {
  sweep(
      n,
      [&](int64_t i) LOQUETIER_LAMBDA {
        const Vec g = load(gate + i);
        store(y + i, g * sigmoid(g) * load(up + i));
      },
      [&](int64_t i, int64_t m) LOQUETIER_LAMBDA {
        const Vec g = load_first(gate + i, m);
        store_first(y + i, g * sigmoid(g) * load_first(up + i, m), m);
      });
}
void swiglu_backward(const float* gate, const float* up, const float* dy, float* dgate, float* dup, int64_t n) {
  const auto both = [](Vec g, Vec u, Vec d, Vec& dg, Vec& du) LOQUETIER_LAMBDA {
    const Vec s = sigmoid(g);
    du = d * g * s;
    dg = d * u * (s + g * s * (splat(1.0f) - s));
  };
  sweep(
      n,
      [&](int64_t i) LOQUETIER_LAMBDA {
        Vec dg, du;
        both(load(gate + i), load(up + i), load(dy + i), dg, du);
        store(dgate + i, dg);
        store(dup + i, du);
      },
      [&](int64_t i, int64_t m) LOQUETIER_LAMBDA {
        Vec dg, du;
        both(load_first(gate + i, m), load_first(up + i, m), load_first(dy + i, m), dg, du);
        store_first(dgate + i, dg, m);
        store_first(dup + i, du, m);
      });
}

void softmax_backward(const float* s, const float* dp, float lse, float delta, float scale, float* p, float* ds, int64_t n) {
  const Vec l = splat(lse), d = splat(delta), by = splat(scale);
  sweep(
      n,
      [&](int64_t i) LOQUETIER_LAMBDA {
        const Vec e = exp(load(s + i) - l);
        store(ds + i, e * (load(dp + i) - d) * by);
        store(p + i, e);
      },
      [&](int64_t i, int64_t m) LOQUETIER_LAMBDA {
        const Vec e = exp(load_first(s + i, m) - l);
        store_first(ds + i, e * (load_first(dp + i, m) - d) * by, m);
        store_first(p + i, e, m);
      });
}

constexpr Kernels make_table(const char* name) {
  return {
      name,  W,        kPanel,        kTileRows,   dot,    pack,   pack_transposed, multiply,        max, exp_sum, dot_double, axpy,
      scale, scale_by, norm_backward, dot3_double, rotate, swiglu, swiglu_backward, softmax_backward};
}

#undef LOQUETIER_INLINE

}  // namespace loquetier::cpu::LOQUETIER_ISA
