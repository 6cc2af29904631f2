// The squared norms of products L^T R of two stacks of rows, from the products of rows with rows: |L^T R|² is the sum
// over i and j of <L_i, L_j> <R_i, R_j>. Of few rows these are far fewer numbers than the product has.
//
// Rows are sorted by expert, end[e] the row after the last of expert e. Shape legend: K columns of a stack.

#include <algorithm>
#include <vector>

#include "numbers.h"

namespace {

constexpr int64_t BLOCK = 4;  // rows: 16 sums at a time, each a register

template <class T>
struct Stack {
    const T* rows;
    int64_t K;
};

// out[i][j] = <row first + i, row second + j> for blocks of at most BLOCK rows; rows after `end` count as zero.
template <class T>
void products(const Stack<T>& stack, int64_t first, int64_t second, int64_t end, float out[BLOCK][BLOCK]) {
    const int64_t K = stack.K;
    const T *a[BLOCK], *b[BLOCK];
    for (int64_t i = 0; i < BLOCK; ++i) {  // a row too many is the last one once more, and left out below
        a[i] = stack.rows + std::min(first + i, end - 1) * K;
        b[i] = stack.rows + std::min(second + i, end - 1) * K;
    }
    Lanes sums[BLOCK][BLOCK] = {};
    int64_t k = 0;
    for (; k + LANES <= K; k += LANES) {
        Lanes left[BLOCK];
        for (int64_t i = 0; i < BLOCK; ++i) left[i] = load(a[i] + k);
        for (int64_t j = 0; j < BLOCK; ++j) {
            const Lanes right = load(b[j] + k);
            for (int64_t i = 0; i < BLOCK; ++i) sums[i][j] += left[i] * right;
        }
    }
    for (int64_t i = 0; i < BLOCK; ++i)
        for (int64_t j = 0; j < BLOCK; ++j) {
            out[i][j] = sum(sums[i][j]);
            for (int64_t rest = k; rest < K; ++rest) out[i][j] += number(a[i][rest]) * number(b[j][rest]);
        }
}

struct Task {
    int64_t first, begin, end;  // a block of rows, and the rows of its expert
};

// The part of the sum that the pairs of one block with itself and the rows before it make.
template <class T>
double part(const Task& task, const Stack<T>& one, const Stack<T>& other) {
    double total = 0;
    for (int64_t second = task.begin; second <= task.first; second += BLOCK) {
        float left[BLOCK][BLOCK], right[BLOCK][BLOCK];
        products(one, task.first, second, task.end, left);
        products(other, task.first, second, task.end, right);
        const double twice = second == task.first ? 1 : 2;  // what is left out after it is the same once more
        for (int64_t i = 0; i < std::min(BLOCK, task.end - task.first); ++i)
            for (int64_t j = 0; j < std::min(BLOCK, task.end - second); ++j)
                total += twice * double(left[i][j]) * double(right[i][j]);
    }
    return total;
}

template <class T>
double squared_norms(const Stack<T>& one, const Stack<T>& other, const int64_t* end, int64_t experts) {
    std::vector<Task> tasks;
    for (int64_t e = 0; e < experts; ++e) {
        const int64_t begin = e ? end[e - 1] : 0;
        for (int64_t first = begin; first < end[e]; first += BLOCK) tasks.push_back({first, begin, end[e]});
    }
    std::vector<double> parts(tasks.size());  // added up in order, whichever thread makes which
#pragma omp parallel for schedule(dynamic)
    for (size_t n = 0; n < tasks.size(); ++n) parts[n] = part(tasks[n], one, other);
    double total = 0;
    for (const double value : parts) total += value;
    return total;
}

}  // namespace

#define KERNEL(name, T)                                                                                                \
    extern "C" void squared_norms_##name(                                                                              \
        const T* left, int64_t L, const T* right, int64_t R, const int64_t* end, int64_t experts, double* out          \
    ) {                                                                                                                \
        *out = squared_norms<T>({left, L}, {right, R}, end, experts);                                                  \
    }

KERNEL(float32, float)
KERNEL(bfloat16, bf16)
