// A decoding step on a CPU, of float or bfloat16. Built by native.py.
//
// Products of a few rows: x [M, I] times a matrix w [O, I] gives y [M, O]. The matrix is read once, at the speed of memory:
// each run of it meets up to four rows of x while it is in registers. From eight rows on arithmetic counts: then three rows
// of the matrix meet four of x, and there are more products than loads. A bfloat16 is the upper half of a float. Of two in
// one word, a shift makes the even one a float, and a mask the odd one; so in every run of x the even numbers stand first.
// The vectors are those of GCC and Clang, for any CPU.
//
// Attention of one token of each sequence, over a paged cache: keys and values are read where they lie, once.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using half = uint16_t;
using words = uint32_t __attribute__((vector_size(32)));
using numbers = float __attribute__((vector_size(32)));
constexpr int64_t RUN = 16, TILE = 4, TOGETHER = 3, AHEAD = 1024;
constexpr int64_t ALONE = 1 << 17;  // numbers to read for which no other thread is woken

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

template <int PART> numbers take(const float* run) { return load<numbers>(run + PART * RUN / 2); }
template <int PART> numbers take(const half* run) {
  words both = load<words>(run);
  return (numbers)(PART ? both & 0xffff0000u : both << 16);
}

float sum_of(numbers lanes) {
  float sum = 0;
  for (int lane = 0; lane < 8; lane++) sum += lanes[lane];
  return sum;
}

int64_t place(const float*, int64_t i) { return i; }
int64_t place(const half*, int64_t i) { return i / RUN * RUN + i % RUN / 2 + i % 2 * (RUN / 2); }

template <class T> void spread(const T* x, float* to, int64_t size) {  // as `take` finds them in a row
  for (int64_t i = 0; i < size; i++) to[i < size / RUN * RUN ? place(x, i) : i] = widened(x[i]);
}

// One half of a run: of R rows of w with M of x.
template <int PART, class T, int R, int M> void add(const T* w, const float* x, int64_t I, numbers (&sums)[R][M]) {
  numbers row[R];
  for (int r = 0; r < R; r++) row[r] = take<PART>(w + r * I);
  for (int m = 0; m < M; m++) {
    numbers column = load<numbers>(x + m * I + PART * RUN / 2);
    for (int r = 0; r < R; r++) sums[r][m] += row[r] * column;
  }
}

template <class T, int R, int M> void add_run(const T* w, const float* x, int64_t I, numbers (&sums)[R][M]) {
  for (int r = 0; r < R; r++) __builtin_prefetch((const char*)(w + r * I) + AHEAD, 0, 0);  // not to be kept in caches
  add<0>(w, x, I, sums);
  add<1>(w, x, I, sums);
}

