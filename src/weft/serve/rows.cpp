// Products of a few rows, on a CPU: x [M, I] times a matrix w [O, I] of float or bfloat16 gives y [M, O]. Built by native.py.
//
// The matrix is read once, at the speed of memory: each run of it meets up to four rows of x while it is in registers. A
// bfloat16 is the upper half of a float. Of two in one word, a shift makes the even one a float, and a mask the odd one;
// so in every run of x the even numbers stand first. The vectors are those of GCC and Clang, for any CPU.

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using half = uint16_t;
using words = uint32_t __attribute__((vector_size(32)));
using numbers = float __attribute__((vector_size(32)));
constexpr int64_t RUN = 16, TILE = 4, AHEAD = 1024;

template <class T> T load(const void* from) {
  T to;
  memcpy(&to, from, sizeof to);
  return to;
}

float widened(float x) { return x; }
float widened(half x) {
  uint32_t word = uint32_t(x) << 16;
  return load<float>(&word);
}

void store(float* to, float x) { *to = x; }
void store(half* to, float x) {  // to the nearest, and of two to the even one
  uint32_t word = load<uint32_t>(&x);
  *to = x == x ? (word + 0x7fff + (word >> 16 & 1)) >> 16 : 0x7fc0;
}

void take(const float* run, numbers (&to)[2]) { to[0] = load<numbers>(run), to[1] = load<numbers>(run + RUN / 2); }
void take(const half* run, numbers (&to)[2]) {
  words both = load<words>(run);
  to[0] = (numbers)(both << 16), to[1] = (numbers)(both & 0xffff0000u);
}

template <class T> void give(const T* x, float* run) {  // as `take` finds them in a matrix
  for (int64_t i = 0; i < RUN; i++) run[sizeof(T) == 4 ? i : i / 2 + i % 2 * (RUN / 2)] = widened(x[i]);
}

template <class T, int M> void add(const T* w, const float* x, int64_t I, numbers (&sums)[M]) {
  numbers row[2];
  take(w, row);
  __builtin_prefetch((const char*)w + AHEAD);
  for (int m = 0; m < M; m++)
    for (int part = 0; part < 2; part++) sums[m] += row[part] * load<numbers>(x + m * I + part * RUN / 2);
}

// One row of w with M of x, U runs at a time with sums of their own: an addition takes longer than the next load.
template <class T, int M, int U = TILE / M>
void tile(const T* w, const float* x, float bias, T* y, int64_t I, int64_t O) {
  numbers sums[U][M] = {};
  int64_t i = 0;
  for (; i + U * RUN <= I; i += U * RUN)
    for (int u = 0; u < U; u++) add<T, M>(w + i + u * RUN, x + i + u * RUN, I, sums[u]);
  for (; i + RUN <= I; i += RUN) add<T, M>(w + i, x + i, I, sums[0]);
  for (int m = 0; m < M; m++) {
    for (int u = 1; u < U; u++) sums[0][m] += sums[u][m];
    float sum = bias;
    for (int lane = 0; lane < 8; lane++) sum += sums[0][m][lane];
    for (int64_t rest = i; rest < I; rest++) sum += widened(w[rest]) * x[m * I + rest];
    store(y + m * O, sum);
  }
}

template <class T>
void product(const T* x, const T* w, const T* bias, T* y, int64_t M, int64_t I, int64_t O, int threads) {
  std::vector<float> wide(M * I);
  for (int64_t m = 0; m < M; m++) {
    const T* from = x + m * I;
    float* to = wide.data() + m * I;
    int64_t i = 0;
    for (; i + RUN <= I; i += RUN) give(from + i, to + i);
    for (; i < I; i++) to[i] = widened(from[i]);
  }
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t o = 0; o < O; o++)
    for (int64_t m = 0; m < M; m += TILE) {
      const T* row = w + o * I;
      const float* part = wide.data() + m * I;
      float add = bias ? widened(bias[o]) : 0;
      T* to = y + m * O + o;
      switch (M - m) {
        case 1: tile<T, 1>(row, part, add, to, I, O); break;
        case 2: tile<T, 2>(row, part, add, to, I, O); break;
        case 3: tile<T, 3>(row, part, add, to, I, O); break;
        default: tile<T, 4>(row, part, add, to, I, O);
      }
    }
}

}  // namespace

extern "C" {
void float32_rows(const float* x, const float* w, const float* bias, float* y, int64_t M, int64_t I, int64_t O, int threads) {
  product(x, w, bias, y, M, I, O, threads);
}
void bfloat16_rows(const half* x, const half* w, const half* bias, half* y, int64_t M, int64_t I, int64_t O, int threads) {
  product(x, w, bias, y, M, I, O, threads);
}
}
