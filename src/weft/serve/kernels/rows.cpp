// Products of a few rows: x [M, I] times a matrix w [O, I] gives y [M, O], of float or bfloat16.
//
// The matrix is read once, at the speed of memory: some rows of it meet some of x while they are in registers, as many as
// registers hold. With vectors of 512 bits a matrix comes four rows at a time, and while they are computed with, for as many
// rows of x as there are, the same places of the next four are on their way: memory is never idle.

#include <algorithm>
#include <vector>

#include "kernels.hpp"

namespace {

#ifdef __AVX512F__
constexpr int TILE = 6, TOGETHER = 4, MANY = 1;  // rows of x and of w that meet; of x for which w's come together
template <int R> void fetch(const void* w, int64_t row) { __builtin_prefetch((const char*)w + R * row, 0, 2); }
#else
constexpr int TILE = 4, TOGETHER = 3, MANY = 8;
template <int R> void fetch(const void* w, int64_t) { __builtin_prefetch((const char*)w + 1024, 0, 0); }
#endif

// One half of a run: of R rows of w with M of x.
template <int PART, class T, int R, int M> void add(const T* w, const float* x, int64_t I, numbers (&sums)[R][M]) {
  numbers row[R];
  for (int r = 0; r < R; r++) row[r] = take<PART>(w + r * I);
  for (int m = 0; m < M; m++) {
    numbers column = load<numbers>(x + m * I + PART * LANES);
    for (int r = 0; r < R; r++) sums[r][m] += row[r] * column;
  }
}

template <class T, int R, int M> void add_run(const T* w, const float* x, int64_t I, numbers (&sums)[R][M]) {
  for (int r = 0; r < R; r++)
    for (size_t line = 0; line < RUN * sizeof(T); line += 64) fetch<R>((const char*)(w + r * I) + line, I * sizeof(T));
  add<0>(w, x, I, sums);
  add<1>(w, x, I, sums);
}

// R rows of w with M of x, U runs at a time with sums of their own: an addition takes longer than the next load.
template <class T, class Y, int R, int M, int U = R * M < 4 ? 4 / (R * M) : 1>
void tile(const T* w, const float* x, const T* bias, Y* y, int64_t I, int64_t O) {
  numbers sums[U][R][M] = {};
  int64_t i = 0;
  for (; i + U * RUN <= I; i += U * RUN)
    for (int u = 0; u < U; u++) add_run(w + i + u * RUN, x + i + u * RUN, I, sums[u]);
  for (; i + RUN <= I; i += RUN) add_run(w + i, x + i, I, sums[0]);
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) {
      for (int u = 1; u < U; u++) sums[0][r][m] += sums[u][r][m];
      float sum = (bias ? widened(bias[r]) : 0) + sum_of(sums[0][r][m]);
      for (int64_t rest = i; rest < I; rest++) sum += widened(w[r * I + rest]) * x[m * I + rest];
      store(y + m * O + r, sum);
    }
}

// Of M rows of x as many as meet w at once, and then as many, and the rest.
template <class T, class Y, int R, int N = TILE>
void tiles(const T* w, const float* x, const T* bias, Y* y, int64_t M, int64_t I, int64_t O) {
  for (; M >= N; M -= N, x += N * I, y += N * O) tile<T, Y, R, N>(w, x, bias, y, I, O);
  if constexpr (N > 1) tiles<T, Y, R, N - 1>(w, x, bias, y, M, I, O);
}

template <class T, class Y>
void product(const T* w, const float* x, const T* bias, Y* y, int64_t M, int64_t I, int64_t O, int threads) {
  int64_t together = M < MANY ? 1 : TOGETHER;
#pragma omp parallel for num_threads(threads) if (threads > 1 && I * O > ALONE)
  for (int64_t first = 0; first < O; first += together) {
    auto some = [&](auto run, int64_t o) { run(w + o * I, x, bias ? bias + o : nullptr, y + o, M, I, O); };
    if (together == TOGETHER && first + TOGETHER <= O)
      some(tiles<T, Y, TOGETHER>, first);
    else
      for (int64_t o = first; o < std::min(first + together, O); o++) some(tiles<T, Y, 1>, o);
  }
}

std::vector<float> spread_rows(const half* x, int64_t M, int64_t I) {
  std::vector<float> wide(M * I);
  for (int64_t m = 0; m < M; m++) spread(x + m * I, wide.data() + m * I, I);
  return wide;
}

}  // namespace

void product_of_rows(const float* x, const float* w, const float* bias, float* y, int64_t M, int64_t I, int64_t O, int threads) {
  product(w, x, bias, y, M, I, O, threads);
}
void product_of_rows(const half* x, const half* w, const half* bias, half* y, int64_t M, int64_t I, int64_t O, int threads) {
  if (product_of_tiles(x, w, bias, y, M, I, O, threads)) return;
  product(w, spread_rows(x, M, I).data(), bias, y, M, I, O, threads);
}
void product_of_rows(const half* x, const half* w, float* y, int64_t M, int64_t I, int64_t O, int threads) {  // not rounded
  product(w, spread_rows(x, M, I).data(), (const half*)nullptr, y, M, I, O, threads);
}

extern "C" {
void float32_rows(const float* x, const float* w, const float* bias, float* y, int64_t M, int64_t I, int64_t O, int threads) {
  product_of_rows(x, w, bias, y, M, I, O, threads);
}
void bfloat16_rows(const half* x, const half* w, const half* bias, half* y, int64_t M, int64_t I, int64_t O, int threads) {
  product_of_rows(x, w, bias, y, M, I, O, threads);
}
}
