// Attention of one token of each sequence over a paged cache, of float or bfloat16: keys and values are read where they lie,
// once.

#define LANES 8  // what a head's size has to be a multiple of is twice as many

#include <algorithm>
#include <cmath>
#include <vector>

#include "numbers.hpp"

namespace {

struct Sizes {
  int64_t sequences, heads, kv_heads, key, value, blocks, block;  // key and value: multiples of RUN
};

template <class T> float product(const T* key, const float* query, int64_t size) {
  numbers even = {}, odd = {};
  for (int64_t i = 0; i < size; i += RUN) {
    even += take<0>(key + i) * load<numbers>(query + i);
    odd += take<1>(key + i) * load<numbers>(query + i + LANES);
  }
  return sum_of(even + odd);
}

template <class T> void add(const T* value, float weight, float* sums, int64_t size) {
  for (int64_t i = 0; i < size; i += RUN) {
    numbers row[2] = {take<0>(value + i), take<1>(value + i)};
    for (int part = 0; part < 2; part++) {
      float* to = sums + i + part * LANES;
      numbers sum = load<numbers>(to) + row[part] * weight;
      memcpy(to, &sum, sizeof sum);
    }
  }
}

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
      for (int64_t g = 0; g < group; g++)
        scores[g * count + s] = product(keys + at(s) * n.key, &query[g * n.key], n.key) * scale;
    for (int64_t g = 0; g < group; g++) {
      float* score = &scores[g * count];
      float most = -INFINITY, total = 0;
      for (int64_t s = 0; s < count; s++) most = score[s] > most ? score[s] : most;
      for (int64_t s = 0; s < count; s++) total += score[s] = std::exp(score[s] - most);
      std::fill(sums.begin(), sums.end(), 0.f);
      for (int64_t s = 0; s < count; s++) add(values + at(s) * n.value, score[s], sums.data(), n.value);
      for (int64_t i = 0; i < n.value; i++) store(y + (head + g) * n.value + i, sums[place(y, i)] / total);
    }
  }
}

}  // namespace

extern "C" {
void float32_attention(const float* q, const float* keys, const float* values, const int64_t* tables, int64_t first,
                       const float* mask, float* y, const Sizes* sizes, float scale, int threads) {
  attention(q, keys, values, tables, first, mask, y, *sizes, scale, threads);
}
void bfloat16_attention(const half* q, const half* keys, const half* values, const int64_t* tables, int64_t first,
                        const half* mask, half* y, const Sizes* sizes, float scale, int threads) {
  attention(q, keys, values, tables, first, mask, y, *sizes, scale, threads);
}
}
