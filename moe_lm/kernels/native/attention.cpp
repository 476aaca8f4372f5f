// Causal attention within segments for training on a CPU that multiplies bfloat16: forward and backward.
//
// A product of tiles needs one side with pairs of neighbouring summands in 32 bits, 16 of them in a register, and of the
// other side one pair at a time. So one side is rearranged once for each segment and head, and the other read as it is:
//
//   scores  S[i, j]  = q[i] k[j]     k as pairs of entries by keys
//   output  O[i]     = P[i] v        v as pairs of keys by entries
//   S'[j, i], dP'[j, i] = v[j] dO[i] q and dO as pairs of entries by queries
//   dV[j] = P'[j] dO, dK[j] = dS'[j] q   dO and q as pairs of queries by entries
//   dQ[i] = dS[i] k                  k as pairs of keys by entries
//
// With S and dP transposed, P' and dS' leave the registers as the rows that the next products read. A whole row of scores
// is kept, so softmax is the plain one (no running maximum). Sums are in float32; P and dS are rounded, as in torch.
//
// Names: T tokens, L tokens of a segment, H query heads, N entries of a query, M of a value; i a query, j a key.

#include <cstddef>
#include <cstdint>

#include "threads.hpp"

#ifdef __AVX512BF16__
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>

typedef uint16_t bfloat16;
typedef uint32_t Pair;  // two neighbouring summands

constexpr int64_t LANES = 16, ROWS = 4, BLOCK = 32;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

static int64_t up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Memory of one thread, handed out piece by piece and kept for the next call.
struct Scratch {
    std::unique_ptr<char, void (*)(void*)> memory{nullptr, std::free};
    size_t size = 0, used = 0;

    void reserve(size_t bytes) {
        used = 0;
        if (bytes <= size) return;
        size = up(bytes, 4096);
        memory.reset((char*)std::aligned_alloc(4096, size));
    }
    template <class T>
    static size_t bytes(int64_t count) {
        return up(count * sizeof(T), 64);
    }
    template <class T>
    T* take(int64_t count) {
        T* piece = (T*)(memory.get() + used);
        used += bytes<T>(count);
        return piece;
    }
};
static thread_local Scratch scratch;

// Rows of one head: those of neighbouring tokens are `stride` numbers apart.
struct Rows {
    const bfloat16* data;
    int64_t stride;
    const bfloat16* operator[](int64_t row) const { return data + row * stride; }
};

static inline Pair pair_at(const void* from) {
    Pair x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

static inline __m512i both(__m256i first, __m256i second) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
}

static inline __m256i rounded(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

// Pairs of rows by entries, `[up(rows, 2 * LANES) / 2, size]`; zeros behind the last row.
static void interleave(Rows from, int64_t rows, int64_t size, Pair* to) {
    for (int64_t p = 0; p < up(rows, 2 * LANES) / 2; p++) {
        for (int64_t n = 0; n < size; n += LANES) {
            __m256i first = _mm256_setzero_si256(), second = first;
            if (2 * p < rows) first = _mm256_loadu_si256((const __m256i*)(from[2 * p] + n));
            if (2 * p + 1 < rows) second = _mm256_loadu_si256((const __m256i*)(from[2 * p + 1] + n));
            _mm512_store_si512(to + p * size + n, both(first, second));
        }
    }
}

// Pairs of entries by rows, `[size / 2, width]` with width = up(rows, LANES); zeros behind the last row.
static void transpose(Rows from, int64_t rows, int64_t size, Pair* to, int64_t width) {
    for (int64_t row = 0; row < width; row += LANES) {
        for (int64_t p = 0; p < size / 2; p += LANES) {
            __mmask16 wanted = (__mmask16)((1u << std::min(LANES, size / 2 - p)) - 1);
            __m512i x[LANES], y[LANES];
            for (int64_t r = 0; r < LANES; r++)
                x[r] = row + r < rows ? _mm512_maskz_loadu_epi32(wanted, from[row + r] + 2 * p) : _mm512_setzero_si512();
            for (int r = 0; r < 8; r++) {
                y[2 * r] = _mm512_unpacklo_epi32(x[2 * r], x[2 * r + 1]);
                y[2 * r + 1] = _mm512_unpackhi_epi32(x[2 * r], x[2 * r + 1]);
            }
            for (int r = 0; r < 4; r++) {
                x[4 * r] = _mm512_unpacklo_epi64(y[4 * r], y[4 * r + 2]);
                x[4 * r + 1] = _mm512_unpackhi_epi64(y[4 * r], y[4 * r + 2]);
                x[4 * r + 2] = _mm512_unpacklo_epi64(y[4 * r + 1], y[4 * r + 3]);
                x[4 * r + 3] = _mm512_unpackhi_epi64(y[4 * r + 1], y[4 * r + 3]);
            }
            for (int r = 0; r < 4; r++) {
                y[r] = _mm512_shuffle_i32x4(x[r], x[4 + r], 0x88);
                y[4 + r] = _mm512_shuffle_i32x4(x[r], x[4 + r], 0xdd);
                y[8 + r] = _mm512_shuffle_i32x4(x[8 + r], x[12 + r], 0x88);
                y[12 + r] = _mm512_shuffle_i32x4(x[8 + r], x[12 + r], 0xdd);
            }
            for (int r = 0; r < 8; r++) {
                x[r] = _mm512_shuffle_i32x4(y[r], y[8 + r], 0x88);
                x[8 + r] = _mm512_shuffle_i32x4(y[r], y[8 + r], 0xdd);
            }
            for (int64_t c = 0; c < std::min(LANES, size / 2 - p); c++)
                _mm512_store_si512(to + (p + c) * width + row, x[c]);
        }
    }
}

// sums[r][c] += sum over p of a(r, p) * b[p][c], where a(r, p) is the pair at a + r * row + p * step
template <int R, int C>
static inline void tile(
    const Pair* a, int64_t row, int64_t step, const Pair* b, int64_t width, int64_t pairs, __m512 (&sums)[R][C]) {
    for (int64_t p = 0; p < pairs; p++) {
        __m512bh right[C];
        for (int c = 0; c < C; c++) right[c] = (__m512bh)_mm512_load_si512(b + p * width + c * LANES);
        for (int r = 0; r < R; r++) {
            __m512bh left = (__m512bh)_mm512_set1_epi32((int)pair_at((const char*)a + (r * row + p * step) * 4));
            for (int c = 0; c < C; c++) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], left, right[c]);
        }
    }
}

