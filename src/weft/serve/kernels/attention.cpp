// Attention of one token of each sequence over a paged cache, of float or bfloat16. Keys and values of all heads of a place lie
// side by side and are read where they lie, place by place, once: memory is read in a row.

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "kernels.hpp"

namespace {

constexpr int64_t AHEAD = 8;  // places

// Of P places' keys with a query: sums [P].
template <class T, int P> void meet(const T* (&keys)[P], const float* query, float (&sums)[P], int64_t size) {
  numbers lanes[P] = {};
  int64_t i = 0;
  for (; i + RUN <= size; i += RUN) {
    numbers even = load<numbers>(query + i), odd = load<numbers>(query + i + LANES);
    for (int p = 0; p < P; p++) lanes[p] += take<0>(keys[p] + i) * even + take<1>(keys[p] + i) * odd;
  }
  for (int p = 0; p < P; p++) sums[p] = sum_of(lanes[p]);
  for (; i < size; i++)
    for (int p = 0; p < P; p++) sums[p] += widened(keys[p][i]) * query[i];
}

// Scores [count, heads], whose number is one of vectors, become weights; the sum of each head's comes back.
std::vector<float> weigh(float* scores, int64_t count, int64_t heads) {
  std::vector<float> totals(heads);
  for (int64_t h = 0; h < heads; h += LANES) {
    numbers most = numbers{} - INFINITY, total = {};
    for (int64_t s = 0; s < count; s++) {
      numbers score = load<numbers>(scores + s * heads + h);
      most = score > most ? score : most;
    }
    for (int64_t s = 0; s < count; s++) {
      numbers weight = exp_of(load<numbers>(scores + s * heads + h) - most);
      put(scores + s * heads + h, weight);
      total += weight;
    }
    put(&totals[h], total);
  }
  return totals;
}

// Keys, or values, of a sequence: rows [·, block, K, size] of the blocks of its table, or from block `first` on.
template <class T> struct Pages {
  const T* rows;
  const int64_t* table;
  int64_t first, block, heads, size, seers;  // seers: heads of queries

  const T* at(int64_t place) const {
    int64_t number = place / block;
    return rows + ((table ? table[number] : first + number) * block + place % block) * heads * size;
  }

  // `some` of each head, with the rows that it sees, of four places at a time and of the rest one by one.
  template <class Some> void visit(int64_t start, int64_t count, int64_t from, int64_t to, Some some) const {
    int64_t s = 0;
    for (; s + 4 <= count; s += 4) see<4>(start, count, s, from, to, some);
    for (; s < count; s++) see<1>(start, count, s, from, to, some);
  }

  // P places, while rows of later ones are on their way.
  template <int P, class Some>
  void see(int64_t start, int64_t count, int64_t s, int64_t from, int64_t to, Some some) const {
    int64_t group = seers / heads;
    const T *now[P], *later[P], *row[P];
    for (int p = 0; p < P; p++) now[p] = at(start + s + p), later[p] = at(start + std::min(s + p + AHEAD, count - 1));
    for (int64_t k = from; k < to; k++) {
      for (int p = 0; p < P; p++) {
        row[p] = now[p] + k * size;
        for (int64_t i = 0; i < size; i += 64 / sizeof(T)) __builtin_prefetch(later[p] + k * size + i, 0, 2);
      }
      for (int64_t h = (k - from) * group; h < (k - from + 1) * group; h++) some(s, h, row);
    }
  }
};

}  // namespace

// q [R, H, E] at keys [·, K, E] and values [·, K, V], each at what it sees: y [R, H, V].
template <class T>
void attention(const T* q, const T* keys, const T* values, const Seen* seen, T* y, Sizes n, float scale, int threads) {
  int64_t group = n.heads / n.kv_heads, parts = n.tokens < threads ? std::min<int64_t>(n.kv_heads, threads) : 1, all = 0;
  for (int64_t r = 0; r < n.tokens; r++) all += seen[r].stop - seen[r].start;
#pragma omp parallel for num_threads(threads) if (threads > 1 && all * n.kv_heads * n.key > ALONE)
  for (int64_t job = 0; job < n.tokens * parts; job++) {
    int64_t r = job / parts, from = job % parts * n.kv_heads / parts, to = (job % parts + 1) * n.kv_heads / parts;
    int64_t start = seen[r].start, count = seen[r].stop - start, head = from * group, heads = (to - from) * group;
    int64_t width = (heads + LANES - 1) / LANES * LANES;
    std::vector<float> queries(heads * n.key), scores(count * width), sums(heads * n.value);
    for (int64_t h = 0; h < heads; h++) spread(q + (r * n.heads + head + h) * n.key, &queries[h * n.key], n.key);

    auto pages = [&](const T* rows, int64_t size) {
      return Pages<T>{rows, seen[r].table, seen[r].first, n.block, n.kv_heads, size, n.heads};
    };
    pages(keys, n.key).visit(start, count, from, to, [&](int64_t s, int64_t h, auto& rows) {
      float found[std::extent_v<std::remove_reference_t<decltype(rows)>>];
      meet(rows, &queries[h * n.key], found, n.key);
      for (float one : found) scores[s++ * width + h] = one * scale;
    });
    std::vector<float> totals = weigh(scores.data(), count, width);
    pages(values, n.value).visit(start, count, from, to, [&](int64_t s, int64_t h, auto& rows) {
      float weights[std::extent_v<std::remove_reference_t<decltype(rows)>>];
      for (float& one : weights) one = scores[s++ * width + h];
      add_rows(rows, weights, &sums[h * n.value], n.value);
    });
    for (int64_t h = 0; h < heads; h++)
      put_sums(&sums[h * n.value], 1 / totals[h], y + (r * n.heads + head + h) * n.value, n.value);
  }
}

namespace {

// The same of a token of each sequence, of blocks [R, M] or of all from block `first` on, where the mask [R, M·block] is 0.
template <class T>
void masked(const T* q, const T* keys, const T* values, const int64_t* tables, int64_t first, const T* mask, T* y, Sizes n,
            int64_t blocks, float scale, int threads) {
  int64_t all = blocks * n.block;
  std::vector<Seen> seen(n.tokens);
  for (int64_t r = 0; r < n.tokens; r++) {
    int64_t start = 0, stop = all;
    while (start < all && widened(mask[r * all + start]) != 0) start++;
    while (stop > start && widened(mask[r * all + stop - 1]) != 0) stop--;
    seen[r] = {tables ? tables + r * blocks : nullptr, first, start, stop};
  }
  attention(q, keys, values, seen.data(), y, n, scale, threads);
}

}  // namespace

template void attention(const float*, const float*, const float*, const Seen*, float*, Sizes, float, int);
template void attention(const half*, const half*, const half*, const Seen*, half*, Sizes, float, int);

extern "C" {
void float32_attention(const float* q, const float* keys, const float* values, const int64_t* tables, int64_t first,
                       const float* mask, float* y, const Sizes* sizes, int64_t blocks, float scale, int threads) {
  masked(q, keys, values, tables, first, mask, y, *sizes, blocks, scale, threads);
}
void bfloat16_attention(const half* q, const half* keys, const half* values, const int64_t* tables, int64_t first,
                        const half* mask, half* y, const Sizes* sizes, int64_t blocks, float scale, int threads) {
  masked(q, keys, values, tables, first, mask, y, *sizes, blocks, scale, threads);
}
}
