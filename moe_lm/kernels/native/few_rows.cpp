// The operations of a decoding step, in products of few rows with large matrices; kernels/cpu_decode.py calls them.
//
// Plain pointers and no header of torch: it compiles in three seconds. The reference of every function is the torch code
// of model/, which runs where there is no compiler. T is the data type of everything that states no other.

#include <numeric>

#include "products.hpp"
#include "threads.hpp"

template <class T>
static const float* as_floats(const T* x, int64_t size, float* memory) {
    for (int64_t i = 0; i < size; i++) memory[i] = one(x + i);
    return memory;
}

static const float* as_floats(const float* x, int64_t, float*) { return x; }

// Whether products of this many rows with this many weights take 20 us or more, for which another thread is worth waking
static bool is_large(int64_t weights, int64_t rows) { return weights * (8 + rows) > 1 << 20; }

constexpr int64_t BLOCK = 64;  // of outputs, which a thread computes at a time
constexpr int64_t MANY = 64;   // rows, below which a loop over them is too short for more than one thread

template <class T>
static void add(float* y, int64_t rows, int64_t size, const T* bias, int64_t from) {
    if (bias)
        for (int64_t i = 0; i < rows * size; i++) y[i] += one(bias + from + i % size);
}

// y [R, O] = x [R, I] @ w [O, I].T + bias [O]
template <class T>
static void linear(const T* x, int64_t rows, const T* w, const T* bias, int64_t inputs, int64_t outputs, T* y) {
    const float* x32 = as_floats(x, rows * inputs, scratch<0>(rows * inputs));
    in_blocks((outputs + BLOCK - 1) / BLOCK, is_large(inputs * outputs, rows), [&](int64_t block) {
        int64_t from = block * BLOCK;
        int64_t size = std::min(BLOCK, outputs - from);
        float* out = scratch<1>(rows * size);
        times_transposed(x32, inputs, rows, w + from * inputs, inputs, inputs, size, out, size);
        add(out, rows, size, bias, from);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t o = 0; o < size; o++) put(y + r * outputs + from + o, out[r * size + o]);
    });
}

// y = x / sqrt(mean(x^2) + eps) * w, row by row
template <class T>
static void rms_norm(const T* x, int64_t rows, int64_t size, const T* w, float eps, T* y) {
    in_blocks(rows, rows > MANY, [&](int64_t r) {
        const float* x32 = as_floats(x + r * size, size, scratch<0>(size));
        Floats squares = {};
        int64_t i = 0;
        for (; i + LANES <= size; i += LANES) squares += load(x32 + i) * load(x32 + i);
        float total = sum(squares);
        for (; i < size; i++) total += x32[i] * x32[i];
        float factor = 1 / std::sqrt(total / size + eps);
        for (i = 0; i < size; i++) put(y + r * size + i, x32[i] * factor * one(w + i));
    });
}

// Heads x [R, H, N]: the first 2 * half entries rotated by the angles [R, half], as rotary.rotate does
template <class T>
static void rotate(const T* heads_x, const float* cos, const float* sin, int64_t rows, int64_t heads, int64_t size,
                   int64_t half, int64_t interleave, T* y) {
    int64_t step = interleave ? 2 : 1, apart = interleave ? 1 : half;
    in_blocks(rows * heads, rows > MANY, [&](int64_t head) {
        const float *c = cos + head / heads * half, *s = sin + head / heads * half;
        T *x = (T*)scratch<0>(size), *out = y + head * size;
        std::memcpy(x, heads_x + head * size, size * sizeof(T));  // y may be where the heads are
        for (int64_t i = 0; i < half; i++) {
            float first = one(x + i * step), second = one(x + i * step + apart);
            put(out + i, first * c[i] - second * s[i]);
            put(out + half + i, second * c[i] + first * s[i]);
        }
        std::memcpy(out + 2 * half, x + 2 * half, (size - 2 * half) * sizeof(T));
    });
}

