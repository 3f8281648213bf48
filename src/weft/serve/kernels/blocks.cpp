// A decoder's blocks, of a few tokens: hidden states in, hidden states out, in one call. Between two products there is so
// little to do that calling it takes longer than doing it, for what calls has been driven out of the caches by the matrix.
// Numbers are rounded where the model's own code rounds them (`models/decoder.py`).

#include <cmath>
#include <vector>

#include "kernels.hpp"

namespace {

template <class T> struct Matrix {
  const T *weight, *bias;  // no bias: null
};

// A block's weights, and its layer of the cache. What it has not is null.
template <class T> struct Block {
  Matrix<T> attention_norm, q, k, v, out, q_norm, k_norm, mlp_norm, gate, up, down;
  T *keys, *values;
};

struct Step {
  int64_t blocks, sequences, tokens, hidden, heads, kv_heads, head, ffn, block, table, window, means;
  const int64_t *counts, *ends, *tables;  // of each sequence: tokens here, tokens up to the last of them, its blocks
  const float* frequencies;               // of the rotation, half a head's
  float eps, turned;
  int threads;
};

template <class F> void for_rows(const Step& n, int64_t width, F of_row) {
#pragma omp parallel for num_threads(n.threads) if (n.threads > 1 && n.tokens * width > ALONE)
  for (int64_t r = 0; r < n.tokens; r++) of_row(r);
}

// LayerNorm, or where means are not taken out, RMSNorm.
template <class T> void normalize(const T* x, Matrix<T> norm, T* y, int64_t size, bool means, float eps) {
  float mean = 0, square = 0;
  if (means) {
#pragma omp simd reduction(+ : mean)
    for (int64_t i = 0; i < size; i++) mean += widened(x[i]);
    mean /= size;
  }
#pragma omp simd reduction(+ : square)
  for (int64_t i = 0; i < size; i++) square += (widened(x[i]) - mean) * (widened(x[i]) - mean);
  float scale = 1 / std::sqrt(square / size + eps);
#pragma omp simd
  for (int64_t i = 0; i < size; i++)
    store(y + i, (widened(x[i]) - mean) * scale * widened(norm.weight[i]) + (norm.bias ? widened(norm.bias[i]) : 0));
}

inline float sigmoid(float x) {
  float e = exp_of(-std::fabs(x));
  return (x < 0 ? e : 1) / (1 + e);
}

// SiLU of the gate times up; where there is no gate, GELU in its tanh form, for 1 + tanh u is twice the sigmoid of 2u.
template <class T> void activate(const T* gate, T* up, int64_t size) {
  if (gate)
#pragma omp simd
    for (int64_t i = 0; i < size; i++) {
      float x = widened(gate[i]);
      T silu;
      store(&silu, x * sigmoid(x));
      store(up + i, widened(silu) * widened(up[i]));
    }
  else
#pragma omp simd
    for (int64_t i = 0; i < size; i++) {
      float x = widened(up[i]);
      store(up + i, x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x)));
    }
}

// Each pair of a head's first and second half is turned by its angle, whose cosines and sines these are.
template <class T> void rotate(T* x, const float* cosines, const float* sines, int64_t heads, int64_t half_size) {
  for (; heads; heads--, x += 2 * half_size)
#pragma omp simd
    for (int64_t i = 0; i < half_size; i++) {
      float first = widened(x[i]), second = widened(x[half_size + i]);
      store(x + i, first * cosines[i] - second * sines[i]);
      store(x + half_size + i, second * cosines[i] + first * sines[i]);
    }
}

template <class T> void run(const Block<T>* blocks, T* x, const Step& n) {
  int64_t D = n.hidden, Q = n.heads * n.head, K = n.kv_heads * n.head, half_size = n.frequencies ? n.head / 2 : 0;
  std::vector<T> normed(n.tokens * D), q(n.tokens * Q), k(n.tokens * K), v(n.tokens * K), y(n.tokens * Q),
      gate(n.tokens * n.ffn), up(n.tokens * n.ffn);
  std::vector<float> cosines(n.tokens * half_size), sines(n.tokens * half_size);
  std::vector<int64_t> slots(n.tokens);
  std::vector<Seen> seen(n.tokens);
  for (int64_t s = 0, r = 0; s < n.sequences; s++)
    for (int64_t place = n.ends[s] - n.counts[s]; place < n.ends[s]; place++, r++) {
      const int64_t* table = n.tables + s * n.table;
      seen[r] = {table, 0, n.window && place >= n.window ? place + 1 - n.window : 0, place + 1};
      slots[r] = table[place / n.block] * n.block + place % n.block;
      for (int64_t i = 0; i < half_size; i++) {
        float angle = place * n.frequencies[i];
        cosines[r * half_size + i] = std::cos(angle) * n.turned, sines[r * half_size + i] = std::sin(angle) * n.turned;
      }
    }
  auto times = [&](const std::vector<T>& x, Matrix<T> w, std::vector<T>& y) {
    product_of_rows(x.data(), w.weight, w.bias, y.data(), n.tokens, x.size() / n.tokens, y.size() / n.tokens, n.threads);
  };
  auto norm_of = [&](Matrix<T> norm) {
    for_rows(n, D, [&](int64_t r) { normalize(x + r * D, norm, &normed[r * D], D, n.means, n.eps); });
  };
  auto add_to_x = [&] {
#pragma omp simd
    for (int64_t i = 0; i < n.tokens * D; i++) store(x + i, widened(x[i]) + widened(normed[i]));
  };
  auto place_heads = [&](T* heads, int64_t r, int64_t count, Matrix<T> norm) {
    for (int64_t h = 0; norm.weight && h < count; h++)
      normalize(heads + h * n.head, norm, heads + h * n.head, n.head, false, n.eps);
    if (n.frequencies) rotate(heads, &cosines[r * half_size], &sines[r * half_size], count, half_size);
  };

  for (const Block<T>* at = blocks; at < blocks + n.blocks; at++) {
    norm_of(at->attention_norm);
    times(normed, at->q, q);
    times(normed, at->k, k);
    times(normed, at->v, v);
    for_rows(n, Q, [&](int64_t r) {
      place_heads(&q[r * Q], r, n.heads, at->q_norm);
      place_heads(&k[r * K], r, n.kv_heads, at->k_norm);
      memcpy(at->keys + slots[r] * K, &k[r * K], K * sizeof(T));
      memcpy(at->values + slots[r] * K, &v[r * K], K * sizeof(T));
    });
    attention<T>(q.data(), at->keys, at->values, seen.data(), y.data(),
                 {n.tokens, n.heads, n.kv_heads, n.head, n.head, n.block}, 1 / std::sqrt(float(n.head)), n.threads);
    times(y, at->out, normed);
    add_to_x();
    norm_of(at->mlp_norm);
    if (at->gate.weight) times(normed, at->gate, gate);
    times(normed, at->up, up);
    for_rows(n, n.ffn, [&](int64_t r) { activate(at->gate.weight ? &gate[r * n.ffn] : nullptr, &up[r * n.ffn], n.ffn); });
    times(up, at->down, normed);
    add_to_x();
  }
}

}  // namespace

extern "C" {
void float32_blocks(const void* blocks, float* x, const Step* step) { run((const Block<float>*)blocks, x, *step); }
void bfloat16_blocks(const void* blocks, half* x, const Step* step) { run((const Block<half>*)blocks, x, *step); }
}