template <int R, int C, class Store>
static inline void product_tile(const Pair* a, int64_t row, int64_t step, const Pair* b, int64_t width, int64_t pairs,
    int64_t r0, int64_t c0, const Store& store) {
    __m512 sums[R][C] = {};
    tile<R, C>(a + r0 * row, row, step, b + c0, width, pairs, sums);
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) store(r0 + r, c0 + c * LANES, sums[r][c]);
}

// store(r, c, 16 sums of row r from column c on) for all rows and columns of a product
template <class Store>
static inline void product(int64_t rows, int64_t columns, const Pair* a, int64_t row, int64_t step, const Pair* b,
    int64_t width, int64_t pairs, const Store& store) {
    for (int64_t c = 0; c < columns;) {
        int64_t wide = std::min<int64_t>(4, (columns - c) / LANES);
        for (int64_t r = 0; r < rows;) {
            int64_t high = std::min<int64_t>(ROWS, rows - r);
#define TILE(R, C) product_tile<R, C>(a, row, step, b, width, pairs, r, c, store)
#define HEIGHTS(C) high == 4 ? TILE(4, C) : high == 3 ? TILE(3, C) : high == 2 ? TILE(2, C) : TILE(1, C)
            if (wide == 4) HEIGHTS(4);
            else if (wide == 3) HEIGHTS(3);
            else if (wide == 2) HEIGHTS(2);
            else HEIGHTS(1);
            r += high;
        }
        c += wide * LANES;
    }
}

static inline __m512 exp2_of(__m512 x) {  // to 3e-7
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(x, whole), sum = _mm512_set1_ps(1.535336188e-4f);
    for (float factor : {1.339887440e-3f, 9.618437357e-3f, 5.550332548e-2f, 2.402264791e-1f, 6.931472028e-1f, 1.0f})
        sum = _mm512_fmadd_ps(sum, f, _mm512_set1_ps(factor));
    return _mm512_scalef_ps(sum, whole);
}

struct Shape {
    int64_t segments, heads, key_heads, size, values;
    int64_t q_token, q_head, k_token, k_head, v_token, v_head;
    float scale;
};