// From x [R, I] queries [R, H, N], keys [R, K, N] and values [R, K, N], normed where there is a norm (over `norm_heads`
// and `norm_key_heads` heads together) and rotated where there are angles
template <class T>
static void project(const T* x, const T* w_q, const T* bias_q, const T* w_k, const T* bias_k, const T* w_v,
                    const T* bias_v, const T* norm_q, const T* norm_k, const float* cos, const float* sin, int64_t rows,
                    int64_t inputs, int64_t heads, int64_t key_heads, int64_t size, int64_t norm_heads,
                    int64_t norm_key_heads, float eps, int64_t half, int64_t interleave, T* q, T* k, T* v) {
    linear(x, rows, w_q, bias_q, inputs, heads * size, q);
    linear(x, rows, w_k, bias_k, inputs, key_heads * size, k);
    linear(x, rows, w_v, bias_v, inputs, key_heads * size, v);
    if (norm_q) rms_norm(q, rows * heads / norm_heads, norm_heads * size, norm_q, eps, q);
    if (norm_k) rms_norm(k, rows * key_heads / norm_key_heads, norm_key_heads * size, norm_k, eps, k);
    if (cos) {
        rotate(q, cos, sin, rows, heads, size, half, interleave, q);
        rotate(k, cos, sin, rows, key_heads, size, half, interleave, k);
    }
}

static inline Floats exp(Floats x) {
    x = x < -87.0f ? Floats{} - 87.0f : x;
    x = x > 88.0f ? Floats{} + 88.0f : x;
    Floats scaled = x * 1.44269504f;
    Ints power = __builtin_convertvector(scaled + (scaled < 0 ? Floats{} - 0.5f : Floats{} + 0.5f), Ints);
    Floats n = __builtin_convertvector(power, Floats);
    x = x - n * 0.693359375f + n * 2.12194440e-4f;  // in [-ln(2) / 2, ln(2) / 2]; ln(2) in two parts
    Floats y = 1 + x * (1 + x * (1 / 2.f + x * (1 / 6.f + x * (1 / 24.f + x * (1 / 120.f + x * (1 / 720.f))))));
    return y * (Floats)((power + 127) << 23);
}

// scores [size] become their softmax times `scale`; there is room for LANES more, which are overwritten
static void softmax(float* scores, int64_t size, float scale) {
    float largest = -INFINITY;
    for (int64_t i = 0; i < size; i++) largest = scores[i] > largest ? scores[i] : largest;
    for (int64_t i = size; i < size + LANES; i++) scores[i] = -INFINITY;  // whose share is 1e-38
    Floats totals = {};
    for (int64_t i = 0; i < size; i += LANES) {
        Floats shares = exp((load(scores + i) - largest) * scale);
        store(scores + i, shares);
        totals += shares;
    }
    float factor = 1 / sum(totals);
    for (int64_t i = 0; i < size; i++) scores[i] *= factor;
}

// One new token in each row: k [R, K, N] and v [R, K, M] go to place lengths[r] of the cache, q [R, H, N] attends to all
// up to it. The steps are the entries between two rows, heads and places. Without v, values lie in the keys.
template <class T>
static void attend(const T* q, const T* k, const T* v, T* keys, T* values, const int64_t* lengths, int64_t row_step,
                   int64_t head_step, int64_t step, int64_t rows, int64_t heads, int64_t key_heads, int64_t size,
                   int64_t value_size, float scale, T* out) {
    int64_t sharing = heads / key_heads, to_values = (const char*)values - (const char*)keys;
    auto start_of = [=](int64_t task) { return task / key_heads * row_step + task % key_heads * head_step; };
    int64_t kept = std::accumulate(lengths, lengths + rows, rows) * key_heads * (size + value_size);
    in_blocks(rows * key_heads, is_large(kept, sharing), [&](int64_t task) {
        int64_t length = lengths[task / key_heads], start = start_of(task);
        std::memcpy(keys + start + length * step, k + task * size, size * sizeof(T));
        if (v) std::memcpy(values + start + length * step, v + task * value_size, value_size * sizeof(T));
        int64_t places = length + 1, room = places + LANES;
        const float* q32 = as_floats(q + task * sharing * size, sharing * size, scratch<0>(sharing * size));
        float* scores = scratch<1>(sharing * room);
        const T* next = keys + start_of(task + 1 < rows * key_heads ? task + 1 : task);
        times_transposed(q32, size, sharing, keys + start, step, size, places, scores, room, to_values);
        for (int64_t h = 0; h < sharing; h++) softmax(scores + h * room, places, scale);
        float* mixed = scratch<2>(sharing * value_size);
        times(scores, room, sharing, values + start, step, places, value_size, mixed, value_size, next, true);
        for (int64_t i = 0; i < sharing * value_size; i++) put(out + task * sharing * value_size + i, mixed[i]);
    });
}

