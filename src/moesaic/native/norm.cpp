// RMSNorm of rows and its gradients, each row read once where PyTorch's operations make nine passes over all of them.
//
// Shape legend: R rows, D numbers of a row. y = x · s · w with s = 1 / sqrt(mean of x² + eps), all in float32 whatever
// is stored.

#include <algorithm>
#include <cmath>
#include <vector>

#include "numbers.h"

namespace {

// The sum of f(i) over a row: f gives sixteen numbers from `i` on, or one.
template <class Wide, class One>
inline float total(int64_t D, Wide wide, One one) {
    Lanes sums{};
    int64_t i = 0;
    for (; i + LANES <= D; i += LANES) sums += wide(i);
    float result = sum(sums);
    for (; i < D; ++i) result += one(i);
    return result;
}

template <class X, class Y>
void forward(const X* all_x, const float* w, int64_t R, int64_t D, float eps, Y* all_y, float* scale) {
#pragma omp parallel for schedule(static) if (worth_threads(R * D))
    for (int64_t r = 0; r < R; ++r) {
        const X* x = all_x + r * D;
        Y* y = all_y + r * D;
        const float square = total(
            D, [&](int64_t i) { return load(x + i) * load(x + i); }, [&](int64_t i) { return number(x[i]) * number(x[i]); }
        );
        const float s = 1 / std::sqrt(square / float(D) + eps);
        for (int64_t i = 0; i < D; ++i) store(y[i], number(x[i]) * s * w[i]);
        scale[r] = s;
    }
}

// dw is summed over parts of so many rows, and then over the parts, so that it is the same for any number of threads.
inline int64_t rows_of_a_part(int64_t D) { return std::max<int64_t>(1, 32768 / D); }

template <class X, class Y>
void backward(
    const X* all_x, const float* w, const float* scale, const Y* all_dy, int64_t R, int64_t D, X* all_dx, float* dw
) {
    const int64_t size = rows_of_a_part(D), parts = (R + size - 1) / size;
    std::vector<float> sums(parts * D);
#pragma omp parallel for schedule(static) if (worth_threads(R * D))
    for (int64_t part = 0; part < parts; ++part)
        for (int64_t r = part * size; r < std::min(R, (part + 1) * size); ++r) {
            const X* x = all_x + r * D;
            const Y* dy = all_dy + r * D;
            X* dx = all_dx + r * D;
            float* mine = sums.data() + part * D;
            const float s = scale[r];
            const float along = total(
                D, [&](int64_t i) { return load(dy + i) * load(w + i) * load(x + i); },
                [&](int64_t i) { return number(dy[i]) * w[i] * number(x[i]); }
            );
            const float pull = along * s * s / float(D);
            for (int64_t i = 0; i < D; ++i) {
                const float given = number(dy[i]), value = number(x[i]);
                store(dx[i], s * (given * w[i] - value * pull));
                mine[i] += given * value * s;
            }
        }
    std::fill_n(dw, D, 0.0f);
    for (int64_t part = 0; part < parts; ++part)
        for (int64_t i = 0; i < D; ++i) dw[i] += sums[part * D + i];
}

}  // namespace

#define KERNELS(x_name, X, y_name, Y)                                                                                  \
    extern "C" void rms_norm_##x_name##_##y_name(                                                                      \
        const X* x, const float* w, int64_t R, int64_t D, const float* eps, Y* y, float* scale                         \
    ) {                                                                                                                \
        forward(x, w, R, D, *eps, y, scale);                                                                           \
    }                                                                                                                  \
    extern "C" void rms_norm_backward_##x_name##_##y_name(                                                             \
        const X* x, const float* w, const float* scale, const Y* dy, int64_t R, int64_t D, X* dx, float* dw            \
    ) {                                                                                                                \
        backward(x, w, scale, dy, R, D, dx, dw);                                                                       \
    }

KERNELS(float32, float, float32, float)
KERNELS(float32, float, bfloat16, bf16)
KERNELS(bfloat16, bf16, bfloat16, bf16)
