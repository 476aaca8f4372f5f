// Products of few rows with large matrices: what counts is how fast weights are read.
//
// Sums are in float32 and in an order that depends on nothing but the matrix: a row gets the same bits whatever rows
// are beside it. Vectors are those of GCC and Clang, so one source serves every CPU.
//
// Names: R rows, I inputs, O outputs of a product; T is the data type of the weights.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr int ROWS = 4, COLUMNS = LANES == 16 ? 4 : 2;  // of a tile, whose sums stay in registers

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
struct bfloat16 {
    uint16_t bits;
};

static inline Floats load(const float* from) {
    Floats x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

static inline Floats load(const bfloat16* from) {
    Halves x;
    std::memcpy(&x, from, sizeof x);
    return (Floats)(__builtin_convertvector(x, Bits) << 16);
}

// Into the second cache, some 64 KB ahead: this, and nothing that loads sooner or into the first cache, doubles the speed
// of reading weights (eval/LOG.md). It may point behind a matrix.
constexpr int64_t AHEAD = 65536;

template <class T>
static inline void prefetch(const T* from, int64_t ahead) {
    __builtin_prefetch((const char*)from + ahead, 0, 2);
}

// Keeps the compiler from loading x again for every product with it: loads are what a tile in the cache waits for.
#if defined(__x86_64__)
static inline void pin(Floats& x) { asm("" : "+v"(x)); }
#else
static inline void pin(Floats&) {}
#endif

static inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }

static inline float one(const float* from) { return *from; }

