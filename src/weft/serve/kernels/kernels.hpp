// The kernels, for one another: `rows.cpp`, `tiles.cpp` and `attention.cpp` say what they do.

#include "numbers.hpp"

// Of a token: where its sequence's keys and values lie, and which places of them it sees.
struct Seen {
  const int64_t* table;  // its blocks' numbers; null: they lie in a row, from `first` on
  int64_t first, start, stop;
};

struct Sizes {
  int64_t tokens, heads, kv_heads, key, value, block;
};

void product_of_rows(const float* x, const float* w, const float* bias, float* y, int64_t M, int64_t I, int64_t O, int threads);
void product_of_rows(const half* x, const half* w, const half* bias, half* y, int64_t M, int64_t I, int64_t O, int threads);
void product_of_rows(const half* x, const half* w, float* y, int64_t M, int64_t I, int64_t O, int threads);

bool product_of_tiles(const half* x, const half* w, const half* bias, half* y, int64_t M, int64_t I, int64_t O, int threads);

template <class T>
void attention(const T* q, const T* keys, const T* values, const Seen* seen, T* y, Sizes n, float scale, int threads);