// A block of queries from `first` on against the keys up to them.
static void attend(Rows q, const Pair* k, const Pair* v, int64_t first, int64_t length, const Shape& shape,
    float* scores, bfloat16* weights, bfloat16* out, int64_t out_stride, float* log_sum) {
    int64_t width = up(length, LANES), rows = std::min(BLOCK, length - first), keys = up(first + rows, LANES);
    int64_t place = up(length, 2 * LANES);
    __m512 factor = _mm512_set1_ps(shape.scale * LOG2E);
    product(rows, keys, (const Pair*)q[first], q.stride / 2, 1, k, width, shape.size / 2,
        [&](int64_t r, int64_t c, __m512 x) { _mm512_store_ps(scores + r * place + c, _mm512_mul_ps(x, factor)); });
    float inverse[BLOCK];
    for (int64_t r = 0; r < rows; r++) {
        float* row = scores + r * place;
        int64_t seen = first + r + 1;
        auto mask = [&](int64_t c) { return (__mmask16)(seen - c >= LANES ? 0xffff : (1u << (seen - c)) - 1); };
        __m512 largest = _mm512_set1_ps(-INFINITY);
        for (int64_t c = 0; c < seen; c += LANES)
            largest = _mm512_mask_max_ps(largest, mask(c), _mm512_load_ps(row + c), largest);
        float maximum = _mm512_reduce_max_ps(largest);
        __m512 sum = _mm512_setzero_ps(), shift = _mm512_set1_ps(maximum);
        for (int64_t c = 0; c < up(keys, 2 * LANES); c += LANES) {
            __m512 x = _mm512_setzero_ps();
            if (c < seen) x = _mm512_maskz_mov_ps(mask(c), exp2_of(_mm512_sub_ps(_mm512_load_ps(row + c), shift)));
            sum = _mm512_add_ps(sum, x);
            _mm256_store_si256((__m256i*)(weights + r * place + c), rounded(x));
        }
        float total = _mm512_reduce_add_ps(sum);
        inverse[r] = 1 / total;
        log_sum[first + r] = maximum * LN2 + std::log(total);
    }
    product(rows, shape.values, (const Pair*)weights, place / 2, 1, v, shape.values, up(keys, 2) / 2,
        [&](int64_t r, int64_t c, __m512 x) {
            __m256i y = rounded(_mm512_mul_ps(x, _mm512_set1_ps(inverse[r])));
            _mm256_storeu_si256((__m256i*)(out + (first + r) * out_stride + c), y);
        });
}

static void forward_segment(const Shape& shape, const bfloat16* q, const bfloat16* k, const bfloat16* v, bfloat16* out,
    float* log_sum, int64_t tokens, int64_t start, int64_t length, int64_t key_head) {
    int64_t sharing = shape.heads / shape.key_heads, width = up(length, LANES), place = up(length, 2 * LANES);
    scratch.reserve(Scratch::bytes<Pair>(shape.size / 2 * width) + Scratch::bytes<Pair>(place / 2 * shape.values) +
        Scratch::bytes<float>(BLOCK * place) + Scratch::bytes<bfloat16>(BLOCK * place));
    Pair* keys = scratch.take<Pair>(shape.size / 2 * width);
    Pair* values = scratch.take<Pair>(place / 2 * shape.values);
    float* scores = scratch.take<float>(BLOCK * place);
    bfloat16* weights = scratch.take<bfloat16>(BLOCK * place);
    transpose({k + start * shape.k_token + key_head * shape.k_head, shape.k_token}, length, shape.size, keys, width);
    interleave({v + start * shape.v_token + key_head * shape.v_head, shape.v_token}, length, shape.values, values);
    for (int64_t head = key_head * sharing; head < (key_head + 1) * sharing; head++) {
        Rows queries{q + start * shape.q_token + head * shape.q_head, shape.q_token};
        for (int64_t first = 0; first < length; first += BLOCK)
            attend(queries, keys, values, first, length, shape, scores, weights,
                out + (start * shape.heads + head) * shape.values, shape.heads * shape.values,
                log_sum + head * tokens + start);
    }
}

// What a block of keys needs of the queries of one head.
struct Queries {
    const Pair *q_by_row, *q_by_pair, *grad_by_row, *grad_by_pair;  // see the top: pairs of entries, pairs of queries
    const float *log_sum, *delta;  // by query; the first times log2(e)
};

