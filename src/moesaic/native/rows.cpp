// Products of few rows with the matrices of their experts, as fast as those matrices are read.
//
// With a row or two for each matrix a product is a walk through memory, and what PyTorch calls for it reads at
// half of the rate or less (benchmarks/cpu_choices.py). Here each row of a matrix is read once, from start to
// end, by one thread; one call serves all experts. Sums are float32, in one order whatever the threads.
//
// Rows are sorted by expert: n counts the experts that have rows, hit[n] is the expert, end[n] the row after its
// last. Shape legend: T tokens, R rows, E experts, O outputs, I inputs, D width, G and H the hidden width before
// and after the activation (G = 2H for SwiGLU, its gate first).

#include <algorithm>
#include <cmath>

#include "numbers.h"

namespace {

// The rows of each expert that has any.
struct Rows {
    const int64_t *hit, *end;
    int64_t used;
    int64_t begin(int64_t n) const { return n ? end[n - 1] : 0; }
};

// One matrix [O, I] for each expert, perhaps in steps of `scale` for each output, and perhaps a bias [E, O].
template <class W, class B>
struct Stack {
    const W* matrix;
    const float* scale;
    const B* bias;
    int64_t O, I;
};

template <class W>
inline float dot(const W* w, const float* x, int64_t size) {
    Lanes even{}, odd{};  // two, so that one addition need not wait for the other
    int64_t i = 0;
    for (; i + 2 * LANES <= size; i += 2 * LANES) {
        even += load(w + i) * load(x + i);
        odd += load(w + i + LANES) * load(x + i + LANES);
    }
    float total = sum(even + odd);
    for (; i < size; ++i) total += number(w[i]) * x[i];
    return total;
}

// Four rows at once, so that a weight is turned into a number once.
template <class W>
inline void dot4(const W* w, const float* x, int64_t size, float* totals) {
    Lanes sums[4] = {};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        const Lanes weights = load(w + i);
        for (int k = 0; k < 4; ++k) sums[k] += weights * load(x + k * size + i);
    }
    for (int k = 0; k < 4; ++k) totals[k] = sum(sums[k]);
    for (; i < size; ++i)
        for (int k = 0; k < 4; ++k) totals[k] += number(w[i]) * x[k * size + i];
}

// This thread's part of out[r, o] = scale[e, o] · <matrix[e, o, :], x[r, :]> + bias[e, o].
template <class W, class B>
void products(const float* x, const Stack<W, B>& stack, const Rows& rows, float* out) {
    const auto [matrix, scale, bias, O, I] = stack;
    const Share share(rows.used * O);
    for (int64_t task = share.begin; task < share.end; ++task) {
        const int64_t n = task / O, o = task % O, at = rows.hit[n] * O + o, end = rows.end[n];
        const W* w = matrix + at * I;
        const float by = scale ? scale[at] : 1, plus = bias ? number(bias[at]) : 0;
        int64_t r = rows.begin(n);
        for (; r + 4 <= end; r += 4) {
            float totals[4];
            dot4(w, x + r * I, I, totals);
            for (int k = 0; k < 4; ++k) out[(r + k) * O + o] = totals[k] * by + plus;
        }
        for (; r < end; ++r) out[r * O + o] = dot(w, x + r * I, I) * by + plus;
    }
}

enum Kind { SWIGLU, RELU, GELU, RELU2 };

inline float activated(const float* z, int64_t h, int64_t H, Kind kind) {
    const float value = z[h];
    if (kind == SWIGLU) return value / (1 + std::exp(-value)) * z[H + h];
    if (kind == GELU) return value * 0.5f * (1 + std::erf(value * 0.70710678f));
    const float positive = value > 0 || value != value ? value : 0;  // a NaN stays one
    return kind == RELU ? positive : positive * positive;
}

// y[t] = Σ over the rows r of token t of weight · (down · activate(first · x[t])). Row r is choice order[r] of the
// K·T whose weights are given, or nobody's. In `room` are what goes into the matrices and what comes out.
template <class W, class B>
void experts(const float* x, const int64_t* order, const float* weight, float* y, const Stack<W, B>& first,
             const Stack<W, B>& down, const Rows& rows, Kind kind, int64_t T, int64_t K, float* room) {
    const int64_t R = rows.end[rows.used - 1], D = first.I, G = first.O, H = down.I;
    float *x_R = room, *z = x_R + R * D, *a = z + R * G, *y_R = a + R * H;
    for (int64_t r = 0; r < R; ++r) std::copy_n(x + std::min(order[r] / K, T - 1) * D, D, x_R + r * D);
#pragma omp parallel if (worth_threads(rows.used * (G * D + D * H)))
    {
        products(x_R, first, rows, z);
#pragma omp barrier
        const Share hidden(R * H);
        for (int64_t i = hidden.begin; i < hidden.end; ++i) a[i] = activated(z + i / H * G, i % H, H, kind);
#pragma omp barrier
        products(a, down, rows, y_R);
#pragma omp barrier
        const Share columns(D);
        for (int64_t t = 0; t < T; ++t) std::fill(y + t * D + columns.begin, y + t * D + columns.end, 0.0f);
        for (int64_t r = 0; r < R; ++r) {
            if (order[r] == T * K) continue;
            const float by = weight[order[r]];
            float* to = y + order[r] / K * D;
            for (int64_t d = columns.begin; d < columns.end; ++d) to[d] += by * y_R[r * D + d];
        }
    }
}

