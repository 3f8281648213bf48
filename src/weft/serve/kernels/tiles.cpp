// The product of rows.cpp, of bfloat16, on a CPU that multiplies tiles (AMX): 16 rows of 32 numbers with 16 others at once.
// So a matrix meets 16 rows of x in the time of one. Its own rows are tiles as they lie; those of x are turned round first, in
// pairs of numbers. While 32 rows of the matrix are computed with, the next are on their way. A row's numbers are the same in
// any company.

#include "kernels.hpp"

#if defined(__AMX_BF16__) || defined(__AMXBF16__)  // as GCC names it, and as older Clangs do

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <memory>

namespace {

constexpr int64_t SIDE = 16, TILE = SIDE * RUN;  // rows of a tile, and its numbers
constexpr int64_t BLOCK = 2 * SIDE;              // rows of w, and of x, that meet
constexpr int64_t KEPT = 3 << 17;                // numbers of x that stay in a cache of 2 MB while w passes

struct alignas(64) Tiles {  // all eight are whole
  uint8_t palette = 1, start = 0, unused[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE};
};

bool allowed() {  // by Linux: ARCH_REQ_XCOMP_PERM, XTILEDATA
  static bool yes = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return yes;
}

// Words of a square [16, 16] change places: rows become columns.
void turn(__m512i (&square)[SIDE]) {
  for (int step = 1; step < SIDE; step *= 2) {
    words low, high;
    for (int lane = 0; lane < SIDE; lane++) {
      low[lane] = lane & step ? SIDE + (lane ^ step) : lane;
      high[lane] = lane & step ? SIDE + lane : lane ^ step;
    }
    for (int row = 0; row < SIDE; row++)
      if (!(row & step)) {
        __m512i one = square[row], other = square[row | step];
        square[row] = _mm512_permutex2var_epi32(one, (__m512i)low, other);
        square[row | step] = _mm512_permutex2var_epi32(one, (__m512i)high, other);
      }
  }
}

// M rows of x, 16 at most, as tiles: of each run of them pair p of row m is at [p, m].
void turn_rows(const half* x, half* to, int64_t M, int64_t I) {
  for (int64_t i = 0; i < I; i += RUN, to += TILE) {
    __m512i square[SIDE];
    for (int64_t m = 0; m < SIDE; m++) square[m] = m < M ? load<__m512i>(x + m * I + i) : __m512i{};
    turn(square);
    memcpy(to, square, sizeof square);
  }
}

// 32 rows of w with M · 16 of x, which are tiles one behind the other: sums [M, 2, 16 of w, 16 of x].
template <int M> void meet(const half* w, const half* x, float* sums, int64_t I, bool fetch) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < I; i += RUN) {
    if (fetch)
      for (int64_t r = 0; r < BLOCK; r++) __builtin_prefetch(w + (BLOCK + r) * I + i, 0, 2);
    _tile_loadd(4, w + i, I * sizeof(half));
    _tile_loadd(5, w + SIDE * I + i, I * sizeof(half));
    _tile_loadd(6, x + i * SIDE, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    if constexpr (M > 1) {
      _tile_loadd(7, x + (I + i) * SIDE, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + SIDE * SIDE, 64);
  if constexpr (M > 1) {
    _tile_stored(2, sums + 2 * SIDE * SIDE, 64);
    _tile_stored(3, sums + 3 * SIDE * SIDE, 64);
  }
}

// Sums [16 of w, 16 of x] to their places in y, of M rows of x.
void put_square(const float* sums, const half* bias, half* y, int64_t M, int64_t O) {
  __m512i square[SIDE];
  memcpy(square, sums, sizeof square);
  turn(square);
  numbers added = {};
  for (int64_t lane = 0; bias && lane < SIDE; lane++) added[lane] = widened(bias[lane]);
  for (int64_t m = 0; m < SIDE && m < M; m++) {
    __m256bh row = _mm512_cvtneps_pbh((__m512)((numbers)square[m] + added));
    memcpy(y + m * O, &row, sizeof row);
  }
}

}  // namespace

bool product_of_tiles(const half* x, const half* w, const half* bias, half* y, int64_t M, int64_t I, int64_t O, int threads) {
  if (I % RUN || O < BLOCK || !allowed()) return false;
  int64_t step = std::max(BLOCK, KEPT / I / BLOCK * BLOCK);
  std::unique_ptr<words[]> turned(new words[std::min(step, (M + SIDE - 1) / SIDE * SIDE) * I / RUN]);
  half* tiles = (half*)turned.get();
  Tiles shapes;
#pragma omp parallel num_threads(threads) if (threads > 1 && I * O > ALONE)
  {
    _tile_loadconfig(&shapes);
    for (int64_t first = 0; first < M; first += step) {
      int64_t last = std::min(first + step, M);
#pragma omp for
      for (int64_t m = first; m < last; m += SIDE)
        turn_rows(x + m * I, tiles + (m - first) * I, std::min(SIDE, last - m), I);
#pragma omp for
      for (int64_t block = 0; block < O; block += BLOCK) {
        int64_t o = std::min(block, O - BLOCK);  // the last ones once more, where 32 does not divide them
        for (int64_t m = first; m < last; m += BLOCK) {
          alignas(64) float sums[4][SIDE * SIDE];
          bool two = m + SIDE < last;
          (two ? meet<2> : meet<1>)(w + o * I, tiles + (m - first) * I, sums[0], I, m == first);
          for (int64_t part = 0; part < (two ? 4 : 2); part++) {
            int64_t row = m + part / 2 * SIDE, column = o + part % 2 * SIDE;
            put_square(sums[part], bias ? bias + column : nullptr, y + row * O + column, std::min(SIDE, last - row), O);
          }
        }
      }
    }
    _tile_release();
  }
  return true;
}

#else

bool product_of_tiles(const half*, const half*, const half*, half*, int64_t, int64_t, int64_t, int) { return false; }

#endif