// R rows of w with M of x, U runs at a time with sums of their own: an addition takes longer than the next load.
template <class T, int R, int M, int U = R == 1 ? TILE / M : 1>
void tile(const T* w, const float* x, const T* bias, T* y, int64_t I, int64_t O) {
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

template <class T, int R>
void tiles(const T* w, const float* x, const T* bias, T* y, int64_t M, int64_t I, int64_t O) {
  for (; M >= TILE; M -= TILE, x += TILE * I, y += TILE * O) tile<T, R, TILE>(w, x, bias, y, I, O);
  switch (M) {
    case 1: tile<T, R, 1>(w, x, bias, y, I, O); break;
    case 2: tile<T, R, 2>(w, x, bias, y, I, O); break;
    case 3: tile<T, R, 3>(w, x, bias, y, I, O);
  }
}

template <class T>
void product(const T* x, const T* w, const T* bias, T* y, int64_t M, int64_t I, int64_t O, int threads) {
  std::vector<float> wide(M * I);
  for (int64_t m = 0; m < M; m++) spread(x + m * I, wide.data() + m * I, I);
  int64_t together = M < 2 * TILE ? 1 : TOGETHER;
#pragma omp parallel for num_threads(threads) if (threads > 1 && I * O > ALONE)
  for (int64_t first = 0; first < O; first += together) {
    auto some = [&](auto run, int64_t o) { run(w + o * I, wide.data(), bias ? bias + o : nullptr, y + o, M, I, O); };
    if (together == TOGETHER && first + TOGETHER <= O)
      some(tiles<T, TOGETHER>, first);
    else
      for (int64_t o = first; o < std::min(first + together, O); o++) some(tiles<T, 1>, o);
  }
}

struct Sizes {
  int64_t sequences, heads, kv_heads, key, value, blocks, block;  // key and value: multiples of RUN
};

// q [R, H, E] at keys [·, K, E] and values [·, K, V] of each sequence's blocks [R, M], or of all from block `first` on,
// where the mask [R, M·block] is 0: y [R, H, V].
template <class T>
void attention(const T* q, const T* keys, const T* values, const int64_t* tables, int64_t first, const T* mask, T* y,
               Sizes n, float scale, int threads) {
  int64_t group = n.heads / n.kv_heads, seen = n.blocks * n.block;
#pragma omp parallel for num_threads(threads) if (threads > 1 && n.sequences * n.kv_heads * seen * n.key > ALONE)
  for (int64_t job = 0; job < n.sequences * n.kv_heads; job++) {
    int64_t r = job / n.kv_heads, k = job % n.kv_heads, start = 0, stop = seen;
    while (start < seen && widened(mask[r * seen + start]) != 0) start++;
    while (stop > start && widened(mask[r * seen + stop - 1]) != 0) stop--;
    int64_t count = stop - start;
    auto at = [&](int64_t s) {
      int64_t number = (start + s) / n.block, block = tables ? tables[r * n.blocks + number] : first + number;
      return (block * n.block + (start + s) % n.block) * n.kv_heads + k;
    };
    std::vector<float> query(group * n.key), scores(group * count), sums(n.value);
    int64_t head = r * n.heads + k * group;
    for (int64_t g = 0; g < group; g++) spread(q + (head + g) * n.key, &query[g * n.key], n.key);
    for (int64_t s = 0; s < count; s++)
      for (int64_t g = 0; g < group; g++) {
        numbers lanes[1][1] = {};
        const T* key = keys + at(s) * n.key;
        for (int64_t i = 0; i < n.key; i += RUN) add_run(key + i, &query[g * n.key + i], 0, lanes);
        scores[g * count + s] = sum_of(lanes[0][0]) * scale;
      }
    for (int64_t g = 0; g < group; g++) {
      float* score = &scores[g * count];
      float most = -INFINITY, total = 0;
      for (int64_t s = 0; s < count; s++) most = score[s] > most ? score[s] : most;
      for (int64_t s = 0; s < count; s++) total += score[s] = std::exp(score[s] - most);
      std::fill(sums.begin(), sums.end(), 0.f);
      for (int64_t s = 0; s < count; s++) {
        const T* value = values + at(s) * n.value;
        for (int64_t i = 0; i < n.value; i += RUN) {
          numbers row[2] = {take<0>(value + i), take<1>(value + i)};
          for (int part = 0; part < 2; part++) {
            float* to = &sums[i + part * RUN / 2];
            numbers sum = load<numbers>(to) + row[part] * score[s];
            memcpy(to, &sum, sizeof sum);
          }
        }
      }
      for (int64_t i = 0; i < n.value; i++) store(y + (head + g) * n.value + i, sums[place(y, i)] / total);
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
void float32_attention(const float* q, const float* keys, const float* values, const int64_t* tables, int64_t first,
                       const float* mask, float* y, const Sizes* sizes, float scale, int threads) {
  attention(q, keys, values, tables, first, mask, y, *sizes, scale, threads);
}
void bfloat16_attention(const half* q, const half* keys, const half* values, const int64_t* tables, int64_t first,
                        const half* mask, half* y, const Sizes* sizes, float scale, int threads) {
  attention(q, keys, values, tables, first, mask, y, *sizes, scale, threads);
}
}