// out[r, i] = Σ_o x[r, o] · matrix[e, o, i]: the same matrices from the other side, as backward needs them.
template <class W>
void transposed_products(const float* x, const W* matrix, int64_t O, int64_t I, const Rows& rows, float* out) {
    // Whole rows where there are experts for every thread; else each thread takes some columns of all.
    const int64_t width = rows.used >= 4 * omp_get_max_threads() ? I : std::min<int64_t>(I, 512);
    const int64_t blocks = (I + width - 1) / width;
#pragma omp parallel if (worth_threads(rows.used * O * I))
    {
        const Share share(rows.used * blocks);
        for (int64_t task = share.begin; task < share.end; ++task) {
            const int64_t n = task / blocks, from = task % blocks * width, size = std::min(width, I - from);
            const int64_t begin = rows.begin(n), end = rows.end[n];
            for (int64_t r = begin; r < end; ++r) std::fill_n(out + r * I + from, size, 0.0f);
            for (int64_t o = 0; o < O; ++o) {
                const W* w = matrix + (rows.hit[n] * O + o) * I + from;
                for (int64_t r = begin; r < end; ++r) {
                    const float by = x[r * O + o];
                    float* to = out + r * I + from;
#pragma omp simd
                    for (int64_t i = 0; i < size; ++i) to[i] += by * number(w[i]);
                }
            }
        }
    }
}

// grad[e, o, i] = Σ_r dy[r, o] · x[r, i] over the rows of each expert; zero where it has none. `end` is of every
// expert here.
template <class W>
void outer_products(const float* dy, const float* x, W* grad, const int64_t* end, int64_t E, int64_t O,
                    int64_t I) {
#pragma omp parallel if (worth_threads(E * O * I))
    {
        const Share share(E * O);
        for (int64_t task = share.begin; task < share.end; ++task) {
            const int64_t e = task / O, o = task % O, begin = e ? end[e - 1] : 0;
            W* row = grad + task * I;
            if (begin == end[e]) {
                std::memset(row, 0, I * sizeof(W));
                continue;
            }
            constexpr int64_t BLOCK = 64;
            for (int64_t from = 0; from < I; from += BLOCK) {
                const int64_t size = std::min(BLOCK, I - from);
                float sums[BLOCK] = {};
                for (int64_t r = begin; r < end[e]; ++r) {
                    const float by = dy[r * O + o];
                    const float* xs = x + r * I + from;
#pragma omp simd
                    for (int64_t i = 0; i < size; ++i) sums[i] += by * xs[i];
                }
                for (int64_t i = 0; i < size; ++i) store(row[from + i], sums[i]);
            }
        }
    }
}

}  // namespace

// One set of functions for each type of weights W, whose bias is of type B.
#define FOR_WEIGHTS(NAME, W, B)                                                                                 \
    extern "C" void products_##NAME(const float* x, const W* matrix, const float* scale, const B* bias,        \
                                    float* out, const int64_t* hit, const int64_t* end, int64_t used,          \
                                    int64_t O, int64_t I) {                                                    \
        const Stack<W, B> stack{matrix, scale, bias, O, I};                                                    \
        const Rows rows{hit, end, used};                                                                       \
        _Pragma("omp parallel if (worth_threads(used * O * I))") products(x, stack, rows, out);                \
    }                                                                                                          \
    extern "C" void experts_##NAME(const float* x, const int64_t* order, const float* weight, float* y,        \
                                   const W* first, const float* first_scale, const B* first_bias,              \
                                   const W* down, const float* down_scale, const B* down_bias,                 \
                                   const int64_t* hit, const int64_t* end, int64_t used, int64_t kind,         \
                                   int64_t T, int64_t K, int64_t D, int64_t G, int64_t H, float* room) {       \
        const Stack<W, B> in{first, first_scale, first_bias, G, D}, out{down, down_scale, down_bias, D, H};    \
        experts(x, order, weight, y, in, out, Rows{hit, end, used}, Kind(kind), T, K, room);                   \
    }
FOR_WEIGHTS(float32, float, float)
FOR_WEIGHTS(bfloat16, bf16, bf16)
FOR_WEIGHTS(int8, int8_t, float)

#define FOR_TRAINED_WEIGHTS(NAME, W)                                                                            \
    extern "C" void transposed_##NAME(const float* x, const W* matrix, float* out, const int64_t* hit,         \
                                      const int64_t* end, int64_t used, int64_t O, int64_t I) {                \
        transposed_products(x, matrix, O, I, Rows{hit, end, used}, out);                                       \
    }                                                                                                          \
    extern "C" void outer_##NAME(const float* dy, const float* x, W* grad, const int64_t* end, int64_t E,      \
                                 int64_t O, int64_t I) {                                                       \
        outer_products(dy, x, grad, end, E, O, I);                                                             \
    }
FOR_TRAINED_WEIGHTS(float32, float)
FOR_TRAINED_WEIGHTS(bfloat16, bf16)