// The `per_token` experts with the best score plus bias, the best one first, and their weights from the scores only:
// x [T, D] times w [E, D].T -> logits [T, E], scores [T, E], chosen [T, k], weights [T, k], as moe.route without groups
static void route(const float* x, const float* w, const float* bias, int64_t tokens, int64_t size, int64_t number,
                  int64_t per_token, int64_t sigmoid, int64_t normalise, float factor, float* all_logits,
                  float* all_scores, int64_t* all_chosen, float* all_weights) {
    linear(x, tokens, w, (const float*)nullptr, size, number, all_logits);
    in_blocks(tokens, tokens > MANY, [&](int64_t t) {
        const float* logits = all_logits + t * number;
        float *choice = scratch<0>(number), *scores = all_scores + t * number, *weights = all_weights + t * per_token;
        int64_t* chosen = all_chosen + t * per_token;
        float largest = logits[0], total = 0;
        for (int64_t e = 1; e < number; e++) largest = logits[e] > largest ? logits[e] : largest;
        for (int64_t e = 0; e < number; e++) {
            scores[e] = sigmoid ? 1 / (1 + std::exp(-logits[e])) : std::exp(logits[e] - largest);
            total += scores[e];
        }
        for (int64_t e = 0; e < number; e++) choice[e] = (scores[e] /= sigmoid ? 1 : total) + bias[e];
        bool broken = total != total;  // NaN is greater than nothing, and k experts are needed all the same
        total = 1e-20f;
        for (int64_t j = 0; j < per_token; j++) {
            int64_t best = broken ? j : 0;
            for (int64_t e = 1; e < number && !broken; e++) best = choice[e] > choice[best] ? e : best;
            chosen[j] = best;
            total += weights[j] = scores[best];
            choice[best] = -INFINITY;
        }
        for (int64_t j = 0; j < per_token; j++) weights[j] = weights[j] / (normalise ? total : 1) * factor;
    });
}

enum Activation { SILU, RELU, GELU };

static void activate(float* x, int64_t size, int64_t activation) {
    int64_t i = 0;
    if (activation == SILU) {
        for (; i + LANES <= size; i += LANES) store(x + i, load(x + i) / (1 + exp(-load(x + i))));
        Floats rest = {};  // a vector too: std::exp rounds differently, and which entries are last depends on the rows
        std::memcpy(&rest, x + i, (size - i) * sizeof *x);
        rest = rest / (1 + exp(-rest));
        std::memcpy(x + i, &rest, (size - i) * sizeof *x);
        return;
    }
    for (; i < size; i++) {
        if (activation == RELU) x[i] = x[i] < 0 ? 0 : x[i];
        if (activation == GELU) x[i] = x[i] * 0.5f * (1 + std::erf(x[i] * 0.70710678f));
    }
}

// y [R, O] = act(x @ gate.T + gate_bias) * (x @ up.T + up_bias); without `gate` it is act(x @ up.T + up_bias)
template <class T>
static void widen(const T* x, int64_t rows, const T* gate, const T* gate_bias, const T* up, const T* up_bias,
                  int64_t inputs, int64_t outputs, int64_t activation, T* y) {
    const float* x32 = as_floats(x, rows * inputs, scratch<0>(rows * inputs));
    in_blocks((outputs + BLOCK - 1) / BLOCK, is_large((gate ? 2 : 1) * inputs * outputs, rows), [&](int64_t block) {
        int64_t from = block * BLOCK;
        int64_t size = std::min(BLOCK, outputs - from);
        float *u = scratch<1>(rows * size), *g = scratch<2>(rows * size);
        times_transposed(x32, inputs, rows, up + from * inputs, inputs, inputs, size, u, size);
        add(u, rows, size, up_bias, from);
        if (gate) {
            times_transposed(x32, inputs, rows, gate + from * inputs, inputs, inputs, size, g, size);
            add(g, rows, size, gate_bias, from);
        }
        activate(gate ? g : u, rows * size, activation);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t o = 0; o < size; o++)
                put(y + r * outputs + from + o, gate ? g[r * size + o] * u[r * size + o] : u[r * size + o]);
    });
}