static inline float one(const bfloat16* from) {
    uint32_t bits = (uint32_t)from->bits << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

static inline void put(float* to, float x) { *to = x; }

static inline void put(bfloat16* to, float x) {  // to the nearest, ties to even, as in torch
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    to->bits = x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0;
}

typedef float Four __attribute__((vector_size(16)));

static inline Four fold(Floats x) {
    Four parts[LANES / 4];
    std::memcpy(parts, &x, sizeof x);
    if (LANES == 16) return (parts[0] + parts[2]) + (parts[1] + parts[3]);
    return parts[0] + parts[1];
}

static inline float sum(Floats x) {
    Four four = fold(x);
    return (four[0] + four[2]) + (four[1] + four[3]);
}

// The sums of four vectors, added up as `sum` does.
static inline Four sums_of(Floats a, Floats b, Floats c, Floats d) {
#ifdef __AVX512F__
#define HALVES(a, b, i) \
    __builtin_shufflevector(a, b, i, i + 1, i + 2, i + 3, i + 4, i + 5, i + 6, i + 7, i + 16, i + 17, i + 18, i + 19, \
                            i + 20, i + 21, i + 22, i + 23)
#define QUARTERS(a, b, i) \
    __builtin_shufflevector(a, b, i, i + 1, i + 2, i + 3, i + 8, i + 9, i + 10, i + 11, i + 16, i + 17, i + 18, i + 19, \
                            i + 24, i + 25, i + 26, i + 27)
    Floats ab = HALVES(a, b, 0) + HALVES(a, b, 8), cd = HALVES(c, d, 0) + HALVES(c, d, 8);
    Floats all = QUARTERS(ab, cd, 0) + QUARTERS(ab, cd, 4);
    all += __builtin_shufflevector(all, all, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    all += __builtin_shufflevector(all, all, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    return __builtin_shufflevector(all, all, 0, 4, 8, 12);
#else
    return Four{sum(a), sum(b), sum(c), sum(d)};
#endif
}

// Memory of this thread, which grows and is kept: a new one would cost page faults in every call.
template <int NAME>
static float* scratch(int64_t size) {
    static thread_local struct Memory {
        float* floats = nullptr;
        int64_t size = 0;
        ~Memory() { std::free(floats); }
    } memory;
    if (memory.size < size) {
        std::free(memory.floats);
        memory.floats = (float*)std::aligned_alloc(64, (size * 4 + 63) / 64 * 64);
        if (!memory.floats) std::abort();
        memory.size = size;
    }
    return memory.floats;
}

// ---- y[r, o] = sum_i x[r, i] * w[o, i] ----

template <int R, int O, bool CACHED, class T>
static inline void dot_tile(const float* x, int64_t x_step, const T* w, int64_t w_step, int64_t inputs, float* y,
                            int64_t y_step, int64_t ahead) {
    Floats sums[R][O] = {};
    int64_t i = 0;
    for (; i + LANES <= inputs; i += LANES) {
        Floats weights[O];
        for (int o = 0; o < O; o++) {
            weights[o] = load(w + o * w_step + i);
            CACHED ? pin(weights[o]) : prefetch(w + o * w_step + i, ahead);
        }
        for (int r = 0; r < R; r++) {
            Floats row = load(x + r * x_step + i);
            if (CACHED) pin(row);
            for (int o = 0; o < O; o++) sums[r][o] += row * weights[o];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        float totals[O];
        if constexpr (O == 4) {
            Four four = sums_of(sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
            std::memcpy(totals, &four, sizeof four);
        } else
            totals[0] = sum(sums[r][0]);
        std::memcpy(y + r * y_step, totals, sizeof totals);
    }
    for (; i < inputs; i++)
        for (int r = 0; r < R; r++)
            for (int o = 0; o < O; o++) y[r * y_step + o] += x[r * x_step + i] * one(w + o * w_step + i);
}

template <int O, class T>
static inline void dot_rows(const float* x, int64_t x_step, int64_t rows, const T* w, int64_t w_step, int64_t inputs,
                            float* y, int64_t y_step, int64_t ahead) {
    for (bool first = true; rows >= ROWS; first = false, rows -= ROWS, x += ROWS * x_step, y += ROWS * y_step)
        first ? dot_tile<ROWS, O, false>(x, x_step, w, w_step, inputs, y, y_step, ahead)
              : dot_tile<ROWS, O, true>(x, x_step, w, w_step, inputs, y, y_step, ahead);
    if (rows == 3) dot_tile<3, O, false>(x, x_step, w, w_step, inputs, y, y_step, ahead);
    if (rows == 2) dot_tile<2, O, false>(x, x_step, w, w_step, inputs, y, y_step, ahead);
    if (rows == 1) dot_tile<1, O, false>(x, x_step, w, w_step, inputs, y, y_step, ahead);
}

// What lies `ahead` bytes behind w is needed next.
template <class T>
static void times_transposed(const float* x, int64_t x_step, int64_t rows, const T* w, int64_t w_step, int64_t inputs,
                             int64_t outputs, float* y, int64_t y_step, int64_t ahead = AHEAD) {
    int64_t o = 0;
    for (; o + 4 <= outputs; o += 4) dot_rows<4>(x, x_step, rows, w + o * w_step, w_step, inputs, y + o, y_step, ahead);
    for (; o < outputs; o++) dot_rows<1>(x, x_step, rows, w + o * w_step, w_step, inputs, y + o, y_step, ahead);
}

// ---- y[r, o] = sum_i x[r, i] * w[i, o] ----

template <int R, int C, bool CACHED, class T>
static inline void sum_tile(const float* x, int64_t x_step, const T* w, int64_t w_step, int64_t inputs, float* y,
                            int64_t y_step, int64_t ahead) {
    Floats sums[R][C];
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) sums[r][c] = load(y + r * y_step + c * LANES);
    for (int64_t i = 0; i < inputs; i++, w += w_step) {
        Floats weights[C];
        for (int c = 0; c < C; c++) {
            weights[c] = load(w + c * LANES);
            CACHED ? pin(weights[c]) : prefetch(w + c * LANES, ahead);
        }
        for (int r = 0; r < R; r++) {
            Floats row = Floats{} + x[r * x_step + i];
            if (CACHED) pin(row);
            for (int c = 0; c < C; c++) sums[r][c] += row * weights[c];
        }
    }
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) store(y + r * y_step + c * LANES, sums[r][c]);
}

template <int C, class T>
static inline void sum_rows(const float* x, int64_t x_step, int64_t rows, const T* w, int64_t w_step, int64_t inputs,
                            float* y, int64_t y_step, int64_t ahead) {
    for (bool first = true; rows >= ROWS; first = false, rows -= ROWS, x += ROWS * x_step, y += ROWS * y_step)
        first ? sum_tile<ROWS, C, false>(x, x_step, w, w_step, inputs, y, y_step, ahead)
              : sum_tile<ROWS, C, true>(x, x_step, w, w_step, inputs, y, y_step, ahead);
    if (rows == 3) sum_tile<3, C, false>(x, x_step, w, w_step, inputs, y, y_step, ahead);
    if (rows == 2) sum_tile<2, C, false>(x, x_step, w, w_step, inputs, y, y_step, ahead);
    if (rows == 1) sum_tile<1, C, false>(x, x_step, w, w_step, inputs, y, y_step, ahead);
}

// Whole rows of w after each other, some 64 KB at a time, so that it is read in the order of memory; `next` is the
// matrix after it, and `cached` says that this one was prefetched as such.
template <class T>
static void times(const float* x, int64_t x_step, int64_t rows, const T* w, int64_t w_step, int64_t inputs,
                  int64_t outputs, float* y, int64_t y_step, const T* next, bool cached) {
    for (int64_t r = 0; r < rows; r++) std::memset(y + r * y_step, 0, outputs * sizeof *y);
    int64_t depth = std::max<int64_t>(AHEAD / (w_step * sizeof(T)), 4);
    for (int64_t from = 0; from < inputs; from += depth, x += depth, w += depth * w_step) {
        int64_t size = std::min(depth, inputs - from), o = 0;
        int64_t ahead = (from + depth < inputs && !cached ? depth * w_step : next - w) * sizeof(T);
        if (cached) next += depth * w_step;
        for (; rows <= 2 && o + 2 * COLUMNS * LANES <= outputs; o += 2 * COLUMNS * LANES)
            sum_rows<2 * COLUMNS>(x, x_step, rows, w + o, w_step, size, y + o, y_step, ahead);
        for (; o + COLUMNS * LANES <= outputs; o += COLUMNS * LANES)
            sum_rows<COLUMNS>(x, x_step, rows, w + o, w_step, size, y + o, y_step, ahead);
        for (; o + LANES <= outputs; o += LANES) sum_rows<1>(x, x_step, rows, w + o, w_step, size, y + o, y_step, ahead);
        for (; o < outputs; o++)
            for (int64_t r = 0; r < rows; r++)
                for (int64_t i = 0; i < size; i++) y[r * y_step + o] += x[r * x_step + i] * one(w + i * w_step + o);
    }
}
