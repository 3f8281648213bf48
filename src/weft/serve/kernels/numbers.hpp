// Vectors of numbers, for the CPU that this is compiled on, in the vectors of GCC and Clang. Of bfloat16, the upper half of
// a float, a run is one vector: of two in one word, a shift makes the even one a float, and a mask the odd one. So where
// floats meet a run of them, the even numbers stand first (`spread`).

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

namespace {

#ifdef __AVX512F__
constexpr int64_t LANES = 16;  // floats in a vector
#else
constexpr int64_t LANES = 8;
#endif
constexpr int64_t RUN = 2 * LANES;
constexpr int64_t ALONE = 1 << 17;  // numbers to read for which no other thread is woken

using half = uint16_t;
using words = uint32_t __attribute__((vector_size(4 * LANES)));
using numbers = float __attribute__((vector_size(4 * LANES)));

template <class T> T load(const void* from) {
  T to;
  memcpy(&to, from, sizeof to);
  return to;
}

inline float widened(float x) { return x; }
inline float widened(half x) {
  uint32_t word = uint32_t(x) << 16;
  return load<float>(&word);
}

inline void store(float* to, float x) { *to = x; }
inline void store(half* to, float x) {  // to the nearest, and of two to the even one
  uint32_t word = load<uint32_t>(&x);
  *to = x == x ? (word + 0x7fff + (word >> 16 & 1)) >> 16 : 0x7fc0;
}

template <int PART> numbers take(const float* run) { return load<numbers>(run + PART * LANES); }
template <int PART> numbers take(const half* run) {
  words both = load<words>(run);
  return (numbers)(PART ? both & 0xffff0000u : both << 16);
}

inline void put(float* to, numbers lanes) { memcpy(to, &lanes, sizeof lanes); }

// e to the x, of x <= 0, a number or a vector of them: two to a whole number, which is an exponent, times e to what is left,
// by its series.
template <class V> V exp_of(V x) {
  using bits = std::conditional_t<std::is_same_v<V, float>, uint32_t, words>;
  V least = V{} - 87.f;
  x = x < least ? least : x;  // so that what is no number stays none
  V shifted = x * 1.44269504f + 12582912.f;  // its last bits are the whole number
  V left = x - (shifted - 12582912.f) * 0.693147181f;
  V power = V{} + 1 / 720.f;
  for (float part : {1 / 120.f, 1 / 24.f, 1 / 6.f, 1 / 2.f, 1.f, 1.f}) power = power * left + part;
  return load<V>(&(const bits&)(load<bits>(&power) + (load<bits>(&shifted) << 23)));
}

inline float sum_of(numbers lanes) {
  for (int64_t half = LANES / 2; half; half /= 2)
    for (int64_t lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

// Where the numbers of a row stand for `take`, and a row that stands so; what is less than a run stays as it is.
inline int64_t place(const float*, int64_t i) { return i; }
inline int64_t place(const half*, int64_t i) { return i / RUN * RUN + i % RUN / 2 + i % 2 * LANES; }

template <class T> void spread(const T* x, float* to, int64_t size) {
  for (int64_t i = 0; i < size; i++) to[i < size / RUN * RUN ? place(x, i) : i] = widened(x[i]);
}

// P rows, each by its weight, to the sums [size], which stand so.
template <class T, int P> void add_rows(const T* (&rows)[P], const float (&weights)[P], float* sums, int64_t size) {
  int64_t i = 0;
  for (; i + RUN <= size; i += RUN) {
    numbers even = load<numbers>(sums + i), odd = load<numbers>(sums + i + LANES);
    for (int p = 0; p < P; p++) {
      even += take<0>(rows[p] + i) * weights[p];
      odd += take<1>(rows[p] + i) * weights[p];
    }
    put(sums + i, even);
    put(sums + i + LANES, odd);
  }
  for (; i < size; i++)
    for (int p = 0; p < P; p++) sums[i] += widened(rows[p][i]) * weights[p];
}

// Such sums, scaled, back in their order.
template <class T> void put_sums(const float* sums, float scale, T* y, int64_t size) {
  for (int64_t i = 0; i < size; i++) store(y + i, sums[i < size / RUN * RUN ? place(y, i) : i] * scale);
}

}  // namespace