// P' and dS' of R keys from `key` on and 2 * LANES queries from i on.
template <int R>
static inline void weigh(Rows k, Rows v, const Queries& of, const Shape& shape, int64_t key, int64_t i, int64_t length,
    int64_t width, int64_t r0, int64_t place, bfloat16* weights, bfloat16* slopes, Pair* slopes_by_pair) {
    constexpr int C = 2;
    __m512 scores[R][C] = {}, products[R][C] = {};
    tile<R, C>((const Pair*)k[key], k.stride / 2, 1, of.q_by_row + i, width, shape.size / 2, scores);
    tile<R, C>((const Pair*)v[key], v.stride / 2, 1, of.grad_by_row + i, width, shape.values / 2, products);
    __m512 factor = _mm512_set1_ps(shape.scale * LOG2E), scale = _mm512_set1_ps(shape.scale);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int c = 0; c < C; c++) {
        int64_t column = i + c * LANES;
        __m512 log_sum = _mm512_load_ps(of.log_sum + column), delta = _mm512_load_ps(of.delta + column);
        __m512i query = _mm512_add_epi32(lanes, _mm512_set1_epi32((int)column));
        __mmask16 inside = _mm512_cmplt_epi32_mask(query, _mm512_set1_epi32((int)length));
        __m256i slope[R + R % 2];
        if (R % 2) slope[R] = _mm256_setzero_si256();
        for (int r = 0; r < R; r++) {
            __mmask16 seen = _mm512_mask_cmpge_epi32_mask(inside, query, _mm512_set1_epi32((int)(key + r)));
            __m512 p = _mm512_maskz_mov_ps(seen, exp2_of(_mm512_fmsub_ps(scores[r][c], factor, log_sum)));
            __m512 s = _mm512_mul_ps(_mm512_mul_ps(p, scale), _mm512_sub_ps(products[r][c], delta));
            slope[r] = rounded(_mm512_maskz_mov_ps(seen, s));
            _mm256_store_si256((__m256i*)(weights + (r0 + r) * place + column), rounded(p));
            _mm256_store_si256((__m256i*)(slopes + (r0 + r) * place + column), slope[r]);
        }
        for (int r = 0; r < R; r += 2)
            _mm512_store_si512(slopes_by_pair + (r0 + r) / 2 * place + column, both(slope[r], slope[r + 1]));
    }
}

static void backward_segment(const Shape& shape, const bfloat16* grad, const bfloat16* q, const bfloat16* k,
    const bfloat16* v, const bfloat16* out, const float* log_sum, bfloat16* q_grad, bfloat16* k_grad, bfloat16* v_grad,
    int64_t tokens, int64_t start, int64_t length, int64_t key_head) {
    const int64_t size = shape.size, values = shape.values, sharing = shape.heads / shape.key_heads;
    const int64_t place = up(length, 2 * LANES);  // queries, and keys, with room for whole tiles
    size_t bytes = 2 * Scratch::bytes<Pair>(size / 2 * place) + Scratch::bytes<Pair>(size / 2 * place) +
        2 * Scratch::bytes<Pair>(values / 2 * place) + 2 * Scratch::bytes<float>(place) +
        2 * Scratch::bytes<float>(place * size) + Scratch::bytes<float>(place * values) +
        2 * Scratch::bytes<bfloat16>(BLOCK * place) + Scratch::bytes<Pair>(BLOCK / 2 * place);
    scratch.reserve(bytes);
    Pair *k_by_pair = scratch.take<Pair>(size / 2 * place), *q_by_row = scratch.take<Pair>(size / 2 * place);
    Pair *q_by_pair = scratch.take<Pair>(size / 2 * place), *grad_by_row = scratch.take<Pair>(values / 2 * place);
    Pair* grad_by_pair = scratch.take<Pair>(values / 2 * place);
    float *logs = scratch.take<float>(place), *delta = scratch.take<float>(place);
    float *q_sum = scratch.take<float>(place * size), *k_sum = scratch.take<float>(place * size);
    float* v_sum = scratch.take<float>(place * values);
    bfloat16 *weights = scratch.take<bfloat16>(BLOCK * place), *slopes = scratch.take<bfloat16>(BLOCK * place);
    Pair* slopes_by_pair = scratch.take<Pair>(BLOCK / 2 * place);

    Rows keys{k + start * shape.k_token + key_head * shape.k_head, shape.k_token};
    Rows key_values{v + start * shape.v_token + key_head * shape.v_head, shape.v_token};
    interleave(keys, length, size, k_by_pair);
    std::memset(k_sum, 0, place * size * sizeof(float));
    std::memset(v_sum, 0, place * values * sizeof(float));
    for (int64_t head = key_head * sharing; head < (key_head + 1) * sharing; head++) {
        Rows queries{q + start * shape.q_token + head * shape.q_head, shape.q_token};
        int64_t offset = (start * shape.heads + head) * values;
        Rows grads{grad + offset, shape.heads * values}, outs{out + offset, shape.heads * values};
        transpose(queries, length, size, q_by_row, place);
        interleave(queries, length, size, q_by_pair);
        transpose(grads, length, values, grad_by_row, place);
        interleave(grads, length, values, grad_by_pair);
        for (int64_t i = 0; i < place; i++) logs[i] = i < length ? log_sum[head * tokens + start + i] * LOG2E : 0;
        for (int64_t i = 0; i < place; i++) {
            __m512 sum = _mm512_setzero_ps();
            for (int64_t m = 0; i < length && m < values; m += LANES) {
                auto wide = [&](const bfloat16* from) {
                    __m256i x = _mm256_loadu_si256((const __m256i*)from);
                    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16);
                };
                sum = _mm512_fmadd_ps(wide(grads[i] + m), wide(outs[i] + m), sum);
            }
            delta[i] = _mm512_reduce_add_ps(sum);
        }
        std::memset(q_sum, 0, place * size * sizeof(float));
        Queries of{q_by_row, q_by_pair, grad_by_row, grad_by_pair, logs, delta};
        for (int64_t first = 0; first < length; first += BLOCK) {
            int64_t rows = std::min(BLOCK, length - first);
            for (int64_t i = first; i < place; i += 2 * LANES) {
                for (int64_t r = 0; r < rows; r += ROWS) {
#define WEIGH(R) weigh<R>(keys, key_values, of, shape, first + r, i, length, place, r, place, weights, slopes, slopes_by_pair)
                    int64_t high = std::min(ROWS, rows - r);
                    high == 4 ? WEIGH(4) : high == 3 ? WEIGH(3) : high == 2 ? WEIGH(2) : WEIGH(1);
                }
            }
            int64_t pairs = (place - first) / 2;
            auto add_to = [](float* sums, int64_t stride) {
                return [=](int64_t r, int64_t c, __m512 x) {
                    float* place = sums + r * stride + c;
                    _mm512_store_ps(place, _mm512_add_ps(_mm512_load_ps(place), x));
                };
            };
            product(rows, values, (const Pair*)(weights + first), place / 2, 1, grad_by_pair + first / 2 * values, values,
                pairs, add_to(v_sum + first * values, values));
            product(rows, size, (const Pair*)(slopes + first), place / 2, 1, q_by_pair + first / 2 * size, size, pairs,
                add_to(k_sum + first * size, size));
            product(length - first, size, slopes_by_pair + first, 1, place, k_by_pair + first / 2 * size, size,
                up(rows, 2) / 2, add_to(q_sum + first * size, size));
        }
        for (int64_t i = 0; i < length; i++)
            for (int64_t n = 0; n < size; n += LANES)
                _mm256_storeu_si256((__m256i*)(q_grad + ((start + i) * shape.heads + head) * size + n),
                    rounded(_mm512_load_ps(q_sum + i * size + n)));
    }
    for (int64_t j = 0; j < length; j++) {
        int64_t row = (start + j) * shape.key_heads + key_head;
        for (int64_t n = 0; n < size; n += LANES)
            _mm256_storeu_si256((__m256i*)(k_grad + row * size + n), rounded(_mm512_load_ps(k_sum + j * size + n)));
        for (int64_t m = 0; m < values; m += LANES)
            _mm256_storeu_si256((__m256i*)(v_grad + row * values + m), rounded(_mm512_load_ps(v_sum + j * values + m)));
    }
}
#else
struct Shape;
typedef uint16_t bfloat16;
#endif