// y [R, D] = the rows widened as above, times down [D, F].T + down_bias; hidden [R, F] is memory for what lies between
template <class T>
static void feed_forward(const T* x, int64_t rows, const T* gate, const T* gate_bias, const T* up, const T* up_bias,
                         const T* down, const T* down_bias, int64_t size, int64_t width, int64_t activation, T* hidden,
                         T* y) {
    widen(x, rows, gate, gate_bias, up, up_bias, size, width, activation, hidden);
    linear(hidden, rows, down, down_bias, width, size, y);
}

// y [T, D] = sum over a token's experts of weights [T, k] * down(act(gate(x)) * up(x)). The stack `wide` [E, D, 2F] has
// gate and up side by side, `down` is [E, F, D]; not `gated`, it is down(act(up(x))) and `wide` is up, [E, D, F].
// Only the chosen experts are read, each once for all of its tokens.
template <class T>
static void experts(const T* x, const int64_t* chosen, const float* weights, int64_t tokens, int64_t per_token,
                    int64_t number, const T* wide, const T* down, int64_t gated, int64_t hidden, int64_t width,
                    int64_t activation, T* y) {
    int64_t slots = tokens * per_token, columns = gated ? 2 * width : width;
    int64_t* ends = (int64_t*)scratch<0>(2 * (number + 1 + 2 * slots));  // of each expert's slots in sorted order
    int64_t *sorted = ends + number + 1, *place = sorted + slots;
    std::memset(ends, 0, (number + 1) * sizeof *ends);
    for (int64_t slot = 0; slot < slots; slot++) ends[chosen[slot] + 1]++;
    for (int64_t e = 0; e < number; e++) ends[e + 1] += ends[e];
    for (int64_t slot = 0; slot < slots; slot++) sorted[place[slot] = ends[chosen[slot]]++] = slot;
    float* outs = scratch<1>(slots * hidden);
    in_blocks(number, is_large(3 * hidden * width * std::min(number, slots), slots / number), [&](int64_t e) {
        int64_t first = e ? ends[e - 1] : 0, rows = ends[e] - first;
        if (rows == 0) return;
        float *in = scratch<2>(rows * hidden), *h = scratch<3>(rows * columns);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < hidden; i++)
                in[r * hidden + i] = one(x + sorted[first + r] / per_token * hidden + i);
        int64_t following = e + 1;
        while (following < number && ends[following] == ends[following - 1]) following++;
        const T *own = wide + e * hidden * columns, *next = wide + following % number * hidden * columns;
        const T* own_down = down + e * hidden * width;
        times(in, hidden, rows, own, columns, hidden, columns, h, columns, own_down, false);
        for (int64_t r = 0; r < rows; r++) {
            float *g = h + r * columns, *u = g + width;
            activate(g, width, activation);
            for (int64_t i = 0; gated && i < width; i++) g[i] *= u[i];
        }
        times(h, columns, rows, own_down, hidden, width, hidden, outs + first * hidden, hidden, next, false);
    });
    in_blocks(tokens, tokens > MANY, [&](int64_t t) {
        float* total = scratch<2>(hidden);
        std::memset(total, 0, hidden * sizeof *total);
        for (int64_t j = t * per_token; j < (t + 1) * per_token; j++)
            for (int64_t i = 0; i < hidden; i++) total[i] += weights[j] * outs[place[j] * hidden + i];
        for (int64_t i = 0; i < hidden; i++) put(y + t * hidden + i, total[i]);
    });
}

#define FUNCTIONS(T)                                                                                              \
    {(void*)linear<T>,  (void*)feed_forward<T>, (void*)rms_norm<T>, (void*)rotate<T>, (void*)project<T>,          \
     (void*)attend<T>, (void*)route, (void*)experts<T>}
extern "C" {
void* few_rows_float32[] = FUNCTIONS(float);
void* few_rows_bfloat16[] = FUNCTIONS(bfloat16);
}
