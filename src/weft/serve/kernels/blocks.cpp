// A decoder's blocks, of a few tokens: hidden states in, hidden states out, in one call. Between two products there is so
// little to do that calling it takes longer than doing it, for what calls has been driven out of the caches by the matrix.
// Numbers are rounded where the model's own code rounds them (`models/decoder.py`).

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.hpp"

namespace {

template <class T> struct Matrix {
  const T *weight, *bias;  // no bias: null
};

// A block's weights, and its layer of the cache. What it has not is null.
template <class T> struct Block {
  Matrix<T> attention_norm, q, k, v, out, q_norm, k_norm, mlp_norm, router, gate, up, down;
  T *keys, *values;
};

struct Step {
  int64_t blocks, sequences, tokens, hidden, heads, kv_heads, head, ffn, block, table, window, means;
  int64_t experts, per_token, expert_ffn, normed;  // of a mixture: whether a token's weights add up to 1
  const int64_t *counts, *ends, *tables;  // of each sequence: tokens here, tokens up to the last of them, its blocks
  const float* frequencies;               // of the rotation, half a head's
  float eps, turned, scaling;
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

inline void scores_of(const float* x, const float* w, float* y, int64_t M, int64_t I, int64_t O, int threads) {
  product_of_rows(x, w, nullptr, y, M, I, O, threads);
}
inline void scores_of(const half* x, const half* w, float* y, int64_t M, int64_t I, int64_t O, int threads) {
  product_of_rows(x, w, y, M, I, O, threads);
}

// A token's experts, the likeliest first, and what each weighs.
void choose(const Step& n, const float* scores, int64_t* experts, float* weights) {
  std::vector<float> likely(scores, scores + n.experts);
  float most = *std::max_element(scores, scores + n.experts), total = 0, sum = 0;
  for (float& one : likely) total += one = std::exp(one - most);
  for (int64_t choice = 0; choice < n.per_token; choice++) {
    int64_t best = -1;
    for (int64_t expert = 0; expert < n.experts; expert++)
      if (std::find(experts, experts + choice, expert) == experts + choice)
        if (best < 0 || likely[expert] > likely[best]) best = expert;
    experts[choice] = best;
    sum += weights[choice] = likely[best] / total;
  }
  for (int64_t choice = 0; choice < n.per_token; choice++) weights[choice] *= n.scaling / (n.normed ? sum : 1);
}

// Tokens x [N, D], each through its experts' MLPs: the sums of what these give, to y. Of `down`, which is [F, D] for each
// expert, rows are added up, where of the others rows are multiplied with.
template <class T> void mix(const Block<T>& at, const T* x, T* y, const Step& n) {
  int64_t D = n.hidden, F = n.expert_ffn;
  std::vector<float> scores(n.tokens * n.experts), weights(n.tokens * n.per_token);
  std::vector<int64_t> chosen(n.tokens * n.per_token);
  std::vector<std::vector<int64_t>> pairs(n.experts);  // of a token and a choice
  std::vector<T> rows(chosen.size() * D);              // what each pair gives
  scores_of(x, at.router.weight, scores.data(), n.tokens, D, n.experts, n.threads);
  for (int64_t r = 0; r < n.tokens; r++)
    choose(n, &scores[r * n.experts], &chosen[r * n.per_token], &weights[r * n.per_token]);
  for (size_t pair = 0; pair < chosen.size(); pair++) pairs[chosen[pair]].push_back(pair);
  bool alone = n.threads == 1 || int64_t(chosen.size()) * F * D <= ALONE;
#pragma omp parallel for schedule(dynamic) num_threads(n.threads) if (!alone)
  for (int64_t expert = 0; expert < n.experts; expert++) {
    int64_t M = pairs[expert].size();
    if (M == 0) continue;
    std::vector<T> in(M * D), gate(M * F), up(M * F);
    std::vector<float> sums(M * D);
    const T *down = at.down.weight + expert * F * D;
    for (int64_t m = 0; m < M; m++) memcpy(&in[m * D], x + pairs[expert][m] / n.per_token * D, D * sizeof(T));
    product_of_rows(in.data(), at.gate.weight + expert * F * D, nullptr, gate.data(), M, D, F, 1);
    product_of_rows(in.data(), at.up.weight + expert * F * D, nullptr, up.data(), M, D, F, 1);
    activate(gate.data(), up.data(), M * F);
    for (int64_t m = 0; m < M; m++) {
      T weight;
      store(&weight, weights[pairs[expert][m]]);
      for (int64_t f = 0; f < F; f++) store(&up[m * F + f], widened(up[m * F + f]) * widened(weight));
    }
    auto add = [&](auto rows_at_once, int64_t f) {
      constexpr int P = decltype(rows_at_once)::value;
      for (int64_t m = 0; m < M; m++) {
        const T* some[P];
        float each[P];
        for (int p = 0; p < P; p++) some[p] = down + (f + p) * D, each[p] = widened(up[m * F + f + p]);
        add_rows(some, each, &sums[m * D], D);
      }
    };
    int64_t f = 0;
    for (; f + 4 <= F; f += 4) add(std::integral_constant<int, 4>(), f);
    for (; f < F; f++) add(std::integral_constant<int, 1>(), f);
    for (int64_t m = 0; m < M; m++) put_sums(&sums[m * D], 1, &rows[pairs[expert][m] * D], D);
  }
  for_rows(n, n.per_token * D, [&](int64_t r) {
    for (int64_t i = 0; i < D; i++) {
      float sum = 0;
      for (int64_t choice = 0; choice < n.per_token; choice++) sum += widened(rows[(r * n.per_token + choice) * D + i]);
      store(y + r * D + i, sum);
    }
  });
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
    if (at->router.weight) {
      mix(*at, normed.data(), normed.data(), n);
    } else {
      if (at->gate.weight) times(normed, at->gate, gate);
      times(normed, at->up, up);
      for_rows(n, n.ffn, [&](int64_t r) { activate(at->gate.weight ? &gate[r * n.ffn] : nullptr, &up[r * n.ffn], n.ffn); });
      times(up, at->down, normed);
    }
    add_to_x();
  }
}

}  // namespace

extern "C" {
void float32_blocks(const void* blocks, float* x, const Step* step) { run((const Block<float>*)blocks, x, *step); }
void bfloat16_blocks(const void* blocks, half* x, const Step* step) { run((const Block<half>*)blocks, x, *step); }
}