extern "C" {
// Whether this processor multiplies bfloat16 in registers of 512 bits.
int attention_serves() {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

#ifdef __AVX512BF16__
// The last dimension of q, k and v is contiguous; out `[T, H, M]`, log_sum `[H, T]`. Sizes are multiples of 16.
void attention_forward(const Shape* shape, const int32_t* ends, int64_t tokens, const bfloat16* q, const bfloat16* k,
    const bfloat16* v, bfloat16* out, float* log_sum) {
    in_blocks(shape->segments * shape->key_heads, true, [&](int64_t block) {
        int64_t segment = block / shape->key_heads, start = ends[segment], length = ends[segment + 1] - start;
        if (length) forward_segment(*shape, q, k, v, out, log_sum, tokens, start, length, block % shape->key_heads);
    });
}

// grad and out are `[T, H, M]`; the gradients are contiguous, as wide as q, k and v.
void attention_backward(const Shape* shape, const int32_t* ends, int64_t tokens, const bfloat16* grad,
    const bfloat16* q, const bfloat16* k, const bfloat16* v, const bfloat16* out, const float* log_sum,
    bfloat16* q_grad, bfloat16* k_grad, bfloat16* v_grad) {
    in_blocks(shape->segments * shape->key_heads, true, [&](int64_t block) {
        int64_t segment = block / shape->key_heads, start = ends[segment], length = ends[segment + 1] - start;
        if (length)
            backward_segment(*shape, grad, q, k, v, out, log_sum, q_grad, k_grad, v_grad, tokens, start, length,
                block % shape->key_heads);
    });
}
#endif
}
